"""What the flags of generate and evaluate ask for, as the pipeline's own objects; every refusal is a line with the fix."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinydiff.diffusion.samplers import ETA, SAMPLERS
from tinydiff.diffusion.schedules import SPACINGS
from tinydiff.errors import DataError, ModelError, ResourceError, UsageError
from tinydiff.networks import LABELS
from tinydiff.progress import note
from tinydiff.schema import nearest
from tinydiff.system import shown

MAX_SIDE = 16384  # pixels, as of -W and -H
DEVICES = ("auto", "cpu", "cuda")
PLUGINS = (
    "openvino",
    "webgpu",
    "nv-tensorrt-rtx",
    "mlx",
)  # published as onnxruntime-ep-NAME; others of such names work too
LORA = re.compile(r"<lora:(?P<name>[^<>:]*)(?::(?P<strength>[^<>]*))?>")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SCALES = ("cfg_scale", "cfg_max", "cfg_complex", "cfg_rescale")

if TYPE_CHECKING:
    from tinydiff import control
    from tinydiff.checkpoints.description import Description
    from tinydiff.checkpoints.source import Adapter
    from tinydiff.condition import Condition
    from tinydiff.control import Control
    from tinydiff.editing import Edit
    from tinydiff.pipeline import Backend, Request


@dataclass(frozen=True)
class Flags:
    """What was typed; None where a flag was not."""

    prompt: str = ""
    seed: int | None = None
    count: int = 1
    to: str | None = None
    seed_path: str | None = None
    frames: int | None = None
    batch_size: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    cfg_max: float | None = None
    cfg_complex: float | None = None
    cfg_interval: str | None = None
    cfg_rescale: float | None = None
    sampler: str | None = None
    spacing: str | None = None
    width: int | None = None
    height: int | None = None
    image: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    outpaint: str | None = None
    fit: bool = False
    control: tuple[control.Flag, ...] = ()
    original_size: str | None = None
    crop: str | None = None
    eta: float | None = None
    label: str | None = None
    reference: Path | None = None


def complete(opened: Backend, given: Flags) -> tuple[Request, int]:
    """What to draw, the model's own settings where a flag is not given: (request, batch size)."""
    from tinydiff.pipeline import Request, check_size

    for flag, names in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
        if (value := getattr(given, flag)) is not None:
            choose(f"--{flag}", value, tuple(names))
    for name in (*SCALES, "eta"):
        finite(f"--{name.replace('_', '-')}", getattr(given, name) or 0)
    d = opened.description
    values = {k: getattr(d.generate, k) for k in ("steps", "cfg_scale", "sampler", "spacing")}
    typed = {k: getattr(given, k) for k in (*values, *SCALES, "eta")}
    values |= {k: v for k, v in typed.items() if v is not None}
    values |= {"cfg_interval": interval(given.cfg_interval)} if given.cfg_interval else {}
    values |= sizes(d.conditions, given)
    request = Request(**values, width=given.width or d.size, height=given.height or d.size)
    if request.eta is not None and request.sampler not in ETA:
        raise UsageError(f"--eta: {request.sampler} has none; give --sampler {' or '.join(ETA)}, or leave it out")
    if request.steps > (most := len(d.schedule)):
        raise UsageError(f"--steps {request.steps}: the model has {most} noise levels; give at most that many")
    check_size(d, request.width, request.height)
    d.levels(request.sampler, request.steps, request.spacing)  # says what is wrong with them before anything is drawn
    for text in (*d.notes, *unlike(d, request)):
        note(text)
    if given.cfg_scale is not None and given.cfg_scale < 1:
        note(f"--cfg-scale {given.cfg_scale:g}, as 1, is no guidance: the prompt counts, a negative prompt is unused")
    return request, given.batch_size or d.generate.batch_size


def sizes(conditions: Mapping[str, Any], given: Flags) -> dict[str, tuple[int, int]]:
    """What --original-size and --crop say, for a model that is told it. Raises UsageError."""
    typed = {"original_size": (given.original_size, 1), "crop": (given.crop, 0)}
    values = {name: pair(name, text, least) for name, (text, least) in typed.items() if text is not None}
    if values and "time_ids" not in conditions:
        raise UsageError("--original-size, --crop: this model is told no sizes; leave them out")
    return values


