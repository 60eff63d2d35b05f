"""From prompts on the command line or stdin to PNG files: what `tinydiff generate` does between parsing and drawing.

Prompts are drawn in batches as they come in; each image is written as soon as its batch is done. Under torchrun the
first process reads the prompts and the batches are dealt out.
"""

from __future__ import annotations

import itertools
import json
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import images, pipeline, processes
from tinydiff.diffusion.noise import Seed
from tinydiff.editing import Edit
from tinydiff.errors import ResourceError, UsageError
from tinydiff.files import shown, write_file
from tinydiff.pipeline import Backend, Request
from tinydiff.progress import Progress
from tinydiff.text.prompts import Branch, blend, parse

NUMBERED = "%04d.png"
MAX_PROMPT = 10_000  # characters
MAX_LINE = 2**20  # bytes read of stdin before a line's end is waited for no longer: it is no prompt
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Job:
    """One image to draw."""

    index: int
    prompt: str
    seed: Seed
    toward: str | None = None  # on the way to this prompt
    share: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """A finished image: uint8 (H, W, 3), everything needed to draw it again, and its share of the batch's seconds."""

    index: int
    pixels: np.ndarray
    settings: dict[str, Any]
    seconds: float


def refuse_existing(path: Path, force: bool) -> None:
    """UsageError, before anything is drawn, where a file would be lost. Of several processes the first one looks."""
    if processes.rank() == 0 and path.exists() and not force:
        raise UsageError(f"{shown(path)}: exists; use --force to replace it, or another -o")


def refuse_many(output: str) -> None:
    """UsageError where several processes would write one file."""
    if processes.world() > 1:
        raise UsageError(f"-o {output}: several processes cannot write one file; give a folder, such as out/")


class Reel:
    """One file of many frames: side by side in a PNG, or moving in a .webp, .gif or .apng (there and back again)."""

    MOVING = (".webp", ".gif", ".apng")

    def __init__(self, output: str, force: bool):
        refuse_many(output)
        self.path, self.force, self.drawn = Path(output), force, list[Drawn]()
        if self.path.suffix.lower() not in (".png", *self.MOVING):
            raise UsageError(
                f"-o {output}: frames go to a .png, .webp, .gif or .apng file, a folder, or out/{NUMBERED}"
            )
        refuse_existing(self.path, force)

    def write(self, image: Drawn, settings: dict[str, Any] | None) -> str:
        self.drawn.append(replace(image, settings=settings or {}))
        return str(self.path)

    def close(self) -> None:
        """Write the file; nothing where nothing was drawn."""
        if not self.drawn:
            return
        stack = np.stack([image.pixels for image in self.drawn])
        if self.path.suffix.lower() in self.MOVING:
            data = images.encode_moving(np.concatenate([stack, stack[-2:0:-1]]), self.path.suffix.lower())
        else:
            strip, settings = images.grid(stack, len(stack), gap=0), self.drawn[0].settings
            data = images.encode_png(strip, {**settings, "frames": len(stack)} if settings else None)
        write_file(self.path, data, force=self.force)


class Sink:
    """Where images go: stdout (-), a numbered pattern, a folder, or a file (numbered too when there are many)."""

    def __init__(self, output: str, force: bool, many: bool):
        self.output, self.force = output, force
        if output == "-":
            refuse_many(output)
            if sys.stdout is None:
                raise UsageError("-o -: stdout is closed; give a file")
            if sys.stdout.isatty():
                raise UsageError("-o -: PNG bytes do not belong on a terminal; redirect stdout or give a file")
            return
        path = Path(output)
        if "%" in output:
            self.pattern = output
        elif output.endswith("/") or path.is_dir():
            self.pattern = f"{output.rstrip('/')}/{NUMBERED}"
        else:
            self.pattern = str(path.with_name(f"{path.stem}-%04d{path.suffix}")) if many else ""
        first = self.path(0)
        if first.suffix.lower() != ".png":
            raise UsageError(f"-o {output}: images are written as PNG; give a name that ends in .png")
        refuse_existing(first, force)

    def path(self, index: int) -> Path:
        if not self.pattern:
            return Path(self.output)
        try:
            name = self.pattern % index
        except (TypeError, ValueError):
            name = self.pattern
        if name == self.pattern or name == self.pattern % (index + 1):
            raise UsageError(f"-o {self.output}: no number pattern; write one like out/{NUMBERED}")
        return Path(name)

    def close(self) -> None:
        """Every image is written already."""

    def write(self, image: Drawn, settings: dict[str, Any] | None) -> str:
        """Write one image; returns its path, '-' for stdout."""
        data = images.encode_png(image.pixels, settings)
        if self.output == "-":
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return "-"
        path = self.path(image.index)
        write_file(path, data, force=self.force)
        return str(path)


def read_prompts(prompt: str) -> Iterator[str | None]:
    """The prompt, or stdin's lines for '-': None means that no further line is waiting at this moment."""
    if prompt == "-":
        return _stdin()
    if not prompt.strip():
        raise UsageError("the prompt is empty; say what to draw, such as 'red heart'")
    understood(clean(prompt))  # says what is wrong with it before anything is drawn
    return iter([clean(prompt)])


def clean(text: str) -> str:
    """One line of valid Unicode without control characters and terminal colours."""
    valid = COLOURS.sub(" ", text.encode("utf-8", "replace").decode("utf-8"))
    return " ".join("".join(c if c.isprintable() or c in "\u200d\ufe0f" else " " for c in valid).split())


