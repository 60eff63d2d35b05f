"""Print how far tinydiff is from diffusers and transformers on networks of full size with random weights.

    python scripts/parity.py [sd15] [sd21] [sdxl] [dit-xl] [--folder DIR]       minutes, 8 GB of memory, 5 GB of disk each

Stable Diffusion XL takes 16 GB of memory and 14 GB of disk.

Networks: the largest difference of one call, in standard deviations of the output, float32 on the CPU. Images: the share of
pixels within one grey level of diffusers' pipeline after 20 steps at 128x128 from the same latents, guidance 7.5.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROMPTS = ["a red square on the left of a blue circle", "an astronaut riding a horse on mars, oil painting"]
CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UPS = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "sd21": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "sample_size": 96,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
}
TEXTS: dict[str, dict[str, Any]] = {
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "sd21": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}
TEXTS["sdxl"] = TEXTS["sd15"]
SECOND = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
SECOND |= {"hidden_act": "gelu", "projection_dim": 1280, "eos_token_id": 49407}
SCHEDULER = {  # of the published folders, without what only their own sampler reads
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
SAMPLERS = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")


def build(kind: str, folder: Path, narrow: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> None:
    """A diffusers folder with random weights: of full size, or with a denoiser as `narrow` has it and parts to match."""
    from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    dit = kind == "dit-xl"
    if dit:
        network = DiTTransformer2DModel(**{"out_channels": 8, "sample_size": 32} | (narrow or {}))
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.02)
        network.to(dtype).save_pretrained(folder / "transformer")
    else:
        unet = {"block_out_channels": (320, 640, 1280, 1280), "down_block_types": CROSS, "up_block_types": UPS}
        unet |= UNETS[kind] | (narrow or {})
        UNet2DConditionModel(**unet).to(dtype).save_pretrained(folder / "unet")
        sizes = (
            {"hidden_act": "quick_gelu"}
            | TEXTS[kind]
            | ({"hidden_size": unet["cross_attention_dim"]} if narrow else {})
        )
        sizes |= {"intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2} if narrow else {}
        text = CLIPTextConfig(vocab_size=49408, **sizes)
        CLIPTextModel(text).to(dtype).save_pretrained(folder / "text_encoder")
        from tinydiff.checkpoints import single_file

        single_file.tokenizer("open_clip" if kind == "sd21" else "clip").save(folder / "tokenizer")
        if kind == "sdxl":
            second = CLIPTextConfig(vocab_size=49408, **SECOND)
            CLIPTextModelWithProjection(second).to(dtype).save_pretrained(folder / "text_encoder_2")
            single_file.tokenizer("open_clip").save(folder / "tokenizer_2")
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths, side = ((32, 32, 32, 32), 64) if narrow else ((128, 256, 512, 512), 512)
    vae = AutoencoderKL(**levels, block_out_channels=widths, layers_per_block=2, sample_size=side)
    vae.to(dtype).save_pretrained(folder / "vae")
    describe_pipeline(kind, folder)


def describe_pipeline(kind: str, folder: Path) -> None:
    """The folder's `model_index.json` and scheduler, as published."""
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler: dict[str, Any] = SCHEDULER | ({"prediction_type": "v_prediction"} if kind == "sd21" else {})
    index: dict[str, Any] = {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "PNDMScheduler"]}
    if kind == "dit-xl":
        scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": False}
        index |= {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
        index |= {"scheduler": ["diffusers", "DDIMScheduler"], "id2label": {str(i): str(i) for i in range(1000)}}
    else:
        index |= {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
        index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None]}
    if kind == "sdxl":
        scheduler |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
        index |= {"_class_name": "StableDiffusionXLPipeline", "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"], "force_zeros_for_empty_prompt": True}
        del index["safety_checker"]
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps(index))


def difference(ours: np.ndarray, theirs: torch.Tensor) -> float:
    """Largest difference in standard deviations."""
    wanted = theirs.numpy()
    return float(np.abs(ours - wanted).max() / wanted.std())


