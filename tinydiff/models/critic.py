"""The patch discriminator of pix2pix and VQGAN: whether each patch of an image is real, (B, 3, H, W) -> (B, 1, h, w)."""

from __future__ import annotations

import math

from torch import Tensor, nn

LEAK = 0.2


class Critic(nn.Module):
    """Strided convolutions, then two that are not (Isola et al. 2017, section 6.1.2), from images of any size.

    Group instead of batch normalisation, so that an image's logits depend neither on the others nor on the number of
    processes; and kernels of 3 at stride 1, so that `halvings` of any image end in a pixel at least. With two halvings a
    logit sees 26 x 26 pixels, with three 54 x 54.
    """

    def __init__(self, width: int, halvings: int):
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(LEAK)]
        for i in range(1, halvings + 1):
            kernel, stride = (4, 2) if i < halvings else (3, 1)
            layers += [nn.Conv2d(widths[i - 1], widths[i], kernel, stride, 1, bias=False)]
            layers += [nn.GroupNorm(math.gcd(8, widths[i]), widths[i]), nn.LeakyReLU(LEAK)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
