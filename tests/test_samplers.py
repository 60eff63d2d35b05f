"""Solvers on problems with a known answer: a point mass, a Gaussian, a mixture; then against diffusers' schedulers."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
from diffusers_loop import Brownian, stepped
from hypothesis import given
from hypothesis import strategies as st

from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import NODES, SAMPLERS, SHARES, in_log_rho, in_rho
from tinydiff.diffusion.schedules import CLEAN, SCHEDULES, SPACINGS, Level, Levels, log_snr, sampling_levels

MEAN, STD = np.array([0.7, -1.5]), np.array([0.4, 2.0])


STOCHASTIC = ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "lcm", "tcd"]


DETERMINISTIC = sorted(set(SAMPLERS) - set(STOCHASTIC))


# The order of the error in the steps. LMS and DEIS are as good as their first step, which is Euler's, and UniPC as its
# last; PNDM treats the change of rho over a step as even (Liu et al. 2022, section 4.3: second order).
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpm2": 2, "dpm_solver_1": 1, "dpm_solver_2": 2, "dpm_solver_3": 3}


BY_EPS = ("lms", "plms", "deis", "dpm2", "dpm_solver_1", "dpm_solver_2", "dpm_solver_3")


ORDERS |= {"dpmpp_2m": 2, "plms": 2, "lms": 2, "deis": 2, "unipc": 2}


# Three families of levels, each smooth in u from noise (u = 1) to little noise (u = 0), and u from rho.
PATHS = {
    "variance preserving": (
        lambda u: Level(math.cos(0.1 + 1.3 * u), math.sin(0.1 + 1.3 * u), u),
        lambda rho: (math.atan(rho) - 0.1) / 1.3,
    ),
    "variance exploding": (lambda u: Level(1.0, 0.1 * 100**u, u), lambda rho: math.log(rho * 10) / math.log(100)),
    "flow": (lambda u: Level(0.9 - 0.8 * u, 0.1 + 0.8 * u, u), lambda rho: (0.9 * rho - 0.1) / (0.8 * (1 + rho))),
}


def levels_of(path, steps):
    at, u = PATHS[path]
    return Levels([at(1 - i / steps) for i in range(steps + 1)], lambda lam: at(u(math.exp(-lam))))


def gaussian_x0(x, level):
    """E[x0 | x] where x0 is N(MEAN, STD²): the network that has learnt a Gaussian perfectly."""
    variance = (level.alpha * STD) ** 2 + level.sigma**2
    return MEAN + (x - level.alpha * MEAN) * (level.alpha * STD**2 / variance)


CENTRES = np.array([[1.0, 0.5], [-1.2, 0.8], [0.1, -1.0]])


WEIGHTS, WIDTH = np.array([0.5, 0.3, 0.2]), 0.5


def mixture_x0(x, level):
    """E[x0 | x] where x0 is a mixture of three Gaussians of deviation WIDTH: x (N, 2)."""
    variance = (level.alpha * WIDTH) ** 2 + level.sigma**2
    offset = x[:, None, :] - level.alpha * CENTRES  # (N, 3, 2)
    log_weight = np.log(WEIGHTS) - (offset**2).sum(-1) / (2 * variance)
    share = np.exp(log_weight - log_weight.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    each = CENTRES + offset * (level.alpha * WIDTH**2 / variance)
    return (share[..., None] * each).sum(1)


def solve(name, denoise, x, levels, noise=None):
    *_, (x, _) = SAMPLERS[name](denoise, x, levels, noise or no_noise)
    return x


def no_noise(step):
    raise AssertionError("a deterministic sampler asked for noise")


def runge_kutta(denoise, x, path, steps=2000):
    """The probability-flow ODE d(x/alpha)/d(rho) = eps by the classical fourth-order method, in lambda."""
    at, u = PATHS[path]

    def slope(scaled, lam):
        level = at(u(math.exp(-lam)))
        return -(scaled * level.alpha - level.alpha * denoise(scaled * level.alpha, level)) / level.alpha

    start, end = log_snr(at(1.0)), log_snr(at(0.0))
    scaled, h = x / at(1.0).alpha, (end - start) / steps
    for i in range(steps):
        lam = start + i * h
        a = slope(scaled, lam)
        b = slope(scaled + a * h / 2, lam + h / 2)
        c = slope(scaled + b * h / 2, lam + h / 2)
        d = slope(scaled + c * h, lam + h)
        scaled = scaled + (a + 2 * b + 2 * c + d) * h / 6
    return scaled * at(0.0).alpha


@given(
    name=st.sampled_from(sorted(SAMPLERS)),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    spacing=st.sampled_from(sorted(SPACINGS)),
    steps=st.integers(1, 40),
)
def test_a_point_mass_is_drawn_exactly(name, schedule, spacing, steps):
    """With one image in the world, every solver ends on it whatever the steps."""
    rng, point = np.random.default_rng(0), np.array([0.25, -3.0, 1e-3])
    levels = sampling_levels(SCHEDULES[schedule](40), steps, spacing)
    draws = rng.standard_normal((2 * steps + 1, 3))
    found = solve(name, lambda x, level: point, draws[-1], levels, draws.__getitem__)
    exact = name not in BY_EPS
    np.testing.assert_allclose(found, point, rtol=0 if exact else 1e-9, atol=0 if exact else 1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_order_of_convergence(path):
    """On a mixture of Gaussians, whose x0 is exact, the error falls as steps^-order for every deterministic sampler."""
    assert sorted(ORDERS) == DETERMINISTIC
    x = np.random.default_rng(0).standard_normal((12, 2)) * PATHS[path][0](1.0).sigma
    exact = runge_kutta(mixture_x0, x, path)

    def error(name, steps):
        return np.sqrt(((solve(name, mixture_x0, x, levels_of(path, steps)) - exact) ** 2).mean())

    for name, order in ORDERS.items():
        coarse, fine = error(name, 401), error(name, 800)  # both 2 modulo 3, where DPM-Solver-3 ends on second order
        assert math.log(coarse / fine) / math.log(800 / 401) == pytest.approx(order, abs=0.15), name
        assert fine < 0.01


def test_runge_kutta_solves_a_gaussian():
    """The reference itself: on a Gaussian the flow is a scaling."""
    for path, (at, _) in PATHS.items():
        x, start, end = np.array([0.3, -1.1]), at(1.0), at(0.0)
        spread = [np.sqrt((level.alpha * STD) ** 2 + level.sigma**2) for level in (start, end)]
        exact = end.alpha * MEAN + (x - start.alpha * MEAN) * spread[1] / spread[0]
        np.testing.assert_allclose(runge_kutta(gaussian_x0, x, path), exact, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(STOCHASTIC) - {"lcm", "tcd"}))
@pytest.mark.parametrize("path", PATHS)
def test_stochastic_samplers_draw_from_the_distribution(name, path):
    """Mean and covariance of 20,000 draws, within four standard errors and the bias that falls with the steps."""
    rng, count = np.random.default_rng(1), 20_000
    levels = levels_of(path, 150)
    start, end = levels[0], levels[-1]
    picks = rng.choice(3, size=count, p=WEIGHTS)
    data = CENTRES[picks] + WIDTH * rng.standard_normal((count, 2))
    x = start.alpha * data + start.sigma * rng.standard_normal(data.shape)
    found = solve(name, mixture_x0, x, levels, lambda step: rng.standard_normal(x.shape))
    found = found / end.alpha
    mean = WEIGHTS @ CENTRES
    spread = (CENTRES - mean).T @ np.diag(WEIGHTS) @ (CENTRES - mean) + np.eye(2) * (
        WIDTH**2 + (end.sigma / end.alpha) ** 2
    )
    error = np.sqrt(np.diag(spread) / count)
    assert (np.abs(found.mean(axis=0) - mean) < 4 * error + 0.02).all()
    np.testing.assert_allclose(np.cov(found.T), spread, atol=4 * math.sqrt(2 / count) * spread.max() + 0.03)


def test_ancestral_keeps_the_noise_at_its_level():
    """After any step x has exactly the noise of that level around alpha x0, however the two levels lie."""
    rng, point = np.random.default_rng(2), np.float64(0.5)
    for here, there in [(Level(0.2, 0.9, 1), Level(0.7, 0.6, 0)), (Level(0.0, 1.0, 1), Level(0.1, 0.9, 0))]:
        x = here.alpha * point + here.sigma * rng.standard_normal(200_000)
        for name in ("ddpm", "lcm"):
            found = solve(name, lambda x, level: point, x, [here, there], lambda s: rng.standard_normal(200_000))
            assert found.mean() == pytest.approx(there.alpha * point, abs=0.01)
            assert found.std() == pytest.approx(there.sigma, rel=0.01)


def test_ancestral_redraws_all_that_it_may():
    """k-diffusion calls it sigma_down = sigma'² / sigma (in rho): what is left of the old noise."""
    here, there, point, eps = Level(0.2, 0.9, 1), Level(0.7, 0.6, 0), 0.5, 2.0
    x = here.alpha * point + here.sigma * eps
    found = solve("euler_ancestral", lambda x, level: point, x, [here, there], lambda step: 0.0)
    down = (there.sigma / there.alpha) ** 2 / (here.sigma / here.alpha)
    assert found == pytest.approx(there.alpha * (point + down * eps))


