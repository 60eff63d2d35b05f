"""Weights of a byte: int8 from -127 to 127, times a scale for each row of a matrix, channel of a convolution, line of a table.

A graph multiplies them out again, which onnxruntime does once where it folds constants; or, for processors with instructions for
it, rounds what comes to a matrix product to 8 bits as well, by its range of that moment, and multiplies whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tinydiff.nodes import inserted, made, numbers
from tinydiff.precision import of_time_alone

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
        if tensor.numel() >= LARGE and {(user.op_type, index) for user, index in value.uses()} <= PLACES:
            scale = tensor.abs().flatten(1).amax(1).clamp(min=1e-12) / 127
            rows = (tensor / scale.reshape(-1, *[1] * (tensor.ndim - 1))).round()
            tensors |= {name: rows.char(), f"{name}.scale": scale}
    return tensors


def dequantise(graph: Graph, value: Value, scale: Value, whole: bool) -> None:
    """Follow int8 weights by their product with their scales; with `whole`, matrix products are of whole numbers.

    Those of embeddings of time are not: a number there stands for every pixel.
    """
    import onnx_ir as ir

    value.type, late = ir.TensorType(ir.DataType.INT8), of_time_alone(graph)
    for user, index in list(value.uses()):
        if user.op_type == "Gather":
            looked_up(graph, user, scale)
        elif whole and user.op_type == "Gemm" and user not in late:
            whole_product(graph, user, scale)
        else:
            full = made(graph, user, "DequantizeLinear", [value, scale], like=value, axis=0)
            user.replace_input_with(index, full)


def looked_up(graph: Graph, user: Node, scale: Value) -> None:
    """Of a table only the rows that are looked up are multiplied out."""
    import onnx_ir as ir

    output, uses = user.outputs[0], list(user.outputs[0].uses())
    after = uses[0][0]
    rows = made(graph, after, "Gather", [scale, user.inputs[1]])
    scales = made(graph, after, "Unsqueeze", [rows, numbers(graph, after, -1)])
    number = made(graph, after, "Cast", [output], like=output, to=int(ir.DataType.FLOAT))
    product = made(graph, after, "Mul", [number, scales], like=output)
    output.type = ir.TensorType(ir.DataType.INT8)
    for consumer, index in uses:
        consumer.replace_input_with(index, product)


def whole_product(graph: Graph, gemm: Node, scale: Value) -> None:
    """x W^T + b where x (rows, in) is of 8 bits by its own range and W (out, in) int8; onnxruntime fuses these into one."""
    (x, weight, *bias), result = gemm.inputs, gemm.outputs[0]
    known = [user for user, _ in x.uses() if user.op_type == "DynamicQuantizeLinear"] if x is not None else []
    rounded, step, zero = (known or [inserted(graph, gemm, "DynamicQuantizeLinear", [x])])[0].outputs
    turned = made(graph, gemm, "Transpose", [weight], "INT8", perm=[1, 0])
    whole = made(graph, gemm, "MatMulInteger", [rounded, turned, zero])
    number = made(graph, gemm, "Cast", [whole], to=1)
    product = made(graph, gemm, "Mul", [number, made(graph, gemm, "Mul", [step, scale])], like=result)
    result.replace_all_uses_with(made(graph, gemm, "Add", [product, bias[0]], like=result) if any(bias) else product)
    graph.remove(gemm, safe=True)
