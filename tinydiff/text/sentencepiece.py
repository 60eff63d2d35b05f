"""T5's SentencePiece tokenizer: the most likely split into subwords (Kudo 2018), with the same ids as transformers.

Opens a transformers folder: tokenizer.json, or spiece.model alone, which is protobuf. Text is normalised as the model says
(mostly NFKC) and split at white space; a word's first subword begins with `SPACE`. There is EOS but no BOS. Prompt syntax
(weights, AND, long prompts) is not known here.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BackendTokenizer

from tinydiff.protobuf import values
from tinydiff.text.given import GivenTokenizer
from tinydiff.text.tokenizer import MOST_IDS, listed_tokens

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
SPACE = "▁"  # U+2581
T5_LENGTH = 512
SENTINELS = 100  # <extra_id_0> and on, the mask tokens of pre-training; spiece.model lacks them
UNIGRAM, UNKNOWN, CONTROL = 1, 2, 3  # a model type, and two token types


class T5Tokenizer(GivenTokenizer):
    """Text to ids. `max_length` counts EOS; there is no BOS."""

    title, longest = "T5", T5_LENGTH
    special = {"eos": EOS, "pad": PAD}  # noqa: RUF012

    @classmethod
    def read_older(cls, folder: Path, config: dict[str, Any]) -> BackendTokenizer:
        """spiece.model, converted as transformers does, with the tokens added since."""
        sentinels = int(config.get("extra_ids", SENTINELS))
        if not 0 <= sentinels < MOST_IDS:
            raise ValueError(f"extra_ids is {str(sentinels)[:40]}")
        backend = from_spiece((folder / "spiece.model").read_bytes(), sentinels)
        for content, (index, token) in sorted(listed_tokens(folder, config).items(), key=lambda item: item[1][0]):
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
            if backend.token_to_id(content) != index:
                raise ValueError(f"{content[:40]!a} is listed with id {str(index)[:40]}, which is another token's")
        return backend

    def settings(self) -> dict[str, Any]:
        sentinels = sum(token.startswith("<extra_id_") for token in self._backend.get_vocab())
        special = {"eos_token": EOS, "pad_token": PAD, "unk_token": UNK, "extra_ids": sentinels}
        return {"tokenizer_class": "T5TokenizerFast", **special}

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        """`ids` of `text`, and the index of each one's first character that is not white space."""
        encoding = self._encoding(text)
        begin = [stop - len(text[start:stop].lstrip()) for start, stop in encoding.offsets]
        return encoding.ids, [min(index, len(text) - 1) for index in begin]


def from_spiece(data: bytes, sentinels: int = SENTINELS) -> BackendTokenizer:
    """The tokenizer of a SentencePiece ModelProto, with `sentinels` ids added after its own. Raises if it is not T5's."""
    message = list(values(data))  # numbers are those of sentencepiece_model.proto; a missing field has its default
    subwords = [dict(values(value)) for number, value in message if number == 1]
    trainer, rules = (dict(values(b"".join(value for number, value in message if number == n))) for n in (2, 3))
    if not trainer or not rules:
        raise ValueError("spiece.model is cut short")
    if trainer.get(3, UNIGRAM) != UNIGRAM or not rules.get(3, True) or not rules.get(4, True):
        raise ValueError("spiece.model is no unigram model, or one that heeds repeated white space")
    extra = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    vocab = [(subword[1].decode(), *struct.unpack("<f", subword.get(2, bytes(4)))) for subword in subwords]
    backend = BackendTokenizer(models.Unigram([*vocab, *((token, 0.0) for token in extra)], trainer.get(40, 0), False))
    if rules.get(2):
        backend.normalizer = normalizers.Precompiled(rules[2])
    words = pre_tokenizers.Metaspace(SPACE, "always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    backend.decoder = decoders.Metaspace(SPACE, "always")
    special = [subword[1].decode() for subword in subwords if subword.get(3) in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special + extra])
    ending = [(EOS, backend.token_to_id(EOS))]
    backend.post_processor = processors.TemplateProcessing(f"$A {EOS}", f"$A {EOS} $B {EOS}", ending)
    return backend
