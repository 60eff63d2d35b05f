"""Solvers that walk from noise to an image along a list of levels.

A sampler takes `denoise(x, level) -> x0`, the start x at levels[0], the levels (noisiest first, the clean one last) and
`noise(step) -> array like x`. It is a generator of (x, x0) after each step; the last x is the image. Only + - * / touch
x, so numpy, torch and anything else with those four run the very same lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from tinydiff.diffusion.schedules import Level

Denoise = Callable[[Any, Level], Any]
Sampler = Callable[[Denoise, Any, Sequence[Level], Callable[[int], Any]], Iterator[tuple[Any, Any]]]


STEEPEST = 10.0


def move(x: Any, x0: Any, here: Level, there: Level) -> Any:
    """Along the line through x and x0: the eps of `here` kept, its amplitude that of `there` (DDIM, equation 12)."""
    return x * (there.sigma / here.sigma) + x0 * (there.alpha - here.alpha * there.sigma / here.sigma)


def ancestral(denoise: Denoise, x: Any, levels: Sequence[Level], noise: Callable[[int], Any], eta: float) -> Iterator:
    """DDIM (Song et al. 2021, equation 16): a share `eta` of the noise that is removed too much is drawn anew.

    Written in sigma/alpha this is Euler's method at eta = 0 and Euler ancestral at eta = 1.
    """
    for step, (here, there) in enumerate(pairwise(levels)):
        x0 = denoise(x, here)
        kept = (there.sigma * here.alpha) / (there.alpha * here.sigma) if there.alpha > 0 else 1.0
        fresh = eta * math.sqrt(max(0.0, 1 - kept * kept))
        x = move(x, x0, here, Level(there.alpha, there.sigma * math.sqrt(1 - fresh * fresh), there.t))
        if fresh * there.sigma > 0:
            x = x + noise(step) * (fresh * there.sigma)
        yield x, x0


def heun(denoise: Denoise, x: Any, levels: Sequence[Level], noise: Callable[[int], Any]) -> Iterator:
    """Heun's second-order method in sigma/alpha (Karras et al. 2022, algorithm 1): two network calls a step.

    Where sigma/alpha falls more than `STEEPEST`-fold at once, as it does on the cosine schedule's first step, half the
    slope at its end would outweigh everything; Euler's step stands.
    """
    for here, there in pairwise(levels):
        x0 = denoise(x, here)
        ahead = move(x, x0, here, there)
        if there.sigma > 0 and here.alpha > 0:
            ratio = (here.sigma * there.alpha) / (here.alpha * there.sigma)
            if ratio <= STEEPEST:
                x0 = x0 + (denoise(ahead, there) - x0) * (ratio / 2)
                ahead = move(x, x0, here, there)
        x = ahead
        yield x, x0


def dpmpp_2m(denoise: Denoise, x: Any, levels: Sequence[Level], noise: Callable[[int], Any]) -> Iterator:
    """DPM-Solver++ 2M (Lu et al. 2022b, algorithm 2): second order from the previous step's x0, one call a step."""
    before, width = None, math.inf
    for here, there in pairwise(levels):
        x0 = slope = denoise(x, here)
        ahead = log_snr(there) - log_snr(here)
        if before is not None and 0 < width < math.inf and math.isfinite(ahead):
            slope = x0 + (x0 - before) * (ahead / (2 * width))
        x = move(x, slope, here, there)
        before, width = x0, ahead
        yield x, x0


def log_snr(level: Level) -> float:
    """Half the log signal-to-noise ratio, log(alpha / sigma); infinite at the ends."""
    if level.alpha == 0 or level.sigma == 0:
        return math.inf if level.sigma == 0 else -math.inf
    return math.log(level.alpha / level.sigma)


SAMPLERS: dict[str, Sampler] = {
    "ddim": partial(ancestral, eta=0.0),
    "euler": partial(ancestral, eta=0.0),
    "euler_ancestral": partial(ancestral, eta=1.0),
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}
