"""How well an autoencoder reconstructs pictures: a table of PSNR, SSIM, perceptual distance and chroma error.

`python scripts/reconstructions.py AUTOENCODER FOLDER ...`: images are put on white and cut to a square at each size;
those smaller than it are left out. PSNR is of the mean squared error over all images; the chroma error is the mean
absolute error of Cb and Cr as a share of their range. `--picture FILE` shows images above their reconstructions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from patches import SUFFIXES
from PIL import Image

from tinydiff import config, images
from tinydiff.checkpoints import folder
from tinydiff.errors import DataError, UsageError, UserError
from tinydiff.files import write_file
from tinydiff.measure import distances
from tinydiff.measure.features import Features, open_features
from tinydiff.system import shown
from tinydiff.training.losses import chroma, psnr


def pictures(place: Path, size: int, count: int) -> np.ndarray:
    """uint8 (N, size, size, 3): up to `count` images of a folder, spread over it."""
    paths = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    found = []
    for path in paths[:: max(1, len(paths) // (2 * count))]:
        try:
            with Image.open(path) as image:
                if min(image.size) < size:
                    continue
                white = Image.new("RGBA", image.size, "white")
                white.alpha_composite(image.convert("RGBA"))
        except (OSError, SyntaxError, ValueError) as error:  # as Pillow says it
            raise DataError(f"{shown(path)}: cannot be read ({shown(error)}); mend or remove it") from None
        found.append(images.fit(np.asarray(white.convert("RGB")), size))
    return np.stack(found[:count]) if found else np.zeros((0, size, size, 3), np.uint8)


@torch.no_grad()
def reconstructed(vae, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] through the latents' means."""
    return vae.decode(vae.distribution(pixels)[0]).clamp(-1, 1)


def row(vae, features: Features, batch: np.ndarray) -> tuple[list[float], np.ndarray]:
    """(PSNR in dB, SSIM, perceptual distance, chroma error in %), and the reconstructions, uint8."""
    x = torch.from_numpy(images.to_pixels(batch))
    output = torch.cat([reconstructed(vae, part) for part in x.split(4)])
    a, b = x.numpy(), output.numpy()
    ssim, distance = distances.ssim((a + 1) / 2, (b + 1) / 2).mean(), features.distances(a, b).mean()
    colour = 50 * chroma(x - output).abs().mean().item()  # of a range of 2, in percent
    return [psnr(x, output), ssim, distance, colour], images.to_uint8(b)


def compared(vae, place: Path, size: int, args: argparse.Namespace, features: Features) -> None:
    """Print the row of a folder at a size, and draw its picture if that is asked for."""
    if not len(batch := pictures(place, size, args.count)):
        return
    figures, drawn = row(vae, features, batch)
    print(f"| {place.name} | {size} | {len(batch)} | " + " | ".join(f"{f:.4g}" for f in figures) + " |", flush=True)
    if args.picture:
        both = np.concatenate([batch[:8], drawn[:8]])
        name = args.picture.with_name(f"{args.picture.stem}-{place.name}-{size}.png")
        write_file(name, images.encode_png(images.grid(both, min(8, len(batch))), None), force=True)


def compare(args: argparse.Namespace) -> None:
    """Print the table. Raises UserError for what cannot be."""
    cfg = config.load(None, [f"autoencoder.path={args.autoencoder}", "data.resolution=512"])
    network = cfg.autoencoder_network
    if (place := network.given(cfg)) is None:
        raise UsageError("the autoencoder's name is empty; give what autoencoder.path takes")
    if args.count < 1 or any(size < 1 or size % cfg.autoencoder.factor for size in args.sizes):
        raise UsageError(f"--count, --sizes: give 1 or more, and multiples of {cfg.autoencoder.factor} pixels")
    if missing := [each for each in args.folders if not each.is_dir()]:
        raise DataError(f"{shown(missing[0])}: no such folder; give folders of images")
    vae, features = folder.opened(network, network.describe(cfg), place), open_features()
    print("| images | size | of | PSNR, dB | SSIM | distance | chroma error, % |\n|---|---|---|---|---|---|---|")
    for each in args.folders:
        for size in args.sizes:
            compared(vae, each, size, args, features)


def main(arguments: list[str] | None = None) -> int:
    """The command: prints the table, returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("autoencoder", help="what autoencoder.path takes")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--picture", type=Path)
    try:
        compare(parser.parse_args(arguments))
    except UserError as error:
        print(f"reconstructions.py: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
