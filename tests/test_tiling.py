"""Tiles: where a network sees only what is near, the result is that without tiles; nowhere is there a seam."""

from __future__ import annotations

import numpy as np
import pytest

from tinydiff import tiling

FACTOR = 8


def local(z: np.ndarray) -> np.ndarray:
    """A decoder (B, C, h, w) -> (B, 3, 8h, 8w) that sees one latent beside its own, edges repeated."""
    padded = np.pad(z, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    h, w = z.shape[2:]
    mean = sum(padded[:, :3, i : i + h, j : j + w] for i in range(3) for j in range(3)) / 9
    return mean.repeat(FACTOR, 2).repeat(FACTOR, 3).astype(np.float32)


def pooled(pixels: np.ndarray) -> np.ndarray:
    """An encoder (B, 3, H, W) -> (B, 6, H/8, W/8) that sees its own pixels."""
    b, c, height, width = pixels.shape
    mean = pixels.reshape(b, c, height // FACTOR, FACTOR, width // FACTOR, FACTOR).mean(axis=(3, 5))
    return np.concatenate([mean, -mean], axis=1).astype(np.float32)


class Counted:
    def __init__(self, call):
        self.call, self.seen = call, []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.seen.append(x.shape)
        return self.call(x)


@pytest.mark.parametrize("side", [(64, 64), (96, 96), (40, 120)])
def test_what_fits_is_not_tiled(side):
    z, call = np.random.default_rng(0).standard_normal((1, 4, *side)).astype(np.float32), Counted(local)
    np.testing.assert_array_equal(tiling.decode(call, z, FACTOR), local(z))
    assert call.seen == [z.shape]


@pytest.mark.parametrize("side", [(128, 128), (100, 160), (64, 200), (300, 40)])
def test_tiles_are_small_and_agree_but_at_their_edges(side):
    z, call = np.random.default_rng(0).standard_normal((2, 4, *side)).astype(np.float32), Counted(local)
    found, whole = tiling.decode(call, z, FACTOR), local(z)
    assert found.shape == whole.shape and len(call.seen) > 2
    assert all(b == 1 and h * FACTOR <= tiling.TILE and w * FACTOR <= tiling.TILE for b, _, h, w in call.seen)
    # Only the outermost latent of a tile is not the whole's; there it has at most 4 pixels' share of a fade of 128.
    assert (np.abs(found - whole) < 1e-5).mean() > 0.8
    assert np.abs(found - whole).max() < 0.1 * np.abs(whole).max()


def test_encoding_in_tiles_is_exact_where_each_latent_sees_its_own_pixels():
    pixels, call = np.random.default_rng(0).standard_normal((1, 3, 1024, 1280)).astype(np.float32), Counted(pooled)
    np.testing.assert_allclose(tiling.encode(call, pixels, FACTOR), pooled(pixels), atol=1e-6)
    assert all(h <= tiling.TILE and w <= tiling.TILE for *_, h, w in call.seen) and len(call.seen) > 4


def test_tiles_of_other_brightness_leave_no_seam():
    """Each tile as bright as its first latent says: neighbouring pixels still differ by no more than a ramp's step."""
    z = np.linspace(0, 1, 256, dtype=np.float32)[None, None, None].repeat(64, 2).repeat(3, 1)
    found = tiling.decode(lambda x: np.full((1, 3, x.shape[2] * 8, x.shape[3] * 8), x[0, 0, 0, 0]), z, FACTOR)
    assert np.abs(np.diff(found, axis=3)).max() < 3 / tiling.OVERLAP
    assert found.max() - found.min() > 0.5


def test_few_images_at_a_time():
    z, call = np.zeros((5, 4, 64, 64), np.float32), Counted(local)
    assert tiling.decode(call, z, FACTOR).shape == (5, 3, 512, 512)
    assert [shape[0] for shape in call.seen] == [2, 2, 1]
    small = Counted(local)
    tiling.decode(small, np.zeros((8, 4, 8, 8), np.float32), FACTOR)
    assert [shape[0] for shape in small.seen] == [8]
