"""Text to image over any backend: prompts in, uint8 images out.

It knows the four calls of `Backend` and numpy, no torch and no onnxruntime. The start of every image is drawn from its
own seed, so an image does not depend on its batch or on the backend.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from tinydiff import condition, images, tiling
from tinydiff.checkpoints.description import Description
from tinydiff.condition import Condition
from tinydiff.diffusion import guidance, noise
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import SAMPLERS, Denoise
from tinydiff.diffusion.schedules import Level, Levels
from tinydiff.editing import Edit, cells
from tinydiff.errors import DivergedError, UsageError
from tinydiff.text.prompts import Branch, Piece, Tokens

Prompt = str | Sequence[Branch]


class Backend(Protocol):
    """A model ready to run; arrays are numpy float32."""

    name: str
    description: Description

    @property
    def tokenizers(self) -> Mapping[str, Tokens]:
        """By text encoder, at least one."""
        ...

    def encode_text(self, ids: Mapping[str, np.ndarray]) -> Condition:
        """Token ids (B, T) int64 by text encoder -> what the denoiser is told of them."""
        ...

    def denoise(self, x: np.ndarray, t: float, condition: Condition) -> np.ndarray:
        """x (B, C, h, w), a condition of B rows -> the network's output, like x."""
        ...

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """(B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w)."""
        ...

    def decode(self, z: np.ndarray) -> np.ndarray:
        """(B, C, h, w), already divided by the scaling factor -> (B, 3, H, W)."""
        ...


@dataclass(frozen=True)
class Request:
    """How to draw; the prompts and seeds come beside it."""

    steps: int
    cfg_scale: float
    sampler: str
    spacing: str
    width: int
    height: int
    cfg_max: float | None = None  # guidance at the clean end, where it grows
    cfg_complex: float | None = None  # guidance of the most complex prompt, where it depends on the prompt
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # where there is guidance, as shares of the noise levels
    cfg_rescale: float = 0.0


