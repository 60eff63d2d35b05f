"""Training: its formulas against brute force, and that a run killed at any moment ends in the same bits."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forker import wait_until
from hypothesis import given
from hypothesis import strategies as st
from interpreters import ENV
from PIL import Image
from runs import metrics, sha256
from torch import nn

from tinydiff import config, files
from tinydiff.checkpoints import folder, weights
from tinydiff.checkpoints.source import Source
from tinydiff.data import latents
from tinydiff.data.dataset import Images, open_source
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.errors import (
    BusyError,
    DataError,
    DivergedError,
    HungError,
    ModelError,
    ResourceError,
    UsageError,
    UserError,
)
from tinydiff.networks.dit import DiT as DiTSettings
from tinydiff.stages import AutoencoderStage, Stage
from tinydiff.text.tokenizer import Tokenizer
from tinydiff.training import advice, claim, loop, state
from tinydiff.training.autoencoder import AutoencoderTask
from tinydiff.training.denoiser import DenoiserTask
from tinydiff.training.losses import autoencoder_loss, denoising_losses, kl, loss_weight, pick_level, psnr
from tinydiff.training.optim import Average, adamw, learning_rate
from tinydiff.training.parallel import World
from tinydiff.training.run import Run

SEED = 20


# ---------------------------------------------------------------------------------------------------------- formulas


def test_learning_rate_in_closed_form():
    cfg = Stage(steps=101, warmup=10, lr=2.0, final_lr=0.1)
    rates = [learning_rate(n, cfg) for n in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    for n in range(10, 101):
        share = (n - 10) / 90
        assert rates[n] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2))
    assert rates[-1] == pytest.approx(0.2) and rates[55] == pytest.approx(1.1)


@given(st.integers(1, 200), st.integers(0, 300), st.floats(0, 1))
def test_learning_rate_never_leaves_its_range(steps, warmup, final):
    cfg = Stage(steps=steps, warmup=warmup, lr=1.0, final_lr=final)
    assert all(0 <= learning_rate(n, cfg) <= 1 for n in range(steps))


def test_average_in_closed_form():
    """Decays of (1 + n)/(10 + n), at most 0.5; several steps' decays at once, at every fourth."""
    module = nn.Linear(1, 1, bias=False)
    average, values = Average(module.parameters(), 0.5), [3.0, -1.0, 4.0, 1.5, -9.0, 2.6, 5.0, 3.0, 5.8, 9.0]
    wanted = module.weight.item()
    for n, value in enumerate(values):
        with torch.no_grad():
            module.weight.fill_(value)
        average.update(n)
        decay = min(0.5, (1 + n) / (10 + n)) ** 4 if n in (3, 7) else 1.0
        wanted = decay * wanted + (1 - decay) * value
    assert average.tensors[0].item() == pytest.approx(wanted, rel=1e-6)
    assert module.weight.item() == 9.0


def test_averaged_weights_are_lent_and_given_back():
    module = nn.Linear(2, 2)
    average = Average(module.parameters(), 0.5)
    averaged = [t.clone() for t in average.tensors]
    with torch.no_grad():
        module.weight.add_(1)
    own = [p.detach().clone() for p in module.parameters()]
    average.exchange()
    assert all(map(torch.equal, [p.detach() for p in module.parameters()], averaged))
    assert all(map(torch.equal, average.tensors, own))
    average.exchange()
    assert all(map(torch.equal, [p.detach() for p in module.parameters()], own))


def test_only_matrices_decay():
    module = nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2))
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = adamw(module.parameters(), Stage(lr=0.5, weight_decay=0.2))
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.9 if p.ndim > 1 else 1.0))


def test_adamw_step_in_closed_form():
    """Whatever the gradient, the first step is the learning rate long; the second moment decays by beta2."""
    p = nn.Parameter(torch.zeros(1, 1))
    optimizer = adamw([p], Stage(lr=0.1, weight_decay=0.0, beta2=0.75))
    p.grad = torch.full_like(p, 4.0)
    optimizer.step()
    assert p.item() == pytest.approx(-0.1)
    assert optimizer.state[p]["exp_avg_sq"].item() == pytest.approx(4.0)  # (1 - 0.75) * 4²


def test_kl_is_that_of_torch():
    torch.manual_seed(0)
    mean, std = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 0.1
    normal, own = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mean, std)
    wanted = torch.distributions.kl_divergence(own, normal).mean()
    torch.testing.assert_close(kl(mean, std), wanted)


def test_reconstruction_terms_by_hand():
    pixels, output = torch.zeros(1, 3, 2, 2), torch.tensor([[1.0, -3.0], [2.0, 0.0]]).expand(1, 3, 2, 2)
    latent = {"kl": torch.tensor(0.25)}
    cfg = AutoencoderStage(l2_weight=2.0, edge_weight=10.0)
    found = {k: v.item() for k, v in autoencoder_loss(pixels, output, latent, cfg).items()}
    # |1| |3| |2| |0|; squares 1 9 4 0; steps to the right 4 and 2, down 1 and 3
    assert found == pytest.approx({"l1": 1.5, "kl": 0.25, "l2": 2 * 3.5, "edges": 10 * (3 + 2)})
    off = AutoencoderStage(l2_weight=0.0, edge_weight=0.0)
    assert autoencoder_loss(pixels, output, latent, off).keys() == {"l1", "kl"}


def test_denoising_loss_weighs_each_image():
    output = torch.stack([torch.full((4, 2, 2), 1.0), torch.full((4, 2, 2), 3.0)])
    losses = denoising_losses(output, torch.zeros(2, 4, 2, 2), torch.tensor([2.0, 0.5]))
    assert losses.tolist() == pytest.approx([2 * 1, 0.5 * 9])


