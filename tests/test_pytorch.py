"""The torch backend in each precision, against diffusers and float32, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreters import run_without
from typer.testing import CliRunner

from tinydiff import cli
from tinydiff.backends import find_model, open_backend, pytorch, replayed
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints import convert
from tinydiff.checkpoints.folder import PRECISIONS
from tinydiff.checkpoints.source import Source
from tinydiff.errors import UsageError
from tinydiff.pipeline import Backend, Request, generate

HALVES = {"fp16": 2e-3, "bf16": 2e-2}  # the largest difference from float32, in deviations of a network's output
REQUEST = Request(20, 3.0, "dpmpp_2m", "trailing", 16, 16)
halves = pytest.mark.parametrize("precision", HALVES)


def given(backend: Backend, channels: int = 4) -> dict[str, Callable[[Backend], np.ndarray]]:
    """Calls of every network on the same inputs, by name."""
    rng = np.random.default_rng(0)
    x, pixels = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, channels, 8, 8), (2, 3, 16, 16)))
    name = next(iter(backend.tokenizers))
    ids = {name: backend.tokenizers[name].encode(["a red square", "a blue circle"])}
    told = backend.encode_text(ids)
    return {
        "text": lambda b: b.encode_text(ids)["encoder_hidden_states"],
        "denoiser": lambda b: b.denoise(x, 513.0, told),
        "encoder": lambda b: b.encode_image(pixels),
        "decoder": lambda b: b.decode(x),
    }


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, in deviations."""
    return float(np.abs(one - other).max() / other.std())


# ---- on the CPU ------------------------------------------------------------------------------------------------------


@halves
def test_halves_are_computed_in_halves(tiny_model: Path, backend: TorchBackend, precision: str) -> None:
    half = TorchBackend.open(Source(tiny_model), "cpu", precision)
    for name, call in given(backend).items():
        result = call(half)
        assert result.dtype == np.float32
        assert np.array_equal(result, torch.from_numpy(result).to(PRECISIONS[precision]).float().numpy())
        assert 0 < apart(result, call(backend)) < HALVES[precision] * 10, name


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@halves
@torch.no_grad()
def test_halves_are_as_near_to_the_truth_as_those_of_diffusers(
    tiny_model: Path, backend: TorchBackend, precision: str
) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    dtype, half = PRECISIONS[precision], TorchBackend.open(Source(tiny_model), "cpu", precision)
    text, unet, vae = (
        kind.from_pretrained(tiny_model / name, **{key: dtype}).eval()
        for kind, name, key in (
            (CLIPTextModel, "text_encoder", "dtype"),
            (UNet2DConditionModel, "unet", "torch_dtype"),
            (AutoencoderKL, "vae", "torch_dtype"),
        )
    )
    taken: dict[str, Any] = {}
    calls = given(backend)
    with pytest.MonkeyPatch.context() as patch:  # what each network of ours was given

        def ask(network: Any, call: Any, *arrays: np.ndarray, **more: Any) -> torch.Tensor:
            taken["given"] = [torch.from_numpy(x) for x in arrays], more
            raise StopIteration

        patch.setattr(half, "ask", ask)
        inputs = {}
        for name, call in calls.items():
            with pytest.raises(StopIteration):
                call(half)
            inputs[name] = taken["given"]
    told = inputs["denoiser"][1]
    x, context = (torch.from_numpy(told[name]).to(dtype) for name in ("sample", "encoder_hidden_states"))
    theirs = {
        "text": text(inputs["text"][0][0]).last_hidden_state,
        "denoiser": unet(x, told["timestep"], context).sample,
        "encoder": vae.encode(inputs["encoder"][0][0].to(dtype)).latent_dist.parameters,
        "decoder": vae.decode(inputs["decoder"][0][0].to(dtype)).sample,
    }
    for name, call in calls.items():
        exact = call(backend)
        ours, others = (apart(each, exact) for each in (call(half), theirs[name].float().numpy()))
        assert ours < 1.5 * others, name


@halves
def test_images_of_halves(tiny_model: Path, backend: TorchBackend, precision: str) -> None:
    half = TorchBackend.open(Source(tiny_model), "cpu", precision)
    ours, exact = (generate(b, ["a red square"] * 2, [3, 4], REQUEST).astype(int) for b in (half, backend))
    assert exact.std() > 10 and 0 < np.abs(ours - exact).max() < {"fp16": 4, "bf16": 24}[precision]


