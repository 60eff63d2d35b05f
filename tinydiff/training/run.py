"""One training run: its configuration, its directory, what it computes with, its data and its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tinydiff.errors import UsageError
from tinydiff.progress import Progress
from tinydiff.stages import caption
from tinydiff.training.budget import Budget
from tinydiff.training.claim import Claim
from tinydiff.training.runtime import Interrupted, Runtime

if TYPE_CHECKING:
    from tinydiff.adapters.origin import Origin
    from tinydiff.checkpoints.folder import Model
    from tinydiff.data.dataset import Images
    from tinydiff.measure.features import Features
    from tinydiff.training.validation import Held


class Run:
    """What every stage of a run is given.

    `accept` goes on with another configuration or other data; `strict` refuses to pass over a damaged checkpoint; the
    `budget` is of its time; `reasons` say of keys why they have their values.
    """

    data: Images
    held: Held | None = None
    model: Model
    growths = 0  # how many of `train.grow` the denoiser has had
    until: int | None = None  # the step at which it has the next; None where it has none
    origin: Origin  # of the model that the run begins with

    def __init__(
        self,
        runtime: Runtime,
        directory: Path,
        accept: bool = False,
        strict: bool = False,
        budget: Budget | None = None,
        reasons: Mapping[str, str] = MappingProxyType({}),
    ):
        self.runtime, self.dir, self.strict = runtime, directory, strict
        self.claim, self.budget = (
            Claim(runtime, directory, accept, reasons),
            budget or Budget(directory, runtime.config),
        )
        self.cfg, self.world, self.checkpoints = runtime.config, runtime.world, directory / "checkpoints"

    @property
    def caption(self) -> str:
        """What all images are said to show; "" where their own captions are read."""
        return caption(self.cfg.train)

    @cached_property
    def features(self) -> Features | None:
        """The feature network, on the device, where one is installed."""
        from tinydiff.measure.features import open_features

        try:
            features = open_features()
        except UsageError as error:
            self.runtime.say(f"note: {error}; until then no perceptual and no Fréchet distance is measured")
            return None
        self.runtime.placed(features)
        return features

    def progress(self, label: str) -> Callable[[int, int], None]:
        """A bar (done, of) for what is prepared, and the place where a signal stops it."""
        bar = Progress(label, 0)

        def progress(done: int, total: int) -> None:
            bar.total = total
            if self.world.rank == 0:
                bar.update(done)
            if self.runtime.caught:
                raise Interrupted(self.runtime.caught, f"stopped while {label}; run the same command to go on")

        return progress
