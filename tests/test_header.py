"""Headers of safetensors files: every floating-point type is read, and what is none of these files is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensors import equal
from tiny_stable_diffusion import PARTS, configs_of, read, refusal, sparse

from tinydiff.checkpoints import agreement
from tinydiff.checkpoints.header import Stored, header
from tinydiff.checkpoints.source import Source
from tinydiff.diffusion.schedules import scaled_linear
from tinydiff.errors import ModelError

BYTES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


WIDE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def saved(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize("dtype", BYTES)
def test_all_numbers_of_a_byte(dtype, tmp_path):
    tensor = torch.arange(256, dtype=torch.uint8).view(BYTES[dtype])
    ours = header(saved(tmp_path / "a.safetensors", {"a": tensor})).values("a")
    assert np.array_equal(ours, tensor.double().numpy(), equal_nan=True)


@pytest.mark.parametrize("dtype", [*BYTES.values(), *WIDE.values()])
@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_a_single_file_of_any_type(kind, dtype, tiny_sd, tiny_sd_files, tmp_path):
    tensors = load_file(tiny_sd_files[kind])
    bars = torch.tensor([level.alpha**2 for level in scaled_linear()])
    tensors |= {"alphas_cumprod": bars, "scale_factor": torch.tensor(0.18215)}
    path = saved(tmp_path / "a.safetensors", {k: v.to(dtype) for k, v in tensors.items()})
    found, usual = configs_of(path), configs_of(tiny_sd_files[kind])
    assert found["scheduler"]["trained_betas"] is None and found["vae"]["scaling_factor"] == 0.18215
    assert found["unet"].keys() == usual["unet"].keys()
    wanted = {p: {k: v.to(dtype) for k, v in tiny_sd[kind].parts[p].items()} for p in PARTS}
    assert all(equal(read(path)[p], wanted[p]) for p in PARTS)
    Source(path).check()


def test_types_may_be_mixed_and_none_may_be_integers(tiny_sd_files, tmp_path):
    tensors, types = load_file(tiny_sd_files["clip"]), [*BYTES.values(), *WIDE.values()]
    mixed = {k: v.to(types[i % len(types)]) for i, (k, v) in enumerate(tensors.items())}
    Source(saved(tmp_path / "mixed.safetensors", mixed)).check()
    name = next(k for k in tensors if k.endswith("attn1.to_q.weight"))
    for dtype, said in ((torch.int8, "I8"), (torch.uint8, "U8"), (torch.int64, "I64"), (torch.bool, "BOOL")):
        path = saved(tmp_path / "integers.safetensors", tensors | {name: tensors[name].to(dtype)})
        assert f"as {said}, and only floating-point" in refusal(Source(path).check)


def test_a_folder_of_integers_is_refused(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    file = model / "vae/diffusion_pytorch_model.safetensors"
    saved(file, {k: v.to(torch.int8) for k, v in load_file(file).items()})
    assert f"{file} has" in refusal(Source(model).check) and "I8" in refusal(Source(model).check)


@pytest.mark.parametrize("value", [1, None, True, [], {}, 0.5])
def test_metadata_that_is_not_text_is_named(tmp_path, value):
    path = saved(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    table = json.dumps(json.loads(data[8 : 8 + size]) | {"__metadata__": {"format": "pt", "step": value}}).encode()
    path.write_bytes(len(table).to_bytes(8, "little") + table + data[8 + size :])
    with pytest.raises(ModelError, match="__metadata__ has values that are not text; save it again"):
        header(path)


def test_types_in_messages_are_cut():
    (problem,) = agreement.of_types({"a" * 5000: Stored("x" * 5000, (1,), 0, 4)}, "file")
    assert len(problem) < 800 and problem.endswith("only floating-point weights are supported")


def test_metadata_may_be_null(tiny_sd_files, tmp_path):
    data = tiny_sd_files["clip"].read_bytes()
    size = int.from_bytes(data[:8], "little")
    table = json.dumps(json.loads(data[8 : 8 + size]) | {"__metadata__": None}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(table).to_bytes(8, "little") + table + data[8 + size :])
    assert header(path).metadata == {}
    assert all(equal(read(path)[p], read(tiny_sd_files["clip"])[p]) for p in PARTS)


LEFT = {  # names of what other programs left in a checkpoint
    "embedding_manager.string_to_param_dict.*": (1, 32),
    "control_model.time_embed.0.weight": (8, 8),
    "lora_unet_down_blocks_0.lora_up.weight": (8, 8),
    "depth_model.model.weight": (8, 8),
    "model_ema.decay": (1,),
}


@pytest.mark.parametrize("name", LEFT)
def test_leftovers_beside_three_whole_networks_are_left_alone(name, tiny_sd, tiny_sd_files, tmp_path):
    path = saved(tmp_path / "a.safetensors", load_file(tiny_sd_files["clip"]) | {name: torch.zeros(LEFT[name])})
    assert all(equal(part, tiny_sd["clip"].parts[p]) for p, part in read(path).items())
    assert [note for note in Source(path).notes if "not used" in note] or "model_ema" in name


KINDS: dict[str, tuple[str, ...]] = {
    "a LoRA": (
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "unet.down_blocks.0.attn1.to_q.lora_A.weight",
    ),
    "LoHa": ("lycoris_unet_mid_block.hada_w1_a",),
    "LoKr": ("lycoris_unet_mid_block.lokr_w1",),
    "a ControlNet": ("controlnet_cond_embedding.conv_in.weight", "control_model.input_blocks.0.0.weight"),
    "an IP-Adapter": ("ip_adapter.1.to_k_ip.weight",),
    "a textual inversion": ("emb_params", "string_to_param"),
    "Flux": ("double_blocks.0.img_attn.qkv.weight",),
    "Stable Diffusion 3": ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",),
    "Stable Diffusion XL": ("clip_l",),
    "an upscaler": ("body.0.rdb1.conv1.weight", "model.1.sub.0.RDB1.conv1.0.weight"),
    "one network of a diffusers folder": (
        "down_blocks.0.resnets.0.conv1.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
    ),
    "T5": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "image encoder": ("vision_model.embeddings.class_embedding",),
}


@pytest.mark.parametrize(("said", "name"), [(kind, name) for kind, names in KINDS.items() for name in names])
def test_what_another_file_is(said, name, tmp_path):
    assert said in refusal(lambda: configs_of(sparse(tmp_path / "a.safetensors", {name: (8, 8)})))


def test_a_learnt_word_of_diffusers_is_known_by_its_shape(tmp_path):
    path = sparse(tmp_path / "a.safetensors", {"<cat-toy>": (1, 768)})
    assert "textual inversion" in refusal(lambda: configs_of(path))


@pytest.mark.parametrize(
    ("start", "said"), [(b"GGUF\3\0\0\0", "GGUF"), (b"\n<!DOCTYPE html><html>", "web page"), (b"\x89HDF\r\n", "HDF5")]
)
def test_files_of_another_format(start, said, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(start + b"x" * 99)
    assert said in refusal(lambda: configs_of(path))
