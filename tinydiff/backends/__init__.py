"""Open a model folder with the runtime that fits it; torch and onnxruntime are imported only when chosen.

onnxruntime 1.31 sends its maker what it runs, keeps an identifier in the user's cache folder, and warns where it cannot; unless
the user's environment says ORT_DISABLE_TELEMETRY=0 it does not. It reads that once, when it is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tinydiff.checkpoints import control
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import present, shipped, shown, undisturbed

if TYPE_CHECKING:
    from tinydiff.pipeline import Backend

SHIPPED = "emoji"
TORCHS = {  # flags, and why they are not for graphs
    "--precision": "have their own; export it with another --precision",
    "--compile": "have their own; leave it out",
    "--exit": "compute all blocks; leave it out",
}
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def find_model(name: str | None) -> Path:
    """A model folder from its path, a training run's folder, or the name of a shipped model (the default)."""
    if name == "":
        raise UsageError("the model's name is empty; give a model folder, a run, a file or a shipped model")
    path = Path(name) if name else shipped(SHIPPED)
    if path.is_file():
        return path
    for candidate in map(present, (path, path / "model", shipped(name or SHIPPED))):
        if (candidate / "model_index.json").is_file():
            return candidate
    if path.is_dir():
        from tinydiff.adapters import made  # which reads configurations

        made.refuse(name)
    known = ", ".join(sorted(p.parent.name for p in shipped("").glob("*/model_index.json"))) or "none"
    problem = "no model_index.json" if path.is_dir() else "no such model"
    raise ModelError(f"{shown(path)}: {problem}; give a model folder, a finished run, or a shipped model ({known})")


def open_backend(
    source: Source,
    kind: str = "auto",
    device: str = "auto",
    wait: bool = True,
    precision: str | None = None,
    compiled: bool = False,
    leave: float = 1.0,
) -> Backend:
    """A model on onnxruntime where it holds ONNX graphs that take its control networks (or `kind` says so), else on torch.

    An ONNX bundle takes neither another autoencoder nor another prediction, nor what is torch's: a `precision` (see
    `TorchBackend.open`), being `compiled` and exits to `leave` the denoiser by (UsageError). `wait` false returns while the
    graphs are still being opened; what is wrong with them is then raised by their first use.
    """
    path = source.path
    if leave < 1 and not source.table(source.denoiser).get("exits"):
        fix = "train one with denoiser.kind dit and dit.exits, or leave it out"
        raise UsageError(f"--exit: {shown(path)} has no exits, heads that say when to leave its denoiser; {fix}")
    if leave < 1 and compiled:
        raise UsageError("--exit: what --compile compiles computes all blocks; leave one of them out")
    has_graphs = not source.file and (path / source.denoiser / "model.onnx").is_file()
    if kind == "auto" and has_graphs and not control.in_graphs(source):
        kind = "torch"
    if kind == "onnx" and not has_graphs:
        raise ModelError(f"{shown(path)}: holds no ONNX graphs; write them with `tinydiff export {shown(path)} -o DIR`")
    if kind == "onnx" or (kind == "auto" and has_graphs):
        if source.vae or source.prediction or source.clip_skip is not None:
            flags = "--vae, --prediction and --clip-skip"
            raise UsageError(f"{shown(path)}: {flags} are for weights; export it with them, its graphs have theirs")
        given = {"--precision": precision, "--compile": compiled, "--exit": leave < 1}
        for flag, why in TORCHS.items():
            if given[flag]:
                raise UsageError(f"{shown(path)}: {flag} is torch's, and graphs {why}, or use --backend torch")
        from tinydiff.backends.onnx import OnnxBackend

        with undisturbed(source.stamps):
            return OnnxBackend(source, device, wait)
    if device not in ("auto", "cpu", "cuda"):
        fix = "export the model to ONNX, or leave it out"
        raise UsageError(f"--device {shown(device)}: an onnxruntime plugin, and this runs on torch; {fix}")
    with undisturbed(source.stamps):
        source.check()
        source.description  # noqa: B018  what is wrong with a model is said before torch is imported
        from tinydiff.backends.pytorch import TorchBackend

        backend = TorchBackend.open(source, device, precision, compiled)
        if leave < 1:
            backend.leave(leave)
        return backend
