"""Where something is made before it gets its name: a hidden folder beside it, locked while the process that makes it lives.

So what a killed process left is told from what a living one makes, on every machine that sees the lock, and the next one
that writes there removes it. Libraries that write under names of their own do so inside. Only exact names, never links.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinydiff.errors import BusyError
from tinydiff.system import shown

NAME = ".tmp-tinydiff-{}"  # of 30 characters, so that what is made may have a name of any length
OURS = re.compile(re.escape(NAME.format("")) + "[0-9a-f]{16}")
LOCK = "lock"
PATIENCE = 5.0  # seconds that the maker of a folder waits for another one's lock: somebody may be tidying up
EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def place_of(path: Path) -> Path:
    """The temporary folder of a folder that one process at a time makes."""
    return path.with_name(NAME.format(hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]))


@contextmanager
def alone(path: Path, patience: float = PATIENCE) -> Iterator[Path]:
    """Yield a path in the temporary folder of `path`, whose only maker this process is. BusyError where it is not."""
    place, end = place_of(path), time.monotonic() + patience
    _sweep_once(path.parent)
    while (held := _make(place)) is None:
        if time.monotonic() > end:
            raise BusyError(
                f"{shown(path)}: being written by {holder(place / LOCK)}; wait for it, or choose another path"
            )
        time.sleep(0.05)
    with _until_done(place, held):
        os.ftruncate(held, 0)
        os.write(held, f"{os.getpid()}\n".encode())
        _clear(place)
        yield place / "new"


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder in the folder of `path`, for this process alone."""
    _sweep_once(path.parent)
    for _ in range(100):
        if (held := _make(place := path.with_name(NAME.format(secrets.token_hex(8))))) is not None:
            with _until_done(place, held):
                yield place / "new"
            return
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(path))


def discard(path: Path) -> None:
    """Remove a folder; under its name it is whole or gone."""
    with beside(path) as aside:
        os.rename(path, aside)


def remove(path: Path) -> None:
    """Remove a folder or file; what cannot be removed from a folder stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in `folder`. What cannot be removed, or belongs to somebody else, stays."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        places = [Path(e.path) for e in entries if OURS.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
        for place in places:
            with contextlib.suppress(OSError):
                if (held := _hold(place)) is not None:
                    _remove(place, held)


def exchange(one: Path, other: Path) -> bool:
    """Two names swapped in one step; False where the system or the file system cannot."""
    import ctypes

    try:
        call = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return call(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def take(descriptor: int) -> bool:
    """Lock an open file until it is closed; False where another one has. OSError where this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(lock: Path) -> str:
    """Who holds a lock, as the file says."""
    with contextlib.suppress(OSError, ValueError):
        return f"process {int(lock.read_bytes()[:20])}"
    return "another process"


@functools.cache
def _sweep_once(folder: Path) -> None:
    """A process looks once; whoever writes a thousand files does not look a thousand times."""
    sweep(folder)


def _make(place: Path) -> int | None:
    """Make and lock a temporary folder, or lock what a killed process left of it; None where a living one has it."""
    made = False
    with contextlib.suppress(FileExistsError):
        os.mkdir(place)
        made = True
    try:
        return _hold(place, made)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(place)
        raise


def _hold(place: Path, made: bool = False) -> int | None:
    """The descriptor of a temporary folder's lock; None where another one has it, or removes the folder.

    Where the file system has no locks, only who `made` the folder has it.
    """
    if place.is_symlink():
        return None
    try:
        descriptor = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:
        return None
    try:
        held = take(descriptor) and os.path.samestat(os.fstat(descriptor), os.lstat(place / LOCK))
    except FileNotFoundError:
        held = False
    except OSError:
        held = made
    if not held:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _until_done(place: Path, held: int) -> Iterator[None]:
    try:
        yield
    finally:
        _remove(place, held)


def _clear(place: Path) -> None:
    """Remove what is in a temporary folder but its lock."""
    for path in place.iterdir():
        if path.name != LOCK:
            remove(path)


def _remove(place: Path, held: int) -> None:
    """Remove a temporary folder, its lock last, so that nobody else thinks that it is free."""
    try:
        with contextlib.suppress(OSError):
            _clear(place)
            os.unlink(place / LOCK)
    finally:
        os.close(held)  # first: an open file that is removed is still there on network drives, under another name
    with contextlib.suppress(OSError):
        os.rmdir(place)
