"""onnxruntime's operators that only CUDA has, in numpy after their documentation: for onnx's reference evaluator."""

from __future__ import annotations

import math
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

    def _run(  # type: ignore[override]
        self, x, gamma, beta, skip, bias=None, epsilon=1e-5, groups=None, activation=None, channels_last=1
    ):
        assert skip.shape in (x.shape, (x.shape[0], 1, 1, x.shape[3])) and gamma.dtype == np.float32
        total = x + skip if bias is None else x + skip + bias
        assert total.dtype == x.dtype
        return normalised(total, gamma, beta, epsilon, groups, activation), total


class NhwcConv(OpRun):
    op_domain = "com.microsoft"

    def _run(  # type: ignore[override]
        self, x, w, b=None, auto_pad=None, dilations=None, group=None, kernel_shape=None, pads=None, strides=None
    ):
        """x (B, H, W, C) with filters (out, h, w, C)."""
        assert (group or 1) == 1 and (auto_pad or "NOTSET") == "NOTSET" and x.dtype == w.dtype
        top, left, bottom, right = pads or (0, 0, 0, 0)
        kernel, step, apart = w.shape[1:3], strides or (1, 1), dilations or (1, 1)
        x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
        span = [apart[i] * (kernel[i] - 1) + 1 for i in range(2)]
        seen = np.lib.stride_tricks.sliding_window_view(x, span, (1, 2))[:, :: step[0], :: step[1]]
        seen = seen[..., :: apart[0], :: apart[1]].astype(np.float64)
        y = np.einsum("bhwcij,oijc->bhwo", seen, w.astype(np.float64)) + (0 if b is None else b)
        return (y.astype(x.dtype),)


class BiasSplitGelu(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, bias):  # type: ignore[override]
        assert x.ndim == 3 and x.shape[-1] in (2560, 5120, 10240) and bias.shape == x.shape[-1:]
        value, gate = np.split(x.astype(np.float64) + bias, 2, -1)
        erf = np.vectorize(math.erf)
        return ((value * gate * 0.5 * (1 + erf(gate / 2**0.5))).astype(x.dtype),)


class FastGelu(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, bias):  # type: ignore[override]
        assert bias.shape == x.shape[-1:]
        y = x.astype(np.float64) + bias
        return ((0.5 * y * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3)))).astype(x.dtype),)


class BiasAdd(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, bias, skip):  # type: ignore[override]
        assert x.shape == skip.shape and x.ndim == 3 and x.shape[-1] in (320, 640, 1280) and bias.shape == x.shape[-1:]
        return (x + bias + skip,)


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


OPERATORS: list[Any] = [GroupNorm, SkipGroupNorm, NhwcConv, BiasSplitGelu, FastGelu, BiasAdd, MultiHeadAttention]
