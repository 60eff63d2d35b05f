"""A toy of two linear layers that stands for a network, its saves, and what must be left of them whatever happens.

So small that each call of a save can be killed or refused in turn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import nn

from tinydiff import files, temporary, verified
from tinydiff.checkpoints import folder, weights
from tinydiff.stages import Stage
from tinydiff.training import state
from tinydiff.training.parallel import World

CHANGES = ("fsync", "rename", "exchange", "link", "unlink", "rmdir", "mkdir", "chmod")


def owner(name: str) -> ModuleType:
    """The module that a call is made through."""
    return temporary if name == "exchange" else os


WRITERS = ((state, "save_file"), (folder, "save_file"), (Path, "write_text"), (Path, "write_bytes"))


def toy(step: int, width: int = 6) -> state.Training:
    """What training is after `step` steps: a function of the step, each kind of tensors its own."""
    torch.manual_seed(step)
    module = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 1))
    module.register_buffer("seen", torch.randn(3))
    learner = state.Learner.of("toy", module, Stage(), World(torch.device("cpu"), 1))
    for mine in learner.average.tensors:
        mine.normal_()
    for p in module.parameters() if step else ():
        moments = {kind: torch.randn_like(p, requires_grad=False) for kind in state.MOMENTS}
        learner.optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    return state.Training([learner])


def about(step: int) -> dict:
    return {"stage": "toy", "step": step, "skipped": 0, "updates": {"toy": step}, "scaler": {}, "processes": 1}


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
    training = toy(0, width)
    step = state.load(path, training)["step"]
    wanted = toy(step, width)
    for kind in state.KINDS:
        ours, theirs = training.tensors(kind), wanted.tensors(kind)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert training.learners[0].updates == step
    return step


def published(run_dir: Path) -> int | None:
    """The step whose averaged weights the model folder has."""
    model = files.present(run_dir / "model")
    if not model.exists():
        return None
    verified.verify(model)
    step = files.read_json(model / "about.json")["step"]
    found, wanted = weights.tensors([model / "net" / "w.safetensors"]), toy(step).tensors("average")
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
                real = getattr(owner(name), name)
                stack.enter_context(patch.object(owner(name), name, partial(self.call, real, name)))
            for writer, name in WRITERS:
                real = getattr(writer, name)
                stack.enter_context(patch.object(writer, name, lambda *a, real=real, **k: self.writer(real, *a, **k)))
            yield
