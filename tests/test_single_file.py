"""Single-file checkpoints: names against diffusers' own conversion, sizes against the published ones, the same bits both ways,
and what is no Stable Diffusion refused in one line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_imports import run
from test_tokenizer import EXAMPLES
from torch import Tensor

from tinydiff import config
from tinydiff.checkpoints import folder, ldm, scheduler, single_file
from tinydiff.checkpoints.header import header
from tinydiff.diffusion.schedules import scaled_linear, zero_terminal_snr
from tinydiff.errors import ModelError, UsageError
from tinydiff.models.autoencoder import Autoencoder
from tinydiff.models.text_encoder import TextEncoder
from tinydiff.models.unet import UNet

Parts = dict[str, dict[str, Tensor]]
PARTS = ("unet", "vae", "text_encoder")
KINDS = [("clip", 4), ("clip", 9), ("open_clip", 4), ("open_clip", 9)]
SCHEDULER = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass
class Model:
    parts: Parts
    configs: dict[str, dict[str, Any]]


def tiny(kind: str, channels: int = 4, dtype: torch.dtype = torch.float32) -> Model:
    """Random networks in the form of Stable Diffusion 1 or 2: narrow, and shallow, but for the vocabulary."""
    one, prediction = kind == "clip", "epsilon" if kind == "clip" or channels == 9 else "v_prediction"
    widths = (32, 64, 64) if one else (64, 128)
    kinds = ("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",)
    denoiser = config.Denoiser("unet", widths, kinds, 2 if one else 1, 1, 8 if one else 1, 32, not one)
    text = config.TextEncoder("clip", "", 49408, 32 if one else 64, 48, 3, 1, 77, single_file.KINDS[kind].hidden_act)
    autoencoder = config.Autoencoder((32, 64), 1 if one else 2, 4, 32, True)
    networks = {
        "unet": UNet(denoiser, 4, text.hidden_size, channels - 4),
        "vae": Autoencoder(autoencoder),
        "text_encoder": TextEncoder(text, 49408, 49407),
    }
    for seed, network in enumerate(networks.values()):
        randomise(network, seed)
    heads = 8 if one else [1, 2]
    unet = {"sample_size": 16, "in_channels": channels, "out_channels": 4, "cross_attention_dim": text.hidden_size}
    return Model(
        {name: {k: v.to(dtype) for k, v in network.state_dict().items()} for name, network in networks.items()},
        {
            "unet": folder.settings(denoiser) | unet | {"attention_head_dim": heads},
            "vae": vars(autoencoder) | {"scaling_factor": 0.18215, "in_channels": 3, "out_channels": 3},
            "text_encoder": folder.settings(text),
            "scheduler": SCHEDULER | {"prediction_type": prediction},
        },
    )


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {"clip": tiny("clip"), "open_clip": tiny("open_clip")}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory) -> dict[str, Path]:
    """A single file of each kind."""
    folder = tmp_path_factory.mktemp("single")
    for kind, model in models.items():
        single_file.write(folder / f"{kind}.safetensors", model.parts, model.configs)
    return {kind: folder / f"{kind}.safetensors" for kind in models}


@pytest.fixture
def altered(files, tmp_path) -> Callable[..., Path]:
    """A function (kind, change of the tensors, metadata) -> a copy of the file with them changed."""

    def alter(kind: str, change: Callable[[dict[str, Tensor]], Any], metadata: dict[str, str] | None = None) -> Path:
        tensors = load_file(files[kind])
        changed = change(tensors)
        save_file(tensors if changed is None else changed, tmp_path / "altered.safetensors", metadata)
        return tmp_path / "altered.safetensors"

    return alter


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    same = one.keys() == other.keys()
    return same and all(v.dtype == other[k].dtype and torch.equal(v, other[k]) for k, v in one.items())


def read(path: Path, **options: bool) -> Parts:
    return {name: single_file.tensors(path, name, **options) for name in PARTS}


def refusal(call: Callable[[], Any], kind: type[Exception] = ModelError) -> str:
    start = time.perf_counter()
    with pytest.raises(kind) as caught:
        call()
    assert time.perf_counter() - start < 1
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).isprintable()
    return str(caught.value)


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
    back, configs = read(path), single_file.configs(path)
    assert all(equal(back[name], model.parts[name]) for name in PARTS)
    single_file.write(again, back, configs)
    assert equal(load_file(again), load_file(path)) and header(again).metadata == header(path).metadata


@pytest.mark.parametrize(("kind", "channels"), KINDS)
def test_the_configuration_is_read_off_the_shapes(kind, channels, tmp_path):
    model = tiny(kind, channels)
    single_file.write(tmp_path / "a.safetensors", model.parts, model.configs)
    found = single_file.configs(tmp_path / "a.safetensors")
    for name in PARTS:
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in model.configs[name].items()}
        assert {k: found[name][k] for k in given} == given, name
    assert found["vae"]["sample_size"] == 32
    assert found["scheduler"]["prediction_type"] == model.configs["scheduler"]["prediction_type"]
    inpaint = "Inpaint" if channels == 9 else ""
    assert found["model_index"]["_class_name"] == f"StableDiffusion{inpaint}Pipeline"
    json.dumps(found)


def test_a_scaling_factor_and_noise_levels_of_ones_own_are_kept(models, tmp_path):
    model, path = models["clip"], tmp_path / "a.safetensors"
    noise = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    single_file.write(
        path, model.parts, model.configs | {"vae": model.configs["vae"] | {"scaling_factor": 0.5}, "scheduler": noise}
    )
    found = single_file.configs(path)
    assert found["vae"]["scaling_factor"] == 0.5
    one, other = scheduler.read(noise), scheduler.read(found["scheduler"])
    assert (
        np.allclose(np.array(one.schedule), np.array(other.schedule), atol=1e-9) and one.prediction == other.prediction
    )


def test_tensors_are_views_of_the_file(files):
    tensors = single_file.tensors(files["open_clip"], "text_encoder")
    q, k = (tensors[f"text_model.encoder.layers.0.self_attn.{x}_proj.weight"] for x in "qk")
    assert k.data_ptr() - q.data_ptr() == q.numel() * q.element_size()
    wanted = single_file.tensors(files["clip"], "vae")["decoder.mid_block.attentions.0.to_q.weight"]
    assert wanted.shape == (64, 64)


# ---- against diffusers ------------------------------------------------------------------------------------------------


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
def test_diffusers_converts_what_we_write_to_the_same_bits(kind, models, files):
    found = converted(load_file(files[kind]), models[kind])
    assert all(equal(found[name], models[kind].parts[name]) for name in PARTS)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_last_of_24_blocks_is_left_out_as_diffusers_does(models, files, tmp_path):
    model = models["open_clip"]
    layer = {k.partition("layers.0.")[2]: v for k, v in model.parts["text_encoder"].items() if "layers.0." in k}
    text = {k: v for k, v in model.parts["text_encoder"].items() if "layers." not in k}
    text |= {f"text_model.encoder.layers.{i}.{k}": v + i for i in range(24) for k, v in layer.items()}
    theirs = single_file.to_ldm("text_encoder", text, "open_clip", {"num_hidden_layers": 24})
    unused = {"text_projection": torch.ones(64, 64), "logit_scale": torch.ones(()), "attn_mask": torch.ones(77, 77)}
    theirs |= {f"cond_stage_model.model.{k}": v for k, v in unused.items()}
    save_file(load_file(files["open_clip"]) | theirs, tmp_path / "24.safetensors")
    found = single_file.tensors(tmp_path / "24.safetensors", "text_encoder")
    assert single_file.configs(tmp_path / "24.safetensors")["text_encoder"]["num_hidden_layers"] == 23
    assert equal(found, {k: v for k, v in text.items() if ".23." not in k})
    assert equal(found, converted(load_file(tmp_path / "24.safetensors"), model)["text_encoder"])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_the_pipeline_of_diffusers_opens_what_we_write(kind, models, files, tmp_path):
    from diffusers import StableDiffusionPipeline

    for name, value in single_file.configs(files[kind]).items():
        file = {"scheduler": "scheduler/scheduler_config", "model_index": "model_index"}.get(name, f"{name}/config")
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.json").write_text(json.dumps(value))
    single_file.tokenizer(kind).save(tmp_path / "tokenizer")
    pipeline = StableDiffusionPipeline.from_single_file(str(files[kind]), config=str(tmp_path), local_files_only=True)
    for name in PARTS:
        state = getattr(pipeline, name).state_dict()
        bare = name == "text_encoder" and not any(k.startswith("text_model.") for k in state)
        assert equal({f"text_model.{k}" if bare else k: v for k, v in state.items()}, models[kind].parts[name]), name
    assert pipeline.scheduler.config.prediction_type == models[kind].configs["scheduler"]["prediction_type"]


# ---- full size, by names and shapes alone -----------------------------------------------------------------------------


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of fp16 zeros that takes no room: a header, and a hole."""
    table: dict[str, Any] = {"__metadata__": metadata or {}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape, dtype=np.int64))
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    data = json.dumps(table).encode()
    data += b" " * (-len(data) % 8)
    with open(path, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)
    return path


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
    found = {part: single_file.network(file, part) for part in PARTS}
    assert all(found[part].sources.keys() == model.ours[part].keys() for part in PARTS)
    assert all(found[part].shapes == model.ours[part] for part in ("unet", "text_encoder"))
    names = {k: k for k in model.theirs}  # which diffusers moves as it would move tensors
    wanted = single_file_utils.convert_ldm_unet_checkpoint(names, model.configs["unet"])
    assert {k: v.name for k, v in found["unet"].sources.items()} == wanted
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
    found = single_file.configs(path)
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
    tensors = single_file.tensors(path, "unet")
    assert sum(v.numel() for v in tensors.values()) == 859_520_964  # the published number of parameters
    assert resident() - before < 50 * 2**20


