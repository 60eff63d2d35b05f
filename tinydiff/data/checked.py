"""Which images of a folder were decoded before, with hash and size, so that a second run need not decode all again.

It is kept in the user's cache folder and trusted as long as a file has the size, times and number that it had then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tinydiff.errors import UserError
from tinydiff.files import read_json, write_file
from tinydiff.user_cache import lasting, trim
from tinydiff.verified import RECENT, mark

FORMAT = 1  # of what is kept, and of how images are decoded
MOST = 256 << 20  # bytes, of all folders


class Checked:
    """The images of `folder` by name. A damaged record is one that knows nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, place = folder, lasting("checked")
        name = hashlib.sha256(f"{FORMAT} {os.path.realpath(folder)}".encode("utf-8", "surrogateescape")).hexdigest()[
            :32
        ]
        self.path = place / name / "images.json" if place else None
        self.known, self.learnt = self.read(), False

    def read(self) -> dict[str, Any]:
        try:
            return read_json(self.path) if self.path and self.path.exists() else {}
        except UserError:
            return {}

    def get(self, name: str) -> tuple[str, tuple[int, int]] | None:
        """An image's SHA-256 and (width, height), where the file is the one that was decoded."""
        row = self.known.get(name)
        with contextlib.suppress(OSError, ValueError, TypeError):
            if isinstance(row, list) and row[:-3] == mark(self.folder / name):
                digest, width, height = row[-3:]
                return str(digest), (int(width), int(height))
        return None

    def add(self, name: str, begun: int, digest: str, size: tuple[int, int]) -> None:
        """Remember an image, whose decoding was `begun` (ns), unless it may change again with the same times."""
        with contextlib.suppress(OSError):
            now = mark(self.folder / name)
            if begun - max(now[1:3]) > RECENT:
                self.known[name], self.learnt = [*now, digest, *size], True

    def save(self) -> None:
        """Write what was learnt, if there is anything and a place for it."""
        if self.path and self.learnt:
            with contextlib.suppress(UserError, OSError):
                self.path.parent.mkdir(exist_ok=True)
                write_file(self.path, json.dumps(self.known).encode(), force=True)
                trim(self.path.parent.parent, MOST)
