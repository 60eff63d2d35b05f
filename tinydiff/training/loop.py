"""Training at three altitudes: `train_run` lists the stages, `stage` owns one loop, `step` is loss, backward, update.

It knows nothing of what is trained (that is a task, by `stages.STAGES`) nor of the command line.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff import config, files, images, report
from tinydiff.checkpoints import folder
from tinydiff.data.dataset import Images, open_source
from tinydiff.data.facts import Facts
from tinydiff.diffusion.noise import keyed
from tinydiff.errors import DivergedError, ModelError, ResourceError, UsageError, out_of_memory
from tinydiff.metrics import logged
from tinydiff.networks import LABELS
from tinydiff.networks.network import imported
from tinydiff.progress import Progress
from tinydiff.schema import to_toml
from tinydiff.stages import trained
from tinydiff.start import source_of
from tinydiff.system import shown
from tinydiff.training import advice, claim, grow, state
from tinydiff.training.budget import Budget
from tinydiff.training.encoding import sources
from tinydiff.training.metrics import Metrics, writer
from tinydiff.training.optim import clip, learning_rate
from tinydiff.training.parallel import divides, norm, spread, synced
from tinydiff.training.run import Run
from tinydiff.training.runtime import SIGNALS, Interrupted, Runtime
from tinydiff.training.saver import Ahead, Saver
from tinydiff.training.start import opened
from tinydiff.training.state import Learner, Snapshot, Training
from tinydiff.training.task import Batch, Task, counted, moved, pinned
from tinydiff.training.validation import Looks, held_out
from tinydiff.verified import verify


def run(
    cfg: config.Config,
    run_dir: Path,
    last: str | None = None,
    accept: bool = False,
    strict: bool = False,
    more: bool = False,
    begun: float | None = None,
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Train the stages in order, up to the `last`, continuing a run. Returns the folder that was published last.

    `accept` goes on with another configuration or other data; `strict` refuses to pass over a damaged checkpoint; `more`
    goes on from the end of a run that has ended, for its time again, which counts from when this was `begun`
    (`time.monotonic`). `reasons` say of keys why they have their values.
    """
    budget = Budget(run_dir, cfg, more, begun)
    cfg = budget.cfg
    with enough_memory(cfg), Runtime(cfg) as runtime, runtime.world.together(), claim.held(runtime, run_dir):
        this, made, publishers = Run(runtime, run_dir, accept, strict, budget, reasons), run_dir, dict[str, Task]()
        this.claim.configuration(cfg)
        check(this)
        gather(this)
        if runtime.world.rank == 0:
            nothing_lost(this)
            state.sweep(run_dir)
        this.model = started(this) if cfg.train.base else built(this)
        classes(this)
        for part in this.model.networks.values():
            runtime.placed(part)
        drawable(cfg, this.model)
        if line := runtime.world.rank == 0 and advice.of_captions(
            this.data.source, [*this.model.tokenizers.values()], this.model.opened
        ):
            runtime.say(f"note: {line}")
        for name, row in trained(cfg.train).items():
            for _ in grow.parts(this, name):
                with enough_memory(cfg, name):
                    task = imported(row.task)(this)
                    this.claim.left_out(this.data)
                    stage(this, task)
                if task.publishes:
                    made, publishers[task.publishes] = run_dir / task.publishes, task
            if name == last:
                break
        for task in publishers.values():
            task.cfg = replace(task.cfg, train=this.cfg.train)  # of which later stages may have laid other steps
            put_right(this, task)
        this.claim.write()
        this.claim.left_out(this.data)
    return made


def check(run: Run) -> None:
    """Refuse what settings alone show not to work, and say which have no effect."""
    if run.cfg.train.tensorboard:
        writer()  # refused now, if it is not installed
    for line in (*advice.of_settings(run.cfg), *filter(None, [run.budget.said])):
        run.runtime.say(f"note: {line}")
    for name, row in trained(run.cfg.train).items():
        settings, task = run.cfg.train.stage(name), imported(row.task)
        task.check(settings)
        rows = run.world.rows(settings.batch_size, run.cfg.train.tensor_parallel > 1)
        claim.split(rows, name, settings, task.whole, run.world)


def gather(run: Run) -> None:
    """Open the images that are trained on and measured on, and say what they will not teach."""
    cfg, say = run.cfg, run.runtime.say
    source = open_source(cfg.data, cfg.train.seed, run.progress("checking images"), run.caption, run.cfg.columns)
    run.data = Images(source, cfg.data)
    run.claim.data(run.data)
    for line in advice.of_data(cfg, Facts.of(source)) if cfg.data.path != "shapes" else ():
        say(f"note: {line}")
    run.held = held_out(run)
    if run.held:
        say(f"{len(run.held)} images to measure on, which are not trained on")
    elif cfg.train.keep_best:
        say("note: train.keep_best: of no effect, no images are held out; set data.validation or data.held_out")


