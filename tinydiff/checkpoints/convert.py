"""A model from one layout to another: the diffusers folder and the single LDM file, tensors as they are stored.

It builds no network: names, sizes and bytes are all it moves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tinydiff.checkpoints import single_file
from tinydiff.checkpoints.description import tokenizer_of
from tinydiff.checkpoints.folder import FILES, PRECISIONS, copy_description, save_tensors, stored, write_json
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import committed, shown


def to_folder(
    path: Path,
    out: Path,
    vae: Path | None = None,
    prediction: str | None = None,
    precision: str | None = None,
    force: bool = False,
) -> None:
    """Commit the model at `path` as a diffusers folder, as "fp32" or "fp16" where that is asked for. Raises ModelError."""
    found, tensors = stored(path, vae, prediction)
    with committed(out, replace=force) as folder:
        for name, part in tensors.items():
            (folder / name).mkdir()
            save_tensors(part, folder / name / FILES[name], PRECISIONS[precision] if precision else None)
            write_json(folder / name / "config.json", found[name])
        copy_description(path, found, tokenizer_of(path, found), folder)


def to_single_file(
    path: Path,
    out: Path,
    vae: Path | None = None,
    prediction: str | None = None,
    precision: str | None = None,
    force: bool = False,
) -> None:
    """Commit the model at `path` as one LDM file. Raises ModelError where no such file can hold it, UsageError for a name
    that is none of a file."""
    if out.suffix != ".safetensors":
        raise UsageError(f"-o {out}: a single file is a .safetensors")
    found, tensors = stored(path, vae, prediction)
    if "unet" not in found or found.get("text_encoder", {}).get("model_type", "clip_text_model") != "clip_text_model":
        raise ModelError(
            f"{shown(path)}: only a Stable Diffusion U-Net with CLIP's text encoder has a single-file layout"
        )
    if precision:
        tensors = {name: {k: v.to(PRECISIONS[precision]) for k, v in part.items()} for name, part in tensors.items()}
    single_file.write(out, tensors, found, force)


FORMATS: dict[str, Callable[..., None]] = {"folder": to_folder, "single-file": to_single_file}
