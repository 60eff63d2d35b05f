"""Which way imports point: what has to run without torch does, and `import tinydiff` imports nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from interpreters import ROOT, run_without

WITHOUT_TORCH = [
    "tinydiff.backends",
    "tinydiff.backends.binding",
    "tinydiff.backends.devices",
    "tinydiff.backends.graph",
    "tinydiff.backends.onnx",
    "tinydiff.backends.optimised",
    "tinydiff.backends.sessions",
    "tinydiff.charts",
    "tinydiff.checkpoints.counts",
    "tinydiff.checkpoints.description",
    "tinydiff.checkpoints.dit",
    "tinydiff.checkpoints.header",
    "tinydiff.checkpoints.ldm",
    "tinydiff.checkpoints.new",
    "tinydiff.checkpoints.scheduler",
    "tinydiff.checkpoints.single_file",
    "tinydiff.checkpoints.source",
    "tinydiff.checkpoints.weights",
    "tinydiff.cli",
    "tinydiff.condition",
    "tinydiff.config",
    "tinydiff.cost",
    "tinydiff.data.cache",
    "tinydiff.data.captions",
    "tinydiff.data.dataset",
    "tinydiff.data.embeddings",
    "tinydiff.data.folder",
    "tinydiff.data.layouts",
    "tinydiff.data.listing",
    "tinydiff.data.shapes",
    "tinydiff.data.shard_index",
    "tinydiff.data.shards",
    "tinydiff.data.tables",
    "tinydiff.data.tar",
    "tinydiff.diffusion.guidance",
    "tinydiff.diffusion.noise",
    "tinydiff.diffusion.predictions",
    "tinydiff.diffusion.samplers",
    "tinydiff.diffusion.schedules",
    "tinydiff.drawing",
    "tinydiff.editing",
    "tinydiff.errors",
    "tinydiff.evaluate",
    "tinydiff.files",
    "tinydiff.flags",
    "tinydiff.images",
    "tinydiff.inspect",
    "tinydiff.measure.distances",
    "tinydiff.measure.intervals",
    "tinydiff.measure.networks",
    "tinydiff.measure.oracle",
    "tinydiff.measure.quality",
    "tinydiff.measure.reconstruction",
    "tinydiff.measure.retrieval",
    "tinydiff.metrics",
    "tinydiff.networks",
    "tinydiff.networks.autoencoder",
    "tinydiff.networks.dit",
    "tinydiff.networks.network",
    "tinydiff.networks.text",
    "tinydiff.networks.unet",
    "tinydiff.pipeline",
    "tinydiff.processes",
    "tinydiff.progress",
    "tinydiff.protobuf",
    "tinydiff.report",
    "tinydiff.schema",
    "tinydiff.stages",
    "tinydiff.summary",
    "tinydiff.text.labels",
    "tinydiff.text.prompts",
    "tinydiff.text.sentencepiece",
    "tinydiff.text.tokenizer",
    "tinydiff.tiling",
    "tinydiff.training.memory",
    "tinydiff.training.metrics",
    "tinydiff.user_cache",
    "tinydiff.verified",
]
ONNXRUNTIME = {f"tinydiff.backends.{name}" for name in ("binding", "devices", "onnx", "optimised", "sessions")}


def test_the_blocker_blocks():
    with pytest.raises(AssertionError, match="torch was imported"):
        run_without("import tinydiff.models.unet", "torch")


def test_what_generates_and_evaluates_needs_no_torch():
    run_without("\n".join(f"import {name}" for name in WITHOUT_TORCH), "torch")


def test_only_the_onnx_backend_needs_onnxruntime():
    names = [name for name in WITHOUT_TORCH if name not in ONNXRUNTIME]
    run_without(
        "\n".join(f"import {name}" for name in names),
        "torch",
        "onnxruntime",
        "onnx",
        "onnxscript",
        "diffusers",
        "transformers",
    )


def test_the_mathematics_needs_nothing():
    run_without(
        "import tinydiff.diffusion.samplers, tinydiff.diffusion.guidance, tinydiff.config",
        "torch",
        "numpy",
        "PIL",
        "typer",
    )


def test_importing_tinydiff_imports_nothing():
    code = "before = set(sys.modules)\nimport tinydiff\nprint(sorted(set(sys.modules) - before))"
    assert run_without(code).strip() == "['tinydiff']"


def test_the_command_line_imports_nothing_heavy():
    code = "import tinydiff.cli\nprint([m for m in ('torch', 'numpy', 'onnxruntime', 'PIL', 'tokenizers') if m in sys.modules])"
    assert run_without(code).strip() == "[]"


def imported(path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that one imports, at its top or inside a function, but for types alone."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what only a type checker reads is no import
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & modules or {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & modules


def test_no_import_circle():
    """Whatever is left after taking away, again and again, modules that import nothing that is left."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "tinydiff").rglob("*.py")
    }
    graph = {name: imported(path, set(paths)) - {name} for name, path in paths.items()}
    while free := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph and len(paths) > 60


def test_only_the_table_asks_what_a_network_is():
    asks = re.compile(
        r"isinstance\([^)]*\b(UNet|DiT|Autoencoder|TextEncoder|T5Encoder|Labels)\b|(denoiser|text_encoder)\.kind [=!]="
    )
    inside = {ROOT / "tinydiff" / "models", ROOT / "tinydiff" / "networks"}
    found = [
        path
        for path in (ROOT / "tinydiff").rglob("*.py")
        if path.parent not in inside and asks.search(path.read_text())
    ]
    assert found == []