def pair(name: str, text: str, least: int) -> tuple[int, int]:
    """ "1024,768" as two numbers of pixels; UsageError for anything else."""
    parts = [int(part) for part in text.split(",") if part.strip().isdecimal() and len(part) < 10]
    if len(parts) != 2 or text.count(",") != 1 or not all(least <= part <= MAX_SIDE for part in parts):
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(
            f"{flag} {shown(text)}: give two numbers of pixels from {least} to {MAX_SIDE}, such as 1024,768"
        )
    return parts[0], parts[1]


def unlike(d: Description, request: Request) -> Iterator[str]:
    """What a distilled model is asked for that it has not learnt, a line each."""
    own = d.generate
    others = request.cfg_rescale, request.cfg_max, request.cfg_complex, request.cfg_interval != (0.0, 1.0)
    if d.told_guidance and any(others):
        yield "the model is told how strong guidance is: of the flags of guidance --cfg-scale alone counts"
    if own.few_calls:
        if request.guided:
            yield "the model was distilled with guidance built in, to which that of --cfg-scale is added; leave it out"
        if request.sampler != own.sampler:
            yield f"the model was distilled to be drawn by {own.sampler}, not by {request.sampler}; leave --sampler out"


def edited(opened: Backend, request: Request, given: Flags) -> tuple[Request, Edit | None]:
    """What is to be done to an image, and the request at that image's size. Raises UsageError for flags that do not fit."""
    if not given.image:
        names = ("strength", "mask", "outpaint", *(() if given.control or given.reference else ("fit",)))
        if lonely := [f"--{name}" for name in names if getattr(given, name) not in (None, False)]:
            raise UsageError(f"{', '.join(lonely)}: there is no image to change; give one with -i")
        return request, None
    from tinydiff import editing
    from tinydiff.pipeline import check_size

    if (given.width or given.height) and not given.fit:
        raise UsageError("-W, -H: an image keeps its size; add --fit to scale and crop it")
    usual = 1.0 if given.mask or given.outpaint else 0.6
    strength = given.strength if given.strength is not None else usual
    if not 0 <= strength <= 1:
        raise UsageError(f"--strength {strength}: give a number from 0 (as it is) to 1 (anything)")
    size = (request.width, request.height) if given.fit else None
    sides = margins(given.outpaint) if given.outpaint else None
    edit = editing.read(given.image, strength, given.mask, sides, size, opened.description.factor)
    height, width = edit.image.shape[:2]
    check_size(opened.description, width, height)
    return replace(request, width=width, height=height), edit


def adapters(given: Sequence[str], folder: Path | None = None, *prompts: str) -> tuple[Adapter, ...]:
    """The files of --lora, and those that prompts name, to be found in --lora-dir. UsageError for another form or name."""
    from tinydiff.checkpoints.source import Adapter

    found = [Adapter(*strong(text)) for text in given]
    if folder is None:
        return tuple(found)
    if "-" in prompts:
        raise UsageError("--lora-dir: all prompts of stdin are drawn by one model; give its files with --lora")
    if not folder.is_dir():
        raise UsageError(f"--lora-dir {shown(folder)}: no such folder; check the path")
    known = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    tagged = dict[str, float]()
    for tag in (tag for prompt in prompts for tag in LORA.finditer(prompt)):
        if tag["name"] not in known:
            raise UsageError(f"{shown(tag[0])}: not in {shown(folder)}{nearest(tag['name'][:100], tuple(known))}")
        much = strength(tag[0], tag["strength"] or "1")
        if (other := tagged.setdefault(tag["name"], much)) != much:
            raise UsageError(f"{shown(tag[0])}: asked for at {other:g} too, and one model draws all; give one strength")
    return (*found, *(Adapter(known[stem], much) for stem, much in tagged.items()))


def strong(text: str) -> tuple[Path, float]:
    """ "FILE:0.8" as both; a strength of 1 where none is given."""
    file, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return within(Path(text)), 1.0
    return within(Path(file)), strength(f"--lora {shown(text)}", tail)


