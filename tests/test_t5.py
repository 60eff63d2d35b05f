"""The T5 encoder against transformers with the same random weights, in torch and in onnxruntime."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tensors import randomise, same
from texts import unpadded

from tinydiff import export
from tinydiff.checkpoints.folder import Model
from tinydiff.files import read_json
from tinydiff.models.t5 import T5Encoder, relative_buckets
from tinydiff.networks import network_of
from tinydiff.networks.network import pick
from tinydiff.networks.text import TEXT_ENCODERS, T5Config

CONFIGS = {
    "v1.0": T5Config(99, 24, 5, 40, 3, 4, 8, 20),
    "v1.1": T5Config(120, 16, 8, 24, 2, 3, 32, 128, 1e-3, "gated-gelu", pad_token_id=3),
}


def their(cfg: T5Config, kind: str = "T5EncoderModel"):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, kind)(transformers.T5Config(**vars(cfg))).eval()
    randomise(model)
    return model


def prompts(cfg: T5Config, lengths: tuple[int, ...], width: int) -> torch.Tensor:
    """Random tokens (B, T), each row padded behind its length."""
    ids = torch.randint(4, cfg.vocab_size, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = cfg.pad_token_id
    return ids


def random_encoder(name: str) -> T5Encoder:
    model = T5Encoder(CONFIGS[name]).eval()
    randomise(model)
    return model


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lengths", [(7, 7), (1, 30), (300, 299)], ids=["whole", "padded", "far"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_encoder_is_that_of_transformers(name, lengths):
    cfg, theirs = CONFIGS[name], their(CONFIGS[name])
    ours = T5Encoder(cfg)
    ours.load_state_dict(TEXT_ENCODERS["t5"].renamed(theirs.state_dict()), strict=True)
    ids = prompts(cfg, lengths, max(lengths))
    mask = (ids != cfg.pad_token_id).long()
    states, pooled = ours(ids)
    wanted = theirs(ids, attention_mask=mask).last_hidden_state
    same(states, wanted)
    same(pooled, torch.stack([row[:length].mean(0) for row, length in zip(wanted, lengths, strict=True)]))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["T5EncoderModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("name", CONFIGS)
def test_folders_of_transformers_load(tmp_path, name, kind):
    """Whole or only the encoder, in shards; the configuration is what `config.json` says of it."""
    theirs = their(CONFIGS[name], kind)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = set(read_json(tmp_path / "model.safetensors.index.json")["weight_map"].values())
    assert len(shards) > 1
    tensors = {key: value for shard in shards for key, value in load_file(tmp_path / shard).items()}
    table = json.loads((tmp_path / "config.json").read_text())
    network = network_of("text_encoder", table)
    assert network is TEXT_ENCODERS["t5"] and pick(T5Config, network.read(table)) == CONFIGS[name]
    ours = network.build(table)
    ours.load_state_dict(TEXT_ENCODERS["t5"].renamed(tensors), strict=True)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])


def test_the_embedding_table_goes_by_either_name():
    table, other = torch.ones(2), torch.zeros(2)
    norm = {"encoder.final_layer_norm.weight": other}
    for names in (["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]):
        file = {f"{name}.weight": table for name in names} | norm | {"lm_head.weight": other}
        assert TEXT_ENCODERS["t5"].renamed(file) == {"shared.weight": table} | norm


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("count", "reach"), [(32, 128), (8, 20), (64, 256), (12, 30), (33, 100), (4, 2)])
def test_buckets_are_those_of_transformers(count, reach):
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(-3 * reach, 3 * reach + 1)
    wanted = T5Attention._relative_position_bucket(offset, True, count, reach)
    assert torch.equal(relative_buckets(count, reach)[offset.clamp(-reach, reach) + reach], wanted)


def test_buckets_by_hand():
    # of 8, 4 behind the query: 0, 1, 2 to 3, the rest; the border is at 2 sqrt(8 / 2) = 4
    assert relative_buckets(8, 8).tolist() == [3] * 5 + [2, 2, 1, 0, 5, 6, 6] + [7] * 5


@pytest.mark.parametrize("change", [{"relative_attention_num_buckets": 3}, {"relative_attention_max_distance": 8}])
def test_buckets_without_room_are_refused(change):
    with pytest.raises(ValueError, match="do not suit"):
        T5Encoder(T5Config(num_layers=1, vocab_size=9, **change))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padding_changes_nothing(name):
    model, cfg = random_encoder(name), CONFIGS[name]
    ids = prompts(cfg, (9, 9), 9)
    unpadded(model, ids, cfg.pad_token_id)


@torch.no_grad()
def test_only_the_distance_counts_and_far_is_as_far_as_farther():
    model = random_encoder("v1.0")
    positions = model.encoder.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias")
    bias = positions(60)
    assert bias.shape == (1, 4, 60, 60)
    assert torch.equal(bias[..., 1:, 1:], bias[..., :-1, :-1])
    assert torch.equal(bias[..., 0, 20:], bias[..., :1, 20:21].expand(1, 4, 1, 40)[:, :, 0])
    assert not torch.equal(bias, bias.mT)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_learns(name):
    model = random_encoder(name)
    model(prompts(CONFIGS[name], (30, 12), 30))[0].square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# In onnxruntime


@pytest.mark.parametrize("name", CONFIGS)
def test_onnxruntime_agrees(monkeypatch, name):
    """One graph at batches and lengths other than the traced ones, beyond the farthest distance and with padding."""
    import onnx_ir as ir
    import onnxruntime

    cfg, model = CONFIGS[name], random_encoder(name)
    monkeypatch.setattr(export, "examples", lambda *_: {"input_ids": prompts(cfg, (16, 9), 16)})
    vae = {"block_out_channels": [8], "latent_channels": 4}
    configs = {
        "text_encoder": {"model_type": "t5", **vars(cfg)},
        "unet": {"cross_attention_dim": cfg.d_model},
        "vae": vae,
    }
    graph = export.translate("text_encoder", Model(configs, {"text_encoder": model}, {}), export.OPSET)
    assert set(graph.graph.initializers) >= set(model.state_dict())
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    for lengths in [(1,), (5, 7, 2), (200, 30)]:
        ids = prompts(cfg, lengths, max(lengths))
        with torch.no_grad():
            wanted = [value.numpy() for value in model(ids)]
        got = session.run(["last_hidden_state", "pooler_output"], {"input_ids": ids.numpy()})
        assert max(export.relative(a, b) for a, b in zip(wanted, got, strict=True)) <= 1e-4
