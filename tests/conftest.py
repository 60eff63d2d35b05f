"""What several test files share: a tiny configuration, a tiny model with random weights, a tiny folder of images.

Fixtures are made, not stored. Nothing here imports torch before a test asks for a model.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from drawings import COLOURS, SHAPES, draw
from forker import Forker
from PIL import Image

from tinydiff import config
from tinydiff.schema import to_toml

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only waits for the first


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests load it before tinydiff does


CACHE = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tinydiff-tests-")  # the user's own is left alone


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


if TYPE_CHECKING:
    import onnx
    from tiny_stable_diffusion import Model
    from torch import Tensor


pytest.register_assert_rewrite("fake_backend", "faults", "published_dit", "runs", "tensors", "tiny_stable_diffusion")


signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background inherits it ignored


signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and so does what runs under nohup


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
def other_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images under captions of those of `image_folder`, in darker colours."""
    folder = tmp_path_factory.mktemp("others")
    for name in list(COLOURS)[:4]:
        for shape in SHAPES[:2]:
            Image.fromarray(draw(shape, COLOURS[name]) // 2 + 40).save(folder / f"{name}-{shape}.png")
            (folder / f"{name}-{shape}.txt").write_text(f"a {name} {shape}")
    return folder


@pytest.fixture(scope="session")
def tiny_config(image_folder: Path) -> config.Config:
    """Two stages of twelve steps on sixteen-pixel images: about a second on one thread."""
    stage: dict[str, Any] = {"steps": 12, "batch_size": 4, "warmup": 2, "lr": 1e-3, "ema": 0.9}
    stage |= {"save_every": 3, "sample_every": 6, "optimizer": "adamw"}  # Muon enlarges how two processes round apart
    return config.make(
        data={"path": str(image_folder), "resolution": 16},
        autoencoder=config.Autoencoder((8, 16), 1, 4, 4, False),
        text_encoder={
            "vocab_size": 600,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
        },
        unet=config.UNet((16, 32), ("CrossAttnDownBlock2D",) * 2, 1, 1, 2, 8, True),
        diffusion={"schedule": "cosine", "prediction": "v", "timestep_density": "uniform"},
        train={"precision": "fp32", "device": "cpu", "threads": 1, "autoencoder": stage, "denoiser": stage},
        generate={"steps": 20, "cfg_scale": 3.0, "sampler": "dpmpp_2m", "spacing": "trailing"},
    )


@pytest.fixture(scope="session")
def run_config(tiny_config: config.Config) -> config.Config:
    """For runs: one level less, a save at every third step, and pictures only at the end."""
    unet = replace(tiny_config.unet, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",))
    stages = {name: replace(tiny_config.train.stage(name), sample_every=100) for name in ("autoencoder", "denoiser")}
    return replace(tiny_config, unet=unet, train=replace(tiny_config.train, **stages))


@pytest.fixture(scope="session")
def config_path(run_config: config.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run_config` as a file."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(to_toml(run_config))
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Callable[..., Path]:
    """A function (config, seed=0) -> model folder, every parameter random: `build` alone leaves output layers zero."""
    import torch
    from tensors import randomise

    from tinydiff.checkpoints import folder
    from tinydiff.text.tokenizer import Tokenizer

    captions = [p.read_text() for p in sorted(image_folder.glob("*.txt"))]

    def make(cfg: config.Config, seed: int = 0) -> Path:
        text = cfg.text_encoder
        tokenizer = Tokenizer.train(captions, text.vocab_size, text.max_position_embeddings)
        model = folder.build(cfg, tokenizer, seed).scaled(0.8)
        for part in model.networks.values():
            randomise(part, seed)
        path = tmp_path_factory.mktemp("model") / "model"
        folder.save(path, model, cfg, torch.float32)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path], tiny_config: config.Config) -> Path:
    """A model folder of `tiny_config` with random weights; images are 16 x 16."""
    return make_model(tiny_config)


@pytest.fixture(scope="session")
def backend(tiny_model: Path):
    """`tiny_model` opened with torch."""
    from tinydiff.backends import open_backend
    from tinydiff.checkpoints.source import Source

    return open_backend(Source(tiny_model), "torch", "cpu")


@pytest.fixture(scope="session")
def gpu() -> str:
    """The device of tests marked `gpu`, which are skipped where there is none; TINYDIFF_GPU=cpu tries them on the CPU."""
    import torch

    device = os.environ.get("TINYDIFF_GPU", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return device


@pytest.fixture(scope="session")
def on_card(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, bool], onnx.ModelProto]:
    """What onnxruntime makes of a graph for CUDA, as calls that can be recorded or not: on libraries that stand in for a card."""
    import cuda_stand_in
    import onnx

    provider, libraries = cuda_stand_in.provider(), tmp_path_factory.mktemp("cuda")
    if provider is None:
        pytest.skip("there is no onnxruntime with CUDA, or no C compiler")
    cuda_stand_in.build(provider, libraries)

    def made(graph: Path, recorded: bool = False) -> onnx.ModelProto:
        out = tmp_path_factory.mktemp("made") / "graph"
        done = cuda_stand_in.opened(graph, recorded, libraries, out)
        assert done.returncode == 0, done.stderr
        return onnx.load(out / "model.onnx", load_external_data=False)

    return made


@pytest.fixture(scope="session")
def forker(config_path: Path) -> Iterator[Forker]:
    """Runs of `config_path`, and any function of a module, in processes of their own."""
    own = ["tinydiff.cli", "tinydiff.training.loop", "tinydiff.training.contrastive", "tinydiff.training.distill"]
    forker = Forker(config_path, [*own, "torch.distributed.fsdp", "faults", "pytest"])
    yield forker
    forker.close()


@pytest.fixture(scope="session")
def undisturbed(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert forker.run(run_dir) == 0
    return run_dir


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What syncing is good for no test can see but that of the power; here it takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def tiny_sd() -> dict[str, Model]:
    """Networks of Stable Diffusion 1 ("clip") and 2 ("open_clip")."""
    from tiny_stable_diffusion import tiny

    return {"clip": tiny("clip"), "open_clip": tiny("open_clip")}


@pytest.fixture(scope="session")
def tiny_sd_files(tiny_sd: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A single file of each kind."""
    from tinydiff.checkpoints import single_file

    folder = tmp_path_factory.mktemp("single")
    for kind, model in tiny_sd.items():
        single_file.write(folder / f"{kind}.safetensors", model.parts, model.configs)
    return {kind: folder / f"{kind}.safetensors" for kind in tiny_sd}


@pytest.fixture
def altered(tiny_sd_files: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A function (kind, change of the tensors, metadata) -> a copy of the file with them changed."""
    from safetensors.torch import load_file, save_file

    def alter(kind: str, change: Callable[[dict[str, Tensor]], Any], metadata: dict[str, str] | None = None) -> Path:
        tensors = load_file(tiny_sd_files[kind])
        changed = change(tensors)
        save_file(tensors if changed is None else changed, tmp_path / "altered.safetensors", metadata)
        return tmp_path / "altered.safetensors"

    return alter
