"""What a model, a configuration or a generated image is, without running it.

Sizes and types of weights come from the headers of safetensors and ONNX files; no weight is read. It knows file
layouts, neither torch nor onnxruntime.
"""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tinydiff import backends, config, cost, images
from tinydiff.checkpoints import description, dit, weights
from tinydiff.checkpoints.description import Description, denoiser_of, describe
from tinydiff.checkpoints.header import PICKLES, Header, Stored, header
from tinydiff.checkpoints.ldm import averaged
from tinydiff.checkpoints.scheduler import BETA_SCHEDULES, read
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import read_json, shown
from tinydiff.pipeline import check_size

Configs = Mapping[str, dict[str, Any]]  # what `description.configs` reads
IMAGES = (".png", ".webp", ".jpg", ".jpeg")
DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8"}
ONNX_DTYPES = {1: "fp32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "fp16", 11: "fp64", 16: "bf16"}
WEIGHTLESS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
FORMATS = {"diffusers": "diffusers folder", "onnx": "ONNX bundle"}  # the others are named as they are
NO_PIPELINE = {  # why diffusers does not open a format
    "onnx": "it opens no ONNX graphs",
    "DiT weights": "it opens a DiT as a folder; write one with `tinydiff export --format folder --vae FILE`",
}
LONGEST = 10**6  # tokens; transformers writes 1e30 for "no limit"


def show(what: str | None, as_json: bool = False, width: int | None = None, height: int | None = None) -> list[str]:
    """Lines on `what`: a model (folder, file, run or shipped name), a .toml, an image, or None for the default configuration.

    With `as_json` one line of JSON. A configuration is printed as TOML with its defaults filled in. A model's operations
    are counted at `width` x `height` pixels, by default its own. Raises the UserError of whatever is missing or damaged.
    """
    found = inspect(what, width, height)
    return [json.dumps(found)] if as_json else lines(found)


def inspect(what: str | None, width: int | None = None, height: int | None = None) -> dict[str, Any]:
    """What is known of `what`, by what is there; see `model` and `image`."""
    path = Path(what) if what else None
    kind = kind_of(path)
    if kind != "model" and (width or height):
        raise UsageError("-W, -H: only a model has a cost; leave them out")
    if path is None or kind == "config":
        return {"kind": "config", "config": config.to_dict(config.load(path))}
    if kind == "image":
        if not path.exists():
            raise UsageError(f"{shown(path)}: no such image; check the path")
        return {"kind": "image", "path": str(path), "settings": image(path)}
    if path.is_file() and path.suffix.lower() not in (".safetensors", *PICKLES):
        raise UsageError(f"{shown(path)}: nothing to inspect; give a model, a .toml or a generated image")
    return model(backends.find_model(what), width, height)


def kind_of(path: Path | None) -> str:
    """What a path should lead to, by its name."""
    if path is None or (path.suffix == ".toml" and not path.is_dir()):
        return "config"
    return "image" if path.suffix.lower() in IMAGES and not path.is_dir() else "model"


def image(path: Path) -> dict[str, Any]:
    """The settings that an image was generated with. Raises DataError when it has none."""
    return images.read_settings(path)


def model(path: Path, width: int | None = None, height: int | None = None) -> dict[str, Any]:
    """A model's format, origin, components, sampling facts, tokenizer, operations and defaults.

    What needs an autoencoder is None for the weights of a DiT alone. Raises ModelError, and UsageError for a `width` or
    `height` (pixels) that the model cannot draw.
    """
    file = header(path) if path.is_file() else None
    found = configs(path, file)
    d = describe(path) if "vae" in found else None
    parts = contents(path, file, found)
    index, form = found["model_index"], format_of(file, parts, d)
    tokens = tokenizer(path, found)
    return {
        "kind": "model",
        "path": str(path),
        "format": form,
        "made_by": made_by(file, index),
        "class": index.get("_class_name"),
        "no_diffusers_pipeline": index.get("_no_diffusers_pipeline") or NO_PIPELINE.get(form),
        "onnx": (path / denoiser_of(path) / "model.onnx").is_file(),
        "ema": any(map(averaged, file.tensors)) if file else False,
        "components": parts,
        "parameters": sum(part["parameters"] or 0 for part in parts.values()),
        "bytes": path.stat().st_size if file else sum(part["bytes"] for part in parts.values()),
        **sampling(found, d),
        "tokenizer": tokens,
        "flops": operations(path, found, d, tokens["length"], width, height),
        "generate": asdict(d.generate) if d else None,
    }


def configs(path: Path, file: Header | None) -> Configs:
    """A model's JSON files, or what stands for them; those of a DiT alone lack an autoencoder."""
    if file and dit.is_published(file.tensors):
        return dit.configs({name: stored.shape for name, stored in file.tensors.items()})
    return description.configs(path)


def format_of(file: Header | None, parts: Configs, d: Description | None) -> str:
    """How the model is stored: a key of FORMATS, or a name."""
    if file:
        return "single file" if d else "DiT weights"
    graphs = [part for part in parts.values() if str(part["file"]).endswith(".onnx")]
    return "onnx" if graphs and len(graphs) == len(parts) else "diffusers"


def made_by(file: Header | None, index: dict[str, Any]) -> dict[str, str]:
    """What says where the model comes from, by what kind of thing it names; a path on somebody's disk does not."""
    if file:
        said = {key: file.metadata.get(f"modelspec.{key}") for key in ("title", "implementation")}
    else:
        name = str(index.get("_name_or_path") or "")
        local = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
        said = {"tinydiff": index.get("_tinydiff_version"), "diffusers": index.get("_diffusers_version")}
        said |= {"name": None if local else name}
    return {key: str(value) for key, value in said.items() if value}


def sampling(found: Configs, d: Description | None) -> dict[str, Any]:
    """What noise and latents are to the model."""
    table, denoiser = found["scheduler"], found.get("unet") or found["transformer"]
    scheduler = d.scheduler if d else read(table)
    straight = table.get("use_flow_sigmas") or str(table.get("_class_name")).startswith("FlowMatch")
    named = BETA_SCHEDULES.get(table.get("beta_schedule", "linear"), "custom")
    return {
        "prediction": scheduler.prediction,
        "schedule": "flow" if straight else "custom" if table.get("trained_betas") else named,
        "num_train_timesteps": len(scheduler.schedule),
        "latent_channels": d.latent_channels if d else denoiser["in_channels"],
        "latent_size": denoiser["sample_size"],
        "mask": bool(d and d.in_channels > d.latent_channels),
        "factor": d.factor if d else None,
        "multiple": d.multiple if d else None,
        "size": d.size if d else None,
        "scaling_factor": d.scaling_factor if d else None,
    }


def tokenizer(path: Path, found: Configs) -> dict[str, Any]:
    """{"kind", "length", "vocabulary"}: tokens of a prompt, and how many there are; None where the model does not say.

    A class-conditional model has "classes" and how many are "named" instead of a vocabulary.
    """
    if "transformer" in found and "text_encoder" not in found:
        labels = description.tokenizer_of(path, dict(found))
        return {"kind": "class", "length": 1, "classes": labels.pad, "named": sum(map(bool, labels.names))}
    text = found.get("text_encoder", {})
    settings, vocabulary = path / "tokenizer" / "tokenizer_config.json", path / "tokenizer" / "vocab.json"
    length = read_json(settings).get("model_max_length") if settings.exists() else None
    limited = isinstance(length, int) and 0 < length < LONGEST
    return {
        "kind": "t5" if text.get("model_type") == "t5" else "clip",
        "length": length if limited else text.get("max_position_embeddings"),
        "vocabulary": len(read_json(vocabulary)) if vocabulary.exists() else text.get("vocab_size"),
    }


def operations(
    path: Path, found: Configs, d: Description | None, tokens: int | None, width: int | None, height: int | None
) -> dict[str, int | None]:
    """`cost.flops` at a size in pixels, by default the model's own; without an autoencoder, of which pixels is not known."""
    if d is None and (width or height):
        raise UsageError("-W, -H: without an autoencoder it is not known how many pixels a latent is; leave them out")
    if d and (width or height):
        check_size(d, width or d.size, height or d.size)
    size = (width or d.size, height or d.size) if d else (None, None)
    try:
        side = int((found.get("unet") or found["transformer"])["sample_size"])
        w, h = (pixels // d.factor if d and pixels else side for pixels in size)
        counts = cost.flops(found, h, w, tokens or length_of(found))
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{shown(path)}: its configuration files lack or misstate {error}") from None
    return {**counts, "width": size[0], "height": size[1]}


def length_of(found: Configs) -> int:
    """Tokens of a prompt where a folder does not say."""
    if found.get("text_encoder", {}).get("model_type") == "t5":
        from tinydiff.text.sentencepiece import T5_LENGTH

        return T5_LENGTH
    from tinydiff.text.tokenizer import CLIP_LENGTH

    return CLIP_LENGTH


# ---- weights -------------------------------------------------------------------------------------------------------


def contents(path: Path, file: Header | None, found: Configs) -> dict[str, dict[str, Any]]:
    """Every network's {"file", "dtype", "parameters", "bytes"}, by its folder's name."""
    if file is None:
        return {name: component(path, name) for name in networks(path, found["model_index"])}
    if "transformer" in found:
        return {"transformer": inside(file, file.tensors)}
    from tinydiff.checkpoints.single_file import network

    parts = {name: network(file, name) for name in ("unet", "text_encoder", "vae")}
    return {name: inside(file, {at.name for at in part.sources.values()}) for name, part in parts.items() if part}


def inside(file: Header, names: Iterable[str]) -> dict[str, Any]:
    """The network that tensors of a single file are."""
    tensors = [file.tensors[name] for name in names]
    return part(file.path.name, counts_of(tensors), sum(tensor.end - tensor.start for tensor in tensors))


def networks(path: Path, index: dict[str, Any]) -> list[str]:
    """Names of the folders that hold weights, or should by the index; a bundle has "vae" in two halves."""
    named = [name for name, value in index.items() if isinstance(value, list) and value and value[0] and is_name(name)]
    others = sorted(p.name for p in path.iterdir() if p.name not in named and weight_files(p))
    halved = [name for name in named if any(other.startswith(f"{name}_") for other in others)]
    return [name for name in [*named, *others] if name not in halved and not name.startswith(WEIGHTLESS)]


def is_name(name: str) -> bool:
    """Whether a name from a file is that of a plain entry, not a path that leads elsewhere."""
    return bool(name) and name not in (".", "..") and "/" not in name and "\\" not in name and "\0" not in name


def component(path: Path, name: str) -> dict[str, Any]:
    """{"file", "dtype", "parameters", "bytes"} of one network; its safetensors go before its ONNX graph."""
    found = weight_files(path / name)
    if not found:
        return {"file": None, "dtype": None, "parameters": None, "bytes": 0}
    count = safetensors_counts if found[0].suffix == ".safetensors" else onnx_counts
    counts = sum(map(count, found), Counter[str]())
    beside = [
        p for file in found if file.suffix == ".onnx" for p in file.parent.glob(f"{file.name}[._]data") if p.is_file()
    ]
    return part(f"{name}/{found[0].name}", counts, sum(p.stat().st_size for p in [*found, *beside]))


def part(file: str, counts: Counter[str], size: int) -> dict[str, Any]:
    dtype = counts.most_common(1)[0][0] if counts else None
    return {"file": file, "dtype": dtype, "parameters": counts.total(), "bytes": size}


def weight_files(folder: Path) -> list[Path]:
    """The files of `weights.files`, or the ONNX graph; none where there are neither. ModelError for a missing shard."""
    try:
        return weights.files(folder)
    except ModelError:
        if any(folder.glob("*.safetensors.index*.json")):
            raise
    graph = folder / "model.onnx"
    return [graph] if graph.is_file() else []


def safetensors_counts(path: Path) -> Counter[str]:
    """{dtype: number of values} from the header alone. Raises ModelError where it does not fit the file."""
    return counts_of(header(path).tensors.values())


def counts_of(tensors: Iterable[Stored]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[DTYPES.get(tensor.dtype, tensor.dtype.lower())] += math.prod(tensor.shape)
    return counts


def onnx_counts(path: Path) -> Counter[str]:
    """{dtype: number of values} of a graph's floating-point and 8-bit initializers.

    Walks protobuf fields by hand (onnx.proto: ModelProto.graph = 7, GraphProto.initializer = 5, TensorProto.dims = 1,
    .data_type = 2) over a memory map, so only headers are touched.
    """
    counts: Counter[str] = Counter()
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for graph in (v for n, v in fields(data, 0, len(data)) if n == 7 and isinstance(v, tuple)):
                for tensor in (v for n, v in fields(data, *graph) if n == 5 and isinstance(v, tuple)):
                    dtype, count = initializer(data, *tensor)
                    counts[ONNX_DTYPES.get(dtype, str(dtype))] += count
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"{shown(path)}: damaged ({error}); fetch or export it again") from None
    return Counter({dtype: n for dtype, n in counts.items() if dtype not in ("int32", "int64", "9")})


def initializer(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """(data type, number of values) of a TensorProto; dims come one a field, or packed."""
    dims, dtype = [], 0
    for number, value in fields(data, start, end):
        if number == 1 and isinstance(value, tuple):
            at = value[0]
            while at < value[1]:
                dim, at = varint(data, at)
                dims.append(dim)
        elif number == 1:
            dims.append(value)
        elif number == 2 and isinstance(value, int):
            dtype = value
    return dtype, math.prod(dims)


def fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """(number, value) of every field of a protobuf message; a length-delimited value is its (start, end)."""
    while start < end:
        key, start = varint(data, start)
        kind = key & 7
        if kind == 0:
            value, start = varint(data, start)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, start = varint(data, start)
        if size is None or start + size > end:
            raise ValueError("not an ONNX file, or cut off")
        yield key >> 3, (start, start + size)
        start += size


def varint(data: mmap.mmap, start: int) -> tuple[int, int]:
    """(value, end) of a base-128 number, least significant group first."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[start]
        value, start = value | (byte & 127) << shift, start + 1
        if byte < 128:
            return value, start
    raise ValueError("not an ONNX file")


# ---- for a person --------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> list[str]:
    """What `inspect` found, in a few lines that are safe to print."""
    if found["kind"] == "config":
        return config.to_toml(config.build(config.Config, found["config"], "", [])).splitlines()
    if found["kind"] == "image":
        return table({"image": found["path"]} | found["settings"])
    parts = {f"  {name}": weights_line(part) for name, part in found["components"].items()}
    if not found["size"]:
        parts["  vae"] = "no autoencoder: give one with --vae"
    rows = {"model": found["path"], "format": format_line(found), **parts, "made by": origin_line(found["made_by"])}
    rows |= {"diffusers": pipeline_line(found), "images": images_line(found), "latents": latents_line(found)}
    rows["noise"] = f"{found['schedule']}, {found['num_train_timesteps']} levels; predicts {found['prediction']}"
    rows |= {"prompts": prompts_line(found["tokenizer"]), "cost": cost_line(found["flops"])}
    rows["defaults"] = ", ".join(f"{key} {value}" for key, value in (found["generate"] or {}).items())
    return table({key: value for key, value in rows.items() if value})


def format_line(found: dict[str, Any]) -> str:
    graphs = " with ONNX graphs" if found["onnx"] and found["format"] != "onnx" else ""
    averages = " with averaged (EMA) weights" if found["ema"] else ""
    total = f"{short(found['parameters'], ' parameters')}, {short(found['bytes'], 'B')}"
    return f"{FORMATS.get(found['format'], found['format'])}{graphs}{averages}, {total}"


def weights_line(part: dict[str, Any]) -> str:
    """One component; a single file's name is the model's."""
    if not part["file"]:
        return "no weights"
    place = f", {part['file']}" if "/" in part["file"] else ""
    return f"{short(part['parameters'], ' parameters')}, {part['dtype']}, {short(part['bytes'], 'B')}{place}"


def origin_line(said: dict[str, str]) -> str:
    """Programs with their versions, then names."""
    return ", ".join(f"{k} {v}" if k in ("tinydiff", "diffusers") else v for k, v in said.items())


def pipeline_line(found: dict[str, Any]) -> str:
    reason = found["no_diffusers_pipeline"] or ("" if found["class"] else "model_index.json names none")
    return f"no pipeline: {reason}" if reason else str(found["class"])


def images_line(found: dict[str, Any]) -> str:
    size = found["size"]
    return f"{size}x{size} pixels; sides are multiples of {found['multiple']}" if size else ""


def latents_line(found: dict[str, Any]) -> str:
    side, scale = found["latent_size"], found["scaling_factor"]
    scaled = f", times {scale:.5g}" if scale else ""
    mask = "; reads a mask, and an image's latents, beside them" if found["mask"] else ""
    return f"{found['latent_channels']}x{side}x{side}{scaled}{mask}"


def prompts_line(tokens: dict[str, Any]) -> str:
    if tokens["kind"] == "class":
        return f"{tokens['classes']} classes, {tokens['named'] or 'none'} named"
    name = {"clip": "CLIP", "t5": "T5"}[tokens["kind"]]
    return f"{tokens['length'] or '?'} {name} tokens of {tokens['vocabulary'] or '?'}"


def cost_line(flops: dict[str, int | None]) -> str:
    """Operations of a call, a decoding and the reading of a prompt."""
    size = f" at {flops['width']}x{flops['height']}" if flops["width"] else ""
    call = f"{short(flops['denoiser'] or 0, 'FLOP')} a call{size} (x2 with guidance)"
    others = [(name, flops[key]) for name, key in (("decode", "decoder"), ("text", "text"))]
    return ", ".join([call, *(f"{name} {short(count, 'FLOP')}" for name, count in others if count)])


def table(rows: dict[str, Any]) -> list[str]:
    """Two columns; nothing in them can act on a terminal."""
    width = max(map(len, rows)) + 2
    return [
        shown(f"{key:{max(width, 14)}}{value if isinstance(value, str) else json.dumps(value)}")
        for key, value in rows.items()
    ]


def short(number: float, what: str) -> str:
    """3 significant digits and a power of a thousand: 12345678 of "B" is "12.3 MB"."""
    for unit, name in UNITS:
        if number >= unit * 0.9995:
            return f"{number / unit:.3g} {name}{what}"
    return f"{number:g} {what.strip()}"
