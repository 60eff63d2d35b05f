r"""Prompts to branches, weighted pieces, and chunks of token ids. It knows no network and no files.

The syntax is that of AUTOMATIC1111's web UI:

    (word)           weight times 1.1; brackets nest, and their factors multiply
    [word]           weight divided by 1.1
    (word:1.3)       weight times 1.3, or any other finite number; anything else, as in (note: x), is text
    a AND b          two branches: AND in capitals, with white space around it, outside brackets
    a :1.2 AND b     a weight for a branch: white space, a colon and a number at its end
    \( \) \[ \] \: \\    the character itself; other backslashes are text; (AND:1) is the word AND

Text without this syntax is one branch with one piece of weight 1, exactly as typed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Protocol

import numpy as np

from tinydiff.errors import UsageError

STEP = 1.1
LARGEST = float(np.finfo(np.float32).max)
CLOSING = {"(": ")", "[": "]"}
NO_WEIGHTS = "prompt: this model draws classes; give a label alone, without weights or brackets"
# No two repeats can match the same characters, so that the scan takes linear time on any text.
NUMBER = r"[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|(?i:nan|inf(?:inity)?))"
AND = r"(?<!\S)AND(?!\S)"
MARKS = re.compile(
    rf"(?P<escape>\\[()\[\]:\\])"
    rf"|(?P<open>[(\[])"
    rf"|(?P<close>:\s*(?P<factor>{NUMBER})\s*\)|[)\]])"
    rf"|(?P<weight>(?<!\S):\s*(?P<number>{NUMBER})\s*(?={AND}|\Z))"
    rf"|(?P<AND>{AND})"
)


# Syntax of other programs, which is read as plain words here: its name, and a pattern. In each pattern, what repeats stops at
# the character that begins the next match, so that the scan takes linear time.
FOREIGN = {
    "a break between chunks": r"\bBREAK\b",
    "a prompt that changes from step to step": r"\[[^\[\]]*:\s*[\d.]+\s*\]",
    "words that take turns": r"\[[^\[\]|]*\|[^\[\]]*\]",
    "a choice or emphasis in braces": r"\{[^{}]*\}",
    "a wildcard": r"(?<!\w)__[\w/*.-]+?__(?!\w)",
    "a network to load": r"<[^<>\s:]+:[^<>]*>",
    "a learnt word": r"<[^<>\s:]+>|(?<!\w)(?:embedding|emb):[^\s,()]+",
    "emphasis by plus or minus signs": r"\w(?:\+{2,}|-{2,})(?![\w+-])|[)\"](?:\++|-+)(?![\w+-])",
    "a call": r"\)\.(?:blend|and|swap)\(",
    "an option": r"(?<!\S)--[a-z]\w*",
    "a weight after two colons": r"::\s*-?[\d.]+",
    "a weight outside brackets": r"(?<=[^\W\d]|[)\]]):[ ]?\d*\.\d+(?!\s*[)\]\d])",
    "a comment": r"\A#(?=\s)",
    "a region": r"\b(?:ADDCOMM|ADDBASE|ADDCOL|ADDROW|AND_PERP|AND_SALT|AND_TOPK)\b",
}


class Tokens(Protocol):
    """What generation needs of a tokenizer; `Tokenizer`, `T5Tokenizer` and `Labels` have it."""

    max_length: int
    eos: int
    pad: int

    @property
    def bos(self) -> int | None: ...  # None if nothing precedes the first token
    def encode(self, texts: Sequence[str]) -> np.ndarray: ...
    def spans(self, text: str) -> tuple[list[int], list[int]]: ...
    def cut(self, text: str) -> str: ...


@dataclass(frozen=True)
class Piece:
    """Text without its syntax, whose tokens share one weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Branch:
    """One side of AND: a prompt, and its weight among the branches."""

    pieces: tuple[Piece, ...]
    weight: float
    toward: tuple[Piece, ...] | None = None  # another prompt: text vectors are a `share` of the way to its own
    share: float = 0.0

    @property
    def text(self) -> str:
        """The prompt without its syntax."""
        return "".join(piece.text for piece in self.pieces)


def parse(text: str) -> list[Branch]:
    """The branches of `text`, at least one, each of at least one piece; neighbouring pieces differ in weight.

    Without AND, white space is kept and a number at the end is text. Otherwise each branch is stripped. Raises
    UsageError with the position (the first character is 1) and the fix.
    """
    factors, outer = _groups(text)
    borders = [mark for mark in outer if mark.lastgroup == "AND"]
    if not borders:
        return [Branch(_pieces(text, 0, len(text), factors), 1.0)]
    weights = {mark.end(): mark for mark in outer if mark.lastgroup == "weight"}
    edges = [0, *(edge for mark in borders for edge in mark.span()), len(text)]
    spans = zip(edges[::2], edges[1::2], strict=True)
    branches = [_branch(text, start, stop, weights.get(stop), factors) for start, stop in spans]
    _refuse_empty(branches, borders)
    return branches


def foreign(text: str) -> Iterator[tuple[str, str]]:
    """The syntax of other programs in a prompt: (its name there, its text)."""
    plain = re.sub(r"\\[()\[\]:\\]", " ", text)
    for what, pattern in FOREIGN.items():
        yield from ((what, match[0]) for match in re.finditer(pattern, plain))


def blend(start: str, end: str, share: float) -> list[Branch]:
    """A branch with text vectors a `share` of the way from one prompt's to another's. Raises UsageError for AND."""
    one, other = parse(start), parse(end)
    if len(one) > 1 or len(other) > 1:
        raise UsageError("there is no way between prompts with AND; write each without it")
    return [Branch(one[0].pieces, 1.0, other[0].pieces, share)]


