"""The header of a .safetensors file: names, types and shapes of tensors, read without their data and without torch.

Another kind of file is refused in one line; a pickle is never opened, but the message has a command to convert it.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinydiff.errors import ModelError
from tinydiff.files import LFS_POINTER, RESTORE, shown
from tinydiff.system import escaped, unreadable

MAX_HEADER = 16 * 2**20  # bytes; the largest models need a hundredth of it, and parsed JSON takes ten times the memory
MAX_COMMAS = 120_000  # in a header, eight for a convolution's kernel: six times the tensors of SDXL
MAX_AXES = 64  # the most dimensions of a tensor, as in torch
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
FLOATS = {
    "F64": 2**-52,
    "F32": 2**-23,
    "F16": 2**-10,
    "BF16": 2**-7,
    "F8_E4M3": 2**-3,
    "F8_E5M2": 2**-2,
}  # and their steps
OTHERS = {b"gguf": "a GGUF file of quantised weights", b"<!doctype": "a web page", b"<html": "a web page"}
OTHERS |= {b"\x89hdf": "an HDF5 file"}
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Training scripts pickle a few other objects with the tensors; each is replaced by a stub, so none of their code runs.
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    'stub = type("stub", (), dict.fromkeys(("__init__", "__setstate__"), lambda *a: None)); '
    'names = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint numpy.dtype '
    'numpy.core.multiarray.scalar numpy._core.multiarray.scalar"; '
    "torch.serialization.add_safe_globals([(stub, name) for name in names.split()]); "
    'd = torch.load(sys.argv[1], "cpu", weights_only=True); d = d.get("state_dict", d); '
    "save_file({k: v.contiguous().clone() for k, v in d.items() if isinstance(v, torch.Tensor)}, sys.argv[2])"
)


class Stored(NamedTuple):
    """A tensor's type, shape, and the offsets of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The tensors in a safetensors file, by name, and its metadata."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]

    def values(self, name: str) -> np.ndarray:
        """A tensor's numbers as float64. Raises as `array`."""
        return self.array(name).reshape(-1).astype(float)

    def array(self, name: str) -> np.ndarray:
        """A tensor without torch, in a longer type where numpy lacks its own. Raises KeyError if it is missing or not of a
        floating-point type."""
        dtype, shape, start, end = self.tensors[name]
        with open(self.path, "rb") as file:
            file.seek(start)
            data = np.frombuffer(file.read(end - start), NUMPY[dtype])
        return decoded(data, dtype).reshape(shape)


def decoded(data: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers of a type that numpy lacks, from their bits: the upper ones of a longer type, or float8 with 4 bits of
    exponent, which has no infinity."""
    if dtype == "BF16":
        return (data.astype("<u4") << 16).view("<f4")
    if dtype == "F8_E5M2":
        return (data.astype("<u2") << 8).view("<f2")
    if dtype != "F8_E4M3":
        return data
    exponent, fraction = (data >> 3 & 15).astype(int), (data & 7) / 8
    size = np.where(exponent == 0, np.ldexp(fraction, -6), np.ldexp(1 + fraction, exponent - 7))
    return np.where(data & 127 == 127, np.nan, np.where(data & 128, -size, size))


def header(path: str | Path) -> Header:
    """A safetensors file's header. Raises ModelError, with the fix, if it is missing, damaged or of another kind."""
    path, start = Path(path), b""
    if not path.is_file():
        there = "a folder, and a file is wanted" if path.is_dir() else "not a regular file" if path.exists() else ""
        raise ModelError(
            f"{shown(path)}: {f'{there}; give a .safetensors file' if there else 'no such file; check the path'}"
        )
    try:
        with open(path, "rb") as file:
            start, length = file.read(128), path.stat().st_size
            size = int.from_bytes(start[:8], "little")
            if size > min(MAX_HEADER, length - 8):
                raise ValueError("no safetensors header")
            file.seek(8)
            text = file.read(size)
        if text.count(b",") > MAX_COMMAS:
            raise ValueError("too many tensors")
        table = json.loads(text, object_pairs_hook=_unique)
        metadata = table.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):  # which the safetensors library refuses
            problem = "its __metadata__ has values that are not text; save it again with each as a string"
            raise ModelError(f"{shown(path)}: {problem}")
        tensors = {name: _stored(entry, 8 + size) for name, entry in table.items()}
        _check_places(tensors, 8 + size, length)
    except OSError as error:
        raise unreadable(error, path) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{shown(path)}: {_misfit(path, start)}") from error
    return Header(path, tensors, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a duplicate name, of which readers would use one or the other."""
    if len(table := dict(pairs)) < len(pairs):
        raise ValueError("a name twice")
    return table


def _check_places(tensors: dict[str, Stored], start: int, length: int) -> None:
    """Raise ValueError unless the tensors fill the file from `start` to its end without gaps and overlaps."""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor[2:]):
        if tensor.start != start:
            raise ValueError("tensors overlap or leave a hole")
        start = tensor.end
    if start != length:
        raise ValueError("its size is not what its header says")


def _stored(entry: Any, offset: int) -> Stored:
    """One entry of a header. Raises ValueError, KeyError or TypeError if it is malformed."""
    (start, end), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
    if len(shape) > MAX_AXES or not all(type(n) is int and 0 <= n < 2**63 for n in (start, end, *shape)):
        raise ValueError("no shape")
    if type(dtype) is not str or end < start:
        raise ValueError("no type, or less than nothing")
    if dtype in NUMPY and end - start != math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize:
        raise ValueError("as many bytes as its shape does not say")
    return Stored(dtype, shape, offset + start, offset + end)


def _misfit(path: Path, start: bytes) -> str:
    """What a file without a valid safetensors header is, and the fix."""
    if start.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the file itself; run `git lfs pull`"
    if start.startswith((b"PK\3\4", b"\x80")) or path.suffix.lower() in PICKLES:
        out = path.with_suffix(".safetensors")
        out = out if out != path else path.with_name(f"{path.stem}-converted.safetensors")
        command = shlex.join([sys.executable, "-c", CONVERT, str(path), str(out)])
        return f"a pickle, which could run any code when opened; convert it with {escaped(command)}"
    if other := next((what for magic, what in OTHERS.items() if start.lstrip().lower().startswith(magic)), None):
        return f"{other}, not a safetensors file; fetch the .safetensors"
    return f"damaged, or not a safetensors file; {RESTORE}"
