"""Models besides the U-Net with CLIP: diffusion transformers, by class or by text, texts read by a frozen T5, a codebook.

Each is trained, interrupted, drawn from, exported and, where diffusers has a pipeline for it, opened there.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from contrib import OPERATORS
from drawings import COLOURS, SHAPES
from interpreters import run_without
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from published_dit import published_weights, reference
from runs import sha256, stopped_at, untimed
from safetensors.torch import load_file, save_file
from tensors import randomise
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, normalizers, pre_tokenizers
from typer.testing import CliRunner

from tinydiff import cli, config, export, pipeline
from tinydiff.backends import open_backend
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints import convert, folder, new, weights
from tinydiff.checkpoints.source import Source
from tinydiff.diffusion.noise import normal
from tinydiff.errors import DataError, ModelError, UsageError
from tinydiff.files import read_json
from tinydiff.models.autoencoder import Autoencoder
from tinydiff.models.dit import DiT
from tinydiff.models.t5 import T5Encoder
from tinydiff.networks import TEXT_ENCODERS, network_of
from tinydiff.networks.dit import DiT as DiTSettings
from tinydiff.networks.network import WEIGHTS
from tinydiff.networks.text import T5Config
from tinydiff.precision import PRECISIONS
from tinydiff.text.labels import Labels
from tinydiff.text.prompts import parse
from tinydiff.text.sentencepiece import SPACE, T5Tokenizer
from tinydiff.training import loop
from tinydiff.verified import verify

KINDS = {"unet+t5": ("unet", "t5"), "dit+clip": ("dit", "clip"), "dit+class": ("dit", "class"), "dit+t5": ("dit", "t5")}
KINDS |= {"vq": ("unet", "clip")}


DITS = [name for name, (denoiser, _) in KINDS.items() if denoiser == "dit"]


T5S = [name for name, (_, text) in KINDS.items() if text == "t5"]


TINY = DiTSettings("custom", 2, num_layers=2, num_attention_heads=2, attention_head_dim=12)


T5 = T5Config(40, 16, 8, 32, 2, 2, 8, 20, feed_forward_proj="gated-gelu")


LABELS = sorted(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES)


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
def config_of(tiny_config: config.Config, t5_folder: Path, other_images: Path) -> Callable[[str], config.Config]:
    """A function of a kind's name -> its tiny configuration; one by class draws as diffusers' DiTPipeline does."""

    t5 = {"path": str(t5_folder), "hidden_size": 8}  # a width that nothing may take for T5's own

    def make(name: str) -> config.Config:
        denoiser, text = KINDS[name]
        stage = replace(tiny_config.train.denoiser, sample_every=100)
        encoder = replace(tiny_config.train.autoencoder, sample_every=100)
        cfg = replace(
            tiny_config,
            autoencoder=replace(tiny_config.autoencoder, kind="vq" if name == "vq" else "kl", num_vq_embeddings=16),
            denoiser=config.Denoiser(denoiser),
            unet=replace(tiny_config.unet, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",)),
            dit=TINY,
            text_encoder=replace(tiny_config.text_encoder, kind=text, **t5 if text == "t5" else {}),
            generate=config.Generate(20, 4.0, "ddim", "trailing") if text == "class" else tiny_config.generate,
            train=replace(tiny_config.train, autoencoder=encoder, denoiser=stage, validation_samples=0),
            data=replace(tiny_config.data, validation=str(other_images)),
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
        model = folder.load(Source(trained(name) / "model")).scaled(0.8)
        for part in model.networks.values():
            randomise(part)
        path = tmp_path_factory.mktemp("model") / "model"
        folder.save(path, model, config_of(name))
        return path

    return make


@functools.cache
def draw(model: Path, prompt: str, backend: str = "torch", seed: int = 0) -> np.ndarray:
    """uint8 (H, W, 3), as `tinydiff generate` has it by default."""
    opened = open_backend(Source(model), backend, "cpu")
    g, size = opened.description.generate, opened.description.size
    request = pipeline.Request(g.steps, g.cfg_scale, g.sampler, g.spacing, size, size)
    return pipeline.generate(opened, [parse(prompt)], [seed], request)[0]


# ---- training --------------------------------------------------------------------------------------------------------


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of everything that the last step of both stages left behind."""
    paths = [*run_dir.glob("model/*/*"), *run_dir.glob("checkpoints/*-00000012/*.safetensors")]
    return sha256(run_dir, paths)


