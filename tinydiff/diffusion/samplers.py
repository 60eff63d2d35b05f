"""Solvers that go from noise to an image along a list of levels.

A sampler takes `denoise(x, level) -> x0`, the initial x at levels[0], the levels (noisiest first, the last one usually
clean) and `noise(i)`, standard normal like x and different for each i. It is a generator that yields (x, x0) after each
step; the last x is the image. Only + - * / are applied to x, so the same code runs on numpy, torch and anything with
these four. In comments rho is sigma / alpha, lambda is -log rho, and h is a step's increase of lambda.
Single-step solvers, with more calls inside a step, come first; then multistep ones, which reuse the calls of earlier steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial, reduce
from itertools import pairwise
from operator import add, mul
from typing import Any

from tinydiff.diffusion.schedules import Level, Levels, log_snr

Denoise = Callable[[Any, Level], Any]
Noise = Callable[[int], Any]
Sampler = Callable[[Denoise, Any, Levels, Noise], Iterator[tuple[Any, Any]]]
Rule = Callable[[list[float], float], list[float]]

STEEPEST = 100.0  # a step in which rho falls by more than this factor is first order in x0
FEW = 15  # with fewer steps, multistep methods lower their order towards the end, as in diffusers


def move(x: Any, x0: Any, here: Level, there: Level) -> Any:
    """A DDIM step: the eps of x and x0 at `here`, with the amplitudes of `there` (Song et al. 2021, equation 12)."""
    return x * (there.sigma / here.sigma) + x0 * (there.alpha - here.alpha * there.sigma / here.sigma)


def move_by(x: Any, eps: Any, here: Level, there: Level) -> Any:
    """`move` given eps instead of x0; `here.alpha` must not be 0."""
    return (x - eps * here.sigma) * (there.alpha / here.alpha) + eps * there.sigma


def steep(here: Level, there: Level) -> bool:
    """Whether rho falls too far to estimate x0 from eps, as from pure noise or on the cosine schedule's first step."""
    return here.alpha == 0 or here.sigma * there.alpha > STEEPEST * here.alpha * there.sigma > 0


def redraw(x: Any, x0: Any, here: Level, there: Level, eta: float, noise: Callable[[], Any]) -> Any:
    """`move` with new noise: eta = 0 adds none, eta = 1 as much as DDPM (Song et al. 2021, equation 16)."""
    kept = (there.sigma * here.alpha) / (there.alpha * here.sigma) if there.alpha > 0 else 1.0  # exp(-h)
    fresh = eta * math.sqrt(max(0.0, 1 - kept * kept))
    x = move(x, x0, here, Level(there.alpha, there.sigma * math.sqrt(1 - fresh * fresh), there.t))
    return x + noise() * (fresh * there.sigma) if fresh * there.sigma > 0 else x


def ancestral(denoise: Denoise, x: Any, levels: Levels, noise: Noise, eta: float) -> Iterator:
    """DDIM (Song et al. 2021): eta = 0 is also Euler's method in rho, eta = 1 is DDPM and Euler ancestral."""
    for step, (here, there) in enumerate(pairwise(levels)):
        x0 = denoise(x, here)
        x = redraw(x, x0, here, there, eta, lambda step=step: noise(step))
        yield x, x0


def lcm(denoise: Denoise, x: Any, levels: Levels, noise: Noise) -> Iterator:
    """Latent consistency sampling (Luo et al. 2023, algorithm 3): x0 plus all new noise. For distilled models only."""
    for step, (here, there) in enumerate(pairwise(levels)):
        x0 = denoise(x, here)
        x = x0 * there.alpha + noise(step) * there.sigma if there.sigma > 0 else x0 * there.alpha
        yield x, x0


def tcd(denoise: Denoise, x: Any, levels: Levels, noise: Noise, eta: float) -> Iterator:
    """Strategic stochastic sampling of a trajectory consistency model (Zheng et al. 2024, algorithm 4, where eta is gamma).

    Each step goes on to (1 - eta) of the next time, and from there back to the next level by new noise.
    """
    for step, (here, there) in enumerate(pairwise(levels)):
        x0 = denoise(x, here)
        if eta > 0 and there.sigma > 0 and there.t > 0:
            further = timed(levels, there, math.floor((1 - eta) * there.t))
            kept = there.alpha / further.alpha
            fresh = math.sqrt(max(0.0, there.sigma**2 - (kept * further.sigma) ** 2))
            x = move(x, x0, here, further) * kept + noise(step) * fresh
        else:
            x = move(x, x0, here, there)
        yield x, x0


