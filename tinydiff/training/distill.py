"""Stage 3: the denoiser learns to draw in few network calls, guidance built in.

Consistency distillation of a guided model (Luo et al. 2023, "Latent consistency models", section 4): at a few noise levels, among
them those that sampling visits, the student's x0 is to be its x0 at the next, where the teacher's guided ODE leads; from
the last one that is the teacher's image. The network and what it predicts stay, and a teacher's step is DDIM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinydiff import config
from tinydiff.checkpoints import folder
from tinydiff.condition import Condition, joined
from tinydiff.data.latents import digest
from tinydiff.diffusion import guidance
from tinydiff.diffusion.samplers import Denoise, move
from tinydiff.diffusion.schedules import CLEAN, Level, Levels, trailing
from tinydiff.errors import ModelError
from tinydiff.networks import network_of
from tinydiff.networks.network import named
from tinydiff.system import shown
from tinydiff.training.denoiser import DenoiserTask
from tinydiff.training.encoding import learns
from tinydiff.training.losses import denoising_losses
from tinydiff.training.parallel import whole
from tinydiff.training.run import Run
from tinydiff.training.start import described
from tinydiff.training.task import Batch, Player, Terms


class DistillTask(DenoiserTask):
    name, best = "distill", False  # its target moves

    def __init__(self, run: Run):
        teacher, run.model = run.model.denoiser, renewed(run)
        self.teacher, self.teachers = teacher.requires_grad_(False), digest(run.model.denoiser)
        super().__init__(run)
        self.steps = self.settings.calls
        self.dropout, self.cfg = 0.0, drawn_in(run.cfg, self.settings.calls)
        run.model = self.model = described(run.model, self.cfg)
        self.starts = trailing(len(self.levels), self.settings.levels)
        ends = zip(self.starts, [*self.starts[1:], -1], strict=True)
        self.ways = torch.tensor([way(self.levels, start, end, self.settings.solver_steps) for start, end in ends])

    def cast(self) -> dict[str, Player]:
        for encoder in self.model.text_encoders.values():
            encoder.requires_grad_(False)
        return super().cast()

    def state(self) -> dict[str, Any]:
        return super().state() | {"teacher": self.teachers}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ModelError where the denoiser is another than the one whose distillation was begun."""
        super().restore(state)
        if state["teacher"] != self.teachers:
            problem = f"the denoiser has been trained on since; delete {self.name}-* there to distil it anew"
            raise ModelError(f"{shown(self.run.checkpoints)}: {problem}")

    def pick(self, u: float, normal: float) -> int:
        return self.starts[int(u * len(self.starts))]

    def noisy(self, latents: tuple[Tensor, Tensor], drawn: Sequence[tuple[int, str, np.ndarray]]) -> Batch:
        """What the denoiser's has, each row's `way` of levels (B, solver steps + 1, 3), and what the `empty` caption says."""
        batch, (tokens, condition) = super().noisy(latents, drawn), self.told([""])
        ways = self.ways[[self.starts.index(level) for level in batch["level"].tolist()]]
        return batch | {"way": ways, "empty": {"tokens": tokens, "condition": condition}}

    def losses(self, player: str, batch: Batch) -> Tensor:
        x, learner, levels = batch["sample"], self.players[player], [of_rows(rows) for rows in batch["way"].unbind(1)]
        with torch.no_grad():
            said, empty = (self.said(each["tokens"], each["condition"]) for each in (batch, batch["empty"]))
            told = {name: torch.cat([empty.get(name, rows).expand_as(rows), rows]) for name, rows in said.items()}
            x0 = goal(self.guided(said, told), self.estimate(self.model.denoiser, said), x, levels)
            here = levels[0]
            target = self.prediction.target(x0, (x - x0 * here.alpha) / here.sigma, here.alpha, here.sigma)
        output, _, _ = learner.network(channels_last(x), here.t, {}, said)
        return denoising_losses(output, target, batch["weight"])

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, Terms]:
        each = self.losses(player, batch)
        return each.mean(), self.bands(each.detach(), batch["level"])

    def said(self, tokens: dict[str, Tensor], condition: Condition) -> Condition:
        """What the denoiser is told of captions."""
        outputs = [named(self.model.text_encoders[name](ids)) for name, ids in tokens.items()]
        return joined(outputs, self.description.conditions, torch.cat) | condition

    def estimate(self, network: nn.Module, told: Condition) -> Denoise:
        """A network's x0, each row at a level of its own."""

        def x0(x: Tensor, level: Level) -> Tensor:
            output = network(channels_last(x), level.t, **told).float()
            return self.prediction.to_x0(output, x, level.alpha, level.sigma)

        return x0

    def guided(self, said: Condition, told: Condition) -> Denoise:
        """The teacher's x0 under guidance; `told` has the empty caption's rows before those of `said`."""
        twice = self.estimate(self.teacher, told)

        def both(x: Tensor, level: Any) -> tuple[Tensor, Tensor]:
            u, c = twice(torch.cat([x, x]), Level._make(torch.cat([v, v]) for v in level)).chunk(2)
            return u, c

        return guidance.classifier_free(both, self.settings.cfg_scale, self.estimate(self.teacher, said))

    def pictures(self, steps: int = 0) -> tuple[np.ndarray, dict[str, float]]:
        return super().pictures(self.settings.calls)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def of_rows(rows: Tensor) -> Any:
    """A level for each row of a batch, from (B, 3)."""
    alpha, sigma, t = (rows[:, i] for i in range(3))
    return Level(alpha[:, None, None, None], sigma[:, None, None, None], t)  # pyright: ignore[reportArgumentType]


def way(levels: Levels, start: int, end: int, steps: int) -> list[Level]:
    """Levels evenly spaced from one of the schedule to another, both included; -1 is the clean one."""
    places = [round(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [levels[place] if place >= 0 else CLEAN for place in places]


def goal(teacher: Denoise, student: Denoise, x: Tensor, levels: Sequence[Level]) -> Tensor:
    """The x0 that x should give at the first of the levels: the student's at the last, where DDIM by the teacher leads.

    At the clean level it is x itself.
    """
    for here, there in pairwise(levels):
        x = move(x, teacher(x, here), here, there)
    return torch.where(levels[-1].sigma > 0, student(x, levels[-1]), x)  # type: ignore[arg-type]


def renewed(run: Run) -> folder.Model:
    """The run's model with copies of the networks that have learnt: whole on every process, and wrapped by nothing."""
    parts = dict(run.model.networks)
    for name in (name for name, part in parts.items() if learns(part)):
        network, table = network_of(name, run.model.configs[name]), run.model.configs[name]
        tensors = {key: whole(tensor) for key, tensor in parts[name].state_dict().items()}
        parts[name] = run.runtime.placed(folder.filled(network, table, tensors, run.dir / name))
    return replace(run.model, networks=parts, opened=True)  # what it has learnt knows its latents at no other scale


def drawn_in(cfg: config.Config, calls: int) -> config.Config:
    """The configuration of a model that is drawn in so many calls, without guidance."""
    return replace(cfg, generate=replace(cfg.generate, steps=calls, cfg_scale=1.0, sampler="lcm", spacing="trailing"))
