"""What `scripts/gpu.py` measures: each section a generator of rows (name, number, text), run in a process of its own.

A section opens what it needs, so that one that fails takes no other with it. Models are random, of full size, built on the
device and kept in the run's folder for the sections after it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
Row = tuple[str, float | None, str]
BATCHES = (8, 2)
KINDS = {"sd15": "Stable Diffusion 1.5", "dit-xl": "DiT-XL/2", "sd21": "Stable Diffusion 2.1"}
TWO = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1, "attention_head_dim": 8}
TWO |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (32, 64)}
NARROW = {kind: TWO | {"cross_attention_dim": 32, "sample_size": 8} for kind in ("sd15", "sd21")}
NARROW["dit-xl"] = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
# How names of kernels tell what they do; the first that fits.
WORDS = {"attention": "flash|fmha|mha|attention|sdpa|softmax", "copies": "memcpy|memset|transpose|nchw|nhwctonchw|copy"}
WORDS |= {"convolutions": "conv|fprop|dgrad|wgrad|implicit", "products": "gemm|nvjet|cutlass|cublas|splitk|mm"}
WORDS |= {"norms": "norm", "optimizer": "adam|multi_tensor|foreach|lerp", "generated": "triton"}
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, NVIDIA's data sheets
DIT_L = ["denoiser.kind=dit", "text_encoder.kind=class", "autoencoder.latent_channels=4", "train.precision=bf16"]
DIT_L += ["autoencoder.block_out_channels=[32,32,32,32]", "autoencoder.norm_num_groups=32"]
DIT_L += ["train.denoiser.optimizer=adamw", "train.denoiser.lr=0.0001"]  # as Peebles & Xie 2023 train them
MUON = ["train.denoiser.optimizer=muon"]
LARGE = ["dit.size=L", "data.resolution=256", "train.denoiser.batch_size=128"]
SMALL = ["dit.size=custom", "dit.num_layers=1", "dit.num_attention_heads=2", "dit.attention_head_dim=8"]
SMALL += ["data.resolution=32", "train.denoiser.batch_size=2"]
TINY_RUN = ["data.resolution=16", "data.samples=64", "train.precision=fp32", "train.validation_samples=0"]
TINY_RUN += ["autoencoder.block_out_channels=[8,16]", "autoencoder.norm_num_groups=4", "train.autoencoder.steps=10"]
TINY_RUN += ["unet.block_out_channels=[8]", 'unet.down_block_types=["CrossAttnDownBlock2D"]', "unet.norm_num_groups=4"]
TINY_RUN += ["unet.attention_head_dim=2", "text_encoder.hidden_size=16", "text_encoder.intermediate_size=16"]
TINY_RUN += ["text_encoder.num_attention_heads=2", "text_encoder.num_hidden_layers=1", "train.denoiser.steps=10"]
TINY_RUN += [f"train.{stage}.{k}" for stage in ("autoencoder", "denoiser") for k in ("batch_size=4", "sample_every=99")]


@dataclass(frozen=True)
class Place:
    """Where to measure: a device, whether models are tiny, and the folder for what is built."""

    device: str
    tiny: bool
    folder: Path

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def request(self, d: Any) -> Any:
        """How a model of this description draws by itself; images of few pixels where all is tiny."""
        from tinydiff.pipeline import Request

        side, g = min(d.size, 2 * d.multiple) if self.tiny else d.size, d.generate
        return Request(g.steps, g.cfg_scale, g.sampler, g.spacing, side, side)

    def memory(self) -> int:
        """Bytes in use: all of the card's, whoever has them, or the most that this process has had of a CPU's."""
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            return total - free
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- models ----------------------------------------------------------------------------------------------------------


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """What `make` puts at a path, once: other processes wait for it."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            shutil.rmtree(beside := path.with_name(f"new-{path.name}"), ignore_errors=True)  # what was not finished
            make(beside)
            beside.rename(path)
    return path


def weights(at: Place, kind: str) -> Path:
    """The folder of a model: random, in half precision, built on the device; or the shipped one."""
    from parity import build

    if kind == "shipped":
        from tinydiff.backends import find_model

        return find_model(None)

    def make(path: Path) -> None:
        with torch.device(at.device):
            build(kind, path, NARROW[kind] if at.tiny else None, torch.float16)

    return made(at.folder / kind, make)


