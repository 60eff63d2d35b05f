"""Stage 2: denoise latents under their captions, with the text encoders that are not frozen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints.folder import Model
from tinydiff.condition import Condition, joined, of_size
from tinydiff.diffusion.noise import keyed
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.errors import ModelError
from tinydiff.measure.features import open_features
from tinydiff.models.attention import tokens as as_tokens
from tinydiff.networks import denoiser_in, network_of
from tinydiff.networks.network import HIDDEN, named
from tinydiff.pipeline import Request, generate
from tinydiff.system import shown
from tinydiff.text.labels import one_hot
from tinydiff.training import encoding
from tinydiff.training.encoding import learns
from tinydiff.training.losses import denoising_losses, loss_weight, pick_level
from tinydiff.training.run import Run
from tinydiff.training.task import PICTURES, Batch, Player, Task, Terms, counted

BANDS = 4  # of noise levels, whose losses are told apart
LEAST = 32  # pixels a side that are enough for any feature network
HIDDEN_WIDTH = 512  # of the perceptron that reads features off the denoiser


class Denoise(nn.Module):
    """The denoiser and the text encoders that learn, as one network; frozen encoders are kept outside.

    `aligned`: channels of features that a perceptron reads off the denoiser's middle, 0 for none. It is in no model folder.
    """

    def __init__(self, model: Model, aligned: int = 0):
        super().__init__()
        self.denoiser, self.wanted = model.denoiser, model.description.conditions
        for name, encoder in model.text_encoders.items():
            if learns(encoder):
                self.add_module(name, encoder)
        folder = denoiser_in(model.configs)
        row: Any = network_of(folder, model.configs[folder])
        self.middle, width = row.middle(row.complete(model.configs[folder]))
        if aligned:
            inner = [nn.Linear(width, HIDDEN_WIDTH), nn.SiLU(), nn.Linear(HIDDEN_WIDTH, HIDDEN_WIDTH), nn.SiLU()]
            self.alignment = nn.Sequential(*inner, nn.Linear(HIDDEN_WIDTH, aligned))

    def forward(
        self, sample: Tensor, timestep: Tensor, tokens: dict[str, Tensor], condition: Condition
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction (B, C, h, w), and where features are aligned also what is read of them (B, T, `aligned`).

        `tokens`: ids (B, T) for each text encoder that learns; `condition`: what else the denoiser is told.
        """
        said = joined([named(self.get_submodule(name)(ids)) for name, ids in tokens.items()], self.wanted, torch.cat)
        if not hasattr(self, "alignment"):
            return self.denoiser(sample, timestep, **said, **condition)
        middle = list[Tensor]()
        seen = self.denoiser.get_submodule(self.middle).register_forward_hook(lambda *call: middle.append(call[-1]))
        try:
            output = self.denoiser(sample, timestep, **said, **condition)
        finally:
            seen.remove()
        return output, self.alignment(as_tokens(middle[0]) if middle[0].ndim == 4 else middle[0])


