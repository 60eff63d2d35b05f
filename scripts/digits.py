"""scikit-learn's handwritten digits as a folder of PNG files with caption files beside them.

`python scripts/digits.py OUT` writes 1,797 images, dark ink on white, each with "a handwritten digit seven" and the
like in a .txt of the same name. Needs scikit-learn and Pillow; no network, the digits are part of scikit-learn.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tinydiff.errors import ResourceError, UsageError, UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILTERS = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """(images, labels): uint8 (1797, 8, 8), dark on white, and int (1797,)."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise UsageError("scripts/digits.py needs scikit-learn; pip install scikit-learn") from None
    ink, labels = load(return_X_y=True)
    return np.rint(255 - ink.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels


def draw(image: np.ndarray, size: int, method: str) -> Image.Image:
    """One digit, uint8 (8, 8), as an RGB image of `size` pixels a side."""
    return Image.fromarray(image).resize((size, size), FILTERS[method]).convert("RGB")


def write(folder: Path, images: np.ndarray, labels: np.ndarray, size: int, method: str) -> None:
    """Writes folder/0000.png, 0000.txt and so on; `folder` appears whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists; remove it or name another folder")
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            draw(image, size, method).save(temporary / f"{index:04d}.png")
            (temporary / f"{index:04d}.txt").write_text(f"a handwritten digit {WORDS[label]}\n", encoding="utf-8")
        os.replace(temporary, folder)
    except OSError as error:
        reason = f"cannot write {error.filename or folder}: {error.strerror}"
        raise ResourceError(f"{reason}; make room or name another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """The command: writes the folder, prints the count, returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/digits.py", description="Handwritten digits as a captioned folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--size", type=int, default=32, help="pixels a side (32)")
    parser.add_argument("--filter", choices=FILTERS, default="bicubic", help="how 8x8 is enlarged (bicubic)")
    options = parser.parse_args(arguments)
    try:
        if not 8 <= options.size <= 1024:
            raise UsageError(f"--size {options.size} is out of range; give 8 to 1024 pixels")
        images, labels = load_digits()
        write(options.out, images, labels, options.size, options.filter)
    except UserError as error:
        print(f"digits.py: {error}", file=sys.stderr)
        return error.code
    print(f"{options.out}: {len(images)} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
