"""From a source of captioned images to the pixels of a batch: bucket sizes, the seeded order, decoding.

Images of similar aspect ratio share a bucket: one size that they are scaled and cropped to. A batch is from one bucket,
and the images of step s are a function of (seed, s). This module knows sources and configuration, no network.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinydiff import images
from tinydiff.config import Data
from tinydiff.data.columns import check
from tinydiff.data.held_out import held_out
from tinydiff.diffusion.noise import keyed
from tinydiff.errors import DataError
from tinydiff.system import cut, escaped, shown

PIXEL_CACHE_BYTES = 2 << 30
THREADS = min(8, os.cpu_count() or 1)
GOLDEN = (5**0.5 - 1) / 2


class Source(Protocol):
    """Captioned images by index.

    `size`: (width, height) in pixels. `digest`: 32 hexadecimal digits of a SHA-256 of what the pixels come from. It
    leaves out the background colour, which cache keys add. `skipped`: (name, reason) of what is left out.
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


def open_source(
    data: Data,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    caption: str = "",
    columns: Collection[str] = (),
) -> Source:
    """The source that `data.path` names: the built-in shapes, or tar shards and folders, with captions as `data` words them.

    With a `caption` all images of folders have that one. `columns`: what images have besides captions.

    `progress(done, in all)` is called while images are checked or shards are indexed. Raises DataError.
    """
    source = _of(data, seed, progress, caption, columns)
    check(source, columns)
    return source


def _of(data: Data, seed: int, progress: Any, caption: str, columns: Collection[str]) -> Source:
    if data.path == "shapes":
        from tinydiff.data.shapes import ShapesSource

        return ShapesSource(data.resolution, seed, data.samples)
    from tinydiff.data.layouts import repeats
    from tinydiff.data.several import Several

    parts = [_opened(path, data, progress, caption, columns) for path in data.paths]
    if len(parts) == 1 and not (data.prefix or data.suffix or data.max_captions):
        return parts[0]
    return Several(parts, data.paths, [repeats(path) if len(parts) > 1 else 1.0 for path in data.paths], data)


def _opened(path: str, data: Data, progress: Any, caption: str, columns: Collection[str]) -> Source:
    """One folder, or the shards of one."""
    from tinydiff.data.shards import ShardSource, find_shards

    settings: dict[str, Any] = {key: getattr(data, key) for key in ("background", "max_bad_fraction", "captions")}
    settings |= {"columns": columns}
    if find_shards(path):
        return ShardSource(path, progress=progress, **settings)
    from tinydiff.data.folder import FolderSource

    return FolderSource(Path(path), **settings, caption=caption, progress=progress)


