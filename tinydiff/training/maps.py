"""The cache of what a frozen feature network sees in every image: its coarsest map, on a grid of the caller's.

An image is enlarged to the side that the network was trained at, so that a small one has as many places as a large one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tinydiff.data import cache
from tinydiff.data.dataset import Images
from tinydiff.data.image_cache import ImageRows, chunks, filled
from tinydiff.images import to_pixels
from tinydiff.measure.features import Features


def fill(
    folder: Path,
    images: Images,
    network: Features,
    cell: int,
    progress: cache.Progress,
    rank: int = 0,
    world: int = 1,
    most: int = cache.BATCH,
) -> None:
    """Compute the maps that the folder lacks, a place for every `cell` pixels along a side; see `latents.fill`."""
    missing = [c for c in list(_chunks(folder, images, network, cell))[rank::world] if not filled(c, images)]
    cache.fill(missing, lambda indices: seen(indices, images, network, cell), progress, _notes, most)


class Maps(ImageRows):
    """The column "map" (N, C, h, w): `channels` of each, and the `digest` of the network that made them."""

    def __init__(self, chunks: list[cache.Chunk], images: Images, digest: str):
        super().__init__(chunks, images)
        self.digest, self.channels = digest, self.stored.files[0]["map"].shape[1]


def open_cache(folder: Path, images: Images, network: Features, cell: int) -> Maps:
    """The maps that `fill` computed. Raises DataError if a file is missing or damaged."""
    return Maps(list(_chunks(folder, images, network, cell)), images, network.digest)


def _chunks(folder: Path, images: Images, network: Features, cell: int) -> Iterator[cache.Chunk]:
    return chunks(folder, "features", images, f"{network.digest} {cell}")


@torch.no_grad()
def seen(indices: np.ndarray, images: Images, network: Features, cell: int) -> cache.Arrays:
    """The column "map" (B, C, h, w) of images of one bucket; zeros for an unreadable image."""
    pixels, readable = images.read(indices)
    x = torch.from_numpy(to_pixels(pixels)).to(next(network.parameters()).device)
    grid = x.shape[2] // cell, x.shape[3] // cell
    found = F.adaptive_avg_pool2d(network.maps(network.resized(x))[-1], grid).cpu().numpy()
    found[~readable] = 0
    return {"map": found}


def _notes(rows: cache.Arrays) -> dict[str, list]:
    return {"absent": np.flatnonzero(~rows["map"].any((1, 2, 3))).tolist()}
