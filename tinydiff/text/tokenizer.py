"""CLIP's byte-pair encoding: captions and prompts to token ids.

The folder format is CLIP's (vocab.json, merges.txt): tokenizers made here open in transformers' CLIPTokenizer and
Stable Diffusion's open here, with equal ids. Text is put in NFC, lower-cased, its white space collapsed, and split into
words. Every byte is a symbol, so no text is unknown. Prompt syntax (weights, AND, long prompts) is not known here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from tinydiff.errors import ModelError, UsageError
from tinydiff.files import read_json

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
SPECIAL = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
CLIP_LENGTH = 77
SMALLEST_VOCABULARY = 2 * 256 + 2
MOST_IDS = 2**22  # sixteen times the largest vocabularies: an id is an index into a table of vectors
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class SubwordTokenizer:
    """Text to ids by a backend of the tokenizers library. `bos` is None if nothing precedes the first token."""

    _backend: BackendTokenizer
    max_length: int
    eos: int
    pad: int
    bos: int | None = None
    runs: Mapping[int, Sequence[int]] = MappingProxyType(
        {}
    )  # a learnt word of several vectors: its id -> all of its ids
    learnt: tuple[str, ...] = ()  # words that its folder does not have

    def ids(self, text: str) -> list[int]:
        """The ids of `text`, without BOS, EOS, padding or limit."""
        return self.spans(text)[0]

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        """`ids` of `text`, and the index of each one's first character."""
        encoding = self._encoding(text)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        found = [(each, start) for index, (start, _) in pairs for each in self.runs.get(index, (index,))]
        return [index for index, _ in found], [start for _, start in found]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(B, max_length) int64: BOS if there is one, as many ids as fit, EOS, padding."""
        head = [] if self.bos is None else [self.bos]
        rows = np.full((len(texts), self.max_length), self.pad, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [*head, *self.ids(text)[: self.max_length - len(head) - 1], self.eos]
            row[: len(ids)] = ids
        return rows

    def cut(self, text: str) -> str:
        """The end of `text` that `encode` drops; "" if all of it fits."""
        _, starts = self.spans(text)
        room = self.max_length - 1 - (self.bos is not None)
        return valid(text)[starts[room] :] if len(starts) > room else ""

    def _encoding(self, text: str) -> Encoding:
        return self._backend.encode(valid(text), add_special_tokens=False)


class Tokenizer(SubwordTokenizer):
    """Text to ids. `max_length` counts BOS and EOS; `pad` is EOS unless a loaded folder says otherwise (SD 2 does)."""

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        max_length: int = CLIP_LENGTH,
        special: dict[str, AddedToken] | None = None,
        added: dict[int, AddedToken] | None = None,
    ) -> None:
        """`added`: by id, what is one token wherever it stands, such as a learnt word; it need not be in `vocab`.

        Raises KeyError or ValueError if `vocab` lacks a symbol, merge or token of `special` (keys as in `SPECIAL`), or where
        two tokens have one id.
        """
        if max_length < 3:
            raise ValueError(f"max_length is {max_length}; it holds BOS, EOS and at least one token")
        self.vocab, self.merges, self.max_length, self.added = vocab, list(merges), max_length, added or {}
        ids = vocab | {token.content: index for index, token in self.added.items()}
        check_ids(ids)
        self.vocab_size = max(ids.values()) + 1
        special = special or _special({})
        self.bos, self.eos, _, self.pad = (ids[special[key].content] for key in SPECIAL)
        self._backend = _backend(models.BPE(ids, self.merges, end_of_word_suffix=END_OF_WORD, unk_token=EOS))
        self._backend.add_special_tokens(list(special.values()))
        self._backend.add_tokens(list(self.added.values()))
        self.special = special
        names = {token.content: index for index, token in self.added.items()}
        self.runs = {index: run for text, index in names.items() if len(run := _run(text, names)) > 1}

    def taught(self, words: Mapping[str, Sequence[str]], first: int) -> Tokenizer:
        """The same with further words, each of several tokens, whose ids begin at `first`. ValueError for one that it has."""
        tokens = [token for run in words.values() for token in run]
        names = {*self.vocab, *(token.content for token in self.added.values())}
        if known := [token for token in tokens if token in names or tokens.count(token) > 1]:
            raise ValueError(known[0])
        added = {first + i: AddedToken(token, normalized=True) for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(self.vocab, self.merges, self.max_length, self.special, self.added | added)
        tokenizer.learnt = tuple(words)
        return tokenizer

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a CLIP tokenizer folder (vocab.json and merges.txt, or tokenizer.json). Raises ModelError."""
        folder, config = Path(folder), {}
        for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
            config |= read_json(path) if path.is_file() else {}
        try:
            vocab, merges = _vocabulary(folder)
            listed, length = listed_tokens(folder, config), int(config.get("model_max_length") or CLIP_LENGTH)
            special = _special(config, {content: token for content, (_, token) in listed.items()})
            known = vocab.keys() & {token.content for token in special.values()}
            added = {index: token for content, (index, token) in listed.items() if content not in known}
            # transformers writes 1e30 for "not set"
            return cls(vocab, merges, length if length < 10**6 else CLIP_LENGTH, special, added)
        except ModelError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ModelError(f"{folder}: not a CLIP tokenizer ({reason}); restore the folder") from error

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
        """Learn merges from `captions`, deterministically; few captions give fewer than `vocab_size` ids.

        Ids are in CLIP's order: 256 byte symbols, the same at the end of a word, merges, BOS, EOS. Raises UsageError if
        `vocab_size` or `max_length` is too small.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise UsageError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs {SMALLEST_VOCABULARY} or more")
        if max_length < 3:
            raise UsageError(f"max_length is {max_length}; it holds BOS, EOS and at least one token: use 3 or more")
        symbols = byte_symbols()
        alphabet = symbols + [symbol + END_OF_WORD for symbol in symbols]
        backend = _backend(models.BPE(end_of_word_suffix=END_OF_WORD))
        # As "special" tokens the alphabet gets its ids first, in this order; ties between merges are broken by id.
        settings = {"min_frequency": 2, "special_tokens": alphabet, "end_of_word_suffix": END_OF_WORD}
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, show_progress=False, **settings)
        backend.train_from_iterator(map(valid, captions), trainer)
        state = json.loads(backend.to_str())["model"]
        tokens = [*sorted(state["vocab"], key=state["vocab"].__getitem__), BOS, EOS]
        vocab = {token: index for index, token in enumerate(tokens)}
        return cls(vocab, [(left, right) for left, right in state["merges"]], max_length)

    def save(self, folder: str | Path) -> None:
        """Write the files that transformers' CLIPTokenizer reads: four, and one of added tokens if there are any."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokens = dict(sorted(self.vocab.items(), key=lambda item: item[1]))
        names: dict[int | None, str] = {index: token for token, index in tokens.items()}
        names |= {index: token.content for index, token in self.added.items()}
        special = {"bos_token": names[self.bos], "eos_token": names[self.eos], "pad_token": names[self.pad]}
        special["unk_token"] = EOS
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.max_length, **special}
        if self.added:
            _write(folder / "added_tokens.json", json.dumps({t.content: i for i, t in self.added.items()}, indent=2))
            flags = ("content", *FLAGS, "special")
            config["added_tokens_decoder"] = {i: {k: getattr(t, k) for k in flags} for i, t in self.added.items()}
        merges = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merges)]
        _write(folder / "vocab.json", json.dumps(tokens, ensure_ascii=False))
        _write(folder / "merges.txt", "\n".join(merges))
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))
        _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))


