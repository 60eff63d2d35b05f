"""Training at three altitudes: `run` lists the stages, `stage` owns one loop, `step` is loss, backward, update.

It knows nothing of what is trained (that is a task of `stages.py`) nor of the command line.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinydiff import config, files, images, report
from tinydiff.checkpoints import folder
from tinydiff.data import latents
from tinydiff.data.dataset import Images, open_source
from tinydiff.errors import DivergedError, UsageError, UserError
from tinydiff.text.labels import LEAST, Labels
from tinydiff.text.sentencepiece import T5Tokenizer
from tinydiff.text.tokenizer import Tokenizer
from tinydiff.training import state
from tinydiff.training.optim import Average, adamw, clip, learning_rate
from tinydiff.training.progress import Progress
from tinydiff.training.stages import AutoencoderTask, DenoiserTask, Task

TOKENIZERS = {"clip": Tokenizer, "t5": T5Tokenizer, "class": Labels}


class Interrupted(UserError):
    """A signal asked the run to stop; everything is saved. `code` is the exit code."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


def run(cfg: config.Config, run_dir: Path, stage_name: str | None = None) -> Path:
    """Train the stages in order, continuing what the run directory holds. Returns the model folder."""
    with files.lock(run_dir), Runtime(cfg) as runtime:
        claim(cfg, run_dir)
        state.sweep(run_dir)
        data = Images(open_source(cfg.data, cfg.train.seed), cfg.data)
        report_skipped(data, runtime)
        model = folder.build(cfg, tokenizer_of(cfg, run_dir, data), cfg.train.seed)
        for part in model.parts().values():
            part.to(runtime.device)
            if cfg.train.channels_last:
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ended = stage(runtime, run_dir, AutoencoderTask(cfg, model, data, runtime.device), lambda: None)
        if stage_name == "autoencoder":
            return run_dir
        finish_autoencoder(model, ended)
        cached = latents.cached(run_dir / "latents", data, model.vae, encoding(runtime, len(data)))
        model.scaling_factor = 1 / float(
            cached[0].pow(2).mean().add(cached[1].pow(2).mean()).sub(cached[0].mean().pow(2)).sqrt()
        )
        task = DenoiserTask(cfg, model, data, cached, runtime.device)
        stage(
            runtime,
            run_dir,
            task,
            lambda: folder.save(run_dir / "model", model, cfg, replace=True),
        )
    return run_dir / "model"


def encoding(runtime: Runtime, total: int) -> Callable[[int, int], None]:
    """Progress of filling the latent cache, and the place where a signal stops it."""
    bar = Progress("encoding images", total)

    def progress(done: int, _: int) -> None:
        bar.update(done)
        if runtime.caught:
            raise Interrupted(runtime.caught, "stopped while encoding images; run the same command to go on")

    return progress


def published(run_dir: Path, cfg: config.Config) -> bool:
    """Whether the run's model folder is there and says what the configuration says."""
    path = run_dir / "model" / "tinydiff.toml"
    return path.exists() and path.read_text(encoding="utf-8") == config.to_toml(cfg)


def claim(cfg: config.Config, run_dir: Path) -> None:
    """Write the configuration of a new run; refuse another one for a run that has begun."""
    path = run_dir / "tinydiff.toml"
    if not path.exists():
        files.write_file(path, config.to_toml(cfg).encode())
        return
    old, new = config.flat(config.load(path)), config.flat(cfg)
    free = ("generate.", "train.threads", "train.keep", "train.device", ".save_every", ".sample_every")
    changed = [k for k in new if new[k] != old[k] and not any(f in k for f in free)]
    if changed:
        what = ", ".join(f"{k} ({old[k]} -> {new[k]})" for k in changed[:10])
        raise UsageError(f"{run_dir}: the run was begun with other settings: {what}; use --fresh or another --run-dir")
    if new != old:
        files.write_file(path, config.to_toml(cfg).encode(), force=True)


def report_skipped(data: Images, runtime: Runtime) -> None:
    skipped = data.source.skipped
    if skipped:
        shown = "; ".join(f"{path}: {reason}" for path, reason in skipped[:5])
        runtime.say(
            f"skipped {len(skipped)} of {len(skipped) + len(data.source)} images: {shown}"
            + (" ..." if len(skipped) > 5 else "")
        )


