"""The networks on torch, as a `pipeline.Backend`: numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.condition import Condition, joined
from tinydiff.errors import UsageError
from tinydiff.networks.network import HIDDEN, named
from tinydiff.text.labels import one_hot


class TorchBackend:
    """Networks as they stand, on the device where they are."""

    name = "torch"

    def __init__(self, model: folder.Model):
        self.model, self.description, self.tokenizers = model, model.description, model.tokenizers

    @classmethod
    def open(cls, source: Source, device: str = "auto") -> TorchBackend:
        """A model's networks in float32 on one device. UsageError where that is missing."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no CUDA device here; use auto or cpu")
        chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        model = folder.load(source)
        for part in model.networks.values():
            part.to(chosen)
            if chosen.type == "cuda":  # on a CPU it is no faster, and would copy the convolutions' mapped weights
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(model)

    @property
    def device(self) -> torch.device:
        return next(self.model.denoiser.parameters()).device

    def tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    @torch.inference_mode()
    def encode_text(self, ids: Mapping[str, np.ndarray]) -> Condition:
        said = joined([self.read(name, rows) for name, rows in ids.items()], self.description.conditions, torch.cat)
        return {name: array.float().cpu().numpy() for name, array in said.items()}

    def read(self, name: str, ids: np.ndarray) -> dict[str, Tensor]:
        """The outputs of one text encoder."""
        if name in self.model.networks:
            return named(self.model.networks[name](self.tensor(ids)))
        return {HIDDEN: self.tensor(one_hot(ids, self.tokenizers[name].vocab_size))}

    @torch.inference_mode()
    def denoise(self, x: np.ndarray, t: float, condition: Condition) -> np.ndarray:
        told = {name: self.tensor(array) for name, array in condition.items()}
        time = torch.tensor(t, device=self.device)
        return self.model.denoiser(self.tensor(x), time, **told).float().cpu().numpy()

    @torch.inference_mode()
    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return self.model.vae.encode(self.tensor(pixels)).float().cpu().numpy()

    @torch.inference_mode()
    def decode(self, z: np.ndarray) -> np.ndarray:
        return self.model.vae.decode(self.tensor(z)).float().cpu().numpy()
