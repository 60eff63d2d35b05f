"""onnxruntime's operators that only CUDA has, in numpy after their documentation: for onnx's reference evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun


def normalised(x: np.ndarray, gamma: Any, beta: Any, epsilon: float, groups: int, activation: int) -> np.ndarray:
    """Group norm of (B, H, W, C), then SiLU if `activation`."""
    batch, height, width, channels = x.shape
    split = x.astype(np.float64).reshape(batch, height * width, groups, channels // groups)
    mean, variance = split.mean((1, 3), keepdims=True), split.var((1, 3), keepdims=True)
    y = ((split - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
    return (y / (1 + np.exp(-y)) if activation else y).astype(x.dtype)


class GroupNorm(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, gamma, beta, epsilon=1e-5, groups=None, activation=None, channels_last=1):  # type: ignore[override]
        assert channels_last == 1 and x.ndim == 4 and gamma.dtype == beta.dtype == np.float32
        return (normalised(x, gamma, beta, epsilon, groups, activation),)


class SkipGroupNorm(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, gamma, beta, skip, epsilon=1e-5, groups=None, activation=None, channels_last=1):  # type: ignore[override]
        assert skip.shape in (x.shape, (x.shape[0], 1, 1, x.shape[3])) and gamma.dtype == np.float32
        return normalised(x + skip, gamma, beta, epsilon, groups, activation), x + skip


class MultiHeadAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(  # type: ignore[override]
        self,
        q,
        k=None,
        v=None,
        bias=None,
        padding=None,
        mask=None,
        num_heads=None,
        scale=None,
        unidirectional=0,
        **_: Any,
    ):
        assert bias is None and padding is None
        if q.ndim == 5:  # (B, T, N, 3, H)
            q, k, v = (q[:, :, :, i] for i in range(3))
        elif k.ndim == 5:
            k, v = k[:, :, :, 0], k[:, :, :, 1]
        q, k, v = (x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
        scores = q @ k.swapaxes(-1, -2) * (scale or q.shape[-1] ** -0.5) + (0 if mask is None else mask)
        if unidirectional:
            scores = np.where(np.tri(*scores.shape[-2:]), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ v
        return (y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1).astype(q.dtype),)


OPERATORS: list[Any] = [GroupNorm, SkipGroupNorm, MultiHeadAttention]
