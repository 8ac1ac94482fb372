"""An exact sum-tree: draws rows with probability proportional to their priorities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreplay import _cpu
from fastreplay._device import Backend
from fastreplay._state import check_equal, check_integers, check_keys, check_tensor

if TYPE_CHECKING:  # the methods of both devices
    from fastreplay._cpu import SumTree as Compiled
else:
    Compiled = object

STAGING_SLOT = 1 << 16  # bytes: 4096 pairs of row and priority sent to a GPU at a time


class SumTree(Compiled):
    """Priorities of `capacity` rows, initially 0.

    Args:
        capacity: rows, 1 to 2^27.
        alpha: exponent of the priorities, 0 to 1000.
        seed: seed of the draws.
        device: "cpu", or "cuda", "cuda:1"... for a tree on that GPU.

    A priority p is stored as the integer clamp(rint(p^alpha * 2^20), 1, 2^32 - 1), or 0 if p is 0.
    A row of priority 0 is never drawn. Sums are exact integers, so they never drift. Draws are a
    function of (seed, calls, priorities), the same on every device: a tree restored by
    `load_state_dict`, a copy or an unpickled tree continues with the same draws.

    Methods (see their docstrings): set, get, total, find, sample, weights, check, check_valid.
    Arrays are torch tensors or NumPy arrays, 1-D and contiguous; rows may also be a list of ints.
    `out`, if given, is written and returned. Bad arguments raise TypeError (dtype), ValueError
    (shape, value) or IndexError (range), and change nothing.

    On a GPU, arguments may be on the CPU or on that GPU, and results are on the GPU. `set`, `get`,
    `find`, `sample` and `weights` run on the current stream. With arguments on the GPU they do not
    wait for it, and can be captured in a CUDA graph. Values on the GPU are checked there: a bad one
    changes nothing, and its error is latched. The next `check()`, `total()`, `calls`,
    `check_valid()` or `state_dict()`, which wait for the stream, raises it.

        tree = SumTree(1_000_000, alpha=0.6)
        tree.set(indices, priorities)
        indices = tree.sample(32)
        weights = tree.weights(indices, beta=0.4)
    """

    device: torch.device

    if TYPE_CHECKING:

        def __init__(
            self,
            capacity: int,
            alpha: float = 1.0,
            seed: int = 1,
            device: str | torch.device = "cpu",
        ) -> None: ...
        def _read_leaves(self, first: int, n: int) -> Tensor: ...
        def _write_leaves(self, first: int, leaves: Tensor) -> None: ...

    def __new__(
        cls,
        capacity: int,
        alpha: float = 1.0,
        seed: int = 1,
        device: str | torch.device = "cpu",
    ):
        if cls is SumTree:
            backend = Backend(device)
            cls = cuda_tree(backend.module) if backend.is_cuda else CpuSumTree
        return super().__new__(cls)

    def __len__(self) -> int:
        return self.capacity

    def state_dict(self) -> dict[str, Any]:
        """Priorities and draw counter. `leaves` (capacity,) int32 is the tree's own memory; for a
        tree on a GPU it is a copy on the CPU."""
        return {
            "capacity": self.capacity,
            "alpha": self.alpha,
            "seed": self.seed,
            "calls": self.calls,
            "leaves": self._read_leaves(0, self.capacity),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state of a tree of the same capacity and alpha, saved on any device.

        Raises ValueError if the state does not fit; the tree is unchanged then.
        """
        check_keys(state, ("capacity", "alpha", "seed", "calls", "leaves"), "SumTree")
        check_equal(state, {"capacity": self.capacity, "alpha": self.alpha})
        check_integers(state, {"seed": (0, 2**64 - 1), "calls": (0, 2**64 - 1)})
        check_tensor(state["leaves"], "leaves", torch.int32, (self.capacity,))
        self.check()
        self.seed, self.calls = state["seed"], state["calls"]
        self._write_leaves(0, state["leaves"])
        self.rebuild()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state)

    def __reduce__(self):
        arguments = (self.capacity, self.alpha, self.seed, str(self.device))
        return SumTree, arguments, self.state_dict()


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1000:
        raise ValueError(f"alpha must be from 0 to 1000, not {alpha}")


class CpuSumTree(SumTree, _cpu.SumTree):
    def __init__(self, capacity: int, alpha: float = 1.0, seed: int = 1, device="cpu"):
        leaf_slots, inner_slots = _cpu.SumTree.slots(capacity)
        check_alpha(alpha)
        backend = Backend(device)
        self.device = backend.torch_device
        self._leaves = torch.zeros(leaf_slots, dtype=torch.int32, device="cpu")
        self._inner = torch.zeros(inner_slots, dtype=torch.int64, device="cpu")
        memory = (self._leaves, self._inner)
        _cpu.SumTree.__init__(self, capacity, memory, backend.handle, alpha, seed % 2**64)

    def _read_leaves(self, first: int, n: int) -> Tensor:
        return self._leaves[first : first + n]

    def _write_leaves(self, first: int, leaves: Tensor) -> None:
        self._leaves[first : first + len(leaves)].copy_(leaves)


_cuda_trees: dict[Any, type] = {}


def cuda_tree(module: Any) -> type:
    """The class of trees on CUDA, created when the compiled module is first needed."""
    if module in _cuda_trees:
        return _cuda_trees[module]

    class CudaSumTree(SumTree, module.SumTree):
        def __init__(self, capacity: int, alpha: float = 1.0, seed: int = 1, device="cuda"):
            backend, slots = Backend(device), module.SumTree.slots(capacity)
            check_alpha(alpha)
            self.device = backend.torch_device
            nodes = backend.zeros(slots)
            leaf_slots = -(-capacity // 32) * 32
            self._leaves, self._inner = nodes[:leaf_slots], nodes[leaf_slots:]
            memory = (nodes, backend.zeros(8), backend.staging(STAGING_SLOT))
            module.SumTree.__init__(self, capacity, memory, backend.handle, alpha, seed % 2**64)

        def _read_leaves(self, first: int, n: int) -> Tensor:
            # A leaf is the low half of its 64-bit word.
            self.check()
            return self._leaves[first : first + n].view(torch.int32)[::2].cpu().contiguous()

        def _write_leaves(self, first: int, leaves: Tensor) -> None:
            words = leaves.to(self.device).to(torch.int64) & 0xFFFFFFFF
            self._leaves[first : first + len(leaves)].copy_(words)

    CudaSumTree.__qualname__ = "CudaSumTree"
    _cuda_trees[module] = CudaSumTree
    return CudaSumTree
