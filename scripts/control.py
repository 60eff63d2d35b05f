"""Whether a control network has a model follow outlines: overlap of silhouettes with the pictures that the outlines are of.

    python scripts/control.py runs/outlines --data data/emoji/heldout -m emoji --count 64 [--caption other] [-o pictures.png]

The edges of each picture, mirrored, are followed under no caption, or that of another picture, or its own; it is drawn with the
same seed without them. A silhouette is what is not white; its overlap with the mirrored picture's is intersection over union.
Printed: means over the pictures, each with a 95 % interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tinydiff import images
from tinydiff.backends import find_model, open_backend
from tinydiff.checkpoints.source import Source
from tinydiff.config import Data
from tinydiff.control import Control, Flag
from tinydiff.data.dataset import Images, open_source
from tinydiff.data.makers import edges
from tinydiff.pipeline import Request, generate

WHITE = 24  # levels that a pixel of a silhouette is from white, in its darkest channel


def silhouette(image: np.ndarray) -> np.ndarray:
    """bool (H, W)."""
    return image.min(axis=-1) < 255 - WHITE


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two silhouettes."""
    return float((one & other).sum() / max(1, (one | other).sum()))


def interval(values: list[float]) -> str:
    return f"{np.mean(values):.3f} +- {1.96 * np.std(values) / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("-m", "--model")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--caption", choices=("none", "other", "own"), default="none")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()

    backend = open_backend(Source(find_model(asked.model), controls=(asked.network,)), "torch", "cpu")
    d = backend.description
    data = Data(path=asked.data, resolution=d.size)
    pictures = Images(open_source(data), data)
    g, told, alone, shown = d.generate, list[float](), list[float](), list[np.ndarray]()
    request = Request(g.steps, g.cfg_scale, g.sampler, g.spacing, d.size, d.size)
    count = min(asked.count, len(pictures))
    for seed, i in enumerate((np.arange(count) * len(pictures) // count).tolist()):
        picture = np.ascontiguousarray(pictures[i][:, ::-1])
        whose = (i + len(pictures) // 2) % len(pictures) if asked.caption == "other" else i
        caption = "" if asked.caption == "none" else pictures.source.captions(whose)[0]
        control = Control("controlnet", edges(picture), Flag(strength=asked.strength))
        with_it = generate(backend, [caption], [seed], request, controls=[control])[0]
        without = generate(backend, [caption], [seed], request)[0]
        told.append(overlap(silhouette(picture), silhouette(with_it)))
        alone.append(overlap(silhouette(picture), silhouette(without)))
        shown += [picture, control.image, with_it, without]
    print(f"{count} pictures of {asked.data}, caption {asked.caption}:")
    print(f"overlap {interval(told)} with their edges, {interval(alone)} without")
    if asked.output:
        asked.output.write_bytes(images.encode_png(images.grid(np.stack(shown[:64]), 16), None))


if __name__ == "__main__":
    main()
