"""What a stage measures at every look, on images that it does not learn from, and which look was the best so far.

It knows tasks and data, no loss: what is measured of a row is the task's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinydiff.charts import HELD
from tinydiff.data.dataset import Images, open_source
from tinydiff.data.held_out import FEWEST, MOST
from tinydiff.errors import DataError, ModelError
from tinydiff.images import to_pixels
from tinydiff.measure.distances import frechet
from tinydiff.overfitting import ERROR, overfitting
from tinydiff.pipeline import Request, generate
from tinydiff.report import read_metrics
from tinydiff.stages import STAGES
from tinydiff.system import shown
from tinydiff.training import state
from tinydiff.training.parallel import World

if TYPE_CHECKING:
    from tinydiff.backends.pytorch import TorchBackend
    from tinydiff.training.run import Run

STEPS = 8  # of the samples
FEW = 4  # images of which features are computed at once: on a CPU a third of the time that 32 take, each
ROWS, BATCHES = 1024, 16  # most rows that a loss is measured on, and most batches: about five updates' time
Rows = np.ndarray  # (B,) numbers of rows, all of one size of images
Best = dict[str, Any]  # "step", "loss", and "of", the digest of the images


@dataclass(frozen=True)
class Held:
    """The images that are measured on: `indices` (N,) of `images`, none of them a mirror image."""

    images: Images
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def digest(self) -> str:
        """Of what they are: losses on others do not compare."""
        contents = [self.images.source.digest(int(i)) for i in self.indices]
        return hashlib.sha256(" ".join(contents).encode()).hexdigest()[:32]

    def parts(self, rows: int, most: int) -> list[Rows]:
        """Row numbers 0 to `rows`, at most `most` at once and of one size; row r is of image r % N."""
        bucket = self.images.bucket[self.indices[np.arange(rows) % len(self)]]
        alike = [np.flatnonzero(bucket == b) for b in np.unique(bucket)]
        return [each[start : start + most] for each in alike for start in range(0, len(each), most)]


def held_out(run: Run) -> Held | None:
    """The images that the configuration keeps to measure on, or None. Raises DataError where all are trained on."""
    data, own = run.data.data, run.data
    if data.path == "shapes" and not data.validation:  # as many as there may be: others are drawn
        count = min(MOST, round(data.held_out * data.samples))
        other = replace(data, samples=count, flip=False)
        seed = (run.cfg.train.seed + 2**62) % 2**63
        drawn = open_source(other, seed, columns=run.cfg.columns) if count >= FEWEST else None
        return Held(Images(drawn, other), np.arange(count)) if drawn else None
    if not data.validation:
        return Held(own, np.flatnonzero(own.held_out)) if own.held_out.any() else None
    few = min(MOST, data.samples)  # of shapes, which are all encoded
    other = replace(data, path=data.validation, validation="", held_out=0.0, flip=False, samples=few)
    try:
        source = open_source(other, caption=run.caption, columns=run.cfg.columns)
    except DataError as error:
        raise DataError(f"data.validation: {error}") from error
    trained = {own.source.digest(i) for i in range(len(own.source))}
    apart = np.array([i for i in range(len(source)) if source.digest(i) not in trained], np.int64)
    if not len(apart):
        raise DataError(f"{shown(data.validation)}: training has all of its images, too; set data.validation to others")
    return Held(Images(source, other), apart[np.arange(min(MOST, len(apart))) * len(apart) // min(MOST, len(apart))])


def over(world: World, parts: Sequence[Rows], measure: Callable[[Rows], np.ndarray]) -> np.ndarray:
    """What `measure` gives of the rows of all parts (B, ...), in their order (N, ...) float64, on every process.

    Processes take parts in turn. All call `measure` equally often, since one of weights that they divide needs all of them.
    """
    size, rank = world.size // world.tensor, world.rank // world.tensor
    whole = None
    for number in range(rank, -(-len(parts) // size) * size, size):
        values = measure(parts[number % len(parts)])
        if whole is None:
            whole = np.zeros((sum(map(len, parts)), *values.shape[1:]))
        if number < len(parts):
            whole[parts[number]] = values
    assert whole is not None
    return world.sum(torch.from_numpy(whole)).numpy() / world.tensor


def error_of_mean(means: np.ndarray) -> float:
    """Standard error of the mean of images' values (N,), drawn at random."""
    return float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else 0.0


