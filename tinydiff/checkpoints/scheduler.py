"""diffusers' `scheduler_config.json`: noise levels, prediction and solver, read from any folder and written for ours.

Classes of diffusers, their defaults and what is not followed of them are in `solvers`. It knows no network, and samplers
by name only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, inf, log
from typing import Any

from tinydiff import config
from tinydiff.checkpoints import solvers
from tinydiff.checkpoints.solvers import RESPACED, SCHEDULERS, brief
from tinydiff.diffusion import schedules
from tinydiff.diffusion.samplers import steep
from tinydiff.diffusion.schedules import (
    CLEAN,
    INDICES,
    RHOS,
    Level,
    Levels,
    distilled,
    log_snr,
    sampling_levels,
    training_levels,
)
from tinydiff.errors import ModelError, UsageError
from tinydiff.schema import Key

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v", "flow_prediction": "flow"}
MOST = 100_000  # training levels
SHIFT = Key(float, 0.01, 100)
LEAST = 2.0**-60  # of alpha, but for a last level without signal: float32 loses what is divided by less
FLOOR = 2.0**-12  # the alpha of a noisiest level without signal, in the classes that divide by it
FLOORED = ("EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep")
PATCHES: dict[str, dict[str, Any]] = {  # what diffusers' pipelines change, by the beginning of their names
    "StableDiffusionXL": {},
    "StableDiffusionInpaint": {"steps_offset": 1, "skip_prk_steps": True},
    "StableDiffusion": {"steps_offset": 1, "clip_sample": False},
}
UNSET = {"steps_offset": 0, "set_alpha_to_one": True, "rescale_betas_zero_snr": False}  # of classes without the key
TO_ALPHA_BAR = ("ddim", "plms")  # samplers whose last step depends on `set_alpha_to_one`
# Samplers whose classes compute one timestep more than there are steps, and drop the last.
BEYOND = ("dpm_solver_1", "dpm_solver_2", "dpm_solver_3", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "deis", "unipc")
BETWEEN = ("euler", "euler_ancestral", "heun", "dpm2", "dpmpp_sde", "lms")  # their "linspace" has fractional timesteps


@dataclass(frozen=True)
class Grid:
    """How a class of diffusers places the levels of its file, where that is not how we place them."""

    original: int = 0  # of LCM and TCD, whose steps are some of so many; it has no spacing
    base: str = "linspace"  # the spacing whose ends a spacing by rho has
    ends: tuple[float | None, float | None] = (None, None)  # or the largest and the smallest rho
    time: Callable[[float], float] = float  # what the network is told of a level between two
    last: Level = CLEAN
    repeats: bool = False  # of a spacing by rho the last level is also where the sampler ends


@dataclass(frozen=True)
class Scheduler:
    """The contents of a scheduler_config.json in our terms."""

    schedule: Levels
    prediction: str
    offset: int  # of the "leading" spacing
    final: Level  # the last level of DDIM and PLMS
    sampler: str
    spacing: str
    form: str = "custom"  # of the training levels: "flow", "custom", or what `BETA_SCHEDULES` calls them
    grid: Grid | None = None  # of a file that is not ours, with its own sampler and spacing
    notes: tuple[str, ...] = ()  # settings of the file that are not followed

    @property
    def most(self) -> int:
        """How many steps there can be."""
        return (self.grid and self.grid.original) or len(self.schedule)

    def levels(self, sampler: str, steps: int, spacing: str) -> Levels:
        """The levels that a sampler's class in diffusers visits, noisiest first, the final one included.

        Raises UsageError for steps or levels of which the network says nothing, ModelError where they do not fall.
        """
        end, whole = self._end(sampler), sampler not in BETWEEN
        levels = sampling_levels(self.schedule, steps, spacing, self.offset, end, whole, int(sampler in BEYOND))
        if self.grid and (sampler, spacing) == (self.sampler, self.spacing):
            levels = self._placed(self.grid, levels, steps)
        if levels[0].alpha == 0 and self.prediction == "epsilon":
            problem = "the noisiest level has no signal left, where a network that predicts the noise says nothing"
            fix = "give --prediction v if it predicts v, or --spacing leading"
            raise UsageError(f"--spacing {spacing}: {problem}; {fix}")
        return levels

    def _end(self, sampler: str) -> Level:
        """The level on which a sampler ends, where a file's grid does not say."""
        return self.final if sampler in TO_ALPHA_BAR else self.schedule[0] if sampler == "tcd" else CLEAN

    def _placed(self, grid: Grid, levels: Levels, steps: int) -> Levels:
        """The levels that a sampler visits, as its class places them."""
        at, kept = self.schedule.at, levels[:-1]
        if grid.original:
            if steps > grid.original:
                raise UsageError(
                    f"--steps {steps}: this model was distilled to {grid.original}; give at most that many"
                )
            kept = [self.schedule[i] for i in distilled(len(self.schedule), steps, grid.original)]
        elif self.spacing in RHOS:
            base = self.schedule[::-1]
            if self.sampler in BETWEEN:
                base = sampling_levels(self.schedule, steps, grid.base, self.offset, whole=False)[:-1]
            high, low = (rho or exp(-log_snr(level)) for rho, level in zip(grid.ends, (base[0], base[-1]), strict=True))
            if high <= low:
                raise ModelError(
                    f"scheduler_config.json: sigma_max {high:g} is not above sigma_min {low:g}; leave both out"
                )
            placed = (at(-log(rho)) for rho in RHOS[self.spacing](high, low, steps))
            kept = [level._replace(t=grid.time(level.t)) for level in placed]
            return Levels([*kept, kept[-1] if grid.repeats else grid.last], at)
        return Levels([*kept, levels[-1] if self.sampler in (*TO_ALPHA_BAR, "tcd") else grid.last], at)


