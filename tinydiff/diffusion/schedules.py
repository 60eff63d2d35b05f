"""Noise levels: which signal and noise amplitudes a model was trained on, and which of them a sampler visits.

A level is `x = alpha * x0 + sigma * eps`. A schedule is the list of a model's training levels, cleanest first; a spacing
picks indices of that list for a number of steps. Everything here is Python floats: no array library, no network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Level(NamedTuple):
    """Signal amplitude, noise amplitude, and the time the network is told (0 to the number of training levels)."""

    alpha: float
    sigma: float
    t: float


CLEAN = Level(1.0, 0.0, 0.0)


def from_betas(betas: Sequence[float]) -> list[Level]:
    """Variance-preserving levels from per-step noise rates: alpha² = prod(1 - beta) (Ho et al. 2020, equation 4)."""
    levels, alpha_bar = [], 1.0
    for t, beta in enumerate(betas):
        alpha_bar *= 1.0 - beta
        levels.append(Level(math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar), float(t)))
    return levels


def _line(start: float, end: float, count: int) -> list[float]:
    return [start + (end - start) * i / max(1, count - 1) for i in range(count)]


def linear(count: int = 1000, start: float = 1e-4, end: float = 0.02) -> list[Level]:
    """Betas on a line (Ho et al. 2020)."""
    return from_betas(_line(start, end, count))


def scaled_linear(count: int = 1000, start: float = 0.00085, end: float = 0.012) -> list[Level]:
    """Square roots of betas on a line: Stable Diffusion 1.x and 2.x."""
    return from_betas([b * b for b in _line(math.sqrt(start), math.sqrt(end), count)])


def cosine(count: int = 1000, s: float = 0.008) -> list[Level]:
    """alpha² = cos²((t/T + s)/(1 + s)·π/2), betas capped at 0.999 (Nichol & Dhariwal 2021, equation 17)."""

    def f(u: float) -> float:
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    return from_betas([min(1 - f((t + 1) / count) / f(t / count), 0.999) for t in range(count)])


def flow(count: int = 1000) -> list[Level]:
    """Rectified flow: x = (1 - s) x0 + s eps with s = (t + 1)/T (Liu et al. 2022, equation 1)."""
    return [Level(1 - (t + 1) / count, (t + 1) / count, float(t)) for t in range(count)]


SCHEDULES: dict[str, Callable[[int], list[Level]]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "flow": flow,
}


def leading(count: int, steps: int) -> list[int]:
    """Multiples of count // steps plus one, noisiest first (the choice of Stable Diffusion 1.x)."""
    return [min(i * (count // steps) + 1, count - 1) for i in reversed(range(steps))]


def trailing(count: int, steps: int) -> list[int]:
    """Evenly spaced and ending on the noisiest level (Lin et al. 2023, table 2)."""
    return [round(count - i * count / steps) - 1 for i in range(steps)]


def linspace(count: int, steps: int) -> list[int]:
    """Evenly spaced over both ends."""
    return [round(u) for u in _line(count - 1, 0, steps)]


SPACINGS: dict[str, Callable[[int, int], list[int]]] = {"trailing": trailing, "leading": leading, "linspace": linspace}


def sampling_levels(schedule: Sequence[Level], steps: int, spacing: str = "trailing") -> list[Level]:
    """`steps` levels of a schedule, noisiest first, then the clean level: steps + 1 in all."""
    return [schedule[i] for i in SPACINGS[spacing](len(schedule), steps)] + [CLEAN]
