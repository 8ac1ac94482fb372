"""The device of a replay, and the compiled module for it."""

from __future__ import annotations

import importlib
import threading
from types import ModuleType
from typing import Any

import torch

MIN_CAPABILITY = (7, 5)  # compute capability that the kernels are compiled for

# The CUDA sources compiled for the CPU. Tests set it; device="cuda" then means this module.
emulation: ModuleType | None = None
checks_emulation = False  # whether the emulation is self-checked, too

# By GPU index, and for tiles by (index, "tiles"): what the self-check found, or "".
_self_checks: dict[int | tuple[int, str], str] = {}
_self_check_lock = threading.RLock()


class Backend:
    """A torch device, its compiled module, and that module's handle for the device."""

    def __init__(self, device: str | torch.device):
        device = torch.device(device)
        self.is_cuda = device.type == "cuda"
        if device.type == "cpu":
            self.module: Any = importlib.import_module("fastreplay._cpu")
            self.torch_device = device
            self.handle = self.module.Device(self.module.CPU_INDEX, device)
        elif device.type == "cuda":
            problem = cuda_problem(device.index)
            if problem:
                raise RuntimeError(problem)
            if emulation is not None:
                index, self.module, stream = 0, emulation, emulation.current_stream
            else:
                index = torch.cuda.current_device() if device.index is None else device.index
                self.module, stream = importlib.import_module("fastreplay._cuda"), current_stream()
            self.torch_device = torch.device("cuda", index)
            self.handle = self.module.Device(index, self.torch_device, stream)
        else:
            raise ValueError(f"device must be cpu or cuda, not {device}")

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def staging(self, slot_bytes: int) -> torch.Tensor:
        """The device side of the staging slots for data from the CPU."""
        slots = self.module.STAGING_SLOTS
        return self.zeros(slots * (slot_bytes + 15 & ~15), dtype=torch.uint8)

    def free_memory(self) -> int:
        """Free bytes for a new tensor on this GPU, including those in torch's cache."""
        index = self.torch_device.index
        cached = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        return self.module.free_memory(index) + cached


def cuda_problem(index: int | None = None) -> str:
    """Why device="cuda" (or the GPU with this index) cannot be used, in one line; "" if it can.

    index: of the GPU; None means torch's current one.

    The first call for a GPU that is otherwise usable runs a self-check, which compares a small
    replay on it with the same replay on the CPU.
    """
    if emulation is not None:
        return _self_check(0, "the emulated GPU") if checks_emulation else ""
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
    return _self_check(index, name)


def tiles_problem(index: int) -> str:
    """Why frames in tiles cannot be used on a GPU that is otherwise usable; "" if they can.

    The first call for a GPU runs a self-check of tiles.
    """
    if emulation is not None:
        return _self_check(0, "the emulated GPU", tiles=True) if checks_emulation else ""
    return _self_check(index, torch.cuda.get_device_name(index), tiles=True)


def _self_check(index: int, name: str, tiles: bool = False) -> str:
    """What is wrong with the results of a GPU, in one line; "" if they equal those of the CPU."""
    key = (index, "tiles") if tiles else index
    with _self_check_lock:
        if key not in _self_checks:
            _self_checks[key] = ""  # the check itself constructs replays on this GPU
            try:
                check = importlib.import_module("fastreplay._self_check")
                difference = check.difference_of_tiles if tiles else check.difference
                found = difference(f"cuda:{index}")
            except RuntimeError as e:  # such as too little memory: the next call tries again
                del _self_checks[key]
                line = str(e).splitlines()[0] if str(e) else type(e).__name__
                return f"fastreplay's self-check cannot run on {name}: {line}"
            except BaseException:  # such as Ctrl-C: this GPU has not passed
                del _self_checks[key]
                raise
            if found:
                _self_checks[key] = (
                    f"fastreplay's self-check failed on {name}: {found} differ from the CPU's; "
                    "please report it"
                )
        return _self_checks[key]


def current_stream():
    """A function that maps a GPU's index to the handle of torch's current stream there."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw or (lambda index: torch.cuda.current_stream(index).cuda_stream)
