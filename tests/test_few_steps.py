"""Models of few steps as files: LCM, TCD, and the schedules of Turbo and Lightning, against diffusers' pipelines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_xl
import torch
from tensors import randomise

from tinydiff import cli
from tinydiff.backends import open_backend
from tinydiff.checkpoints import single_file
from tinydiff.checkpoints.source import Source
from tinydiff.diffusion import noise
from tinydiff.diffusion.samplers import timed
from tinydiff.diffusion.schedules import scaled_linear
from tinydiff.errors import UsageError
from tinydiff.pipeline import Request, generate

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

PROMPT, SEED, SIDE, STEPS = "two blue circles", 3, 32, 4


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by whether guidance was distilled into their U-Net."""
    widths = {"guided": None, "distilled": 16}
    parts = {name: tiny_xl.networks(**tiny_xl.SHALLOW, time_cond_proj_dim=width) for name, width in widths.items()}
    return {name: tiny_xl.written(each, tmp_path_factory.mktemp(name)) for name, each in parts.items()}


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a LatentConsistencyModelPipeline of Stable Diffusion 1 writes."""
    import diffusers
    from transformers import CLIPTokenizer

    home, parts = tmp_path_factory.mktemp("lcm"), tiny_xl.networks()
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=64,
        time_cond_proj_dim=32,
    )
    randomise(unet, 5)
    single_file.tokenizer("clip").save(home / "tokenizer")
    diffusers.LatentConsistencyModelPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        unet=unet,
        tokenizer=CLIPTokenizer.from_pretrained(home / "tokenizer"),
        scheduler=diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(home / "model")
    return home / "model"


def draws(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Our noise, step by step."""
    step = 0
    while True:
        step += 1
        yield torch.from_numpy(noise.normal([SEED], shape, step))


def drawn(
    path: Path, request: Request, monkeypatch: pytest.MonkeyPatch, negative: str = "", **more: Any
) -> list[np.ndarray]:
    """An image by tinydiff, and that of the folder's own pipeline from the same latents, with the same noise."""
    import diffusers

    backend = open_backend(Source(path), "torch", "cpu")
    d = backend.description
    ours = generate(backend, [PROMPT], [SEED], request, [negative])
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    shape = (4, request.height // d.factor, request.width // d.factor)
    queue = draws(shape)
    module = type(pipe.scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(queue), raising=False)
    pipe.scheduler.set_timesteps(request.steps)
    first = d.levels(request.sampler, request.steps, request.spacing)[0]
    scale = first.sigma / (first.alpha if "Euler" in module or "euler" in module else 1.0)
    latents = torch.from_numpy(noise.normal([SEED], shape) * np.float32(scale / float(pipe.scheduler.init_noise_sigma)))
    given = {"width": request.width, "height": request.height, "guidance_scale": request.cfg_scale, "output_type": "np"}
    given |= {"negative_prompt": negative} if negative else {}
    theirs = pipe(PROMPT, latents=latents, num_inference_steps=request.steps, **given, **more).images
    return [ours, theirs]


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    assert ours.std() > 10
    return float((np.abs(ours - np.rint(theirs * 255)) <= 1).mean()) >= 0.999


SCHEDULES = {  # a folder's scheduler: what of it is drawn here, and the guidance that its card says
    "turbo": (
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        "euler_ancestral",
        0.0,
    ),
    "lightning": ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "euler", 0.0),
    "lcm": ({"_class_name": "LCMScheduler"}, "lcm", 1.0),
    "tcd": ({"_class_name": "TCDScheduler"}, "tcd", 1.5),
}


def scheduled(path: Path, table: dict[str, Any], home: Path) -> Path:
    """The same model with another scheduler: a folder of links."""
    home.mkdir()
    for each in path.iterdir():
        if each.name not in ("scheduler", "model_index.json"):
            (home / each.name).symlink_to(each)
    (home / "scheduler").mkdir()
    (home / "scheduler" / "scheduler_config.json").write_text(json.dumps(tiny_xl.SCHEDULER | table))
    index = json.loads((path / "model_index.json").read_text()) | {"scheduler": ["diffusers", table["_class_name"]]}
    (home / "model_index.json").write_text(json.dumps(index))
    return home


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_few_steps(name, xl, tmp_path, monkeypatch):
    table, sampler, scale = SCHEDULES[name]
    path = scheduled(xl["guided"], table, tmp_path / "model")
    g = Source(path).description.generate
    assert g.sampler == sampler and Source(path).description.notes == ()
    eta = {"eta": 0.3} if name == "tcd" else {}
    request = Request(STEPS, scale, g.sampler, g.spacing, SIDE, SIDE)
    assert same(*drawn(path, request, monkeypatch, **eta))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_eta_of_tcd(eta, xl, tmp_path, monkeypatch):
    path = scheduled(xl["guided"], SCHEDULES["tcd"][0], tmp_path / "model")
    assert same(*drawn(path, Request(5, 1.0, "tcd", "leading", SIDE, SIDE, eta=eta), monkeypatch, eta=eta))


def test_guidance_is_told_where_it_was_distilled(lcm, xl, tmp_path, monkeypatch):
    """Once a step, and not the negative prompt; the strength changes the picture, as in diffusers."""
    g = Source(lcm).description.generate
    assert (g.steps, g.cfg_scale, g.sampler) == (4, 8.5, "lcm")
    images = {}
    for scale in (8.5, 2.0):
        images[scale], theirs = drawn(lcm, Request(g.steps, scale, g.sampler, g.spacing, SIDE, SIDE), monkeypatch)
        assert same(images[scale], theirs)
    assert (images[8.5] != images[2.0]).any()
    path = scheduled(xl["distilled"], SCHEDULES["lcm"][0], tmp_path / "model")
    assert same(*drawn(path, Request(STEPS, 4.0, "lcm", "leading", SIDE, SIDE), monkeypatch, "blurry"))


def test_a_folder_with_distilled_guidance_is_the_same_elsewhere(lcm, tmp_path):
    def command(*words: Any) -> None:
        cli.app([str(word) for word in words], standalone_mode=False)

    command("export", lcm, "-o", tmp_path / "copy", "--format", "folder")
    theirs = Source(tmp_path / "copy").configs["unet"]
    assert theirs["time_cond_proj_dim"] == 32 and Source(tmp_path / "copy").description.told_guidance


def test_a_level_is_found_by_its_time():
    levels = scaled_linear()
    for t in (0, 1, 499, 698):
        found = timed(levels, levels[t + 1 + t // 3], t)
        assert found == pytest.approx(levels[t], rel=1e-9)


def test_eta_is_of_samplers_that_have_one(xl, tmp_path):
    with pytest.raises(UsageError, match="--eta: euler has none; give --sampler ddim or tcd"):
        cli.app(
            ["generate", "a", "-m", str(xl["guided"]), "-o", str(tmp_path / "a.png"), "--eta", "0.5"],
            standalone_mode=False,
        )
