"""An exact sum-tree: draws indices with probability proportional to their priorities."""

from __future__ import annotations

from typing import Any

import torch

from fastreplay import _cpu


class SumTree(_cpu.SumTree):
    """Priorities of `capacity` rows (1 to 2^27), all 0 at first.

    A priority p is kept as the integer clamp(rint(p^alpha * 2^20), 1, 2^32 - 1), or 0 if p is 0,
    which is never drawn. Sums are exact, so they never drift; duplicates in one `set` are allowed,
    the last wins. Draws are a function of (seed, calls): a tree restored by `load_state_dict` goes
    on with the draws of the tree that was saved.

    Arguments are torch tensors on the CPU or NumPy arrays, 1-D and contiguous. `out`, where given,
    is written and returned. Bad arguments raise TypeError (dtype), ValueError (shape, values) or
    IndexError (range), and change nothing.

        tree = SumTree(1_000_000, alpha=0.6)
        tree.set(indices, priorities)
        indices = tree.sample(32)
        weights = tree.weights(indices, beta=0.4)
    """

    def __init__(self, capacity: int, alpha: float = 1.0, seed: int = 1):
        leaf_slots, inner_slots = _cpu.SumTree.slots(capacity)
        if not 0 <= alpha <= 1000:
            raise ValueError(f"alpha must be from 0 to 1000, not {alpha}")
        self._leaves = torch.zeros(leaf_slots, dtype=torch.int32)
        self._inner = torch.zeros(inner_slots, dtype=torch.int64)
        super().__init__(capacity, self._leaves, self._inner, alpha, seed % 2**64)

    def __len__(self) -> int:
        return self.capacity

    # set, get, total, find, sample, weights, check_valid: compiled, documented in bindings.cpp.

    def state_dict(self) -> dict[str, Any]:
        """Priorities and draw counter. `leaves` is the tree's own memory, not a copy."""
        return {
            "capacity": self.capacity,
            "alpha": self.alpha,
            "seed": self.seed,
            "calls": self.calls,
            "leaves": self._leaves[: self.capacity],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state of a tree of the same capacity and alpha; ValueError otherwise."""
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
        self.seed, self.calls = state["seed"], state["calls"]
        self._leaves[: self.capacity].copy_(leaves)
        self.rebuild()