@given(
    st.sampled_from(sorted(PREDICTIONS)), st.floats(0.05, 1), st.floats(0.05, 3), st.floats(0.1, 20), st.integers(0, 99)
)
def test_min_snr_is_a_weight_of_the_error_of_x0(name, alpha, sigma, gamma, seed):
    """By brute force: weight * error² of the prediction = min(SNR, gamma) * error² of the x0 that is read off it."""
    x0, eps, wrong = np.random.default_rng(seed).standard_normal(3)
    prediction, x = PREDICTIONS[name], alpha * x0 + sigma * eps
    target = prediction.target(x0, eps, alpha, sigma)
    error = prediction.to_x0(target + wrong, x, alpha, sigma) - x0
    (weight,) = loss_weight(np.array([alpha]), np.array([sigma]), name, "own", gamma)
    assert weight * wrong**2 == pytest.approx(min((alpha / sigma) ** 2, gamma) * error**2, rel=1e-6)


def test_min_snr_off_and_at_pure_noise():
    alpha, sigma = np.array([0.0, 0.6]), np.array([1.0, 0.8])
    for name in PREDICTIONS:
        assert loss_weight(alpha, sigma, name, "own").tolist() == [1, 1]
        assert np.isfinite(loss_weight(alpha, sigma, name, "own", 5.0)).all()


@given(*(st.sampled_from(sorted(PREDICTIONS)),) * 2, st.floats(0.05, 1), st.floats(0.05, 3), st.integers(0, 99))
def test_a_loss_weighs_like_another_prediction_s_of_the_same_estimate(ours, theirs, alpha, sigma, seed):
    """By brute force: the x0 that is read off a prediction makes an error of the other one, whose square is the loss."""
    x0, eps, wrong = np.random.default_rng(seed).standard_normal(3)
    x, target = alpha * x0 + sigma * eps, PREDICTIONS[ours].target(x0, eps, alpha, sigma)
    estimate = PREDICTIONS[ours].to_x0(target + wrong, x, alpha, sigma)
    noise = (x - alpha * estimate) / sigma
    error = PREDICTIONS[theirs].target(estimate, noise, alpha, sigma) - PREDICTIONS[theirs].target(
        x0, eps, alpha, sigma
    )
    (weight,) = loss_weight(np.array([alpha]), np.array([sigma]), ours, theirs)
    assert weight * wrong**2 == pytest.approx(error**2, rel=1e-6)


def test_levels_are_picked_as_their_density_says():
    rng = np.random.default_rng(0)
    us, normals = rng.random(20_000), rng.standard_normal(20_000)
    uniform = np.array([pick_level(u, n, "uniform", 100) for u, n in zip(us, normals, strict=True)])
    assert np.bincount(uniform, minlength=100).min() > 120 and uniform.max() == 99
    noisy = np.array([pick_level(u, n, "high_noise", 100) for u, n in zip(us, normals, strict=True)])
    assert (noisy >= 50).mean() == pytest.approx(3 / 4, abs=0.01)
    logit = np.array([pick_level(u, n, "logit_normal", 100) for u, n in zip(us, normals, strict=True)])
    inside = math.erf(math.log(3) / math.sqrt(2))  # sigmoid(N) in [1/4, 3/4] is |N| < log 3
    assert ((logit >= 25) & (logit < 75)).mean() == pytest.approx(inside, abs=0.01)
    assert pick_level(1.0, 40.0, "uniform", 10) == pick_level(0.0, 40.0, "logit_normal", 10) == 9


def test_psnr():
    a = torch.zeros(1, 3, 4, 4)
    assert psnr(a, a + 0.2) == pytest.approx(10 * math.log10(4 / 0.04))
    assert psnr(a + 1, a + 7) == psnr(a, a) == pytest.approx(10 * math.log10(4e12))


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.fixture
def tasks(tiny_config, tiny_model, tmp_path):
    """A function (config) -> both tasks, each over a fresh model, its random weights always the same."""

    def make(cfg=tiny_config):
        return [kind(opened(cfg, tiny_model, tmp_path)) for kind in (AutoencoderTask, DenoiserTask)]

    return make


def trained(task, optimizer=None) -> state.Training:
    """The task's training from its beginning, with another optimizer than AdamW if there is one."""
    ((name, player),) = task.players.items()
    learner = state.Learner.of(name, player.module, player.settings, World(torch.device("cpu"), 1))
    return state.Training([replace(learner, optimizer=optimizer or learner.optimizer)])


def update(task, training, n: int = 0) -> loop.Done:
    """Step `n` of a task alone."""
    task.rows = claim.split(range(task.settings.batch_size), task.name, task.settings, task.whole, task.run.world)
    return loop.step(task.run, task, training, n, loop.parts_of(task, n))


def accumulated(cfg: config.Config, parts: int) -> config.Config:
    stages = {name: replace(cfg.train.stage(name), accumulate=parts, clip=0.0) for name in ("autoencoder", "denoiser")}
    return replace(cfg, train=replace(cfg.train, **stages))


@pytest.mark.parametrize("which", [0, 1])
def test_accumulating_changes_no_gradient(tasks, tiny_config, which):
    results = []
    for parts in (1, 2, 4):
        cfg = accumulated(tiny_config, parts)
        task = tasks(cfg)[which]
        plain = torch.optim.SGD(module(task).parameters(), lr=1.0)  # whose step is the gradient
        values = update(task, trained(task, plain), 3).values
        results.append((values["loss"], torch.cat([p.detach().flatten() for p in module(task).parameters()])))
    for loss, values in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(values, results[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_one_batch_is_learnt(tasks, which):
    task = tasks()[which]
    (player,) = task.players.values()
    player.settings = replace(player.settings, lr=5e-3, warmup=0)
    training = trained(task)
    losses = [update(task, training).values["loss"] for _ in range(40)]
    assert losses[-1] < 0.6 * losses[0]


def test_clipping_bounds_the_step(tasks, tiny_config):
    stage = replace(tiny_config.train.denoiser, clip=0.01, warmup=0, lr=1.0)
    cfg = replace(tiny_config, train=replace(tiny_config.train, denoiser=stage))
    task = tasks(cfg)[1]
    before = [p.detach().clone() for p in module(task).parameters()]
    values = update(task, trained(task, torch.optim.SGD(module(task).parameters()))).values
    after = [p.detach() for p in module(task).parameters()]
    moved = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(after, before, strict=True)))
    assert values["grad_norm"] > 0.01 and moved == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("which", [0, 1])
