"""The autoencoders of Stable Diffusion and of VQGAN, under diffusers' parameter names, at any depth.

`encode(pixels (B, 3, H, W) in [-1, 1]) -> moments (B, 2C, h, w)`: mean and log-variance of each latent value.
`decode(z (B, C, h, w)) -> pixels (B, 3, H, W)`. Each width after the first halves the resolution. With a codebook `encode` gives
the latents themselves, (B, C, h, w), and `decode` takes the nearest vector for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.attention import Attention, pixels, tokens
from tinydiff.models.layers import NORMS, Downsample2D, Upsample2D
from tinydiff.models.residual import Parts, ResnetBlock2D
from tinydiff.networks.autoencoder import Autoencoder as Config
from tinydiff.networks.network import Table, pick

EPS = 1e-6
STATISTICS_EPS = 1e-4  # what FLUX.2 adds to the variances of its latents


class AttentionBlock(Attention):
    """Single-head self-attention over the pixels of a feature map, residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, 1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + pixels(super().forward(tokens(self.group_norm(x))), x.shape[2:])


class MidBlock(nn.Module):
    """Residual block, optional attention, residual block."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)] if attention else [])
        parts = Parts(partial(NORMS["group"], groups, EPS))
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, parts) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Level(nn.Module):
    """Residual blocks, then a change of size where there is one."""

    def __init__(self, channels: int, out: int, layers: int, groups: int):
        super().__init__()
        pairs = [(channels if i == 0 else out, out) for i in range(layers)]
        parts = Parts(partial(NORMS["group"], groups, EPS))
        self.resnets = nn.ModuleList([ResnetBlock2D(c, o, parts) for c, o in pairs])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        for name in ("downsamplers", "upsamplers"):
            x = getattr(self, name)[0](x) if hasattr(self, name) else x
        return x


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, out, h, w)."""

    def __init__(self, config: Config, out: int):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
            level = Level(before, width, config.layers_per_block, groups)
            if i < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Downsample2D(width, 0)])
            self.down_blocks.append(level)
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, 3, H, W)."""

    def __init__(self, config: Config):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
            level = Level(before, width, config.layers_per_block + 1, groups)
            if i < len(widths) - 1:
                level.upsamplers = nn.ModuleList([Upsample2D(width)])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """Image <-> latent; `scaling_factor` (latents = factor * z) stays outside, with whoever holds the configuration."""

    values = 2  # that are encoded for each of a latent

    def __init__(self, config: Config):
        super().__init__()
        c, moments = config.latent_channels, self.values * config.latent_channels
        self.encoder = Encoder(config, moments)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    @classmethod
    def of(cls, table: Table, tensors: Mapping[str, Tensor] | None = None) -> Autoencoder:
        """The network of a `config.json`."""
        return cls(pick(Config, table))

    def encode(self, sample: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(sample))

    def decode(self, latent_sample: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent_sample))

    def distribution(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of an image's latents (B, C, h, w), float32."""
        return mean_and_std(self.encode(sample).float())


class Codebook(nn.Module):
    """Vectors, one of which stands for each latent (van den Oord et al. 2017, section 3.1)."""

    def __init__(self, count: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(count, channels)
        nn.init.uniform_(self.embedding.weight, -1 / count, 1 / count)

    def codes(self, z: Tensor) -> Tensor:
        """The numbers of the vectors nearest to latents, in float32: (B, C, h, w) -> (B, h, w)."""
        weight = self.embedding.weight.float()
        return (weight.square().sum(1) - 2 * z.float().permute(0, 2, 3, 1) @ weight.T).argmin(-1)

    def forward(self, z: Tensor) -> Tensor:
        return self.embedding(self.codes(z)).permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)


class VQAutoencoder(Autoencoder):
    """Image <-> latent, of which the decoder sees the nearest vectors of a codebook."""

    values = 1

    def __init__(self, config: Config):
        super().__init__(config)
        self.quantize = Codebook(config.num_vq_embeddings, config.latent_channels)

    def decode(self, latent_sample: Tensor) -> Tensor:
        return super().decode(self.quantize(latent_sample))

    def distribution(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """The latents, which have no deviation."""
        z = self.encode(sample).float()
        return z, torch.zeros_like(z)


class Statistics(nn.Module):
    """The means and variances of channels, as batch normalisation keeps them."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Means and standard deviations, (C, 1, 1) each."""
        return self.running_mean[:, None, None], (self.running_var + STATISTICS_EPS).sqrt()[:, None, None]


class Flux2Autoencoder(Autoencoder):
    """Image <-> latent, 2x2 of which with their channels are one of a denoiser's, normalised by statistics that came with it.

    Moments and latents are those: (B, 8C, h/2, w/2) and (B, 4C, h/2, w/2) of C channels.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.bn = Statistics(4 * config.latent_channels)

    def encode(self, sample: Tensor) -> Tensor:
        mean, std = self.bn()
        means, variances = (F.pixel_unshuffle(part, 2) for part in super().encode(sample).chunk(2, dim=1))
        return torch.cat([(means - mean) / std, variances - 2 * std.log()], dim=1)

    def decode(self, latent_sample: Tensor) -> Tensor:
        mean, std = self.bn()
        return super().decode(F.pixel_shuffle(latent_sample * std + mean, 2))


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2C, h, w) -> mean and standard deviation (B, C, h, w); log-variance clamped to [-30, 20] as diffusers does."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, (logvar.clamp(-30, 20) * 0.5).exp()
