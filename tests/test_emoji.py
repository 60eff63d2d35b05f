"""The emoji script: names, the split, the images, and its behaviour as a command."""

from __future__ import annotations

import importlib.util
import json
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from interpreters import ROOT
from PIL import Image

from tinydiff.data.folder import FolderSource
from tinydiff.errors import DataError


def load(name: str) -> ModuleType:
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


emoji = load("emoji")


digits = load("digits")


LIGHT, MEDIUM, DARK = emoji.TONES[0], emoji.TONES[2], emoji.TONES[4]


MAN, WOMAN, PERSON = "👨", "👩", "🧑"


JOINER = emoji.JOINER


def cldr() -> object:
    tones = dict(zip(emoji.TONES, ("light", "medium-light", "medium", "medium-dark", "dark"), strict=True))
    known = {tone: f"{name} skin tone" for tone, name in tones.items()}
    known |= {"❤": "red heart", "🏃": "person running", f"🏃{JOINER}♀": "woman running", "🇺🇸": "flag: United States"}
    keywords = {"❤": ["heart", "love", "red", "red heart", "card suit"], "🏃": ["running"]}
    return emoji.Annotations(known, keywords, {"usca": "California"})


def png(colour: tuple[int, int, int], size: tuple[int, int] = (136, 128)) -> bytes:
    """A glyph: a square of `colour` in the middle of a transparent strike."""
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    picture.paste((*colour, 255), (size[0] // 2 - 34, size[1] // 2 - 34, size[0] // 2 + 34, size[1] // 2 + 34))
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


# ---- naming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence", "name"),
    [
        ("❤", "red heart"),
        (f"🏃{JOINER}♀{JOINER}➡", "woman running facing right"),
        (f"🏃{DARK}", "person running: dark skin tone"),
        ("\U0001fae8", "shaking face"),
        ("\U0001faf7" + LIGHT, "leftwards pushing hand: light skin tone"),
        ("🏴" + "".join(chr(0xE0000 + ord(c)) for c in "usca") + emoji.CANCEL, "flag: California, United States"),
        ("7", "digit seven"),
    ],
)
def test_names(sequence: str, name: str) -> None:
    assert emoji.name_of(sequence, cldr())[1] == name


def test_keywords_leave_out_the_name() -> None:
    assert emoji.keyword_captions("❤", "red heart", cldr()) == ["heart, love, red", "card suit"]
    assert emoji.keyword_captions("🏃" + DARK, "person running: dark skin tone", cldr()) == []


# ---- the split -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence", "parts"),
    [
        (f"{WOMAN}{DARK}{JOINER}🚒", ("🚒", "woman", DARK)),
        (f"{PERSON}{LIGHT}{JOINER}🦰", ("🦰", "person", LIGHT)),
        (f"{MAN}{LIGHT}", ("", "man", LIGHT)),
        (f"🏃{MEDIUM}{JOINER}♀", ("🏃", "woman", MEDIUM)),
        (f"🏃{MEDIUM}", ("🏃", "person", MEDIUM)),
        (f"👋{MEDIUM}", None),
        (f"{WOMAN}{JOINER}🚒", None),
        (f"{WOMAN}{DARK}{JOINER}🤝{JOINER}{MAN}{LIGHT}", None),
        (f"{WOMAN}{DARK}{JOINER}❤{JOINER}{MAN}", None),
        (DARK, None),
    ],
)
def test_composition(sequence: str, parts: tuple[str, str, str] | None) -> None:
    assert emoji.composition(sequence, frozenset({"🏃"})) == parts


def people(roles: str) -> list[object]:
    sequences = [f"{who}{tone}{JOINER}{role}" for role in roles for who in emoji.PEOPLE for tone in emoji.TONES]
    return [emoji.Emoji(sequence, sequence, b"") for sequence in sequences]


def test_held_out_parts_are_all_seen_in_training() -> None:
    found = people("🚒🔧🎨🚀🍳🌾🏫🔬") + [emoji.Emoji("❤", "red heart", b"")]
    train, held = emoji.split(found)
    assert len(train) + len(held) == len(found) and not {e.sequence for e in train} & {e.sequence for e in held}
    assert 0 < len(held) < len(found) * 0.12
    seen = [emoji.composition(e.sequence, frozenset()) for e in train if e.toned]
    for one in held:
        parts = emoji.composition(one.sequence, frozenset())
        assert all(any(part == other[i] for other in seen) for i, part in enumerate(parts))
    assert emoji.split(found[::-1])[1] == held[::-1]  # decided by the sequence alone


def test_nothing_is_held_out_that_has_no_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "_picked", lambda sequence: True)
    assert emoji.split(people("🚒"))[1] == []


# ---- images --------------------------------------------------------------------------------------------------------


def test_a_glyph_is_centred_on_white() -> None:
    image = np.asarray(emoji.draw(png((200, 0, 0)), 64)).astype(int)
    assert image.shape == (64, 64, 3)
    assert (image[0] == 255).all() and (image[:, -1] == 255).all() and (image[32, 32] == (200, 0, 0)).all()
    assert np.abs(image - image[::-1]).max() <= 1 and np.abs(image - image[:, ::-1]).max() <= 1


