"""A session's inputs and outputs on a device, at addresses that stay, so that a call copies only what changed.

On CUDA such calls can be recorded as a CUDA graph and replayed. It knows sessions and arrays, no models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

Shapes = dict[str, tuple[tuple[int, ...], Any]]  # and types
MOST = 8  # shapes of which buffers are kept
PLAIN = -1  # the number that stands for no CUDA graph


class Bound:
    """The buffers of one session for inputs and outputs of certain shapes.

    `kept` names inputs whose arrays nobody changes: while the same array is given it is not copied again. With a number of its
    own for `graph` the first call runs plainly, the second is recorded as a CUDA graph, and later ones replay it; a session
    that cannot be recorded runs plainly for ever.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        device: str,
        feed: Mapping[str, np.ndarray],
        results: Shapes,
        kept: Collection[str] = (),
        graph: int = PLAIN,
    ):
        self.session, self.binding, self.kept, self.graph = session, session.io_binding(), kept, graph
        empty = ort.OrtValue.ortvalue_from_shape_and_type
        self.inputs = {k: empty(list(x.shape), x.dtype.type, device, 0) for k, x in feed.items()}
        self.outputs = {k: empty(list(shape), dtype, device, 0) for k, (shape, dtype) in results.items()}
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, value in self.outputs.items():
            self.binding.bind_ortvalue_output(name, value)
        self.given, self.calls = dict[str, np.ndarray](), 0

    def __call__(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, as arrays of their own."""
        for name, array in feed.items():
            if self.given.get(name) is not array:
                self.inputs[name].update_inplace(array)
            if name in self.kept:
                self.given[name] = array
        try:
            self.run(self.graph if self.calls else PLAIN)
        except Exception:  # onnxruntime's exceptions share no other base
            if self.calls != 1 or self.graph == PLAIN:
                raise
            self.graph = PLAIN
            self.run(PLAIN)
        self.calls += 1
        return {name: np.array(value.numpy()) for name, value in self.outputs.items()}

    def run(self, graph: int) -> None:
        self.session.run_with_iobinding(self.binding, as_graph(graph))


def as_graph(number: int) -> ort.RunOptions:
    """The options of a call that is recorded, or replayed, as the CUDA graph of this number; PLAIN for neither."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


class Buffers:
    """A session's calls through buffers, of as many shapes as are in use."""

    def __init__(self, session: ort.InferenceSession, device: str, kept: Collection[str] = (), graphs: bool = False):
        self.session, self.device, self.kept, self.graphs = session, device, kept, graphs
        self.bound, self.made = OrderedDict[Any, Bound](), 0

    def __call__(self, feed: Mapping[str, np.ndarray], results: Shapes) -> dict[str, np.ndarray]:
        key = tuple((name, array.shape) for name, array in feed.items())
        if key not in self.bound:
            self.made += 1
            graph = self.made if self.graphs and self.made <= MOST else PLAIN  # onnxruntime never forgets one
            self.bound[key] = Bound(self.session, self.device, feed, results, self.kept, graph)
            if len(self.bound) > MOST:
                self.bound.popitem(last=False)
        self.bound.move_to_end(key)
        return self.bound[key](feed)
