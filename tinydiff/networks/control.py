"""The control network without torch: its settings, and what the package asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tinydiff.networks.network import Array, Denoiser, Graph, Table, pick
from tinydiff.networks.unet import UNet, UNetNetwork, residuals
from tinydiff.schema import Key

APART = (
    "out_channels",
    "up_block_types",
    "sample_size",
    "time_cond_proj_dim",
)  # of a U-Net's table, which this has not
IMAGE = "controlnet_cond"  # the input that is told the control image, in [0, 1]


@dataclass(frozen=True)
class Control:
    """What a control network has besides the settings of its U-Net."""

    conditioning_channels: int
    conditioning_embedding_out_channels: tuple[int, ...]  # each after the first halves the image


class ControlNetwork(UNetNetwork):
    """Its table is that of its U-Net without the way up, and what `Control` has."""

    name = "control network"
    folder = "controlnet"
    module = "tinydiff.models.control:ControlNet"
    library = ("diffusers", "ControlNetModel")
    defaults = UNetNetwork.defaults | {
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": (16, 32, 96, 256),
    }
    checked = UNetNetwork.checked | {
        "conditioning_channels": Key(int, 3, 3),
        "conditioning_embedding_out_channels": Key(tuple[int, ...], 1, 2**14),
    }
    only = UNetNetwork.only | {"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False}

    def misfits(self, table: Table) -> Iterator[str]:
        yield from super().misfits(table)
        if not table["conditioning_embedding_out_channels"]:
            yield "conditioning_embedding_out_channels: is empty"

    def shapes(self, table: Table) -> dict[str, tuple[int, ...]]:
        known = {k: v for k, v in super().shapes(table).items() if k != "conv_out.weight"}
        width, last = table["block_out_channels"][0], table["conditioning_embedding_out_channels"][-1]
        return known | {"controlnet_cond_embedding.conv_out.weight": (width, last, 3, 3)}

    def factor(self, table: Table) -> int:
        """Pixels of the control image that become one latent, along a side."""
        return 2 ** (len(table["conditioning_embedding_out_channels"]) - 1)

    def graphs(self, folder: str, table: Table) -> dict[str, Graph]:
        (graph,) = Denoiser.graphs(self, folder, table).values()
        sides = (f"{side}*{self.factor(table)}" for side in ("height", "width"))
        image = {IMAGE: Array(("batch", 3, *sides), "unit")}
        return {folder: Graph("forward", graph.inputs | image, residuals(pick(UNet, table)), graph.step)}

    def of_base(self, table: Table, factor: int) -> dict[str, Any]:
        """The table of a new control network for a U-Net's, whose latents are `factor` pixels along a side."""
        halvings = factor.bit_length() - 1
        widths = (16, 32, 96, 256) if halvings == 3 else (*(16 * 2 ** min(i, 2) for i in range(halvings)), 256)
        own = {k: v for k, v in table.items() if not k.startswith("_") and k not in APART}
        own |= {"in_channels": table["out_channels"], "conditioning_channels": 3}
        return {"_class_name": self.library[1], **own, "conditioning_embedding_out_channels": list(widths)}
