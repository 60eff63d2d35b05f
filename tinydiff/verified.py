"""Folders checked against their manifests: sizes and SHA-256 of every file, and no files besides.

Whoever opens a model to draw with it gives a `Memory`: what was hashed once and not touched since is not read again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any

from tinydiff.errors import ModelError, UserError
from tinydiff.files import (
    MANIFEST,
    RESTORE,
    again,
    entries,
    present,
    read_json,
    refuse_pointer,
    sha256,
    shown,
    stamp,
    undisturbed,
    visible,
    write_file,
)
from tinydiff.system import unreadable
from tinydiff.user_cache import lasting

MOST = 1000  # files remembered
RECENT = 2 * 10**9  # ns: a file changed later than this before it was hashed may change again with the same times

Hash = Callable[[Path], str]


def verify(folder: str | Path, parts: Collection[str] | None = None, digest: Hash = sha256) -> None:
    """Check the size and SHA-256 of every file in the manifest, and that no other files exist, except hidden ones.

    If `parts` are given, only sizes are checked in other subfolders; `digest` gives a file's SHA-256, or remembers it. A
    folder without a manifest, as from diffusers, is only searched for Git LFS pointers. Raises ModelError naming the file and
    the fix, ReplacedError if the folder is replaced again and again meanwhile.
    """
    again(lambda: _verify(present(folder), parts, digest))


class Memory:
    """SHA-256 of files by where they are, with their marks, in a file of the user's cache folder; `anew` hashes them again.

    A damaged file is one that remembers nothing. Of processes that save at once, one may forget what the other learnt.
    """

    def __init__(self, anew: bool = False) -> None:
        folder = lasting("verified")
        self.path = folder / "hashes.json" if folder else None
        self.known, self.learnt = {} if anew else self.read(), dict[str, list[Any]]()

    def read(self) -> dict[str, Any]:
        try:
            return read_json(self.path) if self.path else {}
        except UserError:
            return {}

    def sha256(self, path: Path) -> str:
        """A file's hash: the one known of it, or that of its bytes, which is learnt."""
        name, before = os.path.realpath(path), mark(path)
        if isinstance(known := self.known.get(name), list) and known[:-1] == before:
            return str(known[-1])
        begun, digest = time.time_ns(), sha256(path)
        if mark(path) == before and begun - max(before[1:3]) > RECENT:
            self.learnt[name] = [*before, digest]
        return digest

    def save(self) -> None:
        """Write what was learnt, if there is anything and a place for it."""
        if self.learnt and self.path:
            kept = list({**self.read(), **self.learnt}.items())[-MOST:]
            with contextlib.suppress(UserError):
                write_file(self.path, json.dumps(dict(kept)).encode(), force=True)


def mark(path: Path) -> list[int]:
    """What changes when a file does; the change time is not the user's to set."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _verify(folder: Path, parts: Collection[str] | None, digest: Hash) -> None:
    with undisturbed({folder: stamp(folder)}):
        if not folder.is_dir():
            raise ModelError(f"{shown(folder)}: no such folder; check the path")
        try:
            if os.path.lexists(folder / MANIFEST):
                _verify_listed(folder, entries(folder), parts, digest)
            else:
                for path in visible(folder):
                    refuse_pointer(path)
        except OSError as error:
            raise unreadable(error, folder) from error


def _verify_listed(
    folder: Path, listed: dict[str, dict[str, Any]], parts: Collection[str] | None, digest: Hash
) -> None:
    for name, entry in listed.items():
        part, inside, _ = name.partition("/")
        _verify_file(folder, name, entry, digest if parts is None or not inside or part in parts else None)
    for path in visible(folder):
        if path.relative_to(folder).as_posix() not in {*listed, MANIFEST}:
            raise ModelError(f"{shown(path)}: not listed in {MANIFEST}; remove it, it is no part of this folder")


def _verify_file(folder: Path, name: str, entry: dict[str, Any], digest: Hash | None) -> None:
    relative, path = PurePosixPath(name), folder / name
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\0" in name:
        raise ModelError(f"{shown(folder / MANIFEST)}: {shown(name)!r} leads out of the folder; {RESTORE}")
    if os.path.realpath(path) != os.path.join(os.path.realpath(folder), relative):
        raise ModelError(f"{shown(path)}: is a link; put the file itself in its place")
    if not path.is_file():
        raise ModelError(f"{shown(path)}: missing; {RESTORE}")
    if (size := path.stat().st_size) != entry["size"]:
        refuse_pointer(path)
        raise ModelError(f"{shown(path)}: damaged, {size} bytes where {entry['size']} were written; {RESTORE}")
    if digest and digest(path) != entry["sha256"] != sha256(path):  # what is remembered may be wrong, a refusal may not
        raise ModelError(f"{shown(path)}: damaged, its SHA-256 is not the one written; {RESTORE}")
