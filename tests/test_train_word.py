"""A word that a run learns: its vectors alone learn, are saved and published, and say in prompts what the run's own do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import OFTEN, contents, digests, killed_often
from test_lora import REQUEST, pipeline
from test_lora import base as base
from test_stable_diffusion import draws_alike

from tinydiff import config, start
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.header import header
from tinydiff.checkpoints.source import Source
from tinydiff.data.folder import FolderSource
from tinydiff.errors import DataError, UsageError
from tinydiff.schema import to_toml
from tinydiff.training import loop
from tinydiff.training.word import Taught, WordTask

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ["train.threads=1", "train.precision=fp32", "train.device=cpu", "train.validation_samples=0", "data.held_out=0"]
FEW = {"steps": 6, "batch_size": 8, "warmup": 1, "lr": 0.02, "save_every": 2, "sample_every": 100, "ema": 0.5}
OWN = {"word": "<thing>", "vectors": 2, "initial": "red", "prompt": "a {}"}
FILE = Path("adapter") / "<thing>.safetensors"


@pytest.fixture(scope="module")
def settings_of(tiny_model: Path, image_folder: Path) -> Callable[..., config.Config]:
    def make(*more: str) -> config.Config:
        few = [f"train.word.{key}={value}" for key, value in (FEW | OWN).items()]
        own = [f"train.base={tiny_model}", "train.adapter=word", f"data.path={image_folder}", "data.resolution=16"]
        return config.load(None, [*own, *QUICK, *few, *more], model=start.tables)

    return make


@pytest.fixture(scope="module")
def trained(settings_of, tmp_path_factory) -> Callable[..., tuple[Path, WordTask]]:
    @cache
    def make(*more: str) -> tuple[Path, WordTask]:
        run_dir, tasks, stage = tmp_path_factory.mktemp("word") / "run", list[WordTask](), loop.stage
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "stage", lambda run, task: (tasks.append(task), stage(run, task)))
            assert loop.run(settings_of(*more), run_dir) == run_dir / "adapter"
        return run_dir, tasks[0]

    return make


def test_a_table_is_taught_rows_after_its_own():
    table, rows = torch.nn.Embedding(5, 3), torch.randn(2, 3)
    taught, ids = Taught(table, rows.clone()), torch.tensor([[0, 6, 4], [5, 5, 1]])
    whole = torch.nn.functional.embedding(ids, torch.cat([table.weight, rows]))
    assert torch.equal(taught(ids), whole)
    taught(ids).sum().backward()
    assert taught.rows.grad is not None and torch.equal(taught.rows.grad, torch.tensor([[2.0] * 3, [1.0] * 3]))


@pytest.mark.parametrize("style", ["diffusers", "a1111"])
def test_what_is_published_says_what_the_run_s_own_vectors_do(style, trained, tiny_model):
    run_dir, task = trained(f"train.word.style={style}")
    source = Source(tiny_model, words=(run_dir / FILE,))
    source.check()
    tokenizer = source.tokenizers["text_encoder"]
    ids = tokenizer.encode(["a <thing> here", "a red square"])
    assert np.array_equal(ids, task.model.tokenizers["text_encoder"].encode(["a <thing> here", "a red square"]))
    with torch.no_grad():
        ours, theirs = (
            model.networks["text_encoder"](torch.from_numpy(ids))[0] for model in (folder.load(source), task.model)
        )
    assert torch.allclose(ours, theirs, atol=1e-5)
    plain = Source(tiny_model).tensors("text_encoder")[source.vectors("text_encoder")]
    begun = plain[Source(tiny_model).tokenizers["text_encoder"].ids("red")].mean(0)
    learnt = torch.from_numpy(source.learnt[0].vectors["text_encoder"])
    assert learnt.shape == (2, 16) and 0.01 < (learnt - begun).abs().max() < 1
    assert (learnt[0] - learnt[1]).abs().max() > 1e-4


def test_checkpoints_hold_the_vectors_alone(trained, tiny_model):
    before = contents(tiny_model)
    run_dir, _ = trained()
    stored = header(run_dir / "checkpoints" / "word-00000006" / "weights.safetensors").tensors
    assert [(name.rpartition(".")[2], each.shape) for name, each in stored.items()] == [("rows", (2, 16))]
    assert contents(tiny_model) == before


@pytest.mark.peers
@pytest.mark.parametrize("style", ["diffusers", "a1111"])
def test_diffusers_loads_it_and_draws_the_same_picture(style, base, settings_of, tmp_path):
    run_dir = loop.run(
        settings_of(f"train.base={base}", f"train.word.style={style}", "train.word.steps=3", "generate.steps=1"),
        tmp_path / "run",
    )
    pipe, said = pipeline(base), "a <thing> on grass"
    plain = draws_alike(Source(base), pipe, REQUEST, said)
    pipe.load_textual_inversion(str(path := run_dir / FILE.name), token="<thing>" if style == "a1111" else None)
    drawn = draws_alike(Source(base, words=(path,)), pipe, REQUEST, said)
    assert (np.abs(drawn - plain) > 1).mean() > 0.3


def test_a_run_killed_again_and_again_ends_in_the_same_bits(trained, settings_of, forker, tiny_model, tmp_path):
    often, before = [f"train.word.{key}" for key in OFTEN], contents(tiny_model)
    (tmp_path / "c.toml").write_text(to_toml(settings_of(*often)))
    killed_often(forker, tmp_path / "run", tmp_path / "c.toml")
    assert digests(tmp_path / "run") == digests(trained(*often)[0]) and contents(tiny_model) == before


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (["train.word.word=two words"], "train.word.word: 'two words' is not one word"),
        (["train.word.word=a/b"], "train.word.word: 'a/b' is not one word"),
        (["train.word.word=e"], "train.word.word: 'e' is a word of the model already"),
        (["train.word.prompt=a picture"], "train.word.prompt: 'a picture' has no {}, where the word goes"),
    ],
)
def test_what_cannot_be_learnt_is_refused_before_anything_is_written(own, says, settings_of, tmp_path):
    with pytest.raises(UsageError) as caught:
        loop.run(settings_of(*own), tmp_path / "run")
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_images_need_no_captions(trained, settings_of, image_folder, tmp_path):
    """Without any, or with one for some of them, the same is learnt as with all."""
    bare, some = (tmp_path / name for name in ("bare", "some"))
    for place in (bare, some):
        shutil.copytree(image_folder, place, ignore=shutil.ignore_patterns("*.txt"))
    (some / "red-square.txt").write_text("a thing")
    for place in (bare, some):
        loop.run(settings_of(f"data.path={place}"), place.with_suffix(".run"))
        assert (place.with_suffix(".run") / FILE).read_bytes() == (trained()[0] / FILE).read_bytes()
    with pytest.raises(DataError, match="have no captions"):
        FolderSource(bare)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        loop.run(settings_of(f"data.path={tmp_path / 'none'}"), tmp_path / "run")
