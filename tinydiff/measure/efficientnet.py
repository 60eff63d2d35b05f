"""EfficientNet-Lite0, whose features judge pictures and guide training, under the parameter names of its PyPI package.

Tan & Le 2019, without squeeze-and-excitation and with ReLU6, as TensorFlow's Lite variants have it. It reads pixels
(B, 3, H, W) in [-1, 1]; `maps` are its activations before each halving, `forward` one vector and the ImageNet-1k logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-3
STAGES = (  # (width, blocks, kernel, stride, expansion), table 1 of the paper; stem and head keep their widths
    (16, 1, 3, 1, 1),
    (24, 2, 3, 2, 6),
    (40, 2, 5, 2, 6),
    (80, 3, 3, 2, 6),
    (112, 3, 5, 1, 6),
    (192, 4, 5, 2, 6),
    (320, 1, 3, 1, 6),
)
STEM, HEAD, CLASSES = 32, 1280, 1000


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: at stride 2 one pixel more to the right and below."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            pad = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [pad // 2, pad - pad // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


def convolution(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(channels, out, kernel, stride, groups=groups, bias=False)


class MBConv(nn.Module):
    """Expand, convolve each channel, project; residual where the shape stays (Sandler et al. 2018, section 3)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = channels * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = convolution(channels, width, 1), nn.BatchNorm2d(width, EPS)
        self._depthwise_conv = convolution(width, width, kernel, stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, EPS)
        self._project_conv, self._bn2 = convolution(width, out, 1), nn.BatchNorm2d(out, EPS)
        self.expands, self.residual = expansion > 1, stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    side, smallest = 224, 1  # pixels a side of what it was trained on, and that `maps` needs
    resize = {"mode": "bicubic", "antialias": True}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = convolution(3, STEM, 3, 2), nn.BatchNorm2d(STEM, EPS)
        self._blocks, channels = nn.ModuleList(), STEM
        self.ends = []  # blocks after which the next one halves the resolution, or there is none
        for width, blocks, kernel, stride, expansion in STAGES:
            if stride == 2:
                self.ends.append(len(self._blocks) - 1)
            for i in range(blocks):
                self._blocks.append(MBConv(channels, width, kernel, 1 if i else stride, expansion))
                channels = width
        self.ends.append(len(self._blocks) - 1)
        self._conv_head, self._bn1 = convolution(channels, HEAD, 1), nn.BatchNorm2d(HEAD, EPS)
        self._fc = nn.Linear(HEAD, CLASSES)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Activations at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution: (B, 16 | 24 | 40 | 112 | 320, h, w)."""
        x, out = F.relu6(self._bn0(self._conv_stem(x))), []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in self.ends:
                out.append(x)
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One vector an image (B, 1280), and logits (B, 1000)."""
        pooled = F.relu6(self._bn1(self._conv_head(self.maps(x)[-1]))).mean((2, 3))
        return pooled, self._fc(pooled)


def own(tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The network's own tensors among a file's; None of another file."""
    return tensors if tensors.get("_conv_head.weight", torch.empty(0)).shape == (HEAD, STAGES[-1][0], 1, 1) else None
