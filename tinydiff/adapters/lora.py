"""LoRA files: low-rank changes of weights (Hu et al. 2021), under our names, read and written in the styles of others.

A layer is named by its network's folder and its module there: `unet.mid_block.attentions.0.proj_in`. diffusers and PEFT write
that name (older versions with a processor in it), kohya's scripts the same with underscores, or that of Stable Diffusion's own
code. Which layers there are the model says, so a file is read for a model. It needs numpy alone: neither torch nor a graph.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinydiff.adapters import STYLES, origin
from tinydiff.adapters.origin import Origin
from tinydiff.errors import ModelError
from tinydiff.files import RESTORE, shown, write_file

if TYPE_CHECKING:
    from tinydiff.checkpoints.header import Header

Shapes = Mapping[str, tuple[int, ...]]  # of a network's tensors, under our names
Blocks = Callable[[str], list[str]]  # a module of the U-Net -> what Stable Diffusion's own code calls it
METADATA = "lora_adapter_metadata"  # diffusers' key: PEFT's settings of each network, as JSON
FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of a file in a folder
SHORTEST = 1e-30  # so that a row of zeros stays one
ROLES = {  # what ends a tensor's name -> what it is of a layer
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "dora_scale": "magnitude",
    "alpha": "alpha",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
}
KOHYA = {"unet": ("lora_unet",), "transformer": ("lora_transformer", "lora_unet")}  # what its names begin with
KOHYA |= {"text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}
OLD = (  # names of older versions of diffusers -> those of now
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"(?<=self_attn\.)to_([qkv])_lora\."), r"\1_proj.lora."),
    (re.compile(r"(?<=self_attn\.)to_out_lora\."), "out_proj.lora."),
    (re.compile(r"\.to_([qkv])_lora\."), r".to_\1.lora."),
    (re.compile(r"\.to_out_lora\."), ".to_out.0.lora."),
    (re.compile(r"\.to_out\.(?=lora_magnitude_vector)"), ".to_out.0."),
    (re.compile(r"(\.lora_[AB]|\.lora_magnitude_vector)\.default\b"), r"\1"),
    (re.compile(r"(?<=lora_magnitude_vector)\.weight$"), ""),
    (re.compile(r"^base_model\.model\."), ""),
)
OTHERS = {  # what only names in another kind of file hold -> what that is
    "hada_w": "a LoHa",
    "lokr_w": "a LoKr",
    "oft_": "an OFT",
    "oft.": "an OFT",
    "boft": "a BOFT",
    "ia3_l": "an (IA)3",
    "on_input": "an (IA)3",
    "ip_adapter": "an IP-Adapter",
    "image_proj": "an IP-Adapter",
    "lora_controlnet": "a Control-LoRA",
    "control_model.": "a ControlNet",
    "controlnet_cond_embedding": "a ControlNet",
    "lora_embedding_": "a LoRA of embeddings",
    "emb_params": "a learnt word; give it with --word",
    "string_to_param": "a learnt word; give it with --word",
    "first_stage_model.": "a whole model; give it with -m",
    "model.diffusion_model.input": "a whole model; give it with -m",
}


class LowRank(NamedTuple):
    """The change of one layer: `alpha` / rank times up @ down is added to its weight (out, in, ...).

    `down` (rank, in, ...), `up` (out, rank, ...). With a `mid` (rank, rank, height, width) between them both are 1x1 (LoCon).
    `magnitude` (out,): the length that each row of the sum is given (DoRA: Liu et al. 2024, equation 5).
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float
    mid: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    def merged(self, weight: np.ndarray, strength: float = 1.0) -> np.ndarray:
        """A layer's weight, float32, after a `strength` of the change."""
        rank = len(self.down)
        up, down = self.up.reshape(-1, rank).astype(np.float32), self.down.reshape(rank, -1).astype(np.float32)
        if self.mid is not None:
            down = np.einsum("rshw,si->rihw", self.mid.astype(np.float32), down).reshape(rank, -1)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever asked for it says what became too large
            changed = weight + (up @ down).reshape(weight.shape) * np.float32(strength * self.alpha / rank)
        if self.magnitude is not None:
            lengths = np.linalg.norm(changed.reshape(len(changed), -1), axis=1).clip(SHORTEST)
            scale = self.magnitude.reshape(-1).astype(np.float32) / lengths
            changed = changed * scale.reshape(-1, *[1] * (changed.ndim - 1))
        return changed


def layers_of(networks: Mapping[str, Shapes]) -> dict[str, tuple[int, ...]]:
    """The weights' shapes of all layers of a model that a LoRA can change."""
    shapes = {f"{network}.{name}": shape for network, tensors in networks.items() for name, shape in tensors.items()}
    return {k.removesuffix(".weight"): v for k, v in shapes.items() if k.endswith(".weight") and len(v) in (2, 4)}


