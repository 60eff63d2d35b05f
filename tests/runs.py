"""Training runs of everything that can be learnt, and what a run leaves behind, to be compared with what another leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from forker import Forker

from tinydiff import config
from tinydiff.stages import STAGES
from tinydiff.training import loop, state
from tinydiff.training.metrics import TIMED

# ---- what is learnt --------------------------------------------------------------------------------------------------


def of(table: str, **keys: object) -> list[str]:
    """Settings of a table."""
    return [f"{table}.{key}={value}" for key, value in keys.items()]


JUDGED = {"perceptual_weight": 0.1, "chroma_weight": 1, "equivariance": 0.5}
JUDGED |= {"adversarial_weight": 0.5, "adversarial_start": 3, "critic_width": 8}
CODES = of("autoencoder", kind="vq", num_vq_embeddings=16)
GIVEN = ["autoencoder.path=GIVEN", "train.autoencoder.steps=0"]
TOWERS = of("train.contrastive", image_channels=[8, 16], projection_dim=12)
ALIGNED = ["diffusion.contrastive_weight=0.05", "train.denoiser.alignment_weight=0.5"]
OWN = of("diffusion", prediction="sample", loss_weight="v", timestep_density="logit_normal")
BEFORE = ("autoencoder", "contrastive", "denoiser")
CALLS = of("train.distill", calls=4, levels=4, solver_steps=2)

LEARNT = {  # the stage that has the steps, and what it learns: every loss, player, codebook, optimizer and start in some row
    "tuned": ("autoencoder", ["autoencoder.path=GIVEN", *of("train.autoencoder", optimizer="muon", **JUDGED)]),
    "vq": ("autoencoder", [*CODES, *of("train.autoencoder", **JUDGED)]),
    "commitment": ("autoencoder", [*CODES, *of("train.autoencoder", codebook="commitment", optimizer="muon")]),
    "contrastive": ("contrastive", [*GIVEN, *TOWERS]),
    "denoiser": ("denoiser", [*GIVEN, *ALIGNED, *OWN, "train.denoiser.optimizer=muon", "unet.qk_norm=true"]),
    "distill": ("distill", [*TOWERS, *ALIGNED, *CALLS, *(f"train.{name}.steps=2" for name in BEFORE)]),
    "begun": ("denoiser", ["train.base=GIVEN", "train.learn=attention, attentions.0.norm, text_model.final"]),
    "lora": ("lora", ["train.base=GIVEN", "train.adapter=lora", "train.lora.rank=4", "train.lora.text_encoder=true"]),
    "control": ("control", ["train.base=GIVEN", "train.adapter=control"]),
    "word": ("word", ["train.base=GIVEN", "train.adapter=word", *of("train.word", word="<thing>", initial="red")]),
}


def learnt(row: str, given: Path, others: Path, steps: int, **every: int) -> list[str]:
    """The settings of a run of a `LEARNT` row: a `given` model's autoencoder, `others` to measure on, the best kept."""
    (stage, own), usual = LEARNT[row], {"batch_size": 4, "warmup": 2, "lr": 1e-3, "ema": 0.9, **every}
    made = [key for name in STAGES for key in of(f"train.{name}", **usual, steps=steps if name == stage else 0)]
    made += [f"data.validation={others}", "train.keep_best=true", "train.validation_samples=8"]
    return [*made, *(setting.replace("GIVEN", str(given)) for setting in own)]


# ---- what is left ----------------------------------------------------------------------------------------------------


def sha256(run_dir: Path, paths: Iterable[Path]) -> dict[str, str]:
    """By each file's path inside the run."""
    return {str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)}


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of all of a folder's files."""
    return sha256(folder, (path for path in folder.rglob("*") if path.is_file()))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The log, a row a line."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in metrics(run_dir)]


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of each stage's last weights, averages, moments, buffers and state, and of what is published; the log untimed."""
    last = {path.name.rpartition("-")[0]: path for path in sorted(run_dir.glob("checkpoints/*-*"))}
    folders = [
        *last.values(),
        *(run_dir / name for name in ("model", "autoencoder", "contrastive", "adapter", "controlnet")),
    ]
    found = sha256(run_dir, (p for f in folders for p in (*f.rglob("*.safetensors"), *f.glob("state.json"))))
    assert len(found) > 6 * len(last) > 0
    return found | {"log": json.dumps(untimed(run_dir))}


def said(run_dir: Path) -> str:
    return Path(f"{run_dir}.log").read_text()


def saved(run_dir: Path) -> int:
    """Steps of all stages that need not be done again."""
    last = dict(path.name.split("-") for path in sorted(run_dir.glob("checkpoints/[a-z]*")))
    return sum(map(int, last.values()))


OFTEN = ["steps=12", "save_every=1"]  # of a stage, so that twenty kills are spread over all of it


def killed_often(forker: Forker, run_dir: Path, config_path: Path, kills: int = 20) -> None:
    """A run to its end, killed before: each time at another call that writes to the disk, early, in a save or after some."""
    steps = list[int]()
    for number in range(kills):
        assert forker.run(run_dir, 2 + 9 * number % 31, config_path=config_path) == -signal.SIGKILL, said(run_dir)
        steps.append(saved(run_dir))
    assert len({*steps}) > kills // 4, steps
    assert forker.run(run_dir, config_path=config_path) == 0, said(run_dir)


def finishes_alike(forker: Forker, run_dir: Path, reference: Path) -> None:
    """The same command again, to the same bits, with nothing half-made left."""
    assert forker.run(run_dir) == 0, said(run_dir)
    assert digests(run_dir) == digests(reference)
    assert [p for p in run_dir.rglob(".*") if p.name != ".lock"] == []


def stopped_at(checkpoint: str, cfg: config.Config, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run without its model and its denoiser's checkpoints, trained again and interrupted once this one is saved."""
    shutil.rmtree(run_dir / "model")
    for path in run_dir.glob("checkpoints/denoiser-*"):
        shutil.rmtree(path)
    save = state.save

    def save_and_stop(path: Path, *more: Any) -> None:
        save(path, *more)
        if path.name == checkpoint:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(state, "save", save_and_stop)
        loop.run(cfg, run_dir)
