"""Every option of what a denoiser is made of, and each pair of options: rows of a covering array, made from the settings."""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from runs import sha256, stopped_at
from tensors import randomise
from torch.utils.flop_counter import FlopCounterMode

from tinydiff import config, export, inspect
from tinydiff.checkpoints.folder import Model
from tinydiff.cost import costs
from tinydiff.models import layers, modulation, residual, skips
from tinydiff.networks import unet
from tinydiff.networks.dit import DiT
from tinydiff.networks.network import HIDDEN
from tinydiff.schema import to_toml
from tinydiff.training import loop

CROSS = "CrossAttnDownBlock2D"
TINY = {
    "unet": config.UNet((64, 64), (unet.PLAIN, CROSS), 1, 1, 4, 32, True),
    "dit": DiT("custom", 2, num_layers=2, num_attention_heads=2, attention_head_dim=12),
}
Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


# ---- the rows -----------------------------------------------------------------------------------------------------------


def options(kind: str) -> dict[str, list[Any]]:
    """The values of each setting that says what a network is made of: all names, both truths, or two numbers."""
    made = dict[str, list[Any]]()
    for f in (f for f in fields(TINY[kind]) if f.metadata["own"] and f.name != "exits"):  # which adds graphs
        if isinstance(f.default, bool):
            made[f.name] = [False, True]
        else:
            made[f.name] = list(f.metadata["choices"]) or [f.default, f.default + 4]
    return made


def configured(kind: str, row: Row) -> config.Config:
    """A tiny configuration with a network of these settings."""
    table = {"denoiser": config.Denoiser(kind), kind: replace(TINY[kind], **row)}
    return config.make(data={"resolution": 32}, autoencoder=config.Autoencoder((8, 16), 1, 4, 4, False), **table)


def misfits(kind: str, row: Row) -> list[str]:
    cfg = configured(kind, row)
    return list(cfg.denoiser_network.conflicts(cfg))


def pairs(row: Row) -> set[Pair]:
    return set(combinations(sorted(row.items()), 2))


@functools.cache
def covering(kind: str, tries: int = 40) -> tuple[list[Row], list[Pair]]:
    """Rows in which each pair of values is that can be (greedy, seeded), and the pairs that cannot."""
    choose, table = random.Random(0), options(kind)
    left = {
        pair
        for a, b in combinations(sorted(table), 2)
        for pair in ((((a, x)), (b, y)) for x in table[a] for y in table[b])
    }
    rows, never = list[Row](), list[Pair]()
    while left:
        pair = min(left, key=repr)
        drawn = ({k: choose.choice(v) for k, v in table.items()} | dict(pair) for _ in range(tries))
        found = [row for row in drawn if not misfits(kind, row)]
        if found:
            rows.append(max(found, key=lambda row: len(left & pairs(row))))
            left -= pairs(rows[-1])
        else:
            never.append(pair)
            left.remove(pair)
    return rows, never


EVERY = [pytest.param(kind, row, id=f"{kind}-{i}") for kind in TINY for i, row in enumerate(covering(kind)[0])]


def exported() -> list[Any]:
    """Every row, slow but for a few that have each value once: it is torch's exporter that takes the time."""
    values = [{(kind, *item) for item in row.items()} for kind, row in (param.values for param in EVERY)]
    left, quick = set().union(*values), set[int]()
    while left:
        quick.add(best := max(range(len(EVERY)), key=lambda i: len(values[i] & left)))
        left -= values[best]
    slow = [pytest.param(*each.values, id=each.id, marks=pytest.mark.slow) for each in EVERY]
    return [EVERY[i] if i in quick else slow[i] for i in range(len(EVERY))]


def test_a_pair_that_cannot_be_is_named_by_both_keys():
    for kind in TINY:
        rows, never = covering(kind)
        covered = set().union(*map(pairs, rows))
        for a, b in combinations(sorted(options(kind)), 2):
            for pair in (((a, x), (b, y)) for x in options(kind)[a] for y in options(kind)[b]):
                assert (pair in covered) != (pair in never)
        for pair in never:
            said = misfits(kind, dict(pair))
            assert any(all(name in line for name, _ in pair) for line in said), (pair, said)
    assert len(covering("unet")[0]) < 45


def test_names_of_the_tables_are_those_of_the_settings():
    """The settings know no torch, so their names stand there too."""
    assert (*residual.RESNETS,) == unet.RESNETS and (*layers.NORMS,) == unet.NORMS
    assert (*modulation.TIMES,) == unet.TIMES and (*modulation.MODULATIONS,) == unet.MODULATIONS
    assert (*residual.CHANNELS,) == unet.CHANNELS and (*skips.CONTEXTS,) == unet.CONTEXTS
    assert skips.MERGES.keys() == unet.SKIPS.keys()


# ---- each row -----------------------------------------------------------------------------------------------------------


