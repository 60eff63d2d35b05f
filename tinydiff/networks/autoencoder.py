"""The kinds of autoencoders without torch: their settings, and what the package asks of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinydiff.errors import ModelError
from tinydiff.files import read_json, shipped, shown
from tinydiff.networks.network import Array, Graph, Network, Table, imported, pick
from tinydiff.schema import Key, brief, key

if TYPE_CHECKING:
    from torch import Tensor

    from tinydiff.config import Config

SCALING = 0.18215  # of Stable Diffusion's latents, where a table says nothing
ATTENTION = {  # our name of what other programs and older versions call differently
    **dict.fromkeys(("query", "q", "to_to_q"), "to_q"),
    **dict.fromkeys(("key", "k", "to_to_k"), "to_k"),
    **dict.fromkeys(("value", "v", "to_to_v"), "to_v"),
    **dict.fromkeys(("proj_attn", "proj_out", "to_out", "to_to_out.0"), "to_out.0"),
    "norm": "group_norm",
}
OTHER = re.compile(
    rf"(?:(?<=\bmid\.attn_1\.)|(?<=\battentions\.0\.))(?:{'|'.join(map(re.escape, ATTENTION))})(?=\.(?:weight|bias)$)"
)


GENERAL = "general"  # the name of the autoencoder that is shipped
PLACES = (
    "vae",
    "model/vae",
    "autoencoder",
    "",
)  # of a model folder, a run, a run without a model, an autoencoder's own


AUTOENCODERS: dict[str, AutoencoderNetwork] = {}  # by `autoencoder.kind`; filled below


@dataclass(frozen=True)
class Autoencoder:
    block_out_channels: tuple[int, ...] = key(
        (32, 64, 64), "widths; each after the first halves the resolution", 1, 2**14
    )
    layers_per_block: int = key(1, "residual blocks a level", 1, 16)
    latent_channels: int = key(4, "channels of a latent", 1, 64)
    norm_num_groups: int = key(8, "group normalisation groups; must divide every width", 1, 2**14)
    mid_block_add_attention: bool = key(False, "self-attention at the lowest resolution")
    kind: str = key(
        "kl",
        "latents near a standard normal (kl), one of a codebook's each (vq), FLUX.2's (flux2)",
        choices=AUTOENCODERS,
    )
    num_vq_embeddings: int = key(256, "vq: vectors of the codebook", 2, 2**16)
    path: str = key(
        "", "begin with this one, which then says these keys: a folder, a .safetensors file, or the shipped 'general'"
    )

    @property
    def factor(self) -> int:
        """Pixels along a side that are one latent."""
        return AUTOENCODERS[self.kind].factor(asdict(self))

    @property
    def channels(self) -> int:
        """Channels of the latents that a denoiser sees."""
        return AUTOENCODERS[self.kind].channels(asdict(self))


class AutoencoderNetwork(Network):
    """The KL autoencoder of Stable Diffusion."""

    kind = "kl"
    apart = ("path", "kind", "num_vq_embeddings")  # keys of a configuration that its config.json has not
    values = 2  # of what encodes, for each of a latent: mean and log-variance
    patch = 1  # along a side, how many of its latents are one of the denoiser's, their channels one after the other
    learner = "tinydiff.training.reconstruct:Reconstruct"  # its training's network
    no_form = ""  # why diffusers has no pipeline with it
    single_file = True
    name = "vae"
    settings = Autoencoder
    module = "tinydiff.models.autoencoder:Autoencoder"
    library = ("diffusers", "AutoencoderKL")
    defaults = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 32, "mid_block_add_attention": True}
    defaults |= {"scaling_factor": SCALING}
    only = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": (None, 0)}
    only |= {"in_channels": 3, "out_channels": 3}
    checked = {"scaling_factor": Key(float, 1e-6, 1e6)}
    checked |= {"down_block_types": Key(tuple[str, ...], choices=("DownEncoderBlock2D",))}
    checked |= {"up_block_types": Key(tuple[str, ...], choices=("UpDecoderBlock2D",))}
    unused = frozenset(("sample_size", "force_upcast", "latents_mean", "latents_std"))  # as in diffusers' own pipeline
    nulls = ("norm_num_groups",)

    def shapes(self, table: Table) -> dict[str, tuple[int, ...]]:
        widths, latents = table["block_out_channels"], table["latent_channels"]
        return {"encoder.conv_in.weight": (widths[0], 3, 3, 3), "decoder.conv_in.weight": (widths[-1], latents, 3, 3)}

    def factor(self, table: Table) -> int:
        """Pixels along a side that are one latent of the denoiser."""
        return self.patch * 2 ** (len(table["block_out_channels"]) - 1)

    def channels(self, table: Table) -> int:
        """Channels of the denoiser's latents."""
        return self.patch**2 * table["latent_channels"]

    def graphs(self, folder: str, table: Table) -> dict[str, Graph]:
        c, factor = self.channels(table), self.factor(table)
        pixels, latent = Array(("batch", 3, "height", "width"), "pixels"), Array(("batch", c, "height", "width"))
        moments = Array(("batch", self.values * c, "latent_height", "latent_width"))
        drawn = Array(("batch", 3, "image_height", "image_width"))
        return {
            f"{folder}_encoder": Graph("encode", {"sample": pixels}, {"latent_parameters": moments}, 2 * factor),
            f"{folder}_decoder": Graph("decode", {"latent_sample": latent}, {"sample": drawn}, 2),
        }

    def describe(self, cfg: Config) -> dict[str, Any]:
        n = len(cfg.autoencoder.block_out_channels)
        kinds = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
        shape = {name: value for name, value in asdict(cfg.autoencoder).items() if name not in self.apart}
        own = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "sample_size": cfg.data.resolution}
        return {"_class_name": self.library[1]} | kinds | own | shape | {"scaling_factor": 1.0}

    def given(self, cfg: Config) -> Path | None:
        """The folder or file that `autoencoder.path` names, None where the autoencoder is a new one. Raises ModelError."""
        if not (path := cfg.autoencoder.path):
            return None
        start = shipped("autoencoder") if path == GENERAL else Path(path)
        if os.path.isfile(start):  # False for a name that no file can have
            return start
        for place in PLACES:
            if os.path.isfile(start / place / "config.json"):
                return start / place
        raise ModelError(
            f"{shown(path)}: holds no autoencoder; autoencoder.path names a model, a run, a file, or {GENERAL!r}"
        )

    def completed(self, cfg: Config) -> Autoencoder:
        """The settings as the given autoencoder has them, as far as it is there. Raises ModelError."""
        if not (path := cfg.autoencoder.path):
            return cfg.autoencoder
        try:
            place = self.given(cfg)
        except ModelError:  # whoever only reads a configuration needs no autoencoder
            return cfg.autoencoder
        try:
            row = autoencoder_of(table := table_of(place))  # type: ignore[arg-type]
            if table.get("_class_name") not in (None, row.library[1]):
                *known, last = (each.library[1] for each in AUTOENCODERS.values())
                only = f"only {', '.join(known)} and {last} are supported"
                raise ValueError(f"_class_name is {brief(table['_class_name'])}, and {only}")
            settings = replace(pick(Autoencoder, whole := row.read(table)), path=path, kind=row.kind)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{shown(path)}: unsupported or incomplete config.json: {shown(error)}") from None
        imported("tinydiff.checkpoints.source:check_autoencoder")(row, whole, place)  # which imports this module
        return settings

    def conflicts(self, cfg: Config) -> Iterator[str]:
        yield from self.misfits(asdict(cfg.autoencoder))

    def misfits(self, table: Table) -> Iterator[str]:
        if "block_out_channels" not in table:  # which has no default
            return
        s = pick(Autoencoder, table)
        for width in s.block_out_channels:
            if width % s.norm_num_groups:
                yield f"norm_num_groups: {s.norm_num_groups} does not divide width {width}"
        for kinds in ("down_block_types", "up_block_types"):
            if len(table.get(kinds, s.block_out_channels)) != len(s.block_out_channels):
                yield f"{kinds}: needs one entry for each of block_out_channels"

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {attention(name): matrix(name, tensor) for name, tensor in super().renamed(tensors).items()}


