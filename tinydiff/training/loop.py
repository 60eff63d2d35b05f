"""Training at three altitudes: `run` lists the stages, `stage` owns one loop, `step` is loss, backward, update.

It knows nothing of what is trained (that is a task of `stages.py`) nor of the command line.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff import config, files, images, report
from tinydiff.checkpoints import folder
from tinydiff.data import cache, embeddings, latents
from tinydiff.data.dataset import Images, open_source
from tinydiff.data.embeddings import TextEmbeddings
from tinydiff.data.latents import Latents
from tinydiff.errors import DivergedError, ResourceError
from tinydiff.training import claim, state
from tinydiff.training.metrics import Metrics, logged
from tinydiff.training.optim import Average, adamw, clip, learning_rate
from tinydiff.training.parallel import divides, norm, pieces, spread, synced
from tinydiff.training.progress import Progress
from tinydiff.training.runtime import SIGNALS, Interrupted, Runtime
from tinydiff.training.saver import Ahead, Saver
from tinydiff.training.stages import AutoencoderTask, DenoiserTask, Task, counted
from tinydiff.training.state import Snapshot, Training

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def run(cfg: config.Config, run_dir: Path, last: str | None = None, accept: bool = False, strict: bool = False) -> Path:
    """Train the stages in order, up to the `last`, continuing what the run directory holds. Returns the model folder.

    `accept` goes on with another configuration or other data; `strict` refuses to pass over a damaged checkpoint.
    """
    with Runtime(cfg) as runtime, runtime.world.together(), claim.held(runtime, run_dir):
        with runtime.world.first() as first:
            if first:
                claim.configuration(cfg, run_dir, accept)
                state.sweep(run_dir)
        data = Images(open_source(cfg.data, cfg.train.seed, encoding(runtime, "indexing shards")), cfg.data)
        claim.data(runtime, run_dir, data, accept)
        with runtime.world.first():
            tokenizer = claim.tokenizer(cfg, run_dir, data)
        model = folder.build(cfg, tokenizer, cfg.train.seed)
        for part in model.parts().values():
            part.to(runtime.device)
            if cfg.train.channels_last:
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        stage(runtime, run_dir, AutoencoderTask(cfg, model, data, runtime.device), strict)
        if last == "autoencoder":
            return run_dir
        model.vae.requires_grad_(False).eval()
        found, texts = encoded(runtime, run_dir, data, model)
        model.scaling_factor = found.scaling_factor
        stage(runtime, run_dir, DenoiserTask(cfg, model, data, found, runtime.device, texts), strict)
    return run_dir / "model"


def encoded(
    runtime: Runtime, run_dir: Path, data: Images, model: folder.Model
) -> tuple[Latents, TextEmbeddings | None]:
    """The latents of all images, and the vectors of all captions where the text encoder is kept as it is."""
    world, place, texts = runtime.world, run_dir / "latents", None
    latents.fill(place, data, model.vae, encoding(runtime, "encoding images"), world.rank, world.size)
    world.wait()
    found = latents.open_cache(place, data, model.vae)
    if runtime.config.text_encoder.kind == "t5":
        captions = sorted({"", *(c for i in range(len(data.source)) for c in data.source.captions(i))})
        key, progress = latents.digest(model.text_encoder), encoding(runtime, "encoding captions")
        encode = partial(vectors, runtime, model)
        embeddings.fill(run_dir / "texts", captions, encode, key, progress, world.rank, world.size)
        world.wait()
        texts = embeddings.open_cache(run_dir / "texts", captions, key)
    if world.rank == 0:
        cache.sweep(place, found.paths)
        cache.sweep(run_dir / "texts", texts.paths if texts else [])
    return found, texts


@torch.no_grad()
def vectors(runtime: Runtime, model: folder.Model, captions: list[str]) -> Tensor:
    """(B, T, D) of captions."""
    return model.text_encoder(torch.from_numpy(model.tokenizer.encode(captions)).to(runtime.device))[0].float().cpu()


def encoding(runtime: Runtime, label: str) -> Callable[[int, int], None]:
    """Progress of filling a cache, and the place where a signal stops it."""
    bar = Progress(label, 0)

    def progress(done: int, total: int) -> None:
        bar.total = total
        if runtime.world.rank == 0:
            bar.update(done)
        if runtime.caught:
            raise Interrupted(runtime.caught, f"stopped while {label}; run the same command to go on")

    return progress


def stage(runtime: Runtime, run_dir: Path, task: Task, strict: bool = False) -> None:
    """Run one task from its newest checkpoint to its last step; its module is left with the averaged weights."""
    cfg, world = task.stage, runtime.world
    parts = claim.split(world.rows(cfg.batch_size, divides(task.parts, world, runtime.cfg)), cfg, task.name, world)
    task.network = spread(task.network, task.parts, world, runtime.cfg, runtime.dtype)
    held = pieces(task.module, world)
    training = Training(held, Average([p.tensor for p in held], cfg.ema), adamw([p.tensor for p in held], cfg))
    start, skipped = resume(runtime, run_dir, task, training, strict)
    if start < cfg.steps:
        with world.first() as first:
            if first:
                state.make_room(run_dir / "checkpoints", training)
        with enough_memory(task, runtime), contextlib.closing(Saver()) as saver:
            train(runtime, run_dir, task, training, parts, saver, start, skipped)
    elif world.rank == 0 and not published(run_dir, runtime.config):
        task.publish(run_dir / "checkpoints" / f"{task.name}-{start:08d}", run_dir / "model")
    training.average.exchange()


def published(run_dir: Path, cfg: config.Config) -> bool:
    """Whether the run's model folder is there and says what the configuration says."""
    path = run_dir / "model" / "tinydiff.toml"
    return path.exists() and path.read_text(encoding="utf-8") == config.to_toml(cfg)


