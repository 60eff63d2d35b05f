"""Saves and runs under every fault: killed, refused, out of power, damaged, stopped. What is kept is whole or absent.

A toy of two linear layers stands for a network, so that each call of a save can be killed or refused in turn.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from forker import Forker, environment, processor_time, train, wait_until
from safetensors import SafetensorError
from torch import nn

from tinydiff import config, files
from tinydiff.checkpoints import folder, weights
from tinydiff.checkpoints.header import MAX_COMMAS, MAX_HEADER, header
from tinydiff.errors import HungError, ModelError, ResourceError
from tinydiff.training import loop, state
from tinydiff.training.metrics import TIMED, Metrics
from tinydiff.training.optim import Average, adamw
from tinydiff.training.parallel import World, pieces
from tinydiff.training.saver import Ahead, Saver

CHANGES = ("fsync", "rename", "link", "unlink", "rmdir", "mkdir", "chmod")
LOOKS = ("open", "scandir", "stat")
WRITERS = ((state, "save_file"), (folder, "save_file"), (Path, "write_text"), (Path, "write_bytes"))
YEAR = 365 * 24 * 3600


@pytest.fixture(scope="module")
def forker(config_path) -> Iterator[Forker]:
    forker = Forker(config_path, ["tinydiff.training.loop", "test_faults"])
    yield forker
    forker.close()


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """What syncing is good for no test can see but that of the power; here it takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def succeeds(forker: Forker, function: str, *arguments, log: Path) -> None:
    """Runs a function of this module in a process of its own, where it may fork and be killed."""
    forker.call(f"test_faults:{function}", *map(str, arguments), log=log)
    assert forker.wait() == 0, log.read_text()


# --------------------------------------------------------------------------------------------------------------- a toy


def toy(step: int, width: int = 6) -> state.Training:
    """What training is after `step` steps: a function of the step, each kind of tensors its own."""
    torch.manual_seed(step)
    held = pieces(nn.Sequential(nn.Linear(width, width), nn.Linear(width, 1)), World(torch.device("cpu"), 1))
    parameters = [piece.tensor for piece in held]
    training = state.Training(held, Average(parameters, 0.9), adamw(parameters, config.Stage()))
    for mine in training.average.tensors:
        mine.normal_()
    for p in parameters if step else ():
        moments = {kind: torch.randn_like(p, requires_grad=False) for kind in state.MOMENTS}
        training.optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    return training


def about(step: int) -> dict:
    return {"stage": "toy", "step": step, "skipped": 0, "updates": step, "scaler": {}, "processes": 1}


def publish(run_dir: Path, step: int, checkpoint: Path) -> None:
    """A model folder as a task makes it."""
    with files.committed(run_dir / "model", replace=True) as temporary:
        (temporary / "net").mkdir()
        folder.save_tensors(
            dict(state.Blocks(checkpoint, "average").whole()), temporary / "net" / "w.safetensors", None
        )
        (temporary / "about.json").write_text(json.dumps({"step": step}))


def write(run_dir: Path, step: int, keep: int, saved: state.Snapshot) -> None:
    path, world = run_dir / "checkpoints" / f"toy-{step:08d}", World(torch.device("cpu"), 1)
    state.save(path, saved, {}, about(step), world, partial(publish, run_dir, step))
    state.prune(run_dir / "checkpoints", "toy", keep)


def save(run_dir: Path, step: int, keep: int = 1, width: int = 6) -> None:
    """All that the loop does to save a step."""
    saved: state.Snapshot = {}
    state.snapshot(toy(step, width), saved)
    write(run_dir, step, keep, saved)


def restored(run_dir: Path, width: int = 6) -> int | None:
    """The step that a resumed run begins at, after comparing every tensor with what that step saved."""
    said: list[str] = []
    state.sweep(run_dir)
    path = state.newest(run_dir / "checkpoints", "toy", said.append)
    assert not said
    if path is None:
        return None
    step, training = files.read_json(path / "state.json")["step"], toy(0, width)
    state.load(path, training, step)
    wanted = toy(step, width)
    for kind in state.KINDS:
        ours, theirs = training.tensors(kind), wanted.tensors(kind)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert training.updates == step
    return step


def published(run_dir: Path) -> int | None:
    """The step whose averaged weights the model folder has."""
    files.recover(run_dir / "model")
    if not (run_dir / "model").exists():
        return None
    files.verify(run_dir / "model")
    step = files.read_json(run_dir / "model" / "about.json")["step"]
    found, wanted = weights.tensors([run_dir / "model" / "net" / "w.safetensors"]), toy(step).tensors("average")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    return step


