"""What a model's networks cost by their configurations alone: one call of each, of one image, without guidance.

The networks are built on torch's meta device, where nothing is computed, and `measure.cost` counts. Any network that can be
built is counted so; no formula of any is written down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tinydiff.networks import Table, graphs, network_of
from tinydiff.networks.unet import CONTROLLED


def costs(configs: Mapping[str, Table], height: int, width: int, tokens: int, factor: int = 1) -> dict[str, Table]:
    """{"parameters", "flops", "activations" (bytes), "reach"} of each graph, by its name in a bundle.

    Latents are `height` x `width`, a latent `factor` pixels a side, a prompt of `tokens`. "reach" is the receptive field: rows
    of the input that one output depends on, "all" where attention sees all, None where the input is no image. Raises
    ImportError where torch is not installed, and KeyError, TypeError or ValueError where a configuration lacks a size.
    """
    import torch

    from tinydiff.measure.cost import cost

    result = {}
    alone = {
        name: {k: v for k, v in table.items() if k != CONTROLLED} for name, table in configs.items()
    }  # no additions
    for name, graph in graphs(alone).items():
        folder = name if name in configs else name.rpartition("_")[0]
        if folder not in configs:
            continue  # what lacks its text encoder has a cost all the same
        scale = factor if any(array.values == "pixels" for array in graph.inputs.values()) else 1
        sizes = {"batch": 1, "sequence": tokens, "height": height * scale, "width": width * scale}
        with torch.device("meta"):
            network = network_of(folder, configs[folder]).build(configs[folder]).eval()
            types = {k: torch.int64 if a.values == "tokens" else torch.float32 for k, a in graph.inputs.items()}
            inputs = {k: torch.empty(a.shape(sizes), dtype=types[k]) for k, a in graph.inputs.items()}
        counted = vars(cost(network, graph.method, inputs, graph.step))
        reach = counted["reach"]
        result[name] = counted | {"reach": "all" if reach == math.inf else reach and int(reach)}
    return result