def resume(runtime: Runtime, run_dir: Path, task: Task, training: Training, strict: bool) -> tuple[int, int]:
    """Load the newest valid checkpoint: the number of steps it has done, and how many of the last were left out."""
    world = runtime.world
    found = state.newest(run_dir / "checkpoints", task.name, runtime.say, strict) if world.rank == 0 else None
    if not (path := world.share(str(found or ""))):
        if task.name in logged(run_dir):
            runtime.say(f"{task.name}: no checkpoint yet, beginning at step 0 again")
        return 0, 0
    saved = files.read_json(Path(path) / "state.json")
    state.load(Path(path), training, saved["updates"])
    if saved["scaler"]:
        runtime.scaler.load_state_dict(saved["scaler"])
    if saved["step"] < task.stage.steps:
        runtime.say(f"{task.name}: going on from step {saved['step']}")
    return saved["step"], saved["skipped"]


def train(
    runtime: Runtime,
    run_dir: Path,
    task: Task,
    training: Training,
    parts: list[range],
    saver: Saver,
    start: int,
    skipped: int,
) -> None:
    """The updates from `start` on, and what happens between them: metrics, pictures, checkpoints, signals."""
    cfg, world = task.stage, runtime.world
    log = Metrics(run_dir, task.name, start, cfg.batch_size, runtime.cfg.tensorboard) if world.rank == 0 else None
    bar = Progress(task.name, cfg.steps, start)
    save = partial(commit, runtime, run_dir, task, training, saver)
    make: Callable[[int], list[tuple[Tensor, ...]]] = lambda n: [task.batch(n, rows) for rows in parts]  # noqa: E731
    for n, batch in Ahead(make, range(start, cfg.steps), runtime.cfg.timeout):
        done, last = step(runtime, task, training, n, batch, saver.settle), n + 1 == cfg.steps
        skipped = skipped + 1 if done.left_out else 0
        if done.left_out:
            reason = f"loss {done.values['loss']:g}, gradient norm {done.values['grad_norm']:g}"
            tell(runtime, task, n, reason, culprits(runtime, task, n, parts), log)
            if skipped >= runtime.cfg.max_skipped:
                save(n + 1, 0)
                saver.wait()
                raise diverged(task, f"{skipped} updates in a row left out up to step {n + 1}, {reason}")
        if log:
            log.add(n + 1, done.values)
            bar.update(n + 1, f"loss {log.recent:.4f}")
        if last or (n + 1) % cfg.sample_every == 0:
            saver.settle()
            look(runtime, run_dir, task, training, n + 1, log)
        if last or (n + 1) % cfg.save_every == 0 or done.caught:
            save(n + 1, skipped)
        saver.check()
        if done.caught and not last:
            saver.wait()
            message = f"stopped and saved at step {n + 1} of {task.name}; run the same command to go on"
            raise Interrupted(done.caught, message if world.rank == 0 else "")
    saver.wait()
    log.close() if log else None


