"""Whether the parts of a model go together, by JSON files and headers alone: no torch, no weights.

Every function yields what does not agree, naming both sides and both numbers. Each part is a valid network by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from tinydiff.checkpoints.header import FLOATS, Stored
from tinydiff.files import shown
from tinydiff.networks import CONTROL, VAE, controls_of, denoiser_in, is_xl, network_of, networks, text_encoders
from tinydiff.networks.network import POOLED, Network, Table

Name = Callable[[str], str]  # a network's folder -> how a message calls its settings


def of_networks(configs: Mapping[str, Table], name: Name) -> Iterator[str]:
    """Channels of latents and widths of text vectors."""
    tables = {folder: network_of(folder, table).complete(table) for folder, table in networks(configs).items()}
    folder = denoiser_in(configs)
    row, pixels = (cast(Any, network_of(each, configs[each])) for each in (folder, VAE))
    table, latents, said = tables[folder], pixels.channels(tables[VAE]), tables[VAE]["latent_channels"]
    patches = f" in patches of {latents}" if latents != said else ""
    theirs = f"{name(VAE)} has latent_channels {said}{patches}"
    outputs = table.get("out_channels") or table["in_channels"]
    if row.noisy(table) not in (latents, 2 * latents + 1):
        kinds = f"{latents}, or {2 * latents + 1} for inpainting, are supported"
        yield f"{name(folder)} has in_channels {table['in_channels']}, and {theirs}; {kinds}"
    if outputs not in [latents * n for n in row.outputs]:
        yield f"{name(folder)} has out_channels {outputs}, and {theirs}"
    if is_xl(configs) and any(configs[VAE].get(key) for key in ("latents_mean", "latents_std")):
        yield f"{name(VAE)} has latents_mean or latents_std, which are not supported in Stable Diffusion XL"
    pooled = {encoder: each.pooled(tables.get(encoder, {})) for encoder, each in text_encoders(configs).items()}
    for array in row.conditions(table).values():
        if array.of == POOLED and array.axes[1] != sum(pooled.values()):
            given = ", ".join(f"{name(encoder)} of {size}" for encoder, size in pooled.items() if size) or "no one"
            yield f"{name(folder)} is told a text's vector of {array.axes[1]}, and {given} gives it"
    reads = configs[folder].get("cross_attention_dim")
    widths = {encoder: each.width(configs.get(encoder, {})) for encoder, each in text_encoders(configs).items()}
    if reads and all(widths.values()) and sum(widths.values()) != reads:  # a bundle of graphs need not say them
        given = [f"{name(encoder)} gives vectors of {width}" for encoder, width in widths.items()]
        yield f"{name(folder)} has cross_attention_dim {reads}, and {', '.join(given)}"

    for control in controls_of(tables):
        yield from of_control(tables[control], tables[folder], tables[VAE], name(control), name(folder), name(VAE))


def of_control(own: Table, unet: Table, vae: Table, name: str, base: str, autoencoder: str) -> Iterator[str]:
    """A control network's settings that the residuals depend on, and the size of its image, against its U-Net's."""
    wanted = unet | {"in_channels": unet["out_channels"]}  # it does not read what an inpainting model reads beside
    fix = "give one that was trained on this model"
    for key in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        ours, theirs = (list(v) if isinstance(v, tuple) else v for v in (own.get(key), wanted.get(key)))
        if ours != theirs:
            theirs = f"{'out_channels' if key == 'in_channels' else key} {theirs}"
            yield f"{name} is of another base: it has {key} {ours}, and {base} {theirs}; {fix}"
    if (ours := CONTROL.factor(own)) != (theirs := network_of(VAE, vae).factor(vae)):  # type: ignore[attr-defined]
        pixels = f"{ours} pixels of its image are a latent, and {theirs} of {autoencoder}'s"
        yield f"{name} is of another base: {pixels}; {fix}"


def of_tokenizer(tokenizer: Any, table: Table, encoder: str, folder: str) -> Iterator[str]:
    """Ids of a tokenizer and the tokens of a prompt, against its text encoder's vectors and places."""
    if tokenizer.vocab_size > (vectors := table.get("vocab_size", tokenizer.vocab_size)):
        yield f"{encoder} has vocab_size {vectors}, and {folder} ids up to {tokenizer.vocab_size - 1}"
    if tokenizer.max_length > (places := table.get("max_position_embeddings", tokenizer.max_length)):
        yield f"{encoder} has max_position_embeddings {places}, and {folder} model_max_length {tokenizer.max_length}"


def of_weights(
    network: Network, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Stored], name: str, file: str
) -> Iterator[str]:
    """Shapes of a few tensors against those that settings ask for, and the type of all."""
    ours = network.renamed(tensors)  # type: ignore[arg-type]
    for key, shape in shapes.items():
        stored = ours.get(key)
        if stored is None and shapes.keys() & ours.keys():  # else its tensors have the names of another layout
            yield f"{name} asks for {key} {list(shape)}, and {file} has none"
        elif stored is not None and tuple(stored.shape) != shape:
            yield f"{name} asks for {key} {list(shape)}, and {file} has {list(stored.shape)}"
    yield from of_types(ours, file)  # type: ignore[arg-type]


def of_types(tensors: Mapping[str, Stored], file: str) -> Iterator[str]:
    """Tensors of other types than floating point, such as quantised ones."""
    for key, stored in tensors.items():
        if stored.dtype not in FLOATS:
            yield f"{file} has {shown(key)} as {shown(stored.dtype)}, and only floating-point weights are supported"
