"""What `tinydiff train` was pointed at: a configuration, a run that goes on, or images; and the configuration that follows.

Nothing is written, and what is wrong is refused before torch is imported.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinydiff import config, processes
from tinydiff.choices import Reasons, choose, machine
from tinydiff.data.dataset import open_source
from tinydiff.data.facts import Facts
from tinydiff.data.listing import IMAGES
from tinydiff.errors import UsageError
from tinydiff.files import read_json, shipped, shown
from tinydiff.progress import Progress, note
from tinydiff.report import read_captions
from tinydiff.schema import keys, set_key
from tinydiff.stages import NONE, caption, trained
from tinydiff.start import tables

CONFIG, RUNS = "tinydiff.toml", Path("runs")


class Beginning(NamedTuple):
    """A run's configuration and its folder, why keys have their values, and what its images are where they were looked at."""

    cfg: config.Config
    run_dir: Path
    reasons: Reasons
    facts: Facts | None = None


def begin(what: Path | None, sets: Sequence[str], run_dir: Path | None = None, fresh: bool = False) -> Beginning:
    """What to train. Raises UserError for what is none of these, wrong keys, and images that cannot be read."""
    if what is None or (what.suffix == ".toml" and not what.is_dir()):
        path = what or (Path(CONFIG) if Path(CONFIG).exists() else None)
        folder = run_dir or RUNS / default_name(path)
        return Beginning(loaded(path, sets), unused(folder) if fresh else folder, {})
    if is_run(what):
        if fresh or run_dir not in (None, what):
            fix = f"give the images and a new --run-dir, or {shown(what / CONFIG)}"
            raise UsageError(f"{shown(what)}: a run, which goes on where it is; to start over {fix}")
        return Beginning(loaded(what / CONFIG, sets), what, {})
    refuse(what)
    folder = run_dir or RUNS / (what.resolve().name.removesuffix(".tar") or "images")
    folder = unused(folder) if fresh else folder
    here = f"data.path={json.dumps(str(what), ensure_ascii=False)}"
    if (folder / CONFIG).is_file():
        note(f"going on with {shown(folder)} and the settings in it; --fresh begins another run")
        return Beginning(loaded(folder / CONFIG, [here, *sets]), folder, {})
    return of_images(what, [here, *sets], folder)


def loaded(path: Path | None, sets: Sequence[str]) -> config.Config:
    return config.load(path, sets, note, model=tables)


def is_run(path: Path) -> bool:
    """Whether a folder is a run that has begun."""
    return (path / CONFIG).is_file() and any((path / name).exists() for name in ("data.json", "checkpoints"))


def progress(run: Path) -> dict[str, Any] | None:
    """How far a run is that has not ended: steps of its stages, seconds, and the model so far. None where it has."""
    cfg = config.load(run / CONFIG, stored=True)
    made, stages = (
        [path.name.rpartition("-") for path in (run / "checkpoints").glob("*-*")],
        dict[str, dict[str, int]](),
    )
    for name in trained(cfg.train):
        step = max((int(n) for stage, _, n in made if stage == name and n.isdecimal()), default=0)
        stages[name] = {"step": step, "steps": cfg.train.stage(name).steps}
    if all(each["step"] >= each["steps"] for each in stages.values()):
        return None
    plan = read_json(run / "plan.json") if (run / "plan.json").is_file() else {}
    used = float(plan.get("used", 0)) - float(plan.get("since", 0))
    model = str(run / "model") if (run / "model").is_dir() else ""
    return {"stages": stages, "time": cfg.train.time, "used": used, "model": model}


def refuse(what: Path) -> None:
    """UsageError with the command that was meant, for what holds no images to train on."""
    name = shown(what)
    if not what.exists() and (shipped(str(what)) / "model_index.json").is_file():
        raise UsageError(f"{name}: a shipped model; give a folder of images to train it on: train PHOTOS --from {name}")
    if (what / "model_index.json").is_file() or what.suffix == ".safetensors":
        raise UsageError(f"{name}: a model; give a folder of images, and begin with it: train PHOTOS --from {name}")
    if what.is_file() and what.suffix.lower() in IMAGES:
        raise UsageError(f"{name}: one image; give the folder that it is in, with captions")
    if not what.exists() and what.suffix.lower() != ".tar":
        raise UsageError(f"{name}: no such folder or configuration; give a folder of captioned images, or a .toml")
    if what.is_file() and what.suffix.lower() != ".tar":
        raise UsageError(f"{name}: no configuration and no images; give a folder of captioned images, or a .toml")


def of_images(what: Path, sets: Sequence[str], folder: Path) -> Beginning:
    """A new run on images, of which all that was not said is chosen."""
    given, problems = dict[str, Any](), list[str]()
    for text in sets:
        set_key(given, text, problems)
    if problems:
        raise UsageError("--set: " + "; ".join(problems))
    asked = config.make(**given)  # refuses unknown keys before images are looked at
    source = open_source(asked.data, asked.train.seed, shown_progress("checking images"), caption(asked.train))
    facts = Facts.of(source)

    def judge(resolution: int) -> float:
        from tinydiff.training.judge import decibels_of

        return decibels_of("general", source, resolution)

    made = choose(facts, machine(asked.train.device), dict(keys(given)), judge)
    sets = [*(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in made.values.items()), *sets]
    cfg = loaded(None, sets)
    if why := made.reasons.get("data.max_captions"):
        note(f"data.max_captions={cfg.data.max_captions}: {why}")
    return Beginning(cfg, folder, made.reasons, facts.first(cfg.data.max_captions))


def drawing(run_dir: Path, cfg: config.Config) -> str:
    """The command that draws with what a run has made; "" where that is no picture's."""
    told, name = run_dir / "samples" / "captions.json", shlex.quote(str(run_dir))
    prompt = next(iter(read_captions(told)), "a prompt")
    model = {
        NONE: name,
        "lora": f"{shlex.quote(cfg.train.base)} --lora {name}",
        "word": f"{shlex.quote(cfg.train.base)} --word {name}",
    }.get(cfg.train.adapter, f"{shlex.quote(cfg.train.base)} --control {name}:edges=IMAGE")
    published = any((run_dir / folder).is_dir() for folder in ("model", "adapter", "controlnet"))
    return f"tinydiff generate {shlex.quote(prompt)} -m {model}" if published else ""


def shown_progress(label: str) -> Callable[[int, int], None]:
    """A bar (done, of)."""
    bar = Progress(label, 0)

    def progress(done: int, total: int) -> None:
        bar.total = total
        if processes.rank() == 0:
            bar.update(done)

    return progress


def default_name(path: Path | None) -> str:
    """A run's name from its configuration file: the stem, or the folder of a tinydiff.toml."""
    if path is None or path.name == CONFIG:
        return (path.resolve().parent.name if path and path.parent != Path(".") else "") or "default"
    return path.stem


def unused(folder: Path) -> Path:
    """The folder itself where it is new, else the first of folder-2, folder-3, ... that is."""
    n, free = 1, folder
    while free.exists():
        n += 1
        free = folder.with_name(f"{folder.name}-{n}")
    return free
