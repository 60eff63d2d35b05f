"""Control networks: against diffusers the network, pictures with one and two, folders and files; graphs; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from interpreters import run_without
from PIL import Image
from runs import OFTEN, contents, digests, killed_often
from safetensors.torch import load_file, save_file
from tensors import equal, noise, randomise, same
from test_stable_diffusion import NEGATIVE, PROMPT, draws_alike
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinydiff import cli, config, control, export, images, inspect, start
from tinydiff.backends import open_backend
from tinydiff.checkpoints import folder, single_file
from tinydiff.checkpoints.header import header
from tinydiff.checkpoints.source import Source
from tinydiff.data import makers
from tinydiff.data.dataset import Images, open_source
from tinydiff.errors import DataError, ModelError, UsageError, UserError
from tinydiff.models.unet import UNet
from tinydiff.networks import CONTROL, DENOISERS
from tinydiff.networks.control import IMAGE
from tinydiff.networks.network import pick
from tinydiff.networks.unet import CONTROLLED, residuals
from tinydiff.networks.unet import UNet as Settings
from tinydiff.pipeline import Request, generate
from tinydiff.schema import to_toml
from tinydiff.training import loop
from tinydiff.training.control import ControlTask
from tinydiff.training.run import Run
from tinydiff.training.runtime import Runtime
from tinydiff.training.start import opened

SIDE = 128


SIZES: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (32, 64), "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 32},
    "sd2": {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "attention_head_dim": (1, 1, 2)}
    | {"cross_attention_dim": 48, "use_linear_projection": True},
}


def of_diffusers(kind: str) -> tuple[Any, Any]:
    """A U-Net and a control network with random weights."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    levels = len(SIZES[kind]["block_out_channels"])
    down = ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1)
    unet = UNet2DConditionModel(sample_size=16, down_block_types=down, up_block_types=up, **SIZES[kind])
    control = ControlNetModel.from_unet(unet)
    for seed, network in enumerate((unet, control)):
        randomise(network, seed)
        network.eval()
    return unet, control


@pytest.mark.parametrize("kind", SIZES)
@torch.inference_mode()
@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_network_and_what_a_unet_adds_of_it_are_those_of_diffusers(kind):
    theirs, their_control = of_diffusers(kind)
    unet, control = DENOISERS["unet"].build(dict(theirs.config)), CONTROL.build(dict(their_control.config))
    unet.load_state_dict(theirs.state_dict())
    control.load_state_dict(their_control.state_dict())
    x, context, image = noise(2, 4, 16, 24), noise(2, 7, SIZES[kind]["cross_attention_dim"]), noise(2, 3, 128, 192)
    t = torch.tensor(601.0)
    down, middle = their_control(x, t, context, image, return_dict=False)
    given = control(x, t, context, image)
    for ours, wanted in zip(given, (*down, middle), strict=True):
        same(ours, wanted)
    named = residuals(pick(Settings, DENOISERS["unet"].read(dict(theirs.config))))
    sizes = {"batch": 2, "height": 16, "width": 24}
    assert [array.shape(sizes) for array in named.values()] == [tuple(each.shape) for each in given]
    added = theirs(x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    same(unet(x, t, context, **dict(zip(named, given, strict=True))), added)
    assert not torch.allclose(added, theirs(x, t, context).sample, rtol=0.1)


@torch.inference_mode()
def test_a_new_one_begins_as_its_unet_and_as_no_change():
    settings = Settings((8, 16), ("CrossAttnDownBlock2D",) * 2, 1, 1, 2, 8, True)
    unet = UNet(settings, 4, 16, extra=5)
    randomise(unet)
    table = vars(settings) | {"in_channels": 9, "out_channels": 4, "cross_attention_dim": 16, "sample_size": 8}
    made = CONTROL.of_base(table, factor=4)
    control = CONTROL.build(made).begin_as(unet)  # type: ignore[operator]
    own, theirs = control.state_dict(), unet.state_dict()
    assert torch.equal(own["mid_block.resnets.1.conv2.weight"], theirs["mid_block.resnets.1.conv2.weight"])
    assert torch.equal(own["conv_in.weight"], theirs["conv_in.weight"][:, :4])
    given = control(noise(1, 4, 8, 8), torch.tensor(3.0), noise(1, 5, 16), noise(1, 3, 32, 32))
    assert all(not each.any() for each in given)


# ---- pictures ---------------------------------------------------------------------------------------------------------


NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
NOISE |= {"set_alpha_to_one": False, "steps_offset": 1}


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> dict[str, Path]:
    """A pipeline's folder as diffusers writes it with a control network inside, and folders of two more."""
    from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    home = tmp_path_factory.mktemp("control")
    unet, first = of_diffusers("sd1")
    levels = 4
    vae = AutoencoderKL(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        sample_size=SIDE,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_act="quick_gelu", projection_dim=32, **sizes))
    second, other = ControlNetModel.from_unet(unet), of_diffusers("sd2")[1]
    for seed, network in enumerate((vae, text, second), 7):
        randomise(network, seed)
        network.eval()
    single_file.tokenizer("clip").save(home / "tokenizer")
    parts = {"unet": unet, "vae": vae, "text_encoder": text, "controlnet": first}
    parts |= {"tokenizer": CLIPTokenizer.from_pretrained(home / "tokenizer"), "scheduler": DDIMScheduler(**NOISE)}
    pipe = StableDiffusionControlNetPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.save_pretrained(home / "model")
    second.save_pretrained(home / "second")
    other.save_pretrained(home / "other")
    for seed, name in enumerate(("edges", "depth")):
        pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE // 2, 3), np.uint8)
        Image.fromarray(pixels).save(home / f"{name}.png")
    return {each.name: each for each in home.iterdir()}


