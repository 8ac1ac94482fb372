"""Every CUDA kernel of fastreplay once or more, small, for compute-sanitizer (see gpu.sh)."""

import numpy as np
import torch
from fastreplay import FrameReplay, SumTree


def rows(num_envs, shape, rng):
    frames = rng.integers(0, 256, (num_envs, *shape), dtype=np.uint8)
    actions, rewards = rng.integers(0, 18, num_envs), rng.normal(size=num_envs)
    return frames, actions, rewards, *(rng.random((2, num_envs)) < 0.1)


def main(batch_sizes=(1, 33, 600)):
    rng = np.random.default_rng(0)
    for shape, options in (
        ((84, 84), {"prioritized": True, "n_step": 3}),
        ((84, 84), {"storage": "host", "output_dtype": torch.bfloat16}),
        ((7, 9), {"prioritized": True, "stack": 3, "output_dtype": torch.float16}),
        ((84, 84), {"output_dtype": torch.float32, "memory_format": torch.channels_last}),
        ((7, 9), {"output_dtype": torch.float32, "memory_format": torch.channels_last, "stack": 3}),
        ((84, 84), {"output_dtype": torch.float32, "n_step": 2}),
        ((84, 84), {"output_dtype": torch.float16}),
        ((4,), {"frame_dtype": torch.float32, "stack": None, "prioritized": True}),
    ):
        replay = FrameReplay(200, shape, num_envs=4, device="cuda", **options)
        for step in range(70):
            row = rows(4, shape, rng)
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
    tree = SumTree(5000, alpha=0.6, device="cuda")
    tree.set(rng.integers(0, 5000, 9000), rng.random(9000) + 0.1)
    indices = tree.sample(300, stratified=True)
    tree.weights(indices, 0.4), tree.get(indices), tree.find(np.arange(50))
    tree.check_valid()
    print("every kernel has run")


if __name__ == "__main__":
    main()
