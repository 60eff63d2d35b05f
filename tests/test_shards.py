"""Tar shards: what they hold, against Python's own tarfile; every way of being damaged or hostile; a million entries."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinydiff.config import Data
from tinydiff.data import shard_index, shards
from tinydiff.data.dataset import open_source
from tinydiff.data.folder import FolderSource
from tinydiff.data.shards import ShardSource
from tinydiff.data.tar import MAX_NAME, File, members
from tinydiff.errors import DataError, UserError
from tinydiff.images import KINDS
from tinydiff.user_cache import user_folder

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


END = bytes(1024)


def picture(colour=(200, 30, 30), size=(6, 4), kind="PNG", **more) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, **more)
    return file.getvalue()


def tar(path: Path, files, form="ustar") -> Path:
    """An archive of (name, bytes) or TarInfo entries, by tarfile."""
    with tarfile.open(path, "w", format=FORMATS[form]) as archive:
        for entry in files.items() if isinstance(files, dict) else files:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size, info.mtime = len(entry[1]), 1.5 if form == "pax" else 0  # a fraction makes a PAX header
                archive.addfile(info, io.BytesIO(entry[1]))
    return path


def special(name, kind, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def sample(i, folder=""):
    return {f"{folder}{i:03}.png": picture((i % 256, 0, 0)), f"{folder}{i:03}.txt": b"number %d" % i}


def header(name=b"a.png", size=b"00000000000\0", kind=b"0", magic=b"ustar\x0000", rest=b"") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[257 : 257 + len(magic)] = magic
    block[345 : 345 + len(rest)] = rest
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


@pytest.fixture
def make(tmp_path):
    """A function that opens what is at a path, with the index beside it."""

    def opened(path=tmp_path / "shards", allowed=0.95, **options):
        return ShardSource(path, max_bad_fraction=allowed, index_dir=tmp_path / "index", **options)

    (tmp_path / "shards").mkdir()
    return opened


def everything(source):
    return {source.identity(i): source.captions(i) for i in range(len(source))}


def refusal(make, *args, **options) -> str:
    start = time.monotonic()
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        make(*args, **options)
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()
    assert time.monotonic() - start < 2
    assert "\n" not in str(caught.value) and caught.value.code == 3
    return str(caught.value)


# ---- what a shard holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_samples_in_every_format_of_tar(tmp_path, make, form):
    long = "folder/" * 30 + "x" * 120
    files = {
        **sample(1),
        f"{long}.png": picture(),
        f"{long}.txt": b"far away",
        "näïve.png": picture(),
        "näïve.txt": b"n",
    }
    if form == "ustar":
        files = {
            name.replace("x" * 120, "x" * 60).replace("folder/" * 30, "folder/" * 20): v for name, v in files.items()
        }
    tar(tmp_path / "shards/a.tar", files, form)
    source = make()
    names = [f"a.tar/{name}" for name in files if name.endswith("png")]
    assert [source.identity(i) for i in range(3)] == names and source.skipped == []
    assert source.captions(0) == ["number 1"] and source.image(0).shape == (4, 6, 3)
    assert (source.image(0) == (1, 0, 0)).all()


def test_a_folder_and_its_shards_are_the_same_data(tmp_path, make, image_folder):
    folder = FolderSource(image_folder)
    files = {path.name: path.read_bytes() for path in sorted(image_folder.iterdir())}
    tar(tmp_path / "shards/a.tar", files)
    source = make()
    assert len(source) == len(folder)
    for i in range(len(folder)):
        assert source.identity(i) == "a.tar/" + folder.identity(i) and (source.image(i) == folder.image(i)).all()
        for method in ("captions", "weight", "size", "digest"):
            assert getattr(source, method)(i) == getattr(folder, method)(i)


def test_one_archive_and_all_in_a_folder_by_name(tmp_path, make):
    for number in (2, 0, 1):
        tar(tmp_path / f"shards/s{number}.tar", sample(number) | sample(number + 10))
    (tmp_path / "shards/notes.json").write_text("{}"), (tmp_path / "shards/.hidden.tar").write_text("no")
    source = make()
    assert [source.identity(i) for i in range(6)] == [f"s{n}.tar/{n + k:03}.png" for n in range(3) for k in (0, 10)]
    assert source.skipped == [("notes.json", "not a .tar file")]
    assert "6 images in 3 shards, 1 left out: notes.json" in source.report()
    single = make(tmp_path / "shards/s1.tar")
    assert list(everything(single)) == ["s1.tar/001.png", "s1.tar/011.png"] and "left out" not in single.report()
    for i in (-1, 6):
        with pytest.raises(IndexError):
            source.image(i)


def test_captions_and_weights(tmp_path, make):
    row = {"caption": "from json", "captions": ["second", "from json"], "weight": 2.5, "url": "x"}
    files = [
        ("a.png", picture()), ("a.txt", "cafe\u0301\nsecond\n\nsecond".encode()), ("a.json", json.dumps(row).encode()),
        ("b.json", json.dumps(row).encode()), ("b.jpg", picture(kind="JPEG")),
        ("c.cls", b"7"), ("c.webp", picture(kind="WEBP")),
        ("d.json", b'{"text": "", "weight": 3}'), ("d.caption", b"\xef\xbb\xbfby caption"), ("D.PNG", b"another"),
        ("d.PNG", picture()),
    ]  # fmt: skip
    source = make(tar(tmp_path / "a.tar", files))
    assert [source.captions(i) for i in range(4)] == [
        ["café", "second"],
        ["from json", "second"],
        ["7"],
        ["by caption"],
    ]
    assert [source.weight(i) for i in range(4)] == [2.5, 2.5, 1.0, 3.0]


def test_members_of_a_sample_need_not_be_neighbours(tmp_path, make):
    files = {**{f"{i}.png": picture((i, 0, 0)) for i in range(5)}, **{f"{i}.txt": b"%d" % i for i in range(4, -1, -1)}}
    source = make(tar(tmp_path / "a.tar", files))
    assert [(source.captions(i), int(source.image(i)[0, 0, 0])) for i in range(5)] == [([str(i)], i) for i in range(5)]


def test_of_several_images_the_rule_of_a_folder_decides_in_any_order(tmp_path, make):
    images = [("a.webp", picture(kind="WEBP")), ("a.jpg", picture(kind="JPEG")), ("a.png", picture())]
    for number, files in enumerate((images, images[::-1])):
        source = make(tar(tmp_path / f"{number}.tar", [*files, ("a.txt", b"a")]))
        assert list(everything(source)) == [f"{number}.tar/a.png"]


def test_the_size_is_upright_and_read_from_the_header(tmp_path, make):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {
        f"{k}.{k}": picture(size=(6, 4), kind=K, exif=exif)
        for k, K in [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")]
    }
    cut = {"cut.png": picture(size=(60, 40))[:-30]}
    files = turned | cut | {f"{name.split('.')[0]}.txt": b"x" for name in turned | cut}
    source = make(tar(tmp_path / "a.tar", files))
    assert [source.size(i) for i in range(4)] == [(4, 6)] * 3 + [(60, 40)]
    assert all(source.image(i).shape[1::-1] == source.size(i) for i in range(3))
    with pytest.raises(DataError, match=r"a\.tar/cut\.png: .*; replace or remove"):
        source.image(3)


def test_what_is_unusable_is_named_and_counted(tmp_path, make):
    files = [
        *sample(1).items(), ("bare.png", picture()), ("text.txt", b"alone"), ("empty.png", picture()), ("empty.txt", b" "),
        ("bad.png", b"not an image"), ("bad.txt", b"x"), ("anim.psd", b"8BPS"), ("anim.txt", b"x"), ("v.2.png", picture()),
        ("v.txt", b"x"), ("w.png", picture()), ("w.json", b'{"text": "w", "weight": -1}'), ("j.png", picture()),
        ("j.json", b"[" * 100_000), ("u.png", picture()), ("u.txt", b"caf\xe9"), ("meta", b"x"), ("001.npy", b"x"),
        ("001.mask.png", picture()), ("big.png", picture()), ("big.txt", b"x" * (2**20 + 1)), ("n.png", picture()),
        ("n.json", b'{"text": 5}'), ("esc\x1b[31m.png", picture()),
    ]  # fmt: skip
    source = make(tar(tmp_path / "a.tar", files))
    assert list(everything(source)) == ["a.tar/001.png"]
    assert {name.removeprefix("a.tar/"): reason for name, reason in source.skipped} == {
        "bare": "no caption",
        "text": "caption without an image",
        "empty": "empty caption",
        "bad": f"not a {KINDS} image",
        "anim": f"not a {KINDS} image",
        "v": "its name has a second dot",
        "w": "weight is not a positive number from 1e-09 to 1e+09",
        "j": "not a JSON object",
        "u": "caption is not UTF-8",
        "big": "caption file over 1 MiB",
        "n": "a caption is not text",
        r"'esc\x1b[31m'": "no caption",
    }
    assert "11 of 12 images are unusable" in refusal(make, tmp_path / "a.tar", 0.5)
    assert make(tmp_path / "a.tar", 0.92).skipped == source.skipped  # now from the index


def test_reasons_are_capped_and_counted(tmp_path, make):
    files = {f"{i}.txt": b"x" for i in range(1500)} | sample(1)
    tar(tmp_path / "shards/a.tar", files), tar(tmp_path / "shards/b.tar", files)
    source = make()
    assert len(source.skipped) == 1000 and "3000 left out" in source.report() and "and 2997 more" in source.report()


def test_nothing_of_use(tmp_path, make):
    assert "no .tar file there" in refusal(make)
    assert "no sample can be used; put an image" in refusal(make, tar(tmp_path / "a.tar", {}))
    assert "b.tar/x (caption without an image)" in refusal(make, tar(tmp_path / "b.tar", {"x.txt": b"x"}))


# ---- items of reliability --------------------------------------------------------------------------------------------


def test_nothing_leaves_the_archive(tmp_path, make):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture((9, 9, 9)))
    files = [
        ("../secret.png", picture()), ("../secret.txt", b"x"), (str(secret), picture()), ("a/../../b.png", picture()),
        special("link.png", tarfile.SYMTYPE, str(secret)), ("link.txt", b"x"), special("hard.png", tarfile.LNKTYPE, "001.png"),
        special("dev.png", tarfile.CHRTYPE), special("block", tarfile.BLKTYPE), special("fifo.png", tarfile.FIFOTYPE),
        special("folder.png", tarfile.DIRTYPE), special("contiguous.png", tarfile.CONTTYPE), *sample(1).items(),
        ("001.png", b"the second of its name"), ("./001.txt", b"the second of its name"),
    ]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    source = make(tar(tmp_path / "a.tar", files))
    assert everything(source) == {"a.tar/001.png": ["number 1"]} and (source.image(0) == (1, 0, 0)).all()
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.suffix == ".png"] == []
    reasons = {name.removeprefix("a.tar/"): reason for name, reason in source.skipped}
    outside = "its name leads out of the archive"
    assert reasons == {
        "../secret.png": outside, "../secret.txt": outside, str(secret): outside, "a/../../b.png": outside,
        "link.png": "a link", "hard.png": "a link", "link": "caption without an image", "dev.png": "not a regular file",
        "block": "not a regular file", "fifo.png": "not a regular file", "001.png": "appears twice; the first is used",
        "001.txt": "appears twice; the first is used", "contiguous": f"not a {KINDS} image",
    }  # fmt: skip


HOSTILE = {
    "negative size, base 256": (header(size=b"\xff" * 12), "negative or damaged"),
    "negative size, octal": (header(size=b"-0000001000\0"), "negative or damaged"),
    "no number": (header(size=b"0x1f\0"), "negative or damaged"),
    "huge size": (header(size=b"\x80" + b"\x7f" * 11), "cut short"),
    "backwards in PAX": (header(kind=b"x", size=b"00000000015\0") + padded(b"13 size=-512\n") + header(), "negative"),
    "huge in PAX": (header(kind=b"x", size=b"00000000023\0") + padded(b"19 size=9999999999\n") + header(), "cut short"),
    "PAX bomb": (header(kind=b"x", size=b"\x80" + b"\0" * 7 + b"\x7f\0\0\0"), "over 64 KiB"),
    "long name bomb": (header(kind=b"L", size=b"77777777777\0"), "over 64 KiB"),
    "PAX that never ends": (header(kind=b"x", size=b"00000000010\0") + padded(b"99 a=bc\n"), "damaged PAX"),
    "PAX of nothing": (header(kind=b"x", size=b"00000000010\0") + padded(b"0 a=bcd\n"), "damaged PAX"),
    "PAX of many records": (header(kind=b"x", size=b"00000072460\0") + padded(b"6 a=b\n" * 5000), "damaged PAX"),
    "a chain of headers": (header(kind=b"x") * 100_000, "too many"),
    "sparse, GNU": (header(kind=b"S"), "sparse; make the archive again without --sparse"),
    "sparse, PAX": (header(kind=b"x", size=b"00000000026\0") + padded(b"22 GNU.sparse.major=1\n"), "sparse"),
    "truncated content": (
        header(size=b"00000001000\0") + b"x" * 100,
        "cut short, 512 bytes where the file ends after 100",
    ),
    "truncated header": (header() + header()[:200], "the archive is cut short"),
    "no end mark": (header(), "its end mark is missing; copy or download it again, or, if it is whole, `head -c"),
    "checksum": (header().replace(b"a.png", b"b.png"), "not a tar archive, or damaged"),
    "gzip": (b"\x1f\x8b\x08" + bytes(5000), "compressed; unpack it by `gunzip -c"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(5000), "unzstd"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    "empty": (b"", "not a tar archive, or damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_within_two_seconds(tmp_path, make, name):
    content, expected = HOSTILE[name]
    path = tmp_path / "shards/evil.tar"
    for before in (b"", b"".join(padded(part) for part in (header(size=b"00000000001\0"), b"x"))):
        whole = name in ("no end mark", "truncated content", "truncated header", "a chain of headers", "empty")
        path.write_bytes(before + content + (b"" if whole or len(content) % 512 else END))
        message = refusal(make)
        assert "evil.tar: member at offset " in message
        if not before:
            assert expected in message


def test_bombs_that_are_sparse_on_disk_cost_nothing(tmp_path, make):
    """Archives of a hundred gigabytes, by their size: one image, one caption, one name."""
    for number, block in enumerate(
        (header(size=b"\x80" + (10**11).to_bytes(11, "big")), header(b"a.txt"), header(kind=b"L"))
    ):
        path = tmp_path / f"{number}.tar"
        with open(path, "wb") as file:
            file.write(header(block[:5].rstrip(b"\0"), b"\x80" + (10**11).to_bytes(11, "big"), block[156:157]))
            file.truncate(512 + 10**11 + 2048)
        assert refusal(make, path)


def test_a_member_that_claims_too_many_pixels_is_left_out(tmp_path, make):
    bomb = picture()
    bomb = bomb.replace(bomb[16:24], struct.pack(">II", 2**20, 2**20))
    source = make(tar(tmp_path / "a.tar", [*sample(1).items(), ("bomb.png", bomb), ("bomb.txt", b"x")]))
    assert source.skipped[0][0] == "a.tar/bomb" and len(source) == 1


def test_limits_on_members_and_text(tmp_path, make, monkeypatch):
    path = tar(tmp_path / "a.tar", sample(1) | sample(2))
    monkeypatch.setattr("tinydiff.data.tar.MAX_MEMBERS", 3)
    assert "over 3 members; split it" in refusal(make, path)
    monkeypatch.setattr("tinydiff.data.tar.MAX_MEMBERS", 5)
    monkeypatch.setattr(shard_index, "MAX_TEXT", 20)
    assert "names and captions over" in refusal(make, path)
    monkeypatch.setattr(shard_index, "MAX_TEXT", 2000)
    files = {"x" * (MAX_NAME + 1) + ".png": picture()}
    assert (
        make(tar(tmp_path / "b.tar", sample(1) | files, "gnu"))
        .skipped[0][1]
        .startswith("its name is not UTF-8 of 1 to")
    )


@pytest.mark.parametrize(
    "name",
    [
        "pipe:touch canary",
        "pipe:cat a.tar",
        "http://example.com/a.tar",
        "file:///tmp/a.tar",
        "{a..b}.tar",
        "*.tar",
        "no.tar",
    ],
)
def test_a_path_is_only_a_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder") as caught:
        open_source(replace(Data(), path=name))
    assert ("are not expanded" in str(caught.value)) == (name != "no.tar")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_such_a_name_is_read(tmp_path, make):
    (tmp_path / "{a..b}").mkdir()
    tar(tmp_path / "{a..b}/*.tar", sample(1))
    assert list(everything(make(str(tmp_path / "{a..b}")))) == ["*.tar/001.png"]


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_compressed_archives_are_refused_with_the_command(tmp_path, make, suffix):
    with tarfile.open(tmp_path / f"shards/a.{suffix}", "w:" + {"tgz": "gz"}.get(suffix, suffix[4:])) as archive:
        archive.addfile(tarfile.TarInfo("a"))
    command = {"b": "bunzip2", "x": "unxz"}.get(suffix[4:5], "gunzip")
    for path in (tmp_path / "shards", tmp_path / f"shards/a.{suffix}"):
        assert f"compressed; unpack it by `{command} -c" in refusal(make, path)
        with pytest.raises(DataError, match="compressed"):
            open_source(replace(Data(), path=str(path)))


def test_what_is_no_regular_file_is_not_read(tmp_path, make):
    os.mkfifo(tmp_path / "shards/a.tar")
    assert "not a regular file" in refusal(make)
    (tmp_path / "b.tar").symlink_to("b.tar")
    assert "no such file" in refusal(make, tmp_path / "b.tar")
    assert "no such file" in refusal(make, "x" * 5000 + ".tar") and refusal(make, "a\0b.tar")


def test_which_source_a_path_is_for(tmp_path, monkeypatch, image_folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tar(tmp_path / "a.tar", sample(1))
    heard = []
    for place in (path, tmp_path):
        source = open_source(replace(Data(), path=str(place), background="#000000"), 0, lambda *n: heard.append(n))
        assert isinstance(source, ShardSource) and source.background == "#000000"
    assert heard == [(1, 1), (1, 1)] and len(list((tmp_path / "cache/tinydiff/shards").iterdir())) == 1
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.png", "a.txt", "origin.tar.gz", "origin.tar"):
        (folder / name).write_bytes(picture() if name == "a.png" else b"x")
    assert isinstance(open_source(replace(Data(), path=str(folder))), FolderSource)
    with pytest.raises(DataError, match="does not exist; give a folder"):
        open_source(replace(Data(), path=str(tmp_path / "nowhere")))


# ---- against tarfile ---------------------------------------------------------------------------------------------------

NAMES = st.from_regex(r"(\./)?([a-zé]{1,90}/){0,3}[a-z]{1,3}\.(png|txt|json|x)", fullmatch=True)


@given(st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=8), st.sampled_from(list(FORMATS)))
@settings(max_examples=100, deadline=None)
def test_members_are_those_of_tarfile(tmp_path_factory, files, form):
    path = tmp_path_factory.mktemp("t") / "a.tar"
    try:
        tar(path, files, form)
    except ValueError:  # ustar has no room for the name
        return
    found = [(m.name, File(path).read(m.start, m.size)) for m in members(File(path))]
    with tarfile.open(path, "r:") as archive:
        wanted = [(info.name, archive.extractfile(info).read()) for info in archive]
    assert found == wanted and all(not m.problem for m in members(File(path)))


def test_members_that_tarfile_does_not_write(tmp_path):
    """GNU's times in the place of a prefix, a FIFO with a size, a global PAX header, a size in base 256, a plain V7 header."""
    one = b"\x80" + (1).to_bytes(11, "big")
    parts = [header(b"times.png", one, magic=b"ustar  \0", rest=b"14123456701"), b"1", header(b"fifo.png", one, b"6")]
    parts += [
        header(kind=b"g", size=b"00000000013\0"),
        b"11 path=xy\n",
        header(b"v7.png", b"         1 \0", b"\0", b""),
        b"2",
    ]
    (tmp_path / "a.tar").write_bytes(b"".join(map(padded, parts)) + END)
    found = [(member.name, member.start) for member in members(File(tmp_path / "a.tar"))]
    assert found == [("times.png", 512), ("fifo.png", 1536), ("v7.png", 3072)]


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    path = tmp_path_factory.mktemp("valid")
    return {
        form: tar(path / form, sample(1) | sample(2, "long/" * 30 if form != "ustar" else ""), form).read_bytes()
        for form in FORMATS
    }


EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)


@given(st.sampled_from(list(FORMATS)), EDITS, st.booleans(), st.none() | st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_mutations_of_a_valid_archive_never_hang_and_raise_only_data_errors(
    tmp_path_factory, valid, form, edits, mend, cut
):
    data = bytearray(valid[form])
    for where, what in edits:
        at = int(where * (len(data) - 12))
        data[at : at + len(what)] = what
        block = at // 512 * 512
        if mend and at % 512 < 148:  # a checksum that fits lets the mutation through to what lies behind it
            data[block + 148 : block + 156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
    folder = tmp_path_factory.mktemp("m")
    (folder / "a.tar").write_bytes(data[: int(cut * len(data))] if cut is not None else data)
    start = time.monotonic()
    try:
        source = ShardSource(folder, max_bad_fraction=1.0, index_dir=folder / "index")
    except DataError:
        source = None
    assert time.monotonic() - start < 2
    for i in range(len(source) if source else 0):
        assert source.captions(i) and len(source.digest(i)) == 32 and source.weight(i) > 0 and source.identity(i)
        with suppress(DataError):
            assert source.image(i).shape[1::-1] == source.size(i)


# ---- the index -------------------------------------------------------------------------------------------------------


def index_files(tmp_path):
    return sorted((tmp_path / "index").iterdir())


def test_an_index_is_built_once(tmp_path, make, monkeypatch):
    tar(tmp_path / "shards/a.tar", sample(1))
    first, stamp = make(), index_files(tmp_path)[0].stat().st_mtime_ns
    monkeypatch.setattr(shard_index, "_build", None)
    again = make()
    assert index_files(tmp_path)[0].stat().st_mtime_ns == stamp and everything(again) == everything(first)
    assert again.fingerprint() == first.fingerprint()


def test_a_stale_index_is_not_read(tmp_path, make):
    path = tar(tmp_path / "shards/a.tar", sample(1))
    old = make()
    status = path.stat()
    tar(path, sample(2))
    assert path.stat().st_size == status.st_size
    new = make()
    assert new.captions(0) == ["number 2"] and len(index_files(tmp_path)) == 1
    with pytest.raises(DataError, match="changed since the start"):
        old.captions(0)
    with pytest.raises(DataError, match="changed since the start"):
        old.image(0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert make().fingerprint() == new.fingerprint()


def test_a_shard_that_is_replaced_by_one_of_equal_size_and_time_is_read_anew(tmp_path, make):
    path = tar(tmp_path / "shards/a.tar", sample(1))
    old, status = make(), path.stat()
    for number, moved in ((2, False), (1, True)):  # written into the file, or put in its place
        was, other = (old.captions(0), old.digest(0)), tar(tmp_path / "other.tar", sample(number))
        if moved:
            other.replace(path)
        else:
            path.write_bytes(other.read_bytes())
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
        new = make()
        assert new.captions(0) != was[0] and new.digest(0) != was[1]
        with pytest.raises(DataError, match="changed since the start"):
            old.image(0)
        old = new


def test_an_image_that_is_not_the_indexed_one_is_noticed(tmp_path, make):
    """Even where the file says of itself what it said: each image is compared with its hash when it is read."""
    path = tar(tmp_path / "shards/a.tar", sample(1))
    old = make()
    file = old._file(0, False)  # held open since
    with open(path, "r+b") as shard:
        start = path.read_bytes().index(b"IDAT") + 6
        shard.seek(start)
        shard.write(b"\xff\xff")
    assert file.read(start, 2) == b"\xff\xff"
    with pytest.raises(DataError, match="has changed since it was indexed; start again"):
        old.image(0)
    assert not index_files(tmp_path)
    assert make().digest(0) != old._row(0)[1].digest.hex()


@pytest.mark.parametrize("kind", ["jfif", "JPE", "pjpeg"])
@pytest.mark.parametrize(
    ("told", "text"), [("cap", b"a"), ("tags", b"a"), ("json", b'{"prompt": "a"}'), ("text", b"a")]
)
def test_shards_read_what_folders_do(tmp_path, make, kind, told, text):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG")
    tar(tmp_path / "shards/a.tar", {f"0.{kind}": file.getvalue(), f"0.{told}": text})
    assert everything(make(allowed=0)) == {f"a.tar/0.{kind}": ["a"]}


def test_a_damaged_index_is_built_again(tmp_path, make):
    tar(tmp_path / "shards/a.tar", sample(1) | sample(2))
    wanted = everything(make())
    (path,) = index_files(tmp_path)
    whole = path.read_bytes()
    for i in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[i] ^= 0x10
        path.write_bytes(damaged)
        assert everything(make()) == wanted and path.read_bytes() == whole
    for length in (0, 3, 15, 16, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert everything(make()) == wanted
    path.write_bytes(whole + b"x")
    assert everything(make()) == wanted


def test_a_cache_that_is_cleared_meanwhile_is_made_again(tmp_path, make):
    tar(tmp_path / "shards/a.tar", sample(1))
    source = make()
    index_files(tmp_path)[0].unlink()
    assert everything(source) == {"a.tar/001.png": ["number 1"]}


def test_an_index_that_cannot_be_written_names_the_place(tmp_path):
    (tmp_path / "index").write_text("a file")
    with pytest.raises(UserError, match="index"):
        ShardSource(tar(tmp_path / "a.tar", sample(1)), index_dir=tmp_path / "index")


def test_where_the_index_is_kept(tmp_path, monkeypatch):
    home, cache, temporary = tmp_path / "home", tmp_path / "cache", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("HOME", str(home)), monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert user_folder("shards") == cache / "tinydiff/shards"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_folder("shards") == home / ".cache/tinydiff/shards"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert user_folder("shards") == temporary / f"tinydiff-{os.getuid()}/shards"
    monkeypatch.delenv("HOME"), monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_folder("shards") == temporary / f"tinydiff-{os.getuid()}/shards"


def test_the_fingerprint_follows_content_and_not_place_or_time(tmp_path, make):
    def there(name, *files, shard="a.tar", **options):
        (tmp_path / name).mkdir()
        return make(
            tar(tmp_path / name / shard, [pair for part in files for pair in part.items()]), **options
        ).fingerprint()

    plain = there("1", sample(1), sample(2))
    os.utime(tmp_path / "1/a.tar", (1, 1))
    assert make(tmp_path / "1").fingerprint() == there("2", sample(1), sample(2)) == plain
    others = [
        there("3", sample(1)),
        there("4", sample(2), sample(1)),
        there("5", sample(1), sample(2) | {"002.txt": b"another"}),
        there("6", sample(1), sample(2) | {"002.json": b'{"weight": 2}'}),
        there("7", sample(1), sample(2), background="#000000"),
        there("8", sample(1), sample(2), shard="b.tar"),
        there("9", sample(1), {"002.png": picture((3, 3, 3)), "002.txt": b"number 2"}),
    ]
    assert len({plain, *others}) == 8


def test_many_shards_need_few_descriptors_and_many_threads_agree(tmp_path, make, monkeypatch):
    tar(tmp_path / "one.tar", sample(7) | sample(9))
    for i in range(100):
        os.link(tmp_path / "one.tar", tmp_path / f"shards/{i:03}.tar")
    monkeypatch.setattr(shards, "MAX_OPEN", 4)
    before = len(os.listdir("/proc/self/fd"))
    source = make()
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(200), 3)).tolist()
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(source.captions, order)), [int(image[0, 0, 0]) for image in pool.map(source.image, order)]
    assert seen == ([[f"number {7 + 2 * (i % 2)}"] for i in order], [7 + 2 * (i % 2) for i in order])
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    del source
    assert len(os.listdir("/proc/self/fd")) == before


def test_processes_may_index_at_the_same_time(tmp_path):
    for i in range(3):
        tar(tmp_path / f"{i}.tar", {k: v for j in range(40) for k, v in sample(j).items()})
    code = "import pathlib, sys; from tinydiff.data.shards import ShardSource; "
    code += "print(ShardSource(sys.argv[1], index_dir=pathlib.Path(sys.argv[2])).fingerprint())"
    command = [sys.executable, "-c", code, tmp_path, tmp_path / "i"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    found = {run.communicate(timeout=60)[0] for run in runs}
    assert len(found) == 1 and len(found.pop()) == 65 and all(run.returncode == 0 for run in runs)
    assert len(list((tmp_path / "i").iterdir())) == 3


def test_one_bad_shard_stops_the_others(tmp_path, make, monkeypatch):
    tar(tmp_path / "shards/b.tar", {name: data for i in range(50) for name, data in sample(i).items()})
    (tmp_path / "shards/a.tar").write_bytes(b"x" * 1024)
    take = shard_index._Contents._take
    monkeypatch.setattr(shard_index._Contents, "_take", lambda self, member: (time.sleep(0.05), take(self, member)))
    assert "a.tar: member at offset 0" in refusal(make)  # in two seconds, where b.tar alone takes five


# ---- size ------------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys, time
from pathlib import Path
from tinydiff.data.shards import ShardSource

def memory():
    return int(re.search("VmHWM: *\\t*(\\d+)", Path("/proc/self/status").read_text().replace(" ", ""))[1])

before, times, start = memory(), [], time.perf_counter()
source = ShardSource(sys.argv[1], index_dir=Path(sys.argv[2]))
tasks = [
    lambda: None,
    source.fingerprint,
    lambda: [source.weight(i) for i in range(len(source))][:0],
    lambda: [source.image(i * 7919 % len(source)) for i in range(300)],
]
for task in tasks:
    task()
    times.append(time.perf_counter() - start)
    if len(times) == 2:
        grown = memory() - before
    start = time.perf_counter()
print(len(source), grown, *times)
"""


def measured(folder: Path, samples: int, count: int):
    """(images, MiB, seconds to open, for a fingerprint, for all weights, for 300 images), first and second time."""
    folder.mkdir()
    one = picture()
    files = ((f"{i:06}.{kind}", data) for i in range(samples) for kind, data in (("png", one), ("txt", b"a caption")))
    tar(folder / "s0000.tar", dict(files))
    for i in range(1, count):
        os.link(folder / "s0000.tar", folder / f"s{i:04}.tar")
    for run in ("indexing", "indexed"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, folder, folder.parent / "i"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        images, memory, *times = map(float, done.stdout.split())
        print(f"{run}: {images:.0f} images, {memory / 1024:.1f} MiB more, open {times[0]:.2f} s, fingerprint {times[1]:.4f} s,"
              f" weights {times[2]:.2f} s, 300 images {times[3]:.2f} s")  # fmt: skip
        yield int(images), memory / 1024, times


def test_twenty_thousand_entries_start_at_once(tmp_path):
    (images, first, times), (_, memory, again) = measured(tmp_path / "s", 2000, 10)
    assert images == 20_000 and first < 60 and times[0] < 20
    assert memory < 15 and again[0] < 1 and again[1] < 0.01


@pytest.mark.slow
def test_a_million_entries_start_in_seconds(tmp_path):
    (images, first, _), (_, memory, again) = measured(tmp_path / "s", 10_000, 100)
    assert images == 1_000_000 and first < 150
    assert memory < 40 and again[0] < 5 and again[1] < 0.05


def test_digests_are_of_the_bytes(tmp_path, make):
    source = make(tar(tmp_path / "a.tar", sample(1)))
    assert hashlib.sha256(sample(1)["001.png"]).hexdigest().startswith(source.digest(0))
