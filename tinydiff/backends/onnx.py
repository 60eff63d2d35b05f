"""The networks on onnxruntime, as a `pipeline.Backend`: numpy in, numpy out, and never torch.

Reads bundles in optimum's layout, tinydiff's own and others'. Weights outside a graph ("external data") must be plain
files in the graph's own folder; `graph` checks that and more before onnxruntime sees a graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
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
from tinydiff.networks.network import HIDDEN, Array, Graph
from tinydiff.text.labels import one_hot

ENCODER = "vae_encoder"
DRAWING = ("text_encoder", "vae_decoder", "scheduler", "tokenizer")  # folders that drawing reads
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
FLOATS = frozenset(DTYPES)
DTYPES |= {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
TYPES = dict.fromkeys(("normal", "pixels"), FLOATS) | {"tokens": DTYPES.keys() - FLOATS, "time": frozenset(DTYPES)}
EXPORT = "export it with tinydiff or optimum"
FOLDED = "optimization.constant_folding_max_output_size_in_bytes"
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
            self.denoiser, self.graphs = source.denoiser, graphs_of(source)
            drawing = (name for name in self.graphs if name != ENCODER)  # text to image needs no other
            self.sessions = {name: self.pool.submit(self.open, name) for name in drawing}
            self.ready = self.pool.submit(self.opened)
            self.description, self.tokenizers = source.description, source.tokenizers
            self.check_channels()
        except ModelError:
            self.checks.result()  # what is wrong with the files says more than what came of it
            raise
        if wait:
            self.wait()

    def check_channels(self) -> None:
        """ModelError unless the denoiser predicts what the autoencoder decodes."""
        (predicted,), latents = self.graphs[self.denoiser].outputs.values(), self.description.latent_channels
        if predicted.axes[1] != latents:
            problem = f"predicts latents of {predicted.axes[1]} channels, and the autoencoder's have {latents}"
            raise ModelError(f"{shown(self.path / self.denoiser)}: {problem}; copy all folders of one model")

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
        return self.run(name, [k for k in self.graphs[name].outputs if k in told], input_ids=ids)

    def denoise(self, x: np.ndarray, t: float, condition: Condition) -> np.ndarray:
        return self.run(self.denoiser, ["out_sample"], sample=x, timestep=np.array(t), **condition)["out_sample"]

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return self.run(ENCODER, ["latent_parameters"], sample=pixels)["latent_parameters"]

    def decode(self, z: np.ndarray) -> np.ndarray:
        return self.run("vae_decoder", ["sample"], latent_sample=z)["sample"]

    def run(self, name: str, outputs: list[str], **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs of a graph by name, in float32, which are refused if their shapes are not those that it should give."""
        session = self.vae_encoder if name == ENCODER else self.sessions[name].result()
        graph, path, factor = self.graphs[name], self.path / name / "model.onnx", self.description.factor
        if lacking := graph.inputs.keys() - inputs.keys():
            problem = f"needs {', '.join(sorted(lacking))}, which the text encoders do not give"
            raise ModelError(f"{shown(path)}: {problem}; copy all folders of one model")
        results = []
        for rows in batches(session, inputs):
            results.append(run(path, session, outputs, rows, 1 if name == ENCODER else factor))
            sizes = sizes_of(graph, rows, factor)
            for key, array in results[-1].items():
                check_shape(f"{shown(path)}: gives {key}", array.shape, graph.outputs[key], sizes)
        if len(results) == 1:
            return results[0]
        count = next(len(array) for array in inputs.values() if array.ndim)
        return {key: np.concatenate([each[key] for each in results])[:count] for key in outputs}


def graphs_of(source: Source) -> dict[str, Graph]:
    """The graphs that a bundle should have. Raises ModelError where its configurations make none."""
    try:
        return graphs(source.configs)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        source.description  # noqa: B018  says what is wrong
        raise ModelError(f"{shown(source.path)}: its configuration files lack or misstate {shown(error)}") from None


