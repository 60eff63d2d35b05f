"""T5's SentencePiece: prompts to token ids by the likeliest split into pieces (Kudo 2018), with transformers' ids.

Opens a folder of transformers: tokenizer.json, or the spiece.model of SentencePiece alone, whose protobuf is read here.
A text is normalised as the model says (NFKC at heart) and split at white space, every word's first piece beginning with
`SPACE`. A text ends in EOS and begins with nothing. Prompt syntax (weights, AND, long prompts) is not known here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BackendTokenizer

from tinydiff.errors import ModelError
from tinydiff.files import read_json

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
SPACE = "▁"  # U+2581
T5_LENGTH = 512
SENTINELS = 100  # <extra_id_0> and on: what pre-training put in place of hidden words; spiece.model lacks them
UNIGRAM, UNKNOWN, CONTROL = 1, 2, 3  # a kind of model, and two of pieces
CUT = "spiece.model is cut short"
VARINT, BYTES, FIXED = 0, 2, {1: 8, 5: 4}  # protobuf's encodings of a field; the bytes of those of fixed size


class T5Tokenizer:
    """Text to ids. `max_length` counts EOS; there is no BOS."""

    bos = None

    def __init__(self, backend: BackendTokenizer, max_length: int = T5_LENGTH) -> None:
        """`backend` normalises, splits and looks up. Raises ValueError where it lacks EOS or padding."""
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; it holds at least one token and EOS")
        eos, pad = backend.token_to_id(EOS), backend.token_to_id(PAD)
        if eos is None or pad is None:
            raise ValueError(f"its vocabulary lacks {EOS if eos is None else PAD}")
        backend.no_truncation()
        backend.no_padding()
        self._backend, self.max_length, self.eos, self.pad = backend, max_length, eos, pad
        self.vocab_size = max(backend.get_vocab().values()) + 1

    @classmethod
    def load(cls, folder: str | Path, max_length: int | None = None) -> T5Tokenizer:
        """Reads a T5 tokenizer folder. `max_length` is the diffusion model's; by default the folder's. Raises ModelError."""
        folder = Path(folder)
        settings = folder / "tokenizer_config.json"
        config = read_json(settings) if settings.is_file() else {}
        try:
            tokenizer = cls(_backend(folder, config), _length(config) if max_length is None else max_length)
            tokenizer.ids("\uffff")  # in no vocabulary: here, rather than at some prompt, it shows if that is a mistake
            return tokenizer
        except (ModelError, KeyboardInterrupt, SystemExit):
            raise
        except OSError as error:
            raise ModelError(f"{error.filename}: {error.strerror}; copy the whole tokenizer folder") from error
        except BaseException as error:  # the tokenizers library raises bare Exception, and panics outside of it
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{folder}: not a T5 tokenizer ({type(error).__name__}: {reason}); restore the folder"
            ) from error

    def save(self, folder: str | Path) -> None:
        """Writes the two files that transformers' T5TokenizerFast and AutoTokenizer read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sentinels = sum(token.startswith("<extra_id_") for token in self._backend.get_vocab())
        special = {"eos_token": EOS, "pad_token": PAD, "unk_token": UNK, "extra_ids": sentinels}
        config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": self.max_length, **special}
        (folder / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8", newline="\n")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n"
        )

    def ids(self, text: str) -> list[int]:
        """The ids of `text` alone: no EOS, padding or limit."""
        return self._encoding(text).ids

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        """`ids` of `text`, and for each the index of its first character, or of the next where that is white space."""
        encoding = self._encoding(text)
        begin = [stop - len(text[start:stop].lstrip()) for start, stop in encoding.offsets]
        return encoding.ids, [min(index, len(text) - 1) for index in begin]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(B, max_length) int64: as many ids as fit, EOS, padding."""
        rows = np.full((len(texts), self.max_length), self.pad, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [*self.ids(text)[: self.max_length - 1], self.eos]
            row[: len(ids)] = ids
        return rows

    def length(self, text: str) -> int:
        """How many tokens `text` has, EOS counted, whether or not they fit `max_length`."""
        return len(self.ids(text)) + 1

    def cut(self, text: str) -> str:
        """The tail of `text` that `encode` drops, as typed; "" when all of it fits."""
        _, starts = self.spans(text)
        kept = self.max_length - 1
        return _valid(text)[starts[kept] :] if len(starts) > kept else ""

    def _encoding(self, text: str) -> Encoding:
        return self._backend.encode(_valid(text), add_special_tokens=False)


def _valid(text: str) -> str:
    """`text` with each lone surrogate, which no encoding can hold, replaced by "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _length(config: dict[str, Any]) -> int:
    """The most tokens that the folder names; transformers writes 1e30 for "not set"."""
    length = int(config.get("model_max_length") or T5_LENGTH)
    return length if length < 10**6 else T5_LENGTH


def _backend(folder: Path, config: dict[str, Any]) -> BackendTokenizer:
    """tokenizer.json as it is, or else what transformers makes of spiece.model."""
    if (folder / "tokenizer.json").is_file():
        return BackendTokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return from_spiece((folder / "spiece.model").read_bytes(), int(config.get("extra_ids", SENTINELS)))


def from_spiece(data: bytes, sentinels: int = SENTINELS) -> BackendTokenizer:
    """The tokenizer of a SentencePiece ModelProto, with `sentinels` ids behind its own. Raises where it is not T5's.

    Numbers are those of the fields in sentencepiece_model.proto; a missing field has its default.
    """
    message = list(_fields(data))
    pieces = [dict(_fields(value)) for number, value in message if number == 1]
    trainer, rules = (dict(_fields(b"".join(value for number, value in message if number == n))) for n in (2, 3))
    if not trainer or not rules:
        raise ValueError(CUT)
    if trainer.get(3, UNIGRAM) != UNIGRAM or not rules.get(3, True) or not rules.get(4, True):
        raise ValueError("spiece.model is no unigram model, or one that heeds repeated white space")
    extra = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    vocab = [(piece[1].decode(), *struct.unpack("<f", piece.get(2, bytes(4)))) for piece in pieces]
    backend = BackendTokenizer(models.Unigram([*vocab, *((token, 0.0) for token in extra)], trainer.get(40, 0), False))
    if rules.get(2):
        backend.normalizer = normalizers.Precompiled(rules[2])
    words = pre_tokenizers.Metaspace(SPACE, "always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    backend.decoder = decoders.Metaspace(SPACE, "always")
    special = [piece[1].decode() for piece in pieces if piece.get(3) in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special + extra])
    ending = [(EOS, backend.token_to_id(EOS))]
    backend.post_processor = processors.TemplateProcessing(f"$A {EOS}", f"$A {EOS} $B {EOS}", ending)
    return backend


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and an int or bytes. Raises where it is none, or cut short."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = divmod(key, 8)
        if kind == VARINT:
            value, place = _varint(data, place)
        else:
            size, place = _varint(data, place) if kind == BYTES else (FIXED[kind], place)
            value, place = data[place : place + size], place + size
        if place > len(data):
            raise ValueError(CUT)
        yield number, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """The number at `place`, seven bits a byte, the lowest first, and the place behind it."""
    value = shift = 0
    while data[place] > 127:
        value, shift, place = value | (data[place] & 127) << shift, shift + 7, place + 1
    return value | data[place] << shift, place + 1
