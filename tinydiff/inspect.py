"""What a model, a configuration or a generated image is, without running it.

Sizes and types of weights come from the headers of safetensors and ONNX files; no weight is read. It knows file layouts, and no
onnxruntime; torch is imported only to count what a call costs.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

from tinydiff import backends, beginning, config, images
from tinydiff.adapters import described
from tinydiff.backends.graph import check
from tinydiff.beginning import is_run
from tinydiff.checkpoints import control, new, weights
from tinydiff.checkpoints.counts import counts_of, onnx_counts, safetensors_counts
from tinydiff.checkpoints.description import Description, describe
from tinydiff.checkpoints.header import PICKLES, Header
from tinydiff.checkpoints.ldm import averaged
from tinydiff.checkpoints.scheduler import read
from tinydiff.checkpoints.source import Source
from tinydiff.cost import costs
from tinydiff.data.listing import IMAGES as FILES
from tinydiff.data.listing import MODELS, Skips, kind, walk
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import again, read_json, shown, undisturbed
from tinydiff.networks import CONTROL, VAE, denoiser_in, network_of, networks, text_encoders, tokenizer_folder
from tinydiff.networks.network import OtherNetwork
from tinydiff.pipeline import check_size
from tinydiff.schema import flat as to_flat
from tinydiff.schema import to_dict
from tinydiff.text.labels import LEAST

Configs = Mapping[str, dict[str, Any]]  # what `Source.configs` has
IMAGES = (".png", ".webp", ".jpg", ".jpeg")
WEIGHTLESS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")
NO_PIPELINE = {  # why diffusers does not open a format
    "onnx": "it opens no ONNX graphs",
    "DiT weights": "it opens a DiT as a folder; write one with `tinydiff export --format folder --vae FILE`",
}
LONGEST = 10**6  # tokens; transformers writes 1e30 for "no limit"


def show(what: str | None, as_json: bool = False, width: int | None = None, height: int | None = None) -> list[str]:
    """Lines on `what`: a model (folder, file, run or shipped name), a .toml, an image, a folder of images to train on, or None
    for the default configuration.

    With `as_json` one line of JSON. A configuration is printed as TOML with its defaults filled in, and what its networks
    cost as comments. Costs are counted at `width` x `height` pixels, by default the model's own. Raises the UserError of
    whatever is missing or damaged.
    """
    from tinydiff.summary import lines

    told = inspect(what, width, height)
    return [json.dumps(told)] if as_json else lines(told)


def inspect(what: str | None, width: int | None = None, height: int | None = None) -> dict[str, Any]:
    """What is known of `what`, by what is there; see `configuration`, `photos`, `beginning.progress` and `model`."""
    path = Path(what) if what else None
    if path is None or (path.suffix == ".toml" and not path.is_dir()):
        return configuration(path, width, height)
    if path.suffix.lower() in IMAGES and not path.is_dir():
        if width or height:
            raise UsageError("-W, -H: only a model and a configuration have a cost; leave them out")
        if not path.exists():
            raise UsageError(f"{shown(path)}: no such image; check the path")
        return {"kind": "image", "path": str(path), "settings": images.read_settings(path)}
    if is_run(path) and (told := beginning.progress(path)):
        return {"kind": "unfinished", "path": str(path), **told}
    if path.suffix.lower() == ".tar" or holds_images(path):
        return photos(path)
    if path.is_file() and path.suffix.lower() not in (".safetensors", *PICKLES):
        raise UsageError(f"{shown(path)}: nothing to inspect; give a model, a .toml or a generated image")
    if told := described.told(path):
        if width or height:
            raise UsageError("-W, -H: only a model and a configuration have a cost; leave them out")
        return told
    return again(lambda: model(backends.find_model(what), width, height))


def holds_images(path: Path) -> bool:
    """Whether a folder is one of images: it is no model and no run, and has some."""
    if not path.is_dir() or is_run(path) or any((path / name).exists() for name in MODELS):
        return False
    return any(kind(name) in FILES for name in walk(path, Skips()))


def photos(path: Path) -> dict[str, Any]:
    """What a run on these images would be: rows for a person, what would be chosen, and what to mind."""
    from tinydiff import outlook
    from tinydiff.choices import machine

    cfg, folder, reasons, facts = beginning.begin(path, [], fresh=True)
    assert facts
    rows = outlook.outlook(cfg, facts, machine(cfg.train.device), folder)
    chosen = {key: {"value": to_flat(cfg)[key], "reason": why} for key, why in reasons.items()}
    return {"kind": "images", "path": str(path), "rows": rows, "chosen": chosen, "notes": outlook.warnings(cfg, facts)}


def configuration(path: Path | None, width: int | None = None, height: int | None = None) -> dict[str, Any]:
    """A configuration, and what the networks that it asks for cost; of the default one alone nothing is counted."""
    cfg = config.load(path, say=lambda text: print(f"note: {text}", file=sys.stderr))
    told = {"kind": "config", "config": to_dict(cfg)}
    if path is None and not (width or height):
        return told
    text, given = cfg.text_encoder, cfg.text_network.given(cfg)
    pieces = LEAST + 1 if cfg.text_network.labels else 0 if given else text.vocab_size
    stand_in = SimpleNamespace(vocab_size=pieces, bos=0, eos=0, pad=None if given else LEAST, max_length=0, table=dict)
    if given and not (given / "config.json").exists() and not (width or height):
        return told  # written for another machine
    configs = new.configs(cfg, stand_in)
    d = describe(configs, Path(), cfg.generate)
    return told | {"cost": cost(configs, d, text.max_position_embeddings, width, height)}


def model(path: Path, width: int | None = None, height: int | None = None) -> dict[str, Any]:
    """A model's format, origin, components, sampling facts, tokenizer, cost and defaults.

    What needs an autoencoder is None for the weights of a DiT alone. Raises ModelError, and UsageError for a `width` or
    `height` (pixels) that the model cannot draw.
    """
    source = Source(path)
    with undisturbed(source.stamps):
        return of_source(source, width, height)


def of_source(source: Source, width: int | None = None, height: int | None = None) -> dict[str, Any]:
    """What `model` says."""
    path, file, configs = source.path, source.file, source.partial
    d = source.description if VAE in configs else None
    parts = contents(source)
    index = configs["model_index"]
    graphs = [str(part["file"]).endswith((".onnx", f"/{weights.INT8}")) for part in parts.values()]
    form = "onnx" if graphs and all(graphs) else "diffusers"
    form = form if not file else "single file" if d else "DiT weights"
    tokens, (encoder, *_) = tokenizer(source), text_encoders(configs).values()
    return {
        "kind": "model",
        "path": str(path),
        "format": form,
        "made_by": made_by(file, index),
        "class": index.get("_class_name"),
        "no_diffusers_pipeline": index.get("_no_diffusers_pipeline") or NO_PIPELINE.get(form),
        "onnx": (path / source.denoiser / "model.onnx").is_file(),
        "graphs": graphs_of(path, parts),
        "ema": any(map(averaged, file.tensors)) if file else False,
        "components": parts,
        "parameters": sum(part["parameters"] or 0 for part in parts.values()),
        "bytes": path.stat().st_size if file else sum(part["bytes"] for part in parts.values()),
        **sampling(configs, d),
        "tokenizer": tokens,
        "cost": (counted := cost(steered(source), d, tokens["length"] or encoder.length, width, height, path)),
        "flops": flops(counted, source.denoiser),
        "generate": asdict(d.generate) if d else None,
        "notes": list(d.notes) if d else [],
    }


def steered(source: Source) -> Configs:
    """The configurations of a model, with those of control networks in its folder."""
    inside = sorted(source.path.glob(f"{CONTROL.folder}*/config.json"))
    tables = {path.parent.name: control.table(path.parent, source.header, {}) for path in inside}
    return {
        **source.partial,
        **{name: network_of(name, table).valid(table, whole=False) for name, table in tables.items()},
    }


def made_by(file: Header | None, index: dict[str, Any]) -> dict[str, str]:
    """What says where the model comes from, by what kind of thing it names; a path on somebody's disk does not."""
    if file:
        said = {key: file.metadata.get(f"modelspec.{key}") for key in ("title", "implementation")}
    else:
        name = str(index.get("_name_or_path") or "")
        local = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
        said = {"tinydiff": index.get(new.VERSION), "diffusers": index.get("_diffusers_version")}
        said |= {"name": None if local else name}
    return {key: str(value) for key, value in said.items() if value}


