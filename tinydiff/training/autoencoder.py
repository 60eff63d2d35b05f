"""Stage 1: reconstruct images through a latent that is nearly a standard normal; a critic judges, where one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinydiff.charts import HELD
from tinydiff.checkpoints import folder
from tinydiff.diffusion.noise import keyed
from tinydiff.errors import UsageError
from tinydiff.images import to_pixels, to_uint8
from tinydiff.measure.distances import decibels
from tinydiff.measure.features import open_features
from tinydiff.models.critic import Critic
from tinydiff.networks import VAE, autoencoder_of, network_of
from tinydiff.networks.network import imported
from tinydiff.training.losses import autoencoder_loss, balance, hinge, psnr
from tinydiff.training.reconstruct import draw, smallest, turned
from tinydiff.training.run import Run
from tinydiff.training.task import PICTURES, Batch, Player, Task, Terms, counted
from tinydiff.training.validation import BATCHES, error_of_mean, over


class AutoencoderTask(Task):
    name = "autoencoder"
    publishes = "autoencoder"

    def __init__(self, run: Run):
        super().__init__(run)
        cfg, self.features = self.settings, None
        self.balance = 0.0  # weighs the adversarial loss, as the update before found it
        self.drawn = dict[int, tuple[Tensor, Tensor]]()  # by first row, what the critic is to tell apart
        self.partial = dict[str, list[Tensor]]()
        if cfg.perceptual_weight:
            self.features = open_features(cfg.features)
            run.runtime.placed(self.features)
        self.refuse_small()

    def refuse_small(self) -> None:
        """Raises UsageError where images, as small as they become, are too small for a network that judges them."""
        cfg, factor = self.settings, self.model.description.factor
        sides = (min(size) // factor for size in self.data.sizes)
        side = factor * min(smallest(side) if cfg.equivariance else side for side in sides)
        if "critic" in self.players and side < 2**cfg.critic_halvings:
            made = ", as equivariance makes them" if cfg.equivariance else ""
            problem = f"{cfg.critic_halvings} leave nothing of images of {side} pixels{made}"
            fix = "set less, or " if side > 2 else ""
            raise UsageError(f"train.{self.name}.critic_halvings: {problem}; {fix}raise data.resolution")
        if self.features:
            self.features.maps(torch.zeros(1, 3, side, side, device=self.run.runtime.device))

    def state(self) -> dict[str, Any]:
        features = {"features": self.features.digest} if self.features else {}
        return features | ({"balance": self.balance} if "critic" in self.players else {})

    def restore(self, state: dict[str, Any]) -> None:
        self.balance = state.get("balance", 0.0)
        if self.features:
            self.same_features(state, self.features.digest)

    def cast(self) -> dict[str, Player]:
        cfg, row = self.settings, autoencoder_of(self.model.configs[VAE])
        self.trained = imported(row.learner)(self.model.vae, cfg)
        players = {self.name: Player(self.trained, self.trained, cfg)}
        if cfg.adversarial_weight:
            torch.manual_seed(self.cfg.train.seed)
            critic = Critic(cfg.critic_width, cfg.critic_halvings)
            self.run.runtime.placed(critic)
            players["critic"] = Player(critic, critic, replace(cfg, lr=cfg.critic_lr))
        return players

    def batch(self, step: int, rows: range) -> Batch:
        """Pixels (B, 3, H, W), the noise (B, C, h, w) of their latents, how these are `turned` (B, 3), step and row (B, 2)."""
        pixels = to_pixels(self.data.batch(self.order(step)[rows.start : rows.stop]))
        d, seed = self.model.description, self.cfg.train.seed
        shape = (d.latent_channels, pixels.shape[2] // d.factor, pixels.shape[3] // d.factor)
        noise = np.stack([keyed(seed, "autoencoder", step, row).standard_normal(shape, np.float32) for row in rows])
        turn = draw(seed, step, self.settings.equivariance, *shape[1:])
        numbers = {"turn": torch.tensor([turn] * len(rows)), "place": torch.tensor([[step, row] for row in rows])}
        return {"pixels": torch.from_numpy(pixels), "noise": torch.from_numpy(noise), **numbers}

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, Terms]:
        judged = "critic" in self.players and int(batch["place"][0, 0]) >= self.settings.adversarial_start
        if player == "critic":
            return self.judgement(batch) if judged else (torch.zeros(()), {})
        x, turn = batch["pixels"].to(memory_format=torch.channels_last), batch["turn"][0].tolist()
        output, *latent = self.players[player].network(x, batch["noise"], turn)
        x = turned(x, turn, self.model.description.factor)
        terms = autoencoder_loss(x, output, self.trained.terms(latent, self.settings), self.settings)
        told = self.counts(latent, batch)
        if self.features:
            terms["perceptual"] = self.settings.perceptual_weight * self.features.distance(x, output).mean()
        loss = torch.stack(list(terms.values())).sum()
        if judged:
            self.drawn[int(batch["place"][0, 1])] = x, output.detach()
            adversarial = -self.players["critic"].module(output).float().mean()
            terms["adversarial"] = self.settings.adversarial_weight * self.balance * adversarial
            self.weigh(loss, adversarial)
            loss = loss + terms["adversarial"]
        return loss, {k: counted(v.detach()) for k, v in (terms | told).items()}

    def counts(self, latent: Sequence[Tensor], batch: Batch) -> dict[str, Tensor]:
        """What the codebook of a vq learns of the whole batch, once its last part is there, and says of it."""
        rng = keyed(self.cfg.train.seed, "autoencoder codes", int(batch["place"][0, 0]))
        seen = self.trained.seen(latent, int(batch["place"][0, 1]), self.settings.batch_size, rng)
        if seen is None or not torch.is_grad_enabled() or (total := self.summed("codes", seen)) is None:
            return {}
        return self.trained.learn(total)

    def judgement(self, batch: Batch) -> tuple[Tensor, Terms]:
        """The critic's loss on images and the reconstructions of this update: all of both at once, since DDP expects one call."""
        real, fake = (
            self.players["critic"].network(torch.cat(self.drawn.pop(int(batch["place"][0, 1])))).float().chunk(2)
        )
        told = {"real": real.detach().mean(), "fake": fake.detach().mean(), "balance": real.new_tensor(self.balance)}
        return hinge(real, fake), {k: counted(v) for k, v in told.items()}

    def weigh(self, loss: Tensor, adversarial: Tensor) -> None:
        """Set the next update's balance by the whole batch's gradients of both losses at the decoder's last layer.

        That of this update would be known only after its last part, on all processes.
        """
        if not torch.is_grad_enabled():
            return  # one looks for what spoilt an update
        gradients = [torch.autograd.grad(each, self.trained.last, retain_graph=True)[0] for each in (loss, adversarial)]
        total = self.summed("balance", torch.stack(gradients).float())
        if total is not None and total.isfinite().all():
            self.balance = balance(*total / len(self.rows) / self.run.world.size)

    def summed(self, name: str, part: Tensor) -> Tensor | None:
        """The sum of what every part of a batch on every process gives under a name, once its last part has been given."""
        parts = self.partial.setdefault(name, [])
        parts.append(part)
        return self.run.world.sum(torch.stack(self.partial.pop(name)).sum(0)) if len(parts) == len(self.rows) else None

    def publish(self, checkpoint: Path, path: Path) -> None:
        """The autoencoder's own folder, as `autoencoder.path` and diffusers open it."""
        table, tensors = self.model.configs[VAE], self.averaged(checkpoint)[VAE]
        folder.save_network(path, table, tensors, network_of(VAE, table).file, self.cfg)

    @torch.no_grad()
    def pictures(self) -> tuple[np.ndarray, dict[str, float]]:
        """Images above their reconstructions, uint8 (2 n, H, W, 3), and the reconstruction's PSNR in dB."""
        alike = np.flatnonzero(self.data.bucket == self.data.bucket[self.order(0)[0]])  # a grid is of one size
        pixels = to_pixels(self.data.batch(alike[np.arange(PICTURES) * len(alike) // PICTURES]))
        x = torch.from_numpy(pixels)
        output = torch.cat([self.reconstructed(part)[1].cpu() for part in x.split(self.settings.rows)])
        return to_uint8(np.concatenate([pixels, output.numpy()])), {"psnr": psnr(x, output)}

    def reconstructed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) on the device, and through the mean of their latents."""
        x = pixels.to(self.run.runtime.device, memory_format=torch.channels_last)
        return x, self.model.vae.decode(self.model.vae.distribution(x)[0]).float()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Of held-out images: absolute error and its standard error, PSNR in dB, perceptual distance by a feature network."""
        if not (held := self.run.held):
            return {}
        rows = min(len(held), BATCHES * self.settings.batch_size)
        values = over(self.run.world, held.parts(rows, self.settings.rows), self.errors)
        values = values[np.isfinite(values).all(1)]  # of those that could be read
        if not len(values):
            return {}
        l1, mse, *distance = values.mean(0).tolist()
        told = {"l1": l1, "error": error_of_mean(values[:, 0]), "psnr": decibels(mse)}
        return {f"{HELD}{k}": v for k, v in (told | dict(zip(["perceptual"], distance, strict=False))).items()}

    def errors(self, rows: np.ndarray) -> np.ndarray:
        """Absolute error, squared error and perceptual distance (B, 3), or (B, 2), of held-out images; NaN where unreadable."""
        held, features = self.run.held, self.features or self.run.features
        assert held
        pixels, readable = held.images.read(held.indices[rows])
        x, output = self.reconstructed(torch.from_numpy(to_pixels(pixels)))
        clipped = output.clamp(-1, 1)
        found = [(output - x).abs().mean((1, 2, 3)), (clipped - x).square().mean((1, 2, 3))]
        values = torch.stack([*found, *([features.distance(x, clipped)] if features else [])], dim=1)
        return np.where(readable[:, None], values.double().cpu().numpy(), np.nan)
