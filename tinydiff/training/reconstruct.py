"""What learns in stage 1: an autoencoder as a network from images to reconstructions, its latents changed between.

`turned` is the change that EQ-VAE asks for: latents and images are made smaller and turned alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.diffusion.noise import keyed
from tinydiff.models.autoencoder import Autoencoder, mean_and_std
from tinydiff.stages import AutoencoderStage
from tinydiff.training.losses import kl

SMALLEST = 0.25  # of the scales that EQ-VAE draws uniformly (Kouzelis et al. 2025, section 3.3)


class Reconstruct(nn.Module):
    """A KL autoencoder. Pixels (B, 3, H, W), noise (B, C, h, w) and a turn to reconstructions, latents' means and deviations."""

    def __init__(self, vae: Autoencoder):
        super().__init__()
        self.whole = (vae,)  # in a tuple: its parts have the names that checkpoints know
        for name, part in vae.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor, noise: Tensor, turn: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        (vae,) = self.whole
        mean, std = mean_and_std(vae.encode(x).float())
        return vae.decode(turned(mean + std * noise, turn)).float(), mean, std

    @property
    def last(self) -> nn.Parameter:
        """The decoder's last weights, (3, C, 3, 3)."""
        return self.whole[0].decoder.conv_out.weight  # type: ignore[return-value]

    def terms(self, latent: Sequence[Tensor], cfg: AutoencoderStage) -> dict[str, Tensor]:
        """The weighted terms of what `forward` says of the latents."""
        return {"kl": cfg.kl_weight * kl(*latent)}


def draw(seed: int, step: int, probability: float, height: int, width: int) -> list[int]:
    """Of a step, the height and width that its latents are resampled to, and by how many quarters they are turned.

    With 1 - `probability` all stay as they are; else one of a whole batch, so that it is one tensor on any process.
    """
    rng = keyed(seed, "autoencoder turn", step)
    if rng.random() >= probability:
        return [height, width, 0]
    scale = SMALLEST + (1 - SMALLEST) * rng.random()
    return [max(1, round(height * scale)), max(1, round(width * scale)), int(rng.integers(1, 4))]


def turned(x: Tensor, turn: Sequence[int], factor: int = 1) -> Tensor:
    """Latents, or with the autoencoder's `factor` images, (B, C, h, w) made smaller and turned (Kouzelis et al. 2025, eq. 5)."""
    *size, quarters = turn
    size = [side * factor for side in size]
    if [*x.shape[2:]] != size:
        x = F.interpolate(x, size, mode="bilinear", antialias=factor > 1)
    return torch.rot90(x, quarters, (2, 3)) if quarters else x
