"""The tokenizer against transformers' CLIPTokenizer, which reads the folders it saves and writes folders it loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from texts import EXAMPLES

from tinydiff.errors import ModelError, UsageError
from tinydiff.text.tokenizer import BOS, EOS, Tokenizer, byte_symbols

CAPTIONS = [
    "A large red circle left of a small blue square.",
    "Two green triangles above a yellow star, on white",
    "it's the dog's ball; they've 24 of them & I'll see",
    "Ein grüner Würfel über einem roten Kreis",
    "赤い丸と青い四角 🟥🔵 👩‍👩‍👧",
] * 4


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


PIECES = st.lists(st.sampled_from([*" aAéß'sdtm0九 🟥\u0301\n", "circle", "'ve", BOS, EOS, "</w>"]), max_size=40)


TEXTS = ANY_TEXT | PIECES.map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, vocab_size=600, max_length=16)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


def open_peer(folder: Path):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.CLIPTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def peer(saved):
    return open_peer(saved)


def peer_ids(peer, text: str) -> list[int]:
    return peer(text, padding="max_length", truncation=True, max_length=peer.model_max_length).input_ids


def with_examples(test):
    for text in EXAMPLES:
        test = example(text)(test)
    return settings(deadline=None, max_examples=300)(test)


@pytest.mark.peers
@with_examples
@given(text=TEXTS)
def test_ids_equal_transformers(tokenizer, peer, text):
    assert tokenizer.encode([text])[0].tolist() == peer_ids(peer, text)
    assert len(tokenizer.ids(text)) + 2 == len(peer(text, verbose=False).input_ids)


@pytest.mark.peers
def test_transformers_reads_our_settings(tokenizer, peer):
    assert (peer.model_max_length, len(peer)) == (tokenizer.max_length, tokenizer.vocab_size)
    assert (peer.bos_token_id, peer.eos_token_id) == (tokenizer.bos, tokenizer.eos)
    assert peer.pad_token_id == tokenizer.eos


@pytest.mark.peers
def test_folder_that_transformers_saves_gives_equal_ids(tokenizer, peer, tmp_path):
    peer.save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert np.array_equal(again.encode(EXAMPLES), tokenizer.encode(EXAMPLES))


def added(content: str) -> dict:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


@pytest.mark.peers
@pytest.mark.parametrize(
    "special",
    [
        {"bos_token": added(BOS), "eos_token": added(EOS), "unk_token": added(EOS), "pad_token": EOS},  # SD 1
        {"bos_token": added(BOS), "eos_token": added(EOS), "unk_token": added(EOS), "pad_token": "!"},  # SD 2
        {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": added("!")},
        {"bos_token": BOS, "pad_token": EOS, "added_tokens_decoder": {"598": added(BOS), "599": added(EOS)}},
        {},
    ],
)
def test_stable_diffusion_settings_give_equal_ids(saved, tmp_path, special):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    named = {key: token for key, token in special.items() if key != "added_tokens_decoder"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, **special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(tmp_path), open_peer(tmp_path)
    texts = [*EXAMPLES, "wow! a!b !!", "<|ENDOFTEXT|> b"]
    assert ours.encode(texts).tolist() == [peer_ids(theirs, text) for text in texts]
    assert ours.pad == theirs.pad_token_id


LEARNT = {  # added tokens: their flags that are not the default ones
    "<cat-toy>": {},
    "<cat-toy>-1": {},  # another one begins like it
    "<Midjourney-Style>": {},  # matched in lower case, as all text
    "<exact>": {"normalized": False},
    "sks": {"single_word": True},
    "<left>": {"lstrip": True},
    "<right>": {"rstrip": True, "special": True},
    "circle": {},  # which merges may make too
    "九": {},
}
WITH_LEARNT = [
    "a <cat-toy>",
    "a <cat-toy>-1, <cat-toy>",
    "<MIDJOURNEY-style> x",
    "in  <left>  and <right>  a",
    "<exact> <EXACT>",
]
WITH_LEARNT += ["sks dog, asks, sks", "circles circle", "x九y", "(<cat-toy>)", ""]


@pytest.mark.peers
@pytest.mark.parametrize("layout", ["added_tokens.json", "tokenizer.json", "added_tokens_decoder"])
def test_added_tokens_have_the_ids_of_transformers(saved, tmp_path, layout):
    """Whatever file lists them, and again in the folder that is written of them."""
    transformers = pytest.importorskip("transformers")
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if layout == "added_tokens.json":
        new = [text for text in LEARNT if text != "circle"]  # which has an id
        (tmp_path / layout).write_text(json.dumps({text: 600 + i for i, text in enumerate(new)}))
    else:
        peer = open_peer(tmp_path)
        peer.add_tokens([transformers.AddedToken(text, **flags) for text, flags in LEARNT.items()])
        peer.save_pretrained(tmp_path)
    if layout == "added_tokens_decoder":
        whole = json.loads((tmp_path / "tokenizer.json").read_text())
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {token.pop("id"): token for token in whole["added_tokens"]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer.json").unlink()
    ours, theirs = Tokenizer.load(tmp_path), open_peer(tmp_path)
    wanted = [peer_ids(theirs, text) for text in [*EXAMPLES, *WITH_LEARNT]]
    assert any(id >= 600 for ids in wanted for id in ids)
    assert ours.encode([*EXAMPLES, *WITH_LEARNT]).tolist() == wanted
    ours.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode([*EXAMPLES, *WITH_LEARNT]).tolist() == wanted
    again = open_peer(tmp_path / "again")
    assert [peer_ids(again, text) for text in [*EXAMPLES, *WITH_LEARNT]] == wanted


@pytest.mark.parametrize("wrong", [-1, 2**31, 2**63, 10**400, True, None, "600", 1.5, [600], 3])
def test_ids_that_are_none_are_refused(saved, tmp_path, wrong):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<cat>": wrong}))
    with pytest.raises(ModelError, match="not a CLIP tokenizer") as caught:
        Tokenizer.load(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_vocabulary_is_in_the_order_of_clip(tokenizer):
    tokens = list(tokenizer.vocab)
    assert [tokenizer.vocab[token] for token in tokens] == list(range(600))
    assert tokens[:3] + tokens[93:95] + tokens[187:190] == ["!", '"', "#", "~", "¡", "ÿ", "Ā", "ā"]
    assert tokens[256:512] == [token + "</w>" for token in tokens[:256]]
    assert tokens[512:598] == list(dict.fromkeys(left + right for left, right in tokenizer.merges))
    assert tokens[598:] == [BOS, EOS]
    assert len(set(byte_symbols())) == 256


def test_merges_join_the_most_frequent_pair_first():
    tokenizer = Tokenizer.train(["ab ab ab cd cd"], 515, 8)
    assert tokenizer.merges == [("a", "b</w>")]
    assert tokenizer.ids("AB cd") == [512, tokenizer.vocab["c"], tokenizer.vocab["d</w>"]]


def test_training_does_not_depend_on_process_or_caption_order():
    program = (
        "import sys, json; from tinydiff.text.tokenizer import Tokenizer;"
        "print(json.dumps(Tokenizer.train(json.loads(sys.argv[1]), 600, 16).merges))"
    )
    merges = []
    for captions, parallel in [(CAPTIONS, "true"), (CAPTIONS[::-1], "false")]:
        command = [sys.executable, "-c", program, json.dumps(captions)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": parallel}
        merges.append(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert merges[0] == merges[1]


def test_save_and_load_keep_everything(tokenizer, saved, tmp_path):
    again = Tokenizer.load(saved)
    for name in ("vocab", "merges", "max_length", "vocab_size", "bos", "eos", "pad"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    again.save(tmp_path)
    for path in saved.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@with_examples
@given(text=TEXTS)
def test_cut_is_the_tail_that_encode_drops(tokenizer, text):
    tail = tokenizer.cut(text)
    assert text.endswith(tail)
    assert bool(tail) == (len(tokenizer.ids(text)) + 2 > tokenizer.max_length)
    row = tokenizer.encode([text])[0]
    assert row.shape == (16,)
    assert (row[0], row[-1]) == (tokenizer.bos, tokenizer.eos)


def test_cut_keeps_the_spelling_of_the_prompt(tokenizer):
    text = "x " * 14 + "Big  RED é"
    assert tokenizer.cut(text) == "Big  RED é"
    assert tokenizer.cut("x " * 14) == ""


def test_encode_shapes(tokenizer):
    assert tokenizer.encode([]).shape == (0, 16)
    ids = tokenizer.encode(["a", ""])
    assert ids.dtype == np.int64
    assert ids[1].tolist() == [tokenizer.bos] + [tokenizer.eos] * 15


def test_lone_surrogates_count_as_question_marks(tokenizer):
    assert tokenizer.ids("a \ud83d b") == tokenizer.ids("a ? b")
    assert Tokenizer.train(["\udcff\udcff \udcff\udcff"], 600, 8).vocab_size == 515


def test_a_megabyte_is_encoded(tokenizer):
    assert len(tokenizer.ids("<|endoftext|" * 80_000)) > 80_000
    assert len(tokenizer.ids("a" * 200_000)) > 50_000


@pytest.mark.parametrize("arguments", [(513, 77), (600, 2)])
def test_train_refuses_impossible_sizes(arguments):
    with pytest.raises(UsageError, match="or more"):
        Tokenizer.train(["a"], *arguments)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{}"),
        ("vocab.json", '{"a": "b"}'),
        ("vocab.json", "[]"),
        ("merges.txt", "#version: 0.2\nzz qq\n"),
        ("merges.txt", "one two three\n"),
        ("merges.txt", b"\xff"),
        ("tokenizer_config.json", '{"model_max_length": 2}'),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
        ("tokenizer_config.json", '{"bos_token": "nowhere"}'),
        ("tokenizer_config.json", '{"eos_token": {"id": 3}}'),
        ("tokenizer_config.json", "{"),
    ],
)
def test_load_refuses_damaged_folders(saved, tmp_path, name, content):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_refuses_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ModelError, match=r"vocab\.json: No such file"):
        Tokenizer.load(tmp_path)


def test_import_is_light():
    program = "import sys, tinydiff.text.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
