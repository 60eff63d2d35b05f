"""Our bundles in optimum and its bundles here: opened by its own pipeline in its own environment, drawing the same image."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tinydiff import pipeline
from tinydiff.backends import find_model
from tinydiff.diffusion import noise

PYTHON = os.environ.get("TINYDIFF_OPTIMUM_PYTHON", "")


SCRIPT = """
import sys
import numpy as np, torch
from diffusers import DDIMScheduler
from optimum.onnxruntime import ORTStableDiffusionPipeline
folder, latents, out, size = sys.argv[1:]
pipe = ORTStableDiffusionPipeline.from_pretrained(folder)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
x = torch.from_numpy(np.load(latents))
size = {"height": int(size), "width": int(size)}
image = pipe("red heart", num_inference_steps=8, guidance_scale=3.0, latents=x, output_type="np", **size)
np.save(out, image.images[0])
"""


EXPORT = """
import sys
import numpy as np, torch
from diffusers import DDIMScheduler
from optimum.onnxruntime import ORTStableDiffusionPipeline
folder, bundle, latents, out = sys.argv[1:]
pipe = ORTStableDiffusionPipeline.from_pretrained(folder, export=True)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.save_pretrained(bundle)
x = torch.from_numpy(np.load(latents))
image = pipe("red heart", num_inference_steps=8, guidance_scale=3.0, latents=x, output_type="np", height=64, width=64)
np.save(out, image.images[0])
"""


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not PYTHON, reason="TINYDIFF_OPTIMUM_PYTHON names no interpreter with tests/optimum.txt installed")
def test_what_optimum_exports_opens_here_and_draws_the_same_image(tmp_path: Path) -> None:
    """A narrow Stable Diffusion 1 with random weights, in a folder that tinydiff writes from its single file."""
    from scripts.parity import build
    from tinydiff.backends.onnx import OnnxBackend
    from tinydiff.checkpoints import convert
    from tinydiff.checkpoints.source import Source

    narrow = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "attention_head_dim": 8}
    build("sd15", tmp_path / "sd15", narrow | {"cross_attention_dim": 32, "sample_size": 8})
    convert.to_single_file(Source(tmp_path / "sd15"), tmp_path / "sd15.safetensors")
    convert.to_folder(Source(tmp_path / "sd15.safetensors"), tmp_path / "folder")
    start = Source(tmp_path / "folder").description.levels("ddim", 8, "leading")[0].sigma
    np.save(tmp_path / "x.npy", noise.normal([5], (4, 8, 8)) * np.float32(start))  # diffusers takes it as it comes
    paths = [str(tmp_path / name) for name in ("folder", "bundle", "x.npy", "y.npy")]
    done = subprocess.run([PYTHON, "-c", EXPORT, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = (np.load(tmp_path / "y.npy") * 255).round()
    backend = OnnxBackend(Source(tmp_path / "bundle"), "cpu")
    request = pipeline.Request(8, 3.0, "ddim", "leading", 64, 64)
    ours = pipeline.generate(backend, ["red heart"], [5], request)[0]
    assert ours.std() > 10
    assert (np.abs(theirs - ours.astype(float)).max(axis=-1) <= 1).mean() >= 0.999


@pytest.mark.peers
@pytest.mark.parametrize("precision", ["", "fp16"])
@pytest.mark.skipif(not PYTHON, reason="TINYDIFF_OPTIMUM_PYTHON names no interpreter with tests/optimum.txt installed")
def test_optimum_opens_the_shipped_bundle_and_draws_the_same_image(precision: str, tmp_path: Path) -> None:
    """By DDIM: the weights of diffusers' DEIS, the model's own solver, cancel in float32, which eight steps show. Another
    onnxruntime puts casts of half arithmetic elsewhere."""
    from tinydiff.backends.onnx import OnnxBackend
    from tinydiff.checkpoints.source import Source
    from tinydiff.export import export

    if precision:
        export(Source(find_model(None)), tmp_path / "half", precision)
    backend = OnnxBackend(Source(tmp_path / "half" if precision else find_model(None)), "cpu")
    d = backend.description
    side = d.size // d.factor
    np.save(tmp_path / "x.npy", noise.normal([5], (d.latent_channels, side, side)))
    command = [PYTHON, "-c", SCRIPT, str(d.path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy"), str(d.size)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = (np.load(tmp_path / "y.npy") * 255).round()
    request = pipeline.Request(8, 3.0, "ddim", "trailing", d.size, d.size)
    ours = pipeline.generate(backend, ["red heart"], [5], request)[0]
    assert (np.abs(theirs - ours.astype(float)).max(axis=-1) <= (2 if precision else 1)).mean() >= 0.999