def of_run(
    model: str | None, adapters: tuple[Adapter, ...] = (), words: tuple[Path, ...] = ()
) -> tuple[str | None, tuple[Adapter, ...], tuple[Path, ...]]:
    """The same for a run that trained an adapter: its model, with what it made before the others."""
    if model is None or not Path(model, "tinydiff.toml").is_file():
        return model, adapters, words
    from tinydiff.adapters import made
    from tinydiff.checkpoints.source import Adapter

    run = made.of_run(model)
    if run is None or run.kind not in ("lora", "word"):
        return model, adapters, words
    file = within(run.path)
    if file == run.path:
        raise ModelError(f"{shown(model)}: has no checkpoint yet; train on")
    note(f"{shown(model)} is the run of an adapter, read as {run.how}")
    if run.kind == "lora":
        return run.base, (Adapter(file), *adapters), words
    return run.base, adapters, (file, *words)


def words(given: Sequence[Path]) -> tuple[Path, ...]:
    """The files of --word."""
    return tuple(map(within, given))


def within(path: Path) -> Path:
    """The file of an adapter or a word; of a folder, such as a run's, the one in it. UsageError where it holds several."""
    from tinydiff.adapters.lora import FILE

    for place in (path, path / "adapter") if path.is_dir() else ():
        files = sorted(place.glob("*.safetensors"))
        if len(files) > 1 and place / FILE not in files:
            raise UsageError(
                f"{shown(place)}: holds {', '.join(shown(each.name) for each in files[:3])}; give one of them"
            )
        if files:
            return place / FILE if len(files) > 1 else files[0]
    return path


def strength(what: str, text: str) -> float:
    """A finite number; UsageError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{shown(what)}: {shown(text)!r} is no strength; give a number, such as 0.8")
    return value


def plain(prompt: str, folder: Path | None) -> str:
    """A prompt without the names of files in --lora-dir."""
    return LORA.sub(" ", prompt) if folder else prompt


def named(adapters: Sequence[Adapter], words: Sequence[Path], given: Flags) -> dict[str, Any]:
    """What an image's settings say of adapters, learnt words, and what the model was told besides a prompt."""
    told: dict[str, Any] = {"lora": [f"{each.path.name}:{each.strength:g}" for each in adapters]}
    told |= {"word": [path.name for path in words], "label": given.label}
    told |= {"reference": given.reference and given.reference.name}
    return {key: names for key, names in told.items() if names}


def say_unused(opened: Backend, prompt: str, *others: str) -> None:
    """Say which learnt words no prompt of the command line has."""
    said = " ".join((prompt, *others)).lower()
    words = getattr(next(iter(opened.tokenizers.values())), "learnt", ())
    for word in words if prompt != "-" else ():
        if word.lower() not in said:
            note(f"no prompt says {shown(word)}, which was learnt; --word changes nothing without it")


def controls(given: list[str]) -> tuple[control.Flag, ...]:
    """What --control asks for, checked before a model is looked for: UsageError for another form, DataError for no image."""
    from tinydiff import control

    flags = tuple(map(control.parse, given))
    for text, flag in zip(given, flags, strict=True):
        _, path = control.made(flag.image)
        if not path.exists():
            parts = str(path).split(":")
            if any(Path(":".join(parts[:n])).is_file() for n in range(1, len(parts))):
                raise UsageError(f"--control {shown(text)}: {control.RANGES}")
            raise DataError(f"{shown(path)}: no such image; {control.WANTED}")
    return flags


def networks(given: tuple[control.Flag, ...]) -> tuple[Path, ...]:
    """The control networks that are to be opened, each once."""
    return tuple(dict.fromkeys(flag.network for flag in given))


def controlled(request: Request, given: Flags) -> list[Control]:
    """The control networks with their images, of the request's size or fitted to it."""
    from tinydiff import control
    from tinydiff.checkpoints.control import name

    size, opened = (request.width, request.height), networks(given.control)
    return [control.read(flag, name(opened.index(flag.network)), size, given.fit) for flag in given.control]


