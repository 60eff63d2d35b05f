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
from tinydiff.text.labels import LEAST, Labels
from tinydiff.text.sentencepiece import T5Tokenizer
from tinydiff.text.tokenizer import Tokenizer
from tinydiff.training.parallel import World
from tinydiff.training.runtime import Runtime

TOKENIZERS = {"clip": Tokenizer, "t5": T5Tokenizer, "class": Labels}
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
    if not path.exists():
        files.write_file(path, config.to_toml(cfg).encode())
        return
    old, new = config.flat(config.load(path)), config.flat(cfg)
    changed = [k for k in new if new[k] != old[k] and not any(f in k for f in FREE)]
    if changed and not accept:
        what = ", ".join(f"{k} ({old[k]} -> {new[k]})" for k in changed[:10])
        fix = "use --accept-changes to go on so, --fresh or another --run-dir"
        raise UsageError(f"{run_dir}: the run was begun with other settings: {what}; {fix}")
    if new != old:
        files.write_file(path, config.to_toml(cfg).encode(), force=True)


def data(runtime: Runtime, run_dir: Path, images: Images, accept: bool) -> None:
    """Note what data a new run reads; refuse other data for a run that has begun, or on another process."""
    world, path = runtime.world, run_dir / "data.json"
    now = {"fingerprint": images.source.fingerprint(), "images": len(images.source)}
    if world.share(now["fingerprint"]) != now["fingerprint"]:
        raise DataError(
            f"process {world.rank} reads other data than process 0; give all the same {runtime.config.data.path}"
        )
    with world.first() as first:
        begun = files.read_json(path) if path.exists() else now
        if begun != now and not accept:
            counts = f"{begun.get('images')} images then, {now['images']} now"
            fix = "put it back, or use --accept-changes to go on with it, or --fresh to start over"
            raise DataError(f"{runtime.config.data.path}: changed since the run was begun ({counts}); {fix}")
        if first and (begun != now or not path.exists()):
            files.write_file(path, json.dumps(now).encode(), force=True)
    report_skipped(images, runtime)


def report_skipped(images: Images, runtime: Runtime) -> None:
    if images.source.skipped:
        runtime.say(images.source.report())


def tokenizer(cfg: config.Config, run_dir: Path, images: Images) -> Any:
    """The run's tokenizer: the first time CLIP's is trained on the captions, T5's copied, or classes are listed."""
    path, text, source = run_dir / "tokenizer", cfg.text_encoder, images.source
    if path.exists():
        return TOKENIZERS[text.kind].load(path)
    if text.kind == "t5":
        made: Any = T5Tokenizer.load(Path(text.path) / "tokenizer", text.max_position_embeddings)
    elif text.kind == "class":
        labels = (source.captions(i)[0] for i in range(len(source)))
        names = sorted({label.strip().lower(): label for label in labels if label.strip()}.values())
        made = Labels(names, max(LEAST, len(names)))
    else:
        captions = [c for i in range(min(len(source), 200_000)) for c in source.captions(i)]
        made = Tokenizer.train(captions, text.vocab_size, text.max_position_embeddings)
    with files.committed(path) as temporary:
        made.save(temporary)
    return TOKENIZERS[text.kind].load(path)


def split(mine: range, cfg: config.Stage, stage: str, world: World) -> list[range]:
    """A process's rows of the batch in the parts they are computed in. UsageError where they do not come out even."""
    if len(mine) % cfg.accumulate or cfg.batch_size % world.size:
        each = world.size * cfg.accumulate
        fix = f"make it a multiple of {each}"
        raise UsageError(
            f"train.{stage}.batch_size: {cfg.batch_size} rows do not divide among {world.size} processes in"
            f" {cfg.accumulate} parts; {fix}"
        )
    size = len(mine) // cfg.accumulate
    return [range(start, start + size) for start in range(mine.start, mine.stop, size)]
