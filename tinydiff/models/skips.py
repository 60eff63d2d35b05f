"""What the way up takes of the way down: how it merges a skip, and what brings scales together first.

A merge is a module of (channels that come, the skip's), whose `forward(x (B, C, h, w), skip (B, S, h, w), read)` gives what the
next residual block reads, of as many channels as `networks.unet.SKIPS` says; `read`: what earlier blocks of the level were given.
A context is a module of (plan, norm), whose `forward(x, skips)` gives both again, x being what the middle gives; what it adds
begins as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.layers import Normaliser, zero
from tinydiff.networks.unet import Level

Skips = list[Tensor]
RATES = (2, 4, 8)  # of dilation; the paper's 6, 12 and 18 are wider than latents at the lowest resolution


class Concat(nn.Identity):
    """[x; skip] (Ronneberger et al. 2015, figure 1)."""

    def forward(self, x: Tensor, skip: Tensor, read: Skips) -> Tensor:  # type: ignore[override]
        return torch.cat([x, skip], 1)


class Dense(nn.Identity):
    """[x; skip; all that earlier blocks of the level read] (Huang et al. 2017, equation 2)."""

    def forward(self, x: Tensor, skip: Tensor, read: Skips) -> Tensor:  # type: ignore[override]
        return torch.cat([x, skip, *read], 1)


class Added(nn.Module):
    """x + skip; a 1x1 convolution gives the skip x's channels where it has others (He et al. 2016a, equation 2)."""

    def __init__(self, channels: int, skip: int):
        super().__init__()
        self.project = nn.Identity() if channels == skip else nn.Conv2d(skip, channels, 1)

    def forward(self, x: Tensor, skip: Tensor, read: Skips) -> Tensor:
        return x + self.project(skip)


class Gated(Added):
    """g x + (1 - g) skip, g = sigmoid(1x1 convolution of both) (Srivastava et al. 2015, equation 3)."""

    def __init__(self, channels: int, skip: int):
        super().__init__(channels, skip)
        self.gate = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor, read: Skips) -> Tensor:
        skip = self.project(skip)
        g = torch.sigmoid(self.gate(torch.cat([x, skip], 1)))
        return g * x + (1 - g) * skip


class Untouched(nn.Identity):
    def forward(self, x: Tensor, skips: Skips) -> tuple[Tensor, Skips]:  # type: ignore[override]
        return x, skips


class Aspp(nn.Module):
    """x + 1x1 convolution of [1x1, 3x3 dilated thrice, mean over the image] of x (Chen et al. 2017, section 3.3)."""

    def __init__(self, levels: Sequence[Level], norm: Normaliser):
        super().__init__()
        channels = levels[-1].width
        inner = max(channels // 4, 1)
        self.norm = norm(channels)
        dilated = (nn.Conv2d(channels, inner, 3, padding=rate, dilation=rate) for rate in RATES)
        self.branches = nn.ModuleList([nn.Conv2d(channels, inner, 1), *dilated])
        self.pooled = nn.Conv2d(channels, inner, 1)
        self.project = zero(nn.Conv2d(inner * (len(RATES) + 2), channels, 1))

    def forward(self, x: Tensor, skips: Skips) -> tuple[Tensor, Skips]:
        h = F.silu(self.norm(x))
        whole = self.pooled(h.mean((2, 3), keepdim=True)).expand(-1, -1, *h.shape[2:])
        scales = torch.cat([*(branch(h) for branch in self.branches), whole], 1)
        return x + self.project(F.silu(scales)), skips


class Pyramid(nn.Module):
    """M_i = upsampled M_(i+1) + 1x1 convolution of level i's last skip, to which a 3x3 convolution of M_i is added; the coarsest
    M is a 1x1 convolution of x (feature pyramids, Lin et al. 2017, section 3)."""

    def __init__(self, levels: Sequence[Level], norm: Normaliser):
        super().__init__()
        widths, inner = [level.width for level in levels], levels[0].width
        ends = accumulate(
            len(level.down) + (not level.last) for level in levels
        )  # `conv_in` is the first, a halving the last
        self.places = [end - (not level.last) for end, level in zip(ends, levels, strict=True)]
        self.lateral = nn.ModuleList([nn.Conv2d(width, inner, 1) for width in (*widths, widths[-1])])
        self.smooth = nn.ModuleList([zero(nn.Conv2d(inner, width, 3, padding=1)) for width in widths])

    def forward(self, x: Tensor, skips: Skips) -> tuple[Tensor, Skips]:
        merged, skips = self.lateral[-1](x), list(skips)
        for i in reversed(range(len(self.places))):
            skip = skips[self.places[i]]
            finer = F.interpolate(merged, scale_factor=2.0, mode="nearest") if i < len(self.places) - 1 else merged
            merged = finer[..., : skip.shape[-2], : skip.shape[-1]] + self.lateral[i](skip)
            skips[self.places[i]] = skip + self.smooth[i](merged)
        return x, skips


MERGES: dict[str, type[nn.Module]] = {"concat": Concat, "add": Added, "gated": Gated, "dense": Dense}
CONTEXTS: dict[str, type[nn.Module]] = {"none": Untouched, "aspp": Aspp, "pyramid": Pyramid}
