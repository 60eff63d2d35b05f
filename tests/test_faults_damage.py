"""Checkpoints that are damaged, exchanged or dated wrongly: found, named, and the one before used."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from faults import restored, save, toy

from tinydiff import files
from tinydiff.checkpoints import weights
from tinydiff.errors import ModelError
from tinydiff.training import state
from tinydiff.training.metrics import Metrics

pytestmark = pytest.mark.usefixtures("unsynced")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


YEAR = 365 * 24 * 3600


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


def test_moments_are_those_of_the_parameters_and_updates(two, tmp_path):
    """A sealed checkpoint whose moments lack a parameter, have another's or another shape, or are of no update."""
    wrong = {
        "lacks": lambda kinds: kinds["exp_avg"].popitem(),
        "other": lambda kinds: [k.update({"toy.9.weight": torch.ones(2)}) for k in kinds.values()],
        "shape": lambda kinds: [k.update({"toy.1.bias": torch.ones(2)}) for k in kinds.values()],
        "none": lambda kinds: [k.clear() for k in kinds.values()],
    }
    for name, edit in wrong.items():
        checkpoint = tmp_path / name / "toy-00000002"
        stored = two / "checkpoints" / "toy-00000002"
        kinds = {kind: weights.tensors([stored / f"{kind}.safetensors"]) for kind in state.MOMENTS}
        edit(kinds)
        with files.committed(checkpoint) as made:
            shutil.copytree(stored, made, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
            for kind, tensors in kinds.items():
                state.save_file({k: v.clone() for k, v in tensors.items()}, made / f"{kind}.safetensors")
        state.check(checkpoint, "toy")
        with pytest.raises(ModelError, match="--fresh"):
            state.load(checkpoint, toy(0, 48))


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
