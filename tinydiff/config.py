"""What a training run is made of: frozen dataclasses, read from `tinydiff.toml` and `--set key=value`.

The dataclasses are the only place where a key, its default, its range and its one-line meaning stand; the commented
`tinydiff.toml` is printed from them. Keys of networks are those of diffusers and transformers. It knows no network.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.diffusion.schedules import SCHEDULES, SPACINGS
from tinydiff.errors import UsageError
from tinydiff.files import shown

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


MAX_LIST = 16


def key(
    default: Any, doc: str, low: float | None = None, high: float | None = None, choices: Sequence[str] = ()
) -> Any:
    """A configuration key: default, meaning, closed range, allowed names."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": tuple(choices)})


def section(kind: type, doc: str, **changes: Any) -> Any:
    """A nested table."""
    return field(default_factory=lambda: kind(**changes), metadata={"doc": doc})


@dataclass(frozen=True)
class Data:
    path: str = key("shapes", "a folder of captioned images, or the built-in 'shapes'")
    resolution: int = key(32, "images are resized and cropped to this square, in pixels", 8, 4096)
    samples: int = key(60000, "how many images 'shapes' draws for the latent cache", 1)
    background: str = key("#ffffff", "what shows through transparent pixels")
    max_bad_fraction: float = key(0.01, "unreadable images above this share are an error", 0, 1)
    flip: bool = key(False, "also train on mirror images")
    max_aspect_ratio: float = key(1.0, "longest over shortest side of a training image; 1 crops all to squares", 1, 8)
    bucket_step: int = key(16, "sides of images that are no squares are multiples of this, in pixels", 1, 512)


@dataclass(frozen=True)
class Autoencoder:
    block_out_channels: tuple[int, ...] = key((32, 64, 64), "widths; each after the first halves the resolution", 1)
    layers_per_block: int = key(1, "residual blocks a level", 1, 16)
    latent_channels: int = key(4, "channels of a latent", 1, 64)
    norm_num_groups: int = key(8, "group normalisation groups; must divide every width", 1)
    mid_block_add_attention: bool = key(False, "self-attention at the lowest resolution")


@dataclass(frozen=True)
class TextEncoder:
    kind: str = key(
        "clip",
        "CLIP's tower, trained; a T5 encoder from the folder `path`, kept as it is; or captions as classes (dit only)",
        choices=("clip", "t5", "class"),
    )
    path: str = key("", "T5: a folder with text_encoder/ and tokenizer/, as a diffusers pipeline has them")
    vocab_size: int = key(1024, "most tokens of the byte-pair tokenizer trained on the captions", 514, 1_000_000)
    hidden_size: int = key(192, "width", 8)
    intermediate_size: int = key(384, "width inside a block's multilayer perceptron", 8)
    num_hidden_layers: int = key(3, "transformer blocks", 1, 64)
    num_attention_heads: int = key(3, "attention heads; must divide hidden_size", 1)
    max_position_embeddings: int = key(16, "tokens of a prompt, start and end included", 4, 4096)
    hidden_act: str = key("quick_gelu", "activation", choices=("quick_gelu", "gelu"))


@dataclass(frozen=True)
class Denoiser:
    kind: str = key(
        "unet", "a U-Net of the sizes below, or the diffusion transformer of [dit]", choices=("unet", "dit")
    )
    block_out_channels: tuple[int, ...] = key((64, 192), "widths; each after the first halves the resolution", 1)
    down_block_types: tuple[str, ...] = key(
        ("DownBlock2D", "CrossAttnDownBlock2D"),
        "one a width: with cross-attention to the text, or without",
        choices=("CrossAttnDownBlock2D", "DownBlock2D"),
    )
    layers_per_block: int = key(1, "residual blocks (and transformers) a level", 1, 16)
    transformer_layers_per_block: int = key(1, "transformer blocks behind each residual block", 1, 16)
    attention_head_dim: int | tuple[int, ...] = key(
        4, "attention heads, or a list with one number a width (diffusers' name; it is not their width)", 1
    )
    norm_num_groups: int = key(32, "group normalisation groups; must divide every width", 1)
    use_linear_projection: bool = key(True, "transformers enter and leave by matrices, not 1x1 convolutions")

    def heads(self) -> tuple[int, ...]:
        """Attention heads at each width."""
        each = self.attention_head_dim
        return each if isinstance(each, tuple) else (each,) * len(self.block_out_channels)


