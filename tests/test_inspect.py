"""What a folder, file or image is: against torch's own counts, onnx's own parser and the files as written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import __version__, config, images, inspect
from tinydiff.checkpoints.counts import onnx_counts, safetensors_counts
from tinydiff.checkpoints.source import Source
from tinydiff.cost import costs
from tinydiff.errors import DataError, ModelError, UsageError
from tinydiff.networks import networks
from tinydiff.schema import to_toml
from tinydiff.summary import lines, origin_line, short

WHY = "it needs torch: pip install torch"

TINY = config.load(
    None,
    [
        "data.resolution=16",
        "autoencoder.block_out_channels=[8,8]",
        "autoencoder.norm_num_groups=4",
        "autoencoder.latent_channels=3",
        "text_encoder.hidden_size=8",
        "text_encoder.intermediate_size=16",
        "text_encoder.num_hidden_layers=1",
        "text_encoder.num_attention_heads=1",
        "text_encoder.max_position_embeddings=9",
        "unet.block_out_channels=[8,8]",
        "unet.norm_num_groups=4",
        "unet.attention_head_dim=2",
        "generate.cfg_scale=4.5",
    ],
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], int]:
    """A model folder as training writes it, torch's parameter counts, and the size of its vocabulary."""
    import torch

    from tinydiff.checkpoints import folder
    from tinydiff.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["a red heart", "a blue star"], 600, 9)
    model = folder.build(TINY, tokenizer).scaled(0.75)
    path = tmp_path_factory.mktemp("models") / "tiny"
    folder.save(path, model, TINY, torch.float16)
    counts = {name: sum(p.numel() for p in part.state_dict().values()) for name, part in model.networks.items()}
    return path, counts, tokenizer.vocab_size


def onnx_file(path: Path, arrays: list[np.ndarray], external: bool = False) -> None:
    onnx = pytest.importorskip("onnx")
    weights = [onnx.numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(arrays)]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 3]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "graph", ends[:1], ends[1:], weights))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}_data", size_threshold=0)


# ---- models --------------------------------------------------------------------------------------------------------


def test_a_trained_folder(made: tuple[Path, dict[str, int], int]) -> None:
    path, counts, vocabulary = made
    found = inspect.model(path)
    assert json.loads(json.dumps(found)) == found
    assert (found["kind"], found["format"], found["onnx"]) == ("model", "diffusers", False)
    assert {name: part["parameters"] for name, part in found["components"].items()} == counts
    assert found["parameters"] == sum(counts.values())
    for part in found["components"].values():
        assert part["dtype"] == "fp16" and part["bytes"] == (path / part["file"]).stat().st_size
    assert (found["prediction"], found["schedule"], found["num_train_timesteps"]) == ("v", "cosine", 1000)
    assert (found["latent_channels"], found["factor"], found["size"], found["multiple"]) == (3, 2, 16, 4)
    assert found["scaling_factor"] == 0.75
    assert found["tokenizer"] == {"kind": "clip", "length": 9, "vocabulary": vocabulary}
    assert (found["latent_size"], found["mask"], found["ema"]) == (8, False, False)
    assert (found["class"], found["no_diffusers_pipeline"]) == ("StableDiffusionPipeline", None)
    assert found["made_by"] == {"tinydiff": __version__}
    assert found["generate"]["cfg_scale"] == 4.5


