"""Prompts from the command line or stdin: cleaned and checked; a surprising reading of one is noted, once.

Nothing is drawn here. Memory is bounded whatever stdin holds.
"""

from __future__ import annotations

import itertools
import queue
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from tinydiff.errors import ResourceError, UsageError, UserError
from tinydiff.progress import note
from tinydiff.system import shown
from tinydiff.text.prompts import Branch, Tokens, blend, foreign, parse, refuse_no_label

MAX_PROMPT = 10_000  # characters
MAX_LINE = 2**16  # bytes kept of a line of stdin, which are more than MAX_PROMPT characters
ENDLESS = 2**28  # bytes of a line after which its end is waited for no longer
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Line:
    """A prompt, and its line of stdin; 0 for the one of the command line."""

    number: int
    text: str


def read_prompts(prompt: str) -> Iterator[Line | None]:
    """The prompt, or stdin's lines for '-': None means that no further line is waiting at this moment."""
    if prompt == "-":
        return _stdin()
    if not clean(prompt):
        raise UsageError("the prompt is empty; say what to draw, such as 'red heart'")
    understood(clean(prompt))  # says what is wrong with it before anything is drawn
    return iter([Line(0, clean(prompt))])


def clean(text: str) -> str:
    """One line of valid Unicode without control characters and terminal colours."""
    valid = COLOURS.sub(" ", text.encode("utf-8", "replace").decode("utf-8"))
    return " ".join("".join(c if c.isprintable() or c in "\u200d\ufe0f" else " " for c in valid).split())


def understood(prompt: str, toward: str | None = None, share: float = 0.0) -> list[Branch]:
    """The prompt's branches, or those on the way to another; UsageError names the prompt too, it may be one of many."""
    for text in (prompt, toward or ""):
        refuse_long(text)
    try:
        return parse(prompt) if toward is None else blend(prompt, toward, share)
    except UsageError as error:
        raise UsageError(f"{error} (in {prompt[:60]!r})") from None


def refuse_long(text: str) -> None:
    """UsageError for a prompt so long that what the network looks at would fill the memory."""
    if len(text) > MAX_PROMPT:
        raise UsageError(
            f"prompt: at least {len(text)} characters, over {MAX_PROMPT}; shorten it (it begins {text[:60]!r})"
        )


def lines_of(stdin: IO[bytes]) -> Iterator[Line]:
    """Its lines that hold text, cleaned; of longer ones than MAX_LINE a beginning that is too long to be drawn.

    Raises UsageError for a line without an end.
    """
    for number in itertools.count(1):
        if not (line := stdin.readline(MAX_LINE)):
            return
        rest, size = line, len(line)
        while len(rest) == MAX_LINE and rest[-1:] != b"\n":
            rest = stdin.readline(MAX_LINE)
            size += len(rest)
            if size > ENDLESS:
                raise UsageError(f"line {number} of stdin: {size >> 20} MiB without an end; shorten it")
        text = line.decode("utf-8", "replace").lstrip("\ufeff")
        if text := clean(text) if rest is line else text[: MAX_PROMPT + 1]:
            yield Line(number, text)


def _stdin() -> Iterator[Line | None]:
    lines: queue.Queue[Line | UserError | None] = queue.Queue(256)

    def read() -> None:
        try:
            if sys.stdin:  # a reader of our own: Python aborts where it ends while a thread is reading its own one
                with open(sys.stdin.fileno(), "rb", closefd=False) as stdin:
                    for line in lines_of(stdin):
                        lines.put(line)
            lines.put(None)
        except UsageError as error:
            lines.put(error)
        except OSError as error:  # stdin is open for writing only, say
            lines.put(ResourceError(f"stdin: {error.strerror}; give it prompts, one a line"))

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=0.02)
        except queue.Empty:
            yield None
            line = lines.get()
        if isinstance(line, UserError):
            raise line
        if line is None:
            return
        yield line


class Reader:
    """Reads prompts for a model, and notes each surprising reading once."""

    def __init__(self, tokenizers: Mapping[str, Tokens]):
        self.tokenizers, self.noted = list(tokenizers.values()), set[str]()

    def read(self, prompt: str, toward: str | None = None) -> list[Branch]:
        """The prompt's branches. UsageError for what has no meaning, such as a text that is no label of a model of classes."""
        branches, first = understood(prompt, toward), self.tokenizers[0]
        for pieces in (pieces for branch in branches for pieces in (branch.pieces, branch.toward) if pieces):
            for tokenizer in self.tokenizers:
                refuse_no_label(pieces, tokenizer)
            if rest := first.cut(text := "".join(piece.text for piece in pieces)):
                reads = f"the model reads {first.max_length} tokens at a time"
                self.once(text, f"{reads}; read in parts, from here on: {shown(rest)!r}")
        for what, text in foreign(f"{prompt} {toward or ''}") if first.max_length > 1 else ():
            if text[0] != "<" or len({*first.spans(text)[1]}) > 1:  # one place is a word that the model has learnt
                self.once(what, f"{shown(text)!r} is read as plain words: {what} in other programs, not here")
        return branches

    def once(self, key: str, text: str) -> None:
        """A note, unless one of this key has been made."""
        if key not in self.noted:
            note(text)
        self.noted.add(key)
