"""Model folders in the diffusers layout: networks out to `config.json` and safetensors, and back.

Parameter names are diffusers' and transformers' own, so there is no conversion; `load_state_dict` is strict.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinydiff import __version__, config
from tinydiff.checkpoints import dit, scheduler, single_file, weights
from tinydiff.checkpoints.description import configs, tokenizer_of
from tinydiff.checkpoints.foreign import ONLY, known
from tinydiff.errors import ModelError
from tinydiff.files import committed, read_json, shown, verify
from tinydiff.models.autoencoder import Autoencoder
from tinydiff.models.dit import DiT
from tinydiff.models.t5 import T5Config, T5Encoder, encoder_weights
from tinydiff.models.text_encoder import OneHot, TextEncoder
from tinydiff.models.unet import UNet
from tinydiff.text.labels import LEAST, Labels

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = {"unet": WEIGHTS, "transformer": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors"}
IGNORED = ("position_ids", "text_projection.weight")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class Model:
    """The networks and the tokenizer of a text-to-image model; a class-conditional one has `OneHot` for a text encoder."""

    denoiser: UNet | DiT
    vae: Autoencoder
    text_encoder: TextEncoder | T5Encoder | OneHot
    tokenizer: Any  # text.prompts.Tokens that can be saved
    scaling_factor: float

    @property
    def name(self) -> str:
        """The folder of the denoiser."""
        return "unet" if isinstance(self.denoiser, UNet) else "transformer"

    def parts(self) -> dict[str, nn.Module]:
        """Every network that has weights, by its folder's name."""
        found = {self.name: self.denoiser, "vae": self.vae, "text_encoder": self.text_encoder}
        return {name: part for name, part in found.items() if not isinstance(part, OneHot)}


def build(cfg: config.Config, tokenizer: Any, seed: int = 0) -> Model:
    """The networks of a configuration, each initialised from its own `seed`, so none depends on another's size.

    A T5 encoder is not initialised but read from its folder. Raises ModelError where that cannot be.
    """
    text = cfg.text_encoder
    if text.kind == "t5":
        text_encoder, width = load_t5(Path(text.path) / "text_encoder", tokenizer.vocab_size)
    elif text.kind == "class":
        text_encoder, width = OneHot(tokenizer.vocab_size), tokenizer.vocab_size
    else:
        torch.manual_seed(seed)
        text_encoder, width = TextEncoder(text, tokenizer.vocab_size, tokenizer.eos), text.hidden_size
    torch.manual_seed(seed)
    channels = cfg.autoencoder.latent_channels
    if cfg.denoiser.kind == "unet":
        denoiser: UNet | DiT = UNet(cfg.denoiser, channels, width)
    elif text.kind == "class":
        denoiser = DiT(cfg.dit, channels, side_of(cfg), classes=width - 1)
    else:
        denoiser = DiT(cfg.dit, channels, side_of(cfg), context_dim=width)
    torch.manual_seed(seed)
    return Model(denoiser, Autoencoder(cfg.autoencoder), text_encoder, tokenizer, 1.0)


def side_of(cfg: config.Config) -> int:
    """Latents along a side."""
    return cfg.data.resolution // 2 ** (len(cfg.autoencoder.block_out_channels) - 1)


# ---- out ---------------------------------------------------------------------------------------------------------------


def save(
    path: Path,
    model: Model,
    cfg: config.Config,
    dtype: torch.dtype = torch.float32,
    replace: bool = False,
    tensors_of: Callable[[str, nn.Module], Mapping[str, Tensor]] = lambda name, part: part.state_dict(),
) -> None:
    """Commit a model folder that diffusers, transformers and tinydiff open; `tensors_of` says what is in its
    networks' folders."""
    with committed(path, replace=replace) as folder:
        for name, part in model.parts().items():
            (folder / name).mkdir()
            save_tensors(tensors_of(name, part), folder / name / FILES[name], dtype)
            write_json(folder / name / "config.json", component_config(name, model, cfg))
        write_description(folder, model, cfg)


