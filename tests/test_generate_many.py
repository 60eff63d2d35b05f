"""`tinydiff generate` under torchrun: the images of one process, drawn by several. Real torchrun, real pipes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interpreters import ENV

from tinydiff import cli, processes
from tinydiff.drawing import Job, Reel, Sink, job_of, shares
from tinydiff.errors import UsageError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


FAST = ("--steps", "2", "--batch-size", "2", "--json")


def many(number: int, *words: str, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess:
    command = [*TORCHRUN, str(number), "-m", "tinydiff", *words]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, env=ENV, timeout=120)


def rows(text: str | bytes) -> list[dict[str, Any]]:
    """The JSON lines in order of the images, without what differs from run to run."""
    lines = [json.loads(line) for line in text.splitlines()]
    return sorted(({k: v for k, v in row.items() if k != "seconds"} for row in lines), key=lambda row: row["path"])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, pixels and metadata together; nothing temporary may be left."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function (words, stdin) -> stdout of the same command in this process alone."""

    def run(*words: str, stdin: bytes = b"") -> str:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "stdin").write_bytes(stdin)
        with open(tmp_path / "stdin") as file:
            monkeypatch.setattr(sys, "stdin", file)
            cli.app(words, standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_the_images_of_one_process(tiny_model: Path, tmp_path: Path, one: Callable[..., str]) -> None:
    words = ("generate", "-", "-m", str(tiny_model), "-s", "5", *FAST)
    prompts = b"\xef\xbb\xbfa red square\n\na blue corner\r\n" + b"".join(b"green stripe %d\n" % i for i in range(7))
    alone = rows(one(*words, "-o", "out/", stdin=prompts))
    (tmp_path / "out").rename(tmp_path / "alone")
    assert [row["seed"] for row in alone] == list(range(5, 14))
    done = many(3, *words, "-o", "out/", cwd=tmp_path, stdin=prompts)
    assert done.returncode == 0 and rows(done.stdout) == alone
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_random_seed_is_one_seed(tiny_model: Path, tmp_path: Path, one: Callable[..., str]) -> None:
    words = ("generate", "red square", "--to", "blue square", "--frames", "5", "-m", str(tiny_model), *FAST)
    done = many(2, *words, "-o", "many/", cwd=tmp_path)
    drawn = rows(done.stdout)
    assert done.returncode == 0 and [row["share"] for row in drawn] == [0, 0.25, 0.5, 0.75, 1]
    one(*words, "-o", "one/", "-s", str(drawn[0]["seed"]))
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_nothing_to_draw(tiny_model: Path, tmp_path: Path) -> None:
    done = many(2, "generate", "-", "-m", str(tiny_model), "-o", "out/", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, b"", b"", [])


def test_what_all_meet_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "0000.png").write_bytes(b"mine")
    done = many(2, "generate", "-", "-o", "./", cwd=tmp_path, stdin=b"heart\n")
    said = [line for line in done.stderr.decode().splitlines() if line.startswith("tinydiff: ")]
    assert done.returncode != 0 and len(said) == 1 and "--force" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["0000.png"]


def test_what_one_meets_names_it(tiny_model: Path, tmp_path: Path) -> None:
    words = ("generate", "-", "-m", str(tiny_model), "-o", "out/", "--steps", "2", "--batch-size", "1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0001.png").write_bytes(b"mine")
    done = many(2, *words, cwd=tmp_path, stdin=b"a square\na corner\n")
    said = [line for line in done.stderr.decode().splitlines() if line.startswith("tinydiff: ")]
    assert done.returncode != 0 and len(said) == 1
    assert said[0].startswith("tinydiff: [rank 1] ") and "0001.png: exists" in said[0]
    assert contents(tmp_path / "out")["0001.png"] == b"mine"


