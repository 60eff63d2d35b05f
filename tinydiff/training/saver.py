"""Threads of the training loop: one writes checkpoints while training goes on, one makes the next batches.

Both are daemons: if the process dies, an unfinished save is never visible, and batches are made again.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tinydiff.errors import HungError
from tinydiff.training.state import KINDS, Snapshot, Training, snapshot

TRIES = 10  # waits that a timeout is divided into; if the process is stopped meanwhile, only one of them runs out


class Saver:
    """Saves one checkpoint at a time in a thread. An error in the thread is raised by the next call."""

    def __init__(self) -> None:
        self.memory: Snapshot = {}
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.copied = threading.Event()
        self.copied.set()

    def begin(self, training: Training, write: Callable[[Snapshot], None]) -> None:
        """Copy the training state and `write` the copy, in a thread. The state must not change before `settle`."""
        self.wait()
        snapshot(training, self.memory, ["buffers"])  # at once: a forward pass may change them
        self.copied.clear()
        self.thread = threading.Thread(target=self.work, args=(training, write), daemon=True)
        self.thread.start()

    def work(self, training: Training, write: Callable[[Snapshot], None]) -> None:
        """The thread: copy, then write."""
        try:
            snapshot(training, self.memory, KINDS[:-1])
            self.copied.set()
            write(self.memory)
        except BaseException as error:
            self.error = error
            self.copied.set()

    def settle(self) -> None:
        """Wait until the state is copied and may change. Forward and backward passes need not wait."""
        self.copied.wait()
        self.check()

    def check(self) -> None:
        """Raise the thread's error, if any."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self) -> None:
        """Wait until the checkpoint is written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def close(self) -> None:
        """At an early end, wait some seconds for a checkpoint to be written, but not after a second Ctrl-C."""
        if self.thread is not None and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            self.thread.join(25.0)  # torchrun kills after 30


class Ahead:
    """Iterates over (n, make(n)) for n in `numbers`; a thread makes up to `depth` of them ahead.

    An error in `make(n)` is raised at item n. Raises HungError if an item takes more than `timeout` seconds.
    """

    def __init__(self, make: Callable[[int], Any], numbers: range, timeout: float, depth: int = 2):
        self.made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
        self.make, self.numbers, self.timeout, self.stopped = make, numbers, timeout, threading.Event()

    def work(self) -> None:
        """The thread: make items until the last, an error or a stop."""
        for n in self.numbers:
            try:
                item: tuple[Any, BaseException | None] = (self.make(n), None)
            except BaseException as error:
                item = (None, error)
            while not self.stopped.is_set():
                with contextlib.suppress(queue.Full):
                    self.made.put(item, timeout=0.1)
                    break
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
        """Item n from the thread."""
        for _ in range(TRIES):
            with contextlib.suppress(queue.Empty):
                value, error = self.made.get(timeout=self.timeout / TRIES)
                if error is not None:
                    raise error
                return value
        problem = f"reading the batch of step {n + 1} took more than {self.timeout:g} s"
        raise HungError(f"{problem}; check the disk that holds the data, or raise train.timeout")
