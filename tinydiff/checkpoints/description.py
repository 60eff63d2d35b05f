"""What sampling needs to know of a model, by its JSON files alone: no torch, no onnxruntime.

Defaults for generation come from the folder's `tinydiff.toml` where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinydiff import config
from tinydiff.checkpoints.new import VERSION
from tinydiff.checkpoints.scheduler import Scheduler, read
from tinydiff.diffusion.schedules import Levels
from tinydiff.errors import ModelError
from tinydiff.networks import VAE, denoiser_in, network_of
from tinydiff.networks.autoencoder import SCALING
from tinydiff.networks.network import Array, imported
from tinydiff.system import shown


@dataclass(frozen=True)
class Description:
    """What sampling needs to know of a model besides its networks."""

    path: Path
    scheduler: Scheduler
    latent_channels: int
    in_channels: int  # what the network reads: the latents, and in an inpainting model a mask and an image's latents
    factor: int  # pixels a latent, along each side
    multiple: int  # width and height must be multiples of this many pixels
    scaling_factor: float
    size: int  # pixels, the side it was trained at
    generate: config.Generate
    conditions: Mapping[str, Array] = field(default_factory=dict)  # what the denoiser is told besides latent and level
    notes: tuple[str, ...] = ()  # what is ignored of the files, a line each

    @property
    def schedule(self) -> Levels:
        """The training levels, cleanest first."""
        return self.scheduler.schedule

    @property
    def prediction(self) -> str:
        return self.scheduler.prediction

    def levels(self, sampler: str, steps: int, spacing: str) -> Levels:
        """The levels that a sampler visits, noisiest first, and the one it ends on."""
        return self.scheduler.levels(sampler, steps, spacing)


def describe(
    model: Mapping[str, dict[str, Any]] | Path, path: Path | None = None, generate: config.Generate | None = None
) -> Description:
    """The description of a model with these JSON files, or of the model at a path; ModelError names what they lack.

    `generate`: its defaults, which otherwise are those of the model at `path`.
    """
    if isinstance(model, Path):
        return imported("tinydiff.checkpoints.source:Source")(model).description  # which imports this module
    path = path or Path()
    denoiser, toml = denoiser_in(model), path / "tinydiff.toml"
    own = generate or (config.load(toml, stored=True).generate if toml.exists() else None)
    try:
        network: Any = network_of(denoiser, model[denoiser])
        pixels: Any = network_of(VAE, model[VAE])
        autoencoder, table = pixels.complete(model[VAE]), network.complete(model[denoiser])
        scheduler = _scheduler(model, path, own is not None and VERSION in model.get("model_index", {}))
        factor, steps = pixels.factor(autoencoder), min(50, scheduler.most)
        return Description(
            path=path,
            scheduler=scheduler,
            latent_channels=int(autoencoder["latent_channels"]),
            in_channels=int(table["in_channels"]),
            factor=factor,
            multiple=factor * network.reduction(table),
            scaling_factor=float(autoencoder.get("scaling_factor") or SCALING),
            size=int(table["sample_size"]) * factor,
            generate=own or config.Generate(steps, 7.5, scheduler.sampler, scheduler.spacing, 1),  # diffusers' defaults
            conditions=network.conditions(table),
            notes=scheduler.notes,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{shown(path)}: its configuration files lack or misstate {error}") from None


def _scheduler(configs: Mapping[str, dict[str, Any]], path: Path, ours: bool) -> Scheduler:
    try:
        return read(configs["scheduler"], configs.get("model_index"), ours)
    except ValueError as error:
        raise ModelError(f"{shown(path)}: scheduler_config.json: {error}") from None
