"""Atomic writes: a file or folder is complete or absent, and folders are verified when they are read.

A folder is written under a temporary name next to its final path, synced, given a manifest of sizes and SHA-256, and
renamed; a single file likewise, without a manifest. The hashes detect corruption, not a malicious author. This module
knows no models, only names and bytes. An OSError becomes a ResourceError that names the file and the fix.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from tinydiff.errors import BusyError, ModelError, ResourceError, UsageError, UserError

MANIFEST = "manifest.json"
FORMAT = 1
MAX_JSON = 64 * 2**20
LFS_POINTER = b"version https://git-lfs"
RESTORE = "copy or download it again"
FIXES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space")
FIXES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a writable place")
FIXES |= {errno.EFBIG: "raise the file size limit", errno.ENOENT: "check the path"}
RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust libraries, such as safetensors, report an OSError


class VersionError(ModelError):
    """Written by a newer version of tinydiff: not damaged, but this version cannot read it."""


@contextmanager
def committed(path: str | Path, *, replace: bool = False, manifest: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` if the block succeeds, and removed if it raises.

    `replace` allows an existing tinydiff folder to be replaced; if that is interrupted, the old one is still at `path`,
    or next to it and `recover` restores it. Raises UsageError if `path` exists and may not be replaced, ResourceError
    for any OSError, also one from the block.
    """
    path = Path(os.path.abspath(path))
    temporary = _temporary(path)
    with named(path, temporary):
        recover(path)
        _check_free(path, replace, manifest)
        make_folder(path.parent)
        temporary.mkdir()
        try:
            yield temporary
            _seal(temporary, manifest)
            _install(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def recover(path: str | Path) -> None:
    """Finish a replacement that was interrupted: restore the old folder unless the new one is in its place."""
    aside = _aside(Path(path))
    if os.path.lexists(aside):
        if os.path.lexists(path):
            _remove(aside)
        else:
            os.rename(aside, path)


def verify(folder: str | Path, parts: Collection[str] | None = None) -> None:
    """Check the size and SHA-256 of every file in the manifest, and that no other files exist, except hidden ones.

    If `parts` are given, only sizes are checked in other subfolders. A folder without a manifest, as from diffusers, is
    only searched for Git LFS pointers. Raises ModelError naming the file and the fix.
    """
    folder = Path(folder)
    if not folder.exists():
        with named(folder):
            recover(folder)
    if not folder.is_dir():
        raise ModelError(f"{shown(folder)}: no such folder; check the path")
    try:
        if os.path.lexists(folder / MANIFEST):
            _verify_listed(folder, _entries(folder), parts)
        else:
            for path in _visible(folder):
                refuse_pointer(path)
    except OSError as error:
        raise ModelError(f"{shown(error.filename or folder)}: {error.strerror}; make it readable") from error


def write_file(path: str | Path, data: bytes, *, force: bool = False) -> None:
    """Write `data` to `path` atomically, creating its folder. Raises as `written` does."""
    with written(path, force=force) as temporary:
        temporary.write_bytes(data)


@contextmanager
def written(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path; the file written there is synced and renamed to `path` if the block succeeds.

    `force` overwrites; else UsageError if `path` exists, even if created meanwhile. ResourceError for any OSError.
    """
    path = Path(os.path.abspath(path))
    temporary = _temporary(path)
    if not force and os.path.lexists(path):
        raise UsageError(f"{shown(path)}: exists; use --force to overwrite it or choose another path")
    with named(path, temporary):
        make_folder(path.parent)
        try:
            yield temporary
            _sync(temporary)
            if force:
                os.rename(temporary, path)
            else:
                _rename_unless_taken(temporary, path)
            _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file of at most 64 MiB. Raises ModelError if it is missing, damaged or not an object."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON:
            raise ModelError(f"{shown(path)}: not a regular file of at most {MAX_JSON >> 20} MiB; {RESTORE}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{shown(path)}: {error.strerror}; check the path, or {RESTORE}") from error
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise ModelError(f"{shown(path)}: damaged, not valid JSON; {RESTORE}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{shown(path)}: holds no JSON object; {RESTORE}")
    return value


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Lock `folder`, created if missing, until the block or the process ends. Raises BusyError if it is locked."""
    folder = Path(folder)
    with named(folder):
        make_folder(folder)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        with named(folder / ".lock"):
            _take(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def shown(path: str | Path) -> str:
    """`path` for a message: escaped if it has characters that are not printable."""
    return str(path) if str(path).isprintable() else ascii(str(path))


@contextmanager
def named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn an OSError, except BrokenPipeError, into a ResourceError: the file, with `path` for `temporary`, and the fix."""
    try:
        yield
    except (BrokenPipeError, UserError):
        raise
    except Exception as error:
        if (cause := system_error(error)) is None:
            raise
        where = shown(cause.filename or path)
        where = where.replace(shown(temporary), shown(path)) if temporary else where
        fix = FIXES.get(cause.errno or 0, "check the disk")
        raise ResourceError(f"{where}: {cause.strerror or cause}; {fix}") from error


def system_error(error: Exception) -> OSError | None:
    """The OSError that an exception is, or that its text reports; None if there is none."""
    if isinstance(error, OSError):
        return error
    match = RUST_ERROR.search(str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def make_folder(path: Path) -> None:
    """Create a folder and its parents if missing, and sync each new one's parent."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name[:50]}-{uuid4().hex}")


def _aside(path: Path) -> Path:
    return path.with_name(f".tinydiff-old-{path.name}")


def _check_free(path: Path, replace: bool, manifest: bool) -> None:
    """Refuse an existing `path`, or with `replace` only one that tinydiff did not write."""
    if not os.path.lexists(path):
        return
    if not replace:
        raise UsageError(f"{shown(path)}: exists; use --force to replace it or choose another path")
    ours = path.is_dir() and ((path / MANIFEST).is_file() or not any(path.iterdir()))
    if manifest and not ours:
        raise UsageError(f"{shown(path)}: not a folder that tinydiff wrote; remove it yourself or choose another path")


def _seal(folder: Path, manifest: bool) -> None:
    """Sync every file, made as readable as the folder is, then the manifest, then every folder, innermost first."""
    entries, readable = {}, folder.stat().st_mode & 0o666  # safetensors makes files readable by their owner only
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        assert path.is_file() and not path.is_symlink(), f"{path} is not a regular file"
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            entries[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
            path.chmod(path.stat().st_mode | readable)
            _sync(path)
    if manifest:
        text = json.dumps({"format": FORMAT, "files": entries}, indent=2) + "\n"
        (folder / MANIFEST).write_bytes(text.encode())
        _sync(folder / MANIFEST)
    for path in sorted(filter(Path.is_dir, [folder, *folder.rglob("*")]), reverse=True):
        _sync(path)


def _install(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, after moving an existing one aside; move it back if that fails."""
    aside = _aside(path)
    try:
        if os.path.lexists(path):
            os.rename(path, aside)
        os.rename(temporary, path)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(path):
            os.rename(aside, path)
        raise
    _sync(path.parent)
    _remove(aside)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, would survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync folders
            error.filename = error.filename or str(path)
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a folder or file; what cannot be removed from a folder stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _visible(folder: Path) -> Iterator[Path]:
    """Every file in the folder, links not followed, except hidden ones and those in hidden folders."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and (path.is_symlink() or not path.is_dir()):
            yield path


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files, {name: {"size": int, "sha256": str}}. Raises ModelError if it is malformed."""
    path = folder / MANIFEST
    content = read_json(path)
    version, entries = content.get("format"), content.get("files")
    if isinstance(version, int) and version > FORMAT:
        raise VersionError(f"{shown(path)}: format {version} was written by a newer tinydiff; upgrade tinydiff")
    if version != FORMAT or not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise ModelError(f"{shown(path)}: damaged manifest; {RESTORE}")
    return entries


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("size")) is int and type(entry.get("sha256")) is str


def _verify_listed(folder: Path, entries: dict[str, dict[str, Any]], parts: Collection[str] | None) -> None:
    for name, entry in entries.items():
        part, inside, _ = name.partition("/")
        _verify_file(folder, name, entry, hashed=parts is None or not inside or part in parts)
    for path in _visible(folder):
        if path.relative_to(folder).as_posix() not in {*entries, MANIFEST}:
            raise ModelError(f"{shown(path)}: not listed in {MANIFEST}; remove it, it is no part of this folder")


def _verify_file(folder: Path, name: str, entry: dict[str, Any], hashed: bool) -> None:
    relative, path = PurePosixPath(name), folder / name
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\0" in name:
        raise ModelError(f"{shown(folder / MANIFEST)}: {name!a} leads out of the folder; {RESTORE}")
    if os.path.realpath(path) != os.path.join(os.path.realpath(folder), relative):
        raise ModelError(f"{shown(path)}: is a link; put the file itself in its place")
    if not path.is_file():
        raise ModelError(f"{shown(path)}: missing; {RESTORE}")
    if (size := path.stat().st_size) != entry["size"]:
        refuse_pointer(path)
        raise ModelError(f"{shown(path)}: damaged, {size} bytes where {entry['size']} were written; {RESTORE}")
    if hashed and _sha256(path) != entry["sha256"]:
        raise ModelError(f"{shown(path)}: damaged, its SHA-256 is not the one written; {RESTORE}")


def refuse_pointer(path: Path) -> None:
    """Raise ModelError if `path` is a Git LFS pointer, which `git clone` leaves if Git LFS is not installed."""
    if path.is_file() and path.stat().st_size <= 1024 and path.read_bytes().startswith(LFS_POINTER):
        raise ModelError(f"{shown(path)}: a Git LFS pointer, not the file itself; run `git lfs pull`")


def _rename_unless_taken(temporary: Path, path: Path) -> None:
    """Rename without overwriting: of two processes one succeeds. Without hard links, a plain rename."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise UsageError(f"{shown(path)}: exists; use --force to overwrite it or choose another path") from error
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        os.rename(temporary, path)
    else:
        temporary.unlink()


def _take(descriptor: int, folder: Path) -> None:
    """Lock the open lock file and write our process id into it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 20).decode("ascii", "replace").strip()
        holder = f"process {holder}" if holder.isdigit() else "another process"
        raise BusyError(f"{shown(folder)}: in use by {holder}; wait for it, stop it, or use another folder") from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
