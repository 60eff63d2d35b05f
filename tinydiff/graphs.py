"""What becomes of torch's program on its way to an ONNX graph: operators onnxruntime runs fast, then passes over the graph.

It knows operators, names and shapes, and no network. What it does not touch is torch's exporter's business.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinydiff.checkpoints.header import Stored, header
from tinydiff.nodes import skip_transposes
from tinydiff.precision import of_time_alone
from tinydiff.quantisation import dequantise

if TYPE_CHECKING:
    from onnx_ir import Graph as IrGraph
    from onnx_ir import Model as IrModel
    from onnx_ir import Value


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter's warnings and logs off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def fused_attention() -> Any:
    """onnxruntime's MultiHeadAttention as an operator to write into graphs: q, k, v (B, T, D), bias, key mask, mask."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    Parameter, Option, Kind = OpSchema.FormalParameter, OpSchema.FormalParameterOption, OpSchema.AttrType
    needed = dict.fromkeys(("query", "key", "value"), Option.Single)
    optional = dict.fromkeys(("bias", "key_padding_mask", "attention_bias"), Option.Optional)
    inputs = [Parameter(key, "T", param_option=option) for key, option in (needed | optional).items()]
    kinds = {"num_heads": Kind.INT, "unidirectional": Kind.INT, "scale": Kind.FLOAT}
    attributes = [OpSchema.Attribute(key, kind, required=key == "num_heads") for key, kind in kinds.items()]
    name, domain, types = "MultiHeadAttention", "com.microsoft", [("T", ["tensor(float)"], "")]
    outputs = [Parameter("output", "T")]
    schema = OpSchema(name, domain, 1, inputs=inputs, outputs=outputs, type_constraints=types, attributes=attributes)
    return Op(Opset(domain, 1), name, schema)


def translations() -> dict[Callable, Callable]:
    """Operators that become fewer ONNX nodes than torch's exporter would write, none of which transposes a weight."""
    from onnxscript import opset18

    multi_head_attention = fused_attention()
    op: Any = opset18  # its signatures ask for more exact types than are known here

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        """One Gemm over the rows of x (..., in) -> (..., out): it takes the weight (out, in) as it is stored."""
        if len(x.shape) == 2:
            return op.Gemm(x, weight, bias, transB=1)
        rows = op.Gemm(op.Reshape(x, op.Constant(value_ints=[-1, x.shape[-1]])), weight, bias, transB=1)
        shape = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[weight.shape[0]]), axis=0)
        return op.Reshape(rows, shape)

    def group_norm(
        x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
    ) -> Any:
        """Each group is an instance; then weight and bias, if any, in one pass, as a batch norm of mean 0 and variance 1."""
        one, zero = (op.Constant(value_floats=[v] * groups) for v in (1.0, 0.0))
        y = op.InstanceNormalization(op.Reshape(x, op.Constant(value_ints=[0, groups, -1])), one, zero, epsilon=eps)
        if weight is None:
            return op.Reshape(y, op.Shape(x))
        mean, variance = (op.Constant(value_floats=[v] * weight.shape[0]) for v in (0.0, 1.0))
        return op.BatchNormalization(op.Reshape(y, op.Shape(x)), weight, bias, mean, variance, epsilon=0.0)

    def rows(x: Any) -> Any:
        """(B, N, T, D/N) -> (B, T, D), which undoes what torch did to it."""
        return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))

    def attention(
        q: Any,
        k: Any,
        v: Any,
        mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Any = None,
        **_: Any,
    ) -> Any:
        """softmax(scale q k^T + mask) v over (B, N, T, D/N) as onnxruntime's own operator, which keeps no (T, T) scores."""
        heads, given = int(q.shape[1]), {} if scale is None else {"scale": float(scale)}
        y = multi_head_attention(
            rows(q), rows(k), rows(v), None, None, mask, num_heads=heads, unidirectional=int(is_causal), **given
        )
        return op.Transpose(op.Reshape(y, op.Constant(value_ints=[0, 0, heads, -1])), perm=[0, 2, 1, 3])

    aten = torch.ops.aten
    ours = {aten.linear: linear, aten.group_norm: group_norm, aten.scaled_dot_product_attention: attention}
    return {operator.default: function for operator, function in ours.items()}


