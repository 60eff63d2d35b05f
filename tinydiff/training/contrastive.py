"""Between autoencoder and denoiser: which caption goes with which image. The text encoder goes on into the denoiser's stage.

Images enter by their cached latents. Both towers are published in a folder of their own, so that what they have learnt can
still be asked after the denoiser has changed the text encoder.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinydiff.checkpoints import folder
from tinydiff.diffusion.noise import keyed
from tinydiff.measure.text_image import agreement
from tinydiff.models.contrastive import TextImage
from tinydiff.networks import TEXT
from tinydiff.networks.contrastive import CONTRASTIVE, NETWORK
from tinydiff.networks.network import Table
from tinydiff.training import encoding
from tinydiff.training.denoiser import DenoiserTask
from tinydiff.training.losses import contrastive_loss
from tinydiff.training.run import Run
from tinydiff.training.state import Blocks
from tinydiff.training.task import PICTURES, Batch, Player, Task, Terms, counted

LOOKED_AT = 256  # images that are looked for among each other


class ContrastiveTask(Task):
    name = publishes = CONTRASTIVE
    whole = True

    def __init__(self, run: Run):
        run.model.vae.requires_grad_(False).eval()
        self.given, self.latents = encoding.given(run), encoding.images(run)
        self.scaling_factor = self.latents.scaling_factor
        super().__init__(run)
        if all(self.captions_of(i) == self.captions_of(0) for i in range(len(self.data.source))):
            run.runtime.say(f"note: train.{CONTRASTIVE}: all images have one caption, of which nothing can be learnt")
        tokenizer = self.model.tokenizers[TEXT]
        self.encode = lru_cache(200_000)(lambda caption: tokenizer.encode([caption])[0])  # ids (T,)

    @property
    def table(self) -> Table:
        """The `config.json` of the towers."""
        own = {"image_channels": list(self.settings.image_channels), "projection_dim": self.settings.projection_dim}
        own |= {"in_channels": self.model.description.latent_channels, "scaling_factor": self.scaling_factor}
        return {"_class_name": "TextImage", **own, "text_config": self.model.configs[TEXT]}

    def cast(self) -> dict[str, Player]:
        torch.manual_seed(self.cfg.train.seed)
        text, width = self.model.text_encoders[TEXT], self.model.configs[TEXT]["hidden_size"]
        towers = TextImage(text, width, self.model.description.latent_channels, self.settings)  # type: ignore[arg-type]
        self.run.runtime.placed(towers)
        return {self.name: Player(towers, towers, self.settings)}

    def state(self) -> dict[str, Any]:
        return {"scaling_factor": self.scaling_factor, **self.given}

    def restore(self, state: dict[str, Any]) -> None:
        """Other data have other latents, which are scaled as those that were learnt from. Raises ModelError."""
        self.same_autoencoder(state, self.given)
        self.scaling_factor = state["scaling_factor"]

    def weights(self) -> np.ndarray:
        return self.data.weights() * self.latents.valid

    def captions_of(self, image: int) -> list[str]:
        return self.data.source.captions(image % len(self.data.source))

    def draw(self, step: int, row: int, image: int, shape: tuple[int, ...]) -> tuple[str, np.ndarray, np.ndarray]:
        """(caption, normals (C, h, w), offset in latents (2,)) of one row of the batch, which holds `image`."""
        rng, captions = keyed(self.cfg.train.seed, CONTRASTIVE, step, row), self.captions_of(image)
        caption = captions[DenoiserTask.choose(rng.random(), len(captions))]
        return caption, rng.standard_normal(shape, np.float32), rng.integers(-1, 2, 2)

    def batch(self, step: int, rows: range) -> Batch:
        """`ids` (B, T), `latents` (B, C, h, w), and which of the captions of the whole batch are right for each, `match`."""
        everything = self.order(step)
        mean, std = (
            part.numpy() * self.scaling_factor for part in self.latents.rows(everything[rows.start : rows.stop])
        )
        drawn = [self.draw(step, row, int(i), mean.shape[1:]) for row, i in enumerate(everything)]
        captions, mine = [caption for caption, _, _ in drawn], drawn[rows.start : rows.stop]
        z = [shifted(m + s * normal, by) for m, s, (_, normal, by) in zip(mean, std, mine, strict=True)]
        right = [{*self.captions_of(int(i))} for i in everything[rows.start : rows.stop]]
        match = np.array([[caption in own for caption in captions] for own in right], np.float32)
        ids = np.stack([self.encode(self.retold(drawn[row][0], step, row)) for row in rows])
        return {
            "ids": torch.from_numpy(ids),
            "latents": torch.from_numpy(np.stack(z)),
            "match": torch.from_numpy(match),
        }

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, Terms]:
        latents = batch["latents"].to(memory_format=torch.channels_last)
        texts, images, scale = self.players[player].network(batch["ids"], latents)
        texts, images, match = (self.run.world.gather(each) for each in (texts, images, batch["match"]))
        with torch.autocast(texts.device.type, enabled=False):
            logits = scale * images @ texts.T
        right = match.gather(1, logits.argmax(1, keepdim=True)).mean()
        terms = {"retrieved": counted(right), "scale": counted(scale.detach())}
        return contrastive_loss(logits, match), terms

    def publish(self, checkpoint: Path, path: Path) -> None:
        """The towers' own folder, whose text tower the denoiser's stage leaves alone."""
        tensors = {name.removeprefix(f"{self.name}."): t for name, t in Blocks(checkpoint, "average").whole()}
        folder.save_network(path, self.table, tensors, NETWORK.file, self.cfg)

    @torch.no_grad()
    def pictures(self) -> tuple[np.ndarray, dict[str, float]]:
        """Some images above those that are nearest to their captions, uint8 (2 n, H, W, 3), and how well all are found."""
        alike = np.flatnonzero((self.data.bucket == self.data.bucket[self.order(0)[0]]) & self.latents.valid)
        chosen = alike[np.arange(min(LOOKED_AT, len(alike))) * len(alike) // min(LOOKED_AT, len(alike))]
        captions = [self.captions_of(int(i))[0] for i in chosen]
        towers, device = self.players[self.name].module, self.run.runtime.device
        ids = torch.from_numpy(np.stack([self.encode(caption) for caption in captions]))
        z = self.latents.rows(chosen)[0] * self.scaling_factor
        rows = range(0, len(chosen), self.settings.rows)
        parts = [slice(start, start + self.settings.rows) for start in rows]
        texts = torch.cat([towers.texts(ids[part].to(device)) for part in parts]).cpu().numpy()  # type: ignore[operator]
        images = torch.cat([towers.images(z[part].to(device)) for part in parts]).cpu().numpy()  # type: ignore[operator]
        shown = np.arange(PICTURES) * len(chosen) // PICTURES
        nearest = (texts[shown] @ images.T).argmax(1)
        return self.data.batch(chosen[np.concatenate([shown, nearest])]), agreement(texts, images, captions)


def shifted(z: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Latents (C, h, w) moved by up to one row and one column, what comes in being a copy of the edge."""
    (down, right), (_, h, w) = by.tolist(), z.shape
    padded = np.pad(z, ((0, 0), (1, 1), (1, 1)), mode="edge")
    return padded[:, 1 - down : 1 - down + h, 1 - right : 1 - right + w]
