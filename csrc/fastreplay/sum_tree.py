"""An exact sum-tree: draws indices with probability proportional to their priorities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreplay import _cpu
from fastreplay._device import Place

if TYPE_CHECKING:  # the methods of both devices
    from fastreplay._cpu import SumTree as Compiled
else:
    Compiled = object

PRIORITY_SLOT = 1 << 16  # bytes: 4096 pairs of index and priority from the CPU at a time


class SumTree(Compiled):
    """Priorities of `capacity` rows (1 to 2^27), all 0 at first.

    A priority p is kept as the integer clamp(rint(p^alpha * 2^20), 1, 2^32 - 1), or 0 if p is 0,
    which is never drawn. Sums are exact, so they never drift; duplicates in one `set` are allowed,
    the last wins. Draws are a function of (seed, calls): a tree restored by `load_state_dict` goes
    on with the draws of the tree that was saved.

    Arguments are torch tensors on the CPU or NumPy arrays, 1-D and contiguous. `out`, where given,
    is written and returned. Bad arguments raise TypeError (dtype), ValueError (shape, values) or
    IndexError (range), and change nothing.

    With `device="cuda"` (or "cuda:1"...) the tree lies on that GPU and draws the same rows.
    Arguments may be tensors there too, and results are. `set`, `sample`, `find`, `get` and
    `weights` run on the current stream and wait for nothing; given tensors of the GPU, they can be
    captured in a CUDA graph. Values on the GPU are checked there: a bad one changes nothing, and
    `check()`, `total()`, `calls`, `check_valid()` and `state_dict()`, which wait for the GPU,
    raise the error.

        tree = SumTree(1_000_000, alpha=0.6)
        tree.set(indices, priorities)
        indices = tree.sample(32)
        weights = tree.weights(indices, beta=0.4)
    """

    # set, get, total, find, sample, weights, check_valid: compiled, documented in bindings.cpp.

    device: torch.device

    if TYPE_CHECKING:

        def __init__(
            self,
            capacity: int,
            alpha: float = 1.0,
            seed: int = 1,
            device: str | torch.device = "cpu",
        ) -> None: ...
        def check(self) -> None: ...
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
            place = Place(device)
            cls = cuda_tree(place.module) if place.is_cuda else CpuSumTree
        return super().__new__(cls)

    def __len__(self) -> int:
        return self.capacity

    def state_dict(self) -> dict[str, Any]:
        """Priorities and draw counter. `leaves` is the tree's own memory, not a copy, but of a tree
        on CUDA a copy on the CPU."""
        return {
            "capacity": self.capacity,
            "alpha": self.alpha,
            "seed": self.seed,
            "calls": self.calls,
            "leaves": self._read_leaves(0, self.capacity),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state of a tree of the same capacity and alpha, on whichever device it was;
        ValueError otherwise."""
        missing = {"capacity", "alpha", "seed", "calls", "leaves"} - set(state)
        if missing:
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}")
        for name in ("capacity", "alpha"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state has {name} {state[name]}, this tree {getattr(self, name)}"
                )
        leaves = state["leaves"]
        if leaves.dtype != torch.int32 or leaves.shape != (self.capacity,):
            raise ValueError(f"leaves must be int32 of shape ({self.capacity},)")
        self.check()
        self.seed, self.calls = state["seed"], state["calls"]
        self._write_leaves(0, leaves)
        self.rebuild()


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1000:
        raise ValueError(f"alpha must be from 0 to 1000, not {alpha}")


class CpuSumTree(SumTree, _cpu.SumTree):
    def __init__(self, capacity: int, alpha: float = 1.0, seed: int = 1, device="cpu"):
        leaf_slots, inner_slots = _cpu.SumTree.slots(capacity)
        check_alpha(alpha)
        self.device = torch.device("cpu")
        self._leaves = torch.zeros(leaf_slots, dtype=torch.int32)
        self._inner = torch.zeros(inner_slots, dtype=torch.int64)
        _cpu.SumTree.__init__(self, capacity, self._leaves, self._inner, alpha, seed % 2**64)

    def check(self) -> None:
        """Raises what went wrong since the last check: on the CPU, nothing waits to be told."""

    def _read_leaves(self, first: int, n: int) -> Tensor:
        return self._leaves[first : first + n]

    def _write_leaves(self, first: int, leaves: Tensor) -> None:
        self._leaves[first : first + len(leaves)].copy_(leaves)


_cuda_trees: dict[Any, type] = {}


def cuda_tree(module: Any) -> type:
    """The class of trees on CUDA: made when the compiled module is first wanted."""
    if module in _cuda_trees:
        return _cuda_trees[module]

    class CudaSumTree(SumTree, module.SumTree):
        def __init__(self, capacity: int, alpha: float = 1.0, seed: int = 1, device="cuda"):
            place, slots = Place(device), module.SumTree.slots(capacity)
            check_alpha(alpha)
            self.device = place.torch_device
            nodes, counters = place.zeros(slots), place.zeros(8)
            staging = place.staging(PRIORITY_SLOT)
            memory = (nodes, counters, staging, place.zeros(1))
            leaf_slots = -(-capacity // 32) * 32
            self._leaves, self._inner = nodes[:leaf_slots], nodes[leaf_slots:]
            module.SumTree.__init__(self, capacity, memory, place.handle, alpha, seed % 2**64)

        def _read_leaves(self, first: int, n: int) -> Tensor:
            # the low halves of the words, as they are in memory
            self.check()
            return self._leaves[first : first + n].view(torch.int32)[::2].cpu().contiguous()

        def _write_leaves(self, first: int, leaves: Tensor) -> None:
            words = leaves.to(self.device).to(torch.int64) & 0xFFFFFFFF
            self._leaves[first : first + len(leaves)].copy_(words)

    CudaSumTree.__qualname__ = "CudaSumTree"
    _cuda_trees[module] = CudaSumTree
    return CudaSumTree
