"""FLUX.2's autoencoder under a new denoiser: its latents and pictures are diffusers', normalised; trained, drawn, exported."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreters import run_without
from PIL import Image
from safetensors.torch import load_file, save_file
from tensors import equal, noise, randomise

from tinydiff import cli, config, export, images
from tinydiff.backends import open_backend
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.editing import Edit
from tinydiff.errors import ModelError
from tinydiff.pipeline import Request, generate
from tinydiff.schema import to_toml
from tinydiff.training import loop

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
WEIGHTS = "diffusion_pytorch_model.safetensors"
REQUEST = Request(3, 3.0, "dpmpp_2m", "trailing", 16, 16)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """diffusers' autoencoder, narrow, with random weights and statistics."""
    from diffusers import AutoencoderKLFlux2

    levels: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = AutoencoderKLFlux2(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, sample_size=16, **levels
    )
    randomise(vae)
    vae.bn.running_mean.copy_(noise(16, seed=1))
    vae.bn.running_var.copy_(noise(16, seed=2).square() + 0.1)
    return vae.eval()


@pytest.fixture(scope="module")
def given(theirs, tmp_path_factory) -> dict[str, Path]:
    """Its folder, and files by diffusers' names and by those of Black Forest Labs."""
    home = tmp_path_factory.mktemp("flux2")
    theirs.save_pretrained(home / "vae")
    tensors = load_file(home / "vae" / WEIGHTS)
    save_file(tensors, home / "diffusers.safetensors")
    save_file({of_theirs(k): square(k, v) for k, v in tensors.items()}, home / "flux2-vae.safetensors")
    return {path.stem: path for path in home.iterdir()}


NAMES = {
    r"^quant_conv": "encoder.quant_conv",
    r"^post_quant_conv": "decoder.post_quant_conv",
    r"conv_norm_out": "norm_out",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_([qkv])\.": r"mid.attn_1.\1.",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.(\d)\.resnets": lambda found: f"up.{1 - int(found[1])}.block",
    r"up_blocks\.(\d)\.upsamplers\.0": lambda found: f"up.{1 - int(found[1])}.upsample",
    r"conv_shortcut": "nin_shortcut",
}


def of_theirs(name: str) -> str:
    """A name of diffusers as FLUX.2's own code has it."""
    for pattern, new in NAMES.items():
        name = re.sub(pattern, new, name)
    return name


