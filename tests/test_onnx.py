"""The onnxruntime backend on hand-made bundles: what it computes, and every graph that it refuses."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interpreters import ENV, ROOT, without
from onnx import TensorProto as T
from onnx import helper as h
from protobuf import field
from safetensors.numpy import save_file

from tinydiff import config
from tinydiff.backends import devices, graph, sessions
from tinydiff.backends import onnx as backend
from tinydiff.backends.onnx import OnnxBackend
from tinydiff.checkpoints import scheduler
from tinydiff.checkpoints.folder import write_json
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError, ResourceError
from tinydiff.text.tokenizer import Tokenizer

PIXELS = ["b", 3, "h", "w"]


def value(name: str, shape: list[Any], kind: int = T.FLOAT) -> onnx.ValueInfoProto:
    return h.make_tensor_value_info(name, kind, shape)


def save(path: Path, nodes: list, inputs: list, outputs: list, tensors: tuple = (), **more: Any) -> Path:
    graph = h.make_graph(nodes, "g", inputs, outputs, list(tensors), **more)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def doubled(path: Path, source: str, result: str, tensors: tuple = (), nodes: tuple = (), **more: Any) -> Path:
    """A graph that doubles its input."""
    node = h.make_node("Add", [source, source], [result])
    return save(path, [node, *nodes], [value(source, PIXELS)], [value(result, PIXELS)], tensors, **more)


def denoiser(path: Path, time: list[Any] | None = None, kind: int = T.FLOAT) -> Path:
    """out = sample * timestep + mean of encoder_hidden_states."""
    nodes = [
        h.make_node("Cast", ["timestep"], ["t0"], to=T.FLOAT),
        h.make_node("ReduceMax", ["t0"], ["t"], keepdims=0),
        h.make_node("ReduceMean", ["encoder_hidden_states"], ["m"], keepdims=0),
        h.make_node("Mul", ["sample", "t"], ["y"]),
        h.make_node("Add", ["y", "m"], ["out_sample"]),
    ]
    context = value("encoder_hidden_states", ["b", "s", 3])
    inputs = [value("sample", PIXELS), value("timestep", time or [], kind), context]
    return save(path, nodes, inputs, [value("out_sample", PIXELS)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle: text (B, T) -> (B, T, 3) of the ids, denoiser as above, the decoder doubles; a latent is a pixel."""
    cfg, bundle = config.load(), tmp_path / "bundle"
    for name in ("scheduler", "unet", "vae_decoder"):
        (bundle / name).mkdir(parents=True)
    write_json(bundle / "scheduler" / "scheduler_config.json", scheduler.write(cfg))
    network = {"in_channels": 3, "out_channels": 3, "cross_attention_dim": 3}
    write_json(bundle / "unet" / "config.json", {"block_out_channels": [1, 1], "sample_size": 8} | network)
    write_json(bundle / "vae_decoder" / "config.json", {"block_out_channels": [1], "latent_channels": 3})
    Tokenizer.train(["red heart"], 514, 8).save(bundle / "tokenizer")
    nodes = [
        h.make_node("Cast", ["input_ids"], ["f"], to=T.FLOAT),
        h.make_node("Unsqueeze", ["f", "axis"], ["u"]),
        h.make_node("Expand", ["u", "three"], ["last_hidden_state"]),
    ]
    constants = (h.make_tensor("axis", T.INT64, [1], [2]), h.make_tensor("three", T.INT64, [3], [1, 1, 3]))
    ids, out = value("input_ids", ["b", "s"], T.INT64), value("last_hidden_state", ["b", "s", 3])
    save(bundle / "text_encoder" / "model.onnx", nodes, [ids], [out], constants)
    denoiser(bundle / "unet" / "model.onnx")
    both = h.make_node("Concat", ["sample", "sample"], ["latent_parameters"], axis=1)
    moments = value("latent_parameters", ["b", 6, "h", "w"])
    save(bundle / "vae_encoder" / "model.onnx", [both], [value("sample", PIXELS)], [moments])
    doubled(bundle / "vae_decoder" / "model.onnx", "latent_sample", "sample")
    return bundle


X = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)


CONTEXT = {"encoder_hidden_states": np.full((2, 5, 3), 0.5, np.float32)}


def refusal(bundle: Path, kind: type[Exception] = ModelError, device: str = "cpu") -> str:
    with pytest.raises(kind) as caught:
        OnnxBackend(Source(bundle), device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what it computes ----------------------------------------------------------------------------------------------


def test_four_calls(path: Path) -> None:
    b = OnnxBackend(Source(path), "cpu")
    ids = b.tokenizers["text_encoder"].encode(["red", "heart"])
    said = b.encode_text({"text_encoder": ids})
    assert said.keys() == {"encoder_hidden_states"}
    vectors = np.repeat(ids[..., None], 3, -1).astype(np.float32)
    np.testing.assert_array_equal(said["encoder_hidden_states"], vectors)
    np.testing.assert_array_equal(b.denoise(X, 3, CONTEXT), X * 3 + 0.5)
    np.testing.assert_array_equal(b.encode_image(X), np.concatenate([X, X], 1))
    np.testing.assert_array_equal(b.decode(X[..., ::-1]), X[..., ::-1] * 2)  # a view that is not contiguous
    assert (b.name, b.device, b.description.latent_channels) == ("onnx", "cpu", 3)


@pytest.mark.parametrize("shape", [["steps"], [1], ["b"]])
@pytest.mark.parametrize("kind", [T.INT64, T.DOUBLE, T.FLOAT16])
def test_timesteps_of_other_exporters(path: Path, shape: list[Any], kind: int) -> None:
    denoiser(path / "unet" / "model.onnx", shape, kind)
    np.testing.assert_array_equal(OnnxBackend(Source(path), "cpu").denoise(X, 3.0, CONTEXT), X * 3 + 0.5)


def test_float16_outputs_come_as_float32(path: Path) -> None:
    cast = h.make_node("Cast", ["latent_sample"], ["sample"], to=T.FLOAT16)
    source, result = value("latent_sample", PIXELS), value("sample", PIXELS, T.FLOAT16)
    save(path / "vae_decoder" / "model.onnx", [cast], [source], [result])
    y = OnnxBackend(Source(path), "cpu").decode(X)
    assert y.dtype == np.float32 and np.array_equal(y, X)


def test_image_encoder_is_opened_when_needed(path: Path) -> None:
    (path / "vae_encoder" / "model.onnx").unlink()
    b = OnnxBackend(Source(path), "cpu")
    with pytest.raises(ModelError, match=r"vae_encoder/model.onnx: No such file or directory; check the path, or copy"):
        b.encode_image(X)


def test_shapes_that_do_not_fit_are_one_line(path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        OnnxBackend(Source(path), "cpu").denoise(np.zeros((1, 5, 2, 2), np.float32), 1.0, CONTEXT)
    assert "\n" not in str(caught.value) and "takes sample of any x 3 x any x any alone, not 1 x 5 x 2 x 2;" in str(
        caught.value
    )


def test_out_of_memory_is_not_damage() -> None:
    error = sessions.failure("x", RuntimeError("[ONNXRuntimeError] : 6 : FAIL : Failed to allocate\nmemory"))
    assert isinstance(error, ResourceError) and "[ONNX" not in str(error) and "\n" not in str(error)


def test_torch_is_never_imported(path: Path) -> None:
    code = (
        "import numpy as np; from pathlib import Path; from tinydiff.backends import open_backend\n"
        "from tinydiff.checkpoints.source import Source\n"
        "b = open_backend(Source(Path(sys.argv[1])))\n"
        "print(b.name, b.decode(np.ones((1, 3, 1, 1), np.float32)).sum())"
    )
    command = [sys.executable, "-c", without(code, "torch", "onnx"), path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("onnx 6.0\n", "", 0)


# ---- devices -------------------------------------------------------------------------------------------------------


def test_device_without_cuda(path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(devices, "cuda_problem", lambda: "no GPU; buy one")
    assert OnnxBackend(Source(path), "auto").device == OnnxBackend(Source(path), "cpu").device == "cpu"
    assert refusal(path, ResourceError, "cuda") == "--device cuda: no GPU; buy one; or use --device cpu"
    assert capfd.readouterr() == ("", "")


def test_this_machine_is_asked_silently(capfd: pytest.CaptureFixture[str]) -> None:
    assert (devices.cuda_problem() == "") == (devices.choose_device("auto") == "cuda")
    assert capfd.readouterr() == ("", "")


def test_identity_graph_is_the_identity() -> None:
    session = ort.InferenceSession(devices.IDENTITY, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([3], np.float32)})[0] == [3]


def test_fall_back_to_the_cpu_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, pool = ort.InferenceSession, ThreadPoolExecutor(4)

    def on_cpu(model: Path, options: ort.SessionOptions, providers: list, **more: Any) -> ort.InferenceSession:
        assert providers[0][0] == sessions.CUDA
        return opened(model, options, [sessions.CPU], **more)

    monkeypatch.setattr(devices, "cuda_problem", lambda: "")
    monkeypatch.setattr(ort, "InferenceSession", on_cpu)
    monkeypatch.setattr(backend, "ThreadPoolExecutor", lambda count: pool)
    assert "onnxruntime would run it on the CPU; use --device cpu" in refusal(path, ResourceError, "cuda")
    pool.shutdown()  # while sessions are what they are here


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(path: Path) -> None:
    if problem := devices.cuda_problem():
        pytest.skip(problem)
    on_gpu, on_cpu = OnnxBackend(Source(path), "cuda"), OnnxBackend(Source(path), "cpu")
    np.testing.assert_allclose(on_gpu.denoise(X, 3.0, CONTEXT), on_cpu.denoise(X, 3.0, CONTEXT), rtol=1e-5)


# ---- damaged graphs ------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def other_names(path: Path) -> None:
    doubled(path, "x", "sample")


def other_output(path: Path) -> None:
    doubled(path, "latent_sample", "y")


def strings(path: Path) -> None:
    node = h.make_node("Identity", ["latent_sample"], ["sample"])
    save(path, [node], [value("latent_sample", [1], T.STRING)], [value("sample", [1], T.STRING)])


def unknown_operator(path: Path) -> None:
    source, result = value("latent_sample", PIXELS), value("sample", PIXELS)
    save(path, [h.make_node("Explode", ["latent_sample"], ["sample"], domain="evil")], [source], [result])


def vast(path: Path) -> None:
    tensor = h.make_tensor("w", T.FLOAT, [1], [0.0])
    del tensor.dims[:]
    tensor.dims.extend([2**62, 2**62])
    add = h.make_node("Add", ["latent_sample", "w"], ["sample"])
    save(path, [add], [value("latent_sample", PIXELS)], [value("sample", PIXELS)], (tensor,))


def deep(path: Path) -> None:
    """10,000 graphs, each inside an attribute of a node of the one before."""
    data = b""
    for _ in range(10_000):
        for number in (6, 5, 1):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            data = field(number, data)
    path.write_bytes(field(1, 8) + field(7, data))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a graph; location"),
    "git lfs pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "cut": cut,
    "other input": other_names,
    "other output": other_output,
    "strings": strings,
    "unknown operator": unknown_operator,
    "2^124 elements": vast,
    "deep": deep,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_graph(path: Path, damage: Callable[[Path], Any], capfd: pytest.CaptureFixture[str]) -> None:
    damage(path / "vae_decoder" / "model.onnx")
    start = time.process_time()
    assert "vae_decoder" in refusal(path)
    assert capfd.readouterr() == ("", "")
    assert time.process_time() - start < 5


# ---- external data -------------------------------------------------------------------------------------------------


def external(location: str, offset: Any = 0, length: Any = 8, **more: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=T.FLOAT, dims=[2], data_location=T.EXTERNAL)
    for key, entry in {"location": location, "offset": offset, "length": length, **more}.items():
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def test_external_data_beside_the_graph(path: Path) -> None:
    (path / "vae_decoder" / "w.bin").write_bytes(b"junk" + np.array([1, 2], np.float32).tobytes())
    add = h.make_node("Add", ["latent_sample", "w"], ["sample"])
    source, result = value("latent_sample", PIXELS), value("sample", PIXELS)
    save(path / "vae_decoder" / "model.onnx", [add], [source], [result], (external("w.bin", 4),))
    np.testing.assert_array_equal(OnnxBackend(Source(path), "cpu").decode(X), X + np.array([1, 2]))


ELSEWHERE = ["../secret", "/etc/passwd", "sub/w.bin", "", ".", "..", "link", "hard/../w.bin", "nul\0", "gone", "a\\b"]


NUMBERS = [(-1, 8), (0, -8), (0, 2**70), (2**62, 8), (1, 8), ("0x1", 8), ("٣", 8)]


def placed_everywhere(tensor: onnx.TensorProto) -> dict[str, dict[str, Any]]:
    """The tensor at each place of a graph where onnx.proto allows one, as arguments for `doubled`."""
    inner = h.make_graph([], "inner", [], [value("w", [2])], [tensor])
    sparse = h.make_sparse_tensor(tensor, h.make_tensor("i", T.INT64, [2], [0, 1]), [9])

    def node(**attributes: Any) -> dict[str, Any]:
        return {"nodes": (h.make_node("Constant", [], ["c"], **attributes),)}

    return {
        "initializer": {"tensors": (tensor,)},
        "sparse initializer": {"sparse_initializer": [sparse]},
        "attribute": node(value=tensor),
        "attribute list": node(many=[tensor]),
        "subgraph": node(body=inner),
        "subgraph list": node(bodies=[inner]),
        "sparse attribute": node(sparse_value=sparse),
    }


@pytest.fixture
def unopened(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The decoder's graph in a bundle whose graphs onnxruntime must not see."""

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("onnxruntime was given the graph")

    monkeypatch.setattr(ort, "InferenceSession", opened)
    place = path / "vae_decoder"
    (path / "secret").write_bytes(bytes(8))
    (place / "w.bin").write_bytes(bytes(8))
    os.symlink(path / "secret", place / "link")
    return place / "model.onnx"


def check(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        graph.check(path)
    assert "\n" not in str(caught.value) and "vae_decoder" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("location", ELSEWHERE)
def test_external_data_elsewhere(unopened: Path, location: str) -> None:
    doubled(unopened, "latent_sample", "sample", (external(location),))
    check(unopened)


@pytest.mark.parametrize(("offset", "length"), NUMBERS)
def test_external_data_out_of_range(unopened: Path, offset: Any, length: Any) -> None:
    doubled(unopened, "latent_sample", "sample", (external("w.bin", offset, length),))
    check(unopened)


@pytest.mark.parametrize(("offset", "length", "fits"), [(0, 8, True), (8, 4, True), (0, 4, False), (4, 8, False)])
def test_a_graph_takes_whole_tensors_of_safetensors(unopened: Path, offset: int, length: int, fits: bool) -> None:
    """Of weights that were stored as another type, or are of another model, it would take parts and draw noise."""
    weights = unopened.parent / "w.safetensors"
    save_file({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float16)}, weights)
    begin = weights.stat().st_size - 12
    doubled(unopened, "latent_sample", "sample", (external(weights.name, begin + offset, length),))
    if fits:
        graph.check(unopened)
    else:
        assert "of other weights than those in 'w.safetensors'" in check(unopened)


@pytest.mark.parametrize("place", placed_everywhere(external("x")))
def test_external_data_wherever_it_hides(unopened: Path, place: str) -> None:
    doubled(unopened, "latent_sample", "sample", **placed_everywhere(external("../secret"))[place])
    assert "'../secret', which is not beside it" in check(unopened)


def test_external_data_in_functions_and_training(unopened: Path) -> None:
    node = h.make_node("Constant", [], ["c"], value=external("../secret"))
    function = h.make_function("d", "f", [], ["c"], [node], [h.make_opsetid("", 17)])
    graph = h.make_graph([node], "t", [], [])
    for more in ({"functions": [function]}, {"training_info": [onnx.TrainingInfoProto(algorithm=graph)]}):
        model = onnx.ModelProto(graph=h.make_graph([], "g", [], []), **more)
        unopened.write_bytes(model.SerializeToString())
        check(unopened)


def test_backend_asks_before_it_opens(unopened: Path) -> None:
    for name in ("unet", "vae_decoder", "text_encoder"):
        doubled(unopened.parents[1] / name / "model.onnx", "sample", "y", (external("../secret"),))
    assert "which is not beside it" in refusal(unopened.parents[1])


@given(st.lists(st.tuples(st.text(max_size=9), st.integers(0, 2**40)), max_size=5), st.booleans())
def test_entries_are_read_as_onnx_reads_them(entries: list[tuple[str, int]], swapped: bool) -> None:
    tensors = [external(name, offset) for name, offset in entries]
    for tensor in tensors:
        if swapped:
            tensor.external_data.reverse()
    data = h.make_model(h.make_graph([], "g", [], [], tensors)).SerializeToString()
    found = [(t["location"], int(t["offset"])) for t in graph.Work.read(data).external]
    assert sorted(found) == sorted(entries)


@given(st.binary(max_size=60), st.integers(0, 400))
def test_any_bytes_end_in_an_answer(junk: bytes, at: int) -> None:
    data = h.make_model(h.make_graph([], "g", [], [], [external("w.bin")])).SerializeToString()
    for damaged in (junk, data[:at] + junk + data[at:], data[:at] + junk + data[at + len(junk) :]):
        with contextlib.suppress(ValueError, IndexError):
            assert all(isinstance(t, dict) for t in graph.Work.read(damaged).external)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("vae_decoder", {"latent_channels": 2}),
        ("vae_decoder", {"latent_channels": "two", "block_out_channels": [1, 1]}),
        ("vae_decoder", {"latent_channels": 2, "block_out_channels": 3}),
        ("unet", {"sample_size": 8, "block_out_channels": 3}),
        ("unet", {"block_out_channels": [1, 1]}),
    ],
)
def test_a_damaged_config_is_one_line(path: Path, name: str, table: dict[str, Any]) -> None:
    write_json(path / name / "config.json", table)
    said = refusal(path)
    assert "its configuration files lack or misstate" in said or "/config.json" in said


@pytest.mark.parametrize("classes", ["many", [1000, 1]])
def test_a_number_of_classes_that_is_none_is_one_line(path: Path, classes: Any) -> None:
    (path / "unet").rename(path / "transformer")
    table = {"num_embeds_ada_norm": classes, "sample_size": 8, "in_channels": 3, "patch_size": 2}
    write_json(path / "transformer" / "config.json", table)
    said = refusal(path)
    assert "num_embeds_ada_norm" in said or "make no sense" in said or "lack or misstate" in said


def test_an_entry_of_another_wire_type_does_not_hide_the_location() -> None:
    """onnxruntime skips such a field, so the check has to."""
    entry = onnx.StringStringEntryProto(key="location", value="../secret").SerializeToString() + b"\x15w.bi"
    tensor = (
        external("").SerializeToString().replace(b"\x6a\x0c\x0a\x08location\x12\x00", b"\x6a%c" % len(entry) + entry)
    )
    inside = b"\x2a%c" % len(tensor) + tensor
    assert graph.Work.read(b"\x3a%c" % len(inside) + inside).external[0]["location"] == "../secret"


# ---- other types, ranks and sizes ----------------------------------------------------------------------------------


def reshaped(path: Path, shape: list[int], kind: int = T.FLOAT, declared: list[Any] | None = None) -> Path:
    """A decoder that gives its latents in another shape, and may declare another one."""
    nodes = [h.make_node("Reshape", ["latent_sample", "shape"], ["r"]), h.make_node("Cast", ["r"], ["sample"], to=kind)]
    result = value("sample", PIXELS if declared is None else declared, kind)
    shape_of = h.make_tensor("shape", T.INT64, [len(shape)], shape)
    return save(path, nodes, [value("latent_sample", PIXELS)], [result], (shape_of,))


def text_of(path: Path, kind: int, name: str = "last_hidden_state") -> Path:
    node = h.make_node("Cast", ["input_ids"], [name], to=T.FLOAT)
    return save(path, [node], [value("input_ids", ["b", "s"], kind)], [value(name, ["b", "s"])])


AT_OPENING: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "channels": ("vae_decoder", lambda p: save_identity(p, ["b", 4, "h", "w"])),
    "rank": ("vae_decoder", lambda p: save_identity(p, ["b", 3, "h"])),
    "whole numbers for a latent": ("vae_decoder", lambda p: save_identity(p, PIXELS, T.INT64)),
    "whole numbers for an image": ("vae_decoder", lambda p: reshaped(p, [0, 0, 0, 0], T.INT64)),
    "text from fractions": ("text_encoder", lambda p: text_of(p, T.FLOAT16)),
    "text of another rank": ("text_encoder", lambda p: text_of(p, T.INT64)),
    "no text output": ("text_encoder", lambda p: text_of(p, T.INT64, "pooler_output")),
    "level of two axes": ("unet", lambda p: denoiser(p, ["b", 1])),
    "encoder for decoder": ("vae_decoder", lambda p: shutil.copy(p.parents[1] / "vae_encoder" / "model.onnx", p)),
    "decoder for unet": ("unet", lambda p: shutil.copy(p.parents[1] / "vae_decoder" / "model.onnx", p)),
    "other latents": ("unet", lambda p: write_json(p.with_name("config.json"), {"in_channels": 4, "sample_size": 8})),
}


def save_identity(path: Path, shape: list[Any], kind: int = T.FLOAT) -> Path:
    node = h.make_node("Identity", ["latent_sample"], ["sample"])
    return save(path, [node], [value("latent_sample", shape, kind)], [value("sample", shape, kind)])


@pytest.mark.parametrize(("name", "change"), AT_OPENING.values(), ids=AT_OPENING)
def test_graphs_of_another_form_are_refused_when_they_are_opened(
    path: Path, name: str, change: Callable[[Path], Any]
) -> None:
    change(path / name / "model.onnx")
    assert name in refusal(path)


@pytest.mark.parametrize("shape", [[-1], [0, 3, 1, -1], [1, -1, 2, 2], [0, 0, 4, 1], []])
@pytest.mark.parametrize("declared", [["x", "y", "z", "u"], None])
def test_what_graphs_give_is_checked_whatever_they_declare(path: Path, shape: list[int], declared: Any) -> None:
    """ "Unknown" fits any declaration, so the decoder's result is looked at."""
    file = path / "vae_decoder" / "model.onnx"
    if shape:
        reshaped(file, shape, declared=declared)
    else:
        total = h.make_node("ReduceSum", ["latent_sample"], ["sample"], keepdims=0)
        save(file, [total], [value("latent_sample", PIXELS)], [h.make_tensor_value_info("sample", T.FLOAT, None)])
    with pytest.raises(ModelError, match="vae_decoder") as caught:
        OnnxBackend(Source(path), "cpu").decode(X)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_graphs_for_so_many_rows_are_given_as_many(path: Path, size: int) -> None:
    """Of five images some are then drawn alone, or the last is repeated; the result is that of all at once."""
    x = np.random.default_rng(0).normal(size=(5, 3, 2, 2)).astype(np.float32)
    context = {"encoder_hidden_states": np.full((5, 4, 3), 0.5, np.float32)}
    for each in ([], [1], [size]):
        nodes = [
            h.make_node("ReduceMax", ["timestep"], ["t"], keepdims=0),
            h.make_node("ReduceMean", ["encoder_hidden_states"], ["m"], keepdims=0),
            h.make_node("Mul", ["sample", "t"], ["y"]),
            h.make_node("Add", ["y", "m"], ["out_sample"]),
        ]
        inputs = [value("sample", [size, 3, 2, 2]), value("timestep", each)]
        inputs += [value("encoder_hidden_states", [size, 4, 3])]
        save(path / "unet" / "model.onnx", nodes, inputs, [value("out_sample", [size, 3, 2, 2])])
        b = OnnxBackend(Source(path), "cpu")
        np.testing.assert_array_equal(b.denoise(x, 3.0, context), x * 3 + np.float32(0.5))
        with pytest.raises(ModelError, match=r"takes sample of \d x 3 x 2 x 2 alone, .*; give -W 2 -H 2, or export"):
            b.denoise(np.zeros((5, 3, 4, 4), np.float32), 3.0, context)
        with pytest.raises(ModelError, match=r"encoder_hidden_states of \d x 4 x 3 alone.*; shorten the prompt"):
            b.denoise(x, 3.0, {"encoder_hidden_states": np.zeros((5, 8, 3), np.float32)})


def test_a_level_between_two_whole_ones_is_rounded(path: Path) -> None:
    denoiser(path / "unet" / "model.onnx", [], T.INT64)
    y = OnnxBackend(Source(path), "cpu").denoise(X, float(np.nextafter(np.float32(3), np.float32(2))), CONTEXT)
    np.testing.assert_array_equal(y, X * 3 + 0.5)


def test_what_the_text_encoders_do_not_give_is_named(path: Path) -> None:
    with pytest.raises(ModelError, match="needs encoder_hidden_states, which the text encoders do not give"):
        OnnxBackend(Source(path), "cpu").denoise(X, 3.0, {})


# ---- much out of little --------------------------------------------------------------------------------------------


def ints(name: str, *values: int) -> onnx.TensorProto:
    return h.make_tensor(name, T.INT64, [len(values)], values)


def level(name: str, number: int) -> onnx.TensorProto:
    return h.make_tensor(name, T.INT64, [], [number])


ONE = h.make_tensor("one", T.FLOAT, [1], [1.0])


def node(operator: str, *inputs: str, to: str = "c", **attributes: Any) -> onnx.NodeProto:
    return h.make_node(operator, inputs, [to], **attributes)


LARGE = 2**31
SPARSE = h.make_sparse_tensor(ONE, ints("i", 0), [LARGE])
UNFOLDING: dict[str, tuple[list[onnx.NodeProto], list[onnx.TensorProto]]] = {
    "ConstantOfShape": ([node("ConstantOfShape", "s")], [ints("s", 2**16, 2**15)]),
    "many of them": ([node("ConstantOfShape", "s", to=f"c{i}") for i in range(40)], [ints("s", 2**23)]),
    "typed shape": (
        [node("ConstantOfShape", "s")],
        [onnx.TensorProto(name="s", data_type=T.INT64, dims=[1], int64_data=[LARGE])],
    ),
    "Expand": ([node("Expand", "one", "s")], [ONE, ints("s", LARGE)]),
    "stored raw": (
        [node("Expand", "one", "s")],
        [ONE, h.make_tensor("s", T.INT64, [1], LARGE.to_bytes(8, "little"), raw=True)],
    ),
    "Tile": ([node("Tile", "one", "s")], [ONE, ints("s", LARGE)]),
    "Range": ([node("Range", "a", "b", "d")], [level("a", 5), level("b", -LARGE), level("d", -1)]),
    "OneHot": ([node("OneHot", "one", "d", "v")], [ONE, level("d", LARGE), ints("v", 0, 1)]),
    "Pad": ([node("Pad", "one", "p")], [ONE, ints("p", 0, LARGE)]),
    "Resize": ([node("Resize", "x", "", "f")], [h.make_tensor("f", T.FLOAT, [4], [1, 1, 2**16, 2**15])]),
    "RandomNormal": ([node("RandomNormal", shape=[LARGE])], []),
    "computed": (
        [node("Constant", to="a", value=ints("", 2**16)), node("Constant", to="b", value_ints=[2**15])]
        + [node("Mul", "a", "b", to="m"), node("Unsqueeze", "m", to="u"), node("Concat", "u", "b", to="s")]
        + [node("Cast", "s", to="t"), node("ConstantOfShape", "t")],
        [],
    ),
    "sparse": ([node("Constant", sparse_value=SPARSE)], []),
    "in a branch": (
        [node("If", "x", then_branch=h.make_graph([node("Expand", "one", "s")], "g", [], [], [ONE, ints("s", LARGE)]))],
        [],
    ),
}


@pytest.mark.parametrize(("nodes", "tensors"), UNFOLDING.values(), ids=UNFOLDING)
def test_constants_that_unfold_are_refused_unopened(unopened: Path, nodes: list, tensors: list) -> None:
    doubled(unopened, "latent_sample", "sample", tuple(tensors), tuple(nodes))
    assert "unfold to" in check(unopened)


@pytest.mark.parametrize("operator", ["Loop", "Scan", "SequenceMap"])
def test_loops_are_refused_unopened(unopened: Path, operator: str) -> None:
    inner = h.make_graph([node(operator, "x", body=h.make_graph([], "body", [], []))], "g", [], [])
    doubled(unopened, "latent_sample", "sample", nodes=(node("If", "x", then_branch=inner),))
    assert f"runs a loop ({operator})" in check(unopened)


@pytest.mark.parametrize("end", ["Neg", "f0"])
def test_functions_of_functions_are_refused_unopened(unopened: Path, end: str) -> None:
    """Thirty functions, each of which calls the next one twice, are a thousand million nodes; the last may call the first."""

    def call(name: str) -> onnx.NodeProto:
        return h.make_node(name, ["x"], ["y"], domain="" if name == "Neg" else "d")

    sets = [h.make_opsetid("", 17), h.make_opsetid("d", 1)]
    names = [f"f{i}" for i in range(30)]
    functions = [
        h.make_function("d", name, ["x"], ["y"], [call(below)] * 2, sets)
        for name, below in zip(names, [*names[1:], end], strict=True)
    ]
    model = h.make_model(h.make_graph([call("f0")], "g", [], []), functions=functions, opset_imports=sets)
    unopened.write_bytes(model.SerializeToString())
    assert "nodes with those of its functions" in check(unopened)


def test_ordinary_shapes_are_not_much(path: Path) -> None:
    """Those of the shipped models, of slices to the end, and of an image."""
    end = node("Slice", "latent_sample", "zero", "end", "axis", to="z")
    tensors = (ints("zero", 0), ints("end", 2**63 - 1), ints("axis", 3), ints("some", 1, 3, 64, 64), ONE)
    doubled(
        path / "vae_decoder" / "model.onnx", "latent_sample", "sample", tensors, (end, node("Expand", "one", "some"))
    )
    for model in (path, ROOT / "weights" / "emoji", ROOT / "weights" / "shapes"):
        for each in model.glob("*/model.onnx"):
            graph.check(each)


def test_a_graph_gets_the_memory_that_there_is(path: Path, tmp_path: Path) -> None:
    """What it asks for depends on what it is given, which no look at the file tells."""
    nodes = [node("Shape", "latent_sample", to="s"), node("Mul", "s", "many", to="m"), node("ConstantOfShape", "m")]
    nodes += [node("ReduceSum", "c", to="r", keepdims=0), node("Add", "latent_sample", "r", to="sample")]
    shapes = value("latent_sample", PIXELS), value("sample", PIXELS)
    save(path / "vae_decoder" / "model.onnx", nodes, [shapes[0]], [shapes[1]], (ints("many", 2**7, 2**7, 2**7, 2**7),))
    code = (
        "import sys; import numpy as np; from pathlib import Path; from tinydiff.backends import onnx, sessions\n"
        "from tinydiff.checkpoints.source import Source; sessions.available = lambda: 2**28\n"
        "b = onnx.OnnxBackend(Source(Path(sys.argv[1])), 'cpu')\n"
        "try: b.decode(np.ones((1, 3, 2, 2), np.float32))\nexcept Exception as error: print(error.code, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=ENV, timeout=60)
    assert done.stdout.startswith("7 ") and "not enough memory" in done.stdout and not done.stderr


def test_the_machine_says_what_memory_there_is() -> None:
    assert 2**20 < sessions.available() < 2**50
