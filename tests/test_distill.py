"""The stage that distils: its goal in closed form and by the samplers, killed and gone on with, and what it publishes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import said, sha256, untimed

from tinydiff import config, export, flags, pipeline
from tinydiff.backends import open_backend
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints import folder, scheduler
from tinydiff.checkpoints.source import Source
from tinydiff.data.dataset import Images, open_source
from tinydiff.diffusion import guidance, noise
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.diffusion.schedules import CLEAN, SCHEDULES, Level, Levels, sampling_levels, trailing
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import read_json
from tinydiff.pipeline import Request
from tinydiff.schema import to_toml
from tinydiff.training import loop, state
from tinydiff.training.distill import DistillTask, drawn_in, goal, way
from tinydiff.training.run import Run
from tinydiff.training.runtime import Runtime

STEPS = 12
CAPTIONS = ["a red square", "a blue corner"]

# ---- the goal, where all is known ---------------------------------------------------------------------------------------


def gaussian(mean: float, spread: float) -> Callable:
    """The exact x0 of data from N(mean, spread²): linear regression of x0 on x."""

    def x0(x, level):
        share = level.alpha * spread**2 / (level.alpha**2 * spread**2 + level.sigma**2)
        return mean + (x - mean * level.alpha) * share

    return x0


def end_of(mean: float, spread: float) -> Callable:
    """Where the ODE of the same data leads: the standardised x is constant along it."""

    def x0(x, level):
        return mean + (x - mean * level.alpha) * (spread / (level.alpha**2 * spread**2 + level.sigma**2) ** 0.5)

    return x0


@pytest.mark.parametrize("schedule", ["cosine", "scaled_linear", "flow"])
@pytest.mark.parametrize("calls", [1, 4])
def test_the_goal_of_a_perfect_student_is_its_own_answer(schedule, calls):
    """Guided Gaussians are Gaussian again: the error is that of DDIM, which falls with the number of its steps."""
    levels, w, x = SCHEDULES[schedule](1000), 3.0, torch.linspace(-2, 2, 9)
    teacher = guidance.classifier_free(lambda x, at: (gaussian(0.2, 0.5)(x, at), gaussian(0.4, 0.5)(x, at)), w)
    student = end_of(0.2 + w * 0.2, 0.5)
    starts = trailing(1000, calls)
    errors = []
    for steps in (4, 16, 64):
        ways = [way(levels, *ends, steps) for ends in zip(starts, [*starts[1:], -1], strict=True)]
        tensors = [[Level(*map(torch.tensor, level)) for level in each] for each in ways]
        found = [(goal(teacher, student, x, each) - student(x, each[0])).abs().max().item() for each in tensors]
        errors.append(max(found))
    assert errors[2] < errors[1] / 2 < errors[0] / 4 and errors[2] < 0.1


@pytest.mark.parametrize("count", [10, 997, 1000])
@pytest.mark.parametrize("learnt", [1, 2, 3, 4, 6, 10, 20, 50])
def test_the_levels_visited_are_among_those_learnt(count, learnt):
    """By each number of calls that divides theirs."""
    levels = SCHEDULES["cosine"](count)
    starts = trailing(count, learnt)
    for calls in (n for n in range(1, learnt + 1) if learnt % n == 0 and learnt <= count):
        visited = sampling_levels(levels, calls, "trailing")
        assert visited[0] == levels[-1] and {*visited[:-1]} <= {levels[i] for i in starts}


def test_a_way_goes_from_level_to_level_down_to_the_clean_one():
    levels = SCHEDULES["cosine"](1000)
    assert way(levels, 499, 249, 5) == [levels[i] for i in (499, 449, 399, 349, 299, 249)]
    assert way(levels, 249, -1, 2) == [levels[249], levels[124], CLEAN]


# ---- the loss, by the samplers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distil_config(run_config) -> config.Config:
    """The runs' configuration with twelve steps of distillation."""
    own = {"steps": STEPS, "calls": 4, "levels": 4, "solver_steps": 2, "cfg_scale": 2.5}
    usual = {
        key: getattr(run_config.train.denoiser, key) for key in ("batch_size", "warmup", "lr", "save_every", "ema")
    }
    return of_stage(run_config, **usual, **own, sample_every=100)


