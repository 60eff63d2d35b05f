"""Distances between sets of pictures: scipy's matrix root, scikit-image, closed forms and plain loops beside each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from tinydiff.measure import distances as d


def vectors(count: int, width: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Correlated, of very unequal variances, as features are: (count, width)."""
    mixing = np.random.default_rng(99).standard_normal((width, width)) * np.logspace(0, -3, width)
    return np.random.default_rng(seed).standard_normal((count, width)) @ mixing + shift


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real))


def by_gram(a: np.ndarray, b: np.ndarray) -> float:
    """For fewer vectors than dimensions, where the root of a singular product is badly conditioned."""
    x, y = (v - v.mean(0) for v in (a, b))
    squares = linalg.eigvals((x @ y.T) @ (y @ x.T) / ((len(x) - 1) * (len(y) - 1))).real
    traces = sum(np.square(v).sum() / (len(v) - 1) for v in (x, y))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + traces - 2 * np.sqrt(np.maximum(squares, 0)).sum())


@pytest.mark.parametrize(("n", "m", "width"), [(300, 200, 20), (300, 500, 64), (65, 90, 64)])
def test_frechet_equals_scipys_matrix_root(n: int, m: int, width: int) -> None:
    a, b = vectors(n, width), vectors(m, width, 1, 0.3)
    assert d.frechet(a, b) == pytest.approx(by_scipy(a, b), rel=1e-6)
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)]
    assert d.frechet(*moments) == pytest.approx(by_scipy(a, b), rel=1e-6)
    assert d.frechet(a, moments[1]) == pytest.approx(d.frechet(d.gaussian(a), b), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "width"), [(20, 30, 64), (40, 300, 64), (300, 40, 64), (30, 20, 2048)])
def test_frechet_of_fewer_vectors_than_dimensions(n: int, m: int, width: int) -> None:
    a = np.random.default_rng(0).standard_normal((n, width))
    b = np.random.default_rng(1).standard_normal((m, width)) * 2 + 1
    assert d.frechet(a, b) == pytest.approx(by_gram(a, b), rel=1e-6)


def test_frechet_closed_forms() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.uniform(0.1, 3, (2, 50))
    shift = rng.standard_normal(50)
    turn = linalg.qr(rng.standard_normal((50, 50)))[0]
    one, other = (turn * p) @ turn.T, (turn * q) @ turn.T  # they commute
    expected = shift @ shift + np.square(np.sqrt(p) - np.sqrt(q)).sum()
    assert d.frechet((np.zeros(50), one), (shift, other)) == pytest.approx(expected, rel=1e-9)
    x = vectors(100, 30)
    assert abs(d.frechet(x, x)) < 1e-9 * np.square(x).sum()
    assert d.frechet(x * 3, x * 3 + 3) == pytest.approx(9 * 30)


def test_frechet_of_two_halves_is_near_its_bias_and_grows_with_shift() -> None:
    """Halves of N(0, I): the means are 2 D / N apart; to second order the rest is |A - B|² / 4 = (D² + D) / (2 N - 2)."""
    width, count = 32, 400
    halves = [d.frechet(*np.random.default_rng(seed).standard_normal((2, count, width))) for seed in range(20)]
    bias = 2 * width / count + (width**2 + width) / (2 * count - 2)
    assert np.mean(halves) == pytest.approx(bias, rel=0.05)
    a, b = np.random.default_rng(1).standard_normal((2, count, width))
    far = [d.frechet(a, b + shift) for shift in (0, 0.1, 0.2, 0.5, 1, 3)]
    wide = [d.frechet(a, b * scale) for scale in (1, 1.2, 1.5, 2, 4)]
    assert far == sorted(far) and wide == sorted(wide)
    assert far[-1] == pytest.approx(9 * width, rel=0.1)


