"""Everything that a CUDA machine can show, in one run: parity, speed, memory, training, and the tests that need a GPU.

    python scripts/gpu.py [SECTION ...] [--minutes 8] [--folder DIR] [--docs docs/gpu.md]
    python scripts/gpu.py --device cpu --tiny       the same with tiny models on a CPU, to try the script itself

A SECTION is a regular expression for how names of sections begin; without any all run, what is worth most first. Each runs in
a process and a time of its own: what crashes, hangs or lacks a package is "not run" with the reason, and the rest goes on.
Bundles are exported in the background meanwhile. Prints a table, and puts its rows into that of docs/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_sections as of
from gpu_sections import BATCHES, KINDS, Place, Row

from tinydiff.system import one_line, shown

DOCS = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
BETWEEN = re.compile(r"(?<=<!-- rows -->\n).*(?=<!-- end of rows -->)", re.DOTALL)
HEAD = "| what | measured | goal | on |\n|---|---|---|---|\n"
NOT_RUN = "not run"
LAST = 0.12  # share of the time that is kept for the tests
# Imported once for all sections: on CUDA nothing that could open the device, which no fork can then use.
PRELOADED = {"cuda": ("onnxruntime",)}
PRELOADED["cpu"] = ("onnxruntime", "torch._dynamo", "diffusers.models", "transformers.models.clip.modeling_clip")
OURS, THEIRS = ("torch fp16", "onnx fp16", "torch fp16 compiled"), "diffusers compiled"
RUNTIMES = (*OURS, "diffusers", THEIRS)
PARITY = [f"{name} {precision}" for name in ("torch", "onnx") for precision in ("fp32", "fp16", "bf16", "int8")]
PARITY.remove("torch int8")


@dataclass(frozen=True)
class Section:
    """Its measurement, its rows with their goals, and the most of the whole time that it may take."""

    run: Callable[[Place], Iterator[Row]]
    rows: dict[str, str] = field(default_factory=dict)
    most: float = 0.1


def called(kind: str, batch: int, runtime: str) -> str:
    return f"{KINDS[kind]}, batch {batch}, {runtime}"


def speeds(kind: str, runtime: str) -> Section:
    rows = dict.fromkeys((called(kind, batch, runtime) for batch in BATCHES), "")
    rows |= {f"{called(kind, BATCHES[0], runtime)}, kernels": ""}
    slow = "compiled" in runtime or "onnx" in runtime
    return Section(partial(of.speed, kind=kind, runtime=runtime), rows, 0.25 if slow else 0.1)


def one(run: Callable[..., Iterator[Row]], row: str, goal: str = "", most: float = 0.1, **given: object) -> Section:
    return Section(partial(run, **given), {row: goal}, most)


def trains(end: str, most: float, **given: object) -> Section:
    row = f"training DiT-L/2, bf16, batch 128{end}"
    return Section(
        partial(of.training, row=row, **given), {row: "≥ 50 % of the card's peak", f"{row}, kernels": ""}, most
    )


ALL = {f"{kind} {runtime}": speeds(kind, runtime) for kind in KINDS for runtime in RUNTIMES}
ALL |= {f"parity {r}": one(of.parity, f"parity, {r}", runtime=r) for r in PARITY}
ALL |= {
    f"shipped {r}": one(of.shipped, f"shipped model, batch 64, {r}", "≥ 300 images/s", runtime=r)
    for r in (*OURS, "onnx fp32")
}
ALL |= {
    f"first image {kind} {r}": one(
        of.first_image, f"first image, {KINDS.get(kind, 'shipped model')}, {r}", kind=kind, runtime=r
    )
    for kind, r in (("shipped", "onnx fp16"), ("shipped", "torch fp16"), ("sd15", "torch fp16"))
}
ALL |= {
    "matrix product": Section(of.products, {"matrix product, fp16": "", "matrix product, bf16": ""}),
    "training": trains("", 0.15, compiled=False),
    "training compiled": trains(", compiled", 0.2, compiled=True),
    "training muon": trains(", compiled, Muon", 0.2, compiled=True, changed=of.MUON),
    "nccl": one(of.nccl, "nccl in a world of one", "as a lone process"),
    "tests": one(of.tests, "pytest -m gpu", "all pass", 1.0),
}
# What begins so, by worth; what needs exported graphs comes after what does not.
ORDER = ("matrix", "parity torch", "sd15 torch fp16$", "sd15 diffusers", "training", "nccl", "shipped torch fp16$")
ORDER += ("parity onnx", "shipped onnx", "sd15 onnx", "first image", "dit-xl", "sd15", "shipped", "sd21", "tests")


def begins(name: str, starts: Sequence[str]) -> int:
    """Which of some expressions a name begins with first, counted from 1; 0 for none."""
    return next((i + 1 for i, start in enumerate(starts) if re.match(start, name)), 0)


SECTIONS = {name: ALL[name] for name in sorted(ALL, key=lambda name: begins(name, ORDER))}
RATIOS = {
    f"{called(kind, batch, ours)} / {THEIRS}": (called(kind, batch, ours), called(kind, batch, THEIRS))
    for kind in KINDS
    for batch in BATCHES
    for ours in OURS
}
GOALS = {name: goal for section in SECTIONS.values() for name, goal in section.rows.items()}
GOALS |= {name: "≤ 0.9" if name.startswith(f"{KINDS['sd15']}, ") else "" for name in RATIOS}
GOALS[called("sd15", 8, "onnx fp16")] = "≥ 50 % of the matrix product"
Rows = dict[str, tuple[float | None, str]]  # by name: a number, and what the table says


# ---- a section -------------------------------------------------------------------------------------------------------


def carried_out(name: str, section: Section, at: Place, limit: float) -> Rows:
    """The rows of a section, those that it has not given with the reason."""
    told = at.folder / "logs" / f"{name.replace('/', '-')}.jsonl"
    reason = ended(forked(lambda: recorded(section, at, told), told.with_suffix(".log")), limit)
    lines = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    given: Rows = {line[0]: (line[1], line[2]) for line in lines if line[0]}
    reason = next((line[2] for line in lines if not line[0]), reason or "said nothing")
    return unrun(section, reason) | given


def unrun(section: Section, reason: str) -> Rows:
    return dict.fromkeys(section.rows, (None, f"{NOT_RUN}: {reason}"))


def recorded(section: Section, at: Place, told: Path) -> None:
    """Write the rows as they come, then the reason why there are no more."""
    with open(told, "w") as file:
        try:
            for row in section.run(at):
                print(json.dumps(row), file=file, flush=True)
        except BaseException as error:
            text = str(error) or "no message"
            print(json.dumps(("", None, shown(one_line(f"{type(error).__name__}: {text}")))), file=file, flush=True)
            raise


def forked(call: Callable[[], object], log: Path) -> int:
    """A process that does it, in a session of its own; what it says goes to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        call()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def ended(pid: int, limit: float) -> str:
    """Wait for a process, for `limit` seconds at most; then none of its session is left. Why it ended, if it did not itself."""
    end, done, status = time.monotonic() + limit, 0, 0
    try:
        while not done and time.monotonic() < end:
            time.sleep(0.02)
            done, status = os.waitpid(pid, os.WNOHANG)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if not done:
            os.waitpid(pid, 0)
    if not done:
        return f"took over {limit:.0f} s"
    return f"ended by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else ""