def check(run_dir: Path, old: int | None, new: int, done: bool = False) -> None:
    """The old or the new step is there and whole; once saving is `done`, the new one."""
    step, model = restored(run_dir), published(run_dir)
    assert step in ((new,) if done else (old, new)) and model in ((new,) if done else (old, new))
    assert step != new or model == new  # whoever finds the new checkpoint has nothing left to publish


class Injector:
    """Lets `act` take the place of the `at`-th of some calls that use the disk, or follow the writing of half a file."""

    def __init__(self, at: int, act: Callable[[bool], None], names: tuple[str, ...] = CHANGES):
        self.at, self.act, self.names, self.calls, self.last = at, act, names, 0, ""

    def due(self, name: str) -> bool:
        self.calls += 1
        if self.calls == self.at:
            self.last = name
        return self.calls == self.at

    def call(self, real: Callable, name: str, *args, **kwargs):
        if self.due(name):
            self.act(False)
        return real(*args, **kwargs)

    def writer(self, real: Callable, *args, **kwargs):
        """Before it, and after half of it."""
        if self.due("write"):
            self.act(real.__name__ == "save_file")
        found = real(*args, **kwargs)
        path = next(a for a in args if isinstance(a, Path))
        if self.due("write"):
            os.truncate(path, path.stat().st_size // 2)
            self.act(real.__name__ == "save_file")
        return found

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in self.names:
                real = getattr(os, name)
                stack.enter_context(patch.object(os, name, partial(self.call, real, name)))
            for owner, name in WRITERS:
                real = getattr(owner, name)
                stack.enter_context(patch.object(owner, name, lambda *a, real=real, **k: self.writer(real, *a, **k)))
            yield


# -------------------------------------------------------------------------------------------------------------- killed


def kill_in_turn(place: str, before: str) -> int:
    """Saves with a process killed before each call, until one passes; then the next save, which mends what was left."""
    base, old = Path(place) / "base", int(before) or None
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


def leftovers(run_dir: Path) -> list[str]:
    return [str(p) for p in run_dir.rglob(".*")]


@pytest.mark.parametrize("before", [1, 0], ids=["replacing", "first"])
def test_killed_before_every_call_of_a_save(forker, tmp_path, before):
    succeeds(forker, "kill_in_turn", tmp_path, before, log=tmp_path / "log")


# ------------------------------------------------------------------------------------------------------------- refused


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


# -------------------------------------------------------------------------------------------------------- out of power


class Disk:
    """A folder as a disk may hold it when the power fails, learnt by looking at every call.

    For every file what has been synced of it, and what is there; for every folder the names synced, and what was done to
    them since, in order: [(name, inode or None)], all of which comes about or nothing. A name and what it names are synced
    apart. Descriptors are kept, so that no inode's number comes twice.
    """

    def __init__(self, root: Path):
        self.root, self.kept = root, dict[int, int]()
        self.live: dict[int, bytes | dict[str, int]] = {}
        self.synced: dict[int, bytes | dict[str, int]] = {}
        self.pending: dict[int, list[list[tuple[str, int | None]]]] = {}
        self.top = self.look()
        for number, found in self.live.items():  # what was there before has been for long
            self.synced[number], self.pending[number] = found if isinstance(found, bytes) else dict(found), []

    def close(self) -> None:
        for descriptor in self.kept.values():
            os.close(descriptor)

    def look(self) -> int:
        """Compare with what is there now."""
        live: dict[int, bytes | dict[str, int]] = {}
        top = self.scan(self.root, live)
        for number, found in live.items():
            if isinstance(found, dict):
                before = self.live.get(number, {})
                gone = {name: i for name, i in before.items() if found.get(name) != i}
                come = {name: i for name, i in found.items() if before.get(name) != i}
                steps = [*come.items(), *((name, None) for name in gone if name not in come)]
                if steps:  # of one call: what left a name and came under another was renamed
                    self.pending.setdefault(number, []).append(steps)
        self.live = live
        return top

    def scan(self, path: Path, live: dict) -> int:
        number = os.lstat(path).st_ino
        if number not in self.kept:
            self.kept[number] = os.open(path, os.O_RDONLY)
        if path.is_dir():
            live[number] = {}
            live[number].update({name: self.scan(path / name, live) for name in sorted(os.listdir(path))})
        else:
            live[number] = path.read_bytes()
        return number

    def sync(self, number: int) -> None:
        found = self.live[number]
        self.synced[number] = found if isinstance(found, bytes) else dict(found)
        self.pending[number] = []

    def lose_power(self, place: Path, keep: Callable[[], float]) -> None:
        """Make `place` what may be left; `keep` chooses, from 0 for what was synced alone to 1 for everything."""
        self.build(self.top, place, keep)

    def build(self, number: int, place: Path, keep: Callable[[], float]) -> None:
        found = self.live.get(number, self.synced.get(number))
        if isinstance(found, bytes) or (found is None):
            place.write_bytes(self.contents(number, found or b"", keep()))
            return
        place.mkdir()
        names = dict(self.synced.get(number, {}))
        for steps in self.pending.get(number, []):
            if keep() >= 0.5:
                names.update(steps)
        for name, inner in names.items():
            if inner is not None:
                self.build(inner, place / name, keep)

    def contents(self, number: int, live: bytes, chance: float) -> bytes:
        if self.synced.get(number) == live or chance >= 0.8:
            return live
        if chance >= 0.5:
            return live[: int(len(live) * (chance - 0.5) / 0.3)]
        return bytes(len(live)) if chance >= 0.25 else self.synced.get(number, b"")


@contextmanager
def watched(disk: Disk, after: Callable[[str], None]) -> Iterator[None]:
    """Looks at the disk after every call of a save, and calls `after`."""
    busy = []

    def seen(real, name, *args, **kwargs):
        if busy:
            return real(*args, **kwargs)
        busy.append(1)
        try:
            found = real(*args, **kwargs)
            disk.look()
            if name == "fsync":
                disk.sync(os.fstat(args[0]).st_ino)
            after(name)
            return found
        finally:
            busy.clear()

    with ExitStack() as stack:
        for name in CHANGES:
            stack.enter_context(patch.object(os, name, partial(seen, getattr(os, name), name)))
        for owner, name in WRITERS:
            call = lambda *a, real=getattr(owner, name), **k: seen(real, "write", *a, **k)  # noqa: E731
            stack.enter_context(patch.object(owner, name, call))
        yield


@pytest.mark.parametrize("before", [1, 0], ids=["replacing", "first"])
def test_power_lost_after_every_call_of_a_save(tmp_path, before):
    """With none, all, or any choice of what was not synced yet: the old step or the new, and after the save the new."""
    run_dir, rng, moments = tmp_path / "run", np.random.default_rng(20), []
    run_dir.mkdir()
    if before:
        save(run_dir, 1)
    disk = Disk(tmp_path / "run")

    def lose_power(name: str, done: bool = False) -> None:
        moments.append(name)
        choices = [lambda: 0.0, lambda: 1.0, lambda: 0.7, lambda: 0.3] + [rng.random] * 6
        for number, keep in enumerate(choices):
            place = tmp_path / f"{len(moments)}-{number}"
            disk.lose_power(place, keep)
            check(place, before or None, 2, done)
            shutil.rmtree(place)

    with watched(disk, lose_power):
        save(run_dir, 2)
    for _ in range(10):
        lose_power("done", done=True)
    disk.close()
    assert moments.count("fsync") > 12 and {"mkdir", "rename", "write"} < set(moments)


def test_power_lost_after_every_write_of_a_single_file(tmp_path):
    """Of the file, and of the folders that were made for it."""
    run_dir, rng = tmp_path / "run", np.random.default_rng(20)
    run_dir.mkdir()
    disk, places = Disk(run_dir), count()

    def lose_power(name: str, done: bool = False) -> None:
        for keep in [lambda: 0.0, lambda: 1.0] + [rng.random] * 20:
            place = tmp_path / f"lost{next(places)}"
            disk.lose_power(place, keep)
            path = place / "a" / "b" / "c.json"
            assert path.read_bytes() == b"{}\n" * 99 if done or path.exists() else True
            shutil.rmtree(place)

    with watched(disk, lose_power):
        files.write_file(run_dir / "a" / "b" / "c.json", b"{}\n" * 99)
    lose_power("done", done=True)
    disk.close()


# ------------------------------------------------------------------------------------------------------------- damaged

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Steps 1 and 2 of a toy whose files take several pages."""
    run_dir = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        save(run_dir, step, keep=2, width=48)
    return run_dir


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def damages(checkpoint: Path) -> Iterator[tuple[str, Path, bytes]]:
    """(what, file, its damaged content): cut at every page or 64 bytes, a bit of every region, emptied, and replaced."""
    for path in sorted(checkpoint.iterdir()):
        data = path.read_bytes()
        step = 4096 if len(data) > 8192 else 64
        for size in range(0, len(data), step):
            yield "cut", path, data[:size]
        for at in range(0, len(data), 1024 if len(data) > 8192 else 48):
            yield "bit", path, flipped(data, at)
        yield "pointer", path, POINTER
        yield "zeros", path, bytes(len(data))
        other = checkpoint.with_name("toy-00000001") / path.name
        yield "swapped", path, other.read_bytes()
        yield "longer", path, data + b"\0"
    yield "extra", checkpoint / "evil.py", b"1"


def replaced(path: Path, data: bytes) -> None:
    """In place of a file that other folders may be linked to."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def test_every_damage_is_found_and_the_checkpoint_before_it_used(two, tmp_path):
    """Named and set aside; where it is called strict, refused."""
    cases = list(damages(two / "checkpoints" / "toy-00000002"))
    assert len(cases) > 100
    for number, (what, path, data) in enumerate(cases):
        run_dir = tmp_path / str(number)
        shutil.copytree(two, run_dir, copy_function=os.link)
        damaged, checkpoints, said = run_dir / path.relative_to(two), run_dir / "checkpoints", []
        replaced(damaged, data)
        with pytest.raises(ModelError) as caught:
            state.newest(checkpoints, "toy", said.append, strict=True)
        assert caught.value.code == 4 and "\n" not in str(caught.value) and not said
        assert f"{checkpoints}/toy-00000002" in str(caught.value), (what, path, str(caught.value))
        if "another" in str(caught.value) or "newer" in str(caught.value):  # the bit was one of its version
            assert path.name == "manifest.json" and what == "bit"
            continue
        assert "--strict" in str(caught.value)
        assert path.name in str(caught.value) or path.name == "manifest.json"  # which blames what it is wrong about
        assert state.newest(checkpoints, "toy", said.append) == checkpoints / "toy-00000001" and len(said) == 1
        assert sorted(p.name for p in run_dir.iterdir()) == ["checkpoints", "damaged", "model"]
        assert [p.name for p in (run_dir / "damaged").iterdir()] == ["toy-00000002"]
        assert restored(run_dir, 48) == 1
        shutil.rmtree(run_dir)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.rename(c.with_name("toy-00000007")),
        lambda c: (c / "exp_avg.safetensors").unlink(),
        lambda c: (c / "state.json").write_text(json.dumps({"format": state.FORMAT, "step": 2})),
        lambda c: (c / "state.json").write_text("[]"),
    ],
    ids=["name", "file", "keys", "list"],
)
def test_a_checkpoint_that_is_sound_but_not_what_it_should_be(two, tmp_path, edit):
    """Somebody has renamed it, or has written a manifest of their own."""
    run_dir, said = Path(shutil.copytree(two, tmp_path / "run")), []
    checkpoint = run_dir / "checkpoints" / "toy-00000002"
    (checkpoint / "manifest.json").unlink()
    with files.committed(tmp_path / "made") as made:
        shutil.copytree(checkpoint, made, dirs_exist_ok=True)
        if (made / "state.json").exists() and edit.__code__.co_names[0] != "rename":
            edit(made)
    shutil.rmtree(checkpoint)
    (tmp_path / "made").rename(checkpoint)
    if edit.__code__.co_names[0] == "rename":
        edit(checkpoint)
    assert state.newest(run_dir / "checkpoints", "toy", said.append) == run_dir / "checkpoints" / "toy-00000001"
    assert len(said) == 1 and "going back" in said[0]


