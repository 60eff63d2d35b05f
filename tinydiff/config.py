"""What a training run is made of: frozen dataclasses, read from `tinydiff.toml` and `--set key=value`.

The tables of networks and of stages are those of `networks` and `stages`, so that a new kind brings its own. Keys of networks
are those of diffusers and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.diffusion.schedules import SCHEDULES, SPACINGS
from tinydiff.errors import UsageError
from tinydiff.networks import AUTOENCODERS, DENOISERS, TEXT_ENCODERS
from tinydiff.networks import Denoiser as Network
from tinydiff.networks import TextEncoder as TextNetwork
from tinydiff.networks.autoencoder import Autoencoder, AutoencoderNetwork
from tinydiff.networks.contrastive import NETWORK as CONTRASTIVE
from tinydiff.networks.growth import Growth
from tinydiff.networks.text import TextEncoder
from tinydiff.networks.unet import UNet
from tinydiff.schema import brief, build, extended, key, merge, read_toml, section, set_key, to_dict
from tinydiff.stages import ADAPTERS, CONTROL, NONE, STAGES, Stage, possible, trained
from tinydiff.system import shown

FILES, NAMES = "files", "names"  # where captions are from
Say = Callable[[str], object]
Table = dict[str, Any]
DENSITIES, PRECISIONS = ("uniform", "high_noise", "logit_normal"), ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Data:
    path: str | tuple[str, ...] = key(
        "shapes", "a folder of captioned images, several in a list, or the built-in 'shapes'"
    )
    resolution: int = key(32, "images are resized and cropped to this square, in pixels", 8, 4096)
    samples: int = key(60000, "how many images 'shapes' draws for the latent cache", 1)
    background: str = key("#ffffff", "what shows through transparent pixels")
    max_bad_fraction: float = key(
        0.5, "unusable images above this share are an error; others are left out and listed", 0, 1
    )
    flip: bool = key(False, "also train on mirror images")
    held_out: float = key(0.02, "share of the images kept to measure on, 512 at most; none if fewer than 8", 0, 0.9)
    validation: str = key("", "a folder of other captioned images to measure on, instead of held-out ones")
    max_aspect_ratio: float = key(1.0, "longest over shortest side of a training image; 1 crops all to squares", 1, 8)
    bucket_step: int = key(16, "sides of images that are no squares are multiples of this, in pixels", 1, 512)
    captions: str = key("files", "where captions are from: files, names (of the images), or column:NAME of a table")
    max_captions: int = key(0, "captions of an image that are used, its first ones; 1 is the first line; 0 is all", 0)
    prefix: str = key("", "what is put before each caption, with the space after it if there is to be one")
    suffix: str = key("", "what is put after each caption")
    shuffle_tags: bool = key(
        False, "training reads the tags of a caption, which commas separate, in another order each time"
    )
    keep_tags: int = key(0, "the first tags of a caption, which stay first and are never left out", 0)
    tag_dropout: float = key(0.0, "share of the other tags that training leaves out, others each time", 0, 1)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def retells(self) -> bool:
        """Whether training reads captions otherwise than they stand."""
        return self.shuffle_tags or self.tag_dropout > 0


@dataclass(frozen=True)
class Denoiser:
    kind: str = key("unet", "a U-Net or a diffusion transformer, each with a table of its own", choices=DENOISERS)


@dataclass(frozen=True)
class Diffusion:
    schedule: str = key("cosine", "training noise levels", choices=tuple(SCHEDULES))
    num_train_timesteps: int = key(1000, "how many of them", 10, 100_000)
    zero_terminal_snr: bool = key(False, "the noisiest level has no signal left (not for flow, nor for epsilon)")
    shift: float = key(1.0, "multiplies the noise-to-signal ratio of every level of flow", 0.01, 100)
    shift_side: int = key(
        0, "latents a side at which `shift` holds: at others it grows in proportion; 0: at any", 0, 2**14
    )
    prediction: str = key("v", "what the network predicts", choices=tuple(PREDICTIONS))
    timestep_density: str = key("high_noise", "how training picks levels", choices=DENSITIES)
    logit_mean: float = key(0.0, "of timestep_density logit_normal: its mean; above 0 is noisier", -10, 10)
    logit_std: float = key(1.0, "of timestep_density logit_normal: its standard deviation", 0.01, 10)
    loss_weight: str = key("own", "the prediction whose squared error is minimised", choices=("own", *PREDICTIONS))
    min_snr_gamma: float = key(0.0, "clips the loss weight at this signal-to-noise ratio; 0 is off", 0)
    contrastive_weight: float = key(0.0, "weight of the distance from another image's target, which is to grow", 0, 0.9)
    offset_noise: float = key(0.0, "share of noise that is constant over each channel", 0, 1)
    caption_dropout: float = key(0.1, "share of captions emptied, which guidance needs", 0, 1)
    label_dropout: float = key(0.1, "share of classes left out, where the denoiser is told one", 0, 1)
    image_dropout: float = key(0.1, "share of other images left out, where the denoiser is told one", 0, 1)


@dataclass(frozen=True)
class Train:
    seed: int = key(0, "key of all randomness", 0, 2**63 - 1)
    base: str = key("", "begin with this model, which then says its networks, noise levels and prediction")
    learn: str = key("all", "what of that learns: all, denoiser, attention, or parts of parameters' names, with commas")
    time: int = key(
        0,
        "seconds that the run takes: its stages get the steps that fit, as fast as they prove; 0: as their steps say",
        0,
    )
    adapter: str = key(NONE, "what is trained beside that instead", choices=(NONE, *ADAPTERS))
    precision: str = key("auto", "arithmetic; auto is bf16 where the hardware has it", choices=PRECISIONS)
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
    keep_best: bool = key(
        False, "keep the checkpoint with the lowest held-out loss too; it becomes the model, not the last"
    )
    validation_samples: int = key(
        128, "samples at each look, for a Fréchet distance to real images; 0 is none", 0, 50_000
    )
    grow: tuple[Growth, ...] = key(
        (),
        "how the denoiser grows: tables of a step and what there is from it on, of layers, widths, resolution, attention",
    )
    tensorboard: bool = key(False, "write TensorBoard events too; needs tinydiff[tensorboard]")

    def stage(self, name: str) -> Any:
        """The settings of a stage."""
        return getattr(self, name)


@dataclass(frozen=True)
class Generate:
    steps: int = key(20, "sampling steps", 1, 1000)
    cfg_scale: float = key(3.0, "guidance: 1 is the plain conditional model", 0, 100)
    sampler: str = key("deis", "solver", choices=tuple(SAMPLERS))
    spacing: str = key("log_snr", "which noise levels are visited", choices=SPACINGS)
    batch_size: int = key(8, "images at once", 1, 4096)

    @property
    def schedule(self) -> str:
        """The former name of `spacing`."""
        return self.spacing

    @property
    def few_calls(self) -> bool:
        """Whether these are of a model that was distilled."""
        return self.sampler == "lcm" and self.cfg_scale <= 1


@dataclass(frozen=True)
class Config:
    """A whole configuration; `whole` gives the class with the tables of networks and stages too."""

    data: Data = section(Data, "the images")
    autoencoder: Autoencoder = section(Autoencoder, "image <-> latent")
    text_encoder: TextEncoder = section(TextEncoder, "prompt -> vectors")
    denoiser: Denoiser = section(Denoiser, "latents, noise level and vectors -> prediction")
    diffusion: Diffusion = section(Diffusion, "what noise is, and what is predicted")
    train: Train = section(Train, "how")
    generate: Generate = section(Generate, "defaults of the trained model")

    @property
    def network(self) -> Any:
        """The settings of the denoiser's kind."""
        return getattr(self, self.denoiser.kind)

    @property
    def columns(self) -> tuple[str, ...]:
        """What else of the data the denoiser is told."""
        return tuple(name for name in ("label", "image") if getattr(self.network, name, NONE) != NONE)

    @property
    def denoiser_network(self) -> Network:
        return DENOISERS[self.denoiser.kind]

    @property
    def autoencoder_network(self) -> AutoencoderNetwork:
        return AUTOENCODERS[self.autoencoder.kind]

    @property
    def text_network(self) -> TextNetwork:
        return TEXT_ENCODERS[self.text_encoder.kind]

    @property
    def shift(self) -> float:
        """Of the levels of flow: sqrt(m / n) times that for n latents where there are m (Esser et al. 2024, equation 23)."""
        d = self.diffusion
        return d.shift * self.latents["sample_size"] / d.shift_side if d.shift_side else d.shift

    @property
    def latents(self) -> dict[str, int]:
        """Side and channels of the latents, as a denoiser's `config.json` has them."""
        channels = self.autoencoder.channels
        side = self.data.resolution // self.autoencoder.factor
        return {"sample_size": side, "in_channels": channels, "out_channels": channels}


