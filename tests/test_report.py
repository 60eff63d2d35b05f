"""The training report: parsed as HTML, checked for what it must not hold, its axes against arithmetic."""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import charts, config, images, report
from tinydiff.schema import to_toml

VOID = {"meta", "img", "path", "br"}


STEPS = ("train.autoencoder.steps=2000", "train.denoiser.steps=4000")


class Page(HTMLParser):
    """Elements, text and sources of a document; fails on tags that are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""

    def pictures(self) -> list[bytes]:
        sources = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        return [base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in sources]


def shown(run: Path) -> Page:
    report.write(run)
    return Page((run / "report.html").read_text(encoding="utf-8"))


def picture(seed: int, side: int = 8) -> bytes:
    return images.encode_png(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8), None)


def metric(stage: str, step: int, **values: object) -> str:
    return json.dumps({"stage": stage, "step": step} | values) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that is half-way through its second stage."""
    path = tmp_path / "a <b> & run"
    (path / "samples").mkdir(parents=True)
    (path / "tinydiff.toml").write_text(to_toml(config.load(None, ["data.path='<i>data'", *STEPS])))
    bands = {"loss_0": 0.1, "loss_1": 0.2, "loss_2": 0.4, "loss_3": 0.5}
    lines = [
        metric("autoencoder", n, loss=1 / n, lr=1e-3, grad_norm=0.5, l1=0.2, kl=0.1, steps_per_second=2.0, memory=1.5)
        for n in range(10, 2001, 10)
    ]
    lines += [metric("autoencoder", n, psnr=20 + n / 1000) for n in (500, 1000, 2000)]
    lines += [
        metric("denoiser", n, loss=0.3, lr=1e-3, grad_norm=0.5, steps_per_second=4.0, images_per_second=32.0, **bands)
        for n in range(10, 1001, 10)
    ]
    (path / "metrics.jsonl").write_text("".join(lines))
    for n in range(1, 21):
        (path / "samples" / f"denoiser-{n * 50:08d}.png").write_bytes(picture(n))
    (path / "samples" / "autoencoder-00002000.png").write_bytes(picture(99))
    return path


def test_it_says_what_is_trained_and_how_far_it_is(run: Path) -> None:
    page = shown(run)
    assert page.tags["h1"] == 1 and "a <b> & run" in page.text and "<i>data, 32×32 pixels" in page.text
    assert "2,000 of 2,000 steps (finished)" in page.text
    assert "1,000 of 4,000 steps, about 12 min left" in page.text  # 3000 steps at 4 a second
    assert page.text.index("Step 1,000") < page.text.index("Step 2,000")  # what is under way comes first
    measured = {"loss", "loss_0", "l1", "psnr", "lr", "grad_norm", "memory", "steps_per_second", "images_per_second"}
    for chart in charts.CHARTS:
        assert (chart.title in page.text) == bool(measured & chart.curves.keys())
    plots = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "role")]
    assert len(plots) == 13  # four of either, the autoencoder's error, PSNR and memory, the denoiser's bands and images
    assert page.text.count("Terms of the loss, newest: kl 0.1") == page.text.count("Terms of the loss") == 1


def test_it_is_self_contained(run: Path) -> None:
    (run / "samples" / "captions.json").write_text(json.dumps(["see https://example.org/x.png"]))
    page = shown(run)
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "base", "form", "a"}
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (tag, name) == ("img", "src") and value.startswith("data:image/png;base64,")
    style = re.search("<style>(.*?)</style>", (run / "report.html").read_text(), re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1] and "prefers-color-scheme: dark" in style[1]


def test_the_newest_picture_and_eight_earlier_ones_spread_over_time(run: Path) -> None:
    found = shown(run).pictures()
    assert found[0] == picture(20) and found[-1] == picture(99) and len(found) == 10
    assert found[1] == picture(1) and found[8] == picture(19)  # the first, and the last before the newest
    assert len(set(found)) == 10


def test_halves_of_the_autoencoders_grid_are_named(run: Path) -> None:
    page = shown(run)
    assert page.text.count("reconstructions") == 2 and "images of the data above" in page.text


