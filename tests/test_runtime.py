"""What a run computes with: batches on their way to a device, and, where there is a GPU, that it learns what a CPU does."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import metrics
from torch.nn.parallel import DistributedDataParallel

from tinydiff import config
from tinydiff.training import loop, parallel
from tinydiff.training.parallel import World
from tinydiff.training.task import changed, moved, pinned


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics(run_dir) if "loss" in row]


def trained(cfg: config.Config, run_dir: Path, **changes: object) -> list[float]:
    """The losses of a run with other settings of `train`."""
    loop.run(replace(cfg, train=replace(cfg.train, **changes)), run_dir)
    return losses(run_dir)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_every_tensor_of_a_batch_moves() -> None:
    batch = {"sample": torch.ones(2), "tokens": {"text": torch.ones(3), "more": {"deep": torch.ones(4)}}}
    there = moved(batch, torch.device("meta"))
    assert there["sample"].is_meta and there["tokens"]["text"].is_meta and there["tokens"]["more"]["deep"].is_meta
    twice = changed(batch, lambda x: x * 2)
    assert float(twice["tokens"]["more"]["deep"].sum()) == 8 and twice.keys() == batch.keys()
    assert pinned(batch, torch.device("cpu")) is batch


def test_a_batch_is_pinned_where_a_gpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the task: the loop does it, in the thread that makes batches ahead."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 1)
    parts = pinned({"sample": torch.zeros(2), "tokens": {"text": torch.zeros(3)}}, torch.device("cuda"))
    assert float(parts["sample"].sum() + parts["tokens"]["text"].sum()) == 5


def world_of_one(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """A lone process meets itself as torchrun's processes do; returns what networks are spread as."""
    spread = []

    def met(world: World) -> World:
        world.meet()
        return world

    def noted(*arguments: object) -> torch.nn.Module:
        network = spreading(*arguments)  # type: ignore[arg-type]
        spread.append(type(network))
        return network

    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in (place | dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")).items():
        monkeypatch.setenv(name, value)
    spreading = parallel.spread
    monkeypatch.setattr(World, "__enter__", met)
    monkeypatch.setattr(loop, "spread", noted)
    return spread


@pytest.mark.filterwarnings("ignore")  # of torch's own imports
def test_a_world_of_one_learns_what_a_lone_process_does(
    run_config: config.Config, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = world_of_one(monkeypatch)
    assert trained(run_config, tmp_path) == losses(undisturbed)
    assert spread == [DistributedDataParallel] * 2 and not torch.distributed.is_initialized()


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({}, 1e-2), ({"precision": "bf16"}, 0.1), ({"precision": "bf16", "compile": True}, 0.1)],
    ids=["fp32", "bf16", "compiled"],
)
def test_a_gpu_learns_what_the_cpu_does(
    gpu: str, run_config: config.Config, undisturbed: Path, tmp_path: Path, changes: dict, tolerance: float
) -> None:
    """Its convolutions in TF32, as torch has them by default."""
    assert trained(run_config, tmp_path, device=gpu, **changes) == pytest.approx(losses(undisturbed), rel=tolerance)


@pytest.mark.gpu
def test_batches_are_pinned_and_copied_unwaited_for(
    gpu: str, run_config: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(batch: dict, device: torch.device) -> dict:
        seen.append((batch["sample"] if "sample" in batch else next(iter(batch.values()))).is_pinned())
        return moved(batch, device)

    monkeypatch.setattr(loop, "moved", noted)
    trained(run_config, tmp_path, device=gpu)
    assert seen and set(seen) == {gpu == "cuda"}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_nccl_in_a_world_of_one(
    gpu: str, run_config: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained(run_config, tmp_path / "alone", device=gpu)
    spread = world_of_one(monkeypatch)
    assert trained(run_config, tmp_path / "met", device=gpu) == pytest.approx(alone, rel=1e-3)
    assert spread == [DistributedDataParallel] * 2