def whole() -> type[Config]:
    """The class of configurations with a table for each kind of denoiser and each stage there is."""
    return _whole(tuple(DENOISERS.items()), tuple(STAGES.items()))


@lru_cache
def _whole(denoisers: tuple[tuple[str, Network], ...], stages: tuple[tuple[str, Any], ...]) -> type[Config]:
    train = extended(Train, tuple((name, row.settings, row.section) for name, row in stages))
    tables = [(name, row.settings, section(row.settings, row.doc, "denoiser")) for name, row in denoisers]
    return extended(Config, (*tables, ("train", train, section(train, "how"))))


def grown(config: Config, growths: Sequence[Growth]) -> Config:
    """The configuration of the denoiser, and of its images, after some growths."""
    for growth in growths:
        data = replace(config.data, resolution=growth.resolution or config.data.resolution)
        config = replace(config, data=data, **{config.denoiser.kind: config.denoiser_network.grown(config, growth)})
    return config


def make(**tables: Any) -> Config:
    """A configuration of tables, each a dict or a dataclass of the keys that are not at their defaults. Raises UsageError."""
    problems: list[str] = []
    given = {name: asdict(table) if is_dataclass(table) else table for name, table in tables.items()}  # type: ignore[call-overload]
    config = build(whole(), given, "", problems)
    if problems:
        raise UsageError("; ".join(problems))
    return config


