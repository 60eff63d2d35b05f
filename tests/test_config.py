"""Configuration: every mistake found, all at once, on one line; what is written is what is read."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from interpreters import ROOT

from tinydiff import config
from tinydiff.config import conflicts, load
from tinydiff.errors import UsageError
from tinydiff.schema import flat, to_toml
from tinydiff.stages import NONE

FITTED = {
    "block_out_channels",
    "down_block_types",
    "norm_num_groups",
    "attention_head_dim",
    "num_attention_heads",
    "hidden_size",
    "bucket_step",
    "captions",
    "tensor_parallel",
    "resolution",
    "accumulate",
    "zero_terminal_snr",
    "shift",
    "shift_side",
    "loss_weight",
    "optimizer",
    "kind",
    "patch_size",
    "image_channels",
    "levels",
    "calls",
    "middle_layers",
    "base",
    "learn",
    "adapter",
    "size",
    "grow",
    "position_width",
    "window",
    "stride",
    "learn_frequencies",
    "conditioning",
    "label",
    "image",
}  # keys that have to fit another key: left at their default


def values(kind: type) -> st.SearchStrategy:
    """Instances of a configuration dataclass with every free key anywhere in its range."""
    hints, parts = get_type_hints(kind), {}
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            parts[f.name] = values(hints[f.name])
        elif f.name not in FITTED and not (kind is config.TextEncoder and f.name == "path"):
            parts[f.name] = leaf(hints[f.name], f.metadata)
    return st.builds(kind, **parts)


def leaf(kind: type, meta) -> st.SearchStrategy:
    if meta["choices"]:
        return st.sampled_from(tuple(meta["choices"]))
    low, high = meta["low"], meta["high"]
    ranges = {int: lambda: st.integers(low, high), float: lambda: st.floats(low, high, allow_infinity=False)}
    one = {int | tuple[int, ...]: int, str | tuple[str, ...]: str}.get(kind, kind)
    return {**ranges, bool: st.booleans, str: st.text}[one]()


def error_of(text: str | bytes, tmp_path: Path, overrides: list[str] | None = None) -> str:
    """The message that a configuration file of this text gives."""
    path = tmp_path / "some.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError) as caught:
        load(path, overrides or [])
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 1000
    return message


def begun(cfg: config.Config) -> config.Config:
    """Without a model to begin with, nothing that is said of one; with one, what goes with it."""
    train = cfg.train
    if not train.base or train.adapter != NONE:
        train = replace(train, learn="all", adapter=train.adapter if train.base else NONE)
    return replace(cfg, train=train, autoencoder=replace(cfg.autoencoder, path="") if train.base else cfg.autoencoder)


@given(written=values(config.whole()).map(begun))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_back(written, tmp_path):
    assume(not list(conflicts(written)))
    (tmp_path / "a.toml").write_bytes(to_toml(written).encode())
    assert load(tmp_path / "a.toml") == written


def test_lists_are_read_back(tmp_path, tiny_config):
    (tmp_path / "a.toml").write_text(to_toml(tiny_config))
    assert load(tmp_path / "a.toml") == tiny_config


def test_default_configuration_stands_in_the_repository():
    assert (ROOT / "tinydiff.toml").read_text() == to_toml(DEFAULT)


def test_nothing_given_is_the_default():
    assert load() == config.make() == config.whole()()


def test_every_key_is_explained_in_the_file():
    lines = [line for line in to_toml(DEFAULT).splitlines() if "=" in line and not line.startswith("#")]
    assert len(lines) == len(flat(DEFAULT))
    assert all(len(line.partition("  # ")[2]) > 3 for line in lines)


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULT.train.seed = 1  # type: ignore[misc]


def test_a_part_of_a_table_leaves_the_rest(tmp_path):
    (tmp_path / "a.toml").write_text("[train.denoiser]\nlr = 0.5\n")
    read = load(tmp_path / "a.toml")
    assert read.train.denoiser == dataclasses.replace(DEFAULT.train.denoiser, lr=0.5)
    assert read.train.autoencoder == DEFAULT.train.autoencoder


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[trian]\nseed = 1", ["trian: unknown key", "'train'"]),
        ("[train.denoiser]\nbatchsize = 4", ["train.denoiser.batchsize: unknown key", "'batch_size'"]),
        ("[data]\nqqqq = 4", ["data.qqqq: unknown key", "there are: path, resolution"]),
        ("[train]\nseed = '1'", ["train.seed: expected int, got '1'"]),
        ("[train]\nseed = 1.0", ["train.seed: expected int, got 1.0"]),
        ("[train]\nseed = true", ["train.seed: expected int, got True"]),
        ("[data]\nflip = 1", ["data.flip: expected bool, got 1"]),
        ("[data]\nmax_bad_fraction = true", ["data.max_bad_fraction: expected float, got True"]),
        ("[data]\npath = 3", ["data.path: expected str, got 3"]),
        ("[data]\npath = 1979-05-27", ["data.path: expected str"]),
        ("data = 3", ["data: expected a table, got 3"]),
        (
            "[autoencoder]\nblock_out_channels = 32",
            ["autoencoder.block_out_channels: expected a list of one or more, got 32"],
        ),
        (
            "[autoencoder]\nblock_out_channels = []",
            ["autoencoder.block_out_channels: expected a list of one or more, got []"],
        ),
        ("[autoencoder]\nblock_out_channels = [32, '64']", ["block_out_channels: expected int, got '64'"]),
        ("[autoencoder]\nblock_out_channels = [32, 0]", ["block_out_channels: 0 is below 1"]),
        ("[unet]\ndown_block_types = ['DownBlock2d']", ["'DownBlock2d'", "did you mean 'DownBlock2D'"]),
        ("[data]\nresolution = 4", ["data.resolution: 4 is below 8"]),
        ("[data]\nresolution = 8192", ["data.resolution: 8192 is above 4096"]),
        ("[data]\nmax_bad_fraction = -0.1", ["data.max_bad_fraction: -0.1 is below 0"]),
        ("[train.denoiser]\nlr = nan", ["train.denoiser.lr: nan is not finite"]),
        ("[train.denoiser]\nlr = inf", ["train.denoiser.lr: inf is not finite"]),
        ("[data]\npath = ['a', '']", ["data.path: the name is empty"]),
        ("[data]\npath = ['shapes', 'a']", ["data.path: the built-in shapes go with no folder; write ./shapes"]),
        ("[data]\ncaptions = 'column: '", ["data.captions: unknown 'column: '; set files, names or column:NAME"]),
        ("[data]\nshuffle_tags = true\n[text_encoder]\nkind = 'class'\n[denoiser]\nkind = 'dit'", ["of a class the"]),
        ("[generate]\nsampler = 'dpm_2m'", ["generate.sampler: unknown name 'dpm_2m'", "'dpmpp_2m'"]),
        ("[diffusion]\nschedule = 'cosin'", ["diffusion.schedule: unknown name 'cosin'", "'cosine'"]),
    ],
)
def test_one_mistake_names_key_and_fix(text, parts, tmp_path):
    message = error_of(text, tmp_path)
    assert message.startswith(f"{tmp_path / 'some.toml'}: ")
    assert all(part in message for part in parts)


def test_all_mistakes_at_once(tmp_path):
    text = "[data]\nresolutoin = 1\nflip = 2\n[train.denoiser]\nlr = nan\n[generate]\nsampler = 'eular'\nsteps = 0"
    message = error_of(text, tmp_path)
    for part in (
        "data.resolutoin",
        "data.flip",
        "train.denoiser.lr",
        "generate.sampler",
        "generate.steps: 0 is below 1",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["data.resolution=18"], "data.resolution: 18 is no multiple of 4; nearest are 16 and 20"),
        (["autoencoder.norm_num_groups=3"], "autoencoder.norm_num_groups: 3 does not divide width 8"),
        (["unet.attention_head_dim=3"], "unet.attention_head_dim: 3 heads do not divide width 16"),
        (["unet.down_block_types=['DownBlock2D']"], "down_block_types: needs one entry for each"),
        (["unet.block_out_channels=[15, 30]"], "unet.block_out_channels: the first width"),
        (["text_encoder.num_attention_heads=5"], "text_encoder.num_attention_heads: does not divide"),
        (["train.autoencoder.steps=0"], "train.autoencoder.steps: with 0 there is nothing to make latents"),
        (["train.denoiser.accumulate=3"], "train.denoiser.accumulate: 3 does not divide batch_size 4"),
        (["diffusion.schedule=flow", "diffusion.prediction=epsilon"], "diffusion.prediction: flow goes with"),
        (["data.path="], "data.path: the name is empty"),
        (["train.validation_samples=1"], "train.validation_samples: one image has no spread"),
    ],
)
def test_keys_that_do_not_fit_together(overrides, part, tmp_path, tiny_config):
    assert part in error_of(to_toml(tiny_config), tmp_path, overrides)


def test_keys_of_a_file_that_do_not_fit_together(tmp_path):
    message = error_of("[data]\nresolution = 35", tmp_path)
    assert message.startswith(f"{tmp_path / 'some.toml'}: data.resolution: 35 is no multiple")


def test_even_the_default_fits_together():
    assert list(conflicts(DEFAULT)) == []


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.path=some where", "data.path", "some where"),
        ('data.path="quoted"', "data.path", "quoted"),
        ("data.path=a=b", "data.path", "a=b"),
        ("train.seed = 7", "train.seed", 7),
        ("train.denoiser.lr=1", "train.denoiser.lr", 1.0),
        ("train.denoiser.lr=1e-4", "train.denoiser.lr", 1e-4),
        ("data.flip=true", "data.flip", True),
        ("unet.block_out_channels=[64, 128]", "unet.block_out_channels", (64, 128)),
    ],
)
def test_set_changes_one_key(override, key, value):
    changed = {k: v for k, v in flat(load(None, [override])).items() if v != flat(DEFAULT)[k]}
    assert changed == {key: value} and type(changed[key]) is type(value)


def test_set_goes_over_the_file_and_the_last_one_wins(tmp_path):
    (tmp_path / "a.toml").write_text("[train]\nseed = 1\nkeep = 5\n")
    read = load(tmp_path / "a.toml", ["train.seed=2", "train.seed=3"])
    assert (read.train.seed, read.train.keep) == (3, 5)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.seed", "'train.seed' is not KEY=VALUE"),
        ("=1", "'=1' is not KEY=VALUE"),
        ("train.sede=1", "train.sede: unknown key (did you mean 'seed'?)"),
        ("train.warmup=1", "(there are: train.autoencoder.warmup, train.contrastive.warmup, train.denoiser.warmup, "),
        ("steps=1", "steps: unknown key (there are: train.autoencoder.steps, "),
        ("resolution=64", "resolution: unknown key (there are: data.resolution)"),
        ("train.seed=one", "train.seed: expected int, got 'one'"),
        ("train.seed=-1", "train.seed: -1 is below 0"),
        ("train.seed=" + "9" * 5000, "train.seed: expected int, got '999"),
        ("train=1", "train: expected a table, got 1"),
        ("train.seed.x=1", "train.seed: expected int, got {'x': 1}"),
        ("data.path=\udcff", "data.path: '\\udcff' is not valid Unicode"),
        ("train.a\nb=1", "train.'a\\nb': unknown key"),
    ],
)
def test_a_wrong_set_is_named(override, part):
    with pytest.raises(UsageError) as caught:
        load(None, [override])
    assert part in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_value_and_a_table_under_one_name():
    with pytest.raises(UsageError, match=r"train\.seed: set twice"):
        load(None, ["train=1", "train.seed=2"])


@pytest.mark.parametrize(
    "text",
    [
        "a = ",
        "[data]\nflip = true\nflip = false",
        "[data",
        "a = " + "[" * 200_000,
        "[data]\npath." + ".".join("a" * 3_000) + " = 1",
        "a" * 200_000,
        '"' + "k" * 200_000 + '" = 1',
        "[data]\nresolution = '" + "x" * 200_000 + "'",
        "[data]\npath = [" + "'x'," * 100_000 + "]",
        "[autoencoder]\nblock_out_channels = [" + "16," * 20_000 + "]",
        "[train]\nseed = " + "9" * 5_000,
        "[train]\nseed = 0x" + "f" * 50_000,
        "[train.denoiser]\nlr = 1" + "0" * 400,
        '"line\\nbreak" = 1',
        '"\\u001b[31m" = 1',
        b"\xff\xfe",
        "x = 1\n" + "#" * 1_000_000,
    ],
    ids=range(17),
)
def test_hostile_files_are_one_short_line(text, tmp_path):
    assert "some.toml" in error_of(text, tmp_path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UsageError, match="no such configuration"):
        load(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="directory"):
        load(tmp_path)


DEFAULT = load()


OLD = """[denoiser]
kind = "unet"
block_out_channels = [16, 32]
down_block_types = ["DownBlock2D", "CrossAttnDownBlock2D"]
layers_per_block = 2
transformer_layers_per_block = 3
attention_head_dim = [2, 4]
norm_num_groups = 4
use_linear_projection = true
"""


def heard(path, overrides=()):
    """A configuration and what was said of it."""
    said = []
    return load(path, overrides, said.append), said


def test_an_old_file_is_read_and_one_line_tells_what_to_write(tmp_path):
    """[denoiser] once held the U-Net's keys."""
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text(OLD)
    new.write_text(OLD.replace('[denoiser]\nkind = "unet"', "[unet]"))
    read, said = heard(old)
    assert (read, []) == heard(new) and read.unet.attention_head_dim == (2, 4) and read != DEFAULT
    assert len(said) == 1 and len(said[0].splitlines()) == 1
    assert said[0].startswith(f"{old}: denoiser.block_out_channels, down_block_types, layers_per_block, ")
    assert said[0].endswith("[unet]; write them there") and "kind" not in said[0]
    assert heard(None, to_sets(OLD))[0] == read