def test_a_run_is_its_model_and_json_is_one_line(made: tuple[Path, dict[str, int], int], tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(made[0])
    assert inspect.inspect(str(tmp_path)) == inspect.model(tmp_path / "model")
    [line] = inspect.show(str(made[0]), as_json=True)
    assert json.loads(line) == inspect.model(made[0])


def test_lines_of_a_model_name_its_figures(made: tuple[Path, dict[str, int], int]) -> None:
    text = "\n".join(inspect.show(str(made[0])))
    for part in (
        "diffusers folder, ",
        f"tinydiff {__version__}",
        "StableDiffusionPipeline",
        "fp16",
        "16x16 pixels",
        "3x8x8, times 0.75",
        "predicts v",
        "9 CLIP tokens",
        "one call at 16x16 of each network (the denoiser: twice a step with guidance)\n  of text_encoder ",
        "\n  of unet ",
        "\n  of vae_encoder ",
        "FLOP, ",
        "B of activations\n",
        "B of activations, receptive field all\n",
        "cfg_scale 4.5",
    ):
        assert part in text
    assert len(text.splitlines()) == 17 and not re.search(r" \n| $", text)


def bundle(tmp_path: Path, made: tuple[Path, dict[str, int], int], external: bool) -> Path:
    """The layout of an exported bundle around graphs that are not networks."""
    path = tmp_path / "bundle"
    shared = (
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
    )
    for name in shared:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes((made[0] / name).read_bytes())
    arrays = [np.zeros((40, 5), np.float16), np.zeros(7, np.float16), np.array([1, 2], np.int64), np.float32(0.5)]
    for name in ("unet", "text_encoder", "vae_decoder", "vae_encoder"):
        onnx_file(path / name / "model.onnx", [np.asarray(a) for a in arrays], external)
    (path / "vae_decoder" / "config.json").write_bytes((made[0] / "vae" / "config.json").read_bytes())
    (path / "model_index.json").write_bytes((made[0] / "model_index.json").read_bytes())
    return path


@pytest.mark.parametrize("external", [False, True])
def test_a_bundle_of_graphs(tmp_path: Path, made: tuple[Path, dict[str, int], int], external: bool) -> None:
    path = bundle(tmp_path, made, external)
    found = inspect.model(path)
    assert (found["format"], found["onnx"]) == ("onnx", True)
    assert set(found["components"]) == {"unet", "text_encoder", "vae_decoder", "vae_encoder"}
    for name, part in found["components"].items():
        assert (part["file"], part["dtype"], part["parameters"]) == (f"{name}/model.onnx", "fp16", 208)
        assert part["bytes"] == sum(p.stat().st_size for p in (path / name).glob("model.onnx*"))
    assert len(list((path / "unet").glob("model.onnx*"))) == 1 + external
    assert "ONNX bundle" in lines(found)[1]


def test_a_folder_with_both_is_a_diffusers_folder_with_graphs(
    tmp_path: Path, made: tuple[Path, dict[str, int], int]
) -> None:
    path = bundle(tmp_path, made, False)
    for name in ("unet", "text_encoder"):
        source = next((made[0] / name).glob("*.safetensors"))
        (path / name / source.name).write_bytes(source.read_bytes())
    found = inspect.model(path)
    assert (found["format"], found["onnx"]) == ("diffusers", True)
    assert found["components"]["unet"]["parameters"] == made[1]["unet"]
    assert "with ONNX graphs" in lines(found)[1]


def test_missing_weights_are_said_and_missing_descriptions_refused(
    tmp_path: Path, made: tuple[Path, dict[str, int], int]
) -> None:
    path = bundle(tmp_path, made, False)
    (path / "unet" / "model.onnx").unlink()
    assert inspect.model(path)["components"]["unet"] == {"file": None, "dtype": None, "parameters": None, "bytes": 0}
    assert any("no weights" in line for line in inspect.show(str(path)))
    (path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match=r"scheduler_config\.json"):
        inspect.model(path)
    with pytest.raises(ModelError, match="no such model"):
        inspect.inspect(str(tmp_path / "none"))


# ---- single files, and models of other kinds -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """A function (kind, channels) -> a tiny single file, and the networks and configurations in it."""
    import torch
    from tiny_stable_diffusion import tiny

    from tinydiff.checkpoints import single_file

    def make(kind: str = "clip", channels: int = 4) -> tuple[Path, Any]:
        model, path = tiny(kind, channels, torch.float16), tmp_path_factory.mktemp("single") / "some.safetensors"
        single_file.write(path, model.parts, model.configs)
        return path, model

    return make


@pytest.mark.parametrize(("kind", "prediction", "multiple"), [("clip", "epsilon", 8), ("open_clip", "v", 4)])
def test_a_single_file(single: Callable[..., tuple[Path, Any]], kind: str, prediction: str, multiple: int) -> None:
    path, model = single(kind)
    found = inspect.inspect(str(path))
    assert json.loads(json.dumps(found)) == found
    for name, tensors in model.parts.items():
        count = sum(tensor.numel() for tensor in tensors.values())
        assert found["components"][name] == {
            "file": path.name,
            "dtype": "fp16",
            "parameters": count,
            "bytes": 2 * count,
        }
    assert set(found["components"]) == set(model.parts) and found["bytes"] == path.stat().st_size
    assert (found["format"], found["prediction"], found["schedule"]) == ("single file", prediction, "scaled_linear")
    assert (found["size"], found["factor"], found["multiple"], found["mask"]) == (32, 2, multiple, False)
    assert found["tokenizer"] == {"kind": "clip", "length": 77, "vocabulary": 49408}
    assert found["made_by"]["title"] == "some" and found["made_by"]["implementation"].startswith("https://")
    counted = costs(networks(Source(path).configs), 16, 16, 77, 2)
    assert found["cost"] == {"width": 32, "height": 32, "networks": counted}
    assert list(counted) == ["text_encoder", "unet", "vae_encoder", "vae_decoder"]
    assert found["flops"] == flops(counted) | {"width": 32, "height": 32}
    text = "\n".join(lines(found))
    for part in (
        "format             single file, ",
        "made by            some, https",
        "diffusers          StableDiffusionPipeline",
    ):
        assert part in text


def test_an_inpainting_model_reads_a_mask(single: Callable[..., tuple[Path, Any]]) -> None:
    found = inspect.model(single("clip", 9)[0])
    assert found["mask"] and found["class"] == "StableDiffusionInpaintPipeline" and found["latent_channels"] == 4
    assert any("4x16x16" in line and "reads a mask" in line for line in lines(found))


def test_averaged_weights_are_said_but_not_counted_twice(single: Callable[..., tuple[Path, Any]]) -> None:
    from safetensors.numpy import load_file, save_file

    path, _ = single()
    plain, tensors = inspect.model(path), load_file(path)
    start = "model.diffusion_model."
    means = {f"model_ema.{k[6:].replace('.', '')}": v for k, v in tensors.items() if k.startswith(start)}
    save_file(tensors | means, path)
    found = inspect.model(path)
    assert found["ema"] and found["components"] == plain["components"] and found["made_by"] == {}
    assert found["bytes"] == path.stat().st_size > plain["bytes"]
    text = "\n".join(lines(found))
    assert "with averaged (EMA) weights" in text and "made by" not in text


def test_a_published_dit_says_what_can_be_said(tmp_path: Path) -> None:
    from published_dit import published_weights
    from safetensors.torch import save_file

    tensors, path = published_weights(3, 128), tmp_path / "dit.safetensors"
    save_file(tensors, path)
    found = inspect.inspect(str(path))
    assert json.loads(json.dumps(found)) == found
    count = sum(tensor.numel() for tensor in tensors.values())
    assert found["components"] == {
        "transformer": {"file": path.name, "dtype": "fp32", "parameters": count, "bytes": 4 * count}
    }
    assert (found["format"], found["latent_channels"], found["latent_size"]) == ("DiT weights", 4, 8)
    assert (found["size"], found["scaling_factor"], found["generate"]) == (None, None, None)
    assert found["tokenizer"] == {"kind": "class", "length": 1, "classes": 5, "named": 0}
    assert found["flops"]["denoiser"] and found["flops"]["decoder"] is found["flops"]["width"] is None
    assert list(found["cost"]["networks"]) == ["transformer"] and found["cost"]["width"] is None
    text = "\n".join(lines(found))
    for part in (
        "no autoencoder: give one with --vae",
        "4x8x8",
        "5 classes, none named",
        "no pipeline: ",
        "one call of each network (the denoiser: twice a step with guidance)",
        "of transformer ",
        "FLOP, ",
    ):
        assert part in text
    with pytest.raises(UsageError, match="without an autoencoder"):
        inspect.inspect(str(path), 256)


def other_kind(path: Path, made: tuple[Path, dict[str, int], int], names: list[str] | None) -> Path:
    """A trained folder without its weights, its denoiser a DiT: by class of these names, or by T5's vectors."""
    shutil.copytree(
        made[0], path, ignore=shutil.ignore_patterns("*.safetensors", "unet", "vocab.json", "manifest.json")
    )
    index = json.loads((path / "model_index.json").read_text())
    del index["unet"]
    index["transformer"] = ["diffusers", "DiTTransformer2DModel"]
    sizes = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 3,
        "sample_size": 8,
        "patch_size": 2,
    }
    if names is None:
        text = {
            "model_type": "t5",
            "vocab_size": 99,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
        }
        (path / "text_encoder" / "config.json").write_text(json.dumps(text))
        (path / "tokenizer" / "tokenizer_config.json").write_text(
            '{"model_max_length": 1000000000000000019884624838656}'
        )
        index |= {"_class_name": "TinydiffPipeline", "_no_diffusers_pipeline": "text is read by T5"}
        sizes["cross_attention_dim"] = 16
    else:
        for name in ("text_encoder", "tokenizer"):
            shutil.rmtree(path / name)
            del index[name]
        index |= {"_class_name": "DiTPipeline", "id2label": {str(i): name for i, name in enumerate(names)}}
    (path / "transformer").mkdir()
    (path / "transformer" / "config.json").write_text(json.dumps(sizes))
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def test_a_class_conditional_folder(tmp_path: Path, made: tuple[Path, dict[str, int], int]) -> None:
    path = other_kind(tmp_path / "dit", made, ["tench", "goldfish", "", "hen"])
    found = inspect.model(path)
    assert set(found["components"]) == {"transformer", "vae"}
    assert found["tokenizer"] == {"kind": "class", "length": 1, "classes": 1000, "named": 3}
    assert found["flops"]["text"] is None and found["flops"]["decoder"]
    text = "\n".join(lines(found))
    assert "1000 classes, 3 named" in text and "DiTPipeline" in text and "no weights" in text and "of text" not in text


