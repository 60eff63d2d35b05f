"""The exported bundle: its layout, its weights, and its agreement with torch at sizes it was not traced at."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import safetensors.torch
import torch
import typer
from contrib import OPERATORS
from interpreters import ROOT, without
from onnx.reference import ReferenceEvaluator

from tinydiff import cli, config, export, inspect
from tinydiff.backends import open_backend
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError, UsageError
from tinydiff.networks import graphs, network_of
from tinydiff.precision import PRECISIONS
from tinydiff.quantisation import quantised
from tinydiff.text.tokenizer import Tokenizer
from tinydiff.verified import verify

TINY = [
    "data.resolution=16",
    "unet.block_out_channels=[8,16]",
    'unet.down_block_types=["DownBlock2D","CrossAttnDownBlock2D"]',
    "unet.norm_num_groups=4",
    "unet.attention_head_dim=2",
    "autoencoder.block_out_channels=[8,16]",
    "autoencoder.norm_num_groups=4",
    "autoencoder.latent_channels=3",
    "autoencoder.mid_block_add_attention=true",
    "text_encoder.hidden_size=12",
    "text_encoder.intermediate_size=24",
    "text_encoder.num_attention_heads=2",
    "text_encoder.num_hidden_layers=1",
    "text_encoder.max_position_embeddings=9",
]


SCRATCH = tempfile.TemporaryDirectory()


def random_model(*changes: str) -> tuple[folder.Model, config.Config]:
    cfg = config.load(None, [*TINY, *changes])
    tokenizer = Tokenizer.train(["red heart", "blue circle"], 514, cfg.text_encoder.max_position_embeddings)
    model, generator = folder.build(cfg, tokenizer), torch.Generator().manual_seed(1)
    for part in model.networks.values():
        for p in part.parameters():
            p.data += torch.randn(p.shape, generator=generator) / (p[0].numel() if p.ndim > 1 else 25) ** 0.5
    return model, cfg


@functools.cache
def model_dir() -> Path:
    """A model folder whose weights are all random: fresh ones end in zeros, with which any two graphs agree."""
    model, cfg = random_model()
    path = Path(SCRATCH.name) / "model"
    folder.save(path, model, cfg)
    return path


TRANSLATED: dict[str, onnx.ModelProto] = {}


def translated(name: str, model: folder.Model, opset: int, translate: Callable = export.translate) -> ir.Model:
    """`export.translate`, whose slow answer does not depend on the weights: the second time it is the first one's copy."""
    if name in TRANSLATED:
        return ir.from_proto(TRANSLATED[name])
    result = translate(name, model, opset)
    TRANSLATED[name] = ir.to_proto(result)
    return result


NETWORKS = {"text_encoder": "text_encoder", "unet": "unet", "vae_encoder": "vae", "vae_decoder": "vae"}


@functools.cache
def exported(precision: str, device: str = "any") -> tuple[Path, list[dict]]:
    path = Path(SCRATCH.name) / f"{precision}-{device}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "translate", translated)
        rows = export.export(Source(model_dir()), path, precision, device=device)
    return path, rows


def bundle(precision: str, device: str = "any") -> Path:
    path, rows = exported(precision, device)
    assert [row["graph"] for row in rows] == [*NETWORKS, "image"]
    return path


def graph(precision: str, name: str) -> onnx.ModelProto:
    return onnx.load(bundle(precision) / name / "model.onnx", load_external_data=False)


