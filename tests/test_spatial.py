"""Which tokens attend to which, and what they know of their places, against loops over tokens written from the formulas."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensors import noise, randomise
from torch import Tensor, nn
from typer.testing import CliRunner

from tinydiff import cli, config, export
from tinydiff.errors import UsageError
from tinydiff.files import MANIFEST
from tinydiff.measure.cost import cost
from tinydiff.models.attention import Attention
from tinydiff.models.dit import DiT
from tinydiff.models.spatial import ATTENTIONS, Relative, SelfAttention, heads_shut
from tinydiff.models.unet import UNet
from tinydiff.networks.dit import DiT as DiTSettings
from tinydiff.networks.spatial import POSITIONS, Spatial

DIM, HEADS, WINDOW, STRIDE, BASE = 16, 2, 4, 3, 4
SIZES = ((8, 4), (5, 7), (9, 2), (1, 1), (3, 6))  # that windows and strides divide, and others


def make(kind: str = "full", shifted: bool = False, positions: str = "none", learn: bool = False) -> Any:
    where = Spatial(kind, shifted, positions, BASE, 0, WINDOW, STRIDE, learn)
    module = ATTENTIONS[kind](DIM, HEADS, where, qkv_bias=True, qk_norm=True).eval()
    randomise(module)
    return module


def places(size: tuple[int, int]) -> list[tuple[int, int]]:
    return list(itertools.product(range(size[0]), range(size[1])))


def by_hand(
    module: SelfAttention,
    x: Tensor,
    size: tuple[int, int],
    sees: Callable[[tuple[int, int], tuple[int, int]], bool] = lambda one, other: True,
    bias: Callable[[int, int], Tensor] | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """Attention token by token: each averages the values of those that it `sees`, by the softmax of its scores."""
    x = x.double()
    q, k, v = (part.double()(x).unflatten(-1, (HEADS, -1)) for part in (module.to_q, module.to_k, module.to_v))
    q, k = (norm.double()(x) for norm, x in ((module.norm_q, q), (module.norm_k, k)) if norm is not None)
    out = torch.zeros_like(q)
    for b, n, (i, one) in itertools.product(range(len(x)), range(HEADS), enumerate(places(size))):
        seen = [(j, other) for j, other in enumerate(places(size)) if sees(one, other)]
        scores = [q[b, i, n] @ k[b, j, n] / math.sqrt(DIM // HEADS) for j, _ in seen]
        if bias is not None:
            scores = [s + bias(one[0] - o[0], one[1] - o[1])[n] for s, (_, o) in zip(scores, seen, strict=True)]
        for weight, (j, _) in zip(torch.stack(scores).softmax(0), seen, strict=True):
            out[b, i, n] += weight * v[b, j, n]
        out[b, i, n] *= 1 if gates is None else gates[b, n]
    y = module.to_out[0].double()(out.flatten(2)).float()
    module.float()
    return y


def window_of(place: tuple[int, int], size: tuple[int, int], shifted: bool) -> tuple[int, ...]:
    """The window of a place: those of a shifted grid begin half a window later, and the first of them is half as large."""
    shifts = [WINDOW // 2 if shifted and n > WINDOW else 0 for n in size]
    return tuple((p + (WINDOW - s if s else 0)) // WINDOW for p, s in zip(place, shifts, strict=True))


def sees(kind: str, shifted: bool, size: tuple[int, int]) -> Callable[[tuple[int, int], tuple[int, int]], bool]:
    if kind == "window":
        return lambda one, other: window_of(one, size, shifted) == window_of(other, size, shifted)
    if kind == "strided":
        return lambda one, other: all((a - b) % STRIDE == 0 for a, b in zip(one, other, strict=True))
    return lambda one, other: True


def bias_of(module: SelfAttention) -> Callable[[int, int], Tensor]:
    """Liu et al. 2022, equations 3 and 4."""
    relative = module.place
    assert isinstance(relative, Relative)
    first, last = cast(nn.Linear, relative.net[0]), cast(nn.Linear, relative.net[2])

    def bias(down: int, across: int) -> Tensor:
        logs = torch.tensor([math.copysign(math.log(1 + abs(d)), d) for d in (down, across)], dtype=torch.float64)
        return last.weight.double() @ (first.weight.double() @ logs + first.bias.double()).clamp(min=0)

    return bias


# ---- against loops over tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "shifted"), [("full", False), ("window", False), ("window", True), ("strided", False)]
)
@pytest.mark.parametrize("positions", ["none", "relative"])
@torch.no_grad()
def test_attention_is_that_of_the_formula(kind, shifted, positions, size):
    module, x = make(kind, shifted, positions), noise(2, size[0] * size[1], DIM)
    bias = bias_of(module) if positions == "relative" else None
    wanted = by_hand(module, x, size, sees(kind, shifted, size), bias)
    torch.testing.assert_close(module(x, size=size), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", ["none", "relative"])
@torch.no_grad()
def test_shut_heads_are_skipped_and_counted_and_nothing_else_changes(positions):
    """A gate is hardsigmoid of a matrix times the mean token: shut from -3 on."""
    module, size, x = make("gated", positions=positions), (3, 5), noise(4, 15, DIM)
    module.gate.weight.mul_(20)
    gates = ((module.gate(x.double().float().mean(1)) + 3) / 6).clamp(0, 1)
    shut = int((gates == 0).sum())
    assert 0 < shut < gates.numel() and (gates == 1).any()  # those between are tested by the formula
    gates = gates.double()
    wanted = by_hand(module, x, size, bias=bias_of(module) if positions == "relative" else None, gates=gates)
    skipping = module(x, size=size)
    assert heads_shut(module) == (shut, gates.numel())
    module.train()
    torch.testing.assert_close(skipping, wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(module(x, size=size), skipping, atol=1e-6, rtol=0)
    assert heads_shut(module) == (shut, gates.numel())  # nothing is skipped in training


@torch.no_grad()
def test_no_score_is_computed_for_shut_heads(monkeypatch):
    module, x, asked = make("gated"), noise(2, 6, DIM), []
    module.gate.weight.zero_()
    module.gate.bias.copy_(torch.tensor([-3.0, 0.0]))
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *rest: asked.append(q.shape) or attention(q, *rest),
    )
    module(x, size=(2, 3))
    assert asked == [(2, 1, 6, DIM // HEADS)]  # one of the two heads, of both images
    module.gate.bias.fill_(-3)
    assert torch.equal(module(x, size=(2, 3)), module.to_out[0].bias.expand(2, 6, -1))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_a_window_as_large_as_the_map_is_full_attention(shifted, positions):
    windowed, full, x = make("window", shifted, positions), make("full", positions=positions), noise(2, WINDOW**2, DIM)
    full.load_state_dict(windowed.state_dict(), strict=True)
    torch.testing.assert_close(windowed(x, size=(WINDOW, WINDOW)), full(x, size=(WINDOW, WINDOW)), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_full_attention_without_positions_is_the_plain_one():
    module, plain, x = make(), Attention(DIM, HEADS, None, True, True).eval(), noise(2, 12, DIM)
    plain.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(module(x, size=(3, 4)), plain(x))


def test_generate_says_what_share_of_heads_was_skipped(make_model, tiny_config, tmp_path):
    """Two levels, of two heads each; all gates of the lower one are shut, as its middle's are."""
    unet = replace(tiny_config.unet, attention=("full", "gated"), attention_head_dim=(4, 2))
    source = make_model(replace(tiny_config, unet=unet))
    weights = source / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    gates = sorted(name for name in tensors if name.endswith("attn1.gate.bias"))
    assert len(gates) == 4  # down, up twice, and the middle
    for name in gates:
        tensors[name.replace("bias", "weight")].zero_()
        tensors[name] = torch.tensor([-9.0, 9.0] if name != gates[0] else [9.0, 9.0])
    save_file(tensors, weights)
    (source / MANIFEST).unlink()
    words = ["generate", "a red circle", "-m", str(source), "--steps", "2", "-o", str(tmp_path / "a.png")]
    said = CliRunner().invoke(cli.app, words, catch_exceptions=False).stderr
    assert "38% of the attention heads were shut, and skipped" in said


