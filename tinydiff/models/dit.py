"""The diffusion transformer with adaLN-Zero (Peebles & Xie 2023), under diffusers' parameter names.

`forward(sample (B, C, h, w), timestep () or (B,), encoder_hidden_states) -> (B, C, h, w)`. What it is conditioned on besides
time is one of two: a class, as (B, 1, classes + 1) rows of weights that sum to one (one-hot, or a mixture; the last is the
null label of guidance), or text vectors (B, T, context_dim), which every block attends to. It does not know where weights
come from: the layout of the published files is in `checkpoints/dit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.attention import Attention, FeedForward, tokens
from tinydiff.models.exits import Exit, Leavers
from tinydiff.models.layers import TimestepEmbedding, embedding, timestep_embedding
from tinydiff.models.spatial import ATTENTIONS, POSITIONS
from tinydiff.networks.dit import DiT as Config
from tinydiff.networks.dit import DiTNetwork, is_shared
from tinydiff.networks.network import Table
from tinydiff.networks.spatial import Spatial, spatial

FREQUENCIES = 256  # sines and cosines of time, at any width
NOTHING = ("norm1.linear", "attn2.to_out", "proj_out_")  # attention to the text has no gate, so its own output is zero
SMALL = ("timestep_embedder", "embedding_table", "place.table")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class PatchEmbed(nn.Module):
    """Patches as tokens that know their place: (B, C, h, w) -> (B, T, D)."""

    def __init__(self, channels: int, dim: int, patch: int, place: nn.Module):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)  # (B, D, h/p, w/p)
        return self.place(tokens(x).contiguous(), x.shape[2:])  # every block keeps this order of memory


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


class Tokens(Condition):
    """The same as a token each: (B, FREQUENCIES) -> (B, 1 or 2, D)."""

    def forward(self, waves: Tensor, context: Tensor) -> Tensor:
        time = self.timestep_embedder(waves)
        return torch.stack([time] if self.class_embedder is None else [time, self.class_embedder(context)], 1)


class AdaLayerNormZero(nn.Module):
    """What a condition c says of a block: shift, scale and gate of attention, then of the perceptron, (B, 1, D) each."""

    def __init__(self, dim: int, emb: Condition | None, linear: nn.Linear):
        super().__init__()
        self.emb, self.linear = emb, linear
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)

    def forward(self, c: Tensor) -> tuple[Any, ...]:
        each = self.linear(c)[:, None].split(self.norm.normalized_shape[0], dim=-1)
        return each if len(each) == 6 else (*each[:2], 1, *each[2:], 1)  # gates are open where there are none


class AdaLNZero(nn.Module):
    """Time and class as one vector, from which the shifts, scales and gates of every block are computed.

    This and what follows: Peebles & Xie 2023, section 3.2. `context_dim`: the width of what `attn2` attends to, if anything.
    """

    parts = 6  # of a block's norms

    def __init__(self, dim: int, classes: int, context_dim: int | None):
        super().__init__()
        self.context_dim = context_dim

    def emb(self, dim: int, classes: int) -> Condition | None:
        return Condition(dim, classes)

    def linear(self, dim: int, parts: int) -> nn.Linear:
        """The layer from a condition c to `parts` vectors."""
        return nn.Linear(dim, dim * parts)

    def vector(self, emb: Any, waves: Tensor, context: Tensor) -> Tensor:
        return emb(waves, context)  # (B, D)

    def begin(self, x: Tensor, waves: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens and the context that blocks are given."""
        return x, context

    def end(self, x: Tensor, count: int) -> Tensor:
        """The image's `count` tokens."""
        return x


class FiLM(AdaLNZero):
    """Shift and scale without gates (Perez et al. 2018, equation 1): the paper's adaLN."""

    parts = 4


class Cross(FiLM):
    """Time and class are tokens that every block attends to, with those of the text where there is text.

    Blocks are told nothing else: instead of a vector there is a one, so that shifts and scales are weights.
    """

    def __init__(self, dim: int, classes: int, context_dim: int | None):
        super().__init__(dim, classes, context_dim or dim)
        self.tokens, self.text = Tokens(context_dim or dim, classes), context_dim is not None

    def emb(self, dim: int, classes: int) -> Condition | None:
        return None

    def linear(self, dim: int, parts: int) -> nn.Linear:
        return nn.Linear(1, dim * parts, bias=False)

    def vector(self, emb: Any, waves: Tensor, context: Tensor) -> Tensor:
        return waves.new_ones(1, 1)

    def begin(self, x: Tensor, waves: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        told = self.tokens(waves, context)
        return x, torch.cat([told, context], 1) if self.text else told


class InContext(Cross):
    """Time and class are tokens after those of the image."""

    def __init__(self, dim: int, classes: int, context_dim: int | None):
        super().__init__(dim, classes, None)
        self.context_dim = context_dim

    def begin(self, x: Tensor, waves: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x, self.tokens(waves, context)], 1), context

    def end(self, x: Tensor, count: int) -> Tensor:
        return x[:, :count]


