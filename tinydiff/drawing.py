"""From prompts on the command line or stdin to PNG files: what `tinydiff generate` does between parsing and drawing.

Prompts are drawn in batches as they come in; each image is written as soon as its batch is done. Under torchrun the
first process reads the prompts and the batches are dealt out.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinydiff import images, pipeline, processes
from tinydiff.condition import Condition
from tinydiff.control import Control
from tinydiff.diffusion.noise import Seed
from tinydiff.editing import Edit
from tinydiff.errors import DivergedError, UsageError, UserError
from tinydiff.files import write_file
from tinydiff.pipeline import Backend, Request
from tinydiff.progress import Progress, note
from tinydiff.reading import Line, Reader, clean, understood
from tinydiff.system import named, one_line, shown

NUMBERED = ("%04d", ".png")  # what comes after the folder
B = TypeVar("B", bound=Sequence[Any])
T = TypeVar("T")
FEW = 2**21  # pixels of a batch
PATTERN = re.compile(r"%0?(?:1?[1-9]|[12]0)?d")


@dataclass(frozen=True)
class Job:
    """One image to draw."""

    index: int
    prompt: str
    seed: Seed
    toward: str | None = None  # on the way to this prompt
    share: float = 0.0
    line: int = 0  # of stdin


class Mistakes:
    """The lines of stdin that cannot be drawn, each said once on stderr: {line: exit code}."""

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}

    def add(self, job: Job, error: UserError) -> None:
        """Say it, or raise it where there are no other lines to draw."""
        if not job.line:
            raise error
        if job.line not in self.codes:
            print(one_line(f"tinydiff: line {job.line} of stdin: {error}"), file=sys.stderr)
        self.codes[job.line] = error.code

    def code(self) -> int:
        """The exit code of the first line that any process met; 0 without one, and in all processes but the first."""
        firsts = map(json.loads, processes.collected(json.dumps(sorted(self.codes.items())[:1]).encode()))
        return min(itertools.chain.from_iterable(firsts), default=(0, 0))[1]


@dataclass(frozen=True)
class Drawn:
    """A finished image: uint8 (H, W, 3), everything needed to draw it again, and its share of the batch's seconds."""

    index: int
    pixels: np.ndarray
    settings: dict[str, Any]
    seconds: float


def refuse_place(path: Path, force: bool) -> None:
    """Before anything is drawn: UsageError where a file would be lost, ResourceError where the system will not have it.

    Of several processes the first one looks.
    """
    if processes.rank():
        return
    with named(path):
        with contextlib.suppress(FileNotFoundError):  # any other error is one of writing, too
            os.lstat(path)
            if not force:
                raise UsageError(f"{shown(path)}: exists; use --force to replace it, or another -o")
        folder = next(each for each in path.absolute().parents if os.path.lexists(each))
        longest = max(len(os.fsencode(name)) for name in path.parts)
        code = (
            (not folder.is_dir() and errno.ENOENT)  # a link to nowhere
            or (not os.access(folder, os.W_OK | os.X_OK) and errno.EACCES)
            or (longest > os.pathconf(folder, "PC_NAME_MAX") and errno.ENAMETOOLONG)
        )
        if code:
            raise OSError(code, os.strerror(code), str(path))


def refuse_many(output: str) -> None:
    """UsageError where several processes would write one file."""
    if processes.world() > 1:
        raise UsageError(f"-o {shown(output)}: several processes cannot write one file; give a folder, such as out/")


class Reel:
    """One file of many frames: side by side in a PNG, or moving in a .webp, .gif or .apng (there and back again)."""

    MOVING = (".webp", ".gif", ".apng")

    def __init__(self, output: str, force: bool):
        refuse_many(output)
        self.path, self.force, self.drawn = Path(output), force, list[Drawn]()
        if self.path.suffix.lower() not in (".png", *self.MOVING):
            raise UsageError(
                f"-o {shown(output)}: frames go to a .png, .webp, .gif or .apng file, a folder, or out/{''.join(NUMBERED)}"
            )
        refuse_place(self.path, force)

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
        if not output:
            raise UsageError("-o: the name is empty; give a file, a folder such as out/, or - for stdout")
        path = Path(output)
        if os.path.isdir(output) or (output.endswith("/") and "%" not in output):
            self.name = (f"{output.rstrip('/')}/", *NUMBERED)
        elif "%" in output:
            self.name = parts(output)
        else:
            self.name = (str(path.with_suffix("")) + "-", NUMBERED[0], path.suffix) if many else (output, "", "")
        first = self.path(0)
        if first.suffix.lower() != ".png":
            raise UsageError(f"-o {shown(output)}: images are written as PNG; give a name that ends in .png")
        refuse_place(first, force)

    def path(self, index: int) -> Path:
        before, number, after = self.name
        return Path(before + (number % index if number else "") + after)

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


