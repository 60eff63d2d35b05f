"""Learnt words (textual inversion: Gal et al. 2022): vectors that a text encoder reads where a word of its own stands.

Files of diffusers name the word; of those of AUTOMATIC1111's web UI, and of Stable Diffusion XL, the file's name is the word. It
knows no network; torch is imported to read a pickle, by its reader of tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinydiff.adapters import WORD_STYLES, origin
from tinydiff.adapters.origin import Origin
from tinydiff.errors import ModelError
from tinydiff.files import RESTORE, shown, write_file

if TYPE_CHECKING:
    from tinydiff.checkpoints.header import Header

PICKLES = (".pt", ".bin")
TOWERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # of a file for two text encoders
ONE = "emb_params"  # of one for one, where it does not name the word
LONGEST = 100  # letters of a word
LARGEST = 2**26  # bytes of a file; a thousand vectors have a twentieth
KINDS = "give a file of diffusers ({word: vectors}) or of AUTOMATIC1111's web UI (emb_params)"


class Word(NamedTuple):
    """What stands for it in a prompt, and its vectors (N, D) of each text encoder."""

    text: str
    vectors: Mapping[str, np.ndarray]

    @property
    def tokens(self) -> list[str]:
        """The tokens that it becomes, named as diffusers names them."""
        count = max(len(rows) for rows in self.vectors.values())
        return [self.text, *(f"{self.text}_{i}" for i in range(1, count))]


def opened(path: Path, tables: Mapping[str, tuple[int, ...]], header: Callable[[Path], Header]) -> Word:
    """The word of a file, for text encoders that have so many vectors of such a width. ModelError where it is for others."""
    if path.suffix.lower() in PICKLES and path.is_file():
        word = unpickled(path)
    else:
        file = header(path)
        few = {name: stored for name, stored in file.tensors.items() if stored.end - stored.start < LARGEST}
        if len(file.tensors) > len(TOWERS) or len(few) < len(file.tensors):
            raise ModelError(f"{shown(path)}: not a learnt word, it has {shown(', '.join(file.tensors))}; {KINDS}")
        try:
            word = of_tensors(path, {name: file.array(name) for name in few})
        except KeyError as error:
            raise ModelError(
                f"{shown(path)}: has tensors as {shown(error)}; only floating point is supported"
            ) from None
    widths = {name: width for name, (_, width) in tables.items()}
    if (given := {name: rows.shape[1] for name, rows in word.vectors.items()}) != widths:
        problem = (
            f"has vectors of {sizes(given)}, and the model's words have {sizes(widths) or 'none that can be added to'}"
        )
        raise ModelError(f"{shown(path)}: {problem}; give a word that was learnt with it")
    return word


def sizes(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{width} numbers for {shown(name)}" for name, width in widths.items())


def of_tensors(path: Path, tensors: Mapping[str, np.ndarray], text: str = "") -> Word:
    """The word of a file that holds these. ModelError where they are none."""
    if len(tensors) == 1:
        name, rows = next(iter(tensors.items()))
        text, vectors = text or (path.stem if name == ONE else name), {"text_encoder": rows}
    elif tensors.keys() == TOWERS.keys():
        text, vectors = text or path.stem, {TOWERS[name]: rows for name, rows in tensors.items()}
    else:
        raise ModelError(f"{shown(path)}: not a learnt word, it has {shown(', '.join(tensors)) or 'nothing'}; {KINDS}")
    vectors = {name: np.atleast_2d(rows).astype(np.float32) for name, rows in vectors.items()}
    if any(rows.ndim > 2 or not rows.size for rows in vectors.values()) or len({*map(len, vectors.values())}) > 1:
        shapes = [list(rows.shape) for rows in vectors.values()]
        raise ModelError(f"{shown(path)}: not a learnt word, its tensors are {shown(shapes)}; {KINDS}")
    if not all(np.isfinite(rows).all() for rows in vectors.values()):
        raise ModelError(f"{shown(path)}: has NaN or infinite values; {RESTORE}")
    if not text.strip() or not text.isprintable() or any(c.isspace() for c in text) or len(text) > LONGEST:
        raise ModelError(f"{shown(path)}: {shown(text)!r} is not one word; rename it")
    return Word(text, vectors)


def unpickled(path: Path) -> Word:
    """The word of a .pt or .bin file. ModelError for what holds other things than tensors."""
    import torch

    if path.stat().st_size > LARGEST:
        raise ModelError(f"{shown(path)}: not a learnt word, it has {path.stat().st_size >> 20} MiB; {KINDS}")
    try:
        content: Any = torch.load(path, "cpu", weights_only=True)
        tensors = content.get("string_to_param", content)
        named = {str(k): v.detach().float().numpy() for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        text = str(content.get("name") or path.stem) if tensors is not content else ""
    except Exception as error:  # torch's reader raises what its pickle makes it raise
        reason = " ".join(str(error).split())[:100]
        raise ModelError(f"{shown(path)}: no tensors alone ({shown(reason)}); {KINDS}") from None
    return of_tensors(path, named, text)


def write(path: Path, word: Word, style: str = "diffusers", force: bool = False, base: Origin | None = None) -> None:
    """Commit a .safetensors file as of "diffusers", or of AUTOMATIC1111's web UI ("a1111"), whose name is then the word."""
    from safetensors.numpy import save

    assert style in WORD_STYLES
    towers = {folder: name for name, folder in TOWERS.items()}
    one = {word.text if style == "diffusers" else ONE: next(iter(word.vectors.values()))}
    tensors = one if len(word.vectors) == 1 else {towers[name]: rows for name, rows in word.vectors.items()}
    told = origin.metadata(base or {}) or None
    write_file(path, save({name: np.ascontiguousarray(rows) for name, rows in tensors.items()}, told), force=force)
