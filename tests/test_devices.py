"""Devices by name: what --device takes on every command, plugin providers, and graphs that only some devices run."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import typer
from interpreters import ROOT
from onnx import helper as h
from typer.testing import CliRunner

from tinydiff import cli, flags
from tinydiff.backends import devices, graph, open_backend, sessions
from tinydiff.backends.onnx import OnnxBackend
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError, ResourceError, UsageError, UserError

MODEL = ROOT / "weights" / "emoji"
REST = {"generate": ["x"], "evaluate": ["--data", "shapes"], "export": ["-o", "out"]}
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
WITH_DEVICE = [name for name, command in COMMANDS.items() if any("--device" in p.opts for p in command.params)]


def code(*words: str) -> tuple[int, str]:
    """The exit code and the message of a command that is refused."""
    error = CliRunner().invoke(cli.app, words, standalone_mode=False).exception
    assert isinstance(error, UserError), error
    assert "\n" not in str(error)
    return error.code, str(error)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "CUDA", "cuda:0", "", "open vino", "../x", "tpu", "a.b", "os", "-"])
@pytest.mark.parametrize("command", WITH_DEVICE)
def test_an_unknown_device_is_refused_by_every_command(command: str, name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exit_code, message = code(command, *REST[command], f"--device={name}")
    assert exit_code == 2 and "--device" in message and list(tmp_path.iterdir()) == []


def test_training_refuses_it_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exit_code, message = code("train", "--set", "train.device=gpu")
    assert exit_code == 2 and "train.device" in message and list(tmp_path.iterdir()) == []


def test_all_commands_that_take_a_device_are_asked():
    assert {"generate", "evaluate"} <= set(WITH_DEVICE) <= REST.keys()


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_plugin_that_is_not_installed_says_what_to_install(command: str, tmp_path, monkeypatch):
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    for name in flags.PLUGINS:
        exit_code, message = code(command, *REST[command], f"--device={name}")
        assert exit_code == 7 and message.endswith(f"pip install onnxruntime-ep-{name}")


def test_onnxruntime_tells_nobody_and_keeps_no_identifier(tmp_path):
    """It prints a warning where it cannot keep one."""
    (tmp_path / "file").touch()
    code = (
        "from tinydiff.backends import devices; devices.ort.InferenceSession(devices.IDENTITY, providers=[devices.CPU])"
    )
    for cache in (tmp_path, tmp_path / "file"):
        told = {"XDG_CACHE_HOME": str(cache), "HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True)
        assert ended.stdout + ended.stderr == "" and [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- plugins -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An installed plugin package whose provider is the CPU's own, which onnxruntime lists with a device like any other's."""
    module = ModuleType("onnxruntime_ep_mirror")
    module.get_library_path = lambda: "mirror.so"  # type: ignore[attr-defined]
    module.get_ep_names = lambda: [devices.CPU]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda name, path: None)
    devices.plugin.cache_clear()
    yield module
    devices.plugin.cache_clear()


def test_a_plugin_draws_through_the_plugin_interface(mirror, monkeypatch, capfd):
    asked: list[str] = []
    monkeypatch.setattr(
        sessions, "use_plugin", lambda options, name: (asked.append(name), devices.use_plugin(options, name))
    )
    backend, plain = (OnnxBackend(Source(MODEL), name) for name in ("mirror", "cpu"))
    z = np.random.default_rng(0).standard_normal((2, 16, 2, 2)).astype(np.float32)
    np.testing.assert_allclose(backend.decode(z), plain.decode(z), atol=1e-5)
    assert backend.device == "mirror" and asked == ["mirror"] * 3 and capfd.readouterr() == ("", "")


