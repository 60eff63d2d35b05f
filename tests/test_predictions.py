"""Predictions: inverse pairs, and the derivatives that their papers define them as."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.schedules import SCHEDULES

LEVELS = {name: make(1000) for name, make in SCHEDULES.items()}


numbers = st.lists(st.floats(-10, 10), min_size=3, max_size=3).map(np.array)


@given(st.sampled_from(sorted(PREDICTIONS)), st.sampled_from(sorted(LEVELS)), st.integers(0, 999), numbers, numbers)
def test_x0_comes_back(name, schedule, t, x0, eps):
    alpha, sigma, _ = LEVELS[schedule][t]
    assume(alpha > 0 or name != "epsilon")  # at pure noise eps says nothing of x0
    prediction = PREDICTIONS[name]
    x = alpha * x0 + sigma * eps
    found = prediction.to_x0(prediction.target(x0, eps, alpha, sigma), x, alpha, sigma)
    slack = 1e-14 / alpha if name == "epsilon" else 1e-13  # eps is divided by alpha, and rounding with it
    np.testing.assert_allclose(found, x0, rtol=0, atol=20 * max(slack, 1e-13))


@pytest.mark.parametrize("name", PREDICTIONS)
def test_amplitudes_broadcast_and_float32_stays(name):
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 5, 3, 4, 4)).astype(np.float32)
    alpha, sigma = np.array([[0.9, 0.5, 1, 0.2, 1], [0.3, 0.5, 2, 0.8, 0.1]], np.float32)[:, :, None, None, None]
    whole = PREDICTIONS[name].to_x0(
        PREDICTIONS[name].target(x0, eps, alpha, sigma), alpha * x0 + sigma * eps, alpha, sigma
    )
    assert whole.dtype == np.float32 and PREDICTIONS[name].to_x0(x0, eps, 0.5, 0.5).dtype == np.float32
    np.testing.assert_allclose(whole, x0, atol=1e-5)


def test_v_is_the_derivative_along_the_circle():
    """Salimans & Ho 2022, appendix D: alpha = cos(phi), sigma = sin(phi), v = dx/dphi."""
    x0, eps, phi, h = 0.7, -1.3, 0.4, 1e-6

    def x(angle: float) -> float:
        return math.cos(angle) * x0 + math.sin(angle) * eps

    derivative = (x(phi + h) - x(phi - h)) / (2 * h)
    assert PREDICTIONS["v"].target(x0, eps, math.cos(phi), math.sin(phi)) == pytest.approx(derivative, abs=1e-8)


def test_flow_is_the_derivative_along_the_line():
    """Liu et al. 2022: x = (1 - s) x0 + s eps, u = dx/ds."""
    x0, eps, s, h = 0.7, -1.3, 0.4, 1e-6
    derivative = (((1 - s - h) * x0 + (s + h) * eps) - ((1 - s + h) * x0 + (s - h) * eps)) / (2 * h)
    assert PREDICTIONS["flow"].target(x0, eps, 1 - s, s) == pytest.approx(derivative, abs=1e-8)


def test_the_simple_two():
    assert PREDICTIONS["epsilon"].target(2.0, 3.0, 0.6, 0.8) == 3.0
    assert PREDICTIONS["sample"].target(2.0, 3.0, 0.6, 0.8) == 2.0
    assert PREDICTIONS["sample"].to_x0(2.0, 3.0, 0.6, 0.8) == 2.0
