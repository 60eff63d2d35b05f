"""A model folder becomes an ONNX bundle: four graphs that onnxruntime runs, checked against torch before they are kept.

The bundle has optimum's layout and tensor names (text_encoder, unet, vae_encoder, vae_decoder) and is still a model folder:
the graphs hold no weights. Each weight is ONNX external data whose location is the safetensors file in the same folder, so
it is stored once and both worlds read it. Only the autoencoder's are stored again, halved, beside its two graphs, since
external data may not lie in another folder. This module knows the networks as functions of named tensors and nothing of
sampling; what the graphs are made of is the business of torch's exporter and of `graphs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinydiff.backends.onnx import ENCODER, OnnxBackend
from tinydiff.backends.optimised import LARGEST
from tinydiff.backends.optimised import size as folder_size
from tinydiff.backends.pytorch import TorchBackend, to_numpy
from tinydiff.backends.sessions import called, open_session, stepwise
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.folder import Model, save_tensors, write_description, write_json
from tinydiff.checkpoints.source import Source
from tinydiff.checkpoints.weights import INT8
from tinydiff.condition import Condition
from tinydiff.control import Control
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import committed, shown, undisturbed
from tinydiff.fusion import fuse
from tinydiff.graphs import link, name_axes, quiet, simplify, strip, translations
from tinydiff.images import to_pixels
from tinydiff.networks import LABELS, controls_of, denoiser_in, graphs, network_of
from tinydiff.networks.network import Graph
from tinydiff.networks.unet import CONTROLLED
from tinydiff.pipeline import Backend, Request, generate, given_with
from tinydiff.precision import PRECISIONS, Arithmetic, Calls, Precision, lower, magnitudes
from tinydiff.progress import note
from tinydiff.quantisation import quantised
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
TRACED = Size(2, 2, 3, 0)
CHECKED = (Size(3, 4, 2, 1), Size(1, 1, 5, 0))


def export(
    source: Source,
    out: Path,
    precision: str = "fp32",
    opset: int = OPSET,
    atol: float | None = None,
    force: bool = False,
    say: Callable[[str], Any] = lambda text: None,
    device: str = "any",
) -> list[dict[str, Any]]:
    """Write the bundle `out` and return one row a graph (`verify_graphs`) and one for a whole image (`verify_image`).

    `precision` is one of `precision.PRECISIONS`. `device` "any" writes operators that every provider runs, "cuda" onnxruntime's
    own where these are faster and run nowhere else, and "cpu" arithmetic in float32 whatever the weights are stored as, since
    a CPU computes no faster in half. `atol` replaces the precision's bound on each graph; `say` hears what is being done.
    Raises ModelError, leaving nothing behind, where the bundle is further from torch in float32 than its precision allows, and
    UsageError where `out` exists or `opset` is none of OPSETS.
    """
    if opset not in OPSETS:
        raise UsageError(f"--opset {opset}: choose one of {OPSETS[0]} to {OPSETS[-1]}")
    form = Form(precision, opset, device)
    with committed(out, replace=force) as bundle, undisturbed(source.stamps):
        rows, image, plain = written(source, bundle, form, form.precision.graph if atol is None else atol, say)
        say("compare an image with torch's")  # whose networks are out of memory by now
        return [*rows, verify_image(bundle, image, form.precision, plain)]


def written(
    source: Source, bundle: Path, form: Form, atol: float, say: Callable[[str], Any]
) -> tuple[list[dict[str, Any]], Drawn, dict[str, bytes]]:
    """All of a bundle, its graphs verified: their rows, an image that torch draws, and what `write_graph` returns."""
    model = controllable(folder.load(source))
    check_weights(model, form, source.path)
    if model.configs[source.denoiser].get("exits"):
        note("the denoiser's graph computes all of its blocks: only torch leaves it by its exits (--exit)")
    say("draw with torch")
    image, calls = recorded(model)
    plain = write(model, source.path, bundle, form, calls, say)
    say("compare with torch")
    return verify_graphs(bundle, model, atol, plain, form), image, plain


def write(
    model: Model,
    path: Path,
    bundle: Path,
    form: Form,
    calls: Mapping[str, Calls],
    say: Callable[[str], Any] = lambda text: None,
) -> dict[str, bytes]:
    """All files of a bundle, from a model that was read from `path` and calls of its graphs that show which values are large.

    Nothing is compared. Returns what `write_graph` returns, of all graphs.
    """
    write_description(bundle, model.configs, model.tokenizers, path)
    for name, part in model.networks.items():
        (bundle / name).mkdir()
        write_json(bundle / name / "config.json", model.configs[name])
        if form.name != "int8":
            save_tensors(part.state_dict(), bundle / name / network_of(name, model.configs[name]).file, form.stored)
    plain = dict[str, bytes]()
    for name in graphs(model.configs):
        say(f"export {name}")
        plain |= write_graph(name, model, bundle, form, calls[name])
    return plain


def controllable(model: Model) -> Model:
    """The same model, whose denoiser's graph takes residuals where control networks go with it."""
    name, takes = denoiser_in(model.configs), {CONTROLLED: True} if controls_of(model.configs) else {}
    table = {key: value for key, value in model.configs[name].items() if key != CONTROLLED}
    return replace(model, configs=model.configs | {name: table | takes})


