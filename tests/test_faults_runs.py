"""Whole runs: killed at any moment they end in the same bits, finished ones stay as they are, long ones stay small."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forker import processor_time, train, wait_until
from runs import LEARNT, digests, finishes_alike, learnt, of, said, saved

from tinydiff import config
from tinydiff.schema import to_toml
from tinydiff.training import loop, state

# --------------------------------------------------------------------------------------------------------------- killed


def computed(run_dir: Path) -> float:
    """Seconds of the processor that the last run took, as it says itself."""
    return float(said(run_dir).split()[-1])


def unfinished(run_dir: Path) -> set[Path]:
    """Checkpoints that are being made or removed."""
    return {*run_dir.glob("checkpoints/.*")}


@pytest.mark.parametrize(
    ("row", "kills"),
    [("", 20), *(pytest.param(row, 20 if row else 50, marks=pytest.mark.slow) for row in ("", *LEARNT))],
)
def test_killed_at_random_moments(forker, config_path, tiny_model, other_images, tmp_path, row, kills):
    """Again and again, ever later: in turn after some more processor time, and in a save, as the file system shows it."""
    path, run_dir, wanted = (tmp_path / name for name in ("config.toml", "run", "wanted"))
    every = {"steps": 3 * kills // 2, "save_every": 2, "sample_every": 3 * kills // 4}
    plain = [*of("train.autoencoder", **every), *of("train.denoiser", **every)]
    settings = learnt(row, tiny_model, other_images, **every) if row else plain
    path.write_text(to_toml(config.load(config_path, settings)))
    seconds = []
    for _ in range(2):  # the second time there is nothing to do
        assert forker.run(wanted, config_path=path) == 0, said(wanted)
        seconds.append(computed(wanted))
    work, rng, saving = seconds[0] - seconds[1], np.random.default_rng(20), 0
    for number in range(kills):
        least, before = saved(wanted) * number // (kills + 4), unfinished(run_dir)
        pid = forker.start(run_dir, config_path=path)
        wait_until(lambda least=least: saved(run_dir) >= least)
        if number % 2:
            wait_until(lambda before=before: unfinished(run_dir) - before)
        else:
            moment = max(processor_time(pid) or 0, seconds[1]) + rng.uniform(0, 2) * work / kills
            wait_until(lambda pid=pid, moment=moment: (used := processor_time(pid)) is None or used >= moment)
        time.sleep(rng.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        assert forker.wait() == -signal.SIGKILL, said(run_dir)
        saving += bool(unfinished(run_dir) - before)
    print(f"{row}: {saving} of {kills} kills landed inside a save")
    assert forker.run(run_dir, config_path=path) == 0, said(run_dir)
    assert digests(run_dir) == digests(wanted) and saving >= kills // 5
    assert [p for p in run_dir.rglob(".*") if p.name != ".lock"] == []


def dies_saving(config_path: str, run_dir: str) -> int:
    """A run that is killed when the files of its first save are written and the folder is not yet in its place."""
    state.save = partial(killed_behind, state.save)
    return train(config_path, run_dir)


def killed_behind(save: Callable, path: Path, *arguments) -> None:
    save(path, *arguments[:-1], lambda _: os.kill(os.getpid(), signal.SIGKILL))


def test_killed_during_the_first_save(forker, run_config, undisturbed, tmp_path):
    """The log has lines of steps that no checkpoint has: the next start says so and begins again."""
    path, run_dir = tmp_path / "config.toml", tmp_path / "run"
    stages = {name: replace(getattr(run_config.train, name), save_every=11) for name in ("autoencoder", "denoiser")}
    path.write_text(to_toml(replace(run_config, train=replace(run_config.train, **stages))))
    forker.call(f"{__name__}:dies_saving", str(path), str(run_dir), log=tmp_path / "run.log")
    assert forker.wait() == -signal.SIGKILL and "autoencoder" in (run_dir / "metrics.jsonl").read_text()
    assert [p.name[:5] for p in (run_dir / "checkpoints").iterdir()] == [".tmp-"]
    finishes_alike(forker, run_dir, undisturbed)
    assert "autoencoder: no checkpoint yet, beginning at step 0 again" in said(run_dir)


# ------------------------------------------------------------------------------------------------------------- finished


def everything(run_dir: Path) -> dict[str, tuple[int, int]]:
    """When each file and folder was written last, and its inode; not of the lock, in which the holder's number stands."""
    paths = [run_dir, *(p for p in run_dir.rglob("*") if p.name != ".lock")]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in paths}


def test_a_finished_run_writes_nothing(forker, undisturbed):
    before = everything(undisturbed)
    assert len(before) > 30 and forker.run(undisturbed) == 0
    assert everything(undisturbed) == before


# ----------------------------------------------------------------------------------------------------------------- soak


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
    (tmp_path / "config.toml").write_text(to_toml(cfg))
    run_dir, found = tmp_path / "run", []
    pid = forker.call(f"{__name__}:soak", str(tmp_path / "config.toml"), str(run_dir), log=tmp_path / "run.log")
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