def test_what_is_stored_in_halves_is_computed_in_float32_on_a_cpu(tiny_model: Path, tmp_path: Path) -> None:
    convert.to_folder(Source(tiny_model), tmp_path / "half", "fp16", False)
    usual, wide = (TorchBackend.open(Source(tmp_path / "half"), "cpu", p) for p in (None, "fp32"))
    for name, call in given(usual).items():
        assert np.array_equal(call(usual), call(wide)), name
    half = TorchBackend.open(Source(tmp_path / "half"), "cpu", "fp16")
    assert {p.dtype for part in half.model.networks.values() for p in part.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("stored", "chosen"),
    [
        (["float16", "float16"], "float16"),
        (["bfloat16", "bfloat16"], "bfloat16"),
        (["float32", "float32"], "float32"),
        (["float16", "float32"], "float32"),
        (["float16", "bfloat16"], "float32"),
        (["float64", "float64"], "float32"),
    ],
)
def test_what_a_gpu_computes_in(stored: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Linear(2, 2)
    network.weight.data, network.bias.data = (
        p.to(getattr(torch, kind)) for p, kind in zip(network.parameters(), stored, strict=True)
    )
    for capable in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: capable)  # noqa: B023
        wanted = "float32" if chosen == "bfloat16" and not capable else chosen
        assert pytorch.usual(network, torch.device("cuda")) == getattr(torch, wanted)
        assert pytorch.usual(network, torch.device("cpu")) == torch.float32


def test_what_overflows_halves_is_computed_in_float32(tiny_model: Path) -> None:
    """The decoder's middle is made to exceed 65,504, which its last norm brings back: no image is black."""

    def enlarged(precision: str) -> TorchBackend:
        made = TorchBackend.open(Source(tiny_model), "cpu", precision)
        for block in made.model.vae.decoder.mid_block.resnets:
            block.conv2.weight.data *= 5e4
        return made

    half, exact = enlarged("fp16"), enlarged("fp32")
    z = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    for _ in range(2):
        assert apart(half.decode(z), exact.decode(z)) < 0.02  # the weights' rounding
    kinds = {name: next(part.parameters()).dtype for name, part in half.model.networks.items()}
    assert kinds == {"text_encoder": torch.float16, "unet": torch.float16, "vae": torch.float32}


def test_what_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(*more: str, model: str = str(tiny_model)) -> str:
        with pytest.raises(UsageError) as caught:
            command = ["generate", "a red square", "-m", model, "--device", "cpu", *more]
            CliRunner().invoke(cli.app, command, catch_exceptions=False, standalone_mode=False)
        return str(caught.value)

    assert refusal("--precision", "fp8").startswith("--precision: unknown name 'fp8'")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    assert refusal("--compile") == "--compile: torch finds no C++ compiler; install g++, or leave --compile out"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UsageError, match="bf16: this GPU cannot"):
        pytorch.check_bfloat16(torch.device("cuda"), "bf16")
    pytorch.check_bfloat16(torch.device("cuda"), "fp16")


def test_graphs_have_a_precision_of_their_own() -> None:
    """Said of the shipped bundle before torch or onnxruntime is imported."""
    code = (
        "from tinydiff.backends import find_model, open_backend\n"
        "from tinydiff.checkpoints.source import Source\n"
        "for more in ({'precision': 'fp16'}, {'compiled': True}):\n"
        "    try: open_backend(Source(find_model(None)), **more)\n"
        "    except Exception as error: print(type(error).__name__, str(error).partition(': ')[2])"
    )
    precision, compiled = run_without(code, "torch", "onnxruntime").splitlines()
    told = "is torch's, and graphs have their own"
    assert precision == f"UsageError --precision {told}; export it with another --precision, or use --backend torch"
    assert compiled == f"UsageError --compile {told}; leave it out, or use --backend torch"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_denoiser_draws_the_same(tiny_model: Path, backend: TorchBackend) -> None:
    compiled = open_backend(Source(tiny_model), "torch", "cpu", compiled=True)
    ours, exact = (generate(b, ["a red square"] * 2, [3, 4], REQUEST).astype(int) for b in (compiled, backend))
    assert np.abs(ours - exact).max() <= 1


