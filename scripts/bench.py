"""Speed and memory as ratios against named peers, each pair run in turn, several times, in one call.

    python scripts/bench.py [startup] [generate] [lora] [pipe] [unet] [train] [save] [samplers] [full] [--runs N] [--model DIR]
                            [--folder DIR] [--older DIR]

startup   `tinydiff --help` against `python -c "import typer"`
generate  `tinydiff generate` of one image, whole process, against a diffusers script with the same weights, and against
          a bare script that opens the same ONNX sessions and loops in numpy (the floor); on a machine that has never opened the
          model ("first") and on one that has, so that graphs are optimised and files verified
lora      `tinydiff generate --lora` of one image on a bundle, whole process, against the same without: a file of rank 8 for all
          attention at a strength that is new ("first"), and at one that it had before; with --folder also on a bundle of
          Stable Diffusion 1.5's size, one step of 128x128 pixels (not run unless named)
pipe      64 prompts from a pipe, against the tree of an older version (--older)
unet      the share of a matrix product's speed at which the denoiser computes 8 images, both on one core
train     steps of the denoiser stage through the training loop, batches and metrics included, against forward + backward +
          optimizer on one batch, and against a script with accelerate and diffusers of the same sizes
save      how long a checkpoint keeps the next update waiting, against how long it takes to be written
samplers  the arithmetic of each solver, a step of 8 latents of 4x64x64, against one call of a network of Stable Diffusion's
          size on them (minutes and 4 GB; not run unless named)
full      Stable Diffusion 1.5's size with random weights, against diffusers: one network call of two 64x64 latents on torch
          and through the exported bundle, from process start to the first call, and the memory of an image of 512x512
          (half an hour, 16 GB of memory, 9 GB of disk; not run unless named; --folder keeps the models)

Prints one line a comparison: the median ratio with its least and greatest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

DIFFUSERS = """
import sys
from diffusers import StableDiffusionPipeline
import torch
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(1)
size = int(sys.argv[3])
image = pipe("red heart", num_inference_steps=20, guidance_scale=3.0, height=size, width=size, generator=generator).images[0]
image.save(sys.argv[2])
"""

FLOOR = """
import json, sys
from pathlib import Path
import numpy as np
import onnxruntime as ort
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
model, out, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
options = ort.SessionOptions()
options.log_severity_level = 4
text, unet, decoder = (ort.InferenceSession(model / n / "model.onnx", options, providers=["CPUExecutionProvider"])
                       for n in ("text_encoder", "unet", "vae_decoder"))
vocab = json.loads((model / "tokenizer/vocab.json").read_text())
merges = [tuple(l.split()) for l in (model / "tokenizer/merges.txt").read_text().splitlines()[1:] if l]
bpe = Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>"))
bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
length = json.loads((model / "tokenizer/tokenizer_config.json").read_text())["model_max_length"]
bos, eos = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
ids = [[bos, *bpe.encode(t).ids, eos] for t in ("", "red heart")]
ids = np.array([i + [eos] * (length - len(i)) for i in ids], np.int64)
context = text.run(["last_hidden_state"], {"input_ids": ids})[0]
vae = json.loads((model / "vae_decoder/config.json").read_text())
side = size // 2 ** (len(vae["block_out_channels"]) - 1)
f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
t = np.arange(1000)
bars = np.cumprod(1 - np.minimum(1 - f((t + 1) / 1000) / f(t / 1000), 0.999))
x = np.random.default_rng(1).standard_normal((1, vae["latent_channels"], side, side), np.float32)
steps = [round(1000 - i * 50) - 1 for i in range(20)]
for i, t in enumerate(steps):
    a, s = np.float32(bars[t] ** 0.5), np.float32((1 - bars[t]) ** 0.5)
    b = bars[steps[i + 1]] if i < 19 else 1.0
    feed = {"sample": np.concatenate([x, x]), "timestep": np.array(t, np.float32), "encoder_hidden_states": context}
    v = unet.run(None, feed)[0]
    v = v[:1] + np.float32(3) * (v[1:] - v[:1])
    x0, eps = a * x - s * v, s * x + a * v
    x = np.float32(b ** 0.5) * x0 + np.float32((1 - b) ** 0.5) * eps
