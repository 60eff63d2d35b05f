"""The diffusion transformer with adaLN-Zero (Peebles & Xie 2023), under diffusers' parameter names.

`forward(sample (B, C, h, w), timestep () or (B,), encoder_hidden_states) -> (B, C, h, w)`. What it is conditioned on besides
time is one of two: a class, as (B, 1, classes + 1) rows of weights that sum to one (one-hot, or a mixture; the last is the
null label of guidance), or text vectors (B, T, context_dim), which every block attends to. It does not know where weights
come from: the layout of the published files is in `checkpoints/dit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.attention import Attention, FeedForward, tokens
from tinydiff.models.layers import TimestepEmbedding, embedding, timestep_embedding
from tinydiff.networks.dit import DiT as Config
from tinydiff.networks.dit import DiTNetwork, is_shared
from tinydiff.networks.network import Table

FREQUENCIES = 256  # sines and cosines of time, at any width
NOTHING = ("norm1.linear", "attn2.to_out", "proj_out_")  # attention to the text has no gate, so its own output is zero
SMALL = ("timestep_embedder", "embedding_table")


def positions(h: int, w: int, base: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of each token's column, then of its row: (h w, width) float32."""
    rates = 10000 ** (torch.arange(width // 4, dtype=torch.float32, device=device) * (-4 / width))

    def along(n: int) -> Tensor:
        # The size is read off the numbers themselves: as a float it would be copied to the card in every call of a graph.
        places = torch.arange(n, device=device).float()
        places = places / ((places[-1:] + 1) / base)  # on the square that was trained on
        angles = places[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (n, D/2)

    columns, rows = along(w)[None].expand(h, w, -1), along(h)[:, None].expand(h, w, -1)  # (h, w, D/2)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)  # (h w, D)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class PatchEmbed(nn.Module):
    """Patches as tokens that know their place: (B, C, h, w) -> (B, T, D). Positions of a smaller `width` are repeated."""

    def __init__(self, channels: int, dim: int, patch: int, side: int, width: int = 0):
        super().__init__()
        self.base, self.width = side // patch, width or dim
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)  # (B, D, h/p, w/p)
        place = positions(x.shape[2], x.shape[3], self.base, self.width, x.device)
        place = place if self.width == x.shape[1] else place.repeat_interleave(x.shape[1] // self.width, 1)
        return tokens(x).contiguous() + place.to(x.dtype)  # every block keeps this order of memory


class LabelEmbedding(nn.Module):
    """One vector a class: weights (B, 1, classes + 1) -> (B, D)."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.embedding_table = embedding(classes + 1, dim)

    def forward(self, weights: Tensor) -> Tensor:
        return weights[:, 0] @ self.embedding_table.weight


class Condition(nn.Module):
    """Time, and the class where there are classes, as one vector: (B, FREQUENCIES) -> (B, D)."""

    divided_alone = True  # blocks share it and call it nowhere, so that FSDP has to divide it as a unit of its own

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(FREQUENCIES, dim)
        self.class_embedder = LabelEmbedding(classes, dim) if classes else None

    def forward(self, waves: Tensor, context: Tensor) -> Tensor:
        c = self.timestep_embedder(waves)
        return F.silu(c if self.class_embedder is None else c + self.class_embedder(context))


class AdaLayerNormZero(nn.Module):
    """Layer norm shifted and scaled by c (B, D), and what else c says of the block: two gates, a second shift and scale."""

    def __init__(self, dim: int, emb: Condition):
        super().__init__()
        self.emb = emb
        self.linear = nn.Linear(dim, dim * 6)
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        shift, scale, *rest = self.linear(c)[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        return modulate(self.norm(x), shift, scale), *rest


class DiTBlock(nn.Module):
    """Self-attention, cross-attention where there is text, perceptron: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, heads: int, context_dim: int | None, eps: float, emb: Condition, qk_norm: bool):
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim, emb)
        self.attn1 = Attention(dim, heads, qkv_bias=True, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.attn2 = None if context_dim is None else Attention(dim, heads, context_dim, True, qk_norm)
        self.norm3 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ff = FeedForward(dim, "gelu-approximate")

    def forward(self, x: Tensor, c: Tensor, context: Tensor) -> Tensor:
        y, gate, shift, scale, gate2 = self.norm1(x, c)
        x = x + gate * self.attn1(y)
        if self.attn2 is not None:
            x = x + self.attn2(self.norm2(x), context)
        return x + gate2 * self.ff(modulate(self.norm3(x), shift, scale))

    def share(self, processes: int) -> dict[str, str]:
        """Leaves this process its part of the attention heads; the matrices that are then to be divided, and by what."""
        plan = {"ff.net.0.proj": "columns", "ff.net.2": "rows"}
        for name, attention in (("attn1", self.attn1), ("attn2", self.attn2)):
            if attention is not None:
                attention.heads //= processes
                plan |= {f"{name}.to_{x}": "columns" for x in "qkv"} | {f"{name}.to_out.0": "rows"}
        return plan


class DiT(nn.Module):
    """Denoiser over latents of `channels` channels, trained at `side` x `side`, conditioned on a class or on text.

    `learned_sigma`: the weights also predict a variance, which `forward` leaves out. `shared`: all blocks embed time and
    class by the same weights, which are computed once. `norm_eps` and `freq_shift` are those of diffusers.
    """

    def __init__(
        self,
        config: Config,
        channels: int,
        side: int,
        classes: int = 0,
        context_dim: int | None = None,
        learned_sigma: bool = False,
        shared: bool = True,
        norm_eps: float = 1e-5,
        freq_shift: int = 1,
    ):
        super().__init__()
        assert (classes > 0) != (context_dim is not None), "conditioned on classes or on text"
        depth, heads, width = config.shape
        dim, patch, outputs = heads * width, config.patch_size, channels * (1 + learned_sigma)
        self.channels, self.patch, self.shared, self.freq_shift = channels, patch, shared, freq_shift
        self.pos_embed = PatchEmbed(channels, dim, patch, config.position_side or side, config.position_width)
        embs = [Condition(dim, classes)] * depth if shared else [Condition(dim, classes) for _ in range(depth)]
        blocks = [DiTBlock(dim, heads, context_dim, norm_eps, emb, config.qk_norm) for emb in embs]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(dim, dim * 2)
        self.proj_out_2 = nn.Linear(dim, patch * patch * outputs)
        if not self.proj_out_1.weight.is_meta:
            initialise(self)

    @classmethod
    def of(cls, table: Table, tensors: Mapping[str, Tensor] | None = None) -> DiT:
        """The network of a `config.json`. `tensors` that are to be its weights tell whether its blocks share an embedding."""
        channels = table["in_channels"]
        return cls(
            DiTNetwork().settings_of(table),
            channels,
            table["sample_size"],
            classes=DiTNetwork().classes(table),
            context_dim=table.get("cross_attention_dim"),
            learned_sigma=(table.get("out_channels") or channels) == 2 * channels,
            shared=tensors is None or is_shared(tensors),
            norm_eps=table["norm_eps"],
            freq_shift=table["freq_shift"],
        )

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        h, w = (n // self.patch for n in sample.shape[2:])
        waves = timestep_embedding(timestep.reshape(-1).expand(sample.shape[0]), FREQUENCIES, self.freq_shift)
        waves = waves.to(sample.dtype)
        x = self.pos_embed(sample)  # (B, T, D)
        blocks = cast("list[DiTBlock]", list(self.transformer_blocks))
        first = blocks[0].norm1.emb(waves, encoder_hidden_states)  # (B, D)
        for i, block in enumerate(blocks):
            c = first if self.shared or i == 0 else block.norm1.emb(waves, encoder_hidden_states)
            x = block(x, c, encoder_hidden_states)
        shift, scale = self.proj_out_1(first)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        x = self.proj_out_2(modulate(self.norm_out(x), shift, scale))  # (B, T, p p C')
        x = x.unflatten(1, (h, w)).unflatten(3, (self.patch, self.patch, -1))  # (B, h/p, w/p, p, p, C')
        x = x[..., : self.channels].permute(0, 5, 1, 3, 2, 4)  # (B, C, h/p, p, w/p, p)
        return x.reshape(x.shape[0], self.channels, *sample.shape[2:])  # (B, C, h, w)


@torch.no_grad()
def initialise(network: DiT) -> None:
    """The paper's start: xavier matrices, small embeddings, every residual branch and the output nothing."""
    for name, p in network.named_parameters():
        if name.endswith("bias") or any(part in name for part in NOTHING):
            nn.init.zeros_(p)
        elif any(part in name for part in SMALL):
            nn.init.normal_(p, std=0.02)
        elif p.ndim > 1:  # a norm's weight stays one
            nn.init.xavier_uniform_(p.flatten(1))  # patches too are embedded by a matrix
