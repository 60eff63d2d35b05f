"""`scheduler_config.json`, diffusers' form of noise levels, prediction and solver: read from any folder, written for ours.

Keys that a file lacks have diffusers' defaults, which differ from class to class. It knows no network and no sampler
beyond its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tinydiff import config
from tinydiff.diffusion.schedules import (
    CLEAN,
    RHOS,
    Level,
    Levels,
    cosine,
    ends,
    flow,
    from_betas,
    linear,
    sampling_levels,
    scaled_linear,
    training_levels,
    zero_terminal_snr,
)

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v", "flow_prediction": "flow"}
SINGLE = {"algorithm_type": "dpmsolver"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # our sampler -> diffusers' class, and what makes it that one
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
LEADING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler")  # by default; the others are linspace
RESPACED = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
TO_ALPHA_BAR = ("ddim", "plms")  # the solvers whose last step `set_alpha_to_one` governs
# Solvers whose classes lay out one timestep more than they take, and leave the last one out.
BEYOND = ("dpm_solver_1", "dpm_solver_2", "dpm_solver_3", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "deis", "unipc")
BETWEEN = ("euler", "euler_ancestral", "heun", "dpm2", "dpmpp_sde", "lms")  # whose "linspace" is not of whole timesteps


@dataclass(frozen=True)
class Scheduler:
    """What a scheduler_config.json says."""

    schedule: Levels
    prediction: str
    offset: int  # of "leading" timesteps
    final: Level  # where DDIM and PLMS end
    sampler: str
    spacing: str

    def end(self, sampler: str) -> Level:
        """The level that a sampler's last step goes to."""
        return self.final if sampler in TO_ALPHA_BAR else CLEAN

    def levels(self, sampler: str, steps: int, spacing: str) -> Levels:
        """The levels that diffusers' class of a sampler visits, noisiest first, and the one it ends on."""
        whole, beyond = sampler not in BETWEEN, int(sampler in BEYOND)
        return sampling_levels(self.schedule, steps, spacing, self.offset, self.end(sampler), whole, beyond)


def read(scheduler: dict[str, Any]) -> Scheduler:
    """A scheduler_config.json's contents. Raises KeyError, TypeError or ValueError where they make no sense."""
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
    """Our name of a solver; the nearest of the same kind, or DPM-Solver++ 2M, for what we have no name for."""
    if kind.startswith("FlowMatchHeun"):
        return "heun"
    if kind.startswith("FlowMatch"):
        return "euler"

    def likeness(name: str) -> int:
        theirs, settings = SCHEDULERS[name]
        same = sum(scheduler.get(key) == value for key, value in settings.items())
        return (theirs == kind) * (10 + 2 * same - len(settings))

    best = max(SCHEDULERS, key=likeness)
    return best if likeness(best) else "dpmpp_2m"


def _levels(scheduler: dict[str, Any]) -> Levels:
    count = int(scheduler.get("num_train_timesteps", 1000))
    if str(scheduler.get("_class_name")).startswith("FlowMatch"):
        return flow(count, float(scheduler.get("shift", 1.0)))
    if scheduler.get("use_flow_sigmas"):
        return flow(count, float(scheduler.get("flow_shift", 1.0)))
    betas = (scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02))
    name = BETA_SCHEDULES[scheduler.get("beta_schedule", "linear")]
    if scheduler.get("trained_betas"):
        levels = from_betas(scheduler["trained_betas"])
    else:
        levels = (
            cosine(count)
            if name == "cosine"
            else {"linear": linear, "scaled_linear": scaled_linear}[name](count, *betas)
        )
    return zero_terminal_snr(levels) if scheduler.get("rescale_betas_zero_snr") else levels


def write(cfg: config.Config) -> dict[str, Any]:
    """`scheduler_config.json` that makes diffusers sample this model as tinydiff does by default."""
    names = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
    d, g = cfg.diffusion, cfg.generate
    kind, settings = SCHEDULERS["dpmpp_2m" if d.schedule == "flow" else g.sampler]
    start, end = {"scaled_linear": (0.00085, 0.012)}.get(d.schedule, (1e-4, 0.02))
    theirs = {ours: name for name, ours in BETA_SCHEDULES.items()}
    found = {
        "_class_name": kind,
        "num_train_timesteps": d.num_train_timesteps,
        "beta_schedule": theirs.get(d.schedule, "linear"),
        "beta_start": start,
        "beta_end": end,
        "prediction_type": names[d.prediction],
        "timestep_spacing": g.schedule if g.schedule in ("leading", "trailing", "linspace") else "linspace",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "final_sigmas_type": "zero",
    }
    found |= settings
    if g.schedule in RHOS and d.schedule != "flow":  # without sigma_max diffusers starts far beyond our level
        named = "exponential" if g.schedule == "log_snr" else g.schedule
        found |= {key: True for key, name in RESPACED.items() if name == named}
        levels = training_levels(d.schedule, d.num_train_timesteps, d.shift, d.zero_terminal_snr)
        found |= dict(zip(("sigma_max", "sigma_min"), ends(levels), strict=True))
    if d.zero_terminal_snr:
        found["rescale_betas_zero_snr"] = True
    if d.schedule == "flow":
        found |= {"use_flow_sigmas": True, "flow_shift": d.shift}
    if d.schedule == "edm":
        bars = [1.0, *(level.alpha**2 for level in training_levels("edm", d.num_train_timesteps))]
        found["trained_betas"] = [1 - after / before for before, after in pairwise(bars)]
    return found
