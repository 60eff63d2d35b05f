"""What reads a prompt, without torch: CLIP's tower, T5's and BERT's encoders, and class labels, which need no network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinydiff.errors import ModelError
from tinydiff.files import read_json, shown
from tinydiff.networks.network import HIDDEN, POOLED, SIDE, WIDTH, Array, Graph, Table, pick
from tinydiff.networks.network import TextEncoder as Network
from tinydiff.schema import Key, key

if TYPE_CHECKING:
    from torch import Tensor

    from tinydiff.config import Config
    from tinydiff.data.dataset import Source

TEXT_ENCODERS: dict[str, Network] = {}  # by `text_encoder.kind`; filled at the end of this module
MOST_TOKENS = 2**22
TOKENS = Key(int, 1, MOST_TOKENS)
PLACES, PROJECTION = "position_ids", "text_projection.weight"
BERT_PLACES = "embeddings.position_ids"
NORMS = {"gamma": "weight", "beta": "bias"}
BERT_NORM = re.compile(rf"(?<=LayerNorm\.)(?:{'|'.join(NORMS)})$")
CLIP_BARE = ("embeddings.", "encoder.layers.", "final_layer_norm.")  # transformers 5 drops the prefix


@dataclass(frozen=True)
class TextEncoder:
    kind: str = key(
        "clip",
        "CLIP's tower, trained; T5's encoder or BERT's of the folder `path`, frozen; or captions as classes (dit only)",
        choices=TEXT_ENCODERS,
    )
    path: str = key(
        "", "t5, bert: a folder of transformers, sentence-transformers, or with text_encoder/ and tokenizer/"
    )
    vocab_size: int = key(1024, "most tokens of the byte-pair tokenizer trained on the captions", 514, 1_000_000)
    hidden_size: int = key(192, "width", 8, 2**16)
    intermediate_size: int = key(384, "width inside a block's multilayer perceptron", 8, 2**20)
    num_hidden_layers: int = key(3, "transformer blocks", 1, 64)
    num_attention_heads: int = key(3, "attention heads; must divide hidden_size", 1, 2**12)
    max_position_embeddings: int = key(16, "tokens of a prompt, start and end included", 4, 4096)
    hidden_act: str = key("quick_gelu", "activation", choices=("quick_gelu", "gelu"))


@dataclass(frozen=True)
class T5Config:
    """The keys of transformers' `config.json` that shape the encoder, each with what its absence means there."""

    vocab_size: int = key(32128, "", 1, MOST_TOKENS)
    d_model: int = key(512, "", 1, 2**16)
    d_kv: int = key(64, "", 1, 2**14)
    d_ff: int = key(2048, "", 1, 2**20)
    num_layers: int = key(6, "", 1, 256)
    num_heads: int = key(8, "", 1, 2**12)
    relative_attention_num_buckets: int = key(32, "", 1, 2**12)
    relative_attention_max_distance: int = key(128, "", 2, 2**16)
    layer_norm_epsilon: float = key(1e-6, "", 1e-12, 1.0)
    feed_forward_proj: str = key("relu", "", choices=("relu", "gated-gelu"))
    pad_token_id: int = key(0, "", 0, MOST_TOKENS)


@dataclass(frozen=True)
class BertConfig:
    """The keys of transformers' `config.json` that shape the encoder, each with what its absence means there."""

    vocab_size: int = key(30522, "", 1, MOST_TOKENS)
    hidden_size: int = key(768, "", 1, 2**16)
    num_hidden_layers: int = key(12, "", 1, 256)
    num_attention_heads: int = key(12, "", 1, 2**12)
    intermediate_size: int = key(3072, "", 1, 2**20)
    max_position_embeddings: int = key(512, "", 1, 2**16)
    type_vocab_size: int = key(2, "", 1, 2**10)
    layer_norm_eps: float = key(1e-12, "", 1e-15, 1.0)
    pad_token_id: int = key(0, "", 0, MOST_TOKENS)


