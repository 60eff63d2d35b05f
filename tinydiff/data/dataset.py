"""From a source of captioned images to what a training step reads: sizes, keyed order, pixels.

Images of like shape share a bucket, a size they are scaled and cropped to, and a batch is of one bucket. This module knows
sources and configuration, no network. What step s shows is a function of (seed, s).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinydiff import images
from tinydiff.config import Data
from tinydiff.diffusion.noise import keyed
from tinydiff.errors import DataError

PIXEL_CACHE_BYTES = 2 << 30
THREADS = min(8, os.cpu_count() or 1)


class Source(Protocol):
    """Captioned images, by index.

    `size`: (width, height) in pixels. `digest`: 32 hexadecimal digits of a SHA-256 of what the pixels come from, but for
    the background, so the key of a cache holds that too.
    """

    skipped: list[tuple[Any, str]]

    def __len__(self) -> int: ...
    def image(self, i: int) -> np.ndarray: ...
    def captions(self, i: int) -> list[str]: ...
    def weight(self, i: int) -> float: ...
    def size(self, i: int) -> tuple[int, int]: ...
    def digest(self, i: int) -> str: ...
    def identity(self, i: int) -> str: ...
    def fingerprint(self) -> str: ...
    def report(self) -> str: ...


def open_source(data: Data, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> Source:
    """The source that `data.path` names: the built-in shapes, tar shards, or a folder.

    `progress` hears of shards done and shards in all, while those that are new are indexed.
    """
    if data.path == "shapes":
        from tinydiff.data.shapes import ShapesSource

        return ShapesSource(data.resolution, seed, data.samples)
    from tinydiff.data.shards import ShardSource, find_shards

    if find_shards(data.path):
        return ShardSource(data.path, data.background, data.max_bad_fraction, progress=progress)
    from tinydiff.data.folder import FolderSource

    return FolderSource(Path(data.path), data.background, data.max_bad_fraction)


def buckets(resolution: int, max_ratio: float, step: int) -> list[tuple[int, int]]:
    """The sizes (width, height) that images are brought to, narrowest first: multiples of `step` of about equal area.

    For every width the largest height with which the area is at most that of the square of `resolution`, and the same
    turned by 90 degrees, where the longest side is at most `max_ratio` times the shortest. The square is one of them.
    """
    if max_ratio == 1:
        return [(resolution, resolution)]
    area, found = resolution**2, set()
    for width in range(step, int(resolution * max_ratio**0.5) + step, step):
        height = area // width // step * step
        if max(width, height) <= max_ratio * min(width, height):
            found |= {(width, height), (height, width)}
    return sorted(found, key=lambda size: size[0] / size[1])


def nearest(sizes: Sequence[tuple[int, int]], width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Of `sizes`, narrowest first, the one nearest to each image (N,) in the logarithm of width / height: int16 (N,).

    Two sizes meet where the squared ratio is the product of theirs. That is compared without logarithms or quotients,
    which are not the same to the last bit on every machine; an image between two takes the narrower.
    """
    wide, high = width.astype(np.float64) ** 2, height.astype(np.float64) ** 2
    found = np.zeros(len(width), np.int16)
    for (w0, h0), (w1, h1) in pairwise(sizes):
        found += wide * (h0 * h1) > high * (w0 * w1)
    return found


