"""How a command ends: what escapes it becomes one line on stderr and an exit code.

It knows no command. What was interrupted ends in `interrupts`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from tinydiff import interrupts, processes
from tinydiff.errors import HungError, UserError, out_of_memory
from tinydiff.system import one_line, told

PACKAGES = {
    "PIL": "pillow",
    "onnxruntime": "onnxruntime, or onnxruntime-gpu for a GPU",
}  # that are not called as their modules


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what escapes a command into one line on stderr and the exit code it stands for."""
    try:
        try:
            yield
        except Exception:
            if interrupts.heard:
                raise KeyboardInterrupt from None
            raise
    except HungError as error:
        with contextlib.suppress(SystemExit):
            fail(str(error), error.code)
        os._exit(error.code)  # an orderly end would wait for what hangs
    except UserError as error:
        fail(str(error), error.code)
    except KeyboardInterrupt:
        fail("interrupted", interrupts.CODE)
    except BrokenPipeError:
        closed_pipe()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # click turns it into an exit of its own
            closed_pipe()
        raise
    except OSError as error:
        fail(told(error, "input/output"), 7)
    except Exception as error:
        if out_of_memory(error):
            fail("out of memory; lower --batch-size or the image size", 7)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            raise SystemExit(2) from None
        if hasattr(error, "format_message"):  # a click exception; typer carries a click of its own
            fail(error.format_message(), 2)  # type: ignore[attr-defined]
        if isinstance(error, ModuleNotFoundError) and (name := str(error.name).partition(".")[0]) != "tinydiff":
            fail(f"{name} is not installed; pip install {PACKAGES.get(name, name)}", 7)
        fail(f"bug: {type(error).__name__}: {error} (`tinydiff --debug ...` shows where)", 1)


def fail(message: str, code: int) -> None:
    """Print one line that a terminal only shows, or the traceback under --debug, and exit."""
    if os.environ.get("TINYDIFF_DEBUG"):
        raise  # noqa: PLE0704
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyboardInterrupt):
        if line := one_line(message):  # of many processes that stop together one speaks for all
            print(f"tinydiff: {processes.turn()}{line}", file=sys.stderr)
    raise SystemExit(code) from None


def closed_pipe() -> None:
    """Exit as a process that SIGPIPE ended, stdout pointed at nothing so that the last flush does not complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(141) from None
