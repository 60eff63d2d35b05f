"""Stable Diffusion 1.x, 2.x and XL in one `.safetensors` file: opened as the parts of a diffusers folder, and written from them.

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

from tinydiff.checkpoints import ldm, scheduler, weights
from tinydiff.checkpoints.header import FLOATS, Header
from tinydiff.checkpoints.ldm import (
    HOMES,
    KINDS,
    PROJECTED,
    TABLES,
    UNUSED,
    UNUSED_OF,
    VAE,
    Kind,
    averaged,
    backward,
    forward,
    kind_of,
    renamed,
    sizes,
)
from tinydiff.diffusion.schedules import scaled_linear
from tinydiff.errors import ModelError
from tinydiff.files import RESTORE, shown, written
from tinydiff.networks.autoencoder import SCALING, attention, matrix
from tinydiff.networks.network import unwrapped
from tinydiff.networks.unet import UNetNetwork
from tinydiff.text.tokenizer import BOS, END_OF_WORD, EOS, Tokenizer, byte_symbols

if TYPE_CHECKING:
    from torch import Tensor

SUPPORTED = "give a checkpoint of Stable Diffusion 1.x, 2.x or XL"
OTHERS = (  # what only names in another kind of file hold, each name on a line -> what that file is
    {"lora": "a LoRA", "hada_w1": "a LoRA (LoHa)", "lokr_w": "a LoRA (LoKr)", "control": "a ControlNet"}
    | {"\ninput_hint_block.": "a ControlNet", "ip_adapter.": "an IP-Adapter", "\nadapter.body.": "a T2I-Adapter"}
    | {"emb_params": "a textual inversion", "\nclip_l": "a textual inversion of Stable Diffusion XL"}
    | {"\nvision_model.": "CLIP's image encoder", ".SelfAttention.": "a T5 encoder", ".rdb1.": "an upscaler of images"}
    | {".RDB1.": "an upscaler of images", "\npatch_embedding.": "a video model", "scaled_fp8": "scaled float8 weights"}
    | {"joint_blocks.": "Stable Diffusion 3"}
    | {"double_blocks.": "Flux", "\ndepth_model.": "Stable Diffusion 2 with depth"}
    | {"\nembedder.": "Stable Diffusion 2.1 unCLIP"}
    | {"roberta.": "AltDiffusion", "time_stack.": "Stable Video Diffusion", "motion_modules.": "AnimateDiff"}
    | {"string_to_param": "a textual inversion", "label_emb.weight": "the Stable Diffusion upscaler"}
    | dict.fromkeys(("\ndown_blocks.", "\ntext_model."), "one network of a diffusers folder")
)
EMBEDDINGS = (768, 1024, 1280)  # widths of CLIP's vectors
LABELS = {2560: "the Stable Diffusion XL refiner"}  # by the width of label_emb.0.0
XL_LABELS = 2816
PARTS = {"unet": "U-Net", "text_encoder": "text encoder", "vae": "autoencoder; give the file of one beside it"}
SECOND = "text_encoder_2"  # of XL alone
OLD_TOWER = "cond_stage_model."  # where LDM has its text encoder, and sgm none
WHAT = PARTS | {"controlnet": "control network", SECOND: "second text encoder, which Stable Diffusion XL has"}
NAMES = ("_class_name", "architectures", "model_type")  # keys of a configuration that say nothing of size
SPEC = "modelspec."  # metadata of https://github.com/Stability-AI/ModelSpec
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
PREDICTIONS |= {"v_pred": "v_prediction", "vpred": "v_prediction", "v_parameterization": "v_prediction"}
TRUE = ("true", "1", "yes")
V_KEYS = ("ss_v_parameterization", "ss_v_prediction", "v_pred")  # metadata of sd-scripts and others
ZERO_SNR = ("ztsnr", "zsnr")  # marker tensors, as ComfyUI and sd-webui read them
ZERO_SNR_KEYS = ("ss_zero_terminal_snr", f"{SPEC}zero_terminal_snr", f"{SPEC}ztsnr", *ZERO_SNR)
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")  # marker tensors of other noise levels
ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
Configs = Mapping[str, Mapping[str, Any]]  # the JSON files of a folder, as `configs` gives them


# ---- networks: where the tensors of each are -------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a tensor of ours is: one of the equal `pieces` along the first axis of tensor `name`, or that `turned`."""

    name: str
    piece: int
    pieces: int
    turned: bool = False


