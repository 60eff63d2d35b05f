"""A folder of images with captions as a data source.

Three layouts, told apart by what is there: metadata.jsonl or metadata.csv in the folder; a caption file beside each
image (a.png, a.txt); or one subfolder for each class, its name the caption. What is unusable is left out by a rule that
depends on the files alone, listed in `skipped`, and an error when there is too much of it. Every image is decoded once
at the start, so that training meets no surprises. This module knows no model, tokens or resolution.

The rules. Hidden files are ignored. Links are followed to files inside the folder only, never to folders.
metadata.jsonl goes before metadata.csv, a.txt before a.caption, and a.png before a.jpg, a.jpeg and a.webp when they
share a caption file. Several lines, or repeated metadata rows, are several captions. Captions are UTF-8, NFC, on one
line, of at most 4,096 characters.
"""

from __future__ import annotations

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
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from tinydiff.errors import DataError
from tinydiff.files import shown
from tinydiff.images import open_image

METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
REFUSED = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jxl", ".psd", ".svg")
MAX_CAPTION_FILE = 2**20
MAX_LINE = 2**20
MAX_CAPTION = 4096
BATCH = 4096  # images checked at once, which bounds the memory of the check
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SURROGATE = re.compile(r"[\ud800-\udfff]")


class FolderSource:
    """The captioned images of a folder, ordered by name.

    `background` shows through transparent pixels. `skipped` holds (path, reason) for everything left out. Raises
    DataError when the folder is missing, holds no captioned image, or when more than `max_bad_fraction` of its images
    are unusable.
    """

    def __init__(self, path: str | Path, background: str = "#ffffff", max_bad_fraction: float = 0.01) -> None:
        self.path, self.background = Path(path), background
        skips = _Skips()
        names = _walk(self.path, skips)
        entries = sorted(_entries(self.path, names, skips), key=lambda entry: entry.name)
        self._entries, self._checks = self._decodable(entries, skips)
        self.skipped: list[tuple[str, str]] = sorted(skips.bad + skips.notes)
        _judge(self.path, len(self._entries), skips, max_bad_fraction)

    def __len__(self) -> int:
        return len(self._entries)

    def image(self, i: int) -> np.ndarray:
        """uint8 (H, W, 3) in its own size. Raises DataError if the file has changed for the worse since the start."""
        return open_image(self.path / self._entries[i].name, self.background)

    def captions(self, i: int) -> list[str]:
        """At least one caption; the first is the main one."""
        return list(self._entries[i].captions)

    def weight(self, i: int) -> float:
        """How often image i is drawn, relative to the others."""
        return self._entries[i].weight

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self._checks[i].size

    def digest(self, i: int) -> str:
        """The first 32 hexadecimal digits of the SHA-256 of the image's file."""
        return self._checks[i].digest[:32]

    def identity(self, i: int) -> str:
        """The path of image i below the folder, with forward slashes."""
        return self._entries[i].name

    def fingerprint(self) -> str:
        """SHA-256 (hex) over names, file contents, captions, weights and the background."""
        total = hashlib.sha256(json.dumps(["folder 1", self.background]).encode())
        for entry, check in zip(self._entries, self._checks, strict=True):
            total.update(json.dumps([entry.name, check.digest, entry.captions, entry.weight]).encode())
        return total.hexdigest()

    def report(self) -> str:
        """One line: how many images, how many left out, and the first reasons."""
        line = f"{shown(self.path)}: {len(self)} images"
        return f"{line}, {_some(self.skipped)}" if self.skipped else line

    def _decodable(self, entries: list[_Entry], skips: _Skips) -> tuple[list[_Entry], list[_Check]]:
        """The entries whose image decodes, and what was seen of each."""
        good: list[_Entry] = []
        checks: list[_Check] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for batch in _batches(entries):
                for entry, found in zip(batch, pool.map(self._check, batch), strict=True):
                    if isinstance(found, str):
                        skips.bad.append((shown(entry.name), found))
                    else:
                        good.append(entry)
                        checks.append(found)
        return good, checks

    def _check(self, entry: _Entry) -> _Check | str:
        """What decoding shows, or why it does not decode."""
        path = self.path / entry.name
        try:
            height, width = open_image(path, self.background).shape[:2]
            return _Check(hashlib.sha256(path.read_bytes()).hexdigest(), (width, height))
        except DataError as error:
            return str(error).removeprefix(f"{shown(path)}: ").split("; ")[0]
        except OSError as error:
            return error.strerror or "cannot be read"


class _Check(NamedTuple):
    """SHA-256 of an image's file, and (width, height)."""

    digest: str
    size: tuple[int, int]


@dataclass(frozen=True)
class _Entry:
    name: str
    captions: tuple[str, ...]
    weight: float = 1.0