def refuse_no_label(pieces: Sequence[Piece], tokenizer: Tokens) -> None:
    """UsageError where a model of classes is given weights, or a text that is not a label."""
    if tokenizer.max_length > 1:
        return
    if any(piece.weight != 1 for piece in pieces):
        raise UsageError(NO_WEIGHTS)
    tokenizer.encode(["".join(piece.text for piece in pieces)])


def chunks(pieces: Sequence[Piece], tokenizer: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Ids (K, T) int64 and their weights (K, T) float32: K >= 1 chunks of T = `tokenizer.max_length`.

    A chunk is BOS if there is one, as many tokens as fit, EOS, padding; all but the tokens have weight 1. The text is
    tokenized as a whole, so a single chunk equals `tokenizer.encode`; a token has the weight of its first character. A
    word (text between white space) is split only if longer than a chunk. Raises UsageError for a model of classes.
    """
    if tokenizer.max_length == 1:
        raise UsageError(NO_WEIGHTS)
    head = [] if tokenizer.bos is None else [tokenizer.bos]
    text = "".join(piece.text for piece in pieces)
    tokens, starts = tokenizer.spans(text)
    index = np.searchsorted(np.cumsum([len(piece.text) for piece in pieces]), starts, side="right")  # token -> piece
    token_weights = np.array([piece.weight for piece in pieces], np.float32)[index]
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
    """Each bracket group's factor, by the position of its opening bracket, and the marks outside all groups."""
    factors: dict[int, float] = {}
    opened, outer = list[re.Match[str]](), list[re.Match[str]]()
    for mark in MARKS.finditer(text):
        if mark.lastgroup == "open":
            opened.append(mark)
        elif mark.lastgroup == "close":
            opening = _opening(opened, mark)
            factor = STEP if opening[0] == "(" else 1 / STEP
            factors[opening.start()] = _number(mark, "factor") if mark["factor"] else factor
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
    """Pop from `opened` the bracket that `mark` closes. Raises UsageError if there is none."""
    bracket, last = mark[0][-1], opened[-1] if opened else None
    if last and CLOSING[last[0]] == bracket:
        return opened.pop()
    problem = f'does not close the "{last[0]}" at character {last.start() + 1}' if last else "closes nothing"
    raise UsageError(
        f'prompt, character {mark.end()}: "{bracket}" {problem}; '
        f'pair the brackets, or write "\\{bracket}" for the character itself, as in ":\\{bracket}"'
    )


def _number(mark: re.Match[str], group: str) -> float:
    """The weight that `group` of `mark` holds. Raises UsageError if float32 cannot represent it."""
    value = float(mark[group])
    if not abs(value) <= LARGEST:  # "not <=" is true of NaN
        raise UsageError(
            f"prompt, character {mark.start(group) + 1}: the weight {mark[group][:20]} is not a finite number; "
            'write one such as 1.3, or "\\:" where the colon is text'
        )
    return value


def _branch(text: str, start: int, stop: int, mark: re.Match[str] | None, factors: dict[int, float]) -> Branch:
    """The branch text[start:stop], stripped; `mark` is the match of a weight at its end, if any."""
    weight = 1.0
    if mark:
        stop, weight = mark.start(), _number(mark, "number")
    body = text[start:stop]
    start += len(body) - len(body.lstrip())
    return Branch(_pieces(text, start, start + len(body.strip()), factors), weight)


def _refuse_empty(branches: list[Branch], borders: list[re.Match[str]]) -> None:
    """Raise UsageError if one of `borders`, the ANDs between `branches`, has no text on one side."""
    for index, branch in enumerate(branches):
        if not branch.text.strip():
            mark, side = (borders[index], "before") if index < len(borders) else (borders[-1], "after")
            raise UsageError(
                f"prompt, character {mark.start() + 1}: AND has nothing {side} it; "
                "write a prompt on both sides, or (AND:1) for the word itself"
            )


def _pieces(text: str, start: int, stop: int, factors: dict[int, float]) -> tuple[Piece, ...]:
    """The pieces of text[start:stop], whose brackets are balanced; neighbours differ in weight. Raises UsageError."""
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
    runs.append((1.0, text[start:stop]))
    groups = groupby((run for run in runs if run[1]), key=lambda run: run[0])
    return tuple(Piece("".join(text for _, text in group), weight) for weight, group in groups) or (Piece("", 1.0),)


def _product(weight: float, factor: float, mark: re.Match[str]) -> float:
    """The product of two weights, inside the bracket `mark`. Raises UsageError if float32 cannot represent it."""
    if abs(weight * factor) > LARGEST:
        raise UsageError(
            f'prompt, character {mark.start() + 1}: the weights multiply to {weight * factor:.3g} in this "{mark[0]}"; '
            "take brackets away or write smaller weights"
        )
    return weight * factor


def _cuts(word: np.ndarray, room: int) -> list[int]:
    """Where chunks of at most `room` tokens begin, and the end of the last; `word` (N,) is each token's word number."""
    edges = [0, *(np.flatnonzero(np.diff(word)) + 1).tolist(), len(word)]
    cuts = [0]
    for start, stop in pairwise(edges):
        while stop - cuts[-1] > room:  # a word longer than a chunk is split, so it fills the rest of the chunk before
            cuts.append(start if stop - start <= room else cuts[-1] + room)
    return [*cuts, len(word)]