def test_captions_are_escaped(run: Path) -> None:
    nasty = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\" onload='x' & &lt; \ud800", "ok"]
    (run / "samples" / "captions.json").write_text(json.dumps(nasty))
    page = shown(run)
    assert page.tags["script"] == 0 and page.tags["li"] == 4 and len(page.pictures()) == 10
    assert nasty[0] in page.text and nasty[1] in page.text and "&lt;" in page.text


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', "", "[" * 100_000])
def test_captions_that_are_none_are_left_out(run: Path, content: str) -> None:
    (run / "samples" / "captions.json").write_text(content)
    assert shown(run).tags["li"] == 0


def test_updates_that_were_left_out_are_listed_first(run: Path) -> None:
    assert "left out" not in shown(run).text
    with (run / "metrics.jsonl").open("a") as file:
        file.write(metric("denoiser", 1001, skipped="loss nan", samples=["a.png", "<b>\x1b.png"]))
    page = shown(run)
    assert "1 update left out: step 1,001, loss nan: a.png, '<b>\\x1b.png'" in page.text
    assert page.text.index("left out") < page.text.index("Step 1,000") and "1,001 of 4,000 steps" in page.text
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(
            metric("denoiser", n, skipped="gradient inf", samples=list("abcdefg")) for n in range(1002, 1008)
        )
        file.write(metric("denoiser", 1008, skipped=None, samples={}))
    text = shown(run).text
    assert "8 updates left out: 3 earlier ones; step 1,004, gradient inf: a, b, c, d, e and 2 more; step 1,005" in text
    assert "step 1,008, None" in text and "1,001, loss nan" not in text


def paths(text: str, title: str) -> dict[str, list[tuple[float, float]]]:
    """The lines of a chart by their kind: points in percent of its frame."""
    (svg,) = re.findall(rf'<svg viewBox="0 0 100 100"[^>]*aria-label="{title}">(.*?)</svg>', text)
    found = re.findall(r'<path class="(line[^"]*)" d="M([^"]*)"/>', svg)
    return {kind: [tuple(map(float, p.split())) for p in d.split("L")] for kind, d in found}


def test_training_and_held_out_loss_are_two_lines_of_one_chart(run: Path) -> None:
    """The held-out one is drawn through its own points, none of which falls outside, and both are named."""
    held = {250: 0.5, 500: 0.35, 750: 0.8, 1000: 2.0}
    with (run / "metrics.jsonl").open("a") as file:
        for n, loss in held.items():
            bands = {f"held_out_loss_{i}": loss * (i + 1) for i in range(4)}
            file.write(metric("denoiser", n, held_out_loss=loss, held_out_error=0.01, frechet=100 - n / 100, **bands))
    page = shown(run)
    section = (run / "report.html").read_text().partition("<h2>autoencoder</h2>")[0]
    lines = paths(section, "Loss")
    assert {"line k0", "line k1"} <= lines.keys() and [x for x, _ in lines["line k1"]] == [25.0, 50.0, 75.0, 100.0]
    heights = [y for _, y in lines["line k1"]]
    assert all(0 <= y <= 100 for y in heights)
    logs = np.log10(list(held.values()))  # straight in the logarithm
    assert np.allclose(np.diff(heights) / np.diff(logs), np.diff(heights)[0] / np.diff(logs)[0], rtol=1e-2)
    below = np.interp(np.log10(0.3), sorted(logs), sorted(heights, reverse=True)) - heights[1]
    assert lines["line k0"][-1][1] > heights[1] and below >= 0  # the training loss, 0.3, is the lower
    assert "training 0.3" in page.text and "held out 2" in page.text
    bands = paths(section, "Held-out loss by noise")
    assert [len(bands[f"line k{i}"]) for i in range(4)] == [4] * 4 and "Fréchet distance 90" in page.text
    assert "held_out_error" not in page.text and "overfitting" not in page.text