def asked(made: dict[str, Path], *texts: str) -> list[control.Control]:
    flags = [control.parse(text) for text in texts]
    return [control.read(f, f"controlnet_{i}" if i else "controlnet", (64, SIDE), False) for i, f in enumerate(flags)]


REQUEST = Request(8, 7.5, "ddim", "leading", SIDE // 2, SIDE)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ends", [("", ""), (":0.7:0.2,0.9", ":0.4:0,0.5")], ids=["whole", "partly"])
@pytest.mark.parametrize("count", [1, 2])
def test_diffusers_draws_the_same_picture(count, ends, made):
    from diffusers import ControlNetModel, MultiControlNetModel, StableDiffusionControlNetPipeline

    paths = (made["model"] / "controlnet", made["second"])[:count]
    pictures = [made["edges.png"], made["depth.png"]][:count]
    controls = asked(made, *(f"x:{picture}{end}" for picture, end in zip(pictures, ends, strict=False)))
    nets = [ControlNetModel.from_pretrained(path) for path in paths]
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        made["model"], controlnet=MultiControlNetModel(nets) if count > 1 else nets[0], safety_checker=None
    )

    def each(values: list[Any]) -> Any:
        return values if count > 1 else values[0]

    source = Source(made["model"], controls=paths)
    ours = draws_alike(
        source,
        pipe,
        REQUEST,
        controls=controls,
        image=each([Image.open(picture) for picture in pictures]),
        controlnet_conditioning_scale=each([c.asked.strength for c in controls]),
        control_guidance_start=each([c.asked.start for c in controls]),
        control_guidance_end=each([c.asked.end for c in controls]),
    )
    plain = generate(open_backend(source, "torch", "cpu"), [PROMPT], [3], REQUEST, [NEGATIVE])
    assert (np.abs(ours - plain) > 1).mean() > 0.3


# ---- folders and files ------------------------------------------------------------------------------------------------


def command(*words: Any) -> None:
    cli.app([str(word) for word in words], standalone_mode=False)