def exports(at: Place, wanted: dict[str, Section]) -> list[int]:
    """Processes that export in the background what sections will ask for: of the shipped model, and of the large ones."""
    asked = [name.partition(" onnx ") for name in wanted if " onnx " in name]
    pairs = [(next((k for k in KINDS if k in before), "shipped"), precision) for before, _, precision in asked]

    def work(shipped: bool) -> None:
        of.few_threads()
        for kind, precision in dict.fromkeys(pairs):
            with contextlib.suppress(Exception):  # which the section that asks for it will tell
                if (kind == "shipped") == shipped:
                    of.bundle(at, kind, precision)

    halves = {kind == "shipped" for kind, _ in pairs}
    return [forked(partial(work, half), at.folder / "logs" / f"exports-{half}.log") for half in halves]


# ---- all of them -----------------------------------------------------------------------------------------------------


def run(names: list[str], at: Place, minutes: float) -> Rows:
    """The rows of the sections that begin with these names, in no more than so many minutes."""
    wanted = {name: section for name, section in SECTIONS.items() if not names or begins(name, names)}
    if not wanted:
        sys.exit(f"{shown(names)}: no such section; there are {', '.join(SECTIONS)}")
    end, rows = time.monotonic() + 60 * minutes, Rows()
    background = exports(at, wanted)
    for name, section in wanted.items():
        began = time.monotonic()
        kept = LAST * 60 * minutes if "tests" in wanted and name != "tests" else 0
        left = end - time.monotonic() - kept
        limit = min(left, section.most * 60 * minutes)
        rows |= carried_out(name, section, at, limit) if left > 1 else unrun(section, "no time left")
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    for process in background:
        ended(process, 0)
    for name, pair in RATIOS.items():
        a, b = (rows.get(row, (None, ""))[0] for row in pair)
        if a and b:
            rows[name] = a / b, f"{a / b:.3f}"
    return rows


def table(rows: Rows, on: str, before: str = "") -> str:
    """All rows as markdown: those that were measured, else what a table from before says of them."""
    kept = {line.split(" | ")[0][2:]: line for line in before.splitlines() if f" | {NOT_RUN}" not in line}

    def line(name: str) -> str:
        number, text = rows.get(name, (None, NOT_RUN))
        if number is None and name in kept:
            return kept[name]
        return f"| {name} | {text.replace('|', '/')} | {GOALS[name]} | {'' if number is None else on} |"

    return HEAD + "".join(f"{line(name)}\n" for name in GOALS)


def machine(at: Place) -> str:
    """The card and the versions, asked for without opening the device."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    card = "an unknown card"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        card = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    card = card if at.device == "cuda" else f"CPU{', tiny models' * at.tiny}"
    versions = ["torch " + version("torch")]
    for name in ("onnxruntime-gpu", "onnxruntime", "diffusers"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    return ", ".join([card, *versions])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, help="where models are, or are to be, built; a temporary folder")
    parser.add_argument("--docs", type=Path, help="whose table gets the rows; docs/gpu.md where nothing is tiny")
    asked = parser.parse_args()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # which asks whether there is a GPU without opening it
    for name in PRELOADED[asked.device]:
        with contextlib.suppress(ImportError):  # which its sections will say
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as temporary:
        at = Place(asked.device, asked.tiny, asked.folder or Path(temporary))
        (at.folder / "logs").mkdir(parents=True, exist_ok=True)
        rows, on = run(asked.sections, at, asked.minutes), machine(at)
    print(table(rows, on), end="")
    if docs := asked.docs or (None if asked.tiny else DOCS):
        text = docs.read_text(encoding="utf-8")
        docs.write_text(BETWEEN.sub(lambda old: table(rows, on, old[0]), text), encoding="utf-8")


if __name__ == "__main__":
    main()
