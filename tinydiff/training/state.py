"""Checkpoints of a training stage: committed whole, read back only when their manifest holds.

`<run>/checkpoints/<stage>-00000500/` has the weights, their average, the optimiser's moments and `state.json`; where several
processes hold blocks of them, a file from each. The newest is the one with the highest step whose manifest verifies: no
pointer file, no modification times. Blocks are put together at any number of processes.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinydiff import processes, temporary
from tinydiff.checkpoints import weights
from tinydiff.checkpoints.header import header
from tinydiff.errors import ModelError, ResourceError
from tinydiff.files import MANIFEST, VersionError, committed, foreign, make_folder, named, read_json, shown
from tinydiff.stages import Stage
from tinydiff.system import system_error
from tinydiff.training.optim import MOMENTS, Average, moments, optimizer
from tinydiff.training.parallel import Piece, World, pieces
from tinydiff.verified import verify

if TYPE_CHECKING:
    from tinydiff.training.budget import Leg

FORMAT = 3
OLDER = 2  # a format that is still read: without buffers, of one player, whose name is the stage's
KINDS = ("weights", "average", *MOMENTS, "buffers")
OLD = re.compile(r"\.tmp-.+-[0-9a-f]{32}")  # what older versions left when they were killed


@dataclass
class Learner:
    """The state of one player: its blocks of parameters, their average, the optimizer's moments, and its module's buffers."""

    name: str  # with which those of its tensors begin
    settings: Stage
    pieces: Sequence[Piece]
    average: Average
    optimizer: torch.optim.Optimizer
    buffers: dict[str, Tensor]
    begin: int = 0  # update at which the schedule of its learning rate begins

    @classmethod
    def of(cls, name: str, module: nn.Module, settings: Stage, world: World) -> Learner:
        held = pieces(module, world, f"{name}.")
        tensors, kept = [piece.tensor for piece in held], module.state_dict(keep_vars=True)
        buffers = {f"{name}.{k}": b for k, b in module.named_buffers() if k in kept}
        learns = optimizer(module, {p.name.removeprefix(f"{name}."): p.tensor for p in held}, settings)
        return cls(name, settings, held, Average(tensors, settings.ema), learns, buffers)

    def follow(self, leg: Leg) -> None:
        """Go on by the steps, warm-up and averaging of a leg."""
        steps, self.begin = leg.steps - leg.begin, leg.begin
        self.settings = replace(self.settings, steps=steps, warmup=leg.warmup, ema=leg.ema)
        self.average.decay = leg.ema

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Blocks in their memory, by name; before the first update there are no moments."""
        if kind == "weights":
            return {piece.name: piece.tensor.detach() for piece in self.pieces}
        if kind == "average":
            return {piece.name: mine for piece, mine in zip(self.pieces, self.average.tensors, strict=True)}
        if kind == "buffers":
            return self.buffers
        states = {piece.name: self.optimizer.state[piece.tensor] for piece in self.pieces}
        return {name: state[kind] for name, state in states.items() if kind in state}

    @property
    def updates(self) -> int:
        """How many the optimizer has made."""
        return max((int(state["step"].item()) for state in self.optimizer.state.values() if "step" in state), default=0)


@dataclass(frozen=True)
class Training:
    """What a stage's training is made of, besides the step: its players, each with its state."""

    learners: Sequence[Learner]

    @property
    def pieces(self) -> list[Piece]:
        return [piece for learner in self.learners for piece in learner.pieces]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        return {name: tensor for learner in self.learners for name, tensor in learner.tensors(kind).items()}

    @property
    def places(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """The whole shape and the offset of each block; {} where this process holds all of everything."""
        divided = any(piece.tensor is not piece.parameter for piece in self.pieces)
        return {piece.name: (piece.shape, piece.offset) for piece in self.pieces if divided}

    def exchange(self) -> None:
        """Averages become the weights, and the weights are kept instead; a second call takes it back."""
        for learner in self.learners:
            learner.average.exchange()

    def keep_buffers(self) -> Callable[[], None]:
        """Returns what puts the buffers back as they are now."""
        buffers = list(self.tensors("buffers").values())
        before = [buffer.clone() for buffer in buffers]

        def restore() -> None:
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)

        return restore


