"""Schedulers of the installed diffusers, every key varied: drawn as diffusers draws them, refused, or reported."""

from __future__ import annotations

import inspect
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from diffusers_loop import Brownian, stepped

from tinydiff.checkpoints import scheduler, solvers
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.diffusion.schedules import RHOS, distilled
from tinydiff.errors import UsageError

diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
PIPELINES = {  # what each changes of a scheduler
    "": {},
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}
STABLE = {"_class_name": "StableDiffusionPipeline"}
SCALED = ("euler", "euler_ancestral", "heun", "dpm2", "dpmpp_sde", "lms")  # their x is ours over alpha
STEPS = 10  # divides the training levels
CHOICES = {  # values of keys; other keys take their default or its opposite
    "num_train_timesteps": [1000, 500, 100],
    "beta_start": [0.00085, 1e-4, 0.002],
    "beta_end": [0.012, 0.02, 0.03],
    "beta_schedule": ["scaled_linear", "linear", "squaredcos_cap_v2"],
    "trained_betas": [None, None, [0.01 + 0.0001 * i for i in range(100)]],
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0, 1],
    "solver_order": [1, 2, 3],
    "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver++", "sde-dpmsolver", "deis"],
    "solver_type": ["midpoint", "heun", "logrho", "bh1", "bh2"],
    "final_sigmas_type": ["zero", "sigma_min"],
    "interpolation_type": ["linear", "log_linear"],
    "timestep_type": ["discrete", "continuous"],
    "variance_type": [None, "fixed_small", "fixed_large", "fixed_small_log", "learned_range"],
    "lambda_min_clipped": [-math.inf, -5.1, -1.0],
    "original_inference_steps": [50, 20],
    "timestep_scaling": [10.0, 0.1],
    "disable_corrector": [[], [0, 1]],
    "sigma_min": [None, 0.05],
    "sigma_max": [None, 10.0],
    "clip_sample_range": [1.0, 2.0],
    "sample_max_value": [1.0, 1.5],
    "dynamic_thresholding_ratio": [0.995, 0.5],
    "flow_shift": [1.0, 3.0],
    "shift": [1.0, 3.0],
    "time_shift_type": ["exponential"],
    "shift_terminal": [None, 0.1],
    "predictor_order": [2, 3],
    "corrector_order": [2, 3],
}
FIXED = ("tau_func", "solver_p", "noise_sampler_seed", "kwargs")


def classes() -> dict[str, dict]:
    """diffusers' scheduler classes, and the keys of each with its defaults."""
    found = {}
    for name in dir(diffusers):
        if name.endswith("Scheduler") and hasattr(cls := getattr(diffusers, name), "config_name"):
            given = list(inspect.signature(cls.__init__).parameters.values())[1:]
            found[name] = {p.name: p.default for p in given if p.kind != p.VAR_KEYWORD}
    return found


def varied(kind: str, defaults: dict, seed: int) -> dict:
    """A configuration in which about two keys besides the noise levels are not at their defaults.

    Every other one begins with settings that one of our samplers draws.
    """
    rng = random.Random(f"{kind} {seed}")
    drawn = [settings for theirs, settings in solvers.SCHEDULERS.values() if theirs == kind]
    base = rng.choice(drawn) if drawn and seed % 2 else {}
    noise = {"beta_schedule", "prediction_type", "timestep_spacing", "num_train_timesteps", "beta_start", "beta_end"}
    table = {}
    for key, default in defaults.items():
        if key in FIXED or default is inspect.Parameter.empty or rng.random() > (0.5 if key in noise else 0.15):
            continue
        table[key] = rng.choice(CHOICES.get(key, [not default]))
    if table.get("trained_betas"):
        table["num_train_timesteps"] = 100
    return {"_class_name": kind, **base, **table}


def network(x: np.ndarray, t: float, count: int) -> np.ndarray:
    """Stands for a network: smooth, and not linear."""
    return np.sin(1.3 * x + 2.5 * t / count) * 0.8 + 0.1 * np.cos(x * x / 4)


def theirs(table: dict, index: dict, scale: float, draws: np.ndarray, monkeypatch) -> np.ndarray:
    """What diffusers' scheduler makes of the first draw times `scale`, as in its Stable Diffusion pipeline."""
    made = getattr(diffusers, table["_class_name"]).from_config(table)
    patched = {k: v for k, v in PIPELINES[index["_class_name"]].items() if k in made.config}
    made._internal_dict = type(made.config)(dict(made.config) | patched)
    made.set_timesteps(STEPS)
    start, *others = draws
    if table["_class_name"] == "DPMSolverSDEScheduler":
        made.noise_sampler = Brownian(others)
    count = made.config.num_train_timesteps
    return stepped(made, lambda x, t: network(x, t, count), start * scale, others, type(made).__module__, monkeypatch)


