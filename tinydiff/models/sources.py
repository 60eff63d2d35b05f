"""What cross-attention reads besides text, each as tokens of the text's width: a class, another image, the noise level."""

from __future__ import annotations

from torch import Tensor, nn

from tinydiff.models.dit import PatchEmbed
from tinydiff.models.layers import embedding
from tinydiff.models.spatial import Sine
from tinydiff.networks.network import Table
from tinydiff.networks.spatial import Spatial
from tinydiff.networks.unet import ATTENDED, LABEL, PICTURE
from tinydiff.networks.unet import UNet as Config

PATCH = 2  # latents a token along each side


class Sources(nn.Module):
    """One of the tables of `forward` for each source (Rombach et al. 2022, section 3.3: tau, of any modality).

    `forward(text (B, T, D), time (B, E), told) -> [text, class (B, 1, D), image (B, h w / 4, D), time (B, n, D)]`, those that
    there are.
    """

    def __init__(self, config: Config, table: Table, time: int):
        super().__init__()
        dim, channels, side = table["cross_attention_dim"], table["out_channels"], table["sample_size"]
        classes, self.count = table.get("num_class_embeds") or 0, config.time_tokens
        self.label = embedding(classes, dim) if config.label == ATTENDED else None
        self.image = (
            PatchEmbed(channels, dim, PATCH, Sine(dim, 1, Spatial(base=side // PATCH)))
            if config.image == ATTENDED
            else None
        )
        self.time = nn.Linear(time, self.count * dim) if self.count else None

    def forward(self, text: Tensor, time: Tensor, told: dict[str, Tensor]) -> list[Tensor]:
        more = {
            "label": lambda table: (told[LABEL].to(text.dtype) @ table.weight)[:, None],
            "image": lambda embed: embed(told[PICTURE]),
            "time": lambda linear: linear(time).unflatten(1, (self.count, -1)),
        }
        return [text, *(more[name](part) for name, part in self.named_children())]
