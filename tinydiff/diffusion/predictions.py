"""What a network predicts (eps, x0, v or flow), and how an estimate of x0 follows from it.

A prediction is a pair of inverse functions, used by both training and sampling. The amplitudes are floats or arrays
that broadcast against x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Prediction(NamedTuple):
    """The training target, `target(x0, eps, alpha, sigma)`, and its inverse, `to_x0(output, x, alpha, sigma)`."""

    target: Callable[[Any, Any, Any, Any], Any]
    to_x0: Callable[[Any, Any, Any, Any], Any]


PREDICTIONS: dict[str, Prediction] = {
    # eps (Ho et al. 2020)
    "epsilon": Prediction(lambda x0, eps, alpha, sigma: eps, lambda out, x, alpha, sigma: (x - out * sigma) / alpha),
    # x0 itself
    "sample": Prediction(lambda x0, eps, alpha, sigma: x0, lambda out, x, alpha, sigma: out),
    # v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D), for any alpha² + sigma²
    "v": Prediction(
        lambda x0, eps, alpha, sigma: eps * alpha - x0 * sigma,
        lambda out, x, alpha, sigma: (x * alpha - out * sigma) / (alpha * alpha + sigma * sigma),
    ),
    # u = eps - x0 (Liu et al. 2022), for any alpha + sigma
    "flow": Prediction(
        lambda x0, eps, alpha, sigma: eps - x0,
        lambda out, x, alpha, sigma: (x - out * sigma) / (alpha + sigma),
    ),
}
