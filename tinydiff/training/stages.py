"""The two things that are trained, as tasks the loop can run: an autoencoder, then a text encoder with a denoiser.

A task owns its network and knows how to make the batch of (step, rows), its loss, and pictures of what it has learnt. All
randomness is keyed by (seed, stream, step, row), so nothing but weights needs saving, and no process or thread has any.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tinydiff import config
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.description import described
from tinydiff.checkpoints.folder import Model
from tinydiff.data.dataset import Images, Order
from tinydiff.data.embeddings import TextEmbeddings
from tinydiff.data.latents import Latents
from tinydiff.diffusion.noise import keyed
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.schedules import training_levels
from tinydiff.images import to_pixels, to_uint8
from tinydiff.models.autoencoder import Autoencoder, mean_and_std
from tinydiff.pipeline import Request, generate
from tinydiff.training.losses import autoencoder_loss, denoising_losses, pick_level, psnr, snr_weight
from tinydiff.training.state import Blocks

BANDS = 4  # of noise levels, whose losses are told apart
PICTURES = 16
Terms = dict[str, Tensor]  # (2,) each: a sum and how many were summed


class Task(Protocol):
    """What the loop needs of a stage. `network` is what `loss` calls: `module`, or what spreads it over processes."""

    name: str
    captions: list[str]
    data: Images
    order: Order
    network: nn.Module

    @property
    def module(self) -> nn.Module: ...
    @property
    def parts(self) -> list[nn.Module]: ...
    @property
    def stage(self) -> config.Stage: ...

    def batch(self, step: int, rows: range) -> tuple[Tensor, ...]: ...
    def loss(self, *batch: Tensor) -> tuple[Tensor, Terms]: ...
    def pictures(self) -> tuple[np.ndarray, dict[str, float]]: ...
    def publish(self, checkpoint: Path, path: Path) -> None: ...


class Reconstruct(nn.Module):
    """Pixels (B, 3, H, W) and noise (B, C, h, w) to reconstructions, and the latents' means and deviations."""

    def __init__(self, vae: Autoencoder):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = mean_and_std(self.vae.encode(x).float())
        return self.vae.decode(mean + std * noise).float(), mean, std


