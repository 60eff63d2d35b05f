"""Stable Diffusion 1.x and 2.x in one `.safetensors` file: opened as the parts of a diffusers folder, and written from them.

Names and sizes are those of `ldm`. It gives JSON objects and tensors and knows no network. Only `tensors` and `write` import
torch.
"""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken

from tinydiff.checkpoints import ldm, scheduler
from tinydiff.checkpoints.header import Header, header
from tinydiff.checkpoints.ldm import HOMES, KINDS, TABLES, UNUSED, VAE, averaged, backward, forward, renamed, sizes
from tinydiff.diffusion.schedules import scaled_linear
from tinydiff.errors import ModelError
from tinydiff.files import RESTORE, shown, written
from tinydiff.text.tokenizer import BOS, END_OF_WORD, EOS, Tokenizer, byte_symbols

if TYPE_CHECKING:
    from torch import Tensor

SUPPORTED = "give a checkpoint of Stable Diffusion 1.x or 2.x"
OTHERS = {  # what only names in another kind of file hold, each name on a line -> what that file is
    "lora": "a LoRA",
    "control": "a ControlNet",
    "\ninput_hint_block.": "a ControlNet",
    "\nconditioner.embedders.1.": "Stable Diffusion XL",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "\ndepth_model.": "Stable Diffusion 2 with depth",
    "\nembedder.": "Stable Diffusion 2.1 unCLIP",
    "roberta.": "AltDiffusion",
    "time_stack.": "Stable Video Diffusion",
    "motion_modules.": "AnimateDiff",
    "string_to_param": "a textual inversion",
    "label_emb.weight": "the Stable Diffusion upscaler",
    "\ndown_blocks.": "one network of a diffusers folder",
    "\ntext_model.": "one network of a diffusers folder",
}
LABELS = {2816: "Stable Diffusion XL", 2560: "the Stable Diffusion XL refiner"}  # by the width of label_emb.0.0
PARTS = {"unet": "U-Net", "text_encoder": "text encoder", "vae": "autoencoder; give the file of one beside it"}
NAMES = ("_class_name", "architectures", "model_type")  # keys of a configuration that say nothing of size
SCALING = 0.18215
SPEC = "modelspec."  # metadata of https://github.com/Stability-AI/ModelSpec
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}


# ---- networks: where the tensors of each are -------------------------------------------------------------------------


class Source(NamedTuple):
    """Where a tensor of ours is: one of the equal `pieces` along the first axis of tensor `name`."""

    name: str
    piece: int
    pieces: int


@dataclass(frozen=True)
class Network:
    """One network in a file, under our names: where its tensors are, and their shapes there."""

    table: str
    sources: dict[str, Source]
    shapes: dict[str, tuple[int, ...]]


