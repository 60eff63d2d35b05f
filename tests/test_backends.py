"""Finding and opening a model while somebody replaces it: all of it is the old one or the new one."""

from __future__ import annotations

import builtins
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tinydiff import cli, inspect
from tinydiff.backends import find_model
from tinydiff.checkpoints.convert import to_folder, to_single_file
from tinydiff.checkpoints.source import Source
from tinydiff.errors import BusyError, UserError
from tinydiff.files import again, committed


@pytest.fixture(scope="module")
def two(make_model, run_config) -> list[Path]:
    return [make_model(run_config, seed) for seed in (1, 2)]


def put(model: Path, path: Path) -> None:
    with committed(path, replace=True) as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True)


def before_opening(patch: pytest.MonkeyPatch, path: Path, nth: int, act: Callable[[], None]) -> list[Path]:
    """Calls `act` before the `nth` time that a file of a folder is opened; returns the list of those opened."""
    opened: list[Path] = []

    def hooked(real):
        def call(file, *args, **kwargs):
            if not isinstance(file, int) and path in Path(file).parents:
                opened.append(Path(file))
                if len(opened) == nth:
                    act()
            return real(file, *args, **kwargs)

        return call

    for owner, name in ((io, "open"), (builtins, "open"), (safetensors.torch, "load_file")):
        patch.setattr(owner, name, hooked(getattr(owner, name)))
    return opened


def which(models: list[Path], name: str, tensors: dict[str, Tensor]) -> int:
    """The number of the model whose network this is."""
    (file,) = (models[0] / name).glob("*.safetensors")
    stored = [safetensors.torch.load_file(model / name / file.name) for model in models]
    (number,) = [n for n, theirs in enumerate(stored) if all(torch.equal(theirs[k], tensors[k]) for k in theirs)]
    return number


def opened_torch(path: Path) -> dict[str, dict[str, Tensor]]:
    backend = cli.opening(str(path), "torch", "cpu")
    return {name: part.state_dict() for name, part in backend.model.networks.items()}


def exported(path: Path) -> dict[str, dict[str, Tensor]]:
    def write() -> None:
        to_folder(Source(find_model(str(path))), path.parent / "out", force=True)

    again(write)
    names = ("text_encoder", "unet", "vae")
    return {
        name: safetensors.torch.load_file(next((path.parent / "out" / name).glob("*.safetensors"))) for name in names
    }


@pytest.mark.parametrize("read", [opened_torch, exported])
def test_a_model_that_is_replaced_while_it_is_opened_is_old_or_new(two, tmp_path, read):
    path, seen, nth = tmp_path / "model", set(), 1
    while True:
        put(two[0], path)
        with pytest.MonkeyPatch.context() as patch:
            opened = before_opening(patch, path, nth, lambda: put(two[1], path))
            parts = read(path)
        (number,) = {which(two, name, tensors) for name, tensors in parts.items()}
        seen.add(number)
        if len(opened) < nth:
            break
        nth += 5
    assert seen == {0, 1} and nth > 15


def test_inspection_is_of_one_model(two, tmp_path):
    path, read = tmp_path / "model", []
    put(two[0], path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "of_source", lambda source, *_: read.append(source.configs) or {})
        before_opening(patch, path, 4, lambda: put(two[1], path))
        inspect.inspect(str(path))
    assert len(read) == 2 and read[1] == Source(path).configs


def test_a_bundle_that_is_replaced_while_its_graphs_are_opened_is_told(two, tmp_path, monkeypatch):
    """They are opened while other things are imported: that is noticed when they are first used."""
    from tinydiff.backends import onnx

    def opened(self, name: str) -> None:
        if name == "unet":
            put(two[1], tmp_path / "model")

    put(two[0], tmp_path / "model")
    monkeypatch.setattr(onnx.OnnxBackend, "open", opened)
    backend = onnx.OnnxBackend(Source(tmp_path / "model"), "cpu", wait=False)
    with pytest.raises(BusyError, match="model: replaced while it was read"):
        backend.wait()


def test_a_single_file_that_is_replaced_is_noticed(tiny_sd_files, tmp_path):
    path = Path(shutil.copy(tiny_sd_files["clip"], tmp_path / "a.safetensors"))
    source = Source(path)
    shutil.copy(tiny_sd_files["open_clip"], path)
    with pytest.raises(BusyError, match="a.safetensors: replaced while it was read"):
        to_single_file(source, tmp_path / "b.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_interrupted_replacement_hides_no_model(two, tmp_path):
    """Where names cannot be exchanged: the old folder is read beside its place, of a run too."""
    put(two[0], tmp_path / "run" / "model")
    (tmp_path / "run" / "model").rename(tmp_path / "run" / ".tinydiff-old-model")
    for name in ("run", "run/model"):
        assert find_model(str(tmp_path / name)) == tmp_path / "run" / ".tinydiff-old-model"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)"),
            7,
            "memory; free some memory",
        ),
        (
            RuntimeError("unable to open file <a> in read-only mode: Too many open files (24)"),
            7,
            r"files; raise .*ulimit",
        ),
        (safetensors.SafetensorError("I/O error: Input/output error (os error 5)"), 4, "error; check the disk"),
        (OSError(13, "Permission denied"), 4, "denied; make it readable"),
        (safetensors.SafetensorError("InvalidOffset(`a (24)`)"), 4, r"damaged \(InvalidOffset.*; copy or download"),
    ],
)
def test_what_keeps_the_system_from_mapping_a_file_is_told(two, error, code, told):
    def load_file(path):
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=told) as caught:
        patch.setattr(safetensors.torch, "load_file", load_file)
        cli.opening(str(two[0]), "torch", "cpu")
    assert caught.value.code == code and ".safetensors: " in str(caught.value)