def test_mmd_by_loops_and_kernel_distance_of_equals_is_unbiased() -> None:
    a, b = vectors(9, 5), vectors(7, 5, 1, 0.5)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / 5 + 1) ** 3

    within = [
        sum(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    between = sum(k(x, y) for x in a for y in b) / (len(a) * len(b))
    assert d.mmd(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-9)
    zeros = [d.mmd(*np.random.default_rng(seed).standard_normal((2, 40, 6))) for seed in range(300)]
    assert abs(np.mean(zeros)) < 3 * np.std(zeros) / np.sqrt(300)
    assert min(zeros) < 0
    p, q = np.random.default_rng(0).standard_normal((2, 400, 6))
    mean, deviation = d.kernel_distance(p, q + 1)
    assert (mean, deviation) == d.kernel_distance(p, q + 1) != d.kernel_distance(p, q + 1, seed=1)
    assert mean == pytest.approx(d.mmd(p, q + 1), rel=0.1)
    assert abs(d.kernel_distance(p, q)[0]) < d.kernel_distance(p, q)[1] < 0.2 * mean


def manifold(a: np.ndarray, b: np.ndarray, k: int) -> list[bool]:
    """Which of a lie within the k-th neighbour's distance of any of b."""
    inside = []
    for x in a:
        hits = []
        for i, y in enumerate(b):
            radius = sorted(np.linalg.norm(y - z) for j, z in enumerate(b) if j != i)[k - 1]
            hits.append(np.linalg.norm(x - y) <= radius)
        inside.append(any(hits))
    return inside


@given(
    st.integers(4, 12), st.integers(4, 12), st.integers(1, 3), st.floats(0, 3), st.integers(1, 5), st.integers(0, 999)
)
@settings(max_examples=40, deadline=None)
def test_precision_and_recall_equal_loops(n: int, m: int, k: int, shift: float, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    real, drawn = rng.standard_normal((n, 4)) + 100, rng.standard_normal((m, 4)) + 100 + shift
    whole, d.BLOCK = d.BLOCK, block
    try:
        precision, recall = d.precision_recall(real, drawn, k)
    finally:
        d.BLOCK = whole
    assert precision.tolist() == manifold(drawn, real, k)
    assert recall.tolist() == manifold(real, drawn, k)


def test_precision_and_recall_of_what_is_missing() -> None:
    """One of two clusters drawn: all is precise, half is recalled; and repeated vectors lie among themselves."""
    rng = np.random.default_rng(0)
    one, two, drawn = (rng.uniform(size=(200, 2)) + shift for shift in (0, 50, 0))
    precision, recall = d.precision_recall(np.concatenate([one, two]), drawn)
    assert precision.mean() > 0.95 and recall[:200].mean() > 0.95 and not recall[200:].any()
    same = np.repeat(vectors(20, 8) + 1000, 5, axis=0)
    assert all(part.all() for part in d.precision_recall(same, same[::-1].copy()))


def test_copies_are_told_from_new_pictures() -> None:
    training, new, near = (np.random.default_rng(seed).standard_normal((400, 6)) for seed in range(3))
    memorised = training[:100] + 0.01 * near[:100]
    flags, z = d.copies(memorised, training)
    assert flags.all() and z < -10
    flags, z = d.copies(new, training)
    assert flags.mean() == pytest.approx(0.05, abs=0.03) and abs(z) < 3
    mixed = np.concatenate([memorised, new[:300]])
    flags, z = d.copies(mixed, training)
    assert flags[:100].all() and flags[100:].mean() < 0.1 and z < -5
    assert d.copies(memorised[:3].astype(np.float32), np.repeat(training, 2, axis=0))[0].sum() == 0  # among equal pairs
    assert d.copies(training[:3].astype(np.float32), np.repeat(training, 2, axis=0))[0].all()
    flags, z = d.copies(new * 4, training)
    assert flags.mean() < 0.02 and z > 10


@pytest.mark.parametrize("levels", [3, 40, 10**6])
def test_mann_whitney_equals_scipy(levels: int) -> None:
    rng = np.random.default_rng(levels)
    a, b = rng.integers(0, levels, 60) / 7, rng.integers(0, levels, 90) / 7
    theirs = stats.mannwhitneyu(a, b, alternative="less", method="asymptotic", use_continuity=False)
    assert stats.norm.cdf(d.mann_whitney(a, b)) == pytest.approx(theirs.pvalue, rel=1e-9)
    assert d.mann_whitney(np.zeros(5), np.zeros(6)) == 0


def test_inception_score_closed_forms() -> None:
    sure = 50 * np.eye(10)[np.arange(200) % 10]
    assert d.inception_score(sure) == pytest.approx((10, 0))
    assert d.inception_score(np.zeros((50, 10))) == pytest.approx((1, 0))
    assert d.inception_score(sure * 100) == pytest.approx((10, 0))  # probabilities that are 0 in floating point
    logits = np.random.default_rng(0).standard_normal((30, 7))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = [np.exp(stats.entropy(part, part.mean(0)[None], axis=1).mean()) for part in np.split(p, 3)]
    assert d.inception_score(logits, 3) == pytest.approx((np.mean(scores), np.std(scores)))


@given(st.integers(11, 30), st.integers(11, 30), st.integers(0, 999), st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_ssim_equals_scikit_image(height: int, width: int, seed: int, share: float) -> None:
    from skimage.metrics import structural_similarity

    a, noise = np.random.default_rng(seed).uniform(size=(2, 2, 3, height, width))
    b = (1 - share) * a + share * noise
    theirs = [
        structural_similarity(
            x, y, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert d.ssim(a, b).tolist() == pytest.approx(theirs, abs=1e-6)


def test_ssim_of_small_images_and_equals() -> None:
    a = np.random.default_rng(0).uniform(size=(2, 3, 8, 5))
    assert (d.ssim(a, a / 2) < d.ssim(a, a * 0.9)).all()
    assert d.ssim(a, a).tolist() == pytest.approx([1, 1])
    assert (d.ssim(a, 1 - a) < 0.1).all()
