"""The diffusion transformer (Peebles & Xie 2023) without torch: its settings, and what the package asks of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tinydiff.networks import spatial
from tinydiff.networks.growth import Growth, times
from tinydiff.networks.network import HIDDEN, SIDE, WIDTH, Array, Denoiser, Table
from tinydiff.networks.spatial import ATTENTIONS, POSITIONS
from tinydiff.schema import Key, key

if TYPE_CHECKING:
    from tinydiff.config import Config

# Table 1 of Peebles & Xie 2023: transformer blocks, attention heads, width of a head.
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
CONDITIONINGS = ("adaln_zero", "film", "in_context", "cross")
NORM_ORDERS = ("pre", "post")


@dataclass(frozen=True)
class DiT:
    size: str = key("S", "a size of the paper, or custom: that of the three keys below", choices=(*SIZES, "custom"))
    patch_size: int = key(2, "latents a token along each side: 2, 4 or 8", 2, 8)
    num_layers: int = key(12, "transformer blocks", 1, 128)
    num_attention_heads: int = key(6, "attention heads", 1, 256)
    attention_head_dim: int = key(64, "width of each head", 1, 1024)
    qk_norm: bool = key(False, "normalise queries and keys of attention", own=True)
    position_side: int = key(
        0, "latents a side that positions are of, at any size; 0: those trained on", 0, 2**14, own=True
    )
    position_width: int = key(
        0, "width that positions have, repeated to that of the tokens; 0: theirs", 0, 2**16, own=True
    )
    attention: str | tuple[str, ...] = key(
        "full",
        "which tokens attend to each other, or a list that is stretched over the blocks",
        choices=ATTENTIONS,
        own=True,
    )
    window: int = key(
        4, "side of the windows of attention window; every other block's are shifted by half", 1, 256, own=True
    )
    stride: int = key(2, "tokens between those that attend to each other in attention strided", 1, 256, own=True)
    positions: str = key("sine", "what tokens are told of their places", choices=POSITIONS, own=True)
    learn_frequencies: bool = key(False, "the frequencies of positions sine are learnt", own=True)
    conditioning: str = key("adaln_zero", "how blocks are told time and class", choices=CONDITIONINGS, own=True)
    norm_order: str = key("pre", "norms before each residual branch, or after its sum", choices=NORM_ORDERS, own=True)

    def attentions(self) -> list[str]:
        """The kind of self-attention of each block."""
        kinds = self.attention if isinstance(self.attention, tuple) else (self.attention,)
        layers = self.shape[0]
        return [kinds[i * len(kinds) // layers] for i in range(layers)]

    exits: int | tuple[int, ...] = key(
        0, "blocks after which heads learn when to leave, for generate --exit; 0: none", 0, 127, own=True
    )

    @property
    def leaves(self) -> tuple[int, ...]:
        """The blocks after which the network may be left."""
        return self.exits if isinstance(self.exits, tuple) else (self.exits,) * bool(self.exits)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Transformer blocks, attention heads, width of a head."""
        return SIZES.get(self.size, (self.num_layers, self.num_attention_heads, self.attention_head_dim))


