"""diffusers' schedulers stepped by hand, with noise that is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch


class Brownian:
    """Stands for diffusers' Brownian tree: increments over [here, there] put together from our two draws a step."""

    def __init__(self, draws):
        self.draws, self.step, self.start = draws, -1, None

    def __call__(self, here, there):
        here, there = float(here), float(there)
        if here != self.start:
            self.start, self.step, self.middle = here, self.step + 1, there
            return torch.tensor(self.draws[2 * self.step])
        a, b = here - self.middle, self.middle - there
        early, late = self.draws[2 * self.step], self.draws[2 * self.step + 1]
        return torch.tensor((early * math.sqrt(a) + late * math.sqrt(b)) / math.sqrt(a + b))


def stepped(
    scheduler: Any,
    network: Callable[[np.ndarray, float], np.ndarray],
    x: np.ndarray,
    draws: Any,
    module: str,
    monkeypatch: pytest.MonkeyPatch,
) -> np.ndarray:
    """x after a scheduler's own loop; the noise that its `module` draws is `draws`, one after the other."""
    queue, x = iter(draws), torch.tensor(x)
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.tensor(next(queue)), raising=False)
    for t in scheduler.timesteps:
        read = scheduler.scale_model_input(x, t).numpy()
        x = scheduler.step(torch.tensor(network(read, float(t))), t, x).prev_sample
    return x.numpy()
