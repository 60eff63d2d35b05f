"""Where images go: every name is taken as it looks, or refused before anything is drawn."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_backend import REQUEST, Fake
from PIL import Image

from tinydiff import pipeline
from tinydiff.backends import find_model, open_backend
from tinydiff.checkpoints.source import Source
from tinydiff.drawing import Drawn, Job, Reel, Sink, at_once, draw, in_turn
from tinydiff.errors import ResourceError, UsageError

PIXELS = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unsynced: None) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(sink: Sink | Reel, index: int) -> str:
    path = sink.write(Drawn(index, PIXELS, {}, 0.0), None)
    sink.close()
    with Image.open(path) as image:
        assert image.size == (4, 4)
    return path


WIDTHS = {f"%{zero}{width}d": width for zero in ("", "0") for width in range(1, 21)}


@pytest.mark.parametrize("pattern", ["%d", "%0d", *WIDTHS])
def test_a_pattern_is_the_number_in_its_width(pattern: str, place: Path) -> None:
    for name in (f"{pattern}.png", f"a-{pattern}-b.PNG", f"in/{pattern}/x.png"):
        sink = Sink(name, force=False, many=False)
        for index in (0, 7, 10**12):
            digits = str(index).rjust(WIDTHS.get(pattern, 0), "0" if "%0" in pattern else " ")
            assert sink.path(index) == Path(name.replace(pattern, digits))
    assert not list(place.iterdir())


OTHERS = [
    *"csiouxXeEfFgGaArn%pb",
    "21d",
    "021d",
    "99d",
    "0999999999d",
    "00d",
    "-3d",
    "+d",
    " d",
    "#d",
    ".3d",
    "3.3d",
    "ld",
]


OTHERS += ["*d", "(a)d", "", "1", "0", "d%d", "04d-%04d", "d%", "%d", "d%%", "d%s", "d%(index)s", "d 100% "]


@pytest.mark.parametrize("other", OTHERS)
def test_any_other_per_cent_sign_is_refused(other: str, place: Path) -> None:
    for name in (f"p%{other}.png", f"out%{other}/a.png", f"%{other}"):
        with pytest.raises(UsageError, match=r"-o .*: % has no other meaning.*out/%04d\.png"):
            Sink(name, force=True, many=True)
    assert not list(place.iterdir())


def test_a_folder_may_have_one_in_its_name(place: Path) -> None:
    (place / "50%s").mkdir()
    for name in ("50%s", "50%s/"):
        assert Sink(name, force=False, many=False).path(3) == Path("50%s/0003.png")


@pytest.mark.parametrize("kind", [lambda name: Sink(name, False, False), lambda name: Sink(name, True, True)])
def test_the_empty_name_is_refused(kind, place: Path) -> None:
    with pytest.raises(UsageError, match="^-o: the name is empty; give a file"):
        kind("")
    with pytest.raises(UsageError):
        Reel("", False)
    assert not Path("/0000.png").exists()


@pytest.mark.parametrize("length", [8, 200, 218, 230, *range(243, 258), 5000])
@pytest.mark.parametrize("letter", ["a", "é", "🟥"])
def test_a_name_is_as_long_as_the_file_system_has_them(length: int, letter: str, place: Path) -> None:
    """In bytes: what is too long is refused before anything is drawn, what is not is written, over another file too."""
    name = (letter * length).encode()[: max(0, length - 4)].decode(errors="ignore") + ".png"
    for output, kind in ((name, Sink), (f"new/{name}", Sink), (name, Reel)):
        if length > 255:
            with pytest.raises(ResourceError, match="name too long; give a shorter name") as caught:
                kind(output, True, *([False] if kind is Sink else []))
            assert len(str(caught.value)) < 500
        else:
            for _ in range(2):
                assert written(kind(output, True, *([False] if kind is Sink else [])), 0) == output
    assert not list(place.rglob(".*"))


def test_a_long_name_has_room_for_its_number() -> None:
    Sink("a" * 246 + ".png", force=False, many=True)
    with pytest.raises(ResourceError, match="shorter name"):
        Sink("a" * 247 + ".png", force=False, many=True)
    with pytest.raises(ResourceError, match="shorter name"):
        Sink("a/" * 2048 + "x.png", force=False, many=False)


NAMES = [
    "a b.png",
    "-x.png",
    "a\nb.png",
    "\x1b[31m.png",
    "\udcff\udc80.png",
    "é\u0301🟥.png",
    "'\".png",
    "a.b.png",
    "~.png",
    "$x.png",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_other_name_is_a_name(name: str) -> None:
    assert written(Sink(name, force=False, many=False), 0) == name
    with pytest.raises(UsageError, match="exists") as caught:
        Sink(name, force=False, many=False)
    assert str(caught.value).isprintable()
    assert written(Sink(name, force=False, many=True), 3) == f"{name[:-4]}-0003.png"


def taken(place: Path) -> dict[str, type[Exception]]:
    """Names that cannot be written, each with what is said of them."""
    (place / "file").touch()
    (place / "mine.png").write_bytes(b"mine")
    os.symlink("nowhere", place / "dangling.png")
    os.symlink("nowhere", place / "link")
    os.symlink("loop", place / "loop")
    refused: dict[str, type[Exception]] = dict.fromkeys(["mine.png", "dangling.png"], UsageError)
    names = ["file/x.png", "file/", "file/%d.png", "file/a/b/x.png", "link/x.png", "link/", "loop/x.png"]
    return refused | dict.fromkeys(names, ResourceError)


def test_what_cannot_be_written_is_refused_before_it_is_drawn(place: Path) -> None:
    refused = taken(place)
    before = sorted(place.rglob("*"))
    for name, error in refused.items():
        with pytest.raises(error):
            Sink(name, force=False, many=False)
        if name.endswith(".png") and "%" not in name:
            with pytest.raises(error):
                Reel(name, force=False)
    assert sorted(place.rglob("*")) == before and (place / "mine.png").read_bytes() == b"mine"


def test_a_folder_without_permission_is_refused_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(place))
    with pytest.raises(ResourceError, match=f"{os.strerror(errno.EACCES)}; choose a writable place"):
        Sink("a/b/c.png", force=False, many=False)


def test_settings_that_were_used_are_those_in_the_image() -> None:
    """A negative prompt with syntax is kept as it was typed."""
    (image,) = draw(Fake(), iter([Job(0, "(a:1.0)", 1)]), "(bb:1.0)", replace(REQUEST, cfg_scale=2.0), 1)
    assert (image.settings["prompt"], image.settings["negative"]) == ("(a:1.0)", "(bb:1.0)")
    (plain,) = draw(Fake(), iter([Job(0, "a", 1)]), "bb", replace(REQUEST, cfg_scale=2.0), 1)
    assert (image.pixels == plain.pixels).all()


def test_batches_in_flight_come_in_turn() -> None:
    """Two at once, in order; a short batch, after which nobody knows when more comes, keeps nothing back."""
    gate, begun, reached = threading.Event(), list[int](), list[list[int]]()

    def work(batch: list[Job], is_next: Callable[[], bool]) -> list[int]:
        begun.append(batch[0].index)
        if batch[0].index == 0:
            assert is_next() and gate.wait(10)  # until the one after it has ended
        elif batch[0].index == 2:
            assert not is_next()
            gate.set()
        return [job.index for job in batch]

    def given() -> Iterator[list[Job]]:
        jobs = [Job(i, "x", i) for i in range(7)]
        yield from (jobs[:2], jobs[2:4], jobs[4:6])
        reached.append(sorted(begun))
        yield []
        assert [done for part in seen for done in part] == [0, 1, 2, 3, 4, 5]
        yield jobs[6:]
        assert len(seen) == 4

    seen = list[list[int]]()
    for result in in_turn(work, given(), 2, 2):
        seen.append(result)
    assert seen == [[0, 1], [2, 3], [4, 5], [6]] and set(reached[0]) >= {0, 2}


def test_an_error_ends_what_is_in_flight() -> None:
    begun = list[int]()

    def work(batch: list[Job], is_next: Callable[[], bool]) -> list[int]:
        begun.append(batch[0].index)
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        list(in_turn(work, iter([[Job(i, "x", i)] for i in range(100)]), 1, 2))
    assert len(begun) <= 5


@pytest.mark.parametrize("size", [1, 3])
def test_images_in_flight_are_those_of_one_after_another(size: int) -> None:
    backend = open_backend(Source(find_model(None)), "onnx", "cpu")
    assert backend.at_once > 1
    d = backend.description
    request = pipeline.Request(2, 1.0, "ddim", "trailing", d.multiple * 4, d.multiple * 4)
    jobs = [Job(i, f"red heart {i}", i, line=i + 1) for i in range(8)]
    there = list(draw(backend, iter([*jobs[:5], None, *jobs[5:]]), "", request, size))
    assert at_once(backend, request, size) == backend.at_once
    assert (
        at_once(backend, replace(request, width=2048, height=2048), size) == 1
    )  # or there might be no memory for them
    backend.at_once = 1
    here = list(draw(backend, iter([*jobs[:5], None, *jobs[5:]]), "", request, size))
    assert [each.index for each in there] == [*range(8)]
    for one, other in zip(there, here, strict=True):
        assert one.settings == other.settings and np.array_equal(one.pixels, other.pixels)
