"""VGG16, whose activations LPIPS compares, under the names of torchvision's file; and the weights of LPIPS.

Simonyan & Zisserman 2015, configuration D, without its classifier. It reads pixels (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # a group between two poolings
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, of values from 0 to 1


class VGG16(nn.Module):
    side, smallest = 224, 16  # pixels a side of what it was trained on, and that `maps` needs
    resize = {"mode": "bicubic", "antialias": True}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.features, self.ends, channels = nn.Sequential(), [], 3  # `ends`: the last activation of each group
        for group in WIDTHS:
            self.features.extend([nn.MaxPool2d(2)] if len(self.features) else [])
            for width in group:
                self.features.extend([nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()])
                channels = width
            self.ends.append(len(self.features) - 1)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Activations at the resolution and 1/2, 1/4, 1/8, 1/16 of it: (B, 64 | 128 | 256 | 512 | 512, h, w)."""
        mean, deviation = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, DEVIATION))
        x, out = ((x + 1) / 2 - mean) / deviation, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.ends:
                out.append(x)
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """One vector an image (B, 512), the mean of the last activation over places; no logits."""
        return self.maps(x)[-1].mean((2, 3)), None


class LPIPS(VGG16):
    """VGG16 with a learned weight for each channel of its maps: version 0.1 of Zhang et al. 2018."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.empty(1, widths[-1], 1, 1) for widths in WIDTHS)


def own(tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of the convolutions among those of a file, or of several; None of other files."""
    found = {name: t for name, t in tensors.items() if re.fullmatch(r"features\.\d+\.(weight|bias)", name)}
    return found if tensors.get("features.28.weight", torch.empty(0)).shape == (512, 512, 3, 3) else None


def own_with_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The same and the weights of LPIPS (`lin0.model.1.weight`, ...); None without them."""
    found, weights = own(tensors), (re.fullmatch(r"lin(\d+)\.model\.1\.weight", name) for name in tensors)
    learned = {f"weights.{match[1]}": tensors[match[0]] for match in weights if match}
    return found | learned if found and learned else None
