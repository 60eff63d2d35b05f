"""Changes of low rank that a run trains: what they compute, that they alone are learnt and saved, and that others read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import OFTEN, contents, digests, killed_often, sha256
from tensors import noise
from test_lora import REQUEST, both, pipeline
from test_lora import base as base
from test_stable_diffusion import draws_alike
from torch import nn

from tinydiff import config, start
from tinydiff.adapters import lora
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.header import header
from tinydiff.checkpoints.source import Adapter, Source
from tinydiff.errors import ModelError, UsageError
from tinydiff.schema import to_toml
from tinydiff.training import loop
from tinydiff.training.lora import Change, LoraTask

pytestmark = pytest.mark.filterwarnings("ignore")
FILE = Path("adapter") / lora.FILE
QUICK = ["train.threads=1", "train.precision=fp32", "train.device=cpu", "train.validation_samples=0", "data.held_out=0"]
FEW = {"steps": 6, "batch_size": 8, "warmup": 1, "lr": 0.02, "save_every": 2, "sample_every": 100, "ema": 0.5}
OWN = {"rank": 3, "alpha": 6, "targets": "to_q, to_k, to_v, to_out.0", "text_encoder": "false"}
ALL = 'train.lora.targets="to_q, to_k, to_v, to_out.0, conv1, conv_shortcut, time_emb_proj, downsamplers.0.conv"'


@pytest.fixture(scope="module")
def settings_of(tiny_model: Path, image_folder: Path) -> Callable[..., config.Config]:
    """A function of settings -> the configuration of a run of a few steps of changes of a tiny model."""

    def make(*more: str) -> config.Config:
        few = [f"train.lora.{key}={value}" for key, value in (OWN | FEW).items()]
        own = [f"train.base={tiny_model}", "train.adapter=lora", f"data.path={image_folder}", "data.resolution=16"]
        return config.load(None, [*own, *QUICK, *few, *more], model=start.tables)

    return make


@pytest.fixture(scope="module")
def trained(settings_of, tmp_path_factory) -> Callable[..., tuple[Path, LoraTask]]:
    """A function of settings -> the directory of a run that nothing disturbed, and its task, which has the averaged changes."""

    @cache
    def make(*more: str) -> tuple[Path, LoraTask]:
        run_dir, tasks, stage = tmp_path_factory.mktemp("lora") / "run", list[LoraTask](), loop.stage
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "stage", lambda run, task: (tasks.append(task), stage(run, task)))
            assert loop.run(settings_of(*more), run_dir) == run_dir / "adapter"
        return run_dir, tasks[0]

    return make


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Linear(5, 7, bias=False),
        nn.Conv2d(6, 5, 1),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
    ],
)
@pytest.mark.parametrize("dora", [False, True])
def test_a_change_is_that_of_its_layer_s_weight(dora, layer):
    """By the formula of the paper, W + alpha / rank times up @ down; nothing before the first update. DoRA's is PEFT's."""
    change = Change(layer, 2, 3.0, dora)
    x = noise(3, 5, layer.in_features) if isinstance(layer, nn.Linear) else noise(2, layer.in_channels, 6, 6)
    assert change(x).abs().max() == 0 < change.down.weight.std()
    with torch.no_grad():
        assert torch.allclose(change.after(layer, x, layer(x)), layer(x), atol=1e-6)
        nn.init.normal_(change.up.weight)
        lengths = change.magnitude.mul_(1.5).numpy() if change.magnitude is not None else None
        before, changed = layer(x), change.after(layer, x, layer(x))
        low = lora.LowRank(change.down.weight.numpy(), change.up.weight.numpy(), 3.0, magnitude=lengths)
        layer.weight.copy_(torch.from_numpy(low.merged(layer.weight.numpy())))
        assert torch.allclose(changed, layer(x), atol=1e-5) and (changed - before).std() > 0.1


@pytest.mark.parametrize(
    ("style", "dora"), [("diffusers", False), ("kohya", False), ("diffusers", True), ("kohya", True)]
)
def test_what_is_published_changes_the_model_as_the_run_s_own_network(style, dora, trained, tiny_model):
    dora_too = [f"train.lora.dora={str(dora).lower()}"]
    run_dir, task = trained(f"train.lora.style={style}", "train.lora.text_encoder=true", ALL, *dora_too)
    source, plain = Source(tiny_model, adapters=(Adapter(run_dir / FILE),)), folder.load(Source(tiny_model))
    source.check()
    changed, x = folder.load(source), noise(2, 4, 8, 8)
    ids = torch.from_numpy(task.model.tokenizers["text_encoder"].encode(["a red square", "a blue corner"]))
    with torch.no_grad():
        texts = [model.text_encoders["text_encoder"](ids)[0] for model in (task.model, changed, plain)]
        drawn = [m.denoiser(x, torch.tensor([500.0]), texts[0]) for m in (task.model, changed, plain)]
    for ours, theirs, without in (texts, drawn):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.std() < 1e-2 * (ours - without).std()


def test_checkpoints_hold_the_changes_alone(trained, tiny_model):
    before = contents(tiny_model)
    run_dir, task = trained()
    stored = header(run_dir / "checkpoints" / "lora-00000006" / "weights.safetensors").tensors
    assert all(".change.down." in name or ".change.up." in name for name in stored)
    assert len(stored) == 2 * len(task.layers) == 2 * sum(name.endswith(ENDS) for name in layers_of(tiny_model))
    size = sum(p.stat().st_size for p in (run_dir / "checkpoints" / "lora-00000006").glob("*.safetensors"))
    assert size < 0.5 * sum(p.stat().st_size for p in tiny_model.rglob("*.safetensors"))
    assert contents(tiny_model) == before
    assert not (run_dir / "model").exists() and (run_dir / "samples" / "lora-00000006.png").exists()


ENDS = (".to_q", ".to_k", ".to_v", ".to_out.0")


def layers_of(path: Path) -> list[str]:
    return [name.removesuffix(".weight") for name in Source(path).tensors("unet") if name.endswith(".weight")]


def test_a_run_killed_again_and_again_ends_in_the_same_bits(trained, settings_of, forker, tiny_model, tmp_path):
    often, before = [f"train.lora.{key}" for key in OFTEN], contents(tiny_model)
    (tmp_path / "c.toml").write_text(to_toml(settings_of(*often)))
    killed_often(forker, tmp_path / "run", tmp_path / "c.toml")
    assert digests(tmp_path / "run") == digests(trained(*often)[0]) and contents(tiny_model) == before


def test_the_same_changes_are_the_same_bytes(tmp_path):
    changes = {"unet.conv_in": lora.LowRank(noise(2, 4, 1, 1).numpy(), noise(8, 2, 1, 1).numpy(), 2.0)}
    for i in range(16):
        lora.write(tmp_path / f"{i}.safetensors", changes)
    assert len(sha256(tmp_path, tmp_path.iterdir())) == 16 > 1 == len({*sha256(tmp_path, tmp_path.iterdir()).values()})


def test_a_finished_run_mends_its_file(trained, settings_of, tmp_path):
    run_dir = Path(shutil.copytree(trained()[0], tmp_path / "run"))
    (run_dir / FILE).write_bytes(b"damaged")
    assert loop.run(settings_of(), run_dir) == run_dir / "adapter"
    assert digests(run_dir) == digests(trained()[0])


@pytest.mark.peers
@pytest.mark.parametrize(("style", "dora"), [("diffusers", False), ("kohya", False), ("diffusers", True)])
def test_diffusers_loads_it_and_draws_the_same(style, dora, base, image_folder, tmp_path):
    own = [f"train.base={base}", "train.adapter=lora", f"data.path={image_folder}", "data.resolution=16", *QUICK]
    few = [f"train.lora.{key}={value}" for key, value in (FEW | {"rank": 3, "steps": 3, "alpha": 2}).items()]
    truths = {"dora": dora, "text_encoder": not dora}  # of text encoders diffusers does not take DoRA's lengths
    more = [f"train.lora.style={style}", *(f"train.lora.{key}={str(each).lower()}" for key, each in truths.items())]
    path = loop.run(config.load(None, [*own, *few, *more, "generate.steps=1"], model=start.tables), tmp_path / "run")
    pipe = pipeline(base)
    plain = both(Source(base), pipe)
    plain_picture = draws_alike(Source(base), pipe, REQUEST)
    pipe.load_lora_weights(path)
    source = Source(base, adapters=(Adapter(path / lora.FILE),))
    for name, (ours, theirs) in both(source, pipe).items():
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.std(), name
        assert theirs.std() < 100 * (ours - plain[name][0]).std() or (dora and name == "text"), name
    assert (np.abs(draws_alike(source, pipe, REQUEST) - plain_picture) > 1).mean() > 0.3


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            ["train.lora.rank=17"],
            "train.lora.rank: 17 is above 16, the shorter side of unet.down_blocks.0.attentions.0",
        ),
        (["train.lora.targets=to_q, to_z"], "train.lora.targets: 'to_z' ends the name of no layer; there are unet."),
        (["train.lora.targets= , "], "train.lora.targets: '' ends the name of no layer"),
        (["train.tensor_parallel=2"], "train.tensor_parallel: only a dit's matrices are shared"),
    ],
)
def test_what_cannot_be_changed_is_refused_before_anything_is_written(own, says, settings_of, tmp_path):
    with pytest.raises(UsageError) as caught:
        loop.run(settings_of(*own), tmp_path / "run")
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_other_ranks_are_another_run(trained, settings_of, tmp_path):
    run_dir = Path(shutil.copytree(trained()[0], tmp_path / "run"))
    with pytest.raises(UsageError, match=r"train\.lora\.rank \(3 -> 2\)"):
        loop.run(settings_of("train.lora.rank=2"), run_dir)
    state = json.loads((run_dir / "checkpoints" / "lora-00000006" / "state.json").read_text())
    assert state["task"].keys() >= {"autoencoder", "frozen_text"}


def test_settings_of_stages_that_a_run_does_not_have_are_free(trained, settings_of, tmp_path):
    run_dir = Path(shutil.copytree(trained()[0], tmp_path / "run"))
    for more in (("train.denoiser.lr=0.5", "train.autoencoder.steps=3"), ("train.control.condition=colour",)):
        assert loop.run(settings_of(*more), run_dir) == run_dir / "adapter"
    assert digests(run_dir) == digests(trained()[0])


def test_changes_of_other_layers_are_told_in_a_few_words(trained, settings_of, tmp_path):
    run_dir = Path(shutil.copytree(trained()[0], tmp_path / "run"))
    for own, says in (
        (["train.lora.rank=2"], "112 tensors differ, such as lora.denoiser.down"),
        ([ALL], " tensors differ"),
    ):
        with pytest.raises(ModelError) as caught:
            loop.run(settings_of(*own), run_dir, accept=True)
        assert says in str(caught.value) and len(str(caught.value)) < 500


def test_lost_checkpoints_do_not_cost_what_was_made_of_them(trained, settings_of, tmp_path):
    """All of them or the folder; what a kill left half-written in the first save says that there were none."""
    for lost in ("checkpoints", "checkpoints/lora-00000006"):
        run_dir = Path(shutil.copytree(trained()[0], tmp_path / lost / "run"))
        for path in (run_dir / "checkpoints").iterdir() if "/" in lost else [run_dir / lost]:
            shutil.rmtree(path)
        with pytest.raises(ModelError, match="run/adapter: made of checkpoints that are gone from .*; put them back"):
            loop.run(settings_of(), run_dir)
        assert sha256(run_dir, [run_dir / FILE]) == sha256(trained()[0], [trained()[0] / FILE])
    assert loop.run(settings_of(), run_dir, accept=True)
    assert digests(run_dir) == digests(trained()[0])
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints" / ".tmp-tinydiff-0123456789abcdef").mkdir(parents=True)
    assert loop.run(settings_of(), run_dir) == run_dir / "adapter"
