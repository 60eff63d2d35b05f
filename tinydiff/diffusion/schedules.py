"""Noise levels: which signal and noise amplitudes a model was trained on, and which of them a sampler visits.

A level is `x = alpha * x0 + sigma * eps`. A schedule is the list of a model's training levels, cleanest first; a spacing
picks levels of it, or between them, for a number of steps. Everything here is Python floats: no array library, no network.
rho is sigma/alpha; log-SNR is its negative logarithm, half of what some papers call so.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Level(NamedTuple):
    """Signal amplitude, noise amplitude, and the time the network is told (0 to the number of training levels)."""

    alpha: float
    sigma: float
    t: float


CLEAN = Level(1.0, 0.0, 0.0)
NOISIEST = -5.1  # log-SNR where respacing starts: a cosine schedule ends far beyond, where nothing is left to see
KARRAS = 7.0


def log_snr(level: Level) -> float:
    """Half the log signal-to-noise ratio, log(alpha / sigma); infinite at the ends."""
    if level.alpha == 0 or level.sigma == 0:
        return math.inf if level.sigma == 0 else -math.inf
    return math.log(level.alpha / level.sigma)


class Levels(list[Level]):
    """Levels in order, and `at(log_snr)`, the one between them with a given log-SNR."""

    def __init__(self, levels: Iterable[Level], at: Callable[[float], Level]):
        super().__init__(levels)
        self.at = at


# ---- schedules: a model's training levels -----------------------------------------------------------------------------


def preserving(rho: float) -> tuple[float, float]:
    """(alpha, sigma) of variance-preserving levels: alpha² + sigma² = 1."""
    return 1 / math.hypot(1, rho), rho / math.hypot(1, rho)


def straight(rho: float) -> tuple[float, float]:
    """(alpha, sigma) of rectified flow: alpha + sigma = 1."""
    return 1 / (1 + rho), rho / (1 + rho)


def schedule(levels: Sequence[Level], amplitudes: Callable[[float], tuple[float, float]]) -> Levels:
    """Training levels, cleanest first, with times between them linear in log-SNR, as k-diffusion has them."""
    noise = [-log_snr(level) for level in levels]  # rising

    def at(log_snr: float) -> Level:
        i = min(max(1, bisect_left(noise, -log_snr)), len(levels) - 1)
        below, above = noise[i - 1], noise[i]
        share = (-log_snr - below) / (above - below)
        t = levels[i - 1].t + min(max(share, 0.0), 1.0) * (levels[i].t - levels[i - 1].t)
        return Level(*amplitudes(math.exp(-log_snr)), t)

    return Levels(levels, at)


def from_betas(betas: Sequence[float]) -> Levels:
    """Variance-preserving levels from per-step noise rates: alpha² = prod(1 - beta) (Ho et al. 2020, equation 4)."""
    levels, alpha_bar = [], 1.0
    for t, beta in enumerate(betas):
        alpha_bar *= 1.0 - beta
        levels.append(Level(math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar), float(t)))
    return schedule(levels, preserving)


def _line(start: float, end: float, count: int) -> list[float]:
    return [start + (end - start) * i / max(1, count - 1) for i in range(count)]


def linear(count: int = 1000, start: float = 1e-4, end: float = 0.02) -> Levels:
    """Betas on a line (Ho et al. 2020)."""
    return from_betas(_line(start, end, count))


def scaled_linear(count: int = 1000, start: float = 0.00085, end: float = 0.012) -> Levels:
    """Square roots of betas on a line: Stable Diffusion 1.x and 2.x."""
    return from_betas([b * b for b in _line(math.sqrt(start), math.sqrt(end), count)])


def cosine(count: int = 1000, s: float = 0.008) -> Levels:
    """alpha² = cos²((t/T + s)/(1 + s)·π/2), betas capped at 0.999 (Nichol & Dhariwal 2021, equation 17)."""

    def f(u: float) -> float:
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    return from_betas([min(1 - f((t + 1) / count) / f(t / count), 0.999) for t in range(count)])


def edm(count: int = 1000, low: float = 0.002, high: float = 80.0) -> Levels:
    """EDM's rho from 0.002 to 80, roots on a line (Karras et al. 2022, equation 5), for data of unit deviation.

    Written variance preserving: the division by sqrt(1 + rho²) is EDM's input scaling, and v its F with the sign changed.
    """
    rhos = reversed(karras(high, low, count))
    return schedule([Level(*preserving(rho), float(t)) for t, rho in enumerate(rhos)], preserving)


def flow(count: int = 1000, shift: float = 1.0) -> Levels:
    """Rectified flow: x = (1 - s) x0 + s eps with s = (t + 1)/T (Liu et al. 2022, equation 1).

    `shift` multiplies every rho, as larger images want (Esser et al. 2024, equation 23).
    """
    times = [count * shift * t / (count + (shift - 1) * t) for t in range(1, count + 1)]
    return schedule([Level(1 - t / count, t / count, t - 1) for t in times], straight)


def zero_terminal_snr(levels: Levels) -> Levels:
    """The same schedule with no signal left at its end: alpha shifted and scaled (Lin et al. 2023, algorithm 1)."""
    first, last = levels[0].alpha, levels[-1].alpha
    alphas = [(level.alpha - last) * first / (first - last) for level in levels]
    return schedule(
        [Level(a, math.sqrt(1 - a * a), level.t) for a, level in zip(alphas, levels, strict=True)], preserving
    )


SCHEDULES: dict[str, Callable[[int], Levels]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "edm": edm,
    "flow": flow,
}


def training_levels(name: str, count: int, shift: float = 1.0, zero_snr: bool = False) -> Levels:
    """A schedule by name; `shift` is flow's, `zero_snr` ends any other without signal."""
    if name == "flow":
        return flow(count, shift)
    return zero_terminal_snr(SCHEDULES[name](count)) if zero_snr else SCHEDULES[name](count)