def nothing_lost(run: Run) -> None:
    """Refuse to begin again, unless it is accepted, where that would replace a folder whose checkpoints are gone.

    What a killed process left half-written says that there was no checkpoint yet.
    """
    publishes = {name: imported(row.task).publishes for name, row in trained(run.cfg.train).items()}
    firsts = {place: name for name, place in reversed(publishes.items()) if place}
    for place, name in firsts.items() if not (run.claim.accept or any(run.checkpoints.glob(".tmp-*"))) else ():
        if (run.dir / place / "tinydiff.toml").exists() and not state.checkpoints(run.checkpoints, name):
            problem = f"made of checkpoints that are gone from {shown(run.checkpoints)}, and training would replace it"
            fix = "put them back, or use --accept-changes to begin again, or --fresh or another --run-dir"
            raise ModelError(f"{shown(run.dir / place)}: {problem}; {fix}")


def built(run: Run) -> folder.Model:
    """The model that the configuration describes, with the run's tokenizer."""
    tokenizer = run.claim.tokenizer(run.cfg, run.data, *([run.held.images] if run.held else []))
    return folder.build(run.cfg, tokenizer, run.cfg.train.seed, run.claim.labels(run.cfg))


def started(run: Run) -> folder.Model:
    """The model that the run begins with, whose labels the images have, if it is of labels."""
    source = source_of(run.cfg.train.base)
    run.claim.base(source)
    run.origin = {"model": run.cfg.train.base, **source.origin}
    model = opened(source, run.cfg)
    for labels in (row for name, row in model.tokenizers.items() if name == LABELS):
        for each in (run.data, *([run.held.images] if run.held else [])):
            labels.check(each.source.captions(i)[0] for i in range(len(each.source)))
    return model


def classes(run: Run) -> None:
    """DataError for a class of the data that the model has not."""
    if not (labels := run.model.description.labels) or "label" not in run.cfg.columns:
        return
    known = labels.check if labels.names else labels.encode  # other programs' models have numbers alone
    for source in (each.source for each in sources(run)):
        known([source.label(i) for i in range(len(source))])  # type: ignore[attr-defined]


def drawable(cfg: config.Config, model: folder.Model) -> None:
    """UsageError where the model could not be drawn from as the configuration says."""
    g = cfg.generate
    try:
        model.description.levels(g.sampler, g.steps, g.spacing)
    except UsageError as error:
        raise UsageError(f"[generate]: {error}") from error


def stage(run: Run, task: Task) -> None:
    """Run one task from its newest checkpoint to its last step, or to that at which its network is to grow; its players are
    left with their averaged weights."""
    world, cfg = run.world, task.settings
    task.rows = claim.split(world.rows(cfg.batch_size, divided(run, task)), task.name, cfg, task.whole, world)
    for player in task.players.values():
        player.module.train()
        player.network = spread(player.network, player.parts, world, run.runtime.cfg, run.runtime.dtype)
    training = Training([Learner.of(k, each.module, each.settings, world) for k, each in task.players.items()])
    start, skipped = resume(run, task, training)
    if start < (run.until or task.settings.steps):
        with world.first() as first:
            if first:
                state.make_room(run.checkpoints, training)
                run.claim.write()
        with contextlib.closing(Saver()) as saver:
            train(run, task, training, saver, start, skipped)
    if task.looks.keeps and not run.until:
        best = Path(world.share(str(result(run, task) if world.rank == 0 else "")))
        if best.name != f"{task.name}-{max(start, task.settings.steps):08d}":
            state.load(best, training)
    training.exchange()
    for player in task.players.values():
        player.module.eval()
        # What spreads a network must not outlive its group of processes: torch would wait for ever.
        player.network = player.module


def divided(run: Run, task: Task) -> bool:
    """Whether processes divide the weights of a player among them."""
    return any(divides(player.parts, run.world, run.runtime.cfg) for player in task.players.values())


def put_right(run: Run, task: Task) -> None:
    """Publish a finished stage's folder again where it is not what its last checkpoint says."""
    if run.world.rank == 0 and not published(run, task):
        task.publish(result(run, task), run.dir / task.publishes)


def result(run: Run, task: Task) -> Path:
    """The checkpoint that a finished stage gives: the last, or the best that is kept."""
    return task.looks.result(state.checkpoints(run.checkpoints, task.name)[-1], task.looks.best)


