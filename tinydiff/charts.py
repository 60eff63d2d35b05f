"""Charts as HTML: lines are SVG that stretches with the page, labels are text that does not.

A chart's curves differ in colour and in dashes, so that they can be told apart in print. This module knows no files.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

POINTS = 400  # in a curve


@dataclass
class Series:
    """One metric's values over the steps of a stage."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float) -> None:
        """Append a value."""
        self.steps.append(step)
        self.values.append(value)

    def points(self, log: bool) -> np.ndarray:
        """Steps and values (2, N); with `log`, the logarithms of the positive values only."""
        points = np.stack([self.steps, self.values])
        if log:
            points = points[:, points[1] > 0]
            points[1] = np.log10(points[1])
        return points


@dataclass(frozen=True)
class Chart:
    """A title, {metric: label}, and whether the axis is logarithmic, starts at zero, or curves are smoothed."""

    title: str
    curves: Mapping[str, str]
    unit: str = ""
    log: bool = False
    zero: bool = False
    smooth: bool = False


HELD = "held_out_"  # how the names of what is measured on held-out images begin; a few points, which are not smoothed
NOISE = {"loss_0": "least", "loss_1": "less", "loss_2": "more", "loss_3": "most"}
CHARTS = (
    Chart("Loss", {"loss": "training", f"{HELD}loss": "held out"}, log=True, smooth=True),
    Chart("Loss by noise", NOISE, log=True, smooth=True),
    Chart("Held-out loss by noise", {f"{HELD}{name}": label for name, label in NOISE.items()}, log=True),
    Chart("Absolute error", {"l1": "training", f"{HELD}l1": "held out"}, log=True, smooth=True),
    Chart("Reconstruction", {"psnr": "shown", f"{HELD}psnr": "held out"}, "dB PSNR"),
    Chart("Perceptual distance", {f"{HELD}perceptual": ""}),
    Chart("Fréchet distance", {"frechet": ""}),
    Chart("Learning rate", {"lr": ""}, zero=True),
    Chart("Gradient norm", {"grad_norm": ""}, log=True, smooth=True),
    Chart("Memory", {"memory": ""}, "GB", zero=True),
    Chart("Speed", {"steps_per_second": ""}, "steps/s", zero=True, smooth=True),
    Chart("Throughput", {"images_per_second": ""}, "images/s", zero=True, smooth=True),
)


def draw(chart: Chart, metrics: Mapping[str, Series]) -> str:
    """The chart with axes, legend and newest values; "" if none of its curves has a point."""
    points = {name: xy for name in chart.curves if name in metrics and (xy := metrics[name].points(chart.log)).size}
    if not points:
        return ""
    ends = [bounds(y, chart, name) for name, (_, y) in points.items()]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    right = max(1.0, *(float(x.max()) for x, _ in points.values()))
    lines, key = "", ""
    for index, (name, label) in enumerate(chart.curves.items()):
        if name in points:
            x, y = points[name]
            shown = smooth(y) if smoothed(chart, name) else y
            lines += curve(x / right, (y - low) / (high - low), (shown - low) / (high - low), f"line k{index}")
            key += entry(
                label if len(points) > 1 else "", 10 ** shown[-1] if chart.log else shown[-1], f"line k{index}"
            )
    style, title = f"--faint:{0.35 / len(chart.curves):.2f}", f"{chart.title} {key}{chart.unit}"
    plot = axes(lines, chart, low, high, right)
    return f'<div class="chart" style="{style}"><h3>{title}</h3><div class="plot">{plot}</div></div>'


def entry(label: str, newest: float, kind: str) -> str:
    """A curve's part of the legend: its newest value, after a sample of its line and its label if it has one."""
    swatch = f'<svg class="swatch"><path class="{kind}" d="M0 5H26"/></svg>{label} ' if label else ""
    return f"<span>{swatch}<b>{number(newest)}</b></span> "


