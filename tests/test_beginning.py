"""What `tinydiff train` is pointed at: images, of which the rest is chosen, a run that goes on, and what is none of these."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from interpreters import ROOT
from PIL import Image
from typer.testing import CliRunner

from tinydiff import beginning, config, inspect
from tinydiff.choices import Machine
from tinydiff.cli import app
from tinydiff.data.checked import Checked
from tinydiff.data.folder import FolderSource
from tinydiff.errors import UsageError
from tinydiff.schema import flat, reasons_of
from tinydiff.training import budget, loop

TINY = {
    "autoencoder.block_out_channels": [8, 8],
    "autoencoder.norm_num_groups": 4,
    "text_encoder.hidden_size": 16,
    "text_encoder.intermediate_size": 16,
    "text_encoder.num_hidden_layers": 1,
    "text_encoder.num_attention_heads": 2,
    "unet.block_out_channels": [16],
    "unet.down_block_types": ["CrossAttnDownBlock2D"],
    "unet.norm_num_groups": 4,
    "unet.attention_head_dim": 2,
    "train.threads": 1,
    "train.device": "cpu",
    "train.time": 10,
}
SETS = [f"--set={key}={json.dumps(value)}" for key, value in TINY.items()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Sixteen images of 20 x 20 pixels in a folder of that name, with a caption each."""
    folder = tmp_path_factory.mktemp("somewhere") / "photos"
    folder.mkdir()
    for i in range(16):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 20, 3), np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"photo number {i}\n")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(beginning, "machine", lambda device: Machine(2))
    return tmp_path


def tinydiff(*words: object):
    """The command in this process: (what it printed, what it told a person)."""
    done = CliRunner().invoke(app, [str(word) for word in words], standalone_mode=False, catch_exceptions=False)
    return done.stdout, done.stderr


def test_photos_train_by_one_command_and_go_on_by_the_run(photos, here, monkeypatch):
    taken, ticks, begun = [], itertools.count(), time.monotonic()
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: begun + next(ticks) / 10))
    step = loop.step

    def stopped(run, task, training, n, *more):
        taken.append((task.name, n))
        if len(taken) == 12:
            run.runtime.caught = 15
        return step(run, task, training, n, *more)

    monkeypatch.setattr(loop, "step", stopped)
    with pytest.raises(loop.Interrupted):
        tinydiff("train", photos, *SETS)
    run = here / "runs" / "photos"
    stored, reasons = config.load(run / "tinydiff.toml", stored=True), reasons_of(run / "tinydiff.toml")
    assert stored.data.path == str(photos) and stored.data.resolution == 16
    assert {"data.resolution", "text_encoder.vocab_size", "train.denoiser.batch_size"} <= reasons.keys()
    assert not TINY.keys() & reasons.keys()
    told = inspect.inspect(str(run))
    assert told["kind"] == "unfinished" and told["stages"][taken[-1][0]]["step"] == taken[-1][1] + 1
    assert any(line.startswith("go on") and "tinydiff train" in line for line in inspect.show(str(run)))

    out, said = tinydiff("train", run)
    assert Path(out.strip()) == Path(run / "model") or Path(out.strip()).resolve() == run / "model"
    assert "going on from step" in said and f"draw with it: tinydiff generate 'photo number 0' -m {run}" in said
    ended = config.load(run / "tinydiff.toml", stored=True)
    assert {k for k, v in flat(ended).items() if flat(stored)[k] != v} <= {
        f"train.{name}.{key}"
        for name in ("autoencoder", "denoiser")
        for key in ("steps", "warmup", "ema", "save_every", "sample_every")
    }
    assert reasons_of(run / "tinydiff.toml") == reasons
    assert inspect.inspect(str(run))["kind"] == "model"
    count = len(taken)
    out, said = tinydiff("train", photos)
    assert len(taken) == count and "going on with runs/photos" in said and "draw with it" in said


