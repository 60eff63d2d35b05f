"""LoRA files: what diffusers and PEFT write is read, merged and written again; what is none, or of another model, is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_stable_diffusion import draws_alike, networks, written
from tiny_stable_diffusion import refusal

from tinydiff.adapters import lora
from tinydiff.adapters.lora import LowRank
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Adapter, Source
from tinydiff.pipeline import Request

pytestmark = pytest.mark.filterwarnings("ignore")
UNET = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "ff.net.0.proj",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "conv_in",
]
REQUEST = Request(6, 7.5, "plms", "leading", 32, 32)
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small Stable Diffusion 1 that diffusers wrote."""
    return written("sd1", networks("sd1", 2), tmp_path_factory.mktemp("base"))


def pipeline(path: Path) -> Any:
    from diffusers import StableDiffusionPipeline
    from transformers.integrations import peft

    peft.MIN_PEFT_VERSION = "0.18.0"  # transformers 5.24 asks for one that is not published yet
    pipe = StableDiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def opened(base) -> Any:
    return pipeline(base)


@pytest.fixture
def pipe(opened) -> Iterator[Any]:
    """diffusers' pipeline of `base`, without adapters."""
    yield opened
    opened.unload_lora_weights()


def trained(base: Path, folder: Path, seed: int, rank: int, alpha: float, **settings: Any) -> Path:
    """The file that diffusers writes of an adapter that PEFT made, with random weights."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, state = pipeline(base), dict[str, Any]()
    torch.manual_seed(seed)
    for name, targets in {"unet": UNET, "text_encoder": TEXT}.items():
        network = getattr(pipe, name)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **settings))
        for key, value in network.named_parameters():
            if "lora_" in key and "magnitude" not in key:
                value.data = torch.randn_like(value) * 0.1
        state[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
    told = _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    StableDiffusionPipeline.save_lora_weights(folder, **state, **told)
    return folder / lora.FILE


@pytest.fixture(scope="module")
def files(base, tmp_path_factory) -> dict[str, Path]:
    """Two adapters of diffusers' making, one with rank and alpha by pattern, one of DoRA; and one by names of kohya's scripts."""
    place = tmp_path_factory.mktemp("files")
    pattern = {"rank_pattern": {"to_q": 7}, "alpha_pattern": {"conv1": 5}}
    found = {"plain": trained(base, place / "plain", 0, 4, 8, **pattern)}
    found["rank-stable"] = trained(base, place / "stable", 1, 3, 6, use_rslora=True)
    found["dora"] = trained(base, place / "dora", 2, 4, 4, use_dora=True)
    found["kohya"] = place / "kohya.safetensors"
    save_file(of_kohya(base, 3), found["kohya"], {"ss_network_dim": "4"})
    return found


def of_kohya(base: Path, seed: int) -> dict[str, np.ndarray]:
    """Tensors with the names of kohya's scripts, every layer with a rank of its own, in half precision."""
    source, rng, tensors = Source(base), np.random.default_rng(seed), dict[str, np.ndarray]()
    for network, prefix, targets in (("unet", "lora_unet", UNET), ("text_encoder", "lora_te", TEXT)):
        for name, shape in source.shapes(network).items():
            module = name.removesuffix(".weight")
            if module == name or not any(module.endswith(target) for target in targets):
                continue
            count, key = len(tensors) // 3, f"{prefix}_{module.replace('.', '_')}"
            rank, ones = 1 + count % 5, (1,) * (len(shape) - 2)
            down, up = (rng.standard_normal(size) / 8 for size in ((rank, *shape[1:]), (shape[0], rank, *ones)))
            alpha = (
                2 if "attn" in key else 1 + count % 3
            )  # of attention diffusers 0.42 loses all but the most common one
            own = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(2 if network != "unet" else alpha)}
            tensors |= {f"{key}.{kind}": array.astype(np.float16) for kind, array in own.items()}
    return tensors