@every_kind
def test_an_interrupted_run_ends_in_the_same_bits(name, trained, config_of, tmp_path, monkeypatch, capsys):
    run_dir = Path(shutil.copytree(trained(name), tmp_path / "run"))
    stopped_at("denoiser-00000006", config_of(name), run_dir, monkeypatch)
    assert sorted(p.name for p in run_dir.glob("checkpoints/denoiser-*")) == ["denoiser-00000003", "denoiser-00000006"]
    loop.run(config_of(name), run_dir)
    assert "denoiser: going on from step 6" in capsys.readouterr().err
    assert digests(run_dir) == digests(trained(name)) and len(digests(run_dir)) > 10


@every_kind
def test_every_kind_is_measured_on_images_that_it_does_not_learn(name, trained):
    rows = [row for row in untimed(trained(name)) if "held_out_loss" in row]
    assert [(row["stage"], row["step"]) for row in rows] == [("denoiser", 12)]
    assert 0.05 < rows[0]["held_out_loss"] < 20 and 0 < rows[0]["held_out_error"] < rows[0]["held_out_loss"]


@every_kind
def test_the_model_folder_is_the_run_s_average(name, trained):
    model, last = folder.load(Source(trained(name) / "model")), trained(name) / "checkpoints" / "denoiser-00000012"
    average = load_file(last / "average.safetensors")
    own = {f"denoiser.denoiser.{k}": p for k, p in model.denoiser.named_parameters()}
    if KINDS[name][1] == "clip":
        text_encoder = model.networks["text_encoder"]
        own |= {f"denoiser.text_encoder.{k}": p for k, p in text_encoder.named_parameters()}
    assert own.keys() == average.keys() and all(torch.equal(p, average[k]) for k, p in own.items())
    first = load_file(trained(name) / "checkpoints" / "denoiser-00000009" / "average.safetensors")
    moved = [k for k, v in average.items() if not torch.equal(v, first[k])]
    assert len(moved) > 0.9 * len(average)


@every_kind
def test_every_kind_is_distilled(name, trained, config_of, tmp_path):
    """Its denoiser alone learns, whatever tells it of captions, and draws in four calls without guidance."""
    run_dir, cfg = Path(shutil.copytree(trained(name), tmp_path / "run")), config_of(name)
    stage = replace(cfg.train.distill, steps=4, batch_size=4, sample_every=100, solver_steps=1)
    loop.run(replace(cfg, train=replace(cfg.train, distill=stage)), run_dir)
    before, after = (folder.load(Source(path / "model")) for path in (trained(name), run_dir))
    changed = {
        key
        for key, part in after.networks.items()
        for k, v in part.state_dict().items()
        if not torch.equal(v, before.networks[key].state_dict()[k])
    }
    assert changed == {"unet" if KINDS[name][0] == "unet" else "transformer"}
    assert after.description.prediction == before.description.prediction
    g = Source(run_dir / "model").description.generate
    assert (g.steps, g.cfg_scale, g.sampler) == (4, 1.0, "lcm") and draw(run_dir / "model", "a red square").std() > 0


@pytest.mark.parametrize("name", T5S)
def test_t5_stays_as_it_was_and_out_of_the_checkpoints(name, trained, t5_folder):
    wanted = load_file(t5_folder / "text_encoder" / "model.safetensors")
    found = load_file(trained(name) / "model" / "text_encoder" / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(v, wanted[k]) for k, v in found.items())
    for path in trained(name).glob("checkpoints/denoiser-*/*.safetensors"):
        assert all(key.startswith("denoiser.denoiser.") for key in load_file(path))
    texts = ["a red square", "", "a yellow corner"]
    limited = T5Tokenizer.load(t5_folder / "tokenizer", 16).encode(texts)
    assert np.array_equal(T5Tokenizer.load(trained(name) / "model" / "tokenizer").encode(texts), limited)