def published(run: Run, task: Task) -> bool:
    """Whether the folder that a task publishes is there, whole, and says what the configuration says."""
    path = run.dir / task.publishes / "tinydiff.toml"
    if not all((path.parent / place.name).is_dir() for place in task.beside):
        return False
    if not path.exists() or path.read_text(encoding="utf-8") != to_toml(task.cfg):
        return False
    try:
        verify(path.parent)
    except ModelError as error:
        run.runtime.say(f"{error}; written again from the last checkpoint")
        return False
    return True


def resume(run: Run, task: Task, training: Training) -> tuple[int, int]:
    """Load the newest valid checkpoint: the number of steps it has done, and how many of the last were left out."""
    world, say = run.world, run.runtime.say
    newest = state.newest(run.checkpoints, task.name, say, run.strict) if world.rank == 0 else None
    path = world.share(str(newest or ""))
    change = grow.change(run, task.name, Path(path), training) if path else None
    saved = state.load(Path(path), training, change) if path else {}
    task.looks = Looks(
        run, task.name, task.best, None if change else saved.get("best")
    )  # a smaller one is not compared
    if not path:
        if task.name in logged(run.dir):
            say(f"{task.name}: no checkpoint yet, beginning at step 0 again")
        return 0, 0
    task.restore(saved.get("task", {}))
    if saved["scaler"]:
        run.runtime.scaler.load_state_dict(saved["scaler"])
    if saved["step"] < task.settings.steps:
        say(f"{task.name}: going on from step {saved['step']}")
    return saved["step"], saved["skipped"]


def train(run: Run, task: Task, training: Training, saver: Saver, start: int, skipped: int) -> None:
    """The updates from `start` on, and what happens between them: metrics, pictures, checkpoints, signals."""
    world, own, board, size = run.world, run.runtime.cfg, run.runtime.cfg.tensorboard, task.settings.batch_size
    log = Metrics(run.dir, task.name, start, size, board) if world.rank == 0 else None
    if log and (what := grow.told(run, task.name, start)):
        log.grown(start + 1, what)
        run.runtime.say(f"{task.name}: grown after step {start}: {what}")
    bar, save = Progress(task.name, task.settings.steps, start), partial(commit, run, task, training, saver)
    pace = run.budget.pace(task.name, task.settings, start)
    end = sys.maxsize if pace else run.until or task.settings.steps
    for n, batch in Ahead(partial(parts_of, task), range(start, end), own.timeout):
        if pace:
            pace.follow(run, task, training, n)
        cfg = task.settings
        done, last, better = step(run, task, training, n, batch, saver.settle), n + 1 == cfg.steps, False
        skipped = skipped + 1 if done.reason else 0
        if done.reason:
            left_out(run, task, training, n, done, log)
            if skipped >= own.max_skipped:
                save(n + 1, 0)
                saver.wait()
                raise diverged(task, f"{skipped} updates in a row left out up to step {n + 1}, {done.reason}")
        if log:
            log.add(n + 1, done.values)
            bar.total = cfg.steps
            bar.update(n + 1, f"loss {log.recent:.4f}", run.budget.left if pace else None)
        if looked := last or (n + 1) % cfg.sample_every == 0:
            saver.settle()
            better = look(run, task, training, n + 1, log)
        if last or n + 1 == end or (n + 1) % cfg.save_every == 0 or done.caught or better:
            save(n + 1, skipped)
        saver.check()
        if done.caught and not last:
            saver.wait()
            message = f"stopped and saved at step {n + 1} of {task.name}; run the same command to go on"
            raise Interrupted(done.caught, message if world.rank == 0 else "")
        if pace and (leg := pace.after(n + 1, looked)):
            pace.lay(run, task, leg)
        if last:
            break
    saver.wait()
    log.close() if log else None


def parts_of(task: Task, n: int) -> list[Batch]:
    """What this process has of the batch of step `n`, in the parts it is computed in."""
    return [pinned(task.batch(n, rows), task.run.runtime.device) for rows in task.rows]


class Done(NamedTuple):
    """An update: what was measured, which player's was left out as not finite, and the signal that any process caught."""

    values: dict[str, float]
    reason: str  # why it was left out, if it was
    caught: int


