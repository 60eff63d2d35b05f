"""The command line: train, generate, export, evaluate, inspect.

Each command loads its configuration, imports what it needs and makes one call. stdout carries results only; a mistake
is one line on stderr and an exit code. Help and version import neither numpy nor torch nor onnxruntime.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinydiff import __version__, flags, processes
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.diffusion.schedules import SPACINGS
from tinydiff.errors import HungError, UsageError, UserError

if TYPE_CHECKING:
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
BACKENDS, DEVICES = ("auto", "torch", "onnx"), ("auto", "cpu", "cuda")
ALIASES = {
    "guidance_scale": "cfg-scale",
    "guidance-scale": "cfg-scale",
    "num_inference_steps": "steps",
    "num-inference-steps": "steps",
}
Json = Annotated[bool, typer.Option("--json", help="Results as JSON lines on stdout.")]
BatchSize = Annotated[int | None, typer.Option(min=1, max=4096, help="Images at once.")]
Steps = Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps.")]
CfgScale = Annotated[float | None, typer.Option(min=0, max=100, help="Guidance; 1 is none.")]
SamplerName = Annotated[str | None, typer.Option(help=" | ".join(SAMPLERS))]
Spacing = Annotated[str | None, typer.Option(help="Noise levels visited: " + " | ".join(SPACINGS))]
BackendName = Annotated[str, typer.Option(help=" | ".join(BACKENDS))]
Device = Annotated[str, typer.Option(help=" | ".join(DEVICES))]
Vae = Annotated[Path | None, typer.Option(help="Take the autoencoder of this .safetensors file.")]
Predicts = Annotated[
    str | None, typer.Option("--prediction", help="Where a model does not say: " + " | ".join(PREDICTIONS))
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"tinydiff {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    os.environ.update({"TINYDIFF_DEBUG": "1"} if debug else {})


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="A tinydiff.toml; by default the one here, else the built-in.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run lives; runs/NAME by default.")] = None,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as train.seed=1.")
    ] = [],  # noqa: B006
    stage: Annotated[str | None, typer.Option(help="Stop behind this stage: autoencoder or denoiser.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new run directory.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on though settings or data are not those of the run's begin.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a damaged checkpoint in place of going back to the one before it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train a model. The same command again goes on where the last one stopped."""
    from tinydiff import config as configuration

    path = config or (Path("tinydiff.toml") if Path("tinydiff.toml").exists() else None)
    cfg = configuration.load(path, set_)
    if stage not in (None, "autoencoder", "denoiser"):
        raise UsageError(
            f"--stage: unknown name {stage!r}{configuration.nearest(str(stage), ('autoencoder', 'denoiser'))}"
        )
    if dry_run:
        print(configuration.to_toml(cfg), end="")
        return
    from tinydiff.training.memory import keep_pages

    keep_pages()
    from tinydiff.training.loop import run

    folder = run_dir or Path("runs") / default_name(path)
    result = run(cfg, unused(folder) if fresh else folder, stage, accept_changes, strict)
    if processes.rank() == 0:
        print(result)


def default_name(path: Path | None) -> str:
    """A run's name from its configuration file: the stem, or the folder of a tinydiff.toml."""
    if path is None or path.name == "tinydiff.toml":
        return (path.resolve().parent.name if path and path.parent != Path(".") else "") or "default"
    return path.stem


