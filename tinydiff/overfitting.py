"""Whether a stage learns its images by heart: its held-out loss rises by more than its noise while its training loss falls.

Both are read from what a run has measured, so the loop that warns and the report that notes it say the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tinydiff.charts import HELD, Series

ERROR = f"{HELD}error"  # the standard error of a stage's held-out loss
LOOKS = 3  # after the best one, all of which have to be worse
LEAST = 0.05  # of the loss, a rise that matters
NOISE = 6.0  # deviations from look to look, above which a rise is none of them
FIX = "set train.keep_best=true, train fewer steps, on more images or with data.flip=true, or make the network smaller"


def overfitting(metrics: Mapping[str, Series], loss: str) -> str:
    """A sentence with the figures and what helps, or "". `loss`: the name of the stage's loss."""
    held, trained, error = (metrics.get(name, Series()) for name in (HELD + loss, loss, ERROR))
    if not rises(np.array(held.values), error.values[-1] if error.values else 0.0):
        return ""
    best = int(np.argmin(held.values))
    steps, values = np.stack([trained.steps, trained.values])
    before, since = (values[(steps > low) & (steps <= high)] for low, high in spans(held, best))
    if not falls(before, since):
        return ""
    told = f"the held-out loss was lowest at step {held.steps[best]:.0f}, {held.values[best]:.4g}, and is {held.values[-1]:.4g}"
    return f"overfitting: {told}, while the training loss falls; {FIX}"


def rises(held: np.ndarray, error: float) -> bool:
    """Whether the last `LOOKS` losses (K,) are all above the lowest by more than noise.

    Noise is twice the held-out set's standard `error`, and what the losses themselves show: the deviation that their second
    differences have, if independent, and the largest fall since the lowest.
    """
    best = int(np.argmin(held)) if len(held) else 0
    if len(held) - best <= LOOKS or len(held) < 3:
        return False
    deviation = np.median(np.abs(np.diff(held, 2))) / (0.6745 * 6**0.5)
    fall = max(0.0, *-np.diff(held[best + 1 :]))
    return bool(held[-LOOKS:].min() - held[best] > max(2 * error, LEAST * held[best], NOISE * max(deviation, fall)))


def spans(held: Series, best: int) -> list[tuple[float, float]]:
    """The steps (above, up to) before the best look, as many as there are after the middle of those since, and these."""
    middle = (held.steps[best] + held.steps[-1]) / 2
    return [(held.steps[best] - (held.steps[-1] - middle), held.steps[best]), (middle, held.steps[-1])]


def falls(before: np.ndarray, since: np.ndarray) -> bool:
    """Whether the mean of the later losses is lower, by more than four times its standard error."""
    if min(len(before), len(since)) < 2:
        return False
    error = (before.var(ddof=1) / len(before) + since.var(ddof=1) / len(since)) ** 0.5
    return bool(before.mean() - since.mean() > 4 * error)
