"""Growing: at that moment the denoiser does what it did, its moments are kept, and a run goes on through it to the same bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import digests, metrics
from tensors import noise, randomise
from torch import nn

from tinydiff import config
from tinydiff.backends import open_backend
from tinydiff.checkpoints.source import Source
from tinydiff.errors import UsageError
from tinydiff.networks.growth import Growth, times
from tinydiff.networks.network import HIDDEN
from tinydiff.networks.unet import CROSS, PLAIN
from tinydiff.pipeline import Request, generate
from tinydiff.schema import to_toml
from tinydiff.training import grow, loop, state
from tinydiff.training.optim import MOMENTS, learning_rate
from tinydiff.training.parallel import World

STEP, TEXT = 5, 12  # of the growth; width of the text vectors

UNETS = {
    "one level": config.UNet((16,), (CROSS,), 1, 1, 2, 8),
    "two levels": config.UNet((16, 32), (CROSS, CROSS), 2, 1, (2, 4), 4, qk_norm=True),
    "told": config.UNet((8, 16), (CROSS, CROSS), 1, 1, 2, 4, label="time", image="concat", modulation="film"),
    "plain above": config.UNet((8, 24), (PLAIN, CROSS), 1, 2, 2, 4, False),
}
DITS = {
    "text": {"kind": "dit", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8},
    "norms": {"kind": "dit", "num_layers": 1, "num_attention_heads": 3, "attention_head_dim": 4, "qk_norm": True},
    "exits": {"kind": "dit", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "exits": 1},
    "classes": {"kind": "class", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4},
}


def start(name: str, **train: Any) -> config.Config:
    """A tiny configuration by its name in one of the tables above."""
    sizes = {"data": {"resolution": 32}, "train": train}
    if name in UNETS:
        return config.make(unet=UNETS[name], **sizes)
    own = DITS[name]
    text = {"kind": "class" if own["kind"] == "class" else "clip"}
    settings = {k: v for k, v in own.items() if k != "kind"} | {"size": "custom"}
    return config.make(denoiser={"kind": "dit"}, dit=settings, text_encoder=text, **sizes)


GROWTHS = [
    *((name, {"layers": n}) for name in UNETS for n in (3, 4)),
    *((name, {"widths": tuple(2 * w for w in UNETS[name].block_out_channels)}) for name in UNETS),
    ("two levels", {"widths": (64, 128)}),
    ("two levels", {"widths": (32, 64), "layers": 3}),
    ("plain above", {"attention": (0, 1)}),
    ("plain above", {"attention": (0, 1), "widths": (16, 48), "layers": 2, "resolution": 64}),
    ("two levels", {"resolution": 64}),
    ("told", {"layers": 2, "widths": (16, 32), "resolution": 64}),
    *((name, {"layers": 4}) for name in DITS),
    ("text", {"widths": 32}),
    ("text", {"widths": 64}),
    ("norms", {"widths": 24, "layers": 3}),
    ("classes", {"widths": 16}),
    ("text", {"resolution": 64}),
    ("classes", {"resolution": 64, "widths": 16, "layers": 3}),
]


def network(cfg: config.Config, seed: int | None = None) -> nn.Module:
    """The denoiser of a configuration as it is built, or with random weights."""
    torch.manual_seed(0)
    row = cfg.denoiser_network
    module = row.build(row.describe(cfg, {HIDDEN: TEXT}))
    if seed is not None:
        randomise(module, seed)
    return module


def training(cfg: config.Config, module: nn.Module, **stage: Any) -> state.Training:
    settings = replace(cfg.train.stage("denoiser"), **stage)
    outer = nn.ModuleDict({"denoiser": module})
    return state.Training([state.Learner.of("denoiser", outer, settings, World(torch.device("cpu"), 1))])


def told(cfg: config.Config, side: int = 16) -> dict[str, torch.Tensor]:
    """What a denoiser is asked."""
    channels = cfg.autoencoder.latent_channels
    context = noise(2, 1, TEXT).softmax(-1) if cfg.text_encoder.kind == "class" else noise(2, 3, TEXT)
    time = torch.tensor([3.0, 950.0])
    asked = {"sample": noise(2, channels, side, side, seed=1), "timestep": time, "encoder_hidden_states": context}
    row = cfg.denoiser_network
    if "class_labels" in (conditions := row.conditions(row.describe(cfg, {HIDDEN: TEXT}))):
        asked["class_labels"] = noise(2, int(conditions["class_labels"].axes[-1]), seed=2).softmax(-1)
        asked["image_latents"] = noise(2, channels, side, side, seed=3)
    return asked


class Grown:
    """A denoiser with random weights and moments after `STEP` updates, saved; and the larger one that has opened it."""

    def __init__(self, name: str, growth: dict[str, Any], folder: Path, optimizer: str = "adamw"):
        self.before = replace(start(name), train=replace(start(name).train, grow=(Growth(STEP, **growth),)))
        self.after = config.grown(self.before, self.before.train.grow)
        self.small, self.large = network(self.before, 0), network(self.after)
        self.old = training(self.before, self.small, optimizer=optimizer)
        self.new = training(self.after, self.large, optimizer=optimizer)
        self.act(self.old, lambda p: noise(*p.shape, seed=p.numel()))
        for mine in self.old.learners[0].average.tensors:
            mine.add_(noise(*mine.shape, seed=7), alpha=0.01)
        saved: state.Snapshot = {}
        state.snapshot(self.old, saved)
        path = folder / "checkpoints" / f"denoiser-{STEP:08d}"
        path.parent.mkdir()
        about = {"stage": "denoiser", "step": STEP, "skipped": 0, "updates": {"denoiser": 1}, "scaler": {}}
        state.save(path, saved, {}, about, World(torch.device("cpu"), 1), lambda made: None)
        run: Any = SimpleNamespace(cfg=self.before, growths=1)
        state.load(path, self.new, grow.change(run, "denoiser", path, self.new))

    @staticmethod
    def act(training: state.Training, gradient: Any) -> None:
        """One update with these gradients."""
        learner = training.learners[0]
        for piece in learner.pieces:
            piece.parameter.grad = gradient(piece.parameter)
        learner.optimizer.step()

    def apart(self) -> float:
        """How far the outputs are apart, of what they are, at the size trained on and at another."""
        worst = 0.0
        for side in (16, 8):
            with torch.no_grad():
                small, large = (m(**told(self.before, side)) for m in (self.small, self.large))
            assert small.std() > 0.01
            worst = max(worst, float((small - large).abs().max() / small.abs().max()))
        return worst


@pytest.mark.parametrize(("name", "growth"), GROWTHS, ids=str)
def test_function_is_the_same_when_it_grows(name, growth, tmp_path):
    """Of the weights and of their average; there is more of the network, and every new parameter can learn."""
    grown = Grown(name, growth, tmp_path)
    count = [sum(p.numel() for p in m.parameters()) for m in (grown.small, grown.large)]
    assert (count[1] > count[0]) == (growth.keys() != {"resolution"})
    assert grown.apart() <= 1e-5
    for each in (grown.old, grown.new):
        each.exchange()
    assert grown.apart() <= 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("name", "growth"), [("two levels", {"layers": 3}), ("text", {"layers": 3})], ids=str)
def test_moments_of_what_there_was_are_kept(name, growth, optimizer, tmp_path):
    """With gradients of zero alone, the next update moves each old parameter as if nothing had grown, and no new one."""
    grown = Grown(name, growth, tmp_path, optimizer)
    first = {name: t.clone() for name, t in grown.new.tensors("weights").items()}
    for each in (grown.old, grown.new):
        Grown.act(each, torch.zeros_like)
    added = grow.layers(first) - grow.layers(grown.old.tensors("weights"))
    there = {grow.moved(name, added): name for name in grown.old.tensors("weights")}
    for kind in ("weights", *MOMENTS):
        old, new = (each.tensors(kind) for each in (grown.old, grown.new))
        assert {there[name] for name in new.keys() & there.keys()} == old.keys() and new.keys() - there.keys()
        assert all(torch.equal(new[name], old[there[name]]) for name in new.keys() & there.keys())
        for name in new.keys() - there.keys():
            s = grown.new.learners[0].settings
            decayed = first[name] * (1 - s.lr * s.weight_decay) if first[name].ndim > 1 else first[name]
            assert torch.allclose(new[name], decayed) if kind == "weights" else not new[name].any()
    assert all(int(s["step"]) == 2 for s in grown.new.learners[0].optimizer.state.values())


def test_moments_of_a_wider_network_are_those_of_its_gradients(tmp_path):
    """Gradients of the wider network, its shares being equal, are the smaller one's as `widened` has them."""
    cfg = replace(start("two levels"), train=replace(start("two levels").train, grow=(Growth(STEP, widths=(32, 64)),)))
    after = config.grown(cfg, cfg.train.grow)
    small, large = network(cfg, 0), network(after)
    rng: Any = SimpleNamespace(uniform=lambda low, high, size: torch.zeros(size).numpy())
    shapes = {name: tuple(p.shape) for name, p in large.named_parameters()}
    widened = {n: grow.widened(f"x.{n}", p.detach(), shapes[n], "weights", rng) for n, p in small.named_parameters()}
    large.load_state_dict(widened)
    for module in (small, large):
        (module(**told(cfg)) ** 2).sum().backward()
    for name, p in small.named_parameters():
        assert p.grad is not None
        wanted = grow.widened(f"x.{name}", p.grad, shapes[name], "exp_avg", rng)
        squares = grow.widened(f"x.{name}", p.grad**2, shapes[name], "exp_avg_sq", rng)
        grad = large.get_parameter(name).grad
        assert grad is not None and torch.allclose(squares, wanted**2)
        known = (
            slice(None, None, 2) if grow.SINES.fullmatch(f"x.{name}") else slice(None)
        )  # new rates have gradients too
        grad, wanted = (t[:, known] if t.ndim > 1 else t for t in (grad, wanted))
        assert (grad - wanted).abs().max() <= 2e-5 * wanted.abs().max(), name


