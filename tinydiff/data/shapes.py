"""Procedural images of two coloured shapes, their captions, and an oracle that reads the scene back from an image.

A scene is two objects (size, colour, shape) and their relation: "a large red circle left of a small blue square".
`render` draws a scene at any resolution, anti-aliased; `read_scene` recovers it from the pixels, so that images can
be scored without a second model. One scene in ten is held out: `ShapesSource` never shows it. numpy only.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from itertools import product

import numpy as np

from tinydiff.errors import DataError

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (215, 30, 35),
    "orange": (255, 135, 0),
    "yellow": (245, 225, 30),
    "green": (30, 160, 60),
    "blue": (35, 85, 220),
    "purple": (130, 40, 175),
    "black": (20, 20, 20),
    "pink": (255, 120, 200),
}
BACKGROUND = (248, 248, 248)
SIZES = {"small": 8.0, "large": 12.0}  # extents; all lengths here are in 1/32 of the image
MIRRORED = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}
RELATIONS = tuple(MIRRORED)

UNITS, MARGIN, GAP = 32.0, 1.0, 3.0
SLANT, ARM = 0.5, 0.36  # the most sideways offset, as a share of the main one; a cross's arm width / extent
FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": ARM * (2 - ARM)}  # area over extent squared
ITEM = f"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
CAPTION = re.compile(f"{ITEM} ({'|'.join(RELATIONS)}) {ITEM}")


@dataclass(frozen=True, order=True)
class Item:
    """One object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


ITEMS = [Item(*words) for words in product(SIZES, COLOURS, SHAPES)]
SCENES = len(ITEMS) ** 2 * len(RELATIONS)


@dataclass(frozen=True)
class Scene:
    """Two objects; `relation` is where the first lies, seen from the second."""

    first: Item
    relation: str
    second: Item

    def canonical(self) -> Scene:
        """The same scene described by "left of" or "above"."""
        return (
            self if self.relation in ("left of", "above") else Scene(self.second, MIRRORED[self.relation], self.first)
        )


def caption(scene: Scene) -> str:
    """The one caption of a scene, e.g. "a large red circle left of a small blue square"."""
    return f"{scene.first} {scene.relation} {scene.second}"


def parse(text: str) -> Scene:
    """The scene of a caption, whatever its case and spacing: the inverse of `caption`. Raises DataError."""
    if not (match := CAPTION.fullmatch(" ".join(text.lower().split()))):
        example = "a large red circle left of a small blue square"
        raise DataError(f'not a caption of shapes: {text[:80]!r}; write "{example}"')
    return Scene(Item(*match.groups()[:3]), match[4], Item(*match.groups()[4:]))


def scene_at(index: int) -> Scene:
    """Scene `index` of all `SCENES`."""
    index, relation = divmod(index, len(RELATIONS))
    second, first = divmod(index, len(ITEMS))
    return Scene(ITEMS[first], RELATIONS[relation], ITEMS[second])


