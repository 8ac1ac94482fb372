"""A replay that stores each frame once, and builds stacks and n-step returns when it samples."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreplay import _cpu
from fastreplay._device import Backend, tiles_problem
from fastreplay._state import check_equal, check_integers, check_keys, check_tensor
from fastreplay.sum_tree import SumTree

DRAWABLE, ALL_FLAGS = 4, 31  # RowFlag of csrc/core/window.h: kDrawable, and all of them
MAX_TILED_FRAME = 2**18  # bytes
TILE_BYTES = 28  # kTileBytes of csrc/core/tiles.h
UNIFORM = "this replay is uniform: construct it with prioritized=True"


class Batch(NamedTuple):
    """B transitions of k <= n_step steps each."""

    obs: Tensor  # (B, stack, *frame_shape), or (B, *frame_shape) if stack is None
    actions: Tensor  # (B,) int64
    rewards: Tensor  # (B,) float32, sum of gamma^j r_j for j < k
    next_obs: Tensor  # like obs, k steps later
    discounts: Tensor  # (B,) float32, gamma^k (1 - terminated)
    indices: Tensor  # (B,) int64
    is_weights: Tensor  # (B,) float32, ones unless prioritized


class FrameReplay:
    """A ring buffer of environment steps for each of `num_envs` games.

    Args:
        capacity: rows in all; each game has capacity // num_envs, at least 2.
        frame_shape: shape of one frame, such as (84, 84), or (4,) for plain vectors.
        num_envs: number of games.
        stack: frames in an observation, 1 to 8; None for one frame without an axis for the stack.
        n_step: steps in a return, 1 to 1000.
        gamma: discount of one step, 0 to 1.
        seed: seed of the draws, which are a function of (seed, number of draws so far).
        prioritized: draw rows with probability proportional to their priority
            (|td_error| + per_epsilon)^per_alpha.
        per_alpha, per_epsilon: see `prioritized`.
        per_beta: exponent of the importance weights; may be assigned at any time.
        stratified: draw i of a prioritized batch comes from the i-th equal part of the total.
        frame_dtype: torch.uint8, or torch.float32 for vectors.
        output_dtype: dtype of obs and next_obs: frame_dtype (the default) or, for uint8 frames,
            float16, bfloat16 or float32. These are frame * scale, computed in float32.
        scale: see `output_dtype`.
        memory_format: torch.contiguous_format or, for two-dimensional frames, torch.channels_last.
        threads: number of threads that copy a batch, 1 to 256. The default is torch's own threads
            (torch.set_num_threads) or, if torch has no GNU OpenMP, one per core, at most 4.
        device: "cpu", or "cuda", "cuda:1"... for a replay on that GPU.
        storage: how and where frames are stored. "tiles": compact and lossless, a hundredth
            (Breakout) to a tenth (Enduro) of the plain size, for uint8 frames of at most 2^18
            bytes; on a GPU in its memory. The others are plain: on a GPU "device", "host" for
            pinned host memory, which the GPU reads over the bus, or "auto" for the first of the two
            that has room; on the CPU all three are its memory. The attribute `storage` is the one
            in use.

    Raises ValueError for a value out of range and TypeError for a wrong type. A replay can be
    pickled and deep-copied. Threads may share a replay; a call that waits for another call releases
    the GIL.

    A replay on a GPU draws the same rows and builds the same batches as on the CPU, bit for bit, in
    tensors on that GPU. Every call runs on the current stream, after all earlier calls of the
    replay on any stream. `add`, `sample(out=...)` and `update_priorities` do not allocate or wait
    for the GPU, with three exceptions: `sample` waits until one call has found a drawable row,
    `add` of rows on the CPU if the GPU is eight adds behind, and indices on the CPU are copied.

    Tiles: frames are cut into tiles of 2x14 bytes, and tiles that occur again are stored once.
    Batches are those of plain frames, bit for bit. The memory grows with what the frames show (see
    `nbytes`). Frames that do not repeat, such as noise, are kept plain, 32 rows of a game at a
    time, so that the worst case takes at most 1.4 times the plain memory. If memory runs out, `add`
    raises MemoryError (torch.OutOfMemoryError on a GPU) and changes nothing.

    Tiles on a GPU: the CPU finds equal tiles, so `add` codes the frames there, keeps them in the
    CPU's memory too, and sends only what is new. Samples read the tiles in the GPU's memory, of
    which `add` allocates segments of 2 MiB or more when they are needed; they are not returned
    before the replay is deleted or another state is loaded. Frames that are on the GPU already are
    copied to the CPU first, for which `add` waits. `add` cannot be captured in a CUDA graph
    (RuntimeError). All of this was tested on an emulation only; no GPU has run it yet.

    CUDA graphs: `sample`, `update_priorities` and, with tensors on the GPU, `add` can be captured.
    Each launch of the graph continues the draws and uses the current `per_beta`; other attributes
    have the value they had at the capture. Launches and other calls run in program order too,
    whatever their streams: each captured call adds event nodes to its graph, which therefore cannot
    be the body of a conditional node. Within one graph, all calls of a replay must be captured on
    one stream (RuntimeError). A graph must not be launched after its replay has been deleted.

    Errors that only the GPU can detect (a row out of range or not drawable, a TD error that is not
    finite, nothing to draw) change nothing, and the samples concerned are all zeros. The error is
    latched, and the next `check()` or `state_dict()`, which wait for the GPU, raises it.
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
        capacity = _integer("capacity", capacity, 1, 2**27)
        num_envs = _integer("num_envs", num_envs, 1, 2**20)
        stack = None if stack is None else _integer("stack", stack, 1, 8)
        n_step = _integer("n_step", n_step, 1, 1000)
        threads = None if threads is None else _integer("threads", threads, 1, 256)
        seed = _integer("seed", seed)
        gamma = _number("gamma", gamma, 0, 1)
        per_alpha = _number("per_alpha", per_alpha, 0, 1000)
        per_beta = _number("per_beta", per_beta, 0, 100)
        per_epsilon = _number("per_epsilon", per_epsilon, 1e-30, 1e30)
        scale = _number("scale", scale, -1e30, 1e30)
        frames = stack or 1
        if capacity < 2 * num_envs:
            raise ValueError(
                f"capacity must be at least {2 * num_envs} (2 rows for each game, num_envs = "
                f"{num_envs}), not {capacity}; a transition far from the start and the end of its "
                f"episode takes n_step + stack = {n_step + frames} rows of its game"
            )
        frame_shape = tuple(_integer("frame_shape", side, 1, 2**30) for side in frame_shape)
        if not 1 <= len(frame_shape) <= 8:
            raise ValueError(f"frame_shape must have 1 to 8 dimensions, not {len(frame_shape)}")
        output_dtype = frame_dtype if output_dtype is None else output_dtype
        byte_frames = frame_dtype == torch.uint8
        if frame_dtype not in (torch.uint8, torch.float32):
            raise TypeError(f"frame_dtype must be torch.uint8 or torch.float32, not {frame_dtype}")
        if output_dtype != frame_dtype and not (
            byte_frames and output_dtype in (torch.float16, torch.bfloat16, torch.float32)
        ):
            raise TypeError(f"output_dtype of {frame_dtype} frames cannot be {output_dtype}")
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError("memory_format must be contiguous_format or channels_last")
        if memory_format == torch.channels_last and not (
            byte_frames and len(frame_shape) == 2 and stack is not None
        ):
            raise ValueError("channels_last is for stacks of two-dimensional uint8 frames")
        if storage not in ("auto", "device", "host", "tiles"):
            raise ValueError(f"storage must be auto, device, host or tiles, not {storage}")
        if storage == "tiles" and not byte_frames:
            raise TypeError(f"storage='tiles' is for uint8 frames, not {frame_dtype}")
        if storage == "tiles" and math.prod(frame_shape) > MAX_TILED_FRAME:
            raise ValueError(
                f"storage='tiles' is for frames of at most {MAX_TILED_FRAME} bytes, and those of "
                f"frame_shape {frame_shape} have {math.prod(frame_shape)}: omit storage"
            )

        backend = Backend(device)
        if storage == "tiles" and backend.is_cuda:
            problem = tiles_problem(backend.torch_device.index)
            if problem:
                raise RuntimeError(problem)
        self._backend, self.device = backend, backend.torch_device
        self.capacity, self.frame_shape, self.num_envs = capacity, frame_shape, num_envs
        self.stack, self.n_step, self.gamma = stack, n_step, gamma
        self.prioritized, self.stratified = prioritized, stratified
        self.per_alpha, self.per_epsilon = per_alpha, per_epsilon
        self.frame_dtype, self.output_dtype, self.scale = frame_dtype, output_dtype, scale
        self.memory_format, self.threads = memory_format, threads
        self.rows = capacity // num_envs

        shape, leaves = (num_envs, self.rows), num_envs * self.rows
        self._frames = self._allocate_frames(storage)
        self._actions = backend.zeros(*shape, dtype=torch.int32)
        self._rewards = backend.zeros(*shape, dtype=torch.float32)
        self._flags = backend.zeros(*shape, dtype=torch.uint8)
        self._tree = SumTree(leaves, per_alpha, seed, device) if prioritized else None
        powers = [gamma**k for k in range(n_step + 1)]
        powers = torch.tensor(powers, dtype=torch.float32, device=self.device)
        memory: tuple[Any, ...] = (self._frames, self._actions, self._rewards, self._flags, powers)
        ring = backend.module.FrameRing
        if backend.is_cuda:
            frame_bytes = math.prod(frame_shape) * frame_dtype.itemsize
            row_bytes = ring.row_bytes(num_envs, frame_bytes, self._frames is None)
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

    def _allocate_frames(self, storage: str) -> Tensor | None:
        """The memory of plain frames. Sets `storage`."""
        if storage == "tiles":
            self.storage = storage
            return None
        shape = (self.num_envs, self.rows, *self.frame_shape)
        self.storage = "host"
        if not self._backend.is_cuda:
            # Not zeroed, so that the system allocates memory only for rows that are written.
            frames = torch.empty(shape, dtype=self.frame_dtype, device="cpu")
            _cpu.use_huge_pages(frames.data_ptr(), frames.nbytes)
            return frames
        size = math.prod(shape) * self.frame_dtype.itemsize
        # A tenth of the free memory is left for the network.
        if storage == "device" or (storage == "auto" and size <= 0.9 * self._backend.free_memory()):
            try:
                frames = torch.empty(shape, dtype=self.frame_dtype, device=self.device)
                self.storage = "device"
                return frames
            except torch.OutOfMemoryError:  # the free memory is fragmented
                if storage == "device":
                    raise
        pinned = self._backend.module.PinnedMemory(size, self.device.index)
        return torch.frombuffer(pinned, dtype=self.frame_dtype).view(shape)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.frame_shape))
        frames = f", frames on the {self.storage}" if self._backend.is_cuda else ""
        frames = ", frames in tiles" if self._frames is None else frames
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

    @property
    def max_priority(self) -> float:
        """The largest priority p = (|td_error| + per_epsilon)^per_alpha so far, initially 1.

        New rows get this priority. It is quantised to multiples of 2^-20 and at most 2^12; to
        compare it with TD errors, use max_priority ** (1 / per_alpha) - per_epsilon. On a GPU,
        waits for the GPU. Raises RuntimeError if the replay is not prioritized.
        """
        if self._tree is None:
            raise RuntimeError(UNIFORM)
        return self._ring.max_leaf / 2**20

    @property
    def nbytes(self) -> int:
        """Bytes that the replay takes now: all its rows, also if they are not stored yet, and of
        tiles the segments that are allocated. On a GPU with tiles: the memory of the GPU, without
        the copy of the tiles on the CPU."""
        tensors = [self._actions, self._rewards, self._flags]
        if self._tree is not None:
            tensors += [self._tree._leaves, self._tree._inner]
        if self._frames is None:
            return sum(tensor.nbytes for tensor in tensors) + self._ring.tile_counts()[2]
        return sum(tensor.nbytes for tensor in [*tensors, self._frames])

    def __len__(self) -> int:
        """Stored rows of all games. On a GPU, waits if a captured `add` may have run."""
        return self._ring.stored * self.num_envs

    def add(self, frames, actions, rewards, terminations, episode_starts) -> None:
        """Stores one row of each game, from NumPy arrays or tensors on the CPU or on `device`.

        Args:
            frames: (num_envs, *frame_shape) frame_dtype, the newest frame seen before acting. Each
                frame must be contiguous, but there may be gaps between frames, as in `obs[:, -1]`.
            actions: (num_envs,) int64 or int32; a negative one marks context (below).
            rewards: (num_envs,) floats or integers, received for the action.
            terminations: (num_envs,) bool, the action ended the episode (or the life).
            episode_starts: (num_envs,) bool, the frame opened an episode.

        The row before one that opens an episode is a final observation. Its action, reward and
        termination are ignored.

        A row whose action is negative is context: it is part of stacks and returns, but it is never
        drawn. So games need not be stored from beginning to end: any piece of one can follow any
        other, if its first row opens an episode, the `stack` - 1 rows before its first transition
        are context, and so are the `n_step` rows after its last one.

        Raises TypeError (dtype) or ValueError (shape, stride, device, an
        action that does not fit 32 bits); in both cases nothing is stored.
        """
        self._ring.add(frames, actions, rewards, terminations, episode_starts)

    def drawable(self, indices) -> Tensor:
        """Whether each of `indices` (B,) int64, int32 or a list, may start a transition: (B,) bool.

        Raises IndexError for a row out of range.
        """
        return self._ring.drawable(indices)

    def draw(self, batch_size: int) -> Tensor:
        """Draws (batch_size,) int64 drawable rows. Raises ValueError if there is none yet."""
        return self._ring.draw(batch_size, self.stratified)

    def gather(self, indices, out: Batch | None = None) -> Batch:
        """The transitions that start at `indices` (B,) int64, int32 or a list.

        `out`, a batch of that size, is written and returned if given; see `sample`. With one step
        and the contiguous format, obs and next_obs of a new batch are views of one (B, stack + 1,
        *frame_shape) block. Raises IndexError for a row out of range, ValueError if one is not
        drawable.
        """
        n = len(indices) if hasattr(indices, "__len__") else 0
        batch = self._empty_batch(n) if out is None else _as_batch(out)
        if indices is None:
            raise TypeError("indices must be integers, not None")
        self._fill(n, batch, indices)
        return batch

    def sample(self, batch_size: int, out: Batch | None = None) -> Batch:
        """gather(draw(batch_size)), in one call.

        `out` is a Batch, or a tuple of its seven arrays, that is written and returned as a Batch.
        Raises ValueError if there is no complete transition yet or an array of `out` has another
        shape, layout or device or is read-only, TypeError if it has another dtype. In both cases
        nothing is drawn.
        """
        if not 0 <= batch_size < 2**31:
            raise ValueError(f"batch_size must be from 0 to 2^31 - 1, not {batch_size}")
        batch = self._empty_batch(batch_size) if out is None else _as_batch(out)
        self._fill(batch_size, batch, None)
        return batch

    def update_priorities(self, indices, td_error) -> None:
        """Sets priorities (|td_error| + per_epsilon)^per_alpha; among duplicates the last one wins.

        Args:
            indices: (B,) int64, int32 or a list, such as `batch.indices`.
            td_error: (B,) float32 or float64, finite.

        Rows that are not drawable now are skipped. So are rows that have replaced an older row and
        have not been sampled, drawn or gathered since, because the priority belongs to the older
        row. (If a later batch has sampled such a row, the row takes the priority of the older row
        until the update of that batch corrects it: an index does not show which of the two rows is
        meant.) max_priority includes the values of skipped rows.

        Raises IndexError (range), ValueError (shape, NaN, infinity) or TypeError (dtype) without
        changing anything; RuntimeError if the replay is not prioritized.
        """
        if self._tree is None:
            raise RuntimeError(UNIFORM)
        self._ring.update(indices, td_error, self.per_alpha, self.per_epsilon)

    def set_newest_priorities(self, td_error) -> None:
        """Sets the priorities of the newest n rows of each game, from a first estimate.

        Args:
            td_error: (num_envs, n) float32 or float64, finite, of the oldest row first.

        Without this call, new rows have the largest priority so far. Rows that are not drawable are
        skipped. Raises ValueError (shape, NaN, infinity, more than the stored rows) or TypeError
        (dtype) without changing anything; RuntimeError if the replay is not prioritized. Source:
        Ape-X (Horgan et al., 2018; arXiv:1803.00933), whose actors compute these priorities.
        """
        if self._tree is None:
            raise RuntimeError(UNIFORM)
        is_tensor, stored = isinstance(td_error, torch.Tensor), self._ring.stored
        errors = td_error if is_tensor else torch.as_tensor(td_error, device="cpu")
        n = errors.shape[1] if errors.ndim == 2 else -1
        if errors.ndim != 2 or len(errors) != self.num_envs or n > stored:
            raise ValueError(
                f"td_error must have shape ({self.num_envs}, n), with n at most {stored}, the rows "
                f"that each game has stored, not {tuple(errors.shape)}"
            )
        slots = (self._ring.head - n + torch.arange(n, device="cpu")) % self.rows
        games = torch.arange(self.num_envs, device="cpu")
        indices = (games[:, None] * self.rows + slots).flatten()
        errors = errors.flatten()
        self._ring.update(
            indices.to(errors.device), errors, self.per_alpha, self.per_epsilon, added=True
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a replay needs to continue: its rows, priorities, seed and draw counter.

        There is one tensor for each game, with the stored rows only. As in a torch module's state,
        the tensors are the replay's own memory: save or copy them before the next call. For a
        replay on a GPU they are copies on the CPU, except frames with storage "host". A state may
        be loaded on another device. On a GPU, waits for the GPU.

        With storage "tiles", the frames are saved in their compact form and copied: instead of
        "frames" there are "tiles" (n, 28) uint8, the chunks of each game, and their sizes.
        """
        self.check()
        stored = self._ring.stored

        def rows(tensor):  # tensors whose storage is these rows only
            return [torch.from_numpy(game[:stored].cpu().numpy()) for game in tensor]

        state = self._fixed() | {"stored": stored, "head": self._ring.head}
        state |= {"calls": self._ring.calls, "seed": self._ring.seed}
        state |= {"max_leaf": self._ring.max_leaf}
        if self._frames is None:
            tiles, sizes, chunks = self._ring.tile_state()
            state |= {"added": self._ring.tile_counts()[0], "tiles": tiles.view(-1, TILE_BYTES)}
            state |= {"chunk_sizes": sizes, "chunks": chunks}
        else:
            state["frames"] = rows(self._frames)
        state["actions"] = rows(self._actions)
        state |= {"rewards": rows(self._rewards), "flags": rows(self._flags)}
        if self._tree is not None:
            firsts = range(0, self.num_envs * self.rows, self.rows)
            leaves = (self._tree._read_leaves(first, stored) for first in firsts)
            state["leaves"] = [torch.from_numpy(game.numpy()) for game in leaves]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of a replay with the same arguments, saved on any device.

        Raises ValueError if the state does not fit or is damaged; the replay is unchanged then.
        Other threads must not use the replay meanwhile.
        """
        stored, head = self._check_state(state)
        flags = torch.zeros(self._flags.shape, dtype=torch.uint8, device="cpu")
        for game in range(self.num_envs):
            flags[game, :stored] = state["flags"][game]
        if (flags > ALL_FLAGS).any():
            raise ValueError("the state is damaged: flags must be from 0 to 31")
        n_drawable = _cpu.mark_drawable(flags, stored, head, self.stack or 1, self.n_step)
        if self._tree is not None:
            for game, leaves in enumerate(state["leaves"]):
                if not torch.equal(leaves.cpu() != 0, (flags[game, :stored] & DRAWABLE) != 0):
                    raise ValueError("the state is damaged: its priorities do not match its rows")
        self.check()
        if self._frames is None:
            pieces = [[x.cpu().contiguous() for x in state[k]] for k in ("chunk_sizes", "chunks")]
            self._ring.restore_tiles(state["added"], state["tiles"].cpu().contiguous(), *pieces)
        copied = (
            ("actions", "rewards") if self._frames is None else ("actions", "rewards", "frames")
        )
        for name in copied:
            for mine, theirs in zip(getattr(self, f"_{name}"), state[name]):
                mine[:stored] = theirs
        self._flags.copy_(flags)
        if self._tree is not None:
            leaves = torch.zeros(self.rows, dtype=torch.int32, device="cpu")
            for game in range(self.num_envs):
                leaves[:stored] = state["leaves"][game]
                self._tree._write_leaves(game * self.rows, leaves)
        self._ring.seed = state["seed"]
        self._ring.restore(stored, head, n_drawable, state["max_leaf"], state["calls"])

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self._arguments(), "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["arguments"])
        self.load_state_dict(state["state"])

    def __deepcopy__(self, memo: dict[int, Any]) -> FrameReplay:
        other = memo[id(self)] = type(self)(**self._arguments())
        other.load_state_dict(self.state_dict())  # unlike pickling, copies the frames only once
        return other

    def check(self) -> None:
        """Waits for the GPU, and raises the error that it has latched since the last such call.

        On the CPU: does nothing, because errors are raised at once.
        """
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

    def _fill(self, n: int, batch: Batch, indices: Any) -> None:
        channels_last = self.memory_format == torch.channels_last
        self._ring.gather(indices, n, batch, self.stratified, self.scale, channels_last)

    def _arguments(self) -> dict[str, Any]:
        """The arguments that construct such a replay; the seed is part of the state."""
        names = ("capacity", "frame_shape", "num_envs", "stack", "n_step", "gamma", "prioritized")
        names += ("per_alpha", "per_beta", "per_epsilon", "stratified", "frame_dtype", "device")
        names += ("output_dtype", "scale", "memory_format", "threads", "storage")
        return {name: getattr(self, name) for name in names}

    def _fixed(self) -> dict[str, Any]:
        """The settings of a state that must equal those of the replay that loads it."""
        names = ("capacity", "num_envs", "stack", "n_step", "gamma", "prioritized", "per_alpha")
        fixed = {name: getattr(self, name) for name in names}
        return fixed | {"frame_shape": list(self.frame_shape)}

    def _check_state(self, state: Any) -> tuple[int, int]:
        """Checks that a state fits. Returns its number of stored rows and its write head."""
        tensors = {"actions": torch.int32, "rewards": torch.float32, "flags": torch.uint8}
        tiles = ["added", "tiles", "chunk_sizes", "chunks"] if self._frames is None else []
        if not tiles:
            tensors["frames"] = self.frame_dtype
        if self._tree is not None:
            tensors["leaves"] = torch.int32
        integers = {"stored": (0, self.rows), "head": (0, self.rows - 1), "calls": (0, 2**64 - 1)}
        integers |= {"seed": (0, 2**64 - 1), "max_leaf": (2**20, 2**32 - 1)}
        there, here = ("frames", "tiles") if tiles else ("tiles", "frames")
        if isinstance(state, dict) and there in state and here not in state:
            kinds = {"frames": "plain frames", "tiles": "tiles"}
            raise ValueError(
                f"the state has {kinds[there]}, but the object has {kinds[here]}: "
                "construct it with the same storage"
            )
        check_keys(state, [*self._fixed(), *integers, *tensors, *tiles], "FrameReplay")
        check_equal(state, self._fixed())
        check_integers(state, integers)
        stored, head = state["stored"], state["head"]
        if stored < self.rows and head != stored:
            raise ValueError(f"the state is damaged: {stored} rows stored, write head at {head}")
        for name, dtype in tensors.items():
            shape = (stored, *(self.frame_shape if name == "frames" else ()))
            games = state[name]
            if not isinstance(games, (list, tuple, Tensor)) or len(games) != self.num_envs:
                raise ValueError(f"the state is damaged: {name} must be of {self.num_envs} games")
            for game in games:
                check_tensor(game, name, dtype, shape)
        if tiles:
            self._check_tiles(state)
        return stored, head

    def _check_tiles(self, state: dict[str, Any]) -> None:
        stored, head, added = state["stored"], state["head"], state["added"]
        check_integers(state, {"added": (stored, 2**62)})
        if added % self.rows != head or min(added, self.rows) != stored:
            raise ValueError(f"the state is damaged: {stored} rows stored of {added}")
        for name, dtype in (("chunk_sizes", torch.int64), ("chunks", torch.uint8)):
            games = state[name]
            if not isinstance(games, (list, tuple)) or len(games) != self.num_envs:
                raise ValueError(f"the state is damaged: {name} must be of {self.num_envs} games")
            for game in games:
                check_tensor(game, name, dtype, (game.numel(),) if torch.is_tensor(game) else ())
        tiles = state["tiles"]
        length = len(tiles) if torch.is_tensor(tiles) and tiles.dim() else 0
        check_tensor(tiles, "tiles", torch.uint8, (length, TILE_BYTES))


def _integer(name: str, value: Any, low: int | None = None, high: int = 0) -> int:
    """`value` as an int in [low, high]."""
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if low is not None and not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, not {value}")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float in [low, high]."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, not {value}")
    return float(value)


def _as_batch(out: Any) -> Batch:
    if isinstance(out, Batch):
        return out
    if not isinstance(out, (tuple, list)) or len(out) != len(Batch._fields):
        raise TypeError("out must be a Batch, or a tuple of its seven arrays")
    return Batch(*out)


def _default_threads() -> int:
    """0 means torch's own threads."""
    return 0 if _cpu.openmp_threads() > 0 else min(os.cpu_count() or 1, 4)
