"""Recipes of training: each against an independent computation, and all at once killed, resumed and shared out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import said, untimed
from safetensors.torch import load_file
from test_training import opened
from torch import nn
from torch.nn import functional as F

from tinydiff import config
from tinydiff.checkpoints.scheduler import read, write
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError, UsageError, UserError
from tinydiff.images import to_pixels
from tinydiff.measure.features import open_features
from tinydiff.models.attention import Attention
from tinydiff.networks.dit import DiT as DiTSettings
from tinydiff.networks.network import WEIGHTS
from tinydiff.schema import to_toml
from tinydiff.stages import Stage
from tinydiff.training import loop, state
from tinydiff.training.denoiser import DenoiserTask
from tinydiff.training.optim import Muon, matrix, optimizer

# ---------------------------------------------------------------------------------------------------------------- Muon


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Embedding(7, 6), nn.Linear(6, 8, bias=False), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 3, 1)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def polar(update: np.ndarray) -> np.ndarray:
    """The quintic that Muon iterates, applied to singular values (Jordan et al. 2024), in double precision."""
    u, s, v = np.linalg.svd(update, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ np.diag(s) @ v


def test_a_kernel_is_stepped_as_the_matrix_of_its_rows():
    """Three steps of plain numpy: momentum, Nesterov, orthogonalisation by singular values, the length of AdamW's update."""
    kernel = network()[2].weight
    learner, rng = Muon([kernel], [], Stage(lr=0.01, weight_decay=0.1)), np.random.default_rng(0)
    mine, momentum = kernel.detach().double().numpy().reshape(6, 36).copy(), np.zeros((6, 36))
    for _ in range(3):
        gradient = rng.standard_normal((6, 36))
        kernel.grad = torch.tensor(gradient.reshape(6, 4, 3, 3)).float().to(memory_format=torch.channels_last)
        learner.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        mine = mine * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 6 * polar(0.05 * gradient + 0.95 * momentum)
    ours = kernel.detach().numpy().reshape(6, 36)
    assert np.abs(ours - mine).max() < 0.03 * np.abs(mine - network()[2].weight.detach().numpy().reshape(6, 36)).max()
    np.testing.assert_allclose(learner.state[kernel]["exp_avg"].numpy().reshape(6, 36), momentum, atol=1e-6)


def test_matrices_are_views_of_kernels_in_any_layout():
    for kernel in (torch.randn(4, 3, 2, 5), torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last)):
        view = matrix(kernel, kernel)
        assert view.shape == (4, 30) and view.data_ptr() == kernel.data_ptr()
        assert torch.equal(view.sum(1), kernel.sum((1, 2, 3))) or torch.allclose(view.sum(1), kernel.sum((1, 2, 3)))
        assert torch.equal(matrix(kernel.contiguous(), kernel), view)


def test_vectors_and_embeddings_are_left_to_adamw():
    net = network()
    named = dict(net.named_parameters())
    by, plain = optimizer(net, named, Stage(optimizer="muon")), optimizer(net, named, Stage())
    assert isinstance(by, Muon) and set(by.views) == {net[1].weight, net[2].weight, net[3].weight}
    before = {name: p.detach().clone() for name, p in named.items()}
    after = []
    for each in (by, plain):
        for name, p in named.items():
            p.data.copy_(before[name])
            p.grad = torch.ones_like(p)
        each.step()
        after.append({name: p.detach().clone() for name, p in named.items()})
    same = {name for name in named if torch.equal(after[0][name], after[1][name])}
    assert same == {"0.weight", "2.bias", "3.bias"}


def test_a_rate_serves_both(tiny_config):
    """The root mean square of a matrix's first update is a fifth of the rate, to a factor that its iterations leave."""
    net = network()
    by = optimizer(net, dict(net.named_parameters()), Stage(optimizer="muon", lr=1.0, weight_decay=0))
    for group in by.param_groups:
        group["lr"] = 0.1
    before = {p: p.detach().clone() for p in net.parameters()}
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    by.step()
    for p in by.views:
        assert 0.6 < (p - before[p]).square().mean().sqrt().item() / 0.02 < 1.3
    assert (net[2].bias - before[net[2].bias]).abs().max().item() == pytest.approx(0.1, rel=1e-4)


