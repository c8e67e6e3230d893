"""Where and in which arithmetic a run computes: resolved once, recorded, reused."""

from __future__ import annotations

import ctypes
import functools
import os
import random
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tes.errors import ConfigError


@dataclass(frozen=True)
class Compute:
    """Device, number format, memory layout and reading processes of a run."""

    device: str
    precision: str
    memory_format: str
    num_workers: int

    @property
    def eval_batch_size(self) -> int:
        """How many images a forward pass takes: on a CPU as many as its caches bear; elsewhere more, but not so many
        that a small split would be read by one process."""
        return 16 if self.device == "cpu" else 32

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, in the memory layout."""
        if self.device == "cpu":
            keep_freed_memory()
        layout = torch.channels_last if self.memory_format == "channels_last" else torch.contiguous_format
        return module.to(self.device, memory_format=layout)

    def images(self, images_B3HW: Tensor) -> Tensor:
        """Move a batch of images to the device, in the memory layout."""
        layout = torch.channels_last if self.memory_format == "channels_last" else torch.contiguous_format
        return images_B3HW.to(self.device, memory_format=layout, non_blocking=True)

    def move(self, x: Tensor) -> Tensor:
        """Move a tensor of a batch to the device, without waiting for it."""
        return x.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """Return the context in which the backbone runs."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def resolve_device(device: str) -> tuple[str, str]:
    """Return (device, reason).

    Raises:
        ConfigError: The device that the user named is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next((name, "the best one found") for name in ("cuda", "mps", "cpu") if available[name])
    if not available[device]:
        found = ", ".join(name for name, there in available.items() if there)
        raise ConfigError(f"`device`: there is no `{device}` on this machine, only {found}.")
    return device, "your setting"


def resolve_workers(num_workers: int | None, device: str) -> tuple[int, str]:
    """Return (processes that read images, reason)."""
    if num_workers is not None:
        return num_workers, "your setting"
    if device == "cpu":
        return 0, "the CPU is busy computing"
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, num_cores), "one per core, at most 8"


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of giving it back to the system.

    Activations are large blocks; by default each is mapped and its pages are zeroed anew in every step, which took
    about half of the time of a MobileNetV2 step on two cores (benchmarks/memory.py).
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library: it works without
        return
    mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks up to this size come from the heap
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap keeps them


def seed_everything(seed: int) -> None:
    """Seed every generator that a module may draw from; ask for deterministic convolutions.

    The backward pass of a transformer's attention on a GPU has none that is fast, and may differ in the last digits.
    """
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