def aliases(layer: str, blocks: Blocks) -> Iterator[str]:
    """All names of a layer in files."""
    network, _, module = layer.partition(".")
    if not network.startswith("text_encoder"):
        yield module
    for name in (module, module.removeprefix("text_model.")):
        yield f"{network}.{name}"
        yield from (f"{prefix}_{name}".replace(".", "_") for prefix in KOHYA.get(network, ()))
    if network == "unet":
        yield from (f"lora_unet_{name}".replace(".", "_") for name in blocks(module))


@dataclass(frozen=True)
class Lora:
    """A file, opened for a model: of each layer that it changes where its tensors are, by what they are of it."""

    file: Header
    places: dict[str, dict[str, str]]

    def layers(self, network: str = "") -> dict[str, LowRank]:
        """The changes of one network, or of all. ModelError for values that are NaN or infinite."""
        return {layer: self.layer(layer) for layer in self.places if layer.startswith(network and f"{network}.")}

    def layer(self, name: str) -> LowRank:
        arrays = {role: self.array(tensor) for role, tensor in self.places[name].items()}
        alpha = arrays.pop("alpha", None)
        rank = len(arrays["down"])
        return LowRank(alpha=self.alpha(name, rank) if alpha is None else float(alpha.reshape(-1)[0]), **arrays)

    def array(self, tensor: str) -> np.ndarray:
        array = self.file.array(tensor)
        if not np.isfinite(array).all():
            raise ModelError(f"{shown(self.file.path)}: {shown(tensor)} has NaN or infinite values; {RESTORE}")
        return array

    def alpha(self, layer: str, rank: int) -> float:
        """By PEFT's settings in the metadata; without any the change is up @ down."""
        network, _, module = layer.partition(".")
        told = {k.removeprefix(f"{network}."): v for k, v in self.settings.items() if k.startswith(f"{network}.")}
        own = (
            a
            for k, a in (told.get("alpha_pattern") or {}).items()
            if f"^.{module}".endswith(f".{k}".replace(".^", "^."))
        )
        alpha = float(next(own, told.get("lora_alpha") or rank))
        return alpha * rank**0.5 if told.get("use_rslora") else alpha

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.file)


def settings_of(file: Header) -> dict[str, Any]:
    """PEFT's settings in the metadata, by network and key. ModelError where they are none."""
    try:
        settings = json.loads(file.metadata.get(METADATA) or "{}")
        for key, value in settings.items():
            numbers = (value or {}).values() if key.endswith("alpha_pattern") else [value]
            if "alpha" in key and not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
                raise ValueError(key)
    except (ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise ModelError(f"{shown(file.path)}: its {METADATA} makes no sense ({shown(error)}); {RESTORE}") from None
    return settings


def opened(file: Header, networks: Mapping[str, Shapes], blocks: Blocks = lambda module: []) -> Lora:
    """A file for a model with these tensors. No weight is read. ModelError for a file of another kind, or of another model."""
    weights, where = layers_of(networks), shown(file.path)
    names = {alias: layer for layer in weights for alias in aliases(layer, blocks)}
    places, unknown = defaultdict[str, dict[str, str]](dict), list[str]()
    for tensor in file.tensors:
        name, role = split(tensor)
        if role is None:
            other = next((what for needle, what in OTHERS.items() if needle in tensor), None)
            problem = f"not supported, this is {other}" if other else f"not a LoRA, it has {shown(tensor)}"
            raise ModelError(f"{where}: {problem}")
        if name in names:
            places[names[name]][role] = tensor
        else:
            unknown.append(f"{shown(tensor)} {list(file.tensors[tensor].shape)}")
    if unknown or not places:
        problem = f"changes {', '.join(unknown[:2])}, which the model does not have" if unknown else "changes nothing"
        raise ModelError(f"{where}: {problem}; give a LoRA that was trained on it")
    lora = Lora(file, dict(places))
    for layer, roles in lora.places.items():
        if problem := misfit({role: file.tensors[tensor].shape for role, tensor in roles.items()}, weights[layer]):
            raise ModelError(f"{where}: {shown(layer)} {problem}")
    settings_of(file)
    return lora


def split(tensor: str) -> tuple[str, str | None]:
    """The layer and the role that a tensor's name says, the layer as the file names it."""
    for pattern, new in OLD:
        tensor = pattern.sub(new, tensor)
    ending = next((ending for ending in ROLES if tensor.endswith(f".{ending}")), None)
    return (tensor.removesuffix(f".{ending}"), ROLES[ending]) if ending else (tensor, None)


def misfit(shapes: Shapes, weight: tuple[int, ...]) -> str | None:
    """What is wrong with the shapes of a layer's change, by role."""
    if missing := {"down", "up"} - shapes.keys():
        return f"has no {' and no '.join(sorted(missing))}; {RESTORE}"
    if min(len(shapes["down"]), len(shapes["up"])) < 2 or len(shapes.get("mid", (1, 1, 1, 1))) != 4:
        return f"has {', '.join(f'a {role} {list(shape)}' for role, shape in shapes.items())}; {RESTORE}"
    (rank, *reads), (out, inner, *kernel) = shapes["down"], shapes["up"]
    if not rank or rank != inner:
        return f"is of rank {rank} in its down {list(shapes['down'])}, and {inner} in its up {list(shapes['up'])}; {RESTORE}"
    mid = shapes.get("mid", (rank, rank))
    size = math.prod(reads) * math.prod(mid[2:])
    if (out, size, math.prod(kernel)) != (weight[0], math.prod(weight[1:]), 1) or mid[:2] != (rank, rank):
        other = f"its up {list(shapes['up'])} and down {list(shapes['down'])} change another weight"
        return f"is {list(weight)} in the model, and {other}; give a LoRA that was trained on it"
    lengths = {(out,), (out, 1), (out, 1, 1, 1), (1, out, 1, 1)}
    if shapes.get("magnitude", (out,)) not in lengths or math.prod(shapes.get("alpha", ())) != 1:
        return f"has a magnitude or an alpha of another size; {RESTORE}"
    return None


def write(
    path: Path, layers: Mapping[str, LowRank], style: str = STYLES[0], force: bool = False, base: Origin | None = None
) -> None:
    """Commit a file of changes by layer, in one of STYLES, that says of which model. UsageError where `path` exists, unless
    `force`."""
    from safetensors.numpy import save

    tensors, metadata = WRITERS[style](layers)
    metadata |= origin.metadata(base or {})
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    write_file(path, ordered(save(tensors, {"format": "pt", **metadata})), force=force)


def ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes them in another one each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:end])
    table["__metadata__"] = dict(sorted(table["__metadata__"].items()))
    head = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode().ljust(end - 8)
    assert len(head) == end - 8
    return data[:8] + head + data[end:]