pixels = decoder.run(None, {"latent_sample": x / np.float32(vae["scaling_factor"])})[0][0]
Image.fromarray(((pixels.transpose(1, 2, 0) / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)).save(out)
"""


def measure(command: list[str], stdin: str | None = None, **env: str) -> tuple[float, float]:
    """Wall-clock seconds and peak resident bytes of a command, which must succeed."""
    begun = time.perf_counter()
    given = open(stdin) if stdin else None  # noqa: SIM115
    process = subprocess.Popen(
        command, stdin=given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | env
    )
    assert process.stderr
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[:3]} failed: {said.decode()[-2000:]}")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024.0


def compare(name: str, runs: int, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
    """Run both in turn and print the ratio ours/theirs."""
    ratios = [ours() / theirs() for _ in range(runs)]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"{name}: {middle:.3f} (min {low:.3f}, max {high:.3f}, {runs} runs)", flush=True)


def startup(runs: int) -> None:
    for flag in ("--help", "--version"):
        ours, theirs = [sys.executable, "-m", "tinydiff", flag], [sys.executable, "-c", "import typer"]
        compare(
            f"time, tinydiff {flag} / import typer", runs, lambda c=ours: measure(c)[0], lambda c=theirs: measure(c)[0]
        )


def generate(runs: int, model: Path) -> None:
    from tinydiff.checkpoints.source import Source

    size = str(Source(model).description.size)
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/x.png"
        tail = ["-m", str(model), "-o", out, "--force", "--steps", "20", "--cfg-scale", "3", "--sampler", "ddim"]
        ours = [sys.executable, "-m", "tinydiff", "generate", "red heart", *tail]
        kept = {"XDG_CACHE_HOME": f"{folder}/kept"}
        (
            measure(ours, **kept),
            time.sleep(2.1),
            measure(ours, **kept),
        )  # files younger than two seconds are not remembered
        for name, script in (("diffusers", DIFFUSERS), ("floor", FLOOR)):
            theirs = [sys.executable, "-c", script, str(model), out, size]
            for when in ("first", "later"):
                pairs = []
                for n in range(runs):
                    cache = kept if when == "later" else {"XDG_CACHE_HOME": f"{folder}/{name}{n}"}
                    pairs.append((measure(ours, **cache), measure(theirs)))
                for what, i in (("time", 0), ("peak memory", 1)):
                    numbers = iter([v[i] for pair in pairs for v in pair])
                    label = f"{what}, tinydiff generate ({when}) / {name}"
                    compare(label, runs, lambda n=numbers: next(n), lambda n=numbers: next(n))


def lora(runs: int, model: Path, full: Path | None) -> None:
    """Time to the first image."""
    bundles = [("shipped", model, [])]
    if full:
        size = ["--steps", "1", "-W", "128", "-H", "128"]
        bundles.append(("Stable Diffusion 1.5's size", of_full_size(full)[1], size))
    for name, bundle, more in bundles:
        with tempfile.TemporaryDirectory() as folder:
            file, kept = attention_lora(bundle, Path(folder, "lora.safetensors")), {"XDG_CACHE_HOME": f"{folder}/kept"}
            command = [sys.executable, "-m", "tinydiff", "generate", "red heart", "-m", str(bundle), *more]
            command += ["-o", f"{folder}/x.png", "--force"]

            def drawn(strength: float = 0, command: list[str] = command, file: Path = file, kept: dict = kept) -> float:
                return measure([*command, *(["--lora", f"{file}:{strength:g}"] if strength else [])], **kept)[0]

            drawn(), time.sleep(2.1), drawn()  # files younger than two seconds are not remembered
            strengths = iter(range(1, runs + 1))
            compare(
                f"time, generate --lora (first) / without, {name}",
                runs,
                lambda s=strengths: drawn(next(s) / 100),
                drawn,
            )
            compare(f"time, generate --lora (later) / without, {name}", runs, lambda: drawn(0.01), drawn)


def attention_lora(model: Path, path: Path) -> Path:
    """A file of rank 8 that changes all attention of a model's denoiser."""
    import numpy as np

    from tinydiff.adapters import lora as files
    from tinydiff.checkpoints.source import Source

    source, rng = Source(model), np.random.default_rng(0)
    layers = files.layers_of({source.denoiser: source.shapes(source.denoiser)})
    ends, changes = (".to_q", ".to_k", ".to_v", ".to_out.0"), dict[str, files.LowRank]()
    for name, (out, reads, *_) in layers.items():
        if name.endswith(ends):
            down, up = (rng.standard_normal(shape, np.float32) / 64 for shape in ((8, reads), (out, 8)))
            changes[name] = files.LowRank(down, up, 8)
    files.write(path, changes)
    return path


def pipe(runs: int, model: Path, older: Path) -> None:
    """The whole process, of 64 prompts that come at once."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts")
        prompts.write_text("".join(f"a {colour} {thing}\n" for colour in COLOURS for thing in THINGS))
        command = [
            sys.executable,
            "-m",
            "tinydiff",
            "generate",
            "-",
            "-m",
            str(model),
            "-o",
            f"{folder}/out/",
            "--force",
        ]

        def drawn(tree: Path) -> float:
            return measure(command, str(prompts), PYTHONPATH=str(tree), XDG_CACHE_HOME=f"{folder}/kept")[0]

        ours = Path(__file__).resolve().parents[1]
        drawn(ours), time.sleep(2.1), drawn(ours)
        compare("time, 64 prompts from a pipe / by the older version", runs, lambda: drawn(ours), lambda: drawn(older))


def unet(runs: int, model: Path) -> None:
    """On one core, which onnxruntime and torch take for all there are."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import numpy as np
    import torch

    from tinydiff.backends import open_backend
    from tinydiff.checkpoints.source import Source
    from tinydiff.cost import costs

    torch.set_num_threads(1)
    source = Source(model)
    backend, d = open_backend(source, "onnx", "cpu"), source.description
    side, rng = d.size // d.factor, np.random.default_rng(0)
    tokens = next(iter(backend.tokenizers.values())).max_length
    x = rng.standard_normal((8, d.latent_channels, side, side), np.float32)
    told = backend.encode_text({name: np.zeros((8, tokens), np.int64) for name in backend.tokenizers})
    operations = 8 * costs(source.configs, side, side, tokens, d.factor)[source.denoiser]["flops"]
    a, count = torch.randn(1024, 1024), operations / (2 * 1024**3)
    network, product = lambda: backend.denoise(x, 500.0, told), lambda: a @ a
    network(), product()
    name = "time, a matrix product of as many operations / a call of the denoiser on 8 images, one core"
    compare(
        name,
        runs,
        lambda: repeated(product, clock=time.process_time) * count,
        lambda: repeated(network, clock=time.process_time),
    )


class Captions:
    """A source of 512 captions, all that a training step asks for when its latents are cached."""

    skipped = ()

    def __len__(self) -> int:
        return 512

    def captions(self, i: int) -> list[str]:
        return [f"image number {i}"]

    def weight(self, i: int) -> float:
        return 1.0


class Latents:
    """512 latents in memory."""

    def __init__(self, shape: tuple[int, ...]):
        import numpy as np
        import torch

        self.mean, self.valid, self.scaling_factor = torch.randn(512, *shape), np.ones(512, bool), 1.0

    def rows(self, indices) -> tuple:
        return self.mean[indices], self.mean[indices].abs() * 0.1


STEPS = 8  # timed together
COLOURS = ["red", "blue", "green", "yellow", "pink", "black", "white", "orange"]
THINGS = ["heart", "cat", "dog", "house", "tree", "star", "face", "car"]


@contextlib.contextmanager
def prepared(config: Path | None, *changes: str) -> Iterator[tuple]:
    """(run, task, training) of the denoiser's stage on random latents, before its first step; `changes` are KEY=VALUE."""
    import torch

    from tinydiff import config as configuration
    from tinydiff.checkpoints import folder
    from tinydiff.data.dataset import Images
    from tinydiff.training import encoding
    from tinydiff.training.denoiser import DenoiserTask
    from tinydiff.training.parallel import spread
    from tinydiff.training.run import Run
    from tinydiff.training.runtime import Runtime
    from tinydiff.training.state import Learner, Training

    own = ["data.path=bench", "data.flip=false", "data.held_out=0", f"train.threads={torch.get_num_threads()}"]
    cfg = configuration.load(config, [*own, "text_encoder.vocab_size=1024", *changes])
    side = cfg.data.resolution // 2 ** (len(cfg.autoencoder.block_out_channels) - 1)
    latents = Latents((cfg.autoencoder.latent_channels, side, side))
    with Runtime(cfg) as runtime, tempfile.TemporaryDirectory() as run_dir:
        run = Run(runtime, Path(run_dir))
        run.model = folder.build(cfg, cfg.text_network.make_tokenizer(cfg, Captions()))
        for part in run.model.networks.values():
            runtime.placed(part)
        run.data = Images(Captions(), cfg.data)  # type: ignore[arg-type]
        with patch.object(encoding, "images", lambda run: latents):
            task = DenoiserTask(run)
        task.rows = [range(task.settings.batch_size)]
        for player in task.players.values():
            player.network = spread(player.network, player.parts, runtime.world, cfg.train, runtime.dtype)
        players = task.players.items()
        training = Training([Learner.of(name, p.module, p.settings, runtime.world) for name, p in players])
        yield run, task, training


def train(runs: int, config: Path) -> None:
    """The loop's step, batches and metrics included, against the bare step on one fixed batch, and against accelerate."""
    import torch
    from torch.nn import functional as F

    from tinydiff.training.loop import parts_of, step
    from tinydiff.training.metrics import Metrics
    from tinydiff.training.saver import Ahead

    with prepared(config) as (run, task, training):
        log = Metrics(run.dir, task.name, 0, task.settings.batch_size)
        coming = iter(Ahead(lambda n: parts_of(task, n), range(10**6), 600))
        (fixed,), (learner,) = parts_of(task, 0), training.learners
        network, x = task.players[task.name].network, fixed["sample"].to(memory_format=torch.channels_last)

        def bare() -> None:
            with run.runtime.autocast(), run.runtime.attention():
                output = network(x, fixed["timestep"], fixed["tokens"], fixed["condition"])
                loss = F.mse_loss(output.float(), fixed["target"])
            loss.backward()
            learner.optimizer.step()
            learner.optimizer.zero_grad(set_to_none=True)

        def ours() -> None:
            n, batch = next(coming)
            log.add(n + 1, step(run, task, training, n, batch).values)

        tokens = task.model.tokenizers["text_encoder"].encode([f"image number {i}" for i in range(512)])
        theirs = accelerated(task.model.configs["unet"], run.cfg, task.latents.mean, tokens)
        for call in (bare, ours, theirs):
            repeated(call, 2)
        compare("time, training step / bare step", runs, lambda: repeated(ours), lambda: repeated(bare))
        name = "time, training step / accelerate and diffusers"
        compare(name, runs, lambda: repeated(ours), lambda: repeated(theirs))


def save(runs: int, config: Path) -> None:
    """How long a save keeps the training from its next update, against how long the save itself takes."""
    from tinydiff.training import loop
    from tinydiff.training.saver import Saver

    with prepared(config) as (run, task, training), contextlib.closing(Saver()) as saver:
        batch = loop.parts_of(task, 0)
        loop.step(run, task, training, 0, batch)
        n, held = iter(range(1, 10**6)), [0.0]

        def commit() -> None:
            loop.commit(run, task, training, saver, next(n), 0)

        def beside() -> float:
            """Seconds of a step in which it waits for a save that begins before it."""
            held[0] = repeated(commit, 1)

            def settle() -> None:
                held[0] += repeated(saver.settle, 1)

            loop.step(run, task, training, 1, batch, settle)
            saver.wait()
            return held[0]

        def alone() -> None:
            commit()
            saver.wait()

        beside()  # which makes the memory of the copy
        compare("time, training held up by a save / save", runs, beside, lambda: repeated(alone, 1))
    size = sum(piece.tensor.nbytes for piece in training.pieces)
    print(f"of {size / 1e6:.0f} MB of weights, their average and two moments, and the model folder")


def repeated(call: Callable[[], object], times: int = STEPS, clock: Callable[[], float] = time.perf_counter) -> float:
    begun = clock()
    for _ in range(times):
        call()
    return clock() - begun


def accelerated(unet: dict, cfg, latents, ids) -> Callable[[], None]:
    """A step of the usual script: accelerate, UNet2DConditionModel and CLIPTextModel of our sizes, EMA, clipping."""
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader, TensorDataset
    from transformers import CLIPTextConfig, CLIPTextModel

    text, stage = cfg.text_encoder, cfg.train.denoiser
    from tinydiff.training.runtime import Runtime

    accelerator = Accelerator(mixed_precision="bf16" if Runtime(cfg).dtype is torch.bfloat16 else "no", cpu=True)
    network = UNet2DConditionModel.from_config({k: v for k, v in unet.items() if not k.startswith("_")})
    sizes = {
        k: getattr(text, k) for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    clip = CLIPTextConfig(vocab_size=1024, max_position_embeddings=ids.shape[1], eos_token_id=1023, **sizes)
    encoder = CLIPTextModel(clip)
    noises = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    parameters = [*network.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=stage.weight_decay, fused=True)
    loader = DataLoader(TensorDataset(latents, torch.from_numpy(ids)), stage.batch_size, shuffle=True, drop_last=True)
    rates = get_cosine_schedule_with_warmup(optimizer, stage.warmup, stage.steps)
    network, encoder, optimizer, loader, rates = accelerator.prepare(network, encoder, optimizer, loader, rates)
    average = EMAModel(network.parameters(), decay=stage.ema)

    def batches():
        while True:
            yield from loader

    coming = batches()

    def call() -> None:
        x, tokens = next(coming)
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (x.shape[0],))
        noisy, target = noises.add_noise(x, noise, t), noises.get_velocity(x, noise, t)
        with accelerator.autocast():
            output = network(noisy, t, encoder(tokens)[0]).sample
        loss = torch.nn.functional.mse_loss(output.float(), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        loss.item()

    return call


def samplers() -> None:
    """The dearest solver's share of a network call."""
    import numpy as np
    import torch

    from tinydiff.config import UNet as Settings
    from tinydiff.diffusion.samplers import SAMPLERS
    from tinydiff.diffusion.schedules import SCHEDULES, sampling_levels
    from tinydiff.models.unet import UNet

    cross = ("CrossAttnDownBlock2D",) * 3
    unet = UNet(Settings((320, 640, 1280, 1280), (*cross, "DownBlock2D"), 2, 1, 8, 32, False), 4, 768)
    x = torch.randn(8, 4, 64, 64)
    with torch.inference_mode():
        begun = time.perf_counter()
        unet(x, torch.tensor(500.0), torch.randn(8, 77, 768))
    call = time.perf_counter() - begun
    levels, start = sampling_levels(SCHEDULES["scaled_linear"](1000), 20), x.numpy()
    costs = {}
    for name, sampler in SAMPLERS.items():
        begun = time.perf_counter()
        for _ in sampler(lambda x, level: start, np.array(start), levels, lambda i: start):
            pass
        costs[name] = (time.perf_counter() - begun) / 20
    worst = max(costs, key=lambda name: costs[name])
    print(f"time, a step of {worst} (the dearest sampler) / one network call: {costs[worst] / call:.1e}")


FIRST_CALL = """
import sys
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.unet.forward = lambda *a, **k: sys.exit(0)
pipe("red heart", num_inference_steps=20, height=512, width=512)
"""

OUR_FIRST_CALL = """
import sys
from pathlib import Path
from tinydiff.backends import open_backend
from tinydiff.checkpoints.source import Source
from tinydiff.pipeline import Request, generate
backend = open_backend(Source(Path(sys.argv[1])), wait=False)
if backend.name == "onnx":
    backend.sessions[backend.denoiser].result()
backend.denoise = lambda *a: sys.exit(0)
generate(backend, ["red heart"], [0], Request(20, 7.5, "plms", "leading", 512, 512))
"""

ACTIVATIONS = """
import sys
from pathlib import Path
import numpy as np
from tinydiff.backends import open_backend
from tinydiff.checkpoints.source import Source

def resident(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

backend = open_backend(Source(Path(sys.argv[1])), "torch", "cpu")
for part in backend.model.networks.values():
    for p in part.parameters():
        p.sum()  # every page of the weights is resident
before = resident("VmRSS")
x = np.zeros((2, 4, 64, 64), np.float32)
backend.denoise(x, 500.0, {"encoder_hidden_states": np.zeros((2, 77, 768), np.float32)})
backend.decode(x[:1])
print(resident("VmHWM") - before)
"""


def of_full_size(folder: Path) -> tuple[Path, Path]:
    """A folder and a bundle of Stable Diffusion 1.5's size, with random weights."""
    from parity import build

    weights, graphs = folder / "sd15", folder / "sd15-onnx"
    if not weights.exists():
        build("sd15", weights)
    if not graphs.exists():
        measure([sys.executable, "-m", "tinydiff", "export", str(weights), "-o", str(graphs)])
    return weights, graphs


def full(runs: int, folder: Path) -> None:
    """Stable Diffusion 1.5's size against diffusers."""
    weights, graphs = of_full_size(folder)
    # First, since a child's peak begins with what its parent holds.
    size = sum(p.stat().st_size for p in weights.rglob("*.safetensors"))
    said = subprocess.run([sys.executable, "-c", ACTIVATIONS, str(weights)], capture_output=True, text=True, check=True)
    command = [sys.executable, "-m", "tinydiff", "generate", "red heart", "-m", str(weights), "--steps", "1", "-s", "1"]
    peak = measure([*command, "-o", str(folder / "x.png"), "--force"])[1]
    print(
        f"peak memory of a 512x512 image / weights and one call's activations: {peak / (size + int(said.stdout)):.3f}"
    )
    for name, ours in (("torch", weights), ("onnx", graphs)):
        a, b = ([sys.executable, "-c", s] for s in (OUR_FIRST_CALL, FIRST_CALL))
        compare(
            f"time, process start to first network call, {name} / diffusers",
            runs,
            lambda c=[*a, str(ours)]: measure(c)[0],
            lambda c=[*b, str(weights)]: measure(c)[0],
        )
    network_calls(runs, weights, graphs)


def network_calls(runs: int, weights: Path, graphs: Path) -> None:
    """One call of two latents, the three runtimes in turn."""
    import numpy as np
    import torch
    from diffusers import UNet2DConditionModel

    from tinydiff.backends import open_backend
    from tinydiff.checkpoints.source import Source

    theirs = UNet2DConditionModel.from_pretrained(weights / "unet").eval()
    x, context = np.random.default_rng(0).standard_normal((2, 4, 64, 64), np.float32), np.zeros((2, 77, 768), "f4")
    told = {"encoder_hidden_states": context}

    def diffusers() -> None:
        with torch.inference_mode():
            theirs(torch.tensor(x), torch.tensor(500.0), torch.tensor(context))

    def timed(call: Callable[[], object]) -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    for name, path in (("torch", weights), ("onnx", graphs)):
        backend = open_backend(Source(path), name, "cpu")
        call = lambda backend=backend: backend.denoise(x, 500.0, told)  # noqa: E731
        call(), diffusers()  # the first calls read the weights
        compare(f"time, a network call on {name} / diffusers", runs, lambda c=call: timed(c), lambda: timed(diffusers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["startup", "generate", "train"])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--older", type=Path)
    arguments = parser.parse_args()
    from tinydiff.backends import find_model
    from tinydiff.training.memory import keep_pages

    model = arguments.model or find_model(None)
    for what in arguments.what:
        if what == "startup":
            startup(arguments.runs)
        elif what == "generate":
            generate(arguments.runs, model)
        elif what == "lora":
            lora(arguments.runs, model, arguments.folder)
        elif what == "pipe":
            pipe(
                arguments.runs, model, arguments.older or parser.error("pipe: give the older version's tree as --older")
            )
        elif what == "unet":
            unet(arguments.runs, model)
        elif what == "train":
            keep_pages()
            train(arguments.runs, model / "tinydiff.toml")
        elif what == "save":
            save(arguments.runs, model / "tinydiff.toml")
        elif what == "samplers":
            samplers()
        elif what == "full":
            with tempfile.TemporaryDirectory() as temporary:
                full(arguments.runs, arguments.folder or Path(temporary))
        else:
            sys.exit(
                f"{what}: no such benchmark; there are startup, generate, lora, pipe, unet, train, save, samplers and full"
            )


if __name__ == "__main__":
    main()