def tensors(model: Path, network: Path) -> dict[str, torch.Tensor]:
    source = Source(model, controls=(network,))
    source.check()
    return dict(source.tensors("controlnet"))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_folders_and_files_there_and_back(made, tmp_path):
    from diffusers import ControlNetModel

    model, network = made["model"], made["model"] / "controlnet"
    one, back, alone, theirs = (
        tmp_path / name for name in ("one.safetensors", "back", "a.safetensors", "b.safetensors")
    )
    command("export", model, "--control", network, "-o", one, "--format", "single-file")
    command("export", one, "--control", one, "-o", back, "--format", "folder")
    exact = load_file(network / "diffusion_pytorch_model.safetensors")
    names = [name for name in load_file(one) if name.startswith("control_model.")]
    assert len(names) == len(exact)
    for path in (one, back, back / "controlnet", Path("controlnet")):
        assert equal(tensors(back, path), exact)
    for prefix in ("control_model.", ""):  # as the files of ControlNet 1.1 have them, and those for Stable Diffusion 2
        save_file(
            {prefix + k.removeprefix("control_model."): v for k, v in load_file(one).items() if k in names}, alone
        )
        assert equal(tensors(one, alone), exact)
    save_file(exact, theirs)  # a folder's file, as it is
    assert equal(tensors(model, theirs), exact)
    assert equal(ControlNetModel.from_pretrained(back / "controlnet").state_dict(), exact)
    save_file({k: v for k, v in load_file(one).items() if k in names}, alone)
    read = ControlNetModel.from_single_file(str(alone), config=str(network))
    assert equal(read.state_dict(), exact)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_several_are_written_as_diffusers_opens_them(made, tmp_path):
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

    first = made["model"] / "controlnet"
    both = ("export", made["model"], "--control", first, "--control", made["second"], "-o")
    command(*both, tmp_path / "two", "--format", "folder")
    pipe = StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "two")
    for net, path in zip(pipe.controlnet.nets, (first, made["second"]), strict=True):
        assert equal(net.state_dict(), load_file(path / "diffusion_pytorch_model.safetensors"))
    command("export", made["model"], "-o", tmp_path / "none", "--format", "folder")
    assert not (tmp_path / "none" / "controlnet").exists()
    StableDiffusionPipeline.from_pretrained(tmp_path / "none")
    with pytest.raises(ModelError, match="a single file holds one control network"):
        command(*both, tmp_path / "x.safetensors", "--format", "single-file")


# ---- graphs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def plain(make_model, tiny_config) -> Path:
    """A model with few transformers, which take the longest to export."""
    return make_model(replace(tiny_config, unet=replace(tiny_config.unet, down_block_types=("DownBlock2D",) * 2)))


@pytest.fixture(scope="session")
def networks(plain, tmp_path_factory) -> list[Path]:
    """Two control networks of `plain` with random weights."""
    table, home = Source(plain).configs["unet"], tmp_path_factory.mktemp("networks")
    for seed, name in enumerate(("first", "second")):
        network = CONTROL.build(made := CONTROL.of_base(table, factor=2))
        randomise(network, seed)
        (home / name).mkdir()
        folder.write_json(home / name / "config.json", made)
        folder.save_tensors(network.state_dict(), home / name / CONTROL.file, None)
    return [home / "first", home / "second"]


@pytest.fixture(scope="session")
def bundle(plain, networks, tmp_path_factory) -> Callable[[str], Path]:
    """A function (precision) -> a bundle of `plain` with both networks."""
    translate, known, home = export.translate, dict[str, Any](), tmp_path_factory.mktemp("bundle")

    def translated(name: str, *how: Any) -> Any:
        """Slow, and no weight counts: the second network's graph is the first one's, and so are those of other bundles."""
        kind = name.removesuffix("_1")
        if kind not in known:
            known[kind] = ir.to_proto(translate(name, *how))
        return ir.from_proto(known[kind])

    @cache
    def make(precision: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "translate", translated)
            told = [word for each in networks for word in ("--control", each)]
            command("export", plain, *told, "-o", home / precision, "--precision", precision)
        return home / precision

    return make


