"""What a model folder says about itself, read from its JSON files alone: no torch, no onnxruntime.

The folder is the diffusers layout (`model_index.json`, `scheduler/`, `vae/` or `vae_decoder/`, ...); an exported bundle has
the same files. Defaults for generation come from the folder's `tinydiff.toml` where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinydiff import config
from tinydiff.checkpoints.scheduler import PREDICTION_TYPES, Scheduler, read, write
from tinydiff.diffusion.schedules import Levels
from tinydiff.errors import ModelError
from tinydiff.files import read_json, shown

DENOISERS = ("unet", "transformer")
OTHERS = {  # part of a pipeline's class name: what it is
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "PixArt": "PixArt",
    "Kandinsky": "Kandinsky",
    "Wuerstchen": "Wuerstchen",
    "StableCascade": "Stable Cascade",
    "Sana": "Sana",
    "Lumina": "Lumina",
    "HunyuanDiT": "Hunyuan-DiT",
    "AuraFlow": "AuraFlow",
    "QwenImage": "Qwen-Image",
    "LatentConsistency": "a latent consistency model with embedded guidance",
}
SUPPORTED = "give Stable Diffusion 1.x or 2.x, a DiT, or a model trained here"


@dataclass(frozen=True)
class Description:
    """What sampling needs to know of a model besides its networks."""

    path: Path
    scheduler: Scheduler
    latent_channels: int
    in_channels: int  # what the network reads: the latents, and in an inpainting model a mask and an image's latents
    factor: int  # pixels a latent, along each side
    multiple: int  # width and height must be multiples of this many pixels
    scaling_factor: float
    size: int  # pixels, the side it was trained at
    generate: config.Generate

    @property
    def schedule(self) -> Levels:
        """The training levels, cleanest first."""
        return self.scheduler.schedule

    @property
    def prediction(self) -> str:
        return self.scheduler.prediction

    def levels(self, sampler: str, steps: int, spacing: str) -> Levels:
        """The levels that a sampler visits, noisiest first, and the one it ends on."""
        return self.scheduler.levels(sampler, steps, spacing)


def configs(path: Path, vae: Path | None = None, prediction: str | None = None) -> dict[str, dict[str, Any]]:
    """The JSON files of a model: `model_index`, `scheduler`, and each network's `config.json` by its folder's name.

    Those of a single file are made from what it holds. The autoencoder is that of the file `vae` where one is given, and
    `prediction` (our name) goes before what the model says. Raises ModelError naming what is missing, or what the model is
    where it is of a kind that cannot be opened.
    """
    theirs = next((name for name, ours in PREDICTION_TYPES.items() if ours == prediction), None)
    if path.is_file():
        from tinydiff.checkpoints import dit, single_file
        from tinydiff.checkpoints.header import header

        tensors = header(path).tensors
        if not dit.is_published(tensors):
            return single_file.configs(path, vae, theirs)
        found = dit.configs({name: stored.shape for name, stored in tensors.items()})
        if vae is None:
            raise ModelError(f"{shown(path)}: a DiT alone, without an autoencoder; give the file of one with --vae")
    else:
        found = _of_folder(path)
    if vae:
        from tinydiff.checkpoints import single_file

        found["vae"] = single_file.autoencoder(vae)
    if theirs:
        found["scheduler"]["prediction_type"] = theirs
    return found


def _of_folder(path: Path) -> dict[str, dict[str, Any]]:
    index = read_json(path / "model_index.json") if (path / "model_index.json").exists() else {}
    kind = str(index.get("_class_name", ""))
    if other := next((name for key, name in OTHERS.items() if key in kind), None):
        raise ModelError(f"{shown(path)}: not supported, this is {other} ({kind}); {SUPPORTED}")
    found = {"model_index": index, "scheduler": read_json(path / "scheduler" / "scheduler_config.json")}
    denoiser = denoiser_of(path)
    found[denoiser] = read_json(path / denoiser / "config.json")
    halves = (name for name in ("vae", "vae_decoder") if (path / name / "config.json").exists())
    found["vae"] = read_json(path / next(halves, "vae") / "config.json")
    if (path / "text_encoder" / "config.json").exists():
        found["text_encoder"] = read_json(path / "text_encoder" / "config.json")
    return found


def denoiser_of(path: Path) -> str:
    """The folder that holds a model's denoiser."""
    return next((name for name in DENOISERS if (path / name / "config.json").exists()), DENOISERS[0])


