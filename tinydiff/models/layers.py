"""Building blocks of the convolutional networks.

Parameter names are those of diffusers. Shape legend for all of `models/`:
B batch, C channels, H W image height and width, h w latent height and width, T tokens, D width, N heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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


class BatchNorm2d(nn.BatchNorm2d):
    """Statistics of a batch, in training, and their running averages otherwise (Ioffe & Szegedy 2015, algorithm 2).

    What is computed again for a backward pass (gradient checkpointing) is no new batch, so it is not averaged.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and torch._C._current_graph_task_id() != -1:
            assert self.running_mean is not None and self.running_var is not None
            aside = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(input, *aside, self.weight, self.bias, True, self.momentum or 0.0, self.eps)
        return super().forward(input)


class RMSNorm2d(nn.RMSNorm):
    """x / sqrt(mean of x^2 over channels) times a weight, at each pixel (Zhang & Sennrich 2019, equation 4)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


Normaliser = Callable[..., nn.Module]  # of so many channels
NORMS: dict[str, Callable[..., nn.Module]] = {  # (groups, eps, channels); `share`: how many times fewer groups
    "group": lambda groups, eps, channels, share=1: nn.GroupNorm(
        math.gcd(max(groups // share, 1), channels), channels, eps
    ),
    "layer": lambda _, eps, channels, share=1: nn.GroupNorm(
        1, channels, eps
    ),  # of all values of an image (Wu & He 2018, 3.1)
    "batch": lambda _, eps, channels, share=1: BatchNorm2d(channels, eps),
    "rms": lambda _, eps, channels, share=1: RMSNorm2d(channels, eps),
}


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
