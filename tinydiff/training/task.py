"""What a stage of training is to the loop: players that learn, batches by name, a loss for each player, pictures.

A task opens or takes what it trains from the run. All randomness is keyed by (seed, stream, step, row), so nothing but
weights and buffers needs saving, and no process or thread has any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tinydiff.checkpoints import folder
from tinydiff.data.dataset import Order
from tinydiff.data.wording import retold
from tinydiff.diffusion.noise import keyed
from tinydiff.errors import ModelError
from tinydiff.networks.contrastive import CONTRASTIVE
from tinydiff.stages import Stage, trained
from tinydiff.system import shown
from tinydiff.training.run import Run
from tinydiff.training.state import Blocks
from tinydiff.training.validation import Looks

PICTURES = 16
Batch = dict[str, Any]  # tensors of rows by name, or dicts of them
Terms = dict[str, Tensor]  # (2,) each: a sum and how many were summed


@dataclass
class Player:
    """What one optimizer trains: the parameters of `module` that require a gradient.

    `network` is what `loss` calls of it, replaced by what spreads it over processes; of it the `parts` may be divided among
    them, where it is not small enough to be whole on each.
    """

    module: nn.Module
    network: nn.Module
    settings: Stage
    parts: list[nn.Module] = field(default_factory=list)


class Task:
    """A stage. The loop asks the players' losses one after the other, each followed by that player's update."""

    name = ""
    captions: ClassVar[list[str]] = []  # of the pictures
    publishes = "model"  # the folder of the run that each checkpoint makes anew, if any
    rows: list[range]  # of the batch, what this process computes at once
    whole = False  # whether a loss needs all rows of the batch at once, and so cannot be computed in parts
    best = False  # whether the checkpoint with the lowest held-out loss is the best one
    looks: Looks  # what has been measured so far

    def __init__(self, run: Run):
        self.run, self.cfg, self.model, self.data = run, run.cfg, run.model, run.data
        self.settings: Any = run.cfg.train.stage(self.name)
        self.players = self.cast()
        self.stored = stored(self.model, self.players)  # asked now: a network that processes divide has no whole state
        self.order = Order(self.weights(), run.cfg.train.seed, self.data.bucket, self.settings.batch_size)

    @classmethod
    def check(cls, settings: Any) -> None:
        """Raises UserError for what a stage with these settings needs and is not there, before anything is written."""

    def cast(self) -> dict[str, Player]:
        """The players by name, in the order of their updates."""
        raise NotImplementedError

    def weights(self) -> np.ndarray:
        """(N,): how often each image is drawn, relative to the others."""
        return self.data.weights()

    def retold(self, caption: str, step: int, row: int) -> str:
        """A caption as a row of the batch of a step reads it."""
        data, seed = self.cfg.data, self.cfg.train.seed
        return retold(caption, data, keyed(seed, f"tags of {self.name}", step, row)) if data.retells else caption

    def batch(self, step: int, rows: range) -> Batch:
        """Rows of the batch of a step."""
        raise NotImplementedError

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, Terms]:
        """What a player minimises, (), and what to report of it."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What else than weights and buffers the stage's learning depends on, as JSON: kept though the data change."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the `state` of a checkpoint."""

    def same_autoencoder(self, state: dict[str, Any], given: dict[str, str]) -> None:
        """Raises ModelError where the `given` autoencoder is another one than that of the checkpoint with this `state`."""
        if any(state.get(key, value) != value for key, value in given.items()) and not self.run.claim.accept:
            problem = "not the autoencoder that the run was begun with; put that back, or use --accept-changes"
            raise ModelError(f"{shown(self.cfg.autoencoder.path)}: {problem}")

    def same_features(self, state: dict[str, Any], digest: str) -> None:
        """Raises ModelError where the feature network is another one than that of the checkpoint with this `state`."""
        if state.get("features", digest) != digest and not self.run.claim.accept:
            problem = "not the feature network that the run was begun with; put that back, or use --accept-changes"
            raise ModelError(f"train.{self.name}.features: {problem}")

    def pictures(self) -> tuple[np.ndarray, dict[str, float]]:
        """What has been learnt, uint8 (n, H, W, 3), and numbers about it."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """What the averaged weights do on held-out images, the same on every process; names begin with `held_out_`."""
        return {}

    def publish(self, checkpoint: Path, path: Path) -> None:
        """The model folder at `path` with the averaged weights of a checkpoint."""
        parts = self.averaged(checkpoint)
        beside = [place for place in self.beside if place.is_dir()]
        folder.save(path, self.model, self.cfg, force=True, tensors_of=lambda name, _: parts[name], beside=beside)

    @property
    def beside(self) -> list[Path]:
        """The folders of the run that its model folder holds copies of."""
        kept = self.publishes == "model" and CONTRASTIVE in trained(self.cfg.train)
        return [self.run.dir / CONTRASTIVE] if kept else []

    def averaged(self, checkpoint: Path) -> dict[str, dict[str, Tensor]]:
        """The tensors of each of the model's networks, with the averaged weights of a checkpoint."""
        kept = dict(Blocks(checkpoint, "average").whole()) | dict(Blocks(checkpoint, "buffers").whole())
        places = self.stored.items()
        return {n: {k: kept[v] if isinstance(v, str) else v for k, v in part.items()} for n, part in places}


def stored(model: folder.Model, players: Mapping[str, Player]) -> dict[str, dict[str, str | Tensor]]:
    """Of each network's tensors, the name in a checkpoint where players change it: what blocks share is under each block."""
    names: dict[Tensor, str] = {}
    for name, player in players.items():
        learnt = [(k, p) for k, p in player.module.named_parameters() if p.requires_grad]
        names |= {t: f"{name}.{k}" for k, t in [*learnt, *player.module.named_buffers()]}
    parts = {name: part.state_dict(keep_vars=True) for name, part in model.networks.items()}
    return {name: {k: names.get(t) or t for k, t in part.items()} for name, part in parts.items()}


def counted(value: Tensor, count: float = 1.0) -> Tensor:
    """A term: (2,) float64."""
    return torch.stack([value.double(), value.new_tensor(count, dtype=torch.float64)])


def changed(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A batch with each tensor changed."""
    return {k: changed(v, change) if isinstance(v, dict) else change(v) for k, v in batch.items()}


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The same batch in memory that a GPU copies from while the CPU goes on; for a CPU, as it is."""
    return changed(batch, Tensor.pin_memory) if device.type == "cuda" else batch


def moved(batch: Batch, device: torch.device) -> Batch:
    """The same batch on a device, a copy that nobody waits for where it is `pinned`."""
    return changed(batch, lambda x: x.to(device, non_blocking=True))
