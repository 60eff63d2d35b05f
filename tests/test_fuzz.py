"""Every reader of foreign files on seeded damage: it opens, or one line says what is wrong; nothing else is raised or written.

`TINYDIFF_FUZZ=20` tries twenty times as many.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import save, toy
from PIL import Image

from tinydiff import config, editing, images, inspect, pipeline, report
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.data.dataset import open_source
from tinydiff.errors import UserError
from tinydiff.schema import to_toml
from tinydiff.summary import lines
from tinydiff.training import state

TIMES = int(os.environ.get("TINYDIFF_FUZZ", "1"))
LONGEST = 600  # characters of a message, among them a path of pytest's
SECONDS = 3.0
ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 1.5, -0.0, 1e-300, 1e300, 2**31, 2**63, -(2**63), 10**400),
    *(float("nan"), float("inf"), -float("inf")),
    *("8", "", "1e999", "nan", "\ud800", "\0", "../x", "/", "%s", "x" * 10_000, "\u202e\x1b[31m"),
    *([], {}, [[]], [None], [0], [2**63], ["a"], {"a": {}}, [1] * 1000, {"\ud800": "\udfff"}),
]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where every value of a JSON is, its own place first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def changed(value: Any, place: tuple, change: Callable[[Any, Any], Any]) -> Any:
    """A JSON whose container at the end of a place is changed; of the whole, another one."""
    if not place:
        return change({"": value}, "")
    if len(place) == 1:
        change(value, place[0])
    else:
        changed(value[place[0]], place[1:], change)
    return value


def odd_json(data: bytes, rng: random.Random) -> bytes:
    """One or two values replaced by odd ones, left out, or named otherwise."""
    table = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        found = places(table)
        place, odd, kind = rng.choice(found[1:] or [()]), rng.choice(ODD), rng.random()

        def change(holder: Any, key: Any, odd: Any = odd, kind: float = kind) -> None:
            if kind < 0.75:
                holder[key] = odd
            elif kind < 0.9 or not isinstance(holder, dict):
                holder.pop(key)
            else:
                holder[rng.choice(("\ud800", "x" * 300, key * 2))] = holder.pop(key)

        if place:
            changed(table, place, change)
        else:
            table = odd
    return json.dumps(table, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")


def odd_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, cut, repeated, inserted, or other content altogether; mostly near the start, where headers are."""
    near = rng.choice((64, 1024, len(data)))
    at, count, kind = rng.randrange(min(near, len(data)) or 1), rng.choice((1, 4, 64)), rng.randrange(8)
    if kind < 3:
        some = bytearray(data)
        for _ in range(min(count, len(data))):
            some[rng.randrange(min(near, len(data)))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        return bytes(some)
    return {
        3: data[:at],
        4: data[:at] + data[at + count :],
        5: data[:at] + rng.randbytes(count) + data[at:],
        6: data[:at] + data[at : at + count] * 3 + data[at:],
        7: rng.choice((b"", POINTER, b"\xff\xfe", b"\0" * 100, b"[" * 100_000, b"{}", b'"\xed\xa0\x80"', data[::-1])),
    }[kind]


def damage(path: Path, rng: random.Random) -> None:
    """One file of a folder changed, moved, or made something else; other folders may be linked to it."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        return
    file, kind = rng.choice(files), rng.random()
    data = file.read_bytes()
    file.unlink()
    if kind < 0.04:
        file.mkdir()
    elif kind < 0.08:
        os.mkfifo(file)
    elif kind < 0.1:
        file.symlink_to(file)
    elif kind < 0.14 and len(files) > 1:
        pass  # missing
    elif kind < 0.2 and len(files) > 1:
        file.write_bytes(rng.choice([each for each in files if each != file]).read_bytes())
    else:
        json_inside = file.suffix == ".json" and rng.random() < 0.8
        try:
            file.write_bytes((odd_json if json_inside else odd_bytes)(data, rng))
        except (ValueError, IndexError):  # it is damaged already
            file.write_bytes(data[:-1])


def state_of(path: Path) -> list[tuple[str, int, int]]:
    found = (path, *path.rglob("*"))
    return sorted(
        (str(p), (s := p.lstat()).st_mtime_ns, s.st_size) for p in found if not stat.S_ISFIFO(p.lstat().st_mode)
    )


def tried(read: Callable[[Path], Any], path: Path) -> str:
    """What a reader says of a folder; "" where it opens. Fails where it is anything but success or one line."""
    before, begun = state_of(path), time.process_time()
    try:
        read(path)
        said = ""
    except UserError as error:
        said = str(error)
        assert (
            error.code in (2, 3, 4, 5, 7)
            and said
            and (len(said) < LONGEST or "convert it with" in said)
            and said.isprintable()
        ), said
    assert time.process_time() - begun < SECONDS
    assert state_of(path) == before
    return said


def opened(path: Path) -> None:
    """A model by its weights: checked without torch, inspected, loaded, and an image of two steps drawn."""
    source = Source(path)
    source.check()
    source.description, source.tokenizers  # noqa: B018
    backend = TorchBackend(folder.load(Source(path)))
    d = backend.description
    if max(d.multiple, d.factor) <= 64:
        drawn(backend)


def drawn(backend: pipeline.Backend) -> None:
    d = backend.description
    g = d.generate
    request = pipeline.Request(min(2, len(d.schedule)), 3.0, g.sampler, g.spacing, d.multiple, d.multiple)
    pipeline.generate(backend, ["a red [heart]\ud800"], [1], request)


def looked(path: Path) -> None:
    for text in (*lines(told := inspect.inspect(str(path))), json.dumps(told)):
        assert text.isascii() or text.encode()


def with_graphs(path: Path) -> None:
    from tinydiff.backends.onnx import OnnxBackend

    drawn(OnnxBackend(Source(path), "cpu"))


def reported(path: Path) -> None:
    report.page(path).encode()


def configured(path: Path) -> None:
    config.load(path / "tinydiff.toml")


def pictured(path: Path) -> None:
    for file in sorted(path.iterdir()):
        image = images.open_image(file)
        if file.name == "settings.png":
            images.read_settings(file)
        assert image.dtype == np.uint8 and image.shape[2] == 3


def masked(path: Path) -> None:
    editing.read(path / "image.png", 0.5, path / "mask.webp", size=(16, 16))


def captioned(path: Path) -> None:
    source = open_source(config.load(None, [f"data.path={path}", "data.max_bad_fraction=0.01"]).data)  # by default half
    for i in range(len(source)):
        assert source.image(i).ndim == 3 and source.captions(i) and source.weight(i) >= 0
        " ".join(source.captions(i)).encode()
    source.fingerprint(), source.report().encode()


def resumed(path: Path) -> None:
    """The toy's newest checkpoint, as training finds and loads it, whatever its manifest says."""
    checkpoints = path / "checkpoints"
    newest = state.newest(checkpoints, "toy", lambda text: None, strict=True)
    state.load(newest or checkpoints / "toy-00000001", toy(0))


@pytest.fixture(scope="session")
def subjects(tmp_path_factory, tiny_model, tiny_sd_files, tiny_config, image_folder) -> dict[str, Path]:
    """What is damaged, by the name of its reader: small, whole, and without a manifest unless that is what is damaged."""
    made = {name: tmp_path_factory.mktemp("whole") / name for name in READERS}
    shutil.copytree(tiny_model, made["sealed model"])
    shutil.copytree(tiny_model, made["model"], ignore=shutil.ignore_patterns("manifest.json", "tinydiff.toml"))
    shutil.copytree(made["model"], made["looked at"])
    made["single file"].mkdir()
    shutil.copy(tiny_sd_files["clip"], made["single file"] / "model.safetensors")
    shutil.copytree(image_folder, made["captions beside"])
    pictures = sorted(image_folder.glob("*.png"))[:2]
    for name in ("images", "edit", "table", "lines"):
        made[name].mkdir()
    first, second = (images.open_image(file) for file in pictures)
    for suffix in ("png", "jpg", "webp"):
        Image.fromarray(first).save(made["images"] / f"a.{suffix}")
    (made["images"] / "settings.png").write_bytes(images.encode_png(second, {"prompt": "x", "seed": 1}))
    shutil.copy(pictures[0], made["edit"] / "image.png")
    Image.fromarray(second).save(made["edit"] / "mask.webp")
    for name in ("table", "lines"):
        for file in pictures:
            shutil.copy(file, made[name])
    rows = [{"file_name": file.name, "text": f"a {file.stem}", "weight": 2} for file in pictures]
    (made["lines"] / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made["table"] / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in rows)
    )
    made["shards"].mkdir()
    with tarfile.open(made["shards"] / "a.tar", "w") as archive:
        for file in sorted(image_folder.iterdir()):
            archive.add(file, file.name)
    made["configuration"].mkdir()
    (made["configuration"] / "tinydiff.toml").write_text(to_toml(tiny_config))
    made["checkpoint"].mkdir()
    save(made["checkpoint"], 1)
    (made["report"] / "samples").mkdir(parents=True)
    (made["report"] / "tinydiff.toml").write_text(to_toml(tiny_config))
    steps = [{"stage": "denoiser", "step": i, "loss": 1 / i, "steps_per_second": 2.0} for i in range(1, 9)]
    steps.append({"stage": "denoiser", "step": 9, "skipped": "NaN", "samples": ["a"]})
    (made["report"] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (made["report"] / "samples" / "captions.json").write_text('["a red square"]')
    shutil.copy(pictures[0], made["report"] / "samples" / "denoiser-00000009.png")
    return made


READERS: dict[str, tuple[Callable[[Path], Any], int]] = {  # and how many damages each is shown
    "model": (opened, 100),
    "sealed model": (opened, 15),
    "looked at": (looked, 12),
    "single file": (lambda path: opened(path / "model.safetensors"), 25),
    "images": (pictured, 100),
    "edit": (masked, 60),
    "captions beside": (captioned, 30),
    "table": (captioned, 60),
    "lines": (captioned, 60),
    "shards": (captioned, 60),
    "configuration": (configured, 60),
    "checkpoint": (resumed, 60),
    "report": (reported, 60),
}


@pytest.mark.parametrize("name", READERS)
def test_damage_is_success_or_one_line(name: str, subjects: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    read, count = READERS[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tried(read, subjects[name]) == ""
    refused, failures = 0, dict[str, str]()
    for number in range(count * TIMES):
        rng, path = random.Random(f"{name} {number}"), tmp_path / "damaged"
        shutil.copytree(subjects[name], path, copy_function=os.link)
        for _ in range(rng.choice((1, 1, 1, 2))):
            damage(path, rng)
        try:
            refused += bool(tried(read, path))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{last.filename}:{last.lineno}: {type(error).__name__}: {str(error)[:300]}"
            failures.setdefault(f"{last.filename}:{last.lineno}", f"damage {number}: {said}")
        shutil.rmtree(path)
    assert not failures, "\n".join(failures.values())
    assert refused > 0 or name == "report"  # which leaves out what it cannot read
