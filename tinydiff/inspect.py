"""What a model folder, a configuration or a generated image is, without running it.

Sizes and types of weights come from the headers of safetensors and ONNX files; no weight is read. It knows file
layouts, neither torch nor onnxruntime.
"""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinydiff import backends, config, images
from tinydiff.checkpoints.description import Description, denoiser_of, describe
from tinydiff.checkpoints.scheduler import BETA_SCHEDULES
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import read_json, shown

IMAGES = (".png", ".webp", ".jpg", ".jpeg")
MAX_HEADER = 100_000_000  # the safetensors format's own limit
DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8"}
ONNX_DTYPES = {1: "fp32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "fp16", 11: "fp64", 16: "bf16"}
WEIGHTLESS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def show(what: str | None, as_json: bool = False) -> list[str]:
    """Lines on `what`: a model (folder, run or shipped name), a .toml, an image, or None for the default configuration.

    With `as_json` one line of JSON. A configuration is printed as TOML with its defaults filled in. Raises the
    UserError of whatever is missing or damaged.
    """
    found = inspect(what)
    return [json.dumps(found)] if as_json else lines(found)


def inspect(what: str | None) -> dict[str, Any]:
    """What is known of `what`, by what is there; see `model` and `image`."""
    path = Path(what) if what else None
    if path is None or (path.suffix == ".toml" and not path.is_dir()):
        return {"kind": "config", "config": config.to_dict(config.load(path))}
    if path.suffix.lower() in IMAGES and not path.is_dir():
        if not path.exists():
            raise UsageError(f"{shown(path)}: no such image; check the path")
        return {"kind": "image", "path": str(path), "settings": image(path)}
    if path.is_file():
        raise UsageError(f"{shown(path)}: nothing to inspect; give a model folder, a .toml or a generated image")
    return model(backends.find_model(what))


def image(path: Path) -> dict[str, Any]:
    """The settings that an image was generated with. Raises DataError when it has none."""
    return images.read_settings(path)


def model(path: Path) -> dict[str, Any]:
    """A model folder's format, components, sampling facts, tokenizer and defaults. Raises ModelError."""
    index, d = read_json(path / "model_index.json"), describe(path)
    parts = {name: component(path, name) for name in networks(path, index)}
    graphs = [name for name, part in parts.items() if str(part["file"]).endswith(".onnx")]
    return {
        "kind": "model",
        "path": str(path),
        "format": "onnx" if graphs and len(graphs) == len(parts) else "diffusers",
        "class": index.get("_class_name"),
        "onnx": (path / denoiser_of(path) / "model.onnx").is_file(),
        "components": parts,
        "parameters": sum(part["parameters"] or 0 for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        **sampling(path, d),
        "tokenizer": tokenizer(path / "tokenizer"),
        "generate": asdict(d.generate),
    }


def networks(path: Path, index: dict[str, Any]) -> list[str]:
    """Names of the folders that hold weights, or should by the index; a bundle has "vae" in two halves."""
    named = [name for name, value in index.items() if isinstance(value, list) and value and value[0] and is_name(name)]
    others = sorted(p.name for p in path.iterdir() if p.name not in named and weight_files(p))
    halved = [name for name in named if any(other.startswith(f"{name}_") for other in others)]
    return [name for name in [*named, *others] if name not in halved and not name.startswith(WEIGHTLESS)]


def is_name(name: str) -> bool:
    """Whether a name from a file is that of a plain entry, not a path that leads elsewhere."""
    return bool(name) and name not in (".", "..") and "/" not in name and "\\" not in name and "\0" not in name


def sampling(path: Path, d: Description) -> dict[str, Any]:
    """What noise and latents are to the model."""
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    named = BETA_SCHEDULES.get(scheduler.get("beta_schedule", "linear"), "custom")
    return {
        "prediction": d.prediction,
        "schedule": "flow"
        if scheduler.get("use_flow_sigmas")
        else "custom"
        if scheduler.get("trained_betas")
        else named,
        "num_train_timesteps": len(d.schedule),
        "latent_channels": d.latent_channels,
        "factor": d.factor,
        "multiple": d.multiple,
        "size": d.size,
        "scaling_factor": d.scaling_factor,
    }


def tokenizer(path: Path) -> dict[str, Any]:
    """{"length", "vocabulary"}: tokens of a prompt, and how many there are; None where the folder does not say."""
    settings, vocabulary = path / "tokenizer_config.json", path / "vocab.json"
    length = read_json(settings).get("model_max_length") if settings.exists() else None
    return {"length": length, "vocabulary": len(read_json(vocabulary)) if vocabulary.exists() else None}


# ---- weights -------------------------------------------------------------------------------------------------------


def component(path: Path, name: str) -> dict[str, Any]:
    """{"file", "dtype", "parameters", "bytes"} of one network; its safetensors go before its ONNX graph."""
    found = weight_files(path / name)
    if not found:
        return {"file": None, "dtype": None, "parameters": None, "bytes": 0}
    read = safetensors_counts if found[0].suffix == ".safetensors" else onnx_counts
    counts: Counter[str] = Counter()
    for file in found:
        counts += read(file)
    beside = [
        p for file in found if file.suffix == ".onnx" for p in file.parent.glob(f"{file.name}[._]data") if p.is_file()
    ]
    return {
        "file": f"{name}/{found[0].name}",
        "dtype": counts.most_common(1)[0][0] if counts else None,
        "parameters": counts.total(),
        "bytes": sum(p.stat().st_size for p in [*found, *beside]),
    }


def weight_files(folder: Path) -> list[Path]:
    """The one file of weights, or all its shards; of several variants the plain one."""
    tensors = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    plain = [p for p in tensors if "." not in p.stem and "-of-" not in p.stem]
    shards = [p for p in tensors if "-of-" in p.stem]
    graph = folder / "model.onnx"
    return plain[:1] or shards or tensors[:1] or ([graph] if graph.is_file() else [])


def safetensors_counts(path: Path) -> Counter[str]:
    """{dtype: number of values} from the header alone. Raises ModelError where it does not fit the file."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > min(MAX_HEADER, path.stat().st_size - 8):
                raise ValueError("no safetensors header")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        if max((t["data_offsets"][1] for t in header.values()), default=0) + 8 + size != path.stat().st_size:
            raise ValueError("its size is not what its header says")
        counts: Counter[str] = Counter()
        for tensor in header.values():
            counts[DTYPES.get(tensor["dtype"], str(tensor["dtype"]).lower())] += math.prod(tensor["shape"])
        return counts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(f"{shown(path)}: damaged ({error}); fetch or train it again") from None


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
    parts, generate, tokens = found["components"], found["generate"], found["tokenizer"]
    side = found["size"] // found["factor"]
    name = {"onnx": "ONNX bundle", "diffusers": "diffusers folder"}[found["format"]]
    graphs = " with ONNX graphs" if found["onnx"] and found["format"] != "onnx" else ""
    total = f"{short(found['parameters'], ' parameters')}, {short(found['bytes'], 'B')}"
    return [
        *table({"model": found["path"], "format": f"{name}{graphs} ({found['class']}), {total}"}),
        *table({f"  {part}": weights(value) for part, value in parts.items()}),
        *table(
            {
                "images": f"{found['size']}x{found['size']} pixels; sides are multiples of {found['multiple']}",
                "latents": f"{found['latent_channels']}x{side}x{side}, times {found['scaling_factor']:.5g}",
                "noise": f"{found['schedule']}, {found['num_train_timesteps']} levels; predicts {found['prediction']}",
                "prompts": f"{tokens['length'] or '?'} tokens of {tokens['vocabulary'] or '?'}",
                "defaults": ", ".join(f"{key} {value}" for key, value in generate.items()),
            }
        ),
    ]


def weights(part: dict[str, Any]) -> str:
    """One component in a line."""
    if not part["file"]:
        return "no weights"
    return f"{short(part['parameters'], ' parameters')}, {part['dtype']}, {short(part['bytes'], 'B')}, {part['file']}"


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
