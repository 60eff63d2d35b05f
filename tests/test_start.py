"""A run that begins with a model: what it keeps of it, what learns, what is refused, and that no file of it changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from runs import digests, said, sha256
from tensors import noise, same
from tiny_stable_diffusion import tiny

from tinydiff import cli, config, start
from tinydiff.backends import find_model
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints import folder, single_file
from tinydiff.checkpoints.convert import to_folder
from tinydiff.checkpoints.source import Source
from tinydiff.diffusion.schedules import SCHEDULES
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import read_json
from tinydiff.schema import to_toml
from tinydiff.stages import LoraStage
from tinydiff.training import loop
from tinydiff.training.start import described

QUICK = ["train.threads=1", "train.precision=fp32", "train.device=cpu", "train.validation_samples=0"]
FEW = {"steps": 4, "batch_size": 8, "warmup": 1, "lr": 0.01, "save_every": 2, "sample_every": 100, "ema": 0.5}
BASES = {"run": "all", "clip": "denoiser", "open_clip": "conv_", "file": "attention"}  # and what of each learns


@pytest.fixture(scope="module")
def base_of(tiny_model: Path, tiny_sd_files: dict[str, Path], tmp_path_factory) -> Callable[[str], Path]:
    """A function of a name: a model that was trained here, folders of Stable Diffusion 1 and 2, a single file."""

    @cache
    def make(name: str) -> Path:
        if name in ("run", "file"):
            return tiny_model if name == "run" else tiny_sd_files["open_clip"]
        path = tmp_path_factory.mktemp("base") / name
        to_folder(Source(tiny_sd_files[name]), path)
        index = read_json(path / "model_index.json")
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # which was left out
        (path / "model_index.json").write_text(json.dumps(index))
        (path / "manifest.json").unlink()  # none is in a folder of others
        return path

    return make


@pytest.fixture(scope="module")
def settings_of(image_folder: Path) -> Callable[..., config.Config]:
    """A function (base, *settings) -> the configuration of a run of a few steps on tiny images."""

    def make(base: Path | str, *more: str) -> config.Config:
        few = [f"train.{stage}.{key}={value}" for stage in ("denoiser", "lora") for key, value in FEW.items()]
        own = [f"train.base={base}", f"data.path={image_folder}", "data.resolution=16", *QUICK, *few, *more]
        return config.load(None, own, model=start.tables)

    return make


@pytest.fixture(scope="module")
def tuned(base_of, settings_of, tmp_path_factory) -> Callable[..., Path]:
    """A function (name, *settings) -> the directory of a run from that base that nothing disturbed."""

    @cache
    def make(name: str, *more: str) -> Path:
        run_dir = tmp_path_factory.mktemp("tuned") / "run"
        own = more or (f"train.learn={BASES[name]}",)
        assert loop.run(settings_of(base_of(name), *own), run_dir) == run_dir / "model"
        return run_dir

    return make


NAMED = ("text_model.final", "unet.conv_out", "attentions.0.norm")


def learnt(base: Path, run_dir: Path) -> set[str]:
    """The names of parameters of which a run has changed some value."""
    before, after = folder.load(Source(base)), folder.load(Source(run_dir / "model"))
    assert before.networks.keys() == after.networks.keys()
    pairs = [(name, part.state_dict(), after.networks[name].state_dict()) for name, part in before.networks.items()]
    return {f"{name}.{k}" for name, old, new in pairs for k, tensor in old.items() if not torch.equal(tensor, new[k])}


# ---- what a configuration takes from the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_the_configuration_says_what_the_model_is(name, base_of, settings_of):
    source = Source(base_of(name))
    cfg, d = settings_of(source.path, "unet.block_out_channels=[8]", "diffusion.prediction=sample"), source.description
    assert list(cfg.unet.block_out_channels) == list(source.table("unet")["block_out_channels"])
    assert (cfg.autoencoder.factor, cfg.autoencoder.latent_channels) == (d.factor, d.latent_channels)
    assert cfg.text_encoder.hidden_size == source.table("text_encoder")["hidden_size"]
    assert cfg.diffusion.prediction == d.prediction
    assert SCHEDULES[cfg.diffusion.schedule](cfg.diffusion.num_train_timesteps)[500].alpha == pytest.approx(
        d.schedule[500].alpha
    )
    assert (cfg.data.resolution, cfg.generate) == (16, d.generate)  # what was said, what was not
    plain = config.load(None, [f"train.base={source.path}"], model=start.tables)
    assert plain.data.resolution == d.size and plain.train.stage("denoiser").lr == start.TUNED["lr"]


def test_what_a_file_says_goes_before_what_nobody_has_to_say(base_of, tmp_path):
    (tmp_path / "a.toml").write_text("[data]\nresolution = 32\n[train.denoiser]\nlr = 0.5\n[generate]\nsteps = 7\n")
    cfg = config.load(tmp_path / "a.toml", [f"train.base={base_of('run')}"], model=start.tables)
    assert (cfg.data.resolution, cfg.train.stage("denoiser").lr, cfg.generate.steps) == (32, 0.5, 7)
    (tmp_path / "b.toml").write_text(to_toml(cfg))
    assert config.load(tmp_path / "b.toml", model=start.tables) == cfg == config.load(tmp_path / "b.toml", stored=True)


def test_of_a_small_model_more_layers_are_changed_and_more(base_of, monkeypatch):
    def asked(*more: str) -> LoraStage:
        return config.load(
            None, [f"train.base={base_of('run')}", "train.adapter=lora", *more], model=start.tables
        ).train.stage("lora")

    own = asked()
    assert {key: getattr(own, key) for key in start.CHANGED} == start.CHANGED and own.text_encoder
    assert asked("train.lora.alpha=3", "train.lora.text_encoder=false").alpha == 3
    monkeypatch.setattr(start, "SMALL", 10**4)
    plain = asked()
    assert plain == config.make().train.stage("lora") and plain.alpha == plain.rank and "conv" not in plain.targets


def test_what_a_run_does_not_read_is_not_printed(base_of, tmp_path, capsys):
    given = ["train", "--dry-run", "--from", str(base_of("run"))]
    for more, left in (
        ([], ["train.denoiser", "train.distill", "unet"]),
        (["--adapter", "word"], ["train.word", "unet"]),
    ):
        cli.app([*given, *more], standalone_mode=False)
        text = capsys.readouterr().out
        stages = {
            "train.autoencoder",
            "train.contrastive",
            "train.denoiser",
            "train.distill",
            "train.lora",
            "train.control",
        }
        tables = {line.split("]")[0][1:] for line in text.splitlines() if line.startswith("[")}
        assert tables & (stages | {"train.word", "unet", "dit"}) == {*left}
        (tmp_path / "c.toml").write_text(text)
        again = config.load(tmp_path / "c.toml", model=start.tables)
        assert to_toml(again, config.unread(again)) == text
        cli.app(["inspect", str(tmp_path / "c.toml")], standalone_mode=False)
        assert capsys.readouterr().out.startswith(text.rstrip())
    assert not config.unread(config.make()) and "[train.lora]" in to_toml(config.make())


# ---- what a run makes of it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_the_result_is_the_same_kind_of_model(name, base_of, tuned):
    """Its levels, prediction, scaling, tokens and autoencoder are the model's, and what else is drawn with is said."""
    before, after = Source(base_of(name)), Source(tuned(name) / "model")
    for what in ("schedule", "prediction", "scaling_factor", "factor", "in_channels", "generate"):
        assert getattr(after.description, what) == getattr(before.description, what), what
    levels = [each.description.levels(before.description.generate.sampler, 5, "trailing") for each in (before, after)]
    assert levels[0] == levels[1] and after.description.size == 16
    text = "A red square, ünd (more)"
    for key, tokenizer in before.tokenizers.items():
        assert (tokenizer.encode([text]) == after.tokenizers[key].encode([text])).all()
    changed = learnt(base_of(name), tuned(name))
    assert {n.partition(".")[0] for n in changed} == ({"unet", "text_encoder"} if name == "run" else {"unet"})
    assert read_json(tuned(name) / "model" / "unet" / "config.json")["sample_size"] * after.description.factor == 16