@pytest.mark.parametrize(
    ("name", "growth"), [("two levels", {"widths": (32, 64)}), ("text", {"widths": 32, "layers": 3})]
)
def test_copies_learn_different_things_and_all_of_it_learns(name, growth, tmp_path):
    """After some updates no two output channels of a layer are the same, and every parameter has moved."""
    grown = Grown(name, growth, tmp_path)
    first = {name: t.clone() for name, t in grown.new.tensors("weights").items()}
    for _ in range(3):
        grown.large.zero_grad()
        (grown.large(**told(grown.before)) - noise(1)).square().mean().backward()
        Grown.act(grown.new, lambda p: p.grad)
    for name, tensor in grown.new.tensors("weights").items():
        assert not torch.equal(tensor, first[name]), name
    blocks = [p for n, p in grown.large.named_parameters() if p.ndim == 4 or ".ff." in n]
    for p in (p for p in blocks if p.ndim > 1 and len(p) > 8):
        rows = p.detach().flatten(1)
        assert len(torch.unique(rows, dim=0)) == len(rows)


# ---- runs ------------------------------------------------------------------------------------------------------------


def growing(run_config: config.Config, growths: tuple[Growth, ...]) -> config.Config:
    stage = {
        "steps": 10,
        "batch_size": 4,
        "warmup": 2,
        "ema": 0.9,
        "save_every": 3,
        "sample_every": 5,
        "optimizer": "adamw",
    }
    train = replace(
        run_config.train,
        denoiser=replace(run_config.train.stage("denoiser"), **stage),
        autoencoder=replace(run_config.train.stage("autoencoder"), steps=2),
        **{"grow": growths, "keep": 20, "keep_best": True},
    )
    return replace(run_config, train=train, data=replace(run_config.data, held_out=0.7))


