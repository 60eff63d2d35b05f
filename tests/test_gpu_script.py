"""scripts/gpu.py on a CPU with tiny models: sections measure, fail and hang each for itself, and the table keeps what was."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gpu
import pytest
from gpu import BETWEEN, GOALS, Section, carried_out, table
from gpu_sections import Place, Row
from interpreters import ENV, ROOT

from tinydiff.backends import find_model

# Exporting a model takes most of a minute: bundles of the shipped one stand there already, and there are no others.
PROGRAM = """
import sys
import tinydiff.export
def export(source, out, precision="fp32", **more):
    raise RuntimeError(f"no exporting to {precision} in tests")
tinydiff.export.export = export
import gpu
gpu.main()
"""
CHOSEN = [
    "matrix",
    "parity torch fp32",
    "parity onnx fp32",
    "parity onnx int8",
    "shipped onnx fp32",
    "training",
    "nccl",
]
CHOSEN += ["dit-xl torch fp16$", "dit-xl diffusers", "first image shipped onnx"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def at(tmp_path: Path) -> Place:
    (tmp_path / "logs").mkdir()
    return Place("cpu", True, tmp_path)


def cells(text: str) -> dict[str, list[str]]:
    """A table's rows by their first column."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def measured(folder: Path, *sections: str) -> dict[str, list[str]]:
    """The table of the script, as it prints it and as it puts it into a file."""
    for precision in ("fp32", "fp16"):
        shutil.copytree(find_model(None), folder / f"shipped-{precision}")
    docs = folder / "gpu.md"
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    docs.write_text(BETWEEN.sub(table({}, ""), text), encoding="utf-8")  # of which nothing is kept
    command = [sys.executable, "-c", PROGRAM, *sections, "--device", "cpu", "--tiny"]
    command += ["--folder", str(folder), "--docs", str(docs)]
    env = ENV | {"PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), ENV["PYTHONPATH"]])}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = BETWEEN.search(docs.read_text())
    assert found and found[0] == done.stdout
    return cells(done.stdout)


@pytest.mark.peers
def test_sections_are_measured_on_a_cpu(tmp_path: Path) -> None:
    rows = measured(tmp_path, *CHOSEN)
    ran = {name for name, row in rows.items() if not row[0].startswith("not run")}
    batches = {f"DiT-XL/2, batch {n}, {r}" for n in (2, 8) for r in ("torch fp16", "diffusers", "diffusers compiled")}
    ratios = {f"DiT-XL/2, batch {n}, torch fp16 / diffusers compiled" for n in (2, 8)}
    steps = {f"training DiT-L/2, bf16, batch 128{more}" for more in ("", ", compiled", ", compiled, Muon")}
    sums = {f"DiT-XL/2, batch 8, {r}, kernels" for r in ("torch fp16", "diffusers", "diffusers compiled")}
    sums |= {f"{step}, kernels" for step in steps}
    single = {"parity, torch fp32", "parity, onnx fp32", "shipped model, batch 64, onnx fp32", "nccl in a world of one"}
    single |= {"first image, shipped model, onnx fp16", "matrix product, fp16", "matrix product, bf16"}
    assert ran == {*batches, *ratios, *steps, *sums, *single}
    assert "image equal, 100.00% of pixels" in rows["parity, torch fp32"][0]
    denoiser = re.search(r"denoiser (\S+),", rows["parity, onnx fp32"][0])
    assert denoiser and 0 < float(denoiser[1]) < 1e-4
    assert re.match(r"2 losses, at most 0\.0e\+00 from", rows["nccl in a world of one"][0])
    reason = "not run: RuntimeError: no exporting to int8 in tests"
    assert rows["parity, onnx int8"][0] == reason and rows["pytest -m gpu"][0] == "not run"
    assert all(row[2].startswith("CPU, tiny models, torch ") == (name in ran) for name, row in rows.items())


@pytest.mark.slow
@pytest.mark.peers
def test_all_sections_are_measured_on_a_cpu(tmp_path: Path) -> None:
    rows = measured(tmp_path)
    assert {row[0] for row in rows.values() if row[0].startswith("not run")} <= {
        "not run",
        *(f"not run: RuntimeError: no exporting to {precision} in tests" for precision in ("fp16", "bf16", "int8")),
    }


def raises(at: Place) -> Iterator[Row]:
    yield "first", 1.0, "1 ms"
    raise ImportError("no module named\nthe best")


def hangs(at: Place) -> Iterator[Row]:
    subprocess.Popen(["sleep", "60"])
    time.sleep(60)
    yield "first", 1.0, "1 ms"


def crashes(at: Place) -> Iterator[Row]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield "first", 1.0, "1 ms"


@pytest.mark.parametrize(
    ("run", "first", "reason"),
    [
        (raises, "1 ms", "ImportError: no module named the best"),
        (hangs, None, "took over 1 s"),
        (crashes, None, "ended by SIGKILL"),
        (lambda at: iter(()), None, "said nothing"),
    ],
)
def test_what_fails_takes_nothing_with_it(run, first: str | None, reason: str, at: Place) -> None:
    rows = carried_out("a/name", Section(run, {"first": "", "second": ""}), at, 1.0)
    assert rows["second"] == (None, f"not run: {reason}")
    assert rows["first"] == ((1.0, first) if first else rows["second"])


def test_time_is_kept_for_the_tests(at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, float] = {}

    def asked(name: str, section: Section, at: Place, limit: float) -> dict:
        given[name] = limit
        return {}

    monkeypatch.setattr(gpu, "carried_out", asked)
    monkeypatch.setattr(gpu, "exports", lambda at, wanted: [])
    gpu.run([], at, 10.0)
    assert list(given) == list(gpu.SECTIONS) and list(given)[-1] == "tests"
    assert all(
        limit <= section.most * 600 for limit, section in zip(given.values(), gpu.SECTIONS.values(), strict=True)
    )
    assert max(limit for name, limit in given.items() if name != "tests") <= 600 * 0.88 < given["tests"]
    late = gpu.run(["matrix"], at, 0.0)
    assert set(late.values()) == {(None, "not run: no time left")} and len(late) == 2


def test_a_name_that_is_none_of_a_section() -> None:
    with pytest.raises(SystemExit, match="no such section; there are matrix product, "):
        gpu.run(["nothing"], Place("cpu", True, Path()), 1.0)


def test_a_table_keeps_what_was_measured_before() -> None:
    name, other, third = list(GOALS)[:3]
    before = table({name: (1.0, "1 ms"), other: (None, "not run: no")}, "card A")
    after = cells(table({name: (None, "not run: no"), other: (2.0, "2 | ms")}, "card B", before))
    assert after[name] == ["1 ms", GOALS[name], "card A"] and after[other] == ["2 / ms", GOALS[other], "card B"]
    assert after[third] == ["not run", GOALS[third], ""] and list(after) == list(GOALS)


def test_the_table_of_the_docs_has_every_row_and_goal() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    found = BETWEEN.search(text)
    assert found and table({}, "", found[0]) == found[0]
