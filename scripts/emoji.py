"""Debian's colour emoji as a folder of captioned PNG files, with a held-out set of compositions.

`python scripts/emoji.py OUT` reads the bitmaps of fonts-noto-color-emoji and the English names and keywords of
unicode-cldr-core and writes OUT/train and OUT/heldout, each with images and a metadata.jsonl. One sequence of code
points is one glyph; glyphs with equal pixels become one image. Held out is one in twenty of the compositions of skin
tone, gender and role, every part of which is seen in training in other company. With `--phrases` the captions are also
what people say instead of a name (`scripts/phrases.py`), and OUT/paraphrased has training images under phrases that
training never sees. Needs fontTools and Pillow (the `dev`
extra).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

from phrases import divided
from PIL import Image

from tinydiff.errors import DataError, ResourceError, UsageError, UserError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
INSTALL = "apt-get install fonts-noto-color-emoji unicode-cldr-core"

JOINER, KEYCAP, CANCEL, BLACK_FLAG, RIGHT = "\u200d", "\u20e3", "\U000e007f", "\U0001f3f4", "\u200d\u27a1"
PRESENTATION = "\ufe0f"  # CLDR leaves it out of its keys, and so does everything here
TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
PEOPLE = {"\U0001f468": "man", "\U0001f469": "woman", "\U0001f9d1": "person"}
SIGNS = {"\u2642": "man", "\u2640": "woman"}
REGIONAL = range(0x1F1E6, 0x1F200)
TONE_WEIGHT = 0.4  # six near-equal pictures for one idea
HELD_OUT_ONE_IN = 20

# Emoji 15 and 15.1, which CLDR 41 does not know yet
NEWER = {
    "\U0001f6dc": "wireless",
    "\U0001fa75": "light blue heart",
    "\U0001fa76": "grey heart",
    "\U0001fa77": "pink heart",
    "\U0001fa87": "maracas",
    "\U0001fa88": "flute",
    "\U0001faad": "folding hand fan",
    "\U0001faae": "hair pick",
    "\U0001faaf": "khanda",
    "\U0001fabb": "hyacinth",
    "\U0001fabc": "jellyfish",
    "\U0001fabd": "wing",
    "\U0001fabf": "goose",
    "\U0001face": "moose",
    "\U0001facf": "donkey",
    "\U0001fada": "ginger root",
    "\U0001fadb": "pea pod",
    "\U0001fae8": "shaking face",
    "\U0001faf7": "leftwards pushing hand",
    "\U0001faf8": "rightwards pushing hand",
    "\U0001f642\u200d\u2194": "head shaking horizontally",
    "\U0001f642\u200d\u2195": "head shaking vertically",
    "\u26d3\u200d\U0001f4a5": "broken chain",
    "\U0001f426\u200d\u2b1b": "black bird",
    "\U0001f426\u200d\U0001f525": "phoenix",
    "\U0001f344\u200d\U0001f7eb": "brown mushroom",
    "\U0001f34b\u200d\U0001f7e9": "lime",
    "\U0001f9d1\u200d\U0001f9d2": "family: adult, child",
    "\U0001f9d1\u200d\U0001f9d2\u200d\U0001f9d2": "family: adult, child, child",
    "\U0001f9d1\u200d\U0001f9d1\u200d\U0001f9d2": "family: adult, adult, child",
    "\U0001f9d1\u200d\U0001f9d1\u200d\U0001f9d2\u200d\U0001f9d2": "family: adult, adult, child, child",
}


@dataclass(frozen=True)
class Annotations:
    """CLDR's English: names and keywords by sequence, and names of subdivisions ("usca": "California")."""

    names: dict[str, str]
    keywords: dict[str, list[str]]
    subdivisions: dict[str, str]


@dataclass(frozen=True)
class Emoji:
    """One picture: its code points, its name, further captions, and its PNG as the font holds it."""

    sequence: str
    name: str
    png: bytes = field(repr=False)
    captions: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        return "-".join(f"{ord(c):x}" for c in self.sequence)

    @property
    def toned(self) -> bool:
        return has_tone(self.sequence)