class DiTNetwork(Denoiser):
    name = folder = "transformer"
    doc = "the diffusion transformer, where denoiser.kind is dit"
    settings = DiT
    module = "tinydiff.models.dit:DiT"
    library = ("diffusers", "DiTTransformer2DModel")
    outputs = (1, 2)  # a learned variance too
    grows = dict.fromkeys(("layers", "widths", "resolution"), ("qk_norm", "position_side", "position_width", "exits"))
    reads = ("clip", "t5", "bert", "class")
    pipelines = {"class": "DiTPipeline"}
    no_form = "a DiT that reads text"
    defaults: ClassVar[Table] = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "patch_size": 2}
    defaults |= {"sample_size": 32, "in_channels": 4, "num_embeds_ada_norm": 1000, "norm_eps": 1e-5, "freq_shift": 1}
    form: ClassVar[Table] = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero"}
    form |= {"norm_elementwise_affine": False, "attention_bias": True}
    only = form | {"interpolation_scale": 1}
    only |= dict.fromkeys(("caption_channels", "num_vector_embeds"))
    only |= dict.fromkeys(("double_self_attention", "only_cross_attention"), (False, None))
    checked: ClassVar = {"sample_size": SIDE, "in_channels": WIDTH, "out_channels": WIDTH, "cross_attention_dim": WIDTH}
    checked |= {"num_embeds_ada_norm": Key(int, 1, 10**6), "patch_size": Key(int, 1, 64), "freq_shift": Key(int, 0, 1)}
    checked |= {"norm_eps": Key(float, 1e-12, 1.0)}
    unused = frozenset(("dropout", "norm_num_groups", "upcast_attention", "use_linear_projection", "attention_type"))
    unused |= {"use_additional_conditions"}
    nulls = ("num_embeds_ada_norm",)

    def misfits(self, table: Table) -> Iterator[str]:
        settings = self.settings_of(table)
        _, heads, width = settings.shape
        if settings.positions == "sine" and heads * width % 4:
            yield "attention_head_dim: heads times their width must be a multiple of 4, for the 2-D sinusoidal positions"
        yield from misplaced(settings.position_width, heads * width)
        yield from unreachable(settings.leaves, table["num_layers"])
        if (side := table["sample_size"]) % table["patch_size"]:
            yield f"patch_size: {table['patch_size']} does not divide sample_size {side}"
        yield from of_blocks(settings, side)

    def shapes(self, table: Table) -> dict[str, tuple[int, ...]]:
        width, patch = table["num_attention_heads"] * table["attention_head_dim"], table["patch_size"]
        shapes = {"pos_embed.proj.weight": (width, table["in_channels"], patch, patch)}
        if classes := self.classes(table):
            shapes |= {"transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": (classes + 1, width)}
        return shapes

    def conditions(self, table: Table) -> dict[str, Array]:
        if classes := self.classes(table):
            return {"encoder_hidden_states": Array(("batch", 1, classes + 1), of=HIDDEN)}
        return super().conditions(table)

    def graphs(self, folder: str, table: Table) -> dict[str, Any]:
        return super().graphs(folder, {**table, "out_channels": table["in_channels"]})  # a learned variance is left out

    def reduction(self, table: Table) -> int:
        return int(table["patch_size"])

    def middle(self, table: Table) -> tuple[str, int]:
        width = table["num_attention_heads"] * table["attention_head_dim"]
        return f"transformer_blocks.{table['num_layers'] // 3}", width  # the paper's eighth of 28 (Yu et al. 2025)

    def classes(self, table: Table) -> int:
        return 0 if table.get("cross_attention_dim") else table["num_embeds_ada_norm"]

    def heads(self, cfg: Config) -> int:
        return cfg.network.shape[1]

    def undivided(self, settings: DiT) -> list[str]:
        common = {"qk_norm": settings.qk_norm, "attention": "gated" in settings.attentions()}
        return [name for name, has in (common | {"positions": settings.positions == "relative"}).items() if has]

    def describe(self, cfg: Config, widths: Mapping[str, int]) -> dict[str, Any]:
        settings, width = cfg.network, widths[HIDDEN]
        layers, heads, head = settings.shape
        table = {"_class_name": self.library[1], "num_embeds_ada_norm": width - 1, "patch_size": settings.patch_size}
        table |= {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head} | self.form
        if cfg.text_encoder.kind != "class":  # which is diffusers' Transformer2DModel
            own = {"_class_name": "Transformer2DModel", "num_embeds_ada_norm": 1, "cross_attention_dim": width}
            table |= own | {"interpolation_scale": 1}
        return table | cfg.latents | self.unusual(settings)

    def settings_of(self, table: Table) -> DiT:
        """The settings of a table's sizes, by the paper's name where it has one."""
        sizes = table["num_layers"], table["num_attention_heads"], table["attention_head_dim"]
        name = next((name for name, known in SIZES.items() if known == sizes), None)
        settings = DiT(name, table["patch_size"]) if name else DiT("custom", table["patch_size"], *sizes)
        own = {f.name for f in fields(DiT) if f.metadata["own"]}
        return replace(settings, **{k: v for k, v in table.items() if k in own})

    def grown(self, cfg: Config, to: Growth) -> DiT:
        """Heads keep their width, and tokens the positions that they had."""
        s: DiT = cfg.network
        layers, heads, head = s.shape
        width, side = s.position_width or heads * head, s.position_side or cfg.latents["sample_size"]
        return replace(
            s,
            size="custom",
            num_layers=to.layers or layers,
            num_attention_heads=sum(to.each) // head or heads,
            attention_head_dim=head,
            position_side=side if to.resolution else s.position_side,
            position_width=width if to.each else s.position_width,
        )

    def ungrown(self, cfg: Config, to: Growth) -> Iterator[str]:
        yield from super().ungrown(cfg, to)
        layers, heads, head = cfg.network.shape
        if to.layers and to.layers <= layers:
            yield f"layers {to.layers} are no more than the {layers} of dit.num_layers"
        if to.each and (len(to.each) > 1 or not times(sum(to.each), heads * head)):
            yield f"widths {[*to.each]} are not twice, 4 times, ... dit.num_attention_heads × attention_head_dim, {heads * head}"

    def conflicts(self, cfg: Config) -> Iterator[str]:
        s: DiT = cfg.network
        yield from misplaced(s.position_width, s.shape[1] * s.shape[2])
        yield from unreachable(s.leaves, s.shape[0])
        if s.exits and cfg.train.stage("distill").steps:
            yield "exits: the stage train.distill teaches no heads when to leave; set train.distill.steps 0, or no exits"
        _, heads, width = s.shape
        if s.patch_size not in (2, 4, 8):
            yield f"patch_size: {s.patch_size} is none of 2, 4, 8"
        elif cfg.latents["sample_size"] % s.patch_size:
            yield f"patch_size: {s.patch_size} does not divide the latents' side {cfg.latents['sample_size']}"
        if s.positions == "sine" and heads * width % 4:
            yield f"attention_head_dim: {heads} heads × {width} must be a multiple of 4, for the 2-D sinusoidal positions"
        yield from of_blocks(s, cfg.latents["sample_size"])


