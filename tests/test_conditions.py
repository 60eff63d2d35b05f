"""What a denoiser is told besides text: a class, another image, tokens of the noise level; from the data to a picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import noise, randomise, same
from torch.nn import functional as F

from tinydiff.models.attention import FusedAttention
from tinydiff.models.unet import UNet
from tinydiff.networks import DENOISERS
from tinydiff.networks.network import Array, Table

CROSS = "CrossAttnDownBlock2D"
SIZES: Table = {"block_out_channels": (16, 32), "down_block_types": (CROSS, CROSS), "layers_per_block": 1}
SIZES |= {"attention_head_dim": 2, "norm_num_groups": 8, "use_linear_projection": True, "cross_attention_dim": 12}
SIZES |= {"sample_size": 8, "in_channels": 4, "out_channels": 4}

ROW: Any = DENOISERS["unet"]


def network(**own: Any) -> UNet:
    """A U-Net of a table, every parameter random."""
    made = ROW.build(SIZES | own)
    randomise(made)
    return made.eval()


def told(table: Table, batch: int = 2, side: int = 8) -> dict[str, torch.Tensor]:
    """Random conditions of a table, of five tokens of text."""
    sizes = {"batch": batch, "height": side, "width": 2 * side, "sequence": 5}
    arrays: dict[str, Array] = ROW.conditions(ROW.complete(table))
    return {name: noise(*array.shape(sizes), seed=i) for i, (name, array) in enumerate(arrays.items())}


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "own", [{"num_class_embeds": 7}, {"in_channels": 8}, {"num_class_embeds": 3, "in_channels": 8}]
)
@torch.no_grad()
def test_class_and_concatenation_are_those_of_diffusers(own):
    from diffusers import UNet2DConditionModel

    table = {**SIZES, "up_block_types": ("CrossAttnUpBlock2D",) * 2, **own}
    theirs, ours = UNet2DConditionModel(**table).eval(), network(**own)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    given, x, t = told(table), noise(2, 4, 8, 16, seed=9), torch.tensor([3.0, 800.0])
    read, more = x, {}
    if classes := own.get("num_class_embeds"):
        labels = torch.tensor([classes - 1, 1])
        given["class_labels"], more["class_labels"] = F.one_hot(labels, classes).float(), labels
    if "in_channels" in own:
        read = torch.cat([x, given["image_latents"]], 1)
    same(ours(x, t, **given), theirs(read, t, given["encoder_hidden_states"], **more).sample)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_fused_attention_is_the_weighted_sum_of_the_formula(qk_norm):
    """sum_m w_m softmax(Q_h K_mh^T / sqrt d) V_mh, head by head and row by row."""
    layer = FusedAttention(8, 2, 6, 3, qk_norm)
    randomise(layer)
    x, context = noise(2, 5, 8), [noise(2, n, 6, seed=n) for n in (3, 1, 4)]
    w = layer.fusion.exp() / layer.fusion.exp().sum()
    assert w.std() > 0
    keys, values = [layer.to_k, *layer.more_k], [layer.to_v, *layer.more_v]
    rows = torch.zeros(2, 5, 8)
    for b, i, h in ((b, i, h) for b in range(2) for i in range(5) for h in range(2)):
        part = slice(4 * h, 4 * h + 4)
        for m, tokens in enumerate(context):
            q, k, v = layer.to_q(x[b, i])[part], keys[m](tokens[b])[:, part], values[m](tokens[b])[:, part]
            if qk_norm:
                q = q / (q.square().mean() + 1e-6).sqrt() * layer.norm_q.weight
                k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_k.weight
            weights = (k @ q / 4**0.5).exp()
            rows[b, i, part] += w[m] * (weights[:, None] * v).sum(0) / weights.sum()
    same(layer(x, context), rows @ layer.to_out[0].weight.T + layer.to_out[0].bias)


EVERYTHING = {"label": "cross", "num_class_embeds": 5, "image": "cross", "time_tokens": 3}


@pytest.mark.parametrize(
    "own", [{"time_tokens": 2}, {"label": "cross", "num_class_embeds": 5}, {"image": "cross"}, EVERYTHING]
)
def test_every_source_is_read_and_every_parameter_of_it_learns(own):
    made, x, t = network(**own), noise(2, 4, 8, 16, seed=9), torch.tensor([3.0, 800.0])
    given = told({**SIZES, **own})
    before = made(x, t, **given)
    before.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())
    with torch.no_grad():
        for name in given.keys() - {"encoder_hidden_states"}:
            other = made(x, t, **given | {name: given[name].flip(0)})
            assert (other - before).abs().max() > 1e-5, name
        blocks = [part for part in made.modules() if isinstance(part, FusedAttention)]
        for layer in blocks:  # with all the weight on the text it is the text alone that is read
            layer.fusion[0] = 1e4
        plain = network()
        plain.load_state_dict(made.state_dict(), strict=False)
        same(made(x, t, **given), plain(x, t, given["encoder_hidden_states"]))
    assert blocks


@torch.no_grad()
def test_an_image_s_tokens_know_their_place():
    made = network(image="cross")
    given = told({**SIZES, "image": "cross"})
    picture = torch.zeros_like(given["image_latents"])
    picture[:, :, :2, :2] = 1
    x, t = noise(2, 4, 8, 16, seed=9), torch.tensor(100.0)
    one, other = (made(x, t, **given | {"image_latents": each}) for each in (picture, picture.roll(4, 3)))
    assert (one - other).abs().max() > 1e-5