def square(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Attention by 1x1 convolutions."""
    return tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor


@torch.inference_mode()
def latents_of(vae: Any, x: torch.Tensor) -> torch.Tensor:
    """As diffusers' Flux2Pipeline makes them of images."""
    from diffusers import Flux2Pipeline

    return Flux2Pipeline._encode_vae_image(
        type("Pipe", (), {"vae": vae, "_patchify_latents": Flux2Pipeline._patchify_latents}), x, None
    )  # type: ignore[arg-type]


@torch.inference_mode()
def images_of(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """As diffusers' Flux2Pipeline draws them."""
    from diffusers import Flux2Pipeline

    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    z = z * std + vae.bn.running_mean.view(1, -1, 1, 1)
    return vae.decode(Flux2Pipeline._unpatchify_latents(z)).sample


@pytest.mark.parametrize("name", ["vae", "diffusers", "flux2-vae"])
@torch.inference_mode()
def test_latents_and_images_are_those_of_diffusers(name, theirs, given):
    cfg = config.load(None, [f"autoencoder.path={given[name]}", "data.resolution=32"])
    assert (cfg.autoencoder.kind, cfg.autoencoder.factor, cfg.autoencoder.latent_channels) == ("flux2", 4, 4)
    assert cfg.latents == {"sample_size": 8, "in_channels": 16, "out_channels": 16}
    network = cfg.autoencoder_network
    vae = folder.opened(network, network.describe(cfg), network.given(cfg))
    x, z = noise(2, 3, 32, 48), noise(2, 16, 4, 6)
    mean, std = vae.distribution(x)
    posterior = theirs.encode(x).latent_dist
    for ours, wanted in ((mean, latents_of(theirs, x)), (vae.decode(z), images_of(theirs, z))):
        assert ours.shape == wanted.shape and (ours - wanted).abs().max() <= 1e-4 * wanted.std()
    drawn = posterior.mean + posterior.std  # one deviation away is so in both
    far = (theirs.bn.running_var + theirs.config.batch_norm_eps).sqrt().view(1, -1, 1, 1) * (mean + std)
    far = torch.nn.functional.pixel_shuffle(far + theirs.bn.running_mean.view(1, -1, 1, 1), 2)
    assert (far - drawn).abs().max() <= 1e-4 * drawn.std()


# ---- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(run_config, given, tmp_path_factory) -> Any:
    """A function of settings -> the directory of a short run on the given autoencoder."""
    cfg = replace(run_config, unet=replace(run_config.unet, down_block_types=("DownBlock2D",)))  # exported sooner
    (path := tmp_path_factory.mktemp("c") / "c.toml").write_text(to_toml(cfg))

    def make(*more: str, vae: Path = given["vae"]) -> Path:
        run_dir, own = tmp_path_factory.mktemp("run"), [f"autoencoder.path={vae}", "train.denoiser.steps=3", *more]
        loop.run(config.load(path, own), run_dir)
        return run_dir

    return make


@pytest.fixture(scope="module")
def model(train) -> Path:
    """A model on the frozen autoencoder, its U-Net's weights random: a few steps leave too little to compare."""
    path = train("train.autoencoder.steps=0") / "model"
    opened = folder.load(Source(path))
    randomise(opened.denoiser)
    folder.save(path, opened, config.load(path / "tinydiff.toml", stored=True), force=True)
    return path


def test_a_model_has_it_as_it_was_and_opens_it_in_diffusers(model, theirs, given):
    from diffusers import AutoencoderKLFlux2

    kept, exact = load_file(model / "vae" / WEIGHTS), load_file(given["vae"] / WEIGHTS)
    del exact["bn.num_batches_tracked"]
    assert equal(kept, exact)
    again = AutoencoderKLFlux2.from_pretrained(model / "vae").eval()
    x = noise(1, 3, 16, 16)
    assert torch.equal(latents_of(again, x), latents_of(theirs, x))
    assert "AutoencoderKLFlux2" in json.loads((model / "model_index.json").read_text())["_no_diffusers_pipeline"]


def test_what_it_says_of_itself(model, capsys):
    cli.app(["inspect", str(model), "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert (told["latent_channels"], told["factor"], told["size"], told["latent_size"]) == (16, 4, 16, 4)
    cli.app(["inspect", str(model)], standalone_mode=False)
    assert "16x4x4" in capsys.readouterr().out


def pictures(place: Path) -> np.ndarray:
    return np.stack(
        [images.fit(np.asarray(Image.open(path).convert("RGB")), 16) for path in sorted(place.glob("*.png"))]
    )


@torch.inference_mode()
def test_the_denoiser_learns_normalised_latents(model, theirs, image_folder):
    """They are scaled by what is measured of them, as of any autoencoder: over all images, with their deviations."""
    x = torch.from_numpy(images.to_pixels(pictures(image_folder)))
    far = torch.nn.functional.pixel_unshuffle(theirs.encode(x).latent_dist.std, 2)
    far = far / torch.sqrt(theirs.bn.running_var.view(1, -1, 1, 1) + theirs.config.batch_norm_eps)
    variance = latents_of(theirs, x).var() + far.square().mean()
    assert Source(model).description.scaling_factor == pytest.approx(variance.item() ** -0.5, rel=1e-3)


def drawn(path: Path, kind: str, edit: Edit | None = None) -> np.ndarray:
    return generate(open_backend(Source(path), kind, "cpu"), ["a red square"], [3], REQUEST, edit=edit).astype(int)


def test_an_image_is_changed_by_way_of_it(model, theirs, image_folder):
    image = pictures(image_folder)[0]
    x = torch.from_numpy(images.to_pixels(image[None]))
    wanted = images.to_uint8(images_of(theirs, latents_of(theirs, x)).numpy())
    assert np.abs(drawn(model, "torch", Edit(image, 0.0)) - wanted).max() <= 1
    assert np.abs(drawn(model, "torch", Edit(image, 0.5)) - drawn(model, "torch")).max() > 5


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory) -> Path:
    *_, image = export.export(Source(model), path := tmp_path_factory.mktemp("bundle") / "bundle")
    assert image["same"] == 1
    return path


def test_a_bundle_draws_and_changes_images_without_torch(bundle, model, theirs, image_folder, tmp_path):
    image = pictures(image_folder)[0]
    for edit in (None, Edit(image, 0.0), Edit(image, 0.7)):
        assert np.abs(drawn(bundle, "onnx", edit) - drawn(model, "torch", edit)).max() <= 1
    backend, x, z = open_backend(Source(bundle), "onnx", "cpu"), noise(1, 3, 16, 32), noise(1, 16, 4, 8)
    for ours, wanted in (
        (backend.encode_image(x.numpy())[:, :16], latents_of(theirs, x).numpy()),
        (backend.decode(z.numpy()), images_of(theirs, z).numpy()),
    ):
        assert np.abs(ours - wanted).max() <= 1e-4 * wanted.std()
    words = ["generate", "red", "-m", str(bundle), "--steps", "1", "-o", str(tmp_path / "a.png")]
    run_without(f"from tinydiff import cli\ncli.app({words!r}, standalone_mode=False)", "torch")
    assert (tmp_path / "a.png").stat().st_size > 100


def test_tuned_on_it_keeps_its_statistics(train, given, tmp_path):
    from diffusers import AutoencoderKLFlux2

    few = ["train.autoencoder.steps=2", "train.autoencoder.perceptual_weight=0"]
    made = train(*few, vae=given["flux2-vae"]) / "model" / "vae"
    kept, before = load_file(made / WEIGHTS), load_file(given["vae"] / WEIGHTS)
    moved = {k for k, v in kept.items() if not torch.equal(v, before[k])}
    assert not any("bn." in k for k in moved) and len(moved) > 0.9 * len(kept)
    tuned = AutoencoderKLFlux2.from_pretrained(made).eval()
    ours = folder.load(Source(made.parent)).vae
    x = noise(1, 3, 16, 16)
    assert torch.allclose(latents_of(tuned, x), ours.distribution(x)[0], atol=1e-4)


# ---- refusals ---------------------------------------------------------------------------------------------------------


def without(name: str) -> Any:
    return lambda table, tensors: tensors.pop(name)


def with_(name: str, *shape: int) -> Any:
    return lambda table, tensors: tensors.update({name: torch.ones(shape)})


def said(**keys: Any) -> Any:
    return lambda table, tensors: table.update(keys)


BAD: dict[str, tuple[Any, str]] = {
    "no means": (without("bn.running_mean"), r"asks for bn\.running_mean \[16\], and .* has none"),
    "no variances": (without("bn.running_var"), r"asks for bn\.running_var \[16\], and .* has none"),
    "other statistics": (with_("bn.running_var", 128), r"bn\.running_var \[16\], and .* has \[128\]"),
    "other channels": (
        said(latent_channels=8),
        r"decoder\.conv_in\.weight \[64, 8, 3, 3\], and .* has \[64, 4, 3, 3\]|channels 8 in patches of 32",
    ),
    "another epsilon": (said(batch_norm_eps=1e-5), "batch_norm_eps is 1e-05, and only 0.0001 is supported"),
    "another patch": (said(patch_size=[1, 1]), r"patch_size is \(1, 1\), and only \(2, 2\) is supported"),
    "another decoder": (said(decoder_block_out_channels=[32, 32]), "decoder_block_out_channels is"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_whole_is_refused_by_its_header(case, given, model, tmp_path):
    """As what a run begins with, and inside of a model."""
    change, says = BAD[case]
    vae = Path(shutil.copytree(model, tmp_path / "model")) / "vae"
    for path in (given["vae"], model / "vae"):
        table, tensors = json.loads((path / "config.json").read_text()), load_file(path / WEIGHTS)
        change(table, tensors)
        (vae / "config.json").write_text(json.dumps(table))
        save_file(tensors, vae / WEIGHTS)
        (tmp_path / "model" / "manifest.json").unlink(missing_ok=True)
        with pytest.raises(ModelError, match=says) as caught:
            config.load(None, [f"autoencoder.path={vae}"]) if path == given["vae"] else Source(vae.parent).check()
        assert len(str(caught.value).splitlines()) == 1


def test_refusals_need_no_torch(given, tmp_path):
    vae = Path(shutil.copytree(given["vae"], tmp_path / "vae"))
    tensors = load_file(vae / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if k != "bn.running_var"}, vae / WEIGHTS)
    words = ["train", "--run-dir", str(tmp_path / "run"), "--set", f"autoencoder.path={vae}"]
    code = f"import sys\nfrom tinydiff import cli\nsys.argv[1:] = {words!r}\n"
    code += "try: cli.main()\nexcept SystemExit as end: print(end.code)"
    assert run_without(code, "torch").strip() == "4" and not (tmp_path / "run").exists()


def test_a_denoiser_of_other_latents_and_a_single_file_are_refused(model, tmp_path):
    path = Path(shutil.copytree(model, tmp_path / "model")) / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 4}))
    with pytest.raises(ModelError, match="in_channels 4, and .* has latent_channels 4 in patches of 16; 16, or 33"):
        _ = Source(tmp_path / "model").configs
    with pytest.raises(ModelError, match="and a KL autoencoder has a single-file layout"):
        cli.app(
            ["export", str(model), "-o", str(tmp_path / "x.safetensors"), "--format", "single-file"],
            standalone_mode=False,
        )
