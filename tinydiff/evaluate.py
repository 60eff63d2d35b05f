"""How good a model is, in numbers that need no second model: read by the oracle, found among the data, reconstructed.

For the built-in shapes, unseen captions are drawn and the oracle reads the pictures back. For a folder, captions of it
are drawn and the nearest image of all the data must be the caption's own. Both come with the autoencoder's PSNR. It
knows the `Backend` protocol and numpy, no runtime; pictures are scored batch by batch and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinydiff import config, images, pipeline
from tinydiff.data import shapes
from tinydiff.data.dataset import Source, open_source
from tinydiff.diffusion.noise import keyed
from tinydiff.errors import UsageError

BLOCK = 4  # pixels a side of the means that retrieval compares
RECONSTRUCTED = 64
NORMAL_95 = 1.959963984540054
READINGS = ("all", "colours", "shapes", "relation", "sizes")
WHOLE = ("colours", "shapes", "relation")


class Subject(Protocol):
    """A data path under evaluation: what to draw, and what to make of the drawings."""

    captions: list[str]

    def originals(self, count: int) -> Iterator[np.ndarray]: ...
    def add(self, start: int, drawn: np.ndarray) -> None: ...
    def row(self) -> dict[str, Any]: ...


def evaluate(
    backend: pipeline.Backend,
    request: pipeline.Request,
    data: Sequence[str],
    count: int,
    seed: int,
    batch_size: int,
    resolution: int,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Scores of `count` pictures for each data path ("shapes" or a folder), one dict a path, in order.

    Picture i of a path has the seed `seed + i`. `resolution`: pixels a side at which data and pictures are compared.
    `progress` hears (pictures done, pictures in all). Raises UsageError for a size the model cannot draw and DataError
    for unusable data.
    """
    width, height = request.width, request.height
    pipeline.check_size(backend.description, width, height)
    pipeline.check_size(backend.description, resolution, resolution)
    if "shapes" in data and (width != height or width < 16):
        raise UsageError(f"shapes are read off squares of 16 pixels or more, not {width}x{height}; set -W and -H")
    settings = data_settings(backend.description.path)
    subjects = [open_subject(replace(settings, path=path, resolution=resolution), count, seed) for path in data]
    psnrs = [reconstruction_psnr(backend, subject.originals(RECONSTRUCTED), batch_size) for subject in subjects]
    total, done = sum(len(subject.captions) for subject in subjects), 0
    for subject in subjects:
        for start in range(0, len(subject.captions), batch_size):
            captions = subject.captions[start : start + batch_size]
            seeds = range(seed + start, seed + start + len(captions))
            subject.add(start, pipeline.generate(backend, captions, seeds, request))
            done += len(captions)
            progress(done, total)
    compare([subject for subject in subjects if isinstance(subject, Retrieved)])
    return [subject.row() | {"reconstruction_psnr": psnr} for subject, psnr in zip(subjects, psnrs, strict=True)]


def data_settings(model: Path) -> config.Data:
    """How the model's own configuration treats images (background, bad files); the defaults without one."""
    path = model / "tinydiff.toml"
    return config.load(path).data if path.exists() else config.Data()


def open_subject(settings: config.Data, count: int, seed: int) -> Subject:
    """The shapes, or a folder of captioned images, as `settings.path` says."""
    if settings.path == "shapes":
        return Read(shapes.held_out_captions(count, seed), seed, settings.resolution)
    source = open_source(settings)
    return Retrieved(settings.path, source, settings.resolution, choose(source, count, seed))


def choose(source: Source, count: int, seed: int) -> dict[str, int]:
    """Up to `count` distinct main captions of images in a seeded order: {caption: image}. Weights play no part."""
    chosen: dict[str, int] = {}
    for i in keyed(seed, "evaluate").permutation(len(source)):
        if len(chosen) == count:
            break
        chosen.setdefault(source.captions(int(i))[0], int(i))
    return chosen


