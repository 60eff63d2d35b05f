"""Single files written and read again to the same bits; what one cannot hold is refused, and nothing is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensors import equal
from tiny_stable_diffusion import KINDS, PARTS, configs_of, read, refusal, tensors_of, tiny

from tinydiff import config
from tinydiff.checkpoints import scheduler, single_file
from tinydiff.checkpoints.header import header
from tinydiff.checkpoints.source import Source
from tinydiff.errors import UsageError

# ---- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "channels", "dtype"),
    [
        ("clip", 4, torch.float32),
        ("clip", 9, torch.float16),
        ("open_clip", 4, torch.bfloat16),
        ("open_clip", 9, torch.float16),
    ],
)
def test_what_is_written_is_read_and_written_again_the_same(kind, channels, dtype, tmp_path):
    model, path, again = tiny(kind, channels, dtype), tmp_path / "a.safetensors", tmp_path / "again" / "a.safetensors"
    single_file.write(path, model.parts, model.configs)
    back, configs = read(path), configs_of(path)
    assert all(equal(back[name], model.parts[name]) for name in PARTS)
    single_file.write(again, back, configs)
    assert equal(load_file(again), load_file(path)) and header(again).metadata == header(path).metadata


@pytest.mark.parametrize(("kind", "channels"), KINDS)
def test_the_configuration_is_read_off_the_shapes(kind, channels, tmp_path):
    model = tiny(kind, channels)
    single_file.write(tmp_path / "a.safetensors", model.parts, model.configs)
    found = configs_of(tmp_path / "a.safetensors")
    for name in PARTS:
        own = config.UNet().__dict__ if name == "unet" else {}
        told = {k: v for k, v in model.configs[name].items() if k in found[name] or own.get(k) != v}
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}
        assert {k: found[name][k] for k in given} == given, name
    assert found["vae"]["sample_size"] == 32
    assert found["scheduler"]["prediction_type"] == model.configs["scheduler"]["prediction_type"]
    inpaint = "Inpaint" if channels == 9 else ""
    assert found["model_index"]["_class_name"] == f"StableDiffusion{inpaint}Pipeline"
    json.dumps(found)


def test_a_scaling_factor_and_noise_levels_of_ones_own_are_kept(tiny_sd, tmp_path):
    model, path = tiny_sd["clip"], tmp_path / "a.safetensors"
    noise = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    single_file.write(
        path, model.parts, model.configs | {"vae": model.configs["vae"] | {"scaling_factor": 0.5}, "scheduler": noise}
    )
    found = configs_of(path)
    assert found["vae"]["scaling_factor"] == 0.5
    one, other = scheduler.read(noise), scheduler.read(found["scheduler"])
    assert (
        np.allclose(np.array(one.schedule), np.array(other.schedule), atol=1e-9) and one.prediction == other.prediction
    )


def test_tensors_are_views_of_the_file(tiny_sd_files):
    tensors = tensors_of(tiny_sd_files["open_clip"], "text_encoder")
    q, k = (tensors[f"text_model.encoder.layers.0.self_attn.{x}_proj.weight"] for x in "qk")
    assert k.data_ptr() - q.data_ptr() == q.numel() * q.element_size()
    wanted = tensors_of(tiny_sd_files["clip"], "vae")["decoder.mid_block.attentions.0.to_q.weight"]
    assert wanted.shape == (64, 64)


# ---- what a single file cannot hold ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("unet", "attention_head_dim", 4, "its unet has attention_head_dim 4, which would be read as 8"),
        ("unet", "norm_num_groups", 16, "norm_num_groups 16"),
        ("vae", "norm_num_groups", 8, "its vae has norm_num_groups 8, which would be read as 32"),
        ("text_encoder", "num_attention_heads", 2, "num_attention_heads 2"),
        ("scheduler", "prediction_type", "sample", "it predicts sample"),
        ("scheduler", "prediction_type", "nonsense", "nonsense"),
    ],
)
def test_a_model_that_would_be_read_otherwise_is_not_written(part, key, value, message, tiny_sd, tmp_path):
    model = tiny_sd["clip"]
    configs = model.configs | {part: model.configs[part] | {key: value}}
    path = tmp_path / "a.safetensors"
    assert message in refusal(lambda: single_file.write(path, model.parts, configs))
    assert not any(tmp_path.iterdir())


def test_a_vocabulary_of_ones_own_is_not_written(tiny_sd, tmp_path):
    model, name = tiny_sd["clip"], "text_model.embeddings.token_embedding.weight"
    text = model.parts["text_encoder"] | {name: torch.zeros(600, 32)}
    message = refusal(lambda: single_file.write(tmp_path / "a", model.parts | {"text_encoder": text}, model.configs))
    assert "a vocabulary of 600 where CLIP has 49408" in message


@pytest.mark.parametrize(("part", "name"), [("unet", "add_embedding.weight"), ("vae", "loss"), ("text_encoder", "x.y")])
def test_tensors_that_have_no_name_in_the_file_are_not_dropped(part, name, tiny_sd, tmp_path):
    model = tiny_sd["open_clip"]
    parts = model.parts | {part: model.parts[part] | {name: torch.ones(1)}}
    assert f"has {name}" in refusal(lambda: single_file.write(tmp_path / "a", parts, model.configs))


def test_a_missing_tensor_is_named(tiny_sd, tmp_path):
    model, name = tiny_sd["open_clip"], "text_model.encoder.layers.1.self_attn.k_proj.bias"
    text = {k: v for k, v in model.parts["text_encoder"].items() if k != name}
    assert name in refusal(
        lambda: single_file.write(tmp_path / "a", model.parts | {"text_encoder": text}, model.configs)
    )


def test_an_existing_file_is_kept_unless_forced(tiny_sd, tmp_path):
    path, model = tmp_path / "a.safetensors", tiny_sd["clip"]
    path.write_text("mine")
    refusal(lambda: single_file.write(path, model.parts, model.configs), UsageError)
    assert path.read_text() == "mine"
    single_file.write(path, model.parts, model.configs, force=True)
    assert Source(path).parts["text_encoder"].table == "clip" and [p.name for p in tmp_path.iterdir()] == [
        "a.safetensors"
    ]


def test_metadata_follow_the_specification(tiny_sd, tmp_path):
    found = {}
    for kind, channels in KINDS:
        single_file.write(tmp_path / "my model.safetensors", *vars(tiny(kind, channels)).values(), force=True)
        found[kind, channels] = header(tmp_path / "my model.safetensors").metadata
    assert [found[key]["modelspec.architecture"] for key in KINDS] == [
        "stable-diffusion-v1",
        "stable-diffusion-v1-inpainting",
        "stable-diffusion-v2-768-v",
        "stable-diffusion-v2-512-inpainting",
    ]
    said = {k: found["open_clip", 4][f"modelspec.{k}"] for k in ("title", "resolution", "prediction_type")}
    assert said == {"title": "my model", "resolution": "32x32", "prediction_type": "v"}
