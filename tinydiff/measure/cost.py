"""What one call of a network costs: any module, any method, measured on the meta device, where nothing is computed.

It names no network. Attention counts as a fused kernel does it, without a matrix of scores in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
FUSED = aten._scaled_dot_product_flash_attention_for_cpu  # takes any sizes, on meta tensors too
LARGEST = 2**20  # pixels of the image that rows are followed through; few stacks of convolutions need as many
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """The cost of one call."""

    parameters: int  # that the call uses, shared ones once
    flops: int  # of matrix products and convolutions; a multiply-add is two
    activations: int  # bytes that the backward pass needs
    reach: float | None  # rows of the input image; math.inf where attention sees all, None where it is not known


def cost(network: nn.Module, method: str, inputs: Inputs, step: int = 0) -> Cost:
    """The cost of `network.method(**inputs)`, network and inputs on the meta device; bytes are those of their types.

    `step`: of which the sides of an image have to be multiples, for a receptive field that is found sooner.
    """
    call, seen = getattr(network, method), None
    flops = {FUSED: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FusedAttention() as mode, FlopCounterMode(display=False, custom_mapping=flops) as counter:
        kept = activations(network, lambda: call(**inputs))
    with suppress(NotImplementedError):
        seen = reach(call, inputs, step)
    return Cost(sum(p.numel() for p in mode.parameters), counter.get_total_flops(), kept, seen)


class FusedAttention(TorchFunctionMode):
    """Attention as one operation, as where networks run; on the meta device torch would write out the scores.

    `parameters`: those that any operation was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameters = set[nn.Parameter]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.untyped_storage:  # by which `activations` tells parameters from what is kept
            self.parameters |= {x for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter)}
        fused = func is F.scaled_dot_product_attention
        return (attention if fused else func)(*args, **kwargs or {})


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p=0.0, is_causal=False, scale=None
) -> Tensor:
    """torch's attention. Where the mask is trained, no kernel is fused."""
    if attn_mask is not None and attn_mask.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    return FUSED(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def activations(network: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of `call` for its backward pass. Inputs are counted, parameters and buffers are not.

    What is kept twice counts once, and a view counts as its whole storage. A frozen parameter has nothing kept for it.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage  # held, so that its address is not used again
        return x

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda x: x):
        call()
    own = {x.untyped_storage()._cdata for x in chain(network.parameters(), network.buffers())}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def reach(call: Callable[..., Any], inputs: Inputs, step: int = 0) -> float | None:
    """The receptive field: rows of the first 4-D input from the first to the last that one output depends on; others grow with
    it.

    The most over all outputs away from the border; rows suffice, as kernels are square. Paths through the statistics of
    norms are not counted. Attention to keys that depend on the input is taken to see all of it: math.inf. None without
    a 4-D input, 0 where no output depends on it. Raises NotImplementedError for an operation that is not known.
    """
    name = next((name for name, x in inputs.items() if x.dim() == 4), None)
    if name is None:
        return None
    sides = inputs[name].shape[2:]
    rows, columns = (step, step) if step else sides
    seen = rows
    while not math.isinf(seen) and 2 * seen > rows:  # until an output of every phase of strides is clear of the border
        rows *= 2
        if rows * columns > LARGEST:
            raise NotImplementedError(f"the reach of an output is more than {seen:g} rows of the image")
        images = {k: x for k, x in inputs.items() if x.dim() == 4}
        places = {k: (rows * x.shape[2] // sides[0], columns * x.shape[3] // sides[1]) for k, x in images.items()}
        grown = {k: x.new_empty(*x.shape[:2], *places[k]) for k, x in images.items()}
        seen = rows_seen(call, {**inputs, **grown}, grown[name])
    return seen


def rows_seen(call: Callable[..., Any], inputs: Inputs, image: Tensor) -> float:
    """The most rows of `image` that one output depends on, at the border or not."""
    rows = torch.arange(image.shape[2], dtype=torch.float32, device="cpu")[:, None].expand(image.shape)
    with torch.inference_mode(), FusedAttention(), Hulls() as hulls:
        hulls.known[image] = -rows, rows
        pairs = [hulls.known[x] for x in tree_leaves(call(**inputs)) if x in hulls.known]
    return max([0.0, *((first + last + 1).max().item() for first, last in pairs)])


class Hulls(TorchDispatchMode):
    """Follows the first and the last row of the image on which each element of each tensor depends.

    Both lie in tensors of that tensor's shape, the first row negated, so that a union is a maximum and "none" is -inf. The
    first and last of a union follow from those of its parts, so they are exact through any number of operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakTensorKeyDictionary()  # tensor: (-first, last)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(x, Tensor) and x in self.known for x in tree_leaves((args, kwargs))):
            first, last = (tree_leaves(rule(func)(*self.rows(args, i), **self.rows(kwargs, i))) for i in (0, 1))
            for x, *pair in zip(tree_leaves(result), first, last, strict=True):
                assert all(rows.shape == x.shape for rows in pair), f"{func}: its rule gives another shape"
                self.known[x] = pair
        return result

    def rows(self, arguments: Any, i: int) -> Any:
        """`arguments`, nested or not, with the rows of each tensor instead of it."""
        none = torch.tensor(-math.inf, device="cpu")
        return tree_map_only(Tensor, lambda x: self.known[x][i] if x in self.known else none.expand(x.shape), arguments)


def rule(func: Any) -> Callable[..., Any]:
    """How rows pass an operation. Raises NotImplementedError where that is not known."""
    known, moves = RULES.get(func.overloadpacket), func.is_view and func is not aten.as_strided.default
    if func._schema.is_mutable or not (known or moves or torch.Tag.pointwise in func.tags):
        raise NotImplementedError(f"{func}: the reach of this operation is not known")
    return known or (func if moves else union)


def lean(x: Tensor) -> Tensor:
    """`x` before it was expanded: most channels have the same rows."""
    for dim in (dim for dim, stride in enumerate(x.stride()) if stride == 0):
        x = x.narrow(dim, 0, min(1, x.shape[dim]))
    return x


def union(*args: Any, **kwargs: Any) -> Tensor:
    """The rows of all operands, broadcast."""
    operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return reduce(torch.maximum, map(lean, operands)).expand(torch.broadcast_shapes(*(x.shape for x in operands)))


def pad(x: Tensor, sizes: list[int], mode: str = "constant", value: Any = None) -> Tensor:
    return F.pad(x, sizes, mode, -math.inf if mode == "constant" else None)


def conv2d(x: Tensor, weight: Tensor, bias: Any = None, stride=1, padding=(0,), dilation=1, groups=1) -> Tensor:
    """Each output channel sees all input channels of its group, through the window of the kernel."""
    (down, across), (out, _, *kernel) = (*padding, *padding)[:2], weight.shape
    x = lean(x.unflatten(1, (groups, -1))).amax(2).expand(x.shape[0], groups, *x.shape[2:])  # (B, G, H, W)
    x = F.max_pool2d(F.pad(x, (across, across, down, down), value=-math.inf), kernel, stride, 0, dilation)
    return x[:, :, None].expand(-1, -1, out // groups, -1, -1).flatten(1, 2)  # (B, C, h, w)


def linear(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    return lean(x).amax(-1, keepdim=True).expand(*x.shape[:-1], weight.shape[0])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """(..., N, K) and (..., K, M) to (..., N, M). Raises NotImplementedError where both depend on the image."""
    if min(lean(x).max().item() for x in (a, b)) > -math.inf:
        raise NotImplementedError("the reach of a matrix product is known only where one of the two is fixed")
    return torch.maximum(a.amax(-1, keepdim=True), b.amax(-2, keepdim=True))


def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """The output and the logarithm of the sum of scores: a query's own rows where keys and values are fixed, or all."""
    fixed = max(lean(x).max().item() for x in (k, v)) == -math.inf
    seen = q.amax(-1) if fixed else torch.tensor(math.inf, device="cpu").expand(q.shape[:-1])  # (B, N, T)
    return seen[..., None].expand(*seen.shape, v.shape[-1]), seen


def reduced(x: Tensor, dims: list[int], keepdim: bool = False, **_: Any) -> Tensor:
    """The rows of what is reduced: all where an image's pixels are."""
    seen = lean(x).amax(dims, keepdim)
    whole = seen.max().item() > -math.inf and any(dim % x.dim() >= 2 for dim in dims)
    return (torch.full_like(seen, math.inf) if whole else seen).expand(x.amax(dims, keepdim).shape)


RULES: dict[Any, Callable[..., Any]] = {aten.conv2d: conv2d, aten.linear: linear, aten.matmul: matmul, FUSED: attend}
RULES |= {aten.pad: pad, aten.cat: aten.cat, aten.upsample_nearest2d: aten.upsample_nearest2d}
RULES |= {aten.pixel_shuffle: aten.pixel_shuffle, aten.pixel_unshuffle: aten.pixel_unshuffle}
RULES |= {aten.mean: reduced, aten.amax: reduced}
SAME = (aten.group_norm, aten.batch_norm, aten.layer_norm, aten.rms_norm, aten.dropout, aten.to, aten.contiguous)
RULES |= dict.fromkeys(SAME, lambda x, *_, **__: x)