TWICE = (Growth(4, layers=2, resolution=32), Growth(7, widths=(32,)))


@pytest.fixture(scope="module")
def grown_run(run_config, tmp_path_factory) -> Path:
    """A run of ten updates that grows twice, and nothing else disturbs."""
    run_dir = tmp_path_factory.mktemp("grown") / "run"
    loop.run(growing(run_config, TWICE), run_dir)
    return run_dir


def test_model_folder_is_of_the_grown_network(grown_run, run_config):
    source = Source(grown_run / "model")
    table = source.configs["unet"]
    assert (
        table["layers_per_block"] == 2
        and tuple(table["block_out_channels"]) == (32,)
        and table["attention_head_dim"] == 4
    )
    assert source.description.size == 32
    (image,) = generate(open_backend(source, "torch", "cpu"), ["a red circle"], [1], request(source, 2))
    assert image.shape == (32, 32, 3) and image.std() > 0
    said = config.load(grown_run / "model" / "tinydiff.toml", stored=True)
    assert said == growing(run_config, TWICE)


def request(source: Source, steps: int) -> Request:
    return Request(steps, 1.0, "ddim", "trailing", source.description.size, source.description.size)


def test_growth_is_told(grown_run):
    """Before the update that is the first of the larger network, in the log and in the report."""
    said = [(row["step"], row["grown"]) for row in metrics(grown_run) if "grown" in row]
    assert said[0] == (5, "data.resolution 16 -> 32, unet.layers_per_block 1 -> 2")
    assert said[1] == (8, "unet.block_out_channels (16,) -> (32,), unet.attention_head_dim 2 -> 4")
    page = (grown_run / "report.html").read_text()
    assert "from step 5 on" in page and "unet.layers_per_block 1 -&gt; 2" in page


