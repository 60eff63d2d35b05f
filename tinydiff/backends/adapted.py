"""Weights of a bundle's graph that adapters change: given to onnxruntime in memory, instead of those in the file beside it.

A graph's weights have the names of the network's parameters, unless another program's exporter gave them others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime as ort

from tinydiff.backends.graph import weights
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError
from tinydiff.files import shown
from tinydiff.verified import Hash

TYPES = {1: np.float32, 10: np.float16}  # onnx's numbers of those that can be changed


@dataclass(frozen=True)
class Adapted:
    """What adapters make of one graph. It has the arrays that a session reads, so it lasts as long as that."""

    source: Source
    name: str

    def mark(self, digest: Hash) -> list[Any]:
        """What its weights depend on, besides the bundle; nothing where they are the bundle's own."""
        return self.source.mark(self.name, digest)

    @cached_property
    def values(self) -> dict[str, ort.OrtValue]:
        """By name, each weight of the graph that is another one. ModelError where the graph has no such weight."""
        path = self.source.path / self.name / "model.onnx"
        changed = self.source.changed(self.name)
        known, values = weights(path) if changed else {}, dict[str, ort.OrtValue]()
        files = {
            key: file
            for file in map(self.source.header, self.source.files(self.name) if changed else [])
            for key in file.tensors
        }
        for key in changed:
            dtype, shape = known.get(key, (0, ()))
            if dtype not in TYPES or shape != files[key].tensors[key].shape:
                problem = f"has no weight {shown(key)} that --lora could change"
                raise ModelError(f"{shown(path)}: {problem}; export the model again with --lora")
            merged = self.source.merged(self.name, key, files[key].array(key))
            values[key] = ort.OrtValue.ortvalue_from_numpy(merged.astype(TYPES[dtype]))
        return values