class Built:
    """The network of a row, random, its statistics moved by a batch, and its inputs at any size."""

    def __init__(self, kind: str, row: Row):
        cfg = configured(kind, row)
        self.network, self.kind = cfg.denoiser_network, kind
        self.table: dict[str, Any] = self.network.describe(cfg, {HIDDEN: 24, "label": 5})
        self.net = self.network.build(self.table)
        randomise(self.net)
        self.graph = self.network.graphs(self.network.folder, self.network.complete(self.table))[self.network.folder]
        with torch.no_grad():
            self.net.train()(**self.inputs(3, 8, 8))
        self.net.eval()

    def inputs(self, batch: int, height: int, width: int, sequence: int = 5) -> dict[str, torch.Tensor]:
        made, sizes = {}, {"batch": batch, "height": height, "width": width, "sequence": sequence}
        generator = torch.Generator().manual_seed(height)
        for name, array in self.graph.inputs.items():
            shape = array.shape(sizes)
            made[name] = torch.full(shape, 600.5) if array.values == "time" else torch.randn(shape, generator=generator)
        return made


def counted(net: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> int:
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        net(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(("kind", "row"), EVERY)
def test_a_row_computes_and_learns(kind, row):
    built = Built(kind, row)
    for size in ((8, 8), (16, 8), (4, 12)):
        inputs = built.inputs(2, *size)
        assert built.net(**inputs).shape == inputs["sample"].shape
    built.net(**built.inputs(2, 8, 8)).square().sum().backward()
    silent = [name for name, p in built.net.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to every key moves all scores of a query alike, which softmax does not see.
    assert [name for name in silent if not name.endswith("to_k.bias")] == []
    folder = built.network.folder
    cost = costs({folder: built.table}, 8, 8, 5)[folder]
    used = sum(p.numel() for p in built.net.parameters())
    assert cost["parameters"] == used and cost["flops"] == pytest.approx(counted(built.net, built.inputs(1, 8, 8)))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "row"), exported())
def test_the_graph_of_a_row_answers_at_sizes_that_it_was_not_traced_with(kind, row):
    built = Built(kind, row)
    tokens = SimpleNamespace(max_length=7, vocab_size=9, eos=8)
    model = Model({built.network.folder: built.table}, {built.network.folder: built.net}, {"text_encoder": tokens})
    proto = ir.to_proto(export.translate(built.network.folder, model, export.OPSET))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, height, width, sequence in ((1, 8, 8, 5), (3, 4, 12, 2)):
        inputs = built.inputs(batch, height, width, sequence)
        (answer,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        wanted = built.net(**inputs)
        assert (torch.from_numpy(answer) - wanted).abs().max() <= 1e-4 * wanted.std()


# ---- training -----------------------------------------------------------------------------------------------------------


def told_text_alone(row: Row) -> bool:
    """Whether images with captions are all that it takes to train it."""
    return row.get("label", "none") == row.get("image", "none") == "none"


def resumed() -> list[Any]:
    """Two rows of each kind, of those with a batch norm first: it alone has buffers."""
    taken = []
    for kind in TINY:
        rows = [row for row in covering(kind)[0] if told_text_alone(row)]
        rows.sort(key=lambda row: row.get("norm") != "batch")
        taken += [pytest.param(kind, row, id=f"{kind}-{i}") for i, row in enumerate(rows[:2])]
    return taken


@pytest.mark.parametrize(("kind", "row"), resumed())
def test_a_resumed_run_ends_in_the_same_bits(kind, row, tiny_config, tmp_path, monkeypatch, capsys):
    stages = {
        name: replace(tiny_config.train.stage(name), steps=steps, sample_every=100)
        for name, steps in {"autoencoder": 1, "denoiser": 6}.items()
    }
    train = replace(tiny_config.train, **stages, gradient_checkpointing=True)
    network = {"denoiser": config.Denoiser(kind), kind: replace(TINY[kind], **row)}
    cfg = replace(tiny_config, train=train, **network)
    (tmp_path / "cfg.toml").write_text(to_toml(cfg))
    whole = tmp_path / "whole"
    loop.run(cfg, whole)
    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    stopped_at("denoiser-00000003", cfg, cut, monkeypatch)
    loop.run(cfg, cut)
    assert "denoiser: going on from step 3" in capsys.readouterr().err
    paths = [[*run.glob("model/*/*"), *run.glob("checkpoints/denoiser-00000006/*.safetensors")] for run in (whole, cut)]
    assert sha256(whole, paths[0]) == sha256(cut, paths[1]) and len(paths[0]) > 6
    folder = cfg.denoiser_network.folder
    told, asked = (inspect.inspect(str(path)) for path in (whole / "model", tmp_path / "cfg.toml"))
    assert told["cost"]["networks"][folder]["parameters"] == asked["cost"]["networks"][folder]["parameters"] > 0
    assert all(name in told["no_diffusers_pipeline"] for name in cfg.denoiser_network.unusual(cfg.network))
    assert asked["config"][kind] == asdict(cfg.network)
