"""Which images are kept out of training: a function of content alone, so that no image changes sides the wrong way."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydiff.config import Data
from tinydiff.data.dataset import Images, Order
from tinydiff.data.held_out import FEWEST, MOST, held_out
from tinydiff.errors import DataError

SETTINGS = {"path": "somewhere", "resolution": 8}


class Source:
    """Images that are told apart by a word of theirs; those of a word that begins with "bad" cannot be read."""

    def __init__(self, words: list[str]):
        self.words, self.skipped = words, []

    def __len__(self) -> int:
        return len(self.words)

    def digest(self, i: int) -> str:
        return hashlib.sha256(self.words[i].encode()).hexdigest()[:32]

    def weight(self, i: int) -> float:
        return 1.0 + i % 3

    def size(self, i: int) -> tuple[int, int]:
        return 8, 8

    def identity(self, i: int) -> str:
        return self.words[i]

    def image(self, i: int) -> np.ndarray:
        if self.words[i].startswith("bad"):
            raise DataError("broken")
        return np.full((8, 8, 3), i % 256, np.uint8)


def kept(words: list[str], share: float) -> set[str]:
    """The words of the images that are held out."""
    return {words[i] for i in np.flatnonzero(held_out(Source(words), Data(held_out=share, **SETTINGS)))}


@settings(deadline=None, max_examples=30)
@given(st.integers(60, 1500), st.integers(0, 900), st.sampled_from([0.02, 0.2, 0.6]), st.randoms())
def test_adding_images_holds_out_none_that_was_trained_on(count, added, share, random):
    before = [f"image {i}" for i in range(count)]
    after = before + [f"more {i}" for i in range(added)]
    random.shuffle(after)
    old, new = kept(before, share), kept(after, share)
    if round(share * count) >= FEWEST:
        assert new & set(before) <= old
        assert new & set(before) == old or len(new) == MOST
    else:
        assert not old


@settings(deadline=None, max_examples=30)
@given(st.integers(400, 1200), st.floats(0.02, 0.3), st.integers(2, 4))
def test_copies_go_together_and_the_share_is_kept(count, share, copies):
    words = [f"image {i}" for i in range(count)] * copies
    mask = held_out(Source(words), Data(held_out=share, **SETTINGS)).reshape(copies, count)
    assert (mask == mask[0]).all() and mask.sum() <= MOST
    if share * count * copies < MOST / 2:
        assert mask[0].mean() == pytest.approx(share, abs=5 * (share / count) ** 0.5)


def test_a_larger_share_holds_out_the_same_and_more():
    words = [f"image {i}" for i in range(1000)]
    sets = [kept(words, share) for share in (0.02, 0.1, 0.3)]
    assert sets[0] < sets[1] < sets[2]


@pytest.mark.parametrize("changes", [{"held_out": 0.0}, {"held_out": 0.02}, {"validation": "x"}, {"path": "shapes"}])
def test_none_are_held_out(changes):
    """By the default share of 300 images, or where there are others to measure on."""
    words = [f"image {i}" for i in range(300)]
    assert not held_out(Source(words), Data(**({**SETTINGS, "held_out": 0.5} | changes))).any()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 40), st.sampled_from([0.02, 0.2, 0.6, 0.9]))
def test_whatever_is_held_out_training_has_an_image_or_the_key_is_named(distinct, copies, share):
    words = [f"image {i}" for i in range(distinct)] * copies
    try:
        assert not held_out(Source(words), Data(held_out=share, **SETTINGS)).all()
    except DataError as error:
        assert str(error).startswith("data.held_out: ") and round(share * len(words)) >= FEWEST


@pytest.mark.parametrize("flip", [False, True])
def test_training_never_draws_one_nor_its_mirror_image(flip):
    source = Source([f"image {i}" for i in range(500)])
    data = Images(source, Data(held_out=0.1, flip=flip, **SETTINGS))
    order, seen = Order(data.weights(), 3, data.bucket, 16), set()
    for step in range(10 * order.length):
        seen |= set((order(step) % 500).tolist())
    assert 20 < data.held_out.sum() < 90 and seen == set(np.flatnonzero(~data.held_out).tolist())


def test_none_takes_the_place_of_an_image_that_cannot_be_read():
    words = [f"image {i}" if i % 3 else f"bad {i}" for i in range(300)]
    data = Images(Source(words), Data(held_out=0.4, max_bad_fraction=1.0, **SETTINGS))
    bad = [i for i in range(0, 300, 3) if not data.held_out[i]]
    pixels = data.batch(bad)
    trained = {i % 256 for i in np.flatnonzero(~data.held_out).tolist() if i % 3}
    assert all(any(int(p.flat[0]) == t for t in trained) for p in pixels)
    instead = [next(j % 300 for j in range(i, i + 300) if j % 300 % 3 and not data.held_out[j % 300]) for i in bad]
    assert [int(p.flat[0]) for p in pixels] == [i % 256 for i in instead]
