"""How exactly a graph computes: which of its operators do so in half precision, and which in float32.

Graphs arrive here in float32. fp16 has 11 bits and ends at 65,504, bf16 has 8 bits and float32's range. So an operator is left
in float32, an *island*, where it has no half kernel on CUDA, where it computes from noise level and sizes alone (embeddings of
time and place, whose angles need the bits), and where a calibration run has seen a value near the end of the range. Norms sum up
in float32 either way, and attention's softmax is inside an operator that has its own way to. It knows operators and values, and
no network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff.nodes import made

if TYPE_CHECKING:
    from onnx_ir import DataType, Graph, Node, Value
    from onnx_ir import Model as IrModel

MOVING = frozenset(
    (
        "Reshape",
        "Transpose",
        "Concat",
        "Split",
        "Slice",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Identity",
        "Gather",
        "GatherND",
    )
)
COMPUTING = frozenset(("Gemm", "MatMul", "MultiHeadAttention", "Add", "Sub", "Mul", "Div"))  # CUDA has them in bf16 too
FP16_TOO = frozenset(("Conv", "LayerNormalization", "Gelu", "Sigmoid", "GroupNorm", "SkipGroupNorm"))
FP16_TOO |= {"NhwcConv", "BiasSplitGelu", "BiasAdd", "FastGelu"}
FULL_INPUTS = {"GroupNorm": (1, 2), "SkipGroupNorm": (1, 2), "Resize": (1, 2)}  # that are float32 beside half values
EXACT = ("timestep", "time_ids")  # inputs of which half types cannot tell one from the next
MASK = 5  # which input of an attention is added to its scores
MARGIN = 4.0  # how much larger values may be than in the calibration run
Calls = Iterable[Mapping[str, np.ndarray]]  # inputs of a graph by name, a mapping a call


@dataclass(frozen=True)
class Arithmetic:
    """A half type, the operators that compute in it, those that only move values of it, and the largest that it holds."""

    kind: str  # of onnx
    computing: frozenset[str]
    moving: frozenset[str]
    most: float = float("inf")


@dataclass(frozen=True)
class Precision:
    """How weights are stored and computed with, and how far a bundle may be from torch in float32.

    `graph`: each graph's largest difference, in standard deviations of its output. Of an image, of which `same` pixels are
    within `levels` grey levels in all channels: its peak signal-to-noise ratio `psnr` in dB.
    """

    stored: str  # a type of torch
    arithmetic: Arithmetic | None
    graph: float
    psnr: float
    same: float
    levels: int


FP16 = Arithmetic("FLOAT16", COMPUTING | FP16_TOO, MOVING | {"Resize", "Pad"}, 65504 / MARGIN)
BF16 = Arithmetic("BFLOAT16", COMPUTING, MOVING)
PRECISIONS = {
    "fp32": Precision("float32", None, 1e-4, 50, 0.999, 1),
    "fp16": Precision("float16", FP16, 0.1, 30, 0.4, 2),
    "bf16": Precision("bfloat16", BF16, 0.8, 25, 0.4, 8),
    "int8": Precision("int8", None, 0.8, 25, 0.4, 8),
}


def lower(
    model: IrModel, arithmetic: Arithmetic | None, largest: Mapping[str, float], rounded: bool = False
) -> list[str]:
    """Make a graph, whose weights have the types that they are stored in, compute in `arithmetic`; in float32 where None.

    `largest`: the greatest magnitude seen of each value. With `rounded`, every operator computes in float32 on numbers that
    are rounded to the half type, as are its results: what a half kernel that sums up in float32 gives, where there is none.
    Graph inputs and outputs stay float32. Returns the islands that `largest` made.
    """
    import onnx_ir as ir

    graph, islands, late = model.graph, list[str](), of_time_alone(model.graph)
    half = ir.DataType[arithmetic.kind] if arithmetic else None
    casts, most = Casts(graph, half, rounded), arithmetic.most if arithmetic else float("inf")

    def fits(value: Value) -> bool:
        return largest.get(value.name or "", 0) <= most

    for node in list(graph):
        given = [v for v in node.inputs if v is not None and v.dtype in casts.kinds]
        if not given or node.op_type in ("Cast", "Shape", "Size"):
            continue
        if arithmetic is None or node.op_type in arithmetic.moving | MOVING:
            low = node.op_type in (arithmetic.moving if arithmetic else MOVING) and any(casts.low(v) for v in given)
            low = low and all(fits(v) for v in given)
        else:
            able = node.op_type in arithmetic.computing and node not in late
            cut = bounded(node, graph, fits) if able else None
            given = [v for v in given if v is not cut]
            low = able and all(fits(v) for v in (*given, *node.outputs))
            if able and not low:
                islands.append(place(node))
        casts.convert(node, low)
    casts.finish()
    return islands


def bounded(attention: Node, graph: Graph, fits: Callable[[Value], bool]) -> Value | None:
    """The mask of an attention, after it is cut off where a half type ends: -30,000 is minus infinity to a softmax."""
    mask = (
        attention.inputs[MASK] if attention.op_type == "MultiHeadAttention" and len(attention.inputs) > MASK else None
    )
    if mask is None or fits(mask):
        return None
    least = made(graph, attention, "Constant", [], "FLOAT", value_float=-3e4)
    cut = made(graph, attention, "Max", [mask, least], like=mask)
    attention.replace_input_with(MASK, cut)
    return mask


class Casts:
    """The casts of a graph: one a value and type, made where first needed."""

    def __init__(self, graph: Graph, half: DataType | None, rounded: bool):
        import onnx_ir as ir

        self.graph, self.full, self.half, self.rounded = graph, ir.DataType.FLOAT, half, rounded
        self.kinds = {self.full, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
        self.made: dict[tuple[Value, DataType], Value] = {}
        self.round: set[Value] = set()  # values of float32 that a half type holds

    def low(self, value: Value) -> bool:
        return value.dtype != self.full or value in self.round

    def convert(self, node: Node, low: bool) -> None:
        """Give an operator inputs of one type, and its outputs that type."""
        import onnx_ir as ir

        stored = next((v.dtype for v in node.inputs if v is not None and v.dtype in self.kinds - {self.full}), None)
        half = self.half or stored  # what moves weights before they are cast
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype in self.kinds:
                full = not low or i in FULL_INPUTS.get(node.op_type, ())
                node.replace_input_with(i, self.cast(value, self.full if full else half, node))
        for value in node.outputs:
            if value.dtype in self.kinds | {None}:
                kind = half if low and not self.rounded else self.full
                value.type = ir.TensorType(kind)  # type: ignore[arg-type]
        if low and self.rounded:
            self.round |= set(node.outputs)

    def cast(self, value: Value, kind: Any, before: Node) -> Value:
        """A value in another type; with `rounded`, in float32 and rounded to it."""
        if self.rounded and kind != self.full:
            once = value if value.dtype == kind else self.cast_once(value, kind, before)
            return self.cast_once(once, self.full, before)
        return value if value.dtype == kind else self.cast_once(value, kind, before)

    def cast_once(self, value: Value, kind: Any, before: Node) -> Value:
        if (value, kind) not in self.made:
            self.made[value, kind] = made(self.graph, before, "Cast", [value], kind.name, value, to=int(kind))
        return self.made[value, kind]

    def finish(self) -> None:
        """Outputs of the graph become float32."""
        import onnx_ir as ir

        for i, value in enumerate(self.graph.outputs):
            if value.dtype in self.kinds - {self.full}:
                node = ir.node("Cast", [value], {"to": int(self.full)})
                self.graph.append(node)
                result = node.outputs[0]
                result.type, result.shape, result.name = ir.TensorType(self.full), value.shape, value.name
                value.name = f"{value.name}.half"
                self.graph.outputs[i] = result


def of_time_alone(graph: Graph) -> set[Node]:
    """The operators that compute from inputs of EXACT, from sizes and from weights alone: embeddings of time and place."""
    constant = {*graph.initializers.values()}
    values, nodes = {value for value in graph.inputs if value.name in EXACT}, set[Any]()
    for node in graph:
        given = {value for value in node.inputs if value is not None} - constant
        if not given:
            constant |= set(node.outputs)
        elif node.op_type in ("Shape", "Size") or given <= values:
            nodes.add(node)
            values |= set(node.outputs)
    return nodes


def place(node: Node) -> str:
    """Where an operator is: its module's path, as torch's exporter noted it, and what it is."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")  # from the outermost to the operator itself
    module = (json.loads(scopes.replace("'", '"')) or [""])[:-1][-1:]
    return f"{''.join(module).removeprefix('network.')}:{node.op_type}"


def magnitudes(model: IrModel, folder: Path, calls: Calls) -> dict[str, float]:
    """The largest magnitude of every float value of a graph over some calls, computed in float32 on the CPU."""
    import onnx_ir as ir

    from tinydiff.backends.sessions import called, stepwise

    copy = ir.from_proto(ir.to_proto(model))
    lower(copy, None, {})
    names = [value.name for node in copy.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    wanted = {value: f"{value}.largest" for value in names if value}
    for value in [value for node in list(copy.graph) for value in node.outputs if value.name in wanted]:
        size = ir.node("Abs", [value])
        most = ir.node("ReduceMax", size.outputs, {"keepdims": 0})
        most.outputs[0].name, most.outputs[0].type = wanted[value.name or ""], ir.TensorType(ir.DataType.FLOAT)
        copy.graph.extend((size, most))
        copy.graph.outputs.append(most.outputs[0])
    session = stepwise(ir.to_proto(copy).SerializeToString(), folder)
    found = dict.fromkeys(wanted, 0.0)
    for inputs in calls:
        results: Any = called(session, list(wanted.values()), inputs)
        found = {name: float(np.maximum(found[name], value)) for name, value in zip(wanted, results, strict=True)}
    return found
