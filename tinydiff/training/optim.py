"""AdamW with warm-up and cosine decay, and the averaged weights, both as plain functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tinydiff.config import Stage


def learning_rate(step: int, cfg: Stage) -> float:
    """Linear warm-up, then a half cosine to `final_lr` of the peak at the last step."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    done = min(1.0, max(0.0, (step - cfg.warmup) / max(1, cfg.steps - 1 - cfg.warmup)))
    return cfg.lr * warm * (cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(parameters: Iterable[Tensor], cfg: Stage) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); matrices and kernels decay, vectors (biases, norms) do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)


class Average:
    """Exponential moving average of parameters (or blocks of them), warmed up as (1 + step)/(10 + step) until `decay`.

    It is taken every `EVERY` steps with the decay of as many: reading all weights each step costs more than it is worth.
    """

    EVERY = 4

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.decay = decay
        self.source = [p.detach() for p in parameters]
        self.tensors: list[Tensor] = [p.clone() for p in self.source]

    @torch.no_grad()
    def update(self, step: int, last: bool = False) -> None:
        """Take in the weights after `step`; the `last` step of a stage always counts."""
        since = step % self.EVERY + 1
        if last or since == self.EVERY:
            decay = min(self.decay, (1 + step) / (10 + step)) ** since
            torch._foreach_lerp_(self.tensors, self.source, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def exchange(self) -> None:
        """Averages become the parameters, and these are kept in their place; a second call takes it back."""
        for p, mine in zip(self.source, self.tensors, strict=True):
            kept = p.clone()
            p.copy_(mine)
            mine.copy_(kept)


@torch.no_grad()
def clip(gradients: list[Tensor], norm: float, largest: float) -> None:
    """Scale gradients of a finite joint `norm` down to `largest` (0: leave them)."""
    if largest and largest < norm:
        torch._foreach_mul_(gradients, largest / norm)  # pyright: ignore[reportPrivateImportUsage]
