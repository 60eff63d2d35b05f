"""Several processes that torchrun started on one command: which of them this is, and how the first one deals out work.

Work is bytes here; what it means is the caller's. torch is imported only where there are several processes: its store,
which torchrun's agent hosts, is what they share. Nothing is pickled.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tinydiff.errors import ResourceError

if TYPE_CHECKING:
    from queue import Queue

AHEAD = 4  # items that wait for a process, so that it never waits for the first one, nor all of stdin lies in memory
POLL = 0.02  # seconds
PATIENCE = 24 * 3600.0  # seconds without work; torchrun ends the others of a dead process long before


def rank() -> int:
    """This process's number from 0; 0 for one that torchrun did not start."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def world() -> int:
    """How many processes torchrun started on this command, on all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def turn() -> str:
    """What precedes a message that ends this process, when it is its turn to say it.

    What all processes meet, the first one says: torchrun ends the others while they wait here.
    """
    if not rank():
        return ""
    time.sleep(3)
    return f"[rank {rank()}] "


def own_device() -> None:
    """Leave this process one CUDA device to see: of those that its machine shows, the one of its number there."""
    if world() == 1:
        return
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = list(range(torch.cuda.device_count())) if listed is None else listed.split(",")
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(devices[int(os.environ.get("LOCAL_RANK", 0)) % len(devices)])


def dealt(items: Iterator[bytes]) -> Iterator[bytes]:
    """This process's share of the items: item k goes to process k modulo their number, as soon as there is an item k.

    Only the first process reads `items`, in a thread of its own, and meets what they raise. No item may be empty. Raises
    ResourceError where the processes cannot talk to each other.
    """
    from torch.distributed import DistError

    try:
        yield from _deal(items) if rank() == 0 else _received()
    except DistError as error:
        raise ResourceError("the processes lost each other; look for the first message of another one") from error


def _deal(items: Iterator[bytes]) -> Iterator[bytes]:
    from queue import Queue

    own: Queue[Any] = Queue(AHEAD)  # items, then an empty one or what went wrong

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
    """Every item to its process, then an empty one to each other; ends when all have been taken, the store may be ours."""
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
    while True:
        _wait(lambda: store.queue_len(name) > 0)
        if not (item := store.queue_pop(name)):
            return
        yield item


def _wait(ready: Any) -> None:
    """Until `ready()`; a signal gets through, as it would not while torch waits."""
    begun = time.monotonic()
    while not ready():
        if time.monotonic() - begun > PATIENCE:
            raise ResourceError("another process has not answered for a day; is it stopped?")
        time.sleep(POLL)


def _store() -> Any:
    """The key-value store that torch's own process groups meet at; names of their own for each start by torchrun."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=5)))
    return PrefixStore(f"tinydiff/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
