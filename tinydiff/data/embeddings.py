"""The cache of a frozen text encoder's output for every caption, keyed by the captions and the encoder.

It knows neither encoder nor images: the caller gives the distinct captions, sorted, and a function that encodes some.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinydiff.data import cache

if TYPE_CHECKING:
    from torch import Tensor


def fill(
    folder: Path,
    captions: Sequence[str],
    encode: Callable[[list[str]], Tensor],
    encoder_digest: str,
    progress: cache.Progress,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Encode what the folder lacks: every `world`-th chunk from `rank` on. `captions` are distinct and sorted.

    `encode(captions)` gives (n, T, D), of one T and D. `progress(captions encoded, captions to encode)` counts those of
    this process and may raise to stop.
    """

    def compute(some: list[str]) -> cache.Arrays:
        return {"text": encode(list(some)).detach().float().cpu().contiguous().numpy()}

    mine = _chunks(folder, captions, encoder_digest)[rank::world]
    cache.fill([chunk for chunk in mine if not cache.whole(chunk)], compute, progress)


def open_cache(folder: Path, captions: Sequence[str], encoder_digest: str) -> TextEmbeddings:
    """What `fill` computed. Raises DataError where a file is missing or damaged."""
    return TextEmbeddings(captions, _chunks(folder, captions, encoder_digest))


def _chunks(folder: Path, captions: Sequence[str], encoder_digest: str) -> list[cache.Chunk]:
    pieces = [captions[start : start + cache.ROWS] for start in range(0, len(captions), cache.ROWS)]
    return [cache.chunk(folder, "text", piece, [encoder_digest, list(piece)]) for piece in pieces]


class TextEmbeddings:
    """Every caption's vectors, in mapped files. `paths`: the files."""

    def __init__(self, captions: Sequence[str], chunks: list[cache.Chunk]):
        self.captions, self.paths = captions, [chunk.path for chunk in chunks]
        self.stored = cache.Rows(chunks)

    def rows(self, captions: Sequence[str]) -> Tensor:
        """(B, T, D) float32. Raises KeyError for a caption that was not encoded."""
        import torch

        places = np.array([self._place(caption) for caption in captions])
        return torch.from_numpy(self.stored.gather("text", places // cache.ROWS, places % cache.ROWS))

    def _place(self, caption: str) -> int:
        place = bisect_left(self.captions, caption)
        if place == len(self.captions) or self.captions[place] != caption:
            raise KeyError(caption)
        return place