@dataclass(frozen=True)
class Part:
    """One network in a file, under our names: where its tensors are, and their shapes there."""

    table: str
    places: dict[str, Place]
    shapes: dict[str, tuple[int, ...]]


def part(file: Header, component: str, ema: bool = False) -> Part | None:
    """The "unet", "vae", "text_encoder", "text_encoder_2" or "controlnet" of a file, if it has one.

    ModelError names tensors that belong to no such network.
    """
    names = _names(file, ema)
    home = next((home for home in HOMES[component] if home[0] + home[1] in names), None)
    if home is None:
        return None
    prefix, _, table = home
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    unused = UNUSED_OF.get(table, UNUSED)
    inside = [
        name
        for name in inside
        if not unused.search(name) and (prefix or component != "vae" or name.split(".")[0] in VAE)
    ]
    layout, pairs = TABLES[table]
    entries = backward(pairs(layout(inside)))
    ours = {name: renamed(attention(name) if component == "vae" else name, entries) for name in inside}
    if unknown := [prefix + name for name in inside if not ours[name]]:
        raise ModelError(f"{shown(file.path)}: not supported, its {component} has {_some(unknown)}; {SUPPORTED}")
    places, shapes = {}, {}
    for name in inside:
        shape, pieces = file.tensors[names[prefix + name]].shape, len(ours[name])
        if pieces > 1 and (not shape or shape[0] % pieces):
            raise ModelError(f"{shown(file.path)}: {shown(prefix + name)}: {shape} is not {pieces} pieces; {RESTORE}")
        for i, new in enumerate(ours[name]):
            places[new] = Place(names[prefix + name], i, pieces, turned := name == PROJECTED)
            shapes[new] = (shape[0] // pieces, *shape[1:])[:: -1 if turned else 1] if shape else ()
    return Part(table, places, shapes)


def _names(file: Header, ema: bool = False) -> dict[str, str]:
    """LDM's names -> those in the file. The U-Net's average stands for it if asked for, or if it is alone."""
    plain = {name.removeprefix("state_dict."): stored for name, stored in unwrapped(file.tensors).items()}
    means = {name: plain[dotless] for dotless in plain if (name := averaged(dotless))}
    if ema and not means:
        raise ModelError(f"{shown(file.path)}: holds no averaged (EMA) weights; open it without asking for them")
    return plain | means if ema else means | plain


def _some(names: Iterable[str]) -> str:
    return shown(", ".join(sorted(names)[:10]))


def parts(file: Header, vae: Header) -> dict[str, Part]:
    """The three networks, the autoencoder in its own file or in the same. ModelError says what a file is instead, or lacks."""
    other = other_kind(file)
    try:
        found = {name: part(vae if name == "vae" else file, name) for name in PARTS}
    except ModelError:
        if other:
            raise ModelError(f"{shown(file.path)}: not supported, this is {other}; {SUPPORTED}") from None
        raise
    if SECOND in (wanted := [*PARTS, *([SECOND] if is_xl(file) else [])]):
        found[SECOND] = part(file, SECOND)
    first = found["unet"].shapes.get("conv_in.weight", ()) if found["unet"] else ()
    if other and not (all(found.values()) and first[1:2] in ((4,), (9,))):  # else its tensors are left over, and unused
        raise ModelError(f"{shown(file.path)}: not supported, this is {other}; {SUPPORTED}")
    if not found["unet"] and not found["text_encoder"] and part(file, "vae"):
        raise ModelError(f"{shown(file.path)}: an autoencoder alone; give it beside a model")
    if not any(found.values()):
        raise ModelError(f"{shown(file.path)}: not supported, holds {_some(file.tensors) or 'nothing'}; {SUPPORTED}")
    if missing := [name for name in wanted if not found[name]]:
        where = vae.path if missing == ["vae"] else file.path
        raise ModelError(f"{shown(where)}: has no {WHAT[missing[0]]}")
    return {name: each for name, each in found.items() if each}


def label_width(file: Header) -> int:
    """How many numbers a U-Net is told beside the time; 0 for one that is told none."""
    shapes = (t.shape for name, t in file.tensors.items() if name.endswith("label_emb.0.0.weight"))
    return next((shape[-1] for shape in shapes if shape), 0)


def is_xl(file: Header) -> bool:
    """Whether a file is of Stable Diffusion XL, or of parts of it."""
    return label_width(file) == XL_LABELS or any(name.startswith(HOMES[SECOND][0][0]) for name in _names(file))


def other_kind(file: Header) -> str | None:
    """What its names, or its shapes, say that a file is other than Stable Diffusion."""
    lines = "\n".join(["", *_names(file)])
    if other := next((what for needle, what in OTHERS.items() if needle in lines), None):
        return other
    if (told := label_width(file)) in LABELS or (told and not is_xl(file)):
        return LABELS.get(told, "a model with more conditions than text")
    small = len(file.tensors) <= 4 and all(
        len(t.shape) == 2 and t.shape[1] in EMBEDDINGS for t in file.tensors.values()
    )
    return "a textual inversion" if small and file.tensors else None


# ---- configurations, from shapes -------------------------------------------------------------------------------------


def configs(file: Header, parts: Mapping[str, Part], prediction: str | None = None) -> dict[str, dict[str, Any]]:
    """What a diffusers folder's JSON files hold: "unet", "vae", "text_encoder", "text_encoder_2" of XL, "scheduler" and
    "model_index".

    What the U-Net predicts is `prediction` ("epsilon" or "v_prediction"), or what the metadata say, or v where a tensor is
    named `v_pred`, or what `_guess` finds, in this order. ModelError for what is damaged, incomplete, or not Stable
    Diffusion 1.x or 2.x.
    """
    named = {name: part.table for name, part in parts.items()}
    kind = kind_of(named)
    try:
        tables = sizes({name: part.shapes for name, part in parts.items()}, named)
        prediction = prediction or _said(file) or _guess(file, parts["unet"], kind.number)
        factor = 2 ** (len(tables["vae"]["block_out_channels"]) - 1)
        square = re.fullmatch(r"([1-9]\d{1,4})x\1", file.metadata.get(SPEC + "resolution", ""))
        side = int(square[1]) // factor if square and int(square[1]) % factor == 0 else 0  # latents, by the metadata
        side = side or (96 if (kind.number, prediction) == (2, "v_prediction") else kind.side)
        tables["unet"]["sample_size"], tables["vae"]["sample_size"] = side, side * factor
        tables["vae"]["scaling_factor"] = _scaling(file, kind.scaling)
        tables["scheduler"] = _scheduler(file, prediction, kind)
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"{shown(file.path)}: incomplete, or not Stable Diffusion: {error}; {RESTORE}") from error
    if (reads := tables["unet"]["in_channels"]) == 2 * tables["unet"]["out_channels"]:  # it is told unscaled latents
        raise ModelError(f"{shown(file.path)}: in_channels {reads} is InstructPix2Pix's, not supported; {SUPPORTED}")
    return tables | {"model_index": _index(tables)}


