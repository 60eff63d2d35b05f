"""The log of a run: lines against what was logged, kills at every byte, TensorBoard's files by its own reader."""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydiff import images
from tinydiff.errors import ResourceError, UsageError
from tinydiff.metrics import parse
from tinydiff.training import metrics
from tinydiff.training.metrics import EVERY, TIMED, Metrics

STAGES = ("autoencoder", "denoiser")


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Every line, by a parser that takes no NaN; without what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in found]


def values(n: int) -> dict[str, float]:
    return {"loss": 1 / n, "lr": 1e-3, "grad_norm": math.nan if n % 30 == 0 else 0.5, f"loss_{n // 10 % 4}": 1 / 3 / n}


def train(log: Metrics, first: int, last: int, picture: Path) -> None:
    """Updates `first` to `last`: every 13th is left out, pictures every 8."""
    for n in range(first, last + 1):
        if n % 13 == 0:
            log.skipped(n, "loss nan", [f"{n}.png"])
        else:
            log.add(n, values(n))
        if n % 8 == 0:
            log.look(n, {"psnr": float(n)}, picture)


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "grid.png"
    path.write_bytes(images.encode_png(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3), None))
    return path


# ---- lines ---------------------------------------------------------------------------------------------------------


def test_a_line_holds_what_was_measured(tmp_path: Path) -> None:
    log = Metrics(tmp_path, "denoiser", 0, images_per_step=16)
    for n in range(1, 2 * EVERY + 1):
        log.add(n, {"loss": 1 / 3, "lr": 1.23456789e-12, "loss_3": 0.5, "kl": float(n)})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [
        ["stage", "step", "loss", "lr", "loss_3", "kl", "steps_per_second", "images_per_second", "memory"]
    ] * 2
    assert [line["step"] for line in lines] == [EVERY, 2 * EVERY] == [line["kl"] for line in lines]
    assert lines[0]["stage"] == "denoiser" and lines[0]["loss"] == 0.3333333 and lines[0]["lr"] == 1.234568e-12
    assert list(lines[0])[-3:] == [k for k in lines[0] if k in TIMED] and set(lines[0]) > TIMED


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path, picture: Path, bad: float) -> None:
    log = Metrics(tmp_path, "denoiser", 0, 1)
    for n in range(1, EVERY + 1):
        log.add(n, {"loss": 2.0 if n == 1 else bad, "grad_norm": bad, "lr": 1.0})
    log.look(EVERY, {"psnr": bad}, picture)
    assert rows(tmp_path) == [{"stage": "denoiser", "step": EVERY, "lr": 1.0}, {"stage": "denoiser", "step": EVERY}]
    assert log.recent == 2


def test_the_recent_loss_is_an_exponential_mean(tmp_path: Path) -> None:
    log, losses = Metrics(tmp_path, "denoiser", 0, 1), [3.0, 1.0, 4.0, 1.0, 5.0]
    assert math.isnan(log.recent)
    for n, loss in enumerate(losses, 1):
        log.add(n, {"loss": loss})
    weights = [0.98 ** (4 - i) for i in range(5)]  # the first, which is large, counts for no more than its turn
    assert log.recent == pytest.approx(np.average(losses, weights=weights))


def test_updates_that_are_left_out_are_written_at_once(tmp_path: Path) -> None:
    log = Metrics(tmp_path, "denoiser", 0, 1)
    log.skipped(3, "loss nan", ["a/é.png", "\udcff\n.png"])
    wanted = {"stage": "denoiser", "step": 3, "skipped": "loss nan", "samples": ["a/é.png", "\udcff\n.png"]}
    assert rows(tmp_path) == [wanted]


