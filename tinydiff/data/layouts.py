"""Which images of a folder have which captions: the layouts that are read, and what could be one and is refused.

A table of captions in the folder (metadata.jsonl, metadata.csv, or any other that names its images); a caption file for each
image (a.png, a.txt), beside it or in a folder of captions; or one subfolder per class, whose name is the caption. What could
be captions and is not read is an error, and `entries` says where the captions are from. No image is opened here.

Rules: metadata.jsonl is preferred to metadata.csv, then files beside images, then other tables; a.txt to a.caption and a.json,
and a.png to a.jpg, a.jpeg and a.webp that share a caption file. Several lines, or several rows, are several captions. Folders
that are all named like 10_name give their images that weight.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tinydiff.config import FILES, NAMES
from tinydiff.data.captions import (
    MAX_CAPTION_FILE,
    SIDECARS,
    caption_text,
    clean_captions,
    label_of,
    no_caption,
    read_sidecar,
    texts_of,
    weight_of,
)
from tinydiff.data.listing import IMAGES, Skips, kind, stem, summary
from tinydiff.data.tables import (
    CONTROL_KEYS,
    NUMBERED,
    OTHER_KEYS,
    TABLES,
    Names,
    Row,
    file_of,
    names_images,
    rows,
    slashed,
)
from tinydiff.data.wording import words_of
from tinydiff.errors import DataError
from tinydiff.images import KINDS
from tinydiff.system import shown

METADATA = ("metadata.jsonl", "metadata.csv")
UNREAD = (  # kinds that could hold captions
    *(".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".db", ".sqlite", ".sqlite3", ".pkl"),
    *(".xml", ".yaml", ".yml"),
)
BESIDE_IMAGES = (*UNREAD, ".md", ".rtf", ".html", ".htm")  # kinds that could, where they have an image's name
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
DOCUMENTS = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|contributors|changelog|credits|citation|attribution|requirements"
    r"|todo|classes|dataset_infos?)\b.*"
)
TITLES = ("metadata", "captions", "annotations")  # of what is beside the folder
REPEATS = re.compile(r"(\d{1,4})_(.*\S.*)")
NUMBER = re.compile(r"\s*[-+]?\d+(\.\d+)?\s*")
TEXTS = ("captions", "caption", "texts", "text", "txt", "prompts", "tags")  # folders of caption files
BESIDE = 1000  # files beside the folder that are looked at


class Entry(NamedTuple):
    """An image; `digest`, the SHA-256 of its file, and `size`, (width, height), are known once it is decoded.

    `control`: the image that is to control it, with its digest, where a table names one; `other` likewise, another image that a
    denoiser may be told; `label`: its class.
    """

    name: str
    captions: tuple[str, ...]
    weight: float = 1.0
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    control: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    label: str = ""


Found = tuple[list[Entry], str]  # images with captions, and where these are from


def of_one(root: Path, names: list[str], skips: Skips, caption: str) -> Found:
    """Every image, under one caption. Raises DataError where there is none."""
    return [Entry(name, (caption,)) for name in _images(root, names, skips)], f"every one captioned {shown(caption)!r}"


def entries(root: Path, names: list[str], skips: Skips, captions: str = FILES) -> Found:
    """Every image that has captions, from where `data.captions` says. Raises DataError if the layout is none of the three."""
    column = captions.partition(":")[2].strip()
    known = Names(root, names, column)
    if captions != NAMES and (table := _metadata(root, names, skips)):
        return _from_table(root, table, known, skips), f"captions from {shown(table)}"
    images = _images(root, names, skips)
    if captions == NAMES:
        return _weighed(_from_names(images, skips), "captions from their names")
    kinds = (".json",) if column else SIDECARS
    sidecars, stems = _by_stem(names, kinds, "{} is used", skips), set(map(stem, images))
    orphans = {key: name for key, name in sidecars.items() if key not in stems}
    if stems & sidecars.keys():
        _skip_orphans(names, orphans, skips)
        for name in names:
            if kind(name) in TABLES and kind(name) not in SIDECARS:
                skips.note(name, "captions beside the images are used")
        return _weighed(_from_sidecars(root, images, sidecars, skips, column), "captions from the files beside them")
    if table := _table(root, names, known):
        return _from_table(root, table, known, skips), f"captions from {shown(table)}"
    if moved := _elsewhere(images, orphans):
        places = ", ".join(sorted({shown(posixpath.dirname(name) or ".") for name in moved.values()})[:3])
        found = _from_sidecars(root, images, moved, skips, column)
        return found, f"captions from the files of their names in {places}"
    if column:
        fix = "name a column of a table that names the images, or a key of the .json files beside them"
        raise DataError(f"{shown(root)}: data.captions: no table has a column {shown(column)}; {fix}")
    classes = any("/" in name for name in images)
    _refuse_unread(root, names if classes else [name for name in names if kind(name) not in SIDECARS], known, stems)
    _refuse_beside(root, names, images)
    if classes:
        _skip_orphans(names, orphans, skips)
        return _from_classes(root, images, skips)
    if match := REPEATS.fullmatch(os.path.basename(os.path.abspath(root))):
        label = match[2].replace("_", " ")
        return [
            Entry(name, (label,)) for name in images
        ], f'every one captioned "{shown(label)}", the name of the folder'
    first = shown(stem(images[0]))
    if sidecars:
        problem = f"no caption file matches an image (as {shown(next(iter(sidecars.values())))})"
        raise DataError(f"{shown(root)}: {problem}; name them {first}.txt and so on")
    fix = f"write {first}.txt and so on, a metadata.jsonl, sort them into subfolders, or set data.captions={NAMES}"
    raise DataError(f"{shown(root)}: its {len(images)} images have no captions; {fix}")


def _images(root: Path, names: list[str], skips: Skips) -> list[str]:
    """The images. DataError where there are none."""
    images = [name for name in names if kind(name) in IMAGES]
    if not images:
        reasons = f" ({summary(sorted(skips.bad))})" if skips.bad else ""
        tars = [name for name in names if kind(name) == ".tar"]
        hint = f", or data.path to {shown(root / posixpath.dirname(tars[0]))} for the .tar shards there" if tars else ""
        raise DataError(f"data folder {shown(root)} holds no images; put {KINDS} files there{hint}{reasons}")
    return images


# ---- tables ----------------------------------------------------------------------------------------------------------


def _metadata(root: Path, names: list[str], skips: Skips) -> str:
    """The table of the usual name, in any case, in the folder itself; "" if there is none."""
    plain = {name: posixpath.basename(name).lower() for name in names}
    named = sorted((n for n in names if plain[n] in METADATA), key=lambda n: METADATA.index(plain[n]))
    top = [name for name in named if "/" not in name]
    if named and not top:
        places = ", ".join(dict.fromkeys(shown(posixpath.dirname(name)) for name in named[:3]))
        raise DataError(f"{shown(root)} has its metadata in subfolders ({places}); give one of them")
    for name in top[1:]:
        skips.note(name, f"{top[0]} is used")
    return top[0] if top else ""


def _table(root: Path, names: list[str], known: Names) -> str:
    """The table, of any other name, that names the images; "" if there is none. DataError where there are several."""
    tables = [name for name in names if kind(name) in TABLES and not _document(name)]
    ours = [name for name in tables if _names_images(root / name, known, posixpath.dirname(name))]
    if len(ours) > 1:
        listed = ", ".join(map(shown, ours[:3]))
        fix = f"keep one, as metadata{kind(ours[0])}"
        raise DataError(f"{shown(root)}: several tables name its images ({listed}); {fix}")
    return ours[0] if ours else ""


def _names_images(path: Path, known: Names, folder: str) -> bool:
    try:
        return names_images(path, known, folder)
    except DataError:  # no table
        return False


def _from_table(root: Path, table: str, known: Names, skips: Skips) -> list[Entry]:
    """Entries of a table; the captions of rows that name the same file are joined."""
    number, entries, called = 0, dict[str, Entry](), dict[str, str]()
    for number, row in rows(root / table, known, posixpath.dirname(table)):
        try:
            file, entry = _entry(row, known, posixpath.dirname(table))
            if (other := called.setdefault(entry.name, file)) != file:
                raise ValueError(f"{shown(file)} and {shown(other)} would both be {shown(entry.name)}")
            old = entries.get(entry.name, entry)
            entries[entry.name] = old._replace(captions=tuple(dict.fromkeys(old.captions + entry.captions)))
        except ValueError as error:
            skips.bad.append((f"{shown(table)}:{number}", str(error)))
    if not number:
        raise DataError(f"{shown(root / table)} is empty; write a row with file_name and text for each image")
    used = {*entries, *(each[0] for entry in entries.values() for each in (entry.control, entry.other) if each)}
    for name in sorted(known.all):
        if kind(name) in IMAGES and name not in used:
            skips.note(name, f"not used by {table}")
    return list(entries.values())


def _entry(row: Row, known: Names, folder: str) -> tuple[str, Entry]:
    """What one row calls its file, and the entry. Raises ValueError if the row is unusable."""
    if isinstance(row, str):
        raise ValueError(row)
    if not (file := file_of(row)):
        raise ValueError("no file_name")
    name, steered = _image(file, known, folder), file_of(row, CONTROL_KEYS)
    control = (_image(steered, known, folder),) if steered else ()
    if not (texts := texts_of(row)):
        raise ValueError(no_caption(row))
    beside = known.find(called, folder) if (called := file_of(row, OTHER_KEYS)) else None
    other = (beside,) if beside and kind(beside) in IMAGES and beside != name else ()
    entry = Entry(name, tuple(clean_captions(texts)), weight_of(row), "", (0, 0), control, other, label_of(row))
    return slashed(NUMBERED.sub("", file)), entry


def _image(file: str, known: Names, folder: str) -> str:
    """The image that a table calls so. Raises ValueError if there is none."""
    if not (name := known.find(file, folder)) or kind(name) not in IMAGES:
        raise ValueError(f"no such file in the folder: {shown(file)}")
    return name


# ---- caption files ---------------------------------------------------------------------------------------------------


def _by_stem(names: list[str], kinds: tuple[str, ...], note: str, skips: Skips) -> dict[str, str]:
    """{stem: its file of the first of `kinds`}; `skips` gets the other files, with `note` about the first.

    a.png.txt counts as a.txt.
    """
    chosen: dict[str, str] = {}
    for each in kinds:
        for name in names:
            key = stem(name) if kind(stem(name)) not in IMAGES else stem(stem(name))
            if kind(name) == each and (first := chosen.setdefault(key, name)) != name:
                skips.note(name, note.format(shown(first)))
    return chosen


def _skip_orphans(names: list[str], orphans: dict[str, str], skips: Skips) -> None:
    """What has a caption and is no image is a bad one (a.mp4); a caption of nothing is only reported."""
    others = (n for n in names if kind(n) not in (*SIDECARS, *TABLES) and not _document(n))
    captioned = {stem(name): name for name in others if stem(name) in orphans}
    skips.bad += [(shown(name), f"captioned, but not a {KINDS} image") for name in captioned.values()]
    for key, name in orphans.items():
        if key not in captioned:
            skips.note(name, "caption without an image")


def _document(name: str) -> bool:
    """Whether a file is one that explains a folder, by its name."""
    return bool(DOCUMENTS.match(posixpath.basename(name).lower()))


def _elsewhere(images: list[str], orphans: dict[str, str]) -> dict[str, str]:
    """{an image's stem: the caption file of its name in another folder}, if most images have one and no name is twice."""
    files = Counter(posixpath.basename(key) for key in orphans)
    pictures = Counter(posixpath.basename(stem(name)) for name in images)
    if len(pictures) < len(images) or not files or files.most_common(1)[0][1] > 1:
        return {}
    places = {posixpath.basename(key): name for key, name in orphans.items()}
    found = {stem(name): places[base] for name in images if (base := posixpath.basename(stem(name))) in places}
    return found if 2 * len(found) > len(images) else {}


def _from_names(images: list[str], skips: Skips) -> list[Entry]:
    entries = []
    for name in images:
        try:
            entries.append(Entry(name, tuple(clean_captions([words_of(posixpath.basename(stem(name)))]))))
        except ValueError as error:
            skips.add(name, str(error))
    return entries


def _from_sidecars(
    root: Path, images: list[str], sidecars: dict[str, str], skips: Skips, column: str = ""
) -> list[Entry]:
    entries = []
    for key, name in _by_stem(images, IMAGES, "shares its caption with {}", skips).items():
        if key not in sidecars:
            skips.add(name, "no caption file")
            continue
        try:
            with open(root / sidecars[key], "rb") as file:
                text = caption_text(file.read(MAX_CAPTION_FILE + 1))
            captions, weight, label = read_sidecar(kind(sidecars[key]), text, column)
            entries.append(Entry(name, tuple(captions), weight, label=label))
        except (ValueError, OSError) as error:
            skips.add(name, (error.strerror or "caption unreadable") if isinstance(error, OSError) else str(error))
    return entries


# ---- classes ---------------------------------------------------------------------------------------------------------


def _from_classes(root: Path, images: list[str], skips: Skips) -> Found:
    entries, labels = [], dict[str, None]()
    weighed = _repeats(images)
    counts = sorted(count for count, _ in weighed.values())
    if len(counts) > 1 and counts in ([*range(len(counts))], [*range(1, len(counts) + 1)]):
        first, (_, label) = min(weighed.items(), key=lambda item: item[1])
        fix = f"name them {shown(label)} and so on, or give the weights in a metadata.jsonl"
        problem = f"the numbers of {shown(first)} and its like are either weights or an order"
        raise DataError(f"{shown(root)}: {problem}; {fix}")
    for name in images:
        label = posixpath.basename(posixpath.dirname(name))
        label = (weighed[label][1] if weighed else label).replace("_", " ")
        if label.strip():
            entries.append(Entry(name, (caption := tuple(clean_captions([label]))), label=caption[0]))
            labels.setdefault(entries[-1].captions[0])
        else:
            skips.add(name, "not in a class subfolder")
    listed = ", ".join(shown(label) for label in list(labels)[:3]) + (", ..." if len(labels) > 3 else "")
    layout = f"captioned by the names of their {len(labels)} folders ({listed})"
    if len(labels) == 1:
        layout = (
            f'every one captioned "{listed}", the name of its folder: if that is not meant, write a.txt beside a.png'
        )
    elif all(NUMBER.fullmatch(label) for label in labels):
        layout += ", which are numbers: rename the folders to say what they show"
    return _weighed(entries, layout)


def _repeats(images: list[str]) -> dict[str, tuple[float, str]]:
    """{folder: (weight, name)} if all images are in folders like 10_name, as some trainers have them; else {}."""
    folders = {posixpath.basename(posixpath.dirname(name)) for name in images}
    found = {folder: (float(match[1]), match[2]) for folder in folders if (match := REPEATS.fullmatch(folder))}
    return found if len(found) == len(folders) else {}


def repeats(path: str) -> float:
    """How often the images of a folder are drawn, by its name if that is like 10_name."""
    match = REPEATS.fullmatch(os.path.basename(os.path.abspath(path)))
    return float(match[1]) or 1.0 if match else 1.0


def _weighed(entries: list[Entry], layout: str) -> Found:
    """Entries by the weights of their folders, where these have them."""
    weights = _repeats([entry.name for entry in entries])
    if not weights or not all(weight for weight, _ in weights.values()):
        return entries, layout
    folders = (posixpath.basename(posixpath.dirname(entry.name)) for entry in entries)
    weighed = [e._replace(weight=e.weight * weights[f][0]) for e, f in zip(entries, folders, strict=True)]
    return weighed, f"{layout}, weighed by the numbers of their folders"


# ---- what is not read ------------------------------------------------------------------------------------------------


def _refuse_unread(root: Path, names: list[str], known: Names, stems: set[str]) -> None:
    """DataError for a file that could hold the captions, and does not in a way that is read."""
    pictured = {posixpath.dirname(name) for name in names if kind(name) in IMAGES}
    for name in names:
        path, base, beside = root / name, posixpath.basename(name), stem(name) in stems
        packed = kind(base) in PACKED and kind(stem(base)) in (*TABLES, *UNREAD)
        if _document(name):
            continue
        if kind(name) == ".tar" and posixpath.dirname(name) not in pictured:
            fix = f"give {shown(path.parent)}, or move it away"
            raise DataError(f"{shown(path)}: tar shards are not read together with images; {fix}")
        if packed or kind(name) in UNREAD or (beside and kind(name) in BESIDE_IMAGES):
            problem = "is of a kind that is not read; write it as metadata.jsonl with file_name and text"
        elif kind(name) in TABLES or kind(name) in SIDECARS:
            problem = _fault(path, known, posixpath.dirname(name))
        else:
            continue
        raise DataError(f"{shown(path)}: could hold captions, but {problem}, or move it away")


def _fault(path: Path, known: Names, folder: str) -> str:
    """Why a file that could be a table of captions is none of this folder, and the fix."""
    try:
        names_images(path, known, folder)
    except DataError as error:
        return str(error).removeprefix(f"{shown(path)}: ")
    return "names no image that is here with one; write it as metadata.jsonl with file_name and text"


def _refuse_beside(root: Path, names: list[str], images: list[str]) -> None:
    """DataError where a table, or a folder of caption files, beside the folder names its images."""
    known, wanted = Names(root, names), {posixpath.basename(stem(name)) for name in images}
    for path in _beside(root):
        if path.is_dir() and any(kind(each) in SIDECARS and stem(each) in wanted for each in _some(path)):
            problem, fix = "names the images", f"move its files beside the images of {shown(root)}"
        elif path.is_file() and kind(path.name) in UNREAD:
            problem, fix = "could caption the images", "write it as metadata.jsonl there, or move it away"
        elif path.is_file() and _names_images(path, known, ""):
            problem, fix = "names the images", f"move it into {shown(root)} as metadata{kind(path.name)}"
        else:
            continue
        raise DataError(f"{shown(path)}: {problem} of {shown(root)}, which have no captions there; {fix}")


def _beside(root: Path) -> Iterator[Path]:
    """Files that could be tables, and folders, beside a folder."""
    parent, own = Path(os.path.realpath(root)).parent, Path(os.path.realpath(root)).name
    for name in sorted(_some(parent)):
        path = parent / name
        titled = kind(name) in UNREAD and stem(name).lower() in TITLES
        if name != own and (kind(name) in TABLES or titled or name.lower() in TEXTS):
            yield path


def _some(folder: Path) -> list[str]:
    """The first names in a folder."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry, _ in zip(entries, range(BESIDE), strict=False)]
    except OSError:
        return []
