"""Several processes of one command, started by torchrun: this one's rank, and how the first one distributes work.

Items of work are bytes, whose meaning only the caller knows. They go through torch's key-value store, which torchrun's
agent hosts; torch is imported only if there are several processes. Nothing is pickled.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from queue import Queue
from typing import Any

from tinydiff.errors import ResourceError

AHEAD = 4  # items queued for each process: it need not wait for the first one, and memory does not hold all of stdin
POLL = 0.02  # seconds
PATIENCE = 24 * 3600.0  # seconds to wait for another process; if one dies, torchrun ends the others long before


def rank() -> int:
    """This process's rank; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def world() -> int:
    """The number of processes, on all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def turn() -> str:
    """The prefix of a message that ends this process: "" or, after a while, "[rank N] "."""
    if not rank():
        return ""
    time.sleep(3)  # if all ranks have the same error, rank 0 reports it and torchrun ends the others meanwhile
    return f"[rank {rank()}] "


def own_device() -> None:
    """Make one CUDA device visible to this process: the one at its local rank among those of its machine."""
    if world() == 1:
        return
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = list(range(torch.cuda.device_count())) if listed is None else listed.split(",")
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(devices[int(os.environ.get("LOCAL_RANK", 0)) % len(devices)])


def dealt(items: Iterator[bytes]) -> Iterator[bytes]:
    """This process's share of `items`: item k goes to rank k % world, as soon as it is there. No item may be empty.

    Only rank 0 reads `items`, in a thread, and raises what they raise. Raises ResourceError if a process is lost.
    """
    with _in_touch():
        yield from _deal(items) if rank() == 0 else _received()


def collected(item: bytes) -> list[bytes]:
    """The items of all processes in rank 0, once all are done, where torchrun's ending all of them ends no work; else none."""
    if world() == 1:
        return [item]
    with _in_touch():
        if not rank():
            return [item, *(_popped(_store(), "done") for _ in range(1, world()))]
        _store().queue_push("done", item)
        return []


@contextmanager
def _in_touch() -> Iterator[None]:
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise ResourceError("the processes lost each other; look for the first message of another one") from error


def _deal(items: Iterator[bytes]) -> Iterator[bytes]:
    own: Queue[Any] = Queue(AHEAD)  # items, then an empty one or an exception

    def feed() -> None:
        try:
            _hand_out(items, own)
            own.put(b"")
        except BaseException as error:
            own.put(error)

    threading.Thread(target=feed, daemon=True).start()
    while item := own.get():
        if isinstance(item, BaseException):
            raise item
        yield item


def _hand_out(items: Iterator[bytes], own: Queue[Any]) -> None:
    """Queue every item, then an empty one per process; wait until all are taken, as this process may host the store."""
    store = _store()
    for index, item in enumerate(items):
        if not index % world():
            own.put(item)
            continue
        name = str(index % world())
        _wait(lambda name=name: store.queue_len(name) < AHEAD)
        store.queue_push(name, item)
    others = [str(other) for other in range(1, world())]
    for name in others:
        store.queue_push(name, b"")
    _wait(lambda: not any(store.queue_len(name) for name in others))


def _received() -> Iterator[bytes]:
    store, name = _store(), str(rank())
    while item := _popped(store, name):
        yield item


def _popped(store: Any, name: str) -> bytes:
    """The next item of a queue, waited for."""
    _wait(lambda: store.queue_len(name) > 0)
    return store.queue_pop(name)


def _wait(ready: Any) -> None:
    """Wait until `ready()`. It polls, because signals are not handled while torch itself waits."""
    begun = time.monotonic()
    while not ready():
        if time.monotonic() - begun > PATIENCE:
            raise ResourceError("another process has not answered for a day; is it stopped?")
        time.sleep(POLL)


@cache
def _store() -> Any:
    """The key-value store of torch's process groups, with a prefix of its own for each restart by torchrun."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=5)))
    return PrefixStore(f"tinydiff/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
