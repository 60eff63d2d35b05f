"""A network that controls a U-Net by an image (ControlNet, Zhang et al. 2023, figure 3), under diffusers' parameter names.

`forward(sample (B, C, h, w), timestep () or (B,), encoder_hidden_states (B, T, D), controlnet_cond (B, 3, H, W) in [0, 1]) ->`
the residuals of `networks.unet.residuals`, in their order. It is a copy of the U-Net's way down and middle, after each part of
which a convolution stands that is zero at first, so that it begins as no change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.layers import zero
from tinydiff.models.unet import Descent, UNet
from tinydiff.networks.control import Control
from tinydiff.networks.network import Table, pick
from tinydiff.networks.unet import UNet as Config
from tinydiff.networks.unet import UNetNetwork, residuals


class ConditioningEmbedding(nn.Module):
    """An image becomes features of the latents' size, halved between two of `widths`: (B, C, H, W) -> (B, out, h, w)."""

    def __init__(self, channels: int, widths: Sequence[int], out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = zero(nn.Conv2d(widths[-1], out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv_in, *self.blocks):
            x = F.silu(layer(x))
        return self.conv_out(x)


class ControlNet(Descent):
    """A control network over latents of `channels` channels for a U-Net of these settings."""

    def __init__(self, config: Config, control: Control, channels: int, context_dim: int, added: int = 0):
        super().__init__(config, channels, context_dim, added)
        *skips, middle = (array.axes[1] for array in residuals(config).values())
        widths, first = control.conditioning_embedding_out_channels, config.block_out_channels[0]
        self.controlnet_cond_embedding = ConditioningEmbedding(control.conditioning_channels, widths, first)
        self.controlnet_down_blocks = nn.ModuleList([zero(nn.Conv2d(c, c, 1)) for c in skips])  # type: ignore[arg-type]
        self.controlnet_mid_block = zero(nn.Conv2d(middle, middle, 1))  # type: ignore[arg-type]

    @classmethod
    def of(cls, table: Table, tensors: Mapping[str, Tensor] | None = None) -> ControlNet:
        """The network of a `config.json`."""
        channels, added = table["in_channels"], UNetNetwork().added(table)
        return cls(pick(Config, table), pick(Control, table), channels, table["cross_attention_dim"], added)

    def begin_as(self, unet: UNet) -> ControlNet:
        """Copy the U-Net's way down and middle; channels that it reads beside the latents are left out."""
        own, theirs = self.state_dict(), unet.state_dict()
        copied = {name: theirs[name] for name in own.keys() & theirs.keys()}
        copied["conv_in.weight"] = copied["conv_in.weight"][:, : self.conv_in.in_channels]
        self.load_state_dict(own | copied)
        return self

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, controlnet_cond: Tensor, **told: Tensor
    ) -> tuple[Tensor, ...]:
        """`told`: what is added to the time."""
        time = self.embedded(sample, timestep, **told)
        hint = self.controlnet_cond_embedding(controlnet_cond)  # (B, C0, h, w)
        x, skips = self.down(sample, time, encoder_hidden_states, hint)
        x = self.mid_block(x, time, encoder_hidden_states)
        down = [layer(skip) for layer, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return (*down, self.controlnet_mid_block(x))
