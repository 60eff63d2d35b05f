"""What the pipeline needs to change an image: the image, the strength of the change, and which part to change.

Reads files into an `Edit`, for image-to-image, inpainting and outpainting. numpy only; of a model only sizes are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinydiff import images
from tinydiff.errors import UsageError
from tinydiff.files import shown

FEATHER = 2  # latent cells over which outpainting blends into the image's edge, so that no seam shows


@dataclass(frozen=True)
class Edit:
    """An image uint8 (H, W, 3), `strength` in [0, 1], and a float32 mask (H, W), 1 where to draw; None: everywhere."""

    image: np.ndarray
    strength: float
    mask: np.ndarray | None = None

    def steps(self, most: int) -> int:
        """How many of a sampler's steps the strength is worth."""
        return int(most * self.strength)

    def over(self, drawn: np.ndarray) -> np.ndarray:
        """Blend drawn images uint8 (B, H, W, 3) over the image by the mask; where it is 0, pixels stay bit for bit."""
        if self.mask is None:
            return drawn
        mixed = self.image + (drawn.astype(np.float32) - self.image) * self.mask[..., None]
        return np.where(self.mask[..., None] > 0, np.rint(mixed), self.image).astype(np.uint8)


def cells(mask: np.ndarray, factor: int) -> np.ndarray:
    """A mask (H, W) to one of latents (H / factor, W / factor): each cell's maximum, so that no pixel is missed."""
    height, width = mask.shape
    return mask.reshape(height // factor, factor, width // factor, factor).max(axis=(1, 3))


def read(
    image: Path,
    strength: float,
    mask: Path | None = None,
    margins: tuple[int, int, int, int] | None = None,
    size: tuple[int, int] | None = None,
    factor: int = 8,
) -> Edit:
    """An Edit from files. In a mask, white is drawn and black is kept.

    `size` (width, height): fit image and mask to it. `margins` (left, top, right, bottom): extend the image by these
    pixels. `factor`: pixels per latent cell. Raises UsageError if mask and image differ in size.
    """
    picture, drawn = images.open_image(image), images.open_image(mask, "#000000") if mask else None
    if size:
        picture = images.fit(picture, size)
        drawn = images.fit(drawn, size, background="#000000") if drawn is not None else None
    if drawn is not None and drawn.shape != picture.shape:
        (h, w), (mh, mw) = picture.shape[:2], drawn.shape[:2]
        problem = f"the mask is {mw}x{mh} and the image {w}x{h}"
        raise UsageError(f"{shown(mask or '')}: {problem}; make them equal, or use --fit")
    alpha = drawn.astype(np.float32).mean(axis=-1) / 255 if drawn is not None else None
    if margins:
        picture, outside = extended(picture, margins, FEATHER * factor)
        alpha = outside if alpha is None else np.maximum(outside, np.pad(alpha, _sides(margins)))
    return Edit(picture, strength, alpha)


def extended(image: np.ndarray, margins: tuple[int, int, int, int], feather: int) -> tuple[np.ndarray, np.ndarray]:
    """The image with margins in its edge colours (H', W', 3), and the mask (H', W'): 1 there, 0 from `feather` inside."""
    sides = _sides(margins)
    down, across = (_ramp(size, *ends, feather) for size, ends in zip(image.shape, sides, strict=False))
    return np.pad(image, (*sides, (0, 0)), mode="edge"), np.maximum(down[:, None], across[None, :])


def _sides(margins: tuple[int, int, int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    left, top, right, bottom = margins
    return (top, bottom), (left, right)


def _ramp(size: int, before: int, after: int, feather: int) -> np.ndarray:
    """The mask along one axis, with margins of `before` and `after` pixels around `size`."""
    inside = np.arange(size, dtype=np.float32)
    distances = [distance for distance, margin in ((inside, before), (size - 1 - inside, after)) if margin]
    falls = [1 - (distance + 1) / (feather + 1) for distance in distances]
    inner = np.clip(np.max([*falls, np.zeros_like(inside)], axis=0), 0, 1)
    return np.pad(inner, (before, after), constant_values=1)
