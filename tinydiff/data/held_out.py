"""Which images of a source are kept out of training, to measure on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tinydiff.errors import DataError

if TYPE_CHECKING:
    from tinydiff.config import Data
    from tinydiff.data.dataset import Source

FEWEST, MOST = 8, 512  # fewer say nothing; more only cost time and training images


def held_out(source: Source, data: Data) -> np.ndarray:
    """Images that training does not see, bool (N,): a share `data.held_out`, at most `MOST`, lowest by a hash of their content.

    So copies of an image go together, and where images are added none that was trained on is held out. None are where the
    share is of fewer than `FEWEST`, and where there are others to measure on. Raises DataError where none is left to train on.
    """
    if data.path == "shapes" or data.validation or round(data.held_out * len(source)) < FEWEST:
        return np.zeros(len(source), bool)
    place = np.array([int(source.digest(i)[:13], 16) for i in range(len(source))]) / 16**13  # uniform in [0, 1)
    chosen = place < min([data.held_out, *np.sort(place)[MOST : MOST + 1]])
    if chosen.all():
        problem = f"{data.held_out:g} holds all {len(chosen)} images out, of which copies go together"
        raise DataError(f"data.held_out: {problem}; set less, or 0 for none")
    return chosen
