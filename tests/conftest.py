"""What several test files share: a tiny configuration, a tiny model with random weights, a tiny folder of images.

Fixtures are made, not stored. Nothing here imports torch before a test asks for a model.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only waits for the first
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tinydiff import config

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background inherits it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and so does what runs under nohup
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 210), "yellow": (230, 220, 40)}
SHAPES = ("square", "stripe", "corner")


def draw(shape: str, colour: tuple[int, int, int]) -> np.ndarray:
    """uint8 (20, 16, 3): one flat shape on white."""
    image = np.full((20, 16, 3), 255, np.uint8)
    rows, columns = {"square": ((5, 15), (3, 13)), "stripe": ((8, 12), (0, 16)), "corner": ((0, 9), (0, 8))}[shape]
    image[slice(*rows), slice(*columns)] = colour
    return image


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of 16 x 20 pixels, each with one or two captions in a .txt beside it."""
    folder = tmp_path_factory.mktemp("images")
    for name, colour in COLOURS.items():
        for shape in SHAPES:
            Image.fromarray(draw(shape, colour)).save(folder / f"{name}-{shape}.png")
            second = f"\n{name} picture" if shape == "square" else ""
            (folder / f"{name}-{shape}.txt").write_text(f"a {name} {shape}{second}\n")
    return folder


@pytest.fixture(scope="session")
def tiny_config(image_folder: Path) -> config.Config:
    """Two stages of twelve steps on sixteen-pixel images: about a second on one thread."""
    stage = {"steps": 12, "batch_size": 4, "warmup": 2, "lr": 1e-3, "save_every": 3, "sample_every": 6, "ema": 0.9}
    return config.Config(
        data=config.Data(path=str(image_folder), resolution=16),
        autoencoder=config.Autoencoder((8, 16), 1, 4, 4, False),
        text_encoder=config.TextEncoder(
            vocab_size=600,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        ),
        denoiser=config.Denoiser("unet", (16, 32), ("CrossAttnDownBlock2D",) * 2, 1, 1, 2, 8, True),
        diffusion=config.Diffusion(schedule="cosine", prediction="v", timestep_density="uniform"),
        train=config.Train(
            precision="fp32",
            device="cpu",
            threads=1,
            autoencoder=config.AutoencoderStage(**stage),
            denoiser=config.Stage(**stage),
        ),
        generate=config.Generate(steps=20, cfg_scale=3.0, sampler="dpmpp_2m", schedule="trailing"),
    )


@pytest.fixture(scope="session")
def run_config(tiny_config: config.Config) -> config.Config:
    """For runs: one level less, a save at every third step, and pictures only at the end."""
    denoiser = replace(tiny_config.denoiser, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",))
    stages = {name: replace(getattr(tiny_config.train, name), sample_every=100) for name in ("autoencoder", "denoiser")}
    return replace(tiny_config, denoiser=denoiser, train=replace(tiny_config.train, **stages))


@pytest.fixture(scope="session")
def config_path(run_config: config.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run_config` as a file."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(config.to_toml(run_config))
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Callable[..., Path]:
    """A function (config, seed=0) -> model folder, every parameter random: `build` alone leaves output layers zero."""
    import torch

    from tinydiff.checkpoints import folder
    from tinydiff.text.tokenizer import Tokenizer

    captions = [p.read_text() for p in sorted(image_folder.glob("*.txt"))]

    def make(cfg: config.Config, seed: int = 0) -> Path:
        text = cfg.text_encoder
        tokenizer = Tokenizer.train(captions, text.vocab_size, text.max_position_embeddings)
        model = replace(folder.build(cfg, tokenizer, seed), scaling_factor=0.8)
        for part in model.parts().values():
            randomise(part, seed)
        path = tmp_path_factory.mktemp("model") / "model"
        folder.save(path, model, cfg, torch.float32)
        return path

    return make


def randomise(module, seed: int = 0) -> None:
    """Random weights that keep the size of what goes through: nothing is zero, nothing explodes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / (p[0].numel() ** 0.5))
            else:
                p.copy_(noise * 0.1 + ("norm" in name and name.endswith("weight")))


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path], tiny_config: config.Config) -> Path:
    """A model folder of `tiny_config` with random weights; images are 16 x 16."""
    return make_model(tiny_config)
