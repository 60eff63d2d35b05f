"""New operators in an ONNX graph, with the types and shapes that passes over it ask for afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_ir import Graph, Node, Value

MICROSOFT = "com.microsoft"
OURS = frozenset(
    ["GroupNorm", "SkipGroupNorm", "NhwcConv", "BiasSplitGelu", "BiasAdd", "FastGelu"]
)  # onnxruntime's own
KINDS = {"MatMulInteger": "INT32"}  # of what operators give; else float32
SEVERAL = {"DynamicQuantizeLinear": ("UINT8", "FLOAT", "UINT8"), "SkipGroupNorm": ("FLOAT", "FLOAT")}


def inserted(
    graph: Graph,
    before: Node,
    operator: str,
    inputs: Sequence[Value | None],
    kind: str = "",
    like: Value | None = None,
    **attributes: Any,
) -> Node:
    """A new operator before another; its first output has the shape of `like`, and type `kind` where that is no KINDS."""
    import onnx_ir as ir

    kinds = SEVERAL.get(operator, (kind or KINDS.get(operator, "FLOAT"),))
    node = ir.node(operator, inputs, attributes, domain=MICROSOFT if operator in OURS else "", num_outputs=len(kinds))
    for output, each in zip(node.outputs, kinds, strict=True):
        output.type = ir.TensorType(ir.DataType[each])
    node.outputs[0].shape = like.shape if like is not None else None
    graph.insert_before(before, node)
    return node


def made(
    graph: Graph, before: Node, operator: str, inputs: Sequence[Value | None], *of: Any, **attributes: Any
) -> Value:
    """The first output of `inserted`."""
    return inserted(graph, before, operator, inputs, *of, **attributes).outputs[0]


def numbers(graph: Graph, before: Node, *values: int) -> Value:
    """A constant list of whole numbers."""
    return made(graph, before, "Constant", [], "INT64", value_ints=list(values))


def is_linear(node: Node) -> bool:
    """Whether a Gemm is x W^T + b."""
    given = node.attributes
    plain = given.get_float("alpha", 1.0) == given.get_float("beta", 1.0) == 1.0
    return node.op_type == "Gemm" and plain and (given.get_int("transA", 0), given.get_int("transB", 0)) == (0, 1)


def source(value: Value | None, operator: str) -> Node | None:
    """What makes a value, if it is this operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def perm_of(transpose: Node | None) -> list[int]:
    """The order of axes that a transpose makes; none where it is not said, or there is no transpose."""
    return list(transpose.attributes.get_ints("perm", [])) if transpose is not None else []


def skip_transposes(graph: Graph) -> None:
    """Two transposes that undo each other are gone."""
    for node in graph:
        before = source(node.inputs[0], "Transpose") if node.op_type == "Transpose" else None
        first, then = perm_of(before), perm_of(node)
        if before is not None and before.inputs[0] is not None and first and [first[i] for i in then] == sorted(first):
            node.outputs[0].replace_all_uses_with(before.inputs[0])
