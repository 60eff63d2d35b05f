"""How well pictures fit texts, by the two towers that a run of this data has trained (training/contrastive.py).

An in-domain stand-in for CLIP's score: it knows the words and pictures of one data set, and nothing of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinydiff import images, pipeline
from tinydiff.checkpoints import weights
from tinydiff.checkpoints.folder import filled
from tinydiff.files import read_json
from tinydiff.measure.intervals import NORMAL_95, wilson
from tinydiff.networks import TEXT
from tinydiff.networks.contrastive import CONTRASTIVE, NETWORK


def agreement(texts: np.ndarray, images: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Of texts and images (N, D) that belong together row by row, all of norm 1, whose texts are `captions`.

    "text_image_score" is the mean cosine of the pairs (Hessel et al. 2021, without their factor and their cut at 0);
    "text_image_retrieval" the share of images to which no other caption is nearer than their own.
    """
    products = images @ texts.T
    own = np.diag(products)
    return {
        "text_image_score": float(own.mean()),
        "text_image_retrieval": float((own >= nearest(products, captions)).mean()),
    }


def nearest(products: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """The largest product of each image with another caption than its own: (N,)."""
    names = np.unique(np.array(captions), return_inverse=True)[1]
    return np.where(names[:, None] == names, -np.inf, products).max(1)


class Fit:
    """How well the drawings of one data path fit their captions. Images enter by the latents of the model's autoencoder."""

    def __init__(self, backend: pipeline.Backend, towers: Any, captions: Sequence[str]):
        self.backend, self.towers, self.captions = backend, towers, captions
        self.texts, self.drawn = list[np.ndarray](), list[np.ndarray]()  # vectors, a batch each

    def add(self, start: int, drawn: np.ndarray) -> None:
        """Takes in drawings (B, H, W, 3) of the captions from `start` on."""
        texts, seen = self.vectors(self.captions[start : start + len(drawn)], drawn)
        self.texts.append(texts)
        self.drawn.append(seen)

    @torch.no_grad()
    def vectors(self, captions: Sequence[str], pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of texts and pictures (B, D) each."""
        z = pipeline.latents(self.backend, images.to_pixels(pictures))
        z *= np.float32(self.towers.scaling_factor / self.backend.description.scaling_factor)
        ids = self.backend.tokenizers[TEXT].encode(captions)
        return self.towers.texts(torch.from_numpy(ids)).numpy(), self.towers.images(torch.from_numpy(z)).numpy()

    def row(self, real: np.ndarray) -> dict[str, Any]:
        """`agreement` of the drawings with their captions, with intervals; "of_real": the score of real pictures (n, H, W, 3)
        of the first n captions."""
        texts, drawn, count = np.concatenate(self.texts), np.concatenate(self.drawn), len(self.captions)
        figures, cosines = agreement(texts, drawn, self.captions), (texts * drawn).sum(1)
        score, found = (figures[name] for name in ("text_image_score", "text_image_retrieval"))
        bounds = {"text_image_retrieval": wilson(round(found * count), count)}
        if count > 1:
            half = NORMAL_95 * float(cosines.std(ddof=1)) / count**0.5
            bounds["text_image_score"] = score - half, score + half
        intervals = {name: {"low": low, "high": high} for name, (low, high) in bounds.items()}
        theirs = agreement(*self.vectors(self.captions[: len(real)], real), self.captions[: len(real)])
        return figures | {"intervals": intervals, "of_real": {"text_image_score": theirs["text_image_score"]}}


def open_towers(model: Path) -> Any:
    """The towers of a model folder that has them. Raises ModelError where they cannot be read."""
    place = model / CONTRASTIVE
    table = read_json(place / "config.json")
    return filled(NETWORK, table, weights.tensors([place / NETWORK.file]), place)
