"""The contrastive stage: its loss against brute force and transformers, what it draws, that it resumes, what it hands on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import sha256, untimed
from safetensors.torch import load_file
from torch.nn import functional as F

from tinydiff import config, evaluate
from tinydiff.backends import open_backend
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.data.dataset import Images, open_source
from tinydiff.errors import ModelError, UsageError
from tinydiff.images import to_pixels
from tinydiff.measure.text_image import Fit, agreement, open_towers
from tinydiff.models.contrastive import ImageTower
from tinydiff.pipeline import Request
from tinydiff.training import loop, state
from tinydiff.training.contrastive import ContrastiveTask, shifted
from tinydiff.training.losses import contrastive_loss
from tinydiff.training.run import Run
from tinydiff.training.runtime import Runtime


def with_stage(cfg: config.Config, **keys) -> config.Config:
    """The configuration with a contrastive stage."""
    keys = {"steps": 12, "batch_size": 6, "warmup": 2, "save_every": 3, "sample_every": 6, "ema": 0.9} | keys
    keys = {"image_channels": (8, 16), "projection_dim": 12} | keys
    return replace(cfg, train=replace(cfg.train, contrastive=replace(cfg.train.stage("contrastive"), **keys)))


@pytest.fixture(scope="module")
def cfg(run_config) -> config.Config:
    return with_stage(run_config)


@pytest.fixture(scope="module")
def whole(cfg, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole")
    assert loop.run(cfg, run_dir) == run_dir / "model"
    return run_dir


# ---- the loss --------------------------------------------------------------------------------------------------------


def by_hand(logits: np.ndarray, match: np.ndarray) -> float:
    """Both cross-entropies, term by term."""
    total, count = 0.0, len(logits)
    for table, right in ((logits, match), (logits.T, match.T)):
        for row, good in zip(table, right, strict=True):
            norm = math.log(sum(math.exp(value) for value in row))
            total -= sum(float(g) / good.sum() * (value - norm) for g, value in zip(good, row, strict=True)) / count
    return total / 2


@pytest.mark.parametrize("captions", ["abcdefgh", "aabcdefa", "aaaaaaaa"])
def test_loss_by_brute_force(captions):
    logits = np.random.default_rng(0).normal(0, 2, (8, 8))
    match = np.array([[a == b for b in captions] for a in captions], np.float64)
    found = contrastive_loss(torch.from_numpy(logits), torch.from_numpy(match)).item()
    assert found == pytest.approx(by_hand(logits, match), rel=1e-9)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_loss_is_that_of_transformers():
    """Of the embeddings that its model makes, where no caption comes twice."""
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 99,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    image = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    image |= {"image_size": 16, "patch_size": 8}
    sizes = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=12)
    torch.manual_seed(0)
    model = transformers.CLIPModel(sizes).eval()
    given = {"input_ids": torch.randint(0, 98, (6, 7)), "pixel_values": torch.randn(6, 3, 16, 16)}
    with torch.no_grad():
        theirs = model(**given, return_loss=True)
    logits = model.logit_scale.exp() * theirs.image_embeds @ theirs.text_embeds.T
    assert contrastive_loss(logits, torch.eye(6)).item() == pytest.approx(theirs.loss.item(), rel=1e-5)


def test_equal_captions_are_not_each_other_s_negatives():
    """Two images of one caption: nothing pushes either from the other's, and the loss ends where both are alike."""
    logits = torch.tensor([[9.0, 9.0, 0.0], [9.0, 9.0, 0.0], [0.0, 0.0, 9.0]], requires_grad=True)
    match = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    contrastive_loss(logits, match).backward()
    assert logits.grad is not None and (logits.grad[:2, :2] <= 0).all() and logits.grad.abs().max() < 1e-3
    apart = logits.detach().requires_grad_()
    contrastive_loss(apart, torch.eye(3)).backward()
    assert apart.grad is not None and apart.grad[0, 1] > 0.1


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tiny_config, tiny_model, tmp_path) -> Callable[..., ContrastiveTask]:
    """A function (keys of the stage) -> its task, over a model of random weights."""

    def make(**keys) -> ContrastiveTask:
        run = Run(Runtime(with_stage(tiny_config, **keys)), tmp_path)
        run.model = folder.load(Source(tiny_model))
        run.data = Images(open_source(run.cfg.data, run.cfg.train.seed), run.cfg.data)
        return ContrastiveTask(run)

    return make