def check_size(description: Description, width: int, height: int) -> None:
    """UsageError naming the nearest sizes where the model cannot draw this one."""
    m = description.multiple
    for name, value in (("width", width), ("height", height)):
        low = max(m, value // m * m)
        if value != low:
            problem = f"{name} {value} is no multiple of {m}, which this model needs"
            raise UsageError(f"{problem}; nearest are {low} and {low + m}")


def generate(
    backend: Backend,
    prompts: Sequence[Prompt],
    seeds: Sequence[noise.Seed],
    request: Request,
    negatives: Sequence[str] | None = None,
    on_step: Callable[[int], Any] = lambda step: None,
    edit: Edit | None = None,
) -> np.ndarray:
    """One image a prompt: uint8 (B, H, W, 3). `seeds` key the noise; `on_step` hears of every finished step.

    A prompt is plain text, or what `text.prompts.parse` makes of one with weights and ANDs. With an `edit` its image,
    of the request's size, is changed: at strength 0 it goes through the autoencoder and back, at 1 only a mask keeps any of
    it. Raises UsageError for a size the model cannot draw and DivergedError where the network returns non-finite values.
    """
    d = backend.description
    check_size(d, request.width, request.height)
    with np.errstate(all="ignore"):  # what is not finite is reported by its step
        (x,) = deque(denoise_latents(backend, prompts, seeds, request, negatives, on_step, edit), maxlen=1)
    drawn = images.to_uint8(tiling.decode(backend.decode, x / np.float32(d.scaling_factor), d.factor))
    return edit.over(drawn) if edit else drawn


def denoise_latents(
    backend: Backend,
    prompts: Sequence[Prompt],
    seeds: Sequence[noise.Seed],
    request: Request,
    negatives: Sequence[str] | None,
    on_step: Callable[[int], Any],
    edit: Edit | None = None,
) -> Iterator[np.ndarray]:
    """The latents at the start and after each step, float32 (B, C, h, w)."""
    d = backend.description
    shape = (d.latent_channels, request.height // d.factor, request.width // d.factor)
    levels = d.levels(request.sampler, request.steps, request.spacing)
    beside = concatenated(backend, edit, shape)
    denoise = guided(backend, prompts, negatives or [""] * len(prompts), request, beside)
    x = noise.normal(seeds, shape)
    if edit:
        known = latents(backend, edit.image)
        levels = Levels(levels[request.steps - int(request.steps * edit.strength) :], levels.at)
        if edit.mask is not None and beside is None:
            denoise = guidance.keeping(denoise, known, cells(edit.mask, d.factor))
        # SDEdit (Meng et al. 2022, algorithm 1), but for a start of noise alone where nothing of the image is to stay
        x = x * levels[0].sigma + (known * levels[0].alpha if edit.strength < 1 else 0)
    else:
        x = x * levels[0].sigma
    yield x
    sampler = SAMPLERS[request.sampler](denoise, x, levels, lambda step: noise.normal(seeds, shape, step + 1))
    for step, (x, _) in enumerate(sampler):
        if not np.isfinite(x).all():
            where = f"step {step + 1} of {len(levels) - 1}"
            raise DivergedError(f"the network returned non-finite values at {where}; use fp32 weights")
        on_step(step + 1)
        yield x


def latents(backend: Backend, image: np.ndarray) -> np.ndarray:
    """The scaled mean latent (1, C, h, w) float32 of one uint8 image (H, W, 3)."""
    d = backend.description
    moments = tiling.encode(backend.encode_image, images.to_pixels(image[None]), d.factor)
    return moments[:, : d.latent_channels] * np.float32(d.scaling_factor)


def concatenated(backend: Backend, edit: Edit | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """What an inpainting model reads beside x: the mask and the masked image's latents (1, 1 + C, h, w); else None."""
    d = backend.description
    if d.in_channels == d.latent_channels:
        return None
    everything = np.ones((shape[1] * d.factor, shape[2] * d.factor), np.float32)  # is to be drawn where no mask says
    mask = edit.mask if edit and edit.mask is not None else everything
    grey = edit.image if edit else np.full((*mask.shape, 3), 127, np.uint8)
    kept = np.where(mask[..., None] < 0.5, grey, np.uint8(127))
    return np.concatenate([cells(mask, d.factor)[None, None], latents(backend, kept)], axis=1)


def guided(
    backend: Backend,
    prompts: Sequence[Prompt],
    negatives: Sequence[str],
    request: Request,
    beside: np.ndarray | None = None,  # (1, C', h, w), concatenated to what the network reads
) -> Denoise:
    """The denoiser (x, level) -> x0 under the request's guidance; where that is 1, the prompt alone is asked."""
    d, count = backend.description, len(prompts)
    branches = [[plain(prompt)] if isinstance(prompt, str) else prompt for prompt in prompts]
    rows = [i for i, parts in enumerate(branches) for _ in parts]  # the image of each conditional row
    weights = [branch.weight for parts in branches for branch in parts]
    alone = len(rows) == count and set(weights) == {1.0}
    strength = scale(request, branches, len(d.schedule))
    blank = [] if alone and strength is request.cfg_scale and strength == 1 else negatives
    asked = [*map(plain, blank), *(branch for parts in branches for branch in parts)]
    told = condition.of_branches(backend, asked)
    told |= condition.of_size(d.conditions, request.height, request.width, len(asked))
    to_x0 = PREDICTIONS[d.prediction].to_x0

    def ask(x: np.ndarray, level: Level, told: Condition) -> np.ndarray:
        read = x if beside is None else np.concatenate([x, np.repeat(beside, len(x), axis=0)], axis=1)
        return to_x0(backend.denoise(read, level.t, told), x, level.alpha, level.sigma)

    def both(x: np.ndarray, level: Level) -> tuple[np.ndarray, np.ndarray]:
        each = ask(np.concatenate([x, x[rows]]), level, told)
        u, c = each[:count], each[count:]
        if alone:
            return u, c
        parts = [[(weights[j], c[j]) for j, row in enumerate(rows) if row == i] for i in range(count)]
        return u, np.stack([guidance.composed(u[i], part) for i, part in enumerate(parts)])

    one = partial(ask, told={name: array[-count:] for name, array in told.items()}) if alone else None
    share = request.cfg_rescale
    adjust = guidance.rescale(PREDICTIONS[d.prediction], share) if share else guidance.unadjusted
    return guidance.classifier_free(both, strength, one, adjust)


def scale(request: Request, branches: Sequence[Sequence[Branch]], levels: int) -> guidance.Scale:
    """How strong guidance is: a number, or a function of the level that gives a number or one an image."""
    base: Any = request.cfg_scale
    if request.cfg_complex is not None:
        shares = [guidance.complexity(" ".join(branch.text for branch in parts).split()) for parts in branches]
        base = (base + (request.cfg_complex - base) * np.array(shares, np.float32))[:, None, None, None]
    strength = base if request.cfg_max is None else guidance.growing(base, request.cfg_max, levels)
    all_levels = request.cfg_interval == (0.0, 1.0)
    return strength if all_levels else guidance.within(strength, *request.cfg_interval, levels)


def plain(text: str) -> Branch:
    """A text as its own words, whatever brackets it has."""
    return Branch((Piece(text, 1.0),), 1.0)
