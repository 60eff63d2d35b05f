"""What a denoiser is told besides text: a class, another image, tokens of the noise level; from the data to a picture."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import digests
from tensors import noise, randomise, same
from torch.nn import functional as F
from typer.testing import CliRunner

from tinydiff import cli, condition, config, export, inspect, pipeline
from tinydiff.backends import open_backend
from tinydiff.checkpoints import convert, folder
from tinydiff.checkpoints.source import Source
from tinydiff.data.columns import Others
from tinydiff.data.dataset import Images, open_source
from tinydiff.errors import DataError, ModelError, UsageError
from tinydiff.files import read_json
from tinydiff.models.attention import FusedAttention
from tinydiff.models.unet import UNet
from tinydiff.networks import DENOISERS
from tinydiff.networks.network import Array, Table
from tinydiff.text.labels import Labels
from tinydiff.text.tokenizer import Tokenizer
from tinydiff.training import loop
from tinydiff.training.given import Columns

CROSS = "CrossAttnDownBlock2D"
SIZES: Table = {"block_out_channels": (16, 32), "down_block_types": (CROSS, CROSS), "layers_per_block": 1}
SIZES |= {"attention_head_dim": 2, "norm_num_groups": 8, "use_linear_projection": True, "cross_attention_dim": 12}
SIZES |= {"sample_size": 8, "in_channels": 4, "out_channels": 4}

ROW: Any = DENOISERS["unet"]


def network(**own: Any) -> UNet:
    """A U-Net of a table, every parameter random."""
    made = ROW.build(SIZES | own)
    randomise(made)
    return made.eval()


def told(table: Table, batch: int = 2, side: int = 8) -> dict[str, torch.Tensor]:
    """Random conditions of a table, of five tokens of text."""
    sizes = {"batch": batch, "height": side, "width": 2 * side, "sequence": 5}
    arrays: dict[str, Array] = ROW.conditions(ROW.complete(table))
    return {name: noise(*array.shape(sizes), seed=i) for i, (name, array) in enumerate(arrays.items())}


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "own", [{"num_class_embeds": 7}, {"in_channels": 8}, {"num_class_embeds": 3, "in_channels": 8}]
)
@torch.no_grad()
def test_class_and_concatenation_are_those_of_diffusers(own):
    from diffusers import UNet2DConditionModel

    table = {**SIZES, "up_block_types": ("CrossAttnUpBlock2D",) * 2, **own}
    theirs, ours = UNet2DConditionModel(**table).eval(), network(**own)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    given, x, t = told(table), noise(2, 4, 8, 16, seed=9), torch.tensor([3.0, 800.0])
    read, more = x, {}
    if classes := own.get("num_class_embeds"):
        labels = torch.tensor([classes - 1, 1])
        given["class_labels"], more["class_labels"] = F.one_hot(labels, classes).float(), labels
    if "in_channels" in own:
        read = torch.cat([x, given["image_latents"]], 1)
    same(ours(x, t, **given), theirs(read, t, given["encoder_hidden_states"], **more).sample)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_fused_attention_is_the_weighted_sum_of_the_formula(qk_norm):
    """sum_m w_m softmax(Q_h K_mh^T / sqrt d) V_mh, head by head and row by row."""
    layer = FusedAttention(8, 2, 6, 3, qk_norm)
    randomise(layer)
    x, context = noise(2, 5, 8), [noise(2, n, 6, seed=n) for n in (3, 1, 4)]
    w = layer.fusion.exp() / layer.fusion.exp().sum()
    assert w.std() > 0
    keys, values = [layer.to_k, *layer.more_k], [layer.to_v, *layer.more_v]
    rows = torch.zeros(2, 5, 8)
    for b, i, h in ((b, i, h) for b in range(2) for i in range(5) for h in range(2)):
        part = slice(4 * h, 4 * h + 4)
        for m, tokens in enumerate(context):
            q, k, v = layer.to_q(x[b, i])[part], keys[m](tokens[b])[:, part], values[m](tokens[b])[:, part]
            if qk_norm:
                q = q / (q.square().mean() + 1e-6).sqrt() * layer.norm_q.weight
                k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_k.weight
            weights = (k @ q / 4**0.5).exp()
            rows[b, i, part] += w[m] * (weights[:, None] * v).sum(0) / weights.sum()
    same(layer(x, context), rows @ layer.to_out[0].weight.T + layer.to_out[0].bias)


EVERYTHING = {"label": "cross", "num_class_embeds": 5, "image": "cross", "time_tokens": 3}


@pytest.mark.parametrize(
    "own", [{"time_tokens": 2}, {"label": "cross", "num_class_embeds": 5}, {"image": "cross"}, EVERYTHING]
)
def test_every_source_is_read_and_every_parameter_of_it_learns(own):
    made, x, t = network(**own), noise(2, 4, 8, 16, seed=9), torch.tensor([3.0, 800.0])
    given = told({**SIZES, **own})
    before = made(x, t, **given)
    before.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())
    with torch.no_grad():
        for name in given.keys() - {"encoder_hidden_states"}:
            other = made(x, t, **given | {name: given[name].flip(0)})
            assert (other - before).abs().max() > 1e-5, name
        blocks = [part for part in made.modules() if isinstance(part, FusedAttention)]
        for layer in blocks:  # with all the weight on the text it is the text alone that is read
            layer.fusion[0] = 1e4
        plain = network()
        plain.load_state_dict(made.state_dict(), strict=False)
        same(made(x, t, **given), plain(x, t, given["encoder_hidden_states"]))
    assert blocks


@torch.no_grad()
def test_an_image_s_tokens_know_their_place():
    made = network(image="cross")
    given = told({**SIZES, "image": "cross"})
    picture = torch.zeros_like(given["image_latents"])
    picture[:, :, :2, :2] = 1
    x, t = noise(2, 4, 8, 16, seed=9), torch.tensor(100.0)
    one, other = (made(x, t, **given | {"image_latents": each}) for each in (picture, picture.roll(4, 3)))
    assert (one - other).abs().max() > 1e-5


# ---- data ------------------------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 90, 90), "blue": (0, 0, 60)}  # also light and dark, which an autoencoder learns first
SIDE = 16


def half(left: bool, colour: tuple[int, ...] = (255, 255, 255), ground: int = 0) -> np.ndarray:
    """A picture of one coloured half: uint8 (16, 16, 3)."""
    picture = np.full((SIDE, SIDE, 3), ground, np.uint8)
    picture[:, slice(0, SIDE // 2) if left else slice(SIDE // 2, SIDE)] = colour
    return picture


def write(path: Path, count: int = 16) -> list[dict[str, Any]]:
    """A folder in which the class alone says the colour, and the other image alone which half has it; its table's rows."""
    path.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        name, left = list(COLOURS)[i % 2], bool(i // 2 % 2)
        Image.fromarray(half(left, COLOURS[name], 255)).save(path / f"a{i}.png")
        Image.fromarray(half(left)).save(path / f"o{i}.png")
        rows.append({"file_name": f"a{i}.png", "text": "a picture", "label": name, "image": f"o{i}.png"})
    save(path, rows)
    return rows


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("columns") / "data"
    write(path)
    return path


def settings(path: Path, **more: Any) -> config.Data:
    return config.Data(str(path), SIDE, **{"held_out": 0.0, "max_bad_fraction": 0.0} | more)


def test_a_folder_gives_classes_and_other_images(data, tmp_path):
    source: Any = open_source(settings(data), columns=("label", "image"))
    named = {source.identity(i): source.label(i) for i in range(len(source))}
    assert named == {f"a{i}.png": list(COLOURS)[i % 2] for i in range(16)}
    i = [source.identity(i) for i in range(16)].index("a2.png")
    np.testing.assert_array_equal(source.other(i), half(True))
    with Image.open(data / "a2.png") as image:
        np.testing.assert_array_equal(source.image(i), np.asarray(image))
    flipped = Images(Others(source), settings(data, flip=True))  # type: ignore[arg-type]
    np.testing.assert_array_equal(flipped[i + 16], half(False))


def test_columns_that_nobody_asks_for_change_nothing(data, tmp_path):
    """Not even whether the data are those that a run was begun with; those asked for do, each."""
    shutil.copytree(data, tmp_path / "data")
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    save(tmp_path / "data", [row | {"label": "x", "image": "gone.png"} for row in rows])
    paths = data, tmp_path / "data"
    one, other = (open_source(settings(path)).fingerprint() for path in paths)
    assert one == other
    labelled = [open_source(settings(path), columns=["label"]).fingerprint() for path in paths]
    assert len({*labelled, one}) == 3


LACKS = {
    "no class in some rows": (lambda rows: [rows[0].pop("label"), rows[5].pop("label")], "label", ["2 of 16", "label"]),
    "half of the rows without an image": (lambda rows: [row.pop("image") for row in rows[::2]], "image", ["8 of 16"]),
    "an image that is not there": (lambda rows: rows[3].update(image="o99.png"), "image", ["a3.png", "1 of 16"]),
    "a class that is a list": (lambda rows: rows[3].update(label=["a"]), "label", ["a3.png", "1 of 16"]),
    "an image of another size": (
        lambda rows: rows[3].update(image="small.png"),
        "image",
        ["8x4", "16x16", "small.png"],
    ),
    "a broken image": (lambda rows: rows[3].update(image="bad.png"), "image", ["1 of 16"]),
}


@pytest.mark.parametrize("what", LACKS)
def test_data_without_what_the_denoiser_is_to_be_told_are_refused_in_a_line(what, data, tmp_path):
    change, column, said = LACKS[what]
    shutil.copytree(data, tmp_path / "data")
    Image.new("RGB", (8, 4)).save(tmp_path / "data" / "small.png")
    (tmp_path / "data" / "bad.png").write_bytes((data / "a0.png").read_bytes()[:60])
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    change(rows)
    save(tmp_path / "data", rows)
    open_source(settings(tmp_path / "data"))  # without the column all is well
    with pytest.raises(DataError) as caught:
        open_source(settings(tmp_path / "data"), columns=[column])
    assert all(each in str(caught.value) for each in said) and "\n" not in str(caught.value), caught.value


def test_shards_and_folders_of_classes_give_classes(data, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, (kind, text) in enumerate([("json", '{"text": "a\\nb", "label": 7}'), ("cls", "cat"), ("txt", "c")]):
            for name, content in ((f"{i}.png", (data / f"a{i}.png").read_bytes()), (f"{i}.{kind}", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    source: Any = open_source(settings(tmp_path / "a.tar"))
    assert [source.label(i) for i in range(3)] == ["7", "cat", ""]
    assert [source.captions(i) for i in range(3)] == [["a b"], ["cat"], ["c"]]
    with pytest.raises(DataError, match=r"2.png: no label, and 1 of 3 images have none"):
        open_source(settings(tmp_path / "a.tar"), columns=["label"])
    with pytest.raises(DataError, match=r"3 of 3 images have none"):
        open_source(settings(tmp_path / "a.tar"), columns=["image"])
    for name in COLOURS:
        (tmp_path / "classes" / name).mkdir(parents=True)
        Image.fromarray(half(True)).save(tmp_path / "classes" / name / "a.png")
    classes: Any = open_source(settings(tmp_path / "classes"), columns=["label"])
    assert [classes.label(i) for i in range(2)] == ["blue", "red"]
    shapes: Any = open_source(config.Data(samples=8), columns=["label"])
    assert all(f" {shapes.label(i)} " in f"{shapes.captions(i)[0]} " for i in range(8))


# ---- training --------------------------------------------------------------------------------------------------------


def configuration(path: Path, steps: tuple[int, int], unet: dict[str, Any], **diffusion: Any) -> config.Config:
    common = {"batch_size": 8, "warmup": 5, "sample_every": 1000, "lr": 5e-3, "save_every": max(1, steps[1] // 2)}
    common |= {"optimizer": "muon", "ema": 0.9}
    stages = {"autoencoder": {**common, "steps": steps[0]}, "denoiser": {**common, "steps": steps[1]}}
    text = {"vocab_size": 600, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return config.make(
        data=settings(path),
        autoencoder=config.Autoencoder((8, 16), 1, 4, 4, False),
        text_encoder=text | {"num_attention_heads": 2, "max_position_embeddings": 16},
        unet={"block_out_channels": (16, 32), "down_block_types": (CROSS,) * 2, "attention_head_dim": 2}
        | {"norm_num_groups": 8, **unet},
        diffusion=diffusion,
        train={"precision": "fp32", "device": "cpu", "threads": 1, "validation_samples": 0, **stages},
        generate={"steps": 6, "cfg_scale": 1.0, "sampler": "dpmpp_2m", "spacing": "trailing"},
    )


@pytest.fixture(scope="module")
def obeying(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that has learnt the folder `data`."""
    cfg = configuration(data, (120, 100), {"label": "time", "image": "concat"})
    return loop.run(cfg, tmp_path_factory.mktemp("obeying") / "run")


@pytest.mark.filterwarnings("ignore")
def test_samples_obey_the_class_and_the_other_image(obeying):
    """Every caption is the same: what tells red from blue, and left from right, is what else the model is told."""
    backend = open_backend(Source(obeying), "torch", "cpu")
    request = pipeline.Request(6, 1.0, "dpmpp_2m", "trailing", SIDE, SIDE)
    light = {}
    for name in COLOURS:
        for left in (True, False):
            given = pipeline.given_with(backend, name, half(left))
            drawn = pipeline.generate(backend, ["a picture"] * 3, [1, 2, 3], request, given=given).astype(float)
            halves = [drawn[:, :, :8].mean((1, 2)), drawn[:, :, 8:].mean((1, 2))]  # (3, 3) each
            coloured, white = halves if left else halves[::-1]
            assert (white.mean(1) > 210).all() and (coloured.mean(1) < 190).all()
            light[name, left] = coloured.mean(1)
    for left in (True, False):
        assert (light["red", left] - light["blue", left] > 60).all()


def test_a_model_knows_its_classes_and_what_it_can_do_without(obeying):
    index, table = (read_json(obeying / name) for name in ("model_index.json", "unet/config.json"))
    assert index["id2label"] == {"0": "blue", "1": "red"} and set(index["_spared"]) == {"label", "image"}
    assert index["_class_name"] == "TinydiffPipeline" and "no label" in index["_no_diffusers_pipeline"]
    assert table["num_class_embeds"] == 3 and table["in_channels"] == 8 and table["out_channels"] == 4
    assert not {"label", "image", "time_tokens"} & table.keys()  # diffusers' form says both
    assert ROW.settings_of(ROW.read(table)).label == "time" and ROW.settings_of(ROW.read(table)).image == "concat"


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_diffusers_opens_the_network_of_a_model_that_is_told_more(obeying):
    from diffusers import UNet2DConditionModel

    theirs, ours = UNet2DConditionModel.from_pretrained(obeying / "unet"), folder.load(Source(obeying)).denoiser
    x, picture, text = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1), noise(2, 3, 16, seed=2)
    labels = torch.tensor([2, 0])
    told = {"class_labels": F.one_hot(labels, 3).float(), "image_latents": picture}
    wanted = theirs(torch.cat([x, picture], 1), 40, text, class_labels=labels).sample
    same(ours(x, torch.tensor(40.0), text, **told), wanted)


def test_a_resumed_run_is_told_the_same(data, tmp_path):
    """All of it at once: checkpoints are equal bit for bit, those of the run and those of one that went on from its middle."""
    cfg = configuration(data, (2, 4), {"label": "cross", "image": "cross", "time_tokens": 2})
    loop.run(cfg, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "denoiser-00000004")
    shutil.rmtree(tmp_path / "again" / "image_latents")
    loop.run(cfg, tmp_path / "again")
    assert digests(tmp_path / "run") == digests(tmp_path / "again")
    assert [p.name for p in (tmp_path / "run" / "image_latents").iterdir()]


def test_each_column_is_left_out_as_often_as_it_is_to_be():
    """By numbers of its own for each row, so that each is left out with and without the others."""
    arrays = ROW.conditions(ROW.complete(SIZES | {"num_class_embeds": 4, "image": "cross"}))
    given = {k: v for k, v in arrays.items() if k != "encoder_hidden_states"}
    labels = SimpleNamespace(pad=3, vocab_size=4)
    dropout = SimpleNamespace(label_dropout=0.25, image_dropout=0.4)
    cfg = SimpleNamespace(diffusion=dropout, train=SimpleNamespace(seed=3))
    columns: Any = SimpleNamespace(
        run=SimpleNamespace(cfg=cfg),
        description=SimpleNamespace(given=given, labels=labels),
        names={"label": "class_labels", "image": "image_latents"},
    )
    count = 4000
    told = {"class_labels": F.one_hot(torch.zeros(count, dtype=torch.long), 4).float()}
    told |= {"image_latents": torch.ones(count, 1, 2, 2)}
    kept = Columns.spared(columns, told, "denoiser", 5, range(count))
    unlabelled, blank = kept["class_labels"][:, 3] == 1, (kept["image_latents"] == 0).all((1, 2, 3))  # type: ignore[call-overload]
    assert (kept["class_labels"].sum(1) == 1).all() and (blank | (kept["image_latents"] == 1).all((1, 2, 3))).all()  # type: ignore[call-overload]
    for share, rate in ((unlabelled, 0.25), (blank, 0.4), (unlabelled & blank, 0.1)):
        assert abs(share.double().mean() - rate) < 4 * (rate * (1 - rate) / count) ** 0.5
    again = Columns.spared(columns, {k: v[7:9] for k, v in told.items()}, "denoiser", 5, range(7, 9))
    assert all(torch.equal(again[k], kept[k][7:9]) for k in told)  # a row's number alone says it


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: a class added to the time, another image and the time in cross-attention."""
    cfg = configuration(Path("x"), (1, 1), {"label": "time", "image": "cross", "time_tokens": 2})
    made = folder.build(cfg, Tokenizer.train(["a picture"], 600, 16), 0, Labels(["blue", "red"], 2)).scaled(0.8)
    for part in made.networks.values():
        randomise(part)
    folder.save(path := tmp_path_factory.mktemp("told") / "model", made, cfg)
    return path


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    export.export(Source(model), out := model.parent / "bundle")
    return out


@pytest.mark.filterwarnings("ignore")
def test_a_bundle_draws_what_torch_does(model, bundle):
    request, drawn = pipeline.Request(3, 3.0, "dpmpp_2m", "trailing", 16, 24), []
    picture = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
    for name, path in (("torch", model), ("onnx", bundle)):
        backend = open_backend(Source(path), name, "cpu")
        for label in COLOURS:
            given = pipeline.given_with(backend, label, picture)
            drawn.append(pipeline.generate(backend, ["a picture", "a"], [1, 2], request, given=given))
    (red, blue), bundled = drawn[:2], drawn[2:]
    assert (np.abs(np.stack(bundled).astype(int) - np.stack([red, blue])) <= 1).all()
    assert (red != blue).mean() > 0.1


def test_guidance_is_away_from_nothing_where_the_model_has_learnt_it():
    given = {"class_labels": np.array([[1, 0, 0], [0, 1, 0]], np.float32)}
    array = Array(("batch", 3), of=ROW.conditions(ROW.complete(SIZES | {"num_class_embeds": 3}))["class_labels"].of)
    for spared in (frozenset({"label"}), frozenset()):
        d: Any = SimpleNamespace(given={"class_labels": array}, spared=spared, labels=Labels(["a", "b"], 2))
        rows = condition.of_given(d, given, (4, 8, 8), [([0, 1], False), ([0, 1, 1], True)])["class_labels"]
        null = [[0, 0, 1]] * 2 if spared else [[1, 0, 0], [0, 1, 0]]
        assert rows.tolist() == [*null, [1, 0, 0], [0, 1, 0], [0, 1, 0]]
    with pytest.raises(UsageError, match="is always told a class; give --label"):
        condition.of_given(d, {}, (4, 8, 8), [([0], True)])


REFUSED = {
    "an unknown class": (["--label", "rad"], ["rad", "did you mean 'red'?"]),
    "an image of another size": (["--reference", "{o}", "-W", "24"], ["16x16", "24x16", "--fit"]),
    "an image that is not there": (["--reference", "gone.png"], ["gone.png"]),
    "a class for a model that knows none": (["--label", "red", "-m", "{plain}"], ["--label", "is not told a class"]),
    "an image for a model that knows none": (["--reference", "{o}", "-m", "{plain}"], ["is not told another image"]),
    "no class for a model that is always told one": (["-m", "{strict}"], ["always told a class", "--label"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_with_the_model_is_refused_in_a_line(what, bundle, data, tiny_model, tmp_path):
    flags, said = REFUSED[what]
    strict = tmp_path / "strict"
    if "{strict}" in flags:
        shutil.copytree(bundle, strict)
        index = read_json(strict / "model_index.json")
        (strict / "model_index.json").write_text(json.dumps(index | {"_spared": ["image"]}))
        (strict / "manifest.json").unlink(missing_ok=True)
    flags = [flag.format(o=data / "o0.png", plain=tiny_model, strict=strict) for flag in flags]
    model = [] if "-m" in flags else ["-m", str(bundle)]
    result = CliRunner().invoke(cli.app, ["generate", "a picture", *model, *flags, "-o", str(tmp_path / "x.png")])
    problem = str(result.exception)
    assert result.exit_code and all(each in problem for each in said), problem
    assert "\n" not in problem and not (tmp_path / "x.png").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_command_draws_with_a_class_and_another_image(bundle, data, tmp_path):
    flags = ["-m", str(bundle), "--steps", "2", "-s", "3", "-o", str(out := tmp_path / "x.png")]
    more = ["--label", "red", "--reference", str(data / "o0.png")]
    result = CliRunner().invoke(cli.app, ["generate", "a picture", *flags, *more, "--json"])
    assert result.exit_code == 0, result.exception
    told = json.loads(result.stdout)
    assert told["label"] == "red" and told["reference"] == "o0.png" and out.exists()
    drawn = CliRunner().invoke(cli.app, ["generate", "a picture", *flags, "--force"])
    assert "no --label: drawn without a class" in drawn.stderr and "--reference" in drawn.stderr


CONFLICTS = {
    "unet.image": ({"image": "concat"}, {}, "shapes"),
    "train.distill.steps": ({"label": "time"}, {"distill": {"steps": 4}}, "x"),
    "unet.image: cross": ({"image": "cross", "block_out_channels": (16,), "down_block_types": (CROSS,)}, {}, "x"),
}


@pytest.mark.parametrize("said", CONFLICTS)
def test_keys_that_do_not_go_together_are_named(said, tmp_path):
    unet, train, path = CONFLICTS[said]
    cfg = config.make(unet=unet | {"norm_num_groups": 8}, train=train, data={"path": path})
    assert any(problem.startswith(said) for problem in config.conflicts(cfg)), [*config.conflicts(cfg)]


def test_inspect_says_what_a_model_is_told(model, tiny_model):
    told = inspect.inspect(str(model))
    assert told["told"] == ["image", "label"] and told["labels"] == ["blue", "red"] and told["cost"]["networks"]
    (line,) = [line for line in inspect.show(str(model)) if line.startswith("told")]
    assert "a class (blue, red) by --label; another image by --reference" in line
    assert not inspect.inspect(str(tiny_model))["told"]


def test_a_single_file_has_no_place_for_it(model, tmp_path):
    with pytest.raises(ModelError, match="told a class or an image"):
        convert.to_single_file(Source(model), tmp_path / "x.safetensors")


def test_classes_that_do_not_fit_their_names_are_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    index = read_json(model / "model_index.json")
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index | {"id2label": {"0": "a"}}))
    with pytest.raises(ModelError, match="1 names of 2 classes"):
        Source(tmp_path / "model").check()
        _ = Source(tmp_path / "model").description
