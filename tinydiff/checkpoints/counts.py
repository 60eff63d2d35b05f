"""How many values of which type a file of weights holds, by the headers of safetensors and ONNX files; no weight is read."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tinydiff.checkpoints.header import Stored, header
from tinydiff.errors import ModelError
from tinydiff.files import shown
from tinydiff.protobuf import BYTES, VARINT, fields, varint, varints
from tinydiff.system import unreadable

DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8"}
ONNX_DTYPES = {1: "fp32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "fp16", 11: "fp64", 16: "bf16"}


def safetensors_counts(path: Path) -> Counter[str]:
    """{dtype: number of values} of a safetensors file, without the scales of int8 weights.

    Raises ModelError where its header does not fit the file.
    """
    tensors = header(path).tensors
    scales = {name for name in tensors if name.endswith(".scale") and name.removesuffix(".scale") in tensors}
    return counts_of(each for name, each in tensors.items() if name not in scales)


def counts_of(tensors: Iterable[Stored]) -> Counter[str]:
    """{dtype: number of values} of tensors in a header."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[DTYPES.get(tensor.dtype, tensor.dtype.lower())] += math.prod(tensor.shape)
    return counts


def onnx_counts(path: Path) -> Counter[str]:
    """{dtype: number of values} of a graph's floating-point and 8-bit initializers. Raises ModelError for a damaged file.

    Field numbers are those of onnx.proto: ModelProto.graph = 7, GraphProto.initializer = 5.
    """
    counts: Counter[str] = Counter()
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for graph in messages(data, 7, 0, len(data)):
                for tensor in messages(data, 5, *graph):
                    dtype, count = initializer(data, *tensor)
                    counts[ONNX_DTYPES.get(dtype, str(dtype))] += count
    except OSError as error:
        raise unreadable(error, path) from None
    except (ValueError, IndexError) as error:
        raise ModelError(f"{shown(path)}: damaged ({error}); fetch or export it again") from None
    return Counter({dtype: n for dtype, n in counts.items() if dtype not in ("int32", "int64", "9")})


def messages(data: mmap.mmap, number: int, start: int, end: int) -> list[tuple[int, int]]:
    """From where to where the messages of a field are."""
    return [(at, stop) for n, wire, at, stop in fields(data, start, end) if n == number and wire == BYTES]


def initializer(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """(data type, number of values) of a TensorProto: dims = 1, packed or one a field, data_type = 2."""
    dims, dtype = [], 0
    for number, wire, at, stop in fields(data, start, end):
        if number == 1 and wire in (VARINT, BYTES):
            dims += varints(data, at, stop)
        elif number == 2 and wire == VARINT:
            dtype = varint(data, at)[0]
    return dtype, math.prod(dims)
