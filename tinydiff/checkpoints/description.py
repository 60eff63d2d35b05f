"""What sampling needs to know of a model, by its JSON files alone: no torch, no onnxruntime.

Defaults for generation come from the folder's `tinydiff.toml` where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinydiff import config
from tinydiff.checkpoints.new import SPARED, VERSION
from tinydiff.checkpoints.scheduler import Scheduler, read
from tinydiff.diffusion.schedules import Levels
from tinydiff.errors import ModelError
from tinydiff.networks import VAE, denoiser_in, is_xl, network_of
from tinydiff.networks.network import Array, Given, imported
from tinydiff.system import shown
from tinydiff.text.labels import Labels

USUAL = (50, 7.5)  # steps and guidance of diffusers' pipelines, where they are not others
DEFAULTS = {
    "LatentConsistency": (4, 8.5),
    "StableDiffusionXLPipeline": (50, 5.0),
    "StableDiffusionXLImg2Img": (50, 5.0),
}


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
    told_guidance: bool = False  # the denoiser is told how strong guidance is, and asked once
    labels: Labels | None = None  # the classes that it is told by their names, besides text
    spared: frozenset[str] = frozenset()  # columns of data that the denoiser has learnt to do without
    zero_empty: bool = False  # an empty negative prompt is zeros, not what the text encoders say of it
    notes: tuple[str, ...] = ()  # what is ignored of the files, a line each

    @property
    def schedule(self) -> Levels:
        """The training levels, cleanest first."""
        return self.scheduler.schedule

    @property
    def prediction(self) -> str:
        return self.scheduler.prediction

    @property
    def given(self) -> dict[str, Array]:
        """The conditions that are given with each image, in a column of data or by a flag."""
        return {name: array for name, array in self.conditions.items() if isinstance(array.of, Given)}

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
        factor, index = pixels.factor(autoencoder), model.get("model_index") or {}
        pipeline = str(index.get("_class_name"))
        steps, cfg_scale = next((each for name, each in DEFAULTS.items() if pipeline.startswith(name)), USUAL)
        return Description(
            path=path,
            scheduler=scheduler,
            latent_channels=int(pixels.channels(autoencoder)),
            in_channels=int(network.noisy(table)),
            factor=factor,
            multiple=factor * network.multiple(table),
            scaling_factor=float(autoencoder["scaling_factor"]),
            size=int(table["sample_size"]) * factor,
            generate=own
            or config.Generate(min(steps, scheduler.most), cfg_scale, scheduler.sampler, scheduler.spacing, 1),
            conditions=network.conditions(table),
            told_guidance=network.told_guidance(table),
            labels=_labels(index, network.conditions(table)),
            spared=frozenset(index.get(SPARED) or ()),
            zero_empty=is_xl(model) and bool(index.get("force_zeros_for_empty_prompt", True)),
            notes=scheduler.notes,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{shown(path)}: its configuration files lack or misstate {error}") from None


def _labels(index: Mapping[str, Any], conditions: Mapping[str, Array]) -> Labels | None:
    """The classes of a denoiser that is told one; the last number is the null label where they have names."""
    sizes = [array.axes[1] for array in conditions.values() if array.of == Given("label")]
    names = [str(name) for name in (index.get("id2label") or {}).values()] if sizes else []
    if names and len(names) != int(sizes[0]) - 1:
        raise ValueError(f"id2label: {len(names)} names of {int(sizes[0]) - 1} classes")
    return Labels(names, int(sizes[0]) - bool(names), whole=bool(names)) if sizes else None


def _scheduler(configs: Mapping[str, dict[str, Any]], path: Path, ours: bool) -> Scheduler:
    try:
        return read(configs["scheduler"], configs.get("model_index"), ours)
    except ValueError as error:
        raise ModelError(f"{shown(path)}: scheduler_config.json: {error}") from None
