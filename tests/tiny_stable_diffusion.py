"""Random networks in the form of Stable Diffusion 1 and 2, single files of them, and of nothing but names and shapes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensors import randomise
from torch import Tensor

from tinydiff import config
from tinydiff.checkpoints import single_file
from tinydiff.checkpoints.header import header
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError
from tinydiff.models.autoencoder import Autoencoder
from tinydiff.models.text_encoder import TextEncoder
from tinydiff.models.unet import UNet
from tinydiff.networks.autoencoder import AutoencoderNetwork

Parts = dict[str, dict[str, Tensor]]


PARTS = ("unet", "vae", "text_encoder")


KINDS = [("clip", 4), ("clip", 9), ("open_clip", 4), ("open_clip", 9)]


SCHEDULER = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass
class Model:
    parts: Parts
    configs: dict[str, dict[str, Any]]


def tiny(kind: str, channels: int = 4, dtype: torch.dtype = torch.float32) -> Model:
    """Random networks in the form of Stable Diffusion 1 or 2: narrow, and shallow, but for the vocabulary."""
    one, prediction = kind == "clip", "epsilon" if kind == "clip" or channels == 9 else "v_prediction"
    widths = (32, 64, 64) if one else (64, 128)
    kinds = ("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",)
    denoiser = config.UNet(widths, kinds, 2 if one else 1, 1, 8 if one else 1, 32, not one)
    text = config.TextEncoder("clip", "", 49408, 32 if one else 64, 48, 3, 1, 77, single_file.KINDS[kind].hidden_act)
    autoencoder = config.Autoencoder((32, 64), 1 if one else 2, 4, 32, True)
    networks = {
        "unet": UNet(denoiser, 4, text.hidden_size, channels - 4),
        "vae": Autoencoder(autoencoder),
        "text_encoder": TextEncoder(text, 49408, 49407),
    }
    for seed, network in enumerate(networks.values()):
        randomise(network, seed)
    heads = 8 if one else [1, 2]
    unet = {"sample_size": 16, "in_channels": channels, "out_channels": 4, "cross_attention_dim": text.hidden_size}
    return Model(
        {name: {k: v.to(dtype) for k, v in network.state_dict().items()} for name, network in networks.items()},
        {
            "unet": without(settings_of(denoiser), ("qk_norm",)) | unet | {"attention_head_dim": heads},
            "vae": without(vars(autoencoder), AutoencoderNetwork.apart)
            | {"scaling_factor": 0.18215, "in_channels": 3, "out_channels": 3},
            "text_encoder": settings_of(text),
            "scheduler": SCHEDULER | {"prediction_type": prediction},
        },
    )


def without(table: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """A configuration's table less the keys that no `config.json` of Stable Diffusion has."""
    return {key: value for key, value in table.items() if key not in keys}


def read(path: Path) -> Parts:
    return {name: dict(Source(path).tensors(name)) for name in PARTS}


def refusal(call: Callable[[], Any], kind: type[Exception] = ModelError) -> str:
    start = time.process_time()
    with pytest.raises(kind) as caught:
        call()
    assert time.process_time() - start < 1
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).isprintable()
    return str(caught.value)


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of fp16 zeros that takes no room: a header, and a hole."""
    table: dict[str, Any] = {"__metadata__": metadata or {}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape, dtype=np.int64))
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    data = json.dumps(table).encode()
    data += b" " * (-len(data) % 8)
    with open(path, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)
    return path


def settings_of(part: Any) -> dict[str, Any]:
    """A configuration's keys that are diffusers' and transformers' too."""
    return {key: value for key, value in asdict(part).items() if key not in ("kind", "path")}


def configs_of(path: Path, **options: Any) -> dict[str, dict[str, Any]]:
    return Source(path, **options).configs


def tensors_of(path: Path, name: str, ema: bool = False) -> dict[str, Tensor]:
    """One network of a file that may hold no other."""
    file = header(path)
    return single_file.tensors(file, single_file.required(file, name, ema))
