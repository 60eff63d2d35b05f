"""What tinydiff promises when it is fed garbage, as far as it concerns no module alone. docs/reliability.md lists all."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pickle
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from interpreters import ENV, ROOT
from PIL import Image

from tinydiff import cli, config, images
from tinydiff.data import folder
from tinydiff.data.folder import FolderSource
from tinydiff.errors import DataError

TINYDIFF = [sys.executable, "-m", "tinydiff"]


ONE = ("generate", "heart", "-s", "1", "--steps", "1")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """A function (words, stdin) -> (exit code, stdout, stderr) of the command in this process, in an empty folder."""

    def main(*words: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tinydiff", *words])
        (tmp_path.parent / "stdin").write_bytes(stdin)
        with open(tmp_path.parent / "stdin") as file, pytest.raises(SystemExit) as left:
            monkeypatch.setattr(sys, "stdin", file)
            cli.main()
        return left.value.code, *capfd.readouterr()  # type: ignore[return-value]

    return main


@pytest.fixture
def in_time() -> Iterator[None]:
    """Ends a test that waits for what never comes."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


# ---- files that run code -------------------------------------------------------------------------------------------

FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "yaml", "cloudpickle"}


RUNS = {"eval", "exec", "compile", "__import__"}


def dangers(code: str) -> list[str]:
    """What in a source could run what a file says, or decode an image that is cut."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            tensors_alone = name == "torch.load" and "weights_only=True" in map(ast.unparse, node.keywords)
            found += (
                [name] if name in RUNS or (name in ("torch.load", "os.system", "np.load") and not tensors_alone) else []
            )
            found += ["shell=True" for word in node.keywords if word.arg == "shell"]
        elif isinstance(node, ast.Attribute | ast.Name):
            name = ast.unparse(node).split(".")[-1]
            found += [name] if name in ("LOAD_TRUNCATED_IMAGES", "SIG_DFL", "trust_remote_code") else []
    return found


def test_no_source_can_run_what_a_file_says() -> None:
    for code in (
        "import pickle",
        "from yaml import load",
        "torch.load(x)",
        "torch.load(x, weights_only=y)",
        "eval(x)",
        "run(x, shell=True)",
    ):
        assert dangers(code), code
    assert dangers("model.eval(); re.compile(x); ImageFile.LOAD_TRUNCATED_IMAGES = True") == ["LOAD_TRUNCATED_IMAGES"]
    sources = [*(ROOT / "tinydiff").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    assert len(sources) > 40
    assert {str(path): dangers(path.read_text()) for path in sources if dangers(path.read_text())} == {}


class Canary:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("canary",)


def payloads() -> dict[str, bytes]:
    array = io.BytesIO()
    np.save(array, np.array([Canary()], object), allow_pickle=True)
    return {
        "0": pickle.dumps(Canary(), 0),
        "2": pickle.dumps(Canary(), 2),
        "4": pickle.dumps(Canary()),
        "npy": array.getvalue(),
    }


@pytest.mark.parametrize("kind", payloads())
def test_a_pickle_is_never_opened(kind: str, run: Callable[..., tuple], tmp_path: Path) -> None:
    os.chdir(tmp_path)
    pickle.loads(payloads()["2"])
    (tmp_path / "canary").rmdir()  # it sings
    for name in ("a.ckpt", "a.pt", "a.pkl", "a.npy", "a.safetensors"):
        (tmp_path / name).write_bytes(payloads()[kind])
        for words in (("generate", "x", "-m", name), ("export", name, "-o", "out"), ("inspect", name)):
            code, out, error = run(*words)
            assert (code, out, error.count("\n")) == ((4, "", 1) if words[0] != "inspect" else (code, "", 1)), error
            assert code in (2, 4) and name in error
        (tmp_path / name).unlink()
    assert list(tmp_path.iterdir()) == []


def test_code_beside_the_weights_is_not_run(tiny_model: Path, tmp_path: Path) -> None:
    """Nor is a module that a configuration names imported, nor any connection made."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    sing = f"import os; os.makedirs({str(tmp_path / 'canary')!r}, exist_ok=True)\n"
    for name in ("sitecustomize.py", "unet/unet.py", "modeling_tiny.py", "pipeline.py", "__init__.py", "conftest.py"):
        (model / name).write_text(sing)
    words = [*TINYDIFF, "generate", "a square", "-m", "model", "--steps", "1"]
    done = subprocess.run(words, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 4 and "not listed in manifest.json" in done.stderr
    (model / "manifest.json").unlink()
    settings = json.loads((model / "unet" / "config.json").read_text())
    named = {"_class_name": "modeling_tiny.UNet", "auto_map": {"AutoModel": "modeling_tiny.UNet"}}
    (model / "unet" / "config.json").write_text(json.dumps(settings | named))
    watched = (
        "import sys; sys.argv = ['tinydiff', *sys.argv[1:]]\n"
        "def watch(event, args):\n    if event.startswith('socket.'): raise SystemExit(99)\n"
        "sys.addaudithook(watch)\nfrom tinydiff.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", watched, *words[3:]], cwd=tmp_path, env=ENV, capture_output=True)
    assert done.returncode == 0 and not (tmp_path / "canary").exists(), done.stderr
    assert (tmp_path / "out.png").exists()


