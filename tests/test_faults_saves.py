"""Saves that are killed before or refused at every call: what is kept is whole or absent."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest
from faults import CHANGES, Injector, check, restored, save, toy, write
from forker import Forker
from safetensors import SafetensorError

from tinydiff import temporary
from tinydiff.errors import ResourceError
from tinydiff.training import state
from tinydiff.training.saver import Saver

pytestmark = pytest.mark.usefixtures("unsynced")


LOOKS = ("open", "scandir", "stat")


def succeeds(forker: Forker, function: str, *arguments, log: Path) -> None:
    """Runs a function of this file in a process of its own, where it may fork and be killed."""
    forker.call(f"{__name__}:{function}", *map(str, arguments), log=log)
    assert forker.wait() == 0, log.read_text()


def leftovers(run_dir: Path) -> list[str]:
    return [str(p) for p in run_dir.rglob(".*")]


# --------------------------------------------------------------------------------------------------------------- killed


def kill_in_turn(place: str, before: str) -> int:
    """Saves with a process killed before each call, until one passes; then the next save, which mends what was left."""
    base, old = Path(place) / "base", abs(int(before)) or None
    if int(before) < 0:
        temporary.exchange = lambda *_: False
    base.mkdir()
    os.fsync = lambda descriptor: None
    if old:
        save(base, old)
    for n in count(1):
        run_dir = Path(shutil.copytree(base, Path(place) / "run"))
        if (pid := os.fork()) == 0:
            with Injector(n, lambda _: os.kill(os.getpid(), signal.SIGKILL)).installed():
                save(run_dir, 2)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        check(run_dir, old, 2, done=code == 0)
        save(run_dir, 3)
        check(run_dir, 2, 3, done=True)
        assert leftovers(run_dir) == []
        shutil.rmtree(run_dir)
        if code == 0:
            assert n > 40
            return 0
    return 1


@pytest.mark.parametrize("before", [1, 0, -1], ids=["replacing", "first", "replacing by renames"])
def test_killed_before_every_call_of_a_save(forker, tmp_path, before):
    succeeds(forker, "kill_in_turn", tmp_path, before, log=tmp_path / "log")


# -------------------------------------------------------------------------------------------------------------- refused


def refusal(code: int) -> Callable[[bool], None]:
    def act(rust: bool) -> None:
        if rust:
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
        raise OSError(code, os.strerror(code))

    return act


@pytest.mark.parametrize("code, before", [(errno.EIO, 1), (errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.ENOSPC, 0)])
def test_every_call_of_a_save_refused(tmp_path, code, before):
    """One line names file and fix, nothing half-made stays, what was there is whole, and the next save works."""
    base, fix = tmp_path / "base", "check the disk" if code == errno.EIO else "free some space"
    base.mkdir()
    if before:
        save(base, 1)
    for n in count(1):
        run_dir = Path(shutil.copytree(base, tmp_path / "run"))
        injector, error = Injector(n, refusal(code), CHANGES + LOOKS if code == errno.EIO else (*CHANGES, "open")), None
        with injector.installed():
            try:
                save(run_dir, 2)
            except ResourceError as caught:
                error = caught
        if error:
            assert error.code == 7 and "\n" not in str(error) and str(error).endswith(f": {os.strerror(code)}; {fix}")
            assert str(error).startswith(str(run_dir)) and ".tmp-" not in str(error), str(error)
            assert not list(run_dir.rglob(".tmp-*")) or injector.last in ("unlink", "rmdir", "open", "scandir", "stat")
        check(run_dir, before or None, 2, done=error is None)
        save(run_dir, 3)
        check(run_dir, 2, 3, done=True)
        assert leftovers(run_dir) == []
        shutil.rmtree(run_dir)
        if not injector.last:
            assert n > 60 and error is None
            return


def test_a_refusal_reaches_the_loop_from_the_thread_that_saves(tmp_path):
    """At whichever of check, settle and wait comes next; afterwards the same object saves again."""
    save(tmp_path, 1)
    for n, moment in enumerate(("check", "settle", "wait", "begin")):
        saver, training, step = Saver(), toy(2 + n), 2 + n
        with patch.object(state, "save_file", lambda *_: refusal(errno.ENOSPC)(True)):
            saver.begin(training, partial(write, tmp_path, step, 1))
            saver.thread.join()
        with pytest.raises(ResourceError, match=r"weights\.safetensors: No space left on device; free some space"):
            saver.begin(training, print) if moment == "begin" else getattr(saver, moment)()
        assert restored(tmp_path) == 1 + n and leftovers(tmp_path) == []
        saver.begin(training, partial(write, tmp_path, step, 1))
        saver.wait()
        assert restored(tmp_path) == step


def save_under_limits(place: str) -> int:
    """Every size from nothing to enough at which the system refuses to let files grow."""
    run_dir = Path(place) / "run"
    run_dir.mkdir()
    save(run_dir, 1)
    passed = 0
    for step, size in enumerate((0, 1, 150, 400, 500, 600, 700, 800, 10_000), 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            save(run_dir, step)
            passed = step
        except ResourceError as error:
            assert str(error).startswith(str(run_dir)) and str(error).endswith(
                ": File too large; raise the file size limit"
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        check(run_dir, passed or 1, step)
        assert leftovers(run_dir) == []
    return 0 if passed == step and restored(run_dir) == passed else 1


def test_a_limit_of_file_size_is_a_clean_refusal(forker, tmp_path):
    succeeds(forker, "save_under_limits", tmp_path, log=tmp_path / "log")