def load(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    say: Say = lambda text: None,
    stored: bool = False,
    model: Callable[[Train], tuple[Table, Table]] | None = None,
) -> Config:
    """Configuration from a TOML file (the defaults without one) and `section.key=value` overrides.

    `say` hears how an old file should be written today. A given autoencoder says its keys, unless the file is `stored` by a
    run or with a model: then it has them as they were, whatever the autoencoder has become since. `model` gives of the model
    that `train.base` names keys that nobody has to say, and keys that are its own whatever is said. Raises UsageError naming
    every wrong key, type and range at once, with file, key path and the nearest valid name.
    """
    problems: list[str] = []
    table = modern(read_toml(path), str(path), say) if path else {}
    config = build(whole(), table, "", problems)
    if problems:
        raise UsageError(f"{shown(path)}: " + "; ".join(problems))
    over: Table = {}
    for text in overrides:
        set_key(over, text, problems)
    over = modern(over, "--set", say)
    config = build(whole(), merge(to_dict(config), over), "", problems) if overrides else config
    if not problems and config.train.base and model:
        usual, its = model(config.train)
        config = build(whole(), merge(merge(merge(usual, table), over), its), "", problems)
    if not problems and not stored:
        config = replace(config, autoencoder=config.autoencoder_network.completed(config))
    problems += list(conflicts(config)) if not problems else []
    if problems:
        raise UsageError(("--set: " if overrides else f"{shown(path)}: ") + "; ".join(problems))
    return config


def modern(table: dict[str, Any], where: str, say: Say) -> dict[str, Any]:
    """A table as it is written today: [denoiser] once held the U-Net's keys, and spacing was named schedule."""
    if isinstance(drawing := table.get("generate"), dict) and "schedule" in drawing:
        say(f"{where}: generate.schedule: read as generate.spacing; write that")
        table = table | {"generate": {"spacing" if k == "schedule" else k: v for k, v in drawing.items()}}
    old = table.get("denoiser")
    if not isinstance(old, dict) or not (moved := {k: v for k, v in old.items() if k in UNet.__dataclass_fields__}):
        return table
    say(f"{where}: denoiser.{', '.join(moved)}: read as keys of [unet]; write them there")
    kept = {k: v for k, v in old.items() if k not in moved}
    return merge({"unet": moved}, table | {"denoiser": kept})


def unread(config: Config) -> list[str]:
    """The tables that a run which begins with a model does not read: of other kinds of denoisers, and of other stages."""
    if not config.train.base:
        return []
    others = [kind for kind in DENOISERS if kind != config.denoiser.kind]
    return others + [f"train.{name}" for name in STAGES if name not in possible(config.train)]