class AutoencoderTask:
    """Stage 1: reconstruct images through a latent that is nearly a standard normal."""

    name = "autoencoder"
    captions: list[str] = []  # noqa: RUF012
    parts: list[nn.Module] = []  # noqa: RUF012  small enough to be whole on every process

    def __init__(self, cfg: config.Config, model: Model, data: Images, device: torch.device):
        self.cfg, self.stage, self.module, self.data, self.device = cfg, cfg.train.autoencoder, model.vae, data, device
        self.network: nn.Module = Reconstruct(model.vae)
        self.order = Order(data.weights(), cfg.train.seed, data.bucket, self.stage.batch_size)

    def batch(self, step: int, rows: range) -> tuple[Tensor, ...]:
        """Pixels (B, 3, H, W) and the noise (B, C, h, w) of their latents."""
        pixels = to_pixels(self.data.batch(self.order(step)[rows.start : rows.stop]))
        factor = 2 ** (len(self.cfg.autoencoder.block_out_channels) - 1)
        shape = (self.cfg.autoencoder.latent_channels, pixels.shape[2] // factor, pixels.shape[3] // factor)
        seed = self.cfg.train.seed
        noise = np.stack([keyed(seed, "autoencoder", step, row).standard_normal(shape, np.float32) for row in rows])
        return torch.from_numpy(pixels), torch.from_numpy(noise)

    def loss(self, *batch: Tensor) -> tuple[Tensor, Terms]:
        x, noise = batch
        x = x.to(memory_format=torch.channels_last)
        output, mean, std = self.network(x, noise)
        terms = autoencoder_loss(x, output, mean, std, self.stage)
        return torch.stack(list(terms.values())).sum(), {k: counted(v.detach()) for k, v in terms.items()}

    @torch.no_grad()
    def pictures(self) -> tuple[np.ndarray, dict[str, float]]:
        """Images above their reconstructions, uint8 (2 n, H, W, 3), and the reconstruction's PSNR in dB."""
        alike = np.flatnonzero(self.data.bucket == self.data.bucket[self.order(0)[0]])  # a grid is of one size
        pixels = to_pixels(self.data.batch(alike[np.arange(PICTURES) * len(alike) // PICTURES]))
        x = torch.from_numpy(pixels).to(self.device, memory_format=torch.channels_last)
        output = self.module.decode(mean_and_std(self.module.encode(x).float())[0]).float()
        both = np.concatenate([pixels, output.cpu().numpy()])
        return to_uint8(both), {"psnr": psnr(x, output)}

    def publish(self, checkpoint: Path, path: Path) -> None:
        """An autoencoder alone is no model."""


def counted(value: Tensor, count: float = 1.0) -> Tensor:
    return torch.stack([value.double(), value.new_tensor(count, dtype=torch.float64)])


class Denoise(nn.Module):
    """Text encoder and denoiser as the one network that stage 2 trains; an encoder that is kept as it is stands beside it."""

    def __init__(self, model: Model):
        super().__init__()
        self.denoiser, self.fixed = model.denoiser, []
        if any(p.requires_grad for p in model.text_encoder.parameters()):
            self.text_encoder = model.text_encoder
        else:
            self.fixed = [model.text_encoder]  # in a list, where a module's weights are nobody's

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """`text` is token ids (B, T), or vectors (B, T, D) that have been computed before."""
        if not text.is_floating_point():
            text = (self.fixed[0] if self.fixed else self.text_encoder)(text)[0]
        return self.denoiser(x, t, text)


class DenoiserTask:
    """Stage 2: denoise cached latents under their captions, or under vectors of the captions that are cached too."""

    name = "denoiser"

    def __init__(
        self,
        cfg: config.Config,
        model: Model,
        data: Images,
        latents: Latents,
        device: torch.device,
        texts: TextEmbeddings | None = None,
    ):
        self.cfg, self.stage, self.model, self.data, self.device = cfg, cfg.train.denoiser, model, data, device
        self.latents, self.texts = latents, texts
        self.module = Denoise(model)
        self.network: nn.Module = self.module
        names = {p: name for name, p in self.module.named_parameters()}
        self.trained = {  # of each folder its parameters, those that blocks share under each block, by their names here
            name: {k: names[p] for k, p in part.named_parameters(remove_duplicate=False) if p in names}
            for name, part in model.parts().items()
        }
        self.parts: list[nn.Module] = list(self.module.children())
        weights = data.weights() * latents.valid
        self.order = Order(weights, cfg.train.seed, data.bucket, self.stage.batch_size)
        d = cfg.diffusion
        self.levels = training_levels(d.schedule, d.num_train_timesteps, d.shift, d.zero_terminal_snr)
        self.prediction = PREDICTIONS[cfg.diffusion.prediction]
        self.ids: dict[str, np.ndarray] = {}
        count = len(data.source)
        self.captions = [data.source.captions(i * count // PICTURES)[0] for i in range(PICTURES)]

    def encode(self, caption: str) -> np.ndarray:
        """Token ids (T,) of a caption, remembered while there is room."""
        if caption not in self.ids:
            if len(self.ids) >= 200_000:
                self.ids.clear()
            self.ids[caption] = self.model.tokenizer.encode([caption])[0]
        return self.ids[caption]

    def draw(self, step: int, row: int, image: int, shape: tuple[int, ...]) -> tuple[int, str, np.ndarray]:
        """(level, caption, normals (2, C, h, w)) of one row of the batch, which holds `image`."""
        rng, cfg = keyed(self.cfg.train.seed, "denoiser", step, row), self.cfg.diffusion
        u, dropped, which = rng.random(3)
        level = pick_level(u, float(rng.standard_normal()), cfg.timestep_density, len(self.levels))
        normals = rng.standard_normal((2, *shape), np.float32)
        if cfg.offset_noise:
            normals[1] += cfg.offset_noise * rng.standard_normal((shape[0], 1, 1), np.float32)
        captions = self.data.source.captions(image % len(self.data.source))
        captions = captions[:1] if self.cfg.text_encoder.kind == "class" else captions  # the first one is the label
        return level, "" if dropped < cfg.caption_dropout else captions[self.choose(which, len(captions))], normals

    @staticmethod
    def choose(u: float, count: int) -> int:
        """Half of the time the main caption, else one of the others."""
        return 0 if count == 1 or u < 0.5 else 1 + int((u - 0.5) * 2 * (count - 1))

    def batch(self, step: int, rows: range) -> tuple[Tensor, ...]:
        """x_t (B, C, h, w), target, times (B,), text (B, T) or (B, T, D), loss weights (B,), bands of noise (B,)."""
        chosen = self.order(step)[rows.start : rows.stop]
        mean, std = (part * self.latents.scaling_factor for part in self.latents.rows(chosen))
        drawn = [self.draw(step, row, int(i), mean.shape[1:]) for row, i in zip(rows, chosen, strict=True)]
        picked, captions, normals = zip(*drawn, strict=True)
        alpha, sigma, t = np.array([self.levels[i] for i in picked]).T  # (B,) each
        weight = snr_weight(alpha, sigma, self.cfg.diffusion.prediction, self.cfg.diffusion.min_snr_gamma)
        noise = torch.from_numpy(np.stack(normals))
        x0 = mean + std * noise[:, 0]
        a, s, times, w = (torch.from_numpy(v.astype(np.float32)) for v in (alpha, sigma, t, weight))
        a, s = a[:, None, None, None], s[:, None, None, None]
        text = (
            self.texts.rows(captions) if self.texts else torch.from_numpy(np.stack([self.encode(c) for c in captions]))
        )
        target, bands = self.prediction.target(x0, noise[:, 1], a, s), torch.tensor(picked) * BANDS // len(self.levels)
        return x0 * a + noise[:, 1] * s, target, times, text, w, bands

    def loss(self, *batch: Tensor) -> tuple[Tensor, Terms]:
        x, target, times, text, weight, bands = batch
        output = self.network(x.to(memory_format=torch.channels_last), times, text)
        each = denoising_losses(output, target, weight)  # (B,)
        inside = torch.nn.functional.one_hot(bands, BANDS).double()  # (B, BANDS)
        sums = torch.stack([each.detach().double() @ inside, inside.sum(0)], dim=1)  # (BANDS, 2)
        return each.mean(), {f"loss_{i}": sums[i] for i in range(BANDS)}

    def pictures(self, steps: int = 12) -> tuple[np.ndarray, dict[str, float]]:
        """Generated images, uint8 (16, H, W, 3), of captions spread over the data."""
        d, g = described(self.cfg, self.model.scaling_factor), self.cfg.generate
        steps = min(steps, len(self.levels))
        request = Request(steps, g.cfg_scale, g.sampler, g.schedule, d.size, d.size)
        seeds = range(self.cfg.train.seed, self.cfg.train.seed + PICTURES)
        return generate(TorchBackend(self.model, d), self.captions, seeds, request), {}

    def publish(self, checkpoint: Path, path: Path) -> None:
        """The model folder at `path` with the averaged weights of a checkpoint."""
        averaged = dict(Blocks(checkpoint, "average").whole())

        def tensors(name: str, part: nn.Module) -> Mapping[str, Tensor]:
            return {k: averaged[mine] for k, mine in self.trained[name].items()} or part.state_dict()

        folder.save(path, self.model, self.cfg, replace=True, tensors_of=tensors)
