"""Atomic writes: a file or folder is complete or absent, and folders have a manifest by which `verified` checks them.

A folder is written under a temporary name next to its final path, synced, given a manifest of sizes and SHA-256, and
given its name in one step; a single file likewise, without a manifest. The hashes detect corruption, not a malicious
author. Readers change nothing, and read again what was replaced meanwhile. This module knows no models, only names and
bytes. An OSError becomes a ResourceError that names the file and the fix.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tinydiff import temporary
from tinydiff.errors import BusyError, ModelError, UsageError
from tinydiff.system import RESTORE, named, shown, unreadable

MANIFEST = "manifest.json"
FORMAT = 1
MAX_JSON = 64 * 2**20
LFS_POINTER = b"version https://git-lfs"
ASIDE = ".tinydiff-old-"  # what the name of an old folder begins with while the new one is not in its place yet
TRIES = 20  # to read what is being replaced

T = TypeVar("T")


class VersionError(ModelError):
    """Written by a newer version of tinydiff: not damaged, but this version cannot read it."""


class ReplacedError(BusyError):
    """Another process replaced what was being read."""


@contextmanager
def committed(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` if the block succeeds, and is removed if it raises.

    `replace` allows an existing tinydiff folder to be replaced: there is the old one or the new one at any moment, where the
    file system can exchange two names; else one of them is there or beside it, where readers look. A link stays, and what it
    leads to is replaced; files in it that are not ours stay too. Raises UsageError if `path` exists and may not be replaced,
    BusyError while another process makes it, ResourceError for any OSError, also one from the block.
    """
    path = Path(os.path.realpath(path))
    with named(path):
        make_folder(path.parent)
        with temporary.alone(path) as folder:
            _recover(path)
            _check_free(path, replace)
            folder.mkdir()
            yield folder
            _seal(folder)
            _keep(foreign(path), path, folder)
            _install(folder, path)


