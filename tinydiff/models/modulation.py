"""How the noise level becomes a vector, and how residual blocks are told it: a table each.

A modulation is a function (norm, h (B, C, h, w), t (B, N, 1, 1)) -> normalised h, `t` being what `time_emb_proj` makes of time.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinydiff.models.attention import Attention, pixels, tokens
from tinydiff.models.layers import Normaliser, TimestepEmbedding, timestep_embedding

LEVELS = 1000  # of training: networks are told times from 0 to 999
TOKENS = 4  # into which time is made for attention


class Sinusoidal(TimestepEmbedding):
    """MLP(PE(t)), as in Stable Diffusion: times (B,) -> (B, 4 width), in the type of `like`."""

    wider = 1  # how many times `width` the sinusoids are

    def __init__(self, width: int, told: int = 0):
        super().__init__(width * self.wider, width * 4, told)

    def row(self, t: Tensor) -> Tensor:
        return timestep_embedding(t, self.linear_1.in_features)

    def forward(self, t: Tensor, like: Tensor, told: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(self.row(t).to(like.dtype), told)


class Learned(Sinusoidal):
    """MLP(E(t)): E is a table with a row a training level, between which it interpolates (Gehring et al. 2017, section 3.1).

    It begins as the sinusoids of its levels.
    """

    def __init__(self, width: int, told: int = 0):
        super().__init__(width, told)
        self.table = nn.Embedding(LEVELS, width, _weight=timestep_embedding(torch.arange(LEVELS), width))

    def row(self, t: Tensor) -> Tensor:
        t = t.float().clamp(0, LEVELS - 1)
        below, rows = t.floor(), self.table.weight.float()
        share, row = (t - below)[:, None], below.long()
        return rows[row] * (1 - share) + rows[(row + 1) % LEVELS] * share


class Hybrid(Sinusoidal):
    """PE(t) + MLP(PE(t)), the sinusoids being as wide as the result."""

    wider = 4

    def forward(self, t: Tensor, like: Tensor, told: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.row(t).to(like.dtype) + super().forward(t, like, told)


def add(norm: nn.Module, h: Tensor, t: Tensor) -> Tensor:
    """A number a channel (Ho et al. 2020, appendix B)."""
    return norm(h + t)


def concat(norm: nn.Module, h: Tensor, t: Tensor) -> Tensor:
    """Channels more, each one number everywhere (Mirza & Osindero 2014, section 3.2)."""
    return torch.cat([norm(h), t.expand(-1, -1, *h.shape[2:])], 1)


def film(norm: nn.Module, h: Tensor, t: Tensor) -> Tensor:
    """(1 + gamma) norm(h) + beta, diffusers' scale_shift (Perez et al. 2018, equation 2; Dhariwal & Nichol 2021, equation 3).

    With each channel's own mean and deviation for a norm it is AdaIN (Huang & Belongie 2017, equation 8).
    """
    gamma, beta = t.chunk(2, 1)
    return norm(h) * (1 + gamma) + beta


def attend(norm: nn.Module, h: Tensor, t: Tensor) -> Tensor:
    return norm(h, t)


class Attended(nn.Module):
    """y + attention of y = norm(h) to tokens of time (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, norm: Normaliser, channels: int):
        super().__init__()
        self.norm = norm(channels)
        heads = gcd(channels, max(channels // 64, 1))
        self.attention = Attention(channels, heads, max(channels // TOKENS, 1))

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        y, told = self.norm(h), t.flatten(1).unflatten(1, (TOKENS, -1))  # (B, 4, C/4)
        return y + pixels(self.attention(tokens(y), told), y.shape[2:])


class Modulation(NamedTuple):
    """`numbers` that time is made into for so many channels, `more` channels in what it gives, and `norm` as it is called."""

    call: Callable[[nn.Module, Tensor, Tensor], Tensor]
    numbers: Callable[[int], int]
    more: Callable[[int], int] = lambda channels: 0
    norm: Callable[[Normaliser, int], nn.Module] = lambda norm, channels: norm(channels)


TIMES = {"sinusoidal": Sinusoidal, "learned": Learned, "hybrid": Hybrid}
MODULATIONS = {
    "add": Modulation(add, lambda c: c),
    "concat": Modulation(concat, lambda c: max(c // 4, 1), more=lambda c: max(c // 4, 1)),
    "film": Modulation(film, lambda c: 2 * c),
    "adain": Modulation(film, lambda c: 2 * c, norm=lambda _, c: nn.GroupNorm(c, c, affine=False)),
    "attention": Modulation(attend, lambda c: TOKENS * max(c // TOKENS, 1), norm=Attended),
}