def test_rates_and_the_loss_go_on(grown_run, run_config):
    """The learning rate is that of the step, whatever has grown; the held-out loss is not compared across growth."""
    state = json.loads((grown_run / "checkpoints" / "denoiser-00000010" / "state.json").read_text())
    assert state["updates"] == {"denoiser": 10} and state["best"]["step"] == 10
    before = json.loads((grown_run / "checkpoints" / "denoiser-00000007" / "state.json").read_text())
    assert before["best"]["step"] == 5
    rates = {row["step"]: row["lr"] for row in metrics(grown_run) if "lr" in row}
    assert rates == {10: pytest.approx(learning_rate(9, growing(run_config, TWICE).train.stage("denoiser")), rel=1e-6)}


@pytest.mark.parametrize("last", [4, 5, 9])
def test_resumed_at_any_checkpoint_it_ends_in_the_same_bits(last, grown_run, run_config, tmp_path):
    """What a kill leaves: before a growth, at it with the growth to come, and after it."""
    run_dir = tmp_path / "run"
    shutil.copytree(grown_run, run_dir)
    for path in [p for p in run_dir.glob("checkpoints/denoiser-*") if int(p.name[-8:]) > last]:
        shutil.rmtree(path)
    loop.run(growing(run_config, TWICE), run_dir)
    assert digests(run_dir) == digests(grown_run)


