"""Several processes as one run: what each does, that they agree with one alone, and what happens when one of them dies."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forker import Forker, processor_time, wait_until
from interpreters import ENV
from runs import LEARNT, learnt, sha256, untimed
from torch import nn

from tinydiff import config
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.errors import UsageError
from tinydiff.schema import to_toml
from tinydiff.stages import STAGES, Stage
from tinydiff.training import claim, loop, state
from tinydiff.training.parallel import World, blocks

STEPS = 50


SEED = 7


# ------------------------------------------------------------------------------------------------------ what each does


def place(rank: int, size: int, tensor: int = 1) -> World:
    """A place in a world that nobody has joined."""
    made = World(torch.device("cpu"), 1)
    made.rank, made.size, made.tensor = rank, size, tensor
    return made


@pytest.mark.parametrize(("size", "tensor"), [(1, 1), (2, 1), (4, 1), (4, 2), (8, 4)])
def test_processes_share_out_the_rows_of_a_batch(size, tensor):
    apart = [list(place(rank, size, tensor).rows(16, shared=False)) for rank in range(size)]
    assert list(chain(*apart)) == list(range(16)) and len(set(map(len, apart))) == 1
    shared = [list(place(rank, size, tensor).rows(16, shared=True)) for rank in range(size)]
    assert list(chain(*shared[::tensor])) == list(range(16))
    assert all(shared[rank] == shared[rank // tensor * tensor] for rank in range(size))


def test_rows_are_computed_in_parts():
    settings = Stage(batch_size=24, accumulate=3)
    assert claim.split(range(12, 24), "denoiser", settings, False, place(1, 2)) == [
        range(12, 16),
        range(16, 20),
        range(20, 24),
    ]


@pytest.mark.parametrize(("batch", "accumulate", "size"), [(6, 1, 4), (8, 4, 4), (1, 1, 2)])
def test_rows_that_do_not_come_out_even_are_refused(batch, accumulate, size):
    settings, world = Stage(batch_size=batch, accumulate=accumulate), place(0, size)
    with pytest.raises(UsageError, match=rf"batch_size: {batch} .* multiple of {size * accumulate}"):
        claim.split(world.rows(batch, shared=False), "denoiser", settings, False, world)


def test_more_matrices_shared_than_processes_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UsageError, match="tensor_parallel: 4 does not divide the 6 processes"):
        World(torch.device("cpu"), 1, 4)


def test_blocks_are_what_a_network_repeats(tiny_config):
    model = folder.build(tiny_config, _Words())
    found = list(blocks(model.denoiser))
    assert found == [
        *model.denoiser.down_blocks,
        *model.denoiser.mid_block.attentions,
        *model.denoiser.mid_block.resnets,
        *model.denoiser.up_blocks,
    ]
    encoder = model.networks["text_encoder"]
    assert list(blocks(nn.ModuleDict({"text": encoder}))) == list(encoder.text_model.encoder.layers)


class _Words:
    vocab_size, bos, eos = 600, 598, 599


def test_blocks_computed_twice_give_the_same_bits(parallel_config, alone, tmp_path):
    cfg = replace(parallel_config, train=replace(parallel_config.train, gradient_checkpointing=True))
    loop.run(cfg, tmp_path)
    assert digests(tmp_path) == digests(alone)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


@pytest.mark.filterwarnings("ignore")  # of torch's own imports
def test_blocks_of_many_sizes_are_all_compiled(parallel_config, monkeypatch):
    from torch._dynamo.utils import counters

    def compiled(block: nn.Module) -> None:
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compiled)
    sizes = range(1, 14)
    network = nn.ModuleList([nn.ModuleList([Block(n) for n in sizes])])
    counters.clear()
    loop.spread(network, [], World(torch.device("cpu"), 1), replace(parallel_config.train, compile=True), None)
    for n, block in zip(sizes, network[0], strict=True):
        block(torch.zeros(2, n))
    assert counters["stats"]["unique_graphs"] == len(sizes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own imports
def test_compiled_blocks_train_alike(parallel_config, alone, tmp_path):
    loop.run(replace(parallel_config, train=replace(parallel_config.train, compile=True)), tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-4)


# ----------------------------------------------------------------------------------------------------- many as one


@dataclass
class Server:
    """Runs of the command line in several processes that can be killed, with the environment that torchrun gives them."""

    config_path: Path
    forker: Forker
    run_dir: Path = Path()
    pids: list[int] = field(default_factory=list)

    def start(self, size: int, run_dir: Path, *settings: str, patch: str = "") -> list[int]:
        """Begin a run of `size` processes; their ids. What a failed test has left running is ended first."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            self.forker.wait(pid)
        self.run_dir, self.pids = run_dir, []
        argv = ["train", str(self.config_path), "--run-dir", str(run_dir)]
        argv += [part for setting in settings for part in (("--set", setting) if "=" in setting else (setting,))]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(size):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            mine = [text.replace("RANK", str(rank)) for text in argv]
            env = {k: str(v) for k, v in place.items()} if size > 1 else {}
            log = Path(f"{run_dir}.log.{rank}")
            self.pids.append(self.forker.call("forker:command", mine, patch, rank, log=log, env=env))
        return self.pids

    def wait(self) -> list[int]:
        """The exit codes."""
        codes = [self.forker.wait(pid) for pid in self.pids]
        self.pids = []
        return codes

    def run(self, size: int, run_dir: Path, *settings: str, patch: str = "") -> list[int]:
        self.start(size, run_dir, *settings, patch=patch)
        return self.wait()

    def said(self, rank: int = 0) -> str:
        return Path(f"{self.run_dir}.log.{rank}").read_text()


