"""How good a model is: read by the oracle, found among the data, reconstructed, and seen by feature networks.

For the built-in shapes, unseen captions are drawn and the oracle reads the pictures back. For a folder, captions of it
are drawn, each once before any comes again, and the nearest image of all the data must be the caption's own. Both come
with the autoencoder's PSNR and SSIM, and with what each feature network makes of drawings and data. It knows the `Backend`
protocol and numpy, no runtime; pictures are scored batch by batch and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tinydiff import config, pipeline
from tinydiff.condition import GIVEN
from tinydiff.data.dataset import Source, open_source
from tinydiff.drawing import at_once, in_turn
from tinydiff.errors import UsageError
from tinydiff.measure.oracle import READINGS, Read
from tinydiff.measure.quality import LEAST, View, real_vectors
from tinydiff.measure.reconstruction import reconstruction
from tinydiff.measure.retrieval import Retrieved, choose, compare
from tinydiff.networks.contrastive import CONTRASTIVE
from tinydiff.progress import note
from tinydiff.system import shown

if TYPE_CHECKING:
    from tinydiff.measure.features import Features
    from tinydiff.measure.text_image import Fit

RECONSTRUCTED = 64

Progress = Callable[[int, int], Any]


class Subject(Protocol):
    """A data path under evaluation: what to draw, and what to make of the drawings. `source`: real pictures."""

    path: str
    captions: list[str]
    source: Source

    def originals(self, count: int) -> Iterator[np.ndarray]: ...
    def add(self, start: int, drawn: np.ndarray) -> None: ...
    def row(self) -> dict[str, Any]: ...


def evaluate(
    backend: pipeline.Backend,
    request: pipeline.Request,
    data: Sequence[str],
    count: int,
    seed: int,
    batch_size: int,
    resolution: int,
    progress: Progress = lambda done, total: None,
    open_networks: Callable[[], Sequence[Features]] = tuple,
    looking: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Scores of `count` pictures for each data path ("shapes" or a folder), one dict a path, in order.

    Picture i of a path has the seed `seed + i`. `resolution`: pixels a side at which data and pictures are compared, by
    the feature networks too, which are opened once the data is; copies are looked for in the first folder. `progress` hears
    (pictures done, pictures in all), `looking` the same of real pictures that networks see for the first time. Raises
    UsageError for a size the model cannot draw and DataError for unusable data.
    """
    width, height = request.width, request.height
    columns = {array.of.column for array in backend.description.given.values()}  # type: ignore[union-attr]
    for column in sorted(columns - backend.description.spared):
        problem = f"images are drawn by captions alone, and this model is always told {GIVEN[column][1]}"
        raise UsageError(f"{problem}; train it with diffusion.{column}_dropout above 0")
    pipeline.check_size(backend.description, width, height)
    pipeline.check_size(backend.description, resolution, resolution)
    if "shapes" in data and (width != height or width < 16):
        raise UsageError(f"shapes are read off squares of 16 pixels or more, not {width}x{height}; give a folder")
    settings = data_settings(backend.description.path)
    subjects = [open_subject(replace(settings, path=path, resolution=resolution), count, seed) for path in data]
    networks = open_networks()
    for subject in subjects:
        told(subject, count, networks)
    rows = [[reconstruction(backend, s.originals(RECONSTRUCTED), batch_size, seed, networks)] for s in subjects]
    views = [[View(network, resolution) for network in networks] for _ in subjects]
    fits = open_fits(backend, [subject.captions for subject in subjects])
    total, done = sum(len(subject.captions) for subject in subjects), 0
    for i, (subject, seen) in enumerate(zip(subjects, views, strict=True)):
        starts = range(0, len(subject.captions), batch_size)
        batches = [range(start, min(start + batch_size, len(subject.captions))) for start in starts]

        def draw(rows: range, is_next: object, captions: Sequence[str] = subject.captions) -> tuple[int, np.ndarray]:
            seeds = [seed + row for row in rows]
            return rows[0], pipeline.generate(backend, [captions[row] for row in rows], seeds, request)

        for start, drawn in in_turn(draw, batches, batch_size, at_once(backend, request, batch_size)):
            for taker in (subject, *seen, *fits[i : i + 1]):
                taker.add(start, drawn)
            done += len(drawn)
            progress(done, total)
    compare([subject for subject in subjects if isinstance(subject, Retrieved)])
    for network, *seen in zip(networks, *views, strict=True):
        real = [real_vectors(network, s.source, settings.background, resolution, seed, looking) for s in subjects]
        training = next((r for s, r in zip(subjects, real, strict=True) if isinstance(s, Retrieved)), None)
        for subject, row, view, vectors in zip(subjects, rows, seen, real, strict=True):
            row.append(view.row(vectors, training if isinstance(subject, Retrieved) else None, seed))
    for subject, row, fit in zip(subjects, rows, fits, strict=False):
        row.append(fit.row(np.stack([*subject.originals(RECONSTRUCTED)])))
    return [merged(subject.row(), *row) for subject, row in zip(subjects, rows, strict=True)]