def both(source: Source, pipe: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What networks of ours and theirs give for the same inputs."""
    model, torch_rng = folder.load(source), torch.Generator().manual_seed(5)
    ids = torch.randint(49408, (2, 77), generator=torch_rng)
    x, context = torch.randn(2, 4, 8, 6, generator=torch_rng), torch.randn(2, 77, 32, generator=torch_rng)
    t = torch.tensor(601.0)
    return {
        "text": (model.networks["text_encoder"](ids)[0], pipe.text_encoder(ids).last_hidden_state),
        "unet": (model.denoiser(x, t, context), pipe.unet(x, t, context).sample),
    }


TAKEN = {
    "plain": {"plain": 0.7},
    "plain at another strength": {"plain": -1.5},
    "rank-stable": {"rank-stable": 1.0},
    "dora": {"dora": 0.6},
    "kohya": {"kohya": 0.7},
    "kohya at another strength": {"kohya": 1.3},
    "both styles at once": {"plain": 0.5, "kohya": 0.8},
}


def with_adapters(taken: dict[str, float], base: Path, files: dict[str, Path], pipe: Any) -> Source:
    """A model with adapters at strengths, which diffusers' pipeline has from then on too."""
    for name in taken:
        pipe.load_lora_weights(files[name].parent, weight_name=files[name].name, adapter_name=name)
    pipe.set_adapters(list(taken), list(taken.values()))
    return Source(base, adapters=tuple(Adapter(files[name], strength) for name, strength in taken.items()))


@pytest.mark.peers
@pytest.mark.parametrize("case", TAKEN)
@torch.inference_mode()
def test_networks_give_what_those_of_diffusers_do(case, base, files, pipe):
    taken, plain = TAKEN[case], both(Source(base), pipe)
    source = with_adapters(taken, base, files, pipe)
    source.check()
    for name, (ours, theirs) in both(source, pipe).items():
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.std(), name
        assert (ours - plain[name][0]).abs().max() > 0.05 * theirs.std(), name


@pytest.fixture(scope="module")
def plain_picture(base, opened) -> np.ndarray:
    return draws_alike(Source(base), opened, REQUEST)


@pytest.mark.peers
@pytest.mark.parametrize("case", TAKEN)
def test_diffusers_draws_the_same_picture(case, plain_picture, base, files, pipe):
    drawn = draws_alike(with_adapters(TAKEN[case], base, files, pipe), pipe, REQUEST)
    assert (np.abs(drawn - plain_picture) > 1).mean() > 0.3


def read(path: Path, base: Path) -> dict[str, LowRank]:
    return Source(base, adapters=(Adapter(path),)).loras[0].layers()


@pytest.mark.peers
def test_from_one_style_to_the_other_and_back(base, files, tmp_path):
    """kohya -> ours -> PEFT -> ours -> kohya: the same tensors, types included; and PEFT's by way of kohya's."""
    lora.write(tmp_path / "peft.safetensors", read(files["kohya"], base), "diffusers")
    lora.write(tmp_path / "kohya.safetensors", read(tmp_path / "peft.safetensors", base), "kohya")
    one, other = load_file(files["kohya"]), load_file(tmp_path / "kohya.safetensors")
    assert one.keys() == other.keys() and len(one) > 60
    assert all(np.array_equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)

    for name in ("plain", "rank-stable", "dora"):
        lora.write(tmp_path / f"{name}.k.safetensors", read(files[name], base), "kohya")
        lora.write(tmp_path / f"{name}.safetensors", read(tmp_path / f"{name}.k.safetensors", base), "diffusers")
        newer = "text_encoder.encoder."  # transformers 5 names no text_model
        one = {k.replace(newer, "text_encoder.text_model.encoder."): v for k, v in load_file(files[name]).items()}
        other = load_file(tmp_path / f"{name}.safetensors")
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)


@pytest.mark.peers
@torch.inference_mode()
@pytest.mark.parametrize(("style", "name"), [("diffusers", "kohya"), ("diffusers", "dora"), ("kohya", "plain")])
def test_diffusers_reads_what_is_written(style, name, base, files, pipe, tmp_path):
    """By its own reader of either style: the change that it makes is the one of the file that was read."""
    lora.write(tmp_path / "other.safetensors", read(files[name], base), style)
    pipe.load_lora_weights(tmp_path, weight_name="other.safetensors")
    for network, (ours, theirs) in both(Source(base, adapters=(Adapter(files[name]),)), pipe).items():
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.std(), network


