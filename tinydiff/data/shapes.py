"""Procedural images of two coloured shapes, their captions, and the oracle that reads an image back.

A scene is two objects (size, colour, shape) and the relation between them: "a large red circle left of a small blue
square". `render` draws a scene at any resolution, anti-aliased; `read_scene` recovers it from the pixels alone, so that
a model can be judged without a second model. One scene in ten is held out of `ShapesSource` for good. numpy only:
nothing here knows of tensors, tokens, files or training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

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
SIZES = {"small": 8.0, "large": 12.0}  # extents in units of 1/32 of the image, like every length below
MIRRORED = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}
RELATIONS = tuple(MIRRORED)

UNITS, MARGIN, GAP, SLANT, ARM = 32.0, 1.0, 3.0, 0.5, 0.36  # SLANT: side offset over main offset; ARM: of a cross
FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": ARM * (2 - ARM)}  # area over extent squared
SCENES = (len(SIZES) * len(COLOURS) * len(SHAPES)) ** 2 * len(RELATIONS)


@dataclass(frozen=True, order=True)
class Item:
    """One object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two objects and where the first lies, seen from the second."""

    first: Item
    relation: str
    second: Item

    def canonical(self) -> Scene:
        """The same picture told as "left of" or "above"."""
        if self.relation in ("left of", "above"):
            return self
        return Scene(self.second, MIRRORED[self.relation], self.first)


# ---- captions ------------------------------------------------------------------------------------------------------


def caption(scene: Scene) -> str:
    """The one caption of a scene, e.g. "a large red circle left of a small blue square"."""
    return f"{scene.first} {scene.relation} {scene.second}"


def parse(text: str) -> Scene:
    """The scene of a caption; the inverse of `caption`, blind to case and spacing. Raises DataError."""
    words = " ".join(text.lower().split())
    for relation in RELATIONS:
        first, found, second = words.partition(f" {relation} ")
        if found:
            return Scene(_parse_item(first, text), relation, _parse_item(second, text))
    raise _not_a_caption(text)


def _parse_item(words: str, text: str) -> Item:
    match words.split():
        case ["a", size, colour, shape] if size in SIZES and colour in COLOURS and shape in SHAPES:
            return Item(size, colour, shape)
    raise _not_a_caption(text)


def _not_a_caption(text: str) -> DataError:
    return DataError(f'not a caption of shapes: {text[:80]!r}; write "a large red circle left of a small blue square"')


def scene_at(index: int) -> Scene:
    """Scene number `index` of the `SCENES` possible ones."""
    index, relation = divmod(index, len(RELATIONS))
    second, first = divmod(index, len(SIZES) * len(COLOURS) * len(SHAPES))
    return Scene(_item_at(first), RELATIONS[relation], _item_at(second))


@cache
def _item_at(index: int) -> Item:
    index, shape = divmod(index, len(SHAPES))
    size, colour = divmod(index, len(COLOURS))
    return Item(tuple(SIZES)[size], tuple(COLOURS)[colour], SHAPES[shape])


def draw_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn uniformly from all of them, held-out ones included."""
    return scene_at(int(rng.integers(SCENES)))


def held_out(text: str) -> bool:
    """Whether a caption belongs to the fixed tenth that is never trained on.

    Decided by the SHA-256 of the canonical caption, so a caption and its mirror image ("A left of B", "B right of A")
    stand on the same side: neither the words nor the picture of a held-out scene is ever seen.
    """
    return _held_out(parse(text))