# ---- images and folders --------------------------------------------------------------------------------------------


def encoded(kind: str, **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True})],
)
def test_cut_at_every_byte(kind: str, options: dict) -> None:
    """Refused, or, where only what follows the pixels is missing, the same pixels."""
    data, refused = encoded(kind, **options), 0
    whole = images.open_image(data)
    for length in range(len(data)):
        try:
            np.testing.assert_array_equal(images.open_image(data[:length]), whole)
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused >= len(data) - 20


@pytest.mark.parametrize(
    "start", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"8BPS\0\1", b"SIMPLE  =                    T", b"\0\0\1\0"]
)
def test_other_formats_by_another_name(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(start + bytes(3000))
    with pytest.raises(DataError, match=f"not a {images.KINDS} image"):
        images.open_image(tmp_path / "a.png")


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is that of the bombs."""
    code = (
        "import resource, struct, zlib\nfrom tinydiff import images\nfrom tinydiff.errors import DataError\n"
        "def chunk(k, d): return struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d))\n"
        "def png(w, h, *more): return b'\\x89PNG\\r\\n\\x1a\\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) "
        "+ b''.join(more) + chunk(b'IDAT', zlib.compress(bytes(10**7))) + chunk(b'IEND', b'')\n"
        "text = chunk(b'zTXt', b'a\\0\\0' + zlib.compress(bytes(50_000_000)))\n"
        "bombs = [png(65500, 65500), png(2**31 - 1, 1), png(8200, 8200), png(1, 1, text)]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for bomb in bombs:\n"
        "    try: images.open_image(bomb); print('opened')\n"
        "    except DataError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 0 and int(done.stdout) < 100_000, done.stdout + done.stderr  # kilobytes


def captioned(path: Path, *sizes: tuple[int, int]) -> Path:
    path.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (200, 10, number)).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"red {number}")
    return path


def test_a_folder_of_one_image_trains(tiny_config: config.Config, tmp_path: Path) -> None:
    """Fewer than a batch, and of a size that only cropping saves."""
    from tinydiff.training.loop import run

    data = captioned(tmp_path / "data", (1, 10_000))
    stage = {"steps": 1, "save_every": 1, "sample_every": 0, "warmup": 0}
    train = tiny_config.train
    train = replace(train, autoencoder=replace(train.autoencoder, **stage), denoiser=replace(train.denoiser, **stage))
    cfg = replace(tiny_config, data=replace(tiny_config.data, path=str(data)), train=train)
    assert (run(cfg, tmp_path / "run") / "model_index.json").exists()


def test_a_million_images_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept and what is needed meanwhile for each of 3,000, times a million, is under two gigabytes."""
    monkeypatch.setattr(folder, "BATCH", 64)  # what is checked at once is a constant
    count, first = 3_000, captioned(tmp_path, (1, 1)) / "0.png"
    for number in range(1, count):
        os.link(first, tmp_path / f"{number:07d}.png")
    rows = (json.dumps({"file_name": f"{n:07d}.png", "text": f"a caption of an image, {n}"}) for n in range(1, count))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    tracemalloc.start()
    try:
        source = FolderSource(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(source) == count - 1 and peak / count < 2_000


PIPES = {
    ("train", "pipe.toml"): 2,
    ("train", "pipe.toml", "--dry-run"): 2,
    ("inspect", "pipe.toml"): 2,
    ("inspect", "pipe.png"): 3,
    ("inspect", "pipe.safetensors"): 4,
    ("generate", "x", "-m", "pipe.safetensors"): 4,
    ("generate", "x", "-i", "pipe.png"): 3,
    ("generate", "x", "-i", "ok.png", "--mask", "pipe.png"): 3,
    ("export", "pipe.safetensors", "-o", "out"): 4,
    ("evaluate", "--data", "pipe.png"): 3,
}


@pytest.mark.parametrize("words", PIPES, ids=" ".join)
@pytest.mark.usefixtures("in_time")
def test_a_pipe_is_not_waited_for(words: tuple[str, ...], run: Callable[..., tuple], tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "ok.png")
    for kind in ("toml", "png", "safetensors"):
        os.mkfifo(tmp_path / f"pipe.{kind}")
    code, out, error = run(*words)
    assert (code, out, error.count("\n")) == (PIPES[words], "", 1) and "pipe." in error


# ---- the command line ----------------------------------------------------------------------------------------------

NUMBERS = {
    "-s": ("-1", str(2**63), str(2**64), "nan", "1e9", ""),
    "--count": ("0", "-1", str(2**64), "nan", "1000000000"),
    "--frames": ("0", "1", "-1", "nan", "1000000000"),
    "--steps": ("0", "-1", "1000000000", "nan", "1.5"),
    "--batch-size": ("0", "-1", "1000000000", "inf"),
    "-W": ("0", "-1", "1000000000", "nan"),
    "-H": ("0", "-64", str(2**64), "x"),
    "--cfg-scale": ("-1", "inf", "1e9", "x"),
    "--cfg-max": ("-1", "inf"),
    "--cfg-rescale": ("2", "-1"),
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in NUMBERS.items() for value in values])
def test_numbers_out_of_range_open_nothing(
    flag: str, value: str, run: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "opening", lambda *_: pytest.fail("the model was opened"))
    code, out, error = run("generate", "x", flag, value)
    assert (code, out, error.count("\n")) == (2, "", 1) and flag in error


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "x", "--cfg-scale", "nan"),
        ("generate", "x", "--cfg-max", "nan"),
        ("generate", "x", "--cfg-interval", "nan,1"),
        ("generate", "x", "-i", "ok.png", "--strength", "nan"),
        ("generate", "x", "-i", "ok.png", "--outpaint", "-1,0,0,0"),
        ("generate", "x", "-i", "ok.png", "--outpaint", "1000000000,0,0,0"),
        ("generate", "x", "-i", "ok.png", "--outpaint", "9" * 5000 + ",0,0,0"),
        ("generate", "x", "--seed-path", "1,nan", "-o", "way.png"),
        ("generate", "x", "--seed-path", f"1,{2**63}", "-o", "way.png"),
        ("evaluate", "--data", "shapes", "--count", "0"),
        ("evaluate", "--data", "shapes", "-s", str(2**63)),
        *(("export", "-o", "out", "--opset", opset) for opset in ("-1", "0", "17", "24")),
        *(("generate", "x", flag, "") for flag in ("--precision", "--prediction", "--device", "--backend")),
        *(("export", "-o", "out", flag, "") for flag in ("--precision", "--device", "--format", "--opset", "--atol")),
        ("evaluate", "--data", "shapes", "--precision", ""),
        ("export", "-o", "out", "--atol", "nan"),
        ("generate",),
        ("evaluate",),
        ("export",),
        ("train", "one.toml", "two.toml"),
        ("generate", "x", "-s"),
        ("generate", "-x"),
    ],
    ids=lambda words: " ".join(words)[:50],
)
def test_other_mistakes_are_one_line(words: tuple[str, ...], run: Callable[..., tuple], tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "ok.png")
    code, out, error = run(*words)
    assert (code, out, error.count("\n")) == (2, "", 1), error
    assert [path.name for path in tmp_path.iterdir()] == ["ok.png"]


