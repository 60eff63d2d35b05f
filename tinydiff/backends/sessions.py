"""An onnxruntime session of a bundle's graph: checked, optimised or taken from the cache of optimised ones, and checked again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime as ort

from tinydiff.backends import optimised
from tinydiff.backends.adapted import Adapted
from tinydiff.backends.devices import CPU, CUDA, use_plugin
from tinydiff.backends.graph import RESTORE, check
from tinydiff.errors import ModelError, ResourceError
from tinydiff.files import sha256, shown
from tinydiff.networks.network import Array, Graph
from tinydiff.verified import Hash

CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
FLOATS = frozenset(DTYPES)
DTYPES |= {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
TYPES = dict.fromkeys(("normal", "pixels", "unit"), FLOATS) | {
    "tokens": DTYPES.keys() - FLOATS,
    "time": frozenset(DTYPES),
}
EXPORT = "export it with tinydiff or optimum"
FOLDED = "optimization.constant_folding_max_output_size_in_bytes"
Level = ort.GraphOptimizationLevel


def open_session(
    bundle: Path,
    name: str,
    graph: Graph,
    device: str,
    later: Callable[[Callable[[], None]], Any] | None = None,
    digest: Hash = sha256,
    adapted: Adapted | None = None,
) -> ort.InferenceSession:
    """The session of one graph of a bundle on "cpu", "cuda" or a plugin, its inputs and outputs as `graph` has them.

    With `later`, what onnxruntime makes of it on the CPU is kept for the next time, by work that it is given; `digest` gives a
    file's SHA-256. `adapted`: what adapters make of its weights. Raises ModelError where the graph is missing, damaged or made
    for another device, ResourceError where onnxruntime turns from the device to the CPU.
    """
    path, convolves = bundle / name / "model.onnx", "sample" in graph.inputs or "latent_sample" in graph.inputs
    mark = adapted.mark(digest) if adapted else []
    place = optimised.place(bundle, name, mark) if later and device == "cpu" and convolves else None
    if place and (session := optimised.reopened(place, lambda file: created(file, Level.ORT_DISABLE_ALL), digest)):
        check_io(path, session, graph)
        return session
    metadata = check(path)
    check_device(path, metadata, device)
    create = partial(created, path, level(bundle, name, device, metadata), metadata, adapted=adapted)
    with contextlib.ExitStack() as stack:
        session = optimised.saved(place, create, stack) if place else None
        if device == "cuda" and "timestep" in graph.inputs:  # which is called again and again
            with contextlib.suppress(ModelError):  # where an operator runs on the CPU it cannot be recorded
                session = create(device=device, recorded=True)
        session = session or create(device=device)
        check_io(path, session, graph)
        if later and place:
            later(optimised.finish(place, stack.pop_all()))
    return session


def created(
    path: Path,
    level: ort.GraphOptimizationLevel,
    metadata: Mapping[str, str] = MappingProxyType({}),
    device: str = "cpu",
    save: Path | None = None,
    recorded: bool = False,
    adapted: Adapted | None = None,
) -> ort.InferenceSession:
    """A session of a graph, written to the folder `save` as onnxruntime rewrites it; on CUDA its calls are `recorded`.

    `adapted`: as of `open_session`.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level
    options.add_session_config_entry(FOLDED, str(max(2**20, 4 * optimised.size(path.parent))))
    if device == "cpu" and limited():
        options.add_session_config_entry("session.use_env_allocators", "1")
    if save:
        options.optimized_model_filepath = str(save / "model.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    if adapted:
        adapted.put(options)
    if metadata.get("tinydiff.precision") == "int8":
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # weights are dequantised once, at opening
    providers: dict[str, list[Any]] = {
        "cpu": [CPU],
        "cuda": [(CUDA, CUDA_OPTIONS | {"enable_cuda_graph": str(int(recorded))}), CPU],
    }
    try:
        if device not in providers:
            use_plugin(options, device)
        session = ort.InferenceSession(path, options, providers.get(device), enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise failure(shown(path), error) from error
    if device == "cuda" and session.get_providers()[0] != CUDA:
        raise ResourceError(f"{shown(path)}: onnxruntime would run it on the CPU; use --device cpu or mend CUDA")
    return session


def stepwise(graph: bytes, folder: Path) -> ort.InferenceSession:
    """A session on the CPU of a graph whose weights are in `folder`, as it is: no operators are fused, so that every half
    result is rounded to half, and no weight is copied."""
    options = ort.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 4, Level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False  # what is cast of a large model is given back after its use
    try:
        return ort.InferenceSession(graph, options, [CPU])
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise failure(shown(folder), error) from error


def called(session: ort.InferenceSession, outputs: list[str] | None, inputs: Mapping[str, np.ndarray]) -> Any:
    """Outputs of a graph; what onnxruntime raises is one line of ours."""
    try:
        return session.run(outputs, dict(inputs))
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise failure("a graph", error) from error


def check_device(path: Path, metadata: Mapping[str, str], device: str) -> None:
    """ModelError where a graph's exporter says that this device cannot run it."""
    if metadata.get("tinydiff.device") == "cuda" != device:
        fix = "export it again without --device cuda, or use --device cuda"
        raise ModelError(f"{shown(path)}: exported for CUDA; {fix}")
    computes = metadata.get("tinydiff.precision") if metadata.get("tinydiff.device") != "cpu" else "fp32"
    if computes == "bf16" and device == "cpu":
        raise ModelError(f"{shown(path)}: bf16 runs on CUDA; use an fp32 or fp16 bundle")


def level(bundle: Path, name: str, device: str, metadata: Mapping[str, str]) -> ort.GraphOptimizationLevel:
    """How much onnxruntime rewrites a graph: all it can, but for our own large ones. What is made of these is not kept for the
    next time, and laying out their weights anew takes longer than the calls of a picture gain by it."""
    ours = "tinydiff.precision" in metadata or (bundle / "tinydiff.toml").exists()
    large = optimised.size(bundle / name) > optimised.LARGEST
    if not (ours and large and device == "cpu"):
        return Level.ORT_ENABLE_ALL
    whole = (
        metadata.get("tinydiff.precision") == "int8"
    )  # products of whole numbers, which are fused above the basic level
    return Level.ORT_ENABLE_EXTENDED if whole else Level.ORT_ENABLE_BASIC


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
