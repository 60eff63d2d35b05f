"""What a model folder says about itself, read from its JSON files alone: no torch, no onnxruntime.

The folder is the diffusers layout (`model_index.json`, `scheduler/`, `vae/` or `vae_decoder/`, ...); an exported bundle has
the same files. Defaults for generation come from the folder's `tinydiff.toml` where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinydiff import config
from tinydiff.diffusion.schedules import SCHEDULES, Level, from_betas, linear, scaled_linear
from tinydiff.errors import ModelError
from tinydiff.files import read_json

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v", "flow_prediction": "flow"}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


@dataclass(frozen=True)
class Description:
    """What sampling needs to know of a model besides its networks."""

    path: Path
    schedule: list[Level]
    prediction: str
    latent_channels: int
    factor: int  # pixels a latent, along each side
    multiple: int  # width and height must be multiples of this many pixels
    scaling_factor: float
    size: int  # pixels, the side it was trained at
    generate: config.Generate


def describe(path: Path) -> Description:
    """The description of a model folder or bundle; ModelError names what is missing."""
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    vae = read_json(
        next(
            (p for n in ("vae", "vae_decoder") if (p := path / n / "config.json").exists()),
            path / "vae" / "config.json",
        )
    )
    unet = read_json(path / "unet" / "config.json")
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        toml = path / "tinydiff.toml"
        return Description(
            path=path,
            schedule=_levels(scheduler),
            prediction=PREDICTION_TYPES[scheduler.get("prediction_type", "epsilon")],
            latent_channels=int(vae.get("latent_channels", 4)),
            factor=factor,
            multiple=factor * 2 ** (len(unet["block_out_channels"]) - 1),
            scaling_factor=float(vae.get("scaling_factor") or 0.18215),
            size=int(unet["sample_size"]) * factor,
            generate=config.load(toml).generate if toml.exists() else config.Generate(),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: its configuration files lack or misstate {error}") from None


def _levels(scheduler: dict[str, Any]) -> list[Level]:
    count = int(scheduler.get("num_train_timesteps", 1000))
    if scheduler.get("trained_betas"):
        return from_betas(scheduler["trained_betas"])
    if scheduler.get("use_flow_sigmas"):
        return SCHEDULES["flow"](count)
    name = BETA_SCHEDULES[scheduler.get("beta_schedule", "linear")]
    if name == "cosine":
        return SCHEDULES[name](count)
    make = {"linear": linear, "scaled_linear": scaled_linear}[name]
    return make(count, scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02))


def scheduler_config(cfg: config.Config) -> dict[str, Any]:
    """`scheduler_config.json` that makes diffusers sample this model as tinydiff does by default."""
    names = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
    flow = cfg.diffusion.schedule == "flow"
    start, end = {"scaled_linear": (0.00085, 0.012)}.get(cfg.diffusion.schedule, (1e-4, 0.02))
    theirs = {ours: name for name, ours in BETA_SCHEDULES.items()}
    return {
        "_class_name": SCHEDULERS["dpmpp_2m" if flow else cfg.generate.sampler],
        "num_train_timesteps": cfg.diffusion.num_train_timesteps,
        "beta_schedule": theirs.get(cfg.diffusion.schedule, "linear"),
        "beta_start": start,
        "beta_end": end,
        "prediction_type": names[cfg.diffusion.prediction],
        "timestep_spacing": cfg.generate.schedule,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "final_sigmas_type": "zero",
    } | ({"use_flow_sigmas": True} if flow else {})
