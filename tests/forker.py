"""Processes that tests can kill: a server imports torch once, then forks one for each job it is given.

As a program it is the server: it reads requests from stdin, one JSON object a line, and answers each with a number.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interpreters import ENV


class Forker:
    """Training runs, and any function of a test module, in processes of their own."""

    def __init__(self, config_path: Path, modules: Sequence[str] = ()):
        self.config_path, self.last = config_path, 0
        command = [sys.executable, str(Path(__file__)), *modules]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENV)

    def ask(self, **request: Any) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def call(self, function: str, *arguments: Any, log: Path, env: dict[str, str] | None = None) -> int:
        """Begin `module:function` of some arguments, which gives an exit code, with other environment variables.

        Its process id; several may run at once.
        """
        self.last = self.ask(function=function, arguments=arguments, log=str(log), env=env or {})
        return self.last

    def start(
        self,
        run_dir: Path,
        die_at: int = 0,
        names: Sequence[str] = ("rename", "fsync", "link"),
        env: dict[str, str] | None = None,
        config_path: Path | None = None,
    ) -> int:
        """Begin a run that dies before its `die_at`-th call of `names`, functions of os; its process id.

        What it says is added to `<run_dir>.log`.
        """
        arguments = (str(config_path or self.config_path), str(run_dir), die_at, names)
        return self.call("forker:train", *arguments, log=Path(f"{run_dir}.log"), env=env)

    def wait(self, pid: int = 0) -> int:
        """The exit code of a process, or of the one that was started last."""
        return self.ask(wait=pid or self.last)

    def run(self, *arguments: Any, **options: Any) -> int:
        return self.wait(self.start(*arguments, **options))

    def close(self) -> None:
        with self.process as process:
            process.kill()


def processor_time(pid: int) -> float | None:
    """Seconds that a process has computed, to a hundredth; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields[0] != "Z" else None


def wait_until(done: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# ---- in the forked processes -----------------------------------------------------------------------------------------


def train(config_path: str, run_dir: str, die_at: int = 0, names: Sequence[str] = ()) -> int:
    """A run to its end; its exit code. The last line that it says has the calls of `names` and its processor time."""
    from tinydiff import config
    from tinydiff.errors import UserError
    from tinydiff.training import loop

    calls = [0]

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in names:
        setattr(os, name, counted(getattr(os, name)))
    try:
        loop.run(config.load(Path(config_path)), Path(run_dir))
        print("calls and seconds", calls[0], time.process_time(), file=sys.stderr)
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130


def command(argv: Sequence[str], patch: str, rank: int) -> int:
    """The command line behind a `patch`, which may ask for its `rank`; its exit code."""
    from tinydiff import cli

    os.dup2(2, 1)
    sys.argv = ["tinydiff", *argv]
    exec(patch, {"rank": rank})
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)


def serve(modules: Sequence[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    import torch._dynamo  # noqa: F401  which the first optimizer step imports, a second of every job otherwise

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            work(request)
        print(answer, flush=True)


def work(request: dict[str, Any]) -> None:
    """The job, in its process, which ends here."""
    code = 1
    try:
        os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.environ.update(request["env"])
        module, _, name = request["function"].partition(":")
        code = getattr(importlib.import_module(module), name)(*request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1:])
