"""The script that cuts patches: what it writes is a function of its arguments, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_emoji import load

patches = load("patches")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures: small, wide, and partly transparent."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for name, shape in {"a": (10, 9, 3), "b": (40, 90, 3), "c": (70, 50, 4)}.items():
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{name}.png")
    return folder


def test_as_many_as_asked_and_the_same_again(photos: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert patches.main([str(tmp_path / name), f"{photos}=7", "textures=3", "--size", "16"]) == 0
    one, two = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in tmp_path.glob(f"{n}/*/*")} for n in ("one", "two")
    )
    assert one == two and len([path for path in one if path.parent.name == "photos"]) == 7 == len(one) - 3
    assert all(Image.open(tmp_path / "one" / path).size == (16, 16) for path in one)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (lambda photos: ["photos"], 2, "give SOURCE=COUNT"),
        (lambda photos: [f"{photos}=many"], 2, "give SOURCE=COUNT"),
        (lambda photos: [f"{photos}=0"], 2, "give SOURCE=COUNT"),
        (lambda photos: [f"{photos}=-3"], 2, "give SOURCE=COUNT"),
        (lambda photos: ["=3"], 2, "give SOURCE=COUNT"),
        (lambda photos: [f"{photos}=3", "--size", "0"], 2, "--size 0"),
        (lambda photos: [f"{photos}=3", f"{photos}/../photos=2"], 2, "one name"),
        (lambda photos: ["/=3"], 2, "exists"),
        (lambda photos: [f"{photos.parent}/nowhere=3"], 3, "nowhere: holds no images"),
        (lambda photos: [f"{photos / 'a.png'}=3"], 3, "a.png: holds no images"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_is_written(
    words: Callable[[Path], list[str]], code: int, says: str, photos: Path, tmp_path: Path, capsys
) -> None:
    (out := tmp_path / "out").mkdir()
    assert patches.main([str(out), *words(photos)]) == code
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and says in told and not list(out.iterdir())


def test_what_is_there_is_kept_and_a_broken_picture_named(photos: Path, tmp_path: Path, capsys) -> None:
    kept = tmp_path / "out" / "photos" / "mine.png"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"mine")
    assert patches.main([str(tmp_path / "out"), f"{photos}=3"]) == 2
    assert "exists" in capsys.readouterr().err and [*kept.parent.iterdir()] == [kept]
    (photos / "b.png").write_bytes(b"broken")
    assert patches.main([str(tmp_path / "new"), f"{photos}=3", "--size", "16"]) == 3
    assert "b.png: cannot be read" in capsys.readouterr().err