def of_diffusers(layers: Mapping[str, LowRank]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Names of PEFT, whose settings are in the metadata: rank and alpha that most layers have, and patterns of others."""
    tensors, settings = dict[str, np.ndarray](), dict[str, Any]()
    for network in dict.fromkeys(layer.partition(".")[0] for layer in layers):
        own = {k.removeprefix(f"{network}."): v for k, v in layers.items() if k.startswith(f"{network}.")}
        if mids := [module for module, change in own.items() if change.mid is not None]:
            raise ModelError(
                f"{mids[0]}: diffusers has no layer with a matrix between up and down; write kohya's style"
            )
        (rank, alpha), *_ = Counter((len(each.down), each.alpha) for each in own.values()).most_common(1)[0]
        targets = sorted(module.removeprefix("text_model.") for module in own)  # transformers 5 has no text_model
        told: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": number(alpha), "target_modules": targets}
        told |= {"use_dora": any(each.magnitude is not None for each in own.values())}
        told["rank_pattern"] = {pattern(k): len(each.down) for k, each in own.items() if len(each.down) != rank}
        told["alpha_pattern"] = {pattern(k): number(each.alpha) for k, each in own.items() if each.alpha != alpha}
        settings |= {f"{network}.{key}": value for key, value in told.items()}
        for module, change in own.items():
            tensors |= {
                f"{network}.{module}.lora_A.weight": change.down,
                f"{network}.{module}.lora_B.weight": change.up,
            }
            if change.magnitude is not None:
                shape = (1, -1, 1, 1) if change.down.ndim == 4 else (-1,)
                tensors[f"{network}.{module}.lora_magnitude_vector"] = change.magnitude.reshape(shape)
    return tensors, {METADATA: json.dumps(settings, sort_keys=True)}


def of_kohya(layers: Mapping[str, LowRank]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Names with underscores, and an alpha a layer."""
    tensors, two = dict[str, np.ndarray](), any(layer.startswith("text_encoder_2.") for layer in layers)
    for layer, change in layers.items():
        network, _, module = layer.partition(".")
        prefix = KOHYA[network][-1 if two else 0]
        parts = {"lora_down.weight": change.down, "lora_up.weight": change.up, "lora_mid.weight": change.mid}
        lengths = None if change.magnitude is None else change.magnitude.reshape(-1, *[1] * (change.down.ndim - 1))
        parts |= {"alpha": np.array(change.alpha, change.down.dtype), "dora_scale": lengths}
        name = f"{prefix}_{module.replace('.', '_')}"
        tensors |= {f"{name}.{k}": array for k, array in parts.items() if array is not None}
    return tensors, {}


def pattern(module: str) -> str:
    """PEFT's pattern for one module: its whole name, or with `text_model` optional the end of it."""
    return module.removeprefix("text_model.") if module.startswith("text_model.") else f"^{module}"


def number(value: float) -> float:
    """A whole number as one."""
    return int(value) if value == int(value) else value


WRITERS: dict[str, Any] = dict(zip(STYLES, (of_diffusers, of_kohya), strict=True))
