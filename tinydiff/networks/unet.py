"""The Stable Diffusion U-Net without torch: its settings, its plan, and what the package asks of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, compress
from typing import TYPE_CHECKING, Any

from tinydiff.networks import spatial
from tinydiff.networks.growth import Growth, times
from tinydiff.networks.network import (
    HIDDEN,
    OURS,
    POOLED,
    SIDE,
    WIDTH,
    Array,
    Canvas,
    Denoiser,
    Given,
    Graph,
    OtherNetwork,
    Table,
    pick,
)
from tinydiff.networks.spatial import ATTENTIONS, POSITIONS
from tinydiff.schema import Key, brief, key

if TYPE_CHECKING:
    from tinydiff.config import Config

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
SKIP, MIDDLE = "down_block_additional_residuals_", "mid_block_additional_residual"  # diffusers' names, and a number
CONTROLLED = "_controlled"  # in a bundle's config.json: whether its graph takes residuals; diffusers reads no such keys
XL = "text_time"  # the addition_embed_type of Stable Diffusion XL: a text's one vector and sizes are added to the time
SIZES = 6  # numbers of `Canvas.sizes`
LABEL, PICTURE = (
    "class_labels",
    "image_latents",
)  # inputs: weights of classes, one-hot in most cases; another image's latents
NONE, ADDED, BESIDE, ATTENDED = "none", "time", "concat", "cross"  # how they are told
SOME = 1001  # classes, where there are no data to count them

Channels = Callable[[int, int, int], int]
SKIPS: dict[str, Channels] = {  # channels that a block reads: of (what comes, its skip, what the level read before)
    "concat": lambda comes, skip, before: comes + skip,
    "add": lambda comes, skip, before: comes,
    "gated": lambda comes, skip, before: comes,
    "dense": lambda comes, skip, before: comes + skip + before,
}
# Names of the tables in `models/`, which need torch.
RESNETS, NORMS = ("pre", "post", "bottleneck", "separable", "dilated"), ("group", "layer", "batch", "rms")
TIMES, MODULATIONS = ("sinusoidal", "learned", "hybrid"), ("add", "concat", "film", "adain", "attention")
UNSCALED = ("concat", "adain", "attention")  # what diffusers has no form of: film is its scale_shift
CHANNELS, CONTEXTS = ("none", "squeeze", "spatial_channel"), ("none", "aspp", "pyramid")
MIDDLES: dict[str, Callable[[UNet], int]] = {"block": lambda s: 1, "transformer": lambda s: s.middle_layers}


@dataclass(frozen=True)
class UNet:
    block_out_channels: tuple[int, ...] = key((64, 192), "widths; each after the first halves the resolution", 1, 2**14)
    down_block_types: tuple[str, ...] = key(
        (PLAIN, CROSS), "one a width: with cross-attention to the text, or without", choices=(CROSS, PLAIN)
    )
    layers_per_block: int = key(1, "residual blocks (and transformers) a level", 1, 16)
    transformer_layers_per_block: int | tuple[int, ...] = key(
        1, "transformer blocks after each residual block, or a list with one number a width", 1, 16
    )
    attention_head_dim: int | tuple[int, ...] = key(
        4, "attention heads, or a list with one number a width (diffusers' name; it is not their width)", 1, 2**14
    )
    norm_num_groups: int = key(32, "group normalisation groups; must divide every width", 1, 2**14)
    use_linear_projection: bool = key(True, "transformers enter and leave by matrices, not 1x1 convolutions")
    qk_norm: bool = key(False, "normalise queries and keys of attention", own=True)
    label: str = key(
        NONE,
        "how it is told a class, of the column label: added to the time, or by cross-attention",
        choices=(NONE, ADDED, ATTENDED),
        own=(ATTENDED,),
    )
    image: str = key(
        NONE,
        "how it is told another image, of the column image: its latents beside the noisy ones, or by cross-attention",
        choices=(NONE, BESIDE, ATTENDED),
        own=(ATTENDED,),
    )
    time_tokens: int = key(0, "tokens of the noise level that cross-attention reads too", 0, 64, own=True)
    resnet: str = key("pre", "residual blocks", choices=RESNETS, own=True)
    norm: str = key("group", "what layers normalise by", choices=NORMS, own=True)
    time_embedding: str = key("sinusoidal", "how the noise level becomes a vector", choices=TIMES, own=True)
    modulation: str = key("add", "how residual blocks are told that vector", choices=MODULATIONS, own=UNSCALED)
    skips: str = key("concat", "how the way up takes features of the way down", choices=SKIPS, own=True)
    channel_attention: str = key("none", "what weighs the channels of residual blocks", choices=CHANNELS, own=True)
    context: str = key("none", "what brings scales together before the way up", choices=CONTEXTS, own=True)
    middle: str = key("block", "the lowest resolution: one transformer, or middle_layers", choices=MIDDLES, own=True)
    middle_layers: int = key(4, "transformers of the middle, with long skips, where it is one", 2, 64, own=True)
    attention: str | tuple[str, ...] = key(
        "full", "which pixels attend to each other, or a list with one a width", choices=ATTENTIONS, own=True
    )
    window: int = key(
        4, "side of the windows of attention window; every other block's are shifted by half", 1, 256, own=True
    )
    stride: int = key(2, "pixels between those that attend to each other in attention strided", 1, 256, own=True)
    positions: str = key("none", "what self-attention is told of pixels' places", choices=POSITIONS, own=True)
    learn_frequencies: bool = key(False, "the frequencies of positions sine are learnt", own=True)

    @property
    def sources(self) -> int:
        """What cross-attention reads: the text, and what the three keys above add."""
        return 1 + (self.label == ATTENDED) + (self.image == ATTENDED) + bool(self.time_tokens)

    def heads(self) -> tuple[int, ...]:
        """Attention heads at each width."""
        return self._each(self.attention_head_dim)

    def depths(self) -> tuple[int, ...]:
        """Transformer blocks after each residual block at each width that has any."""
        return self._each(self.transformer_layers_per_block)

    def attentions(self) -> tuple[str, ...]:
        """The kind of self-attention at each width."""
        return self._each(self.attention)

    def _each(self, value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


@dataclass(frozen=True)
class Level:
    """One resolution of the U-Net: channels (in, out) of its residual blocks on the way down and on the way up.

    `merged`: channels (that come, of the skip) before each block on the way up, whose channels in are what `SKIPS` makes of
    them. `heads`, `depth` and `attention` are those of the transformer after each block; a depth of 0 is none. `last`: the
    lowest resolution, which is not halved.
    """

    width: int
    heads: int
    depth: int
    attention: str
    down: tuple[tuple[int, int], ...]
    up: tuple[tuple[int, int], ...]
    merged: tuple[tuple[int, int], ...]
    last: bool


def plan(settings: UNet) -> list[Level]:
    """The levels from the highest resolution to the lowest. Every block leaves one skip, and so do `conv_in` and halving."""
    widths, n = settings.block_out_channels, settings.layers_per_block
    befores, afters = (widths[0], *widths[:-1]), (*widths[1:], widths[-1])
    levels = []
    for i, (width, kind) in enumerate(zip(widths, settings.down_block_types, strict=True)):
        skips = [width] * n + [befores[i]]  # in the order in which they are taken
        enters = [afters[i]] + [width] * n
        depth = settings.depths()[i] if kind == CROSS else 0
        down = tuple((c, width) for c in ([befores[i]] + [width] * n)[:n])
        merged = tuple(zip(enters, skips, strict=True))
        before = accumulate((sum(pair) for pair in merged[:-1]), initial=0)
        up = tuple((SKIPS[settings.skips](*pair, read), width) for pair, read in zip(merged, before, strict=True))
        heads, kind = settings.heads()[i], settings.attentions()[i]
        levels.append(Level(width, heads, depth, kind, down, up, merged, last=i == len(widths) - 1))
    return levels


def residuals(settings: UNet) -> dict[str, Array]:
    """What control networks give and a U-Net adds to its skips, in their order, and to its middle's output."""
    levels = plan(settings)
    skips = [(levels[0].width, 1)]  # channels, and how many latents along a side are one
    for i, level in enumerate(levels):
        skips += [(level.width, 2**i)] * len(level.down) + ([] if level.last else [(level.width, 2 ** (i + 1))])
    named = {f"{SKIP}{i}": skip for i, skip in enumerate(skips)} | {MIDDLE: skips[-1]}
    return {
        name: Array(("batch", c, *(f"{side}/{n}" if n > 1 else side for side in ("height", "width"))))
        for name, (c, n) in named.items()
    }


