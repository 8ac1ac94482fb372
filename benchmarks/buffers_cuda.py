"""The GPU half of benchmarks/buffers.py: `python benchmarks/buffers.py --device cuda`.

Frames and priorities on the GPU, 84x84, stacks of 4, prioritized, --capacity transitions, beside
TorchRL's and Flashbax's buffers on the GPU, where they are installed, plain torch indexing of whole
stacks, and cumsum + searchsorted. The limits are a copy on the device, a copy over the bus, and a
CUDA graph of empty kernels.

A time is that of many calls in a row that end with one synchronisation, divided by their number:
what a training loop pays that does not wait for each. `captured` is the same as one CUDA graph.
"""

import os
import time

import numpy as np
import torch
from buffer_peers import Flashbax, Stream

FRAME_BYTES = 84 * 84
STACK = 4
NUM_ENVS = 8
CYCLE = 32
SIZES = (32, 256, 4096)


def blocks_of(call, args, calls=None):
    """Seconds a call, one number for each of `args.repeats` blocks."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    calls = calls or int(min(2000, max(20, args.seconds / args.repeats / max(once, 1e-6))))
    blocks = []
    for _ in range(args.repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        blocks.append([(time.perf_counter() - start) / calls])
    return blocks


def captured(call):
    """`call` as a CUDA graph: a function that launches it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rows(random):
    """Arguments of add() for ever, of frames made before the clock runs."""
    frames = random.integers(0, 256, (64, NUM_ENVS, 84, 84), dtype=np.uint8)
    actions = random.integers(0, 18, NUM_ENVS)
    rewards = random.normal(size=NUM_ENVS).astype(np.float32)
    nothing = np.zeros(NUM_ENVS, bool)
    t = 0
    while True:
        yield frames[t % 64], actions, rewards, nothing, np.full(NUM_ENVS, t % 500 == 0)
        t += 1