def test_a_batch_is_a_function_of_its_step(tasks, which):
    """Asked in any order, and in parts, step n sees the same images, noise and captions."""
    one, two = tasks()[which], tasks()[which]
    two.batch(7, range(4))
    first, again, other = (tensors(t.batch(n, range(4))) for t, n in ((one, 3), (two, 3), (one, 4)))
    assert len(first) == len(again) and all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    parts = [tensors(two.batch(3, range(i, i + 1))) for i in (2, 0, 3, 1)]
    for whole, *rows in zip(first, *parts, strict=True):
        assert torch.equal(whole, torch.cat([rows[i] for i in (1, 3, 0, 2)]))


def test_a_row_of_the_denoiser_is_what_the_configuration_asks(tasks, tiny_config):
    task = tasks(replace(tiny_config, diffusion=replace(tiny_config.diffusion, caption_dropout=0.25)))[1]
    rows = [task.draw(step, row, 0, (4, 8, 8)) for step in range(150) for row in range(4)]
    assert np.mean([caption == "" for _, caption, _ in rows]) == pytest.approx(0.25, abs=0.06)
    assert sorted(np.concatenate([task.order(step) for step in range(3)])) == list(range(12))  # an epoch
    levels = np.array([level for level, _, _ in rows])
    assert levels.mean() == pytest.approx(499.5, abs=50) and len(set(levels.tolist())) > 400
    normals = np.stack([n for *_, n in rows])
    assert normals.shape == (600, 2, 4, 8, 8) and normals.std() == pytest.approx(1, abs=0.01)


def test_losses_of_bands_of_noise_are_means_of_their_rows(tasks):
    task = tasks()[1]
    batch = task.batch(0, range(4))
    loss, terms = task.loss("denoiser", batch)
    each = [task.loss("denoiser", task.batch(0, range(i, i + 1)))[0].item() for i in range(4)]
    assert loss.item() == pytest.approx(np.mean(each), rel=1e-5)
    levels = [task.draw(0, row, 0, (4, 8, 8))[0] for row in range(4)]
    for band in range(4):
        mine = [value for value, level in zip(each, levels, strict=True) if band * 250 <= level < (band + 1) * 250]
        assert terms[f"loss_{band}"].tolist() == pytest.approx([sum(mine), len(mine)], rel=1e-5)


def test_half_of_the_captions_are_the_main_one():
    found = [DenoiserTask.choose(u, 3) for u in np.linspace(0, 1, 1000, endpoint=False)]
    assert np.bincount(found).tolist() == [500, 250, 250] and DenoiserTask.choose(0.99, 1) == 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_no_number_leaves_the_weights_untouched(tasks, where):
    task, fine = tasks()[1], DenoiserTask.loss
    training = trained(task)
    update(task, training)
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    before = {kind: {k: v.clone() for k, v in training.tensors(kind).items()} for kind in kinds}

    def broken(*arguments):
        loss, terms = fine(task, *arguments)
        return loss * math.nan if where == "loss" else torch.sqrt(loss - loss.detach()) + loss, terms

    task.loss = broken
    done = update(task, training, 1)
    assert done.reason and not math.isfinite(done.values["loss" if where == "loss" else "grad_norm"])
    assert training.learners[0].updates == 1
    for kind in kinds:
        assert all(torch.equal(v, before[kind][k]) for k, v in training.tensors(kind).items())


