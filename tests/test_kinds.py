"""Models besides the U-Net with CLIP: diffusion transformers, by class or by text, and texts read by a frozen T5.

Each is trained, interrupted, drawn from, exported and, where diffusers has a pipeline for it, opened there.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, SHAPES, randomise
from safetensors.torch import load_file, save_file
from test_dit import published_weights
from test_imports import run
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, normalizers, pre_tokenizers
from typer.testing import CliRunner

from tinydiff import cli, config, export, pipeline
from tinydiff.backends import open_backend
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints import convert, folder, weights
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import read_json, verify, write_file
from tinydiff.models.autoencoder import Autoencoder
from tinydiff.models.dit import DiT
from tinydiff.models.t5 import T5Config, T5Encoder
from tinydiff.text.labels import Labels
from tinydiff.text.prompts import parse
from tinydiff.text.sentencepiece import SPACE, T5Tokenizer
from tinydiff.training import loop, state

KINDS = {"unet+t5": ("unet", "t5"), "dit+clip": ("dit", "clip"), "dit+class": ("dit", "class"), "dit+t5": ("dit", "t5")}
DITS = [name for name, (denoiser, _) in KINDS.items() if denoiser == "dit"]
T5S = [name for name, (_, text) in KINDS.items() if text == "t5"]
TINY = config.DiT("custom", 2, num_layers=2, num_attention_heads=2, attention_head_dim=12)
T5 = T5Config(40, 24, 8, 32, 2, 2, 8, 20, feed_forward_proj="gated-gelu")
LABELS = sorted(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES)
PROMPTS = {"clip": "a red square", "t5": "a red square", "class": "a red square"}
every_kind = pytest.mark.parametrize("name", KINDS)


# ---- what they are made of -------------------------------------------------------------------------------------------


def tokenizer() -> T5Tokenizer:
    """The words of the captions, each a piece."""
    words = ["a", "picture", *COLOURS, *SHAPES]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"{SPACE}{word}", -2.0) for word in words)]
    backend = BackendTokenizer(models.Unigram(pieces, 2, False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always")
    return T5Tokenizer(backend, 512)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 encoder and its tokenizer, as a diffusers pipeline has them."""
    path, encoder = tmp_path_factory.mktemp("t5"), T5Encoder(T5)
    randomise(encoder, 7)
    (path / "text_encoder").mkdir()
    save_file(encoder.state_dict(), path / "text_encoder" / "model.safetensors", {"format": "pt"})
    folder.write_json(path / "text_encoder" / "config.json", {"model_type": "t5", **vars(T5)})
    tokenizer().save(path / "tokenizer")
    return path


@pytest.fixture(scope="module")
def config_of(tiny_config: config.Config, t5_folder: Path) -> Callable[[str], config.Config]:
    """A function of a kind's name -> its tiny configuration; one by class draws as diffusers' DiTPipeline does."""

    def make(name: str) -> config.Config:
        denoiser, text = KINDS[name]
        stage = replace(tiny_config.train.denoiser, sample_every=100)
        encoder = replace(tiny_config.train.autoencoder, sample_every=100)
        cfg = replace(
            tiny_config,
            denoiser=replace(
                tiny_config.denoiser, kind=denoiser, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",)
            ),
            dit=TINY,
            text_encoder=replace(tiny_config.text_encoder, kind=text, path=str(t5_folder) if text == "t5" else ""),
            generate=config.Generate(20, 4.0, "ddim", "trailing") if text == "class" else tiny_config.generate,
            train=replace(tiny_config.train, autoencoder=encoder, denoiser=stage),
        )
        assert list(config.conflicts(cfg)) == []
        return cfg

    return make


@pytest.fixture(scope="module")
def trained(config_of, tmp_path_factory) -> Callable[[str], Path]:
    """A function of a kind's name -> the directory of a run that nothing disturbed."""

    @functools.cache
    def make(name: str) -> Path:
        run_dir = tmp_path_factory.mktemp("run")
        assert loop.run(config_of(name), run_dir) == run_dir / "model"
        return run_dir

    return make


