"""A training run as one self-contained HTML file: progress, curves and pictures.

`write` reads what the run directory holds (`tinydiff.toml`, `metrics.jsonl`, `samples/`) and puts `report.html` beside
it: inline SVG and PNG, no scripts, nothing fetched. Whatever is missing or half-written is left out. It knows file
formats, no network and no loop.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import config
from tinydiff.config import Config
from tinydiff.errors import UserError
from tinydiff.files import write_file

STRIP = 8  # earlier pictures shown for each stage
MAX_PICTURE = 6 * 2**20  # bytes; a larger picture is named, not shown
MAX_PICTURES = 12 * 2**20  # bytes of all pictures
MAX_CAPTIONS = 64
WIDE = 1060  # pixels that a picture may take on a desktop
POINTS = 400  # of a curve
SAMPLE = re.compile(r"(.+)-(\d+)\.png")
PNG = b"\x89PNG\r\n\x1a\n"


def write(run_dir: Path) -> None:
    """Writes `run_dir/report.html`, whole or not at all. Raises ResourceError where the disk does not take it."""
    write_file(run_dir / "report.html", page(run_dir).encode("utf-8", "replace"), force=True)


@dataclass
class Series:
    """Values of one metric over the steps of a stage."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def arrays(self, log: bool) -> tuple[np.ndarray, np.ndarray]:
        """Finite points; only positive ones, as their logarithm, for a log axis."""
        x, y = np.array(self.steps), np.array(self.values)
        kept = y > 0 if log else np.ones(len(y), bool)
        return x[kept], np.log10(y[kept]) if log else y[kept]


@dataclass(frozen=True)
class Chart:
    """A curve of one metric: heading, whether its axis is logarithmic, starts at zero, and is worth smoothing."""

    metric: str
    title: str
    unit: str = ""
    log: bool = False
    zero: bool = False
    smooth: bool = False


CHARTS = (
    Chart("loss", "Loss", log=True, smooth=True),
    Chart("psnr", "Reconstruction", "dB PSNR"),
    Chart("lr", "Learning rate", zero=True),
    Chart("grad_norm", "Gradient norm", log=True, smooth=True),
    Chart("steps_per_second", "Speed", "steps/s", zero=True, smooth=True),
)

Metrics = dict[str, dict[str, Series]]


# ---- what the run directory holds ----------------------------------------------------------------------------------


def read_metrics(path: Path) -> Metrics:
    """{stage: {metric: Series}}; lines that are no JSON object and values that are no number are passed over."""
    stages: Metrics = defaultdict(lambda: defaultdict(Series))
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                add_line(stages, line)
    except OSError:
        pass
    return stages


def add_line(stages: Metrics, line: str) -> None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return
    if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or not is_number(row.get("step")):
        return
    for name, value in row.items():
        if name not in ("stage", "step") and is_number(value):
            series = stages[row["stage"]][name]
            series.steps.append(float(row["step"]))
            series.values.append(float(value))


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # false for NaN, too


def read_samples(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """{stage: [(step, PNG file)]}, oldest first."""
    found: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for path in folder.glob("*.png"):
        if (match := SAMPLE.fullmatch(path.name)) and path.is_file():
            found[match[1]].append((int(match[2]), path))
    return {stage: sorted(files) for stage, files in found.items()}


def read_captions(path: Path) -> list[str]:
    """The captions of the sample grid, in its order; none where the file is missing or something else."""
    try:
        captions = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    good = isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)
    return captions[:MAX_CAPTIONS] if good else []


def read_config(path: Path) -> Config | None:
    try:
        return config.load(path)
    except UserError:
        return None


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
        code = base64.b64encode(data).decode()
        size = f'width="{width * scale}" height="{height * scale}"'
        return f'<img {size} alt="{escape(alt)}" src="data:image/png;base64,{code}">'


# ---- the page ------------------------------------------------------------------------------------------------------