FLAGS = "-m -o -s --count --seed-path --frames --batch-size --steps --cfg-scale --cfg-max --cfg-complex"


FLAGS += " --cfg-interval --cfg-rescale --sampler --spacing -W -H -i --strength --mask --outpaint --prediction --device"


@pytest.mark.parametrize("flag", FLAGS.split())
def test_long_values_are_cut(flag: str, run: Callable[..., tuple], tmp_path: Path) -> None:
    """Whatever a value of 5,000 characters does, every line is short and the fix is at its end."""
    Image.new("RGB", (64, 64)).save(tmp_path / "ok.png")
    beside = ("-i", "ok.png") if flag in ("--strength", "--mask", "--outpaint") else ()
    beside += ("--to", "y", "-o", "way.png") if flag in ("--seed-path", "--frames") else ()
    for value in ("9" * 5000, "x\x1b /" * 1250):
        code, _, error = run(*ONE, "--force", *beside, flag, value)
        assert code in (2, 3, 4, 7) and len(error) <= 1020 and error.count("\n") == 1


EMPTY = [
    ("generate", "x", "-m", ""),
    ("generate", "x", "-o", ""),
    ("generate", "x", "-i", ""),
    ("generate", "x", "-i", "x.png", "--mask", ""),
    ("generate", "x", "--vae", ""),
    ("export", "", "-o", "x"),
    ("export", "-o", "", "--force"),
    ("evaluate", "", "--data", "shapes"),
    ("inspect", ""),
    ("train", ""),
    ("train", "--run-dir", ""),
]