def axes(lines: str, chart: Chart, low: float, high: float, right: float) -> str:
    """The lines (SVG paths, 100 x 100) in a frame with grid lines and labels."""
    ys, xs = y_ticks(low, high, chart.log), x_ticks(right)
    rules = "".join(f'<path class="rule" d="M0 {100 - 100 * at:.2f}H100"/>' for at, _ in ys)
    marks = "".join(f'<span class="y" style="bottom:{at:.2%}">{label}</span>' for at, label in ys)
    feet = "".join(f'<span class="x" style="left:{at:.2%}">{label}</span>' for at, label in xs)
    frame = f'viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{chart.title}"'
    return f"<svg {frame}>{rules}{lines}</svg>{marks}{feet}"


def curve(x: np.ndarray, y: np.ndarray, shown: np.ndarray, kind: str) -> str:
    """The line of `shown` and, if smoothing changed it, the raw `y` faint below it. Coordinates are in [0, 1]."""
    if len(x) == 1:
        return trace(np.stack([x, y]).repeat(2, axis=1), f"{kind} dot")  # a line of no length with round ends: a dot
    raw = "" if np.array_equal(y, shown) else trace(thin(np.stack([x, y])), f"{kind} raw")
    return raw + trace(thin(np.stack([x, shown])), kind)


def trace(points: np.ndarray, kind: str) -> str:
    """An SVG path through points (2, N) in [0, 1], in percent, y from the top."""
    return f'<path class="{kind}" d="M{"L".join(f"{100 * x:.2f} {100 - 100 * y:.2f}" for x, y in points.T)}"/>'


def thin(points: np.ndarray) -> np.ndarray:
    """At most about `POINTS` of the points (2, N): the lowest and highest of each of `POINTS` / 2 intervals."""
    if points.shape[1] <= POINTS:
        return points
    kept = set()
    for interval in np.array_split(np.arange(points.shape[1]), POINTS // 2):
        kept |= {int(interval[points[1, interval].argmin()]), int(interval[points[1, interval].argmax()])}
    return points[:, sorted(kept)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the values; narrower at the start, one-sided at the end."""
    n, half = len(values), max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    reach = np.minimum(half, np.arange(n))
    low, high = np.arange(n) - reach, np.minimum(np.arange(n) + reach + 1, n)
    return (total[high] - total[low]) / (high - low)


def smoothed(chart: Chart, name: str) -> bool:
    return chart.smooth and not name.startswith(HELD)


def bounds(y: np.ndarray, chart: Chart, name: str) -> tuple[float, float]:
    """The ends of a curve's y axis, never equal: they hold all values, or without outliers if it is smoothed."""
    low, high = np.quantile(y, [0.005, 0.995]) if smoothed(chart, name) else (y.min(), y.max())
    low = 0.0 if chart.zero else float(low)
    room = max(float(high) - low, 1e-9, abs(low) * 0.02)
    return (low if chart.zero else low - 0.06 * room), low + 1.08 * room


def y_ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """(position in [0, 1], label) of each tick; on a log axis `low` and `high` are exponents of ten."""
    values = log_values(10**low, 10**high) if log else linear_values(low, high, 5)
    return [(((math.log10(v) if log else v) - low) / (high - low), number(v)) for v in values]


def x_ticks(right: float) -> list[tuple[float, str]]:
    """(position in [0, 1], label) of each tick of an axis from 0 to `right`."""
    unit, suffix = (1e6, "M") if right >= 1e6 else (1e3, "k") if right >= 2e4 else (1, "")
    return [(v / right, f"{v / unit:g}{suffix if v else ''}") for v in linear_values(0, right, 7)]


def log_values(low: float, high: float) -> list[float]:
    """Ticks on a log axis: powers of ten, or several in each decade, or in a narrow range evenly spaced ones."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return linear_values(low, high, 6)


def linear_values(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], at most about `most`."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A value for a label, with three significant digits."""
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.3g}")
