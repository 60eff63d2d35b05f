"""Recipes of the denoiser at equal processor time, each against AdamW, as a markdown table.

    python scripts/experiments.py shapes|emoji [--minutes M] [--seeds N] [--count N] [--folder DIR] [NAME ...]

The machine may be shared, so time is the processor's, of one thread. AdamW gets as many steps as take `--minutes`. A variant's
step is timed in turn with one of AdamW, which tells how many steps it gets; warm-up, decay and averaging
follow from them. All variants share one autoencoder (for shapes trained once by the default recipe, for emoji the shipped
one) and its cached latents. NAMEs choose variants; without them all are run. What is in DIR already is not run again: the
same command goes on where it was stopped.

Each finished model is scored by `tinydiff evaluate`, of `--count` captions: on shapes the oracle reads unseen captions, on emoji
the nearest image of the data must be the caption's own. emoji expects data/emoji/train (scripts/emoji.py data/emoji --phrases).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

MUON, X0 = ("train.denoiser.optimizer=muon", "lr*2.5"), ("diffusion.prediction=sample", "diffusion.loss_weight=v")
CONTRASTIVE, ALIGNED = "diffusion.contrastive_weight=0.05", "train.denoiser.alignment_weight=0.5"
FLOW = ("diffusion.schedule=flow", "diffusion.prediction=flow", "diffusion.timestep_density=logit_normal")
VARIANTS: dict[str, Sequence[str]] = {
    "adamw": (),
    "muon": MUON,
    "muon-same-rate": MUON[:1],
    "adamw-lr*2": ("lr*2",),
    "x0-as-v": X0,
    "contrastive": (CONTRASTIVE,),
    "aligned": (ALIGNED,),
    "qk-norm": ("unet.qk_norm=true",),
    "flow": (*FLOW, "diffusion.logit_mean=0.5"),
    "uniform": ("diffusion.timestep_density=uniform",),
    "batch*0.5": ("batch_size*0.5",),
    "batch*2": ("batch_size*2",),
    "compiled": ("train.compile=true",),
    "muon-batch*2": (*MUON, "batch_size*2"),
    "muon-qk-contrastive": (*MUON, CONTRASTIVE, "unet.qk_norm=true"),
    "muon-flow": (*MUON, *FLOW, "diffusion.logit_mean=0.5"),
    "muon-flow-aligned": (*MUON, *FLOW, "diffusion.logit_mean=0.5", ALIGNED),
    "all": (*MUON, CONTRASTIVE, ALIGNED, "unet.qk_norm=true"),
}
ROOT = Path(__file__).resolve().parents[1]
# How emoji are drawn before they are distilled: the recipe's own [generate] is for afterwards.
GUIDED = ["generate.steps=20", "generate.cfg_scale=2.5", "generate.sampler=deis", "generate.spacing=log_snr"]
# What every recipe is compared with: AdamW at the rate that it wants.
ADAMW = {"shapes": ["train.denoiser.optimizer=adamw", "train.denoiser.lr=0.001"], "emoji": []}
RECIPES = {"shapes": ROOT / "tinydiff.toml", "emoji": ROOT / "weights" / "emoji" / "tinydiff.toml"}
WARMUP, TIMED, ROUNDS = 0.1, 4, 5  # share of a run; steps timed at once; how many times in turn


def settings(data: str, folder: Path, seed: int, changes: Sequence[str], steps: int = 1000) -> Any:
    """The configuration of a variant of `steps` steps."""
    from tinydiff import config

    own = config.load(RECIPES[data], ADAMW[data]).train.stage("denoiser")
    scaled = [change.partition("*") for change in changes if "*" in change]
    changed = [f"train.denoiser.{k}={type(getattr(own, k))(getattr(own, k) * float(by))}" for k, _, by in scaled]
    vae = ROOT / "weights" / "emoji" if data == "emoji" else folder / "autoencoder" / "autoencoder"
    fixed = [f"autoencoder.path={vae}", f"train.seed={seed}", "train.threads=1", *(GUIDED if data == "emoji" else [])]
    fixed += ["train.autoencoder.steps=0", "train.distill.steps=0"]
    fixed += [f"train.denoiser.{k}={steps}" for k in ("steps", "save_every", "sample_every")]
    fixed += [f"train.denoiser.warmup={round(WARMUP * steps)}", f"train.denoiser.ema={1 - 20 / max(steps, 40):.4f}"]
    return config.load(
        RECIPES[data], [*ADAMW[data], *fixed, *(change for change in changes if "*" not in change), *changed]
    )


def autoencoder(folder: Path) -> None:
    """The autoencoder of shapes, by the default recipe."""
    from tinydiff import config
    from tinydiff.training import loop

    loop.run(config.load(RECIPES["shapes"], ["train.threads=1"]), folder / "autoencoder", last="autoencoder")


def directory(folder: Path, seed: int, name: str) -> Path:
    """A run's, in which latents and features are those of all runs of the seed."""
    run = folder / f"seed-{seed}" / name
    for shared in ("latents", "features"):
        (folder / f"seed-{seed}" / shared).mkdir(parents=True, exist_ok=True)
        run.mkdir(exist_ok=True)
        if not (run / shared).exists():
            (run / shared).symlink_to(folder / f"seed-{seed}" / shared)
    return run


