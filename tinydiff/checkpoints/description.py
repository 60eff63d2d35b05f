"""What a model folder says about itself, read from its JSON files alone: no torch, no onnxruntime.

The folder is the diffusers layout (`model_index.json`, `scheduler/`, `vae/` or `vae_decoder/`, ...); an exported bundle has
the same files. Defaults for generation come from the folder's `tinydiff.toml` where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinydiff import config
from tinydiff.checkpoints.scheduler import Scheduler, read, write
from tinydiff.diffusion.schedules import Levels, sampling_levels
from tinydiff.errors import ModelError
from tinydiff.files import read_json


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

    @property
    def schedule(self) -> Levels:
        """The training levels, cleanest first."""
        return self.scheduler.schedule

    @property
    def prediction(self) -> str:
        return self.scheduler.prediction

    def levels(self, sampler: str, steps: int, spacing: str) -> Levels:
        """The levels that a sampler visits, noisiest first, and the one it ends on."""
        scheduler = self.scheduler
        return sampling_levels(self.schedule, steps, spacing, scheduler.offset, scheduler.end(sampler))


def describe(path: Path) -> Description:
    """The description of a model folder or bundle; ModelError names what is missing."""
    said = read_json(path / "scheduler" / "scheduler_config.json")
    vae = read_json(
        next(
            (p for n in ("vae", "vae_decoder") if (p := path / n / "config.json").exists()),
            path / "vae" / "config.json",
        )
    )
    unet = read_json(path / "unet" / "config.json")
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        toml, scheduler = path / "tinydiff.toml", read(said)
        theirs = config.Generate(50, 7.5, scheduler.sampler, scheduler.spacing)  # diffusers' defaults
        return Description(
            path=path,
            scheduler=scheduler,
            latent_channels=(channels := int(vae.get("latent_channels", 4))),
            in_channels=int(unet.get("in_channels", channels)),
            factor=factor,
            multiple=factor * 2 ** (len(unet["block_out_channels"]) - 1),
            scaling_factor=float(vae.get("scaling_factor") or 0.18215),
            size=int(unet["sample_size"]) * factor,
            generate=config.load(toml).generate if toml.exists() else theirs,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: its configuration files lack or misstate {error}") from None


def described(cfg: config.Config, scaling_factor: float) -> Description:
    """The description of the model that a configuration makes, before it is in any folder."""
    factor = 2 ** (len(cfg.autoencoder.block_out_channels) - 1)
    multiple = factor * 2 ** (len(cfg.denoiser.block_out_channels) - 1)
    scheduler, channels = read(write(cfg)), cfg.autoencoder.latent_channels
    return Description(
        Path(), scheduler, channels, channels, factor, multiple, scaling_factor, cfg.data.resolution, cfg.generate
    )