class Done(NamedTuple):
    """An update: what was measured, whether it was left out as not finite, and the signal that any process caught."""

    values: dict[str, float]
    left_out: bool
    caught: int


def step(
    runtime: Runtime,
    task: Task,
    training: Training,
    n: int,
    batch: list[tuple[Tensor, ...]],
    settle: Callable[[], None] = lambda: None,
) -> Done:
    """One update: gradients over the parts of the batch, clipped, applied, averaged. `settle` comes before any change."""
    cfg, scaler, optimizer, totals = task.stage, runtime.scaler, training.optimizer, dict[str, Tensor]()
    rate = learning_rate(n, cfg)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for i, part in enumerate(batch):
        with synced(task.network, task.parts, i + 1 == len(batch)), runtime.attention():
            with runtime.autocast():
                loss, terms = task.loss(*(t.to(runtime.device, non_blocking=True) for t in part))
            scaler.scale(loss / len(batch)).backward()
        for name, value in {"loss": counted(loss.detach()), **terms}.items():
            totals[name] = totals[name] + value if name in totals else value
    settle()
    held = [(piece, grad) for piece in training.pieces if (grad := piece.gradient()) is not None]
    scaler.unscale_(optimizer)
    values, size, caught = agree(
        runtime, totals, norm([piece for piece, _ in held], [grad for _, grad in held], runtime.world)
    )
    finite = math.isfinite(values["loss"] + size)
    if finite:
        clip([grad for _, grad in held], size, cfg.clip)
        scaler.step(optimizer)
    if scaler.is_enabled():  # where any process has an infinite gradient, all halve the scale
        scaler.update(None if finite else scaler.get_scale() * scaler.get_backoff_factor())
    for piece in training.pieces:
        piece.parameter.grad = None
    training.average.update(n, last=n + 1 == cfg.steps)
    left_out = not finite and not (scaler.is_enabled() and math.isfinite(values["loss"]))
    return Done({"loss": values.pop("loss"), "lr": rate, "grad_norm": size} | values, left_out, caught)


def agree(runtime: Runtime, totals: dict[str, Tensor], size: Tensor) -> tuple[dict[str, float], float, int]:
    """Means of what was measured over all processes, the gradient's norm, and the signal that any of them caught."""
    caught = torch.tensor([float(runtime.caught == number) for number in SIGNALS], dtype=torch.float64)
    numbers = torch.cat([*totals.values(), caught.to(size.device)])
    *numbers, length = torch.cat([runtime.world.sum(numbers), size.double().reshape(1)]).tolist()
    means = {name: numbers[2 * i] / numbers[2 * i + 1] for i, name in enumerate(totals) if numbers[2 * i + 1]}
    signals = [number for number, count in zip(SIGNALS, numbers[-len(SIGNALS) :], strict=True) if count]
    return means, length, signals[0] if signals else 0