def network(file: Header, component: str, ema: bool = False) -> Network | None:
    """The "unet", "vae" or "text_encoder" of a file, if it has one. ModelError names tensors that belong to no such network."""
    names = _names(file, ema)
    home = next((home for home in HOMES[component] if home[0] + home[1] in names), None)
    if home is None:
        return None
    prefix, _, table = home
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    inside = [name for name in inside if not UNUSED.search(name) and (prefix or name.split(".")[0] in VAE)]
    layout, pairs = TABLES[table]
    entries = backward(pairs(layout(inside)))
    ours = {name: renamed(name, entries) for name in inside}
    if unknown := [prefix + name for name in inside if not ours[name]]:
        raise ModelError(f"{shown(file.path)}: not supported, its {component} has {_some(unknown)}; {SUPPORTED}")
    sources, shapes = {}, {}
    for name in inside:
        shape = file.tensors[names[prefix + name]].shape
        for i, new in enumerate(ours[name]):
            sources[new] = Source(names[prefix + name], i, len(ours[name]))
            shapes[new] = (shape[0] // len(ours[name]), *shape[1:]) if shape else ()
    return Network(table, sources, shapes)


def _names(file: Header, ema: bool = False) -> dict[str, str]:
    """LDM's names -> those in the file. The U-Net's average stands for it if asked for, or if it is alone."""
    plain = {name.removeprefix("state_dict."): name for name in file.tensors}
    means = {name: plain[dotless] for dotless in plain if (name := averaged(dotless))}
    if ema and not means:
        raise ModelError(f"{shown(file.path)}: holds no averaged (EMA) weights; open it without asking for them")
    return plain | means if ema else means | plain


def _some(names: Iterable[str]) -> str:
    return shown(", ".join(sorted(names)[:10]))


def _parts(file: Header, vae: Header) -> dict[str, Network]:
    """The three networks. ModelError says what the file is instead, or lacks."""
    lines = "\n".join(["", *_names(file)])
    label = next((t.shape for name, t in file.tensors.items() if name.endswith("label_emb.0.0.weight")), None)
    other = next((what for needle, what in OTHERS.items() if needle in lines), None)
    if label or other:
        what = other or LABELS.get(label[-1] if label else 0, "a model with more conditions than text")
        raise ModelError(f"{shown(file.path)}: not supported, this is {what}; {SUPPORTED}")
    found = {name: network(vae if name == "vae" else file, name) for name in PARTS}
    if not found["unet"] and not found["text_encoder"] and network(file, "vae"):
        raise ModelError(f"{shown(file.path)}: an autoencoder alone; give it beside a model")
    if not any(found.values()):
        raise ModelError(f"{shown(file.path)}: not supported, holds {_some(file.tensors) or 'nothing'}; {SUPPORTED}")
    if missing := [name for name, part in found.items() if not part]:
        where = vae.path if missing == ["vae"] else file.path
        raise ModelError(f"{shown(where)}: has no {PARTS[missing[0]]}")
    return {name: part for name, part in found.items() if part}


# ---- configurations, from shapes -------------------------------------------------------------------------------------


def kind(path: str | Path) -> str:
    """How a checkpoint's text encoder is named, a key of `KINDS`: "clip" in Stable Diffusion 1.x, "open_clip" in 2.x."""
    file = header(path)
    if (part := network(file, "text_encoder")) is None:  # the file may lack an autoencoder, where another's is taken
        raise ModelError(f"{shown(file.path)}: has no {PARTS['text_encoder']}")
    return part.table


def configs(
    path: str | Path, vae: str | Path | None = None, prediction: str | None = None
) -> dict[str, dict[str, Any]]:
    """What a diffusers folder's JSON files hold: "unet", "vae", "text_encoder", "scheduler" and "model_index".

    `vae` is a file whose autoencoder is taken instead. What the U-Net predicts is `prediction` ("epsilon" or
    "v_prediction"), or what the metadata say, or v where a tensor is named `v_pred`, or what `_guess` finds, in this order.
    ModelError for what is damaged, incomplete, or not Stable Diffusion 1.x or 2.x.
    """
    file = header(path)
    parts = _parts(file, header(vae) if vae else file)
    number = KINDS[parts["text_encoder"].table].number
    try:
        found = sizes({name: part.shapes for name, part in parts.items()}, KINDS[parts["text_encoder"].table])
        prediction = prediction or _said(file) or _guess(file, parts["unet"], number)
        factor = 2 ** (len(found["vae"]["block_out_channels"]) - 1)
        side = _side(file, factor) or (96 if (number, prediction) == (2, "v_prediction") else 64)
        found["unet"]["sample_size"], found["vae"]["sample_size"] = side, side * factor
        found["vae"]["scaling_factor"] = _scaling(file)
        found["scheduler"] = _scheduler(file, prediction)
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"{shown(file.path)}: incomplete, or not Stable Diffusion: {error}; {RESTORE}") from error
    return found | {"model_index": _index(found)}


def autoencoder(path: str | Path) -> dict[str, Any]:
    """The `config.json` of the autoencoder in a file, which may hold nothing else. ModelError where there is none."""
    file = header(path)
    if (part := network(file, "vae")) is None:
        raise ModelError(f"{shown(file.path)}: has no {PARTS['vae']}")
    found = ldm.autoencoder(part.shapes)
    side = 64 * 2 ** (len(found["block_out_channels"]) - 1)
    return found | {"sample_size": side, "scaling_factor": _scaling(file)}


def _said(file: Header) -> str | None:
    """What the file says that its U-Net predicts."""
    keys = (file.metadata.get(SPEC + key, "") for key in ("prediction_type", "predict_key"))
    said = next((PREDICTIONS[value] for value in keys if value in PREDICTIONS), None)
    said = said or ARCHITECTURES.get(file.metadata.get(SPEC + "architecture", ""))
    return said or ("v_prediction" if "v_pred" in _names(file) else None)