# ---- where networks are ----------------------------------------------------------------------------------------------


def moved(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("clip", "", "state_dict."),
        ("open_clip", "", "state_dict."),
        ("clip", "first_stage_model.", "vae."),
        ("clip", "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
        ("clip", "cond_stage_model.", "conditioner.embedders.0."),
        ("open_clip", "cond_stage_model.", "conditioner.embedders.0."),
    ],
)
def test_other_prefixes_of_the_same_networks(kind, old, new, models, altered):
    path = altered(kind, moved(old, new))
    assert all(equal(v, models[kind].parts[k]) for k, v in read(path).items())
    assert single_file.configs(path)["unet"]["attention_head_dim"] == models[kind].configs["unet"]["attention_head_dim"]


def test_what_is_no_weight_is_ignored(models, altered):
    names = ["betas", "sqrt_alphas_cumprod", "posterior_variance", "model_ema.decay", "model_ema.num_updates", "logvar"]
    names += ["cond_stage_model.transformer.text_model.embeddings.position_ids", "cond_stage_model.logit_scale"]
    path = altered("clip", lambda tensors: tensors | {name: torch.ones(3) for name in names})
    single_file.configs(path)
    assert all(equal(v, models["clip"].parts[k]) for k, v in read(path).items())


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("names", ["ldm", "diffusers"])
def test_an_autoencoder_of_its_own(prefix, names, models, files, tmp_path):
    other = tiny("open_clip")
    part = {k: v + 1 for k, v in other.parts["vae"].items()}
    theirs = single_file.to_ldm("vae", part, "", ldm.vae_layout(ldm_names(other)))
    bare = {k.removeprefix("first_stage_model."): v for k, v in theirs.items()} if names == "ldm" else part
    path = tmp_path / "vae.safetensors"
    save_file(
        {prefix + k: v for k, v in bare.items()} | {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)},
        path,
    )
    assert equal(single_file.tensors(path, "vae"), part)
    assert single_file.configs(files["clip"])["vae"]["layers_per_block"] == 1
    assert single_file.configs(files["clip"], vae=path)["vae"]["layers_per_block"] == 2
    assert "an autoencoder alone; give it beside a model" in refusal(lambda: single_file.configs(path))


