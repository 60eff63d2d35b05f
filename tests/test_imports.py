"""Which way imports point: what has to run without torch does, and `import tinydiff` imports nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Looked up first, before any finder: a module of these names cannot be imported, installed or not.
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Blocked())
"""
WITHOUT_TORCH = [
    "tinydiff.cli",
    "tinydiff.config",
    "tinydiff.pipeline",
    "tinydiff.drawing",
    "tinydiff.editing",
    "tinydiff.evaluate",
    "tinydiff.files",
    "tinydiff.images",
    "tinydiff.report",
    "tinydiff.backends",
    "tinydiff.backends.onnx",
    "tinydiff.cost",
    "tinydiff.data.cache",
    "tinydiff.data.embeddings",
    "tinydiff.data.shard_index",
    "tinydiff.data.shards",
    "tinydiff.data.tar",
    "tinydiff.charts",
    "tinydiff.processes",
    "tinydiff.training.metrics",
    "tinydiff.inspect",
    "tinydiff.checkpoints.description",
    "tinydiff.checkpoints.dit",
    "tinydiff.checkpoints.foreign",
    "tinydiff.checkpoints.header",
    "tinydiff.checkpoints.scheduler",
    "tinydiff.checkpoints.weights",
    "tinydiff.data.dataset",
    "tinydiff.data.folder",
    "tinydiff.data.shapes",
    "tinydiff.diffusion.guidance",
    "tinydiff.diffusion.noise",
    "tinydiff.diffusion.samplers",
    "tinydiff.text.labels",
    "tinydiff.text.prompts",
    "tinydiff.text.sentencepiece",
    "tinydiff.text.tokenizer",
    "tinydiff.training.memory",
    "tinydiff.training.progress",
]


def run(code: str, *blocked: str) -> str:
    """What the code prints in a fresh interpreter that cannot import `blocked`."""
    done = subprocess.run(
        [sys.executable, "-c", f"BLOCKED = {blocked!r}\n{BLOCK}\n{code}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_blocker_blocks():
    with pytest.raises(AssertionError, match="torch was imported"):
        run("import tinydiff.models.unet", "torch")


def test_what_generates_and_evaluates_needs_no_torch():
    run("\n".join(f"import {name}" for name in WITHOUT_TORCH), "torch")


def test_only_the_onnx_backend_needs_onnxruntime():
    names = [name for name in WITHOUT_TORCH if name != "tinydiff.backends.onnx"]
    run(
        "\n".join(f"import {name}" for name in names),
        "torch",
        "onnxruntime",
        "onnx",
        "onnxscript",
        "diffusers",
        "transformers",
    )


def test_the_mathematics_needs_nothing():
    run(
        "import tinydiff.diffusion.samplers, tinydiff.diffusion.guidance, tinydiff.config",
        "torch",
        "numpy",
        "PIL",
        "typer",
    )


def test_importing_tinydiff_imports_nothing():
    code = "before = set(sys.modules)\nimport tinydiff\nprint(sorted(set(sys.modules) - before))"
    assert run(code).strip() == "['tinydiff']"


def test_the_command_line_imports_nothing_heavy():
    code = "import tinydiff.cli\nprint([m for m in ('torch', 'numpy', 'onnxruntime', 'PIL', 'tokenizers') if m in sys.modules])"
    assert run(code).strip() == "[]"