def test_half_precision_is_checked_with_the_control_networks(bundle, capsys):
    path = bundle("fp16")
    rows = dict(row.split(maxsplit=1) for row in capsys.readouterr().out.splitlines())
    assert "graph=controlnet_1" in rows and float(rows["graph=image"].split()[0].removeprefix("same=")) >= 0.99
    assert header(path / "controlnet" / CONTROL.file).tensors["conv_in.weight"].dtype == "F16"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_graphs_draw_what_torch_draws(count, plain, networks, bundle):
    pictures = [np.random.default_rng(i).integers(0, 256, (24, 16, 3), np.uint8) for i in range(count)]
    flags = [control.Flag(strength=0.8, end=0.9), control.Flag(start=0.3)]
    controls = [
        control.Control(f"controlnet_{i}" if i else "controlnet", *each)
        for i, each in enumerate(zip(pictures, flags, strict=False))
    ]
    bundle = bundle("fp32")
    inside = (bundle / "controlnet", bundle / "controlnet_1")[:count]
    request = Request(6, 3.0, "dpmpp_2m", "trailing", 16, 24)
    opened = [
        open_backend(Source(bundle, controls=inside), "auto", "cpu"),
        open_backend(Source(plain, controls=tuple(networks[:count])), "torch", "cpu"),
    ]
    ours, theirs = (
        generate(each, ["a red circle"] * 2, [3, 4], request, controls=controls).astype(int) for each in opened
    )
    assert [each.name for each in opened] == ["onnx", "torch"] and (np.abs(ours - theirs) <= 1).mean() >= 0.999
    alone = generate(opened[1], ["a red circle"] * 2, [3, 4], request)
    assert ((np.abs(ours - alone) > 1).mean() > 0.3) == bool(count)


def test_a_picture_of_a_batch_is_the_one_that_its_seed_gives_alone(plain, networks):
    backend = open_backend(Source(plain, controls=(networks[0],)), "torch", "cpu")
    told = [control.Control("controlnet", np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))]
    request = Request(4, 3.0, "euler", "trailing", 16, 16)
    many = generate(backend, ["a red circle", "a blue square AND red"], [3, 4], request, controls=told)
    alone = generate(backend, ["a blue square AND red"], [4], request, controls=told)
    assert (np.abs(many[1].astype(int) - alone[0]) <= 1).all()


def test_a_model_that_is_controlled_is_counted(plain, networks, tmp_path):
    """As without, and its control network too, whose operations are those of a call."""
    path = Path(shutil.copytree(plain, tmp_path / "model"))
    (path / "manifest.json").unlink()
    shutil.copytree(networks[0], path / "controlnet")
    table = json.loads((path / "unet" / "config.json").read_text())
    folder.write_json(path / "unet" / "config.json", table | {CONTROLLED: True})
    told, alone = (inspect.inspect(str(each))["cost"]["networks"] for each in (path, plain))
    assert {name: cost for name, cost in told.items() if name != "controlnet"} == alone
    network = CONTROL.build(json.loads((networks[0] / "config.json").read_text()))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(noise(1, 4, 8, 8), torch.tensor(1.0), noise(1, 16, 16), noise(1, 3, 16, 16))
    assert told["controlnet"]["flops"] == counter.get_total_flops()
    assert told["controlnet"]["parameters"] == sum(p.numel() for p in network.parameters())


# ---- training ---------------------------------------------------------------------------------------------------------


FEW = {"steps": 6, "batch_size": 4, "warmup": 1, "lr": 3e-3, "ema": 0.5, "save_every": 3, "sample_every": 6}


