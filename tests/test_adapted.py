"""LoRA files on a bundle as it is draw what a bundle that was exported with them does; what cannot be is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from interpreters import run_without
from test_export import bundle, model_dir, translated

from tinydiff import cli, export, flags
from tinydiff.adapters import lora
from tinydiff.adapters.lora import LowRank
from tinydiff.backends import open_backend
from tinydiff.backends.adapted import Adapted
from tinydiff.backends.graph import weights
from tinydiff.backends.onnx import OnnxBackend
from tinydiff.checkpoints.source import Adapter, Source
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import sha256
from tinydiff.pipeline import Request, generate

REQUEST = Request(4, 3.0, "ddim", "trailing", 16, 16)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Two files in either style, of every layer of the small model, of any shape."""
    place, source, found = tmp_path_factory.mktemp("lora"), Source(model_dir()), list[Path]()
    shapes = lora.layers_of({name: source.shapes(name) for name in ("unet", "text_encoder")})
    for rank, style in ((2, "diffusers"), (3, "kohya")):
        rng, layers = np.random.default_rng(rank), dict[str, LowRank]()
        for layer, (out, *reads) in shapes.items():
            if "embedding." in layer:  # tables are no layers
                continue
            sizes = (rank, *reads), (out, rank, *[1] * (len(reads) - 1))
            down, up = (rng.standard_normal(size, np.float32) / 3 for size in sizes)
            layers[layer] = LowRank(down, up, 1.5)
        found.append(place / f"{style}.safetensors")
        lora.write(found[-1], layers, style)
    return found


def adapters(files: list[Path], *strengths: float) -> tuple[Adapter, ...]:
    return tuple(Adapter(file, strength) for file, strength in zip(files, strengths, strict=False))


def drawn(source: Source) -> np.ndarray:
    return generate(OnnxBackend(source, "cpu"), ["red heart"], [3], REQUEST).astype(int)


@pytest.mark.parametrize(("precision", "strengths"), [("fp32", (0.7,)), ("fp32", (0.3, 0.4)), ("fp16", (0.2,))])
def test_a_bundle_draws_what_its_merged_export_does(precision, strengths, files, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "translate", translated)
    changed = adapters(files, *strengths)
    export.export(Source(model_dir(), adapters=changed), tmp_path / "merged", precision)
    ours = drawn(Source(bundle(precision), adapters=changed))
    assert np.abs(ours - drawn(Source(tmp_path / "merged"))).max() <= 1
    assert np.abs(ours - drawn(Source(bundle(precision)))).max() > 20
    on_torch = generate(
        open_backend(Source(model_dir(), adapters=changed), "torch", "cpu"), ["red heart"], [3], REQUEST
    )
    assert np.abs(ours - on_torch).max() <= (1 if precision == "fp32" else 3)


