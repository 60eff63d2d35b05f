"""Stable Diffusion 1.x, 2.x and inpainting, end to end: small pipelines of diffusers' own making, with random weights, are
opened, drawn with, converted and exported; what cannot be opened is refused in one line, soon, and without torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreters import without
from safetensors.torch import load_file, save_file
from tensors import equal, randomise
from tiny_stable_diffusion import PARTS

from tinydiff import cli, export
from tinydiff.backends import open_backend
from tinydiff.checkpoints import agreement, folder, scheduler, single_file, weights
from tinydiff.checkpoints.header import header
from tinydiff.checkpoints.source import Source
from tinydiff.diffusion import noise
from tinydiff.pipeline import Request, generate
from tinydiff.precision import PRECISIONS
from tinydiff.system import RESTORE, shown

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


KINDS = ("sd1", "sd2", "inpaint")


SIDE = 128


PROMPT, NEGATIVE = "Two blue circles, on a dark-green field!", "blurry, low quality"


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


NOISE |= {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}


SHIPPED: dict[str, dict[str, Any]] = {  # scheduler_config.json of 1.5 and 2.1
    "sd1": NOISE | {"_class_name": "PNDMScheduler", "trained_betas": None},
    "sd2": NOISE | {"_class_name": "DDIMScheduler", "trained_betas": None, "prediction_type": "v_prediction"},
    "inpaint": NOISE | {"_class_name": "PNDMScheduler", "trained_betas": None},
}


SAMPLERS = {  # diffusers' class: our name, and whether its x is ours over alpha
    "DDIMScheduler": ("ddim", False),
    "PNDMScheduler": ("plms", False),
    "EulerDiscreteScheduler": ("euler", True),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", False),
}


# ---- the pipelines ----------------------------------------------------------------------------------------------------


def networks(kind: str, levels: int = 4) -> dict[str, torch.nn.Module]:
    """Small networks of diffusers and transformers in the form of a kind's, or with two levels, smaller ones."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    second = kind == "sd2"
    widths, context = ((64, 64, 64, 128), 64) if second else ((32, 64, 64, 64), 32)
    cross = levels - 1
    found: dict[str, torch.nn.Module] = {
        "unet": UNet2DConditionModel(
            sample_size=SIDE // 8,
            in_channels=9 if kind == "inpaint" else 4,
            block_out_channels=widths[-levels:],
            down_block_types=("CrossAttnDownBlock2D",) * cross + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * cross,
            layers_per_block=levels // 2,
            attention_head_dim=[1, 1, 1, 2][-levels:] if second else 8,
            cross_attention_dim=context,
            use_linear_projection=second,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(32, 32, 64, 64)[-levels:],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            sample_size=SIDE,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=context,
                intermediate_size=4 * context,
                num_hidden_layers=2,
                num_attention_heads=1,
                max_position_embeddings=77,
                hidden_act="gelu" if second else "quick_gelu",
                projection_dim=context,
            )
        ),
    }
    for seed, network in enumerate(found.values()):
        randomise(network, seed)
        network.eval()
    return found