@dataclass
class _Skips:
    """What is left out: `bad` counts against the allowed fraction, `notes` are only reported. (path, reason) each."""

    bad: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Files that are images are bad, anything else is a note."""
        (self.bad if _kind(name) in IMAGES else self.notes).append((shown(name), reason))


def _judge(path: Path, usable: int, skips: _Skips, allowed: float) -> None:
    total = usable + len(skips.bad)
    if not usable:
        raise DataError(f"{shown(path)}: none of its {total} images can be used: {_some(sorted(skips.bad))}; mend them")
    if len(skips.bad) > allowed * total:
        share = f"{len(skips.bad)} of {total} images are unusable, over the allowed {allowed:g}"
        reasons = _some(sorted(skips.bad))
        raise DataError(f"{shown(path)}: {share}: {reasons}; mend or remove them, or raise data.max_bad_fraction")


def _some(skipped: list[tuple[str, str]], most: int = 3) -> str:
    reasons = ", ".join(f"{path} ({reason})" for path, reason in skipped[:most])
    more = f" and {len(skipped) - most} more" if len(skipped) > most else ""
    return f"{len(skipped)} left out: {reasons}{more}"


def _batches(entries: list[_Entry]) -> Iterator[list[_Entry]]:
    rest = iter(entries)
    while batch := list(islice(rest, BATCH)):
        yield batch


def _kind(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


# ---- what is there -------------------------------------------------------------------------------------------------


def _walk(root: Path, skips: _Skips) -> list[str]:
    """Names below `root`, sorted, of the regular visible files that lie inside it."""
    if not os.path.isdir(root):
        problem = "is not a folder" if os.path.exists(root) else "does not exist"
        raise DataError(f"data folder {shown(root)} {problem}; set data.path to a folder of captioned images")
    inside = os.path.realpath(root)
    names: list[str] = []
    for folder, folders, files in os.walk(root, onerror=lambda error: _note_folder(root, error, skips)):
        prefix = "" if folder == os.fspath(root) else Path(folder).relative_to(root).as_posix() + "/"
        folders[:] = [name for name in folders if _enter(prefix + name, Path(folder, name), skips)]
        for name in files:
            if not name.startswith(".") and _admit(prefix + name, Path(folder, name), inside, skips):
                names.append(prefix + name)
    return sorted(names)


def _note_folder(root: Path, error: OSError, skips: _Skips) -> None:
    if error.filename == os.fspath(root):
        raise DataError(f"data folder {shown(root)}: {error.strerror}; make it readable") from None
    skips.notes.append((shown(error.filename), error.strerror or "cannot be read"))


def _enter(name: str, path: Path, skips: _Skips) -> bool:
    """Whether a subfolder is walked."""
    hidden = path.name.startswith(".") or path.name == "__MACOSX"
    reason = "" if hidden else "link to a folder" if path.is_symlink() else _bad_name(name)
    if reason:
        skips.notes.append((shown(name), reason))
    return not hidden and not reason


def _admit(name: str, path: Path, inside: str, skips: _Skips) -> bool:
    """Whether a file may be opened at all; the reason goes to `skips` when it is of a kind that matters."""
    if _kind(name) in REFUSED:
        skips.bad.append((shown(name), "not a PNG, JPEG or WEBP image"))
        return False
    reason = _bad_name(name) or _bad_file(path, inside)
    if reason and _kind(name) in (*IMAGES, *SIDECARS, ".jsonl", ".csv"):
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
    """Every image that has captions. Raises DataError when the layout is none of the three."""
    tables = [name for name in METADATA if name in names]
    if tables:
        skips.notes += [(name, f"{tables[0]} is used") for name in tables[1:]]
        return _from_metadata(root, tables[0], names, skips)
    below = [shown(posixpath.dirname(name)) for name in names if posixpath.basename(name) in METADATA]
    if below:
        places = ", ".join(dict.fromkeys(below[:3]))
        raise DataError(f"{shown(root)} has its metadata in subfolders ({places}); set data.path to one of them")
    images = [name for name in names if _kind(name) in IMAGES]
    if not images:
        raise DataError(f"data folder {shown(root)} holds no images; put PNG, JPEG or WEBP files there{_also(skips)}")
    sidecars = _sidecars(names, skips)
    if any(_stem(name) in sidecars for name in images):
        return _from_sidecars(root, images, sidecars, skips)
    skips.notes += [(shown(name), "caption without an image") for name in sidecars.values()]
    if any("/" in name for name in images):
        return _from_classes(images, skips)
    raise _no_captions(root, images, sidecars)


def _also(skips: _Skips) -> str:
    return f" ({_some(sorted(skips.bad))})" if skips.bad else ""


def _no_captions(root: Path, images: list[str], sidecars: dict[str, str]) -> DataError:
    first = shown(_stem(images[0]))
    if sidecars:
        orphan = shown(next(iter(sidecars.values())))
        return DataError(
            f"{shown(root)}: no caption file matches an image (as {orphan}); name them {first}.txt and so on"
        )
    fix = f"write {first}.txt and so on, a metadata.jsonl, or sort them into subfolders"
    return DataError(f"{shown(root)}: its {len(images)} images have no captions; {fix}")


def _sidecars(names: list[str], skips: _Skips) -> dict[str, str]:
    """{stem: caption file}."""
    found: dict[str, str] = {}
    for kind in SIDECARS:
        for name in names:
            if _kind(name) == kind and found.setdefault(_stem(name), name) != name:
                skips.notes.append((shown(name), f"{shown(found[_stem(name)])} is used"))
    return found


def _from_sidecars(root: Path, images: list[str], sidecars: dict[str, str], skips: _Skips) -> list[_Entry]:
    first: dict[str, str] = {}
    entries = []
    for name in sorted(images, key=lambda name: (IMAGES.index(_kind(name)), name)):
        stem = _stem(name)
        if first.setdefault(stem, name) != name:
            skips.notes.append((shown(name), f"shares its caption with {shown(first[stem])}"))
        elif stem not in sidecars:
            skips.add(name, "no caption file")
        elif entry := _captioned(name, root / sidecars[stem], skips):
            entries.append(entry)
    orphans = sorted(set(sidecars) - set(first))
    skips.notes += [(shown(sidecars[stem]), "caption without an image") for stem in orphans]
    return entries


def _captioned(name: str, path: Path, skips: _Skips) -> _Entry | None:
    """The entry of an image and its caption file, or None with the reason in `skips`."""
    try:
        return _Entry(name, tuple(clean_captions(_read_caption_file(path).splitlines())))
    except (ValueError, OSError) as error:
        skips.add(name, (error.strerror or "caption unreadable") if isinstance(error, OSError) else str(error))
    return None


def _read_caption_file(path: Path) -> str:
    with open(path, "rb") as file:
        data = file.read(MAX_CAPTION_FILE + 1)
    if len(data) > MAX_CAPTION_FILE:
        raise ValueError("caption file over 1 MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("caption is not UTF-8") from None


def _from_classes(images: list[str], skips: _Skips) -> list[_Entry]:
    entries = []
    for name in images:
        label = posixpath.basename(posixpath.dirname(name)).replace("_", " ")
        if label.strip():
            entries.append(_Entry(name, tuple(clean_captions([label]))))
        else:
            skips.add(name, "not in a class subfolder")
    return entries


# ---- metadata ------------------------------------------------------------------------------------------------------


def _from_metadata(root: Path, table: str, names: list[str], skips: _Skips) -> list[_Entry]:
    """Entries of metadata.jsonl or metadata.csv; rows that name the same file add captions to it."""
    known = set(names)
    found: dict[str, _Entry] = {}
    rows = 0
    for number, row in _rows(root / table):
        rows += 1
        try:
            entry = _entry(row, known)
        except ValueError as error:
            skips.bad.append((f"{table}:{number}", str(error)))
            continue
        old = found.get(entry.name, entry)
        found[entry.name] = _Entry(entry.name, tuple(dict.fromkeys(old.captions + entry.captions)), old.weight)
    if not rows:
        raise DataError(f"{shown(root / table)} is empty; write a row with file_name and text for each image")
    unnamed = [name for name in names if _kind(name) in IMAGES and name not in found]
    skips.notes += [(shown(name), f"not used by {table}") for name in unnamed]
    return list(found.values())


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, row, or the reason why there is none). Bytes that are not UTF-8 become surrogates, caught later."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = _lines(file)
            yield from _csv_rows(path, lines) if path.suffix == ".csv" else _json_rows(lines)
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}; make it readable") from None


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; of one longer than MAX_LINE only the beginning, which is one character longer than that."""
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
    """The entry of one row. Raises ValueError with the reason."""
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
    try:
        weight = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = float("nan")
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError("weight is not a positive number")
    return weight


# ---- captions ------------------------------------------------------------------------------------------------------


def clean_captions(texts: Iterable[str]) -> list[str]:
    """Captions as they are trained on: NFC, one line, single spaces, capped, without empty ones and repetitions.

    Raises ValueError with the reason when a caption holds NUL or bytes that are not UTF-8, or when none is left.
    """
    captions = [text for text in map(_clean, texts) if text]
    if not captions:
        raise ValueError("empty caption")
    return list(dict.fromkeys(captions))


def _clean(text: str) -> str:
    if "\0" in text:
        raise ValueError("caption holds NUL; save it as UTF-8")
    if SURROGATE.search(text):
        raise ValueError("caption is not UTF-8")
    text = unicodedata.normalize("NFC", CONTROL.sub(" ", text))
    return " ".join(text.split())[:MAX_CAPTION].rstrip()
