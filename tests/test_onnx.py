"""The onnxruntime backend on hand-made bundles: what it computes, and every graph that it refuses."""

from __future__ import annotations

import contextlib
import os
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
from interpreters import ROOT, without
from onnx import TensorProto as T
from onnx import helper as h
from protobuf import field

from tinydiff import config
from tinydiff.backends import graph
from tinydiff.backends import onnx as backend
from tinydiff.backends.onnx import OnnxBackend
from tinydiff.checkpoints import scheduler
from tinydiff.checkpoints.folder import write_json
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError, ResourceError
from tinydiff.text.tokenizer import Tokenizer

PIXELS = ["b", 2, "h", "w"]


def value(name: str, shape: list[Any], kind: int = T.FLOAT) -> onnx.ValueInfoProto:
    return h.make_tensor_value_info(name, kind, shape)


def save(path: Path, nodes: list, inputs: list, outputs: list, tensors: tuple = (), **more: Any) -> Path:
    graph = h.make_graph(nodes, "g", inputs, outputs, list(tensors), **more)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def doubled(
    path: Path, source: str, result: str, tensors: tuple = (), nodes: tuple = (), shape: Any = None, **more: Any
) -> Path:
    """A graph that doubles its input: an autoencoder's encoder, or its decoder, whose third channel is the first again."""
    given, taken = (3, [0, 1, 0, 1]) if source == "sample" else (2, [0, 1, 0])
    double = [
        h.make_node("Add", [source, source], ["twice"]),
        h.make_node("Gather", ["twice", "taken"], [result], axis=1),
    ]
    tensors = (*tensors, h.make_tensor("taken", T.INT64, [len(taken)], taken))
    sizes = shape or ["b", given, "h", "w"]
    drawn = value(result, [sizes[0], len(taken), *sizes[2:]])
    return save(path, [*nodes, *double], [value(source, sizes)], [drawn], tensors, **more)


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
    """A bundle: text (B, T) -> (B, T, 3) of the ids, denoiser as above, the autoencoder doubles."""
    cfg, bundle = config.load(), tmp_path / "bundle"
    for name in ("scheduler", "unet", "vae_decoder"):
        (bundle / name).mkdir(parents=True)
    write_json(bundle / "scheduler" / "scheduler_config.json", scheduler.write(cfg))
    sizes = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "cross_attention_dim": 3}
    write_json(bundle / "unet" / "config.json", {"block_out_channels": [1, 1], **sizes})
    write_json(bundle / "vae_decoder" / "config.json", {"block_out_channels": [1], "latent_channels": 2})
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
    doubled(bundle / "vae_encoder" / "model.onnx", "sample", "latent_parameters")
    doubled(bundle / "vae_decoder" / "model.onnx", "latent_sample", "sample")
    return bundle


X = np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2)


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
    pixels = X[:, [0, 1, 1]]
    np.testing.assert_array_equal(b.encode_image(pixels), pixels[:, [0, 1, 0, 1]] * 2)
    np.testing.assert_array_equal(b.decode(X[..., ::-1]), X[:, [0, 1, 0], :, ::-1] * 2)  # a view that is not contiguous
    assert (b.name, b.device, b.description.latent_channels) == ("onnx", "cpu", 2)


@pytest.mark.parametrize("shape", [["steps"], [1], ["b"]])
@pytest.mark.parametrize("kind", [T.INT64, T.DOUBLE, T.FLOAT16])
def test_timesteps_of_other_exporters(path: Path, shape: list[Any], kind: int) -> None:
    denoiser(path / "unet" / "model.onnx", shape, kind)
    np.testing.assert_array_equal(OnnxBackend(Source(path), "cpu").denoise(X, 3.0, CONTEXT), X * 3 + 0.5)


def test_float16_outputs_come_as_float32(path: Path) -> None:
    cast = h.make_node("Cast", ["latent_sample"], ["half"], to=T.FLOAT16)
    nodes = [cast, h.make_node("Gather", ["half", "taken"], ["sample"], axis=1)]
    source, result = value("latent_sample", PIXELS), value("sample", ["b", 3, "h", "w"], T.FLOAT16)
    taken = h.make_tensor("taken", T.INT64, [3], [0, 1, 0])
    save(path / "vae_decoder" / "model.onnx", nodes, [source], [result], (taken,))
    y = OnnxBackend(Source(path), "cpu").decode(X)
    assert y.dtype == np.float32 and np.array_equal(y, X[:, [0, 1, 0]])


