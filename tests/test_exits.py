"""Exits of a DiT: early outputs, confidence, the rows that leave, and the share of blocks that is told of each image and step."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensors import noise, randomise

from tinydiff import config
from tinydiff.backends import open_backend
from tinydiff.checkpoints.source import Source
from tinydiff.errors import UsageError
from tinydiff.models.dit import DiT
from tinydiff.models.exits import certain
from tinydiff.networks.dit import DiT as Settings
from tinydiff.pipeline import Request, Spent, generate
from tinydiff.training import loop

SIZES = {"size": "custom", "num_layers": 5, "num_attention_heads": 2, "attention_head_dim": 8}
EXITS = (1, 3)
TOLD = [
    (0, {}),
    (7, {}),
    (7, {"conditioning": "in_context"}),
    (0, {"conditioning": "cross"}),
    (7, {"conditioning": "cross"}),
]


def network(classes: int = 0, exits: tuple[int, ...] = EXITS, **settings: Any) -> DiT:
    made = DiT(Settings(**(SIZES | settings), exits=exits or 0), 4, 8, classes, None if classes else 12).eval()
    randomise(made)
    for n in exits:
        made.get_parameter(f"exits.{n}.uncertain.weight").data *= 4  # so that rows differ
    return made


def asked(rows: int = 6, classes: int = 0) -> dict[str, torch.Tensor]:
    context = noise(rows, 1, classes + 1).softmax(-1) if classes else noise(rows, 3, 12)
    return {
        "sample": noise(rows, 4, 8, 8, seed=1) * 2,
        "timestep": torch.tensor(400.0),
        "encoder_hidden_states": context,
    }


@torch.no_grad()
def told(made: DiT, **given: Any) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    early: list[tuple[torch.Tensor, torch.Tensor]] = []
    return made(**given, early=early), early


@pytest.mark.parametrize(("classes", "more"), TOLD, ids=str)
def test_an_early_output_is_that_of_a_network_with_fewer_blocks(classes, more):
    """Whose last layers are the exit's; and what comes out last is as without exits."""
    made, given = network(classes, **more), asked(classes=classes)
    last, early = told(made, **given)
    for n, (output, _) in zip(EXITS, early, strict=True):
        short = network(classes, (), **more | {"num_layers": n})
        own, head = made.state_dict(), made.exits[str(n)]
        kept = {name: own[name] for name in short.state_dict()}
        kept |= {
            f"proj_out_{i}.{k}": v for i in (1, 2) for k, v in head.get_submodule(f"proj_out_{i}").state_dict().items()
        }
        short.load_state_dict(kept)
        with torch.no_grad():
            assert torch.equal(short(**given), output)
    without = network(classes, (), **more)
    without.load_state_dict({k: v for k, v in made.state_dict().items() if not k.startswith("exits.")})
    with torch.no_grad():
        assert torch.equal(without(**given), last) and torch.equal(made(**given), last)


def test_confidence_from_its_formula():
    early, last = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=3)
    wanted = [1 - np.tanh(np.abs((early[i] - last[i]).numpy()).mean()) for i in range(2)]
    assert certain(early, last).tolist() == pytest.approx(wanted, rel=1e-5)
    assert certain(last, last).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("classes", "more"), TOLD, ids=str)
def test_rows_leave_where_an_exit_is_sure(classes, more):
    """Each row, at every threshold, has what it has alone by brute force: the first exit that is surer, or the last output."""
    made, given = network(classes, **more), asked(classes=classes)
    for n, (_, each) in zip(EXITS, told(made, **given)[1], strict=True):
        made.get_parameter(f"exits.{n}.uncertain.bias").data += each.logit().mean()  # half of the rows are above a half
    last, early = told(made, **given)
    sure = torch.stack([each for _, each in early])  # (exits, rows)
    assert sure.std() > 0.05
    seen = set()
    values = sorted({0.0, *sure.flatten().tolist(), 1.0})
    for at in [
        (low + high) / 2 for low, high in pairwise(values)
    ]:  # no value itself, which other sums may round otherwise
        made.leave = at
        with torch.no_grad():
            output = made(**given)
        for row in range(len(last)):
            first = next((i for i in range(len(EXITS)) if sure[i, row] > at), None)
            wanted, blocks = (last, 5) if first is None else (early[first][0], EXITS[first])
            assert torch.allclose(output[row], wanted[row], atol=1e-5) and int(made.computed[row]) == blocks
            seen.add(blocks)
    assert seen == {1, 3, 5}