@pytest.mark.parametrize("words", EMPTY, ids=" ".join)
def test_an_empty_name_is_no_name(words: tuple[str, ...], run: Callable[..., tuple]) -> None:
    code, out, error = run(*words)
    assert (code, out, error.count("\n")) == (2, "", 1) and "name is empty" in error and not list(Path().iterdir())


def test_messages_hold_no_control_characters(run: Callable[..., tuple]) -> None:
    name = "a\x1b[31m[/red]\n\u202e"
    for words in (
        ("generate", "x", "-m", name),
        ("generate", "x", "-o", f"{name}.jpg"),
        ("generate", "x", "-i", f"{name}.png"),
        ("generate", "x", "--sampler", name),
        ("inspect", name),
        ("train", f"{name}.toml"),
        ("train", "--set", f"{name}=1"),
        ("evaluate", "--data", name),
        (name,),
        (f"--{name}",),
    ):
        code, _, error = run(*words)
        assert code in (2, 3, 4) and error[:-1].isprintable() and error[-1] == "\n"
    code, _, error = run(*ONE, "-o", f"{name}.png")
    assert code == 0 and error[:-1].isprintable() and Path(f"{name}.png").exists()


def test_prompts_of_every_kind(run: Callable[..., tuple], tiny_model: Path, tmp_path: Path) -> None:
    """A prompt is text to the model and to nothing else: no path, no markup, no flag."""
    prompts = {
        b"a\0b": "a b",
        b"\xff\xfe bad": "\ufffd\ufffd bad",
        b"-x": "-x",
        b"[[bold]red[/bold]]": "[[bold]red[/bold]]",
        b"\x1b[31mred": "red",
        b"../../x": "../../x",
        b"</script>": "</script>",
        "猫 مرحبا 👩\u200d🚒".encode(): "猫 مرحبا 👩\u200d🚒",
    }
    code, out, _ = run(
        "generate", "-", "-m", str(tiny_model), *ONE[4:], "--json", "-o", "out/", stdin=b"\n".join(prompts)
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["prompt"] for row in rows] == list(prompts.values())
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png")) == [row["path"] for row in rows]
    assert run("generate", "\udcff", "-m", str(tiny_model), *ONE[4:])[0] == 0
    for words, stdin in (("-", b"x" * 10**6), ("x" * 10_001, b""), ("x", b"")):
        more = ("-n", "x" * 10_001) if words == "x" else ()
        code, _, error = run("generate", words, "-m", str(tiny_model), "-o", "long.png", *more, stdin=stdin)
        assert code == 2 and "over 10000; shorten it" in error and not (tmp_path / "long.png").exists()