def autoencoder(file: Header, xl: bool = False) -> dict[str, Any]:
    """The `config.json` of the autoencoder in a file, which may hold nothing else. ModelError where there is none."""
    table = ldm.autoencoder(required(file, "vae").shapes)
    side = 64 * 2 ** (len(table["block_out_channels"]) - 1)
    usual = KINDS["projected" if xl else "clip"].scaling
    return table | {"sample_size": side, "scaling_factor": _scaling(file, usual)}


def required(file: Header, component: str, ema: bool = False) -> Part:
    """`part`, or ModelError where the file has no such network."""
    if (found := part(file, component, ema)) is None:
        raise ModelError(f"{shown(file.path)}: has no {WHAT[component]}")
    return found


def _said(file: Header) -> str | None:
    """What the file says that its U-Net predicts."""
    keys = (file.metadata.get(SPEC + key, "") for key in ("prediction_type", "predict_key"))
    said = next((PREDICTIONS[value] for value in map(_plain, keys) if value in PREDICTIONS), None)
    said = said or ARCHITECTURES.get(file.metadata.get(SPEC + "architecture", ""))
    v = "v_pred" in _names(file) or any(_plain(file.metadata.get(key, "")) in TRUE for key in V_KEYS)
    return said or ("v_prediction" if v else None)


