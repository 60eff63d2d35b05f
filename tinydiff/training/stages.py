"""The two things that are trained, as tasks the loop can run: an autoencoder, then a text encoder with a denoiser.

A task owns its network and knows how to make the loss of (step, rows of the batch) and pictures of what it has learnt.
All randomness is keyed by (seed, stream, step, row), so nothing but weights needs saving.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tinydiff import config, images
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints.description import described
from tinydiff.checkpoints.folder import Model
from tinydiff.data.dataset import Images, Order
from tinydiff.diffusion.noise import keyed
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.schedules import training_levels
from tinydiff.models.autoencoder import mean_and_std
from tinydiff.pipeline import Request, generate
from tinydiff.training.losses import autoencoder_loss, denoising_loss, pick_level, psnr, snr_weight


class Task(Protocol):
    """What the loop needs of a stage."""

    name: str
    captions: list[str]

    @property
    def module(self) -> nn.Module: ...
    @property
    def stage(self) -> config.Stage: ...

    def loss(self, step: int, rows: range) -> tuple[Tensor, dict[str, Tensor]]: ...
    def pictures(self) -> tuple[np.ndarray, dict[str, float]]: ...


class AutoencoderTask:
    """Stage 1: reconstruct images through a latent that is nearly a standard normal."""

    name = "autoencoder"
    captions: list[str] = []  # noqa: RUF012

    def __init__(self, cfg: config.Config, model: Model, data: Images, device: torch.device):
        self.cfg, self.stage, self.module, self.data, self.device = cfg, cfg.train.autoencoder, model.vae, data, device
        self.order = Order(data.weights(), cfg.train.seed)

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) and the noise (B, C, h, w) of their latents."""
        n, seed = self.stage.batch_size, self.cfg.train.seed
        pixels = images.to_pixels(np.stack([self.data[self.order(step * n + row)] for row in rows]))
        side = self.cfg.data.resolution // 2 ** (len(self.cfg.autoencoder.block_out_channels) - 1)
        shape = (self.cfg.autoencoder.latent_channels, side, side)
        noise = np.stack([keyed(seed, "autoencoder", step, row).standard_normal(shape, np.float32) for row in rows])
        x = torch.from_numpy(pixels).to(self.device, memory_format=torch.channels_last)
        return x, torch.from_numpy(noise).to(self.device)

    def loss(self, step: int, rows: range) -> tuple[Tensor, dict[str, Tensor]]:
        x, noise = self.batch(step, rows)
        mean, std = mean_and_std(self.module.encode(x).float())
        output = self.module.decode(mean + std * noise).float()
        terms = autoencoder_loss(x, output, mean, std, self.stage)
        return torch.stack(list(terms.values())).sum(), terms

    @torch.no_grad()
    def pictures(self) -> tuple[np.ndarray, dict[str, float]]:
        """Images above their reconstructions, uint8 (2 n, H, W, 3), and the reconstruction's PSNR in dB."""
        pixels = images.to_pixels(np.stack([self.data[self.order(i)] for i in range(16)]))
        x = torch.from_numpy(pixels).to(self.device, memory_format=torch.channels_last)
        output = self.module.decode(mean_and_std(self.module.encode(x).float())[0]).float()
        both = np.concatenate([pixels, output.cpu().numpy()])
        return images.to_uint8(both), {"psnr": psnr(x, output)}


class Denoise(nn.Module):
    """Text encoder and denoiser as the one network that stage 2 trains; an encoder that is kept as it is stands beside it."""

    def __init__(self, model: Model):
        super().__init__()
        self.denoiser, self.fixed = model.denoiser, []
        if any(p.requires_grad for p in model.text_encoder.parameters()):
            self.text_encoder = model.text_encoder
        else:
            self.fixed = [model.text_encoder]  # in a list, where a module's weights are nobody's

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        encoder = self.fixed[0] if self.fixed else self.text_encoder
        return self.denoiser(x, t, encoder(ids)[0])