Tensors = dict[str, Tensor]
Change = Callable[[str, Tensors], Tensors]  # of a kind: the tensors of another network, whole, made of a checkpoint's
Snapshot = dict[str, Tensors]  # {kind: {name: block}}
Places = Mapping[str, tuple[Sequence[int], Sequence[int]]]  # {name: (shape of the whole, offset of the block)}


def snapshot(training: Training, into: Snapshot, kinds: Sequence[str] = KINDS) -> None:
    """Copy what this process is to save to the CPU; memory of an earlier copy is used again."""
    mine = {piece.name for piece in training.pieces if piece.mine}
    for kind in kinds:
        held = into.setdefault(kind, {})
        for name, tensor in training.tensors(kind).items():
            if name in mine or (kind == "buffers" and not processes.rank()):
                if name not in held:
                    held[name] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
                held[name].copy_(tensor)


def save(
    path: Path, saved: Snapshot, places: Places, state: dict[str, Any], world: World, publish: Callable[[Path], object]
) -> None:
    """Commit the checkpoint of a finished step.

    Every process that holds blocks writes its files; if one cannot, none is kept. `publish` gets the folder before the
    commit: whoever finds the last checkpoint has nothing left to do. Raises ResourceError where the run directory is gone.
    """
    writers = world.size if places else 1
    if world.rank >= writers:
        return
    run_dir = path.parent.parent
    with named(run_dir):  # a save must not make it again, without its lock
        if world.rank == 0 and not run_dir.is_dir():
            raise ResourceError(f"{shown(run_dir)}: removed while training; put it back, or start the run again")
    with committed(path) if world.rank == 0 else named(path) as made:
        place = Path(world.share(str(made), world.savers)) if writers > 1 else made
        assert place is not None
        problem = write(place, saved, places, world.rank, writers)
        if writers > 1 and not world.all(problem is None, world.savers):
            problem = problem or ResourceError("another process could not write its part of the checkpoint")
        if problem:
            raise problem
        if world.rank == 0:
            about = {"format": FORMAT, "files": writers, **state}
            (place / "state.json").write_text(json.dumps(about, indent=2) + "\n")
            try:
                publish(place)
            except ModelError as error:  # what has just been written cannot be read
                raise (error.__cause__ if isinstance(error.__cause__, OSError) else error) from None


def write(folder: Path, saved: Snapshot, places: Places, rank: int, writers: int) -> OSError | None:
    """This process's files. Returns an error instead of raising it: the other processes have to be told first."""
    end = f"-{rank + 1:05d}-of-{writers:05d}" if writers > 1 else ""
    about = {"blocks": json.dumps(places)} if places else None
    for kind in KINDS:
        path = folder / f"{kind}{end}.safetensors"
        try:
            save_file(saved[kind], path, about)
        except Exception as error:
            cause = system_error(error) or OSError(None, str(error))
            cause.filename = str(path)
            return cause
    return None


def set_aside(path: Path) -> Path:
    """Keep a damaged checkpoint where no one looks for a sound one; returns its new place."""
    new = path.parent.parent / "damaged" / path.name
    new = new if not new.exists() else new.with_name(f"{path.name}-{uuid4().hex[:8]}")
    with named(path):
        make_folder(new.parent)
        return path.rename(new)


def checkpoints(folder: Path, stage: str) -> list[Path]:
    """A stage's checkpoints, oldest first: folders named exactly as `save` names them, and no copies of any."""
    name = re.compile(re.escape(stage) + "-([0-9]{8,})")
    steps = {path: int(named_so[1]) for path in folder.glob(f"{stage}-*") if (named_so := name.fullmatch(path.name))}
    return sorted(
        (path for path, step in steps.items() if path.is_dir() and path.name.endswith(f"-{step:08d}")),
        key=steps.__getitem__,
    )


def newest(folder: Path, stage: str, warn: Callable[[str], None], strict: bool = False) -> Path | None:
    """The valid checkpoint of the highest step; damaged ones are named and passed over.

    Where there is a sound one, those are moved out of its way, to `damaged/` beside `folder`. Raises ModelError where none
    is sound, where another tinydiff wrote one, or where one is damaged and `strict` says that this is too many.
    """
    damaged: list[Path] = []
    found = checkpoints(folder, stage)[::-1]
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
        problem = f"none of the {len(found)} checkpoints of {stage} is sound"
        raise ModelError(f"{shown(folder)}: {problem}; --fresh starts over")
    return None


