"""What data say of an image besides captions, where a denoiser is to be told it: its class, and another image."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff.errors import DataError
from tinydiff.system import shown

if TYPE_CHECKING:
    from tinydiff.data.dataset import Source

FIXES = {
    "label": "name its class in a column label of metadata.jsonl, or sort images into folders of classes",
    "image": "name its file in a column image of metadata.jsonl, beside file_name",
}


def check(source: Source, columns: Collection[str]) -> None:
    """Raise DataError where images lack a column."""
    for column in columns:
        has = getattr(source, f"has_{column}", lambda i: False)
        lacking = [i for i in range(len(source)) if not has(i)]
        if lacking:
            problem = f"no {column}, and {len(lacking)} of {len(source)} images have none"
            raise DataError(f"{shown(source.identity(lacking[0]))}: {problem}; {FIXES[column]}")


class Others:
    """A source's other images as a source: in the places of its own, and of their sizes."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def image(self, i: int) -> np.ndarray:
        return self.source.other(i)

    def digest(self, i: int) -> str:
        return self.source.other_digest(i)