@pytest.mark.parametrize(
    ("learn", "right"),
    [
        ("denoiser", lambda n: n.startswith("unet.")),
        ("attention", lambda n: ".attn1." in n or ".attn2." in n),
        ("text_model.final, unet.conv_out, attentions.0.norm", lambda n: any(part in n for part in NAMED)),
    ],
)
def test_what_is_named_learns_and_nothing_else(learn, right, base_of, tuned):
    run_dir = tuned("run", f"train.learn={learn}")
    changed, model = learnt(base_of("run"), run_dir), folder.load(Source(run_dir / "model"))
    wanted = {f"{k}.{n}" for k in ("unet", "text_encoder") for n in model.networks[k].state_dict() if right(f"{k}.{n}")}
    assert changed <= wanted and len(changed) > len(wanted) / 2  # a bias of keys has no effect
    stored = folder.weights.tensors([run_dir / "checkpoints" / "denoiser-00000004" / "weights.safetensors"])
    assert len(stored) == len(wanted)


def test_a_run_draws_as_the_configuration_asks(base_of, settings_of, tmp_path):
    """Another solver is written for diffusers too; of levels without a name that cannot be."""
    cfg = settings_of(base_of("run"), "generate.sampler=ddim", "generate.spacing=leading", "train.denoiser.steps=1")
    model = loop.run(cfg, tmp_path / "run")
    assert read_json(model / "scheduler" / "scheduler_config.json")["_class_name"] == "DDIMScheduler"
    assert Source(model).description.schedule == Source(base_of("run")).description.schedule
    opened = folder.load(Source(base_of("run")))
    betas = {"trained_betas": [0.01 + i * 1e-5 for i in range(1000)], "_class_name": "DDIMScheduler"}
    opened.configs["scheduler"] = opened.configs["scheduler"] | betas
    with pytest.raises(UsageError, match=r"\[generate\]: its noise levels have no name"):
        described(opened, cfg)


