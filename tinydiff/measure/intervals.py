"""How sure a figure is: intervals of 95 %."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinydiff.diffusion.noise import keyed

NORMAL_95 = 1.959963984540054
RESAMPLES = 50

Interval = dict[str, float]


def wilson(right: int, count: int, z: float = NORMAL_95) -> tuple[float, float]:
    """The score interval of a share, 95 % by default (Wilson 1927): (low, high)."""
    p, spread = right / count, z**2 / count
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half) if right else 0.0, min(1.0, middle + half) if right < count else 1.0


def shares(right: dict[str, int], count: int) -> dict[str, Any]:
    """Each number of successes as a share of `count`, then {"intervals": {name: {"low", "high"}}}."""
    intervals = {name: dict(zip(("low", "high"), wilson(n, count), strict=True)) for name, n in right.items()}
    return {name: n / count for name, n in right.items()} | {"intervals": intervals}


def resampled(statistic: Callable[[np.ndarray], float], count: int, seed: int) -> tuple[float, Interval | None]:
    """A statistic of the rows 0 to count - 1, and its bootstrap standard interval (Efron & Tibshirani 1993, chapters 6, 13).

    That is 1.96 deviations of its values on resamples of as many rows to both sides, wherever those values lie: a resample
    has fewer different rows, which moves distances between sets. One row has none.
    """
    value, rng = statistic(np.arange(count)), keyed(seed, "resample")
    if count == 1:
        return value, None
    half = NORMAL_95 * float(np.std([statistic(rng.integers(0, count, count)) for _ in range(RESAMPLES)], ddof=1))
    return value, {"low": value - half, "high": value + half}
