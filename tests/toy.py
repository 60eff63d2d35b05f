"""A kind of denoiser and a stage of training that are not tinydiff's own, each as one entry of a table.

`python tests/toy.py ...` is `tinydiff ...` with both. TOY_KILL=denoiser-6 kills the process when that checkpoint stands;
TOY_NAN=critic spoils that player's loss at step 6.
"""

from __future__ import annotations

import math
import os
import signal
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.diffusion.noise import keyed
from tinydiff.networks import DENOISERS
from tinydiff.networks.network import HIDDEN, POOLED, Array, Denoiser
from tinydiff.schema import key, section
from tinydiff.stages import STAGES, Row, Stage
from tinydiff.training.task import Player, Task, counted

# ---- a denoiser that is told a text's one vector and the size of the image, besides a vector a token --------------------


@dataclass(frozen=True)
class ToySettings:
    width: int = key(8, "channels inside", 1, 64)


class ToyNetwork(Denoiser):
    name, folder = "toy", "transformer"  # where a DiT is, too
    doc = "a toy"
    settings = ToySettings
    module = "toy:Toy"
    library = ("toy", "Toy")

    def conditions(self, table: dict[str, Any]) -> dict[str, Array]:
        own = {"text_embeds": Array(("batch", table["pooled_dim"]), of=POOLED)}
        return (
            super().conditions(table)
            | own
            | {"sizes": Array(("batch", 2), of=lambda told: [told.height / 16, told.width / 16])}
        )

    def describe(self, cfg: Any, widths: Any) -> dict[str, Any]:
        dims = {"cross_attention_dim": widths[HIDDEN], "pooled_dim": widths[POOLED]}
        return {"_class_name": "Toy"} | cfg.latents | dims | asdict(cfg.network)


class Toy(nn.Module):
    """Two convolutions, between which everything it is told is added."""

    def __init__(self, channels: int, width: int, context: int, pooled: int):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)
        self.time, self.text = nn.Linear(1, width), nn.Linear(context, width)
        self.pooled, self.size = nn.Linear(pooled, width), nn.Linear(2, width)

    @classmethod
    def of(cls, table: dict[str, Any], tensors: Any = None) -> Toy:
        return cls(table["in_channels"], table["width"], table["cross_attention_dim"], table["pooled_dim"])

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, sizes: Tensor
    ) -> Tensor:
        time = self.time(timestep.reshape(-1, 1).expand(sample.shape[0], 1).to(sample.dtype) / 1000)
        told = time + self.text(encoder_hidden_states.mean(1)) + self.pooled(text_embeds) + self.size(sizes)
        return self.conv_out(F.silu(self.conv_in(sample) + told[:, :, None, None]))


# ---- a stage with two players, buffers and dropout ----------------------------------------------------------------------


def player(inputs: int, outputs: int) -> nn.Sequential:
    """A perceptron whose batch norm has buffers, and whose dropout is random."""
    hidden = [nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.5)]
    return nn.Sequential(nn.Linear(inputs, 16), *hidden, nn.Linear(16, outputs))


class ToyTask(Task):
    """The mean colours of images, drawn by a generator that a critic judges."""

    name = "toy"
    publishes = ""

    def cast(self) -> dict[str, Player]:
        torch.manual_seed(0)
        pair = {"generator": player(4, 3), "critic": player(3, 1)}
        return {name: Player(module, module, self.settings) for name, module in pair.items()}

    def batch(self, step: int, rows: range) -> dict[str, Any]:
        pixels = self.data.batch(self.order(step)[rows.start : rows.stop])
        noise = np.stack([keyed(0, "toy", step, row).standard_normal(4, np.float32) for row in rows])
        colours, at = torch.from_numpy(pixels.mean((1, 2), np.float32) / 255), torch.tensor(step)
        return {"colours": colours, "noise": torch.from_numpy(noise), "step": at}

    def loss(self, player: str, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = self.losses(player, batch)
        spoilt = player == os.environ.get("TOY_NAN") and batch["step"] == 6
        return loss * (math.nan if spoilt else 1), terms

    def losses(self, player: str, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        generator, critic = (each.network for each in self.players.values())
        drawn = generator(batch["noise"])
        if player == "generator":
            return F.softplus(-critic(drawn)).mean(), {}
        if batch["step"] < 2:  # the critic learns later
            return torch.zeros(()), {}
        real, fake = F.softplus(-critic(batch["colours"])), F.softplus(critic(drawn.detach()))
        return (real + fake).mean(), {"real": counted(real.detach().mean())}

    @torch.no_grad()
    def pictures(self) -> tuple[np.ndarray, dict[str, float]]:
        drawn = self.players["generator"].module(torch.eye(4))
        return np.uint8(drawn.clamp(0, 1).numpy() * 255)[:, None, None].repeat(8, 1).repeat(8, 2), {"brightness": 0.5}


def register() -> None:
    DENOISERS["toy"] = ToyNetwork()
    STAGES["toy"] = Row(Stage, section(Stage, "a toy", steps=12), "toy:ToyTask", "colours")


def kill_at(name: str) -> None:
    """The process dies when the checkpoint of this name stands."""
    from tinydiff.training import loop

    commit = loop.commit

    def and_die(run: Any, task: Task, training: Any, saver: Any, n: int, skipped: int) -> None:
        commit(run, task, training, saver, n, skipped)
        if f"{task.name}-{n}" == name:
            saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    loop.commit = and_die


if __name__ == "__main__":
    import sys

    sys.modules["toy"] = sys.modules["__main__"]
    register()
    if at := os.environ.get("TOY_KILL"):
        kill_at(at)
    from tinydiff.cli import main

    main()