def timed(levels: Levels, above: Level, t: float) -> Level:
    """The level at a time below that of another: t falls as log-SNR grows."""
    low, step = log_snr(above), 1.0
    while levels.at(low + step).t > t:
        low, step = low + step, 2 * step
    high = low + step
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if levels.at(middle).t > t else (low, middle)
    return levels.at(high)


def heun(denoise: Denoise, x: Any, levels: Levels, noise: Noise) -> Iterator:
    """Heun's second-order method in rho (Karras et al. 2022, algorithm 1): two network calls a step."""
    for here, there in pairwise(levels):
        x0 = denoise(x, here)
        if there.sigma > 0 and not steep(here, there):  # in a steep step the slope at its end would outweigh all else
            ratio = (here.sigma * there.alpha) / (here.alpha * there.sigma)
            x0 = x0 + (denoise(move(x, x0, here, there), there) - x0) * (ratio / 2)
        x = move(x, x0, here, there)
        yield x, x0


def dpm2(denoise: Denoise, x: Any, levels: Levels, noise: Noise) -> Iterator:
    """The midpoint rule in rho with DPM-Solver-2's midpoint, the mean lambda: two network calls a step."""
    for here, there in pairwise(levels):
        x0 = denoise(x, here)
        if there.sigma > 0 and not steep(here, there):
            middle = levels.at((log_snr(here) + log_snr(there)) / 2)
            halfway = move(x, x0, here, middle)
            eps = (halfway - denoise(halfway, middle) * middle.alpha) / middle.sigma
            x = move_by(x, eps, here, there)
        else:
            x = move(x, x0, here, there)
        yield x, x0


def dpm_solver(denoise: Denoise, x: Any, levels: Levels, noise: Noise, order: int) -> Iterator:
    """DPM-Solver-1, -2 and -3 (Lu et al. 2022a, algorithms 1, 4, 5), the inner points being levels of the list.

    One call a level: `order` levels make one step of the paper, each reached from the first of them.
    """
    start, calls = (x, levels[0]), []  # calls: (lambda, eps) since the start
    for step, (here, there) in enumerate(pairwise(levels)):
        x0 = denoise(x, here)
        start = start if calls else (x, here)
        if there.sigma == 0 or steep(here, there):  # first order
            x, calls = move(x, x0, here, there), []
        else:
            calls = [*calls, (log_snr(here), (x - x0 * here.alpha) / here.sigma)]
            x = move_by(start[0], _inner(calls, log_snr(there)), start[1], there)
            last_but_one = step == len(levels) - 3  # diffusers starts over here, so that its last step is first order
            calls = [] if len(calls) == order or (len(calls) == order - 1 and last_but_one) else calls
        yield x, x0


def _inner(calls: list[tuple[float, Any]], end: float) -> Any:
    """The eps of a step from the first of `calls` to lambda = `end`; its order is the number of calls."""
    (start, eps), (last, latest) = calls[0], calls[-1]
    if len(calls) == 1:
        return eps
    h = end - start
    weight = 0.5 if len(calls) == 2 else 1 / h - 1 / math.expm1(h)
    return eps + (latest - eps) * (weight * h / (last - start))


def dpmpp_sde(denoise: Denoise, x: Any, levels: Levels, noise: Noise) -> Iterator:
    """DPM-Solver++ SDE (Lu et al. 2022b; k-diffusion's single step): the midpoint's x0 for the whole step, two calls."""
    for step, (here, there) in enumerate(pairwise(levels)):
        x0 = denoise(x, here)
        if math.isfinite(log_snr(here)) and math.isfinite(log_snr(there)):
            middle = levels.at((log_snr(here) + log_snr(there)) / 2)
            early, late = noise(2 * step), noise(2 * step + 1)  # before and after it, on a Brownian path over rho
            x0 = denoise(redraw(x, x0, here, middle, 1.0, lambda early=early: early), middle)
            a, b, c = (level.sigma / level.alpha for level in (here, middle, there))
            whole = early * math.sqrt((a - b) / (a - c)) + late * math.sqrt((b - c) / (a - c))
            x = redraw(x, x0, here, there, 1.0, lambda whole=whole: whole)
        else:
            x = redraw(x, x0, here, there, 1.0, lambda step=step: noise(2 * step))
        yield x, x0