# ---- the command ---------------------------------------------------------------------------------------------------


class Font(dict):
    """What the script asks of fontTools, with six glyphs."""

    def getBestCmap(self) -> dict[int, str]:
        return {ord(c): f"u{ord(c):X}" for c in "❤🏃🇺🇸🇫🇷7" + LIGHT}


def font(path: Path) -> Font:
    def ligature(parts: str, glyph: str) -> SimpleNamespace:
        return SimpleNamespace(Component=[f"u{ord(c):X}" for c in parts[1:]], LigGlyph=glyph)

    flags = {f"u{ord('🇺'):X}": [ligature("🇺🇸", "us")], f"u{ord('🏃'):X}": [ligature("🏃" + LIGHT, "toned")]}
    lookup = SimpleNamespace(LookupType=4, SubTable=[SimpleNamespace(ligatures=flags)])
    colours = {f"u{ord('❤'):X}": 1, f"u{ord('🏃'):X}": 2, "us": 3, "toned": 4, f"u{ord('🇺'):X}": 5, f"u{ord('7'):X}": 1}
    strikes = {name: SimpleNamespace(imageData=png((50 * i, 0, 0))) for name, i in colours.items()}
    return Font(
        GSUB=SimpleNamespace(table=SimpleNamespace(LookupList=SimpleNamespace(Lookup=[lookup]))),
        CBDT=SimpleNamespace(strikeData=[strikes]),
    )


def test_the_folder_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(emoji, "_open_font", font)
    monkeypatch.setattr(emoji, "read_cldr", lambda path: cldr())
    assert emoji.main([str(tmp_path / "e"), "--size", "32"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out == f"{tmp_path / 'e'}: 4 training images, 0 held out\n"
    rows = [json.loads(line) for line in (tmp_path / "e/train/metadata.jsonl").read_text().splitlines()]
    assert {row["text"]: row["weight"] for row in rows} == {
        "red heart": 1.0,
        "person running": 1.0,
        "person running: light skin tone": 0.4,
        "flag: United States": 1.0,
    }
    heart = next(row for row in rows if row["text"] == "red heart")
    assert heart["captions"] == ["red heart", "digit seven", "heart, love, red", "card suit"]  # 7 has the same pixels
    source = FolderSource(tmp_path / "e" / "train")
    assert len(source) == 4 and source.skipped == [] and source.image(0).shape == (32, 32, 3)
    assert emoji.main([str(tmp_path / "e")]) == 2 and "exists; remove it" in capsys.readouterr().err
    assert not list(tmp_path.glob(".tmp*"))


def test_missing_packages_are_named_with_the_fix(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("fontTools")
    with pytest.raises(DataError, match="apt-get install fonts-noto-color-emoji unicode-cldr-core"):
        emoji.read_cldr(tmp_path)
    with pytest.raises(DataError, match="apt-get install fonts-noto-color-emoji unicode-cldr-core"):
        emoji.collect(tmp_path / "no.ttf", cldr())
    (tmp_path / "bad.ttf").write_bytes(b"not a font")
    with pytest.raises(DataError, match="is not a font"):
        emoji.collect(tmp_path / "bad.ttf", cldr())
    assert emoji.main([str(tmp_path / "out"), "--cldr", str(tmp_path)]) == 3
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.skipif(not (emoji.FONT.exists() and emoji.CLDR.exists()), reason="needs Debian's emoji font and CLDR")
def test_debians_font() -> None:
    pytest.importorskip("fontTools")
    found = emoji.collect(emoji.FONT, emoji.read_cldr(emoji.CLDR))
    by_name = {one.name: one for one in found}
    assert len(found) > 3500 and len({one.name.lower() for one in found}) == len(found)
    assert by_name["red heart"].sequence == "❤"
    assert by_name["woman firefighter: medium skin tone"].sequence == f"{WOMAN}{MEDIUM}{JOINER}🚒"
    assert by_name["flag: France"].sequence == "🇫🇷"
    red = np.asarray(emoji.draw(by_name["red heart"].png, 64)).astype(int)
    assert red[32, 32, 0] > 200 and red[32, 32, 1] < 110 and (red[0] > 250).all()
    assert (red[10:20] < 128).any(-1).sum() > (red[50:58] < 128).any(-1).sum()  # lobes up, point down
    _, held = emoji.split(found)
    assert 40 < len(held) < 120 and all(one.toned for one in held)


# ---- the other script ----------------------------------------------------------------------------------------------


def test_digits_become_a_folder_with_sidecars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.full((3, 8, 8), 255, np.uint8)
    images[:, 2:6, 4] = 0
    monkeypatch.setattr(digits, "load_digits", lambda: (images, np.array([7, 0, 1])))
    assert digits.main([str(tmp_path / "d"), "--filter", "nearest"]) == 0
    source = FolderSource(tmp_path / "d")
    assert [source.captions(i)[0] for i in range(3)] == [
        f"a handwritten digit {word}" for word in ("seven", "zero", "one")
    ]
    assert source.image(0).shape == (32, 32, 3) and (source.image(0)[8:24, 16:20] == 0).all()
    assert digits.main([str(tmp_path / "d")]) == 2
