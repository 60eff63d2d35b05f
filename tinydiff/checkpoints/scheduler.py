"""diffusers' `scheduler_config.json`: noise levels, prediction and solver, read from any folder and written for ours.

Missing keys have diffusers' defaults, which depend on the class. It knows no network, and samplers by name only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tinydiff import config
from tinydiff.diffusion import schedules
from tinydiff.diffusion.schedules import CLEAN, RHOS, Level, Levels, sampling_levels, training_levels

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v", "flow_prediction": "flow"}
SINGLE = {"algorithm_type": "dpmsolver"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # our sampler -> diffusers' class and the settings it needs
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm_solver_1": ("DPMSolverSinglestepScheduler", SINGLE | {"solver_order": 1}),
    "dpm_solver_2": ("DPMSolverSinglestepScheduler", SINGLE | {"solver_order": 2}),
    "dpm_solver_3": ("DPMSolverSinglestepScheduler", SINGLE | {"solver_order": 3}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", SDE | {"solver_order": 3}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
LEADING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler")  # the others' default is "linspace"
RESPACED = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
TO_ALPHA_BAR = ("ddim", "plms")  # samplers whose last step depends on `set_alpha_to_one`
# Samplers whose classes compute one timestep more than there are steps, and drop the last.
BEYOND = ("dpm_solver_1", "dpm_solver_2", "dpm_solver_3", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "deis", "unipc")
BETWEEN = ("euler", "euler_ancestral", "heun", "dpm2", "dpmpp_sde", "lms")  # their "linspace" has fractional timesteps


@dataclass(frozen=True)
class Scheduler:
    """The contents of a scheduler_config.json in our terms."""

    schedule: Levels
    prediction: str
    offset: int  # of the "leading" spacing
    final: Level  # the last level of DDIM and PLMS
    sampler: str
    spacing: str

    def levels(self, sampler: str, steps: int, spacing: str) -> Levels:
        """The levels that a sampler's class in diffusers visits, noisiest first, the final one included."""
        end, whole = self.final if sampler in TO_ALPHA_BAR else CLEAN, sampler not in BETWEEN
        return sampling_levels(self.schedule, steps, spacing, self.offset, end, whole, int(sampler in BEYOND))


def read(scheduler: dict[str, Any]) -> Scheduler:
    """A `Scheduler` from a scheduler_config.json. Raises KeyError, TypeError or ValueError for invalid values."""
    kind, schedule = str(scheduler.get("_class_name")), _levels(scheduler)
    straight = kind.startswith("FlowMatch")
    spacing = scheduler.get("timestep_spacing") or ("leading" if kind in LEADING else "linspace")
    to_one = scheduler.get("set_alpha_to_one", kind != "PNDMScheduler")
    return Scheduler(
        schedule=schedule,
        prediction="flow" if straight else PREDICTION_TYPES[scheduler.get("prediction_type", "epsilon")],
        offset=int(scheduler.get("steps_offset", 0)),
        final=CLEAN if to_one else schedule[0],
        sampler=_sampler(kind, scheduler),
        spacing=next((name for key, name in RESPACED.items() if scheduler.get(key)), spacing),
    )


def _sampler(kind: str, scheduler: dict[str, Any]) -> str:
    """Our sampler for diffusers' class: the one with the most equal settings; DPM-Solver++ 2M for other classes."""
    if kind.startswith("FlowMatch"):
        return "heun" if kind.startswith("FlowMatchHeun") else "euler"

    def likeness(name: str) -> int:
        theirs, settings = SCHEDULERS[name]
        same = sum(scheduler.get(key) == value for key, value in settings.items())
        return (theirs == kind) * (10 + 2 * same - len(settings))

    best = max(SCHEDULERS, key=likeness)
    return best if likeness(best) else "dpmpp_2m"


def _levels(scheduler: dict[str, Any]) -> Levels:
    count = int(scheduler.get("num_train_timesteps", 1000))
    if str(scheduler.get("_class_name")).startswith("FlowMatch"):
        return schedules.flow(count, float(scheduler.get("shift", 1.0)))
    if scheduler.get("use_flow_sigmas"):
        return schedules.flow(count, float(scheduler.get("flow_shift", 1.0)))
    name = BETA_SCHEDULES[scheduler.get("beta_schedule", "linear")]
    if scheduler.get("trained_betas"):
        levels = schedules.from_betas(scheduler["trained_betas"])
    elif name == "cosine":
        levels = schedules.cosine(count)
    else:
        betas = (scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02))
        levels = {"linear": schedules.linear, "scaled_linear": schedules.scaled_linear}[name](count, *betas)
    return schedules.zero_terminal_snr(levels) if scheduler.get("rescale_betas_zero_snr") else levels


def write(cfg: config.Config) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers samples this model as tinydiff does by default."""
    d, g = cfg.diffusion, cfg.generate
    kind, settings = SCHEDULERS["dpmpp_2m" if d.schedule == "flow" else g.sampler]
    start, end = {"scaled_linear": (0.00085, 0.012)}.get(d.schedule, (1e-4, 0.02))
    names, predictions = ({ours: name for name, ours in table.items()} for table in (BETA_SCHEDULES, PREDICTION_TYPES))
    spacing = g.spacing if g.spacing in ("leading", "trailing", "linspace") else "linspace"
    scheduler = {"_class_name": kind, "num_train_timesteps": d.num_train_timesteps}
    scheduler |= {"beta_schedule": names.get(d.schedule, "linear"), "beta_start": start, "beta_end": end}
    scheduler |= {"prediction_type": predictions[d.prediction], "timestep_spacing": spacing, "steps_offset": 1}
    scheduler |= {"clip_sample": False, "set_alpha_to_one": True, "final_sigmas_type": "zero"} | settings
    if g.spacing in RHOS and d.schedule != "flow":  # without sigma_max diffusers starts far beyond our level
        named = "exponential" if g.spacing == "log_snr" else g.spacing
        scheduler |= {key: True for key, name in RESPACED.items() if name == named}
        levels = training_levels(d.schedule, d.num_train_timesteps, d.shift, d.zero_terminal_snr)
        scheduler |= dict(zip(("sigma_max", "sigma_min"), schedules.ends(levels), strict=True))
    if d.zero_terminal_snr:
        scheduler["rescale_betas_zero_snr"] = True
    if d.schedule == "flow":
        scheduler |= {"use_flow_sigmas": True, "flow_shift": d.shift}
    if d.schedule == "edm":
        bars = [1.0, *(level.alpha**2 for level in training_levels("edm", d.num_train_timesteps))]
        scheduler["trained_betas"] = [1 - after / before for before, after in pairwise(bars)]
    return scheduler
