"""What is measured on held-out images while a model trains, against formulas; and the best checkpoint, whatever happens."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forker import Forker
from PIL import Image
from runs import metrics, said, sha256, untimed
from scipy.linalg import sqrtm
from test_parallel import place

from tinydiff import config
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.data.dataset import Images, open_source
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.errors import DataError, UsageError
from tinydiff.images import to_pixels
from tinydiff.models.autoencoder import mean_and_std
from tinydiff.pipeline import generate
from tinydiff.schema import to_toml
from tinydiff.training import loop, state, validation
from tinydiff.training.autoencoder import AutoencoderTask
from tinydiff.training.denoiser import BANDS, DenoiserTask
from tinydiff.training.run import Run
from tinydiff.training.validation import Held, Looks, held_out, over

HELD = ("held_out_loss", "held_out_loss_0", "held_out_loss_1", "held_out_loss_2", "held_out_loss_3")


def watched(cfg: config.Config, **train: object) -> config.Config:
    """With a look and a save at every third step."""
    stages = {name: replace(cfg.train.stage(name), sample_every=3) for name in ("autoencoder", "denoiser")}
    return replace(cfg, train=replace(cfg.train, validation_samples=0, **stages, **train))


@pytest.fixture(scope="module")
def looked(run_config, other_images) -> config.Config:
    """Four looks at other images in each stage."""
    return watched(replace(run_config, data=replace(run_config.data, validation=str(other_images))))


@pytest.fixture
def run(tiny_config, tiny_model, other_images, tmp_path) -> Run:
    """A run with a model of random weights and other images, before any stage."""
    train = replace(tiny_config.train, validation_samples=0)
    cfg = replace(tiny_config, data=replace(tiny_config.data, validation=str(other_images)), train=train)
    made = Run(loop.Runtime(cfg), tmp_path)
    made.data, made.model = Images(open_source(cfg.data), cfg.data), folder.load(Source(tiny_model))
    made.held = held_out(made)
    return made


def evaluated(task) -> dict[str, float]:
    for player in task.players.values():
        player.module.eval()
    return task.validate()


# ---- which images --------------------------------------------------------------------------------------------------------


def test_shapes_are_measured_on_others_than_are_trained_on(tmp_path):
    cfg = config.load(None, ["data.samples=3000"])
    run = Run(loop.Runtime(cfg), tmp_path)
    run.data = Images(open_source(cfg.data, cfg.train.seed), cfg.data)
    held = held_out(run)
    assert held and len(held) == 60 and not run.data.held_out.any()
    digests = [{images.source.digest(i) for i in range(len(images))} for images in (run.data, held.images)]
    assert not digests[0] & digests[1] and held_out(run).digest == held.digest
    pixels = held.images.batch(held.indices)
    assert len({image.tobytes() for image in pixels}) == 60


def test_no_more_shapes_are_drawn_than_a_folder_is_measured_on(run):
    run.data = Images(run.data.source, replace(run.cfg.data, validation="shapes", samples=60_000))
    held = held_out(run)
    assert held and len(held) == len(held.images.source) == validation.MOST


def test_images_of_the_folder_are_kept_out(tiny_config, tmp_path):
    """Of forty images a quarter, none in any batch; they are measured on, and not as mirror images."""
    (tmp_path / "images").mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
        (tmp_path / "images" / f"{i:02d}.txt").write_text(f"number {i}")
    cfg = replace(tiny_config, data=config.Data(str(tmp_path / "images"), 16, held_out=0.25, flip=True))
    run = Run(loop.Runtime(cfg), tmp_path / "run")
    run.data = Images(open_source(cfg.data), cfg.data)
    held = held_out(run)
    assert held and held.images is run.data and (held.indices < 40).all() and 3 < len(held) < 20
    assert run.data.weights().sum() == 2 * (40 - len(held))


def test_a_run_that_trained_on_them_is_refused(tiny_config, tmp_path):
    """As one begun by a version that held none out, whose data.json does not say so; its own settings go on."""
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.fromarray(np.full((16, 16, 3), 12 * i, np.uint8)).save(tmp_path / "images" / f"{i:02d}.png")
        (tmp_path / "images" / f"{i:02d}.txt").write_text(f"number {i}")
    images = {
        share: Images(open_source(data), data)
        for share in (0.0, 0.5)
        for data in [config.Data(str(tmp_path / "images"), 16, held_out=share)]
    }
    begun = {"fingerprint": images[0.0].source.fingerprint(), "images": 20}
    (tmp_path / "tinydiff.toml").write_text(to_toml(tiny_config))
    (tmp_path / "data.json").write_text(json.dumps(begun))
    run = Run(loop.Runtime(tiny_config), tmp_path)
    run.claim.data(images[0.0])
    with pytest.raises(DataError, match=r"0 images held out then, \d+ now.*set data.held_out=0, or .*--accept-changes"):
        run.claim.data(images[0.5])
    Run(loop.Runtime(tiny_config), tmp_path, accept=True).claim.data(images[0.5])


def test_copies_of_training_images_are_no_measure(run, image_folder, tmp_path):
    mixed = Path(shutil.copytree(run.cfg.data.validation, tmp_path / "mixed"))
    for name in ("blue-square", "red-corner"):
        shutil.copy(image_folder / f"{name}.png", mixed / f"copy-{name}.png")
        (mixed / f"copy-{name}.txt").write_text("a copy")
    assert run.held
    for path, count in ((mixed, 8), (image_folder, 0)):
        run.data = Images(run.data.source, replace(run.cfg.data, validation=str(path)))
        if count:
            assert held_out(run).digest == run.held.digest and len(run.held) == count
        else:
            with pytest.raises(DataError, match="training has all of its images, too; set data.validation"):
                held_out(run)


def test_a_folder_that_is_not_there_is_named_before_anything_is_written(looked, tmp_path):
    cfg = replace(looked, data=replace(looked.data, validation=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"data\.validation: .*nowhere does not exist; give a folder"):
        loop.run(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- what is measured ------------------------------------------------------------------------------------------------------


def test_the_held_out_loss_by_its_formula(run):
    """Each row again: x = alpha x0 + sigma eps, what the network says of it, and the squared error of its prediction."""
    task = DenoiserTask(run)
    told, d, model = evaluated(task), run.model.description, run.model
    prediction, rows = PREDICTIONS[d.prediction], 16 * 4
    losses, bands = [], []
    for row in range(rows):
        batch = task.held_batch(np.array([row]))
        image = row % 8
        (level,) = [each for each in task.levels if each.t == batch["timestep"].item()]
        mean, std = mean_and_std(model.vae.encode(torch.from_numpy(to_pixels(run.held.images.batch([image])))))
        eps = (batch["sample"] * level.sigma + batch["target"] * level.alpha) / (level.alpha**2 + level.sigma**2)
        x0 = prediction.to_x0(batch["target"], batch["sample"], level.alpha, level.sigma)
        torch.testing.assert_close(x0 * level.alpha + eps * level.sigma, batch["sample"], rtol=0, atol=1e-4)
        assert (abs(x0 / model.scaling_factor - mean) <= 6 * std + 1e-4).all()  # the image's own latents
        caption = run.held.images.source.captions(image)[0]
        text = model.networks["text_encoder"](torch.from_numpy(model.tokenizers["text_encoder"].encode([caption])))
        hidden = text[0] if isinstance(text, tuple) else text
        with torch.no_grad():
            output = model.denoiser(batch["sample"], batch["timestep"], hidden)
        losses.append(float(((output - batch["target"]) ** 2).mean()))
        bands.append(task.levels.index(level) * BANDS // len(task.levels))
    losses, bands = np.array(losses), np.array(bands)
    wanted = {"held_out_loss": losses.mean()} | {f"held_out_loss_{b}": losses[bands == b].mean() for b in range(BANDS)}
    assert np.bincount(bands).tolist() == [16] * 4  # a uniform density, evenly
    rest = losses - np.array([wanted[f"held_out_loss_{b}"] for b in bands])
    means = [rest[i::8].mean() for i in range(8)]
    wanted["held_out_error"] = np.std(means, ddof=1) / 8**0.5
    assert told == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("density", ["uniform", "high_noise", "logit_normal"])
def test_it_is_what_the_training_loss_would_be_of_these_images(run, density):
    """Of the training images themselves it is the mean over many batches without dropout, within their error."""
    diffusion = replace(run.cfg.diffusion, timestep_density=density, caption_dropout=0.0)
    stage = replace(run.cfg.train.denoiser, batch_size=48)
    run.cfg = replace(run.cfg, diffusion=diffusion, train=replace(run.cfg.train, denoiser=stage))
    run.held = Held(run.data, np.arange(12))
    task = DenoiserTask(run)
    told = evaluated(task)
    task.choose = lambda u, count: 0  # the main caption
    with torch.no_grad():
        losses = torch.stack([task.losses("denoiser", task.batch(step, range(48))).mean() for step in range(25)])
    error = (losses.std() / 25**0.5).item()
    assert told["held_out_loss"] == pytest.approx(losses.mean().item(), abs=4 * error + 2 * told["held_out_error"])
    assert error < 0.03 * told["held_out_loss"]


def test_measuring_is_the_same_at_every_look_and_in_any_parts(run):
    one = evaluated(DenoiserTask(run))
    assert evaluated(DenoiserTask(run)) == one
    run.cfg = replace(run.cfg, train=replace(run.cfg.train, denoiser=replace(run.cfg.train.denoiser, accumulate=4)))
    assert evaluated(DenoiserTask(run)) == pytest.approx(one, rel=1e-5)


def test_reconstructions_of_held_out_images_by_their_formulas(run):
    run.__dict__["features"] = None
    told, vae = evaluated(AutoencoderTask(run)), run.model.vae
    pixels = to_pixels(run.held.images.batch(run.held.indices))
    with torch.no_grad():
        output = vae.decode(mean_and_std(vae.encode(torch.from_numpy(pixels)))[0]).numpy()
    each = np.abs(output - pixels).mean((1, 2, 3))
    wanted = {"held_out_l1": each.mean(), "held_out_error": each.std(ddof=1) / 8**0.5}
    psnr = 20 * math.log10(2) - 10 * math.log10(np.square(pixels - output.clip(-1, 1)).mean())
    assert told == pytest.approx(wanted | {"held_out_psnr": psnr}, rel=1e-5)


def test_the_perceptual_distance_is_that_of_the_feature_network(run):
    told, vae = evaluated(AutoencoderTask(run)), run.model.vae
    x = torch.from_numpy(to_pixels(run.held.images.batch(run.held.indices)))
    with torch.no_grad():
        distances = run.features.distance(x, vae.decode(mean_and_std(vae.encode(x))[0]).clamp(-1, 1))
    assert told["held_out_perceptual"] == pytest.approx(distances.mean().item(), rel=1e-5) and distances.min() > 0


def test_without_a_feature_network_the_rest_is_measured(run, monkeypatch, capsys):
    def missing() -> None:
        raise UsageError("the feature network is not installed; pip install it")

    monkeypatch.setattr("tinydiff.measure.features.open_features", missing)
    assert {*evaluated(AutoencoderTask(run))} == {"held_out_l1", "held_out_error", "held_out_psnr"}
    run.cfg = replace(run.cfg, train=replace(run.cfg.train, validation_samples=12))
    assert {*evaluated(DenoiserTask(run))} == {*HELD, "held_out_error"}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert "pip install it" in line and "no Fréchet distance" in line


def test_the_frechet_distance_by_another_program(run):
    """By three features an image, its mean colours; of the eight held-out images and four of those trained on."""
    run.__dict__["features"] = lambda x: (x.mean((2, 3)), None)
    run.cfg = replace(run.cfg, train=replace(run.cfg.train, validation_samples=12))
    task = DenoiserTask(run)
    found = evaluated(task)["frechet"]
    source, backend = run.held.images.source, TorchBackend(run.model)
    captions = [source.captions(i)[0] for i in range(8)] + [run.data.source.captions(i)[0] for i in (0, 3, 6, 9)]
    drawn = np.concatenate([generate(backend, [c], [i], task.request(8)) for i, c in enumerate(captions)])
    real = [*run.held.images.batch(range(8)), *run.data.batch([0, 3, 6, 9])]
    a, b = (np.stack([to_pixels(x[None])[0].mean((1, 2)) for x in each]).astype(float) for each in (drawn, real))
    (m, s), (n, t) = ((x.mean(0), np.cov(x.T)) for x in (a, b))
    wanted = ((m - n) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert found == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize(("size", "tensor"), [(2, 1), (3, 1), (4, 2), (5, 1)])
def test_processes_take_parts_in_turn_and_measure_equally_often(size, tensor):
    """As a network that they divide needs: otherwise one would wait for the others for ever."""
    parts = [np.array([0, 3]), np.array([1]), np.array([2, 4, 6]), np.array([5])]
    sums, asked = [], []
    for rank in range(size):
        world, calls = place(rank, size, tensor), []
        world.sum = lambda values: sums.append(values) or values
        over(world, parts, lambda rows, calls=calls: calls.append(rows) or np.stack([rows, rows**2.0], 1))
        asked.append(len(calls))
    assert len(set(asked)) == 1
    whole = sum(each.numpy() for each in sums) / tensor
    np.testing.assert_array_equal(whole, np.stack([np.arange(7), np.arange(7.0) ** 2], 1))


# ---- in a run ----------------------------------------------------------------------------------------------------------------


def weights_of(run_dir: Path) -> dict[str, str]:
    return sha256(run_dir, run_dir.glob("checkpoints/*-00000012/*.safetensors"))


@pytest.fixture(scope="module")
def measured(looked, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("measured") / "run"
    loop.run(looked, run_dir)
    return run_dir


def test_measuring_changes_no_bit_of_what_is_learnt(measured, run_config, tmp_path):
    loop.run(run_config, tmp_path / "run")
    assert weights_of(tmp_path / "run") == weights_of(measured) and len(weights_of(measured)) == 10


def test_every_look_is_logged_and_shown(measured):
    rows = [row for row in untimed(measured) if "held_out_error" in row]
    assert [(row["stage"], row["step"]) for row in rows] == [
        (s, n) for s in ("autoencoder", "denoiser") for n in (3, 6, 9, 12)
    ]
    assert all({*HELD} <= row.keys() for row in rows[4:]) and all("held_out_psnr" in row for row in rows[:4])
    assert len({row["held_out_loss"] for row in rows[4:]}) == 4
    text = (measured / "report.html").read_text()
    assert all(title in text for title in ("held out", "Held-out loss by noise", "Perceptual distance"))


def test_a_look_says_what_it_measured_and_what_it_costs(looked, tmp_path, capsys):
    loop.run(looked, tmp_path / "run", "autoencoder")
    lines = [line for line in capsys.readouterr().err.splitlines() if "held out l1" in line]
    assert len(lines) == 4 and all(line.endswith("% of the time") for line in lines)


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """The denoiser's looks measure this."""
    values = iter(losses.values())
    monkeypatch.setattr(DenoiserTask, "validate", lambda self: {"held_out_loss": next(values), "held_out_error": 0.0})


