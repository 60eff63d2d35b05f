"""LoRA files and learnt words of Stable Diffusion XL, whose two text encoders have parts of their own, against diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_xl
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from tinydiff.adapters import words
from tinydiff.adapters.words import Word
from tinydiff.backends import open_backend
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Adapter, Source
from tinydiff.condition import of_branches
from tinydiff.text.prompts import parse

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
TEXT = "text_model_encoder_layers_"
LAYERS = {  # by the names of kohya's scripts for it: Stable Diffusion's own blocks, and text encoders with numbers
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "lora_unet_input_blocks_5_1_proj_out": "unet.down_blocks.2.attentions.0.proj_out",
    "lora_unet_output_blocks_0_1_proj_in": "unet.up_blocks.0.attentions.0.proj_in",
    "lora_unet_input_blocks_3_0_in_layers_2": "unet.down_blocks.1.resnets.0.conv1",
    f"lora_te1_{TEXT}0_self_attn_out_proj": "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
    f"lora_te2_{TEXT}1_self_attn_out_proj": "text_encoder_2.text_model.encoder.layers.1.self_attn.out_proj",
    f"lora_te2_{TEXT}1_self_attn_v_proj": "text_encoder_2.text_model.encoder.layers.1.self_attn.v_proj",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_xl.written(tiny_xl.networks(), tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def pipe(base: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline
    from transformers.integrations import peft

    peft.MIN_PEFT_VERSION = "0.18.0"  # transformers 5.24 asks for one that is not published yet
    return StableDiffusionXLPipeline.from_pretrained(base)


def both(source: Source, pipe: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What networks of ours and theirs give for the same inputs."""
    model, rng = folder.load(source), torch.Generator().manual_seed(1)
    ids = torch.randint(49000, (2, 77), generator=rng)
    ids[:, -1] = 49407
    x, context, pooled = (torch.randn(2, *shape, generator=rng) for shape in ((4, 8, 8), (77, 128), (32,)))
    told, found = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}, dict[str, Any]()
    for name in ("text_encoder", "text_encoder_2"):
        theirs = getattr(pipe, name)(ids, output_hidden_states=True).hidden_states[-2]
        found[name] = model.networks[name](ids)[0], theirs
    theirs = pipe.unet(x, 501.0, context, added_cond_kwargs=told).sample
    return found | {"unet": (model.denoiser(x, torch.tensor(501.0), encoder_hidden_states=context, **told), theirs)}


@torch.inference_mode()
def test_a_lora_changes_what_it_does_in_diffusers(base, pipe, tmp_path):
    rng, tensors, plain = np.random.default_rng(0), dict[str, np.ndarray](), both(Source(base), pipe)
    for name, layer in LAYERS.items():
        network, _, module = layer.partition(".")
        out, *reads = Source(base).shapes(network)[f"{module}.weight"]
        sizes = {"down": (4, *reads), "up": (out, 4, *[1] * (len(reads) - 1))}
        tensors |= {f"{name}.lora_{k}.weight": rng.standard_normal(size, np.float32) / 2 for k, size in sizes.items()}
        tensors[f"{name}.alpha"] = np.array(2, np.float32)
    save_file(tensors, tmp_path / "kohya.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="kohya.safetensors", adapter_name="own")
    pipe.set_adapters(["own"], [0.7])
    source = Source(base, adapters=(Adapter(tmp_path / "kohya.safetensors", 0.7),))
    source.check()
    assert {*source.loras[0].places} == {*LAYERS.values()}
    for name, (ours, theirs) in both(source, pipe).items():
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.std(), name
        assert (ours - plain[name][0]).abs().max() > 0.05 * theirs.std(), name
    pipe.unload_lora_weights()


@torch.inference_mode()
def test_a_word_says_what_it_does_in_diffusers(base, pipe, tmp_path):
    """Of vectors for each text encoder, in one file."""
    rng, path = np.random.default_rng(1), tmp_path / "<cat>.safetensors"
    names = ("text_encoder", "text_encoder_2")
    words.write(path, Word("<cat>", {name: rng.standard_normal((2, 64)).astype(np.float32) for name in names}))
    stored = load_file(path)
    for key, encoder, tokenizer in (
        ("clip_l", "text_encoder", "tokenizer"),
        ("clip_g", "text_encoder_2", "tokenizer_2"),
    ):
        own = {"text_encoder": getattr(pipe, encoder), "tokenizer": getattr(pipe, tokenizer)}
        pipe.load_textual_inversion(stored[key], token="<cat>", **own)
    source = Source(base, words=(path,))
    source.check()
    told = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    hidden, _, pooled, _ = pipe.encode_prompt("a <cat> here", **told)
    ours = of_branches(open_backend(source, "torch", "cpu"), parse("a <cat> here"))
    plain = of_branches(open_backend(Source(base), "torch", "cpu"), parse("a <cat> here"))
    for key, theirs in {"encoder_hidden_states": hidden.numpy(), "text_embeds": pooled.numpy()}.items():
        assert np.abs(ours[key] - theirs).max() <= 1e-4 * theirs.std() < np.abs(ours[key] - plain[key]).max()