@pytest.mark.parametrize("name", DITS)
def test_shared_embedders_are_saved_under_each_block_and_load_shared(name, trained):
    stored = weights.tensors([trained(name) / "model" / "transformer" / WEIGHTS])
    part = "timestep_embedder.linear_1.weight"
    one, other = (stored[f"transformer_blocks.{i}.norm1.emb.{part}"] for i in range(2))
    assert torch.equal(one, other) and one.std() > 0
    net = folder.load(Source(trained(name) / "model")).denoiser
    assert isinstance(net, DiT) and net.shared
    first, second = (block.norm1.emb for block in net.transformer_blocks)
    assert first is second and len(list(net.parameters())) < len(stored)


def test_each_image_s_first_caption_is_its_class(trained):
    found = folder.load(Source(trained("dit+class") / "model")).tokenizers["labels"]
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


@pytest.fixture(scope="module")
def bundle(random, tmp_path_factory) -> Callable[..., Path]:
    """A function (kind's name, precision) -> the exported bundle of its random model."""
    import onnx_ir as ir

    def translate(name: str, model: folder.Model, opset: int) -> ir.Model:
        encoder = type(model.networks.get("text_encoder"))
        key = name, {"text_encoder": encoder, "transformer": "labels" in model.tokenizers}.get(name, type(model.vae))
        if key not in translated:
            translated[key] = ir.to_proto(own(name, model, opset))
        return ir.from_proto(translated[key])

    own, translated = export.translate, {}  # slow, and of any weights the same

    @functools.cache
    def make(name: str, precision: str = "fp32", device: str = "any") -> Path:
        path = tmp_path_factory.mktemp("bundle") / "bundle"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "translate", translate)
            *rows, image = export.export(Source(random(name)), path, precision, device=device)
        bound = 2e-5 if precision == "fp32" else PRECISIONS[precision].graph
        assert image["same"] >= PRECISIONS[precision].same and max(row["max_abs_diff"] for row in rows) < bound
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
    levels = PRECISIONS[precision].levels
    assert (np.abs(ours - theirs).max(axis=-1) <= levels).mean() >= PRECISIONS[precision].same and ours.std() > 10
    other = draw(path, "a blue corner", "onnx")
    assert np.abs(other - ours).mean() > 1  # what is asked for makes a difference


@pytest.mark.parametrize(
    ("name", "precision", "device"),
    [("dit+t5", "bf16", "any"), ("dit+clip", "int8", "cpu"), ("unet+t5", "fp16", "any"), ("vq", "fp16", "cuda")],
)
def test_every_kind_of_network_has_every_precision(name, precision, device, bundle):
    """Which is verified while it is written; here, that its products are in fact of another type."""
    path = bundle(name, precision, device) / ("transformer" if KINDS[name][0] == "dit" else "unet") / "model.onnx"
    proto = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in proto.value_info}
    wanted = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16, "int8": TensorProto.INT32}[precision]
    products = [kinds[n.output[0]] for n in proto.node if n.op_type in ("Gemm", "MatMulInteger")]
    assert products.count(wanted) > (0 if precision == "int8" else len(products) / 2)  # tiny ones are not worth bytes


@pytest.mark.parametrize("name", ["dit+t5", "dit+class"])
def test_operators_of_cuda_give_what_torch_gives(name, bundle, random):
    path, model = bundle(name, "fp32", "cuda"), folder.load(Source(random(name)))
    for part in ("text_encoder", "transformer"):
        if not (path / part).exists():
            continue
        proto = onnx.load(path / part / "model.onnx")
        attentions = [n for n in proto.graph.node if n.op_type == "MultiHeadAttention"]
        packed = [n for n in attentions if len([i for i in n.input[:3] if i]) < 3]
        assert len(packed) == len(attentions) > 0
        fused = {n.op_type for n in proto.graph.node} & {"Gelu", "FastGelu"}
        assert fused == (
            {"Gelu"} if part == "text_encoder" else {"FastGelu"}
        )  # of a product without a bias, and with one
        for size in export.CHECKED:
            inputs = export.examples(part, model, size)
            got = ReferenceEvaluator(proto, new_ops=OPERATORS).run(None, {k: v.numpy() for k, v in inputs.items()})
            assert export.furthest(export.answers(part, model, inputs), got) < 1e-4


