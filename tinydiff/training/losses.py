"""The losses of both stages, as plain functions of tensors."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tinydiff.measure.distances import decibels
from tinydiff.stages import AutoencoderStage as Settings


def autoencoder_loss(pixels: Tensor, output: Tensor, latent: dict[str, Tensor], cfg: Settings) -> dict[str, Tensor]:
    """Weighted terms, whose sum is the loss: absolute and squared error, error of edges and colours, those of the `latent`.

    pixels, output (B, 3, H, W) in [-1, 1].
    """
    error = output - pixels
    terms = {"l1": error.abs().mean(), **latent}
    if cfg.l2_weight:
        terms["l2"] = cfg.l2_weight * (error**2).mean()
    if cfg.edge_weight:
        terms["edges"] = cfg.edge_weight * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    if cfg.chroma_weight:
        terms["chroma"] = cfg.chroma_weight * chroma(error).abs().mean()
    return terms


def kl(mean: Tensor, std: Tensor) -> Tensor:
    """The divergence of N(mean, std) from N(0, 1), the mean over latent values (Kingma & Welling 2014, appendix B)."""
    return (0.5 * (mean**2 + std**2 - 1) - std.log()).mean()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss on its logits of images and of reconstructions (Lim & Ye 2017, eq. 3; VQGAN halves it)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def balance(reconstruction: Tensor, adversarial: Tensor) -> float:
    """The adversarial loss's weight: the ratio of gradients' norms at the decoder's last layer (Esser et al. 2021, eq. 7)."""
    return min(reconstruction.norm().item() / (adversarial.norm().item() + 1e-4), 1e4)


def chroma(rgb: Tensor) -> Tensor:
    """The colour differences Cb and Cr (B, 2, H, W) of ITU-R BT.601, section 2.5; linear, so an error's are its errors."""
    r, g, b = rgb.unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([(b - y) / 1.772, (r - y) / 1.402], dim=1)


def denoising_losses(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Each image's weighted mean squared error (B,), from output, target (B, C, h, w) and weight (B,)."""
    return F.mse_loss(output.float(), target, reduction="none").mean(dim=(1, 2, 3)) * weight


def contrastive_loss(logits: Tensor, match: Tensor) -> Tensor:
    """Symmetric cross-entropy of images (rows) and texts (columns) of a batch (Radford et al. 2021, figure 3): (B, B) each.

    `match` is 1 where a text is right for an image, else 0. What is right is shared out evenly over all that match, so that
    two equal captions are not each other's negatives; a batch without any has the paper's loss.
    """
    by_image = F.cross_entropy(logits, match / match.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, (match / match.sum(0)).T)
    return (by_image + by_text) / 2


def loss_weight(alpha: np.ndarray, sigma: np.ndarray, prediction: str, minimised: str, gamma: float = 0) -> np.ndarray:
    """Weights of a loss on `prediction` that make it the loss of the prediction `minimised`, of the same estimate of x0.

    With a `gamma` they give the squared error of x0 the weight min(SNR, gamma) (Hang et al. 2023, section 3.4).
    """
    if not gamma and minimised in ("own", prediction):
        return np.ones_like(alpha)
    snr = (alpha / sigma) ** 2
    of_x0 = {  # the weight of the squared error of x0 in a plain loss on the prediction
        "epsilon": snr,
        "sample": np.ones_like(snr),
        "v": ((alpha**2 + sigma**2) / sigma) ** 2,
        "flow": ((alpha + sigma) / sigma) ** 2,
    }
    wanted = np.minimum(snr, gamma) if gamma else of_x0[minimised]
    return wanted / np.maximum(of_x0[prediction], 1e-12)


def pick_level(u: float, normal: float, density: str, count: int) -> int:
    """An index into `count` training levels, from a uniform number `u` and a `normal` one.

    "high_noise" has density 2t on t in [0, 1]: three quarters of the draws are in the noisier half, which decides an
    image's layout. "logit_normal" is the sigmoid of the normal one (Esser et al. 2024, section 3.1).
    """
    share = {"uniform": u, "high_noise": u**0.5, "logit_normal": 1 / (1 + math.exp(-normal))}[density]
    return min(int(share * count), count - 1)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], clipped as when saved."""
    mse = torch.mean((a.clamp(-1, 1) - b.clamp(-1, 1)) ** 2).item()
    return decibels(mse)
