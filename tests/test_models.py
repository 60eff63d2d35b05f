"""The networks against diffusers and transformers with the same random weights, and what those do not check."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensors import noise, randomise, same

from tinydiff import config
from tinydiff.models.attention import pixels, tokens
from tinydiff.models.autoencoder import Autoencoder, mean_and_std
from tinydiff.models.layers import timestep_embedding
from tinydiff.models.text_encoder import TextEncoder
from tinydiff.models.unet import UNet

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


UNETS = {
    "linear": config.UNet((32, 64), (CROSS, CROSS), 1, 1, 4, 8, True),
    "convolution": config.UNet((32, 64, 64), (CROSS, CROSS, PLAIN), 2, 1, 8, 16, False),
    "deep": config.UNet((16, 32), (PLAIN, CROSS), 1, 2, 2, 8, True),
}


AUTOENCODERS = {
    "plain": config.Autoencoder((16, 32, 32), 1, 4, 8, False),
    "attention": config.Autoencoder((16, 32), 2, 3, 16, True),
}


TEXTS = {
    "quick": config.TextEncoder("clip", "", 600, 32, 64, 2, 4, 16, "quick_gelu"),
    "gelu": config.TextEncoder("clip", "", 600, 24, 48, 3, 3, 77, "gelu"),
}


BOS, EOS = 598, 599


def prompts(length: int) -> torch.Tensor:
    """Two prompts of different lengths, padded with EOS."""
    ids = torch.randint(0, BOS, (2, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[0, 5:], ids[1, 9:] = BOS, EOS, EOS
    return ids


def their_unet(cfg: config.UNet):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=cfg.down_block_types,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(cfg.down_block_types)),
        block_out_channels=cfg.block_out_channels,
        layers_per_block=cfg.layers_per_block,
        cross_attention_dim=24,
        attention_head_dim=cfg.attention_head_dim,
        norm_num_groups=cfg.norm_num_groups,
        use_linear_projection=cfg.use_linear_projection,
        transformer_layers_per_block=cfg.transformer_layers_per_block,
    )


def their_autoencoder(cfg: config.Autoencoder):
    from diffusers import AutoencoderKL

    n = len(cfg.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=cfg.block_out_channels,
        layers_per_block=cfg.layers_per_block,
        latent_channels=cfg.latent_channels,
        norm_num_groups=cfg.norm_num_groups,
        mid_block_add_attention=cfg.mid_block_add_attention,
    )


def their_text_encoder(cfg: config.TextEncoder):
    from transformers import CLIPTextConfig, CLIPTextModel

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    sizes = {name: getattr(cfg, name) for name in names}
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    return CLIPTextModel(CLIPTextConfig(vocab_size=600, hidden_act=cfg.hidden_act, **sizes, **ids))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet_is_that_of_diffusers(name):
    ours, theirs = UNet(UNETS[name], 4, 24), their_unet(UNETS[name]).eval()
    randomise(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, context = noise(2, 4, 8, 16), noise(2, 5, 24, seed=1)
    for t in (torch.tensor(37.0), torch.tensor([0.0, 999.0])):
        same(ours(x, t, context), theirs(x, t, context).sample)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_autoencoder_is_that_of_diffusers(name):
    cfg = AUTOENCODERS[name]
    ours, theirs = Autoencoder(cfg), their_autoencoder(cfg).eval()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = noise(2, 3, 24, 16)
    distribution = theirs.encode(x).latent_dist
    mean, std = mean_and_std(ours.encode(x))
    same(mean, distribution.mean)
    same(std, distribution.std)
    same(ours.decode(mean), theirs.decode(distribution.mean).sample)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_text_encoder_is_that_of_transformers(name):
    cfg = TEXTS[name]
    ours, theirs = TextEncoder(cfg, 600, EOS), their_text_encoder(cfg).eval()
    randomise(theirs)
    weights = theirs.state_dict()  # transformers 5 drops `text_model.`, which its files on the hub have
    ours.load_state_dict({f"text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items()}, strict=True)
    ids = prompts(cfg.max_position_embeddings)
    states, pooled = ours(ids)
    wanted = theirs(ids)
    same(states, wanted.last_hidden_state)
    same(pooled, wanted.pooler_output)


def test_time_is_sinusoids_cosines_first():
    t, half = np.array([0.0, 1.0, 999.0]), 8
    angles = t[:, None] / 10000 ** (np.arange(half) / half)
    wanted = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(timestep_embedding(torch.tensor(t), 16).numpy(), wanted, atol=2e-4)


@torch.no_grad()
def test_tokens_and_pixels_are_inverse():
    x = noise(2, 3, 4, 5)
    assert tokens(x).shape == (2, 20, 3) and tokens(x)[1, 7, 2] == x[1, 2, 1, 2]
    assert torch.equal(pixels(tokens(x), (4, 5)), x)


@torch.no_grad()
def test_unet_starts_as_nothing_and_its_residuals_too():
    unet = UNet(UNETS["linear"], 4, 24)
    assert unet(noise(2, 4, 8, 8), torch.tensor(3.0), noise(2, 5, 24)).abs().max() == 0


@torch.no_grad()
def test_the_unet_is_its_two_halves():
    """`up` takes what `down` gives; what is added to a skip reaches the output."""
    unet = UNet(UNETS["linear"], 4, 24)
    randomise(unet)
    sample, context, t = noise(2, 4, 8, 8), noise(2, 5, 24), torch.tensor([3.0, 500.0])
    time = unet.embedded(sample, t)
    x, skips = unet.down(sample, time, context)
    lowest = unet.mid_block(x, time, context)
    whole = unet(sample, t, context)
    assert torch.equal(unet.up(lowest, skips, time, context), whole)
    for i in range(len(skips)):
        controlled = [skip + 1 if k == i else skip for k, skip in enumerate(skips)]
        assert not torch.allclose(unet.up(lowest, controlled, time, context), whole)


def test_every_weight_learns():
    """No parameter is left out of the output: each gets a gradient, in every network."""
    unet, vae, text = (
        UNet(UNETS["deep"], 4, 32),
        Autoencoder(AUTOENCODERS["attention"]),
        TextEncoder(TEXTS["quick"], 600, EOS),
    )
    for part in (unet, vae, text):
        randomise(part)
    z = mean_and_std(vae.encode(noise(2, 3, 16, 16)))[0]
    context, pooled = text(prompts(16))
    output = unet(torch.cat([z, z[:, :1]], 1), torch.tensor([1.0, 500.0]), context)
    (vae.decode(output[:, :3]).square().sum() + mean_and_std(vae.encode(noise(2, 3, 16, 16)))[1].sum()).backward()
    silent = [n for part in (unet, vae, text) for n, p in part.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to every key moves all scores of a query alike, which softmax does not see.
    assert [n for n in silent if not n.endswith(("to_k.bias", "k_proj.bias"))] == []
    assert pooled.shape == (2, 32)


@torch.no_grad()
def test_a_scalar_time_is_that_time_for_all():
    unet = UNet(UNETS["linear"], 4, 24)
    randomise(unet)
    x, context = noise(3, 4, 8, 8), noise(3, 5, 24)
    torch.testing.assert_close(unet(x, torch.tensor(7.0), context), unet(x, torch.full((3,), 7.0), context))
    assert (unet(x, torch.tensor(8.0), context) - unet(x, torch.tensor(7.0), context)).abs().max() > 1e-4


@torch.no_grad()
def test_text_encoder_never_looks_ahead():
    text = TextEncoder(TEXTS["quick"], 600, EOS)
    randomise(text)
    ids = prompts(16)
    other = ids.clone()
    other[:, 4] = 7
    before, after = text(ids)[0], text(other)[0]
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-6)
    assert (before[:, 4] - after[:, 4]).abs().max() > 1e-3


@torch.no_grad()
def test_a_word_starts_out_as_most_of_its_own_vector():
    torch.manual_seed(0)
    text = TextEncoder(config.TextEncoder(), 600, EOS)
    ids, other = torch.randint(0, 500, (2, 64, 16))
    other[:, :5], other[:, 6:] = ids[:, :5], ids[:, 6:]
    before, after = text(ids)[0], text(other)[0]
    change = ((before - after) ** 2).mean((0, 2)) / (2 * before.var(0).mean())  # 1: as unlike as two captions
    assert change[5] > 0.7


@torch.no_grad()
def test_text_encoder_pools_at_the_first_end():
    text = TextEncoder(TEXTS["quick"], 600, EOS)
    randomise(text)
    states, pooled = text(prompts(16))
    assert torch.equal(pooled, torch.stack([states[0, 5], states[1, 9]]))


def test_log_variance_is_clamped():
    moments = torch.tensor([0.5, -100.0]).reshape(1, 2, 1, 1), torch.tensor([0.5, 100.0]).reshape(1, 2, 1, 1)
    stds = [mean_and_std(m)[1].item() for m in moments]
    assert stds == pytest.approx([math.exp(-15), math.exp(10)])
    mean, std = mean_and_std(torch.tensor([0.5, math.log(4.0)]).reshape(1, 2, 1, 1))
    assert (mean.item(), std.item()) == pytest.approx((0.5, 2.0))
