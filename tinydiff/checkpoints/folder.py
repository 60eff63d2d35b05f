"""Model folders in the diffusers layout: networks out to `config.json` and safetensors, and back.

Parameter names are diffusers' and transformers' own, so there is no conversion; `load_state_dict` is strict.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinydiff import __version__, config
from tinydiff.checkpoints import scheduler
from tinydiff.errors import ModelError
from tinydiff.files import committed, read_json, verify
from tinydiff.models.autoencoder import Autoencoder
from tinydiff.models.text_encoder import TextEncoder
from tinydiff.models.unet import UNet
from tinydiff.text.tokenizer import Tokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = {"unet": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors"}


@dataclass
class Model:
    """The three networks and the tokenizer of a text-to-image model."""

    unet: UNet
    vae: Autoencoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    scaling_factor: float

    def parts(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}


def build(cfg: config.Config, tokenizer: Tokenizer, seed: int = 0) -> Model:
    """The networks of a configuration, each initialised from its own `seed`, so none depends on another's size."""
    torch.manual_seed(seed)
    unet = UNet(cfg.denoiser, cfg.autoencoder.latent_channels, cfg.text_encoder.hidden_size)
    torch.manual_seed(seed)
    vae = Autoencoder(cfg.autoencoder)
    torch.manual_seed(seed)
    text_encoder = TextEncoder(cfg.text_encoder, tokenizer.vocab_size, tokenizer.eos)
    return Model(unet, vae, text_encoder, tokenizer, 1.0)


def save(
    path: Path, model: Model, cfg: config.Config, dtype: torch.dtype = torch.float32, replace: bool = False
) -> None:
    """Commit a model folder that diffusers, transformers and tinydiff open."""
    with committed(path, replace=replace) as folder:
        write(folder, model, cfg, dtype)


def write(folder: Path, model: Model, cfg: config.Config, dtype: torch.dtype = torch.float32) -> None:
    """The files of a model folder, weights stored as `dtype`."""
    for name, part in model.parts().items():
        tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in part.state_dict().items()}
        (folder / name).mkdir()
        save_file(tensors, folder / name / FILES[name], {"format": "pt"})
        write_json(folder / name / "config.json", component_config(name, model, cfg))
    model.tokenizer.save(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler.write(cfg))
    write_json(folder / "model_index.json", index(cfg))
    (folder / "tinydiff.toml").write_text(config.to_toml(cfg), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def index(cfg: config.Config) -> dict[str, Any]:
    """`model_index.json` of a Stable Diffusion pipeline."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_tinydiff_version": __version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler.write(cfg)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def component_config(name: str, model: Model, cfg: config.Config) -> dict[str, Any]:
    """`config.json` of one network."""
    side = cfg.data.resolution // 2 ** (len(cfg.autoencoder.block_out_channels) - 1)
    if name == "unet":
        ups = [kind.replace("Down", "Up") for kind in reversed(cfg.denoiser.down_block_types)]
        sizes = {
            "sample_size": side,
            "in_channels": cfg.autoencoder.latent_channels,
            "out_channels": cfg.autoencoder.latent_channels,
        }
        own = asdict(cfg.denoiser) | {"up_block_types": ups, "cross_attention_dim": cfg.text_encoder.hidden_size}
        return {"_class_name": "UNet2DConditionModel"} | sizes | own
    if name == "vae":
        n = len(cfg.autoencoder.block_out_channels)
        kinds = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
        own = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "sample_size": cfg.data.resolution}
        return (
            {"_class_name": "AutoencoderKL"}
            | kinds
            | own
            | asdict(cfg.autoencoder)
            | {"scaling_factor": model.scaling_factor}
        )
    tokenizer = model.tokenizer
    ids = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.eos,
    }
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"} | asdict(cfg.text_encoder) | ids


def load(path: Path) -> Model:
    """The networks of a model folder, float32, in evaluation mode. ModelError names a missing or damaged file."""
    verify(path)
    unet, vae, text = (read_json(path / name / "config.json") for name in ("unet", "vae", "text_encoder"))
    tokenizer = Tokenizer.load(path / "tokenizer")
    try:
        channels = unet["out_channels"]
        extra = unet["in_channels"] - channels
        model = Model(
            UNet(known(config.Denoiser, unet), channels, unet["cross_attention_dim"], extra),
            Autoencoder(known(config.Autoencoder, vae)),
            TextEncoder(known(config.TextEncoder, text), text["vocab_size"], tokenizer.eos),
            tokenizer,
            float(vae.get("scaling_factor") or 0.18215),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: unsupported or incomplete config.json: {error}") from None
    for name, part in model.parts().items():
        load_weights(part, path / name / FILES[name])
        part.eval()
    return model


def known(kind: type, table: dict[str, Any]) -> Any:
    """The keys of a foreign `config.json` that dataclass `kind` has."""
    names = {f.name for f in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in table.items() if k in names})


def load_weights(part: nn.Module, path: Path) -> None:
    """Strictly load a safetensors file into a network; ModelError names the first keys that do not fit."""
    tensors = read_tensors(path)
    wanted = part.state_dict()
    if "text_model.final_layer_norm.weight" in wanted and "final_layer_norm.weight" in tensors:
        tensors = {f"text_model.{k}": v for k, v in tensors.items()}  # transformers 5 drops the prefix
    tensors.pop("text_model.embeddings.position_ids", None)
    wrong = sorted(wanted.keys() ^ tensors.keys()) + [
        k for k in wanted.keys() & tensors.keys() if wanted[k].shape != tensors[k].shape
    ]
    if wrong:
        raise ModelError(f"{path}: does not fit its config.json at {', '.join(wrong[:10])}")
    part.load_state_dict(tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; ModelError where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; copy the whole model folder") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged ({error}); fetch or train it again") from None