def test_a_parameter_without_a_gradient_stays():
    net = network()
    by = optimizer(net, dict(net.named_parameters()), Stage(optimizer="muon"))
    before = [p.detach().clone() for p in net.parameters()]
    by.step()
    assert all(map(torch.equal, before, [p.detach() for p in net.parameters()]))
    assert not any(by.state[p] for p in by.views)


def test_muon_of_divided_matrices_is_refused():
    with pytest.raises(UsageError, match="denoiser.optimizer: muon needs matrices whole"):
        config.load(None, ["train.denoiser.optimizer=muon", "train.parallel=fsdp"])


# -------------------------------------------------------------------------------------------- levels and their weights


def test_shift_grows_with_the_side_of_the_latents():
    """By the levels that a written scheduler gives: rho is multiplied by 8 / 4, sqrt of the ratio of latents."""
    flow = ["diffusion.schedule=flow", "diffusion.prediction=flow"]
    plain, shifted = (config.load(None, [*flow, *more]) for more in ([], ["diffusion.shift_side=4"]))
    assert plain.latents["sample_size"] == 8
    ours, theirs = (read(write(each), None, True).schedule for each in (shifted, plain))
    for a, b in zip(ours[:-1:100], theirs[:-1:100], strict=True):
        assert a.sigma / a.alpha == pytest.approx(2 * b.sigma / b.alpha)
    with pytest.raises(UsageError, match="shift_side: only the schedule flow"):
        config.load(None, ["diffusion.shift_side=4"])


def test_two_weights_of_the_loss_are_refused():
    with pytest.raises(UsageError, match="set one of the two"):
        config.load(None, ["diffusion.loss_weight=v", "diffusion.min_snr_gamma=5"])


@pytest.fixture
def task_of(tiny_config, tiny_model, tmp_path):
    """A function (diffusion keys) -> the denoiser's task over the same random weights."""

    def make(**keys) -> DenoiserTask:
        cfg = replace(tiny_config, diffusion=replace(tiny_config.diffusion, **keys))
        return DenoiserTask(opened(cfg, tiny_model, tmp_path))

    return make


def test_logit_normal_levels_have_the_mean_and_deviation_asked_for(task_of):
    task = task_of(timestep_density="logit_normal", logit_mean=0.5, logit_std=0.4)
    levels = np.array([task.draw(step, 0, 0, (1, 1, 1))[0] for step in range(800)])
    logits = np.log((levels + 0.5) / (999.5 - levels))
    assert logits.mean() == pytest.approx(0.5, abs=0.05) and logits.std() == pytest.approx(0.4, abs=0.04)


def test_contrastive_loss_aims_away_from_another_image(task_of):
    """Up to what no weight changes, it is (1 - w) times the error from (target - w other) / (1 - w), by its gradient."""
    task = task_of(contrastive_weight=0.25)
    batch, plain = task.batch(3, range(4)), task_of().batch(3, range(4))
    assert torch.equal(batch["target"], plain["target"]) and torch.equal(batch["sample"], plain["sample"])
    assert torch.equal(task.batch(3, range(2, 3))["other"], batch["other"][2:3])  # whoever computes which rows
    output = torch.randn_like(batch["target"], requires_grad=True)
    task.players["denoiser"].network = lambda *_: (output, None, [])
    (gradient,) = torch.autograd.grad(task.loss("denoiser", batch)[0], output)
    aim = (batch["target"] - 0.25 * batch["other"]) / 0.75
    torch.testing.assert_close(gradient, 2 * 0.75 * (output.detach() - aim) / output.numel())


