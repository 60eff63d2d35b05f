"""Model folders: saved, read back to the same bits, refused when damaged, opened by diffusers and transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tinydiff import config
from tinydiff.checkpoints import folder, scheduler
from tinydiff.checkpoints.source import Source
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.diffusion.schedules import CLEAN, SCHEDULES, training_levels
from tinydiff.errors import ModelError, UsageError
from tinydiff.networks import network_of

WEIGHTS = {name: Path(name) / network_of(name, {}).file for name in ("unet", "vae", "text_encoder")}


@pytest.fixture
def copied(tiny_model, tmp_path) -> Path:
    """A model folder to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def foreign(path: Path) -> Path:
    """As diffusers writes it: no manifest, no tinydiff.toml."""
    (path / "manifest.json").unlink()
    (path / "tinydiff.toml").unlink()
    return path


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_saved_is_loaded(tiny_model, tiny_config):
    model = folder.load(Source(tiny_model))
    for name, part in model.networks.items():
        stored = load_file(tiny_model / WEIGHTS[name])
        assert stored.keys() == part.state_dict().keys() and not part.training
        assert all(torch.equal(stored[k], v) for k, v in part.state_dict().items())
    assert model.scaling_factor == 0.8
    assert config.load(tiny_model / "tinydiff.toml") == tiny_config


def test_saving_twice_gives_the_same_bytes(tiny_model, tiny_config, tmp_path):
    folder.save(tmp_path / "again", folder.load(Source(tiny_model)), tiny_config)
    assert (tmp_path / "again" / "manifest.json").read_text() == (tiny_model / "manifest.json").read_text()


def test_an_existing_folder_is_kept_unless_replaced(copied, tiny_config):
    model = folder.load(Source(copied))
    with pytest.raises(UsageError, match="exists"):
        folder.save(copied, model, tiny_config)
    folder.save(copied, model.scaled(2.0), tiny_config, force=True)
    assert folder.load(Source(copied)).scaling_factor == 2.0


def test_half_precision_is_stored_and_read_as_float32(copied, tiny_config):
    model = folder.load(Source(copied))
    folder.save(copied, model, tiny_config, torch.float16, force=True)
    assert {t.dtype for t in load_file(copied / WEIGHTS["unet"]).values()} == {torch.float16}
    read = folder.load(Source(copied)).denoiser.state_dict()
    assert all(v.dtype == torch.float32 for v in read.values())
    assert all(torch.equal(v.half(), model.denoiser.state_dict()[k].half()) for k, v in read.items())


def test_networks_are_initialised_apart(tiny_config, tiny_model):
    """A wider text encoder changes no weight of the autoencoder; another seed changes all."""
    tokenizer = folder.load(Source(tiny_model)).tokenizers["text_encoder"]
    wider = replace(tiny_config, text_encoder=replace(tiny_config.text_encoder, intermediate_size=64))
    one, two, other = (folder.build(c, tokenizer, s) for c, s in [(tiny_config, 1), (wider, 1), (tiny_config, 2)])
    assert torch.equal(one.vae.encoder.conv_in.weight, two.vae.encoder.conv_in.weight)
    assert not torch.equal(one.vae.encoder.conv_in.weight, other.vae.encoder.conv_in.weight)


@pytest.mark.parametrize(
    "name", ["model_index.json", "vae/config.json", "tokenizer/vocab.json", *map(str, WEIGHTS.values())]
)
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(ModelError, match=Path(name).name):
        folder.load(Source(copied))


@pytest.mark.parametrize("name", ["unet/config.json", *map(str, WEIGHTS.values())])
def test_one_flipped_bit_is_found(copied, name):
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(ModelError, match=f"{Path(name).name}: damaged"):
        folder.load(Source(copied))


@pytest.mark.parametrize("size", [0, 5, 100, 5000])
def test_truncated_weights_without_a_manifest(copied, size):
    path = foreign(copied) / WEIGHTS["unet"]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="damaged") as caught:
        folder.load(Source(copied))
    assert len(str(caught.value).splitlines()) == 1


def test_weights_that_do_not_fit_their_configuration(copied):
    edit(foreign(copied) / "unet" / "config.json", block_out_channels=[16, 16])
    with pytest.raises(ModelError, match=r"not fit its config.json at .*down_blocks\.1"):
        folder.load(Source(copied))


def test_extra_and_absent_tensors_are_refused(copied):
    path = foreign(copied) / WEIGHTS["vae"]
    tensors = load_file(path)
    save_file(tensors | {"extra": torch.ones(1)}, path)
    with pytest.raises(ModelError, match="extra"):
        folder.load(Source(copied))
    save_file({k: v for k, v in tensors.items() if k != "quant_conv.bias"}, path)
    with pytest.raises(ModelError, match=r"quant_conv\.bias"):
        folder.load(Source(copied))


def test_configuration_without_a_needed_key(copied):
    path = foreign(copied) / "unet" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "cross_attention_dim"}))
    with pytest.raises(ModelError, match="cross_attention_dim"):
        folder.load(Source(copied))


def test_names_as_transformers_5_writes_them(copied):
    path = foreign(copied) / WEIGHTS["text_encoder"]
    before = load_file(path)
    save_file({k.removeprefix("text_model."): v for k, v in before.items()}, path)
    read = folder.load(Source(copied)).networks["text_encoder"].state_dict()
    assert all(torch.equal(v, before[k]) for k, v in read.items())