def _guess(file: Header, unet: Network, number: int) -> str:
    """Epsilon, but v for Stable Diffusion 2 where one bias deviates much, which tells 768-v from 512-base.

    The test is ComfyUI's; diffusers takes every 2.x for v, stable-diffusion.cpp runs the network. Inpainting is epsilon.
    """
    biases = [name for name in unet.sources if re.match(r"up_blocks\..*\.transformer_blocks\.0\.norm1\.bias$", name)]
    if number == 1 or not biases or unet.shapes["conv_in.weight"][1] != unet.shapes["conv_out.weight"][0]:
        return "epsilon"
    return "v_prediction" if file.values(unet.sources[max(biases)].name).std() > 0.09 else "epsilon"


def _side(file: Header, factor: int) -> int | None:
    """Latents along a side of the square that the metadata name, if they do."""
    square = re.fullmatch(r"([1-9]\d{1,4})x\1", file.metadata.get(SPEC + "resolution", ""))
    return int(square[1]) // factor if square and int(square[1]) % factor == 0 else None


def _scaling(file: Header) -> float:
    """Latents are this times the autoencoder's. LDM stores it only where it was measured; half precision rounds it."""
    stored = _names(file).get("scale_factor")
    factor = float(file.values(stored).reshape(())) if stored else SCALING
    return SCALING if math.isclose(factor, SCALING, rel_tol=2**-8) else factor


def _scheduler(file: Header, prediction: str) -> dict[str, Any]:
    """`scheduler_config.json` as Stable Diffusion's, with the file's own noise levels where they are others."""
    stored = _names(file).get("alphas_cumprod")
    bars = file.values(stored).reshape(-1).tolist() if stored else []
    return {
        "_class_name": "PNDMScheduler" if prediction == "epsilon" else "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": len(bars) or 1000,
        "prediction_type": prediction,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": _betas(bars) if stored and not _standard(bars, file.tensors[stored].dtype) else None,
    }


def _standard(bars: list[float], dtype: str = "F32") -> bool:
    """Whether cumulative products are Stable Diffusion's, as exactly as their type can say."""
    tolerance = 1e-4 if dtype in ("F32", "F64") else 2**-8
    usual = [level.alpha**2 for level in scaled_linear()]
    return len(bars) == len(usual) and all(map(partial(math.isclose, rel_tol=tolerance), bars, usual))


def _betas(bars: list[float]) -> list[float]:
    steps = list(pairwise([1.0, *bars]))
    if not steps or not all(0 <= after <= before and before > 0 for before, after in steps):
        raise ValueError("alphas_cumprod does not fall from 1 to 0")
    return [1 - after / before for before, after in steps]


def _index(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    inpaints = found["unet"]["in_channels"] > found["unet"]["out_channels"]
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline",
        "_diffusers_version": "0.36.0",  # which its pipeline for inpainting does not open a folder without
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", found["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


# ---- tensors, in and out ---------------------------------------------------------------------------------------------


def tensors(path: str | Path, component: str, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of the "unet", "vae" or "text_encoder" under our names, as stored, in memory mapped from the file.

    `ema` takes the U-Net's averaged weights, which otherwise are taken only where there are no others. Raises ModelError.
    """
    from safetensors import SafetensorError, safe_open

    file = header(path)
    found = network(file, component, ema)
    if found is None:
        raise ModelError(f"{shown(file.path)}: has no {PARTS[component]}")
    try:
        with safe_open(file.path, "pt") as opened:
            return {new: _piece(opened.get_tensor(at.name), at, new) for new, at in found.sources.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shown(file.path)}: damaged ({error}); {RESTORE}") from error


def _piece(tensor: Tensor, at: Source, name: str) -> Tensor:
    """Views only: one of several fused tensors; the autoencoder's attention by 1x1 convolutions as matrices."""
    tensor = tensor.chunk(at.pieces)[at.piece] if at.pieces > 1 else tensor
    convolved = re.match(r"(en|de)coder\.mid_block\.attentions", name) and tensor.ndim > 2
    return tensor.flatten(1) if convolved else tensor  # (out, in, 1, 1) -> (out, in)


def write(
    path: str | Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, Mapping[str, Any]],
    force: bool = False,
) -> None:
    """Commit an LDM file of tensors named as ours, of the networks "unet", "vae" and "text_encoder", dtypes kept.

    `configs` are a folder's, as `configs` gives them. ModelError where the file could not say what they do: numbers of heads
    and groups, kinds of prediction and vocabularies are Stable Diffusion's own. UsageError if `path` exists, unless `force`.
    """
    from safetensors.torch import save_file

    kinds = {kind.hidden_act: table for table, kind in KINDS.items()}
    table = kinds.get(configs["text_encoder"].get("hidden_act", "quick_gelu"), "clip")
    try:
        found = sizes({name: {k: tuple(v.shape) for k, v in parts[name].items()} for name in PARTS}, KINDS[table])
        for name, config in found.items():
            _compare(name, config, configs[name])
        tensors = {k: v for name in PARTS for k, v in to_ldm(name, parts[name], table, found[name]).items()}
        tensors |= _buffers(configs)
        metadata = _metadata(Path(path).stem, KINDS[table].number, configs)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"{shown(path)}: a single file cannot hold this model ({error}); write a folder") from error
    with written(path, force=force) as temporary:
        save_file(tensors, temporary, metadata)
        temporary.chmod(0o644)


