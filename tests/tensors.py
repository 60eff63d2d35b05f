"""Random tensors and networks, the same every time, and whether tensors agree."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random weights that keep the size of what goes through: nothing is zero, nothing explodes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / (p[0].numel() ** 0.5))
            else:
                p.copy_(noise * 0.1 + ("norm" in name and name.endswith("weight")))


def same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to float32's rounding, and not for being zero."""
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The same names, types and bits."""
    same = one.keys() == other.keys()
    return same and all(v.dtype == other[k].dtype and torch.equal(v, other[k]) for k, v in one.items())