def average(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(state.Blocks(run_dir / "checkpoints" / f"denoiser-{step:08d}", "average").whole())


def is_of(run_dir: Path, step: int) -> bool:
    """Whether the model folder is the average of a checkpoint."""
    found, wanted = folder.load(Source(run_dir / "model")).denoiser.state_dict(), average(run_dir, step)
    return all(torch.equal(value, wanted[f"denoiser.denoiser.{name}"]) for name, value in found.items())


def steps_kept(run_dir: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in run_dir.glob("checkpoints/denoiser-*"))


@pytest.fixture(scope="module")
def best(looked, tmp_path_factory) -> Iterator[tuple[config.Config, Path]]:
    """A run whose second look, at step 4, was the best, at which no save was due; and what the stage gave to the next."""
    stage = replace(looked.train.denoiser, sample_every=2)
    cfg = replace(looked, train=replace(looked.train, keep_best=True, keep=1, denoiser=stage))
    run_dir, given = tmp_path_factory.mktemp("best") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, dict(zip(range(2, 13, 2), [0.5, 0.3, 0.4, 0.45, 0.4, 0.6], strict=True)))
        fine = loop.stage
        patch.setattr(loop, "stage", lambda run, task: (fine(run, task), given.append(run.model)))
        loop.run(cfg, run_dir)
    wanted = average(run_dir, 4)
    assert all(torch.equal(v, wanted[f"denoiser.denoiser.{k}"]) for k, v in given[-1].denoiser.state_dict().items())
    yield cfg, run_dir


