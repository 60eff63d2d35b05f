"""Control images made of pictures: edges, colours, luminance. uint8 (H, W, 3) -> uint8 (H, W, 3), numpy alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from tinydiff.stages import MADE

CELL = 16  # pixels a side of one colour
SIGMA, LOW, HIGH = (
    1.0,
    0.1,
    0.2,
)  # of edges: the blur in pixels, and thresholds of the gradient, where black to white is 1
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of ITU-R BT.601


def luminance(image: np.ndarray) -> np.ndarray:
    """Grey, as bright as the picture."""
    return np.repeat(np.rint(image @ LUMA).astype(np.uint8)[..., None], 3, -1)


def colour(image: np.ndarray) -> np.ndarray:
    """Squares of the mean colour."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((max(1, width // CELL), max(1, height // CELL)), Image.Resampling.BOX)
    return np.array(small.resize((width, height), Image.Resampling.NEAREST))


def edges(image: np.ndarray) -> np.ndarray:
    """White where the brightness of the most changed channel has an edge of one pixel's width (Canny 1986), else black."""
    down, across = (
        np.stack([gradient(c, axis) for c in np.moveaxis(image, -1, 0) / np.float32(255)]) for axis in (0, 1)
    )
    size = np.hypot(down, across)
    most = size.argmax(0)[None]
    size, down, across = (np.take_along_axis(each, most, 0)[0] for each in (size, down, across))
    ridge = size * thin(size, down, across)
    weak, found = ridge > LOW, ridge > HIGH
    while (more := weak & grown(found)).sum() > found.sum():  # weak edges count where they go on from strong ones
        found = more
    return np.repeat((found * np.uint8(255))[..., None], 3, -1)


def gradient(channel: np.ndarray, axis: int) -> np.ndarray:
    """The derivative of a Gaussian along an axis, scaled so that a sharp step from 0 to 1 gives 1 at most: (H, W)."""
    x = np.arange(-3, 4, dtype=np.float32)
    bell = np.exp(-(x**2) / (2 * SIGMA**2))
    slope = -x * bell
    return filtered(filtered(channel, slope / slope[:3].sum(), axis), bell / bell.sum(), 1 - axis)


def filtered(channel: np.ndarray, kernel: np.ndarray, axis: int) -> np.ndarray:
    """The correlation with a kernel along an axis, edges repeated."""
    padded = np.pad(channel, [(len(kernel) // 2,) * 2 if i == axis else (0, 0) for i in range(2)], mode="edge")
    size = channel.shape[axis]
    return sum(w * padded.take(range(i, i + size), axis) for i, w in enumerate(kernel[::-1]))  # type: ignore[return-value]


def thin(size: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Where a gradient is not below its two neighbours along its direction, of eight: bool (H, W)."""
    angle = np.rint(np.arctan2(down, across) / (np.pi / 4)).astype(int) % 4
    padded, (h, w), kept = np.pad(size, 1), size.shape, np.zeros(size.shape, bool)
    for turn, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead, behind = (padded[1 + s * dy : 1 + s * dy + h, 1 + s * dx : 1 + s * dx + w] for s in (1, -1))
        kept |= (angle == turn) & (size >= ahead) & (size > behind)
    return kept


def grown(mask: np.ndarray) -> np.ndarray:
    """A mask and its eight neighbours."""
    padded, (h, w) = np.pad(mask, 1), mask.shape
    return np.any([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


MAKERS: dict[str, Callable[[np.ndarray], np.ndarray]] = dict(zip(MADE, (edges, colour, luminance), strict=True))
