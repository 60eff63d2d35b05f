"""A training run as one self-contained HTML file: progress, curves and pictures.

`write` reads what the run directory holds (`tinydiff.toml`, `metrics.jsonl`, `samples/`) and puts `report.html` beside
it: inline SVG and PNG, no scripts, nothing fetched. Whatever is missing or half-written is left out. It knows file
formats, no network and no loop.
"""

from __future__ import annotations

import base64
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from tinydiff import charts, config
from tinydiff.charts import Series
from tinydiff.config import Config
from tinydiff.errors import UserError
from tinydiff.files import shown, write_file
from tinydiff.metrics import parse
from tinydiff.overfitting import ERROR, overfitting
from tinydiff.stages import STAGES, trained

STRIP = 8  # earlier pictures shown for each stage
MAX_PICTURE = 6 * 2**20  # bytes; a larger picture is named, not shown
MAX_PICTURES = 12 * 2**20  # bytes of all pictures
MAX_CAPTIONS = 64
WIDE = 1060  # pixels that a picture may take on a desktop
LARGE = 3  # charts, of losses
LEFT_OUT = 5  # updates and, of each, samples that are named
TEMPLATE = Path(__file__).with_name("report.html")
SAMPLE = re.compile(r"(.+)-(\d+)\.png")
PNG = b"\x89PNG\r\n\x1a\n"


def write(run_dir: Path) -> None:
    """Writes `run_dir/report.html`, whole or not at all. Raises ResourceError where the disk does not take it."""
    write_file(run_dir / "report.html", page(run_dir).encode("utf-8", "replace"), force=True)


@dataclass
class Stage:
    """What `metrics.jsonl` says of one stage: its newest step, its metrics, (step, reason, samples) left out, and (step,
    what) of its network grew."""

    step: int = 0
    metrics: dict[str, Series] = field(default_factory=lambda: defaultdict(Series))
    skipped: list[tuple[int, str, list[str]]] = field(default_factory=list)
    grown: list[tuple[int, str]] = field(default_factory=list)


def read_metrics(path: Path) -> dict[str, Stage]:
    """{name: stage}; lines that are none and values that are no finite number are passed over."""
    stages: dict[str, Stage] = defaultdict(Stage)
    if not path.is_file():  # a pipe would be waited for
        return stages
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if row := parse(line):
                add_row(stages[row.pop("stage")], row.pop("step"), row)
    return stages


def add_row(stage: Stage, step: int, row: dict[str, Any]) -> None:
    stage.step = max(stage.step, step)
    if "skipped" in row:
        samples = row.get("samples")
        names = [str(name) for name in samples] if isinstance(samples, list) else []
        stage.skipped.append((step, str(row["skipped"]), names))
    if "grown" in row:
        stage.grown.append((step, str(row["grown"])))
    for name, value in row.items():
        if type(value) in (float, int) and abs(value) < 1e300:  # false for NaN, too
            stage.metrics[name].add(step, value)


def read_samples(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """{stage: [(step, PNG file)]}, oldest first."""
    found: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for path in folder.glob("*.png"):
        if (match := SAMPLE.fullmatch(path.name)) and path.is_file():
            found[match[1]].append((int(match[2]), path))
    return {stage: sorted(files) for stage, files in found.items()}


def read_captions(path: Path) -> list[str]:
    """The captions of the sample grid, in its order; none where the file is missing or something else."""
    captions = []
    with suppress(OSError, ValueError, RecursionError):
        captions = json.loads(path.read_bytes()) if path.is_file() else []  # a pipe would be waited for
    good = isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)
    return captions[:MAX_CAPTIONS] if good else []


