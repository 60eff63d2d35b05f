"""Captions and weights from what says them: a text file, the object of a JSON file or a row of a table.

One table of keys for folders and shards alike. It knows neither files nor images.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from tinydiff.data.listing import SURROGATE
from tinydiff.system import shown

SIDECARS = (".txt", ".caption", ".cap", ".text", ".prompt", ".json", ".tags")  # beside an image, the preferred first
FILE_KEYS = (
    *("file_name", "filename", "file", "image", "path", "image_path", "file_path", "filepath", "image_file"),
    *("image_name", "img", "img_path", "target"),
)
CAPTION_KEYS = ("text", "caption", "captions")  # all of these are captions; without any, the first of the others
OTHERS = (
    *("texts", "prompt", "prompts", "description", "descriptions", "label", "labels", "tags", "title"),
    *("sentence", "sentences"),
)
MAX_CAPTION_FILE = 2**20
MAX_CAPTION = 4096
LIGHTEST, HEAVIEST = 1e-9, 1e9
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
BOXES = re.compile(r"\s*\d+(\s+-?\d*\.?\d+){4,}\s*")  # a class and a box, for detectors


def caption_text(data: bytes) -> str:
    """The text of a caption file, of which a longer one need not be read whole. Raises ValueError for a bad one."""
    if len(data) > MAX_CAPTION_FILE:
        raise ValueError("caption file over 1 MiB")
    try:
        return data.decode(encoding(data))
    except UnicodeDecodeError:
        raise ValueError("caption is not UTF-8") from None


def encoding(data: bytes) -> str:
    """Of a text by its first bytes: UTF-8, or UTF-16 where it says so."""
    return "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def read_sidecar(kind: str, text: str, column: str = "") -> tuple[list[str], float, str]:
    """Captions, cleaned, weight, and class if there is one, in the file beside an image. ValueError if it has no caption."""
    if kind == ".json":
        row = under(json_object(text), column)
        if not (texts := texts_of(row)):
            raise ValueError(no_caption(row))
        return clean_captions(texts), weight_of(row), label_of(row)
    if text.strip() and all(BOXES.fullmatch(line) for line in text.splitlines() if line.strip()):
        raise ValueError("numbers of boxes, no caption")
    return clean_captions(text.splitlines()), 1.0, ""


def json_object(text: str) -> dict[str, Any]:
    """The object that a text is in JSON. Raises ValueError."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def tidy(row: dict[str, Any]) -> dict[str, Any]:
    """A row under keys in lower case with underscores."""
    return {re.sub(r"[\s-]+", "_", key.strip().lower()): value for key, value in row.items() if isinstance(key, str)}


def under(row: dict[str, Any], column: str) -> dict[str, Any]:
    """A row whose captions are those of a column, where one is chosen, and of no other. Raises ValueError if it has none."""
    if not column:
        return row
    row, (column,) = tidy(row), tidy({column: None})
    if row.get(column) in (None, "", []):
        raise ValueError(f"nothing under {shown(column)}")
    kept = {key: value for key, value in row.items() if key not in CAPTION_KEYS + OTHERS}
    return kept | {"tags" if column == "tags" else "text": row[column]}


def texts_of(row: dict[str, Any]) -> list[str]:
    """The captions of a row as they stand there; none if it has no such key. Raises ValueError for what is not text."""
    row = {key: value for key, value in tidy(row).items() if value is not None}
    filled = [key for key in (*CAPTION_KEYS, *OTHERS) if row.get(key)] or [k for k in row if k in CAPTION_KEYS + OTHERS]
    texts = list[str]()
    for key in [key for key in filled if key in CAPTION_KEYS] or filled[:1]:
        value = row[key] if isinstance(row[key], list) else [row[key]]
        if not all(isinstance(text, str) for text in value):
            raise ValueError(no_caption(value[0]) if isinstance(value[0], dict) else "a caption is not text")
        texts += [", ".join(value)] if key == "tags" else value
    return texts


def no_caption(row: dict[str, Any]) -> str:
    """Why a row, or an object in place of a caption, has none, and the fix."""
    names = tuple(f"{key}_" for key in (*CAPTION_KEYS, *OTHERS))
    like = [key for key in map(str, row) if key.lower().startswith(names) or len(key) == 2]  # text_de, or de
    if like:
        return f"captions under {', '.join(sorted(like)[:3])}: name the one to use text"
    return "no caption: name it text or caption"


def label_of(row: dict[str, Any]) -> str:
    """The class in a row, a text or a number; "" without one."""
    value = tidy(row).get("label")
    is_one = (
        isinstance(value, str | int) and not isinstance(value, bool) and not SURROGATE.search(str(value)[:MAX_CAPTION])
    )
    return " ".join(unicodedata.normalize("NFC", CONTROL.sub(" ", str(value)[:MAX_CAPTION])).split()) if is_one else ""


def weight_of(row: dict[str, Any]) -> float:
    """The weight in a row, 1 without one. Raises ValueError."""
    return clean_weight(tidy(row).get("weight", 1.0))


def clean_weight(value: Any) -> float:
    """A weight from JSON or CSV. Raises ValueError unless it is a positive number of a sane size."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and LIGHTEST <= (weight := float(value)) <= HEAVIEST:
            return weight
    raise ValueError(f"weight is not a positive number from {LIGHTEST:g} to {HEAVIEST:g}")


def clean_captions(texts: Iterable[str]) -> list[str]:
    """Captions as they are trained on: NFC, one line, single spaces, at most MAX_CAPTION characters, no duplicates.

    Raises ValueError if a caption holds NUL or bytes that are not UTF-8, or if all are empty.
    """
    captions: dict[str, None] = {}
    for text in texts:
        if "\0" in text:
            raise ValueError("caption holds NUL; save it as UTF-8")
        if SURROGATE.search(text):
            raise ValueError("caption is not UTF-8")
        words = unicodedata.normalize("NFC", CONTROL.sub(" ", text)).split()
        captions.setdefault(" ".join(words)[:MAX_CAPTION].rstrip())
    captions.pop("", None)
    if not captions:
        raise ValueError("empty caption")
    return list(captions)