QUERY, EXPAND = (f"text_encoder.text_model.encoder.layers.{name}" for name in ("0.self_attn.q_proj", "1.mlp.fc1"))
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
OLDER = {  # names of older versions and other programs -> the layer
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{}.weight": LAYER,
    "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{}.weight": LAYER,
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.{}.weight": f"{LAYER[:-4]}to_out.0",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.{}.weight": LAYER,
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.{}.weight": QUERY,
    "text_encoder.encoder.layers.1.mlp.fc1.lora_linear_layer.{}.weight": EXPAND,
    "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.default.weight": LAYER,
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_{}.weight": LAYER,
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight": QUERY,
    "lora_unet_time_embed_0.lora_{}.weight": "unet.time_embedding.linear_1",
    "lora_unet_input_blocks_1_0_in_layers_2.lora_{}.weight": "unet.down_blocks.0.resnets.0.conv1",
}


@pytest.mark.peers
@pytest.mark.parametrize("name", OLDER)
def test_names_of_older_versions_and_other_programs(name, base, tmp_path):
    layer = OLDER[name]
    network, _, module = layer.partition(".")
    out, *reads = Source(base).shapes(network)[f"{module}.weight"]
    kinds = ("A", "B") if "_{}." in name and "default" in name else ("down", "up")
    tensors = {
        name.format(kinds[0]): np.ones((2, *reads), np.float32),
        name.format(kinds[1]): np.ones((out, 2), np.float32),
    }
    save_file(tensors, tmp_path / "old.safetensors")
    assert list(read(tmp_path / "old.safetensors", base)) == [layer]


def test_a_change_is_its_formula():
    """By a convolution of the three kernels one after the other; and the lengths of rows are those of DoRA's."""
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((6, 5, 3, 3)).astype(np.float32), rng.standard_normal((1, 5, 7, 7))
    down, mid, up = (rng.standard_normal(s).astype(np.float32) for s in ((2, 5, 1, 1), (2, 2, 3, 3), (6, 2, 1, 1)))
    conv = torch.nn.functional.conv2d
    whole, parts = (torch.tensor(x, dtype=torch.float32) for _ in range(2))
    for kernel in (down, mid, up):
        parts = conv(parts, torch.tensor(kernel))
    wanted = conv(whole, torch.tensor(weight)) + 0.7 * 3 / 2 * parts
    got = conv(whole, torch.tensor(LowRank(down, up, 3, mid).merged(weight, 0.7)))
    assert torch.allclose(got, wanted, atol=1e-4)
    lengths = np.arange(1, 7, dtype=np.float32)
    rows = LowRank(down, up, 3, mid, lengths).merged(weight).reshape(6, -1)
    assert np.allclose(np.linalg.norm(rows, axis=1), lengths, rtol=1e-5)


def stored(path: Path, change: Callable[[dict[str, np.ndarray]], None], tensors: dict[str, np.ndarray]) -> Path:
    tensors = dict(tensors)
    change(tensors)
    save_file(tensors, path)
    return path


def of_another_model(tensors: dict[str, np.ndarray]) -> None:
    key = next(key for key in tensors if key.endswith("to_q.lora_up.weight"))
    tensors[key] = np.ones((640, tensors[key].shape[1]), np.float16)


def other_rank(tensors: dict[str, np.ndarray]) -> None:
    key = next(key for key in tensors if key.endswith("lora_up.weight") and tensors[key].ndim == 2)
    tensors[key] = np.ones((len(tensors[key]), 9), np.float16)


def not_a_number(tensors: dict[str, np.ndarray]) -> None:
    key = next(key for key in tensors if key.startswith("lora_unet"))
    tensors[key] = np.full_like(tensors[key], np.nan)