@pytest.fixture(scope="module")
def random(trained, config_of, tmp_path_factory) -> Callable[[str], Path]:
    """A function of a kind's name -> a model folder with random weights: twelve steps leave too little to compare."""

    @functools.cache
    def make(name: str) -> Path:
        model = replace(folder.load(trained(name) / "model"), scaling_factor=0.8)
        for part in model.parts().values():
            randomise(part)
        path = tmp_path_factory.mktemp("model") / "model"
        folder.save(path, model, config_of(name))
        return path

    return make


def draw(model: Path, prompt: str, backend: str = "torch", seed: int = 0) -> np.ndarray:
    """uint8 (H, W, 3), as `tinydiff generate` has it by default."""
    opened = open_backend(model, backend, "cpu")
    g, size = opened.description.generate, opened.description.size
    request = pipeline.Request(g.steps, g.cfg_scale, g.sampler, g.schedule, size, size)
    return pipeline.generate(opened, [parse(prompt)], [seed], request)[0]


# ---- training --------------------------------------------------------------------------------------------------------


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of everything that the last step of both stages left behind."""
    paths = [*run_dir.glob("model/*/*"), *run_dir.glob("checkpoints/*-00000012/*.safetensors")]
    return {str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)}


@every_kind
def test_an_interrupted_run_ends_in_the_same_bits(name, trained, config_of, tmp_path, monkeypatch, capsys):
    run_dir = Path(shutil.copytree(trained(name), tmp_path / "run"))
    shutil.rmtree(run_dir / "model")
    for path in run_dir.glob("checkpoints/denoiser-*"):
        shutil.rmtree(path)

    def save_and_stop(checkpoints: Path, stage: str, step: int, *more: object) -> None:
        save(checkpoints, stage, step, *more)
        if step == 6:
            raise KeyboardInterrupt

    save = state.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(state, "save", save_and_stop)
        loop.run(config_of(name), run_dir)
    assert sorted(p.name for p in run_dir.glob("checkpoints/denoiser-*")) == ["denoiser-00000003", "denoiser-00000006"]
    loop.run(config_of(name), run_dir)
    assert "denoiser: going on from step 6" in capsys.readouterr().err
    assert digests(run_dir) == digests(trained(name)) and len(digests(run_dir)) > 10


@every_kind
def test_the_model_folder_is_the_run_s_average(name, trained):
    model, last = folder.load(trained(name) / "model"), trained(name) / "checkpoints" / "denoiser-00000012"
    average = load_file(last / "average.safetensors")
    own = {f"denoiser.{k}": p for k, p in model.denoiser.named_parameters()}
    if KINDS[name][1] == "clip":
        own |= {f"text_encoder.{k}": p for k, p in model.text_encoder.named_parameters()}
    assert own.keys() == average.keys() and all(torch.equal(p, average[k]) for k, p in own.items())
    first = load_file(trained(name) / "checkpoints" / "denoiser-00000009" / "average.safetensors")
    moved = [k for k, v in average.items() if not torch.equal(v, first[k])]
    assert len(moved) > 0.9 * len(average)


@pytest.mark.parametrize("name", T5S)
def test_t5_stays_as_it_was_and_out_of_the_checkpoints(name, trained, t5_folder):
    wanted = load_file(t5_folder / "text_encoder" / "model.safetensors")
    found = load_file(trained(name) / "model" / "text_encoder" / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(v, wanted[k]) for k, v in found.items())
    for path in trained(name).glob("checkpoints/denoiser-*/*.safetensors"):
        assert all(key.startswith("denoiser.") for key in load_file(path))
    texts = ["a red square", "", "a yellow corner"]
    limited = T5Tokenizer.load(t5_folder / "tokenizer", 16).encode(texts)
    assert np.array_equal(T5Tokenizer.load(trained(name) / "model" / "tokenizer").encode(texts), limited)


@pytest.mark.parametrize("name", DITS)
def test_shared_embedders_are_saved_under_each_block_and_load_shared(name, trained):
    stored = weights.tensors([trained(name) / "model" / "transformer" / folder.WEIGHTS])
    part = "timestep_embedder.linear_1.weight"
    one, other = (stored[f"transformer_blocks.{i}.norm1.emb.{part}"] for i in range(2))
    assert torch.equal(one, other) and one.std() > 0
    net = folder.load(trained(name) / "model").denoiser
    assert isinstance(net, DiT) and net.shared
    first, second = (block.norm1.emb for block in net.transformer_blocks)
    assert first is second and len(list(net.parameters())) < len(stored)


def test_each_image_s_first_caption_is_its_class(trained):
    found = folder.load(trained("dit+class") / "model").tokenizer
    assert isinstance(found, Labels) and found.names == LABELS
    assert (found.vocab_size, found.pad, found.max_length) == (1001, 1000, 1)
    assert read_json(trained("dit+class") / "model" / "model_index.json")["id2label"] == {
        str(i): label for i, label in enumerate(LABELS)
    }


# ---- drawing and exporting -------------------------------------------------------------------------------------------


@every_kind
def test_generate_draws_from_the_run(name, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "a red square", "-m", str(trained(name)), "--backend", "torch", "-s", "3", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert done.exit_code == 0 and (tmp_path / "out.png").stat().st_size > 100


TRANSLATED: dict[str, object] = {}  # the autoencoder's graphs do not depend on the denoiser


@pytest.fixture(scope="module")
def bundle(random, tmp_path_factory) -> Callable[..., Path]:
    """A function (kind's name, precision) -> the exported bundle of its random model."""
    import onnx_ir as ir

    def translate(name: str, model: folder.Model, opset: int):
        if not name.startswith("vae"):
            return own(name, model, opset)
        if name not in TRANSLATED:
            TRANSLATED[name] = ir.to_proto(own(name, model, opset))
        return ir.from_proto(TRANSLATED[name])

    own = export.translate

    @functools.cache
    def make(name: str, precision: str = "fp32") -> Path:
        path = tmp_path_factory.mktemp("bundle") / "bundle"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "translate", translate)
            *rows, image = export.export(random(name), path, precision)
        assert image["same"] >= 0.999 and max(row["max_abs_diff"] for row in rows) < 2e-5
        graphs = [row["graph"] for row in rows]
        text = [] if KINDS[name][1] == "class" else ["text_encoder"]
        denoiser = "unet" if KINDS[name][0] == "unet" else "transformer"
        assert graphs == [*text, denoiser, "vae_encoder", "vae_decoder"]
        return path

    return make