def test_overfitting_is_noted_with_its_figures(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for n, held in enumerate([0.5, 0.3, 0.35, 0.4, 0.5, 0.6], 1):
            file.write(metric("denoiser", 100 * n, held_out_loss=held))
        for n in range(210, 601, 10):
            file.write(metric("denoiser", n, loss=0.3 - n / 3000))
    page = shown(run)
    assert page.text.count("overfitting: the held-out loss was lowest at step 200, 0.3, and is 0.6") == 1
    assert page.text.index("overfitting") < page.text.index("Step 1,000") and "train.keep_best=true" in page.text


def test_names_from_files_are_escaped(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(metric("<script>x", 10, loss=1.0, **{"<b>term": 1.0}))
    (run / "samples" / "<script>y-00000010.png").write_bytes(picture(1))
    page = shown(run)
    assert page.tags["script"] == 0 and "<script>x" in page.text and "<b>term" in page.text


def test_half_written_and_foreign_lines_are_passed_over(run: Path) -> None:
    before = report.page(run)
    odd = [
        "[1]",
        "3",
        "null",
        "",
        '{"step": 5, "loss": 1}',
        '{"stage": "denoiser", "step": "x"}',
        '{"stage": [], "step": 1}',
    ]
    odd += ['{"stage": "denoiser", "step": 1000, "loss": NaN}', '{"stage": "denoiser", "step": 1000, "loss": Infinity}']
    odd += ['{"stage": "denoiser", "step": 1000, "loss": null, "memory": 1e999}']
    odd += ['{"stage": "denoiser", "step": -1, "loss": 1}', '{"stage": "denoiser", "step": 1' + "0" * 400 + "}"]
    odd += ['{"stage": "denoiser", "step": 1000, "loss": true, "lr": "x"}', "[" * 100_000]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write("\n".join(odd).encode() + b'\n\xff\xfe\n{"stage": "denoiser", "step": 10')
    assert report.page(run) == before


def test_damaged_pictures_and_configuration_are_left_out(run: Path) -> None:
    (run / "samples" / "denoiser-00001050.png").write_bytes(b"GIF89a" * 9)
    (run / "samples" / "denoiser-00001100.png").write_bytes(b"")
    (run / "samples" / "notes.png").write_bytes(picture(1))
    (run / "tinydiff.toml").write_text("[broken")
    page = shown(run)
    assert len(page.pictures()) == 8  # the newest and one of its strip are none, the autoencoder's is there
    assert "1,000 steps" in page.text


def test_an_empty_run_has_a_report_and_a_folder_that_is_none_has_one(tmp_path: Path) -> None:
    assert "Nothing measured yet" in shown(tmp_path).text
    (tmp_path / "tinydiff.toml").write_text(to_toml(config.load()))
    page = shown(tmp_path)
    assert page.text.count("not begun") == 2 and not page.tags["svg"]


def test_parameters_come_from_checkpoint_headers(run: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000, 1230], "data_offsets": [0, 4 * 1230 * 1000]}}).encode()
    folder = run / "checkpoints" / "autoencoder-00002000"
    folder.mkdir(parents=True)
    with (folder / "weights.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * 1230 * 1000)
    assert "autoencoder 1.23 M" in shown(run).text
    (folder / "weights.safetensors").write_bytes(b"cut")
    assert "Parameters" not in shown(run).text


def test_the_size_is_bounded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (run / "metrics.jsonl").open("w") as file:
        rng = np.random.default_rng(0)
        file.writelines(
            metric("denoiser", n, loss=float(rng.lognormal()), grad_norm=float(rng.random())) for n in range(30_000)
        )
    monkeypatch.setattr(report, "MAX_PICTURES", 4 * len(picture(1)) + 100)
    page = shown(run)
    assert len(page.pictures()) == 4 and "too large to show here" in page.text
    assert page.pictures()[0] == picture(20) and page.pictures()[-1] == picture(99)  # the newest ones go first
    assert (run / "report.html").stat().st_size < 100_000


def test_a_hundred_thousand_lines_are_read_in_time(tmp_path: Path) -> None:
    """Processor time, and four times what it takes: 0.6 s when this was written."""
    values = {"loss": 0.1234567, "lr": 1e-4, "grad_norm": 0.25, "memory": 1.5, "steps_per_second": 2.0}
    line = metric("denoiser", 7, **values, **dict.fromkeys([*charts.NOISE, "images_per_second"], 0.2345678))
    (tmp_path / "metrics.jsonl").write_text("".join(line.replace("7", str(n), 1) for n in range(100_000)))
    begun = time.process_time()
    report.write(tmp_path)
    assert time.process_time() - begun < 2.5 and (tmp_path / "report.html").stat().st_size < 200_000


def test_it_replaces_the_old_report_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write(run)
    before = (run / "report.html").read_bytes()
    report.write(run)
    assert (run / "report.html").read_bytes() == before
    assert [p.name for p in run.iterdir() if p.name.startswith(".tmp")] == []


# ---- curves --------------------------------------------------------------------------------------------------------


def series(values: list[float], every: int = 1) -> charts.Series:
    found = charts.Series()
    for n, value in enumerate(values):
        found.add(n * every, value)
    return found


def traced(drawn: str, kind: str) -> list[list[tuple[float, ...]]]:
    """The points of every path of this class."""
    paths = re.findall(rf'class="{kind}" d="M([^"H]+)"', drawn)
    return [[tuple(map(float, point.split())) for point in path.split("L")] for path in paths]


def test_a_curve_runs_through_its_points() -> None:
    """A loss that falls from 1 to 0.01 on a log axis is a straight line; 0.1 lies half-way."""
    drawn = charts.draw(charts.Chart("Loss", {"loss": ""}, log=True), {"loss": series([1.0, 0.1, 0.01], 50)})
    [points] = traced(drawn, "line k0")
    assert [x for x, _ in points] == [0, 50, 100]
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.01)
    rule = re.findall(r'class="rule" d="M0 ([\d.]+)H100"', drawn)
    assert {float(y) for y in rule} >= {y for _, y in points}  # 1, 0.1 and 0.01 have their rules
    assert re.findall(r">([\d.e-]+)</span>", drawn)[:3] == ["0.01", "0.1", "1"]


