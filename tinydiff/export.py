"""A model folder becomes an ONNX bundle: four graphs that onnxruntime runs, checked against torch before they are kept.

The bundle has optimum's layout and tensor names (text_encoder, unet, vae_encoder, vae_decoder) and is still a model folder:
the graphs hold no weights. Each weight is ONNX external data whose location is the safetensors file in the same folder, so
it is stored once and both worlds read it. Only the autoencoder's are stored again, halved, beside its two graphs, since
external data may not lie in another folder. This module knows the networks as functions of named tensors and nothing of
sampling; what the graphs are made of is the business of torch's exporter and of `graphs`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tinydiff.backends.onnx import IO, OnnxBackend, open_session
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.description import configs
from tinydiff.checkpoints.folder import FILES, PRECISIONS, WEIGHTS, Model, copy_description, save_tensors, write_json
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import committed
from tinydiff.graphs import link, name_axes, quiet, simplify, strip, translations
from tinydiff.models.text_encoder import OneHot
from tinydiff.models.unet import UNet
from tinydiff.pipeline import Request, generate
from tinydiff.text.labels import Labels

if TYPE_CHECKING:
    from onnx_ir import Model as IrModel

OPSET = (
    20  # the first with Gelu; from 21 on normalisation and attention are functions, which onnxruntime is slow to open
)
OPSETS = range(18, 24)  # those that torch's exporter writes or converts to


@dataclass(frozen=True)
class Network:
    """One graph: which call of which part of the model it is, and the names of its dynamic axes ('' where fixed)."""

    part: str
    method: str
    inputs: tuple[tuple[str, ...], ...]
    outputs: tuple[tuple[str, ...], ...]


PIXELS = ("batch", "", "height", "width")
TOKENS = ("batch", "sequence")
TEXT = {"text_encoder": Network("text_encoder", "forward", (TOKENS,), ((*TOKENS, ""), ("batch", "")))}
AUTOENCODER = {
    "vae_encoder": Network("vae", "encode", (PIXELS,), (("batch", "", "latent_height", "latent_width"),)),
    "vae_decoder": Network("vae", "decode", (PIXELS,), (("batch", "", "image_height", "image_width"),)),
}


def networks(model: Model) -> dict[str, Network]:
    """The graphs of a model by name, in the order they are written; a class-conditional one has none for text."""
    context = ("batch", "", "") if isinstance(model.text_encoder, OneHot) else (*TOKENS, "")
    denoiser = {model.name: Network(model.name, "forward", (PIXELS, (), context), (PIXELS,))}
    return ({} if isinstance(model.text_encoder, OneHot) else TEXT) | denoiser | AUTOENCODER


@dataclass(frozen=True)
class Size:
    """Batch, height and width in the smallest steps the networks take, and how many tokens fewer than the most."""

    batch: int
    height: int
    width: int
    fewer: int


MOST = 128  # pixels a side of the image that is compared: a large model takes minutes for a larger one
SAME = 0.999  # of an image's pixels agree with torch to one grey level
TRACED = Size(2, 2, 3, 0)
CHECKED = (Size(3, 4, 2, 1), Size(1, 1, 5, 0))


def export(
    model_dir: Path,
    out: Path,
    precision: str = "fp32",
    opset: int = OPSET,
    atol: float = 1e-4,
    replace: bool = False,
    say: Callable[[str], Any] = lambda text: None,
    vae: Path | None = None,
    prediction: str | None = None,
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
    exact = folder.load(model_dir, vae, prediction)
    model = rounded(exact, PRECISIONS[precision], model_dir)
    with committed(out, replace=replace) as bundle:
        write_description(model_dir, configs(model_dir, vae, prediction), model, bundle)
        for name, part in model.parts().items():
            save_tensors(part.state_dict(), bundle / name / FILES[name], PRECISIONS[precision])
        for name in networks(model):
            say(f"export {name}")
            write_graph(name, model, bundle, PRECISIONS[precision], opset)
        say("compare with torch")
        return [*verify_graphs(bundle, model, atol, exact), verify_image(bundle)]


def rounded(model: Model, dtype: torch.dtype, path: Path) -> Model:
    """The model with every weight rounded to `dtype`, again in float32. ModelError where one does not fit."""
    if dtype == torch.float32:
        return model
    model = deepcopy(model)
    for name, part in model.parts().items():
        for key, value in part.state_dict().items():
            if value.is_floating_point():
                value.copy_(value.to(dtype))
            if not value.isfinite().all():
                raise ModelError(f"{path}: {name} {key} is too large for {dtype}; export with --precision fp32")
    return model


def write_description(model_dir: Path, found: dict[str, dict[str, Any]], model: Model, bundle: Path) -> None:
    """Every file of the model that is no weight, each network's configuration beside its graph."""
    copy_description(model_dir, found, model.tokenizer, bundle)
    parts = {name: network.part for name, network in networks(model).items()} | {"vae": "vae"}
    for name, part in parts.items():
        (bundle / name).mkdir()
        write_json(bundle / name / "config.json", found[part])


def write_graph(name: str, model: Model, bundle: Path, dtype: torch.dtype, opset: int) -> None:
    """`name`/model.onnx, its weights in the safetensors file beside it, which is written where it is not there yet."""
    import onnx_ir as ir

    network, place = networks(model)[name], bundle / name
    onnx_model = translate(name, model, opset)
    state = model.parts()[network.part].state_dict()
    weights = {k: v for k, v in onnx_model.graph.initializers.items() if k in state}
    path = place / FILES.get(name, WEIGHTS)
    if not path.exists():
        save_tensors({k: state[k] for k in weights}, path, dtype)
    link(onnx_model.graph, weights, path)
    strip(onnx_model)
    (place / "model.onnx").write_bytes(ir.to_proto(onnx_model).SerializeToString(deterministic=True))


