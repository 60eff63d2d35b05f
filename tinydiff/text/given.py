"""A tokenizer that comes with a text encoder, in a transformers folder, rather than learnt from captions.

A kind says which special tokens it has and how older folders without a tokenizer.json are read. Prompt syntax is not known here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer as BackendTokenizer

from tinydiff.errors import ModelError
from tinydiff.files import read_json
from tinydiff.system import unreadable
from tinydiff.text.tokenizer import MOST_IDS, SubwordTokenizer


class GivenTokenizer(SubwordTokenizer):
    """Text to ids. `max_length` counts the special tokens around a text."""

    title = ""  # what people call it
    longest = 0  # tokens where a folder does not say
    special: ClassVar[dict[str, str]] = {}  # "bos", "eos" and "pad": what they are in the vocabulary

    def __init__(self, backend: BackendTokenizer, max_length: int = 0) -> None:
        """`backend` normalises, splits and looks up ids. Raises ValueError if it lacks a special token."""
        max_length, least = max_length or self.longest, 1 + sum(name != "pad" for name in self.special)
        if max_length < least:
            raise ValueError(f"max_length is {max_length}; it holds at least one token and what is around it: {least}")
        for name, token in self.special.items():
            setattr(self, name, backend.token_to_id(token))
            if getattr(self, name) is None:
                raise ValueError(f"its vocabulary lacks {token}")
        backend.no_truncation()
        backend.no_padding()
        self._backend, self.max_length = backend, max_length
        self.vocab_size = max(backend.get_vocab().values()) + 1
        if self.vocab_size > MOST_IDS:
            raise ValueError(f"an id is {self.vocab_size - 1}, over {MOST_IDS - 1}")

    @classmethod
    def load(cls, folder: str | Path, max_length: int | None = None) -> Any:
        """Read a folder. `max_length` defaults to the folder's. Raises ModelError."""
        folder = Path(folder)
        settings = folder / "tokenizer_config.json"
        config = read_json(settings) if settings.is_file() else {}
        try:
            backend = cls.read(folder, config)
            if max_length is None:
                length = int(config.get("model_max_length") or cls.longest)
                max_length = length if length < 10**6 else cls.longest  # transformers writes 1e30 for "not set"
            tokenizer = cls(backend, max_length)
            tokenizer.ids("\uffff")  # in no vocabulary: if that raises, then now and not at some later prompt
            return tokenizer
        except (ModelError, KeyboardInterrupt, SystemExit):
            raise
        except OSError as error:
            raise unreadable(error, folder) from error
        except BaseException as error:  # the tokenizers library raises bare Exception; its panics are BaseException
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ModelError(f"{folder}: not a {cls.title} tokenizer ({reason}); restore the folder") from error

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> BackendTokenizer:
        """tokenizer.json as it is or, without one, what `read_older` makes of the folder."""
        if (folder / "tokenizer.json").is_file():
            return BackendTokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return cls.read_older(folder, config)

    @classmethod
    def read_older(cls, folder: Path, config: dict[str, Any]) -> BackendTokenizer:
        """A folder without a tokenizer.json; `config` is its tokenizer_config.json."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What tokenizer_config.json says besides the length."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        """Write the two files that transformers' class of this kind and AutoTokenizer read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_max_length": self.max_length, **self.settings()}
        files = {"tokenizer.json": self._backend.to_str(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
