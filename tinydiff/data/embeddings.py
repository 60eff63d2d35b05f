"""The cache of a frozen text encoder's output for every caption, keyed by the captions and the encoder.

It knows neither encoder nor images: the caller gives distinct, sorted captions and a function that encodes some.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinydiff.data import cache
from tinydiff.data.cache import Compute, Progress

if TYPE_CHECKING:
    from torch import Tensor


def fill(
    folder: Path,
    captions: list[str],
    encode: Compute,
    digest: str,
    progress: Progress,
    rank: int,
    world: int,
    most: int = cache.BATCH,
) -> None:
    """Encode the captions that the folder lacks: process `rank` of `world` takes every `world`-th chunk.

    `captions` are distinct and sorted, `digest` is the encoder's. `encode(captions)` gives float32 (n, ...) by name.
    `progress(captions encoded, captions to encode)` counts those of this process and may raise to stop.
    """
    missing = [c for c in _chunks(folder, captions, digest)[rank::world] if not cache.whole(c)]
    cache.fill(missing, encode, progress, most=most)


def open_cache(folder: Path, captions: list[str], digest: str) -> TextEmbeddings:
    """The vectors that `fill` computed. Raises DataError if a file is missing or damaged."""
    return TextEmbeddings(captions, _chunks(folder, captions, digest), digest)


def _chunks(folder: Path, captions: list[str], digest: str) -> list[cache.Chunk]:
    groups = [captions[start : start + cache.ROWS] for start in range(0, len(captions), cache.ROWS)]
    return [cache.chunk(folder, "text", group, [digest, group]) for group in groups]


class Anew:
    """Text vectors of captions that differ from step to step, which no cache can hold: encoded whenever they are read."""

    def __init__(self, encode: Compute, digest: str):
        self.encode, self.digest, self.paths = encode, digest, list[Path]()

    def rows(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """float32 (B, ...) by name."""
        import torch

        return {name: torch.from_numpy(column) for name, column in self.encode(list(captions)).items()}


class TextEmbeddings:
    """Every caption's text vectors, memory-mapped from the files `paths`; `digest` is the encoder's."""

    def __init__(self, captions: list[str], chunks: list[cache.Chunk], digest: str):
        self.captions, self.paths, self.digest = captions, [chunk.path for chunk in chunks], digest
        self.stored = cache.Rows(chunks)

    def rows(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """float32 (B, ...) by name. Raises KeyError for a caption that was not encoded."""
        import torch

        places = np.array([bisect_left(self.captions, caption) for caption in captions])
        for caption, place in zip(captions, places.tolist(), strict=True):
            if place == len(self.captions) or self.captions[place] != caption:
                raise KeyError(caption)
        files, rows = places // cache.ROWS, places % cache.ROWS
        return {name: torch.from_numpy(self.stored.gather(name, files, rows)) for name in self.stored.files[0]}