def ours(read: scheduler.Scheduler, draws: np.ndarray) -> np.ndarray:
    levels = read.levels(read.sampler, STEPS, read.spacing)
    to_x0 = PREDICTIONS[read.prediction].to_x0

    def denoise(x, level):
        return to_x0(network(x, level.t, len(read.schedule)), x, level.alpha, level.sigma)

    start, *others = draws
    *_, (x, _) = SAMPLERS[read.sampler](denoise, start * levels[0].sigma, levels, lambda i: others[i])
    return x


def outcome(table: dict, index: dict, monkeypatch) -> str:
    """ "refused", "reported", "drawn" as diffusers draws it, "diffusers fails", or how far apart they are."""
    try:
        read = scheduler.read(json.loads(json.dumps(table)), index)
        levels = read.levels(read.sampler, STEPS, read.spacing)
    except (ValueError, UsageError) as error:
        assert len(str(error)) < 300
        return "refused"
    if read.notes:
        return "reported"
    draws = np.random.default_rng(3).standard_normal((2 * STEPS + 2, 2, 4, 8))
    scale = levels[0].sigma / (levels[0].alpha if read.sampler in SCALED else 1.0)
    try:
        wanted = theirs(table, index, scale, draws, monkeypatch)
    except (ValueError, NotImplementedError, IndexError, AssertionError):
        return "diffusers fails"
    apart = np.abs(ours(read, draws) - wanted).max() / max(1.0, np.abs(wanted).max())
    # By rho, their multistep classes tell the network whole timesteps, found in float32: one more or less.
    near = 2e-2 if read.spacing in RHOS and read.sampler not in SCALED else 2e-3
    return "drawn" if apart <= near else f"{apart:.3g} apart"


def test_the_defaults_are_those_of_diffusers():
    found = classes()
    for name, table in solvers.CLASSES.items():
        assert found[name] == table, name


@pytest.mark.parametrize("kind", classes())
def test_every_key_is_followed_refused_or_reported(kind, monkeypatch):
    """Whatever a class of diffusers is configured to, no other picture is drawn without a word."""
    defaults, outcomes = classes()[kind], Counter()
    for seed in range(12 if kind in solvers.CLASSES else 1):
        table = varied(kind, defaults, seed)
        result = outcome(table, {"_class_name": list(PIPELINES)[seed // 2 % 3]}, monkeypatch)
        assert result in ("refused", "reported", "drawn", "diffusers fails"), (result, table)
        outcomes[result] += 1
    assert (kind in solvers.CLASSES) == (outcomes["refused"] < outcomes.total())
    exact = {theirs for theirs, _ in solvers.SCHEDULERS.values()} | solvers.SAME.keys()
    assert not outcomes["drawn"] or kind in exact


@pytest.mark.parametrize("sampler", solvers.SCHEDULERS)
def test_settings_of_our_samplers_are_drawn(sampler, monkeypatch):
    """With the levels of Stable Diffusion nothing is reported, and the picture is that of diffusers."""
    kind, settings = solvers.SCHEDULERS[sampler]
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    table = {"_class_name": kind, **noise, **settings}
    wanted = "reported" if sampler == "dpmpp_3m_sde" else "drawn"
    assert outcome(table, STABLE, monkeypatch) == wanted


def test_a_key_read_past_would_be_noticed(monkeypatch):
    """The sweep's network and tolerance tell apart what any of these keys changes."""
    monkeypatch.setattr(solvers, "unfollowed", lambda *_: [])
    monkeypatch.setattr(scheduler, "_apart", lambda *_: ())
    changes = [
        ("PNDMScheduler", {"skip_prk_steps": False}),
        ("DDIMScheduler", {"thresholding": True}),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}),
        ("DEISMultistepScheduler", {"solver_order": 2}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ]
    for kind, change in changes:
        assert outcome({"_class_name": kind, **change}, STABLE, monkeypatch).endswith("apart"), kind


@pytest.mark.parametrize("steps", range(1, 51))
def test_the_steps_of_lcm(steps):
    made = diffusers.LCMScheduler()
    made.set_timesteps(steps)
    assert distilled(1000, steps, 50) == made.timesteps.tolist()