def to_sets(text):
    """The keys of a file's one table as `--set` takes them."""
    table, *lines = text.splitlines()
    return [f"{table[1:-1]}.{line}" for line in lines]


def test_an_old_set_is_read_and_one_line_tells_what_to_write():
    read, said = heard(None, ["denoiser.block_out_channels=[64, 128]", "train.seed=3", "denoiser.layers_per_block=1"])
    assert (read, []) == heard(None, ["unet.block_out_channels=[64, 128]", "train.seed=3", "unet.layers_per_block=1"])
    keys = "denoiser.block_out_channels, layers_per_block"
    assert said == [f"--set: {keys}: read as keys of [unet]; write them there"]


def test_spacing_was_named_schedule():
    read, said = heard(None, ["generate.schedule=karras"])
    assert read.generate.spacing == "karras"
    assert said == ["--set: generate.schedule: read as generate.spacing; write that"]


def test_old_and_new_files_and_sets_mix(tmp_path):
    """A `--set` goes over the file, whichever spelling either has; in one file the new spelling goes before the old one."""
    old, new, both = tmp_path / "old.toml", tmp_path / "new.toml", tmp_path / "both.toml"
    old.write_text("[denoiser]\nlayers_per_block = 4\nnorm_num_groups = 4\n")
    new.write_text("[unet]\nlayers_per_block = 4\nnorm_num_groups = 4\n")
    both.write_text(old.read_text() + "[unet]\nlayers_per_block = 5\n")
    for path in (old, new):
        for table in ("denoiser", "unet"):
            unet = heard(path, [f"{table}.layers_per_block=3"])[0].unet
            assert (unet.layers_per_block, unet.norm_num_groups) == (3, 4)
    assert len(heard(old, ["denoiser.layers_per_block=3"])[1]) == 2
    assert (heard(both)[0].unet.layers_per_block, heard(both)[0].unet.norm_num_groups) == (5, 4)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[denoiser]\nlayers_per_block = 99", "unet.layers_per_block: 99 is above 16"),
        ("[denoiser]\nlayers_per_blok = 1", "denoiser.layers_per_blok: unknown key"),
        ("[denoiser]\nlayers_per_block = 1\n[dit]\npatch = 1", "dit.patch: unknown key (did you mean 'patch_size'?)"),
        ("denoiser = 3", "denoiser: expected a table, got 3"),
        ("unet = 3\n[denoiser]\nlayers_per_block = 1", "unet: expected a table, got 3"),
    ],
)
def test_mistakes_in_old_files_are_named(text, part, tmp_path):
    assert part in error_of(text, tmp_path)