def step(
    run: Run, task: Task, training: Training, n: int, batch: list[Batch], settle: Callable[[], None] = lambda: None
) -> Done:
    """One update of each player in turn. `settle` comes before any change of weights."""
    scaler, values = run.runtime.scaler, dict[str, float]()
    whole, reason, caught = True, "", 0
    for i, learner in enumerate(training.learners):
        restore = training.keep_buffers()
        with alone(training, learner):
            told, finite, signal = update(run, task, learner, n, batch, settle)
        if not finite:
            restore()
            who = f"{learner.name}: " if len(training.learners) > 1 else ""
            if not (scaler.is_enabled() and math.isfinite(told["loss"])):
                reason = f"{who}loss {told['loss']:g}, gradient norm {told['grad_norm']:g}"
        whole, caught = whole and finite, caught or signal
        values |= {f"{learner.name}_{name}" if i and name != "lr" else name: value for name, value in told.items()}
    if scaler.is_enabled():  # where any process has an infinite gradient, all halve the scale
        scaler.update(None if whole else scaler.get_scale() * scaler.get_backoff_factor())
    run.world.copy(training.tensors("buffers").values())
    for learner in training.learners:
        learner.average.update(n, last=n + 1 == task.settings.steps)
    return Done(values, reason, caught)


@contextlib.contextmanager
def alone(training: Training, learner: Learner) -> Iterator[None]:
    """While one player learns, the others are what it finds: no gradient is computed for them."""
    others = [piece.parameter for other in training.learners if other is not learner for piece in other.pieces]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def update(
    run: Run, task: Task, learner: Learner, n: int, batch: list[Batch], settle: Callable[[], None]
) -> tuple[dict[str, float], bool, int]:
    """One player's gradients over the batch, clipped and applied where finite: (what was measured, finite, signal caught)."""
    player, cfg, scaler, totals = task.players[learner.name], learner.settings, run.runtime.scaler, dict[str, Tensor]()
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(n - learner.begin, cfg)
    for i, (rows, part) in enumerate(zip(task.rows, batch, strict=True)):
        last = i + 1 == len(batch)
        with synced(player.network, player.parts, last), run.runtime.attention():  # backward may compute blocks anew
            loss, terms = evaluated(run, task, learner.name, n, rows, part)
            if loss.requires_grad:  # a player may wait for the others
                scaler.scale(loss / len(batch)).backward()
        for name, value in {"loss": counted(loss.detach()), **terms}.items():
            totals[name] = totals[name] + value if name in totals else value
    settle()
    held = [(piece, grad) for piece in learner.pieces if (grad := piece.gradient()) is not None]
    gradients = [grad for _, grad in held]
    scaler.unscale_(learner.optimizer)
    values, size, caught = agree(run.runtime, totals, norm([piece for piece, _ in held], gradients, run.world))
    finite = math.isfinite(values["loss"] + size)
    if finite and held:
        clip(gradients, size, cfg.clip)
        scaler.step(learner.optimizer)
    for piece in learner.pieces:
        piece.parameter.grad = None
    return (
        {"loss": values.pop("loss"), "lr": learning_rate(n - learner.begin, cfg), "grad_norm": size} | values,
        finite,
        caught,
    )


