"""Prompts as people and other programs write them: every bad line is one line, memory is bounded, other syntax is named."""

from __future__ import annotations

import io
import time
import tracemalloc
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from fake_backend import REQUEST, Fake

from tinydiff.checkpoints import single_file
from tinydiff.drawing import Job, Mistakes, draw, jobs
from tinydiff.editing import Edit
from tinydiff.errors import DivergedError, UsageError
from tinydiff.reading import ENDLESS, MAX_LINE, MAX_PROMPT, Line, Reader, clean, lines_of, understood
from tinydiff.text.labels import Labels
from tinydiff.text.prompts import FOREIGN, foreign
from tinydiff.text.tokenizer import Tokenizer

# ---- stdin -----------------------------------------------------------------------------------------------------------


class Endless(io.RawIOBase):
    """A stream of one byte, for ever or for `size` bytes, and then `rest`. It counts what is read."""

    def __init__(self, byte: bytes, size: int, rest: bytes = b""):
        self.byte, self.left, self.rest, self.read_so_far = byte, size, io.BytesIO(rest), 0

    def readline(self, size: int | None = -1) -> bytes:
        assert size is not None and 0 < size <= MAX_LINE
        taken = min(size, self.left)
        self.left -= taken
        self.read_so_far += taken
        return self.byte * taken + (self.rest.readline(size - taken) if taken < size else b"")


def lines(data: bytes) -> list[Line]:
    return list(lines_of(io.BytesIO(data)))


def test_lines_keep_their_numbers() -> None:
    assert lines(b"\xef\xbb\xbfred\r\n\n \t\n\x1b[31mblue\x1b[0m\ngreen") == [
        Line(1, "red"),
        Line(4, "blue"),
        Line(5, "green"),
    ]
    assert lines(b"") == lines(b"\n\n\0\0\n") == []


@pytest.mark.parametrize("length", [MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, 3 * MAX_LINE, 3 * MAX_LINE + 7])
@pytest.mark.parametrize("byte", [b"x", b"\0", b" ", b"\xff", "é".encode()])
def test_a_long_line_is_one_line_and_the_next_ones_are_whole(byte: bytes, length: int) -> None:
    first, *rest = lines(b"a\n" + (byte * length)[:length] + b"\nnext\r\nlast")
    texts = {line.number: line.text for line in rest}
    assert first == Line(1, "a") and texts[3] == "next" and texts[4] == "last"
    blank = byte in b"\0 " and length < MAX_LINE
    assert (2 not in texts) == blank and (blank or len(texts[2]) > MAX_PROMPT)


