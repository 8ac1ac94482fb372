"""Compares a small replay on a GPU with the same replay on the CPU, bit for bit.

It takes a few milliseconds plus the time to load the kernels, and runs once per process and GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastreplay.frame_replay import FrameReplay

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
CONFIGURATIONS = (
    {"output_dtype": torch.uint8, "memory_format": CONTIGUOUS, "prioritized": True},
    {"output_dtype": torch.uint8, "memory_format": CHANNELS_LAST, "n_step": 2},
    {"output_dtype": torch.float32, "memory_format": CONTIGUOUS},
    {"output_dtype": torch.float32, "memory_format": CHANNELS_LAST, "prioritized": True}
    | {"n_step": 3},
)


TILES = tuple(options | {"storage": "tiles"} for options in (CONFIGURATIONS[0], CONFIGURATIONS[3]))


def difference(device: str | torch.device) -> str:
    """What differs between `device` and the CPU, in a few words; "" if nothing does."""
    return difference_of(device, CONFIGURATIONS)


def difference_of_tiles(device: str | torch.device) -> str:
    """The same for frames in tiles on `device` and plain frames on the CPU."""
    found = difference_of(device, TILES)
    return found and f"{found}, with frames in tiles"


def difference_of(device: str | torch.device, configurations: tuple[dict, ...]) -> str:
    for options in configurations:
        name = first_difference(device, options)
        if name:
            dtype, memory_format = options["output_dtype"], options["memory_format"]
            return f"{name} of a replay that returns {dtype} in {memory_format}"
    return ""


def first_difference(device: str | torch.device, options: dict) -> str:
    plain = options | {"storage": "auto"}
    replays = [
        FrameReplay(24 * 3, (12, 12), 3, device=where, **each)
        for where, each in (("cpu", plain), (device, options))
    ]
    rng = np.random.default_rng(0)
    for turn in range(3):
        for _ in range(20):  # the third time, the rings have wrapped around
            frames = rng.integers(0, 256, (3, 12, 12), dtype=np.uint8)
            if turn == 1:  # mostly zeros: tiles that occur again
                frames //= 255
            actions, rewards = rng.integers(0, 18, 3), rng.normal(size=3).astype(np.float32)
            terminations, starts = rng.random((2, 3)) < 0.1
            for replay in replays:
                replay.add(frames, actions, rewards, terminations, starts)
        batches = [replay.sample(33) for replay in replays]
        for name, mine, theirs in zip(batches[0]._fields, *batches, strict=True):
            if not identical(mine, theirs):
                return name
        if replays[0].prioritized:
            td_errors = torch.from_numpy(rng.normal(size=33).astype(np.float32))
            for replay, batch in zip(replays, batches, strict=True):
                replay.update_priorities(batch.indices, td_errors.to(replay.device))
    states = [replay.state_dict() for replay in replays]
    for name in ("flags", "leaves") if replays[0].prioritized else ("flags",):
        if not all(map(identical, *(state[name] for state in states))):
            return "priorities" if name == "leaves" else name
    return ""


def identical(mine: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    first, second = (tensor.cpu().contiguous().view(torch.uint8) for tensor in (mine, theirs))
    return torch.equal(first, second)