# ---- Fréchet distance ----------------------------------------------------------------------------------------------------


class Samples:
    """Images drawn under the captions of real ones, to be compared with these: the held-out ones, and others if they are few."""

    def __init__(self, run: Run, count: int, most: int):
        self.run, self.most, held = run, most, run.held
        assert held
        trained = np.flatnonzero(~run.data.held_out)
        more = min(len(trained), max(0, count - len(held)))
        self.real = [(held.images, int(i)) for i in held.indices[:count]]
        self.real += [(run.data, int(i)) for i in trained[np.arange(more) * len(trained) // max(1, more)]]
        self.captions = [images.source.captions(i)[0] for images, i in self.real]
        self.parts = [np.arange(start, min(start + most, len(self.real))) for start in range(0, len(self.real), most)]
        self.features = over(run.world, self.parts, self.of_real)

    def of_real(self, rows: Rows) -> np.ndarray:
        """NaN for an image that cannot be read."""
        found = [images.read([i]) for images, i in (self.real[row] for row in rows)]
        values = np.concatenate([self.vectors(pixels) for pixels, _ in found])
        values[[not readable.all() for _, readable in found]] = np.nan
        return values

    def vectors(self, pixels: np.ndarray) -> np.ndarray:
        """Features (B, D) of uint8 (B, H, W, 3)."""
        assert self.run.features
        x = torch.from_numpy(to_pixels(pixels)).to(self.run.runtime.device)
        with torch.inference_mode():
            return torch.cat([self.run.features(part)[0] for part in x.split(FEW)]).double().cpu().numpy()

    def frechet(self, backend: TorchBackend, request: Request, told: Callable[..., Any]) -> float:
        """Fréchet distance of images drawn now, always of the same noise, to the real ones, by what is `told` of these."""

        def draw(rows: Rows) -> np.ndarray:
            seeds = [self.run.cfg.train.seed + int(row) for row in rows]
            given = told(backend, [self.real[row] for row in rows])
            return self.vectors(generate(backend, [self.captions[row] for row in rows], seeds, request, given=given))

        drawn, seen = over(self.run.world, self.parts, draw), np.isfinite(self.features).all(1)
        return frechet(drawn, self.features[seen])


# ---- looks -----------------------------------------------------------------------------------------------------------


class Looks:
    """The best held-out loss of a stage so far and its step, the same on every process; and the time that looks take."""

    def __init__(self, run: Run, stage: str, keeps: bool, best: Best | None):
        self.run, self.stage, self.keeps = run, stage, keeps and run.cfg.train.keep_best
        self.loss, self.of = STAGES[stage].loss, run.held.digest if run.held else ""
        self.best = best if best and best["of"] == self.of else None
        self.end, self.warned = time.monotonic(), False

    def seen(self, step: int, values: dict[str, float]) -> bool:
        """Note what was measured; whether the step's checkpoint is to be kept, since it is the best so far."""
        loss = values.get(HELD + self.loss, np.inf)
        better = bool(np.isfinite(loss)) and (self.best is None or loss < self.best["loss"])
        if better:
            self.best = {"step": step, "loss": loss, "of": self.of}
        return better and self.keeps

    def told(self, step: int, began: float, values: dict[str, float]) -> None:
        """Say what a look has measured that has just ended, and its share of the time since the one before."""
        before, self.end = self.end, time.monotonic()
        listed = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items() if name != ERROR)
        took, share = self.end - began, (self.end - began) / max(1e-9, self.end - before)
        self.run.runtime.say(
            f"{self.stage}: step {step}: {listed}; the look took {took:.1f} s, {share:.1%} of the time"
        )
        metrics = read_metrics(self.run.dir / "metrics.jsonl")[self.stage].metrics
        if not self.warned and (text := overfitting(metrics, self.loss)):
            self.run.runtime.say(f"{self.stage}: {text}")
            self.warned = True

    def result(self, last: Path, best: Best | None) -> Path:
        """The checkpoint that a stage gives: the `last`, or the best one where it is kept."""
        path = self.run.checkpoints / f"{self.stage}-{best['step']:08d}" if best and self.keeps else last
        if path == last or not path.exists():  # `last` is it, or train.keep_best was off then
            return last
        try:
            state.check(path, self.stage)
        except ModelError as error:
            self.run.runtime.say(f"{error}; the last checkpoint is taken instead of the best")
            return last
        return path