CONDITIONINGS = {"adaln_zero": AdaLNZero, "film": FiLM, "in_context": InContext, "cross": Cross}
NORM_ORDERS = {  # Xiong et al. 2020, figure 1
    "pre": lambda x, branch, norm: x + branch(norm(x)),
    "post": lambda x, branch, norm: norm(x + branch(x)),
}


class DiTBlock(nn.Module):
    """Self-attention, cross-attention where there is context, perceptron: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config, told: AdaLNZero, emb: Condition | None, eps: float, where: Spatial):
        super().__init__()
        _, heads, width = config.shape
        dim, context_dim = heads * width, told.context_dim
        self.residual = NORM_ORDERS[config.norm_order]
        self.norm1 = AdaLayerNormZero(dim, emb, told.linear(dim, told.parts))
        self.attn1 = ATTENTIONS[where.kind](dim, heads, where, True, config.qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.attn2 = None if context_dim is None else Attention(dim, heads, context_dim, True, config.qk_norm)
        self.norm3 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ff = FeedForward(dim, "gelu-approximate")

    def forward(self, x: Tensor, c: Tensor, context: Tensor, size: tuple[int, int]) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.norm1(c)
        attend, norm1 = lambda y: gate * self.attn1(y, size=size), lambda y: modulate(self.norm1.norm(y), shift, scale)
        x = self.residual(x, attend, norm1)
        if (read := self.attn2) is not None:
            x = self.residual(x, lambda y: read(y, context), self.norm2)
        return self.residual(x, lambda y: gate2 * self.ff(y), lambda y: modulate(self.norm3(y), shift2, scale2))

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
        dim, patch = heads * width, config.patch_size
        outputs = patch * patch * channels * (1 + learned_sigma)
        self.channels, self.patch, self.shared, self.freq_shift = channels, patch, shared, freq_shift
        base, biased = (config.position_side or side) // patch, config.positions == "relative"
        first, inside = (
            ("none" if biased else config.positions),
            ("relative" if biased else "none"),
        )  # told once, or in blocks
        wheres = [spatial(config, kind, i, inside, base) for i, kind in enumerate(config.attentions())]
        place = spatial(config, "full", 0, first, base)._replace(width=config.position_width)
        self.pos_embed = PatchEmbed(channels, dim, patch, POSITIONS[first](dim, heads, place))
        self.told = told = CONDITIONINGS[config.conditioning](dim, classes, context_dim)
        embs = [told.emb(dim, classes)] * depth if shared else [told.emb(dim, classes) for _ in range(depth)]
        blocks = [DiTBlock(config, told, emb, norm_eps, where) for emb, where in zip(embs, wheres, strict=True)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.proj_out_1 = told.linear(dim, 2)
        self.proj_out_2 = nn.Linear(dim, outputs)
        self.exits = nn.ModuleDict({str(n): Exit(dim, outputs, told.linear(dim, 2)) for n in config.leaves})
        self.leave, self.computed = 1.0, torch.empty(0)  # how sure a head must be; of the last call, blocks of each row
        if not self.proj_out_2.weight.is_meta:
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

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        early: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """`early` gets what each exit says, (B, C, h, w) and (B,); without it rows leave where an exit is surer than `leave`."""
        h, w = (n // self.patch for n in sample.shape[2:])
        waves = timestep_embedding(timestep.reshape(-1).expand(sample.shape[0]), FREQUENCIES, self.freq_shift)
        waves = waves.to(sample.dtype)
        x = self.pos_embed(sample)  # (B, T, D)
        count = x.shape[1]
        x, context = self.told.begin(x, waves, encoder_hidden_states)
        blocks = cast("list[DiTBlock]", list(self.transformer_blocks))
        first = self.told.vector(blocks[0].norm1.emb, waves, encoder_hidden_states)  # (B, D)
        left = Leavers(len(x), len(blocks), x.device) if self.leave < 1 and early is None else None
        for i, block in enumerate(blocks):
            c = first if self.shared or i == 0 else self.told.vector(block.norm1.emb, waves, encoder_hidden_states)
            x = block(x, c, context, (h, w))
            if str(i + 1) in self.exits and not (left is None and early is None):
                output, sure = self.exits[str(i + 1)](self.told.end(x, count), first)
                if early is not None:
                    early.append((self.image(output, sample), sure))
                elif left:
                    state = (x, first, waves, encoder_hidden_states, context)
                    state = left.leave(i + 1, output, sure > self.leave, state)
                    x, first, waves, encoder_hidden_states, context = state
                    if not len(x):
                        break
        shift, scale = self.proj_out_1(first)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        x = self.proj_out_2(modulate(self.norm_out(self.told.end(x, count)), shift, scale))  # (B, T, p p C')
        if left:
            x, self.computed = left.joined(x), left.computed
        return self.image(x, sample)

    def image(self, x: Tensor, sample: Tensor) -> Tensor:
        """What each token says of its patch (B, T, p p C') as an image like the sample, (B, C, h, w)."""
        h, w = (n // self.patch for n in sample.shape[2:])
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
