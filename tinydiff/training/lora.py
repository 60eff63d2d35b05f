"""Changes of low rank of a model's layers (Hu et al. 2021, "LoRA", section 4.1): they alone learn, are saved and published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinydiff.adapters import lora
from tinydiff.checkpoints.folder import Model
from tinydiff.diffusion.noise import keyed
from tinydiff.errors import UsageError
from tinydiff.files import committed
from tinydiff.networks import denoiser_in
from tinydiff.schema import brief, to_toml
from tinydiff.stages import LoraStage
from tinydiff.training.denoiser import DenoiserTask
from tinydiff.training.run import Run
from tinydiff.training.state import Blocks

TEXT = "q_proj, k_proj, v_proj, out_proj, fc1, fc2"  # of text encoders
SHOWN = 3  # names of layers in a message


class Change(nn.Module):
    """What is added to the output of a linear layer or a convolution: up(down(x)) alpha / rank, nothing at first."""

    def __init__(self, layer: Any, rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            form = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding")}
            self.down = nn.Conv2d(layer.in_channels, rank, bias=False, **form)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, 5**0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) * self.scale


class LoraTask(DenoiserTask):
    name, publishes = "lora", "adapter"

    def __init__(self, run: Run):
        settings: LoraStage = run.cfg.train.stage(self.name)
        self.layers = chosen(run.model, settings)
        for name, layer in self.layers.items():
            with torch.random.fork_rng([]):
                torch.manual_seed(int(keyed(run.cfg.train.seed, f"change of {name}").integers(2**62)))
                layer.change = run.runtime.placed(Change(layer, settings.rank, settings.alpha))
            layer.register_forward_hook(lambda layer, given, output: output + layer.change(given[0]))
        super().__init__(run)

    def publish(self, checkpoint: Path, path: Path) -> None:
        """A folder with one file of the averaged changes, and the configuration that they were trained with."""
        kept, denoiser = dict(Blocks(checkpoint, "average").whole()), denoiser_in(self.model.configs)

        def half(name: str, which: str) -> Any:
            inside = name.replace(denoiser, "denoiser", 1) if name.startswith(f"{denoiser}.") else name
            return kept[f"{self.name}.{inside}.change.{which}.weight"].numpy()

        changes = {k: lora.LowRank(half(k, "down"), half(k, "up"), self.settings.alpha) for k in self.layers}
        with committed(path, replace=True) as folder:
            lora.write(folder / lora.FILE, changes, self.settings.style, base=self.run.origin)
            (folder / "tinydiff.toml").write_text(to_toml(self.cfg), encoding="utf-8")


def chosen(model: Model, settings: LoraStage) -> dict[str, Any]:
    """The layers to change, by the names of their networks' folders and their own. UsageError for what cannot be changed."""
    encoders = model.text_encoders.items() if settings.text_encoder else ()
    layers = ending({denoiser_in(model.configs): model.denoiser}, settings.targets, "targets")
    layers |= ending(dict(encoders), TEXT, "text_encoder") if settings.text_encoder else {}
    for name, layer in layers.items():
        if settings.rank > (least := min(layer.weight.flatten(1).shape)):
            problem = f"{settings.rank} is above {least}, the shorter side of {name}"
            raise UsageError(f"train.lora.rank: {problem}; set {least} or less, or other train.lora.targets")
    return layers


def ending(networks: dict[str, nn.Module], targets: str, key: str) -> dict[str, Any]:
    """Linear layers and convolutions whose names end in one of some targets. Raises UsageError for a target of none."""
    modules = [(f"{name}.{k}", part) for name, network in networks.items() for k, part in network.named_modules()]
    layers = {name: part for name, part in modules if isinstance(part, nn.Linear | nn.Conv2d)}
    ends = tuple(f".{target}" for target in map(str.strip, targets.split(",")) if target)
    unmet = [end for end in ends if not any(name.endswith(end) for name in layers)]
    if unmet or not ends:
        problem = f"{brief(''.join(unmet[:1])[1:])} ends the name of no layer"
        raise UsageError(f"train.lora.{key}: {problem}; there are {', '.join([*layers][:SHOWN])}, ...")
    return {name: part for name, part in layers.items() if name.endswith(ends)}
