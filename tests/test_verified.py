"""Remembered hashes: a file is read once, and again as soon as anything about it changes."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tinydiff import cli, verified
from tinydiff.errors import ModelError
from tinydiff.files import committed, sha256
from tinydiff.verified import Memory, verify


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two files that were written long ago, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "RECENT", -(10**18))  # whatever was written just now counts as old
    with committed(tmp_path / "model") as made:
        for name in ("a", "b"):
            (made / name).write_bytes(name.encode() * 100)
    return tmp_path / "model"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed."""
    names: list[str] = []
    monkeypatch.setattr(verified, "sha256", lambda path: (names.append(path.name), sha256(path))[1])
    return names


def opened(folder: Path, anew: bool = False) -> None:
    """As whoever opens a model does."""
    memory = Memory(anew)
    verify(folder, digest=memory.sha256)
    memory.save()


def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache/tinydiff/verified/hashes.json"


def test_a_file_is_hashed_once_until_somebody_asks(folder, read, tmp_path):
    opened(folder)
    opened(folder)
    assert read == ["a", "b"]
    opened(folder, anew=True)
    assert read == ["a", "b"] * 2
    verify(folder, digest=sha256)
    known = json.loads(cache(tmp_path).read_bytes())
    assert {name: entry[-1] for name, entry in known.items()} == {
        str(folder / name): sha256(folder / name) for name in "ab"
    }


def rewritten(path: Path) -> None:
    path.write_bytes(b"x" * 100)


def rewritten_and_dated_back(path: Path) -> None:
    status = path.stat()
    rewritten(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(b"x" * 100)
    shutil.copystat(path, path.with_name("new"))
    path.with_name("new").rename(path)


def through_a_map(path: Path) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        data[:1] = b"x"
        data.flush()


@pytest.mark.parametrize("change", [rewritten, rewritten_and_dated_back, replaced, through_a_map])
def test_a_file_that_is_touched_is_hashed_again(folder, change):
    opened(folder)
    change(folder / "a")
    with pytest.raises(ModelError, match=r"/a: damaged, its SHA-256"):
        opened(folder)


def test_a_file_that_was_written_just_now_is_not_remembered(folder, read, monkeypatch):
    """It could be written again within the same tick of the clock."""
    monkeypatch.setattr(verified, "RECENT", 2 * 10**9)
    opened(folder)
    opened(folder)
    assert read == ["a", "b"] * 2


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"PATH": 3}', b'{"PATH": []}', b'{"PATH": [1, 2, 3, 4, null]}']
)
def test_a_damaged_memory_remembers_nothing(folder, read, tmp_path, content):
    cache(tmp_path).parent.mkdir(parents=True)
    cache(tmp_path).write_bytes(content.replace(b"PATH", str(folder / "a").encode()))
    opened(folder)
    opened(folder)
    assert read == ["a", "b"]


def test_a_wrong_memory_refuses_nothing(folder, read, tmp_path):
    opened(folder)
    known = json.loads(cache(tmp_path).read_bytes())
    for entry in known.values():
        entry[-1] = "0" * 64
    cache(tmp_path).write_text(json.dumps(known))
    opened(folder)
    assert read == ["a", "b"] * 2


@pytest.mark.parametrize("fault", ["a file", "a link to nowhere", "read-only"])
def test_a_memory_that_cannot_be_written_is_no_error(folder, read, tmp_path, monkeypatch, fault, capfd):
    monkeypatch.delenv("HOME", raising=False)
    place = tmp_path / "cache"
    if fault == "a file":
        place.write_bytes(b"")
    elif fault == "a link to nowhere":
        place.symlink_to(tmp_path / "nowhere")
        (tmp_path / "nowhere").write_bytes(b"")
    else:
        monkeypatch.setattr(os, "access", lambda *_, **__: False)
    opened(folder)
    opened(folder)
    assert read == ["a", "b"] * 2 and capfd.readouterr() == ("", "")


def test_processes_at_once_leave_a_whole_memory(folder, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: opened(folder, anew=True), range(40)))
    assert json.loads(cache(tmp_path).read_bytes()).keys() == {str(folder / name) for name in "ab"}


def test_the_memory_is_bounded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(verified, "MOST", 1)
    opened(folder)
    assert list(json.loads(cache(tmp_path).read_bytes())) == [str(folder / "b")]


def test_verify_reads_a_model_again(tiny_model, monkeypatch, tmp_path, read):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "RECENT", -(10**18))
    for verify_, count in ((False, True), (False, False), (True, True)):
        read.clear()
        cli.opening(str(tiny_model), "torch", "cpu", anew=verify_)
        assert bool(read) == count