def read(given: dict[str, Any], index: Mapping[str, Any] | None = None, ours: bool = False) -> Scheduler:
    """A `Scheduler` from a scheduler_config.json and the model_index.json beside it, which names the class.

    `ours`: the file is one of `write`, and how to sample is said elsewhere. Otherwise the class draws as diffusers'
    pipeline lets it. Raises ValueError for what cannot be followed.
    """
    index = index or {}
    listed = index.get("scheduler")
    named = listed[1] if isinstance(listed, list) and len(listed) == 2 else None
    kind = str(given.get("_class_name") or named or "DPMSolverMultistepScheduler")
    table = solvers.completed(kind, given)
    pipeline = str(index.get("_class_name"))
    patches = next((patches for prefix, patches in PATCHES.items() if pipeline.startswith(prefix)), {})
    table = UNSET | table | {key: value for key, value in patches.items() if key in table}
    schedule, sampler = _levels(kind, table, floored=not ours), solvers.sampler_of(kind, table)
    spacing, lu = _spacing(given if ours else table)
    scheduler = Scheduler(
        schedule=schedule,
        prediction=_prediction(kind, table),
        offset=Key(int, 0, len(schedule)).of(table, "steps_offset"),
        final=CLEAN if Key(bool).of(table, "set_alpha_to_one") else schedule[0],
        sampler=sampler,
        spacing=spacing,
        form=_form(kind, table),
    )
    if ours:
        return scheduler
    grid = _grid(kind, table, given, scheduler, lu)
    notes = [*solvers.unfollowed(kind, sampler, table), *_apart(scheduler, table)]
    if named not in (None, kind):
        notes.append(f"{kind}: of scheduler_config.json; model_index.json names {brief(named)}, which is not followed")
    return replace(scheduler, grid=grid, notes=tuple(notes))


def _spacing(table: Mapping[str, Any]) -> tuple[str, bool]:
    """Which levels are visited, and whether by `use_lu_lambdas`."""
    respaced = [key for key in (*RESPACED, "use_flow_sigmas") if _true(table, key)]
    if len(respaced) > 1:
        raise ValueError(f"{' and '.join(respaced)} are true; keep one of them")
    lu = _true(table, "use_lu_lambdas") and "use_karras_sigmas" not in respaced
    if lu or (respaced and respaced[0] in RESPACED):
        return "exponential" if lu else RESPACED[respaced[0]], lu
    default = "leading" if "original_inference_steps" in table else "linspace"  # LCM's says nothing, but names ours
    return Key(str, choices=INDICES).of({"timestep_spacing": default} | dict(table), "timestep_spacing"), False


def _true(table: Mapping[str, Any], key: str) -> bool:
    return table.get(key) is not None and Key(bool).of(table, key)


