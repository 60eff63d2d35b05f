"""Models as torch modules: built for a configuration, opened from a source, saved as a folder in the diffusers layout.

Parameter names are diffusers' and transformers' own, so there is no conversion; `load_state_dict` is strict.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinydiff import config
from tinydiff.checkpoints import control, new, single_file, weights
from tinydiff.checkpoints.description import Description, describe
from tinydiff.checkpoints.header import header
from tinydiff.checkpoints.source import Configs, Source
from tinydiff.errors import ModelError
from tinydiff.files import MANIFEST, committed, shown
from tinydiff.networks import (
    LABELS,
    TEXT,
    VAE,
    denoiser_in,
    network_of,
    networks,
    text_encoders,
    tokenizer_folder,
)
from tinydiff.networks.network import Network, Table
from tinydiff.schema import to_toml
from tinydiff.system import RESTORE
from tinydiff.text.labels import Labels
from tinydiff.verified import Memory, verify

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Model:
    """A text-to-image model: its JSON files as `Source.configs` has them, its networks by folder, its tokenizers.

    Each text encoder has a tokenizer, by the encoder's folder; a class-conditional model has labels, and no encoder.
    """

    configs: Configs
    networks: dict[str, nn.Module]
    tokenizers: dict[str, Any]  # text.prompts.Tokens that can be saved
    path: Path = Path()
    generate: config.Generate | None = None
    opened: bool = False  # whether its weights were there, rather than a configuration's to train

    @property
    def description(self) -> Description:
        return describe(self.configs, self.path, self.generate)

    @property
    def denoiser(self) -> Any:
        return self.networks[denoiser_in(self.configs)]

    @property
    def vae(self) -> Any:
        return self.networks[VAE]

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """By folder; none where prompts are labels."""
        return {name: self.networks[name] for name in self.tokenizers if name in self.networks}

    @property
    def scaling_factor(self) -> float:
        """Latents are this times the autoencoder's."""
        return float(network_of(VAE, self.configs[VAE]).complete(self.configs[VAE])["scaling_factor"])

    def scaled(self, factor: float) -> Model:
        """The same model with another scaling factor."""
        return replace(self, configs=self.configs | {VAE: self.configs[VAE] | {"scaling_factor": factor}})


def build(cfg: config.Config, tokenizer: Any, seed: int = 0, labels: Labels | None = None) -> Model:
    """The networks of a configuration, each initialised from its own `seed`, so none depends on another's size.

    `labels`: the classes that a denoiser is told besides text.

    A frozen text encoder and a given autoencoder are not initialised but read from their folders. Raises ModelError
    where that cannot be.
    """
    configs, parts = new.configs(cfg, tokenizer, labels), dict[str, nn.Module]()
    given = {TEXT: cfg.text_network.given(cfg), VAE: cfg.autoencoder_network.given(cfg)}
    for name, table in networks(configs).items():
        torch.manual_seed(seed)
        network = network_of(name, table)
        if path := given.get(name):
            parts[name] = opened(network, table, path, learns=name != TEXT)
            if spoilt := [k for k, tensor in parts[name].state_dict().items() if not tensor.isfinite().all()]:
                raise ModelError(f"{shown(path)}: {spoilt[0]} has NaN or infinite values; {RESTORE}, or give another")
        else:
            parts[name] = network.build(table)
    return Model(configs, parts, {LABELS if cfg.text_network.labels else TEXT: tokenizer}, generate=cfg.generate)


def save(
    path: Path,
    model: Model,
    cfg: config.Config | None = None,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    tensors_of: Callable[[str, nn.Module], Mapping[str, Tensor]] = lambda name, part: part.state_dict(),
    beside: Sequence[Path] = (),
) -> None:
    """Commit a model folder that diffusers, transformers and tinydiff open; `tensors_of` says what is in its
    networks' folders, `cfg` what it was trained with, `beside` what other networks' folders are copied to it."""
    with committed(path, replace=force) as folder:
        for name, part in model.networks.items():
            (folder / name).mkdir()
            table = model.configs[name]
            save_tensors(tensors_of(name, part), folder / name / network_of(name, table).file, dtype)
            write_json(folder / name / "config.json", table)
        for other in beside:
            shutil.copytree(other, folder / other.name, ignore=shutil.ignore_patterns(MANIFEST, "tinydiff.toml"))
        write_description(folder, model.configs, model.tokenizers, model.path if model.path.parts else None)
        if cfg:
            (folder / "tinydiff.toml").write_text(to_toml(cfg), encoding="utf-8")


