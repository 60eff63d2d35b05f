"""Networks whose features judge pictures: one that a package carries, or a file that the user has.

What is measured with one is named after it. A file is recognised by its tensors, whatever it is called; nothing but
tensors is read from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256 as hashed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff import system
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import sha256
from tinydiff.images import to_pixels
from tinydiff.measure.networks import FEATURES, find, official
from tinydiff.networks.network import imported
from tinydiff.system import shown

AT_ONCE = 16  # images of which activations are held


class Features(nn.Module):
    """A frozen feature network, in float32 whatever surrounds it. Pixels are (B, 3, H, W) in [-1, 1], of any size."""

    def __init__(self, name: str, network: Any, digests: Sequence[str]):
        super().__init__()
        self.name, self.network = name, network.eval().requires_grad_(False)
        self.digest = digests[0] if len(digests) == 1 else hashed("".join(digests).encode()).hexdigest()
        self.official: Mapping[str, str] = official(name, digests)

    def called(self, measure: str) -> str:
        """What a measure is called that uses these features, such as frechet_efficientnet-lite0 or FID."""
        return self.official.get(measure, f"{measure}_{self.name}")

    @property
    def compares(self) -> bool:
        """Whether it has a perceptual distance."""
        return self.network.maps is not None

    def train(self, mode: bool = True) -> Features:
        """Always in evaluation mode."""
        return self

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """One vector an image (B, D) and logits (B, classes), or None, of pixels resized to the network's own size."""
        pixels = self.resized(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.network(pixels.float())

    def resized(self, pixels: Tensor) -> Tensor:
        """Pixels in the size that the network was trained at."""
        side = self.network.side
        if pixels.shape[2:] == (side, side):
            return pixels
        return F.interpolate(pixels, (side, side), **self.network.resize).clamp(-1, 1)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Activations (B, C, h, w) from fine to coarse, of pixels at their own size. Raises UsageError where it has none."""
        if self.network.maps is None:
            raise UsageError(f"the feature network {self.name} compares no places of images; name another")
        if min(pixels.shape[2:]) < (least := self.network.smallest):
            raise UsageError(f"the feature network {self.name} needs images of {least} pixels or more; name another")
        with torch.autocast(pixels.device.type, enabled=False):
            return self.network.maps(pixels.float())

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Perceptual distance of each pair of images (B,), differentiable: equation 1 of Zhang et al. 2018.

        Over layers, the mean over places of the squared difference of activations, each made a unit vector over channels;
        w is the network's own weights (1, C, 1, 1) a layer, or 1.
        """
        layers = [(unit(x) - unit(y)).square() for x, y in zip(self.maps(a), self.maps(b), strict=True)]
        if (weights := getattr(self.network, "weights", None)) is not None:
            layers = [layer * w for layer, w in zip(layers, weights, strict=True)]
        return torch.stack([layer.sum(1).mean((1, 2)) for layer in layers]).sum(0)

    @torch.inference_mode()
    def seen(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """`forward` on its device, some at a time: uint8 (B, H, W, 3) to float32 (B, D), and (B, classes) or None.

        Raises ModelError where the network gives NaN or infinite values.
        """
        vectors, logits = zip(*map(self, self._parts(to_pixels(images))), strict=True)
        out = array(vectors), None if logits[0] is None else array(logits)
        if not all(part is None or np.isfinite(part).all() for part in out):
            raise ModelError(f"the feature network {self.name} gives NaN or infinite values; name another file")
        return out

    @torch.inference_mode()
    def distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """`distance` on its device, some at a time: of pixels (B, 3, H, W) in [-1, 1], float32 (B,)."""
        return array([self.distance(x, y) for x, y in zip(self._parts(a), self._parts(b), strict=True)])

    def _parts(self, pixels: np.ndarray) -> Iterator[Tensor]:
        device = next(self.parameters()).device
        for part in torch.from_numpy(pixels).split(AT_ONCE):
            yield part.to(device, memory_format=torch.channels_last)


def array(parts: Sequence[Tensor]) -> np.ndarray:
    return torch.cat(list(parts)).cpu().numpy()


def unit(x: Tensor) -> Tensor:
    """(B, C, h, w) divided by its length over channels."""
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()


def open_features(given: str = "") -> Features:
    """The feature network of a name, of a file, or of files joined by commas; "" is the default's. On the CPU.

    Raises UsageError for a package or file that is missing, ModelError for a file that cannot be read or is no known network.
    """
    paths, tensors = find(given), dict[str, Tensor]()
    for path in paths:
        tensors |= tensors_of(path)
    told = ", ".join(map(shown, paths))
    for name, row in FEATURES.items():
        if own := imported(f"{row.module.partition(':')[0]}:{row.own}")(tensors):
            with torch.device("meta"):
                network = imported(row.module)()
            try:
                network.load_state_dict(own, assign=True)
            except RuntimeError as error:
                problem = system.cut(system.one_line(str(error)))
                raise ModelError(f"{told}: no whole {name}: {problem}; {system.RESTORE}") from None
            return Features(name, network, [sha256(path) for path in paths])
    raise ModelError(f"{told}: not a feature network that tinydiff knows ({', '.join(FEATURES)}); name another file")


def tensors_of(path: Path) -> dict[str, Tensor]:
    """A file of tensors, safetensors or torch's own, in float32. Raises ModelError."""
    try:
        safe = path.suffix == ".safetensors"
        found = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise system.unreadable(error, path) from None
    except Exception as error:  # safetensors, zipfile and torch's own unpickler have an exception of their own each
        reason = f"{type(error).__name__} {system.cut(system.one_line(str(error)))}".strip()
        raise ModelError(f"{shown(path)}: no file of tensors ({reason}); {system.RESTORE}, or name another") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{shown(path)}: holds something else than tensors; name another file")
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()}
