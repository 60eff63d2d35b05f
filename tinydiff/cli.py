"""The command line: train, generate, export, evaluate, inspect.

Each command loads its configuration, imports what it needs and makes one call. stdout carries results only; a mistake
is one line on stderr and an exit code. Help and version import neither numpy nor torch nor onnxruntime.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinydiff import __version__, flags, processes
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import ETA, SAMPLERS
from tinydiff.diffusion.schedules import SPACINGS
from tinydiff.endings import one_line_errors
from tinydiff.errors import UsageError
from tinydiff.progress import note
from tinydiff.stages import ADAPTERS, MADE, STAGES, trained
from tinydiff.system import shown

if TYPE_CHECKING:
    from tinydiff.checkpoints.source import Source
    from tinydiff.pipeline import Backend

app = typer.Typer(
    name="tinydiff",
    help="Train a text-to-image model on a folder of captioned images, draw with it, export it to ONNX.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: ALIASES.get(name, name.replace("_", "-")),
    },
)
BACKENDS = ("auto", "torch", "onnx")
PRECISIONS = ("fp32", "fp16", "bf16")
ALIASES = {f"guidance{x}scale": "cfg-scale" for x in "_-"} | {f"num{x}inference{x}steps": "steps" for x in "_-"}
ALIASES |= {"schedule": "spacing"}


def flag(text: str, *names: str, **more: Any) -> Any:
    """An option with its help."""
    return typer.Option(*names, help=text, **more)


Json = Annotated[bool, flag("Results as JSON lines on stdout.", "--json")]
BatchSize = Annotated[int | None, flag("Images at once.", min=1, max=4096)]
Steps = Annotated[int | None, flag("Sampling steps.", min=1, max=1000)]
CfgScale = Annotated[float | None, flag("Guidance; 1 or less is none.", min=0, max=100)]
SamplerName = Annotated[str | None, flag(" | ".join(SAMPLERS))]
Spacing = Annotated[str | None, flag("Noise levels visited: " + " | ".join(SPACINGS))]
BackendName = Annotated[str, flag(" | ".join(BACKENDS))]
Device = Annotated[str, flag(f"{' | '.join(flags.DEVICES)}, or an onnxruntime plugin: {' | '.join(flags.PLUGINS)}.")]
Precision = Annotated[
    str | None,
    flag(f"What torch multiplies: {' | '.join(PRECISIONS)}; by default as stored on CUDA, fp32 on the CPU."),
]
Compiled = Annotated[bool, flag("Let torch compile the denoiser: a slow start, then faster steps.", "--compile")]
Verify = Annotated[bool, flag("Hash every file of the model, though it was before.", "--verify")]


def name(text: str) -> str:
    """A name that is not empty, as that of a variable that is not set would be."""
    if not text:
        raise typer.BadParameter("the name is empty; give one, or . for the current folder")
    return text


def path(text: str) -> Path:
    """A name as a path."""
    return Path(name(text))


Vae = Annotated[Path | None, flag("Take the autoencoder of this .safetensors file.", parser=path)]
Predicts = Annotated[str | None, flag("Where a model does not say: " + " | ".join(PREDICTIONS), "--prediction")]
LoraFiles = Annotated[
    list[str],
    flag(
        "Change the model by this LoRA, of this strength. May be repeated.", "--lora", metavar="FILE[:X]", parser=name
    ),
]
WordFiles = Annotated[
    list[Path], flag("Read this learnt word (textual inversion) in prompts. May be repeated.", "--word", parser=path)
]
ClipSkip = Annotated[
    int | None,
    flag("Leave out so many of CLIP's last blocks, as diffusers counts them (other programs add 1).", min=0, max=256),
]
Force = Annotated[bool, flag("Replace what is there.", "--force")]
ModelName = Annotated[str | None, flag("Model folder, .safetensors file, run, or shipped name.", "-m", "--model")]
Output = Annotated[str, flag("File, pattern ('out/%04d.png'), folder, or - for stdout.", "-o", "--output")]
CfgMax = Annotated[float | None, flag("Guidance at the last step; it grows from --cfg-scale.", min=0, max=100)]
CfgInterval = Annotated[str | None, flag("Noise levels with guidance: 0 is clean, 1 is noise.", metavar="LOW,HIGH")]
Frames = Annotated[int | None, flag("How many, 16 by default, in one .png, .webp, .gif or .apng.", min=2, max=10_000)]
Model = Annotated[
    str | None, typer.Argument(help="Model folder, .safetensors file or run; the shipped model by default.")
]


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"tinydiff {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, flag("Print the version.", "--version", callback=show_version, is_eager=True)] = False,
    debug: Annotated[bool, flag("Show tracebacks.", "--debug")] = False,
) -> None:
    os.environ.update({"TINYDIFF_DEBUG": "1"} if debug else {})


@app.command()
def train(
    what: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PHOTOS|RUN|CONFIG]",
            help="A folder of captioned images, or .tar shards; a run, to go on with; or a tinydiff.toml, by default "
            "the one here, else the built-in.",
            parser=path,
        ),
    ] = None,
    time: Annotated[
        str | None,
        flag("How long the run takes, such as 30m or 2h; one that has ended goes on for so long.", metavar="TIME"),
    ] = None,
    resolution: Annotated[int | None, flag("Pixels that images are brought to.", min=8, max=4096)] = None,
    run_dir: Annotated[Path | None, flag("Where the run lives; runs/NAME by default.", parser=path)] = None,
    set_: Annotated[list[str], flag("Change a key, such as train.seed=1.", "--set", metavar="KEY=VALUE")] = [],  # noqa: B006
    from_: Annotated[
        str | None,
        flag("Begin with this model: folder, .safetensors file, run or shipped name.", "--from", parser=name),
    ] = None,
    adapter: Annotated[
        str | None, flag(f"Train this, and leave the model of --from as it is: {' | '.join(ADAPTERS)}.")
    ] = None,
    stage: Annotated[str | None, flag(f"Stop after this stage: {' | '.join(STAGES)}.")] = None,
    fresh: Annotated[bool, flag("Start over in a new run directory.", "--fresh")] = False,
    accept_changes: Annotated[
        bool, flag("Go on though settings or data are not those that the run was begun with.", "--accept-changes")
    ] = False,
    strict: Annotated[
        bool, flag("Stop at a damaged checkpoint instead of going back to the one before it.", "--strict")
    ] = False,
    dry_run: Annotated[bool, flag("Print the resolved configuration and stop.", "--dry-run")] = False,
    data: Annotated[str | None, typer.Option("--data", hidden=True)] = None,
) -> None:
    """Train a model. The same command again goes on where the last one stopped.

    Of images all that is not said is chosen from them and from the machine, and written to the run's tinydiff.toml with the
    reason.
    """
    from time import monotonic

    begun = monotonic()
    if data is not None:
        raise UsageError(f"--data: images are given by themselves: tinydiff train {shown(data)}")
    seconds = None if time is None else flags.seconds(time)
    if adapter is not None:
        flags.choose("--adapter", adapter, ADAPTERS)
    said = {"data.resolution": resolution, "train.base": from_, "train.adapter": adapter, "train.time": seconds}
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in said.items() if value is not None]
    from tinydiff.beginning import begin, drawing
    from tinydiff.config import unread
    from tinydiff.schema import to_toml

    cfg, folder, reasons, facts = begin(what, [*set_, *given], run_dir, fresh)
    if stage is not None:
        flags.choose("--stage", stage, tuple(STAGES))
        if stage not in trained(cfg.train):
            problem = f"train.{stage}.steps is 0, which leaves it out; set train.{stage}.steps"
            others = f"this run does not train {stage}; give {' or '.join(trained(cfg.train))}"
            raise UsageError(f"--stage: {others if cfg.train.stage(stage).steps else problem}")
    if facts is not None and processes.rank() == 0:
        from tinydiff import outlook

        print(*outlook.lines(cfg, facts, folder, warned=not dry_run), sep="\n", file=sys.stderr)
    if dry_run:
        print(to_toml(cfg, unread(cfg), reasons), end="")
        return
    cfg.autoencoder_network.given(cfg)  # said now, where it is missing
    from tinydiff.training.memory import keep_pages

    keep_pages()
    from tinydiff.training.loop import run

    result = run(cfg, folder, stage, accept_changes, strict, seconds is not None, begun, reasons)
    if processes.rank() == 0:
        print(result)
        if command := drawing(folder, cfg):
            print(f"draw with it: {command}", file=sys.stderr)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw; - reads one prompt a line from stdin.")],
    model: ModelName = None,
    output: Output = "out.png",
    negative: Annotated[str, flag("What not to draw.", "-n", "--negative")] = "",
    seed: Annotated[
        int | None, flag("Seed of the noise; random by default, always reported.", "-s", "--seed", min=0, max=2**63 - 1)
    ] = None,
    count: Annotated[int, flag("Images a prompt, of seeds s, s+1, ...", min=1, max=1_000_000)] = 1,
    to: Annotated[str | None, flag("Frames on the way to this prompt.")] = None,
    seed_path: Annotated[str | None, flag("Frames on the way through these seeds' noise.", metavar="S,S,...")] = None,
    frames: Frames = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    cfg_scale: CfgScale = None,
    cfg_max: CfgMax = None,
    cfg_complex: Annotated[
        float | None, flag("Guidance of endless prompts; short ones stay near --cfg-scale.", min=0, max=100)
    ] = None,
    cfg_interval: CfgInterval = None,
    cfg_rescale: Annotated[
        float | None, flag("Take back the contrast that guidance adds: 0 none, 1 all of it.", min=0, max=1)
    ] = None,
    sampler: SamplerName = None,
    spacing: Spacing = None,
    eta: Annotated[
        float | None,
        flag(f"New noise at each step of {' and '.join(ETA)}: 0 none, 1 all.", min=0, max=1),
    ] = None,
    width: Annotated[int | None, flag("Pixels.", "-W", "--width", min=1, max=16384)] = None,
    height: Annotated[int | None, flag("Pixels.", "-H", "--height", min=1, max=16384)] = None,
    image: Annotated[Path | None, flag("Change this image.", "-i", "--image", parser=path)] = None,
    strength: Annotated[
        float | None, flag("How far from the image: 0 not at all, 1 anywhere. 0.6, or 1 where it is masked.")
    ] = None,
    mask: Annotated[Path | None, flag("Change only what is white in this image.", parser=path)] = None,
    outpaint: Annotated[
        str | None, flag("Extend the image by this many pixels: left,top,right,bottom.", metavar="L,T,R,B")
    ] = None,
    fit: Annotated[bool, flag("Scale and crop images and mask to -W and -H.", "--fit")] = False,
    lora: LoraFiles = [],  # noqa: B006
    lora_dir: Annotated[
        Path | None, flag("Where <lora:NAME:X> of the prompt is looked for, as NAME.safetensors.", parser=path)
    ] = None,
    word: WordFiles = [],  # noqa: B006
    control: Annotated[
        list[str],
        flag(
            "Follow an image, as this control network does; how strongly, and over which share of the steps. "
            f"{'=, '.join(MADE)}= before it: what is to be made of it first. May be repeated.",
            metavar="FOLDER:[edges=]IMAGE[:X[:START,END]]",
            parser=name,
        ),
    ] = [],  # noqa: B006
    label: Annotated[str | None, flag("The class, for a model that is told one besides the prompt.", "--label")] = None,
    reference: Annotated[
        Path | None, flag("The other image, for a model that is told one besides the prompt.", parser=path)
    ] = None,
    original_size: Annotated[
        str | None, flag("SDXL: the size of the picture that the image is a crop of; its own.", metavar="W,H")
    ] = None,
    crop: Annotated[str | None, flag("SDXL: where that crop begins; 0,0.", metavar="LEFT,TOP")] = None,
    exit_: Annotated[
        float, flag("Leave a dit where one of its exits is surer than this; 1 never.", "--exit", min=0, max=1)
    ] = 1.0,
    clip_skip: ClipSkip = None,
    vae: Vae = None,
    prediction: Predicts = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    precision: Precision = None,
    compiled: Compiled = False,
    verify: Verify = False,
    as_json: Json = False,
    force: Force = False,
    no_metadata: Annotated[bool, flag("Leave the settings out of the PNG.", "--no-metadata")] = False,
) -> None:
    """Draw images from prompts.

    A line of stdin that cannot be drawn is reported with its number, the others are drawn, and the exit code at the end is
    that of the first such line.

    Under torchrun (`torchrun --nproc-per-node 4 -m tinydiff generate - -o out/`) several processes draw the same images in
    less time: the first one reads the prompts, and a batch is drawn as soon as it is full.
    """
    flags.choose("--backend", backend, BACKENDS)
    flags.device(device)
    processes.own_device()
    adapters, controls = flags.adapters(lora, lora_dir, prompt, to or ""), flags.controls(control)
    prompt, to = flags.plain(prompt, lora_dir), to and flags.plain(to, lora_dir)
    model, adapters, words = flags.of_run(model, adapters, flags.words(word))
    parts = {"vae": vae, "prediction": prediction, "adapters": adapters, "words": words, "anew": verify}
    parts |= {"controls": flags.networks(controls), "clip_skip": clip_skip}
    opened = opening(model, backend, device, precision, compiled, exit_, **parts)
    from tinydiff import drawing, reading  # imported while the graphs are being opened

    given = flags.Flags(
        *(prompt, seed, count, to, seed_path, frames, batch_size, steps, cfg_scale, cfg_max, cfg_complex, cfg_interval),
        *(cfg_rescale, sampler, spacing, width, height, image, strength, mask, outpaint, fit, controls),
        *(original_size, crop, eta, label, reference),
    )
    moving = to is not None or seed_path is not None
    if frames and not moving:
        raise UsageError("--frames: there is no way to go; give --to PROMPT or --seed-path 1,2")
    reel = moving and "%" not in output and not output.endswith("/") and not os.path.isdir(output)
    sink = drawing.Reel(output, force) if reel else drawing.Sink(output, force, many=prompt == "-" or count > 1)
    flags.say_unused(opened, prompt, negative, to or "")
    prompts = reading.read_prompts(prompt)
    request, size = flags.complete(opened, given)
    request, edit = flags.edited(opened, request, given)
    steered, told = flags.controlled(request, given), flags.told(opened, request, given)
    jobs = flags.way(given) if moving else drawing.jobs(prompts, seed, count)
    mistakes, left = drawing.Mistakes(), {"exit": exit_} if exit_ < 1 else {}
    for drawn in drawing.draw(opened, jobs, negative, request, size, edit, mistakes, steered, told):
        drawn = replace(drawn, settings=drawn.settings | flags.named(adapters, words, given) | left)
        path = sink.write(drawn, None if no_metadata else drawn.settings)
        say_image(path, drawn, as_json)
    sink.close()
    if skipped := getattr(opened, "skipped", ""):
        note(skipped)
    if code := mistakes.code():
        raise typer.Exit(code)


def say_image(path: str, image: Any, as_json: bool) -> None:
    """One image's line: JSON on stdout, or for a person on stderr."""
    # Its end is written with it: under torchrun, which turns buffering off, other processes' lines would get in between.
    if as_json:
        row = {"path": path, **image.settings, "seconds": round(image.seconds, 4)}
        print(json.dumps(row) + "\n", end="", flush=True)
    else:
        prompt, seed = shown(image.settings["prompt"]), image.settings["seed"]
        blocks = image.settings.get("blocks", [])
        share = f", {sum(blocks) / len(blocks):.0%} of the blocks" if blocks else ""
        print(f"{shown(path)}: {prompt!r}, seed {seed}{share}\n", end="", file=sys.stderr)


