"""Random weights under the names of published feature networks' files, the same on every machine."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tinydiff.measure.inception import Inception
from tinydiff.measure.vgg import VGG16, WIDTHS


def seeded(kind: type[nn.Module]) -> dict[str, Tensor]:
    """A network's tensors, of a size that keeps activations near 1."""
    with torch.device("meta"):
        network = kind()
    generator, out = torch.Generator().manual_seed(0), {}
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue  # published files have no count of batches
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            out[name] = noise * math.sqrt(2 / tensor[0].numel())
        else:
            out[name] = 1 + 0.1 * noise if name.endswith(("bn.weight", "running_var")) else 0.1 * noise
    return out


def inception() -> dict[str, Tensor]:
    return seeded(Inception)


def vgg16() -> dict[str, Tensor]:
    return seeded(VGG16)


def lpips_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"lin{i}.model.1.weight": torch.rand((1, widths[-1], 1, 1), generator=generator)
        for i, widths in enumerate(WIDTHS)
    }
