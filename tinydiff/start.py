"""What a configuration takes from the model that a run begins with, by its JSON files alone: no torch."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from tinydiff import config
from tinydiff.backends import find_model
from tinydiff.checkpoints.source import Source
from tinydiff.diffusion.schedules import SCHEDULES
from tinydiff.errors import ModelError
from tinydiff.files import shown
from tinydiff.networks import DENOISERS, VAE, denoiser_in, network_of, networks, text_encoders
from tinydiff.networks.autoencoder import Autoencoder
from tinydiff.networks.network import pick
from tinydiff.networks.text import TextEncoder
from tinydiff.stages import NONE

Table = dict[str, Any]
LEVELS = ("schedule", "num_train_timesteps", "zero_terminal_snr", "shift", "shift_side", "prediction")
TUNED = {"steps": 1000, "batch_size": 16, "optimizer": "adamw", "lr": 2e-4, "warmup": 20, "ema": 0.99}
SMALL = 10**8  # parameters of a U-Net, below which changes of attention alone learn too little
CHANGED: Table = {"steps": 1500, "lr": 1.5e-3, "alpha": 64.0, "targets": "to_q, to_k, to_v, to_out.0, conv1, conv2"}


def source_of(name: str) -> Source:
    """The model that `train.base` names. Raises ModelError for one that cannot be trained on."""
    source = Source(find_model(name))
    source.check()
    if source.description.in_channels != source.description.latent_channels:
        problem = "an inpainting model, whose masks no data here have"
        raise ModelError(f"{shown(source.path)}: {problem}; begin with the model that it was made of")
    return source


def tables(train: config.Train) -> tuple[Table, Table]:
    """Of the model that a run begins with: keys of a configuration that nobody has to say, and those that are its own."""
    source = source_of(train.base)
    d = source.description
    usual: Table = {"data": {"resolution": d.size}, "generate": asdict(d.generate)}
    if train.adapter == "lora" and is_small(source):
        encoders = text_encoders(source.configs).values()
        usual["train"] = {"lora": CHANGED | {"text_encoder": all(each.kind == "clip" for each in encoders)}}
    if train.adapter == NONE:
        usual["train"] = {"denoiser": TUNED}
        if d.generate.few_calls and not train.stage("distill").steps:
            del usual["generate"]  # what is learnt needs guidance and more calls again
    return usual, {**of_networks(source), "diffusion": of_levels(source)}


def is_small(source: Source) -> bool:
    """Whether its denoiser is a U-Net far below those of Stable Diffusion."""
    sizes = map(math.prod, source.shapes(source.denoiser).values())
    return DENOISERS["unet"] is network_of(source.denoiser, source.table(source.denoiser)) and sum(sizes) < SMALL


def of_networks(source: Source) -> Table:
    """The tables of its networks."""
    rows = {name: network_of(name, table) for name, table in networks(source.configs).items()}
    folder = denoiser_in(source.configs)
    kind = next(kind for kind, row in DENOISERS.items() if row is rows[folder])
    vae: Any = rows[VAE]
    autoencoder = asdict(pick(Autoencoder, source.table(VAE))) | {"kind": vae.kind}
    del autoencoder["path"]
    own = {"denoiser": {"kind": kind}, kind: asdict(DENOISERS[kind].settings_of(source.table(folder)))}
    return own | {"autoencoder": autoencoder, "text_encoder": of_text(source)}


def of_text(source: Source) -> Table:
    """The first text encoder's table; of a frozen one where it is."""
    (name, row), *_ = text_encoders(source.configs).items()
    if row.frozen:
        return {"kind": row.kind, "path": str(source.path)}
    return {"kind": row.kind} | (
        {} if row.labels else asdict(pick(TextEncoder, source.table(name))) | {"kind": row.kind}
    )


def of_levels(source: Source) -> Table:
    """What noise is, and what is predicted: as the configuration says that trained it, or as far as names of ours go."""
    toml, scheduler = source.path / "tinydiff.toml", source.description.scheduler
    if toml.is_file():
        said = asdict(config.load(toml, stored=True).diffusion)
        return {key: said[key] for key in LEVELS}
    told = {"num_train_timesteps": len(scheduler.schedule), "prediction": scheduler.prediction}
    return told | ({"schedule": scheduler.form} if scheduler.form in SCHEDULES else {})