def _prediction(kind: str, table: Mapping[str, Any]) -> str:
    if kind.startswith("FlowMatch"):
        return "flow"
    name = Key(str, choices=PREDICTION_TYPES).of(table, "prediction_type")
    if table.get("timestep_type") == "continuous" and name == "v_prediction":
        raise ValueError('timestep_type is "continuous", which is not supported; give a model of discrete timesteps')
    return PREDICTION_TYPES[name]


def _grid(kind: str, table: Mapping[str, Any], given: Mapping[str, Any], scheduler: Scheduler, lu: bool) -> Grid:
    """How the class of a file places its levels."""
    cleanest, spacing = scheduler.schedule[0], scheduler.spacing
    by_rho, cosine = spacing in RHOS, table.get("beta_schedule") == "squaredcos_cap_v2" and not table["trained_betas"]
    if by_rho and scheduler.schedule[-1].alpha == 0 and not given.get("sigma_max"):
        raise ValueError(
            "trained_betas end without signal, where no spacing by sigmas begins; set use_*_sigmas to false"
        )
    multistep = scheduler.sampler in BEYOND
    last, kept = CLEAN, table.get("final_sigmas_type", "sigma_min" if kind.startswith("DEIS") else "zero")
    if Key(str, choices=("zero", "sigma_min")).of({"final_sigmas_type": kept}, "final_sigmas_type") == "sigma_min":
        last = cleanest if multistep else Level(1.0, cleanest.sigma / cleanest.alpha, 0.0)
    rounded = (spacing == "karras" or lu) and not (cosine and kind.startswith("DPMSolverMultistep"))
    ends = [
        Key(float, 1e-6, 1e6).of(given, key) if by_rho and given.get(key) is not None else None
        for key in ("sigma_max", "sigma_min")
    ]
    return Grid(
        original=Key(int, 1, len(scheduler.schedule)).of(table, "original_inference_steps")
        if scheduler.sampler in ("lcm", "tcd")
        else 0,
        base=table.get("timestep_spacing", "linspace"),
        ends=(ends[0], ends[1]),
        time=(round if rounded else truncated) if multistep else float,
        last=last,
        repeats=by_rho and last != CLEAN and kind.startswith(("DEIS", "UniPC")),
    )


def truncated(t: float) -> float:
    """The whole part of a time, with room for float32, in which 999 may be a little less."""
    return float(max(0, int(t - 1e-3)))


