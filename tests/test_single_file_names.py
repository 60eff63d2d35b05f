"""Names of single files against diffusers' own conversion, and sizes against the published ones."""

from __future__ import annotations

import json
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensors import equal
from tiny_stable_diffusion import KINDS, PARTS, Model, Parts, configs_of, sparse, tensors_of
from torch import Tensor

from tinydiff.checkpoints import ldm, single_file
from tinydiff.checkpoints.header import header

# ---- against diffusers -----------------------------------------------------------------------------------------------


def converted(tensors: dict[str, Tensor], model: Model) -> Parts:
    """An LDM file's tensors by diffusers' conversion."""
    from diffusers.loaders import single_file_utils as theirs
    from transformers import CLIPTextConfig

    text, levels = model.configs["text_encoder"], dict.fromkeys(("down_block_types", "up_block_types"), "ab")
    kind = types.SimpleNamespace(config=CLIPTextConfig(hidden_size=text["hidden_size"]))
    one = text["hidden_act"] == "quick_gelu"
    return {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(tensors), model.configs["unet"]),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(tensors), levels),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(dict(tensors))
        if one
        else theirs.convert_open_clip_checkpoint(kind, dict(tensors)),
    }


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_diffusers_converts_what_we_write_to_the_same_bits(kind, tiny_sd, tiny_sd_files):
    found = converted(load_file(tiny_sd_files[kind]), tiny_sd[kind])
    assert all(equal(found[name], tiny_sd[kind].parts[name]) for name in PARTS)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_last_of_24_blocks_is_left_out_as_diffusers_does(tiny_sd, tiny_sd_files, tmp_path):
    model = tiny_sd["open_clip"]
    layer = {k.partition("layers.0.")[2]: v for k, v in model.parts["text_encoder"].items() if "layers.0." in k}
    text = {k: v for k, v in model.parts["text_encoder"].items() if "layers." not in k}
    text |= {f"text_model.encoder.layers.{i}.{k}": v + i for i in range(24) for k, v in layer.items()}
    theirs = single_file.to_ldm("text_encoder", text, "open_clip", {"num_hidden_layers": 24})
    unused = {"text_projection": torch.ones(64, 64), "logit_scale": torch.ones(()), "attn_mask": torch.ones(77, 77)}
    theirs |= {f"cond_stage_model.model.{k}": v for k, v in unused.items()}
    save_file(load_file(tiny_sd_files["open_clip"]) | theirs, tmp_path / "24.safetensors")
    found = tensors_of(tmp_path / "24.safetensors", "text_encoder")
    assert configs_of(tmp_path / "24.safetensors")["text_encoder"]["num_hidden_layers"] == 23
    assert equal(found, {k: v for k, v in text.items() if ".23." not in k})
    assert equal(found, converted(load_file(tmp_path / "24.safetensors"), model)["text_encoder"])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_the_pipeline_of_diffusers_opens_what_we_write(kind, tiny_sd, tiny_sd_files, tmp_path):
    from diffusers import StableDiffusionPipeline

    for name, value in configs_of(tiny_sd_files[kind]).items():
        file = {"scheduler": "scheduler/scheduler_config", "model_index": "model_index"}.get(name, f"{name}/config")
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.json").write_text(json.dumps(value))
    single_file.tokenizer(kind).save(tmp_path / "tokenizer")
    pipeline = StableDiffusionPipeline.from_single_file(
        str(tiny_sd_files[kind]), config=str(tmp_path), local_files_only=True
    )
    for name in PARTS:
        state = getattr(pipeline, name).state_dict()
        bare = name == "text_encoder" and not any(k.startswith("text_model.") for k in state)
        assert equal({f"text_model.{k}" if bare else k: v for k, v in state.items()}, tiny_sd[kind].parts[name]), name
    assert pipeline.scheduler.config.prediction_type == tiny_sd[kind].configs["scheduler"]["prediction_type"]


# ---- full size, by names and shapes alone ----------------------------------------------------------------------------


@dataclass
class Published:
    """A full-size model: its configuration as published, and its tensors' shapes under diffusers' and LDM's names."""

    configs: dict[str, dict[str, Any]]
    ours: dict[str, dict[str, tuple[int, ...]]]
    theirs: dict[str, tuple[int, ...]]