class VQNetwork(AutoencoderNetwork):
    """An autoencoder whose decoder takes for each latent the nearest vector of a codebook: diffusers' VQModel."""

    kind = "vq"
    apart = ("path", "kind")
    values = 1
    learner = "tinydiff.training.reconstruct:Quantise"
    no_form = "its pipelines of text do not call a VQModel; diffusers opens the folder vae by itself"
    single_file = False
    module = "tinydiff.models.autoencoder:VQAutoencoder"
    library = ("diffusers", "VQModel")
    defaults = AutoencoderNetwork.defaults | {"latent_channels": 3, "num_vq_embeddings": 256}
    only = {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "norm_type": "group", "lookup_from_codebook": False}
    checked = AutoencoderNetwork.checked | {"vq_embed_dim": Key(int, 1, 64)}
    unused = frozenset(("sample_size", "force_upcast"))

    def shapes(self, table: Table) -> dict[str, tuple[int, ...]]:
        return super().shapes(table) | {
            "quantize.embedding.weight": (table["num_vq_embeddings"], table["latent_channels"])
        }

    def misfits(self, table: Table) -> Iterator[str]:
        yield from super().misfits(table)
        if table.get("vq_embed_dim") not in (None, latents := table["latent_channels"]):
            yield f"vq_embed_dim: {table['vq_embed_dim']} is not latent_channels {latents}"


