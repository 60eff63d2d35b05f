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

    def put(self, options: ort.SessionOptions) -> None:
        """Have a session take its weights."""
        grown = {key for key, value in self.values.items() if tuple(value.shape()) != self.known[key][1]}
        same = {key: value for key, value in self.values.items() if key not in grown}
        if same:
            options.add_external_initializers([*same], [*same.values()])
        for key in grown:  # a table that rows are looked up in, of another size: put in once the graph is rewritten
            options.add_initializer(key, self.values[key])

    @cached_property
    def known(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The graph's own weights: onnx's number of their type, and their shape."""
        return weights(self.source.path / self.name / "model.onnx")

    @cached_property
    def values(self) -> dict[str, ort.OrtValue]:
        """By name, each weight of the graph that is another one. ModelError where the graph has no such weight."""
        changed, values = self.source.changed(self.name), dict[str, ort.OrtValue]()
        headers = [self.source.header(path) for path in self.source.files(self.name)] if changed else []
        stored = {key: file for file in headers for key in file.tensors}
        for key in changed:
            dtype, shape = self.known.get(key, (0, ()))
            if dtype not in TYPES or shape != stored[key].tensors[key].shape:
                problem = f"has no weight {shown(key)} that --lora or --word could change"
                raise ModelError(f"{shown(self.source.path / self.name)}: {problem}; export the model again with it")
            merged = self.source.merged(self.name, key, stored[key].array(key))
            values[key] = ort.OrtValue.ortvalue_from_numpy(merged.astype(TYPES[dtype]))
        return values
