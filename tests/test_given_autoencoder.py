"""A given autoencoder: found where a name or a folder leads, the shape taken from it, frozen or tuned on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import sha256
from safetensors.torch import load_file, save_file
from tensors import equal

from tinydiff import config, evaluate, images
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.config import load
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import shipped
from tinydiff.schema import to_toml
from tinydiff.text.tokenizer import Tokenizer
from tinydiff.training import loop
from tinydiff.training.losses import chroma, psnr

SHAPE = ("block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention")


def test_the_shape_is_that_of_the_given_one(tiny_model: Path) -> None:
    theirs = json.loads((tiny_model / "vae" / "config.json").read_text())
    cfg = load(None, [f"autoencoder.path={tiny_model}", "data.resolution=32"])
    assert {name: getattr(cfg.autoencoder, name) for name in SHAPE} == {
        name: tuple(theirs[name]) if isinstance(theirs[name], list) else theirs[name] for name in SHAPE
    }
    assert cfg.autoencoder.path == str(tiny_model)


def test_weights_are_read_and_may_be_trained(tiny_model: Path, tiny_config: config.Config) -> None:
    cfg = load(None, [f"autoencoder.path={tiny_model}", "data.resolution=32"])
    model = folder.build(cfg, Tokenizer.train(["a"], 514, 8))
    theirs = load_file(tiny_model / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(theirs[k], v) for k, v in model.vae.state_dict().items())
    assert all(p.requires_grad for p in model.vae.parameters())
    with torch.no_grad():
        for p in model.vae.parameters():
            p.add_(1)
    again = load_file(tiny_model / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(theirs[k], again[k]) for k in theirs)  # the file is not written to


@pytest.mark.parametrize("place", ["model", "run", "vae"])
def test_it_is_found_in_models_runs_and_folders_of_its_own(place: str, tiny_model: Path, tmp_path: Path) -> None:
    if place == "run":
        (tmp_path / "model").symlink_to(tiny_model)
    path = {"model": tiny_model, "run": tmp_path, "vae": tiny_model / "vae"}[place]
    assert load(None, [f"autoencoder.path={path}", "data.resolution=32"]).autoencoder.latent_channels > 0


def test_a_missing_one_is_named_before_anything_is_built(tiny_config: config.Config, tmp_path: Path) -> None:
    changed = dataclasses.replace(tiny_config.autoencoder, path=str(tmp_path / "none"))
    cfg = dataclasses.replace(tiny_config, autoencoder=changed)
    (tmp_path / "c.toml").write_text(to_toml(cfg))
    assert load(tmp_path / "c.toml") == cfg  # whoever only reads the configuration needs no autoencoder
    with pytest.raises(ModelError, match="holds no autoencoder"):
        folder.build(cfg, Tokenizer.train(["a"], 514, 8))


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_that_of_a_single_file_is_taken(kind: str, tiny_sd, tiny_sd_files, tmp_path: Path) -> None:
    """Of a whole Stable Diffusion, or of a file that has nothing else."""
    whole, prefix = load_file(tiny_sd_files[kind]), "first_stage_model."
    alone = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
    save_file(alone, tmp_path / "vae.safetensors")
    for path in (tiny_sd_files[kind], tmp_path / "vae.safetensors"):
        cfg = load(None, [f"autoencoder.path={path}", "data.resolution=32"])
        assert list(cfg.autoencoder.block_out_channels) == list(tiny_sd[kind].configs["vae"]["block_out_channels"])
        tensors = folder.build(cfg, Tokenizer.train(["a"], 514, 8)).vae.state_dict()
        assert equal(tensors, tiny_sd[kind].parts["vae"])


def test_a_file_without_one_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"x\.safetensors: has no "):
        load(None, [f"autoencoder.path={tmp_path / 'x.safetensors'}"])


@pytest.mark.parametrize("name", ["AutoencoderDC", "AutoencoderTiny"])
def test_one_of_another_class_is_refused_by_name(name: str, tiny_model: Path, tmp_path: Path) -> None:
    table = json.loads((tiny_model / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(table | {"_class_name": name}))
    with pytest.raises(
        ModelError,
        match=f"_class_name is '{name}', and only AutoencoderKL, VQModel and AutoencoderKLFlux2 are supported",
    ):
        load(None, [f"autoencoder.path={tmp_path}"])


def test_one_that_cannot_be_ours_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    table = json.loads((tiny_model / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(table | {"act_fn": "relu"}))
    with pytest.raises(ModelError, match="act_fn"):
        load(None, [f"autoencoder.path={tmp_path}"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_that_is_not_finite_is_refused_before_a_run_begins(
    value: float, run_config: config.Config, tiny_model: Path, tmp_path: Path
) -> None:
    """Not told of as training that diverged, with a fix that mends nothing."""
    tensors = load_file(tiny_model / "vae" / "diffusion_pytorch_model.safetensors")
    tensors["decoder.conv_in.bias"][1] = value
    (tmp_path / "vae").mkdir()
    save_file(tensors, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "vae" / "config.json").write_bytes((tiny_model / "vae" / "config.json").read_bytes())
    cfg = dataclasses.replace(run_config, autoencoder=dataclasses.replace(run_config.autoencoder, path=str(tmp_path)))
    cfg = dataclasses.replace(cfg, autoencoder=cfg.autoencoder_network.completed(cfg))
    with pytest.raises(ModelError, match=r"vae: decoder\.conv_in\.bias has NaN or infinite values; copy"):
        loop.run(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_alone_publishes_what_the_next_run_begins_with(run_config: config.Config, tmp_path: Path) -> None:
    first = loop.run(run_config, tmp_path / "first", last="autoencoder")
    assert first == tmp_path / "first" / "autoencoder"
    saved = load_file(first / "diffusion_pytorch_model.safetensors")
    (tmp_path / "c.toml").write_text(to_toml(run_config))
    frozen = [f"autoencoder.path={tmp_path / 'first'}", "train.autoencoder.steps=0", "train.denoiser.steps=2"]
    model = loop.run(load(tmp_path / "c.toml", frozen), tmp_path / "second")
    kept = folder.load(Source(model)).vae.state_dict()
    assert all(torch.equal(saved[k], v) for k, v in kept.items())
    assert folder.load(Source(model)).scaling_factor != 1  # measured on the data


def test_another_one_than_the_run_was_begun_with_is_refused_and_the_model_stays_what_it_is(
    run_config: config.Config, tiny_model: Path, tmp_path: Path
) -> None:
    """Of other weights, of another shape, damaged or gone: what has been learnt of its latents is of no others."""
    vae, run_dir = tmp_path / "vae", tmp_path / "run"
    shutil.copytree(tiny_model / "vae", vae)
    (tmp_path / "c.toml").write_text(to_toml(run_config))

    def train() -> Path:
        sets = [f"autoencoder.path={vae}", "train.autoencoder.steps=0", "train.denoiser.steps=2"]
        return loop.run(load(tmp_path / "c.toml", sets), run_dir)

    model = train()
    table, tensors = (vae / "config.json").read_text(), load_file(vae / "diffusion_pytorch_model.safetensors")
    before = sha256(run_dir, run_dir.glob("model/*/*"))
    save_file({k: v + 0.01 for k, v in tensors.items()}, vae / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match="vae: not the autoencoder that the run was begun with; put that back"):
        train()
    (vae / "config.json").write_text(table.replace('"latent_channels": 4', '"latent_channels": 8'))
    wider = {"decoder.conv_in.weight": tensors["decoder.conv_in.weight"].repeat(1, 2, 1, 1)}
    save_file(tensors | wider, vae / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UsageError, match=r"autoencoder\.latent_channels \(4 -> 8\)"):
        train()
    for damage in ("{", "[]", None):
        (vae / "config.json").write_text(damage) if damage else shutil.rmtree(vae)
        with pytest.raises(ModelError, match="vae"):
            train()
        assert (
            Source(model).description.latent_channels
            == load(model / "tinydiff.toml", stored=True).latents["in_channels"]
        )
        assert evaluate.data_settings(model) == run_config.data
    assert sha256(run_dir, run_dir.glob("model/*/*")) == before


@pytest.mark.peers
def test_what_a_stage_publishes_opens_in_diffusers(run_config: config.Config, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    place = loop.run(run_config, tmp_path / "run", last="autoencoder")
    vae = AutoencoderKL.from_pretrained(place)
    assert vae.config.latent_channels == run_config.autoencoder.latent_channels


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_general_one_is_shipped_and_good(size: int) -> None:
    """Photographs that it has never seen, and colours as strong as they come."""
    datasets = pytest.importorskip("sklearn.datasets")
    cfg = load(None, ["autoencoder.path=general", "data.resolution=512"])
    assert (cfg.autoencoder.factor, cfg.autoencoder.latent_channels) == (8, 16)
    network, place = cfg.autoencoder_network, shipped("autoencoder")
    assert sum(path.stat().st_size for path in place.iterdir()) <= 14e6
    vae = folder.opened(network, network.describe(cfg), network.given(cfg))
    photos = [images.fit(datasets.load_sample_image(name), size) for name in ("china.jpg", "flower.jpg")]
    strong = np.tile(np.uint8([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]]), (size, 1, 1)).repeat(
        size // 4, 1
    )
    pixels = torch.from_numpy(images.to_pixels(np.stack([*photos, strong])))
    with torch.no_grad():
        drawn = vae.decode(vae.distribution(pixels)[0]).clamp(-1, 1)
    assert psnr(pixels[:2], drawn[:2]) > 22
    assert 50 * chroma(pixels - drawn).abs().mean() < 3  # percent of the range