def axes(values: list[onnx.ValueInfoProto]) -> dict[str, list[str | int]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


# ---- layout --------------------------------------------------------------------------------------------------------


def test_layout_is_optimums_and_diffusers() -> None:
    path = bundle("fp32")
    verify(path)
    for name, part in NETWORKS.items():
        onnx.checker.check_model(path / name / "model.onnx", full_check=True)
        assert (path / name / "config.json").read_bytes() == (model_dir() / part / "config.json").read_bytes()
    for name in ("model_index.json", "tinydiff.toml", "scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        assert (path / name).read_bytes() == (model_dir() / name).read_bytes()
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in path.rglob("*.safetensors"))


def test_names_and_axes() -> None:
    described = graphs(Source(bundle("fp32")).configs)
    assert list(described) == list(NETWORKS)
    for name, expected in described.items():
        found = graph("fp32", name).graph
        assert axes(found.input) == {key: list(array.axes) for key, array in expected.inputs.items()}
        assert axes(found.output) == {key: list(array.axes) for key, array in expected.outputs.items()}
    text, unet = graph("fp32", "text_encoder").graph, graph("fp32", "unet").graph
    assert axes(text.input) == {"input_ids": ["batch", "sequence"]}
    assert axes(text.output) == {"last_hidden_state": ["batch", "sequence", 12], "pooler_output": ["batch", 12]}
    latents = ["batch", 3, "height", "width"]
    assert axes(unet.input) == {"sample": latents, "timestep": [], "encoder_hidden_states": ["batch", "sequence", 12]}
    assert axes(unet.output) == {"out_sample": latents}
    assert axes(graph("fp32", "vae_encoder").graph.output) == {
        "latent_parameters": ["batch", 6, "latent_height", "latent_width"]
    }
    assert axes(graph("fp32", "vae_decoder").graph.output) == {"sample": ["batch", 3, "image_height", "image_width"]}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_the_safetensors_files_own_bytes(precision: str, name: str) -> None:
    file = {"text_encoder": "model.safetensors"}.get(name, "diffusion_pytorch_model.safetensors")
    assert network_of(NETWORKS[name], Source(model_dir()).configs[NETWORKS[name]]).file == file
    weights, path = safetensors.torch.load_file(bundle(precision) / name / file), bundle(precision) / name
    found = {}
    for tensor in graph(precision, name).graph.initializer:
        entry = {e.key: e.value for e in tensor.external_data}
        if not entry:
            assert tensor.ByteSize() < 512  # shapes and the like; 512 bytes hold no weight worth sharing
            continue
        assert entry["location"] == file
        start = int(entry["offset"])
        found[tensor.name] = (path / file).read_bytes()[start : start + int(entry["length"])]
        assert tensor.data_type == getattr(
            onnx.TensorProto, {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision]
        )
    assert found == {key: value.view(torch.uint8).numpy().tobytes() for key, value in weights.items()}


def test_graphs_carry_no_trace_of_the_exporter() -> None:
    for name in NETWORKS:
        data = (bundle("fp16") / name / "model.onnx").read_bytes()
        assert not any(word in data for word in (b".py", b"torch.", b"/tmp", str(Path.home()).encode()))


def test_bundle_is_a_model_folder_too() -> None:
    want, exact, half = (folder.load(Source(p)) for p in (model_dir(), bundle("fp32"), bundle("fp16")))
    for name, part in want.networks.items():
        for key, value in part.state_dict().items():
            assert torch.equal(exact.networks[name].state_dict()[key], value)
            assert torch.equal(half.networks[name].state_dict()[key], value.half().float())


# ---- agreement -----------------------------------------------------------------------------------------------------


def outputs(path: Path, name: str, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(path / name / "model.onnx", providers=["CPUExecutionProvider"]).run(None, feed)


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-5), ("fp16", 2e-2), ("int8", 0.2)])
@pytest.mark.parametrize(("batch", "height", "width", "tokens"), [(1, 2, 2, 9), (1, 6, 10, 2), (5, 4, 2, 3)])
def test_any_batch_and_size(precision: str, near: float, batch: int, height: int, width: int, tokens: int) -> None:
    rng = np.random.default_rng(batch)
    x = rng.standard_normal((batch, 3, height, width), dtype=np.float32)
    pixels = rng.standard_normal((batch, 3, 2 * height, 2 * width), dtype=np.float32)
    context = rng.standard_normal((batch, tokens, 12), dtype=np.float32)
    ids, t = rng.integers(0, 514, (batch, tokens)), np.array(37.0, np.float32)
    model = folder.load(Source(model_dir()))
    tensors = [torch.from_numpy(a) for a in (x, t, context)]
    with torch.inference_mode():
        want = {
            "text_encoder": model.networks["text_encoder"](torch.from_numpy(ids)),
            "unet": (model.denoiser(*tensors),),
            "vae_encoder": (model.vae.encode(torch.from_numpy(pixels)),),
            "vae_decoder": (model.vae.decode(tensors[0]),),
        }
    feeds = {"text_encoder": [ids], "unet": [x, t, context], "vae_encoder": [pixels], "vae_decoder": [x]}
    for name, arrays in feeds.items():
        got = outputs(bundle(precision), name, dict(zip(INPUTS[name], arrays, strict=True)))
        for w, g in zip(want[name], got, strict=True):
            np.testing.assert_allclose(g, w.numpy(), rtol=0, atol=near * float(w.std()))


