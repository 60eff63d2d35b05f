"""Of which model an adapter was made: some of its numbers, by which it is known again in any layout and precision.

A hash would be another one for each copy in another precision. Fine-tuned models share what is trained for one of them; their
numbers are nearly the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

KEY = "_tinydiff_base"  # in a file's metadata, as JSON, and in a config.json, where diffusers reads no such keys
TENSORS = ("conv_in.weight", "pos_embed.proj.weight", "x_embedder.proj.weight")  # what a denoiser begins with
COUNT, ALIKE = 16, 0.1  # numbers, and the share of their length by which those of one model may differ

Origin = dict[str, Any]  # "tensor", "values", and "model", what it was called


def of_values(tensor: str, values: np.ndarray) -> Origin:
    """What is kept of a denoiser with this tensor."""
    some = values.reshape(-1)[:: max(1, values.size // COUNT)][:COUNT]
    return {"tensor": tensor, "values": [float(f"{value:.4g}") for value in some.tolist()]}


def metadata(origin: Origin) -> dict[str, str]:
    """As a safetensors file has it."""
    return {KEY: json.dumps(origin)} if origin else {}


def read(told: Any) -> Origin:
    """What a file or a table says; nothing where that is none."""
    try:
        origin = json.loads(told) if isinstance(told, str) else told
        values = np.array(origin["values"], np.float64)
        return origin if isinstance(origin["tensor"], str) and np.isfinite(values).all() else {}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def is_other(told: Origin, model: Mapping[str, Any]) -> bool:
    """Whether both are known, and not of one model or of one tuned from it."""
    if not told or not model:
        return False
    one, other = (np.array(each["values"], np.float64) for each in (told, model))
    if told["tensor"] != model["tensor"] or one.shape != other.shape:
        return True
    return bool(np.linalg.norm(one - other) > ALIKE * np.linalg.norm(one))
