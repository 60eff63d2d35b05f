"""What a run on images will be, told before anything is trained: images, captions, networks, machine, time, and where it goes."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tinydiff import config
from tinydiff.checkpoints import new
from tinydiff.choices import Machine, machine
from tinydiff.cost import costs
from tinydiff.data.dataset import buckets, nearest
from tinydiff.data.facts import Facts
from tinydiff.networks import Table, graphs, network_of
from tinydiff.progress import duration
from tinydiff.stages import trained
from tinydiff.summary import short, table
from tinydiff.system import escaped, shown
from tinydiff.text.labels import LEAST
from tinydiff.training import advice

COPIES = 6  # of parameters, in float32: weights, gradients, average, two moments, and the copy that is saved
LEARNS = {"autoencoder": ("vae_encoder", "vae_decoder"), "denoiser": ("unet", "transformer", "text_encoder")}


def lines(cfg: config.Config, facts: Facts, run_dir: Path, warned: bool = False) -> list[str]:
    """The rows and, unless a person is `warned` later, the warnings, in lines that are safe to print."""
    notes = [] if warned else warnings(cfg, facts)
    return [
        *table(outlook(cfg, facts, machine(cfg.train.device), run_dir)),
        *(escaped(f"note: {line}") for line in notes),
    ]


def warnings(cfg: config.Config, facts: Facts) -> list[str]:
    """What is said before a run of its settings and its data."""
    return [*advice.of_settings(cfg), *advice.of_data(cfg, facts)]


def outlook(cfg: config.Config, facts: Facts, on: Machine, run_dir: Path) -> dict[str, str]:
    """Rows for a person. What is not known of a model that a run begins with is left out."""
    side, ratio, step = cfg.data.resolution, cfg.data.max_aspect_ratio, cfg.data.bucket_step
    low, high = facts.sizes.min(0), facts.sizes.max(0)
    sizes, used = buckets(side, ratio, step), nearest(buckets(side, ratio, step), *facts.sizes.T)
    shapes = [sizes[i] for i in np.flatnonzero(np.bincount(used, minlength=len(sizes)))]
    listed = ", ".join(f"{w}x{h}" for w, h in shapes[:6]) + ", ..." * (len(shapes) > 6)
    first, *others = facts.report.splitlines()
    rows = {"images": first} | {f"  part {n}": text for n, text in enumerate(others, 1)}
    rows["sizes"] = f"{low[0]}x{low[1]} to {high[0]}x{high[1]} pixels, half of them {facts.side} or more a side; "
    rows["sizes"] += f"trained on at {listed}"
    rows["captions"] = f"{len(facts.distinct)} different, {facts.each:.3g} an image{read(cfg, facts)}"
    rows |= {f"  such as {n}": text for n, text in enumerate(facts.examples, 1)}
    rows |= of_base(cfg, on) if cfg.train.base else of_networks(cfg, on)
    rows["result"] = f"{shown(run_dir)}: model/, and report.html while it trains"
    return rows


def of_base(cfg: config.Config, on: Machine) -> dict[str, str]:
    """What learns of a model that a run begins with, and where."""
    stages = trained(cfg.train)
    steps = ", ".join(f"{name}: {cfg.train.stage(name).steps:,} updates" for name in stages)
    time = duration(cfg.train.time) if cfg.train.time else steps
    return {"begins with": f"{shown(cfg.train.base)}; learns: {', '.join(stages)}", "machine": on.said, "time": time}


def read(cfg: config.Config, facts: Facts) -> str:
    """How long the longest caption is, and how many are cut."""
    text = cfg.text_encoder
    if text.kind != "clip" or cfg.train.base:
        return ""
    lengths = facts.lengths(text.vocab_size)
    cut = sum(length > text.max_position_embeddings for length in lengths)
    told = f"{cut} are cut" if cut else "none is cut"
    return f"; the longest has {lengths[-1]} tokens, {text.max_position_embeddings} are read: {told}"


def of_networks(cfg: config.Config, on: Machine) -> dict[str, str]:
    """What is trained, on what, and how long an update takes, by one that is tried."""
    text = cfg.text_encoder
    pieces = LEAST + 1 if cfg.text_network.labels else 0 if cfg.text_network.given(cfg) else text.vocab_size
    stand_in = SimpleNamespace(vocab_size=pieces, bos=0, eos=0, pad=LEAST, max_length=0, table=dict)
    configs = new.configs(cfg, stand_in)
    side, tokens = cfg.latents["sample_size"], text.max_position_embeddings
    counted = costs(configs, side, side, tokens, cfg.autoencoder.factor)
    stages = trained(cfg.train)
    frozen = {} if "autoencoder" in stages else {"vae_encoder": 1, "vae_decoder": 1}
    listed = (f"{k} {short(c['parameters'], '')}{', as it is' * (k in frozen)}" for k, c in counted.items())
    memory = 0.0
    for name, graph_names in LEARNS.items():
        of = [counted[k] for k in graph_names if k in counted]
        rows = cfg.train.stage(name).rows if name in stages else 0
        memory = max(memory, sum(4 * COPIES * c["parameters"] + rows * c["activations"] for c in of))
    told = {"networks": "parameters: " + ", ".join(listed)}
    seconds = {name: tried(cfg, configs, name) for name in LEARNS if name in stages}
    used = "bf16 where it has it" if cfg.train.precision == "auto" else cfg.train.precision
    told["machine"] = f"{on.said}, {used}, about {memory / 1e9:.1f} GB"
    shares, left = sum(row.share for row in stages.values()), cfg.train.time
    each = []
    for name, row in stages.items():
        stage, update = cfg.train.stage(name), seconds.get(name)
        steps = max(1, int(left * row.share / shares / update)) if left and update else stage.steps
        about = (
            f"about {steps:,} updates of {stage.batch_size} images"
            if update
            else f"{stage.batch_size} images an update"
        )
        each.append(f"{name}: {about}" + (f", {update:.2g} s each" if update else ""))
    total = left or sum(cfg.train.stage(name).steps * value for name, value in seconds.items())
    told["time"] = f"{'' if left else 'about '}{duration(total)}; " + "; ".join(each)
    return told


def tried(cfg: config.Config, configs: dict[str, Table], stage: str) -> float:
    """Seconds of one update of a stage: forward and backward passes of its networks on noise, the second of two."""
    import torch

    from tinydiff.training.runtime import Runtime

    runtime, rows, took, latest = Runtime(cfg), cfg.train.stage(stage).rows, 0.0, 0.0
    side, tokens, factor = cfg.latents["sample_size"], cfg.text_encoder.max_position_embeddings, cfg.autoencoder.factor
    for name, graph in graphs(configs).items():
        folder = name if name in configs else name.rpartition("_")[0]
        if name not in LEARNS[stage] or folder not in configs:
            continue
        scale = factor if any(array.values == "pixels" for array in graph.inputs.values()) else 1
        sizes = {"batch": rows, "sequence": tokens, "height": side * scale, "width": side * scale}
        network: Any = runtime.placed(network_of(folder, configs[folder]).build(configs[folder])).train()
        inputs = {
            k: torch.zeros(a.shape(sizes), dtype=torch.int64) if a.values == "tokens" else torch.randn(a.shape(sizes))
            for k, a in graph.inputs.items()
        }
        for _ in range(2):
            began = time.monotonic()
            with runtime.autocast(), runtime.attention():
                output = getattr(network, graph.method)(**{k: v.to(runtime.device) for k, v in inputs.items()})
                parts = [t for t in (output if isinstance(output, tuple) else (output,)) if t.requires_grad]
                sum(t.float().square().mean() for t in parts).backward()  # type: ignore[union-attr]
            float(parts[0].detach().float().mean())  # waits for a GPU
            latest = time.monotonic() - began
        took += latest * cfg.train.stage(stage).accumulate
    return took