def _held_out(scene: Scene) -> bool:
    digest = hashlib.sha256(caption(scene.canonical()).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def held_out_captions(n: int, seed: int = 0) -> list[str]:
    """`n` distinct held-out captions in a seeded order; DataError when there are fewer."""
    scenes = [scene for scene in map(scene_at, range(SCENES)) if _held_out(scene)]
    if n > len(scenes):
        raise DataError(f"only {len(scenes)} captions of shapes are held out; ask for at most that many, not {n}")
    order = _keyed(seed, 2**63).permutation(len(scenes))[:n]
    return [caption(scenes[i]) for i in order]


def _keyed(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


# ---- drawing -------------------------------------------------------------------------------------------------------


def render(scene: Scene, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """Draws `scene` at a jittered position: uint8 (size, size, 3). Objects stay inside and never touch.

    The layout depends on `rng` alone, so the same generator state gives the same picture at every `size`.
    """
    centres = _layout(scene, rng)
    background = np.asarray(BACKGROUND, dtype=np.float32)
    image = np.empty((size, size, 3), dtype=np.float32)
    image[:] = background
    for item, (x, y) in zip((scene.first, scene.second), centres, strict=True):
        _paint(image, item, x * size / UNITS, y * size / UNITS)
    return (image + 0.5).astype(np.uint8)


def _paint(image: np.ndarray, item: Item, x: float, y: float) -> None:
    """Blends one object, centred on pixel position (x, y), into its window of a float image (H, W, 3)."""
    size = image.shape[0]
    extent = SIZES[item.size] * size / UNITS
    left, top = max(0, int(x - extent / 2 - 1)), max(0, int(y - extent / 2 - 1))
    width = int(extent + 4)
    window = image[top : top + width, left : left + width]
    alpha = coverage(item.shape, window.shape[:2], x - left, y - top, extent, extent)
    window += alpha[..., None] * (np.asarray(COLOURS[item.colour], dtype=np.float32) - window)


def _layout(scene: Scene, rng: np.random.Generator) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centres (x, y) of the first and second object in 1/32 of the image."""
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
    """How much of each pixel a shape covers: float32 (H, W) in [0, 1].

    `x`, `y`: centre, `width`, `height`: extents, all in pixels. Squares and crosses are exact areas; the slanted
    and round edges of the others are clipped signed distances (a one-pixel ramp).
    """
    across = np.arange(canvas[1], dtype=np.float32)[None, :] + np.float32(0.5 - x)  # (1, W)
    down = np.arange(canvas[0], dtype=np.float32)[:, None] + np.float32(0.5 - y)  # (H, 1)
    return _COVERAGE[shape](across, down, width, height)


def _ramp(inside: np.ndarray) -> np.ndarray:
    """Coverage from the distance inside an edge, in pixels."""
    return np.minimum(np.maximum(inside + np.float32(0.5), np.float32(0)), np.float32(1))


def _bar(offset: np.ndarray, length: float) -> np.ndarray:
    return _ramp(np.float32(length / 2) - np.abs(offset))


def _circle(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    radius = (width + height) / 4
    x, y = x * np.float32(2 * radius / width), y * np.float32(2 * radius / height)
    return _ramp(np.float32(radius) - np.sqrt(x * x + y * y))


def _square(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    return _bar(x, width) * _bar(y, height)


def _triangle(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    slope = width / (2 * height)  # half-width gained for each pixel down from the apex
    normal = np.float32((1 + slope**2) ** -0.5)
    middle = (y + np.float32(height / 2)) * (np.float32(slope) * normal)
    x = x * normal
    return _ramp(middle + x) * _ramp(middle - x) * _ramp(np.float32(height / 2) - y)


def _cross(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    arm_x, arm_y = _bar(x, width * ARM), _bar(y, height * ARM)
    return _bar(x, width) * arm_y + arm_x * _bar(y, height) - arm_x * arm_y


_COVERAGE: dict[str, Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


# ---- the oracle ----------------------------------------------------------------------------------------------------


def read_scene(image: np.ndarray) -> Scene | None:
    """Reads the scene off an image, uint8 (H, W, 3), told as "left of" or "above"; None when there is no such scene.

    Connected components against the background; colour: nearest of the palette at the component's core; shape: best
    overlap with the renderer's own templates of the same area; size: that template's extent; relation: the larger
    offset of the centres.
    """
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.ndim != 3 or pixels.shape[0] != pixels.shape[1] or pixels.shape[2] != 3 or pixels.shape[0] < 16:
        return None
    unit = pixels.shape[0] / UNITS
    regions = _regions(_foreground(pixels) > 0.5, smallest=10 * unit**2, stray=10 * unit**2)
    if regions is None:
        return None
    found = [_read_item(pixels, region, unit) for region in regions]
    (first, first_at), (second, second_at) = found
    if first is None or second is None:
        return None
    return Scene(first, _relation(first_at, second_at), second).canonical()


def matches(text: str, image: np.ndarray) -> dict[str, bool]:
    """Which parts of a caption an image shows: {"colours", "shapes", "relation", "sizes"}; all False on garbage.

    The image's objects are matched to the caption's so that most attributes agree, so swapped positions cost the
    relation and not the colours. The image is wholly right when every value is True.
    """
    wanted, seen = parse(text), read_scene(image)
    if seen is None:
        return {"colours": False, "shapes": False, "relation": False, "sizes": False}
    mirrored = Scene(seen.second, MIRRORED[seen.relation], seen.first)
    return max((_agreement(wanted, seen), _agreement(wanted, mirrored)), key=_score)


def _agreement(wanted: Scene, seen: Scene) -> dict[str, bool]:
    pairs = ((wanted.first, seen.first), (wanted.second, seen.second))
    return {
        "colours": all(a.colour == b.colour for a, b in pairs),
        "shapes": all(a.shape == b.shape for a, b in pairs),
        "relation": wanted.relation == seen.relation,
        "sizes": all(a.size == b.size for a, b in pairs),
    }


def _score(agreement: dict[str, bool]) -> tuple[int, bool, bool]:
    return sum(agreement.values()), agreement["colours"], agreement["relation"]


def _palette() -> np.ndarray:
    return np.asarray(list(COLOURS.values()), dtype=np.float32)


def _foreground(pixels: np.ndarray) -> np.ndarray:
    """Per pixel, the coverage (H, W) under the palette colour whose blend with the background explains it best."""
    background = np.asarray(BACKGROUND, dtype=np.float32)
    towards = _palette() - background  # (8, 3)
    offset = pixels - background  # (H, W, 3)
    alpha = np.clip(offset @ towards.T / (towards**2).sum(1), 0, 1)  # (H, W, 8)
    residual = ((offset[..., None, :] - alpha[..., None] * towards) ** 2).sum(-1)  # (H, W, 8)
    return np.take_along_axis(alpha, residual.argmin(-1)[..., None], -1)[..., 0]


def _regions(mask: np.ndarray, smallest: float, stray: float) -> list[np.ndarray] | None:
    """The two connected regions of a mask (H, W); None unless exactly two are large and the rest is `stray` at most."""
    labels = _label(mask)
    names, areas = np.unique(labels[mask], return_counts=True)
    large = names[areas >= smallest]
    if len(large) != 2 or areas[areas < smallest].sum() > stray:
        return None
    return [labels == name for name in large]


def _label(mask: np.ndarray) -> np.ndarray:
    """4-connected components: int (H, W), a region's number the least flat index + 1 in it, 0 outside."""
    far = mask.size + 1
    labels = np.where(mask, np.arange(1, far).reshape(mask.shape), far)
    while True:
        padded = np.pad(labels, 1, constant_values=far)
        near = np.minimum.reduce([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:], labels])
        near = np.where(mask, near, far)
        if np.array_equal(near, labels):
            return np.where(mask, labels, 0)
        labels = near


def _read_item(pixels: np.ndarray, region: np.ndarray, unit: float) -> tuple[Item | None, tuple[float, float]]:
    """The object of one region and its centre (x, y) in pixels."""
    colour = _nearest_colour(pixels, region)
    alpha = _coverage_of(pixels, _grow(region), colour)
    fits = {shape: _fit(alpha, shape, unit) for shape in SHAPES}
    shape = max(fits, key=lambda name: fits[name][0])
    overlap, extent, centre = fits[shape]
    small, large = SIZES["small"] * unit, SIZES["large"] * unit
    if overlap < 0.6 or not 0.7 * small < extent < 1.25 * large:
        return None, centre
    return Item("small" if extent < (small + large) / 2 else "large", colour, shape), centre


def _fit(alpha: np.ndarray, shape: str, unit: float) -> tuple[float, float, tuple[float, float]]:
    """(overlap, extent, centre) of a coverage (H, W) and the template of equal area and centroid.

    Area and centroid survive blur, where edges move; the template is compared sharp and at two degrees of blur.
    """
    area = alpha.sum()
    extent = float(np.sqrt(area / FILL[shape]))
    x = float(((np.arange(alpha.shape[1]) + 0.5) * alpha.sum(0)).sum() / area)
    y = float(((np.arange(alpha.shape[0]) + 0.5) * alpha.sum(1)).sum() / area)
    y -= extent / 6 if shape == "triangle" else 0.0  # its centroid lies a third up from the base
    template = coverage(shape, alpha.shape, x, y, extent, extent)
    best = _overlap(alpha, template)
    for _ in range(2):
        template = _blur(template, passes=max(1, round(unit**2)))
        best = max(best, _overlap(alpha, template))
    return best, extent, (x, y)


def _blur(image: np.ndarray, passes: int) -> np.ndarray:
    """Binomial blur (H, W): a variance of half a square pixel for each pass."""
    for _ in range(passes):
        padded = np.pad(image, 1, mode="edge")
        padded = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
        image = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    return image


def _nearest_colour(pixels: np.ndarray, region: np.ndarray) -> str:
    """Nearest palette colour to the mean over the region's most enclosed third."""
    padded = np.pad(region.astype(np.int64), 1)
    height, width = region.shape
    shifted = [padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    enclosed = np.sum(shifted, axis=0)
    core = region & (enclosed >= np.quantile(enclosed[region], 2 / 3))
    distance = ((_palette() - pixels[core].mean(0)) ** 2).sum(1)
    return tuple(COLOURS)[int(distance.argmin())]


def _coverage_of(pixels: np.ndarray, where: np.ndarray, colour: str) -> np.ndarray:
    """Coverage (H, W) by one colour over the background, 0 outside `where`."""
    background = np.asarray(BACKGROUND, dtype=np.float32)
    towards = np.asarray(COLOURS[colour], dtype=np.float32) - background
    alpha = (pixels - background) @ towards / (towards**2).sum()
    return np.where(where, np.clip(alpha, 0, 1), 0)


def _grow(region: np.ndarray) -> np.ndarray:
    """The region and its eight neighbours."""
    padded = np.pad(region, 1)
    height, width = region.shape
    return np.logical_or.reduce([padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)])


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Soft intersection over union of two coverages."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def _relation(first: tuple[float, float], second: tuple[float, float]) -> str:
    across, down = second[0] - first[0], second[1] - first[1]
    if abs(across) >= abs(down):
        return "left of" if across > 0 else "right of"
    return "above" if down > 0 else "below"


# ---- the source ----------------------------------------------------------------------------------------------------


class ShapesSource:
    """Image i and its caption come from a generator keyed by (seed, i): any order, any process, the same picture.

    Never yields a held-out caption. `size`: pixels a side. `count`: how many images the source says it has.
    """

    def __init__(self, size: int = 32, seed: int = 0, count: int = 65536) -> None:
        self.resolution, self.seed, self.count = size, seed, count
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return self.count

    def image(self, i: int) -> np.ndarray:
        """uint8 (size, size, 3)."""
        scene, rng = self._draw(i)
        return render(scene, rng, self.resolution)

    def captions(self, i: int) -> list[str]:
        """The one caption of image i."""
        return [caption(self._draw(i)[0])]

    def weight(self, i: int) -> float:
        """All images are drawn equally often."""
        return 1.0

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) in pixels, the same for all."""
        return self.resolution, self.resolution

    def digest(self, i: int) -> str:
        """32 hexadecimal digits of a SHA-256 over what the pixels of image i depend on."""
        return self._sha256("shape 1", self.resolution, self.seed, i)[:32]

    def identity(self, i: int) -> str:
        """A stable name of image i."""
        return f"shapes-{self.seed}-{i}"

    def report(self) -> str:
        """One line: how many images."""
        return f"shapes: {len(self)} images"

    def fingerprint(self) -> str:
        """SHA-256 (hex) over everything the images depend on."""
        return self._sha256("shapes 1", self.resolution, self.seed, self.count)

    def _sha256(self, *about: object) -> str:
        rules = (COLOURS, BACKGROUND, SIZES, RELATIONS, SHAPES, UNITS, MARGIN, GAP, SLANT, ARM)
        return hashlib.sha256(repr((*about, rules)).encode()).hexdigest()

    def _draw(self, i: int) -> tuple[Scene, np.random.Generator]:
        if not 0 <= i < self.count:
            raise IndexError(f"image {i} of {self.count}")
        rng = _keyed(self.seed, i)
        while _held_out(scene := draw_scene(rng)):
            pass
        return scene, rng
