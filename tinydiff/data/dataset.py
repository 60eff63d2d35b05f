"""From a source of captioned images to what a training step reads: keyed order, augmentation, captions.

It knows sources and configuration, no network. Every choice is a function of (seed, step, position in the batch).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinydiff import images
from tinydiff.config import Data
from tinydiff.diffusion.noise import keyed

PIXEL_CACHE_BYTES = 2 << 30


class Source(Protocol):
    """Captioned images, by index."""

    skipped: list[tuple[Any, str]]

    def __len__(self) -> int: ...
    def image(self, i: int) -> np.ndarray: ...
    def captions(self, i: int) -> list[str]: ...
    def weight(self, i: int) -> float: ...
    def identity(self, i: int) -> str: ...
    def fingerprint(self) -> str: ...


def open_source(data: Data, seed: int = 0) -> Source:
    """The source that `data.path` names: the built-in shapes, or a folder."""
    if data.path == "shapes":
        from tinydiff.data.shapes import ShapesSource

        return ShapesSource(data.resolution, seed, data.samples)
    from tinydiff.data.folder import FolderSource

    return FolderSource(Path(data.path), data.background, data.max_bad_fraction)


class Order:
    """Which image comes n-th: each epoch a keyed permutation in which image i appears about `weight(i)` times.

    Copies within an epoch are systematic samples of the cumulative weights, so equal weights mean each image once.
    """

    def __init__(self, weights: np.ndarray, seed: int):
        self.ends, self.seed = np.cumsum(weights), seed
        self.length = max(1, round(float(self.ends[-1] / weights.max())))
        self.epoch = lru_cache(2)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        rng = keyed(self.seed, "order", epoch)
        points = (np.arange(self.length) + rng.random()) * (self.ends[-1] / self.length)
        return rng.permutation(np.minimum(np.searchsorted(self.ends, points, side="right"), len(self.ends) - 1))

    def __call__(self, n: int) -> int:
        return int(self.epoch(n // self.length)[n % self.length])


class Images:
    """Square uint8 images of a source at one resolution, kept in memory while they fit."""

    def __init__(self, source: Source, data: Data):
        self.source, self.data = source, data
        self.cache: dict[int, np.ndarray] | None = None
        if data.path != "shapes" and len(source) * data.resolution**2 * 3 <= PIXEL_CACHE_BYTES:
            self.cache = {}

    def __len__(self) -> int:
        return len(self.source) * (2 if self.data.flip else 1)

    def __getitem__(self, i: int) -> np.ndarray:
        """uint8 (resolution, resolution, 3); the second half of the indices are mirror images of the first."""
        base = i % len(self.source)
        image = self.cache.get(base) if self.cache is not None else None
        if image is None:
            image = images.fit(self.source.image(base), self.data.resolution, background=self.data.background)
            if self.cache is not None:
                self.cache[base] = image
        return image if i == base else image[:, ::-1]

    def weights(self) -> np.ndarray:
        one = np.array([self.source.weight(i) for i in range(len(self.source))], np.float64)
        return np.tile(one, 2) if self.data.flip else one