# -------------------------------------------------------------------------------------------------------------- runs


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of everything that the last step of both stages left behind."""
    paths = [*run_dir.glob("model/*/*.safetensors"), *run_dir.glob("checkpoints/*-00000012/*.safetensors")]
    return sha256(run_dir, paths)


def snapshot(run_dir: Path) -> dict[str, int]:
    return {
        str(p): p.stat().st_mtime_ns
        for name in ("model", "checkpoints", "latents")
        for p in (run_dir / name).rglob("*")
    }


@pytest.fixture(scope="module")
def whole(run_config, tmp_path_factory) -> Path:
    """A run that nothing disturbed, in this process."""
    run_dir = tmp_path_factory.mktemp("whole")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert loop.run(run_config, run_dir) == run_dir / "model"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    return run_dir


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of the finished run, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_what_a_run_leaves_behind(whole, run_config):
    names = {p.name for p in whole.iterdir()}
    assert names >= {"tinydiff.toml", "metrics.jsonl", "tokenizer", "latents", "checkpoints", "samples", "model"}
    assert [n for n in names if n.startswith(".")] == [".lock"]
    kept = sorted(p.name for p in (whole / "checkpoints").iterdir())
    assert kept == [f"{s}-{n:08d}" for s in ("autoencoder", "denoiser") for n in (9, 12)]
    assert len(digests(whole)) == 3 + 2 * 5
    model = folder.load(Source(whole / "model"))
    average = files.read_json(whole / "checkpoints" / "denoiser-00000012" / "state.json")
    assert average["step"] == 12 and config.load(whole / "model" / "tinydiff.toml") == run_config
    stored = weights.tensors([whole / "checkpoints" / "denoiser-00000012" / "average.safetensors"])
    assert all(torch.equal(v, stored[f"denoiser.denoiser.{k}"]) for k, v in model.denoiser.state_dict().items())
    stored = weights.tensors([next((whole / "latents").iterdir())])
    z = stored["mean"] + stored["std"] * torch.randn(stored["mean"].shape, generator=torch.Generator().manual_seed(0))
    assert (z * model.scaling_factor).std().item() == pytest.approx(1, abs=0.05)


def test_a_seeded_run_repeats_in_its_losses(whole, run_config, tmp_path):
    other = replace(run_config, train=replace(run_config.train, seed=1))
    loop.run(run_config, tmp_path / "again", "autoencoder")
    loop.run(other, tmp_path / "other", "autoencoder")
    losses = [
        next(m["loss"] for m in metrics(d) if "loss" in m) for d in (whole, tmp_path / "again", tmp_path / "other")
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_stage_without_steps_is_left_out(finished, whole, run_config, tmp_path):
    """Nothing is asked of it: neither a batch that comes out even, nor other advice than that, nor a bar in the report."""
    odd = of_stage(run_config, "denoiser", steps=0, accumulate=3, lr=0.0)
    assert loop.run(odd, tmp_path / "new") == tmp_path / "new" / "autoencoder"
    assert {p.name.partition("-")[0] for p in (tmp_path / "new" / "checkpoints").iterdir()} == {"autoencoder"}
    assert "denoiser" not in (tmp_path / "new" / "report.html").read_text()
    assert all("of no effect, train.denoiser.steps is 0" in said for said in advice.of_settings(odd))
    before = snapshot(finished)
    with pytest.raises(UsageError, match=r"train\.denoiser\.steps"):
        loop.run(of_stage(run_config, "denoiser", steps=0), finished)
    loop.run(of_stage(run_config, "denoiser", steps=0), finished, accept=True)
    assert snapshot(finished) == before and digests(finished) == digests(whole)


def test_a_finished_run_does_nothing(finished, run_config):
    before = snapshot(finished)
    assert loop.run(run_config, finished) == finished / "model"
    assert snapshot(finished) == before


def test_a_lost_model_folder_is_published_again(finished, whole, run_config):
    shutil.rmtree(finished / "model")
    loop.run(run_config, finished)
    assert digests(finished) == digests(whole)


def test_a_damaged_model_folder_is_published_again(finished, whole, run_config, capsys):
    path = next((finished / "model" / "unet").glob("*.safetensors"))
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    loop.run(run_config, finished)
    assert digests(finished) == digests(whole) and str(path) in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train(run_config, tmp_path, precision):
    loop.run(replace(run_config, train=replace(run_config.train, precision=precision)), tmp_path, "autoencoder")
    stored = weights.tensors([tmp_path / "checkpoints" / "autoencoder-00000012" / "weights.safetensors"])
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in stored.values())


def test_other_settings_are_refused_by_name(finished, whole, run_config):
    changed = replace(
        run_config,
        unet=replace(run_config.unet, layers_per_block=2),
        train=replace(run_config.train, autoencoder=replace(run_config.train.autoencoder, lr=0.5)),
    )
    with pytest.raises(UsageError) as caught:
        loop.run(changed, finished)
    assert "--accept-changes" in str(caught.value)
    for part in ("unet.layers_per_block (1 -> 2)", "train.autoencoder.lr (0.001 -> 0.5)", "--fresh"):
        assert part in str(caught.value)
    assert digests(finished) == digests(whole) and config.load(finished / "tinydiff.toml") == run_config


def of_stage(cfg: config.Config, name: str, **keys) -> config.Config:
    """The configuration with other keys of one stage."""
    return replace(cfg, train=replace(cfg.train, **{name: replace(cfg.train.stage(name), **keys)}))


REFUSED = {
    "another network": lambda cfg: replace(cfg, unet=replace(cfg.unet, block_out_channels=(32,))),
    "another autoencoder": lambda cfg: replace(cfg, autoencoder=replace(cfg.autoencoder, layers_per_block=2)),
    "parts that do not come out even": lambda cfg: of_stage(cfg, "denoiser", accumulate=3),
    "no data": lambda cfg: replace(cfg, data=replace(cfg.data, path="nowhere")),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_refused_command_leaves_the_run_as_it_was(change, finished, run_config):
    before = snapshot(finished)
    with pytest.raises(UserError):
        loop.run(change(run_config), finished, accept=True)
    assert snapshot(finished) == before


@pytest.mark.parametrize("change", [*REFUSED.values()][2:], ids=[*REFUSED][2:])
def test_a_first_start_that_fails_claims_nothing(change, run_config, tmp_path):
    with pytest.raises(UserError):
        loop.run(change(run_config), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    other = replace(run_config, text_encoder=replace(run_config.text_encoder, vocab_size=520))
    loop.run(other, tmp_path / "run", "autoencoder")
    assert config.load(tmp_path / "run" / "tinydiff.toml") == other


def test_a_full_disk_at_the_start_claims_nothing(run_config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(ResourceError, match="free some space"):
            loop.run(run_config, tmp_path)
    other = replace(run_config, text_encoder=replace(run_config.text_encoder, vocab_size=520))
    loop.run(other, tmp_path, "autoencoder")
    assert Tokenizer.load(tmp_path / "tokenizer").vocab_size == 520


def test_the_scale_of_latents_is_that_which_the_denoiser_learnt(own_data, tmp_path):
    """Pictures that come later do not change it, and so not what the denoiser has learnt of those that were there."""

    def factor() -> float:
        return files.read_json(tmp_path / "run" / "model" / "vae" / "config.json")["scaling_factor"]

    loop.run(own_data, tmp_path / "run")
    first = factor()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 255)).save(Path(own_data.data.path) / f"blue-{i}.png")
        (Path(own_data.data.path) / f"blue-{i}.txt").write_text("blue")
    more = of_stage(own_data, "denoiser", steps=own_data.train.denoiser.steps + 2)
    loop.run(more, tmp_path / "run", accept=True)
    assert factor() == first
    loop.run(more, tmp_path / "new")
    assert factor() == first != files.read_json(tmp_path / "new" / "model" / "vae" / "config.json")["scaling_factor"]


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_damaged_tokenizer_of_a_run_is_refused(name, finished, run_config):
    path = finished / "tokenizer" / name
    path.write_bytes(bytes([*path.read_bytes()[:-3], 0x31, *path.read_bytes()[-2:]]))
    with pytest.raises(ModelError, match=rf"{name}: damaged"):
        loop.run(of_stage(run_config, "denoiser", steps=14), finished, accept=True)


def test_a_tokenizer_that_cannot_be_compared_is_refused(finished, run_config):
    more = of_stage(run_config, "denoiser", steps=14)
    (finished / "tokenizer" / "manifest.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer: missing, or without its manifest.json; .*--fresh"):
        loop.run(more, finished, accept=True)


def test_a_tokenizer_is_made_again_of_the_same_data_alone(own_data, tmp_path):
    loop.run(own_data, tmp_path / "run")
    before = (tmp_path / "run" / "tokenizer" / "vocab.json").read_bytes()
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    loop.run(own_data, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer" / "vocab.json").read_bytes() == before
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    (Path(own_data.data.path) / "red-square.txt").write_text("quite another caption")
    with pytest.raises(ModelError, match="tokenizer: missing"):
        loop.run(own_data, tmp_path / "run", accept=True)


def test_tensorboard_that_is_not_there_is_told_before_anything_is_written(run_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"train.tensorboard: pip install"):
        loop.run(replace(run_config, train=replace(run_config.train, tensorboard=True)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_frozen_text_encoder_is_refused(run_config):
    model, texts = SimpleNamespace(opened=True), SimpleNamespace(digest="new")
    task = SimpleNamespace(texts=texts, maps=None, cfg=run_config, model=model, given={})
    task.same_autoencoder = lambda state, given: None
    DenoiserTask.restore(task, {"frozen_text": "new"})
    DenoiserTask.restore(task, {})  # a checkpoint of an older version
    with pytest.raises(ModelError, match="not the text encoder that the run was begun with"):
        DenoiserTask.restore(task, {"frozen_text": "old"})


def test_other_settings_are_accepted_on_request(finished, run_config):
    slower = replace(run_config.train.denoiser, lr=1e-4, steps=15)
    changed = replace(run_config, train=replace(run_config.train, denoiser=slower))
    loop.run(changed, finished, accept=True)
    assert (finished / "checkpoints" / "denoiser-00000015").exists()
    assert config.load(finished / "tinydiff.toml") == config.load(finished / "model" / "tinydiff.toml") == changed


def test_another_network_is_refused_even_so(finished, whole, run_config):
    changed = replace(run_config, unet=replace(run_config.unet, block_out_channels=(32,)))
    with pytest.raises(
        ModelError,
        match=r"another network, \d+ tensors differ, such as denoiser\.denoiser\.conv_in\.bias \(16,\) -> \(32,\)",
    ):
        loop.run(changed, finished, accept=True)
    assert digests(finished) == digests(whole)


@pytest.fixture
def own_data(run_config, image_folder, tmp_path) -> config.Config:
    """The run's configuration with a copy of its images, to change."""
    path = shutil.copytree(image_folder, tmp_path / "images")
    return replace(run_config, data=replace(run_config.data, path=str(path)))