def _compare(name: str, found: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises ValueError where a file would be read with another configuration than the one it is written from."""
    for key in sorted(key for key in found if key not in NAMES and not key.endswith("_token_id")):
        given = config.get(key, found[key])
        if (list(given) if isinstance(given, tuple) else given) != found[key]:
            raise ValueError(f"its {name} has {key} {given}, which would be read as {found[key]}")


def to_ldm(component: str, part: Mapping[str, Tensor], table: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """One network's tensors under LDM's names."""
    import torch

    prefix, _, table = next(home for home in HOMES[component] if home[2] in (component, table))
    pairs = list(TABLES[table][1](config))
    to_theirs, to_ours = forward(pairs), backward(pairs)
    wanted = [name for name in part if not UNUSED.search(name)]
    if unknown := [name for name in wanted if not renamed(name, to_theirs)]:
        raise ValueError(f"no Stable Diffusion {component} has {_some(unknown)}")
    out = {}
    for name in dict.fromkeys(renamed(name, to_theirs)[0] for name in wanted):
        pieces = [part[ours].detach().cpu() for ours in renamed(name, to_ours)]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()
        square = component == "vae" and ".mid.attn_1." in name and tensor.ndim == 2
        out[prefix + name] = tensor[:, :, None, None] if square else tensor  # (out, in) -> (out, in, 1, 1)
    return out


def _buffers(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """What LDM stores of a scaling factor and noise levels that are not Stable Diffusion's."""
    import torch

    factor = float(configs["vae"].get("scaling_factor") or SCALING)
    bars = [level.alpha**2 for level in scheduler.read(dict(configs["scheduler"])).schedule]
    out = {} if factor == SCALING else {"scale_factor": torch.tensor(factor, dtype=torch.float64)}
    return out if _standard(bars) else out | {"alphas_cumprod": torch.tensor(bars, dtype=torch.float64)}


def _metadata(title: str, number: int, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Stability AI's model specification, with what tells a reader how to sample."""
    unet, said = configs["unet"], scheduler.read(dict(configs["scheduler"])).prediction
    if said not in PREDICTIONS:
        raise ValueError(f"it predicts {said}")
    generation = {1: "v1", 2: "v2-768-v" if said == "v" else "v2-512"}[number]
    inpaints = unet["in_channels"] != unet["out_channels"]
    side = unet["sample_size"] * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"stable-diffusion-{generation}{'-inpainting' if inpaints else ''}",
        "implementation": "https://github.com/CompVis/stable-diffusion",
        "title": title,
        "resolution": f"{side}x{side}",
        "prediction_type": said,
    }
    return {"format": "pt"} | {SPEC + key: value for key, value in spec.items()}


# ---- the tokenizer, which no single file has -------------------------------------------------------------------------


def tokenizer(kind: str) -> Tokenizer:
    """CLIP's tokenizer, from the merges shipped with the package, padding as models of a `kind` of `KINDS` do."""
    package = Path(__file__).resolve().parents[1]
    places = (root / "weights" / "clip" / "merges.txt.gz" for root in (package, package.parent))
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise ModelError(f"{shown(package)}: lacks CLIP's merges; install tinydiff again")
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()[1:]
    merges = [(left, right) for left, right in map(str.split, lines)]
    symbols = byte_symbols()
    tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *(left + right for left, right in merges), BOS, EOS]
    special = {
        "bos_token": AddedToken(BOS, special=True, normalized=True),
        "eos_token": AddedToken(EOS, special=True, normalized=True),
        "unk_token": AddedToken(EOS, special=True, normalized=True),
        "pad_token": AddedToken(KINDS[kind].pad, special=True, normalized=False),
    }
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges, special=special)
