"""Buckets, order, weights and the images of a source."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydiff import images
from tinydiff.config import Data, load
from tinydiff.data.dataset import Images, Order, buckets, nearest, open_source
from tinydiff.data.folder import FolderSource
from tinydiff.data.shapes import ShapesSource
from tinydiff.diffusion.noise import keyed
from tinydiff.errors import DataError, UsageError


class Counted:
    """A source of flat images that counts how often each is asked for; `unreadable` are not there any more."""

    skipped = ()

    def __init__(self, count=3, weights=None, shapes=((14, 10),)):
        self.count, self.weights, self.asked = count, weights or [1.0] * count, Counter()
        self.shapes, self.unreadable, self.threads = shapes, set(), set()

    def __len__(self):
        return self.count

    def size(self, i):
        return self.shapes[i % len(self.shapes)]

    def image(self, i):
        self.asked[i] += 1
        self.threads.add(threading.get_ident())
        if i in self.unreadable:
            raise DataError(f"{self.identity(i)}: truncated; replace or remove the file")
        width, height = self.size(i)
        image = np.full((height, width, 3), 20 * i % 250, np.uint8)
        image[:, : width // 2] += 5  # left and right differ
        return image

    def identity(self, i):
        return f"{i}.png"

    def weight(self, i):
        return self.weights[i]


# ---- buckets ---------------------------------------------------------------------------------------------------------

AREAS = st.tuples(st.integers(1, 24), st.integers(1, 16), st.floats(1, 8))


@given(AREAS)
def test_buckets_keep_step_area_and_ratio(drawn):
    times, step, ratio = drawn
    side = times * step
    found = buckets(side, ratio, step)
    assert (side, side) in found and len(set(found)) == len(found)
    shapes = [w / h for w, h in found]
    assert all(a < b for a, b in pairwise(shapes)), "no two are of one shape"
    for w, h in found:
        assert w % step == h % step == 0 and w * h <= side**2 and max(w, h) <= ratio * min(w, h)
        assert w * (h + step) > side**2 or (w + step) * h > side**2, "as large as it can be in one direction"
        assert (h, w) in found


@given(AREAS)
def test_every_width_has_its_bucket(drawn):
    """Against a search over all pairs."""
    times, step, ratio = drawn
    side, found = times * step, buckets(times * step, ratio, step)
    for w in range(step, side**2 // step + 1, step):
        h = max(h for h in range(step, side**2 // step + 1, step) if w * h <= side**2 or h == step)
        if ratio > 1 and max(w, h) <= ratio * min(w, h) and w * h <= side**2:
            assert (w, h) in found


def test_buckets_by_hand():
    assert buckets(100, 1.0, 16) == [(100, 100)]
    wide = [(80, 48), (96, 32), (112, 32), (128, 32)]
    assert buckets(64, 4, 16) == [(h, w) for w, h in wide[::-1]] + [(64, 64)] + wide


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20))
def test_images_go_to_the_nearest_shape(shapes):
    sizes = buckets(128, 3, 16)
    found = nearest(sizes, *np.array(shapes).T)
    for (w, h), bucket in zip(shapes, found, strict=True):
        away = [abs(math.log(w / h) - math.log(a / b)) for a, b in sizes]
        assert away[bucket] <= min(away) + 1e-12


def test_between_two_shapes_the_narrower_is_taken():
    assert nearest([(1, 4), (4, 4)], np.array([50, 51, 49]), np.array([100, 100, 100])).tolist() == [0, 1, 0]


def test_only_buckets_in_use_are_listed():
    source = Counted(6, shapes=((100, 50), (50, 100), (64, 64)))
    data = Images(source, Data(path="x", resolution=32, max_aspect_ratio=4, bucket_step=8, flip=True))
    assert data.sizes == [(24, 40), (32, 32), (40, 24)]
    assert data.bucket.tolist() == [2, 0, 1] * 4
    for i in range(12):
        width, height = data.sizes[data.bucket[i]]
        expected = images.fit(source.image(i % 6), (width, height))
        np.testing.assert_array_equal(data[i], expected if i < 6 else expected[:, ::-1])
        assert data[i].shape == (height, width, 3)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["bucket_step=8", "max_aspect_ratio=1"], ""),  # which uses no step
        (["bucket_step=8"], "data.bucket_step: 8 does not divide data.resolution 36"),
        (["bucket_step=12"], ""),
        (["bucket_step=6"], "data.bucket_step: 6 is no multiple of 4, by which the networks reduce an image"),
        (["max_aspect_ratio=8.5"], "data.max_aspect_ratio: 8.5 is above 8"),
        (["bucket_step=513"], "data.bucket_step: 513 is above 512"),
    ],
)
@pytest.mark.parametrize("denoiser", ["unet", "dit"])
def test_buckets_fit_the_networks(settings, problem, denoiser):
    """Here the autoencoder halves once, and the U-Net once or the transformer's patches are of two."""
    networks = ["autoencoder.block_out_channels=[8,8]", f"denoiser.kind={denoiser}", "dit.patch_size=2"]
    keys = ["data.resolution=36", "data.max_aspect_ratio=2", "data.bucket_step=12"]
    overrides = [*networks, *keys, *(f"data.{text}" for text in settings)]
    if problem:
        with pytest.raises(UsageError, match=problem.replace(".", r"\.")):
            load(overrides=overrides)
    else:
        assert load(overrides=overrides).data.resolution == 36