def understood(prompt: str, toward: str | None = None, share: float = 0.0) -> list[Branch]:
    """The prompt's branches, or those on the way to another; UsageError names the prompt too, it may be one of many."""
    for text in (prompt, toward or ""):
        refuse_long(text)
    try:
        return parse(prompt) if toward is None else blend(prompt, toward, share)
    except UsageError as error:
        raise UsageError(f"{error} (in {prompt[:60]!r})") from None


def refuse_long(text: str) -> None:
    """UsageError for a prompt so long that what the network looks at would fill the memory."""
    if len(text) > MAX_PROMPT:
        raise UsageError(f"prompt: {len(text)} characters are over {MAX_PROMPT}; shorten it (it begins {text[:60]!r})")


def _stdin() -> Iterator[str | None]:
    lines: queue.Queue[bytes | OSError | None] = queue.Queue(1024)

    def read() -> None:
        try:
            if sys.stdin:  # a reader of our own: Python aborts where it ends while a thread is reading its own one
                with open(sys.stdin.fileno(), "rb", closefd=False) as stdin:
                    while line := stdin.readline(MAX_LINE):
                        lines.put(line)
            lines.put(None)
        except OSError as error:  # stdin is open for writing only, say
            lines.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=0.02)
        except queue.Empty:
            yield None
            line = lines.get()
        if isinstance(line, OSError):
            raise ResourceError(f"stdin: {line.strerror}; give it prompts, one a line") from line
        if line is None:
            return
        if text := clean(line.decode("utf-8", "replace").lstrip("\ufeff")):
            yield text


def jobs(prompts: Iterator[str | None], seed: int | None, count: int) -> Iterator[Job | None]:
    """`count` jobs a prompt; image i of the whole call has seed + i."""
    start, indices = secrets.randbelow(2**31) if seed is None else seed, itertools.count()
    for prompt in prompts:
        if prompt is None:
            yield None
        else:
            yield from (Job(index, prompt, (start + index) % 2**63) for index in itertools.islice(indices, count))


def frames(prompt: str, toward: str | None, seeds: Sequence[int], count: int) -> Iterator[Job]:
    """`count` jobs on the way from one prompt to another and from one seed to the next, ends included."""
    for index in range(count):
        share = index / max(1, count - 1)
        at = share * (len(seeds) - 1)
        i = min(int(at), len(seeds) - 2)
        seed = seeds[0] if len(seeds) == 1 else (seeds[i], seeds[i + 1], at - i)
        yield Job(index, prompt, seed, toward, share)


def batches(items: Iterator[Job | None], size: int) -> Iterator[list[Job]]:
    """Up to `size` jobs at once, fewer when no more are waiting."""
    batch: list[Job] = []
    for job in itertools.chain(items, [None]):
        batch += [job] if job else []
        if batch and (len(batch) == size or job is None):
            yield batch
            batch = []


def shares(items: Iterator[Job | None], size: int) -> Iterator[list[Job]]:
    """This process's batches: all of them, or under torchrun every n-th, each full while there are jobs."""
    if processes.world() == 1:
        yield from batches(items, size)
        return
    full = batches((job for job in items if job), size)
    for data in processes.dealt(json.dumps([asdict(job) for job in batch]).encode() for batch in full):
        yield [job_of(values) for values in json.loads(data)]


def job_of(values: dict[str, Any]) -> Job:
    """A job from its JSON, where a way between two seeds is a list."""
    job = Job(**values)
    return replace(job, seed=tuple(values["seed"])) if isinstance(values["seed"], list) else job


def draw(
    backend: Backend, items: Iterator[Job | None], negative: str, request: Request, size: int, edit: Edit | None = None
) -> Iterator[Drawn]:
    """Every job's image, in order; under torchrun only those of rank 0's `items`, each drawn by one of the processes."""
    negative, first = clean(negative), processes.rank() == 0
    refuse_long(negative)
    noted = set() if first else {negative}
    for batch in shares(items, size):
        prompts = [understood(job.prompt, job.toward, job.share) for job in batch]
        for text in dict.fromkeys([negative, *(branch.text for branches in prompts for branch in branches)]):
            note_of_parts(backend, text, noted)
        last = f" to {batch[-1].index + 1}" if len(batch) > 1 else ""
        bar = Progress(f"image {batch[0].index + 1}{last}", request.steps)
        on_step = bar.update if bar.bar and first else lambda step: None
        begun, seeds, negatives = time.monotonic(), [job.seed for job in batch], [negative] * len(batch)
        pixels = pipeline.generate(backend, prompts, seeds, request, negatives, on_step, edit)
        seconds = (time.monotonic() - begun) / len(batch)
        for job, image in zip(batch, pixels, strict=True):
            settings = {"prompt": job.prompt, "negative": negative, "seed": job.seed, **asdict(request)}
            settings |= {"toward": job.toward, "share": job.share} if job.toward is not None else {}
            settings |= {"strength": edit.strength} if edit else {}
            settings |= {"model": backend.description.path.name, "backend": backend.name}
            yield Drawn(job.index, image, settings, seconds)


def note_of_parts(backend: Backend, text: str, noted: set[str]) -> None:
    """Say, once, that a text is longer than the model reads at a time, and where its second part begins."""
    tokenizer = next(iter(backend.tokenizers.values()))
    if text not in noted and (rest := tokenizer.cut(text)):
        limit = tokenizer.max_length
        print(f"note: the model reads {limit} tokens at a time; read in parts, from here on: {rest!r}", file=sys.stderr)
    noted.add(text)