def test_a_bad_line_leaves_rows_of_the_others(run: Callable[..., tuple], tiny_model: Path) -> None:
    words = ("-m", str(tiny_model), "-s", "3", "--steps", "1", "--json", "-o", "out/", "--count", "2")
    code, out, error = run("generate", "-", *words, stdin=b"a heart\n(a\nred")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and error.count("\n") == 1 and error.startswith("tinydiff: line 2 of stdin: prompt, character 1")
    assert [(row["prompt"], row["seed"], row["path"][-8:]) for row in rows] == [
        (prompt, 3 + i, f"{i:04d}.png") for i, prompt in ((0, "a heart"), (1, "a heart"), (4, "red"), (5, "red"))
    ]


def test_text_in_an_image_is_no_setting(run: Callable[..., tuple], tiny_model: Path, tmp_path: Path) -> None:
    settings = {"prompt": "yours", "steps": 999, "seed": 5, "model": "/home/me/x"}
    (tmp_path / "in.png").write_bytes(images.encode_png(np.zeros((16, 16, 3), np.uint8), settings))
    words = ("generate", "mine", "-m", str(tiny_model), "-i", "in.png", "-s", "1", "--steps", "2")
    assert run(*words)[0] == 0
    written = images.read_settings(tmp_path / "out.png")
    assert (written["prompt"], written["steps"], written["seed"], written["model"]) == ("mine", 2, 1, "model")


# ---- numbers that are NaN -----------------------------------------------------------------------------------------------

SPOILT = {
    "the text encoder": "text_model.final_layer_norm.bias",
    "the denoiser at step 1 of 1": "conv_out.bias",
    "the autoencoder's encoder": "quant_conv.bias",
    "the autoencoder's decoder": "decoder.conv_out.bias",
}


def spoil(path: Path, name: str) -> None:
    """Makes a tensor NaN where it lies, in the files that have it: graphs that name them read it too."""
    for file in path.rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        first, end = json.loads(data[8:start]).get(name, {}).get("data_offsets", (0, 0))
        data[start + first : start + end] = b"\xff" * (end - first)
        file.write_bytes(data)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("part", SPOILT)
