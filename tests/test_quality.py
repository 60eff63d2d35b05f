"""What feature networks make of drawings beside the data: known models, a network of block means, and EfficientNet-Lite0."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import SIDE, Painter, by_caption, noise, request, write

from tinydiff import cli, evaluate
from tinydiff.data import shapes
from tinydiff.data.folder import FolderSource
from tinydiff.errors import ModelError, UsageError
from tinydiff.measure import distances, networks
from tinydiff.measure.features import open_features
from tinydiff.measure.quality import View, real_vectors


class Means:
    """A "network" whose vectors are block means; every batch that it sees is counted."""

    compares = True

    def __init__(self, digest: str = "0", logits: bool = True):
        self.digest, self.logits, self.looked = digest, logits, 0

    def called(self, measure: str) -> str:
        return {"frechet": "OFFICIAL"}.get(measure, f"{measure}_means")

    def seen(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        self.looked += len(images)
        x = images.reshape(len(images), 2, SIDE // 2, 2, SIDE // 2, 3).mean((2, 4)).reshape(len(images), -1) / 255
        return x.astype(np.float32), x * 20 if self.logits else None

    def distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(a - b).mean((1, 2, 3))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tinydiff" / "features"


def run(backend: Painter, *data: Path | str, network: object = None, count: int = 100, side: int = SIDE) -> list[dict]:
    def opened() -> list:
        return [network or Means()]

    return evaluate.evaluate(
        backend,
        request(side),
        [str(d) for d in data],
        count,
        0,
        7,
        side,
        open_networks=opened,  # type: ignore[arg-type]
    )


def test_figures_are_those_of_distances_and_named_after_the_network(tmp_path: Path) -> None:
    folder, other = write(tmp_path / "a", noise(40)), by_caption(write(tmp_path / "b", noise(40, 1)))
    drawn = dict(zip(by_caption(folder), other.values(), strict=True))
    [row] = run(Painter(drawn), folder)
    real, fake = (Means().seen(np.stack(list(p.values())))[0] for p in (by_caption(folder), drawn))
    assert row["OFFICIAL"] == pytest.approx(distances.frechet(real, fake))
    assert (row["precision_means"], row["recall_means"]) == tuple(
        p.mean() for p in distances.precision_recall(real, fake)
    )
    assert row["copies_means"] == distances.copies(fake, real)[0].mean()
    assert row["reconstruction_perceptual_means"] == pytest.approx(0, abs=1e-6)
    assert row["inception_means"] > 1 and row["deviations"]["kernel_means"] > 0
    bounded = {"OFFICIAL", "inception_means", "precision_means", "recall_means", "copies_means", "nearest_top1"}
    for name in bounded:
        assert row["intervals"][name]["low"] <= row[name] <= row["intervals"][name]["high"]
    assert json.loads(json.dumps(row)) == row
    text = evaluate.line(row).splitlines()
    assert [line.split()[0] for line in text[1:]][:3] == ["reconstruction_perceptual_means", "OFFICIAL", "kernel_means"]
    assert f"OFFICIAL {row['OFFICIAL']:.4g} (" in " ".join(text[2].split())


def test_who_remembers_copies_and_who_draws_anew_does_not(tmp_path: Path) -> None:
    """Pictures of a few numbers, so that many are near another; a model that draws the data, and one that draws its like."""

    def pictures(seed: int) -> list[np.ndarray]:
        coarse = np.random.default_rng(seed).integers(0, 256, (200, 2, 2, 3), dtype=np.uint8)
        return [np.kron(c, np.ones((SIDE // 2, SIDE // 2, 1), np.uint8)) for c in coarse]

    folder = write(tmp_path / "a", pictures(0))
    own = by_caption(folder)
    anew = dict(zip(own, pictures(1), strict=True))
    same, new = (run(Painter(p), folder, count=200)[0] for p in (own, anew))
    assert (same["copies_means"], same["precision_means"], same["recall_means"]) == (1, 1, 1)
    assert same["OFFICIAL"] == pytest.approx(0, abs=1e-9) and same["copies_z_means"] < -10
    assert new["copies_means"] < 0.12 and abs(new["copies_z_means"]) < 4 and new["precision_means"] > 0.5
    assert new["intervals"]["OFFICIAL"]["low"] > 0
    heldout = write(tmp_path / "b", pictures(1), [f"new {i}" for i in range(200)])
    copied = dict(zip(by_caption(heldout), own.values(), strict=True))  # its captions get pictures of the first folder
    rows = run(Painter(own | copied), folder, heldout, count=200)
    assert [row["copies_means"] for row in rows] == [1, 1]
    assert rows[1]["OFFICIAL"] > 0


def test_few_pictures_have_no_distances_between_sets(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(9))
    [row] = run(Painter(by_caption(folder)), folder)
    assert "OFFICIAL" not in row and "reconstruction_perceptual_means" in row
    [row] = run(Painter(by_caption(write(tmp_path / "b", noise(10)))), tmp_path / "b", network=Means(logits=False))
    assert "OFFICIAL" in row and "inception_means" not in row and "of_real" not in row


def test_of_real_is_what_as_many_real_pictures_have(tmp_path: Path) -> None:
    """Near what drawings of the same kind have: the figure's bias."""
    folder = write(tmp_path / "a", noise(200))
    drawn = dict(zip(by_caption(folder), noise(40, 1), strict=False))
    view = View(Means(), SIDE)  # type: ignore[arg-type]
    view.add(0, np.stack(list(drawn.values())))
    real = Means().seen(np.stack(list(by_caption(folder).values())))[0]
    row = view.row(real, None, 0)
    assert row["of_real"]["OFFICIAL"] == pytest.approx(row["OFFICIAL"], rel=0.3)
    assert "copies_means" not in row


