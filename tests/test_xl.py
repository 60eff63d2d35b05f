"""Stable Diffusion XL end to end: small pipelines of diffusers' own making with random weights are opened, drawn with and
converted; at full size, names and shapes alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_xl
import torch
from interpreters import run_without
from PIL import Image
from safetensors.torch import load_file, save_file
from tensors import equal, randomise
from tiny_stable_diffusion import configs_of, sparse
from tiny_xl import SIDE
from torch._subclasses.fake_tensor import FakeTensorMode

from tinydiff import cli
from tinydiff.backends import open_backend
from tinydiff.checkpoints import folder, single_file
from tinydiff.checkpoints.source import Source
from tinydiff.control import Control
from tinydiff.diffusion import noise
from tinydiff.editing import Edit
from tinydiff.errors import UsageError
from tinydiff.networks import network_of
from tinydiff.pipeline import Request, generate

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
PROMPT, NEGATIVE = "Two blue circles, on a dark-green field!", "blurry, low quality"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.nn.Module]]:
    parts = tiny_xl.networks()
    return tiny_xl.written(parts, tmp_path_factory.mktemp("xl")), parts


@pytest.fixture(scope="module")
def pipe(made: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(made[0], add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def copied(made: Any, tmp_path: Path) -> Callable[..., Path]:
    """A function (name) -> a copy of the folder, of which files are to be replaced, never written into."""
    return lambda name="copy": Path(shutil.copytree(made[0], tmp_path / name, copy_function=os.link))


def edit(path: Path, **changes: Any) -> None:
    table = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps(table))


def command(*words: Any) -> None:
    cli.app([str(word) for word in words], standalone_mode=False)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Any, theirs: torch.Tensor) -> bool:
    wanted = theirs.detach().numpy()
    return float(np.abs(np.asarray(ours) - wanted).max()) <= 1e-4 * float(wanted.std())


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    assert ours.std() > 10
    return float((np.abs(ours - np.rint(theirs * 255)) <= 1).mean()) >= 0.999


# ---- the networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 1])
def test_both_towers_say_what_diffusers_is_told(skip, made, pipe):
    backend = open_backend(Source(made[0], clip_skip=skip or None), "torch", "cpu")
    told = backend.encode_text({name: each.encode([PROMPT]) for name, each in backend.tokenizers.items()})
    with torch.no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(PROMPT, clip_skip=skip or None, do_classifier_free_guidance=False)
    assert close(told["encoder_hidden_states"], tokens) and close(told["text_embeds"], pooled)
    assert told["encoder_hidden_states"].shape == (1, 77, 128) and told["text_embeds"].shape == (1, 32)


@torch.no_grad()
def test_a_block_that_clip_skip_leaves_out_of_stable_diffusion_1(tiny_sd_files):
    from transformers import CLIPTextConfig, CLIPTextModel

    source = Source(tiny_sd_files["clip"])
    table = source.configs["text_encoder"]
    theirs = CLIPTextModel(
        CLIPTextConfig(**{k: v for k, v in table.items() if k not in ("architectures", "model_type")})
    )
    theirs.load_state_dict({k.removeprefix("text_model."): v for k, v in source.tensors("text_encoder").items()})
    ids = source.tokenizers["text_encoder"].encode([PROMPT])
    states = theirs.eval()(torch.tensor(ids), output_hidden_states=True).hidden_states
    for skip in (0, 1, 2):
        backend = open_backend(Source(source.path, clip_skip=skip), "torch", "cpu")
        told = backend.encode_text({"text_encoder": ids})["encoder_hidden_states"]
        assert close(told, theirs.final_layer_norm(states[-(skip + 1)]))  # as its pipeline's encode_prompt


def prefixed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network's tensors under the names of its files: transformers 5 drops the prefix of a text encoder's."""
    bare = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    return {f"text_model.{k}" if k.startswith(bare) else k: v for k, v in state.items() if "position_ids" not in k}


@torch.no_grad()
def test_each_network_gives_what_theirs_does(made):
    path, theirs = made
    model = folder.load(Source(path))
    x, context, pooled, t = normal(0, 2, 4, 22, 30), normal(1, 2, 9, 128), normal(2, 2, 32), torch.tensor(601.0)
    sizes = torch.tensor([[1024.0, 768, 3, 5, 512, 640], [88, 120, 0, 0, 88, 120]])
    added = {"text_embeds": pooled, "time_ids": sizes}
    wanted = theirs["unet"](x, t, context, added_cond_kwargs=added).sample  # 30 -> 15 -> 8
    assert close(model.denoiser(x, t, context, **added), wanted)
    for other in (added | {"time_ids": sizes.flip(0)}, added | {"text_embeds": pooled.flip(0)}):
        assert not close(model.denoiser(x, t, context, **other), wanted)
    z, pixels = normal(3, 2, 4, 9, 6), normal(4, 1, 3, 36, 60)
    assert close(model.vae.encode(pixels), theirs["vae"].encode(pixels).latent_dist.parameters)
    assert close(model.vae.decode(z), theirs["vae"].decode(z).sample)