def sampling(configs: Configs, d: Description | None) -> dict[str, Any]:
    """What noise and latents are to the model."""
    denoiser = configs[denoiser_in(configs)]
    scheduler = d.scheduler if d else read(configs["scheduler"])
    return {
        "prediction": scheduler.prediction,
        "schedule": scheduler.form,
        "num_train_timesteps": len(scheduler.schedule),
        "latent_channels": d.latent_channels if d else denoiser["in_channels"],
        "latent_size": denoiser["sample_size"],
        "mask": bool(d and d.in_channels > d.latent_channels),
        "told": sorted(array.of.column for array in d.given.values()) if d else [],  # type: ignore[union-attr]
        "labels": d.labels.names if d and d.labels else [],
        **{key: getattr(d, key, None) for key in ("factor", "multiple", "size", "scaling_factor")},
    }


def tokenizer(source: Source) -> dict[str, Any]:
    """{"kind", "length", "vocabulary"}: tokens of a prompt, and how many there are; None where the model does not say.

    A class-conditional model has "classes" and how many are "named" instead of a vocabulary.
    """
    (name, encoder), *_ = text_encoders(source.partial).items()
    if encoder.labels:
        labels = source.tokenizers[name]
        return {"kind": encoder.kind, "length": 1, "classes": labels.pad, "named": sum(map(bool, labels.names))}
    text, folder = source.partial.get(name, {}), source.path / tokenizer_folder(name)
    settings, vocabulary = folder / "tokenizer_config.json", folder / "vocab.json"
    length = read_json(settings).get("model_max_length") if settings.exists() else None
    limited = isinstance(length, int) and 0 < length < LONGEST
    return {
        "kind": encoder.kind,
        "length": length if limited else text.get("max_position_embeddings"),
        "vocabulary": len(read_json(vocabulary)) if vocabulary.exists() else text.get("vocab_size"),
    }


