"""Weights of a byte: int8 from -127 to 127, times a scale for each row of a matrix, channel of a convolution, line of a table.

A graph multiplies them out again, which onnxruntime does once where it folds constants; or, for processors with instructions for
it, rounds what comes to a matrix product to 8 bits as well, by its range of that moment, and multiplies whole numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinydiff.nodes import inserted, is_linear, made, numbers

if TYPE_CHECKING:
    from onnx_ir import Graph, Node, Value
    from torch import Tensor

LARGE = 1024  # numbers in a weight that is worth it
PLACES = {("Gemm", 1), ("Conv", 1), ("Gather", 0)}  # operators and which of their inputs


def quantised(weights: Mapping[str, Value], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weight as it is stored: a large one of PLACES alone as int8 with its `.scale`, others in float32."""
    tensors = dict[str, Any]()
    for name, value in weights.items():
        tensors[name] = tensor = state[name].detach().float()
        if (
            tensor.numel() >= LARGE
            and tensor.ndim > 1
            and {(user.op_type, index) for user, index in value.uses()} <= PLACES
        ):
            scale = tensor.abs().flatten(1).amax(1).clamp(min=1e-12) / 127
            rows = (tensor / scale.reshape(-1, *[1] * (tensor.ndim - 1))).round()
            tensors |= {name: rows.char(), f"{name}.scale": scale}
    return tensors


def dequantise(graph: Graph, value: Value, scale: Value, whole: bool, late: Collection[Node]) -> None:
    """Follow int8 weights by their product with their scales; with `whole`, matrix products are of whole numbers.

    Those of embeddings of time, `late`, are not: a number there stands for every pixel.
    """
    import onnx_ir as ir

    value.type = ir.TensorType(ir.DataType.INT8)
    for user, index in list(value.uses()):
        if user.op_type == "Gather":
            looked_up(graph, user, scale)
        elif whole and is_linear(user) and user not in late:
            whole_product(graph, user, scale)
        else:
            user.replace_input_with(index, made(graph, user, "DequantizeLinear", [value, scale], like=value, axis=0))


def looked_up(graph: Graph, gather: Node, scale: Value) -> None:
    """Of a table only the rows that are looked up are multiplied out."""
    import onnx_ir as ir

    (table, ids), output = gather.inputs[:2], gather.outputs[0]
    number = made(
        graph, gather, "Cast", [made(graph, gather, "Gather", [table, ids], "INT8", output)], to=int(ir.DataType.FLOAT)
    )
    scales = made(graph, gather, "Unsqueeze", [made(graph, gather, "Gather", [scale, ids]), numbers(graph, gather, -1)])
    replaced(graph, gather, made(graph, gather, "Mul", [number, scales], like=output))


def whole_product(graph: Graph, gemm: Node, scale: Value) -> None:
    """x W^T + b where x (rows, in) is of 8 bits by its own range and W (out, in) int8; onnxruntime fuses these into one."""
    (x, weight, *bias), result = gemm.inputs, gemm.outputs[0]
    rounded, step, zero = bytes_of(graph, x)
    turned = made(graph, gemm, "Transpose", [weight], "INT8", perm=[1, 0])
    number = made(graph, gemm, "Cast", [made(graph, gemm, "MatMulInteger", [rounded, turned, zero])], to=1)
    product = made(graph, gemm, "Mul", [number, made(graph, gemm, "Mul", [step, scale])], like=result)
    biased = any(each is not None for each in bias)
    replaced(graph, gemm, made(graph, gemm, "Add", [product, bias[0]], like=result) if biased else product)


def bytes_of(graph: Graph, x: Value | None) -> Sequence[Value]:
    """A value in 8 bits, their step and their zero: made once, right after the value itself."""
    assert x is not None
    for user, _ in x.uses():
        if user.op_type == "DynamicQuantizeLinear":
            return user.outputs
    producer, nodes = x.producer(), iter(graph)
    while producer is not None and next(nodes) is not producer:
        pass
    return inserted(graph, next(nodes), "DynamicQuantizeLinear", [x]).outputs


def replaced(graph: Graph, node: Node, value: Value) -> None:
    """Another value for the output of an operator, which is gone."""
    if (old := node.outputs[0]).is_graph_output():
        graph.outputs[list(graph.outputs).index(old)] = value
        value.name, old.name = old.name, None
    old.replace_all_uses_with(value)
    graph.remove(node, safe=True)