@pytest.mark.parametrize("name", ["dit+t5", "dit+class"])
def test_a_card_can_record_the_calls_of_a_transformer(name, bundle, on_card):
    found = {
        node.op_type for node in on_card(bundle(name, "fp32", "cuda") / "transformer" / "model.onnx", True).graph.node
    }
    assert "NhwcConv" in found and not {"MemcpyToHost", "MemcpyFromHost"} & found


def test_bundles_draw_without_torch(bundle, tmp_path):
    """In one fresh interpreter, in which torch cannot be imported."""
    paths = [str(bundle(name)) for name in KINDS]
    code = f"""
from pathlib import Path
import numpy as np
from tinydiff import pipeline
from tinydiff.backends import open_backend
from tinydiff.checkpoints.source import Source
from tinydiff.text.prompts import parse
drawn = []
for path in {paths!r}:
    opened = open_backend(Source(Path(path)), "auto", "cpu")
    assert opened.name == "onnx"
    g, size = opened.description.generate, opened.description.size
    request = pipeline.Request(g.steps, g.cfg_scale, g.sampler, g.spacing, size, size)
    drawn.append(pipeline.generate(opened, [parse("a red square")], [0], request)[0])
np.save({str(tmp_path / "drawn.npy")!r}, drawn)
"""
    run_without(code, "torch", "transformers", "diffusers")
    for name, image in zip(KINDS, np.load(tmp_path / "drawn.npy"), strict=True):
        assert np.array_equal(image, draw(bundle(name), "a red square", "onnx"))


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(random, config_of, tmp_path_factory) -> Path:
    """The model by class, its first classes named as ImageNet's are."""
    model, path = folder.load(Source(random("dit+class"))), tmp_path_factory.mktemp("named") / "model"
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus", "7", "carp, tench", "goldfish"]
    labels = Labels(names, 1000)
    configs = model.configs | {"model_index": new.configs(config_of("dit+class"), labels)["model_index"]}
    another = replace(model, configs=configs, tokenizers={"labels": labels}, path=Path())  # of another program
    folder.save(path, another)
    return path


def test_a_label_is_a_name_one_of_its_names_or_a_number(named):
    tokenizer = open_backend(Source(named), "torch", "cpu").tokenizers["labels"]
    labels = ["tench, Tinca tinca", " TINCA TINCA", "0", "carassius auratus", "goldfish", "7", "8", "999", "", "  "]
    assert tokenizer.encode(labels).tolist() == [[0], [0], [0], [1], [4], [2], [8], [999], [1000], [1000]]


@pytest.mark.parametrize(("names", "said"), [(["cat", "dog"], {"1": 1, "dog": 1}), (["1", "2", "3"], {"1": 0, "3": 2})])
def test_numbers_of_a_model_trained_here_are_those_that_were_trained(names, said, tmp_path):
    Labels(names, 1000).save(tmp_path)
    labels = Labels.load(tmp_path)
    assert {text: labels.number(text) for text in said} == said
    for text in ("0" if names[0] == "1" else "2", "999", "-1", "٣", "1.0"):
        with pytest.raises(UsageError, match="no class of this model"):
            labels.number(text)


@pytest.mark.parametrize("other", ["zebra", "0", "2", " ", "7"])
def test_labels_of_data_are_names(other):
    labels = Labels(["1", "cat", "Dog"], 1000, whole=True)
    labels.check(["cat", "dog ", "1", "DOG"])
    with pytest.raises(DataError, match=r"no class that this run was begun with.*--fresh"):
        labels.check(["cat", other])


def test_equal_labels_draw_equal_images(named):
    drawn = [draw(named, label) for label in ("tench, Tinca tinca", "tinca tinca", "0")]
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0], draw(named, "1"))
    plain = open_backend(Source(named), "torch", "cpu")
    request = pipeline.Request(3, 4.0, "ddim", "trailing", 16, 16)
    null, half = (pipeline.generate(plain, [p], [0], request)[0] for p in ("", parse("0 :0.5 AND 1 :0.5")))
    assert null.std() > 0 and not np.array_equal(null, half)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (
            "goldfsh",
            r"'goldfsh': no class of this model \(did you mean 'goldfish'\?\); give a label, or a number below",
        ),
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


