"""What people say instead of an emoji's official name: "a slice of pizza", "the flag of Chad", "a woman with dark skin".

Phrases come from the name, its keywords and templates, so that a model trained on them reads more than names. Some
pictures keep one phrase back, and some templates are kept back from all: what a model makes of those tells whether it
reads, or has only memorised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

COLOURS = {
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "brown",
    "black",
    "white",
    "pink",
    "grey",
    "light blue",
}
PLURAL = ("people", "men", "women", "eyes", "hands", "hearts", "notes", "glasses", "clothes", "sunglasses", "jeans")
MASS = ("ice", "coral", "garlic", "rice", "bread", "water", "hair", "fire", "fog", "money", "milk", "cheese", "meat")
PROPER = {"Japanese", "Statue", "Mrs.", "Santa", "Tokyo", "Mount"}
PLAIN = (
    "{a}",
    "the {x}",
    "a picture of {a}",
    "{x} emoji",
    "a drawing of {a}",
    "a little {x}",
    "{a}, please",
    "one {x}",
)
UNSEEN = ("an image that shows {a}", "can you draw {a} for me", "a small icon of {a}", "I want to see {a}")
KEYWORD = ("{k} {x}", "a {k} of {x}", "{x} with {k}", "{k} of {x}", "{x} and {k}", "{a}: {k}")
KEPT_BACK_ONE_IN = 4  # pictures that keep a phrase back


def article(x: str) -> str:
    """A noun phrase with its article, as far as a rule can tell."""
    first, last = x.partition(" ")[0], x.rpartition(" ")[2]
    if (
        last in PLURAL
        or x in MASS
        or (last.endswith(("s", "ing")) and not last.endswith(("ss", "us")))
        or x[:1].isdigit()
    ):
        return x
    return f"the {x}" if first in PROPER or x[:1].isupper() else f"{'an' if x[:1] in 'aeiou' else 'a'} {x}"


def seen(name: str, keywords: list[str]) -> list[str]:
    """The phrases of a picture, the most natural first; `keywords` hold no word of the name."""
    head, _, tail = name.partition(": ")
    if head == "flag":
        return [t.format(tail) for t in ("flag of {}", "the flag of {}", "{} flag", "the {} flag", "{}'s flag")]
    if head == "keycap":
        return [t.format(tail) for t in ("the key {}", "a button with {} on it", "{} key", "key labelled {}")]
    if tail:
        return list(persons(head, tail.split(", ")))
    fill = {"x": name, "a": article(name)}
    listed = [template.format(**fill) for template in PLAIN] + list(turned(name))
    return listed + [t.format(k=k, **fill) for k in keywords[:3] for t in KEYWORD]


def persons(head: str, parts: list[str]) -> Iterator[str]:
    """Of people: tones of skin, hair, and who is with whom."""
    tones = [part.removesuffix(" skin tone") for part in parts if part.endswith(" skin tone")]
    others = [part for part in parts if not part.endswith(" skin tone")]
    who = article(head) + "".join(
        f" {'who is' if part == 'bald' else 'with'} {part}" for part in others if head != part
    )
    if head in ("kiss", "couple with heart", "family"):
        who = f"{article(head)} of {' and '.join(map(article, others))}" if others else article(head)
    if not tones:
        yield from (who, f"a picture of {who}", who.removeprefix("a ").removeprefix("an "))
        return
    skin = " and ".join(tones)
    yield f"{who} with {skin} skin"
    yield f"{who}, {skin} skin"
    yield f"{who}, {skin} skin tone"
    yield f"a picture of {who} with {skin} skin"
    if len(tones) == 1 and not others:
        yield f"{article(f'{skin}-skinned {head}')}"
        yield f"{skin} {head}"


def turned(name: str) -> Iterator[str]:
    """The parts of a name in another order: "a heart that is red", "someone crying", "two hearts"."""
    for colour in COLOURS:
        if name.startswith(f"{colour} ") and (rest := name.removeprefix(f"{colour} ")):
            yield from (f"{article(rest)} that is {colour}", f"{rest} in {colour}", f"{article(rest)}, {colour}")
    if name.endswith(" face"):
        mood = name.removesuffix(" face")
        yield from (f"a face that looks {mood}", f"{mood} smiley", f"someone {mood}")
    if name.startswith("face "):
        yield from (f"a smiley {name.removeprefix('face ')}", f"someone {name.removeprefix('face ')}")
    if " with " in name:
        first, _, second = name.partition(" with ")
        yield from (f"{second} and {article(first)}", f"{article(first)} that has {second}")


def divided(stem: str, name: str, keywords: list[str]) -> tuple[list[str], str]:
    """(phrases to train on, the one that is kept back, or ""), chosen by a hash of the picture's name."""
    phrases = list(dict.fromkeys(phrase for phrase in seen(name, keywords) if phrase != name))
    number = int.from_bytes(hashlib.sha256(f"phrase {stem}".encode()).digest()[:8], "big")
    if number % KEPT_BACK_ONE_IN or not phrases:
        return phrases, ""
    number //= KEPT_BACK_ONE_IN
    if number % 2 and ": " not in name:
        return phrases, UNSEEN[number // 2 % len(UNSEEN)].format(a=article(name))
    return [phrase for phrase in phrases if phrase != (kept := phrases[number // 2 % len(phrases)])], kept