# ---- spacings: the levels a sampler visits ----------------------------------------------------------------------------


def leading(count: int, steps: int, offset: int = 1) -> list[int]:
    """Multiples of count // steps plus an offset, noisiest first (the choice of Stable Diffusion 1.x).

    The offset is as large as there are levels for.
    """
    gap = count // steps
    return [i * gap + min(offset, count - 1 - (steps - 1) * gap) for i in reversed(range(steps))]


def trailing(count: int, steps: int, offset: int = 0) -> list[int]:
    """Evenly spaced and ending on the noisiest level (Lin et al. 2023, table 2)."""
    return [round(count - i * count / steps) - 1 for i in range(steps)]


def linspace(count: int, steps: int, offset: int = 0) -> list[int]:
    """Evenly spaced over both ends."""
    return [round(u) for u in _line(count - 1, 0, steps)]


def between(schedule: Levels, place: float) -> Level:
    """The level at a place between two of a schedule, its rho on the line between theirs."""
    below, above, share = schedule[math.floor(place)], schedule[math.ceil(place)], place % 1
    if share == 0 or above.alpha == 0:
        return below
    ratio = below.sigma / below.alpha * (1 - share) + above.sigma / above.alpha * share
    return schedule.at(-math.log(ratio))._replace(t=below.t + (above.t - below.t) * share)


def karras(high: float, low: float, steps: int) -> list[float]:
    """The seventh roots of rho on a line (Karras et al. 2022, equation 5)."""
    return [root**KARRAS for root in _line(high ** (1 / KARRAS), low ** (1 / KARRAS), steps)]


def exponential(high: float, low: float, steps: int) -> list[float]:
    """log rho on a line: uniform in log-SNR (Lu et al. 2022a, section 3)."""
    return [math.exp(u) for u in _line(math.log(high), math.log(low), steps)]


def beta(high: float, low: float, steps: int) -> list[float]:
    """rho at quantiles of the beta distribution B(0.6, 0.6): dense at both ends (Lee et al. 2024)."""
    return [low + (high - low) * beta_quantile(u, 0.6) for u in _line(1.0, 0.0, steps)]


def beta_quantile(u: float, a: float) -> float:
    """The inverse of the beta distribution function with both parameters `a`, in [0, 1] for u in [0, 1]; by bisection."""
    if u > 0.5:
        return 1 - beta_quantile(1 - u, a)

    def share(x: float) -> float:  # the incomplete beta function as a power series, quick for x <= 1/2
        total, term, n = 0.0, 1.0, 0
        while abs(term) > 1e-12 and n < 60:
            total += term / (a + n)
            n += 1
            term *= x * (n - a) / n
        return x**a * total

    low, high, whole = 0.0, 0.5, 2 * share(0.5)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < u * whole else (low, middle)
    return (low + high) / 2


INDICES = {"trailing": trailing, "leading": leading, "linspace": linspace}
RHOS = {"karras": karras, "exponential": exponential, "log_snr": exponential, "beta": beta}
SPACINGS = (*INDICES, *RHOS)


def ends(schedule: Levels) -> tuple[float, float]:
    """The largest and the smallest rho that spacings by rho go between."""
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

    "leading" counts from `offset`. "leading" and "linspace" lay out `beyond` levels more, the cleanest, and leave them out
    (where there are as many); "linspace" falls between the schedule's levels where `whole` is false. Other spacings by rho
    go from the schedule's noisiest level, or `NOISIEST`, to its cleanest.
    """
    more = beyond if spacing != "trailing" and steps + beyond <= len(schedule) else 0
    if spacing == "linspace" and not whole:
        levels = [between(schedule, place) for place in _line(len(schedule) - 1, 0, steps + more)[:steps]]
    elif spacing in INDICES:
        levels = [schedule[i] for i in INDICES[spacing](len(schedule), steps + more, offset)[:steps]]
    else:
        levels = [schedule.at(-math.log(rho)) for rho in RHOS[spacing](*ends(schedule), steps)]
    return Levels([*levels, final], schedule.at)