def settings(base: Path, data: Path, *more: str) -> config.Config:
    own = [f"train.control.{key}={value}" for key, value in FEW.items()]
    own += ["train.threads=1", "train.precision=fp32", "train.device=cpu", "data.resolution=16"]
    given = [f"train.base={base}", "train.adapter=control", f"data.path={data}", *own, *more]
    return config.load(None, given, model=start.tables)


@pytest.fixture(scope="session")
def trained(plain, image_folder, tmp_path_factory) -> Path:
    """A run of a few steps from `plain`, which is written to by nothing."""
    before, run_dir = contents(plain), tmp_path_factory.mktemp("trained") / "run"
    assert loop.run(settings(plain, image_folder), run_dir) == run_dir / "controlnet"
    assert contents(plain) == before
    return run_dir


def test_a_run_publishes_what_is_drawn_with(trained, plain, image_folder, tmp_path, monkeypatch):
    checkpoint = load_file(trained / "checkpoints" / "control-00000006" / "weights.safetensors")
    assert checkpoint and all(name.startswith("control.control.") for name in checkpoint)  # and nothing of the model
    source = Source(plain, controls=(trained,))
    source.check()
    own, base = source.tensors("controlnet"), source.tensors("unet")
    assert any(own[name].any() for name in own if name.startswith("controlnet_down_blocks"))
    assert not torch.equal(own["conv_in.weight"], base["conv_in.weight"])
    assert (own["conv_in.weight"] - base["conv_in.weight"]).abs().max() < 0.1  # it began as the model's
    monkeypatch.chdir(tmp_path)
    command(
        "generate",
        "red",
        "-m",
        plain,
        "-s",
        1,
        "--steps",
        2,
        "--fit",
        "--control",
        f"{trained}:edges={image_folder / 'red-square.png'}",
    )
    assert images.read_settings(Path("out.png"))["control"][0]["image"] == "edges=red-square.png"


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@torch.inference_mode()
def test_diffusers_opens_what_a_run_publishes(trained, plain):
    from diffusers import ControlNetModel

    theirs = ControlNetModel.from_pretrained(trained / "controlnet")
    ours = folder.load(Source(plain, controls=(trained,))).networks["controlnet"]
    given = noise(1, 4, 8, 8), torch.tensor(300.0), noise(1, 5, 16), noise(1, 3, 16, 16)
    for one, other in zip(ours(*given), (*(answer := theirs(*given, return_dict=False))[0], answer[1]), strict=True):
        same(one, other)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_what_a_run_publishes_and_draws_the_same_picture(made, image_folder, tmp_path):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    more = ("data.resolution=64", "train.control.lr=0.02", "train.control.steps=3", "generate.steps=1")
    path = loop.run(settings(made["model"], image_folder, *more), tmp_path / "run")
    controls = asked(made, f"x:{made['edges.png']}")
    net = ControlNetModel.from_pretrained(path)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(made["model"], controlnet=net, safety_checker=None)
    source = Source(made["model"], controls=(path,))
    ours = draws_alike(source, pipe, REQUEST, controls=controls, image=Image.open(made["edges.png"]))
    plain = generate(open_backend(source, "torch", "cpu"), [PROMPT], [3], REQUEST, [NEGATIVE])
    assert (np.abs(ours - plain) > 1).mean() > 0.3


def test_a_run_killed_again_and_again_ends_in_the_same_bits(plain, image_folder, forker, tmp_path):
    often = [f"train.control.{key}" for key in (*OFTEN, "sample_every=100")]
    cfg, before = settings(plain, image_folder, *often), contents(plain)
    (tmp_path / "c.toml").write_text(to_toml(cfg))
    loop.run(cfg, tmp_path / "whole")
    killed_often(forker, tmp_path / "run", tmp_path / "c.toml")
    assert digests(tmp_path / "run") == digests(tmp_path / "whole") and contents(plain) == before


