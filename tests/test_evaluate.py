"""Scores of a model: fake backends that draw known pictures, and brute force beside every number."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreters import run_without
from PIL import Image

from tinydiff import config, evaluate, images, pipeline
from tinydiff.data import shapes
from tinydiff.data.folder import FolderSource
from tinydiff.diffusion.schedules import SCHEDULES, sampling_levels
from tinydiff.errors import DataError, UsageError
from tinydiff.measure.intervals import NORMAL_95, resampled, wilson
from tinydiff.measure.oracle import READINGS
from tinydiff.measure.reconstruction import reconstruction
from tinydiff.measure.retrieval import block_sums, choose
from tinydiff.networks.network import HIDDEN, Array

SIDE = 16


class Painter:
    """A backend whose "network" remembers pictures by caption: latents are pixels, 3 channels, factor 1."""

    name, at_once = "painter", 1

    def __init__(self, pictures: dict[str, np.ndarray], side: int = SIDE, error: float = 0.0):
        self.pictures, self.error, self.asked = pictures, error, []
        self.description = SimpleNamespace(
            path=Path("nowhere"),
            schedule=SCHEDULES["flow"](10),
            levels=lambda sampler, steps, spacing: sampling_levels(SCHEDULES["flow"](10), steps, spacing),
            prediction="sample",
            told_guidance=False,
            given={},
            spared=frozenset(),
            zero_empty=False,
            latent_channels=3,
            in_channels=3,
            factor=1,
            multiple=8,
            scaling_factor=1.0,
            size=side,
            generate=config.Generate(),
            conditions={"encoder_hidden_states": Array(("batch", "sequence", 3 * side * side), of=HIDDEN)},
        )
        self.tokenizers = {"text_encoder": self}

    def cut(self, text: str) -> str:
        return ""

    def encode(self, texts: list[str]) -> np.ndarray:
        self.texts = texts
        return np.arange(len(texts))[:, None]

    def encode_text(self, ids: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.asked += self.texts
        vectors = [images.to_pixels(self.pictures[text]).reshape(1, -1) for text in self.texts]
        return {"encoder_hidden_states": np.stack(vectors)}

    def denoise(self, x: np.ndarray, t: float, condition: dict[str, np.ndarray]) -> np.ndarray:
        return condition["encoder_hidden_states"].reshape(x.shape)

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return np.concatenate([pixels, np.full_like(pixels, 7.0)], axis=1)

    def decode(self, z: np.ndarray) -> np.ndarray:
        return z + np.float32(self.error)


def request(side: int = SIDE) -> pipeline.Request:
    return pipeline.Request(steps=1, cfg_scale=1.0, sampler="ddim", spacing="trailing", width=side, height=side)


def run(
    backend: Painter, *data: Path | str, count: int = 100, seed: int = 0, batch: int = 7, side: int = SIDE, **more
) -> list[dict]:
    return evaluate.evaluate(backend, request(side), [str(d) for d in data], count, seed, batch, side, **more)  # type: ignore[arg-type]


def write(folder: Path, pictures: list[np.ndarray], captions: list[str] | None = None) -> Path:
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(captions[i] if captions else f"{folder.name} {i}")
    return folder


def noise(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8))


def by_caption(folder: Path) -> dict[str, np.ndarray]:
    source = FolderSource(folder)
    return {source.captions(i)[0]: source.image(i) for i in range(len(source))}


# ---- folders -------------------------------------------------------------------------------------------------------


def test_a_model_that_remembers_every_picture_scores_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(20))
    [row] = run(Painter(by_caption(folder)), folder)
    assert (row["data"], row["images"], row["candidates"]) == (str(folder), 20, 20)
    assert row["nearest_top1"] == row["nearest_top5"] == 1.0
    assert row["intervals"]["nearest_top1"]["high"] == 1.0
    assert json.loads(json.dumps(row)) == row


def brute_force(pictures: dict[str, np.ndarray], drawn: dict[str, np.ndarray], best: int) -> float:
    """Share of drawings whose own picture is among the `best` by plain loops over 4x4 means."""

    def small(image: np.ndarray) -> np.ndarray:
        h, w = image.shape[0] // 4, image.shape[1] // 4
        return np.array(
            [[image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean((0, 1)) for x in range(w)] for y in range(h)]
        )

    reduced, right = {name: small(picture) for name, picture in pictures.items()}, 0
    for caption, image in drawn.items():
        mine = small(image)
        distance = {name: np.linalg.norm(mine - picture) for name, picture in reduced.items()}
        right += caption in sorted(distance, key=distance.__getitem__)[:best]
    return right / len(drawn)


@pytest.mark.parametrize("seed", [1, 2])
def test_shares_equal_brute_force_over_two_folders(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folders = [write(tmp_path / name, noise(30, seed + n)) for n, name in enumerate("ab")]
    pictures = by_caption(folders[0]) | by_caption(folders[1])
    mixed = {}
    for caption, image in pictures.items():  # half-way to some other picture, so that some are found and some are not
        other = list(pictures.values())[rng.integers(len(pictures))]
        share = rng.uniform(0.2, 0.8)
        mixed[caption] = (share * image + (1 - share) * other).astype(np.uint8)
    rows = run(Painter(mixed), *folders, batch=4)
    for row, folder in zip(rows, folders, strict=True):
        drawn = {caption: mixed[caption] for caption in by_caption(folder)}
        assert row["candidates"] == 60
        assert 0 < row["nearest_top1"] < 1
        assert row["nearest_top1"] == brute_force(pictures, drawn, 1)
        assert row["nearest_top5"] == brute_force(pictures, drawn, 5)


def test_a_shuffled_model_finds_what_was_not_moved(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(20))
    pictures = by_caption(folder)
    names = list(pictures)
    shuffled = names[3:5] + names[2:3] + names[:2] + names[5:]  # 4 moved
    [row] = run(Painter({a: pictures[b] for a, b in zip(names, shuffled, strict=True)}), folder)
    assert row["nearest_top1"] == 16 / 20


def test_equal_block_means_are_a_tie_and_a_tie_is_found(tmp_path: Path) -> None:
    pictures = noise(6)
    twin = pictures[0].reshape(4, 4, 4, 4, 3)[:, ::-1, :, ::-1].reshape(SIDE, SIDE, 3)  # turned inside every block
    assert not np.array_equal(twin, pictures[0])
    folder = write(tmp_path / "a", [*pictures, twin, *([pictures[0]] * 7)])
    [row] = run(Painter(by_caption(folder)), folder)
    assert row["nearest_top1"] == 1.0


def test_images_with_one_caption_are_all_right_for_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(6), ["one", "two", "one", "two", "one", "two"])
    source = FolderSource(folder)
    for count, drawn in ((2, 2), (5, 5), (100, 6)):  # each caption once before any comes again
        [row] = run(Painter({"one": source.image(0), "two": source.image(2)}), folder, count=count)
        captions = [source.captions(i)[0] for i in choose(source, count, 0)]
        assert (row["images"], row["candidates"]) == (drawn, 6) and set(captions[:2]) == {"one", "two"}
        assert row["nearest_top1"] == captions.count("one") / drawn


def test_a_folder_given_twice_holds_its_images_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(5))
    rows = run(Painter(by_caption(folder)), folder, folder / ".." / folder.name)
    assert [row["candidates"] for row in rows] == [5, 5]


def test_the_choice_is_seeded_distinct_and_spread(tmp_path: Path) -> None:
    source = FolderSource(write(tmp_path / "a", noise(30), [f"c{i % 20}" for i in range(30)]))
    first = choose(source, 8, 0)
    assert first == choose(source, 8, 0) != choose(source, 8, 1)
    assert len({source.captions(i)[0] for i in first}) == 8
    assert choose(source, 12, 0)[:8] == first
    assert len({source.captions(i)[0] for i in choose(source, 20, 0)}) == 20
    assert sorted(choose(source, 99, 0)) == list(range(30)) and choose(source, 25, 0) == choose(source, 99, 0)[:25]


def test_pictures_are_fitted_and_seeds_count_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = [np.asarray(Image.fromarray(image).resize((40, 60), Image.Resampling.NEAREST)) for image in noise(6)]
    folder = write(tmp_path / "a", large)
    source, seeds, plain = FolderSource(folder), [], pipeline.generate
    monkeypatch.setattr(pipeline, "generate", lambda b, c, s, r: (seeds.extend(s), plain(b, c, s, r))[1])
    fitted = {source.captions(i)[0]: images.fit(source.image(i), SIDE) for i in range(6)}
    heard: list[tuple[int, int]] = []
    [row] = run(
        Painter(fitted), folder, count=5, seed=40, batch=2, progress=lambda done, total: heard.append((done, total))
    )
    assert row["nearest_top1"] == 1.0
    assert seeds == [40, 41, 42, 43, 44]
    assert heard == [(2, 5), (4, 5), (5, 5)]


def test_the_models_own_background_counts(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)).save(folder / "0.png")
    (folder / "0.txt").write_text("nothing")
    (tmp_path / "tinydiff.toml").write_text('[data]\nbackground = "#336699"\n')
    backend = Painter({"nothing": np.zeros((SIDE, SIDE, 3), np.uint8)})
    backend.description.path = tmp_path
    subject = evaluate.open_subject(config.Data(path=str(folder), resolution=SIDE), 1, 0)
    assert (next(subject.originals(1)) == 255).all()
    own = evaluate.open_subject(
        config.load(tmp_path / "tinydiff.toml", [f"data.path='{folder}'", f"data.resolution={SIDE}"]).data, 1, 0
    )
    assert (next(own.originals(1)) == (0x33, 0x66, 0x99)).all()
    assert evaluate.data_settings(tmp_path).background == "#336699"
    assert evaluate.data_settings(folder) == config.Data()


@given(st.integers(1, 3), st.integers(4, 13), st.integers(4, 13), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_block_sums_are_sixteen_times_pils_reduction(count: int, h: int, w: int, seed: int) -> None:
    batch = np.random.default_rng(seed).integers(0, 256, (count, 4 * h, 4 * w, 3), dtype=np.uint8)
    ours = block_sums(batch).reshape(count, h, w, 3) / 16
    theirs = np.stack([np.asarray(Image.fromarray(image).reduce(4)) for image in batch])
    assert np.abs(ours - theirs).max() <= 0.5  # PIL rounds
    assert block_sums(np.full((1, 4 * h - 1, 4 * w - 3, 3), 9, np.uint8)).tolist() == [[144.0] * (h * w * 3)]


# ---- shapes --------------------------------------------------------------------------------------------------------


def test_shapes_drawn_as_asked_are_read_wholly_right() -> None:
    captions = shapes.held_out_captions(30, 3)
    drawn = {c: shapes.render(shapes.parse(c), np.random.default_rng(5), 32) for c in captions}
    backend = Painter(drawn, 32)
    [row] = run(backend, "shapes", count=30, seed=3, side=32)
    assert all(row[name] == 1.0 for name in READINGS)
    assert (row["data"], row["images"]) == ("shapes", 30)
    assert backend.asked == captions and all(shapes.held_out(c) for c in captions)


def test_all_is_colours_shapes_and_relation_not_sizes() -> None:
    captions = shapes.held_out_captions(20, 0)
    swap = {"small": "large", "large": "small"}
    drawn = {}
    for i, caption in enumerate(captions):
        scene = shapes.parse(caption)
        if (scene.first.colour, scene.first.shape) == (scene.second.colour, scene.second.shape):
            pass  # nothing but the size tells the two apart: leave it right
        elif i % 4 == 0:
            scene = shapes.Scene(
                shapes.Item(swap[scene.first.size], scene.first.colour, scene.first.shape), scene.relation, scene.second
            )
        elif i % 4 == 1:
            scene = shapes.Scene(scene.first, shapes.MIRRORED[scene.relation], scene.second)
        drawn[caption] = shapes.render(scene, np.random.default_rng(i), 32)
        drawn[caption] = np.full_like(drawn[caption], 255) if i % 4 == 2 else drawn[caption]
    [row] = run(Painter(drawn, 32), "shapes", count=20, side=32)
    parts = [shapes.matches(caption, image) for caption, image in drawn.items()]
    for name in ("colours", "shapes", "relation", "sizes"):
        assert row[name] == sum(part[name] for part in parts) / 20
    assert row["all"] == sum(p["colours"] and p["shapes"] and p["relation"] for p in parts) / 20 == 0.5
    assert row["sizes"] < row["colours"] and row["relation"] < row["colours"] == 0.75


def test_too_many_captions_and_impossible_sizes_are_refused(tmp_path: Path) -> None:
    blank = Painter({}, 32)
    with pytest.raises(DataError, match="ask for at most"):
        run(blank, "shapes", count=10**6, side=32)
    with pytest.raises(UsageError, match="multiple of 8"):
        run(blank, "shapes", side=33)
    with pytest.raises(UsageError, match="squares"):
        run(blank, "shapes", side=8)
    with pytest.raises(DataError, match="does not exist"):
        run(blank, tmp_path / "none", side=32)


def test_a_model_that_is_always_told_a_class_is_not_evaluated(tmp_path: Path) -> None:
    """Captions do not say which; nothing is drawn."""
    painter = Painter({})
    painter.description.given = {"class_labels": SimpleNamespace(of=SimpleNamespace(column="label"))}
    with pytest.raises(UsageError, match=r"always told a class; train it with diffusion\.label_dropout above 0"):
        run(painter, tmp_path)


# ---- reconstruction, intervals, lines ------------------------------------------------------------------------------


def test_psnr_of_a_constant_error_is_its_closed_form(tmp_path: Path) -> None:
    grey = [np.full((SIDE, SIDE, 3), 100 + i, np.uint8) for i in range(70)]
    folder = write(tmp_path / "a", grey)
    [row] = run(Painter(by_caption(folder), error=0.02), folder, batch=16)
    assert row["reconstruction_psnr"] == pytest.approx(20 * np.log10(2 / 0.02), abs=1e-3)


def test_psnr_clips_to_what_can_be_saved_and_takes_64() -> None:
    white = [np.full((8, 8, 3), 255, np.uint8)] * 3
    row = reconstruction(Painter({}, error=0.5), white, 2, 0)  # type: ignore[arg-type]
    assert row["reconstruction_psnr"] == pytest.approx(10 * np.log10(4e12))
    assert row["reconstruction_ssim"] == pytest.approx(1)
    subject = evaluate.open_subject(config.Data(resolution=16), 100, 0)
    assert len(list(subject.originals(evaluate.RECONSTRUCTED))) == 64


def test_wilson_against_published_and_closed_forms() -> None:
    low, high = wilson(0, 10)
    z2 = NORMAL_95**2
    assert low == 0 and high == pytest.approx(z2 / (10 + z2))
    low, high = wilson(81, 263)  # Newcombe 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = wilson(15, 148)  # the same table
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_the_roots_of_its_quadratic(case: tuple[int, int]) -> None:
    right, count = case
    for bound in wilson(right, count):
        assert abs((right / count - bound) ** 2 - NORMAL_95**2 * bound * (1 - bound) / count) < 1e-9
    mirrored = wilson(count - right, count)
    assert wilson(right, count) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


def test_a_resampled_interval_is_that_of_the_normal_mean_and_seeded() -> None:
    x = np.random.default_rng(0).normal(5, 2, 400)
    value, interval = resampled(lambda i: float(x[i].mean()), len(x), 3)
    assert value == pytest.approx(x.mean())
    assert interval["high"] - value == pytest.approx(value - interval["low"]) == pytest.approx(0.196, rel=0.3)
    again = [resampled(lambda i: float(x[i].mean()), len(x), seed)[1] for seed in (3, 4)]
    assert again[0] == interval != again[1]


def test_one_image_has_figures_and_no_interval_of_them(tmp_path: Path) -> None:
    """An interval of no width would say that the figure is certain."""
    folder = write(tmp_path / "a", noise(1))
    [row] = run(Painter(by_caption(folder), error=0.1), folder)
    assert row["reconstruction_psnr"] > 0 and row["intervals"].keys() == {"nearest_top1", "nearest_top5"}
    assert "reconstruction" in evaluate.line(row)


def test_reconstruction_figures_are_means_over_images_with_intervals(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(20))
    [row] = run(Painter(by_caption(folder), error=0.1), folder)
    for name in ("reconstruction_psnr", "reconstruction_ssim"):
        bounds = row["intervals"][name]
        assert bounds["low"] < row[name] < bounds["high"]
    from skimage.metrics import structural_similarity

    theirs = []
    for image in by_caption(folder).values():
        output = np.minimum(image / 255 + 0.05, 1)
        theirs.append(
            structural_similarity(
                image / 255,
                output,
                data_range=1.0,
                channel_axis=2,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
        )
    assert row["reconstruction_ssim"] == pytest.approx(np.mean(theirs), abs=1e-6)


def test_lines_name_the_figures() -> None:
    interval = {name: {"low": 0.486, "high": 0.575} for name in READINGS}
    row = dict.fromkeys(READINGS, 0.5) | {
        "all": 0.53,
        "data": "shapes",
        "images": 500,
        "intervals": interval,
        "reconstruction_psnr": 31.25,
        "reconstruction_ssim": 0.9876,
    }
    assert evaluate.line(row).startswith(
        "shapes: 500 unseen captions: wholly right 53.0% (48.6% to 57.5%); colours 50.0%"
    )
    interval = {name: {"low": 0.4, "high": 0.6} for name in ("nearest_top1", "nearest_top5")}
    row = {
        "data": "a",
        "images": 9,
        "nearest_top1": 0.5,
        "nearest_top5": 0.6,
        "candidates": 70,
        "intervals": interval,
        "reconstruction_psnr": 25.0,
        "reconstruction_ssim": 0.9876,
    }
    assert (
        "of 70 images" in evaluate.line(row)
        and evaluate.line(row).endswith("25.0 dB, SSIM 0.988")
        and "\n" not in evaluate.line(row)
    )


def test_it_runs_where_torch_cannot_be_imported() -> None:
    run_without("import tinydiff.evaluate", "torch", "onnxruntime")
