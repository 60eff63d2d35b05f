"""The shapes that a model draws of unseen captions, read back by the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tinydiff.data import shapes
from tinydiff.data.dataset import Source
from tinydiff.diffusion.noise import keyed
from tinydiff.measure.intervals import shares

READINGS = ("all", "colours", "shapes", "relation", "sizes")
WHOLE = ("colours", "shapes", "relation")
REAL = 2048  # pictures that stand for all that the renderer can draw


class Read:
    """Shapes: the oracle reads every drawing of an unseen caption."""

    path = "shapes"

    def __init__(self, count: int, seed: int, resolution: int):
        self.captions, self.seed, self.resolution = shapes.held_out_captions(count, seed), seed, resolution
        self.source: Source = shapes.ShapesSource(resolution, seed, REAL)
        self.right: dict[str, int] = dict.fromkeys(READINGS, 0)

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
        return {"data": self.path, "images": len(self.captions)} | shares(self.right, len(self.captions))