@torch.no_grad()
def test_before_the_first_update_the_loss_is_that_of_the_model(plain, image_folder, tmp_path):
    cfg = settings(plain, image_folder)
    with Runtime(cfg) as runtime:
        run = Run(runtime, tmp_path)
        run.data, run.model = Images(open_source(cfg.data), cfg.data), opened(Source(plain), cfg)
        task = ControlTask(run)
        batch = task.batch(0, range(4))
        alone = {name: array for name, array in batch["condition"].items() if name != IMAGE}
        wanted = task.model.denoiser(batch["sample"], batch["timestep"], **alone)
        assert torch.allclose(task.answer("control", batch)[0], wanted, atol=1e-6)
        learns = [name for name, p in task.players["control"].module.named_parameters() if p.requires_grad]
        assert learns == [f"control.{name}" for name, _ in task.network.named_parameters()]
        pixels = (batch["condition"][IMAGE] * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        assert np.array_equal(pixels.numpy(), [makers.edges(run.data[int(i)]) for i in task.order(0)[:4]])


def test_images_that_a_table_names_control(plain, image_folder, tmp_path):
    """In their pictures' size, mirrored with them; all are named, or the first that is not is."""
    folder_ = Path(shutil.copytree(image_folder, tmp_path / "data", ignore=shutil.ignore_patterns("*.txt")))
    (folder_ / "told").mkdir()
    rows = []
    for i, path in enumerate(sorted(folder_.glob("*.png"))):
        Image.new("RGB", (16, 20), (i, 0, 0)).save(folder_ / "told" / path.name)
        rows.append({"image": path.name, "text": "a shape", "conditioning_image": f"told/{path.name}"})
    table = folder_ / "metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    more = ("train.control.condition=images", "data.flip=true")
    assert not Images(open_source(config.Data(str(folder_))), config.Data(str(folder_))).source.skipped
    with Runtime(cfg := settings(plain, folder_, *more)) as runtime:
        run = Run(runtime, tmp_path)
        run.data, run.model = Images(open_source(cfg.data), cfg.data), opened(Source(plain), cfg)
        task = ControlTask(run)
        chosen, told = task.order(0)[:4], task.batch(0, range(4))["condition"][IMAGE]
        assert told.shape == (4, 3, 16, 16)
        assert torch.equal((told[:, 0, 8, 8] * 255).round().int(), torch.from_numpy(chosen % 12).int())
        table.write_text(
            "\n".join(json.dumps(row | ({"conditioning_image": None} if i == 5 else {})) for i, row in enumerate(rows))
        )
        run.data = Images(open_source(cfg.data), cfg.data)
        with pytest.raises(
            DataError, match=r"green-stripe.png: no image is to control it; name one in a column condit"
        ):
            ControlTask(run)


def test_only_a_unet_is_controlled(plain, image_folder):
    with pytest.raises(UsageError, match="train.adapter: of a model to begin with, and there is none"):
        config.load(None, ["train.adapter=control", f"data.path={image_folder}"])
    cfg = settings(plain, image_folder)
    wrong = list(config.conflicts(replace(cfg, denoiser=replace(cfg.denoiser, kind="dit"))))
    assert any("train.adapter: control is for U-Nets" in problem for problem in wrong)


# ---- what is made of a picture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_edges_are_those_of_canny(seed):
    """Against scikit-image on a grey picture, within a pixel: its derivative is Sobel's of a blurred picture."""
    from skimage.feature import canny

    grey = np.kron(np.random.default_rng(seed).integers(0, 256, (6, 6)), np.ones((12, 12)))
    grey[:40, :40] = np.hypot(*np.indices((40, 40))) * 3  # and a slope, which has no edge
    pixels = np.repeat(np.rint(grey).clip(0, 255).astype(np.uint8)[..., None], 3, -1)
    ours = makers.edges(pixels)
    step = 8 / (makers.SIGMA * (2 * np.pi) ** 0.5)  # its gradient of a blurred step from 0 to 1
    theirs = canny(pixels[..., 0] / 255, makers.SIGMA, makers.LOW * step, makers.HIGH * step)
    assert {*ours.flat} == {0, 255} and 0.02 < theirs.mean() < 0.3
    found = ours[..., 0] > 0
    assert (makers.grown(found) & theirs).sum() > 0.9 * theirs.sum()
    assert (makers.grown(theirs) & found).sum() > 0.9 * found.sum()


def test_an_edge_between_colours_of_one_brightness_is_found():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8], pixels[:, 8:] = (200, 0, 0), (0, 102, 0)
    assert abs(int(makers.luminance(pixels)[0, 0, 0]) - int(makers.luminance(pixels)[0, 15, 0])) <= 1
    edge = makers.edges(pixels)[..., 0]
    assert (edge > 0).any(axis=1).all() and not edge[:, :5].any() and not edge[:, 11:].any()