def test_what_would_be_is_told_and_nothing_is_written(photos, here):
    out, said = tinydiff("train", photos, "--dry-run", "--resolution", 32, *SETS)
    cfg = here / "c.toml"
    cfg.write_text(out)
    assert config.load(cfg).data.resolution == 32 and "data.resolution" not in reasons_of(cfg)
    for wanted in ("16 images", "20x20 to 20x20 pixels", "16 different, 1 an image", "photo number 0", "2 CPU cores"):
        assert wanted in said
    assert "s each" in said and "runs/photos: model/" in said
    assert "note: 16 images are few" in said and "100% of the images are smaller than 32 pixels" in said
    assert sorted(path.name for path in here.iterdir()) == ["c.toml"]
    told = inspect.inspect(str(photos))
    assert told["kind"] == "images" and told["chosen"]["data.resolution"]["value"] == 16
    assert any("are few" in note for note in told["notes"]) and json.dumps(told)
    assert any("text_encoder.vocab_size" in line for line in inspect.show(str(photos)))


MEANT = {
    "emoji": "train PHOTOS --from emoji",
    "photo.png": "give the folder that it is in",
    "model": "--from",
    "nowhere": "no such folder or configuration",
    "notes.txt": "give a folder of captioned images",
}


@pytest.mark.parametrize("what", MEANT)
def test_what_holds_no_images_leads_somewhere(what, here):
    (here / "photo.png").touch()
    (here / "notes.txt").touch()
    (here / "model").mkdir()
    (here / "model" / "model_index.json").write_text("{}")
    with pytest.raises(UsageError) as refused:
        beginning.begin(Path(what), [])
    assert MEANT[what] in str(refused.value) and "\n" not in str(refused.value)


def test_flags_that_lead_somewhere(here, photos):
    with pytest.raises(UsageError, match="tinydiff train photos"):
        tinydiff("train", "--data", "photos")
    for text in ("30", "1s", "soon", "-5m", "200d"):
        with pytest.raises(UsageError, match="such as 90s, 30m or 2h"):
            tinydiff("train", "--time", text)
    with pytest.raises(UsageError, match="unknown key"):
        beginning.begin(photos, ["train.tme=3"])


def test_names_of_runs(here, photos):
    shutil.copy(ROOT / "tinydiff.toml", here / "a.toml")
    for what, wanted in ((Path("a.toml"), "a"), (None, "default"), (photos, "photos")):
        assert beginning.begin(what, []).run_dir == Path("runs", wanted)
    Path("runs/photos").mkdir(parents=True)
    assert beginning.begin(photos, [], fresh=True).run_dir == Path("runs/photos-2")


# ---- what was checked is remembered ----------------------------------------------------------------------------------


def test_images_are_decoded_once_until_they_are_touched(photos, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    shutil.copytree(photos, folder)
    monkeypatch.setattr("tinydiff.data.checked.RECENT", -(10**12))
    seen, done = [], []
    decode = FolderSource.__init__.__globals__["decoded"]
    monkeypatch.setitem(
        FolderSource.__init__.__globals__, "decoded", lambda *told: seen.append(told[0].name) or decode(*told)
    )
    first = FolderSource(folder, progress=lambda *told: done.append(told))
    assert len(seen) == 16 and done[-1] == (16, 16)
    second = FolderSource(folder)
    assert (
        len(seen) == 16 and second.fingerprint() == first.fingerprint() and second.size(3) == first.size(3) == (20, 20)
    )
    Image.new("RGB", (9, 9)).save(folder / "03.png")
    third = FolderSource(folder)
    assert seen[16:] == ["03.png"] and third.size(3) == (9, 9) and third.fingerprint() != first.fingerprint()
    checked = Checked(folder)
    checked.path.write_text("[1, 2")
    assert Checked(folder).get("03.png") is None


def test_what_was_written_a_moment_ago_is_looked_at_again(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    checked = Checked(tmp_path)
    checked.add("a.png", time.time_ns(), "0" * 64, (9, 9))
    assert checked.get("a.png") is None
    checked.add("a.png", time.time_ns() + 10**11, "0" * 64, (9, 9))
    assert checked.get("a.png") == ("0" * 64, (9, 9))
    os.utime(tmp_path / "a.png", (1, 1))
    assert checked.get("a.png") is None
