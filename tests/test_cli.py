"""The command line as a person or a script meets it: separate processes, exit codes, one-line errors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from interpreters import ENV, ROOT
from PIL import Image


def tinydiff(*words: str, cwd: Path, stdin: bytes = b"", **more: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tinydiff", *words]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, env=ENV | dict(more))  # type: ignore[arg-type]


def refused(code: int, *words: str, cwd: Path, says: str, stdin: bytes = b"") -> None:
    """Exit code, one line on stderr with `says` in it, nothing on stdout, no file left behind."""
    before = sorted(cwd.rglob("*"))
    done = tinydiff(*words, cwd=cwd, stdin=stdin)
    text = done.stderr.decode()
    assert (done.returncode, text.count("\n"), done.stdout) == (code, 1, b""), text
    assert says in text and "Traceback" not in text
    assert sorted(cwd.rglob("*")) == before


def test_help_imports_no_array_library(tmp_path: Path) -> None:
    for flag in ("--help", "--version"):
        code = (
            f"import sys; sys.argv = ['tinydiff', '{flag}']\n"
            "import tinydiff.cli as c\n"
            "try: c.main()\nexcept SystemExit: pass\n"
            "print(sorted({'numpy', 'torch', 'onnxruntime', 'PIL', 'tokenizers'} & set(sys.modules)), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, cwd=tmp_path)
        assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["genrate", "x"], "generate"),
        (["generate", "x", "--stepz", "3"], "--stepz"),
        (["generate", "x", "--sampler", "eular"], "did you mean 'euler'"),
        (["generate", "x", "--backend", "tensorflow"], "onnx"),
        (["generate", ""], "empty"),
        (["generate", "x", "--steps", "0"], "--steps"),
        (["generate", "x", "-s", "-1"], "seed"),
        (["generate", "x", "-W", "60"], "nearest are 32 and 64"),
        (["generate", "x", "-o", "x.jpg"], ".png"),
        (["generate", "x", "--cfg-scale", "nan"], "cfg-scale"),
        (["generate", "x", "--cfg-interval", "0.5"], "two shares"),
        (["generate", "a (red heart"], "never closed"),
        (["generate", "a AND"], "nothing after it"),
        (["generate", "x", "--mask", "m.png", "--fit"], "--mask, --fit: there is no image"),
        (["generate", "x", "-i", "x.png", "--strength", "1.5"], "from 0"),
        (["generate", "x", "-i", "x.png", "--outpaint", "1,2"], "four numbers"),
        (["generate", "x", "-i", "x.png", "-W", "64"], "--fit"),
        (["generate", "x", "--frames", "3"], "--to PROMPT"),
        (["generate", "x", "--seed-path", "1"], "two or more seeds"),
        (["generate", "x", "--to", "y", "-o", "x.jpg"], ".webp"),
        (["generate", "x AND y", "--to", "z"], "AND"),
        (["generate", "x", "--to", "y", "--count", "2"], "no --count"),
        (["train", "--set", "train.sed=1"], "did you mean 'seed'"),
        (["train", "missing.toml"], "missing.toml"),
        (["train", "--stage", "decoder"], "denoiser"),
        (["train", "--adapter", "lora"], "give --from MODEL"),
        (["train", "--adapter", "lore", "--from", "emoji"], "did you mean 'lora'"),
        (["train", "--from", "emoji", "--stage", "autoencoder"], "this run does not train autoencoder"),
        (["train", "--stage", "denoiser", "--set", "train.denoiser.steps=0"], "set train.denoiser.steps"),
    ],
)
def test_usage_errors(words: list[str], says: str, tmp_path: Path) -> None:
    refused(2, *words, cwd=tmp_path, says=says)


def test_other_errors(tmp_path: Path) -> None:
    refused(4, "generate", "x", "-m", "nowhere", cwd=tmp_path, says="nowhere")
    refused(4, "train", "--from", "nowhere", cwd=tmp_path, says="nowhere: no such model")
    (tmp_path / "out.png").write_bytes(b"mine")
    refused(2, "generate", "x", cwd=tmp_path, says="--force")
    assert (tmp_path / "out.png").read_bytes() == b"mine"
    bad = tinydiff("train", "--set", "data.path=nowhere", "--run-dir", "run", cwd=tmp_path)
    assert bad.returncode == 3 and b"nowhere" in bad.stderr and bad.stderr.count(b"\n") == 1
    (tmp_path / "file").write_text("")
    busy = tinydiff("generate", "x", "-o", "file/x.png", cwd=tmp_path)
    assert busy.returncode in (2, 7) and busy.stderr.count(b"\n") == 1


def test_seeds_and_batches_agree(tmp_path: Path) -> None:
    done = tinydiff(
        "generate", "red heart", "-s", "7", "--count", "3", "-o", "many/", "--json", "--steps", "4", cwd=tmp_path
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["seed"] for r in rows] == [7, 8, 9] and [r["path"] for r in rows] == [
        f"many/{i:04d}.png" for i in range(3)
    ]
    assert {"prompt", "steps", "sampler", "width", "height", "backend", "seconds"} <= rows[0].keys()
    tinydiff("generate", "red heart", "-s", "8", "-o", "one.png", "--steps", "4", cwd=tmp_path)
    alone, among = (np.asarray(Image.open(tmp_path / p)).astype(int) for p in ("one.png", "many/0001.png"))
    assert np.abs(alone - among).max() <= 1


def test_stdout_metadata_and_inspect(tmp_path: Path) -> None:
    done = tinydiff("generate", "red heart", "-s", "3", "-o", "-", "--steps", "2", cwd=tmp_path)
    assert Image.open(io.BytesIO(done.stdout)).size == (128, 128)
    (tmp_path / "x.png").write_bytes(done.stdout)
    settings = json.loads(tinydiff("inspect", "x.png", "--json", cwd=tmp_path).stdout)["settings"]
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("red heart", 3, 2)
    assert str(ROOT) not in done.stdout.decode("latin-1")
    bare = tinydiff("generate", "red heart", "-s", "3", "-o", "-", "--steps", "2", "--no-metadata", cwd=tmp_path)
    assert b"iTXt" not in bare.stdout and len(bare.stdout) < len(done.stdout)


def test_stdin_streams_before_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinydiff", "generate", "-", "-o", "out/", "--json", "--steps", "2"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tmp_path, env=ENV, **pipes)
    assert process.stdin and process.stdout
    process.stdin.write(b"\xef\xbb\xbfred heart\r\n\n")
    process.stdin.flush()
    first = json.loads(process.stdout.readline())
    assert first["prompt"] == "red heart" and (tmp_path / first["path"]).exists()
    process.stdin.write("green \x1b[31mapple ❤️\n".encode())
    process.stdin.close()
    second = json.loads(process.stdout.readline())
    assert "\x1b" not in second["prompt"] and second["seed"] == first["seed"] + 1
    process.stdout.close()
    assert process.wait() == 0


def test_closed_pipe_is_silent(tmp_path: Path) -> None:
    command = f"{sys.executable} -m tinydiff generate - -o out/ --json --steps 1 | head -n 1"
    prompts = b"heart\n" * 40
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], input=prompts, capture_output=True, cwd=tmp_path, env=ENV
    )
    assert done.returncode == 141 and b"Error" not in done.stderr and b"Traceback" not in done.stderr


def test_full_disk(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "tinydiff", "generate", "heart", "-o", "-", "--steps", "1"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, env=ENV)
    assert done.returncode == 7 and done.stderr.count(b"\n") == 1


def test_long_prompt_is_read_in_parts(tmp_path: Path) -> None:
    done = tinydiff("generate", "heart " * 200 + "zebra", "--steps", "1", cwd=tmp_path)
    assert done.returncode == 0 and b"read in parts" in done.stderr and b"zebra" in done.stderr


def test_damaged_model(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(ROOT / "weights" / "emoji", tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(4, "generate", "x", "-m", "model", cwd=tmp_path, says="diffusion_pytorch_model.safetensors")
    weights.unlink()
    refused(4, "generate", "x", "-m", "model", cwd=tmp_path, says="diffusion_pytorch_model.safetensors")


def test_interrupted_generation_leaves_no_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinydiff", "generate", "x", "--count", "9", "-o", "out/", "--steps", "1000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENV, stderr=subprocess.PIPE)
    time.sleep(3)
    process.send_signal(2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in said
    assert not list(tmp_path.rglob("*.png*"))


def test_frames_in_one_file(tmp_path: Path) -> None:
    way = ("generate", "red heart", "--to", "blue heart", "--frames", "3", "-s", "3", "--steps", "2")
    assert tinydiff(*way, "-o", "way.png", cwd=tmp_path).returncode == 0
    assert tinydiff(*way, "-o", "frames/", cwd=tmp_path).returncode == 0
    assert tinydiff(*way, "-o", "way.webp", cwd=tmp_path).returncode == 0
    refused(2, *way, "-o", "way.png", cwd=tmp_path, says="--force")
    frames = [np.asarray(Image.open(tmp_path / "frames" / f"{i:04d}.png")) for i in range(3)]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "way.png")), np.concatenate(frames, axis=1))
    with Image.open(tmp_path / "way.webp") as moving:
        assert moving.n_frames == 4  # there and back again
        for i, frame in enumerate([*frames, frames[1]]):
            moving.seek(i)
            np.testing.assert_array_equal(np.asarray(moving.convert("RGB")), frame)


def test_editing_from_the_command_line(tmp_path: Path) -> None:
    assert tinydiff("generate", "red heart", "-s", "3", "-o", "a.png", cwd=tmp_path).returncode == 0
    Image.fromarray(np.repeat(np.uint8([[0, 255]]), 64, axis=1).repeat(128, axis=0)).save(tmp_path / "mask.png")
    masked = tinydiff("generate", "blue heart", "-i", "a.png", "--mask", "mask.png", "-o", "b.png", cwd=tmp_path)
    assert masked.returncode == 0
    a, b = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert (a[:, :64] == b[:, :64]).all() and (a[:, 64:] != b[:, 64:]).any()
    assert (
        tinydiff("generate", "x", "-i", "a.png", "--outpaint", "0,32,0,0", "-o", "c.png", cwd=tmp_path).returncode == 0
    )
    assert np.asarray(Image.open(tmp_path / "c.png")).shape == (160, 128, 3)
    refused(3, "generate", "x", "-i", "absent.png", cwd=tmp_path, says="absent.png")
    refused(2, "generate", "x", "-i", "a.png", "--outpaint", "1,0,0,0", cwd=tmp_path, says="nearest are 128 and 160")


def test_cli_reference_is_current() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "cli_reference.py")], capture_output=True, text=True, env=ENV
    )
    assert made.stdout == (ROOT / "docs" / "cli.md").read_text(), "run: python scripts/cli_reference.py > docs/cli.md"