@torch.no_grad()
def culprits(runtime: Runtime, task: Task, n: int, parts: list[range]) -> list[str]:
    """The images of step `n` whose own loss is no finite number; all of the batch where each by itself is fine."""
    bad = torch.zeros(task.stage.batch_size)
    for row in (row for rows in parts for row in rows):
        with runtime.autocast(), runtime.attention():
            loss, _ = task.loss(*(t.to(runtime.device) for t in task.batch(n, range(row, row + 1))))
        bad[row] = not loss.isfinite()
    rows = runtime.world.sum(bad).nonzero().flatten().tolist()
    return task.data.names(task.order(n)[rows or slice(None)])


def tell(runtime: Runtime, task: Task, n: int, reason: str, found: list[str], log: Metrics | None) -> None:
    """Name an update that was left out, and the images in question."""
    shown = ", ".join(found[:8]) + " ..." * (len(found) > 8)
    runtime.say(f"{task.name}: step {n + 1} left out, {reason}: {shown}")
    if log:
        log.skipped(n + 1, reason, found)


def diverged(task: Task, what: str) -> DivergedError:
    fix = f"lower train.{task.name}.lr and go on with --accept-changes, or leave those images out"
    return DivergedError(f"{task.name}: {what}; the checkpoints are finite: {fix}")


def look(runtime: Runtime, run_dir: Path, task: Task, training: Training, n: int, log: Metrics | None) -> None:
    """Pictures of what the averaged weights have learnt, and the report that shows them."""
    if log is None and not divides(task.parts, runtime.world, runtime.cfg):
        return
    training.average.exchange()
    try:
        pictures, values = task.pictures()  # where weights are divided, every process has to help
    finally:
        training.average.exchange()
    if log is None:
        return
    path = run_dir / "samples" / f"{task.name}-{n:08d}.png"
    files.write_file(path, images.encode_png(images.grid(pictures, 8), None), force=True)
    if task.captions:
        files.write_file(path.with_name("captions.json"), json.dumps(task.captions).encode(), force=True)
    log.look(n, values, path)
    report.write(run_dir)


def commit(runtime: Runtime, run_dir: Path, task: Task, training: Training, saver: Saver, n: int, skipped: int) -> None:
    """Begin to save step `n`: the checkpoint, the model folder of its averaged weights, and what is no longer kept."""
    largest = torch.stack([t.abs().max() for t in training.tensors("weights").values() if t.numel()]).isfinite().all()
    if not runtime.world.all(bool(largest)):
        raise diverged(task, f"weights are no finite numbers after step {n}")
    checkpoints, cfg, world = run_dir / "checkpoints", runtime.cfg, runtime.world
    about = {"stage": task.name, "step": n, "skipped": skipped, "updates": training.updates}
    about |= {"scaler": runtime.scaler.state_dict(), "processes": world.size}

    def write(memory: Snapshot) -> None:
        publish = partial(task.publish, path=run_dir / "model")
        state.save(checkpoints / f"{task.name}-{n:08d}", memory, training.places, about, world, publish)
        if world.rank == 0:
            state.prune(checkpoints, task.name, cfg.keep, cfg.keep_every)

    saver.begin(training, write)


@contextlib.contextmanager
def enough_memory(task: Task, runtime: Runtime) -> Iterator[None]:
    """Says which setting to change where memory does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(t in str(error) for t in NO_MEMORY):
            raise
        cfg = task.stage
        more = next((k for k in range(cfg.accumulate + 1, cfg.batch_size + 1) if cfg.batch_size % k == 0), 0)
        fix = f"set train.{task.name}.accumulate={more}" if more else f"lower train.{task.name}.batch_size"
        fix += "" if runtime.cfg.gradient_checkpointing else ", or train.gradient_checkpointing=true"
        raise ResourceError(
            f"{task.name}: out of memory at {cfg.batch_size // cfg.accumulate} rows at once; {fix}"
        ) from error
