"""Guidance: denoisers made of denoisers, and how strong it is at which level. It knows neither networks nor prompts.

Since x0 is an affine function of the network's output at a fixed x, guiding x0 equals guiding eps, v or flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tinydiff.diffusion.predictions import Prediction
from tinydiff.diffusion.samplers import Denoise
from tinydiff.diffusion.schedules import Level

Scale = (
    float | Callable[[Level], Any]
)  # a number, or what gives one, or an array that broadcasts against x, for a level
Both = Callable[[Any, Level], tuple[Any, Any]]
Adjust = Callable[[Any, Any, Any, Level], Any]  # (guided, c, x, level) -> x0


def unadjusted(guided: Any, c: Any, x: Any, level: Level) -> Any:
    return guided


def classifier_free(
    both: Both, scale: Scale, conditional: Denoise | None = None, adjust: Adjust = unadjusted
) -> Denoise:
    """u + scale (c - u) on the two x0 estimates of `both(x, level) -> (u, c)` (Ho & Salimans 2022, equation 6).

    scale 1 is the conditional model, for which `conditional` is asked instead where there is one: half the work. 0 is the
    unconditional model.
    """

    def denoise(x: Any, level: Level) -> Any:
        strength = at(scale, level)
        if conditional and isinstance(strength, float | int) and strength == 1:
            return conditional(x, level)
        u, c = both(x, level)
        return adjust(u + (c - u) * strength, c, x, level)

    return denoise


def at(scale: Scale, level: Level) -> Any:
    return scale(level) if callable(scale) else scale


def composed(u: Any, conditions: Sequence[tuple[float, Any]]) -> Any:
    """One condition of several: u + sum of weight (c - u) (Liu et al. 2022, "Compositional visual generation", eq. 11)."""
    total = u
    for weight, c in conditions:
        total = total + (c - u) * weight
    return total


def growing(base: Any, most: float, count: int) -> Scale:
    """`base` at pure noise, `most` at the clean end, a line of t between: base + (most - base)(1 - t/T)."""
    return lambda level: base + (most - base) * (1 - level.t / count)


def within(scale: Scale, low: float, high: float, count: int) -> Scale:
    """`scale` where t/T lies in [low, high], else none: 1 (Kynkäänniemi et al. 2024)."""
    return lambda level: at(scale, level) if low <= level.t / count <= high else 1.0


def rescale(prediction: Prediction, share: float) -> Adjust:
    """The network's guided output brought back, by `share`, to the deviation of the conditional one, image by image
    (Lin et al. 2023, equations 15 and 16). For arrays with `std` and `reshape`: numpy and torch."""

    def output(x0: Any, x: Any, level: Level) -> Any:
        return prediction.target(x0, (x - x0 * level.alpha) / level.sigma, level.alpha, level.sigma)

    def adjust(guided: Any, c: Any, x: Any, level: Level) -> Any:
        out = output(guided, x, level)
        wanted, found = (each.reshape(len(x), -1).std(-1) for each in (output(c, x, level), out))
        factor = (wanted / found * share + (1 - share)).reshape(-1, *[1] * (x.ndim - 1))
        return prediction.to_x0(out * factor, x, level.alpha, level.sigma)

    return adjust


def complexity(words: Sequence[str]) -> float:
    """How much a prompt asks for, in [0, 1): n / (n + 6) for n different words of more than two letters.

    "red heart" is 0.25, a sentence of six such words 0.5. Content-adaptive guidance goes from one scale to another by it.
    """
    n = len({word.lower() for word in words if len(word) > 2})
    return n / (n + 6)


def keeping(denoise: Denoise, known: Any, mask: Any) -> Denoise:
    """x0 where `mask` is 1, and `known` where it is 0: inpainting with any model and any solver.

    What is known holds for x0 at every level (as Song et al. 2021, section 5, hold it for x): the solver's noise there
    then follows by itself.
    """
    return lambda x, level: known + (denoise(x, level) - known) * mask
