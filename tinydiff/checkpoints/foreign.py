"""Whether a model that others wrote is one of ours, told by its JSON files and the headers of its weights, without torch.

It knows the settings of diffusers' and transformers' networks: their makers' defaults, and which values ours have.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from tinydiff.checkpoints import weights
from tinydiff.checkpoints.description import configs
from tinydiff.errors import ModelError
from tinydiff.files import shown

DEFAULTS: dict[str, dict[str, Any]] = {  # of diffusers and transformers, for keys that an older config.json lacks
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "layers_per_block": 2,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 8,
        "use_linear_projection": False,
    },
    "vae": {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 32, "mid_block_add_attention": True},
    "text_encoder": {},
    "t5": {},
    "transformer": {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "num_layers": 28,
        "patch_size": 2,
        "sample_size": 32,
        "num_embeds_ada_norm": 1000,
        "norm_eps": 1e-5,
        "freq_shift": 1,
    },
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
    "t5": {"model_type": "t5"},
    "transformer": {
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "attention_bias": True,
    },
}


def known(kind: type, name: str, table: dict[str, Any]) -> Any:
    """Dataclass (or dict) `kind` from a foreign `config.json`, whose makers' defaults stand in for what it lacks.

    Raises ValueError for a network that ours is not.
    """
    table = DEFAULTS[name] | {k: v for k, v in table.items() if v is not None}
    for key, value in ONLY[name].items():
        if key in table and table[key] != value:
            raise ValueError(f"{name}: {key} is {table[key]!r}, and only {value!r} is supported")
    names = table if kind is dict else {f.name for f in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in table.items() if k in names})


def check(path: Path, vae: Path | None = None, prediction: str | None = None) -> None:
    """ModelError for what is missing, damaged or unsupported in a model's files, but for tensors that fit no network."""
    found = configs(path, vae, prediction)
    networks = [name for name in found if name not in ("model_index", "scheduler")]
    for name in networks:
        try:
            known(dict, "t5" if found[name].get("model_type") == "t5" else name, found[name])
        except ValueError as error:
            raise ModelError(f"{shown(path)}: unsupported config.json: {error}") from None
    if path.is_dir():
        text = ["text_encoder", "tokenizer"] if "unet" in found or "text_encoder" in found else []
        if missing := [name for name in text if not (path / name).is_dir()]:
            raise ModelError(f"{shown(path / missing[0])}: missing; copy the whole model folder")
        for name in networks:
            if not (vae and name == "vae"):
                weights.headers(path / name)
