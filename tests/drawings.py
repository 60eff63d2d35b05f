"""Tiny images of flat shapes, and the words for them."""

from __future__ import annotations

import numpy as np

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 210), "yellow": (230, 220, 40)}


SHAPES = ("square", "stripe", "corner")


def draw(shape: str, colour: tuple[int, int, int]) -> np.ndarray:
    """uint8 (20, 16, 3): one flat shape on white."""
    image = np.full((20, 16, 3), 255, np.uint8)
    rows, columns = {"square": ((5, 15), (3, 13)), "stripe": ((8, 12), (0, 16)), "corner": ((0, 9), (0, 8))}[shape]
    image[slice(*rows), slice(*columns)] = colour
    return image
