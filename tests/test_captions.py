"""Where captions can lie in a folder and in what form: each is read, or refused by a line that names it and the fix."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinydiff.data.captions import clean_captions, no_caption, texts_of, under
from tinydiff.data.folder import FolderSource
from tinydiff.data.shards import ShardSource
from tinydiff.data.tables import Names, rows
from tinydiff.errors import DataError
from tinydiff.text.labels import Labels

PAIR = ("images/0.png", "images/1.png")
FLAT = ("0.png", "1.png")
COCO = {
    "images": [{"id": 1, "file_name": "0.png"}, {"id": 2, "file_name": "1.png"}],
    "annotations": [{"image_id": 1, "id": 5, "caption": "A"}, {"image_id": 2, "id": 6, "caption": "B"}],
}
BOXES = {"images": COCO["images"], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}
LISTED = [{"file_name": "0.png", "text": "A"}, {"file_name": "1.png", "text": "B"}]
LINES = "".join(json.dumps(row) + "\n" for row in LISTED)


def folder(root: Path, images: tuple[str, ...], files: dict[str, str | bytes]) -> Path:
    """`root`/photos with images and `files`, some of them beside it (../x)."""
    place = root / "photos"
    for number, name in enumerate(images):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 9, 9)).save(path, "JPEG" if path.suffix.lower()[1] == "j" else None)
    for name, text in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return place


def captions(place: Path) -> list[list[str]]:
    source = FolderSource(place)
    return [source.captions(i) for i in range(len(source))]


def beside(kind: str, text: str = "{}", folder: str = "images/") -> dict[str, str | bytes]:
    return {f"{folder}{i}{kind}": text.replace("{}", "AB"[i]) for i in range(2)}


READ = {
    "tabs": (PAIR, {"captions.tsv": "filename\ttitle\n0.png\tA\n1.png\tB\n"}),
    "semicolons": (PAIR, {"captions.csv": "image;caption\n0.png;A\n1.png;B\n"}),
    "bars": (FLAT, {"captions.csv": "image|caption\n0.png|A\n1.png|B\n"}),
    "other case, spaces, BOM": (PAIR, {"Captions.CSV": "\ufeffFile Name,CAPTION\n0.PNG,A\n1.PNG,B\n"}),
    "metadata in capitals": (
        PAIR,
        {"METADATA.JSONL": '{"file_name": "images\\\\0.png", "text": "A"}\n' + LINES.splitlines()[1]},
    ),
    "UTF-16": (FLAT, {"metadata.csv": "file_name,text\n0.png,A\n1.png,B\n".encode("utf-16")}),
    "a space after commas": (FLAT, {"metadata.csv": 'file_name, text\n0.png, "A"\n1.png, "B"\n'}),
    "no header": (FLAT, {"metadata.csv": "0.png,A\n1.png,B\n"}),
    "trailing commas": (FLAT, {"metadata.csv": "file_name,text\n0.png,A,\n1.png,B,,\n"}),
    "text table": (PAIR, {"captions.txt": "0.png\tA\n1.png\tB\n"}),
    "several captions of a file": (PAIR, {"results.csv": "image,caption\n0.png#0,A\n1.png#0,B\n"}),
    "from a folder above": (FLAT, {"captions.csv": "image,caption\n/home/x/photos/0.png,A\nphotos/1.png,B\n"}),
    "without suffix": (PAIR, {"captions.csv": "image,caption\n0,A\n1,B\n"}),
    "list of objects": (PAIR, {"metadata.json": json.dumps(LISTED)}),
    "lines in .json": (FLAT, {"metadata.json": LINES}),
    "file to caption": (PAIR, {"captions.json": json.dumps({"0.png": "A", "1": ["B"]})}),
    "kohya": (
        PAIR,
        {"meta_lat.json": json.dumps({"/d/images/0": {"caption": "A"}, "/d/images/1": {"tags": "B"}})},
    ),
    "COCO": (
        ("train/0.png", "train/1.png"),
        {"annotations/captions.json": json.dumps(COCO), "annotations/boxes.json": json.dumps(BOXES)},
    ),
    "object in an object": (FLAT, {"metadata.jsonl": LINES.replace('"0.png"', '{"path": "0.png"}')}),
    "captions/": (PAIR, beside(".txt", folder="captions/")),
    "texts/": (PAIR, beside(".caption", folder="texts/")),
    "capital suffix": (PAIR, beside(".TXT")),
    "suffix of the image": (PAIR, beside(".png.txt")),
    "JSON of a downloader": (PAIR, beside(".png.json", '{"tags": ["{}"]}')),
    "JPEG by other suffixes": (("images/0.jfif", "images/1.JPE"), beside(".txt")),
    "beside a table": (FLAT, beside(".txt", folder="") | {"captions.csv": "image,caption\n0.png,X\n1.png,Y\n"}),
    "documents beside": (PAIR, beside(".txt") | {"README.txt": "x", "LICENSE": "y"}),
    **{f"a{kind}": (PAIR, beside(kind)) for kind in (".txt", ".caption", ".cap", ".tags", ".text", ".prompt")},
    **{
        f"json {key}": (PAIR, beside(".json", f'{{"{key}": "{{}}"}}')) for key in ("text", "caption", "prompt", "label")
    },
    **{
        f"jsonl {key}": (FLAT, {"metadata.jsonl": LINES.replace('"text"', f'"{key}"')}) for key in ("captions", "label")
    },
}


@pytest.mark.parametrize("case", READ)
def test_captions_are_read(tmp_path: Path, case: str) -> None:
    assert captions(folder(tmp_path, *READ[case])) == [["A"], ["B"]]


REFUSED = {
    "parquet": (PAIR, {"metadata.parquet": b"PAR1"}, "metadata.parquet: could hold captions"),
    "parquet below": (PAIR, {"images/data.parquet": b"PAR1"}, "images/data.parquet: could hold captions"),
    "spreadsheet": (PAIR, {"captions.xlsx": b"PK"}, "metadata.jsonl"),
    "YAML": (PAIR, {"captions.yaml": "0.png: A"}, "metadata.jsonl"),
    "packed": (PAIR, {"captions.csv.gz": b"\x1f\x8b"}, "captions.csv.gz"),
    "lines": (PAIR, {"captions.txt": "A\nB\n"}, "captions.txt"),
    "colons": (PAIR, {"captions.txt": "0.png: A\n1.png: B\n"}, "file_name,text"),
    "numbers of classes": (PAIR, {"dataset.json": json.dumps({"labels": [["images/0.png", 3]]})}, "dataset.json"),
    "broken JSON": (PAIR, {"captions.json": '{"a": 1'}, "captions.json"),
    "deep JSON": (PAIR, {"captions.json": "[" * 100_000}, "captions.json"),
    "empty": (PAIR, {"captions.csv": ""}, "captions.csv"),
    "cut UTF-16": (PAIR, {"captions.csv": b"\xff\xfe\0"}, "UTF-8"),
    "boxes": (PAIR, {"boxes.csv": "image,x,y\n0.png,1,2\n"}, "no column text"),
    "YOLO": (PAIR, beside(".txt", "0 0.5 0.5 0.2 0.2", "labels/"), "numbers of boxes"),
    "languages in columns": (FLAT, {"metadata.csv": "file_name,text_en,text_de\n0.png,A,B\n"}, "of text_en, text_de"),
    "languages in keys": (FLAT, {"metadata.jsonl": '{"file": "0.png", "caption": {"en": "A", "de": "B"}}'}, "de, en"),
    "languages in files": (PAIR, beside(".en.txt") | beside(".de.txt"), "0.de.txt"),
    "a Markdown file": (PAIR, beside(".md"), "images/0.md"),
    "a comma": (
        FLAT,
        {"metadata.csv": "file_name,text\n0.png,A, b\n1.png,B\n"},
        "metadata.csv:2 (3 fields for 2 columns",
    ),
    "a comma before a weight": (
        FLAT,
        {"metadata.csv": "file_name,text,weight\n0.png,A, b\n"},
        "metadata.csv:2 (weight",
    ),
    "two tables": (PAIR, {f"{n}.csv": "image,text\n0.png,A\n1.png,B\n" for n in "ab"}, "a.csv, b.csv"),
    "shards": (("cat/0.png", "dog/0.png"), {"train/0.tar": b"x"}, "train/0.tar"),
    "shards alone": ((), {"train/0.tar": b"x"}, "photos/train for the .tar"),
    "numbers before names": (("1_cat/0.png", "2_dog/0.png"), {}, "name them cat"),
    "a table beside": (PAIR, {"../captions.csv": "image,caption\nimages/0.png,A\n"}, "captions.csv: names the images"),
    "parquet beside": (PAIR, {"../metadata.parquet": b"PAR1"}, "metadata.parquet: could caption"),
    "captions beside": (FLAT, beside(".txt", folder="../captions/"), "captions: names the images"),
    "two places": (
        ("c/0.png",),
        {"a.csv": "image,text\ntrain/0.png,A\ntest/0.png,B\n"},
        "test/0.png and train/0.png would both",
    ),
    "other pictures": (FLAT, beside(".txt", folder="") | {"2.psd": b"x", "2.txt": "C"}, "2.psd (not a PNG"),
    "films": (FLAT, beside(".txt", folder="") | {"2.mp4": b"x", "2.txt": "C"}, "2.mp4 (captioned, but not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_captions_that_are_not_read_are_named(tmp_path: Path, case: str) -> None:
    images, files, named = REFUSED[case]
    with pytest.raises(DataError) as caught:
        FolderSource(folder(tmp_path, images, files), max_bad_fraction=0.01)
    assert named in str(caught.value) and "; " in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_caption_leaves_class_folders_alone(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "README.md": "x",
        "LICENSE.txt": "x",
        "classes.txt": "cat\ndog",
        "dataset_infos.json": "{}",
    }
    assert captions(folder(tmp_path, ("cat/0.png", "dog/0.png"), files)) == [["cat"], ["dog"]]


def test_folders_names_are_said(tmp_path: Path) -> None:
    assert 'every one captioned "images", the name' in FolderSource(folder(tmp_path / "1", PAIR, {})).report()
    numbers = FolderSource(folder(tmp_path / "2", ("0/a.png", "1/a.png"), {})).report()
    assert "(0, 1), which are numbers" in numbers
    assert "folders (cat, dog)" in FolderSource(folder(tmp_path / "3", ("cat/a.png", "dog/a.png"), {})).report()


@pytest.mark.parametrize("files", [{}, {"10_cat/0.txt": "cat", "2_dog/0.txt": "dog"}])
def test_repeats_are_weights(tmp_path: Path, files: dict[str, str | bytes]) -> None:
    source = FolderSource(folder(tmp_path, ("10_cat/0.png", "2_dog/0.png"), files))
    assert [(source.captions(i), source.weight(i)) for i in range(2)] == [(["cat"], 10.0), (["dog"], 2.0)]


@pytest.mark.parametrize("inside", ["", "runs/x/"])
def test_what_tinydiff_made_is_no_data(tmp_path: Path, inside: str) -> None:
    """A run in its own data, or in a folder below, changes neither what is read nor its fingerprint."""
    place = folder(tmp_path, ("cat/0.png", "dog/0.png"), {})
    before = FolderSource(place).fingerprint()
    made = {
        "tinydiff.toml": "",
        "data.json": "{}",
        "metrics.jsonl": "{}",
        "skipped.txt": "a\tb",
        "samples/captions.json": "[]",
    }
    made |= {"model/manifest.json": "{}", "model/unet/config.json": "{}", "tokenizer/labels.json": '{"0": "cat"}'}
    place = folder(
        tmp_path, (f"{inside}samples/denoiser-00000004.png",), {inside + name: text for name, text in made.items()}
    )
    assert FolderSource(place).fingerprint() == before
    (place / inside / "data.json").unlink()
    if inside:  # an ordinary folder
        with pytest.raises(DataError):
            FolderSource(place)


def test_an_image_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    place = folder(tmp_path, ("cat/0.png", "dog/0.png"), {})
    source, path = FolderSource(place), place / "cat/0.png"
    status, other = path.stat(), (place / "dog/0.png").read_bytes()
    assert len(other) == status.st_size
    path.write_bytes(other)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=r"cat/0\.png: has changed since the start"):
        source.image(0)


NAMED = ("img/IMG_0001 red_square.png", "img/bigBlueCircle-02.gif", "img/DSC_0003.jpg")


def test_captions_of_file_names(tmp_path: Path) -> None:
    """Whatever lies beside the images, of folders and of shards alike; a name without words is left out."""
    place = folder(tmp_path, NAMED, {"img/captions.csv": "image,text\nDSC_0003.jpg,A\n", "img/DSC_0003.txt": "B"})
    source = FolderSource(place, captions="names")
    assert [source.captions(i) for i in range(len(source))] == [["red square"], ["big Blue Circle"]]
    assert ("img/DSC_0003.jpg", "no words in its name") in source.skipped
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(place, ".")
    named, plain = (
        ShardSource(tmp_path / "a.tar", "#ffffff", 0.9, tmp_path / "i", None, c) for c in ("names", "files")
    )
    assert sorted(named.captions(i) for i in range(len(named))) == [["big Blue Circle"], ["red square"]]
    assert [plain.captions(i) for i in range(len(plain))] == [["B"]]
    for index in (tmp_path / "i").iterdir():  # the cache is cleared meanwhile
        index.unlink()
    named._file.cache_clear()
    assert sorted(named.captions(i) for i in range(len(named))) == [["big Blue Circle"], ["red square"]]


COLUMNS = {
    "CSV": {"metadata.csv": "file_name,text,Short Title\n0.png,X,A\n1.png,Y,B\n"},
    "lines": {"metadata.jsonl": LINES.replace("}", ', "short_title": "C"}').replace("C", "A", 1).replace('"C"', '"B"')},
    "beside a text file": beside(".json", '{"text": "X", "short-title": "{}"}', "") | beside(".txt", "X", ""),
    "another table": {"titles.tsv": "image\tshort title\n0.png\tA\n1.png\tB\n"} | beside(".txt", "X", ""),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_captions_of_a_chosen_column(tmp_path: Path, case: str) -> None:
    place = folder(tmp_path, FLAT, COLUMNS[case])
    source = FolderSource(place, captions="column:Short Title")
    assert [source.captions(i) for i in range(len(source))] == [["A"], ["B"]]
    with pytest.raises(DataError) as caught:
        FolderSource(place, captions="column:long")
    assert "long" in str(caught.value) and "; " in str(caught.value)
    if case == "beside a text file":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(place, ".")
        shards = ShardSource(tmp_path / "a.tar", index_dir=tmp_path / "index", captions="column:short title")
        assert [shards.captions(i) for i in range(len(shards))] == [["A"], ["B"]]


def test_tags_of_a_chosen_column_are_one_caption() -> None:
    assert texts_of(under({"tags": ["a", "b"], "text": "x"}, "tags")) == ["a, b"]
    assert texts_of(under({"Long": ["a", "b"], "text": "x"}, "long")) == ["a", "b"]


def test_a_folder_of_a_weight_names_its_images(tmp_path: Path) -> None:
    place = folder(tmp_path, FLAT, {}).rename(tmp_path / "10_red hen")
    assert captions(place) == [["red hen"], ["red hen"]]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda part: (
        st.lists(part, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "file_name", "de", "x"]), part, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(["images", "annotations", "text", "captions", "file_name", "image_id", "id", "labels", "0.png"])


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(KEYS, VALUES, max_size=4) | st.lists(VALUES, max_size=4))
def test_any_json_is_rows_or_a_line(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    """Whatever another program's file says, a row is a dict or what is wrong with it, and a caption is text."""
    place = tmp_path_factory.getbasetemp() / "any"
    place.mkdir(exist_ok=True)
    (place / "a.json").write_text(json.dumps(value))
    for _, row in rows(place / "a.json", Names(place, [*FLAT, "a.json"])):
        if isinstance(row, dict):
            try:
                assert all(isinstance(text, str) for text in texts_of(row))
                assert no_caption(row)
            except ValueError as error:
                assert str(error)