def test_image_encoder_is_opened_when_needed(path: Path) -> None:
    (path / "vae_encoder" / "model.onnx").unlink()
    b = OnnxBackend(Source(path), "cpu")
    with pytest.raises(ModelError, match=r"vae_encoder/model.onnx: No such file or directory; check the path, or copy"):
        b.encode_image(X)


def test_shapes_that_do_not_fit_are_one_line(path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        OnnxBackend(Source(path), "cpu").denoise(np.zeros((1, 5, 2, 2), np.float32), 1.0, CONTEXT)
    assert "\n" not in str(caught.value) and "takes sample of" in str(caught.value)


def test_out_of_memory_is_not_damage() -> None:
    error = backend.failure("x", RuntimeError("[ONNXRuntimeError] : 6 : FAIL : Failed to allocate\nmemory"))
    assert isinstance(error, ResourceError) and "[ONNX" not in str(error) and "\n" not in str(error)


def test_torch_is_never_imported(path: Path) -> None:
    code = (
        "import numpy as np; from pathlib import Path; from tinydiff.backends import open_backend\n"
        "from tinydiff.checkpoints.source import Source\n"
        "b = open_backend(Source(Path(sys.argv[1])))\n"
        "print(b.name, b.decode(np.ones((1, 2, 1, 1), np.float32)).sum())"
    )
    command = [sys.executable, "-c", without(code, "torch", "onnx"), path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("onnx 6.0\n", "", 0)


# ---- devices -------------------------------------------------------------------------------------------------------


def test_device_without_cuda(path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(backend, "cuda_problem", lambda: "no GPU; buy one")
    assert OnnxBackend(Source(path), "auto").device == OnnxBackend(Source(path), "cpu").device == "cpu"
    assert refusal(path, ResourceError, "cuda") == "--device cuda: no GPU; buy one; or use --device cpu"
    assert capfd.readouterr() == ("", "")


def test_this_machine_is_asked_silently(capfd: pytest.CaptureFixture[str]) -> None:
    assert (backend.cuda_problem() == "") == (backend.choose_device("auto") == "cuda")
    assert capfd.readouterr() == ("", "")


def test_identity_graph_is_the_identity() -> None:
    session = ort.InferenceSession(backend.IDENTITY, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([3], np.float32)})[0] == [3]


def test_fall_back_to_the_cpu_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, pool = ort.InferenceSession, ThreadPoolExecutor(4)

    def on_cpu(model: Path, options: ort.SessionOptions, providers: list, **more: Any) -> ort.InferenceSession:
        assert providers[0][0] == backend.CUDA
        return opened(model, options, [backend.CPU], **more)

    monkeypatch.setattr(backend, "cuda_problem", lambda: "")
    monkeypatch.setattr(ort, "InferenceSession", on_cpu)
    monkeypatch.setattr(backend, "ThreadPoolExecutor", lambda count: pool)
    assert "onnxruntime would run it on the CPU; use --device cpu" in refusal(path, ResourceError, "cuda")
    pool.shutdown()  # while sessions are what they are here


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(path: Path) -> None:
    if problem := backend.cuda_problem():
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


# ---- graphs of another shape -----------------------------------------------------------------------------------------


def decoder(path: Path, source: list[Any], result: list[Any], nodes: list, kind: int = T.FLOAT, *tensors: Any) -> None:
    save(
        path / "vae_decoder" / "model.onnx",
        nodes,
        [value("latent_sample", source)],
        [value("sample", result, kind)],
        tensors,
    )


def node(operator: str, *inputs: str, result: str = "sample", **attributes: Any) -> Any:
    return h.make_node(operator, ["latent_sample", *inputs], [result], **attributes)


FREE = ["b", "c", "h", "w"]
REFUSED: dict[str, Callable[[Path], Any]] = {
    "latents of another rank": lambda path: decoder(path, ["b", 2, "n"], FREE, [node("Identity")]),
    "latents of other channels": lambda path: decoder(path, ["b", 4, "h", "w"], FREE, [node("Identity")]),
    "images of another rank": lambda path: decoder(path, PIXELS, FREE[:3], [node("ReduceMean", axes=[3], keepdims=0)]),
    "images of other channels": lambda path: decoder(path, PIXELS, FREE, [node("Identity")]),
    "images of one channel": lambda path: decoder(path, PIXELS, FREE, [node("ReduceMean", axes=[1])]),
    "images of whole numbers": lambda path: decoder(path, PIXELS, FREE, [node("Cast", to=T.INT64)], T.INT64),
    "the encoder's graph": lambda path: (path / "vae_decoder" / "model.onnx").write_bytes(
        (path / "vae_encoder" / "model.onnx").read_bytes()
    ),
}
SHAPES: dict[str, list] = {  # of three channels, whose sizes no declaration says
    "twice its rows": [h.make_node("Concat", ["rgb", "rgb"], ["sample"], axis=0)],
    "twice its height": [h.make_node("Concat", ["rgb", "rgb"], ["sample"], axis=2)],
    "a part of its width": [h.make_node("Slice", ["rgb", "one", "end", "axis"], ["sample"])],
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_graphs_of_another_shape_are_refused_unrun(path: Path, change: Callable[[Path], Any]) -> None:
    change(path)
    said = refusal(path)
    assert "vae_decoder" in said and "export it with tinydiff or optimum" in said and len(said) < 400


@pytest.mark.parametrize("nodes", SHAPES.values(), ids=SHAPES)
def test_what_a_graph_gives_is_compared_with_what_is_asked(path: Path, nodes: list) -> None:
    numbers = {"taken": [0, 1, 0], "one": [1], "end": [2**62], "axis": [3]}
    tensors = [h.make_tensor(name, T.INT64, [len(each)], each) for name, each in numbers.items()]
    rgb = h.make_node("Gather", ["latent_sample", "taken"], ["rgb"], axis=1)
    decoder(path, PIXELS, ["b2", 3, "h2", "w2"], [rgb, *nodes], T.FLOAT, *tensors)
    with pytest.raises(ModelError, match=r"gives sample of .* where \[2, 3, 2, 2\] is asked for"):
        OnnxBackend(Source(path), "cpu").decode(X)


@pytest.mark.parametrize("fixed", [["b", 2, 4, "w"], [1, 2, "h", "w"], [2, 2, 2, 4]])
def test_fixed_sizes_are_named(path: Path, fixed: list[Any]) -> None:
    doubled(path / "vae_decoder" / "model.onnx", "latent_sample", "sample", shape=fixed)
    b = OnnxBackend(Source(path), "cpu")
    with pytest.raises(ModelError, match=r"takes latent_sample of \[.*\] alone \(here \(2, 2, 2, 2\)\)"):
        b.decode(X)
    sizes = [n if isinstance(n, int) else 2 for n in fixed]
    assert b.decode(np.ones(sizes, np.float32)).shape == (sizes[0], 3, *sizes[2:])


def constant(name: str, *numbers: int, shape: list[int] | None = None) -> onnx.TensorProto:
    return h.make_tensor(name, T.INT64, [len(numbers)] if shape is None else shape, numbers)


def raw(name: str, *numbers: int) -> onnx.TensorProto:
    return h.make_tensor(name, T.INT64, [len(numbers)], np.array(numbers, np.int64).tobytes(), raw=True)


def looped() -> Any:
    """A body for a loop that copies the latents."""
    kinds = [value("i", [], T.INT64), value("go", [], T.BOOL), value("x", FREE)]
    copies = [h.make_node("Identity", [a], [b]) for a, b in (("go", "go_on"), ("x", "y"))]
    return h.make_graph(copies, "body", kinds, [value("go_on", [], T.BOOL), value("y", FREE)])


def shape_of(*numbers: int) -> Any:
    return h.make_node("Constant", [], ["much"], value=constant("much", *numbers))


ENDLESS: dict[str, dict[str, Any]] = {
    "a constant of a shape": {
        "nodes": (h.make_node("ConstantOfShape", ["much"], ["z"]),),
        "tensors": (constant("much", 2**31),),
    },
    "an expansion": {"nodes": (node("Expand", "much", result="z"),), "tensors": (raw("much", 2**15, 1, 2**16, 1),)},
    "a constant node": {"nodes": (shape_of(2**20, 1, 2**10), node("Tile", "much", result="z"))},
    "a list of numbers": {
        "nodes": (
            h.make_node("Constant", [], ["much"], value_ints=[2**40]),
            h.make_node("ConstantOfShape", ["much"], ["z"]),
        )
    },
    "a range": {
        "nodes": (h.make_node("Range", ["zero", "much", "one"], ["z"]),),
        "tensors": (constant("zero", 0, shape=[]), constant("one", 1, shape=[]), constant("much", 2**50, shape=[])),
    },
    "a loop": {
        "nodes": (h.make_node("Loop", ["n", "", "latent_sample"], ["z"], body=looped()),),
        "tensors": (constant("n", 2**60),),
    },
}


@pytest.mark.parametrize("more", ENDLESS.values(), ids=ENDLESS)
def test_graphs_without_end_are_refused_unseen(unopened: Path, more: dict[str, Any]) -> None:
    doubled(unopened, "latent_sample", "sample", **more)
    assert "unfolds to more than" in (said := check(unopened)) or "has a loop (Loop)" in said


def test_ordinary_shapes_are_no_endless_work(path: Path) -> None:
    """Those of the shipped models too, and of slices to the end."""
    end = h.make_node("Slice", ["latent_sample", "zero", "end", "axis"], ["z"])
    tensors = (constant("zero", 0), constant("end", 2**63 - 1), constant("axis", 3), constant("some", 1, 3, 64, 64))
    grown = h.make_node("Expand", ["one", "some"], ["e"])
    nodes = (end, grown, h.make_node("Constant", [], ["one"], value_float=1.0))
    doubled(path / "vae_decoder" / "model.onnx", "latent_sample", "sample", tensors, nodes)
    for model in (path, ROOT / "weights" / "emoji", ROOT / "weights" / "shapes"):
        for each in model.glob("*/model.onnx"):
            graph.check(each)


# ---- external data -------------------------------------------------------------------------------------------------


def external(location: str, offset: Any = 0, length: Any = 8, **more: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=T.FLOAT, dims=[2], data_location=T.EXTERNAL)
    for key, entry in {"location": location, "offset": offset, "length": length, **more}.items():
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def test_external_data_beside_the_graph(path: Path) -> None:
    (path / "vae_decoder" / "w.bin").write_bytes(b"junk" + np.array([1, 2], np.float32).tobytes())
    add = h.make_node("Add", ["latent_sample", "w"], ["sum"])
    nodes = [add, h.make_node("Gather", ["sum", "taken"], ["sample"], axis=1)]
    tensors = (external("w.bin", 4), h.make_tensor("taken", T.INT64, [3], [0, 1, 0]))
    save(
        path / "vae_decoder" / "model.onnx",
        nodes,
        [value("latent_sample", PIXELS)],
        [value("sample", ["b", 3, "h", "w"])],
        tensors,
    )
    wanted = (X + np.array([1, 2], np.float32))[:, [0, 1, 0]]
    np.testing.assert_array_equal(OnnxBackend(Source(path), "cpu").decode(X), wanted)


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
    found = [(t["location"], int(t["offset"])) for t in graph.external_tensors(data)]
    assert sorted(found) == sorted(entries)


@given(st.binary(max_size=60), st.integers(0, 400))
def test_any_bytes_end_in_an_answer(junk: bytes, at: int) -> None:
    data = h.make_model(h.make_graph([], "g", [], [], [external("w.bin")])).SerializeToString()
    for damaged in (junk, data[:at] + junk + data[at:], data[:at] + junk + data[at + len(junk) :]):
        with contextlib.suppress(ValueError, IndexError):
            assert all(isinstance(t, dict) for t in graph.external_tensors(damaged))


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
    assert "its configuration files lack or misstate" in refusal(path)


@pytest.mark.parametrize("classes", ["many", [1000]])
def test_a_number_of_classes_that_is_none_is_one_line(path: Path, classes: Any) -> None:
    (path / "unet").rename(path / "transformer")
    table = {"num_embeds_ada_norm": classes, "sample_size": 8, "in_channels": 2, "patch_size": 2}
    write_json(path / "transformer" / "config.json", table)
    assert "make no sense" in (said := refusal(path)) or "lack or misstate" in said


def test_an_entry_of_another_wire_type_does_not_hide_the_location() -> None:
    """onnxruntime skips such a field, so the check has to."""
    entry = onnx.StringStringEntryProto(key="location", value="../secret").SerializeToString() + b"\x15w.bi"
    tensor = (
        external("").SerializeToString().replace(b"\x6a\x0c\x0a\x08location\x12\x00", b"\x6a%c" % len(entry) + entry)
    )
    inside = b"\x2a%c" % len(tensor) + tensor
    assert next(graph.external_tensors(b"\x3a%c" % len(inside) + inside))["location"] == "../secret"