def _apart(scheduler: Scheduler, table: Mapping[str, Any]) -> Iterator[str]:
    """How drawing these levels with our sampler differs from diffusers, a line each."""
    sampler, levels = scheduler.sampler, scheduler.schedule
    noisiest, eighth = levels[-1], levels[-1 - len(levels) // 8]  # one of eight steps below
    if table.get("use_flow_sigmas"):
        yield f"use_flow_sigmas: drawn by {sampler} on evenly spaced levels, one training level from those of diffusers"
    if table.get("lambda_min_clipped", -inf) > log_snr(noisiest):
        yield f"lambda_min_clipped {brief(table['lambda_min_clipped'])}: not followed, the noisiest levels are visited too"
    if sampler in TO_ALPHA_BAR and scheduler.spacing == "linspace":
        yield "timestep_spacing linspace: each step ends at the next level, in diffusers a whole number of levels below"
    if sampler == "plms" and scheduler.prediction == "v":
        yield "PNDMScheduler: averages the noise, in diffusers v; --sampler ddim is the same in both"
    if sampler == "dpmpp_3m_sde":
        yield "solver_order 3 with noise: the sign of one term is that of k-diffusion, in diffusers the other"
    if sampler in solvers.STEEP and (steep(noisiest, eighth) or scheduler.spacing == "beta"):
        yield f"{sampler}: steps in which the noise falls a hundredfold are of first order, in diffusers of a higher one"


def _form(kind: str, table: Mapping[str, Any]) -> str:
    if kind.startswith("FlowMatch") or table.get("use_flow_sigmas"):
        return "flow"
    return "custom" if table["trained_betas"] is not None else BETA_SCHEDULES[table["beta_schedule"]]


def _levels(kind: str, table: Mapping[str, Any], floored: bool) -> Levels:
    count = Key(int, 2, MOST).of(table, "num_train_timesteps")
    if kind.startswith("FlowMatch"):
        return schedules.flow(count, SHIFT.of(table, "shift"))
    if table.get("use_flow_sigmas"):
        return schedules.flow(count, SHIFT.of(table, "flow_shift"))
    levels = (
        schedules.from_betas(_betas(table["trained_betas"], count))
        if table["trained_betas"] is not None
        else _named(table, count)
    )
    if Key(bool).of(table, "rescale_betas_zero_snr"):
        levels = schedules.zero_terminal_snr(levels)
        if floored and kind.startswith(FLOORED):
            end = Level(FLOOR, (1 - FLOOR**2) ** 0.5, levels[-1].t)
            levels = schedules.schedule([*levels[:-1], end], schedules.preserving)
    vanished = levels[-2].alpha < LEAST or 0 < levels[-1].alpha < LEAST
    if levels[0].sigma == 0 or vanished or any(a.alpha <= b.alpha for a, b in pairwise(levels)):
        raise ValueError("noise levels that do not rise, or too far; check num_train_timesteps and betas")
    return levels


def _named(table: Mapping[str, Any], count: int) -> Levels:
    name = BETA_SCHEDULES[Key(str, choices=BETA_SCHEDULES).of(table, "beta_schedule")]
    if name == "cosine":
        return schedules.cosine(count)
    start, end = (Key(float, 1e-12, 0.9999).of(table, key) for key in ("beta_start", "beta_end"))
    return {"linear": schedules.linear, "scaled_linear": schedules.scaled_linear}[name](count, start, end)


def _betas(betas: Any, count: int) -> list[float]:
    """`trained_betas`: between 0 and 1, where only the last may be 1."""
    if not isinstance(betas, list) or len(betas) != count:
        had = f"{len(betas)} numbers" if isinstance(betas, list) else brief(betas)
        raise ValueError(f"trained_betas is {had}; give a list of num_train_timesteps, {count}")
    for i, beta in enumerate(betas):
        place = f"trained_betas[{i}]"
        Key(float, 1e-12, 1 if i == count - 1 else 0.9999999).of({place: beta}, place)
    return betas


def write(cfg: config.Config) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers samples this model as tinydiff does by default."""
    d, g = cfg.diffusion, cfg.generate
    kind, settings = SCHEDULERS["dpmpp_2m" if d.schedule == "flow" else g.sampler]
    start, end = {"scaled_linear": (0.00085, 0.012)}.get(d.schedule, (1e-4, 0.02))
    names, predictions = ({ours: name for name, ours in table.items()} for table in (BETA_SCHEDULES, PREDICTION_TYPES))
    spacing = g.spacing if g.spacing in ("leading", "trailing", "linspace") else "linspace"
    scheduler = {"_class_name": kind, "num_train_timesteps": d.num_train_timesteps}
    scheduler |= {"beta_schedule": names.get(d.schedule, "linear"), "beta_start": start, "beta_end": end}
    scheduler |= {"prediction_type": predictions[d.prediction], "timestep_spacing": spacing, "steps_offset": 1}
    scheduler |= {"clip_sample": False, "set_alpha_to_one": True, "final_sigmas_type": "zero"} | settings
    if g.spacing in RHOS and d.schedule != "flow":  # without sigma_max diffusers starts far beyond our level
        named = "exponential" if g.spacing == "log_snr" else g.spacing
        scheduler |= {key: True for key, name in RESPACED.items() if name == named}
        levels = training_levels(d.schedule, d.num_train_timesteps, cfg.shift, d.zero_terminal_snr)
        scheduler |= dict(zip(("sigma_max", "sigma_min"), schedules.ends(levels), strict=True))
    if kind in ("LCMScheduler", "TCDScheduler") and g.spacing == "trailing":  # the same steps
        scheduler["original_inference_steps"] = d.num_train_timesteps
    if d.zero_terminal_snr:
        scheduler["rescale_betas_zero_snr"] = True
    if d.schedule == "flow":
        scheduler |= {"use_flow_sigmas": True, "flow_shift": cfg.shift}
    if d.schedule == "edm":
        bars = [1.0, *(level.alpha**2 for level in training_levels("edm", d.num_train_timesteps))]
        scheduler["trained_betas"] = [1 - after / before for before, after in pairwise(bars)]
    return scheduler