def of_stage(cfg: config.Config, **keys) -> config.Config:
    """The configuration with other keys of the stage."""
    return replace(cfg, train=replace(cfg.train, distill=replace(cfg.train.distill, **keys)))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_loss_is_what_the_pipeline_and_ddim_say(make_model, distil_config, tmp_path, scale):
    """Row by row: the teacher under the pipeline's guidance, then the student, its equal at first, at the level reached."""
    path = make_model(distil_config)
    backend = TorchBackend(folder.load(Source(path)))
    with Runtime(of_stage(distil_config, cfg_scale=scale)) as runtime:
        run = Run(runtime, tmp_path)
        run.data, run.model = Images(open_source(distil_config.data), distil_config.data), folder.load(Source(path))
        task = DistillTask(run)
    levels, seen = task.levels, set()
    for step, row in product(range(2), range(4)):
        batch = task.batch(step, range(row, row + 1))
        x, start = batch["sample"].numpy(), int(batch["level"])
        _, caption, _ = task.draw(step, row, int(task.order(step)[row]), x.shape[1:])
        here, visited = levels[start], Levels(way(levels, start, start - 250, 2), levels.at)
        teacher, student = (
            pipeline.guided(backend, [caption], [""], Request(4, w, "ddim", "trailing", 16, 16)) for w in (scale, 1)
        )
        *_, (reached, _) = SAMPLERS["ddim"](teacher, x, visited, lambda i: None)
        wanted = student(reached, visited[-1]) if start > 250 else reached
        error = (student(x, here) - wanted) / here.sigma  # of v, by equation 12 of Salimans & Ho 2022
        loss, terms = task.loss("distill", batch)
        assert loss.item() == pytest.approx(float(np.mean(error**2)), rel=1e-3)
        assert [float(terms[f"loss_{band}"][1]) for band in range(4)] == [start // 250 == band for band in range(4)]
        seen.add(start)
    assert len(seen) > 1 and seen <= {999, 749, 499, 249}


# ---- runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(undisturbed, tmp_path_factory) -> Callable[[], Path]:
    """A function -> another copy of a run whose denoiser is trained."""
    return lambda: Path(shutil.copytree(undisturbed, tmp_path_factory.mktemp("begun") / "run"))


@pytest.fixture(scope="module")
def distilled(begun, distil_config) -> Path:
    """Distilled, with nothing in between; keys of a stage that has not begun may be changed."""
    run_dir = begun()
    assert loop.run(distil_config, run_dir) == run_dir / "model"
    return run_dir


@pytest.fixture(scope="module")
def path(distil_config, tmp_path_factory) -> Path:
    """The configuration as a file."""
    path = tmp_path_factory.mktemp("config") / "distil.toml"
    path.write_text(to_toml(distil_config))
    return path


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the last checkpoint and of the model, and the log without its times."""
    paths = [*run_dir.glob(f"checkpoints/distill-{STEPS:08d}/*.safetensors"), *run_dir.glob("model/*/*")]
    assert len(paths) > 12
    return sha256(run_dir, paths) | {"log": json.dumps(untimed(run_dir))}


def test_a_run_killed_again_and_again_ends_in_the_same_bits(distilled, begun, path, forker):
    """At moments spread over the stage: while it reads, learns, saves and publishes."""
    run_dir, die_at, deaths = begun(), 3, 0
    while (code := forker.run(run_dir, die_at, config_path=path)) == -9:
        deaths, die_at = deaths + 1, die_at + 17
    assert code == 0 and deaths >= 4, said(run_dir)
    assert digests(run_dir) == digests(distilled)


def test_blocks_computed_twice_and_parts_of_a_batch(distilled, begun, distil_config):
    """Of the teacher nothing is computed twice; in two parts the same rows give the same gradient within rounding."""
    twice = replace(distil_config, train=replace(distil_config.train, gradient_checkpointing=True))
    run_dir = begun()
    loop.run(twice, run_dir)
    assert digests(run_dir) == digests(distilled)
    run_dir = begun()
    loop.run(of_stage(distil_config, accumulate=2), run_dir)
    one, other = (
        [row["loss"] for row in untimed(run) if row["stage"] == "distill" and "loss" in row]
        for run in (distilled, run_dir)
    )
    assert len(one) == 1 and other == pytest.approx(one, rel=1e-4)


def test_only_the_denoiser_learns(distilled, undisturbed):
    before, after = (folder.load(Source(run / "model")) for run in (undisturbed, distilled))
    for name, part in after.networks.items():
        same = [torch.equal(tensor, before.networks[name].state_dict()[k]) for k, tensor in part.state_dict().items()]
        assert all(same) if name != "unet" else sum(same) < 0.1 * len(same)
    stored = state.Blocks(distilled / "checkpoints" / f"distill-{STEPS:08d}", "average")
    assert all(
        torch.equal(after.denoiser.state_dict()[k.removeprefix("distill.denoiser.")], v) for k, v in stored.whole()
    )


def test_a_finished_stage_does_nothing_and_mends_its_folder(distilled, begun, distil_config, tmp_path):
    run_dir = Path(shutil.copytree(distilled, tmp_path / "run"))
    (run_dir / "model" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    assert loop.run(distil_config, run_dir) == run_dir / "model"
    assert digests(run_dir) == digests(distilled)


def test_the_stage_before_it_may_be_published_again(distilled, undisturbed, distil_config, tmp_path):
    run_dir = Path(shutil.copytree(distilled, tmp_path / "run"))
    loop.run(distil_config, run_dir, "denoiser")
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    assert (run_dir / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert config.load(run_dir / "model" / "tinydiff.toml") == distil_config
    loop.run(distil_config, run_dir)
    assert digests(run_dir) == digests(distilled)


def test_what_was_distilled_of_another_denoiser_is_refused(distilled, distil_config, tmp_path):
    run_dir = Path(shutil.copytree(distilled, tmp_path / "run"))
    denoiser = replace(distil_config.train.denoiser, steps=14)
    longer = replace(distil_config, train=replace(distil_config.train, denoiser=denoiser))
    with pytest.raises(ModelError, match=r"checkpoints: the denoiser has been trained on since; delete distill-\*"):
        loop.run(longer, run_dir, accept=True)
    for checkpoint in run_dir.glob("checkpoints/distill-*"):
        shutil.rmtree(checkpoint)
    loop.run(longer, run_dir)
    assert read_json(run_dir / "checkpoints" / f"distill-{STEPS:08d}" / "state.json")["task"]["teacher"]


def test_keys_of_a_stage_that_has_begun_are_the_run_s(distilled, distil_config):
    with pytest.raises(UsageError, match=r"train\.distill\.cfg_scale \(2\.5 -> 7\)"):
        loop.run(of_stage(distil_config, cfg_scale=7), distilled)


# ---- what is published --------------------------------------------------------------------------------------------------


def test_the_folder_says_how_it_is_drawn(distilled, distil_config):
    """As a model would that was trained with these settings of [generate]; they are the run's own in its own folder."""
    cfg = drawn_in(distil_config, 4)
    model = distilled / "model"
    assert config.load(model / "tinydiff.toml") == cfg and config.load(distilled / "tinydiff.toml") == distil_config
    assert read_json(model / "scheduler" / "scheduler_config.json") == scheduler.write(cfg)
    assert read_json(model / "model_index.json")["scheduler"] == ["diffusers", "LCMScheduler"]
    g = Source(model).description.generate
    assert (g.steps, g.cfg_scale, g.sampler, g.spacing) == (4, 1.0, "lcm", "trailing")
    levels = Source(model).description.levels(g.sampler, g.steps, g.spacing)
    assert [level.t for level in levels] == [999, 749, 499, 249, 0] and levels[-1] == CLEAN


@pytest.fixture(scope="module")
def random(make_model, distil_config) -> Path:
    """A folder such as the stage publishes, with random weights: twelve steps leave too little to compare."""
    return make_model(drawn_in(distil_config, 4))


def drawn(model: Path, backend: str, calls: int) -> np.ndarray:
    """uint8 (2, H, W, 3) by the model's own settings, but for the number of calls."""
    opened = open_backend(Source(model), backend, "cpu")
    g = opened.description.generate
    request = Request(calls, g.cfg_scale, g.sampler, g.spacing, 16, 16)
    return pipeline.generate(opened, CAPTIONS, range(2), request).astype(int)


def test_both_runtimes_draw_alike(random, tmp_path):
    export.export(Source(random), tmp_path / "bundle")
    for calls in (1, 2, 4):
        one, other = (drawn(tmp_path / "bundle", backend, calls) for backend in ("torch", "onnx"))
        assert np.abs(one - other).max() <= 1 and one.std() > 10


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, []),
        ({"steps": 2, "cfg_scale": 1.0}, []),
        ({"cfg_scale": 3.0}, ["guidance built in"]),
        ({"cfg_max": 3.0}, ["guidance built in"]),
        ({"sampler": "deis", "cfg_scale": 2.0}, ["guidance built in", "by lcm, not by deis"]),
    ],
)
def test_what_a_distilled_model_has_not_learnt_is_said(random, tiny_model, asked, wanted, capsys):
    """Nothing of another model, nor by default."""
    for model, told in ((random, wanted), (tiny_model, [])):
        opened = SimpleNamespace(description=Source(model).description)
        flags.complete(opened, flags.Flags(**asked))  # type: ignore[arg-type]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(told) and all(text in line for text, line in zip(told, lines, strict=True))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_diffusers_draws_the_same(random, monkeypatch, calls):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(random)
    assert isinstance(pipe.scheduler, diffusers.LCMScheduler)
    pipe.set_progress_bar_config(disable=True)
    steps = iter(range(1, calls))
    shape = (4, 8, 8)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor",
        lambda *_, **__: torch.from_numpy(noise.normal(range(2), shape, next(steps))),
    )
    latents = torch.from_numpy(noise.normal(range(2), shape))
    how = {"num_inference_steps": calls, "guidance_scale": 1.0, "width": 16, "height": 16, "output_type": "np"}
    theirs = np.rint(pipe(CAPTIONS, latents=latents, **how).images * 255)
    assert np.abs(drawn(random, "torch", calls) - theirs).max() <= 1