def test_the_best_checkpoint_is_kept_and_published(best):
    _, run_dir = best
    assert steps_kept(run_dir) == [4, 12] and is_of(run_dir, 4) and not is_of(run_dir, 12)
    told = state.read(run_dir / "checkpoints" / "denoiser-00000012")["best"]
    assert (told["step"], told["loss"]) == (4, 0.3)


def test_a_lost_model_folder_is_that_of_the_best_again(best, tmp_path):
    cfg, run_dir = best
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    shutil.rmtree(copy / "model")
    loop.run(cfg, copy)
    assert is_of(copy, 4)


def test_a_damaged_best_checkpoint_is_named_and_the_last_taken(best, tmp_path, capsys):
    cfg, run_dir = best
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    shutil.rmtree(copy / "model")
    with (copy / "checkpoints" / "denoiser-00000004" / "average.safetensors").open("ab") as file:
        file.write(b"x")
    loop.run(cfg, copy)
    assert is_of(copy, 12)
    assert "denoiser-00000004" in (line := capsys.readouterr().err) and "the last checkpoint is taken" in line


def test_the_choice_may_be_changed_after_the_end(best, tmp_path):
    cfg, run_dir = best
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    for keep_best, step in ((False, 12), (True, 4)):
        loop.run(replace(cfg, train=replace(cfg.train, keep_best=keep_best)), copy)
        assert is_of(copy, step)