def opening(
    model: str | None,
    backend: str,
    device: str,
    precision: str | None = None,
    compiled: bool = False,
    leave: float = 1.0,
    **parts: Any,
) -> Backend:
    """The model on its runtime, its graphs still being opened; `parts` are of its `Source`."""
    flags.choose("--precision", "fp32" if precision is None else precision, PRECISIONS)
    from tinydiff.backends import open_backend
    from tinydiff.files import again

    def opened() -> tuple[Source, Backend]:
        source = look_up(model, **parts)
        return source, open_backend(source, backend, device, False, precision, compiled, leave)

    source, result = again(opened)
    for text in source.strangers:
        note(text)
    return result


def look_up(model: str | None, **parts: Any) -> Source:
    """The model of this name, with what goes with it."""
    if (prediction := parts.get("prediction")) is not None:
        flags.choose("--prediction", prediction, tuple(PREDICTIONS))
    from tinydiff.backends import find_model
    from tinydiff.checkpoints.source import Source

    return Source(find_model(model), **parts)


@app.command()
def export(
    model: Model = None,
    output: Annotated[Path, flag("The bundle's folder, or the file.", "-o", "--output", parser=path)] = ...,  # type: ignore[assignment]
    format_: Annotated[
        str, flag("onnx graphs; or the weights as a diffusers folder, or as a single-file.", "--format")
    ] = "onnx",
    precision: Annotated[
        str | None,
        flag(
            "fp32 | fp16 | bf16 | int8: how weights are stored and graphs compute. onnx is fp32, others as stored, never int8."
        ),
    ] = None,
    device: Annotated[
        str,
        flag(
            "any: graphs that run everywhere; cuda: with operators of onnxruntime on CUDA alone; cpu: arithmetic for a CPU."
        ),
    ] = "any",
    lora: LoraFiles = [],  # noqa: B006
    word: WordFiles = [],  # noqa: B006
    vae: Vae = None,
    prediction: Predicts = None,
    control: Annotated[
        list[Path],
        flag(
            "Add this control network, and let the denoiser's graph take what it gives. May be repeated.", parser=path
        ),
    ] = [],  # noqa: B006
    clip_skip: ClipSkip = None,
    opset: Annotated[int | None, flag("ONNX operator set; 20 by default.", min=18, max=23)] = None,
    atol: Annotated[
        float | None,
        flag("Largest difference of a graph from torch, in standard deviations of its output; by --precision.", min=0),
    ] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Write ONNX graphs, verified against torch before they are kept, or the weights in another layout."""
    flags.choose("--format", format_, ("onnx", "folder", "single-file"))
    kinds = (*PRECISIONS, *(("int8",) if format_ == "onnx" else ()))
    flags.choose("--precision", "fp32" if precision is None else precision, kinds)
    flags.choose("--device", device, ("any", "cpu", "cuda"))
    if format_ != "onnx" and (device != "any" or opset or atol is not None or clip_skip is not None):
        raise UsageError(
            "--device, --opset, --atol, --clip-skip: of graphs alone; leave them out, or give --format onnx"
        )
    flags.finite("--atol", atol or 0)
    from tinydiff.files import again, undisturbed

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(text, file=sys.stderr)

    def write() -> list[dict[str, Any]]:
        base, adapters, words = flags.of_run(model, flags.adapters(lora), flags.words(word))
        parts = {"vae": vae, "prediction": prediction, "adapters": adapters, "words": words}
        parts |= {"controls": tuple(dict.fromkeys(control)), "clip_skip": clip_skip}
        source = look_up(base, **parts, anew=True)
        with undisturbed(source.stamps):
            source.check()
            own = source.description.notes if format_ == "single-file" else ()  # which holds no scheduler
            for text in (*own, *source.strangers):
                note(text)
        if format_ != "onnx":
            from tinydiff.checkpoints.convert import FORMATS

            FORMATS[format_](source, output, precision, force)
            return []
        from tinydiff.export import OPSET
        from tinydiff.export import export as write_bundle

        return write_bundle(source, output, precision or "fp32", opset or OPSET, atol, force, say, device)

    for row in again(write):
        text = " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print(json.dumps(row) if as_json else text)


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help="Model folder, run or shipped name.")] = None,
    data: Annotated[
        list[str],
        flag(
            "A folder of captioned images, or shapes; repeat to compare among all. Copies are looked for in the first.",
            parser=name,
        ),
    ] = ...,  # type: ignore[assignment]
    features: Annotated[
        list[str],
        flag(
            "Feature network: efficientnet-lite0, or a file; A,B for one of two files; none. May be repeated.",
            parser=name,
        ),
    ] = [],  # noqa: B006
    count: Annotated[int, flag("Images to draw for each.", min=1, max=100_000)] = 256,
    seed: Annotated[int, flag("Picks captions and noise.", "-s", "--seed", min=0, max=2**63 - 1)] = 0,
    batch_size: BatchSize = None,
    steps: Steps = None,
    cfg_scale: CfgScale = None,
    sampler: SamplerName = None,
    spacing: Spacing = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    precision: Precision = None,
    compiled: Compiled = False,
    verify: Verify = False,
    as_json: Json = False,
) -> None:
    """Score a model: the oracle on shapes, the nearest image on a folder; and both as feature networks see them.

    Figures that use a network are named after it; they have the names FID, KID, IS and LPIPS only if the network is read from
    the files that these are defined by.
    """
    flags.choose("--backend", backend, BACKENDS)
    flags.device(device)
    from tinydiff.measure.networks import wanted

    names = wanted(features)
    model, adapters, words = flags.of_run(model)
    opened = opening(model, backend, device, precision, compiled, anew=verify, adapters=adapters, words=words)
    given = flags.Flags(batch_size=batch_size, steps=steps, cfg_scale=cfg_scale, sampler=sampler, spacing=spacing)
    request, size = flags.complete(opened, given)
    from tinydiff import evaluate as scoring
    from tinydiff.progress import Progress

    def progress(label: str) -> Callable[[int, int], None]:
        bar: list[Progress] = []

        def update(done: int, total: int) -> None:
            bar[:] = bar or [Progress(label, total)]
            bar[0].update(done)

        return update

    told = progress("drawing"), partial(scoring.open_networks, names, device), progress("looking at the data")
    for row in scoring.evaluate(opened, request, data, count, seed, size, opened.description.size, *told):
        print(json.dumps(row) if as_json else scoring.line(row))


@app.command()
def inspect(
    what: Annotated[
        str | None,
        typer.Argument(help="Model, configuration or image; the default configuration without.", parser=name),
    ] = None,
    width: Annotated[
        int | None, flag("Pixels that the cost is counted at; the model's own.", "-W", "--width", min=1, max=16384)
    ] = None,
    height: Annotated[int | None, flag("The same.", "-H", "--height", min=1, max=16384)] = None,
    as_json: Json = False,
) -> None:
    """Say what a model, a configuration or a generated image is, and what a model's networks cost.

    Operations are those of convolutions and matrix products, a multiply-add counts as two; activations are the bytes that
    training keeps for each image.
    """
    from tinydiff import inspect as look

    for text in look.show(what, as_json, width, height):
        print(text)


def main() -> None:
    """The console script: the app with errors in one line, and stdout flushed where that can still fail cleanly."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed standard stream points at nothing, lest a file that is opened gets its number and its text
    os.close(descriptor)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries: what concerns a person is checked, and said in a line
    with one_line_errors():
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    raise SystemExit(code or 0)
