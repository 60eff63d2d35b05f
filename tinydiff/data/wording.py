"""What a configuration makes of captions: words of file names, what stands before and after, tags in another order.

It knows neither files nor images.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinydiff.data.captions import clean_captions

if TYPE_CHECKING:
    from tinydiff.config import Data

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
HASH = re.compile(r"[0-9a-f]{8,}", re.IGNORECASE)
BREAKS = re.compile(r"[\s_+.~=#@&%$!;:|()\[\]{}-]+|(?<=[a-z])(?=[A-Z][a-z])")
CAMERAS = re.compile(r"dcim|dji|dsc[fn]?|gopr|ima?g|mvimg|pxl|sam|vid|wa", re.IGNORECASE)  # before their numbers
NO_WORDS = re.compile(  # that alone say nothing of what an image shows
    r"am|app|at|copy|download|file|frame|from|images?|photo|pic|picture|pm|scan|screen|screenshot|shot|unnamed|untitled|whats",
    re.IGNORECASE,
)
LEAST = 3  # letters of a word that has a number


def words_of(stem: str) -> str:
    """Readable words of a file's name, without ids, numbers and what cameras write. Raises ValueError if none are left."""
    plain = UUID.sub(" ", unicodedata.normalize("NFC", stem))
    words = [word for part in BREAKS.split(plain) if (word := _word(part))]
    if all(NO_WORDS.fullmatch(word.strip(",")) for word in words):
        raise ValueError("no words in its name")
    return " ".join(words)


def _word(part: str) -> str:
    """A part of a name if it is a word, without the number at its end or beginning; "" for an id."""
    core = part.strip(",'")
    word = core.strip("0123456789")
    if not word or CAMERAS.fullmatch(word):
        return ""
    number = any(c.isdigit() for c in core)
    return (
        part.replace(core, word)
        if not number or (word.isalpha() and len(word) >= LEAST and not HASH.fullmatch(core))
        else ""
    )


def worded(captions: Sequence[str], data: Data) -> list[str]:
    """The first captions of an image with what is put before and after each. Raises ValueError."""
    first = captions[: data.max_captions or None]
    return (
        clean_captions(f"{data.prefix}{text}{data.suffix}" for text in first)
        if data.prefix or data.suffix
        else [*first]
    )


def retold(caption: str, data: Data, rng: np.random.Generator) -> str:
    """A caption's tags, which commas separate, in another order and some left out, as `data` says; never none of them."""
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    kept, others = tags[: data.keep_tags], tags[data.keep_tags :]
    order, chances = rng.permutation(len(others)), rng.random(len(others))
    left = [i for i in (order if data.shuffle_tags else range(len(others))) if chances[i] >= data.tag_dropout]
    return ", ".join(kept + [others[i] for i in left]) or ", ".join(others[:1])
