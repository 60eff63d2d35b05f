"""Power lost after every call of a save: the old step or the new, and after the save the new."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from faults import CHANGES, WRITERS, check, owner, save

from tinydiff import files, temporary

pytestmark = pytest.mark.usefixtures("unsynced")


class Disk:
    """A folder as a disk may hold it when the power fails, learnt by looking at every call.

    For every file what has been synced of it, and what is there; for every folder the names synced, and what was done to
    them since, in order: [(name, inode or None)], all of which comes about or nothing. A name and what it names are synced
    apart. Descriptors are kept, so that no inode's number comes twice.
    """

    def __init__(self, root: Path):
        self.root, self.kept = root, dict[int, int]()
        self.live: dict[int, bytes | dict[str, int]] = {}
        self.synced: dict[int, bytes | dict[str, int]] = {}
        self.pending: dict[int, list[list[tuple[str, int | None]]]] = {}
        self.top = self.look()
        for number, found in self.live.items():  # what was there before has been for long
            self.synced[number], self.pending[number] = found if isinstance(found, bytes) else dict(found), []

    def close(self) -> None:
        for descriptor in self.kept.values():
            os.close(descriptor)

    def look(self) -> int:
        """Compare with what is there now."""
        live: dict[int, bytes | dict[str, int]] = {}
        top = self.scan(self.root, live)
        for number, found in live.items():
            if isinstance(found, dict):
                before = self.live.get(number, {})
                gone = {name: i for name, i in before.items() if found.get(name) != i}
                come = {name: i for name, i in found.items() if before.get(name) != i}
                steps = [*come.items(), *((name, None) for name in gone if name not in come)]
                if steps:  # of one call: what left a name and came under another was renamed
                    self.pending.setdefault(number, []).append(steps)
        self.live = live
        return top

    def scan(self, path: Path, live: dict) -> int:
        number = os.lstat(path).st_ino
        if number not in self.kept:
            self.kept[number] = os.open(path, os.O_RDONLY)
        if path.is_dir():
            live[number] = {}
            live[number].update({name: self.scan(path / name, live) for name in sorted(os.listdir(path))})
        else:
            live[number] = path.read_bytes()
        return number

    def sync(self, number: int) -> None:
        found = self.live[number]
        self.synced[number] = found if isinstance(found, bytes) else dict(found)
        self.pending[number] = []

    def lose_power(self, place: Path, keep: Callable[[], float]) -> None:
        """Make `place` what may be left; `keep` chooses, from 0 for what was synced alone to 1 for everything."""
        self.build(self.top, place, keep)

    def build(self, number: int, place: Path, keep: Callable[[], float]) -> None:
        found = self.live.get(number, self.synced.get(number))
        if isinstance(found, bytes) or (found is None):
            place.write_bytes(self.contents(number, found or b"", keep()))
            return
        place.mkdir()
        names = dict(self.synced.get(number, {}))
        for steps in self.pending.get(number, []):
            if keep() >= 0.5:
                names.update(steps)
        for name, inner in names.items():
            if inner is not None:
                self.build(inner, place / name, keep)

    def contents(self, number: int, live: bytes, chance: float) -> bytes:
        if self.synced.get(number) == live or chance >= 0.8:
            return live
        if chance >= 0.5:
            return live[: int(len(live) * (chance - 0.5) / 0.3)]
        return bytes(len(live)) if chance >= 0.25 else self.synced.get(number, b"")


@contextmanager
def watched(disk: Disk, after: Callable[[str], None]) -> Iterator[None]:
    """Looks at the disk after every call of a save, and calls `after`."""
    busy = []

    def seen(real, name, *args, **kwargs):
        if busy:
            return real(*args, **kwargs)
        busy.append(1)
        try:
            found = real(*args, **kwargs)
            disk.look()
            if name == "fsync":
                disk.sync(os.fstat(args[0]).st_ino)
            after(name)
            return found
        finally:
            busy.clear()

    with ExitStack() as stack:
        for name in CHANGES:
            stack.enter_context(patch.object(owner(name), name, partial(seen, getattr(owner(name), name), name)))
        for writer, name in WRITERS:
            call = lambda *a, real=getattr(writer, name), **k: seen(real, "write", *a, **k)  # noqa: E731
            stack.enter_context(patch.object(writer, name, call))
        yield


@pytest.mark.parametrize("before", [1, 0, -1], ids=["replacing", "first", "replacing by renames"])
def test_power_lost_after_every_call_of_a_save(tmp_path, monkeypatch, before):
    """With none, all, or any choice of what was not synced yet: the old step or the new, and after the save the new."""
    chances = 6 if before >= 0 else 2
    if before < 0:
        monkeypatch.setattr(temporary, "exchange", lambda *_: False)
        before = 1
    run_dir, rng, moments = tmp_path / "run", np.random.default_rng(20), []
    run_dir.mkdir()
    if before:
        save(run_dir, 1)
    disk = Disk(tmp_path / "run")

    def lose_power(name: str, done: bool = False) -> None:
        moments.append(name)
        choices = [lambda: 0.0, lambda: 1.0, lambda: 0.7, lambda: 0.3] + [rng.random] * chances
        for number, keep in enumerate(choices):
            place = tmp_path / f"{len(moments)}-{number}"
            disk.lose_power(place, keep)
            check(place, before or None, 2, done)
            shutil.rmtree(place)

    with watched(disk, lose_power):
        save(run_dir, 2)
    for _ in range(10):
        lose_power("done", done=True)
    disk.close()
    assert moments.count("fsync") > 12 and {"mkdir", "rename", "write"} < set(moments)


def test_power_lost_after_every_write_of_a_single_file(tmp_path):
    """Of the file, and of the folders that were made for it."""
    run_dir, rng = tmp_path / "run", np.random.default_rng(20)
    run_dir.mkdir()
    disk, places = Disk(run_dir), count()

    def lose_power(name: str, done: bool = False) -> None:
        for keep in [lambda: 0.0, lambda: 1.0] + [rng.random] * 20:
            place = tmp_path / f"lost{next(places)}"
            disk.lose_power(place, keep)
            path = place / "a" / "b" / "c.json"
            assert path.read_bytes() == b"{}\n" * 99 if done or path.exists() else True
            shutil.rmtree(place)

    with watched(disk, lose_power):
        files.write_file(run_dir / "a" / "b" / "c.json", b"{}\n" * 99)
    lose_power("done", done=True)
    disk.close()
