"""AdamW, its learning rate (warm-up and cosine decay), and averaged weights. All depend on the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tinydiff.stages import Stage


def learning_rate(step: int, cfg: Stage) -> float:
    """Linear warm-up, then half a cosine down to `final_lr` times the peak at the last step."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    done = min(1.0, max(0.0, (step - cfg.warmup) / max(1, cfg.steps - 1 - cfg.warmup)))
    return cfg.lr * warm * (cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(parameters: Iterable[Tensor], cfg: Stage) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), with weight decay on matrices and kernels, not on vectors (biases, norms)."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)


class Average:
    """Exponential moving average of parameters (or shards of them), its decay min(`decay`, (1 + step)/(10 + step))."""

    EVERY = 4  # steps between updates, each with the decay of as many: reading all weights at every step costs too much

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.decay = decay
        self.source = [p.detach() for p in parameters]
        self.tensors: list[Tensor] = [p.clone() for p in self.source]

    @torch.no_grad()
    def update(self, step: int, last: bool = False) -> None:
        """Update after `step` if it is one of every `EVERY`, or the `last` step of a stage."""
        since = step % self.EVERY + 1
        if last or since == self.EVERY:
            decay = min(self.decay, (1 + step) / (10 + step)) ** since
            torch._foreach_lerp_(self.tensors, self.source, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap parameters and averages, in place; a second call swaps them back."""
        for parameter, average in zip(self.source, self.tensors, strict=True):
            old = parameter.clone()
            parameter.copy_(average)
            average.copy_(old)


@torch.no_grad()
def clip(gradients: list[Tensor], norm: float, largest: float) -> None:
    """Scale gradients, whose total norm is `norm`, down to a norm of `largest` if that is less; 0 is no limit."""
    if largest and largest < norm:
        torch._foreach_mul_(gradients, largest / norm)  # pyright: ignore[reportPrivateImportUsage]