# Table 1 of Peebles & Xie 2023: transformer blocks, attention heads, width of a head.
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}


@dataclass(frozen=True)
class DiT:
    size: str = key("S", "a size of the paper, or custom: that of the three keys below", choices=(*SIZES, "custom"))
    patch_size: int = key(2, "latents a token along each side: 2, 4 or 8", 2, 8)
    num_layers: int = key(12, "transformer blocks", 1, 128)
    num_attention_heads: int = key(6, "attention heads", 1, 256)
    attention_head_dim: int = key(64, "width of each head", 1, 1024)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Transformer blocks, attention heads, width of a head."""
        return SIZES.get(self.size, (self.num_layers, self.num_attention_heads, self.attention_head_dim))

    def conflicts(self, side: int) -> Iterator[str]:
        """Keys that are each in range but fit neither each other nor latents of `side` a side."""
        _, heads, width = self.shape
        if self.patch_size not in (2, 4, 8):
            yield f"patch_size: {self.patch_size} is none of 2, 4, 8"
        elif side % self.patch_size:
            yield f"patch_size: {self.patch_size} does not divide the latents' side {side}"
        if heads * width % 4:
            yield f"attention_head_dim: {heads} heads of {width} are no multiple of 4, which the places' sines need"


@dataclass(frozen=True)
class Diffusion:
    schedule: str = key("cosine", "training noise levels", choices=tuple(SCHEDULES))
    num_train_timesteps: int = key(1000, "how many of them", 10, 100_000)
    zero_terminal_snr: bool = key(False, "the noisiest level has no signal left (not for flow, nor for epsilon)")
    shift: float = key(1.0, "multiplies the noise-to-signal ratio of every level of flow", 0.01, 100)
    prediction: str = key("v", "what the network predicts", choices=tuple(PREDICTIONS))
    timestep_density: str = key(
        "high_noise", "how training picks levels", choices=("uniform", "high_noise", "logit_normal")
    )
    min_snr_gamma: float = key(0.0, "clips the loss weight at this signal-to-noise ratio; 0 is off", 0)
    offset_noise: float = key(0.0, "share of noise that is constant over each channel", 0, 1)
    caption_dropout: float = key(0.1, "share of captions emptied, which guidance needs", 0, 1)


@dataclass(frozen=True)
class Stage:
    steps: int = key(2000, "updates", 1)
    batch_size: int = key(64, "images an update", 1)
    accumulate: int = key(1, "parts a batch is computed in, to save memory; must divide batch_size", 1)
    lr: float = key(1e-3, "peak learning rate", 0)
    warmup: int = key(100, "updates of linear warm-up before the cosine decay", 0)
    final_lr: float = key(0.01, "learning rate at the last update, as a share of the peak", 0, 1)
    weight_decay: float = key(0.01, "AdamW's decoupled decay", 0)
    beta2: float = key(0.99, "AdamW's second-moment decay", 0, 1)
    clip: float = key(1.0, "largest gradient norm", 0)
    ema: float = key(0.999, "decay of the averaged weights that the model folder holds", 0, 1)
    save_every: int = key(500, "updates between checkpoints", 1)
    sample_every: int = key(500, "updates between pictures", 1)


@dataclass(frozen=True)
class AutoencoderStage(Stage):
    kl_weight: float = key(2e-4, "weight of the Kullback-Leibler term, per latent value", 0)
    l2_weight: float = key(1.0, "weight of the squared error beside the absolute error", 0)
    edge_weight: float = key(1.0, "weight of the absolute error of differences between neighbours", 0)


@dataclass(frozen=True)
class Train:
    seed: int = key(0, "key of all randomness", 0, 2**63 - 1)
    precision: str = key(
        "auto", "arithmetic; auto is bf16 where the hardware has it", choices=("auto", "fp32", "bf16", "fp16")
    )
    device: str = key("auto", "where to train", choices=("auto", "cpu", "cuda"))
    threads: int = key(0, "CPU threads; 0 is torch's choice", 0, 1024)
    channels_last: bool = key(True, "memory layout of convolutions")
    compile: bool = key(False, "torch.compile the networks, block by block")
    gradient_checkpointing: bool = key(False, "compute activations again in the backward pass: less memory, more time")
    parallel: str = key(
        "ddp",
        "the denoiser under torchrun: whole on every process (ddp), or its weights divided among them (fsdp)",
        choices=("ddp", "fsdp"),
    )
    tensor_parallel: int = key(1, "processes that share each matrix of a dit; with fsdp, within one machine", 1, 64)
    timeout: int = key(600, "seconds until a process or a read that does not answer ends the run", 1, 86400)
    max_skipped: int = key(10, "updates in a row that may be left out as not finite before the run stops", 1)
    keep: int = key(2, "newest checkpoints kept", 1)
    keep_every: int = key(0, "besides these, checkpoints at multiples of so many steps are kept; 0 is none", 0)
    tensorboard: bool = key(False, "write TensorBoard events too; needs tinydiff[tensorboard]")
    autoencoder: AutoencoderStage = section(
        AutoencoderStage, "stage 1: image -> latent -> image", steps=800, lr=2e-3, save_every=400, sample_every=400
    )
    denoiser: Stage = section(
        Stage, "stage 2: text encoder and denoiser on the latents", steps=2000, warmup=200, ema=0.998
    )


@dataclass(frozen=True)
class Generate:
    steps: int = key(20, "sampling steps", 1, 1000)
    cfg_scale: float = key(3.0, "guidance: 1 is the plain conditional model", 0, 100)
    sampler: str = key("deis", "solver", choices=tuple(SAMPLERS))
    schedule: str = key("log_snr", "which noise levels are visited", choices=SPACINGS)
    batch_size: int = key(8, "images at once", 1, 4096)


@dataclass(frozen=True)
class Config:
    data: Data = section(Data, "the images")
    autoencoder: Autoencoder = section(Autoencoder, "image <-> latent")
    text_encoder: TextEncoder = section(TextEncoder, "prompt -> vectors")
    denoiser: Denoiser = section(Denoiser, "latents, noise level and vectors -> prediction")
    dit: DiT = section(DiT, "the diffusion transformer, where denoiser.kind is dit")
    diffusion: Diffusion = section(Diffusion, "what noise is, and what is predicted")
    train: Train = section(Train, "how")
    generate: Generate = section(Generate, "defaults of the trained model")


def load(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Configuration from a TOML file (the defaults without one) and `section.key=value` overrides.

    Raises UsageError naming every wrong key, type and range at once, with file, key path and the nearest valid name.
    """
    problems: list[str] = []
    config = build(Config, read_toml(path) if path else {}, "", problems)
    if problems:
        raise UsageError(f"{path}: " + "; ".join(problems))
    table: dict[str, Any] = {}
    for text in overrides:
        _set(table, text, problems)
    config = build(Config, merge(to_dict(config), table), "", problems) if overrides else config
    problems += list(conflicts(config)) if not problems else []
    if problems:
        raise UsageError(("--set: " if overrides else f"{path}: ") + "; ".join(problems))
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict; UsageError where it is missing, over 1 MB or not TOML."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UsageError(f"{path}: not a regular file; give a tinydiff.toml")
        data = path.read_bytes()
        if len(data) > 1_000_000:
            raise UsageError(f"{path}: {len(data)} bytes is no configuration; expected a tinydiff.toml")
        return tomllib.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path}: no such configuration; `tinydiff inspect > tinydiff.toml` writes the default"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # besides bad TOML and UTF-8, an integer of thousands of digits
        raise UsageError(f"{path}: not valid TOML: {str(error) or 'nested too deep'}") from None