# ---- order -----------------------------------------------------------------------------------------------------------


def streamed(order, start, count):
    """Elements of the stream, whatever the batches."""
    size = order.batch_size
    steps = range(start // size, -(-(start + count) // size))
    return np.concatenate([order(s) for s in steps])[start % size :][:count]


def epoch(order, number):
    length = order.streams[0].length
    return streamed(order, number * length, length).tolist()


def reference(weights, seed, n):
    """The n-th image by the definition, one at a time."""
    ends = np.cumsum(weights)
    length = max(1, round(float(ends[-1] / weights.max())))
    first = keyed(seed, "order", 0).random()
    rng = keyed(seed, "order", n // length)
    rng.random()
    points = (np.arange(length) + (first + n // length * (5**0.5 - 1) / 2) % 1) * (ends[-1] / length)
    return rng.permutation(np.minimum(np.searchsorted(ends, points, side="right"), len(ends) - 1))[n % length]


@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 50), st.sampled_from([1.0, 0.1, 3.7]))
def test_equal_weights_mean_each_image_once(count, seed, number, weight):
    order = Order(np.full(count, weight), seed, batch_size=1 + seed % 7)
    assert sorted(epoch(order, number)) == list(range(count))


@given(st.lists(st.floats(0.05, 4), min_size=1, max_size=40), st.integers(0, 2**63))
def test_weights_are_respected(weights, seed):
    """In an epoch image i appears weight / largest weight times, rounded up or down."""
    order = Order(np.array(weights), seed)
    share = np.array(weights) / sum(weights) * order.streams[0].length
    found = np.bincount(epoch(order, 3), minlength=len(weights))
    assert (found >= np.floor(share - 1e-9)).all() and (found <= np.ceil(share + 1e-9)).all()
    assert order.streams[0].length == max(1, round(sum(weights) / max(weights)))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.integers(0, 2**63))
def test_an_image_stays_within_a_few_draws_of_its_due_for_ever(weights, seed):
    """What one epoch rounds is made up for; independent epochs would be some twenty draws off after this many."""
    order, due = Order(np.array(weights), seed), np.array(weights) / sum(weights)
    length = order.streams[0].length * 1000
    found = streamed(order, 0, length)
    for count in (length // 7, length // 2, length):
        seen = np.bincount(found[:count], minlength=len(weights))
        assert (np.abs(seen - count * due) < 4.5).all()


@given(st.integers(0, 3), st.integers(1, 9), st.integers(0, 60))
def test_a_batch_is_a_piece_of_the_stream(seed, size, step):
    weights = np.array([1.0, 0.3, 2.0, 0.7, 0.7])
    found = Order(weights, seed, batch_size=size)(step)
    assert found.tolist() == [reference(weights, seed, n) for n in range(step * size, (step + 1) * size)]


def test_the_keyed_numbers_stay_what_they_were():
    """A run that is continued by a later version goes on where it was."""
    found = streamed(Order(np.ones(8), 3, batch_size=4), 0, 16).tolist()
    assert found == [2, 3, 4, 6, 1, 5, 0, 7, 2, 4, 3, 5, 1, 6, 7, 0]
    assert streamed(Order(np.array([1.0, 0.5, 0.25, 2.0]), 3), 0, 8).tolist() == [2, 3, 3, 0, 0, 3, 3, 1]


def test_order_differs_by_epoch_and_seed_and_repeats():
    order = Order(np.ones(50), 1)
    assert epoch(order, 0) != epoch(order, 1) != epoch(Order(np.ones(50), 2), 1)
    again = Order(np.ones(50), 1)
    assert [again(n)[0] for n in reversed(range(150))][::-1] == [order(n)[0] for n in range(150)]


def test_order_is_shuffled():
    """The mean distance of neighbours in a random permutation of n is (n + 1) / 3."""
    found = np.abs(np.diff(epoch(Order(np.ones(3000), 0), 0))).mean()
    assert found == pytest.approx(1000, rel=0.05)


@given(st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0]), min_size=1, max_size=20), st.integers(0, 99))
def test_no_weight_is_never_drawn(weights, seed):
    weights = np.array([*weights, 1.0, 0.0])
    found = streamed(Order(weights, seed, batch_size=3), 0, 100)
    assert set(found) == set(np.flatnonzero(weights))
    bucket = np.arange(len(weights)) % 2
    assert (weights[np.concatenate([Order(weights, seed, bucket, 3)(s) for s in range(40)])] > 0).all()


