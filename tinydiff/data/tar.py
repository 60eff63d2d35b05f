"""A strict reader of tar headers (ustar, GNU, PAX): the name, offset and size of each member. Nothing is extracted.

Python's `tarfile` is not used: it loops for ever on a negative size (CVE-2025-8194) and follows names and links. This
module knows no samples and no images.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tinydiff.errors import DataError
from tinydiff.files import LFS_POINTER, shown
from tinydiff.system import unreadable

MAX_MEMBERS = 2**21  # in one archive, to bound the memory of indexing it
MAX_EXTENDED = 64 * 2**10  # bytes in a GNU or PAX header
MAX_RECORDS = 256  # in a PAX header
MAX_CHAIN = 8  # GNU and PAX headers before one member
MAX_NAME = 1024
BLOCK = 512
RECORD = re.compile(rb"([1-9]\d{0,5}) ([^=\n]+)=")
AGAIN = "copy or download it again"
REMAKE = "make the archive again of plain files, or remove it"
SPARSE = "sparse; make the archive again without --sparse"
MISFITS = {
    b"\x1f\x8b": "compressed; unpack it by `gunzip -c {0} > NEW.tar`",
    b"BZh": "compressed; unpack it by `bunzip2 -c {0} > NEW.tar`",
    b"\xfd7zXZ": "compressed; unpack it by `unxz -c {0} > NEW.tar`",
    b"\x28\xb5\x2f\xfd": "compressed; unpack it by `unzstd -c {0} > NEW.tar`",
    LFS_POINTER: "a Git LFS pointer, not the file itself; run `git lfs pull`",
}


class File:
    """A regular file open for reading. It is closed when the last reference goes, so never while a thread reads it."""

    def __init__(self, path: Path) -> None:
        self.path, self.fd = path, -1
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # non-blocking: a FIFO must not wait
            status = os.fstat(self.fd)
        except OSError as error:
            raise unreadable(error, path, DataError) from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{shown(path)}: not a regular file; give a .tar file")
        # whatever changes a file's bytes sets its ctime, which nobody can set back as they can its mtime
        self.size, self.state = status.st_size, (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`. Raises DataError if the file is shorter or cannot be read."""
        try:
            data = os.pread(self.fd, size, offset)
        except OSError as error:
            raise unreadable(error, self.path, DataError) from error
        if len(data) != size:
            raise DataError(f"{shown(self.path)}: cut short at offset {offset + len(data)}; {AGAIN}")
        return data

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:
            close(self.fd)


class Member(NamedTuple):
    """A file in the archive: `size` bytes from offset `start`. `problem`: why it cannot be used, or ""."""

    name: str
    start: int
    size: int
    problem: str


def members(file: File) -> Iterator[Member]:
    """Every member of an archive except folders, in order. Raises DataError with the member's offset and the fix.

    Every iteration advances by at least one block and never past the end, so any input takes linear time.
    """
    offset, count, chain, override = 0, 0, 0, {}  # override: the next member's name and size by GNU or PAX headers
    while count < MAX_MEMBERS:
        try:
            if (block := _block(file, offset)) is None:
                return
            kind, size, start = block[156:157], _number(block[124:136]), offset + BLOCK
            if kind in b"LKxXg":
                chain += 1
                if size > MAX_EXTENDED or chain > MAX_CHAIN:
                    raise ValueError(f"GNU or PAX headers over {MAX_EXTENDED >> 10} KiB, or too many; {REMAKE}")
                override |= _override(kind, file.read(start, size))
            else:
                size = 0 if kind in b"123456" else override.get("size", size)  # links, devices and folders have no data
                if start + size > file.size:
                    raise ValueError(f"cut short, {size} bytes where the file ends after {file.size - start}; {AGAIN}")
                name = (override.get("name") or _name(block)).decode("utf-8", "surrogateescape")
                if kind != b"5" and not name.endswith("/"):
                    yield Member(name, start, size, _problem(name, kind))
                count, chain, override = count + 1, 0, {}
        except ValueError as error:
            raise DataError(f"{shown(file.path)}: member at offset {offset}: {error}") from error
        offset = start + -(-size // BLOCK) * BLOCK
    raise DataError(f"{shown(file.path)}: over {MAX_MEMBERS} members; split it into several archives")


def _block(file: File, offset: int) -> bytes | None:
    """The header at `offset`, or None at the end mark. Raises ValueError if its checksum is wrong or it is missing."""
    block = file.read(offset, max(0, min(BLOCK, file.size - offset)))
    if block.count(0) == BLOCK:
        return None
    if len(block) == BLOCK and sum(block) - sum(block[148:156]) + 8 * 32 == _number(block[148:156]):
        return block
    if offset == 0:
        misfit = next((what for magic, what in MISFITS.items() if block.startswith(magic)), "")
        raise ValueError(misfit.format(shown(file.path)) or f"not a tar archive, or damaged; {AGAIN}")
    if len(block) < BLOCK:
        mend = f", or, if it is whole, `head -c 1024 /dev/zero >> {shown(file.path)}`" if not block else ""
        raise ValueError(f"the archive is cut short, its end mark is missing; {AGAIN}{mend}")
    raise ValueError(f"damaged header; {AGAIN}")


def _number(field: bytes) -> int:
    """A number in octal digits or GNU's base 256. Raises ValueError if it is negative or damaged."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if not (match := re.fullmatch(rb" *([0-7]*) *(\0.*)?", field, re.DOTALL)):
        raise ValueError(f"a number in its header is negative or damaged; {REMAKE}")
    return int(match[1] or b"0", 8)


def _override(kind: bytes, payload: bytes) -> dict[str, Any]:
    """The next member's name or size, from a GNU long name or PAX records "LENGTH KEY=VALUE\\n" (POSIX.1-2001)."""
    if kind in b"LKg":
        return {"name": payload.split(b"\0")[0]} if kind == b"L" else {}
    override, at, records, length = dict[str, Any](), 0, 0, len(payload.rstrip(b"\0"))
    while at < length:
        match, records = RECORD.match(payload, at), records + 1
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= length or payload[end - 1] != ord("\n") or records > MAX_RECORDS:
            raise ValueError(f"damaged PAX header; {REMAKE}")
        key, value, at = match[2], payload[match.end() : end - 1], end
        if key.startswith(b"GNU.sparse"):
            raise ValueError(SPARSE)
        if key == b"size":
            if not re.fullmatch(rb"\d{1,20}", value):
                raise ValueError(f"a size in its PAX header is negative or damaged; {REMAKE}")
            override["size"] = int(value)
        elif key == b"path":
            override["name"] = value
    return override


def _name(block: bytes) -> bytes:
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    posix = block[257:263] == b"ustar\0"  # GNU archives store times where POSIX has the prefix
    return prefix + b"/" + name if prefix and posix else name


def _problem(name: str, kind: bytes) -> str:
    """Why a member cannot be used, or "". Raises ValueError for a sparse one: where the next one starts is unknown."""
    if kind == b"S":
        raise ValueError(SPARSE)
    if kind not in b"0\0" + b"7":
        return "a link" if kind in b"12" else "not a regular file"
    if not 0 < len(name) <= MAX_NAME or "\0" in name or any("\ud800" <= c <= "\udfff" for c in name):
        return f"its name is not UTF-8 of 1 to {MAX_NAME} characters"
    return "its name leads out of the archive" if name.startswith("/") or ".." in name.split("/") else ""