class Steps:
    """A variant's training that is timed and thrown away."""

    def __init__(self, cfg: Any, run_dir: Path):
        from tinydiff.checkpoints import folder
        from tinydiff.data.dataset import Images, open_source
        from tinydiff.training import claim, loop
        from tinydiff.training.denoiser import DenoiserTask
        from tinydiff.training.run import Run
        from tinydiff.training.runtime import Runtime
        from tinydiff.training.state import Learner, Training

        run = Run(Runtime(cfg), run_dir)
        run.data = Images(open_source(cfg.data, cfg.train.seed), cfg.data)
        run.model = folder.build(cfg, run.claim.tokenizer(cfg, run.data), cfg.train.seed)
        for part in run.model.networks.values():
            run.runtime.placed(part)
        task, world = DenoiserTask(run), run.world
        task.rows = claim.split(range(task.settings.batch_size), task.name, task.settings, task.whole, world)
        for each in task.players.values():
            each.module.train()
            each.network = loop.spread(each.network, each.parts, world, cfg.train, run.runtime.dtype)
        training = Training([Learner.of(k, each.module, each.settings, world) for k, each in task.players.items()])
        self.step, self.n = lambda n: loop.step(run, task, training, n, loop.parts_of(task, n)), 0

    def seconds(self) -> float:
        """Processor time of a step."""
        begun = time.process_time()
        for _ in range(TIMED):
            self.step(self.n)
            self.n += 1
        return (time.process_time() - begun) / TIMED


def cost(data: str, folder: Path, changes: Sequence[str]) -> tuple[float, float]:
    """Processor time of a step of AdamW, in seconds, and of a variant's as a multiple of it."""
    both = [Steps(settings(data, folder, 0, each), directory(folder, 0, "timed")) for each in ((), changes)]
    for each in both:
        each.seconds()
    pairs = [(both[0].seconds(), both[1].seconds()) for _ in range(ROUNDS)]
    return min(first for first, _ in pairs), statistics.median(other / first for first, other in pairs)


def remembered(path: Path, computed: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds, computed if it is not there yet."""
    if not path.exists():
        path.write_text(json.dumps(computed()))
    return json.loads(path.read_text())


def scored(run: Path, data: str, count: int, *flags: str) -> dict[str, Any]:
    """What `tinydiff evaluate` says of a run's model."""
    command = [sys.executable, "-m", "tinydiff", "evaluate", str(run), "--data", data, "--count", str(count), "--json"]
    output = subprocess.run([*command, *flags], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return json.loads(output)


def trained(data: str, folder: Path, seed: int, name: str, minutes: float, count: int) -> dict[str, Any]:
    """The steps and scores of a variant."""
    run, changes = directory(folder, seed, name), VARIANTS[name]
    default = remembered(folder / "seconds.json", lambda: {"seconds": cost(data, folder, ())[0]})
    own = remembered(folder / f"{run.name}.json", lambda: {"ratio": cost(data, folder, changes)[1] if changes else 1.0})
    steps = round(minutes * 60 / default["seconds"] / own["ratio"])

    def scores() -> dict[str, Any]:
        from tinydiff.training import loop

        loop.run(settings(data, folder, seed, changes, steps), run)
        return scored(run, "shapes" if data == "shapes" else "data/emoji/train", count)

    return remembered(run / "scores.json", scores) | own | {"steps": steps}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Means over seeds, with the lowest and the highest."""
    rows = [row for rows in results.values() for row in rows]
    measures = [k for k in rows[0] if k in ("all", "nearest_top1", "nearest_top5") or k.startswith("frechet")]
    lines = [f"| variant | steps | time of a step | {' | '.join(measures)} |", "|---|---|---|" + "---|" * len(measures)]
    for name, rows in results.items():
        cells = []
        for measure in measures:
            values = [row[measure] * (1 if measure.startswith("frechet") else 100) for row in rows]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(f"| {name} | {rows[0]['steps']} | {rows[0]['ratio']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Recipes at equal processor time.")
    parser.add_argument("data", choices=RECIPES)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("runs/experiments"))
    given = parser.parse_intermixed_args()  # names after options, too
    if wrong := [name for name in given.names if name not in VARIANTS]:
        parser.error(f"{', '.join(wrong)}: no variant; give some of {', '.join(VARIANTS)}")
    folder = (given.folder / given.data).resolve()
    if given.data == "shapes":
        autoencoder(folder)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(given.seeds):
        for name in given.names or VARIANTS:
            row = trained(given.data, folder, seed, name, given.minutes, given.count)
            results.setdefault(name, []).append(row)
            print(f"{name}, seed {seed}: {row}", file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
