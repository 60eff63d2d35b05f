"""The files of a data folder: which are listed, by what kinds, and what is left out with the reason.

Hidden files are ignored. Links to files inside the folder are followed, links to folders or to the outside are not. What
tinydiff made itself, a run or a model, is left out, so that a run may lie in its own data. Nothing is opened here.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from pathlib import Path

from tinydiff.errors import DataError
from tinydiff.files import MANIFEST, shown
from tinydiff.images import KINDS
from tinydiff.system import unreadable

IMAGES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".jfif", ".jpe", ".pjpeg", ".pjp", ".jfi", ".jif", ".apng"),
    *(".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".heic", ".heif", ".hif"),
)
REFUSED = (  # counted as unusable images
    *(
        ".jp2",
        ".j2k",
        ".jpx",
        ".jxl",
        ".psd",
        ".svg",
        ".ico",
        ".tga",
        ".exr",
        ".hdr",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".eps",
        ".qoi",
        ".dds",
    ),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
SURROGATE = re.compile(r"[\ud800-\udfff]")
RUN = ("tinydiff.toml", "data.json")  # both are in every run
MODELS = (MANIFEST, "model_index.json")  # either is in a model folder
PARTS = ("checkpoints", "latents", "image_latents", "model", "samples", "texts", "tokenizer")  # folders of a run
LOGS = (*RUN, "metrics.jsonl", "report.html", "skipped.txt")  # its files


class Skips:
    """What is left out, as (path, reason): `bad` counts against the allowed fraction, `notes` are only reported."""

    def __init__(self) -> None:
        self.bad, self.notes = list[tuple[str, str]](), list[tuple[str, str]]()

    def add(self, name: str, reason: str) -> None:
        """An image is bad, any other file is a note."""
        (self.bad if kind(name) in (*IMAGES, *REFUSED) else self.notes).append((shown(name), reason))

    def note(self, name: str, reason: str) -> None:
        self.notes.append((shown(name), reason))


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


def kind(name: str) -> str:
    """A file name's suffix in lower case."""
    return posixpath.splitext(name)[1].lower()


def stem(name: str) -> str:
    """A path without its suffix."""
    return posixpath.splitext(name)[0]


def walk(root: Path, skips: Skips) -> list[str]:
    """Sorted paths, relative to `root`, of its regular files that are not hidden."""
    if not os.path.isdir(root):
        problem = "is not a folder" if os.path.exists(root) else "does not exist"
        raise DataError(f"data folder {shown(root)} {problem}; give a folder of captioned images")

    def note(error: OSError) -> None:
        if error.filename == os.fspath(root):
            raise unreadable(error, root, DataError) from None
        skips.note(error.filename, error.strerror or "cannot be read")

    inside, names = os.path.realpath(root), list[str]()
    for folder, folders, files in os.walk(root, onerror=note):
        prefix = "" if folder == os.fspath(root) else Path(folder).relative_to(root).as_posix() + "/"
        made = _made(files)
        if made and prefix:
            skips.note(prefix.rstrip("/"), made)
            folders.clear()
            continue
        if made:  # a run in the very folder of its data
            folders[:], files = [f for f in folders if f not in PARTS], [f for f in files if f not in LOGS]
        folders[:] = [name for name in folders if _enter(prefix + name, Path(folder, name), skips)]
        files = [prefix + name for name in files if not name.startswith(".")]
        names += [name for name in files if _admit(name, root / name, inside, skips)]
    return sorted(names)


def _made(files: list[str]) -> str:
    """What tinydiff made a folder of these files for, or ""."""
    if set(RUN) <= set(files):
        return "a run of tinydiff"
    return "a model" if any(name in files for name in MODELS) else ""


def _enter(name: str, path: Path, skips: Skips) -> bool:
    """Whether to list a subfolder."""
    hidden = path.name.startswith(".") or path.name == "__MACOSX"
    reason = "" if hidden else "link to a folder" if path.is_symlink() else _bad_name(name)
    if reason:
        skips.note(name, reason)
    return not hidden and not reason


def _admit(name: str, path: Path, inside: str, skips: Skips) -> bool:
    """Whether a file may be opened; if not, `skips` gets the reason."""
    reason = f"not a {KINDS} image" if kind(name) in REFUSED else _bad_name(name) or _bad_file(path, inside)
    if reason:
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
