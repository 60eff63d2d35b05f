"""What a denoiser is told besides latent and noise level: named arrays, one row an image.

Text encoders give most of them, and the image's canvas the others; a network's row in `networks` says which there are and
whence. Everything here treats them alike: (B, T, D) is a vector a token, (B, D) one for the whole text. The arrays may be
numpy's or torch's where a prompt's syntax plays no part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff.errors import UsageError
from tinydiff.networks.network import Array, Canvas, Given
from tinydiff.text.prompts import Branch, Piece, Tokens, chunks

if TYPE_CHECKING:
    from tinydiff.checkpoints.description import Description
    from tinydiff.pipeline import Backend

Condition = dict[str, Any]
GIVEN = {
    "label": ("--label", "a class"),
    "image": ("--reference", "another image"),
}  # a column: its flag, and what it gives
Wanted = Mapping[str, Array]


def joined(outputs: Sequence[Mapping[str, Any]], wanted: Wanted, concatenate: Callable[..., Any]) -> Condition:
    """The text encoders' outputs under the denoiser's names; vectors of several encoders lie end to end."""
    named = {name: [each[of] for each in outputs if of in each] for name, of in texts_of(wanted).items()}
    return {name: each[0] if len(each) == 1 else concatenate(each, -1) for name, each in named.items() if each}


def texts_of(wanted: Wanted) -> dict[str, str]:
    """The conditions that text encoders give, each with the name of their output."""
    return {name: array.of for name, array in wanted.items() if isinstance(array.of, str)}


def of_canvas(wanted: Wanted, canvas: Canvas, rows: int) -> Condition:
    """The conditions that the images' canvas gives: float32 (rows, ...)."""
    made = {name: array.of(canvas) for name, array in wanted.items() if callable(array.of)}
    return {name: np.repeat(np.array([row], np.float32), rows, 0) for name, row in made.items()}


def blank(description: Description, name: str, shape: Sequence[int]) -> np.ndarray:
    """What a condition that is given with an image is where it is left out: the null label, or zeros (...)."""
    row = np.zeros(shape, np.float32)
    if description.labels and description.given[name].of == Given("label"):
        row[description.labels.pad] = 1
    return row


def of_given(
    d: Description, told: Condition, shape: Sequence[int], rows: Sequence[tuple[Sequence[int], bool]]
) -> Condition:
    """What is told with images, (1, ...) or (images, ...) each, as rows of a call of the network for latents of this `shape`.

    `rows`: lists of images, and whether each is of what is wanted; else it is told nothing, if the denoiser has learnt that.
    Raises UsageError for what has to be given.
    """
    made, sizes = Condition(), {"height": shape[1], "width": shape[2], "batch": 1}
    for name, array in d.given.items():
        column: Any = array.of
        spared, (flag, what) = column.column in d.spared, GIVEN[column.column]
        if name not in told and not spared:
            raise UsageError(f"this model is always told {what}; give {flag}")
        none = blank(d, name, array.shape(sizes)[1:])[None]
        given = told.get(name, none)
        if given.shape[1:] != none.shape[1:]:
            raise UsageError(f"{flag}: of shape {given.shape[1:]}, and {none.shape[1:]} goes with the picture")
        parts = [
            none.repeat(len(images), 0) if spared and not wanted else given[np.minimum(images, len(given) - 1)]
            for images, wanted in rows
        ]
        made[name] = np.concatenate(parts)
    return made


def of_branches(backend: Backend, branches: Sequence[Branch]) -> Condition:
    """What branches of prompts say (B, ...); those on the way to another prompt are mixed with it."""
    both = encode(backend, [branch.pieces for branch in branches] + [b.toward for b in branches if b.toward])
    ahead = np.cumsum([len(branches) - 1] + [b.toward is not None for b in branches])[1:]  # the row of each one's goal

    def mixed(rows: np.ndarray) -> np.ndarray:
        ways = ((rows[i], rows[there], b) for i, (there, b) in enumerate(zip(ahead, branches, strict=True)))
        return np.stack([a + (to - a) * np.float32(b.share) if b.toward else a for a, to, b in ways])

    return {name: mixed(rows) for name, rows in both.items()}


def encode(backend: Backend, texts: Sequence[tuple[Piece, ...]]) -> Condition:
    """What texts say, of K chunks where the longest has K: (B, K T, D), and (B, D) by the first chunk.

    Equal texts are encoded once. A weight w moves a token's vector from the empty prompt's at its place:
    blank + w (vector - blank).
    """
    unique, tokenizers = list(dict.fromkeys(texts)), backend.tokenizers
    words = ["".join(piece.text for piece in pieces) for pieces in unique]
    plain = all(piece.weight == 1 for pieces in unique for piece in pieces)
    if plain and not any(tokenizer.cut(text) for tokenizer in tokenizers.values() for text in words):
        said = backend.encode_text({name: tokenizer.encode(words) for name, tokenizer in tokenizers.items()})
    else:
        said = _weighted(backend, unique)
    rows = [unique.index(pieces) for pieces in texts]
    return {name: array[rows] for name, array in said.items()}


def _weighted(backend: Backend, texts: Sequence[tuple[Piece, ...]]) -> Condition:
    """The same for weighted and long texts; shorter ones are filled up with empty chunks."""
    parts = {name: [chunks(pieces, each) for pieces in texts] for name, each in backend.tokenizers.items()}
    longest = max(len(ids) for each in parts.values() for ids, _ in each)
    filled = {name: _filled(each, backend.tokenizers[name], longest) for name, each in parts.items()}
    weights = next(iter(filled.values()))[1]  # (B, K, T)
    said = backend.encode_text({name: ids for name, (ids, _) in filled.items()})
    return {name: _moved(array, weights) for name, array in said.items()}


def _filled(parts: Sequence[tuple[np.ndarray, np.ndarray]], tokenizer: Tokens, longest: int) -> tuple[Any, Any]:
    """The empty text and all chunks as ids (1 + B K, T), and weights (B, K, T)."""
    empty = tokenizer.encode([""])
    ids = np.concatenate([empty, *(np.concatenate([i, *[empty] * (longest - len(i))]) for i, _ in parts)])
    ones = (np.ones((longest - len(w), w.shape[1]), np.float32) for _, w in parts)
    return ids, np.stack([np.concatenate([w, more]) for (_, w), more in zip(parts, ones, strict=True)])


def _moved(array: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(1 + B K, T, D) -> (B, K T, D), moved from the first row by the weights; (1 + B K, D) -> (B, D), each first chunk."""
    count, longest = weights.shape[:2]
    if array.ndim == 2:
        return array[1::longest]
    blank, vectors = array[0], array[1:].reshape(*weights.shape, -1)  # (B, K, T, D)
    moved = np.where(weights[..., None] == 1, vectors, blank + (vectors - blank) * weights[..., None])
    return moved.reshape(count, -1, vectors.shape[-1])
