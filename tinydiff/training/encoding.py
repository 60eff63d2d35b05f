"""What frozen networks make of the data, computed once for a run and cached in its directory: latents, texts' vectors, features.

Every process computes a share; when all are done, each opens everything, and what nothing reads any more is removed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tinydiff.backends.pytorch import TorchBackend
from tinydiff.condition import Condition
from tinydiff.data import cache, embeddings, latents
from tinydiff.data.columns import Others
from tinydiff.data.dataset import Images
from tinydiff.measure.features import open_features
from tinydiff.stages import trained
from tinydiff.training import maps as feature_maps
from tinydiff.training.run import Run


def learns(module: nn.Module) -> bool:
    """Whether a network is not frozen."""
    return any(p.requires_grad for p in module.parameters())


def images(run: Run) -> latents.Latents:
    """The latents of all images, by the run's autoencoder; those of other held-out images are cached too."""
    return encoded(run, sources(run), run.dir / "latents")[0]


def others(run: Run) -> dict[Images, latents.Latents]:
    """The latents of the other images that data name beside those that are trained on and measured on."""
    datas = sources(run)
    beside = [Images(Others(data.source), replace(data.data, held_out=0.0)) for data in datas]  # type: ignore[arg-type]
    return dict(zip(datas, encoded(run, beside, run.dir / "image_latents"), strict=True))


def encoded(run: Run, datas: list[Images], place: Path) -> list[latents.Latents]:
    """Latents of all images of some data, cached in a folder that holds no others."""
    world, vae = run.world, run.model.vae
    most = run.cfg.train.stage("autoencoder").rows
    for data in datas:
        latents.fill(place, data, vae, run.progress("encoding images"), world.rank, world.size, most)
    world.wait()
    found = [latents.open_cache(place, data, vae) for data in datas]
    if world.rank == 0:
        cache.sweep(place, [path for each in found for path in each.paths])
    return found


def given(run: Run) -> dict[str, str]:
    """What the autoencoder is that no stage trains, for a checkpoint's state."""
    return {} if "autoencoder" in trained(run.cfg.train) else {"autoencoder": latents.digest(run.model.vae)}


def held_out(run: Run, images: latents.Latents) -> latents.Latents:
    """The latents that have the held-out images: those of all `images`, or of others."""
    other = sources(run)[-1]
    return images if other is run.data else latents.open_cache(run.dir / "latents", other, run.model.vae)


def sources(run: Run) -> list[Images]:
    """The images that are trained on, and those measured on, where these are others."""
    return list(dict.fromkeys([run.data, run.held.images if run.held else run.data]))


def captions(run: Run) -> embeddings.TextEmbeddings | embeddings.Anew | None:
    """What all captions say, where every text encoder is frozen."""
    world, place, encoders, texts = run.world, run.dir / "texts", run.model.text_encoders, None
    if encoders and not any(map(learns, encoders.values())):
        read = [data.source for data in sources(run)]
        said = sorted({"", *(c for source in read for i in range(len(source)) for c in source.captions(i))})
        key = " ".join([*map(latents.digest, encoders.values()), *run.model.description.conditions])
        backend, progress = TorchBackend(run.model), run.progress("encoding captions")

        def encode(captions: list[str]) -> Condition:
            return backend.encode_text({name: t.encode(captions) for name, t in backend.tokenizers.items()})

        most = run.cfg.train.stage("denoiser").rows
        if run.cfg.data.retells:
            texts = embeddings.Anew(encode, key)
        else:
            embeddings.fill(place, said, encode, key, progress, world.rank, world.size, most)
            world.wait()
            texts = embeddings.open_cache(place, said, key)
    if world.rank == 0:
        cache.sweep(place, texts.paths if texts else [])
    return texts


def alignment(settings: Any) -> float:
    """The weight of aligned features; other stages of a denoiser have none."""
    return getattr(settings, "alignment_weight", 0.0)


def maps(run: Run, settings: Any) -> feature_maps.Maps | None:
    """What a feature network sees in all images, a place of each for every one of the denoiser's middle."""
    if not alignment(settings):
        return None
    world, place = run.world, run.dir / "features"
    network, cell = open_features(settings.features).to(run.runtime.device), run.model.description.multiple
    progress = run.progress("looking at images")
    feature_maps.fill(place, run.data, network, cell, progress, world.rank, world.size, settings.rows)
    world.wait()
    found = feature_maps.open_cache(place, run.data, network, cell)
    if world.rank == 0:
        cache.sweep(place, found.paths)
    return found
