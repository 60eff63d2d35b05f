"""What an ONNX file asks for, read before onnxruntime sees it: files outside, loops, and constants out of all proportion.

Only its bytes are looked at, as protobuf: onnx is not imported, and what is large is not copied.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff.checkpoints.header import header
from tinydiff.errors import ModelError
from tinydiff.files import refuse_pointer, shown
from tinydiff.protobuf import BYTES, VARINT, fields, varints
from tinydiff.system import unreadable

RESTORE = "copy or export it again"
MOST = 2**28  # numbers in all constants that a few bytes ask for: 1 GiB
MOST_NODES = 10**6  # with those of functions wherever these are called; Stable Diffusion XL has ten thousand
SMALL = 64  # numbers in a tensor that can be a shape
NESTED = {  # the protobuf messages of onnx.proto in which a tensor can be: field number -> message
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
LOOPS = (b"Loop", b"Scan", b"SequenceMap")  # operators that run a graph as often as they are told to
KINDS = {1: ("<f4", 4), 6: ("<i4", 5), 7: ("<i8", 7)}  # types of numbers: as stored raw, and the field of others
FLAT = dict.fromkeys((b"Identity", b"Cast", b"Reshape", b"Squeeze", b"Unsqueeze", b"Flatten"), lambda x, *_: x)
FOLDED: dict[bytes, Callable[..., Any]] = FLAT | {  # how shapes are computed of others: flat lists of numbers
    b"Concat": lambda *parts: np.concatenate(parts),
    b"Mul": np.multiply,
    b"Add": np.add,
    b"Sub": np.subtract,
}
SIZES: dict[bytes, Callable[..., float]] = {  # how many numbers an operator makes of constants, None where one is none
    b"ConstantOfShape": lambda shape: product(shape),
    b"Expand": lambda _, shape: product(shape),
    b"Tile": lambda _, repeats: product(repeats),
    b"Range": lambda start, end, step: abs((end[0] - (start[0] if start is not None else 0)) / (step[0] or 1)),
    b"OneHot": lambda _, depth, *rest: product(depth),
    b"Pad": lambda _, pads, *rest: float(np.abs(pads).sum()),
    b"Resize": lambda *inputs: max(map(product, inputs[2:])),
    b"Upsample": lambda _, scales: product(scales),
}
Field = tuple[int, int, int, int]  # number, wire type, and where its value is


def check(path: Path) -> dict[str, str]:
    """The metadata of a graph: what its exporter says of it.

    ModelError unless all that it asks for is in proportion, and its external tensors lie in plain files beside it.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            work = Work.read(data)
            check_work(path, data, work)
    except OSError as error:
        raise unreadable(error, path) from error
    except (ValueError, IndexError) as error:
        refuse_pointer(path)
        raise ModelError(f"{shown(path)}: damaged, not an ONNX graph; {RESTORE}") from error
    sizes = {name: plain_size(path, name) for name in {tensor.get("location", "") for tensor in work.external}}
    ranges = {name: ranges_of(path.parent / name) for name in sizes if name.endswith(".safetensors")}
    for tensor in work.external:
        numbers = [tensor.get(key, "0") for key in ("offset", "length")]
        if not all(n.isascii() and n.isdigit() and len(n) < 19 for n in numbers):
            raise ModelError(f"{shown(path)}: external data at {shown(numbers)}; {RESTORE}")
        if sum(map(int, numbers)) > sizes[tensor.get("location", "")]:
            raise ModelError(f"{shown(path)}: external data after the end of {shown(tensor['location'])!a}; {RESTORE}")
        if (name := tensor.get("location", "")) in ranges and tuple(map(int, numbers)) not in ranges[name]:
            raise ModelError(f"{shown(path)}: of other weights than those in {shown(name)!a}; {RESTORE}")
    return work.metadata


