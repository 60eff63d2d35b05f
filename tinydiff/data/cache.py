"""A disk cache of costly rows, 1,024 to a safetensors file. A file's name is a hash of all that its rows depend on.

When an input changes, so does the name: a stale file is never read, and only the files concerned are computed again.
Files are memory-mapped: only rows in use are read, and no descriptor stays open. A hash protects each header, a checksum each
column, which is compared when the first of a file's rows is read. This module knows neither images nor captions, and
imports torch only to map a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import temporary
from tinydiff.checkpoints import weights
from tinydiff.checkpoints.header import header
from tinydiff.errors import DataError, ModelError, out_of_memory
from tinydiff.files import shown, written

FORMAT = 1
ROWS = 1024  # in a file
BATCH = 64  # most rows computed at once
AGAIN = "run the same command again, which computes it anew"
LABEL = "tinydiff"  # the key of our entry in a file's metadata
OURS = re.compile(
    r"(latents|text|features)-[0-9a-f]{16,32}\.safetensors|\.tmp-(latents|text|features)-[0-9a-f]{32}.*|\.tmp[0-9A-Za-z]{6}"
)

Progress = Callable[[int, int], None]
Arrays = dict[str, np.ndarray]
Compute = Callable[[Any], Arrays]


@dataclass(frozen=True)
class Chunk:
    """One file of the cache, computed, written and removed as a whole: one row for each of `items`."""

    path: Path
    items: Sequence[Any] | np.ndarray


def chunk(folder: Path, kind: str, items: Sequence[Any] | np.ndarray, inputs: Any) -> Chunk:
    """The chunk with the rows of `items`. `inputs`, JSON values, are everything that these rows depend on."""
    text = json.dumps([FORMAT, kind, inputs])
    return Chunk(folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors", items)


def fill(
    chunks: Sequence[Chunk],
    compute: Compute,
    progress: Progress,
    notes: Callable[[Arrays], Any] = lambda _: None,
    most: int = BATCH,
) -> None:
    """Compute the chunks and write their files, overwriting existing ones.

    `compute(items)` gives the float32 rows of up to `most` items, and at most BATCH, of fewer where memory does not suffice;
    `notes(rows)` what a chunk's header stores besides. `progress(rows done, rows in all)` may raise to stop: only chunks
    already written stay.
    """
    from safetensors.numpy import save_file

    done, total, size = 0, sum(len(c.items) for c in chunks), max(1, min(most, BATCH))
    for c in chunks:
        batches, start = list[Arrays](), 0
        while start < len(c.items):
            if start:
                progress(done + start, total)
            try:
                batches.append(compute(c.items[start : start + size]))
            except Exception as error:
                if not out_of_memory(error) or size == 1:
                    raise
                size = max(1, min(size, len(c.items) - start) // 2)
                continue
            start += size
        rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        entry = {"notes": notes(rows), "crc": {name: _crc(column) for name, column in rows.items()}}
        entry["check"] = _check(entry, {name: column.shape for name, column in rows.items()})
        with written(c.path, force=True) as file:
            save_file(rows, file, {LABEL: json.dumps(entry)})
        done += len(c.items)
        progress(done, total)


def _crc(column: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(column).data.cast("B"))


def _check(entry: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> str:
    """A hash of a header's entry and shapes, which shows a flipped bit in either."""
    told = [entry["notes"], entry["crc"]] if "crc" in entry else entry["notes"]  # older versions wrote no checksums
    return hashlib.sha256(json.dumps([told, sorted(shapes.items())]).encode()).hexdigest()


def notes_of(c: Chunk) -> Any:
    """The notes in a chunk's header; rows are not read. Raises DataError if the file is missing or damaged."""
    return _entry(c)["notes"]


def _entry(c: Chunk) -> dict[str, Any]:
    """Our entry in a chunk's header."""
    try:
        head = header(c.path)
        entry, shapes = json.loads(head.metadata[LABEL]), {name: t.shape for name, t in head.tensors.items()}
        sound = entry["check"] == _check(entry, shapes)
        if sound and all(t.dtype == "F32" and t.shape[0] == len(c.items) for t in head.tensors.values()):
            return entry
    except (ModelError, ValueError, KeyError, TypeError, IndexError):
        pass
    raise DataError(f"{shown(c.path)}: missing or damaged; {AGAIN}")


def whole(c: Chunk) -> bool:
    """Whether a chunk's file exists and has a sound header."""
    try:
        notes_of(c)
    except DataError:
        return False
    return True


class Rows:
    """The float32 columns of some chunks, memory-mapped, and their `notes`. Raises DataError if one is damaged."""

    def __init__(self, chunks: Sequence[Chunk]):
        entries = [_entry(c) for c in chunks]
        self.notes, self.paths = [entry["notes"] for entry in entries], [c.path for c in chunks]
        self.unread = {i: entry.get("crc", {}) for i, entry in enumerate(entries)}  # files of older versions have none
        # mapped by torch, which closes each file; numpy's own maps each hold a descriptor
        self.files: list[Arrays] = [{k: t.numpy() for k, t in weights.tensors([c.path]).items()} for c in chunks]

    def gather(self, name: str, files: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Column `name` at rows `rows` (B,) of files `files` (B,), all of one shape: (B, ...)."""
        for file in self.unread.keys() & set(files.tolist()):
            self._check(file)
        places = zip(files.tolist(), rows.tolist(), strict=True)
        return np.stack([self.files[file][name][row] for file, row in places])

    def _check(self, file: int) -> None:
        """DataError where a file's columns are not those written; it is removed, so that they are computed anew."""
        if any(_crc(self.files[file][name]) != crc for name, crc in self.unread[file].items()):
            self.paths[file].unlink(missing_ok=True)
            raise DataError(f"{shown(self.paths[file])}: damaged, and removed; {AGAIN}")
        self.unread.pop(file, None)


def sweep(folder: Path, keep: Iterable[Path]) -> None:
    """Remove cache files not in `keep` and leftovers of killed processes. No process may be filling the folder."""
    kept = {path.name for path in keep}
    temporary.sweep(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if OURS.fullmatch(path.name) and path.name not in kept and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()