def batches(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The inputs in as many rows as the graph takes: all, or, if it was exported for so many, theirs, the last repeated."""
    rows = next(len(array) for array in inputs.values() if array.ndim)
    sizes = [each.shape[0] for each in session.get_inputs() if each.name != "timestep" and each.shape]
    size = next((n for n in sizes if isinstance(n, int) and n > 0), rows)
    if size == rows:
        yield dict(inputs)
        return
    for start in range(0, rows, size):
        at = np.minimum(np.arange(start, start + size), rows - 1)
        yield {key: array[at] if array.ndim else array for key, array in inputs.items()}


def run(
    path: Path, session: ort.InferenceSession, outputs: list[str], inputs: Mapping[str, np.ndarray], factor: int
) -> dict[str, np.ndarray]:
    """One call: inputs are converted to what the graph declares, and refused if it takes other sizes."""
    feed, batch, rows = {}, session.get_inputs()[0].shape[:1], next(len(x) for x in inputs.values() if x.ndim)
    for declared in session.get_inputs():
        value, kind = inputs[declared.name], DTYPES[declared.type]
        value = (np.rint(value) if kind in (np.int32, np.int64) else value).astype(kind, copy=False)
        if len(declared.shape) == 1 and value.ndim == 0:  # some exporters want one for each sample, some one in a list
            many = (declared.shape == batch and not isinstance(batch[0], int)) or declared.shape == [rows]
            value = np.full(rows if many else 1, value)
        check_fixed(path, declared.name, declared.shape, value.shape, factor)
        feed[declared.name] = np.asarray(value, order="C")  # a scalar stays one, which ascontiguousarray makes a list
    try:
        results: Any = session.run(outputs, feed)
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise failure(f"{shown(path)}: {outputs[0]}", error) from error
    return {name: each.astype(np.float32, copy=False) for name, each in zip(outputs, results, strict=True)}


def check_fixed(path: Path, name: str, declared: list[Any], given: tuple[int, ...], factor: int) -> None:
    """ModelError where a graph was exported for other sizes than those that are asked for; `factor`: pixels a cell."""
    if any(isinstance(n, int) and n != size for n, size in zip(declared, given, strict=False)):
        fix = "export it with axes that vary"
        if len(declared) == 4 and all(isinstance(n, int) for n in declared[2:]):
            fix = f"give -W {declared[3] * factor} -H {declared[2] * factor}, or {fix}"
        elif len(declared) == 3:
            fix = f"shorten the prompt, or {fix}"
        takes, asked = (" x ".join(str(n) if isinstance(n, int) else "any" for n in each) for each in (declared, given))
        raise ModelError(f"{shown(path)}: takes {name} of {takes} alone, not {asked}; {fix}")


def sizes_of(graph: Graph, inputs: Mapping[str, np.ndarray], factor: int) -> dict[str, int]:
    """Sizes of a graph's axes that vary, by what it is given."""
    sizes: dict[str, int] = {}
    for name, array in graph.inputs.items():
        named = zip(array.axes, inputs[name].shape, strict=False)
        sizes |= {axis: size for axis, size in named if isinstance(axis, str)}
    for side in ("height", "width"):
        if side in sizes:
            sizes |= {f"image_{side}": sizes[side] * factor, f"latent_{side}": sizes[side] // factor}
    return sizes


def check_shape(what: str, shape: tuple[int, ...], array: Array, sizes: Mapping[str, int]) -> None:
    """ModelError unless a shape is the one that an array of a graph should have; a size of 0 is one that nobody knows."""
    wanted = array.shape(defaultdict(int, sizes))
    if len(shape) != len(wanted) or any(w and n != w for n, w in zip(shape, wanted, strict=True)):
        raise ModelError(f"{what} of shape {shown(list(shape))}, not {times(array.axes)}; {RESTORE}")


def open_session(bundle: Path, name: str, graph: Graph, device: str) -> ort.InferenceSession:
    """The session of one graph of a bundle on "cpu" or "cuda", its inputs and outputs as `graph` has them.

    Raises ModelError where the graph is missing or damaged, ResourceError where onnxruntime turns from cuda to the CPU.
    """
    path = bundle / name / "model.onnx"
    check(path)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level(bundle, name, device)
    options.add_session_config_entry(FOLDED, str(max(2**20, 2 * sum(p.stat().st_size for p in path.parent.iterdir()))))
    if device == "cpu" and limited():
        options.add_session_config_entry("session.use_env_allocators", "1")
    providers: list[Any] = [(CUDA, CUDA_OPTIONS), CPU] if device == "cuda" else [CPU]
    try:
        session = ort.InferenceSession(path, options, providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise failure(shown(path), error) from error
    if device == "cuda" and session.get_providers()[0] != CUDA:
        raise ResourceError(f"{shown(path)}: onnxruntime would run it on the CPU; use --device cpu or mend CUDA")
    check_io(path, session, graph)
    return session


@lru_cache
def limited() -> bool:
    """Whether all sessions on the CPU now share one pool of memory that ends where the machine's does.

    A graph that asks for more, of whatever it computes, is then refused instead of this or another process killed.
    """
    try:
        info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(info, ort.OrtArenaCfg(available(), -1, -1, -1))
    except Exception:  # an older onnxruntime, or a system that does not tell; its exceptions share no other base
        return False
    return True


def available() -> int:
    """Bytes of memory that this process can still get: of the machine, and of the control group it is in."""
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(told["MemAvailable"].split()[0]) * 1024
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is none
            limit, now = (int(Path("/sys/fs/cgroup", name).read_text()) for name in (most, used))
            free = min(free, max(limit - now, limit // 2))  # what is used can be files that it gives back
    return free


def level(bundle: Path, name: str, device: str) -> ort.GraphOptimizationLevel:
    """How much onnxruntime rewrites a graph. Our own graphs gain only where convolutions are nearly all of the work: for
    the others, more rewriting makes opening them half as long again and running them no faster."""
    enough = device == "cpu" and (bundle / "tinydiff.toml").exists() and not name.startswith("vae")
    return ort.GraphOptimizationLevel.ORT_ENABLE_BASIC if enough else ort.GraphOptimizationLevel.ORT_ENABLE_ALL


def check_io(path: Path, session: ort.InferenceSession, graph: Graph) -> None:
    """ModelError unless the session takes exactly the graph's inputs and gives its outputs, of such types and shapes."""
    takes, gives = ({value.name: value for value in each} for each in (session.get_inputs(), session.get_outputs()))
    output = next(iter(graph.outputs))
    if takes.keys() != graph.inputs.keys():
        named = {name: value.type for name, value in takes.items()}
        raise ModelError(f"{shown(path)}: takes {shown(named)}, not {', '.join(graph.inputs)}; {EXPORT}")
    if output not in gives:
        raise ModelError(f"{shown(path)}: has no output {output}; {EXPORT}")
    for name, array in graph.inputs.items():
        check_declared(f"{shown(path)}: takes {name}", takes[name], array, TYPES[array.values])
    for name, array in graph.outputs.items():
        if name in gives:
            check_declared(f"{shown(path)}: gives {name}", gives[name], array, FLOATS)


def check_declared(what: str, value: Any, array: Array, types: Collection[str]) -> None:
    """ModelError where a graph declares another type or shape; where it declares no shape, what it gives is checked."""
    if value.type not in types:
        raise ModelError(f"{what} of type {shown(value.type)}, not {', '.join(sorted(types))}; {EXPORT}")
    axes = array.axes or ("batch",)  # the level of noise may be a list
    other = (
        isinstance(n, int) and isinstance(axis, int) and axis and n != axis
        for n, axis in zip(value.shape, axes, strict=False)
    )
    if value.shape and (len(value.shape) != len(axes) or any(other)):
        raise ModelError(f"{what} of shape {shown(value.shape)}, not {times(axes)}; {EXPORT}")


def times(axes: Iterable[str | int]) -> str:
    """A shape as a message has it; an axis of size 0 can have any."""
    return " x ".join(str(axis or "any") for axis in axes)


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
