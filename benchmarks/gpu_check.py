"""Runs every CUDA kernel of fastreplay, tuned and reference, on small data.

For compute-sanitizer (benchmarks/gpu.sh), which checks memory accesses, races and barriers.
"""

import numpy as np
import torch
from fastreplay import FrameReplay, SumTree
from fastreplay._device import Backend

ATARI, ODD = (84, 84), (7, 9)  # 7056 bytes, a multiple of 16, and 63 bytes
TILED = (28, 28)  # smaller, because the reference kernels are slow with tiles
LAST = {"memory_format": torch.channels_last}
# Frame shape and options. Together they take every path of copy.cuh and tiles.cuh.
REPLAYS = (
    (ATARI, {"prioritized": True, "n_step": 3}),
    (ATARI, {"storage": "host", "output_dtype": torch.bfloat16}),
    (ODD, {"prioritized": True, "stack": 3, "output_dtype": torch.float16}),
    (ATARI, {"output_dtype": torch.float32, **LAST}),
    (ODD, {"output_dtype": torch.float32, "stack": 3, **LAST}),
    (ATARI, {"output_dtype": torch.float32, "n_step": 2}),
    (ATARI, {"output_dtype": torch.float16}),
    ((4,), {"frame_dtype": torch.float32, "stack": None, "prioritized": True}),
    (TILED, {"storage": "tiles", "prioritized": True, "n_step": 3}),
    (ODD, {"storage": "tiles", "output_dtype": torch.float16, "stack": 3}),
    (TILED, {"storage": "tiles", "output_dtype": torch.float32, **LAST}),
    (ODD, {"storage": "tiles", "output_dtype": torch.bfloat16, "stack": 3, **LAST}),
)


def random_row(num_envs, shape, rng):
    """Arguments of one add(): uint8 frames, and an end or a start with probability 0.1."""
    frames = rng.integers(0, 256, (num_envs, *shape), dtype=np.uint8)
    actions, rewards = rng.integers(0, 18, num_envs), rng.normal(size=num_envs)
    return frames, actions, rewards, *(rng.random((2, num_envs)) < 0.1)


def check_replay(shape, options, batch_sizes, rng):
    """Fills a ring of 50 rows per game until it wraps around, from the host and the device in
    turns. Frames are noise; in tiles, where noise is kept plain, only the first half."""
    replay = FrameReplay(200, shape, num_envs=4, device="cuda", **options)
    for step in range(70):
        row = random_row(4, shape, rng)
        if options.get("storage") == "tiles" and step > 35:
            row[0][:] //= 255  # mostly zeros
        if options.get("frame_dtype") == torch.float32:
            row = (row[0].astype(np.float32), *row[1:])
        replay.add(*(row if step % 2 else (torch.as_tensor(x).cuda() for x in row)))
    for batch_size in batch_sizes:
        batch = replay.sample(batch_size)
        if replay.prioritized:
            replay.update_priorities(batch.indices, torch.rand(batch_size, device="cuda"))
    replay.gather(replay.draw(5))
    replay.drawable(np.arange(200))
    other = FrameReplay(200, shape, num_envs=4, device="cuda", **options)
    other.load_state_dict(replay.state_dict())
    replay.check()


def check_tree(rng):
    """5000 leaves are 3 levels; 9000 pairs have duplicates."""
    tree = SumTree(5000, alpha=0.6, device="cuda")
    tree.set(rng.integers(0, 5000, 9000), rng.random(9000) + 0.1)
    indices = tree.sample(300, stratified=True)
    tree.weights(indices, 0.4), tree.get(indices), tree.find(np.arange(50))
    tree.check_valid()


def main(batch_sizes=(1, 33, 600), reference_batch_sizes=(1, 5), kernels=("tuned", "reference")):
    module = Backend("cuda").module
    for name in kernels:
        module.use_kernels(name)
        rng = np.random.default_rng(0)
        for shape, options in REPLAYS:
            sizes = batch_sizes if name == "tuned" else reference_batch_sizes
            check_replay(shape, options, sizes, rng)
        check_tree(rng)
    module.use_kernels("tuned")
    print("every kernel has run")


if __name__ == "__main__":
    main()
