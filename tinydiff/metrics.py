"""Reading `metrics.jsonl`, what a run has measured: one JSON object a line, with "stage" and "step" among its keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def logged(run_dir: Path) -> set[str]:
    """The stages that the log of a run has lines of."""
    path = run_dir / "metrics.jsonl"
    rows = map(parse, path.read_bytes().split(b"\n")) if path.exists() else ()
    return {row["stage"] for row in rows if row}


def parse(line: bytes | str) -> dict[str, Any] | None:
    """A line of metrics, or None where it is none: half of one that a kill left, or something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(row, dict) and isinstance(row.get("stage"), str) and type(row.get("step")) is int
    return row if good and 0 <= row["step"] < 2**53 else None
