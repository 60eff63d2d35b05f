"""Noise levels: the signal and noise amplitudes that a model is trained on, and which of them a sampler visits.

At a level, x = alpha * x0 + sigma * eps. A schedule is the list of a model's training levels, cleanest first; a spacing
chooses levels of it, or between them, for a number of steps. Only Python floats: no array library, no network. rho is
sigma / alpha; log-SNR here is -log rho, half of what some papers call log-SNR.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple


class Level(NamedTuple):
    """Signal amplitude, noise amplitude, and the network's time input, from 0 to the number of training levels."""

    alpha: float
    sigma: float
    t: float


CLEAN = Level(1.0, 0.0, 0.0)
NOISIEST = -5.1  # log-SNR at which spacings by rho start: a cosine schedule ends far beyond, with no visible signal
KARRAS = 7.0


def log_snr(level: Level) -> float:
    """Half the log signal-to-noise ratio, log(alpha / sigma): inf without noise, -inf without signal."""
    if level.alpha == 0 or level.sigma == 0:
        return math.inf if level.sigma == 0 else -math.inf
    return math.log(level.alpha / level.sigma)


class Levels(list[Level]):
    """A list of levels, and `at(log_snr)`: the level with that log-SNR, between those of the list."""

    def __init__(self, levels: Iterable[Level], at: Callable[[float], Level]):
        super().__init__(levels)
        self.at = at


def preserving(rho: float) -> tuple[float, float]:
    """(alpha, sigma) of variance-preserving levels: alpha² + sigma² = 1."""
    return 1 / math.hypot(1, rho), rho / math.hypot(1, rho)


def schedule(levels: Sequence[Level], amplitudes: Callable[[float], tuple[float, float]]) -> Levels:
    """A schedule from its levels, cleanest first. Between levels t is linear in log-SNR, as in k-diffusion."""
    noise = [-log_snr(level) for level in levels]  # rising

    def at(log_snr: float) -> Level:
        i = min(max(1, bisect_left(noise, -log_snr)), len(levels) - 1)
        share = (-log_snr - noise[i - 1]) / (noise[i] - noise[i - 1])
        t = levels[i - 1].t + min(max(share, 0.0), 1.0) * (levels[i].t - levels[i - 1].t)
        return Level(*amplitudes(math.exp(-log_snr)), t)

    return Levels(levels, at)


def from_betas(betas: Sequence[float]) -> Levels:
    """Variance-preserving levels: alpha² = prod(1 - beta) (Ho et al. 2020, equation 4)."""
    alpha_bars = accumulate((1.0 - beta for beta in betas), mul)
    return schedule([Level(math.sqrt(a), math.sqrt(1.0 - a), float(t)) for t, a in enumerate(alpha_bars)], preserving)


def _line(start: float, end: float, count: int) -> list[float]:
    return [start + (end - start) * i / max(1, count - 1) for i in range(count)]


def linear(count: int = 1000, start: float = 1e-4, end: float = 0.02) -> Levels:
    """Betas evenly spaced (Ho et al. 2020)."""
    return from_betas(_line(start, end, count))


def scaled_linear(count: int = 1000, start: float = 0.00085, end: float = 0.012) -> Levels:
    """Square roots of betas evenly spaced: Stable Diffusion 1.x and 2.x."""
    return from_betas([b * b for b in _line(math.sqrt(start), math.sqrt(end), count)])


def cosine(count: int = 1000, s: float = 0.008) -> Levels:
    """alpha² = cos²((t/T + s)/(1 + s)·π/2), betas capped at 0.999 (Nichol & Dhariwal 2021, equation 17)."""

    def f(u: float) -> float:
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    return from_betas([min(1 - f((t + 1) / count) / f(t / count), 0.999) for t in range(count)])


def edm(count: int = 1000, low: float = 0.002, high: float = 80.0) -> Levels:
    """EDM's rho from 0.002 to 80, spaced as in `karras`, for data of standard deviation 1 (Karras et al. 2022)."""
    rhos = reversed(karras(high, low, count))  # alpha = 1 / sqrt(1 + rho²) is EDM's input scaling, and v is minus its F
    return schedule([Level(*preserving(rho), float(t)) for t, rho in enumerate(rhos)], preserving)


def flow(count: int = 1000, shift: float = 1.0) -> Levels:
    """Rectified flow: x = (1 - s) x0 + s eps with s = (t + 1)/T (Liu et al. 2022, equation 1)."""
    # `shift` multiplies every rho, for larger images (Esser et al. 2024, equation 23)
    times = [count * shift * t / (count + (shift - 1) * t) for t in range(1, count + 1)]
    levels = [Level(1 - t / count, t / count, t - 1) for t in times]
    return schedule(levels, lambda rho: (1 / (1 + rho), rho / (1 + rho)))  # alpha + sigma = 1


def zero_terminal_snr(levels: Levels) -> Levels:
    """The schedule with alpha shifted and scaled so that its end has no signal (Lin et al. 2023, algorithm 1)."""
    first, last = levels[0].alpha, levels[-1].alpha
    alphas = [(level.alpha - last) * first / (first - last) for level in levels]
    rescaled = [Level(a, math.sqrt(1 - a * a), level.t) for a, level in zip(alphas, levels, strict=True)]
    return schedule(rescaled, preserving)


SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine, "edm": edm, "flow": flow}


def training_levels(name: str, count: int, shift: float = 1.0, zero_snr: bool = False) -> Levels:
    """A schedule by name. `shift` applies to "flow"; `zero_snr`, to any other, leaves no signal at its last level."""
    if name == "flow":
        return flow(count, shift)
    return zero_terminal_snr(SCHEDULES[name](count)) if zero_snr else SCHEDULES[name](count)


def leading(count: int, steps: int, offset: int = 1) -> list[int]:
    """Multiples of count // steps plus `offset` (less if there are too few levels), noisiest first, as for SD 1.x."""
    gap = count // steps
    return [i * gap + min(offset, count - 1 - (steps - 1) * gap) for i in reversed(range(steps))]


def trailing(count: int, steps: int, offset: int = 0) -> list[int]:
    """Evenly spaced, starting at the noisiest level (Lin et al. 2023, table 2)."""
    return [round(count - i * count / steps) - 1 for i in range(steps)]


def linspace(count: int, steps: int, offset: int = 0) -> list[int]:
    """Evenly spaced from the noisiest level to the cleanest."""
    return [round(u) for u in _line(count - 1, 0, steps)]


def distilled(count: int, steps: int, original: int) -> list[int]:
    """Of `original` levels, multiples of count // original less 1, evenly spaced ones, noisiest first (Luo et al. 2023)."""
    return [(original - int(i * (original / steps))) * (count // original) - 1 for i in range(steps)]


def between(schedule: Levels, place: float) -> Level:
    """The level at a fractional index into a schedule: rho and t interpolated linearly."""
    below, above, share = schedule[math.floor(place)], schedule[math.ceil(place)], place % 1
    if share == 0 or above.alpha == 0:
        return below
    ratio = below.sigma / below.alpha * (1 - share) + above.sigma / above.alpha * share
    return schedule.at(-math.log(ratio))._replace(t=below.t + (above.t - below.t) * share)


def karras(high: float, low: float, steps: int) -> list[float]:
    """Seventh roots of rho evenly spaced (Karras et al. 2022, equation 5)."""
    return [root**KARRAS for root in _line(high ** (1 / KARRAS), low ** (1 / KARRAS), steps)]


def exponential(high: float, low: float, steps: int) -> list[float]:
    """log rho, and so log-SNR, evenly spaced (Lu et al. 2022a, section 3)."""
    return [math.exp(u) for u in _line(math.log(high), math.log(low), steps)]


def beta(high: float, low: float, steps: int) -> list[float]:
    """rho at evenly spaced quantiles of the beta distribution B(0.6, 0.6), dense at both ends (Lee et al. 2024)."""
    return [low + (high - low) * beta_quantile(u, 0.6) for u in _line(1.0, 0.0, steps)]


def beta_quantile(u: float, a: float) -> float:
    """The u-quantile, u in [0, 1], of the beta distribution with both parameters `a`, by bisection."""
    if u > 0.5:
        return 1 - beta_quantile(1 - u, a)

    def mass(x: float) -> float:  # the incomplete beta function as a power series, which converges fast for x <= 1/2
        total, term, n = 0.0, 1.0, 0
        while abs(term) > 1e-12 and n < 60:
            total += term / (a + n)
            n += 1
            term *= x * (n - a) / n
        return x**a * total

    low, high, whole = 0.0, 0.5, 2 * mass(0.5)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < u * whole else (low, middle)
    return (low + high) / 2


INDICES = {"trailing": trailing, "leading": leading, "linspace": linspace}
RHOS = {"karras": karras, "exponential": exponential, "log_snr": exponential, "beta": beta}
SPACINGS = (*INDICES, *RHOS)


def ends(schedule: Levels) -> tuple[float, float]:
    """The largest and smallest rho of spacings by rho, the largest limited by NOISIEST."""
    high, low = (math.exp(-max(log_snr(schedule[i]), NOISIEST)) for i in (-1, 0))
    return high, low


def sampling_levels(
    schedule: Levels,
    steps: int,
    spacing: str = "trailing",
    offset: int = 1,
    final: Level = CLEAN,
    whole: bool = True,
    beyond: int = 0,
) -> Levels:
    """`steps` levels of a schedule, noisiest first, then the `final` one: steps + 1 in all.

    `offset` is that of "leading". "leading" and "linspace" space out `beyond` more levels than `steps`, if the schedule
    has enough, and drop the cleanest; "linspace" may fall between levels unless `whole`. Spacings by rho go from the
    schedule's noisiest level, but at most `NOISIEST`, to its cleanest.
    """
    more = beyond if spacing != "trailing" and steps + beyond <= len(schedule) else 0
    if spacing == "linspace" and not whole:
        levels = [between(schedule, place) for place in _line(len(schedule) - 1, 0, steps + more)[:steps]]
    elif spacing in INDICES:
        levels = [schedule[i] for i in INDICES[spacing](len(schedule), steps + more, offset)[:steps]]
    else:
        levels = [schedule.at(-math.log(rho)) for rho in RHOS[spacing](*ends(schedule), steps)]
    return Levels([*levels, final], schedule.at)
