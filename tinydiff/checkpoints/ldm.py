"""Stable Diffusion 1.x, 2.x and XL as CompVis' latent-diffusion code (LDM) and its successor (sgm) lay them out.

Names of tensors, and sizes.

A network's table is pairs (ours, theirs), ours being diffusers' and transformers' names; an entry stands for every name that
begins with it, the longest one counting, and is read in both directions. Sizes are read off shapes, and what shapes cannot
say is in `KINDS`. It knows no file and no tensor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tinydiff.networks.autoencoder import SCALING
from tinydiff.networks.network import single
from tinydiff.networks.text import PROJECTION
from tinydiff.networks.unet import CROSS, PLAIN, SIZES, XL, UNet, plan
from tinydiff.text.tokenizer import EOS

Pairs = Iterable[tuple[str, str]]
Layout = dict[str, Any]  # how many blocks there are: keys of a diffusers configuration

UNET_NAMES = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
UNET_NAMES |= {"conv_in": "input_blocks.0.0", "mid_block.attentions.0": "middle_block.1"}
UNET_NAMES |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
UNET_NAMES |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # of XL
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE = ("encoder", "decoder", "quant_conv", "post_quant_conv", "bn")
STATISTICS = "bn.running_mean"  # FLUX.2's autoencoder has them
CONTROL = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "controlnet_cond_embedding")
CONTROL += ("controlnet_down_blocks", "controlnet_mid_block")
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_HALF = (
    {"conv_in": "conv_in", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
    | {f"mid_block.attentions.0.{ours}": f"mid.attn_1.{theirs}" for ours, theirs in VAE_ATTENTION.items()}
    | {"conv_norm_out": "norm_out", "conv_out": "conv_out"}
)
CLIP = ("embeddings", "encoder", "final_layer_norm")
PROJECTED = "text_projection"
RESBLOCKS = r"transformer\.resblocks\.(\d+)\."
OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
}
OPEN_CLIP_LAYER = {"layer_norm1": "ln_1", "self_attn.out_proj": "attn.out_proj", "layer_norm2": "ln_2"}
OPEN_CLIP_LAYER |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def unet_pairs(layout: Layout) -> Pairs:
    """Their blocks are numbered through all levels; halving the size is one of them, doubling is part of one."""
    kinds = tuple(layout["down_block_types"])
    levels = plan(UNet((1,) * len(kinds), kinds, layout["layers_per_block"]))
    resnets = [(f"mid_block.resnets.{i}", f"middle_block.{2 * i}") for i in range(2)]
    yield from UNET_NAMES.items()
    for i, level in enumerate(levels):
        above, below = i * len(level.up), (len(levels) - 1 - i) * len(level.up)  # blocks before it, on either way
        down, up = f"down_blocks.{i}", f"up_blocks.{len(levels) - 1 - i}"
        downs = [(f"{down}.resnets.{j}", f"input_blocks.{above + j + 1}.0") for j in range(len(level.down))]
        ups = [(f"{up}.resnets.{j}", f"output_blocks.{below + j}.0") for j in range(len(level.up))]
        resnets += downs + ups
        yield from ((a.replace("resnets", "attentions"), f"{b[:-1]}1") for a, b in downs + ups)
        yield f"{down}.downsamplers.0.conv", f"input_blocks.{above + len(level.up)}.0.op"
        yield f"{up}.upsamplers.0.conv", f"output_blocks.{below + len(level.up) - 1}.{2 if level.depth else 1}.conv"
    yield from ((f"{ours}.{a}", f"{theirs}.{b}") for ours, theirs in resnets for a, b in RESNET.items())


def control_pairs(layout: Layout) -> Pairs:
    """A copy of the way down, a convolution after each of its parts, and those of the image, with activations between them."""
    yield from unet_pairs(layout)
    hint, hints = "controlnet_cond_embedding", 2 * len(layout["conditioning_embedding_out_channels"])
    names = ("conv_in", *(f"blocks.{i}" for i in range(hints - 2)), "conv_out")
    yield from ((f"{hint}.{ours}", f"input_hint_block.{2 * i}") for i, ours in enumerate(names))
    skips = len(layout["down_block_types"]) * (layout["layers_per_block"] + 1)
    yield from ((f"controlnet_down_blocks.{i}", f"zero_convs.{i}.0") for i in range(skips))
    yield "controlnet_mid_block", "middle_block_out.0"


def vae_pairs(layout: Layout) -> Pairs:
    """Their decoder's levels are numbered from the image, ours from the latent."""
    levels, n = len(layout["down_block_types"]), layout["layers_per_block"]
    yield from (("quant_conv", "encoder.quant_conv"), ("post_quant_conv", "decoder.post_quant_conv"))  # FLUX.2's
    yield from ((name, name) for name in VAE[2:])
    for half in VAE[:2]:
        yield from (
            (f"{half}.mid_block.attentions.0.{a}", f"{half}.mid.attn_1.{a}") for a in VAE_ATTENTION
        )  # also read
        yield from ((f"{half}.{a}", f"{half}.{b}") for a, b in VAE_HALF.items())
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        yield f"{down}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv"
        yield f"{up}.upsamplers.0.conv", f"decoder.up.{i}.upsample.conv"
        for ours, theirs, blocks in ((down, f"encoder.down.{i}", n), (up, f"decoder.up.{i}", n + 1)):
            for j in range(blocks):
                yield f"{ours}.resnets.{j}", f"{theirs}.block.{j}"
                yield f"{ours}.resnets.{j}.conv_shortcut", f"{theirs}.block.{j}.nin_shortcut"


