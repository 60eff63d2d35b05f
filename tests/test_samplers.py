"""Solvers on problems with a known answer: a point mass, a Gaussian; then against diffusers' schedulers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import SAMPLERS, log_snr
from tinydiff.diffusion.schedules import SCHEDULES, SPACINGS, Level, sampling_levels

MEAN, STD = np.array([0.7, -1.5]), np.array([0.4, 2.0])
DETERMINISTIC = sorted(set(SAMPLERS) - {"euler_ancestral"})
# Three families of levels, each smooth in u from noise (u = 1) to little noise (u = 0).
PATHS = {
    "variance preserving": lambda u: Level(math.cos(0.1 + 1.3 * u), math.sin(0.1 + 1.3 * u), u),
    "variance exploding": lambda u: Level(1.0, 0.1 * 100**u, u),
    "flow": lambda u: Level(0.9 - 0.8 * u, 0.1 + 0.8 * u, u),
}


def gaussian_x0(x, level):
    """E[x0 | x] where x0 is N(MEAN, STD²): the network that has learnt a Gaussian perfectly."""
    variance = (level.alpha * STD) ** 2 + level.sigma**2
    return MEAN + (x - level.alpha * MEAN) * (level.alpha * STD**2 / variance)


def solve(name, denoise, x, levels, noise=None):
    *_, (x, _) = SAMPLERS[name](denoise, x, levels, noise or no_noise)
    return x


def no_noise(step):
    raise AssertionError("a deterministic sampler asked for noise")


@given(
    name=st.sampled_from(DETERMINISTIC + ["euler_ancestral"]),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    spacing=st.sampled_from(sorted(SPACINGS)),
    steps=st.integers(1, 60),
)
def test_a_point_mass_is_drawn_exactly(name, schedule, spacing, steps):
    """With one image in the world, every solver ends on it whatever the steps, even where there are fewer levels."""
    rng, point = np.random.default_rng(0), np.array([0.25, -3.0, 1e-3])
    levels = sampling_levels(SCHEDULES[schedule](40), steps, spacing)
    found = solve(name, lambda x, level: point, rng.standard_normal(3), levels, lambda step: rng.standard_normal(3))
    np.testing.assert_array_equal(found, point)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order, path):
    """The error against the exact solution of the probability-flow ODE falls as steps^-order."""
    x = np.array([0.3, -1.1])
    start, end = PATHS[path](1.0), PATHS[path](0.0)
    spread = [np.sqrt((level.alpha * STD) ** 2 + level.sigma**2) for level in (start, end)]
    exact = end.alpha * MEAN + (x - start.alpha * MEAN) * spread[1] / spread[0]

    def error(steps):
        levels = [PATHS[path](1 - i / steps) for i in range(steps + 1)]
        return np.abs(solve(name, gaussian_x0, x, levels) - exact).max()

    coarse, fine = error(160), error(320)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert fine < 0.02


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_draws_from_the_distribution(schedule):
    rng = np.random.default_rng(1)
    levels = sampling_levels(SCHEDULES[schedule](1000), 500)  # its bias falls with the steps
    x = levels[0].alpha * (MEAN + STD * rng.standard_normal((8000, 2)))
    x = x + levels[0].sigma * rng.standard_normal(x.shape)
    found = solve("euler_ancestral", gaussian_x0, x, levels, lambda step: rng.standard_normal(x.shape))
    np.testing.assert_allclose(found.mean(axis=0), MEAN, atol=0.06)
    np.testing.assert_allclose(found.std(axis=0), STD, rtol=0.04)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twenty_steps_draw_a_gaussian(schedule, name):
    """On the levels that `generate` visits, each noise ends near where the exact flow takes it."""
    levels = sampling_levels(SCHEDULES[schedule](1000), 20)
    unit, start = np.random.default_rng(4).standard_normal((500, 2)), levels[0]
    x = start.alpha * MEAN + np.sqrt((start.alpha * STD) ** 2 + start.sigma**2) * unit
    error = np.abs(solve(name, gaussian_x0, x, levels) - (MEAN + STD * unit)).mean()
    assert error < (0.1 if name in ("ddim", "euler") else 0.03)


def test_ancestral_keeps_the_noise_at_its_level():
    """After any step x has exactly the noise of that level around alpha x0, however the two levels lie."""
    rng, point = np.random.default_rng(2), np.float64(0.5)
    for here, there in [(Level(0.2, 0.9, 1), Level(0.7, 0.6, 0)), (Level(0.0, 1.0, 1), Level(0.1, 0.9, 0))]:
        x = here.alpha * point + here.sigma * rng.standard_normal(200_000)
        found = solve(
            "euler_ancestral", lambda x, level: point, x, [here, there], lambda s: rng.standard_normal(200_000)
        )
        assert found.mean() == pytest.approx(there.alpha * point, abs=0.01)
        assert found.std() == pytest.approx(there.sigma, rel=0.01)


def test_ancestral_redraws_all_that_it_may():
    """k-diffusion calls it sigma_down = sigma'² / sigma (in sigma/alpha): what is left of the old noise."""
    here, there, point, eps = Level(0.2, 0.9, 1), Level(0.7, 0.6, 0), 0.5, 2.0
    x = here.alpha * point + here.sigma * eps
    found = solve("euler_ancestral", lambda x, level: point, x, [here, there], lambda step: 0.0)
    down = (there.sigma / there.alpha) ** 2 / (here.sigma / here.alpha)
    assert found == pytest.approx(there.alpha * (point + down * eps))


class Only:
    """A number with + - * / and nothing else: no array attributes, no reflected operators, no comparisons."""

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


def bare(x):
    return x.value if isinstance(x, Only) else x