def dpmpp(denoise: Denoise, x: Any, levels: Levels, noise: Noise, order: int, eta: float) -> Iterator:
    """DPM-Solver++ 2M (Lu et al. 2022b, algorithm 2); with eta = 1, k-diffusion's SDE variants. One call a step."""
    count, past = len(levels) - 1, []  # past: (lambda, x0), newest first
    for step, (here, there) in enumerate(pairwise(levels)):
        x0 = denoise(x, here)
        past = [(log_snr(here), x0), *past][: min(order, count - step) if count < FEW else order]
        x = redraw(x, _extrapolated(past, log_snr(there), 1 + eta), here, there, eta, lambda step=step: noise(step))
        yield x, x0


def _extrapolated(past: list[tuple[float, Any]], end: float, speed: float) -> Any:
    """The x0 for a step to lambda = `end` from 1 to 3 `past` (lambda, x0), newest first; `speed`: 1 ODE, 2 SDE."""
    past = [past[0], *(p for p in past[1:] if math.isfinite(p[0]))]
    (now, x0), (before, x1) = past[0], past[min(1, len(past) - 1)]
    if len(past) < 2 or not math.isfinite(end):
        return x0
    h, r0 = end - now, (now - before) / (end - now)
    first = (x0 - x1) / r0
    if len(past) == 2:
        return x0 + first * 0.5
    longest, x2 = past[2]
    r1, hh = (before - longest) / h, speed * h
    second = (first - (x1 - x2) / r1) / (r0 + r1)
    whole = -math.expm1(-hh)
    phi2 = 1 - whole / hh
    return x0 + (first + second * r0) * (phi2 / whole) - second * ((phi2 / hh - 0.5) / whole)


def unipc(denoise: Denoise, x: Any, levels: Levels, noise: Noise) -> Iterator:
    """UniPC-2 with B(h) = exp(h) - 1 (Zhao et al. 2023, algorithms 1 and 2): each call also corrects the last step."""
    count, order, start = len(levels) - 1, 0, x
    past: list[tuple[Level, Any]] = []  # (level, x0), newest first
    for step, (here, there) in enumerate(pairwise(levels)):
        x0 = denoise(x, here)
        if past:
            x = move(start, _corrected(past[:order], here, x0), past[0][0], here)
        past, start = [(here, x0), *past][:2], x
        order = min(len(past), count - step)
        points = [(log_snr(level), value) for level, value in past[:order]]
        x = move(x, _extrapolated(points, log_snr(there), 1.0), here, there)
        yield x, x0


def _corrected(past: list[tuple[Level, Any]], here: Level, x0: Any) -> Any:
    """UniC's x0 for the step that ended at `here`, now that the network's `x0` there is known."""
    (before, x1), h = past[0], log_snr(here) - log_snr(past[0][0])
    if not math.isfinite(h):
        return x1
    if len(past) == 1 or not math.isfinite(log_snr(past[1][0])):
        return x1 + (x0 - x1) * 0.5
    whole = math.expm1(-h)
    phi2 = -whole / h - 1
    b1, b2 = phi2 / whole, 2 * (-phi2 / h - 0.5) / whole
    r = (log_snr(past[1][0]) - log_snr(before)) / h
    older = (b1 - b2) / (1 - r)
    return x1 + (past[1][1] - x1) * (older / r) + (x0 - x1) * (b1 - older)