def test_a_clock_that_jumps_changes_nothing(two, tmp_path):
    """Times of files do not count: the newest is that of the highest step."""
    run_dir = Path(shutil.copytree(two, tmp_path / "run"))
    for step, jump in ((1, YEAR), (2, -YEAR)):
        for path in (run_dir / "checkpoints" / f"toy-{step:08d}").rglob("*"):
            os.utime(path, (time.time() + jump,) * 2)
    assert restored(run_dir, 48) == 2
    clock = iter(np.cumsum(np.random.default_rng(20).choice([YEAR, -YEAR, 1], 10_000)).tolist())
    with patch.object(time, "time", lambda: next(clock)):
        log = Metrics(run_dir, "toy", 0, 4)
        for n in range(1, 41):
            log.add(n, {"loss": 1.0})
    rates = [
        json.loads(line).get("steps_per_second", 0) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rates) == 4 and min(rates) > 0


# ---------------------------------------------------------------------------------------------------- hostile headers


def safetensors(table: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(start: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


HOSTILE = {
    "claims 2^63": lambda: safetensors({}, size=2**63),
    "claims 2^64 - 1": lambda: safetensors({}, size=2**64 - 1),
    "claims more than there is": lambda: safetensors({}, size=3),
    "100,000 tensors": lambda: safetensors({f"t{i}": entry(4 * i, 4 * i + 4) for i in range(100_000)}, bytes(400_000)),
    "overlap": lambda: safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "the same bytes twice": lambda: safetensors({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "a hole": lambda: safetensors({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "a hole before": lambda: safetensors({"a": entry(4, 8)}, bytes(8)),
    "bytes behind": lambda: safetensors({"a": entry(0, 8)}, bytes(9)),
    "too few bytes": lambda: safetensors({"a": entry(0, 8)}, bytes(7)),
    "a name twice": lambda: safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 8)).encode(),) * 2), bytes(8)),
    "a key twice": lambda: safetensors(b'{"a":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "negative offset": lambda: safetensors({"a": entry(-4, 4)}, bytes(4)),
    "negative shape": lambda: safetensors({"a": entry(0, 8, [-1, -2])}, bytes(8)),
    "negative size": lambda: safetensors({"a": entry(0, 8), "b": entry(8, 4, [0], "U8")}, bytes(8)),
    "huge shape": lambda: safetensors({"a": entry(0, 0, [2**62] * 60)}),
    "many axes": lambda: safetensors({"a": entry(0, 4, [1] * 100_000)}, bytes(4)),
    "shape beyond 64 bits": lambda: safetensors({"a": entry(0, 4, [2**70])}, bytes(4)),
    "shape of another size": lambda: safetensors({"a": entry(0, 8, [3])}, bytes(8)),
    "fractions": lambda: safetensors({"a": entry(0, 4, [1.0])}, bytes(4)),
    "truth for a number": lambda: safetensors({"a": entry(0, 4, [True])}, bytes(4)),
    "no table": lambda: safetensors([1]),
    "no entry": lambda: safetensors({"a": None}),
    "metadata that are none": lambda: safetensors({"__metadata__": [1]}),
    "deep": lambda: safetensors(b'{"a":' + b"[" * (MAX_HEADER - 100)),
    "wide": lambda: safetensors(b'{"a":[' + b"{}," * (MAX_HEADER // 3 - 10) + b"{}]}"),
    "many tables": lambda: safetensors(
        b'{"a":{' + b",".join(b'"%d":{"a":[]}' % i for i in range(MAX_COMMAS - 10)) + b"}}"
    ),
    "too large": lambda: safetensors(b'{"a":"' + b"a" * MAX_HEADER + b'"}'),
    "no text": lambda: safetensors(b'{"\xff":1}'),
    "empty": lambda: b"",
    "seven bytes": lambda: bytes(7),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused_quickly_and_in_little_memory(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind]())
    gc.collect()
    gc.freeze()  # what else the tests hold is not to be gone through while the clock runs
    for read in (header, lambda path: weights.tensors([path])):
        start = time.process_time()
        with pytest.raises(ModelError, match=re.escape(f"{path}: ")) as caught:
            read(path)
        assert time.process_time() - start < 1 and caught.value.code == 4 and "\n" not in str(caught.value)
    gc.unfreeze()
    tracemalloc.start()
    with pytest.raises(ModelError):
        header(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100e6


def test_the_largest_header_that_is_read_takes_little_memory(tmp_path):
    count = 28_000
    table = {f"t{i}": entry(4 * i, 4 * i + 4) for i in range(count)}
    (tmp_path / "x.safetensors").write_bytes(safetensors(table, bytes(4 * count)))
    tracemalloc.start()
    assert len(header(tmp_path / "x.safetensors").tensors) == count
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100e6


# ---------------------------------------------------------------------------------------------------------------- runs


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the last weights, average and moments of both stages and of the model, and the log without its times."""
    last = {name: max(run_dir.glob(f"checkpoints/{name}-*")) for name in ("autoencoder", "denoiser")}
    paths = [*run_dir.glob("model/*/*.safetensors"), *(p for c in last.values() for p in c.glob("*.safetensors"))]
    found = {str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(found) == 3 + 2 * 4
    return found | {"log": json.dumps([{k: v for k, v in row.items() if k not in TIMED} for row in rows])}


@pytest.fixture(scope="module")
def reference(forker, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    assert forker.run(run_dir) == 0
    return run_dir


def said(run_dir: Path) -> str:
    return Path(f"{run_dir}.log").read_text()


def finishes_alike(forker: Forker, run_dir: Path, reference: Path) -> None:
    """The same command again, to the same bits, with nothing half-made left."""
    assert forker.run(run_dir) == 0, said(run_dir)
    assert digests(run_dir) == digests(reference)
    assert [p for p in run_dir.rglob(".*") if p.name != ".lock"] == []


def computed(run_dir: Path) -> float:
    """Seconds of the processor that the last run took, as it says itself."""
    return float(said(run_dir).split()[-1])


@pytest.mark.parametrize("kills", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(forker, run_config, tmp_path, kills):
    """Again and again over one run, each time after some more of its own processor time, often while it saves."""
    often = {"steps": 3 * kills // 2, "save_every": 2, "sample_every": kills}
    stages = {name: replace(getattr(run_config.train, name), **often) for name in ("autoencoder", "denoiser")}
    path, run_dir, wanted = tmp_path / "config.toml", tmp_path / "run", tmp_path / "wanted"
    path.write_text(config.to_toml(replace(run_config, train=replace(run_config.train, **stages))))
    start = partial(forker.call, "forker:train", str(path))
    seconds = []
    for _ in range(2):  # the second time there is nothing to do
        start(str(wanted), log=Path(f"{wanted}.log"))
        assert forker.wait() == 0
        seconds.append(computed(wanted))
    work, rng, saving = seconds[0] - seconds[1], np.random.default_rng(20), 0
    for _ in range(kills):
        pid = start(str(run_dir), log=Path(f"{run_dir}.log"))
        moment = seconds[1] + rng.uniform(0, 2) * work / kills
        while (used := processor_time(pid)) is not None and used < moment:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))  # the clock's own step
        os.kill(pid, signal.SIGKILL)
        assert forker.wait() == -signal.SIGKILL, said(run_dir)
        saving += any(".tmp-" in str(p) or ".tinydiff-old" in str(p) for p in run_dir.rglob(".*"))
    print(f"{saving} of {kills} kills landed inside a save")
    start(str(run_dir), log=Path(f"{run_dir}.log"))
    assert forker.wait() == 0, said(run_dir)
    assert digests(run_dir) == digests(wanted) and saving >= kills // 5
    assert [p for p in run_dir.rglob(".*") if p.name != ".lock"] == []


def slow_saves(config_path: str, run_dir: str, seconds: float) -> int:
    """A run each of whose saves takes a while before its first file."""
    real = state.write

    def write(*args):
        time.sleep(float(seconds))
        return real(*args)

    state.write = write
    return train(config_path, run_dir)


def saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".tmp-*"))


def begin_slow(forker: Forker, run_dir: Path, seconds: float) -> int:
    """A run whose first save is being written."""
    arguments = str(forker.config_path), str(run_dir), seconds
    pid = forker.call("test_faults:slow_saves", *arguments, log=Path(f"{run_dir}.log"))
    wait_until(lambda: saving(run_dir))
    return pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_during_a_save_lets_it_be_finished(forker, reference, tmp_path, number):
    run_dir = tmp_path / "run"
    os.kill(begin_slow(forker, run_dir, 0.3), number)
    assert forker.wait() == 128 + number, said(run_dir)
    assert "stopped and saved at step" in said(run_dir) and not saving(run_dir)
    step = int(re.findall(r"saved at step (\d+)", said(run_dir))[-1])
    assert state.newest(run_dir / "checkpoints", "autoencoder", pytest.fail).name == f"autoencoder-{step:08d}"
    finishes_alike(forker, run_dir, reference)
    assert f"going on from step {step}" in said(run_dir)


def test_a_second_interrupt_ends_at_once(forker, reference, tmp_path):
    """The checkpoint that was being written is invisible."""
    run_dir = tmp_path / "run"
    pid = begin_slow(forker, run_dir, 60)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    start = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert forker.wait() == 130 and time.monotonic() - start < 5
    assert [p.name[:5] for p in (run_dir / "checkpoints").iterdir()] == [".tmp-"]
    finishes_alike(forker, run_dir, reference)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_only_an_interrupt_leaves_a_save_unfinished(error):
    go_on, written = threading.Event(), []
    with pytest.raises(error), closing(Saver()) as saver:
        saver.begin(toy(1), lambda _: (go_on.wait(0.5), written.append(1)))
        raise error
    assert bool(written) == (error is RuntimeError)
    go_on.set()


@pytest.mark.parametrize("seconds", [1.2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_process_that_was_stopped_goes_on(forker, run_config, reference, tmp_path, seconds):
    """For longer than its time-out allows a batch to take."""
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(replace(run_config, train=replace(run_config.train, timeout=1))))
    pid = forker.call("forker:train", str(path), str(tmp_path / "run"), log=tmp_path / "run.log")
    wait_until((tmp_path / "run" / "checkpoints").exists)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)
    assert forker.wait() == 0, said(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(reference)


def batches_by_work() -> int:
    """Batches that take half a second of the processor, where one second is too much."""

    def make(n: int) -> int:
        end = time.thread_time() + 0.5
        while time.thread_time() < end:
            pass
        return n

    try:
        return 0 if [n for n, _ in Ahead(make, range(3), 1.0)] == [0, 1, 2] else 1
    except HungError:
        return 7


def test_the_time_that_a_process_is_stopped_is_none_that_reading_takes(forker, tmp_path):
    pid = forker.call("test_faults:batches_by_work", log=tmp_path / "log")
    time.sleep(0.2)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.2)
    os.kill(pid, signal.SIGCONT)
    assert forker.wait() == 0


def dies_saving(config_path: str, run_dir: str) -> int:
    """A run that is killed when the files of its first save are written and the folder is not yet in its place."""
    state.save = partial(killed_behind, state.save)
    return train(config_path, run_dir)


def killed_behind(save: Callable, path: Path, *arguments) -> None:
    save(path, *arguments[:-1], lambda _: os.kill(os.getpid(), signal.SIGKILL))


def test_killed_during_the_first_save(forker, run_config, reference, tmp_path):
    """The log has lines of steps that no checkpoint has: the next start says so and begins again."""
    path, run_dir = tmp_path / "config.toml", tmp_path / "run"
    stages = {name: replace(getattr(run_config.train, name), save_every=11) for name in ("autoencoder", "denoiser")}
    path.write_text(config.to_toml(replace(run_config, train=replace(run_config.train, **stages))))
    forker.call("test_faults:dies_saving", str(path), str(run_dir), log=tmp_path / "run.log")
    assert forker.wait() == -signal.SIGKILL and "autoencoder" in (run_dir / "metrics.jsonl").read_text()
    assert [p.name[:5] for p in (run_dir / "checkpoints").iterdir()] == [".tmp-"]
    finishes_alike(forker, run_dir, reference)
    assert "autoencoder: no checkpoint yet, beginning at step 0 again" in said(run_dir)


def everything(run_dir: Path) -> dict[str, tuple[int, int]]:
    """When each file and folder was written last, and its inode; not of the lock, in which the holder's number stands."""
    paths = [run_dir, *(p for p in run_dir.rglob("*") if p.name != ".lock")]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in paths}


def test_a_finished_run_writes_nothing(forker, reference):
    before = everything(reference)
    assert len(before) > 30 and forker.run(reference) == 0
    assert everything(reference) == before


# ------------------------------------------------------------------------------------------------------ disks and limits


def test_a_disk_that_fills_ends_the_command_which_then_goes_on(forker, config_path, reference, tmp_path):
    """The files of the autoencoder are small enough and those of the denoiser are not."""
    run_dir = tmp_path / "run"
    sizes = [max(p.stat().st_size for p in reference.glob(f"checkpoints/{s}-*/*")) for s in ("autoencoder", "denoiser")]
    assert sizes[0] < sizes[1]
    command = [sys.executable, "-m", "tinydiff", "train", str(config_path), "--run-dir", str(run_dir)]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (sizes[1] - 1, sizes[1] - 1))
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), preexec_fn=limit, timeout=200)
    *_, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (7, "") and "Traceback" not in done.stderr, done.stderr
    assert re.fullmatch(
        r"tinydiff: .*/checkpoints/denoiser-0+3/.*\.safetensors: File too large; raise the file size limit", last
    )
    assert not list(run_dir.rglob(".tmp*"))
    finishes_alike(forker, run_dir, reference)


def no_step(*_) -> None:
    raise AssertionError("a step was made")


@pytest.fixture
def steps_fail(monkeypatch):
    monkeypatch.setattr(loop, "step", no_step)


@pytest.mark.parametrize("where", ["file/run", "file", "/proc/run", "/sys/run"])
@pytest.mark.usefixtures("steps_fail")
def test_a_run_directory_that_cannot_be_written_is_refused_at_once(run_config, tmp_path, where):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="/proc|/sys|/file") as caught:
        loop.run(run_config, tmp_path / where)
    assert caught.value.code == 7 and "\n" not in str(caught.value) and "; " in str(caught.value)