def undivided(table: Table) -> Iterator[str]:
    """What is wrong with a table whose attention heads do not divide its width."""
    heads, width = table["num_attention_heads"], table.get("hidden_size", 0)
    if width % heads:
        yield f"num_attention_heads: {heads} heads do not divide hidden_size {width}"


class ClipNetwork(Network):
    single_file = True
    vectors = "text_model.embeddings.token_embedding.weight"
    left_out: tuple[str, ...] = (PLACES, PROJECTION)  # ends of names of tensors that it does not use
    name, kind, title = "text_encoder", "clip", "CLIP"
    longest = "tinydiff.text.tokenizer:CLIP_LENGTH"
    module = "tinydiff.models.text_encoder:TextEncoder"
    tokenizer = "tinydiff.text.tokenizer:Tokenizer"
    tokenizer_library = ("transformers", "CLIPTokenizer")
    library = ("transformers", "CLIPTextModel")
    settings = TextEncoder
    defaults = {"num_hidden_layers": 12, "num_attention_heads": 8, "hidden_act": "quick_gelu", "eos_token_id": 49407}
    only = {"layer_norm_eps": 1e-5, "model_type": "clip_text_model"}
    checked = {"vocab_size": TOKENS, "eos_token_id": Key(int, 0, MOST_TOKENS), "max_position_embeddings": SIDE}
    checked |= {"hidden_size": WIDTH, "intermediate_size": Key(int, 1, 2**20), "clip_skip": Key(int, 0, 256)}
    spared = 0  # blocks that never count in what a token gives

    def misfits(self, table: Table) -> Iterator[str]:
        yield from undivided(table)
        if (skip := table.get("clip_skip", 0)) > (most := self.most_skipped(table)):
            yield f"clip_skip: {skip} of {table['num_hidden_layers']} blocks; give at most {most}"

    def most_skipped(self, table: Table) -> int:
        """How many blocks can be left out of what a token gives."""
        return self.complete(table)["num_hidden_layers"] - 1 - self.spared

    def shapes(self, table: Table) -> dict[str, tuple[int, ...]]:
        width, place = table["hidden_size"], "text_model.embeddings.{}_embedding.weight"
        tables = {"token": (table["vocab_size"], width), "position": (table["max_position_embeddings"], width)}
        return {place.format(name): shape for name, shape in tables.items()}

    def describe(self, cfg: Config, tokenizer: Any) -> dict[str, Any]:
        ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos}
        own = {key: value for key, value in asdict(cfg.text_encoder).items() if key not in ("kind", "path")}
        own |= ids | {"vocab_size": tokenizer.vocab_size}
        return {"architectures": [self.library[1]], "model_type": "clip_text_model"} | own

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: tensor for name, tensor in super().renamed(tensors).items() if not name.endswith(self.left_out)}
        return {f"text_model.{name}" if name.startswith(CLIP_BARE) else name: tensor for name, tensor in kept.items()}

    def make_tokenizer(self, cfg: Config, source: Source) -> Any:
        text = cfg.text_encoder
        captions = [caption for i in range(min(len(source), 200_000)) for caption in source.captions(i)]
        return self.tokenizer_class.train(captions, text.vocab_size, text.max_position_embeddings)


class TowerNetwork(ClipNetwork):
    """The first text encoder of Stable Diffusion XL, in a table that says PENULTIMATE."""

    module = "tinydiff.models.text_encoder:Tower"
    spared = 1

    def pooled(self, table: Table) -> int:
        return 0

    def graphs(self, folder: str, table: Table) -> dict[str, Graph]:
        """As optimum names the outputs."""
        graph, hidden = (
            super().graphs(folder, table)[folder],
            table["num_hidden_layers"] - 1 - table.get("clip_skip", 0),
        )
        outputs = {f"hidden_states.{hidden}": replace(graph.outputs[HIDDEN], of=HIDDEN)}
        if width := self.pooled(table):
            outputs["text_embeds"] = Array(("batch", width), of=POOLED)
        return {folder: replace(graph, outputs=outputs)}


