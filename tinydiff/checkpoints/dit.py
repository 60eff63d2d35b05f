"""The published layout of DiT weights (Peebles & Xie 2023), under diffusers' names, which are those of `models/dit.py`.

Sizes are read off names and shapes alone. It knows no file format, and needs torch only to look into tensors it is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tinydiff.errors import ModelError
from tinydiff.networks.dit import SIZES

EMB = "transformer_blocks.*.norm1.emb"
NAMES = {  # published: ours; * is the number of a block
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": f"{EMB}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{EMB}.timestep_embedder.linear_2",
    "y_embedder.embedding_table": f"{EMB}.class_embedder.embedding_table",
    "blocks.*.adaLN_modulation.1": "transformer_blocks.*.norm1.linear",
    "blocks.*.attn.qkv": "transformer_blocks.*.attn1.to_qkv",
    "blocks.*.attn.proj": "transformer_blocks.*.attn1.to_out.0",
    "blocks.*.mlp.fc1": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.mlp.fc2": "transformer_blocks.*.ff.net.2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
PLACES = "pos_embed"  # stored, though it follows from the sizes
PATCHES, LABELS, OUTPUT = "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"


def is_published(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a class-conditional DiT in the published layout."""
    return {PATCHES, LABELS, OUTPUT, "t_embedder.mlp.0.weight"} <= set(names)


def depth(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def configs(shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """The JSON files of a diffusers folder that a published file stands for, but for the autoencoder's.

    Noise levels are the paper's. Raises ModelError naming the tensor that is missing or of no DiT.
    """
    width, channels, patch, _ = shape_of(shapes, PATCHES, 4)
    _, places, _ = shape_of(shapes, PLACES, 3)
    outputs, side, heads = shape_of(shapes, OUTPUT, 2)[0] // patch**2, math.isqrt(places), heads_of(width)
    if outputs not in (channels, 2 * channels):
        raise ModelError(f"{OUTPUT}: {outputs} channels, where a DiT of {channels} predicts as many or twice as many")
    if side**2 != places:
        raise ModelError(f"{PLACES}: {places} tokens are no square; only square DiTs are supported")
    transformer = {"_class_name": "DiTTransformer2DModel", "num_layers": depth(shapes), "num_attention_heads": heads}
    transformer |= {"attention_head_dim": width // heads, "patch_size": patch, "in_channels": channels}
    transformer |= {"out_channels": outputs, "sample_size": side * patch}
    transformer |= {"num_embeds_ada_norm": shape_of(shapes, LABELS, 2)[0] - 1, "norm_eps": 1e-6, "freq_shift": 0}
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
    scheduler |= {"beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon", "clip_sample": False}
    reason = "diffusers' DiT embeds time at other frequencies (freq_shift 1), and draws other images"
    index = {"_class_name": "DiTPipeline", "_no_diffusers_pipeline": reason, "id2label": {}}
    classes = {"scheduler": "DDIMScheduler", "transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"}
    index |= {folder: ["diffusers", name] for folder, name in classes.items()}
    return {"model_index": index, "scheduler": scheduler, "transformer": transformer}


def shape_of(shapes: Mapping[str, Sequence[int]], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(shapes.get(name, ()))
    if len(shape) != dimensions or not all(shape):
        problem = f"has shape {shape}" if shape else "missing"
        raise ModelError(f"{name}: {problem}; this is no whole DiT, fetch it again")
    return shape


def heads_of(width: int) -> int:
    """Attention heads, which shapes do not tell: those of the paper, and of other widths heads of 64."""
    known = {heads * head: heads for _, heads, head in SIZES.values()}
    if width not in known and width % 64:
        raise ModelError(f"{PATCHES}: width {width} is neither one of the paper's nor a multiple of 64")
    return known.get(width, width // 64)


def published(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a published file under our names, as views; a name it should not have stays as it is.

    Raises ModelError where the places of tokens are not the sines and cosines that `models.dit` computes.
    """
    left, result = dict(tensors), dict[str, Any]()
    check_places(left.pop(PLACES), configs({k: tuple(v.shape) for k, v in tensors.items()})["transformer"])
    taken = set()
    for theirs, ours in pairs(depth(tensors)):
        for kind in ("weight", "bias"):
            if (name := f"{theirs}.{kind}") in left:
                result |= split(f"{ours}.{kind}", left[name])
                taken.add(name)
    return result | {name: tensor for name, tensor in left.items() if name not in taken}


def shapes(stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a published file's matrices under our names, from those that it stores."""
    found = dict[str, tuple[int, ...]]()
    for theirs, ours in pairs(depth(stored)):
        if shape := stored.get(f"{theirs}.weight"):
            kinds = [ours.replace("to_qkv", f"to_{part}") for part in "qkv"] if "to_qkv" in ours else [ours]
            found |= {f"{kind}.weight": (shape[0] // len(kinds), *shape[1:]) for kind in kinds}
    return found


def pairs(blocks: int) -> Iterator[tuple[str, str]]:
    """NAMES with every block's number; what all blocks share is repeated for each."""
    for theirs, ours in NAMES.items():
        for i in range(blocks if "*" in ours else 1):
            yield theirs.replace("*", str(i)), ours.replace("*", str(i))


def split(name: str, tensor: Any) -> dict[str, Any]:
    """Queries, keys and values are one matrix in the published layout, three in ours."""
    if "to_qkv" not in name:
        return {name: tensor}
    n = tensor.shape[0] // 3
    return {name.replace("to_qkv", f"to_{part}"): tensor[i * n : (i + 1) * n] for i, part in enumerate("qkv")}


def check_places(stored: Any, table: dict[str, Any]) -> None:
    from tinydiff.models.spatial import positions, rates

    side = table["sample_size"] // table["patch_size"]
    wanted = positions(side, side, side, rates(stored.shape[2], stored.device))
    if not (stored[0].float() - wanted).abs().max() < 1e-2:  # what bfloat16 rounds off
        raise ModelError(f"{PLACES}: not the sines and cosines of DiT; learned places of tokens are not supported")
