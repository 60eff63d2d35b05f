"""The latent cache: right values, read back, and never one of something else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomise

from tinydiff import images
from tinydiff.config import Autoencoder as Config
from tinydiff.config import Data
from tinydiff.data.dataset import Images
from tinydiff.data.latents import cached, compute, digest
from tinydiff.models.autoencoder import Autoencoder, mean_and_std


class Source:
    """Seventy random images: more than a batch of the encoder."""

    skipped = ()

    def __init__(self, mark="a"):
        self.mark = mark

    def __len__(self):
        return 70

    def image(self, i):
        return np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)

    def fingerprint(self):
        return self.mark


@pytest.fixture
def vae():
    made = Autoencoder(Config((4, 8), norm_num_groups=2))
    randomise(made)
    return made.requires_grad_(False)


@pytest.fixture
def data():
    return Images(Source(), Data(path="somewhere", resolution=8))


def quiet(done, total):
    pass


def test_latents_are_those_of_each_image_alone(vae, data):
    mean, std = compute(data, vae, quiet)
    assert mean.shape == std.shape == (70, 4, 4, 4) and mean.dtype == std.dtype == torch.float32
    for i in (0, 63, 64, 69):
        alone = mean_and_std(vae.encode(torch.from_numpy(images.to_pixels(data[i])[None])))
        torch.testing.assert_close(mean[i], alone[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(std[i], alone[1][0], rtol=1e-5, atol=1e-6)


def test_progress_reaches_the_total(vae, data):
    seen = []
    compute(data, vae, lambda done, total: seen.append((done, total)))
    assert seen == [(64, 70), (70, 70)]


def test_the_second_time_is_read(vae, data, tmp_path, monkeypatch):
    first = cached(tmp_path / "latents", data, vae, quiet)
    monkeypatch.setattr("tinydiff.data.latents.compute", lambda *_: pytest.fail("computed again"))
    second = cached(tmp_path / "latents", data, vae, quiet)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_input_has_its_own_file(vae, data, tmp_path):
    def files(data, vae):
        cached(tmp_path, data, vae, quiet)
        return len(list(tmp_path.iterdir()))

    assert files(data, vae) == 1
    assert files(Images(Source("b"), data.data), vae) == 2
    for n, change in enumerate([{"resolution": 16}, {"flip": True}, {"background": "#000000"}]):
        assert files(Images(Source(), replace(data.data, **change)), vae) == 3 + n
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-6
    assert files(data, vae) == 6
    assert files(Images(Source(), replace(data.data, max_bad_fraction=0.5)), vae) == 6  # which changes no image


def test_digest_is_of_values_and_names(vae):
    before = digest(vae)
    assert before == digest(vae.to(memory_format=torch.channels_last)) and len(before) == 64
    renamed = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}), torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)})
    renamed[1]["b"].load_state_dict(renamed[0]["a"].state_dict())
    assert digest(renamed[0]) != digest(renamed[1])