def held_out(what: str | Scene) -> bool:
    """Whether a caption or scene belongs to the fixed tenth of scenes that training never sees.

    The SHA-256 of the canonical caption decides, so "A left of B" and "B right of A" are held out together.
    """
    scene = parse(what) if isinstance(what, str) else what
    digest = hashlib.sha256(caption(scene.canonical()).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def held_out_captions(n: int, seed: int = 0) -> list[str]:
    """`n` distinct held-out captions in a seeded order. Raises DataError if there are fewer."""
    scenes = list(filter(held_out, map(scene_at, range(SCENES))))
    if n > len(scenes):
        raise DataError(f"only {len(scenes)} captions of shapes are held out; ask for at most that many, not {n}")
    return [caption(scenes[i]) for i in _keyed(seed, 2**63).permutation(len(scenes))[:n]]


def _keyed(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


# ---- drawing -------------------------------------------------------------------------------------------------------


def render(scene: Scene, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """Draw `scene` at a random position: uint8 (size, size, 3). Objects lie inside the image and never touch.

    The layout depends on `rng` only, so the same generator state gives the same picture at every `size`.
    """
    image = np.full((size, size, 3), BACKGROUND, dtype=np.float32)
    for item, (x, y) in zip((scene.first, scene.second), _layout(scene, rng), strict=True):
        x, y, extent = (length * size / UNITS for length in (x, y, SIZES[item.size]))  # in pixels
        left, top, width = max(0, int(x - extent / 2 - 1)), max(0, int(y - extent / 2 - 1)), int(extent + 4)
        window = image[top : top + width, left : left + width]
        alpha = coverage(item.shape, window.shape[:2], x - left, y - top, extent, extent)
        window += alpha[..., None] * (np.asarray(COLOURS[item.colour], dtype=np.float32) - window)
    return (image + 0.5).astype(np.uint8)


def _layout(scene: Scene, rng: np.random.Generator) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centres (x, y) of the first and second object."""
    a, b = SIZES[scene.first.size], SIZES[scene.second.size]
    if mirrored := scene.relation in ("right of", "below"):
        a, b = b, a
    u = rng.random(4).tolist()
    room = UNITS - 2 * MARGIN - (a + b) / 2  # the largest offset between the centres
    main = _between((a + b) / 2 + GAP, room, u[0])
    side = min(SLANT * main, room) * (2 * u[1] - 1)
    start = _between(MARGIN + a / 2, UNITS - MARGIN - b / 2 - main, u[2])
    low, high = MARGIN + max(a / 2, b / 2 - side), UNITS - MARGIN - max(a / 2, b / 2 + side)
    cross = _between(low, high, u[3])
    near, far = (start, cross), (start + main, cross + side)
    if scene.relation in ("above", "below"):
        near, far = (cross, start), (cross + side, start + main)
    return (far, near) if mirrored else (near, far)


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def coverage(shape: str, canvas: tuple[int, int], x: float, y: float, width: float, height: float) -> np.ndarray:
    """The share of each pixel that a shape covers: float32 (H, W) in [0, 1].

    Centre and extents are in pixels. Squares and crosses are exact; slanted and round edges are a ramp one pixel wide.
    """
    across = np.arange(canvas[1], dtype=np.float32)[None, :] + np.float32(0.5 - x)  # (1, W)
    down = np.arange(canvas[0], dtype=np.float32)[:, None] + np.float32(0.5 - y)  # (H, 1)
    if shape == "circle":
        radius = (width + height) / 4
        across, down = across * np.float32(2 * radius / width), down * np.float32(2 * radius / height)
        return _ramp(np.float32(radius) - np.sqrt(across * across + down * down))
    if shape == "triangle":
        slope = width / (2 * height)  # half-width gained for each pixel down from the apex
        normal = np.float32((1 + slope**2) ** -0.5)
        middle, side = (down + np.float32(height / 2)) * (np.float32(slope) * normal), across * normal
        return _ramp(middle + side) * _ramp(middle - side) * _ramp(np.float32(height / 2) - down)
    if shape == "square":
        return _bar(across, width) * _bar(down, height)
    arm_x, arm_y = _bar(across, width * ARM), _bar(down, height * ARM)
    return _bar(across, width) * arm_y + arm_x * _bar(down, height) - arm_x * arm_y


def _ramp(inside: np.ndarray) -> np.ndarray:
    """Coverage of a pixel from its signed distance to an edge, positive inside, in pixels."""
    return np.minimum(np.maximum(inside + np.float32(0.5), np.float32(0)), np.float32(1))


def _bar(offset: np.ndarray, length: float) -> np.ndarray:
    return _ramp(np.float32(length / 2) - np.abs(offset))


# ---- the oracle ----------------------------------------------------------------------------------------------------

_BACKGROUND, _PALETTE = (np.asarray(rgb, dtype=np.float32) for rgb in (BACKGROUND, list(COLOURS.values())))


def read_scene(image: np.ndarray) -> Scene | None:
    """The canonical scene that a uint8 (H, W, 3) image shows; None if it does not show two objects.

    Each connected component of the foreground is an object. Colour: the palette's nearest to the component's core.
    Shape: the renderer's template of equal area with the best overlap. Size: its extent. Relation: by the longer axis.
    """
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.ndim != 3 or pixels.shape[0] != pixels.shape[1] or pixels.shape[2] != 3 or pixels.shape[0] < 16:
        return None
    unit = pixels.shape[0] / UNITS
    regions = _regions(_foreground(pixels) > 0.5, least=10 * unit**2)
    if len(regions) != 2:
        return None
    (first, first_at), (second, second_at) = (_read_item(pixels, region, unit) for region in regions)
    if first is None or second is None:
        return None
    across, down = second_at[0] - first_at[0], second_at[1] - first_at[1]
    if abs(across) >= abs(down):
        return Scene(first, "left of" if across > 0 else "right of", second).canonical()
    return Scene(first, "above" if down > 0 else "below", second).canonical()


def matches(text: str, image: np.ndarray) -> dict[str, bool]:
    """Which of a caption's "colours", "shapes", "relation" and "sizes" an image shows; all False if it shows no scene.

    Objects are matched to the caption's so that most attributes agree: swapped positions cost the relation, not the
    colours. The image is wholly right if every value is True.
    """
    wanted, seen = parse(text), read_scene(image)
    if seen is None:
        return {"colours": False, "shapes": False, "relation": False, "sizes": False}
    mirrored = Scene(seen.second, MIRRORED[seen.relation], seen.first)
    verdicts = (_agreement(wanted, seen), _agreement(wanted, mirrored))
    return max(verdicts, key=lambda verdict: (sum(verdict.values()), verdict["colours"], verdict["relation"]))


def _agreement(wanted: Scene, seen: Scene) -> dict[str, bool]:
    pairs = ((wanted.first, seen.first), (wanted.second, seen.second))
    return {
        "colours": all(a.colour == b.colour for a, b in pairs),
        "shapes": all(a.shape == b.shape for a, b in pairs),
        "relation": wanted.relation == seen.relation,
        "sizes": all(a.size == b.size for a, b in pairs),
    }


def _foreground(pixels: np.ndarray) -> np.ndarray:
    """Coverage (H, W) by the palette colour whose blend with the background is nearest to the pixel."""
    towards = _PALETTE - _BACKGROUND  # (8, 3)
    offset = pixels - _BACKGROUND  # (H, W, 3)
    alpha = np.clip(offset @ towards.T / (towards**2).sum(1), 0, 1)  # (H, W, 8)
    residual = ((offset[..., None, :] - alpha[..., None] * towards) ** 2).sum(-1)  # (H, W, 8)
    return np.take_along_axis(alpha, residual.argmin(-1)[..., None], -1)[..., 0]


def _regions(mask: np.ndarray, least: float) -> list[np.ndarray]:
    """The regions of at least `least` pixels; none if smaller ones have more pixels than that together."""
    labels = _label(mask)
    names, areas = np.unique(labels[mask], return_counts=True)
    return [labels == name for name in names[areas >= least]] if areas[areas < least].sum() <= least else []


def _label(mask: np.ndarray) -> np.ndarray:
    """4-connected components: int (H, W), a component's number its lowest flat index + 1, and 0 outside."""
    far = mask.size + 1
    labels = np.where(mask, np.arange(1, far).reshape(mask.shape), far)
    while True:
        padded = np.pad(labels, 1, constant_values=far)
        around = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:], labels]
        near = np.where(mask, np.minimum.reduce(around), far)
        if np.array_equal(near, labels):
            return np.where(mask, labels, 0)
        labels = near


def _read_item(pixels: np.ndarray, region: np.ndarray, unit: float) -> tuple[Item | None, tuple[float, float]]:
    """The object in a region, None if no template fits, and its centre (x, y) in pixels."""
    padded, (height, width) = np.pad(region, 1), region.shape
    around = [padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]  # it and its neighbours
    enclosed = np.sum(around, axis=0)
    core = region & (enclosed >= np.quantile(enclosed[region], 2 / 3))  # the third with the most neighbours in it
    colour = int(((_PALETTE - pixels[core].mean(0)) ** 2).sum(1).argmin())
    towards = _PALETTE[colour] - _BACKGROUND
    alpha = np.clip((pixels - _BACKGROUND) @ towards / (towards**2).sum(), 0, 1)  # coverage by that colour
    alpha = np.where(np.logical_or.reduce(around), alpha, 0)  # 0 where no pixel of the region touches
    fits = {shape: _fit(alpha, shape, unit) for shape in SHAPES}
    shape = max(fits, key=lambda name: fits[name][0])
    overlap, extent, centre = fits[shape]
    small, large = SIZES["small"] * unit, SIZES["large"] * unit
    if overlap < 0.6 or not 0.7 * small < extent < 1.25 * large:
        return None, centre
    return Item("small" if extent < (small + large) / 2 else "large", tuple(COLOURS)[colour], shape), centre


def _fit(alpha: np.ndarray, shape: str, unit: float) -> tuple[float, float, tuple[float, float]]:
    """(intersection over union, extent, centre) of a shape's template with the area and centroid of `alpha` (H, W).

    Blur moves edges but keeps area and centroid; the template is compared sharp and at two degrees of blur.
    """
    area = alpha.sum()
    extent = float(np.sqrt(area / FILL[shape]))
    x = float(((np.arange(alpha.shape[1]) + 0.5) * alpha.sum(0)).sum() / area)
    y = float(((np.arange(alpha.shape[0]) + 0.5) * alpha.sum(1)).sum() / area)
    y -= extent / 6 if shape == "triangle" else 0.0  # its centroid lies a third up from the base
    template, best = coverage(shape, alpha.shape, x, y, extent, extent), 0.0
    for passes in (0, max(1, round(unit**2)), max(1, round(unit**2))):
        template = _blur(template, passes)
        best = max(best, float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum()))
    return best, extent, (x, y)