def cost(
    configs: Configs, d: Description | None, tokens: int, width: int | None, height: int | None, path: Path = Path()
) -> dict[str, Any]:
    """{"width", "height", "networks"}: `cost.costs` at a size in pixels, by default the model's own.

    Without an autoencoder it is not known how many pixels that is. "networks" is None, and "why" says why, without
    torch, for a network that ours is not, or for sizes that make none.
    """
    if d is None and (width or height):
        raise UsageError("-W, -H: without an autoencoder it is not known how many pixels a latent is; leave them out")
    if d and (width or height):
        check_size(d, width or d.size, height or d.size)
    size, factor = (width or d.size, height or d.size) if d else (None, None), d.factor if d else 1
    try:
        side = int(configs[denoiser_in(configs)]["sample_size"])
        w, h = (pixels // factor if pixels else side for pixels in size)
        return {"width": size[0], "height": size[1], "networks": costs(networks(configs), h, w, tokens, factor)}
    except ImportError:
        why = "it needs torch: pip install torch"
    except OtherNetwork as error:
        why = str(error)
    except (TypeError, ZeroDivisionError, RuntimeError) as error:
        why = f"no network is like this: {error}"
    except (LookupError, ValueError, AttributeError) as error:
        raise ModelError(f"{shown(path)}: its configuration files lack or misstate {error}") from None
    return {"width": size[0], "height": size[1], "networks": None, "why": why}


def flops(cost: dict[str, Any], denoiser: str) -> dict[str, int | None]:
    """Operations alone: of a call, a decoding and the reading of a prompt, None where they are not known."""
    graphs = {"denoiser": denoiser, "decoder": "vae_decoder", "text": "text_encoder"}
    counted = {name: (cost["networks"] or {}).get(graph, {}).get("flops") for name, graph in graphs.items()}
    return {**counted, "width": cost["width"], "height": cost["height"]}


def contents(source: Source) -> dict[str, dict[str, Any]]:
    """Every network's {"file", "dtype", "parameters", "bytes"}, by its folder's name."""
    file = source.file
    if file is None:
        return {name: component(source.path, name) for name in folders(source.path, source.partial["model_index"])}
    if source.published:
        return {source.denoiser: inside(file, file.tensors)}
    return {name: inside(file, {at.name for at in part.places.values()}) for name, part in source.parts.items()}


def inside(file: Header, names: Iterable[str]) -> dict[str, Any]:
    """The network that tensors of a single file are."""
    tensors = [file.tensors[name] for name in names]
    return part(file.path.name, counts_of(tensors), sum(tensor.end - tensor.start for tensor in tensors))


def folders(path: Path, index: dict[str, Any]) -> list[str]:
    """Names of the folders that hold weights, or should by the index; a bundle has "vae" in two halves."""
    entries = [name for name, value in index.items() if isinstance(value, list) and value and value[0]]
    named = [name for name in entries if name not in ("", ".", "..") and not set(name) & set("/\\\0")]
    others = sorted(p.name for p in path.iterdir() if p.name not in named and weight_files(p))
    halved = [name for name in named if any(other.startswith(f"{name}_") for other in others)]
    return [name for name in [*named, *others] if name not in halved and not name.startswith(WEIGHTLESS)]


def graphs_of(path: Path, parts: Iterable[str]) -> dict[str, dict[str, str]]:
    """What a bundle's exporter, if it was ours, says of each graph: precision, device, and islands of float32 by module."""
    files = {name: path / name / "model.onnx" for name in (*parts, "vae_encoder", "vae_decoder")}
    told = {name: check(file) for name, file in files.items() if file.is_file()}
    return {
        k: {n.removeprefix("tinydiff."): v for n, v in m.items() if n.startswith("tinydiff.")} for k, m in told.items()
    }


def component(path: Path, name: str) -> dict[str, Any]:
    """{"file", "dtype", "parameters", "bytes"} of one network; its safetensors go before its ONNX graph."""
    found = weight_files(path / name)
    if not found:
        return {"file": None, "dtype": None, "parameters": None, "bytes": 0}
    count = safetensors_counts if found[0].suffix == ".safetensors" else onnx_counts
    counts = sum(map(count, found), Counter[str]())
    graphs = (file for file in found if file.suffix == ".onnx")
    beside = [p for file in graphs for p in file.parent.glob(f"{file.name}[._]data") if p.is_file()]
    return part(f"{name}/{found[0].name}", counts, sum(p.stat().st_size for p in [*found, *beside]))


def part(file: str, counts: Counter[str], size: int) -> dict[str, Any]:
    dtype = counts.most_common(1)[0][0] if counts else None
    return {"file": file, "dtype": dtype, "parameters": counts.total(), "bytes": size}


def weight_files(folder: Path) -> list[Path]:
    """The files of `weights.files`, or those of a graph alone; none where there are neither. ModelError for a missing shard."""
    try:
        return weights.files(folder)
    except ModelError:
        if any(folder.glob("*.safetensors.index*.json")):
            raise
    alone = [path for name in (weights.INT8, "model.onnx") if (path := folder / name).is_file()]
    return alone[:1]
