"""The index of one shard: place, size and SHA-256 of every image, captions and names, found once and kept in a file.

A sample is the members that share a key, the name up to the first dot of its last part: an image, a caption (.txt,
.caption, .cls, or "text", "caption" and "captions" of a .json) and perhaps a "weight" in the .json. Their order is free; of
equal members the first counts; png goes before jpg, jpeg and webp, txt before caption, json and cls. Of images only the
headers are looked at. An index is known by the shard's real path, size and mtime, and read with `pread`: a memory map
would hold a descriptor for each shard and crash where the file shrank. This module knows no training.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import NamedTuple

from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401  (else Pillow loads all plugins)

from tinydiff.data.folder import IMAGES, MAX_CAPTION_FILE, REFUSED, clean_captions, clean_weight
from tinydiff.data.tar import File, Member, members
from tinydiff.errors import DataError
from tinydiff.files import shown, written
from tinydiff.images import FORMATS, MAX_BYTES, MAX_PIXELS, ORIENTATION, open_image

FORMAT = 1
MAX_SKIPPED = 1000  # reasons kept, for each shard and in all
MAX_TEXT = 256 * 2**20  # bytes of names and captions of one shard
RANKS = {"png": 0, "jpg": 1, "jpeg": 2, "webp": 3, "txt": 4, "caption": 5, "json": 6, "cls": 7}
ODD = len(RANKS)  # the rank of an image that is of no use
MAGIC = b"tdshards"
PREFIX = struct.Struct("<8sII")  # MAGIC, CRC-32 of all that follows it, bytes of the JSON header; rows and texts follow
ROW = struct.Struct("<QIIId16sQIQI")

Skips = list[tuple[str, str]]  # (shard/member, reason)


class Row(NamedTuple):
    """An image in the index. `captions` and `name` are offsets into the texts, `start` one into the shard."""

    start: int
    bytes: int
    width: int
    height: int
    weight: float
    digest: bytes
    name: int
    name_bytes: int
    captions: int
    captions_bytes: int


class Shard(NamedTuple):
    """What is kept of a shard: where things are, and the marks by which shard and index are known again."""

    path: Path
    index_path: Path
    state: tuple[int, int]  # size, mtime
    prefix: bytes
    samples: int
    rows_at: int
    names_at: int
    captions_at: int
    bad: int
    left_out: int
    content: str


def indexed(paths: list[Path], folder: Path, progress: Callable[[int, int], None] | None) -> tuple[list[Shard], Skips]:
    """Every shard, indexed in `folder` where it is not yet, and the first of what they leave out.

    `progress` hears of shards done and shards in all. Raises DataError for a shard that cannot be read.
    """
    shards, skipped, stop = list[Shard](), Skips(), Event()
    with warnings.catch_warnings(), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # Pillow warns of what is checked here
        try:
            for shard, some in pool.map(partial(_index, folder, stop), paths):
                shards.append(shard)
                skipped += some[: MAX_SKIPPED - len(skipped)]
                if progress:
                    progress(len(shards), len(paths))
        finally:
            stop.set()  # after an error or Ctrl-C nobody waits for the others
    return shards, skipped


def reopened(shards: list[Shard], number: int, index: bool) -> File:
    """A shard, or its index, made again if somebody has cleared the cache. Raises DataError if it is another one by now."""
    shard = shards[number]
    if index and not shard.index_path.exists():
        _build(File(shard.path), shard.index_path, Event())
    file = File(shard.index_path if index else shard.path)
    if (file.read(0, PREFIX.size) != shard.prefix) if index else ((file.size, file.mtime) != shard.state):
        raise DataError(f"{shown(shard.path)}: has changed since the start; start again")
    return file


def cache_folder() -> Path:
    """Where indexes are kept: under the user's cache, or the temporary folder where there is none to write in."""
    home, cache = os.environ.get("HOME"), os.environ.get("XDG_CACHE_HOME", "")
    bases = ([Path(cache)] if os.path.isabs(cache) else []) + ([Path(home, ".cache")] if home else [])
    for folder in [base / "tinydiff" / "shards" for base in bases]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir(), f"tinydiff-{os.getuid()}")
    taken = os.path.lexists(folder) and folder.lstat().st_uid != os.getuid()
    return Path(tempfile.mkdtemp(prefix="tinydiff-")) if taken else folder / "shards"


