"""Guidance: a denoiser made of denoisers. It knows neither networks nor batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinydiff.diffusion.samplers import Denoise
from tinydiff.diffusion.schedules import Level


def classifier_free(both: Callable[[Any, Level], tuple[Any, Any]], scale: float) -> Denoise:
    """u + scale (c - u) on the two x0 estimates of `both(x, level) -> (u, c)` (Ho & Salimans 2022, equation 6).

    scale 1 is the conditional model and 0 the unconditional one. Since x0 is an affine function of the network's output
    at a fixed x, guiding x0 equals guiding eps, v or flow.
    """

    def denoise(x: Any, level: Level) -> Any:
        u, c = both(x, level)
        return u + (c - u) * scale

    return denoise
