"""The mistakes a user can make, each with its exit code.

A message is one line that names the thing and the fix. The command line prints it to stderr and exits with `code`;
Python callers catch `UserError` or a subclass. Anything else that escapes is a bug and exits with 1.
"""

from __future__ import annotations


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, torch's or a device's, which say so in their text alone."""
    lacks = any(text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory"))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and lacks)


class UserError(Exception):
    """Base of every error that a user can mend."""

    code = 2


class UsageError(UserError):
    """A flag, argument or configuration key is wrong."""

    code = 2


class DataError(UserError):
    """The training or input data is missing or unusable."""

    code = 3


class ModelError(UserError):
    """A model folder, checkpoint or bundle is missing, damaged or of another kind."""

    code = 4


class DivergedError(UserError):
    """A network gave NaN or infinite numbers, in training or in drawing."""

    code = 5


class BusyError(UserError):
    """Another process holds the run directory."""

    code = 6


class ResourceError(UserError):
    """The operating system refused: disk full, permission, memory."""

    code = 7


class HungError(ResourceError):
    """Something does not answer, and waiting for it in order to end cleanly would be waiting for ever."""