def check(path: Path, stage: str) -> None:
    """Raises ModelError unless the folder is a whole checkpoint, of this format and of the step that its name says."""
    if not (path / MANIFEST).is_file():
        raise ModelError(f"{shown(path)}: has no {MANIFEST}")
    verify(path)
    state = read(path)
    types = dict.fromkeys(("format", "files", "step", "skipped"), int) | {"scaler": dict, "updates": dict}
    whole = all(type(state.get(key)) is kind for key, kind in types.items())
    if not whole or path.name != f"{stage}-{state['step']:08d}":
        raise ModelError(f"{shown(path)}: not the checkpoint that its name says")
    kinds = KINDS if state["format"] == FORMAT else KINDS[:-1]
    if any(len(list(path.glob(f"{kind}[.-]*safetensors"))) != state["files"] for kind in kinds):
        raise ModelError(f"{shown(path)}: not whole")


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`, as this version writes it. VersionError where another one is needed to read it."""
    state = read_json(path / "state.json")
    version = state.get("format", 1)
    if version == OLDER and isinstance(state.get("updates"), int):
        return state | {"updates": {str(state.get("stage")): state["updates"]}}
    if type(version) is int and version != FORMAT:
        which = "a newer" if version > FORMAT else "an older"
        raise VersionError(f"{shown(path)}: written by {which} tinydiff; use that one, or train with --fresh")
    return state


def load(path: Path, training: Training, change: Change | None = None) -> dict[str, Any]:
    """A checkpoint into the very objects that `save` took, whoever held what when it was written; returns its state.

    With a `change` it is of a smaller network. Raises ModelError naming what differs where it is of other networks.
    """
    state = read(path)
    for kind in KINDS[:2]:
        stored, blocks = Blocks(path, kind, change), training.tensors(kind)
        stored.check({piece.name: piece.shape for piece in training.pieces})
        for piece in training.pieces:
            stored.fill(piece.name, blocks[piece.name], piece.offset)
    load_moments(path, training, state["updates"], change)
    stored, buffers = Blocks(path, "buffers", change), training.tensors("buffers")
    stored.check({name: tuple(buffer.shape) for name, buffer in buffers.items()})
    for name, buffer in buffers.items():
        stored.fill(name, buffer, (0,) * buffer.ndim)
    return state


def load_moments(path: Path, training: Training, updates: dict[str, int], change: Change | None = None) -> None:
    """The moments after each player's updates, of the same parameters, which are ours; of some if it has made any.

    Parameters that no loss has reached have none.
    """
    stored = {kind: Blocks(path, kind, change) for kind in MOMENTS}
    reached = {name for blocks in stored.values() for name in blocks.shapes}
    kept = {piece.name: moments(each.optimizer, piece.tensor) for each in training.learners for piece in each.pieces}
    for kind, blocks in stored.items():
        blocks.check({p.name: p.shape for p in training.pieces if p.name in reached and kind in kept[p.name]})
    for learner in training.learners:
        made, pieces = updates.get(learner.name, 0), [piece for piece in learner.pieces if piece.name in reached]
        if any(name.startswith(f"{learner.name}.") for name in reached) != bool(made):
            raise ModelError(f"{shown(path)}: {made} updates of {learner.name} do not go with its moments; use --fresh")
        for piece in pieces:
            state = learner.optimizer.state[piece.tensor]
            state["step"] = torch.tensor(float(made), device=piece.tensor.device)
            for kind in kept[piece.name]:
                state[kind] = torch.empty_like(piece.tensor, requires_grad=False)
                stored[kind].fill(piece.name, state[kind], piece.offset)


class Blocks:
    """One kind of a checkpoint's tensors, as they are or after a `change`: for each name its blocks with their places in the
    whole."""

    def __init__(self, folder: Path, kind: str, change: Change | None = None):
        state = read(folder)
        prefix = f"{state['stage']}." if state["format"] == OLDER else ""
        self.path, self.shapes = folder, dict[str, tuple[int, ...]]()
        self.blocks: dict[str, list[tuple[Sequence[int], Tensor]]] = {}
        for path in sorted([*folder.glob(f"{kind}.safetensors"), *folder.glob(f"{kind}-*-of-*.safetensors")]):
            places = json.loads(header(path).metadata.get("blocks", "{}"))
            for name, tensor in weights.tensors([path]).items():
                shape, offset = places.get(name, (tensor.shape, [0] * tensor.ndim))
                self.shapes[prefix + name] = tuple(shape)
                self.blocks.setdefault(prefix + name, []).append((offset, tensor))
        if change:
            changed = change(kind, dict(self.whole()))
            self.shapes = {name: tuple(tensor.shape) for name, tensor in changed.items()}
            self.blocks = {name: [((0,) * tensor.ndim, tensor)] for name, tensor in changed.items()}

    def check(self, ours: Mapping[str, tuple[int, ...]]) -> None:
        """ModelError with the names and shapes that differ."""
        wrong = sorted(n for n in {*ours, *self.shapes} if ours.get(n) != self.shapes.get(n))
        if wrong:
            told = ", ".join(f"{n} {self.shapes.get(n)} -> {ours.get(n)}" for n in wrong[:2])
            count = f", {len(wrong)} tensors differ, such as {told}" if len(wrong) > 2 else f": {told}"
            raise ModelError(f"{shown(self.path)}: of another network{count}; use --fresh")

    @torch.no_grad()
    def fill(self, name: str, target: Tensor, at: Sequence[int]) -> None:
        """Copy the part of a whole tensor that begins at `at` and has the target's shape."""
        filled = 0
        for offset, block in self.blocks[name]:
            low = [*map(max, at, offset)]
            high = [min(a + n, o + m) for a, n, o, m in zip(at, target.shape, offset, block.shape, strict=True)]
            if all(i < j for i, j in zip(low, high, strict=True)):
                spans = [*zip(low, high, at, offset, strict=True)]
                part = block[tuple(slice(i - o, j - o) for i, j, _, o in spans)]
                target[tuple(slice(i - a, j - a) for i, j, a, _ in spans)].copy_(part)
                filled += part.numel()
        if filled != target.numel():
            raise ModelError(f"{shown(self.path)}: {name} is not whole; use the checkpoint before it")

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, put together."""
        for name, shape in self.shapes.items():
            tensor = self.blocks[name][0][1]
            if len(self.blocks[name]) > 1:
                tensor = torch.empty(shape, dtype=tensor.dtype)
                self.fill(name, tensor, [0] * len(shape))
            yield name, tensor


def make_room(folder: Path, training: Training) -> None:
    """Make the folder of the checkpoints. Raises ResourceError where the disk has no room for one and its model folder."""
    one = sum(math.prod(piece.shape) * piece.tensor.element_size() for piece in training.pieces)
    size = len(KINDS) * one  # of each kind but buffers, which are little, and of the model folder
    with named(folder):
        if (free := shutil.disk_usage(folder.parent).free) < size:
            fix = "free some space, or use another --run-dir"
            raise ResourceError(f"{shown(folder)}: {free / 1e9:.3g} GB free, and a save takes {size / 1e9:.3g}; {fix}")
        make_folder(folder)


def prune(folder: Path, stage: str, keep: int, every: int = 0, best: int | None = None) -> None:
    """Remove a stage's checkpoints but the newest `keep`, those of every `every`-th step, and that of step `best`.

    Links are somebody else's, and so is a folder that they put something into.
    """
    with named(folder):
        for path in checkpoints(folder, stage)[:-keep]:
            step = int(path.name.rpartition("-")[2])
            due = step != best and (not every or step % every)
            if due and not path.is_symlink() and not foreign(path):
                temporary.discard(path)


def sweep(run_dir: Path) -> None:
    """Remove what a killed process left half-written or half-removed; the caller holds the run's lock."""
    with named(run_dir):
        inner = (path for path in run_dir.iterdir() if path.is_dir() and not path.is_symlink())
        for folder in (run_dir, *inner):
            temporary.sweep(folder)
            for path in (path for path in folder.glob(".tmp-*") if OLD.fullmatch(path.name) and not path.is_symlink()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
