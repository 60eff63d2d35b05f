"""A control network for a model that stays as it is (Zhang et al. 2023): it begins as a copy of the U-Net's way down, and as no
change, and learns with the denoiser's own loss to be told an image.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinydiff.adapters import origin
from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints import folder
from tinydiff.condition import Condition
from tinydiff.control import Control, as_condition
from tinydiff.data.dataset import Images
from tinydiff.data.makers import MAKERS
from tinydiff.diffusion.noise import keyed
from tinydiff.models.control import ControlNet
from tinydiff.networks import CONTROL, denoiser_in
from tinydiff.networks.control import IMAGE
from tinydiff.networks.network import Graph
from tinydiff.pipeline import generate
from tinydiff.stages import GIVEN
from tinydiff.training.denoiser import Denoise, DenoiserTask, Early
from tinydiff.training.encoding import sources
from tinydiff.training.run import Run
from tinydiff.training.state import Blocks
from tinydiff.training.task import PICTURES, Batch, Player


class Controlled(Denoise):
    """The denoiser as it is, and the control network that learns."""

    def __init__(self, model: folder.Model, control: ControlNet, graph: Graph):
        super().__init__(model)
        self.control, self.graph = control, graph

    def forward(
        self, sample: Tensor, timestep: Tensor, tokens: dict[str, Tensor], condition: Condition
    ) -> tuple[Tensor, None, list[Early]]:
        """The prediction (B, C, h, w), and nothing else; `condition` has the control image too."""
        told = {name: array for name, array in condition.items() if name != IMAGE}
        added = self.control(sample, timestep, **{k: x for k, x in condition.items() if k in self.graph.inputs})
        return self.denoiser(sample, timestep, **told, **dict(zip(self.graph.outputs, added, strict=True))), None, []


class ControlTask(DenoiserTask):
    name, publishes = "control", CONTROL.folder

    def __init__(self, run: Run):
        folder_, configs = denoiser_in(run.model.configs), run.model.configs
        self.table = CONTROL.of_base(configs[folder_], run.model.description.factor)
        self.condition = run.cfg.train.stage(self.name).condition
        for data in sources(run) if self.condition == GIVEN else ():
            data.check_controlled()
        super().__init__(run)
        self.samples = None  # each would need an image of its own

    def cast(self) -> dict[str, Player]:
        with torch.random.fork_rng([]):
            torch.manual_seed(int(keyed(self.cfg.train.seed, self.name).integers(2**62)))
            self.network: Any = CONTROL.build(self.table)
        self.network.begin_as(self.model.denoiser).to(self.run.runtime.device)
        graph = CONTROL.graphs(self.name, CONTROL.complete(self.table))[self.name]
        module = Controlled(self.model, self.network, graph)
        return {self.name: Player(module, module, self.settings, [self.network])}

    def made(self, data: Images, indices: np.ndarray) -> np.ndarray:
        """The control images of some pictures, uint8 (B, H, W, 3)."""
        if self.condition == GIVEN:
            return np.stack([data.control(int(i)) for i in indices])
        return np.stack([MAKERS[self.condition](image) for image in data.batch(indices)])

    def batch(self, step: int, rows: range) -> Batch:
        batch = super().batch(step, rows)
        return self.with_images(batch, self.data, self.order(step)[list(rows)])

    def held_batch(self, rows: np.ndarray) -> Batch:
        assert self.held
        return self.with_images(super().held_batch(rows), self.held.images, self.held.indices[rows % len(self.held)])

    def with_images(self, batch: Batch, data: Images, indices: np.ndarray) -> Batch:
        told = {IMAGE: torch.from_numpy(as_condition(self.made(data, indices)))}
        return batch | {"condition": batch["condition"] | told}

    def publish(self, checkpoint: Path, path: Path) -> None:
        """The control network's folder, as diffusers opens it."""
        prefix = f"{self.name}.control."
        tensors = {name.removeprefix(prefix): t for name, t in Blocks(checkpoint, "average").whole()}
        folder.save_network(path, self.table | {origin.KEY: self.run.origin}, tensors, CONTROL.file, self.cfg)

    def pictures(self, steps: int = 12) -> tuple[np.ndarray, dict[str, float]]:
        """Control images above what is drawn with them, uint8 (2 n, H, W, 3), of captions spread over the data."""
        alike = np.flatnonzero(self.data.bucket == self.data.bucket[0])
        chosen = alike[np.arange(PICTURES) * len(alike) // PICTURES]
        model = replace(
            self.model,
            configs=self.model.configs | {self.publishes: self.table},
            networks=self.model.networks | {self.publishes: self.network},
        )
        told, seed = self.made(self.data, chosen), self.cfg.train.seed
        captions = [self.data.source.captions(int(i) % len(self.data.source))[0] for i in chosen]
        height, width = told.shape[1:3]
        backend, request = TorchBackend(model), replace(self.request(steps), width=width, height=height)
        drawn = [
            generate(backend, [caption], [seed + i], request, controls=[Control(self.publishes, image)])
            for i, (caption, image) in enumerate(zip(captions, told, strict=True))
        ]
        return np.concatenate([told, *drawn]), {}