@given(
    st.dictionaries(
        st.sampled_from(["text", "caption", "captions"]), st.text(min_size=1) | st.lists(st.text(min_size=1))
    )
)
def test_captions_of_all_keys_are_joined_in_order(row: dict[str, str | list[str]]) -> None:
    found = [row[key] for key in ("text", "caption", "captions") if row.get(key)]
    wanted = [text for value in found for text in (value if isinstance(value, list) else [value])]
    assert texts_of(row) == wanted
    assert texts_of({key.upper(): value for key, value in row.items()} | {"prompt": "other"}) == (wanted or ["other"])


def test_files_are_found_by_what_tables_call_them() -> None:
    known = Names(Path("/x/photos"), ["a/0.png", "b/0.png", "b/Ünï.png", "c/1.jpg", "c/1.txt"])
    same = {"b/0.png": "b/0.png", "./a/0.png": "a/0.png", "a\\0.png": "a/0.png", "/y/photos/a/0.png": "a/0.png"}
    same |= {"B/u\u0308ni\u0308.PNG": "b/Ünï.png", "1": "c/1.jpg", "c/1": "c/1.jpg", "1.jpg#2": "c/1.jpg"}
    assert {name: known.find(name) for name in same} == same
    assert known.find("0.png", "b") == "b/0.png"
    assert known.find("train/1.jpg") == known.find("C:\\photos\\1.jpg") == "c/1.jpg"  # a table of another place
    for name in ("0.png", "../photos2/a/0.png", "/etc/passwd", "", "..", "http://x/2.jpg"):
        assert known.find(name) is None


def test_labels_of_data_are_names() -> None:
    """Neither a number nor a part of a name, which a prompt may give, is the label of an image."""
    labels = Labels(["hen, bird", "cat", "3"], 1000)
    labels.check(["cat", "CAT ", "hen, bird", "3"])
    for other in ("0", "1", "bird", "zebra", "999"):
        with pytest.raises(DataError) as caught:
            labels.check(["cat", other])
        assert other in str(caught.value) and "--fresh" in str(caught.value) and "number" not in str(caught.value)


def test_captions_are_clean() -> None:
    assert clean_captions(["a\r\nb", " a b ", ""]) == ["a b"]
