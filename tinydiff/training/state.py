"""Checkpoints of a training stage: committed whole, read back only when their manifest holds.

`<run>/checkpoints/<stage>-00000500/` has the weights, their average, the optimiser's moments and `state.json`; where several
processes hold blocks of them, a file from each. The newest is the one with the highest step whose manifest verifies: no
pointer file, no modification times. Blocks are put together at any number of processes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch import Tensor

from tinydiff.checkpoints import weights
from tinydiff.checkpoints.header import header
from tinydiff.errors import ModelError, ResourceError
from tinydiff.files import MANIFEST, VersionError, committed, make_folder, named, read_json, shown, system_error, verify
from tinydiff.training.optim import Average
from tinydiff.training.parallel import Piece, World

FORMAT = 2
KINDS = ("weights", "average", "exp_avg", "exp_avg_sq")
MOMENTS = KINDS[2:]


@dataclass(frozen=True)
class Training:
    """What a stage's training is made of, besides the step: blocks of parameters, their average, AdamW's moments."""

    pieces: Sequence[Piece]
    average: Average
    optimizer: torch.optim.Optimizer

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Blocks in their memory, by name; before the first update there are no moments."""
        if kind == "weights":
            return {piece.name: piece.tensor.detach() for piece in self.pieces}
        if kind == "average":
            return {piece.name: mine for piece, mine in zip(self.pieces, self.average.tensors, strict=True)}
        states = {piece.name: self.optimizer.state[piece.tensor] for piece in self.pieces}
        return {name: state[kind] for name, state in states.items() if kind in state}

    @property
    def updates(self) -> int:
        """How many the optimizer has made."""
        return max((int(state["step"].item()) for state in self.optimizer.state.values() if "step" in state), default=0)

    @property
    def places(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """The whole shape and the offset of each block; {} where this process holds all of everything."""
        divided = any(piece.tensor is not piece.parameter for piece in self.pieces)
        return {piece.name: (piece.shape, piece.offset) for piece in self.pieces if divided}


# ---- out -------------------------------------------------------------------------------------------------------------

Snapshot = dict[str, dict[str, Tensor]]  # {kind: {name: block}}
Places = Mapping[str, tuple[Sequence[int], Sequence[int]]]  # {name: (shape of the whole, offset of the block)}


def snapshot(training: Training, into: Snapshot) -> None:
    """Copy what this process is to save to the CPU; memory of an earlier copy is used again."""
    mine = {piece.name for piece in training.pieces if piece.mine}
    for kind in KINDS:
        held = into.setdefault(kind, {})
        for name, tensor in training.tensors(kind).items():
            if name in mine:
                if name not in held:
                    held[name] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
                held[name].copy_(tensor)


def save(
    path: Path,
    saved: Snapshot,
    places: Places,
    state: dict[str, Any],
    world: World,
    publish: Callable[[Path], object],
) -> None:
    """Commit the checkpoint of a finished step.

    Every process that holds blocks writes its files; if one cannot, none is kept. `publish` gets the folder before the
    commit: whoever finds the last checkpoint has nothing left to do.
    """
    writers = world.size if places else 1
    if world.rank >= writers:
        return
    if world.rank == 0:
        check_there(path.parent.parent)
    with committed(path) if world.rank == 0 else named(path) as temporary:
        place = Path(world.share(str(temporary), world.savers)) if writers > 1 else temporary
        assert place is not None
        problem = write(place, saved, places, world.rank, writers)
        if writers > 1 and not world.all(problem is None, world.savers):
            problem = problem or ResourceError("another process could not write its part of the checkpoint")
        if problem:
            raise problem
        if world.rank == 0:
            (place / "state.json").write_text(
                json.dumps({"format": FORMAT, "files": writers, **state}, indent=2) + "\n"
            )
            try:
                publish(place)
            except ModelError as error:  # what has just been written cannot be read
                raise (error.__cause__ if isinstance(error.__cause__, OSError) else error) from None


def check_there(run_dir: Path) -> None:
    """Raises ResourceError where the run directory is gone. A save must not make it anew: nobody holds its lock then."""
    with named(run_dir):
        if not run_dir.is_dir():
            raise ResourceError(f"{shown(run_dir)}: removed while training; put it back, or start the run again")


def write(folder: Path, saved: Snapshot, places: Places, rank: int, writers: int) -> OSError | None:
    """This process's files. Gives an error back in place of raising it, since the others have to hear of it first."""
    end = f"-{rank + 1:05d}-of-{writers:05d}" if writers > 1 else ""
    about = {"blocks": json.dumps(places)} if places else None
    for kind, tensors in saved.items():
        path = folder / f"{kind}{end}.safetensors"
        try:
            save_file(tensors, path, about)
        except Exception as error:
            cause = system_error(error) or OSError(None, str(error))
            cause.filename = str(path)
            return cause
    return None


def set_aside(path: Path) -> Path:
    """Keep a damaged checkpoint where no one looks for a sound one; returns its new place."""
    place = path.parent.parent / "damaged"
    new = place / path.name
    new = new if not new.exists() else place / f"{path.name}-{uuid4().hex[:8]}"
    with named(path):
        make_folder(place)
        path.rename(new)
    return new


# ---- in --------------------------------------------------------------------------------------------------------------


def newest(folder: Path, stage: str, warn: Callable[[str], None], strict: bool = False) -> Path | None:
    """The valid checkpoint of the highest step; damaged ones are named and passed over.

    Where there is a sound one, those are moved out of its way, to `damaged/` beside `folder`. Raises ModelError where none
    is sound, where another tinydiff wrote one, or where one is damaged and `strict` says that this is too many.
    """
    damaged: list[Path] = []
    found = sorted(folder.glob(f"{stage}-[0-9]*"), reverse=True)
    for path in found:
        try:
            check(path, stage)
        except VersionError:
            raise
        except ModelError as error:
            if strict:
                raise ModelError(f"{error}; without --strict the checkpoint before it is used") from error
            warn(f"{error}; going back to the checkpoint before it")
            damaged.append(path)
            continue
        for other in damaged:
            set_aside(other)
        return path
    if found:
        raise ModelError(
            f"{shown(folder)}: none of the {len(found)} checkpoints of {stage} is sound; --fresh starts over"
        )
    return None


def check(path: Path, stage: str) -> None:
    """Raises ModelError unless the folder is a whole checkpoint, of this format and of the step that its name says."""
    if not (path / MANIFEST).is_file():
        raise ModelError(f"{shown(path)}: has no {MANIFEST}")
    verify(path)
    state = read_json(path / "state.json")
    if type(version := state.get("format", 1)) is int and version != FORMAT:
        which = "a newer" if version > FORMAT else "an older"
        raise VersionError(f"{shown(path)}: written by {which} tinydiff; use that one, or train with --fresh")
    kinds = dict.fromkeys(("format", "files", "step", "updates", "skipped"), int) | {"scaler": dict}
    if any(type(state.get(key)) is not kind for key, kind in kinds.items()) or (
        path.name != f"{stage}-{state['step']:08d}"
    ):
        raise ModelError(f"{shown(path)}: not the checkpoint that its name says")
    if any(len(list(path.glob(f"{kind}[.-]*safetensors"))) != state["files"] for kind in KINDS):
        raise ModelError(f"{shown(path)}: not whole")


def load(path: Path, training: Training, updates: int) -> None:
    """A checkpoint into the very objects that `save` took, whoever held what when it was written.

    Raises ModelError naming what differs where it is of another network.
    """
    for kind in KINDS[:2]:
        stored, blocks = Blocks(path, kind), training.tensors(kind)
        stored.check(training.pieces)
        for piece in training.pieces:
            stored.fill(piece.name, blocks[piece.name], piece.offset)
    for kind in MOMENTS if updates else ():
        stored = Blocks(path, kind)
        for piece in training.pieces:
            if piece.name in stored.shapes:
                state = training.optimizer.state[piece.tensor]
                state["step"] = torch.tensor(float(updates), device=piece.tensor.device)
                state[kind] = torch.empty_like(piece.tensor, requires_grad=False)
                stored.fill(piece.name, state[kind], piece.offset)


class Blocks:
    """One kind of a checkpoint's tensors: for each name its blocks, mapped, with their places in the whole."""

    def __init__(self, folder: Path, kind: str):
        self.path, self.shapes = folder, dict[str, tuple[int, ...]]()
        self.blocks: dict[str, list[tuple[Sequence[int], Tensor]]] = {}
        for path in sorted([*folder.glob(f"{kind}.safetensors"), *folder.glob(f"{kind}-*-of-*.safetensors")]):
            places = json.loads(header(path).metadata.get("blocks", "{}"))
            for name, tensor in weights.tensors([path]).items():
                shape, offset = places.get(name, (tensor.shape, [0] * tensor.ndim))
                self.shapes[name] = tuple(shape)
                self.blocks.setdefault(name, []).append((offset, tensor))

    def check(self, pieces: Sequence[Piece]) -> None:
        """ModelError with the names and shapes that differ."""
        ours = {piece.name: piece.shape for piece in pieces}
        wrong = sorted(n for n in {*ours, *self.shapes} if ours.get(n) != self.shapes.get(n))
        if wrong:
            told = ", ".join(f"{n} {self.shapes.get(n)} -> {ours.get(n)}" for n in wrong[:5])
            raise ModelError(f"{shown(self.path)}: of another network: {told}{' ...' * (len(wrong) > 5)}; use --fresh")

    @torch.no_grad()
    def fill(self, name: str, target: Tensor, at: Sequence[int]) -> None:
        """Copy the part of a whole tensor that begins at `at` and has the target's shape."""
        filled = 0
        for offset, block in self.blocks[name]:
            low = [max(a, o) for a, o in zip(at, offset, strict=True)]
            sizes = zip(at, target.shape, offset, block.shape, strict=True)
            high = [min(a + n, o + m) for a, n, o, m in sizes]
            if all(i < j for i, j in zip(low, high, strict=True)):
                to, of = (
                    tuple(slice(i - o, j - o) for i, j, o in zip(low, high, start, strict=True))
                    for start in (at, offset)
                )
                target[to].copy_(block[of])
                filled += block[of].numel()
        if filled != target.numel():
            raise ModelError(f"{shown(self.path)}: {name} is not whole; use the checkpoint before it")

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, put together."""
        for name, shape in self.shapes.items():
            if len(self.blocks[name]) == 1:
                yield name, self.blocks[name][0][1]
            else:
                tensor = torch.empty(shape, dtype=self.blocks[name][0][1].dtype)
                self.fill(name, tensor, [0] * len(shape))
                yield name, tensor


# ---- room for them ---------------------------------------------------------------------------------------------------


def make_room(folder: Path, training: Training) -> None:
    """Make the folder of the checkpoints. Raises ResourceError where the disk has no room for one and its model folder."""
    size = (len(KINDS) + 1) * sum(math.prod(piece.shape) * piece.tensor.element_size() for piece in training.pieces)
    with named(folder):
        make_folder(folder)
        free = shutil.disk_usage(folder).free
    if free < size:
        fix = "free some space, or use another --run-dir"
        raise ResourceError(f"{shown(folder)}: {free / 1e9:.3g} GB free, and a save takes {size / 1e9:.3g}; {fix}")


# ---- which are kept --------------------------------------------------------------------------------------------------


def prune(folder: Path, stage: str, keep: int, every: int = 0) -> None:
    """Remove a stage's checkpoints but the newest `keep`, and those of every `every`-th step."""
    with named(folder):
        found = sorted(folder.glob(f"{stage}-[0-9]*"))
    for path in found[:-keep]:
        if not every or int(path.name.rpartition("-")[2]) % every:
            discard(path)


def discard(path: Path) -> None:
    """Remove a folder so that under its name it is whole or gone."""
    aside = path.with_name(f".tmp-{path.name}-{uuid4().hex}")
    with named(path, aside):
        path.rename(aside)
        shutil.rmtree(aside)


def sweep(run_dir: Path) -> None:
    """Remove what a killed process left half-written or half-removed; the caller holds the run's lock."""
    with named(run_dir):
        for path in [*run_dir.glob(".tmp-*"), *run_dir.glob("*/.tmp-*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
