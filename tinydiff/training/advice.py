"""What a person should hear before a run begins: keys that have no effect together, and captions that are cut.

Each is in range by itself; what cannot work at all is refused by `config.conflicts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from math import lcm
from operator import attrgetter
from typing import Any

from tinydiff import config
from tinydiff.data.dataset import Source, buckets
from tinydiff.data.facts import Facts
from tinydiff.networks import DENOISERS
from tinydiff.stages import NONE, STAGES, trained
from tinydiff.system import cut, shown

LOOKED_AT = 100_000  # captions
FEW, EACH, EQUAL, HARD = (
    50,
    5,
    0.5,
    0.2,
)  # images, captions an image, share of one caption, share of images cut or enlarged
TUNED = 1e-3  # rate above which an autoencoder that is tuned on gets worse before it gets better
WEIGHED = {  # keys of the autoencoder's stage that only the loss of a weight reads
    "perceptual_weight": ("features",),
    "adversarial_weight": ("adversarial_start", "critic_lr", "critic_width", "critic_halvings"),
}


def of_settings(cfg: config.Config) -> Iterator[str]:
    """Keys that do nothing in this configuration, each with the nearest value that does something."""
    stages = {f"train.{name}": cfg.train.stage(name) for name in trained(cfg.train)}
    for name, stage in stages.items():
        yield from _of_stage(name, stage, bool(cfg.train.time))
    if (every := cfg.train.keep_every) and not any(_kept(every, stage) for stage in stages.values()):
        multiples = " or ".join(f"{name}.save_every ({stage.save_every})" for name, stage in stages.items())
        yield f"train.keep_every: no checkpoint is at a multiple of {every}; set a multiple of {multiples}"
    if stage := stages.get("train.autoencoder"):
        if stage.adversarial_weight and stage.adversarial_start >= stage.steps:
            problem = f"the critic would begin after the last of {stage.steps} updates"
            yield f"train.autoencoder.adversarial_start: {problem}; set {stage.steps // 2}"
        if cfg.autoencoder.path and stage.lr > TUNED:
            yield f"train.autoencoder.lr: {stage.lr:g} first undoes what a given autoencoder has learnt; set 0.0003"
    if cfg.diffusion.caption_dropout == 0 and cfg.generate.cfg_scale > 1:
        yield "diffusion.caption_dropout: at 0 guidance has nothing to compare with; set 0.1, or generate.cfg_scale=1"
    if cfg.diffusion.caption_dropout == 1:
        yield "diffusion.caption_dropout: at 1 no caption is ever read; 0.1 is usual"
    yield from _of_buckets(cfg.data, config.reduction(cfg))
    for keys, reason in _unused(cfg):
        yield f"{', '.join(keys)}: of no effect, {reason}"


def of_data(cfg: config.Config, facts: Facts) -> Iterator[str]:
    """What these images and captions will not teach, each with what mends it."""
    data, stages = cfg.data, {name: cfg.train.stage(name) for name in trained(cfg.train)}
    alone = cfg.train.adapter == NONE and not cfg.train.base
    if facts.count < FEW and alone:
        more = "add images, or change a model that knows more with --from emoji --adapter lora"
        yield f"{facts.count} images are few: a model learns them by heart; {more}"
    for name, stage in stages.items():
        if stage.batch_size > facts.count:
            fix = f"set {1 << max(0, (facts.count // 2).bit_length() - 1)}"
            yield f"train.{name}.batch_size: {stage.batch_size} of {facts.count} images: an update has some twice; {fix}"
    if facts.each > EACH:
        many = max(facts.captions, key=len)
        told = " / ".join(shown(cut(text, 30)) for text in many[:3])
        fix = "keep one language, or set data.max_captions=1, which reads the first of each"
        yield f"captions: {facts.each:.0f} an image, such as {told}: each is seldom read; if they are translations, {fix}"
    (text, most), *_ = facts.distinct.most_common(1)
    if most > max(1, EQUAL * len(facts.captions)) and alone:
        problem = f"{most / len(facts.captions):.0%} of the images have the same, {shown(cut(text, 40))!r}"
        yield f"captions: {problem}: prompts can tell nothing apart; write what each image shows"
    if (small := facts.smaller(data.resolution)) > HARD:
        fix = f"set data.resolution={max(16, 1 << facts.side.bit_length() - 1)}, or take larger ones"
        yield f"data.resolution: {small:.0%} of the images are smaller than {data.resolution} pixels and are enlarged; {fix}"
    if (hard := facts.cropped(data.resolution, data.max_aspect_ratio, data.bucket_step)) > HARD:
        fix = f"set data.max_aspect_ratio={max(2, round(data.max_aspect_ratio + 1))}"
        yield f"data.max_aspect_ratio: {hard:.0%} of the images lose over a quarter of their area by cropping; {fix}"


def _of_stage(name: str, stage: Any, timed: bool) -> Iterator[str]:
    if 2 * stage.warmup > stage.steps and not timed:
        problem = f"{stage.warmup} updates of a run of {stage.steps}, which is hardly at the learning rate"
        yield f"{name}.warmup: {problem}; set {stage.steps // 10}"
    if stage.lr == 0:
        yield f"{name}.lr: at 0 nothing is learnt; 0.001 is usual"


def _kept(every: int, stage: Any) -> bool:
    """Whether a checkpoint is at a multiple of `every`; the last step has one too."""
    return lcm(every, stage.save_every) <= stage.steps or stage.steps % every == 0


def _of_buckets(data: config.Data, down: int) -> Iterator[str]:
    """Sizes other than the square that there could be, and are not."""
    ratio, side = data.max_aspect_ratio, data.resolution
    if ratio > 1 and len(buckets(side, ratio, data.bucket_step)) == 1:
        steps = (step for step in range(data.bucket_step, 0, -1) if side % step == 0 and step % down == 0)
        step = next((step for step in steps if len(buckets(side, ratio, step)) > 1), 0)
        fix = f"set data.bucket_step={step}" if step else "set data.max_aspect_ratio=1, or a higher one"
        yield f"data.max_aspect_ratio: only squares are multiples of {data.bucket_step} and within {ratio:g}:1; {fix}"


def _unused(cfg: config.Config) -> Iterator[tuple[list[str], str]]:
    """Keys that are not at their defaults, and why nothing reads them."""
    usual, kind, text = config.make(), cfg.denoiser.kind, cfg.text_encoder.kind
    changed = [*_changed("data", cfg, usual), *_changed("text_encoder", cfg, usual)]
    tables = [(other, f"denoiser.kind is {kind}") for other in DENOISERS if other != kind]
    rules = [(_changed(name, cfg, usual), reason) for name, reason in tables]
    sized = [key for key in changed if key.startswith("text_encoder.") and key.split(".")[1] not in ("kind", "path")]
    if text != "clip":
        rules.append(
            ([key for key in sized if not key.endswith("max_position_embeddings")], f"text_encoder.kind is {text}")
        )
    if cfg.data.path != "shapes":
        rules.append(([key for key in changed if key == "data.samples"], "data.path is no 'shapes'"))
    else:
        rules.append((_named(changed, ("captions", "max_captions", "prefix", "suffix")), "data.path is 'shapes'"))
    if not cfg.data.retells:
        rules.append((_named(changed, ("keep_tags",)), "neither data.shuffle_tags nor data.tag_dropout is set"))
    if cfg.data.max_aspect_ratio <= 1:
        rules.append(([key for key in changed if key == "data.bucket_step"], "data.max_aspect_ratio is 1"))
    if kind == "dit" and cfg.network.size != "custom":
        own = _named(_changed("dit", cfg, usual), ("num_layers", "num_attention_heads", "attention_head_dim"))
        rules.append((own, f"dit.size is {cfg.network.size}; custom reads them"))
    yield from ((keys, reason) for keys, reason in (*rules, *_of_stages(cfg, usual)) if keys)


def _of_stages(cfg: config.Config, usual: config.Config) -> Iterator[tuple[list[str], str]]:
    """The same of keys of stages: those of a stage that is left out, and of losses that are."""
    changed = {name: _changed(f"train.{name}", cfg, usual) for name in STAGES}
    for name in (name for name in STAGES if name not in trained(cfg.train)):
        yield [key for key in changed[name] if not key.endswith(".steps")], _left_out(name, cfg)
    kind, of_codes = cfg.autoencoder.kind, "num_vq_embeddings" not in cfg.autoencoder_network.apart
    others = ("kl_weight",) if of_codes else ("codebook", "commitment_weight")
    unread = [k for k in _changed("autoencoder", cfg, usual) if not of_codes and k.endswith(".num_vq_embeddings")]
    if "autoencoder" in trained(cfg.train):
        stage = cfg.train.stage("autoencoder")
        for weight in (weight for weight in WEIGHED if not getattr(stage, weight)):
            yield _named(changed["autoencoder"], WEIGHED[weight]), f"train.autoencoder.{weight} is 0"
        unread = _named(changed["autoencoder"], others) + unread
    yield unread, f"autoencoder.kind is {kind}"


def _left_out(name: str, cfg: config.Config) -> str:
    return f"this run does not train {name}" if cfg.train.stage(name).steps else f"train.{name}.steps is 0"


def _named(keys: list[str], names: Sequence[str]) -> list[str]:
    """Those of some keys that end in one of some names."""
    return [key for key in keys if key.rpartition(".")[2] in names]


def _changed(table: str, cfg: config.Config, usual: config.Config) -> list[str]:
    ours, theirs = (asdict(attrgetter(table)(each)) for each in (cfg, usual))
    return [f"{table}.{key}" for key in ours if ours[key] != theirs[key]]


def of_captions(source: Source, tokenizers: Sequence[Any], opened: bool = False) -> str:
    """How many captions are longer than what the model, which may have been `opened`, reads of them; "" for none."""
    tokenizer = next((each for each in tokenizers if hasattr(each, "ids")), None)
    if tokenizer is None:
        return ""  # labels
    texts = (caption for i in range(len(source)) for caption in source.captions(i))
    looked, room = list(dict.fromkeys(islice(texts, LOOKED_AT))), tokenizer.max_length - 1 - (tokenizer.bos is not None)
    lengths = {text: len(tokenizer.ids(text)) for text in looked if len(text.encode("utf-8", "replace")) > room}
    long = [text for text, length in lengths.items() if length > room]
    if not long:
        return ""
    examples = "; ".join(f"{cut(text, 80)!r} without {cut(tokenizer.cut(text), 40)!r}" for text in long[:3])
    most = max(lengths.values()) + tokenizer.max_length - room
    fix = f"all of them are read with text_encoder.max_position_embeddings={most}"
    fix = "the model reads no more" if opened else fix
    return f"{len(long)} of {len(looked)} captions are longer than the {room} tokens read of one, and are cut: {examples}; {fix}"
