"""The latent cache: every image's latent distribution, keyed by image content, size and autoencoder.

Several processes may fill a folder together; when all are done, each opens it.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tinydiff.data import cache
from tinydiff.data.dataset import Images
from tinydiff.data.image_cache import ImageRows, chunks, filled
from tinydiff.errors import DataError
from tinydiff.images import to_pixels
from tinydiff.models.autoencoder import Autoencoder


def digest(module: nn.Module) -> str:
    """SHA-256 over a network's parameters in float32, names included."""
    h = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        h.update(name.encode())
        h.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return h.hexdigest()


def fill(
    folder: Path,
    images: Images,
    vae: Autoencoder,
    progress: cache.Progress,
    rank: int = 0,
    world: int = 1,
    most: int = cache.BATCH,
) -> None:
    """Encode the images that the folder lacks, in float32 on the autoencoder's device, up to `most` at once.

    Process `rank` of `world` takes every `world`-th chunk; `progress(images encoded, images to encode)` counts its own
    and may raise to stop. An unreadable image gets zeros, and the next call tries it again; DataError if too many are.
    """
    missing = [c for c in list(chunks(folder, "latents", images, digest(vae)))[rank::world] if not filled(c, images)]
    cache.fill(missing, lambda indices: encode(indices, images, vae), progress, _notes, most)


def open_cache(folder: Path, images: Images, vae: Autoencoder) -> Latents:
    """The latents that `fill` computed. Raises DataError if a file is missing or too many images were unreadable."""
    return Latents(list(chunks(folder, "latents", images, digest(vae))), images)


@torch.no_grad()
def encode(indices: np.ndarray, images: Images, vae: Autoencoder) -> cache.Arrays:
    """The columns "mean" and "std" (B, C, h, w) of images of one bucket; zeros for an unreadable image."""
    pixels, readable = images.read(indices)
    x = torch.from_numpy(to_pixels(pixels)).to(next(vae.parameters()).device, memory_format=torch.channels_last)
    mean, std = (t.float().cpu().contiguous().numpy() for t in vae.distribution(x))
    mean[~readable] = std[~readable] = 0
    return {"mean": mean, "std": std}


def _notes(rows: cache.Arrays) -> dict[str, list]:
    """Which rows have no image (they are zero); over the others, the number of values and sums of them."""
    mean, std = rows["mean"], rows["std"]
    absent = np.flatnonzero(~(mean.any((1, 2, 3)) | std.any((1, 2, 3))))
    sums = [mean.sum(dtype=np.float64), np.square(mean, dtype=np.float64).sum(), np.square(std, dtype=np.float64).sum()]
    return {"absent": absent.tolist(), "sums": [mean[0].size * (len(mean) - len(absent)), *map(float, sums)]}


class Latents(ImageRows):
    """Every image's latent distribution, memory-mapped from the files `paths`.

    `valid` (N,): which images could be read. `scaling_factor`: 1 / the standard deviation of all sampled latents, over
    all channels together; it depends on the images, not on how processes divided the work.
    """

    def __init__(self, chunks: list[cache.Chunk], images: Images):
        super().__init__(chunks, images)
        self.valid, self.first = np.ones(len(images), bool), {}
        for number, (chunk, notes) in enumerate(zip(chunks, self.stored.notes, strict=True)):
            indices = np.asarray(chunk.items)
            self.valid[indices[notes["absent"]]] = False
            self.first.setdefault(int(images.bucket[indices[0]]), number)
        for i in np.flatnonzero(~self.valid[: len(images.source)]).tolist():
            images.give_up(i, f"{images.names([i])[0]}: could not be read when it was to be encoded")
        self.scaling_factor = _scaling_factor([notes["sums"] for notes in self.stored.notes])

    def rows(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of images of one bucket: (B, C, h, w) float32 each, zero where not `valid`."""
        return self.column("mean", indices), self.column("std", indices)

    def shape(self, bucket: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a bucket."""
        return self.stored.files[self.first[bucket]]["mean"].shape[1:]


def _scaling_factor(sums: list[list[float]]) -> float:
    """1 / std of all latents, from each file's `sums`; fsum rounds once, so the order of files does not matter."""
    count, mean, squares, variance = (math.fsum(column) for column in zip(*sums, strict=True))
    if not count:
        raise DataError("none of the images could be read when they were to be encoded; mend them")
    return 1 / math.sqrt((squares + variance) / count - (mean / count) ** 2)
