"""Where onnxruntime can compute: the CPU, CUDA, plugin providers, and what is said where that does not work."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import onnxruntime as ort

from tinydiff.errors import ResourceError
from tinydiff.progress import note
from tinydiff.system import shown

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
IDENTITY = (  # y = x, the smallest graph that shows whether a provider works
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def choose_device(device: str) -> str:
    """The device itself, or cuda or cpu for "auto". Raises ResourceError where it is asked for and does not work."""
    if device not in ("auto", "cpu", "cuda"):
        plugin(device)
        return device
    problem = "" if device == "cpu" else cuda_problem()
    if device == "cuda" and problem:
        raise ResourceError(f"--device cuda: {problem}; or use --device cpu")
    return "cpu" if device == "cpu" or problem else "cuda"


@lru_cache
def plugin(name: str) -> Any:
    """The device of a plugin provider, an accelerator where it has one, registered with onnxruntime. Else ResourceError.

    A plugin is the package onnxruntime-ep-NAME, whose module says where its library is and how its providers are called.
    """
    package = f"onnxruntime_ep_{name.replace('-', '_')}"
    try:
        module, _ = importlib.import_module(package), ort.InferenceSession.get_provider_graph_assignment_info
        ort.register_execution_provider_library(f"tinydiff-{name}", module.get_library_path())
        devices = [each for each in ort.get_ep_devices() if each.ep_name in module.get_ep_names()]
    except Exception as error:  # onnxruntime's exceptions share no other base; older ones have no plugins
        if isinstance(error, ModuleNotFoundError) and error.name == package.partition(".")[0]:
            fix = f"pip install onnxruntime-ep-{name}"
            raise ResourceError(f"--device {shown(name)}: its plugin is not installed; {fix}") from error
        fix = f"pip install --upgrade onnxruntime-ep-{name} onnxruntime"
        raise ResourceError(f"--device {name}: its plugin cannot be loaded ({shown(error)}); {fix}") from error
    if not devices:
        raise ResourceError(f"--device {name}: its plugin sees no device here that it supports; use --device cpu")
    return max(devices, key=lambda each: each.device.type != ort.OrtHardwareDeviceType.CPU)


def use_plugin(options: ort.SessionOptions, name: str) -> None:
    """Have a session run on a plugin's device, and remember which operators do not."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_provider_for_devices([plugin(name)], {})


def say_share(name: str, sessions: Iterable[ort.InferenceSession]) -> None:
    """Say how many operators of some sessions a plugin leaves to the CPU; ResourceError where that is all of them."""
    counts = Counter[bool]()
    for session in sessions:
        for part in session.get_provider_graph_assignment_info():
            counts[part.ep_name == plugin(name).ep_name] += len(part.get_nodes())
    if counts[False] and not counts[True]:
        raise ResourceError(f"--device {name}: takes none of the {counts[False]} operators; use --device cpu")
    if counts[False]:
        note(f"{name} leaves {counts[False]} of {counts.total()} operators to the CPU")


def is_recorded(session: ort.InferenceSession) -> bool:
    """Whether a session's calls are recorded as CUDA graphs."""
    return session.get_provider_options().get(CUDA, {}).get("enable_cuda_graph") == "1"


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