def open_clip_pairs(layout: Layout) -> Pairs:
    """Queries, keys and values are one tensor: three names of ours, in this order, are one of theirs."""
    yield from OPEN_CLIP.items()
    for i in range(layout["num_hidden_layers"]):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in OPEN_CLIP_LAYER.items())
        for kind in ("weight", "bias"):
            yield from ((f"{ours}.self_attn.{x}_proj.{kind}", f"{theirs}.attn.in_proj_{kind}") for x in "qkv")


def projected_pairs(layout: Layout) -> Pairs:
    """The second tower of XL: its last block counts too, and the projection is stored as what multiplies from the right."""
    yield PROJECTION, PROJECTION  # also read
    yield PROJECTION, PROJECTED
    yield from open_clip_pairs(layout)


def unet_layout(names: Collection[str]) -> Layout:
    levels = count(names, r"(input_blocks\.\d+\.0\.op\.)") + 1
    n = count(names, r"input_blocks\.(\d+)\.") // levels - 1
    cross = [f"input_blocks.{level * (n + 1) + 1}.1.norm.weight" in names for level in range(levels)]
    return {"layers_per_block": n, "down_block_types": [CROSS if c else PLAIN for c in cross]}


def control_layout(names: Collection[str]) -> Layout:
    hints = count(names, r"input_hint_block\.(\d+)\.")
    return unet_layout(names) | {"conditioning_embedding_out_channels": [0] * (hints // 2)}


def vae_layout(names: Collection[str]) -> Layout:
    levels, n = count(names, r"encoder\.down\.(\d+)\."), count(names, r"encoder\.down\.0\.block\.(\d+)\.")
    return {"layers_per_block": n, "down_block_types": ["DownEncoderBlock2D"] * levels}


def count(names: Iterable[str], pattern: str) -> int:
    """How many different first groups `pattern` finds at the beginning of names."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


TABLES: dict[str, tuple[Callable[[Collection[str]], Layout], Callable[[Layout], Pairs]]] = {
    "unet": (unet_layout, unet_pairs),
    "control": (control_layout, control_pairs),
    "control_of_diffusers": (lambda names: {}, lambda layout: ((name, name) for name in CONTROL)),
    "vae": (vae_layout, vae_pairs),
    "vae_of_diffusers": (lambda names: {}, lambda layout: ((name, name) for name in VAE)),
    "clip": (lambda names: {}, lambda layout: ((f"text_model.{name}", name) for name in CLIP)),
    "open_clip": (lambda names: {"num_hidden_layers": count(names, RESBLOCKS)}, open_clip_pairs),
    "projected": (lambda names: {"num_hidden_layers": count(names, RESBLOCKS)}, projected_pairs),
}
TOWERS = ("cond_stage_model.", "conditioner.embedders.0.")  # LDM's, and its successor sgm's (SD-Turbo)
HOMES = {  # where a network can be: what its names begin with, one of them, and their table; written to a table's first
    "unet": [("model.diffusion_model.", "input_blocks.0.0.weight", "unet")],
    "controlnet": [
        ("control_model.", "zero_convs.0.0.weight", "control"),
        ("", "zero_convs.0.0.weight", "control"),
        ("", "controlnet_mid_block.weight", "control_of_diffusers"),
    ],
    "vae": [
        (prefix, f"encoder.{block}.0.conv1.weight", table)
        for prefix in ("first_stage_model.", "vae.", "")
        for block, table in (("down.0.block", "vae"), ("down_blocks.0.resnets", "vae_of_diffusers"))
    ],
    "text_encoder": [
        (tower + prefix, probe, table)
        for prefix, probe, table in (
            ("transformer.text_model.", "embeddings.token_embedding.weight", "clip"),
            ("transformer.", "embeddings.token_embedding.weight", "clip"),
            ("model.", "token_embedding.weight", "open_clip"),
        )
        for tower in TOWERS
    ],
    "text_encoder_2": [("conditioner.embedders.1.model.", "token_embedding.weight", "projected")],
}
# Not weights, or not used: of OpenCLIP's 24 blocks the last, for Stable Diffusion 2 is conditioned on the one before it.
UNUSED = re.compile(
    r"(^|\.)(position_ids|attn_mask|logit_scale|num_batches_tracked|text_projection(\.weight)?)$"
    r"|^transformer\.resblocks\.23\."
)
UNUSED_OF = {"projected": re.compile(r"(^|\.)(position_ids|attn_mask|logit_scale)$")}  # where it is not that
EMA = "model_ema."
EMA_WORDS = re.compile(  # a block is named by two numbers, the second of one digit
    r"diffusion_model|(?:in|out)put_blocks|middle_block|time_embed|(?:in|emb|out)_layers|skip_connection"
    r"|transformer_blocks|proj_in|proj_out|attn[12]|norm[123]?|to_[qkv]|to_out|net|conv|proj|ff|out|op|weight|bias|\d+(?=\d)|\d"
)


def averaged(name: str) -> str | None:
    """The name of the tensor of which `model_ema.…` is the average: its own without dots. None for what is no average."""
    words = EMA_WORDS.findall(name.removeprefix(EMA)) if name.startswith(EMA) else []
    return f"model.{'.'.join(words)}" if EMA + "".join(words) == name else None


def renamed(name: str, table: Mapping[str, list[str]]) -> list[str]:
    """`name`, its longest beginning that is in the table replaced; empty where none is."""
    head, tail = name, ""
    while head and head not in table:
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return [new + tail for new in table[head]] if head else []


def forward(pairs: Pairs) -> dict[str, list[str]]:
    """The table from our names to theirs."""
    return {ours: [theirs] for ours, theirs in pairs}


def backward(pairs: Pairs) -> dict[str, list[str]]:
    """The table from their names to ours."""
    table = defaultdict(list)
    for ours, theirs in pairs:
        table[theirs].append(ours)
    return table


UNSAID = ("attention_head_dim", "norm_num_groups")  # by the shapes of a control network, which are its U-Net's
ADDED = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
Shapes = Mapping[str, tuple[int, ...]]
VOCABULARY = 49408


@dataclass(frozen=True)
class Kind:
    """What shapes do not say of a generation of models, known by how its text encoder is named."""

    number: int
    hidden_act: str
    pad: str
    heads: Callable[[list[int]], int | list[int]]  # of the U-Net's levels, from their widths
    side: int = 64  # latents
    scaling: float = SCALING
    scheduler: str = "PNDMScheduler"


def by_width(widths: list[int]) -> list[int]:
    """Heads of 64 channels each."""
    return [max(1, width // 64) for width in widths]


KINDS = {  # by the table of the text encoder, which for XL is the second one
    "clip": Kind(1, "quick_gelu", EOS, lambda widths: 8),
    "open_clip": Kind(2, "gelu", "!", by_width),
    "projected": Kind(3, "gelu", "!", by_width, 128, 0.13025, "EulerDiscreteScheduler"),
}


def kind_of(tables: Mapping[str, str]) -> Kind:
    """The generation of a model whose networks have these tables."""
    return KINDS[tables.get("text_encoder_2", tables["text_encoder"])]


def sizes(shapes: Mapping[str, Shapes], tables: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The configurations of networks from their shapes. Raises KeyError, ValueError or IndexError where they lack some."""
    made = {"unet": _unet(shapes["unet"], kind_of(tables)), "vae": autoencoder(shapes["vae"])}
    for name in (name for name in shapes if name.startswith("text_encoder")):
        made[name] = _text_encoder(shapes[name], KINDS[tables[name]])
        if made[name]["vocab_size"] < VOCABULARY:
            raise ValueError(f"a vocabulary of {made[name]['vocab_size']} where CLIP has {VOCABULARY}")
    if added := shapes["unet"].get("add_embedding.linear_1.weight"):
        pooled = made["text_encoder_2"]["projection_dim"]
        own = {"addition_embed_type": XL, "addition_time_embed_dim": (added[1] - pooled) // SIZES}
        made["unet"] |= own | {"projection_class_embeddings_input_dim": added[1]}
    return made


def _unet(shapes: Shapes, kind: Kind) -> dict[str, Any]:
    table = {"_class_name": "UNet2DConditionModel", "out_channels": shapes["conv_out.weight"][0]} | _descent(shapes)
    ups = [name.replace("Down", "Up") for name in reversed(table["down_block_types"])]
    return table | {"up_block_types": ups, "attention_head_dim": kind.heads(table["block_out_channels"])}


def _descent(shapes: Shapes) -> dict[str, Any]:
    """What a U-Net and a control network share."""
    levels, middle = count(shapes, r"down_blocks\.(\d+)\."), "mid_block.attentions.0"
    widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    downs = [CROSS if f"down_blocks.{i}.attentions.0.norm.weight" in shapes else PLAIN for i in range(levels)]
    table: dict[str, Any] = {"in_channels": shapes["conv_in.weight"][1]}
    table |= {"block_out_channels": widths, "down_block_types": downs}
    table |= {"layers_per_block": count(shapes, r"down_blocks\.0\.resnets\.(\d+)\.")}
    blocks = (rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\." for i in range(levels))
    deepest = count(shapes, rf"{middle}\.transformer_blocks\.(\d+)\.")
    depths = [count(shapes, pattern) for pattern in blocks]
    if depths[-1] not in (0, deepest):
        raise ValueError(f"transformers of {depths[-1]} blocks at the last level, and of {deepest} in the middle")
    depths = [*depths[:-1], deepest]
    usual = deepest if {*depths} <= {0, deepest} else 1  # said of levels without transformers
    table |= {"transformer_layers_per_block": single([depth or usual for depth in depths])}
    table |= {"cross_attention_dim": shapes[f"{middle}.transformer_blocks.0.attn2.to_k.weight"][1]}
    return table | {"norm_num_groups": 32, "use_linear_projection": len(shapes[f"{middle}.proj_in.weight"]) == 2}


def control(shapes: Shapes, base: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a control network from its shapes; what these do not say is its U-Net's. Raises as `sizes`."""
    hint = "controlnet_cond_embedding"
    halvings = count(shapes, rf"{hint}\.blocks\.(\d+)\.") // 2
    names = [f"{hint}.conv_in", *(f"{hint}.blocks.{2 * i + 1}" for i in range(halvings))]
    table = {"_class_name": "ControlNetModel"} | _descent(shapes)
    table |= {key: base[key] for key in (*UNSAID, *ADDED) if key in base}
    table |= {"conditioning_channels": shapes[f"{hint}.conv_in.weight"][1]}
    return table | {"conditioning_embedding_out_channels": [shapes[f"{name}.weight"][0] for name in names]}


def autoencoder(shapes: Shapes) -> dict[str, Any]:
    levels = count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    table: dict[str, Any] = {"_class_name": "AutoencoderKL", "in_channels": shapes["encoder.conv_in.weight"][1]}
    table |= {"out_channels": shapes["decoder.conv_out.weight"][0]}
    widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    table |= {"block_out_channels": widths, "down_block_types": ["DownEncoderBlock2D"] * levels}
    table |= {"up_block_types": ["UpDecoderBlock2D"] * levels}
    table |= {"layers_per_block": count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")}
    table |= {"latent_channels": shapes["post_quant_conv.weight"][1], "norm_num_groups": 32, "act_fn": "silu"}
    table |= {"_class_name": "AutoencoderKLFlux2"} if STATISTICS in shapes else {}
    return table | {"mid_block_add_attention": "decoder.mid_block.attentions.0.group_norm.weight" in shapes}


def _text_encoder(shapes: Shapes, kind: Kind) -> dict[str, Any]:
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    table = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": vocabulary}
    table |= {"hidden_size": width, "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0]}
    table |= {"num_hidden_layers": count(shapes, r"text_model\.encoder\.layers\.(\d+)\.")}
    table |= {"num_attention_heads": max(1, width // 64)}
    if projection := shapes.get(PROJECTION):
        table |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": projection[0]}
    table |= {"max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0]}
    table |= {"hidden_act": kind.hidden_act, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
    return table | {"pad_token_id": 0 if kind.pad == "!" else VOCABULARY - 1}
