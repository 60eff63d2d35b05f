"""CLIP's two towers (Radford et al. 2021) in small: how well a picture, by its latents, fits a text.

The text tower is a model's own text encoder; the image tower is convolutions. It knows no files and no loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.layers import NORMS, Downsample2D
from tinydiff.models.residual import Parts, ResnetBlock2D
from tinydiff.models.text_encoder import TextEncoder
from tinydiff.networks.contrastive import GROUPS, Towers
from tinydiff.networks.network import Table, pick
from tinydiff.networks.text import TEXT_ENCODERS

LARGEST = 100.0  # that the temperature's inverse becomes (Radford et al. 2021, section 2.5)


class ImageTower(nn.Module):
    """Latents (B, C, h, w), of about unit variance, to vectors (B, D), at any size: residual blocks, then their mean."""

    def __init__(self, channels: int, widths: tuple[int, ...]):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        parts = Parts(partial(NORMS["group"], GROUPS, 1e-5))
        blocks = [ResnetBlock2D(widths[0], widths[0], parts)]
        for before, width in pairwise(widths):
            blocks += [Downsample2D(before, 1), ResnetBlock2D(before, width, parts)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.GroupNorm(GROUPS, widths[-1], 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return F.silu(self.norm(x)).mean(dim=(2, 3))


class TextImage(nn.Module):
    """Both towers, their projections and the temperature; `scaling_factor` gives the latents of its images unit variance."""

    def __init__(self, text: TextEncoder, width: int, channels: int, settings: Towers, scaling_factor: float = 1.0):
        super().__init__()
        self.text, self.image = text, ImageTower(channels, settings.image_channels)
        self.text_projection = nn.Linear(width, settings.projection_dim, bias=False)
        self.visual_projection = nn.Linear(settings.image_channels[-1], settings.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as the paper begins
        self.scaling_factor = scaling_factor

    @classmethod
    def of(cls, table: Table, tensors: Mapping[str, Tensor] | None = None) -> TextImage:
        """The towers of a `config.json`."""
        text = TEXT_ENCODERS["clip"].build(table["text_config"])
        width, settings = table["text_config"]["hidden_size"], pick(Towers, table)
        return cls(text, width, table["in_channels"], settings, table["scaling_factor"])  # type: ignore[arg-type]

    def texts(self, ids: Tensor) -> Tensor:
        """Tokens (B, T) to vectors (B, D) of norm 1."""
        return F.normalize(self.text_projection(self.text(ids)[1]).float(), dim=-1)

    def images(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to vectors (B, D) of norm 1."""
        return F.normalize(self.visual_projection(self.image(latents)).float(), dim=-1)

    def forward(self, ids: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors of texts and of images, and what their products are multiplied by."""
        return self.texts(ids), self.images(latents), self.logit_scale.exp().clamp(max=LARGEST)
