"""BERT's WordPiece tokenizer (Devlin et al. 2019): the longest pieces of each word, with the same ids as transformers.

Opens a transformers folder: tokenizer.json, or vocab.txt alone with tokenizer_config.json saying whether case counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tinydiff.text.given import GivenTokenizer

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
BERT_LENGTH = 512
NORMALIZER = {  # key of tokenizer_config.json: what tokenizer.json calls it, and what its absence means
    "do_lower_case": ("lowercase", True),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
    "strip_accents": ("strip_accents", None),
}


class BertTokenizer(GivenTokenizer):
    """Text to ids, between CLS and SEP."""

    title, longest = "BERT", BERT_LENGTH
    special = {"bos": CLS, "eos": SEP, "pad": PAD}  # noqa: RUF012

    @classmethod
    def read_older(cls, folder: Path, config: dict[str, Any]) -> BackendTokenizer:
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        vocab = {line.removesuffix("\r"): index for index, line in enumerate(lines)}
        backend = BackendTokenizer(models.WordPiece(vocab, unk_token=UNK))
        rules = {ours: config.get(theirs, default) for theirs, (ours, default) in NORMALIZER.items()}
        backend.normalizer = normalizers.BertNormalizer(**rules)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.add_special_tokens([token for token in (PAD, UNK, CLS, SEP, MASK) if token in vocab])
        return backend

    def settings(self) -> dict[str, Any]:
        names = {"cls_token": CLS, "sep_token": SEP, "pad_token": PAD, "unk_token": UNK, "mask_token": MASK}
        rules = json.loads(self._backend.to_str())["normalizer"] or {}
        said = {theirs: rules[ours] for theirs, (ours, _) in NORMALIZER.items() if ours in rules}
        return {"tokenizer_class": "BertTokenizer", **names, **said}
