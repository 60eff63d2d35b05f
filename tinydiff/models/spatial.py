"""Self-attention over a map of tokens (h, w): which of them attend to which, and what they know of their places.

`ATTENTIONS` and `POSITIONS` are tables whose rows have one signature each. Any row goes with any size of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.attention import Attention
from tinydiff.networks.spatial import Spatial

HIDDEN = 32  # units between an offset and its biases; Liu et al. have 512, for heads that are far wider


def rates(width: int, device: torch.device | None = None) -> Tensor:
    """Frequencies of the sines of one side: (width / 4,) float32."""
    return 10000 ** (torch.arange(width // 4, dtype=torch.float32, device=device) * (-4 / width))


def positions(h: int, w: int, base: int, rates: Tensor) -> Tensor:
    """Sines and cosines of each token's column, then of its row, on a square of `base`: (h w, 4 rates) float32."""

    def along(n: int) -> Tensor:
        # The size is read off the numbers themselves: as a float it would be copied to the card in every call of a graph.
        places = torch.arange(n, device=rates.device).float()
        places = places / ((places[-1:] + 1) / base)  # on the square that was trained on
        angles = places[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (n, D/2)

    columns, rows = along(w)[None].expand(h, w, -1), along(h)[:, None].expand(h, w, -1)  # (h, w, D/2)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)  # (h w, D)


class Nowhere(nn.Module):
    """What tokens (B, h w, D) are told of their places: here nothing."""

    def __init__(self, dim: int, heads: int, spatial: Spatial):
        super().__init__()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens with what is added to them."""
        return x

    def bias(self, a: int, b: int, step: int) -> Tensor | None:
        """What is added to the scores between the tokens of a grid (a, b), `step` apart: (N, a b, a b) or nothing."""
        return None


class Sine(Nowhere):
    """Sinusoids of both sides (Vaswani et al. 2017, section 3.5; in two dimensions Dosovitskiy et al. 2021, appendix D.4)."""

    def __init__(self, dim: int, heads: int, spatial: Spatial):
        super().__init__(dim, heads, spatial)
        self.base, self.width = spatial.base, spatial.width or dim
        self.rates = nn.Parameter(rates(self.width)) if spatial.learn_frequencies else None

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        known = rates(self.width, x.device) if self.rates is None else self.rates.float()
        place = positions(*size, self.base, known)
        place = place if self.width == x.shape[2] else place.repeat_interleave(x.shape[2] // self.width, 1)
        return x + place.to(x.dtype)


class Learned(Nowhere):
    """A vector a cell of the square, between them by bilinear interpolation (Dosovitskiy et al. 2021, section 3.2)."""

    def __init__(self, dim: int, heads: int, spatial: Spatial):
        super().__init__(dim, heads, spatial)
        self.table = nn.Parameter(torch.randn(dim, spatial.base, spatial.base) * 0.02)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        table = F.interpolate(self.table[None], tuple(size), mode="bilinear")  # (1, D, h, w)
        return x + table.flatten(2).transpose(1, 2).to(x.dtype)


class Relative(Nowhere):
    """A bias for each head by the offset between two tokens, from a perceptron over sign(d) log(1 + |d|): there is one for
    offsets that no training image had (Liu et al. 2022, "Swin Transformer V2", equations 3 and 4)."""

    def __init__(self, dim: int, heads: int, spatial: Spatial):
        super().__init__(dim, heads, spatial)
        self.net = nn.Sequential(nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, heads, bias=False))

    def bias(self, a: int, b: int, step: int) -> Tensor | None:
        like = next(self.parameters())
        rows, columns = (torch.arange(1 - n, n, device=like.device) * step for n in (a, b))
        offsets = torch.stack([rows[:, None].expand(-1, columns.shape[0]), columns.expand(rows.shape[0], -1)], -1).to(
            like.dtype
        )
        table = self.net(offsets.sign() * offsets.abs().log1p()).flatten(0, 1)  # ((2a - 1) (2b - 1), N)
        down, across = (torch.arange(n, device=like.device) for n in (a, b))
        down, across = (d[:, None] - d + d.shape[0] - 1 for d in (down, across))  # (a, a), (b, b)
        which = down[:, None, :, None] * (2 * b - 1) + across[None, :, None, :]  # (a, b, a, b)
        return table.index_select(0, which.flatten()).unflatten(0, (a * b, a * b)).permute(2, 0, 1)


POSITIONS = {"none": Nowhere, "sine": Sine, "learned": Learned, "relative": Relative}


class SelfAttention(Attention):
    """All tokens of a map attend to each other."""

    def __init__(self, dim: int, heads: int, spatial: Spatial, qkv_bias: bool = False, qk_norm: bool = False):
        super().__init__(dim, heads, None, qkv_bias, qk_norm)
        self.spatial = spatial
        self.place = POSITIONS[spatial.positions](dim, heads, spatial)

    def forward(self, x: Tensor, context: Tensor | None = None, size: tuple[int, int] = (0, 0)) -> Tensor:
        return super().forward(self.place(x, size), context, size)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: tuple[int, int]) -> Tensor:
        bias = self.place.bias(*size, step=1)
        return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias[None].to(q.dtype))


def windows(n: int, size: int, shifted: bool, device: torch.device) -> tuple[Tensor, ...]:
    """A side of n tokens in windows: tokens and labels of each (G, S), the window and the place in it of each token (n,).

    `shifted` by half a window, around the border, as Swin's are (Liu et al. 2021, section 3.2): what came around it has
    another label, and so have the tokens from n on, which fill the last window. Sizes are tensors here, for graphs.
    """
    places, inside = (torch.arange(m, device=device) for m in ((n + size - 1) // size * size, n))
    shift = torch.where(places[-1] >= size, size // 2 if shifted else 0, 0)  # a window that is alone stays
    tokens, moved = (places + shift) % (places[-1] + 1), (inside - shift) % (places[-1] + 1)
    labels = (tokens < places).long() + 2 * (tokens > inside[-1])
    return torch.minimum(tokens, inside[-1]).view(-1, size), labels.view(-1, size), moved // size, moved % size


def strides(n: int, size: int, shifted: bool, device: torch.device) -> tuple[Tensor, ...]:
    """The same where tokens that are a multiple of `size` apart are a group (Child et al. 2019, section 4.3, on both sides)."""
    places = torch.arange(n, device=device)
    tokens = torch.arange(size, device=device)[:, None] + torch.arange((n + size - 1) // size, device=device) * size
    return torch.minimum(tokens, places[-1]), (tokens > places[-1]).long(), places % size, places // size


class Grouped(SelfAttention):
    """Tokens attend to those of their group: the cost grows with their number, not its square, where groups stay as large."""

    def groups(self, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Tokens of each group (G, S); labels (G, S); where each is among the G S (h w,); the grid of a group."""
        s = self.spatial
        along, size = (windows, s.window) if s.kind == "window" else (strides, s.stride)
        (rows, above, i, down), (columns, beside, j, across) = (along(n, size, s.shifted, device) for n in (h, w))
        a, b = rows.shape[1], columns.shape[1]
        index = rows[:, None, :, None] * w + columns[None, :, None, :]  # (G1, G2, S1, S2)
        labels = above[:, None, :, None] * 4 + beside[None, :, None, :]
        back = ((i[:, None] * columns.shape[0] + j) * a + down[:, None]) * b + across  # (h, w)
        return index.flatten(2).flatten(0, 1), labels.flatten(2).flatten(0, 1), back.flatten(), (a, b)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: tuple[int, int]) -> Tensor:
        index, labels, back, grid = self.groups(*size, device=x.device)
        count, slots = index.shape

        def apart(x: Tensor) -> Tensor:
            return x.index_select(2, index.flatten()).unflatten(2, (count, slots)).transpose(1, 2).flatten(0, 1)

        mask = torch.where(labels[:, None, :, None] == labels[:, None, None, :], 0.0, -torch.inf)  # (G, 1, S, S)
        bias = self.place.bias(*grid, step=1 if self.spatial.kind == "window" else self.spatial.stride)
        mask = (mask if bias is None else mask + bias).to(q.dtype)
        mask = mask.expand(x.shape[0], *mask.shape).flatten(0, 1)  # (B G, N, S, S)
        y = F.scaled_dot_product_attention(apart(q), apart(k), apart(v), mask)  # (B G, N, S, D/N)
        return y.unflatten(0, (x.shape[0], count)).transpose(1, 2).flatten(2, 3).index_select(2, back)