def test_the_other_target_is_the_next_image_s_at_this_level(task_of):
    """Of noise and latents drawn for the next row, in a batch whose levels differ."""
    task = task_of(contrastive_weight=0.1)
    batch, rows = task.batch(0, range(4)), [task.noised(*task.rows_of(0, [i])) for i in range(4)]
    for i in range(4):
        (level,), _, _, _ = rows[i]
        _, _, x0, noise = rows[(i + 1) % 4]
        alpha, sigma, _ = task.levels[level]
        torch.testing.assert_close(batch["other"][i : i + 1], noise * alpha - x0 * sigma)


# -------------------------------------------------------------------------------------------------------------- QK-norm


@pytest.mark.peers
@pytest.mark.parametrize("context", [None, 12])
def test_normalised_attention_is_that_of_diffusers(context):
    from diffusers.models.attention_processor import Attention as Theirs

    torch.manual_seed(0)
    theirs = Theirs(16, context, heads=4, dim_head=4, qk_norm="rms_norm", eps=1e-6)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = Attention(16, 4, context, qk_norm=True)
    ours.load_state_dict(theirs.state_dict())
    x, text = torch.randn(2, 5, 16), torch.randn(2, 3, 12) if context else None
    torch.testing.assert_close(ours(x, text), theirs(x, text))
    with torch.autocast("cpu", torch.bfloat16):  # which warns of mixed types unless they are cast
        assert ours(x, text).dtype == torch.bfloat16


def test_a_model_with_it_says_that_diffusers_has_none(make_model, tiny_config):
    path = make_model(replace(tiny_config, unet=replace(tiny_config.unet, qk_norm=True)))
    source = Source(path)
    assert source.configs["unet"]["qk_norm"] is True
    assert "has no qk_norm" in source.configs["model_index"]["_no_diffusers_pipeline"]
    names = {name for name in load_file(path / "unet" / WEIGHTS) if ".norm_q." in name or ".norm_k." in name}
    assert len(names) == 4 * len({name.partition(".attn")[0] for name in names}) > 0  # of two attentions a block


def test_shared_heads_cannot_have_one_norm():
    shared = ["denoiser.kind=dit", "train.parallel=fsdp", "train.tensor_parallel=2", "dit.qk_norm=true"]
    with pytest.raises(UsageError, match=r"dit\.qk_norm: heads that processes share out"):
        config.load(None, shared)


# ------------------------------------------------------------------------------------------------------------ alignment


def of_denoiser(cfg: config.Config, **keys) -> config.Config:
    return replace(cfg, train=replace(cfg.train, denoiser=replace(cfg.train.denoiser, **keys)))


def test_alignment_is_the_cosine_with_features_of_the_images(tiny_config, tiny_model, tmp_path):
    """The middle by the U-Net's own halves, the features by the network itself, the cosine by its definition."""
    cfg = of_denoiser(tiny_config, alignment_weight=0.5)
    aligned, plain = (DenoiserTask(opened(each, tiny_model, tmp_path)) for each in (cfg, tiny_config))
    batch = aligned.batch(2, range(4))
    pixels = torch.from_numpy(to_pixels(aligned.data.batch(aligned.order(2))))
    large = F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
    with torch.no_grad():
        seen = F.adaptive_avg_pool2d(open_features().network.maps(large)[-1], (4, 4))
        torch.testing.assert_close(batch["map"], seen, rtol=1e-4, atol=1e-4)
        (loss, terms), (before, _) = (each.loss("denoiser", batch) for each in (aligned, plain))
        net: Any = aligned.model.denoiser
        context = aligned.model.text_encoders["text_encoder"](batch["tokens"]["text_encoder"])[0]
        time = net.embedded(batch["sample"], batch["timestep"])
        middle = net.mid_block(net.down(batch["sample"], time, context)[0], time, context)
        head: Any = aligned.players["denoiser"].module
        read = head.alignment(middle.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C, 4, 4)
    cosine = (read * seen).sum(1) / read.norm(dim=1) / seen.norm(dim=1)
    assert terms["alignment"][0].item() == pytest.approx(cosine.mean().item(), abs=1e-5)
    assert (loss - before).item() == pytest.approx(0.5 * (1 - cosine.mean().item()), abs=1e-5)


