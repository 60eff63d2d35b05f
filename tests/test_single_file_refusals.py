"""What is no Stable Diffusion, or damaged, is refused in one line that says what it is."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensors import equal
from tiny_stable_diffusion import PARTS, configs_of, refusal, sparse, tensors_of
from torch import Tensor

from tinydiff.checkpoints.header import header
from tinydiff.errors import ModelError

UNET_NAME = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({"model.diffusion_model.label_emb.0.0.weight": (1536, 2560)}, "the Stable Diffusion XL refiner"),
        (
            {"model.diffusion_model.label_emb.0.0.weight": (1280, 2048), "embedder.x": (1,)},
            "Stable Diffusion 2.1 unCLIP",
        ),
        ({"model.diffusion_model.label_emb.0.0.weight": (1280, 5)}, "a model with more conditions than text"),
        ({"model.diffusion_model.label_emb.weight": (1000, 1024)}, "the Stable Diffusion upscaler"),
        ({"model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (1,)}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (1,)}, "Flux"),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (1,)}, "a LoRA"),
        ({"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": (1,)}, "a LoRA"),
        ({UNET_NAME: (1,), "control_model.time_embed.0.weight": (1,)}, "a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (1,)}, "a ControlNet"),
        ({"down_blocks.0.resnets.0.norm1.weight": (1,), "conv_in.weight": (1,)}, "one network of a diffusers folder"),
        ({"text_model.final_layer_norm.weight": (1,)}, "one network of a diffusers folder"),
    ],
)
def test_other_models_are_named(shapes, what, tmp_path):
    for prefix in ("", "state_dict."):
        path = sparse(tmp_path / "a.safetensors", {prefix + k: v for k, v in shapes.items()})
        message = refusal(lambda path=path: configs_of(path))
        assert f"a.safetensors: not supported, this is {what}; give a checkpoint" in message


def test_an_unknown_file_is_described_by_its_names(tmp_path):
    path = sparse(tmp_path / "a.safetensors", {f"\x1b[31m{i:02}": (1,) for i in range(99)})
    message = refusal(lambda: configs_of(path))
    assert "03" in message and "09" in message and "10" not in message.partition("holds")[2]
    assert "holds nothing" in refusal(lambda: configs_of(sparse(path, {})))


def test_channels_for_something_else_are_refused(altered):
    def pix2pix(tensors: dict[str, Tensor]) -> None:
        tensors[UNET_NAME] = torch.zeros(32, 8, 3, 3)

    assert "in_channels 8" in refusal(lambda: configs_of(altered("clip", pix2pix)))


def test_tensors_that_belong_to_no_network_are_named(altered):
    extra = {f"model.diffusion_model.input_blocks.1.{name}": torch.ones(1) for name in ("0.extra", "3.weight")}
    message = refusal(lambda: tensors_of(altered("clip", lambda t: t | extra), "unet"))
    assert "its unet has model.diffusion_model.input_blocks.1.0.extra, model.diff" in message


def test_a_file_of_parts(altered):
    path = altered("clip", lambda t: {k: v for k, v in t.items() if not k.startswith("cond_stage_model.")})
    assert "has no text encoder" in refusal(lambda: configs_of(path))
    assert "has no text encoder" in refusal(lambda: tensors_of(path, "text_encoder"))
    path = altered("clip", lambda t: {k: v for k, v in t.items() if ".out." not in k})
    assert "incomplete" in refusal(lambda: configs_of(path))


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors", "a.pt", "a.bin"])
def test_a_pickle_is_named_with_its_conversion(name, tmp_path):
    for old in (True, False):
        torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / name, _use_new_zipfile_serialization=not old)
        message = refusal(lambda: header(tmp_path / name))
        out = "a-converted" if name == "a.safetensors" else "a"
        assert "a pickle" in message and message.endswith(f"{tmp_path / name} {tmp_path / out}.safetensors")
    (tmp_path / "b.ckpt").write_bytes(b"anything")
    assert "a pickle" in refusal(lambda: header(tmp_path / "b.ckpt"))


def training_checkpoint(monkeypatch: pytest.MonkeyPatch, tensors: dict[str, Tensor]) -> dict[Any, Any]:
    """What CompVis' training wrote: tensors in `state_dict`, beside them Lightning's callbacks and a NumPy number."""

    class ModelCheckpoint:
        pass

    def scalar(*values: Any) -> None:
        pass

    class Number:
        def __reduce__(self) -> Any:
            return scalar, (np.dtype("f8"), b"\x00\xff345678")

    names = "pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"
    for module in (*names, "numpy.core.multiarray"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    for thing, module in ((ModelCheckpoint, names[-1]), (scalar, "numpy.core.multiarray")):
        thing.__module__, thing.__qualname__ = module, thing.__name__
        setattr(sys.modules[module], thing.__name__, thing)
    return {"state_dict": tensors, "callbacks": {ModelCheckpoint: {"best": Number()}}, "epoch": 3, "at": np.float64(3)}


def test_the_conversion_of_a_pickle_works(monkeypatch, tmp_path):
    base, path = torch.randn(8, 4), tmp_path / "it's a.ckpt"
    tensors = {"model.a": base, "model.b": base.t(), "c": torch.tensor(3), "d": base.half(), "e": "no tensor"}
    torch.save(training_checkpoint(monkeypatch, tensors), path)
    command = refusal(lambda: header(path)).partition("convert it with ")[2]
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=120)
    assert equal(load_file(tmp_path / "it's a.safetensors"), {k: v for k, v in tensors.items() if k != "e"})


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path):
    """A header of 640 bytes begins with 80 02, as a pickle of protocol 2 does."""
    path = tmp_path / "a.pt"
    table = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(640)
    path.write_bytes((640).to_bytes(8, "little") + table + b"1234")
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert header(path).tensors["a"].shape == (1,)


def test_a_git_lfs_pointer(tmp_path):
    (tmp_path / "a.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n"
    )
    assert "run `git lfs pull`" in refusal(lambda: configs_of(tmp_path / "a.safetensors"))


def test_missing_files_and_folders(tmp_path):
    assert "a folder, and a file is wanted" in refusal(lambda: header(tmp_path))
    assert "no such file; check the path" in refusal(lambda: header(tmp_path / "none.safetensors"))


def test_truncated_files_are_damaged(tiny_sd_files, tmp_path):
    data = tiny_sd_files["clip"].read_bytes()
    size = int.from_bytes(data[:8], "little")
    for length in [*range(0, 20), *range(20, size, 997), size + 7, size + 8, size + 9, len(data) // 2, len(data) - 1]:
        (tmp_path / "a.safetensors").write_bytes(data[:length])
        assert "damaged" in refusal(lambda: configs_of(tmp_path / "a.safetensors"))
    (tmp_path / "a.safetensors").write_bytes(data + b"1")
    assert "damaged" in refusal(lambda: configs_of(tmp_path / "a.safetensors"))


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "table",
    [
        [],
        7,
        {"a": 1},
        {"a": TENSOR | {"shape": [2]}},
        {"a": TENSOR | {"shape": [1.0]}},
        {"a": TENSOR | {"shape": [-1, -1]}},
        {"a": TENSOR | {"shape": [10**400, 0]}},
        {"a": TENSOR | {"data_offsets": [0, 5]}},
        {"a": TENSOR | {"data_offsets": [4, 0]}},
        {"a": TENSOR | {"dtype": 4}},
        {"a": TENSOR, "__metadata__": 3},
    ],
)
def test_headers_that_make_no_sense(table, tmp_path):
    data, path = json.dumps(table).encode(), tmp_path / "a.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + b"1234")
    assert "damaged" in refusal(lambda: configs_of(path))


def test_a_deep_header_is_damaged(tmp_path):
    data, path = b"[" * 10**6, tmp_path / "a.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    assert "damaged" in refusal(lambda: header(path))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_names_and_shapes_are_opened_or_refused(data, tiny_sd_files, tmp_path_factory):
    found = header(tiny_sd_files[data.draw(st.sampled_from(["clip", "open_clip"]))])
    shapes = {name: stored.shape for name, stored in found.tensors.items()}
    for name in data.draw(st.lists(st.sampled_from(sorted(shapes)), max_size=6)):
        old = shapes.pop(name, ())
        if data.draw(st.booleans()):
            digit = data.draw(st.sampled_from("0179"))
            name = name.replace(data.draw(st.sampled_from("012.")), data.draw(st.sampled_from([digit, "", ".x."])), 1)
        if data.draw(st.booleans()):
            shapes[name] = data.draw(st.sampled_from([(), (1,), (0, 3), old[:1], (*old, 2)]))
    path = sparse(tmp_path_factory.getbasetemp() / "any.safetensors", shapes)
    try:
        json.dumps(configs_of(path))
        for part in PARTS:
            tensors_of(path, part)
    except ModelError as error:
        assert len(str(error).splitlines()) == 1
