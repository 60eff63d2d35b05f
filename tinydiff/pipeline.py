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
from tinydiff.diffusion.guidance import classifier_free
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.diffusion.schedules import Level
from tinydiff.errors import DivergedError, UsageError


class Tokens(Protocol):
    """The tokenizer's part that generating needs."""

    max_length: int

    def encode(self, texts: Sequence[str]) -> np.ndarray: ...
    def cut(self, text: str) -> str: ...


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
    prompts: Sequence[str],
    seeds: Sequence[int],
    request: Request,
    negatives: Sequence[str] | None = None,
    on_step: Callable[[int], Any] = lambda step: None,
) -> np.ndarray:
    """One image a prompt: uint8 (B, H, W, 3). `seeds` key the noise; `on_step` hears of every finished step.

    Raises UsageError for a size the model cannot draw and DivergedError where the network returns non-finite values.
    """
    d = backend.description
    check_size(d, request.width, request.height)
    with np.errstate(all="ignore"):  # what is not finite is reported by its step
        (x,) = deque(denoise_latents(backend, prompts, seeds, request, negatives, on_step), maxlen=1)
    return images.to_uint8(backend.decode(x / np.float32(d.scaling_factor)))


def denoise_latents(
    backend: Backend,
    prompts: Sequence[str],
    seeds: Sequence[int],
    request: Request,
    negatives: Sequence[str] | None,
    on_step: Callable[[int], Any],
) -> Iterator[np.ndarray]:
    """The latents after each step, float32 (B, C, h, w)."""
    d = backend.description
    shape = (d.latent_channels, request.height // d.factor, request.width // d.factor)
    levels = d.levels(request.sampler, request.steps, request.schedule)
    denoise = guided(backend, prompts, negatives or [""] * len(prompts), request.cfg_scale)
    x = noise.normal(seeds, shape) * levels[0].sigma
    sampler = SAMPLERS[request.sampler](denoise, x, levels, lambda step: noise.normal(seeds, shape, step + 1))
    for step, (x, _) in enumerate(sampler):
        if not np.isfinite(x).all():
            raise DivergedError(
                f"the network returned non-finite values at step {step + 1} of {request.steps}; use fp32 weights"
            )
        on_step(step + 1)
        yield x


def guided(
    backend: Backend, prompts: Sequence[str], negatives: Sequence[str], scale: float
) -> Callable[[np.ndarray, Level], np.ndarray]:
    """The denoiser (x, level) -> x0 under classifier-free guidance; at scale 1 the prompt alone, half the work."""
    to_x0 = PREDICTIONS[backend.description.prediction].to_x0
    context = encode(backend, prompts if scale == 1 else [*negatives, *prompts])

    def one(x: np.ndarray, level: Level) -> np.ndarray:
        return to_x0(backend.denoise(x, level.t, context), x, level.alpha, level.sigma)

    def both(x: np.ndarray, level: Level) -> tuple[np.ndarray, np.ndarray]:
        out = backend.denoise(np.concatenate([x, x]), level.t, context)
        u, c = (to_x0(half, x, level.alpha, level.sigma) for half in np.split(out, 2))
        return u, c

    return one if scale == 1 else classifier_free(both, scale)


def encode(backend: Backend, texts: Sequence[str]) -> np.ndarray:
    """(B, T, D); equal texts are encoded once."""
    unique = list(dict.fromkeys(texts))
    vectors = backend.encode_text(backend.tokenizer.encode(unique))
    return vectors[[unique.index(text) for text in texts]]
