"""The networks on onnxruntime, as a `pipeline.Backend`: numpy in, numpy out, and never torch.

Reads bundles in optimum's layout, tinydiff's own and others'. Weights outside a graph ("external data") must be plain
files in the graph's own folder; that is checked here, before onnxruntime sees the graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tinydiff.checkpoints.source import Source
from tinydiff.condition import Condition, joined, texts_of
from tinydiff.errors import ModelError, ResourceError
from tinydiff.files import shown, undisturbed, verify
from tinydiff.networks import graphs
from tinydiff.networks.network import HIDDEN, Graph
from tinydiff.protobuf import BYTES, fields
from tinydiff.system import unreadable
from tinydiff.text.labels import one_hot

ENCODER = "vae_encoder"
DRAWING = ("text_encoder", "vae_decoder", "scheduler", "tokenizer")  # folders that drawing reads
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
DTYPES |= {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
RESTORE = "copy or export it again"
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
        return run(self.sessions[name].result(), [k for k in self.graphs[name].outputs if k in told], input_ids=ids)

    def denoise(self, x: np.ndarray, t: float, condition: Condition) -> np.ndarray:
        session = self.sessions[self.denoiser].result()
        return run(session, ["out_sample"], sample=x, timestep=np.array(t), **condition)["out_sample"]

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return run(self.vae_encoder, ["latent_parameters"], sample=pixels)["latent_parameters"]

    def decode(self, z: np.ndarray) -> np.ndarray:
        return run(self.sessions["vae_decoder"].result(), ["sample"], latent_sample=z)["sample"]


def run(session: ort.InferenceSession, outputs: list[str], **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs of a session by name, in float32; inputs are converted to what the graph declares."""
    feed, batch = {}, session.get_inputs()[0].shape[:1]
    for declared in session.get_inputs():
        value = inputs[declared.name].astype(DTYPES[declared.type], copy=False)
        if len(declared.shape) == 1 and value.ndim == 0:  # some exporters want one for each sample, some one in a list
            value = np.full(len(inputs["sample"]) if declared.shape == batch else 1, value)
        feed[declared.name] = np.asarray(value, order="C")  # a scalar stays one, which ascontiguousarray makes a list
    try:
        results: Any = session.run(outputs, feed)
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise failure(f"the graph that gives {outputs[0]}", error) from error
    return {name: each.astype(np.float32, copy=False) for name, each in zip(outputs, results, strict=True)}


def open_session(bundle: Path, name: str, graph: Graph, device: str) -> ort.InferenceSession:
    """The session of one graph of a bundle on "cpu" or "cuda", its inputs and outputs as `graph` has them.

    Raises ModelError where the graph is missing or damaged, ResourceError where onnxruntime turns from cuda to the CPU.
    """
    path = bundle / name / "model.onnx"
    check_external_data(path)
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
    """ModelError unless the session takes exactly the graph's inputs, of types we can give, and has its first output."""
    takes, output = {value.name: value.type for value in session.get_inputs()}, next(iter(graph.outputs))
    if takes.keys() != graph.inputs.keys() or not set(takes.values()) <= DTYPES.keys():
        wanted = ", ".join(graph.inputs)
        raise ModelError(f"{shown(path)}: takes {takes}, not {wanted}; export it with tinydiff or optimum")
    if output not in {value.name for value in session.get_outputs()}:
        raise ModelError(f"{shown(path)}: has no output {output}; export it with tinydiff or optimum")


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


NESTED = {  # the protobuf messages of onnx.proto in which a tensor can be: field number -> message
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}


def check_external_data(path: Path) -> None:
    """ModelError unless every external tensor of a graph lies in a plain file of the graph's folder."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tensors = list(external_tensors(data[:])) if data.find(b"location") >= 0 else []
    except OSError as error:
        raise unreadable(error, path) from error
    except (ValueError, IndexError) as error:
        raise ModelError(f"{shown(path)}: damaged, not an ONNX graph; {RESTORE}") from error
    sizes = {name: plain_size(path, name) for name in {tensor.get("location", "") for tensor in tensors}}
    for tensor in tensors:
        numbers = [tensor.get(key, "0") for key in ("offset", "length")]
        if not all(n.isascii() and n.isdigit() and len(n) < 19 for n in numbers):
            raise ModelError(f"{shown(path)}: external data at {numbers!a}; {RESTORE}")
        if sum(map(int, numbers)) > sizes[tensor.get("location", "")]:
            raise ModelError(f"{shown(path)}: external data after the end of {tensor['location']!a}; {RESTORE}")


def plain_size(graph: Path, name: str) -> int:
    """Bytes of a file beside a graph; ModelError where `name` leads elsewhere or to no plain file."""
    path = graph.parent / name
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ModelError(f"{shown(graph)}: external data in {name!a}, which is not beside it; {RESTORE}")
    if path.is_symlink() or not path.is_file():
        raise ModelError(f"{shown(path)}: missing or a link; put the file itself in its place")
    return path.stat().st_size


def external_tensors(data: bytes) -> Iterator[dict[str, str]]:
    """The external-data entries (location, offset, length) of every tensor in an ONNX model, however deep.

    Raises ValueError or IndexError where the bytes are no protobuf.
    """
    todo = [("Model", 0, len(data))]
    while todo:
        kind, *place = todo.pop()
        known = NESTED[kind]
        inner = [(known[n], a, b) for n, wire, a, b in fields(data, *place) if n in known and wire == BYTES]
        if kind != "Tensor":
            todo += inner
        elif inner:
            pairs = [
                {n: data[a:b].decode() for n, wire, a, b in fields(data, *at) if wire == BYTES} for _, *at in inner
            ]
            yield {pair.get(1, ""): pair.get(2, "") for pair in pairs}