@pytest.mark.parametrize(("name", "precision"), [*((name, "fp32") for name in KINDS), ("dit+class", "fp16")])
def test_a_bundle_verifies_and_agrees_with_torch(name, precision, bundle):
    path = bundle(name, precision)
    verify(path)
    names = {p.name for p in path.iterdir()}
    by_class = KINDS[name][1] == "class"
    assert ("text_encoder" in names) is ("tokenizer" in names) is not by_class
    ours, theirs = (draw(path, "a red square", kind).astype(int) for kind in ("onnx", "torch"))
    assert (np.abs(ours - theirs).max(axis=-1) <= 1).mean() >= 0.999 and ours.std() > 10
    other = draw(path, "a blue corner", "onnx")
    assert np.abs(other - ours).mean() > 1  # what is asked for makes a difference


def test_bundles_draw_without_torch(bundle, tmp_path):
    """In one fresh interpreter, in which torch cannot be imported."""
    paths = [str(bundle(name)) for name in KINDS]
    code = f"""
from pathlib import Path
import numpy as np
from tinydiff import pipeline
from tinydiff.backends import open_backend
from tinydiff.text.prompts import parse
drawn = []
for path in {paths!r}:
    opened = open_backend(Path(path), "auto", "cpu")
    assert opened.name == "onnx"
    g, size = opened.description.generate, opened.description.size
    request = pipeline.Request(g.steps, g.cfg_scale, g.sampler, g.schedule, size, size)
    drawn.append(pipeline.generate(opened, [parse("a red square")], [0], request)[0])
np.save({str(tmp_path / "drawn.npy")!r}, drawn)
"""
    run(code, "torch", "transformers", "diffusers")
    for name, image in zip(KINDS, np.load(tmp_path / "drawn.npy"), strict=True):
        assert np.array_equal(image, draw(bundle(name), "a red square", "onnx"))


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(random, config_of, tmp_path_factory) -> Path:
    """The model by class, its first classes named as ImageNet's are."""
    model, path = folder.load(random("dit+class")), tmp_path_factory.mktemp("named") / "model"
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus", "7", "carp, tench", "goldfish"]
    folder.save(path, replace(model, tokenizer=Labels(names, 1000)), config_of("dit+class"))
    return path


