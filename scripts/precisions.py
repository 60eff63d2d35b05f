"""What each precision of an exported bundle costs and gives on a CPU, as a markdown table.

    python scripts/precisions.py [MODEL] [--batch N] [--runs N]

Every bundle is exported and verified as always: its bytes, the worst of its graphs and its image are from there. Then all
denoisers are called in turn on one core, and each call's processor time is divided by that of float32's in the same turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch
if hasattr(os, "sched_setaffinity"):  # before onnxruntime, which starts as many threads as it may use cores
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

CALLS = 4  # timed together
FORMS = [("fp32", "any"), ("fp16", "any"), ("fp16", "cpu"), ("bf16", "any"), ("int8", "any"), ("int8", "cpu")]


def main() -> None:
    import torch

    from tinydiff.backends import find_model
    from tinydiff.backends.sessions import open_session
    from tinydiff.checkpoints import folder
    from tinydiff.checkpoints.source import Source
    from tinydiff.export import Size, examples, export
    from tinydiff.networks import graphs

    parser = argparse.ArgumentParser(description="What each precision costs and gives.")
    parser.add_argument("model", nargs="?", help="the shipped model by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    source, rows, sessions = Source(find_model(given.model)), {}, {}
    model, d = folder.load(source), source.description
    graph = graphs(model.configs)[source.denoiser]
    side = d.size // d.factor // graph.step
    inputs = {k: v.numpy() for k, v in examples(source.denoiser, model, Size(given.batch, side, side, 0)).items()}
    with tempfile.TemporaryDirectory() as scratch:
        for precision, device in FORMS:
            bundle = Path(scratch, f"{precision}-{device}")
            rows[precision, device] = export(source, bundle, precision, device=device)
            if precision != "bf16":
                sessions[precision, device] = open_session(bundle, source.denoiser, graph, "cpu")
        times: dict[tuple[str, str], list[float]] = {form: [] for form in sessions}
        for _ in range(given.runs + 1):
            for form, session in sessions.items():
                begun = time.process_time()
                for _ in range(CALLS):
                    session.run(None, inputs)
                times[form].append(time.process_time() - begun)
        print(
            "| `--precision` | `--device` | megabytes | worst graph | image, dB | time on a CPU |\n|---|---|---|---|---|---|"
        )
        for form in FORMS:
            *parts, image = rows[form]
            size, worst = sum(row["megabytes"] for row in parts), max(row["max_abs_diff"] for row in parts)
            ratios = [a / b for a, b in zip(times.get(form, []), times[FORMS[0]], strict=False)][1:]
            took = (
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                if ratios
                else "runs on CUDA alone"
            )
            print(f"| {form[0]} | {form[1]} | {size:.1f} | {worst:.0e} | {image['psnr']:.0f} | {took} |")
    print(f"\nonnxruntime on one core, batch {given.batch}; torch {torch.__version__}")


if __name__ == "__main__":
    main()
