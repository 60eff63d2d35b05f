"""What a run directory belongs to: its lock, the configuration and the data that the run was begun with, its tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinydiff import config, files
from tinydiff.data.dataset import Images
from tinydiff.errors import DataError, UsageError
from tinydiff.schema import flat, to_toml
from tinydiff.training.parallel import World
from tinydiff.training.runtime import Runtime
from tinydiff.training.task import Task

FREE = (  # keys that change nothing that is learnt
    "generate.",
    *(f"train.{k}" for k in ("threads", "keep", "device", "timeout", "max_skipped", "tensorboard", "parallel")),
    *(f"train.{k}" for k in ("tensor_parallel", "gradient_checkpointing", "compile")),
    "data.path",  # what is there is compared by its content
    "data.max_bad_fraction",
    ".save_every",
    ".sample_every",
)


@contextlib.contextmanager
def held(runtime: Runtime, run_dir: Path) -> Iterator[None]:
    """The directory belongs to this run alone: rank 0 locks it for all."""
    with files.lock(run_dir) if runtime.world.rank == 0 else contextlib.nullcontext():
        runtime.world.wait()
        yield


def configuration(cfg: config.Config, run_dir: Path, accept: bool) -> None:
    """Write the configuration of a new run; refuse another one for a run that has begun, unless it is accepted."""
    path = run_dir / "tinydiff.toml"
    old, new = flat(config.load(path)) if path.exists() else {}, flat(cfg)
    changed = [k for k in old if new[k] != old[k] and not any(f in k for f in FREE)]
    if changed and not accept:
        what = ", ".join(f"{k} ({old[k]} -> {new[k]})" for k in changed[:10])
        fix = "use --accept-changes to go on so, --fresh or another --run-dir"
        raise UsageError(f"{run_dir}: the run was begun with other settings: {what}; {fix}")
    if new != old:
        files.write_file(path, to_toml(cfg).encode(), force=bool(old))


def data(runtime: Runtime, run_dir: Path, images: Images, accept: bool) -> None:
    """Note what data a new run reads; refuse other data for a run that has begun, or on another process."""
    world, path, origin = runtime.world, run_dir / "data.json", runtime.config.data.path
    now = {"fingerprint": images.source.fingerprint(), "images": len(images.source)}
    if world.share(now["fingerprint"]) != now["fingerprint"]:
        raise DataError(f"process {world.rank} reads other data than process 0; give all the same {origin}")
    with world.first() as first:
        begun = files.read_json(path) if path.exists() else now
        if begun != now and not accept:
            counts = f"{begun.get('images')} images then, {now['images']} now"
            fix = "put it back, or use --accept-changes to go on with it, or --fresh to start over"
            raise DataError(f"{origin}: changed since the run was begun ({counts}); {fix}")
        if first and (begun != now or not path.exists()):
            files.write_file(path, json.dumps(now).encode(), force=True)
    if images.source.skipped:
        runtime.say(images.source.report())


def tokenizer(cfg: config.Config, run_dir: Path, images: Images) -> Any:
    """The run's tokenizer, which is made the first time."""
    path, network = run_dir / "tokenizer", cfg.text_network
    if not path.exists():
        made = network.make_tokenizer(cfg, images.source)
        with files.committed(path) as temporary:
            made.save(temporary)
    return network.tokenizer_class.load(path)


def split(mine: range, task: Task, world: World) -> list[range]:
    """A process's rows of the batch in the parts they are computed in. UsageError where they do not come out even."""
    cfg, name = task.settings, f"train.{task.name}"
    if task.whole and cfg.accumulate > 1:
        raise UsageError(f"{name}.accumulate: this stage's loss compares the rows of a whole batch; set it to 1")
    if len(mine) % cfg.accumulate or cfg.batch_size % world.size:
        problem = f"{cfg.batch_size} rows do not divide among {world.size} processes in {cfg.accumulate} parts"
        raise UsageError(f"{name}.batch_size: {problem}; make it a multiple of {world.size * cfg.accumulate}")
    size = len(mine) // cfg.accumulate
    return [range(start, start + size) for start in range(mine.start, mine.stop, size)]
