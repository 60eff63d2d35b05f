"""Open a model folder with the runtime that fits it; torch and onnxruntime are imported only when chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tinydiff.checkpoints.description import denoiser_of, describe
from tinydiff.checkpoints.foreign import check
from tinydiff.checkpoints.header import header
from tinydiff.errors import ModelError, UsageError

if TYPE_CHECKING:
    from tinydiff.pipeline import Backend

SHIPPED = "emoji"


def find_model(name: str | None) -> Path:
    """A model folder from its path, a training run's folder, or the name of a shipped model (the default)."""
    package = Path(__file__).resolve().parents[1]
    shipped = next((p for p in (package / "weights", package.parent / "weights") if p.is_dir()), package / "weights")
    path = Path(name) if name else shipped / SHIPPED
    if path.is_file():
        header(path)
        return path
    for candidate in (path, path / "model", shipped / (name or SHIPPED)):
        if (candidate / "model_index.json").is_file():
            return candidate
    known = ", ".join(sorted(p.parent.name for p in shipped.glob("*/model_index.json"))) or "none"
    if path.is_dir():
        raise ModelError(
            f"{path}: no model_index.json; give a model folder, a finished run, or a shipped model ({known})"
        )
    raise ModelError(f"{path}: no such model; give a model folder, a finished run, or a shipped model ({known})")


def open_backend(
    path: Path,
    kind: str = "auto",
    device: str = "auto",
    wait: bool = True,
    vae: Path | None = None,
    prediction: str | None = None,
) -> Backend:
    """The model at `path` on onnxruntime where it holds ONNX graphs (or `kind` says so), else on torch.

    `vae` is a file whose autoencoder is taken instead of the model's, `prediction` what its denoiser predicts where it does
    not say so, or wrongly; an ONNX bundle takes neither (UsageError).
    `wait` false returns while the graphs are still being opened; what is wrong with them is then raised by their first use.
    """
    has_graphs = (path / denoiser_of(path) / "model.onnx").is_file()
    if kind == "onnx" and not has_graphs:
        raise ModelError(f"{path}: holds no ONNX graphs; write them with `tinydiff export {path} -o DIR`")
    if kind == "onnx" or (kind == "auto" and has_graphs):
        if vae or prediction:
            raise UsageError(f"{path}: --vae and --prediction are for weights; its graphs were exported with theirs")
        from tinydiff.backends.onnx import OnnxBackend

        return OnnxBackend(path, device, wait)
    check(path, vae, prediction)
    describe(path, vae, prediction)  # what is wrong with a model is said before torch is imported
    from tinydiff.backends.pytorch import TorchBackend

    return TorchBackend.open(path, device, vae, prediction)
