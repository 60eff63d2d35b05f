"""The networks on onnxruntime, as a `pipeline.Backend`: numpy in, numpy out, and never torch.

Reads bundles in optimum's layout, tinydiff's own and others'. What a graph takes and gives is compared with what the network
of its configuration does, before the first call and at each.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tinydiff.backends.graph import RESTORE, check
from tinydiff.checkpoints.source import Source
from tinydiff.condition import Condition, joined, texts_of
from tinydiff.errors import ModelError, ResourceError
from tinydiff.files import shown, undisturbed, verify
from tinydiff.networks import graphs
from tinydiff.networks.network import HIDDEN, Graph
from tinydiff.text.labels import one_hot

ENCODER, DECODER = "vae_encoder", "vae_decoder"
FIX = "export it with tinydiff or optimum"
DRAWING = ("text_encoder", DECODER, "scheduler", "tokenizer")  # folders that drawing reads
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
DTYPES |= {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
IDENTITY = (  # y = x, the smallest graph that shows whether a provider works
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


class OnnxBackend:
    """A bundle's sessions on one device: "cpu", "cuda", or "auto", which is cuda where it works.

    Raises ModelError where the bundle is damaged or incomplete, ResourceError where `device` cannot be had; with `wait`
    false they may come from the first use of a network instead, and the graphs are opened meanwhile.
    """

    name = "onnx"

    def __init__(self, source: Source, device: str = "auto", wait: bool = True):
        self.path, self.stamps, self.device = source.path, source.stamps, choose_device(device)
        self.pool = ThreadPoolExecutor(4)  # neither opening a graph nor hashing a file needs Python
        self.checks = self.pool.submit(verify, self.path, (*DRAWING, source.denoiser))
        try:
            with contextlib.suppress(KeyError, TypeError, ValueError):  # of a table that `description` refuses below
                self.denoiser, self.graphs = source.denoiser, graphs(source.configs)
                drawing = (name for name in self.graphs if name != ENCODER)  # text to image needs no other
                self.sessions = {name: self.pool.submit(self.open, name) for name in drawing}
                self.ready = self.pool.submit(self.opened)
            self.description, self.tokenizers = source.description, source.tokenizers
        except ModelError:
            self.checks.result()  # what is wrong with the files says more than what came of it
            raise
        if wait:
            self.wait()

    def open(self, name: str) -> ort.InferenceSession:
        return open_session(self.path, name, self.graphs[name], self.device)

    def opened(self) -> None:
        """Returns once everything that drawing needs is open, all of it of one bundle."""
        with undisturbed(self.stamps):
            for each in (self.checks, *self.sessions.values()):
                each.result()

    def wait(self) -> None:
        """Until everything that drawing needs is open, or raises what keeps it from that."""
        self.ready.result()

    @cached_property
    def vae_encoder(self) -> ort.InferenceSession:
        """Opened when first needed: drawing from text alone never does."""
        with undisturbed(self.stamps):
            verify(self.path, (ENCODER,))
            return self.open(ENCODER)

    def encode_text(self, ids: Mapping[str, np.ndarray]) -> Condition:
        self.wait()
        outputs = [self.read(name, rows) for name, rows in ids.items()]
        return joined(outputs, self.description.conditions, np.concatenate)

    def read(self, name: str, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of one text encoder that the denoiser is told."""
        if name not in self.sessions:
            return {HIDDEN: one_hot(ids, self.tokenizers[name].vocab_size)}
        told = texts_of(self.description.conditions).values()
        session = self.sessions[name].result()
        return self.run(session, name, [k for k in self.graphs[name].outputs if k in told], input_ids=ids)

    def denoise(self, x: np.ndarray, t: float, condition: Condition) -> np.ndarray:
        session, given = self.sessions[self.denoiser].result(), {"sample": x, "timestep": np.array(t), **condition}
        return self.run(session, self.denoiser, ["out_sample"], **given)["out_sample"]

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return self.run(self.vae_encoder, ENCODER, ["latent_parameters"], sample=pixels)["latent_parameters"]

    def decode(self, z: np.ndarray) -> np.ndarray:
        return self.run(self.sessions[DECODER].result(), DECODER, ["sample"], latent_sample=z)["sample"]

    def run(
        self, session: ort.InferenceSession, name: str, outputs: list[str], **inputs: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Outputs of a graph by name, in float32; inputs are converted to what it declares. ModelError for another shape."""
        path, graph = self.path / name / "model.onnx", self.graphs[name]
        feed, batch = {}, session.get_inputs()[0].shape[:1]
        for declared in session.get_inputs():
            value = inputs[declared.name].astype(DTYPES[declared.type], copy=False)
            if len(declared.shape) == 1 and value.ndim == 0:  # some exporters want one a sample, some one in a list
                value = np.full(len(inputs["sample"]) if declared.shape == batch else 1, value)
            elif fixed := [
                n for n, m in zip(declared.shape, value.shape, strict=False) if isinstance(n, int) and n != m
            ]:
                given = f"{declared.name} of {shown(declared.shape)} alone (here {value.shape})"
                fix = f"draw as many images of that size, or {FIX} with sizes that vary"
                raise ModelError(f"{shown(path)}: takes {given}, of which {fixed[0]} is fixed; {fix}")
            feed[declared.name] = np.asarray(
                value, order="C"
            )  # a scalar stays one, which ascontiguousarray makes a list
        try:
            results: Any = session.run(outputs, feed)
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise failure(shown(path), error) from error
        sizes = self.sizes(graph, inputs)
        for key, value in zip(outputs, results, strict=True):
            wanted = [sizes.get(axis, -1) if isinstance(axis, str) else axis or -1 for axis in graph.outputs[key].axes]
            if len(wanted) != value.ndim or any(n not in (-1, m) for n, m in zip(wanted, value.shape, strict=True)):
                raise ModelError(f"{shown(path)}: gives {key} of {value.shape} where {wanted} is asked for; {FIX}")
        return {key: value.astype(np.float32, copy=False) for key, value in zip(outputs, results, strict=True)}

    def sizes(self, graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """What the axes of a graph's arrays are for these inputs, those of the autoencoder's outputs included."""
        shapes = (zip(array.axes, inputs[name].shape, strict=False) for name, array in graph.inputs.items())
        sizes = {axis: size for shape in shapes for axis, size in shape if isinstance(axis, str)}
        factor = self.description.factor
        for side in {"height", "width"} & sizes.keys():
            sizes |= {f"image_{side}": sizes[side] * factor, f"latent_{side}": sizes[side] // factor}
        return sizes


def open_session(bundle: Path, name: str, graph: Graph, device: str) -> ort.InferenceSession:
    """The session of one graph of a bundle on "cpu" or "cuda", its inputs and outputs as `graph` has them.

    Raises ModelError where the graph is missing or damaged, ResourceError where onnxruntime turns from cuda to the CPU.
    """
    path = bundle / name / "model.onnx"
    check(path)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level(bundle, name, device)
    providers: list[Any] = [(CUDA, CUDA_OPTIONS), CPU] if device == "cuda" else [CPU]
    try:
        session = ort.InferenceSession(path, options, providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise failure(shown(path), error) from error
    if device == "cuda" and session.get_providers()[0] != CUDA:
        raise ResourceError(f"{shown(path)}: onnxruntime would run it on the CPU; use --device cpu or mend CUDA")
    check_io(path, session, graph)
    return session


def level(bundle: Path, name: str, device: str) -> ort.GraphOptimizationLevel:
    """How much onnxruntime rewrites a graph. Our own graphs gain only where convolutions are nearly all of the work: for
    the others, more rewriting makes opening them half as long again and running them no faster."""
    enough = device == "cpu" and (bundle / "tinydiff.toml").exists() and not name.startswith("vae")
    return ort.GraphOptimizationLevel.ORT_ENABLE_BASIC if enough else ort.GraphOptimizationLevel.ORT_ENABLE_ALL


def check_io(path: Path, session: ort.InferenceSession, graph: Graph) -> None:
    """ModelError unless the session takes the graph's inputs and has its first output, of types and shapes that fit."""
    inputs, outputs = ({each.name: each for each in some} for some in (session.get_inputs(), session.get_outputs()))
    if inputs.keys() != graph.inputs.keys():
        raise ModelError(f"{shown(path)}: takes {shown(', '.join(inputs))}, not {', '.join(graph.inputs)}; {FIX}")
    if (first := next(iter(graph.outputs))) not in outputs:
        raise ModelError(f"{shown(path)}: has no output {first}; {FIX}")
    given = [(graph.outputs[name], each) for name, each in outputs.items() if name in graph.outputs]
    for array, each in [(array, inputs[name]) for name, array in graph.inputs.items()] + given:
        kinds = {"tokens": "ui", "time": "uif"}.get(array.values, "f")
        if np.dtype(DTYPES.get(each.type, "O")).kind not in kinds:
            raise ModelError(f"{shown(path)}: {each.name} is of type {shown(each.type)}; {FIX}")
        fits = len(each.shape) == len(array.axes) and all(
            not isinstance(n, int) or isinstance(axis, str) or n == axis or not axis
            for n, axis in zip(each.shape, array.axes, strict=True)
        )
        if each.shape and not fits and (array.values, len(each.shape)) != ("time", 1):  # [] is also an unknown rank
            wanted = ", ".join(str(axis) for axis in array.axes)
            raise ModelError(f"{shown(path)}: {each.name} is of shape {shown(each.shape)}, not ({wanted}); {FIX}")


def failure(what: str, error: Exception) -> ModelError | ResourceError:
    """onnxruntime's exception as one line of ours."""
    reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))[:200]
    if re.search("allocat|out of memory", reason, re.IGNORECASE):
        return ResourceError(f"{what}: not enough memory ({reason}); draw fewer or smaller images at once")
    return ModelError(f"{what}: onnxruntime refuses it ({reason}); {RESTORE}")


def choose_device(device: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda". Raises ResourceError where cuda is asked for and does not work."""
    problem = "" if device == "cpu" else cuda_problem()
    if device == "cuda" and problem:
        raise ResourceError(f"--device cuda: {problem}; or use --device cpu")
    return "cpu" if device == "cpu" or problem else "cuda"


def cuda_problem() -> str:
    """Why onnxruntime cannot compute with CUDA here, and the fix; "" where it can. Prints nothing."""
    if CUDA not in ort.get_available_providers():
        return "this onnxruntime is built without CUDA; install onnxruntime-gpu"
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1); install it"
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver sees no device; check nvidia-smi"
    options = ort.SessionOptions()
    options.log_severity_level = 4
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # preload_dlls prints what it misses
            ort.preload_dlls()
        session = ort.InferenceSession(IDENTITY, options, [CUDA, CPU], enable_fallback=0)
        works = session.get_providers()[0] == CUDA
    except Exception:  # onnxruntime's exceptions share no other base
        works = False
    return "" if works else "onnxruntime cannot load its CUDA libraries; install onnxruntime-gpu[cuda,cudnn]"