def run_on_a_full_disk(config_path: str, run_dir: str, size: str) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    loop.step = no_step
    return train(config_path, run_dir)


@pytest.mark.usefixtures("steps_fail")
def test_a_run_directory_on_a_disk_that_is_only_read(run_config, reference):
    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    told = pytest.raises(ResourceError, match=r"run/\.lock: Read-only file system; choose a writable place")
    with patch.object(os, "open", read_only), told:
        loop.run(run_config, reference)


def test_a_network_drive_that_syncs_no_folders_will_do(tmp_path):
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with patch.object(os, "fsync", fsync):
        folders = True
        save(tmp_path, 1)
        folders = False
        with pytest.raises(ResourceError, match=r"\.(json|safetensors): Invalid argument; check the disk"):
            save(tmp_path, 2)
    check(tmp_path, None, 1, done=True)


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_disk_that_is_full_is_told_before_the_first_step(forker, tmp_path, size):
    run_dir = tmp_path / "run"
    forker.call("test_faults:run_on_a_full_disk", str(forker.config_path), str(run_dir), str(size), log="/dev/null")
    assert forker.wait() == 7
    assert not list(tmp_path.rglob(".tmp*"))


def test_too_little_room_for_a_checkpoint_is_told_by_its_size(tmp_path):
    usage = shutil.disk_usage(tmp_path)
    state.make_room(tmp_path / "checkpoints", toy(1))
    assert (tmp_path / "checkpoints").is_dir()
    size = 5 * 4 * (36 + 6 + 6 + 1)  # five floats of every weight
    with patch.object(shutil, "disk_usage", lambda _: usage._replace(free=size)):
        state.make_room(tmp_path / "checkpoints", toy(1))
    told = pytest.raises(ResourceError, match=r"checkpoints: 9.79e-07 GB free, and a save takes 9.8e-07; free some")
    with patch.object(shutil, "disk_usage", lambda _: usage._replace(free=size - 1)), told:
        state.make_room(tmp_path / "checkpoints", toy(1))


