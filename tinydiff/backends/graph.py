"""What the bytes of an ONNX graph say, before onnxruntime sees it: where its weights are, and how much it will do.

Weights outside a graph ("external data") must be plain files in its own folder. Graphs that loop, or that make a tensor out
of constants that no image needs, are refused. A hostile graph can still compute its way to a large tensor.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from tinydiff.errors import ModelError
from tinydiff.protobuf import BYTES, VARINT, fields, varint, varints
from tinydiff.system import shown, unreadable

RESTORE = "copy or export it again"
MOST = 2**28  # elements: a gigabyte of floats, many times an image's
LOOPS = (b"Loop", b"Scan", b"SequenceMap")
SHAPED = {
    b"ConstantOfShape": 0,
    b"Expand": 1,
    b"Tile": 1,
    b"Range": 1,
    b"Resize": 3,
    b"OneHot": 1,
    b"Pad": 1,
}  # by input
NESTED = {  # the protobuf messages of onnx.proto in which a tensor can be: field number -> message
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
}
INT64, RAW, EXTERNAL = 7, 9, 13  # of a TensorProto: numbers, their bytes, entries that say where its data are


def check(path: Path) -> None:
    """ModelError unless every external tensor lies in a plain file of the graph's folder, and its work has an end."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tensors = list(external_tensors(data[:])) if data.find(b"location") >= 0 else []
            problem = unbounded(data[:]) if any(data.find(name) >= 0 for name in (*LOOPS, *SHAPED)) else ""
    except OSError as error:
        raise unreadable(error, path) from error
    except (ValueError, IndexError) as error:
        raise ModelError(f"{shown(path)}: damaged, not an ONNX graph; {RESTORE}") from error
    if problem:
        raise ModelError(f"{shown(path)}: {problem}; export it with tinydiff or optimum")
    sizes = {name: plain_size(path, name) for name in {tensor.get("location", "") for tensor in tensors}}
    for tensor in tensors:
        numbers = [tensor.get(key, "0") for key in ("offset", "length")]
        if not all(n.isascii() and n.isdigit() and len(n) < 19 for n in numbers):
            raise ModelError(f"{shown(path)}: external data at {shown(numbers)}; {RESTORE}")
        if sum(map(int, numbers)) > sizes[tensor.get("location", "")]:
            raise ModelError(f"{shown(path)}: external data after the end of {shown(tensor['location'])}; {RESTORE}")


def plain_size(graph: Path, name: str) -> int:
    """Bytes of a file beside a graph; ModelError where `name` leads elsewhere or to no plain file."""
    path = graph.parent / name
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ModelError(f"{shown(graph)}: external data in {name!a}, which is not beside it; {RESTORE}")
    if path.is_symlink() or not path.is_file():
        raise ModelError(f"{shown(path)}: missing or a link; put the file itself in its place")
    return path.stat().st_size


def messages(data: bytes) -> Iterator[tuple[str, int, int]]:
    """The messages of a model in which a tensor can be, however deep: kind, and from where to where.

    Raises ValueError or IndexError where the bytes are no protobuf.
    """
    todo = [("Model", 0, len(data))]
    while todo:
        kind, *place = todo.pop()
        yield kind, place[0], place[1]
        if known := NESTED.get(kind):
            todo += [(known[n], a, b) for n, wire, a, b in fields(data, *place) if n in known and wire == BYTES]


def external_tensors(data: bytes) -> Iterator[dict[str, str]]:
    """The external-data entries (location, offset, length) of every tensor in an ONNX model. Raises as `messages`."""
    for kind, *place in messages(data):
        inner = [(a, b) for n, wire, a, b in fields(data, *place) if n == EXTERNAL and wire == BYTES]
        if kind == "Tensor" and inner:
            pairs = [{n: data[a:b].decode() for n, wire, a, b in fields(data, *at) if wire == BYTES} for at in inner]
            yield {pair.get(1, ""): pair.get(2, "") for pair in pairs}


def unbounded(data: bytes) -> str:
    """What of a model may run for ever, or unfold to more than MOST elements; "" for none. Raises as `messages`."""
    constants, asked = dict[bytes, list[int]](), list[tuple[bytes, bytes]]()
    for kind, *place in messages(data):
        if kind == "Tensor":
            name, numbers = integers(data, *place)
            constants[name] = numbers
        elif kind == "Node":
            inputs, outputs, tensors = list[bytes](), list[bytes](), list[list[int]]()
            operator = b""
            for n, wire, a, b in fields(data, *place):
                if wire == BYTES and n == 1:
                    inputs.append(data[a:b])
                elif wire == BYTES and n == 2:
                    outputs.append(data[a:b])
                elif wire == BYTES and n == 4:
                    operator = data[a:b]
                elif wire == BYTES and n == 5:
                    tensors += attribute(data, a, b)
            if operator in LOOPS:
                return f"has a loop ({operator.decode()}), which may run for ever"
            if operator == b"Constant" and outputs and tensors:
                constants[outputs[0]] = tensors[0]
            if operator in SHAPED and len(inputs) > SHAPED[operator]:
                asked.append((operator, inputs[SHAPED[operator]]))
    for operator, name in asked:
        if math.prod(max(1, abs(n)) for n in constants.get(name, [])) > MOST:
            return f"unfolds to more than {MOST} elements ({operator.decode()})"
    return ""


def attribute(data: bytes, at: int, end: int) -> list[list[int]]:
    """The numbers of an attribute that is an int64 tensor or a list of them."""
    lists, numbers = list[list[int]](), list[int]()
    for n, wire, a, b in fields(data, at, end):
        if n == 5 and wire == BYTES:  # AttributeProto.t
            lists.append(integers(data, a, b)[1])
        elif n in (3, 8) and wire in (VARINT, BYTES):  # i, ints
            numbers += map(signed, varints(data, a, b))
    return [*lists, *([numbers] if numbers else [])]


def integers(data: bytes, at: int, end: int) -> tuple[bytes, list[int]]:
    """A tensor's name and its numbers, if it is of a few int64; else none."""
    name, numbers, kind = b"", list[int](), 0
    for n, wire, a, b in fields(data, at, end):
        if n == 8 and wire == BYTES:
            name = data[a:b]
        elif n == 2 and wire == VARINT:
            kind = varint(data, a)[0]
        elif n == INT64 and wire in (VARINT, BYTES) and b - a <= 256:
            numbers += map(signed, varints(data, a, b))
        elif n == RAW and wire == BYTES and b - a <= 256 and (b - a) % 8 == 0:
            numbers += struct.unpack(f"<{(b - a) // 8}q", data[a:b])
    return name, numbers if kind == 7 else []  # TensorProto.INT64


def signed(number: int) -> int:
    """A varint as the int64 that it stands for."""
    return number - 2**64 if number >= 2**63 else number
