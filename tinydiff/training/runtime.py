"""Where and how a run computes: device, precision, threads, processes and signals."""

from __future__ import annotations

import contextlib
import os
import signal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinydiff import config
from tinydiff.errors import UsageError, UserError
from tinydiff.progress import Progress
from tinydiff.training.parallel import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(UserError):
    """A signal asked the run to stop; everything is saved. `code` is the exit code."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


class Runtime:
    """Device, precision, threads, processes and signals of a run; a context manager that puts back what it changes."""

    def __init__(self, cfg: config.Config):
        self.config, self.cfg = cfg, cfg.train
        self.device = self.pick_device()
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}.get(self.cfg.precision, self.fast())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.world = World(self.device, self.cfg.timeout, self.cfg.tensor_parallel)
        self.caught = 0

    def pick_device(self) -> torch.device:
        if self.cfg.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("train.device: torch sees no CUDA device here; use 'auto' or 'cpu'")
        if self.cfg.device == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            problem = f"more processes than the {count} CUDA devices here"
            raise UsageError(f"--nproc-per-node: {problem}; start {count} of them")
        return torch.device("cuda", local)

    def fast(self) -> torch.dtype | None:
        """bfloat16 where the hardware multiplies it, else None for float32."""
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else None

    def placed(self, network: nn.Module) -> nn.Module:
        """The network on the device, in evaluation mode: a stage's players alone are set to training."""
        network.eval().to(self.device)
        if self.cfg.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def attention(self) -> contextlib.AbstractContextManager:
        """On a CPU the plain formula trains faster than the fused kernel at the few hundred tokens of a small latent."""
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()

    def __enter__(self) -> Runtime:
        if self.cfg.threads:
            torch.set_num_threads(self.cfg.threads)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        self.world.__enter__()
        heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # nohup
        self.previous = {n: signal.signal(n, self.catch) for n in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.world.__exit__(*error)  # type: ignore[arg-type]

    def catch(self, number: int, _: object) -> None:
        """The first signal ends the run after its step; a second interrupt ends it at once."""
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = self.caught or number

    def say(self, text: str) -> None:
        if self.world.rank == 0:
            Progress("", 0).say(text)
