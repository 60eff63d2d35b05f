"""What a scheduler_config.json says: values with ranges, levels without signal, what is reported."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tiny_stable_diffusion import configs_of, refusal

from tinydiff.checkpoints import scheduler, solvers
from tinydiff.checkpoints.description import describe
from tinydiff.checkpoints.source import Source
from tinydiff.diffusion.schedules import scaled_linear, zero_terminal_snr
from tinydiff.errors import ModelError, UsageError
from tinydiff.inspect import inspect

STABLE = {"_class_name": "StableDiffusionPipeline"}
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LESSER = {  # keys that say something only beside one that is documented, or how noise is drawn
    *("dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "time_shift_type", "noise_sampler_seed"),
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "invert_sigmas", "stochastic_sampling"),
    *("shift_terminal", "predictor_order", "corrector_order", "tau_func", "euler_at_final"),
}
BAD = [
    *(("num_train_timesteps", value) for value in (10**7, 0, -1, 1, 1.5, True, "1000", None, [1000], 10**400)),
    *(("num_train_timesteps", float(value)) for value in ("inf", "-inf", "nan")),
    *(("beta_start", value) for value in (0, -0.1, 1.0, "0.1", None, float("nan"), 10**400, {})),
    *(("beta_end", value) for value in (1, 2.5, float("inf"), [0.02])),
    *(("beta_schedule", value) for value in ("odd", None, 3, ["linear"], "x" * 10**6)),
    *(("prediction_type", value) for value in ("v-prediction", "v", None, 0, ["epsilon"])),
    *(("timestep_spacing", value) for value in ("even", None, 1)),
    *(("steps_offset", value) for value in (-1, 10**6, "1", 0.5, None)),
    *(("trained_betas", value) for value in ([], [0.1] * 999, [0.1] * 999 + [1.5], [0.1] * 999 + ["0.1"], "0.1", {})),
    *(("trained_betas", [value, *[0.1] * 999]) for value in (0, 1, -1, float("nan"), None, True)),
    *(("set_alpha_to_one", value) for value in ("yes", 1, [])),
    *(("rescale_betas_zero_snr", value) for value in ("true", 1)),
    ("beta_end", 0.9),
    ("_class_name", "EDMEulerScheduler"),
    ("_class_name", ["DDIMScheduler"]),
    ("_class_name", "x" * 10**6),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_values_out_of_range_are_refused_by_name(key, value):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r".") as caught:
        scheduler.read({"_class_name": "DDIMScheduler", **NOISE, key: value}, {} if key == "steps_offset" else STABLE)
    assert time.perf_counter() - start < 0.5
    said = str(caught.value)
    assert len(said) < 200 and len(said.splitlines()) == 1
    assert key in said or "num_train_timesteps and betas" in said


@pytest.mark.parametrize(
    "change",
    [
        {"num_train_timesteps": 1000.0},
        {"rescale_betas_zero_snr": None},
        {"trained_betas": None},
        {"unheard_of": {"a": 1}},
        {"beta_end": 0.01, "_use_default_values": ["beta_end"], "beta_start": 1e-4, "beta_schedule": "linear"},
    ],
)
def test_values_with_one_meaning(change):
    usual = NOISE | ({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02} if "beta_end" in change else {})
    read = scheduler.read({"_class_name": "DDIMScheduler", **NOISE, **change}, STABLE)
    assert read == scheduler.read({"_class_name": "DDIMScheduler", **usual}, STABLE) and not read.notes


PUBLISHED = {  # as the folders of Stable Diffusion 1.5, 2.1 and 2.1 base have them, and of DiT-XL/2
    "StableDiffusionPipeline": [
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
        | {"clip_sample": False, "num_train_timesteps": 1000, "trained_betas": None},
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "set_alpha_to_one": False}
        | {"clip_sample": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None},
        {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False}
        | {"prediction_type": "epsilon", "sample_max_value": 1.0, "steps_offset": 1, "timestep_spacing": "leading"},
        {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "solver_order": 2}
        | {"solver_type": "midpoint", "lower_order_final": True, "thresholding": False, "use_karras_sigmas": True}
        | {"lambda_min_clipped": -float("inf"), "variance_type": None, "euler_at_final": False},
    ],
    "DiTPipeline": [{"_class_name": "DDIMScheduler", "clip_sample": False, "beta_schedule": "linear"}],
}


@pytest.mark.parametrize(("pipeline", "table"), [(k, table) for k, tables in PUBLISHED.items() for table in tables])
def test_nothing_is_reported_of_published_schedulers(pipeline, table):
    read = scheduler.read(NOISE | table, {"_class_name": pipeline})
    assert not read.notes and read.levels(read.sampler, 20, read.spacing)


def test_the_documentation_lists_every_class_and_setting():
    text = (Path(__file__).parents[1] / "docs" / "stable-diffusion.md").read_text(encoding="utf-8")
    for kind in solvers.CLASSES:
        samplers = [name for name, row in solvers.SCHEDULERS.items() if row[0] == solvers.SAME.get(kind, kind)]
        for sampler in samplers:
            settings = ", ".join(f"`{k}` {solvers.brief(v)}" for k, v in solvers.SCHEDULERS[sampler][1].items())
            assert f"| {kind} | `{sampler}` | {settings or 'any'} |" in text
        assert samplers or f"| {kind} | `{solvers.NEAREST[kind]}` instead | reported |" in text
    assert all(f"`{key}`" in text for table in solvers.CLASSES.values() for key in table if key not in LESSER)


def test_the_class_of_the_index_counts_where_the_file_names_none():
    index = STABLE | {"scheduler": ["diffusers", "LCMScheduler"]}
    assert scheduler.read({}, index).sampler == "lcm"
    (note,) = scheduler.read({"_class_name": "DDIMScheduler"}, index).notes
    assert "LCMScheduler" in note and "model_index.json" in note


def test_two_ways_to_place_levels_are_refused():
    table = {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}
    with pytest.raises(ValueError, match="use_karras_sigmas and use_beta_sigmas"):
        scheduler.read(table)


def test_steps_are_at_most_those_that_a_model_was_distilled_to():
    read = scheduler.read({"_class_name": "LCMScheduler", "original_inference_steps": 20})
    assert read.most == 20 and len(read.levels("lcm", 20, "leading")) == 21
    with pytest.raises(UsageError, match="--steps 21.*20"):
        read.levels("lcm", 21, "leading")
    assert scheduler.read({"num_train_timesteps": 30}).most == 30


def test_ends_of_sigmas_the_wrong_way_round():
    table = {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "sigma_max": 0.1, "sigma_min": 1.0}
    read = scheduler.read(table)
    with pytest.raises(ModelError, match="sigma_max 0.1 is not above sigma_min 1"):
        read.levels("euler", 10, "karras")


def test_a_model_is_described_by_its_path(tiny_model):
    d = describe(tiny_model)
    assert d == Source(tiny_model).description and d.generate.schedule == d.generate.spacing


# ---- levels without signal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_noise_is_not_asked_for_where_there_is_no_signal(spacing):
    """diffusers divides by 0 there, and draws NaN."""
    table = NOISE | {"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": spacing}
    read = scheduler.read(table, STABLE)
    with pytest.raises(UsageError, match="no signal left.*--prediction v.*--spacing leading"):
        read.levels("ddpm", 20, spacing)
    assert read.levels("ddpm", 20, "leading")[0].alpha > 0
    assert scheduler.read(table | {"prediction_type": "v_prediction"}, STABLE).levels("ddpm", 20, spacing)[0].alpha == 0


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_classes_that_divide_by_alpha_have_a_floor(kind):
    read = scheduler.read(NOISE | {"_class_name": kind, "rescale_betas_zero_snr": True}, STABLE)
    assert read.schedule[-1].alpha == 2**-12 and read.schedule[-2] == zero_terminal_snr(scaled_linear())[-2]
    assert read.levels(read.sampler, 20, "trailing")[0].t == 999


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (("ztsnr",), {}),
        (("zsnr",), {}),
        ((), {"ss_zero_terminal_snr": "True"}),
        ((), {"modelspec.zero_terminal_snr": "true"}),
    ],
)
def test_markers_of_files_whose_levels_end_without_signal(tensors, metadata, altered):
    import torch

    path = altered("open_clip", lambda t: t | {name: torch.tensor([]) for name in (*tensors, "v_pred")}, metadata)
    d = Source(path).description
    assert d.schedule[-1].alpha == 0 and d.prediction == "v" and not d.notes
    assert d.levels(d.generate.sampler, 20, d.generate.spacing)[0] == d.schedule[-1]


@pytest.mark.parametrize("said", ["v", "V_PREDICTION", "v-prediction", "vpred"])
def test_names_of_v_in_metadata(said, altered):
    path = altered("clip", lambda tensors: None, {"modelspec.prediction_type": said})
    assert configs_of(path)["scheduler"]["prediction_type"] == "v_prediction"


def test_v_by_the_metadata_of_a_trainer(altered):
    path = altered("clip", lambda tensors: None, {"ss_v_parameterization": "True"})
    assert configs_of(path)["scheduler"]["prediction_type"] == "v_prediction"


def test_levels_of_edm_are_refused(altered):
    import torch

    path = altered("open_clip", lambda t: t | {"edm_vpred.sigma_max": torch.tensor(120.0)})
    assert "EDM" in refusal(lambda: configs_of(path))


# ---- what a person hears ---------------------------------------------------------------------------------------------------


def test_inspect_shows_and_refuses(tiny_model, tmp_path):
    import shutil

    path = tmp_path / "model"
    shutil.copytree(tiny_model, path)
    for name in ("manifest.json", "tinydiff.toml"):
        (path / name).unlink()
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(NOISE | {"_class_name": "SASolverScheduler"}))
    told = inspect(str(path))
    assert any("drawn by dpmpp_2m_sde instead" in note for note in told["notes"])
    assert told["schedule"] == "scaled_linear"
    file.write_text(json.dumps(NOISE | {"num_train_timesteps": 10**400}))
    with pytest.raises(ModelError, match="num_train_timesteps") as caught:
        inspect(str(path))
    assert len(str(caught.value)) < 300 + len(str(path))