def written(kind: str, parts: dict[str, torch.nn.Module], home: Path) -> Path:
    """The folder that diffusers' pipeline writes of a kind's networks."""
    import diffusers
    from transformers import CLIPTokenizer

    single_file.tokenizer("open_clip" if kind == "sd2" else "clip").save(home / "tokenizer")
    (home / "scheduler_config.json").write_text(json.dumps(SHIPPED[kind]))
    pipe = getattr(diffusers, f"StableDiffusion{'Inpaint' if kind == 'inpaint' else ''}Pipeline")(
        **parts,
        scheduler=getattr(diffusers, SHIPPED[kind]["_class_name"]).from_pretrained(home),
        tokenizer=CLIPTokenizer.from_pretrained(home / "tokenizer"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(home / "model")
    return home / "model"


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> dict[str, tuple[Path, dict[str, torch.nn.Module]]]:
    """By kind, the folder that diffusers' pipeline writes, and its networks."""
    made = {kind: networks(kind) for kind in KINDS}
    return {kind: (written(kind, parts, tmp_path_factory.mktemp(kind)), parts) for kind, parts in made.items()}


@pytest.fixture(scope="session")
def folders(pipelines) -> dict[str, Path]:
    return {kind: path for kind, (path, _) in pipelines.items()}


@pytest.fixture
def copied(folders, tmp_path) -> Callable[..., Path]:
    """A function (kind) -> a copy of its folder, to be changed: files are to be replaced, never written into."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(folders[kind], tmp_path / f"copy-{kind}", copy_function=os.link))

    return copy


def edit(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    table = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop} | changes
    path.unlink()
    path.write_text(json.dumps(table))


def states(model: folder.Model) -> dict[str, dict[str, torch.Tensor]]:
    return {name: part.state_dict() for name, part in model.networks.items()}


def same_model(one: folder.Model, other: folder.Model) -> bool:
    return all(equal(part, states(other)[name]) for name, part in states(one).items())


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_each_network_gives_what_theirs_does(kind, pipelines):
    from transformers import CLIPTokenizer

    path, theirs = pipelines[kind]
    model = folder.load(Source(path))
    ids = model.tokenizers["text_encoder"].encode([PROMPT, ""])
    given = CLIPTokenizer.from_pretrained(path / "tokenizer")(
        [PROMPT, ""], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    assert np.array_equal(ids, given)
    context, t = theirs["text_encoder"](given).last_hidden_state, torch.tensor(601.0)
    x, z, pixels = normal(0, 2, 9 if kind == "inpaint" else 4, 16, 24), normal(1, 2, 4, 8, 6), normal(2, 1, 3, 64, 96)
    pairs = {
        "text": (model.networks["text_encoder"](given)[0], context),
        "unet": (model.denoiser(x, t, context), theirs["unet"](x, t, context).sample),
        "encode": (model.vae.encode(pixels), theirs["vae"].encode(pixels).latent_dist.parameters),
        "decode": (model.vae.decode(z), theirs["vae"].decode(z).sample),
    }
    for name, (ours, wanted) in pairs.items():
        assert (ours - wanted).abs().max() <= 1e-4 * wanted.std(), name


# ---- whole images -----------------------------------------------------------------------------------------------------


def schedulers(kind: str) -> dict[str, Any]:
    """diffusers' schedulers made from the one that a kind is shipped with."""
    import diffusers

    shipped = getattr(diffusers, SHIPPED[kind]["_class_name"]).from_config(SHIPPED[kind])
    return {name: getattr(diffusers, name).from_config(shipped.config) for name in SAMPLERS}


def draws_alike(
    source: Source, pipe: Any, request: Request, prompt: str = PROMPT, scaled: bool = False, **more: Any
) -> np.ndarray:
    """Our picture, which diffusers' pipeline draws of the same latents: 99.9 % of pixels within 1/255.

    `scaled`: its x is ours over alpha. `more`: what its call is told besides; of ours `controls`.
    """
    backend = open_backend(source, "torch", "cpu")
    d, controls = backend.description, more.pop("controls", ())
    ours = generate(backend, [prompt], [3], request, [NEGATIVE], controls=controls)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(request.steps)
    start = d.levels(request.sampler, request.steps, request.spacing)[0]
    scale = start.sigma / (start.alpha if scaled else 1.0) / float(pipe.scheduler.init_noise_sigma)
    shape = d.latent_channels, request.height // d.factor, request.width // d.factor
    more |= {"num_inference_steps": request.steps, "guidance_scale": request.cfg_scale}
    theirs = pipe(
        prompt,
        negative_prompt=NEGATIVE,
        latents=torch.from_numpy(noise.normal([3], shape) * np.float32(scale)),
        width=request.width,
        height=request.height,
        output_type="np",
        **more,
    ).images
    assert ours.std() > 10
    assert (np.abs(ours - np.rint(theirs * 255)) <= 1).mean() >= 0.999
    return ours.astype(int)


DRAWN_ALIKE = [*product(["sd1", "sd2"], SAMPLERS)]


DRAWN_ALIKE.remove(("sd2", "PNDMScheduler"))  # of v it averages outputs of several levels


@pytest.mark.parametrize(("kind", "name"), DRAWN_ALIKE)
def test_diffusers_draws_the_same_image(kind, name, copied):
    """From the folder alone, scheduler included, and the same latents."""
    from diffusers import StableDiffusionPipeline

    path, (sampler, scaled) = copied(kind), SAMPLERS[name]
    (path / "scheduler" / "scheduler_config.json").unlink()
    schedulers(kind)[name].save_pretrained(path / "scheduler")
    edit(path / "model_index.json", scheduler=["diffusers", name])
    d = Source(path).description
    assert (d.generate.sampler, d.size) == (sampler, SIDE)
    request = Request(20, 7.5, d.generate.sampler, d.generate.spacing, SIDE // 2, SIDE)
    draws_alike(Source(path), StableDiffusionPipeline.from_pretrained(path), request, scaled=scaled)


def spacings(sampler: str) -> tuple[str, ...]:
    """Those that diffusers has too: its single-step solvers know "linspace" alone, its LCM only its own."""
    if sampler == "lcm":
        return ()
    return ("linspace",) if sampler.startswith("dpm_solver") else ("leading", "linspace", "trailing")


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize(
    ("sampler", "spacing"), [(s, spacing) for s in scheduler.SCHEDULERS for spacing in spacings(s)]
)
def test_the_timesteps_are_those_of_diffusers(sampler, spacing, steps):
    import diffusers

    name, settings = scheduler.SCHEDULERS[sampler]
    settings = settings | ({"final_sigmas_type": "sigma_min"} if sampler.startswith("dpm_solver") else {})
    theirs = getattr(diffusers, name).from_config(NOISE | settings | {"timestep_spacing": spacing})
    theirs.set_timesteps(steps)
    read = scheduler.read(json.loads(theirs.to_json_string()))
    assert (read.sampler, read.spacing) == (sampler, spacing)
    times = list(dict.fromkeys(theirs.timesteps.tolist()))
    if sampler in ("dpm2", "dpmpp_sde"):  # the network is asked half-way too
        times = times[::2]
    levels = read.levels(sampler, steps, spacing)[:-1]
    assert [level.t for level in levels] == pytest.approx(times, abs=1e-3)
    if hasattr(theirs, "sigmas") and sampler not in ("dpm2", "heun", "dpmpp_sde"):
        rhos = [level.sigma / level.alpha for level in levels]
        assert rhos == pytest.approx(theirs.sigmas.tolist()[:steps], rel=1e-3)


# ---- folders as others write them -------------------------------------------------------------------------------------


def store(path: Path, parts: dict[str, torch.nn.Module], **how: Any) -> None:
    """Weights in place of those in a folder, as diffusers and transformers save them with the settings `how`."""
    from copy import deepcopy

    half = how.get("variant") == "fp16"
    for name, part in parts.items():
        config = (path / name / "config.json").read_text()
        (path / name / "config.json").unlink()
        (deepcopy(part).half() if half else part).save_pretrained(path / name, **how)
        (path / name / "config.json").unlink()
        (path / name / "config.json").write_text(config)


def bare(path: Path) -> Path:
    """The folder without weights."""
    for file in [*path.rglob("*.safetensors*")]:
        file.unlink()
    return path


def test_half_precision_is_taken_where_it_is_alone(pipelines, copied):
    path, exact = bare(copied("sd1")), states(folder.load(Source(pipelines["sd1"][0])))
    store(path, pipelines["sd1"][1], variant="fp16")
    assert all([*(path / name).glob("*.fp16.safetensors")] for name in PARTS)
    for name, part in states(folder.load(Source(path))).items():
        assert equal(part, {k: v.half().float() for k, v in exact[name].items()})
    full = Path(shutil.copytree(pipelines["sd1"][0], path.parent / "both"))
    for name in PARTS:
        for file in (path / name).glob("*.fp16.safetensors"):
            shutil.copy(file, full / name)
    assert same_model(folder.load(Source(full)), folder.load(Source(pipelines["sd1"][0])))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_shards(variant, pipelines, copied):
    path, exact = bare(copied("sd2")), states(folder.load(Source(pipelines["sd2"][0])))
    store(path, pipelines["sd2"][1], variant=variant, max_shard_size="300KB")
    for name in PARTS:
        assert len(weights.files(path / name)) > 1 and list((path / name).glob("*.json")) != [
            path / name / "config.json"
        ]
    for name, part in states(folder.load(Source(path))).items():
        assert equal(part, {k: v.half().float() if variant else v for k, v in exact[name].items()})


def test_attention_of_an_old_autoencoder_and_the_configurations_of_1_5(folders, copied):
    path = copied("sd1")
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors, old = load_file(file), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file.unlink()
    for new, name in old.items():
        tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in tensors.items()}
    assert sum("proj_attn" in k for k in tensors) == 4
    save_file(tensors, file)
    edit(path / "vae" / "config.json", ("scaling_factor", "mid_block_add_attention", "use_quant_conv", "shift_factor"))
    missing = ("use_linear_projection", "transformer_layers_per_block", "num_attention_heads", "class_embed_type")
    edit(path / "unet" / "config.json", (*missing, "mid_block_type", "time_embedding_type", "attention_type"))
    edit(path / "scheduler" / "scheduler_config.json", ("prediction_type", "timestep_spacing"))
    model, d = folder.load(Source(path)), open_backend(Source(path), "torch", "cpu").description
    assert same_model(model, folder.load(Source(folders["sd1"])))
    assert model.scaling_factor == d.scaling_factor == 0.18215
    assert (d.prediction, d.generate.sampler, d.generate.spacing) == ("epsilon", "plms", "leading")


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def test_weights_are_mapped_and_not_copied(folders, copied, monkeypatch):
    path = copied("sd1")
    file = path / "text_encoder" / "model.safetensors"
    shapes = {k: [512 if n == 32 else n for n in v.shape] for k, v in load_file(file).items()}
    file.unlink()
    save_file({k: torch.zeros(shape) for k, shape in shapes.items()}, file)
    edit(path / "text_encoder" / "config.json", hidden_size=512)
    tokenizer = folder.load(Source(folders["sd1"])).tokenizers["text_encoder"]
    monkeypatch.setattr(Source, "tokenizer", lambda *_: tokenizer)  # which takes 30 MB
    monkeypatch.setattr(agreement, "of_networks", lambda *_: [])  # its U-Net is left as it was
    before = anonymous()
    model = folder.load(Source(path))
    with torch.inference_mode():
        assert sum(p.sum().item() for p in model.networks["text_encoder"].parameters()) == 0  # every page is read
    assert file.stat().st_size > 100e6 and anonymous() - before < 0.2 * file.stat().st_size


# ---- there and back ---------------------------------------------------------------------------------------------------


def command(*words: Any) -> None:
    cli.app([str(word) for word in words], standalone_mode=False)


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_single_file_there_and_back(kind, pipelines, tmp_path):
    source, parts = pipelines[kind]
    one, back, again = tmp_path / "one.safetensors", tmp_path / "back", tmp_path / "again" / "one.safetensors"
    command("export", source, "-o", one, "--format", "single-file")
    command("export", one, "-o", back, "--format", "folder")
    command("export", back, "-o", again, "--format", "single-file")
    assert all(equal(Source(source).tensors(name), Source(back).tensors(name)) for name in PARTS)
    assert equal(load_file(again), load_file(one)) and header(again).metadata == header(one).metadata
    assert same_model(folder.load(Source(one)), folder.load(Source(source))) and same_model(
        folder.load(Source(back)), folder.load(Source(source))
    )

    import diffusers

    name = json.loads((back / "model_index.json").read_text())["_class_name"]
    assert name == json.loads((source / "model_index.json").read_text())["_class_name"]
    pipe = getattr(diffusers, name).from_pretrained(back)
    x, context = normal(0, 1, 9 if kind == "inpaint" else 4, 16, 16), normal(1, 1, 77, 64 if kind == "sd2" else 32)
    assert equal(pipe.unet.state_dict(), parts["unet"].state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(pipe.unet(x, 500, context).sample, parts["unet"](x, 500, context).sample)
    assert pipe.scheduler.config.prediction_type == ("v_prediction" if kind == "sd2" else "epsilon")
    ids = pipe.tokenizer([PROMPT], padding="max_length", return_tensors="np").input_ids
    assert np.array_equal(ids, folder.load(Source(source)).tokenizers["text_encoder"].encode([PROMPT]))


# ---- graphs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cached() -> Callable[..., Any]:
    """`export.translate`, whose slow answer does not depend on the weights: the second time it is the first one's copy."""
    import onnx_ir as ir

    found, translate = {}, export.translate

    def translated(name: str, model: folder.Model, opset: int) -> Any:
        key = name, str(model.denoiser)
        if key not in found:
            result = translate(name, model, opset)
            found[key] = ir.to_proto(result)
            return result
        return ir.from_proto(found[key])

    return translated


def rows(text: str) -> dict[str, dict[str, Any]]:
    return {row["graph"]: row for row in map(json.loads, text.splitlines())}


@pytest.mark.slow
def test_graphs_of_2_agree_with_torch_and_halved_ones_nearly(tmp_path, monkeypatch, capsys, cached):
    monkeypatch.setattr(export, "translate", cached)
    path, images = written("sd2", networks("sd2", 2), tmp_path), []
    for precision in ("fp32", "fp16"):
        command("export", path, "-o", tmp_path / precision, "--precision", precision, "--json")
        found = rows(capsys.readouterr().out)
        assert set(found) == {"text_encoder", "unet", "vae_encoder", "vae_decoder", "image"}
        assert found.pop("image")["same"] >= 0.99
        assert all(row["max_abs_diff"] < PRECISIONS[precision].graph for row in found.values())
        backend = open_backend(Source(tmp_path / precision), "onnx", "cpu")
        request = Request(10, 2.0, "ddim", "leading", 32, 32)
        images.append(generate(backend, [PROMPT], [5], request).astype(int))
    assert images[1].std() > 5 and np.abs(images[0] - images[1]).mean() < 3


@pytest.mark.slow
def test_graphs_of_an_inpainting_file_with_another_autoencoder(tmp_path, capsys):
    path = written("inpaint", networks("inpaint", 2), tmp_path)
    command("export", path, "-o", tmp_path / "one.safetensors", "--format", "single-file")
    tensors, prefix = load_file(tmp_path / "one.safetensors"), "first_stage_model."
    save_file({k: v for k, v in tensors.items() if not k.startswith(prefix)}, tmp_path / "rest.safetensors")
    other = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    other["decoder.conv_out.bias"] += 0.25
    save_file(other, tmp_path / "vae.safetensors")
    command(
        "export",
        tmp_path / "rest.safetensors",
        "--vae",
        tmp_path / "vae.safetensors",
        "-o",
        tmp_path / "bundle",
        "--json",
    )
    found = rows(capsys.readouterr().out)
    assert found.pop("image")["same"] >= 0.999 and all(row["max_abs_diff"] < 1e-4 for row in found.values())
    model = folder.load(Source(tmp_path / "bundle"))
    assert model.denoiser.conv_in.in_channels == 9
    assert torch.equal(model.vae.decoder.conv_out.bias, other["decoder.conv_out.bias"])


# ---- what cannot be opened --------------------------------------------------------------------------------------------

WITHOUT_TORCH = without(
    """
import atexit, re
from pathlib import Path
out = sys.argv.pop()
peak = lambda: Path(out).write_text(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
atexit.register(peak)  # unlike ru_maxrss, not the parent's peak too
from tinydiff.cli import main
main()
""",
    "torch",
)


UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


PICKLE = b"PK\3\4" + bytes(500)


def replaced(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def without_a_shard(path: Path) -> None:
    (path / UNET).unlink()
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (path / f"{UNET}.index.json").write_text(json.dumps(index))


def named(kind: str) -> Callable[[Path], Any]:
    return lambda path: edit(path / "model_index.json", _class_name=kind)


def odd(path: Path) -> Path:
    save_file({f"layer.{i:02}": torch.ones(1) for i in range(12)}, path.parent / "odd.safetensors")
    return path.parent / "odd.safetensors"


def pickled(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path.parent / name).write_bytes(PICKLE)
        return path.parent / name

    return make


def only_bin(path: Path) -> None:
    (path / UNET).unlink()
    (path / "unet" / "diffusion_pytorch_model.bin").write_bytes(PICKLE)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no unet": (lambda path: shutil.rmtree(path / "unet"), "unet/config.json: No such file"),
    "no vae": (lambda path: shutil.rmtree(path / "vae"), "vae/config.json: No such file"),
    "no text encoder": (lambda path: shutil.rmtree(path / "text_encoder"), "text_encoder: missing; copy the whole"),
    "no tokenizer": (lambda path: shutil.rmtree(path / "tokenizer"), "tokenizer: missing; copy the whole"),
    "no shard": (without_a_shard, "diffusion_pytorch_model-00001-of-00001.safetensors: missing; diffusion_pytorch"),
    "truncated": (lambda path: replaced(path / VAE, (path / VAE).read_bytes()[:-9]), "vae/diffusion_pytorch_model.s"),
    "pointer": (lambda path: replaced(path / UNET, b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "pickle": (lambda path: replaced(path / UNET, PICKLE), "a pickle, which could run any code when opened; convert"),
    "single pickle": (pickled("a.safetensors"), "a.safetensors: a pickle"),
    "ckpt": (pickled("a.ckpt"), "a.ckpt: a pickle"),
    "only bin": (only_bin, "diffusion_pytorch_model.bin: a pickle"),
    "flux folder": (named("FluxPipeline"), "this is Flux (FluxPipeline); give"),
    "unknown file": (odd, ", ".join(f"layer.{i:02}" for i in range(10)) + ";"),
    "class_embed_type": (
        lambda path: edit(path / "unet" / "config.json", class_embed_type="timestep"),
        "unet: class_embed_type is 'timestep', and only None is supported",
    ),
}


def refused(code: int, says: str, *words: Any) -> None:
    """One line on stderr, the exit code, no torch, and less than 200 MB of memory."""
    with tempfile.NamedTemporaryFile() as peak:
        given = [*map(str, words), peak.name]
        done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *given], capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (code, 1, ""), done.stderr
        assert says in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert int(Path(peak.name).read_text()) < 200_000


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_opened_is_said_soon_and_without_torch(bad, copied, tmp_path):
    spoil, says = BAD[bad]
    path = copied("sd1")
    made = spoil(path)
    path = made if isinstance(made, Path) else path
    refused(4, says, "generate", "a red heart", "-m", path, "-o", tmp_path / "a.png")


def test_wrong_flags_are_usage_mistakes(folders, tmp_path):
    generate = ("generate", "a red heart", "-m", folders["sd1"], "-o", tmp_path / "a.png")
    refused(2, "--prediction", *generate, "--prediction", "epsilonn")
    refused(4, "gone.safetensors: no such file", *generate, "--vae", tmp_path / "gone.safetensors")


def test_ten_tensors_of_another_shape_are_named(copied, tmp_path, monkeypatch, capsys):
    path = copied("sd1")
    tensors = load_file(path / UNET)
    wrong = sorted(k for k in tensors if k.endswith("norm1.bias"))
    assert len(wrong) > 10
    (path / UNET).unlink()
    save_file({k: torch.ones(7) if k in wrong else v for k, v in tensors.items()}, path / UNET)
    words = ["tinydiff", "generate", "a red heart", "-m", str(path), "-o", str(tmp_path / "a.png")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 4
    assert capsys.readouterr().err.endswith(f"do not fit its config.json at {shown(', '.join(wrong[:3]))}; {RESTORE}\n")


NOISE |= {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