def _plain(said: str) -> str:
    return said.strip().lower().replace("-", "_")


def _without_signal(file: Header) -> bool:
    """Whether a marker says that the noisiest level has no signal left."""
    marked = any(_plain(file.metadata.get(key, "")) in TRUE for key in ZERO_SNR_KEYS)
    return marked or any(name in _names(file) for name in ZERO_SNR)


def _guess(file: Header, unet: Part, number: int) -> str:
    """Epsilon, but v for Stable Diffusion 2 where one bias deviates much, which tells 768-v from 512-base.

    The test is ComfyUI's; diffusers takes every 2.x for v, stable-diffusion.cpp runs the network. Inpainting is epsilon.
    """
    biases = [name for name in unet.places if re.match(r"up_blocks\..*\.transformer_blocks\.0\.norm1\.bias$", name)]
    if number != 2 or not biases or unet.shapes["conv_in.weight"][1] != unet.shapes["conv_out.weight"][0]:
        return "epsilon"
    return "v_prediction" if file.values(unet.places[max(biases)].name).std() > 0.09 else "epsilon"


def _scaling(file: Header, usual: float) -> float:
    """Latents are this times the autoencoder's. LDM stores it only where it was measured; half precision rounds it."""
    stored = _names(file).get("scale_factor")
    if not stored:
        return usual
    factor = float(file.values(stored).reshape(()))
    step = max(FLOATS[file.tensors[stored].dtype] / 2, 2**-8)
    return usual if math.isclose(factor, usual, rel_tol=step) else factor


def _scheduler(file: Header, prediction: str, kind: Kind) -> dict[str, Any]:
    """`scheduler_config.json` as Stable Diffusion's, with the file's own noise levels where they are others."""
    if edm := [name for name in EDM if name in _names(file)]:
        raise ModelError(
            f"{shown(file.path)}: not supported, {edm[0]} says that its noise levels are EDM's; {SUPPORTED}"
        )
    stored = _names(file).get("alphas_cumprod")
    bars = file.values(stored).reshape(-1).tolist() if stored else []
    betas = _betas(bars) if stored and not _standard(bars, file.tensors[stored].dtype) else None
    any_prediction = kind.scheduler != "PNDMScheduler"
    name = kind.scheduler if any_prediction or prediction == "epsilon" else "DDIMScheduler"
    table: dict[str, Any] = {"_class_name": name} | ({"timestep_spacing": "leading"} if any_prediction else {})
    table |= {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False}
    table |= {"num_train_timesteps": len(bars) or 1000, "prediction_type": prediction, "set_alpha_to_one": False}
    table |= {"skip_prk_steps": True, "steps_offset": 1, "trained_betas": betas}
    ends = bool(betas) and betas[-1] == 1
    if ends or _without_signal(file):  # which only "trailing" begins at; PNDM cannot, and has no such key
        table |= {"_class_name": name if any_prediction else "DDIMScheduler", "timestep_spacing": "trailing"}
        table |= {"rescale_betas_zero_snr": not ends}
    return table


def _standard(bars: list[float], dtype: str = "F32") -> bool:
    """Whether cumulative products are Stable Diffusion's, as exactly as their type can say."""
    tolerance = 1e-4 if dtype in ("F32", "F64") else max(FLOATS[dtype] / 2, 2**-8)
    least = 2**-10 if dtype == "F8_E4M3" else 0  # half of its smallest step
    usual = [level.alpha**2 for level in scaled_linear()]
    return len(bars) == len(usual) and all(map(partial(math.isclose, rel_tol=tolerance, abs_tol=least), bars, usual))