def test_adams_weights_integrate_polynomials():
    """The weights are exact means over the step: of cubics in rho, and of quadratics in log rho."""
    rhos, end = [3.0, 4.5, 7.0, 10.0], 2.1
    for power in range(4):
        mean = (end ** (power + 1) - rhos[0] ** (power + 1)) / ((power + 1) * (end - rhos[0]))
        assert np.dot(in_rho(rhos, end), np.array(rhos) ** power) == pytest.approx(mean)
    for power in range(3):  # of log(rho)^power, by parts
        primitive = [
            lambda r: r,
            lambda r: r * (math.log(r) - 1),
            lambda r: r * (math.log(r) ** 2 - 2 * math.log(r) + 2),
        ]
        mean = (primitive[power](end) - primitive[power](rhos[0])) / (end - rhos[0])
        assert np.dot(in_log_rho(rhos[:3], end), np.log(rhos[:3]) ** power) == pytest.approx(mean, rel=1e-9)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    np.testing.assert_allclose((nodes[4:], weights[4:]), (NODES, SHARES), rtol=1e-13)


class Only:
    """A number with + - * / and nothing else: no array attributes, no reflected operators, no comparisons, no truth."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return Only(self.value + bare(other))

    def __sub__(self, other):
        return Only(self.value - bare(other))

    def __mul__(self, other):
        return Only(self.value * bare(other))

    def __truediv__(self, other):
        return Only(self.value / bare(other))

    def __bool__(self):
        raise AssertionError("a sampler asked whether x is true")


def bare(x):
    return x.value if isinstance(x, Only) else x


@pytest.mark.parametrize("name", SAMPLERS)
def test_four_operators_are_enough(name):
    levels = sampling_levels(SCHEDULES["cosine"](1000), 17)
    start, draws = np.random.default_rng(0).standard_normal((2, 40, 5)).astype(np.float32)

    def denoise(x, level):
        return x * level.alpha + (x - x / 3.0) * 0.25

    plain = solve(name, denoise, start[0], levels, lambda step: draws[step])
    wrapped = solve(name, denoise, Only(start[0]), levels, lambda step: Only(draws[step]))
    assert plain.dtype == np.float32
    np.testing.assert_array_equal(wrapped.value, plain)


@pytest.mark.parametrize("name", SAMPLERS)
def test_torch_draws_what_numpy_draws(name):
    import torch

    levels = sampling_levels(SCHEDULES["scaled_linear"](1000), 12)
    start, draws = np.random.default_rng(0).standard_normal((2, 30, 2)).astype(np.float32)
    results = [
        solve(name, lambda x, level: x * 0.3 + 0.1, make(start[0]), levels, lambda step, make=make: make(draws[step]))
        for make in (np.array, torch.tensor)
    ]
    np.testing.assert_allclose(results[1].numpy(), results[0], rtol=1e-5)


TWICE = {"heun": 11, "dpm2": 11, "dpmpp_sde": 11, "plms": 7}  # network calls for six steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_network_calls_and_what_is_yielded(name):
    levels, seen, asked = sampling_levels(SCHEDULES["scaled_linear"](1000), 6), [], []

    def denoise(x, level):
        seen.append(level)
        return x * 0.5

    steps = list(SAMPLERS[name](denoise, np.ones(2), levels, lambda step: asked.append(step) or np.zeros(2)))
    assert len(steps) == 6 and len(seen) == TWICE.get(name, 6)
    assert name in ("dpm2", "dpmpp_sde") or set(seen) == set(levels[:-1])
    assert len(asked) == len(set(asked))  # every draw is another
    assert len(asked) == (0 if name in DETERMINISTIC else 10 if name == "dpmpp_sde" else 5)  # none on a finished image
    assert name in ("lms", "plms") or np.allclose(*steps[-1], rtol=1e-9)  # these two look past the last x0


@pytest.mark.parametrize("name", SAMPLERS)
def test_pure_noise_at_the_start(name):
    """A first level without any signal (zero terminal SNR) gives finite numbers everywhere."""
    schedule = SCHEDULES["scaled_linear"](1000)
    levels = Levels([Level(0.0, 1.0, 999.0), *sampling_levels(schedule, 8)[1:]], schedule.at)
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((20, 500, 2))
    found = solve(name, gaussian_x0, draws[-1], levels, draws.__getitem__)
    assert np.isfinite(found).all()
    assert found.mean(axis=0) == pytest.approx(MEAN, abs=0.35)


def test_log_snr():
    assert log_snr(Level(1.0, 1.0, 0)) == 0 and log_snr(Level(math.e, 1.0, 0)) == pytest.approx(1)
    assert log_snr(Level(1.0, 0.0, 0)) == math.inf and log_snr(Level(0.0, 1.0, 0)) == -math.inf


def test_levels_of_the_paths_fall():
    for path in PATHS:
        levels = levels_of(path, 10)
        assert all(log_snr(a) < log_snr(b) for a, b in pairwise(levels))
        assert levels.at(log_snr(levels[4])) == pytest.approx(levels[4])


# ---- against diffusers ------------------------------------------------------------------------------------------------


def output(x, t):
    """Stands for a network, smooth and not linear: any function will do, as long as both sides ask the same one."""
    return np.sin(1.3 * x + t / 400) * 0.8 + 0.1 * np.cos(x * x / 4)


STABLE_DIFFUSION = {  # the scheduler_config.json of the published models, without what only their own sampler reads
    "1.5": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    "2.1-v": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    | {"prediction_type": "v_prediction"},
    "XL": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    | {"prediction_type": "epsilon", "interpolation_type": "linear", "sample_max_value": 1.0},
}


SINGLE = {"final_sigmas_type": "sigma_min", "lower_order_final": True}  # the only end they allow


THEIRS = {  # our name -> diffusers' class and the settings that make it that sampler
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm_solver_1": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver", "solver_order": 1} | SINGLE),
    "dpm_solver_2": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver", "solver_order": 2} | SINGLE),
    "dpm_solver_3": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver", "solver_order": 3} | SINGLE),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3} | SINGLE),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "tcd": ("TCDScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}


SCALED = ("euler", "euler_ancestral", "heun", "dpm2", "dpmpp_sde", "lms")  # their x is ours over alpha


def made(name, config, spacing):
    import diffusers

    kind, settings = THEIRS[name]
    cls = getattr(diffusers, kind)
    if name == "dpmpp_3m_sde":
        cls = third_order_with_its_sign(cls)
    return cls.from_config(STABLE_DIFFUSION[config] | settings, timestep_spacing=spacing)


def third_order_with_its_sign(cls):
    """diffusers' third-order SDE update has the phi_3 term's constant with the wrong sign: at h = 0 its weight is -1
    where it is 0 in k-diffusion (and in diffusers' own ODE update). The rest of the scheduler is theirs."""
    import torch

    class Fixed(cls):
        def multistep_dpm_solver_third_order_update(self, outputs, *, sample, noise, **_):
            wrong = super().multistep_dpm_solver_third_order_update(outputs, sample=sample, noise=noise)
            alphas, sigmas = zip(
                *map(self._sigma_to_alpha_sigma_t, self.sigmas[self.step_index - 2 :][:4]), strict=True
            )
            lams = [torch.log(a) - torch.log(s) for a, s in zip(alphas[:4], sigmas[:4], strict=True)]
            h, h0, h1 = lams[3] - lams[2], lams[2] - lams[1], lams[1] - lams[0]
            first, older = (outputs[-1] - outputs[-2]) * h / h0, (outputs[-2] - outputs[-3]) * h / h1
            return wrong + alphas[3] * (first - older) * h / (h0 + h1)

    return Fixed


def levels_from(scheduler, name):
    """The levels that a diffusers scheduler visits, its own rounding included."""
    times = [float(t) for t in scheduler.timesteps]
    if hasattr(scheduler, "sigmas") and name not in ("ddpm", "lcm"):
        rhos = list(dict.fromkeys(float(rho) for rho in scheduler.sigmas))
        times = times[::2] if name in ("heun", "dpm2", "dpmpp_sde") else times
        times = [times[0], *times[1:]] if len(times) == len(rhos) - 1 else [times[0], *times[1 : len(rhos) - 1]]
        levels = [
            Level(1 / math.hypot(1, rho), rho / math.hypot(1, rho), t)
            for rho, t in zip(rhos, [*times, 0.0], strict=True)
        ]
    else:
        times = list(dict.fromkeys(times))
        bars = [float(scheduler.alphas_cumprod[int(t)]) for t in times]
        bars += [float(getattr(scheduler, "final_alpha_cumprod", 1.0)) if name not in ("ddpm", "lcm") else 1.0]
        levels = [Level(math.sqrt(bar), math.sqrt(1 - bar), t) for bar, t in zip(bars, [*times, 0.0], strict=True)]
    return Levels(levels, SCHEDULES["scaled_linear"](1000).at)


def diffusers_result(scheduler, start, draws, monkeypatch):
    """x after diffusers' own loop, in float64 from unit noise `start`."""
    module = type(scheduler).__mro__[1 if type(scheduler).__name__ == "Fixed" else 0].__module__
    return stepped(scheduler, output, start * float(scheduler.init_noise_sigma), draws, module, monkeypatch)


def same_steps() -> list[tuple[str, str, str]]:
    """(name, config, spacing) of all that diffusers and we step alike in.

    Left out: with linspace their DDIM and PNDM step to timesteps that are not their own, and of v their PNDM averages the
    network's outputs at different levels instead of the eps that the paper averages.
    """
    cases = product(SAMPLERS, STABLE_DIFFUSION, ["leading", "trailing", "linspace"])
    apart = {("ddim", "linspace"), ("plms", "linspace"), ("plms", "2.1-v")}
    return [case for case in cases if apart.isdisjoint({(case[0], case[1]), (case[0], case[2])})]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize(("name", "config", "spacing"), same_steps())
def test_diffusers_takes_the_same_steps(name, config, spacing, steps, monkeypatch):
    """The same levels, network and noise give the same x, within float32's rounding of their tables.

    The weights of their DEIS are small differences of large float32 numbers: it is given its sigmas in float64.
    """
    scheduler = made(name, config, spacing)
    scheduler.set_timesteps(steps)
    if name == "deis":
        scheduler.sigmas = scheduler.sigmas.double()
    start, *draws = np.random.default_rng(3).standard_normal((2 * steps + 1, 2, 4, 8))
    if name == "dpmpp_sde":
        scheduler.noise_sampler = Brownian(draws)
    levels = levels_from(scheduler, name)
    to_x0 = PREDICTIONS["v" if config == "2.1-v" else "epsilon"].to_x0

    def denoise(x, level):
        return to_x0(output(x, level.t), x, level.alpha, level.sigma)

    scale = float(scheduler.init_noise_sigma) * (levels[0].alpha if name in SCALED else 1.0)
    ours = solve(name, denoise, start * scale, levels, draws.__getitem__)
    ours = ours / levels[-1].alpha if name in SCALED else ours
    theirs = diffusers_result(scheduler, start, draws, monkeypatch)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("schedule", ["karras", "exponential", "beta"])
def test_respacing_is_that_of_diffusers(schedule):
    from diffusers import EulerDiscreteScheduler

    theirs = EulerDiscreteScheduler.from_config(
        STABLE_DIFFUSION["1.5"], timestep_spacing="linspace", **{f"use_{schedule}_sigmas": True}
    )
    theirs.set_timesteps(20)
    ours = sampling_levels(SCHEDULES["scaled_linear"](1000), 20, schedule)
    assert [a.sigma / a.alpha for a in ours] == pytest.approx(theirs.sigmas.tolist(), rel=1e-4)
    assert [level.t for level in ours[:-1]] == pytest.approx(theirs.timesteps.tolist(), abs=0.01)
    assert ours[-1] == CLEAN