# ---- the file ------------------------------------------------------------------------------------------------------


def _index(folder: Path, stop: Event, path: Path) -> tuple[Shard, Skips]:
    file = File(path)
    place = json.dumps([FORMAT, os.path.realpath(path)]).encode()
    index = folder / f"{hashlib.sha256(place).hexdigest()[:32]}.index"
    found = _load(file, index)
    if not found:
        _build(file, index, stop)
        found = _load(file, index)
    if not found:
        raise DataError(f"{shown(index)}: changed while it was read; start again when nothing else writes the shard")
    return found


def _load(file: File, index: Path) -> tuple[Shard, Skips] | None:
    """What an index says; None if it is missing, stale or damaged."""
    try:
        with open(index, "rb") as stored:
            prefix = stored.read(PREFIX.size)
            magic, crc, length = PREFIX.unpack(prefix)
            text = stored.read(min(length, 2**24))
            found = zlib.crc32(text, zlib.crc32(prefix[12:]))
            while block := stored.read(2**20):
                found = zlib.crc32(block, found)
    except (OSError, struct.error):
        return None
    if magic != MAGIC or found != crc:
        return None
    about = json.loads(text)
    state, count, rows_at = (file.size, file.mtime), about["count"], PREFIX.size + length
    if about["state"] != list(state):
        return None
    names_at = rows_at + count * ROW.size
    places = count, rows_at, names_at, names_at + about["names"]
    shard = Shard(file.path, index, state, prefix, *places, about["bad"], about["left_out"], about["content"])
    return shard, [(name, reason) for name, reason in about["skipped"]]


def _build(file: File, index: Path, stop: Event) -> None:
    """Reads a shard and writes its index."""
    contents, content = _Contents(file, stop), hashlib.sha256()
    rows, names, captions, count = bytearray(), bytearray(), bytearray(), 0
    for key, sample in contents.samples.items():
        if fault := sample.fault():
            contents.skip(key, fault, bad=sample.image is not None)
            continue
        assert sample.image and not isinstance(sample.image[1], str)
        assert sample.caption and isinstance(sample.caption[1], bytes)
        (member, size, digest), caption, count = sample.image[1], sample.caption[1], count + 1
        name = member.name.encode()
        where = (len(names), len(name), len(captions), len(caption))
        rows += ROW.pack(member.start, member.size, *size, sample.weight, digest, *where)
        content.update(json.dumps([member.name, digest.hex(), caption.decode(), sample.weight]).encode())
        names += name
        captions += caption
    about = {"state": [file.size, file.mtime], "count": count, "names": len(names), "content": content.hexdigest()}
    about |= {"bad": contents.bad, "left_out": contents.left_out, "skipped": contents.skipped}
    text = json.dumps(about).encode()
    parts = (text, rows, names, captions)
    crc = zlib.crc32(struct.pack("<I", len(text)))
    for part in parts:
        crc = zlib.crc32(part, crc)
    with written(index, force=True) as temporary, open(temporary, "wb") as stored:
        stored.writelines((PREFIX.pack(MAGIC, crc, len(text)), *parts))


# ---- one shard's samples ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sample:
    """`seen`: a bit for each kind of member. `image`, `caption`: the best so far as (rank, what it is or why it is bad)."""

    seen: int = 0
    image: tuple[int, tuple[Member, tuple[int, int], bytes] | str] | None = None
    caption: tuple[int, bytes | str] | None = None
    weight: float = 1.0
    problem: str = ""

    def fault(self) -> str:
        """Why the sample cannot be used, or ""."""
        image, caption = self.image and self.image[1], self.caption and self.caption[1]
        found = (image or "caption without an image", self.problem, caption or "no caption")
        return next((what for what in found if isinstance(what, str) and what), "")


