"""Networks' `config.json`: every value that makes no network, every key of diffusers' and transformers' classes, what agrees."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreters import run_without
from tensors import noise, randomise, same

from tinydiff import inspect
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError
from tinydiff.files import MANIFEST
from tinydiff.networks import AUTOENCODERS, DENOISERS, TEXT_ENCODERS, network_of
from tinydiff.networks.network import Network, OtherNetwork

ROWS = {"unet": DENOISERS["unet"], "dit": DENOISERS["dit"], "vae": AUTOENCODERS["kl"]}
ROWS |= {"vq": AUTOENCODERS["vq"]}
ROWS |= {kind: TEXT_ENCODERS[kind] for kind in ("clip", "t5", "bert")}


HUGE, INF, NAN = 10**400, math.inf, math.nan


BAD_NUMBERS = [-1, 2**63, HUGE, INF, -INF, NAN, "8", "os.system", True, {}, [], [-1, -1], [1, "2"], [[8]], [HUGE, HUGE]]


BAD: dict[Any, list[Any]] = {
    int: [*BAD_NUMBERS, 0.5, 8.0, [None, None]],
    float: [*BAD_NUMBERS, 0, 0.0, -0.1, 1e-300, 1e300, [0.1]],
    bool: [0, 1, "true", {}, []],
    str: [1, True, {}, []],
    int | tuple[int, ...]: [*BAD_NUMBERS, 0, [0], [8] * 9, [0.5, 0.5]],
    str | tuple[str, ...]: [1, True, {}, [], [1], [None], ["full"] * 17],
    tuple[int, ...]: ["os.system", 8, 0.5, {}, [], [0], [-8], [True], ["8"], [8] * 17, [HUGE], [INF], [[8]]],
    tuple[str, ...]: ["DownBlock2D", 1, {}, [], [1], [None], ["x"] * 17],
}


WHOLE_EXITS = (0, [0], [8] * 9)  # in range by themselves: 0 is none, and how many blocks there are another key says


@pytest.mark.parametrize("name", ROWS)
def test_no_value_that_makes_no_network_passes(name):
    row = ROWS[name]
    for key, each in row.keys.items():
        for value in [value for value in BAD[each.kind] if key != "exits" or value not in WHOLE_EXITS]:
            with pytest.raises(ValueError) as caught:
                row.valid({key: value})
            said = str(caught.value)
            assert type(caught.value) is ValueError and said.startswith(key) and len(said) < 200, (key, value)
        if each.low:  # above zero
            with pytest.raises(ValueError, match=key):
                row.valid({key: [0, 0] if each.kind == tuple[int, ...] else 0})


@pytest.mark.parametrize("name", ["unet", "dit", "t5", "bert"])
def test_defaults_make_a_network(name):
    assert ROWS[name].read({}) == ROWS[name].read(json.loads(json.dumps(ROWS[name].complete({}))))


@pytest.mark.parametrize(
    ("name", "table", "said"),
    [
        ("unet", {"block_out_channels": [32] * 9}, "down_block_types"),
        ("unet", {"block_out_channels": [48, 96], "norm_num_groups": 32}, "norm_num_groups: 32 does not divide"),
        ("unet", {"attention_head_dim": [3, 8, 8, 8]}, "attention_head_dim: 3 heads do not divide"),
        ("unet", {"attention_head_dim": [8, 16]}, "attention_head_dim"),
        ("unet", {"layers_per_block": [2, 2]}, "layers_per_block: a list of 2, where 4"),
        ("unet", {"only_cross_attention": [False]}, "only_cross_attention: a list of 1, where 4"),
        ("unet", {"sample_size": [64, 96]}, "sample_size: (64, 96) is not square"),
        ("unet", {"sample_size": [64, 64, 64]}, "sample_size: a list of 3"),
        ("unet", {"up_block_types": ["UpBlock2D"]}, "up_block_types"),
        ("vae", {"block_out_channels": [48]}, "norm_num_groups: 32 does not divide"),
        ("vae", {"block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"] * 2}, "down_block_types"),
        ("clip", {"hidden_size": 512, "num_attention_heads": 3}, "num_attention_heads: 3 heads do not divide"),
        ("bert", {"num_attention_heads": 5}, "num_attention_heads: 5 heads do not divide"),
        ("t5", {"relative_attention_max_distance": 8}, "relative_attention_num_buckets"),
        ("dit", {"num_attention_heads": 1, "attention_head_dim": 7}, "attention_head_dim"),
        ("dit", {"patch_size": 3}, "patch_size: 3 does not divide"),
    ],
)
def test_values_that_do_not_go_together(name, table, said):
    with pytest.raises(ValueError) as caught:
        ROWS[name].valid(table)
    assert str(caught.value).startswith(said)


# ---- in a folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function (file, **keys) -> a copy of the model where these keys of a JSON file have other values."""
    copy = tmp_path / "model"

    def change(file: str, **keys: Any) -> Path:
        if not copy.exists():
            shutil.copytree(tiny_model, copy)
            (copy / MANIFEST).unlink()
            (copy / "tinydiff.toml").unlink()
        path = copy / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        return copy

    return change


