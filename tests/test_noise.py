"""Keyed noise: a function of its key alone, different for every key, and normal."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff.diffusion.noise import keyed, normal, slerp

NORMALS = [-1.8044724, -0.1972256, -0.4351492]


INTEGERS = [4087722685, 2692386727, 257446835]


seeds = st.integers(0, 2**64 - 1)


def test_published_numbers():
    """These decide what every seed draws: a change of them is a change of every image."""
    assert normal([0], (3,))[0] == pytest.approx(NORMALS, abs=1e-6)
    assert keyed(7, "order", 2, 3).integers(0, 2**32, 3).tolist() == INTEGERS


@given(st.lists(seeds, min_size=1, max_size=5), st.integers(0, 50))
def test_an_image_does_not_depend_on_its_batch(batch, step):
    together = normal(batch, (2, 3), step)
    assert together.shape == (len(batch), 2, 3) and together.dtype == np.float32
    for seed, rows in zip(batch, together, strict=True):
        np.testing.assert_array_equal(rows, normal([seed], (2, 3), step)[0])


@given(st.tuples(seeds, st.sampled_from(["a", "b"]), st.integers(0, 2**63), st.integers(0, 2**63)), st.integers(0, 3))
def test_every_part_of_the_key_matters(key, part):
    other = list(key)
    other[part] = {"a": "b", "b": "a"}[key[1]] if part == 1 else key[part] ^ 1
    first, second = keyed(*key).random(4), keyed(*other).random(4)
    assert (first == keyed(*key).random(4)).all() and (first != second).any()


def test_long_draws_do_not_run_into_the_next_sample():
    long = keyed(1, "x", 0, 0).integers(0, 2**63, 200_000)
    assert not np.isin(keyed(1, "x", 0, 1).integers(0, 2**63, 1000), long).any()
    assert not np.isin(keyed(1, "x", 1, 0).integers(0, 2**63, 1000), long).any()


def test_standard_normal_and_independent():
    draws = normal(range(400), (100,)).astype(np.float64)  # 40,000 numbers: a standard error of 0.005
    assert draws.mean() == pytest.approx(0, abs=0.025) and draws.std() == pytest.approx(1, abs=0.02)
    correlation = np.corrcoef(draws) - np.eye(400)
    assert abs(correlation).max() < 0.6 and correlation.mean() == pytest.approx(0, abs=0.002)


def test_another_process_draws_the_same():
    """Nothing depends on hash randomisation or on what was drawn before."""
    code = "from tinydiff.diffusion.noise import keyed; print(*keyed(5, 'sampling', 1, 2).random(3).tolist())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert list(map(float, run.stdout.split())) == keyed(5, "sampling", 1, 2).random(3).tolist()


def test_between_seeds_noise_stays_noise():
    """The ends of a way are the seeds' own noise; between them every point has the length that noise has."""
    a, b = normal([3], (4, 16, 16)), normal([8], (4, 16, 16))
    np.testing.assert_allclose(normal([(3, 8, 0.0), (3, 8, 1.0)], (4, 16, 16)), np.concatenate([a, b]), atol=1e-6)
    way = normal([(3, 8, share) for share in (0.25, 0.5, 0.75)], (4, 16, 16))
    assert way.dtype == np.float32 and way.std(axis=(1, 2, 3)) == pytest.approx(np.ones(3), abs=0.05)
    angles = [np.arccos(np.vdot(a, x) / np.linalg.norm(a) / np.linalg.norm(x)) for x in [*way, b[0]]]
    np.testing.assert_allclose(np.diff(angles), angles[0], rtol=0.05)  # steps along the circle, all but equal


def test_slerp_of_parallel_vectors_is_a_line():
    a = np.ones((2, 2), np.float32)
    np.testing.assert_allclose(slerp(a, a * 3, 0.5), a * 2)
