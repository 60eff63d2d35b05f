"""The training report: parsed as HTML, checked for what it must not hold, its axes against arithmetic."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import config, images, report

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


def metric(stage: str, step: int, **values: float) -> str:
    return json.dumps({"stage": stage, "step": step} | values) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that is half-way through its second stage."""
    path = tmp_path / "a <b> & run"
    (path / "samples").mkdir(parents=True)
    (path / "tinydiff.toml").write_text(config.to_toml(config.load(None, ["data.path='<i>data'", *STEPS])))
    lines = [
        metric("autoencoder", n, loss=1 / n, lr=1e-3, grad_norm=0.5, l1=0.1, steps_per_second=2.0)
        for n in range(10, 2001, 10)
    ]
    lines += [metric("autoencoder", n, psnr=20 + n / 1000) for n in (500, 1000, 2000)]
    lines += [
        metric("denoiser", n, loss=0.3, lr=1e-3, grad_norm=0.5, steps_per_second=4.0) for n in range(10, 1001, 10)
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
    for name in ("Loss", "Learning rate", "Gradient norm", "Speed", "Reconstruction"):
        assert name in page.text
    assert page.tags["svg"] == 9  # four of either, and the PSNR


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
    (tmp_path / "tinydiff.toml").write_text(config.to_toml(config.load()))
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


def test_it_replaces_the_old_report_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write(run)
    before = (run / "report.html").read_bytes()
    report.write(run)
    assert (run / "report.html").read_bytes() == before
    assert [p.name for p in run.iterdir() if p.name.startswith(".tmp")] == []


# ---- curves --------------------------------------------------------------------------------------------------------


def test_a_curve_runs_through_its_points() -> None:
    """A loss that falls from 1 to 0.01 on a log axis is a straight line; 0.1 lies half-way."""
    series = report.Series([0, 50, 100], [1.0, 0.1, 0.01])
    drawn = report.draw(report.Chart("loss", "Loss", log=True), series)
    [line] = re.findall(r'class="line" d="M([^"]+)"', drawn)
    points = [tuple(map(float, p.split())) for p in line.split("L")]
    assert [x for x, _ in points] == [0, 50, 100]
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.01)
    rule = re.findall(r'class="rule" d="M0 ([\d.]+)H100"', drawn)
    assert {float(y) for y in rule} >= {y for _, y in points}  # 1, 0.1 and 0.01 have their rules
    assert re.findall(r">([\d.e-]+)</span>", drawn)[:3] == ["0.01", "0.1", "1"]


def test_a_single_point_is_a_dot_and_nothing_draws_nothing() -> None:
    chart = report.Chart("psnr", "PSNR")
    assert "dot" in report.draw(chart, report.Series([7], [25.0]))
    assert report.draw(chart, report.Series()) == ""
    assert report.draw(report.Chart("loss", "Loss", log=True), report.Series([1], [-1.0])) == ""


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_smoothing_equals_plain_means(values: list[float]) -> None:
    n, half = len(values), max(1, len(values) // 40)
    plain = [np.mean(values[i - min(half, i) : i + min(half, i) + 1]) for i in range(n)]
    assert report.smooth(np.array(values)) == pytest.approx(plain, abs=1e-6 * max(1, *map(abs, values), 1))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=3000))
def test_thinning_keeps_order_and_extremes(values: list[float]) -> None:
    points = np.stack([np.arange(len(values)), np.array(values)])
    kept = report.thin(points)
    assert kept.shape[1] <= report.POINTS and (np.diff(kept[0]) > 0).all()
    assert kept[1].min() == min(values) and kept[1].max() == max(values)


@given(st.floats(-1e5, 1e5), st.floats(1e-6, 1e6), st.sampled_from(report.CHARTS))
def test_axes_have_a_few_ticks_inside(start: float, width: float, chart: report.Chart) -> None:
    values = np.array([start, start + width])
    values = np.abs(values) + 1e-3 if chart.log or chart.zero else values
    low, high = report.bounds(np.log10(values) if chart.log else values, chart)
    assert low < high and (low == 0 if chart.zero else True)
    ticks = report.y_ticks(low, high, chart.log)
    assert 2 <= len(ticks) <= 8 and all(-1e-6 <= at <= 1 + 1e-6 for at, _ in ticks)


@given(st.floats(1e-7, 1e7), st.floats(1.05, 1e9))
def test_log_ticks_are_round_and_inside(low: float, ratio: float) -> None:
    found = report.log_values(low, low * ratio)
    assert 2 <= len(found) <= 8 and found == sorted(set(found))
    assert all(low * (1 - 1e-9) <= value <= low * ratio * (1 + 1e-9) for value in found)
    assert all(math.isclose(float(f"{value:.3g}"), value, rel_tol=1e-9) for value in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.267, "0.267"), (1e-5, "1e-5"), (2.5e-06, "2.5e-6"), (0.0, "0"), (1.4e9, "1.4e9"), (12.0, "12")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert report.number(value) == text


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
