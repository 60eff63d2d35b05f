"""Checkpoints of a training stage: committed whole, read back only when their manifest holds.

`<run>/checkpoints/<stage>-00000500/` has the weights, their average, the optimiser's moments and `state.json`. The newest is
the one with the highest step whose manifest verifies: no pointer file, no modification times.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinydiff.checkpoints import weights
from tinydiff.errors import ModelError
from tinydiff.files import MANIFEST, committed, read_json, verify
from tinydiff.training.optim import Average

FORMAT = 1


def save(
    folder: Path,
    stage: str,
    step: int,
    module: nn.Module,
    average: Average,
    optimizer: torch.optim.Optimizer,
    extra: dict,
) -> Path:
    """Commit the checkpoint of a finished step; one that stands there was passed over as damaged."""
    path = folder / f"{stage}-{step:08d}"
    if path.exists():
        discard(path)
    with committed(path) as temporary:
        save_file(plain(module.state_dict()), temporary / "weights.safetensors")
        save_file(plain(average.state()), temporary / "average.safetensors")
        save_file(plain(optimizer_tensors(module, optimizer)), temporary / "optimizer.safetensors")
        state = {"format": FORMAT, "stage": stage, "step": step} | extra
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    return path


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    shared = len({v.data_ptr() for v in tensors.values()}) < len(tensors)  # the format knows no two names of one tensor
    return {k: v.detach().to("cpu", copy=shared).contiguous() for k, v in tensors.items()}


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step count under the parameters' names."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    return {f"{names[p]}.{k}": v for p, values in optimizer.state.items() for k, v in values.items()}


def load(path: Path, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint into the very objects that `save` took."""
    module.load_state_dict(weights.tensors([path / "weights.safetensors"]))
    average.load(weights.tensors([path / "average.safetensors"]))
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.tensors([path / "optimizer.safetensors"]).items():
        name, _, kind = key.rpartition(".")
        moments.setdefault(name, {})[kind] = value
    for name, p in module.named_parameters():
        if found := moments.get(name):
            optimizer.state[p] = {
                k: v.to(p.device) if k == "step" else torch.empty_like(p).copy_(v) for k, v in found.items()
            }


def newest(folder: Path, stage: str, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The valid checkpoint of the highest step and its state; damaged ones are named and passed over."""
    for path in sorted(folder.glob(f"{stage}-[0-9]*"), reverse=True):
        try:
            if not (path / MANIFEST).is_file():
                raise ModelError(f"{path}: has no {MANIFEST}")
            verify(path)
            state = read_json(path / "state.json")
        except ModelError as error:
            warn(f"{error}; going back to the checkpoint before it")
            continue
        if state.get("format", FORMAT) > FORMAT:
            raise ModelError(f"{path}: written by a newer tinydiff; upgrade, or train with --fresh")
        return path, state
    return None


def prune(folder: Path, stage: str, step: int, keep: int) -> None:
    """Remove all checkpoints of a stage but the newest `keep` up to `step`; those beyond it were passed over as damaged."""
    found = sorted(folder.glob(f"{stage}-[0-9]*"))
    kept = [path for path in found if path.name <= f"{stage}-{step:08d}"][-keep:]
    for path in found:
        if path not in kept:
            discard(path)


def discard(path: Path) -> None:
    """Remove a folder so that under its name it is whole or gone."""
    aside = path.with_name(f".tmp-{path.name}-{uuid4().hex}")
    path.rename(aside)
    shutil.rmtree(aside)


def sweep(run_dir: Path) -> None:
    """Remove what a killed process left half-written or half-removed; the caller holds the run's lock."""
    for pattern in (".tmp-*", "*/.tmp-*"):
        for path in run_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