def test_a_line_without_an_end_takes_no_memory() -> None:
    stream = Endless(b"\0", 2**62)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="^line 1 of stdin: 256 MiB without an end"):
            list(lines_of(stream))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20 and stream.read_so_far <= ENDLESS + MAX_LINE
    assert [line.number for line in lines_of(Endless(b"\0", ENDLESS // 2, b"\nred\n"))] == [1, 2]


def test_a_prompt_is_refused_where_it_is_too_long() -> None:
    understood("x" * MAX_PROMPT)
    for prompt, toward in (("x" * (MAX_PROMPT + 1), None), ("x", "y" * (MAX_PROMPT + 1))):
        with pytest.raises(UsageError, match=f"over {MAX_PROMPT}; shorten it") as caught:
            understood(prompt, toward)
        assert len(str(caught.value)) < 200


# ---- bad lines -------------------------------------------------------------------------------------------------------


def drawn(texts: list[str], size: int, count: int = 1, fake: Fake | None = None) -> tuple[dict[int, int], Mistakes]:
    """{image: its first grey level} of lines of stdin with the fake model, and what was wrong."""
    mistakes = Mistakes()
    given: Iterator[Line] = (Line(number, text) for number, text in enumerate(texts, 1))
    images = draw(fake or Fake(), jobs(given, 7, count), "", REQUEST, size, mistakes=mistakes)
    return {image.index: int(image.pixels.flat[0]) for image in images}, mistakes


GOOD = ["a", "bb", "ccc", "dddd", "eeeee"]


BAD = {"(a": 2, "a AND": 2, "x" * (MAX_PROMPT + 1): 2, "(a:1e999)": 2, f"({'a' * 300}:3e38)": 5}


@pytest.mark.parametrize("bad", BAD, ids=lambda text: text[:10])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_one_bad_line_is_said_and_the_others_are_as_they_were(
    bad: str, size: int, place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found, mistakes = drawn([*GOOD[:place], bad, *GOOD[place + 1 :]], size, count=2)
    said = capsys.readouterr().err
    wanted, none = drawn(GOOD, size, count=2)
    assert found == {index: level for index, level in wanted.items() if index // 2 != place}
    assert said.count("\n") == 1 and said.startswith(f"tinydiff: line {place + 1} of stdin: ") and len(said) < 500
    assert (mistakes.code(), none.code()) == (BAD[bad], 0)


def test_the_code_is_that_of_the_first_bad_line() -> None:
    """Though the second one is met first: what is wrong with the first only its network call shows."""
    first, second = f"({'a' * 300}:3e38)", "(a"
    assert drawn(["a", first, second, "b"], 4)[1].code() == 5
    assert drawn(["a", second, first, "b"], 4)[1].code() == 2


def test_the_only_prompt_is_refused_as_such() -> None:
    for prompt, error in (("(a", UsageError), (f"({'a' * 300}:3e38)", DivergedError)):
        with pytest.raises(error):
            list(draw(Fake(), iter([Job(0, prompt, 1)]), "", REQUEST, 1))
    with pytest.raises(UsageError, match="never closed"):
        list(draw(Fake(), iter([Job(0, "a", 1, line=1)]), "(blurry", REQUEST, 1))


class Classes(Fake):
    tokenizers: ClassVar = {"labels": Labels(["cat", "dog, hound"], 1000)}

    def encode_text(self, ids):
        (ids,) = ids.values()
        return {"encoder_hidden_states": np.repeat(ids[:, :, None], 2, axis=2).astype(np.float32) / 100}


LABELS = {
    "9" * 5000: "no class",
    "x" * 5000: "no class",
    "1000": "no class",
    "²": "no class",
    "(cat:2)": "a label alone",
}


@pytest.mark.parametrize("bad", LABELS, ids=lambda text: text[:10])
def test_what_is_no_label_is_one_short_line(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, mistakes = drawn(["cat", bad, "hound", "7", "000000000000000007", "٧"], 3, fake=Classes())
    said = capsys.readouterr().err
    assert mistakes.code() == 2 and sorted(found) == [0, 2, 3, 4, 5] and found[3] == found[4] == found[5]
    assert said.count("\n") == 1 and said.startswith("tinydiff: line 2 of stdin: ") and LABELS[bad] in said
    assert len(said) < 500


# ---- other programs' syntax ------------------------------------------------------------------------------------------

EXAMPLES = {
    "a break between chunks": ["a cat BREAK a dog", "a,BREAK,b"],
    "a prompt that changes from step to step": ["[cat:dog:0.5]", "[cat::10]", "[ (a:1.2) : 0.25 ]", "[cat:.5]"],
    "words that take turns": ["[cat|dog]", "a [b|c|d] e"],
    "a choice or emphasis in braces": ["{cat|dog}", "{2$$a|b|c}", "{{masterpiece}}", "a ${x} b"],
    "a wildcard": ["__colour__ cat", "a __animals/cats__"],
    "a network to load": ["<lora:style:0.8> cat", "<hypernet:x:1>", "<lyco:a b:1>"],
    "a learnt word": ["a <cat-toy>", "embedding:EasyNegative, cat", "(embedding:x.pt:1.2)"],
    "emphasis by plus or minus signs": ["a cat++", "(a cat)+", "dog---, x", '("a b")--'],
    "a call": ['("a", "b").blend(0.5, 0.5)', "(a).and(b)"],
    "an option": ["a cat --ar 16:9", "cat --n blurry --s 20"],
    "a weight after two colons": ["hot::2 dog", "a ::-0.5"],
    "a weight outside brackets": ["a cat:1.3, b", "(a cat):1.3", "cat: 0.8 dog"],
    "a comment": ["# landscapes"],
    "a region": ["a ADDCOL b", "x AND_PERP y"],
}


PLAIN = [
    "woman firefighter: light skin tone",
    "a (red:1.3) heart, [small] cat, ((big)) dog AND rainbow :0.5",
    r"\[a\:b\:0.5\] \(x\) smile :\)",
    "at 12:30, 16:9, f/1.8, 1:1.85, ratio 2:3.",
    "well-known A+ grade -- a dash, __init, x--y, C+",
    "a < b > c, 5<6, <3, a | b, 100%, #1, $5, 'q', \"r\"",
    "Break a leg, BREAKFAST, regional AND b",
    "猫 مرحبا 👩\u200d🚒 é",
]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return single_file.tokenizer("clip")


def test_every_kind_has_examples() -> None:
    assert EXAMPLES.keys() == FOREIGN.keys()


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in EXAMPLES.items() for text in texts])
def test_the_syntax_of_other_programs_is_named_once(
    kind: str, text: str, clip: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = Reader({"text_encoder": clip})
    for prompt in (text, f"more {text}"):
        reader.read(prompt)
    said = [line for line in capsys.readouterr().err.splitlines() if "read as plain words" in line]
    assert sum(f": {kind} in other programs" in line for line in said) == 1


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_is_not(text: str) -> None:
    assert list(foreign(text)) == []


def test_a_word_that_the_model_has_learnt_is_its_own(
    clip: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt = copy(clip)
    monkeypatch.setattr(learnt, "spans", lambda text: ([1], [0]) if text == "<cat-toy>" else clip.spans(text))
    reader = Reader({"text_encoder": learnt})
    reader.read("a <cat-toy> b")
    assert "learnt word" not in capsys.readouterr().err
    reader.read("a <cat-toy> <dog-toy>")
    assert "'<dog-toy>' is read as plain words" in capsys.readouterr().err


@pytest.mark.parametrize(
    "piece",
    [
        "[",
        "[:",
        "[1:",
        "{",
        "<",
        "<a:",
        "__",
        "_",
        "a",
        ")",
        "+",
        "-",
        "::",
        ":1",
        ":1.",
        "embedding:",
        "[|",
        " --a",
        "\\[",
    ],
)
def test_looking_for_it_takes_linear_time(piece: str) -> None:
    """Quadratic time would be minutes at this length."""
    text = piece * (300_000 // len(piece))
    began = time.process_time()
    for _ in foreign(text):
        pass
    assert time.process_time() - began < 5


# ---- what has no effect ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "negative", "says"),
    [
        ({"cfg_scale": 1.0}, "blurry", "-n is unused"),
        ({"cfg_scale": 0.0, "cfg_max": 1.0}, "blurry", "-n is unused"),
        ({"cfg_scale": 1.0, "cfg_max": 2.0}, "blurry", ""),
        ({"cfg_scale": 3.0}, "blurry", ""),
        ({"cfg_scale": 1.0}, "", ""),
    ],
)
def test_a_negative_prompt_without_guidance_is_said_to_be_unused(
    given: dict[str, float], negative: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    list(draw(Fake(), iter([Job(0, "a", 1)]), negative, replace(REQUEST, **given), 1))
    assert says in said if (said := capsys.readouterr().err) else not says


def test_a_strength_of_less_than_a_step_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    fake.encode_image = lambda pixels: np.zeros((len(pixels), 6, 4, 4), np.float32)
    for strength, says in ((0.2, "--strength 0.2 is less than one of 4 steps"), (0.25, "")):
        list(draw(fake, iter([Job(0, "a", 1)]), "", REQUEST, 1, Edit(np.zeros((8, 8, 3), np.uint8), strength)))
        assert says in said if (said := capsys.readouterr().err) else not says


def test_cleaning() -> None:
    assert clean("a\x1b[31mb\x00c\u202e d\n") == "a b c d" and clean("\x01 \u200b\n") == ""