def test_the_best_of_other_images_is_forgotten(run):
    one = Looks(run, "denoiser", True, {"step": 3, "loss": 0.1, "of": run.held.digest})
    assert one.best and not one.seen(6, {"held_out_loss": 0.2})
    other = Looks(run, "denoiser", True, {"step": 3, "loss": 0.1, "of": "others"})
    assert other.best is None
    run.cfg = replace(run.cfg, train=replace(run.cfg.train, keep_best=True))
    keeping = Looks(run, "denoiser", True, None)
    looks = [(3, 0.2), (6, 0.2), (9, math.nan), (12, 0.1)]
    assert [keeping.seen(n, {"held_out_loss": loss}) for n, loss in looks] == [True, False, False, True]
    assert not keeping.seen(15, {})


def test_overfitting_is_said_once(looked, monkeypatch, tmp_path, capsys):
    """Where the training loss falls: here a decreasing one is written beside the scripted one of held-out images."""
    monkeypatch.setattr(validation, "overfitting", lambda metrics, loss: f"overfitting of {loss}" * (len(metrics) > 1))
    loop.run(looked, tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if "overfitting" in line]
    assert lines == ["autoencoder: overfitting of l1", "denoiser: overfitting of loss"]


# ---- killed ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wild(looked, tmp_path_factory) -> Path:
    """A configuration whose best look is not the last: the rate is far too high. A save is due at every look, or is not."""
    stage = replace(looked.train.denoiser, lr=0.3, warmup=8, ema=0.0, sample_every=2, save_every=5)
    cfg = replace(looked, train=replace(looked.train, keep_best=True, keep=1, denoiser=stage))
    path = tmp_path_factory.mktemp("wild") / "wild.toml"
    path.write_text(to_toml(cfg))
    return path


