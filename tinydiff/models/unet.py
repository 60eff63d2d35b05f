"""The Stable Diffusion U-Net (Rombach et al. 2022), under diffusers' parameter names, at any width and depth.

`forward(sample (B, C, h, w), timestep () or (B,), encoder_hidden_states (B, T, D)) -> (B, C, h, w)`.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.config import Denoiser
from tinydiff.models.attention import Transformer2DModel
from tinydiff.models.layers import Downsample2D, ResnetBlock2D, TimestepEmbedding, Upsample2D, timestep_embedding, zero

CROSS = "CrossAttnDownBlock2D"


class Block(nn.Module):
    """One level: residual blocks, each with a transformer where the level has cross-attention, then a change of size."""

    attentions: nn.ModuleList

    def __init__(self, channels: list[tuple[int, int]], make_resnet, make_transformer):
        super().__init__()
        self.resnets = nn.ModuleList([make_resnet(c, out) for c, out in channels])
        if make_transformer:
            self.attentions = nn.ModuleList([make_transformer(out) for _, out in channels])

    def layer(self, i: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class DownBlock(Block):
    """Returns the block's output and every skip it leaves behind."""

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
    """Takes one skip for each residual block, the last one first."""

    upsamplers: nn.ModuleList

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips[-1 - i]], dim=1), time, context)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class MidBlock(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, channels: int, make_resnet, make_transformer):
        super().__init__()
        self.attentions = nn.ModuleList([make_transformer(channels)])
        self.resnets = nn.ModuleList([make_resnet(channels, channels) for _ in range(2)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class UNet(nn.Module):
    """Denoiser over latents of `channels` channels, conditioned on time and on text vectors of width `context_dim`.

    `extra` channels are read beside the latents: nine in all in Stable Diffusion's inpainting models.
    """

    def __init__(self, config: Denoiser, channels: int, context_dim: int, extra: int = 0):
        super().__init__()
        widths, groups, time = config.block_out_channels, config.norm_num_groups, config.block_out_channels[0] * 4

        def resnet(c: int, out: int) -> ResnetBlock2D:
            block = ResnetBlock2D(c, out, time, groups, 1e-5)
            zero(block.conv2)
            return block

        def transformer(heads: int, c: int) -> Transformer2DModel:
            depth, linear = config.transformer_layers_per_block, config.use_linear_projection
            return Transformer2DModel(c, heads, depth, context_dim, groups, linear)

        makers = [partial(transformer, heads) for heads in config.heads()]

        self.conv_in = nn.Conv2d(channels + extra, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time)
        n, cross = config.layers_per_block, [kind == CROSS for kind in config.down_block_types]
        self.down_blocks, left = nn.ModuleList(), [widths[0]]
        for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
            pairs = [(before if j == 0 else width, width) for j in range(n)]
            block = DownBlock(pairs, resnet, makers[i] if cross[i] else None)
            left += [width] * n
            if i < len(widths) - 1:
                block.downsamplers = nn.ModuleList([Downsample2D(width, 1)])
                left.append(width)
            self.down_blocks.append(block)
        self.mid_block = MidBlock(widths[-1], resnet, makers[-1])
        self.up_blocks, x = nn.ModuleList(), widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            pairs = [((x if j == 0 else width) + left.pop(), width) for j in range(n + 1)]
            block, x = UpBlock(pairs, resnet, makers[i] if cross[i] else None), width
            if i > 0:
                block.upsamplers = nn.ModuleList([Upsample2D(width)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], 1e-5)
        self.conv_out = zero(nn.Conv2d(widths[0], channels, 3, padding=1))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        width, context = self.conv_in.out_channels, encoder_hidden_states
        time = timestep_embedding(timestep.reshape(-1).expand(sample.shape[0]), width)
        time = self.time_embedding(time.to(sample.dtype))
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, context)
            skips += more
        x = self.mid_block(x, time, context)
        for block in cast("list[UpBlock]", list(self.up_blocks)):
            left = len(skips) - len(block.resnets)
            x, skips = block(x, skips[left:], time, context), skips[:left]
        return self.conv_out(F.silu(self.conv_norm_out(x)))