def test_other_data_are_refused_or_accepted(own_data, tmp_path):
    run_dir = tmp_path / "run"
    loop.run(own_data, run_dir, "autoencoder")
    (Path(own_data.data.path) / "red-square.txt").write_text("quite another caption")
    before = snapshot(run_dir)
    with pytest.raises(DataError, match=r"changed since .*12 images then, 12 now.*--accept-changes"):
        loop.run(own_data, run_dir)
    assert snapshot(run_dir) == before
    loop.run(own_data, run_dir, accept=True)
    loop.run(own_data, run_dir)  # and from then on these are the run's


def test_settings_that_change_no_bit_are_accepted(finished, run_config):
    train = replace(run_config.train, keep=5, denoiser=replace(run_config.train.denoiser, save_every=100))
    changed = replace(run_config, train=train, generate=replace(run_config.generate, steps=3))
    loop.run(changed, finished)
    assert config.load(finished / "tinydiff.toml") == changed


def test_a_busy_run_is_refused(run_config, tmp_path):
    with files.lock(tmp_path), pytest.raises(BusyError, match=f"in use by process {os.getpid()}"):
        loop.run(run_config, tmp_path)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        lambda c: damage(c / "weights.safetensors"),
        lambda c: (c / "average.safetensors").write_bytes(b""),
        lambda c: (c / "state.json").unlink(),
        lambda c: (c / "manifest.json").unlink(),
        lambda c: [p.unlink() for p in c.iterdir()],
    ],
    ids=["bit", "empty", "state", "manifest", "everything"],
)
def test_a_damaged_checkpoint_is_passed_over(finished, whole, run_config, harm, capsys):
    harm(finished / "checkpoints" / "denoiser-00000012")
    shutil.rmtree(finished / "model")
    loop.run(run_config, finished)
    said = capsys.readouterr().err
    assert "denoiser-00000012" in said and "going back" in said and "going on from step 9" in said
    assert digests(finished) == digests(whole)
    assert [p.name for p in (finished / "damaged").iterdir()] == ["denoiser-00000012"]


def test_without_any_sound_checkpoint_nothing_starts_over_by_itself(finished, run_config):
    for path in (finished / "checkpoints").glob("*/weights.safetensors"):
        damage(path)
    before = snapshot(finished)
    with pytest.raises(ModelError, match="none of the 2 checkpoints of autoencoder is sound; --fresh"):
        loop.run(run_config, finished)
    assert snapshot(finished) == before


def test_strict_refuses_to_go_back(finished, run_config):
    damage(finished / "checkpoints" / "denoiser-00000012" / "average.safetensors")
    before = snapshot(finished)
    with pytest.raises(ModelError, match=r"denoiser-00000012.average.safetensors: damaged.*without --strict"):
        loop.run(run_config, finished, strict=True)
    assert snapshot(finished) == before


