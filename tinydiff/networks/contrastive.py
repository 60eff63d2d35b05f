"""The pair of towers that says how well a picture fits a text, without torch: CLIP's text tower and one for latents.

It is kept in a folder of its own beside a model's networks, none of which it is: `config.json` and `model.safetensors`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinydiff.networks.network import Network, Table
from tinydiff.networks.text import TEXT_ENCODERS
from tinydiff.schema import Key, key

if TYPE_CHECKING:
    from tinydiff.config import Config

CONTRASTIVE = "contrastive"  # the stage, and the folder
GROUPS = 8


@dataclass(frozen=True)
class Towers:
    image_channels: tuple[int, ...] = key(
        (64, 128), "widths of the image tower; each after the first halves the latents", GROUPS, 2**12
    )
    projection_dim: int = key(128, "size of the vectors in which texts and images are compared", 2, 2**12)


class ContrastiveNetwork(Network):
    name = CONTRASTIVE
    settings = Towers
    module = "tinydiff.models.contrastive:TextImage"
    file = "model.safetensors"
    only = {"_class_name": "TextImage"}
    checked = {"in_channels": Key(int, 1, 2**10), "scaling_factor": Key(float, 1e-6, 1e6)}

    def read(self, table: Table) -> dict[str, Any]:
        """Its own table, and that of its text tower in it."""
        return super().read(table) | {"text_config": TEXT_ENCODERS["clip"].read(dict(table["text_config"]))}

    def misfits(self, table: Table) -> Iterator[str]:
        if any(width % GROUPS for width in table["image_channels"]):
            yield f"image_channels: {list(table['image_channels'])} are no multiples of {GROUPS}"

    def conflicts(self, cfg: Config) -> Iterator[str]:
        if (stage := cfg.train.stage(CONTRASTIVE)).steps:
            yield from (f"train.{CONTRASTIVE}.{problem}" for problem in self.misfits(vars(stage)))
            if stage.batch_size == 1:
                yield f"train.{CONTRASTIVE}.batch_size: an image is told from the others of a batch; set 2 or more"
            if cfg.text_encoder.kind != "clip":
                problem = f"it trains CLIP's tower, and text_encoder.kind is {cfg.text_encoder.kind}"
                yield f"train.{CONTRASTIVE}.steps: {problem}; set 0, or text_encoder.kind=clip"


NETWORK = ContrastiveNetwork()
