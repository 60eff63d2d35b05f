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
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tinydiff import charts, config
from tinydiff.charts import Series
from tinydiff.config import Config
from tinydiff.errors import UserError
from tinydiff.files import shown, write_file
from tinydiff.training.metrics import parse

STRIP = 8  # earlier pictures shown for each stage
MAX_PICTURE = 6 * 2**20  # bytes; a larger picture is named, not shown
MAX_PICTURES = 12 * 2**20  # bytes of all pictures
MAX_CAPTIONS = 64
WIDE = 1060  # pixels that a picture may take on a desktop
LEFT_OUT = 5  # updates and, of each, samples that are named
SAMPLE = re.compile(r"(.+)-(\d+)\.png")
PNG = b"\x89PNG\r\n\x1a\n"


def write(run_dir: Path) -> None:
    """Writes `run_dir/report.html`, whole or not at all. Raises ResourceError where the disk does not take it."""
    write_file(run_dir / "report.html", page(run_dir).encode("utf-8", "replace"), force=True)


@dataclass
class Stage:
    """What `metrics.jsonl` says of one stage: its newest step, its metrics, and (step, reason, samples) left out."""

    step: int = 0
    metrics: dict[str, Series] = field(default_factory=lambda: defaultdict(Series))
    skipped: list[tuple[int, str, list[str]]] = field(default_factory=list)


# ---- what the run directory holds ----------------------------------------------------------------------------------


def read_metrics(path: Path) -> dict[str, Stage]:
    """{name: stage}; lines that are none and values that are no finite number are passed over."""
    stages: dict[str, Stage] = defaultdict(Stage)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if row := parse(line):
                    add_row(stages[row.pop("stage")], row.pop("step"), row)
    except OSError:
        pass
    return stages


def add_row(stage: Stage, step: int, row: dict[str, Any]) -> None:
    stage.step = max(stage.step, step)
    if "skipped" in row:
        samples = row.get("samples")
        names = [str(name) for name in samples] if isinstance(samples, list) else []
        stage.skipped.append((step, str(row["skipped"]), names))
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
    cfg, stages = read_config(run_dir / "tinydiff.toml"), read_metrics(run_dir / "metrics.jsonl")
    samples, captions = read_samples(run_dir / "samples"), read_captions(run_dir / "samples" / "captions.json")
    begun = sorted({**stages, **samples}, key=lambda name: stage_rank(cfg, name))
    title, pictures = escape(run_dir.resolve().name), Pictures()
    newest = {name: newest_picture(name, samples.get(name, []), captions, pictures) for name in reversed(begun)}
    sections = [
        f"<section><h2>{escape(name)}</h2>{left_out(stages[name].skipped)}{newest[name]}"
        f"{strip(name, samples.get(name, []), pictures)}{curves(stages[name].metrics)}</section>"
        for name in reversed(begun)
    ]
    bars = "".join(progress(name, cfg, stages[name]) for name in dict.fromkeys([*stages_of(cfg), *begun]))
    header = f'<header><h1>{title}</h1>{facts(cfg, run_dir)}<div class="bars">{bars}</div></header>'
    none = "Nothing measured yet; curves and pictures appear with the first pictures of the run."
    body = header + ("".join(sections) or f'<p class="note">{none}</p>')
    return HEAD.replace("TITLE", title) + f"<body><main>{body}</main></body></html>\n"


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


def progress(name: str, cfg: Config | None, stage: Stage) -> str:
    """Step of steps, as a bar, with the time that is left."""
    step, total = stage.step, getattr(cfg.train, name).steps if name in stages_of(cfg) and cfg else 0
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


def batch(samples: list[str]) -> str:
    """ ": a.png, b.png and 3 more": what a skipped batch held."""
    more = f" and {len(samples) - LEFT_OUT} more" if len(samples) > LEFT_OUT else ""
    return ": " + ", ".join(shown(name) for name in samples[:LEFT_OUT]) + more if samples else ""


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


def curves(metrics: dict[str, Series]) -> str:
    """All charts, the loss's large, and the newest of what has no chart."""
    drawn = [charts.draw(chart, metrics) for chart in charts.CHARTS]
    charted = {name for chart in charts.CHARTS for name in chart.curves}
    terms = [
        f"{escape(name)} {charts.number(series.values[-1])}"
        for name, series in metrics.items()
        if name not in charted and series.values
    ]
    note = f'<p class="note">Terms of the loss, newest: {", ".join(terms)}</p>' if terms else ""
    return f'{drawn[0]}{drawn[1]}<div class="charts">{"".join(drawn[2:])}</div>{note}'


HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE - tinydiff</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5f6973; --rule: #e1e5e9; --paper: #fff; --line: #2467d1;
  --line1: #c2570c; --line2: #0b8a6a; --line3: #a03a9b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #98a2ad; --rule: #323a42; --paper: #14181c; --line: #6ea5ff;
    --line1: #f0a050; --line2: #4cc9a4; --line3: #e08ad8; }
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
.skipped { border-left: 3px solid var(--line1); padding-left: .6rem; }
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
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: .2rem 1.6rem; }
STYLE</style></head>
""".replace("STYLE", charts.STYLE)
