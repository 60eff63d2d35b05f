"""How well an autoencoder that is not trained yet reconstructs some images of a source."""

from __future__ import annotations

import numpy as np
import torch

from tinydiff import config, images
from tinydiff.checkpoints import folder
from tinydiff.data.dataset import Source
from tinydiff.errors import DataError
from tinydiff.measure.distances import decibels
from tinydiff.networks import VAE, network_of
from tinydiff.networks.autoencoder import table_of

COUNT = 64  # images, spread over the source


@torch.no_grad()
def decibels_of(name: str, source: Source, resolution: int) -> float:
    """PSNR in dB of the mean squared error of images, cut to squares, through the autoencoder that `autoencoder.path` names.

    Images that cannot be read are left out. Raises DataError where that is all of them.
    """
    cfg = config.make(autoencoder={"path": name})
    place = cfg.autoencoder_network.given(cfg)
    assert place
    table = table_of(place)
    vae, errors = folder.opened(network_of(VAE, table), table, place), []
    for i in np.unique(np.linspace(0, len(source) - 1, min(COUNT, len(source))).astype(int)).tolist():
        try:
            pixels = images.to_pixels(images.fit(source.image(i), resolution)[None])
        except DataError:
            continue
        x = torch.from_numpy(pixels)
        y = vae.decode(vae.distribution(x)[0]).clamp(-1, 1)  # pyright: ignore[reportCallIssue]
        errors.append(float((x - y).square().mean()))
    if not errors:
        raise DataError("none of the images can be read; mend them")
    return decibels(float(np.mean(errors)))