def test_what_matches_is_what_the_data_say(task):
    """A square has two captions, of which the second is other squares' too."""
    made = task(batch_size=24)
    batch, source = made.batch(3, range(24)), made.data.source
    drawn = [made.draw(3, row, int(i), (4, 8, 8))[0] for row, i in enumerate(made.order(3))]
    for row, i in enumerate(made.order(3)):
        assert [caption in source.captions(int(i)) for caption in drawn] == batch["match"][row].bool().tolist()
        assert batch["match"][row, row] == 1
    ids = made.model.tokenizers["text_encoder"].encode(drawn)
    assert np.array_equal(batch["ids"].numpy(), ids) and len(set(drawn)) > 10
    assert (batch["match"].sum(1) > 1).any() and batch["latents"].shape == (24, 4, 8, 8)
    assert batch["latents"].std() == pytest.approx(1, abs=0.15)


def test_a_batch_is_a_function_of_its_step(task):
    one, two = task(), task()
    two.batch(7, range(6))
    first, again, other = one.batch(3, range(6)), two.batch(3, range(6)), one.batch(4, range(6))
    assert all(torch.equal(first[k], again[k]) for k in first) and not torch.equal(first["latents"], other["latents"])
    halves = [two.batch(3, rows) for rows in (range(3, 6), range(3))]
    assert all(torch.equal(first[k], torch.cat([half[k] for half in halves[::-1]])) for k in first)


def test_latents_move_by_a_row_and_a_column():
    z = np.arange(9.0).reshape(1, 3, 3)
    assert shifted(z, np.array([1, -1])).tolist() == [[[1, 2, 2], [1, 2, 2], [4, 5, 5]]]
    assert np.array_equal(shifted(z, np.array([0, 0])), z)


def test_one_batch_is_learnt(task):
    made = task(lr=5e-3, warmup=0)
    ((name, player),) = made.players.items()
    training = state.Training([state.Learner.of(name, player.module, player.settings, made.run.world)])
    made.rows = [range(6)]
    losses = [loop.step(made.run, made, training, 0, loop.parts_of(made, 0)).values for _ in range(60)]
    assert losses[-1]["loss"] < 0.3 * losses[0]["loss"] and losses[-1]["retrieved"] == 1
    assert losses[0]["scale"] == pytest.approx(1 / 0.07, rel=1e-5) and losses[-1]["scale"] != losses[0]["scale"]


def test_the_temperature_stops_at_a_hundred(task):
    towers = task().players["contrastive"].module
    towers.logit_scale.data.fill_(7.0)
    assert towers(torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 4, 8, 8))[2] == 100  # type: ignore[operator]


def test_images_of_any_size_enter():
    tower = ImageTower(4, (8, 16, 16))
    assert all(tower(torch.randn(2, 4, h, w)).shape == (2, 16) for h, w in ((8, 8), (5, 11), (1, 2)))


# ---- runs ------------------------------------------------------------------------------------------------------------


def digests(run_dir: Path) -> dict[str, str]:
    paths = [
        *run_dir.glob("model/*/*"),
        *run_dir.glob("contrastive/*"),
        *run_dir.glob("checkpoints/*-00000012/*.safetensors"),
    ]
    return sha256(run_dir, paths)