class Pictures:
    """PNG files as <img> elements, within the budget of bytes of one report."""

    def __init__(self) -> None:
        self.left = MAX_PICTURES

    def img(self, path: Path, alt: str) -> str:
        """The element, or a note where the file is too large, or "" where it is gone or no PNG."""
        try:
            if path.stat().st_size > min(self.left, MAX_PICTURE):
                return f'<p class="note">{escape(path.name)}: too large to show here</p>'
            data = path.read_bytes()
        except OSError:
            return ""
        if not data.startswith(PNG) or len(data) < 24:
            return ""
        self.left -= len(data)
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        scale = max(1, WIDE // max(1, width))  # whole, so that pixels stay square
        size = f'width="{width * scale}" height="{height * scale}"'
        return f'<img {size} alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def page(run_dir: Path) -> str:
    """The whole document; the stage that is under way comes first."""
    cfg, stages, samples = None, read_metrics(run_dir / "metrics.jsonl"), read_samples(run_dir / "samples")
    with suppress(UserError):
        cfg = config.load(run_dir / "tinydiff.toml", stored=True)
    captions, pictures = read_captions(run_dir / "samples" / "captions.json"), Pictures()
    begun = sorted({*stages, *samples}, key=lambda name: ([*STAGES, name].index(name), name))  # as they run
    newest = {name: newest_picture(name, samples.get(name, []), captions, pictures) for name in reversed(begun)}
    sections = [
        f"<section><h2>{escape(name)}</h2>{grown(stages[name].grown)}{left_out(stages[name].skipped)}"
        f"{warning(name, stages[name])}{newest[name]}"
        f"{strip(name, samples.get(name, []), pictures)}{curves(stages[name].metrics)}</section>"
        for name in reversed(begun)
    ]
    bars = "".join(
        progress(name, cfg, stages[name]) for name in dict.fromkeys([*(trained(cfg.train) if cfg else ()), *begun])
    )
    none = "Nothing measured yet; curves and pictures appear with the first pictures of the run."
    body = "".join(sections) or f'<p class="note">{none}</p>'
    title, about = escape(run_dir.resolve().name), facts(cfg, run_dir)
    return Template(TEMPLATE.read_text("utf-8")).substitute(title=title, facts=about, bars=bars, body=body)


def facts(cfg: Config | None, run_dir: Path) -> str:
    """What is being trained, in a line or two."""
    if not cfg:
        return ""
    side, size = cfg.latents["sample_size"], cfg.data.resolution
    widths = ", ".join(map(str, cfg.autoencoder.block_out_channels))
    rows = {
        "Data": f"{', '.join(cfg.data.paths)}, {size}×{size} pixels",
        "Latents": f"{cfg.autoencoder.channels}×{side}×{side}",
        "Networks": f"{cfg.denoiser.kind} and {cfg.text_encoder.kind}; autoencoder of widths {widths}",
        "Objective": f"{cfg.diffusion.prediction} on {cfg.diffusion.schedule} noise",
        "Parameters": "; ".join(f"{stage} {count / 1e6:.3g} M" for stage, count in parameters(run_dir).items()),
    }
    return "<dl>" + "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in rows.items() if v) + "</dl>"


def parameters(run_dir: Path) -> dict[str, int]:
    """{stage: parameters} from the headers of the newest checkpoints; a stage without one is left out."""
    from tinydiff.checkpoints.counts import safetensors_counts

    counts = {}
    for path in sorted(run_dir.glob(f"checkpoints/*-{'[0-9]' * 8}/weights.safetensors")):
        with suppress(UserError):
            counts[path.parent.name.rpartition("-")[0]] = sum(safetensors_counts(path).values())
    return counts


def progress(name: str, cfg: Config | None, stage: Stage) -> str:
    """Step of steps, as a bar, with the time that is left."""
    step, total = stage.step, cfg.train.stage(name).steps if name in STAGES and cfg else 0
    share = min(1.0, step / total) if total else 0.0
    done = f"{step:,} of {total:,} steps" if total else f"{step:,} steps"
    seconds = [1 / rate for rate in stage.metrics["steps_per_second"].values[-50:] if rate > 0]
    left = f", about {duration((total - step) * sum(seconds) / len(seconds))} left" if seconds and step < total else ""
    state = "not begun" if not step else done + (" (finished)" if total and step >= total else left)
    bar = f'<div class="bar"><i style="width:{share:.2%}"></i></div>' if total else ""
    return f"<div><b>{escape(name)}</b> <span>{state}</span>{bar}</div>"


def duration(seconds: float) -> str:
    """Rounded to what a glance needs: "40 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def left_out(skipped: list[tuple[int, str, list[str]]]) -> str:
    """A note of the updates that were left out, the newest last."""
    if not skipped:
        return ""
    many = f"{len(skipped):,} updates" if len(skipped) > 1 else "1 update"
    listed = [f"step {step:,}, {shown(reason)}{batch(samples)}" for step, reason, samples in skipped[-LEFT_OUT:]]
    before = f"{len(skipped) - LEFT_OUT:,} earlier ones; " if len(skipped) > LEFT_OUT else ""
    return f'<p class="note skipped">{many} left out: {before}{escape("; ".join(listed))}</p>'


def grown(grown: list[tuple[int, str]]) -> str:
    """A note of how the network grew."""
    listed = "; ".join(f"from step {step:,} on {shown(what)}" for step, what in grown)
    return f'<p class="note">Grown: {escape(listed)}</p>' if grown else ""


def warning(name: str, stage: Stage) -> str:
    """A note where the stage learns its images by heart."""
    text = overfitting(stage.metrics, STAGES[name].loss) if name in STAGES else ""
    return f'<p class="note skipped">{escape(text)}</p>' if text else ""


def batch(samples: list[str]) -> str:
    """ ": a.png, b.png and 3 more": what a skipped batch held."""
    more = f" and {len(samples) - LEFT_OUT} more" if len(samples) > LEFT_OUT else ""
    return ": " + ", ".join(shown(name) for name in samples[:LEFT_OUT]) + more if samples else ""


def newest_picture(stage: str, files: list[tuple[int, Path]], captions: list[str], pictures: Pictures) -> str:
    """The newest grid, large, with the names of its halves, or with its captions."""
    if not files:
        return ""
    step, path = files[-1]
    img = pictures.img(path, f"{stage}, step {step}")
    row, listed = STAGES.get(stage), ""
    what = row.pictures if row and (captions or row.halves) else "generated"
    if row and row.halves:
        above, below = map(escape, row.halves)
        img = f'<div class="halves"><span>{above}</span><span>{below}</span>{img}</div>'
    elif captions:
        listed = "<ol>" + "".join(f"<li>{escape(caption)}</li>" for caption in captions) + "</ol>"
    return f'<figure class="newest">{img}<figcaption>Step {step:,}: {what}</figcaption></figure>{listed}'


def strip(stage: str, files: list[tuple[int, Path]], pictures: Pictures) -> str:
    """Earlier grids, evenly spread over the run, first to last."""
    cells = [
        f"<figure>{pictures.img(path, f'{stage}, step {step}')}<figcaption>{step:,}</figcaption></figure>"
        for step, path in spread(files[:-1], STRIP)
    ]
    return f'<h3>Earlier, by step</h3><div class="strip">{"".join(cells)}</div>' if cells else ""


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def curves(metrics: dict[str, Series]) -> str:
    """All charts, the loss's large, and the newest of what has no chart."""
    drawn = [charts.draw(chart, metrics) for chart in charts.CHARTS]
    charted = {ERROR, *(name for chart in charts.CHARTS for name in chart.curves)}
    terms = {name: series.values[-1] for name, series in metrics.items() if name not in charted and series.values}
    listed = ", ".join(f"{escape(name)} {charts.number(value)}" for name, value in terms.items())
    note = f'<p class="note">Terms of the loss, newest: {listed}</p>' if terms else ""
    return f'{"".join(drawn[:LARGE])}<div class="charts">{"".join(drawn[LARGE:])}</div>{note}'
