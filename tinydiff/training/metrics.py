"""What training measures, for programs to read: `metrics.jsonl`, and TensorBoard's files where they are asked for.

A line of `metrics.jsonl` is a JSON object with "stage" and "step". There are four kinds: measurements of every tenth
update, those taken with pictures, updates that were left out, and the first ones of a network that has grown. It knows no
model and not how a report shows them.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from tinydiff import files, images
from tinydiff.errors import UsageError
from tinydiff.metrics import parse

EVERY = 10  # updates from one line to the next
DECAY = 0.98  # of `recent`
TIMED = {"steps_per_second", "images_per_second", "memory"}  # what differs between two runs that are otherwise the same


class Metrics:
    """The log of one stage. In it no step stands twice, however often a run is killed and resumed.

    Opened, it drops the lines of its stage past step `start`, which are to come again. Every line is one write, so that
    a kill leaves at most half a line at the end. Raises UsageError where TensorBoard is asked for and missing,
    ResourceError where the disk does not take a line.
    """

    def __init__(self, run_dir: Path, stage: str, start: int, images_per_step: int, tensorboard: bool = False):
        self.path, self.stage, self.images_per_step = run_dir / "metrics.jsonl", stage, images_per_step
        self.board = board(run_dir / "tensorboard" / stage, start) if tensorboard else None
        cut(self.path, stage, start)
        self.recent, self.weight = (
            math.nan,
            0.0,
        )  # the mean loss, each update's counting DECAY of the next one's; their sum
        self.since: tuple[int, float] | None = None  # steps and clock from which the next rate counts

    def add(self, n: int, values: dict[str, float]) -> None:
        """What update `n`, counted from one, gave: "loss" and others. Numbers that are not finite are left out."""
        loss = values["loss"]
        if math.isfinite(loss):
            self.weight = 1 + DECAY * self.weight
            self.recent = loss if self.weight == 1 else self.recent + (loss - self.recent) / self.weight
        self.since = self.since or (n, time.monotonic())  # from the end of the first step, which compiles and warms up
        if n % EVERY == 0:
            self.write(n, {**values, **self.rates(n), "memory": memory()})

    def skipped(self, n: int, reason: str, samples: list[str]) -> None:
        """Update `n` was left out, and what was in its batch."""
        self.append({"stage": self.stage, "step": n, "skipped": reason, "samples": samples})

    def grown(self, n: int, what: str) -> None:
        """The network is larger from update `n` on, and what of it."""
        self.append({"stage": self.stage, "step": n, "grown": what})

    def look(self, n: int, values: dict[str, float], path: Path) -> None:
        """What was measured at pictures after `n` updates, perhaps nothing, and the PNG file of their grid."""
        self.write(n, values)
        if self.board:
            self.board.add_image(f"{self.stage}/pictures", images.open_image(path), n, dataformats="HWC")
            self.board.flush()

    def close(self) -> None:
        if self.board:
            self.board.close()

    def rates(self, n: int) -> dict[str, float]:
        """Steps and images a second since the last line; none where a first step has only just ended."""
        assert self.since
        (before, then), now = self.since, time.monotonic()
        self.since = n, now
        rate = (n - before) / max(1e-9, now - then)
        return {"steps_per_second": rate, "images_per_second": rate * self.images_per_step} if n > before else {}

    def write(self, n: int, values: dict[str, float]) -> None:
        """A line, and the same as TensorBoard's scalars, flushed, so that a kill loses no more of them than of lines."""
        values = {name: float(f"{value:.7g}") for name, value in values.items() if math.isfinite(value)}
        self.append({"stage": self.stage, "step": n, **values})
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(f"{self.stage}/{name}", value, n)
            self.board.flush()

    def append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with files.named(self.path), self.path.open("ab", buffering=0) as file:
            while line:  # once, unless the disk is full, when the second write says so
                line = line[file.write(line) :]


def cut(path: Path, stage: str, start: int) -> None:
    """Rewrite the file, or make it, without the lines of `stage` past step `start` and without what is no line."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    kept = [line for line in lines if (row := parse(line)) and (row["stage"] != stage or row["step"] <= start)]
    files.write_file(path, b"".join(line + b"\n" for line in kept), force=True)


def writer() -> Any:
    """TensorBoard's class that writes. Raises UsageError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError('train.tensorboard: pip install "tinydiff[tensorboard]"') from error
    return SummaryWriter


def board(folder: Path, start: int) -> Any:
    """TensorBoard's writer; readers forget what earlier files of the folder say of steps past `start`."""
    return writer()(str(folder), purge_step=start + 1)


def memory() -> float:
    """GB, of 10^9 bytes: the most that tensors took on the GPU or, where none is in use, what this process has in RAM."""
    import torch

    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # only Linux has it; elsewhere the most that there was
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round(resident / 1e9, 3)
