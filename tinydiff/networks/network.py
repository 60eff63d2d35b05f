"""What a network is, without torch: one object holds all that the package asks of a kind of network outside of `models/`.

A *table* here is a network's `config.json`: everything that its shape depends on. It is read from a model folder, or made
by `describe` for a model that is to be trained; the network is built from it either way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, get_type_hints

from tinydiff.networks.growth import Growth
from tinydiff.schema import Key, brief

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tinydiff.config import Config
    from tinydiff.data.dataset import Source

T = TypeVar("T")
Table = dict[str, Any]
WEIGHTS = "diffusion_pytorch_model.safetensors"
OURS = "TinydiffPipeline"  # in model_index.json where diffusers has no pipeline
HIDDEN, POOLED = "last_hidden_state", "pooler_output"  # of every text encoder: a vector a token, one a text


class Canvas(NamedTuple):
    """What an image is to be besides its prompt: pixels, how strong guidance is, and the picture that it is a crop of."""

    height: int
    width: int
    guidance: float = 1.0
    original: tuple[int, int] | None = None  # height and width of that picture; None: its own
    crop: tuple[int, int] = (0, 0)  # from its top and left

    @property
    def sizes(self) -> list[float]:
        """Stable Diffusion XL's six numbers (Podell et al. 2023, section 2.2), the image being as large as it is to look."""
        return [*(self.original or self[:2]), *self.crop, *self[:2]]


class Given(NamedTuple):
    """Where a condition comes from that data have in a column of this name and drawing in a flag."""

    column: str


@dataclass(frozen=True)
class Array:
    """An input or output of a network. Its axes have a name where their size varies ("height", or "height/2" and "height*8"
    where it follows from another's), and a size where it is fixed.

    `values`: what an example holds (`normal`, `pixels`, `unit` for [0, 1], `tokens` or `time`). `of`: where a condition comes
    from: the output of this name of the text encoders, a function of the canvas that gives the row of every such image, or what
    is given with each. A text encoder's own output says there what it is of HIDDEN and POOLED, where its name does not.
    """

    axes: tuple[str | int, ...]
    values: str = "normal"
    of: str | Callable[[Canvas], list[float]] | Given = ""

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where the axes that vary have these sizes."""
        return tuple(sized(axis, sizes) if isinstance(axis, str) else axis for axis in self.axes)


def sized(axis: str, sizes: Mapping[str, int]) -> int:
    """The size of an axis that varies; what is divided is rounded up, as halving does."""
    rest, _, parts = axis.partition("/")
    name, _, times = rest.partition("*")
    return -(-sizes[name] * int(times or 1) // int(parts or 1))


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
    """What a text encoder's `forward` returns, by name; the pooled vector may be missing."""
    return dict(zip((HIDDEN, POOLED), outputs, strict=False))


def imported(place: str) -> Any:
    """What "package.module:name" names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def pick(settings: type[T], table: Table) -> T:
    """The settings among a table's keys; `settings` is a dataclass."""
    names = {f.name for f in fields(settings)}  # type: ignore[arg-type]
    return settings(**{k: v for k, v in table.items() if k in names})


