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
from tinydiff.errors import DataError, UsageError, UserError
from tinydiff.progress import Progress
from tinydiff.system import named, shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST = 12  # patches along the short side of the largest scale
SCALES = 6  # of each picture
TEXTURES = "textures"  # the source that is computed
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


def patches(source: str, paths: list[Path], count: int, size: int) -> Iterator[np.ndarray]:
    """All patches of a source. Raises DataError for a picture that cannot be read."""
    if source == TEXTURES:
        yield from (texture(size, keyed(0, "texture", 0, i)) for i in range(count))
        return
    for i, path in enumerate(paths):
        share = count * (i + 1) // len(paths) - count * i // len(paths)
        try:
            yield from cut(path, share, size, keyed(0, "patches", 0, i)) if share else ()
        except (OSError, SyntaxError, ValueError) as error:  # as Pillow says it
            raise DataError(f"{shown(path)}: cannot be read ({shown(error)}); mend or remove it") from None


def asked(text: str, out: Path) -> tuple[str, int, list[Path], Path]:
    """What SOURCE=COUNT says: the source, how many patches, its pictures, and the folder that they go to."""
    source, _, number = text.rpartition("=")
    if not source or not number.isdecimal() or not 0 < int(number) <= 10**6:
        raise UsageError(f"{shown(text)}: give SOURCE=COUNT, a folder and at most a million, such as photos=5000")
    name = Path(source).resolve().name
    place = out / name
    if not name or (place.exists() and (not place.is_dir() or any(place.iterdir()))):
        raise UsageError(f"{shown(place)}: exists; remove it or name another folder")
    paths = pictures(Path(source)) if source != TEXTURES else []
    if source != TEXTURES and not paths:
        raise DataError(f"{shown(source)}: holds no images ({', '.join(SUFFIXES)}); give a folder, or {TEXTURES}")
    return source, int(number), paths, place


def write(wanted: list[tuple[str, int, list[Path], Path]], size: int) -> None:
    """The patches of all sources as numbered PNG files. Raises ResourceError where they cannot be written."""
    for source, count, paths, place in wanted:
        bar = Progress(source, count, 0)
        with named(place):
            place.mkdir(parents=True, exist_ok=True)
            for i, patch in enumerate(patches(source, paths, count, size)):
                Image.fromarray(np.ascontiguousarray(patch)).save(place / f"{i:06d}.png", compress_level=1)
                bar.update(i + 1, "")
        print(f"{source}: {count} patches in {place}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """The command: writes the folders, returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", nargs="+", metavar="SOURCE=COUNT")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    args = parser.parse_args(arguments)
    Image.MAX_IMAGE_PIXELS = None  # wallpapers are large
    warnings.simplefilter("ignore", UserWarning)  # Pillow's, of palettes with transparency
    try:
        if not 8 <= args.size <= 1024:
            raise UsageError(f"--size {args.size} is out of range; give 8 to 1024 pixels")
        wanted = [asked(part, args.out) for part in args.sources]
        if len({place for *_, place in wanted}) < len(wanted):
            raise UsageError("two sources have one name, by which their patches are kept; give one at a time")
        write(wanted, args.size)
    except UserError as error:
        print(f"patches.py: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