def refusal(name: str) -> str:
    with pytest.raises(ResourceError) as caught:
        OnnxBackend(Source(MODEL), name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_keeps_a_plugin_from_working_is_one_line(mirror, monkeypatch):
    assert refusal("nowhere").endswith("not installed; pip install onnxruntime-ep-nowhere")
    mirror.get_ep_names = lambda: ["AnotherProvider"]
    assert "sees no device here" in refusal("mirror")

    def broken() -> str:
        raise FileNotFoundError("mirror.so:\nnot found")

    mirror.get_library_path = broken
    assert "cannot be loaded" in refusal("mirror")
    monkeypatch.delattr(ort, "register_execution_provider_library")
    assert "onnxruntime" in refusal("mirror")


def shared(**counts: int) -> SimpleNamespace:
    """A session of which each provider has so many operators."""
    parts = [
        SimpleNamespace(ep_name=name, get_nodes=lambda count=count: [None] * count) for name, count in counts.items()
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)


def test_operators_left_to_the_cpu_are_counted_in_one_note(mirror, capsys):
    say = devices.say_share
    say("mirror", [shared(CPUExecutionProvider=5), shared(CPUExecutionProvider=7)])
    assert capsys.readouterr().err == ""
    say("mirror", [shared(CPUExecutionProvider=5, Other=2), shared(CPUExecutionProvider=7, Third=1)])
    assert capsys.readouterr().err == "note: mirror leaves 3 of 15 operators to the CPU\n"
    with pytest.raises(ResourceError, match="takes none of the 2 operators; use --device cpu"):
        say("mirror", [shared(Other=2)])


def test_an_accelerator_is_taken_before_the_cpu(mirror, monkeypatch):
    kinds = ort.OrtHardwareDeviceType
    offered = [SimpleNamespace(ep_name=devices.CPU, device=SimpleNamespace(type=k)) for k in (kinds.CPU, kinds.GPU)]
    monkeypatch.setattr(ort, "get_ep_devices", lambda: offered)
    assert devices.plugin("mirror") is offered[1]


def test_torch_has_no_plugins(tiny_model):
    with pytest.raises(UsageError, match="--device openvino: an onnxruntime plugin, and this runs on torch"):
        open_backend(Source(tiny_model), "auto", "openvino")


@pytest.mark.openvino
def test_openvino_agrees_with_the_cpu():
    if not find_spec("onnxruntime_ep_openvino"):
        pytest.skip("pip install onnxruntime-ep-openvino")
    try:
        devices.plugin("openvino")
    except ResourceError as error:
        pytest.skip(str(error))  # it takes Intel's processors alone
    backend, plain = (OnnxBackend(Source(MODEL), name) for name in ("openvino", "cpu"))
    x = np.random.default_rng(0).standard_normal((2, 16, 8, 8)).astype(np.float32)
    told = {"encoder_hidden_states": np.ones((2, 32, 256), np.float32)}
    np.testing.assert_allclose(backend.denoise(x, 500.0, told), plain.denoise(x, 500.0, told), atol=1e-3)
    np.testing.assert_allclose(backend.decode(x), plain.decode(x), atol=1e-3)


# ---- graphs of other devices ---------------------------------------------------------------------------------------


def doubled(path: Path, **metadata: str) -> Path:
    """A graph of one operator, about which its exporter says something."""
    value = [h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    model = h.make_model(
        h.make_graph([h.make_node("Add", ["x", "x"], ["y"])], "g", value[:1], value[1:]),
        ir_version=8,
        opset_imports=[h.make_opsetid("", 17)],
    )
    h.set_model_props(model, {f"tinydiff.{key}": text for key, text in metadata.items()} | {"author": "nobody"})
    path.write_bytes(model.SerializeToString())
    return path


def test_metadata_is_what_onnxruntime_reads(tmp_path):
    path = doubled(tmp_path / "model.onnx", device="cuda", precision="bf16", more="ж" * 100)
    session = ort.InferenceSession(path, providers=[devices.CPU])
    assert graph.check(path) == session.get_modelmeta().custom_metadata_map and len(graph.check(path)) == 4


@pytest.mark.parametrize(
    ("metadata", "device", "says"),
    [
        ({"device": "cuda"}, "cpu", "exported for CUDA; export it again without --device cuda, or use --device cuda"),
        ({"device": "cuda"}, "openvino", "exported for CUDA"),
        ({"device": "cuda"}, "cuda", ""),
        ({"device": "any"}, "cpu", ""),
        ({"device": "cpu"}, "cpu", ""),
        ({"precision": "bf16"}, "cpu", "bf16 runs on CUDA; use an fp32 or fp16 bundle"),
        ({"precision": "bf16"}, "cuda", ""),
        ({"precision": "bf16", "device": "cpu"}, "cpu", ""),  # which computes in float32
        ({"precision": "fp16"}, "cpu", ""),
        ({}, "cpu", ""),
    ],
)
def test_a_graph_says_which_devices_run_it(tmp_path, metadata, device, says):
    path = doubled(tmp_path / "model.onnx", **metadata)
    if not says:
        sessions.check_device(path, graph.check(path), device)
        return
    with pytest.raises(ModelError, match=says):
        sessions.check_device(path, graph.check(path), device)


def test_int8_weights_are_dequantised_at_opening(tmp_path):
    """A session that does so writes a graph without the operator, and computes what the graph says."""
    t, rng = onnx.TensorProto, np.random.default_rng(0)
    weight = rng.integers(-127, 128, (64, 64)).astype(np.int8)
    tensors = [onnx.numpy_helper.from_array(weight, "q"), onnx.numpy_helper.from_array(np.float32(0.01), "scale")]
    nodes = [h.make_node("DequantizeLinear", ["q", "scale"], ["w"]), h.make_node("MatMul", ["x", "w"], ["y"])]
    values = [h.make_tensor_value_info(name, t.FLOAT, ["n", 64]) for name in ("x", "y")]
    model = h.make_model(
        h.make_graph(nodes, "g", values[:1], values[1:], tensors), ir_version=8, opset_imports=[h.make_opsetid("", 17)]
    )
    h.set_model_props(model, {"tinydiff.precision": "int8"})
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    (tmp_path / "saved").mkdir()
    level, x = sessions.Level.ORT_ENABLE_ALL, rng.standard_normal((3, 64)).astype(np.float32)
    session = sessions.created(path, level, graph.check(path), save=tmp_path / "saved")
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ (weight * np.float32(0.01)), atol=1e-4)
    kept = onnx.load(tmp_path / "saved" / "model.onnx", load_external_data=False)
    assert [node.op_type for node in kept.graph.node] == ["MatMul"]
