"""The weight files of a model's component: finding them, reading their headers, and mapping their tensors.

Headers are read without torch, so that a damaged or missing file is reported at once. This module knows no network: a
component is a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinydiff.checkpoints.header import PICKLES, Stored, header
from tinydiff.errors import ModelError
from tinydiff.files import RESTORE, read_json, shown
from tinydiff.system import system_error, unreadable

if TYPE_CHECKING:
    from torch import Tensor

STEMS = ("diffusion_pytorch_model", "model")
INT8 = "int8.safetensors"  # bytes, of a graph alone: no program takes them for the weights


def files(folder: Path) -> list[Path]:
    """The weight file of a component, or its shards; of several variants the plain one, else fp16, else any.

    Raises ModelError if there is none, with a command to convert a pickle if there is one, or if a shard is missing.
    """
    for stem in STEMS:
        for variant in ("", ".fp16", *_variants(folder, stem)):
            if (path := folder / f"{stem}{variant}.safetensors").is_file():
                return [path]
            if (index := folder / f"{stem}.safetensors.index{variant}.json").is_file():
                return _shards(index)
    if pickles := sorted(p for p in folder.glob("*") if p.suffix in PICKLES):
        header(pickles[0])  # raises ModelError with the command to convert it
    bytes_alone = any(folder.parent.glob(f"*/{INT8}"))
    fix = (
        "its graphs' weights are int8; give the model that it is of, or export that with --lora or --word"
        if bytes_alone
        else "copy the whole model folder"
    )
    raise ModelError(f"{shown(folder)}: holds no weights; {fix}")


def _variants(folder: Path, stem: str) -> Iterator[str]:
    for path in sorted(folder.glob(f"{stem}.*safetensors*")):
        variant = path.name.removeprefix(stem).removesuffix(".json").replace(".safetensors.index", "")
        yield variant.removesuffix(".safetensors").partition("-")[0]


def _shards(index: Path) -> list[Path]:
    """The files that an index names. Raises ModelError for one that is missing or in another folder."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelError(f"{shown(index)}: has no weight_map; {RESTORE}")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ModelError(f"{shown(index.parent / name)}: missing; {index.name} names it, so {RESTORE}")
    return [index.parent / name for name in names]


def headers(folder: Path) -> dict[str, Stored]:
    """Type, shape and offsets of every tensor of a component, from all its shards."""
    return {name: stored for path in files(folder) for name, stored in header(path).tensors.items()}


def tensors(paths: list[Path], check: Callable[[Path], object] = header) -> dict[str, Tensor]:
    """All tensors of some safetensors files, memory-mapped: read when used. Raises ModelError for a damaged file, and
    ResourceError where the system cannot map it.

    `check` reads a file's header first.
    """
    from safetensors.torch import load_file

    mapped: dict[str, Any] = {}
    for path in paths:
        check(path)
        with mapping(path):
            mapped |= load_file(path)
    return mapped


@contextmanager
def mapping(path: Path) -> Iterator[None]:
    """What safetensors and torch raise in the block, as the UserError of this file."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        if cause := system_error(error):
            raise unreadable(cause, path) from error
        raise ModelError(f"{shown(path)}: damaged ({shown(error)}); {RESTORE}") from error