def test_a_single_point_is_a_dot_and_nothing_draws_nothing() -> None:
    chart = charts.Chart("PSNR", {"psnr": ""})
    [points] = traced(charts.draw(chart, {"psnr": series([25.0])}), "line k0 dot")
    assert points[0] == points[1]
    assert charts.draw(chart, {}) == charts.draw(chart, {"psnr": charts.Series()}) == ""
    assert charts.draw(charts.Chart("Loss", {"loss": ""}, log=True), {"loss": series([-1.0, 0.0])}) == ""


BANDS = {name: series([2.0 ** -(band + n) for n in range(5)]) for band, name in enumerate(charts.NOISE)}


def test_curves_of_one_chart_share_its_axes_and_have_a_key() -> None:
    """Each band has half the loss of the one before: on a log axis the same line, a fixed distance lower."""
    drawn = charts.draw(charts.Chart("Loss by noise", charts.NOISE, log=True), BANDS)
    first, *others = [traced(drawn, f"line k{band}")[-1] for band in range(4)]
    for band, other in enumerate(others, 1):
        drops = [low - high for (_, high), (_, low) in zip(first, other, strict=True)]
        assert drops == pytest.approx([band * (others[0][0][1] - first[0][1])] * 5, abs=0.03) and drops[0] > 5
    assert all(0 <= y <= 100 for line in (first, *others) for _, y in line)
    key = Page(drawn)
    assert key.tags["svg"] == 5 and "least 0.0625" in key.text and "most 0.00781" in key.text


def test_a_curve_that_is_missing_does_not_change_how_the_others_look() -> None:
    """So that a band keeps its colour when another has no samples."""
    drawn = charts.draw(charts.CHARTS[1], {name: BANDS[name] for name in ("loss_1", "loss_3")})
    assert set(re.findall(r"line (k\d)", drawn)) == {"k1", "k3"}
    assert "less" in drawn and "least" not in drawn


