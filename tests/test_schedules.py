"""Noise levels against published numbers, closed forms and diffusers' tables."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydiff.diffusion.schedules import (
    CLEAN,
    INDICES,
    NOISIEST,
    RHOS,
    SCHEDULES,
    SPACINGS,
    Level,
    beta_quantile,
    edm,
    flow,
    from_betas,
    linear,
    log_snr,
    sampling_levels,
    scaled_linear,
    zero_terminal_snr,
)

VARIANCE_PRESERVING = sorted(set(SCHEDULES) - {"flow"})


def alpha_bar(levels):
    return np.array([level.alpha**2 for level in levels])


def test_scaled_linear_is_that_of_stable_diffusion():
    found = alpha_bar(scaled_linear())
    assert found[[0, 500, 999]] == pytest.approx([0.99915, 0.27633268, 0.00466010], rel=1e-6)


def test_linear_is_that_of_ddpm():
    found = alpha_bar(linear())
    assert found[0] == pytest.approx(0.9999) and found[999] == pytest.approx(4.0358e-5, rel=1e-4)


def test_cosine_is_the_closed_form_until_the_cap():
    u = (np.arange(1, 1000) / 1000 + 0.008) / 1.008 * math.pi / 2
    closed = np.cos(u) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert alpha_bar(SCHEDULES["cosine"](1000))[:999] == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_preserving(name):
    for level in SCHEDULES[name](1000):
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-12)


def test_flow_is_a_straight_line():
    for t, level in enumerate(SCHEDULES["flow"](1000)):
        assert (level.alpha + level.sigma, level.sigma) == pytest.approx((1, (t + 1) / 1000), abs=1e-15)


@pytest.mark.parametrize("count", [10, 999, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_noisier_with_time_and_plain_floats(name, count):
    levels = SCHEDULES[name](count)
    assert [level.t for level in levels] == list(range(count))
    assert all(a.alpha > b.alpha and a.sigma < b.sigma for a, b in pairwise(levels))
    assert all(type(value) is float for level in levels for value in level)  # np.float64 would promote float32 arrays


def test_one_beta():
    assert from_betas([0.36])[0] == pytest.approx((0.8, 0.6, 0.0))


def test_spacings_in_closed_form():
    assert INDICES["leading"](1000, 50) == list(range(981, 0, -20))
    assert INDICES["leading"](1000, 50, 0) == list(range(980, -1, -20))
    assert INDICES["trailing"](1000, 50) == list(range(999, 0, -20))
    assert INDICES["linspace"](1000, 4) == [999, 666, 333, 0]
    assert INDICES["linspace"](1000, 1) == INDICES["trailing"](1000, 1) == [999]


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    spacing=st.sampled_from(sorted(SPACINGS)),
    count=st.integers(10, 1000),
    share=st.floats(0, 1),
)
def test_sampling_goes_down_to_the_clean_level(name, spacing, count, share):
    steps = max(1, round(share * count))
    schedule = SCHEDULES[name](count)
    levels = sampling_levels(schedule, steps, spacing)
    assert len(levels) == steps + 1 and levels[-1] == CLEAN == (1, 0, 0)
    assert spacing not in INDICES or set(levels[:-1]) <= set(schedule)
    pairs = list(pairwise(levels))
    assert all(a.sigma >= b.sigma and a.alpha <= b.alpha for a, b in pairs)
    assert not any(a == b for a, b in pairs)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_between_lie_on_the_line(name):
    """`at` gives back every training level, and between two of them one of the same family, at a time between theirs."""
    schedule = SCHEDULES[name](100)
    for here, there in pairwise(level for level in schedule if level.alpha > 0):
        assert schedule.at(log_snr(here)) == pytest.approx(here, abs=1e-9)
        middle = schedule.at((log_snr(here) + log_snr(there)) / 2)
        assert log_snr(middle) == pytest.approx((log_snr(here) + log_snr(there)) / 2)
        assert middle.t == pytest.approx((here.t + there.t) / 2)
        size = middle.alpha + middle.sigma if name == "flow" else middle.alpha**2 + middle.sigma**2
        assert size == pytest.approx(1)
    assert schedule.at(30.0).t == schedule[0].t and schedule.at(-30.0).t >= schedule[-2].t


def test_zero_terminal_snr():
    levels = zero_terminal_snr(scaled_linear())
    assert levels[-1] == Level(0.0, 1.0, 999.0) and levels[0] == pytest.approx(scaled_linear()[0])
    before = np.diff([level.alpha for level in scaled_linear()])
    after = np.diff([level.alpha for level in levels])
    np.testing.assert_allclose(after / before, after[0] / before[0])  # only shifted and scaled
    assert all(math.isfinite(v) for level in sampling_levels(levels, 20, "karras") for v in level)


def test_flow_shift_multiplies_rho():
    for level, shifted in zip(flow(50)[:-1], flow(50, 3.0)[:-1], strict=True):
        assert log_snr(level) - log_snr(shifted) == pytest.approx(math.log(3))
        assert shifted.t == pytest.approx(shifted.sigma * 50 - 1)


def test_edm_levels():
    rhos = [level.sigma / level.alpha for level in edm(5)]
    assert rhos == pytest.approx([0.002, 0.1698, 2.5152, 17.5278, 80.0], rel=1e-3)  # EDM's own five, sigma_i of eq. 5


def test_respacing_in_closed_form():
    for name, roots in (("karras", lambda r: r ** (1 / 7)), ("exponential", math.log), ("log_snr", math.log)):
        rhos = [roots(level.sigma / level.alpha) for level in sampling_levels(scaled_linear(), 9, name)[:-1]]
        np.testing.assert_allclose(np.diff(rhos), np.diff(rhos)[0])
    for name in RHOS:
        levels = sampling_levels(scaled_linear(), 9, name)
        assert levels[0] == pytest.approx(scaled_linear()[-1], abs=1e-6)
        assert levels[-2] == pytest.approx(scaled_linear()[0], abs=1e-6)
    assert log_snr(sampling_levels(SCHEDULES["cosine"](1000), 9, "karras")[0]) == pytest.approx(NOISIEST)


@given(st.floats(1e-4, 1 - 1e-4), st.floats(0.5, 3))
def test_beta_quantiles(u, a):
    x = beta_quantile(u, a)
    assert 0 <= x <= 1 and beta_quantile(1 - u, a) == pytest.approx(1 - x, abs=1e-9)
    angle = np.linspace(0, math.asin(math.sqrt(x)), 20_001)  # t = sin² makes the density smooth enough for a sum
    whole = np.linspace(0, math.pi / 2, 20_001)
    area = [np.trapezoid((np.sin(v) * np.cos(v)) ** (2 * a - 1), v) for v in (angle[1:], whole[1:-1])]
    assert area[0] / area[1] == pytest.approx(u, abs=2e-3)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_zero_terminal_snr_is_that_of_diffusers():
    from diffusers import DDIMScheduler

    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    table = DDIMScheduler(**config, rescale_betas_zero_snr=True).alphas_cumprod.double().numpy()
    assert alpha_bar(zero_terminal_snr(scaled_linear())) == pytest.approx(table, rel=2e-4, abs=1e-7)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_betas_are_those_of_diffusers(ours, theirs):
    from diffusers import DDIMScheduler

    table = DDIMScheduler(beta_schedule=theirs).alphas_cumprod.double().numpy()
    assert alpha_bar(SCHEDULES[ours](1000)) == pytest.approx(table, rel=2e-4)  # theirs is a float32 product


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [2, 4, 5, 10, 20, 25, 50, 100, 250])
@pytest.mark.parametrize("spacing", INDICES)
def test_spacings_are_those_of_diffusers(spacing, steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    assert INDICES[spacing](1000, steps) == scheduler.timesteps.tolist()