def test_a_transformer_is_aligned_at_its_third(tiny_config, image_folder, tmp_path):
    dit = DiTSettings("custom", 2, 3, 2, 8)
    cfg = replace(of_denoiser(tiny_config, alignment_weight=0.5, steps=2), dit=dit, denoiser=config.Denoiser("dit"))
    cfg = replace(cfg, train=replace(cfg.train, autoencoder=replace(cfg.train.autoencoder, steps=2)))
    loop.run(cfg, tmp_path)
    assert all(
        0 < abs(row["alignment"]) < 1 for row in untimed(tmp_path) if row["stage"] == "denoiser" and "loss" in row
    )
    assert not any("alignment" in name for name in load_file(tmp_path / "model/transformer" / WEIGHTS))


def test_features_that_are_missing_are_told_before_anything_is_written(tiny_config, tmp_path):
    cfg = of_denoiser(tiny_config, alignment_weight=0.5, features=str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match=r"none\.pth"):
        loop.run(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- all at once


RECIPE = (
    "train.autoencoder.optimizer=muon",
    "train.denoiser.optimizer=muon",
    "diffusion.prediction=sample",
    "diffusion.loss_weight=v",
    "diffusion.timestep_density=logit_normal",
    "diffusion.logit_mean=0.3",
    "diffusion.contrastive_weight=0.05",
    "unet.qk_norm=true",
    "train.denoiser.alignment_weight=0.5",
    'data.suffix=", small, drawn, flat"',
    "data.shuffle_tags=true",
    "data.keep_tags=1",
    "data.tag_dropout=0.3",
)


@pytest.fixture(scope="module")
def recipe_path(config_path: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(to_toml(config.load(config_path, RECIPE)))
    return path


def test_a_killed_run_of_all_recipes_ends_in_the_same_bits(forker, recipe_path, tmp_path):
    runs, rng = [tmp_path / "whole", tmp_path / "killed"], np.random.default_rng(0)
    assert forker.run(runs[0], config_path=recipe_path) == 0, said(runs[0])
    codes = []
    while not codes or codes[-1]:
        at = int(rng.integers(20, 120)) if len(codes) < 20 else 0
        codes.append(forker.run(runs[1], at, config_path=recipe_path))
        assert codes[-1] in (0, -9), said(runs[1])
    assert len(codes) > 2
    one, other = ({p.relative_to(run): p.read_bytes() for p in run.glob("checkpoints/*/*.safetensors")} for run in runs)
    assert one == other and untimed(runs[0]) == untimed(runs[1])
    kinds = {p.name for p in one}
    assert kinds == {f"{kind}.safetensors" for kind in state.KINDS}


def test_another_optimizer_s_checkpoint_is_refused(recipe_path, tmp_path):
    cfg = config.load(recipe_path)
    loop.run(cfg, tmp_path / "run", last="autoencoder")
    stage = replace(cfg.train.autoencoder, optimizer="adamw", steps=15)
    with pytest.raises(ModelError, match="--fresh"):
        loop.run(replace(cfg, train=replace(cfg.train, autoencoder=stage)), tmp_path / "run", accept=True)


def test_accumulated_parts_are_the_whole_batch(recipe_path, tmp_path):
    cfg = config.load(recipe_path)
    stage = replace(cfg.train.denoiser, accumulate=2)
    parts = replace(cfg, train=replace(cfg.train, denoiser=stage))
    losses = []
    for name, each in (("one", cfg), ("two", parts)):
        loop.run(each, tmp_path / name)
        losses.append([row["loss"] for row in untimed(tmp_path / name) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3) and all(map(math.isfinite, losses[0]))