def test_runs_without_torch() -> None:
    """The four calls of the backend, in a process in which importing torch raises, give what torch gives here."""
    code = (
        "from pathlib import Path; import numpy as np; from tinydiff.backends.onnx import OnnxBackend\n"
        "from tinydiff.checkpoints.source import Source; b = OnnxBackend(Source(Path(sys.argv[1])), 'cpu')\n"
        "ids = {name: each.encode(['red heart', 'blue']) for name, each in b.tokenizers.items()}\n"
        "context = b.encode_text(ids); x = np.ones((2, 3, 8, 8), np.float32); y = b.denoise(x, 5.0, context)\n"
        "print([float(a.sum()) for a in (*context.values(), y, b.decode(y), b.encode_image(x))])"
    )
    command = [sys.executable, "-c", without(code, "torch"), bundle("fp16")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    from tinydiff.backends.pytorch import TorchBackend

    b = TorchBackend.open(Source(bundle("fp16")), "cpu")
    ids, x = b.tokenizers["text_encoder"].encode(["red heart", "blue"]), np.ones((2, 3, 8, 8), np.float32)
    context = b.encode_text({"text_encoder": ids})
    y = b.denoise(x, 5.0, context)
    want = [float(a.sum()) for a in (*context.values(), y, b.decode(y), b.encode_image(x))]
    assert len(want) == 4
    assert done.stderr == "" and json.loads(done.stdout) == pytest.approx(want, rel=5e-3)


def test_no_weight_is_transposed_and_shapes_are_known() -> None:
    """What makes opening a graph fast: onnxruntime has nothing to fold but casts, and no shape to work out."""
    proto = graph("fp16", "unet").graph
    cast = {node.output[0] for node in proto.node if node.op_type == "Cast"}
    assert not [n for n in proto.node if n.op_type in ("Transpose", "Reshape", "Unsqueeze") and n.input[0] in cast]
    typed = {v.name for v in [*proto.value_info, *proto.output]}
    assert sum(node.output[0] not in typed for node in proto.node) <= 0.1 * len(proto.node)


# ---- precision -----------------------------------------------------------------------------------------------------

FORMS = [
    ("fp32", "any"),
    ("fp32", "cuda"),
    ("bf16", "cuda"),
    ("int8", "cuda"),
    ("fp16", "any"),
    ("fp16", "cpu"),
    ("fp16", "cuda"),
    ("bf16", "any"),
    ("int8", "any"),
    ("int8", "cpu"),
]


@pytest.mark.parametrize(("precision", "device"), FORMS)
def test_a_bundle_is_as_near_to_torch_as_its_precision_says(precision: str, device: str) -> None:
    path, rows = exported(precision, device)
    *parts, image = rows
    bounds, worst = PRECISIONS[precision], max(row["max_abs_diff"] for row in parts)
    assert worst <= bounds.graph and image["psnr"] >= bounds.psnr and image["same"] >= bounds.same
    step = {"fp32": 0, "fp16": 2**-11, "bf16": 2**-8, "int8": 2**-8}[precision]
    assert worst > step / 2  # less exact than float32, and told so
    told = ort_metadata(path / "unet" / "model.onnx")
    assert (told["tinydiff.precision"], told["tinydiff.device"]) == (precision, device)
    assert "tinydiff.islands" not in told


def ort_metadata(path: Path) -> dict[str, str]:
    return {each.key: each.value for each in onnx.load(path, load_external_data=False).metadata_props}


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_half_and_statistics_and_levels_are_not(precision: str, kind: int, name: str) -> None:
    path = bundle(precision) / name / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    proto = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*proto.value_info, *proto.input, *proto.output]}
    kinds |= {tensor.name: tensor.data_type for tensor in proto.initializer}
    assert kind not in {kinds[v.name] for v in [*proto.input, *proto.output]}
    half, full = Counter(), Counter()
    for node in proto.node:
        (half if kinds[node.output[0]] == kind else full)[node.op_type] += 1
    assert not {"Sin", "Cos", "InstanceNormalization", "Softmax", "BatchNormalization"} & half.keys()
    resnets = sum("time_emb_proj.weight" in key for key in kinds)
    assert full["Gemm"] == (
        resnets + 2 if name == "unet" else 0
    )  # two products of the time embedding, and one in each resnet
    assert not full["Conv"] if precision == "fp16" else not half["Conv"]
    assert not full["MultiHeadAttention"] and (half["Gemm"] > 0 or name.startswith("vae"))


