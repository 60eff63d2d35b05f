"""Stage 1's losses against colour matrices, brute force and finite differences, and that what they need is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinydiff import config
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.data.dataset import Images, open_source
from tinydiff.errors import ModelError, UserError
from tinydiff.measure.features import open_features
from tinydiff.stages import AutoencoderStage
from tinydiff.training import claim, loop
from tinydiff.training.autoencoder import AutoencoderTask
from tinydiff.training.losses import autoencoder_loss, chroma
from tinydiff.training.run import Run


def of_autoencoder(cfg: config.Config, **keys: object) -> config.Config:
    """The configuration with some keys of [train.autoencoder] changed."""
    return replace(cfg, train=replace(cfg.train, autoencoder=replace(cfg.train.stage("autoencoder"), **keys)))


@pytest.fixture
def task(tiny_config: config.Config, tiny_model: Path, tmp_path: Path) -> Callable[..., AutoencoderTask]:
    """A function (keys of the stage) -> the task over a fresh model, its random weights always the same."""

    def make(**keys: object) -> AutoencoderTask:
        cfg = of_autoencoder(tiny_config, **keys)
        run = Run(loop.Runtime(cfg), tmp_path)
        run.data, run.model = Images(open_source(cfg.data), cfg.data), folder.load(Source(tiny_model))
        made = AutoencoderTask(run)
        made.rows = claim.split(range(4), made.name, made.settings, made.whole, run.world)
        return made

    return make


def test_chroma_is_that_of_pillow() -> None:
    """JPEG's YCbCr of saturated colours and greys, which Pillow rounds to bytes."""
    rng = np.random.default_rng(0)
    rgb = np.concatenate([rng.integers(0, 256, (62, 1, 3)), [[[255, 0, 0]], [[90, 90, 90]]]]).astype(np.uint8)
    wanted = np.array(Image.fromarray(rgb).convert("YCbCr"))[..., 1:].astype(int) - 128
    found = chroma(torch.from_numpy(rgb / 127.5 - 1).permute(2, 0, 1)[None])[0].permute(1, 2, 0) * 127.5
    assert np.abs(found.numpy() - wanted).max() <= 1


def test_chroma_weighs_errors_of_colour_and_not_of_brightness() -> None:
    cfg, pixels = AutoencoderStage(chroma_weight=3.0), torch.zeros(1, 3, 4, 4)
    assert autoencoder_loss(pixels, pixels + 0.5, {}, cfg)["chroma"].item() == pytest.approx(0, abs=1e-6)
    bluer = pixels + torch.tensor([0, 0, 0.4])[:, None, None]
    cb, cr = 0.4 * (1 - 0.114) / 1.772, -0.4 * 0.114 / 1.402
    assert autoencoder_loss(pixels, bluer, {}, cfg)["chroma"].item() == pytest.approx(3 * (cb - cr) / 2)


def test_the_perceptual_term_is_the_mean_distance_of_features(task: Callable[..., AutoencoderTask]) -> None:
    plain, other = task(), task(perceptual_weight=0.7)
    batch = plain.batch(2, range(4))
    with torch.no_grad():
        output = plain.players["autoencoder"].network(batch["pixels"], batch["noise"], batch["turn"][0].tolist())[0]
        pairs, features = zip(batch["pixels"].split(1), output.split(1), strict=True), open_features()
        wanted = 0.7 * sum(features.distance(x, y).item() for x, y in pairs) / 4
        (loss, terms), (before, _) = (each.loss("autoencoder", batch) for each in (other, plain))
    assert terms["perceptual"][0].item() == pytest.approx(wanted, rel=1e-4) and wanted > 0
    assert loss.item() - before.item() == pytest.approx(wanted, rel=1e-3)


def test_its_gradient_is_that_of_finite_differences(task: Callable[..., AutoencoderTask]) -> None:
    made = task(perceptual_weight=1.0, chroma_weight=1.0)
    batch, weight = made.batch(0, range(4)), made.model.vae.decoder.conv_out.weight
    made.loss("autoencoder", batch)[0].backward()
    assert weight.grad is not None
    direction, losses = weight.grad / weight.grad.norm(), []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            weight += step * direction
            losses.append(made.loss("autoencoder", batch)[0].item())
            weight -= step * direction
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(weight.grad.norm().item(), rel=1e-2)


def test_another_feature_network_than_the_run_was_begun_with_is_refused(task: Callable[..., AutoencoderTask]) -> None:
    made = task(perceptual_weight=1.0)
    made.restore(made.state())
    made.restore({})
    with pytest.raises(ModelError, match="not the feature network that the run was begun with"):
        made.restore({"features": "0" * 64})
    made.run.claim.accept = True
    made.restore({"features": "0" * 64})
    assert task().state() == {}


def test_a_feature_network_that_is_missing_is_told_before_anything_is_written(run_config, tmp_path: Path) -> None:
    cfg = of_autoencoder(run_config, perceptual_weight=1.0, features=str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match=r"none\.pth"):
        loop.run(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()
