"""What the operating system refuses, as one line that names the file and the fix; foreign values cut and escaped.

It knows no formats. Every value of a message that comes from a user, a file or the system goes through `shown`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinydiff.errors import ModelError, ResourceError, UserError

LONGEST = 200  # characters of a value in a message
LINE = 1000  # characters of a message
RESTORE = "copy or download it again"
TEMPORARY = re.compile(r"/\.tmp-tinydiff-[0-9a-f]{16}(/[^/]+)?")  # as `temporary` names them, and what is made there
NUMBER = re.compile(r"\((?:os error )?(\d{1,3})\)")  # how libraries in Rust and C++ report what the system said
FIXES = {  # what helps, by what the system says
    fix: tuple(getattr(errno, name) for name in names.split() if hasattr(errno, name))
    for fix, names in {
        "free some space": "ENOSPC EDQUOT",
        "choose a writable place": "EACCES EPERM EROFS",
        "raise the file size limit": "EFBIG",
        "raise the limit of open files (`ulimit -n`)": "EMFILE",
        "close other programs, the system has too many files open": "ENFILE",
        "free some memory": "ENOMEM ENOBUFS",
        "check the path": "ENOENT",
        "remove what is there, or choose another path": "EEXIST ENOTEMPTY",
        "choose a path that leads through folders alone": "ENOTDIR",
        "choose a path where no folder is": "EISDIR",
        "give a shorter name": "ENAMETOOLONG",
        "give the path of the file itself, its links lead nowhere": "ELOOP",
        "choose another path, such as a folder in it, or close the program that uses it": "EBUSY ETXTBSY",
        "check the disk": "EIO EUCLEAN EREMOTEIO EBADMSG",
        "check that the drive is connected": "ENODEV ENXIO ENOMEDIUM",
        "check the network drive, then run the same command again": "ESTALE ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN"
        " ENETUNREACH ENOTCONN ECONNRESET ECONNABORTED ECONNREFUSED ENOLINK",
        "choose a folder of another file system": "EINVAL EXDEV ENOTSUP EOPNOTSUPP ENOSYS ENOLCK EMLINK EOVERFLOW ENOTTY",
        "give another name, this file system refuses it": "EILSEQ",
        "unlock the encrypted folder": "ENOKEY EKEYEXPIRED EKEYREVOKED",
        "run the same command again": "EAGAIN EINTR EDEADLK",
    }.items()
}
FIX = {number: fix for fix, numbers in FIXES.items() for number in numbers}
READING = dict.fromkeys((errno.EACCES, errno.EPERM), "make it readable")  # what helps a reader instead
READING |= dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR), f"check the path, or {RESTORE}")
READING |= {errno.EINVAL: RESTORE}
LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN)  # of which no file is to blame


def cut(text: str, longest: int = LONGEST) -> str:
    """`text` without its middle where it is too long: the end of a path and the fix in a message say most."""
    end = longest - longest // 3 - 3
    return text if len(text) <= longest else f"{text[: longest // 3]}...{text[-end:]}"


def escaped(text: str) -> str:
    """`text`, escaped if it has characters that are not printable."""
    return text if text.isprintable() else ascii(text)


def shown(value: object) -> str:
    """A value, such as a path, for a message: cut and escaped."""
    return cut(escaped(cut(str(value))))


def one_line(message: str) -> str:
    """A message as one line that a terminal only shows."""
    return cut("".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split())), LINE)


def told(error: OSError, path: object, fixes: dict[int, str] = FIX) -> str:
    """`file: what the system says; the fix`. A temporary name is told as that of `path`, which it is made for."""
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(path)
    if inside := TEMPORARY.search(where):
        where = f"{path}{where[inside.end() :]}"
    fix = fixes.get(error.errno or 0) or FIX.get(error.errno or 0, "choose another place, or try again")
    return f"{shown(where)}: {cut(str(error.strerror or error))}; {fix}"


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Turn an OSError, except BrokenPipeError, into a ResourceError that names the file, or `path`, and the fix."""
    try:
        yield
    except (BrokenPipeError, UserError):
        raise
    except Exception as error:
        if (cause := system_error(error)) is None:
            raise
        raise ResourceError(told(cause, path)) from error


def unreadable(error: OSError, path: str | Path, kind: type[UserError] = ModelError) -> UserError:
    """The error of a file that cannot be read: of the `kind` of file, or ResourceError where the system lacks something."""
    return (ResourceError if error.errno in LACKING else kind)(told(error, path, READING))


def system_error(error: Exception) -> OSError | None:
    """The OSError that an exception is, or that its text reports; None if there is none."""
    if isinstance(error, OSError):
        return error
    text = str(error)
    numbers = (int(match[1]) for match in NUMBER.finditer(text))
    return next((OSError(n, os.strerror(n)) for n in numbers if os.strerror(n) in text), None)