def examples(source: Source, count: int = 3) -> list[str]:
    """Some images with their sizes and captions, to look at before they are trained on."""
    chosen = sorted({i * len(source) // count for i in range(min(count, len(source)))})
    sizes = (source.size(i) for i in chosen)
    told = (f"{shown(source.identity(i))} ({w}x{h})" for i, (w, h) in zip(chosen, sizes, strict=True))
    return [f"{line}: {cut(escaped(source.captions(i)[0]))}" for i, line in zip(chosen, told, strict=True)]


def buckets(resolution: int, max_ratio: float, step: int) -> list[tuple[int, int]]:
    """Bucket sizes (width, height), narrowest first: multiples of `step`, of about equal area, the square among them.

    For each width, the largest height for which the area is at most `resolution`², and the same turned by 90 degrees,
    if the longer side is at most `max_ratio` times the shorter.
    """
    if max_ratio == 1:
        return [(resolution, resolution)]
    area, sizes = resolution**2, set()
    for width in range(step, int(resolution * max_ratio**0.5) + step, step):
        height = area // width // step * step
        if max(width, height) <= max_ratio * min(width, height):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


def nearest(sizes: Sequence[tuple[int, int]], width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """For each image (N,), the index into `sizes`, narrowest first, nearest in log(width / height): int16 (N,).

    The border between two sizes is where the squared ratio is the product of theirs; on it the narrower is taken. No
    logarithm or quotient is used, because their last bit differs between machines.
    """
    wide, high = width.astype(np.float64) ** 2, height.astype(np.float64) ** 2
    index = np.zeros(len(width), np.int16)
    for (w0, h0), (w1, h1) in pairwise(sizes):
        index += wide * (h0 * h1) > high * (w0 * w1)
    return index


class Stream:
    """The endless sequence of a bucket's images: each epoch a permutation seeded by (seed, bucket, epoch).

    Image ids[i] appears in an epoch in proportion to weights[i] > 0 (systematic sampling): once if all are equal. Where
    the samples fall moves on by the golden ratio from epoch to epoch, so that the next ones make up for what one rounds:
    an image stays within a few draws of its due for ever.
    """

    def __init__(self, ids: np.ndarray, weights: np.ndarray, seed: int, bucket: int):
        self.ids, self.ends, self.seed, self.bucket = ids, np.cumsum(weights), seed, bucket
        self.length = max(1, round(float(self.ends[-1] / weights.max())))
        self.first = keyed(seed, "order", 0, bucket).random()
        self.epoch = lru_cache(2)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        rng = keyed(self.seed, "order", epoch, self.bucket)
        rng.random()  # of epoch 0 it is `first`
        points = (np.arange(self.length) + (self.first + epoch * GOLDEN) % 1) * (self.ends[-1] / self.length)
        return rng.permutation(np.minimum(np.searchsorted(self.ends, points, side="right"), len(self.ends) - 1))

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start to start + count - 1, across epochs: (count,)."""
        epochs = range(start // self.length, (start + count - 1) // self.length + 1)
        first = start - epochs.start * self.length
        return self.ids[np.concatenate([self.epoch(e) for e in epochs])[first : first + count]]


class Order:
    """Which images each step reads: `order(step)` is (batch_size,) indices from one bucket, computed from step alone.

    `weights` (N,): how often each image is drawn, 0 is never. `bucket` (N,): each image's bucket. Successive batches of
    a bucket continue its `Stream`, across epochs. Batch n of a bucket that has `share` of all weights is due at time
    (n + offset) / share, with an offset in [0, 1) by the seed, so that what is rounded in one epoch is carried over to the
    next: before any time, a bucket has had time * share batches, rounded up or down. Epochs of equal time are shuffled.
    """

    def __init__(self, weights: np.ndarray, seed: int, bucket: np.ndarray | None = None, batch_size: int = 1):
        drawn = np.flatnonzero(weights > 0)
        assert len(drawn), "no image has a weight"
        kinds = np.zeros(len(drawn), np.int64) if bucket is None else bucket[drawn]
        groups = {int(b): drawn[kinds == b] for b in np.unique(kinds)}
        self.batch_size = batch_size
        self.streams = [Stream(ids, weights[ids], seed, b) for b, ids in groups.items()]
        total = float(weights[drawn].sum())
        self.shares = np.array([float(weights[ids].sum()) / total for ids in groups.values()])
        self.offsets = keyed(seed, "bucket offsets").random(len(groups))
        self.length = max(1, round(total / float(weights.max()) / batch_size))
        self.turns = lru_cache(2)(partial(self._turns, seed))

    def before(self, epoch: int) -> np.ndarray:
        """How many batches each bucket has had when an epoch begins: int64 (buckets,)."""
        return np.ceil(np.maximum(0.0, epoch * self.length * self.shares - self.offsets)).astype(np.int64)

    def _turns(self, seed: int, epoch: int) -> np.ndarray:
        """The buckets of an epoch's batches, in order."""
        counts = self.before(epoch + 1) - self.before(epoch)
        return keyed(seed, "buckets", epoch).permutation(np.repeat(np.arange(len(counts), dtype=np.int16), counts))

    def __call__(self, step: int) -> np.ndarray:
        epoch = step // self.length  # or one near it: an epoch has as many batches as are due in it
        while self.before(epoch).sum() > step:
            epoch -= 1
        while self.before(epoch + 1).sum() <= step:
            epoch += 1
        before, turns = self.before(epoch), self.turns(epoch)
        place = step - int(before.sum())
        which = int(turns[place])
        earlier = int(before[which]) + int(np.count_nonzero(turns[:place] == which))
        return self.streams[which].take(earlier * self.batch_size, self.batch_size)


class Images:
    """A source's images, uint8 in the size of their bucket, cached if all fit in memory. Thread-safe.

    `sizes`: (width, height) of the buckets in use. `bucket` (N,): each image's index into them. With data.flip, the
    second half of the indices are mirror images of the first. `held_out` (images of the source,): which training does not
    see. `broken`: {index in the source: why it cannot be read}.
    """

    def __init__(self, source: Source, data: Data):
        self.source, self.data = source, data
        self.sizes = buckets(data.resolution, data.max_aspect_ratio, data.bucket_step)
        base = np.zeros(len(source), np.int16)
        if len(self.sizes) > 1:
            width, height = np.array([source.size(i) for i in range(len(source))]).reshape(-1, 2).T
            used, bucket = np.unique(nearest(self.sizes, width, height), return_inverse=True)
            self.sizes, base = [self.sizes[i] for i in used.tolist()], bucket.astype(np.int16)
        self.bucket = np.tile(base, 2) if data.flip else base
        self.held_out = held_out(source, data)
        self.broken, self.cache = dict[int, str](), dict[int, np.ndarray]()
        area = np.array([w * h for w, h in self.sizes])
        self.cached = data.path != "shapes" and int(np.bincount(base) @ area) * 3 <= PIXEL_CACHE_BYTES
        self.lock, self.pool = threading.Lock(), ThreadPoolExecutor(THREADS)

    def __len__(self) -> int:
        return len(self.bucket)

    def __getitem__(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3). Raises DataError if the image cannot be read."""
        base = i % len(self.source)
        if (image := self.cache.get(base)) is None:
            with images.ROOM.of(math.prod(self.source.size(base))):
                image = images.fit(self.source.image(base), self.sizes[int(self.bucket[base])])
            if self.cached:
                self.cache[base] = image
        return image if i == base else image[:, ::-1]

    def check_controlled(self) -> None:
        """Raise DataError for the first image without one that is to control it."""
        named = getattr(self.source, "controlled", lambda i: False)
        alone = next((i for i in range(len(self.source)) if not named(i)), None)
        if alone is not None:
            fix = "name one in a column conditioning_image of metadata.jsonl, or set another train.control.condition"
            raise DataError(f"{shown(self.source.identity(alone))}: no image is to control it; {fix}")

    def control(self, i: int) -> np.ndarray:
        """The image that is to control image i, in its size: uint8 (h, w, 3)."""
        source: Any = self.source
        base = i % len(source)
        image = images.fit(source.control(base), self.sizes[int(self.bucket[base])])
        return image if i == base else image[:, ::-1]

    def batch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (B, h, w, 3) for indices of one bucket. An unreadable image is replaced by the next one of its bucket.

        Raises DataError if more than data.max_bad_fraction of the source, or all of a bucket, cannot be read.
        """
        pixels, readable = self.read(indices)
        for row in np.flatnonzero(~readable).tolist():
            pixels[row] = self._instead(int(indices[row]))
        return pixels

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels, uint8 (B, h, w, 3), for indices of one bucket, and which could be read, bool (B,); else zeros."""
        chosen = [int(i) for i in indices]
        cached = all(i % len(self.source) in self.cache for i in chosen)
        serial = cached or len(chosen) == 1 or THREADS == 1 or self.data.path == "shapes"  # drawing those holds the GIL
        rows = list((map if serial else self.pool.map)(self._readable, chosen))
        blank = np.zeros((*reversed(self.sizes[int(self.bucket[chosen[0]])]), 3), np.uint8)
        return np.stack([blank if row is None else row for row in rows]), np.array([row is not None for row in rows])

    def _readable(self, i: int) -> np.ndarray | None:
        """An image, or None if it cannot be read; after one failure it is not tried again."""
        base = i % len(self.source)
        if base not in self.broken:
            try:
                return self[i]
            except DataError as error:
                self.give_up(base, str(error).split("; ")[0])
        return None

    def give_up(self, base: int, reason: str) -> None:
        """Record why image `base` of the source cannot be read. Raises DataError if there are too many such images."""
        with self.lock:
            self.broken.setdefault(base, reason)
            if len(self.broken) <= self.data.max_bad_fraction * len(self.source):
                return
            first = ", ".join(list(self.broken.values())[:3])
        share = f"{len(self.broken)} of {len(self.source)} images, over the allowed {self.data.max_bad_fraction:g}"
        raise DataError(f"cannot read {share}: {first}; mend them, or raise data.max_bad_fraction")

    def unread(self) -> list[tuple[str, str]]:
        """The names of the images that could not be read since the source was opened, and why."""
        with self.lock:
            return [(shown(self.source.identity(i)), reason) for i, reason in sorted(self.broken.items())]

    def _instead(self, i: int) -> np.ndarray:
        """The next readable image of i's bucket, mirrored if i is."""
        count = len(self.source)
        base, bucket = i % count, int(self.bucket[i])
        others = np.flatnonzero((self.bucket[:count] == bucket) & (self.held_out == self.held_out[base]))
        for other in np.roll(others, -int(np.searchsorted(others, base)))[1:]:
            if (image := self._readable(int(other) + i - base)) is not None:
                return image
        width, height = self.sizes[bucket]
        raise DataError(f"{self.broken[base]}; nor can any other image of {width}x{height} be read; mend them")

    def weights(self) -> np.ndarray:
        """How often training draws each image, relative to the others: float64 (N,)."""
        one = np.array([self.source.weight(i) for i in range(len(self.source))], np.float64) * ~self.held_out
        return np.tile(one, 2) if self.data.flip else one

    def names(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The names of images, for messages."""
        return [self.source.identity(int(i) % len(self.source)) for i in indices]
