"""The latent cache: every image's latent distribution, keyed by image content, resolution and autoencoder.

A stale cache cannot be read: the key is in the file name, and the file name is asked for by key.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tinydiff import images
from tinydiff.data.dataset import Images
from tinydiff.files import write_file
from tinydiff.models.autoencoder import Autoencoder, mean_and_std


def digest(module: nn.Module) -> str:
    """SHA-256 over a network's parameters in float32, names included."""
    h = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        h.update(name.encode())
        h.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return h.hexdigest()


def cached(folder: Path, data: Images, vae: Autoencoder, progress: Callable[[int, int], None]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every latent, (N, C, h, w) float32 each, computed once and then read."""
    d = data.data
    text = f"{data.source.fingerprint()} {d.resolution} {d.flip} {d.background} {digest(vae)}"
    path = folder / f"latents-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    with contextlib.suppress(OSError, SafetensorError):  # missing, or cut off by a dying disk: compute it again
        tensors = load_file(path)
        return tensors["mean"], tensors["std"]
    mean, std = compute(data, vae, progress)
    write_file(path, save({"mean": mean, "std": std}), force=True)
    return mean, std


@torch.no_grad()
def compute(
    data: Images, vae: Autoencoder, progress: Callable[[int, int], None], batch: int = 64
) -> tuple[Tensor, Tensor]:
    """Encode every image, in float32 on the autoencoder's device."""
    device, results = next(vae.parameters()).device, []
    for start in range(0, len(data), batch):
        pixels = images.to_pixels(np.stack([data[i] for i in range(start, min(start + batch, len(data)))]))
        x = torch.from_numpy(pixels).to(device, memory_format=torch.channels_last)
        results.append([t.float().cpu().contiguous() for t in mean_and_std(vae.encode(x))])
        progress(min(start + batch, len(data)), len(data))
    means, stds = zip(*results, strict=True)
    return torch.cat(means), torch.cat(stds)
