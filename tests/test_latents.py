"""The latent cache: right values, read back, and never those of something else."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tensors import randomise

from tinydiff.config import Autoencoder as Config
from tinydiff.config import Data
from tinydiff.data import cache, latents
from tinydiff.data.dataset import Images
from tinydiff.errors import DataError
from tinydiff.images import to_pixels
from tinydiff.models.autoencoder import Autoencoder, mean_and_std

SHAPES = ((8, 8), (8, 8), (16, 8))


class Source:
    """Random images, two squares to a wide one; `edited` are others than they were, `unreadable` are gone."""

    skipped = ()

    def __init__(self, count=70, edited=()):
        self.count, self.edited, self.unreadable = count, edited, set()

    def __len__(self):
        return self.count

    def size(self, i):
        return SHAPES[i % 3]

    def image(self, i):
        if i in self.unreadable:
            raise DataError(f"{i}.png: truncated; remove it")
        width, height = self.size(i)
        return np.random.default_rng([i, i in self.edited]).integers(0, 256, (height, width, 3), np.uint8)

    def digest(self, i):
        return hashlib.sha256(repr((i, i in self.edited)).encode()).hexdigest()

    def identity(self, i):
        return f"{i}.png"


def made(source=None, **changes):
    settings = {"resolution": 8, "max_aspect_ratio": 4.0, "bucket_step": 4, "max_bad_fraction": 0.5}
    return Images(source or Source(), Data(path="somewhere", **(settings | changes)))


@pytest.fixture
def vae():
    made = Autoencoder(Config((4, 8), norm_num_groups=2))
    randomise(made)
    return made.requires_grad_(False)


@pytest.fixture
def small(monkeypatch):
    """Chunks of sixteen images, so that there are several."""
    monkeypatch.setattr(cache, "ROWS", 16)
    monkeypatch.setattr(cache, "BATCH", 8)


def quiet(done, total):
    pass


def filled(folder, images, vae):
    """The cache, and how many images were encoded for it."""
    encoded = []
    latents.fill(folder, images, vae, lambda done, total: encoded.append(done))
    return latents.open_cache(folder, images, vae), encoded[-1] if encoded else 0


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_the_autoencoder_s_own(vae, tmp_path):
    """Bit for bit those of the same batches without a cache."""
    images = made(flip=True)
    found, count = filled(tmp_path, images, vae)
    assert count == len(images) == 140 and images.sizes == [(8, 8), (12, 4)]
    for bucket, mirrored in ((b, m) for b in (0, 1) for m in (0, 1)):
        members = np.flatnonzero(images.bucket[:70] == bucket) + 70 * mirrored
        x = torch.from_numpy(to_pixels(np.stack([images[i] for i in members])))
        expected = mean_and_std(vae.encode(x.to(memory_format=torch.channels_last)))
        order = np.random.default_rng(0).permutation(len(members))
        for have, want in zip(found.rows(members[order]), expected, strict=True):
            assert torch.equal(have, want[torch.from_numpy(order)]) and have.dtype == torch.float32
        assert found.shape(bucket) == expected[0].shape[1:]
    assert found.valid.all() and found.valid.shape == (140,)


def test_scale_is_that_of_all_latents(vae, tmp_path, small):
    images = made(flip=True)
    found, _ = filled(tmp_path, images, vae)
    pairs = [found.rows(np.array([i])) for i in range(140)]
    mean, std = (np.concatenate([pair[k].numpy().ravel() for pair in pairs]).astype(np.float64) for k in (0, 1))
    expected = 1 / np.sqrt((mean**2).mean() + (std**2).mean() - mean.mean() ** 2)
    assert found.scaling_factor == pytest.approx(expected, rel=1e-12)
    draws = mean + std * np.random.default_rng(0).standard_normal((200, len(mean)))
    assert found.scaling_factor == pytest.approx(1 / draws.std(), rel=0.01)


def test_scale_does_not_depend_on_the_order_of_files():
    sums = np.random.default_rng(0).standard_normal((50, 4)) ** 2 + [1000, 0, 1000, 0]
    assert len({latents._scaling_factor(np.roll(sums, i, 0).tolist()) for i in range(50)}) == 1


def test_any_number_of_processes_writes_the_same_files(vae, tmp_path, small):
    latents.fill(tmp_path / "one", made(), vae, quiet)
    for rank in (2, 0, 1):
        latents.fill(tmp_path / "three", made(), vae, quiet, rank, 3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len(contents(tmp_path / "one")) == 3 + 2
    scales = {latents.open_cache(tmp_path / name, made(), vae).scaling_factor for name in ("one", "three")}
    assert len(scales) == 1


def test_progress_counts_what_is_missing(vae, tmp_path, small):
    seen = []
    latents.fill(tmp_path, made(), vae, lambda *both: seen.append(both), 1, 5)
    assert seen == [(8, 16), (16, 16)]
    seen.clear()
    latents.fill(tmp_path, made(), vae, lambda *both: seen.append(both))
    assert seen[-1] == (54, 54) and [done for done, _ in seen] == [8, 16, 24, 31, 39, 47, 54]


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_what_is_stopped_goes_on(vae, tmp_path, small, after):
    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents.fill(tmp_path, made(), vae, stop)
    kept = contents(tmp_path) if tmp_path.exists() else {}
    assert len(kept) == after // 2 and all(name.startswith("latents-") for name in kept)
    _, encoded = filled(tmp_path, made(), vae)
    assert encoded == 70 - 16 * (after // 2) and kept.items() <= contents(tmp_path).items()
    latents.fill(tmp_path / "again", made(), vae, quiet)
    again = contents(tmp_path / "again")
    shutil.rmtree(tmp_path / "again")
    assert again == contents(tmp_path)


def test_every_input_has_its_own_files(vae, tmp_path, small):
    def encoded(images):
        return filled(tmp_path, images, vae)[1]

    assert (encoded(made()), encoded(made())) == (70, 0)
    assert encoded(made(Source(edited=(40,)))) == 16  # its chunk
    assert encoded(made(max_bad_fraction=0.9)) == 0  # which changes no image
    assert encoded(made(flip=True)) == 70  # the mirror images
    assert encoded(made(resolution=16)) == 70
    assert encoded(made(background="#000000")) == 70
    assert encoded(made(max_aspect_ratio=1.0)) == 70  # other chunks
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-6
    assert encoded(made()) == 70


def test_damaged_files_are_computed_again(vae, tmp_path, small):
    filled(tmp_path, made(), vae)
    before = contents(tmp_path)
    for name, length in zip(sorted(before), (-1, 30, 0), strict=False):
        (tmp_path / name).write_bytes(before[name][:length])
        with pytest.raises(DataError, match=r"latents-\w+\.safetensors: missing or damaged; run the same command"):
            latents.open_cache(tmp_path, made(), vae)
        assert filled(tmp_path, made(), vae)[1] in (15, 16, 8, 7) and contents(tmp_path) == before


def test_no_flipped_bit_of_a_header_is_believed(tmp_path):
    chunk = cache.chunk(tmp_path, "latents", [1, 2], "a")
    cache.fill([chunk], lambda items: {"mean": np.float32(items)}, quiet, lambda rows: {"sums": [0.5]})
    good = chunk.path.read_bytes()
    for bit in range(8 * (8 + int.from_bytes(good[:8], "little"))):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        chunk.path.write_bytes(bad)
        if cache.whole(chunk):  # what says the same in other letters
            found = cache.Rows([chunk])
            assert found.notes == [{"sums": [0.5]}] and list(found.files[0]["mean"]) == [1, 2]


def test_no_flipped_bit_of_a_row_is_believed(tmp_path):
    """It is found when the first of the file's rows is read, and the next start computes the file anew."""
    chunk = cache.chunk(tmp_path, "latents", [1, 2, 3], "a")

    def written() -> bytes:
        cache.fill([chunk], lambda items: {"mean": np.float32(items), "std": np.float32(items)}, quiet)
        return chunk.path.read_bytes()

    good = written()
    for bit in range(8 * (8 + int.from_bytes(good[:8], "little")), 8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        chunk.path.write_bytes(bad)
        with pytest.raises(DataError, match="damaged, and removed; run the same command again"):
            cache.Rows([chunk]).gather("mean", np.array([0]), np.array([2]))
        assert not cache.whole(chunk) and (bit % 8 or written() == good)
    written()
    found = cache.Rows([chunk])
    assert found.gather("std", np.array([0, 0]), np.array([2, 0])).tolist() == [3, 1] and not found.unread


def test_files_of_older_versions_are_read(tmp_path):
    chunk = cache.chunk(tmp_path, "latents", [1, 2], "a")
    entry = {"notes": None, "check": cache._check({"notes": None}, {"mean": (2,)})}
    save_file({"mean": np.float32([1, 2])}, chunk.path, {cache.LABEL: json.dumps(entry)})
    assert cache.Rows([chunk]).gather("mean", np.array([0]), np.array([1])).tolist() == [2]


def test_a_file_of_something_else_is_not_read(tmp_path):
    chunk, other = (cache.chunk(tmp_path, "latents", list(range(n)), n) for n in (3, 4))
    cache.fill([other], lambda items: {"mean": np.float32(items)}, quiet)
    chunk.path.write_bytes(other.path.read_bytes())
    assert cache.whole(other) and not cache.whole(chunk)


def test_what_cannot_be_read_has_no_part(vae, tmp_path, small):
    source = Source()
    source.unreadable = {0, 2, 40}
    images = made(source, flip=True)
    found, _ = filled(tmp_path, images, vae)
    assert np.flatnonzero(~found.valid).tolist() == [0, 2, 40, 70, 72, 110]
    assert not any(t.any() for t in found.rows(np.array([0, 40])))
    pairs = [found.rows(np.array([i])) for i in np.flatnonzero(found.valid)]
    mean, std = (np.concatenate([pair[k].numpy().ravel() for pair in pairs]).astype(np.float64) for k in (0, 1))
    expected = 1 / np.sqrt((mean**2).mean() + (std**2).mean() - mean.mean() ** 2)
    assert found.scaling_factor == pytest.approx(expected, rel=1e-12)


def test_what_cannot_be_read_is_tried_again(vae, tmp_path, small):
    source = Source()
    source.unreadable = {0}
    assert filled(tmp_path, made(source), vae)[1] == 70
    assert filled(tmp_path, made(source), vae)[1] == 0
    found, encoded = filled(tmp_path, made(), vae)
    assert encoded == 16 and found.valid.all()


def test_too_many_that_cannot_be_read_are_an_error(vae, tmp_path, small):
    """Also where each process saw few of them."""
    source = Source()
    source.unreadable = {0, 20, 60}
    with pytest.raises(DataError, match=r"cannot read 3 of 70 images, over the allowed 0\.04: 0\.png: truncated"):
        latents.fill(tmp_path, made(source, max_bad_fraction=0.04), vae, quiet)
    for rank in range(5):
        latents.fill(tmp_path, made(source, max_bad_fraction=0.04), vae, quiet, rank, 5)
    with pytest.raises(DataError, match=r"cannot read 3 of 70 images"):
        latents.open_cache(tmp_path, made(source, max_bad_fraction=0.04), vae)
    source.unreadable = set(range(70))
    latents.fill(tmp_path / "none", made(source, max_bad_fraction=1.0), vae, quiet)
    with pytest.raises(DataError, match="none of the images"):
        latents.open_cache(tmp_path / "none", made(source, max_bad_fraction=1.0), vae)


def test_sweep_removes_what_nobody_needs(vae, tmp_path, small):
    filled(tmp_path, made(Source(edited=(40,))), vae)
    found, _ = filled(tmp_path, made(), vae)
    half = f".tmp-{found.paths[0].name[:50]}-0123"
    for name in ("latents-0123456789abcdef.safetensors", half, "notes.txt", "latents-x"):
        (tmp_path / name).touch()
    cache.sweep(tmp_path, found.paths)
    assert set(contents(tmp_path)) == {path.name for path in found.paths} | {"notes.txt", "latents-x"}
    assert filled(tmp_path, made(), vae)[1] == 0
    cache.sweep(tmp_path / "missing", [])


LARGE = """
import os, resource, sys
from pathlib import Path
import numpy as np
from tinydiff.data import cache

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

chunks = [cache.chunk(Path(sys.argv[1]), "latents", list(range(64)), i) for i in range(300)]
cache.fill(chunks, lambda items: {"mean": np.repeat(np.float32(items), 2048).reshape(-1, 4, 16, 32)}, lambda *_: None)
files = len(os.listdir("/proc/self/fd"))
rows = cache.Rows(chunks)
rng, before = np.random.default_rng(0), status("RssAnon")
for _ in range(200_000 // 64):
    index = rng.integers(0, 64, 64)
    found = rows.gather("mean", rng.integers(0, 300, 64), index)
    assert (found[:, 3, 15, 31] == index).all()
print(status("RssAnon") - before, len(os.listdir("/proc/self/fd")) - files)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_stay_on_the_disk(tmp_path):
    """200,000 rows out of 150 MB in 300 files: no memory of our own, no open files."""
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    memory, descriptors = map(int, done.stdout.split())
    assert memory < 20_000 and descriptors == 0


def test_digest_is_of_values_and_names(vae):
    before = latents.digest(vae)
    assert before == latents.digest(vae.to(memory_format=torch.channels_last)) and len(before) == 64
    renamed = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}), torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)})
    renamed[1]["b"].load_state_dict(renamed[0]["a"].state_dict())
    assert latents.digest(renamed[0]) != latents.digest(renamed[1])