def told(opened: Backend, request: Request, given: Flags) -> Condition:
    """What --label and --reference tell of every picture. Raises UsageError for what the model is not told, or has to be."""
    from tinydiff import condition, images
    from tinydiff.pipeline import given_with

    d, typed = opened.description, {"label": given.label, "image": given.reference}
    columns = [array.of.column for array in d.given.values()]  # type: ignore[union-attr]
    for column, (flag, what) in condition.GIVEN.items():
        if typed[column] is not None and column not in columns:
            here = (
                "give the class as the prompt" if column == "label" and LABELS in opened.tokenizers else "leave it out"
            )
            raise UsageError(f"{flag}: this model is not told {what}; {here}")
        if typed[column] is None and column in columns and column in d.spared:
            note(f"no {flag}: drawn without {what}, as the model has learnt to")
    image = images.open_image(given.reference) if given.reference else None
    if image is not None:
        size, (height, width) = (request.width, request.height), image.shape[:2]
        if not given.fit and (width, height) != size:
            problem = f"it is {width}x{height} and the picture {size[0]}x{size[1]}"
            raise UsageError(f"{shown(given.reference)}: {problem}; make them equal with -W and -H, or use --fit")
        image = images.fit(image, size)
    made = given_with(opened, given.label, image)
    shape = (d.latent_channels, request.height // d.factor, request.width // d.factor)
    condition.of_given(d, made, shape, [([0], True)])  # says what is missing before anything is drawn
    return made


def margins(text: str) -> tuple[int, int, int, int]:
    """ "L,T,R,B" as pixels; UsageError for anything else."""
    parts = text.split(",")
    sides = [int(part) for part in parts if part.strip().isdecimal() and len(part) < 10]
    if len(parts) != 4 or len(sides) != 4 or not any(sides):
        raise UsageError(
            f"--outpaint {shown(text)}: give four numbers of pixels, left,top,right,bottom, such as 0,0,64,0"
        )
    if max(sides) > MAX_SIDE:
        raise UsageError(f"--outpaint {text}: {max(sides)} pixels are over {MAX_SIDE}; give less")
    return sides[0], sides[1], sides[2], sides[3]


def interval(text: str) -> tuple[float, float]:
    """ "0.2,0.8" as two shares; UsageError for anything else."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise UsageError(f"--cfg-interval {shown(text)}: give two shares of the noise levels, such as 0.2,0.8")
    return low, high


def seconds(text: str) -> int:
    """ "90s", "30m" or "2h" as seconds; UsageError for anything else."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smhd])", text.strip().lower())
    value = round(float(found[1]) * UNITS[found[2]]) if found else 0
    if not 10 <= value <= 100 * UNITS["d"]:
        raise UsageError(f"--time {shown(text)}: give a time from 10s to 100d, such as 90s, 30m or 2h")
    return value


def finite(flag: str, value: float) -> None:
    """UsageError for nan and infinity, which no range of numbers excludes."""
    if not math.isfinite(value):
        raise UsageError(f"{flag} {value}: give a number, such as 3")


def device(name: str) -> None:
    """UsageError unless --device is a kind of device or an onnxruntime plugin, ResourceError where that is not installed."""
    plugin = re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) and name not in DEVICES
    if plugin and find_spec(f"onnxruntime_ep_{name.replace('-', '_')}"):
        return
    choose("--device", name, (*DEVICES, *PLUGINS))
    if plugin:
        raise ResourceError(f"--device {name}: its plugin is not installed; pip install onnxruntime-ep-{name}")


def choose(flag: str, value: str, names: tuple[str, ...]) -> None:
    """UsageError with the nearest name where `value` is none of `names`."""
    if value not in names:
        raise UsageError(f"{flag}: unknown name {shown(value)!r}{nearest(value[:100], names)}")


def way(given: Flags) -> Iterator[Any]:
    """The frames' jobs. Raises UsageError for flags that do not fit."""
    from secrets import randbelow

    from tinydiff import drawing, reading

    if given.prompt == "-" or given.count > 1:
        raise UsageError("--to, --seed-path: one prompt and one way; give the prompt itself, and no --count")
    start = given.seed if given.seed is not None else randbelow(2**31)
    try:
        seeds = [int(part) for part in given.seed_path.split(",")] if given.seed_path else [start]
    except ValueError:
        seeds = []
    if not seeds or (given.seed_path and len(seeds) < 2) or min(seeds) < 0 or max(seeds) >= 2**63:
        raise UsageError(
            f"--seed-path {shown(given.seed_path or '')}: give two or more seeds below 2^63, such as 1,2,3"
        )
    to = reading.clean(given.to) if given.to is not None else None
    return drawing.frames(reading.clean(given.prompt), to, seeds, given.frames or 16)
