"""The time of a run: legs laid by a clock that the tests turn, and runs that are stopped, go on, and go on from their end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import config
from tinydiff.errors import UsageError
from tinydiff.training import budget, loop
from tinydiff.training.budget import FIRST, PARTS, Leg, Pace, laid
from tinydiff.training.optim import learning_rate

USUAL = Leg(0, 2000, 200, 0.998, 500, 500)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trained(
    end: float, update: Callable[[float], float], look: float, stops: tuple[int, ...] = ()
) -> tuple[float, list[Leg]]:
    """The seconds that a stage takes whose updates take what `update` says of the time, killed at some updates."""
    clock, legs, n = Clock(), [USUAL], 0
    while True:
        pace = Pace(legs, n, end, clock)
        clock.now += 5 * update(clock.now)  # a process warms up
        while True:
            leg = pace.at(n)
            clock.now += update(clock.now)
            looked = n + 1 == leg.steps or (n + 1) % leg.sample_every == 0
            clock.now += look * looked
            n += 1
            if laid_now := pace.after(n, looked):
                pace.legs.append(laid_now)
                pace.every = laid_now.sample_every if pace.looks else pace.every
            if n == leg.steps and pace.at(n).steps == n:
                return clock.now, legs
            if n in stops:
                stops = tuple(stop for stop in stops if stop != n)
                break


@pytest.mark.parametrize("look", [0, 0.01, 0.05])
@pytest.mark.parametrize("updates", [60, 200, 3000])
def test_a_stage_ends_in_time_at_any_steady_speed(updates, look):
    """`look`: a picture's share of the time."""
    end = 900.0
    took, legs = trained(end, lambda now: end / updates, look * end)
    assert abs(took - end) <= 0.1 * end, legs
    assert legs[-1].warmup <= legs[-1].steps / 10


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize("when", [0.02, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("updates", [150, 1500])
def test_a_stage_ends_near_its_time_though_the_speed_changes(updates, when, factor):
    end = 600.0
    took, legs = trained(end, lambda now: end / updates * (1 if now < when * end else factor), 0.01 * end)
    assert abs(took - end) <= 0.2 * end, legs


@pytest.mark.parametrize("stops", [(5,), (90, 91, 92), (30, 300, 590), (200,)])
@pytest.mark.parametrize("update", [0.4, 1.0])
def test_a_stage_that_is_stopped_ends_in_its_time(update, stops):
    took, legs = trained(600.0, lambda now: update, 3.0, stops)
    assert abs(took - 600) <= 60
    assert [leg.first for leg in legs] == sorted({leg.first for leg in legs})


def test_what_is_slower_than_all_of_the_time_is_learnt_once():
    assert laid(4, -50.0, 10.0, 3.0, USUAL).steps == laid(4, 9.0, 10.0, 3.0, USUAL).steps == 5


@given(st.integers(0, 300), st.floats(0, 500), st.floats(0.1, 5), st.floats(0, 30), st.integers(1, 100))
def test_a_leg_has_the_most_updates_that_fit(n, left, update, look, every):
    leg = laid(n, left, update, look, USUAL, every=every)
    seconds = [(s - n) * update + (-(-s // every) - n // every) * look for s in (leg.steps, leg.steps + 1)]
    assert seconds[1] > left or seconds[1] == pytest.approx(left)
    assert seconds[0] <= left + 1e-9 or leg.steps == n + 1


def test_a_leg_counts_for_the_updates_after_it():
    legs = [USUAL, Leg(4, 100, 10, 0.9, 12, 25), Leg(50, 80, 8, 0.9, 12, 25)]
    pace = Pace(legs, 4, 1e9, Clock())
    assert [pace.at(n).steps for n in (0, 3, 4, 49, 50, 79)] == [2000, 2000, 100, 100, 80, 80]
    assert pace.after(30, False) is None  # one that was laid before a kill is followed, not laid anew
    assert FIRST < PARTS


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(run_config, monkeypatch):
    """A run of both stages in 60 seconds by a clock of which an update takes 1.5; it may be stopped at one."""
    clock, stop = Clock(), SimpleNamespace(at=None)
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=clock))
    step = loop.step

    def slow(run, task, training, n, *more):
        clock.now += 1.5
        if stop.at == (task.name, n):
            run.runtime.caught, stop.at = 15, None
        return step(run, task, training, n, *more)

    monkeypatch.setattr(loop, "step", slow)
    train = replace(run_config.train, time=60, validation_samples=0)
    return replace(run_config, train=train), clock, stop


def plan(run_dir) -> dict:
    return json.loads((run_dir / "plan.json").read_text())


def test_a_run_ends_in_its_time_stopped_or_not_and_goes_on_from_its_end(timed, tmp_path, capsys):
    cfg, clock, stop = timed
    loop.run(cfg, tmp_path / "run")
    assert 54 <= clock.now <= 62
    stored, legs = config.load(tmp_path / "run" / "tinydiff.toml", stored=True), plan(tmp_path / "run")["legs"]
    for name, (*_, last) in legs.items():
        assert stored.train.stage(name).steps == last[1]
        assert sorted((tmp_path / "run" / "checkpoints").glob(f"{name}-*"))[-1].name == f"{name}-{last[1]:08d}"
    assert config.load(tmp_path / "run" / "model" / "tinydiff.toml", stored=True) == stored
    said = capsys.readouterr().err
    assert "of the run" in said and "warm restart" not in said

    clock.now, stop.at = 1000.0, ("denoiser", 10)
    with pytest.raises(loop.Interrupted):
        loop.run(cfg, tmp_path / "again")
    begun = clock.now - 1000
    clock.now += 5000  # nobody works on it
    loop.run(cfg, tmp_path / "again")
    assert 54 <= clock.now - 6000 <= 63 and begun > 20

    before, ended = clock.now, plan(tmp_path / "again")
    loop.run(cfg, tmp_path / "again")  # has ended, and nothing more is asked for
    assert clock.now == before and plan(tmp_path / "again") == ended
    loop.run(cfg, tmp_path / "again", more=True)
    assert 54 <= clock.now - before <= 63
    said = capsys.readouterr().err
    assert "warm restart" in said
    done, now = ended["legs"]["denoiser"][-1][1], plan(tmp_path / "again")["legs"]["denoiser"][-1]
    assert now[-1] == done and now[1] > done + 25
    rows = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["lr"] for row in rows if row["stage"] == "denoiser" and "lr" in row}
    peak = cfg.train.stage("denoiser").lr
    assert rates[done - done % 10] < 0.4 * peak < 0.8 * peak < max(v for k, v in rates.items() if k > done)
    settings = replace(cfg.train.stage("denoiser"), steps=now[1] - done, warmup=now[2])
    last = max(rates)
    assert rates[last] == pytest.approx(learning_rate(last - 1 - done, settings), rel=1e-6)


def test_equal_plans_give_equal_bits(timed, tmp_path, monkeypatch):
    """A run that is stopped follows the legs that were laid, and one that gets the same plan makes the same updates."""
    cfg, _, stop = timed
    stop.at = ("denoiser", 15)
    with pytest.raises(loop.Interrupted):
        loop.run(cfg, tmp_path / "one")
    loop.run(cfg, tmp_path / "one")
    whole = plan(tmp_path / "one") | {"used": 0}
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "plan.json").write_text(json.dumps(whole))
    monkeypatch.setattr(budget.Pace, "after", lambda *told: None)
    loop.run(cfg, tmp_path / "two")
    weights = [
        (tmp_path / name / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("one", "two")
    ]
    assert plan(tmp_path / "two")["legs"] == whole["legs"] and weights[0] == weights[1]


def test_a_damaged_plan_is_named(run_config, tmp_path):
    (tmp_path / "plan.json").write_text('{"legs": {"denoiser": [[1, 2]]}}')
    with pytest.raises(UsageError, match=r"plan.json: damaged"):
        budget.Budget(tmp_path, replace(run_config, train=replace(run_config.train, time=60)))
    assert budget.Budget(tmp_path, run_config).left == 0  # which has no time laid out
