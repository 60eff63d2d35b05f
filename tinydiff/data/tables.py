"""Tables of captions: JSON lines, JSON in its usual forms, and values separated by commas, semicolons, tabs or bars.

A row is a dict with a file and a caption under any of the keys of `captions`. Files are found by the names that tables
of other tools give them: with backslashes, without suffix or folder, from a folder above.
"""

from __future__ import annotations

import csv
import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from tinydiff.data.captions import CAPTION_KEYS, FILE_KEYS, OTHERS, encoding, json_object, texts_of, tidy, under
from tinydiff.data.listing import IMAGES, kind, stem
from tinydiff.errors import DataError
from tinydiff.system import shown, unreadable

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
MAX_LINE = 2**20
MAX_JSON = 256 * 2**20
SEPARATORS = ",;\t|"
OTHER_KEYS = (
    "input_image",
    "original_image",
    "source_image",
    "image",
)  # of another image; the last beside file_name alone
CONTROL_KEYS = ("conditioning_image", "conditioning_image_file_name", "control_image")  # as diffusers' and datasets'
NUMBERED = re.compile(r"(?<=.)#\d$")  # after a file's name, for several captions of it, as Flickr has them
LOOKED_AT = 100  # rows, to see whether a table is one of captions

Row = dict[str, Any] | str  # or what is wrong with it
Rows = Iterator[tuple[int, Row]]  # with the number of the line, or of the row


class Names:
    """The files of a folder, found by what a table calls them. `column`: the one of a table that has its captions, if chosen."""

    def __init__(self, root: Path, names: Sequence[str], column: str = "") -> None:
        self.all, self.root, self.like, self.column = set(names), root.resolve().name, dict[str, list[str]](), column
        for name in names:
            if kind(name) in IMAGES:
                for key in {base := posixpath.basename(_lenient(name)), stem(base)}:
                    self.like.setdefault(key, []).append(name)

    def find(self, name: str, folder: str = "") -> str | None:
        """The file that `name` means in a table that lies in `folder`; None if there is none, or more than one."""
        plain = slashed(name)
        inside = f"/{plain}".partition(f"/{self.root}/")[2]
        places = (posixpath.join(folder, plain), posixpath.normpath(name), plain, inside)
        if exact := next((place for place in places if place in self.all), None):
            return exact
        wanted = _lenient(inside or plain)
        near = self.like.get(posixpath.basename(wanted), [])
        same = [n for n in near if wanted in (_lenient(n), stem(_lenient(n)))]
        below = [
            n
            for n in near
            if f"/{_lenient(n)}".endswith(f"/{wanted}") or stem(f"/{_lenient(n)}").endswith(f"/{wanted}")
        ]
        chosen = same or below or near  # `near`: a table of another place, whose folders are not here
        if not chosen and (file := NUMBERED.sub("", name)) != name:
            return self.find(file, folder)
        return chosen[0] if len(chosen) == 1 else None


def slashed(name: str) -> str:
    """A name in a table as a path with forward slashes."""
    return posixpath.normpath(name.replace("\\", "/"))


