"""Residual blocks, and how they weigh their channels: a table each.

A block is made of (channels, out, `Parts`), and its `forward(x (B, C, h, w), time (B, 4 C0) or None)` gives (B, out, h, w).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.layers import Normaliser
from tinydiff.models.modulation import MODULATIONS, Modulation


class Squeeze(nn.Module):
    """x times sigmoid(W2 relu(W1 mean of x over pixels)) (squeeze and excitation, Hu et al. 2018, equations 2 to 4)."""

    def __init__(self, channels: int):
        super().__init__()
        self.down = nn.Conv2d(channels, max(channels // 16, 8), 1)  # the paper's reduction
        self.up = nn.Conv2d(self.down.out_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class SpatialChannel(Squeeze):
    """x times sigmoid(7x7 convolution of its channels' mean and largest), then `Squeeze` (Woo et al. 2018, equation 3)."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.place = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return super().forward(x * torch.sigmoid(self.place(seen)))


CHANNELS: dict[str, type[nn.Module]] = {"none": nn.Identity, "squeeze": Squeeze, "spatial_channel": SpatialChannel}


class Parts(NamedTuple):
    """What residual blocks are made of. `time`: the width of what they are told, if they are."""

    norm: Normaliser
    time: int = 0
    modulation: Modulation = MODULATIONS["add"]
    weigh: type[nn.Module] = nn.Identity
    level: int = 0


class ResnetBlock2D(nn.Module):
    """x + convolution(silu(norm(...))) of that of x, told the time between (pre-activation, He et al. 2016b, figure 4e)."""

    narrower = 1  # how many times fewer channels there are inside
    spread = 1  # how many times as far apart the pixels of a convolution are at each level as at the one before

    def __init__(self, channels: int, out: int, parts: Parts):
        super().__init__()
        kind, inner = parts.modulation, out // self.narrower
        inside = parts._replace(norm=partial(parts.norm, share=self.narrower))
        self.modulate = kind.call
        self.norm1 = parts.norm(channels)
        self.conv1 = self.first(channels, inner, inside)
        self.time_emb_proj = nn.Linear(parts.time, kind.numbers(inner)) if parts.time else None
        self.norm2 = kind.norm(inside.norm, inner)
        self.conv2 = self.second(inner + kind.more(inner), out, inside)
        self.weigh = parts.weigh(out)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def first(self, channels: int, out: int, parts: Parts) -> nn.Module:
        rate = self.spread**parts.level
        return nn.Conv2d(channels, out, 3, padding=rate, dilation=rate)

    def second(self, channels: int, out: int, parts: Parts) -> nn.Module:
        return self.first(channels, out, parts)

    def last(self) -> nn.Module:
        """The layer that makes the branch nothing where its parameters are zero."""
        return [self.conv2, *self.conv2.children()][-1]

    def told(self, h: Tensor, time: Tensor | None, norm: nn.Module) -> Tensor:
        if self.time_emb_proj is None or time is None:
            return norm(h)
        return self.modulate(norm, h, self.time_emb_proj(F.silu(time))[:, :, None, None])

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.told(h, time, self.norm2)))
        return self.weigh(h) + self.conv_shortcut(x)


class PostActivation(ResnetBlock2D):
    """silu(x + norm(convolution(silu(norm(convolution(x)))))), as it was first (He et al. 2016a, figure 2)."""

    def __init__(self, channels: int, out: int, parts: Parts):
        super().__init__(channels, out, parts)
        self.norm1, self.norm2 = self.norm2, parts.norm(out)

    def last(self) -> nn.Module:
        return self.norm2

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv2(F.silu(self.told(self.conv1(x), time, self.norm1)))
        return F.silu(self.weigh(self.norm2(h)) + self.conv_shortcut(x))


class Bottleneck(ResnetBlock2D):
    """1x1, 3x3 and 1x1 convolutions, the one between at a quarter of the channels (He et al. 2016a, figure 5)."""

    narrower = 4

    def first(self, channels: int, out: int, parts: Parts) -> nn.Module:
        return nn.Conv2d(channels, out, 1)

    def second(self, channels: int, out: int, parts: Parts) -> nn.Module:
        inner = out // self.narrower
        layers = nn.Conv2d(channels, inner, 3, padding=1), parts.norm(inner), nn.SiLU(), nn.Conv2d(inner, out, 1)
        return nn.Sequential(*layers)


class Separable(ResnetBlock2D):
    """3x3 convolutions of each channel alone, and 1x1 convolutions of all (Howard et al. 2017, section 3.1)."""

    def first(self, channels: int, out: int, parts: Parts) -> nn.Module:
        each = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        return nn.Sequential(each, nn.Conv2d(channels, out, 1))


class Dilated(ResnetBlock2D):
    """3x3 convolutions of every pixel, of every second, of every fourth, by level (Yu & Koltun 2016, section 3)."""

    spread = 2


RESNETS = {"pre": ResnetBlock2D, "post": PostActivation, "bottleneck": Bottleneck}
RESNETS |= {"separable": Separable, "dilated": Dilated}
