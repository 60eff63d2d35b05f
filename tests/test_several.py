"""Several folders as one source: against each by itself."""

from __future__ import annotations

import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinydiff.config import Data
from tinydiff.data.dataset import Images, Order, open_source
from tinydiff.data.folder import FolderSource
from tinydiff.errors import DataError

COUNTS = {"photos": 4, "10_hens": 2, "2_dogs": 3}


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """Folders of COUNTS images, the last of them in a shard; one image of the first has no caption."""
    for number, (name, count) in enumerate(COUNTS.items()):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (8, 8), (number, i, 0)).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}\nsecond")
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "bare.png")
    (tmp_path / "2_dogs").rename(tmp_path / "dogs")
    (tmp_path / "2_dogs").mkdir()
    with tarfile.open(tmp_path / "2_dogs" / "0.tar", "w") as tar:
        tar.add(tmp_path / "dogs", ".")
    return [str(tmp_path / name) for name in COUNTS]


def test_images_follow_each_other(places: list[str]) -> None:
    source, parts = open_source(Data(path=tuple(places))), [open_source(Data(path=place)) for place in places]
    assert len(source) == 9
    rows = [(number, inside) for number, part in enumerate(parts) for inside in range(len(part))]
    for i, (number, inside) in enumerate(rows):
        part = parts[number]
        assert source.captions(i) == part.captions(inside) and source.digest(i) == part.digest(inside)
        assert source.identity(i) == f"{places[number]}/{part.identity(inside)}"
        assert np.array_equal(source.image(i), part.image(inside)) and source.size(i) == (8, 8)
    assert [source.weight(i) for i in range(9)] == [1.0] * 4 + [10.0] * 2 + [2.0] * 3
    assert source.skipped == [(f"{places[0]}/bare.png", "no caption file")]
    ends = ("file)", ", drawn 10 times as often", ", drawn 2 times as often")
    assert all(line.endswith(end) for line, end in zip(source.report().splitlines(), ends, strict=True))


def test_repeats_are_how_often_images_are_drawn(places: list[str]) -> None:
    data = Data(path=tuple(places), resolution=8)
    order = Order(Images(open_source(data), data).weights(), 0)
    counts = Counter(int(i) for step in range(300) for i in order(step))
    assert all(abs(counts[i] - 300 * weight / 30) <= 3 for i, weight in enumerate([1] * 4 + [10] * 2 + [2] * 3))


def test_the_fingerprint_follows_parts_and_repeats(places: list[str], tmp_path: Path) -> None:
    both = [open_source(Data(path=tuple(order))).fingerprint() for order in (places, places[::-1], places[:2])]
    assert len(set(both)) == 3 and open_source(Data(path=tuple(places))).fingerprint() == both[0]
    (tmp_path / "10_hens").rename(tmp_path / "5_hens")
    assert open_source(Data(path=(places[0], str(tmp_path / "5_hens"), places[2]))).fingerprint() != both[0]
    alone = open_source(Data(path=(places[0],)))
    assert isinstance(alone, FolderSource) and alone.fingerprint() == FolderSource(places[0]).fingerprint()


def test_captions_are_worded_and_one_that_is_missing_is_named(places: list[str]) -> None:
    data = Data(path=tuple(places), prefix="a stamp: ", suffix=".", max_captions=1)
    source = open_source(data)
    assert source.captions(0) == ["a stamp: photos 0."] and source.captions(8) == ["a stamp: 2_dogs 2."]
    one = open_source(replace(data, path=places[0]))
    assert one.captions(1) == ["a stamp: photos 1."] and one.identity(1) == "1.png"
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_source(Data(path=(places[0], "nowhere")))
