"""What a run directory belongs to: its lock, the configuration and the data that the run was begun with, its tokenizer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tinydiff import config, files
from tinydiff.checkpoints.source import Source
from tinydiff.data.dataset import Images, examples
from tinydiff.errors import DataError, ModelError, UsageError
from tinydiff.files import shown
from tinydiff.schema import flat, reasons_of, to_toml
from tinydiff.stages import STAGES, Stage, trained
from tinydiff.text.labels import FILE as LABELS
from tinydiff.text.labels import Labels
from tinydiff.training.parallel import World
from tinydiff.training.runtime import Runtime
from tinydiff.training.state import checkpoints
from tinydiff.verified import verify

CONFIG, DATA, BASE, SKIPPED = "tinydiff.toml", "data.json", "base.json", "skipped.txt"
FREE = (  # keys that change nothing that is learnt; those of stages ahead, or of none of the run's, are free too
    "generate.",
    *(f"train.{k}" for k in ("time", "threads", "keep", "device", "timeout", "max_skipped", "tensorboard", "parallel")),
    *(f"train.{k}" for k in ("tensor_parallel", "gradient_checkpointing", "compile")),
    "data.path",  # what is there is compared by its content
    "train.base",  # as is this
    "data.max_bad_fraction",
    "data.held_out",  # as are the images that it keeps
    "data.validation",
    "train.validation_samples",
    ".save_every",
    ".sample_every",
)


TIMED = (".steps", ".warmup", ".ema")  # what the time of a run lays out


@contextlib.contextmanager
def held(runtime: Runtime, run_dir: Path) -> Iterator[None]:
    """The directory belongs to this run alone: rank 0 locks it for all. One that it made goes again if no run begins."""
    first, made = runtime.world.rank == 0, not run_dir.exists()
    with files.lock(run_dir) if first else contextlib.nullcontext():
        try:
            runtime.world.wait()
            yield
        except BaseException:
            if first and made and run_dir.is_dir() and {*os.listdir(run_dir)} <= {".lock", "tokenizer"}:
                shutil.rmtree(run_dir, ignore_errors=True)
            raise


class Claim:
    """What a run directory notes of its run: configuration and data, compared at once and written by `write`.

    Nothing is written before all that can be refused has been: a refused command leaves the run as it was, and a first one
    that fails does not claim the directory.
    """

    def __init__(
        self, runtime: Runtime, run_dir: Path, accept: bool, reasons: Mapping[str, str] = MappingProxyType({})
    ):
        self.runtime, self.dir, self.accept = runtime, run_dir, accept
        self.written, self.notes, self.listed = runtime.world.rank != 0, dict[str, bytes](), b""
        self.reasons = {**(reasons_of(run_dir / CONFIG) if self.begun else {}), **reasons}

    @property
    def begun(self) -> bool:
        """Whether the directory belongs to a run."""
        return (self.dir / CONFIG).exists()

    @property
    def ahead(self) -> list[str]:
        """The stages after the last that has a checkpoint."""
        begun = [bool(checkpoints(self.dir / "checkpoints", name)) for name in STAGES]
        return [name for i, name in enumerate(STAGES) if not any(begun[i:])]

    def configuration(self, cfg: config.Config) -> None:
        """Refuse another configuration for a run that has begun, unless it is accepted."""
        before = config.load(self.dir / CONFIG, stored=True) if self.begun else cfg
        old, new = flat(before) if self.begun else {}, flat(cfg)
        ours = {*trained(before.train), *trained(cfg.train)} - {*self.ahead}
        others = (f"train.{name}." for name in STAGES if name not in ours)
        free = (*FREE, *others, *(TIMED if cfg.train.time else ()))
        changed = [k for k in old if new[k] != old[k] and not any(f in k for f in free)]
        if changed and not self.accept:
            what = ", ".join(f"{k} ({shown(old[k])} -> {shown(new[k])})" for k in changed[:10])
            fix = "use --accept-changes to go on so, --fresh or another --run-dir"
            raise UsageError(f"{shown(self.dir)}: the run was begun with other settings: {what}; {fix}")
        if new != old:
            self.reasons = {k: why for k, why in self.reasons.items() if not old or old.get(k) == new.get(k)}
            self.notes[CONFIG] = to_toml(cfg, reasons=self.reasons).encode()

    def laid(self, cfg: config.Config) -> None:
        """Write the configuration of a run that has begun again, some of whose stages have other steps."""
        if self.runtime.world.rank == 0:
            files.write_file(self.dir / CONFIG, to_toml(cfg, reasons=self.reasons).encode(), force=True)

    def base(self, source: Source) -> None:
        """Refuse another model to begin with than the run was begun with, unless it is accepted."""
        path, now = self.dir / BASE, {"sha256": source.digest()}
        begun = files.read_json(path) if self.begun and path.exists() else None
        if self.begun and begun != now and not self.accept:
            fix = "put that back, or use --accept-changes to go on with this, or --fresh to start over"
            raise ModelError(f"{shown(source.path)}: not the model that the run was begun with; {fix}")
        if begun != now:
            self.notes[BASE] = json.dumps(now).encode()

    def data(self, images: Images) -> None:
        """Refuse other data for a run that has begun, or on another process."""
        world, path, origin = self.runtime.world, self.dir / DATA, ", ".join(self.runtime.config.data.paths)
        held_out = int(images.held_out.sum())
        now = {"fingerprint": images.source.fingerprint(), "images": len(images.source), "held_out": held_out}
        if world.share(now["fingerprint"]) != now["fingerprint"]:
            raise DataError(f"process {world.rank} reads other data than process 0; give all the same {shown(origin)}")
        begun = {"held_out": 0, **files.read_json(path)} if self.begun and path.exists() else None
        if begun not in (None, now) and not self.accept:
            counts = f"{begun.get('images')} images then, {now['images']} now"
            fix = "put it back, or use --accept-changes to go on with it, or --fresh to start over"
            if now == begun | {"held_out": held_out}:
                counts = f"{begun['held_out']} images held out then, {held_out} now"
                fix = f"set data.held_out={0 if held_out else 0.02}, or {fix.partition(', or ')[2]}"
            raise DataError(f"{shown(origin)}: changed since the run was begun ({counts}); {fix}")
        if begun != now:
            self.notes[DATA] = json.dumps(now).encode()
        if origin != "shapes" and (self.begun or not self.reasons):  # who chose has told it
            for line in (*images.source.report().splitlines(), *(f"  {line}" for line in examples(images.source))):
                self.runtime.say(line)
        self.left_out(images)

    def left_out(self, images: Images) -> None:
        """List in the run what is left out, and what could not be read since; say so where that is new."""
        lines = [f"{name}\t{reason}\n" for name, reason in (*images.source.skipped, *images.unread())]
        text, path = "".join(lines).encode("utf-8", "replace"), self.dir / SKIPPED
        if text == self.listed or not (lines or path.exists()):
            return
        self.listed = self.notes[SKIPPED] = text
        if lines:
            self.runtime.say(f"{len(lines)} files are left out; {shown(path)} lists them")
        if self.written and self.runtime.world.rank == 0:
            files.write_file(path, text, force=True)

    def tokenizer(self, cfg: config.Config, images: Images, *others: Images) -> Any:
        """The run's tokenizer; made anew of the `images` until the run has begun. `others` are read with it, too."""
        path, network = self.dir / "tokenizer", cfg.text_network
        with self.runtime.world.first() as first:
            if self.begun and not (path / files.MANIFEST).is_file() and (path.exists() or DATA in self.notes):
                fix = "put it back from a copy of the run, or train with --fresh"
                raise ModelError(f"{shown(path)}: missing, or without its {files.MANIFEST}; {fix}")
            if first and not (self.begun and path.exists()):
                made = network.make_tokenizer(cfg, images.source)
                with files.committed(path, replace=True) as temporary:
                    made.save(temporary)
                    if "label" in cfg.columns:
                        found: Any = images.source
                        names = sorted({found.label(i) for i in range(len(found))})
                        Labels(names, len(names)).save(temporary)
            verify(path)
            tokenizer = network.tokenizer_class.load(path)
        for source in (each.source for each in (images, *others) if network.labels):
            tokenizer.check(source.captions(i)[0] for i in range(len(source)))
        return tokenizer

    def labels(self, cfg: config.Config) -> Labels | None:
        """The run's classes, beside its tokenizer, where the denoiser is told one."""
        if "label" not in cfg.columns:
            return None
        names = [*map(str, files.read_json(self.dir / "tokenizer" / LABELS).values())]
        return Labels(names, len(names), whole=True)

    def write(self) -> None:
        """Write what is new, the first time; the configuration last, since the run has begun with it."""
        for name in () if self.written else sorted(self.notes):
            files.write_file(self.dir / name, self.notes[name], force=True)
        self.written = True


def split(mine: range, name: str, settings: Stage, whole: bool, world: World) -> list[range]:
    """A process's rows of a stage's batch in the parts they are computed in; `whole`: its loss needs all of them at once.

    UsageError where they do not come out even.
    """
    if whole and settings.accumulate > 1:
        raise UsageError(f"train.{name}.accumulate: this stage's loss compares the rows of a whole batch; set it to 1")
    if len(mine) % settings.accumulate or settings.batch_size % world.size:
        problem = (
            f"{settings.batch_size} rows do not divide among {world.size} processes in {settings.accumulate} parts"
        )
        raise UsageError(
            f"train.{name}.batch_size: {problem}; make it a multiple of {world.size * settings.accumulate}"
        )
    size = len(mine) // settings.accumulate
    return [range(start, start + size) for start in range(mine.start, mine.stop, size)]
