"""Buffers on a device: the same results as plain calls, and copies of what changed alone. The CPU stands for the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from interpreters import ROOT

from tinydiff.backends import binding, devices
from tinydiff.backends.binding import PLAIN, Bound, Buffers
from tinydiff.backends.onnx import OnnxBackend
from tinydiff.checkpoints.source import Source

MODEL = ROOT / "weights" / "emoji"
RNG = np.random.default_rng(0)
KEPT = ("encoder_hidden_states",)


def feed(rows: int, side: int = 4) -> dict[str, np.ndarray]:
    shapes = {"sample": (rows, 16, side, side), "timestep": (), "encoder_hidden_states": (rows, 32, 256)}
    return {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    return ort.InferenceSession(MODEL / "unet" / "model.onnx", providers=["CPUExecutionProvider"])


def plain(session: ort.InferenceSession, given: dict[str, np.ndarray]) -> np.ndarray:
    result: Any = session.run(["out_sample"], given)
    return result[0]


def shapes(given: dict[str, np.ndarray]) -> binding.Shapes:
    return {"out_sample": (given["sample"].shape, np.float32)}


def test_calls_of_many_shapes_are_those_without_buffers(session):
    buffers = Buffers(session, "cpu", KEPT, graphs=True)
    results = []
    for rows, side in [(1, 4), (2, 4), (1, 4), (1, 8), (2, 4)]:
        given = feed(rows, side)
        results.append((buffers(given, shapes(given))["out_sample"], plain(session, given)))
    for ours, theirs in results:  # at the end: a result is no view of a buffer
        np.testing.assert_array_equal(ours, theirs)
    assert len(buffers.bound) == 3


class Counted:
    """An OrtValue that counts what is copied to it."""

    def __init__(self, value: ort.OrtValue):
        self.value, self.copies = value, 0

    def update_inplace(self, array: np.ndarray) -> None:
        self.copies += 1
        self.value.update_inplace(array)


def test_a_condition_is_copied_once_a_prompt_and_addresses_stay(session):
    given = feed(2)
    bound = Bound(session, "cpu", given, shapes(given), KEPT)
    places = [value.data_ptr() for value in (*bound.inputs.values(), *bound.outputs.values())]
    bound.inputs = {name: Counted(value) for name, value in bound.inputs.items()}
    for prompt in range(2):
        given = given | {KEPT[0]: feed(2)[KEPT[0]]}
        for step in range(3):
            given = given | {"sample": given["sample"] + 1, "timestep": np.array(step, np.float32)}
            np.testing.assert_array_equal(bound(given)["out_sample"], plain(session, given))
        assert {name: value.copies for name, value in bound.inputs.items()} == {
            "sample": 3 * prompt + 3, "timestep": 3 * prompt + 3, KEPT[0]: prompt + 1,
        }  # fmt: skip
    values = [*(value.value for value in bound.inputs.values()), *bound.outputs.values()]
    assert [value.data_ptr() for value in values] == places


def test_a_changed_latent_in_the_same_array_is_copied(session):
    given = feed(1)
    bound = Bound(session, "cpu", given, shapes(given), KEPT)
    bound(given)
    given["sample"] *= 2
    np.testing.assert_array_equal(bound(given)["out_sample"], plain(session, given))


class Recorder:
    """A session as CUDA's is seen from outside: it hears which graph each call is, and cannot record some."""

    def __init__(self, refuses: tuple[int, ...] = ()):
        self.refuses, self.graphs = refuses, list[int]()

    def io_binding(self) -> Any:
        return SimpleNamespace(bind_ortvalue_input=lambda *_: None, bind_ortvalue_output=lambda *_: None)

    def run_with_iobinding(self, _: Any, options: ort.RunOptions) -> None:
        self.graphs.append(int(options.get_run_config_entry("gpu_graph_id")))
        if self.graphs[-1] in self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")


def test_each_shape_is_recorded_at_its_second_call():
    session, one, two = Recorder(), feed(1), feed(2)
    buffers = Buffers(session, "cpu", KEPT, graphs=True)  # type: ignore[arg-type]
    for given in (one, two, one, one, two):
        buffers(given, shapes(given))
    assert session.graphs == [PLAIN, PLAIN, 1, 1, 2]
    without = Buffers(session, "cpu", KEPT)  # type: ignore[arg-type]
    without(one, shapes(one)), without(one, shapes(one))
    assert session.graphs[5:] == [PLAIN] * 2


def test_what_cannot_be_recorded_runs_plainly():
    session, given = Recorder(refuses=(1,)), feed(1)
    buffers = Buffers(session, "cpu", KEPT, graphs=True)  # type: ignore[arg-type]
    for _ in range(3):
        buffers(given, shapes(given))
    assert session.graphs == [PLAIN, 1, PLAIN, PLAIN]
    with pytest.raises(RuntimeError):
        Buffers(Recorder(refuses=(PLAIN,)), "cpu", graphs=True)(given, shapes(given))  # type: ignore[arg-type]


def test_buffers_of_few_shapes_are_kept(session, monkeypatch):
    monkeypatch.setattr(binding, "MOST", 2)
    buffers = Buffers(session, "cpu")
    for rows in (1, 2, 1, 3):
        given = feed(rows)
        buffers(given, shapes(given))
    assert [dict(key)["sample"][0] for key in buffers.bound] == [1, 3]


def test_a_backend_on_cuda_calls_through_buffers(monkeypatch):
    """All but the device itself: its sessions are the CPU's."""
    backend = OnnxBackend(Source(MODEL), "cpu")
    given = feed(2)
    told = {KEPT[0]: given[KEPT[0]]}
    calls = [lambda: backend.denoise(given["sample"], 3.0, told), lambda: backend.decode(given["sample"])]
    calls += [lambda: backend.encode_text({"text_encoder": np.ones((2, 32), np.int64)})[KEPT[0]]]
    expected = [call() for call in calls]
    backend.device = "cuda"
    monkeypatch.setattr("tinydiff.backends.onnx.Buffers", lambda session, device, *rest: Buffers(session, "cpu", *rest))
    for _ in range(2):
        for call, wanted in zip(calls, expected, strict=True):
            np.testing.assert_array_equal(call(), wanted)
    assert backend.buffers.keys() == {"unet", "vae_decoder", "text_encoder"}


@pytest.mark.gpu
def test_cuda_graphs_draw_what_plain_calls_draw():
    if problem := devices.cuda_problem():
        pytest.skip(problem)
    on_gpu, on_cpu = OnnxBackend(Source(MODEL), "cuda"), OnnxBackend(Source(MODEL), "cpu")
    for rows in (2, 1, 2):
        given = feed(rows)
        told = {KEPT[0]: given[KEPT[0]]}
        for step in range(4):
            args = given["sample"] + step, float(step), told
            np.testing.assert_allclose(on_gpu.denoise(*args), on_cpu.denoise(*args), atol=1e-3)
    recorded = on_gpu.buffers["unet"]
    assert devices.is_recorded(recorded.session) and {bound.graph for bound in recorded.bound.values()} == {1, 2}
