"""A folder as a data source: the three layouts, and everything that can be wrong with one."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinydiff.data.captions import MAX_CAPTION, clean_captions
from tinydiff.data.folder import FolderSource
from tinydiff.errors import DataError
from tinydiff.images import KINDS


def image(path: Path, colour: tuple[int, ...] = (200, 30, 30), size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if len(colour) == 3 else "RGBA", size, colour).save(path)
    return path


def sidecars(folder: Path, count: int = 3) -> Path:
    for i in range(count):
        image(folder / f"{i}.png", (i, 0, 0)).with_suffix(".txt").write_text(f"number {i}")
    return folder


def metadata(folder: Path, *rows: object) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text)
    return folder


def lenient(folder: Path) -> FolderSource:
    return FolderSource(folder, max_bad_fraction=0.9)


def everything(source: FolderSource) -> dict[str, list[str]]:
    return {source.identity(i): source.captions(i) for i in range(len(source))}


def refusal(folder: Path, **options: float) -> str:
    with pytest.raises(DataError) as caught:
        FolderSource(folder, **{"max_bad_fraction": 0.01, **options})
    assert "\n" not in str(caught.value) and caught.value.code == 3
    return str(caught.value)


# ---- layouts -------------------------------------------------------------------------------------------------------


def test_sidecars_with_several_captions(tmp_path: Path) -> None:
    image(tmp_path / "b.png").with_suffix(".txt").write_text("first\n\nsecond\nfirst\n")
    image(tmp_path / "deep" / "a.JPG").with_suffix(".caption").write_text("a photograph")
    source = FolderSource(tmp_path)
    assert everything(source) == {"b.png": ["first", "second"], "deep/a.JPG": ["a photograph"]}
    assert (source.weight(0), source.skipped) == (1.0, [])


def test_images_keep_their_size_and_lie_on_the_background(tmp_path: Path) -> None:
    image(tmp_path / "a.png", (0, 0, 0, 0), (5, 3)).with_suffix(".txt").write_text("nothing")
    array = FolderSource(tmp_path, background="#0000ff").image(0)
    assert array.shape == (3, 5, 3) and array.dtype == np.uint8
    assert (array == [0, 0, 255]).all()


def test_size_and_digest_are_of_the_image(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    sidecars(tmp_path, 2)
    Image.new("RGB", (7, 3)).save(tmp_path / "1.png", exif=turned)
    source = FolderSource(tmp_path)
    assert [source.size(i) for i in (0, 1)] == [(6, 4), (3, 7)]
    assert all(source.image(i).shape[1::-1] == source.size(i) for i in (0, 1))
    wanted = [hashlib.sha256((tmp_path / f"{i}.png").read_bytes()).hexdigest()[:32] for i in (0, 1)]
    assert [source.digest(i) for i in (0, 1)] == wanted


def test_metadata_jsonl(tmp_path: Path) -> None:
    image(tmp_path / "a.png"), image(tmp_path / "sub/b.webp")
    rows = [
        {"file_name": "sub/b.webp", "text": "bee", "captions": ["bee", "insect"], "weight": 0.4},
        {"file_name": "./a.png", "text": "ay"},
        {"file_name": "a.png", "text": "letter"},
    ]
    source = FolderSource(metadata(tmp_path, *rows))
    assert everything(source) == {"a.png": ["ay", "letter"], "sub/b.webp": ["bee", "insect"]}
    assert [source.weight(i) for i in (0, 1)] == [1.0, 0.4]


def test_metadata_csv(tmp_path: Path) -> None:
    image(tmp_path / "a.png"), image(tmp_path / "b.png")
    table = '\ufefffile_name,text,weight\r\na.png,"red, round",2\r\nb.png,blue,1\r\n'
    (tmp_path / "metadata.csv").write_bytes(table.encode())
    source = FolderSource(tmp_path)
    assert everything(source) == {"a.png": ["red, round"], "b.png": ["blue"]}
    assert source.weight(0) == 2.0


def test_class_subfolders(tmp_path: Path) -> None:
    image(tmp_path / "golden_retriever" / "1.png"), image(tmp_path / "dogs" / "Afghan_hound" / "1.png")
    (tmp_path / "README.txt").write_text("about these dogs")
    source = FolderSource(tmp_path)
    assert everything(source) == {
        "dogs/Afghan_hound/1.png": ["Afghan hound"],
        "golden_retriever/1.png": ["golden retriever"],
    }
    assert source.skipped == [("README.txt", "caption without an image")]


# ---- nothing to train on -------------------------------------------------------------------------------------------


def test_a_missing_folder_or_a_file_is_named_with_the_fix(tmp_path: Path) -> None:
    assert "does not exist; give" in refusal(tmp_path / "nowhere")
    assert "is not a folder; give" in refusal(image(tmp_path / "a.png"))
    assert "does not exist" in refusal(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("name", ["pipe:echo hi", "http://example.com/a.tar", "{a..b}"])
def test_a_path_is_only_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refusal(Path(name))


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "holds no images; put PNG" in refusal(tmp_path)
    image(tmp_path / "a.ico")
    assert f"a.ico (not a {KINDS} image)" in refusal(tmp_path)


def test_images_without_captions(tmp_path: Path) -> None:
    image(tmp_path / "cat.png")
    assert "have no captions; write cat.txt" in refusal(tmp_path)
    (tmp_path / "dog.txt").write_text("a dog")
    assert "no caption file matches an image (as dog.txt); name them cat.txt" in refusal(tmp_path)


def test_metadata_of_nothing_there(tmp_path: Path) -> None:
    assert "metadata.jsonl is empty" in refusal(metadata(tmp_path))
    metadata(tmp_path, {"file_name": "gone.png", "text": "gone"})
    assert "none of its 1 images can be used: 1 left out: metadata.jsonl:1 (no such file" in refusal(tmp_path)


def test_metadata_one_folder_down(tmp_path: Path) -> None:
    image(tmp_path / "train" / "a.png")
    metadata(tmp_path / "train", {"file_name": "a.png", "text": "a"})
    assert "metadata in subfolders (train); give" in refusal(tmp_path)


def test_csv_without_its_columns(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("name,caption\na.png,a\n")
    assert "no column file_name; its first line must be file_name,text" in refusal(tmp_path)


# ---- some of it is bad ---------------------------------------------------------------------------------------------


def test_endless_metadata_rows_are_left_out_without_their_memory(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        image(tmp_path / name)
    with open(tmp_path / "metadata.jsonl", "w") as file:
        file.write('{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "')
        for _ in range(64):
            file.write("x" * 2**20)
        file.write('"}\n{"file_name": "b.png", "text": "two"}\n')
    tracemalloc.start()
    source = FolderSource(tmp_path, max_bad_fraction=0.5)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [source.captions(i) for i in range(2)] == [["one"], ["two"]]
    assert source.skipped == [("metadata.jsonl:2", "not a JSON object, or over 1 MiB")] and most < 16e6


def test_bad_images_are_listed_and_too_many_are_an_error(tmp_path: Path) -> None:
    sidecars(tmp_path, 10)
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "4.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "5.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    source = FolderSource(tmp_path, max_bad_fraction=0.3)
    assert len(source) == 7
    assert [path for path, reason in source.skipped if reason] == ["3.png", "4.png", "5.png"]
    assert (
        "7 images, captions from the files beside them, 3 left out: 3.png (" in source.report()
        and "\n" not in source.report()
    )
    message = refusal(tmp_path, max_bad_fraction=0.29)
    assert "3 of 10 images are unusable" in message and "data.max_bad_fraction" in message


def test_a_truncated_image_is_skipped_unless_all_its_pixels_are_there(tmp_path: Path) -> None:
    whole = image(sidecars(tmp_path, 1) / "0.png", (9, 9, 9), (8, 8)).read_bytes()
    for length in range(0, len(whole), 3):
        (tmp_path / f"cut{length}.png").write_bytes(whole[:length])
        (tmp_path / f"cut{length}.txt").write_text("cut")
    source = FolderSource(tmp_path, max_bad_fraction=1.0)
    assert len(source.skipped) > len(whole) / 3 - 8
    assert all((source.image(i) == 9).all() for i in range(len(source)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty caption"),
        (b"\xef\xbb\xbf \r\n\t\n", "empty caption"),
        (b"caf\xe9", "caption is not UTF-8"),
        ("wide".encode("utf-16")[:-1], "caption is not UTF-8"),
        ("wide".encode("utf-16-le"), "caption holds NUL; save it as UTF-8"),
        (b"x" * (2**20 + 1), "caption file over 1 MiB"),
    ],
)
def test_unusable_captions(tmp_path: Path, content: bytes, reason: str) -> None:
    (sidecars(tmp_path) / "1.txt").write_bytes(content)
    source = lenient(tmp_path)
    assert source.skipped == [("1.png", reason)] and len(source) == 2


def test_missing_and_orphan_captions(tmp_path: Path) -> None:
    image(sidecars(tmp_path) / "bare.png")
    (tmp_path / "ghost.txt").write_text("no image")
    source = lenient(tmp_path)
    assert source.skipped == [("bare.png", "no caption file"), ("ghost.txt", "caption without an image")]
    assert "1 of 4 images" in refusal(tmp_path)  # the orphan caption does not count


def test_equal_stems(tmp_path: Path) -> None:
    for kind in ("webp", "jpg", "png"):
        image(tmp_path / f"a.{kind}")
    (tmp_path / "a.caption").write_text("second"), (tmp_path / "a.txt").write_text("first")
    source = FolderSource(tmp_path)
    assert everything(source) == {"a.png": ["first"]}
    assert source.skipped == [
        ("a.caption", "a.txt is used"),
        ("a.jpg", "shares its caption with a.png"),
        ("a.webp", "shares its caption with a.png"),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "not a JSON object"),
        ('"a string"', "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ({"text": "no name"}, "no file_name"),
        ({"file_name": 7, "text": "x"}, "no file_name"),
        ({"file_name": "../outside.png", "text": "x"}, "no such file"),
        ({"file_name": "/etc/passwd", "text": "x"}, "no such file"),
        ({"file_name": "gone.png", "text": "x"}, "no such file"),
        ({"file_name": "0.png"}, "no caption: name it text or caption"),
        ({"file_name": "0.png", "text_de": "rot", "text_en": "red"}, "captions under text_de, text_en: name the one"),
        ({"file_name": "0.png", "text": ""}, "empty caption"),
        ({"file_name": "0.png", "text": 5}, "a caption is not text"),
        ({"file_name": "0.png", "text": "x", "captions": [1]}, "a caption is not text"),
        ({"file_name": "0.png", "text": "a\0b"}, "caption holds NUL"),
        ({"file_name": "0.png", "text": "\ud800"}, "caption is not UTF-8"),
        ({"file_name": "0.png", "text": "x", "weight": -1}, "weight is not a positive number"),
        ({"file_name": "0.png", "text": "x", "weight": True}, "weight is not a positive number"),
        ('{"file_name": "0.png", "text": "x", "weight": NaN}', "weight is not a positive number"),
        ('{"file_name": "0.png", "text": "x", "weight": "' + "9" * 5000 + '"}', "weight is not a positive number"),
    ],
)
def test_bad_metadata_rows(tmp_path: Path, row: object, reason: str) -> None:
    image(tmp_path.parent / "outside.png")
    metadata(sidecars(tmp_path), {"file_name": "1.png", "text": "one"}, row)
    source = lenient(tmp_path)
    assert everything(source) == {"1.png": ["one"]}
    path, why = next((path, why) for path, why in source.skipped if "metadata" in path)
    assert path == "metadata.jsonl:2" and reason in why
    assert ("2.png", "not used by metadata.jsonl") in source.skipped


def test_metadata_that_is_not_utf8_loses_that_row_only(tmp_path: Path) -> None:
    sidecars(tmp_path)
    lines = [b'{"file_name": "0.png", "text": "caf\xe9"}', b'{"file_name": "1.png", "text": "one"}']
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    source = lenient(tmp_path)
    assert everything(source) == {"1.png": ["one"]}
    assert ("metadata.jsonl:1", "caption is not UTF-8") in source.skipped


# ---- hostile file systems ------------------------------------------------------------------------------------------


def test_links_pipes_and_sockets_are_not_opened(tmp_path: Path) -> None:
    outside = image(tmp_path / "outside" / "o.png")
    data = sidecars(tmp_path / "data")
    (data / "near.png").symlink_to(data / "0.png"), (data / "near.txt").write_text("a link inside")
    (data / "far.png").symlink_to(outside), (data / "far.txt").write_text("a link outside")
    (data / "broken.png").symlink_to(data / "nothing")
    (data / "self.png").symlink_to(data / "self.png")
    (data / "loop").symlink_to(data), (data / "there").symlink_to(outside.parent)
    (data / "folder.png").mkdir()
    os.mkfifo(data / "fifo.png"), os.mkfifo(data / "2.caption")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(data / "s.png"))
    source = lenient(data)
    assert list(everything(source)) == ["0.png", "1.png", "2.png", "near.png"]
    assert dict(source.skipped) == {
        "2.caption": "not a regular file",
        "broken.png": "broken link",
        "far.png": "link that leaves the folder",
        "far.txt": "caption without an image",
        "fifo.png": "not a regular file",
        "loop": "link to a folder",
        "s.png": "not a regular file",
        "self.png": dict(source.skipped)["self.png"],
        "there": "link to a folder",
    }


def test_odd_file_names(tmp_path: Path) -> None:
    sidecars(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes((tmp_path / "0.png").read_bytes())
    for name in ("a\nb", "[red]", "esc\x1b[31m", "日本 語"):
        image(tmp_path / f"{name}.png").with_suffix(".txt").write_text("odd")
    image(tmp_path / ".hidden.png"), image(tmp_path / ".git" / "x.png"), image(tmp_path / "__MACOSX" / "x.png")
    image(tmp_path / "\x1bno.png")
    source = lenient(tmp_path)
    assert [source.identity(i) for i in range(3, 7)] == ["[red].png", "a\nb.png", "esc\x1b[31m.png", "日本 語.png"]
    assert dict(source.skipped) == {r"'\x1bno.png'": "no caption file", r"'\udcff.png'": "its name is not UTF-8"}
    assert source.report().isprintable()


def test_a_file_that_vanishes_later_is_a_data_error(tmp_path: Path) -> None:
    source = FolderSource(sidecars(tmp_path))
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png"):
        source.image(1)


# ---- captions and fingerprint --------------------------------------------------------------------------------------


def test_captions_are_nfc_on_one_line() -> None:
    assert clean_captions(["cafe\u0301\x1b[31m\r\n  au\u2028lait "]) == ["caf\u00e9 [31m au lait"]
    assert clean_captions(["👩\u200d🚒", "مرحبا", "猫"]) == ["👩\u200d🚒", "مرحبا", "猫"]
    assert len(clean_captions(["x" * 10**6])[0]) == MAX_CAPTION


@given(st.lists(st.text(max_size=30), max_size=4))
def test_clean_captions_are_stable(texts: list[str]) -> None:
    try:
        captions = clean_captions(texts)
    except ValueError:
        return
    assert clean_captions(captions) == captions
    assert all((text and text == text.strip() and text.isprintable()) or not text.isascii() for text in captions)


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    first, second = FolderSource(sidecars(tmp_path / "a")), FolderSource(sidecars(tmp_path / "b"))
    assert first.fingerprint() == second.fingerprint()
    seen = {first.fingerprint(), FolderSource(tmp_path / "b", background="#000000").fingerprint()}
    (tmp_path / "b" / "1.txt").write_text("another caption")
    seen.add(FolderSource(tmp_path / "b").fingerprint())
    image(tmp_path / "b" / "0.png", (1, 2, 3))
    seen.add(FolderSource(tmp_path / "b").fingerprint())
    assert len(seen) == 4