def _set(table: dict[str, Any], text: str, problems: list[str]) -> None:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        problems.append(f"{brief(text)} is not KEY=VALUE")
        return
    try:
        parsed = tomllib.loads(f"v = {value.strip()}")["v"]
    except (ValueError, RecursionError):
        parsed = value.strip()
    *parents, last = name.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            problems.append(f"{shown(name)[:80]}: set twice, as a value and as a table")
            return
    table[last] = parsed


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, table by table."""
    both = {
        k: merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()
    }
    return base | both


def build(kind: type, table: Any, path: str, problems: list[str]) -> Any:
    """An instance of dataclass `kind` from a table; what is wrong is added to `problems` and left at its default."""
    if not isinstance(table, dict):
        problems.append(f"{path.rstrip('.')}: expected a table, got {brief(table)}")
        return kind()
    hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for name, value in table.items():
        if name not in fields:
            problems.append(f"{path}{shown(name)[:80]}: unknown key{nearest(name, fields)}")
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = build(
                hints[name],
                merge(to_dict(default_of(fields[name])), value) if isinstance(value, dict) else value,
                f"{path}{name}.",
                problems,
            )
        else:
            problem, value = check(hints[name], value, fields[name].metadata)
            problems += [f"{path}{name}: {problem}"] if problem else []
            values |= {} if problem else {name: value}
    return kind(**values)


def default_of(f: dataclasses.Field) -> Any:
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]


def nearest(name: str, names: Any) -> str:
    """The suffix ' (did you mean ...?)' for a mistyped name, or a list of what there is."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean '{close[0]}'?)" if close else f" (there are: {', '.join(names)})"


