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
    """What is added to the output of a linear layer or a convolution: up(down(x)) alpha / rank, nothing at first.

    With `dora` the rows of the changed weight have lengths that learn, the layer's own at first (Liu et al. 2024, equation 5).
    """

    magnitude: nn.Parameter | None

    def __init__(self, layer: Any, rank: int, alpha: float, dora: bool = False):
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
        self.magnitude = nn.Parameter(layer.weight.detach().flatten(1).norm(dim=1)) if dora else None

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) * self.scale

    def after(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """The output that the layer has with the change, from its own; (B, ..., C) or (B, C, h, w)."""
        if self.magnitude is None:
            return output + self(x)
        sides = [1] * 2 * isinstance(layer, nn.Conv2d)
        bias = 0 if layer.bias is None else layer.bias.view(-1, *sides)
        scale = (self.magnitude / self.lengths(layer)).view(-1, *sides)
        return (output - bias + self(x)) * scale + bias

    @torch.no_grad()  # no gradient goes through them, by section 4.3 of that paper
    def lengths(self, layer: Any) -> Tensor:
        """The Euclidean lengths of the changed weight's rows, (C,) float32."""
        with torch.autocast(layer.weight.device.type, enabled=False):
            product = self.up.weight.flatten(1).float() @ self.down.weight.flatten(1).float()
            return (layer.weight.flatten(1) + product * self.scale).norm(dim=1).clamp(min=lora.SHORTEST)


class LoraTask(DenoiserTask):
    name, publishes = "lora", "adapter"

    def __init__(self, run: Run):
        settings: LoraStage = run.cfg.train.stage(self.name)
        self.layers = chosen(run.model, settings)
        for name, layer in self.layers.items():
            with torch.random.fork_rng([]):
                torch.manual_seed(int(keyed(run.cfg.train.seed, f"change of {name}").integers(2**62)))
                layer.change = run.runtime.placed(Change(layer, settings.rank, settings.alpha, settings.dora))
            layer.register_forward_hook(lambda layer, given, output: layer.change.after(layer, given[0], output))
        super().__init__(run)

    def publish(self, checkpoint: Path, path: Path) -> None:
        """A folder with one file of the averaged changes, and the configuration that they were trained with."""
        kept, denoiser = dict(Blocks(checkpoint, "average").whole()), denoiser_in(self.model.configs)

        def part(name: str, which: str) -> Any:
            inside = name.replace(denoiser, "denoiser", 1) if name.startswith(f"{denoiser}.") else name
            return kept[f"{self.name}.{inside}.change.{which}"].numpy()

        def change(name: str) -> lora.LowRank:
            lengths = part(name, "magnitude") if self.settings.dora else None
            return lora.LowRank(part(name, "down.weight"), part(name, "up.weight"), self.settings.alpha, None, lengths)

        changes = {name: change(name) for name in self.layers}
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