@pytest.mark.parametrize(("start", "counted"), [(0, 9), (15, 4), (18, 1)])
def test_rates_count_the_steps_since_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, counted: int
) -> None:
    """A first step that takes 100 s to compile, then 2 s for each step, and 3 s for pictures at step 25."""
    clock = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(time, "time", lambda: pytest.fail("a clock that can be set"))
    log = Metrics(tmp_path, "denoiser", start, images_per_step=8)
    for n in range(start + 1, 31):
        clock += 100 if n == start + 1 else 5 if n == 26 else 2
        log.add(n, {"loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    assert counted == first["step"] - start - 1 and first["steps_per_second"] == pytest.approx(0.5)
    assert first["images_per_second"] == pytest.approx(4) and last["steps_per_second"] == pytest.approx(10 / 23)


def test_a_first_step_alone_has_no_rate(tmp_path: Path) -> None:
    log = Metrics(tmp_path, "denoiser", EVERY - 1, 1)
    log.add(EVERY, {"loss": 1.0})
    assert "steps_per_second" not in (tmp_path / "metrics.jsonl").read_text()


def test_memory_is_what_this_process_has() -> None:
    before = metrics.memory()
    with mmap.mmap(-1, 200_000_000) as block:  # pages of its own, whatever an allocator has kept
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1
        assert 0.01 < before < 50 and metrics.memory() - before == pytest.approx(0.2, abs=0.05)


def test_memory_on_a_gpu_is_the_most_that_tensors_took(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12_345_678_901)
    assert metrics.memory() == 12.346


@pytest.mark.parametrize(("platform", "unit"), [("freebsd14", 1024), ("darwin", 1)])
def test_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch, platform: str, unit: int) -> None:
    """getrusage(2): kilobytes, on macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(metrics, "Path", lambda _: Path("/nowhere"))
    monkeypatch.setattr(sys, "platform", platform)
    assert peak * unit / 1e9 - 0.001 <= metrics.memory() <= peak * unit / 1e9 * 1.1 + 0.001


# ---- kills ---------------------------------------------------------------------------------------------------------


def test_every_line_is_one_write(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, written = Metrics(tmp_path, "denoiser", 0, 1), []
    path = tmp_path / "metrics.jsonl"
    append = Metrics.append

    def counted(self: Metrics, row: dict[str, Any]) -> None:
        before = path.stat().st_size
        append(self, row)
        written.append(path.read_bytes()[before:])

    monkeypatch.setattr(Metrics, "append", counted)
    train(log, 1, 30, picture)
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 and parse(line) for line in written)
    assert len(written) == 3 + 3 + 2  # measured, at pictures, left out


@pytest.mark.parametrize("start", [0, 7, 8, 10, 13, 20, 25, 30])
def test_killed_at_any_byte_the_log_ends_the_same(tmp_path: Path, picture: Path, start: int) -> None:
    """Whatever stands of the lines past the checkpoint, half of one included, a resumed run writes them once."""
    train(Metrics(tmp_path, "denoiser", 0, 1), 1, start, picture)
    path = tmp_path / "metrics.jsonl"
    safe = path.stat().st_size
    train(Metrics(tmp_path, "denoiser", start, 1), start + 1, 30, picture)
    whole, wanted = path.read_bytes(), rows(tmp_path)
    for length in range(safe, len(whole) + 1, 11):
        path.write_bytes(whole[:length])
        train(Metrics(tmp_path, "denoiser", start, 1), start + 1, 30, picture)
        assert rows(tmp_path) == wanted


SESSIONS = st.lists(
    st.tuples(st.sampled_from(STAGES), st.floats(0, 1), st.integers(0, 40), st.integers(0, 400)), max_size=8
)


@given(sessions=SESSIONS)
@settings(max_examples=30, deadline=None)
def test_steps_increase_however_a_run_is_killed(picture: Path, sessions: list[tuple[str, float, int, int]]) -> None:
    """Sessions in any order, from any checkpoint up to the step reached, each losing up to 400 bytes when killed."""
    reached = dict.fromkeys(STAGES, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        for stage, share, steps, lost in sessions:
            start = int(share * reached[stage])
            log = Metrics(Path(folder), stage, start, 1)
            assert all(row["step"] <= start for row in rows(path.parent) if row["stage"] == stage)
            safe = path.stat().st_size
            train(log, start + 1, start + steps, picture)
            reached[stage] = start + steps
            os.truncate(path, max(safe, path.stat().st_size - lost))
        for stage in STAGES:
            train(Metrics(Path(folder), stage, reached[stage], 1), reached[stage] + 1, reached[stage] + 30, picture)
        for stage in STAGES:
            for kind in ("loss", "psnr", "skipped"):
                steps_seen = [row["step"] for row in rows(path.parent) if row["stage"] == stage and kind in row]
                assert all(a < b for a, b in itertools.pairwise(steps_seen))


def test_lines_of_other_stages_and_of_earlier_steps_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = ['{"stage": "autoencoder", "step":   90, "odd": 1.10}', '{"stage":"denoiser","step":20}']
    gone = ['{"stage": "denoiser", "step": 21, "skipped": "loss nan", "samples": []}', "", "[1]", '{"stage": "denois']
    path.write_text("\n".join([gone[0], kept[0], gone[2], kept[1], gone[1], gone[3]]))
    Metrics(tmp_path, "denoiser", 20, 1)
    assert path.read_text() == "\n".join(kept) + "\n"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "1",
        "null",
        "[]",
        "{",
        '{"stage": "x"}',
        '{"stage": 1, "step": 1}',
        '{"stage": "x", "step": 1.5}',
        "[" * 10**5,
    ]
    + ['{"stage": "x", "step": true}', '{"stage": "x", "step": -1}', '{"stage": "x", "step": 1' + "0" * 30 + "}"]
    + [b"\xff", b'\xff\xfe{\x00"', b"\0" * 64, '{"stage": "x", "step": 1' + "0" * 5000 + "}"],
)
def test_what_is_no_line_is_none(line: str | bytes) -> None:
    assert parse(line) is None


def test_lines_of_old_runs_with_nan_are_read() -> None:
    row = parse('{"stage": "x", "step": 1, "loss": NaN}')
    assert row and row["step"] == 1


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    log = Metrics(tmp_path, "denoiser", 0, 1)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"metrics.jsonl: No space left on device; free some space"):
        log.skipped(1, "loss nan", [])


# ---- TensorBoard ---------------------------------------------------------------------------------------------------


def events(run_dir: Path, stage: str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard" / stage), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def session(run_dir: Path, stage: str, first: int, last: int, picture: Path) -> None:
    log = Metrics(run_dir, stage, first - 1, 4, tensorboard=True)
    train(log, first, last, picture)
    log.close()


def test_tensorboard_is_told_what_the_log_holds(tmp_path: Path, picture: Path) -> None:
    session(tmp_path, "denoiser", 1, 50, picture)
    found = events(tmp_path, "denoiser")
    wanted = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    tags = {name for row in wanted for name in row} - {"stage", "step", "skipped", "samples"}
    assert set(found.Tags()["scalars"]) == {f"denoiser/{name}" for name in tags}
    for name in tags:
        seen = [(event.step, event.value) for event in found.Scalars(f"denoiser/{name}")]
        assert seen == [(row["step"], pytest.approx(row[name])) for row in wanted if name in row]
    shown = found.Images("denoiser/pictures")
    assert [event.step for event in shown] == [8, 16, 24, 32, 40, 48] and found.Tags()["images"] == [
        "denoiser/pictures"
    ]
    assert (images.open_image(shown[0].encoded_image_string) == images.open_image(picture)).all()


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path: Path, picture: Path) -> None:
    """Killed at step 50, with half an event at the end of the file; resumed from 24, then from 39."""
    session(tmp_path, "denoiser", 1, 50, picture)
    [path] = (tmp_path / "tensorboard" / "denoiser").iterdir()
    os.truncate(path, path.stat().st_size - 5)
    session(tmp_path, "denoiser", 25, 40, picture)
    session(tmp_path, "denoiser", 40, 60, picture)
    session(tmp_path, "autoencoder", 1, 20, picture)
    found = events(tmp_path, "denoiser")
    assert [event.step for event in found.Scalars("denoiser/loss")] == [10, 20, 30, 40, 50, 60]
    assert [event.step for event in found.Images("denoiser/pictures")] == [8, 16, 24, 32, 40, 48, 56]
    assert [event.step for event in events(tmp_path, "autoencoder").Scalars("autoencoder/loss")] == [10, 20]


def test_a_kill_loses_no_event_of_a_line(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read while the writer, whose thread is slow here, still holds the file, as a kill would leave it."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: (time.sleep(0.01), write(self, data)))
    log = Metrics(tmp_path, "denoiser", 0, 4, tensorboard=True)
    train(log, 1, 20, picture)
    assert [event.step for event in events(tmp_path, "denoiser").Scalars("denoiser/memory")] == [10, 20]
    train(log, 21, 24, picture)
    assert [event.step for event in events(tmp_path, "denoiser").Images("denoiser/pictures")] == [8, 16, 24]
    log.close()


def test_without_tensorboard_nothing_is_written_and_asking_says_what_to_install(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    log = Metrics(tmp_path, "denoiser", 0, 1)
    train(log, 1, 10, picture)
    log.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r'^train.tensorboard: pip install "tinydiff\[tensorboard\]"$'):
        Metrics(tmp_path, "denoiser", 0, 1, tensorboard=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and not (tmp_path / "tensorboard").exists()
