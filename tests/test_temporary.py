"""Temporary folders: what a killed process left is removed, what a living one makes is not, whoever looks and when."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tinydiff import temporary
from tinydiff.errors import BusyError, UsageError
from tinydiff.files import committed, write_file, written
from tinydiff.verified import verify

CHILD = """
import os, signal, sys
from pathlib import Path
from tinydiff.files import committed, written
base, kind = Path(sys.argv[1]), sys.argv[2]
with {"folder": committed, "file": written}[kind](base / "out") as made:
    if kind == "folder":
        made = made / "weights"
    made.write_bytes(b"half")
    made.with_name(".tmpAb3xY9").write_bytes(b"of a library")
    print("here", flush=True)
    sys.stdin.read()
"""


def child(folder: Path, kind: str) -> subprocess.Popen:
    """A process in the middle of writing."""
    command = [sys.executable, "-c", CHILD, str(folder), kind]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"here\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_only_what_killed_processes_left_is_removed(tmp_path, monkeypatch, kind):
    with child(tmp_path, kind) as process:
        (left,) = names(tmp_path)
        assert temporary.OURS.fullmatch(left)
        temporary.sweep(tmp_path)
        assert names(tmp_path) == [left]
        process.kill()
        process.wait()
    monkeypatch.setattr(temporary, "_sweep_once", temporary.sweep)  # as a process does that begins to write here
    write_file(tmp_path / "other.png", b"x")
    assert names(tmp_path) == ["other.png"]


def test_a_folder_is_made_by_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "PATIENCE", 0.1)
    with child(tmp_path, "folder") as process:
        with (
            pytest.raises(BusyError, match=f"out: being written by process {process.pid}; wait"),
            committed(tmp_path / "out"),
        ):
            pass
        process.communicate(b"")
    verify(tmp_path / "out")
    with pytest.raises(UsageError, match="exists"), committed(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["nothing", "lock", "link", "file"])
def test_whatever_has_the_name_of_a_temporary_folder(tmp_path, kind):
    """Killed before it was locked or while it was removed: gone. Not a folder: not ours."""
    place = tmp_path / temporary.NAME.format("0" * 16)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    if kind == "link":
        place.symlink_to(tmp_path / "precious")
    elif kind == "file":
        place.write_text("x")
    else:
        place.mkdir()
        if kind == "lock":
            (place / "lock").touch()
            (place / "link").symlink_to(tmp_path / "precious")
    temporary.sweep(tmp_path)
    assert (tmp_path / "precious" / "file").exists()
    assert os.path.lexists(place) == (kind in ("link", "file"))


def test_a_lock_that_vanishes_is_not_held(tmp_path, monkeypatch):
    """Another process removed the folder between the opening of its lock and the locking."""
    place, real = tmp_path / temporary.NAME.format("0" * 16), fcntl.flock
    place.mkdir()

    def late(descriptor: int, how: int) -> None:
        (place / "lock").unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert temporary._hold(place) is None


def test_without_locks_nothing_of_others_is_touched(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(temporary, "PATIENCE", 0.1)
    place = temporary.place_of(tmp_path / "out")
    place.mkdir()
    (place / "new").write_text("x")
    temporary.sweep(tmp_path)
    with pytest.raises(BusyError), committed(tmp_path / "out"):
        pass
    assert (place / "new").read_text() == "x"
    write_file(tmp_path / "a.png", b"x")
    with committed(tmp_path / "other") as folder:
        (folder / "a").write_text("x")
    verify(tmp_path / "other")


@pytest.mark.parametrize("name", ["a", "é" * 127 + "x", "x" * 243, "x" * 251 + ".png"])
@pytest.mark.parametrize("exchanges", [True, False])
def test_names_of_every_length(tmp_path, monkeypatch, name, exchanges):
    """Up to the 255 bytes that a name may have: files and folders, new and replaced."""
    if not exchanges:
        monkeypatch.setattr(temporary, "exchange", lambda *_: False)
    for text in ("old", "new"):
        write_file(tmp_path / "files" / name, text.encode(), force=True)
        with committed(tmp_path / name, replace=True) as folder:
            (folder / "a").write_text(text)
    verify(tmp_path / name)
    assert (tmp_path / name / "a").read_text() == (tmp_path / "files" / name).read_text() == "new"
    assert names(tmp_path) == sorted([name, "files"])


@pytest.mark.parametrize("kind", ["folder", "device", "pipe", "dangling link"])
def test_force_replaces_files_only(tmp_path, kind):
    path = tmp_path / "out.png"
    {
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/null"),
        "pipe": lambda: os.mkfifo(path),
        "dangling link": lambda: path.symlink_to("nowhere"),
    }[kind]()
    with pytest.raises(UsageError, match="no file; choose another path"):
        write_file(path, b"x", force=True)
    assert os.path.lexists(path) and not path.is_file()


def test_a_linked_folder_is_replaced_where_it_is(tmp_path):
    (tmp_path / "large").mkdir()
    with committed(tmp_path / "large" / "model") as folder:
        (folder / "a").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "large" / "model")
    with committed(tmp_path / "out", replace=True) as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "large" / "model" / "a").read_text() == "new"
    assert names(tmp_path) == ["large", "out"] and names(tmp_path / "large") == ["model"]


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022, 0o002, 0o000])
@pytest.mark.parametrize("setgid", [False, True])
def test_modes_are_those_of_the_umask(tmp_path, umask, setgid):
    """Whatever a library or a copied folder would have: also a read-only one, and one where the group is inherited."""
    (tmp_path / "copied").mkdir(mode=0o755)
    base = tmp_path / "base"
    before = os.umask(umask)
    try:
        base.mkdir()
        if setgid:
            os.chown(base, -1, 12345) if os.getuid() == 0 else None
            base.chmod(base.stat().st_mode | stat.S_ISGID)
        for _ in range(2):
            with committed(base / "model", replace=True) as folder:
                (folder / "net").mkdir(mode=0o500)
                save_file({"a": np.zeros(3)}, folder / "net" / "w.safetensors")
                (folder / "run.sh").touch(mode=0o777)
                (folder / "copied").mkdir()
                (folder / "copied").chmod(0o555)
            with written(base / "deep" / "w.safetensors", force=True) as file:
                save_file({"a": np.zeros(3)}, file)
        (base / "plain").touch()
        (base / "plain folder").mkdir()
    finally:
        os.umask(before)
    for path in base.rglob("*"):
        wanted = (base / ("plain folder" if path.is_dir() else "plain")).stat()
        assert stat.filemode(path.stat().st_mode) == stat.filemode(wanted.st_mode), path
        assert path.stat().st_gid == wanted.st_gid, path