def describe(path: Path, vae: Path | None = None, prediction: str | None = None) -> Description:
    """The description of a model folder, bundle or single file, as `configs` reads it; ModelError names what is missing."""
    found = configs(path, vae, prediction)
    toml, autoencoder = path / "tinydiff.toml", found["vae"]
    denoiser = next(found[name] for name in DENOISERS if name in found)
    try:
        factor, scheduler = 2 ** (len(autoencoder["block_out_channels"]) - 1), read(found["scheduler"])
        theirs = config.Generate(50, 7.5, scheduler.sampler, scheduler.spacing, 1)  # diffusers' defaults
        return Description(
            path=path,
            scheduler=scheduler,
            latent_channels=(channels := int(autoencoder.get("latent_channels", 4))),
            in_channels=int(denoiser.get("in_channels", channels)),
            factor=factor,
            multiple=factor * reduction(denoiser),
            scaling_factor=float(autoencoder.get("scaling_factor") or 0.18215),
            size=int(denoiser["sample_size"]) * factor,
            generate=config.load(toml).generate if toml.exists() else theirs,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: its configuration files lack or misstate {error}") from None


def tokenizer_of(path: Path, found: dict[str, dict[str, Any]]) -> Any:
    """CLIP's or T5's tokenizer, or the labels of a class-conditional model. Raises ModelError."""
    transformer = found.get("transformer")
    if transformer and "text_encoder" not in found and not transformer.get("cross_attention_dim"):
        return _labels(path, found["model_index"].get("id2label") or {}, transformer)
    if path.is_file():
        from tinydiff.checkpoints import single_file

        return single_file.tokenizer(single_file.kind(path))
    if found.get("text_encoder", {}).get("model_type") == "t5":
        from tinydiff.text.sentencepiece import T5Tokenizer

        return T5Tokenizer.load(path / "tokenizer")
    from tinydiff.text.tokenizer import Tokenizer

    return Tokenizer.load(path / "tokenizer")


def _labels(path: Path, named: Any, transformer: dict[str, Any]) -> Any:
    """The labels that a DiTPipeline's index names by number, which need not be all."""
    from tinydiff.text.labels import LEAST, Labels

    try:
        classes = int(transformer.get("num_embeds_ada_norm") or LEAST)
        names = {int(number): str(name) for number, name in named.items() if 0 <= int(number) < classes}
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{shown(path)}: its classes make no sense: {error}; copy model_index.json again") from None
    return Labels([names.get(i, "") for i in range(max(names, default=-1) + 1)], classes)


def reduction(denoiser: dict[str, Any]) -> int:
    """Latents a side that the denoiser reads as one at its lowest resolution, by its `config.json`."""
    if "block_out_channels" not in denoiser:
        return int(denoiser.get("patch_size", 2))
    return 2 ** (len(denoiser["block_out_channels"]) - 1)


def described(cfg: config.Config, scaling_factor: float) -> Description:
    """The description of the model that a configuration makes, before it is in any folder."""
    factor = 2 ** (len(cfg.autoencoder.block_out_channels) - 1)
    unet = 2 ** (len(cfg.denoiser.block_out_channels) - 1)
    multiple = factor * (cfg.dit.patch_size if cfg.denoiser.kind == "dit" else unet)
    scheduler, channels = read(write(cfg)), cfg.autoencoder.latent_channels
    return Description(
        Path(), scheduler, channels, channels, factor, multiple, scaling_factor, cfg.data.resolution, cfg.generate
    )