@pytest.mark.parametrize("place", ["grow.change", "loop.step"])
def test_killed_while_it_grows(place, grown_run, run_config, tmp_path, monkeypatch):
    """The second growth is cut short: before the larger network is filled, and before its first update."""
    run_dir, module, name = tmp_path / "run", *place.split(".")
    owner, begun = {"grow": grow, "loop": loop}[module], loop.grow.enlarge
    real, reached = getattr(owner, name), []

    def enlarge(run: Any, count: int) -> None:
        reached.append(count)
        begun(run, count)

    def die(*arguments: Any) -> Any:
        if reached[-1:] == [2]:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(grow, "enlarge", enlarge)
        patched.setattr(owner, name, die)
        with pytest.raises(KeyboardInterrupt):
            loop.run(growing(run_config, TWICE), run_dir)
    assert max(p.name for p in run_dir.glob("checkpoints/*")) == "denoiser-00000007"
    loop.run(growing(run_config, TWICE), run_dir)
    assert digests(run_dir) == digests(grown_run)


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ("[{step=5, layers=1}]", ["step 5", "layers 1", "unet.layers_per_block"]),
        ("[{step=5, widths=[32, 96]}]", ["widths [32, 96]", "unet.block_out_channels [64, 192]"]),
        ("[{step=5, widths=[128, 192]}]", ["widths [128, 192]", "unet.block_out_channels"]),
        ("[{step=5, widths=[192, 576]}]", ["widths [192, 576]", "unet.block_out_channels"]),
        ("[{step=5, widths=128}]", ["widths [128]", "unet.block_out_channels"]),
        ("[{step=5, resolution=32}]", ["resolution 32", "data.resolution"]),
        ("[{step=5, resolution=49}]", ["data.resolution: 49 is no multiple"]),
        ("[{step=5, attention=[1]}]", ["attention [1]", "unet.down_block_types"]),
        ("[{step=5, attention=[1, 2]}]", ["attention [1, 2]", "unet.down_block_types"]),
        ("[{step=5}]", ["step 5", "says nothing that grows"]),
        ("[{layers=2}]", ["step 0", "train.denoiser.steps 2000"]),
        ("[{step=2000, layers=2}]", ["step 2000", "train.denoiser.steps 2000"]),
        ("[{step=9, layers=2}, {step=9, layers=3}]", ["step 9", "not after 9"]),
        ("[{step=9, layers=3}, {step=12, layers=2}]", ["step 12", "layers 2", "the 3 of unet.layers_per_block"]),
        ("[{step=9, layer=3}]", ["train.grow: entry 1.layer: unknown key", "'layers'"]),
        ("[{step=9, layers='3'}]", ["train.grow: entry 1.layers: expected int, got '3'"]),
        ("[{step=0, layers=3}]", ["step 0"]),
        ("[3]", ["train.grow", "entry 1", "expected a table, got 3"]),
        ("3", ["train.grow: expected a list", "got 3"]),
    ],
)
def test_what_does_not_grow_is_refused_in_a_line(settings, parts):
    with pytest.raises(UsageError) as caught:
        config.load(None, [f"train.grow={settings}"])
    message = str(caught.value)
    assert all(part in message for part in ("train.grow", *parts)) and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.parallel=fsdp"], ["train.grow", "train.parallel 'fsdp'"]),
        (["train.time=60"], ["train.grow", "train.time 60"]),
        (["train.tensor_parallel=2"], ["train.grow", "train.tensor_parallel 2"]),
        (["train.denoiser.alignment_weight=0.5"], ["train.grow", "train.denoiser.alignment_weight 0.5"]),
        (["denoiser.kind=dit", "train.grow=[{step=5, attention=[0]}]"], ["attention", "denoiser.kind dit"]),
        (["denoiser.kind=dit", "train.grow=[{step=5, layers=12}]"], ["layers 12", "dit.num_layers"]),
        (["denoiser.kind=dit", "train.grow=[{step=5, widths=500}]"], ["widths [500]", "dit.num_attention_heads"]),
    ],
)
def test_what_growth_does_not_go_with(overrides, parts):
    with pytest.raises(UsageError) as caught:
        config.load(None, ["train.grow=[{step=5, layers=2}]", *overrides])
    assert all(part in str(caught.value) for part in parts)


def test_growths_are_read_back(tmp_path):
    cfg = config.make(
        train={"grow": [{"step": 5, "layers": 2}, {"step": 9, "widths": [128, 384], "attention": [0, 1]}]}
    )
    (tmp_path / "a.toml").write_text(to_toml(cfg))
    assert config.load(tmp_path / "a.toml") == cfg
    assert config.load(tmp_path / "a.toml", ["train.denoiser.steps=100"]).train.grow == cfg.train.grow
    assert "grow = [{ step = 5, layers = 2 }, { step = 9, widths = [128, 384], attention = [0, 1] }]" in to_toml(cfg)


def test_times_are_powers_of_two():
    found = {(new, old) for new in range(1, 40) for old in range(1, 40) if times(new, old)}
    assert found == {(old * k, old) for old in range(1, 40) for k in (2, 4, 8, 16, 32) if old * k < 40}
