"""What changes a model, as `inspect` tells it; what a run of an adapter is to commands that take a model; whose adapter it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreters import run_without
from safetensors.torch import load_file, save_file

from tinydiff import cli, config, flags, images, inspect, start
from tinydiff.adapters import lora, origin, words
from tinydiff.checkpoints.header import header
from tinydiff.checkpoints.source import Adapter, Source
from tinydiff.errors import ModelError, UsageError
from tinydiff.networks import CONTROL
from tinydiff.training import loop

QUICK = ["train.threads=1", "train.precision=fp32", "train.device=cpu", "train.validation_samples=0", "data.held_out=0"]
FEW = {"steps": 2, "batch_size": 4, "warmup": 1, "lr": 0.02, "sample_every": 100}
OWN = {"lora": ["train.lora.rank=3", "train.lora.alpha=6", "train.lora.text_encoder=true"], "control": []}
OWN["word"] = ["train.word.word=<thing>", "train.word.vectors=2"]


@pytest.fixture(scope="module")
def runs(tiny_model: Path, image_folder: Path, tmp_path_factory) -> dict[str, Path]:
    """A run of each adapter."""
    made = dict[str, Path]()
    for kind, own in OWN.items():
        few = [f"train.{kind}.{key}={value}" for key, value in FEW.items()]
        base = [f"train.base={tiny_model}", f"train.adapter={kind}", f"data.path={image_folder}", "data.resolution=16"]
        made[kind] = tmp_path_factory.mktemp("runs") / kind
        loop.run(config.load(None, [*base, *QUICK, *few, *own], model=start.tables), made[kind])
    return made


def command(*given: Any) -> None:
    cli.app([str(word) for word in given], standalone_mode=False)


TOLD: dict[str, tuple[str, dict[str, Any]]] = {
    "run of a lora": ("lora", {"kind": "run", "adapter": "lora", "step": 2, "steps": 2}),
    "run of a word": ("word", {"kind": "run", "adapter": "word", "step": 2}),
    "run of a control": ("control", {"kind": "run", "adapter": "control", "step": 2}),
    "file of a lora": (f"lora/adapter/{lora.FILE}", {"kind": "lora", "style": "diffusers"}),
    "file of a word": ("word/adapter/<thing>.safetensors", {"kind": "word", "word": "<thing>", "vectors": 2}),
}


@pytest.mark.parametrize("case", TOLD)
def test_runs_and_files_say_what_they_are(case, runs, tiny_model, capsys):
    where, wanted = TOLD[case]
    kind, _, rest = where.partition("/")
    path = runs[kind] / rest
    told = inspect.inspect(str(path))
    inner = told.get("made", told)
    assert {key: told[key] for key in wanted} == wanted
    assert told["model"] == inner["model"] == str(tiny_model)
    assert inner["kind"] == kind and inner["text_width"] == "16" and inner["dtype"] == "fp32"
    weights = runs[kind] / ("controlnet" if kind == "control" else "adapter")
    stored = load_file(next(weights.glob("*.safetensors")))
    if kind == "lora":
        assert (inner["ranks"], inner["alphas"]) == ({3: len(stored) // 2}, {"6": len(stored) // 2})
    assert inner["parameters"] == sum(tensor.numel() for tensor in stored.values())
    command("inspect", path)
    assert ["kind", kind] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert json.dumps(told) in inspect.show(str(path), as_json=True)
    with pytest.raises(UsageError, match="only a model and a configuration have a cost"):
        inspect.inspect(str(path), 16)


def test_a_control_network_says_which_image_it_is_told(runs):
    told = inspect.inspect(str(runs["control"]))["made"]
    assert told["condition"] == "edges" and told["pixels_a_latent"] == 2
    assert inspect.inspect(str(runs["control"] / "controlnet"))["kind"] == "run"


def test_a_control_network_of_others_says_what_it_is(runs, tmp_path):
    """A folder as diffusers writes it, and its file alone."""
    table = json.loads((runs["control"] / "controlnet" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in table.items() if k != origin.KEY}))
    shutil.copy(runs["control"] / "controlnet" / CONTROL.file, tmp_path / CONTROL.file)
    for path in (tmp_path, tmp_path / CONTROL.file):
        told = inspect.inspect(str(path))
        assert (told["kind"], told["text_width"], told["model"]) == ("control", "16", None)


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_ranks_strengths_and_targets_of_both_styles(style, tmp_path):
    def low(rank: int, alpha: float, reads: int = 768) -> lora.LowRank:
        return lora.LowRank(np.ones((rank, reads), np.float16), np.ones((9, rank), np.float16), alpha)

    names = {f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.{end}": low(4, 2) for end in ("to_q", "to_out.0")}
    names |= {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": low(4, 2)}
    names |= {"text_encoder.text_model.encoder.layers.0.mlp.fc1": low(2, 8, 5)}
    lora.write(tmp_path / "x.safetensors", names, style)
    told = inspect.inspect(str(tmp_path / "x.safetensors"))
    assert told["style"] == style and told["targets"] == {"to_q": 1, "to_out.0": 1, "to_k": 1, "fc1": 1}
    assert (told["ranks"], told["alphas"]) == ({4: 3, 2: 1}, {"2": 3, "8": 1})
    assert told["layers"] == {"unet": 3, "text_encoder": 1} and told["text_width"] == "768, as of Stable Diffusion 1"


def test_a_file_that_makes_no_sense_is_refused(tmp_path):
    for tensors in ({"a.lora_up.weight": torch.ones(2, 2)}, {"a.lora_down.weight": torch.ones(())}):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ModelError, match="make no sense"):
            inspect.inspect(str(tmp_path / "x.safetensors"))


def test_telling_needs_no_torch(runs):
    for path in (*runs.values(), runs["lora"] / "adapter" / lora.FILE):
        assert "kind" in run_without(f"from tinydiff import inspect\nprint(inspect.inspect({str(path)!r}))", "torch")


# ---- a run where a model is asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "word"])
def test_a_run_is_drawn_from_as_its_model_with_what_it_made(kind, runs, tiny_model, tmp_path, capsys):
    prompt, how = "a <thing>", ("-s", 3, "--steps", 2)
    command("generate", prompt, "-m", runs[kind], *how, "-o", tmp_path / "run.png")
    assert f"read as -m {tiny_model} --{kind} {runs[kind]}" in capsys.readouterr().err
    command("generate", prompt, "-m", tiny_model, f"--{kind}", runs[kind], *how, "-o", tmp_path / "both.png")
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "both.png").read_bytes()
    command("generate", prompt, "-m", tiny_model, *how, "-o", tmp_path / "plain.png")
    assert (tmp_path / "run.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    assert images.read_settings(tmp_path / "run.png")[kind]


def test_a_run_is_exported_as_a_model_that_can_be_begun_with(runs, tiny_model, tmp_path):
    command("export", runs["lora"], "--format", "folder", "-o", tmp_path / "merged")
    wanted = Source(tiny_model, adapters=(Adapter(runs["lora"] / "adapter" / lora.FILE),)).tensors("unet")
    ours = Source(tmp_path / "merged").tensors("unet")
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert start.source_of(str(tmp_path / "merged"))


def test_a_run_is_no_model_to_begin_with(runs, tiny_model):
    for kind, fix in (("lora", "export"), ("word", "export"), ("control", f"-m {tiny_model} --control")):
        with pytest.raises(ModelError, match=f"no model, this is what a run made for .*{fix}"):
            start.source_of(str(runs[kind]))
    with pytest.raises(ModelError, match="draw with -m"):
        command("generate", "a", "-m", runs["control"])


def test_of_a_folder_the_file_in_it_is_meant(runs, tmp_path):
    for kind in ("lora", "word"):
        file = next((runs[kind] / "adapter").glob("*.safetensors"))
        assert flags.within(runs[kind]) == flags.within(file.parent) == flags.within(file) == file
        shutil.copy(file, tmp_path)
    assert flags.within(tmp_path) == tmp_path / lora.FILE and flags.within(tmp_path / "none") == tmp_path / "none"
    (tmp_path / lora.FILE).rename(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="holds <thing>.safetensors, a.safetensors; give one of them"):
        flags.within(tmp_path)


# ---- of which model ------------------------------------------------------------------------------------------------------------


def given(runs: dict[str, Path]) -> dict[str, Any]:
    """What a source is given of all of them."""
    adapters, texts = (Adapter(flags.within(runs["lora"])),), (flags.within(runs["word"]),)
    return {"adapters": adapters, "words": texts, "controls": (runs["control"],)}


def changed(path: Path, to: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A model whose denoiser is another one."""
    shutil.copytree(path, to)
    (to / "manifest.json").unlink()
    file = next((to / "unet").glob("*.safetensors"))
    save_file({name: change(tensor) for name, tensor in load_file(file).items()}, file)
    return to