def same_as_diffusers(model: Path, label: int, prompt: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """The share of pixels that are at most one grey level from those of diffusers' DiTPipeline, from the same noise."""
    from diffusers import DiTPipeline
    from diffusers.pipelines.dit import pipeline_dit

    theirs = DiTPipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    start = torch.from_numpy(normal([5], (4, 8, 8)))
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda shape, **_: start.reshape(shape))
    wanted = theirs([label], guidance_scale=4.0, num_inference_steps=20, output_type="np").images[0] * 255
    opened = open_backend(Source(model), "torch", "cpu")
    request = pipeline.Request(20, 4.0, "ddim", opened.description.scheduler.spacing, 16, 16)
    found = pipeline.generate(opened, [prompt], [5], request)[0]
    assert found.shape == wanted.shape and found.std() > 10
    return (np.abs(found - wanted).max(axis=-1) <= 1).mean()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", [0, 7, 11])
def test_a_model_by_class_draws_the_same_in_diffusers(label, random, monkeypatch):
    assert same_as_diffusers(random("dit+class"), label, str(label), monkeypatch) >= 0.999


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_labels_are_those_of_diffusers(random):
    from diffusers import DiTPipeline

    theirs = DiTPipeline.from_pretrained(random("dit+class"))
    ours = folder.load(Source(random("dit+class"))).tokenizers["labels"]
    assert theirs.get_label_ids(LABELS) == ours.encode(LABELS)[:, 0].tolist()


@every_kind
def test_a_folder_without_a_pipeline_of_diffusers_says_so(name, trained):
    found = read_json(trained(name) / "model" / "model_index.json")
    reason = {"unet+t5": "T5", "dit+clip": "DiT that reads text", "dit+t5": "T5", "vq": "VQModel"}.get(name)
    assert (reason is None) is ("_no_diffusers_pipeline" not in found) is (found["_class_name"] == "DiTPipeline")
    assert reason is None or reason in found["_no_diffusers_pipeline"]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_a_dit_by_text_opens_in_diffusers_with_a_class_of_zeros(random):
    from diffusers import Transformer2DModel

    path = random("dit+clip") / "transformer"
    sizes = {key: value for key, value in read_json(path / "config.json").items() if not key.startswith("_")}
    theirs = Transformer2DModel(**sizes).eval()
    tensors = weights.tensors([path / WEIGHTS])
    table = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    theirs.load_state_dict(tensors | {table.format(i): torch.zeros(2, 24) for i in range(2)}, strict=True)
    ours, generator = folder.load(Source(path.parent)).denoiser, torch.Generator().manual_seed(0)
    x, context = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 7, 16)))
    t = torch.tensor([3.0, 700.0])
    with torch.no_grad():
        wanted, found = theirs(x, context, t, class_labels=torch.zeros(2, dtype=torch.long)).sample, ours(x, t, context)
    assert (found - wanted).abs().max() <= 5e-6 * wanted.std()


# ---- published DiT -----------------------------------------------------------------------------------------------------

DEPTH, WIDTH = 2, 64


BLOCK = {  # published: diffusers, in a block
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


EVERY = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}


