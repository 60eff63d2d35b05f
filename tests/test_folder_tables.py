"""Where captions may be besides metadata.jsonl and a.txt: each layout is read, or named with the fix, and never passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tinydiff.data.dataset import examples
from tinydiff.data.folder import FolderSource
from tinydiff.errors import DataError
from tinydiff.images import KINDS

COUNT = 6
ROWS = [(f"{i}.png", f"number {i}") for i in range(COUNT)]


def images(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names or [name for name, _ in ROWS]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6 + i, 4), (i, 0, 0)).save(folder / name, "JPEG" if name.endswith("j") else "PNG")
    return folder


def separated(separator: str, header: str = "file_name,text", folder: str = "") -> str:
    lines = [header.replace(",", separator)] if header else []
    return "\n".join([*lines, *(f"{folder}{name}{separator}{text}" for name, text in ROWS)]) + "\n"


def jsonl(file: str, text: str) -> str:
    return "".join(json.dumps({file: name, text: caption}) + "\n" for name, caption in ROWS)


COCO = {
    "images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(ROWS)],
    "annotations": [{"id": 90 + i, "image_id": i, "caption": text} for i, (_, text) in enumerate(ROWS)],
}
TABLES = {  # name of the table: its text
    "captions.csv": separated(",", "image,caption"),
    "Metadata.CSV": separated(","),
    "METADATA.JSONL": jsonl("file_name", "text"),
    "metadata.csv": separated(";"),
    "metadata.tsv": separated("\t", "filename,prompt"),
    "captions.txt": separated("|", ""),
    "labels.csv": separated(",", "Image Name,Description"),
    "metadata.json": json.dumps([{"file_name": name, "text": text} for name, text in ROWS]),
    "captions.json": json.dumps(dict(ROWS)),
    "meta_cap.json": json.dumps(
        {f"/somewhere/else/{name[:-4]}": {"caption": text, "tags": "a, b"} for name, text in ROWS}
    ),
    "dataset.json": json.dumps([list(row) for row in ROWS]),
    "captions_train2017.json": json.dumps(COCO),
    "data.jsonl": jsonl("image_path", "caption"),
    "windows.csv": separated(",", "file_name,text", "images\\"),
}


@pytest.mark.parametrize("inside", ["", "images/"])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_read_by_any_name_and_form(tmp_path: Path, table: str, inside: str) -> None:
    images(tmp_path, *(f"{inside}{name}" for name, _ in ROWS))
    (tmp_path / table).write_text(TABLES[table], encoding="utf-8")
    source = FolderSource(tmp_path)
    assert {Path(source.identity(i)).name: source.captions(i)[0] for i in range(len(source))} == dict(ROWS)
    assert table in source.report()


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_tables_of_spreadsheets_are_read(tmp_path: Path, coding: str, table: str) -> None:
    text = separated(",") if table.endswith("csv") else jsonl("file_name", "text")
    (images(tmp_path) / table).write_text(text.replace("\n", "\r\n"), encoding=coding)
    assert FolderSource(tmp_path).captions(2) == ["number 2"]


SIDECARS = {
    "0.json": (json.dumps({"caption": "a cat", "weight": 2}), ["a cat"]),
    "0.caption": ("a cat\nan animal", ["a cat", "an animal"]),
    "0.cap": ("a cat", ["a cat"]),
    "0.tags": ("cat, grey", ["cat, grey"]),
    "0.txt": ("a cat", ["a cat"]),
}


@pytest.mark.parametrize("name", SIDECARS)
def test_files_beside_images_are_read(tmp_path: Path, name: str) -> None:
    images(tmp_path, "set/0.png")
    text, wanted = SIDECARS[name]
    (tmp_path / "set" / name).write_text(text)
    source = FolderSource(tmp_path)
    assert source.captions(0) == wanted and "captions from the files beside them" in source.report()
    assert source.weight(0) == (2 if name == "0.json" else 1)


def test_caption_files_in_a_folder_of_their_own_are_read(tmp_path: Path) -> None:
    images(tmp_path, *(f"images/{name}" for name, _ in ROWS))
    (tmp_path / "captions").mkdir()
    for name, text in ROWS:
        (tmp_path / "captions" / f"{name[:-4]}.txt").write_text(text)
    source = FolderSource(tmp_path)
    assert [source.captions(i) for i in range(COUNT)] == [[text] for _, text in ROWS]
    assert "in captions" in source.report()


UNREAD = {  # a file of the data: what is named
    "metadata.parquet": "metadata.parquet: could hold captions",
    "annotations.xlsx": "annotations.xlsx: could hold captions",
    "../captions.csv": "captions.csv: names the images",
    "../metadata.jsonl": "metadata.jsonl: names the images",
    "../captions/0.txt": "captions: names the images",
}


@pytest.mark.parametrize(("place", "said"), UNREAD.items(), ids=UNREAD)
@pytest.mark.parametrize("inside", ["", "images/"])
def test_captions_that_are_not_read_are_an_error(tmp_path: Path, place: str, said: str, inside: str) -> None:
    folder = images(tmp_path / "data", *(f"{inside}{name}" for name, _ in ROWS))
    path = folder / place
    path.parent.mkdir(exist_ok=True)
    text = separated(",") if place.endswith("csv") else jsonl("file_name", "text") if place.endswith("jsonl") else "a"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        FolderSource(folder)
    assert said in str(caught.value) and ";" in str(caught.value)


def test_other_folders_beside_are_no_captions(tmp_path: Path) -> None:
    """Another data set, whose files have the same numbers."""
    other = images(tmp_path / "other")
    (other / "0.txt").write_text("a")
    (tmp_path / "notes.csv").write_text("day,weather\n1,fine\n")
    folder = images(tmp_path / "data", "cat/0.png", "dog/1.png")
    assert [FolderSource(folder).captions(i) for i in range(2)] == [["cat"], ["dog"]]


@pytest.mark.parametrize("kind", ["jfif", "jpe", "pjpeg", "JFIF", "Jpe"])
def test_jpegs_of_other_suffixes_are_read(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (5, 5)).save(tmp_path / f"a.{kind}", "JPEG")
    (tmp_path / "a.txt").write_text("a")
    assert len(FolderSource(tmp_path)) == 1


@pytest.mark.parametrize("kind", ["heic", "avif", "bmp", "tif", "gif", "jxl", "dng"])
def test_images_of_other_kinds_count_as_bad(tmp_path: Path, kind: str) -> None:
    images(tmp_path, "b.png")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / f"a.{kind}").write_bytes(b"x")
    with pytest.raises(DataError, match=rf"1 of 2 images are unusable.*a\.{kind} \(not a {KINDS} image\)"):
        FolderSource(tmp_path, max_bad_fraction=0.01)


def test_names_of_folders_are_said_to_be_captions(tmp_path: Path) -> None:
    one, numbers, some = (images(tmp_path / name, *files) for name, files in (
        ("one", ["images/0.png"]), ("numbers", ["0/a.png", "1/b.png"]), ("some", ["cat/a.png", "dog/b.png"]),
    ))  # fmt: skip
    assert 'every one captioned "images", the name of its folder' in FolderSource(one).report()
    assert "which are numbers: rename the folders" in FolderSource(numbers).report()
    assert "captioned by the names of their 2 folders (cat, dog)" in FolderSource(some).report()


def test_folders_with_repeats_weigh_their_images(tmp_path: Path) -> None:
    images(tmp_path, "10_sks dog/a.png", "1_dog/b.png", "1_dog/c.png")
    source = FolderSource(tmp_path)
    told = {source.identity(i): (source.captions(i), source.weight(i)) for i in range(3)}
    assert told == {"10_sks dog/a.png": (["sks dog"], 10), "1_dog/b.png": (["dog"], 1), "1_dog/c.png": (["dog"], 1)}
    assert "weighed by the numbers of their folders" in source.report()
    images(tmp_path, "cat/d.png")  # not all of them have numbers
    assert {source.weight(i) for source in [FolderSource(tmp_path)] for i in range(4)} == {1}


def test_what_a_caption_with_a_bare_comma_lacks_is_named(tmp_path: Path) -> None:
    table = "file_name,text\n0.png,A dragon flying, breathing fire\n" + "".join(f"{n},{t}\n" for n, t in ROWS[1:])
    (images(tmp_path) / "metadata.csv").write_text(table)
    with pytest.raises(DataError, match=r"metadata.csv:2 \(3 fields for 2 columns: quote a caption"):
        FolderSource(tmp_path, max_bad_fraction=0.01)


def test_shards_in_a_subfolder_are_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"data.path to .*train for the .tar shards"):
        FolderSource(tmp_path)


def test_three_captions_are_shown_with_their_sizes(tmp_path: Path) -> None:
    (images(tmp_path) / "metadata.csv").write_text(separated(","))
    assert examples(FolderSource(tmp_path)) == [f"{n}.png ({6 + n}x4): number {n}" for n in (0, 2, 4)]
    (tmp_path / "metadata.csv").write_text(separated(",").replace("number 0", "x" * 5000))
    assert all(len(line) < 300 for line in examples(FolderSource(tmp_path)))


def test_a_run_in_its_own_data_is_left_out(tmp_path: Path) -> None:
    images(
        tmp_path,
        "cat/0.png",
        "dog/1.png",
        "runs/x/samples/denoiser-00000002.png",
        "bundle/samples/a.png",
        "mine/model/b.png",
    )
    for name in ("runs/x/tinydiff.toml", "runs/x/data.json", "bundle/model_index.json"):
        (tmp_path / name).write_text("{}")
    source = FolderSource(tmp_path)
    assert [source.identity(i) for i in range(len(source))] == ["cat/0.png", "dog/1.png", "mine/model/b.png"]