SIZES = {
    "clip": {"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False},
    "open_clip": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}


TOWERS = {
    "clip": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "open_clip": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
}


def published(kind: str, channels: int) -> Published:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    text = TOWERS[kind] | {"hidden_act": ldm.KINDS[kind].hidden_act}
    with FakeTensorMode():
        networks = {
            "unet": UNet2DConditionModel(in_channels=channels, **SIZES[kind]),
            "vae": AutoencoderKL(**vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }
        configs = {k: dict(v.config) for k, v in networks.items() if k != "text_encoder"} | {"text_encoder": text}
        states = {name: network.state_dict() for name, network in networks.items()}
        states["text_encoder"] = {
            f"text_model.{k.removeprefix('text_model.')}": v for k, v in states["text_encoder"].items()
        }
        theirs = {
            k: v for part in PARTS for k, v in single_file.to_ldm(part, states[part], kind, configs[part]).items()
        }
    ours = {part: {k: tuple(v.shape) for k, v in state.items()} for part, state in states.items()}
    return Published(configs, ours, {k: tuple(v.shape) for k, v in theirs.items()})


@pytest.fixture(scope="module")
def full() -> dict[tuple[str, int], Published]:
    return {(kind, channels): published(kind, channels) for kind, channels in KINDS}


GOLDEN = {
    "model.diffusion_model.time_embed.0.weight": (1280, 320),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.11.0.out_layers.3.bias": (1280,),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
    "model.diffusion_model.middle_block.2.emb_layers.1.weight": (1280, 1280),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
    "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.up.3.block.0.norm1.weight": (512,),
    "first_stage_model.decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
}


GOLDEN_OF = {
    "clip": {
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight": (768, 3072),
    },
    "open_clip": {
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.bias": (4096,),
        "cond_stage_model.model.ln_final.weight": (1024,),
    },
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "channels"), KINDS)
def test_full_size_names_are_a_bijection_with_known_members(kind, channels, full, tmp_path):
    from diffusers.loaders import single_file_utils

    model = full[kind, channels]
    assert [len(model.ours[part]) for part in PARTS] == [686, 248, 196 if kind == "clip" else 372]
    assert len(model.theirs) == 686 + 248 + (196 if kind == "clip" else 280)
    golden = GOLDEN | GOLDEN_OF[kind] | {"model.diffusion_model.input_blocks.0.0.weight": (320, channels, 3, 3)}
    assert {k: model.theirs.get(k) for k in golden} == golden
    file = header(sparse(tmp_path / "a.safetensors", model.theirs))
    found = {part: single_file.part(file, part) for part in PARTS}
    assert all(found[part].places.keys() == model.ours[part].keys() for part in PARTS)
    assert all(found[part].shapes == model.ours[part] for part in ("unet", "text_encoder"))
    names = {k: k for k in model.theirs}  # which diffusers moves as it would move tensors
    wanted = single_file_utils.convert_ldm_unet_checkpoint(names, model.configs["unet"])
    assert {k: v.name for k, v in found["unet"].places.items()} == wanted
    known = {k: types.SimpleNamespace(shape=v) for k, v in model.theirs.items()}
    inpainting = {4: "", 9: "inpainting"}[channels]
    kinds = {("clip", ""): "v1", ("clip", "inpainting"): "inpainting", ("open_clip", ""): "v2"}
    assert single_file_utils.infer_diffusers_model_type(known) == kinds.get((kind, inpainting), "inpainting_v2")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "channels"), KINDS)
def test_full_size_configurations_are_the_published_ones(kind, channels, full, tmp_path):
    model, path = full[kind, channels], tmp_path / "a.safetensors"
    sparse(
        path, model.theirs, {"modelspec.prediction_type": "v" if (kind, channels) == ("open_clip", 4) else "epsilon"}
    )
    start = time.perf_counter()
    found = configs_of(path)
    assert time.perf_counter() - start < 1
    for part in PARTS:
        wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in model.configs[part].items()}
        shared = found[part].keys() & wanted.keys() - {"sample_size"}
        assert {k: found[part][k] for k in shared} == {k: wanted[k] for k in shared} and len(shared) >= 5
    assert found["unet"]["sample_size"] == (96 if (kind, channels) == ("open_clip", 4) else 64)
    assert found["vae"]["sample_size"] == 8 * found["unet"]["sample_size"]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_an_average_is_named_without_dots(full):
    for model in full.values():
        for name in (name for name in model.theirs if name.startswith("model.")):
            assert ldm.averaged("model_ema." + name.removeprefix("model.").replace(".", "")) == name
    assert ldm.averaged("model_ema.decay") is ldm.averaged("model_ema.num_updates") is ldm.averaged("decay") is None


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_tensors_are_not_read_until_they_are_used(full, tmp_path):
    path = sparse(tmp_path / "a.safetensors", full["clip", 4].theirs)
    assert path.stat().st_size > 2 * 10**9

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    tensors = tensors_of(path, "unet")
    assert sum(v.numel() for v in tensors.values()) == 859_520_964  # the published number of parameters
    assert resident() - before < 50 * 2**20
