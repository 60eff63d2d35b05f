"""Small pipelines in the form of Stable Diffusion XL, made by diffusers with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tensors import randomise

from tinydiff.checkpoints import single_file

SIDE = 128  # pixels
SCHEDULER: dict[str, Any] = {  # of the published base
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "use_karras_sigmas": False,
}


SHALLOW: dict[str, Any] = {  # a U-Net of two levels
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [1, 2],
}


def networks(channels: int = 4, **unet: Any) -> dict[str, torch.nn.Module]:
    """Narrow and shallow, but for the vocabulary, three levels, and a depth of transformers at each."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    text = {"vocab_size": 49408, "num_attention_heads": 1, "eos_token_id": 49407, "bos_token_id": 49406}
    big = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "hidden_act": "gelu"}
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "hidden_act": "quick_gelu"}
    made: dict[str, torch.nn.Module] = {
        "unet": UNet2DConditionModel(
            **{
                "sample_size": SIDE // 4,
                "in_channels": channels,
                "block_out_channels": (64, 64, 128),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "transformer_layers_per_block": [1, 1, 2],
                "attention_head_dim": [1, 1, 2],
                "cross_attention_dim": 128,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            }
            | unet
        ),
        "vae": AutoencoderKL(
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            sample_size=SIDE,
            scaling_factor=0.13025,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text, **small)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**text, **big, projection_dim=32)),
    }
    for seed, network in enumerate(made.values()):
        randomise(network, seed)
        network.eval()
    return made


def written(parts: dict[str, torch.nn.Module], home: Path, **scheduler: Any) -> Path:
    """The folder that diffusers' pipeline writes of them."""
    import diffusers
    from transformers import CLIPTokenizer

    tokenizers = {"tokenizer": "clip", "tokenizer_2": "open_clip"}
    for name, kind in tokenizers.items():
        single_file.tokenizer(kind).save(home / name)
    (home / "scheduler_config.json").write_text(json.dumps(table := SCHEDULER | scheduler))
    inpaints = parts["unet"].config.in_channels == 9  # type: ignore[union-attr]
    pipe = getattr(diffusers, f"StableDiffusionXL{'Inpaint' if inpaints else ''}Pipeline")(
        **parts,
        **{name: CLIPTokenizer.from_pretrained(home / name) for name in tokenizers},
        scheduler=getattr(diffusers, table["_class_name"]).from_pretrained(home),
        add_watermarker=False,
    )
    pipe.save_pretrained(home / "model")
    return home / "model"
