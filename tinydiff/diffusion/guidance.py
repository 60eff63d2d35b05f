"""Guidance: combining denoisers' x0 estimates, with a scale that may vary by level. No networks and no prompts.

At a fixed x, x0 is an affine function of the network's output, so guiding x0 equals guiding eps, v or flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tinydiff.diffusion.predictions import Prediction
from tinydiff.diffusion.samplers import Denoise
from tinydiff.diffusion.schedules import Level

Scale = float | Callable[[Level], Any]  # a number, or level -> a number or an array that broadcasts against x
Both = Callable[[Any, Level], tuple[Any, Any]]  # (x, level) -> unconditional and conditional x0
Adjust = Callable[[Any, Any, Any, Level], Any]  # (guided, c, x, level) -> x0


def unadjusted(guided: Any, c: Any, x: Any, level: Level) -> Any:
    """No adjustment of the guided x0."""
    return guided


def classifier_free(both: Both, scale: Scale, single: Denoise | None = None, adjust: Adjust = unadjusted) -> Denoise:
    """u + scale (c - u) for the two x0 estimates u, c = both(x, level) (Ho & Salimans 2022, equation 6).

    scale = 0 gives the unconditional model, 1 the conditional one, by `single` if that is given: half the work.
    """

    def denoise(x: Any, level: Level) -> Any:
        strength = at(scale, level)
        if single and isinstance(strength, float | int) and strength == 1:
            return single(x, level)
        u, c = both(x, level)
        return adjust(u + (c - u) * strength, c, x, level)

    return denoise


def at(scale: Scale, level: Level) -> Any:
    """The scale at a level."""
    return scale(level) if callable(scale) else scale


def composed(u: Any, conditions: Sequence[tuple[float, Any]]) -> Any:
    """Several conditions: u + sum of weight (c - u) (Liu et al. 2022, "Compositional visual generation", eq. 11)."""
    return sum(((c - u) * weight for weight, c in conditions), u)


def growing(base: Any, most: float, count: int) -> Scale:
    """`base` at pure noise, `most` at the clean end, linear in t between: base + (most - base)(1 - t/T)."""
    return lambda level: base + (most - base) * (1 - level.t / count)


def within(scale: Scale, low: float, high: float, count: int) -> Scale:
    """`scale` where t/T is in [low, high], elsewhere 1: no guidance (Kynkäänniemi et al. 2024)."""
    return lambda level: at(scale, level) if low <= level.t / count <= high else 1.0


def rescale(prediction: Prediction, share: float) -> Adjust:
    """Scale each guided output by a `share` to the conditional one's standard deviation (Lin et al. 2023, eq. 15, 16)."""

    def output(x0: Any, x: Any, level: Level) -> Any:
        return prediction.target(x0, (x - x0 * level.alpha) / level.sigma, level.alpha, level.sigma)

    def adjust(guided: Any, c: Any, x: Any, level: Level) -> Any:
        out = output(guided, x, level)  # std and reshape: for numpy's and torch's arrays
        wanted, actual = (each.reshape(len(x), -1).std(-1) for each in (output(c, x, level), out))
        factor = (wanted / actual * share + (1 - share)).reshape(-1, *[1] * (x.ndim - 1))
        return prediction.to_x0(out * factor, x, level.alpha, level.sigma)

    return adjust


def complexity(words: Sequence[str]) -> float:
    """How much a prompt asks for, for content-adaptive guidance: n / (n + 6) for n different words of over 2 letters."""
    n = len({word.lower() for word in words if len(word) > 2})
    return n / (n + 6)


def keeping(denoise: Denoise, known: Any, mask: Any) -> Denoise:
    """x0 where `mask` is 1 and `known` where it is 0: inpainting with any model and any solver.

    Song et al. 2021 (section 5) replace the known part of x at every level; replacing it in x0 leaves x to the solver.
    """
    return lambda x, level: known + (denoise(x, level) - known) * mask
