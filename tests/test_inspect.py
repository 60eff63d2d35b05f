"""What a folder, file or image is: against torch's own counts, onnx's own parser and the files as written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import config, images, inspect
from tinydiff.errors import DataError, ModelError, UsageError

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
        "denoiser.block_out_channels=[8,8]",
        "denoiser.norm_num_groups=4",
        "denoiser.attention_head_dim=2",
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
    model = folder.build(TINY, tokenizer)
    model.scaling_factor = 0.75
    path = tmp_path_factory.mktemp("models") / "tiny"
    folder.save(path, model, TINY, torch.float16)
    counts = {name: sum(p.numel() for p in part.state_dict().values()) for name, part in model.parts().items()}
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
    assert found["tokenizer"] == {"length": 9, "vocabulary": vocabulary}
    assert found["generate"]["cfg_scale"] == 4.5


def test_a_run_is_its_model_and_json_is_one_line(made: tuple[Path, dict[str, int], int], tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(made[0])
    assert inspect.inspect(str(tmp_path)) == inspect.model(tmp_path / "model")
    [line] = inspect.show(str(made[0]), as_json=True)
    assert json.loads(line) == inspect.model(made[0])


def test_lines_of_a_model_name_its_figures(made: tuple[Path, dict[str, int], int]) -> None:
    text = "\n".join(inspect.show(str(made[0])))
    for part in (
        "diffusers folder (StableDiffusionPipeline)",
        "fp16",
        "16x16 pixels",
        "3x8x8, times 0.75",
        "predicts v",
        "cfg_scale 4.5",
    ):
        assert part in text
    assert len(text.splitlines()) == 10 and not re.search(r" \n| $", text)


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
    assert "ONNX bundle" in inspect.lines(found)[1]


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
    assert "with ONNX graphs" in inspect.lines(found)[1]


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
        counts = inspect.safetensors_counts(path)
    for name, dtype in (("fp32", np.float32), ("fp16", np.float16)):
        assert counts[name] == sum(a.size for a in arrays.values() if a.dtype == dtype)


@given(st.integers(0, 2**63 - 1))
def test_varints_against_the_definition(value: int) -> None:
    groups = [value >> shift & 127 for shift in range(0, max(1, value.bit_length()), 7)]
    data = bytes([g | 128 for g in groups[:-1]] + groups[-1:])
    assert inspect.varint(data + b"\x99", 0) == (value, len(data))  # type: ignore[arg-type]


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
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged"):
        inspect.safetensors_counts(path)


def test_cut_files_are_named(tmp_path: Path, made: tuple[Path, dict[str, int], int]) -> None:
    whole = next((made[0] / "unet").glob("*.safetensors")).read_bytes()
    for content in (whole[:-1], whole + b"x"):
        (tmp_path / "cut.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="its size"):
            inspect.safetensors_counts(tmp_path / "cut.safetensors")
    onnx_file(tmp_path / "model.onnx", [np.zeros((30, 30), np.float32)])
    whole = (tmp_path / "model.onnx").read_bytes()
    for content in (whole[:-9], b"\xff" * 99, b""):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.onnx: damaged"):
            inspect.onnx_counts(tmp_path / "model.onnx")


def test_the_plain_variant_or_all_shards_are_counted(tmp_path: Path) -> None:
    def names(*files: str) -> list[str]:
        for old in tmp_path.iterdir():
            old.unlink()
        for file in files:
            (tmp_path / file).touch()
        return [path.name for path in inspect.weight_files(tmp_path)]

    assert names("model.fp16.safetensors", "model.safetensors", "model.onnx") == ["model.safetensors"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert names(*shards, "model.fp16.safetensors") == shards
    assert names("model.fp16.safetensors", "model.non_ema.safetensors") == ["model.fp16.safetensors"]
    assert names("model.bin") == []


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    index = {name: ["a", "B"] for name in ("..", "../x", "/etc", "", "a\0b", "unet", "scheduler")}
    assert inspect.networks(tmp_path, index) == ["unet"]


# ---- configurations and images -------------------------------------------------------------------------------------


def test_a_configuration_is_printed_resolved(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text("[data]\nresolution = 48\n[generate]\nsteps = 7\n")
    (tmp_path / "printed.toml").write_text("\n".join(inspect.show(str(path))) + "\n")
    assert config.load(tmp_path / "printed.toml") == config.load(path)
    assert (tmp_path / "printed.toml").read_text() == config.to_toml(config.load(path))
    assert json.loads(inspect.show(str(path), as_json=True)[0])["config"]["data"]["resolution"] == 48
    assert "\n".join(inspect.show(None)) + "\n" == config.to_toml(config.load())
    with pytest.raises(UsageError, match="no such configuration"):
        inspect.show(str(tmp_path / "none.toml"))


def test_an_image_shows_its_settings_and_no_control_characters(tmp_path: Path) -> None:
    path, settings = tmp_path / "x.png", {"prompt": "red \x1b[31m heart\n\u202e", "seed": 7, "nested": {"a": [1, None]}}
    path.write_bytes(images.encode_png(np.zeros((4, 4, 3), np.uint8), settings))
    assert inspect.image(path) == settings
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
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="nothing to inspect"):
        inspect.show(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345_678, "12.3 MB"), (999_600, "1 MB"), (2.5e9, "2.5 GB")],
)
def test_sizes_are_short(number: float, text: str) -> None:
    assert inspect.short(number, "B") == text


def test_it_runs_where_torch_and_onnxruntime_cannot_be_imported(made: tuple[Path, dict[str, int], int]) -> None:
    block = "import sys; sys.modules.update(torch=None, onnxruntime=None, onnx=None)"
    code = f"{block}; from tinydiff import inspect, report; assert inspect.show({str(made[0])!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
