"""Class labels as prompts: what a class-conditional model has instead of a tokenizer. It knows no network.

A label is a class's name, or one part of a name with commas ("tabby, tabby cat"). A prompt may give a class's number instead:
of a model trained here, one that was trained, if no name is a number. Empty text is the null label of classifier-free guidance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tinydiff.errors import DataError, UsageError
from tinydiff.files import read_json
from tinydiff.schema import nearest
from tinydiff.system import shown

FILE = "labels.json"
LEAST = 1000  # classes that a network has at least: diffusers' pipeline uses label 1000 as the null label


class Labels:
    """Prompts to class numbers, one per prompt; `vocab_size` counts the null label, which is the last."""

    bos = None
    max_length = 1

    def __init__(self, names: Sequence[str], classes: int, whole: bool = False):
        """`whole`: a class without a name has never been trained, and a name that is a number is no number."""
        self.names = list(names)
        self.eos = self.pad = classes
        self.vocab_size = classes + 1
        synonyms = {part.strip().lower(): i for i, name in enumerate(self.names) for part in name.split(",")}
        self.numbers = synonyms | {name.strip().lower(): i for i, name in enumerate(self.names)}
        self.numbers.pop("", None)  # a class without a name
        ambiguous = any(name.isdecimal() for name in self.numbers)
        most = (0 if ambiguous else len(self.names)) if whole else classes
        self.choices = range(most)  # numbers that a prompt may give

    @classmethod
    def load(cls, folder: Path) -> Labels:
        """The labels that `save` wrote. Raises ModelError."""
        names = [str(name) for name in read_json(folder / FILE).values()]
        return cls(names, max(LEAST, len(names)), whole=True)

    def save(self, folder: Path) -> None:
        """Write labels.json, {number: name}."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(self.table(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def table(self) -> dict[str, str]:
        """{number: name}, as in `model_index.json`."""
        return {str(i): name for i, name in enumerate(self.names)}

    def number(self, text: str) -> int:
        """The class of a label. Raises UsageError, with the most similar name, for an unknown one."""
        name = text.strip().lower()
        if not name:
            return self.pad
        if name in self.numbers:
            return self.numbers[name]
        if name.isdecimal() and len(name) < 20 and int(name) in self.choices:
            return int(name)
        near = nearest(name[:100], list(self.numbers)[:2000]) if self.numbers else ""
        number = f", or a number below {len(self.choices)}" if self.choices else ""
        raise UsageError(f"{text[:60]!r}: no class of this model{near}; give a label{number}")

    def check(self, labels: Iterable[str]) -> None:
        """Raises DataError for a label of data that is no class's whole name: data have neither numbers nor synonyms."""
        whole = {name.strip().lower() for name in self.names}
        if other := next((text for text in labels if text.strip().lower() not in whole), None):
            near = nearest(other[:100].lower(), list(self.numbers)[:2000])
            fix = "take its images away, or train them all anew with --fresh"
            raise DataError(f"{shown(other)}: no class that this run was begun with{near}; {fix}")

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Class numbers (B, 1) int64. Raises UsageError for an unknown label."""
        return np.array([[self.number(text)] for text in texts], np.int64).reshape(-1, 1)

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        """The one id of a label, and where it begins."""
        return [self.number(text)], [0]

    def cut(self, text: str) -> str:
        """What `encode` drops: nothing."""
        return ""


def one_hot(ids: np.ndarray, size: int) -> np.ndarray:
    """(B, 1) int64 -> (B, 1, size) float32: what a class-conditional denoiser reads instead of text vectors."""
    return np.eye(size, dtype=np.float32)[ids]
