"""Noise levels against published numbers, closed forms and diffusers' tables."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff.diffusion.schedules import CLEAN, SCHEDULES, SPACINGS, from_betas, linear, sampling_levels, scaled_linear

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
    assert SPACINGS["leading"](1000, 50) == list(range(981, 0, -20))
    assert SPACINGS["trailing"](1000, 50) == list(range(999, 0, -20))
    assert SPACINGS["linspace"](1000, 4) == [999, 666, 333, 0]
    assert SPACINGS["linspace"](1000, 1) == SPACINGS["trailing"](1000, 1) == [999]


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
    assert set(levels[:-1]) <= set(schedule)
    pairs = list(pairwise(levels))
    assert all(a.sigma >= b.sigma and a.alpha <= b.alpha for a, b in pairs)
    repeated = sum(a == b for a, b in pairs)
    assert repeated <= (spacing == "leading" and steps == count)  # one past the end is the last one again


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
@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_are_those_of_diffusers(spacing, steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    assert SPACINGS[spacing](1000, steps) == scheduler.timesteps.tolist()