def adams(
    denoise: Denoise, x: Any, levels: Levels, noise: Noise, order: int, rule: Rule, few: int = 0, repeat: bool = False
) -> Iterator:
    """Linear multistep methods on eps. `rule(rhos, end)`: weights of past eps, newest first, in a step to rho = end.

    With fewer than `few` steps in all, the order falls towards the end. `repeat` takes the first step twice.
    """
    count, past = len(levels) - 1, []  # (rho, eps), newest first
    for step, (here, there) in enumerate(pairwise(levels)):
        x0 = denoise(x, here)
        if steep(here, there):
            x = move(x, x0, here, there)
        else:
            past = [(here.sigma / here.alpha, (x - x0 * here.alpha) / here.sigma), *past][:order]
            used = past[: count - step] if count < few else past
            weights = rule([rho for rho, _ in used], there.sigma / there.alpha)
            eps = reduce(add, map(mul, [eps for _, eps in used], weights))
            if repeat and len(past) == 1 and there.sigma > 0:  # with the mean eps of its two ends: one more call
                ahead = move_by(x, eps, here, there)
                eps = (eps + (ahead - denoise(ahead, there) * there.alpha) / there.sigma) * 0.5
            x = move_by(x, eps, here, there)
        yield x, x0


def in_rho(rhos: list[float], end: float) -> list[float]:
    """LMS (k-diffusion): the mean over the step, in rho, of the polynomial in rho through the past eps."""
    return _averages(rhos, rhos[0], end, lambda rho: rho)


def in_log_rho(rhos: list[float], end: float) -> list[float]:
    """DEIS (Zhang & Chen 2023, section 3.3): the mean over the step, in rho, of the polynomial in log rho."""
    return _averages([math.log(rho) for rho in rhos], rhos[0], end, math.log) if end > 0 else [1.0]


ADAMS = ([1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])


def in_index(rhos: list[float], end: float) -> list[float]:
    """PNDM without its Runge-Kutta start (Liu et al. 2022, equation 12): Adams-Bashforth in the level's index."""
    return ADAMS[len(rhos) - 1]


# Gauss-Legendre quadrature with 8 points: exact for LMS, and within rounding for DEIS on steps of ordinary length
NODES = (0.1834346424956498, 0.5255324099163290, 0.7966664774136267, 0.9602898564975363)
SHARES = (0.3626837833783620, 0.3137066458778873, 0.2223810344533745, 0.1012285362903763)


def _averages(points: list[float], start: float, end: float, coordinate: Callable[[float], float]) -> list[float]:
    """The mean over rho in [start, end] of each Lagrange polynomial through `points`, a function of coordinate(rho)."""
    middle, half = (start + end) / 2, (end - start) / 2
    nodes = [(sign * node, w / 2) for node, w in zip(NODES, SHARES, strict=True) for sign in (-1, 1)]
    at = [(coordinate(middle + node * half), w) for node, w in nodes]

    def lagrange(j: int, u: float) -> float:
        return math.prod((u - p) / (points[j] - p) for k, p in enumerate(points) if k != j)

    return [sum(w * lagrange(j, u) for u, w in at) for j in range(len(points))]


ETA = ("ddim", "tcd")  # samplers whose eta can be another: how much noise is new at each step
SAMPLERS: dict[str, Sampler] = {
    "ddim": partial(ancestral, eta=0.0),
    "ddpm": partial(ancestral, eta=1.0),
    "euler": partial(ancestral, eta=0.0),
    "euler_ancestral": partial(ancestral, eta=1.0),
    "heun": heun,
    "dpm2": dpm2,
    "dpm_solver_1": partial(dpm_solver, order=1),
    "dpm_solver_2": partial(dpm_solver, order=2),
    "dpm_solver_3": partial(dpm_solver, order=3),
    "dpmpp_2m": partial(dpmpp, order=2, eta=0.0),
    "dpmpp_2m_sde": partial(dpmpp, order=2, eta=1.0),
    "dpmpp_3m_sde": partial(dpmpp, order=3, eta=1.0),
    "dpmpp_sde": dpmpp_sde,
    "plms": partial(adams, order=4, rule=in_index, repeat=True),
    "lms": partial(adams, order=4, rule=in_rho),
    "deis": partial(adams, order=3, rule=in_log_rho, few=FEW),
    "unipc": unipc,
    "lcm": lcm,
    "tcd": partial(tcd, eta=0.3),
}
