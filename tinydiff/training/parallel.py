"""Several processes as one run: how they find each other, agree, and spread a network over themselves.

torchrun starts them; a lone process is a world of one, and every call here is then nothing or itself. It knows no task and
no loop: a network is a module, and what is saved or averaged of it is a list of `Piece`s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tinydiff import processes
from tinydiff.config import Train
from tinydiff.errors import ResourceError, UsageError

FORMS = 64  # in which the code of one class is compiled: by its sizes, in training or not; torch would stop at 8


class World:
    """The processes of a run, and this one's place: `rank` of `size`. Groups of `tensor` share matrices and read equal rows."""

    def __init__(self, device: torch.device, timeout: int, tensor: int = 1):
        self.rank, self.size = processes.rank(), processes.world()
        self.device, self.timeout, self.tensor = device, timeout, tensor if self.size > 1 else 1
        if self.size % self.tensor:
            problem = f"{tensor} does not divide the {self.size} processes that were started"
            raise UsageError(f"train.tensor_parallel: {problem}")
        self.mesh: DeviceMesh | None = None
        self.savers: dist.ProcessGroup | None = None

    def __enter__(self) -> World:
        if self.size > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            with self.together():
                self.meet()
        return self

    def meet(self) -> None:
        """Groups of processes, none of which waits longer than the timeout: torch's own mesh would wait half an hour."""
        timeout = timedelta(seconds=self.timeout)
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", timeout=timeout)
        mesh = torch.arange(self.size).view(-1, self.tensor)  # (data, tensor)
        subgroups: Any = dist.new_subgroups_by_enumeration  # first of what it returns is the group of this process
        groups = [subgroups(m.tolist(), timeout)[0] for m in (mesh.T, mesh)]
        self.mesh = DeviceMesh.from_group(groups, self.device.type, mesh=mesh, mesh_dim_names=("data", "tensor"))
        self.savers = subgroups([mesh.flatten().tolist()], timeout, backend="gloo")[0]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.mesh and kind is None:  # after an error the others may be gone, and would be waited for
            dist.destroy_process_group()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Says what it means when torch's collectives fail inside: another process is gone or does not answer."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
                problem = f"another of the {self.size} processes ended, or did not answer for {self.timeout} s"
                raise ResourceError(f"{problem}; start the same command again to go on") from error
            raise

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            with self.together():
                dist.all_reduce(torch.zeros(1))  # on the CPU: unlike a barrier it needs no device

    @contextlib.contextmanager
    def first(self) -> Iterator[bool]:
        """Rank 0 goes through the block before the others do; yields whether this is rank 0."""
        if self.rank:
            self.wait()
        yield self.rank == 0
        if not self.rank:
            self.wait()

    def share(self, text: str, group: dist.ProcessGroup | None = None) -> str:
        """Rank 0's text, on all."""
        if self.size == 1:
            return text
        data = torch.frombuffer(bytearray(text.encode().ljust(4096, b"\0")), dtype=torch.uint8)
        dist.broadcast(data, 0, group=group)
        return bytes(data.tolist()).rstrip(b"\0").decode()

    def all(self, good: bool, group: dist.ProcessGroup | None = None) -> bool:
        """Whether it is so on every process."""
        if self.size == 1:
            return good
        votes = torch.tensor([float(good)])
        dist.all_reduce(votes, dist.ReduceOp.MIN, group=group)
        return bool(votes.item())

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes (B, ...), in the order of the batch; gradients flow back to whose they are.

        For a loss of the whole batch, which every process then computes; DDP's mean over processes makes it right.
        """
        return rows if self.mesh is None else Gathered.apply(rows, self.mesh.get_group("data"))

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's values, on all."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def rows(self, batch: int, shared: bool) -> range:
        """This process's part of a batch; where matrices are `shared`, a group has the same part."""
        parts, part = (self.size // self.tensor, self.rank // self.tensor) if shared else (self.size, self.rank)
        return range(part * batch // parts, (part + 1) * batch // parts)


class Gathered(torch.autograd.Function):
    """The rows of a group's processes, (B, ...); the gradient of a process's rows is the sum of what all compute for them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, len(rows)
        parts = [torch.empty_like(rows) for _ in range(group.size())]
        dist.all_gather(parts, rows.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole = gradient.contiguous().clone()
        dist.all_reduce(whole, group=ctx.group)
        return whole.split(ctx.count)[ctx.group.rank()], None


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The parts it repeats: members of its outermost module lists."""
    for child in network.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


def divides(parts: Sequence[nn.Module], world: World, cfg: Train) -> bool:
    """Whether the processes divide the weights of the `parts` among them."""
    return world.size > 1 and cfg.parallel == "fsdp" and bool(parts)


def spread(
    network: nn.Module, parts: Sequence[nn.Module], world: World, cfg: Train, dtype: torch.dtype | None
) -> nn.Module:
    """What the loop calls instead of `network`. Its `parts` are divided among the processes where `cfg` says fsdp.

    Master weights and their gradients' sums stay float32; `dtype` is what is multiplied.
    """
    divided = divides(parts, world, cfg)
    if divided and world.tensor > 1:
        for part in parts:
            share_matrices(part, world)
    if cfg.compile:
        torch._dynamo.config.recompile_limit = FORMS  # pyright: ignore[reportAttributeAccessIssue]
    for block in blocks(network):
        if cfg.gradient_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            block.compile()
    if divided:
        for part in parts:
            divide(part, world, dtype)
        return network
    if world.mesh is not None:
        with world.together():
            network = DistributedDataParallel(network, gradient_as_bucket_view=True)
            network.broadcast_buffers = False  # the loop does it, after each update
    return network


def divide(network: nn.Module, world: World, dtype: torch.dtype | None) -> None:
    """FSDP: each process holds a slice of every weight, and all of a block only while it is computed."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert world.mesh is not None
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if world.device.type == "cuda" else None,  # a CPU's autocast wants its norms in float32
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # bfloat16 knows no timestep between 512 and 514
    )
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  FSDP slices nothing else
    alone = (m for m in network.modules() if getattr(m, "divided_alone", False))
    for unit in dict.fromkeys(chain(alone, blocks(network), [network])):
        fully_shard(unit, mesh=world.mesh["data"], mp_policy=policy, reshard_after_forward=True)


def share_matrices(network: nn.Module, world: World) -> None:
    """Tensor parallelism (Shoeybi et al. 2019, section 3) of the blocks that say which of their matrices can be shared."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    assert world.mesh is not None
    styles = {"columns": ColwiseParallel, "rows": RowwiseParallel}
    for block in blocks(network):
        if share := getattr(block, "share", None):
            plan = {name: styles[by]() for name, by in share(world.tensor).items()}
            parallelize_module(block, world.mesh["tensor"], plan)


def synced(network: nn.Module, parts: Sequence[nn.Module], last: bool) -> AbstractContextManager:
    """Around each part of a batch: gradients are summed over the processes after the `last` part only."""
    from torch.distributed.fsdp import FSDPModule

    for part in parts:
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(last)
    return contextlib.nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()


@dataclass(frozen=True)
class Piece:
    """The block of a parameter that this process holds; mostly all of it. `tensor` is its memory, not a copy."""

    name: str
    parameter: nn.Parameter
    tensor: Tensor
    offset: tuple[int, ...]  # of the block in the whole
    copies: int = 1  # processes with this same block, among those that divide the network
    mine: bool = True  # whether this one is to save it

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return tuple(self.parameter.shape)

    def gradient(self) -> Tensor | None:
        """The block's gradient, which the optimizer looks for at `tensor.grad`."""
        grad = self.parameter.grad
        if self.tensor is not self.parameter:
            self.tensor.grad = None if grad is None else grad.to_local()  # type: ignore[attr-defined]
        return self.tensor.grad


def pieces(module: nn.Module, world: World, prefix: str = "") -> list[Piece]:
    """What this process holds of a module's parameters that learn."""
    return [piece(prefix + name, p, world) for name, p in module.named_parameters() if p.requires_grad]


def piece(name: str, p: nn.Parameter, world: World) -> Piece:
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # as torch's own checkpoints do

    if not isinstance(p, DTensor):
        return Piece(name, p, p, (0,) * p.ndim, mine=world.rank == 0)
    names = p.device_mesh.mesh_dim_names or ()
    shared = any(n == "tensor" and isinstance(at, Shard) for n, at in zip(names, p.placements, strict=True))
    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    copies = 1 if shared else world.tensor
    return Piece(name, p, p.to_local().detach(), tuple(offset), copies, shared or world.rank % world.tensor == 0)


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, of which each process may hold a slice."""
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def norm(parts: Sequence[Piece], gradients: list[Tensor], world: World) -> Tensor:
    """The norm of the whole gradient, (), of which each process has its blocks."""
    if not gradients:
        return torch.zeros((), device=world.device)
    each = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
    if all(piece.tensor is piece.parameter for piece in parts):
        return each.norm()  # every process has all of it
    copies = torch.tensor([piece.copies for piece in parts], device=each.device)
    return world.sum((each.double() ** 2 / copies).sum()).sqrt()
