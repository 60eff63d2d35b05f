"""Small squares of many pictures at many scales, to train an autoencoder that suits any of them.

`python scripts/patches.py OUT SOURCE=COUNT ...`: each SOURCE is a folder of images (any depth), or the word `textures`,
which are computed. A picture is scaled so that its short side is between one and twelve patches, put on white or on a
random colour where it is transparent, cut, and sometimes mirrored. The same arguments give the same files.

The shipped autoencoder (`weights/autoencoder/`) has seen, of Debian's packages, gnome-backgrounds, mate-backgrounds,
plasma-workspace-wallpapers, ukui-wallpapers, lomiri-wallpapers-16.04 and -20.04 (in one folder), openclipart-png, the tracks of
supertuxkart-data, the emoji of `scripts/emoji.py`, and textures; `weights/autoencoder/README.md` has the command.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tinydiff.diffusion.noise import keyed
from tinydiff.progress import Progress

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST = 12  # patches along the short side of the largest scale
SCALES = 6  # of each picture
FLAT = 4.0  # a patch with a smaller deviation, of 255, is kept one time in eight


def pictures(folder: Path) -> list[Path]:
    """The images of a folder, of each picture the largest file: wallpapers are named by their sizes, 3840x2160.jpg."""
    paths = (
        p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file() and not p.is_symlink()
    )
    largest: dict[Path, Path] = {}
    for path in (path for path in paths if path.stem != "screenshot"):
        where = path.parent if path.stem.replace("x", "").isdigit() else path  # 1920x1080.jpg beside 3840x2160.jpg
        if where not in largest or path.stat().st_size > largest[where].stat().st_size:
            largest[where] = path
    return list(largest.values())


def flattened(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """RGB; what is transparent shows white, or one time in two a random colour."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    colour = (255, 255, 255) if rng.random() < 0.5 else tuple(int(v) for v in rng.integers(0, 256, 3))
    back = Image.new("RGBA", image.size, (*colour, 255))
    back.alpha_composite(image.convert("RGBA"))
    return back.convert("RGB")


def cut(path: Path, count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`count` patches of a picture, uint8 (size, size, 3)."""
    with Image.open(path) as file:
        image = flattened(file, rng)
    short = min(image.size)
    scales = [
        scaled(image, size * max(1.0, min(LARGEST, short / size) ** rng.random())) for _ in range(min(SCALES, count))
    ]
    for _ in range(count):
        pixels = scales[int(rng.integers(len(scales)))]
        for _ in range(8):
            y, x = (int(rng.integers(side - size + 1)) for side in pixels.shape[:2])
            patch = pixels[y : y + size, x : x + size]
            if patch.std() >= FLAT or rng.random() < 1 / 8:
                break
        yield patch[:, ::-1] if rng.random() < 0.5 else patch


def scaled(image: Image.Image, short: float) -> np.ndarray:
    """(H, W, 3) with a short side of `short` pixels, rounded."""
    factor = round(short) / min(image.size)
    return np.asarray(
        image.resize([max(round(side * factor), round(short)) for side in image.size], Image.Resampling.LANCZOS)
    )


def texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """Noise with a spectrum 1/f^a and colours of its own, or stripes, or a gradient; uint8 (size, size, 3)."""
    y, x = np.mgrid[:size, :size] / size
    kind, (a, b) = rng.integers(3), rng.uniform(0, 255, (2, 3))
    if kind == 0:
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
        frequency[0, 0] = np.inf
        spectrum = np.fft.fft2(rng.standard_normal((size, size))) / frequency ** rng.uniform(0.6, 2.2)
        field = np.fft.ifft2(spectrum).real
        field = (field - field.min()) / np.ptp(field)
    else:
        angle = rng.uniform(0, np.pi)
        field = x * np.cos(angle) + y * np.sin(angle)
        if kind == 1:
            field = np.sin(2 * np.pi * field * np.exp(rng.uniform(0, np.log(size / 4))))
            field = (field > rng.uniform(-0.5, 0.5)) if rng.random() < 0.5 else field / 2 + 0.5
        else:
            field = np.clip(field, 0, 1)
    return np.uint8(a + (b - a) * np.asarray(field, float)[:, :, None])


def patches(source: str, count: int, size: int) -> Iterator[np.ndarray]:
    """All patches of a source."""
    if source == "textures":
        yield from (texture(size, keyed(0, "texture", 0, i)) for i in range(count))
        return
    paths = pictures(Path(source))
    for i, path in enumerate(paths):
        share = count * (i + 1) // len(paths) - count * i // len(paths)
        if share:
            yield from cut(path, share, size, keyed(0, "patches", 0, i))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", nargs="+", metavar="SOURCE=COUNT")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    args = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None  # wallpapers are large
    warnings.simplefilter("ignore", UserWarning)  # Pillow's, of palettes with transparency
    for source, _, count in (part.rpartition("=") for part in args.sources):
        name, bar = Path(source).name, Progress(source, int(count), 0)
        place = args.out / name
        place.mkdir(parents=True, exist_ok=True)
        for i, patch in enumerate(patches(source, int(count), args.size)):
            Image.fromarray(np.ascontiguousarray(patch)).save(place / f"{i:06d}.png", compress_level=1)
            bar.update(i + 1, "")
        print(f"{source}: {i + 1} patches in {place}", file=sys.stderr)


if __name__ == "__main__":
    main()
