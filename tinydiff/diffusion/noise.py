"""Keyed randomness: every random number is a function of (seed, stream, step, sample), so nothing has to be saved.

Philox is a counter-based generator (Salmon et al. 2011): the key is (seed, stream) and step and sample select disjoint
blocks of its counter.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def keyed(seed: int, stream: str, step: int = 0, sample: int = 0) -> np.random.Generator:
    """A generator for one purpose (`stream`), step and sample; equal arguments give equal numbers on every machine."""
    key = np.array([seed % 2**64, zlib.crc32(stream.encode())], np.uint64)
    counter = np.array([0, 0, sample % 2**64, step % 2**64], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seeds: Sequence[int], shape: tuple[int, ...], step: int = 0) -> np.ndarray:
    """Standard normal float32 (len(seeds), *shape), one generator an image, so that no image depends on its batch.

    Step 0 is the start of sampling; a stochastic sampler's step i draws from step i + 1.
    """
    draws = [keyed(seed, "sampling", step).standard_normal(shape, np.float32) for seed in seeds]
    return np.stack(draws)