def test_a_value_beyond_half_is_an_island_of_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder whose residuals grow to some hundred thousand, which its last norm takes back: no black image, as there would
    be without the run that shows it."""
    model = folder.load(Source(model_dir()))
    largest = model.vae.decoder.conv_in.weight.data.abs().max()
    for p in model.vae.decoder.conv_in.parameters():
        p.data *= 6e4 / largest  # just what half can store
    folder.save(tmp_path / "model", model, config.load(None, TINY))
    monkeypatch.setattr(export, "translate", translated)
    *rows, image = export.export(Source(tmp_path / "model"), tmp_path / "bundle", "fp16")
    assert image["psnr"] > 40 and max(row["max_abs_diff"] for row in rows) < 3e-2
    islands = ort_metadata(tmp_path / "bundle" / "vae_decoder" / "model.onnx")["tinydiff.islands"].split()
    assert "decoder.conv_in:Conv" in islands and not any("conv_out" in each for each in islands)
    export.export(Source(tmp_path / "model"), tmp_path / "cuda", "fp16", device="cuda")
    evaluator = ReferenceEvaluator(onnx.load(tmp_path / "cuda" / "vae_decoder" / "model.onnx"), new_ops=OPERATORS)
    latents = export.examples("vae_decoder", model, export.CHECKED[0])
    got = evaluator.run(None, {k: v.numpy() for k, v in latents.items()})
    assert export.furthest(export.answers("vae_decoder", model, latents), got) < 3e-2
    monkeypatch.setattr(export, "magnitudes", lambda *_: {})
    with pytest.raises(ModelError, match=r"^vae_decoder: differs from torch by nan"):
        export.export(Source(tmp_path / "model"), tmp_path / "black", "fp16")


def test_inspect_tells_of_graphs_and_of_bytes() -> None:
    for precision, device, where in (
        ("int8", "any", "any provider"),
        ("fp16", "cuda", "CUDA alone"),
        ("int8", "cpu", "CPUs"),
    ):
        told = inspect.inspect(str(bundle(precision, device)))
        assert told["graphs"] == {name: {"precision": precision, "device": device} for name in NETWORKS}
        text = dict(line.split(None, 1) for line in inspect.show(str(bundle(precision, device))))
        assert text["graphs"].strip() == f"{precision}, for {where}"
        whole = sum(p.numel() for p in folder.load(Source(model_dir())).networks["unet"].parameters())
        assert told["components"]["unet"]["parameters"] == whole


@pytest.mark.parametrize(("precision", "near"), [("fp32", 2e-5), ("fp16", 3e-2)])
@pytest.mark.parametrize("name", NETWORKS)
def test_operators_of_cuda_give_what_torch_gives(name: str, precision: str, near: float) -> None:
    """By onnx's reference evaluator, with those of onnxruntime's operators written out in numpy."""
    path = bundle(precision, "cuda") / name / "model.onnx"
    proto, model = onnx.load(path), folder.load(Source(model_dir()))
    found, evaluator = Counter(n.op_type for n in proto.graph.node), ReferenceEvaluator(proto, new_ops=OPERATORS)
    takes, gives = ([value.name for value in each] for each in (proto.graph.input, proto.graph.output))
    assert (takes, gives) == ([*graphs(model.configs)[name].inputs], [*graphs(model.configs)[name].outputs])
    assert "InstanceNormalization" not in found and (
        name == "text_encoder" or (found["GroupNorm"] and found["SkipGroupNorm"])
    )
    biased = [n for n in proto.graph.node if n.op_type == "SkipGroupNorm" and len(n.input) == 5]
    assert biased or name == "text_encoder"  # the biases of the convolutions before them
    packed = [n for n in proto.graph.node if n.op_type == "MultiHeadAttention" and len([i for i in n.input if i]) <= 2]
    assert len(packed) >= found["MultiHeadAttention"] > 0 or name.startswith("vae")
    for size in export.CHECKED:
        inputs = export.examples(name, model, size)
        got = evaluator.run(None, {k: v.numpy() for k, v in inputs.items()})
        assert export.furthest(export.answers(name, model, inputs), got) < near


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_card_runs_a_graph_without_transposes(name: str, precision: str, on_card: Any) -> None:
    """The layout of convolutions is the graph's, from its first value to its last; and the denoiser's calls can be recorded, for
    which nothing may be copied to the host or from it."""
    found = Counter(
        n.op_type for n in on_card(bundle(precision, "cuda") / name / "model.onnx", name == "unet").graph.node
    )
    assert not {"Conv", *(["MemcpyToHost", "MemcpyFromHost"] if name == "unet" else [])} & found.keys()
    assert found["Transpose"] <= (0 if name == "text_encoder" else 2) and (found["NhwcConv"] or name == "text_encoder")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_card_can_record_every_precision(precision: str, on_card: Any) -> None:
    on_card(bundle(precision, "cuda") / "unet" / "model.onnx", True)


@pytest.mark.parametrize(("precision", "near"), [("fp32", 2e-5), ("fp16", 3e-2)])
def test_biases_of_wide_layers_are_added_with_what_follows(precision: str, near: float, tmp_path: Path) -> None:
    """By the two operators that have kernels for Stable Diffusion's widths alone."""
    wide = ["unet.block_out_channels=[320]", 'unet.down_block_types=["CrossAttnDownBlock2D"]']
    model, _ = random_model(*wide)
    (tmp_path / "unet").mkdir()
    export.write_graph("unet", model, tmp_path, export.Form(precision, device="cuda"), [])
    proto = onnx.load(tmp_path / "unet" / "model.onnx")
    found, blocks = Counter(n.op_type for n in proto.graph.node), 4  # two on the way up
    assert (found["BiasSplitGelu"], found["BiasAdd"], found["Gelu"]) == (blocks, 3 * blocks, 0)
    evaluator, inputs = ReferenceEvaluator(proto, new_ops=OPERATORS), export.examples("unet", model, export.CHECKED[0])
    got = evaluator.run(None, {k: v.numpy() for k, v in inputs.items()})
    assert export.furthest(export.answers("unet", model, inputs), got) < near