# ---- positions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("size", [(BASE, BASE), (6, 3), (1, 9)])
@torch.no_grad()
def test_sines_are_those_of_each_place(size, learn):
    module = make(positions="sine", learn=learn)
    rates = [10000 ** -(4 * i / DIM) for i in range(DIM // 4)]
    if learn:
        rates = (module.place.rates * 7).tolist()
        module.place.rates.mul_(7)
    added = module.place(torch.zeros(1, size[0] * size[1], DIM), size)[0]
    for token, (row, column) in zip(added, places(size), strict=True):
        x, y = column * BASE / size[1], row * BASE / size[0]
        wanted = [f(at * rate) for at in (x, y) for f in (math.sin, math.cos) for rate in rates]
        np.testing.assert_allclose(token, wanted, atol=2e-6)


@pytest.mark.parametrize("size", [(BASE, BASE), (8, 8), (6, 3), (1, 9)])
@torch.no_grad()
def test_learnt_places_are_interpolated(size):
    """Between the centres of the table's cells, linearly along both sides; beyond the outer centres they stay."""
    module = make(positions="learned")
    table = module.place.table.double()  # (D, base, base)
    added = module.place(torch.zeros(1, size[0] * size[1], DIM), size)[0]
    for token, place in zip(added, places(size), strict=True):
        wanted = torch.zeros(DIM, dtype=torch.float64)
        at = [min(max((p + 0.5) * BASE / n - 0.5, 0), BASE - 1) for p, n in zip(place, size, strict=True)]
        for row, column in itertools.product(range(BASE), range(BASE)):
            wanted += table[:, row, column] * max(0, 1 - abs(row - at[0])) * max(0, 1 - abs(column - at[1]))
        torch.testing.assert_close(token.double(), wanted, atol=1e-6, rtol=1e-6)


def test_a_bias_reaches_offsets_that_no_training_map_had():
    with torch.no_grad():
        small, large = (make(positions="relative").place.bias(n, n, 1) for n in (3, 9))
    assert small is not None and large is not None
    for (i, a), (j, b) in itertools.product(enumerate(places((3, 3))), repeat=2):
        same = large[:, a[0] * 9 + a[1], b[0] * 9 + b[1]]
        torch.testing.assert_close(small[:, i, j], same)
    assert large.std(0).max() > 0.1 and large.isfinite().all()


# ---- in networks ---------------------------------------------------------------------------------------------------


DITS = [
    {"attention": ("window", "strided", "full"), "positions": "relative"},
    {"attention": "gated", "positions": "learned", "conditioning": "in_context"},
    {"attention": ("window", "gated"), "positions": "sine", "learn_frequencies": True, "conditioning": "cross"},
    {"positions": "none", "conditioning": "film", "norm_order": "post"},
]
CASES = [(0, each) for each in DITS] + [(5, each) for each in DITS[1:3]]


def dit(classes: int = 0, **options: Any) -> DiT:
    sizes = {"size": "custom", "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "window": 3}
    net = DiT(DiTSettings(**(sizes | options)), 4, 12, classes, None if classes else 10).eval()
    randomise(net)
    return net


def told(classes: int, size: tuple[int, int], batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    context = noise(batch, 1, classes + 1).softmax(-1) if classes else noise(batch, 7, 10, seed=1)
    return noise(batch, 4, *size, seed=size[0]), torch.tensor(41.0), context


@pytest.mark.parametrize(("classes", "options"), CASES)
def test_every_weight_of_a_dit_learns_at_any_size(classes, options):
    net = dit(classes, **options)
    for size in ((6, 10), (14, 4)):
        assert net(*told(classes, size)).shape == (2, 4, *size)
    net(*told(classes, (12, 12))).square().sum().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in silent if not n.endswith("to_k.bias")] == []


def test_every_weight_of_a_unet_learns_and_its_blocks_alternate():
    sizes = {"block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D",) * 2, "norm_num_groups": 8}
    own: dict[str, Any] = {"attention": ("window", "gated"), "window": 2, "positions": "relative"}
    net = UNet(config.UNet(**sizes, **own, attention_head_dim=2, transformer_layers_per_block=2), 4, 10)
    randomise(net)
    net(*told(0, (6, 10))).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    attentions = {n: part.spatial for n, part in net.named_modules() if isinstance(part, SelfAttention)}
    up = [where for n, where in attentions.items() if n.startswith("up_blocks.1.")]
    assert [where.kind for where in up] == ["window"] * 4 and [where.shifted for where in up] == [False, True] * 2
    assert {where.kind for n, where in attentions.items() if n.startswith(("mid", "down_blocks.1"))} == {"gated"}


def exported(
    net: nn.Module, given: tuple[Tensor, ...], axes: tuple[set[int], ...], path: Path
) -> Callable[..., np.ndarray]:
    """A function of the same inputs, by onnxruntime."""
    names = [f"x{i}" for i in range(len(given))]
    with export.quiet():
        program: Any = torch.onnx.export(
            net,
            given,
            dynamo=True,
            dynamic_shapes=tuple(dict.fromkeys(each, torch.export.Dim.DYNAMIC) for each in axes),
            input_names=names,
            opset_version=export.OPSET,
            verbose=False,
            custom_translation_table=export.translations(),
        )
    program.save(path / "model.onnx")
    session = onnxruntime.InferenceSession(path / "model.onnx")
    return lambda *xs: np.asarray(session.run(None, {n: x.numpy() for n, x in zip(names, xs, strict=True)})[0])


class Each(nn.Module):
    """All kinds of attention of one map (B, D, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [("window", True, "relative"), ("strided", False, "learned"), ("gated", False, "sine", True)]
        self.each = nn.ModuleList([make(*kind) for kind in kinds])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([module(x.flatten(2).transpose(1, 2), size=x.shape[2:]) for module in self.each])


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_graphs_of_attention_go_with_sizes_that_were_not_traced(tmp_path):
    net = Each().eval()
    run = exported(net, (noise(2, DIM, 12, 16),), ({0, 2, 3},), tmp_path)
    for size in ((8, 8), (7, 9), (16, 4), (3, 2), (5, 16)):
        x = noise(3, DIM, *size)
        np.testing.assert_allclose(run(x), net(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("classes", "options"), [CASES[1], CASES[-1]])
@torch.no_grad()
def test_graphs_of_dits_go_with_sizes_that_were_not_traced(classes, options, tmp_path):
    net = dit(classes, **options)
    axes = {0, 2, 3}, set(), {0} if classes else {0, 1}
    run = exported(net, told(classes, (12, 16)), axes, tmp_path)
    for size, batch in (((8, 8), 3), ((6, 20), 1)):
        given = told(classes, size, batch)
        wanted = net(*given)
        assert wanted.std() > 1e-2 and np.abs(run(*given) - wanted.numpy()).max() <= 1e-4 * wanted.std()


# ---- what does not go together -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "options", "said"),
    [
        ("unet", {"attention": ["window"]}, "unet.attention: needs one entry for each of block_out_channels"),
        ("unet", {"attention": ["full", "window"], "window": 5}, "unet.window: 5 is more than the 4 tokens"),
        ("unet", {"attention": "strided", "stride": 9}, "unet.stride: 9 is more than the 4 tokens"),
        ("unet", {"positions": "learned", "learn_frequencies": True}, "unet.learn_frequencies: only positions sine"),
        ("unet", {"attention": "dense"}, "unet.attention: unknown name 'dense'"),
        ("dit", {"attention": ["full"] * 13}, "dit.attention: a list of 13 for num_layers 12"),
        ("dit", {"attention": ["full", "strided"], "conditioning": "in_context"}, "dit.conditioning: in_context"),
        ("dit", {"positions": "relative", "conditioning": "in_context"}, "dit.conditioning: in_context"),
    ],
)
def test_settings_that_do_not_go_together_are_named_in_a_line(table, options, said, tmp_path):
    lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    (tmp_path / "some.toml").write_text("\n".join([f"[{table}]", *lines, "[denoiser]", f'kind = "{table}"']))
    with pytest.raises(UsageError) as caught:
        config.load(tmp_path / "some.toml", [])
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("options", [{"attention": ("full", "gated")}, {"positions": "relative"}])
def test_heads_with_something_in_common_are_not_divided(options):
    sizes = DiTSettings(**options)
    cfg = config.make(denoiser={"kind": "dit"}, dit=sizes, train={"tensor_parallel": 2, "parallel": "fsdp"})
    (name,) = options
    assert [text for text in config.conflicts(cfg) if text.startswith(f"dit.{name}: heads that processes share out")]


# ---- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 16, 32])
def test_windows_cost_as_many_operations_as_the_formula_says(n):
    """Liu et al. 2021, equation 2, a multiply-add being two: 2 (4 h w C² + 2 M² h w C), linear in the tokens."""
    with torch.device("meta"):
        x = torch.empty(1, n * n, DIM)
        found = {}
        for kind in ("full", "window"):
            module = make(kind)
            module.forward = partial(module.forward, size=(n, n))
            found[kind] = cost(module, "forward", {"x": x}).flops
    assert found["window"] == 2 * (4 * n * n * DIM**2 + 2 * WINDOW**2 * n * n * DIM)
    assert found["full"] == 2 * (4 * n * n * DIM**2 + 2 * n**4 * DIM)