WRONG = {
    "unet/config.json": {
        "block_out_channels": [0, 0],
        "layers_per_block": 2**63,
        "norm_num_groups": True,
        "in_channels": -1,
    },
    "vae/config.json": {"scaling_factor": NAN, "block_out_channels": "os.system", "latent_channels": 10**400},
    "text_encoder/config.json": {"num_attention_heads": 3, "vocab_size": -1, "hidden_size": 2**31},
}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in WRONG.items() for key in keys])
def test_inspect_and_generate_name_the_file_and_the_key(changed, file, key):
    model = changed(file, **{key: WRONG[file][key]})
    for call in (lambda: Source(model).check(), lambda: inspect.inspect(str(model)), lambda: Source(model).description):
        with pytest.raises(ModelError) as caught:
            call()
        said = str(caught.value)
        assert said.startswith(f"{model / file}: {key}") and len(said) < 200 + len(str(model))


PAIRS = [  # a change of one part that is a network by itself, and what both parts then are
    ("unet/config.json", {"in_channels": 7}, ["in_channels 7", "latent_channels 4", "vae/config.json"]),
    ("unet/config.json", {"in_channels": 5}, ["in_channels 5", "latent_channels 4", "vae/config.json"]),
    ("unet/config.json", {"out_channels": 8}, ["out_channels 8", "latent_channels 4", "vae/config.json"]),
    (
        "unet/config.json",
        {"cross_attention_dim": 24},
        ["cross_attention_dim 24", "vectors of 16", "text_encoder/config.json"],
    ),
    ("text_encoder/config.json", {"vocab_size": 515}, ["vocab_size 515", "ids up to", "tokenizer"]),
    ("text_encoder/config.json", {"max_position_embeddings": 8}, ["max_position_embeddings 8", "model_max_length 16"]),
    ("text_encoder/config.json", {"vocab_size": 9000}, ["[9000, 16]", "text_encoder/model.safetensors"]),
    (
        "unet/config.json",
        {"in_channels": 9},
        ["[16, 9, 3, 3]", "[16, 4, 3, 3]", "unet/diffusion_pytorch_model.safetensors"],
    ),
]


@pytest.mark.parametrize(("file", "keys", "said"), PAIRS)
def test_parts_that_do_not_go_together_are_both_named(changed, file, keys, said):
    model = changed(file, **keys)
    with pytest.raises(ModelError) as caught:
        Source(model).check()
    assert all(each in str(caught.value) for each in [*said, str(model / file)])


def test_what_json_can_tell_is_told_without_torch(changed):
    model = changed("unet/config.json", in_channels=9)
    code = f"""
from pathlib import Path
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError
try:
    Source(Path({str(model)!r})).check()
except ModelError as error:
    print(error)
"""
    assert "[16, 9, 3, 3]" in run_without(code, "torch", "onnxruntime")


def test_keys_that_nobody_knows_are_said(changed):
    model = changed("unet/config.json", new_kind_of_attention="x", dropout=0.1)
    (note,) = [note for note in Source(model).description.notes if "config.json" in note]
    assert note.startswith(f"{model / 'unet/config.json'}: ") and note.endswith(": new_kind_of_attention")


# ---- every key of the classes that write these files ------------------------------------------------------------------