def open_networks(names: Sequence[str], device: str) -> list[Features]:
    """Feature networks, on a GPU where there is one and the device may be one. Raises what `open_features` raises."""
    if not names:
        return []
    from tinydiff.training.memory import keep_pages

    keep_pages()
    import torch

    from tinydiff.measure.features import open_features

    place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    opened = [open_features(name).to(place).to(memory_format=torch.channels_last) for name in names]  # type: ignore[call-overload]
    alike = [n.name for i, n in enumerate(opened) if n.name in (other.name for other in opened[:i])]
    if alike:
        raise UsageError(
            f"--features: two networks are {alike[0]}, by which their figures are named; give one at a time"
        )
    return opened


def told(subject: Subject, count: int, networks: Sequence[Features]) -> None:
    """Say what is not measured of a path with too few images."""
    few, path = len(subject.captions), shown(subject.path)
    if few < count:
        note(f"{path}: has {few} images, so as many are drawn, not {count}")
    if few < LEAST and networks:
        note(f"{path}: of fewer than {LEAST} drawings no Fréchet distance and the like is measured")


def open_fits(backend: pipeline.Backend, captions: Sequence[Sequence[str]]) -> list[Fit]:
    """How pictures fit each path's captions, by the towers that the model has of a contrastive stage; none without."""
    path = backend.description.path
    if not (path / CONTRASTIVE).is_dir():
        return []
    from tinydiff.measure.text_image import Fit, open_towers

    towers = open_towers(path)
    return [Fit(backend, towers, each) for each in captions]


def merged(*rows: dict[str, Any]) -> dict[str, Any]:
    """One row of many; dictionaries of the same name become one."""
    out: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            out[name] = out.get(name, {}) | value if isinstance(value, dict) else value
    return out


def data_settings(model: Path) -> config.Data:
    """How the model's own configuration treats images (background, bad files); the defaults without one."""
    path = model / "tinydiff.toml"
    return config.load(path, stored=True).data if path.exists() else config.Data()


def open_subject(settings: config.Data, count: int, seed: int) -> Subject:
    """The shapes, or a folder of captioned images, as `settings.path` says."""
    if settings.path == "shapes":
        return Read(count, seed, settings.resolution)
    source = open_source(settings)
    return Retrieved(", ".join(settings.paths), source, settings.resolution, choose(source, count, seed))


def line(row: dict[str, Any]) -> str:
    """One result for a person, the figures of feature networks a line each."""
    if "all" in row:
        parts = ", ".join(f"{name} {row[name]:.1%}" for name in READINGS[1:])
        text = f"{row['images']} unseen captions: wholly right {_share(row, 'all')}; {parts}"
    else:
        first, five = _share(row, "nearest_top1"), _share(row, "nearest_top5")
        among = f"of {row['candidates']} images the nearest is the right one {first}, one of the nearest 5 {five}"
        text = f"{row['images']} drawings: {among}"
    rebuilt = f"reconstruction {row['reconstruction_psnr']:.1f} dB, SSIM {row['reconstruction_ssim']:.3f}"
    plain = {*READINGS, "nearest_top1", "nearest_top5", "reconstruction_psnr", "reconstruction_ssim"}
    figures = [_figure(row, name) for name, value in row.items() if name not in plain and isinstance(value, float)]
    return "\n  ".join([f"{row['data']}: {text}; {rebuilt}", *figures])


def _figure(row: dict[str, Any], name: str) -> str:
    """A figure with its interval, its deviation and what it is of real pictures, where there are such."""
    text = f"{name:<40} {row[name]:.4g}"
    if bounds := row["intervals"].get(name):
        text += f" ({bounds['low']:.4g} to {bounds['high']:.4g})"
    if deviation := row.get("deviations", {}).get(name):
        text += f" ± {deviation:.2g}"
    if of_real := row.get("of_real", {}).get(name):
        text += f"; {of_real:.4g} of real pictures"
    return text


def _share(row: dict[str, Any], name: str) -> str:
    bounds = row["intervals"][name]
    return f"{row[name]:.1%} ({bounds['low']:.1%} to {bounds['high']:.1%})"