def of_guidance(width: int) -> Callable[[Canvas], list[float]]:
    """Sinusoids of how strong guidance is, sines first (Meng et al. 2023, section 3; Luo et al. 2023, appendix F)."""
    half = width // 2
    rates = [math.exp(-math.log(10000) * i / max(1, half - 1)) for i in range(half)]

    def row(canvas: Canvas) -> list[float]:
        angles = [1000 * (canvas.guidance - 1) * rate for rate in rates]
        return [*map(math.sin, angles), *map(math.cos, angles), *[0.0] * (width % 2)]

    return row


class UNetNetwork(Denoiser):
    single_file = controlled = True
    grows = dict.fromkeys(("layers", "widths", "resolution", "attention"), ("qk_norm",))
    name = folder = "unet"
    doc = "the U-Net, where denoiser.kind is unet"
    settings = UNet
    module = "tinydiff.models.unet:UNet"
    library = ("diffusers", "UNet2DConditionModel")
    pipelines = {"clip": "StableDiffusionPipeline"}
    defaults = (
        {"in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "norm_num_groups": 32}
        | {"down_block_types": (CROSS,) * 3 + (PLAIN,), "layers_per_block": 2, "transformer_layers_per_block": 1}
        | {"attention_head_dim": 8, "use_linear_projection": False, "sample_size": 64}
    )
    checked = {"in_channels": WIDTH, "out_channels": WIDTH, "cross_attention_dim": WIDTH, "sample_size": SIDE}
    checked |= {"up_block_types": Key(tuple[str, ...]), "time_embedding_dim": WIDTH, "time_cond_proj_dim": WIDTH}
    checked |= {"num_class_embeds": Key(int, 1, 2**20)}
    checked |= dict.fromkeys(("addition_time_embed_dim", "projection_class_embeddings_input_dim"), WIDTH)  # of XL
    unused = frozenset(("dropout", "upcast_attention", "addition_embed_type_num_heads"))
    nulls = ("mid_block_type", "norm_num_groups")
    only = (
        {"act_fn": "silu", "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "flip_sin_to_cos": True}
        | {"time_embedding_type": "positional", "attention_type": "default"}
        | {"resnet_time_scale_shift": ("default", "scale_shift")}
        | {"freq_shift": 0, "resnet_out_scale_factor": 1.0, "mid_block_scale_factor": 1, "downsample_padding": 1}
        | {"conv_in_kernel": 3, "conv_out_kernel": 3}
        | dict.fromkeys(("center_input_sample", "only_cross_attention", "dual_cross_attention"), False)
        | dict.fromkeys(("resnet_skip_time_act", "class_embeddings_concat"), (False, None))
        | dict.fromkeys(("class_embed_type", "encoder_hid_dim"), (None, False))
        | {"addition_embed_type": (None, False, XL)}
        | dict.fromkeys(("timestep_post_act", "cross_attention_norm"), (None, False))
        | dict.fromkeys(
            ("mid_block_only_cross_attention", "time_embedding_act_fn", "encoder_hid_dim_type"), (None, False)
        )
        | dict.fromkeys(("num_attention_heads", "reverse_transformer_layers_per_block"))
    )

    def valid(self, table: Table, whole: bool = True) -> Table:
        table = super().valid(table, whole)
        reverse = "reverse_transformer_layers_per_block"  # the same on the way up, where one number stands for all
        if table.get(reverse) == table.get("transformer_layers_per_block", 1):
            table[reverse] = None
        return table

    def read(self, table: Table) -> Table:
        table = super().read(table)
        widths, ups = (
            table["block_out_channels"],
            tuple(k.replace("Down", "Up") for k in table["down_block_types"][::-1]),
        )
        if table.get("up_block_types", ups) != ups:
            raise OtherNetwork(
                f"unet: up_block_types are {brief(table['up_block_types'])}, and only {ups} are supported"
            )
        if table.get("time_embedding_dim", widths[0] * 4) != widths[0] * 4:
            raise OtherNetwork(
                f"unet: time_embedding_dim is {table['time_embedding_dim']}, and only {widths[0] * 4} is supported"
            )
        return table

    def shapes(self, table: Table) -> dict[str, tuple[int, ...]]:
        widths, added_class = table["block_out_channels"], self.settings_of(table).label == ADDED
        middle = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        return {
            "conv_in.weight": (widths[0], table["in_channels"], 3, 3),
            "conv_out.weight": (table["out_channels"], widths[0], 3, 3),
            middle: (widths[-1], table["cross_attention_dim"]),
            **({"add_embedding.linear_1.weight": (widths[0] * 4, added)} if (added := self.added(table)) else {}),
            **({"class_embedding.weight": (table["num_class_embeds"], widths[0] * 4)} if added_class else {}),
        }

    def graphs(self, folder: str, table: Table) -> dict[str, Graph]:
        made = super().graphs(folder, table)
        if table.get(CONTROLLED):
            made[folder].inputs.update(residuals(pick(UNet, table)))
        return made

    def reduction(self, table: Table) -> int:
        return 2 ** (len(table["block_out_channels"]) - 1)

    def multiple(self, table: Table) -> int:
        return 1 if self.added(table) else self.reduction(table)

    def added(self, table: Table) -> int:
        """How many numbers are added to the time, 0 in a U-Net that is not XL's."""
        return table["projection_class_embeddings_input_dim"] if table.get("addition_embed_type") == XL else 0

    def conditions(self, table: Table) -> dict[str, Array]:
        told = super().conditions(table)
        if added := self.added(table):
            pooled = added - SIZES * table["addition_time_embed_dim"]
            told |= {"text_embeds": Array(("batch", pooled), of=POOLED)}
            told |= {"time_ids": Array(("batch", SIZES), "time", of=lambda canvas: canvas.sizes)}
        if width := table.get("time_cond_proj_dim"):
            told |= {"timestep_cond": Array(("batch", width), of=of_guidance(width))}
        if classes := table.get("num_class_embeds"):
            told |= {LABEL: Array(("batch", classes), of=Given("label"))}
        if self.settings_of(table).image != NONE:
            told |= {PICTURE: Array(("batch", table["out_channels"], "height", "width"), of=Given("image"))}
        return told

    def settings_of(self, table: Table) -> UNet:
        """The settings of a table, where diffusers' forms of a class and of an image beside are numbers."""
        settings = pick(UNet, table)
        label = ADDED if table.get("num_class_embeds") and settings.label == NONE else settings.label
        beside = table["in_channels"] == 2 * table["out_channels"]  # Brooks et al. 2023, section 3.2
        return replace(settings, label=label, image=BESIDE if beside else settings.image)

    def noisy(self, table: Table) -> int:
        beside = self.settings_of(table).image == BESIDE
        return table["out_channels"] if beside else table["in_channels"]

    def told_guidance(self, table: Table) -> bool:
        return bool(table.get("time_cond_proj_dim"))

    def middle(self, table: Table) -> tuple[str, int]:
        return "mid_block", table["block_out_channels"][
            -1
        ]  # what comes later has the skips (Tian et al. 2025, section 3.1)

    def complete(self, table: Table) -> Table:
        table = super().complete(table)
        scaled = table.get("resnet_time_scale_shift") == "scale_shift"
        return {"modulation": "film", **table} if scaled else table

    def describe(self, cfg: Config, widths: Mapping[str, int]) -> dict[str, Any]:
        settings: UNet = cfg.network
        ups = [kind.replace("Down", "Up") for kind in reversed(settings.down_block_types)]
        own = asdict(settings) | {"up_block_types": ups, "cross_attention_dim": widths[HIDDEN]}
        for name in [f.name for f in fields(settings) if f.metadata["own"]]:
            del own[name]  # a key that diffusers does not know
        own |= {"num_class_embeds": widths.get("label", SOME)} if settings.label != NONE else {}
        own |= {"in_channels": 2 * cfg.latents["in_channels"]} if settings.image == BESIDE else {}
        own |= {"resnet_time_scale_shift": "scale_shift"} if settings.modulation == "film" else {}
        return {"_class_name": self.library[1]} | cfg.latents | own | self.unusual(settings)

    def pipeline(self, cfg: Config) -> tuple[str, str]:
        told = [name for name in ("label", "image") if getattr(cfg.network, name) != NONE]
        name, reason = super().pipeline(cfg)
        given = f"its pipelines give this U-Net no {' and no '.join(told)}"
        return (OURS, reason or given) if told else (name, reason)

    def conflicts(self, cfg: Config) -> Iterator[str]:
        yield from self.misfits(cfg.latents | asdict(cfg.network) | {"num_class_embeds": SOME})

    def grown(self, cfg: Config, to: Growth) -> UNet:
        """Heads keep their width, so that there are more of them where the levels are wider."""
        s: UNet = cfg.network
        more = times(to.each[0], s.block_out_channels[0]) if to.each else 1
        heads = [
            n * more
            for n in (s.attention_head_dim if isinstance(s.attention_head_dim, tuple) else [s.attention_head_dim])
        ]
        kinds = [CROSS if i in to.attention else kind for i, kind in enumerate(s.down_block_types)]
        return replace(
            s,
            layers_per_block=to.layers or s.layers_per_block,
            block_out_channels=to.each or s.block_out_channels,
            attention_head_dim=tuple(heads) if isinstance(s.attention_head_dim, tuple) else heads[0],
            down_block_types=tuple(kinds),
        )

    def ungrown(self, cfg: Config, to: Growth) -> Iterator[str]:
        yield from super().ungrown(cfg, to)
        s: UNet = cfg.network
        widths, has = s.block_out_channels, {i for i, kind in enumerate(s.down_block_types) if kind == CROSS}
        if to.layers and to.layers <= s.layers_per_block:
            yield f"layers {to.layers} are no more than the {s.layers_per_block} of unet.layers_per_block"
        ratios = {times(new, old) for new, old in zip(to.each, widths, strict=False)}
        if to.each and (len(to.each) != len(widths) or len(ratios) > 1 or 0 in ratios):
            yield f"widths {[*to.each]} are not twice, 4 times, ... all of unet.block_out_channels {[*widths]}"
        if to.attention and not has < {*to.attention} <= {*range(len(widths))}:
            yield f"attention {[*to.attention]} is not more than the levels of unet.down_block_types that have it, {sorted(has)}"

    def misfits(self, table: Table) -> Iterator[str]:
        s = pick(UNet, table)
        widths, heads = s.block_out_channels, s.heads()
        if s.norm != "group" and s.norm_num_groups != UNet.norm_num_groups:
            yield f"norm_num_groups: {s.norm_num_groups}, where norm is {s.norm}, which has no groups; leave it out"
        if s.resnet == "bottleneck" and (width := next((w for w in widths if w % 4), 0)):
            yield f"resnet: bottleneck needs widths that are multiples of 4, and block_out_channels has {width}"
        if table.get("resnet_time_scale_shift") == "scale_shift" and s.modulation != "film":
            yield f"modulation: {s.modulation}, where resnet_time_scale_shift is scale_shift, which is film"
        if s.middle == "block" and s.middle_layers != UNet.middle_layers:
            yield f"middle_layers: {s.middle_layers}, where middle is block, which has one; set middle to transformer"
        for width in widths:
            if s.norm == "group" and width % s.norm_num_groups:
                yield f"norm_num_groups: {s.norm_num_groups} does not divide width {width}"
        for width, count in zip(widths, heads, strict=False):
            if width % count:
                yield f"attention_head_dim: {count} heads do not divide width {width}"
        listed = {"attention_head_dim": heads, "transformer_layers_per_block": s.depths(), "attention": s.attentions()}
        for name, each in listed.items():
            if len(each) != len(widths):
                yield f"{name}: needs one entry for each of block_out_channels, or one for all"
        attentive = [
            kind == CROSS or i == len(widths) - 1 for i, kind in enumerate(s.down_block_types)
        ]  # and the middle
        sides = [-(-table.get("sample_size", SIDE.high) // 2**i) for i in range(len(widths))]
        yield from spatial.misfits(s, compress(zip(s.attentions(), sides, widths, strict=False), attentive))
        if table.get("addition_embed_type") == XL:
            pooled, sizes = (
                table.get(key) for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
            )
            if not pooled or not sizes or sizes % 2 or pooled <= SIZES * sizes:
                needs = f"projection_class_embeddings_input_dim above {SIZES} times an even addition_time_embed_dim"
                yield f"addition_embed_type: {XL} needs {needs}, and they are {pooled} and {sizes}"
        for kinds in ("down_block_types", "up_block_types"):
            if len(table.get(kinds, widths)) != len(widths):
                yield f"{kinds}: needs one entry for each of block_out_channels"
        if s.image == ATTENDED and (self.reduction(asdict(s)) < 2 or table.get("cross_attention_dim", 4) % 4):
            yield "image: cross-attention reads 2x2 latents as a token; it needs two widths, and vectors of a multiple of 4"
        if s.label == ATTENDED and "cross_attention_dim" in table and not table.get("num_class_embeds"):
            yield "label: there are no classes; set num_class_embeds"
        if widths[0] % 2:
            yield "block_out_channels: the first width is also that of the time's sines and cosines; it must be even"
