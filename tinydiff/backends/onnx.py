"""The networks on onnxruntime, as a `pipeline.Backend`: numpy in, numpy out, and never torch.

Reads bundles in optimum's layout, tinydiff's own and others'. Weights outside a graph ("external data") must be plain
files in the graph's own folder; `graph` checks that and more before onnxruntime sees a graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tinydiff.backends import optimised
from tinydiff.backends.adapted import Adapted
from tinydiff.backends.binding import PLAIN, Buffers, as_graph
from tinydiff.backends.devices import choose_device, is_recorded, say_share
from tinydiff.backends.graph import RESTORE
from tinydiff.backends.sessions import DTYPES, failure, open_session, times
from tinydiff.checkpoints import control
from tinydiff.checkpoints.source import Source
from tinydiff.condition import Condition, joined, texts_of
from tinydiff.errors import ModelError
from tinydiff.files import shown, undisturbed
from tinydiff.networks import graphs
from tinydiff.networks.network import HIDDEN, Array, Graph
from tinydiff.networks.unet import MIDDLE, SKIP
from tinydiff.text.labels import one_hot
from tinydiff.verified import Memory, verify

ENCODER = "vae_encoder"
DRAWING = (
    "vae_decoder",
    "scheduler",
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
)  # folders that drawing reads


class OnnxBackend:
    """A bundle's sessions on one device: "cpu", "cuda", "auto", which is cuda where it works, or a plugin provider by name.

    Raises ModelError where the bundle is damaged or incomplete, ResourceError where `device` cannot be had; with `wait`
    false they may come from the first use of a network instead, and the graphs are opened meanwhile.
    """

    name = "onnx"

    def __init__(self, source: Source, device: str = "auto", wait: bool = True):
        self.path, self.stamps, self.device = source.path, source.stamps, choose_device(device)
        self.home = source.home
        self.buffers = dict[str, Buffers]()
        # One call leaves processors idle between its operators; those of a large model are long, and need the memory.
        small = self.device == "cpu" and optimised.size(self.path / source.denoiser) <= optimised.LARGEST
        self.at_once = 4 if small else 1
        self.pool = ThreadPoolExecutor(4)  # neither opening a graph nor hashing a file needs Python
        self.memory = Memory(source.anew)
        self.checks = self.pool.submit(self.verified, source)
        try:
            self.denoiser, self.graphs = source.denoiser, graphs_of(source)
            self.adapted = {
                name: Adapted(source, name)
                for name in self.graphs
                if (source.loras or source.learnt) and name not in source.controlled
            }
            if not control.in_graphs(source):
                fix = "export the model with --control, or use --backend torch"
                raise ModelError(f"{shown(self.path)}: its graphs take no such control; {fix}")
            takes = self.graphs[self.denoiser].inputs
            self.residuals = {k: takes[k] for k in takes if k.startswith((SKIP, MIDDLE))}
            drawing = (name for name in self.graphs if name != ENCODER)  # text to image needs no other
            self.sessions = {name: self.pool.submit(self.open, name) for name in drawing}
            self.ready = self.pool.submit(self.opened)
            self.description, self.tokenizers = source.description, source.tokenizers
            self.check_channels()
        except ModelError:
            self.checks.result()  # what is wrong with the files says more than what came of it
            raise
        if wait:
            self.wait()

    def verified(self, source: Source) -> None:
        """Check the files of all that drawing reads."""
        verify(self.path, (*DRAWING, source.denoiser), self.memory.sha256)
        for place in source.controlled.values():
            control.verify(place, self.memory.sha256)

    def check_channels(self) -> None:
        """ModelError unless the denoiser predicts what the autoencoder decodes."""
        (predicted,), latents = self.graphs[self.denoiser].outputs.values(), self.description.latent_channels
        if predicted.axes[1] != latents:
            problem = f"predicts latents of {predicted.axes[1]} channels, and the autoencoder's have {latents}"
            raise ModelError(f"{shown(self.path / self.denoiser)}: {problem}; copy all folders of one model")

    def open(self, name: str) -> ort.InferenceSession:
        place, own = self.home(name), self.adapted.get(name)
        digest = self.memory.sha256
        return open_session(place.parent, place.name, self.graphs[name], self.device, self.later, digest, own)

    def later(self, work: Callable[[], None]) -> None:
        """Work that nothing waits for but the end of the process."""
        try:
            self.pool.submit(work)
        except RuntimeError:  # it is ending
            work()

    def opened(self) -> None:
        """Returns once everything that drawing needs is open, all of it of one bundle."""
        with undisturbed(self.stamps):
            for each in (self.checks, *self.sessions.values()):
                each.result()
        if self.device not in ("cpu", "cuda"):
            say_share(self.device, [each.result() for each in self.sessions.values()])
        self.later(self.memory.save)

    def wait(self) -> None:
        """Until everything that drawing needs is open, or raises what keeps it from that."""
        self.ready.result()

    @cached_property
    def vae_encoder(self) -> ort.InferenceSession:
        """Opened when first needed: drawing from text alone never does."""
        with undisturbed(self.stamps):
            verify(self.path, (ENCODER,), self.memory.sha256)
            session = self.open(ENCODER)
        self.later(self.memory.save)
        return session

    def encode_text(self, ids: Mapping[str, np.ndarray]) -> Condition:
        self.wait()
        outputs = [self.read(name, rows) for name, rows in ids.items()]
        return joined(outputs, self.description.conditions, np.concatenate)

    def read(self, name: str, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of one text encoder that the denoiser is told."""
        if name not in self.sessions:
            return {HIDDEN: one_hot(ids, self.tokenizers[name].vocab_size)}
        told = texts_of(self.description.conditions).values()
        names = {k: of for k, array in self.graphs[name].outputs.items() if (of := str(array.of or k)) in told}
        return {names[k]: array for k, array in self.run(name, list(names), input_ids=ids).items()}

    def denoise(self, x: np.ndarray, t: float, condition: Condition) -> np.ndarray:
        sizes = {"batch": x.shape[0], "height": x.shape[2], "width": x.shape[3]}
        nothing = {k: zeros(array.shape(sizes)) for k, array in self.residuals.items() if k not in condition}
        told = {"sample": x, "timestep": np.array(t), **condition, **nothing}
        return self.run(self.denoiser, ["out_sample"], **told)["out_sample"]

    def control(self, network: str, x: np.ndarray, t: float, condition: Condition) -> Condition:
        outputs = list(self.graphs[network].outputs)
        return self.run(network, outputs, sample=x, timestep=np.array(t), **condition)

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return self.run(ENCODER, ["latent_parameters"], sample=pixels)["latent_parameters"]

    def decode(self, z: np.ndarray) -> np.ndarray:
        return self.run("vae_decoder", ["sample"], latent_sample=z)["sample"]

    def run(self, name: str, outputs: list[str], **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs of a graph by name, in float32, which are refused if their shapes are not those that it should give."""
        session = self.vae_encoder if name == ENCODER else self.sessions[name].result()
        graph, path, factor = self.graphs[name], self.home(name) / "model.onnx", self.description.factor
        if lacking := graph.inputs.keys() - inputs.keys():
            problem = f"needs {', '.join(sorted(lacking))}, which the text encoders do not give"
            raise ModelError(f"{shown(path)}: {problem}; copy all folders of one model")
        results = []
        for rows in batches(session, inputs):
            sizes = sizes_of(graph, rows, factor)
            wanted = {key: graph.outputs[key].shape(defaultdict(int, sizes)) for key in outputs}
            feed = fed(path, session, rows, 1 if name == ENCODER else factor)
            try:
                results.append(self.call(name, session, feed, wanted))
            except Exception as error:  # onnxruntime's exceptions share no other base
                raise failure(f"{shown(path)}: {outputs[0]}", error) from error
            for key, array in results[-1].items():
                check_shape(f"{shown(path)}: gives {key}", array.shape, graph.outputs[key], sizes)
        if len(results) == 1:
            return results[0]
        count = next(len(array) for array in inputs.values() if array.ndim)
        return {key: np.concatenate([each[key] for each in results])[:count] for key in outputs}

    def call(
        self, name: str, session: ort.InferenceSession, feed: dict[str, np.ndarray], wanted: dict[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """One call: on CUDA through buffers that stay there, where the shapes of the outputs are known."""
        if self.device == "cuda" and all(map(all, wanted.values())):
            if name not in self.buffers:
                kept, recorded = self.description.conditions.keys() | self.residuals.keys(), is_recorded(session)
                self.buffers[name] = Buffers(session, "cuda", kept, recorded)
            types = {output.name: DTYPES[output.type] for output in session.get_outputs()}
            results = self.buffers[name](feed, {key: (shape, types[key]) for key, shape in wanted.items()})
        else:
            arrays: Any = session.run(list(wanted), feed, as_graph(PLAIN))
            results = dict(zip(wanted, arrays, strict=True))
        return {key: array.astype(np.float32, copy=False) for key, array in results.items()}


@lru_cache(64)
def zeros(shape: tuple[int, ...]) -> np.ndarray:
    """What a denoiser is told that nothing controls; the same array each time, which is not copied to a card again."""
    return np.zeros(shape, np.float32)


def graphs_of(source: Source) -> dict[str, Graph]:
    """The graphs that a bundle should have. Raises ModelError where its configurations make none."""
    try:
        return graphs(source.configs)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        source.description  # noqa: B018  says what is wrong
        raise ModelError(f"{shown(source.path)}: its configuration files lack or misstate {shown(error)}") from None


def batches(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The inputs in as many rows as the graph takes: all, or, if it was exported for so many, theirs, the last repeated."""
    rows = next(len(array) for array in inputs.values() if array.ndim)
    sizes = [each.shape[0] for each in session.get_inputs() if each.name != "timestep" and each.shape]
    size = next((n for n in sizes if isinstance(n, int) and n > 0), rows)
    if size == rows:
        yield dict(inputs)
        return
    for start in range(0, rows, size):
        at = np.minimum(np.arange(start, start + size), rows - 1)
        yield {key: array[at] if array.ndim else array for key, array in inputs.items()}


def fed(
    path: Path, session: ort.InferenceSession, inputs: Mapping[str, np.ndarray], factor: int
) -> dict[str, np.ndarray]:
    """The inputs of one call, converted to what the graph declares, and refused if it takes other sizes."""
    feed, batch, rows = {}, session.get_inputs()[0].shape[:1], next(len(x) for x in inputs.values() if x.ndim)
    for declared in session.get_inputs():
        value, kind = inputs[declared.name], DTYPES[declared.type]
        value = (np.rint(value) if kind in (np.int32, np.int64) else value).astype(kind, copy=False)
        if len(declared.shape) == 1 and value.ndim == 0:  # some exporters want one for each sample, some one in a list
            many = (declared.shape == batch and not isinstance(batch[0], int)) or declared.shape == [rows]
            value = np.full(rows if many else 1, value)
        check_fixed(path, declared.name, declared.shape, value.shape, factor)
        feed[declared.name] = np.asarray(value, order="C")  # a scalar stays one, which ascontiguousarray makes a list
    return feed


def check_fixed(path: Path, name: str, declared: list[Any], given: tuple[int, ...], factor: int) -> None:
    """ModelError where a graph was exported for other sizes than those that are asked for; `factor`: pixels a cell."""
    if any(isinstance(n, int) and n != size for n, size in zip(declared, given, strict=False)):
        fix = "export it with axes that vary"
        if len(declared) == 4 and all(isinstance(n, int) for n in declared[2:]):
            fix = f"give -W {declared[3] * factor} -H {declared[2] * factor}, or {fix}"
        elif len(declared) == 3:
            fix = f"shorten the prompt, or {fix}"
        takes, asked = (" x ".join(str(n) if isinstance(n, int) else "any" for n in each) for each in (declared, given))
        raise ModelError(f"{shown(path)}: takes {name} of {takes} alone, not {asked}; {fix}")


def sizes_of(graph: Graph, inputs: Mapping[str, np.ndarray], factor: int) -> dict[str, int]:
    """Sizes of a graph's axes that vary, by what it is given."""
    sizes: dict[str, int] = {}
    for name, array in graph.inputs.items():
        named = zip(array.axes, inputs[name].shape, strict=False)
        sizes |= {axis: size for axis, size in named if isinstance(axis, str)}
    for side in ("height", "width"):
        if side in sizes:
            sizes |= {f"image_{side}": sizes[side] * factor, f"latent_{side}": sizes[side] // factor}
    return sizes


def check_shape(what: str, shape: tuple[int, ...], array: Array, sizes: Mapping[str, int]) -> None:
    """ModelError unless a shape is the one that an array of a graph should have; a size of 0 is one that nobody knows."""
    wanted = array.shape(defaultdict(int, sizes))
    if len(shape) != len(wanted) or any(w and n != w for n, w in zip(shape, wanted, strict=True)):
        raise ModelError(f"{what} of shape {shown(list(shape))}, not {times(array.axes)}; {RESTORE}")