def test_curves_are_told_apart_by_dashes_and_in_both_colour_schemes_by_colour() -> None:
    dashes = re.findall(r"\.k(\d) { stroke: var\(--line\1\); stroke-dasharray: ([^;]+);", report.TEMPLATE.read_text())
    assert len({pattern for _, pattern in dashes}) == 3 == len(charts.NOISE) - 1  # and the first is whole
    for kind in ("line", "line1", "line2", "line3"):
        light, dark = re.findall(rf"--{kind}: (#\w+);", report.TEMPLATE.read_text())
        assert contrast(light, "#ffffff") > 3 < contrast(dark, "#14181c")  # WCAG 2.1, 1.4.11


def contrast(a: str, b: str) -> float:
    """WCAG 2.1's contrast ratio of two colours."""
    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(
    ("right", "last"), [(800, "800"), (12_000, "12000"), (20_000, "20k"), (999_999, "800k"), (2e6, "2M")]
)
def test_steps_are_short(right: float, last: str) -> None:
    labels = [label for _, label in charts.x_ticks(right)]
    assert labels[0] == "0" and labels[-1] == last


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_smoothing_equals_plain_means(values: list[float]) -> None:
    n, half = len(values), max(1, len(values) // 40)
    plain = [np.mean(values[i - min(half, i) : i + min(half, i) + 1]) for i in range(n)]
    assert charts.smooth(np.array(values)) == pytest.approx(plain, abs=1e-6 * max(1, *map(abs, values), 1))


@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_thinning_keeps_order_and_the_extremes_of_every_stretch(length: int, seed: int) -> None:
    """By brute force, over values of which many are equal."""
    values = np.random.default_rng(seed).normal(size=length).round(1)
    kept = charts.thin(np.stack([np.arange(length), values]))
    assert kept.shape[1] <= charts.POINTS and (np.diff(kept[0]) > 0).all()
    assert all(values[int(step)] == value for step, value in kept.T)
    for part in np.array_split(np.arange(length), charts.POINTS // 2) if length > charts.POINTS else []:
        inside = kept[1, (kept[0] >= part[0]) & (kept[0] <= part[-1])]
        assert inside.min() == values[part].min() and inside.max() == values[part].max()
    assert length > charts.POINTS or kept.shape[1] == length


@given(st.floats(-1e5, 1e5), st.floats(1e-6, 1e6), st.sampled_from(charts.CHARTS))
def test_axes_have_a_few_ticks_inside(start: float, width: float, chart: charts.Chart) -> None:
    values = np.array([start, start + width])
    values = np.abs(values) + 1e-3 if chart.log or chart.zero else values
    low, high = charts.bounds(np.log10(values) if chart.log else values, chart, next(iter(chart.curves)))
    assert low < high and (low == 0 if chart.zero else True)
    ticks = charts.y_ticks(low, high, chart.log)
    assert 2 <= len(ticks) <= 8 and all(-1e-6 <= at <= 1 + 1e-6 for at, _ in ticks)


@given(st.floats(1e-7, 1e7), st.floats(1.05, 1e9))
def test_log_ticks_are_round_and_inside(low: float, ratio: float) -> None:
    found = charts.log_values(low, low * ratio)
    assert 2 <= len(found) <= 8 and found == sorted(set(found))
    assert all(low * (1 - 1e-9) <= value <= low * ratio * (1 + 1e-9) for value in found)
    assert all(math.isclose(float(f"{value:.3g}"), value, rel_tol=1e-9) for value in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.267, "0.267"), (1e-5, "1e-5"), (2.5e-06, "2.5e-6"), (0.0, "0"), (1.4e9, "1.4e9"), (12.0, "12")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert charts.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (700, "12 min"), (5399, "1 h 30 min"), (12_000, "3 h 20 min")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


@given(st.integers(0, 50), st.integers(2, 9))
def test_spread_keeps_both_ends(length: int, count: int) -> None:
    found = report.spread(range(length), count)
    assert len(found) == min(length, count) and found == sorted(set(found))
    assert not length or (found[0], found[-1]) == (0, length - 1)