def parts(output: str) -> tuple[str, str, str]:
    """What comes before the %d of a name, the %d as it stands, and what comes after. UsageError for any other use of %."""
    match = PATTERN.search(output)
    before, number, after = (output[: match.start()], match[0], output[match.end() :]) if match else (output, "", "")
    if not number or "%" in before + after:
        fix = f"use it once, as %d or %04d, for the image's number, as in out/{''.join(NUMBERED)}"
        raise UsageError(f"-o {shown(output)}: % has no other meaning in a name; {fix}")
    return before, number, after


def jobs(prompts: Iterator[Line | None], seed: int | None, count: int) -> Iterator[Job | None]:
    """`count` jobs a prompt; image i of the whole call has seed + i."""
    start, indices = secrets.randbelow(2**31) if seed is None else seed, itertools.count()
    for prompt in prompts:
        if prompt is None:
            yield None
        else:
            for index in itertools.islice(indices, count):
                yield Job(index, prompt.text, (start + index) % 2**63, line=prompt.number)


def frames(prompt: str, toward: str | None, seeds: Sequence[int], count: int) -> Iterator[Job]:
    """`count` jobs on the way from one prompt to another and from one seed to the next, ends included."""
    for index in range(count):
        share = index / max(1, count - 1)
        at = share * (len(seeds) - 1)
        i = min(int(at), len(seeds) - 2)
        seed = seeds[0] if len(seeds) == 1 else (seeds[i], seeds[i + 1], at - i)
        yield Job(index, prompt, seed, toward, share)


def batches(items: Iterator[Job | None], size: int) -> Iterator[list[Job]]:
    """Up to `size` jobs at once, fewer when no more are waiting, which may be none."""
    batch: list[Job] = []
    for job in itertools.chain(items, [None]):
        batch += [job] if job else []
        if len(batch) == size or job is None:
            yield batch
            batch = []


def shares(items: Iterator[Job | None], size: int) -> Iterator[list[Job]]:
    """This process's batches: all of them, or under torchrun every n-th, each full while there are jobs."""
    if processes.world() == 1:
        yield from batches(items, size)
        return
    full = filter(None, batches((job for job in items if job), size))
    for data in processes.dealt(json.dumps([asdict(job) for job in batch]).encode() for batch in full):
        yield [job_of(values) for values in json.loads(data)]


def job_of(values: dict[str, Any]) -> Job:
    """A job from its JSON, where a way between two seeds is a list."""
    job = Job(**values)
    return replace(job, seed=tuple(values["seed"])) if isinstance(values["seed"], list) else job


def draw(
    backend: Backend,
    items: Iterator[Job | None],
    negative: str,
    request: Request,
    size: int,
    edit: Edit | None = None,
    mistakes: Mistakes | None = None,
    controls: Sequence[Control] = (),
    given: Condition | None = None,
) -> Iterator[Drawn]:
    """Every job's image, in order; under torchrun only those of rank 0's `items`, each drawn by one of the processes.

    A job that came from stdin and cannot be drawn is left out and added to `mistakes`. It keeps its number and its seed, so
    the other images do not depend on it.
    """
    negative, mistakes, reader = clean(negative), mistakes or Mistakes(), Reader(backend.tokenizers)
    reader.read(negative)
    if negative and backend.description.told_guidance:
        note("-n is unused: the model is told how strong guidance is, and of what is wanted alone")
    elif negative and not request.guided:
        note("-n is unused without guidance, which begins above a --cfg-scale of 1")
    if edit and not edit.steps(request.steps):
        note(f"--strength {edit.strength:g} is less than one of {request.steps} steps: nothing is drawn")

    def attempt(batch: list[Job], is_next: Callable[[], bool]) -> list[Drawn | tuple[Job, UserError]]:
        try:
            return list(drawn(backend, batch, negative, request, edit, is_next, controls, given))
        except (UsageError, DivergedError) as error:
            if len(batch) == 1 or not batch[0].line:
                return [(batch[0], error)]
            return [each for job in batch for each in attempt([job], is_next)]  # whichever it is, the others are drawn

    shared = shares(readable(items, reader, mistakes), size)
    for image in itertools.chain.from_iterable(in_turn(attempt, shared, size, at_once(backend, request, size))):
        if isinstance(image, Drawn):
            yield image
        else:
            mistakes.add(*image)


