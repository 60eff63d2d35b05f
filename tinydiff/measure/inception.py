"""The Inception v3 of 2015-12-05 that FID, KID and the Inception score are defined by, under the names of its PyTorch file.

Szegedy et al. 2016, with the poolings of TensorFlow's graph: averages leave out the padding, and the last block takes the
largest value instead. It reads pixels (B, 3, H, W) in [-1, 1]; images narrower than 75 pixels have to be resized first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-3
WIDTH, CLASSES = 2048, 1008

Pool = Callable[[Tensor], Tensor]
average: Pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
largest: Pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halved: Pool = partial(F.max_pool2d, kernel_size=3, stride=2)

# A block is chains of convolutions beside each other, {name: [a pool or none, then (width, kernel, stride) each]}; at stride 1
# a convolution keeps the size. FORK: 1x3 and 3x1 beside each other. Figures 5 to 7 and 10 of the paper.
FORK = "fork"
Chains = dict[str, list[Any]]


def block_a(pool: int) -> Chains:
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [average, (pool, 1)],
    }


def block_c(width: int) -> Chains:
    w, high, wide = width, (7, 1), (1, 7)
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(w, 1), (w, wide), (192, high)],
        "branch7x7dbl": [(w, 1), (w, high), (w, wide), (w, high), (192, wide)],
        "branch_pool": [average, (192, 1)],
    }


def block_e(pool: Pool) -> Chains:
    return {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), (384, FORK)],
        "branch3x3dbl": [(448, 1), (384, 3), (384, FORK)],
        "branch_pool": [pool, (192, 1)],
    }


BLOCKS: dict[str, Chains] = {
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "pool": [halved]},
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": {
        "branch3x3": [(192, 1), (320, 3, 2)],
        "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
        "pool": [halved],
    },
    "Mixed_7b": block_e(average),
    "Mixed_7c": block_e(largest),
}


class ConvBN(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, padding: Any = "same"):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, 0 if stride > 1 else padding, bias=False)
        self.bn = nn.BatchNorm2d(out, EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    def __init__(self, channels: int, chains: Chains):
        super().__init__()
        self.chains, self.width = list[list[Any]](), 0  # steps: a pool, or convolutions beside each other
        for name, steps in chains.items():
            width, chain = channels, list[Any]()
            pools, convolutions = steps[: callable(steps[0])], steps[callable(steps[0]) :]
            for number, (out, kernel, *stride) in enumerate(convolutions, 1):
                full = name if len(convolutions) == 1 else f"{name}_{number}"
                parts = {"a": (1, 3), "b": (3, 1)} if kernel == FORK else {"": kernel}
                for suffix, size in parts.items():
                    self.add_module(full + suffix, ConvBN(width, out, size, *stride))
                chain.append([full + suffix for suffix in parts])
                width = out * len(parts)
            self.chains.append(pools + chain)
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, width, h, w), or half the size."""
        out = []
        for chain in self.chains:
            h = x
            for step in chain:
                h = step(h) if callable(step) else torch.cat([self.get_submodule(name)(h) for name in step], 1)
            out.append(h)
        return torch.cat(out, 1)


class Inception(nn.Module):
    side = 299  # pixels a side of what it was trained on
    resize = {"mode": "bilinear"}  # not antialiased, as published scores have it  # noqa: RUF012
    maps = None  # its convolutions without padding leave nothing of small images

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=0)
        channels = 192
        for name, chains in BLOCKS.items():
            self.add_module(name, block := Block(channels, chains))
            channels = block.width
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One vector an image (B, 2048), and logits (B, 1008) without bias, which the Inception score is defined by."""
        x = halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))  # (B, 64, 73, 73)
        x = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # (B, 192, 35, 35)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)  # to (B, 2048, 8, 8)
        pooled = x.mean((2, 3))
        return pooled, pooled @ self.fc.weight.T


def own(tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The network's own tensors among a file's; None of another file."""
    return tensors if tensors.get("fc.weight", torch.empty(0)).shape == (CLASSES, WIDTH) else None