def test_an_opened_model_is_distilled(tuned, base_of):
    few = [f"train.distill.{key}={value}" for key, value in FEW.items()]
    run_dir = tuned("run", *few, "train.distill.calls=2", "train.distill.levels=2", "train.denoiser.steps=0")
    d = Source(run_dir / "model").description
    assert (d.generate.sampler, d.generate.steps, d.schedule) == ("lcm", 2, Source(base_of("run")).description.schedule)
    assert {n.partition(".")[0] for n in learnt(base_of("run"), run_dir)} == {"unet"}


def test_a_model_of_few_calls_is_drawn_with_guidance_after_it_was_tuned():
    shipped = find_model(None)

    def drawn(*more: str) -> config.Generate:
        return config.load(None, [f"train.base={shipped}", *more], model=start.tables).generate

    own = Source(shipped).description.generate
    assert own.few_calls and drawn() == config.Generate() and drawn("generate.steps=7") == config.Generate(steps=7)
    assert drawn("train.adapter=lora") == drawn("train.distill.steps=9") == own


@pytest.mark.peers
@pytest.mark.parametrize("name", ["clip", "file"])
def test_the_result_opens_in_diffusers_and_draws_the_same(name, tuned):
    from diffusers import StableDiffusionPipeline

    path = tuned(name) / "model"
    pipe = StableDiffusionPipeline.from_pretrained(path)
    assert pipe.safety_checker is None
    backend = TorchBackend(folder.load(Source(path)))
    ids = backend.tokenizers["text_encoder"].encode(["a red square"])
    assert (pipe.tokenizer(["a red square"], padding="max_length", return_tensors="np").input_ids == ids).all()
    condition, x = backend.encode_text({"text_encoder": ids}), noise(1, 4, 8, 8)
    told = torch.from_numpy(condition["encoder_hidden_states"])
    with torch.no_grad():
        same(told, pipe.text_encoder(torch.from_numpy(ids))[0])
        same(torch.from_numpy(backend.denoise(x.numpy(), 500.0, condition)), pipe.unet(x, 500, told).sample)
        same(torch.from_numpy(backend.decode(x.numpy())), pipe.vae.decode(x).sample)


