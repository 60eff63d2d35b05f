"""Rows that are computed of images and cached, keyed by the images' contents, sizes and whatever computes them.

A chunk holds images of one bucket, either all mirrored or none. Its notes say which rows are `absent`, since their image could
not be read. Reading images, and giving up on unreadable ones, is the job of `dataset.Images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff.data import cache
from tinydiff.data.dataset import Images


def chunks(folder: Path, kind: str, images: Images, digest: str) -> Iterator[cache.Chunk]:
    """The chunks of every bucket, its images apart from their mirror images; `digest` is of what computes the rows."""
    count = len(images.source)
    digests = [images.source.digest(i) for i in range(count)]
    for bucket, size in enumerate(images.sizes):
        members = np.flatnonzero(images.bucket == bucket)
        for mirrored, half in enumerate((members[members < count], members[members >= count])):
            for start in range(0, len(half), cache.ROWS):
                items = half[start : start + cache.ROWS]
                contents = [digests[i] for i in (items % count).tolist()]
                inputs = [digest, images.data.background, size, mirrored, contents]
                yield cache.chunk(folder, kind, items, inputs)


def filled(chunk: cache.Chunk, images: Images) -> bool:
    """Whether a chunk is computed and its absent images are still unreadable."""
    if not cache.whole(chunk):
        return False
    absent = cache.notes_of(chunk)["absent"]
    return not absent or not images.read(chunk.items[absent])[1].any()


class ImageRows:
    """The columns of some chunks, by image, memory-mapped from the files `paths`."""

    def __init__(self, chunks: list[cache.Chunk], images: Images):
        self.paths = [chunk.path for chunk in chunks]
        self.stored = cache.Rows(chunks)
        self.file, self.row = np.empty(len(images), np.int32), np.empty(len(images), np.int32)
        for number, chunk in enumerate(chunks):
            indices = np.asarray(chunk.items)
            self.file[indices], self.row[indices] = number, np.arange(len(indices))

    def column(self, name: str, indices: np.ndarray) -> Any:
        """A column (B, ...) of images of one bucket, as a tensor."""
        import torch

        return torch.from_numpy(self.stored.gather(name, self.file[indices], self.row[indices]))