# ---- from torch to a graph ---------------------------------------------------------------------------------------------


class Call(nn.Module):
    """A method of a network as a module, which is what torch exports."""

    def __init__(self, network: nn.Module, method: str):
        super().__init__()
        self.network, self.method = network, method

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(self.network, self.method)(*inputs)


def translate(name: str, model: Model, opset: int) -> IrModel:
    """The graph of one network, initializers named like its parameters and laid out like them. ModelError."""
    network, (inputs, outputs) = networks(model)[name], IO[name]
    dynamic = tuple({i: torch.export.Dim.DYNAMIC for i, axis in enumerate(axes) if axis} for axes in network.inputs)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                Call(model.parts()[network.part], network.method),
                examples(name, model, TRACED),
                dynamo=True,
                dynamic_shapes=(dynamic,),
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=opset,
                optimize=False,
                verbose=False,
                custom_translation_table=translations(),
            )
            assert program is not None
            for key, value in list(program.model.graph.initializers.items()):
                value.name = key.removeprefix("network.")
            simplify(program.model, set(model.parts()[network.part].state_dict()))
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ModelError(f"{name}: torch cannot export it to ONNX opset {opset}: {reason}") from error
    for values, names in ((program.model.graph.inputs, network.inputs), (program.model.graph.outputs, network.outputs)):
        for value, axes in zip(values, names, strict=True):
            name_axes(value, axes)
    return program.model


def examples(name: str, model: Model, size: Size) -> tuple[Tensor, ...]:
    """Seeded inputs of one network."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = model.tokenizer
    tokens = max(1, tokenizer.max_length - size.fewer)
    ids = torch.randint(tokenizer.vocab_size, (size.batch, tokens), generator=generator)
    ids[:, -1] = tokenizer.eos
    if name == "text_encoder":
        return (ids,)
    step = 2 ** (len(model.denoiser.down_blocks) - 1) if isinstance(model.denoiser, UNet) else model.denoiser.patch
    channels, side = model.vae.post_quant_conv.in_channels, (size.height * step, size.width * step)
    if name == "vae_encoder":
        factor = 2 ** (len(model.vae.encoder.down_blocks) - 1)
        return (torch.rand(size.batch, 3, side[0] * factor, side[1] * factor, generator=generator) * 2 - 1,)
    latents = torch.randn(size.batch, channels, *side, generator=generator)
    if name == "vae_decoder":
        return (latents,)
    with torch.no_grad():
        context = model.text_encoder(ids)[0]
    read = model.denoiser.conv_in.in_channels if isinstance(model.denoiser, UNet) else channels
    more = torch.randn(size.batch, read - channels, *side, generator=generator)
    return torch.cat([latents, more], dim=1), torch.tensor(601.0), context


# ---- comparison with torch ---------------------------------------------------------------------------------------------


def verify_graphs(bundle: Path, model: Model, atol: float, exact: Model | None = None) -> list[dict[str, Any]]:
    """Run each graph and torch on the same inputs, at batches and sizes other than the traced ones.

    A row a graph: `graph`, `max_abs_diff` (the largest difference from `model`, in standard deviations of the output),
    `fp32_diff` (the same from the unrounded model `exact`) and `megabytes` of its folder.
    Raises ModelError naming a graph whose `max_abs_diff` exceeds `atol`.
    """
    rows = []
    for name in networks(model):
        session = open_session(bundle, name, "cpu")
        runs = [
            (inputs, session.run(None, feed(name, inputs))) for inputs in (examples(name, model, s) for s in CHECKED)
        ]
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
    backends = OnnxBackend(bundle, "cpu"), TorchBackend.open(bundle, "cpu")
    d = backends[0].description
    g = d.generate
    side = min(d.size, max(1, MOST // d.multiple) * d.multiple)
    request = Request(min(g.steps, 20, len(d.schedule)), g.cfg_scale, g.sampler, g.schedule, side, side)
    prompt = "0" if isinstance(backends[0].tokenizer, Labels) else "red heart"
    ours, theirs = (generate(backend, [prompt], [0], request).astype(int) for backend in backends)
    same = float((np.abs(ours - theirs).max(axis=-1) <= 1).mean())
    if same < SAME:
        raise ModelError(f"image: only {same:.2%} of pixels agree with torch after {request.steps} steps; try fp32")
    return {"graph": "image", "same": same, "steps": request.steps}


def feed(name: str, inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in zip(IO[name][0], inputs, strict=True)}


def difference(name: str, model: Model, inputs: tuple[Tensor, ...], got: Any) -> float:
    """Largest difference of any output from torch's, in standard deviations of torch's."""
    network = networks(model)[name]
    with torch.inference_mode():
        wanted = getattr(model.parts()[network.part], network.method)(*inputs)
    wanted = [w.numpy() for w in (wanted if isinstance(wanted, tuple) else (wanted,))]
    return max(relative(w, g) for w, g in zip(wanted, got, strict=True))


def relative(wanted: np.ndarray, got: np.ndarray) -> float:
    if wanted.shape != got.shape:
        return float("inf")
    largest, deviation = float(np.abs(wanted - got).max()), float(wanted.std())
    return largest / deviation if deviation else (float("inf") if largest else 0.0)
