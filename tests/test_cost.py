"""Operations by formula against torch's own count of what the networks do on the meta device, and against papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinydiff import config, cost
from tinydiff.checkpoints import folder
from tinydiff.models.autoencoder import Autoencoder
from tinydiff.models.dit import Condition, DiT
from tinydiff.models.t5 import T5Config, T5Encoder
from tinydiff.models.text_encoder import TextEncoder
from tinydiff.models.unet import UNet

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
SD = (320, 640, 1280, 1280), (CROSS,) * 3 + (PLAIN,), 2, 1
DENOISERS = {
    "one level": (config.Denoiser("unet", (8,), (CROSS,), 1, 1, 2, 4, True), 3, 5),
    "no text above": (config.Denoiser("unet", (8, 16, 24), (PLAIN, CROSS, PLAIN), 1, 2, 2, 4, False), 4, 7),
    "three layers": (config.Denoiser("unet", (8, 8, 16), (CROSS, PLAIN, CROSS), 3, 1, 2, 4, True), 4, 6),
}


def counted(call: Callable[[], Any]) -> int:
    """What torch counts in a call on the meta device, where nothing is computed."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def count_unet(cfg: config.Denoiser, channels: int, extra: int, context: int, h: int, w: int, tokens: int) -> int:
    with torch.device("meta"):
        net = UNet(cfg, channels, context, extra)
    return counted(lambda: net(torch.empty(1, channels + extra, h, w), torch.empty(1), torch.empty(1, tokens, context)))


def unet_config(cfg: config.Denoiser, channels: int, extra: int, context: int) -> dict[str, Any]:
    sizes = {"in_channels": channels + extra, "out_channels": channels, "cross_attention_dim": context}
    return folder.settings(cfg) | sizes


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("name", DENOISERS)
def test_a_unet_is_what_torch_counts(name: str, extra: int) -> None:
    cfg, channels, context = DENOISERS[name]
    for h, w, tokens in ((8, 8, 7), (4, 12, 1)):
        wanted = count_unet(cfg, channels, extra, context, h, w, tokens)
        assert cost.unet(unet_config(cfg, channels, extra, context), h, w, tokens) == wanted


@pytest.mark.parametrize(
    ("context", "heads", "linear", "side"), [(768, 8, False, 64), (1024, (5, 10, 20, 20), True, 96)], ids=["1.5", "2.1"]
)
def test_stable_diffusion_is_what_torch_counts(context: int, heads: Any, linear: bool, side: int) -> None:
    cfg = config.Denoiser("unet", *SD, heads, 32, linear)
    found = {"unet": unet_config(cfg, 4, 0, context), "vae": {"block_out_channels": [128, 256, 512, 512]}}
    found["vae"] |= {"layers_per_block": 2, "latent_channels": 4}
    found["text_encoder"] = {"hidden_size": context, "intermediate_size": 4 * context, "num_hidden_layers": 12}
    with torch.device("meta"):
        vae = Autoencoder(config.Autoencoder((128, 256, 512, 512), 2, 4, 32, True))
        text = TextEncoder(config.TextEncoder("clip", "", 49408, context, 4 * context, 12, 8, 77), 49408, 49407)
    assert cost.flops(found, side, side, 77) == {
        "denoiser": count_unet(cfg, 4, 0, context, side, side, 77),
        "decoder": counted(lambda: vae.decode(torch.empty(1, 4, side, side))),
        "text": counted(lambda: text(torch.empty(1, 77, dtype=torch.int64))),
    }


def dit_config(cfg: config.DiT, channels: int, **more: Any) -> dict[str, Any]:
    layers, heads, head = cfg.shape
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head}
    return sizes | {"patch_size": cfg.patch_size, "in_channels": channels} | more


def count_dit(net: DiT, h: int, w: int, *condition: int) -> int:
    return counted(lambda: net(torch.empty(1, net.channels, h, w), torch.empty(1), torch.empty(1, *condition)))


@pytest.mark.parametrize("patch", [2, 4])
def test_a_dit_is_what_torch_counts(patch: int) -> None:
    cfg = config.DiT("custom", patch, 3, 2, 12)
    with torch.device("meta"):
        by_class = DiT(cfg, 3, 8, classes=11, learned_sigma=True)
        by_text = DiT(cfg, 4, 8, context_dim=10)
    labelled = dit_config(cfg, 3, num_embeds_ada_norm=11, out_channels=6)
    written = dit_config(cfg, 4, num_embeds_ada_norm=1, cross_attention_dim=10)
    for h, w in ((8, 8), (4, 16)):
        assert cost.dit(labelled, h, w, 1) == count_dit(by_class, h, w, 1, 12)
        assert cost.dit(written, h, w, 7) == count_dit(by_text, h, w, 7, 10)


