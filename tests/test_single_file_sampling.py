"""What a single file says of sampling: what the network predicts, the size of images, the noise levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_stable_diffusion import configs_of, refusal, sparse
from torch import Tensor

from tinydiff.checkpoints import scheduler
from tinydiff.checkpoints.header import header
from tinydiff.diffusion.schedules import scaled_linear, zero_terminal_snr

BIAS = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"


@pytest.mark.parametrize(
    ("kind", "said", "spread", "asked", "wanted"),
    [
        ("clip", {}, 1.0, None, "epsilon"),
        ("clip", {"prediction_type": "v"}, 0.0, None, "v_prediction"),
        ("clip", {"predict_key": "v"}, 0.0, None, "v_prediction"),
        ("clip", {"prediction_type": "v"}, 0.0, "epsilon", "epsilon"),
        ("clip", {"prediction_type": "unheard of"}, 0.0, None, "epsilon"),
        ("clip", "v_pred", 0.0, None, "v_prediction"),
        ("open_clip", {}, 0.05, None, "epsilon"),
        ("open_clip", {}, 0.2, None, "v_prediction"),
        ("open_clip", {"prediction_type": "epsilon"}, 0.2, None, "epsilon"),
        ("open_clip", {"architecture": "stable-diffusion-v2-512"}, 0.2, None, "epsilon"),
        ("open_clip", {"architecture": "stable-diffusion-v2-768-v"}, 0.0, None, "v_prediction"),
        ("open_clip", "v_pred", 0.0, None, "v_prediction"),
        ("open_clip", {}, 0.2, "epsilon", "epsilon"),
    ],
)
def test_what_the_network_predicts(kind, said, spread, asked, wanted, tiny_sd_files, tmp_path):
    table = {k: v.shape for k, v in header(tiny_sd_files[kind]).tensors.items()}
    table |= {"v_pred": (0,)} if said == "v_pred" else {}
    metadata = {f"modelspec.{k}": v for k, v in said.items()} if isinstance(said, dict) else {}
    path = sparse(tmp_path / "a.safetensors", table, metadata)
    if kind == "open_clip":
        with open(path, "r+b") as file:
            file.seek(header(path).tensors[BIAS].start)
            file.write((np.tile([-1.0, 1.0], 32) * spread).astype(np.float16).tobytes())
    found = configs_of(path, prediction=asked)
    assert found["scheduler"]["prediction_type"] == wanted
    assert found["scheduler"]["_class_name"] == ("DDIMScheduler" if wanted == "v_prediction" else "PNDMScheduler")
    assert found["unet"]["sample_size"] == (96 if (kind, wanted) == ("open_clip", "v_prediction") else 64)


@pytest.mark.parametrize(
    ("said", "wanted"), [("768x768", 384), ("512x768", 64), ("513x513", 64), ("0x0", 64), ("big", 64)]
)
def test_the_size_is_what_the_metadata_say(said, wanted, altered):
    path = altered("clip", lambda tensors: None, {"modelspec.resolution": said})
    assert configs_of(path)["unet"]["sample_size"] == wanted


def bars(levels) -> Tensor:
    return torch.tensor([level.alpha**2 for level in levels])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_usual_noise_levels_stay_unsaid(dtype, altered):
    path = altered(
        "clip",
        lambda t: (
            t | {"alphas_cumprod": bars(scaled_linear()).to(dtype), "scale_factor": torch.tensor(0.18215).to(dtype)}
        ),
    )
    found = configs_of(path)
    assert found["scheduler"]["trained_betas"] is None and found["vae"]["scaling_factor"] == 0.18215
    schedule = scheduler.read(found["scheduler"]).schedule
    assert [schedule[i].alpha ** 2 for i in (0, 500, 999)] == pytest.approx([0.99915, 0.27633268, 0.00466010], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_levels_of_its_own_are_followed(dtype, altered):
    stored = bars(zero_terminal_snr(scaled_linear())).to(dtype)
    found = configs_of(altered("clip", lambda t: t | {"alphas_cumprod": stored}))["scheduler"]
    assert torch.allclose(bars(scheduler.read(found).schedule).double(), stored.double(), rtol=1e-6, atol=0)
    assert found["num_train_timesteps"] == 1000 and found["trained_betas"][-1] == 1


@pytest.mark.parametrize("levels", [[0.5, 0.6], [1.5], [-0.1], [], [0.5, 0.0, 0.0], [float("nan")]])
def test_noise_levels_that_are_none(levels, altered):
    path = altered("clip", lambda tensors: tensors | {"alphas_cumprod": torch.tensor(levels)})
    assert "alphas_cumprod does not fall" in refusal(lambda: configs_of(path))
