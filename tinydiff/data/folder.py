"""A folder of images with captions as a data source.

Three layouts are recognised: metadata.jsonl or metadata.csv in the folder; a caption file next to each image (a.png,
a.txt); or one subfolder per class, whose name is the caption. Every image is decoded once at the start, so training
does not fail on one later. This module knows no model, tokens or resolution.

Rules: hidden files are ignored. Links to files inside the folder are followed, links to folders or to the outside are
not. metadata.jsonl is preferred to metadata.csv, a.txt to a.caption, and a.png to a.jpg, a.jpeg and a.webp that share a
caption file. Several lines, or several metadata rows, are several captions.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import os
import posixpath
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from tinydiff.errors import DataError
from tinydiff.files import shown
from tinydiff.images import open_image
from tinydiff.system import unreadable

METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
REFUSED = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jxl", ".psd", ".svg")
MAX_CAPTION_FILE = MAX_LINE = 2**20
MAX_CAPTION = 4096
BATCH = 4096  # images checked at once, to bound memory
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SURROGATE = re.compile(r"[\ud800-\udfff]")


class FolderSource:
    """The captioned images of a folder, ordered by name.

    `background`: the colour under transparent pixels. `skipped`: (path, reason) for everything left out. Raises
    DataError if the folder is missing, holds no captioned image, or more than `max_bad_fraction` of its images are bad.
    """

    def __init__(self, path: str | Path, background: str = "#ffffff", max_bad_fraction: float = 0.01) -> None:
        self.path, self.background, skips = Path(path), background, _Skips()
        entries = _entries(self.path, _walk(self.path, skips), skips)
        self._entries = self._decodable(sorted(entries, key=lambda entry: entry.name), skips)
        self.skipped: list[tuple[str, str]] = sorted(skips.bad + skips.notes)
        bad = sorted(skips.bad)
        if not self._entries:
            raise DataError(f"{shown(self.path)}: none of its {len(bad)} images can be used: {summary(bad)}; mend them")
        judge(self.path, len(self), len(bad), max_bad_fraction, summary(bad))

    def __len__(self) -> int:
        return len(self._entries)

    def image(self, i: int) -> np.ndarray:
        """uint8 (H, W, 3) in its own size. Raises DataError if the file can no longer be read."""
        return open_image(self.path / self._entries[i].name, self.background)

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
            total.update(json.dumps([entry.name, entry.digest, entry.captions, entry.weight]).encode())
        return total.hexdigest()

    def report(self) -> str:
        """One line: how many images, how many left out, and the first reasons."""
        return f"{shown(self.path)}: {len(self)} images" + (f", {summary(self.skipped)}" if self.skipped else "")

    def _decodable(self, entries: list[_Entry], skips: _Skips) -> list[_Entry]:
        """The entries whose image decodes, with its hash and size."""
        batches = (entries[start : start + BATCH] for start in range(0, len(entries), BATCH))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return [entry for batch in batches for entry in pool.map(partial(self._decoded, skips), batch) if entry]

    def _decoded(self, skips: _Skips, entry: _Entry) -> _Entry | None:
        path = self.path / entry.name
        try:
            height, width = open_image(path, self.background).shape[:2]
            return entry._replace(digest=hashlib.sha256(path.read_bytes()).hexdigest(), size=(width, height))
        except DataError as error:
            reason = str(error).removeprefix(f"{shown(path)}: ").split("; ")[0]
        except OSError as error:
            reason = error.strerror or "cannot be read"
        skips.bad.append((shown(entry.name), reason))
        return None


class _Entry(NamedTuple):
    """An image; `digest`, the SHA-256 of its file, and `size`, (width, height), are known once it is decoded."""

    name: str
    captions: tuple[str, ...]
    weight: float = 1.0
    digest: str = ""
    size: tuple[int, int] = (0, 0)


class _Skips:
    """What is left out, as (path, reason): `bad` counts against the allowed fraction, `notes` are only reported."""

    def __init__(self) -> None:
        self.bad, self.notes = list[tuple[str, str]](), list[tuple[str, str]]()

    def add(self, name: str, reason: str) -> None:
        """An image is bad, any other file is a note."""
        (self.bad if _kind(name) in (*IMAGES, *REFUSED) else self.notes).append((shown(name), reason))


def judge(path: str | Path, usable: int, bad: int, allowed: float, left_out: str) -> None:
    """Raise DataError if more than the fraction `allowed` of a source's images are bad."""
    if bad > allowed * (usable + bad):
        share = f"{bad} of {usable + bad} images are unusable, over the allowed {allowed:g}"
        raise DataError(f"{shown(path)}: {share}: {left_out}; mend or remove them, or raise data.max_bad_fraction")


def summary(skipped: list[tuple[str, str]], count: int = 0) -> str:
    """How many files are left out, and the first three reasons; `count` if `skipped` does not list all."""
    count = count or len(skipped)
    reasons = ", ".join(f"{path} ({reason})" for path, reason in skipped[:3])
    return f"{count} left out: {reasons}{f' and {count - 3} more' if count > 3 else ''}"


