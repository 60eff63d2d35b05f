"""The files of weights in a model folder: which there are, what their headers say, and their tensors as memory maps.

Headers are read without torch, so that what is damaged, missing or no safetensors at all is told at once. It knows no
network: a component is a folder with a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinydiff.checkpoints.header import PICKLES, Stored, header
from tinydiff.errors import ModelError
from tinydiff.files import RESTORE, read_json, shown

if TYPE_CHECKING:
    from torch import Tensor

STEMS = ("diffusion_pytorch_model", "model")


def files(folder: Path) -> list[Path]:
    """The one file of a component's weights, or its shards; of several variants the plain one, else fp16.

    Raises ModelError where there is none, naming a pickle that stands in its place, or where a shard is missing.
    """
    for stem in STEMS:
        for variant in ("", ".fp16", *_variants(folder, stem)):
            if (path := folder / f"{stem}{variant}.safetensors").is_file():
                return [path]
            if (index := folder / f"{stem}.safetensors.index{variant}.json").is_file():
                return _shards(index)
    if pickles := sorted(p for p in folder.glob("*") if p.suffix in PICKLES):
        header(pickles[0])  # says how to convert it
    raise ModelError(f"{shown(folder)}: holds no weights; copy the whole model folder")


def _variants(folder: Path, stem: str) -> Iterator[str]:
    for path in sorted(folder.glob(f"{stem}.*safetensors*")):
        variant = path.name.removeprefix(stem).removesuffix(".json").replace(".safetensors.index", "")
        yield variant.removesuffix(".safetensors").partition("-")[0]


def _shards(index: Path) -> list[Path]:
    """The files that an index names. Raises ModelError for one that is missing, or lies elsewhere."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelError(f"{shown(index)}: has no weight_map; {RESTORE}")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ModelError(f"{shown(index.parent / name)}: missing; {index.name} names it, so {RESTORE}")
    return [index.parent / name for name in names]


def headers(folder: Path) -> dict[str, Stored]:
    """The tensors of a component, all its shards together."""
    return {name: stored for path in files(folder) for name, stored in header(path).tensors.items()}


def tensors(paths: list[Path]) -> dict[str, Tensor]:
    """All tensors of some safetensors files, mapped: pages are read when they are used, and never written.

    Raises ModelError where a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in paths:
        header(path)
        try:
            found |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{shown(path)}: damaged ({error}); fetch or train it again") from None
    return found