def test_position_ids_of_old_files_are_dropped(copied):
    path = foreign(copied) / WEIGHTS["text_encoder"]
    save_file(load_file(path) | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, path)
    folder.load(Source(copied))


def test_description(tiny_model, tiny_config):
    d = Source(tiny_model).description
    assert (d.latent_channels, d.factor, d.multiple, d.size, d.scaling_factor) == (4, 2, 4, 16, 0.8)
    assert d.prediction == tiny_config.diffusion.prediction and d.generate == tiny_config.generate
    assert d.schedule == SCHEDULES[tiny_config.diffusion.schedule](1000)


def test_description_of_a_foreign_folder(copied):
    """Stable Diffusion 1.x: scaled_linear betas in the file, diffusers' defaults for the rest."""
    path = foreign(copied) / "scheduler" / "scheduler_config.json"
    sd = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    sd |= {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1}
    path.write_text(json.dumps(sd | {"skip_prk_steps": True}))
    d = Source(copied).description
    assert d.prediction == "epsilon" and d.generate == config.Generate(50, 7.5, "plms", "leading", 1)
    plms, euler = d.levels("plms", 50, "leading"), d.levels("euler", 50, "leading")
    assert [level.t for level in plms[:-1]] == list(range(981, 0, -20)) and plms[:-1] == euler[:-1]
    assert plms[-1] == d.schedule[0] and euler[-1] == CLEAN
    assert d.schedule[500].alpha ** 2 == pytest.approx(0.27633268, rel=1e-6)


def test_description_with_trained_betas(copied):
    edit(copied / "scheduler" / "scheduler_config.json", num_train_timesteps=2, trained_betas=[0.36, 0.5])
    assert [level.alpha**2 for level in Source(copied).description.schedule] == pytest.approx([0.64, 0.32])


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "odd"}, "odd"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "odd"),
        ("vae/config.json", {"block_out_channels": 3}, "block_out_channels: expected a list"),
    ],
)
def test_description_of_what_is_not_supported(copied, name, changes, part):
    edit(copied / name, **changes)
    with pytest.raises(ModelError, match=part):
        Source(copied).description  # noqa: B018


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_and_prediction_survive_the_file(copied, tiny_config, schedule, prediction):
    cfg = replace(tiny_config, diffusion=replace(tiny_config.diffusion, schedule=schedule, prediction=prediction))
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler.write(cfg)))
    d = Source(copied).description
    np.testing.assert_allclose(d.schedule, SCHEDULES[schedule](1000), rtol=1e-9)
    assert d.prediction == prediction


@pytest.mark.parametrize(
    "changes", [{"zero_terminal_snr": True}, {"schedule": "flow", "prediction": "flow", "shift": 3.0}]
)
def test_changes_to_a_schedule_survive_the_file(tiny_config, changes):
    d = replace(tiny_config.diffusion, **changes)
    read = scheduler.read(scheduler.write(replace(tiny_config, diffusion=d)), ours=True)
    assert read.schedule == training_levels(d.schedule, d.num_train_timesteps, d.shift, d.zero_terminal_snr)
    assert read.schedule != SCHEDULES[d.schedule](d.num_train_timesteps) and read.prediction == d.prediction


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras", "exponential", "beta"])
def test_sampler_and_spacing_survive_the_file(tiny_config, name, spacing):
    assert scheduler.SCHEDULERS.keys() == SAMPLERS.keys()
    cfg = replace(tiny_config, generate=replace(tiny_config.generate, sampler=name, spacing=spacing))
    read = scheduler.read(scheduler.write(cfg), ours=True)
    assert (read.sampler, read.spacing) == (name, spacing)


@pytest.mark.parametrize(
    ("kind", "settings", "sampler", "spacing"),
    [
        ("PNDMScheduler", {}, "plms", "leading"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler", "karras"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}, "dpmpp_2m", "linspace"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "euler", "linspace"),
        ("TCDScheduler", {}, "tcd", "leading"),
        (None, {}, "dpmpp_2m", "linspace"),
    ],
)
def test_schedulers_of_others(kind, settings, sampler, spacing):
    read = scheduler.read(settings | ({"_class_name": kind} if kind else {}))
    assert (read.sampler, read.spacing) == (sampler, spacing)
    assert read.prediction == ("flow" if kind and kind.startswith("Flow") else "epsilon")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_diffusers_and_transformers_open_the_parts(tiny_model):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    model, rng = folder.load(Source(tiny_model)), np.random.default_rng(0)
    x, pixels = (torch.tensor(rng.standard_normal(s), dtype=torch.float32) for s in [(2, 4, 8, 8), (2, 3, 16, 16)])
    ids = torch.tensor(model.tokenizers["text_encoder"].encode(["a red square", ""]))
    context = model.networks["text_encoder"](ids)[0]
    text = CLIPTextModel.from_pretrained(tiny_model / "text_encoder").eval()
    torch.testing.assert_close(text(ids).last_hidden_state, context, rtol=1e-5, atol=1e-5)
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet").eval()
    t = torch.tensor(500.0)
    torch.testing.assert_close(unet(x, t, context).sample, model.denoiser(x, t, context), rtol=1e-5, atol=1e-5)
    vae = AutoencoderKL.from_pretrained(tiny_model / "vae").eval()
    torch.testing.assert_close(vae.decode(x).sample, model.vae.decode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        vae.encode(pixels).latent_dist.parameters, model.vae.encode(pixels), rtol=1e-5, atol=1e-5
    )
    theirs = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    found = theirs(["a red square", ""], padding="max_length", truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(found, ids.numpy())