# ---- whole images -----------------------------------------------------------------------------------------------------


def theirs_of(pipe: Any, start: float, request: Request, negative: str | None, **more: Any) -> np.ndarray:
    """The image of diffusers' pipeline from our latents, of which its own start is a multiple."""
    pipe.scheduler.set_timesteps(request.steps)
    factor = pipe.vae_scale_factor
    latents = noise.normal([3], (4, request.height // factor, request.width // factor))
    latents = torch.from_numpy(latents * np.float32(start / float(pipe.scheduler.init_noise_sigma)))
    given = {"width": request.width, "height": request.height, "guidance_scale": request.cfg_scale, "output_type": "np"}
    given |= {"latents": latents, "num_inference_steps": request.steps, "negative_prompt": negative}
    return pipe(PROMPT, **given, **more).images


SAMPLERS = {"EulerDiscreteScheduler": True, "DPMSolverMultistepScheduler": False, "DDIMScheduler": False}


@pytest.mark.parametrize("name", SAMPLERS)
def test_diffusers_draws_the_same_image(name, pipe, copied):
    """From the folder alone, scheduler included; an empty negative prompt is zeros, and sizes need not be its own."""
    import diffusers

    path, scaled = copied(), SAMPLERS[name]
    scheduler = getattr(diffusers, name).from_config(tiny_xl.SCHEDULER)
    (path / "scheduler" / "scheduler_config.json").unlink()
    scheduler.save_pretrained(path / "scheduler")
    edit(path / "model_index.json", scheduler=["diffusers", name])
    backend, pipe.scheduler = open_backend(Source(path), "torch", "cpu"), scheduler
    d = backend.description
    g = d.generate
    assert (g.steps, g.cfg_scale, d.size, d.multiple) == (50, 5.0, SIDE, 4)
    plain = Request(4, 5.0, g.sampler, g.spacing, SIDE // 2, SIDE)
    odd = Request(4, 5.0, g.sampler, g.spacing, 120, 88, original_size=(300, 200), crop=(7, 9))
    said = {"original_size": (200, 300), "crops_coords_top_left": (9, 7)}
    for request, negative, more in ((plain, "", {}), (odd, NEGATIVE, said)):
        first = d.levels(g.sampler, 4, g.spacing)[0]
        theirs = theirs_of(pipe, first.sigma / (first.alpha if scaled else 1.0), request, negative or None, **more)
        ours = generate(backend, [PROMPT], [3], request, [negative])
        assert same(ours, theirs)
        if more:
            assert not same(
                generate(backend, [PROMPT], [3], Request(4, 5.0, g.sampler, g.spacing, 120, 88), [negative]), theirs
            )


def test_diffusers_follows_a_control_image_alike(made, pipe, tmp_path):
    """Also at a size that is no multiple of what its lowest level halves to; and from a single file of the network."""
    from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionXLControlNetPipeline

    network = ControlNetModel.from_unet(made[1]["unet"], conditioning_embedding_out_channels=(16, 32, 96))
    randomise(network, 3)
    network.eval().save_pretrained(tmp_path / "network")
    backend = open_backend(Source(made[0], controls=(tmp_path / "network",)), "torch", "cpu")
    both = StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=network, add_watermarker=False)
    both.scheduler = DDIMScheduler.from_config(tiny_xl.SCHEDULER)
    both.set_progress_bar_config(disable=True)
    request, d = Request(6, 5.0, "ddim", "leading", 120, 88), backend.description
    image = np.random.default_rng(0).integers(0, 256, (88, 120, 3), np.uint8)
    ours = generate(backend, [PROMPT], [3], request, [NEGATIVE], controls=[Control("controlnet", image)])
    first = d.levels("ddim", 6, "leading")[0]
    theirs = theirs_of(both, first.sigma, request, NEGATIVE, image=Image.fromarray(image))
    assert same(ours, theirs)
    assert not same(generate(backend, [PROMPT], [3], request, [NEGATIVE]), theirs)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / "network.safetensors")
    source = Source(made[0], controls=(tmp_path / "network.safetensors",))
    source.check()
    assert equal(folder.load(source).networks["controlnet"].state_dict(), network.state_dict())


def test_an_empty_prompt_is_encoded_where_the_folder_says_so(copied):
    path, other = copied(), copied("other")
    edit(other / "model_index.json", force_zeros_for_empty_prompt=False)
    request = Request(2, 5.0, "euler", "leading", 32, 32)
    zeros, said = (generate(open_backend(Source(p), "torch", "cpu"), [PROMPT], [3], request) for p in (path, other))
    assert (zeros != said).any()


def test_diffusers_paints_the_same_with_an_inpainting_model(tmp_path, monkeypatch):
    """Nine channels. Theirs draws the masked image's latents where ours takes the mean, and keeps no pixels."""
    from diffusers import StableDiffusionXLInpaintPipeline

    path = tiny_xl.written(tiny_xl.networks(9), tmp_path)
    pipe = StableDiffusionXLInpaintPipeline.from_pretrained(path, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    scale = pipe.vae.config.scaling_factor
    mean = lambda image, generator: pipe.vae.encode(image).latent_dist.mean * scale  # noqa: E731
    monkeypatch.setattr(pipe, "_encode_vae_image", mean)
    rng = np.random.default_rng(0)
    image, area = rng.integers(0, 256, (64, 64, 3), np.uint8), np.zeros((64, 64), np.float32)
    area[:, 24:] = 1
    backend = open_backend(Source(path), "torch", "cpu")
    request = Request(6, 5.0, "euler", "leading", 64, 64)
    first = backend.description.levels("euler", 6, "leading")[0]
    given = {"image": Image.fromarray(image), "mask_image": Image.fromarray(np.uint8(area * 255)), "strength": 1.0}
    theirs = theirs_of(pipe, first.sigma / first.alpha, request, NEGATIVE, **given)[0]
    ours = generate(backend, [PROMPT], [3], request, [NEGATIVE], edit=Edit(image, 1.0, area))[0]
    assert same(ours[area == 1], theirs[area == 1]) and (ours[area == 0] == image[area == 0]).all()


# ---- single files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "one.safetensors"
    command("export", made[0], "-o", path, "--format", "single-file")
    return path


def test_diffusers_converts_our_single_file_to_the_same_bits(made, one):
    from diffusers.loaders import single_file_utils as theirs

    path, parts = made
    tensors = load_file(one)
    unet = theirs.convert_ldm_unet_checkpoint(dict(tensors), dict(parts["unet"].config))
    assert equal(unet, dict(parts["unet"].state_dict()))
    second = theirs.convert_open_clip_checkpoint(
        parts["text_encoder_2"], dict(tensors), "conditioner.embedders.1.model."
    )
    ours = dict(Source(one).tensors("text_encoder_2"))
    assert equal(prefixed(second), ours)
    assert equal(prefixed(theirs.convert_ldm_clip_checkpoint(dict(tensors))), dict(Source(one).tensors("text_encoder")))
    assert all(equal(Source(one).tensors(name), Source(path).tensors(name)) for name in PARTS)


def test_another_autoencoder_of_a_file_has_the_family_s_scale(made, one, tiny_sd_files):
    assert Source(made[0], vae=one).description.scaling_factor == Source(one).description.scaling_factor == 0.13025
    assert Source(one, vae=tiny_sd_files["clip"]).description.scaling_factor == 0.13025


def test_a_single_file_becomes_a_folder_of_the_same_model(made, one, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    command("export", one, "-o", tmp_path / "back", "--format", "folder")
    before, after = Source(made[0]).configs, Source(tmp_path / "back").configs
    assert all(equal(Source(tmp_path / "back").tensors(name), Source(made[0]).tensors(name)) for name in PARTS)
    ids = ("pad_token_id", "_diffusers_version")
    for name, table in after.items():
        assert {k: v for k, v in table.items() if before[name].get(k) != v and k not in ids} == {}, name
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "back", add_watermarker=False)
    assert pipe.tokenizer_2.pad_token == "!" and pipe.config.force_zeros_for_empty_prompt
    words = {"padding": "max_length", "max_length": 77, "return_tensors": "np"}
    for name, tokenizer in Source(one).tokenizers.items():
        theirs = {"text_encoder": pipe.tokenizer, "text_encoder_2": pipe.tokenizer_2}[name]
        assert np.array_equal(theirs([PROMPT], **words).input_ids, tokenizer.encode([PROMPT]))


# ---- at full size -----------------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {  # unet/config.json of the published base
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TEXT = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
SMALL = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def test_a_single_file_of_full_size_is_read_as_published(tmp_path):
    """Names by diffusers' classes on the meta device, a file of them without values."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        theirs = {
            "unet": UNet2DConditionModel(**BASE),
            "vae": AutoencoderKL(**levels, block_out_channels=(128, 256, 512, 512), layers_per_block=2),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT, **SMALL)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, **BIG, projection_dim=1280)),
        }
    theirs_named = {name: prefixed(network.state_dict()) for name, network in theirs.items()}
    tables, shapes = {"text_encoder": "clip", "text_encoder_2": "projected"}, dict[str, tuple[int, ...]]()
    for name, state in theirs_named.items():
        layout = {"layers_per_block": 2, "down_block_types": BASE["down_block_types"], "num_hidden_layers": 32}
        layout |= {"down_block_types": ("",) * 4} if name == "vae" else {}
        with FakeTensorMode():
            part = {k: torch.empty(v.shape) for k, v in state.items()}
            written = single_file.to_ldm(name, part, tables.get(name, name), layout, xl=True)
        shapes |= {k: tuple(v.shape) for k, v in written.items()}
    path = sparse(tmp_path / "xl.safetensors", shapes)
    configs = configs_of(path)
    unet = configs["unet"]
    assert {key: tuple(v) if isinstance(v := unet[key], list) else v for key in BASE} == {
        key: tuple(v) if isinstance(v, list) else v for key, v in BASE.items()
    }
    assert [configs["text_encoder"][key] for key in SMALL] == list(SMALL.values())
    assert [configs["text_encoder_2"][key] for key in BIG] == list(BIG.values())
    assert configs["text_encoder_2"]["projection_dim"] == 1280 and configs["vae"]["scaling_factor"] == 0.13025
    source = Source(path)
    source.check()
    d = source.description
    assert (d.size, d.multiple, d.generate.cfg_scale, d.generate.sampler) == (1024, 8, 5.0, "euler")
    assert d.conditions["text_embeds"].axes == ("batch", 1280)
    for name, state in theirs_named.items():
        with torch.device("meta"):
            ours = network_of(name, source.configs[name]).build(source.table(name))
        assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in state.items()}


# ---- what cannot be opened --------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], Any]:
    return lambda path: shutil.rmtree(path / name)


def refiner(path: Path) -> None:
    edit(path / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no second text encoder": (without("text_encoder_2"), "text_encoder_2: missing; copy the whole model folder"),
    "no first text encoder": (without("text_encoder"), "text_encoder: missing; copy the whole model folder"),
    "no second tokenizer": (without("tokenizer_2"), "tokenizer_2: missing; copy the whole model folder"),
    "the refiner": (refiner, "this is the Stable Diffusion XL refiner"),
    "another projection": (
        lambda path: edit(path / "text_encoder_2" / "config.json", projection_dim=48),
        "is told a text's vector of 32, and",
    ),
    "sizes that do not fit": (
        lambda path: edit(path / "unet" / "config.json", addition_time_embed_dim=16),
        "addition_embed_type: text_time needs",
    ),
    "latents with means": (
        lambda path: edit(path / "vae" / "config.json", latents_mean=[0.1] * 4),
        "has latents_mean or latents_std, which are not supported",
    ),
}


def test_what_cannot_be_opened_is_said_without_torch(copied, one, tiny_sd_files, tmp_path):
    words, wanted = [], []
    for i, (spoil, says) in enumerate(BAD.values()):
        spoil(path := copied(str(i)))
        words.append(["generate", "a", "-m", str(path)])
        wanted.append(f"4 {says}")
    names = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}
    for shapes, says in (
        ({"model.diffusion_model.label_emb.0.0.weight": (1280, 2816)}, "has no text encoder"),
        ({"model.diffusion_model.label_emb.0.0.weight": (1536, 2560)}, "this is the Stable Diffusion XL refiner"),
    ):
        words.append(["generate", "a", "-m", str(sparse(tmp_path / f"{len(words)}.safetensors", names | shapes))])
        wanted.append(f"4 {says}")
    for flags, says in (
        (["--clip-skip", "2", "-m", str(one)], "--clip-skip 2: this model's text encoders can leave out 0 to 1 blocks"),
        (["--clip-skip", "3", "-m", str(tiny_sd_files["clip"])], "leave out 0 to 2 blocks"),
        (["--clip-skip", "1", "-m", "emoji"], "--clip-skip are for weights"),
    ):
        words.append(["generate", "a", *flags])
        wanted.append(f"2 {says}")
    said = run_without(
        f"""
import io, contextlib, sys
from tinydiff.endings import one_line_errors
from tinydiff.cli import app
for words in {words!r}:
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            with one_line_errors():
                app(words + ["-o", "never.png"], standalone_mode=False)
        except SystemExit as end:
            print(end.code, told.getvalue().strip())
""",
        "torch",
    )
    lines = said.strip().splitlines()
    assert len(lines) == len(wanted), said
    for line, text in zip(lines, wanted, strict=True):
        code, _, says = text.partition(" ")
        assert line.startswith(f"{code} ") and says in line, (line, text)


def test_flags_of_sizes_are_for_models_that_are_told_them(tiny_sd_files, one, tmp_path):
    for path, flags in (
        (tiny_sd_files["clip"], ["--crop", "1,2"]),
        (one, ["--original-size", "10"]),
        (one, ["--crop", "-1,2"]),
    ):
        with pytest.raises(UsageError, match=flags[0]):
            command("generate", "a", "-m", path, "-o", tmp_path / "a.png", *flags)
