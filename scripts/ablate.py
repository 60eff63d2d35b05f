"""What each option of a denoiser's network gives on shapes at equal arithmetic, against the default, as a markdown table.

    python scripts/ablate.py unet|dit [--steps N] [--seeds N] [--count N] [--folder DIR] [NAME=VALUE ...]

Options and their values are read off the keys of `[unet]` or `[dit]` that no other program has. The default trains `--steps`
updates; an option gets as many as need the same operations in the denoiser (`tinydiff inspect` counts them). All share one
autoencoder and its latents, as in scripts/experiments.py. Each is scored by its held-out loss and by the share of `--count`
unseen captions that the oracle reads in its pictures. What is in DIR already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import experiments
from experiments import autoencoder, directory, remembered, scored

from tinydiff import inspect
from tinydiff.measure.intervals import wilson
from tinydiff.networks import DENOISERS
from tinydiff.schema import to_toml

IMAGES = 16_384  # whose latents all share
NEEDED: dict[str, list[str]] = {}  # what an option wants beside it
BASES = {"unet": [], "dit": ["denoiser.kind=dit", "dit.size=custom", "dit.num_layers=6", "dit.num_attention_heads=4"]}


def options(kind: str) -> Iterator[tuple[str, list[str]]]:
    """Every option of a kind of network by its name in the table, and what sets it."""
    for f in fields(DENOISERS[kind].settings):
        values = [v for v in f.metadata["choices"] if v != f.default] if f.metadata["own"] else []
        for value in [True] if f.metadata["own"] and f.default is False else values:
            name = f"{f.name}={json.dumps(value)}" if value is True else f"{f.name}={value}"
            yield name, [f"{kind}.{name}", *NEEDED.get(name, [])]


def settings(kind: str, folder: Path, seed: int, changes: list[str], steps: int) -> Any:
    return experiments.settings("shapes", folder, seed, [f"data.samples={IMAGES}", *BASES[kind], *changes], steps)


def operations(kind: str, folder: Path, changes: list[str]) -> int:
    """Of one call of the denoiser for one image."""
    path = folder / "counted.toml"
    path.write_text(to_toml(settings(kind, folder, 0, changes, 100)))
    return inspect.configuration(path)["cost"]["networks"][DENOISERS[kind].folder]["flops"]


def trained(
    kind: str, folder: Path, seed: int, name: str, changes: list[str], steps: int, count: int
) -> dict[str, Any]:
    """The scores of an option after `steps` updates."""
    run = directory(folder, seed, f"{kind}-{name}")

    def scores() -> dict[str, Any]:
        from tinydiff.training import loop

        begun = time.process_time()
        loop.run(settings(kind, folder, seed, changes, steps), run)
        seconds = time.process_time() - begun
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        loss = [row["held_out_loss"] for row in rows if "held_out_loss" in row][-1]
        right = round(scored(run, "shapes", count, "--features", "none")["all"] * count)
        return {"loss": loss, "right": right, "count": count, "steps": steps, "seconds": seconds}

    return remembered(run / "scores.json", scores)


def line(name: str, rows: list[dict[str, Any]], default: list[dict[str, Any]]) -> str:
    """A row of the table: means over seeds with the lowest and highest, and the share of captions with its interval of 95 %."""
    losses = [row["loss"] for row in rows]
    apart = [row["loss"] / base["loss"] - 1 for row, base in zip(rows, default, strict=True)]
    right, count = (sum(row[key] for row in rows) for key in ("right", "count"))
    low, high = wilson(right, count)
    duration = statistics.mean(row["seconds"] / base["seconds"] for row, base in zip(rows, default, strict=True))
    cells = [name, str(rows[0]["steps"]), f"{duration:.2f}", f"{statistics.mean(losses):.4f}"]
    cells += [f"{statistics.mean(apart):+.1%} ({min(apart):+.1%} to {max(apart):+.1%})"]
    cells += [f"{right / count:.1%} ({low:.1%} to {high:.1%})"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=BASES)
    parser.add_argument("names", nargs="*", help="options, as the table names them; all without any")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"))
    given = parser.parse_intermixed_args()  # names after options, too
    every = dict(options(given.kind))
    if wrong := [name for name in given.names if name not in every]:
        parser.error(f"{', '.join(wrong)}: no option; give some of {', '.join(every)}")
    folder = given.folder.resolve()
    autoencoder(folder)
    rows = {"default": [], **{name: every[name] for name in given.names or every}}
    counts = {name: operations(given.kind, folder, changes) for name, changes in rows.items()}
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(given.seeds):
        for name, changes in rows.items():
            steps = round(given.steps * counts["default"] / counts[name])
            row = trained(given.kind, folder, seed, name, changes, steps, given.count)
            results.setdefault(name, []).append(row)
            print(f"{name}, seed {seed}: {row}", file=sys.stderr, flush=True)
    print(
        "| option | updates | time | held-out loss | against the default | captions right |\n|---|---|---|---|---|---|"
    )
    for name, each in results.items():
        print(line(name, each, results["default"]))


if __name__ == "__main__":
    main()
