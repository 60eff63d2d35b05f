"""The autoencoder on images of any size in bounded memory: a few at a time, and large ones in overlapping tiles.

Tiles are blended by linear ramps over their overlap, so no seam shows. An image of at most `MOST` pixels is not tiled.
It knows arrays and a backend's two calls only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

MOST = 768 * 768  # pixels in one call
TILE, OVERLAP = 512, 128  # pixels

Call = Callable[[np.ndarray], np.ndarray]


def decode(call: Call, z: np.ndarray, factor: int) -> np.ndarray:
    """(B, C, h, w) -> (B, 3, H, W) by `call`, which decodes one batch of latents; `factor` is H / h."""
    return _bounded(call, z, factor, 1)


def encode(call: Call, pixels: np.ndarray, factor: int) -> np.ndarray:
    """(B, 3, H, W) -> (B, 2C, h, w) by `call`, which encodes one batch of images; `factor` is H / h."""
    return _bounded(call, pixels, 1, factor)


def _bounded(call: Call, x: np.ndarray, up: int, down: int) -> np.ndarray:
    """`call` on a few images at a time, or on tiles. It scales sides by up / down; x has one cell per `up` pixels."""
    pixels = x.shape[2] * x.shape[3] * up * up
    if pixels > MOST:
        return np.concatenate([_tiled(call, image, up, down) for image in np.split(x, len(x))])
    few = max(1, MOST // pixels)
    return np.concatenate([call(x[i : i + few]) for i in range(0, len(x), few)])


def _tiled(call: Call, x: np.ndarray, up: int, down: int) -> np.ndarray:
    """One image (1, C, h, w) in tiles: where they overlap, the mean weighted by the distance to each tile's edge."""
    height, width = (n * up // down for n in x.shape[2:])
    total = weight = np.zeros((1, 1, height, width), np.float32)
    for top, bottom, rows in _spans(x.shape[2], up, down):
        for left, right, columns in _spans(x.shape[3], up, down):
            y = call(x[:, :, top:bottom, left:right])
            if total.shape[1] != y.shape[1]:
                total = np.zeros((1, y.shape[1], height, width), np.float32)
            at = (..., slice(top * up // down, bottom * up // down), slice(left * up // down, right * up // down))
            ramp = rows[:, None] * columns
            total[at] += y * ramp
            weight[at] += ramp
    return total / weight


def _spans(size: int, up: int, down: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """The start and end of each tile along a side of x, and its weights along that side of the result."""
    tile, step = min(size, TILE // up), (TILE - OVERLAP) // up
    for start in [*range(0, size - tile, step), size - tile]:
        n, fade = tile * up // down, OVERLAP // down
        positions = np.arange(n, dtype=np.float32) + 0.5
        from_start = np.full(n, np.inf) if start == 0 else positions
        from_end = np.full(n, np.inf) if start + tile == size else positions[::-1]
        yield start, start + tile, np.minimum(np.minimum(from_start, from_end) / fade, 1).astype(np.float32)
