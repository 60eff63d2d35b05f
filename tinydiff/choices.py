"""What nobody said of a run: chosen from its images and captions and from the machine, each value with its reason.

What was said is kept, and the rest fits it. The figures are those of runs in docs/results.md and docs/experiments.md; no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tinydiff.data.facts import Facts
from tinydiff.progress import duration
from tinydiff.text.tokenizer import CLIP_LENGTH, SMALLEST_VOCABULARY

MANY = 16  # captions an image: more are the same in other languages
GOOD = 26.0  # dB: an autoencoder is taken as it is that reconstructs images so well
Reasons = dict[str, str]  # by key, why it has its value
Judge = Callable[[int], float]  # dB of the shipped autoencoder on images of so many pixels


class Machine(NamedTuple):
    """What there is to train on: processor cores, and the name of a GPU."""

    cores: int
    gpu: str = ""

    @property
    def said(self) -> str:
        return self.gpu or f"{self.cores} CPU core{'s' * (self.cores > 1)}"


def machine(device: str = "auto") -> Machine:
    """This one, of which a run uses what `train.device` says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device == "cpu":
        return Machine(cores)
    try:
        import torch
    except ImportError:
        return Machine(cores)
    return Machine(cores, torch.cuda.get_device_name() if torch.cuda.is_available() else "")


@dataclass
class Choices:
    """Values by key, and why; `given` ones are kept."""

    given: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    reasons: Reasons = field(default_factory=dict)

    def take(self, key: str, value: Any, reason: str) -> Any:
        """The value that a key has: the given one, or this one for this reason."""
        if key in self.given:
            return self.given[key]
        self.reasons[key] = reason
        return self.values.setdefault(key, value)

    def says(self, table: str) -> bool:
        """Whether a key of a table was given."""
        return any(key.startswith(f"{table}.") for key in self.given)


def choose(facts: Facts, on: Machine, given: dict[str, Any], judge: Judge) -> Choices:
    """What a run on these images has, where `given` says nothing: whole keys with dots, and their values."""
    c = Choices(given)
    if facts.each > MANY:
        why = f"{facts.each:.0f} captions an image, as of translations: the first of each is read; 0 reads all"
        facts = facts.first(c.take("data.max_captions", 1, why))
    hours = min(4, max(1, facts.count // 2000)) / 2
    if not any(value and key.endswith((".steps", "train.grow")) for key, value in given.items()):
        c.take("train.time", int(3600 * hours), f"{duration(3600 * hours)} for {facts.count} images; --time changes it")
    if not on.gpu:
        c.take("train.validation_samples", 0, "drawing images to measure them would take much of a CPU's time")
    size, why = (64, "on a GPU") if on.gpu else (16, "on a CPU")
    batch = min(size, 1 << max(0, (facts.count // 4).bit_length() - 1))
    why = f"of {facts.count} images" if batch < size else why
    if given.get("train.base"):
        return c
    c.take("train.denoiser.batch_size", batch, why)
    resolution = of_resolution(c, facts, on)
    of_text(c, facts, on)
    levels = of_networks(c, facts, on, resolution, judge)
    of_shapes(c, facts, resolution, levels)
    if c.values.get("train.autoencoder.steps", c.given.get("train.autoencoder.steps")) != 0:
        c.take("train.autoencoder.batch_size", batch, why)
    return c


def of_resolution(c: Choices, facts: Facts, on: Machine) -> int:
    """A power of two that half of the images have, and that the machine learns in time."""
    most, side = (256 if on.gpu else 64), facts.side
    own = 1 << max(4, int(side * 1.15).bit_length() - 1)
    limit = f"; more takes {'long' if on.gpu else 'a CPU long'}, and --resolution sets it" if own > most else ""
    return c.take("data.resolution", min(own, most), f"half of the images have {side} pixels a side or more{limit}")


def of_text(c: Choices, facts: Facts, on: Machine) -> None:
    """The vocabulary and the length of captions, none of which is cut where the text encoder can read it."""
    if c.given.get("text_encoder.kind", "clip") != "clip":
        return
    fits = -(-(SMALLEST_VOCABULARY + 2 * facts.words) // 256) * 256
    vocabulary = c.take(
        "text_encoder.vocab_size", min(8192, max(1024, fits)), f"{facts.words} words said more than once"
    )
    if isinstance(vocabulary, int) and vocabulary >= SMALLEST_VOCABULARY:
        lengths = facts.lengths(vocabulary)
        longest, most = lengths[-1], min(CLIP_LENGTH, max(16, -(-lengths[-1] // 8) * 8))
        cut = sum(length > most for length in lengths)
        said = f"; {cut} of {len(lengths)} are cut" if cut else ", and none is cut"
        c.take("text_encoder.max_position_embeddings", most, f"the longest caption has {longest} tokens{said}")
    wide = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 6}
    small = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    for key, value in (wide if on.gpu else small).items() if not sized(c, "text_encoder", wide) else ():
        c.take(f"text_encoder.{key}", value, f"a text encoder for {on.said}")


def sized(c: Choices, table: str, keys: Any) -> bool:
    """Whether any of some keys was given, with which others of ours might not fit."""
    return any(f"{table}.{key}" in c.given for key in keys)


def of_networks(c: Choices, facts: Facts, on: Machine, resolution: int, judge: Judge) -> int:
    """The autoencoder and the denoiser; returns how often both halve an image, 0 if that is not ours to say."""
    general = resolution >= 64 and resolution % 16 == 0 and not c.says("autoencoder")
    if general:
        found = judge(resolution)
        told = f"it reconstructs these images at {found:.1f} dB"
        c.take("autoencoder.path", "general", f"the shipped autoencoder: {told}")
        if found >= GOOD:
            c.take("train.autoencoder.steps", 0, f"it stays as it is: {told}")
        else:
            c.take("train.autoencoder.lr", 3e-4, f"it is tuned: {told}, and {GOOD:.0f} are good")
            c.take("train.autoencoder.chroma_weight", 1.0, "colour is what an autoencoder learns last")
    if c.given.get("denoiser.kind", "unet") != "unet" or c.says("unet"):
        return 0
    widths = [[128, 192], [160, 320]][facts.count > 20_000]
    if on.gpu and resolution >= 128 and not (resolution % 32 or c.given.get("data.bucket_step", 32) % 32):
        widths = [[128, 256, 384], [192, 384, 576]][facts.count > 5000]
    why = f"for {facts.count} images on {on.said}"
    c.take("unet.block_out_channels", widths, why)
    c.take("unet.down_block_types", ["CrossAttnDownBlock2D"] * len(widths), "captions are read at every level")
    if c.says("autoencoder") and not general:
        return 0
    return (3 if general else 2) + len(widths) - 1


def of_shapes(c: Choices, facts: Facts, resolution: int, halvings: int) -> None:
    """Sizes that are no squares, where squares would cut much off many images."""
    hard, step, key = facts.cropped(resolution), 1 << halvings, "data.max_aspect_ratio"
    if not halvings or resolution % step:
        return
    fits = (ratio for ratio in (2.0, 3.0) if hard >= 0.2 and facts.cropped(resolution, ratio, step) < hard / 2)
    if c.given.get(key, ratio := next(fits, 1.0)) > 1:
        c.take(key, ratio, f"squares would cut over a quarter off {hard:.0%} of the images")
        c.take("data.bucket_step", step, "what the networks reduce an image by")
