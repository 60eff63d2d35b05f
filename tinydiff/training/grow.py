"""A denoiser that grows while it is trained, and does at that moment what it did before (Chen et al. 2016, Net2Net).

A part of the stage ends at each step of `train.grow` with a checkpoint; the next part begins with a larger network that opens
this checkpoint, whether the run went on or was begun again there. So nothing is kept of a growth but the step.

Layers are added whose residual branches end in zeros (Chen et al. 2016, section 2.3). A width that is k times as large has each
channel k times, one beside the other, so that the groups of a normalisation have the same mean and variance; what reads
channels divides each weight among the k, in shares that differ, or else the copies would learn the same (section 2.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinydiff import config
from tinydiff.checkpoints import new
from tinydiff.data.dataset import Images, open_source
from tinydiff.diffusion.noise import keyed
from tinydiff.networks import VAE, denoiser_in, network_of
from tinydiff.schema import flat
from tinydiff.training import state
from tinydiff.training.optim import MOMENTS, moments
from tinydiff.training.run import Run
from tinydiff.training.state import Blocks, Tensors, Training
from tinydiff.training.validation import held_out

STAGE = "denoiser"
UP = re.compile(r"(.*up_blocks\.\d+\.(?:resnets|attentions)\.)(\d+)(\..*)")
HEADS = {
    0: re.compile(r".*\.to_[qkv]\.(?:weight|bias)"),
    1: re.compile(r".*\.to_out\.0\.weight"),
}  # axes of whole heads
SINES = re.compile(r".*\.time_embedding\.linear_1\.weight")  # of a unet, which are more where it is wider
TABLE = re.compile(r".*\.(?:embedding_table|class_embedding)\.weight")  # its rows are outputs
SPREAD = 0.5  # of the shares of a weight: each is this part more or less than an equal one at most
Shape = tuple[int, ...]


def parts(run: Run, name: str) -> Iterator[None]:
    """For each part of a stage once, when the run has its model and its images and knows where it ends."""
    growths = run.cfg.train.grow if name == STAGE else ()
    newest = (
        state.newest(run.checkpoints, name, run.runtime.say, run.strict) if growths and run.world.rank == 0 else None
    )
    begun = int(run.world.share(newest.name if newest else "0").rpartition("-")[2])
    count = sum(growth.step < begun for growth in growths)
    if count:
        enlarge(run, count)
    for i, growth in enumerate(growths[count:], count + 1):
        run.until = growth.step
        yield
        enlarge(run, i)
    run.until = None
    yield


def enlarge(run: Run, count: int) -> None:
    """Give the run the denoiser, and the images, that there are after the first `count` growths."""
    cfg, model = config.grown(run.cfg, run.cfg.train.grow[:count]), run.model
    configs = new.configs(cfg, next(iter(model.tokenizers.values())), model.description.labels)
    name = denoiser_in(configs)
    with torch.random.fork_rng([]):
        torch.manual_seed(int(keyed(cfg.train.seed, "growth", count).integers(2**62)))
        network = run.runtime.placed(network_of(name, configs[name]).build(configs[name]))
    run.model = replace(model, configs=configs | {VAE: model.configs[VAE]}, networks=model.networks | {name: network})
    if cfg.data != run.data.data:
        source = open_source(cfg.data, cfg.train.seed, run.progress("checking images"), run.caption, cfg.columns)
        run.data = Images(source, cfg.data)
        run.held = held_out(run)
    run.growths = count


def told(run: Run, name: str, step: int) -> str:
    """What has just changed where a stage goes on from a step at which it grew: "unet.layers_per_block 1 -> 2"."""
    growths = run.cfg.train.grow[: run.growths] if name == STAGE else ()
    if not growths or growths[-1].step != step:
        return ""
    before, after = (flat(config.grown(run.cfg, some)) for some in (growths[:-1], growths))
    changed = (
        key for key in after if after[key] != before[key] and key.split(".")[0] in (run.cfg.denoiser.kind, "data")
    )
    return ", ".join(f"{key} {before[key]} -> {after[key]}" for key in changed)


def change(run: Run, name: str, path: Path, training: Training) -> Callable[[str, Tensors], Tensors] | None:
    """What makes a checkpoint's tensors of a kind those of the network that has just grown from it; None if none has."""
    step = int(path.name.rpartition("-")[2])
    if not told(run, name, step):
        return None
    before = Blocks(path, "weights").shapes
    weights, after = training.tensors("weights"), {piece.name: piece.shape for piece in training.pieces}
    added = layers(after) - layers(before)
    kept = {p.name: moments(each.optimizer, p.tensor) for each in training.learners for p in each.pieces}
    new = after.keys() - {moved(name, added) for name in before}

    def begun(kind: str) -> Tensors:
        """The parameters that there were not: as they are built, and at rest."""
        if kind in MOMENTS:
            return {name: torch.zeros(after[name]) for name in new if kind in kept[name]}
        return {name: as_nothing(name, weights[name].cpu().clone()) for name in new}

    def grow(kind: str, old: Tensors) -> Tensors:
        if kind == "buffers" or not old:
            return old
        there = {moved(name, added): tensor for name, tensor in old.items()}
        rng = {
            name: keyed(run.cfg.train.seed, f"shares of {name}", run.growths) for name in there
        }  # of all kinds alike
        return {name: widened(name, t, after[name], kind, rng[name]) for name, t in there.items()} | begun(kind)

    return grow


