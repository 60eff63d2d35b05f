"""The warning of overfitting, on simulated curves: it is given where there is any, and not on noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff.charts import Series
from tinydiff.overfitting import overfitting, rises

LOOK, RUNS = 100, 60


def series(steps: np.ndarray, values: np.ndarray) -> Series:
    made = Series()
    for step, value in zip(steps, values, strict=True):
        made.add(step, value)
    return made


def measured(held: np.ndarray, trained: np.ndarray, error: float = 0.0, noise: float = 0.03, seed: int = 0) -> dict:
    """Metrics of a run: a held-out loss each look, a training loss at each look's end between which it is straight."""
    looks, steps = LOOK * np.arange(1, len(held) + 1), np.arange(10, LOOK * len(held) + 1, 10)
    loss = np.interp(steps, looks, trained) + noise * np.random.default_rng(seed).standard_normal(len(steps))
    errors = series(looks, np.full(len(held), error))
    return {"held_out_loss": series(looks, held), "held_out_error": errors, "loss": series(steps, loss)}


def first_alarm(held: np.ndarray, trained: np.ndarray, error: float = 0.0, seed: int = 0) -> int:
    """The look at which a run is warned first; 0 if never."""
    looks = range(1, len(held) + 1)
    return next((k for k in looks if overfitting(measured(held[:k], trained[:k], error, seed=seed), "loss")), 0)


CURVES = {
    "flat": lambda x: 0.3 + 0 * x,
    "falling": lambda x: 0.25 + 0.5 / (1 + 20 * x),
    "falling slowly": lambda x: 0.3 - 0.02 * x,
    "exponential": lambda x: 0.3 + 0.4 * np.exp(-5 * x),
}


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.01, 0.05])
@pytest.mark.parametrize("curve", CURVES)
def test_noise_gives_no_alarm(curve, noise):
    """Of any size, though the training loss falls all the while; of 60 runs of 30 looks none, or one where it is large."""
    x, alarms = np.linspace(0, 1, 30), 0
    for seed in range(RUNS):
        held = CURVES[curve](x) + noise * np.random.default_rng(seed).standard_normal(30)
        alarms += bool(first_alarm(held, 0.5 - 0.3 * x, seed=seed))
    assert alarms <= (1 if noise > 0.005 else 0)


def overfit(looks: int, noise: float, seed: int) -> np.ndarray:
    """Falls to its lowest at about a third, then rises by a third of it."""
    x = np.linspace(0, 1, looks)
    noise = noise * np.random.default_rng(seed).standard_normal(looks)
    return 0.25 + 0.3 * np.exp(-8 * x) + 0.15 * np.maximum(0, x - 0.3) + noise


@pytest.mark.parametrize("looks", [12, 20, 40])
def test_overfitting_is_found_before_the_run_ends(looks):
    trained = np.linspace(0.5, 0.1, looks)
    alarms = [first_alarm(overfit(looks, 0.003, seed), trained, 0.004, seed) for seed in range(20)]
    found = [look for look in alarms if look]
    assert len(found) >= (18 if looks == 12 else 20) and np.mean(found) < 0.95 * looks
    assert min(found) > looks * 0.4  # and not before it begins


def test_a_training_loss_that_does_not_fall_is_no_overfitting():
    """What rises together has diverged, or the data have changed."""
    held = overfit(20, 0.001, 0)
    assert first_alarm(held, np.linspace(0.5, 0.1, 20)) and not first_alarm(held, np.full(20, 0.3))
    assert not first_alarm(held, np.linspace(0.3, 0.6, 20))


def test_few_held_out_images_prove_little():
    held = overfit(20, 0.001, 0)
    assert rises(held, 0.01) and not rises(held, 0.06)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=40))
def test_a_loss_that_only_falls_never_alarms(values):
    assert not rises(np.sort(values)[::-1], 0.0)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=20), st.floats(0, 1), st.sampled_from([0.25, 4.0, 1024.0]))
def test_the_unit_of_the_loss_does_not_matter(values, error, scale):
    held = np.array(values)
    assert rises(held, error) == rises(held * scale, error * scale)


def test_the_sentence_has_the_figures_and_what_helps():
    held = np.array([0.5, 0.4, 0.3, 0.32, 0.36, 0.4, 0.45])
    text = overfitting(measured(held, np.linspace(0.5, 0.1, 7), noise=0.001), "loss")
    assert "lowest at step 300, 0.3, and is 0.45" in text and "\n" not in text
    for fix in ("train.keep_best=true", "fewer steps", "more images", "data.flip=true", "network smaller"):
        assert fix in text


@pytest.mark.parametrize("missing", ["held_out_loss", "loss", "held_out_error"])
def test_what_was_not_measured_gives_no_alarm_and_no_error(missing):
    metrics = measured(overfit(20, 0.001, 0), np.linspace(0.5, 0.1, 20))
    del metrics[missing]
    assert bool(overfitting(metrics, "loss")) == (missing == "held_out_error")
    assert not overfitting({}, "loss")