def conflicts(config: Config) -> Iterator[str]:
    """Keys that are each in range but do not fit together."""
    network, kind = config.denoiser_network, config.denoiser.kind
    yield from _of_data(config)
    yield from _of_sizes(config)
    yield from (f"autoencoder.{problem}" for problem in config.autoencoder_network.conflicts(config))
    yield from (f"{kind}.{problem}" for problem in network.conflicts(config))
    yield from _of_text(config)
    yield from CONTRASTIVE.conflicts(config)
    if (config.diffusion.schedule == "flow") != (config.diffusion.prediction == "flow"):
        yield "diffusion.prediction: flow goes with diffusion.schedule flow, the others do not: diffusers has no other form"
    if config.diffusion.zero_terminal_snr and config.diffusion.prediction in ("epsilon", "flow"):
        yield "diffusion.zero_terminal_snr: of pure noise only v and sample say anything; change diffusion.prediction"
    for name in ("shift", "shift_side"):
        if config.diffusion.schedule != "flow" and getattr(config.diffusion, name) != getattr(Diffusion, name):
            yield f"diffusion.{name}: only the schedule flow is shifted"
    if config.diffusion.min_snr_gamma and config.diffusion.loss_weight != "own":
        yield "diffusion.loss_weight: min_snr_gamma gives x0 a weight of its own; set one of the two"
    if config.generate.steps > (most := config.diffusion.num_train_timesteps):
        yield f"generate.steps: {config.generate.steps} are more than the {most} levels of num_train_timesteps; set {most}"
    aligned = config.train.stage("denoiser").alignment_weight
    if aligned and not network.middle(network.complete(asdict(config.network)))[0]:
        yield f"train.denoiser.alignment_weight: denoiser.kind {kind} has no features to align; set 0"
    heads, processes = network.heads(config), config.train.tensor_parallel
    if processes > 1 and (not heads or config.train.parallel != "fsdp"):
        yield "train.tensor_parallel: only a dit's matrices are shared, with train.parallel fsdp"
    if processes > 1 and heads:
        for name in network.undivided(config.network):
            yield f"{kind}.{name}: heads that processes share out have this in common; set train.tensor_parallel 1"
    if heads % processes:
        yield f"train.tensor_parallel: {processes} does not divide {heads} attention heads"
    if config.train.validation_samples == 1:
        yield "train.validation_samples: one image has no spread to compare; set 2 or more, or 0 for none"
    yield from _of_start(config)
    yield from _of_growth(config)
    yield from _of_columns(config)
    if not (config.train.base or config.train.stage("autoencoder").steps or config.autoencoder.path):
        nothing = "with 0 there is nothing to make latents and images with"
        yield f"train.autoencoder.steps: {nothing}; set 1 or more, or name an autoencoder by autoencoder.path"
    yield from _of_distillation(config)
    for name, row in trained(config.train).items():
        stage: Stage = config.train.stage(name)
        if stage.beta2 == 1:
            yield f"train.{name}.beta2: the second moment never begins at 1; set 0.999"
        if stage.optimizer == "muon" and config.train.parallel == "fsdp" and row.divided:
            yield f"train.{name}.optimizer: muon needs matrices whole on each process; set adamw and lr 1e-3, or ddp"
        if stage.batch_size % stage.accumulate:
            yield f"train.{name}.accumulate: {stage.accumulate} does not divide batch_size {stage.batch_size}"


def _of_data(config: Config) -> Iterator[str]:
    data = config.data
    if not all(data.paths):
        yield "data.path: the name is empty; give a folder, . for the current one, or shapes"
    if "shapes" in data.paths and data.path != "shapes":
        yield "data.path: the built-in shapes go with no folder; write ./shapes for a folder of that name"
    if data.captions not in (FILES, NAMES) and not re.fullmatch(r"column:.*\S.*", data.captions):
        yield f"data.captions: unknown {brief(data.captions)}; set {FILES}, {NAMES} or column:NAME"
    if data.retells and config.text_network.labels:
        yield "data.shuffle_tags, tag_dropout: of a class the caption is the label; leave them out"


def _of_start(config: Config) -> Iterator[str]:
    """Of the model that a run begins with."""
    train = config.train
    if not train.base:
        for name in (name for name in ("learn", "adapter") if getattr(train, name) != getattr(Train, name)):
            yield f"train.{name}: of a model to begin with, and there is none; give --from MODEL"
        return
    if config.autoencoder.path:
        yield "autoencoder.path: a run that begins with a model keeps its autoencoder; leave it out"
    if train.adapter != NONE and train.learn != Train.learn:
        yield f"train.learn: with train.adapter {train.adapter} nothing of the model learns; leave it out"
    if train.adapter == CONTROL and not config.denoiser_network.controlled:
        yield f"train.adapter: {CONTROL} is for U-Nets, and the model of train.base has none; begin with another model"
    if train.adapter != NONE and train.tensor_parallel > 1:
        yield f"train.tensor_parallel: matrices that {train.adapter} changes are not shared; set 1"
    if not trained(train):
        yield f"train.{'denoiser' if train.adapter == NONE else train.adapter}.steps: with 0 nothing learns; set 1 or more"


