"""Stage 2: denoise latents under their captions, with the text encoders that are not frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.backends.pytorch import TorchBackend
from tinydiff.charts import HELD
from tinydiff.checkpoints.folder import Model
from tinydiff.condition import Condition, joined, of_canvas
from tinydiff.diffusion.noise import keyed
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.errors import ModelError
from tinydiff.measure.features import open_features
from tinydiff.models.attention import tokens as as_tokens
from tinydiff.models.exits import certain
from tinydiff.networks import denoiser_in, network_of
from tinydiff.networks.network import HIDDEN, Canvas, named
from tinydiff.overfitting import ERROR
from tinydiff.pipeline import Request, generate
from tinydiff.system import shown
from tinydiff.text.labels import one_hot
from tinydiff.training import encoding
from tinydiff.training.encoding import learns
from tinydiff.training.given import Columns
from tinydiff.training.losses import denoising_losses, loss_weight, pick_level
from tinydiff.training.run import Run
from tinydiff.training.task import PICTURES, Batch, Player, Task, Terms, counted, moved
from tinydiff.training.validation import BATCHES, ROWS, STEPS, Held, Samples, error_of_mean, over

BANDS = 4  # of noise levels, whose losses are told apart
Moments = tuple[Tensor, Tensor]  # means and deviations of latents, (B, C, h, w) each
Early = tuple[Tensor, Tensor]  # what an exit says, (B, C, h, w), and how sure it is (B,)
Drawn = tuple[int, str, np.ndarray]  # of a row: its level, its caption, normals (2, C, h, w)
LEAST = 32  # pixels a side that are enough for any feature network
HIDDEN_WIDTH = 512  # of the perceptron that reads features off the denoiser


class Denoise(nn.Module):
    """The denoiser and the text encoders, if any of them learns, as one network; else these are kept outside.

    `aligned`: channels of features that a perceptron reads off the denoiser's middle, 0 for none. It is in no model folder.
    `exits`: whether the denoiser has exits that learn.
    """

    def __init__(self, model: Model, aligned: int = 0, exits: bool = False):
        super().__init__()
        self.denoiser, self.wanted, self.exits = model.denoiser, model.description.conditions, exits
        if any(map(learns, model.text_encoders.values())):
            for name, encoder in model.text_encoders.items():
                self.add_module(name, encoder)
        norms = [part for part in self.denoiser.modules() if isinstance(part, nn.GroupNorm)]
        self.through = any(map(learns, norms)) and not all(p.requires_grad for p in self.denoiser.parameters())
        folder = denoiser_in(model.configs)
        row: Any = network_of(folder, model.configs[folder])
        self.middle, width = row.middle(row.complete(model.configs[folder]))
        if aligned:
            inner = [nn.Linear(width, HIDDEN_WIDTH), nn.SiLU(), nn.Linear(HIDDEN_WIDTH, HIDDEN_WIDTH), nn.SiLU()]
            self.alignment = nn.Sequential(*inner, nn.Linear(HIDDEN_WIDTH, aligned))

    def forward(
        self, sample: Tensor, timestep: Tensor, tokens: dict[str, Tensor], condition: Condition
    ) -> tuple[Tensor, Tensor | None, list[Early]]:
        """The prediction (B, C, h, w); where features are aligned, what is read of them (B, T, `aligned`); what exits say.

        `tokens`: ids (B, T) for each text encoder that is inside; `condition`: what else the denoiser is told.
        """
        if self.through:  # torch 2.13 crashes in the backward pass of a group norm that learns and whose input has none
            sample.requires_grad_()
        said = joined([named(self.get_submodule(name)(ids)) for name, ids in tokens.items()], self.wanted, torch.cat)
        middle, early = list[Tensor](), list[Early]()
        given: dict[str, Any] = {**said, **condition, **({"early": early} if self.exits and self.training else {})}
        if not hasattr(self, "alignment"):
            return self.denoiser(sample, timestep, **given), None, early
        seen = self.denoiser.get_submodule(self.middle).register_forward_hook(lambda *call: middle.append(call[-1]))
        try:
            output = self.denoiser(sample, timestep, **given)
        finally:
            seen.remove()
        return output, self.alignment(as_tokens(middle[0]) if middle[0].ndim == 4 else middle[0]), early


class DenoiserTask(Task):
    name, best = "denoiser", True
    steps = STEPS  # in which samples are generated

    @classmethod
    def check(cls, settings: Any) -> None:
        if encoding.alignment(settings):
            open_features(settings.features).maps(torch.zeros(1, 3, LEAST, LEAST))

    def __init__(self, run: Run):
        run.model.vae.requires_grad_(False).eval()
        self.given = encoding.given(run)
        self.latents, self.texts = encoding.images(run), encoding.captions(run)
        self.held_latents = encoding.held_out(run, self.latents)
        self.maps = encoding.maps(run, run.cfg.train.stage(self.name))
        run.model = run.model if run.model.opened else run.model.scaled(self.latents.scaling_factor)
        self.columns = Columns(run)
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
        return {"scaling_factor": self.model.scaling_factor, **self.given, **told}

    def restore(self, state: dict[str, Any]) -> None:
        """Other data have other latents, which are scaled as those that the denoiser has learnt.

        Raises ModelError where the frozen text encoder or autoencoder is another one than it has learnt to read.
        """
        if self.texts and state.get("frozen_text", self.texts.digest) != self.texts.digest:
            problem = "not the text encoder that the run was begun with; put that back, or train with --fresh"
            raise ModelError(f"{shown(self.cfg.text_encoder.path)}: {problem}")
        self.same_autoencoder(state, self.given)
        if self.maps:
            self.same_features(state, self.maps.digest)
        if not self.model.opened and "scaling_factor" in state:  # checkpoints of older versions have none
            self.run.model = self.model = self.model.scaled(state["scaling_factor"])
            self.description = self.model.description

    def cast(self) -> dict[str, Player]:
        with torch.random.fork_rng([]):
            torch.manual_seed(int(keyed(self.cfg.train.seed, "alignment").integers(2**62)))
            exits = bool(len(getattr(self.model.denoiser, "exits", ())) and getattr(self.settings, "exit_weight", 0))
            module = Denoise(self.model, self.maps.channels if self.maps else 0, exits).to(self.run.runtime.device)
        return {self.name: Player(module, module, self.settings, list(module.children()))}

    def weights(self) -> np.ndarray:
        return self.data.weights() * self.latents.valid * self.columns.valid(self.data)

    def pick(self, u: float, normal: float) -> int:
        """The level of a row, from a uniform and a normal number."""
        return pick_level(u, normal, self.cfg.diffusion.timestep_density, len(self.levels))

    def draw(self, step: int, row: int, image: int, shape: tuple[int, ...]) -> tuple[int, str, np.ndarray]:
        """(level, caption, normals (2, C, h, w)) of one row of the batch, which holds `image`."""
        rng, cfg = keyed(self.cfg.train.seed, self.name, step, row), self.cfg.diffusion
        u, dropped, which = rng.random(3)
        level = self.pick(u, cfg.logit_mean + cfg.logit_std * float(rng.standard_normal()))
        normals = self.normals(rng, shape)
        captions = self.data.source.captions(image % len(self.data.source))
        captions = captions if self.model.text_encoders else captions[:1]  # of a class the first one is the label
        caption = "" if dropped < self.dropout else captions[self.choose(which, len(captions))]
        return level, self.retold(caption, step, row), normals

    def normals(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Of the latents, and the noise upon them: (2, C, h, w)."""
        normals, offset = rng.standard_normal((2, *shape), np.float32), self.cfg.diffusion.offset_noise
        if offset:
            normals[1] += offset * rng.standard_normal((shape[0], 1, 1), np.float32)
        return normals

    @staticmethod
    def choose(u: float, count: int) -> int:
        """Half of the time the main caption, else one of the others."""
        return 0 if count == 1 or u < 0.5 else 1 + int((u - 0.5) * 2 * (count - 1))

    def rows_of(self, step: int, rows: Sequence[int]) -> tuple[Moments, list[Drawn]]:
        """The latents of rows of the batch of a step, and what is drawn for them."""
        chosen = self.order(step)[list(rows)]
        latents = self.latents.rows(chosen)
        shape = latents[0].shape[1:]
        return latents, [self.draw(step, row, int(i), shape) for row, i in zip(rows, chosen, strict=True)]

    def noised(
        self, latents: Moments, drawn: Sequence[Drawn]
    ) -> tuple[tuple[int, ...], tuple[str, ...], Tensor, Tensor]:
        """The levels, captions, latents and noise (B, C, h, w) of some rows."""
        mean, std = (part * self.model.scaling_factor for part in latents)
        picked, captions, normals = zip(*drawn, strict=True)
        noise = torch.from_numpy(np.stack(normals))
        return picked, captions, mean + std * noise[:, 0], noise[:, 1]

    def amplitudes(self, picked: Sequence[int]) -> tuple[Tensor, Tensor]:
        """alpha and sigma of levels, (B, 1, 1, 1) each."""
        alpha, sigma, _ = np.array([self.levels[i] for i in picked], np.float32).T
        return torch.from_numpy(alpha)[:, None, None, None], torch.from_numpy(sigma)[:, None, None, None]

    def batch(self, step: int, rows: range) -> Batch:
        """What `noisy` gives of a step's rows.

        `other`: the target that the next row of the whole batch has at this row's level, where the loss contrasts them.
        """
        batch = self.noisy(*self.rows_of(step, rows))
        told = self.columns.rows(self.data, self.order(step)[list(rows)])
        batch["condition"] |= self.columns.spared(told, self.name, step, rows)
        if self.cfg.diffusion.contrastive_weight:
            following = [(row + 1) % self.settings.batch_size for row in rows]
            *_, x0, noise = self.noised(*self.rows_of(step, following))
            batch["other"] = self.prediction.target(x0, noise, *self.amplitudes(batch["level"].tolist()))
        if self.maps:
            batch["map"] = self.maps.column("map", self.order(step)[list(rows)])
        return batch

    def noisy(self, latents: Moments, drawn: Sequence[Drawn]) -> Batch:
        """The noisy `sample` (B, C, h, w), its `target`, `timestep`, loss `weight` and `level` (B,), and the text."""
        picked, captions, x0, noise = self.noised(latents, drawn)
        alpha, sigma, t = np.array([self.levels[i] for i in picked]).T  # (B,) each
        d, prediction = self.cfg.diffusion, self.description.prediction
        weight = loss_weight(alpha, sigma, prediction, d.loss_weight, d.min_snr_gamma)
        times, w = (torch.from_numpy(v.astype(np.float32)) for v in (t, weight))
        a, s = self.amplitudes(picked)
        target, level = self.prediction.target(x0, noise, a, s), torch.tensor(picked)
        batch = {"sample": x0 * a + noise * s, "target": target, "timestep": times, "weight": w, "level": level}
        factor = self.description.factor
        canvas = Canvas(x0.shape[2] * factor, x0.shape[3] * factor)
        sizes = of_canvas(self.description.conditions, canvas, len(drawn))
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

    def answer(self, player: str, batch: Batch) -> tuple[Tensor, Tensor | None, list[Early]]:
        """What the network says of a batch."""
        sample = batch["sample"].to(memory_format=torch.channels_last)
        return self.players[player].network(sample, batch["timestep"], batch["tokens"], batch["condition"])

    def losses(self, player: str, batch: Batch) -> Tensor:
        """The denoising loss of each row, (B,)."""
        return denoising_losses(self.answer(player, batch)[0], batch["target"], batch["weight"])

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, Terms]:
        output, read, early = self.answer(player, batch)
        each = denoising_losses(output, batch["target"], batch["weight"])  # (B,)
        if weight := self.cfg.diffusion.contrastive_weight:  # Stoica et al. 2025
            each = each - weight * denoising_losses(output, batch["other"], batch["weight"])
        loss, terms = each.mean(), self.bands(each.detach(), batch["level"])
        for i, (said, sure) in enumerate(early):  # Tang et al. 2023, section 3
            unlike = denoising_losses(said, batch["target"], batch["weight"]).mean()
            unsure = (sure - certain(said.detach(), output.detach())).square().mean()
            loss = loss + self.settings.exit_weight * (unlike + unsure) / len(early)
            terms |= {f"exit_{i}_loss": counted(unlike.detach()), f"exit_{i}_confidence": counted(sure.detach().mean())}
        if read is None:
            return loss, terms
        wanted = as_tokens(batch["map"])  # (B, T, D); tokens of the condition come after the image's
        alike = F.cosine_similarity(
            read[:, : wanted.shape[1]].float(), wanted, dim=-1
        ).mean()  # Yu et al. 2025, section 3.2
        return loss + self.settings.alignment_weight * (1 - alike), terms | {"alignment": counted(alike.detach())}

    def band(self, level: Tensor) -> Tensor:
        """Which band of noise each level is in."""
        return level * BANDS // len(self.levels)

    def bands(self, losses: Tensor, level: Tensor) -> Terms:
        """The rows' losses (B,), apart by their bands of noise."""
        inside = F.one_hot(self.band(level), BANDS).double()  # (B, BANDS)
        sums = torch.stack([losses.double() @ inside, inside.sum(0)], dim=1)  # (BANDS, 2)
        return {f"loss_{i}": sums[i] for i in range(BANDS)}

    def validate(self) -> dict[str, float]:
        """Of held-out images, the loss at all noise levels with its standard error, and by band; Fréchet distance of samples."""
        if not (held := self.held):
            return {}
        values = over(self.run.world, held.parts(len(self.places), self.settings.rows), self.held_losses)
        loss, band = values[:, 0], values[:, 1].astype(int)
        usual = np.array([loss[band == i].mean() if (band == i).any() else np.nan for i in range(BANDS)])
        images = np.arange(len(loss)) % len(held)
        rest = np.bincount(images, loss - usual[band]) / np.bincount(images)  # of an image, whatever its bands
        told = {f"{HELD}loss": loss.mean(), ERROR: error_of_mean(rest)}
        told |= {f"{HELD}loss_{i}": mean for i, mean in enumerate(usual) if np.isfinite(mean)}
        if self.samples:
            told["frechet"] = self.samples.frechet(
                TorchBackend(self.model), self.request(self.steps), self.columns.shown
            )
        return {name: float(value) for name, value in told.items()}

    @torch.no_grad()
    def held_losses(self, rows: np.ndarray) -> np.ndarray:
        """Loss and band (B, 2) of rows of the held-out images."""
        batch = moved(self.held_batch(rows), self.run.runtime.device)
        with self.run.runtime.attention(), self.run.runtime.autocast():
            losses = self.losses(self.name, batch)
        return torch.stack([losses.double(), self.band(batch["level"]).double()], dim=1).cpu().numpy()

    def held_batch(self, rows: np.ndarray) -> Batch:
        """The same at every look: each image in turn under its main caption, at levels as dense as training's."""
        assert self.held and self.held_latents
        chosen = self.held.indices[rows % len(self.held)]
        latents, drawn, d = self.held_latents.rows(chosen), [], self.cfg.diffusion
        for row, image in zip(rows.tolist(), chosen.tolist(), strict=True):
            u, rng = float(self.places[row]), keyed(self.cfg.train.seed, "held-out rows", 0, row)
            level = self.pick(u, NormalDist(d.logit_mean, d.logit_std).inv_cdf(u))
            caption = self.held.images.source.captions(image)[0]
            drawn.append((level, caption, self.normals(rng, latents[0].shape[1:])))
        batch = self.noisy(latents, drawn)
        batch["condition"] |= self.columns.rows(self.held.images, chosen)
        return batch

    @cached_property
    def held(self) -> Held | None:
        """The held-out images that could be encoded."""
        held = self.run.held and replace(
            self.run.held,
            indices=self.run.held.indices[
                (self.held_latents.valid & self.columns.valid(self.run.held.images))[self.run.held.indices]
            ],
        )
        return held or None

    @cached_property
    def places(self) -> np.ndarray:
        """Of each row that the held-out loss is measured on, a number in (0, 1), evenly spread, that says its noise level."""
        rows = min(ROWS, BATCHES * self.settings.batch_size)
        return (keyed(self.cfg.train.seed, "held-out levels").permutation(rows) + 0.5) / rows

    @cached_property
    def samples(self) -> Samples | None:
        """What the Fréchet distance is measured with, if it is asked for and there is a feature network."""
        count = self.cfg.train.validation_samples
        return Samples(self.run, count, self.most) if count and self.run.features else None

    @property
    def most(self) -> int:
        """Images generated at once: guidance asks the network twice."""
        return max(1, self.settings.rows // 2)

    def request(self, steps: int) -> Request:
        """How images are generated at a look."""
        d, g = self.model.description, self.model.description.generate
        return Request(min(steps, len(d.schedule)), g.cfg_scale, g.sampler, g.spacing, d.size, d.size)

    def pictures(self, steps: int = 12) -> tuple[np.ndarray, dict[str, float]]:
        """Generated images, uint8 (16, H, W, 3), of captions spread over the data."""
        backend, request, most = TorchBackend(self.model), self.request(steps), self.most
        each = [slice(start, start + most) for start in range(0, PICTURES, most)]
        seeds = range(self.cfg.train.seed, self.cfg.train.seed + PICTURES)
        count = len(self.data.source)
        told = self.columns.shown(backend, [(self.data, i * count // PICTURES) for i in range(PICTURES)])
        drawn = [
            generate(backend, self.captions[s], seeds[s], request, given={k: rows[s] for k, rows in told.items()})
            for s in each
        ]
        return np.concatenate(drawn), {}
