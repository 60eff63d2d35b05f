"""What a training run leaves behind, to be compared with what another one leaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from forker import Forker

from tinydiff.training.metrics import TIMED


def sha256(run_dir: Path, paths: Iterable[Path]) -> dict[str, str]:
    """By each file's path inside the run."""
    return {str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The log, a row a line."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in metrics(run_dir)]


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the last weights, average and moments of both stages and of the model, and the log without its times."""
    last = {name: max(run_dir.glob(f"checkpoints/{name}-*")) for name in ("autoencoder", "denoiser")}
    paths = [*run_dir.glob("model/*/*.safetensors"), *(p for c in last.values() for p in c.glob("*.safetensors"))]
    found = sha256(run_dir, paths)
    assert len(found) == 3 + 2 * 5
    return found | {"log": json.dumps(untimed(run_dir))}


def said(run_dir: Path) -> str:
    return Path(f"{run_dir}.log").read_text()


def finishes_alike(forker: Forker, run_dir: Path, reference: Path) -> None:
    """The same command again, to the same bits, with nothing half-made left."""
    assert forker.run(run_dir) == 0, said(run_dir)
    assert digests(run_dir) == digests(reference)
    assert [p for p in run_dir.rglob(".*") if p.name != ".lock"] == []