def test_real_pictures_are_seen_once(tmp_path: Path, home: Path) -> None:
    folder = write(tmp_path / "a", noise(12))

    def vectors(network: Means, resolution: int = SIDE, background: str = "#ffffff") -> np.ndarray:
        told: list[tuple[int, int]] = []
        source = FolderSource(folder)
        got = real_vectors(network, source, background, resolution, 0, lambda *at: told.append(at))  # type: ignore[arg-type]
        assert network.looked == (told[-1][1] if told else 0)
        return got

    first = vectors(one := Means())
    assert one.looked == 12 and len(list(home.glob("features-*.safetensors"))) == 1
    assert np.array_equal(vectors(again := Means()), first) and again.looked == 0
    for changed, network in (({}, Means("1")), ({"background": "#000000"}, Means())):
        vectors(network, **changed)
        assert network.looked == 12
    Image.fromarray(noise(1, 5)[0]).save(folder / "003.png")
    changed = Means()
    assert not np.array_equal(vectors(changed), first) and changed.looked == 12
    for path in home.iterdir():  # cut off: computed anew
        path.write_bytes(path.read_bytes()[:100])
    again = Means()
    assert not np.array_equal(vectors(again), first) and again.looked == 12


def test_shapes_have_real_pictures_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinydiff.measure.oracle.REAL", 60)
    captions = shapes.held_out_captions(30, 0)
    drawn = {c: shapes.render(shapes.parse(c), np.random.default_rng(i), SIDE) for i, c in enumerate(captions)}
    [row] = run(Painter(drawn), "shapes", count=30)
    noisy = dict(zip(captions, noise(30), strict=True))
    [worse] = run(Painter(noisy), "shapes", count=30)
    assert 0 < row["OFFICIAL"] < 3 * row["of_real"]["OFFICIAL"] < worse["OFFICIAL"] / 5
    assert "copies_means" not in row and "wholly right" in evaluate.line(row)