class DenoiserTask:
    """Stage 2: denoise cached latents under their captions."""

    name = "denoiser"
    PICTURES = 16

    def __init__(
        self, cfg: config.Config, model: Model, data: Images, latents: tuple[Tensor, Tensor], device: torch.device
    ):
        self.cfg, self.stage, self.model, self.data, self.device = cfg, cfg.train.denoiser, model, data, device
        self.module = Denoise(model)
        self.mean, self.std = (t * model.scaling_factor for t in latents)
        self.order = Order(data.weights(), cfg.train.seed)
        d = cfg.diffusion
        self.levels = training_levels(d.schedule, d.num_train_timesteps, d.shift, d.zero_terminal_snr)
        self.prediction = PREDICTIONS[cfg.diffusion.prediction]
        self.ids: dict[str, np.ndarray] = {}
        count = len(data.source)
        self.captions = [data.source.captions(i * count // self.PICTURES)[0] for i in range(self.PICTURES)]

    def encode(self, caption: str) -> np.ndarray:
        """Token ids (T,) of a caption, remembered."""
        if caption not in self.ids:
            self.ids[caption] = self.model.tokenizer.encode([caption])[0]
        return self.ids[caption]

    def draw(self, step: int, row: int) -> tuple[int, int, np.ndarray, np.ndarray]:
        """(image, level, token ids (T,), normals (2, C, h, w)) of one row of the batch."""
        rng, cfg = keyed(self.cfg.train.seed, "denoiser", step, row), self.cfg.diffusion
        u, dropped, which = rng.random(3)
        level = pick_level(u, float(rng.standard_normal()), cfg.timestep_density, len(self.levels))
        normals = rng.standard_normal((2, *self.mean.shape[1:]), np.float32)
        if cfg.offset_noise:
            normals[1] += cfg.offset_noise * rng.standard_normal((self.mean.shape[1], 1, 1), np.float32)
        image = self.order(step * self.stage.batch_size + row)
        captions = self.data.source.captions(image % len(self.data.source))
        captions = captions[:1] if self.cfg.text_encoder.kind == "class" else captions  # the first one is the label
        caption = "" if dropped < cfg.caption_dropout else captions[self.choose(which, len(captions))]
        return image, level, self.encode(caption), normals

    @staticmethod
    def choose(u: float, count: int) -> int:
        """Half of the time the main caption, else one of the others."""
        return 0 if count == 1 or u < 0.5 else 1 + int((u - 0.5) * 2 * (count - 1))

    def loss(self, step: int, rows: range) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, picked, ids, normals = (np.stack(c) for c in zip(*(self.draw(step, r) for r in rows), strict=True))
        alpha, sigma, t = np.array([self.levels[i] for i in picked]).T  # (B,) each
        weight = snr_weight(alpha, sigma, self.cfg.diffusion.prediction, self.cfg.diffusion.min_snr_gamma)
        noise = torch.from_numpy(normals)
        x0 = self.mean[chosen] + self.std[chosen] * noise[:, 0]
        a, s, times, w = (torch.from_numpy(v.astype(np.float32)) for v in (alpha, sigma, t, weight))
        a, s = a[:, None, None, None], s[:, None, None, None]
        x = (x0 * a + noise[:, 1] * s).to(self.device, memory_format=torch.channels_last)
        target = self.prediction.target(x0, noise[:, 1], a, s).to(self.device)
        output = self.module(x, times.to(self.device), torch.from_numpy(ids).to(self.device))
        return denoising_loss(output, target, w.to(self.device)), {}

    def pictures(self, steps: int = 12) -> tuple[np.ndarray, dict[str, float]]:
        """Generated images, uint8 (16, H, W, 3), of captions spread over the data."""
        d, g = described(self.cfg, self.model.scaling_factor), self.cfg.generate
        steps = min(steps, len(self.levels))
        request = Request(steps, g.cfg_scale, g.sampler, g.schedule, d.size, d.size)
        seeds = range(self.cfg.train.seed, self.cfg.train.seed + self.PICTURES)
        return generate(TorchBackend(self.model, d), self.captions, seeds, request), {}