def at_once(backend: Backend, request: Request, size: int) -> int:
    """How many batches of a size are drawn at once: one where it is large, for its memory, or where there are other processes."""
    few = size * request.width * request.height <= FEW and processes.world() == 1
    return backend.at_once if few else 1


def in_turn(work: Callable[[B, Callable[[], bool]], T], given: Iterable[B], size: int, count: int) -> Iterator[T]:
    """What `work` makes of batches, in their order, `count` of them at once.

    It is given a function that says whether its batch is the next that is waited for. A batch of fewer than `size` says that
    no more may come for a while: nothing is kept back then.
    """
    if count == 1:
        yield from (work(batch, lambda: True) for batch in given if batch)
        return
    flying, done, pool = deque[Future[T]](), 0, ThreadPoolExecutor(count)
    try:
        for batch in itertools.chain(given, [()]):
            if batch:
                number = done + len(flying)
                flying.append(pool.submit(work, batch, lambda number=number: number == done))  # noqa: B023  as it is then
            while flying and (len(flying) > count or len(batch) < size):
                yield flying.popleft().result()
                done += 1
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # nobody waits for what is drawn yet when there is an error


def readable(items: Iterator[Job | None], reader: Reader, mistakes: Mistakes) -> Iterator[Job | None]:
    """The items whose prompts the model can be told; the others are added to `mistakes`."""
    last, fine = None, True
    for job in items:
        if job and last != (last := (job.line, job.prompt, job.toward)):
            try:
                reader.read(job.prompt, job.toward)
                fine = True
            except UsageError as error:
                mistakes.add(job, error)
                fine = False
        if job is None or fine:
            yield job


def drawn(
    backend: Backend,
    batch: Sequence[Job],
    negative: str,
    request: Request,
    edit: Edit | None,
    is_next: Callable[[], bool],
    controls: Sequence[Control] = (),
    given: Condition | None = None,
) -> Iterator[Drawn]:
    """The images of one batch, whose progress is shown while it is the next that is waited for."""
    prompts = [understood(job.prompt, job.toward, job.share) for job in batch]
    last = f" to {batch[-1].index + 1}" if len(batch) > 1 else ""
    bar = Progress(f"image {batch[0].index + 1}{last}", request.steps)
    visible = bar.bar and processes.rank() == 0

    def on_step(step: int) -> None:
        if visible and is_next():
            bar.update(step)

    begun, seeds, negatives = time.monotonic(), [job.seed for job in batch], [understood(negative)] * len(batch)
    shares = getattr(backend, "shares", None)
    spent = pipeline.Spent(shares, len(batch)) if shares else None
    pixels = pipeline.generate(backend, prompts, seeds, request, negatives, on_step, edit, controls, spent, given)
    seconds = (time.monotonic() - begun) / len(batch)
    for i, (job, image) in enumerate(zip(batch, pixels, strict=True)):
        settings = {"prompt": job.prompt, "negative": negative, "seed": job.seed, **asdict(request)}
        settings |= {"toward": job.toward, "share": job.share} if job.toward is not None else {}
        settings |= {"strength": edit.strength} if edit else {}
        settings |= {"control": [each.settings for each in controls]} if controls else {}
        settings |= {"blocks": [round(float(each[i]), 4) for each in spent.steps]} if spent else {}
        settings |= {"model": backend.description.path.name, "backend": backend.name}
        yield Drawn(job.index, image, settings, seconds)
