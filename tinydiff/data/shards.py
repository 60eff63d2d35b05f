"""WebDataset tar shards as a data source: each shard is indexed once, then read by random access.

shard_index.py defines what a sample is. Nothing is extracted: an image is a range of bytes, decoded only when it is
drawn. This module knows no model, tokens or resolution.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Collection
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from tinydiff.config import Data
from tinydiff.data.layouts import METADATA
from tinydiff.data.listing import IMAGES, judge, summary
from tinydiff.data.shard_index import LABELLED, MAX_SKIPPED, ROW, Row, Skips, indexed, reopened
from tinydiff.errors import DataError
from tinydiff.files import shown
from tinydiff.images import open_image
from tinydiff.system import unreadable
from tinydiff.user_cache import user_folder

MAX_OPEN = 64
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
NOT_EXPANDED = re.compile(r"^(pipe:|\w{2,}:/)|[{}*?]")


def find_shards(path: str) -> list[Path]:
    """The archive at `path`, or all in that folder by name; none if FolderSource is to read or refuse `path`.

    Compressed ones are returned, to be refused, if there are no others. Raises DataError for a pattern, URL or no .tar.
    """
    if not os.path.exists(path) and (path.lower().endswith(".tar") or NOT_EXPANDED.search(path)):
        hint = "braces, wildcards, pipe: and URLs are not expanded; " if NOT_EXPANDED.search(path) else ""
        raise DataError(f"{shown(path)}: no such file or folder; {hint}give a .tar file or a folder")
    if not os.path.isdir(path):
        return [Path(path)] if path.lower().endswith((".tar", *PACKED)) else []
    names = _visible(path)
    if any(name.lower().endswith((*IMAGES, *METADATA)) for name in names):
        return []  # unpacked images; an archive next to them is what they came in
    shards = [name for name in names if name.lower().endswith(".tar")]
    if not shards and not any(os.path.isdir(os.path.join(path, name)) for name in names):
        shards = [name for name in names if name.lower().endswith(PACKED)]
    return [Path(path, name) for name in shards]


def _visible(path: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        raise unreadable(error, path, DataError) from error


class ShardSource:
    """The captioned images of one .tar file, or of all in a folder sorted by name, in the order of the archives.

    Indexes are made once and kept in `index_dir`; meanwhile `progress(shards done, shards in all)` is called.
    `skipped`: the first thousand (shard/member, reason) of what is left out. Raises DataError if there are no shards,
    one is damaged, or more than `max_bad_fraction` of the images are unusable.
    """

    def __init__(
        self,
        path: str | Path,
        background: str = Data.background,
        max_bad_fraction: float = Data.max_bad_fraction,
        index_dir: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        captions: str = Data.captions,
        columns: Collection[str] = (),
    ) -> None:
        self.path, self.background, self.columns = str(path), background, columns
        if not (paths := find_shards(self.path)):
            raise DataError(f"{shown(self.path)}: no .tar file there; give one, or a folder of them")
        others = set(_visible(self.path)) - {path.name for path in paths} if os.path.isdir(self.path) else set()
        self._shards, skipped = indexed(paths, index_dir or user_folder("shards"), progress, captions)
        notes = [(shown(name), "not a .tar file") for name in sorted(others)]
        self.skipped: Skips = (skipped + notes)[:MAX_SKIPPED]
        left_out = len(notes) + sum(shard.left_out for shard in self._shards)
        self._left_out = summary(self.skipped, left_out) if left_out else ""
        self._ends = list(accumulate(shard.samples for shard in self._shards))
        self._file = lru_cache(MAX_OPEN)(partial(reopened, self._shards, captions))
        if not len(self):
            problem = "no sample can be used" + (f": {self._left_out}" if self._left_out else "")
            raise DataError(f"{shown(self.path)}: {problem}; put an image and a caption of one name into the shards")
        judge(self.path, len(self), sum(shard.bad for shard in self._shards), max_bad_fraction, self._left_out)

    def __len__(self) -> int:
        return self._ends[-1]

    def image(self, i: int) -> np.ndarray:
        """uint8 (H, W, 3) in its own size. Raises DataError, naming shard and member, if it does not decode."""
        number, row = self._row(i)
        data = self._file(number, False).read(row.start, row.bytes)
        if hashlib.sha256(data).digest()[: len(row.digest)] != row.digest:  # the index is not of what is there
            self._shards[number].index_path.unlink(missing_ok=True)
            raise DataError(f"{shown(self._shards[number].path)}: has changed since it was indexed; start again")
        try:
            return open_image(data, self.background)
        except DataError as error:
            raise DataError(f"{shown(self.identity(i))}: {str(error).removeprefix('image: ')}") from error

    def captions(self, i: int) -> list[str]:
        """At least one caption; the first is the main one."""
        return self._said(i)[0].split("\n")

    def has_label(self, i: int) -> bool:
        return bool(self._said(i)[1])

    def label(self, i: int) -> str:
        """The class of image i, "" where none is named."""
        return self._said(i)[1]

    def _said(self, i: int) -> tuple[str, str]:
        """The captions of image i, and its class."""
        number, row = self._row(i)
        text = self._text(number, self._shards[number].captions_at + row.captions, row.captions_bytes)
        captions, _, label = text.partition(LABELLED)
        return captions, label

    def weight(self, i: int) -> float:
        """How often image i is drawn, relative to the others."""
        return self._row(i)[1].weight

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) in pixels, upright, from the image's header."""
        row = self._row(i)[1]
        return row.width, row.height

    def digest(self, i: int) -> str:
        """The first 32 hexadecimal digits of the SHA-256 of the image's bytes in the shard."""
        return self._row(i)[1].digest.hex()

    def identity(self, i: int) -> str:
        """The shard's file name and the image's name in it, as train-0007.tar/dogs/12.jpg."""
        number, row = self._row(i)
        shard = self._shards[number]
        return f"{shard.path.name}/{self._text(number, shard.names_at + row.name, row.name_bytes)}"

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the shards' names and contents (names, images, captions, weights) and the background."""
        shards = [[shard.path.name, shard.content] for shard in self._shards]
        labels = [[self.label(i) for i in range(len(self))]] if "label" in self.columns else []
        return hashlib.sha256(json.dumps(["shards 1", self.background, shards, *labels]).encode()).hexdigest()

    def report(self) -> str:
        """One line: how many images, how many left out, and the first reasons."""
        line = f"{shown(self.path)}: {len(self)} images in {len(self._shards)} shards"
        return f"{line}, {self._left_out}" if self._left_out else line

    def _row(self, i: int) -> tuple[int, Row]:
        """Image i's shard, as an index into the shards, and its row there."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        number = bisect_right(self._ends, i)
        shard = self._shards[number]
        at = shard.rows_at + (i - self._ends[number] + shard.samples) * ROW.size
        return number, Row._make(ROW.unpack(self._file(number, True).read(at, ROW.size)))

    def _text(self, number: int, at: int, size: int) -> str:
        return self._file(number, True).read(at, size).decode()