def _kind(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


# ---- listing the files ---------------------------------------------------------------------------------------------


def _walk(root: Path, skips: _Skips) -> list[str]:
    """Sorted paths, relative to `root`, of its regular files that are not hidden."""
    if not os.path.isdir(root):
        problem = "is not a folder" if os.path.exists(root) else "does not exist"
        raise DataError(f"data folder {shown(root)} {problem}; set data.path to a folder of captioned images")

    def note(error: OSError) -> None:
        if error.filename == os.fspath(root):
            raise unreadable(error, root, DataError) from None
        skips.notes.append((shown(error.filename), error.strerror or "cannot be read"))

    inside, names = os.path.realpath(root), list[str]()
    for folder, folders, files in os.walk(root, onerror=note):
        prefix = "" if folder == os.fspath(root) else Path(folder).relative_to(root).as_posix() + "/"
        folders[:] = [name for name in folders if _enter(prefix + name, Path(folder, name), skips)]
        files = [prefix + name for name in files if not name.startswith(".")]
        names += [name for name in files if _admit(name, root / name, inside, skips)]
    return sorted(names)


def _enter(name: str, path: Path, skips: _Skips) -> bool:
    """Whether to list a subfolder."""
    hidden = path.name.startswith(".") or path.name == "__MACOSX"
    reason = "" if hidden else "link to a folder" if path.is_symlink() else _bad_name(name)
    if reason:
        skips.notes.append((shown(name), reason))
    return not hidden and not reason


def _admit(name: str, path: Path, inside: str, skips: _Skips) -> bool:
    """Whether a file may be opened; if not, `skips` gets the reason for an image, caption or metadata file."""
    reason = "not a PNG, JPEG or WEBP image" if _kind(name) in REFUSED else _bad_name(name) or _bad_file(path, inside)
    if reason and _kind(name) in (*IMAGES, *REFUSED, *SIDECARS, ".jsonl", ".csv"):
        skips.add(name, reason)
    return not reason


def _bad_name(name: str) -> str:
    return "its name is not UTF-8" if SURROGATE.search(name) else ""


def _bad_file(path: Path, inside: str) -> str:
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            if os.path.commonpath([inside, os.path.realpath(path)]) != inside:
                return "link that leaves the folder"
            status = path.stat()
    except OSError as error:
        return "broken link" if isinstance(error, FileNotFoundError) else error.strerror or "cannot be read"
    return "" if stat.S_ISREG(status.st_mode) else "not a regular file"


# ---- the three layouts ---------------------------------------------------------------------------------------------


def _entries(root: Path, names: list[str], skips: _Skips) -> list[_Entry]:
    """Every image that has captions. Raises DataError if the layout is none of the three."""
    if tables := [name for name in METADATA if name in names]:
        skips.notes += [(name, f"{tables[0]} is used") for name in tables[1:]]
        return _from_metadata(root, tables[0], names, skips)
    below = [shown(posixpath.dirname(name)) for name in names if posixpath.basename(name) in METADATA]
    if below:
        places = ", ".join(dict.fromkeys(below[:3]))
        raise DataError(f"{shown(root)} has its metadata in subfolders ({places}); set data.path to one of them")
    images = [name for name in names if _kind(name) in IMAGES]
    if not images:
        reasons = f" ({summary(sorted(skips.bad))})" if skips.bad else ""
        raise DataError(f"data folder {shown(root)} holds no images; put PNG, JPEG or WEBP files there{reasons}")
    sidecars, stems = _by_stem(names, SIDECARS, "{} is used", skips), set(map(_stem, images))
    skips.notes += [(shown(name), "caption without an image") for stem, name in sidecars.items() if stem not in stems]
    if stems & sidecars.keys():
        return _from_sidecars(root, images, sidecars, skips)
    if any("/" in name for name in images):
        return _from_classes(images, skips)
    first = shown(_stem(images[0]))
    if sidecars:
        problem = f"no caption file matches an image (as {shown(next(iter(sidecars.values())))})"
        raise DataError(f"{shown(root)}: {problem}; name them {first}.txt and so on")
    fix = f"write {first}.txt and so on, a metadata.jsonl, or sort them into subfolders"
    raise DataError(f"{shown(root)}: its {len(images)} images have no captions; {fix}")


def _by_stem(names: list[str], kinds: tuple[str, ...], note: str, skips: _Skips) -> dict[str, str]:
    """{stem: its file of the first of `kinds`}; `skips` gets the other files, with `note` about the first."""
    chosen: dict[str, str] = {}
    for kind in kinds:
        for name in names:
            if _kind(name) == kind and (first := chosen.setdefault(_stem(name), name)) != name:
                skips.notes.append((shown(name), note.format(shown(first))))
    return chosen


def _from_sidecars(root: Path, images: list[str], sidecars: dict[str, str], skips: _Skips) -> list[_Entry]:
    entries = []
    for stem, name in _by_stem(images, IMAGES, "shares its caption with {}", skips).items():
        if stem not in sidecars:
            skips.add(name, "no caption file")
            continue
        try:
            with open(root / sidecars[stem], "rb") as file:
                lines = caption_text(file.read(MAX_CAPTION_FILE + 1)).splitlines()
            entries.append(_Entry(name, tuple(clean_captions(lines))))
        except (ValueError, OSError) as error:
            skips.add(name, (error.strerror or "caption unreadable") if isinstance(error, OSError) else str(error))
    return entries


def _from_classes(images: list[str], skips: _Skips) -> list[_Entry]:
    entries = []
    for name in images:
        label = posixpath.basename(posixpath.dirname(name)).replace("_", " ")
        if label.strip():
            entries.append(_Entry(name, tuple(clean_captions([label]))))
        else:
            skips.add(name, "not in a class subfolder")
    return entries


# ---- rows and captions ---------------------------------------------------------------------------------------------


def _from_metadata(root: Path, table: str, names: list[str], skips: _Skips) -> list[_Entry]:
    """Entries of metadata.jsonl or metadata.csv; the captions of rows that name the same file are joined."""
    known, number = set(names), 0
    entries: dict[str, _Entry] = {}
    for number, row in _rows(root / table):
        try:
            entry = _entry(row, known)
            old = entries.get(entry.name, entry)
            entries[entry.name] = old._replace(captions=tuple(dict.fromkeys(old.captions + entry.captions)))
        except ValueError as error:
            skips.bad.append((f"{table}:{number}", str(error)))
    if not number:
        raise DataError(f"{shown(root / table)} is empty; write a row with file_name and text for each image")
    unnamed = [name for name in names if _kind(name) in IMAGES and name not in entries]
    skips.notes += [(shown(name), f"not used by {table}") for name in unnamed]
    return list(entries.values())


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, row or what is wrong with it). Bytes that are not UTF-8 become surrogates, refused later."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _csv_rows(path, _lines(file)) if path.suffix == ".csv" else _json_rows(_lines(file))
    except OSError as error:
        raise unreadable(error, path, DataError) from None


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; of a line longer than MAX_LINE, its first MAX_LINE + 1 characters."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith("\n"):
            rest = file.readline(MAX_LINE + 1)
        yield line


