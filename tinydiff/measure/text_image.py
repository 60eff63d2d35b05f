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


class TextImage:
    """The towers of a model folder, and the pictures that they have been shown."""

    def __init__(self, towers: Any, tokenizer: Any):
        self.towers, self.tokenizer = towers, tokenizer
        self.captions = list[str]()
        self.vectors = list[tuple[np.ndarray, np.ndarray]]()  # of texts and pictures, a batch each

    @torch.no_grad()
    def add(self, backend: pipeline.Backend, captions: Sequence[str], drawn: np.ndarray) -> None:
        """Take in pictures (B, H, W, 3) uint8 and what they should show. Their latents are the model's autoencoder's."""
        z = pipeline.latents(backend, images.to_pixels(drawn)) / np.float32(backend.description.scaling_factor)
        seen = self.towers.images(torch.from_numpy(z * np.float32(self.towers.scaling_factor)))
        read = self.towers.texts(torch.from_numpy(self.tokenizer.encode(captions)))
        self.captions += captions
        self.vectors.append((read.numpy(), seen.numpy()))

    def row(self) -> dict[str, float]:
        """`agreement` of all pictures."""
        texts, seen = (np.concatenate(part) for part in zip(*self.vectors, strict=True))
        return agreement(texts, seen, self.captions)


def open_text_image(model: Path, tokenizers: dict[str, Any]) -> TextImage | None:
    """The towers in a model folder; None where it has none. Raises ModelError where they cannot be read."""
    if not (place := model / CONTRASTIVE).is_dir():
        return None
    table = read_json(place / "config.json")
    return TextImage(filled(NETWORK, table, weights.tensors([place / NETWORK.file]), place), tokenizers[TEXT])