def page(run_dir: Path) -> str:
    """The whole document; the stage that is under way comes first."""
    cfg, metrics = read_config(run_dir / "tinydiff.toml"), read_metrics(run_dir / "metrics.jsonl")
    samples, captions = read_samples(run_dir / "samples"), read_captions(run_dir / "samples" / "captions.json")
    begun = sorted({**metrics, **samples}, key=lambda stage: stage_rank(cfg, stage))
    name, pictures = escape(run_dir.resolve().name), Pictures()
    newest = {stage: newest_picture(stage, samples.get(stage, []), captions, pictures) for stage in reversed(begun)}
    sections = [
        f"<section><h2>{escape(stage)}</h2>{newest[stage]}{strip(stage, samples.get(stage, []), pictures)}"
        f"{charts(metrics.get(stage, {}))}</section>"
        for stage in reversed(begun)
    ]
    bars = "".join(progress(stage, cfg, metrics.get(stage, {})) for stage in dict.fromkeys([*stages_of(cfg), *begun]))
    header = f'<header><h1>{name}</h1>{facts(cfg, run_dir)}<div class="bars">{bars}</div></header>'
    body = header + "".join(sections)
    if not begun:
        body += (
            '<p class="note">Nothing measured yet; curves and pictures appear with the first pictures of the run.</p>'
        )
    return HEAD.replace("TITLE", name) + f"<body><main>{body}</main></body></html>\n"


def stages_of(cfg: Config | None) -> list[str]:
    """Stages in the order they run."""
    return ["autoencoder", "denoiser"] if cfg else []


def stage_rank(cfg: Config | None, stage: str) -> tuple[int, str]:
    known = stages_of(cfg) or ["autoencoder"]
    return (known.index(stage) if stage in known else len(known)), stage


def facts(cfg: Config | None, run_dir: Path) -> str:
    """What is being trained, in a line or two."""
    if not cfg:
        return ""
    factor = 2 ** (len(cfg.autoencoder.block_out_channels) - 1)
    side, size = cfg.data.resolution // factor, cfg.data.resolution
    widths = [", ".join(map(str, part.block_out_channels)) for part in (cfg.autoencoder, cfg.denoiser)]
    counts = "; ".join(f"{stage} {count / 1e6:.3g} M" for stage, count in parameters(run_dir).items())
    rows = {
        "Data": f"{cfg.data.path}, {size}×{size} pixels",
        "Latents": f"{cfg.autoencoder.latent_channels}×{side}×{side}",
        "Widths": f"autoencoder {widths[0]}; denoiser {widths[1]}",
        "Objective": f"{cfg.diffusion.prediction} on {cfg.diffusion.schedule} noise",
        "Parameters": counts,
    }
    return "<dl>" + "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in rows.items() if v) + "</dl>"


def parameters(run_dir: Path) -> dict[str, int]:
    """{stage: parameters} from the headers of the newest checkpoints; a stage without one is left out."""
    from tinydiff.inspect import safetensors_counts

    found = {}
    for path in sorted(run_dir.glob("checkpoints/*-[0-9]*/weights.safetensors")):
        try:
            found[path.parent.name.rpartition("-")[0]] = sum(safetensors_counts(path).values())
        except UserError:
            continue
    return found


def progress(stage: str, cfg: Config | None, metrics: dict[str, Series]) -> str:
    """Step of steps, as a bar, with the newest figures and the time that is left."""
    step = int(max((max(series.steps) for series in metrics.values()), default=0))
    total = getattr(cfg.train, stage).steps if stage in stages_of(cfg) and cfg else 0
    share = min(1.0, step / total) if total else 0.0
    done = f"{step:,} of {total:,} steps" if total else f"{step:,} steps"
    rates = metrics["steps_per_second"].values[-50:] if "steps_per_second" in metrics else []
    rate = len(rates) / sum(1 / r for r in rates if r > 0) if any(r > 0 for r in rates) else 0.0
    left = f", about {duration((total - step) / rate)} left" if rate and 0 < step < total else ""
    state = "not begun" if not step else done + (" (finished)" if total and step >= total else left)
    bar = f'<div class="bar"><i style="width:{share:.2%}"></i></div>' if total else ""
    return f"<div><b>{escape(stage)}</b> <span>{state}</span>{bar}</div>"


