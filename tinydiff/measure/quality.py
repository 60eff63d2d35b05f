"""How near drawings come to real pictures, as a feature network sees both: figures that are named after the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff import images
from tinydiff.data import cache
from tinydiff.data.dataset import Source
from tinydiff.diffusion.noise import keyed
from tinydiff.measure import distances
from tinydiff.measure.intervals import Interval, resampled, shares
from tinydiff.user_cache import user_folder

if TYPE_CHECKING:
    from tinydiff.measure.features import Features

LEAST = 10  # pictures that a distance between sets needs
MOST = 10_000  # real pictures that drawings are compared with
SPLIT = 1000  # pictures that each part of an inception score has at least


def real_vectors(
    features: Features,
    source: Source,
    background: str,
    resolution: int,
    seed: int,
    progress: Callable[[int, int], Any],
) -> np.ndarray:
    """Vectors of all pictures of a source, or of MOST by the seed, at a resolution: (N, D) float32.

    They are kept in the user's cache folder, by network and content. Raises DataError for a picture that cannot be read.
    """
    chosen = np.sort(keyed(seed, "real").permutation(len(source))[:MOST])

    def compute(part: np.ndarray) -> cache.Arrays:
        return {"vectors": features.seen(np.stack([images.fit(source.image(int(i)), resolution) for i in part]))[0]}

    folder, chunks = user_folder("features"), list[cache.Chunk]()
    for start in range(0, len(chosen), cache.ROWS):
        part = chosen[start : start + cache.ROWS]
        inputs = [features.digest, resolution, background, [source.digest(int(i)) for i in part]]
        chunks.append(cache.chunk(folder, "features", part, inputs))
    cache.fill([c for c in chunks if not cache.whole(c)], compute, progress)
    rows, places = cache.Rows(chunks), np.arange(len(chosen))
    return rows.gather("vectors", places // cache.ROWS, places % cache.ROWS)


class View:
    """The drawings of one data path, as a feature network sees them."""

    def __init__(self, features: Features, resolution: int):
        self.features, self.resolution = features, resolution
        self.vectors, self.logits = list[np.ndarray](), list[np.ndarray]()

    def add(self, start: int, drawn: np.ndarray) -> None:
        """Takes in drawings (B, H, W, 3), in order."""
        vectors, logits = self.features.seen(np.stack([images.fit(image, self.resolution) for image in drawn]))
        self.vectors.append(vectors)
        self.logits += [] if logits is None else [logits]

    def row(self, real: np.ndarray, training: np.ndarray | None, seed: int) -> dict[str, Any]:
        """Figures of the drawings beside the vectors of real pictures, and of how many are copies of `training` ones.

        "intervals": {name: {"low", "high"}}, "deviations": of the kernel distance over subsets, "of_real": the Fréchet
        distance that as many real pictures have from the others. None of too few pictures.
        """
        drawn = np.concatenate(self.vectors)
        if min(count := len(drawn), len(real)) < LEAST:
            return {}
        known = distances.gaussian(real)
        figures: dict[str, tuple[float, Interval | None]] = {
            "frechet": resampled(lambda i: distances.frechet(known, drawn[i]), count, seed)
        }
        kernel, deviation = distances.kernel_distance(real, drawn, seed)
        precision, recall = distances.precision_recall(real, drawn)
        figures |= {"kernel": (kernel, None), "precision": flagged(precision), "recall": flagged(recall)}
        if self.logits:
            logits, parts = np.concatenate(self.logits), max(1, min(10, count // SPLIT))
            figures["inception"] = resampled(lambda i: distances.inception_score(logits[i], parts)[0], count, seed)
        if training is not None:
            near, z = distances.copies(drawn, training)
            figures |= {"copies": flagged(near), "copies_z": (z, None)}
        called = self.features.called
        row: dict[str, Any] = {called(name): value for name, (value, _) in figures.items()}
        row["intervals"] = {called(name): interval for name, (_, interval) in figures.items() if interval}
        row["deviations"] = {called("kernel"): deviation}
        if len(real) >= 2 * count:
            turn = keyed(seed, "part").permutation(len(real))
            row["of_real"] = {called("frechet"): distances.frechet(real[turn[count:]], real[turn[:count]])}
        return row


def flagged(flags: np.ndarray) -> tuple[float, Interval]:
    """The share of true ones, and its interval."""
    row = shares({"": int(flags.sum())}, len(flags))
    return row[""], row["intervals"][""]
