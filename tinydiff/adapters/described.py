"""What a file or a folder that changes a model is, by headers alone: LoRA, learnt word, control network, the run that makes one.

Of the model that it is for its own words are told, and what its shapes say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinydiff.adapters import lora, made, origin, words
from tinydiff.adapters.lora import Lora
from tinydiff.checkpoints import single_file, weights
from tinydiff.checkpoints.counts import counts_of
from tinydiff.checkpoints.header import Header, header
from tinydiff.errors import ModelError
from tinydiff.files import RESTORE, read_json, shown
from tinydiff.networks import CONTROL
from tinydiff.stages import NONE

Told = dict[str, Any]
KINDS = ("run", "lora", "word", "control")
MODELS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}  # by their texts' width
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj")
TARGETS += ("conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "conv", "q_proj", "k_proj", "v_proj", "out_proj")
TARGETS += ("fc1", "fc2")  # ends of layers' names
HEADS = {prefix: network for network, prefixes in reversed(lora.KOHYA.items()) for prefix in (f"{network}.", *prefixes)}


def told(path: Path) -> Told | None:
    """ "kind", one of KINDS, and what else is known; None for what is none of them. Raises ModelError for damaged files."""
    if run := made.of_run(path):
        steps, file = run.cfg.train.stage(run.kind).steps, run.folder
        own = {"adapter": run.kind, "model": run.base, "model_sha256": run.sha256, "data": run.cfg.data.path}
        inner = told_of(file) if file.is_dir() else None
        return {
            "kind": "run",
            "run": str(run.path),
            **own,
            "step": run.step,
            "steps": steps,
            "use": run.how,
            "made": inner,
        }
    return told_of(path)


def told_of(path: Path) -> Told | None:
    """The same of what is no run."""
    if (path / "config.json").is_file():
        table = read_json(path / "config.json")
        if table.get("_class_name") != CONTROL.library[1]:
            return None
        files = [header(file) for file in weights.files(path)]
        return of_control(path, {k: s.shape for f in files for k, s in f.tensors.items()}, files, table)
    if path.is_dir():
        files = [] if (path / "model_index.json").exists() else sorted(path.glob("*.safetensors"))
        return next(filter(None, map(told_of, files)), None)
    return of_file(header(path)) if path.suffix.lower() == ".safetensors" else None


def of_file(file: Header) -> Told | None:
    roles = {tensor: lora.split(tensor) for tensor in file.tensors}
    if any(role in ("down", "up") for _, role in roles.values()):
        try:
            return of_lora(file, roles)
        except (IndexError, KeyError) as error:
            raise ModelError(
                f"{shown(file.path)}: a LoRA whose tensors make no sense ({shown(error)}); {RESTORE}"
            ) from None
    if any("unet" in name or "diffusion_model" in name for name in file.tensors) or len(file.tensors) > 10**4:
        return None
    if len(file.tensors) <= len(words.TOWERS) and file.path.stat().st_size < words.LARGEST:
        try:
            word = words.of_tensors(file.path, {name: file.array(name) for name in file.tensors})
        except (ModelError, KeyError):
            return None
        sizes = {name: rows.shape[1] for name, rows in word.vectors.items()}
        return {
            "kind": "word",
            "file": str(file.path),
            "word": word.text,
            "vectors": len(next(iter(word.vectors.values()))),
        } | ({"widths": sizes} | base_of(file, sizes.values()) | size_of([file]))
    try:
        part = single_file.part(file, CONTROL.folder)
    except ModelError:
        return None
    return of_control(file.path, part.shapes, [file], {}) if part else None


def of_lora(file: Header, roles: Mapping[str, tuple[str, str | None]]) -> Told:
    places = dict[str, dict[str, str]]()
    for tensor, (layer, role) in roles.items():
        places.setdefault(layer, {})[role or "other"] = tensor
    opened, ranks, alphas = Lora(file, places), Counter[int](), Counter[str]()
    networks, targets, widths = Counter[str](), Counter[str](), list[int]()
    for layer, parts in places.items():
        shape = file.tensors[parts["down"]].shape
        alpha = file.values(parts["alpha"])[0] if "alpha" in parts else opened.alpha(layer, shape[0])
        ranks[shape[0]] += 1
        alphas[f"{alpha:g}"] += 1
        head = max((prefix for prefix in HEADS if layer.startswith(prefix)), key=len, default="")
        networks[HEADS.get(head, "denoiser")] += 1
        plain = f"_{layer}".replace(".", "_")
        targets[next((end for end in TARGETS if plain.endswith(f"_{end}".replace(".", "_"))), "others")] += 1
        widths += shape[1:2] if re.search(r"attn2[._]to_k$", layer) else []
    style = "kohya" if any(name.startswith("lora_") for name in places) else "diffusers"
    dora = {"dora": True} if any("magnitude" in parts for parts in places.values()) else {}
    return {
        "kind": "lora",
        "file": str(file.path),
        "style": style,
        "layers": dict(networks),
        "targets": dict(targets.most_common()),
        "ranks": dict(ranks.most_common()),
        "alphas": dict(alphas.most_common()),
        **dora,
        **base_of(file, widths),
        **size_of([file]),
    }


def of_control(
    path: Path, shapes: Mapping[str, tuple[int, ...]], files: list[Header], table: Mapping[str, Any]
) -> Told:
    halvings = (
        sum(name.startswith("controlnet_cond_embedding.blocks.") for name in shapes if name.endswith(".weight")) // 2
    )
    texts = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    own = {"kind": "control", "file": str(path), "pixels_a_latent": 2**halvings}
    if (toml := path / "tinydiff.toml").is_file():
        from tinydiff import config

        train = config.load(toml, stored=True).train
        own |= {"condition": train.stage("control").condition} if train.adapter != NONE else {}
    return own | base_of(files[0], texts, table) | size_of(files)


def base_of(file: Header, widths: Iterable[int], table: Mapping[str, Any] | None = None) -> Told:
    """The model that it says it was made of, and that which reads texts of such a width."""
    said = origin.read((table or file.metadata).get(origin.KEY)).get("model")
    others = (file.metadata.get(key) for key in ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"))
    width = max(widths, default=0)
    known = f", as of {MODELS[width]}" if width in MODELS else ""
    return {"model": said or next(filter(None, others), None), "text_width": f"{width}{known}" if width else None}


def size_of(files: list[Header]) -> Told:
    counts = sum((counts_of(file.tensors.values()) for file in files), Counter[str]())
    dtype = counts.most_common(1)[0][0] if counts else None
    return {"dtype": dtype, "parameters": counts.total(), "bytes": sum(file.path.stat().st_size for file in files)}
