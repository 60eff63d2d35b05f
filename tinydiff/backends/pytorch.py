"""The networks on torch, as a `pipeline.Backend`: numpy in, numpy out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinydiff.checkpoints import folder
from tinydiff.checkpoints.description import Description, describe
from tinydiff.errors import UsageError


class TorchBackend:
    """Networks as they stand, on the device where they are."""

    name = "torch"

    def __init__(self, model: folder.Model, description: Description):
        self.model, self.description, self.tokenizer = model, description, model.tokenizer

    @classmethod
    def open(
        cls, path: Path, device: str = "auto", vae: Path | None = None, prediction: str | None = None
    ) -> TorchBackend:
        """A model's networks in float32 on one device, as `folder.load` reads them. UsageError where that is missing."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no CUDA device here; use auto or cpu")
        chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        model, description = folder.load(path, vae, prediction), describe(path, vae, prediction)
        for part in model.parts().values():
            part.to(chosen)
            if chosen.type == "cuda":  # on a CPU it is no faster, and would copy the convolutions' mapped weights
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(model, description)

    @property
    def device(self) -> torch.device:
        return next(self.model.denoiser.parameters()).device

    def tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    @torch.inference_mode()
    def encode_text(self, ids: np.ndarray) -> np.ndarray:
        return self.model.text_encoder(self.tensor(ids))[0].float().cpu().numpy()

    @torch.inference_mode()
    def denoise(self, x: np.ndarray, t: float, context: np.ndarray) -> np.ndarray:
        return (
            self.model.denoiser(self.tensor(x), torch.tensor(t, device=self.device), self.tensor(context))
            .float()
            .cpu()
            .numpy()
        )

    @torch.inference_mode()
    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return self.model.vae.encode(self.tensor(pixels)).float().cpu().numpy()

    @torch.inference_mode()
    def decode(self, z: np.ndarray) -> np.ndarray:
        return self.model.vae.decode(self.tensor(z)).float().cpu().numpy()
