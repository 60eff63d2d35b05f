"""Where new things enter: a denoiser and a stage of `toy.py`, each one entry of a table, do all that our own do."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tinydiff import config
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.data.dataset import Images, open_source
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.schedules import linear
from tinydiff.schema import to_toml
from tinydiff.training import denoiser
from tinydiff.training.run import Run
from tinydiff.training.runtime import Runtime

SCRIPT = Path(__file__).with_name("toy.py")
KINDS = ("weights", "average", "exp_avg", "exp_avg_sq", "buffers")


def toy(*arguments: str | Path, kill: str = "", **environment: str) -> str:
    """What `tinydiff` prints with the toys; killed by itself where `kill` names a checkpoint."""
    env = os.environ | {"TOY_KILL": kill, "TOY_NAN": "critic"} | environment
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    return done.stdout


def tensors(run: Path, checkpoint: str) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds."""
    files = {kind: load_file(run / "checkpoints" / checkpoint / f"{kind}.safetensors") for kind in KINDS}
    return {f"{kind} {name}": tensor for kind, each in files.items() for name, tensor in each.items()}


def measured(run: Path) -> list[dict]:
    """The lines of metrics without what a clock says."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    timed = ("steps_per_second", "images_per_second", "memory")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


@pytest.fixture(scope="module")
def runs(run_config: config.Config, tmp_path_factory) -> Callable[[str], Path]:
    """A function (name) -> run directory: "whole", or killed in both stages that the toys have and gone on with."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toy.toml").write_text(to_toml(run_config).replace('kind = "unet"', 'kind = "toy"'))
    short = "train.toy.steps=12", "train.toy.batch_size=4", "train.toy.save_every=3", "train.toy.accumulate=2"
    arguments = [part for each in (*short, "train.toy.warmup=2", "toy.width=6") for part in ("--set", each)]

    def make(name: str) -> Path:
        run = folder / name
        train = ("train", folder / "toy.toml", *arguments, "--run-dir", run)
        if not run.exists():
            for checkpoint in ("denoiser-6", "toy-6") if name == "killed" else ():
                toy(*train, kill=checkpoint)
            assert toy(*train).strip() == str(run / "model")
        return run

    return make


@pytest.mark.parametrize("checkpoint", ["denoiser-00000012", "toy-00000012"])
def test_a_killed_run_of_toys_ends_in_the_same_bits(runs, checkpoint):
    one, two = (tensors(runs(name), checkpoint) for name in ("whole", "killed"))
    assert one.keys() == two.keys() and len(one) > 20
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert measured(runs("whole")) == measured(runs("killed"))


def test_both_players_learn_and_buffers_are_kept_as_they_are(runs):
    before, after = (tensors(runs("whole"), f"toy-{step:08d}") for step in (9, 12))
    for player in ("generator", "critic"):
        assert not torch.equal(before[f"weights {player}.0.weight"], after[f"weights {player}.0.weight"])
        assert not torch.equal(after[f"average {player}.0.weight"], after[f"weights {player}.0.weight"])
        assert not torch.equal(before[f"buffers {player}.1.running_mean"], after[f"buffers {player}.1.running_mean"])
    assert not any(name.startswith("average") and "running" in name for name in after)
    assert after["buffers generator.1.num_batches_tracked"] == (12 * 2 - 1) * 2  # both losses draw, in two parts


def test_what_is_no_number_leaves_that_players_update_out(runs):
    rows = measured(runs("whole"))
    left = [row for row in rows if "skipped" in row]
    assert [(row["stage"], row["step"]) for row in left] == [("toy", 7)] and "critic: loss nan" in str(left[0])
    told = next(row for row in rows if row["stage"] == "toy" and row["step"] == 10)
    assert math.isfinite(told["loss"])


def test_losses_of_both_players_are_measured_and_shown(runs):
    row = next(row for row in measured(runs("whole")) if row["stage"] == "toy" and row["step"] == 10)
    assert {"loss", "grad_norm", "lr", "critic_loss", "critic_grad_norm", "critic_real"} <= row.keys()
    report = (runs("whole") / "report.html").read_text()
    assert "<h2>toy</h2>" in report and "12 of 12 steps (finished)" in report


def test_a_stage_may_end_the_training(runs):
    assert "toy" in toy("train", "--dry-run") and "[toy]" in toy("train", "--dry-run")
    path = runs("whole")
    assert toy("train", path / "tinydiff.toml", "--stage", "toy", "--run-dir", path).strip() == str(path / "model")


@pytest.fixture(scope="module")
def bundle(runs) -> Path:
    """The toy exported, which compares both runtimes at sizes that it was not traced at."""
    out = runs("whole").parent / "bundle"
    if not out.exists():
        rows = [json.loads(line) for line in toy("export", runs("whole"), "-o", out, "--json").splitlines()]
        assert [row["graph"] for row in rows] == ["text_encoder", "transformer", "vae_encoder", "vae_decoder", "image"]
    return out


