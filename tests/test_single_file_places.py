"""Where the networks are in a single file: other prefixes, an autoencoder in a file of its own, averaged weights."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensors import equal
from test_dit import published_weights
from tiny_stable_diffusion import PARTS, Model, configs_of, read, refusal, tensors_of, tiny
from torch import Tensor

from tinydiff.backends import open_backend
from tinydiff.checkpoints import ldm, single_file, weights
from tinydiff.checkpoints.header import header
from tinydiff.checkpoints.source import Source
from tinydiff.files import read_json
from tinydiff.networks import network_of, networks


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
def test_other_prefixes_of_the_same_networks(kind, old, new, tiny_sd, altered):
    path = altered(kind, moved(old, new))
    assert all(equal(v, tiny_sd[kind].parts[k]) for k, v in read(path).items())
    assert configs_of(path)["unet"]["attention_head_dim"] == tiny_sd[kind].configs["unet"]["attention_head_dim"]


def test_what_is_no_weight_is_ignored(tiny_sd, altered):
    names = ["betas", "sqrt_alphas_cumprod", "posterior_variance", "model_ema.decay", "model_ema.num_updates", "logvar"]
    names += ["cond_stage_model.transformer.text_model.embeddings.position_ids", "cond_stage_model.logit_scale"]
    path = altered("clip", lambda tensors: tensors | {name: torch.ones(3) for name in names})
    configs_of(path)
    assert all(equal(v, tiny_sd["clip"].parts[k]) for k, v in read(path).items())


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("names", ["ldm", "diffusers"])
def test_an_autoencoder_of_its_own(prefix, names, tiny_sd, tiny_sd_files, tmp_path):
    other = tiny("open_clip")
    part = {k: v + 1 for k, v in other.parts["vae"].items()}
    theirs = single_file.to_ldm("vae", part, "", ldm.vae_layout(ldm_names(other)))
    bare = {k.removeprefix("first_stage_model."): v for k, v in theirs.items()} if names == "ldm" else part
    path = tmp_path / "vae.safetensors"
    save_file(
        {prefix + k: v for k, v in bare.items()} | {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)},
        path,
    )
    assert equal(tensors_of(path, "vae"), part)
    assert configs_of(tiny_sd_files["clip"])["vae"]["layers_per_block"] == 1
    assert configs_of(tiny_sd_files["clip"], vae=path)["vae"]["layers_per_block"] == 2
    assert "an autoencoder alone; give it beside a model" in refusal(lambda: configs_of(path))


def ldm_names(model: Model) -> list[str]:
    pairs = ldm.forward(ldm.vae_pairs({"down_block_types": [""] * 2, "layers_per_block": 2}))
    return [ldm.renamed(name, pairs)[0] for name in model.parts["vae"]]


def test_an_autoencoder_for_a_model_without(tiny_sd_files, altered):
    path = altered("clip", lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage_model.")})
    assert "has no autoencoder; give the file of one" in refusal(lambda: configs_of(path))
    found = configs_of(path, vae=tiny_sd_files["open_clip"])["vae"]
    assert found == configs_of(tiny_sd_files["open_clip"])["vae"] | {"sample_size": found["sample_size"]}
    assert "open_clip" not in refusal(lambda: configs_of(tiny_sd_files["open_clip"], vae=path))


def means(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {k.removeprefix("model.").replace(".", ""): v + 1 for k, v in tensors.items() if k.startswith("model.")}
    return {f"model_ema.{k}": v for k, v in own.items()} | {"model_ema.decay": torch.ones(1)}


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_averaged_weights_are_taken_when_asked_for(kind, tiny_sd, altered):
    path = altered(kind, lambda tensors: tensors | means(tensors))
    plain, averaged = read(path), {name: tensors_of(path, name, ema=True) for name in PARTS}
    assert all(equal(plain[part], tiny_sd[kind].parts[part]) for part in PARTS)
    assert equal(averaged["unet"], {k: v + 1 for k, v in plain["unet"].items()})
    assert equal(averaged["vae"], plain["vae"]) and equal(averaged["text_encoder"], plain["text_encoder"])


def test_averaged_weights_are_taken_where_they_are_alone(tiny_sd, altered):
    path = altered("clip", lambda t: {k: v for k, v in t.items() if not k.startswith("model.")} | means(t))
    assert equal(read(path)["unet"], {k: v + 1 for k, v in tiny_sd["clip"].parts["unet"].items()})
    assert configs_of(path)["unet"]["block_out_channels"] == [32, 64, 64]


def test_averaged_weights_that_are_not_there(tiny_sd_files):
    assert "no averaged (EMA) weights" in refusal(lambda: tensors_of(tiny_sd_files["clip"], "unet", ema=True))


@pytest.fixture
def reads(monkeypatch) -> Counter[str]:
    """How often each JSON file was read, and each header of tensors, by path, whichever module asked."""
    found: Counter[str] = Counter()

    def counting(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def read(path: Path) -> Any:
            found[str(path)] += 1
            return function(path)

        return read

    for name, function in (("read_json", read_json), ("header", header)):
        counted = counting(function)
        for module in [module for key, module in sys.modules.items() if key.startswith("tinydiff")]:
            if getattr(module, name, None) is function:
                monkeypatch.setattr(module, name, counted)
        if function is header:
            monkeypatch.setattr(weights.tensors, "__defaults__", (counted,))
    return found


def in_shards(folder: Path, copy: Path) -> Path:
    """A copy of a folder with its U-Net in two tiny_sd_files, without what says that it was written otherwise."""
    shutil.copytree(folder, copy)
    (copy / "manifest.json").unlink()
    [path] = (copy / "unet").glob("*.safetensors")
    tensors, names = load_file(path), [f"{path.stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    path.unlink()
    table = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in tensors if table[key] == name}, copy / "unet" / name)
    (copy / "unet" / f"{path.name}.index.json").write_text(json.dumps({"weight_map": table}))
    return copy


OPENED = [("folder", False), ("folder", True), ("shards", False), ("shards", True), ("single file", False)]


OPENED += [("single file", True), ("single file without autoencoder", True), ("DiT", True)]


@pytest.mark.parametrize(("kind", "vae"), OPENED)
def test_opening_a_model_reads_each_json_file_and_header_once(
    kind, vae, tiny_model, tiny_sd_files, altered, tmp_path, reads
):
    if kind == "folder":
        path = tiny_model
    elif kind == "shards":
        path = in_shards(tiny_model, tmp_path / "shards")
    elif kind == "DiT":
        path = tmp_path / "dit.safetensors"
        save_file(published_weights(1, 64), path)
    elif kind == "single file":
        path = tiny_sd_files["clip"]
    else:
        path = altered("clip", lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage_model.")})
    source = Source(path, tiny_sd_files["open_clip"] if vae else None)
    tables = networks(source.configs)
    assert source.description.size and source.tokenizers
    source.check()
    assert all(source.tensors(name) for name in tables)
    asked = set(reads)
    assert open_backend(source, "torch", "cpu").tokenizers is source.tokenizers
    assert max(reads.values()) == 1, reads
    assert {Path(name).name for name in set(reads) - asked} <= {"manifest.json", "hashes.json"}
    opened = {Path(name).name for name in reads if name.endswith(".safetensors")}
    weighed = {*path.rglob("*.safetensors")} if path.is_dir() else {path}
    own = {file.name for file in weighed if not (vae and file.parent.name == "vae")}
    assert opened == own | ({"open_clip.safetensors"} if vae else set())
    if kind == "shards":
        assert reads[str(path / "unet" / "diffusion_pytorch_model.safetensors.index.json")] == 1


SPELLINGS = [  # of the query, key, value and output of the autoencoder's attention
    ("to_q", "to_k", "to_v", "to_out.0"),
    ("q", "k", "v", "proj_out"),
    ("query", "key", "value", "proj_attn"),
    ("to_to_q", "to_to_k", "to_to_v", "to_to_out.0"),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod."])
def test_an_autoencoder_is_the_same_by_any_name_in_any_layout(spelling, wrapped, tiny_sd, tiny_sd_files, tmp_path):
    part, ours = tiny_sd["clip"].parts["vae"], ("to_q", "to_k", "to_v", "to_out.0")
    ldm = ("q", "k", "v", "proj_out")

    def spelt(name: str, old: tuple[str, ...]) -> str:
        for a, b in zip(old, spelling, strict=True):
            name = re.sub(rf"(attentions\.0|attn_1)\.{re.escape(a)}\.(?=weight$|bias$)", rf"\1.{b}.", name)
        return name

    def convolved(name: str, tensor: Tensor) -> Tensor:
        attends = re.search(r"(attentions\.0|attn_1)\..*weight$", name) and tensor.ndim == 2
        return tensor[:, :, None, None].contiguous() if attends and spelling == ldm else tensor

    alone, whole = tmp_path / "vae.safetensors", tmp_path / "whole.safetensors"
    save_file({wrapped + spelt(k, ours): convolved(k, v) for k, v in part.items()}, alone)
    save_file({wrapped + spelt(k, ldm): v for k, v in load_file(tiny_sd_files["clip"]).items()}, whole)
    row = network_of("vae", {})
    in_a_folder = row.renamed(weights.tensors([alone]))
    beside = Source(tiny_sd_files["clip"], vae=alone)
    for tensors in (in_a_folder, dict(beside.tensors("vae")), read(whole)["vae"]):
        assert equal(tensors, part)
