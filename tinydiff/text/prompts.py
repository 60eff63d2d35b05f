r"""What a user types to branches, weighted pieces and chunks of token ids; knows no network and no files.

The syntax is that of AUTOMATIC1111's web UI:

    (word)           weight times 1.1; brackets nest, and their factors multiply
    [word]           weight divided by 1.1
    (word:1.3)       weight times 1.3, by any finite number; what is no number, as in (note: x), is text
    a AND b          two branches: a capital AND between white space, outside brackets
    a :1.2 AND b     a weight for a branch: white space, a colon and a number at its end
    \( \) \[ \] \: \\    the character itself; other backslashes are text; (AND:1) is the word AND

Text without these is one branch with one piece of weight 1, letter for letter as typed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Protocol

import numpy as np

from tinydiff.errors import UsageError

STEP = 1.1
LARGEST = float(np.finfo(np.float32).max)
CLOSING = {"(": ")", "[": "]"}
# Repeats are written so that no two of them can match the same characters: the scan takes linear time on any text.
NUMBER = r"[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|(?i:nan|inf(?:inity)?))"
AND = r"(?<!\S)AND(?!\S)"
MARKS = re.compile(
    rf"(?P<escape>\\[()\[\]:\\])"
    rf"|(?P<open>[(\[])"
    rf"|(?P<close>:\s*(?P<factor>{NUMBER})\s*\)|[)\]])"
    rf"|(?P<weight>(?<!\S):\s*(?P<number>{NUMBER})\s*(?={AND}|\Z))"
    rf"|(?P<AND>{AND})"
)


class Tokens(Protocol):
    """The part of a tokenizer that drawing needs; those of `text.tokenizer` and `text.sentencepiece` have it."""

    max_length: int
    eos: int
    pad: int

    @property
    def bos(self) -> int | None: ...  # None where a text begins with its first token
    def encode(self, texts: Sequence[str]) -> np.ndarray: ...
    def spans(self, text: str) -> tuple[list[int], list[int]]: ...
    def cut(self, text: str) -> str: ...


@dataclass(frozen=True)
class Piece:
    """Text, escapes undone, whose tokens share one weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Branch:
    """One side of AND: a prompt of its own, and its weight among the branches.

    With `toward` the text vectors are a `share` of the way to those of another prompt.
    """

    pieces: tuple[Piece, ...]
    weight: float
    toward: tuple[Piece, ...] | None = None
    share: float = 0.0

    @property
    def text(self) -> str:
        """The prompt without its syntax."""
        return "".join(piece.text for piece in self.pieces)


def parse(text: str) -> list[Branch]:
    """The branches of `text`, at least one, each of at least one piece; neighbouring pieces differ in weight.

    A lone prompt keeps all its white space, and a number at its end is text: there is nothing to weigh it against.
    Branches of several are stripped. Raises UsageError, naming the character (the first is 1) and the fix.
    """
    factors, outer = _groups(text)
    borders = [mark for mark in outer if mark.lastgroup == "AND"]
    if not borders:
        return [Branch(_pieces(text, 0, len(text), factors), 1.0)]
    weights = {mark.end(): mark for mark in outer if mark.lastgroup == "weight"}
    starts = [0, *(mark.end() for mark in borders)]
    stops = [*(mark.start() for mark in borders), len(text)]
    branches = [
        _branch(text, start, stop, weights.get(stop), factors) for start, stop in zip(starts, stops, strict=True)
    ]
    _refuse_empty(branches, borders)
    return branches


def blend(start: str, end: str, share: float) -> list[Branch]:
    """A `share` of the way from one prompt to another, in text vectors. Raises UsageError where one has an AND."""
    one, other = parse(start), parse(end)
    if len(one) > 1 or len(other) > 1:
        raise UsageError("there is no way between prompts with AND; write each without it")
    return [Branch(one[0].pieces, 1.0, other[0].pieces, share)]


