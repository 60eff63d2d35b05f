"""The encoder half of T5 (Raffel et al. 2020; v1.1: Shazeer 2020), under transformers' parameter names, at any size.

`forward(input_ids (B, T) int64) -> (last_hidden_state (B, T, D), pooled (B, D))`, at any T: positions are relative.
Every token attends to all tokens but padding. Knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.layers import embedding
from tinydiff.networks.network import Table, pick
from tinydiff.networks.text import T5Config


class PositionBias(nn.Embedding):
    """What each head adds to the score of query i and key j: T -> (1, N, T, T)."""

    buckets: Tensor

    def __init__(self, config: T5Config):
        count = config.relative_attention_num_buckets
        super().__init__(count, config.num_heads, _weight=embedding(count, config.num_heads).weight)
        self.reach = config.relative_attention_max_distance
        self.register_buffer("buckets", relative_buckets(self.num_embeddings, self.reach), persistent=False)

    def forward(self, length: int) -> Tensor:  # type: ignore[override]
        place = torch.arange(length, device=self.weight.device)
        offset = (place - place[:, None]).clamp(-self.reach, self.reach)
        return super().forward(self.buckets[offset + self.reach]).permute(2, 0, 1)[None]


class SelfAttention(nn.Module):
    """Multi-head attention (B, T, D) -> (B, T, D) with `bias` (B, N, T, T) on its scores, which are not scaled."""

    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if first:  # its bias is that of every block
            self.relative_attention_bias = PositionBias(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, N, T, d_kv)
        return self.o(y.transpose(1, 2).flatten(2))


class ReluDense(nn.Module):
    """T5's perceptron: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.relu(self.wi(x)))


class GatedGeluDense(nn.Module):
    """T5 v1.1's perceptron, its GELU the tanh approximation: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


FEED_FORWARDS = {"relu": ReluDense, "gated-gelu": GatedGeluDense}


class Residual(nn.ModuleDict):
    """A module after a norm, its output added to its input; `name` is what transformers calls the module."""

    def __init__(self, config: T5Config, name: str, module: nn.Module):
        super().__init__({name: module, "layer_norm": nn.RMSNorm(config.d_model, config.layer_norm_epsilon)})
        self.name = name

    def forward(self, x: Tensor, *bias: Tensor) -> Tensor:
        return x + self[self.name](self["layer_norm"](x), *bias)


class Block(nn.Module):
    """Attention and perceptron: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        attention, dense = SelfAttention(config, first), FEED_FORWARDS[config.feed_forward_proj](config)
        parts = {"SelfAttention": attention, "DenseReluDense": dense}
        self.layer = nn.ModuleList([Residual(config, name, part) for name, part in parts.items()])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, dense = self.layer
        return dense(attention(x, bias))


class Encoder(nn.Module):
    """The stack of blocks: x (B, T, D) and which keys count (B, T) -> (B, T, D)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList([Block(config, i == 0) for i in range(config.num_layers)])
        self.final_layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        positions = self.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias")(x.shape[1])
        bias = torch.where(keys[:, None, None], positions, torch.finfo(x.dtype).min)  # (B, N, T, T)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """Tokens to vectors; `pooled` is the mean of all but padding."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)
        self.pad = config.pad_token_id

    @classmethod
    def of(cls, table: Table, tensors: Mapping[str, Tensor] | None = None) -> T5Encoder:
        """The network of a `config.json`."""
        return cls(pick(T5Config, table))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        keys = input_ids != self.pad
        x, share = self.encoder(self.shared(input_ids), keys), keys[..., None].float()
        return x, (x * share).sum(1) / share.sum(1).clamp(min=1)


def relative_buckets(count: int, reach: int) -> Tensor:
    """The bucket of every offset (key less query) from -reach to reach: (2 reach + 1,) int64. Raises ValueError.

    Half of the `count` buckets are for keys after the query. Of each half, half are for one distance each and the rest
    for ranges that widen up to `reach` (Raffel et al. 2020, section 2.1). A table rather than a formula in `forward`:
    between two buckets the last bit of a logarithm decides, and each runtime has its own.
    """
    half, exact = count // 2, count // 4
    if not 0 < exact < reach:
        raise ValueError(f"{count} relative_attention_num_buckets do not suit a distance of {reach}")
    offset = torch.arange(-reach, reach + 1, device="cpu")  # a table to keep, even where weights are to come
    distance = offset.abs()
    growth = torch.log(distance.clamp(min=1) / exact) / math.log(reach / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)
