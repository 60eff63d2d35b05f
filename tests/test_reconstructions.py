"""The script that compares reconstructions: a row a folder and size, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_emoji import load

reconstructions = load("reconstructions")


def test_a_row_for_each_size_that_there_are_images_of(
    tiny_model: Path, image_folder: Path, tmp_path: Path, capsys
) -> None:
    words = [str(tiny_model), str(image_folder), "--sizes", "8", "16", "64", "--picture", str(tmp_path / "seen.png")]
    assert reconstructions.main(words) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [[image_folder.name, size, "12"] for size in ("8", "16")]
    assert np.isfinite([float(value) for row in rows for value in row[3:]]).all()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({0: "nowhere"}, 4, "nowhere: holds no autoencoder"),
        ({0: ""}, 2, "the autoencoder's name is empty"),
        ({1: "nowhere"}, 3, "nowhere: no such folder"),
        ({3: "15"}, 2, "multiples of 2 pixels"),
        ({3: "0"}, 2, "multiples of 2 pixels"),
        ({5: "0"}, 2, "give 1 or more"),
        ({1: "broken"}, 3, "a.png: cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    change: dict[int, str],
    code: int,
    says: str,
    tiny_model: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys,
    monkeypatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    words = [str(tiny_model), str(image_folder), "--sizes", "16", "--count", "3"]
    assert reconstructions.main([change.get(i, word) for i, word in enumerate(words)]) == code
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and says in told


def test_small_images_are_left_out_unread(tmp_path: Path) -> None:
    for size in (8, 24, 40):
        Image.new("RGBA", (size, size + 4), (255, 0, 0, 0)).save(tmp_path / f"{size}.png")
    found = reconstructions.pictures(tmp_path, 16, 64)
    assert found.shape == (2, 16, 16, 3) and (found == 255).all()  # transparent is white