class Flux2Network(AutoencoderNetwork):
    """FLUX.2's autoencoder, with the normalisation that it keeps for its denoisers: a latent is a patch of its own."""

    kind = "flux2"
    patch = 2
    no_form = (
        "its pipelines of text do not normalise the latents of an AutoencoderKLFlux2; diffusers opens the folder vae"
    )
    single_file = False
    module = "tinydiff.models.autoencoder:Flux2Autoencoder"
    library = ("diffusers", "AutoencoderKLFlux2")
    defaults = AutoencoderNetwork.defaults | {"latent_channels": 32, "layers_per_block": 2, "scaling_factor": 1.0}
    defaults |= {"block_out_channels": (128, 256, 512, 512)}
    only = AutoencoderNetwork.only | {
        "patch_size": ((2, 2),),
        "batch_norm_eps": 1e-4,
        "decoder_block_out_channels": (None,),
    }
    checked = AutoencoderNetwork.checked | {"patch_size": Key(tuple[int, ...], 1, 64)}
    unused = frozenset(("sample_size", "force_upcast", "batch_norm_momentum"))

    def shapes(self, table: Table) -> dict[str, tuple[int, ...]]:
        return super().shapes(table) | dict.fromkeys(("bn.running_mean", "bn.running_var"), (self.channels(table),))

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: tensor for k, tensor in super().renamed(tensors).items() if k != "bn.num_batches_tracked"}


AUTOENCODERS |= {"kl": AutoencoderNetwork(), "vq": VQNetwork(), "flux2": Flux2Network()}


def table_of(place: Path) -> Table:
    """The `config.json` of an autoencoder in a folder; of one in a single file, what its tensors say. Raises ModelError."""
    if place.is_dir():
        return read_json(place / "config.json")
    read = imported("tinydiff.checkpoints.single_file:autoencoder")  # which imports this module
    return read(imported("tinydiff.checkpoints.header:header")(place))


def autoencoder_of(table: Table) -> AutoencoderNetwork:
    """The kind of a `config.json`; the first where it says none."""
    kinds = (row for row in AUTOENCODERS.values() if row.library[1] == table.get("_class_name"))
    return next(kinds, AUTOENCODERS["kl"])


def attention(name: str) -> str:
    """A tensor's name with the part of attention that it is called as we do."""
    return OTHER.sub(lambda other: ATTENTION[other[0]], name)


def matrix(name: str, tensor: Any) -> Any:
    """The weights of attention by 1x1 convolutions as matrices: (out, in, 1, 1) -> (out, in); others as they are."""
    convolved = ".mid_block.attentions." in name and getattr(tensor, "ndim", 0) > 2
    return tensor.flatten(1) if convolved else tensor
