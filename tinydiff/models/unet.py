"""The Stable Diffusion U-Net (Rombach et al. 2022), under diffusers' parameter names, at any width and depth.

`forward(sample (B, C, h, w), timestep () or (B,), encoder_hidden_states (B, T, D)) -> (B, C, h, w)`. What its levels are made
of is `networks.unet.plan`. That of Stable Diffusion XL (Podell et al. 2023) is also told `text_embeds` (B, P), a vector of the
whole text, and `time_ids` (B, 6), sizes; one with distilled guidance `timestep_cond` (B, G), sinusoids of its strength.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.attention import Transformer2DModel
from tinydiff.models.layers import (
    NORMS,
    Downsample2D,
    TimestepEmbedding,
    Upsample2D,
    embedding,
    timestep_embedding,
    zero,
)
from tinydiff.models.modulation import MODULATIONS, TIMES
from tinydiff.models.residual import CHANNELS, RESNETS, Parts, ResnetBlock2D
from tinydiff.models.skips import CONTEXTS, MERGES
from tinydiff.models.sources import Sources
from tinydiff.models.spatial import ATTENTIONS
from tinydiff.networks.network import Table
from tinydiff.networks.spatial import spatial
from tinydiff.networks.unet import ADDED, BESIDE, LABEL, MIDDLE, MIDDLES, PICTURE, SKIP, UNetNetwork, plan
from tinydiff.networks.unet import UNet as Config

CELLS = 16  # along a side of the square that positions are on, which is stretched over every level's map


class Block(nn.Module):
    """One level: residual blocks, each with a transformer where the level has cross-attention, then a change of size."""

    attentions: nn.ModuleList

    def __init__(self, channels: Sequence[tuple[int, int]], make_resnet, make_transformer):
        super().__init__()
        self.resnets = nn.ModuleList([make_resnet(c, out) for c, out in channels])
        if make_transformer:
            self.attentions = nn.ModuleList([make_transformer(out) for _, out in channels])

    def layer(self, i: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class DownBlock(Block):
    """Returns the block's output and its skips, one for each residual block and one for the halving."""

    downsamplers: nn.ModuleList

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class UpBlock(Block):
    """Takes one skip for each residual block, the last one first. What is doubled gets the size of `after`, if given."""

    upsamplers: nn.ModuleList
    merges: nn.ModuleList

    def forward(
        self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor, after: Tensor | None = None
    ) -> Tensor:
        read: list[Tensor] = []
        for i, merge in enumerate(self.merges):
            skip = skips[-1 - i]
            merged, read = merge(x, skip, read), [x, skip, *read]
            x = self.layer(i, merged, time, context)
        return self.upsamplers[0](x, after) if hasattr(self, "upsamplers") else x