def test_blocks_that_nobody_needs_are_not_computed(monkeypatch):
    """Counted in rows that each block is given."""
    made, given, rows = network(), asked(), list[int]()
    for block in made.transformer_blocks:
        block.register_forward_hook(lambda block, inputs, output: rows.append(len(output)))
    made.leave = float(torch.stack([each for _, each in told(made, **given)[1]]).median())
    rows.clear()
    with torch.no_grad():
        made(**given)
    assert sum(rows) == int(made.computed.sum()) < 5 * 6


def test_spent_by_step_and_image():
    """Two calls in a step, with and without guidance: a mean over the rows of each image."""
    calls = iter([[1.0, 0.5, 0.5, 0.5], [0.25, 1.0], [0.5, 0.25]])
    spent = Spent(lambda: np.array(next(calls)), 2)
    spent.asked([0, 1, 0, 1])
    spent.asked([0, 1])
    spent.step()
    spent.asked([0, 1])
    spent.step()
    assert np.allclose(spent.steps, [[(1 + 0.5 + 0.25) / 3, (0.5 + 0.5 + 1) / 3], [0.5, 0.25]])


# ---- a model -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(run_config, tmp_path_factory) -> Path:
    """A model with exits after a few updates."""
    stage = replace(run_config.train.stage("denoiser"), steps=10)
    train = replace(
        run_config.train, denoiser=stage, autoencoder=replace(run_config.train.stage("autoencoder"), steps=2)
    )
    cfg = replace(run_config, train=train, denoiser=config.Denoiser("dit"), dit=Settings(**SIZES, exits=EXITS))
    run_dir = tmp_path_factory.mktemp("exits") / "run"
    loop.run(cfg, run_dir)
    return run_dir


def test_exits_learn_beside_the_denoiser(trained):
    row = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][-2]
    assert {f"exit_{i}_{what}" for i in (0, 1) for what in ("loss", "confidence")} <= row.keys()
    table = Source(trained / "model").configs
    assert table["transformer"]["exits"] == list(EXITS)
    assert "exits" in table["model_index"]["_no_diffusers_pipeline"]
    tensors = Source(trained / "model").tensors("transformer")
    assert all(tensors[f"exits.{n}.{name}"].any() for n in EXITS for name in ("proj_out_2.weight", "uncertain.bias"))


def test_never_is_the_same_picture_and_always_takes_the_least(trained):
    """An exit of 1 leaves nowhere; at 0 every row leaves at the first exit, at every step."""
    source = Source(trained / "model")
    request, prompts, seeds = Request(3, 2.0, "heun", "trailing", 16, 16), ["a red circle", "a blue square"], [1, 2]
    plain = generate(open_backend(source, "torch", "cpu"), prompts, seeds, request)
    assert np.array_equal(generate(open_backend(source, "torch", "cpu", leave=1.0), prompts, seeds, request), plain)
    backend: Any = open_backend(source, "torch", "cpu", leave=0.0)
    spent = Spent(backend.shares, 2)
    early = generate(backend, prompts, seeds, request, spent=spent)
    assert np.allclose(spent.steps, np.full((3, 2), 1 / 5)) and not np.array_equal(early, plain)


def test_what_has_no_exits_is_refused(trained, tiny_model):
    with pytest.raises(UsageError, match=r"--exit: .* has no exits"):
        open_backend(Source(tiny_model), "torch", "cpu", leave=0.9)
    with pytest.raises(UsageError, match=r"--exit: what --compile"):
        open_backend(Source(trained / "model"), "torch", "cpu", compiled=True, leave=0.9)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["dit.exits=[4, 12]"], ["dit.exits: 12", "num_layers, 12"]),
        (["dit.exits=30"], ["dit.exits: 30", "num_layers, 12"]),
        (["dit.exits=[0, 4]"], ["dit.exits: 0", "num_layers"]),
        (["dit.exits=4", "train.distill.steps=5"], ["dit.exits", "train.distill"]),
        (["unet.exits=4"], ["unet.exits: unknown key"]),
    ],
)
def test_exits_that_do_not_fit_are_refused(overrides, parts):
    with pytest.raises(UsageError) as caught:
        config.load(None, ["denoiser.kind=dit", *overrides])
    assert all(part in str(caught.value) for part in parts) and len(str(caught.value).splitlines()) == 1
