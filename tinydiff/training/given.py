"""What data tell a denoiser of each image besides captions: its class, and the latents of another image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tinydiff import images
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.condition import Condition, blank
from tinydiff.data.dataset import Images
from tinydiff.diffusion.noise import keyed
from tinydiff.pipeline import given_with
from tinydiff.text.labels import one_hot
from tinydiff.training import encoding
from tinydiff.training.run import Run


class Columns:
    """Columns of the run's data as the denoiser's conditions; some are left out of training, by a number for each row."""

    def __init__(self, run: Run):
        self.run, self.description = run, run.model.description
        self.names = {array.of.column: name for name, array in self.description.given.items()}  # type: ignore[union-attr]
        self.latents = encoding.others(run) if "image" in self.names else {}

    def valid(self, data: Images) -> np.ndarray | bool:
        """Which images can be told all that they are to be, (N,)."""
        return self.latents[data].valid if self.latents else True

    def rows(self, data: Images, indices: np.ndarray) -> Condition:
        """Float tensors (B, ...) by name, of images of one bucket."""
        made = {column: getattr(self, column)(data, indices) for column in self.names}
        return {self.names[column]: rows for column, rows in made.items()}

    def label(self, data: Images, indices: np.ndarray) -> torch.Tensor:
        """One-hot rows (B, classes)."""
        source, labels = self.of(data), self.description.labels
        assert labels
        ids = labels.encode([source.label(int(i) % len(source)) for i in indices])
        return torch.from_numpy(one_hot(ids, labels.vocab_size)[:, 0])

    def image(self, data: Images, indices: np.ndarray) -> torch.Tensor:
        """Mean latents (B, C, h, w)."""
        return self.latents[data].rows(indices)[0] * self.run.model.scaling_factor

    def spared(self, told: Condition, stream: str, step: int, rows: Sequence[int]) -> Condition:
        """The same with nothing in place of some rows, of rows of the batch of a step."""
        dropout = {name: getattr(self.run.cfg.diffusion, f"{column}_dropout") for column, name in self.names.items()}
        seed, kept = self.run.cfg.train.seed, dict(told)
        for column, name in self.names.items():
            none = [keyed(seed, f"{stream} {column}", step, row).random() < dropout[name] for row in rows]
            kept[name][none] = torch.from_numpy(blank(self.description, name, told[name].shape[1:]))
        return kept

    @staticmethod
    def of(data: Images) -> Any:
        return data.source

    def shown(self, backend: TorchBackend, chosen: Sequence[tuple[Images, int]]) -> Condition:
        """What is told of some images where squares of the model's own size are drawn."""
        size = self.description.size
        each = []
        for source, i in ((self.of(data), i % len(data.source)) for data, i in chosen):
            label = source.label(i) if "label" in self.names else None
            other = images.fit(source.other(i), (size, size)) if "image" in self.names else None
            each.append(given_with(backend, label, other))
        return {name: np.concatenate([rows[name] for rows in each]) for name in self.names.values()}