def bundle(at: Place, kind: str, precision: str) -> Path:
    """Its graphs, exported for the device; those of large random weights are not compared with torch, which takes minutes."""
    from tinydiff.checkpoints import folder
    from tinydiff.checkpoints.source import Source
    from tinydiff.export import Form, export, write

    source, device = Source(weights(at, kind)), "cuda" if at.device == "cuda" else "any"

    def make(path: Path) -> None:
        if kind == "shipped":
            export(source, path, precision, device=device)
        else:
            path.mkdir()
            write(folder.load(source), source.path, path, Form(precision, device=device), defaultdict(list))

    return made(at.folder / f"{kind}-{precision}", make)


def few_threads() -> None:
    """Leave processors to what is measured meanwhile."""
    torch.set_num_threads(max(1, torch.get_num_threads() // 4))


def opened(at: Place, kind: str, runtime: str) -> Any:
    """A backend for "onnx fp16", "torch bf16" or "torch fp16 compiled"."""
    from tinydiff.backends.onnx import OnnxBackend
    from tinydiff.backends.pytorch import TorchBackend
    from tinydiff.checkpoints.source import Source

    name, precision, *compiled = runtime.split()
    if name == "onnx":
        return OnnxBackend(Source(bundle(at, kind, precision)), at.device)
    backend = TorchBackend.open(Source(weights(at, kind)), at.device, precision, bool(compiled) and not at.tiny)
    if compiled and at.tiny:  # the way there, without a minute of compilation
        backend.model.denoiser.compile(backend="eager")
    return backend


# ---- parity ----------------------------------------------------------------------------------------------------------


def calls(at: Place, backend: Any) -> dict[str, np.ndarray]:
    """Every network's answer to the same inputs, and images by the model's own settings."""
    from tinydiff.pipeline import generate

    d, rng, request = backend.description, np.random.default_rng(0), at.request(backend.description)
    (name, tokenizer), side = next(iter(backend.tokenizers.items())), request.width // d.factor
    told = backend.encode_text({name: tokenizer.encode(["red heart", "blue circle"])})
    x = rng.standard_normal((2, d.latent_channels, side, side)).astype(np.float32)
    pixels = (rng.random((2, 3, request.width, request.width)) * 2 - 1).astype(np.float32)
    answers = {"text": told["encoder_hidden_states"], "denoiser": backend.denoise(x, 601.0, told)}
    answers |= {"encoder": backend.encode_image(pixels), "decoder": backend.decode(x)}
    return answers | {"image": generate(backend, ["red heart", "blue circle"], [0, 1], request)}


def parity(at: Place, runtime: str) -> Iterator[Row]:
    """The shipped model on the device against torch's float32 on the CPU."""
    cpu = Place("cpu", at.tiny, at.folder)
    exact, got = (calls(at, opened(place, "shipped", r)) for place, r in ((cpu, "torch fp32"), (at, runtime)))
    wanted, drawn = (each.pop("image").astype(int) for each in (exact, got))
    apart = {name: float(np.abs(got[name] - exact[name]).max() / exact[name].std()) for name in exact}
    error, near = np.square(wanted - drawn).mean(), (np.abs(wanted - drawn).max(axis=-1) <= 2).mean()
    told = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
    image = f"image {10 * np.log10(255**2 / error):.1f} dB" if error else "image equal"
    yield f"parity, {runtime}", max(apart.values()), f"{told} deviations; {image}, {near:.2%} of pixels within 2/255"


# ---- speed -----------------------------------------------------------------------------------------------------------


def timed(at: Place, call: Callable[[], object], seconds: float = 2.0) -> list[float]:
    """Seconds a call, sorted, after three that warm up; of runs that share a folder, one is timed at once."""
    for _ in range(1 if at.tiny else 3):
        call()
    with open(at.folder / "timing.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        call()
        at.sync()
        times, end = list[float](), time.perf_counter() + (0.05 if at.tiny else seconds)
        while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
            begun = time.perf_counter()
            call()
            at.sync()
            times.append(time.perf_counter() - begun)
    return sorted(times)


def spoken(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e3:.2f} ms ({times[0] * 1e3:.2f} to {times[-1] * 1e3:.2f})"


def kernels(at: Place, row: str, call: Callable[[], object]) -> Row:
    """What the device computes in a call, and for how long: sums over its kernels by torch's profiler, mean of three calls."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if at.device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as seen:
        for _ in range(3):
            call()
        at.sync()
    sums = defaultdict[str, float](float)
    for each in seen.key_averages():
        spent = each.self_device_time_total if at.device == "cuda" else each.self_cpu_time_total
        sums[next((name for name, words in WORDS.items() if re.search(words, each.key, re.IGNORECASE)), "others")] += (
            spent
        )
    parts = ", ".join(f"{name} {us / 3e3:.2f}" for name, us in sorted(sums.items(), key=lambda item: -item[1]) if us)
    return f"{row}, kernels", sum(sums.values()), f"{sum(sums.values()) / 3e3:.2f} ms: {parts}"


def ceiling(at: Place, dtype: torch.dtype = torch.float16) -> float:
    """FLOP/s of a large matrix product."""
    n = 256 if at.tiny else 8192
    a, b = (torch.randn(n, n, device=at.device).to(dtype) for _ in range(2))
    return 2 * n**3 / statistics.median(timed(at, lambda: a @ b, 0.5))


def products(at: Place) -> Iterator[Row]:
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        found = ceiling(at, dtype)
        yield f"matrix product, {name}", found, f"{found / 1e12:.4g} TFLOP/s"


def speed(at: Place, kind: str, runtime: str) -> Iterator[Row]:
    """Calls of a denoiser at its own size, and their share of the matrix product by FLOPs."""
    from tinydiff.checkpoints.source import Source
    from tinydiff.cost import costs
    from tinydiff.networks import graphs

    source = Source(weights(at, kind))
    name, table = source.denoiser, source.configs[source.denoiser]
    side = table["sample_size"]
    flops = costs({name: table}, side, side, 77)[name]["flops"]
    most, before = ceiling(at), at.memory()
    asked = diffusers(at, source, "compiled" in runtime) if runtime.startswith("diffusers") else ours(at, kind, runtime)
    for batch in BATCHES:
        sizes, rng = {"batch": batch, "sequence": 77, "height": side, "width": side}, np.random.default_rng(0)
        arrays = {k: a for k, a in graphs(source.configs)[name].inputs.items() if k != "timestep"}
        inputs = {k: rng.standard_normal(a.shape(sizes)).astype(np.float32) for k, a in arrays.items()}
        torch._dynamo.reset()  # each batch is compiled for itself
        call = asked(inputs)
        times = timed(at, call)
        middle, used = statistics.median(times), (at.memory() - before) / 1e9
        told = f"{spoken(times)}, {batch * flops / middle / most:.1%} of the matrix product, {used:.2f} GB"
        yield f"{KINDS[kind]}, batch {batch}, {runtime}", middle, told
        if batch == BATCHES[0]:
            yield kernels(at, f"{KINDS[kind]}, batch {batch}, {runtime}", call)


def ours(at: Place, kind: str, runtime: str) -> Callable[[dict[str, np.ndarray]], Callable[[], object]]:
    """A call through the backend, numpy to numpy. Raises RuntimeError where half precision overflowed and was given up."""
    backend = opened(at, kind, runtime)

    def asked(inputs: dict[str, np.ndarray]) -> Callable[[], object]:
        x, told = inputs["sample"], {k: v for k, v in inputs.items() if k != "sample"}

        def call() -> None:
            backend.denoise(x, 601.0, told)
            if backend.name == "torch" and next(backend.model.denoiser.parameters()).dtype != torch.float16:
                raise RuntimeError("the denoiser overflows in fp16")

        for _ in range(2):  # on CUDA torch's second call is recorded
            call()
        if problem := getattr(getattr(backend, "predict", None), "problem", ""):
            print(f"batch {len(x)} is not recorded: {problem}")  # in the section's log
        return call

    return asked


def diffusers(at: Place, source: Any, compiled: bool) -> Callable[[dict[str, np.ndarray]], Callable[[], object]]:
    """A call of diffusers' own network, its inputs on the device already."""
    import diffusers as library

    table, name = source.configs[source.denoiser], source.denoiser
    kind = getattr(library, table["_class_name"])
    network = kind.from_pretrained(source.path / name, torch_dtype=torch.float16).to(at.device).eval()
    network = network.to(memory_format=torch.channels_last)
    run = torch.compile(network, backend="eager" if at.tiny else "inductor") if compiled else network

    def asked(inputs: dict[str, np.ndarray]) -> Callable[[], object]:
        x, context = (torch.from_numpy(v).to(at.device, torch.float16) for v in inputs.values())
        t = torch.full((len(x),), 601, device=at.device)
        labels = torch.zeros(len(x), dtype=torch.long, device=at.device)
        more = {"class_labels": labels} if name == "transformer" else {"encoder_hidden_states": context}

        @torch.inference_mode()
        def call() -> None:
            run(x, timestep=t, **more)

        return call

    return asked


def shipped(at: Place, runtime: str) -> Iterator[Row]:
    """Images a second of the shipped model, from prompts to pixels, by its own settings."""
    from tinydiff.pipeline import generate

    backend, count = opened(at, "shipped", runtime), 2 if at.tiny else 64
    request = at.request(backend.description)
    times = timed(at, lambda: generate(backend, ["red heart"] * count, range(count), request))
    rate = count / statistics.median(times)
    yield (
        f"shipped model, batch 64, {runtime}",
        rate,
        f"{rate:.1f} images/s ({count / times[-1]:.1f} to {count / times[0]:.1f})",
    )


def first_image(at: Place, kind: str, runtime: str) -> Iterator[Row]:
    """The command as a whole, from the shell to the file, three times."""
    from bench import measure

    name, *precision = runtime.split()
    path = bundle(at, kind, precision[0]) if name == "onnx" else weights(at, kind)
    command = [sys.executable, "-m", "tinydiff", "generate", "red heart", "-m", str(path), "--device", at.device]
    command += ["--backend", name, "-s", "1", "-o", str(at.folder / "x.png"), "--force"]
    command += ["--precision", *precision] if name == "torch" else []
    command += ["-W", "32", "-H", "32", "--steps", "2"] if at.tiny else []
    times = sorted(measure(command)[0] for _ in range(1 if at.tiny else 3))
    yield f"first image, {KINDS.get(kind, 'shipped model')}, {runtime}", times[len(times) // 2], spoken(times)


# ---- training --------------------------------------------------------------------------------------------------------


def training(at: Place, row: str, compiled: bool, changed: Sequence[str] = ()) -> Iterator[Row]:
    """Steps of the training loop on DiT-L/2, three times the forward pass's FLOPs each."""
    from bench import prepared

    from tinydiff.cost import costs
    from tinydiff.training.loop import parts_of, step
    from tinydiff.training.saver import Ahead

    changes = [*DIT_L, *changed, *(SMALL if at.tiny else LARGE), f"train.device={at.device}"]
    changes += [f"train.compile={str(compiled and not at.tiny).lower()}"]
    with prepared(None, *changes) as (run, task, state):
        table, batch = run.model.configs["transformer"], task.settings.batch_size
        flops = 3 * batch * costs({"transformer": table}, *[table["sample_size"]] * 2, 1)["transformer"]["flops"]
        coming = iter(Ahead(partial(parts_of, task), range(10**6), 600))
        most = ceiling(at, torch.bfloat16)
        call = lambda: step(run, task, state, *next(coming))  # noqa: E731
        times = timed(at, call, 6.0)
        computed = kernels(at, row, call)
    speed = flops / statistics.median(times)
    card = torch.cuda.get_device_name() if at.device == "cuda" else ""
    peak = next((peak for name, peak in PEAKS.items() if all(word in card for word in name.split())), None)
    told = f"{spoken(times)}, {speed / 1e12:.4g} TFLOP/s, {speed / most:.1%} of the matrix product"
    told += f", {speed / peak:.1%} of the card's peak" if peak else ""
    yield row, speed / (peak or most), told
    yield computed


def nccl(at: Place) -> Iterator[Row]:
    """A run whose lone process meets itself as torchrun's do learns what one does that meets nobody."""
    from tinydiff import config
    from tinydiff.training import loop
    from tinydiff.training.parallel import World

    def losses(name: str) -> list[float]:
        cfg = config.load(None, [*TINY_RUN, f"train.device={at.device}"])
        loop.run(cfg, at.folder / name)
        rows = (at.folder / name / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, rows) if "loss" in row]

    alone = losses("alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(one | dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo"))
    World.__enter__ = lambda world: (world.meet(), world)[1]  # type: ignore[method-assign]
    apart = max(abs(a - b) / a for a, b in zip(alone, losses("met"), strict=True))
    yield "nccl in a world of one", apart, f"{len(alone)} losses, at most {apart:.1e} from a lone process's"


def tests(at: Place) -> Iterator[Row]:
    """The tests that need a GPU, from the files that have any."""
    marked = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", *marked]
    command += ["--collect-only"] if at.tiny else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout, done.stderr)
    said = (done.stdout.strip() or done.stderr.strip() or "said nothing").splitlines()[-1]
    if done.returncode not in (0, 1):
        raise RuntimeError(said)
    yield "pytest -m gpu", float(done.returncode), said
