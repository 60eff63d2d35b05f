"""A stand-in for CUDA's libraries whose calls do nothing. With it onnxruntime opens a graph as on a card, and the graph that it
makes shows what would run where; what a call would give stays unknown.

    python tests/cuda_stand_in.py LIBRARIES GRAPH RECORDED OUT      in a process whose LD_LIBRARY_PATH is LIBRARIES
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ORDER = ("libcuda.so.1", "libcudart", "libcublasLt", "libcublas", "libcurand")  # as they need one another
# What must do more than return 0: there is one device, of compute capability 9.0, whose memory is the host's.
ACTIVE = {
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int *n) { *n = 1; return 0; }",
    "cudaGetDevice": "int cudaGetDevice(int *n) { *n = 0; return 0; }",
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int *n) { *n = 13000; return 0; }",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int *n) { *n = 13000; return 0; }",
    "cudaMemGetInfo": "int cudaMemGetInfo(size_t *a, size_t *b) { *a = *b = 1ul << 36; return 0; }",
    "cudaMemcpy": "int cudaMemcpy(void *to, void *from, size_t n, int k) { memcpy(to, from, n); return 0; }",
    "cudaMemcpyAsync": "int cudaMemcpyAsync(void *to, void *from, size_t n) { memcpy(to, from, n); return 0; }",
    "__cudaRegisterFatBinary": "void **__cudaRegisterFatBinary(void *f) { static void *x; return &x; }",
    "__cudaPushCallConfiguration": "unsigned __cudaPushCallConfiguration() { return 1; }",
}
PROPERTIES = "int {0}(char *p) {{ memset(p, 0, 1008); p[360] = 9; return 0; }}"
ACTIVE |= {name: PROPERTIES.format(name) for name in ("cudaGetDeviceProperties", "cudaGetDeviceProperties_v2")}
ALLOCATED = "int {0}(void **p, size_t n) {{ *p = aligned_alloc(256, (n / 256 + 1) * 256); return 0; }}"
ACTIVE |= {name: ALLOCATED.format(name) for name in ("cudaMalloc", "cudaMallocHost", "cudaHostAlloc")}
ACTIVE |= {name: f"int {name}(void *p) {{ free(p); return 0; }}" for name in ("cudaFree", "cudaFreeHost")}
TEXTS = ("cudaGetErrorString", "cudaGetErrorName", "cublasGetStatusString", "cublasGetStatusName")
ACTIVE |= {name: f'const char *{name}(int e) {{ return "a stand-in"; }}' for name in TEXTS}
HANDLES = ("cublasCreate_v2", "cublasLtCreate", "cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaEventCreate")
HANDLES += ("cudaEventCreateWithFlags", "cudaMemPoolCreate")
ACTIVE |= {name: f"int {name}(void **h) {{ *h = (void *)8; return 0; }}" for name in HANDLES}


def provider() -> Path | None:
    """onnxruntime's library for CUDA, where this one has it and a stand-in can be built."""
    found = importlib.util.find_spec("onnxruntime")
    path = Path(found.origin or "").parent / "capi" / "libonnxruntime_providers_cuda.so" if found else None
    return path if path and path.exists() and all(map(shutil.which, ("cc", "nm", "readelf"))) else None


def build(provider: Path, folder: Path) -> None:
    """The libraries that a provider needs, with all functions that it takes from them, under the versions that it asks for."""
    asked = subprocess.run(
        ["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True
    ).stdout
    needs = subprocess.run(["readelf", "-d", provider], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in needs.splitlines() if "(NEEDED)" in line]
    names = defaultdict[str, list[str]](list)
    for line in asked.splitlines():
        name, _, library = line.split()[-1].partition("@")
        if library in needed and library.startswith(ORDER):
            names[library].append(name)
        elif not library and name.startswith("cu"):
            names["libcuda.so.1"].append(name)
    for library in filter(lambda each: each.startswith(ORDER), needed):
        text = [
            "#include <stdlib.h>",
            "#include <string.h>",
            f"int nothing_of_{library.split('.')[0]}() {{ return 0; }}",
        ]
        text += [ACTIVE.get(name, f"int {name}() {{ return 0; }}") for name in names[library]]
        (folder / f"{library}.c").write_text("\n".join(text))
        (folder / f"{library}.map").write_text(f"{library} {{ global: *; }};\n")
        versions = [] if library == "libcuda.so.1" else [f"-Wl,--version-script={folder / library}.map"]
        command = [
            "cc",
            "-w",
            "-shared",
            "-fPIC",
            "-o",
            folder / library,
            folder / f"{library}.c",
            f"-Wl,-soname,{library}",
        ]
        subprocess.run([*command, *versions], check=True)


def opened(graph: Path, recorded: bool, libraries: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Open a graph on the stand-in, in a process of its own; what onnxruntime makes of it is OUT/model.onnx."""
    command = [sys.executable, __file__, libraries, graph, str(int(recorded)), out]
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def main(libraries: str, graph: str, recorded: str, out: str) -> None:
    import onnxruntime as ort

    for library in sorted(
        Path(libraries).glob("lib*.so.*[0-9]"), key=lambda p: [p.name.startswith(o) for o in ORDER][::-1]
    ):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    from tinydiff.backends.graph import check
    from tinydiff.backends.sessions import created

    Path(out).mkdir(parents=True)
    every = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    created(Path(graph), every, check(Path(graph)), "cuda", save=Path(out), recorded=recorded == "1")
    print("opened", flush=True)
    os._exit(0)  # nothing is there to be given back


if __name__ == "__main__":
    main(*sys.argv[1:])