BUCKETS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@settings(deadline=None)
@given(BUCKETS, st.integers(0, 2**63), st.integers(1, 8), st.permutations(range(30)))
def test_buckets_by_random_access_are_the_sequence(bucket, seed, size, asked):
    weights, bucket = np.linspace(0.2, 1, len(bucket)), np.array(bucket)
    order = Order(weights, seed, bucket, size)
    sequence = [order(s).tolist() for s in range(30)]
    again = Order(weights, seed, bucket, size)
    assert {s: again(s).tolist() for s in asked} == dict(enumerate(sequence))
    assert all(len(set(bucket[batch])) == 1 and len(batch) == size for batch in sequence)


@settings(deadline=None)
@given(BUCKETS, st.integers(0, 2**63), st.integers(1, 8))
def test_each_bucket_is_shown_epoch_by_epoch(bucket, seed, size):
    """With equal weights the batches of a bucket, laid end to end, are permutations of its images."""
    bucket = np.array(bucket)
    order = Order(np.ones(len(bucket)), seed, bucket, size)
    shown = {int(b): [] for b in np.unique(bucket)}
    for s in range(4 * order.length):
        batch = order(s)
        shown[int(bucket[batch[0]])] += batch.tolist()
    for b, found in shown.items():
        members = np.flatnonzero(bucket == b).tolist()
        for start in range(0, len(found) - len(members) + 1, len(members)):
            assert sorted(found[start : start + len(members)]) == members


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.floats(0.01, 100)), min_size=1, max_size=8),
    st.integers(0, 2**63),
    st.sampled_from([1, 3, 64]),
    st.integers(0, 10**5),
)
def test_buckets_have_their_share_at_any_time(kinds, seed, size, number):
    """What is rounded is carried over: buckets of any size and weight are less than a batch off after any epoch."""
    bucket = np.repeat(np.arange(len(kinds)), [count for count, _ in kinds])
    weights = np.array([weight for _, weight in kinds])[bucket]
    order = Order(weights, seed, bucket, size)
    shares = np.bincount(bucket, weights) / weights.sum()
    for epoch in (0, 1, 2, number):
        first, last = (int(order.before(e).sum()) for e in (epoch, epoch + 1))
        steps = range(first, min(last, first + 30))
        assert [int(bucket[order(s)[0]]) for s in steps] == order.turns(epoch)[: len(steps)].tolist()
        batches = order.before(epoch) + np.bincount(order.turns(epoch), minlength=len(kinds))
        assert (np.abs(batches - (epoch + 1) * order.length * shares) < 1 + 1e-9).all()


def test_a_bucket_of_one_image_is_drawn_no_more_than_due():
    bucket = np.repeat([0, 1], [500, 1])
    order = Order(np.ones(501), 0, bucket, 64)
    drawn = np.bincount(np.concatenate([order(s) for s in range(20_000)]), minlength=501)
    assert drawn[500] / drawn[:500].mean() == pytest.approx(1, abs=0.03)


def test_epochs_of_buckets_are_shuffled():
    order = Order(np.ones(964), 5, np.repeat([0, 1, 2], [800, 160, 4]), 8)
    first, second = (order.turns(number).tolist() for number in (0, 1))
    assert first != second and first != sorted(first)


def test_buckets_are_shuffled_apart():
    """Two buckets of like images do not come in one and the same order."""
    order = Order(np.ones(200), 0, np.repeat([0, 1], 100), 100)
    first, second = (stream.take(0, 100) % 100 for stream in order.streams)
    assert first.tolist() != second.tolist()


def test_a_million_images_are_ordered_at_once():
    order = Order(np.ones(10**6), 0, np.arange(10**6) % 5, 64)
    assert len(np.unique(np.concatenate([order(s) for s in (0, 10**4, 10**5)]))) > 150


