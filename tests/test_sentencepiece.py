"""T5's tokenizer against transformers and SentencePiece itself, and by hand on a model of a few pieces."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import unicodedata
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from protobuf import field, varint
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer

from tinydiff.errors import ModelError
from tinydiff.text.prompts import Piece, chunks, parse
from tinydiff.text.sentencepiece import T5Tokenizer, from_spiece

LENGTH = 16


CAPTION = (
    "a large red circle left of small blue square two green triangles above yellow star on white, it's the dog's "
    "ball; they've 24 Ein grüner Würfel über einem roten Kreis 赤い丸と青い四角 🟥🔵 👩‍👩‍👧 reddish circling rectangle"
)


WORDS = CAPTION.split()


SPECIAL = ["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "</S>"]


EXAMPLES = [
    "",
    " \t\r\n\x0b\x0c\x1c\x85\u2028\u3000",
    "A  Red\u00a0CIRCLE ▁ ▁▁red",
    "cafe\u0301 CAFÉ \u1e9e İSTANBUL ΣΊΣΥΦΟΣ ﬁ Ⅷ ² ²\u0301 ㍿",
    "\x00\x07\x7f\u200b\ufeff\u202e\uffff",
    "👩‍👩‍👧 🏳️‍🌈 🟥",
    "a </s> b<extra_id_7>c <unk> <pad>",
    "x" * 5000,
    "a red circle " * 500,
]


SNIPPETS = [
    *" aAéß'sdtm0九 🟥\u0301\n\t▁",
    "  ",
    "red ",
    "circle",
    "\u200b",
    "ﬁ",
    "Ⅷ",
    "\u3000",
    "\x85",
    "\xa0",
    *SPECIAL,
]


TEXTS = st.text(max_size=60) | st.lists(st.sampled_from(SNIPPETS), max_size=30).map("".join)


MANY = settings(deadline=None, max_examples=200)


def texts(count: int) -> list[str]:
    """Words, fragments and characters of any kind, the same every time."""
    rng = random.Random(0)
    pick = [
        lambda: rng.choice(WORDS) + " ",
        lambda: rng.choice(SNIPPETS),
        lambda: chr(rng.randrange(0x3000)),
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
    ]
    return ["".join(rng.choice(pick[: 1 + i % 4])() for _ in range(rng.randrange(30))) for i in range(count)]


# A model by hand


def spiece(pieces: list[tuple[str, float, int]], trainer: bytes, rules: bytes) -> bytes:
    """A ModelProto of (piece, score, kind), with a field of fixed size that SentencePiece does not have."""
    parts = [field(1, field(1, p.encode()) + field(2, score) + field(3, kind)) for p, score, kind in pieces]
    return b"".join(parts) + field(2, trainer) + field(3, rules) + varint(99 * 8 + 1) + bytes(8)


PIECES = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -3.0, 1), ("▁a", -1.0, 1), ("▁red", -2.5, 1)]


PIECES += [("ab", -2.25, 1), ("aba", -4.5, 1), ("ba", -2.0, 1), ("a", -3.25, 1), ("b", -3.5, 1), ("▁ab", -4.125, 1)]


TRAINER, RULES = field(40, 2), field(1, b"identity")


HAND = spiece(PIECES, TRAINER, RULES)


@pytest.fixture(scope="module")
def hand() -> T5Tokenizer:
    return T5Tokenizer(from_spiece(HAND, 2), LENGTH)


def folder_of(path: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (
            path / {"spiece": "spiece.model", "json": "tokenizer.json", "config": "tokenizer_config.json"}[name]
        ).write_bytes(data)
    return path


def test_a_model_by_hand(hand):
    assert (hand.bos, hand.eos, hand.pad, hand.vocab_size, hand.max_length) == (None, 1, 0, 14, LENGTH)
    assert hand.spans(" a  red\nz b</s><extra_id_0>") == ([4, 5, 3, 2, 3, 10, 1, 13], [1, 4, 8, 8, 10, 10, 11, 15])
    assert hand.ids("<extra_id_1>") == [12]
    assert hand.encode(["a red", ""]).tolist() == [[4, 5, 1] + [0] * 13, [1] + [0] * 15]
    assert hand.encode(["red " * 20])[0].tolist() == [5] * 15 + [1]
    assert (len(hand.ids("a red")), len(hand.ids("red " * 20))) == (2, 20)
    assert hand.cut("a  red  " * 8 + "\ta ") == "red  \ta "
    assert hand.encode([]).shape == (0, LENGTH)


def best(word: str, scores: dict[str, float]) -> float:
    """The highest sum of scores of any split of `word`."""
    splits = [scores[word[:i]] + best(word[i:], scores) for i in range(1, len(word) + 1) if word[:i] in scores]
    return max(splits, default=0.0 if not word else -np.inf)


@MANY
@given(word=st.text("ab", min_size=1, max_size=9))
def test_the_split_is_the_likeliest(hand, word):
    scores = {piece: score for piece, score, kind in PIECES if kind == 1}
    found = [PIECES[i] for i in hand.ids(word)]
    assert "".join(piece for piece, _, _ in found) == "▁" + word
    assert sum(score for _, score, _ in found) == best("▁" + word, scores)


def test_lone_surrogates_count_as_question_marks(hand):
    assert hand.ids("a \ud83d b") == hand.ids("a ? b")
    assert hand.cut("a" + " \ud83d" * 20)[-2:] == " ?"


@pytest.mark.parametrize(
    ("config", "given", "length"),
    [
        (None, None, 512),
        ("{}", None, 512),
        ('{"model_max_length": null}', None, 512),
        ('{"model_max_length": 1000000000000000019884624838656}', None, 512),
        ('{"model_max_length": 77}', None, 77),
        ('{"model_max_length": 77}', 256, 256),
    ],
)
def test_the_length_is_the_models_or_the_folders(tmp_path, config, given, length):
    folder_of(tmp_path, spiece=HAND, **({"config": config} if config else {}))
    assert T5Tokenizer.load(tmp_path, given).max_length == length


def test_sentinels_are_as_many_as_the_folder_says(tmp_path):
    assert T5Tokenizer.load(folder_of(tmp_path, spiece=HAND)).vocab_size == len(PIECES) + 100
    assert T5Tokenizer.load(folder_of(tmp_path, config='{"extra_ids": 0}')).vocab_size == len(PIECES)


def test_save_and_load_keep_everything(hand, tmp_path):
    hand.save(tmp_path)
    again = T5Tokenizer.load(tmp_path)
    for name in ("max_length", "vocab_size", "bos", "eos", "pad"):
        assert getattr(again, name) == getattr(hand, name), name
    assert np.array_equal(again.encode(EXAMPLES), hand.encode(EXAMPLES))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_saved_file_alone_adds_the_end_and_reads_ids_back(hand, tmp_path):
    hand.save(tmp_path)
    backend = BackendTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.encode("a red").ids == [4, 5, 1]
    assert backend.decode([4, 5, 1]) == "a red"


def test_what_the_file_cuts_and_pads_is_not_cut_and_padded(hand, tmp_path):
    hand.save(tmp_path)
    backend = BackendTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=7)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert T5Tokenizer.load(tmp_path).ids("a a a a red") == [4, 4, 4, 4, 5]


# Damage


def unigram(**parts: object) -> str:
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["<pad>", 0.0]]}
    return json.dumps({"model": model | parts.pop("model", {}), "added_tokens": [], **parts})


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"spiece": b""},
        {"spiece": HAND[:150]},
        {"spiece": HAND[: HAND.index(field(2, TRAINER))]},
        {"spiece": HAND[: HAND.index(field(3, RULES))]},
        {"spiece": HAND[:-9]},
        {"spiece": HAND[:-1]},
        {"spiece": b"version https://git-lfs.github.com/spec/v1\n"},
        {"spiece": b"\xff" * 40},
        {"spiece": HAND.replace("▁red".encode(), b"\xff" * 6)},
        {"spiece": spiece(PIECES, TRAINER + field(3, 2), RULES)},  # byte pairs
        {"spiece": spiece(PIECES, TRAINER, RULES + field(3, 0))},
        {"spiece": spiece(PIECES, TRAINER, RULES + field(4, 0))},
        {"spiece": spiece(PIECES, TRAINER, RULES + field(2, b"charsmap"))},
        {"spiece": spiece(PIECES, field(40, 999), RULES)},
        {"spiece": spiece(PIECES[1:], TRAINER, RULES)},
        {"spiece": HAND, "config": "{"},
        {"spiece": HAND, "config": '{"model_max_length": 1}'},
        {"spiece": HAND, "config": '{"model_max_length": "long"}'},
        {"spiece": HAND, "config": '{"extra_ids": "many"}'},
        {"spiece": HAND, "json": "{"},
        {"json": b"\xff"},
        {"json": unigram(model={"vocab": [["<unk>", 0.0], ["</s>", 0.0]]})},
        {"json": unigram(model={"unk_id": None})},
        {"json": unigram(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})},  # a panic
    ],
)
def test_load_refuses_damaged_folders(tmp_path, files):
    with pytest.raises(ModelError) as caught:
        T5Tokenizer.load(folder_of(tmp_path, **files))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_those_parts_of_the_damaged_folders_are_sound(tmp_path):
    assert T5Tokenizer.load(folder_of(tmp_path, json=unigram())).ids("a") == [0]


def test_load_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(ModelError, match=r"spiece\.model: No such file"):
        T5Tokenizer.load(tmp_path)


def test_import_is_light():
    program = (
        "import sys, tinydiff.text.sentencepiece; print({'torch', 'transformers', 'sentencepiece'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# A trained model, as SentencePiece and transformers read it


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with nothing but a spiece.model, trained as T5's was, and a length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sentencepiece = pytest.importorskip("sentencepiece")
    rng, model = random.Random(0), io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>"}
    rules = {"character_coverage": 1.0, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    captions = (" ".join(rng.choices(WORDS, k=12)) for _ in range(200))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=captions, model_writer=model, vocab_size=150, model_type="unigram", **ids, **rules
    )
    config = json.dumps({"tokenizer_class": "T5Tokenizer", "model_max_length": LENGTH})
    return folder_of(tmp_path_factory.mktemp("t5"), spiece=model.getvalue(), config=config)


@pytest.fixture(scope="module")
def tokenizer(trained) -> T5Tokenizer:
    return T5Tokenizer.load(trained)


def open_peer(folder: Path):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def peer(trained):
    return open_peer(trained)


def check_same(ours: T5Tokenizer, theirs, prompts: list[str]) -> None:
    padded = theirs(prompts, padding="max_length", truncation=True, max_length=LENGTH).input_ids
    assert ours.encode(prompts).tolist() == padded
    whole = theirs(prompts, verbose=False).input_ids
    assert [[*ours.ids(text), ours.eos] for text in prompts] == whole


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_ids_equal_transformers(tokenizer, peer):
    check_same(tokenizer, peer, [*EXAMPLES, *texts(3000)])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@MANY
@given(text=TEXTS)
def test_ids_equal_transformers_on_any_text(tokenizer, peer, text):
    check_same(tokenizer, peer, [text.encode("utf-8", "replace").decode()])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_what_is_saved_and_is_read(tokenizer, peer, tmp_path):
    tokenizer.save(tmp_path / "ours")
    theirs = open_peer(tmp_path / "ours")
    check_same(tokenizer, theirs, [*EXAMPLES, *texts(300)])
    assert (theirs.model_max_length, len(theirs)) == (LENGTH, tokenizer.vocab_size)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (tokenizer.eos, tokenizer.pad, None)
    assert theirs.decode(tokenizer.ids("a red circle")) == "a red circle"
    peer.save_pretrained(tmp_path / "theirs")
    again = T5Tokenizer.load(tmp_path / "theirs")
    assert again.max_length == LENGTH
    assert [again.ids(text) for text in texts(300)] == [tokenizer.ids(text) for text in texts(300)]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_a_model_by_hand(hand, tmp_path):
    hand.save(tmp_path)
    check_same(hand, open_peer(tmp_path), [*EXAMPLES, *texts(300), "abba ab red<extra_id_1> b"])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["added_tokens_decoder", "tokenizer.json"])
def test_added_tokens_have_the_ids_of_transformers(trained, tokenizer, tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    new = [transformers.AddedToken("<cat-toy>"), transformers.AddedToken("SKS", normalized=False, rstrip=True)]
    theirs = open_peer(trained)
    theirs.add_tokens(new)
    theirs.save_pretrained(tmp_path)
    if layout == "added_tokens_decoder":
        whole = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "spiece.model").write_bytes((trained / "spiece.model").read_bytes())
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {token.pop("id"): token for token in whole["added_tokens"]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = T5Tokenizer.load(tmp_path)
    assert ours.vocab_size == tokenizer.vocab_size + 2
    check_same(ours, theirs, [*EXAMPLES, "a <cat-toy> b", "red<cat-toy>", "SKS  sks circle", *texts(100)])
    ours.save(tmp_path / "again")
    check_same(T5Tokenizer.load(tmp_path / "again"), theirs, ["a <cat-toy> b", "SKS  sks circle"])


def plain(text: str) -> str:
    """`text` without what `tokenizers` is known to read unlike SentencePiece.

    U+0085 is white space to it, and marks that follow a character which the model replaces vanish with that.
    """
    kept = unicodedata.normalize("NFKC", text).replace("\x85", "")
    return "".join(c for c in kept if unicodedata.category(c) not in ("Mn", "Mc", "Me") and c != "\u200d")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_ids_equal_sentencepiece(trained, tokenizer):
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=(trained / "spiece.model").read_bytes())
    prompts = [plain(text) for text in [*EXAMPLES, *texts(3000)] if not any(token in text for token in SPECIAL)]
    prompts += [f"a{chr(code)}b {chr(code)}" for code in range(0x4000) if code != 0x85]
    prompts = [text for text in prompts if not any(token in text for token in ("</s>", "<unk>", "<extra_id_"))]
    assert len(prompts) > 18_000
    assert [tokenizer.ids(text) for text in prompts] == theirs.encode(prompts)


@pytest.fixture(scope="module", params=["by hand", "transformers 5", "transformers 4"])
def either(request) -> T5Tokenizer:
    """A tokenizer of each kind: transformers 4 had another pipeline where it read a spiece.model."""
    if request.param == "by hand":
        return request.getfixturevalue("hand")
    backend = BackendTokenizer.from_str(request.getfixturevalue("tokenizer")._backend.to_str())
    if request.param == "transformers 4":
        tidy = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
        backend.normalizer = normalizers.Sequence([backend.normalizer, *tidy])
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    return T5Tokenizer(backend, LENGTH)


@MANY
@given(text=TEXTS)
@example(text="a </s>")
@example(text="\x1f")
@example(text="a red circle " * 50)
def test_cut_is_the_tail_that_encode_drops(either, text):
    tail = either.cut(text)
    assert text.encode("utf-8", "replace").decode().endswith(tail)
    assert bool(tail) == (len(either.ids(text)) + 1 > LENGTH)
    ids, starts = either.spans(text)
    assert ids == either.ids(text)
    assert starts == sorted(starts) and all(0 <= start < len(text) for start in starts)
    row = either.encode([text])[0]
    assert row.tolist() == [*ids[: LENGTH - 1], either.eos, *[either.pad] * (LENGTH - 1 - len(ids))]


# Chunks, without BOS


@MANY
@given(pairs=st.lists(st.tuples(TEXTS, st.sampled_from([0.5, 1.0, 2.0])), max_size=5))
@example(pairs=[("a \x1f", 0.5)])  # white space to Python alone
def test_chunks_hold_the_tokens_of_the_whole_text(either, pairs):
    pairs = [(text.replace("</s>", "").replace("<pad>", ""), weight) for text, weight in pairs]
    text = "".join(text for text, _ in pairs)
    ids, weights = chunks([Piece(*pair) for pair in pairs], either)
    ends = [row.index(either.eos) for row in ids.tolist()]
    assert list(chain(*(row[:end].tolist() for row, end in zip(ids, ends, strict=True)))) == either.ids(text)
    assert all((row[end + 1 :] == either.pad).all() for row, end in zip(ids, ends, strict=True))
    assert all((row[end:] == 1).all() for row, end in zip(weights, ends, strict=True))
    if len(ids) == 1:
        assert np.array_equal(ids, either.encode([text]))
    assert (len(ids) == 1) == (len(either.ids(text)) + 1 <= LENGTH)


@MANY
@given(pairs=st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([0.5, 1.0, 2.0])), max_size=20))
def test_words_weigh_what_they_are_given(either, pairs):
    ids, weights = chunks(parse("  ".join(f"({word}:{weight})" for word, weight in pairs))[0].pieces, either)
    inside = (ids != either.eos) & (ids != either.pad)
    each = [(token, weight) for word, weight in pairs for token in either.ids(word)]
    assert list(zip(ids[inside].tolist(), weights[inside].tolist(), strict=True)) == each