def test_a_label_is_a_name_one_of_its_names_or_a_number(named):
    tokenizer = open_backend(named, "torch", "cpu").tokenizer
    labels = ["tench, Tinca tinca", " TINCA TINCA", "0", "carassius auratus", "goldfish", "7", "8", "999", "", "  "]
    assert tokenizer.encode(labels).tolist() == [[0], [0], [0], [1], [4], [2], [8], [999], [1000], [1000]]


def test_equal_labels_draw_equal_images(named):
    drawn = [draw(named, label) for label in ("tench, Tinca tinca", "tinca tinca", "0")]
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0], draw(named, "1"))
    plain = open_backend(named, "torch", "cpu")
    request = pipeline.Request(3, 4.0, "ddim", "trailing", 16, 16)
    null, half = (pipeline.generate(plain, [p], [0], request)[0] for p in ("", parse("0 :0.5 AND 1 :0.5")))
    assert null.std() > 0 and not np.array_equal(null, half)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("goldfsh", r"'goldfsh': no class of this model \(did you mean 'goldfish'\?\); give a label, or a number below"),
        ("1000", "'1000': no class"),
        ("(goldfish:1.3)", "this model draws classes; give a label alone, without weights"),
        ("[goldfish]", "this model draws classes; give a label alone"),
    ],
)
def test_what_is_no_label_is_refused_in_a_line(named, prompt, says):
    with pytest.raises(UsageError, match=says) as caught:
        draw(named, prompt)
    assert len(str(caught.value).splitlines()) == 1


def test_a_class_of_its_own_name_goes_before_a_synonym():
    assert Labels(["hen, bird", "bird"], 1000).encode(["bird", "hen"]).tolist() == [[1], [0]]
    assert Labels(["bird", "hen, bird"], 1000).encode(["bird", "hen"]).tolist() == [[0], [1]]


# ---- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", [0, 7, 999])
def test_a_model_by_class_draws_the_same_in_diffusers(label, random, monkeypatch):
    from diffusers import DiTPipeline
    from diffusers.pipelines.dit import pipeline_dit

    from tinydiff.diffusion.noise import normal

    theirs = DiTPipeline.from_pretrained(random("dit+class"))
    theirs.set_progress_bar_config(disable=True)
    assert theirs.get_label_ids(["a red square"]) == [LABELS.index("a red square")]
    start = torch.from_numpy(normal([5], (4, 8, 8)))
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda shape, **_: start.reshape(shape))
    wanted = theirs([label], guidance_scale=4.0, num_inference_steps=20, output_type="np").images[0] * 255
    found = draw(random("dit+class"), str(label), seed=5)
    assert (np.abs(found - wanted).max(axis=-1) <= 1).mean() >= 0.999 and found.std() > 10


@every_kind
def test_a_folder_without_a_pipeline_of_diffusers_says_so(name, trained):
    found = read_json(trained(name) / "model" / "model_index.json")
    reason = {"unet+t5": "T5", "dit+clip": "DiT that reads text", "dit+t5": "T5"}.get(name)
    assert (reason is None) is ("_no_diffusers_pipeline" not in found) is (found["_class_name"] == "DiTPipeline")
    assert reason is None or reason in found["_no_diffusers_pipeline"]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_dit_by_text_opens_in_diffusers_with_a_class_of_zeros(random):
    from diffusers import Transformer2DModel

    path = random("dit+clip") / "transformer"
    theirs = Transformer2DModel.from_config(Transformer2DModel.load_config(path)).eval()
    tensors = weights.tensors([path / folder.WEIGHTS])
    table = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    theirs.load_state_dict(tensors | {table.format(i): torch.zeros(2, 24) for i in range(2)}, strict=True)
    ours, generator = folder.load(path.parent).denoiser, torch.Generator().manual_seed(0)
    x, context = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 7, 16)))
    t = torch.tensor([3.0, 700.0])
    wanted = theirs(x, context, t, class_labels=torch.zeros(2, dtype=torch.long)).sample
    assert (ours(x, t, context) - wanted).abs().max() <= 5e-6 * wanted.std()
