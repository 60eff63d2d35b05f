"""AdamW and Muon, their learning rate (warm-up and cosine decay), and averaged weights. All depend on the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tinydiff.stages import Stage

MOMENTS = ("exp_avg", "exp_avg_sq")


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


class Muon(torch.optim.Optimizer):
    """torch's Muon (Jordan et al. 2024) for `matrices`, and AdamW for the `others`, by one learning rate and decay.

    A kernel (out, in, kh, kw) is a matrix (out, in kh kw) of the same memory. A matrix's update is as long as AdamW's mostly
    is, 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, equation 4). Its one moment is kept in its own shape as `exp_avg`.
    """

    def __init__(self, matrices: Iterable[Tensor], others: Sequence[Tensor], cfg: Stage):
        self.views = {p: matrix(p, p) for p in matrices}
        assert all(view.data_ptr() == p.data_ptr() for p, view in self.views.items()), "a copy would be updated"
        decay: float = cfg.weight_decay
        self.muon = torch.optim.Muon(self.views.values(), cfg.lr, decay, adjust_lr_fn="match_rms_adamw")
        self.inner = [self.muon, *([adamw(others, cfg)] if others else [])]
        super().__init__([{"params": [*self.views, *others]}], {"lr": cfg.lr})
        self.state.update({p: self.inner[-1].state[p] for p in others})  # the very same dicts

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in (group for each in self.inner for group in each.param_groups):
            group["lr"] = self.param_groups[0]["lr"]
        for p, view in self.views.items():
            view.grad = None if p.grad is None else matrix(p.grad, p)
            if view.grad is not None:
                state = self.state[p]
                state.setdefault("exp_avg", torch.zeros_like(p))
                state["step"] = state.get("step", torch.zeros(())) + 1
                self.muon.state[view]["momentum_buffer"] = matrix(state["exp_avg"], p)
        for each in self.inner:
            each.step()


def matrix(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A kernel as (out, rest), its columns in the order of the parameter's memory, of which it is a view."""
    order = sorted(range(1, parameter.ndim), key=parameter.stride, reverse=True)
    return tensor.detach().permute(0, *order).flatten(1)


def optimizer(module: nn.Module, parameters: Mapping[str, Tensor], cfg: Stage) -> torch.optim.Optimizer:
    """The one that `cfg` names, for `parameters` of a module, by its names. Muon leaves vectors and embeddings to AdamW."""
    tables = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    matrices = {n: p for n, p in parameters.items() if p.ndim > 1 and n not in tables and cfg.optimizer == "muon"}
    others = [p for name, p in parameters.items() if name not in matrices]
    return Muon(matrices.values(), others, cfg) if matrices else adamw(others, cfg)


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """The names of what an optimizer remembers of a parameter, each of its shape."""
    return MOMENTS[:1] if isinstance(optimizer, Muon) and parameter in optimizer.views else MOMENTS


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
