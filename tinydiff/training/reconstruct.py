"""What learns in stage 1: an autoencoder as a network from images to reconstructions, its latents changed between.

`turned` is the change that EQ-VAE asks for: latents and images are made smaller and turned alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.diffusion.noise import keyed
from tinydiff.models.autoencoder import Autoencoder, VQAutoencoder
from tinydiff.stages import AutoencoderStage
from tinydiff.training.losses import kl

DECAY, DEAD = 0.99, 0.03  # of a codebook's averages; of the mean use, below which a vector begins again
SMALLEST = 0.25  # of the scales that EQ-VAE draws uniformly (Kouzelis et al. 2025, section 3.3)


class Reconstruct(nn.Module):
    """A KL autoencoder. Pixels (B, 3, H, W), noise (B, C, h, w) and a turn to reconstructions, latents' means and deviations."""

    def __init__(self, vae: Autoencoder, cfg: AutoencoderStage):
        super().__init__()
        self.whole: tuple[Any] = (vae,)  # in a tuple: its parts have the names that checkpoints know
        for name, part in vae.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor, noise: Tensor, turn: Sequence[int]) -> tuple[Tensor, ...]:
        (vae,) = self.whole
        mean, std = vae.distribution(x)
        return vae.decode(turned(mean + std * noise, turn)).float(), mean, std

    @property
    def last(self) -> nn.Parameter:
        """The decoder's last weights, (3, C, 3, 3)."""
        return self.whole[0].decoder.conv_out.weight

    def terms(self, latent: Sequence[Tensor], cfg: AutoencoderStage) -> dict[str, Tensor]:
        """The weighted terms of what `forward` says of the latents."""
        return {"kl": cfg.kl_weight * kl(*latent)}

    def seen(self, latent: Sequence[Tensor], first: int, batch: int, rng: np.random.Generator) -> Tensor | None:
        """What is to be summed of these rows of a batch, which begin with the `first`, to learn of it without a gradient."""
        return None

    def learn(self, total: Tensor) -> dict[str, Tensor]:
        """Learn from the sum over the whole batch, and say of it."""
        return {}


class Quantise(Reconstruct):
    """A VQ autoencoder: reconstructions, latents, their vectors and the numbers of these.

    The codebook learns by gradients, or is the moving average of the latents that each vector stands for (van den Oord et
    al. 2017, appendix A.1): then it is a buffer, and a vector for which hardly any latent is left begins again as
    some latent (Dhariwal et al. 2020, section 3.2).
    """

    usage: Tensor  # (K,): how many latents of an update each vector stands for, on average

    def __init__(self, vae: VQAutoencoder, cfg: AutoencoderStage):
        self.averages = cfg.codebook == "ema"
        embedding = vae.quantize.embedding
        if self.averages and "weight" in embedding._parameters:
            weight = embedding.weight.detach()
            del embedding.weight
            embedding.register_buffer("weight", weight)
        super().__init__(vae, cfg)
        if self.averages:
            self.register_buffer("usage", embedding.weight.new_zeros(len(embedding.weight)))

    def forward(self, x: Tensor, noise: Tensor, turn: Sequence[int]) -> tuple[Tensor, ...]:
        (vae,) = self.whole
        z = turned(vae.encode(x).float(), turn)
        with torch.autocast(x.device.type, enabled=False):
            codes = vae.quantize.codes(z)
            vectors = vae.quantize.embedding(codes).permute(0, 3, 1, 2)
        through = z + (vectors - z).detach()  # the gradient of a vector goes to its latent
        return vae.decoder(vae.post_quant_conv(through)).float(), z, vectors, codes

    def terms(self, latent: Sequence[Tensor], cfg: AutoencoderStage) -> dict[str, Tensor]:
        """Equation 3 of van den Oord et al. 2017."""
        z, vectors, _ = latent
        terms = {"commitment": cfg.commitment_weight * F.mse_loss(z, vectors.detach())}
        return terms if self.averages else terms | {"codebook": F.mse_loss(vectors, z.detach())}

    @torch.no_grad()
    def seen(self, latent: Sequence[Tensor], first: int, batch: int, rng: np.random.Generator) -> Tensor:
        """(K, 1 + 2C): of each vector how many latents it stands for, their sum, and the latent that it may begin again as.

        The last is drawn among those of the whole batch, and zero where another part of it has that one.
        """
        z, _, codes = latent
        count, places = self.whole[0].quantize.embedding.num_embeddings, codes[0].numel()
        z, codes = z.permute(0, 2, 3, 1).flatten(0, 2), codes.flatten()
        sums = z.new_zeros(count, 1 + z.shape[1]).index_add_(0, codes, torch.cat([torch.ones_like(z[:, :1]), z], 1))
        drawn = torch.from_numpy(rng.integers(batch * places, size=count) - first * places).to(z.device)
        mine = (drawn >= 0) & (drawn < len(z))
        return torch.cat([sums, torch.where(mine[:, None], z[drawn.clamp(0, len(z) - 1)], 0)], 1)

    @torch.no_grad()
    def learn(self, total: Tensor) -> dict[str, Tensor]:
        """The share of vectors that this batch uses, and the perplexity of their use."""
        counts, channels = total[:, 0], total.shape[1] // 2
        share = counts / counts.sum()
        told = {"used": (counts > 0).float().mean(), "perplexity": (-torch.special.xlogy(share, share).sum()).exp()}
        if self.averages:
            weight, before = self.whole[0].quantize.embedding.weight, self.usage * DECAY
            usage, usual = before + (1 - DECAY) * counts, counts.mean()
            moved = weight * before[:, None] + (1 - DECAY) * total[:, 1 : 1 + channels]
            dead = usage < DEAD * usual
            weight.copy_(torch.where(dead[:, None], total[:, 1 + channels :], moved / usage[:, None].clamp(min=1e-12)))
            self.usage.copy_(torch.where(dead, usual, usage))
        return told


def draw(seed: int, step: int, probability: float, height: int, width: int) -> list[int]:
    """Of a step, the height and width that its latents are resampled to, and by how many quarters they are turned.

    With 1 - `probability` all stay as they are; else one of a whole batch, so that it is one tensor on any process.
    """
    rng = keyed(seed, "autoencoder turn", step)
    if rng.random() >= probability:
        return [height, width, 0]
    scale = SMALLEST + (1 - SMALLEST) * rng.random()
    return [max(1, round(height * scale)), max(1, round(width * scale)), int(rng.integers(1, 4))]


def smallest(side: int) -> int:
    """What `draw` may make of a side."""
    return max(1, round(side * SMALLEST))


def turned(x: Tensor, turn: Sequence[int], factor: int = 1) -> Tensor:
    """Latents, or with the autoencoder's `factor` images, (B, C, h, w) made smaller and turned (Kouzelis et al. 2025, eq. 5)."""
    *size, quarters = turn
    size = [side * factor for side in size]
    if [*x.shape[2:]] != size:
        x = F.interpolate(x, size, mode="bilinear", antialias=factor > 1)
    return torch.rot90(x, quarters, (2, 3)) if quarters else x
