"""Every command of the README, run as it stands there; only training is shrunk to a few steps of a tiny model."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_xl
from interpreters import ENV, ROOT
from PIL import Image

from tinydiff.adapters import lora, words
from tinydiff.checkpoints.source import Source

README = (ROOT / "README.md").read_text()

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


CLDR = Path("/usr/share/unicode/cldr/common/annotations/en.xml")


TINY = {
    "autoencoder.block_out_channels": "[8,8,8,16]",
    "autoencoder.norm_num_groups": "4",
    "autoencoder.latent_channels": "4",
    "text_encoder.hidden_size": "16",
    "text_encoder.intermediate_size": "16",
    "text_encoder.num_hidden_layers": "1",
    "text_encoder.num_attention_heads": "2",
    "text_encoder.vocab_size": "600",
    "unet.block_out_channels": "[16,16]",
    "unet.down_block_types": '["CrossAttnDownBlock2D","CrossAttnDownBlock2D"]',
    "unet.norm_num_groups": "4",
    "unet.attention_head_dim": "2",
    "train.autoencoder.steps": "3",
    "train.autoencoder.batch_size": "2",
    "train.denoiser.steps": "3",
    "train.denoiser.batch_size": "2",
    "train.distill.steps": "0",
    **{f"train.{name}.steps": "2" for name in ("control", "lora", "word")},
    **{f"train.{name}.batch_size": "2" for name in ("control", "lora", "word")},
    "train.threads": "1",
}


def block(name: str) -> str:
    """The code block behind the comment `<!-- name -->`."""
    return re.search(rf"<!-- {name} -->\n```\w*\n(.*?)```", README, re.DOTALL)[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout-like folder with a few photos, and a `tinydiff` on the PATH that trains tiny models."""
    home = tmp_path_factory.mktemp("readme")
    for name in ("scripts", "weights", "tinydiff.toml"):
        (home / name).symlink_to(ROOT / name)
    (home / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(home / "photos" / f"{i}.png")
        (home / "photos" / f"{i}.txt").write_text(f"photo number {i}\n")
    shim = home / "bin" / "tinydiff"
    shim.parent.mkdir()
    tiny = " ".join(f"--set '{k}={v}'" for k, v in TINY.items())
    shim.write_text(
        f'#!/bin/bash\n[ "$1" = train ] && exec python -m tinydiff "${{@/30m/10s}}" {tiny}\nexec python -m tinydiff "$@"\n'
    )
    many = home / "bin" / "torchrun"
    many.write_text(
        f'#!/bin/bash\n[[ "$*" == *" train "* ]] && exec python -m torch.distributed.run --standalone "$@" {tiny}\n'
        'exec python -m torch.distributed.run --standalone "$@"\n'
    )
    for path in (shim, many):
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return home


def run(home: Path, script: str) -> str:
    path = f"{home / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=home,
        env=ENV | {"PATH": path, "XDG_CACHE_HOME": str(home / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def photos(home: Path) -> Path:
    """The run that 'Train your own' makes."""
    run(home, re.search(r"^tinydiff train .*photos.*$", README, re.MULTILINE)[0])
    return home / "runs" / "photos"


def test_train_your_own(photos: Path) -> None:
    assert (photos / "model" / "model_index.json").is_file()
    assert "<svg" in (photos / "report.html").read_text()


def test_judge(home: Path, photos: Path) -> None:
    said = run(home, re.search(r"^tinydiff evaluate .*$", README, re.MULTILINE)[0])
    assert "6 drawings: of 6 images" in said and "reconstruction_perceptual_efficientnet-lite0" in said


def test_begin_with_a_model(home: Path) -> None:
    run(home, block("begin"))
    assert (home / "runs" / "tuned" / "model" / "model_index.json").is_file()
    assert pixels(home / "styled.png").shape == pixels(home / "happy-mug.png").shape == (128, 128, 3)
    run(home, block("control"))
    assert (home / "runs" / "outlines" / "controlnet" / "config.json").is_file()
    assert pixels(home / "follows.png").shape == (128, 128, 3)


def test_many_processes(home: Path, photos: Path) -> None:
    run(home, block("torchrun"))
    assert (home / "runs" / "many" / "model" / "model_index.json").is_file()
    run(home, "printf 'red heart\\ngreen apple\\n' | tinydiff generate - -s 1 -o one/")
    for name in ("0000.png", "0001.png"):
        assert np.array_equal(pixels(home / "many" / name), pixels(home / "one" / name))


def test_export(home: Path, photos: Path) -> None:
    for command in re.findall(r"^tinydiff export runs/photos .*$", README, re.MULTILINE):
        assert "unet" in run(home, command)
    names = ("photos-onnx", "photos-half", "photos-int8")
    sizes = [sum(p.stat().st_size for p in (home / name / "unet").iterdir()) for name in names]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_use_your_stable_diffusion_weights(home: Path) -> None:
    """On a narrow Stable Diffusion 1 with random weights, which diffusers and transformers build."""
    from scripts.parity import build
    from tinydiff.checkpoints import convert

    narrow = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "attention_head_dim": 8}
    build("sd15", home / "sd15", narrow | {"cross_attention_dim": 32, "sample_size": 8})
    convert.to_single_file(Source(home / "sd15"), home / "sd15.safetensors")
    convert.to_single_file(Source(home / "sd15"), home / "vae.safetensors")
    *before, draw, _, _ = commands = block("stable-diffusion").strip().splitlines()
    assert len(commands) == 8
    said = run(home, "\n".join(before))
    assert "StableDiffusionPipeline" in said and "graph=image same=" in said
    without_torch(home, draw)
    run(home, "\n".join(commands[-2:]))
    folder, file, half = (pixels(home / f"{name}.png") for name in ("folder", "file", "bundle"))
    assert folder.std() > 10 and np.abs(folder - file).max() <= 3  # random networks amplify the last bit
    assert np.abs(folder - half).mean() < 3  # and the rounding of weights to half precision
    assert (home / "sd15-folder" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    adapters(home)


def adapters(home: Path) -> None:
    """The same model with a LoRA and a word of random numbers."""
    source, rng, layers = Source(home / "sd15"), np.random.default_rng(0), dict[str, lora.LowRank]()
    for layer, (out, *reads) in lora.layers_of({"unet": source.shapes("unet")}).items():
        if layer.endswith("to_q"):
            layers[layer] = lora.LowRank(rng.standard_normal((2, *reads)), 0.3 * rng.standard_normal((out, 2)), 2.0)
    lora.write(home / "style.safetensors", layers)
    words.write(
        home / "mug.safetensors",
        words.Word("<mug>", {"text_encoder": rng.standard_normal((2, source.configs["text_encoder"]["hidden_size"]))}),
    )
    one, two, *others = block("adapters").strip().splitlines()
    without_torch(home, two)
    run(home, "\n".join([one, *others]))
    plain, style, bundle = (pixels(home / f"{name}.png") for name in ("folder", "style", "style-bundle"))
    assert np.abs(style - plain).mean() > 1 and np.abs(style - bundle).mean() < 3
    assert Source(home / "sd15-mine").tokenizers["text_encoder"].runs


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_use_stable_diffusion_xl(home: Path) -> None:
    """On a narrow one with random weights."""
    from tinydiff.checkpoints import convert

    tiny_xl.written(tiny_xl.networks(), home / "xl").rename(home / "sdxl")
    convert.to_single_file(Source(home / "sdxl"), home / "sdxl.safetensors")
    *before, draw = block("sdxl").strip().splitlines()
    assert "graph=text_encoder_2 max" in run(home, "\n".join(before))
    without_torch(home, draw)
    xl, skip, few, half = (pixels(home / f"{name}.png") for name in ("xl", "skip", "few", "xl-bundle"))
    assert xl.std() > 10 and all((xl != other).any() for other in (skip, few))
    assert np.abs(xl - half).mean() < 3  # the rounding of weights to half precision


@pytest.mark.peers
def test_open_in_diffusers(home: Path, photos: Path) -> None:
    script = re.search(r"## Open in diffusers\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    run(home, f"python -W ignore - <<'END'\n{script}\nEND")
    assert pixels(home / "heart.png").shape == (64, 64, 3)


def test_from_python(home: Path) -> None:
    script = re.search(r"## From Python\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert "(2, 128, 128, 3) uint8" in run(home, f"python - <<'END'\n{script}\nprint(images.shape, images.dtype)\nEND")


def test_in_a_pipeline(home: Path) -> None:
    script = re.search(r"## In a pipeline\n.*?```bash\n(.*?)```", README, re.DOTALL)[1]
    said = run(home, script)
    assert "out/0000.png" in said and "out/0001.png" in said
    four = [pixels(home / "cats" / f"{i:02d}.png") for i in range(4)]
    assert np.abs(four[0] - pixels(home / "cat.png")).max() <= 1  # seed 7, alone and in a batch
    assert not np.array_equal(four[0], four[1])


def test_change_an_image(home: Path) -> None:
    run(home, block("edits"))
    red, half, wide, way = (pixels(home / f"{name}.png") for name in ("red", "half", "wide", "way"))
    assert (red[:, :64] == half[:, :64]).all() and (red[:, 64:] != half[:, 64:]).any()
    assert wide.shape == (128, 192, 3) and way.shape == (128, 6 * 128, 3)
    assert np.abs(way[:, :128] - red).max() <= 1 and way[:, -128:, 2].mean() > way[:, :128, 2].mean()


def agree(first: Path, second: Path) -> bool:
    """At most one grey level apart on at least 99.9 % of pixels."""
    return (np.abs(pixels(first) - pixels(second)).max(axis=-1) <= 1).mean() >= 0.999


def without_torch(home: Path, command: str) -> None:
    """Run a command where importing torch raises."""
    blocked = home / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "torch.py").write_text("raise ImportError('torch is not to be imported here')\n")
    run(home, f"export PYTHONPATH={blocked}:$PYTHONPATH\n! python -c 'import torch' 2>/dev/null\n{command}")


@pytest.mark.skipif(not (FONT.exists() and CLDR.exists()), reason="needs fonts-noto-color-emoji and unicode-cldr-core")
def test_emoji_to_bundle_and_back(home: Path) -> None:
    pytest.importorskip("fontTools")
    *before, last = block("emoji-pipeline").strip().splitlines()
    run(home, "\n".join(before))
    without_torch(home, last)
    assert agree(home / "torch.png", home / "onnx.png")


def test_the_same_on_handwritten_digits(home: Path) -> None:
    pytest.importorskip("sklearn")
    run(home, "python scripts/digits.py data/digits --size 16")
    run(home, "tinydiff train --set data.path=data/digits --set data.resolution=16 --run-dir runs/digits")
    draw = "tinydiff generate 'a handwritten digit seven' -s 1 -o"
    run(home, f"{draw} digit-torch.png -m runs/digits --backend torch && tinydiff export runs/digits -o digits")
    without_torch(home, f"{draw} digit-onnx.png -m digits")
    assert agree(home / "digit-torch.png", home / "digit-onnx.png")


def test_install_commands_are_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for name in ("install-and-run", "install-and-test"):
        assert name in ci and block(name).strip()


def test_file_map_names_every_module() -> None:
    table = README.split("## Where things are")[1]
    named = set(re.findall(r"`(?:tinydiff/)?([\w/]+\.py|\w[\w/]*/)`", table.replace("`tinydiff/", "`")))
    for path in (ROOT / "tinydiff").rglob("*.py"):
        name = path.relative_to(ROOT / "tinydiff").as_posix()
        assert path.name.startswith("__") or name in named or f"{name.split('/')[0]}/" in named, (
            f"{name} is not in the map"
        )