def test_a_run_that_is_stopped_time_and_again_ends_in_the_same_bits(cfg, whole, tmp_path, monkeypatch):
    """At every checkpoint of the stage and at some of the denoiser's; its rows of metrics too."""
    save, stops = state.save, ["contrastive-00000003", "contrastive-00000006", "contrastive-00000009"]
    stops += ["contrastive-00000012", "denoiser-00000003", "denoiser-00000009"]

    def save_and_stop(path: Path, *more: object) -> None:
        save(path, *more)  # type: ignore[arg-type]
        if stops and path.name == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    shutil.copytree(whole, tmp_path / "run")
    for name in ("model", "contrastive"):
        shutil.rmtree(tmp_path / "run" / name)
    for path in [*(tmp_path / "run" / "checkpoints").glob("[cd]*"), *tmp_path.glob("run/samples/[cd]*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(state, "save", save_and_stop)
        while stops:
            with pytest.raises(KeyboardInterrupt):
                loop.run(cfg, tmp_path / "run")
        loop.run(cfg, tmp_path / "run")
    assert digests(tmp_path / "run") == digests(whole) and len(digests(whole)) > 15
    assert untimed(tmp_path / "run") == untimed(whole)


def test_what_the_stage_leaves_and_what_of_it_the_denoiser_keeps(whole, cfg):
    """The towers as their last average has them; the denoiser's text encoder has learnt on since."""
    average = load_file(whole / "checkpoints" / "contrastive-00000012" / "average.safetensors")
    kept = load_file(whole / "contrastive" / "model.safetensors")
    assert kept.keys() == {name.removeprefix("contrastive.") for name in average}
    assert all(torch.equal(v, average[f"contrastive.{k}"]) for k, v in kept.items())
    inside = whole / "model" / "contrastive"
    assert {p.name for p in inside.iterdir()} == {"config.json", "model.safetensors"}
    assert all(
        (inside / p.name).read_bytes() == (whole / "contrastive" / p.name).read_bytes() for p in inside.iterdir()
    )
    text = load_file(whole / "model" / "text_encoder" / "model.safetensors")
    assert not any(torch.equal(v, kept[f"text.{k}"]) for k, v in text.items() if v.numel() > 16)
    Source(whole / "model").check()  # whose folder has one more than its index says
    assert "images of captions" in (whole / "report.html").read_text()
    measured = [row for row in untimed(whole) if row["stage"] == "contrastive"]
    assert {"retrieved", "scale", "text_image_score", "text_image_retrieval"} <= {
        key for row in measured for key in row
    }


def test_the_denoiser_begins_with_the_text_encoder_that_the_stage_has_trained(cfg, whole, tmp_path):
    still = replace(cfg, train=replace(cfg.train, denoiser=replace(cfg.train.denoiser, lr=0.0, steps=3)))
    loop.run(still, tmp_path)
    text = load_file(tmp_path / "model" / "text_encoder" / "model.safetensors")
    kept = load_file(tmp_path / "contrastive" / "model.safetensors")
    assert all(torch.equal(v, kept[f"text.{k}"]) for k, v in text.items())


def test_images_of_several_shapes_are_compared_in_theirs_in_half_precision(cfg, tmp_path):
    """Each batch of one size; products of vectors stay in float32, where a cosine has more than three digits."""
    (tmp_path / "images").mkdir()
    for i, (width, height) in enumerate([(40, 20), (20, 40), (30, 30)] * 6):
        colour = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(colour).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"image {i}")
    data = config.Data(str(tmp_path / "images"), 16, max_aspect_ratio=2.0, bucket_step=4, flip=True)
    made = replace(with_stage(cfg, steps=9, sample_every=9), data=data)
    made = replace(made, train=replace(made.train, precision="bf16"))
    sizes, loss = set(), ContrastiveTask.loss

    def looked(self, player, batch):
        sizes.add(batch["latents"].shape[2:])
        texts, images, _ = self.players[player].network(batch["ids"], batch["latents"])
        assert texts.dtype == images.dtype == torch.float32
        return loss(self, player, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContrastiveTask, "loss", looked)
        assert loop.run(made, tmp_path / "run", "contrastive") == tmp_path / "run" / "contrastive"
    assert len(sizes) == 3
    assert all(math.isfinite(row["text_image_score"]) for row in untimed(tmp_path / "run") if "text_image_score" in row)


def test_a_lost_folder_is_published_again(whole, cfg, tmp_path):
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    for name in ("contrastive", "model"):
        shutil.rmtree(run_dir / name)
    loop.run(cfg, run_dir)
    assert digests(run_dir) == digests(whole)


def test_without_steps_there_is_no_such_folder(run_config, tmp_path):
    assert run_config.train.contrastive.steps == 0
    cfg = replace(run_config, train=replace(run_config.train, denoiser=replace(run_config.train.denoiser, steps=3)))
    loop.run(cfg, tmp_path)
    assert not list(tmp_path.rglob("contrastive*"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["denoiser.kind=dit", "text_encoder.kind=class"], "it trains CLIP's tower, and text_encoder.kind is class"),
        (["text_encoder.kind=bert", "text_encoder.path=x"], "it trains CLIP's tower, and text_encoder.kind is bert"),
        (["train.contrastive.image_channels=[12]"], "train.contrastive.image_channels: [12] are no multiples of 8"),
        (
            ["train.contrastive.batch_size=1"],
            "train.contrastive.batch_size: an image is told from the others of a batch",
        ),
        (["train.contrastive.projection_dim=1"], "train.contrastive.projection_dim: 1 is below 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(overrides, says):
    with pytest.raises(UsageError) as caught:
        config.load(None, ["train.contrastive.steps=5", *overrides])
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_parts_of_a_batch_are_refused(cfg, tmp_path):
    with pytest.raises(UsageError, match=r"train\.contrastive\.accumulate: .* set it to 1"):
        loop.run(with_stage(cfg, accumulate=2), tmp_path / "run")


# ---- the score -------------------------------------------------------------------------------------------------------


def test_agreement_by_brute_force():
    rng, captions = np.random.default_rng(0), ["a", "b", "a", "c", "b", "d"]
    texts, images = (rng.normal(size=(6, 5)) for _ in range(2))
    texts[2], texts[4] = texts[0], texts[1]
    texts, images = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (texts, images))
    found = 0
    for i in range(6):
        others = [float(images[i] @ texts[j]) for j in range(6) if captions[j] != captions[i]]
        found += float(images[i] @ texts[i]) >= max(others)
    mean = sum(float(images[i] @ texts[i]) for i in range(6)) / 6
    said = agreement(texts, images, captions)
    assert said["text_image_score"] == pytest.approx(mean, abs=1e-12)
    assert said["text_image_retrieval"] == found / 6
    assert agreement(texts, texts, captions) == {"text_image_score": pytest.approx(1), "text_image_retrieval": 1.0}


@torch.no_grad()
def test_pictures_are_scored_by_the_towers_of_the_model_folder(whole):
    model = Source(whole / "model")
    backend, towers = open_backend(model, "torch", "cpu"), open_towers(whole / "model")
    captions = ["a red square", "a blue circle", "a yellow corner"]
    drawn = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    fit = Fit(backend, towers, captions)
    fit.add(0, drawn[:2])
    fit.add(2, drawn[2:])
    table = json.loads((whole / "contrastive" / "config.json").read_text())
    kept = load_file(whole / "contrastive" / "model.safetensors")
    opened = folder.load(model)
    text = opened.networks["text_encoder"]
    text.load_state_dict({k.removeprefix("text."): v for k, v in kept.items() if k.startswith("text.")})
    pooled = text(torch.from_numpy(model.tokenizers["text_encoder"].encode(captions)))[1]
    read = F.normalize(pooled @ kept["text_projection.weight"].T, dim=1)
    tower = ImageTower(table["in_channels"], tuple(table["image_channels"]))
    tower.load_state_dict({k.removeprefix("image."): v for k, v in kept.items() if k.startswith("image.")})
    z = opened.vae.encode(torch.from_numpy(to_pixels(drawn)))[:, : table["in_channels"]] * table["scaling_factor"]
    seen = F.normalize(tower(z) @ kept["visual_projection.weight"].T, dim=1)
    cosines, row = (read * seen).sum(1), fit.row(drawn[:2])
    assert row["text_image_score"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert row["of_real"]["text_image_score"] == pytest.approx(cosines[:2].mean().item(), abs=1e-5)
    half = 1.959964 * cosines.std().item() / 3**0.5
    bounds = row["intervals"]["text_image_score"]
    assert (bounds["high"] - bounds["low"]) / 2 == pytest.approx(half, abs=1e-5)
    assert bounds["low"] < row["text_image_score"] < bounds["high"]
    others = (seen @ read.T).fill_diagonal_(-2).max(1).values
    assert row["text_image_retrieval"] == pytest.approx((cosines >= others).double().mean().item())


@torch.no_grad()
def test_one_picture_has_a_score_and_no_interval_of_it(whole):
    fit = Fit(open_backend(Source(whole / "model"), "torch", "cpu"), open_towers(whole / "model"), ["a red square"])
    fit.add(0, drawn := np.zeros((1, 16, 16, 3), np.uint8))
    row = fit.row(drawn)
    assert -1 <= row["text_image_score"] <= 1 and row["intervals"].keys() == {"text_image_retrieval"}


def test_evaluate_says_how_well_pictures_fit_their_captions(whole, image_folder):
    """In a row a data path, beside the others; of real pictures too; and in a line for a person. Nothing without towers."""
    backend = open_backend(Source(whole / "model"), "torch", "cpu")
    request, size = Request(2, 1.0, "ddim", "trailing", 16, 16), 16
    [row] = evaluate.evaluate(backend, request, [str(image_folder)], 8, 0, 3, size)
    assert -1 <= row["text_image_score"] <= 1 and row["intervals"]["text_image_score"]["low"] < row["text_image_score"]
    assert row["images"] == 8 and 0 <= row["text_image_retrieval"] <= 1 and "nearest_top1" in row
    assert "text_image_score" in row["of_real"] and "text_image_score" in evaluate.line(row)
    shutil.copytree(whole / "model", whole / "bare", ignore=shutil.ignore_patterns("contrastive", "manifest.json"))
    [bare] = evaluate.evaluate(
        open_backend(Source(whole / "bare"), "torch", "cpu"), request, [str(image_folder)], 8, 0, 3, size
    )
    assert bare.keys() == {name for name in row if not name.startswith("text_image") and name != "of_real"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_channels": [8, 12]}, "image_channels"),
        ({"projection_dim": 10**9}, "projection_dim"),
        ({"in_channels": "4"}, "in_channels"),
        ({"text_config": {}}, "contrastive"),
        ({"text_config": 3}, "contrastive"),
        ({"_class_name": "Other"}, "Other"),
        ({"image_channels": [8]}, "its weights do not fit its config.json"),
    ],
)
def test_a_folder_that_makes_no_sense_is_named(change, says, whole, tmp_path):
    path = tmp_path / "model" / "contrastive"
    shutil.copytree(whole / "contrastive", path)
    table = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(table | change))
    with pytest.raises(ModelError) as caught:
        open_towers(tmp_path / "model")
    assert says in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