def weights(path: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The tensors of a graph whose numbers are in a file beside it, by name: onnx's number of their type, and their shape."""
    data, found = path.read_bytes(), dict[str, tuple[int, tuple[int, ...]]]()
    for kind, _, inside in messages(data):
        if kind == "Tensor" and entries(data, inside, 13):
            dtype = next(iter(integers(data, inside, 2)), 0)
            found[first(data, inside, 8).decode()] = dtype, tuple(integers(data, inside, 1))
    return found


def ranges_of(path: Path) -> set[tuple[int, int]]:
    """Where the tensors of a safetensors file are, and their bytes: a graph takes none from in between."""
    return {(tensor.start, tensor.end - tensor.start) for tensor in header(path).tensors.values()}


def plain_size(graph: Path, name: str) -> int:
    """Bytes of a file beside a graph; ModelError where `name` leads elsewhere or to no plain file."""
    path = graph.parent / name
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ModelError(f"{shown(graph)}: external data in {name[:200]!a}, which is not beside it; {RESTORE}")
    try:
        if path.is_symlink() or not path.is_file():
            raise ModelError(f"{shown(path)}: missing or a link; put the file itself in its place")
        return path.stat().st_size
    except OSError as error:  # such as a name that is too long
        raise unreadable(error, path) from error


def messages(data: bytes | mmap.mmap) -> Iterator[tuple[str, int, list[Field]]]:
    """Every message in which a node or a tensor can be, in the file's order: its kind, where it begins, its fields.

    Raises ValueError or IndexError where the bytes are no protobuf.
    """
    todo = [("Model", 0, len(data))]
    while todo:
        kind, *place = todo.pop()
        inside, known = list(fields(data, *place)), NESTED.get(kind, {})
        yield kind, place[0], inside
        todo += [(known[n], a, b) for n, wire, a, b in reversed(inside) if n in known and wire == BYTES]


def entries(data: bytes | mmap.mmap, inside: list[Field], number: int) -> dict[str, str]:
    """A repeated field of keys and values: a tensor's external data (location, offset, length), a model's metadata."""
    entries = [fields(data, a, b) for n, wire, a, b in inside if n == number and wire == BYTES]
    pairs = [{n: data[a:b].decode() for n, wire, a, b in entry if wire == BYTES} for entry in entries]
    return {pair.get(1, ""): pair.get(2, "") for pair in pairs}


@dataclass
class Node:
    """An operator's call: inputs and outputs by name, the fields of its attributes, and the function that it is in."""

    operator: bytes
    domain: bytes
    inputs: list[bytes]
    outputs: list[bytes]
    function: tuple[bytes, bytes] | None
    attributes: list[Field] = field(default_factory=list)


@dataclass
class Work:
    """What a graph computes, as far as it tells: its nodes in order, small tensors by name, numbers in sparse ones.

    `external`: where numbers of tensors are that are not in the file; `metadata`: what its exporter says of it.
    """

    nodes: list[Node] = field(default_factory=list)
    known: dict[bytes, Any] = field(default_factory=dict)  # flat lists of numbers
    functions: set[tuple[bytes, bytes]] = field(default_factory=set)
    sparse: float = 0.0
    external: list[dict[str, str]] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, data: bytes | mmap.mmap) -> Work:
        """Of a model, however deep. Raises ValueError or IndexError where the bytes are no protobuf."""
        work, function, graphs = cls(), None, set[int]()
        for kind, at, inside in messages(data):
            if kind == "Model":
                graphs = {a for n, _, a, _ in inside if n in (7, 20)}
                work.metadata = entries(data, inside, 14)
            elif kind == "Function":
                function = (first(data, inside, 10), first(data, inside, 1))
                work.functions.add(function)
            elif kind == "Node":
                inputs, outputs = texts(data, inside, 1), texts(data, inside, 2)
                work.nodes.append(Node(first(data, inside, 4), first(data, inside, 7), inputs, outputs, function))
            elif kind == "Attribute":
                work.nodes[-1].attributes += inside if work.nodes else []
            elif kind == "Tensor":
                if (small := numbers(data, inside)) is not None:
                    work.known[first(data, inside, 8)] = small
                if elsewhere := entries(data, inside, 13):
                    work.external.append(elsewhere)
            elif kind == "Sparse":
                work.sparse += product(integers(data, inside, 3))
            function = None if at in graphs else function
        return work

    def expanded(self) -> float:
        """Nodes after every function is written out where it is called; infinite where that never ends."""
        calls = {None: Counter[Any](), **{function: Counter[Any]() for function in self.functions}}
        for node in self.nodes:
            calls[node.function][node.domain, node.operator] += 1
        sizes: dict[Any, float] = {}

        def size(function: Any, depth: int) -> float:
            if function not in sizes:
                sizes[function] = math.inf  # it calls itself, unless it turns out that it does not
                inner = (
                    (n, size(f, depth + 1) if f in calls and depth < 100 else 1) for f, n in calls[function].items()
                )
                sizes[function] = sum(n * each for n, each in inner)
            return sizes[function]

        return size(None, 0)

    def unfolded(self, data: bytes | mmap.mmap) -> float:
        """Numbers in the tensors that operators make of constants alone."""
        total = self.sparse
        for node in self.nodes:
            inputs = [self.known.get(name) for name in node.inputs]
            result = None
            if node.operator == b"Constant":
                result = constant(data, node.attributes)
            elif node.operator in FOLDED and inputs and all(x is not None for x in inputs[:2]):
                result = folded(FOLDED[node.operator], inputs)
            elif node.operator in (b"RandomNormal", b"RandomUniform"):
                total += product(integers(data, node.attributes, 8))
            elif node.operator in SIZES:
                total += claim(SIZES[node.operator], inputs)
            if result is not None and node.outputs:
                self.known[node.outputs[0]] = result
        return total