def duration(seconds: float) -> str:
    """Rounded to what a glance needs: "40 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def newest_picture(stage: str, files: list[tuple[int, Path]], captions: list[str], pictures: Pictures) -> str:
    """The newest grid, large; the autoencoder's with its halves named, the others with their captions."""
    if not files:
        return ""
    step, path = files[-1]
    img = pictures.img(path, f"{stage}, step {step}")
    if stage == "autoencoder":
        img = f'<div class="halves"><span>images</span><span>reconstructions</span>{img}</div>'
        what, listed = "images of the data above, their reconstructions below", ""
    else:
        what = "generated from these captions, row by row" if captions else "generated"
        listed = "<ol>" + "".join(f"<li>{escape(caption)}</li>" for caption in captions) + "</ol>" if captions else ""
    return f'<figure class="newest">{img}<figcaption>Step {step:,}: {what}</figcaption></figure>{listed}'


def strip(stage: str, files: list[tuple[int, Path]], pictures: Pictures) -> str:
    """Earlier grids, evenly spread over the run, first to last."""
    earlier = spread(files[:-1], STRIP)
    cells = [
        f"<figure>{pictures.img(path, f'{stage}, step {step}')}<figcaption>{step:,}</figcaption></figure>"
        for step, path in earlier
    ]
    return f'<h3>Earlier, by step</h3><div class="strip">{"".join(cells)}</div>' if cells else ""


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


# ---- curves --------------------------------------------------------------------------------------------------------


def charts(metrics: dict[str, Series]) -> str:
    loss, *others = [draw(chart, metrics.get(chart.metric, Series())) for chart in CHARTS]
    shown = {chart.metric for chart in CHARTS}
    terms = [f"{escape(name)} {number(series.values[-1])}" for name, series in metrics.items() if name not in shown]
    note = f'<p class="note">Terms of the loss, newest: {", ".join(terms)}</p>' if terms else ""
    return f'{loss}<div class="charts">{"".join(others)}</div>{note}'


def draw(chart: Chart, series: Series) -> str:
    """A curve with its axes: the lines are SVG that stretches, the labels are text that does not."""
    x, y = series.arrays(chart.log)
    if not len(x):
        return ""
    low, high = bounds(y, chart)
    right = max(float(x.max()), 1.0)
    marks = "".join(
        f'<span class="y" style="bottom:{at:.2%}">{label}</span>' for at, label in y_ticks(low, high, chart.log)
    )
    feet = "".join(f'<span class="x" style="left:{at:.2%}">{label}</span>' for at, label in x_ticks(right))
    rules = "".join(f'<path class="rule" d="M0 {100 - 100 * at:.2f}H100"/>' for at, _ in y_ticks(low, high, chart.log))
    shown = smooth(y) if chart.smooth else y
    lines = curve(
        np.stack([x / right, (y - low) / (high - low)]), (shown - low) / (high - low) if chart.smooth else None
    )
    newest = 10 ** shown[-1] if chart.log else shown[-1]
    head = f"<h3>{chart.title} <b>{number(newest)}</b> {chart.unit}</h3>"
    frame = f'viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{chart.title}"'
    svg = f"<svg {frame}>{rules}{lines}</svg>"
    return f'<div class="chart {chart.metric}">{head}<div class="plot">{svg}{marks}{feet}</div></div>'


def curve(points: np.ndarray, smoothed: np.ndarray | None) -> str:
    """The raw line, faint behind a smoothed one where there is one; points (2, N) as shares of the plot."""
    if points.shape[1] == 1:
        return trace(np.repeat(points, 2, axis=1), "line dot")  # a line of no length, whose round ends are a dot
    raw = trace(thin(points), "line" if smoothed is None else "line raw")
    return raw if smoothed is None else raw + trace(thin(np.stack([points[0], smoothed])), "line")


def trace(points: np.ndarray, kind: str) -> str:
    """An SVG path through points (2, N), in percent and from the top."""
    return f'<path class="{kind}" d="M{"L".join(f"{100 * x:.2f} {100 - 100 * y:.2f}" for x, y in points.T)}"/>'