@pytest.fixture(scope="module")
def parallel_config(tiny_config, other_images) -> config.Config:
    """Few steps of the autoencoder, then fifty of a denoiser of one level; measures, pictures and a checkpoint at the end."""
    unet = replace(tiny_config.unet, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",))
    train = replace(
        tiny_config.train,
        timeout=30,
        validation_samples=8,
        autoencoder=replace(tiny_config.train.autoencoder, steps=4, save_every=4, sample_every=100),
        denoiser=replace(tiny_config.train.denoiser, steps=STEPS, save_every=25, sample_every=100),
    )
    return replace(tiny_config, unet=unet, train=train, data=replace(tiny_config.data, validation=str(other_images)))


@pytest.fixture(scope="module")
def parallel_path(parallel_config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(to_toml(parallel_config))
    return path


@pytest.fixture(scope="module")
def server(parallel_path, forker) -> Server:
    return Server(parallel_path, forker)


@pytest.fixture(scope="module")
def alone(server, tmp_path_factory) -> Path:
    """The run of a single process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert server.run(1, run_dir) == [0], server.said()
    return run_dir


@pytest.fixture(scope="module")
def pair(server, tmp_path_factory) -> Path:
    """The run of two processes that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("pair") / "run"
    assert server.run(2, run_dir) == [0, 0], server.said()
    return run_dir


def losses(run_dir: Path, stage: str = "denoiser") -> list[float]:
    return [row["loss"] for row in untimed(run_dir) if row["stage"] == stage and "loss" in row]


def measured(run_dir: Path) -> dict[str, float]:
    """What the last look has measured on held-out images."""
    (row,) = [row for row in untimed(run_dir) if row["stage"] == "denoiser" and "held_out_loss" in row]
    return {name: value for name, value in row.items() if name.startswith("held_out") or name == "frechet"}


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of everything that the last steps left behind, and what was measured."""
    paths = [*run_dir.glob("model/*/*.safetensors"), *run_dir.glob(f"checkpoints/denoiser-{STEPS:08d}/*.safetensors")]
    return sha256(run_dir, paths) | {"metrics": json.dumps(untimed(run_dir))}


def tensors(run_dir: Path, kind: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    return dict(state.Blocks(run_dir / "checkpoints" / f"denoiser-{step:08d}", kind).whole())


def alike(one: Path, other: Path) -> None:
    """Losses within 1e-4 at every step that is logged, and weights and moments that went the same way."""
    assert len(losses(one)) == 5 and losses(other) == pytest.approx(losses(one), rel=1e-4)
    mine, theirs = measured(one), measured(other)
    assert len(mine) == 7 and theirs == pytest.approx(mine, rel=1e-5)
    for kind in state.KINDS:
        mine, theirs = tensors(one, kind), tensors(other, kind)
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
        usual = torch.stack([v.abs().max() for v in mine.values()]).median() if mine else 0.0
        for name, value in mine.items():  # what should be zero, such as a gradient of a key's bias, is noise
            assert (value - theirs[name]).abs().max() <= 2e-3 * value.abs().max() + 1e-3 * usual, (kind, name)


@pytest.mark.parametrize("size", [2, 4])
def test_many_processes_learn_what_one_does(server, alone, pair, tmp_path, size):
    run_dir = pair if size == 2 else tmp_path / "run"
    assert size == 2 or server.run(size, run_dir) == [0] * size, server.said()
    alike(alone, run_dir)
    names = [{str(p.relative_to(d)) for p in (d / "checkpoints").rglob("*.*")} for d in (alone, run_dir)]
    assert names[0] == names[1]  # whoever goes on with it need not know
    assert server.said(1) == "" or size == 4


def test_divided_weights_learn_the_same_and_go_on_alone(server, alone, tmp_path):
    """FSDP over four processes, their checkpoint of step 25 then continued by one, and by two with whole weights."""
    run_dir = tmp_path / "run"
    assert server.run(4, run_dir, "train.parallel=fsdp") == [0] * 4, server.said()
    alike(alone, run_dir)
    half = run_dir / "checkpoints" / "denoiser-00000025"
    assert len(list(half.glob("weights-*-of-00004.safetensors"))) == 4
    assert sum(p.stat().st_size for p in half.glob("weights-*")) < 1.5 * sum(
        p.stat().st_size for p in (alone / "checkpoints" / "denoiser-00000025").glob("weights.safetensors")
    )
    shutil.rmtree(run_dir / "model")
    shutil.rmtree(run_dir / "checkpoints" / f"denoiser-{STEPS:08d}")
    two = Path(shutil.copytree(run_dir, tmp_path / "two"))
    assert server.run(1, run_dir) == [0] and "going on from step 25" in server.said(), server.said()
    alike(alone, run_dir)
    assert server.run(2, two) == [0, 0], server.said()
    alike(alone, two)
    model, average = folder.load(Source(two / "model")), tensors(two, "average")
    assert all(torch.equal(v, average[f"denoiser.denoiser.{k}"]) for k, v in model.denoiser.state_dict().items())


def test_shared_matrices_learn_the_same(server, tmp_path):
    """A DiT over two groups of two processes that share each matrix, then alone from their checkpoint."""
    dit = ("denoiser.kind=dit", 'dit.size="custom"', "dit.num_layers=2", "dit.num_attention_heads=2")
    dit += ("dit.attention_head_dim=8",)
    assert server.run(1, tmp_path / "alone", *dit) == [0], server.said()
    settings = (*dit, "train.parallel=fsdp", "train.tensor_parallel=2")
    assert server.run(4, tmp_path / "run", *settings) == [0] * 4, server.said()
    alike(tmp_path / "alone", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"denoiser-{STEPS:08d}")
    assert server.run(1, tmp_path / "run", *dit) == [0], server.said()
    alike(tmp_path / "alone", tmp_path / "run")


def test_parts_of_a_batch_are_exchanged_once(server, alone, tmp_path):
    """Gradients of two processes in two parts each: as one batch, and summed over the processes once an update."""
    count = """
import atexit, os
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from tinydiff.training import parallel
calls = [0]
class Counted(parallel.DistributedDataParallel):
    def __init__(self, *a, **k):
        super().__init__(*a, **k)
        def hook(group, bucket):
            calls[0] += bucket.is_last()
            return allreduce_hook(group, bucket)
        self.register_comm_hook(None, hook)
parallel.DistributedDataParallel = Counted
from tinydiff.training import loop
run = loop.run
def counted(*a):
    result = run(*a)
    print("exchanges", calls[0], flush=True)
    return result
loop.run = counted
"""
    settings = ("train.denoiser.accumulate=2", "--accept-changes")
    assert server.run(2, tmp_path / "run", *settings, patch=count) == [0, 0], server.said()
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)
    assert f"exchanges {4 + STEPS}" in server.said()


def test_parts_of_a_batch_add_up_where_weights_are_divided(server, alone, tmp_path):
    """FSDP keeps whole gradients until the last part; blocks that are computed twice are gathered twice."""
    settings = ("train.parallel=fsdp", "train.denoiser.accumulate=2", "train.gradient_checkpointing=true")
    assert server.run(2, tmp_path / "run", *settings) == [0, 0], server.said()
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)


FLOAT32 = "import torch; torch.Tensor.bfloat16 = torch.Tensor.float"


def determined(run_dir: Path) -> list[dict[str, Any]]:
    """The log, but for a constant in all of the critic's logits: no hinge inside its margin sees it, so rounding makes it."""
    rows = []
    for row in untimed(run_dir):
        adversarial, real, fake = (row.pop(key, 0.0) for key in ("adversarial", "critic_real", "critic_fake"))
        stage, without = row.pop("stage"), {"loss": row["loss"] - adversarial} if "loss" in row else {}
        rows.append(row | without | {"critic_gap": real - fake, "stage": [*STAGES].index(stage)})
    return rows


SLOW = {"control", "word"}  # adapters as lora is one
ROWS = [pytest.param(row, "ddp", marks=[pytest.mark.slow] * (row in SLOW)) for row in LEARNT]


@pytest.mark.parametrize(("row", "parallel"), [*ROWS, ("denoiser", "fsdp"), ("distill", "fsdp")])
def test_two_processes_learn_what_one_does(row, parallel, server, tiny_model, other_images, tmp_path):
    """All that is logged: losses and their terms, norms of gradients, measures of averaged weights on held-out images.

    Muon's iteration is in float32 here: bfloat16 turns what differs in the last digit into directions of its own.
    """
    settings = learnt(row, tiny_model, other_images, steps=20, save_every=20, sample_every=20)
    settings += [f"train.parallel={parallel}"]
    settings += ["train.timeout=60", *(["train.denoiser.optimizer=adamw"] if parallel == "fsdp" else [])]
    runs = [tmp_path / "one", tmp_path / "two"]
    for size, run_dir in enumerate(runs, 1):
        assert server.run(size, run_dir, *settings, patch=FLOAT32) == [0] * size, server.said()
    one, two = map(determined, runs)
    assert sum("loss" in values for values in one) == 2
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        signs = {key for key in mine if key.endswith(("grad_norm", "balance"))}  # of errors: one that flips is seen
        for rel, keys in ((1e-2, signs), (1e-4, mine.keys() - signs)):
            assert {k: theirs[k] for k in keys} == pytest.approx({k: mine[k] for k in keys}, rel=rel, abs=1e-5)


# ------------------------------------------------------------------------------------------------ when one of them dies


def checked(run_dir: Path, wanted: Path) -> None:
    """The run ended in the bits of the undisturbed one, and nothing half-written is left."""
    assert digests(run_dir) == digests(wanted)
    assert not [p for p in run_dir.rglob(".*") if p.name != ".lock"]


def killed(server: Server, run_dir: Path, wanted: Path, times: int) -> None:
    """Kill one of two processes at random moments, `times` times before the run was done, then let it end."""
    rng, codes, often = np.random.default_rng(SEED), [], ("train.denoiser.save_every=5", "train.keep=20")
    while sum(0 not in pair for pair in codes) < times:
        pids, rank = server.start(2, run_dir, *often), int(rng.integers(2))
        moment = rng.uniform(0.1, 0.9)  # seconds of its own processor time, of about one
        while (used := processor_time(pids[rank])) is not None and used < moment:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[rank], signal.SIGKILL)
        codes.append(server.wait())
        if 0 in codes[-1]:  # it was faster: some steps back
            for path in sorted(run_dir.glob("checkpoints/denoiser-*"))[2:]:
                shutil.rmtree(path)
        else:
            assert codes[-1][rank] == -signal.SIGKILL and codes[-1][1 - rank] == 7, server.said(1 - rank)
    assert server.run(2, run_dir, *often) == [0, 0], server.said()
    checked(run_dir, wanted)
    print(f"{len(codes)} starts until {times} kills came before the end of the run")


def test_a_killed_process_ends_the_others_and_the_run_ends_in_the_same_bits(server, pair, tmp_path):
    killed(server, tmp_path / "run", pair, 4)


@pytest.mark.slow
def test_fifty_times_killed(server, pair, tmp_path):
    killed(server, tmp_path / "run", pair, 50)


def test_a_process_that_hangs_ends_the_run_in_time(server, pair, tmp_path):
    run_dir = tmp_path / "run"
    pids = server.start(2, run_dir, "train.timeout=10")
    wait_until((run_dir / "checkpoints" / "denoiser-00000025").exists)
    os.kill(pids[1], signal.SIGSTOP)
    wait_until(lambda: processor_time(pids[0]) is None, 40)
    os.kill(pids[1], signal.SIGKILL)
    assert server.wait() == [7, -signal.SIGKILL]
    last = server.said().splitlines()[-1]
    assert "did not answer for 10 s; start the same command again" in last and "Traceback" not in server.said()
    assert server.run(2, run_dir) == [0, 0]
    checked(run_dir, pair)


def test_no_group_of_processes_waits_longer_than_it_may(server, tmp_path):
    """Of four that share matrices by twos, every group has the run's timeout, those of the threads that save too."""
    say = """
import torch
from tinydiff.training import parallel
meet = parallel.World.meet
def told(self):
    meet(self)
    groups = [torch.distributed.group.WORLD, self.savers, *(self.mesh[n].get_group() for n in ("data", "tensor"))]
    found = [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups]
    print("timeouts", found, [torch.distributed.get_process_group_ranks(g) for g in groups], flush=True)
    torch.distributed.barrier()  # the one that leaves first takes the store along by which the others still make groups
    raise SystemExit(0)
parallel.World.meet = told
"""
    settings = ("denoiser.kind=dit", "dit.num_attention_heads=2", 'dit.size="custom"', "train.tensor_parallel=2")
    codes = server.run(4, tmp_path / "run", *settings, "train.parallel=fsdp", "train.timeout=17", patch=say)
    assert codes == [0] * 4, server.said()
    everyone = [0, 1, 2, 3]
    assert f"timeouts {[17.0] * 4} {[everyone, everyone, [0, 2], [0, 1]]}" in server.said()
    assert f"timeouts {[17.0] * 4} {[everyone, everyone, [1, 3], [2, 3]]}" in server.said(3)


def test_a_signal_to_one_stops_all_behind_one_step(server, pair, tmp_path):
    run_dir = tmp_path / "run"
    pids = server.start(2, run_dir)
    wait_until((run_dir / "checkpoints" / "denoiser-00000025").exists)
    os.kill(pids[1], signal.SIGTERM)
    assert server.wait() == [128 + signal.SIGTERM] * 2
    assert "stopped and saved at step" in server.said() and server.said(1) == ""
    assert server.run(2, run_dir) == [0, 0]
    checked(run_dir, pair)


def test_what_one_cannot_save_nobody_commits(server, tmp_path):
    full = """
import errno
from tinydiff.training import state
save, saves = state.save_file, []
def save_file(tensors, path, about):
    saves.append(path.name.startswith("weights"))
    if rank == 1 and sum(saves) == 2:  # its first part is of step 25, its second of step 50
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    save(tensors, path, about)
state.save_file = save_file
"""
    run_dir = tmp_path / "run"
    assert server.run(2, run_dir, "train.parallel=fsdp", patch=full) == [7, 7], server.said()
    assert "weights-00002-of-00002.safetensors: No space left on device; free some space" in server.said(1)
    assert "another process could not write" in server.said()
    kept = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert kept == ["autoencoder-00000004", "denoiser-00000025"]
    assert server.run(2, run_dir, "train.parallel=fsdp") == [0, 0], server.said()


def test_processes_that_read_other_data_are_refused(server, image_folder, tmp_path):
    for rank in range(2):
        shutil.copytree(image_folder, tmp_path / f"images{rank}")
    (tmp_path / "images1" / "red-square.txt").write_text("something else")
    codes = server.run(2, tmp_path / "run", f"data.path={tmp_path}/imagesRANK")
    assert codes[1] == 3 and codes[0] != 0
    assert "process 1 reads other data than process 0" in server.said(1)


def test_a_second_run_in_the_directory_is_refused(server, tmp_path):
    from tinydiff import files

    (tmp_path / "run").mkdir()
    with files.lock(tmp_path / "run"):
        codes = server.run(2, tmp_path / "run")
    assert codes[0] == 6 and codes[1] != 0


def test_torchrun_trains_and_draws(parallel_path, pair, tmp_path):
    """The commands of the README, by torchrun itself."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tinydiff",
    ]
    command = [*torchrun, "train", str(parallel_path), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'run' / 'model'}\n"), done.stderr
    checked(tmp_path / "run", pair)