WIDTH = Key(int, 1, 2**16)  # far above what any network has: a wrong number must not ask for memory
SIDE = Key(int, 1, 2**14)
WRAPPED = re.compile(r"^module\.|(?<![^.])_orig_mod\.")
ANOTHER_NAME = {"swish": "silu"}  # of one activation


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names without what torch.compile and DataParallel put before them -> names as they are stored."""
    return {WRAPPED.sub("", name): name for name in names}


def single(value: Any) -> Any:
    """A list whose entries are all the same as that entry; anything else as it is."""
    if not isinstance(value, list | tuple) or not value:
        return value
    first = value[0]
    return first if all(type(each) is type(first) and each == first for each in value) else value


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
    only: ClassVar[
        Table
    ] = {}  # keys that would make another network, with the value that ours has, or a tuple of several
    checked: ClassVar[dict[str, Key]] = {}  # further keys that its shape depends on; they go before those of `settings`
    unused: ClassVar[frozenset[str]] = frozenset()  # keys without effect on what is drawn
    nulls: ClassVar[tuple[str, ...]] = ()  # keys of which null is a value of its own

    def read(self, table: Table) -> dict[str, Any]:
        """A table as others wrote it, valid, completed, with tuples for lists. Raises OtherNetwork, ValueError."""
        if null := next((key for key in self.nulls if key in table and table[key] is None), None):
            raise OtherNetwork(f"{self.name}: {null} is null, and that is not supported")
        table = {k: tuple(v) if isinstance(v, list) else v for k, v in self.complete(self.valid(table)).items()}
        for key, value in self.only.items():
            known = value if isinstance(value, tuple) else (value,)
            if key in table and table[key] not in known:
                raise OtherNetwork(f"{self.name}: {key} is {brief(table[key])}, and only {known[0]!r} is supported")
        for key, (kind, _, _, choices) in self.keys.items():
            value = table.get(key)
            if isinstance(value, tuple) and kind is int:
                raise OtherNetwork(f"{self.name}: {key} is {brief(value)}, and only equal numbers are supported")
            each = value if isinstance(value, tuple) else (value,)
            if other := [name for name in each if choices and name not in (None, *choices)]:
                raise OtherNetwork(
                    f"{self.name}: {key} is {brief(other[0])}, and only {', '.join(choices)} are supported"
                )
        return table

    def valid(self, table: Table, whole: bool = True) -> Table:
        """The same table in one form: a number instead of a list of equal ones.

        Raises ValueError, naming the key, for a value of another type, out of range, or (if `whole`) in conflict
        with another one.
        """
        table = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
        for key in table.keys() & (self.keys.keys() | self.only.keys()):
            kind, low, high, _ = self.keys.get(key, Key(None))
            if table[key] is None or (kind is None and not isinstance(table[key], tuple)):
                continue
            if kind not in (tuple[int, ...], tuple[str, ...]):
                self._check_length(key, table)
            if kind is not None:
                listed = tuple[int, ...] if kind is int and isinstance(table[key], tuple) else kind
                table[key] = Key(listed, low, high).of(table, key)
            table[key] = table[key] if kind in (tuple[int, ...], tuple[str, ...]) else single(table[key])
            if kind is int and key != "sample_size" and isinstance(table[key], tuple) and not self._levels(table):
                raise ValueError(f"{key}: expected int, got {brief(table[key])}")
        if "sample_size" in self.keys and isinstance(side := table.get("sample_size"), tuple):
            raise ValueError(f"sample_size: {brief(side)} is not square")
        if "act_fn" in table:
            table["act_fn"] = ANOTHER_NAME.get(str(table["act_fn"]), table["act_fn"])
        if whole and not any(isinstance(table.get(key), tuple) for key, (kind, *_) in self.keys.items() if kind is int):
            for problem in self.misfits(self.complete(table)):
                raise ValueError(problem)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in table.items()}

    def _check_length(self, key: str, table: Table) -> None:
        """Raise ValueError for a list of values a level that has another length."""
        levels = self._levels(table)
        wanted = 2 if key == "sample_size" else len(levels) if isinstance(levels, tuple) else None
        if isinstance(table[key], tuple) and wanted not in (None, len(table[key])):
            raise ValueError(f"{key}: a list of {len(table[key])}, where {wanted} are needed")

    def _levels(self, table: Table) -> Any:
        """The widths of its levels, None for a network without levels."""
        return table.get("block_out_channels") or self.defaults.get("block_out_channels")

    @cached_property
    def keys(self) -> dict[str, Key]:
        """What every key has to be."""
        settings = fields(self.settings) if self.settings else ()
        hints = get_type_hints(self.settings) if self.settings else {}
        return {f.name: Key(hints[f.name], *(f.metadata[k] for k in Key._fields[1:])) for f in settings} | self.checked

    def misfits(self, table: Table) -> Iterator[str]:
        """Conflicts between values that are each in range, in a completed table: a line each, the key first."""
        yield from ()

    def shapes(self, table: Table) -> dict[str, tuple[int, ...]]:
        """The shapes of a few tensors, as they follow from a table: those that tell one size from another."""
        return {}

    def notes(self, table: Table) -> list[str]:
        """The keys of a table that this package does not know, and so ignores."""
        known = self.keys.keys() | self.only.keys() | self.defaults.keys() | self.unused
        return sorted(key for key in table if self.unused and not key.startswith("_") and key not in known)

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
        return {name: tensors[stored] for name, stored in unwrapped(tensors).items()}


class Denoiser(Network):
    """A network that is told a noisy latent (`sample`), its noise level (`timestep`) and conditions, by name."""

    folder = ""  # in a model folder
    outputs: tuple[int, ...] = (1,)  # how many values it may give for each of a latent
    reads: tuple[str, ...] = ("clip", "t5", "bert")  # kinds of text encoders that go with it
    pipelines: ClassVar[dict[str, str]] = {}  # kind of text encoder -> the pipeline of diffusers for both
    no_form = "diffusers has no such denoiser"  # why none does with the other kinds
    controlled = False  # whether a control network goes with it
    grows: ClassVar[
        dict[str, tuple[str, ...]]
    ] = {}  # what of a `Growth`, and the unusual settings that do not change it

    def describe(self, cfg: Config, widths: Mapping[str, int]) -> dict[str, Any]:
        """The table of the network that a configuration asks for; `widths`: the size of a vector of each text output."""
        raise NotImplementedError

    def settings_of(self, table: Table) -> Any:
        """The settings of a table, which `read` has completed."""
        return pick(self.settings, table)  # type: ignore[arg-type]

    def unusual(self, settings: Any) -> dict[str, Any]:
        """The settings that diffusers has no form of, where they are not at their defaults."""
        own = [(f, f.metadata["own"], getattr(settings, f.name)) for f in fields(settings) if f.metadata["own"]]
        return {f.name: x for f, which, x in own if x != f.default and (which is True or x in which)}

    def pipeline(self, cfg: Config) -> tuple[str, str]:
        """The pipeline of diffusers that a configuration's model goes with, or ours and why it goes with none."""
        if own := self.unusual(cfg.network):
            return OURS, f"diffusers' {self.library[1]} has no {', '.join(own)}"
        name = self.pipelines.get(cfg.text_encoder.kind)
        return (name, "") if name else (OURS, self.no_form)

    def grown(self, cfg: Config, to: Growth) -> Any:
        """The settings of a larger network that does the same, where `ungrown` says nothing against it."""
        raise NotImplementedError

    def ungrown(self, cfg: Config, to: Growth) -> Iterator[str]:
        """Why a configuration's network cannot grow so: what is no more than it was, or would not stay the same."""
        changed, which = self.unusual(cfg.network), [*to.parts]
        yield from () if which else ("says nothing that grows: give layers, widths, resolution or attention",)
        old = cfg.data.resolution
        if to.resolution and to.resolution <= old:
            yield f"resolution {to.resolution} is no more than the {old} of data.resolution"
        for part in which:
            if other := [f"{cfg.denoiser.kind}.{key}" for key in changed if key not in self.grows.get(part, ())]:
                yield f"{part}: not with {', '.join(other)}, which would not stay the same; leave one out"
            if part not in self.grows:
                yield f"{part}: denoiser.kind {cfg.denoiser.kind} has none that grow"

    def conditions(self, table: Table) -> dict[str, Array]:
        """What it is told besides latent and noise level."""
        return {"encoder_hidden_states": Array(("batch", "sequence", table.get("cross_attention_dim", 0)), of=HIDDEN)}

    def graphs(self, folder: str, table: Table) -> dict[str, Graph]:
        channels, outputs = self.noisy(table), table.get("out_channels") or table["in_channels"]
        sample, predicted = (Array(("batch", c, "height", "width")) for c in (channels, outputs))
        given = {"sample": sample, "timestep": Array((), "time"), **self.conditions(table)}
        return {folder: Graph("forward", given, {"out_sample": predicted}, self.reduction(table))}

    def noisy(self, table: Table) -> int:
        """Channels of `sample`."""
        return table["in_channels"]

    def reduction(self, table: Table) -> int:
        """Latents along a side that it reads as one at its lowest resolution."""
        return 1

    def multiple(self, table: Table) -> int:
        """Latents along a side must be a multiple of this."""
        return self.reduction(table)

    def told_guidance(self, table: Table) -> bool:
        """Whether guidance was distilled into it: it is told how strong, and asked once."""
        return False

    def classes(self, table: Table) -> int:
        """How many classes it is conditioned on instead of text; 0 for text."""
        return 0

    def middle(self, table: Table) -> tuple[str, int]:
        """The module whose output, (B, C, h, w) or (B, T, C), tells most of what the image shows, and its C; "" for none."""
        return "", 0

    def heads(self, cfg: Config) -> int:
        """Attention heads that processes can divide among them; 0 where its matrices cannot be shared."""
        return 0

    def undivided(self, settings: Any) -> list[str]:
        """The settings under which heads have something in common, so that they cannot be divided."""
        return []


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

    def pooled(self, table: Table) -> int:
        """The size of its one vector of a text, 0 where there is none."""
        return self.width(table)

    def graphs(self, folder: str, table: Table) -> dict[str, Graph]:
        tokens, width = ("batch", "sequence"), self.width(table)
        outputs = {HIDDEN: Array((*tokens, width)), POOLED: Array(("batch", width))}
        return {folder: Graph("forward", {"input_ids": Array(tokens, "tokens")}, outputs)}

    vectors = ""  # its tensor with a row for each token, where words can be added to it
    frozen = False  # whether its weights are taken as they are from a folder, `given`

    def given(self, cfg: Config) -> Path | None:
        """The folder of a frozen encoder's weights; None for an encoder that is trained."""
        return None