def write_description(folder: Path, model: Model, cfg: config.Config) -> None:
    """Every file of a model folder that is no network's."""
    if not isinstance(model.tokenizer, Labels):
        model.tokenizer.save(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler.write(cfg))
    write_json(folder / "model_index.json", index(cfg, model.tokenizer))
    (folder / "tinydiff.toml").write_text(config.to_toml(cfg), encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    """A safetensors file with floating-point tensors as `dtype` (as they are, where None), readable by whom the system lets.

    Every tensor is copied, since the format knows no two names of one.
    """
    kinds = {k: dtype if dtype and v.is_floating_point() else v.dtype for k, v in tensors.items()}
    held = {v.data_ptr() for v in tensors.values()}
    copy = len(held) < len(tensors)
    save_file(
        {k: v.detach().to("cpu", kinds[k], copy=copy).contiguous() for k, v in tensors.items()}, path, {"format": "pt"}
    )
    path.chmod(0o644)


def copy_description(source: Path, found: Mapping[str, dict[str, Any]], tokenizer: Any, folder: Path) -> None:
    """What another folder of the model at `source` holds besides its networks, as `configs` has read it."""
    if (source / "tokenizer").is_dir():
        shutil.copytree(source / "tokenizer", folder / "tokenizer", copy_function=shutil.copyfile)
    elif not isinstance(tokenizer, Labels):
        tokenizer.save(folder / "tokenizer")
    if (source / "tinydiff.toml").exists():
        shutil.copyfile(source / "tinydiff.toml", folder / "tinydiff.toml")
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", found["scheduler"])
    write_json(folder / "model_index.json", found["model_index"])


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def without_form(cfg: config.Config, tokenizer: Any) -> str:
    """Why diffusers has no pipeline for a model of this configuration; "" where it has one."""
    if isinstance(tokenizer, Labels) and tokenizer.pad != LEAST:
        return f"its null label is number {tokenizer.pad}, and {LEAST} in diffusers"
    if cfg.text_encoder.kind == "t5":
        return "text is read by T5 with its padding masked"
    if cfg.denoiser.kind == "dit" and cfg.text_encoder.kind == "clip":
        return "a DiT that reads text"
    return ""


def index(cfg: config.Config, tokenizer: Any) -> dict[str, Any]:
    """`model_index.json` of a pipeline of diffusers, or of none with the reason."""
    found = {"_class_name": "StableDiffusionPipeline", "_tinydiff_version": __version__}
    found |= {"scheduler": ["diffusers", scheduler.write(cfg)["_class_name"]], "vae": ["diffusers", "AutoencoderKL"]}
    if cfg.text_encoder.kind == "class":
        own = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
        reason = without_form(cfg, tokenizer)
        return found | own | {"id2label": tokenizer.table()} | ({"_no_diffusers_pipeline": reason} if reason else {})
    dit = {"transformer": ["diffusers", "Transformer2DModel"]}
    found |= dit if cfg.denoiser.kind == "dit" else {"unet": ["diffusers", "UNet2DConditionModel"]}
    t5 = cfg.text_encoder.kind == "t5"
    found |= {"text_encoder": ["transformers", "T5EncoderModel" if t5 else "CLIPTextModel"]}
    found |= {"tokenizer": ["transformers", "T5TokenizerFast" if t5 else "CLIPTokenizer"]}
    if reason := without_form(cfg, tokenizer):
        return found | {"_class_name": "TinydiffPipeline", "_no_diffusers_pipeline": reason}
    found |= {"feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None]}
    return found | {"requires_safety_checker": False}


def component_config(name: str, model: Model, cfg: config.Config) -> dict[str, Any]:
    """`config.json` of one network."""
    channels, n = cfg.autoencoder.latent_channels, len(cfg.autoencoder.block_out_channels)
    sizes = {"sample_size": side_of(cfg), "in_channels": channels, "out_channels": channels}
    if name == "unet":
        ups = [kind.replace("Down", "Up") for kind in reversed(cfg.denoiser.down_block_types)]
        own = settings(cfg.denoiser) | {"up_block_types": ups, "cross_attention_dim": context_width(model)}
        return {"_class_name": "UNet2DConditionModel"} | sizes | own
    if name == "transformer":
        return dit_config(cfg, model.tokenizer.vocab_size - 1, context_width(model)) | sizes
    if name == "vae":
        kinds = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
        own = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "sample_size": cfg.data.resolution}
        own |= asdict(cfg.autoencoder) | {"scaling_factor": model.scaling_factor}
        return {"_class_name": "AutoencoderKL"} | kinds | own
    if isinstance(model.text_encoder, T5Encoder):
        return {"architectures": ["T5EncoderModel"], "model_type": "t5"} | asdict(model.text_encoder.config)
    tokenizer = model.tokenizer
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos}
    ids["vocab_size"] = tokenizer.vocab_size
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"} | settings(cfg.text_encoder) | ids


