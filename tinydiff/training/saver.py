"""Threads beside the training loop: one writes a checkpoint while the next steps are computed, one makes their batches.

Both are daemons: what a dying process leaves undone is invisible (saves) or made again (batches).
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tinydiff.errors import HungError
from tinydiff.training.state import Snapshot, Training, snapshot

TRIES = 10  # parts of a time-out; the time that a process is stopped, and its threads with it, is over in one of them


class Saver:
    """Saves in the background, one checkpoint at a time. An error of the thread is raised by the call that comes next."""

    def __init__(self) -> None:
        self.memory: Snapshot = {}
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.copied = threading.Event()
        self.copied.set()

    def begin(self, training: Training, write: Callable[[Snapshot], None]) -> None:
        """Copy the training's state and `write` the copy. The state must not change before `settle`."""
        self.wait()
        self.copied.clear()
        self.thread = threading.Thread(target=self.work, args=(training, write), daemon=True)
        self.thread.start()

    def work(self, training: Training, write: Callable[[Snapshot], None]) -> None:
        try:
            snapshot(training, self.memory)
            self.copied.set()
            write(self.memory)
        except BaseException as error:
            self.error = error
        finally:
            self.copied.set()

    def settle(self) -> None:
        """Until the state may change again; a forward and a backward pass may be made meanwhile."""
        self.copied.wait()
        self.check()

    def check(self) -> None:
        """Raise what the thread has met."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self) -> None:
        """Until the checkpoint stands."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def close(self) -> None:
        """At an early end: let a checkpoint be finished that is being written, if that is a matter of seconds.

        Who interrupts a second time does not want to wait: a checkpoint that is not finished is then invisible.
        """
        if self.thread is not None and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            self.thread.join(25.0)  # torchrun kills after 30


class Ahead:
    """`make(n)` for n in a range, the next `depth` of them made in a thread while the newest is used.

    Raises what `make` raises, in its place, and HungError where one takes more than `timeout` seconds.
    """

    def __init__(self, make: Callable[[int], Any], numbers: range, timeout: float, depth: int = 2):
        self.made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
        self.make, self.numbers, self.timeout, self.stopped = make, numbers, timeout, threading.Event()

    def work(self) -> None:
        for n in self.numbers:
            try:
                item: tuple[Any, BaseException | None] = (self.make(n), None)
            except BaseException as error:
                item = (None, error)
            while not self.stopped.is_set():
                try:
                    self.made.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self.stopped.is_set() or item[1]:
                return

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        thread = threading.Thread(target=self.work, daemon=True)
        thread.start()
        try:
            for n in self.numbers:
                yield n, self.next(n)
        finally:
            self.stopped.set()
            thread.join(1.0)

    def next(self, n: int) -> Any:
        for _ in range(TRIES):
            with contextlib.suppress(queue.Empty):
                value, error = self.made.get(timeout=self.timeout / TRIES)
                if error is not None:
                    raise error
                return value
        problem = f"reading the batch of step {n + 1} took more than {self.timeout:g} s"
        raise HungError(f"{problem}; check the disk that holds the data, or raise train.timeout")
