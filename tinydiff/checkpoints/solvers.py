"""diffusers' scheduler classes: each one's defaults, our sampler for it, and the settings that this sampler ignores.

It knows the keys of `scheduler_config.json` alone, and computes no noise levels.
"""

from __future__ import annotations

import json
from typing import Any

from tinydiff.system import cut

Table = dict[str, Any]

BETAS: Table = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
BETAS |= {"trained_betas": None, "prediction_type": "epsilon"}
LATENT = BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
LINSPACE: Table = {"timestep_spacing": "linspace", "steps_offset": 0}
LEADING = LINSPACE | {"timestep_spacing": "leading"}
RESPACED = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
PLACED = LINSPACE | dict.fromkeys(RESPACED, False)
ZERO_SNR: Table = {"rescale_betas_zero_snr": False}
RANGE: Table = {"clip_sample_range": 1.0}
CLIPPED = RANGE | {"clip_sample": True}
THRESHOLD: Table = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
FLOW: Table = {"use_flow_sigmas": False, "flow_shift": 1.0}
SHIFTED: Table = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
MULTISTEP = BETAS | THRESHOLD | PLACED | FLOW | {"solver_order": 2, "lower_order_final": True}
DPM: Table = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lambda_min_clipped": -float("inf")}
DPM |= {"variance_type": None}
DDIM = BETAS | LEADING | ZERO_SNR | CLIPPED | THRESHOLD | {"set_alpha_to_one": True}
DDPM = BETAS | LEADING | ZERO_SNR | CLIPPED | THRESHOLD | {"variance_type": "fixed_small"}
LCM = DDIM | LATENT | {"beta_schedule": "scaled_linear", "clip_sample": False, "original_inference_steps": 50}
LCM |= {"timestep_scaling": 10.0}
FLOW_MATCH: Table = {"num_train_timesteps": 1000, "shift": 1.0}
ENDS: Table = {"sigma_min": None, "sigma_max": None}