def _lenient(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def file_of(row: dict[str, Any], keys: Sequence[str] = FILE_KEYS) -> str | None:
    """What a row calls its file, or another one of these keys; it may be the path in an object."""
    row = tidy(row)
    values = (row[key] for key in keys if key in row)
    return next(
        (v for value in values if (v := file_of(value) if isinstance(value, dict) else value) and isinstance(v, str)),
        None,
    )


def names_images(path: Path, names: Names, folder: str) -> bool:
    """Whether a table has a caption for an image of the folder, in its first rows."""
    for _, row in islice(rows(path, names, folder), LOOKED_AT):
        try:
            file = file_of(row) if isinstance(row, dict) else None
            if file and names.find(file, folder) and isinstance(row, dict) and texts_of(row):
                return True
        except ValueError:
            continue
    return False


def rows(path: Path, names: Names, folder: str = "") -> Rows:
    """A table's rows. Bytes that are not UTF-8 become surrogates, refused later. Raises DataError for no table."""
    for number, row in _rows(path, names, folder):
        try:
            yield number, row if isinstance(row, str) else under(row, names.column)
        except ValueError as error:
            yield number, str(error)


def _rows(path: Path, names: Names, folder: str) -> Rows:
    try:
        with open(path, "rb") as head:
            coding = encoding(head.read(2))
        errors = "strict" if coding == "utf-16" else "surrogateescape"
        with open(path, encoding=coding, errors=errors, newline="") as file:
            form = kind(path.name)
            if form == ".json":
                yield from _json_table(path, file)
            elif form in (".jsonl", ".ndjson"):
                yield from _json_rows(_lines(file))
            else:
                yield from _separated(path, _lines(file), names, folder)
    except OSError as error:
        raise unreadable(error, path, DataError) from None
    except UnicodeError:
        raise DataError(f"{shown(path)}: neither UTF-8 nor whole UTF-16; save it as UTF-8") from None


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; of a line longer than MAX_LINE, its first MAX_LINE + 1 characters."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith("\n"):
            rest = file.readline(MAX_LINE + 1)
        yield line


def _json_rows(lines: Iterable[str]) -> Rows:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_LINE:
                raise ValueError
            yield number, json_object(line)
        except ValueError:
            yield number, "not a JSON object, or over 1 MiB"


def _json_table(path: Path, file: TextIO) -> Rows:
    if path.stat().st_size > MAX_JSON:
        raise DataError(f"{shown(path)}: over {MAX_JSON >> 20} MiB; write it as metadata.jsonl, one object a line")
    text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        yield from _json_rows(text.splitlines())  # some tools give JSON lines this suffix
        return
    yield from enumerate(_forms(value), 1)


def _forms(value: Any) -> Iterator[Row]:
    """The rows of a JSON value: a list of objects or pairs, COCO's two lists, an object of lists, or {file: caption}."""
    if isinstance(value, list):
        for row in value:
            if isinstance(row, list) and len(row) == 2:
                row = {"file_name": row[0], "text": row[1]}
            yield row if isinstance(row, dict) else "not a JSON object"
    elif isinstance(value, dict):
        images, notes = value.get("images"), value.get("annotations")
        lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        if isinstance(images, list) and isinstance(notes, list):
            files = {str(image.get("id")): file_of(image) for image in images if isinstance(image, dict)}
            for note in notes:
                if isinstance(note, dict):
                    yield note | {"file_name": files.get(str(note.get("image_id")))}
        elif lists:
            yield from _forms(lists[0])
        else:
            for file, row in value.items():
                yield {**(row if isinstance(row, dict) else {"text": row}), "file_name": file}


def _separated(path: Path, lines: Iterator[str], names: Names, folder: str) -> Rows:
    """Rows under a header, or pairs of file and caption without one."""
    first = next((line for line in lines if line.strip()), "")
    try:
        columns, separator = _header(path, first, names, folder)
        headed = columns != ["file_name", "text"] or "file_name" in first
        again = lines if headed else chain([first], lines)
        table = csv.reader(again, delimiter=separator, strict=True, skipinitialspace=True)
        for fields in table:
            while len(fields) > len(columns) and not fields[-1].strip():
                fields.pop()
            number = table.line_num + headed
            if len(fields) > len(columns):
                yield (
                    number,
                    f"{len(fields)} fields for {len(columns)} columns: quote a caption that has a {separator!r}",
                )
            elif fields:
                yield number, {k: v for k, v in zip(columns, fields, strict=False) if v or k in CAPTION_KEYS + OTHERS}
    except csv.Error as error:
        raise DataError(f"{shown(path)}: {error}; quote it as CSV") from None


def _header(path: Path, first: str, names: Names, folder: str) -> tuple[list[str], str]:
    """The columns of a table and what separates them, by its first line."""
    split = {s: next(csv.reader([first.rstrip("\r\n")], delimiter=s, skipinitialspace=True), []) for s in SEPARATORS}
    for separator, fields in split.items():
        columns = list(tidy(dict.fromkeys(fields)))
        if len(columns) == len(fields) and set(columns) & set(FILE_KEYS) and len(columns) > 1:
            if names.column and not {*tidy({names.column: None})} & set(columns):
                problem = f"no column {shown(names.column)}; there are {', '.join(map(shown, columns[:20]))}"
                raise DataError(f"{shown(path)}: {problem}: set data.captions to one of these")
            if not names.column and not set(columns) & {*CAPTION_KEYS, *OTHERS}:
                like = [c for c in columns if c.startswith(("text", "caption", "prompt"))]
                hint = (
                    f"rename the one to use of {', '.join(like[:4])}"
                    if like
                    else "its first line must be file_name,text"
                )
                raise DataError(f"{shown(path)}: no column text; {hint}")
            return columns, separator
    for separator, fields in split.items():
        if len(fields) > 1 and names.find(fields[0], folder):
            return ["file_name", "text"], separator
    raise DataError(f"{shown(path)}: no column file_name; its first line must be file_name,text")
