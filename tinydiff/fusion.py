"""Operators of onnxruntime that only CUDA has, in place of several that every provider runs: norms of groups with what is around
them, and the projections of attention as one product.

Each pass finds one form that `graphs` writes and leaves what differs from it. It knows operators and shapes, and no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tinydiff.nodes import MICROSOFT, inserted, is_linear, made, numbers, source

if TYPE_CHECKING:
    from onnx_ir import Graph, Node, Value
    from onnx_ir import Model as IrModel

LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # channels


def fuse(model: IrModel, largest: dict[str, float]) -> None:
    """All passes. `largest`: the greatest magnitude seen of each value by name, to which those of new ones are added."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    passes = {"BatchNormalization": fuse_norm, "MultiHeadAttention": fuse_projections}
    for node in list(model.graph):
        if node.op_type in passes:
            passes[node.op_type](model.graph, node, largest)
    model.graph.opset_imports[MICROSOFT] = 1
    RemoveUnusedNodesPass()(model)


def fuse_norm(graph: Graph, affine: Node, largest: dict[str, float]) -> None:
    """A group norm, the sum before it and the SiLU after it as one operator over channels that come last.

    onnxruntime moves the transposes around it out of the way, up to convolutions that it runs channels last too.
    """
    reshape = source(affine.inputs[0], "Reshape")
    norm = source(reshape.inputs[0], "InstanceNormalization") if reshape else None
    groups = source(norm.inputs[0], "Reshape") if norm else None
    x, shape = groups.inputs[:2] if groups else (None, None)
    if norm is None or x is None or x.shape is None or len(x.shape) != 4 or shape is None or shape.const_value is None:
        return
    silu, sizes = silu_of(affine.outputs[0]), shape.const_value.numpy()
    before = silu or affine.outputs[0]
    if before.is_graph_output():
        return
    options = {"epsilon": norm.attributes.get_float("epsilon", 1e-5), "groups": int(sizes[1]), "channels_last": 1}
    options |= {"activation": int(silu is not None)}
    pair = summands(x, groups, affine)
    given = [made(graph, affine, "Transpose", [value], perm=LAST) for value in pair or (x,)]
    inputs = [given[0], *affine.inputs[1:3], *given[1:]]
    fused = inserted(graph, affine, "SkipGroupNorm" if pair else "GroupNorm", inputs, **options)
    if pair:
        total = made(graph, affine, "Transpose", [fused.outputs[1]], like=x, perm=FIRST)
        same(largest, x, total, fused.outputs[1])
        for user, index in list(x.uses()):
            if user is not groups and user.op_type != "Shape":
                user.replace_input_with(index, total)
    result = made(graph, affine, "Transpose", [fused.outputs[0]], like=x, perm=FIRST)
    before.replace_all_uses_with(result)
    same(largest, before, result, fused.outputs[0])
    for value, turned in zip(pair or (x,), given, strict=True):
        same(largest, value, turned)


def same(largest: dict[str, float], known: Value, *others: Value) -> None:
    """Values as large as another."""
    if known.name in largest:
        largest |= {value.name or "": largest[known.name] for value in others}


def silu_of(x: Value) -> Value | None:
    """x sigmoid(x), where x is used for nothing else."""
    users = {user.op_type: user for user, _ in x.uses()}
    if users.keys() != {"Mul", "Sigmoid"} or len(x.uses()) != 2:
        return None
    product, gate = users["Mul"].outputs[0], users["Sigmoid"].outputs[0]
    return product if [user for user, _ in gate.uses()] == [users["Mul"]] else None


def summands(x: Value, groups: Node | None, at: Node) -> tuple[Value, Value] | None:
    """The two parts of a sum (B, C, H, W), if nothing uses it before the operator `at`; the second may be (B, C, 1, 1)."""
    total, order = source(x, "Add"), {node: i for i, node in enumerate(at.graph or ())}
    early = any(order[user] < order[at] and user is not groups and user.op_type != "Shape" for user, _ in x.uses())
    if total is None or early or x.is_graph_output():
        return None
    for wide, other in (total.inputs, total.inputs[::-1]):
        if wide is None or other is None or other.shape is None or len(other.shape) != 4 or wide.shape != x.shape:
            continue
        if other.shape == x.shape or (x.shape and other.shape[0] == x.shape[0] and list(other.shape[2:]) == [1, 1]):
            return wide, other
    return None


class Projection(NamedTuple):
    """A product of rows x and W^T (out, in), plus a bias, that becomes (batch, tokens, out)."""

    x: Value
    weight: Value
    bias: Value | None
    shape: tuple[int, ...]
    sizes: tuple[Value | None, ...]  # batch and tokens
    node: Node


def fuse_projections(graph: Graph, attention: Node, largest: dict[str, float]) -> None:
    """Queries, keys and values of one input from one product, interleaved by head as onnxruntime takes them; or keys and
    values, where queries are of another input."""
    found, heads = [projection(value) for value in attention.inputs[:3]], attention.attributes.get_int("num_heads", 0)
    for first in (0, 1):
        parts = [each for each in found[first:] if each is not None]
        if len(parts) == 3 - first and len({(each.x, each.shape, each.bias is None) for each in parts}) == 1:
            packed = packed_product(graph, attention, parts, heads)
            seen = [largest.get(each.node.outputs[0].name or "", 0.0) for each in parts]
            rows = source(packed, "Reshape")
            largest |= {value.name or "": max(seen) for value in (packed, rows.inputs[0] if rows else packed) if value}
            attention.replace_input_with(first, packed)
            for i in range(first + 1, 3):
                attention.replace_input_with(i, None)
            return


def projection(value: Value | None) -> Projection | None:
    """Where a (B, T, D) comes from, if it is from a product by way of (B, T, heads, D/heads)."""
    joined = source(value, "Reshape")
    split = source(joined.inputs[0], "Reshape") if joined else None
    gemm, sizes = (source(split.inputs[i], name) if split else None for i, name in enumerate(("Gemm", "Concat")))
    if gemm is None or not is_linear(gemm) or sizes is None or len(sizes.inputs) != 4:
        return None
    x, weight, *bias = gemm.inputs
    if x is None or weight is None or weight.shape is None or not weight.shape.is_static():
        return None
    return Projection(x, weight, bias[0] if bias else None, weight.shape.numpy(), tuple(sizes.inputs[:2]), gemm)


def packed_product(graph: Graph, before: Node, parts: Sequence[Projection], heads: int) -> Value:
    """(B, T, N, parts, D/N) of several products of one input."""
    (out, depth), count = parts[0].shape, len(parts)

    def joined(vectors: Sequence[Value | None], *inner: int) -> Value:
        split = numbers(graph, before, heads, 1, out // heads, *inner)
        rows = [made(graph, before, "Reshape", [each, split]) for each in vectors]
        whole = made(graph, before, "Concat", rows, axis=1)
        return made(graph, before, "Reshape", [whole, numbers(graph, before, -1, *inner)])

    given = [parts[0].x, joined([each.weight for each in parts], depth)]
    given += [joined([each.bias for each in parts])] if parts[0].bias is not None else []
    sizes = [*parts[0].sizes, numbers(graph, before, heads, count, out // heads)]
    shape = made(graph, before, "Concat", sizes, "INT64", axis=0)
    return made(graph, before, "Reshape", [made(graph, before, "Gemm", given, transB=1), shape])