def in_diffusers_form(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published tensors as a DiTTransformer2DModel has them."""
    found = {}
    for kind in ("weight", "bias"):
        found |= {f"{theirs}.{kind}": w[f"{name}.{kind}"] for name, theirs in OUTSIDE.items()}
        for i in range(DEPTH):
            block, emb = f"transformer_blocks.{i}", f"transformer_blocks.{i}.norm1.emb"
            found |= {f"{block}.{theirs}.{kind}": w[f"blocks.{i}.{name}.{kind}"] for name, theirs in BLOCK.items()}
            found |= {f"{emb}.{theirs}.{kind}": w[f"{name}.{kind}"].clone() for name, theirs in EVERY.items()}
            thirds = w[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            found |= {f"{block}.attn1.to_{x}.{kind}": v.clone() for x, v in zip("qkv", thirds, strict=True)}
    table = w["y_embedder.embedding_table.weight"]
    names = (f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight" for i in range(DEPTH))
    return found | {name: table.clone() for name in names}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, Path]:
    """A DiT as it was published, with learned sigma, and an autoencoder: two files of random weights."""
    path, vae = tmp_path_factory.mktemp("published"), Autoencoder(config.Autoencoder((32, 64), 1, 4, 32, True))
    randomise(vae)
    save_file(published_weights(DEPTH, WIDTH, classes=1000), path / "dit.safetensors")
    save_file(vae.state_dict(), path / "vae.safetensors")
    return path / "dit.safetensors", path / "vae.safetensors"


def asked(opened: pipeline.Backend) -> np.ndarray:
    """What the denoiser says of noise under two labels and none: (3, 4, 8, 8)."""
    x = np.random.default_rng(0).standard_normal((3, 4, 8, 8), np.float32)
    ids = opened.tokenizers["labels"].encode(["3", "999", ""])
    return opened.denoise(x, 601.0, opened.encode_text({"labels": ids}))


def test_a_published_file_draws_as_the_paper_s_network(published):
    dit, vae = published
    opened = open_backend(Source(dit, vae=vae), "torch", "cpu")
    assert isinstance(opened, TorchBackend) and opened.model.scaling_factor == 0.18215
    d = opened.description
    assert (d.size, d.multiple, d.prediction, d.scheduler.sampler, len(d.schedule)) == (16, 4, "epsilon", "ddim", 1000)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 4, 8, 8), np.float32))
    weights = {k: v.double() for k, v in load_file(dit).items()}
    wanted = reference(weights, x.double(), torch.full((3,), 601.0), torch.tensor([3, 999, 1000]), 1)[:, :4]
    assert np.abs(asked(opened) - wanted.numpy()).max() <= 1e-5 * wanted.std()
    request = pipeline.Request(5, 4.0, "ddim", "leading", 16, 16)
    drawn = pipeline.generate(opened, ["3", "999"], [0, 0], request)
    assert drawn.shape == (2, 16, 16, 3) and drawn.std() > 1 and not np.array_equal(*drawn)


def test_a_published_file_needs_an_autoencoder(published):
    with pytest.raises(
        ModelError, match="a DiT alone, without an autoencoder; give the file of one with --vae"
    ) as caught:
        open_backend(Source(published[0]), "torch", "cpu")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_a_published_file_becomes_a_folder_of_the_same_network(published, tmp_path, precision):
    dit, vae = published
    convert.to_folder(Source(dit, vae=vae), tmp_path / "folder", precision)
    verify(tmp_path / "folder")
    found = read_json(tmp_path / "folder" / "transformer" / "config.json")
    assert (found["freq_shift"], found["norm_eps"], found["out_channels"]) == (0, 1e-6, 8)
    assert "freq_shift" in read_json(tmp_path / "folder" / "model_index.json")["_no_diffusers_pipeline"]
    ours, theirs = (
        asked(open_backend(Source(tmp_path / "folder"), "torch", "cpu")),
        asked(open_backend(Source(dit, vae=vae), "torch", "cpu")),
    )
    assert np.array_equal(ours, theirs) if precision is None else 0 < np.abs(ours - theirs).max() < 0.02 * theirs.std()
    with pytest.raises(ModelError, match=r"only a Stable Diffusion U-Net .* has a single-file layout"):
        convert.to_single_file(Source(tmp_path / "folder"), tmp_path / "one.safetensors")


@pytest.fixture(scope="module")
def their_folder(published, tmp_path_factory) -> Path:
    """The same weights in a folder that diffusers wrote."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    sizes = {"num_layers": DEPTH, "num_attention_heads": 1, "attention_head_dim": WIDTH, "sample_size": 8}
    transformer = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    transformer.load_state_dict(in_diffusers_form(load_file(published[0])), strict=True)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=[32, 64], layers_per_block=1, **kinds)
    vae.load_state_dict(load_file(published[1]), strict=True)
    path = tmp_path_factory.mktemp("theirs")
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(path)
    index = read_json(path / "model_index.json") | {"id2label": {"0": "tench, Tinca tinca", "1": "goldfish"}}
    folder.write_json(path / "model_index.json", index)
    return path


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_folder_of_diffusers_is_the_same_network_here(their_folder, published):
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel.from_pretrained(their_folder / "transformer").eval()
    opened = open_backend(Source(their_folder), "torch", "cpu")
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 4, 8, 8), np.float32))
    wanted = theirs(x, torch.full((3,), 601.0), torch.tensor([3, 999, 1000])).sample[:, :4].numpy()
    assert np.abs(asked(opened) - wanted).max() <= 1e-5 * wanted.std()
    assert opened.tokenizers["labels"].encode(["tinca tinca", "Goldfish", "2"]).tolist() == [[0], [1], [2]]
    exact = asked(open_backend(Source(published[0], vae=published[1]), "torch", "cpu"))
    assert np.abs(wanted - exact).max() > 1e-2 * exact.std()  # diffusers spaces the times' frequencies otherwise


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_diffusers_draws_the_same_here(their_folder, monkeypatch):
    assert same_as_diffusers(their_folder, 1, "goldfish", monkeypatch) >= 0.999


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["text_encoder.kind=class"], "text_encoder.kind: class goes with denoiser.kind dit"),
        (["text_encoder.kind=t5"], "text_encoder.path: names the folder of a frozen text encoder"),
        (
            ["text_encoder.path=t5"],
            "text_encoder.path: names the folder of a frozen text encoder, with text_encoder.kind t5 or bert",
        ),
        (["denoiser.kind=dit", "dit.patch_size=3"], "dit.patch_size: 3 is none of 2, 4, 8"),
        (
            ["denoiser.kind=dit", "dit.patch_size=4", "data.resolution=24"],
            "dit.patch_size: 4 does not divide the latents' side 6",
        ),
        (["denoiser.kind=dit", "dit.size=XXL"], "dit.size: unknown name 'XXL'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(overrides, says):
    with pytest.raises(UsageError) as caught:
        config.load(None, overrides)
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("size", "millions"), {"S": 33, "B": 130, "L": 458, "XL": 675}.items())
def test_the_paper_s_sizes_build_by_name(size, millions):
    words = ["denoiser.kind=dit", "text_encoder.kind=class", f"dit.size={size}", "data.resolution=256"]
    words += ["autoencoder.block_out_channels=[8,8,8,8]"]
    with torch.device("meta"):
        model = folder.build(config.load(None, words), Labels([], 1000))
    assert (
        isinstance(model.denoiser, DiT)
        and model.denoiser.pos_embed.place.base == 16
        and model.networks.keys() >= {"vae"}
    )
    assert sum(p.numel() for p in model.denoiser.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


def lose(*names: str) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        for name in names:
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()

    return harm


def say(**changes: object) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        file = path / "text_encoder" / "config.json"
        folder.write_json(file, read_json(file) | changes)

    return harm


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: shutil.rmtree(path), "holds no text encoder; text_encoder.path names"),
        (lose("tokenizer"), "tokenizer"),
        (lose("tokenizer/tokenizer.json"), "spiece.model: No such file"),
        (lose("text_encoder"), "t5: holds no text encoder"),
        (lose("text_encoder/model.safetensors"), "text_encoder"),
        (lambda path: (path / "text_encoder" / "model.safetensors").write_bytes(b"no weights"), "model.safetensors"),
        (lambda path: (path / "text_encoder" / "config.json").write_text("{"), "config.json"),
        (say(model_type="clip_text_model"), "model_type is 'clip_text_model', and only 't5' is supported"),
        (say(feed_forward_proj="gated-silu"), "gated-silu"),
        (say(relative_attention_num_buckets=3), "do not suit"),
        (say(vocab_size="many"), "text_encoder: unsupported or incomplete config.json"),
        (say(d_ff=48), "its weights do not fit its config.json at"),
    ],
)
def test_a_t5_that_cannot_be_read_is_named_before_any_step(harm, says, t5_folder, config_of, tmp_path):
    path = Path(shutil.copytree(t5_folder, tmp_path / "t5"))
    harm(path)
    cfg = config_of("dit+t5")
    with pytest.raises((ModelError, UsageError)) as caught:
        loop.run(replace(cfg, text_encoder=replace(cfg.text_encoder, path=str(path))), tmp_path / "run")
    message = str(caught.value)
    assert says in message and str(tmp_path) in message and len(message.splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tokenizer_of_more_pieces_than_the_encoder_has_is_refused(t5_folder, config_of, tmp_path):
    path = Path(shutil.copytree(t5_folder, tmp_path / "t5"))
    table = load_file(path / "text_encoder" / "model.safetensors")
    save_file(table | {"shared.weight": table["shared.weight"][:8]}, path / "text_encoder" / "model.safetensors")
    say(vocab_size=8)(path)
    cfg = config_of("unet+t5")
    with pytest.raises(ModelError, match="text_encoder: has vectors of 8 pieces, its tokenizer 12") as caught:
        loop.run(replace(cfg, text_encoder=replace(cfg.text_encoder, path=str(path))), tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1


def test_a_dit_by_text_without_its_text_encoder_is_no_class_model(random, tmp_path):
    path = Path(shutil.copytree(random("dit+clip"), tmp_path / "model"))
    (path / "manifest.json").unlink()
    shutil.rmtree(path / "text_encoder")
    with pytest.raises(ModelError, match="model/text_encoder: missing; copy the whole model folder"):
        open_backend(Source(path), "torch", "cpu")


def test_a_bundle_by_text_without_its_text_encoder_is_refused(bundle, tmp_path):
    path = Path(shutil.copytree(bundle("dit+clip"), tmp_path / "bundle"))
    shutil.rmtree(path / "text_encoder")
    for says in (r"text_encoder.*missing", r"bundle/text_encoder: missing"):
        with pytest.raises(ModelError, match=says):  # as the manifest sees it, and where there is none
            open_backend(Source(path), "onnx", "cpu")
        (path / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("index", "classes", "labels"),
    [
        ({}, 1000, {"5": 5, "": 1000}),
        ({"id2label": {"7": "crane", "2": "hen, cock"}}, 1000, {"crane": 7, "cock": 2, "0": 0}),
        ({"id2label": {"3": "crane", "10000000000000": "hen"}}, 4, {"crane": 3, "": 4}),
    ],
)
def test_labels_of_other_folders(index, classes, labels, tmp_path):
    found = {"model_index": index, "transformer": {"num_embeds_ada_norm": classes}}
    tokenizer = labelled(tmp_path / "model", found).tokenizers["labels"]
    assert tokenizer.encode(list(labels))[:, 0].tolist() == list(labels.values())


@pytest.mark.parametrize(
    "found",
    [
        {"model_index": {"id2label": {"hen": 1}}, "transformer": {"num_embeds_ada_norm": 1000}},
        {"model_index": {"id2label": ["hen"]}, "transformer": {"num_embeds_ada_norm": 1000}},
        {"model_index": {}, "transformer": {"num_embeds_ada_norm": "many"}},
    ],
)
def test_labels_that_make_no_sense_are_refused(found, tmp_path):
    with pytest.raises(ModelError, match="its classes make no sense|num_embeds_ada_norm"):
        labelled(tmp_path / "model", found).tokenizers  # noqa: B018  which reads them


@pytest.mark.parametrize(("count", "said"), [(3, False), (1000, False), (1001, True)])
def test_more_classes_than_diffusers_null_label_leaves_room_for_are_said(count, said):
    cfg = config.make(denoiser={"kind": "dit"}, text_encoder={"kind": "class"})
    found = new.configs(cfg, Labels([f"class {i}" for i in range(count)], max(1000, count)))["model_index"]
    assert ("_no_diffusers_pipeline" in found) is said


def labelled(path: Path, found: dict[str, dict]) -> Source:
    """A folder with these JSON files, and the least of the others that it needs to be looked at."""
    places = {"model_index": "model_index.json", "transformer": "transformer/config.json"}
    others = {"scheduler/scheduler_config.json": {}, "vae/config.json": {}}
    for place, table in (others | {places[name]: table for name, table in found.items()}).items():
        (path / place).parent.mkdir(parents=True, exist_ok=True)
        folder.write_json(path / place, table)
    return Source(path)


def test_a_text_encoder_that_does_not_say_what_it_is_is_clip():
    for table in ({}, {"hidden_size": 16}, {"model_type": "clip_text_model"}, {"model_type": "something else"}):
        assert network_of("text_encoder", table) is TEXT_ENCODERS["clip"]
    assert network_of("text_encoder", {"model_type": "t5"}) is TEXT_ENCODERS["t5"]