class Drawn(NamedTuple):
    """An image (1, H, W, 3) that torch drew in float32, the request for it, and the images that control it."""

    pixels: np.ndarray
    request: Request
    controls: list[Control]


@dataclass(frozen=True)
class Form:
    """What a bundle is to be."""

    name: str
    opset: int = OPSET
    device: str = "any"

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.name]

    @property
    def stored(self) -> torch.dtype:
        return getattr(torch, self.precision.stored)

    @property
    def arithmetic(self) -> Arithmetic | None:
        """What it computes in besides float32."""
        return None if self.device == "cpu" else self.precision.arithmetic


def check_weights(model: Model, form: Form, path: Path) -> None:
    """ModelError where a weight is not finite or too large for the type that it is to be stored as."""
    stored = form.stored
    most = torch.finfo(stored).max if stored.is_floating_point else float("inf")
    for name, part in model.networks.items():
        for key, value in part.state_dict().items():
            what = f"{shown(path)}: {name} {shown(key)}"
            if not value.isfinite().all():
                raise ModelError(f"{what} has NaN or infinite values; {RESTORE}")
            if value.is_floating_point() and value.numel() and value.abs().max() > most:
                raise ModelError(f"{what} is too large for {stored}; export with --precision fp32")


class Recording(TorchBackend):
    """torch's networks, which keep what they are given: inputs by name of every call, by graph."""

    def __init__(self, model: Model):
        super().__init__(model)
        self.calls: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in graphs(model.configs)}
        self.denoiser = denoiser_in(model.configs)

    def read(self, name: str, ids: np.ndarray) -> dict[str, Tensor]:
        if name in self.calls:
            self.calls[name].append({"input_ids": ids})
        return super().read(name, ids)

    def denoise(self, x: np.ndarray, t: float, condition: Condition) -> np.ndarray:
        self.calls[self.denoiser].append({"sample": x, "timestep": np.array(t, np.float32), **condition})
        return super().denoise(x, t, condition)

    def control(self, network: str, x: np.ndarray, t: float, condition: Condition) -> Condition:
        self.calls[network].append({"sample": x, "timestep": np.array(t, np.float32), **condition})
        return {name: to_numpy(array) for name, array in super().control(network, x, t, condition).items()}

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        self.calls[ENCODER].append({"sample": pixels})
        return super().encode_image(pixels)

    def decode(self, z: np.ndarray) -> np.ndarray:
        self.calls["vae_decoder"].append({"latent_sample": z})
        return super().decode(z)