def evaluated(run: Run, task: Task, player: str, n: int, rows: range, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """A player's loss on some rows of step `n`; dropout is a function of them, so that a resumed run drops the same."""
    torch.manual_seed(int(keyed(run.cfg.train.seed, f"{task.name}.{player} dropout", n, rows.start).integers(2**62)))
    with run.runtime.attention(), run.runtime.autocast():
        return task.loss(player, moved(part, run.runtime.device))


def agree(runtime: Runtime, totals: dict[str, Tensor], size: Tensor) -> tuple[dict[str, float], float, int]:
    """Means of what was measured over all processes, the gradient's norm, and the signal that any of them caught."""
    caught = torch.tensor([float(runtime.caught == number) for number in SIGNALS], dtype=torch.float64)
    numbers = torch.cat([*totals.values(), caught.to(size.device)])
    *numbers, length = torch.cat([runtime.world.sum(numbers), size.double().reshape(1)]).tolist()
    means = {name: numbers[2 * i] / numbers[2 * i + 1] for i, name in enumerate(totals) if numbers[2 * i + 1]}
    signals = [number for number, count in zip(SIGNALS, numbers[-len(SIGNALS) :], strict=True) if count]
    return means, length, signals[0] if signals else 0


@torch.no_grad()
def culprits(run: Run, task: Task, n: int) -> list[str]:
    """The images of step `n` whose own loss is NaN or infinite; all of the batch where each by itself is fine."""
    bad = torch.zeros(task.settings.batch_size)
    for row in (row for rows in task.rows for row in rows if not task.whole):
        one = range(row, row + 1)
        losses = [evaluated(run, task, player, n, one, task.batch(n, one))[0] for player in task.players]
        bad[row] = not all(loss.isfinite() for loss in losses)
    rows = run.world.sum(bad).nonzero().flatten().tolist()
    return task.data.names(task.order(n)[rows or slice(None)])


def left_out(run: Run, task: Task, training: Training, n: int, done: Done, log: Metrics | None) -> None:
    """Name an update that was left out, and the images in question."""
    with evaluating(task):  # one row has no statistics
        names = culprits(run, task, n)
    listed = ", ".join(names[:8]) + " ..." * (len(names) > 8)
    run.runtime.say(f"{task.name}: step {n + 1} left out, {done.reason}: {listed}")
    if log:
        log.skipped(n + 1, done.reason, names)


def diverged(task: Task, what: str) -> DivergedError:
    fix = f"lower train.{task.name}.lr and go on with --accept-changes, or leave those images out"
    return DivergedError(f"{task.name}: {what}; the checkpoints are finite: {fix}")


def look(run: Run, task: Task, training: Training, n: int, log: Metrics | None) -> bool:
    """Measure and show what the averaged weights have learnt; whether to keep their checkpoint as the best."""
    began = time.monotonic()
    with averaged(task, training):
        try:
            measured = task.validate()
            helps = log or divided(run, task)  # where weights are divided, every process has to
            drawn = task.pictures() if helps else None
        except DivergedError as error:  # whose fix is for whoever only draws
            raise diverged(task, f"after step {n} {str(error).partition('; ')[0]}") from error
    if log and drawn:
        path, (pictures, values) = run.dir / "samples" / f"{task.name}-{n:08d}.png", drawn
        files.write_file(path, images.encode_png(images.grid(pictures, 8), None), force=True)
        if task.captions:
            files.write_file(path.with_name("captions.json"), json.dumps(task.captions).encode(), force=True)
        log.look(n, values | measured, path)
        report.write(run.dir)
        if measured:
            task.looks.told(n, began, measured)
    return task.looks.seen(n, measured)


@contextlib.contextmanager
def averaged(task: Task, training: Training) -> Iterator[None]:
    """The players with their averaged weights, in evaluation mode."""
    training.exchange()
    try:
        with evaluating(task):
            yield
    finally:
        training.exchange()


@contextlib.contextmanager
def evaluating(task: Task) -> Iterator[None]:
    """The players' modules in evaluation mode."""
    for player in task.players.values():
        player.module.eval()
    try:
        yield
    finally:
        for player in task.players.values():
            player.module.train()


def commit(run: Run, task: Task, training: Training, saver: Saver, n: int, skipped: int) -> None:
    """Begin to save step `n`: the checkpoint, the model folder of its averaged weights, and what is no longer kept."""
    largest = torch.stack([t.abs().max() for t in training.tensors("weights").values() if t.numel()]).isfinite().all()
    if not run.world.all(bool(largest)):
        raise diverged(task, f"weights are NaN or infinite after step {n}")
    cfg, world, updates = run.runtime.cfg, run.world, {each.name: each.updates for each in training.learners}
    about = {"stage": task.name, "step": n, "skipped": skipped, "updates": updates}
    about |= {"scaler": run.runtime.scaler.state_dict(), "processes": world.size, "task": task.state()}
    looks, best = task.looks, task.looks.best  # as they are now
    if world.rank == 0:
        run.budget.write()
    about |= {"best": best} if best else {}

    def publish(checkpoint: Path) -> None:
        if task.publishes:
            task.publish(looks.result(checkpoint, best), run.dir / task.publishes)

    def write(memory: Snapshot) -> None:
        state.save(run.checkpoints / f"{task.name}-{n:08d}", memory, training.places, about, world, publish)
        if world.rank == 0:
            kept = best["step"] if best and looks.keeps else None
            state.prune(run.checkpoints, task.name, cfg.keep, cfg.keep_every, kept)

    saver.begin(training, write)


@contextlib.contextmanager
def enough_memory(cfg: config.Config, name: str = "") -> Iterator[None]:
    """Says which setting to change where memory does not suffice for a stage, or for the model."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if not name:
            raise ResourceError("out of memory; make the networks smaller, or lower data.resolution") from error
        stage = cfg.train.stage(name)
        more = next((k for k in range(stage.accumulate + 1, stage.batch_size + 1) if stage.batch_size % k == 0), 0)
        fix = f"set train.{name}.accumulate={more}" if more else "lower data.resolution"
        fix += "" if cfg.train.gradient_checkpointing else ", or train.gradient_checkpointing=true"
        raise ResourceError(f"{name}: out of memory at {stage.rows} rows at once; {fix}") from error