@dataclass
class Read:
    """Shapes: the oracle reads every drawing of an unseen caption."""

    captions: list[str]
    seed: int
    resolution: int
    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(READINGS, 0))

    def originals(self, count: int) -> Iterator[np.ndarray]:
        """The first scenes as the renderer draws them, uint8 (resolution, resolution, 3)."""
        for i, caption in enumerate(self.captions[:count]):
            yield shapes.render(shapes.parse(caption), keyed(self.seed, "evaluate", 0, i), self.resolution)

    def add(self, start: int, drawn: np.ndarray) -> None:
        """Reads drawings (B, H, W, 3) of the captions from `start` on."""
        for caption, image in zip(self.captions[start:], drawn, strict=False):
            seen = shapes.matches(caption, image)
            for name, right in (seen | {"all": all(seen[part] for part in WHOLE)}).items():
                self.right[name] += right

    def row(self) -> dict[str, Any]:
        """Shares of drawings; "all" is both colours, both shapes and the relation."""
        return {"data": "shapes", "images": len(self.captions)} | shares(self.right, len(self.captions))


class Retrieved:
    """A folder: whether the nearest data image of a drawing is its caption's own.

    Only block means of the drawings and, for each, the best few distances are kept. An image is the caption's own if
    the caption is its main one, so a class folder with one caption for many images counts any of them.
    """

    NEAREST = 5

    def __init__(self, path: str, source: Source, resolution: int, chosen: dict[str, int]):
        self.path, self.source, self.resolution, self.chosen = path, source, resolution, chosen
        self.captions, self.candidates = list(chosen), 0
        self.rows = {caption: row for row, caption in enumerate(chosen)}
        self.drawn = np.zeros((len(chosen), block_sums(np.zeros((1, resolution, resolution, 3), np.uint8)).size))
        self.own = np.full(len(chosen), np.inf)
        self.nearest = np.full((len(chosen), self.NEAREST), np.inf)

    def image(self, i: int) -> np.ndarray:
        """uint8 (resolution, resolution, 3)."""
        return images.fit(self.source.image(i), self.resolution)

    def originals(self, count: int) -> Iterator[np.ndarray]:
        """The first chosen images."""
        return (self.image(i) for i in list(self.chosen.values())[:count])

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
            if (row := self.rows.get(caption)) is not None:
                self.own[row] = min(self.own[row], distances[row, column])
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


def reconstruction_psnr(backend: pipeline.Backend, originals: Iterable[np.ndarray], batch_size: int) -> float:
    """dB, from the mean squared error over all images (uint8 H, W, 3) through the latent's mean and back, clipped."""
    error, count, rest = 0.0, 0, iter(originals)
    while batch := list(islice(rest, batch_size)):
        pixels = images.to_pixels(np.stack(batch))
        with np.errstate(all="ignore"):  # `latents` and `decoded` report what numpy would warn of
            scaling = np.float32(backend.description.scaling_factor)
            output = pipeline.decoded(backend, pipeline.latents(backend, pixels) / scaling)
        output = np.clip(output, -1, 1).astype(np.float64)
        error, count = error + float(((output - pixels) ** 2).sum()), count + pixels.size
    return 10 * math.log10(4 / max(error / count, 1e-12))


def shares(right: dict[str, int], count: int) -> dict[str, Any]:
    """Each number of successes as a share of `count`, then {"intervals": {name: {"low", "high"}}}."""
    intervals = {name: dict(zip(("low", "high"), wilson(n, count), strict=True)) for name, n in right.items()}
    return {name: n / count for name, n in right.items()} | {"intervals": intervals}


def wilson(right: int, count: int, z: float = NORMAL_95) -> tuple[float, float]:
    """The score interval of a share, 95 % by default (Wilson 1927): (low, high)."""
    p, spread = right / count, z**2 / count
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half) if right else 0.0, min(1.0, middle + half) if right < count else 1.0


def line(row: dict[str, Any]) -> str:
    """One result for a person."""
    if "all" in row:
        parts = ", ".join(f"{name} {row[name]:.1%}" for name in READINGS[1:])
        text = f"{row['images']} unseen captions: wholly right {_share(row, 'all')}; {parts}"
    else:
        first, five = _share(row, "nearest_top1"), _share(row, "nearest_top5")
        among = f"of {row['candidates']} images the nearest is the right one {first}, one of the nearest 5 {five}"
        text = f"{row['images']} captions: {among}"
    return f"{row['data']}: {text}; reconstruction {row['reconstruction_psnr']:.1f} dB"


def _share(row: dict[str, Any], name: str) -> str:
    bounds = row["intervals"][name]
    return f"{row[name]:.1%} ({bounds['low']:.1%} to {bounds['high']:.1%})"
