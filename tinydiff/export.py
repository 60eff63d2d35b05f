"""A model folder becomes an ONNX bundle: four graphs that onnxruntime runs, checked against torch before they are kept.

The bundle has optimum's layout and tensor names (text_encoder, unet, vae_encoder, vae_decoder) and is still a model folder:
the graphs hold no weights. Each weight is ONNX external data whose location is the safetensors file in the same folder, so
it is stored once and both worlds read it. Only the autoencoder's are stored again, halved, beside its two graphs, since
external data may not lie in another folder. This module knows the networks as functions of named tensors and nothing of
sampling; what the graphs are made of is the business of torch's exporter and of `graphs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tinydiff.backends.onnx import OnnxBackend
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.backends.sessions import open_session
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.folder import PRECISIONS, Model, save_tensors, write_description, write_json
from tinydiff.checkpoints.source import Source
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import committed, shown, undisturbed
from tinydiff.graphs import link, name_axes, quiet, simplify, strip, translations
from tinydiff.networks import LABELS, graphs, network_of
from tinydiff.pipeline import Request, generate
from tinydiff.system import RESTORE

if TYPE_CHECKING:
    from onnx_ir import Model as IrModel

OPSET = 20  # the first with Gelu; later ones have normalisation as a function, which onnxruntime is slow to open
OPSETS = range(18, 24)  # those that torch's exporter writes or converts to


@dataclass(frozen=True)
class Size:
    """Batch, height and width in the smallest steps the graph takes, and how many tokens fewer than the most."""

    batch: int
    height: int
    width: int
    fewer: int


MOST = 128  # pixels a side of the image that is compared: a large model takes minutes for a larger one
SAME = 0.999  # of an image's pixels agree with torch to one grey level
TRACED = Size(2, 2, 3, 0)
CHECKED = (Size(3, 4, 2, 1), Size(1, 1, 5, 0))


def export(
    source: Source,
    out: Path,
    precision: str = "fp32",
    opset: int = OPSET,
    atol: float = 1e-4,
    force: bool = False,
    say: Callable[[str], Any] = lambda text: None,
) -> list[dict[str, Any]]:
    """Write the bundle `out` and return one row a graph, with its largest difference from torch (`verify_graphs`), and
    one for a whole image (`verify_image`).

    `precision` fp16 stores the weights as float16 and casts each to float32 inside the graph, once, when onnxruntime opens
    it: half the size, and arithmetic in float32 on every device. `say` hears what is being done.
    Raises ModelError, leaving nothing behind, where a graph differs by more than `atol`, and UsageError where `out` exists
    or `opset` is none of OPSETS.
    """
    if opset not in OPSETS:
        raise UsageError(f"--opset {opset}: choose one of {OPSETS[0]} to {OPSETS[-1]}")
    dtype = PRECISIONS[precision]
    with committed(out, replace=force) as bundle, undisturbed(source.stamps):
        exact = folder.load(source)
        model = rounded(exact, dtype, source.path)
        write_description(bundle, model.configs, model.tokenizers, source.path)
        for name, part in model.networks.items():
            (bundle / name).mkdir()
            write_json(bundle / name / "config.json", model.configs[name])
            save_tensors(part.state_dict(), bundle / name / network_of(name, model.configs[name]).file, dtype)
        for name in graphs(model.configs):
            say(f"export {name}")
            write_graph(name, model, bundle, dtype, opset)
        say("compare with torch")
        return [*verify_graphs(bundle, model, atol, exact), verify_image(bundle)]


def rounded(model: Model, dtype: torch.dtype, path: Path) -> Model:
    """The model with every weight rounded to `dtype`, again in float32. ModelError where one is not finite or does not fit."""
    full = dtype == torch.float32
    model = model if full else replace(model, networks=deepcopy(model.networks))
    for name, part in model.networks.items():
        for key, value in part.state_dict().items():
            what = f"{shown(path)}: {name} {shown(key)}"
            if not value.isfinite().all():
                raise ModelError(f"{what} has NaN or infinite values; {RESTORE}")
            if value.is_floating_point() and not full and not value.copy_(value.to(dtype)).isfinite().all():
                raise ModelError(f"{what} is too large for {dtype}; export with --precision fp32")
    return model


def part_of(name: str, model: Model) -> str:
    """The folder of the network that a graph is of; the autoencoder has two graphs."""
    return name if name in model.networks else name.rpartition("_")[0]


def write_graph(name: str, model: Model, bundle: Path, dtype: torch.dtype, opset: int) -> None:
    """`name`/model.onnx, its weights in the safetensors file beside it, which is written where it is not there yet."""
    import onnx_ir as ir

    part, place = part_of(name, model), bundle / name
    onnx_model, state = translate(name, model, opset), model.networks[part].state_dict()
    weights = {k: v for k, v in onnx_model.graph.initializers.items() if k in state}
    place.mkdir(exist_ok=True)
    write_json(place / "config.json", model.configs[part])
    path = place / network_of(part, model.configs[part]).file
    if not path.exists():
        save_tensors({k: state[k] for k in weights}, path, dtype)
    link(onnx_model.graph, weights, path)
    strip(onnx_model)
    (place / "model.onnx").write_bytes(ir.to_proto(onnx_model).SerializeToString(deterministic=True))


class Call(nn.Module):
    """A method of a network as a module, which is what torch exports; `names` are its arguments in order."""

    def __init__(self, network: nn.Module, method: str, names: Iterable[str]):
        super().__init__()
        self.network, self.method, self.names = network, method, tuple(names)

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(self.network, self.method)(**dict(zip(self.names, inputs, strict=True)))


def translate(name: str, model: Model, opset: int) -> IrModel:
    """The graph of one network, initializers named like its parameters and laid out like them. ModelError."""
    graph, network = graphs(model.configs)[name], model.networks[part_of(name, model)]
    varying = (enumerate(array.axes) for array in graph.inputs.values())
    dynamic = tuple({i: torch.export.Dim.DYNAMIC for i, axis in axes if isinstance(axis, str)} for axes in varying)
    try:
        with quiet(), torch.no_grad():
            call, inputs = Call(network, graph.method, graph.inputs), tuple(examples(name, model, TRACED).values())
            options: dict[str, Any] = {"dynamic_shapes": (dynamic,), "custom_translation_table": translations()}
            options |= {"input_names": list(graph.inputs), "output_names": list(graph.outputs), "opset_version": opset}
            program = torch.onnx.export(call, inputs, dynamo=True, optimize=False, verbose=False, **options)
            assert program is not None
            for key, value in list(program.model.graph.initializers.items()):
                value.name = key.removeprefix("network.")
            simplify(program.model, set(network.state_dict()))
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ModelError(f"{name}: torch cannot export it to ONNX opset {opset}: {reason}") from error
    values, arrays = (*program.model.graph.inputs, *program.model.graph.outputs), graph.inputs | graph.outputs
    for value, array in zip(values, arrays.values(), strict=True):
        name_axes(value, tuple(axis if isinstance(axis, str) else "" for axis in array.axes))
    return program.model


def examples(name: str, model: Model, size: Size) -> dict[str, Tensor]:
    """Seeded inputs of one graph by name."""
    graph, generator = graphs(model.configs)[name], torch.Generator().manual_seed(0)
    tokenizer = model.tokenizers.get(name, next(iter(model.tokenizers.values())))
    sides = {"height": size.height * graph.step, "width": size.width * graph.step}
    sizes = {"batch": size.batch, "sequence": max(1, tokenizer.max_length - size.fewer)} | sides

    def tokens(shape: tuple[int, ...]) -> Tensor:
        ids = torch.randint(tokenizer.vocab_size, shape, generator=generator)
        ids[:, -1] = tokenizer.eos
        return ids

    kinds: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
        "normal": lambda shape: torch.randn(shape, generator=generator),
        "pixels": lambda shape: torch.rand(shape, generator=generator) * 2 - 1,
        "tokens": tokens,
        "time": lambda shape: torch.full(shape, 601.0),
    }
    return {key: kinds[array.values](array.shape(sizes)) for key, array in graph.inputs.items()}


def verify_graphs(bundle: Path, model: Model, atol: float, exact: Model | None = None) -> list[dict[str, Any]]:
    """Run each graph and torch on the same inputs, at batches and sizes other than the traced ones.

    A row a graph: `graph`, `max_abs_diff` (the largest difference from `model`, in standard deviations of the output),
    `fp32_diff` (the same from the unrounded model `exact`) and `megabytes` of its folder.
    Raises ModelError naming a graph whose `max_abs_diff` exceeds `atol`.
    """
    rows = []
    for name, graph in graphs(model.configs).items():
        session = open_session(bundle, name, graph, "cpu")
        given = [examples(name, model, size) for size in CHECKED]
        runs = [(inputs, session.run(None, {k: v.numpy() for k, v in inputs.items()})) for inputs in given]
        worst = max(difference(name, model, *run) for run in runs)
        if not worst <= atol:
            raise ModelError(f"{name}: differs from torch by {worst:.1e} of its deviation, more than --atol {atol:.1e}")
        far = max(difference(name, exact, *run) for run in runs) if exact not in (None, model) else worst
        size = sum(p.stat().st_size for p in (bundle / name).iterdir()) / 1e6
        rows.append({"graph": name, "max_abs_diff": worst, "fp32_diff": far, "megabytes": size})
    return rows


def verify_image(bundle: Path) -> dict[str, Any]:
    """Draw one image through the whole pipeline on both runtimes, from the same noise with the model's own settings.

    The row's `same` is the share of pixels that are at most one grey level apart. Raises ModelError below 99.9 %.
    """
    source = Source(bundle)
    backends = OnnxBackend(source, "cpu"), TorchBackend.open(source, "cpu")
    g = (d := source.description).generate
    side = min(d.size, max(1, MOST // d.multiple) * d.multiple)
    request = Request(min(g.steps, 20, d.scheduler.most), g.cfg_scale, g.sampler, g.spacing, side, side)
    prompt = "0" if LABELS in source.tokenizers else "red heart"
    ours, theirs = (generate(backend, [prompt], [0], request).astype(int) for backend in backends)
    same = float((np.abs(ours - theirs).max(axis=-1) <= 1).mean())
    if same < SAME:
        raise ModelError(f"image: only {same:.2%} of pixels agree with torch after {request.steps} steps; try fp32")
    return {"graph": "image", "same": same, "steps": request.steps}


def difference(name: str, model: Model, inputs: Mapping[str, Tensor], got: Any) -> float:
    """Largest difference of any output from torch's, in standard deviations of torch's."""
    network = model.networks[part_of(name, model)]
    with torch.inference_mode():
        outputs = getattr(network, graphs(model.configs)[name].method)(**inputs)
    wanted = [w.numpy() for w in (outputs if isinstance(outputs, tuple) else (outputs,))]
    return max(relative(w, g) for w, g in zip(wanted, got, strict=True))


def relative(wanted: np.ndarray, got: np.ndarray) -> float:
    if wanted.shape != got.shape:
        return float("inf")
    largest, deviation = float(np.abs(wanted - got).max()), float(wanted.std())
    return largest / deviation if deviation else (float("inf") if largest else 0.0)
