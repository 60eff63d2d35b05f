"""What is chosen for images of many kinds on machines of two; given keys are kept; reasons are read back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tinydiff import config
from tinydiff.choices import GOOD, Machine, choose, machine
from tinydiff.data.facts import Facts
from tinydiff.schema import flat, reasons_of, to_toml

CPU, GPU = Machine(2), Machine(16, "a GPU")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def facts(count: int = 400, side: int = 200, wide: float = 1.0, words: int = 3, each: int = 1) -> Facts:
    """Images of one shape, `each` with so many captions of so many words."""
    sizes = np.tile([round(side * wide), side], (count, 1))
    captions = [
        [" ".join(WORDS[(i + j + k) % 10] for k in range(words)) + f" {i}" for j in range(each)] for i in range(count)
    ]
    return Facts(count, sizes, captions, "images", [])


def chosen(of: Facts, on: Machine = CPU, good: float = 30.0, **given: object) -> config.Config:
    """The configuration of a run, which is a sound one."""
    keys = {name.replace("__", "."): value for name, value in given.items()}
    made = choose(of, on, keys, lambda side: good)
    assert not made.values.keys() & keys.keys() and made.values.keys() == made.reasons.keys()
    sets = [f"{k}={json.dumps(v)}" for k, v in (made.values | keys).items()]
    return config.load(None, sets)


ROWS = {  # of images and machine -> keys
    "large on a CPU": (
        facts(),
        CPU,
        {"data.resolution": 64, "autoencoder.path": "general", "train.autoencoder.steps": 0},
    ),
    "large on a GPU": (facts(side=900), GPU, {"data.resolution": 256, "unet.block_out_channels": (128, 256, 384)}),
    "many on a GPU": (facts(9000, 128), GPU, {"data.resolution": 128, "unet.block_out_channels": (192, 384, 576)}),
    "icons": (facts(side=32), CPU, {"data.resolution": 32, "autoencoder.path": "", "train.autoencoder.batch_size": 16}),
    "digits": (facts(side=28), CPU, {"data.resolution": 32}),
    "tiny": (facts(side=9), CPU, {"data.resolution": 16}),
    "few": (facts(12), CPU, {"train.denoiser.batch_size": 2}),
    "one": (facts(1), CPU, {"train.denoiser.batch_size": 1}),
    "squares": (facts(), CPU, {"data.max_aspect_ratio": 1.0}),
    "wide": (facts(wide=2), CPU, {"data.max_aspect_ratio": 2.0, "data.bucket_step": 16}),
    "panoramas": (facts(wide=3), GPU, {"data.max_aspect_ratio": 3.0, "data.bucket_step": 32}),
    "translations": (facts(each=40), CPU, {"data.max_captions": 1}),
    "captions by several people": (facts(each=5), CPU, {"data.max_captions": 0}),
    "short captions": (facts(words=1), CPU, {"text_encoder.max_position_embeddings": 16}),
    "long captions": (facts(words=30), CPU, {"text_encoder.max_position_embeddings": 40}),
    "endless captions": (facts(words=200), CPU, {"text_encoder.max_position_embeddings": 77}),
}


@pytest.mark.parametrize("row", ROWS)
def test_what_is_chosen(row):
    of, on, wanted = ROWS[row]
    values = flat(chosen(of, on))
    assert {key: values[key] for key in wanted} == wanted
    assert values["train.time"] >= 1800


def test_of_translations_the_first_alone_counts():
    """Words that only the others have make no vocabulary, unless all of them are asked for."""
    of = facts(each=1)
    many = Facts(
        of.count,
        of.sizes,
        [[*each, *(f"mot {i} {j}" for j in range(30))] for i, each in enumerate(of.captions)],
        "",
        [],
    )
    assert many.each == 31 and many.first(1).captions == of.captions and many.first(0).captions == many.captions
    assert chosen(many).text_encoder == chosen(of).text_encoder
    assert chosen(many, data__max_captions=0).data.max_captions == 0


def test_captions_that_are_cut_are_counted():
    made = choose(facts(words=200), CPU, {}, lambda side: 30)
    assert "400 of 400 are cut" in made.reasons["text_encoder.max_position_embeddings"]
    assert "none is cut" in choose(facts(), CPU, {}, lambda side: 30).reasons["text_encoder.max_position_embeddings"]


def test_steps_that_are_given_are_not_laid_by_time():
    assert chosen(facts(), train__denoiser__steps=500).train.time == 0
    assert chosen(facts(), train__autoencoder__steps=0).train.time > 0


def test_an_autoencoder_that_is_not_good_enough_is_tuned():
    cfg = chosen(facts(), good=GOOD - 1)
    assert cfg.train.stage("autoencoder").steps > 0 and cfg.train.stage("autoencoder").lr == 3e-4


GIVEN = [
    {"data__resolution": 48},
    {"data__resolution": 128},
    {"train__time": 60},
    {"train__denoiser__steps": 500, "train__autoencoder__steps": 0, "train__time": 0},
    {"unet__block_out_channels": [32, 64]},
    {"autoencoder__block_out_channels": [8, 16, 16]},
    {"denoiser__kind": "dit"},
    {"denoiser__kind": "dit", "text_encoder__kind": "class"},
    {"text_encoder__hidden_size": 96},
    {"text_encoder__vocab_size": 600},
    {"train__denoiser__batch_size": 3, "train__autoencoder__steps": 5},
    {"data__max_aspect_ratio": 1.0},
    {"data__max_aspect_ratio": 2.0, "data__bucket_step": 16},
    {"data__max_aspect_ratio": 1.5},
]


@pytest.mark.parametrize("given", GIVEN, ids=map(str, GIVEN))
@pytest.mark.parametrize("on", [CPU, GPU], ids=["cpu", "gpu"])
def test_what_is_given_is_kept_and_the_rest_fits_it(given, on):
    values = flat(chosen(facts(wide=2), on, **given))
    for name, value in given.items():
        found = values[name.replace("__", ".")]
        assert (list(found) if isinstance(found, tuple) else found) == value


def test_reasons_are_the_comments_of_keys_and_are_read_back(tmp_path):
    reasons = {"data.resolution": "half; of # them  # chosen: so", "train.denoiser.steps": "time\nlaid it"}
    path = tmp_path / "tinydiff.toml"
    cfg = config.load(None, ['data.path="a  # chosen: b"'])
    path.write_text(to_toml(cfg, reasons=reasons))
    assert config.load(path) == cfg
    found = reasons_of(path)
    assert found == {key: " ".join(why.split()) for key, why in reasons.items()}
    assert not reasons_of(tmp_path / "none")
    path.write_text(to_toml(cfg, reasons={key: f"why {key} [it] is" for key in flat(cfg)}))
    assert reasons_of(path) == {key: f"why {key} [it] is" for key in flat(cfg)}


def test_a_machine_is_what_a_run_uses_of_it(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert machine().said == machine("cuda").said == "a card" and machine("cpu").gpu == ""
    assert machine("cpu").said in ("1 CPU core", f"{machine().cores} CPU cores")