def test_a_run_directory_that_is_deleted_meanwhile_ends_the_run(run_config, tmp_path):
    real = loop.step

    def step(*arguments):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return real(*arguments)

    with (
        patch.object(loop, "step", step),
        pytest.raises(ResourceError, match="run: removed while training; put it back"),
    ):
        loop.run(run_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------- soak


def resources(pid: int) -> list[int] | None:
    """Resident pages, open descriptors and threads of a process, or None when it has ended."""
    proc = Path(f"/proc/{pid}")
    try:
        pages = int((proc / "statm").read_text().split()[1])
        return [pages, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))] if pages else None
    except OSError:
        return None


@pytest.mark.parametrize("steps", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_long_run_takes_no_more_and_more(forker, run_config, tmp_path, steps):
    """Memory, descriptors and threads, with saves and pictures on the way: from its second quarter on they stay."""
    stage = replace(run_config.train.autoencoder, steps=steps, batch_size=1, save_every=25, sample_every=100)
    cfg = replace(run_config, train=replace(run_config.train, autoencoder=stage, keep=2))
    (tmp_path / "config.toml").write_text(config.to_toml(cfg))
    run_dir, found = tmp_path / "run", []
    pid = forker.call("test_faults:soak", str(tmp_path / "config.toml"), str(run_dir), log=tmp_path / "run.log")
    while now := resources(pid):
        found.append(now)
        time.sleep(0.01)
    assert forker.wait() == 0, said(run_dir)
    assert len(found) > 100
    _, early, middle, late = (np.array(part).max(0) for part in np.array_split(found, 4))
    print(f"pages, descriptors and threads in each quarter but the first: {early} {middle} {late}")
    assert (late - early <= [4 * 2**20 // resource.getpagesize(), 1, 1]).all()


def soak(config_path: str, run_dir: str) -> int:
    loop.run(config.load(Path(config_path)), Path(run_dir), "autoencoder")
    return 0
