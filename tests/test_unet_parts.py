"""The parts of a U-Net against what their formulas say, written out, and against diffusers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensors import noise, randomise, same
from torch import nn
from torch.nn import functional as F

from tinydiff import config
from tinydiff.checkpoints import single_file
from tinydiff.checkpoints.folder import network_of
from tinydiff.errors import ModelError
from tinydiff.models.layers import NORMS, BatchNorm2d, timestep_embedding
from tinydiff.models.modulation import LEVELS, MODULATIONS, TIMES
from tinydiff.models.residual import RESNETS, Parts, SpatialChannel, Squeeze
from tinydiff.models.skips import CONTEXTS, MERGES
from tinydiff.models.unet import UNet
from tinydiff.networks.unet import UNet as Settings
from tinydiff.networks.unet import UNetNetwork, plan

C, TIME = 16, 24
GROUP = partial(NORMS["group"], 4, 1e-5)
SETTINGS = Settings((32, 64), ("DownBlock2D", "CrossAttnDownBlock2D"), 1, 1, 4, 32, True)


def block(**parts):
    made = RESNETS[parts.pop("resnet", "pre")](C, C, Parts(GROUP, TIME)._replace(**parts))
    randomise(made)
    return made


def standard(x: torch.Tensor, over: tuple[int, ...]) -> torch.Tensor:
    mean = x.mean(over, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(over, keepdim=True).add(1e-5).sqrt()


def grouped(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    y = standard(x.reshape(len(x), 4, -1), (2,)).reshape(x.shape)
    return y * norm.weight[:, None, None] + norm.bias[:, None, None]  # type: ignore[index]


@pytest.mark.parametrize("name", ["film", "adain", "concat", "add"])
@torch.no_grad()
def test_time_modulates_by_the_formula(name):
    made, x, time = block(modulation=MODULATIONS[name]), noise(2, C, 5, 7), noise(2, TIME, seed=1)
    h = made.conv1(F.silu(grouped(x, made.norm1)))
    told = made.time_emb_proj.weight @ F.silu(time).T + made.time_emb_proj.bias[:, None]  # (N, B)
    told = told.T[:, :, None, None]
    if name == "film":
        h = (1 + told[:, :C]) * grouped(h, made.norm2) + told[:, C:]
    elif name == "adain":
        h = (1 + told[:, :C]) * standard(h, (2, 3)) + told[:, C:]
    elif name == "concat":
        h = torch.cat([grouped(h, made.norm2), told * torch.ones(2, C // 4, 5, 7)], 1)
    else:
        h = grouped(h + told, made.norm2)
    same(made(x, time), x + made.conv2(F.silu(h)))


@torch.no_grad()
def test_time_is_read_by_attention():
    made, x, time = block(modulation=MODULATIONS["attention"]), noise(2, C, 3, 4), noise(2, TIME, seed=1)
    h = grouped(made.conv1(F.silu(grouped(x, made.norm1))), made.norm2.norm)
    tokens = made.time_emb_proj(F.silu(time)).reshape(2, 4, C // 4)
    attention, wanted = made.norm2.attention, h.clone()
    for b, i, j in ((b, i, j) for b in range(2) for i in range(3) for j in range(4)):
        q, k, v = attention.to_q(h[b, :, i, j]), attention.to_k(tokens[b]), attention.to_v(tokens[b])
        wanted[b, :, i, j] += attention.to_out[0]((k @ q / C**0.5).softmax(0) @ v)
    same(made(x, time), x + made.conv2(F.silu(wanted)))


@torch.no_grad()
def test_norms_are_their_formulas():
    x = noise(3, C, 4, 5)
    layer, batch, rms = (NORMS[name](4, 1e-5, C) for name in ("layer", "batch", "rms"))
    same(layer(x), standard(x, (1, 2, 3)))
    same(batch.train()(x), standard(x, (0, 2, 3)))
    same(rms(x), x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt())


def test_a_checkpoint_that_computes_again_is_no_second_batch():
    from torch.utils.checkpoint import checkpoint

    plain, again = BatchNorm2d(C), BatchNorm2d(C)
    x = noise(3, C, 4, 5).requires_grad_()
    plain(x).square().mul(x).sum().backward()
    wanted, x.grad = x.grad, None
    checkpoint(again, x, use_reentrant=False).square().mul(x).sum().backward()  # type: ignore[union-attr]
    assert torch.equal(x.grad, wanted) and torch.equal(plain.running_var, again.running_var)  # type: ignore[arg-type]
    assert again.num_batches_tracked == 1


@torch.no_grad()
def test_channels_are_weighed_by_the_formula():
    x = noise(2, C, 5, 6)
    for kind in (Squeeze, SpatialChannel):
        made = kind(C)
        randomise(made)
        y = x
        if kind is SpatialChannel:
            y = x * torch.sigmoid(made.place(torch.stack([x.mean(1), x.max(1).values], 1)))
        z = y.sum((2, 3)) / 30
        s = (
            torch.relu(z @ made.down.weight[:, :, 0, 0].T + made.down.bias) @ made.up.weight[:, :, 0, 0].T
            + made.up.bias
        )
        same(made(x), y * (1 / (1 + torch.exp(-s)))[:, :, None, None])


@torch.no_grad()
def test_skips_merge_by_the_formula():
    x, skip, read = noise(2, C, 3, 4), noise(2, C, 3, 4, seed=1), [noise(2, 5, 3, 4, seed=2), noise(2, 7, 3, 4, seed=3)]
    gated, wanted = MERGES["gated"](C, C), torch.empty(2, C, 3, 4)
    randomise(gated)
    for b, i, j in ((b, i, j) for b in range(2) for i in range(3) for j in range(4)):
        f, other = x[b, :, i, j], skip[b, :, i, j]
        g = torch.sigmoid(gated.gate.weight[:, :, 0, 0] @ torch.cat([f, other]) + gated.gate.bias)
        wanted[b, :, i, j] = g * f + (1 - g) * other
    same(gated(x, skip, read), wanted)
    same(MERGES["add"](C, C)(x, skip, read), x + skip)
    assert torch.equal(MERGES["dense"](C, C)(x, skip, read), torch.cat([x, skip, *read], 1))


@torch.no_grad()
def test_a_dense_decoder_reads_all_that_its_level_had():
    unet = UNet(Settings(**{**vars(SETTINGS), "skips": "dense", "layers_per_block": 2}), 4, 24)
    randomise(unet)
    given: list[torch.Tensor] = []
    block = unet.up_blocks[0]
    for resnet in block.resnets:  # type: ignore[union-attr]
        resnet.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    skips, x = [noise(2, 32, 4, 4, seed=5), *(noise(2, 64, 4, 4, seed=i) for i in (6, 7))], noise(2, 64, 4, 4)
    block(x, skips, noise(2, 128), noise(2, 5, 24))
    first, second, third = given
    assert torch.equal(first, torch.cat([x, skips[2]], 1))
    assert torch.equal(second[:, 64:], torch.cat([skips[1], first], 1))
    assert torch.equal(third[:, 64:], torch.cat([skips[0], second], 1))
    assert [c for c, _ in plan(Settings(**{**vars(SETTINGS), "skips": "dense"}))[1].up] == [128, 224]


@torch.no_grad()
def test_contexts_are_their_formulas():
    levels, x = plan(SETTINGS), noise(2, 64, 4, 6)
    shapes = (32, 8, 12), (32, 8, 12), (32, 4, 6), (64, 4, 6)
    skips = [noise(2, *shape, seed=i) for i, shape in enumerate(shapes)]
    aspp, pyramid = (CONTEXTS[name](levels, partial(NORMS["group"], 32, 1e-5)) for name in ("aspp", "pyramid"))
    randomise(aspp)
    randomise(pyramid)
    h, scales = F.silu(aspp.norm(x)), []
    for layer, rate in zip(aspp.branches, (0, 2, 4, 8), strict=True):
        wide, out = F.pad(h, (rate,) * 4), torch.zeros(2, 16, 4, 6) + layer.bias[:, None, None]
        taps = [(a, b) for a in range(3) for b in range(3)] if rate else [(0, 0)]
        for a, b in taps:
            kernel = layer.weight[:, :, a, b]
            top, left = a * rate, b * rate
            out = out + torch.einsum("oc,bchw->bohw", kernel, wide[:, :, top : top + 4, left : left + 6])
        scales.append(out)
    whole = torch.einsum("oc,bc->bo", aspp.pooled.weight[:, :, 0, 0], h.mean((2, 3))) + aspp.pooled.bias
    scales.append(whole[:, :, None, None].expand(-1, -1, 4, 6))
    same(aspp(x, skips)[0], x + aspp.project(F.silu(torch.cat(scales, 1))))
    coarse = pyramid.lateral[2](x) + pyramid.lateral[1](skips[3])
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3) + pyramid.lateral[0](skips[1])
    _, changed = pyramid(x, skips)
    same(changed[3], skips[3] + pyramid.smooth[1](coarse))
    same(changed[1], skips[1] + pyramid.smooth[0](fine))
    assert changed[0] is skips[0] and changed[2] is skips[2]


@torch.no_grad()
def test_noise_levels_become_vectors_by_the_formula():
    t, like = torch.tensor([0.0, 12.25, 999.0]), torch.zeros(1)
    learned, hybrid = TIMES["learned"](8), TIMES["hybrid"](8)
    randomise(learned)
    randomise(hybrid)
    E = learned.table.weight
    rows = torch.stack([E[0], 0.75 * E[12] + 0.25 * E[13], E[LEVELS - 1]])
    same(learned(t, like), learned.linear_2(F.silu(learned.linear_1(rows))))
    waves = timestep_embedding(t, 32)
    same(hybrid(t, like), waves + hybrid.linear_2(F.silu(hybrid.linear_1(waves))))


def weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 4)


def test_parameters_are_as_many_as_the_formulas_say():
    """Of C channels: 18 C^2, (1/4 + 9/16 + 1/4) C^2 where the middle is narrow, and 9 C + C^2 a separable convolution."""
    made = {name: RESNETS[name](64, 64, Parts(partial(NORMS["group"], 16, 1e-5))) for name in RESNETS}
    assert weights(made["pre"]) == weights(made["post"]) == weights(made["dilated"]) == 18 * 64**2
    assert weights(made["bottleneck"]) == (1 / 4 + 9 / 16 + 1 / 4) * 64**2
    assert weights(made["separable"]) == 2 * (9 * 64 + 64**2)


@torch.no_grad()
def test_a_post_activation_block_is_its_formula():
    made, x, time = block(resnet="post"), noise(2, C, 5, 7), noise(2, TIME, seed=1)
    h = made.conv1(x) + made.time_emb_proj(F.silu(time))[:, :, None, None]
    h = grouped(made.conv2(F.silu(grouped(h, made.norm1))), made.norm2)
    same(made(x, time), F.silu(h + x))


def test_dilation_doubles_by_level():
    unet = UNet(Settings(**{**vars(SETTINGS), "resnet": "dilated"}), 4, 24)
    rates = {name: m.dilation[0] for name, m in unet.named_modules() if isinstance(m, nn.Conv2d) and ".conv1" in name}
    assert {name: rate for name, rate in rates.items() if rate == 1} == {
        name: 1 for name in rates if name.startswith(("down_blocks.0", "up_blocks.1"))
    }
    assert set(rates.values()) == {1, 2}


@torch.no_grad()
def test_a_transformer_middle_has_long_skips():
    """The last transformers are given what the first gave, the nearest first."""
    unet = UNet(Settings(**{**vars(SETTINGS), "middle": "transformer", "middle_layers": 5}), 4, 24)
    middle = unet.mid_block
    randomise(middle)
    x, time, context = noise(2, 64, 4, 4), noise(2, 128), noise(2, 5, 24)
    h = middle.resnets[0](x, time)
    a = middle.attentions[0](h, context)
    b = middle.attentions[1](a, context)
    c = middle.attentions[2](b, context)
    d = middle.attentions[3](middle.merges[0](torch.cat([c, b], 1)), context)
    e = middle.attentions[4](middle.merges[1](torch.cat([d, a], 1)), context)
    same(middle(x, time, context), middle.resnets[1](e, time))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_film_is_the_scale_shift_of_diffusers_in_both_directions():
    from diffusers import UNet2DConditionModel

    cfg = config.make(unet=Settings(**{**vars(SETTINGS), "modulation": "film"}))
    table = UNetNetwork().describe(cfg, {"last_hidden_state": 24})
    assert table["resnet_time_scale_shift"] == "scale_shift" and "modulation" not in table
    assert cfg.denoiser_network.pipeline(cfg)[0] == "StableDiffusionPipeline"
    theirs = UNet2DConditionModel.from_config(table).eval()
    randomise(theirs)
    ours = network_of("unet", {}).build(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, context = noise(2, 4, 8, 16), noise(2, 5, 24, seed=1)
    same(ours(x, torch.tensor(37.0), context), theirs(x, torch.tensor(37.0), context).sample)


EXCLUDED = {
    ("norm_num_groups: 8", "norm is layer"): {"norm": "layer", "norm_num_groups": 8},
    ("resnet: bottleneck", "block_out_channels has 66"): {
        "resnet": "bottleneck",
        "block_out_channels": (32, 66),
        "norm_num_groups": 2,
    },
    ("middle_layers: 6", "middle is block"): {"middle_layers": 6},
}


@pytest.mark.parametrize("said", EXCLUDED)
def test_options_that_exclude_each_other_are_both_named(said):
    lines = list(UNetNetwork().misfits(vars(Settings(**{**vars(SETTINGS), **EXCLUDED[said]}))))
    assert any(all(each in line for each in said) for line in lines)
    scaled = {**vars(SETTINGS), "modulation": "adain", "resnet_time_scale_shift": "scale_shift"}
    assert any(
        "modulation: adain" in line and "resnet_time_scale_shift" in line for line in UNetNetwork().misfits(scaled)
    )


@pytest.mark.parametrize(("key", "value"), [("norm", "layer"), ("modulation", "film"), ("skips", "add")])
def test_a_single_file_is_refused_what_it_cannot_say(key, value, tiny_sd, tmp_path):
    model = tiny_sd["clip"]
    configs = model.configs | {"unet": model.configs["unet"] | {key: value}}
    with pytest.raises(ModelError, match=f"its unet has {key} "):
        single_file.write(tmp_path / "a.safetensors", model.parts, configs)
    assert not list(tmp_path.iterdir())