def has_tone(sequence: str) -> bool:
    """Whether a skin tone modifies something (a lone swatch of a tone does not count)."""
    return any(tone in sequence[1:] for tone in TONES)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_cldr(root: Path) -> Annotations:
    """The annotations under CLDR's `common` folder. Raises DataError naming the package when they are missing."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for part in ("annotations", "annotationsDerived"):
        for node in _xml(root / part / "en.xml").iter("annotation"):
            sequence = node.get("cp", "").replace(PRESENTATION, "")
            if node.get("type") == "tts":
                names[sequence] = (node.text or "").strip()
            else:
                keywords[sequence] = [word.strip() for word in (node.text or "").split("|")]
    regions = {n.get("type", ""): n.text or "" for n in _xml(root / "subdivisions" / "en.xml").iter("subdivision")}
    return Annotations(names, keywords, regions)


def _xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise DataError(f"no CLDR annotations at {path}; {INSTALL}, or name CLDR's common folder with --cldr") from None
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path} is not a CLDR file ({error}); {INSTALL}") from None


def _open_font(path: Path):
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError:
        raise UsageError("scripts/emoji.py needs fontTools; pip install fonttools") from None
    if not path.is_file():
        raise DataError(f"no emoji font at {path}; {INSTALL}, or name the file with --font")
    try:
        font = TTFont(BytesIO(path.read_bytes()), lazy=True)
    except (OSError, TTLibError) as error:
        raise DataError(f"{path} is not a font ({error}); {INSTALL}") from None
    if missing := {"CBDT", "GSUB", "cmap"} - set(font.keys()):
        raise DataError(f"{path} has no {min(missing)} table; use Debian's NotoColorEmoji.ttf: {INSTALL}")
    return font


def _sequences(font) -> dict[str, list[str]]:
    """{glyph name: every sequence the font turns into it}, by cmap and then by the ligatures of GSUB."""
    characters = {name: chr(code) for code, name in sorted(font.getBestCmap().items(), reverse=True)}
    found = {name: [character] for name, character in characters.items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable if lookup.LookupType == 4 else ():
            for first, ligatures in table.ligatures.items():
                for ligature in ligatures:
                    parts = [first, *ligature.Component]
                    if all(part in characters for part in parts):
                        sequence = "".join(characters[part] for part in parts)
                        found.setdefault(ligature.LigGlyph, []).append(sequence.replace(PRESENTATION, ""))
    return found


# ---- naming --------------------------------------------------------------------------------------------------------


def name_of(sequence: str, cldr: Annotations) -> tuple[int, str]:
    """(rank, name) of a sequence: the lower the rank, the better the source of the name."""
    for rank, rule in enumerate((_listed, _facing_right, _with_tone, _subdivision)):
        if name := rule(sequence, cldr):
            return rank, name
    parts = [unicodedata.name(c, f"u+{ord(c):04x}").lower() for c in sequence if c != JOINER]
    return 9, " ".join(parts)


def _listed(sequence: str, cldr: Annotations) -> str | None:
    return cldr.names.get(sequence) or NEWER.get(sequence)


def _facing_right(sequence: str, cldr: Annotations) -> str | None:
    """Emoji 15.1: "woman walking: dark skin tone" plus an arrow is "woman walking facing right: dark skin tone"."""
    if not sequence.endswith(RIGHT):
        return None
    name = _listed(sequence.removesuffix(RIGHT), cldr)
    role, colon, tone = (name or "").partition(":")
    return f"{role} facing right{colon}{tone}" if name else None


def _with_tone(sequence: str, cldr: Annotations) -> str | None:
    tones = [c for c in sequence if c in TONES]
    bare = "".join(c for c in sequence if c not in TONES)
    if len(tones) != 1 or not (name := _listed(bare, cldr)):
        return None
    return f"{name}: {cldr.names.get(tones[0], 'skin tone')}"


def _subdivision(sequence: str, cldr: Annotations) -> str | None:
    if not (sequence.startswith(BLACK_FLAG) and sequence.endswith(CANCEL)):
        return None
    code = "".join(chr(ord(c) - 0xE0000) for c in sequence[1:-1])
    country = "".join(chr(ord(c) - ord("a") + REGIONAL[0]) for c in code[:2])
    if code not in cldr.subdivisions or country not in cldr.names:
        return None
    return f"flag: {cldr.subdivisions[code]}, {cldr.names[country].removeprefix('flag: ')}"


def _is_fragment(sequence: str) -> bool:
    """Not an emoji of its own: a flag letter, the empty keycap, the flag of nowhere."""
    return (
        sequence == KEYCAP
        or set(sequence) == {BLACK_FLAG, CANCEL}
        or (len(sequence) == 1 and ord(sequence) in REGIONAL)
    )


def keyword_captions(sequence: str, name: str, cldr: Annotations) -> list[str]:
    """At most two captions of three keywords each; none for skin tones, whose keywords do not tell them apart."""
    if has_tone(sequence):
        return []
    words = [word for word in cldr.keywords.get(sequence, []) if word.lower() != name.lower()]
    captions = [", ".join(words[start : start + 3]) for start in (0, 3)]
    return [text for text in captions if text]


# ---- collecting ----------------------------------------------------------------------------------------------------


def collect(font_path: Path, cldr: Annotations) -> list[Emoji]:
    """Every distinct picture of the font, ordered by code points, with unique names and captions."""
    font = _open_font(font_path)
    sequences, strikes = _sequences(font), font["CBDT"].strikeData[0]
    by_pixels: dict[bytes, list[Emoji]] = {}
    for glyph in sorted(strikes):
        for emoji in _emoji_of(sequences.get(glyph, []), strikes[glyph].imageData, cldr):
            by_pixels.setdefault(hashlib.sha256(emoji.png).digest(), []).append(emoji)
    found = sorted((_merge(same) for same in by_pixels.values()), key=lambda emoji: emoji.sequence)
    return list(_with_keywords(_renamed(found), cldr))


def _emoji_of(sequences: list[str], png: bytes, cldr: Annotations) -> list[Emoji]:
    """The readings of one glyph under the best source of names: usually one, several for flags that are alike."""
    ranked = sorted((*name_of(sequence, cldr), sequence) for sequence in sequences if not _is_fragment(sequence))
    if not ranked:
        return []
    best = ranked[0][0]
    alike = [Emoji(sequence, name, png) for rank, name, sequence in ranked if rank == best]
    return alike if best == 0 else alike[:1]


def _merge(same: list[Emoji]) -> Emoji:
    """Equal pictures as one, under the shortest name; the other names become captions."""
    first, *others = sorted(same, key=lambda emoji: (len(emoji.name), emoji.name))
    return replace(first, captions=tuple(other.name for other in others))


def _renamed(found: list[Emoji]) -> Iterator[Emoji]:
    """Equal names, if any, get their code points behind them."""
    counts = Counter(emoji.name.lower() for emoji in found)
    for emoji in found:
        yield emoji if counts[emoji.name.lower()] == 1 else replace(emoji, name=f"{emoji.name} ({emoji.stem})")


def _with_keywords(found: Iterable[Emoji], cldr: Annotations) -> Iterator[Emoji]:
    """Adds the keyword captions that describe one picture only ("flag" alone would stand for 258)."""
    found = list(found)
    keywords = [keyword_captions(emoji.sequence, emoji.name, cldr) for emoji in found]
    names = [name for emoji in found for name in (emoji.name, *emoji.captions)]
    counts = Counter(text.lower() for text in [*names, *(text for texts in keywords for text in texts)])
    for emoji, texts in zip(found, keywords, strict=True):
        unique = [text for text in texts if counts[text.lower()] == 1]
        yield replace(emoji, captions=(emoji.name, *emoji.captions, *unique))


# ---- the split -----------------------------------------------------------------------------------------------------


def composition(sequence: str, gendered: frozenset[str]) -> tuple[str, str, str] | None:
    """(role, gender, tone) of one person with one skin tone, else None. `gendered`: roles that take a gender sign."""
    tones = [c for c in sequence if c in TONES]
    bare = "".join(c for c in sequence if c not in TONES)
    if len(tones) != 1 or not bare:
        return None
    if bare[0] in PEOPLE and (len(bare) == 1 or bare[1] == JOINER):
        alone = not any(person in bare[1:] for person in PEOPLE)
        return (bare[2:], PEOPLE[bare[0]], tones[0]) if alone else None
    for sign, gender in SIGNS.items():
        if JOINER + sign in bare:
            return bare.replace(JOINER + sign, ""), gender, tones[0]
    return (bare, "person", tones[0]) if bare in gendered else None


def split(found: list[Emoji]) -> tuple[list[Emoji], list[Emoji]]:
    """(train, held out): of the compositions one in twenty by the hash of the sequence, if training has every part."""
    signs = [JOINER + sign for sign in SIGNS]
    bare = {"".join(c for c in emoji.sequence if c not in TONES) for emoji in found}
    gendered = frozenset(text.replace(sign, "") for text in bare for sign in signs if sign in text)
    parts = {emoji.sequence: composition(emoji.sequence, gendered) for emoji in found}
    chosen = {sequence for sequence, part in parts.items() if part and _picked(sequence)}
    seen = {place for sequence, part in parts.items() if sequence not in chosen for place in enumerate(part or ())}
    held = {sequence for sequence in chosen if seen.issuperset(enumerate(parts[sequence] or ()))}
    return [e for e in found if e.sequence not in held], [e for e in found if e.sequence in held]


def _picked(sequence: str) -> bool:
    return int.from_bytes(hashlib.sha256(sequence.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


# ---- phrases ----------------------------------------------------------------------------------------------------------


def paraphrased(found: list[Emoji], cldr: Annotations) -> tuple[list[Emoji], list[Emoji]]:
    """(the same with phrases for further captions, those that keep a phrase back under that name)."""
    parts = [divided(emoji.stem, emoji.name, _other_words(emoji, cldr)) for emoji in found]
    captions = (text for emoji in found for text in emoji.captions)
    counts = Counter(text.lower() for text in (*captions, *(text for each, kept in parts for text in (*each, kept))))
    whole, back = list[Emoji](), list[Emoji]()
    for emoji, (phrases, kept) in zip(found, parts, strict=True):
        whole.append(replace(emoji, captions=(*emoji.captions, *(p for p in phrases if counts[p.lower()] == 1))))
        if kept and counts[kept.lower()] == 1:
            back.append(replace(emoji, name=kept, captions=(kept,)))
    return whole, back


def _other_words(emoji: Emoji, cldr: Annotations) -> list[str]:
    """Keywords that say something which the name does not."""
    words = [] if emoji.toned else cldr.keywords.get(emoji.sequence, [])
    return [word for word in words if not set(word.lower().split()) & set(emoji.name.lower().split())]


# ---- writing -------------------------------------------------------------------------------------------------------


def draw(png: bytes, size: int) -> Image.Image:
    """A strike of the font centred on a white square and resized to `size` pixels a side, RGB."""
    glyph = Image.open(BytesIO(png), formats=["PNG"]).convert("RGBA")
    side = max(glyph.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def write(folder: Path, parts: dict[str, list[Emoji]], size: int) -> None:
    """Writes folder/<part>/*.png and metadata.jsonl for every part; `folder` appears whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists; remove it or name another folder")
    temporary = folder.absolute().with_name(f".tmp-{folder.name}-{os.getpid()}")
    total = sum(map(len, parts.values()))
    done = 0
    try:
        for part, found in parts.items():
            done = _write_part(temporary / part, found, size, done, total)
        os.replace(temporary, folder)
    except OSError as error:
        reason = f"cannot write {error.filename or folder}: {error.strerror}"
        raise ResourceError(f"{reason}; make room or name another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_part(folder: Path, found: list[Emoji], size: int, done: int, total: int) -> int:
    folder.mkdir(parents=True)
    for emoji in found:
        draw(emoji.png, size).save(folder / f"{emoji.stem}.png", optimize=True)
        _progress(done := done + 1, total)
    lines = [json.dumps(_metadata(emoji), ensure_ascii=False) + "\n" for emoji in found]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return done


def _metadata(emoji: Emoji) -> dict[str, object]:
    weight = TONE_WEIGHT if emoji.toned else 1.0
    return {
        "file_name": f"{emoji.stem}.png",
        "text": emoji.name,
        "captions": list(emoji.captions),
        "weight": weight,
    }


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 50 == 0 or done == total):
        print(f"\r{done}/{total} images", end="\n" if done == total else "", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command: writes the folder, prints the counts, returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/emoji.py", description="Colour emoji as a folder of captioned images"
    )
    parser.add_argument("out", type=Path, help="folder to write: OUT/train and OUT/heldout")
    parser.add_argument("--size", type=int, default=128, help="pixels a side (128)")
    parser.add_argument("--phrases", action="store_true", help="captions in other words too, some of them kept back")
    parser.add_argument("--font", type=Path, default=FONT, help=f"colour bitmap font ({FONT})")
    parser.add_argument("--cldr", type=Path, default=CLDR, help=f"CLDR's common folder ({CLDR})")
    options = parser.parse_args(arguments)
    try:
        if not 8 <= options.size <= 1024:
            raise UsageError(f"--size {options.size} is out of range; give 8 to 1024 pixels")
        cldr = read_cldr(options.cldr)
        train, held_out = split(collect(options.font, cldr))
        train, kept = paraphrased(train, cldr) if options.phrases else (train, [])
        parts = {"train": train, "heldout": held_out} | ({"paraphrased": kept} if kept else {})
        write(options.out, parts, options.size)
    except UserError as error:
        print(f"emoji.py: {error}", file=sys.stderr)
        return error.code
    print(f"{options.out}: {len(train)} training images, {len(held_out)} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