def chunks(pieces: Sequence[Piece], tokenizer: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Ids (K, T) int64 and their weights (K, T) float32: K >= 1 chunks of T = `tokenizer.max_length`.

    A chunk is BOS where the tokenizer has one, as many tokens as fit, EOS, padding; all but the tokens weigh 1. These are
    those of the whole text, whatever its weights, so one chunk equals `tokenizer.encode`; a token weighs what its first
    character does. A word (what stands between white space) is cut only where it is longer than a chunk.
    """
    if tokenizer.max_length == 1:
        raise UsageError("prompt: this model draws classes; give a label alone, without weights or brackets")
    head = [] if tokenizer.bos is None else [tokenizer.bos]
    text = "".join(piece.text for piece in pieces)
    tokens, starts = tokenizer.spans(text)
    piece = np.searchsorted(np.cumsum([len(piece.text) for piece in pieces]), starts, side="right")
    token_weights = np.array([piece.weight for piece in pieces], np.float32)[piece]
    word = np.searchsorted([match.end() for match in re.finditer(r"\S+", text)], starts, side="right")
    cuts = _cuts(word, tokenizer.max_length - len(head) - 1)
    ids = np.full((len(cuts) - 1, tokenizer.max_length), tokenizer.pad, np.int64)
    weights = np.ones(ids.shape, np.float32)
    for row, (start, stop) in enumerate(pairwise(cuts)):
        chunk = [*head, *tokens[start:stop], tokenizer.eos]
        ids[row, : len(chunk)] = chunk
        weights[row, len(head) : len(chunk) - 1] = token_weights[start:stop]
    return ids, weights


def _groups(text: str) -> tuple[dict[int, float], list[re.Match[str]]]:
    """The factor of each group by the position of its opening bracket, and the marks outside all of them."""
    factors: dict[int, float] = {}
    opened: list[re.Match[str]] = []
    outer: list[re.Match[str]] = []
    for mark in MARKS.finditer(text):
        if mark.lastgroup == "open":
            opened.append(mark)
        elif mark.lastgroup == "close":
            opening = _opening(opened, mark)
            factors[opening.start()] = _factor(opening, mark)
        elif not opened:
            outer.append(mark)
    if opened:
        bracket = opened[0][0]
        raise UsageError(
            f'prompt, character {opened[0].start() + 1}: "{bracket}" is never closed; '
            f'close it with "{CLOSING[bracket]}", or write "\\{bracket}" for the character itself'
        )
    return factors, outer


def _opening(opened: list[re.Match[str]], mark: re.Match[str]) -> re.Match[str]:
    """Takes off `opened` the bracket that `mark` closes. Raises UsageError where it closes none."""
    bracket = mark[0][-1]
    if opened and CLOSING[opened[-1][0]] == bracket:
        return opened.pop()
    problem = "closes nothing"
    if opened:
        problem = f'does not close the "{opened[-1][0]}" at character {opened[-1].start() + 1}'
    raise UsageError(
        f'prompt, character {mark.end()}: "{bracket}" {problem}; '
        f'pair the brackets, or write "\\{bracket}" for the character itself, as in ":\\{bracket}"'
    )


def _factor(opening: re.Match[str], closing: re.Match[str]) -> float:
    """What a group multiplies the weight of its text by."""
    if closing["factor"]:
        return _number(closing, "factor")
    return STEP if opening[0] == "(" else 1 / STEP


def _number(mark: re.Match[str], group: str) -> float:
    """The weight that is typed in `group` of `mark`. Raises UsageError where float32 cannot hold it."""
    value = float(mark[group])
    if not abs(value) <= LARGEST:  # "not" for the sake of nan
        raise UsageError(
            f"prompt, character {mark.start(group) + 1}: the weight {mark[group][:20]} is not a finite number; "
            'write one such as 1.3, or "\\:" where the colon is text'
        )
    return value


def _branch(text: str, start: int, stop: int, mark: re.Match[str] | None, factors: dict[int, float]) -> Branch:
    """The branch text[start:stop], stripped; `mark` is the weight at its end, if it has one."""
    weight = 1.0
    if mark:
        stop, weight = mark.start(), _number(mark, "number")
    body = text[start:stop]
    start += len(body) - len(body.lstrip())
    return Branch(_pieces(text, start, start + len(body.strip()), factors), weight)


def _refuse_empty(branches: list[Branch], borders: list[re.Match[str]]) -> None:
    """Raises UsageError where one of `borders`, the ANDs between `branches`, has no text on one side."""
    for index, branch in enumerate(branches):
        if not branch.text.strip():
            mark, side = (borders[index], "before") if index < len(borders) else (borders[-1], "behind")
            raise UsageError(
                f"prompt, character {mark.start() + 1}: AND has nothing {side} it; "
                "write a prompt on both sides, or (AND:1) for the word itself"
            )


def _pieces(text: str, start: int, stop: int, factors: dict[int, float]) -> tuple[Piece, ...]:
    """The pieces of text[start:stop], whose brackets are balanced. Raises UsageError where a product overflows."""
    runs: list[tuple[float, str]] = []
    weights = [1.0]
    for mark in MARKS.finditer(text, start, stop):
        if mark.lastgroup in ("AND", "weight"):  # inside brackets or in a lone prompt: text
            continue
        runs.append((weights[-1], text[start : mark.start()]))
        start = mark.end()
        if mark.lastgroup == "escape":
            start -= 1
        elif mark.lastgroup == "open":
            weights.append(_product(weights[-1], factors[mark.start()], mark))
        else:
            weights.pop()
    return _joined([*runs, (1.0, text[start:stop])])


def _product(weight: float, factor: float, mark: re.Match[str]) -> float:
    """`weight` inside the bracket `mark`. Raises UsageError where float32 cannot hold it."""
    if abs(weight * factor) > LARGEST:
        raise UsageError(
            f'prompt, character {mark.start() + 1}: the weights multiply to {weight * factor:.3g} in this "{mark[0]}"; '
            "take brackets away or write smaller weights"
        )
    return weight * factor


def _joined(runs: Iterable[tuple[float, str]]) -> tuple[Piece, ...]:
    """`runs` of (weight, text) as pieces: empty ones dropped, neighbours of one weight joined."""
    groups = groupby((run for run in runs if run[1]), key=lambda run: run[0])
    pieces = tuple(Piece("".join(text for _, text in group), weight) for weight, group in groups)
    return pieces or (Piece("", 1.0),)


def _cuts(word: np.ndarray, room: int) -> list[int]:
    """Where chunks of at most `room` tokens begin, and where the last one ends; `word` (N,) numbers each token's word.

    A word longer than a chunk fills what is left of the one before it: it has to be cut in any case.
    """
    edges = [0, *(np.flatnonzero(np.diff(word)) + 1).tolist(), len(word)]
    cuts = [0]
    for start, stop in pairwise(edges):
        while stop - cuts[-1] > room:
            cuts.append(start if stop - start <= room else cuts[-1] + room)
    return [*cuts, len(word)]