def simplify(model: IrModel, names: set[str]) -> None:
    """Folds constants and merges equal nodes. Weights are made graph inputs first, so that no pass folds them."""
    import onnxscript.optimizer
    from onnx_ir.passes import common

    graph = model.graph
    weights = {key: value for key, value in graph.initializers.items() if key in names}
    contents = [value.const_value for value in weights.values()]
    for key, value in weights.items():
        del graph.initializers[key]
        value.const_value = None
    graph.inputs.extend(weights.values())
    onnxscript.optimizer.optimize(model)
    share_shapes(graph)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    skip_transposes(graph)
    skip_reshapes(graph)
    common.RemoveUnusedNodesPass()(model)
    for (key, value), content in zip(weights.items(), contents, strict=True):
        graph.inputs.remove(value)
        value.const_value = content
        if value.uses():
            graph.initializers[key] = value


def share_shapes(graph: IrGraph) -> None:
    """Sizes that torch knows to be equal are read off one tensor, so that what is computed from them is shared too."""
    first: dict[tuple[str, ...], Value] = {}
    for node in graph:
        if node.op_type != "Shape" or node.inputs[0] is None or node.inputs[0].shape is None:
            continue
        start, end = (node.attributes.get_int(key, default) for key, default in (("start", 0), ("end", None)))
        dims = tuple(str(d) for d in node.inputs[0].shape[start:end])
        if "None" not in dims:
            node.outputs[0].replace_all_uses_with(first.setdefault(dims, node.outputs[0]))


def skip_reshapes(graph: IrGraph) -> None:
    """A reshape of a reshape starts from the original, unless it copies a size (0) of what it is given."""
    for node in graph:
        source = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
        shape = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if source is not None and source.op_type == "Reshape" and (shape is None or 0 not in shape.numpy()):
            node.replace_input_with(0, source.inputs[0])


STORED = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "I8": "INT8"}  # onnx's names of safetensors' types


def link(graph: IrGraph, weights: Mapping[str, Value], path: Path, whole: bool = False) -> None:
    """Points every weight at its bytes in the safetensors file `path`, of the type that they have there; those of int8 are
    multiplied out, or with `whole` used in products of whole numbers."""
    tensors, late = header(path).tensors, of_time_alone(graph)
    for name, value in weights.items():
        external(value, path, tensors[name])
        if tensors[name].dtype == "I8":
            dequantise(graph, value, scale_of(graph, name, path, tensors[f"{name}.scale"]), whole, late)


def external(value: Value, path: Path, stored: Stored) -> None:
    import onnx_ir as ir

    dtype, shape = ir.DataType[STORED[stored.dtype]], ir.Shape(stored.shape)
    place = (path.name, stored.start, stored.end - stored.start)
    value.const_value = ir.ExternalTensor(*place, dtype, shape=shape, name=value.name or "", base_dir=path.parent)
    value.type = ir.TensorType(dtype)


def scale_of(graph: IrGraph, name: str, path: Path, stored: Stored) -> Value:
    """The scales of an int8 weight as a further one."""
    import onnx_ir as ir

    scale = ir.Value(name=f"{name}.scale", shape=ir.Shape(stored.shape))
    external(scale, path, stored)
    graph.initializers[f"{name}.scale"] = scale
    return scale


def name_axes(value: Value, axes: tuple[str, ...]) -> None:
    """Names the dynamic axes of an input or output."""
    import onnx_ir as ir

    assert value.shape is not None and len(value.shape) == len(axes)
    value.shape = ir.Shape([axis or size for axis, size in zip(axes, value.shape, strict=True)])


def strip(model: IrModel) -> None:
    """Removes names of nodes and source lines, and numbers the inner values.

    Inner shapes stay: onnxruntime opens the graph in half the time when it need not work them out.
    """
    graph = model.graph
    kept = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    for part in (model, graph, *kept, *graph):
        part.metadata_props.clear()
        part.doc_string = None
    for i, value in enumerate(value for node in graph for value in node.outputs if value not in kept):
        value.name = f"v.{i}"
        value.metadata_props.clear()
    for node in graph:
        node.name = None