@contextmanager
def offered(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` if the block succeeds and nothing is there: as `committed`, for what can be
    made again. Nothing waits for the disk, since the manifest tells what a power loss left, nor for another process that makes
    the same (BusyError)."""
    with named(path), temporary.alone(path, patience=0) as folder:
        _check_free(path, replace=False)
        folder.mkdir()
        yield folder
        _seal(folder, synced=False)
        os.rename(folder, path)


def present(folder: str | Path) -> Path:
    """The folder; where it is missing because a replacement is going on or was interrupted, the old one beside it."""
    folder = Path(folder)
    for wait in (0.0, 0.01, 0.05):
        time.sleep(wait)
        moving = temporary.place_of(folder).exists()  # asked first: it is there from before the one is moved to after
        for path in (folder, _aside(folder)):
            if path.exists():
                return path
        if not moving:
            break
    return folder


def stamp(path: str | Path) -> object:
    """What differs once a model is replaced: its manifest, or where there is none every file's size and time; else None."""
    path = Path(path)
    try:
        if path.is_file():
            return path.stat().st_size, path.stat().st_mtime_ns
        if (manifest := path / MANIFEST).is_file() and manifest.stat().st_size <= MAX_JSON:
            return manifest.stat().st_mtime_ns, manifest.read_bytes()  # equal models are replaced too
        if not path.exists():
            return None
        return [(str(file), file.lstat().st_size, file.lstat().st_mtime_ns) for file in visible(path)]
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.errno


@contextmanager
def undisturbed(stamps: Mapping[Path, object]) -> Iterator[None]:
    """ReplacedError unless these paths have these stamps when the block ends, whatever the block made of them."""

    def look(error: Exception | None = None) -> None:
        moved = [path for path, before in stamps.items() if error and _moved(path, before)]
        if replaced := moved or [path for path, before in stamps.items() if stamp(path) != before]:
            fix = "wait until it is done, or copy it and use the copy"
            raise ReplacedError(f"{shown(replaced[0])}: replaced while it was read; {fix}") from error

    try:
        yield
    except Exception as error:
        look(error)
        raise
    look()


def again(read: Callable[[], T]) -> T:
    """What `read` gives; it is called again, some times, if it raises ReplacedError."""
    for attempt in range(TRIES):
        try:
            return read()
        except ReplacedError:
            time.sleep(0.005 * attempt)
    return read()


def write_file(path: str | Path, data: bytes, *, force: bool = False) -> None:
    """Write `data` to `path` atomically, creating its folder. Raises as `written` does."""
    with written(path, force=force) as file:
        file.write_bytes(data)


@contextmanager
def written(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path; the file written there is synced and renamed to `path` if the block succeeds.

    `force` overwrites a file; else UsageError if `path` exists, even if created meanwhile. ResourceError for any OSError.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path) and not (force and path.is_file()):
        fix = "choose another path" if force else "use --force to overwrite it or choose another path"
        raise UsageError(f"{shown(path)}: {'no file' if force else 'exists'}; {fix}")
    with named(path):
        make_folder(path.parent)
        with temporary.beside(path) as file:
            yield file
            _open_up(file, os.stat(file.parent).st_mode & 0o666)
            _sync(file)
            if force:
                os.rename(file, path)
            else:
                _rename_unless_taken(file, path)
            _sync(path.parent)


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file of at most 64 MiB. Raises ModelError if it is missing, damaged or not an object."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON:
            raise ModelError(f"{shown(path)}: not a regular file of at most {MAX_JSON >> 20} MiB; {RESTORE}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(error, path) from error
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
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with named(folder / ".lock"):
            if not temporary.take(descriptor):
                by = temporary.holder(folder / ".lock")
                raise BusyError(f"{shown(folder)}: in use by {by}; wait for it, stop it, or use another folder")
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents if missing, and sync each new one's parent."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _aside(path: Path) -> Path:
    """Where the old folder is while the new one is not in its place yet, on file systems that cannot exchange two names."""
    long = len(os.fsencode(path.name)) > 240
    return path.with_name(f"{ASIDE}{temporary.place_of(path).name[-16:] if long else path.name}")


def _moved(path: Path, before: object) -> bool:
    """Whether a folder was being moved when its stamp was `before`, or is an old one that may be removed by now."""
    if path.name.startswith(ASIDE):
        return path.with_name(path.name.removeprefix(ASIDE)).exists()
    return before is None and present(path).exists()


def _recover(path: Path) -> None:
    """Finish a replacement that was interrupted: restore the old folder unless the new one is in its place."""
    aside = _aside(path)
    if os.path.lexists(aside):
        if os.path.lexists(path):
            temporary.remove(aside)
        else:
            os.rename(aside, path)


def _check_free(path: Path, replace: bool) -> None:
    """Refuse an existing `path`, or with `replace` only one that tinydiff did not write."""
    if not os.path.lexists(path):
        return
    if not replace:
        raise UsageError(f"{shown(path)}: exists; use --force to replace it or choose another path")
    ours = path.is_dir() and ((path / MANIFEST).is_file() or not any(path.iterdir()))
    if not ours:
        raise UsageError(f"{shown(path)}: not a folder that tinydiff wrote; remove it yourself or choose another path")


def _seal(folder: Path, synced: bool = True) -> None:
    """Sync every file, made as readable as the folder is, then the manifest, then every folder, innermost first."""
    listed, mode = {}, stat.S_IMODE(folder.stat().st_mode)  # by the umask, or what the folder above it says
    sync = _sync if synced else lambda path: None
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        assert path.is_file() and not path.is_symlink(), f"{path} is not a regular file"
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            listed[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
            _open_up(path, mode & 0o666)
            sync(path)
    text = json.dumps({"format": FORMAT, "files": listed}, indent=2) + "\n"
    (folder / MANIFEST).write_bytes(text.encode())
    sync(folder / MANIFEST)
    for path in sorted(filter(Path.is_dir, [folder, *folder.rglob("*")]), reverse=True):
        _open_up(path, mode)
        sync(path)


def _open_up(path: Path, mode: int) -> None:
    """Set the mode: libraries make files that only their owner reads, and copies of folders are like the original."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        try:
            path.chmod(mode)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):  # a file system without modes
                raise


def foreign(folder: Path) -> list[Path]:
    """Files in a folder with a manifest that the manifest does not list: somebody else's."""
    try:
        ours = {MANIFEST, *entries(folder)} if (folder / MANIFEST).is_file() else None
    except ModelError:
        return []
    files = (path for path in folder.rglob("*") if path.is_symlink() or path.is_file()) if ours else ()
    return [path for path in files if ours and path.relative_to(folder).as_posix() not in ours]


def _keep(files: list[Path], old: Path, new: Path) -> None:
    """Have files of the old folder in the new one too."""
    for path in files:
        target = new / path.relative_to(old)
        if not os.path.lexists(target):
            make_folder(target.parent)
            try:
                os.link(path, target, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(path, target, follow_symlinks=False)
            _sync(target.parent)


def _install(folder: Path, path: Path) -> None:
    """Give `folder` the name `path` in one step, in exchange for an existing one; else in two, the old one moved aside."""
    aside = _aside(path)
    if not os.path.lexists(path):
        os.rename(folder, path)
    elif not temporary.exchange(path, folder):
        os.rename(path, aside)
        try:
            os.rename(folder, path)
        except BaseException:
            os.rename(aside, path)
            raise
    _sync(path.parent)
    temporary.remove(aside)


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


def shipped(name: str) -> Path:
    """Where weights of this name are that come with the package."""
    package = Path(__file__).resolve().parent
    return (
        next((p for p in (package / "weights", package.parent / "weights") if p.is_dir()), package / "weights") / name
    )


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def visible(folder: Path) -> Iterator[Path]:
    """Every file in the folder, links not followed, except hidden ones and those in hidden folders."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and (path.is_symlink() or not path.is_dir()):
            yield path


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files, {name: {"size": int, "sha256": str}}. Raises ModelError if it is malformed."""
    path = folder / MANIFEST
    content = read_json(path)
    version, listed = content.get("format"), content.get("files")
    if isinstance(version, int) and version > FORMAT:
        raise VersionError(f"{shown(path)}: format {version} was written by a newer tinydiff; upgrade tinydiff")
    if version != FORMAT or not isinstance(listed, dict) or not all(map(_is_entry, listed.values())):
        raise ModelError(f"{shown(path)}: damaged manifest; {RESTORE}")
    return listed


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("size")) is int and type(entry.get("sha256")) is str


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