class Gated(SelfAttention):
    """Full attention, each head's output times a gate in [0, 1] that is computed from the mean of its input (B, T, D).

    Which heads an image needs depends on the image (cf. Meng et al. 2022, "AdaViT", section 3.2). Outside of training a head is
    not computed for an image whose gate is shut, and counted; graphs, recorded calls and compiled networks compute all.
    """

    asked = shut = 0  # heads, over all images and calls outside of training

    def __init__(self, dim: int, heads: int, spatial: Spatial, qkv_bias: bool = False, qk_norm: bool = False):
        super().__init__(dim, heads, spatial, qkv_bias, qk_norm)
        self.gate = nn.Linear(dim, heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: tuple[int, int]) -> Tensor:
        gates = F.hardsigmoid(self.gate(x.mean(1)))  # (B, N)
        recorded = gates.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.training or recorded or gates.is_meta or torch.compiler.is_compiling():
            return super().attend(q, k, v, x, size) * gates[..., None, None]
        rows, heads = gates.nonzero(as_tuple=True)
        self.asked, self.shut = self.asked + gates.numel(), self.shut + gates.numel() - rows.shape[0]
        bias = self.place.bias(*size, step=1)
        bias = None if bias is None else bias[heads, None].to(q.dtype)
        q_, k_, v_ = (y[rows, heads][:, None] for y in (q, k, v))  # (open heads, 1, T, D/N)
        y = F.scaled_dot_product_attention(q_, k_, v_, bias)[:, 0] * gates[rows, heads, None, None]
        return torch.zeros_like(q).index_put((rows, heads), y)


ATTENTIONS = {"full": SelfAttention, "window": Grouped, "strided": Grouped, "gated": Gated}


def heads_shut(network: nn.Module) -> tuple[int, int]:
    """Of the heads with gates, outside of training since the network was made: how many were skipped, and how many there were."""
    gated = [part for part in network.modules() if isinstance(part, Gated)]
    return sum(part.shut for part in gated), sum(part.asked for part in gated)