def of_blocks(s: DiT, side: int) -> Iterator[str]:
    """Conflicts between settings of a DiT's blocks, for latents of `side` a side."""
    layers = s.shape[0]
    if isinstance(s.attention, tuple) and len(s.attention) > layers:
        yield f"attention: a list of {len(s.attention)} for num_layers {layers}"
    kinds = s.attentions()
    yield from spatial.misfits(s, ((kind, side // s.patch_size, 4) for kind in kinds))
    apart = next((f"attention {kind}" for kind in kinds if kind in ("window", "strided")), "")
    if s.conditioning == "in_context" and (apart or s.positions == "relative"):
        yield f"conditioning: in_context adds tokens without a place, which {apart or 'positions relative'} asks for"


def unreachable(exits: tuple[int, ...], layers: int) -> Iterator[str]:
    """Why a network of so many blocks cannot be left after some."""
    if beyond := [n for n in exits if not 0 < n < layers]:
        yield f"exits: {beyond[0]} is not before the last of num_layers, {layers}"


def misplaced(positions: int, width: int) -> Iterator[str]:
    """Why tokens of a width cannot have positions of another, where it is not 0."""
    if positions and (positions % 4 or width % positions):
        yield f"position_width: {positions} is no multiple of 4 that divides the width of tokens, {width}"


def is_shared(tensors: Mapping[str, Any]) -> bool:
    """Whether all blocks embed time and class by equal tensors, so that one module can hold them."""
    for name, tensor in tensors.items():
        _, found, rest = name.partition(".norm1.emb.")
        first = tensors.get(f"transformer_blocks.0.norm1.emb.{rest}") if found else tensor
        if first is not tensor and not (first is not None and first.shape == tensor.shape and (first == tensor).all()):
            return False
    return True