@torch.inference_mode()
def networks(kind: str, folder: Path) -> Iterator[tuple[str, float]]:
    """(network, largest difference of one call in standard deviations of its output)."""
    from diffusers import AutoencoderKL, DiTTransformer2DModel, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from tinydiff.backends import open_backend
    from tinydiff.checkpoints.source import Source

    backend, rng = open_backend(Source(folder), "torch", "cpu"), np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 32, 32)).astype(np.float32)
    if kind == "dit-xl":
        ids = np.array([[207], [1000]])
        theirs: Any = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
        wanted = theirs(torch.tensor(x), timestep=torch.tensor([601, 601]), class_labels=torch.tensor(ids[:, 0])).sample
        yield "DiT", difference(backend.denoise(x, 601.0, backend.encode_text({"labels": ids})), wanted[:, :4])
    else:
        ids = {name: tokenizer.encode(PROMPTS) for name, tokenizer in backend.tokenizers.items()}
        told, added = backend.encode_text(ids), {}
        context = told["encoder_hidden_states"]
        if kind == "sdxl":
            pipe: Any = StableDiffusionXLPipeline.from_pretrained(folder, unet=None, vae=None)
            tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
            yield "text encoders", max(difference(context, tokens), difference(told["text_embeds"], pooled))
            told["time_ids"] = np.array([[1024, 768, 3, 5, 256, 256], [256, 256, 0, 0, 256, 256]], np.float32)
            added = {"added_cond_kwargs": {k: torch.tensor(told[k]) for k in ("text_embeds", "time_ids")}}
            del pipe
        else:
            text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
            yield "text encoder", difference(context, text(torch.tensor(ids["text_encoder"])).last_hidden_state)
        ours = backend.denoise(x, 601.0, told)
        theirs = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        wanted = theirs(torch.tensor(x), torch.tensor(601.0), torch.tensor(context), **added).sample
        yield "U-Net", difference(ours, wanted)
    del theirs
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    pixels = (rng.random((1, 3, 256, 256)) * 2 - 1).astype(np.float32)
    yield "encoder", difference(backend.encode_image(pixels), vae.encode(torch.tensor(pixels)).latent_dist.parameters)
    yield "decoder", difference(backend.decode(x[:1]), vae.decode(torch.tensor(x[:1])).sample)


def images(kind: str, folder: Path) -> Iterator[tuple[str, float]]:
    """(scheduler, share of pixels within one grey level of diffusers' pipeline)."""
    import diffusers

    from tinydiff.backends import open_backend
    from tinydiff.checkpoints.source import Source
    from tinydiff.diffusion import noise
    from tinydiff.pipeline import Request, generate

    path = folder / "scheduler" / "scheduler_config.json"
    said = json.loads(path.read_text())
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for name in SAMPLERS:
        if kind in ("sd21", "sdxl") and name == "PNDMScheduler":
            continue  # of 2.1 diffusers mixes v of different levels there, ours noise, as the paper does; nobody draws XL so
        getattr(diffusers, name).from_config(said).save_pretrained(folder / "scheduler")
        pipe.scheduler = getattr(diffusers, name).from_pretrained(folder / "scheduler")
        backend = open_backend(Source(folder), "torch", "cpu")
        g, start = backend.description.generate, noise.normal([3], (4, 16, 16))
        request = Request(20, 7.5, g.sampler, g.spacing, 128, 128)
        ours = generate(backend, PROMPTS[:1], [3], request)
        scale = 1.0 if "Euler" in name else backend.description.levels(g.sampler, 20, g.spacing)[0].sigma
        settings = {"height": 128, "width": 128, "num_inference_steps": 20, "guidance_scale": 7.5, "output_type": "np"}
        theirs = pipe(PROMPTS[:1], latents=torch.tensor(start * np.float32(scale)), **settings).images
        yield name, float((np.abs(ours - np.rint(theirs * 255)) <= 1).mean())
    path.write_text(json.dumps(said))


KINDS: dict[str, str] = {
    "sd15": "Stable Diffusion 1.5",
    "sd21": "Stable Diffusion 2.1",
    "sdxl": "Stable Diffusion XL",
    "dit-xl": "DiT-XL/2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--folder", type=Path, help="where the models are, or are to be, built; a temporary folder")
    arguments = parser.parse_args()
    print("| model | what | against diffusers and transformers |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for kind in arguments.kinds:
            folder = (arguments.folder or Path(temporary)) / kind
            if not folder.exists():
                print(f"building {kind}", file=sys.stderr)
                build(kind, folder)
            checks: list[tuple[Callable[..., Any], str]] = [(networks, "{:.1e} deviations")]
            checks += [(images, "{:.2%} of pixels within 1/255")] if kind != "dit-xl" else []
            for check, form in checks:
                for name, value in check(kind, folder):
                    print(f"| {KINDS[kind]} | {name} | {form.format(value)} |", flush=True)


if __name__ == "__main__":
    main()