def _run(text: str, ids: Mapping[str, int]) -> list[int]:
    """The ids of a token and of those that diffusers numbers after it: `<cat>`, `<cat>_1`, `<cat>_2`, ..."""
    later = itertools.takewhile(ids.__contains__, (f"{text}_{i}" for i in itertools.count(1)))
    return [ids[text], *(ids[name] for name in later)]


def byte_symbols() -> list[str]:
    """The 256 characters that represent bytes, in CLIP's order: printable bytes, then U+0100 and up for the rest."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]


def _backend(model: models.BPE) -> BackendTokenizer:
    """`model` after CLIP's normalisation and word split."""
    backend = BackendTokenizer(model)
    collapse = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), collapse, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def valid(text: str) -> str:
    """`text` with each lone surrogate, which UTF-8 cannot encode, replaced by "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: from tokenizer.json, all that transformers 5 writes, or older versions' two files."""
    if not (folder / "vocab.json").exists() and (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json")["model"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return model["vocab"], [(left, right) for left, right in pairs]
    vocab = read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    return vocab, [(left, right) for left, right in pairs]


def check_ids(vocab: dict[str, int]) -> None:
    """ValueError unless every token has an id of its own that can be an index."""
    wrong = next((i for i in vocab.values() if type(i) is not int or not 0 <= i < MOST_IDS), None)
    if wrong is not None:
        raise ValueError(f"id {str(wrong)[:40]} is not one of 0 to {MOST_IDS - 1}")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError("two tokens have one id")


def listed_tokens(folder: Path, config: dict[str, Any]) -> dict[str, tuple[int, AddedToken]]:
    """What a folder lists as added tokens: by content, their ids and how they are found in a text.

    Read are added_tokens.json, `added_tokens_decoder` of tokenizer_config.json, and `added_tokens` of tokenizer.json, the
    later one counting.
    """
    path, whole = folder / "added_tokens.json", folder / "tokenizer.json"
    plain = read_json(path) if path.is_file() else {}
    listed = [{"id": index, "content": text} for text, index in plain.items()]
    listed += [{**token, "id": int(index)} for index, token in (config.get("added_tokens_decoder") or {}).items()]
    listed += (read_json(whole).get("added_tokens") or []) if whole.is_file() else []
    return {token["content"]: (token["id"], _added(token, bool(token.get("special")))) for token in listed}


def _special(config: dict[str, Any], listed: Mapping[str, AddedToken] | None = None) -> dict[str, AddedToken]:
    """The special tokens that `config` names, as transformers adds them: what is `listed` takes precedence."""
    tokens = {key: _added(config.get(key) or text) for key, text in SPECIAL.items()}
    return {key: (listed or {}).get(token.content, token) for key, token in tokens.items()}


def _added(token: str | dict[str, Any], special: bool = True) -> AddedToken:
    """A token from its description in the folder: a string, or transformers' AddedToken as a dict."""
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    flags = {key: bool(token[key]) for key in FLAGS if key in token}
    return AddedToken(token["content"], special=special, **flags)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
