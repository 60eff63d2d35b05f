"""Text to image over any backend: prompts in, uint8 images out.

It knows the four calls of `Backend` and numpy, no torch and no onnxruntime. The start of every image is drawn from its
own seed, so an image does not depend on its batch or on the backend.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tinydiff import images
from tinydiff.checkpoints.description import Description
from tinydiff.diffusion import noise
from tinydiff.diffusion.guidance import (
    Scale,
    classifier_free,
    complexity,
    composed,
    growing,
    rescale,
    unadjusted,
    within,
)
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import SAMPLERS, Denoise
from tinydiff.diffusion.schedules import Level
from tinydiff.errors import DivergedError, UsageError
from tinydiff.text.prompts import Branch, Piece, Tokens, chunks

Prompt = str | Sequence[Branch]


class Backend(Protocol):
    """A model ready to run; arrays are numpy float32."""

    name: str
    description: Description

    @property
    def tokenizer(self) -> Tokens: ...

    def encode_text(self, ids: np.ndarray) -> np.ndarray:
        """(B, T) int64 -> (B, T, D)."""
        ...

    def denoise(self, x: np.ndarray, t: float, context: np.ndarray) -> np.ndarray:
        """x (B, C, h, w), context (B, T, D) -> the network's output, like x."""
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
    schedule: str
    width: int
    height: int
    cfg_max: float | None = None  # guidance at the clean end, where it grows
    cfg_complex: float | None = None  # guidance of the most complex prompt, where it depends on the prompt
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # where there is guidance, as shares of the noise levels
    cfg_rescale: float = 0.0


