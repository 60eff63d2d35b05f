"""Ctrl-C from the first line to the last: the command ends with 130, without a traceback, whoever was running.

Imports nothing but what Python has imported before it, so that there is next to no time in which nobody listens.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, NoReturn

CODE = 130
heard = False  # whether there was an interrupt: what libraries turn it into, on its way through them, is no bug of ours


def listen() -> None:
    """Raise KeyboardInterrupt for SIGINT, but end at once where raising it would end in a traceback or in another error.

    Where SIGINT is ignored, as in a shell's background jobs, it stays so.
    """
    sys.excepthook, sys.unraisablehook = _escaped, _ignored
    import atexit
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # all is done, and Python's own end takes a while


def leave(code: int = CODE) -> "NoReturn":
    """End without waiting for threads, which may be opening gigabytes."""
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105  contextlib is not there yet
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # it is closed, or nobody reads it
    os._exit(code)


def _interrupt(number: int, frame: "FrameType | None") -> "NoReturn":
    """Modules and C extensions that are being imported make an ImportError of it, swallow it or abort."""
    global heard
    heard = True
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _escaped(kind: type[BaseException], error: BaseException, trace: "Any") -> None:
    if issubclass(kind, KeyboardInterrupt) and not os.environ.get("TINYDIFF_DEBUG"):
        leave()
    sys.__excepthook__(kind, error, trace)


def _ignored(unraisable: "Any") -> None:
    """Python would print a traceback and go on, for example while it ends."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        leave()
    sys.__unraisablehook__(unraisable)
