"""Operators of onnxruntime that only CUDA has, in place of several that every provider runs: norms of groups with what is around
them, the projections of attention as one product, biases with what follows them, and convolutions with their channels last.

Each pass finds one form that `graphs` writes and leaves what differs from it. It knows operators and shapes, and no network.
The layout is the graph's own, since a session that onnxruntime lays out anew (`prefer_nhwc`) computes sizes on the card,
copies them back in every call, and cannot be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tinydiff.nodes import MICROSOFT, inserted, is_linear, made, numbers, perm_of, skip_transposes, source

if TYPE_CHECKING:
    from onnx_ir import Graph, Node, Shape, Value
    from onnx_ir import Model as IrModel

LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # channels
TURNED = [0, 2, 1]  # (B, C, h w) and (B, h w, C)
GATED = (2560, 5120, 10240)  # widths, with both halves, that BiasSplitGelu has kernels for
BIASED = (320, 640, 1280)  # and BiasAdd


def fuse(model: IrModel, largest: dict[str, float]) -> None:
    """All passes. `largest`: the greatest magnitude seen of each value by name, to which those of new ones are added."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    passes = {"BatchNormalization": fuse_norm, "MultiHeadAttention": fuse_projections}
    passes |= {"Mul": fuse_gate, "Gelu": fuse_gelu, "Add": fuse_residual}
    for node in list(model.graph):
        if node.op_type in passes:
            passes[node.op_type](model.graph, node, largest)
    model.graph.opset_imports[MICROSOFT] = 1
    RemoveUnusedNodesPass()(model)
    lay_out(model.graph, largest)
    skip_transposes(model.graph)
    RemoveUnusedNodesPass()(model)


def fuse_norm(graph: Graph, affine: Node, largest: dict[str, float]) -> None:
    """A group norm, the sum before it and the SiLU after it as one operator over channels that come last."""
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
    bias = bias_of(pair[0]) if pair else None
    given = [channels_last(graph, affine, value, largest) for value in pair or (x,)]
    inputs = [given[0], *affine.inputs[1:3], *given[1:], *([] if bias is None else [bias])]
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


def channels_last(graph: Graph, before: Node, value: Value, largest: dict[str, float]) -> Value:
    """(B, C, H, W) as (B, H, W, C): what it is a transpose of, if it is one."""
    if parts := are_last([value]):
        return parts[0]
    if value.shape is not None and list(value.shape[2:]) == [1, 1]:
        turned = made(graph, before, "Reshape", [value, numbers(graph, before, 0, 1, 1, -1)])
    else:
        turned = made(graph, before, "Transpose", [value], perm=LAST)
    same(largest, value, turned)
    return turned


def bias_of(value: Value) -> Value | None:
    """The bias of the convolution that a value comes from, if it is used but once; the convolution loses it."""
    conv = source(value, "Conv")
    if conv is None or len(conv.inputs) < 3 or len(value.uses()) != 1:
        return None
    bias = conv.inputs[2]
    conv.replace_input_with(2, None)
    return bias


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


def put(graph: Graph, node: Node, operator: str, inputs: Sequence[Value | None], largest: dict[str, float]) -> None:
    """An operator in place of another, whose output it gives."""
    result = node.outputs[0]
    instead = made(graph, node, operator, inputs, like=result)
    same(largest, result, instead)
    result.replace_all_uses_with(instead)


def fuse_gate(graph: Graph, product: Node, largest: dict[str, float]) -> None:
    """The first half of a product's columns, times GELU of the second (GEGLU), its bias with them."""
    for value, gate in (product.inputs, product.inputs[::-1]):
        gelu, split = source(gate, "Gelu"), source(value, "Split")
        if gelu is None or split is None or gelu.attributes.get_string("approximate", "none") != "none":
            continue
        once = all(len(each.uses()) == 1 for each in (*split.outputs, *gelu.outputs))
        if (
            list(split.outputs) != [value, gelu.inputs[0]]
            or not once
            or split.attributes.get_int("axis", 0) not in (-1, 2)
        ):
            continue
        if (found := biased(graph, product, split.inputs[0], GATED)) is not None:
            return put(graph, product, "BiasSplitGelu", found, largest)


def fuse_gelu(graph: Graph, gelu: Node, largest: dict[str, float]) -> None:
    """The tanh form of GELU, with the bias of the product that it is of."""
    tanh = gelu.attributes.get_string("approximate", "none") == "tanh"
    if tanh and (found := biased(graph, gelu, gelu.inputs[0])) is not None:
        put(graph, gelu, "FastGelu", found, largest)


def fuse_residual(graph: Graph, total: Node, largest: dict[str, float]) -> None:
    """A product, its bias, and what it is added to."""
    result = total.outputs[0]
    for branch, skip in (total.inputs, total.inputs[::-1]):
        equal = branch is not None and skip is not None and branch.shape == skip.shape == result.shape
        if equal and not result.is_graph_output() and (found := biased(graph, total, branch, BIASED)) is not None:
            return put(graph, total, "BiasAdd", [*found, skip], largest)


