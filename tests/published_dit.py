"""The published DiT: weights under its names, and the paper's network written out from them."""

from __future__ import annotations

import math

import numpy as np
import torch
from tensors import noise
from torch.nn import functional as F

CLASSES = 5


def published_weights(depth: int, width: int, patch: int = 2, classes: int = CLASSES, side: int = 8) -> dict:
    """Random tensors under the published names, four channels in, eight out."""
    w = {
        "x_embedder.proj": (width, 4, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch * patch * 8, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    rows = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 4, "adaLN_modulation.1": 6}
    for i in range(depth):
        w |= {f"blocks.{i}.{name}": (n * width, width) for name, n in rows.items()}
        w[f"blocks.{i}.mlp.fc2"] = (width, 4 * width)
    tensors = {}
    for seed, (name, shape) in enumerate(w.items()):
        tensors[f"{name}.weight"] = noise(*shape, seed=seed) / math.prod(shape[1:]) ** 0.5
        tensors[f"{name}.bias"] = noise(shape[0], seed=1000 + seed) / 10
    tensors["y_embedder.embedding_table.weight"] = noise(classes + 1, width, seed=99)
    tensors["pos_embed"] = torch.from_numpy(places(side // patch, width)).float()[None]
    return tensors


def places(n: int, width: int) -> np.ndarray:
    """(n n, width): a quarter each of sin(column), cos(column), sin(row), cos(row) at rates 1 to 1/10000."""
    rate = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.divmod(np.arange(n * n), n)
    return np.concatenate([f(axis[:, None] * rate) for axis in (columns, rows) for f in (np.sin, np.cos)], axis=1)


def reference(w: dict, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor, heads: int) -> torch.Tensor:
    """The paper's DiT with adaLN-Zero (figure 3), from its published parameters: all 2 C channels."""

    def linear(name: str, v: torch.Tensor) -> torch.Tensor:
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(v: torch.Tensor) -> torch.Tensor:
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def attention(name: str, v: torch.Tensor) -> torch.Tensor:
        q, k, u = linear(f"{name}.qkv", v).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, N, T, D/N)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return linear(f"{name}.proj", (scores @ u).transpose(1, 2).flatten(2))

    p, c_in = w["x_embedder.proj.weight"].shape[-1], x.shape[1]
    b, rows, columns = x.shape[0], x.shape[2] // p, x.shape[3] // p
    patches = x.reshape(b, c_in, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, -1)
    h = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)  # float32 also where all else is not
    time = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", time)))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][label])
    for i in range(1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks."))):
        m = linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        h = h + m[2] * attention(f"blocks.{i}.attn", norm(h) * (1 + m[1]) + m[0])
        inner = linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + m[4]) + m[3])
        h = h + m[5] * linear(f"blocks.{i}.mlp.fc2", F.gelu(inner, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift).reshape(b, rows, columns, p, p, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * p, columns * p)