def test_bad_lines_are_said_and_the_rest_is_drawn(tiny_model: Path, tmp_path: Path, one: Callable[..., str]) -> None:
    """Others' names and seeds do not change. A line that only its network call shows to be bad is met by the second process."""
    words = ("generate", "-", "-m", str(tiny_model), "-s", "5", "--steps", "2", "--batch-size", "1", "--json", "-o")
    lines = [b"a square", b"", b"(blue:3e38)", b"a AND", b"a corner", b"a stripe", b"x" * 10**5, b"green"]
    done = many(2, *words, "many/", cwd=tmp_path, stdin=b"\n".join(lines))
    said = [line for line in done.stderr.decode().splitlines() if line.startswith("tinydiff: ")]
    assert sorted(line.split(":")[1] for line in said) == [f" line {n} of stdin" for n in (3, 4, 7)]
    assert b"exitcode  : 5" in done.stderr  # as of line 3
    lines[2:4] = [b"a red one", b"a blue one"]
    lines[6] = b"another"
    one(*words, "one/", stdin=b"\n".join(lines))
    drawn, alone = contents(tmp_path / "many"), contents(tmp_path / "one")
    assert sorted(drawn) == [f"{i:04d}.png" for i in (0, 3, 4, 6)] and drawn.items() <= alone.items()


def test_closed_pipe_ends_all(tiny_model: Path, tmp_path: Path) -> None:
    command = [*TORCHRUN, "2", "-m", "tinydiff", "generate", "-", "-m", str(tiny_model), "-o", "out/", *FAST]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, env=ENV, **pipes)
    assert process.stdin and process.stdout
    process.stdin.write(b"square\n" * 200)  # more than wait for a process: the first one hands out as they are drawn
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["prompt"] == "square"  # stdin is open still
    process.stdout.close()
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and b"exitcode  : 141" in said and b"tinydiff: " not in said


def test_without_torchruns_agent(tmp_path: Path) -> None:
    """The first process is the store then, and stays until the others have their last item."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import time; from tinydiff import processes\n"
        "for item in processes.dealt(b'%d' % i for i in range(50)):\n"
        "    time.sleep(0.02 * processes.rank()); print(item.decode())\n"
    )
    place = ENV | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=place | {"RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said == [[b"%d" % i for i in range(start, 50, 2)] for start in range(2)]


def test_one_file_is_for_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for output, kind in {"-": Sink, "way.webp": Reel, "way.png": Reel}.items():
        with pytest.raises(UsageError, match=f"-o {output}.*give a folder"):
            kind(output, False, *([True] if kind is Sink else []))
    (tmp_path / "0000.png").touch()
    Sink(f"{tmp_path}/", force=False, many=True)  # the first process has looked, and may have drawn it by now


@pytest.mark.parametrize(
    ("listed", "local", "seen"), [("4,5", "1", "5"), ("GPU-a,GPU-b", "2", "GPU-a"), ("", "0", ""), ("3", "7", "3")]
)
def test_a_device_for_each(listed: str, local: str, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CUDA_VISIBLE_DEVICES": listed, "RANK": local, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, value)
    processes.own_device()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == listed  # alone, a process keeps them all
    monkeypatch.setenv("WORLD_SIZE", "8")
    processes.own_device()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_devices_that_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "6")
    monkeypatch.setenv("WORLD_SIZE", "8")
    processes.own_device()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


def test_batches_are_full_and_jobs_survive_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(0, "a\nb \u2764", 2**63 - 1), None, Job(1, "x", (1, 2, 1 / 3), "y", 0.1), Job(2, "z", 3)]
    assert [len(batch) for batch in shares(iter(jobs), 2)] == [1, 2, 0]  # nothing is waiting after one, nor at the end
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "dealt", lambda items: items)
    assert list(shares(iter(jobs), 2)) == [[jobs[0], jobs[2]], [jobs[3]]]
    assert job_of({"index": 3, "prompt": "p", "seed": 1}) == Job(3, "p", 1)


def test_what_the_reader_meets_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken():
        yield b"first"
        raise OSError("stdin is gone")

    class Store:
        def queue_push(self, *words: Any) -> None: ...
        def queue_len(self, name: str) -> int:
            return 0

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "_store", Store)
    items = processes.dealt(broken())
    assert next(items) == b"first"
    with pytest.raises(OSError, match="stdin is gone"):
        next(items)
