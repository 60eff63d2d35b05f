"""Ctrl-C at chosen moments of a command's start, run and end: 130 and at most one line, wherever it falls."""

from __future__ import annotations

import subprocess
import sys

import pytest
from interpreters import ENV

# Each argument is a program, run in a child of its own, forked before anything is imported. `nth(k)` sends SIGINT at the
# k-th import; what a child says comes after its exit code.
SERVER = """
import os, sys
def interrupt():
    import _signal
    _signal.raise_signal(_signal.SIGINT)
def nth(k):
    left = [k]
    def watch(event, arguments):
        if event == "import":
            left[0] -= 1
            if left[0] == 0:
                interrupt()
    sys.addaudithook(watch)
for program in sys.argv[1:]:
    read, write = os.pipe()
    if not (child := os.fork()):
        os.dup2(write, 1), os.dup2(write, 2), os.close(read), os.close(write)
        exec(program)
        sys.exit()
    os.close(write)
    said = b"".join(iter(lambda: os.read(read, 4096), b"")).decode()
    os.close(read)
    print(repr((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said)))
"""


def ends(*programs: str) -> list[tuple[int, str]]:
    """The exit code of each program and what it said."""
    command = [sys.executable, "-c", SERVER, *programs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV, check=True)
    assert not done.stderr
    return [eval(line) for line in done.stdout.splitlines()]


def started(k: int, *arguments: str) -> str:
    """The command, interrupted at its k-th import."""
    return f"from tinydiff.__main__ import main; sys.argv = {['tinydiff', *arguments]!r}; nth({k}); main()"


def test_wherever_importing_is():
    """From the third import on: the first two are of what listens."""
    moments = [*range(4, 30, 3), *range(40, 200, 40)]
    for k, end in zip(moments, ends(*(started(k, "--help") for k in moments)), strict=True):
        assert end == (130, ""), k


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_while_numpy_and_the_runtime_are_imported(backend, tmp_path):
    command = "generate", "x", "--backend", backend, "-o", str(tmp_path / "a.png")
    moments = 200, 300, 350
    for k, end in zip(moments, ends(*(started(k, *command) for k in moments)), strict=True):
        assert end == (130, ""), k
    assert not list(tmp_path.iterdir())


COMMAND = "from tinydiff import cli, interrupts; interrupts.listen(); cli.app = lambda **_: work(); "


PROGRAMS = {
    "plain": "def work(): interrupt()",
    "made another error": (
        "def work():\n try: interrupt()\n except KeyboardInterrupt: raise ImportError('numpy failed') from None"
    ),
    "made a user's error": (
        "def work():\n from tinydiff.errors import ModelError\n"
        " try: interrupt()\n except KeyboardInterrupt: raise ModelError('damaged') from None"
    ),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_whatever_becomes_of_it_on_its_way(program):
    code = f"{program}\n{COMMAND}\nfrom tinydiff.__main__ import main; main()"
    assert ends(code) == [(130, "tinydiff: interrupted\n")]


SILENT = {
    "in what is collected": "class A:\n def __del__(self): interrupt()\nA()\nprint('not here')",
    "beside the command": "interrupt()",
    "while threads are awaited": (
        "import threading, time, _thread\nthreading.Thread(target=time.sleep, args=(9,)).start()\n"
        "threading.Timer(0.2, lambda: os.kill(os.getpid(), 2)).start()"
    ),
}


@pytest.mark.parametrize("program", SILENT.values(), ids=SILENT)
def test_where_python_would_print_a_traceback(program):
    assert ends("from tinydiff import interrupts; interrupts.listen()\n" + program) == [(130, "")]


def test_after_the_last_line_it_changes_nothing():
    late = "import atexit\natexit.register(interrupt)\nfrom tinydiff import interrupts; interrupts.listen()"
    assert ends(f"{late}; atexit.unregister(interrupt)", f"{late}\nprint('done')")[1] == (0, "done\n")


def test_where_it_is_ignored_it_stays_so():
    assert ends(
        "import signal; signal.signal(2, signal.SIG_IGN)\nfrom tinydiff import interrupts; interrupts.listen()\n"
        "interrupt(); print('here')"
    ) == [(0, "here\n")]


def test_what_listens_imports_next_to_nothing():
    code = "before = set(sys.modules); import tinydiff.__main__; print(sorted(set(sys.modules) - before))"
    assert ends(code) == [(0, "['tinydiff', 'tinydiff.__main__', 'tinydiff.interrupts']\n")]
