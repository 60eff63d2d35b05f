"""Attention and the transformer block of Stable Diffusion, under diffusers' parameter names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.layers import Normaliser, zero
from tinydiff.networks.unet import UNet


class Attention(nn.Module):
    """Multi-head attention of x (B, T, D) to `context` (B, S, context_dim), or to x itself.

    `qk_norm`: each head's queries and keys have a root mean square of one, times a weight (Henry et al. 2020; Esser et al.
    2024, section 5.3.2), under the names of diffusers' Attention.
    """

    def __init__(
        self, dim: int, heads: int, context_dim: int | None = None, qkv_bias: bool = False, qk_norm: bool = False
    ):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, 1e-6) if qk_norm else None for _ in range(2))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, T, D/N)

    def forward(self, x: Tensor, context: Tensor | None = None, size: tuple[int, int] = (0, 0)) -> Tensor:
        """`size`: height and width of the map that x is, for attention that asks for it."""
        context = x if context is None else context
        qkv = self.parted(self.to_q(x), self.to_k(context), self.to_v(context))
        return self.to_out[0](self.attend(*qkv, x, size).transpose(1, 2).flatten(2))  # (B, T, D)

    def parted(self, *qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of each head, normalised: (B, T, D), (B, S, D) twice -> (B, N, T, D/N), (B, N, S, D/N) twice."""
        q, k, v = map(self.split, qkv)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = (norm(x.to(norm.weight.dtype)).to(v.dtype) for norm, x in ((self.norm_q, q), (self.norm_k, k)))
        return q, k, v

    def read(self, *qkv: Tensor) -> Tensor:
        """What each head reads: (B, T, D), (B, S, D) twice -> (B, N, T, D/N)."""
        return F.scaled_dot_product_attention(*self.parted(*qkv))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: tuple[int, int]) -> Tensor:
        """What each head gives (B, N, T, D/N); `x` is what queries were made of."""
        return F.scaled_dot_product_attention(q, k, v)


class FusedAttention(Attention):
    """Attention of x (B, T, D) to several sources (B, S_m, context_dim): sum_m w_m Attention(Q, K_m, V_m), whose weights w
    are the softmax of a learnt number a source. Queries are shared, as in Ye et al. 2023 (IP-Adapter, equation 5)."""

    def __init__(self, dim: int, heads: int, context_dim: int, sources: int, qk_norm: bool = False):
        super().__init__(dim, heads, context_dim, qk_norm=qk_norm)
        more = [[nn.Linear(context_dim, dim, bias=False) for _ in "kv"] for _ in range(sources - 1)]
        self.more_k, self.more_v = (nn.ModuleList(each) for each in zip(*more, strict=True))
        self.fusion = nn.Parameter(torch.zeros(sources))

    def forward(self, x: Tensor, context: list[Tensor]) -> Tensor:  # type: ignore[override]
        q, w = self.to_q(x), self.fusion.softmax(0)
        pairs = zip((self.to_k, *self.more_k), (self.to_v, *self.more_v), context, strict=True)
        first, *others = (w[m] * self.read(q, k(c), v(c)) for m, (k, v, c) in enumerate(pairs))
        y = sum(others, first)
        return self.to_out[0](y.transpose(1, 2).flatten(2))  # (B, T, D)


class GEGLU(nn.Module):
    """Linear layer gated by GELU of another: (B, T, D) -> (B, T, out) (Shazeer 2020)."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.proj = nn.Linear(dim, out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class GELU(nn.Module):
    """Linear layer, then the tanh form of GELU: (B, T, D) -> (B, T, out) (Hendrycks & Gimpel 2016)."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.proj = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


ACTIVATIONS = {"geglu": GEGLU, "gelu-approximate": GELU}


class FeedForward(nn.Module):
    """An activation and back: (B, T, D) -> (B, T, D), four times as wide inside."""

    def __init__(self, dim: int, activation: str = "geglu"):
        super().__init__()
        self.net = nn.ModuleList([ACTIVATIONS[activation](dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, or to several `sources`, perceptron; each pre-normalised and residual."""

    def __init__(self, dim: int, heads: int, context_dim: int, config: UNet, attention: nn.Module):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = attention
        self.norm2 = nn.LayerNorm(dim)
        fused = FusedAttention(dim, heads, context_dim, config.sources, config.qk_norm) if config.sources > 1 else None
        self.attn2 = fused or Attention(dim, heads, context_dim, qk_norm=config.qk_norm)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.attn1(self.norm1(x), size=size)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map: (B, C, h, w) -> (B, C, h, w).

    `make` makes a block's self-attention, of (channels, heads).
    """

    def __init__(
        self, channels: int, heads: int, depth: int, context_dim: int, norm: Normaliser, config: UNet, make: Callable
    ):
        super().__init__()
        self.linear = linear = config.use_linear_projection
        self.norm = norm(channels)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        own = (make(channels, heads) for _ in range(depth))
        blocks = [BasicTransformerBlock(channels, heads, context_dim, config, each) for each in own]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = zero(nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        size, y = x.shape[2:], self.norm(x)
        y = tokens(y) if self.linear else tokens(self.proj_in(y))  # (B, h w, C)
        y = self.proj_in(y) if self.linear else y
        for block in self.transformer_blocks:
            y = block(y, context, size)
        y = pixels(self.proj_out(y), size) if self.linear else self.proj_out(pixels(y, size))
        return x + y


def tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C)."""
    return x.flatten(2).transpose(1, 2)


def pixels(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, h w, C) -> (B, C, h, w)."""
    return x.transpose(1, 2).unflatten(2, tuple(size))