@given(st.integers(1, 60), st.integers(1, 60), st.integers(10, 60))
def test_what_is_advised_of_levels_and_calls_is_accepted(levels, calls, most):
    """At once where the number of levels is wrong, else after the number of calls and then that of levels."""
    cfg = config.make(diffusion={"num_train_timesteps": most}, generate={"steps": 1})
    for _ in range(3):
        problems = [p for p in config.conflicts(of_stage(cfg, steps=1, levels=levels, calls=calls)) if "distill" in p]
        if not problems:
            break
        number = int(re.search(r"(\d+)(?: or less)?$", problems[0])[1])
        levels, calls = (levels, number) if problems[0].endswith("or less") else (number, calls)
    assert not problems


@pytest.mark.parametrize(
    ("keys", "stage", "wanted"),
    [
        ({"diffusion": {"prediction": "epsilon"}}, {}, "steps: of pure noise"),
        ({"train": {"denoiser": {"steps": 0}}}, {}, "steps: there is no denoiser to distil"),
        ({}, {"calls": 3}, "levels: 20 is no multiple of 3 calls, whose levels must be learnt; set 21"),
        ({"diffusion": {"num_train_timesteps": 20}}, {"levels": 40}, "levels: 40 are more than the 20 of"),
        ({}, {"calls": 5}, ""),
    ],
)
def test_what_cannot_be_distilled_is_refused(keys, stage, wanted):
    cfg = of_stage(config.make(**keys), steps=1, **stage)
    problems = list(config.conflicts(cfg))
    assert any(problem.startswith(f"train.distill.{wanted}") for problem in problems) is bool(wanted)
    assert not any("distill" in problem for problem in config.conflicts(of_stage(cfg, steps=0)))