def _json_rows(file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line) if len(line) <= MAX_LINE else None
            yield number, row if isinstance(row, dict) else "not a JSON object, or over 1 MiB"
        except (ValueError, RecursionError):
            yield number, "not a JSON object"


def _csv_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    table = csv.DictReader(file, strict=True)
    try:
        if missing := {"file_name", "text"} - set(table.fieldnames or ()):
            raise DataError(f"{shown(path)}: no column {sorted(missing)[0]}; its first line must be file_name,text")
        for row in table:
            yield table.line_num, {key: row[key] for key in ("file_name", "text", "weight") if row.get(key) is not None}
    except csv.Error as error:
        raise DataError(f"{shown(path)}: line {table.line_num}: {error}; quote it as CSV") from None


def _entry(row: dict[str, Any] | str, known: set[str]) -> _Entry:
    """The entry of one row. Raises ValueError if the row is unusable."""
    if isinstance(row, str):
        raise ValueError(row)
    name, captions = row.get("file_name"), row.get("captions") or []
    if not isinstance(name, str) or not name:
        raise ValueError("no file_name")
    name = posixpath.normpath(name)
    if name not in known:
        raise ValueError(f"no such file in the folder: {shown(name)}")
    texts = [row.get("text"), *captions] if isinstance(captions, list) else [row.get("text"), captions]
    texts = [text for text in texts if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{shown(name)}: a caption is not text")
    return _Entry(name, tuple(clean_captions(texts)), clean_weight(row.get("weight", 1.0)))


def clean_weight(value: Any) -> float:
    """A weight from JSON or CSV. Raises ValueError unless it is a positive number."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and 0 < (weight := float(value)) < math.inf:
            return weight
    raise ValueError("weight is not a positive number")


def clean_captions(texts: Iterable[str]) -> list[str]:
    """Captions as they are trained on: NFC, one line, single spaces, at most MAX_CAPTION characters, no duplicates.

    Raises ValueError if a caption holds NUL or bytes that are not UTF-8, or if all are empty.
    """
    captions: dict[str, None] = {}
    for text in texts:
        if "\0" in text:
            raise ValueError("caption holds NUL; save it as UTF-8")
        if SURROGATE.search(text):
            raise ValueError("caption is not UTF-8")
        words = unicodedata.normalize("NFC", CONTROL.sub(" ", text)).split()
        captions.setdefault(" ".join(words)[:MAX_CAPTION].rstrip())
    captions.pop("", None)
    if not captions:
        raise ValueError("empty caption")
    return list(captions)


def caption_text(data: bytes) -> str:
    """The text of a caption file, of which a longer one need not be read whole. Raises ValueError for a bad one."""
    if len(data) > MAX_CAPTION_FILE:
        raise ValueError("caption file over 1 MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("caption is not UTF-8") from None
