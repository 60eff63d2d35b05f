"""Sources one after the other as one, with their captions as the configuration words them."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff.data.wording import worded
from tinydiff.errors import DataError
from tinydiff.system import shown

if TYPE_CHECKING:
    from tinydiff.config import Data
    from tinydiff.data.dataset import Source


class Several:
    """The images of `parts`, each part's drawn `repeats` times as often; `names` are the parts' own, if there are several.

    Raises DataError where nothing is left of a caption.
    """

    def __init__(self, parts: Sequence[Source], names: Sequence[str], repeats: Sequence[float], data: Data):
        self.parts, self.repeats, self.data = parts, repeats, data
        self.names = [f"{name.rstrip('/')}/" for name in names] if len(parts) > 1 else [""]
        self.ends = list(accumulate(map(len, parts)))
        self.skipped = [
            (f"{shown(name)}{path}", reason)
            for name, part in zip(self.names, parts, strict=True)
            for path, reason in part.skipped
        ]

    def __len__(self) -> int:
        return self.ends[-1]

    def _part(self, i: int) -> tuple[int, int]:
        """Which part image i is of, and which one it is there."""
        number = bisect_right(self.ends, i)
        return number, i - self.ends[number] + len(self.parts[number])

    def image(self, i: int) -> np.ndarray:
        number, inside = self._part(i)
        return self.parts[number].image(inside)

    def captions(self, i: int) -> list[str]:
        number, inside = self._part(i)
        try:
            return worded(self.parts[number].captions(inside), self.data)
        except ValueError as error:
            raise DataError(f"data.prefix, suffix: {error}") from error

    def weight(self, i: int) -> float:
        number, inside = self._part(i)
        return self.parts[number].weight(inside) * self.repeats[number]

    def size(self, i: int) -> tuple[int, int]:
        number, inside = self._part(i)
        return self.parts[number].size(inside)

    def digest(self, i: int) -> str:
        number, inside = self._part(i)
        return self.parts[number].digest(inside)

    def identity(self, i: int) -> str:
        number, inside = self._part(i)
        return self.names[number] + self.parts[number].identity(inside)

    def controlled(self, i: int) -> bool:
        """Whether an image is named that is to control image i; shards name none."""
        number, inside = self._part(i)
        return getattr(self.parts[number], "controlled", lambda i: False)(inside)

    def control(self, i: int) -> np.ndarray:
        number, inside = self._part(i)
        part: Any = self.parts[number]
        return part.control(inside)

    def has_label(self, i: int) -> bool:
        return self._asked("has_label", i, False)

    def has_image(self, i: int) -> bool:
        return self._asked("has_image", i, False)

    def label(self, i: int) -> str:
        return self._asked("label", i)

    def other(self, i: int) -> np.ndarray:
        return self._asked("other", i)

    def other_digest(self, i: int) -> str:
        return self._asked("other_digest", i)

    def _asked(self, what: str, i: int, otherwise: Any = None) -> Any:
        """What the part of image i says of it, which need not be one that can."""
        number, inside = self._part(i)
        return getattr(self.parts[number], what, lambda i: otherwise)(inside)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the parts' own and how often each is drawn; the wording is the configuration's."""
        told = [[part.fingerprint(), repeats] for part, repeats in zip(self.parts, self.repeats, strict=True)]
        return told[0][0] if len(told) == 1 else hashlib.sha256(json.dumps(["several 1", told]).encode()).hexdigest()

    def report(self) -> str:
        """A line for each part, with how often it is drawn where that differs."""
        drawn = [f", drawn {n:g} times as often" if n != 1 else "" for n in self.repeats]
        return "\n".join(part.report() + more for part, more in zip(self.parts, drawn, strict=True))