def biased(graph: Graph, before: Node, value: Value | None, widths: Sequence[int] = ()) -> list[Value] | None:
    """A (B, T, D), of one of some widths, without its bias, and the bias, where it is a product's that nothing else uses."""
    reshape = source(value, "Reshape")
    gemm = source(reshape.inputs[0], "Gemm") if reshape else None
    if value is None or reshape is None or gemm is None or not is_linear(gemm) or len(gemm.inputs) != 3:
        return None
    if value.shape is None or len(value.shape) != 3 or gemm.inputs[2] is None:
        return None
    if widths and value.shape[-1] not in widths:
        return None
    if len(value.uses()) != 1 or len(gemm.outputs[0].uses()) != 1:
        return None
    rows = made(graph, before, "Gemm", gemm.inputs[:2], like=gemm.outputs[0], transB=1)
    return [made(graph, before, "Reshape", [rows, reshape.inputs[1]], like=value), gemm.inputs[2]]


def lay_out(graph: Graph, largest: dict[str, float]) -> None:
    """Convolutions with their channels last, and so all that lies between them: sums, joins, resizing, and pixels that become
    tokens and tokens pixels without a copy."""
    passes = {"Conv": convolve, "Add": add, "Concat": join, "Resize": resize, "Reshape": from_tokens}
    for node in list(graph):
        if node.op_type == "Transpose" and perm_of(node) == TURNED:
            to_tokens(graph, node, largest)
        elif node.op_type in passes and (made_last := passes[node.op_type](graph, node, largest)) is not None:
            result = node.outputs[0]
            turned = made(graph, node, "Transpose", [made_last], like=result, perm=FIRST)
            same(largest, result, made_last, turned)
            made_last.shape = permuted(result.shape)
            if result.is_graph_output():
                turned.name, result.name = result.name, None
            result.replace_all_uses_with(turned, replace_graph_outputs=True)


def permuted(shape: Shape | None) -> Shape | None:
    """The shape of (B, C, H, W) with its channels last."""
    import onnx_ir as ir

    return ir.Shape([shape[i] for i in LAST]) if shape is not None else None


def are_last(values: Sequence[Value | None]) -> list[Value] | None:
    """Values whose channels come last, where all of these are transposes of such."""
    nodes = [source(value, "Transpose") for value in values]
    found = [node.inputs[0] for node in nodes if node is not None and perm_of(node) == FIRST]
    return [value for value in found if value is not None] if len(found) == len(values) else None


def convolve(graph: Graph, conv: Node, largest: dict[str, float]) -> Value | None:
    (x, weight), bias = conv.inputs[:2], [each for each in conv.inputs[2:] if each is not None]
    if x is None or weight is None or weight.shape is None or len(weight.shape) != 4:
        return None
    if conv.attributes.get_int("group", 1) != 1:
        return None
    filters = made(graph, conv, "Transpose", [weight], perm=LAST)
    given = [channels_last(graph, conv, x, largest), filters, *bias]
    attributes: dict[str, Any] = {**conv.attributes}
    node = inserted(graph, conv, "NhwcConv", given, **attributes)
    node.metadata_props.update(conv.metadata_props)  # which say where it is
    return node.outputs[0]


def add(graph: Graph, node: Node, largest: dict[str, float]) -> Value | None:
    first, second = node.inputs
    parts = are_last(node.inputs) if first and second and first.shape == second.shape else None
    return made(graph, node, "Add", parts) if parts else None


def join(graph: Graph, node: Node, largest: dict[str, float]) -> Value | None:
    parts = are_last(node.inputs) if node.attributes.get_int("axis", 0) == 1 else None
    return made(graph, node, "Concat", parts, axis=3) if parts else None


def resize(graph: Graph, node: Node, largest: dict[str, float]) -> Value | None:
    x, parts = node.inputs[0], are_last(node.inputs[:1])
    scales = node.inputs[2].const_value if len(node.inputs) == 3 and node.inputs[2] is not None else None
    if x is None or not parts or scales is None or node.inputs[1] is not None or len(scales.numpy()) != 4:
        return None
    by = made(graph, node, "Constant", [], value_floats=[float(scales.numpy()[i]) for i in LAST])
    attributes: dict[str, Any] = {**node.attributes}
    return made(graph, node, "Resize", [*parts, None, by], **attributes)


def to_tokens(graph: Graph, turn: Node, largest: dict[str, float]) -> None:
    """(B, C, H, W) to (B, h w, C), from channels that are last."""
    reshape = source(turn.inputs[0], "Reshape")
    x = reshape.inputs[0] if reshape else None
    parts, flat = are_last([x]), reshape.outputs[0].shape if reshape else None
    if not parts or x is None or x.shape is None or flat is None or len(flat) != 3 or flat[1] != x.shape[1]:
        return
    if isinstance(width := flat[1], int):
        put(graph, turn, "Reshape", [*parts, numbers(graph, turn, 0, -1, width)], largest)


def from_tokens(graph: Graph, reshape: Node, largest: dict[str, float]) -> Value | None:
    """(B, h w, C) to (B, H, W, C), where it became (B, C, H, W)."""
    turn, sizes = source(reshape.inputs[0], "Transpose"), source(reshape.inputs[1], "Concat")
    shape = reshape.outputs[0].shape
    x = turn.inputs[0] if turn is not None and perm_of(turn) == TURNED else None
    if x is None or x.shape is None or shape is None or len(shape) != 4 or sizes is None or len(sizes.inputs) != 4:
        return None
    if not isinstance(shape[1], int) or x.shape[-1] != shape[1]:
        return None
    order = made(graph, reshape, "Concat", [sizes.inputs[i] for i in LAST], "INT64", axis=0)
    return made(graph, reshape, "Reshape", [x, order])
