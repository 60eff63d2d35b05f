"""The KL autoencoder of Stable Diffusion without torch: its settings, and what the package asks of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tinydiff.networks.network import Array, Graph, Network, Table
from tinydiff.schema import key

if TYPE_CHECKING:
    from torch import Tensor

    from tinydiff.config import Config

SCALING = 0.18215  # of Stable Diffusion's latents, where a table says nothing
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.17
OLD = re.compile(rf"\.({'|'.join(OLD_ATTENTION)})\.(?=weight$|bias$)")


@dataclass(frozen=True)
class Autoencoder:
    block_out_channels: tuple[int, ...] = key((32, 64, 64), "widths; each after the first halves the resolution", 1)
    layers_per_block: int = key(1, "residual blocks a level", 1, 16)
    latent_channels: int = key(4, "channels of a latent", 1, 64)
    norm_num_groups: int = key(8, "group normalisation groups; must divide every width", 1)
    mid_block_add_attention: bool = key(False, "self-attention at the lowest resolution")

    @property
    def factor(self) -> int:
        """Pixels along a side that are one latent."""
        return 2 ** (len(self.block_out_channels) - 1)


class AutoencoderNetwork(Network):
    single_file = True
    name = "vae"
    settings = Autoencoder
    module = "tinydiff.models.autoencoder:Autoencoder"
    library = ("diffusers", "AutoencoderKL")
    defaults = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 32, "mid_block_add_attention": True}
    only = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None}

    def factor(self, table: Table) -> int:
        """Pixels along a side that are one latent."""
        return 2 ** (len(table["block_out_channels"]) - 1)

    def graphs(self, folder: str, table: Table) -> dict[str, Graph]:
        c, factor = table["latent_channels"], self.factor(table)
        pixels, latent = Array(("batch", 3, "height", "width"), "pixels"), Array(("batch", c, "height", "width"))
        moments = Array(("batch", 2 * c, "latent_height", "latent_width"))
        drawn = Array(("batch", 3, "image_height", "image_width"))
        return {
            f"{folder}_encoder": Graph("encode", {"sample": pixels}, {"latent_parameters": moments}, 2 * factor),
            f"{folder}_decoder": Graph("decode", {"latent_sample": latent}, {"sample": drawn}, 2),
        }

    def describe(self, cfg: Config) -> dict[str, Any]:
        n = len(cfg.autoencoder.block_out_channels)
        kinds = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
        own = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "sample_size": cfg.data.resolution}
        return {"_class_name": self.library[1]} | kinds | own | asdict(cfg.autoencoder) | {"scaling_factor": 1.0}

    def conflicts(self, cfg: Config) -> Iterator[str]:
        groups = cfg.autoencoder.norm_num_groups
        for width in cfg.autoencoder.block_out_channels:
            if width % groups:
                yield f"norm_num_groups: {groups} does not divide width {width}"

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {OLD.sub(lambda old: f".{OLD_ATTENTION[old[1]]}.", name): tensor for name, tensor in tensors.items()}