class Stream:
    """Images without end: each epoch a keyed permutation in which image i appears about `weight(i)` times, `ids[i]` to us.

    Copies within an epoch are systematic samples of the cumulative weights, so equal weights mean each image once. Weights
    are positive. `bucket` is part of the key.
    """

    def __init__(self, ids: np.ndarray, weights: np.ndarray, seed: int, bucket: int):
        self.ids, self.ends, self.seed, self.bucket = ids, np.cumsum(weights), seed, bucket
        self.length = max(1, round(float(self.ends[-1] / weights.max())))
        self.epoch = lru_cache(2)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        rng = keyed(self.seed, "order", epoch, self.bucket)
        points = (np.arange(self.length) + rng.random()) * (self.ends[-1] / self.length)
        return rng.permutation(np.minimum(np.searchsorted(self.ends, points, side="right"), len(self.ends) - 1))

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start .. start + count - 1, which may lie in several epochs: (count,)."""
        epochs = range(start // self.length, (start + count - 1) // self.length + 1)
        first = start - epochs.start * self.length
        return self.ids[np.concatenate([self.epoch(e) for e in epochs])[first : first + count]]


class Order:
    """Which images step s shows: `order(s)` is (batch_size,) indices of one bucket, and needs no step before it.

    `weights` (N,) say how often, 0 is never; `bucket` (N,) is each image's bucket. Batches of a bucket are its `Stream` cut
    into pieces, whatever epoch they fall into. Which bucket comes is a keyed permutation in which each has its share of
    the batches, but one at least.
    """

    def __init__(self, weights: np.ndarray, seed: int, bucket: np.ndarray | None = None, batch_size: int = 1):
        drawn = np.flatnonzero(weights > 0)
        assert len(drawn), "no image has a weight"
        kinds = np.zeros(len(drawn), np.int64) if bucket is None else bucket[drawn]
        self.seed, self.batch_size = seed, batch_size
        self.buckets = np.unique(kinds)
        groups = [drawn[kinds == b] for b in self.buckets]
        self.streams = [Stream(ids, weights[ids], seed, int(b)) for ids, b in zip(groups, self.buckets, strict=True)]
        total = float(weights[drawn].sum())
        batches = max(1, round(total / float(weights.max()) / batch_size))
        self.counts = [max(1, round(float(weights[ids].sum()) / total * batches)) for ids in groups]
        self.length = sum(self.counts)
        self.turns = lru_cache(2)(self._turns)

    def _turns(self, epoch: int) -> np.ndarray:
        """Which of the streams each step of an epoch takes from: (length,)."""
        turns = np.repeat(np.arange(len(self.counts), dtype=np.int16), self.counts)
        return keyed(self.seed, "buckets", epoch).permutation(turns)

    def __call__(self, step: int) -> np.ndarray:
        if len(self.streams) == 1:
            return self.streams[0].take(step * self.batch_size, self.batch_size)
        epoch, place = divmod(step, self.length)
        turns = self.turns(epoch)
        which = int(turns[place])
        before = epoch * self.counts[which] + int(np.count_nonzero(turns[:place] == which))
        return self.streams[which].take(before * self.batch_size, self.batch_size)


class Images:
    """uint8 images of a source, each in the size of its bucket, kept in memory while all fit.

    `sizes`: (width, height) of the buckets in use; `bucket` (N,): each image's. With data.flip the second half of the
    indices are the mirror images of the first. `broken`: what could be read no more, by its number in the source, and
    why. Any thread may call.
    """

    def __init__(self, source: Source, data: Data):
        self.source, self.data = source, data
        self.sizes, base = self._assign()
        self.bucket = np.tile(base, 2) if data.flip else base
        self.broken: dict[int, str] = {}
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        area = np.array([w * h for w, h in self.sizes])
        fits = data.path != "shapes" and int(np.bincount(base) @ area) * 3 <= PIXEL_CACHE_BYTES
        self.cache: dict[int, np.ndarray] | None = {} if fits else None

    def _assign(self) -> tuple[list[tuple[int, int]], np.ndarray]:
        """The buckets in use, and which of them each image of the source is in."""
        d, count = self.data, len(self.source)
        sizes = buckets(d.resolution, d.max_aspect_ratio, d.bucket_step)
        if len(sizes) == 1:
            return sizes, np.zeros(count, np.int16)
        width, height = np.array([self.source.size(i) for i in range(count)]).reshape(count, 2).T
        used, bucket = np.unique(nearest(sizes, width, height), return_inverse=True)
        return [sizes[i] for i in used.tolist()], bucket.astype(np.int16)

    def __len__(self) -> int:
        return len(self.bucket)

    def __getitem__(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3). Raises DataError when the image cannot be read."""
        base = i % len(self.source)
        image = self.cache.get(base) if self.cache is not None else None
        if image is None:
            image = images.fit(self.source.image(base), self.sizes[int(self.bucket[base])])
            if self.cache is not None:
                self.cache[base] = image
        return image if i == base else image[:, ::-1]

    def batch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (B, h, w, 3) of indices of one bucket. In place of what cannot be read comes the next image of its bucket.

        Raises DataError when more than data.max_bad_fraction of the source cannot be read, or nothing of a bucket.
        """
        pixels, readable = self.read(indices)
        for row in np.flatnonzero(~readable).tolist():
            pixels[row] = self._instead(int(indices[row]))
        return pixels

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (B, h, w, 3) of indices of one bucket, zero where an image cannot be read, and where it can: bool (B,)."""
        found = self._map([int(i) for i in indices])
        width, height = self.sizes[int(self.bucket[indices[0]])]
        pixels = np.zeros((len(found), height, width, 3), np.uint8)
        for row, image in enumerate(found):
            if image is not None:
                pixels[row] = image
        return pixels, np.array([image is not None for image in found])

    def _map(self, indices: list[int]) -> list[np.ndarray | None]:
        """Each image or None, decoded side by side where there is something to decode: drawing shapes holds Python's lock."""
        kept = self.cache is not None and all(i % len(self.source) in self.cache for i in indices)
        if kept or len(indices) == 1 or THREADS == 1 or self.data.path == "shapes":
            return [self._readable(i) for i in indices]
        with self.lock:
            self.pool = self.pool or ThreadPoolExecutor(THREADS)
        return list(self.pool.map(self._readable, indices))

    def _readable(self, i: int) -> np.ndarray | None:
        """An image, or None; what could not be read once is not tried again."""
        base = i % len(self.source)
        if base in self.broken:
            return None
        try:
            return self[i]
        except DataError as error:
            self.give_up(base, str(error).split("; ")[0])
            return None

    def give_up(self, base: int, reason: str) -> None:
        """Record that an image of the source cannot be read. Raises DataError when there are too many."""
        with self.lock:
            self.broken.setdefault(base, reason)
            if len(self.broken) <= self.data.max_bad_fraction * len(self.source):
                return
            first = ", ".join(list(self.broken.values())[:3])
        share = f"{len(self.broken)} of {len(self.source)} images, over the allowed {self.data.max_bad_fraction:g}"
        raise DataError(f"cannot read {share}: {first}; mend them, or raise data.max_bad_fraction")

    def _instead(self, i: int) -> np.ndarray:
        """The next image of i's bucket that can be read, mirrored if i is."""
        count = len(self.source)
        base, bucket = i % count, int(self.bucket[i])
        others = np.flatnonzero(self.bucket[:count] == bucket)
        for other in np.roll(others, -int(np.searchsorted(others, base)))[1:]:
            if (image := self._readable(int(other) + i - base)) is not None:
                return image
        width, height = self.sizes[bucket]
        raise DataError(f"{self.broken[base]}; nor can any other image of {width}x{height} be read; mend them")

    def weights(self) -> np.ndarray:
        """How often each is drawn, relative to the others: float64 (N,)."""
        count = len(self.source)
        one = np.fromiter(map(self.source.weight, range(count)), np.float64, count)
        return np.tile(one, 2) if self.data.flip else one

    def names(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """What messages call some images."""
        return [self.source.identity(int(i) % len(self.source)) for i in indices]