def test_frechet_of_real_features_of_halves_and_shifted_pictures() -> None:
    """By EfficientNet-Lite0: halves of a set of pictures are nearer than anything changed, and more change is farther."""
    source, network = shapes.ShapesSource(32, 0, 32), open_features()
    one, other = np.split(np.stack([source.image(i) for i in range(32)]), 2)
    sets = [other, *(np.clip(other.astype(int) - shift, 0, 255).astype(np.uint8) for shift in (40, 80, 160))]
    known = distances.gaussian(network.seen(one)[0])
    found = [distances.frechet(known, network.seen(each)[0]) for each in sets]
    assert found == sorted(found) and found[-1] > 1.5 * found[0] > 0


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """A function (words) -> (exit code, stdout, stderr) of `tinydiff evaluate`."""

    def main(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tinydiff", "evaluate", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capfd.readouterr()  # type: ignore[return-value]

    return main


def test_the_command_uses_the_package(command: Callable[..., tuple], tiny_model: Path, image_folder: Path) -> None:
    words = (tiny_model, "--data", image_folder, "--count", "12", "--steps", "2", "--json")
    code, out, error = command(*words)
    row = json.loads(out)
    assert code == 0 and "looking at the data 12/12" in error
    name = networks.DEFAULT
    for measure in ("frechet", "kernel", "precision", "recall", "inception", "copies", "reconstruction_perceptual"):
        assert np.isfinite(row[f"{measure}_{name}"])
    code, out, error = command(*words[:-1], "--features", "none")
    assert (code, out.count("\n")) == (0, 1) and name not in out + error


def test_without_the_package_the_rest_is_measured(
    command: Callable[..., tuple], tiny_model: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    words = (tiny_model, "--data", image_folder, "--count", "2", "--steps", "1")
    code, out, error = command(*words)
    assert (code, out.count("\n")) == (0, 1) and "SSIM" in out
    assert error.count("tinydiff[features]") == 1
    code, out, error = command(*words, "--features", networks.DEFAULT)
    assert (code, out, error.count("\n")) == (2, "", 1) and "tinydiff[features]" in error


def test_what_is_no_network_is_refused_before_anything_is_drawn(
    command: Callable[..., tuple], tiny_model: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    monkeypatch.setattr("tinydiff.pipeline.generate", None)
    for given, error in (
        ("other.pth", "not a feature network"),
        ("none.pth", "no such file"),
        ("a.pth,b.pth", "a.pth"),
    ):
        code, out, told = command(tiny_model, "--data", image_folder, "--features", tmp_path / given)
        assert (code, out, told.count("\n")) == (4, "", 1) and error in told


@pytest.mark.parametrize("words", [("--data", ""), ("--data", "shapes", "--features", "")])
def test_a_name_that_is_empty_is_refused(command: Callable[..., tuple], words: tuple[str, ...]) -> None:
    """As that of a variable that is not set would be: neither the current folder nor the default."""
    code, out, error = command(*words)
    assert (code, out, error.count("\n")) == (2, "", 1) and "the name is empty" in error and words[-2] in error


def test_networks_whose_figures_would_have_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "copy.pth").write_bytes(networks.packaged(networks.DEFAULT).read_bytes())
    with pytest.raises(UsageError, match="--features: two networks are efficientnet-lite0"):
        evaluate.open_networks([networks.DEFAULT, str(tmp_path / "copy.pth")], "cpu")


@pytest.mark.parametrize(("there", "asked", "said"), [(4, 12, "has 4 images"), (4, 4, "fewer than 10"), (12, 12, "")])
def test_what_few_images_leave_out_is_said(
    there: int, asked: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "few", noise(there))
    [row] = run(Painter(by_caption(folder)), folder, count=asked)
    told = capsys.readouterr().err
    assert row["images"] == min(there, asked) and said in told
    assert told.count("note: ") == told.count("few: ") == (there < asked) + (there < 10)


def test_wanted_networks(tmp_path: Path) -> None:
    assert networks.wanted([]) == [networks.DEFAULT] and networks.wanted(["none"]) == []
    path = tmp_path / "a,b.pth"
    path.write_text("")
    assert networks.find(str(path)) == [path] and networks.wanted([str(path)]) == [str(path)]
    with pytest.raises(UsageError, match="name its file"):
        networks.wanted(["inception"])
    with pytest.raises(ModelError, match="no such file"):
        networks.wanted([""] + [str(tmp_path)])
