"""What runs that train adapters made: their folder, of which model, and how far they are. By JSON and names of files alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinydiff import config
from tinydiff.errors import ModelError
from tinydiff.files import read_json, shown
from tinydiff.stages import CONTROL, NONE

STEP = re.compile(r"-(\d+)")


@dataclass(frozen=True)
class Made:
    """A run's directory, and the configuration that it was begun with."""

    path: Path
    cfg: config.Config

    @property
    def kind(self) -> str:
        return self.cfg.train.adapter

    @property
    def base(self) -> str:
        return self.cfg.train.base

    @property
    def folder(self) -> Path:
        """What commands take, once there is a checkpoint."""
        return self.path / ("controlnet" if self.kind == CONTROL else "adapter")

    @property
    def step(self) -> int:
        """Of the newest checkpoint."""
        found = (
            STEP.fullmatch(path.name.removeprefix(self.kind)) for path in self.path.glob(f"checkpoints/{self.kind}-*")
        )
        return max((int(match[1]) for match in found if match), default=0)

    @property
    def sha256(self) -> str | None:
        """Of the model that it was begun with."""
        path = self.path / "base.json"
        return read_json(path).get("sha256") if path.exists() else None

    @property
    def how(self) -> str:
        """How it is drawn with."""
        flag = {CONTROL: f"--control {shown(self.path)}:IMAGE"}.get(self.kind, f"--{self.kind} {shown(self.path)}")
        return f"-m {shown(self.base)} {flag}"


def of_run(name: Any) -> Made | None:
    """The run of this name if it trains an adapter, or what it made."""
    path = Path(name or "")
    for place in (path, path.parent) if name and path.is_dir() else ():
        if (place / "tinydiff.toml").is_file() and (place / "checkpoints").is_dir():
            cfg = config.load(place / "tinydiff.toml", stored=True)
            return Made(place, cfg) if cfg.train.adapter != NONE else None
    return None


def refuse(name: Any) -> None:
    """ModelError for what is no model but what a run made for one."""
    if made := of_run(name):
        fix = (
            f"draw with {made.how}"
            if made.kind == CONTROL
            else f"write one with `tinydiff export {shown(name)} --format folder -o DIR`"
        )
        raise ModelError(f"{shown(name)}: no model, this is what a run made for {shown(made.base)}; {fix}")
