"""Where a replay lies, and the compiled module that works there."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

# The CUDA sources compiled for the CPU: put here by tests, taken for device="cuda".
emulation: ModuleType | None = None


class Place:
    """A device of torch, its compiled module and, on CUDA, that module's `Device`."""

    def __init__(self, device: str | torch.device):
        device = torch.device(device)
        self.torch_device, self.handle = device, None
        if device.type == "cpu":
            self.module: Any = importlib.import_module("fastreplay._cpu")
        elif device.type == "cuda" and emulation is not None:
            self.module, self.torch_device = emulation, torch.device("cpu")
            self.handle = emulation.Device(-1, self.torch_device, lambda index: 0)
        elif device.type == "cuda":
            self.module = cuda_module()
            index = torch.cuda.current_device() if device.index is None else device.index
            if index >= torch.cuda.device_count():
                raise RuntimeError(f"there is no {device}: torch sees {torch.cuda.device_count()}")
            self.torch_device = torch.device("cuda", index)
            self.handle = self.module.Device(index, self.torch_device, current_stream())
        else:
            raise ValueError(f"device must be cpu or cuda, not {device}")

    @property
    def is_cuda(self) -> bool:
        return self.handle is not None

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def staging(self, slot_bytes: int) -> torch.Tensor:
        """Where rows and priorities from the CPU arrive."""
        slots = self.module.STAGING_SLOTS
        return self.zeros(slots * (slot_bytes + 15 & ~15), dtype=torch.uint8)


def cuda_module() -> ModuleType:
    """The compiled CUDA half; RuntimeError if it or a GPU is missing."""
    try:
        module = importlib.import_module("fastreplay._cuda")
    except ModuleNotFoundError:
        raise RuntimeError(
            "fastreplay was built without CUDA; where nvcc is installed, build it with: "
            "FASTREPLAY_CUDA=1 pip install ."
        ) from None
    if not torch.cuda.is_available():
        raise RuntimeError("device='cuda', but torch.cuda.is_available() is False: no usable GPU")
    return module


def current_stream():
    """A function from a device's number to the handle of its current stream."""
    quick = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return quick or (lambda index: torch.cuda.current_stream(index).cuda_stream)