class DenoiserTask(Task):
    name = "denoiser"

    @classmethod
    def check(cls, settings: Any) -> None:
        if encoding.alignment(settings):
            open_features(settings.features).maps(torch.zeros(1, 3, LEAST, LEAST))

    def __init__(self, run: Run):
        run.model.vae.requires_grad_(False).eval()
        self.latents, self.texts = encoding.images(run), encoding.captions(run)
        self.maps = encoding.maps(run, run.cfg.train.stage(self.name))
        run.model = run.model if run.model.opened else run.model.scaled(self.latents.scaling_factor)
        self.description = run.model.description
        self.levels, self.prediction = self.description.schedule, PREDICTIONS[self.description.prediction]
        count = len(run.data.source)
        self.captions = [run.data.source.captions(i * count // PICTURES)[0] for i in range(PICTURES)]  # type: ignore[misc]
        super().__init__(run)
        self.dropout = self.cfg.diffusion.caption_dropout
        tokenizers = self.model.tokenizers
        self.encode = lru_cache(200_000)(lambda name, caption: tokenizers[name].encode([caption])[0])  # ids (T,)

    def state(self) -> dict[str, Any]:
        told = {"frozen_text": self.texts.digest} if self.texts else {}
        told |= {"features": self.maps.digest} if self.maps else {}
        return {"scaling_factor": self.model.scaling_factor, **told}

    def restore(self, state: dict[str, Any]) -> None:
        """Other data have other latents, which are scaled as those that the denoiser has learnt.

        Raises ModelError where the frozen text encoder is another one than it has learnt to read.
        """
        if self.texts and state.get("frozen_text", self.texts.digest) != self.texts.digest:
            problem = "not the text encoder that the run was begun with; put that back, or train with --fresh"
            raise ModelError(f"{shown(self.cfg.text_encoder.path)}: {problem}")
        if self.maps:
            self.same_features(state, self.maps.digest)
        if not self.model.opened and "scaling_factor" in state:  # checkpoints of older versions have none
            self.run.model = self.model = self.model.scaled(state["scaling_factor"])
            self.description = self.model.description

    def cast(self) -> dict[str, Player]:
        with torch.random.fork_rng([]):
            torch.manual_seed(int(keyed(self.cfg.train.seed, "alignment").integers(2**62)))
            module = Denoise(self.model, self.maps.channels if self.maps else 0).to(self.run.runtime.device)
        return {self.name: Player(module, module, self.settings, list(module.children()))}

    def weights(self) -> np.ndarray:
        return self.data.weights() * self.latents.valid

    def pick(self, u: float, normal: float) -> int:
        """The level of a row, from a uniform and a normal number."""
        return pick_level(u, normal, self.cfg.diffusion.timestep_density, len(self.levels))

    def draw(self, step: int, row: int, image: int, shape: tuple[int, ...]) -> tuple[int, str, np.ndarray]:
        """(level, caption, normals (2, C, h, w)) of one row of the batch, which holds `image`."""
        rng, cfg = keyed(self.cfg.train.seed, self.name, step, row), self.cfg.diffusion
        u, dropped, which = rng.random(3)
        level = self.pick(u, cfg.logit_mean + cfg.logit_std * float(rng.standard_normal()))
        normals = rng.standard_normal((2, *shape), np.float32)
        if cfg.offset_noise:
            normals[1] += cfg.offset_noise * rng.standard_normal((shape[0], 1, 1), np.float32)
        captions = self.data.source.captions(image % len(self.data.source))
        captions = captions if self.model.text_encoders else captions[:1]  # of a class the first one is the label
        return level, "" if dropped < self.dropout else captions[self.choose(which, len(captions))], normals

    @staticmethod
    def choose(u: float, count: int) -> int:
        """Half of the time the main caption, else one of the others."""
        return 0 if count == 1 or u < 0.5 else 1 + int((u - 0.5) * 2 * (count - 1))

    def noised(self, step: int, rows: Sequence[int]) -> tuple[tuple[int, ...], tuple[str, ...], Tensor, Tensor]:
        """The levels, captions, latents and noise (B, C, h, w) of rows of the batch of a step."""
        chosen = self.order(step)[list(rows)]
        mean, std = (part * self.model.scaling_factor for part in self.latents.rows(chosen))
        drawn = [self.draw(step, row, int(i), mean.shape[1:]) for row, i in zip(rows, chosen, strict=True)]
        picked, captions, normals = zip(*drawn, strict=True)
        noise = torch.from_numpy(np.stack(normals))
        return picked, captions, mean + std * noise[:, 0], noise[:, 1]

    def batch(self, step: int, rows: range) -> Batch:
        """The noisy `sample` (B, C, h, w), its `target`, `timestep`, loss `weight` and `level` (B,), and the text.

        `other`: the target that the next row of the whole batch has at this row's level, where the loss contrasts them.
        """
        picked, captions, x0, noise = self.noised(step, rows)
        alpha, sigma, t = np.array([self.levels[i] for i in picked]).T  # (B,) each
        d, prediction = self.cfg.diffusion, self.description.prediction
        weight = loss_weight(alpha, sigma, prediction, d.loss_weight, d.min_snr_gamma)
        a, s, times, w = (torch.from_numpy(v.astype(np.float32)) for v in (alpha, sigma, t, weight))
        a, s = a[:, None, None, None], s[:, None, None, None]
        target, level = self.prediction.target(x0, noise, a, s), torch.tensor(picked)
        batch = {"sample": x0 * a + noise * s, "target": target, "timestep": times, "weight": w, "level": level}
        if d.contrastive_weight:
            *_, x0, noise = self.noised(step, [(row + 1) % self.settings.batch_size for row in rows])
            batch["other"] = self.prediction.target(x0, noise, a, s)
        if self.maps:
            batch["map"] = self.maps.column("map", self.order(step)[list(rows)])
        factor = self.description.factor
        sizes = of_size(self.description.conditions, x0.shape[2] * factor, x0.shape[3] * factor, len(rows))
        tokens, condition = self.told(captions)
        return batch | {"tokens": tokens, "condition": condition | {k: torch.from_numpy(v) for k, v in sizes.items()}}

    def told(self, captions: Sequence[str]) -> tuple[dict[str, Tensor], Condition]:
        """Captions as ids for the text encoders that learn, and as what else is known of them."""
        if self.texts:
            return {}, self.texts.rows(captions)
        ids = {name: np.stack([self.encode(name, c) for c in captions]) for name in self.model.tokenizers}
        if self.model.text_encoders:
            return {name: torch.from_numpy(rows) for name, rows in ids.items()}, {}
        vectors = (one_hot(rows, self.model.tokenizers[name].vocab_size) for name, rows in ids.items())
        hidden = [{HIDDEN: torch.from_numpy(rows)} for rows in vectors]
        return {}, joined(hidden, self.description.conditions, torch.cat)

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, Terms]:
        sample = batch["sample"].to(memory_format=torch.channels_last)
        output = self.players[player].network(sample, batch["timestep"], batch["tokens"], batch["condition"])
        output, read = output if self.maps else (output, None)
        each = denoising_losses(output, batch["target"], batch["weight"])  # (B,)
        if weight := self.cfg.diffusion.contrastive_weight:  # Stoica et al. 2025
            each = each - weight * denoising_losses(output, batch["other"], batch["weight"])
        loss, terms = each.mean(), self.bands(each.detach(), batch["level"])
        if read is None:
            return loss, terms
        alike = F.cosine_similarity(read.float(), as_tokens(batch["map"]), dim=-1).mean()  # Yu et al. 2025, section 3.2
        return loss + self.settings.alignment_weight * (1 - alike), terms | {"alignment": counted(alike.detach())}

    def bands(self, losses: Tensor, level: Tensor) -> Terms:
        """The rows' losses (B,), apart by their bands of noise."""
        inside = F.one_hot(level * BANDS // len(self.levels), BANDS).double()  # (B, BANDS)
        sums = torch.stack([losses.double() @ inside, inside.sum(0)], dim=1)  # (BANDS, 2)
        return {f"loss_{i}": sums[i] for i in range(BANDS)}

    def pictures(self, steps: int = 12) -> tuple[np.ndarray, dict[str, float]]:
        """Generated images, uint8 (16, H, W, 3), of captions spread over the data."""
        backend = TorchBackend(self.model)
        d, g = backend.description, backend.description.generate
        request = Request(min(steps, len(d.schedule)), g.cfg_scale, g.sampler, g.spacing, d.size, d.size)
        most = max(1, self.settings.rows // 2)  # guidance asks the network twice
        each = [slice(start, start + most) for start in range(0, PICTURES, most)]
        seeds = range(self.cfg.train.seed, self.cfg.train.seed + PICTURES)
        return np.concatenate([generate(backend, self.captions[s], seeds[s], request) for s in each]), {}