def recorded(model: Model) -> tuple[Drawn, dict[str, list[dict[str, np.ndarray]]]]:
    """An image that torch draws with the model's own settings, and each graph's calls."""
    backend = Recording(model)
    g = (d := backend.description).generate
    side = min(d.size, max(1, MOST // d.multiple) * d.multiple)
    request = Request(min(g.steps, 20, d.scheduler.most), g.cfg_scale, g.sampler, g.spacing, side, side)
    controls = [Control(name, stripes(side)) for name in controls_of(model.configs)]
    drawn = generate(backend, [prompt_of(backend)], [0], request, controls=controls, given=told_of(backend, side))
    backend.encode_image(to_pixels(drawn))
    return Drawn(drawn, request, controls), backend.calls


def stripes(side: int) -> np.ndarray:
    """A control image with edges of both directions: uint8 (side, side, 3)."""
    rows, columns = np.indices((side, side)) * 8 // side % 2
    return np.repeat((255 * (rows ^ columns)).astype(np.uint8)[..., None], 3, -1)


def prompt_of(backend: Backend) -> str:
    return "0" if LABELS in backend.tokenizers else "red heart"


def told_of(backend: Backend, side: int) -> Condition:
    """The first class, and another image, for a denoiser that is told them."""
    labels = backend.description.labels
    return given_with(backend, labels and (labels.names[0] if labels.names else "0"), stripes(side))


def part_of(name: str, model: Model) -> str:
    """The folder of the network that a graph is of; the autoencoder has two graphs."""
    return name if name in model.networks else name.rpartition("_")[0]


def write_graph(name: str, model: Model, bundle: Path, form: Form, calls: Calls) -> dict[str, bytes]:
    """`name`/model.onnx, its weights in the safetensors file beside it, which is written where it is not there yet.

    Returns the graph under its name as the CPU can run it, operator by operator in the type it has, where the file's own does
    not show that there.
    """
    import onnx_ir as ir

    part, place = part_of(name, model), bundle / name
    onnx_model, state = translate(name, model, form.opset), model.networks[part].state_dict()
    weights = {k: v for k, v in onnx_model.graph.initializers.items() if k in state}
    place.mkdir(exist_ok=True)
    write_json(place / "config.json", model.configs[part])
    path = place / (INT8 if form.name == "int8" else network_of(part, model.configs[part]).file)
    if form.name == "int8":
        save_tensors(quantised(weights, state), path, None)
    elif not path.exists():
        save_tensors({k: state[k] for k in weights}, path, form.stored)
    link(onnx_model.graph, weights, path, whole=form.device == "cpu")
    largest = magnitudes(onnx_model, place, calls) if form.arithmetic and form.arithmetic.most < float("inf") else {}
    proto, plain = ir.to_proto(onnx_model), dict[str, bytes]()
    if form.arithmetic or form.device == "cuda":
        rounded = ir.from_proto(proto)
        lower(rounded, form.arithmetic, largest, rounded=True)
        plain[name] = ir.to_proto(rounded).SerializeToString()
    if form.device == "cuda":
        fuse(onnx_model, largest)
    islands = lower(onnx_model, form.arithmetic, largest)
    strip(onnx_model)
    told = {"precision": form.name, "device": form.device, "islands": " ".join(islands)}
    onnx_model.metadata_props.update({f"tinydiff.{key}": value for key, value in told.items() if value})
    (place / "model.onnx").write_bytes(ir.to_proto(onnx_model).SerializeToString(deterministic=True))
    return plain


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
        "unit": lambda shape: torch.rand(shape, generator=generator),
        "tokens": tokens,
        "time": lambda shape: torch.full(shape, 601.0),
    }
    return {key: kinds[array.values](array.shape(sizes)) for key, array in graph.inputs.items()}


def verify_graphs(
    bundle: Path, model: Model, atol: float, plain: Mapping[str, bytes], form: Form = Form("fp32")
) -> list[dict[str, Any]]:
    """Run each graph and torch on the same inputs, at batches and sizes other than the traced ones; `plain`: as of `write_graph`.

    A row a graph: `graph`, `max_abs_diff` (the largest difference from torch in float32, in standard deviations of the output)
    and `megabytes` of its folder. A file that is not run, or not in half, is checked for its types.
    Raises ModelError naming a graph whose `max_abs_diff` exceeds `atol`.
    """
    import onnx

    rows = []
    for name, graph in graphs(model.configs).items():
        forms = [plain]
        if name in plain:
            onnx.checker.check_model(bundle / name / "model.onnx", full_check=True)
            forms += [{}] if form.name != "bf16" and form.device == "any" else []
        asked = [examples(name, model, size) for size in CHECKED]
        worst, wanted = 0.0, [answers(name, model, inputs) for inputs in asked]
        for each in forms:
            session = checked_session(bundle, name, graph, each)
            for inputs, right in zip(asked, wanted, strict=True):
                got = called(session, None, {k: v.numpy() for k, v in inputs.items()})
                worst = float(np.maximum(worst, furthest(right, got)))  # keeps NaN, as max does not
            del session  # and its memory
        if not worst <= atol:
            raise ModelError(f"{name}: differs from torch by {worst:.1e} of its deviation, more than --atol {atol:.1e}")
        rows.append({"graph": name, "max_abs_diff": worst, "megabytes": folder_size(bundle / name) / 1e6})
    return rows


def checked_session(bundle: Path, name: str, graph: Graph, plain: Mapping[str, bytes]) -> Any:
    """The session to compare with torch: of the graph in `plain`, else of the file's own, a large one without its weights copied
    for speed."""
    if name in plain or folder_size(bundle / name) > LARGEST:
        return stepwise(plain.get(name) or (bundle / name / "model.onnx").read_bytes(), bundle / name)
    return open_session(bundle, name, graph, "cpu")


class Checked(OnnxBackend):
    """A bundle on the CPU, its graphs `plain` where the files' own do not show there what they give."""

    def __init__(self, source: Source, plain: Mapping[str, bytes]):
        self.plain = plain
        super().__init__(source, "cpu")

    def open(self, name: str) -> Any:
        return checked_session(self.path, name, self.graphs[name], self.plain)


def verify_image(bundle: Path, image: Drawn, precision: Precision, plain: Mapping[str, bytes]) -> dict[str, Any]:
    """Draw an image with the graphs that torch has drawn.

    The row: `same` is the share of pixels that are at most `precision.levels` grey levels apart, `psnr` in dB, `steps`. Raises
    ModelError where either is under the precision's bound.
    """
    backend = Checked(Source(bundle, controls=tuple(bundle / each.network for each in image.controls)), plain)
    request = image.request
    told = told_of(backend, request.width)
    drawn = generate(backend, [prompt_of(backend)], [0], request, controls=image.controls, given=told)
    apart = np.abs(drawn.astype(int) - image.pixels)
    same = float((apart.max(axis=-1) <= precision.levels).mean())
    psnr = min(99.0, float(10 * np.log10(255**2 / max((apart**2).mean(), 1e-9))))
    row = {"graph": "image", "same": same, "psnr": psnr, "steps": request.steps}
    if same < precision.same or psnr < precision.psnr:
        bounds = f"at least {precision.same:.1%} within {precision.levels} grey levels and {precision.psnr} dB"
        problem = f"{same:.2%} of pixels agree with torch after {request.steps} steps, at {psnr:.1f} dB, and {bounds}"
        raise ModelError(f"image: only {problem} are wanted; export with --precision fp32")
    return row


def answers(name: str, model: Model, inputs: Mapping[str, Tensor]) -> list[np.ndarray]:
    """What torch's network gives."""
    network = model.networks[part_of(name, model)]
    with torch.inference_mode():
        outputs = getattr(network, graphs(model.configs)[name].method)(**inputs)
    return [w.numpy() for w in (outputs if isinstance(outputs, tuple) else (outputs,))]


def furthest(wanted: Iterable[np.ndarray], got: Iterable[np.ndarray]) -> float:
    """Largest difference of any output from the wanted one, in standard deviations of that."""
    return float(np.max([relative(w, g) for w, g in zip(wanted, got, strict=True)]))


def relative(wanted: np.ndarray, got: np.ndarray) -> float:
    if wanted.shape != got.shape:
        return float("inf")
    largest, deviation = float(np.abs(wanted - got).max()), float(wanted.std())
    return largest / deviation if deviation else (float("inf") if largest else 0.0)