def check(kind: Any, value: Any, meta: Mapping[str, Any]) -> tuple[str, Any]:
    """(problem, value): '' and the converted value where it is of the kind and in range."""
    if kind == int | tuple[int, ...]:
        kind = tuple[int, ...] if isinstance(value, list | tuple) else int
    if kind in (tuple[int, ...], tuple[str, ...]):
        if not isinstance(value, list | tuple) or not value:
            return f"expected a list, got {brief(value)}", value
        if len(value) > MAX_LIST:
            return f"{len(value)} entries, above {MAX_LIST}", value
        results = [check(int if kind == tuple[int, ...] else str, v, meta) for v in value]
        return next((p for p, _ in results if p), ""), tuple(v for _, v in results)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) is not kind:
        return f"expected {kind.__name__}, got {brief(value)}", value
    if kind is str and any("\ud800" <= c <= "\udfff" for c in value):
        return f"{brief(value)} is not valid Unicode", value
    if meta["choices"] and value not in meta["choices"]:
        return f"unknown name {brief(value)}{nearest(str(value), meta['choices'])}", value
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not finite", value
    for bound, wrong in (("low", lambda b: value < b), ("high", lambda b: value > b)):
        if meta[bound] is not None and wrong(meta[bound]):
            return f"{brief(value)} is {'below' if bound == 'low' else 'above'} {meta[bound]}", value
    return "", value


