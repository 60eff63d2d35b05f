"""The networks on torch, as a `pipeline.Backend`: numpy in, numpy out.

Half precision is what the weights are in: torch's kernels for norms and softmax sum in float32 themselves, time becomes
sines in float32, and what goes in and out is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tinydiff.backends.replayed import Replayed
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.folder import PRECISIONS
from tinydiff.checkpoints.source import Source
from tinydiff.condition import Condition, joined
from tinydiff.errors import UsageError
from tinydiff.models.spatial import heads_shut
from tinydiff.networks import CONTROL
from tinydiff.networks.network import HIDDEN, named
from tinydiff.progress import note
from tinydiff.text.labels import one_hot


class TorchBackend:
    """Networks as they stand, on the device where they are."""

    name, at_once = "torch", 1

    def __init__(self, model: folder.Model):
        self.model, self.description, self.tokenizers = model, model.description, model.tokenizers
        self.predict: Callable[..., Tensor] = model.denoiser
        self.shares: Callable[[], np.ndarray] | None = None  # where rows may leave the denoiser

    @classmethod
    def open(
        cls, source: Source, device: str = "auto", precision: str | None = None, compiled: bool = False
    ) -> TorchBackend:
        """A model's networks on one device, computing in a `precision`: by default, on CUDA what each network's weights are
        stored in, and float32 on the CPU. UsageError where the device is missing or cannot."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no CUDA device here; use auto or cpu")
        chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        check_bfloat16(chosen, precision)
        if compiled:
            check_compiler(chosen)
        torch.backends.cudnn.allow_tf32 = False  # the same seed is to give the same image on every runtime
        model = folder.load(source, None)
        for part in model.networks.values():
            part.to(chosen, PRECISIONS[precision] if precision else usual(part, chosen))
            if chosen.type == "cuda":  # on a CPU it is no faster, and would copy the convolutions' mapped weights
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            model.denoiser.compile()
        backend = cls(model)
        if chosen.type == "cuda":
            backend.predict = Replayed(model.denoiser)
        return backend

    @property
    def device(self) -> torch.device:
        return next(self.model.denoiser.parameters()).device

    def tensor(self, x: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device, dtype)

    @torch.inference_mode()
    def ask(self, network: nn.Module, call: Callable[..., Any], *arrays: np.ndarray, **more: Any) -> Any:
        """What a network, by a call of it, says to float arrays as its weights' type, to others, and to tensors, as they are.

        A network of half precision whose answer overflows is float32 from then on, and asked again.
        """
        dtype = next(network.parameters()).dtype
        told = [self.tensor(x, dtype if x.dtype.kind == "f" else None) for x in arrays]
        named = {k: x if isinstance(x, Tensor) else self.tensor(x, dtype) for k, x in more.items()}
        answer = call(*told, **named)
        if dtype == torch.float16 and not all(x.isfinite().all() for x in tree_leaves(answer)):
            note(f"{type(network).__name__} overflows in fp16, and is computed in float32")
            network.float()
            return self.ask(network, call, *arrays, **more)
        return answer

    @property
    def skipped(self) -> str:
        """What of the denoiser's attention was not computed so far, in words; nothing where its heads have no gates."""
        shut, heads = heads_shut(self.model.denoiser)
        return f"{shut / heads:.0%} of the attention heads were shut, and skipped" if heads else ""

    def encode_text(self, ids: Mapping[str, np.ndarray]) -> Condition:
        said = joined([self.read(name, rows) for name, rows in ids.items()], self.description.conditions, torch.cat)
        return {name: to_numpy(array) for name, array in said.items()}

    def read(self, name: str, ids: np.ndarray) -> dict[str, Tensor]:
        """The outputs of one text encoder."""
        if name in self.model.networks:
            network = self.model.networks[name]
            return named(self.ask(network, network, ids))
        return {HIDDEN: self.tensor(one_hot(ids, self.tokenizers[name].vocab_size))}

    def denoise(self, x: np.ndarray, t: float, condition: Condition) -> np.ndarray:
        exact: dict[str, Any] = {
            "timestep": torch.tensor(t, device=self.device)
        }  # bfloat16 knows none between 512 and 514
        kept = [name for name, array in self.description.conditions.items() if callable(array.of)]  # nor such sizes
        exact |= {name: self.tensor(condition[name]) for name in kept}
        return to_numpy(self.ask(self.model.denoiser, self.predict, sample=x, **condition | exact))

    def leave(self, at: float) -> None:
        """Let rows leave the denoiser where an exit is surer than this. What is computed then depends on the rows, so that no
        calls are recorded."""
        self.model.denoiser.leave, self.predict, self.shares = at, self.model.denoiser, self.computed

    def computed(self) -> np.ndarray:
        """Of each row of the denoiser's last call, the share of its blocks that was computed."""
        return to_numpy(self.model.denoiser.computed) / len(self.model.denoiser.transformer_blocks)

    def control(self, network: str, x: np.ndarray, t: float, condition: Condition) -> Condition:
        module, time = self.model.networks[network], torch.tensor(t, device=self.device)
        graph = CONTROL.graphs(network, CONTROL.complete(self.model.configs[network]))[network]
        told = {name: array for name, array in condition.items() if name in graph.inputs}
        answer, names = self.ask(module, module, sample=x, timestep=time, **told), graph.outputs
        dtype = next(self.model.denoiser.parameters()).dtype
        return {name: array.to(dtype) for name, array in zip(names, answer, strict=True)}

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return to_numpy(self.ask(self.model.vae, self.model.vae.encode, pixels))

    def decode(self, z: np.ndarray) -> np.ndarray:
        return to_numpy(self.ask(self.model.vae, self.model.vae.decode, z))


def to_numpy(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy()


def usual(network: nn.Module, device: torch.device) -> torch.dtype:
    """What a network computes in where nobody says: on CUDA the half precision that all its weights are stored in, if any."""
    stored = {x.dtype for x in network.state_dict().values() if x.is_floating_point()}
    if device.type == "cuda" and (
        stored == {torch.float16} or (stored == {torch.bfloat16} and torch.cuda.is_bf16_supported(False))
    ):
        return stored.pop()
    return torch.float32


def check_bfloat16(device: torch.device, precision: str | None) -> None:
    """UsageError where the device would only imitate what it is to multiply."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UsageError("--precision bf16: this GPU cannot multiply bfloat16; use fp16 or fp32")


def check_compiler(device: torch.device) -> None:
    """UsageError where torch could not compile for the device."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda" and not has_triton():
        raise UsageError("--compile: torch needs Triton for this device; install triton, or leave --compile out")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UsageError("--compile: torch finds no C++ compiler; install g++, or leave --compile out") from None