def _of_growth(config: Config) -> Iterator[str]:
    """Of a denoiser that grows while it is trained."""
    train, denoiser = config.train, config.train.stage("denoiser")
    if not train.grow:
        return
    fixed = {
        "train.base": train.base,
        "train.time": train.time,
        "train.denoiser.alignment_weight": denoiser.alignment_weight,
    }
    fixed |= {"train.parallel": train.parallel} if train.parallel != Train.parallel else {}
    fixed |= {"train.tensor_parallel": train.tensor_parallel} if train.tensor_parallel > 1 else {}
    yield from (
        f"train.grow: nothing grows with {key} {brief(value)}; leave one out" for key, value in fixed.items() if value
    )
    now, last = replace(config, train=replace(train, grow=())), 0
    known = {*conflicts(now)}
    for growth in train.grow:
        where = f"train.grow: step {growth.step}"
        if not last < growth.step < denoiser.steps:
            yield f"{where}: not after {last} and before train.denoiser.steps {denoiser.steps}"
        if problems := [*now.denoiser_network.ungrown(now, growth)]:
            yield from (f"{where}: {problem}" for problem in problems)
            return
        now, last = grown(now, [growth]), growth.step
        yield from (f"{where}: {problem}" for problem in conflicts(now) if problem not in known)


def _of_columns(config: Config) -> Iterator[str]:
    """Of what else the denoiser is told."""
    kind = config.denoiser.kind
    for column in config.columns:
        if "distill" in trained(config.train):
            yield f"train.distill.steps: guidance by {kind}.{column} is not distilled; set 0"
        if config.train.adapter == CONTROL:
            yield f"train.adapter: {CONTROL} goes with no {kind}.{column}; begin with another model"
    if "image" in config.columns and config.data.path == "shapes":
        yield f"{kind}.image: shapes have no other images; set data.path to a folder with a column image, or none"


def _of_distillation(config: Config) -> Iterator[str]:
    """Of the stage that makes of a trained denoiser one that draws from its noisiest level in few calls."""
    if "distill" not in trained(config.train):
        return
    stage, most = config.train.stage("distill"), config.diffusion.num_train_timesteps
    fits = min(-(-stage.levels // stage.calls), most // stage.calls) * stage.calls
    fix = f"set {fits}" if fits else f"set train.distill.calls {most} or less"
    if stage.levels % stage.calls:
        yield f"train.distill.levels: {stage.levels} is no multiple of {stage.calls} calls, whose levels must be learnt; {fix}"
    if stage.levels > most:
        yield f"train.distill.levels: {stage.levels} are more than the {most} of diffusion.num_train_timesteps; {fix}"
    if "denoiser" not in trained(config.train) and not config.train.base:
        yield "train.distill.steps: there is no denoiser to distil with train.denoiser.steps 0"
    if config.diffusion.prediction == "epsilon":
        yield "train.distill.steps: of pure noise, where few calls begin, epsilon says nothing; set diffusion.prediction=v"


def reduction(config: Config) -> int:
    """Pixels along a side that the networks read as one at their lowest resolution."""
    network = config.denoiser_network
    return config.autoencoder.factor * network.reduction(network.complete(asdict(config.network)))


def _of_sizes(config: Config) -> Iterator[str]:
    """Of the image and what the networks reduce it to."""
    down, resolution = reduction(config), config.data.resolution
    if resolution % down:
        low = max(down, resolution // down * down)
        yield f"data.resolution: {resolution} is no multiple of {down}; nearest are {low} and {low + down}"
    step, squares = config.data.bucket_step, config.data.max_aspect_ratio <= 1
    if not squares and step % down:
        yield f"data.bucket_step: {step} is no multiple of {down}, by which the networks reduce an image"
    if not squares and resolution % step:
        yield f"data.bucket_step: {step} does not divide data.resolution {resolution}"


def _of_text(config: Config) -> Iterator[str]:
    text = config.text_encoder
    if text.hidden_size % text.num_attention_heads:
        yield "text_encoder.num_attention_heads: does not divide hidden_size"
    if config.text_network.frozen != bool(text.path):
        kinds = " or ".join(name for name, row in TEXT_ENCODERS.items() if row.frozen)
        yield f"text_encoder.path: names the folder of a frozen text encoder, with text_encoder.kind {kinds}"
    if text.kind not in config.denoiser_network.reads:
        kinds = " or ".join(name for name, row in DENOISERS.items() if text.kind in row.reads)
        yield f"text_encoder.kind: {text.kind} goes with denoiser.kind {kinds}"
