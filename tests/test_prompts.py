"""Prompt syntax against a second reader that weighs letter by letter, and chunks against the tokenizer's own ids."""

from __future__ import annotations

import re
import time
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinydiff.errors import UsageError
from tinydiff.text.prompts import LARGEST, Branch, Piece, chunks, parse
from tinydiff.text.tokenizer import BOS, EOS, Tokenizer

LENGTH = 8


CAPTIONS = ["a large red circle left of a small blue square", "it's unhappy, the dog's ball 24", "赤い丸 🟥🔵"] * 4


SNIPPETS = [*" ab.1:é九🟥\u0301\n\t\\()[]", "AND", " AND ", " :0.7", ":1.3", "nan", "\\(", BOS, EOS, "\ud83d"]


TEXTS = st.text(max_size=60) | st.lists(st.sampled_from(SNIPPETS), max_size=30).map("".join)


PLAIN = st.text(max_size=60).filter(lambda text: not re.search(r"[()\[\]\\:]|AND", text))


MANY = settings(deadline=None, max_examples=200)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, vocab_size=600, max_length=LENGTH)


def lone(text: str, weight: float = 1.0) -> list[Branch]:
    return [Branch((Piece(text, weight),), 1.0)]


def pieces_of(text: str) -> list[tuple[str, Any]]:
    (branch,) = parse(text)
    return [(piece.text, pytest.approx(piece.weight)) for piece in branch.pieces]


def escape(text: str) -> str:
    return re.sub(r"(?<!\S)AND(?!\S)", "(AND:1)", re.sub(r"[()\[\]:\\]", r"\\\g<0>", text))


# Syntax


@MANY
@given(text=PLAIN)
@example(text="")
@example(text=" \n a cat and\ta dog ")
@example(text="👩‍👩‍👧 🏳️‍🌈 e\u0301 مرحبا \x00 \ud83d, BAND ANDY <3 {x} 'y' \"z\" 100%")
def test_plain_text_is_untouched(text):
    assert parse(text) == lone(text)