def unused(folder: Path) -> Path:
    """The folder itself where it is new, else the first of folder-2, folder-3, ... that is."""
    n, found = 1, folder
    while found.exists():
        n += 1
        found = folder.with_name(f"{folder.name}-{n}")
    return found


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw; - reads one prompt a line from stdin.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Model folder, .safetensors file, run, or shipped name.")
    ] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="File, pattern ('out/%04d.png'), folder, or - for stdout.")
    ] = "out.png",
    negative: Annotated[str, typer.Option("-n", "--negative", help="What not to draw.")] = "",
    seed: Annotated[
        int | None,
        typer.Option(
            "-s", "--seed", min=0, max=2**63 - 1, help="Key of the noise; random by default, always reported."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="Images a prompt, of seeds s, s+1, ...")] = 1,
    to: Annotated[str | None, typer.Option(help="Frames on the way to this prompt.")] = None,
    seed_path: Annotated[
        str | None, typer.Option(metavar="S,S,...", help="Frames on the way through these seeds' noise.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=2, max=10_000, help="How many, 16 by default, in one .png, .webp, .gif or .apng.")
    ] = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    cfg_scale: CfgScale = None,
    cfg_max: Annotated[
        float | None, typer.Option(min=0, max=100, help="Guidance at the last step; it grows from --cfg-scale.")
    ] = None,
    cfg_complex: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Guidance of endless prompts; short ones stay near --cfg-scale."),
    ] = None,
    cfg_interval: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="Noise levels with guidance: 0 is clean, 1 is noise.")
    ] = None,
    cfg_rescale: Annotated[
        float | None, typer.Option(min=0, max=1, help="Take back the contrast that guidance adds: 0 none, 1 all of it.")
    ] = None,
    sampler: SamplerName = None,
    schedule: Spacing = None,
    width: Annotated[int | None, typer.Option("-W", "--width", min=1, max=16384, help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option("-H", "--height", min=1, max=16384, help="Pixels.")] = None,
    image: Annotated[Path | None, typer.Option("-i", "--image", help="Change this image.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How far from the image: 0 not at all, 1 anywhere. 0.6, or 1 where it is masked."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Change only what is white in this image.")] = None,
    outpaint: Annotated[
        str | None,
        typer.Option(metavar="L,T,R,B", help="Draw on: so many pixels more to the left, top, right, bottom."),
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Scale and crop image and mask to -W and -H.")] = False,
    vae: Vae = None,
    prediction: Predicts = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    as_json: Json = False,
    force: Force = False,
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Leave the settings out of the PNG.")] = False,
) -> None:
    """Draw images from prompts.

    Under torchrun (`torchrun --nproc-per-node 4 -m tinydiff generate - -o out/`) several processes draw the same images in
    less time: the first one reads the prompts, and a batch is drawn as soon as it is full.
    """
    flags.choose("--backend", backend, BACKENDS)
    flags.choose("--device", device, DEVICES)
    processes.own_device()
    opened = opening(model, backend, device, vae, prediction)
    from tinydiff import drawing  # imported while the graphs are being opened

    moving = to is not None or seed_path is not None
    if frames and not moving:
        raise UsageError("--frames: there is no way to go; give --to PROMPT or --seed-path 1,2")
    reel = moving and "%" not in output and not output.endswith("/") and not Path(output).is_dir()
    sink = drawing.Reel(output, force) if reel else drawing.Sink(output, force, many=prompt == "-" or count > 1)
    prompts = drawing.read_prompts(prompt)
    request, size = flags.complete(opened, locals())
    request, edit = flags.edited(opened, request, locals())
    jobs = flags.way(prompts, locals()) if moving else drawing.jobs(prompts, seed, count)
    for drawn in drawing.draw(opened, jobs, negative, request, size, edit):
        path = sink.write(drawn, None if no_metadata else drawn.settings)
        say_image(path, drawn, as_json)
    sink.close()


def say_image(path: str, image: Any, as_json: bool) -> None:
    """One image's line: JSON on stdout, or for a person on stderr.

    Its end is written with it: under torchrun, which turns buffering off, other processes' lines would get in between.
    """
    from tinydiff.files import shown

    if as_json:
        row = {"path": path, **image.settings, "seconds": round(image.seconds, 4)}
        print(json.dumps(row) + "\n", end="", flush=True)
    else:
        print(f"{shown(path)}: {image.settings['prompt']!r}, seed {image.settings['seed']}\n", end="", file=sys.stderr)


def opening(
    model: str | None, backend: str, device: str, vae: Path | None = None, prediction: str | None = None
) -> Backend:
    """The model on its runtime, its graphs still being opened."""
    if prediction:
        flags.choose("--prediction", prediction, tuple(PREDICTIONS))
    from tinydiff.backends import find_model, open_backend

    return open_backend(find_model(model), backend, device, False, vae, prediction)


@app.command()
def export(
    model: Annotated[
        str | None, typer.Argument(help="Model folder, .safetensors file or run; the shipped model by default.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle's folder, or the file.")] = ...,  # type: ignore[assignment]
    format_: Annotated[
        str, typer.Option("--format", help="onnx graphs; or the weights as a diffusers folder, or as a single-file.")
    ] = "onnx",
    precision: Annotated[
        str | None, typer.Option(help="fp32, or fp16 for weights stored at half size; onnx is fp32, others as stored.")
    ] = None,
    vae: Vae = None,
    prediction: Predicts = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set.")] = None,
    atol: Annotated[
        float, typer.Option(min=0, help="Largest difference from torch, in standard deviations of the output.")
    ] = 1e-4,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Write ONNX graphs, verified against torch before they are kept, or the weights in another layout."""
    flags.choose("--format", format_, ("onnx", "folder", "single-file"))
    flags.choose("--precision", precision or "fp32", ("fp32", "fp16"))
    flags.finite("--atol", atol)
    if prediction:
        flags.choose("--prediction", prediction, tuple(PREDICTIONS))
    from tinydiff.backends import find_model
    from tinydiff.checkpoints.foreign import check

    source = find_model(model)
    check(source, vae, prediction)
    if format_ != "onnx":
        from tinydiff.checkpoints.convert import FORMATS

        FORMATS[format_](source, output, vae, prediction, precision, force)
        return
    from tinydiff.export import export as write

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(text, file=sys.stderr)

    more: dict[str, Any] = {"opset": opset} if opset else {}
    more |= {"vae": vae, "prediction": prediction}
    for row in write(source, output, precision or "fp32", atol=atol, replace=force, say=say, **more):
        text = " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print(json.dumps(row) if as_json else text)


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help="Model folder, run or shipped name.")] = None,
    data: Annotated[
        list[str], typer.Option("--data", help="A folder of captioned images, or shapes; repeat to compare among all.")
    ] = ...,  # type: ignore[assignment]
    count: Annotated[int, typer.Option(min=1, max=100_000, help="Images to draw for each.")] = 256,
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, max=2**63 - 1, help="Picks captions and noise.")] = 0,
    batch_size: BatchSize = None,
    steps: Steps = None,
    cfg_scale: CfgScale = None,
    sampler: SamplerName = None,
    schedule: Spacing = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a model: the oracle on shapes, the nearest image on a folder."""
    flags.choose("--backend", backend, BACKENDS)
    opened = opening(model, backend, device)
    request, size = flags.complete(opened, locals())
    from tinydiff import evaluate as scoring
    from tinydiff.training.progress import Progress

    bar: list[Progress] = []

    def progress(done: int, total: int) -> None:
        bar[:] = bar or [Progress("drawing", total)]
        bar[0].update(done)

    for row in scoring.evaluate(opened, request, data, count, seed, size, opened.description.size, progress):
        print(json.dumps(row) if as_json else scoring.line(row))


@app.command()
def inspect(
    what: Annotated[
        str | None, typer.Argument(help="Model, configuration or image; the default configuration without.")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option("-W", "--width", min=1, max=16384, help="Pixels that operations are counted at; the model's own."),
    ] = None,
    height: Annotated[int | None, typer.Option("-H", "--height", min=1, max=16384, help="The same.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a model, a configuration or a generated image is.

    A model's cost counts convolutions and matrix products, each multiply-add as two operations.
    """
    from tinydiff import inspect as look

    for text in look.show(what, as_json, width, height):
        print(text)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what escapes a command into one line on stderr and the exit code it stands for."""
    try:
        yield
    except HungError as error:
        with contextlib.suppress(SystemExit):
            fail(str(error), error.code)
        os._exit(error.code)  # an orderly end would wait for what hangs
    except UserError as error:
        fail(str(error), error.code)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:
        closed_pipe()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # click turns it into an exit of its own
            closed_pipe()
        raise
    except MemoryError:
        fail("out of memory; lower --batch-size or the image size", 7)
    except OSError as error:
        fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 7)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            raise SystemExit(2) from None
        if hasattr(error, "format_message"):  # a click exception; typer carries a click of its own
            fail(error.format_message(), 2)  # type: ignore[attr-defined]
        fail(f"bug: {type(error).__name__}: {error} (`tinydiff --debug ...` shows where)", 1)


def fail(message: str, code: int) -> None:
    """Print one line that a terminal only shows, or the traceback under --debug, and exit."""
    if os.environ.get("TINYDIFF_DEBUG"):
        raise  # noqa: PLE0704
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyboardInterrupt):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
        if line:  # of many processes that stop together one speaks for all
            print(f"tinydiff: {processes.turn()}{line}", file=sys.stderr)
    raise SystemExit(code) from None


def closed_pipe() -> None:
    """Exit as a process that SIGPIPE ended, stdout pointed at nothing so that the last flush does not complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(141) from None


def hold_streams() -> None:
    """Point standard streams that are closed at nothing, lest a file that is opened gets their number and their text."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def main() -> None:
    """The console script: the app with errors in one line, and stdout flushed where that can still fail cleanly."""
    hold_streams()
    with one_line_errors():
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    raise SystemExit(code or 0)