def brief(value: Any) -> str:
    """A value as a message shows it: on one line, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a table nested too deep
        return f"<{type(value).__name__} too large to show>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def conflicts(config: Config) -> Iterator[str]:
    """Keys that are each in range but do not fit together."""
    yield from _of_sizes(config)
    yield from _of_text(config)
    if (config.diffusion.schedule == "flow") != (config.diffusion.prediction == "flow"):
        yield "diffusion.prediction: flow goes with diffusion.schedule flow, the others do not: diffusers has no other form"
    if config.diffusion.zero_terminal_snr and config.diffusion.prediction in ("epsilon", "flow"):
        yield "diffusion.zero_terminal_snr: of pure noise only v and sample say anything; change diffusion.prediction"
    if config.diffusion.shift != 1 and config.diffusion.schedule != "flow":
        yield "diffusion.shift: only the schedule flow is shifted"
    if config.train.tensor_parallel > 1 and (config.denoiser.kind != "dit" or config.train.parallel != "fsdp"):
        yield "train.tensor_parallel: only a dit's matrices are shared, with train.parallel fsdp"
    if config.denoiser.kind == "dit" and config.dit.shape[1] % config.train.tensor_parallel:
        yield f"train.tensor_parallel: {config.train.tensor_parallel} does not divide {config.dit.shape[1]} attention heads"
    for name, stage in (("autoencoder", config.train.autoencoder), ("denoiser", config.train.denoiser)):
        if stage.batch_size % stage.accumulate:
            yield f"train.{name}.accumulate: {stage.accumulate} does not divide batch_size {stage.batch_size}"


def _of_sizes(config: Config) -> Iterator[str]:
    """Of the image, the autoencoder and the denoiser."""
    factor, unet = 2 ** (len(config.autoencoder.block_out_channels) - 1), config.denoiser
    dit = unet.kind == "dit"
    down = factor * (config.dit.patch_size if dit else 2 ** (len(unet.block_out_channels) - 1))
    if config.data.resolution % down:
        low = max(down, config.data.resolution // down * down)
        yield f"data.resolution: {config.data.resolution} is no multiple of {down}; nearest are {low} and {low + down}"
    if config.data.max_aspect_ratio > 1:
        yield from _of_buckets(config.data, down)
    for name in ("autoencoder",) if dit else ("autoencoder", "denoiser"):
        part = getattr(config, name)
        for width in part.block_out_channels:
            if width % part.norm_num_groups:
                yield f"{name}.norm_num_groups: {part.norm_num_groups} does not divide width {width}"
    if dit:
        yield from (f"dit.{problem}" for problem in config.dit.conflicts(config.data.resolution // factor))
        return
    for width, heads in zip(unet.block_out_channels, unet.heads(), strict=False):
        if width % heads:
            yield f"denoiser.attention_head_dim: {heads} heads do not divide width {width}"
    if len(unet.heads()) != len(unet.block_out_channels):
        yield "denoiser.attention_head_dim: needs one entry for each of block_out_channels, or one number for all"
    if len(unet.down_block_types) != len(unet.block_out_channels):
        yield "denoiser.down_block_types: needs one entry for each of block_out_channels"
    if unet.block_out_channels[0] % 2:
        yield "denoiser.block_out_channels: the first width is also that of the time's sines and cosines; it must be even"


def _of_buckets(data: Data, down: int) -> Iterator[str]:
    """Of the sides of images that are no squares, which the networks reduce `down` times."""
    if data.bucket_step % down:
        yield f"data.bucket_step: {data.bucket_step} is no multiple of {down}, by which the networks reduce an image"
    if data.resolution % data.bucket_step:
        yield f"data.bucket_step: {data.bucket_step} does not divide data.resolution {data.resolution}"


def _of_text(config: Config) -> Iterator[str]:
    text = config.text_encoder
    if text.hidden_size % text.num_attention_heads:
        yield "text_encoder.num_attention_heads: does not divide hidden_size"
    if (text.kind == "t5") != bool(text.path):
        yield "text_encoder.path: names the folder of a T5 encoder, with text_encoder.kind t5 and no other"
    if text.kind == "class" and config.denoiser.kind != "dit":
        yield "text_encoder.kind: class goes with denoiser.kind dit"


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of a configuration, lists as tuples."""
    return dataclasses.asdict(config)


def flat(config: Config) -> dict[str, Any]:
    """Every key as `section.key`: value."""

    def walk(table: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for name, value in table.items():
            yield from walk(value, f"{path}{name}.") if isinstance(value, dict) else [(path + name, value)]

    return dict(walk(to_dict(config), ""))


def to_toml(config: Config) -> str:
    """The configuration as commented TOML; `load` of it gives an equal configuration."""
    lines = ["# tinydiff configuration. Every key with its value; `--set section.key=value` changes one for a run.", ""]
    lines += _table(config, "")
    return "\n".join(lines).rstrip() + "\n"


def _table(part: Any, path: str) -> Iterator[str]:
    nested = []
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if dataclasses.is_dataclass(value):
            nested.append((f, value))
            continue
        choices = f.metadata["choices"]
        doc = f.metadata["doc"] + (f" ({' | '.join(choices)})" if choices else "")
        yield f"{f.name} = {_literal(value)}".ljust(40) + f"  # {doc}"
    for f, value in nested:
        yield ""
        yield f"[{path}{f.name}]".ljust(40) + f"  # {f.metadata['doc']}"
        yield from _table(value, f"{path}{f.name}.")


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in escaped) + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)