def test_bytes_are_the_weights_to_half_a_step() -> None:
    want = {name: part.state_dict() for name, part in folder.load(Source(model_dir())).networks.items()}
    for name, part in NETWORKS.items():
        stored = safetensors.torch.load_file(bundle("int8") / name / "int8.safetensors")
        found = {key for key in stored if f"{key}.scale" in stored}
        assert found or name == "text_encoder"
        for key in found:
            scale = stored[f"{key}.scale"].reshape(-1, *[1] * (stored[key].ndim - 1))
            assert stored[key].dtype == torch.int8 and (stored[key].flatten(1).abs().amax(1) == 127).all()
            assert ((stored[key] * scale - want[part][key]).abs() <= scale * 0.5001).all()


def test_whole_numbers_are_multiplied_on_a_cpu_alone() -> None:
    for device, there in (("any", False), ("cpu", True)):
        found = Counter(node.op_type for node in onnx.load(bundle("int8", device) / "unet" / "model.onnx").graph.node)
        assert bool(found["MatMulInteger"]) is there and found["DequantizeLinear"]  # of convolutions in both


def test_too_coarse_a_rounding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(*given: Any) -> dict[str, torch.Tensor]:
        return {k: v // 16 * 16 if v.dtype == torch.int8 else v for k, v in quantised(*given).items()}

    monkeypatch.setattr(export, "translate", translated)
    monkeypatch.setattr(export, "quantised", coarse)
    with pytest.raises(ModelError, match=r"differs from torch by|image: only"):
        export.export(Source(model_dir()), tmp_path / "bundle", "int8")
    assert list(tmp_path.iterdir()) == []


def test_an_int8_bundle_draws_without_weights_and_says_so_where_they_are_needed() -> None:
    path = bundle("int8")
    assert not list(path.rglob("*model.safetensors"))
    with pytest.raises(ModelError, match="holds no weights; its graphs' weights are int8; give") as caught:
        open_backend(Source(path), "torch", "cpu")
    assert len(str(caught.value).splitlines()) == 1


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_wrong_graph_is_named() -> None:
    other = folder.load(Source(bundle("fp32")))
    other.vae.decoder.conv_out.bias.data[0] += 0.01
    with pytest.raises(ModelError, match=r"^vae_decoder: differs from torch by \d.*e-\d\d .* --atol 1.0e-04$"):
        export.verify_graphs(bundle("fp32"), other, 1e-4, {})


def test_not_a_number_is_no_agreement() -> None:
    other = folder.load(Source(bundle("fp32")))
    other.denoiser.conv_out.bias.data[0] = float("nan")
    with pytest.raises(ModelError, match="^unet: differs from torch by nan"):
        export.verify_graphs(bundle("fp32"), other, 1e-4, {})


def test_failed_verification_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(name: str, model: folder.Model, path: Path, *_: object) -> dict[str, bytes]:
        shutil.copytree(bundle("fp32") / name, path / name, dirs_exist_ok=True)
        return {}

    monkeypatch.setattr(export, "write_graph", copy)
    with pytest.raises(ModelError, match=r"text_encoder: differs .* --atol 0.0e\+00"):
        export.export(Source(model_dir()), tmp_path / "out", atol=0.0)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        export.export(Source(model_dir()), tmp_path / "out")


def test_weights_too_large_for_fp16(tmp_path: Path) -> None:
    model = folder.load(Source(model_dir()))
    model.denoiser.conv_in.weight.data[0, 0, 0, 0] = 1e5
    with pytest.raises(
        ModelError, match=r"unet conv_in.weight is too large for .*float16; export with --precision fp32"
    ):
        export.check_weights(model, export.Form("fp16"), tmp_path)
    for precision in ("bf16", "int8"):
        export.check_weights(model, export.Form(precision), tmp_path)


def test_unknown_opset(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--opset 999: choose one of 18 to 23"):
        export.export(Source(model_dir()), tmp_path / "out", opset=999)
    command = typer.main.get_command(cli.app).commands["export"]  # type: ignore[attr-defined]
    (flag,) = (each for each in command.params if each.name == "opset")
    assert list(export.OPSETS) == list(range(flag.type.min, flag.type.max + 1))
    assert f"{export.OPSET} by default" in flag.help


def test_what_torch_cannot_export_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.onnx.OnnxExporterError("long\nstory") from ValueError("no\nway")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ModelError, match="^unet: torch cannot export it to ONNX opset 20: no way$"):
        export.translate("unet", folder.load(Source(model_dir())), 20)


# ---- determinism and manners ---------------------------------------------------------------------------------------


def test_exporting_again_gives_the_same_bytes_silently(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, model = bundle("fp32"), folder.load(Source(model_dir()))
    (tmp_path / "vae_encoder").mkdir()
    capfd.readouterr()
    export.write_graph("vae_encoder", model, tmp_path, export.Form("fp32"), [])
    assert capfd.readouterr() == ("", "")
    for path in (tmp_path / "vae_encoder").iterdir():
        assert path.read_bytes() == (first / "vae_encoder" / path.name).read_bytes()


@pytest.mark.slow
def test_exporting_all_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("once", "again"):
        export.export(Source(model_dir()), tmp_path / name, "fp16", device="cuda")
    once, again = ((tmp_path / name / "manifest.json").read_bytes() for name in ("once", "again"))
    assert once == again


def test_nan_of_one_output_is_no_agreement() -> None:
    zeros, x = np.zeros(4, np.float32), np.array([0.0, 2.0], np.float32)
    model = folder.load(Source(bundle("fp32")))
    inputs = export.examples("text_encoder", model, export.CHECKED[0])
    with torch.inference_mode():
        vectors, pooled = (w.numpy() for w in model.networks["text_encoder"](**inputs))
    assert export.furthest(export.answers("text_encoder", model, inputs), (vectors, pooled)) == 0
    assert np.isnan(
        export.furthest(export.answers("text_encoder", model, inputs), (vectors, pooled * np.float32("nan")))
    )
    assert np.isnan(export.relative(x, x * np.float32("nan"))) and export.relative(zeros, zeros) == 0


def test_relative_difference() -> None:
    zeros, x = np.zeros(4, np.float32), np.array([0.0, 2.0], np.float32)
    assert export.relative(zeros, zeros) == 0.0
    assert export.relative(zeros, zeros + 1) == float("inf")
    assert export.relative(x, x + 0.5) == 0.5
    assert export.relative(x, np.zeros(3, np.float32)) == float("inf")
    assert np.isnan(export.relative(x, x * np.float32("nan")))


INPUTS = {
    "text_encoder": ["input_ids"],
    "unet": ["sample", "timestep", "encoder_hidden_states"],
    "vae_encoder": ["sample"],
    "vae_decoder": ["latent_sample"],
}
