"""Optimised graphs in the cache folder: they compute the same, come from nowhere else, and never get in the way."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from interpreters import ROOT

from tinydiff import user_cache
from tinydiff.backends import optimised, sessions
from tinydiff.backends.onnx import OnnxBackend
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError
from tinydiff.files import committed

SHIPPED = ROOT / "weights" / "emoji"
Z = np.random.default_rng(0).standard_normal((2, 16, 2, 2), np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, where it can be damaged."""
    path = tmp_path_factory.mktemp("bundle") / "model"
    with committed(path) as folder:
        shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
    return path


@pytest.fixture(scope="module")
def made(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the optimised graphs of the bundle."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path))
        opened(bundle)
    return path


@pytest.fixture
def cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the user's."""
    shutil.copytree(made, tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where the graphs come from that onnxruntime opens."""
    paths, real = list[Path](), ort.InferenceSession

    def opened(path: Path, *rest: object, **more: object) -> ort.InferenceSession:
        paths.append(path)
        return real(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ort, "InferenceSession", opened)
    return paths


def opened(bundle: Path) -> OnnxBackend:
    backend = OnnxBackend(Source(bundle), "cpu")
    backend.pool.shutdown()  # when what is left to do is done
    return backend


def places(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "tinydiff/graphs").iterdir() if not path.name.startswith("."))


def from_cache(sources: list[Path], cache: Path) -> int:
    """How many of the graphs opened were kept ones; forgets them."""
    count = sum(cache in path.parents for path in sources)
    sources.clear()
    return count


def test_a_kept_graph_computes_what_it_computed_the_first_time(bundle, tmp_path, monkeypatch, sources):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    told = {"encoder_hidden_states": np.ones((2, 32, 256), np.float32)}
    results = []
    for kept in (0, 2):
        backend = opened(bundle)
        results.append([backend.denoise(np.tile(Z, (1, 1, 4, 4)), 500.0, told), backend.decode(Z)])
        assert from_cache(sources, tmp_path) == kept and len(places(tmp_path)) == 2
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)
    assert before == {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}


def test_what_is_rewritten_agrees_with_the_graph_as_it_stands(bundle):
    """onnxruntime without any optimisation is the independent truth."""
    graph = OnnxBackend(Source(bundle), "cpu")
    plain = sessions.created(bundle / "vae_decoder" / "model.onnx", sessions.Level.ORT_DISABLE_ALL)
    np.testing.assert_allclose(graph.decode(Z), plain.run(None, {"latent_sample": Z})[0], atol=2e-5)


def cut(place: Path) -> None:
    os.truncate(place / "weights.bin", 100)


def flipped(place: Path) -> None:
    with open(place / "weights.bin", "r+b") as file:
        file.write(b"\xff")


def another(place: Path) -> None:
    """A graph of somebody else's under the right name."""
    shutil.copy(SHIPPED / "vae_encoder" / "model.onnx", place / "model.onnx")


def added(place: Path) -> None:
    (place / "more").write_bytes(b"x")


def no_manifest(place: Path) -> None:
    (place / "manifest.json").unlink()


def linked(place: Path) -> None:
    (place / "weights.bin").rename(place.parent / ".weights")
    (place / "weights.bin").symlink_to(place.parent / ".weights")


def a_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_bytes(b"x")


def sealed_nonsense(place: Path) -> None:
    """Hashes are right, and it is no graph."""
    shutil.rmtree(place)
    with committed(place) as folder:
        (folder / "model.onnx").write_bytes(b"nonsense")


@pytest.mark.parametrize("tamper", [cut, flipped, another, added, no_manifest, linked, a_file, sealed_nonsense])
def test_what_is_not_what_was_written_is_made_again(bundle, cache, sources, tamper, capfd):
    kept = places(cache)
    for place in kept:
        tamper(place)
    result = opened(bundle).decode(Z)
    assert capfd.readouterr() == ("", "") and places(cache) == kept
    sources.clear()
    np.testing.assert_array_equal(opened(bundle).decode(Z), result)
    assert from_cache(sources, cache) == 2


def test_another_bundles_graph_renamed_into_place_is_made_again(bundle, cache, sources):
    place = next(path for path in places(cache) if path.name == optimised.place(bundle, "vae_decoder").name)  # type: ignore[union-attr]
    result, other = opened(bundle).decode(Z), place.with_name("f" * 32)
    with committed(other) as folder:  # sealed as its own was: whole, and under its own name
        shutil.copytree(place, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        weights = np.fromfile(folder / "weights.bin", np.float32)
        (-weights).tofile(folder / "weights.bin")
        (folder / optimised.NAME).write_text(other.name)
    shutil.rmtree(place)
    other.rename(place)
    sources.clear()
    np.testing.assert_array_equal(opened(bundle).decode(Z), result)
    assert from_cache(sources, cache) == 1


def test_a_damaged_bundle_is_refused_whatever_is_kept_of_it(bundle, cache, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    flipped_byte = copy / "unet" / "diffusion_pytorch_model.safetensors"
    with open(flipped_byte, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(ModelError, match="SHA-256"):
        opened(copy)


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow over 100 kB, as on a disk that is full."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_meanwhile_costs_nothing(bundle, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with small_files():
        assert opened(bundle).decode(Z).shape == (2, 3, 32, 32)
    assert capfd.readouterr() == ("", "") and places(tmp_path / "cache") == []


UNUSABLE: dict[str, Callable[[pytest.MonkeyPatch, Path], object]] = {
    "a file in the way": lambda patch, cache: cache.write_bytes(b""),
    "no right to write": lambda patch, cache: patch.setattr(os, "access", lambda *_, **__: False),
    "little space": lambda patch, cache: patch.setattr(optimised, "MOST", 2**62),
    "a large graph": lambda patch, cache: patch.setattr(optimised, "LARGEST", 1000),
}


@pytest.mark.parametrize("fault", UNUSABLE.values(), ids=UNUSABLE)
def test_where_nothing_can_be_kept_a_model_opens_all_the_same(bundle, tmp_path, monkeypatch, fault, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HOME", raising=False)
    fault(monkeypatch, tmp_path / "cache")
    assert opened(bundle).decode(Z).shape == (2, 3, 32, 32)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.glob("cache/tinydiff/graphs/*"))


def test_a_place_depends_on_all_that_its_graph_depends_on(bundle, cache, tmp_path, monkeypatch):
    def place(path: Path = bundle) -> str:
        found = optimised.place(path, "unet")
        assert found
        return found.name

    names = [place(), optimised.place(bundle, "vae_decoder").name]  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(ort, "__version__", "0.1")
        names.append(place())
    with monkeypatch.context() as patch:
        patch.setattr(optimised, "processor", lambda: "another")
        names.append(place())
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    assert place(copy) == names[0]  # wherever the bundle is
    listed = json.loads((copy / "manifest.json").read_bytes())
    listed["files"]["unet/model.onnx"]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(listed))
    names.append(place(copy))
    assert len(set(names)) == len(names)
    (copy / "manifest.json").write_text("{")
    assert optimised.place(copy, "unet") is None
    (copy / "manifest.json").unlink()
    assert optimised.place(copy, "unet") is None  # of a bundle without hashes nothing is known


def test_at_most_so_much_is_kept_and_the_oldest_goes_first(tmp_path):
    for age, name in enumerate("abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / ".hidden").mkdir()
    user_cache.trim(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a", "b"]


def test_many_at_once_make_one(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        decoded = list(pool.map(lambda _: opened(bundle).decode(Z), range(4)))
    assert all(np.array_equal(each, decoded[0]) for each in decoded) and len(places(tmp_path)) == 2
