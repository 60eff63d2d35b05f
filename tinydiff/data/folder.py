"""A folder of images with captions as a data source.

`layouts` says which images have which captions. Every image is decoded once at the start, so training does not fail on one
later, and is compared with its hash whenever it is read again. This module knows no model, tokens or resolution.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from tinydiff.config import Data
from tinydiff.data.checked import Checked
from tinydiff.data.layouts import Entry, entries, of_one
from tinydiff.data.listing import Skips, judge, summary, walk
from tinydiff.errors import DataError
from tinydiff.images import open_image, read_image
from tinydiff.system import shown, unreadable

BATCH = 4096  # images checked at once, to bound memory


class FolderSource:
    """The captioned images of a folder, ordered by name; with a `caption` all images, which have that one.

    `background`: the colour under transparent pixels. `captions`: where they are from, as `data.captions` has it; `layout` says
    it. `skipped`: (path, reason) for everything left out. `columns`: what else is read, of `columns.FIXES`. Raises DataError if
    the folder is missing, holds no captioned image, or more than `max_bad_fraction` of its images are bad, or where captions
    lie that are not read.
    """

    def __init__(
        self,
        path: str | Path,
        background: str = Data.background,
        max_bad_fraction: float = Data.max_bad_fraction,
        captions: str = Data.captions,
        caption: str = "",
        progress: Callable[[int, int], None] | None = None,
        columns: Collection[str] = (),
    ) -> None:
        self.path, self.background, self.columns, skips = Path(path), background, columns, Skips()
        names = walk(self.path, skips)
        if caption:
            found, self.layout = of_one(self.path, names, skips, caption)
        else:
            found, self.layout = entries(self.path, names, skips, captions)
        self._entries = self._decodable(sorted(found, key=lambda entry: entry.name), skips, progress)
        self.skipped: list[tuple[str, str]] = sorted(skips.bad + skips.notes)
        bad = sorted(skips.bad)
        if not self._entries:
            raise DataError(f"{shown(self.path)}: none of its {len(bad)} images can be used: {summary(bad)}; mend them")
        judge(self.path, len(self), len(bad), max_bad_fraction, summary(bad))

    def __len__(self) -> int:
        return len(self._entries)

    def image(self, i: int) -> np.ndarray:
        """uint8 (H, W, 3) in its own size. Raises DataError if the file can no longer be read, or is another one."""
        path, entry = self.path / self._entries[i].name, self._entries[i]
        return decoded(path, self.background, entry.digest)[0]

    def controlled(self, i: int) -> bool:
        """Whether a table names an image that is to control image i."""
        return bool(self._entries[i].control)

    def control(self, i: int) -> np.ndarray:
        """That image, uint8 (H, W, 3) in its own size."""
        name, digest = self._entries[i].control
        return decoded(self.path / name, self.background, digest)[0]

    def has_image(self, i: int) -> bool:
        """Whether a table names another image beside image i."""
        return bool(self._entries[i].other)

    def other(self, i: int) -> np.ndarray:
        """That image, uint8 (H, W, 3) of the size of image i."""
        name, digest = self._entries[i].other
        return decoded(self.path / name, self.background, digest)[0]

    def other_digest(self, i: int) -> str:
        """The first 32 hexadecimal digits of the SHA-256 of that image's file."""
        return self._entries[i].other[1][:32]

    def has_label(self, i: int) -> bool:
        return bool(self._entries[i].label)

    def label(self, i: int) -> str:
        """The class of image i, "" where none is named."""
        return self._entries[i].label

    def captions(self, i: int) -> list[str]:
        """At least one caption; the first is the main one."""
        return list(self._entries[i].captions)

    def weight(self, i: int) -> float:
        """How often image i is drawn, relative to the others."""
        return self._entries[i].weight

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self._entries[i].size

    def digest(self, i: int) -> str:
        """The first 32 hexadecimal digits of the SHA-256 of the image's file."""
        return self._entries[i].digest[:32]

    def identity(self, i: int) -> str:
        """The path of image i relative to the folder, with forward slashes."""
        return self._entries[i].name

    def fingerprint(self) -> str:
        """SHA-256 (hex) of names, file contents, captions, weights and the background."""
        total = hashlib.sha256(json.dumps(["folder 1", self.background]).encode())
        for entry in self._entries:
            told = [entry.name, entry.digest, entry.captions, entry.weight, *filter(None, [entry.control])]
            more = {"label": entry.label, "image": entry.other}
            told += [[column, more[column]] for column in self.columns]
            total.update(json.dumps(told).encode())
        return total.hexdigest()

    def report(self) -> str:
        """One line: how many images, where their captions are from, how many are left out, and the first reasons."""
        line = f"{shown(self.path)}: {len(self)} images, {self.layout}"
        return line + (f", {summary(self.skipped)}" if self.skipped else "")

    def _decodable(
        self, entries: list[Entry], skips: Skips, progress: Callable[[int, int], None] | None
    ) -> list[Entry]:
        """The entries whose image decodes, with its hash and size; those that did before are not decoded again."""
        checked, good = Checked(self.path), list[Entry]()
        try:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                for start in range(0, len(entries), BATCH):
                    found = pool.map(partial(self._decoded, skips, checked), entries[start : start + BATCH])
                    for done, entry in enumerate(found, start + 1):
                        good += [entry] if entry else []
                        if progress:
                            progress(done, len(entries))
        finally:
            checked.save()
        return good

    def _decoded(self, skips: Skips, checked: Checked, entry: Entry) -> Entry | None:
        path = self.path / entry.name
        try:
            digest, size = self._checked(checked, entry.name)
            control = entry.control and (*entry.control, self._checked(checked, entry.control[0])[0])
            entry = entry._replace(digest=digest, size=size, control=control)
            return self._beside(checked, entry) if "image" in self.columns and entry.other else entry
        except DataError as error:
            reason = str(error).removeprefix(f"{shown(path)}: ").split("; ")[0]
        except OSError as error:
            reason = error.strerror or "cannot be read"
        skips.bad.append((shown(entry.name), reason))
        return None

    def _beside(self, checked: Checked, entry: Entry) -> Entry:
        """The entry with the hash of its other image, which has to be of the same size. Raises DataError."""
        digest, (width, height) = self._checked(checked, entry.other[0])
        if (width, height) != entry.size:
            problem = f"{width}x{height}, and the image {entry.size[0]}x{entry.size[1]}"
            raise DataError(f"its {shown(entry.other[0])} is {problem}")
        return entry._replace(other=(*entry.other, digest))

    def _checked(self, checked: Checked, name: str) -> tuple[str, tuple[int, int]]:
        """The SHA-256 and (width, height) of an image that decodes. Raises DataError."""
        if known := checked.get(name):
            return known
        begun, (image, digest) = time.time_ns(), decoded(self.path / name, self.background)
        checked.add(name, begun, digest, (image.shape[1], image.shape[0]))
        return digest, (image.shape[1], image.shape[0])


def decoded(path: Path, background: str, digest: str = "") -> tuple[np.ndarray, str]:
    """uint8 (H, W, 3) of an image file, and the SHA-256 of the bytes it was decoded from, which must be `digest` if given."""
    try:
        data = read_image(path)
    except OSError as error:
        raise unreadable(error, path, DataError) from error
    found = hashlib.sha256(data).hexdigest()
    if digest not in ("", found):
        raise DataError(f"{shown(path)}: has changed since the start; start again")
    try:
        return open_image(data, background), found
    except DataError as error:
        raise DataError(f"{shown(path)}: {str(error).removeprefix('image: ')}") from error
