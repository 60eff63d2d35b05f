"""Model folders in the diffusers layout: networks out to `config.json` and safetensors, and back.

Parameter names are diffusers' and transformers' own, so there is no conversion; `load_state_dict` is strict.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinydiff import __version__, config
from tinydiff.checkpoints import scheduler, weights
from tinydiff.checkpoints.description import configs
from tinydiff.errors import ModelError
from tinydiff.files import committed, shown, verify
from tinydiff.models.autoencoder import Autoencoder
from tinydiff.models.text_encoder import TextEncoder
from tinydiff.models.unet import UNet
from tinydiff.text.tokenizer import Tokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = {"unet": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors"}
DEFAULTS: dict[str, dict[str, Any]] = {  # of diffusers and transformers, for keys that an older config.json lacks
    "unet": {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "use_linear_projection": False,
    },
    "vae": {"norm_num_groups": 32, "mid_block_add_attention": True},
    "text_encoder": {},
}
ONLY: dict[str, dict[str, Any]] = {  # what makes another network, and the value it has in ours
    "unet": {
        "act_fn": "silu",
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "resnet_time_scale_shift": "default",
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "attention_type": "default",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
    }
    | dict.fromkeys(("center_input_sample", "only_cross_attention", "dual_cross_attention"), False)
    | dict.fromkeys(("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim"))
    | dict.fromkeys(("time_cond_proj_dim", "time_embedding_dim", "timestep_post_act", "cross_attention_norm"))
    | {"mid_block_only_cross_attention": None},
    "vae": {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None},
    "text_encoder": {"layer_norm_eps": 1e-5, "model_type": "clip_text_model"},
}
IGNORED = ("position_ids", "text_projection.weight")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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
    """The networks of a model folder, float32, in evaluation mode; weights stored so are mapped, not copied.

    ModelError names a missing, damaged or unsupported file.
    """
    verify(path)
    found = configs(path)
    stored = {name: weights.files(path / name) for name in found if name not in ("model_index", "scheduler")}
    tokenizer = Tokenizer.load(path / "tokenizer")
    try:
        with torch.device("meta"):
            unet, vae, text = found["unet"], found["vae"], found["text_encoder"]
            channels = int(unet.get("out_channels", 4))
            extra = int(unet.get("in_channels", 4)) - channels
            model = Model(
                UNet(known(config.Denoiser, "unet", unet), channels, unet["cross_attention_dim"], extra),
                Autoencoder(known(config.Autoencoder, "vae", vae)),
                TextEncoder(known(config.TextEncoder, "text_encoder", text), text["vocab_size"], tokenizer.eos),
                tokenizer,
                float(vae.get("scaling_factor") or 0.18215),
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: unsupported or incomplete config.json: {error}") from None
    for name, part in model.parts().items():
        fill(part, weights.tensors(stored[name]), path / name)
        part.float().eval()
    return model


def known(kind: type, name: str, table: dict[str, Any]) -> Any:
    """Dataclass `kind` from a foreign `config.json`, whose makers' defaults stand in for what it lacks.

    Raises ValueError for a network that ours is not.
    """
    table = DEFAULTS[name] | {k: v for k, v in table.items() if v is not None}
    for key, value in ONLY[name].items():
        if key in table and table[key] != value:
            raise ValueError(f"{name}: {key} is {table[key]!r}, and only {value!r} is supported")
    names = {f.name for f in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in table.items() if k in names})


def fill(part: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Strictly give a network its weights, under any name they have had; ModelError names the first that do not fit."""
    wanted = part.state_dict()
    renamed = {_renamed(k, wanted): v for k, v in tensors.items() if not k.endswith(IGNORED)}
    common = wanted.keys() & renamed.keys()
    wrong = sorted(wanted.keys() ^ renamed.keys()) + sorted(k for k in common if wanted[k].shape != renamed[k].shape)
    if wrong:
        raise ModelError(f"{shown(path)}: its weights do not fit its config.json at {', '.join(wrong[:10])}")
    part.load_state_dict(renamed, assign=True)


def _renamed(key: str, wanted: dict[str, Tensor]) -> str:
    if key in wanted:
        return key
    if f"text_model.{key}" in wanted:  # transformers 5 drops the prefix
        return f"text_model.{key}"
    stem, _, kind = key.rpartition(".")  # attention of autoencoders before diffusers 0.17
    module, _, last = stem.rpartition(".")
    return f"{module}.{OLD_ATTENTION[last]}.{kind}" if last in OLD_ATTENTION else key
