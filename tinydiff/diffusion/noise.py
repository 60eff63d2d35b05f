"""Stateless randomness: every random number is a function of (seed, stream, step, sample), so no state is ever saved.

Philox is a counter-based generator (Salmon et al. 2011): its key is (seed, stream), and step and sample select disjoint
blocks of its counter.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def keyed(seed: int, stream: str, step: int = 0, sample: int = 0) -> np.random.Generator:
    """A generator for one purpose (`stream`), step and sample. Equal arguments give equal numbers on every machine."""
    key = np.array([seed % 2**64, zlib.crc32(stream.encode())], np.uint64)
    counter = np.array([0, 0, sample % 2**64, step % 2**64], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


Seed = int | tuple[int, int, float]  # a seed, or (from, to, share): noise between that of two seeds


def normal(seeds: Sequence[Seed], shape: tuple[int, ...], step: int = 0) -> np.ndarray:
    """Standard normal float32 (len(seeds), *shape), a generator per image, so that no image depends on its batch."""

    def draw(seed: Seed) -> np.ndarray:
        if isinstance(seed, tuple):
            return slerp(draw(seed[0]), draw(seed[1]), seed[2])
        # step 0 is the initial noise; step i of a stochastic sampler uses step i + 1
        return keyed(seed, "sampling", step).standard_normal(shape, np.float32)

    return np.stack([draw(seed) for seed in seeds])


def slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """The point a `share` of the way from a to b on a great circle (Shoemake 1985), which keeps the norm of noise."""
    cosine = float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    angle = float(np.arccos(np.clip(cosine, -1, 1)))
    if np.sin(angle) < 1e-6:
        return a + (b - a) * np.float32(share)
    weights = np.sin((1 - share) * angle) / np.sin(angle), np.sin(share * angle) / np.sin(angle)
    return a * np.float32(weights[0]) + b * np.float32(weights[1])
