"""What each option of a denoiser's network gives on shapes at equal arithmetic, against the default, as a markdown table.

    python scripts/ablate.py unet|dit [--updates N] [--seeds N] [--folder DIR] [NAME=VALUE ...]

Options and their values are read off the keys of `[unet]` or `[dit]` that no other program has. The default trains `--updates`
of 16 images; an option gets as many as need the same operations in the denoiser (`tinydiff inspect` counts them). All share
one autoencoder and its latents, as in scripts/experiments.py. What is compared is the loss on held-out images, whose noise
and levels are the same for all. What is in DIR already is not run again.
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
from experiments import autoencoder, directory, remembered

from tinydiff import inspect
from tinydiff.networks import DENOISERS
from tinydiff.schema import to_toml

ALIKE = ["data.samples=16384", "train.denoiser.batch_size=16", "train.validation_samples=0"]
BASES = {"unet": [], "dit": ["denoiser.kind=dit", "dit.size=custom", "dit.num_layers=6", "dit.num_attention_heads=4"]}
OF_DATA = ("label", "image")  # which shapes do not have
NUMBERS = {"time_tokens": 4}
NEEDED = {"learn_frequencies=true": "positions=sine"}  # what an option wants beside it


def options(kind: str) -> Iterator[tuple[str, list[str]]]:
    """Every option of a kind of network by its name in the table, and what sets it."""
    for f in fields(DENOISERS[kind].settings):
        values = [v for v in f.metadata["choices"] if v != f.default] if f.metadata["own"] else []
        values += ["true"] if f.metadata["own"] and f.default is False else []
        for name in [f"{f.name}={v}" for v in [*values, *([NUMBERS[f.name]] if f.name in NUMBERS else [])]]:
            if f.name not in OF_DATA:
                yield name, [f"{kind}.{each}" for each in (name, NEEDED.get(name)) if each]


def settings(kind: str, folder: Path, seed: int, changes: list[str], updates: int) -> Any:
    return experiments.settings("shapes", folder, seed, [*ALIKE, *BASES[kind], *changes], updates)


def operations(kind: str, folder: Path, changes: list[str]) -> int:
    """Of one call of the denoiser for one image."""
    path = folder / "counted.toml"
    path.write_text(to_toml(settings(kind, folder, 0, changes, 100)))
    return inspect.configuration(path)["cost"]["networks"][DENOISERS[kind].folder]["flops"]


def trained(kind: str, folder: Path, seed: int, name: str, changes: list[str], updates: int) -> dict[str, Any]:
    """The last held-out loss of an option, and the processor time of its training."""
    run = directory(folder, seed, f"{kind}-{name}")

    def scores() -> dict[str, Any]:
        from tinydiff.training import loop

        begun = time.process_time()
        loop.run(settings(kind, folder, seed, changes, updates), run)
        seconds = time.process_time() - begun
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        loss = [row["held_out_loss"] for row in rows if "held_out_loss" in row][-1]
        return {"loss": loss, "updates": updates, "seconds": seconds}

    return remembered(run / "scores.json", scores)


def line(name: str, rows: list[dict[str, Any]], default: list[dict[str, Any]]) -> str:
    """A row of the table: means over seeds, with the lowest and the highest where there are several."""
    apart = [100 * (row["loss"] / base["loss"] - 1) for row, base in zip(rows, default, strict=True)]
    longer = statistics.mean(row["seconds"] / base["seconds"] for row, base in zip(rows, default, strict=True))
    between = f" ({min(apart):+.1f} to {max(apart):+.1f})" if len(apart) > 1 else ""
    loss = statistics.mean(row["loss"] for row in rows)
    return f"| {name} | {rows[0]['updates']} | {longer:.2f} | {loss:.4f} | {statistics.mean(apart):+.1f} %{between} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=BASES)
    parser.add_argument("names", nargs="*", help="options, as the table names them; all without any")
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"))
    given = parser.parse_intermixed_args()  # names after options, too
    every = dict(options(given.kind))
    if wrong := [name for name in given.names if name not in every]:
        parser.error(f"{', '.join(wrong)}: no option; give some of {', '.join(every)}")
    folder = given.folder.resolve()
    autoencoder(folder)
    rows = {"default": [], **{name: every[name] for name in given.names or every}}
    default = operations(given.kind, folder, [])
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(given.seeds):
        for name, changes in rows.items():
            updates = round(given.updates * default / operations(given.kind, folder, changes))
            row = trained(given.kind, folder, seed, name, changes, updates)
            results.setdefault(name, []).append(row)
            print(f"{name}, seed {seed}: {row}", file=sys.stderr, flush=True)
    print("| option | updates | time | held-out loss | against the default |\n|---|---|---|---|---|")
    for name, each in results.items():
        print(line(name, each, results["default"]))


if __name__ == "__main__":
    main()
