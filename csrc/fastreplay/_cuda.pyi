from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Array = Tensor | NDArray[Any]
Rows = Array | Sequence[int]
CPU_INDEX: int
STAGING_SLOTS: int

class Device:
    def __init__(
        self,
        index: int,
        torch_device: torch.device,
        current_stream: Callable[[int], int] | None = None,
    ) -> None: ...

class SumTree:
    def __init__(
        self,
        capacity: int,
        memory: tuple[Tensor, ...],
        device: Device,
        alpha: float,
        seed: int,
    ) -> None: ...
    @staticmethod
    def slots(capacity: int) -> int: ...
    def set(self, indices: Rows, priorities: Array) -> None: ...
    def get(self, indices: Rows, out: Tensor | None = None) -> Tensor: ...
    def total(self) -> int: ...
    def find(self, targets: Rows, out: Tensor | None = None) -> Tensor: ...
    def sample(
        self, batch_size: int, stratified: bool = False, out: Tensor | None = None
    ) -> Tensor: ...
    def weights(self, indices: Rows, beta: float, out: Tensor | None = None) -> Tensor: ...
    def check(self) -> None: ...
    def check_valid(self) -> None: ...
    def rebuild(self) -> None: ...
    @property
    def capacity(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    seed: int
    calls: int

class FrameRing:
    def __init__(
        self,
        memory: tuple[Tensor, ...],
        tree: SumTree | None,
        device: Device,
        frame_shape: tuple[int, ...],
        frame_dtype: str,
        output_dtype: str,
        stack: int,
        stack_axis: bool,
        threads: int,
        seed: int,
    ) -> None: ...
    @staticmethod
    def row_bytes(num_envs: int, frame_bytes: int) -> int: ...
    def add(
        self,
        frames: Array,
        actions: Array,
        rewards: Array,
        terminations: Array,
        episode_starts: Array,
    ) -> None: ...
    def draw(self, batch_size: int, stratified: bool) -> Tensor: ...
    def gather(
        self,
        indices: Rows | None,
        n: int,
        batch: tuple[Array, ...],
        stratified: bool,
        scale: float,
        channels_last: bool,
    ) -> None: ...
    def drawable(self, indices: Rows) -> Tensor: ...
    def update(self, indices: Rows, td_error: Array, alpha: float, epsilon: float) -> None: ...
    def restore(
        self, stored: int, head: int, n_drawable: int, max_leaf: int, calls: int
    ) -> None: ...
    def check(self) -> None: ...
    @property
    def stored(self) -> int: ...
    @property
    def head(self) -> int: ...
    @property
    def n_drawable(self) -> int: ...
    @property
    def max_leaf(self) -> int: ...
    @property
    def calls(self) -> int: ...
    beta: float
    seed: int

class PinnedMemory:
    def __init__(self, bytes: int, index: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def free_memory(index: int) -> int: ...
def use_kernels(kernels: str) -> str: ...