def test_a_folder_that_reads_text_by_t5(tmp_path: Path, made: tuple[Path, dict[str, int], int]) -> None:
    path = other_kind(tmp_path / "t5", made, None)
    found = inspect.model(path)
    assert found["tokenizer"] == {"kind": "t5", "length": None, "vocabulary": 99}
    counted = costs(networks(Source(path).configs), 8, 8, 512, 2)
    assert found["cost"] == {"width": 16, "height": 16, "networks": counted}
    assert found["flops"] == flops(counted) | {"width": 16, "height": 16}
    text = "\n".join(lines(found))
    assert "no pipeline: text is read by T5" in text and "? T5 tokens of 99" in text


def test_flow_matching_is_said(tmp_path: Path, made: tuple[Path, dict[str, int], int]) -> None:
    path = other_kind(tmp_path / "flow", made, [])
    (path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    found = inspect.model(path)
    assert (found["schedule"], found["prediction"]) == ("flow", "flow")


@pytest.mark.parametrize("local", ["/home/someone/model", "C:\\Users\\someone\\model", "\\\\server\\someone"])
def test_what_made_a_model_is_said_but_not_whose_disk_it_was_on(local: str) -> None:
    index = {"_diffusers_version": "0.6.0", "_name_or_path": local}
    assert inspect.made_by(None, index) == {"diffusers": "0.6.0"}
    index["_name_or_path"] = "runwayml/stable-diffusion-v1-5"
    said = inspect.made_by(None, index)
    assert origin_line(said) == "diffusers 0.6.0, runwayml/stable-diffusion-v1-5"


# ---- operations ------------------------------------------------------------------------------------------------------


def test_operations_are_those_torch_counts_at_the_size_asked_for(made: tuple[Path, dict[str, int], int]) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tinydiff.checkpoints import folder

    def counted(network: Any, *inputs: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(*(x.to("meta") for x in inputs))
        return counter.get_total_flops()

    model, latents, context = folder.load(Source(made[0])), torch.zeros(1, 3, 4, 12), torch.zeros(1, 9, 8)
    for part in model.networks.values():
        part.to("meta")  # where attention is made of products that torch counts
    found = inspect.inspect(str(made[0]), 24, 8)
    assert found["flops"] == {
        "denoiser": counted(model.denoiser, latents, torch.zeros(1), context),
        "decoder": counted(model.vae.decode, latents),
        "text": counted(model.networks["text_encoder"], torch.zeros(1, 9, dtype=torch.int64)),
        "width": 24,
        "height": 8,
    }
    assert found["cost"]["networks"]["vae_encoder"]["flops"] == counted(model.vae.encode, torch.zeros(1, 3, 8, 24))
    own = inspect.model(made[0])["flops"]
    assert (own["width"], own["height"]) == (16, 16)
    assert inspect.model(made[0], height=8)["flops"]["width"] == 16


def test_a_size_that_cannot_be_drawn_or_of_no_model_is_refused(
    tmp_path: Path, made: tuple[Path, dict[str, int], int]
) -> None:
    with pytest.raises(UsageError, match="width 18 is no multiple of 4"):
        inspect.show(str(made[0]), width=18)
    with pytest.raises(UsageError, match="height 30 is no multiple of 8"):
        inspect.show(None, height=30)
    with pytest.raises(UsageError, match="no such configuration"):
        inspect.show(str(tmp_path / "x.toml"), height=64)
    with pytest.raises(UsageError, match="only a model and a configuration have a cost"):
        inspect.show(str(tmp_path / "x.png"), height=64)


def test_a_configuration_that_lacks_a_size_is_named(tmp_path: Path, made: tuple[Path, dict[str, int], int]) -> None:
    path = other_kind(tmp_path / "t5", made, None)
    (path / "text_encoder" / "config.json").write_text('{"model_type": "clip_text_model"}')
    with pytest.raises(ModelError, match="lack or misstate 'vocab_size'"):
        inspect.model(path)


# ---- headers -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from([np.float32, np.float16]), st.lists(st.integers(0, 9), max_size=3)), max_size=5)
)
def test_safetensors_headers_count_what_was_saved(tensors: list) -> None:
    import tempfile

    from safetensors.numpy import save_file

    arrays = {f"t{i}": np.zeros(shape, dtype) for i, (dtype, shape) in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(arrays, path, {"format": "pt"})
        counts = safetensors_counts(path)
    for name, dtype in (("fp32", np.float32), ("fp16", np.float16)):
        assert counts[name] == sum(a.size for a in arrays.values() if a.dtype == dtype)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"version https://git-lfs.github.com/spec/v1\n",
        (2).to_bytes(8, "little") + b"{]",
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_damaged_safetensors_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: (damaged|a Git LFS pointer)"):
        safetensors_counts(path)


def test_cut_files_are_named(tmp_path: Path, made: tuple[Path, dict[str, int], int]) -> None:
    whole = next((made[0] / "unet").glob("*.safetensors")).read_bytes()
    for content in (whole[:-1], whole + b"x"):
        (tmp_path / "cut.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=r"cut\.safetensors: damaged"):
            safetensors_counts(tmp_path / "cut.safetensors")
    onnx_file(tmp_path / "model.onnx", [np.zeros((30, 30), np.float32)])
    whole = (tmp_path / "model.onnx").read_bytes()
    for content in (whole[:-9], b"\xff" * 99, b""):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.onnx: damaged"):
            onnx_counts(tmp_path / "model.onnx")


def test_all_shards_or_the_plain_variant_or_fp16_are_counted(
    tmp_path: Path, made: tuple[Path, dict[str, int], int]
) -> None:
    from safetensors.numpy import save_file

    def saved(*files: str) -> dict:
        for i, file in enumerate(files):
            save_file({f"t{i}": np.zeros(10**i, np.float16)}, unet / file)
        return inspect.component(tmp_path, "unet")

    unet = tmp_path / "unet"
    unet.mkdir()
    for name in ("lora.safetensors", "diffusion_pytorch_model.bin"):
        (unet / name).touch()
    assert inspect.component(tmp_path, "unet")["file"] is None
    assert saved("model.non_ema.safetensors", "model.fp16.safetensors")["parameters"] == 10
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (unet / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    assert saved(*shards) == {
        "file": f"unet/{shards[0]}",
        "dtype": "fp16",
        "parameters": 11,
        "bytes": sum((unet / shard).stat().st_size for shard in shards),
    }
    (unet / shards[1]).unlink()
    with pytest.raises(ModelError, match=f"{shards[1]}: missing"):
        inspect.component(tmp_path, "unet")
    assert saved("model.safetensors")["parameters"] == 1


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    index = {name: ["a", "B"] for name in ("..", "../x", "/etc", "", "a\0b", "unet", "scheduler")}
    assert inspect.folders(tmp_path, index) == ["unet"]


# ---- configurations and images -------------------------------------------------------------------------------------


def test_a_configuration_is_printed_resolved(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text("[data]\nresolution = 48\n[generate]\nsteps = 7\n")
    (tmp_path / "printed.toml").write_text("\n".join(inspect.show(str(path))) + "\n")
    assert config.load(tmp_path / "printed.toml") == config.load(path)
    printed, costs = (tmp_path / "printed.toml").read_text().split("\n\n# one call at 48x48 of each network (")
    assert printed + "\n" == to_toml(config.load(path))
    names = ["text_encoder", "unet", "vae_encoder", "vae_decoder"]
    assert [line.partition(":")[0] for line in costs.splitlines()[1:]] == [f"# {name}" for name in names]
    assert json.loads(inspect.show(str(path), as_json=True)[0])["config"]["data"]["resolution"] == 48
    assert "\n".join(inspect.show(None)) + "\n" == to_toml(config.load())
    with pytest.raises(UsageError, match="no such configuration"):
        inspect.show(str(tmp_path / "none.toml"))


def test_an_image_shows_its_settings_and_no_control_characters(tmp_path: Path) -> None:
    path, settings = tmp_path / "x.png", {"prompt": "red \x1b[31m heart\n\u202e", "seed": 7, "nested": {"a": [1, None]}}
    path.write_bytes(images.encode_png(np.zeros((4, 4, 3), np.uint8), settings))
    assert images.read_settings(path) == settings
    assert json.loads(inspect.show(str(path), as_json=True)[0])["settings"] == settings
    lines = inspect.show(str(path))
    assert all(line.isprintable() for line in lines) and len(lines) == 4
    assert re.fullmatch(r"seed +7", lines[2])


def test_what_is_not_there_or_nothing_known_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    plain.write_bytes(images.encode_png(np.zeros((4, 4, 3), np.uint8), None))
    with pytest.raises(DataError, match="holds no tinydiff settings"):
        inspect.show(str(plain))
    with pytest.raises(UsageError, match="no such image"):
        inspect.show(str(tmp_path / "none.PNG"))
    for name in ("notes.txt", "model.ckpt", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="nothing to inspect"):
        inspect.show(str(tmp_path / "notes.txt"))
    with pytest.raises(ModelError, match="a pickle, .*convert it"):
        inspect.show(str(tmp_path / "model.ckpt"))
    with pytest.raises(ModelError, match="damaged, or not a safetensors file"):
        inspect.show(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345_678, "12.3 MB"), (999_600, "1 MB"), (2.5e9, "2.5 GB")],
)
def test_sizes_are_short(number: float, text: str) -> None:
    assert short(number, "B") == text


def test_it_runs_where_torch_and_onnxruntime_cannot_be_imported(
    made: tuple[Path, dict[str, int], int], single: Callable[..., tuple[Path, Any]]
) -> None:
    block = "import sys; sys.modules.update(torch=None, onnxruntime=None, onnx=None)"
    code = f"{block}; from tinydiff import inspect, report; print(*inspect.show(sys.argv[1]), sep=chr(10))"
    config_path = made[0] / "tinydiff.toml"
    for path in (made[0], single()[0], config_path):
        done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
        assert f"not counted: {WHY}" in done.stdout
    for path in (made[0], config_path):
        look = f"{block}; from tinydiff import inspect; print(inspect.show(sys.argv[1], as_json=True)[0])"
        done = subprocess.run([sys.executable, "-c", look, str(path)], check=True, capture_output=True, text=True)
        assert json.loads(done.stdout)["cost"] == {"width": 16, "height": 16, "networks": None, "why": WHY}


def flops(counted: dict[str, Any]) -> dict[str, int]:
    """The operations among costs, under the names of `inspect`'s JSON."""
    denoiser = next(name for name in ("unet", "transformer") if name in counted)
    graphs = {"denoiser": denoiser, "decoder": "vae_decoder", "text": "text_encoder"}
    return {name: counted[graph]["flops"] for name, graph in graphs.items()}


def test_a_configuration_costs_what_the_model_made_of_it_does(
    tmp_path: Path, made: tuple[Path, dict[str, int], int]
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml(TINY))
    for size in ((None, None), (24, 8)):
        found, model = inspect.inspect(str(path), *size)["cost"], inspect.model(made[0], *size)["cost"]
        text, given = found["networks"].pop("text_encoder"), model["networks"].pop("text_encoder")
        assert found == model and text["flops"] == given["flops"]  # its vocabulary is that of a tokenizer to be trained
        assert text["parameters"] - given["parameters"] == (TINY.text_encoder.vocab_size - made[2]) * 8
    assert "cost" not in inspect.inspect(None)
    at = inspect.inspect(None, 64)["cost"]
    assert (at["width"], at["height"]) == (64, config.load().data.resolution)
    printed = inspect.show(None, width=64)
    assert "# one call at 64x32 of each network (the denoiser: twice a step with guidance)" in printed


@pytest.mark.parametrize("name", ["class", "clip", "t5"])
def test_a_configuration_of_a_dit_has_a_cost(tmp_path: Path, name: str) -> None:
    sizes = ["data.resolution=16", "dit.size=custom", "dit.num_layers=1", "dit.attention_head_dim=8"]
    own = {"t5": [f"text_encoder.path={tmp_path}"]}.get(name, [])
    cfg = config.load(None, ["denoiser.kind=dit", f"text_encoder.kind={name}", *sizes, *own])
    path = tmp_path / "dit.toml"
    path.write_text(to_toml(cfg))
    if name == "t5":
        assert "cost" not in inspect.inspect(str(path))  # its encoder is on another machine
        with pytest.raises(ModelError, match="holds no text encoder; text_encoder.path names"):
            inspect.inspect(str(path), 16)
        (tmp_path / "text_encoder").mkdir()
        t5 = {"vocab_size": 99, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(t5))
    text = [] if name == "class" else ["text_encoder"]
    found = inspect.inspect(str(path))["cost"]["networks"]
    assert list(found) == [*text, "transformer", "vae_encoder", "vae_decoder"]
    assert all(each["flops"] and each["parameters"] for each in found.values())


def test_a_model_of_another_network_is_told_about_without_its_cost(made: tuple, tmp_path: Path) -> None:
    path = shutil.copytree(made[0], tmp_path / "model")
    table = path / "unet" / "config.json"
    table.write_text(json.dumps(json.loads(table.read_text()) | {"class_embed_type": "timestep"}))
    told = inspect.inspect(str(path))
    assert told["cost"]["networks"] is None and told["components"]["unet"]["parameters"]
    assert "unet: class_embed_type is 'timestep', and only None is supported" in "\n".join(lines(told))