def with_shape(role: str, *shape: int) -> Callable[[dict[str, np.ndarray]], None]:
    """A tensor of a linear layer in another shape, or one more of it."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        layer = next(key for key in tensors if key.endswith("to_q.lora_up.weight")).removesuffix("lora_up.weight")
        rank = len(tensors[f"{layer}lora_down.weight"])
        sizes = [{-1: rank, -2: len(tensors[f"{layer}lora_up.weight"])}.get(n, n) for n in shape]
        tensors[f"{layer}lora_{role}.weight"] = np.ones(sizes, np.float16)

    return change


BAD: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "a kernel on the way up": (with_shape("up", -2, -1, 3, 3), "give a LoRA that was trained on it"),
    "a flat matrix between": (with_shape("mid", -1, -1), r"has a .*a mid \[., .\], .*; copy or download"),
    "a number for a matrix": (with_shape("down"), r"a down \[\]"),
    "a number for the other": (with_shape("up"), r"a up \[\]"),
    "shapes of another model": (of_another_model, "give a LoRA that was trained on it"),
    "layers of another model": (
        lambda t: t.update({"lora_te2_text_model_final.lora_down.weight": np.ones((1, 9))}),
        r"lora_te2_text_model_final.lora_down.weight \[1, 9\], which the model does not have",
    ),
    "ranks that differ": (other_rank, "is of rank . in its down .*, and 9 in its up"),
    "half of a layer": (lambda t: t.pop(next(key for key in t if "down" in key)), "has no down"),
    "LoHa": (lambda t: t.update({"lora_unet_x.hada_w1_a": np.ones(1)}), "this is a LoHa"),
    "LoKr": (lambda t: t.update({"lora_unet_x.lokr_w1": np.ones(1)}), "this is a LoKr"),
    "(IA)3": (lambda t: t.update({"lora_unet_x.on_input": np.ones(1)}), r"this is an \(IA\)3"),
    "IP-Adapter": (lambda t: t.update({"ip_adapter.1.to_k_ip.weight": np.ones(1)}), "this is an IP-Adapter"),
    "a word": (lambda t: t.update({"emb_params": np.ones((1, 32))}), "a learnt word; give it with --word"),
    "no LoRA": (lambda t: t.update({"conv.weight": np.ones(1)}), "not a LoRA, it has conv.weight"),
    "nothing": (lambda t: t.clear(), "changes nothing"),
    "whole numbers": (
        lambda t: t.update({next(iter(t)): next(iter(t.values())).astype(np.int32)}),
        "only floating-point",
    ),
}


@pytest.mark.peers
@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_fit_is_refused_by_its_header(bad, base, files, tmp_path):
    change, says = BAD[bad]
    path = stored(tmp_path / "bad.safetensors", change, load_file(files["kohya"]))
    source = Source(base, adapters=(Adapter(path),))
    message = refusal(source.check)
    assert re.search(says, message), message


@pytest.mark.peers
def test_what_is_damaged_is_refused(base, files, tmp_path):
    data = files["kohya"].read_bytes()
    for name, content in {"cut": data[:-9], "empty": b"", "text": b"<!doctype html>", "pickle": b"PK\3\4..."}.items():
        (tmp_path / name).write_bytes(content)
        assert name in refusal(Source(base, adapters=(Adapter(tmp_path / name),)).check)
    path = stored(tmp_path / "nan.safetensors", not_a_number, load_file(files["kohya"]))
    source = Source(base, adapters=(Adapter(path),))
    source.check()
    assert "NaN or infinite" in refusal(lambda: source.tensors("unet"))
    wrong = [
        '"unet.alpha_pattern": 5',
        '"unet.lora_alpha": {"a": 1}',
        '"unet.lora_alpha": NaN',
        '"unet.lora_alpha": {}',
    ]
    wrong += ['"unet.lora_alpha": "many"', f'"unet.lora_alpha": 1{400 * "0"}']
    for said in ("{", "[]", *(f"{{{each}}}" for each in wrong)):
        save_file(load_file(files["plain"]), tmp_path / "said.safetensors", {lora.METADATA: said})
        assert lora.METADATA in refusal(Source(base, adapters=(Adapter(tmp_path / "said.safetensors"),)).check)