def test_weights_of_nan_are_told_by_their_part(
    part: str, backend: str, run: Callable[..., tuple], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    shutil.copytree(ROOT / "weights" / "emoji", tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json"))
    spoil(tmp_path / "model", SPOILT[part])
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    before = sorted(tmp_path.rglob("*"))
    words = ("generate", "heart", "-m", "model", "-s", "1", "--steps", "1", "--backend", backend)
    code, out, error = run(*words, "-i", "in.png", "--strength", "1")
    assert (code, out, error.count("\n")) == (5, "", 1) and f"tinydiff: {part} gives NaN or infinite values; " in error
    assert sorted(tmp_path.rglob("*")) == before and not recwarn.list
    if part == "the autoencoder's encoder":  # which drawing does not ask
        assert run(*words)[0] == 0
        assert (
            run("evaluate", "model", "--data", "shapes", "--count", "1", "--steps", "1", "--backend", backend)[0] == 5
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_weights_of_nan_are_not_exported(precision: str, run: Callable[..., tuple], tmp_path: Path) -> None:
    """Also those of a part that no comparison can tell from torch, which gives NaN as well."""
    shutil.copytree(ROOT / "weights" / "emoji", tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json"))
    spoil(tmp_path / "model", "quant_conv.bias")
    code, out, error = run("export", "model", "-o", "bundle", "--precision", precision)
    assert (code, out, error.count("\n")) == (4, "", 1) and "vae quant_conv.bias has NaN or infinite values" in error
    assert not (tmp_path / "bundle").exists()


MEMORY = [
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    ),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:8])
def test_too_little_memory_is_no_bug(
    error: Exception, run: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("tinydiff.pipeline.generate", refuse)
    code, out, said = run(*ONE)
    assert (code, out, said.count("\n")) == (7, "", 1) and "out of memory; lower --batch-size" in said


# ---- streams -------------------------------------------------------------------------------------------------------


def test_closed_streams_spoil_no_file(tmp_path: Path) -> None:
    """A file that is opened gets the lowest free number; what was meant for stderr must not land in it."""
    subprocess.run([*TINYDIFF, *ONE, "-o", "open.png"], cwd=tmp_path, env=ENV, check=True, capture_output=True)
    for name, closed in {"all.png": "<&- >&- 2>&-", "out.png": ">&-", "err.png": "2>&-"}.items():
        words = " ".join([*TINYDIFF, *ONE, "--json", "-o", name, closed])
        assert subprocess.run(["bash", "-c", words], cwd=tmp_path, env=ENV).returncode == 0
        assert (tmp_path / name).read_bytes() == (tmp_path / "open.png").read_bytes()
    words = " ".join([*TINYDIFF, *ONE, "-o", "-", ">&-"])
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, env=ENV, capture_output=True)
    assert done.returncode == 2 and b"stdout is closed" in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("words", [("--version",), ("inspect",), (*ONE, "--json")])
def test_a_full_disk_behind_stdout(words: tuple[str, ...], tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*TINYDIFF, *words], stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, env=ENV)
    assert done.returncode == 7 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


def test_stdin_that_cannot_be_read(tmp_path: Path) -> None:
    words = [*TINYDIFF, "generate", "-", "-o", "out/"]
    with open(tmp_path / "sink", "wb") as sink:
        done = subprocess.run(words, stdin=sink, capture_output=True, cwd=tmp_path, env=ENV, timeout=60)
    assert done.returncode == 7 and done.stderr.startswith(b"tinydiff: stdin: ") and done.stderr.count(b"\n") == 1


def test_a_mistake_while_stdin_flows(tmp_path: Path) -> None:
    """The thread that reads must not keep the process from ending, nor abort it."""
    process = subprocess.Popen(
        [*TINYDIFF, "generate", "-", "-o", "out/"],
        cwd=tmp_path,
        env=ENV,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stderr

    def flow(stdin: io.BufferedIOBase) -> None:
        try:
            while True:
                stdin.write(b"y" * 65536)
        except OSError:
            return

    thread = threading.Thread(target=flow, args=(process.stdin,))
    thread.start()
    with process.stderr as stderr:
        said = stderr.read()
    assert process.wait(60) == 2 and said.count(b"\n") == 1 and b"shorten it" in said
    thread.join()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def test_a_bare_environment_gives_plain_lines(tmp_path: Path) -> None:
    bare = {"PYTHONPATH": str(ROOT), "LANG": "C", "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "1"}
    words = [*TINYDIFF, "generate", "h\u00e9", "-s", "1", "--steps", "1", "--json"]
    done = subprocess.run(words, cwd=tmp_path, env=bare, capture_output=True)
    assert done.returncode == 0 and json.loads(done.stdout)["prompt"] == "h\u00e9"
    helped = subprocess.run([*TINYDIFF, "--help"], cwd=tmp_path, env=bare, capture_output=True)
    assert helped.returncode == 0 and b"\x1b" not in done.stderr + done.stdout + helped.stdout


def test_bytes_do_not_go_to_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run([*TINYDIFF, *ONE, "-o", "-"], stdout=theirs, stderr=subprocess.PIPE, cwd=tmp_path, env=ENV)
    os.set_blocking(ours, False)
    os.close(theirs)
    with pytest.raises(OSError):
        assert os.read(ours, 1) == b""
        raise OSError
    os.close(ours)
    assert done.returncode == 2 and b"terminal" in done.stderr


# ---- the list ------------------------------------------------------------------------------------------------------


def test_the_tests_that_are_named_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text()))
    found = {
        name
        for path in (ROOT / "tests").glob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 80 and named <= found, sorted(named - found)