def _blur(image: np.ndarray, passes: int) -> np.ndarray:
    """Binomial blur (H, W); each pass adds a variance of half a square pixel."""
    for _ in range(passes):
        padded = np.pad(image, 1, mode="edge")
        padded = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
        image = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    return image


class ShapesSource:
    """`count` images of `size` x `size` pixels and their captions; no held-out ones.

    Image i is drawn by a generator seeded with (seed, i), so it is the same in any order and process.
    """

    def __init__(self, size: int = 32, seed: int = 0, count: int = 65536) -> None:
        self.resolution, self.seed, self.count = size, seed, count
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return self.count

    def image(self, i: int) -> np.ndarray:
        """uint8 (size, size, 3)."""
        return render(*self._draw(i), self.resolution)

    def captions(self, i: int) -> list[str]:
        """The one caption of image i."""
        return [caption(self._draw(i)[0])]

    def has_label(self, i: int) -> bool:
        return True

    def label(self, i: int) -> str:
        """What the first object of image i is."""
        return self._draw(i)[0].first.shape

    def weight(self, i: int) -> float:
        """All images are drawn equally often."""
        return 1.0

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) in pixels, equal for all."""
        return self.resolution, self.resolution

    def digest(self, i: int) -> str:
        """32 hexadecimal digits of a SHA-256 of everything that the pixels of image i depend on."""
        return self._sha256("shape 1", self.resolution, self.seed, i)[:32]

    def identity(self, i: int) -> str:
        """A stable name of image i."""
        return f"shapes-{self.seed}-{i}"

    def report(self) -> str:
        """One line: how many images."""
        return f"shapes: {len(self)} images"

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that the images depend on."""
        return self._sha256("shapes 1", self.resolution, self.seed, self.count)

    def _sha256(self, *about: object) -> str:
        rules = (COLOURS, BACKGROUND, SIZES, RELATIONS, SHAPES, UNITS, MARGIN, GAP, SLANT, ARM)
        return hashlib.sha256(repr((*about, rules)).encode()).hexdigest()

    def _draw(self, i: int) -> tuple[Scene, np.random.Generator]:
        if not 0 <= i < self.count:
            raise IndexError(f"image {i} of {self.count}")
        rng = _keyed(self.seed, i)
        while held_out(scene := scene_at(int(rng.integers(SCENES)))):
            pass
        return scene, rng
