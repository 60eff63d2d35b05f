"""The time that a run is given, laid out as updates of its stages by how long they take, measured while they are made.

A stage's legs say from which update on it has how many steps. `plan.json` of the run keeps them, so that a run that goes on
follows them to the bit; time in which no process works on the run does not count. It knows no network and no loss.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tinydiff import config, files
from tinydiff.errors import UsageError
from tinydiff.files import read_json, shown
from tinydiff.progress import duration
from tinydiff.stages import STAGES, Stage, trained
from tinydiff.training.state import checkpoints

if TYPE_CHECKING:
    from tinydiff.training.run import Run
    from tinydiff.training.state import Training
    from tinydiff.training.task import Task

PLAN = "plan.json"
FIRST = 4  # updates after which the first leg is laid; then their number doubles
PARTS = 16  # of a stage: after each the next leg is laid, but for the last
LOOKS = 2, 8  # fewest and most pictures of a stage
LOOKING = 0.1  # share of the time that they may take
LOOK = 20  # updates that a look takes, as long as none was made
AVERAGED = 10  # the average of weights reaches back this part of a stage, and so long does it warm up


class Leg(NamedTuple):
    """From update `first` on a stage has so many steps; its schedule begins at `begin`, above 0 after a warm restart."""

    first: int
    steps: int
    warmup: int
    ema: float
    save_every: int
    sample_every: int
    begin: int = 0

    def of(self, stage: Any) -> Any:
        """The settings of a stage while it lasts."""
        return replace(stage, **{k: v for k, v in self._asdict().items() if k not in ("first", "begin")})


def laid(n: int, left: float, update: float, look: float, usual: Leg, begin: int = 0, every: int = 0) -> Leg:
    """The leg from `n` on that takes the `left` seconds, at so many an update and a look, one every so many updates.

    With `every` 0 looks are laid too. Warm-up and averaging are shorter than the `usual` ones in a short stage.
    """
    update = max(update, 1e-9)
    looks = min(LOOKS[1], max(LOOKS[0], int(LOOKING * left / max(look, 1e-9))))
    every = every or max(1, round((n - begin + left / update) / looks))

    def seconds(steps: int) -> float:
        return (steps - n) * update + (-(-steps // every) - n // every) * look

    steps = n + max(1, bisect_right(range(n + 1, n + 2 + max(0, int(left / update))), left, key=seconds))
    length = steps - begin
    warmup, ema = min(usual.warmup, length // AVERAGED), min(usual.ema, max(0.0, 1 - AVERAGED / length))
    return Leg(n, steps, warmup, ema, max(1, length // LOOKS[1]), min(every, length), begin)


class Pace:
    """One stage's legs, and how long its updates and looks take. `clock` gives seconds used of the run, which `end` it."""

    def __init__(self, legs: list[Leg], start: int, end: float, clock: Callable[[], float]):
        self.legs, self.start, self.end, self.clock = legs, start, end, clock
        self.due, self.then = start + FIRST, None
        self.count, self.seconds, self.update, self.looks = 0, 0.0, 0.0, list[float]()
        self.every = 0

    def at(self, n: int) -> Leg:
        """The leg that update `n` is of."""
        return next(leg for leg in reversed(self.legs) if leg.first <= n or leg is self.legs[0])

    def after(self, n: int, looked: bool) -> Leg | None:
        """Told of every end of an update, `n` of the stage being done: the leg to lay now, if it is time for one."""
        now = self.clock()
        took, self.then = now - (now if self.then is None else self.then), now  # the first update compiles and warms up
        if looked:
            self.looks.append(max(0.0, took - (self.update or took)))
            self.every *= len(self.looks) > 1  # how long a look takes is only known now
        elif took:
            self.count, self.seconds = self.count + 1, self.seconds + took
        leg = self.legs[-1]
        part = max(1, (leg.steps - leg.begin) // PARTS)
        if n < self.due or leg.first > n or n >= leg.steps or (len(self.legs) > 1 and leg.steps - n < part):
            return None
        self.due = n + min(max(1, n - self.start), part)
        if self.count:
            self.update, self.count, self.seconds = self.seconds / self.count, 0, 0.0
        left = self.end - now
        guess = min(LOOK * self.update, LOOKING * max(0.0, left) / LOOKS[0])
        look = sum(self.looks) / len(self.looks) if self.looks else guess
        return laid(n, left, self.update, look, self.legs[0], leg.begin, self.every)

    def lay(self, run: Run, task: Task, leg: Leg) -> None:
        """Go on by this leg, which rank 0 knows, and keep it."""
        leg = Leg(*json.loads(run.world.share(json.dumps(leg))))
        self.legs.append(leg)
        if self.looks:
            self.every = leg.sample_every
        if run.world.rank == 0:
            run.budget.write()
        run.claim.laid(changed(run.cfg, task.name, leg))

    def follow(self, run: Run, task: Task, training: Training, n: int) -> None:
        """Let update `n` be of its leg."""
        leg = self.at(n)
        if leg.of(task.settings) != task.settings or training.learners[0].begin != leg.begin:
            task.settings = leg.of(task.settings)
            run.cfg = task.cfg = changed(run.cfg, task.name, leg)
            for learner in training.learners:
                learner.follow(leg)


class Budget:
    """The seconds of a run, `limit`, which are counted from `since`; without a limit stages have the steps that they say.

    `more`: a run that has ended goes on for so long, its last stage with a warm restart of which `said` tells.
    """

    def __init__(self, run_dir: Path, cfg: config.Config, more: bool = False, begun: float | None = None):
        self.path, self.limit, self.said = run_dir / PLAN, cfg.train.time, ""
        self.begun = time.monotonic() if begun is None else begun
        told: dict[str, Any] = {}
        if self.limit and self.path.exists():
            told = read_json(self.path)
        try:
            self.before, self.since = float(told.get("used", 0)), float(told.get("since", 0))
            self.legs = {name: [Leg(*row) for row in told.get("legs", {}).get(name, [])] for name in STAGES}
        except (TypeError, ValueError, AttributeError):
            raise UsageError(f"{shown(self.path)}: damaged; remove it, and give --time anew") from None
        rows = trained(cfg.train) if self.limit else {}
        self.cfg, shares, reached = cfg, sum(row.share for row in rows.values()), 0.0
        self.ends = dict[str, float]()
        for name, row in rows.items():
            reached += row.share
            self.ends[name] = self.limit * reached / shares
            for leg in self.legs[name][-1:]:
                self.cfg = changed(self.cfg, name, leg)
        if more and rows:
            self.restart(run_dir, [*rows][-1])

    def restart(self, run_dir: Path, name: str) -> None:
        """Let the last stage go on, where it has ended."""
        made, settings = checkpoints(run_dir / "checkpoints", name), self.cfg.train.stage(name)
        done = int(made[-1].name.rpartition("-")[2]) if made else 0
        if not done or done < settings.steps:
            return
        usual = (self.legs[name] or [first(settings)])[0]
        self.legs[name] = [*(self.legs[name] or [usual]), usual._replace(first=done, steps=2 * done, begin=done)]
        self.since = self.before
        self.ends = {name: self.limit}
        self.cfg = changed(self.cfg, name, self.legs[name][-1])
        self.said = f"{name}: ended at step {done}; it goes on for {duration(self.limit)} with a warm restart: "
        self.said += "its learning rate rises again, and falls to the new end"

    def used(self) -> float:
        """Seconds that processes have worked on the run."""
        return self.before + time.monotonic() - self.begun

    @property
    def left(self) -> float:
        """Seconds until the run ends."""
        return max(0.0, self.since + self.limit - self.used())

    def pace(self, name: str, settings: Stage, start: int) -> Pace | None:
        """A stage's, which goes on at update `start`; None without a limit."""
        if name not in self.ends:
            return None
        self.legs[name] = self.legs[name] or [first(settings)]
        return Pace(self.legs[name], start, self.since + self.ends[name], self.used)

    def write(self) -> None:
        """Keep the legs and the time used so far."""
        told = {"since": self.since, "used": round(self.used(), 3), "legs": {k: v for k, v in self.legs.items() if v}}
        if self.limit:
            files.write_file(self.path, json.dumps(told).encode(), force=True)


def first(settings: Stage) -> Leg:
    """As a stage is configured."""
    s = settings
    return Leg(0, s.steps, s.warmup, s.ema, s.save_every, s.sample_every)


def changed(cfg: config.Config, name: str, leg: Leg) -> config.Config:
    """The configuration with a stage as a leg has it."""
    return replace(cfg, train=replace(cfg.train, **{name: leg.of(cfg.train.stage(name))}))
