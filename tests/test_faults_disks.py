"""Disks that fill, cannot be written or vanish, and limits of the system: told in one line, before the first step if possible."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from functools import partial
from unittest.mock import patch

import pytest
from faults import check, save, toy
from forker import train
from interpreters import ENV
from runs import finishes_alike

from tinydiff.errors import ResourceError
from tinydiff.training import loop, state

pytestmark = pytest.mark.usefixtures("unsynced")


def test_a_disk_that_fills_ends_the_command_which_then_goes_on(forker, config_path, undisturbed, tmp_path):
    """The files of the autoencoder are small enough and those of the denoiser are not."""
    run_dir = tmp_path / "run"
    sizes = [
        max(p.stat().st_size for p in undisturbed.glob(f"checkpoints/{s}-*/*")) for s in ("autoencoder", "denoiser")
    ]
    assert sizes[0] < sizes[1]
    command = [sys.executable, "-m", "tinydiff", "train", str(config_path), "--run-dir", str(run_dir)]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (sizes[1] - 1, sizes[1] - 1))
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, preexec_fn=limit, timeout=200)
    *_, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (7, "") and "Traceback" not in done.stderr, done.stderr
    assert re.fullmatch(
        r"tinydiff: .*/checkpoints/denoiser-0+3/.*\.safetensors: File too large; raise the file size limit", last
    )
    assert not list(run_dir.rglob(".tmp*"))
    finishes_alike(forker, run_dir, undisturbed)


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
def test_a_run_directory_on_a_disk_that_is_only_read(run_config, undisturbed):
    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    told = pytest.raises(ResourceError, match=r"run/\.lock: Read-only file system; choose a writable place")
    with patch.object(os, "open", read_only), told:
        loop.run(run_config, undisturbed)


def test_a_network_drive_that_syncs_no_folders_will_do(tmp_path):
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with patch.object(os, "fsync", fsync):
        folders = True
        save(tmp_path, 1)
        folders = False
        with pytest.raises(
            ResourceError, match=r"\.(json|safetensors): Invalid argument; choose a folder of another file system"
        ):
            save(tmp_path, 2)
    check(tmp_path, None, 1, done=True)


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_disk_that_is_full_is_told_before_the_first_step(forker, tmp_path, size):
    run_dir = tmp_path / "run"
    forker.call(f"{__name__}:run_on_a_full_disk", str(forker.config_path), str(run_dir), str(size), log="/dev/null")
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
