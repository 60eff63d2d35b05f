"""The user's cache folder: what costs time to make, belongs to no run or model, and may be deleted at any moment."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from tinydiff import temporary


def lasting(kind: str) -> Path | None:
    """The folder of one kind of things in the user's cache folder; None where nothing can be written there."""
    home, cache = os.environ.get("HOME"), os.environ.get("XDG_CACHE_HOME", "")
    bases = ([Path(cache)] if os.path.isabs(cache) else []) + ([Path(home, ".cache")] if home else [])
    for folder in [base / "tinydiff" / kind for base in bases]:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return None


def user_folder(kind: str) -> Path:
    """Where a kind of things is kept that cannot be done without: in the cache folder, else in the temporary folder."""
    if folder := lasting(kind):
        return folder
    folder = Path(tempfile.gettempdir(), f"tinydiff-{os.getuid()}")
    taken = os.path.lexists(folder) and folder.lstat().st_uid != os.getuid()
    return Path(tempfile.mkdtemp(prefix="tinydiff-")) if taken else folder / kind


def trim(folder: Path, most: int) -> None:
    """Remove the folders in `folder` that were used longest ago, by their times, until `most` bytes are left."""
    total = 0
    with contextlib.suppress(OSError):
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
        for path in sorted(entries, key=lambda path: path.lstat().st_mtime_ns, reverse=True):
            total += sum(file.lstat().st_size for file in path.rglob("*"))
            if total > most:
                temporary.discard(path)
