"""Rows that are costly to compute, in safetensors files of a thousand, each named by a hash of all that its rows depend on.

A stale file cannot be read, because nobody asks for its name; a change costs only the files of the rows that it concerns.
Files are mapped: what is not used is never read, and no descriptor stays open. What a header says is checked against a
hash of its own, the rows are not. This module knows neither images nor captions, and imports torch only to map a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff.checkpoints import weights
from tinydiff.checkpoints.header import header
from tinydiff.errors import DataError, ModelError
from tinydiff.files import shown, written

FORMAT = 1
ROWS = 1024  # of a file
BATCH = 64  # rows computed at once
LABEL = "tinydiff"  # of our entry in a file's metadata
OURS = re.compile(r"(latents|text)-[0-9a-f]{16,32}\.safetensors|\.tmp-(latents|text)-[0-9a-f]{32}.*")

Progress = Callable[[int, int], None]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Chunk:
    """Rows that are computed, written and thrown away together; `items` is what each is of."""

    path: Path
    items: Sequence[Any] | np.ndarray


def chunk(folder: Path, kind: str, items: Sequence[Any] | np.ndarray, inputs: Any) -> Chunk:
    """The chunk of some items. `inputs`, which JSON can hold, are all that its rows depend on."""
    text = json.dumps([FORMAT, kind, inputs])
    return Chunk(folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors", items)


def fill(
    chunks: Sequence[Chunk],
    compute: Callable[[Any], Arrays],
    progress: Progress,
    notes: Callable[[Arrays], Any] = lambda _: None,
) -> None:
    """Compute and commit chunks, overwriting what is there.

    `compute(items)` gives float32 rows of up to BATCH items, `notes(rows)` what to say of a whole chunk besides.
    `progress(rows done, of)` may raise: what is committed by then stays, and of the chunk at hand nothing does.
    """
    done, total = 0, sum(len(c.items) for c in chunks)
    for c in chunks:
        parts: list[Arrays] = []
        for start in range(0, len(c.items), BATCH):
            parts.append(compute(c.items[start : start + BATCH]))
            if start + BATCH >= len(c.items):
                rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                _write(c.path, rows, notes(rows))
            progress(done + min(start + BATCH, len(c.items)), total)
        done += len(c.items)


def _write(path: Path, rows: Arrays, notes: Any) -> None:
    from safetensors.numpy import save_file

    told = {"notes": notes, "check": _check(notes, {name: row.shape for name, row in rows.items()})}
    with written(path, force=True) as temporary:
        save_file(rows, temporary, {LABEL: json.dumps(told)})
        temporary.chmod(0o644)  # safetensors writes for the owner alone


def _check(notes: Any, shapes: dict[str, tuple[int, ...]]) -> str:
    """A hash of what a header says, so that no flipped bit in it is believed."""
    return hashlib.sha256(json.dumps([notes, sorted(shapes.items())]).encode()).hexdigest()


def notes_of(c: Chunk) -> Any:
    """What `notes` said of a chunk; the file's rows are not read. Raises DataError where it is missing or damaged."""
    try:
        found = header(c.path)
        told, shapes = json.loads(found.metadata[LABEL]), {name: t.shape for name, t in found.tensors.items()}
        right = told["check"] == _check(told["notes"], shapes)
        if right and all(t.dtype == "F32" and t.shape[0] == len(c.items) for t in found.tensors.values()):
            return told["notes"]
    except (ModelError, ValueError, KeyError, TypeError, IndexError):
        pass
    raise DataError(f"{shown(c.path)}: missing or damaged; run the same command again, which computes it anew")


def whole(c: Chunk) -> bool:
    """Whether a chunk is there and sound, as far as its header tells."""
    try:
        notes_of(c)
    except DataError:
        return False
    return True


class Rows:
    """The rows of some chunks as one table of float32 columns, in mapped files.

    `notes`: those of each chunk. Raises DataError where a file is missing or damaged.
    """

    def __init__(self, chunks: Sequence[Chunk]):
        self.notes = [notes_of(c) for c in chunks]
        self.files = [_mapped(c.path) for c in chunks]

    def gather(self, name: str, files: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows `rows` (B,) of files `files` (B,): (B, ...). They are of one shape."""
        out = np.empty((len(files), *self.files[files[0]][name].shape[1:]), np.float32)
        for i, (file, row) in enumerate(zip(files.tolist(), rows.tolist(), strict=True)):
            out[i] = self.files[file][name][row]
        return out


def _mapped(path: Path) -> Arrays:
    """The columns of a file. torch maps it and closes it; numpy's own maps each hold a descriptor."""
    return {name: tensor.numpy() for name, tensor in weights.tensors([path]).items()}


def sweep(folder: Path, keep: Iterable[Path]) -> None:
    """Remove the cache's files that are not in `keep`, and what a killed process began. Nobody may be filling it."""
    kept = {path.name for path in keep}
    for path in folder.iterdir() if folder.is_dir() else ():
        if OURS.fullmatch(path.name) and path.name not in kept:
            with contextlib.suppress(OSError):  # what cannot be removed stays
                path.unlink()
