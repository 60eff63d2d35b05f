"""Words of file names, what is put before and after captions, and tags in another order: against rules stated here."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import opened

from tinydiff import config
from tinydiff.config import Data
from tinydiff.data.wording import retold, worded, words_of
from tinydiff.training import advice, encoding
from tinydiff.training.denoiser import DenoiserTask

READABLE = {
    "red_square": "red square",
    "IMG_20230405_103000-old-town": "old town",
    "00012-3456789-a photo of a cat": "a photo of a cat",
    "TabbyCat12": "Tabby Cat",
    "550e8400-e29b-41d4-beef-446655440000 heron": "heron",
    "heron.3f9a2b71c0d4": "heron",
    "1024x768_sunset(2)": "sunset",
    "1girl, solo, 4k": "girl, solo,",
    "Ünïcode_Straße": "Ünïcode Straße",
    "l'été à Paris": "l'été à Paris",
    "猫_003": "猫",
}
EMPTY = [
    "IMG_1234",
    "DSC00012",
    "20230405",
    "deadbeef01",
    "3f9a2b71c0d4",
    "PXL_20230405",
    "Screenshot 2023-05-04 at 12.30.45",
]
EMPTY += ["WhatsApp Image 2023-05-04 at 12.30.45", "photo (3)", "untitled", "", "___"]


@pytest.mark.parametrize("stem", READABLE)
def test_names_are_read_as_words(stem):
    assert words_of(stem) == READABLE[stem]


@pytest.mark.parametrize("stem", EMPTY)
def test_names_of_cameras_and_numbers_have_no_words(stem):
    with pytest.raises(ValueError, match="no words in its name"):
        words_of(stem)


@given(st.text(max_size=30))
def test_any_name_gives_words_without_digits_or_is_left_out(stem):
    try:
        assert words_of(stem).strip() and not any(c in "0123456789" for c in words_of(stem))
    except ValueError as error:
        assert str(error) == "no words in its name"


def test_what_is_put_before_and_after():
    captions = ["a hen", "a  bird"]
    assert worded(captions, Data()) == captions
    assert worded(captions, Data(max_captions=1)) == ["a hen"]
    assert worded(captions, Data(prefix="a stamp of ", suffix=", 1990")) == [
        "a stamp of a hen, 1990",
        "a stamp of a bird, 1990",
    ]


TAGS = st.lists(st.text("abc ", min_size=1, max_size=3).filter(str.strip), max_size=6)


@given(TAGS, st.booleans(), st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_tags_are_those_of_the_caption_and_the_first_stay(tags, shuffle, keep, dropout, seed):
    plain, data = [tag.strip() for tag in tags], Data(shuffle_tags=shuffle, keep_tags=keep, tag_dropout=dropout)
    told = retold(",".join(tags), data, np.random.default_rng(seed))
    assert told == retold(", ".join(plain), data, np.random.default_rng(seed))
    seen = told.split(", ") if told else []
    assert seen[:keep] == plain[:keep] or (keep == 0 and plain)
    assert not Counter(seen) - Counter(plain) and bool(seen) == bool(plain)
    if not dropout:
        assert Counter(seen) == Counter(plain)
    if not shuffle:
        places = iter(plain)
        assert all(tag in places for tag in seen)  # a subsequence
    if dropout == 1:
        assert seen == (plain[:keep] or plain[:1])


def test_orders_are_equally_likely_and_tags_left_out_as_often_as_asked():
    rng, data = np.random.default_rng(0), Data(shuffle_tags=True, keep_tags=1)
    orders = Counter(retold("x, a, b, c", data, rng) for _ in range(1200))
    assert len(orders) == 6 and all(150 < count < 250 for count in orders.values())
    data = Data(keep_tags=1, tag_dropout=0.25)
    kept = Counter(tag for _ in range(1000) for tag in retold("x, a, b", data, rng).split(", "))
    assert kept["x"] == 1000 and all(700 < kept[tag] < 800 for tag in "ab")


TOLD = Data(shuffle_tags=True, keep_tags=1, tag_dropout=0.2, suffix=", one, two, three")


@pytest.fixture
def told_config(tiny_config):
    keys = ("shuffle_tags", "keep_tags", "tag_dropout", "suffix")
    data = replace(tiny_config.data, **{key: getattr(TOLD, key) for key in keys})
    return replace(tiny_config, data=data)


def test_training_reads_them_by_seed_step_and_row(told_config, tiny_model, tmp_path):
    one, again = (DenoiserTask(opened(told_config, tiny_model, tmp_path / name)) for name in "ab")
    drawn = [one.draw(step, row, 3, (1, 1, 1))[1] for step in range(20) for row in range(2)]
    assert drawn == [again.draw(step, row, 3, (1, 1, 1))[1] for step in range(20) for row in range(2)]
    caption = one.data.source.captions(3)[0]
    assert caption.endswith(", one, two, three")
    assert len(set(drawn)) > 10 and all(not each or each.startswith(caption.split(",")[0]) for each in drawn)
    plain = replace(told_config, data=replace(told_config.data, shuffle_tags=False, tag_dropout=0.0))
    other = DenoiserTask(opened(plain, tiny_model, tmp_path / "c"))
    for step in range(5):  # levels and noise are those of a run without
        (level, _, noise), (usual, _, same) = (task.draw(step, 0, 3, (4, 2, 2)) for task in (one, other))
        assert level == usual and np.array_equal(noise, same)


def test_what_is_frozen_encodes_them_as_they_are_drawn(told_config, tiny_model, tmp_path):
    """No file is cached, and what it says of a caption is what the cache of a run without would."""
    run = opened(told_config, tiny_model, tmp_path / "a")
    plain = opened(
        replace(told_config, data=replace(told_config.data, shuffle_tags=False, tag_dropout=0.0)),
        tiny_model,
        tmp_path / "b",
    )
    for each in (run, plain):
        for encoder in each.model.text_encoders.values():
            encoder.requires_grad_(False).eval()
    anew, cached = encoding.captions(run), encoding.captions(plain)
    said = [plain.data.source.captions(i)[0] for i in range(3)]
    ours, theirs = anew.rows(said), cached.rows(said)
    assert ours.keys() == theirs.keys() and not anew.paths and not list((tmp_path / "a").glob("texts/*"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    assert anew.rows(["two, a hen"]).keys() == ours.keys()


def test_keys_without_effect_are_said():
    cases = {"data.keep_tags=1": "neither data.shuffle_tags", "data.prefix=x": "data.path is 'shapes'"}
    for key, reason in cases.items():
        assert any(reason in line for line in advice.of_settings(config.load(None, [key])))
    tags = config.load(None, ["data.keep_tags=1", "data.shuffle_tags=true"])
    assert not any("keep_tags" in line for line in advice.of_settings(tags))