def test_a_checkpoint_of_a_newer_tinydiff_is_refused(finished, run_config):
    checkpoint = finished / "checkpoints" / "denoiser-00000012"
    (checkpoint / "state.json").write_text(json.dumps({"format": 99, "stage": "denoiser", "step": 12, "scaler": {}}))
    (checkpoint / "manifest.json").unlink()
    with files.committed(finished / "checkpoints" / "denoiser-00000015") as newer:
        for p in checkpoint.iterdir():
            shutil.copy(p, newer)
    with pytest.raises(ModelError, match="newer tinydiff"):
        loop.run(run_config, finished)


def test_pruning_keeps_the_newest_and_every_so_many(tmp_path):
    for step in range(3, 28, 3):
        (tmp_path / f"denoiser-{step:08d}").mkdir()
    (tmp_path / "autoencoder-00000003").mkdir()
    state.prune(tmp_path, "denoiser", 2, 9)
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == ["autoencoder-00000003", *(f"denoiser-{n:08d}" for n in (9, 18, 24, 27))]
    state.prune(tmp_path, "denoiser", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["autoencoder-00000003", "denoiser-00000027"]


def test_pruning_and_resuming_know_exact_names(tmp_path):
    """Copies, archives, links and notes beside the checkpoints are their owner's."""
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for path in (folder, elsewhere, *(folder / f"denoiser-{step:08d}" for step in (3, 6, 9))):
        path.mkdir()
    (folder / "denoiser-00000001").symlink_to(elsewhere)
    for name in ("00000003-best", "00000012.bak", "3", "000000012", "٠٠٠٠٠٠٠٣", "0000001x"):
        (folder / f"denoiser-{name}").mkdir()
    (folder / "denoiser-00000002").mkdir()
    for name in ("manifest.json", "notes.txt"):  # a checkpoint that somebody put something into
        (folder / "denoiser-00000002" / name).write_text('{"format": 1, "files": {}}')
    for name in ("00000003.tar", "00000015", "00000012.tar.gz"):
        (folder / f"denoiser-{name}").write_text("x")
    before = {path.name for path in folder.iterdir()}
    assert [path.name[-1] for path in state.checkpoints(folder, "denoiser")] == ["1", "2", "3", "6", "9"]
    for every, gone in ((6, {"denoiser-00000003"}), (0, {"denoiser-00000003", "denoiser-00000006"})):
        state.prune(folder, "denoiser", 1, every)
        assert before - {path.name for path in folder.iterdir()} == gone
    assert elsewhere.is_dir()


def test_leftovers_of_killed_processes_are_removed(finished, run_config, tmp_path):
    """Of this version and of older ones; what somebody else named, and what a link leads to, stays."""
    ours, old = ".tmp-tinydiff-0123456789abcdef", "0123456789abcdef" * 2
    for name in (ours, f"checkpoints/{ours}", f"checkpoints/.tmp-denoiser-00000012-{old}"):
        (finished / name).mkdir()
        (finished / name / "weights.safetensors").write_bytes(b"half")
    (finished / "samples" / f".tmp-x.png-{old}").write_bytes(b"half")
    others = [tmp_path / "elsewhere" / ours, finished / ".tmp-mine", finished / "checkpoints" / ".tmp-tinydiff-notes"]
    for place in others:
        place.mkdir(parents=True)
        (place / "precious").write_text("x")
    (finished / "photos").symlink_to(tmp_path / "elsewhere")
    (finished / "checkpoints" / ours.replace("0", "1")).symlink_to(tmp_path / "elsewhere")
    loop.run(run_config, finished)
    assert all((place / "precious").exists() for place in others)
    assert {p.name for p in finished.rglob(".tmp*")} == {".tmp-mine", ".tmp-tinydiff-notes", ours.replace("0", "1")}


@pytest.fixture
def poisoned(monkeypatch):
    """A function (steps, name) that makes the loss of an image in these steps of the denoiser no number."""

    def poison(steps, name):
        fine = DenoiserTask.batch

        def batch(self, step, rows):
            found = fine(self, step, rows)
            mine = self.data.names(self.order(step)[rows.start : rows.stop])
            bad = torch.tensor([step in steps and name in other for other in mine])
            return found | {"target": found["target"].masked_fill(bad[:, None, None, None], math.inf)}

        monkeypatch.setattr(DenoiserTask, "batch", batch)

    return poison


def test_an_update_that_is_no_number_is_left_out_and_its_images_named(run_config, poisoned, tmp_path, capsys):
    train = replace(run_config.train, denoiser=replace(run_config.train.denoiser, batch_size=12))
    poisoned({4, 5}, "red-stripe")
    loop.run(replace(run_config, train=train), tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert [line.partition(",")[0] for line in said] == [f"denoiser: step {n} left out" for n in (5, 6)]
    assert all(line.endswith("red-stripe.png") for line in said)
    logged = [m for m in metrics(tmp_path) if "skipped" in m]
    assert [(m["step"], m["samples"]) for m in logged] == [(5, ["red-stripe.png"]), (6, ["red-stripe.png"])]
    saved = files.read_json(tmp_path / "checkpoints" / "denoiser-00000012" / "state.json")
    assert (saved["step"], saved["updates"], saved["skipped"]) == (12, {"denoiser": 10}, 0)


def test_too_many_of_them_stop_the_run_with_a_finite_checkpoint(run_config, poisoned, tmp_path):
    train = replace(run_config.train, max_skipped=4)
    poisoned(range(5, 12), "")
    with pytest.raises(DivergedError, match=r"4 updates in a row left out up to step 9.*train\.denoiser\.lr.*--accept"):
        loop.run(replace(run_config, train=train), tmp_path)
    newest = state.newest(tmp_path / "checkpoints", "denoiser", print)
    for path in newest.glob("*.safetensors"):
        assert all(v.isfinite().all() for v in weights.tensors([path]).values())
    assert files.read_json(newest / "state.json")["step"] == 9


def test_weights_that_are_no_numbers_are_not_saved(run_config, tmp_path):
    train = replace(run_config.train, autoencoder=replace(run_config.train.autoencoder, lr=1e38, clip=0.0, warmup=0))
    with pytest.raises(DivergedError, match=r"autoencoder: .*lower train\.autoencoder\.lr"):
        loop.run(replace(run_config, train=replace(train, max_skipped=100)), tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*")) and not list(tmp_path.rglob(".tmp-*"))


def test_pictures_that_are_no_numbers_end_a_run_with_what_helps_training(run_config, undisturbed, tmp_path):
    """Not with flags of generate; the checkpoints before are kept."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    for path in tmp_path.glob("run/checkpoints/denoiser-*"):
        shutil.rmtree(path)
    stage = replace(run_config.train.denoiser, lr=1e20, clip=0.0, warmup=0, sample_every=1)
    with pytest.raises(DivergedError) as caught:
        loop.run(replace(run_config, train=replace(run_config.train, denoiser=stage)), tmp_path / "run")
    assert str(caught.value).startswith("denoiser: after step ") and "lower train.denoiser.lr" in str(caught.value)
    assert "--" not in str(caught.value).replace("--accept-changes", "")
    assert [p.name for p in tmp_path.glob("run/checkpoints/*-00000012")] == ["autoencoder-00000012"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_missing_memory_says_what_to_set(run_config, monkeypatch, tmp_path, error):
    def loss(self, *batch):
        raise error

    monkeypatch.setattr(DenoiserTask, "loss", loss)
    fix = r"out of memory at 4 rows at once; set train\.denoiser\.accumulate=2, or train\.gradient_checkpointing=true"
    with pytest.raises(ResourceError, match=fix):
        loop.run(run_config, tmp_path)


def test_reading_that_hangs_ends_the_run(run_config, monkeypatch, tmp_path):
    released = threading.Event()
    monkeypatch.setattr(DenoiserTask, "batch", lambda *_: released.wait(60))
    with pytest.raises(HungError, match=r"batch of step 1 took more than 1 s.*train\.timeout"):
        loop.run(replace(run_config, train=replace(run_config.train, timeout=1)), tmp_path)
    released.set()


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_images_of_several_shapes_are_trained_in_theirs(run_config, tmp_path, kind):
    """Wide, square and tall images, by the buckets of one run; each batch of one size, every image of its bucket."""
    place, rng = tmp_path / "images", np.random.default_rng(0)
    place.mkdir()
    for i, (width, height) in enumerate([(40, 20), (20, 40), (30, 30)] * 5):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"image {i}")
    data = config.Data(str(place), 16, max_aspect_ratio=2.0, bucket_step=4, flip=True)
    denoiser = replace(run_config.denoiser, kind=kind)
    dit = DiTSettings("custom", 2, 1, 2, 8)
    cfg = replace(run_config, data=data, denoiser=denoiser, dit=dit)
    assert not list(config.conflicts(cfg))
    loop.run(cfg, tmp_path / "run")
    shapes = {
        tensor.shape[1:]
        for path in (tmp_path / "run" / "latents").iterdir()
        for tensor in weights.tensors([path]).values()
    }
    assert shapes == {(4, 6, 10), (4, 10, 6), (4, 8, 8)}  # of 20 x 12, 12 x 20 and 16 x 16 pixels
    with Image.open(tmp_path / "run" / "samples" / "denoiser-00000012.png") as grid:
        assert grid.width > 8 * 16
    images = Images(open_source(data), data)
    run = opened(cfg, tmp_path / "run" / "model", tmp_path / "run")
    latents.open_cache(tmp_path / "run" / "latents", images, run.model.vae)
    task = DenoiserTask(run)
    seen = {tuple(task.batch(step, range(4))["sample"].shape) for step in range(12)}
    assert seen == {(4, *shape) for shape in shapes}


def test_shards_train_to_the_bits_of_the_folder(run_config, whole, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    names = sorted(image_folder.iterdir())
    for i in range(2):
        with tarfile.open(tmp_path / "shards" / f"{i:06d}.tar", "w") as tar:
            for path in names[i * 12 : i * 12 + 12]:
                tar.add(path, path.name)
    cfg = replace(run_config, data=replace(run_config.data, path=str(tmp_path / "shards")))
    loop.run(cfg, tmp_path / "run")
    assert digests(tmp_path / "run") == digests(whole)


def test_images_lost_while_training_are_passed_over_and_counted(own_data, monkeypatch, tmp_path, capsys):
    """Deleted behind the start: the others take its place, and above the allowed share the run ends with exit code 3."""
    path, fine = Path(own_data.data.path), claim.Claim.data
    (path / "bad.png").write_bytes(b"bad"), (path / "bad.txt").write_text("bad")

    def delete(*arguments):
        fine(*arguments)
        (path / "red-square.png").unlink()

    monkeypatch.setattr(claim.Claim, "data", delete)
    allowed = replace(own_data, data=replace(own_data.data, max_bad_fraction=0.1))
    loop.run(allowed, tmp_path / "run")
    assert (tmp_path / "run" / "model").exists()
    listed = [line.split("\t") for line in (tmp_path / "run" / "skipped.txt").read_text().splitlines()]
    assert [name for name, _ in listed] == ["bad.png", "red-square.png"] and "not a PNG" in listed[0][1]
    lines = [line for line in capsys.readouterr().err.splitlines() if "are left out" in line]
    assert [line.partition(" files")[0].split()[-1] for line in lines] == ["1", "2"] and "skipped.txt" in lines[0]
    with pytest.raises(DataError, match="red-square.png"):
        shutil.copytree(path, tmp_path / "again", ignore=shutil.ignore_patterns("bad.*"))
        (tmp_path / "again" / "red-square.png").write_bytes((path / "red-corner.png").read_bytes())
        (tmp_path / "again" / "red-square.txt").write_text("a red square")
        path = tmp_path / "again"
        loop.run(
            replace(own_data, data=replace(own_data.data, path=str(path), max_bad_fraction=0.01)), tmp_path / "second"
        )


def test_half_a_line_of_metrics_is_dropped(finished, run_config):
    shutil.rmtree(finished / "checkpoints" / "denoiser-00000012")
    lines = (finished / "metrics.jsonl").read_text()
    (finished / "metrics.jsonl").write_text(lines + lines.splitlines()[-1][:20])
    loop.run(run_config, finished)
    steps = [(m["stage"], m["step"], "loss" in m) for m in metrics(finished)]
    assert len(set(steps)) == len(steps) and ("denoiser", 10, True) in steps


# ------------------------------------------------------------------------------------------------- killed and resumed


@pytest.fixture(scope="module")
def reference(forker, tmp_path_factory) -> tuple[dict[str, str], float, int]:
    """(digests, seconds computed, lasting system calls) of a run in a process of its own that is never killed."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    assert forker.run(run_dir) == 0
    *_, calls, seconds = Path(f"{run_dir}.log").read_text().split()
    return digests(run_dir), float(seconds), int(calls)


def check(run_dir: Path, wanted: dict[str, str]) -> None:
    """The finished run has the same bits, no step logged twice, nothing half-written."""
    assert digests(run_dir) == wanted
    steps = [(m["stage"], m["step"], "loss" in m) for m in metrics(run_dir)]
    assert len(set(steps)) == len(steps)
    assert steps.count(("autoencoder", 10, True)) == steps.count(("denoiser", 10, True)) == 1
    assert not [p for p in run_dir.rglob(".*") if p.name != ".lock"]


def test_another_process_trains_to_the_same_bits(whole, reference):
    assert reference[0] == digests(whole)


@pytest.mark.parametrize("seed", range(2))
def test_killed_before_random_system_calls(forker, reference, tmp_path, seed):
    """Up to a hundred times in one run, each time before some rename, link or fsync."""
    rng, codes = np.random.default_rng(seed), []
    while not codes or codes[-1]:
        codes.append(forker.run(tmp_path / "run", int(rng.integers(10, 90)) if len(codes) < 30 else 0))
        assert codes[-1] in (0, -signal.SIGKILL), Path(f"{tmp_path}/run.log").read_text()
    assert len(codes) > 2
    check(tmp_path / "run", reference[0])


def test_killed_before_every_rename_of_the_end(forker, reference, tmp_path):
    """The last save of all, where nothing comes after that would mend it: model, checkpoint, pruning."""
    base, codes = tmp_path / "base", []
    assert forker.run(base, reference[2] - 30) == -signal.SIGKILL
    while not codes or codes[-1]:
        run_dir = Path(shutil.copytree(base, tmp_path / f"run{len(codes) + 1}"))
        codes.append(forker.run(run_dir, len(codes) + 1, ["rename"]))
        assert codes[-1] in (0, -signal.SIGKILL) and forker.run(run_dir) == 0, Path(f"{run_dir}.log").read_text()
        check(run_dir, reference[0])
    assert len(codes) > 5


def test_the_command_is_stopped_and_goes_on(config_path, reference, tmp_path):
    """SIGTERM, then SIGINT, then to the end: exit codes, one line that says how to go on, the same bits."""
    command = [sys.executable, "-m", "tinydiff", "train", str(config_path), "--run-dir", str(tmp_path / "run")]
    for number, wait_for in ((signal.SIGTERM, None), (signal.SIGINT, "going on from step")):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
        wait_until(lambda: (tmp_path / "run" / "tinydiff.toml").exists())
        said = ""
        while wait_for and wait_for not in said:
            said += process.stderr.readline()
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 128 + number, err
        last = err.splitlines()[-1]
        assert out == "" and "run the same command to go on" in last and "Traceback" not in err
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'run' / 'model'}\n"), done.stderr
    check(tmp_path / "run", reference[0])


def test_a_second_process_is_refused(forker, tmp_path):
    (tmp_path / "run").mkdir()
    with files.lock(tmp_path / "run"):
        assert forker.run(tmp_path / "run") == 6
    assert f"in use by process {os.getpid()}" in Path(f"{tmp_path}/run.log").read_text()


def test_the_tokenizer_of_a_run_is_kept(whole):
    assert Tokenizer.load(whole / "tokenizer").encode(["a red square"]).tolist() == (
        Tokenizer.load(whole / "model" / "tokenizer").encode(["a red square"]).tolist()
    )


def opened(cfg: config.Config, model: Path, run_dir: Path) -> Run:
    """A run with its data and a model, before any stage."""
    run = Run(loop.Runtime(cfg), run_dir)
    run.data, run.model = Images(open_source(cfg.data), cfg.data), folder.load(Source(model))
    return run


def module(task) -> nn.Module:
    """What the task's only player learns."""
    (player,) = task.players.values()
    return player.module


def tensors(batch) -> list[torch.Tensor]:
    return [t for value in batch.values() for t in (tensors(value) if isinstance(value, dict) else [value])]


def test_a_checkpoint_of_the_format_before_is_gone_on_with(finished, whole, run_config, capsys):
    """Without buffers, of one player whose name its tensors lack."""
    for stage in ("autoencoder", "denoiser"):
        shutil.rmtree(finished / "checkpoints" / f"{stage}-00000012")
        checkpoint = finished / "checkpoints" / f"{stage}-00000009"
        about = files.read_json(checkpoint / "state.json")
        kinds = {kind: weights.tensors([checkpoint / f"{kind}.safetensors"]) for kind in state.KINDS[:-1]}
        with files.committed(finished / "older") as older:
            for kind, held in kinds.items():
                named = {name.removeprefix(f"{stage}."): tensor for name, tensor in held.items()}
                folder.save_tensors(named, older / f"{kind}.safetensors", None)
            about |= {"format": 2, "updates": about["updates"][stage]}
            (older / "state.json").write_text(json.dumps(about))
        shutil.rmtree(checkpoint)
        (finished / "older").rename(checkpoint)
    shutil.rmtree(finished / "model")
    loop.run(run_config, finished)
    assert capsys.readouterr().err.count("going on from step 9") == 2
    assert digests(finished) == digests(whole)