def check_work(path: Path, data: bytes | mmap.mmap, work: Work) -> None:
    """ModelError where a graph runs loops, or asks for more nodes or larger constants than any model has."""
    if loop := next((node.operator.decode() for node in work.nodes if node.operator in LOOPS), None):
        raise ModelError(
            f"{shown(path)}: runs a loop ({loop}), which may never end; export it without, as optimum does"
        )
    if work.expanded() > MOST_NODES:
        raise ModelError(f"{shown(path)}: has over {MOST_NODES:,} nodes with those of its functions; {RESTORE}")
    if (count := work.unfolded(data)) > MOST:
        raise ModelError(f"{shown(path)}: a few constants unfold to {count:.0e} numbers, over {MOST:.0e}; {RESTORE}")


def texts(data: bytes | mmap.mmap, inside: list[Field], number: int) -> list[bytes]:
    return [data[a:b] for n, wire, a, b in inside if n == number and wire == BYTES]


def first(data: bytes | mmap.mmap, inside: list[Field], number: int) -> bytes:
    return next(iter(texts(data, inside, number)), b"")


def integers(data: bytes | mmap.mmap, inside: list[Field], number: int) -> list[int]:
    """A repeated field of whole numbers, packed or not."""
    values = (v for n, wire, a, b in inside if n == number and wire in (BYTES, VARINT) for v in varints(data, a, b))
    return [v - 2**64 if v >= 2**63 else v for v in values]


def numbers(data: bytes | mmap.mmap, inside: list[Field]) -> Any:
    """The flat numbers of a tensor that is small and holds whole numbers or float32; else None."""
    kind = KINDS.get(next((integers(data, [each], 2)[0] for each in inside if each[:2] == (2, VARINT)), 0))
    if not kind or product(integers(data, inside, 1)) > SMALL:
        return None
    dtype, number = kind
    if raw := first(data, inside, 9):
        return np.frombuffer(raw[: len(raw) // 8 * 8], dtype).astype(float)
    if number == 4:
        return np.frombuffer(first(data, inside, number), dtype).astype(float)
    return np.array(integers(data, inside, number), float)


def constant(data: bytes | mmap.mmap, attributes: list[Field]) -> Any:
    """The flat numbers of a Constant node: those of its tensor, or its attributes of whole numbers."""
    for n, wire, *place in attributes:
        if n == 5 and wire == BYTES:
            return numbers(data, list(fields(data, *place)))
    return np.array(integers(data, attributes, 8) or integers(data, attributes, 3), float)


def product(values: Any, default: float = 1.0) -> float:
    """The product of sizes, where 0 and negative ones stand for one that is known elsewhere; `default` for None."""
    if values is None or not len(values):
        return default
    return float(np.prod(np.maximum(np.abs(np.asarray(values, float)), 1)))


def folded(operator: Callable[..., Any], inputs: list[Any]) -> Any:
    """The result of an operator on flat numbers, or None where their numbers do not fit."""
    try:
        result = operator(*inputs)
        return result if len(result) <= SMALL else None
    except (TypeError, ValueError):
        return None


def claim(size: Callable[..., float], inputs: list[Any]) -> float:
    """How many numbers an operator makes; 0 for other inputs than it takes."""
    try:
        return size(*inputs)
    except (TypeError, ValueError):
        return 0.0
