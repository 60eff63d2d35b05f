"""The procedural shapes: what is drawn, what is held out, and the oracle that reads it back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from tinydiff.data import shapes
from tinydiff.data.shapes import Item, Scene, ShapesSource
from tinydiff.errors import DataError

SCENES = st.integers(0, shapes.SCENES - 1).map(shapes.scene_at)


SEEDS = st.integers(0, 2**32)


def drawn(scene: Scene, seed: int = 0, size: int = 32) -> np.ndarray:
    return shapes.render(scene, np.random.default_rng(seed), size)


def scene(text: str) -> Scene:
    return shapes.parse(text)


def mask_of(image: np.ndarray, colour: str) -> np.ndarray:
    """Pixels of exactly a palette colour: the fully covered ones."""
    return (image == np.array(shapes.COLOURS[colour])).all(-1)


def painted(scene: Scene, seed: int, size: int = 32) -> np.ndarray:
    return (drawn(scene, seed, size) != np.array(shapes.BACKGROUND)).any(-1)


# ---- drawing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", shapes.SHAPES)
@given(st.floats(9, 15), st.floats(9, 15), st.floats(6, 12))
@settings(max_examples=30, deadline=None)
def test_coverage_is_the_area_of_each_pixel(shape: str, x: float, y: float, extent: float) -> None:
    n, fine = 24, 16
    grid = (np.arange(n * fine) + 0.5) / fine
    u, v = np.abs(grid[None] - x) / (extent / 2), (grid[:, None] - y) / (extent / 2)  # the shape spans [-1, 1]
    inside = {
        "circle": u**2 + v**2 <= 1,
        "square": np.maximum(u, np.abs(v)) <= 1,
        "triangle": (u <= (v + 1) / 2) & (v <= 1),
        "cross": (np.minimum(u, np.abs(v)) <= shapes.ARM) & (np.maximum(u, np.abs(v)) <= 1),
    }[shape]
    truth = inside.reshape(n, fine, n, fine).mean((1, 3))
    alpha = shapes.coverage(shape, (n, n), x, y, extent, extent)
    assert np.abs(alpha - truth).max() < 0.15
    assert np.abs(alpha - truth).mean() < 0.005
    assert alpha.sum() == pytest.approx(shapes.FILL[shape] * extent**2, rel=0.03)


@given(SCENES, SEEDS, st.sampled_from([24, 32, 48, 64, 100]))
@settings(max_examples=150, deadline=None)
def test_objects_lie_where_the_caption_says_and_never_touch_the_edge(scene: Scene, seed: int, size: int) -> None:
    image = drawn(scene, seed, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(int)
    margin = size / 32  # pixels; below one, the outermost pixels are partly covered
    assert np.abs(edge - np.array(shapes.BACKGROUND)).max() <= 255 * max(0.05, 1.01 - margin)
    if scene.first.colour != scene.second.colour:
        (y1, x1), (y2, x2) = (np.argwhere(mask_of(image, i.colour)).mean(0) for i in (scene.first, scene.second))
        says = {"left of": x1 < x2, "right of": x1 > x2, "above": y1 < y2, "below": y1 > y2}
        assert says[scene.relation]


@pytest.mark.parametrize("relation", shapes.RELATIONS)
@pytest.mark.parametrize("sizes", list(itertools.product(shapes.SIZES, repeat=2)))
def test_every_pairing_fits_with_a_gap(relation: str, sizes: tuple[str, str]) -> None:
    pair = Scene(Item(sizes[0], "black", "square"), relation, Item(sizes[1], "black", "square"))
    axis = 0 if relation in ("left of", "right of") else 1
    for seed in range(100):
        across = painted(pair, seed).any(axis)
        runs = np.flatnonzero(np.diff(np.concatenate([[0], across.astype(int), [0]])))
        assert len(runs) == 4 and runs[2] - runs[1] >= 2  # two stretches with at least two empty lines between


def test_the_layout_is_the_same_at_every_resolution() -> None:
    one = scene("a large red circle left of a small blue square")
    fine = drawn(one, 3, 128).reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(fine - drawn(one, 3, 32)).mean() < 1.5


# ---- captions and the split ----------------------------------------------------------------------------------------


def test_captions_round_trip_and_are_distinct() -> None:
    scenes = [shapes.scene_at(i) for i in range(shapes.SCENES)]
    captions = [shapes.caption(one) for one in scenes]
    assert len(set(captions)) == len(captions) == 64 * 64 * 4
    assert [shapes.parse(text) for text in captions] == scenes


def test_parse_forgives_case_and_spaces_only() -> None:
    assert scene(" A large RED circle  left of a small blue square ").first == Item("large", "red", "circle")
    for wrong in ("", "red heart", "a large red circle left of", "a large teal circle above a small red square"):
        with pytest.raises(DataError, match="not a caption of shapes"):
            shapes.parse(wrong)


def test_a_tenth_is_held_out_with_its_mirror_image() -> None:
    scenes = [shapes.scene_at(i) for i in range(shapes.SCENES)]
    out = {shapes.caption(one) for one in scenes if shapes.held_out(shapes.caption(one))}
    assert 0.09 < len(out) / len(scenes) < 0.11
    for one in scenes[::7]:
        mirror = Scene(one.second, shapes.MIRRORED[one.relation], one.first)
        assert (shapes.caption(mirror) in out) == (shapes.caption(one) in out)
    assert set(shapes.held_out_captions(len(out))) == out


def test_held_out_captions_are_seeded_and_never_drawn() -> None:
    unseen = shapes.held_out_captions(500, seed=1)
    assert len(set(unseen)) == 500 and all(map(shapes.held_out, unseen))
    assert unseen == shapes.held_out_captions(500, seed=1) != shapes.held_out_captions(500, seed=2)
    source = ShapesSource()
    assert not any(shapes.held_out(source.captions(i)[0]) for i in range(2000))
    with pytest.raises(DataError, match="held out"):
        shapes.held_out_captions(shapes.SCENES)


# ---- the source ----------------------------------------------------------------------------------------------------


def test_the_source_is_keyed_by_seed_and_index() -> None:
    source, again, other = ShapesSource(seed=5), ShapesSource(seed=5), ShapesSource(seed=6)
    forth = [source.image(i) for i in range(20)]
    back = [again.image(i) for i in reversed(range(20))][::-1]
    assert np.array_equal(forth, back)
    assert not np.array_equal(forth[0], other.image(0))
    assert source.fingerprint() == again.fingerprint() != other.fingerprint()
    assert len({source.identity(i) for i in range(50)}) == 50
    assert (len(source), source.weight(3), source.skipped) == (65536, 1.0, [])


def test_size_and_digest_are_what_the_pixels_depend_on() -> None:
    source = ShapesSource(48, seed=1, count=30)
    assert source.size(3) == (48, 48) == source.image(3).shape[1::-1]
    digests = [source.digest(i) for i in range(30)]
    assert digests == [ShapesSource(48, seed=1, count=99).digest(i) for i in range(30)]
    others = {ShapesSource(32, seed=1).digest(3), ShapesSource(48, seed=2).digest(3)}
    assert len(others | set(digests)) == 32 and all(len(digest) == 32 for digest in digests)


def test_the_source_is_stable_over_releases() -> None:
    assert [ShapesSource().captions(i) for i in (0, 1)] == [
        ["a small green triangle above a small red triangle"],
        ["a small black triangle left of a large pink triangle"],
    ]


@pytest.mark.parametrize("index", [-1, 10])
def test_the_source_ends(index: int) -> None:
    with pytest.raises(IndexError):
        ShapesSource(count=10).image(index)


# ---- the oracle ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64])
def test_the_oracle_is_exact_on_rendered_images(size: int) -> None:
    source = ShapesSource(size, seed=size)
    for i in range(600 if size == 32 else 250):
        assert shapes.read_scene(source.image(i)) == scene(source.captions(i)[0]).canonical()


@given(SCENES, SEEDS, st.sampled_from([32, 48, 64]))
@settings(max_examples=100, deadline=None)
def test_the_oracle_reads_any_scene(scene: Scene, seed: int, size: int) -> None:
    image = drawn(scene, seed, size)
    assert shapes.read_scene(image) == scene.canonical()
    assert all(shapes.matches(shapes.caption(scene), image).values())


def blurred(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.8)))


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + rng.normal(0, 12, image.shape), 0, 255).round().astype(np.uint8)


def halved(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    small = Image.fromarray(image).resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("spoil", [blurred, noisy, halved])
def test_the_oracle_forgives_what_an_autoencoder_does(spoil) -> None:
    source, rng = ShapesSource(seed=9), np.random.default_rng(0)
    for i in range(200):
        assert shapes.read_scene(spoil(source.image(i), rng)) == scene(source.captions(i)[0]).canonical()


def garbage() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    blank = np.full((32, 32, 3), 248, np.uint8)
    two = drawn(scene("a small red circle left of a small blue square"), 1)
    one, three, full = two.copy(), two.copy(), blank.copy()
    one[mask_of(two, "blue")] = 248
    three[1:9, 1:9] = three[-9:-1, -9:-1] = three[1:9, -9:-1] = (30, 160, 60)
    full[::2] = (215, 30, 35)
    return {
        "blank": blank,
        "black": blank * 0,
        "noise": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        "one object": one,
        "more objects": three,
        "stripes": full,
        "not square": blank[:20],
        "grey": np.zeros((32, 32), np.uint8),
        "tiny": blank[:8, :8],
    }


@pytest.mark.parametrize("name", garbage())
def test_the_oracle_refuses_garbage(name: str) -> None:
    image = garbage()[name]
    assert shapes.read_scene(image) is None
    assert not any(shapes.matches("a small red circle left of a small blue square", image).values())


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ("a large red circle left of a small blue square", set()),
        ("a small blue square right of a large red circle", set()),
        ("a large red circle right of a small blue square", {"relation"}),
        ("a large red circle above a small blue square", {"relation"}),
        ("a large red cross left of a small blue square", {"shapes"}),
        ("a large red circle left of a small green square", {"colours"}),
        ("a small red circle left of a small blue square", {"sizes"}),
        ("a large blue circle left of a small red square", {"colours"}),
        ("a large pink cross below a large pink cross", {"colours", "shapes", "relation", "sizes"}),
    ],
)
def test_matches_names_what_is_wrong(asked: str, wrong: set[str]) -> None:
    image = drawn(scene("a large red circle left of a small blue square"), 4)
    verdict = shapes.matches(asked, image)
    assert {name for name, right in verdict.items() if not right} == wrong