def test_colours_are_means_of_squares():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8)
    means = pixels.reshape(3, 16, 2, 16, 3).mean(axis=(1, 3))
    assert np.abs(makers.colour(pixels).astype(int) - np.kron(means, np.ones((16, 16, 1)))).max() <= 1
    assert makers.colour(pixels[:5, :7]).shape == (5, 7, 3)
    assert np.array_equal(makers.luminance(pixels)[..., 0], np.rint(pixels @ [0.299, 0.587, 0.114]))


# ---- what is refused --------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[str, type[UserError], str]] = {
    "no image": ("x", UsageError, "--control x: not understood; give FOLDER:IMAGE"),
    "ends that are turned": ("x:a.png:1:0.9,0.2", UsageError, "0 <= START < END <= 1"),
    "end above 1": ("x:a.png:1:0,2", UsageError, "0 <= START < END <= 1"),
    "strength": ("x:a.png:11", UsageError, "a strength is a number from 0 to 10"),
    "no strength": ("x:a.png:nan", UsageError, "--control x:a.png:nan: a strength is a number from 0 to 10"),
    "a strength below 0": ("x:edges=a.png:-1", UsageError, "a strength is a number from 0 to 10"),
    "a strength with an exponent": ("x:a.png:1e3:0,1", UsageError, "a strength is a number from 0 to 10"),
    "ends that are none": ("x:a.png:1:nan,1", UsageError, "START,END are shares of the steps"),
    "a missing image, and no strength": ("x:none.png:nan", DataError, "none.png:nan: no such image"),
    "weights that are NaN": ("nan:a.png", ModelError, "nan: this control network gives NaN or infinite values; copy"),
    "weights that are infinite": ("inf:a.png", ModelError, "inf: this control network gives NaN or infinite values"),
    "missing image": ("x:none.png", DataError, "none.png: no such image; give FOLDER:IMAGE"),
    "image of another size": ("first:wide.png", UsageError, "is 24x16 and the picture 16x16; make"),
    "missing folder": ("none:a.png", ModelError, "none: no such control network; give a folder"),
    "a folder without one": (".:a.png", ModelError, "holds no control network; give a folder"),
    "another network": ("vae:a.png", ModelError, "no control network, this is AutoencoderKL"),
    "another kind": ("flux:a.png", ModelError, "no control network, this is FluxControlNetModel"),
    "another base": ("wider:a.png", ModelError, "it has cross_attention_dim 768, and .*_dim 16; give"),
    "another autoencoder": ("eight:a.png", ModelError, "8 pixels of its image are a latent, and 2 of"),
    "weights of another": ("mixed:a.png", ModelError, r"asks for conv_in.weight \[16, 4, 3, 3\], and"),
    "integers": ("int:a.png", ModelError, "conv_in.weight as I8, and only floating-point"),
    "a LoRA": ("lora.safetensors:a.png", ModelError, "holds no control network, this is a LoRA; give"),
    "half a file": ("half.safetensors:a.png", ModelError, "its controlnet has zero_convs.0.0.weight; give"),
}