class Tape:
    """Stands in for CUDA's recording: what was called is called again, and its answer put where the first one is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: bool = False):
        self.refuses, self.made, self.replayed = refuses, 0, 0
        monkeypatch.setattr(replayed, "captured", self.captured)

    def captured(self, call: Callable[[], torch.Tensor], pool: object) -> tuple:
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        answer, self.made = torch.zeros_like(call()), self.made + 1  # nothing is computed while it is recorded

        def replay() -> None:
            self.replayed += 1
            answer.copy_(call())

        return answer, replay, pool


def test_recorded_calls_are_what_plain_ones_are(monkeypatch: pytest.MonkeyPatch, backend: TorchBackend) -> None:
    tape, network = Tape(monkeypatch), backend.model.denoiser
    width = backend.model.configs["unet"]["cross_attention_dim"]
    again, rng = replayed.Replayed(network), np.random.default_rng(0)
    given = [torch.from_numpy(rng.standard_normal((rows, 4, 8, 8)).astype(np.float32)) for rows in (2, 1, 2, 1, 2, 2)]
    with torch.inference_mode():
        for i, x in enumerate(given):
            told = torch.full((len(x), 3, width), float(i))
            inputs = {"sample": x, "timestep": torch.tensor(100.0 * i), "encoder_hidden_states": told}
            assert torch.equal(again(**inputs), network(**inputs))
    assert (tape.made, tape.replayed) == (2, 4)


def test_what_cannot_be_recorded_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    tape, network = Tape(monkeypatch, refuses=True), torch.nn.Identity()
    plain = replayed.Replayed(network)
    assert [float(plain(input=torch.tensor(float(i)))) for i in range(4)] == [0, 1, 2, 3]
    tape.refuses, many = False, replayed.Replayed(network)
    for rows in range(2 * replayed.MOST):
        for i in range(3):
            assert many(input=torch.full((rows,), float(i))).tolist() == [i] * rows
    assert tape.made == replayed.MOST and tape.replayed == 2 * replayed.MOST


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_float32_on_a_gpu_is_that_of_the_cpu(gpu: str, tiny_model: Path, backend: TorchBackend) -> None:
    """Without TF32, whose products have ten bits; its convolutions' weights have their channels last."""
    there = TorchBackend.open(Source(tiny_model), gpu)
    for name, call in given(backend).items():
        assert apart(call(there), call(backend)) < 1e-4, name
    ours, exact = (generate(b, ["a red square"] * 2, [3, 4], REQUEST).astype(int) for b in (there, backend))
    assert (np.abs(ours - exact) <= 1).mean() > 0.999
    kernel = there.model.vae.decoder.conv_in.weight
    assert there.device.type == gpu
    assert gpu == "cpu" or kernel.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_cuda_graphs_draw_what_plain_calls_draw(gpu: str, tiny_model: Path, backend: TorchBackend) -> None:
    there, rng = TorchBackend.open(Source(tiny_model), gpu), np.random.default_rng(0)
    for rows in (2, 1, 2):
        x = rng.standard_normal((rows, 4, 8, 8)).astype(np.float32)
        told = backend.encode_text({name: t.encode(["a square"] * rows) for name, t in backend.tokenizers.items()})
        for step in range(4):
            args = x + step, 100.0 * step, told
            assert apart(there.denoise(*args), backend.denoise(*args)) < 1e-4
    assert gpu == "cpu" or there.predict.made == 2  # type: ignore[attr-defined]


@pytest.mark.gpu
@halves
def test_halves_on_a_gpu(gpu: str, tiny_model: Path, backend: TorchBackend, precision: str) -> None:
    there = TorchBackend.open(Source(tiny_model), gpu, precision)
    for name, call in given(backend).items():
        assert 0 < apart(call(there), call(backend)) < HALVES[precision] * 10, name


@pytest.mark.gpu
def test_half_weights_are_computed_in_halves_on_a_gpu(gpu: str, tiny_model: Path, tmp_path: Path) -> None:
    convert.to_folder(Source(tiny_model), tmp_path / "half", "fp16", False)
    there = TorchBackend.open(Source(tmp_path / "half"), gpu)
    wanted = torch.float32 if gpu == "cpu" else torch.float16
    assert {p.dtype for part in there.model.networks.values() for p in part.parameters()} == {wanted}
    assert generate(there, ["a red square"], [3], REQUEST).std() > 10


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_denoiser_on_a_gpu(gpu: str, tiny_model: Path, backend: TorchBackend) -> None:
    there = TorchBackend.open(Source(tiny_model), gpu, "fp16", compiled=True)
    call = given(backend)["denoiser"]
    assert apart(call(there), call(backend)) < HALVES["fp16"] * 10


@pytest.mark.gpu
def test_the_shipped_bundle_on_a_gpu(gpu: str) -> None:
    """onnxruntime there against torch on the CPU, both in float32."""
    source = Source(find_model(None))
    there, here = open_backend(source, "onnx", gpu), TorchBackend.open(source, "cpu")
    for name, call in given(here, here.description.latent_channels).items():
        assert apart(call(there), call(here)) < 1e-3, name
