"""The GPU half of benchmarks/buffers.py: `python benchmarks/buffers.py --device cuda`.

Frames and priorities on the GPU, 84x84, stacks of 4, prioritized, --capacity transitions, beside
TorchRL's and Flashbax's buffers on the GPU, where they are installed, plain torch indexing of whole
stacks, and cumsum + searchsorted. The limits are a copy on the device, a copy over the bus, and a
CUDA graph of empty kernels. Each side is a process of its own, and is recorded as soon as it is
done.

A time is that of many calls in a row that end with one synchronisation, divided by their number:
what a training loop pays that does not wait for each. `captured` is the same as one CUDA graph.
"""

import itertools
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
# Filling it takes longest; what a sample costs does not depend on how full it is.
FLASHBAX_CAPACITY, FLASHBAX_ROWS = 100_000, 20_000


def blocks_of(call, args):
    """Seconds a call, one number for each of `args.repeats` blocks."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    calls = int(min(2000, max(20, args.seconds / args.repeats / max(once, 1e-6))))
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


def filled_replay(args, capacity=None, prioritized=True, **options):
    from fastreplay import FrameReplay

    options |= {"prioritized": prioritized, "device": "cuda"}
    replay = FrameReplay(capacity or args.capacity, (84, 84), NUM_ENVS, **options)
    source = rows(np.random.default_rng(0))
    for _ in range(replay.rows):
        replay.add(*next(source))
    return replay, source


def measure_fastreplay(args):
    small, _ = filled_replay(args, capacity=800, n_step=3)  # loads what is loaded but once
    small.sample(32)
    del small
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
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
    """Uniform draws of stack + 1 = 5 frames each, beside a copy of as many bytes.

    On the device, copies of a small batch stay in the cache: a limit that no gather from a large
    replay can reach.
    """
    result = {}
    for storage in ("device", "host"):
        replay, _ = filled_replay(args, prioritized=False, storage=storage)
        for n in SIZES:
            size = gathered_bytes(n)
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=True).random_()
            memory = memory if storage == "host" else memory.cuda()
            target = torch.empty(size, dtype=torch.uint8, device="cuda")
            batch = replay.sample(n)

            def copy(target=target, memory=memory):
                target.copy_(memory, non_blocking=True)

            gather = captured(lambda b=batch, n=n, r=replay: r.sample(n, out=b))
            result[f"{storage} gather {n}"] = blocks_of(gather, args)
            result[f"{storage} copy {n}"] = blocks_of(copy, args)
            result[f"{storage} captured copy {n}"] = blocks_of(captured(copy), args)
        replay.check()
        del replay, batch, gather
    return result


def gathered_bytes(n):
    return n * (STACK + 1) * FRAME_BYTES


def measure_empty_graph(args):
    """A graph of two kernels that do nothing: what a captured sample and update cost at least."""

    def nothing():
        torch.cuda._sleep(0)
        torch.cuda._sleep(0)

    return {"captured cycle 32": blocks_of(captured(nothing), args)}


def measure_torchrl(args):
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer

    storage = LazyTensorStorage(args.capacity, device="cuda")
    buffer = TensorDictPrioritizedReplayBuffer(alpha=0.6, beta=0.4, storage=storage)
    some = min(4000, args.capacity)
    obs = torch.randint(0, 256, (some, STACK, 84, 84), dtype=torch.uint8, device="cuda")
    for _ in range(args.capacity // some):
        after = {"obs": obs, "reward": torch.zeros(some, device="cuda")}
        now = {"obs": obs, "action": torch.zeros(some, dtype=torch.int64, device="cuda")}
        buffer.extend(TensorDict(now | {"next": after}, batch_size=[some]))
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

        def update(self, batch, td_error):  # waits for nothing, like the others
            self.state = self.update_jit(self.state, batch[2].indices, td_error)

    buffer, stream = OnGpu(min(args.capacity, FLASHBAX_CAPACITY)), Stream(NUM_ENVS)
    for _ in range(min(args.capacity, FLASHBAX_ROWS) // NUM_ENVS):
        buffer.add(stream.step())
    result = {}
    for n in SIZES:
        errors = jax.random.uniform(jax.random.PRNGKey(0), (n,))
        sample = lambda n=n: buffer.sample(n)  # noqa: E731
        cycle = lambda n=n, e=errors: buffer.update(buffer.sample(n), e)  # noqa: E731
        for name, call in ((f"sample {n}", sample), (f"cycle {n}", cycle)):
            result[name] = blocks_of(call, args)
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

            ends = [torch.full((), end, dtype=torch.int64, device="cuda") for end in (0, size)]

            def scan(n, peer=peer, ends=ends):  # as its sampler calls it: nothing waits
                return peer.scan_lower_bound(torch.rand(n, device="cuda") * peer.query(*ends))

            sides["TorchRL"] = (scan, peer.__setitem__)
        except Exception as error:  # the wheel has no CUDA tree
            result[f"TorchRL 2^{power}"] = f"not measured: {error}"
        for side, (sample, update) in sides.items():
            for n in SIZES:
                changes = [
                    (torch.randint(size, (n,), device="cuda"), torch.rand(n, device="cuda"))
                    for _ in range(16)
                ]
                turn = itertools.count()
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
    "graph of two empty kernels": measure_empty_graph,
    "gather": measure_gather,
    "trees": measure_trees,
    "torch indexing": measure_indexing,
    "TorchRL, on the GPU": measure_torchrl,
    "Flashbax, on the GPU": measure_flashbax,
}
OWN = ("fastreplay", "graph of two empty kernels", "gather", "trees")  # must be measured


def middle(blocks):
    return float(np.median(np.concatenate(blocks))) * 1e6


def table(sides):
    """Markdown: what matters, then everything that was measured."""
    results = {name: row["result"] for name, row in sides.items() if "result" in row}
    lines = ["# Replay on the GPU", "", *ratios(results), "", "Median microseconds a call.", ""]
    lines += ["| side | what | microseconds |", "|---|---|---:|"]
    for side, row in sides.items():
        if "error" in row:
            lines.append(f"| {side} | {row['error']} | |")
        for what, value in row.get("result", {}).items():
            if isinstance(value, str):
                lines.append(f"| {side} | {what} | {value} |")
            elif isinstance(value, list):
                lines.append(f"| {side} | {what} | {middle(value):.2f} |")
            else:
                lines.append(f"| {side} | {what} a transition | {value:.1f} |")
    return "\n".join(lines) + "\n"


def ratios(results):
    """Sentences about the sides that were measured."""

    def of(side, what):
        value = results.get(side, {}).get(what)
        return middle(value) if isinstance(value, list) else float("nan")

    own, gather, trees = "fastreplay", "gather", "trees"
    cycle, captured_cycle = of(own, "cycle 32"), of(own, "captured cycle 32")
    times = of("TorchRL, on the GPU", "cycle 32") / cycle
    yield f"- Prioritized cycle of 32: {times:.1f} times as fast as TorchRL's."
    times = captured_cycle / of("graph of two empty kernels", "captured cycle 32")
    yield f"- Captured, it takes {times:.2f} times a graph of two empty kernels."
    for storage in ("device", "host"):
        names = [f"{storage} {copy} 4096" for copy in ("copy", "captured copy")]
        seconds, copy = of(gather, f"{storage} gather 4096"), min(of(gather, x) for x in names)
        rate = gathered_bytes(4096) / seconds / 1e3  # bytes a microsecond / 1000: GB/s
        yield (
            f"- Gather of 4096 from {storage} storage: {copy / seconds:.0%} of a plain copy's rate "
            f"({rate:.0f} GB/s out)."
        )
    yield f"- Bytes of the GPU a transition: {results.get(own, {}).get('bytes', float('nan')):.1f}."
    for power, kind, n in itertools.product((20, 24), ("sample", "set"), SIZES):
        mine = of(trees, f"fastreplay 2^{power} {kind} {n}")
        peers = (("TorchRL", "TorchRL's"), ("cumsum + searchsorted", "cumsum + searchsorted"))
        found = [(words, of(trees, f"{name} 2^{power} {kind} {n}") / mine) for name, words in peers]
        said = ", ".join(f"{times:.2f} times as fast as {words}" for words, times in found)
        yield f"- Tree of 2^{power}, {kind} {n}: {said}."
