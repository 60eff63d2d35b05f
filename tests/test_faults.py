"""Saves and runs under every fault: killed, refused, out of power, damaged, stopped. What is kept is whole or absent.

A toy of two linear layers stands for a network, so that each call of a save can be killed or refused in turn.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from forker import Forker, environment, train, wait_until
from safetensors import SafetensorError
from torch import nn

from tinydiff import config, files
from tinydiff.checkpoints import folder, weights
from tinydiff.checkpoints.header import MAX_HEADER, header
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
def run_config(tiny_config) -> config.Config:
    """Two stages of twelve steps that save at every third."""
    denoiser = replace(tiny_config.denoiser, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",))
    stages = {name: replace(getattr(tiny_config.train, name), sample_every=100) for name in ("autoencoder", "denoiser")}
    return replace(tiny_config, denoiser=denoiser, train=replace(tiny_config.train, **stages))


@pytest.fixture(scope="module")
def config_path(run_config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(config.to_toml(run_config))
    return path


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
                steps = [(name, i) for name, i in come.items()] + [(name, None) for name in gone if name not in come]
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
