"""A replay that keeps each frame once and builds stacks and n-step returns when it samples."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreplay import _cpu
from fastreplay._device import Backend
from fastreplay.sum_tree import SumTree


class Batch(NamedTuple):
    """B transitions of k <= n_step steps each."""

    obs: Tensor  # (B, stack, *frame_shape), or (B, *frame_shape) if stack is None
    actions: Tensor  # (B,) int64
    rewards: Tensor  # (B,) float32, sum of gamma^j r_j for j < k
    next_obs: Tensor  # as obs, k steps later
    discounts: Tensor  # (B,) float32, gamma^k (1 - terminated)
    indices: Tensor  # (B,) int64
    is_weights: Tensor  # (B,) float32, ones unless prioritized


class FrameReplay:
    """Rings of environment steps, one for each of `num_envs` games (rules: csrc/core/window.h).

    Args:
        capacity: rows in all; each game has capacity // num_envs.
        frame_shape: of one frame, such as (84, 84), or (4,) for plain vectors.
        num_envs: games that are stored side by side.
        stack: frames in an observation, 1 to 8; None for one frame without an axis for the stack.
        n_step: steps in a return.
        gamma: discount of one step.
        seed: of the draws, which are a function of (seed, number of draws so far).
        prioritized: draw rows in proportion to (|td_error| + per_epsilon)^per_alpha.
        per_alpha, per_epsilon: see there.
        per_beta: exponent of the importance weights; may be assigned at any time.
        stratified: draw i of a prioritized batch comes from the i-th equal part of the total.
        frame_dtype: torch.uint8, or torch.float32 for vectors.
        output_dtype: of obs and next_obs: torch.uint8 (the default), or float16, bfloat16 or
            float32, which hold frame * scale, computed in float32.
        scale: see there.
        memory_format: torch.contiguous_format or, for two-dimensional frames, torch.channels_last.
        threads: that copy a batch; by default those that torch computes with, as many as
            torch.set_num_threads says. Where torch has no GNU OpenMP: one a core, at most 4.
        device: "cpu", or "cuda" or "cuda:1"... for a replay on that GPU.
        storage: of the frames of a replay on a GPU: "device", or "host" for pinned memory of the
            host that the GPU reads across the bus, or "auto" for whichever has room. The attribute
            `storage` says which it became.

    On a GPU the same draws give the same batches, bit for bit, in tensors on that GPU. Every call
    runs on the current stream, after what the replay did before on whichever stream, and none of
    `add`, `sample(out=...)` and `update_priorities` allocates or waits for the GPU. (Until there is
    something to draw, `sample` looks, and waits.)

    CUDA graphs: `sample`, `update_priorities` and, of tensors on the GPU, `add` can be captured;
    each launch of the graph counts on, draws anew and uses the `per_beta` of that moment. Other
    attributes are as they were when captured. Order launches of the graph and other calls on
    different streams yourself: the replay does not see a launch.

    What only the GPU can see (an index or a TD error on the GPU that is no good, a row that is not
    drawable, nothing to draw) changes nothing, and gives samples that are all zeros. `check()`
    raises it, and so does `len` of a replay whose `add` was captured, and `state_dict`. These wait
    for the GPU.
    """

    def __init__(
        self,
        capacity: int,
        frame_shape: Sequence[int],
        num_envs: int = 1,
        stack: int | None = 4,
        n_step: int = 1,
        gamma: float = 0.99,
        seed: int = 1,
        *,
        prioritized: bool = False,
        per_alpha: float = 0.6,
        per_beta: float = 0.4,
        per_epsilon: float = 1e-6,
        stratified: bool = True,
        frame_dtype: torch.dtype = torch.uint8,
        output_dtype: torch.dtype | None = None,
        scale: float = 1 / 255,
        memory_format: torch.memory_format = torch.contiguous_format,
        threads: int | None = None,
        device: str | torch.device = "cpu",
        storage: str = "auto",
    ):
        frame_shape = tuple(int(side) for side in frame_shape)
        output_dtype = frame_dtype if output_dtype is None else output_dtype
        channels_last = memory_format == torch.channels_last
        byte_frames = frame_dtype == torch.uint8
        frames = 1 if stack is None else stack
        for name, value, low, high in (
            ("num_envs", num_envs, 1, 2**20),
            ("capacity", capacity, num_envs, 2**27),
            ("stack", frames, 1, 8),
            ("n_step", n_step, 1, 1000),
            ("gamma", gamma, 0, 1),
            ("per_alpha", per_alpha, 0, 1000),
            ("per_beta", per_beta, 0, 100),
            ("per_epsilon", per_epsilon, 1e-30, 1e30),
            ("scale", scale, -1e30, 1e30),
            ("threads", 1 if threads is None else threads, 1, 256),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, not {value}")
        if not 1 <= len(frame_shape) <= 8 or min(frame_shape) < 1:
            raise ValueError(f"frame_shape must hold 1 to 8 positive sides, not {frame_shape}")
        if frame_dtype not in (torch.uint8, torch.float32):
            raise TypeError(f"frame_dtype must be torch.uint8 or torch.float32, not {frame_dtype}")
        if output_dtype != frame_dtype and not (
            byte_frames and output_dtype in (torch.float16, torch.bfloat16, torch.float32)
        ):
            raise TypeError(f"{frame_dtype} frames cannot be returned as {output_dtype}")
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError("memory_format must be contiguous_format or channels_last")
        if channels_last and not (byte_frames and len(frame_shape) == 2 and stack is not None):
            raise ValueError("channels_last is for stacks of two-dimensional uint8 frames")

        if storage not in ("auto", "device", "host"):
            raise ValueError(f"storage must be auto, device or host, not {storage}")
        backend = Backend(device)
        self._backend, self.device = backend, backend.torch_device
        self.capacity, self.frame_shape, self.num_envs = capacity, frame_shape, num_envs
        self.stack, self.n_step, self.gamma = stack, n_step, gamma
        self.prioritized, self.stratified = prioritized, stratified
        self.per_alpha, self.per_epsilon = per_alpha, per_epsilon
        self.frame_dtype, self.output_dtype, self.scale = frame_dtype, output_dtype, scale
        self.memory_format = memory_format
        self.rows = capacity // num_envs

        shape, leaves = (num_envs, self.rows), num_envs * self.rows
        self._frames = self._allocate_frames(storage)
        self._actions = backend.zeros(*shape, dtype=torch.int32)
        self._rewards = backend.zeros(*shape, dtype=torch.float32)
        self._flags = backend.zeros(*shape, dtype=torch.uint8)
        self._tree = SumTree(leaves, per_alpha, seed, device) if prioritized else None
        powers = [float(gamma) ** k for k in range(n_step + 1)]
        powers = torch.tensor(powers, dtype=torch.float32, device=self.device)
        memory = (self._frames, self._actions, self._rewards, self._flags, powers)
        ring = backend.module.FrameRing
        if backend.is_cuda:
            row_bytes = ring.row_bytes(num_envs, self._frames[0, 0].nbytes)
            memory += (backend.staging(row_bytes), backend.zeros(8))
        self._ring = ring(
            memory,
            self._tree,
            backend.handle,
            frame_shape=frame_shape,
            frame_dtype=str(frame_dtype).removeprefix("torch."),
            output_dtype=str(output_dtype).removeprefix("torch."),
            stack=frames,
            stack_axis=stack is not None,
            threads=_default_threads() if threads is None else threads,
            seed=seed % 2**64,
        )
        self.per_beta = per_beta

    def _allocate_frames(self, storage: str) -> Tensor:
        shape = (self.num_envs, self.rows, *self.frame_shape)
        self.storage = "host"
        if not self._backend.is_cuda:
            # Not written until it is needed: an empty replay costs no memory.
            frames = torch.empty(shape, dtype=self.frame_dtype)
            _cpu.use_huge_pages(frames.data_ptr(), frames.nbytes)
            return frames
        size = math.prod(shape) * self.frame_dtype.itemsize
        # A tenth of what is free is left to the network.
        if storage == "device" or (storage == "auto" and size <= 0.9 * self._backend.free_memory()):
            try:
                frames = torch.empty(shape, dtype=self.frame_dtype, device=self.device)
                self.storage = "device"
                return frames
            except torch.OutOfMemoryError:  # there is room, but not in one piece
                if storage == "device":
                    raise
        pinned = self._backend.module.PinnedMemory(size, self.device.index)
        return torch.frombuffer(pinned, dtype=self.frame_dtype).view(shape)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.frame_shape))
        frames = f", frames on the {self.storage}" if self._backend.is_cuda else ""
        kind = "prioritized" if self.prioritized else "uniform"
        return (
            f"FrameReplay({self.capacity} rows of {shape}, {self.num_envs} games, {kind}, "
            f"on {self.device}{frames})"
        )

    @property
    def per_beta(self) -> float:
        return self._ring.beta

    @per_beta.setter
    def per_beta(self, beta: float) -> None:
        self._ring.beta = beta

    def __len__(self) -> int:
        """Rows stored, all games together."""
        return self._ring.stored * self.num_envs

    def add(self, frames, actions, rewards, terminations, episode_starts) -> None:
        """Stores one row for each game. Tensors on the CPU, NumPy arrays or tensors on `device`.

        Args:
            frames: (num_envs, *frame_shape) frame_dtype, the newest frame seen before acting. Each
                frame is contiguous; games may lie apart, as in `obs[:, -1]`.
            actions: (num_envs,) int64 or int32.
            rewards: (num_envs,) floats or integers, received for the action.
            terminations: (num_envs,) bool, the action ended the episode (or the life).
            episode_starts: (num_envs,) bool, the frame opened an episode.

        A final observation is a row of its own, whose action, reward and termination are ignored:
        the row before one that opens an episode. Raises TypeError (dtype) or ValueError (shape,
        stride, device), and stores nothing then.
        """
        self._ring.add(frames, actions, rewards, terminations, episode_starts)

    def drawable(self, indices) -> Tensor:
        """Whether each of `indices` (n,) int64 may start a transition: (n,) bool."""
        return self._ring.drawable(indices)

    def draw(self, batch_size: int) -> Tensor:
        """(batch_size,) int64 drawable rows. ValueError if there is none yet."""
        return self._ring.draw(batch_size, self.stratified)

    def gather(self, indices, out: Batch | None = None) -> Batch:
        """The transitions that start at `indices` (B,) int64; ValueError if one is not drawable.

        With one step and the contiguous format, obs and next_obs of a fresh batch are views of one
        (B, stack + 1, *frame_shape) block.
        """
        batch = self._empty_batch(len(indices)) if out is None else out
        self._fill(batch, indices)
        return batch

    def sample(self, batch_size: int, out: Batch | None = None) -> Batch:
        """gather(draw(batch_size)), in one call. Writes into `out`, a batch of that size, if given.

        Raises ValueError if there is no complete transition yet, or `out` has another shape or
        layout; TypeError if it has another dtype.
        """
        batch = self._empty_batch(batch_size) if out is None else out
        if len(batch.indices) != batch_size:
            raise ValueError(f"out holds {len(batch.indices)} samples, not {batch_size}")
        self._fill(batch, None)
        return batch

    def update_priorities(self, indices, td_error) -> None:
        """Sets priorities (|td_error| + per_epsilon)^per_alpha; among duplicates the last wins.

        `indices` (B,) int64, `td_error` (B,) float32 or float64. Rows that have been overwritten
        beyond use since they were drawn are skipped. Raises IndexError, or ValueError for NaN and
        infinity, and changes nothing then; RuntimeError if the replay is not prioritized.
        """
        if self._tree is None:
            raise RuntimeError("this replay is uniform: construct it with prioritized=True")
        self._ring.update(indices, td_error, self.per_alpha, self.per_epsilon)

    def state_dict(self) -> dict[str, Any]:
        """What a replay needs to go on: the rows stored, their priorities, the draw counter.

        Like a module's, the tensors are the replay's own memory, so that saving does not double
        it: save, or deep-copy, before the next add. They hold stored rows only.

        Of a replay on a GPU they are copies on the CPU, one for each game, which takes as much
        memory there as the stored rows (frames on the host are not copied). A state may be loaded
        on another device than it was saved on.
        """
        self.check()
        stored = self._ring.stored

        def rows(tensor):  # one tensor a game, whose storage is just these rows
            return [torch.from_numpy(game[:stored].cpu().numpy()) for game in tensor]

        state = {name: getattr(self, name) for name in self._fixed()}
        state["frame_shape"] = list(self.frame_shape)
        state |= {"stored": stored, "head": self._ring.head, "calls": self._ring.calls}
        state |= {"seed": self._ring.seed, "max_leaf": self._ring.max_leaf}
        state |= {"frames": rows(self._frames), "actions": rows(self._actions)}
        state |= {"rewards": rows(self._rewards), "flags": rows(self._flags)}
        if self._tree is not None:
            firsts = range(0, self.num_envs * self.rows, self.rows)
            leaves = (self._tree._read_leaves(first, stored) for first in firsts)
            state["leaves"] = [torch.from_numpy(game.numpy()) for game in leaves]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state of a like replay. ValueError, and no change, otherwise."""
        stored, head = self._check_state(state)
        flags = torch.zeros(self._flags.shape, dtype=torch.uint8)
        for game in range(self.num_envs):
            flags[game, :stored] = state["flags"][game]
        n_drawable = _cpu.mark_drawable(flags, stored, head, self.stack or 1, self.n_step)
        if self._tree is not None:
            for game, leaves in enumerate(state["leaves"]):
                if not torch.equal(leaves.cpu() != 0, flags[game, :stored] >= 4):
                    raise ValueError("the state is damaged: its priorities do not fit its rows")
        self.check()
        for name in ("frames", "actions", "rewards"):
            for mine, theirs in zip(getattr(self, f"_{name}"), state[name]):
                mine[:stored] = theirs
        self._flags.copy_(flags)
        if self._tree is not None:
            leaves = torch.zeros(self.rows, dtype=torch.int32)
            for game in range(self.num_envs):
                leaves[:stored] = state["leaves"][game]
                self._tree._write_leaves(game * self.rows, leaves)
        self._ring.seed = state["seed"]
        self._ring.restore(stored, head, n_drawable, state["max_leaf"], state["calls"])

    def check(self) -> None:
        """Waits for the GPU and raises what went wrong there since the last call that waited.

        On the CPU nothing waits to be told.
        """
        if self._backend.is_cuda:
            self._ring.check()

    def _empty_batch(self, n: int) -> Batch:
        dtype, frame_shape = self.output_dtype, self.frame_shape
        empty = partial(torch.empty, device=self.device)
        if self.n_step == 1 and self.memory_format == torch.contiguous_format:
            block = empty((n, (self.stack or 1) + 1, *frame_shape), dtype=dtype)
            if self.stack is None:
                obs, next_obs = block.select(1, 0), block.select(1, 1)
            else:
                obs, next_obs = block.narrow(1, 0, self.stack), block.narrow(1, 1, self.stack)
        else:
            shape = (n, *frame_shape) if self.stack is None else (n, self.stack, *frame_shape)
            obs = empty(shape, dtype=dtype, memory_format=self.memory_format)
            next_obs = empty(shape, dtype=dtype, memory_format=self.memory_format)
        actions, indices = empty((2, n), dtype=torch.int64)
        rewards, discounts, is_weights = empty((3, n), dtype=torch.float32)
        return Batch(obs, actions, rewards, next_obs, discounts, indices, is_weights)

    def _fill(self, batch: Batch, indices: Any) -> None:
        channels_last = self.memory_format == torch.channels_last
        self._ring.gather(indices, batch, self.stratified, self.scale, channels_last)

    def _fixed(self) -> tuple[str, ...]:
        return ("capacity", "num_envs", "stack", "n_step", "gamma", "prioritized", "per_alpha")

    def _tensors(self) -> dict[str, torch.dtype]:
        dtypes = {"frames": self.frame_dtype, "actions": torch.int32, "rewards": torch.float32}
        dtypes["flags"] = torch.uint8
        return dtypes | ({"leaves": torch.int32} if self._tree is not None else {})

    def _check_state(self, state: dict[str, Any]) -> tuple[int, int]:
        numbers = ("stored", "head", "calls", "seed", "max_leaf")
        needed = {*self._fixed(), "frame_shape", *numbers, *self._tensors()}
        if not isinstance(state, dict) or needed - set(state):
            lacks = ", ".join(sorted(needed - set(state))) if isinstance(state, dict) else "all"
            raise ValueError(f"the state is not one of a FrameReplay like this; it lacks: {lacks}")
        for name in (*self._fixed(), "frame_shape"):
            mine = list(self.frame_shape) if name == "frame_shape" else getattr(self, name)
            if state[name] != mine:
                raise ValueError(f"the state has {name} {state[name]}, this replay {mine}")
        stored, head, calls, seed, max_leaf = (state[name] for name in numbers)
        if not all(isinstance(state[name], int) for name in numbers):
            raise ValueError(f"the state is damaged: {', '.join(numbers)} must be integers")
        full = stored == self.rows
        if not (0 <= stored <= self.rows and 0 <= head < self.rows and (full or head == stored)):
            raise ValueError(f"the state is damaged: {stored} rows stored, write head at {head}")
        if not (0 <= calls < 2**64 and 0 <= seed < 2**64 and 2**20 <= max_leaf < 2**32):
            raise ValueError("the state is damaged: calls, seed or max_leaf is out of range")
        for name, dtype in self._tensors().items():
            shape = (stored, *(self.frame_shape if name == "frames" else ()))
            games = state[name]
            if len(games) != self.num_envs or any(
                game.dtype != dtype or tuple(game.shape) != shape for game in games
            ):
                raise ValueError(f"the state is damaged: {name} must be {dtype} of shape {shape}")
        return stored, head


def _default_threads() -> int:
    """0 stands for torch's own."""
    return 0 if _cpu.openmp_threads() > 0 else min(os.cpu_count() or 1, 4)
