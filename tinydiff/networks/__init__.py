"""The table of networks, without torch: what can be a model's denoiser, its autoencoder, and what reads its prompts.

Another kind is another entry; nothing outside of this package and `models/` asks which kind a network is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinydiff.networks.autoencoder import AUTOENCODERS as AUTOENCODERS
from tinydiff.networks.autoencoder import autoencoder_of
from tinydiff.networks.control import ControlNetwork
from tinydiff.networks.dit import DiTNetwork
from tinydiff.networks.network import Denoiser, Graph, Network, Table, TextEncoder
from tinydiff.networks.text import PENULTIMATE, TEXT_ENCODERS, text_encoder_of
from tinydiff.networks.unet import XL, UNetNetwork

DENOISERS: dict[str, Denoiser] = {"unet": UNetNetwork(), "dit": DiTNetwork()}  # by `denoiser.kind`
CONTROL = ControlNetwork()  # several of a model are in controlnet, controlnet_1, ...
VAE, TEXT, LABELS = "vae", "text_encoder", "labels"  # folders; a model of classes has labels for a text encoder


def denoiser_in(names: Mapping[str, Any]) -> str:
    """The denoiser's folder among names of folders; the first kind's where there is none."""
    folders = [row.folder for row in DENOISERS.values()]
    return next((folder for folder in folders if folder in names), folders[0])


def network_of(folder: str, table: Table) -> Network:
    """The kind of network that a model has in a folder, with this `config.json`. Raises KeyError where none can be there."""
    if denoisers := [row for row in DENOISERS.values() if row.folder == folder]:
        return next((row for row in denoisers if row.library[1] == table.get("_class_name")), denoisers[0])
    if folder == VAE:
        return autoencoder_of(table)
    if folder.startswith(CONTROL.folder):
        return CONTROL
    if folder == LABELS:
        return TEXT_ENCODERS["class"]
    if not folder.startswith(TEXT):
        raise KeyError(f"{folder}: no folder of a network")
    return text_encoder_of(table)


def networks(configs: Mapping[str, Table]) -> dict[str, Table]:
    """The tables of a model's networks by folder, of all that `Source.configs` has."""
    return {name: table for name, table in configs.items() if name not in ("model_index", "scheduler")}


def text_encoders(configs: Mapping[str, Table]) -> dict[str, TextEncoder]:
    """What reads a model's prompts, by folder, in order; a folder that is missing has its name here."""
    folders = sorted(name for name in configs if name.startswith(TEXT))
    if not folders:
        name = denoiser_in(configs)
        denoiser = network_of(name, configs[name])
        folders = [LABELS if denoiser.classes(denoiser.complete(configs[name])) else TEXT]  # type: ignore[attr-defined]
    return {name: network_of(name, configs.get(name, {})) for name in folders}  # type: ignore[misc]


def controls_of(configs: Mapping[str, Table]) -> list[str]:
    """A model's control networks, by folder."""
    return [name for name in configs if name.startswith(CONTROL.folder)]


def is_xl(configs: Mapping[str, Table]) -> bool:
    """Whether a model is of Stable Diffusion XL's family: by what its U-Net is told."""
    return configs[denoiser_in(configs)].get("addition_embed_type") == XL


def towers(configs: Mapping[str, Table]) -> dict[str, Table]:
    """The same JSON, in which text encoders that serve Stable Diffusion XL say so."""
    read = [name for name in configs if name.startswith(TEXT)] if is_xl(configs) else []
    return {name: table | ({PENULTIMATE: True} if name in read else {}) for name, table in configs.items()}


def tokenizer_folder(text_encoder: str) -> str:
    """Where the tokenizer of a text encoder is: text_encoder_2 has tokenizer_2."""
    return text_encoder.replace(TEXT, "tokenizer")


def graphs(configs: Mapping[str, Table]) -> dict[str, Graph]:
    """The graphs of a model's bundle by folder, in the order in which they are used; a DiT alone has no autoencoder."""
    folders = (*text_encoders(configs), *controls_of(configs), denoiser_in(configs), *([VAE] if VAE in configs else []))
    tables = ((folder, configs.get(folder, {})) for folder in folders)
    rows = ((folder, network_of(folder, table), table) for folder, table in tables)
    return {k: graph for folder, row, table in rows for k, graph in row.graphs(folder, row.complete(table)).items()}