class MidBlock(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution.

    Of several transformers the last half are given a 1x1 convolution of what comes and of what one of the first half gave, the
    nearest first: the long skips of U-ViT (Bao et al. 2023, section 3.1).
    """

    def __init__(self, channels: int, layers: int, make_resnet, make_transformer):
        super().__init__()
        self.attentions = nn.ModuleList([make_transformer(channels) for _ in range(layers)])
        self.resnets = nn.ModuleList([make_resnet(channels, channels) for _ in range(2)])
        self.merges = nn.ModuleList([nn.Conv2d(2 * channels, channels, 1, bias=False) for _ in range(layers // 2)])
        for merge in self.merges:
            nn.init.dirac_(merge.weight)  # type: ignore[arg-type]  it begins as what comes

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x, skips, later = self.resnets[0](x, time), list[Tensor](), len(self.attentions) - len(self.merges)
        for i, transformer in enumerate(self.attentions):
            x = self.merges[i - later](torch.cat([x, skips.pop()], 1)) if i >= later else x
            x = transformer(x, context)
            skips += [x] if i < len(self.merges) else []
        return self.resnets[1](x, time)


def makers(
    config: Config, context_dim: int
) -> tuple[Callable[[int, int, int], nn.Module], Callable[[int, int, str], Any]]:
    """What makes a U-Net's residual blocks, of (level, channels, out), and of (heads, depth, attention) its transformers."""
    norm, transformers_norm = (partial(NORMS[config.norm], config.norm_num_groups, eps) for eps in (1e-5, 1e-6))
    parts = norm, config.block_out_channels[0] * 4, MODULATIONS[config.modulation], CHANNELS[config.channel_attention]

    def resnet(level: int, c: int, out: int) -> ResnetBlock2D:
        block = RESNETS[config.resnet](c, out, Parts(*parts, level))
        zero(block.last())
        return block

    def transformer(heads: int, depth: int, kind: str) -> Any:
        blocks = count()  # of this level, one way

        def attention(c: int, heads: int) -> nn.Module:
            where = spatial(config, kind, next(blocks), config.positions, CELLS)
            return ATTENTIONS[kind](c, heads, where, qk_norm=config.qk_norm)

        return depth and (
            lambda c: Transformer2DModel(c, heads, depth, context_dim, transformers_norm, config, attention)
        )

    return resnet, transformer


class Descent(nn.Module):
    """What a U-Net and a network that controls it share: time, the way down, and the middle.

    `added`: how many numbers a Stable Diffusion XL is told beside the time; `guidance`: how many where guidance was distilled.
    """

    def __init__(self, config: Config, channels: int, context_dim: int, added: int = 0, guidance: int = 0):
        super().__init__()
        levels, first = plan(config), config.block_out_channels[0]
        resnet, transformer = makers(config, context_dim)
        self.conv_in = nn.Conv2d(channels, first, 3, padding=1)
        self.time_embedding = TIMES[config.time_embedding](first, guidance)
        self.add_embedding = TimestepEmbedding(added, first * 4) if added else None
        self.class_embedding: nn.Embedding | None = None
        self.down_blocks = nn.ModuleList()
        for i, level in enumerate(levels):
            block = DownBlock(level.down, partial(resnet, i), transformer(level.heads, level.depth, level.attention))
            if not level.last:
                block.downsamplers = nn.ModuleList([Downsample2D(level.width, 1)])
            self.down_blocks.append(block)
        middle = transformer(levels[-1].heads, config.depths()[-1], levels[-1].attention)
        lowest = partial(resnet, len(levels) - 1)
        self.mid_block = MidBlock(levels[-1].width, MIDDLES[config.middle](config), lowest, middle)

    def embedded(
        self,
        sample: Tensor,
        timestep: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Time as the blocks are told it, with what is added to it: (B, 4 C0)."""
        time = self.time_embedding(timestep.reshape(-1).expand(sample.shape[0]), sample, timestep_cond)
        if self.class_embedding is not None:
            assert class_labels is not None, "it is told a class"
            time = time + class_labels.to(time.dtype) @ self.class_embedding.weight
        if self.add_embedding is None or text_embeds is None or time_ids is None:
            return time
        width = (self.add_embedding.linear_1.in_features - text_embeds.shape[1]) // time_ids.shape[1]
        sizes = timestep_embedding(time_ids.flatten(), width).reshape(-1, width * time_ids.shape[1])  # (B, 6 E)
        return time + self.add_embedding(torch.cat([text_embeds, sizes.to(text_embeds.dtype)], -1))

    def down(
        self, sample: Tensor, time: Tensor, context: Tensor, control: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The features of the lowest level, and the skips: `conv_in`'s, each block's and each halving's.

        `control` (B, C0, h, w) is added to what `conv_in` gives.
        """
        x = self.conv_in(sample)
        x = x if control is None else x + control
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, context)
            skips += more
        return x, skips


class UNet(Descent):
    """Denoiser over latents of `channels` channels, conditioned on time and on text vectors of width `context_dim`."""

    def __init__(
        self, config: Config, channels: int, context_dim: int, extra: int = 0, added: int = 0, guidance: int = 0
    ):
        super().__init__(
            config, channels + extra, context_dim, added, guidance
        )  # `extra`: 5 in Stable Diffusion's inpainting
        levels, first = plan(config), config.block_out_channels[0]
        resnet, transformer = makers(config, context_dim)
        self.up_blocks = nn.ModuleList()
        for i, level in reversed(list(enumerate(levels))):
            block = UpBlock(level.up, partial(resnet, i), transformer(level.heads, level.depth, level.attention))
            block.merges = nn.ModuleList([MERGES[config.skips](*each) for each in level.merged])
            if i > 0:
                block.upsamplers = nn.ModuleList([Upsample2D(level.width)])
            self.up_blocks.append(block)
        norm = partial(NORMS[config.norm], config.norm_num_groups, 1e-5)
        self.context = CONTEXTS[config.context](levels, norm)
        self.conv_norm_out = norm(first)
        self.conv_out = zero(nn.Conv2d(first, channels, 3, padding=1))
        self.beside, self.sources = config.image == BESIDE, None

    @classmethod
    def of(cls, table: Table, tensors: Mapping[str, Tensor] | None = None) -> UNet:
        """The network of a `config.json`."""
        channels = int(table["out_channels"])
        extra = int(table["in_channels"]) - channels
        more = UNetNetwork().added(table), table.get("time_cond_proj_dim") or 0
        settings = UNetNetwork().settings_of(table)
        network, time = (
            cls(settings, channels, table["cross_attention_dim"], extra, *more),
            settings.block_out_channels[0] * 4,
        )
        if settings.label == ADDED:
            network.class_embedding = embedding(table["num_class_embeds"], time)
        network.sources = Sources(settings, table, time) if settings.sources > 1 else None
        return network

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **told: Tensor) -> Tensor:
        """`told`: what is added to the time, read by cross-attention or concatenated to the latents; and all or none of
        `networks.unet.residuals`, which are added to the skips and to the middle's output."""
        residuals = {name: told.pop(name) for name in list(told) if name == MIDDLE or name.startswith(SKIP)}
        given = {name: told[name] for name in (LABEL, PICTURE) if name in told}
        told.pop(PICTURE, None)
        sample = torch.cat([sample, given[PICTURE]], 1) if self.beside else sample
        time = self.embedded(sample, timestep, **told)
        context: Any = encoder_hidden_states
        if self.sources is not None:
            context = self.sources(context, time, given)
        x, skips = self.down(sample, time, context)
        x = self.mid_block(x, time, context)
        if residuals:
            x = x + residuals[MIDDLE]
            skips = [skip + residuals[f"{SKIP}{i}"] for i, skip in enumerate(skips)]
        x, skips = self.context(x, skips)
        return self.up(x, skips, time, context)

    def up(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        """The output, from the lowest level's features and `down`'s skips, the last of which is taken first."""
        for block in cast("list[UpBlock]", list(self.up_blocks)):
            left = len(skips) - len(block.resnets)
            after = skips[left - 1] if self.add_embedding and left else None  # XL's sizes need not be multiples
            x, skips = block(x, skips[left:], time, context, after), skips[:left]
        return self.conv_out(F.silu(self.conv_norm_out(x)))