@pytest.mark.parametrize("name", SAMPLERS)
def test_four_operators_are_enough(name):
    levels = sampling_levels(SCHEDULES["cosine"](1000), 12)
    start, draws = np.random.default_rng(0).standard_normal((2, 12, 5)).astype(np.float32)

    def denoise(x, level):
        return x * level.alpha + (x - x / 3.0) * 0.25

    plain = solve(name, denoise, start[0], levels, lambda step: draws[step])
    wrapped = solve(name, denoise, Only(start[0]), levels, lambda step: Only(draws[step]))
    assert plain.dtype == np.float32
    np.testing.assert_array_equal(wrapped.value, plain)


@pytest.mark.parametrize("name", SAMPLERS)
def test_torch_draws_what_numpy_draws(name):
    import torch

    levels = sampling_levels(SCHEDULES["cosine"](1000), 12)
    start, draws = np.random.default_rng(0).standard_normal((2, 12, 2)).astype(np.float32)
    results = [
        solve(name, lambda x, level: x * 0.3 + 0.1, make(start[0]), levels, lambda step, make=make: make(draws[step]))
        for make in (np.array, torch.tensor)
    ]
    np.testing.assert_allclose(results[1].numpy(), results[0], rtol=1e-6)


@pytest.mark.parametrize(("name", "calls"), [("heun", 11), *((n, 6) for n in SAMPLERS if n != "heun")])
def test_network_calls_and_what_is_yielded(name, calls):
    levels, seen, asked = sampling_levels(SCHEDULES["scaled_linear"](1000), 6), [], []

    def denoise(x, level):
        assert level in levels[:-1]
        seen.append(level)
        return x * 0.5

    steps = list(SAMPLERS[name](denoise, np.ones(2), levels, lambda step: asked.append(step) or np.zeros(2)))
    assert len(steps) == 6 and len(seen) == calls
    assert asked == ([0, 1, 2, 3, 4] if name == "euler_ancestral" else [])  # nothing is added to a finished image
    np.testing.assert_array_equal(*steps[-1])


def test_log_snr():
    assert log_snr(Level(1.0, 1.0, 0)) == 0 and log_snr(Level(math.e, 1.0, 0)) == pytest.approx(1)
    assert log_snr(Level(1.0, 0.0, 0)) == math.inf and log_snr(Level(0.0, 1.0, 0)) == -math.inf


def output(x, t):
    """Stands for a network, smooth and not linear: any function will do, as long as both sides ask the same one."""
    return np.sin(1.3 * x + t / 400) * 0.8 + 0.1 * np.cos(x * x / 4)


def diffusers_result(scheduler, start, steps, draws, monkeypatch):
    """x after diffusers' own loop, and the noise level it starts from, in float64 from unit noise `start`."""
    import torch

    module = type(scheduler).__module__
    queue = iter(draws)
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.tensor(next(queue)), raising=False)
    scheduler.set_timesteps(steps)
    x = torch.tensor(start) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t).numpy()
        x = scheduler.step(torch.tensor(output(scaled, float(t))), t, x).prev_sample
    return x.numpy()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("schedule", ["cosine", "scaled_linear"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddim", "DDIMScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
    ],
)
def test_diffusers_takes_the_same_steps(name, kind, schedule, prediction, steps, monkeypatch):
    """Where both visit the same levels: trailing, whose timesteps are whole numbers.

    With linspace diffusers' Euler and Heun interpolate sigma between two levels. Its DDIM takes the last step to
    alpha_bar[0] unless told set_alpha_to_one. Its Heun has no limit to what it extrapolates on the cosine schedule's first
    trailing step, where sigma/alpha falls a thousandfold; leading has no such step where there are enough of them.
    """
    import diffusers

    spacing, steps = ("leading", 4 * steps) if (name, schedule) == ("heun", "cosine") else ("trailing", steps)
    settings = {"beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(schedule, schedule), "timestep_spacing": spacing}
    settings |= {"prediction_type": {"v": "v_prediction"}.get(prediction, prediction)}
    settings |= {"beta_start": 0.00085, "beta_end": 0.012} if schedule == "scaled_linear" else {}
    settings |= {"clip_sample": False, "set_alpha_to_one": True} if name == "ddim" else {}
    settings |= {"steps_offset": 1} if spacing == "leading" else {}
    settings |= {"final_sigmas_type": "zero"} if name in ("dpmpp_2m", "euler") else {}
    scheduler = getattr(diffusers, kind)(**settings)
    start, *draws = np.random.default_rng(3).standard_normal((steps + 1, 64))

    levels = sampling_levels(SCHEDULES[schedule](1000), steps, spacing)
    # Euler's and Heun's x is ours over alpha, and their start sigma/alpha times noise: ours is sigma times noise.
    # DDIM, DPM-Solver++ and anything leading start from unit noise, as if the noisiest level had no signal at all.
    scale = 1.0 if name in ("ddim", "dpmpp_2m") or spacing == "leading" else levels[0].sigma
    to_x0 = PREDICTIONS[prediction].to_x0
    ours = solve(
        name,
        lambda x, level: to_x0(output(x, level.t), x, level.alpha, level.sigma),
        start * scale,
        levels,
        draws.__getitem__,
    )
    theirs = diffusers_result(scheduler, start, steps, draws, monkeypatch)
    rounding = 3e-4 if schedule == "cosine" and name.startswith("euler") else 1e-4  # x times 20,000 and back in float32
    assert np.abs(ours - theirs).max() <= rounding * np.abs(theirs).max()


def test_levels_of_the_paths_fall():
    for path in PATHS.values():
        levels = [path(1 - i / 10) for i in range(11)]
        assert all(log_snr(a) < log_snr(b) for a, b in pairwise(levels))
