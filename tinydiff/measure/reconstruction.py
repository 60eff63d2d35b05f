"""What the autoencoder makes of images: through the latent's mean and back, clipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff import images, pipeline
from tinydiff.measure.distances import decibels, ssim
from tinydiff.measure.intervals import resampled

if TYPE_CHECKING:
    from tinydiff.measure.features import Features


def reconstruction(
    backend: pipeline.Backend,
    originals: Iterable[np.ndarray],
    batch_size: int,
    seed: int,
    networks: Sequence[Features] = (),
) -> dict[str, Any]:
    """Figures of images, uint8 (H, W, 3) of one size, and their intervals over images.

    PSNR in dB is of the mean squared error over all images; SSIM, and the perceptual distance of each network that has
    one, are means over images.
    """
    errors, rest = dict[str, list[np.ndarray]](), iter(originals)
    while batch := list(islice(rest, batch_size)):
        pixels = images.to_pixels(np.stack(batch))
        with np.errstate(all="ignore"):  # `latents` and `decoded` report what numpy would warn of
            scaling = np.float32(backend.description.scaling_factor)
            output = pipeline.decoded(backend, pipeline.latents(backend, pixels) / scaling)
        output = np.clip(output, -1, 1)
        found = {"psnr": ((output.astype(np.float64) - pixels) ** 2).mean((1, 2, 3))}
        found["ssim"] = ssim((pixels + 1) / 2, (output + 1) / 2)
        found |= {n.called("perceptual"): n.distances(pixels, output) for n in networks if n.compares}
        for name, values in found.items():
            errors.setdefault(name, []).append(values)
    row: dict[str, Any] = {"intervals": {}}
    for name, parts in errors.items():
        values, key = np.concatenate(parts), f"reconstruction_{name}"
        figure = psnr if name == "psnr" else np.mean
        row[key], interval = resampled(lambda i, f=figure, v=values: float(f(v[i])), len(values), seed)
        row["intervals"] |= {key: interval} if interval else {}
    return row


def psnr(errors: np.ndarray) -> float:
    """dB, from mean squared errors of images whose values span 2."""
    return decibels(float(errors.mean()))