# ---- images ----------------------------------------------------------------------------------------------------------


def test_images_are_square_and_kept():
    source = Counted()
    data = Images(source, Data(path="somewhere", resolution=8))
    assert data[1].shape == (8, 8, 3) and data[1].dtype == np.uint8
    np.testing.assert_array_equal(data[2], images.fit(source.image(2), 8))
    assert len(data) == 3 and source.asked[1] == 1
    assert data.sizes == [(8, 8)] and data.bucket.tolist() == [0, 0, 0]


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
    assert data.names([1, 4, 5]) == ["1.png", "1.png", "2.png"]


@pytest.mark.parametrize("cached", [True, False])
def test_a_batch_is_its_images(monkeypatch, cached):
    monkeypatch.setattr("tinydiff.data.dataset.THREADS", 4)
    monkeypatch.setattr("tinydiff.data.dataset.PIXEL_CACHE_BYTES", 10**6 if cached else 0)
    source = Counted(40)
    data = Images(source, Data(path="somewhere", resolution=8, flip=True))
    chosen = np.array([3, 50, 7, 3, 79])
    batch = data.batch(chosen)
    assert batch.dtype == np.uint8 and threading.get_ident() not in source.threads
    np.testing.assert_array_equal(batch, np.stack([data[i] for i in chosen]))


def test_no_thread_is_made_for_what_is_kept(monkeypatch):
    monkeypatch.setattr("tinydiff.data.dataset.THREADS", 4)
    data = Images(Counted(4), Data(path="somewhere", resolution=8))
    assert all(data[i].any() for i in range(4)) and len(data.batch([0, 1, 2, 3])) == 4
    assert not data.pool._threads


def test_many_threads_may_ask(monkeypatch):
    monkeypatch.setattr("tinydiff.data.dataset.THREADS", 3)
    source = Counted(30)
    source.unreadable = {4, 5}
    data, found = Images(source, Data(path="somewhere", resolution=8, max_bad_fraction=0.1)), []
    threads = [threading.Thread(target=lambda: found.append(data.batch(range(30)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all((each == found[0]).all() for each in found) and set(data.broken) == {4, 5}


def broken_data(**changes):
    source = Counted(12, shapes=((64, 64), (100, 50)))  # even ones are square
    settings = {"resolution": 32, "max_aspect_ratio": 4.0, "bucket_step": 8, "max_bad_fraction": 0.5, "flip": True}
    return source, Images(source, Data(path="somewhere", **(settings | changes)))


def test_the_next_of_its_bucket_stands_for_what_cannot_be_read():
    source, data = broken_data()
    source.unreadable = {2, 4, 11}
    expected = [data[i] for i in (6, 6, 8, 18)]
    np.testing.assert_array_equal(data.batch([2, 4, 8, 14]), np.stack(expected))  # 14 is 2 mirrored
    np.testing.assert_array_equal(data.batch([11]), data[1][None])  # after the last comes the first
    assert data.broken == {i: f"{i}.png: truncated" for i in (2, 4, 11)}
    source.unreadable = set()
    np.testing.assert_array_equal(data.batch([2])[0], data[6])  # once and for all


def test_the_image_itself_says_that_it_cannot_be_read():
    source, data = broken_data()
    source.unreadable = {3}
    with pytest.raises(DataError, match=r"3\.png: truncated"):
        data[3]
    pixels, readable = data.read([1, 3])
    assert readable.tolist() == [True, False] and not pixels[1].any() and pixels[0].any()


def test_too_many_broken_images_are_an_error():
    source, data = broken_data(max_bad_fraction=0.25)
    source.unreadable = set(range(12))
    with pytest.raises(DataError, match=r"4 of 12 images, over the allowed 0\.25: .*\.png: truncated.*max_bad"):
        data.batch([0, 2, 4, 6])


def test_a_bucket_without_readable_images_is_an_error():
    source, data = broken_data(max_bad_fraction=1.0)
    source.unreadable = {0, 2, 4, 6, 8, 10}
    with pytest.raises(DataError, match=r"0\.png: truncated; nor can any other image of 32x32"):
        data.batch([0])


def test_sources_by_name(image_folder):
    shapes = open_source(Data(samples=5, resolution=16), seed=3)
    assert isinstance(shapes, ShapesSource) and (len(shapes), shapes.resolution, shapes.seed) == (5, 16, 3)
    assert shapes.image(0).shape == (16, 16, 3)
    folder = open_source(replace(Data(), path=str(image_folder), background="#000000"))
    assert isinstance(folder, FolderSource) and len(folder) == 12 and folder.background == "#000000"
