"""What the pipeline needs to change a given image: the image, how far to leave it, and which part.

Files to an `Edit`, for image to image, inpainting and outpainting. numpy only; no model is known but its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinydiff import images
from tinydiff.errors import UsageError
from tinydiff.files import shown

FEATHER = 2  # latent cells over which an outpainted image's edge is drawn again, so that there is no seam


@dataclass(frozen=True)
class Edit:
    """An image uint8 (H, W, 3); `strength` of the change, 0 to 1; `mask` float32 (H, W), 1 where to draw, or all of it."""

    image: np.ndarray
    strength: float
    mask: np.ndarray | None = None

    def over(self, drawn: np.ndarray) -> np.ndarray:
        """Drawn images uint8 (B, H, W, 3) where the mask says so; every other pixel is the image's own, bit for bit."""
        if self.mask is None:
            return drawn
        mixed = self.image + (drawn.astype(np.float32) - self.image) * self.mask[..., None]
        return np.where(self.mask[..., None] > 0, np.rint(mixed), self.image).astype(np.uint8)


def cells(mask: np.ndarray, factor: int) -> np.ndarray:
    """A mask (H, W) as one of latents (H / factor, W / factor): the largest of each cell, so that no pixel is missed."""
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
    """An Edit from files; `size` (width, height) fits both to it, `margins` (left, top, right, bottom) extend the image.

    In a mask white is drawn and black kept. Raises UsageError where the two do not fit each other.
    """
    picture, drawn = images.open_image(image), images.open_image(mask, "#000000") if mask else None
    if size:
        picture = images.fit(picture, size)
        drawn = images.fit(drawn, size, background="#000000") if drawn is not None else None
    if drawn is not None and drawn.shape != picture.shape:
        (h, w), (mh, mw) = picture.shape[:2], drawn.shape[:2]
        raise UsageError(
            f"{shown(mask or '')}: the mask is {mw}x{mh} and the image {w}x{h}; make them equal, or use --fit"
        )
    alpha = drawn.astype(np.float32).mean(axis=-1) / 255 if drawn is not None else None
    if margins:
        picture, outside = extended(picture, margins, FEATHER * factor)
        alpha = outside if alpha is None else np.maximum(outside, np.pad(alpha, _sides(margins)))
    return Edit(picture, strength, alpha)


def extended(image: np.ndarray, margins: tuple[int, int, int, int], feather: int) -> tuple[np.ndarray, np.ndarray]:
    """A larger canvas (H', W', 3), its margins the image's edge colours, and the mask (H', W') of what is to be drawn.

    The mask falls from 1 to 0 over `feather` pixels inside the image, along the sides that are extended.
    """
    canvas = np.pad(image, (*_sides(margins), (0, 0)), mode="edge")
    (top, bottom), (left, right) = _sides(margins)
    down = _ramp(image.shape[0], top, bottom, feather)
    across = _ramp(image.shape[1], left, right, feather)
    return canvas, np.maximum(down[:, None], across[None, :])


def _sides(margins: tuple[int, int, int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    left, top, right, bottom = margins
    return (top, bottom), (left, right)


def _ramp(size: int, before: int, after: int, feather: int) -> np.ndarray:
    """Along one axis: 1 in the margins, falling to 0 over `feather` pixels inside, from the sides that have one."""
    inside = np.arange(size, dtype=np.float32)
    falls = [
        1 - (distance + 1) / (feather + 1)
        for distance, margin in ((inside, before), (size - 1 - inside, after))
        if margin
    ]
    inner = np.clip(np.max([*falls, np.zeros(size, np.float32)], axis=0), 0, 1)
    return np.concatenate([np.ones(before, np.float32), inner, np.ones(after, np.float32)]).astype(np.float32)