def everything(run_dir: Path) -> dict[str, str]:
    """What the end of a run leaves, and all that was measured."""
    paths = [*run_dir.glob("model/*/*.safetensors"), *run_dir.glob("checkpoints/*/*.safetensors")]
    best = state.read(run_dir / "checkpoints" / "denoiser-00000012")["best"]
    return sha256(run_dir, paths) | {"log": str(untimed(run_dir)), "best": str(best)}


def test_a_run_that_keeps_its_best_is_killed_anywhere_and_ends_in_the_same_bits(wild, tmp_path):
    """Before random renames, links and syncs, from start to end."""
    forker, rng = Forker(wild), np.random.default_rng(3)
    try:
        assert forker.run(tmp_path / "whole") == 0, said(tmp_path / "whole")
        whole = everything(tmp_path / "whole")
        best = state.read(tmp_path / "whole" / "checkpoints" / "denoiser-00000012")["best"]["step"]
        assert best < 12 and steps_kept(tmp_path / "whole") == [best, 12] and is_of(tmp_path / "whole", best)
        codes = []
        while not codes or codes[-1]:
            codes.append(forker.run(tmp_path / "run", int(rng.integers(20, 200)) if len(codes) < 12 else 0))
            assert codes[-1] in (0, -signal.SIGKILL), said(tmp_path / "run")
        assert len(codes) > 3 and everything(tmp_path / "run") == whole
        assert len([row for row in metrics(tmp_path / "run") if "held_out_loss" in row]) == 6
    finally:
        forker.close()
