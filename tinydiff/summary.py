"""What `inspect` knows, in lines for a person that are safe to print on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tinydiff import config
from tinydiff.adapters import described
from tinydiff.networks import TEXT_ENCODERS
from tinydiff.progress import duration
from tinydiff.schema import to_toml
from tinydiff.system import escaped, shown

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
FORMATS = {"diffusers": "diffusers folder", "onnx": "ONNX bundle"}  # the others are named as they are


def lines(told: dict[str, Any]) -> list[str]:
    """What `inspect` told, in a few lines that are safe to print."""
    if told["kind"] == "config":
        costs = [f"# {line}" for line in cost_lines(told["cost"])] if "cost" in told else []
        cfg = config.make(**told["config"])
        return [*to_toml(cfg, config.unread(cfg)).splitlines(), *([""] if costs else []), *costs]
    if told["kind"] in described.KINDS:
        return table(dict(adapter_rows(told)))
    if told["kind"] == "images":
        chosen = {f"  {key}": f"{each['value']}: {each['reason']}" for key, each in told["chosen"].items()}
        notes = {f"note {i}": note for i, note in enumerate(told["notes"], 1)}
        return table(
            told["rows"] | {"chosen": "what `tinydiff train` would, unless it is told otherwise"} | chosen | notes
        )
    if told["kind"] == "unfinished":
        done = {f"  {k}": f"{s['step']:,} of {s['steps']:,} steps" for k, s in told["stages"].items()}
        rows = {"run": f"{told['path']}, not at its end"} | done
        if told["time"]:
            rows["time"] = f"{duration(told['used'])} used of {duration(told['time'])}"
        rows["model"] = told["model"] or "none yet"
        return table(rows | {"go on": f"tinydiff train {told['path']}"})
    if told["kind"] == "image":
        return table({"image": told["path"]} | told["settings"])
    parts = {f"  {name}": weights_line(part) for name, part in told["components"].items()}
    if not told["size"]:
        parts["  vae"] = "no autoencoder: give one with --vae"
    rows = {"model": told["path"], "format": format_line(told), **parts, "made by": origin_line(told["made_by"])}
    reason = told["no_diffusers_pipeline"] or ("" if told["class"] else "model_index.json names none")
    rows |= {"diffusers": f"no pipeline: {reason}" if reason else str(told["class"])}
    said = {name: graph_line(each) for name, each in told["graphs"].items() if each}
    rows |= (
        {"graphs": next(iter(said.values()), "")}
        if len({*said.values()}) < 2
        else {f"graph {k}": v for k, v in said.items()}
    )
    size, side, factor = told["size"], told["latent_size"], told["scaling_factor"]
    rows["images"] = size and f"{size}x{size} pixels; sides are multiples of {told['multiple']}"
    scaled, mask = f", times {factor:.5g}" if factor else "", "; reads a mask, and an image's latents, beside them"
    rows["latents"] = f"{told['latent_channels']}x{side}x{side}{scaled}{mask if told['mask'] else ''}"
    names = f" ({', '.join(told['labels'][:5])}{', ...' * (len(told['labels']) > 5)})" if told["labels"] else ""
    says = {"label": f"a class{names} by --label", "image": "another image by --reference"}
    rows["told"] = "; ".join(says[column] for column in reversed(told["told"]))
    rows["noise"] = f"{told['schedule']}, {told['num_train_timesteps']} levels; predicts {told['prediction']}"
    first, *others = cost_lines(told["cost"])
    rows |= {"prompts": prompts_line(told["tokenizer"]), "cost": first}
    rows |= {f"  of {name}": cost for name, cost in (line.split(": ", 1) for line in others)}
    rows["defaults"] = ", ".join(f"{key} {value}" for key, value in (told["generate"] or {}).items())
    rows |= {f"note {i}": note for i, note in enumerate(told["notes"], 1)}
    return table({key: value for key, value in rows.items() if value})


def adapter_rows(told: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What changes a model, or the run that made it, in two columns."""
    for key, value in told.items():
        if key == "made":
            yield from adapter_rows(value or {})
        elif key in ("bytes", "parameters"):
            yield key, short(value, "B" if key == "bytes" else "").strip()
        elif isinstance(value, dict):
            yield key, ", ".join(f"{k}: {v}" for k, v in value.items())
        elif value is not None and (key, value) != ("kind", "run"):
            yield key.replace("_", " "), value if isinstance(value, str) else str(value)


def format_line(told: dict[str, Any]) -> str:
    graphs = " with ONNX graphs" if told["onnx"] and told["format"] != "onnx" else ""
    averages = " with averaged (EMA) weights" if told["ema"] else ""
    total = f"{short(told['parameters'], ' parameters')}, {short(told['bytes'], 'B')}"
    return f"{FORMATS.get(told['format'], told['format'])}{graphs}{averages}, {total}"


def weights_line(part: dict[str, Any]) -> str:
    """One component; a single file's name is the model's."""
    if not part["file"]:
        return "no weights"
    place = f", {part['file']}" if "/" in part["file"] else ""
    return f"{short(part['parameters'], ' parameters')}, {part['dtype']}, {short(part['bytes'], 'B')}{place}"


def graph_line(said: dict[str, str]) -> str:
    """Precision, where it runs, and what stays float32 in it."""
    places = {"any": "any provider", "cpu": "CPUs", "cuda": "CUDA alone"}
    islands = said.get("islands", "").split()
    beside = (
        f"; float32 where values are large: {', '.join(islands[:3])}{', ...' * (len(islands) > 3)}" if islands else ""
    )
    return shown(f"{said.get('precision', '?')}, for {places.get(said.get('device', ''), '?')}{beside}")


def origin_line(said: dict[str, str]) -> str:
    """Programs with their versions, then names."""
    return ", ".join(f"{k} {v}" if k in ("tinydiff", "diffusers") else v for k, v in said.items())


def prompts_line(tokens: dict[str, Any]) -> str:
    if "classes" in tokens:
        return f"{tokens['classes']} classes, {tokens['named'] or 'none'} named"
    return f"{tokens['length'] or '?'} {TEXT_ENCODERS[tokens['kind']].title} tokens of {tokens['vocabulary'] or '?'}"


def cost_lines(cost: dict[str, Any]) -> list[str]:
    """What is counted, then each network's line."""
    if cost["networks"] is None:
        return [f"not counted: {cost['why']}"]
    size = f" at {cost['width']}x{cost['height']}" if cost["width"] else ""
    head = f"one call{size} of each network (the denoiser: twice a step with guidance)"
    fields = ("parameters", " parameters"), ("flops", "FLOP"), ("activations", "B of activations")
    lines = {k: ", ".join(short(each[f], unit) for f, unit in fields) for k, each in cost["networks"].items()}
    reach = {k: each["reach"] for k, each in cost["networks"].items()}
    return [head, *(f"{k}: {line}" + f", receptive field {reach[k]}" * bool(reach[k]) for k, line in lines.items())]


def table(rows: dict[str, Any]) -> list[str]:
    """Two columns; nothing in them can act on a terminal."""
    width = max(map(len, rows)) + 2
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in rows.items()}
    return [escaped(f"{key:{max(width, 14)}}{text}") for key, text in texts.items()]


def short(number: float, what: str) -> str:
    """3 significant digits and a power of a thousand: 12345678 of "B" is "12.3 MB"."""
    for unit, name in UNITS:
        if number >= unit * 0.9995:
            return f"{number / unit:.3g} {name}{what}"
    return f"{number:g} {what.strip()}"