def layers(names: Iterable[str]) -> int:
    """Of the way up of a U-Net: the most residual blocks of a level."""
    return max((int(part[2]) for name in names if (part := UP.fullmatch(name))), default=0)


def moved(name: str, added: int) -> str:
    """The name that a parameter has where a U-Net's levels have more layers. The new ones of the way up come after its first,
    so that each old one is given the skip that it had: those of new layers on the way down are as the last one's."""
    part = UP.fullmatch(name)
    return f"{part[1]}{int(part[2]) + added}{part[3]}" if part and int(part[2]) else name


def as_nothing(name: str, built: Tensor) -> Tensor:
    """A new parameter. What a block of the way up leads past its branch is what comes from below, without the skip."""
    if UP.fullmatch(name) and ".conv_shortcut." in name:
        built.zero_()
        if built.ndim > 1:
            built[:, : len(built), 0, 0] = torch.eye(len(built))
    return built


def widened(name: str, old: Tensor, shape: Shape, kind: str, rng: np.random.Generator) -> Tensor:
    """A tensor of a kind where each channel is there several times, and nothing but the width has changed.

    A copy of an output has a k-th of the output's gradient, since what reads it has a k-th of its weight.
    """
    outputs = 1 if TABLE.fullmatch(name) else 0
    for axis in (axis for axis, size in enumerate(shape) if size != old.shape[axis]):
        k, whole = shape[axis] // old.shape[axis], axis in HEADS and bool(HEADS[axis].fullmatch(name))
        if axis != outputs and SINES.fullmatch(name):
            wide = old.new_zeros(len(old), shape[axis])
            wide[:, ::k] = old  # the rates that there were are every k-th
            old = wide
        elif axis != outputs and kind not in MOMENTS:
            old = copied(old, axis, shares(tuple(old.shape[:2]), k, rng, old.ndim), whole)
        else:
            part = 1 / k ** (MOMENTS.index(kind) + 1) if axis == outputs and kind in MOMENTS else 1.0
            old = copied(old, axis, [part] * k, whole)
    return old


def copied(tensor: Tensor, axis: int, factors: Sequence[Tensor | float], whole: bool) -> Tensor:
    """A copy with each factor: each channel beside its own copies, or `whole` sets of channels one after the other."""
    copies = [tensor * factor for factor in factors]
    return torch.cat(copies, axis) if whole else torch.stack(copies, axis + 1).flatten(axis, axis + 1)


def shares(size: Shape, k: int, rng: np.random.Generator, ndim: int) -> list[Tensor]:
    """What `k` copies of inputs have of each weight (out, in, ...): a k-th, more or less, and all of it together."""
    apart = SPREAD * rng.uniform(-1, 1, (k, *size))
    parts = (1 + apart - apart.mean(0)) / k
    return [torch.from_numpy(part.astype(np.float32)).reshape(*size, *[1] * (ndim - 2)) for part in parts]
