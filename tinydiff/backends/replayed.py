"""A network's calls on CUDA, recorded as CUDA graphs and replayed: thousands of small kernels, launched one by one, keep the
card waiting.

It knows a torch module and its tensors, no models. `backends/binding.py` does the same for sessions of onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOST = 8  # recordings of a network: each keeps its memory


def captured(call: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], None], Any]:
    """Where a call's answer is, what computes it again from the same addresses, and the memory that others may share."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may do what they like
        answer = call()
    return answer, graph.replay, graph.pool()


class Replayed:
    """A network called with tensors; its answer holds until the next call.

    For each set of shapes and types the first call is plain, since libraries choose and allocate in it. The second is
    recorded, and later ones replay it. A call that cannot be recorded stays plain, and `problem` says why.
    """

    def __init__(self, network: nn.Module):
        self.network, self.pool, self.made, self.problem = network, None, 0, ""
        self.known = dict[object, Callable[..., Tensor]]()

    def __call__(self, **inputs: Tensor) -> Tensor:
        key = tuple((name, x.shape, x.dtype) for name, x in inputs.items())
        call = self.known.get(key)
        self.known.setdefault(key, lambda **inputs: self.record(key, inputs))
        return (call or self.network)(**inputs)

    def record(self, key: object, inputs: dict[str, Tensor]) -> Tensor:
        """The answer, of a recording where one can be made; in either case it is known how to go on."""
        self.known[key] = self.network
        if self.made < MOST:
            fixed = {name: x.clone() for name, x in inputs.items()}
            try:
                answer, replay, self.pool = captured(lambda: self.network(**fixed), self.pool)
            except RuntimeError as error:  # it waits for the card, or there is no memory left
                self.problem = str(error)
                return self.network(**inputs)
            self.made += 1

            def again(**inputs: Tensor) -> Tensor:
                for name, x in inputs.items():
                    fixed[name].copy_(x)
                replay()
                return answer

            self.known[key] = again
        return self.known[key](**inputs)