class ProjectedNetwork(TowerNetwork):
    """The second one."""

    left_out = (PLACES,)
    module = "tinydiff.models.text_encoder:ProjectedTower"
    library = ("transformers", "CLIPTextModelWithProjection")
    defaults = ClipNetwork.defaults | {"projection_dim": 512}
    checked = ClipNetwork.checked | {"projection_dim": WIDTH}

    def pooled(self, table: Table) -> int:
        return table["projection_dim"]

    def shapes(self, table: Table) -> dict[str, tuple[int, ...]]:
        return super().shapes(table) | {PROJECTION: (table["projection_dim"], table["hidden_size"])}


PENULTIMATE = "_penultimate"  # key of a table: its hidden layer before the last is what counts
TOWERS = (TowerNetwork(), ProjectedNetwork())


class GivenNetwork(Network):
    """An encoder of `text_encoder.path`, frozen: of a folder of transformers, sentence-transformers or a diffusers pipeline."""

    frozen = True
    width_key = "hidden_size"

    def width(self, table: Table) -> int:
        return table.get(self.width_key, 0)

    def given(self, cfg: Config) -> Path:
        return self.places(cfg)[0]

    def places(self, cfg: Config) -> tuple[Path, Path]:
        """The folders of weights and tokenizer: one and the same, unless they are text_encoder/ and tokenizer/."""
        path = Path(cfg.text_encoder.path)
        one = next((each for each in (path, path / "0_Transformer") if (each / "config.json").is_file()), None)
        return (one, one) if one else (path / "text_encoder", path / "tokenizer")

    def found(self, cfg: Config) -> tuple[Path, Path]:
        """The `places`. Raises ModelError where there is no encoder."""
        places = self.places(cfg)
        if not (places[0] / "config.json").is_file():
            kinds = "of transformers, of sentence-transformers, or with text_encoder/ and tokenizer/"
            raise ModelError(
                f"{shown(cfg.text_encoder.path)}: holds no text encoder; text_encoder.path names a folder {kinds}"
            )
        return places

    def describe(self, cfg: Config, tokenizer: Any) -> dict[str, Any]:
        place, _ = self.found(cfg)
        table = read_json(place / "config.json")
        try:
            settings = asdict(pick(self.settings, self.read(table)))
        except (TypeError, ValueError) as error:
            raise ModelError(f"{shown(place)}: unsupported or incomplete config.json: {shown(error)}") from None
        for problem in self.disagreements(settings, tokenizer):
            raise ModelError(f"{shown(place)}: {problem}")
        return {"architectures": [self.library[1]], "model_type": self.kind} | settings

    def disagreements(self, table: Table, tokenizer: Any) -> Iterator[str]:
        """What its tokenizer and the length of prompts ask for, and it has not."""
        if (vectors := table["vocab_size"]) < tokenizer.vocab_size:
            yield f"has vectors of {vectors} pieces, its tokenizer {tokenizer.vocab_size}; name another text_encoder.path"
        if tokenizer.pad not in (None, table["pad_token_id"]):  # none of one that only stands in
            yield f"has padding of id {table['pad_token_id']}, its tokenizer {tokenizer.pad}; name another text_encoder.path"
        if (places := table.get("max_position_embeddings", tokenizer.max_length)) < tokenizer.max_length:
            yield f"reads {places} tokens; set text_encoder.max_position_embeddings to that or less"

    def make_tokenizer(self, cfg: Config, source: Source) -> Any:
        return self.tokenizer_class.load(self.found(cfg)[1], cfg.text_encoder.max_position_embeddings)


