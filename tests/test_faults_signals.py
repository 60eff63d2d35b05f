"""Runs that are interrupted while they save, or stopped for a while: the save is finished, and the run goes on."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from faults import toy
from forker import Forker, train, wait_until
from runs import digests, finishes_alike, said

from tinydiff.errors import HungError
from tinydiff.schema import to_toml
from tinydiff.training import state
from tinydiff.training.saver import Ahead, Saver


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
    pid = forker.call(f"{__name__}:slow_saves", *arguments, log=Path(f"{run_dir}.log"))
    wait_until(lambda: saving(run_dir))
    return pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_during_a_save_lets_it_be_finished(forker, undisturbed, tmp_path, number):
    run_dir = tmp_path / "run"
    os.kill(begin_slow(forker, run_dir, 0.3), number)
    assert forker.wait() == 128 + number, said(run_dir)
    assert "stopped and saved at step" in said(run_dir) and not saving(run_dir)
    step = int(re.findall(r"saved at step (\d+)", said(run_dir))[-1])
    assert state.newest(run_dir / "checkpoints", "autoencoder", pytest.fail).name == f"autoencoder-{step:08d}"
    finishes_alike(forker, run_dir, undisturbed)
    assert f"going on from step {step}" in said(run_dir)


def test_a_second_interrupt_ends_at_once(forker, undisturbed, tmp_path):
    """The checkpoint that was being written is invisible."""
    run_dir = tmp_path / "run"
    pid = begin_slow(forker, run_dir, 60)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    start = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert forker.wait() == 130 and time.monotonic() - start < 5
    assert [p.name[:5] for p in (run_dir / "checkpoints").iterdir()] == [".tmp-"]
    finishes_alike(forker, run_dir, undisturbed)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_only_an_interrupt_leaves_a_save_unfinished(error):
    go_on, written = threading.Event(), []
    with pytest.raises(error), closing(Saver()) as saver:
        saver.begin(toy(1), lambda _: (go_on.wait(0.5), written.append(1)))
        raise error
    assert bool(written) == (error is RuntimeError)
    go_on.set()


@pytest.mark.parametrize("seconds", [1.2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_process_that_was_stopped_goes_on(forker, run_config, undisturbed, tmp_path, seconds):
    """For longer than its time-out allows a batch to take."""
    path = tmp_path / "config.toml"
    path.write_text(to_toml(replace(run_config, train=replace(run_config.train, timeout=1))))
    pid = forker.call("forker:train", str(path), str(tmp_path / "run"), log=tmp_path / "run.log")
    wait_until((tmp_path / "run" / "checkpoints").exists)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)
    assert forker.wait() == 0, said(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(undisturbed)


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
    pid = forker.call(f"{__name__}:batches_by_work", log=tmp_path / "log")
    time.sleep(0.2)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.2)
    os.kill(pid, signal.SIGCONT)
    assert forker.wait() == 0
