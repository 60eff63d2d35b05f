"""Leaving a transformer before its last block, where a head says that the others would change little.

Heads after chosen blocks give an output of their own and how uncertain it is, by which the network is left (Tang et al. 2023,
"DeeDiff", section 3; Teerapittayanon et al. 2016 had it for classifiers). What is uncertain is here the way to the last output,
since leaving loses no more than that: of noise no block knows more than another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Exit(nn.Module):
    """The network's own last layers again, and a confidence: tokens (B, T, D), c -> (B, T, outputs), (B,) in [0, 1]."""

    def __init__(self, dim: int, outputs: int, told: nn.Linear):
        super().__init__()
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.proj_out_1, self.proj_out_2 = told, nn.Linear(dim, outputs)
        self.uncertain = nn.Linear(dim, 1)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.proj_out_1(c)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        x = self.norm(x) * (1 + scale) + shift
        return self.proj_out_2(x), 1 - self.uncertain(x.mean(1))[:, 0].float().sigmoid()


def certain(early: Tensor, last: Tensor) -> Tensor:
    """The confidence that an early output should have: 1 - tanh of the mean distance from the last one, (B,)."""
    return 1 - (early - last).float().abs().flatten(1).mean(1).tanh()


class Leavers:
    """The rows of a batch that have left a network; `computed` (B,): after how many blocks each has, or will have."""

    def __init__(self, rows: int, blocks: int, device: torch.device):
        self.rows, self.computed = torch.arange(rows, device=device), torch.full((rows,), blocks, device=device)
        self.gone: list[tuple[Tensor, Tensor]] = []

    def leave(self, after: int, output: Tensor, go: Tensor, left: Sequence[Tensor]) -> list[Tensor]:
        """Rows that `go` (B,) leave with an `output` after so many blocks; the rows that stay of what is `left` of all."""
        stay = ~go
        self.computed[self.rows[go]] = after
        self.gone.append((self.rows[go], output[go]))
        self.rows = self.rows[stay]
        return [each[stay] if len(each) == len(go) else each for each in left]

    def joined(self, last: Tensor) -> Tensor:
        """All rows' outputs, in order, from those of the rows that stayed to the `last`."""
        whole = last.new_empty(len(self.computed), *last.shape[1:])
        for rows, output in [*self.gone, (self.rows, last)]:
            whole[rows] = output
        return whole
