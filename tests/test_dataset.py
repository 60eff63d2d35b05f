"""Order, weights and the square images of a source."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import images
from tinydiff.config import Data
from tinydiff.data.dataset import Images, Order, open_source
from tinydiff.data.folder import FolderSource
from tinydiff.data.shapes import ShapesSource


class Counted:
    """A source of flat images that counts how often each is asked for."""

    skipped = ()

    def __init__(self, count=3, weights=None):
        self.count, self.weights, self.asked = count, weights or [1.0] * count, Counter()

    def __len__(self):
        return self.count

    def image(self, i):
        self.asked[i] += 1
        image = np.full((10, 14, 3), 20 * i, np.uint8)
        image[:, :7] += 5  # left and right differ
        return image

    def weight(self, i):
        return self.weights[i]


def epoch(order, number):
    return [order(n) for n in range(number * order.length, (number + 1) * order.length)]


@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 50), st.sampled_from([1.0, 0.1, 3.7]))
def test_equal_weights_mean_each_image_once(count, seed, number, weight):
    order = Order(np.full(count, weight), seed)
    assert sorted(epoch(order, number)) == list(range(count))


@given(st.lists(st.floats(0.05, 4), min_size=1, max_size=40), st.integers(0, 2**63))
def test_weights_are_respected(weights, seed):
    """In an epoch image i appears weight / largest weight times, rounded up or down."""
    order = Order(np.array(weights), seed)
    share = np.array(weights) / sum(weights) * order.length
    found = np.bincount(epoch(order, 3), minlength=len(weights))
    assert (found >= np.floor(share - 1e-9)).all() and (found <= np.ceil(share + 1e-9)).all()
    assert order.length == max(1, round(sum(weights) / max(weights)))


def test_weights_hold_in_the_long_run():
    order = Order(np.array([1.0, 0.5, 0.25]), 0)
    found = np.bincount([order(n) for n in range(8000)]) / 8000
    np.testing.assert_allclose(found, np.array([4, 2, 1]) / 7, atol=0.02)


def test_order_differs_by_epoch_and_seed_and_repeats():
    order = Order(np.ones(50), 1)
    assert epoch(order, 0) != epoch(order, 1) != epoch(Order(np.ones(50), 2), 1)
    again = Order(np.ones(50), 1)
    assert [again(n) for n in reversed(range(150))][::-1] == [order(n) for n in range(150)]  # in whatever order asked


def test_order_is_shuffled():
    """The mean distance of neighbours in a random permutation of n is (n + 1) / 3."""
    found = np.abs(np.diff(epoch(Order(np.ones(3000), 0), 0))).mean()
    assert found == pytest.approx(1000, rel=0.05)


def test_images_are_square_and_kept():
    source = Counted()
    data = Images(source, Data(path="somewhere", resolution=8))
    assert data[1].shape == (8, 8, 3) and data[1].dtype == np.uint8
    np.testing.assert_array_equal(data[2], images.fit(source.image(2), 8))
    assert len(data) == 3 and source.asked[1] == 1


def test_what_does_not_fit_into_memory_is_read_again(monkeypatch):
    monkeypatch.setattr("tinydiff.data.dataset.PIXEL_CACHE_BYTES", 3 * 8 * 8 * 3 - 1)
    source = Counted()
    data = Images(source, Data(path="somewhere", resolution=8))
    assert (data[1] == data[1]).all() and source.asked[1] == 2


def test_flip_adds_the_mirror_images():
    source = Counted(weights=[1.0, 2.0, 3.0])
    data = Images(source, Data(path="somewhere", resolution=8, flip=True))
    assert len(data) == 6 and data.weights().tolist() == [1, 2, 3, 1, 2, 3]
    np.testing.assert_array_equal(data[4], data[1][:, ::-1])
    assert (data[4] != data[1]).any() and source.asked[1] == 1


def test_sources_by_name(image_folder):
    shapes = open_source(Data(samples=5, resolution=16), seed=3)
    assert isinstance(shapes, ShapesSource) and (len(shapes), shapes.size, shapes.seed) == (5, 16, 3)
    folder = open_source(replace(Data(), path=str(image_folder), background="#000000"))
    assert isinstance(folder, FolderSource) and len(folder) == 12 and folder.background == "#000000"