class T5Network(GivenNetwork):
    name, kind, title = "t5", "t5", "T5"
    longest = "tinydiff.text.sentencepiece:T5_LENGTH"
    module = "tinydiff.models.t5:T5Encoder"
    tokenizer = "tinydiff.text.sentencepiece:T5Tokenizer"
    tokenizer_library = ("transformers", "T5TokenizerFast")
    library = ("transformers", "T5EncoderModel")
    no_form = "text is read by T5 with its padding masked"
    settings = T5Config
    defaults = asdict(T5Config())
    only = {"model_type": "t5"}
    width_key = "d_model"

    def misfits(self, table: Table) -> Iterator[str]:
        count, reach = table["relative_attention_num_buckets"], table["relative_attention_max_distance"]
        if not 0 < count // 4 < reach:
            yield f"relative_attention_num_buckets: {count} do not suit a distance of {reach}"

    def shapes(self, table: Table) -> dict[str, tuple[int, ...]]:
        return {"shared.weight": (table["vocab_size"], table["d_model"])}

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a whole T5 the encoder; its table of embeddings goes by either of two names, or both."""
        tensors = super().renamed(tensors)
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
        table = kept.pop("encoder.embed_tokens.weight", None)
        return kept if table is None else {"shared.weight": table} | kept


class BertNetwork(GivenNetwork):
    name, kind, title = "bert", "bert", "BERT"
    longest = "tinydiff.text.wordpiece:BERT_LENGTH"
    module = "tinydiff.models.bert:BertEncoder"
    tokenizer = "tinydiff.text.wordpiece:BertTokenizer"
    tokenizer_library = ("transformers", "BertTokenizer")
    library = ("transformers", "BertModel")
    no_form = "text is read by BERT with its padding masked"
    settings = BertConfig
    defaults = asdict(BertConfig())
    only = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    only |= {"is_decoder": (False, None), "add_cross_attention": (False, None)}

    def misfits(self, table: Table) -> Iterator[str]:
        return undivided(table)

    def shapes(self, table: Table) -> dict[str, tuple[int, ...]]:
        rows = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
        return {f"embeddings.{k}_embeddings.weight": (table[v], table["hidden_size"]) for k, v in rows.items()}

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a BERT with a head the encoder, without its pooler; older files call a norm's weight and bias gamma and beta."""
        names = {name.removeprefix("bert."): tensor for name, tensor in super().renamed(tensors).items()}
        kept = {k: v for k, v in names.items() if k.startswith(("embeddings.", "encoder.")) and k != BERT_PLACES}
        return {BERT_NORM.sub(lambda old: NORMS[old[0]], name): tensor for name, tensor in kept.items()}


class ClassNetwork(Network):
    """A label is a prompt: its tokenizer gives a class number, and the vector is one-hot, so there is nothing to learn."""

    name, kind = "labels", "class"
    tokenizer = "tinydiff.text.labels:Labels"

    def describe(self, cfg: Config, tokenizer: Any) -> dict[str, Any]:
        return {"hidden_size": tokenizer.vocab_size}

    def graphs(self, folder: str, table: Table) -> dict[str, Graph]:
        return {}

    def make_tokenizer(self, cfg: Config, source: Source) -> Any:
        from tinydiff.text.labels import LEAST

        labels = (source.captions(i)[0] for i in range(len(source)))
        names = sorted({label.strip().lower(): label for label in labels if label.strip()}.values())
        return self.tokenizer_class(names, max(LEAST, len(names)))


def text_encoder_of(table: Table) -> Network:
    """The kind of a `config.json`; CLIP's where it says none."""
    if table.get(PENULTIMATE):
        return TOWERS[TOWERS[1].library[1] in (table.get("architectures") or ())]
    kinds = (row for row in TEXT_ENCODERS.values() if row.only.get("model_type", "") == table.get("model_type"))
    return next(kinds, TEXT_ENCODERS["clip"])


TEXT_ENCODERS |= {row.kind: row for row in (ClipNetwork(), T5Network(), BertNetwork(), ClassNetwork())}