def save_network(
    path: Path,
    table: Table,
    tensors: Mapping[str, Tensor],
    file: str,
    cfg: config.Config,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Commit the folder of one network, as diffusers opens it, and the configuration that it was trained with."""
    with committed(path, replace=True) as folder:
        save_tensors(tensors, folder / file, dtype)
        write_json(folder / "config.json", table)
        (folder / "tinydiff.toml").write_text(to_toml(cfg), encoding="utf-8")


def write_description(
    folder: Path, configs: Configs, tokenizers: Mapping[str, Any], source: Path | None = None
) -> None:
    """Every file of a model folder that is no network's; those that the folder `source` has are copied from there."""
    for name, tokenizer in tokenizers.items():
        place = tokenizer_folder(name)
        if source and (source / place).is_dir() and not getattr(tokenizer, "learnt", ()):
            shutil.copytree(source / place, folder / place, copy_function=shutil.copyfile)
        elif name != LABELS:
            tokenizer.save(folder / place)
    if source and (source / "tinydiff.toml").exists():
        shutil.copyfile(source / "tinydiff.toml", folder / "tinydiff.toml")
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", configs["scheduler"])
    absent = {k: none for k, none in new.ABSENT.items() if k in configs["model_index"] and not (folder / k).is_dir()}
    write_json(folder / "model_index.json", configs["model_index"] | absent)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    """A safetensors file with floating-point tensors as `dtype` (as they are, where None).

    Every tensor is copied, since the format knows no two names of one.
    """
    kinds = {k: dtype if dtype and v.is_floating_point() else v.dtype for k, v in tensors.items()}
    copy = len({v.data_ptr() for v in tensors.values()}) < len(tensors)
    plain = {k: v.detach().to("cpu", kinds[k], copy=copy).contiguous() for k, v in tensors.items()}
    save_file(plain, path, {"format": "pt"})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load(source: Source, dtype: torch.dtype | None = torch.float32) -> Model:
    """A model's networks as `dtype` (as stored, where None), in evaluation mode. ModelError names a missing, damaged or
    unsupported file."""
    memory = Memory(source.anew)
    if not source.file:
        verify(source.path, digest=memory.sha256)
    for path in source.controlled.values():
        control.verify(path, memory.sha256)
    memory.save()
    parts = dict[str, nn.Module]()
    for name in dict.fromkeys((*networks(source.configs), *text_encoders(source.configs))):
        if (network := network_of(name, source.configs.get(name, {}))).module:
            parts[name] = filled(network, source.table(name), source.tensors(name), source.home(name), dtype)
    return Model(source.configs, parts, source.tokenizers, source.path, opened=True)


def opened(network: Network, table: Table, path: Path, learns: bool = False) -> nn.Module:
    """The network of a table with the weights of a folder, or of the autoencoder in a file, copied from there where it
    `learns`. Raises ModelError."""
    if path.is_file():
        file = header(path)
        tensors = single_file.tensors(file, single_file.required(file, VAE))
    else:
        tensors = network.renamed(weights.tensors(weights.files(path)))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()} if learns else tensors
    return filled(network, table, tensors, path).requires_grad_(learns)


def filled(
    network: Network,
    table: Table,
    tensors: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """The network of a table with these weights, as `load` has them. ModelError says what does not fit."""
    try:
        with torch.device("meta"):
            part = network.build(table, tensors)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ModelError(f"{shown(path)}: unsupported or incomplete config.json: {shown(error)}") from None
    wanted = part.state_dict()
    common = wanted.keys() & tensors.keys()
    wrong = sorted(wanted.keys() ^ tensors.keys()) + sorted(k for k in common if wanted[k].shape != tensors[k].shape)
    if wrong:
        problem = f"its weights do not fit its config.json at {shown(', '.join(wrong[:3]))}"
        raise ModelError(f"{shown(path)}: {problem}; {RESTORE}")
    part.load_state_dict(tensors, assign=True)
    return part.to(dtype=dtype).eval()
