"""Class labels as prompts: what a class-conditional model has in place of a tokenizer; knows no network.

A label is a name, one of the names it has between commas, or its number; the empty text is the null label of guidance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinydiff.errors import UsageError
from tinydiff.files import read_json

FILE = "labels.json"
LEAST = 1000  # classes of a network: diffusers' pipeline takes label 1000 for none


class Labels:
    """Names to class numbers, one a text; `vocab_size` counts the null label, which is the last."""

    bos = None
    max_length = 1

    def __init__(self, names: Sequence[str], classes: int):
        self.names = list(names)
        self.eos = self.pad = classes
        self.vocab_size = classes + 1
        parts = {part.strip().lower(): i for i, name in enumerate(self.names) for part in name.split(",")}
        self.numbers = parts | {name.strip().lower(): i for i, name in enumerate(self.names)}
        self.numbers.pop("", None)  # a class without a name

    @classmethod
    def load(cls, folder: Path) -> Labels:
        """What `save` wrote. Raises ModelError."""
        names = [str(name) for name in read_json(folder / FILE).values()]
        return cls(names, max(LEAST, len(names)))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(self.table(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def table(self) -> dict[str, str]:
        """Number to name, as `model_index.json` has it."""
        return {str(i): name for i, name in enumerate(self.names)}

    def number(self, text: str) -> int:
        """The class of a label. Raises UsageError with the nearest name for one that the model does not know."""
        name = text.strip().lower()
        if not name:
            return self.pad
        if name in self.numbers:
            return self.numbers[name]
        if name.isdecimal() and int(name) < self.pad:
            return int(name)
        from tinydiff.config import nearest

        near = nearest(name, list(self.numbers)[:2000]) if self.numbers else ""
        raise UsageError(f"{text!r}: no class of this model{near}; give a label, or a number below {self.pad}")

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(B, 1) int64."""
        return np.array([[self.number(text)] for text in texts], np.int64).reshape(-1, 1)

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        return [self.number(text)], [0]

    def cut(self, text: str) -> str:
        return ""


def one_hot(ids: np.ndarray, size: int) -> np.ndarray:
    """(B, 1) int64 -> (B, 1, size) float32: what a class-conditional denoiser reads in place of text vectors."""
    return np.eye(size, dtype=np.float32)[ids]
