"""What each loss of the autoencoder gives: variants of one trained autoencoder, trained on for equal processor time.

python scripts/autoencoders.py FOLDER HELDOUT [-s SECONDS] [-b BEGIN] [--only NAME ...] prints a row of Markdown for each: on
the held-out images PSNR, perceptual distance, mean error of Cb and Cr, and the PSNR of what the decoder makes of latents at
half size against the images at half size, in which an equivariant autoencoder is good. BEGIN is the model whose autoencoder
is trained on, or a recipe (a .toml), by which one begins with nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tinydiff import config
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.data.dataset import Images, open_source
from tinydiff.images import to_pixels
from tinydiff.measure.features import Features, open_features
from tinydiff.networks import VAE, network_of
from tinydiff.text.tokenizer import Tokenizer
from tinydiff.training import loop
from tinydiff.training.autoencoder import AutoencoderTask
from tinydiff.training.losses import chroma, psnr
from tinydiff.training.reconstruct import turned
from tinydiff.training.run import Run
from tinydiff.training.state import Learner, Training

VARIANTS: dict[str, dict[str, float | str]] = {
    "pixels": {},
    "pixels, AdamW": {"optimizer": '"adamw"'},
    "pixels, AdamW, rate 0.003": {"optimizer": '"adamw"', "lr": 3e-3},
    "pixels, Muon": {"optimizer": '"muon"', "lr": 3e-3, "warmup": 30},
    "+ chroma": {"chroma_weight": 1.0},
    "+ perceptual": {"perceptual_weight": 0.2},
    "+ perceptual, critic": {"perceptual_weight": 0.2, "adversarial_weight": 0.1},
    "+ equivariance": {"equivariance": 0.5},
    "codebook": {"commitment_weight": 0.25},
}
STAGE = {"batch_size": 16, "lr": 5e-4, "warmup": 10, "ema": 0.98, "critic_lr": 5e-4}
TRIED = 4  # updates that say how long one takes
MOST = 256  # images that are measured


def opened(begin: Path, data: Path, name: str) -> Run:
    nothing = begin.suffix == ".toml"
    stage = {f"train.autoencoder.{k}": v for k, v in (({} if nothing else STAGE) | VARIANTS.get(name, {})).items()}
    rest = {"data.path": f'"{data}"', "train.threads": 1, "train.device": '"cpu"'}
    cfg = config.load(begin if nothing else begin / "tinydiff.toml", [f"{k}={v}" for k, v in (rest | stage).items()])
    run = Run(loop.Runtime(cfg), Path(tempfile.gettempdir()) / "none")
    begun = folder.build(cfg, Tokenizer.train(["a"], 514, 8)) if nothing else folder.load(Source(begin))
    run.model = quantised(begun) if name == "codebook" else begun
    run.runtime.placed(run.model.vae)
    run.data = Images(open_source(cfg.data), cfg.data)
    return run


def quantised(model: folder.Model, codes: int = 1024) -> folder.Model:
    """The same autoencoder with a codebook: its encoder gives the means that it gave before."""
    table = model.configs[VAE] | {"_class_name": "VQModel", "num_vq_embeddings": codes}
    tensors, vae = dict(model.vae.state_dict()), network_of(VAE, table).build(table)
    means = tensors["quant_conv.weight"][: table["latent_channels"], :, 0, 0]  # (C, 2C)
    bias = means @ tensors["encoder.conv_out.bias"] + tensors["quant_conv.bias"][: len(means)]
    weight = torch.einsum("oc,cihw->oihw", means, tensors["encoder.conv_out.weight"])
    tensors |= {"encoder.conv_out.weight": weight, "encoder.conv_out.bias": bias}
    tensors |= {"quant_conv.weight": torch.eye(len(means))[..., None, None], "quant_conv.bias": torch.zeros(len(means))}
    vae.load_state_dict(tensors | {"quantize.embedding.weight": vae.quantize.embedding.weight})  # type: ignore[union-attr]
    return replace(model, configs=model.configs | {VAE: table}, networks=model.networks | {VAE: vae})


def trained(run: Run, steps: int) -> float:
    """Train a run's autoencoder and take the averaged weights: seconds of the processor an update, without the first."""
    task, begun = AutoencoderTask(run), 0.0
    task.settings, task.rows = replace(task.settings, steps=steps), [range(task.settings.batch_size)]
    players, world = task.players.items(), run.world
    for _, player in players:
        player.module.train()
    training = Training([Learner.of(k, p.module, replace(p.settings, steps=steps), world) for k, p in players])
    for n in range(steps):
        loop.step(run, task, training, n, loop.parts_of(task, n))
        begun = begun or time.process_time()
    training.exchange()
    return (time.process_time() - begun) / (steps - 1)


@torch.no_grad()
def measured(vae: nn.Module, pixels: Tensor, features: Features, factor: int) -> list[float]:
    """PSNR, perceptual distance, mean error of colour in percent of the range, PSNR at half size."""
    z = torch.cat([vae.distribution(part)[0] for part in pixels.split(16)])  # type: ignore[operator]
    drawn = torch.cat([vae.decode(part) for part in z.split(16)]).clamp(-1, 1)  # type: ignore[operator]
    turn = [z.shape[2] // 2, z.shape[3] // 2, 0]
    half = torch.cat([vae.decode(turned(part, turn)) for part in z.split(16)])  # type: ignore[operator]
    distance = torch.cat([features.distance(a, b) for a, b in zip(pixels.split(16), drawn.split(16), strict=True)])
    error = 50 * chroma(pixels - drawn).abs().mean().item()
    return [psnr(pixels, drawn), distance.mean().item(), error, psnr(turned(pixels, turn, factor), half)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="training images")
    parser.add_argument("heldout", type=Path, help="images to be measured on")
    parser.add_argument("-s", "--seconds", type=float, default=180, help="of the processor, for each")
    parser.add_argument("-b", "--begin", type=Path, default=Path("weights/emoji"), help="a model, or a recipe")
    parser.add_argument("--only", nargs="*", default=["begun with", *VARIANTS], help="names of rows")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    features = open_features()
    print("| losses | updates | seconds | PSNR | perceptual distance | error of colour | PSNR at half size |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in asked.only:
        run = opened(asked.begin, asked.folder, name)
        held = Images(open_source(replace(run.cfg.data, path=str(asked.heldout)), seed=1), run.cfg.data)
        pixels = torch.from_numpy(to_pixels(held.read(range(min(MOST, len(held.source))))[0]))  # type: ignore[arg-type]
        steps, seconds = 0, 0.0
        if name in VARIANTS:
            steps = round(asked.seconds / trained(opened(asked.begin, asked.folder, name), TRIED))
            seconds = steps * trained(run, steps)
        vae = run.model.vae.eval()
        db, distance, colour, half = measured(vae, pixels, features, run.model.description.factor)
        row = f"| {name} | {steps} | {seconds:.0f} | {db:.2f} dB | {distance:.3f} | {colour:.2f} % | {half:.2f} dB |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
