"""The device of a replay, and the compiled module that works there."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

MIN_CAPABILITY = (8, 0)  # compute capability that the kernels are compiled for

# The CUDA sources compiled for the CPU. Tests set it; device="cuda" then means this module.
emulation: ModuleType | None = None


class Backend:
    """A torch device, its compiled module, and that module's handle of the device."""

    def __init__(self, device: str | torch.device):
        device = torch.device(device)
        self.is_cuda = device.type == "cuda"
        if device.type == "cpu":
            self.module: Any = importlib.import_module("fastreplay._cpu")
            self.torch_device = device
            self.handle = self.module.Device(self.module.CPU_INDEX, device)
        elif device.type == "cuda" and emulation is not None:
            self.module, self.torch_device = emulation, torch.device("cuda", 0)
            self.handle = emulation.Device(0, self.torch_device, emulation.current_stream)
        elif device.type == "cuda":
            problem = cuda_problem(device.index)
            if problem:
                raise RuntimeError(problem)
            index = torch.cuda.current_device() if device.index is None else device.index
            self.module = importlib.import_module("fastreplay._cuda")
            self.torch_device = torch.device("cuda", index)
            self.handle = self.module.Device(index, self.torch_device, current_stream())
        else:
            raise ValueError(f"device must be cpu or cuda, not {device}")

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def staging(self, slot_bytes: int) -> torch.Tensor:
        """The device side of the slots through which data of the CPU arrives."""
        slots = self.module.STAGING_SLOTS
        return self.zeros(slots * (slot_bytes + 15 & ~15), dtype=torch.uint8)

    def free_memory(self) -> int:
        """Bytes that a new tensor on this GPU may take, those in torch's cache included."""
        index = self.torch_device.index
        cached = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        return self.module.free_memory(index) + cached


def cuda_problem(index: int | None = None) -> str:
    """Why device="cuda" (or the GPU of that index) cannot be used here, in one line; "" if it can.

    index: of the GPU; None means torch's current one.
    """
    try:
        module = importlib.import_module("fastreplay._cuda")
    except ModuleNotFoundError:
        return (
            "fastreplay was built without CUDA; where nvcc is installed, build it with: "
            "FASTREPLAY_CUDA=1 pip install ."
        )
    except ImportError as e:
        return f"the CUDA half of fastreplay does not load ({e}); rebuild it: pip install ."
    if not torch.cuda.is_available():
        return "device='cuda', but torch.cuda.is_available() is False: no usable GPU"
    index = torch.cuda.current_device() if index is None else index
    if index >= torch.cuda.device_count():
        return f"there is no cuda:{index}: torch sees {torch.cuda.device_count()} GPUs"
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        has, needs = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return f"{name} has compute capability {has}; fastreplay needs {needs}"
    try:
        module.free_memory(index)
    except RuntimeError as e:  # a driver older than the toolkit that fastreplay was built with
        return f"fastreplay cannot use {name} ({e}); install a newer driver or build with its nvcc"
    return ""


def current_stream():
    """A function that maps a GPU's index to the handle of torch's current stream there."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw or (lambda index: torch.cuda.current_stream(index).cuda_stream)