@pytest.fixture(scope="session")
def bad(plain, networks) -> Path:
    """A folder of networks that do not go with `plain`, beside those that do."""
    home, table = networks[0].parent, json.loads((networks[0] / "config.json").read_text())
    tensors = load_file(networks[0] / CONTROL.file)
    tables = {
        "flux": {"_class_name": "FluxControlNetModel"},
        "wider": table | {"cross_attention_dim": 768},
        "eight": table | {"conditioning_embedding_out_channels": [16, 32, 96, 256]},
        "mixed": table,
        "int": table,
        "nan": table,
        "inf": table,
    }
    other = {"mixed": torch.zeros(8, 4, 3, 3), "int": torch.zeros(16, 4, 3, 3, dtype=torch.int8)}
    other |= {name: torch.full((16, 4, 3, 3), float(name)) for name in ("nan", "inf")}
    for name, each in tables.items():
        (home / name).mkdir()
        folder.write_json(home / name / "config.json", each)
        folder.save_tensors(
            tensors | ({"conv_in.weight": other[name]} if name in other else {}), home / name / CONTROL.file, None
        )
    save_file({"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.zeros(1)}, home / "lora.safetensors")
    save_file({"zero_convs.0.0.weight": torch.zeros(1)}, home / "half.safetensors")
    shutil.copytree(plain / "vae", home / "vae")
    for name, size in {"a": (16, 16), "wide": (24, 16)}.items():
        Image.new("RGB", size, "red").save(home / f"{name}.png")
    return home


@pytest.mark.parametrize("name", BAD)
def test_a_control_that_does_not_fit_is_refused(name, bad, plain, monkeypatch):
    text, kind, said = BAD[name]
    monkeypatch.chdir(bad)
    with pytest.raises(kind, match=said) as caught:
        command("generate", "red", "-m", plain, "-o", "never.png", "--steps", 2, "--control", text)
    assert len(str(caught.value).splitlines()) == 1 and not Path("never.png").exists()


def test_refusals_need_no_torch(bad, plain):
    asked = {"wider:a.png": 4, "half.safetensors:a.png": 4, "mixed:a.png": 4, "x:none.png": 3, "x": 2}
    calls = [["generate", "x", "-m", str(plain), "--control", each] for each in asked]
    code = f"""
import os
from tinydiff import cli
os.chdir({str(bad)!r})
for words in {calls!r}:
    try:
        cli.app(words, standalone_mode=False)
    except Exception as error:
        print(error.code)
"""
    assert run_without(code, "torch").split() == [str(exit_) for exit_ in asked.values()]


def test_the_settings_say_of_what_a_control_image_is_made():
    for text in ("edges=a.png", "colour=a.png", "luminance=a.png", "a.png", "other=a.png"):
        maker, _, file = text.rpartition("=")
        flag = control.parse(f"x:{f'{maker}=' if maker else ''}there/{file}:0.5")
        made = control.Control("controlnet", np.zeros((1, 1, 3), np.uint8), flag)
        assert made.settings["image"] == (file if maker == "other" else text)


def test_a_control_image_is_fitted(bad, plain, monkeypatch):
    monkeypatch.chdir(bad)
    command(
        "generate",
        "red",
        "-m",
        plain,
        "-o",
        "fit.png",
        "-s",
        1,
        "--steps",
        2,
        "--control",
        "first:wide.png:0.5",
        "--fit",
    )
    told = [{"network": "first", "image": "wide.png", "strength": 0.5, "start": 0.0, "end": 1.0}]
    assert images.read_settings(Path("fit.png"))["control"] == told


def test_a_bundle_that_takes_no_control_says_so_and_draws_with_torch(bundle, networks):
    bundle = bundle("fp32")
    with pytest.raises(ModelError, match="its graphs take no such control; export the model with --control"):
        open_backend(Source(bundle, controls=(networks[0],)), "onnx", "cpu")
    assert open_backend(Source(bundle, controls=(networks[0],)), "auto", "cpu").name == "torch"
