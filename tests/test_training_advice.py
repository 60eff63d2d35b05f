"""What is said before a run: settings that do nothing together, and captions that are cut; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import config
from tinydiff.data import cache
from tinydiff.data.dataset import buckets
from tinydiff.data.facts import Facts
from tinydiff.errors import ResourceError, UsageError
from tinydiff.text.labels import Labels
from tinydiff.text.tokenizer import Tokenizer
from tinydiff.training import advice, loop

DIT = ("denoiser.kind=dit", "data.resolution=32")
SAID = {  # sets -> the keys named, and what to write
    ("train.denoiser.steps=50",): ("train.denoiser.warmup", "set 5"),
    ("train.denoiser.steps=399",): ("train.denoiser.warmup", "set 39"),
    ("train.autoencoder.lr=0",): ("train.autoencoder.lr", "0.001"),
    ("train.autoencoder.features=x",): ("train.autoencoder.features", "train.autoencoder.perceptual_weight is 0"),
    ("train.autoencoder.critic_width=8", "train.autoencoder.critic_lr=1"): (
        "train.autoencoder.critic_lr, train.autoencoder.critic_width",
        "adversarial_weight is 0",
    ),
    ("train.autoencoder.adversarial_weight=1", "train.autoencoder.adversarial_start=800"): (
        "train.autoencoder.adversarial_start",
        "set 400",
    ),
    ("train.distill.calls=2", "train.distill.levels=8"): (
        "train.distill.calls, train.distill.levels",
        "train.distill.steps is 0",
    ),
    ("autoencoder.path=x",): ("train.autoencoder.lr", "set 0.0003"),
    ("autoencoder.path=x", "train.autoencoder.steps=0", "train.autoencoder.adversarial_weight=1"): (
        "train.autoencoder.adversarial_weight",
        "train.autoencoder.steps is 0",
    ),
    ("train.autoencoder.codebook=commitment", "autoencoder.num_vq_embeddings=8"): (
        "train.autoencoder.codebook, autoencoder.num_vq_embeddings",
        "autoencoder.kind is kl",
    ),
    ("train.keep_every=333",): ("train.keep_every", "train.denoiser.save_every (500)"),
    ("diffusion.caption_dropout=0",): ("diffusion.caption_dropout", "generate.cfg_scale=1"),
    ("diffusion.caption_dropout=1",): ("diffusion.caption_dropout", "0.1"),
    ("data.max_aspect_ratio=2", "data.bucket_step=32"): ("data.max_aspect_ratio", "set data.bucket_step=8"),
    ("data.max_aspect_ratio=1.1",): ("data.max_aspect_ratio", "set data.max_aspect_ratio=1"),
    ("data.bucket_step=32",): ("data.bucket_step", "data.max_aspect_ratio is 1"),
    ("data.path=somewhere", "data.samples=5"): ("data.samples", "data.path is no 'shapes'"),
    (*DIT, "unet.layers_per_block=2"): ("unet.layers_per_block", "denoiser.kind is dit"),
    ("dit.patch_size=4",): ("dit.patch_size", "denoiser.kind is unet"),
    (*DIT, "dit.num_layers=2"): ("dit.num_layers", "dit.size is S"),
    (*DIT, "text_encoder.kind=class", "text_encoder.hidden_size=96"): ("text_encoder.hidden_size", "kind is class"),
}
QUIET = [(), ("generate.cfg_scale=1", "diffusion.caption_dropout=0"), (*DIT, "dit.size=custom", "dit.num_layers=2")]
QUIET += [("autoencoder.path=x", "train.autoencoder.lr=0.001"), ("train.denoiser.steps=400",)]
QUIET += [("train.denoiser.steps=50", "train.time=600")]  # whose steps and warm-up follow from the time
QUIET += [("autoencoder.path=x", "train.autoencoder.steps=0"), ("train.distill.calls=2", "train.distill.steps=100")]
QUIET += [("data.max_aspect_ratio=2", "data.resolution=64"), ("train.keep_every=1000",), ("train.keep_every=2000",)]


@pytest.mark.parametrize(("sets", "wanted"), SAID.items(), ids=[" ".join(sets) for sets in SAID])
def test_keys_without_effect_are_named_with_a_value_that_has_one(sets, wanted):
    key, fix = wanted
    (line,) = [line for line in advice.of_settings(config.load(None, sets)) if line.startswith(key)]
    assert fix in line and "\n" not in line


@pytest.mark.parametrize("sets", QUIET)
def test_nothing_is_said_of_settings_that_work(sets):
    assert list(advice.of_settings(config.load(None, sets))) == []


@given(st.sampled_from([32, 48, 64, 96, 128, 512]), st.floats(1.01, 8), st.sampled_from([16, 32, 48, 64]))
def test_the_step_that_is_advised_has_buckets(side, ratio, step):
    data = config.Data(resolution=side, max_aspect_ratio=ratio, bucket_step=step)
    said = list(advice._of_buckets(data, 8))
    assert bool(said) == (len(buckets(side, ratio, step)) == 1)
    if said and "bucket_step=" in said[0]:
        better = int(said[0].rpartition("bucket_step=")[2])
        assert better % 8 == 0 and side % better == 0 and len(buckets(side, ratio, better)) > 1


@pytest.mark.parametrize("steps", [11, 20, 1000])
def test_more_steps_than_levels_are_refused(steps):
    sets = ("diffusion.num_train_timesteps=10", f"generate.steps={steps}")
    with pytest.raises(UsageError, match=rf"generate.steps: {steps} are more than the 10 .*; set 10"):
        config.load(None, sets)
    config.load(None, (sets[0], "generate.steps=10"))


class Captions:
    """A source of captions alone."""

    def __init__(self, *texts: str):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def captions(self, i: int) -> list[str]:
        return [self.texts[i]]


TOKENIZER = Tokenizer.train(["a red heart"], 514, 12)  # one id a byte: ten fit


@given(st.lists(st.text("ab ", max_size=20), max_size=8))
def test_captions_that_are_cut_are_counted(texts):
    """By hand: a word's letters are its tokens, and start and end take two places of twelve."""
    long = {text for text in texts if len(text.replace(" ", "")) > 10}
    said = advice.of_captions(Captions(*texts), [TOKENIZER])
    assert bool(said) == bool(long)
    if long:
        most = max(len(text.replace(" ", "")) for text in long) + 2
        assert said.startswith(f"{len(long)} of {len(set(texts))} captions")
        assert said.endswith(f"text_encoder.max_position_embeddings={most}")
        wider = Tokenizer(TOKENIZER.vocab, TOKENIZER.merges, most)
        assert not advice.of_captions(Captions(*texts), [wider])