def test_a_toy_draws_alike_on_both_runtimes(runs, bundle, tmp_path):
    drawn = {}
    for backend in ("torch", "onnx"):
        flags = ("-s", "1", "--backend", backend, "-o", tmp_path / f"{backend}.png", "--steps", "4")
        toy("generate", "a (red:1.3) square AND a stripe", "-m", bundle, *flags, "-n", "blue")
        drawn[backend] = np.array(Image.open(tmp_path / f"{backend}.png")).astype(int)
    assert np.abs(drawn["torch"] - drawn["onnx"]).max() <= 1


def test_a_toy_is_told_the_text_and_the_size(runs):
    """Each condition of its own changes what it predicts."""
    import toy as toys

    toys.register()
    from tinydiff.backends.pytorch import TorchBackend
    from tinydiff.checkpoints.source import Source

    try:
        backend = TorchBackend.open(Source(runs("whole") / "model"), "cpu")
        ids = {name: each.encode(["a red square"]) for name, each in backend.tokenizers.items()}
        told = backend.encode_text(ids) | {"sizes": np.ones((1, 2), np.float32)}
        assert {name: array.shape for name, array in told.items()} == {
            "encoder_hidden_states": (1, 16, 16),
            "text_embeds": (1, 16),
            "sizes": (1, 2),
        }
        x = np.ones((1, 4, 8, 8), np.float32)
        usual = backend.denoise(x, 5.0, told)
        for name, array in told.items():
            assert np.abs(backend.denoise(x, 5.0, told | {name: array + 1}) - usual).max() > 1e-6
    finally:
        toys.DENOISERS.pop("toy")
        toys.STAGES.pop("toy")


def test_a_toy_is_inspected(runs, bundle):
    told = json.loads(toy("inspect", runs("whole"), "--json"))
    toy_cost = told["cost"]["networks"]["transformer"]
    assert told["components"]["transformer"]["parameters"] == toy_cost["parameters"] > 0 and toy_cost["reach"] == 5
    assert told["no_diffusers_pipeline"] == "diffusers has no such denoiser"
    printed = toy("inspect", runs("whole") / "tinydiff.toml")
    assert "# transformer: " in printed and "receptive field 5" in printed


# ---- a task's model may be opened, and its loss may compare all rows ----------------------------------------------------


def test_a_task_takes_levels_prediction_and_scaling_of_an_opened_model(make_model, tiny_config, tmp_path):
    """Not those of the configuration that it trains with."""
    path = make_model(replace(tiny_config, diffusion=config.Diffusion(schedule="linear", prediction="epsilon")))
    with Runtime(tiny_config) as runtime:
        run = Run(runtime, tmp_path)
        run.data = Images(open_source(tiny_config.data), tiny_config.data)
        run.model = folder.load(Source(path))
        task = denoiser.DenoiserTask(run)
        assert task.levels == linear() and task.prediction is PREDICTIONS["epsilon"]
        assert run.model.scaling_factor == 0.8 != task.latents.scaling_factor  # its denoiser knows latents at no other
        row, stored = task.batch(3, range(1, 2)), task.latents.rows(task.order(3)[1:2])
        level = next(level for level in linear() if level.t == row["timestep"].item())
        x0 = (row["sample"] - row["target"] * level.sigma) / level.alpha
        mean, std = (part * 0.8 for part in stored)
        assert (abs(x0 - mean) < 6 * std + 1e-4).all()
        loss, _ = task.loss("denoiser", row)
        assert loss.isfinite()


GATHER = """
import os, sys, torch
from torch.nn.parallel import DistributedDataParallel
from tinydiff.training.parallel import World
torch.manual_seed(0)
net, rows = torch.nn.Linear(3, 2), torch.arange(24.0).reshape(8, 3) % 5
with World(torch.device("cpu"), 60) as world:
    mine = world.rows(8, False)
    spread = DistributedDataParallel(net) if world.size > 1 else net
    vectors = world.gather(torch.nn.functional.normalize(spread(rows[mine.start : mine.stop])))
    logits = vectors @ vectors.T * 3
    torch.nn.functional.cross_entropy(logits, torch.arange(8).flip(0)).backward()
    if world.rank == 0:
        torch.save([net.weight.grad, net.bias.grad, vectors.detach()], sys.argv[1])
os._exit(0)  # one interpreter in ten whose DDP used gloo is aborted by torch while it ends
"""


def test_a_loss_that_compares_all_rows_has_the_gradient_of_one_process(tmp_path):
    """A contrastive loss over two processes, each with half of the batch."""
    (tmp_path / "gather.py").write_text(GATHER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, command in (("one", [sys.executable]), ("two", torchrun)):
        done = subprocess.run(
            [*command, str(tmp_path / "gather.py"), str(tmp_path / name)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    for one, two in zip(torch.load(tmp_path / "one"), torch.load(tmp_path / "two"), strict=True):
        torch.testing.assert_close(one, two)