def tokenizer_of(cfg: config.Config, run_dir: Path, data: Images) -> Any:
    """The run's tokenizer: the first time CLIP's is trained on the captions, T5's copied, or classes are listed."""
    path, text, source = run_dir / "tokenizer", cfg.text_encoder, data.source
    count = min(len(source), 200_000)
    if path.exists():
        return TOKENIZERS[text.kind].load(path)
    if text.kind == "t5":
        made: Any = T5Tokenizer.load(Path(text.path) / "tokenizer", text.max_position_embeddings)
    elif text.kind == "class":
        labels = (source.captions(i)[0] for i in range(len(source)))
        names = sorted({label.strip().lower(): label for label in labels if label.strip()}.values())
        made = Labels(names, max(LEAST, len(names)))
    else:
        captions = [c for i in range(count) for c in source.captions(i)]
        made = Tokenizer.train(captions, text.vocab_size, text.max_position_embeddings)
    with files.committed(path) as temporary:
        made.save(temporary)
    return TOKENIZERS[text.kind].load(path)


def finish_autoencoder(model: folder.Model, average: Average) -> None:
    """The averaged weights become the autoencoder, and stay."""
    average.copy_to(model.vae)
    model.vae.requires_grad_(False).eval()


class Runtime:
    """Device, precision, threads and signals of a run; a context manager that puts the signal handlers back."""

    def __init__(self, cfg: config.Config):
        self.config, self.cfg = cfg, cfg.train
        cuda = torch.cuda.is_available()
        if self.cfg.device == "cuda" and not cuda:
            raise UsageError("train.device: torch sees no CUDA device here; use 'auto' or 'cpu'")
        self.device = torch.device("cuda" if cuda and self.cfg.device != "cpu" else "cpu")
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}.get(self.cfg.precision, self.fast())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.caught = 0

    def fast(self) -> torch.dtype | None:
        """bfloat16 where the hardware multiplies it, else None for float32."""
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else None

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def attention(self) -> contextlib.AbstractContextManager:
        """On a CPU the plain formula trains faster than the fused kernel at the few hundred tokens of a small latent."""
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()

    def __enter__(self) -> Runtime:
        if self.cfg.threads:
            torch.set_num_threads(self.cfg.threads)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        self.previous = {n: signal.signal(n, self.catch) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def catch(self, number: int, _: object) -> None:
        """The first signal ends the run after its step; a second interrupt ends it at once."""
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = self.caught or number

    def say(self, text: str) -> None:
        Progress("", 0).say(text)


def stage(runtime: Runtime, run_dir: Path, task: Task, publish: Any) -> Average:
    """Run one task from its newest checkpoint to its last step; returns the averaged weights."""
    average, optimizer = Average(task.module, task.stage.ema), adamw(task.module.parameters(), task.stage)
    checkpoints, cfg = run_dir / "checkpoints", task.stage
    start = resume(runtime, checkpoints, task, average, optimizer)
    if start >= cfg.steps:
        with averaged(task.module, average):
            publish() if not published(run_dir, runtime.config) else None
        return average
    bar, log = Progress(task.name, cfg.steps, start), Metrics(run_dir, task.name, start)
    for n in range(start, cfg.steps):
        values = step(runtime, task, average, optimizer, n)
        log.add(n + 1, values)
        bar.update(n + 1, f"loss {log.recent:.4f}")
        last = n + 1 == cfg.steps
        if last or (n + 1) % cfg.sample_every == 0:
            with averaged(task.module, average):
                look(run_dir, task, n + 1, log)
        if last or (n + 1) % cfg.save_every == 0 or runtime.caught:
            with averaged(task.module, average):
                publish()  # before the checkpoint: whoever finds the last checkpoint has nothing left to do
            state.save(
                checkpoints, task.name, n + 1, task.module, average, optimizer, {"scaler": runtime.scaler.state_dict()}
            )
            state.prune(checkpoints, task.name, n + 1, runtime.cfg.keep)
        if runtime.caught and not last:
            message = f"stopped and saved at step {n + 1} of {task.name}; run the same command to go on"
            raise Interrupted(runtime.caught, message)
    return average


def resume(runtime: Runtime, checkpoints: Path, task: Task, average: Average, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest valid checkpoint into the task; the number of steps it has done."""
    found = state.newest(checkpoints, task.name, runtime.say)
    if not found:
        return 0
    path, saved = found
    state.load(path, task.module, average, optimizer)
    if saved["scaler"]:
        runtime.scaler.load_state_dict(saved["scaler"])
    if saved["step"] < task.stage.steps:
        runtime.say(f"{task.name}: going on from step {saved['step']}")
    return saved["step"]


def step(runtime: Runtime, task: Task, average: Average, optimizer: torch.optim.Optimizer, n: int) -> dict[str, float]:
    """One update: gradients over the parts of the batch, clipped, applied, averaged."""
    cfg = task.stage
    rate = learning_rate(n, cfg)
    for group in optimizer.param_groups:
        group["lr"] = rate
    size, total, terms = cfg.batch_size // cfg.accumulate, 0.0, {}
    for part in range(cfg.accumulate):
        with runtime.autocast(), runtime.attention():
            loss, more = task.loss(n, range(part * size, (part + 1) * size))
        runtime.scaler.scale(loss / cfg.accumulate).backward()
        total += loss.item() / cfg.accumulate
        terms = {k: terms.get(k, 0.0) + v.item() / cfg.accumulate for k, v in more.items()}
    runtime.scaler.unscale_(optimizer)
    norm = clip(task.module.parameters(), cfg.clip)
    if not math.isfinite(total) or not (math.isfinite(norm) or runtime.dtype is torch.float16):
        raise DivergedError(
            f"{task.name}: loss {total}, gradient {norm} at step {n + 1}; lower train.{task.name}.lr and run again"
        )
    runtime.scaler.step(optimizer)
    runtime.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    average.update(n, last=n + 1 == cfg.steps)
    return {"loss": total, "lr": rate, "grad_norm": norm} | terms


@contextlib.contextmanager
def averaged(module: nn.Module, average: Average) -> Iterator[None]:
    """The module holds the averaged weights inside, its own again outside."""
    own = copy.deepcopy([p.detach() for p in module.parameters()])
    average.copy_to(module)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(module.parameters(), own, strict=True):
                p.copy_(value)


def look(run_dir: Path, task: Task, n: int, log: Metrics) -> None:
    """Pictures of what the task has learnt, and the report that shows them."""
    pictures, values = task.pictures()
    (run_dir / "samples").mkdir(exist_ok=True)
    path = run_dir / "samples" / f"{task.name}-{n:08d}.png"
    files.write_file(path, images.encode_png(images.grid(pictures, 8), None), force=True)
    if task.captions:
        files.write_file(path.with_name("captions.json"), json.dumps(task.captions).encode(), force=True)
    log.write({"stage": task.name, "step": n, **values}) if values else None
    report.write(run_dir)


class Metrics:
    """`metrics.jsonl`: one JSON line every few steps; lines past the step that a run resumes from are cut off."""

    EVERY = 10

    def __init__(self, run_dir: Path, name: str, start: int):
        self.path, self.name = run_dir / "metrics.jsonl", name
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if (v := parse(line)) and (v["stage"] != name or v["step"] <= start)]
        files.write_file(self.path, "".join(f"{line}\n" for line in kept).encode(), force=True)
        self.recent, self.begun = math.nan, time.monotonic()

    def add(self, n: int, values: dict[str, float]) -> None:
        self.recent = values["loss"] if math.isnan(self.recent) else 0.98 * self.recent + 0.02 * values["loss"]
        if n % self.EVERY == 0:
            now = time.monotonic()
            rate, self.begun = self.EVERY / max(1e-9, now - self.begun), now
            self.write({"stage": self.name, "step": n, **values, "steps_per_second": rate})

    def write(self, values: dict[str, Any]) -> None:
        line = json.dumps({k: round(v, 7) if isinstance(v, float) else v for k, v in values.items()})
        with self.path.open("a") as file:
            file.write(line + "\n")


def parse(line: str) -> dict[str, Any] | None:
    """A metrics line, or None where a kill left half of one."""
    try:
        return json.loads(line)
    except ValueError:
        return None