def check_size(description: Description, width: int, height: int) -> None:
    """UsageError naming the nearest sizes where the model cannot draw this one."""
    for name, value in (("width", width), ("height", height)):
        m = description.multiple
        if value < m or value % m:
            low = max(m, value // m * m)
            raise UsageError(
                f"{name} {value} is no multiple of {m}, which this model needs; nearest are {low} and {low + m}"
            )


def generate(
    backend: Backend,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    request: Request,
    negatives: Sequence[str] | None = None,
    on_step: Callable[[int], Any] = lambda step: None,
) -> np.ndarray:
    """One image a prompt: uint8 (B, H, W, 3). `seeds` key the noise; `on_step` hears of every finished step.

    A prompt is plain text, or what `text.prompts.parse` makes of one with weights and ANDs.

    Raises UsageError for a size the model cannot draw and DivergedError where the network returns non-finite values.
    """
    d = backend.description
    check_size(d, request.width, request.height)
    with np.errstate(all="ignore"):  # what is not finite is reported by its step
        (x,) = deque(denoise_latents(backend, prompts, seeds, request, negatives, on_step), maxlen=1)
    return images.to_uint8(backend.decode(x / np.float32(d.scaling_factor)))


def denoise_latents(
    backend: Backend,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    request: Request,
    negatives: Sequence[str] | None,
    on_step: Callable[[int], Any],
) -> Iterator[np.ndarray]:
    """The latents after each step, float32 (B, C, h, w)."""
    d = backend.description
    shape = (d.latent_channels, request.height // d.factor, request.width // d.factor)
    levels = d.levels(request.sampler, request.steps, request.schedule)
    denoise = guided(backend, prompts, negatives or [""] * len(prompts), request)
    x = noise.normal(seeds, shape) * levels[0].sigma
    sampler = SAMPLERS[request.sampler](denoise, x, levels, lambda step: noise.normal(seeds, shape, step + 1))
    for step, (x, _) in enumerate(sampler):
        if not np.isfinite(x).all():
            raise DivergedError(
                f"the network returned non-finite values at step {step + 1} of {request.steps}; use fp32 weights"
            )
        on_step(step + 1)
        yield x


def guided(backend: Backend, prompts: Sequence[Prompt], negatives: Sequence[str], request: Request) -> Denoise:
    """The denoiser (x, level) -> x0 under the request's guidance; where that is 1, the prompt alone is asked."""
    d, count = backend.description, len(prompts)
    branches = [as_branches(prompt) for prompt in prompts]
    rows = [i for i, parts in enumerate(branches) for _ in parts]  # the image of each conditional row
    weights = [branch.weight for parts in branches for branch in parts]
    alone = len(rows) == count and set(weights) == {1.0}
    strength = scale(request, branches, len(d.schedule))
    texts = [branch.pieces for parts in branches for branch in parts]
    if alone and strength is request.cfg_scale and strength == 1:
        contexts = encode(backend, texts)
    else:
        contexts = encode(backend, [*((Piece(text, 1.0),) for text in negatives), *texts])
    to_x0 = PREDICTIONS[d.prediction].to_x0

    def ask(x: np.ndarray, level: Level, context: np.ndarray) -> np.ndarray:
        return to_x0(backend.denoise(x, level.t, context), x, level.alpha, level.sigma)

    def one(x: np.ndarray, level: Level) -> np.ndarray:
        return ask(x, level, contexts[-count:])

    def both(x: np.ndarray, level: Level) -> tuple[np.ndarray, np.ndarray]:
        each = ask(np.concatenate([x, x[rows]]), level, contexts)
        u, c = each[:count], each[count:]
        if alone:
            return u, c
        parts = [[(weights[j], c[j]) for j, row in enumerate(rows) if row == i] for i in range(count)]
        return u, np.stack([composed(u[i], part) for i, part in enumerate(parts)])

    adjust = rescale(PREDICTIONS[d.prediction], request.cfg_rescale) if request.cfg_rescale else unadjusted
    return classifier_free(both, strength, one if alone else None, adjust)


def scale(request: Request, branches: Sequence[Sequence[Branch]], levels: int) -> Scale:
    """How strong guidance is: a number, or a function of the level that gives a number or one an image."""
    base: Any = request.cfg_scale
    if request.cfg_complex is not None:
        shares = [complexity(" ".join(branch.text for branch in parts).split()) for parts in branches]
        base = (base + (request.cfg_complex - base) * np.array(shares, np.float32))[:, None, None, None]
    found = growing(base, request.cfg_max, levels) if request.cfg_max is not None else base
    return within(found, *request.cfg_interval, levels) if request.cfg_interval != (0.0, 1.0) else found


def as_branches(prompt: Prompt) -> Sequence[Branch]:
    """A prompt as branches; a string is its own words, whatever brackets it has."""
    return [Branch((Piece(prompt, 1.0),), 1.0)] if isinstance(prompt, str) else prompt


def encode(backend: Backend, texts: Sequence[tuple[Piece, ...]]) -> np.ndarray:
    """Text vectors (B, K T, D), K the chunks of the longest text; equal texts are encoded once.

    A weight w moves a token's vector from the empty prompt's at its place: blank + w (vector - blank).
    """
    unique, tokenizer = list(dict.fromkeys(texts)), backend.tokenizer
    plain = ["".join(piece.text for piece in pieces) for pieces in unique]
    if all(piece.weight == 1 for pieces in unique for piece in pieces) and not any(map(tokenizer.cut, plain)):
        vectors = backend.encode_text(tokenizer.encode(plain))
    else:
        vectors = _weighted(backend, [chunks(pieces, tokenizer) for pieces in unique])
    return vectors[[unique.index(pieces) for pieces in texts]]


def _weighted(backend: Backend, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Vectors (B, K T, D) of ids and weights (K, T) each, shorter texts filled up with empty chunks."""
    longest = max(len(ids) for ids, _ in parts)
    empty = backend.tokenizer.encode([""])
    ids = np.concatenate([empty, *(np.concatenate([i, *[empty] * (longest - len(i))]) for i, _ in parts)])
    weights = np.stack([np.concatenate([w, np.ones((longest - len(w), w.shape[1]), np.float32)]) for _, w in parts])
    vectors = backend.encode_text(ids)
    blank, vectors = vectors[0], vectors[1:].reshape(*weights.shape, -1)  # (B, K, T, D)
    moved = np.where(weights[..., None] == 1, vectors, blank + (vectors - blank) * weights[..., None])
    return moved.reshape(len(parts), -1, vectors.shape[-1])
