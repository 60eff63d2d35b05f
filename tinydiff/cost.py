"""Floating-point operations of a model's networks in closed form, from their `config.json` alone and without torch.

A multiply-add is two operations. Convolutions, linear layers and the two matrix products of attention are counted;
biases, norms, activations, softmax and sums are not. Each network is one function, which goes through the layers in the order
of its namesake in `models/`. It knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from tinydiff.checkpoints.foreign import DEFAULTS

CROSS = "CrossAttnDownBlock2D"
FREQUENCIES = 256  # a DiT's sines and cosines of time
T5 = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu"}


def flops(found: Mapping[str, dict[str, Any]], h: int, w: int, tokens: int) -> dict[str, int | None]:
    """{"denoiser", "decoder", "text"} of one image: one call without guidance, the decoding, the reading of one prompt.

    `found` is what `description.configs` reads; latents are `h` x `w`, the prompt is of `tokens`. None for a network that
    the model does not have. Raises KeyError, TypeError or ValueError where a configuration lacks a size or misstates it.
    """
    defaults = DEFAULTS | {"text_encoder": T5}  # none of whose keys is CLIP's
    known = {name: defaults.get(name, {}) | {k: v for k, v in c.items() if v is not None} for name, c in found.items()}
    denoiser = unet(known["unet"], h, w, tokens) if "unet" in known else dit(known["transformer"], h, w, tokens)
    text = known.get("text_encoder")
    read = (t5 if text.get("model_type") == "t5" else clip)(text, tokens) if text else None
    return {"denoiser": denoiser, "decoder": decoder(known["vae"], h, w) if "vae" in known else None, "text": read}


# ---- layers ------------------------------------------------------------------------------------------------------------


def linear(width: int, out: int, n: int = 1) -> int:
    """A matrix on `n` vectors."""
    return 2 * width * out * n


def conv(channels: int, out: int, pixels: int, kernel: int = 3) -> int:
    """A convolution that makes `pixels`."""
    return linear(channels * kernel**2, out, pixels)


def attention(width: int, n: int, context: int | None = None, m: int = 0, inner: int | None = None) -> int:
    """Multi-head attention of `n` tokens to `m` of width `context`, or to themselves; `inner` is that of all heads."""
    inner, context, m = inner or width, context or width, m if context else n
    return 2 * linear(width, inner, n) + 2 * linear(context, inner, m) + 2 * linear(inner, n, m)


def resnet(channels: int, out: int, pixels: int, time: int = 0) -> int:
    shortcut = conv(channels, out, pixels, 1) if channels != out else 0
    return conv(channels, out, pixels) + linear(time, out) + conv(out, out, pixels) + shortcut


def transformer(channels: int, n: int, depth: int, context: int, m: int) -> int:
    """A way in, blocks of self-attention, cross-attention and GEGLU, a way out."""
    perceptron = linear(channels, 8 * channels, n) + linear(4 * channels, channels, n)
    block = attention(channels, n) + attention(channels, n, context, m) + perceptron
    return 2 * linear(channels, channels, n) + depth * block


# ---- networks ----------------------------------------------------------------------------------------------------------


def unet(c: Mapping[str, Any], h: int, w: int, tokens: int) -> int:
    """One image's call of the U-Net on latents (h, w)."""
    widths, n, time = c["block_out_channels"], c["layers_per_block"], c["block_out_channels"][0] * 4
    pixels = [(h >> i) * (w >> i) for i in range(len(widths))]

    def layer(i: int, channels: int, cross: bool) -> int:
        text = c["transformer_layers_per_block"], c["cross_attention_dim"], tokens
        return resnet(channels, widths[i], pixels[i], time) + cross * transformer(widths[i], pixels[i], *text)

    crosses = [kind == CROSS for kind in c["down_block_types"]]
    total = linear(widths[0], time) + linear(time, time) + conv(c["in_channels"], widths[0], pixels[0])
    skips, x = [widths[0]], widths[0]
    for i, width in enumerate(widths):
        total += layer(i, x, crosses[i]) + (n - 1) * layer(i, width, crosses[i])
        skips, x = skips + [width] * n, width
        if i < len(widths) - 1:
            total += conv(width, width, pixels[i + 1])
            skips.append(width)
    total += layer(-1, x, True) + layer(-1, x, False)
    for i in reversed(range(len(widths))):
        for _ in range(n + 1):
            total, x = total + layer(i, x + skips.pop(), crosses[i]), widths[i]
        total += conv(x, x, pixels[i - 1]) if i > 0 else 0
    return total + conv(x, c["out_channels"], pixels[0])


def dit(c: Mapping[str, Any], h: int, w: int, tokens: int) -> int:
    """One image's call of the DiT on latents (h, w).

    Time and class are embedded once, as where blocks share that; only the weights tell whether each embeds them for itself.
    """
    width, patch, context = (
        c["num_attention_heads"] * c["attention_head_dim"],
        c["patch_size"],
        c.get("cross_attention_dim"),
    )
    n, outputs = h // patch * (w // patch), c.get("out_channels") or c["in_channels"]
    classes = 0 if context else c["num_embeds_ada_norm"] + 1
    block = linear(width, 6 * width) + attention(width, n) + 2 * linear(width, 4 * width, n)
    block += attention(width, n, context, tokens) if context else 0
    embedding = linear(FREQUENCIES, width) + linear(width, width) + linear(classes, width)
    out = linear(width, 2 * width) + linear(width, patch**2 * outputs, n)
    return conv(c["in_channels"], width, n, patch) + embedding + c["num_layers"] * block + out


def decoder(c: Mapping[str, Any], h: int, w: int) -> int:
    """Latents (h, w) to an image."""
    widths, latent = c["block_out_channels"][::-1], c["latent_channels"]
    x, pixels = widths[0], h * w
    total = conv(latent, latent, pixels, 1) + conv(latent, x, pixels) + 2 * resnet(x, x, pixels)
    total += attention(x, pixels) if c["mid_block_add_attention"] else 0
    for i, (before, width) in enumerate(pairwise((x, *widths))):
        total += resnet(before, width, pixels) + c["layers_per_block"] * resnet(width, width, pixels)
        if i < len(widths) - 1:
            pixels *= 4
            total += conv(width, width, pixels)
    return total + conv(widths[-1], 3, pixels)


def clip(c: Mapping[str, Any], n: int) -> int:
    """`n` tokens through CLIP's text tower."""
    return c["num_hidden_layers"] * (
        attention(c["hidden_size"], n) + 2 * linear(c["hidden_size"], c["intermediate_size"], n)
    )


def t5(c: Mapping[str, Any], n: int) -> int:
    """`n` tokens through T5's encoder."""
    matrices = 3 if c["feed_forward_proj"].startswith("gated") else 2
    block = attention(c["d_model"], n, inner=c["num_heads"] * c["d_kv"]) + matrices * linear(c["d_model"], c["d_ff"], n)
    return c["num_layers"] * block
