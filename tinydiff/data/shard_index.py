"""The index of a shard: offset, size and SHA-256 of every image, its captions and name, built once and kept in a file.

A sample is the members that share a key, which is the path up to the first dot of its last component: an image, a
caption (a file of one of `captions.SIDECARS`, or .cls) and optionally "weight" in a .json. They come in any order, and of
duplicates the first counts; of several kinds that which `RANKS` has first. Only the headers of images are parsed. An index
is valid for one real path, inode, size, mtime and ctime of the shard. It is read with `pread`: memory maps would hold a
descriptor for each shard, and crash if the file shrank.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import struct
import zlib
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import NamedTuple

from tinydiff.config import FILES, NAMES
from tinydiff.data.captions import (
    MAX_CAPTION_FILE,
    SIDECARS,
    caption_text,
    clean_captions,
    json_object,
    label_of,
    texts_of,
    under,
    weight_of,
)
from tinydiff.data.listing import IMAGES, REFUSED
from tinydiff.data.tar import File, Member, members
from tinydiff.data.wording import words_of
from tinydiff.errors import DataError
from tinydiff.files import shown, written
from tinydiff.images import KINDS, MAX_BYTES, size_of

FORMAT = 4
LABELLED = "\0"  # between a sample's captions and its class
MAX_SKIPPED = 1000  # reasons kept, per shard and in all
MAX_TEXT = 256 * 2**20  # bytes of names and captions in one shard
RANKS = {kind[1:]: rank for rank, kind in enumerate((*IMAGES, *SIDECARS, ".cls"))}
ODD, NONE = len(RANKS), len(RANKS) + 1  # the ranks of an image of an unusable name and of what is absent
MAGIC = b"tdshards"
PREFIX = struct.Struct("<8sII")  # MAGIC, CRC-32 of all that follows, size of the JSON header; then header, rows, texts
ROW = struct.Struct("<QIIId16sQIQI")
# An image in the index: `start` is an offset into the shard, `name` and `captions` are offsets into the texts.
Row = namedtuple("Row", "start bytes width height weight digest name name_bytes captions captions_bytes")

Skips = list[tuple[str, str]]  # (shard/member, reason)


class Shard(NamedTuple):
    """An indexed shard: offsets into its index, and what identifies the shard and the index when they are reopened."""

    path: Path
    index_path: Path
    state: tuple[int, ...]  # of the file, as `File` has it
    prefix: bytes
    samples: int
    rows_at: int
    names_at: int
    captions_at: int
    bad: int
    left_out: int
    content: str


def indexed(
    paths: list[Path], folder: Path, progress: Callable[[int, int], None] | None, captions: str = FILES
) -> tuple[list[Shard], Skips]:
    """Every shard, those without a valid index in `folder` indexed now, and the first MAX_SKIPPED of what is left out.

    Calls `progress(shards done, shards in all)`. Raises DataError for a shard that cannot be read.
    """
    shards, skipped, stop = list[Shard](), Skips(), Event()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            for shard, skips in pool.map(partial(_index, folder, captions, stop), paths):
                shards.append(shard)
                skipped += skips[: MAX_SKIPPED - len(skipped)]
                if progress:
                    progress(len(shards), len(paths))
        finally:
            stop.set()  # after an error or Ctrl-C the other threads end early
    return shards, skipped


def reopened(shards: list[Shard], captions: str, number: int, index: bool) -> File:
    """A shard, or its `index`, rebuilt if the cache was cleared. Raises DataError if it changed since the start."""
    shard = shards[number]
    if index and not shard.index_path.exists():
        _build(File(shard.path), shard.index_path, captions, Event())
    file = File(shard.index_path if index else shard.path)
    if (file.read(0, PREFIX.size) != shard.prefix) if index else (file.state != shard.state):
        raise DataError(f"{shown(shard.path)}: has changed since the start; start again")
    return file


def _index(folder: Path, captions: str, stop: Event, path: Path) -> tuple[Shard, Skips]:
    file = File(path)
    place = json.dumps([FORMAT, os.path.realpath(path), captions]).encode()
    index = folder / f"{hashlib.sha256(place).hexdigest()[:32]}.index"
    if not (loaded := _load(file, index)):
        _build(file, index, captions, stop)
        loaded = _load(file, index)
    if not loaded:
        raise DataError(f"{shown(index)}: changed while it was read; start again when nothing else writes the shard")
    return loaded


def _load(file: File, index: Path) -> tuple[Shard, Skips] | None:
    """The shard of an index file, and what it leaves out; None if the file is missing, stale or damaged."""
    try:
        with open(index, "rb") as stored:
            prefix = stored.read(PREFIX.size)
            magic, crc, length = PREFIX.unpack(prefix)
            text = stored.read(min(length, 2**24))
            actual = zlib.crc32(text, zlib.crc32(prefix[12:]))
            while block := stored.read(2**20):
                actual = zlib.crc32(block, actual)
    except (OSError, struct.error):
        return None
    state = file.state
    if magic != MAGIC or actual != crc or (head := json.loads(text))["state"] != list(state):
        return None
    count, rows_at = head["count"], PREFIX.size + length
    names_at = rows_at + count * ROW.size
    offsets = count, rows_at, names_at, names_at + head["names"]
    shard = Shard(file.path, index, state, prefix, *offsets, head["bad"], head["left_out"], head["content"])
    return shard, [(name, reason) for name, reason in head["skipped"]]


def _build(file: File, index: Path, captions: str, stop: Event) -> None:
    """Read a shard and write its index."""
    contents, content = _Contents(file, captions, stop), hashlib.sha256()
    rows, names, texts, count = bytearray(), bytearray(), bytearray(), 0
    for key, sample in contents.samples.items():
        if fault := sample.fault():
            contents.skip(key, fault, bad=sample.image[0] < NONE)
            continue
        assert not isinstance(sample.image[1], str) and isinstance(sample.caption[1], bytes)
        (member, size, digest), caption, count = sample.image[1], sample.caption[1], count + 1
        said = caption + f"{LABELLED}{sample.label}".encode() if sample.label else caption
        name = member.name.encode()
        places = (len(names), len(name), len(texts), len(said))
        rows += ROW.pack(member.start, member.size, *size, sample.weight, digest, *places)
        content.update(json.dumps([member.name, digest.hex(), caption.decode(), sample.weight]).encode())
        names += name
        texts += said
    head = {"state": list(file.state), "count": count, "names": len(names), "content": content.hexdigest()}
    head |= {"bad": contents.bad, "left_out": contents.left_out, "skipped": contents.skipped}
    text = json.dumps(head).encode()
    sections = (text, rows, names, texts)
    crc = zlib.crc32(struct.pack("<I", len(text)))
    for section in sections:
        crc = zlib.crc32(section, crc)
    with written(index, force=True) as temporary, open(temporary, "wb") as stored:
        stored.writelines((PREFIX.pack(MAGIC, crc, len(text)), *sections))


@dataclass(slots=True)
class _Sample:
    """`seen`: a bit per kind of member. `image`, `caption`: (rank, value or why it is unusable) of the best so far."""

    seen: int = 0
    image: tuple[int, tuple[Member, tuple[int, int], bytes] | str] = NONE, "caption without an image"
    caption: tuple[int, bytes | str] = NONE, "no caption"
    weight: float = 1.0
    problem: str = ""
    label: str = ""

    def fault(self) -> str:
        """Why the sample cannot be used, or ""."""
        return next((why for why in (self.image[1], self.problem, self.caption[1]) if why and isinstance(why, str)), "")


class _Contents:
    """A shard's samples, and what is left out, read from front to back; `captions` as `data.captions` has it."""

    def __init__(self, file: File, captions: str, stop: Event) -> None:
        self.named, self.column = captions == NAMES, captions.partition(":")[2].strip()
        self.file, self.text, self.samples = file, 0, dict[str, _Sample]()
        self.bad, self.left_out, self.skipped = 0, 0, Skips()
        for member in members(file):
            if stop.is_set():
                raise DataError(f"{shown(file.path)}: indexing was stopped; start again")
            self._take(member)

    def skip(self, name: str, reason: str, bad: bool = False) -> None:
        """Count what is left out, `bad` if it is an unusable image; the first MAX_SKIPPED are listed."""
        self.bad, self.left_out = self.bad + bad, self.left_out + 1
        if len(self.skipped) < MAX_SKIPPED:
            self.skipped.append((f"{shown(self.file.path.name)}/{shown(name[:200])}", reason))

    def _take(self, member: Member) -> None:
        name = posixpath.normpath(member.name)
        folder, base = posixpath.split(name)
        stem, _, kind = base.partition(".")
        kind, last = kind.lower(), "." + kind.lower().rpartition(".")[2]
        if member.problem:
            self.skip(member.name, member.problem, bad=last in IMAGES)
        elif stem and (kind in RANKS or last in (*IMAGES, *REFUSED)):
            if (key := posixpath.join(folder, stem)) not in self.samples:
                self.samples[key] = _Sample()
                self._count(len(key))
            sample = self.samples[key]
            if kind not in RANKS:
                reason = f"not a {KINDS} image" if last in REFUSED else "its name has a second dot"
                sample.image = sample.image if sample.image[0] < NONE else (ODD, reason)
            elif sample.seen & 1 << RANKS[kind]:
                self.skip(name, "appears twice; the first is used")
            else:
                sample.seen |= 1 << RANKS[kind]
                self._add(member._replace(name=name), sample, kind)

    def _count(self, size: int) -> None:
        self.text += size
        if self.text > MAX_TEXT:
            problem = f"names and captions over {MAX_TEXT >> 20} MiB"
            raise DataError(f"{shown(self.file.path)}: {problem}; split it into several shards")

    def _add(self, member: Member, sample: _Sample, kind: str) -> None:
        rank = RANKS[kind]
        if "." + kind in IMAGES:
            if rank < sample.image[0]:
                sample.image = rank, self._image(member)
            if self.named:
                self._caption(sample, rank, lambda: [words_of(posixpath.basename(member.name).partition(".")[0])])
        elif kind == "json":
            try:
                row = json_object(self._text(member))
                sample.weight, sample.label = weight_of(row), label_of(row) or sample.label
                if texts := [] if self.named else texts_of(under(row, self.column)):
                    self._caption(sample, rank, lambda: texts)
            except ValueError as error:
                sample.problem = str(error)
        else:
            self._beside(member, sample, kind)

    def _beside(self, member: Member, sample: _Sample, kind: str) -> None:
        """A caption file, or a class."""
        if kind == "cls":
            with contextlib.suppress(ValueError):  # which is said of the caption
                sample.label = sample.label or label_of({"label": self._text(member)})
        if not self.named and not self.column:
            self._caption(sample, RANKS[kind], lambda: self._text(member).splitlines())

    def _image(self, member: Member) -> tuple[Member, tuple[int, int], bytes] | str:
        """The member, (width, height) and SHA-256, or why it cannot be used."""
        if member.size > MAX_BYTES:
            return f"over {MAX_BYTES >> 20} MiB"
        data = self.file.read(member.start, member.size)
        try:
            return member, size_of(data), hashlib.sha256(data).digest()[:16]
        except DataError as error:
            return str(error).removeprefix("image: ").split("; ")[0]

    def _caption(self, sample: _Sample, rank: int, texts: Callable[[], list[str]]) -> None:
        if rank < sample.caption[0]:
            try:
                caption = "\n".join(clean_captions(texts())).encode()
                self._count(len(caption))
                sample.caption = rank, caption
            except ValueError as error:
                sample.caption = rank, str(error)

    def _text(self, member: Member) -> str:
        return caption_text(self.file.read(member.start, min(member.size, MAX_CAPTION_FILE + 1)))
