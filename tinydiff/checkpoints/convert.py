"""A model from one layout to another: the diffusers folder and the single LDM file, tensors as they are stored.

It builds no network: names, sizes and bytes are all it moves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tinydiff.checkpoints import single_file
from tinydiff.checkpoints.folder import PRECISIONS, save_tensors, write_description, write_json
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import committed, shown, undisturbed
from tinydiff.networks import CONTROL, controls_of, is_xl, network_of, networks
from tinydiff.verified import verify


def to_folder(source: Source, out: Path, precision: str | None = None, force: bool = False) -> None:
    """Commit a model as a diffusers folder, as "fp32" or "fp16" where that is asked for. Raises ModelError."""
    with committed(out, replace=force) as folder, undisturbed(source.stamps):
        if not source.file:
            verify(source.path)
        for name, table in networks(source.configs).items():
            (folder / name).mkdir()
            path = folder / name / network_of(name, table).file
            save_tensors(source.tensors(name), path, PRECISIONS[precision] if precision else None)
            write_json(folder / name / "config.json", table)
        write_description(folder, source.configs, source.tokenizers, source.path)


def to_single_file(source: Source, out: Path, precision: str | None = None, force: bool = False) -> None:
    """Commit a model as one LDM file. Raises ModelError where no such file can hold it, UsageError for a name that is
    none of a file."""
    if out.suffix != ".safetensors":
        raise UsageError(f"-o {shown(out)}: a single file is a .safetensors")
    with undisturbed(source.stamps):  # afterwards all of it is open
        if not source.file:
            verify(source.path)
        tables = networks(source.configs)
        if len(controls_of(tables)) > 1:
            raise ModelError(f"{shown(source.path)}: a single file holds one control network; write a folder")
        held = {*single_file.PARTS, *([single_file.SECOND] if is_xl(source.configs) else [])}
        if set(tables) - {CONTROL.folder} != held or not all(network_of(*each).single_file for each in tables.items()):
            only = (
                "only a Stable Diffusion U-Net with CLIP's text encoder and a KL autoencoder has a single-file layout"
            )
            raise ModelError(f"{shown(source.path)}: {only}")
        if source.description.given:
            raise ModelError(
                f"{shown(source.path)}: a single file holds no model that is told a class or an image; write a folder"
            )
        added = {token.content for tokenizer in source.tokenizers.values() for token in tokenizer.added.values()}
        if words := ", ".join(sorted(added)):
            problem = f"a single file has no place for added tokens ({shown(words)})"
            raise ModelError(f"{shown(source.path)}: {problem}; write a folder")
        tensors = {name: source.tensors(name) for name in tables}
    if precision:
        tensors = {name: {k: v.to(PRECISIONS[precision]) for k, v in part.items()} for name, part in tensors.items()}
    single_file.write(out, tensors, source.configs, force)


FORMATS: dict[str, Callable[..., None]] = {"folder": to_folder, "single-file": to_single_file}