def settings(part: Any) -> dict[str, Any]:
    """A configuration's keys that are diffusers' and transformers' too."""
    return {key: value for key, value in asdict(part).items() if key not in ("kind", "path")}


def context_width(model: Model) -> int:
    """The width of what the denoiser attends to."""
    encoder = model.text_encoder
    if isinstance(encoder, TextEncoder):
        return encoder.text_model.final_layer_norm.normalized_shape[0]
    return encoder.shared.embedding_dim if isinstance(encoder, T5Encoder) else encoder.size


def dit_config(cfg: config.Config, classes: int, width: int) -> dict[str, Any]:
    """`config.json` of a DiT: diffusers' own by class, and by text its `Transformer2DModel`."""
    layers, heads, head = cfg.dit.shape
    found = {"_class_name": "DiTTransformer2DModel", "num_embeds_ada_norm": classes, "patch_size": cfg.dit.patch_size}
    found |= {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head} | ONLY["transformer"]
    if cfg.text_encoder.kind != "class":
        own = {"_class_name": "Transformer2DModel", "num_embeds_ada_norm": 1, "cross_attention_dim": width}
        found |= own | {"interpolation_scale": 1}
    return found


# ---- in ----------------------------------------------------------------------------------------------------------------


def load(path: Path, vae: Path | None = None, prediction: str | None = None) -> Model:
    """The networks of a model folder or single file, float32, in evaluation mode; see `stored`.

    ModelError names a missing, damaged or unsupported file.
    """
    found, tensors = stored(path, vae, prediction)
    tokenizer = tokenizer_of(path, found)
    try:
        with torch.device("meta"):
            model = Model(
                denoiser_of(found, tensors),
                Autoencoder(known(config.Autoencoder, "vae", found["vae"])),
                text_encoder_of(found, tokenizer),
                tokenizer,
                float(found["vae"].get("scaling_factor") or 0.18215),
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{shown(path)}: unsupported or incomplete config.json: {error}") from None
    for name, part in model.parts().items():
        fill(part, tensors[name], path / name)
        part.float().eval()
    return model


def stored(
    path: Path, vae: Path | None = None, prediction: str | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """What `configs` reads of a model, and its tensors by network under our names: as stored, mapped, not copied.

    Raises ModelError.
    """
    if path.is_dir() or not path.exists():
        verify(path)
    found = configs(path, vae, prediction)
    parts = [name for name in found if name not in ("model_index", "scheduler")]
    files = {name: weights.files(path / name) for name in parts if path.is_dir() and not (vae and name == "vae")}
    tensors = {name: renamed(weights.tensors(each)) for name, each in files.items()}
    for name in parts:
        if name == "transformer" and path.is_file():
            tensors[name] = weights.tensors([path])
        elif name not in tensors:
            tensors[name] = single_file.tensors(vae if vae and name == "vae" else path, name)
    if "transformer" in tensors and dit.is_published(tensors["transformer"]):
        tensors["transformer"] = dit.published(tensors["transformer"])
    return found, tensors


def denoiser_of(found: Mapping[str, dict[str, Any]], tensors: Mapping[str, dict[str, Tensor]]) -> UNet | DiT:
    """The denoiser that a folder's configurations describe."""
    if table := found.get("unet"):
        channels = int(table.get("out_channels", 4))
        extra = int(table.get("in_channels", 4)) - channels
        return UNet(known(config.Denoiser, "unet", table), channels, table["cross_attention_dim"], extra)
    table = known(dict, "transformer", found["transformer"])
    width, channels = table["num_attention_heads"] * table["attention_head_dim"], table["in_channels"]
    context_dim = table.get("cross_attention_dim")
    return DiT(
        dit.named(table["num_layers"], table["num_attention_heads"], width, table["patch_size"]),
        channels,
        table["sample_size"],
        classes=0 if context_dim else table["num_embeds_ada_norm"],
        context_dim=context_dim,
        learned_sigma=(table.get("out_channels") or channels) == 2 * channels,
        shared=dit.is_shared(tensors["transformer"]),
        norm_eps=table["norm_eps"],
        freq_shift=table["freq_shift"],
    )


def text_encoder_of(found: Mapping[str, dict[str, Any]], tokenizer: Any) -> TextEncoder | T5Encoder | OneHot:
    if isinstance(tokenizer, Labels):
        return OneHot(tokenizer.vocab_size)
    if "text_encoder" not in found:
        raise ModelError("text_encoder/config.json: missing; copy the whole model folder")
    table = found["text_encoder"]
    if table.get("model_type") == "t5":
        return T5Encoder(known(T5Config, "t5", table))
    return TextEncoder(known(config.TextEncoder, "text_encoder", table), table["vocab_size"], tokenizer.eos)


def load_t5(folder: Path, vocab_size: int) -> tuple[T5Encoder, int]:
    """The T5 encoder of a folder and the width of its vectors, float32, for a tokenizer of `vocab_size` pieces.

    ModelError names what is missing, damaged or does not fit.
    """
    table = read_json(folder / "config.json")
    try:
        cfg = known(T5Config, "t5", table)
        with torch.device("meta"):
            encoder = T5Encoder(cfg)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{shown(folder)}: unsupported or incomplete config.json: {error}") from None
    if cfg.vocab_size < vocab_size:
        raise ModelError(
            f"{shown(folder)}: has vectors of {cfg.vocab_size} pieces, its tokenizer {vocab_size}; mend path"
        )
    fill(encoder, weights.tensors(weights.files(folder)), folder)
    return encoder.float().eval().requires_grad_(False), cfg.d_model


def fill(part: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Strictly give a network its weights; ModelError names the first that do not fit."""
    wanted = part.state_dict()
    tensors = encoder_weights(tensors) if isinstance(part, T5Encoder) else tensors
    common = wanted.keys() & tensors.keys()
    wrong = sorted(wanted.keys() ^ tensors.keys()) + sorted(k for k in common if wanted[k].shape != tensors[k].shape)
    if wrong:
        raise ModelError(f"{shown(path)}: its weights do not fit its config.json at {', '.join(wrong[:10])}")
    part.load_state_dict(tensors, assign=True)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A folder's tensors under our names, whatever version of diffusers or transformers named them, unused ones left out."""
    return {_renamed(k): v for k, v in tensors.items() if not k.endswith(IGNORED)}


def _renamed(key: str) -> str:
    if key.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):  # transformers 5 drops the prefix
        return f"text_model.{key}"
    stem, _, kind = key.rpartition(".")  # attention of autoencoders before diffusers 0.17
    module, _, last = stem.rpartition(".")
    return f"{module}.{OLD_ATTENTION[last]}.{kind}" if last in OLD_ATTENTION else key