def filled_replay(args, **options):
    from fastreplay import FrameReplay

    replay = FrameReplay(
        args.capacity, (84, 84), NUM_ENVS, prioritized=True, device="cuda", **options
    )
    source = rows(np.random.default_rng(0))
    for _ in range(args.capacity // NUM_ENVS):
        replay.add(*next(source))
    return replay, source


def measure_fastreplay(args):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.mem_get_info()[0]
    replay, source = filled_replay(args, n_step=3, storage="device")
    result = {"bytes": (before - torch.cuda.mem_get_info()[0]) / args.capacity}
    result["add, 8 games"] = blocks_of(lambda: replay.add(*next(source)), args)
    errors = torch.rand(4096, device="cuda")
    for n in SIZES:
        batch = replay.sample(n)
        sample = lambda b=batch, n=n: replay.sample(n, out=b)  # noqa: E731

        def cycle(b=batch, n=n):
            replay.sample(n, out=b)
            replay.update_priorities(b.indices, errors[:n])

        result[f"sample {n}"] = blocks_of(sample, args)
        result[f"cycle {n}"] = blocks_of(cycle, args)
        result[f"captured cycle {n}"] = blocks_of(captured(cycle), args)
        result[f"captured sample {n}"] = blocks_of(captured(sample), args)
    replay.check()
    return result


def measure_gather(args):
    """Uniform draws of stack + 1 = 5 frames each, by turns with a copy of as many bytes."""
    from fastreplay import FrameReplay

    result = {}
    for storage in ("device", "host"):
        replay = FrameReplay(args.capacity, (84, 84), NUM_ENVS, device="cuda", storage=storage)
        source = rows(np.random.default_rng(0))
        for _ in range(args.capacity // NUM_ENVS):
            replay.add(*next(source))
        for n in SIZES:
            size = n * (STACK + 1) * FRAME_BYTES
            pin = storage == "host"
            memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            memory = memory if pin else memory.cuda()
            target = torch.empty(size, dtype=torch.uint8, device="cuda")
            batch = replay.sample(n)
            gather = captured(lambda b=batch, n=n, r=replay: r.sample(n, out=b))
            copy = captured(lambda t=target, m=memory: t.copy_(m, non_blocking=True))
            result[f"{storage} gather {n}"] = blocks_of(gather, args)
            result[f"{storage} copy {n}"] = blocks_of(copy, args)
        replay.check()
        del replay, batch, gather
    return result


def measure_empty_graph(args):
    """A graph of two kernels that do nothing: what a captured sample and update cost at least."""
    one = torch.zeros(1, device="cuda")

    def nothing():
        one.zero_()
        one.zero_()

    return {"captured cycle 32": blocks_of(captured(nothing), args)}


def measure_torchrl(args):
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer

    storage = LazyTensorStorage(args.capacity, device="cuda")
    buffer = TensorDictPrioritizedReplayBuffer(alpha=0.6, beta=0.4, storage=storage)
    obs = torch.randint(0, 256, (64, STACK, 84, 84), dtype=torch.uint8, device="cuda")
    for _ in range(args.capacity // 64):
        after = {"obs": obs, "reward": torch.zeros(64, device="cuda")}
        now = {"obs": obs, "action": torch.zeros(64, dtype=torch.int64, device="cuda")}
        buffer.extend(TensorDict(now | {"next": after}, batch_size=[64]))
    errors = torch.rand(4096, device="cuda")
    result = {}
    for n in SIZES:

        def cycle(n=n):
            batch = buffer.sample(n)
            batch["td_error"] = errors[:n]
            buffer.update_tensordict_priority(batch)

        result[f"sample {n}"] = blocks_of(lambda n=n: buffer.sample(n), args)
        result[f"cycle {n}"] = blocks_of(cycle, args)
    return result


def measure_flashbax(args):
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch wants memory too
    import jax

    if not any(device.platform == "gpu" for device in jax.devices()):
        raise RuntimeError("jax sees no GPU")

    class OnGpu(Flashbax):
        device = "gpu"

    buffer, stream = OnGpu(args.capacity), Stream(NUM_ENVS)
    for _ in range(args.capacity // NUM_ENVS):
        buffer.add(stream.step())
    errors = np.random.default_rng(0).random(max(SIZES)).astype(np.float32)
    result = {}
    for n in SIZES:
        result[f"sample {n}"] = blocks_of(lambda n=n: buffer.sample(n), args)
        result[f"cycle {n}"] = blocks_of(
            lambda n=n: buffer.update(buffer.sample(n), errors[:n]), args
        )
    return result


def measure_indexing(args):
    """Uniform draws of whole stacks that lie on the GPU, as a tensor is indexed."""
    obs = torch.zeros((args.capacity, STACK, 84, 84), dtype=torch.uint8, device="cuda")
    result = {}
    for n in SIZES:

        def sample(n=n):
            indices = torch.randint(args.capacity - 1, (n,), device="cuda")
            return obs[indices], obs[indices + 1]

        result[f"sample {n}"] = blocks_of(sample, args)
    return result


def measure_trees(args):
    """Draws and updates of trees of 2^20 and 2^24 leaves; a new priority each time."""
    from fastreplay import SumTree

    result = {}
    for power in (20, 24):
        size = 2**power
        tree = SumTree(size, device="cuda")
        everything = torch.arange(size, device="cuda")
        tree.set(everything, torch.rand(size, device="cuda"))
        sides = {"fastreplay": (tree.sample, tree.set)}
        priorities = torch.rand(size, device="cuda")

        def search(n, priorities=priorities):
            sums = priorities.cumsum(0)
            return torch.searchsorted(sums, torch.rand(n, device="cuda") * sums[-1], right=True)

        sides["cumsum + searchsorted"] = (search, priorities.__setitem__)
        try:
            from torchrl.data.replay_buffers.samplers import CudaSumSegmentTreeFp32

            peer = CudaSumSegmentTreeFp32(size, torch.device("cuda"))
            peer[everything] = torch.rand(size, device="cuda")

            def scan(n, peer=peer, size=size):
                return peer.scan_lower_bound(torch.rand(n, device="cuda") * peer.query(0, size))

            sides["TorchRL"] = (scan, peer.__setitem__)
        except (ImportError, TypeError) as error:  # TypeError: the wheel has no CUDA tree
            result[f"TorchRL 2^{power}"] = f"not measured: {error}"
        for side, (sample, update) in sides.items():
            for n in SIZES:
                changes = [
                    (torch.randint(size, (n,), device="cuda"), torch.rand(n, device="cuda"))
                    for _ in range(16)
                ]
                turn = iter(range(10**9))
                key = f"{side} 2^{power}"
                result[f"{key} sample {n}"] = blocks_of(lambda n=n, s=sample: s(n), args)
                result[f"{key} set {n}"] = blocks_of(
                    lambda c=changes, t=turn, u=update: u(*c[next(t) % 16]), args
                )
        tree.check_valid()
        del tree, everything, priorities
    return result


SIDES = {
    "fastreplay": measure_fastreplay,
    "gather": measure_gather,
    "graph of two empty kernels": measure_empty_graph,
    "TorchRL, on the GPU": measure_torchrl,
    "Flashbax, on the GPU": measure_flashbax,
    "torch indexing": measure_indexing,
    "trees": measure_trees,
}


def middle(blocks):
    return float(np.median(np.concatenate(blocks))) * 1e6


def table(sides):
    """Markdown: everything measured, in microseconds, and the ratios that matter."""
    lines = ["# Replay on the GPU", "", "Median microseconds a call.", ""]
    lines += ["| side | what | microseconds |", "|---|---|---:|"]
    for side, result in sides.items():
        if "error" in result:
            lines.append(f"| {side} | {result['error']} | |")
            continue
        for what, value in result.items():
            if isinstance(value, str):
                lines.append(f"| {what} | {value} | |")
            elif isinstance(value, list):
                lines.append(f"| {side} | {what} | {middle(value):.2f} |")
            else:
                lines.append(f"| {side} | {what} each | {value:.0f} |")
    own, peer = sides.get("fastreplay", {}), sides.get("TorchRL, on the GPU", {})
    empty = sides.get("graph of two empty kernels", {})
    ratios = []
    if "cycle 32" in own and "cycle 32" in peer:
        ratio = middle(peer["cycle 32"]) / middle(own["cycle 32"])
        ratios.append(f"Prioritized cycle of 32: {ratio:.1f} times as fast as TorchRL's.")
    if "captured cycle 32" in own and "captured cycle 32" in empty:
        ratio = middle(own["captured cycle 32"]) / middle(empty["captured cycle 32"])
        ratios.append(f"Captured, it takes {ratio:.2f} times a graph of two empty kernels.")
    gather = sides.get("gather", {})
    for storage in ("device", "host"):
        if f"{storage} gather 4096" in gather:
            ratio = middle(gather[f"{storage} copy 4096"]) / middle(
                gather[f"{storage} gather 4096"]
            )
            ratios.append(
                f"Gather of 4096 from {storage} storage: {ratio:.0%} of a plain copy's rate."
            )
    return "\n".join([*lines, "", *ratios]) + "\n"


def run(args):
    """-> {side: {what: blocks of seconds}}"""
    sides = {}
    for name, measure in SIDES.items():
        print(name, flush=True)
        try:
            sides[name] = measure(args)
        except (ImportError, RuntimeError, TypeError) as error:
            sides[name] = {"error": f"not measured: {str(error).strip().splitlines()[0][:120]}"}
        torch.cuda.empty_cache()
    return sides
