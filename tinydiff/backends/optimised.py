"""Graphs as onnxruntime optimised them for this processor, in the user's cache folder: they open in half the time.

Each is a folder with a manifest, named by all that it depends on, which it repeats inside, and trusted by its hashes alone. A
bundle's own folder is never written to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnxruntime as ort

from tinydiff import temporary
from tinydiff.errors import ModelError, UserError
from tinydiff.files import RESTORE, entries, offered, shown
from tinydiff.user_cache import lasting, trim
from tinydiff.verified import Hash, verify

FORMAT = 2
NAME = "name"  # the file that repeats it: a folder that was renamed is not what it is called
MOST = 2 * 2**30  # bytes of all that is kept; what was used longest ago goes first, such as that of other versions
LARGEST = 2**29  # bytes of a graph that is kept: its weights are laid out anew, as floats, so each is on the disk again


def place(bundle: Path, name: str, mark: Sequence[Any] = ()) -> Path | None:
    """Where the optimised graph of a bundle belongs, its weights changed by what has this `mark`.

    None for a large one, one without hashes, and without a cache folder.
    """
    folder = lasting("graphs")
    if not folder or size(bundle / name) > LARGEST:
        return None
    try:
        files = {key: entry for key, entry in entries(bundle).items() if key.startswith(f"{name}/")}
    except UserError:
        return None
    inputs = json.dumps([FORMAT, ort.__version__, "cpu", processor(), files, *mark])
    return folder / hashlib.sha256(inputs.encode()).hexdigest()[:32] if files else None


def size(folder: Path) -> int:
    """Bytes of a graph's files, its weights among them."""
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


@lru_cache
def processor() -> str:
    """What the processor can do, by which onnxruntime chooses how weights lie."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return os.uname().machine + next((line for line in file if line.startswith(("flags", "Features"))), "")
    return os.uname().machine


def reopened(place: Path, create: Callable[[Path], ort.InferenceSession], digest: Hash) -> ort.InferenceSession | None:
    """The session of a graph that is kept; None where there is none, or it is not what was written and is removed."""
    if not os.path.lexists(place):
        return None
    try:
        verify(place, digest=digest)
        if (place / NAME).read_bytes() != place.name.encode():
            raise ModelError(f"{shown(place)}: of another graph; {RESTORE}")
        with contextlib.suppress(OSError):
            os.utime(place)  # `trim` goes by it
        return create(place / "model.onnx")
    except (UserError, OSError):
        with contextlib.suppress(OSError):
            temporary.discard(place)
    return None


def saved(
    place: Path, create: Callable[..., ort.InferenceSession], stack: contextlib.ExitStack
) -> ort.InferenceSession | None:
    """A session that writes its graph, which is kept once the stack is closed; None where it cannot be written."""
    with contextlib.suppress(UserError, OSError), contextlib.ExitStack() as own:
        if shutil.disk_usage(place.parent).free > MOST:  # what little space there is is not for a cache
            session = create(save=(folder := own.enter_context(offered(place))))
            (folder / NAME).write_text(place.name)
            stack.push(own.pop_all())
            return session
    return None


def finish(place: Path, stack: contextlib.ExitStack) -> Callable[[], None]:
    """What is left to do once the session is in use."""

    def work() -> None:
        with contextlib.suppress(UserError, OSError):
            stack.close()
            trim(place.parent, MOST)

    return work
