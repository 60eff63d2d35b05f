"""Phrases for emoji: what they say, that none names two pictures, and that what is kept back is never trained on."""

from __future__ import annotations

import pytest
from emoji import Annotations, Emoji, paraphrased
from phrases import UNSEEN, article, divided, seen


@pytest.mark.parametrize(
    ("name", "keywords", "phrase"),
    [
        ("pizza", ["cheese", "slice"], "a slice of pizza"),
        ("red heart", [], "a heart that is red"),
        ("grinning face", [], "someone grinning"),
        ("flag: Chad", [], "the flag of Chad"),
        ("keycap: 7", [], "a button with 7 on it"),
        ("woman: dark skin tone", [], "a woman with dark skin"),
        ("woman: medium-dark skin tone, bald", [], "a woman who is bald with medium-dark skin"),
        ("kiss: woman, man", [], "a kiss of a woman and a man"),
        ("cat with tears of joy", [], "a cat that has tears of joy"),
    ],
)
def test_what_people_say(name: str, keywords: list[str], phrase: str) -> None:
    assert phrase in seen(name, keywords)


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [("apple", "an apple"), ("two hearts", "two hearts"), ("ice", "ice"), ("cactus", "a cactus"), ("glass", "a glass")],
)
def test_articles(noun: str, phrase: str) -> None:
    assert article(noun) == phrase


def test_what_is_kept_back_is_never_trained_on() -> None:
    both = [divided(str(i), "red apple", ["fruit"]) for i in range(400)]
    kept = [back for _, back in both if back]
    assert 60 < len(kept) < 140  # one in four
    assert all(back not in phrases for phrases, back in both)
    unseen = {template.format(a="a red apple") for template in UNSEEN}
    assert {back in unseen for back in kept} == {True, False}
    assert not any(unseen & set(phrases) for phrases, _ in both)


def test_a_phrase_of_two_pictures_is_of_neither() -> None:
    names = ["red apple", "red apple", "pear"]
    found = [Emoji(chr(97 + i), name, b"", (name,)) for i, name in enumerate(names)]
    whole, back = paraphrased(found, Annotations({}, {}, {}))
    assert [len(each.captions) > 1 for each in whole] == [False, False, True]
    captions = [caption.lower() for each in whole for caption in each.captions[1:]]
    assert len(set(captions)) == len(captions)
    assert all(each.name == each.captions[0] and each.name.lower() not in captions for each in back)
