"""Stage 1: reconstruct images through a latent that is nearly a standard normal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinydiff.checkpoints import folder
from tinydiff.diffusion.noise import keyed
from tinydiff.errors import ModelError
from tinydiff.images import to_pixels, to_uint8
from tinydiff.measure.features import open_features
from tinydiff.models.autoencoder import Autoencoder, mean_and_std
from tinydiff.networks import VAE, network_of
from tinydiff.training.losses import autoencoder_loss, psnr
from tinydiff.training.run import Run
from tinydiff.training.task import PICTURES, Batch, Player, Task, Terms, counted


class Reconstruct(nn.Module):
    """Pixels (B, 3, H, W) and noise (B, C, h, w) to reconstructions, and the latents' means and deviations."""

    def __init__(self, vae: Autoencoder):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = mean_and_std(self.vae.encode(x).float())
        return self.vae.decode(mean + std * noise).float(), mean, std


class AutoencoderTask(Task):
    name = "autoencoder"
    publishes = "autoencoder"

    def __init__(self, run: Run):
        super().__init__(run)
        cfg, self.features = self.settings, None
        if cfg.perceptual_weight:
            place = {"device": run.runtime.device, "memory_format": torch.channels_last}
            self.features = open_features(cfg.features).to(**place)

    def state(self) -> dict[str, Any]:
        return {"features": self.features.digest} if self.features else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ModelError where the feature network is another one than the run was begun with."""
        begun = state.get("features")
        if self.features and begun not in (None, self.features.digest) and not self.run.claim.accept:
            problem = "not the feature network that the run was begun with; put that back, or use --accept-changes"
            raise ModelError(f"{self.features.name}: {problem}")

    def cast(self) -> dict[str, Player]:
        return {self.name: Player(self.model.vae, Reconstruct(self.model.vae), self.settings)}

    def batch(self, step: int, rows: range) -> Batch:
        """Pixels (B, 3, H, W) and the noise (B, C, h, w) of their latents."""
        pixels = to_pixels(self.data.batch(self.order(step)[rows.start : rows.stop]))
        d, seed = self.model.description, self.cfg.train.seed
        shape = (d.latent_channels, pixels.shape[2] // d.factor, pixels.shape[3] // d.factor)
        noise = np.stack([keyed(seed, "autoencoder", step, row).standard_normal(shape, np.float32) for row in rows])
        return {"pixels": torch.from_numpy(pixels), "noise": torch.from_numpy(noise)}

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, Terms]:
        x = batch["pixels"].to(memory_format=torch.channels_last)
        output, mean, std = self.players[player].network(x, batch["noise"])
        terms = autoencoder_loss(x, output, mean, std, self.settings)
        if self.features:
            terms["perceptual"] = self.settings.perceptual_weight * self.features.distance(x, output).mean()
        return torch.stack(list(terms.values())).sum(), {k: counted(v.detach()) for k, v in terms.items()}

    def publish(self, checkpoint: Path, path: Path) -> None:
        """The autoencoder's own folder, as `autoencoder.path` and diffusers open it."""
        table, tensors = self.model.configs[VAE], self.averaged(checkpoint)[VAE]
        folder.save_network(path, table, tensors, network_of(VAE, table).file, self.cfg)

    @torch.no_grad()
    def pictures(self) -> tuple[np.ndarray, dict[str, float]]:
        """Images above their reconstructions, uint8 (2 n, H, W, 3), and the reconstruction's PSNR in dB."""
        alike = np.flatnonzero(self.data.bucket == self.data.bucket[self.order(0)[0]])  # a grid is of one size
        pixels = to_pixels(self.data.batch(alike[np.arange(PICTURES) * len(alike) // PICTURES]))
        x, vae = torch.from_numpy(pixels), self.model.vae
        parts = (
            part.to(self.run.runtime.device, memory_format=torch.channels_last) for part in x.split(self.settings.rows)
        )
        output = torch.cat([vae.decode(mean_and_std(vae.encode(part).float())[0]).float().cpu() for part in parts])
        return to_uint8(np.concatenate([pixels, output.numpy()])), {"psnr": psnr(x, output)}