@pytest.mark.parametrize("kind", ["itself", "half", "bfloat16", "tuned", "other"])
def test_adapters_of_another_model_are_told(kind, runs, tiny_model, tmp_path):
    torch.manual_seed(0)
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "itself": lambda x: x,
        "half": lambda x: x.half(),
        "bfloat16": lambda x: x.bfloat16(),
        "tuned": lambda x: x + 0.02 * x.std() * torch.randn_like(x) if x.numel() > 1 else x,
        "other": lambda x: torch.randn_like(x),
    }
    path = changed(tiny_model, tmp_path / "model", changes[kind])
    strangers = Source(path, **given(runs)).strangers
    assert len(strangers) == (3 if kind == "other" else 0)
    assert all(f"was trained on another model, {tiny_model}" in each for each in strangers)


def test_it_is_said_when_drawing_and_not_of_files_that_say_nothing(runs, tiny_model, tmp_path, capsys):
    path, out = changed(tiny_model, tmp_path / "model", torch.zeros_like), ("--steps", 1, "-o", tmp_path / "a.png")
    command("generate", "a", "-m", path, "--lora", runs["lora"], *out)
    assert f"note: {runs['lora']}/adapter/{lora.FILE} was trained on another model" in capsys.readouterr().err
    file = header(flags.within(runs["lora"]))
    for told in (None, "{", "3", json.dumps({"tensor": 3, "values": []}), json.dumps({"values": ["x"]})):
        other = {k: v for k, v in file.metadata.items() if k != origin.KEY} | ({origin.KEY: told} if told else {})
        save_file(load_file(file.path), tmp_path / "x.safetensors", other)
        assert not Source(path, adapters=(Adapter(tmp_path / "x.safetensors"),)).strangers


def test_words_and_changes_keep_what_they_say_of_their_model(tmp_path):
    said = {"model": "x", **origin.of_values("conv_in.weight", np.arange(100.0))}
    word = words.Word("<a>", {"text_encoder": np.ones((1, 4), np.float32)})
    change = lora.LowRank(np.ones((1, 4), np.float32), np.ones((4, 1), np.float32), 1.0)
    words.write(tmp_path / "word.safetensors", word, base=said)
    for style in lora.STYLES:
        lora.write(tmp_path / f"{style}.safetensors", {"unet.a": change}, style, base=said)
    assert all(origin.read(header(path).metadata[origin.KEY]) == said for path in tmp_path.iterdir())