def ldm_names(model: Model) -> list[str]:
    pairs = ldm.forward(ldm.vae_pairs({"down_block_types": [""] * 2, "layers_per_block": 2}))
    return [ldm.renamed(name, pairs)[0] for name in model.parts["vae"]]


def test_an_autoencoder_for_a_model_without(files, altered):
    path = altered("clip", lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage_model.")})
    assert "has no autoencoder; give the file of one" in refusal(lambda: single_file.configs(path))
    found = single_file.configs(path, vae=files["open_clip"])["vae"]
    assert found == single_file.configs(files["open_clip"])["vae"] | {"sample_size": found["sample_size"]}
    assert "open_clip" not in refusal(lambda: single_file.configs(files["open_clip"], vae=path))


def means(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {k.removeprefix("model.").replace(".", ""): v + 1 for k, v in tensors.items() if k.startswith("model.")}
    return {f"model_ema.{k}": v for k, v in own.items()} | {"model_ema.decay": torch.ones(1)}


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_averaged_weights_are_taken_when_asked_for(kind, models, altered):
    path = altered(kind, lambda tensors: tensors | means(tensors))
    plain, averaged = read(path), read(path, ema=True)
    assert all(equal(plain[part], models[kind].parts[part]) for part in PARTS)
    assert equal(averaged["unet"], {k: v + 1 for k, v in plain["unet"].items()})
    assert equal(averaged["vae"], plain["vae"]) and equal(averaged["text_encoder"], plain["text_encoder"])


def test_averaged_weights_are_taken_where_they_are_alone(models, altered):
    path = altered("clip", lambda t: {k: v for k, v in t.items() if not k.startswith("model.")} | means(t))
    assert equal(read(path)["unet"], {k: v + 1 for k, v in models["clip"].parts["unet"].items()})
    assert single_file.configs(path)["unet"]["block_out_channels"] == [32, 64, 64]


def test_averaged_weights_that_are_not_there(files):
    assert "no averaged (EMA) weights" in refusal(lambda: single_file.tensors(files["clip"], "unet", ema=True))


# ---- what a file says of sampling -------------------------------------------------------------------------------------

BIAS = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"


@pytest.mark.parametrize(
    ("kind", "said", "spread", "asked", "wanted"),
    [
        ("clip", {}, 1.0, None, "epsilon"),
        ("clip", {"prediction_type": "v"}, 0.0, None, "v_prediction"),
        ("clip", {"predict_key": "v"}, 0.0, None, "v_prediction"),
        ("clip", {"prediction_type": "v"}, 0.0, "epsilon", "epsilon"),
        ("clip", {"prediction_type": "unheard of"}, 0.0, None, "epsilon"),
        ("clip", "v_pred", 0.0, None, "v_prediction"),
        ("open_clip", {}, 0.05, None, "epsilon"),
        ("open_clip", {}, 0.2, None, "v_prediction"),
        ("open_clip", {"prediction_type": "epsilon"}, 0.2, None, "epsilon"),
        ("open_clip", {"architecture": "stable-diffusion-v2-512"}, 0.2, None, "epsilon"),
        ("open_clip", {"architecture": "stable-diffusion-v2-768-v"}, 0.0, None, "v_prediction"),
        ("open_clip", "v_pred", 0.0, None, "v_prediction"),
        ("open_clip", {}, 0.2, "epsilon", "epsilon"),
    ],
)
def test_what_the_network_predicts(kind, said, spread, asked, wanted, files, tmp_path):
    table = {k: v.shape for k, v in header(files[kind]).tensors.items()}
    table |= {"v_pred": (0,)} if said == "v_pred" else {}
    metadata = {f"modelspec.{k}": v for k, v in said.items()} if isinstance(said, dict) else {}
    path = sparse(tmp_path / "a.safetensors", table, metadata)
    if kind == "open_clip":
        with open(path, "r+b") as file:
            file.seek(header(path).tensors[BIAS].start)
            file.write((np.tile([-1.0, 1.0], 32) * spread).astype(np.float16).tobytes())
    found = single_file.configs(path, prediction=asked)
    assert found["scheduler"]["prediction_type"] == wanted
    assert found["scheduler"]["_class_name"] == ("DDIMScheduler" if wanted == "v_prediction" else "PNDMScheduler")
    assert found["unet"]["sample_size"] == (96 if (kind, wanted) == ("open_clip", "v_prediction") else 64)


@pytest.mark.parametrize(
    ("said", "wanted"), [("768x768", 384), ("512x768", 64), ("513x513", 64), ("0x0", 64), ("big", 64)]
)
def test_the_size_is_what_the_metadata_say(said, wanted, altered):
    path = altered("clip", lambda tensors: None, {"modelspec.resolution": said})
    assert single_file.configs(path)["unet"]["sample_size"] == wanted


def bars(levels) -> Tensor:
    return torch.tensor([level.alpha**2 for level in levels])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_usual_noise_levels_stay_unsaid(dtype, altered):
    path = altered(
        "clip",
        lambda t: (
            t | {"alphas_cumprod": bars(scaled_linear()).to(dtype), "scale_factor": torch.tensor(0.18215).to(dtype)}
        ),
    )
    found = single_file.configs(path)
    assert found["scheduler"]["trained_betas"] is None and found["vae"]["scaling_factor"] == 0.18215
    schedule = scheduler.read(found["scheduler"]).schedule
    assert [schedule[i].alpha ** 2 for i in (0, 500, 999)] == pytest.approx([0.99915, 0.27633268, 0.00466010], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_levels_of_its_own_are_followed(dtype, altered):
    stored = bars(zero_terminal_snr(scaled_linear())).to(dtype)
    found = single_file.configs(altered("clip", lambda t: t | {"alphas_cumprod": stored}))["scheduler"]
    assert torch.allclose(bars(scheduler.read(found).schedule).double(), stored.double(), rtol=1e-6, atol=0)
    assert found["num_train_timesteps"] == 1000 and found["trained_betas"][-1] == 1


@pytest.mark.parametrize("levels", [[0.5, 0.6], [1.5], [-0.1], [], [0.5, 0.0, 0.0], [float("nan")]])
def test_noise_levels_that_are_none(levels, altered):
    path = altered("clip", lambda tensors: tensors | {"alphas_cumprod": torch.tensor(levels)})
    assert "alphas_cumprod does not fall" in refusal(lambda: single_file.configs(path))


# ---- what is not Stable Diffusion -------------------------------------------------------------------------------------

UNET_NAME = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({"conditioner.embedders.1.model.ln_final.weight": (1280,)}, "Stable Diffusion XL"),
        ({UNET_NAME: (1,), "model.diffusion_model.label_emb.0.0.weight": (1280, 2816)}, "Stable Diffusion XL"),
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
        message = refusal(lambda path=path: single_file.configs(path))
        assert f"a.safetensors: not supported, this is {what}; give a checkpoint" in message


def test_an_unknown_file_is_described_by_its_names(tmp_path):
    path = sparse(tmp_path / "a.safetensors", {f"\x1b[31m{i:02}": (1,) for i in range(99)})
    message = refusal(lambda: single_file.configs(path))
    assert "03" in message and "09" in message and "10" not in message.partition("holds")[2]
    assert "holds nothing" in refusal(lambda: single_file.configs(sparse(path, {})))


def test_channels_for_something_else_are_refused(altered):
    def pix2pix(tensors: dict[str, Tensor]) -> None:
        tensors[UNET_NAME] = torch.zeros(32, 8, 3, 3)

    assert "8 channels in and 4 out" in refusal(lambda: single_file.configs(altered("clip", pix2pix)))


def test_tensors_that_belong_to_no_network_are_named(altered):
    extra = {f"model.diffusion_model.input_blocks.1.{name}": torch.ones(1) for name in ("0.extra", "3.weight")}
    message = refusal(lambda: single_file.tensors(altered("clip", lambda t: t | extra), "unet"))
    assert "its unet has model.diffusion_model.input_blocks.1.0.extra, model.diff" in message


def test_a_file_of_parts(altered):
    path = altered("clip", lambda t: {k: v for k, v in t.items() if not k.startswith("cond_stage_model.")})
    assert "has no text encoder" in refusal(lambda: single_file.configs(path))
    assert "has no text encoder" in refusal(lambda: single_file.tensors(path, "text_encoder"))
    path = altered("clip", lambda t: {k: v for k, v in t.items() if ".out." not in k})
    assert "incomplete" in refusal(lambda: single_file.configs(path))


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
    assert "run `git lfs pull`" in refusal(lambda: single_file.configs(tmp_path / "a.safetensors"))


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path, tmp_path / "none.safetensors"):
        assert "no such file; check the path" in refusal(lambda path=path: single_file.configs(path))


def test_truncated_files_are_damaged(files, tmp_path):
    data = files["clip"].read_bytes()
    size = int.from_bytes(data[:8], "little")
    for length in [*range(0, 20), *range(20, size, 997), size + 7, size + 8, size + 9, len(data) // 2, len(data) - 1]:
        (tmp_path / "a.safetensors").write_bytes(data[:length])
        assert "damaged" in refusal(lambda: single_file.configs(tmp_path / "a.safetensors"))
    (tmp_path / "a.safetensors").write_bytes(data + b"1")
    assert "damaged" in refusal(lambda: single_file.configs(tmp_path / "a.safetensors"))


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
        {"a": TENSOR, "__metadata__": None},
    ],
)
def test_headers_that_make_no_sense(table, tmp_path):
    data, path = json.dumps(table).encode(), tmp_path / "a.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + b"1234")
    assert "damaged" in refusal(lambda: single_file.configs(path))


def test_a_deep_header_is_damaged(tmp_path):
    data, path = b"[" * 10**6, tmp_path / "a.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    assert "damaged" in refusal(lambda: header(path))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_names_and_shapes_are_opened_or_refused(data, files, tmp_path_factory):
    found = header(files[data.draw(st.sampled_from(["clip", "open_clip"]))])
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
        json.dumps(single_file.configs(path))
        for part in PARTS:
            single_file.tensors(path, part)
    except ModelError as error:
        assert len(str(error).splitlines()) == 1


# ---- what a single file cannot hold -----------------------------------------------------------------------------------


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
def test_a_model_that_would_be_read_otherwise_is_not_written(part, key, value, message, models, tmp_path):
    model = models["clip"]
    configs = model.configs | {part: model.configs[part] | {key: value}}
    path = tmp_path / "a.safetensors"
    assert message in refusal(lambda: single_file.write(path, model.parts, configs))
    assert not any(tmp_path.iterdir())


def test_a_vocabulary_of_ones_own_is_not_written(models, tmp_path):
    model, name = models["clip"], "text_model.embeddings.token_embedding.weight"
    text = model.parts["text_encoder"] | {name: torch.zeros(600, 32)}
    message = refusal(lambda: single_file.write(tmp_path / "a", model.parts | {"text_encoder": text}, model.configs))
    assert "a vocabulary of 600 where CLIP has 49408" in message


@pytest.mark.parametrize(("part", "name"), [("unet", "add_embedding.weight"), ("vae", "loss"), ("text_encoder", "x.y")])
def test_tensors_that_have_no_name_in_the_file_are_not_dropped(part, name, models, tmp_path):
    model = models["open_clip"]
    parts = model.parts | {part: model.parts[part] | {name: torch.ones(1)}}
    assert f"has {name}" in refusal(lambda: single_file.write(tmp_path / "a", parts, model.configs))


def test_a_missing_tensor_is_named(models, tmp_path):
    model, name = models["open_clip"], "text_model.encoder.layers.1.self_attn.k_proj.bias"
    text = {k: v for k, v in model.parts["text_encoder"].items() if k != name}
    assert name in refusal(
        lambda: single_file.write(tmp_path / "a", model.parts | {"text_encoder": text}, model.configs)
    )


def test_an_existing_file_is_kept_unless_forced(models, tmp_path):
    path, model = tmp_path / "a.safetensors", models["clip"]
    path.write_text("mine")
    refusal(lambda: single_file.write(path, model.parts, model.configs), UsageError)
    assert path.read_text() == "mine"
    single_file.write(path, model.parts, model.configs, force=True)
    assert single_file.kind(path) == "clip" and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_metadata_follow_the_specification(models, tmp_path):
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


# ---- without torch, and the tokenizer ---------------------------------------------------------------------------------


def test_configurations_and_the_tokenizer_need_no_torch(files):
    code = f"""
from tinydiff.checkpoints import single_file
print(single_file.configs({str(files["open_clip"])!r})["scheduler"]["prediction_type"])
print(single_file.tokenizer(single_file.kind({str(files["open_clip"])!r})).pad)
"""
    assert run(code, "torch", "safetensors.torch").split() == ["v_prediction", "0"]


def test_known_ids_of_clip():
    one, two = single_file.tokenizer("clip"), single_file.tokenizer("open_clip")
    assert one.encode(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert two.encode(["hello world"])[0, :5].tolist() == [49406, 3306, 1002, 49407, 0]
    assert (one.vocab_size, len(one.vocab), one.max_length) == (49408, 49408, 77)
    assert one.merges[0] == ("i", "n") and one.merges[-1] == ("jeky", "ll</w>")


def strings(count: int) -> list[str]:
    """Texts of every script, emoji, control characters, words, special tokens; some of them long."""
    random = np.random.default_rng(0)
    ranges = [(32, 127), (0, 33), (160, 592), (768, 880), (880, 1424), (1536, 1792), (12352, 12544), (19968, 40000)]
    ranges += [(127744, 129536), (8192, 8304), (65024, 65536), (65536, 1114112)]
    words = [
        " ",
        "  ",
        "a photo of",
        "it's",
        "don't",
        "!!",
        "wow!",
        "<|endoftext|>",
        "<|STARTOFTEXT|>",
        "</w>",
        "👩‍👩‍👧",
        "\u0301",
    ]

    def piece() -> str:
        if random.random() < 0.3:
            return words[random.integers(len(words))]
        low, high = ranges[random.integers(len(ranges))]
        return "".join(chr(c) for c in random.integers(low, high, random.integers(1, 8)) if not 0xD800 <= c < 0xE000)

    sizes = np.where(np.arange(count) % 500 == 0, 300, random.integers(0, 9, count))
    return ["".join(piece() for _ in range(size)) for size in sizes]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_ids_equal_transformers_on_ten_thousand_strings(kind, tmp_path):
    from transformers import CLIPTokenizer

    ours = single_file.tokenizer(kind)
    (tmp_path / "vocab.json").write_text(json.dumps(ours.vocab))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, ours.merges)]))
    added = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos, eos = added | {"content": "<|startoftext|>"}, added | {"content": "<|endoftext|>"}
    special = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": ldm.KINDS[kind].pad}  # as published
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = CLIPTokenizer.from_pretrained(str(tmp_path))
    texts = [*EXAMPLES, *strings(10_000)]
    assert len(set(texts)) > 8000 and max(map(len, texts)) > 500
    wanted = theirs(texts, padding="max_length", truncation=True, max_length=77).input_ids
    assert np.array_equal(ours.encode(texts), wanted)
    assert [ours.ids(text) for text in texts[::5]] == theirs(
        texts[::5], add_special_tokens=False, verbose=False
    ).input_ids
