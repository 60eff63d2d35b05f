"""Building blocks of the convolutional networks.

Parameter names are those of diffusers. Shape legend for all of `models/`:
B batch, C channels, H W image height and width, h w latent height and width, T tokens, D width, N heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(t: Tensor, width: int, shift: int = 0) -> Tensor:
    """Sinusoids of time, cosines first: (B,) -> (B, width) float32 (Vaswani et al. 2017, section 3.5)."""
    half = width // 2  # with `shift` 1 the slowest rate is 1/10000, not the step above it
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * -math.log(10000) / (half - shift))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron after the sinusoids: (B, width) -> (B, out). `told`: the width of what is added to them, if any."""

    def __init__(self, width: int, out: int, told: int = 0):
        super().__init__()
        self.cond_proj = nn.Linear(told, width, bias=False) if told else None
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        x = x if self.cond_proj is None or told is None else x + self.cond_proj(told.to(x.dtype))
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock2D(nn.Module):
    """Pre-activation residual block, time added between its convolutions: (B, C, h, w) -> (B, out, h, w)."""

    def __init__(self, channels: int, out: int, time: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, out) if time else None
        self.norm2 = nn.GroupNorm(groups, out, eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nn.Module):
    """Halves height and width. `padding` 1 is the U-Net's; 0 is the autoencoder's, which pads right and below only."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Doubles height and width by nearest neighbour, then convolves; to the size of `like`, one less where halving rounded."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x if like is None else x[..., : like.shape[-2], : like.shape[-1]])


def embedding(count: int, width: int) -> nn.Embedding:
    """A table of vectors from N(0, 1); where weights are to come (the meta device) it is not filled, which takes a second."""
    weight = torch.empty(count, width)
    return nn.Embedding(count, width, _weight=weight if weight.is_meta else nn.init.normal_(weight))


def zero(module: nn.Module) -> nn.Module:
    """All parameters zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
