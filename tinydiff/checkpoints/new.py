"""The JSON files of a model that a configuration asks for, before anything of it is built: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinydiff import __version__
from tinydiff.checkpoints import scheduler
from tinydiff.config import Config
from tinydiff.networks import TEXT, VAE, Table
from tinydiff.networks.network import HIDDEN, POOLED
from tinydiff.text.labels import LEAST, Labels

VERSION = "_tinydiff_version"  # a key of model_index.json
SPARED = "_spared"  # another: the columns of data that the denoiser has learnt to do without
ABSENT = {key: [None, None] for key in ("feature_extractor", "image_encoder", "safety_checker")}
# What a pipeline of diffusers has besides, so that it opens the folder.
EXTRAS = {"StableDiffusionPipeline": ABSENT | {"requires_safety_checker": False}}


def configs(cfg: Config, tokenizer: Any, labels: Labels | None = None) -> dict[str, dict[str, Any]]:
    """The JSON files as `Source.configs` has them, for a run's tokenizer, and the classes that a denoiser is told besides."""
    text, denoiser = cfg.text_network, cfg.denoiser_network
    table = text.describe(cfg, tokenizer)
    widths = dict.fromkeys((HIDDEN, POOLED), text.width(table)) | ({"label": labels.vocab_size} if labels else {})
    tables = {denoiser.folder: denoiser.describe(cfg, widths)}
    tables |= {VAE: cfg.autoencoder_network.describe(cfg)} | ({TEXT: table} if not text.labels else {})
    told = {"id2label": labels.table()} if labels else {}
    spared = [column for column in cfg.columns if getattr(cfg.diffusion, f"{column}_dropout")]
    told |= {SPARED: spared} if spared else {}
    return {"model_index": index(cfg, tokenizer, tables) | told, "scheduler": scheduler.write(cfg), **tables}


def index(cfg: Config, tokenizer: Any, tables: Mapping[str, Table]) -> dict[str, Any]:
    """`model_index.json` of a pipeline of diffusers, or of none with the reason."""
    text, denoiser, autoencoder = cfg.text_network, cfg.denoiser_network, cfg.autoencoder_network
    pipeline, reason = denoiser.pipeline(cfg)
    pipeline, reason = ("TinydiffPipeline", autoencoder.no_form) if autoencoder.no_form else (pipeline, reason)
    reason = text.no_form or reason
    if text.labels and tokenizer.pad != LEAST:
        reason = f"its null label is number {tokenizer.pad}, and {LEAST} in diffusers"
    table = {"_class_name": pipeline, VERSION: __version__}
    table |= {"scheduler": ["diffusers", scheduler.write(cfg)["_class_name"]], VAE: list(autoencoder.library)}
    table |= {denoiser.folder: [denoiser.library[0], tables[denoiser.folder]["_class_name"]]}
    if text.module:
        table |= {TEXT: list(text.library), "tokenizer": list(text.tokenizer_library)}
    else:
        table |= {"id2label": tokenizer.table()}
    return table | EXTRAS.get(pipeline, {}) | ({"_no_diffusers_pipeline": reason} if reason else {})
