"""Feature networks: EfficientNet-Lite0 against its own package, Inception and LPIPS against figures of pytorch-fid and lpips
(which need torchvision, so they are not run here), files that are recognised, files that are refused."""

from __future__ import annotations

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import feature_networks
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tinydiff.errors import ModelError, UserError
from tinydiff.measure.features import Features, open_features
from tinydiff.measure.networks import DEFAULT, FEATURES, packaged


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


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.save(feature_networks.inception(), path := tmp_path_factory.mktemp("inception") / "weights.pth")
    return str(path)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """VGG16's file, with some of its classifier, and that of LPIPS's weights."""
    folder = tmp_path_factory.mktemp("vgg")
    torch.save(feature_networks.vgg16() | {"classifier.6.bias": torch.zeros(1000)}, folder / "vgg.pth")
    torch.save(feature_networks.lpips_weights(), folder / "weights.pth")
    return str(folder / "vgg.pth"), str(folder / "weights.pth")


def test_names_of_tensors_are_those_of_the_published_files() -> None:
    """By a hash of names and shapes, taken of the networks of torch-fidelity and torchvision."""
    for make, expected in (
        (feature_networks.inception, "61093f3898ff55ee"),
        (feature_networks.vgg16, "9b2b6f069afa4d27"),
    ):
        shapes = sorted((name, tuple(t.shape)) for name, t in make().items())
        assert sha256(repr(shapes).encode()).hexdigest()[:16] == expected


def test_inception_equals_pytorch_fid(inception: str) -> None:
    """On seeded weights and pictures of 64 pixels; its figures are written down here."""
    network = open_features(inception)
    pooled, logits = network(pictures(4, 64)[:2])
    assert (
        network.name == "inception" and pooled.shape == (2, 2048) and logits is not None and logits.shape == (2, 1008)
    )
    theirs = [0, 0.02379, 0.34472, 0.4678, 0.01516, 0.18468, 0, 0.02913, 0.40644, 0.40699, 0.02526, 0.24119]
    assert pooled[:, ::400].flatten().tolist() == pytest.approx(theirs, abs=2e-5)
    theirs = [0.16065, 0.89243, -0.8258, -0.62217, 0.13616, 0.934, -0.85743, -0.66745]
    assert logits[:, ::300].flatten().tolist() == pytest.approx(theirs, abs=2e-5)
    with pytest.raises(UserError, match="inception compares no places"):
        network.distance(pictures(1), pictures(1))


def test_lpips_equals_its_package(vgg: tuple[str, str]) -> None:
    """On seeded weights and pictures of 64 pixels; its figures are written down here. Without its weights all are 1."""
    x = pictures(4, 64)
    network = open_features(",".join(vgg))
    assert network.name == "lpips-vgg16"
    assert network.distance(x[:2], x[2:]).tolist() == pytest.approx([0.93759, 1.05542], abs=2e-5)
    alone = open_features(vgg[0])
    assert alone.name == "vgg16" and alone.digest != network.digest
    pairs = zip(alone.maps(x[:2]), alone.maps(x[2:]), strict=True)
    expected = sum((F.normalize(p) - F.normalize(q)).square().sum(1).mean((1, 2)) for p, q in pairs)
    torch.testing.assert_close(alone.distance(x[:2], x[2:]), expected)
    assert alone(x)[0].shape == (4, 512) and alone(x)[1] is None
    with pytest.raises(UserError, match="16 pixels"):
        network.distance(x[:1, :, :12, :12], x[1:2, :, :12, :12])
    with pytest.raises(ModelError, match="not a feature network"):
        open_features(vgg[1])


def test_official_names_are_those_of_official_files(
    features: Features, inception: str, vgg: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert features.called("frechet") == "frechet_efficientnet-lite0"
    assert open_features(inception).called("frechet") == "frechet_inception"
    assert open_features(",".join(vgg)).called("perceptual") == "perceptual_lpips-vgg16"
    for name, paths in (("inception", [inception]), ("lpips-vgg16", vgg)):
        row = replace(FEATURES[name], digests=tuple(sha256(Path(path).read_bytes()).hexdigest()[:8] for path in paths))
        monkeypatch.setitem(FEATURES, name, row)
    assert [open_features(inception).called(m) for m in ("frechet", "kernel", "inception", "recall")] == [
        "FID",
        "KID",
        "IS",
        "recall_inception",
    ]
    assert open_features(",".join(vgg)).called("perceptual") == "LPIPS"
    assert open_features(vgg[0]).called("perceptual") == "perceptual_vgg16"


def test_half_precision_is_read_and_what_is_not_finite_is_refused(features: Features, tmp_path: Path) -> None:
    halves = {name: t.contiguous().half() for name, t in features.network.state_dict().items() if t.is_floating_point()}
    save_file(halves, tmp_path / "half.safetensors")
    half, image = open_features(str(tmp_path / "half.safetensors")), np.full((1, 32, 32, 3), 90, np.uint8)
    assert half.seen(image)[0] == pytest.approx(features.seen(image)[0], abs=0.2)
    halves["_bn0.weight"].fill_(torch.inf)
    torch.save(halves, tmp_path / "infinite.pth")
    with pytest.raises(ModelError, match="gives NaN or infinite values"):
        open_features(str(tmp_path / "infinite.pth")).seen(image)


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("what", ["missing", "empty", "text", "archive", "other", "partial", "pickle", "list"])
def test_refusals_are_one_line(what: str, features: Features, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    if what == "text":
        path.write_text("no tensors")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "archive":
        path.write_bytes(b"PK\x03\x04" + bytes(500))
    elif what == "other":
        torch.save({"weight": torch.zeros(3)}, path)
    elif what == "partial":
        torch.save({"_conv_head.weight": features.network._conv_head.weight}, path)
    elif what == "pickle":
        torch.save({"weight": Canary(tmp_path / "canary")}, path)
    elif what == "list":
        torch.save([1, 2], path)
    with pytest.raises(ModelError) as caught:
        open_features(str(path))
    assert not (tmp_path / "canary").exists()
    problem, _, fix = str(caught.value).rpartition("; ")
    assert "\n" not in problem and 20 < len(problem) < 400 and "net.pth" in problem
    assert any(word in fix for word in ("name another", "give a file", "copy or download it again"))


def test_a_missing_package_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinydiff.measure.networks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tinydiff\[features\]"):
        open_features(next(iter(FEATURES)))