UNET = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32}
UNET |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
UNET |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
VAE = {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1}
VAE |= {"up_block_types": ("UpDecoderBlock2D",) * 2}
CLIP = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP |= {"eos_token_id": 98, "bos_token_id": 97, "projection_dim": 32}
# Values by key: those before "-" give the network that diffusers and transformers make of them, those after are refused.
UNET_KEYS: dict[str, list[Any]] = {
    "sample_size": [None, 16, [8, 8], 64],
    "in_channels": [9, 7],  # 8 is two inputs of ours, as in test_conditions
    "center_input_sample": [False, "-", True],
    "flip_sin_to_cos": [True, "-", False],
    "freq_shift": [0, "-", 1],
    "mid_block_type": ["UNetMidBlock2DCrossAttn", "-", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn", None],
    "only_cross_attention": [False, (False, False), "-", True, (True, False)],
    "layers_per_block": [2, (2, 2), (1, 1), "-", (1, 2)],
    "downsample_padding": [1, "-", 0],
    "mid_block_scale_factor": [1, 1.0, "-", 2],
    "dropout": [0.1],
    "act_fn": ["swish", "silu", "-", "gelu", "mish", "relu"],
    "norm_num_groups": [16, 8, "-", None],
    "norm_eps": [1e-5, "-", 1e-6],
    "cross_attention_dim": [(32, 32), [48, 48], 48, "-", (32, 48)],
    "transformer_layers_per_block": [2, (1, 1), [2, 2], (2, 1), (1, 2), "-", [[1, 1], [1, 1]]],
    "reverse_transformer_layers_per_block": [[1, 1], "-", [2, 1], [[1, 1], [1, 1]]],
    "attention_head_dim": [4, (4, 8), [8, 8], 1],
    "num_attention_heads": ["-", 8],
    "dual_cross_attention": [False, "-", True],
    "use_linear_projection": [True, False],
    "class_embed_type": [None, "-", "timestep", "identity"],
    "addition_embed_type": [None, "-", "text_time", "text", "image"],
    "num_class_embeds": ["-", 0, "10"],  # as in test_conditions
    "encoder_hid_dim": ["-", 24],
    "encoder_hid_dim_type": ["-", "text_proj"],
    "upcast_attention": [True, False],
    "resnet_time_scale_shift": ["default", "scale_shift", "-", "other"],
    "resnet_skip_time_act": [False, "-", True],
    "resnet_out_scale_factor": [1, 1.0, "-", 2.0],
    "time_embedding_type": ["positional", "-", "fourier"],
    "time_embedding_dim": [128, "-", 64],
    "time_embedding_act_fn": [None, "-", "silu", "gelu"],
    "timestep_post_act": ["-", "silu"],
    "time_cond_proj_dim": [None, 16],
    "conv_in_kernel": [3, "-", 1],
    "conv_out_kernel": [3, "-", 5],
    "attention_type": ["default", "-", "gated"],
    "class_embeddings_concat": [False, "-", True],
    "mid_block_only_cross_attention": [None, False, "-", True],
    "cross_attention_norm": [None, "-", "layer_norm"],
    "down_block_types": ["-", ("AttnDownBlock2D", "DownBlock2D")],
    "up_block_types": ["-", ("UpBlock2D", "UpBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")],
}
VAE_KEYS: dict[str, list[Any]] = {
    "act_fn": ["swish", "-", "gelu"],
    "in_channels": ["-", 1, 4],
    "out_channels": ["-", 4],
    "latent_channels": [3, 8, 16],
    "norm_num_groups": [16, 8],
    "sample_size": [512, (64, 64), (64, 96)],
    "scaling_factor": [1.0, 0.13025],
    "shift_factor": [None, 0.0, "-", 0.1],
    "latents_mean": [[0.1] * 4],
    "latents_std": [[2.0] * 4],
    "force_upcast": [False],
    "use_quant_conv": ["-", False],
    "use_post_quant_conv": ["-", False],
    "mid_block_add_attention": [False, True],
    "layers_per_block": [2],
    "down_block_types": ["-", ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")],
    "up_block_types": ["-", ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")],
}
CLIP_KEYS: dict[str, list[Any]] = {
    "vocab_size": [120],
    "hidden_size": [64],
    "num_attention_heads": [1, 4],
    "max_position_embeddings": [64, 128],
    "hidden_act": ["gelu", "quick_gelu", "-", "gelu_new", "relu", "silu"],
    "layer_norm_eps": [1e-5, "-", 1e-6],
    "attention_dropout": [0.1],
    "pad_token_id": [0, 1],
    "projection_dim": [64],
}


def cases(keys: dict[str, list[Any]]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """What is supported, and what is refused: (key, value)."""
    splits = {key: values.index("-") if "-" in values else len(values) for key, values in keys.items()}
    good = [(key, value) for key, values in keys.items() for value in values[: splits[key]]]
    return good, [(key, value) for key, values in keys.items() for value in values[splits[key] + 1 :]]


def compare(row: Network, theirs: torch.nn.Module, table: dict[str, Any], run: Callable[[Any], torch.Tensor]) -> None:
    """Both networks with the same weights give the same."""
    randomise(theirs, 0)
    ours: Any = row.build(json.loads(json.dumps(table)))
    ours.load_state_dict(row.renamed(theirs.state_dict()), strict=True)
    with torch.no_grad():
        same(run(ours.eval()), run(theirs.eval()))


def refuse_all(row: Network, table: dict[str, Any], bad: list[tuple[str, Any]]) -> None:
    for key, value in bad:
        with pytest.raises(ValueError, match=key):
            row.read(json.loads(json.dumps(table | {key: value})))


def first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.peers
def test_every_key_of_a_unet():
    from diffusers import UNet2DConditionModel

    good, bad = cases(UNET_KEYS)
    refuse_all(ROWS["unet"], UNET, bad)
    for key, value in good:
        table = UNET | {key: value}
        width = (
            table["cross_attention_dim"]
            if type(table["cross_attention_dim"]) is int
            else table["cross_attention_dim"][0]
        )
        x, context = noise(1, table.get("in_channels", 4), 8, 8, seed=1), noise(1, 5, width, seed=2)
        theirs = UNet2DConditionModel(**table)  # type: ignore[arg-type]
        compare(ROWS["unet"], theirs, dict(theirs.config), lambda n: first(n(x, torch.tensor([500]), context)))  # noqa: B023


@pytest.mark.peers
def test_every_key_of_an_autoencoder():
    from diffusers import AutoencoderKL

    good, bad = cases(VAE_KEYS)
    refuse_all(ROWS["vae"], VAE, bad)
    for key, value in good:
        theirs = AutoencoderKL(**VAE | {key: value})  # type: ignore[arg-type]
        z = noise(1, theirs.config["latent_channels"], 4, 4)
        compare(ROWS["vae"], theirs, dict(theirs.config), lambda n: first(n.decode(z)))  # noqa: B023


@pytest.mark.peers
def test_every_key_of_a_text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    good, bad = cases(CLIP_KEYS)
    refuse_all(ROWS["clip"], CLIP, bad)
    for key, value in good:
        theirs = CLIPTextModel(CLIPTextConfig(**CLIP | {key: value}))
        compare(ROWS["clip"], theirs, theirs.config.to_dict(), lambda n: first(n(torch.tensor([[97, 5, 6, 98]]))))


@pytest.mark.peers
def test_no_key_of_diffusers_classes_is_unknown():
    from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel

    small = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
    for row, theirs in (("unet", UNet2DConditionModel(**UNET)), ("vae", AutoencoderKL(**VAE))):  # type: ignore[arg-type]
        assert ROWS[row].notes(dict(theirs.config)) == []
    assert ROWS["dit"].notes(dict(DiTTransformer2DModel(**small).config)) == []


def test_another_network_is_told_from_a_wrong_one():
    with pytest.raises(OtherNetwork):
        ROWS["unet"].read({"layers_per_block": [1, 2, 3, 1]})
    ROWS["unet"].valid({"layers_per_block": [1, 2, 3, 1]})  # which a bundle of graphs may have


@pytest.mark.parametrize("name", ["text_encoder", "transformer"])
def test_networks_without_levels_take_no_lists_of_numbers(name):
    network = network_of(name, {})
    for key in (key for key, (kind, *_) in network.keys.items() if kind is int and key != "sample_size"):
        with pytest.raises(ValueError, match=f"^{key}: "):
            network.valid({key: [2, 4]}, whole=False)