class _Contents:
    """What a shard holds, read from front to back."""

    def __init__(self, file: File, stop: Event) -> None:
        self.file, self.text, self.samples = file, 0, dict[str, _Sample]()
        self.bad, self.left_out, self.skipped = 0, 0, Skips()
        for member in members(file):
            if stop.is_set():
                raise DataError(f"{shown(file.path)}: indexing was stopped; start again")
            self._take(member)

    def skip(self, name: str, reason: str, bad: bool = False) -> None:
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
            sample = self._sample(posixpath.join(folder, stem))
            if kind not in RANKS:
                reason = "not a PNG, JPEG or WEBP image" if last in REFUSED else "its name has a second dot"
                sample.image = sample.image or (ODD, reason)
            elif sample.seen & 1 << RANKS[kind]:
                self.skip(name, "appears twice; the first is used")
            else:
                sample.seen |= 1 << RANKS[kind]
                self._add(member._replace(name=name), sample, kind)

    def _sample(self, key: str) -> _Sample:
        if key not in self.samples:
            self.samples[key] = _Sample()
            self._count(len(key))
        return self.samples[key]

    def _count(self, size: int) -> None:
        self.text += size
        if self.text > MAX_TEXT:
            what = f"names and captions over {MAX_TEXT >> 20} MiB"
            raise DataError(f"{shown(self.file.path)}: {what}; split it into several shards")

    def _add(self, member: Member, sample: _Sample, kind: str) -> None:
        rank = RANKS[kind]
        if "." + kind in IMAGES:
            if not sample.image or rank < sample.image[0]:
                sample.image = rank, self._image(member)
        elif kind == "json":
            try:
                texts, sample.weight = _parse(self._text(member))
                if texts:
                    self._caption(sample, rank, lambda: texts)
            except ValueError as error:
                sample.problem = str(error)
        else:
            self._caption(sample, rank, lambda: self._text(member).splitlines())

    def _image(self, member: Member) -> tuple[Member, tuple[int, int], bytes] | str:
        """The member, (width, height) and SHA-256, or why it cannot be used."""
        if member.size > MAX_BYTES:
            return f"over {MAX_BYTES >> 20} MiB"
        data = self.file.read(member.start, member.size)
        try:
            return member, _size(data), hashlib.sha256(data).digest()[:16]
        except DataError as error:
            return str(error).removeprefix("image: ").split("; ")[0]

    def _caption(self, sample: _Sample, rank: int, texts: Callable[[], list[str]]) -> None:
        if sample.caption and sample.caption[0] < rank:
            return
        try:
            caption = "\n".join(clean_captions(texts())).encode()
            self._count(len(caption))
            sample.caption = rank, caption
        except ValueError as error:
            sample.caption = rank, str(error)

    def _text(self, member: Member) -> str:
        """A small member as text. Raises ValueError."""
        if member.size > MAX_CAPTION_FILE:
            raise ValueError("caption file over 1 MiB")
        try:
            return self.file.read(member.start, member.size).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("caption is not UTF-8") from None


def _parse(text: str) -> tuple[list[str] | None, float]:
    """Captions, if there are any, and weight of a sample's .json. Raises ValueError."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    found = [row[key] for key in ("text", "caption", "captions") if row.get(key) is not None]
    texts = [text for value in found for text in (value if isinstance(value, list) else [value])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a caption is not text")
    return texts or None, clean_weight(row.get("weight", 1.0))


def _size(data: bytes) -> tuple[int, int]:
    """(width, height), upright, by the header; what is odd is decoded instead. Raises DataError."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        (width, height), where = image.size, {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}
        looked = image.format != "PNG" or where & image.info.keys()  # else Pillow decodes a PNG in search of more
        turned = looked and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        if width * height <= MAX_PIXELS:
            return (height, width) if turned else (width, height)
    except MemoryError:
        raise
    except Exception:  # Pillow's plugins raise many kinds; open_image says what it is
        pass
    height, width = open_image(data).shape[:2]
    return width, height
