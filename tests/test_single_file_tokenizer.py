"""The tokenizer of a single file against transformers, and what of such a file needs no torch."""

from __future__ import annotations

import json

import numpy as np
import pytest
from interpreters import run_without
from texts import EXAMPLES

from tinydiff.checkpoints import ldm, single_file


def test_configurations_and_the_tokenizer_need_no_torch(tiny_sd_files):
    code = f"""
from pathlib import Path
from tinydiff.checkpoints.source import Source
source = Source(Path({str(tiny_sd_files["open_clip"])!r}))
print(source.configs["scheduler"]["prediction_type"])
print(source.tokenizers["text_encoder"].pad)
"""
    assert run_without(code, "torch", "safetensors.torch").split() == ["v_prediction", "0"]


def test_known_ids_of_clip():
    one, two = single_file.tokenizer("clip"), single_file.tokenizer("open_clip")
    assert one.encode(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert two.encode(["hello world"])[0, :5].tolist() == [49406, 3306, 1002, 49407, 0]
    assert (one.vocab_size, len(one.vocab), one.max_length) == (49408, 49408, 77)
    assert one.merges[0] == ("i", "n") and one.merges[-1] == ("jeky", "ll</w>")


def strings(count: int) -> list[str]:
    """Texts of every script, emoji, control characters, words, special tokens; some of them long."""
    random = np.random.default_rng(0)
    ranges = [(32, 127), (0, 33), (160, 592), (768, 880), (880, 1424), (1536, 1792), (12352, 12544), (19968, 40000)]
    ranges += [(127744, 129536), (8192, 8304), (65024, 65536), (65536, 1114112)]
    words = [
        " ",
        "  ",
        "a photo of",
        "it's",
        "don't",
        "!!",
        "wow!",
        "<|endoftext|>",
        "<|STARTOFTEXT|>",
        "</w>",
        "👩‍👩‍👧",
        "\u0301",
    ]

    def piece() -> str:
        if random.random() < 0.3:
            return words[random.integers(len(words))]
        low, high = ranges[random.integers(len(ranges))]
        return "".join(chr(c) for c in random.integers(low, high, random.integers(1, 8)) if not 0xD800 <= c < 0xE000)

    sizes = np.where(np.arange(count) % 500 == 0, 300, random.integers(0, 9, count))
    return ["".join(piece() for _ in range(size)) for size in sizes]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_ids_equal_transformers_on_ten_thousand_strings(kind, tmp_path):
    from transformers import CLIPTokenizer

    ours = single_file.tokenizer(kind)
    (tmp_path / "vocab.json").write_text(json.dumps(ours.vocab))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, ours.merges)]))
    added = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos, eos = added | {"content": "<|startoftext|>"}, added | {"content": "<|endoftext|>"}
    special = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": ldm.KINDS[kind].pad}  # as published
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = CLIPTokenizer.from_pretrained(str(tmp_path))
    texts = [*EXAMPLES, *strings(10_000)]
    assert len(set(texts)) > 8000 and max(map(len, texts)) > 500
    wanted = theirs(texts, padding="max_length", truncation=True, max_length=77).input_ids
    assert np.array_equal(ours.encode(texts), wanted)
    assert [ours.ids(text) for text in texts[::5]] == theirs(
        texts[::5], add_special_tokens=False, verbose=False
    ).input_ids
