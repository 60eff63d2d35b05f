"""Control networks as others lay them out: diffusers' folder, and one file under LDM's or diffusers' names. No torch.

A `Source` asks for those that go with its model, under the names of folders that diffusers' pipelines have.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinydiff import verified
from tinydiff.checkpoints.header import Header
from tinydiff.errors import ModelError
from tinydiff.files import MANIFEST, read_json, shown
from tinydiff.networks import CONTROL
from tinydiff.networks.network import Table
from tinydiff.networks.unet import CONTROLLED
from tinydiff.verified import Hash

if TYPE_CHECKING:
    from tinydiff.checkpoints.source import Source

SUPPORTED = "give a folder of diffusers' ControlNetModel, or a file of one for Stable Diffusion"
WITH = {f"{family}Pipeline": f"{family}ControlNetPipeline" for family in ("StableDiffusion", "StableDiffusionXL")}
SEVERAL = ["diffusers", "MultiControlNetModel"]


def name(number: int) -> str:
    """The folder's name of a model's n-th control network."""
    return f"{CONTROL.folder}_{number}" if number else CONTROL.folder


def find(path: Path, model: Path) -> Path:
    """The file or the folder of a control network: itself, of a run or a pipeline the one inside, else one of the model's.

    Raises ModelError where there is none.
    """
    if path.is_file():
        return path
    inside = (path, path / CONTROL.folder, path / "model" / CONTROL.folder, model / path)
    place = next((each for each in inside if (each / "config.json").is_file()), None)
    if place is None:
        problem = "holds no control network" if path.is_dir() else "no such control network"
        raise ModelError(f"{shown(path)}: {problem}; {SUPPORTED}")
    return place


def place(path: Path) -> str:
    """Where a control network's settings are, as a message shows it."""
    return shown(path / "config.json") if path.is_dir() else f"the control network of {shown(path)}"


def table(path: Path, header: Callable[[Path], Header], base: Table | None) -> Table:
    """A control network's `config.json`; that of a file is made of its shapes and its base's heads. Raises ModelError."""
    if base is None:
        raise ModelError(f"{shown(path)}: control networks are for U-Nets, and this model has none; leave it out")
    if path.is_dir():
        config = read_json(path / "config.json")
        if (kind := config.get("_class_name")) != CONTROL.library[1]:
            raise ModelError(f"{shown(path)}: no control network, this is {shown(kind or 'of no kind')}; {SUPPORTED}")
        return config
    from tinydiff.checkpoints import ldm, single_file

    file = header(path)
    part = single_file.part(file, CONTROL.folder)
    if part is None:
        kind = single_file.other_kind(file)
        raise ModelError(f"{shown(path)}: holds no control network{f', this is {kind}' if kind else ''}; {SUPPORTED}")
    try:
        return ldm.control(part.shapes, base)
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"{shown(path)}: incomplete, or no control network: {error}; {SUPPORTED}") from error


def indexed(index: dict[str, Any], count: int) -> dict[str, Any]:
    """A model's `model_index.json` with so many control networks; one that names others, which are not opened, without them."""
    index = {k: v for k, v in index.items() if k != CONTROL.folder}
    kinds = WITH if count else {kind: plain for plain, kind in WITH.items()}
    index |= {CONTROL.folder: list(CONTROL.library) if count == 1 else SEVERAL} if count else {}
    kind = index.get("_class_name")
    return index | ({"_class_name": kinds[kind]} if kind in kinds else {})


def verify(path: Path, digest: Hash) -> None:
    """Check a control network's folder against its manifest, or the one of the model that it is part of."""
    if (path.parent / MANIFEST).is_file():
        verified.verify(path.parent, (path.name,), digest)
    elif path.is_dir():
        verified.verify(path, digest=digest)


def in_graphs(source: Source) -> bool:
    """Whether a bundle's denoiser takes what its control networks give, and they have graphs."""
    takes = not source.controlled or bool(source.configs[source.denoiser].get(CONTROLLED))
    return takes and all((path / "model.onnx").is_file() for path in source.controlled.values())