def thin(points: np.ndarray) -> np.ndarray:
    """At most about `POINTS` of the points (2, N): the lowest and the highest of each stretch."""
    if points.shape[1] <= POINTS:
        return points
    kept = set()
    for part in np.array_split(np.arange(points.shape[1]), POINTS // 2):
        kept |= {int(part[points[1, part].argmin()]), int(part[points[1, part].argmax()])}
    return points[:, sorted(kept)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the values; narrower at the steep start, one-sided at the end."""
    n, half = len(values), max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    reach = np.minimum(half, np.arange(n))
    low, high = np.arange(n) - reach, np.minimum(np.arange(n) + reach + 1, n)
    return (total[high] - total[low]) / (high - low)


def bounds(y: np.ndarray, chart: Chart) -> tuple[float, float]:
    """The ends of the axis: all values, save rare outliers where the curve is smoothed; never equal."""
    low, high = np.quantile(y, [0.005, 0.995]) if chart.smooth else (y.min(), y.max())
    low = 0.0 if chart.zero else float(low)
    room = max(float(high) - low, 1e-9, abs(low) * 0.02)
    return (low if chart.zero else low - 0.06 * room), low + 1.08 * room


def y_ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """(place in [0, 1], label); on a log axis `low` and `high` are exponents of ten."""
    values = log_values(10**low, 10**high) if log else linear_values(low, high, 5)
    places = [math.log10(v) if log else v for v in values]
    return [((place - low) / (high - low), number(v)) for place, v in zip(places, values, strict=True)]


def x_ticks(right: float) -> list[tuple[float, str]]:
    return [(v / right, f"{v / 1000:g}k" if v >= 10_000 else f"{v:g}") for v in linear_values(0, right, 7)]


def log_values(low: float, high: float) -> list[float]:
    """Round numbers on a log axis: powers of ten, or more of each decade, or evenly spaced ones in a narrow range."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 7)]
    return linear_values(low, high, 6)


def linear_values(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], at most about `most`."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A figure for a label: 3 digits, plain where that is short."""
    text = f"{value:.3g}"
    return re.sub(r"e([+-])0*(\d+)", lambda m: "e" + m[1].replace("+", "") + m[2], text)


HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE - tinydiff</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5f6973; --rule: #e1e5e9; --paper: #fff; --line: #2467d1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #98a2ad; --rule: #323a42; --paper: #14181c; --line: #6ea5ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
body { overflow-wrap: anywhere; }
main { max-width: 1120px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .3rem 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; text-transform: capitalize; }
h3 { font-size: .9rem; font-weight: 500; color: var(--soft); margin: 1rem 0 .4rem; }
h3 b { color: var(--ink); font-weight: 600; }
dl { display: flex; flex-wrap: wrap; gap: .3rem 1.8rem; margin: 0 0 1rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; }
.bars { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: .8rem 2rem; }
.bars b { text-transform: capitalize; margin-right: .5rem; }
.bars span, .note, figcaption { color: var(--soft); font-size: .85rem; }
.bar { height: 6px; border-radius: 3px; background: var(--rule); margin-top: .3rem; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--line); }
figure { margin: 0; }
figcaption { margin-top: .25rem; }
img { display: block; max-width: 100%; height: auto; }
@media (min-width: 1100px) { .newest img { image-rendering: pixelated; } }
.halves { display: grid; grid-template: 1fr 1fr / auto auto; justify-content: start; gap: 0 .5rem; }
.halves span { writing-mode: vertical-rl; transform: rotate(180deg); text-align: center; }
.halves span { color: var(--soft); font-size: .8rem; }
.halves img { grid-area: 1 / 2 / 3 / 3; }
.halves span:nth-of-type(2) { grid-area: 2 / 1; }
ol { columns: 14rem; gap: 2.6rem; padding-left: 1.6rem; margin: .5rem 0; font-size: .85rem; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 230px), 1fr)); gap: .8rem; }
.strip img { width: 100%; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: .2rem 1.6rem; }
.plot { position: relative; height: 150px; margin: 0 .8rem 1.5rem 3.4rem; }
.loss .plot { height: 260px; }
.plot svg { position: absolute; width: 100%; height: 100%; border: solid var(--rule); border-width: 0 0 1px 1px; }
.plot path { fill: none; stroke: var(--line); stroke-width: 1.8; vector-effect: non-scaling-stroke; }
.plot .raw { stroke-width: 1; opacity: .35; }
.plot .dot { stroke-width: 7; stroke-linecap: round; }
.plot .rule { stroke: var(--rule); stroke-width: 1; }
.y, .x { position: absolute; color: var(--soft); font-size: .75rem; line-height: 1; white-space: nowrap; }
.y { right: calc(100% + .4rem); transform: translateY(50%); }
.x { top: calc(100% + .4rem); transform: translateX(-50%); }
</style></head>
"""