def test_blocks_that_embed_time_and_class_each_for_itself_cost_that_more() -> None:
    cfg = config.DiT("custom", 2, 3, 2, 12)
    with torch.device("meta"):
        net, embedding = DiT(cfg, 3, 8, classes=11, shared=False), Condition(24, 11)
    again = counted(lambda: embedding(torch.empty(1, 256), torch.empty(1, 1, 12)))
    more = count_dit(net, 8, 8, 1, 12) - cost.dit(dit_config(cfg, 3, num_embeds_ada_norm=11), 8, 8, 1)
    assert more in (2 * again, 3 * again)  # the output layer may embed anew what the first block does


@pytest.mark.parametrize(
    ("size", "patch", "side", "gflops"),
    [("XL", 2, 32, 118.6), ("XL", 2, 64, 524.6), ("L", 4, 32, 19.7), ("B", 2, 32, 23.0), ("S", 8, 32, 0.36)],
)
def test_dits_cost_what_the_paper_says(size: str, patch: int, side: int, gflops: float) -> None:
    """Peebles & Xie 2023, tables 4 and 6, where a multiply-add is one operation."""
    found = dit_config(config.DiT(size, patch), 4, out_channels=8, num_embeds_ada_norm=1000)
    assert cost.dit(found, side, side, 1) / 2e9 == pytest.approx(gflops, rel=0.01)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(("widths", "layers"), [((8,), 1), ((8, 16, 16), 2), ((16, 8), 3)])
def test_a_decoder_is_what_torch_counts(widths: tuple[int, ...], layers: int, attention: bool) -> None:
    cfg = config.Autoencoder(widths, layers, 3, 4, attention)
    with torch.device("meta"):
        net = Autoencoder(cfg)
    assert cost.decoder(vars(cfg), 4, 6) == counted(lambda: net.decode(torch.empty(1, 3, 4, 6)))


def test_a_clip_tower_is_what_torch_counts() -> None:
    cfg = config.TextEncoder("clip", "", 600, 16, 40, 3, 2, 9)
    with torch.device("meta"):
        net = TextEncoder(cfg, 600, 599)
    assert cost.clip(vars(cfg), 9) == counted(lambda: net(torch.empty(1, 9, dtype=torch.int64)))


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_a_t5_encoder_is_what_torch_counts(kind: str) -> None:
    cfg = T5Config(99, 24, 5, 40, 3, 4, 8, 20, feed_forward_proj=kind)
    with torch.device("meta"):
        net = T5Encoder(cfg)
    found = {"text_encoder": vars(cfg) | {"model_type": "t5"}, "transformer": dit_config(config.DiT(), 4)}
    assert cost.flops(found, 8, 8, 13)["text"] == counted(lambda: net(torch.empty(1, 13, dtype=torch.int64)))


def test_an_older_configuration_means_what_it_means_when_opened() -> None:
    """The networks that `folder` builds of a config.json without a key are those that are counted."""
    older = {"cross_attention_dim": 768}
    whole = unet_config(folder.known(config.Denoiser, "unet", older), 4, 0, 768)
    known = [cost.flops({"unet": found}, 8, 8, 77) for found in (older, whole)]
    assert known[0] == known[1]
    vae = {"block_out_channels": (8, 16)}
    opened = folder.known(config.Autoencoder, "vae", vae)
    assert cost.DEFAULTS["vae"] | vae == {key: vars(opened)[key] for key in cost.DEFAULTS["vae"] | vae}
    assert cost.T5.items() <= vars(T5Config()).items()


def test_what_a_model_lacks_costs_nothing_and_what_a_configuration_lacks_is_told() -> None:
    found = cost.flops({"transformer": dit_config(config.DiT(), 4)}, 8, 8, 1)
    assert found["denoiser"] and found["decoder"] is None and found["text"] is None
    with pytest.raises(KeyError, match="cross_attention_dim"):
        cost.flops({"unet": {}}, 8, 8, 77)