@MANY
@given(text=TEXTS)
@example(text="AND AND AND")
@example(text="\\\\(a:1.3\\) :0.7")
def test_escaped_text_comes_back(text):
    assert parse(escape(text)) == lone(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(a)", [("a", 1.1)]),
        ("((a))", [("a", 1.21)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("a (b (c:2) [d]:3) e", [("a ", 1), ("b ", 3), ("c", 6), (" ", 3), ("d", 3 / 1.1), (" e", 1)]),
        ("([a])", [("a", 1)]),
        ("(a)(b)c", [("ab", 1.1), ("c", 1)]),
        ("(a : +1.5e0 )", [("a ", 1.5)]),
        ("(a:-.5) (b:2.)", [("a", -0.5), (" ", 1), ("b", 2)]),
        ("(a:0)", [("a", 0)]),
        ("(a:1:2)", [("a:1", 2)]),
        ("(a:1 (b))", [("a:1 ", 1.1), ("b", 1.21)]),
        ("((b):2)", [("b", 2.2)]),
        ("()x[]", [("x", 1)]),
        ("((:2))", [("", 1)]),
        # text, not weights
        ("(note: x)", [("note: x", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(a:1.2.3)(b:1,3)(c:1_0)(d:0x1)(e:１)(f:nano)", [("a:1.2.3b:1,3c:1_0d:0x1e:１f:nano", 1.1)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        (r"(a\:1.3)", [("a:1.3", 1.1)]),
        ("a :1.3", [("a :1.3", 1)]),
        ("a :nan", [("a :nan", 1)]),
        # escapes
        (r"\(a\) \[b\] \\ \:", [(r"(a) [b] \ :", 1)]),
        (r"\\(a)", [("\\", 1), ("a", 1.1)]),
        (r"(a\):2)", [("a)", 2)]),
        ("\\a \\n \\", [("\\a \\n \\", 1)]),
        # AND that separates nothing
        ("(a AND b)", [("a AND b", 1.1)]),
        ("(a :2 AND b)", [("a :2 AND b", 1.1)]),
        ("(a AND b) :2", [("a AND b", 1.1), (" :2", 1)]),
        ("a and b BAND C (x)AND d AND, \\AND", [("a and b BAND C ", 1), ("x", 1.1), ("AND d AND, \\AND", 1)]),
    ],
)
def test_weights(text, expected):
    assert pieces_of(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat AND a dog", [("a cat", 1), ("a dog", 1)]),
        ("a cat :1.2 AND a dog :-0.5", [("a cat", 1.2), ("a dog", -0.5)]),
        ("  a\t:2\nAND\u3000b : .5 \n", [("a", 2), ("b", 0.5)]),
        ("a AND b AND c :3", [("a", 1), ("b", 1), ("c", 3)]),
        ("a :1 :2 AND b", [("a :1", 2), ("b", 1)]),
        ("a:2 AND b 12:30", [("a:2", 1), ("b 12:30", 1)]),
        (r"a \:2 AND b :x", [("a :2", 1), ("b :x", 1)]),
        ("a :2AND b AND c", [("a :2AND b", 1), ("c", 1)]),
        ("(a AND b) AND (AND:1) and c", [("a AND b", 1), ("AND and c", 1)]),
    ],
)
def test_branches(text, expected):
    assert [(branch.text, branch.weight) for branch in parse(text)] == expected


def test_branches_have_their_own_pieces():
    first, second = parse("a (red:2) cat :0.5 AND [dog]")
    assert first == Branch((Piece("a ", 1.0), Piece("red", 2.0), Piece(" cat", 1.0)), 0.5)
    assert second == Branch((Piece("dog", 1 / 1.1),), 1.0)


GROUPS = st.recursive(
    st.sampled_from(["a", "b ", "é", "🟥", "c:d", r"\(", r"\]", r"\\", r"\:", ", "]),
    lambda inner: st.tuples(
        st.sampled_from([("(", ")"), ("[", "]"), ("(", ":0.5)"), ("(", ":-2.5)"), ("(", ":x)"), ("(", r"\:2)")]),
        st.lists(inner, max_size=4),
    ).map(lambda parts: parts[0][0] + "".join(parts[1]) + parts[0][1]),
    max_leaves=10,
)


def letters_of(source: str) -> list[tuple[str, float]]:
    """Each letter with its weight, by brute force: a closing bracket multiplies all letters since its opening one."""
    letters: list[tuple[str, float]] = []
    opened: list[int] = []
    index = 0
    while index < len(source):
        letter = source[index]
        if letter == "\\":
            index += 1
            letters.append((source[index], 1.0))
        elif letter in "([":
            opened.append(len(letters))
        elif letter in ")]":
            start = opened.pop()
            factor = 1.1 if letter == ")" else 1 / 1.1
            typed = next((text for text in (":0.5", ":-2.5") if source[:index].endswith(text)), "")
            if letter == ")" and typed:
                factor = float(typed[1:])
                del letters[-len(typed) :]
            letters[start:] = [(inside, weight * factor) for inside, weight in letters[start:]]
        else:
            letters.append((letter, 1.0))
        index += 1
    assert not opened
    return letters


@MANY
@given(source=st.lists(GROUPS, max_size=4).map("".join))
def test_weights_multiply_through_nesting(source):
    (branch,) = parse(source)
    expected = letters_of(source)
    found = [(letter, piece.weight) for piece in branch.pieces for letter in piece.text]
    assert [letter for letter, _ in found] == [letter for letter, _ in expected]
    np.testing.assert_allclose([weight for _, weight in found], [weight for _, weight in expected], rtol=1e-12)


@MANY
@given(text=TEXTS)
def test_any_text_is_parsed_or_refused_in_one_line(text):
    try:
        branches = parse(text)
    except UsageError as error:
        assert re.match(r"prompt, character \d+: ", str(error))
        assert len(str(error).splitlines()) == 1
        return
    for branch in branches:
        assert all(piece.text for piece in branch.pieces) or branch.pieces == (Piece("", 1.0),)
        assert all(left.weight != right.weight for left, right in zip(branch.pieces, branch.pieces[1:], strict=False))
        assert all(abs(weight) <= LARGEST for weight in [branch.weight, *(piece.weight for piece in branch.pieces)])


# Mistakes


@pytest.mark.parametrize(
    ("text", "character", "message"),
    [
        ("a (b", 3, '"(" is never closed; close it with ")", or write "\\(" for the character itself'),
        ("[a (b)", 1, '"[" is never closed; close it with "]", or write "\\[" for the character itself'),
        (r"(a\)", 1, '"(" is never closed; .*'),
        ("a ( b [", 3, '"(" is never closed; .*'),  # the first of several
        ("sad :(", 6, '"(" is never closed; .* or write "\\(" for the character itself'),
        ("a :)", 4, '")" closes nothing; pair .*, or write "\\)" for the character itself, as in ":\\)"'),
        ("b]", 2, '"]" closes nothing; pair the brackets, or write "\\]" .*'),
        ("a:1.3)", 6, '")" closes nothing; .*'),
        ("🟥(a]", 4, '"]" does not close the "(" at character 2; pair the brackets, or write "\\]" .*'),
        ("[a:1.3)", 7, '")" does not close the "[" at character 1; .*'),
        ("(a AND b", 1, '"(" is never closed; .*'),
        ("(a AND b) AND c]", 16, '"]" closes nothing; .*'),
        ("AND", 1, "AND has nothing before it; write a prompt on both sides, or (AND:1) for the word itself"),
        (" AND b", 2, "AND has nothing before it; .*"),
        ("a AND", 3, "AND has nothing after it; .*"),
        ("a AND AND b", 7, "AND has nothing before it; .*"),
        (":2 AND b", 4, "AND has nothing before it; .*"),
        ("a AND :2", 3, "AND has nothing after it; .*"),
        ("() AND b", 4, "AND has nothing before it; .*"),
        ("(a:b:nan)", 6, 'the weight nan is not a finite number; write one such as 1.3, or "\\:" where the colon .*'),
        ("(a:1e999)", 4, "the weight 1e999 is not a finite number; .*"),
        ("(a: -Infinity )", 5, "the weight -Infinity is not a finite number; .*"),
        ("(a:1e39)", 4, "the weight 1e39 is not a finite number; .*"),
        ("(a:" + "9" * 500 + ")", 4, "the weight " + "9" * 20 + " is not a finite number; .*"),
        ("a :inf AND b", 4, "the weight inf is not a finite number; .*"),
        ("a AND b :NaN", 10, "the weight NaN is not a finite number; .*"),
        ("((a:1e20):1e30)", 2, 'the weights multiply to 1e+50 in this "("; take brackets away or write smaller .*'),
        ("(" * 10_000 + ")" * 10_000, 931, "the weights multiply to .*"),
    ],
)
def test_mistakes_are_named(text, character, message):
    with pytest.raises(UsageError) as caught:
        parse(text)
    pattern = re.escape(f"prompt, character {character}: {message}").replace(r"\.\*", ".*")
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


# Size


def test_deep_nesting_needs_no_recursion():
    assert parse("([" * 10_000 + "a" + "])" * 10_000)[0].text == "a"
    assert pieces_of("[" * 10_000 + "a" + "]" * 10_000) == [("a", 0)]
    assert parse("(" * 10_000 + "a" + ":1)" * 10_000) == lone("a")


N = 30_000


@pytest.mark.parametrize(
    "text",
    [
        "([a:1] b:1)" * N,
        "([" * N + "a " * N + "])" * N,
        "(a:1" * N + ":1)" * N,
        "a :2 AND " * N + "b",
        ": " * N,
        " :1" * N,
        "\\" * N,
        "a" + " " * 10 * N + "AND" + " " * 10 * N + "b",
        "(a:" + "1" * 10 * N + "x)",
        "(a:" + "0" * 10 * N + ".)",
        "(a:0." + "1" * 10 * N + " " * 10 * N + "e)",
    ],
    ids=range(11),
)
def test_time_is_linear(text):
    """Quadratic time would be minutes at these lengths."""
    began = time.process_time()
    parse(text)
    assert time.process_time() - began < 10


# Chunks


def read(pieces, tokenizer) -> tuple[list[list[int]], list[list[float]]]:
    """The tokens and weights of each chunk, after checking all that surrounds them; the text must not hold EOS."""
    ids, weights = chunks(pieces, tokenizer)
    assert (ids.dtype, weights.dtype) == (np.int64, np.float32)
    assert ids.shape == weights.shape == (max(1, len(ids)), LENGTH)
    tokens, inner = [], []
    for row, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        end = row.index(tokenizer.eos)
        assert row[0] == tokenizer.bos
        assert set(row[end + 1 :]) <= {tokenizer.pad}
        assert {weight[0], *weight[end:]} == {1.0}
        tokens.append(row[1:end])
        inner.append(weight[1:end])
    return tokens, inner


WEIGHTED = st.lists(st.tuples(TEXTS, st.sampled_from([0.0, 0.5, 1.0, -2.0])), max_size=5).map(
    lambda pairs: [Piece(text.replace(EOS, BOS), weight) for text, weight in pairs]
)


@MANY
@given(pieces=WEIGHTED)
@example(pieces=[])
@example(pieces=[Piece("e", 0.5), Piece("\u0301 \u0301\x1c", 1.0)])
def test_chunks_hold_the_tokens_of_the_whole_text(tokenizer, pieces):
    text = "".join(piece.text for piece in pieces)
    tokens, _ = read(pieces, tokenizer)
    assert list(chain(*tokens)) == tokenizer.ids(text)
    if len(tokens) == 1:
        assert np.array_equal(chunks(pieces, tokenizer)[0], tokenizer.encode([text]))
    assert (len(tokens) == 1) == (len(tokenizer.ids(text)) + 2 <= LENGTH)


@MANY
@given(pairs=st.lists(st.tuples(st.text("abé9,🟥'", max_size=3), st.sampled_from([0.5, 1.0, 2.0])), max_size=9))
def test_tokens_weigh_what_their_words_do(tokenizer, pairs):
    pieces = [Piece(text + " ", weight) for text, weight in pairs]
    tokens, weights = read(pieces, tokenizer)
    each = [(token, weight) for text, weight in pairs for token in tokenizer.ids(text)]
    assert list(zip(chain(*tokens), chain(*weights), strict=True)) == each


@MANY
@given(words=st.lists(st.text("abé9,🟥'", min_size=1, max_size=5), max_size=12))
def test_words_are_cut_only_where_they_are_longer_than_a_chunk(tokenizer, words):
    tokens, _ = read([Piece(" ".join(words), 1.0)], tokenizer)
    ends = np.cumsum([len(chunk) for chunk in tokens]).tolist()
    room, start = LENGTH - 2, 0
    for length in [len(tokenizer.ids(word)) for word in words]:
        assert length > room or not any(start < end < start + length for end in ends)
        start += length
    assert all(tokens) or not words


@MANY
@given(text=PLAIN)
def test_plain_prompts_weigh_one(tokenizer, text):
    (branch,) = parse(text)
    assert (chunks(branch.pieces, tokenizer)[1] == 1).all()


def test_chunks_by_hand(tokenizer):
    a, b, comma = (tokenizer.ids(text)[0] for text in ("a", "b", ","))
    bos, eos = tokenizer.bos, tokenizer.eos
    ids, weights = chunks(parse("(a a a a:2) [b], (b:0) a")[0].pieces, tokenizer)
    assert ids.tolist() == [[bos, a, a, a, a, b, comma, eos], [bos, b, a, eos, eos, eos, eos, eos]]
    np.testing.assert_allclose(weights, [[1, 2, 2, 2, 2, 1 / 1.1, 1, 1], [1, 0, 1, 1, 1, 1, 1, 1]], rtol=1e-6)
    ids, weights = chunks(parse("a a a a a (b:2), b")[0].pieces, tokenizer)  # "b," is one word
    assert ids.tolist() == [[bos, a, a, a, a, a, eos, eos], [bos, b, comma, b, eos, eos, eos, eos]]
    assert weights.tolist() == [[1] * 8, [1, 2, 1, 1, 1, 1, 1, 1]]
    ids, _ = chunks([Piece("a " + "1" * 7, 1.0)], tokenizer)  # a word of 7 tokens fits no chunk
    assert ids[1].tolist() == [bos, *tokenizer.ids("11"), eos, eos, eos, eos, eos]


def test_specials_in_the_text_are_tokens_like_any(tokenizer):
    text = f"a {EOS} {BOS}b"
    assert np.array_equal(chunks([Piece(text, 1.0)], tokenizer)[0], tokenizer.encode([text]))


def test_a_weight_inside_a_word_changes_no_token(tokenizer):
    ids, weights = chunks(parse("un(happy:2)")[0].pieces, tokenizer)
    assert ids.tolist() == tokenizer.encode(["unhappy"]).tolist()
    assert weights[0, 1] == 1


def test_padding_is_the_one_of_the_tokenizer(tokenizer):
    other = Tokenizer(tokenizer.vocab, tokenizer.merges, LENGTH)
    other.pad = 0
    assert np.array_equal(chunks([Piece("a b", 1.0)], other)[0], other.encode(["a b"]))


def test_without_bos_a_chunk_begins_with_its_first_token(tokenizer):
    other = Tokenizer(tokenizer.vocab, tokenizer.merges, LENGTH)
    other.bos, eos = None, other.eos
    a, b = (tokenizer.ids(text)[0] for text in "ab")
    ids, weights = chunks([Piece("a a a a a ", 2.0), Piece("b b b a", 0.5)], other)
    assert ids.tolist() == [[a, a, a, a, a, b, b, eos], [b, a, eos, eos, eos, eos, eos, eos]]
    assert weights.tolist() == [[2, 2, 2, 2, 2, 0.5, 0.5, 1], [0.5, 0.5, 1, 1, 1, 1, 1, 1]]


def test_a_long_prompt_is_chunked(tokenizer):
    pieces = parse("(red circle:1.2) " * 20_000)[0].pieces
    ids, weights = chunks(pieces, tokenizer)
    assert (ids != tokenizer.eos).sum() - len(ids) == len(tokenizer.ids("red circle")) * 20_000
    assert np.isin(weights, np.array([1, 1.2], np.float32)).all()
