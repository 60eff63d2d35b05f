"""Distances between two sets of pictures, by their feature vectors (N, D), and between two pictures: numpy in float64.

It knows neither the network that the vectors come from nor the model that drew the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

BLOCK = 1024  # rows of distances that are held at once
ROUNDING = 1e-10  # squared distances below this share of the vectors' squared lengths are 0
TIE = 1 + 1e-9  # equal distances, rounded differently
COPY_RATE = 0.05  # share of the training images that would be called copies of another one


# ---- Gaussians -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """A mean (D,) and a factor L (r, D) of the covariance, which is L'L."""

    mean: np.ndarray
    factor: np.ndarray


Set = np.ndarray | tuple[np.ndarray, np.ndarray] | Gaussian


def gaussian(given: Set) -> Gaussian:
    """Of vectors (N, D), N > 1, by their mean and unbiased covariance; or of a pair (mean, covariance)."""
    if isinstance(given, Gaussian):
        return given
    if isinstance(given, tuple):
        mean, covariance = (np.asarray(part, np.float64) for part in given)
        values, vectors = np.linalg.eigh(covariance)
        return Gaussian(mean, np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)
    x = np.asarray(given, np.float64)
    mean = x.mean(0)
    factor = (x - mean) / np.sqrt(len(x) - 1)  # (N, D)
    return Gaussian(mean, np.asarray(np.linalg.qr(factor, "r")) if len(x) > x.shape[1] else factor)


def frechet(a: Set, b: Set) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982, equation 4; the FID of Heusel et al. 2017).

    |mean_a - mean_b|² + tr(A + B - 2 (AB)^½). For A = K'K and B = L'L the eigenvalues of AB are the squared singular values
    of KL', so no matrix root is taken, and sets of fewer vectors than dimensions lose no digits.
    """
    p, q = gaussian(a), gaussian(b)
    traces = np.square(p.factor).sum() + np.square(q.factor).sum()
    root = np.linalg.svd(p.factor @ q.factor.T, compute_uv=False).sum()
    return float(np.square(p.mean - q.mean).sum() + traces - 2 * root)


# ---- kernels -------------------------------------------------------------------------------------------------------


def kernel_distance(
    a: np.ndarray, b: np.ndarray, seed: int = 0, subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """Mean and deviation of `mmd` over random subsets (the KID of Bińkowski et al. 2018, section 4).

    A subset has `size` vectors, or half of the smaller set if that is less.
    """
    rng, size = np.random.default_rng(seed), max(2, min(size, len(a) // 2, len(b) // 2))
    values = [mmd(*(x[rng.choice(len(x), size, replace=False)] for x in (a, b))) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, equation 3) by the kernel (x·y / D + 1)³."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def within(x: np.ndarray) -> float:
        k = _kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * _kernel(a, b).mean())


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


# ---- nearest neighbours --------------------------------------------------------------------------------------------


def precision_recall(real: np.ndarray, drawn: np.ndarray, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Which drawings lie among the real pictures and which real ones among the drawings: bool (drawn,), (real,).

    Their means are precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2): a picture is among others when it is
    no farther from one of them than that one's k-th nearest neighbour is. Each set has more than k.
    """
    return _within(drawn, real, k), _within(real, drawn, k)


def _within(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Which of `a` lie in the ball of any of `b`: bool (N,)."""
    radii = np.concatenate([np.partition(rows, k - 1, axis=1)[:, k - 1] for rows in _others(b)])
    return np.concatenate([(rows <= radii * TIE).any(1) for rows in _blocks(a, b)])


def copies(drawn: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, float]:
    """Which drawings are copies of a training image, bool (drawn,), and how surely drawings lie too near to them, z.

    Both compare the distance of a drawing to its nearest training image with that of training images to their nearest
    other one, which is what an unseen image of the same kind would have. A copy is nearer than all but 5 % of those are;
    of unseen images 5 % would be called copies too. z is C_T of Meehan et al. 2020 (section 3.1), the Mann-Whitney statistic in
    standard deviations: far below 0 where drawings copy, near 0 of unseen images, above 0 where drawings are unlike all.
    """
    near = np.concatenate([rows.min(1) for rows in _blocks(drawn, training)])
    usual = np.concatenate([rows.min(1) for rows in _others(training)])
    return near <= np.quantile(usual, COPY_RATE), mann_whitney(near, usual)


def mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    """The U statistic of `a` over `b`, in standard deviations from its mean where both are alike; ties corrected."""
    both, n, m = np.concatenate([a, b]), len(a), len(b)
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1, equal values share the mean of theirs
    u = ranks[:n].sum() - n * (n + 1) / 2
    ties = (counts**3 - counts).sum() / ((n + m) * (n + m - 1))
    return float((u - n * m / 2) / max(np.sqrt(n * m / 12 * (n + m + 1 - ties)), 1e-12))


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances of some of `a` at a time to all of `b`: (at most BLOCK, M). What is only rounding is 0."""
    middle = np.mean(b, axis=0, dtype=np.float64)
    b = b - middle
    lengths = np.square(b).sum(1)
    for start in range(0, len(a), BLOCK):
        part = a[start : start + BLOCK] - middle
        sums = np.square(part).sum(1)[:, None] + lengths
        rows = sums - 2 * (part @ b.T)
        yield np.where(rows > ROUNDING * sums, rows, 0.0)


def _others(a: np.ndarray) -> Iterator[np.ndarray]:
    """The blocks of a set's distances to itself, each vector infinitely far from itself."""
    for number, rows in enumerate(_blocks(a, a)):
        own = np.arange(len(rows))
        rows[own, number * BLOCK + own] = np.inf
        yield rows


# ---- classes and pixels --------------------------------------------------------------------------------------------


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Mean and deviation over `splits` parts, in order, of exp E[KL(p(y|x) || p(y))] (Salimans et al. 2016, section 4)."""
    x = np.asarray(logits, np.float64)
    log_p = x - np.logaddexp.reduce(x, axis=1, keepdims=True)  # (N, classes)
    scores = []
    for part in np.array_split(log_p, min(splits, len(x))):
        marginal = np.logaddexp.reduce(part, axis=0) - np.log(len(part))
        scores.append(np.exp((np.exp(part) * (part - marginal)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def decibels(error: float) -> float:
    """The peak signal-to-noise ratio in dB of a mean squared error of values that span 2."""
    return 10 * math.log10(4 / max(error, 1e-12))


def ssim(a: np.ndarray, b: np.ndarray, span: float = 1.0) -> np.ndarray:
    """Structural similarity of each pair of images (B, C, H, W) of values from 0 to `span`, mean over channels: (B,).

    Wang et al. 2004, equation 13, by a Gaussian window of 11 pixels and deviation 1.5, where it lies inside the image;
    images narrower than 11 pixels get the widest odd window that does.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    radius = min(5, (min(a.shape[-2:]) - 1) // 2)
    window = np.exp(-0.5 * (np.arange(-radius, radius + 1) / 1.5) ** 2)
    window /= window.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in (-2, -1):
            x = sliding_window_view(x, len(window), axis) @ window
        return x

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))