def _betas(bars: list[float]) -> list[float]:
    steps = list(pairwise([1.0, *bars]))
    if not steps or not all(0 <= after <= before and before > 0 for before, after in steps):
        raise ValueError("alphas_cumprod does not fall from 1 to 0")
    return [1 - after / before for before, after in steps]


def _index(tables: Configs) -> dict[str, Any]:
    inpaints = tables["unet"]["in_channels"] > tables["unet"]["out_channels"]
    xl = SECOND in tables
    index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' * xl}{'Inpaint' * inpaints}Pipeline"}
    index |= {"_diffusers_version": "0.36.0"}  # which its pipeline for inpainting does not open a folder without
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    if xl:
        index |= {
            SECOND: ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        index |= {"force_zeros_for_empty_prompt": True}
    else:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    index |= {"scheduler": ["diffusers", tables["scheduler"]["_class_name"]]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    return index | {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}


# ---- tensors, in and out ---------------------------------------------------------------------------------------------


def tensors(file: Header, part: Part) -> dict[str, Tensor]:
    """The tensors of one network under our names, as stored, in memory mapped from the file. Raises ModelError."""
    from safetensors import safe_open

    with weights.mapping(file.path), safe_open(file.path, "pt") as opened:
        return {new: _piece(opened.get_tensor(at.name), at, new) for new, at in part.places.items()}


def _piece(tensor: Tensor, at: Place, name: str) -> Tensor:
    """Views only: one of several fused tensors; a transposed matrix; the autoencoder's attention as matrices."""
    return tensor.t() if at.turned else matrix(name, tensor.chunk(at.pieces)[at.piece] if at.pieces > 1 else tensor)


def write(path: str | Path, parts: Mapping[str, Mapping[str, Tensor]], configs: Configs, force: bool = False) -> None:
    """Commit an LDM file of tensors named as ours, of the networks "unet", "vae", "text_encoder" and, where there are such,
    "text_encoder_2" (of XL) and "controlnet", as in the first files of lllyasviel's; dtypes kept.

    ModelError where the file could not say what `configs` do: numbers of heads and groups, kinds of prediction and
    vocabularies are Stable Diffusion's own. UsageError if `path` exists, unless `force`.
    """
    from safetensors.torch import save_file

    xl = SECOND in parts
    first = configs["text_encoder"].get("hidden_act", "quick_gelu") == KINDS["clip"].hidden_act
    named = {"text_encoder": "clip" if first else "open_clip"} | ({SECOND: "projected"} if xl else {})
    kind = kind_of(named)
    try:
        _of_names(configs["unet"])
        shapes = {name: {k: tuple(v.shape) for k, v in part.items()} for name, part in parts.items()}
        tables = sizes(shapes, named)
        if "controlnet" in parts:
            tables["controlnet"] = ldm.control(shapes["controlnet"], configs["unet"])
        for name, config in tables.items():
            _compare(name, config, configs[name])
        tensors = {}
        for name, part in parts.items():
            tensors |= to_ldm(name, part, named.get(name, name), tables[name], xl)
        tensors |= _buffers(configs, kind.scaling)
        metadata = _metadata(Path(path).stem, kind.number, configs)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"{shown(path)}: a single file cannot hold this model ({error}); write a folder") from error
    with written(path, force=force) as temporary:
        save_file(tensors, temporary, metadata)


def _of_names(table: Mapping[str, Any]) -> None:
    """Raises ValueError for a U-Net of parts that names and shapes do not tell."""
    row = UNetNetwork()
    settings = row.settings_of(row.complete(dict(table)))
    own = [*row.unusual(settings), *(["modulation"] if settings.modulation == "film" else [])]
    if own:
        raise ValueError(f"its unet has {own[0]} {getattr(settings, own[0])}, which a file cannot say")


def _compare(name: str, read: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises ValueError where a file would be read with another configuration than the one it is written from."""
    for key in sorted(key for key in read if key not in NAMES and not key.endswith("_token_id")):
        given = config.get(key, read[key])
        if (list(given) if isinstance(given, tuple) else given) != read[key]:
            raise ValueError(f"its {name} has {key} {given}, which would be read as {read[key]}")


def to_ldm(
    component: str, part: Mapping[str, Tensor], table: str, config: dict[str, Any], xl: bool = False
) -> dict[str, Tensor]:
    """One network's tensors under LDM's names, or sgm's."""
    import torch

    homes = [home for home in HOMES[component] if home[2] in (component, table, "control")]
    prefix, _, table = next(home for home in homes if not xl or not home[0].startswith(OLD_TOWER))
    unused = UNUSED_OF.get(table, UNUSED)
    pairs = list(TABLES[table][1](config))
    to_theirs, to_ours = forward(pairs), backward(pairs)
    wanted = [name for name in part if not unused.search(name)]
    if unknown := [name for name in wanted if not renamed(name, to_theirs)]:
        raise ValueError(f"no Stable Diffusion {component} has {_some(unknown)}")
    out = {}
    for name in dict.fromkeys(renamed(name, to_theirs)[0] for name in wanted):
        pieces = [part[ours].detach().cpu() for ours in renamed(name, to_ours)]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()
        square = component == "vae" and ".mid.attn_1." in name and tensor.ndim == 2
        tensor = tensor.t().contiguous() if name == PROJECTED else tensor
        out[prefix + name] = tensor[:, :, None, None] if square else tensor  # (out, in) -> (out, in, 1, 1)
    return out


def _buffers(configs: Configs, usual: float) -> dict[str, Tensor]:
    """What LDM stores of a scaling factor and noise levels that are not Stable Diffusion's."""
    import torch

    factor = float(configs["vae"].get("scaling_factor") or SCALING)
    bars = [level.alpha**2 for level in scheduler.read(dict(configs["scheduler"])).schedule]
    out = {} if factor == usual else {"scale_factor": torch.tensor(factor, dtype=torch.float64)}
    out |= {ZERO_SNR[0]: torch.tensor([])} if configs["scheduler"].get("rescale_betas_zero_snr") else {}
    return out if _standard(bars) else out | {"alphas_cumprod": torch.tensor(bars, dtype=torch.float64)}


def _metadata(title: str, number: int, configs: Configs) -> dict[str, str]:
    """Stability AI's model specification, with what tells a reader how to sample."""
    unet, said = configs["unet"], scheduler.read(dict(configs["scheduler"])).prediction
    if said not in PREDICTIONS:
        raise ValueError(f"it predicts {said}")
    generation = {1: "v1", 2: "v2-768-v" if said == "v" else "v2-512", 3: "xl-v1-base"}[number]
    inpainting = "-inpainting" if unet["in_channels"] != unet["out_channels"] else ""
    side = unet["sample_size"] * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    spec = {"sai_model_spec": "1.0.0", "architecture": f"stable-diffusion-{generation}{inpainting}"}
    code = "Stability-AI/generative-models" if number == 3 else "CompVis/stable-diffusion"
    spec |= {"implementation": f"https://github.com/{code}", "title": title}
    spec |= {"resolution": f"{side}x{side}", "prediction_type": said}
    return {"format": "pt"} | {SPEC + key: value for key, value in spec.items()}


def tokenizer(kind: str) -> Tokenizer:
    """CLIP's tokenizer, which no single file has, from the merges shipped with the package; it pads as `KINDS[kind]` says."""
    package = Path(__file__).resolve().parents[1]
    places = (root / "weights" / "clip" / "merges.txt.gz" for root in (package, package.parent))
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise ModelError(f"{shown(package)}: lacks CLIP's merges; install tinydiff again")
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()[1:]
    merges = [(left, right) for left, right in map(str.split, lines)]
    symbols = byte_symbols()
    tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *(left + right for left, right in merges), BOS, EOS]
    texts = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
    special = {key: AddedToken(text, special=True, normalized=True) for key, text in texts.items()}
    special |= {"pad_token": AddedToken(KINDS[kind].pad, special=True, normalized=False)}
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges, special=special)