def test_labels_are_never_cut():
    assert advice.of_captions(Captions("x" * 5000), [Labels(["x" * 5000], 1)]) == ""


@pytest.mark.parametrize("most", [1, 3, 16, 64, 1000])
def test_rows_of_a_cache_are_computed_in_halves_where_memory_is_short(tmp_path, most):
    sizes = []

    def compute(items):
        sizes.append(len(items))
        if len(items) > 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return {"mean": np.float32(items)[:, None]}

    chunk = cache.chunk(tmp_path, "latents", np.arange(20), "x")
    cache.fill([chunk], compute, lambda *_: None, most=most)
    assert cache.Rows([chunk]).files[0]["mean"][:, 0].tolist() == list(range(20))
    assert sizes[0] == min(most, 20) and [n for n in sizes if n > 3] == sorted(
        {n for n in sizes if n > 3}, reverse=True
    )
    with pytest.raises(MemoryError):
        cache.fill([chunk], raise_memory, lambda *_: None, most=most)


def raise_memory(items):
    raise MemoryError


@pytest.mark.parametrize("place", ["encoding.images", "loop.resume", "loop.look", "loop.commit"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_memory_that_runs_out_anywhere_names_the_key(run_config, tmp_path, monkeypatch, place, error):
    def fails(*_args, **_more):
        raise error

    monkeypatch.setattr(f"tinydiff.training.{place}", fails)
    with pytest.raises(ResourceError, match=r"out of memory at 4 rows at once; set train\.\w+\.accumulate=2"):
        loop.run(run_config, tmp_path)


def test_a_model_that_does_not_fit_into_memory_says_so(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.folder, "build", lambda *_: raise_memory(()))
    with pytest.raises(ResourceError, match="make the networks smaller"):
        loop.run(run_config, tmp_path)


def test_a_model_that_cannot_be_drawn_is_refused_before_it_is_trained(run_config):
    def levels(*_):
        raise UsageError("--steps 20: no")

    description = SimpleNamespace(levels=levels)
    with pytest.raises(UsageError, match=r"\[generate\]: --steps 20: no"):
        loop.drawable(run_config, SimpleNamespace(description=description))  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_second_moment_that_never_begins_is_refused(stage):
    with pytest.raises(UsageError, match=rf"train.{stage}.beta2: .*set 0.999"):
        config.load(None, (f"train.{stage}.beta2=1",))


# ---- of data -----------------------------------------------------------------------------------------------------------


def facts(count: int = 200, size: tuple[int, int] = (64, 64), captions: tuple[str, ...] = ("picture {}",)) -> Facts:
    return Facts(
        count, np.tile(size, (count, 1)), [[text.format(i) for text in captions] for i in range(count)], "", []
    )


MANY = tuple(f"{language} {{}}" for language in ("a", "une", "ein", "un", "en", "yksi", "bir"))
MINDED = {  # images, settings -> what is said of them, with what mends it
    "few images": (
        facts(20),
        ("train.autoencoder.batch_size=4", "train.denoiser.batch_size=4"),
        "20 images are few",
        "--from emoji",
    ),
    "a batch of all": (facts(60), (), "train.denoiser.batch_size: 64 of 60", "set 16"),
    "one image": (facts(1), ("train.autoencoder.batch_size=1",), "train.denoiser.batch_size: 64 of 1 ", "set 1"),
    "translations": (facts(captions=MANY), (), "captions: 7 an image, such as a 0 / une 0 / ein 0", "one language"),
    "equal captions": (
        facts(captions=("a photo",)),
        (),
        "captions: 100% of the images have the same, 'a photo'",
        "write",
    ),
    "enlarged": (
        facts(size=(20, 20)),
        (),
        "data.resolution: 100% of the images are smaller than 32",
        "data.resolution=16",
    ),
    "cropped": (facts(size=(200, 64)), (), "data.max_aspect_ratio: 100% of the images lose", "data.max_aspect_ratio=2"),
    "cropped still": (
        facts(size=(512, 64)),
        ("data.max_aspect_ratio=3", "data.resolution=64"),
        "data.max_aspect_ratio: 100%",
        "data.max_aspect_ratio=4",
    ),
}
MINDED["a batch of all"] = (
    facts(60),
    ("train.autoencoder.steps=0", "autoencoder.path=general"),
    *MINDED["a batch of all"][2:],
)


@pytest.mark.parametrize("row", MINDED)
def test_data_that_teach_little_are_told_with_what_mends_it(row):
    of, sets, wanted, fix = MINDED[row]
    said = list(advice.of_data(config.load(None, ["data.path=x", *sets]), of))
    (line,) = [line for line in said if line.startswith(wanted)]
    assert fix in line.removeprefix(wanted) and "\n" not in line
    assert len(said) == 1 + (of.count == 1), said


@pytest.mark.parametrize("sets", [(), ("train.denoiser.batch_size=200",)])
def test_nothing_is_said_of_good_data(sets):
    assert list(advice.of_data(config.load(None, ["data.path=x", *sets]), facts())) == []


def test_few_images_are_enough_for_what_changes_a_model():
    train = config.make(train={"base": "x", "adapter": "lora", "lora": {"batch_size": 4}}).train
    cfg = replace(config.load(None, ["data.path=x"]), train=train)
    assert list(advice.of_data(cfg, facts(12, captions=("a mug",)))) == []


def test_what_is_told_comes_before_the_first_update(run_config, tmp_path, capsys):
    """Of every run, in the order of the first things that a person sees."""
    loop.run(run_config, tmp_path, last="autoencoder")
    said = capsys.readouterr().err
    assert 0 <= said.index("12 images are few") < said.index("autoencoder 1")
