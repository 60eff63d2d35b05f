"""Where onnxruntime can compute: the CPU, CUDA, and what is said where that does not work."""

from __future__ import annotations

import contextlib
import ctypes
import io

import onnxruntime as ort

from tinydiff.errors import ResourceError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
IDENTITY = (  # y = x, the smallest graph that shows whether a provider works
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


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