CLASSES: dict[str, Table] = {  # the keys that each class has, with its own defaults
    "DDIMScheduler": DDIM,
    "DDIMParallelScheduler": DDIM,
    "DDIMInverseScheduler": {k: v for k, v in DDIM.items() if k not in THRESHOLD},
    "DDPMScheduler": DDPM,
    "DDPMParallelScheduler": DDPM,
    "DEISMultistepScheduler": MULTISTEP | SHIFTED | {"algorithm_type": "deis", "solver_type": "logrho"},
    "DPMSolverMultistepScheduler": MULTISTEP
    | DPM
    | SHIFTED
    | ZERO_SNR
    | {"euler_at_final": False, "use_lu_lambdas": False, "final_sigmas_type": "zero"},
    "DPMSolverMultistepInverseScheduler": MULTISTEP | DPM | {"euler_at_final": False},
    "DPMSolverSDEScheduler": LATENT | PLACED | {"noise_sampler_seed": None},
    "DPMSolverSinglestepScheduler": {k: v for k, v in MULTISTEP.items() if k not in LINSPACE}
    | DPM
    | SHIFTED
    | {"lower_order_final": False, "final_sigmas_type": "zero"},
    "EulerAncestralDiscreteScheduler": BETAS | LINSPACE | ZERO_SNR,
    "EulerDiscreteScheduler": BETAS
    | PLACED
    | ZERO_SNR
    | ENDS
    | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
    "FlowMatchEulerDiscreteScheduler": FLOW_MATCH
    | dict.fromkeys((*RESPACED, "use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"), False)
    | {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    | {"shift_terminal": None, "time_shift_type": "exponential"},
    "FlowMatchHeunDiscreteScheduler": FLOW_MATCH,
    "HeunDiscreteScheduler": LATENT | PLACED | CLIPPED | {"clip_sample": False},
    "KDPM2AncestralDiscreteScheduler": LATENT | PLACED,
    "KDPM2DiscreteScheduler": LATENT | PLACED,
    "LCMScheduler": LCM,
    "LMSDiscreteScheduler": BETAS | PLACED,
    "PNDMScheduler": BETAS | LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "SASolverScheduler": {k: v for k, v in (MULTISTEP | DPM).items() if k not in ("solver_order", "solver_type")}
    | {"algorithm_type": "data_prediction", "predictor_order": 2, "corrector_order": 2, "tau_func": None},
    "TCDScheduler": LCM,
    "UniPCMultistepScheduler": MULTISTEP
    | SHIFTED
    | ZERO_SNR
    | ENDS
    | {"solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "solver_p": None}
    | {"final_sigmas_type": "zero", "shift_terminal": None},
}
SINGLE = {"algorithm_type": "dpmsolver", "solver_type": "midpoint", "lower_order_final": True}
SINGLE |= {"final_sigmas_type": "sigma_min"}
PLUS = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
SDE = PLUS | {"algorithm_type": "sde-dpmsolver++"}
SCHEDULERS: dict[
    str, tuple[str, Table]
] = {  # our sampler -> the class that it draws, and the settings that it has there
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {"variance_type": "fixed_small"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm_solver_1": ("DPMSolverSinglestepScheduler", SINGLE | {"solver_order": 1}),
    "dpm_solver_2": ("DPMSolverSinglestepScheduler", SINGLE | {"solver_order": 2}),
    "dpm_solver_3": ("DPMSolverSinglestepScheduler", SINGLE | {"solver_order": 3}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", PLUS | {"solver_order": 2}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE | {"solver_order": 2}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", SDE | {"solver_order": 3}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
    "unipc": (
        "UniPCMultistepScheduler",
        {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "solver_p": None},
    ),
    "lcm": ("LCMScheduler", {"timestep_scaling": 10.0}),
    "tcd": ("TCDScheduler", {}),
}
SAME = {"DDIMParallelScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDPMScheduler"}
NEAREST = {  # classes that no sampler of ours draws -> the one that is taken instead
    "DDIMInverseScheduler": "ddim",
    "DPMSolverMultistepInverseScheduler": "dpmpp_2m",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "euler_ancestral",
    "SASolverScheduler": "dpmpp_2m_sde",
}
ALWAYS: Table = {  # what every sampler of ours does, where a class has the key
    "thresholding": False,
    "clip_sample": False,
    "lower_order_final": True,
    "interpolation_type": "linear",
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "variance_type": None,
}
# Other classes' names for a solver, which a class takes for its own
TAKEN = {
    "DEISMultistepScheduler": {"algorithm_type": (("dpmsolver", "dpmsolver++"), "deis")}
    | {"solver_type": (("midpoint", "heun", "bh1", "bh2"), "logrho")},
    "DPMSolverMultistepScheduler": {"algorithm_type": (("deis",), "dpmsolver++")}
    | {"solver_type": (("logrho", "bh1", "bh2"), "midpoint")},
    "UniPCMultistepScheduler": {"solver_type": (("midpoint", "heun", "logrho"), "bh2")},
}
TAKEN["DPMSolverSinglestepScheduler"] = TAKEN["DPMSolverMultistepScheduler"]
STEEP = ("heun", "dpm2", "dpm_solver_1", "dpm_solver_2", "dpm_solver_3", "plms", "lms", "deis")
OVER = "unless --sampler names another"


def brief(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    return cut(json.dumps(value[:9] if isinstance(value, list) else value, default=str), 40)


def completed(kind: str, given: Table) -> Table:
    """A file's keys that its class has, and the class's defaults for the others; ValueError for an unsupported class."""
    if kind not in CLASSES:
        raise ValueError(f"_class_name is {brief(kind)}, which is not supported; give DDIMScheduler or another that is")
    defaults, unset = CLASSES[kind], given.get("_use_default_values") or ()
    table = defaults | {k: v for k, v in given.items() if k in defaults and k not in unset}
    table |= {k: False for k, v in table.items() if v is None and isinstance(defaults[k], bool)}
    table |= {
        k: int(v) for k, v in table.items() if type(defaults[k]) is int and isinstance(v, float) and v.is_integer()
    }
    for key, (others, own) in TAKEN.get(kind, {}).items():
        table[key] = own if table[key] in others else table[key]
    return table


def sampler_of(kind: str, table: Table) -> str:
    """Our sampler for a class: of those that draw it the one with the most settings of the table."""
    kind = SAME.get(kind, kind)
    mine = {name: settings for name, (theirs, settings) in SCHEDULERS.items() if theirs == kind}
    if not mine:
        return NEAREST[kind]
    return max(mine, key=lambda name: sum(table[key] == value for key, value in mine[name].items()))


def unfollowed(kind: str, sampler: str, table: Table) -> list[str]:
    """The settings of a class that our sampler does not follow, a line each."""
    if kind in NEAREST:
        return [f"{kind}: drawn by {sampler} instead, {OVER}"]
    wanted = {k: v for k, v in ALWAYS.items() if k in table} | SCHEDULERS[sampler][1]
    if sampler == "dpmpp_2m" and table.get("final_sigmas_type") == "zero":
        del wanted["lower_order_final"]  # its last step is of first order anyway
    other = [f"{key} {brief(table[key])}" for key, value in wanted.items() if table[key] != value]
    return [f"{kind}: {', '.join(other)} not followed: drawn by {sampler}, {OVER}"] if other else []
