"""A model as a command opens it: where it is, and what goes with it. Its JSON files and headers are read once.

A source gives the JSON of a diffusers folder and tensors under our networks' names, whatever layout the model has: a folder, a
single Stable Diffusion file, the published weights of a DiT. Only `tensors` imports torch: what cannot be opened is
refused before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff.adapters import lora, origin, words
from tinydiff.adapters.lora import Lora
from tinydiff.adapters.origin import Origin
from tinydiff.adapters.words import Word
from tinydiff.checkpoints import agreement, control, dit, weights
from tinydiff.checkpoints.description import Description, describe
from tinydiff.checkpoints.header import NUMPY, PICKLES, Header, header
from tinydiff.checkpoints.scheduler import PREDICTION_TYPES
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import RESTORE, read_json, shown, stamp
from tinydiff.networks import (
    CONTROL,
    TEXT,
    VAE,
    denoiser_in,
    is_xl,
    network_of,
    networks,
    text_encoders,
    tokenizer_folder,
    towers,
)
from tinydiff.networks.network import Table, TextEncoder
from tinydiff.verified import Memory

if TYPE_CHECKING:
    from torch import Tensor

    from tinydiff.checkpoints.single_file import Part

Configs = dict[str, dict[str, Any]]
OTHERS = (  # part of a pipeline's class name: what it is
    {name: name for name in ("Flux", "PixArt", "Kandinsky", "Wuerstchen", "Sana", "Lumina", "AuraFlow")}
    | {"StableDiffusion3": "Stable Diffusion 3"}
    | {"StableCascade": "Stable Cascade", "HunyuanDiT": "Hunyuan-DiT", "QwenImage": "Qwen-Image"}
    | {"GLIGEN": "GLIGEN", "Kolors": "Kolors"}
    | {"InstructPix2Pix": "InstructPix2Pix", "Depth2Img": "Stable Diffusion 2 with depth", "UnCLIP": "Stable unCLIP"}
    | {
        "Upscale": "an upscaler",
        "ImageVariation": "Stable Diffusion with images as prompts",
        "AnimateDiff": "AnimateDiff",
    }
)
SUPPORTED = "give Stable Diffusion 1.x, 2.x or XL, a DiT, or a model trained here"
REFINER = "the Stable Diffusion XL refiner, which only changes another model's latents"


@dataclass(frozen=True)
class Adapter:
    """Weights that change a network, and how much of the change: 0 is none, 1 all of it."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class Source:
    """What is opened. ModelError, from whatever is asked of it, names a file that is missing, damaged or not supported.

    `vae`: a file whose autoencoder is taken instead of the model's own. `prediction`: what the denoiser predicts (our name),
    where the model does not say so, or says something wrong. `controls`: files or folders of control networks, each once.
    `anew`: every file is hashed, though it was before. `clip_skip`: how many of CLIP's last blocks are left out of what a
    prompt's tokens give; None for as many as the model says.
    """

    path: Path
    vae: Path | None = None
    prediction: str | None = None
    adapters: tuple[Adapter, ...] = ()
    controls: tuple[Path, ...] = ()
    words: tuple[Path, ...] = ()
    anew: bool = False
    clip_skip: int | None = None
    stamps: dict[Path, object] = field(init=False, compare=False, repr=False)  # for files.undisturbed
    headers: dict[Path, Header] = field(default_factory=dict, compare=False, repr=False)
    shards: dict[str, list[Path]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        paths = (self.path, self.vae, *(each.path for each in self.adapters), *self.words, *self.controlled.values())
        object.__setattr__(self, "stamps", {path: stamp(path) for path in paths if path})

    def header(self, path: Path) -> Header:
        """The header of one of the model's files."""
        if path not in self.headers:
            self.headers[path] = header(path)
        return self.headers[path]

    def files(self, name: str) -> list[Path]:
        """The files with the weights of one of a folder's networks."""
        if name not in self.shards:
            self.shards[name] = weights.files(self.home(name))
        return self.shards[name]

    @cached_property
    def controlled(self) -> dict[str, Path]:
        """The control networks' files and folders by the names that their folders have in a model."""
        return {control.name(i): control.find(path, self.path) for i, path in enumerate(self.controls)}

    def home(self, name: str) -> Path:
        """The folder of one of a folder's networks; the file of a control network that is one."""
        return self.controlled.get(name, self.path / name)

    @cached_property
    def file(self) -> Header | None:
        """The header of a model that is one file."""
        return self.header(self.path) if self.path.is_file() else None

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Where the networks of a Stable Diffusion file are in it, or in the file of the autoencoder."""
        from tinydiff.checkpoints import single_file

        assert self.file
        return single_file.parts(self.file, self.header(self.vae) if self.vae else self.file)

    @cached_property
    def published(self) -> bool:
        """Whether it is the published weights of a DiT."""
        return bool(self.file and dit.is_published(self.file.tensors))

    @cached_property
    def partial(self) -> Configs:
        """`configs`, which may lack an autoencoder: published DiTs come without. Each is valid by itself."""
        configs = towers(self.found())
        for name in self.skipping(configs):
            configs[name] = configs[name] | {"clip_skip": self.clip_skip}
        denoiser = denoiser_in(configs)
        steered = network_of(denoiser, configs[denoiser]).controlled  # type: ignore[attr-defined]
        for name, path in self.controlled.items():
            configs[name] = control.table(path, self.header, configs[denoiser] if steered else None)
        configs["model_index"] = control.indexed(configs["model_index"], len(self.controls))
        graphs = not self.file and any(self.path.glob("*/model.onnx"))  # of which a table need not say everything
        for name, table in networks(configs).items():
            try:
                configs[name] = network_of(name, table).valid(table, whole=not graphs)
            except ValueError as error:
                raise ModelError(f"{self.place(name)}: {error}; {RESTORE}") from None
        return configs

    def skipping(self, configs: Configs) -> list[str]:
        """The text encoders that leave out blocks. Raises UsageError where they cannot, or not so many."""
        if self.clip_skip is None:
            return []
        read = text_encoders(configs).items()
        rows: dict[str, Any] = {name: row for name, row in read if row.kind == "clip" and name in configs}
        if not rows:
            raise UsageError(f"{shown(self.path)}: --clip-skip is for CLIP's text encoder; leave it out")
        most = min(row.most_skipped(configs[name]) for name, row in rows.items())
        if not 0 <= self.clip_skip <= most:
            raise UsageError(
                f"--clip-skip {self.clip_skip}: this model's text encoders can leave out 0 to {most} blocks"
            )
        return list(rows)

    def place(self, name: str) -> str:
        """Where the settings of a network are, as a message shows it."""
        if self.vae and name == VAE:
            return f"the vae of {shown(self.vae)}"
        if name in self.controlled:
            return control.place(self.controlled[name])
        if self.file:
            return f"the {name} of {shown(self.path)}"
        there = (each for each in (name, f"{name}_decoder") if (self.path / each / "config.json").exists())
        return shown(self.path / next(there, name) / "config.json")

    def found(self) -> Configs:
        """The JSON files as they are."""
        theirs = next((name for name, ours in PREDICTION_TYPES.items() if ours == self.prediction), None)
        if self.file and not self.published:
            from tinydiff.checkpoints import single_file

            return single_file.configs(self.file, self.parts, theirs)
        shapes = {name: stored.shape for name, stored in self.file.tensors.items()} if self.file else {}
        configs = dit.configs(shapes) if self.file else self.of_folder()
        if self.vae:
            from tinydiff.checkpoints import single_file

            configs[VAE] = single_file.autoencoder(self.header(self.vae), is_xl(configs))
        if theirs:
            configs["scheduler"]["prediction_type"] = theirs
        return configs

    @cached_property
    def configs(self) -> Configs:
        """The JSON files of the model: `model_index`, `scheduler`, and each network's `config.json` by its folder's name.

        Those of a single file are made from what it holds.
        """
        if VAE not in self.partial:
            problem = "a DiT alone, without an autoencoder; give the file of one with --vae"
            raise ModelError(f"{shown(self.path)}: {problem}")
        refuse(agreement.of_networks(self.partial, self.place))
        grown = {name: {"vocab_size": rows + len(self.added(name))} for name, (rows, _) in self.tables.items()}
        return self.partial | {name: self.partial[name] | size for name, size in grown.items()}

    @cached_property
    def tables(self) -> dict[str, tuple[int, ...]]:
        """How many vectors of words each text encoder has itself, and their width, where words are added to them."""
        named = {name: each.vectors for name, each in text_encoders(self.partial).items() if each.vectors}
        return {name: self.shapes(name)[vectors] for name, vectors in named.items()} if self.words else {}

    @cached_property
    def learnt(self) -> tuple[Word, ...]:
        """The words of `words`. ModelError for a file that holds none, or one of another model."""
        learnt, files = [words.opened(path, self.tables, self.header) for path in self.words], dict[str, Path]()
        for word, path in zip(learnt, self.words, strict=True):
            if word.text in files:
                both = f"{shown(files[word.text])}, {shown(path)}"
                raise ModelError(f"{both}: both hold the word {shown(word.text)!r}; leave one out")
            files[word.text] = path
        return tuple(learnt)

    def added(self, name: str) -> list[np.ndarray]:
        """The vectors of learnt words, one a token."""
        return [row for word in self.learnt for row in word.vectors[name]]

    def of_folder(self) -> Configs:
        path = self.path
        index = read_json(path / "model_index.json") if (path / "model_index.json").exists() else {}
        kind = str(index.get("_class_name", ""))
        if other := next((name for key, name in OTHERS.items() if key in kind), None):
            raise ModelError(f"{shown(path)}: not supported, this is {other} ({kind}); {SUPPORTED}")
        if index.get("requires_aesthetics_score"):
            raise ModelError(f"{shown(path)}: not supported, this is {REFINER}; {SUPPORTED}")
        configs = {"model_index": index, "scheduler": read_json(path / "scheduler" / "scheduler_config.json")}
        configs[self.denoiser] = read_json(path / self.denoiser / "config.json")
        halves = (name for name in (VAE, f"{VAE}_decoder") if (path / name / "config.json").exists())
        configs[VAE] = read_json(path / next(halves, VAE) / "config.json")
        texts = sorted(file.parent.name for file in path.glob(f"{TEXT}*/config.json"))
        read = [name for name in texts if name == TEXT or index.get(name)]  # another one is not part of the model
        named = (name for name, value in index.items() if re.fullmatch(rf"{TEXT}(_\d)?", name) and any(value or ()))
        if lacking := next(
            (name for name in named if name not in read and not (path / name / "model.onnx").exists()), None
        ):
            raise ModelError(f"{shown(path / lacking)}: missing; copy the whole model folder")
        return configs | {name: read_json(path / name / "config.json") for name in read}

    @cached_property
    def denoiser(self) -> str:
        """The folder that holds the denoiser, or would."""
        if self.file:
            return denoiser_in(self.partial)
        return denoiser_in({file.parent.name: file for file in self.path.glob("*/config.json")})

    @cached_property
    def description(self) -> Description:
        """What sampling needs to know of it."""
        told = describe(self.configs, self.path)
        return replace(told, notes=told.notes + self.notes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is ignored of its files, a line each."""
        unknown = {name: network_of(name, table).notes(table) for name, table in networks(self.partial).items()}
        told = [
            f"{self.place(name)}: not known, and not used: {shown(', '.join(k))}" for name, k in unknown.items() if k
        ]
        if self.file and not self.published:
            from tinydiff.checkpoints import single_file

            left = None if self.path in self.controlled.values() else single_file.other_kind(self.file)
            told += [f"{shown(self.path)}: has tensors of {left} too, which are not used"] if left else []
        return tuple(told)

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """Of each text encoder its tokenizer, whose ids it has vectors for; the labels of a class-conditional model."""
        tokenizers = {name: self.tokenizer(name, encoder) for name, encoder in text_encoders(self.partial).items()}
        for name, tokenizer in tokenizers.items():
            if name in self.partial:
                folder = shown(self.path / tokenizer_folder(name)) if not self.file else "its tokenizer"
                refuse(agreement.of_tokenizer(tokenizer, self.partial[name], self.place(name), folder))
        return tokenizers | {name: self.taught(tokenizers[name], rows) for name, (rows, _) in self.tables.items()}

    def taught(self, tokenizer: Any, rows: int) -> Any:
        """A tokenizer that knows the learnt words, whose vectors come after the encoder's own."""
        try:
            return tokenizer.taught({word.text: word.tokens for word in self.learnt}, rows)
        except ValueError as error:
            problem = f"{shown(error)} is a word of the model already; rename it, or its file"
            raise ModelError(f"{', '.join(shown(path) for path in self.words)}: {problem}") from None

    def tokenizer(self, name: str, encoder: TextEncoder) -> Any:
        if encoder.labels:
            return self.class_labels()
        if self.file:
            from tinydiff.checkpoints import single_file

            return single_file.tokenizer(self.parts[name].table)
        return encoder.tokenizer_class.load(self.path / tokenizer_folder(name))

    def class_labels(self) -> Any:
        """The labels that a DiTPipeline's index names by number, which need not be all."""
        from tinydiff.text.labels import Labels

        table = self.partial[self.denoiser]
        network = network_of(self.denoiser, table)
        try:
            classes = int(network.classes(network.complete(table)))  # type: ignore[attr-defined]
            named = self.partial["model_index"].get("id2label") or {}
            names = {int(number): str(name) for number, name in named.items() if 0 <= int(number) < classes}
        except (AttributeError, TypeError, ValueError) as error:
            problem = f"its classes make no sense: {error}; copy model_index.json again"
            raise ModelError(f"{shown(self.path)}: {problem}") from None
        ours = (self.path / "tinydiff.toml").is_file()
        return Labels([names.get(i, "") for i in range(max(names, default=-1) + 1)], classes, whole=ours)

    def table(self, name: str) -> Table:
        """A network's `config.json`, completed. Raises ValueError for a network that ours is not."""
        if name not in self.configs:
            raise ModelError(f"{shown(self.path / name / 'config.json')}: missing; copy the whole model folder")
        table = network_of(name, self.configs[name]).read(self.configs[name])
        end = getattr(self.tokenizers.get(name), "eos", None)
        return table if end is None else table | {"eos_token_id": end}  # files of Stable Diffusion 1 name another one

    def tensors(self, name: str) -> Mapping[str, Tensor]:
        """A network's tensors under our names: as stored, mapped, not copied, but for those that adapters change."""
        from torch import float32, from_numpy

        tensors = dict(self.stored(name))
        for weight in self.changed(name):
            stored = tensors[weight]
            whole = self.merged(name, weight, stored.float().numpy())
            tensors[weight] = from_numpy(whole).to(stored.dtype if stored.itemsize > 1 else float32)
        return tensors

    @cached_property
    def loras(self) -> tuple[Lora, ...]:
        """The adapters' files, opened for this model. Each is valid, and of this model."""
        if not self.adapters:
            return ()
        networks = {
            name: self.shapes(name) for name in (self.denoiser, *text_encoders(self.partial)) if name in self.partial
        }
        files = [self.header(each.path) for each in self.adapters]
        for file in files:
            refuse(agreement.of_types(file.tensors, shown(file.path)))
        return tuple(lora.opened(file, networks, self.blocks) for file in files)

    @cached_property
    def blocks(self) -> Callable[[str], list[str]]:
        """What Stable Diffusion's own code calls a module of the U-Net."""
        from tinydiff.checkpoints import ldm  # which imports a tokenizer

        row, table = network_of(self.denoiser, self.partial[self.denoiser]), self.partial[self.denoiser]
        names = ldm.forward(ldm.unet_pairs(row.complete(table))) if row.single_file else {}
        return lambda module: ldm.renamed(module, names)

    def changed(self, name: str) -> set[str]:
        """The weights of a network that adapters change."""
        layers = {layer for each in self.loras for layer in each.places if layer.startswith(f"{name}.")}
        grown = {self.vectors(name)} if name in self.tables else set()
        return {f"{layer.removeprefix(f'{name}.')}.weight" for layer in layers} | grown

    def vectors(self, name: str) -> str:
        """A text encoder's tensor of vectors of words."""
        return text_encoders(self.partial)[name].vectors

    def mark(self, name: str, digest: Callable[[Path], str]) -> list[Any]:
        """What the changes of a network depend on: SHA-256 of files, and strengths. Those of words are not kept."""
        pairs = zip(self.loras, self.adapters, strict=True)
        return [[digest(a.path), a.strength] for each, a in pairs if any(k.startswith(f"{name}.") for k in each.places)]

    def merged(self, name: str, weight: str, stored: np.ndarray) -> np.ndarray:
        """A weight of a network after the adapters' changes, one after the other, with the vectors of learnt words: float32."""
        layer, whole = f"{name}.{weight.removesuffix('.weight')}", stored.astype(np.float32)
        for each, adapter in zip(self.loras, self.adapters, strict=True):
            if layer in each.places:
                whole = each.layer(layer).merged(whole, adapter.strength)
                if not np.isfinite(whole).all():
                    problem = f"at a strength of {adapter.strength:g} {shown(layer)} overflows; give a lower one"
                    raise ModelError(f"{shown(adapter.path)}: {problem}")
        return np.stack([*whole, *self.added(name)]) if name in self.tables and weight == self.vectors(name) else whole

    def shapes(self, name: str) -> Mapping[str, tuple[int, ...]]:
        """The shapes of a network's tensors under our names, by headers alone."""
        if self.file and not self.published:
            return self.parts[name].shapes
        if self.file:
            return dit.shapes({k: stored.shape for k, stored in self.file.tensors.items()})
        stored = {k: v for path in self.files(name) for k, v in self.header(path).tensors.items()}
        named: Mapping[str, Any] = network_of(name, self.partial[name]).renamed(stored)  # type: ignore[arg-type]
        shapes: dict[str, tuple[int, ...]] = {k: each.shape for k, each in named.items()}
        return dit.shapes(shapes) if dit.is_published(shapes) else shapes

    @cached_property
    def origin(self) -> Origin:
        """By what the model is known again; nothing where its weights are in no safetensors files."""
        inside = self.inside(self.denoiser)
        try:
            files = [self.file] if self.file else [self.header(path) for path in self.files(self.denoiser)]
        except ModelError:
            return {}
        names = {k: at.name for k, at in inside[1].places.items()} if inside else {}
        for tensor in origin.TENSORS:
            for file in files:
                if (stored := names.get(tensor, tensor)) in file.tensors and file.tensors[stored].dtype in NUMPY:
                    return origin.of_values(tensor, file.array(stored))
        return {}

    @property
    def strangers(self) -> list[str]:
        """Adapters that say that they were made of another model than this, a line each."""
        files = [*(each.path for each in self.adapters), *(path for path in self.words if path.suffix not in PICKLES)]
        told = {path: self.header(path).metadata.get(origin.KEY) for path in files}
        told |= {path: self.partial[name].get(origin.KEY) for name, path in self.controlled.items()}
        made = {path: origin.read(each) for path, each in told.items() if each}
        others = [path for path, each in made.items() if origin.is_other(each, self.origin)]
        return [f"{shown(path)} was trained on another model, {shown(made[path].get('model'))}" for path in others]

    def stored(self, name: str) -> Mapping[str, Tensor]:
        """The same before any change."""
        from tinydiff.checkpoints import single_file

        if part := self.inside(name):
            return single_file.tensors(*part)
        paths = [self.path] if self.file else self.files(name)
        tensors = network_of(name, self.configs[name]).renamed(weights.tensors(paths, self.header))
        return dit.published(tensors) if dit.is_published(tensors) else tensors

    def digest(self) -> str:
        """SHA-256 of all that it is: JSON files, weights, tokenizers."""
        memory, folders = (
            Memory(self.anew),
            [self.path / tokenizer_folder(name) for name in text_encoders(self.configs)],
        )
        paths = [self.path] if self.file else [path for name in networks(self.configs) for path in self.files(name)]
        paths += [path for folder in folders for path in sorted(folder.glob("*.*"))] + ([self.vae] if self.vae else [])
        said = json.dumps([self.configs, *map(memory.sha256, paths)], sort_keys=True)
        memory.save()
        return hashlib.sha256(said.encode()).hexdigest()

    def inside(self, name: str) -> tuple[Header, Part] | None:
        """The file of several networks that a network is taken from, and where it is in it; None where it has its own files."""
        from tinydiff.checkpoints import single_file

        path, kind = self.controlled.get(name), CONTROL.folder
        if name == VAE and self.vae:
            path, kind = self.vae, VAE
        if path:
            return None if path.is_dir() else (self.header(path), single_file.required(self.header(path), kind))
        return (self.file, self.parts[name]) if self.file and not self.published else None

    def check(self) -> None:
        """Refuse, before torch is imported, all that can be told from JSON files and headers."""
        tables, shapes = dict[str, Table](), dict[str, dict[str, tuple[int, ...]]]()
        _ = self.loras
        _ = self.configs
        for name, table in networks(self.partial).items():
            try:
                tables[name] = network_of(name, table).read(table)
                shapes[name] = network_of(name, table).shapes(tables[name])
            except ValueError as error:
                raise ModelError(f"{self.place(name)}: not supported: {error}") from None
            except KeyError as error:
                raise ModelError(f"{self.place(name)}: lacks {error}; {RESTORE}") from None
        if not self.file:
            self.check_texts(tables)
        for name, table in tables.items():
            if inside := self.inside(name):
                part = {ours: inside[0].tensors[at.name] for ours, at in inside[1].places.items()}
                refuse(agreement.of_types(part, shown(inside[0].path)))
            elif not self.published:
                network, (file, *_) = network_of(name, table), self.files(name)
                stored = {k: v for path in self.files(name) for k, v in self.header(path).tensors.items()}
                refuse(agreement.of_weights(network, shapes[name], stored, self.place(name), shown(file)))

    def check_texts(self, tables: Mapping[str, Table]) -> None:
        """Refuse a folder without a text encoder or a tokenizer, or with one that does not fit."""
        reads = [name for name, encoder in text_encoders(tables).items() if not encoder.labels]
        for name in (*reads, *map(tokenizer_folder, reads)):
            if not (self.path / name).is_dir():
                raise ModelError(f"{shown(self.path / name)}: missing; copy the whole model folder")
        _ = self.tokenizers


def check_autoencoder(network: Any, table: Table, place: Path) -> None:
    """`Source.check` of an autoencoder's folder, or of that in a file; `table` is completed."""
    if place.is_dir():
        files = weights.files(place)
        stored, file = weights.headers(place), files[0]
    else:
        from tinydiff.checkpoints import single_file

        read, file = header(place), place
        places = single_file.required(read, VAE).places
        stored = {ours: read.tensors[at.name] for ours, at in places.items()}
    said = shown(place / "config.json") if place.is_dir() else f"the {VAE} of {shown(place)}"
    refuse(agreement.of_weights(network, network.shapes(table), stored, said, shown(file)))


def refuse(problems: Iterable[str]) -> None:
    """Raise ModelError for the first of some problems."""
    if problem := next(iter(problems), None):
        raise ModelError(f"{problem}; copy or download the model again" if ";" not in problem else problem)
