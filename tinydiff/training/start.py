"""The model that a run begins with: opened, and told what of it learns."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from tinydiff import config
from tinydiff.checkpoints import folder, new, scheduler
from tinydiff.checkpoints.source import Source
from tinydiff.errors import UsageError
from tinydiff.networks import VAE, denoiser_in, network_of
from tinydiff.schema import brief
from tinydiff.stages import NONE

ATTENTION = (".attn1.", ".attn2.")  # in names of a denoiser's parameters
SHOWN = 3  # names of parameters


def opened(source: Source, cfg: config.Config) -> folder.Model:
    """The model of a source as the configuration trains it, its images of `data.resolution`. Raises ModelError, UsageError."""
    name, side = denoiser_in(source.configs), cfg.latents["sample_size"]
    source.configs[name] = source.configs[name] | {"sample_size": side}
    own = source.description.generate
    model = replace(folder.load(source), generate=cfg.generate)
    choose(model, "" if cfg.train.adapter != NONE else cfg.train.learn)
    return described(model, cfg) if cfg.generate != own else model


def choose(model: folder.Model, learn: str) -> None:
    """Set what of a model learns, in memory of its own: what `train.learn` says, "" for nothing. Raises UsageError."""
    names = {"all": [""], "denoiser": [f"{denoiser_in(model.configs)}."], "attention": ATTENTION}
    parts = names.get(learn) or [part for part in map(str.strip, learn.split(",")) if part]
    may = {name: part for name, part in model.networks.items() if name != VAE and not frozen(model, name)}
    for part in model.networks.values():
        part.requires_grad_(False)
    learnt = [p for n, p in parameters(may) if any(part in n for part in parts)]
    for p in learnt:
        p.data = p.data.clone()  # what is mapped from the model's files is not written to
        p.requires_grad_(True)
    if learn and not learnt:
        some = ", ".join(name for name, _ in list(parameters(may))[:SHOWN])
        raise UsageError(f"train.learn: {brief(learn)} is in no parameter's name; there are {some}, ...")


def frozen(model: folder.Model, name: str) -> bool:
    """Whether a network is never trained."""
    return getattr(network_of(name, model.configs[name]), "frozen", False)


def parameters(parts: dict[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Of some networks by folder, each parameter with its name."""
    return [(f"{name}.{n}", p) for name, part in parts.items() for n, p in part.named_parameters()]


def described(model: folder.Model, cfg: config.Config) -> folder.Model:
    """The model with its JSON files for the sampler of another configuration, whose noise levels are its own. UsageError."""
    written = scheduler.write(cfg)
    if scheduler.read(written, ours=True).schedule != model.description.schedule:
        problem = "its noise levels have no name here, so that another sampler cannot be written with them"
        raise UsageError(f"[generate]: {problem}; leave out keys of [generate], and train.distill")
    index = model.configs["model_index"] | {"scheduler": ["diffusers", written["_class_name"]]}
    index |= {new.VERSION: new.__version__}
    return replace(model, configs=model.configs | {"scheduler": written, "model_index": index}, generate=cfg.generate)
