"""Whether the nearest data image of a drawing is its caption's own, over means of blocks of 4x4 pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import images
from tinydiff.data.dataset import Source
from tinydiff.diffusion.noise import keyed
from tinydiff.measure.intervals import shares

BLOCK = 4  # pixels a side of the means that are compared


def choose(source: Source, count: int, seed: int) -> list[int]:
    """Up to `count` images in a seeded order, first one for each main caption, then others. Weights play no part."""
    captions, first, more = set[str](), list[int](), list[int]()
    for i in keyed(seed, "evaluate").permutation(len(source)).tolist():
        if len(first) == count:
            break
        (more if (caption := source.captions(i)[0]) in captions else first).append(i)
        captions.add(caption)
    return (first + more)[:count]


class Retrieved:
    """A folder: whether the nearest data image of a drawing is its caption's own.

    Only block means of the drawings and, for each, the best few distances are kept. An image is the caption's own if
    the caption is its main one, so a class folder with one caption for many images counts any of them.
    """

    NEAREST = 5

    def __init__(self, path: str, source: Source, resolution: int, chosen: list[int]):
        self.path, self.source, self.resolution, self.chosen = path, source, resolution, chosen
        self.captions, self.candidates, self.rows = [source.captions(i)[0] for i in chosen], 0, dict[str, list[int]]()
        for row, caption in enumerate(self.captions):
            self.rows.setdefault(caption, []).append(row)
        self.drawn = np.zeros((len(chosen), block_sums(np.zeros((1, resolution, resolution, 3), np.uint8)).size))
        self.own = np.full(len(chosen), np.inf)
        self.nearest = np.full((len(chosen), self.NEAREST), np.inf)

    def image(self, i: int) -> np.ndarray:
        """uint8 (resolution, resolution, 3)."""
        return images.fit(self.source.image(i), self.resolution)

    def originals(self, count: int) -> Iterator[np.ndarray]:
        """The first chosen images."""
        return (self.image(i) for i in self.chosen[:count])

    def add(self, start: int, drawn: np.ndarray) -> None:
        """Takes in drawings (B, H, W, 3) of the captions from `start` on."""
        pictures = np.stack([images.fit(image, self.resolution) for image in drawn])
        self.drawn[start : start + len(drawn)] = block_sums(pictures)

    def see(self, captions: Sequence[str], sums: np.ndarray) -> None:
        """Measures candidates, block sums (B, D) with their main captions, against every drawing."""
        norms = (self.drawn**2).sum(1)[:, None] + (sums**2).sum(1)[None, :]
        distances = norms - 2 * (self.drawn @ sums.T)  # (drawings, B), squared; exact for integers below 2^53
        self.candidates += len(captions)
        for column, caption in enumerate(captions):
            rows = self.rows.get(caption, [])
            self.own[rows] = np.minimum(self.own[rows], distances[rows, column])
        both = np.concatenate([self.nearest, distances], axis=1)
        self.nearest = np.partition(both, self.NEAREST - 1, axis=1)[:, : self.NEAREST]

    def row(self) -> dict[str, Any]:
        """Shares of drawings; an own image as near as another counts as found, so that duplicates do no harm."""
        nearer = (self.nearest < self.own[:, None]).sum(1)  # (drawings,), at most NEAREST
        right = {"nearest_top1": int((nearer < 1).sum()), "nearest_top5": int((nearer < 5).sum())}
        count = len(self.captions)
        return {"data": self.path, "images": count} | shares(right, count) | {"candidates": self.candidates}


def compare(folders: Sequence[Retrieved], batch_size: int = 64) -> None:
    """Shows all images of all folders to all drawings, once each; a folder given twice holds no more images."""
    for folder in {Path(folder.path).resolve(): folder for folder in folders}.values():
        for start in range(0, len(folder.source), batch_size):
            part = range(start, min(start + batch_size, len(folder.source)))
            sums = block_sums(np.stack([folder.image(i) for i in part]))
            captions = [folder.source.captions(i)[0] for i in part]
            for each in folders:
                each.see(captions, sums)


def block_sums(batch: np.ndarray) -> np.ndarray:
    """uint8 (B, H, W, 3) to the sums over 4x4 blocks, float64 (B, D): integers, so distances are exact and ties real."""
    count, height, width, _ = batch.shape
    down, across = -height % BLOCK, -width % BLOCK  # filled up with the last pixels
    padded = np.pad(batch, ((0, 0), (0, down), (0, across), (0, 0)), mode="edge")
    h, w = padded.shape[1] // BLOCK, padded.shape[2] // BLOCK
    blocks = padded.reshape(count, h, BLOCK, w, BLOCK, 3)  # (B, h, 4, w, 4, 3)
    return blocks.sum(axis=(2, 4), dtype=np.float64).reshape(count, -1)  # (B, h w 3)
