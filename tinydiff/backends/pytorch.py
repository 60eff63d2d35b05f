"""The networks on torch, as a `pipeline.Backend`: numpy in, numpy out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinydiff.checkpoints import folder
from tinydiff.checkpoints.description import describe
from tinydiff.errors import UsageError


class TorchBackend:
    """A model folder's networks in float32 on one device."""

    name = "torch"

    def __init__(self, path: Path, device: str = "auto"):
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no CUDA device here; use auto or cpu")
        chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        self.description, self.device = describe(path), torch.device(chosen)
        self.model = folder.load(path)
        self.tokenizer = self.model.tokenizer
        for part in self.model.parts().values():
            part.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    @torch.inference_mode()
    def encode_text(self, ids: np.ndarray) -> np.ndarray:
        return self.model.text_encoder(self.tensor(ids))[0].cpu().numpy()

    @torch.inference_mode()
    def denoise(self, x: np.ndarray, t: float, context: np.ndarray) -> np.ndarray:
        return self.model.unet(self.tensor(x), torch.tensor(t, device=self.device), self.tensor(context)).cpu().numpy()

    @torch.inference_mode()
    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return self.model.vae.encode(self.tensor(pixels)).cpu().numpy()

    @torch.inference_mode()
    def decode(self, z: np.ndarray) -> np.ndarray:
        return self.model.vae.decode(self.tensor(z)).cpu().numpy()