# ---- files, resuming, refusals ------------------------------------------------------------------------------------------------


def test_the_model_s_files_are_never_written_to_and_a_killed_run_ends_in_the_same_bits(
    base_of, settings_of, tuned, forker, tmp_path
):
    """Killed at calls spread over the run; what is frozen is read from the model again."""
    base, own = base_of("run"), "train.learn=attention"
    before = sha256(base, (p for p in base.rglob("*") if p.is_file()))
    (tmp_path / "c.toml").write_text(to_toml(settings_of(base, own)))
    run_dir, die_at, deaths = tmp_path / "run", 4, 0
    while (code := forker.run(run_dir, die_at, config_path=tmp_path / "c.toml")) == -9:
        deaths, die_at = deaths + 1, die_at + 31
    assert code == 0 and deaths >= 2, said(run_dir)
    assert digests(run_dir) == digests(tuned("run", own))
    assert sha256(base, (p for p in base.rglob("*") if p.is_file())) == before


def test_another_model_than_the_run_was_begun_with_is_refused(base_of, settings_of, tmp_path):
    base, run_dir = tmp_path / "base", tmp_path / "run"
    shutil.copytree(base_of("run"), base)
    (base / "manifest.json").unlink()
    loop.run(settings_of(base, "train.learn=attention"), run_dir)
    before = sha256(run_dir, run_dir.glob("model/*/*"))
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    longer = ["train.learn=attention", "train.denoiser.steps=6"]
    assert loop.run(settings_of(moved, "train.learn=attention"), run_dir) == run_dir / "model"  # the same one elsewhere
    path = moved / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("leading", "trailing").replace("}", ', "x": 1}'))
    with pytest.raises(ModelError, match="moved: not the model that the run was begun with; put that back"):
        loop.run(settings_of(moved, "train.learn=attention"), run_dir)
    assert sha256(run_dir, run_dir.glob("model/*/*")) == before
    loop.run(settings_of(moved, *longer), run_dir, accept=True)
    with pytest.raises(UsageError, match=r"train\.learn \(attention -> all\)"):
        loop.run(settings_of(moved, "train.denoiser.steps=6"), run_dir)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (["train.learn=nothing_like_it"], "train.learn: 'nothing_like_it' is in no parameter's name; there are "),
        (["train.learn=vae."], "is in no parameter's name"),
        (["train.denoiser.steps=0"], "train.denoiser.steps: with 0 nothing learns"),
        (["train.adapter=lora", "train.learn=attention"], "train.learn: with train.adapter lora nothing of the model"),
        (["train.adapter=lora", "train.lora.steps=0"], "train.lora.steps: with 0 nothing learns"),
        (["train.adapter=lore"], "train.adapter: unknown name 'lore' (did you mean 'lora'?)"),
        (["autoencoder.path=general"], "autoencoder.path: a run that begins with a model keeps its autoencoder"),
        (["train.base="], "train.base"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(own, says, base_of, settings_of, tmp_path):
    if own == ["train.base="]:
        own, says = ["train.base=", "train.learn=attention"], "train.learn: of a model to begin with, and there is none"
    with pytest.raises(UsageError) as caught:
        loop.run(settings_of(base_of("run"), *own), tmp_path / "run")
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_model_of_masks_cannot_be_begun_with(tmp_path):
    model = tiny("clip", 9)
    single_file.write(tmp_path / "nine.safetensors", model.parts, model.configs)
    with pytest.raises(ModelError, match="an inpainting model, whose masks no data here have"):
        start.source_of(str(tmp_path / "nine.safetensors"))