def test_what_is_kept_is_of_its_own_files_and_strengths(files, tmp_path, monkeypatch):
    """The second opening computes no product; another strength, other contents and none at all have graphs of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, own = bundle("fp32"), tmp_path / "own.safetensors"
    shutil.copy(files[0], own)

    def opened(*given: Adapter) -> np.ndarray:
        backend = OnnxBackend(Source(path, adapters=given), "cpu")
        pixels = generate(backend, ["red heart"], [3], REQUEST)
        backend.pool.shutdown()  # whose last work writes what is kept
        return pixels.astype(int)

    first, plain = opened(Adapter(own, 0.5)), opened()
    products = list[str]()
    merged = Source.merged
    monkeypatch.setattr(Source, "merged", lambda self, name, *rest: products.append(name) or merged(self, name, *rest))
    assert np.array_equal(opened(Adapter(own, 0.5)), first) and set(products) == {"text_encoder"}
    assert np.array_equal(opened(), plain) and not np.array_equal(first, plain)
    products.clear()
    assert not np.array_equal(opened(Adapter(own, 0.6)), first) and "unet" in products
    products.clear()
    shutil.copy(files[1], own)
    assert not np.array_equal(opened(Adapter(own, 0.5)), first) and "unet" in products


def test_weights_keep_their_names_in_every_kind_of_graph(files):
    for kind in (("fp32", "any"), ("fp16", "any"), ("fp16", "cuda"), ("fp16", "cpu")):
        source = Source(bundle(*kind), adapters=adapters(files, 1.0))
        for name in ("unet", "text_encoder"):
            values = Adapted(source, name).values
            known = weights(source.path / name / "model.onnx")
            assert values.keys() == source.changed(name) and len(values) > 5
            assert all(known[key][1] == tuple(value.shape()) for key, value in values.items())


def test_graphs_without_such_weights_are_refused(files, tmp_path):
    """Of whole numbers, renamed as other exporters do, or of another shape."""
    changed = adapters(files, 1.0)
    with pytest.raises(ModelError, match=r"int8; .*export .* with --lora"):
        OnnxBackend(Source(bundle("int8"), adapters=changed), "cpu")
    shutil.copytree(bundle("fp32"), tmp_path / "renamed")
    (tmp_path / "renamed" / "manifest.json").unlink()
    path = tmp_path / "renamed" / "unet" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    key = next(iter(Source(bundle("fp32"), adapters=changed).changed("unet")))
    for node in graph.graph.node:
        node.input[:] = ["onnx::MatMul_7" if name == key else name for name in node.input]
    next(each for each in graph.graph.initializer if each.name == key).name = "onnx::MatMul_7"
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(
        ModelError, match=r"has no weight .* that --lora or --word could change; export the model again with it"
    ):
        OnnxBackend(Source(tmp_path / "renamed", adapters=changed), "cpu")


def test_a_bundle_is_never_written_to(files):
    before = {path: sha256(path) for path in bundle("fp32").rglob("*") if path.is_file()}
    drawn(Source(bundle("fp32"), adapters=adapters(files, 1.0)))
    assert {path: sha256(path) for path in bundle("fp32").rglob("*") if path.is_file()} == before


# ---- the command ----------------------------------------------------------------------------------------------------------


FORMS: dict[str, Callable[[Path, Path], tuple[Any, ...]]] = {
    "a file": lambda one, two: ("red heart", "--lora", f"{one}:0.5"),
    "in a prompt": lambda one, two: (f"red <lora:{one.stem}:0.5> heart", "--lora-dir", one.parent),
    "a folder": lambda one, two: ("red heart", "--lora", f"{one.parent / 'run'}:0.5"),
}


def test_forms_of_the_command(files, tmp_path, capsys):
    (files[0].parent / "run" / "adapter").mkdir(parents=True, exist_ok=True)
    shutil.copy(files[0], files[0].parent / "run" / "adapter" / lora.FILE)
    pixels, more = dict[str, bytes](), ("-m", bundle("fp32"), "-s", 3, "--steps", 2, "--json")
    for form, words in FORMS.items():
        out = tmp_path / f"{form}.png"
        cli.app(["generate", *map(str, (*words(*files), *more, "-o", out, "--no-metadata"))], standalone_mode=False)
        row = json.loads(capsys.readouterr().out)
        assert row["lora"] == [f"{lora.FILE if form == 'a folder' else files[0].name}:0.5"]
        assert row["prompt"] == "red heart"
        pixels[form] = out.read_bytes()
    assert len(set(pixels.values())) == 1


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no number": (("a", "--lora", "x.safetensors:much"), "is no strength"),
    "no finite number": (("a", "--lora", "x.safetensors:inf"), "is no strength"),
    "not there": (("a <lora:difusers:1>", "--lora-dir", "DIR"), "did you mean 'diffusers'"),
    "in a prompt, no number": (("a <lora:kohya:x>", "--lora-dir", "DIR"), "is no strength"),
    "no folder": (("a", "--lora-dir", "nowhere"), "--lora-dir nowhere: no such folder"),
    "two strengths": (("<lora:kohya:1> <lora:kohya:0.5>", "--lora-dir", "DIR"), "asked for at 1 too"),
    "stdin": (("-", "--lora-dir", "DIR"), "all prompts of stdin are drawn by one model"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_on_the_command_line(case, files):
    (prompt, *words), says = MISTAKES[case]
    words = [str(files[0].parent) if word == "DIR" else word for word in words]
    given = {"given": [words[1]]} if words[0] == "--lora" else {"given": [], "folder": Path(words[1])}
    with pytest.raises(UsageError, match=says):
        flags.adapters(given["given"], given.get("folder"), prompt)


def test_a_file_that_two_prompts_name_counts_once(files):
    found = flags.adapters([], files[0].parent, "a <lora:kohya:0.5>", "b <lora:kohya:0.5> <lora:diffusers>")
    assert [(each.path.stem, each.strength) for each in found] == [("kohya", 0.5), ("diffusers", 1.0)]


def test_a_strength_that_overflows_names_the_file(files):
    source = Source(model_dir(), adapters=(Adapter(files[0], 1e39),))
    with pytest.raises(ModelError, match=rf"{files[0].name}: at a strength of 1e\+39 .* overflows; give a lower one"):
        source.tensors("unet")


def test_neither_torch_nor_onnx_is_needed_to_draw(files, tmp_path):
    words = ["generate", "red heart", "-m", bundle("fp32"), "--lora", f"{files[1]}:0.5", "-o", tmp_path / "out.png"]
    code = f"from tinydiff import cli\ncli.app({[*map(str, words), '--steps', '2']!r}, standalone_mode=False)"
    run_without(code, "torch", "onnx")
    assert (tmp_path / "out.png").exists()


def test_what_does_not_fit_is_refused_before_torch(files, tmp_path):
    """By either runtime."""
    layers = {"unet.conv_in": LowRank(np.ones((1, 9), np.float32), np.ones((9, 1), np.float32), 1)}
    lora.write(tmp_path / "other.safetensors", layers)
    for path in (model_dir(), bundle("fp32")):
        code = f"""
from tinydiff import cli
from tinydiff.errors import ModelError
try:
    cli.opening({str(path)!r}, "auto", "cpu", adapters=cli.flags.adapters([{str(tmp_path / "other.safetensors")!r}]))
except ModelError as error:
    print(error)
"""
        assert "give a LoRA that was trained on it" in run_without(code, "torch", "onnx")
