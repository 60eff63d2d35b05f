"""Feature networks: EfficientNet-Lite0 against its own package, files that are recognised, files that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tinydiff.errors import ModelError, UserError
from tinydiff.measure.features import DEFAULT, FEATURES, Features, open_features, packaged


@pytest.fixture(scope="module")
def features() -> Features:
    return open_features()


def pictures(count: int = 3, side: int = 224) -> torch.Tensor:
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(-1, 1, (count, 3, 7, 7)).astype(np.float32))
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)


@pytest.mark.peers
def test_equals_the_package_of_its_makers(features: Features) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(packaged(DEFAULT), weights_only=True))
    x = pictures()
    with torch.no_grad():
        pooled, logits = features(x)
        torch.testing.assert_close(logits, theirs(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(pooled, theirs.extract_features(x).mean((2, 3)), rtol=0, atol=1e-5)


def test_maps_are_the_activations_before_each_halving(features: Features) -> None:
    shapes = [tuple(m.shape[1:]) for m in features.maps(pictures(1, 64))]
    assert shapes == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    assert [m.shape[2:] for m in features.maps(pictures(1)[..., :45, :61])][-1] == (2, 2)  # odd sizes, rounded up


def test_distance_is_zero_of_equals_symmetric_and_grows_with_blur(features: Features) -> None:
    x = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32))
    blurred = [F.avg_pool2d(x, k, 1, k // 2, count_include_pad=False) for k in (1, 3, 7)]
    distances = [features.distance(x, y) for y in blurred]
    assert distances[0].tolist() == [0, 0]
    assert bool((distances[1] < distances[2]).all())
    torch.testing.assert_close(features.distance(blurred[2], x), distances[2])


def test_distance_by_brute_force(features: Features) -> None:
    x, y = pictures(1, 32), pictures(2, 32)[1:]
    total = 0.0
    for a, b in zip(features.maps(x), features.maps(y), strict=True):
        a, b = a[0].double(), b[0].double()
        for i in range(a.shape[1]):
            for j in range(a.shape[2]):
                total += (
                    float((a[:, i, j] / a[:, i, j].norm() - b[:, i, j] / b[:, i, j].norm()).square().sum())
                    / a[0].numel()
                )
    assert features.distance(x, y).item() == pytest.approx(total, rel=1e-4)


def test_distance_has_a_gradient_and_the_network_none(features: Features) -> None:
    x = pictures(1, 32).requires_grad_()
    features.distance(x, pictures(2, 32)[1:]).sum().backward()
    assert x.grad is not None
    assert 0 < x.grad.abs().max() < 1e3
    assert not any(p.requires_grad for p in features.parameters())
    assert not any(m.training for m in features.train().network.modules())


def test_features_are_of_float32_under_autocast(features: Features) -> None:
    x = pictures(1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = features(x)[0]
    torch.testing.assert_close(inside, features(x)[0], rtol=0, atol=0)


def test_a_file_is_recognised_by_its_tensors(features: Features, tmp_path: Path) -> None:
    tensors = {name: t.contiguous() for name, t in features.network.state_dict().items()}
    save_file(tensors, path := tmp_path / "anything.safetensors")
    again = open_features(str(path))
    assert again.name == DEFAULT
    torch.testing.assert_close(again(pictures(1))[0], features(pictures(1))[0], rtol=0, atol=0)
    assert again.digest != features.digest  # of the file


@pytest.mark.parametrize("what", ["missing", "text", "other", "partial", "pickle", "list"])
def test_refusals_are_one_line(what: str, features: Features, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    if what == "text":
        path.write_text("no tensors")
    elif what == "other":
        torch.save({"weight": torch.zeros(3)}, path)
    elif what == "partial":
        torch.save({"_conv_head.weight": features.network._conv_head.weight}, path)
    elif what == "pickle":
        torch.save({"weight": Path("x")}, path)
    elif what == "list":
        torch.save([1, 2], path)
    with pytest.raises(ModelError) as caught:
        open_features(str(path))
    assert "\n" not in str(caught.value)
    assert "net.pth" in str(caught.value)


def test_a_missing_package_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinydiff.measure.features.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tinydiff\[features\]"):
        open_features(next(iter(FEATURES)))
