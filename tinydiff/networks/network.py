"""What a network is, without torch: one object holds all that the package asks of a kind of network outside of `models/`.

A *table* here is a network's `config.json`: everything that its shape depends on. It is read from a model folder, or made
by `describe` for a model that is to be trained; the network is built from it either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tinydiff.config import Config
    from tinydiff.data.dataset import Source

T = TypeVar("T")
Table = dict[str, Any]
WEIGHTS = "diffusion_pytorch_model.safetensors"
HIDDEN, POOLED = "last_hidden_state", "pooler_output"  # of every text encoder: a vector a token, one a text


@dataclass(frozen=True)
class Array:
    """An input or output of a network. Its axes have a name where their size varies, and a size where it is fixed.

    `values`: what an example holds (`normal`, `pixels`, `tokens` or `time`). `of`: where a condition comes from, either the
    output of this name of the text encoders, or a function (height, width) in pixels -> the row of every such image.
    """

    axes: tuple[str | int, ...]
    values: str = "normal"
    of: str | Callable[[int, int], list[float]] = ""

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where the axes that vary have these sizes."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)


@dataclass(frozen=True)
class Graph:
    """A call of a network: the method, and its inputs and outputs in order, under optimum's names.

    Height and width of the inputs are multiples of `step`.
    """

    method: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    step: int = 1


class OtherNetwork(ValueError):
    """A table of a network that ours is not."""


def named(outputs: tuple[Any, ...]) -> dict[str, Any]:
    """What a text encoder's `forward` returns, by name."""
    return dict(zip((HIDDEN, POOLED), outputs, strict=True))


def imported(place: str) -> Any:
    """What "package.module:name" names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def pick(settings: type[T], table: Table) -> T:
    """The settings among a table's keys; `settings` is a dataclass."""
    names = {f.name for f in fields(settings)}  # type: ignore[arg-type]
    return settings(**{k: v for k, v in table.items() if k in names})


class Network:
    """A kind of network. Its methods get a table with every key that `defaults` has."""

    name = ""  # in messages
    doc = ""  # of its settings' table in tinydiff.toml
    settings: ClassVar[Any] = None  # the dataclass of its keys in tinydiff.toml
    module = ""  # where its class is: "package.module:Class", with a class method `of(table, tensors)`
    library: tuple[str, str] = ("tinydiff", "")  # where other programs find it, as model_index.json has it
    file = WEIGHTS
    single_file = False  # whether Stable Diffusion's single files hold it
    defaults: ClassVar[Table] = {}  # what its makers' library takes where an older config.json lacks a key
    only: ClassVar[Table] = {}  # keys that would make another network, with the value that ours has

    def read(self, table: Table) -> dict[str, Any]:
        """A table as others wrote it, completed and with tuples for lists. Raises OtherNetwork."""
        table = self.complete(table)
        for key, value in self.only.items():
            if key in table and table[key] != value:
                raise OtherNetwork(f"{self.name}: {key} is {table[key]!r}, and only {value!r} is supported")
        return {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}

    def complete(self, table: Table) -> Table:
        """A table with defaults for what it lacks."""
        return self.defaults | {k: v for k, v in table.items() if v is not None}

    def build(self, table: Table, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The network of a table, which `read` completes; `tensors` are the weights that it is to get, if it is."""
        return imported(self.module).of(self.read(table), tensors)

    def graphs(self, folder: str, table: Table) -> dict[str, Graph]:
        """What a bundle has of it, by folder, where its own folder is `folder`."""
        raise NotImplementedError

    def conflicts(self, cfg: Config) -> Iterator[str]:
        """Keys of a configuration that are each in range but do not make a network."""
        yield from ()

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under the network's own names, without those that it does not use."""
        return dict(tensors)


class Denoiser(Network):
    """A network that is told a noisy latent (`sample`), its noise level (`timestep`) and conditions, by name."""

    folder = ""  # in a model folder
    reads: tuple[str, ...] = ("clip", "t5")  # kinds of text encoders that go with it
    pipelines: ClassVar[dict[str, str]] = {}  # kind of text encoder -> the pipeline of diffusers for both
    no_form = "diffusers has no such denoiser"  # why none does with the other kinds

    def describe(self, cfg: Config, widths: Mapping[str, int]) -> dict[str, Any]:
        """The table of the network that a configuration asks for; `widths`: the size of a vector of each text output."""
        raise NotImplementedError

    def conditions(self, table: Table) -> dict[str, Array]:
        """What it is told besides latent and noise level."""
        return {"encoder_hidden_states": Array(("batch", "sequence", table.get("cross_attention_dim", 0)), of=HIDDEN)}

    def graphs(self, folder: str, table: Table) -> dict[str, Graph]:
        channels, outputs = table["in_channels"], table.get("out_channels") or table["in_channels"]
        sample, predicted = (Array(("batch", c, "height", "width")) for c in (channels, outputs))
        given = {"sample": sample, "timestep": Array((), "time"), **self.conditions(table)}
        return {folder: Graph("forward", given, {"out_sample": predicted}, self.reduction(table))}

    def reduction(self, table: Table) -> int:
        """Latents along a side that it reads as one at its lowest resolution."""
        return 1

    def classes(self, table: Table) -> int:
        """How many classes it is conditioned on instead of text; 0 for text."""
        return 0

    def heads(self, cfg: Config) -> int:
        """Attention heads that processes can divide among them; 0 where its matrices cannot be shared."""
        return 0


class TextEncoder(Network):
    """A network that reads a prompt, with a tokenizer of its own."""

    kind = ""  # its name in TEXT_ENCODERS
    title = ""  # what people call its tokens
    longest = ""  # where the most tokens of a prompt are named, for a folder that does not: "package.module:NAME"
    tokenizer_library: tuple[str, str] = ("tinydiff", "")
    tokenizer = ""  # where its class is: "package.module:Class", with a class method `load`
    no_form = ""  # why diffusers has no pipeline with it
    file = "model.safetensors"

    def describe(self, cfg: Config, tokenizer: Any) -> dict[str, Any]:
        """The table of the network that a configuration asks for, with a run's tokenizer."""
        raise NotImplementedError

    def make_tokenizer(self, cfg: Config, source: Source) -> Any:
        """The tokenizer of a new run, which may learn it from the captions of its data."""
        raise NotImplementedError

    @property
    def tokenizer_class(self) -> Any:
        return imported(self.tokenizer)

    @property
    def labels(self) -> bool:
        """Whether prompts are labels, for which there is no network."""
        return not self.module

    @property
    def length(self) -> int:
        """The most tokens of a prompt where a folder does not say."""
        return imported(self.longest)

    def width(self, table: Table) -> int:
        """The size of the vectors it gives."""
        return table.get("hidden_size", 0)

    def graphs(self, folder: str, table: Table) -> dict[str, Graph]:
        tokens, width = ("batch", "sequence"), self.width(table)
        outputs = {HIDDEN: Array((*tokens, width)), POOLED: Array(("batch", width))}
        return {folder: Graph("forward", {"input_ids": Array(tokens, "tokens")}, outputs)}

    def given(self, cfg: Config) -> Any:
        """The folder of weights that are taken as they are; None for an encoder that is trained."""
        return None
