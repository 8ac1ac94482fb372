"""Replay buffers on a GPU.

    python benchmarks/buffers.py --device cuda --capacity 1000000    fastreplay and its peers
    python benchmarks/buffers_cuda.py --kernels tuned reference      its tuned and plain kernels

The first compares a prioritized replay of 84x84 frames and stacks of 4 with those of TorchRL and
Flashbax (if they are installed), with torch indexing of whole stacks, and with cumsum +
searchsorted. The lower bounds are a copy on the device, a copy over the bus, and a CUDA graph of
empty kernels. Each side runs in its own process and is recorded when it is done.

The second times each operation of fastreplay with its tuned kernels and with the plain ones of
csrc/cuda/reference.cu, in turns in one process: a tuned kernel that is not faster should be
removed.

A time is that of many calls in a row that end with one synchronisation, divided by their number:
the cost in a training loop that does not wait for each call. `captured` is the same as a CUDA
graph.
"""

import argparse
import itertools
import os
import sys
import time

import numpy as np
import torch
from buffer_peers import Flashbax, Stream
from machine import describe, write_record

FRAME_BYTES = 84 * 84
STACK = 4
NUM_ENVS = 8
SIZES = (32, 256, 4096)
# Filling Flashbax's buffer is slow, and the time of a sample does not depend on how full it is.
FLASHBAX_CAPACITY, FLASHBAX_ROWS = 100_000, 20_000


def seconds_per_call(call, n):
    """The mean over n calls that end with one synchronisation."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def calls_per_block(call, args):
    """Calls of a block of about args.seconds / args.repeats seconds, 20 to 2000. Warms up."""
    for _ in range(10):
        call()
    once = seconds_per_call(call, 1)
    return int(min(2000, max(20, args.seconds / args.repeats / max(once, 1e-6))))


def blocks_of(call, args):
    """Seconds per call: a list of one number for each of `args.repeats` blocks."""
    n = calls_per_block(call, args)
    return [[seconds_per_call(call, n)] for _ in range(args.repeats)]


def captured(call):
    """Captures `call` as a CUDA graph. Returns a function that launches the graph."""
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


def rows(random, moving=False):
    """Yields arguments of add() without end. Frames are generated in advance, not while timed.

    They are noise or, if `moving`, a still picture for each game with two squares that move: noise
    is not what tiles are for.
    """
    frames = random.integers(0, 256, (64, NUM_ENVS, 84, 84), dtype=np.uint8)
    if moving:
        frames[1:] = frames[0]
        for t, (y, x) in enumerate(random.integers(0, 76, (64, 2))):
            frames[t, :, y : y + 8, x : x + 8] = 255
            frames[t, :, t : t + 4, t : t + 4] = 0
    actions = random.integers(0, 18, NUM_ENVS)
    rewards = random.normal(size=NUM_ENVS).astype(np.float32)
    nothing = np.zeros(NUM_ENVS, bool)
    t = 0
    while True:
        yield frames[t % 64], actions, rewards, nothing, np.full(NUM_ENVS, t % 500 == 0)
        t += 1


def filled_replay(args, capacity=None, prioritized=True, **options):
    """A full replay on the GPU, and the source of its rows."""
    from fastreplay import FrameReplay

    options |= {"prioritized": prioritized, "device": "cuda"}
    replay = FrameReplay(capacity or args.capacity, (84, 84), NUM_ENVS, **options)
    source = rows(np.random.default_rng(0), moving=options.get("storage") == "tiles")
    for _ in range(replay.rows):
        replay.add(*next(source))
    return replay, source


# A side's `measure_` function returns {what: blocks_of(...), or a number, or a reason in words}.


def measure_fastreplay(args, storage="device"):
    """3-step prioritized replay: memory, add, sample, and cycles of sample and update."""
    options = {"n_step": 3, "storage": storage}
    small, _ = filled_replay(args, capacity=800, **options)  # loads the modules of both
    small.sample(32)
    del small
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    replay, source = filled_replay(args, **options)
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


def measure_tiles(args):
    """The same with frames in tiles. Its frames are not noise, see rows()."""
    return measure_fastreplay(args, storage="tiles")


def measure_gather(args):
    """Uniform samples of stack + 1 = 5 frames each, compared with a copy of as many bytes.

    Copies of a small batch on the device stay in the L2 cache, so a gather from a large replay
    cannot reach that bound.
    """
    result = {}
    for storage in ("device", "host", "tiles"):
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
    """A graph of two empty kernels: the lower bound of a captured sample and update."""

    def nothing():
        torch.cuda._sleep(0)
        torch.cuda._sleep(0)

    return {"captured cycle 32": blocks_of(captured(nothing), args)}


def measure_torchrl(args):
    """TorchRL's prioritized buffer with whole stacks stored on the GPU."""
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
    """Flashbax's prioritized buffer on the GPU, with at most FLASHBAX_CAPACITY transitions."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leave memory to torch
    import jax

    if not any(device.platform == "gpu" for device in jax.devices()):
        raise RuntimeError("jax sees no GPU")

    class OnGpu(Flashbax):
        device = "gpu"

        def update(self, batch, td_error):  # asynchronous, like the other sides
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
    """Uniform samples of whole stacks on the GPU by tensor indexing."""
    obs = torch.zeros((args.capacity, STACK, 84, 84), dtype=torch.uint8, device="cuda")
    result = {}
    for n in SIZES:

        def sample(n=n):
            indices = torch.randint(args.capacity - 1, (n,), device="cuda")
            return obs[indices], obs[indices + 1]

        result[f"sample {n}"] = blocks_of(sample, args)
    return result


def measure_trees(args):
    """Draws from and updates of trees of 2^20 and 2^24 leaves; updates change the priorities."""
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

            def scan(n, peer=peer, ends=ends):  # like its sampler, without synchronisation
                return peer.scan_lower_bound(torch.rand(n, device="cuda") * peer.query(*ends))

            sides["TorchRL"] = (scan, peer.__setitem__)
        except Exception as error:  # wheels without the CUDA tree
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
    "fastreplay, tiles": measure_tiles,
    "graph of two empty kernels": measure_empty_graph,
    "gather": measure_gather,
    "trees": measure_trees,
    "torch indexing": measure_indexing,
    "TorchRL, on the GPU": measure_torchrl,
    "Flashbax, on the GPU": measure_flashbax,
}
OWN = (
    "fastreplay",
    "fastreplay, tiles",
    "graph of two empty kernels",
    "gather",
    "trees",
)  # an error if they fail


def median_us(blocks):
    """The median of all blocks, in microseconds."""
    return float(np.median(np.concatenate(blocks))) * 1e6


def table(sides):
    """In Markdown: the ratios, then every median."""
    results = {name: row["result"] for name, row in sides.items() if "result" in row}
    lines = ["# Replay on the GPU", "", *ratios(results), "", "Median microseconds per call.", ""]
    lines += ["| side | what | microseconds |", "|---|---|---:|"]
    for side, row in sides.items():
        if "error" in row:
            lines.append(f"| {side} | {row['error']} | |")
        for what, value in row.get("result", {}).items():
            if isinstance(value, str):
                lines.append(f"| {side} | {what} | {value} |")
            elif isinstance(value, list):
                lines.append(f"| {side} | {what} | {median_us(value):.2f} |")
            else:
                lines.append(f"| {side} | {what} per transition | {value:.1f} |")
    return "\n".join(lines) + "\n"


def ratios(results):
    """Yields a Markdown line for each comparison; nan if a side was not measured."""

    def of(side, what):
        value = results.get(side, {}).get(what)
        return median_us(value) if isinstance(value, list) else float("nan")

    own, gather, trees = "fastreplay", "gather", "trees"
    cycle, captured_cycle = of(own, "cycle 32"), of(own, "captured cycle 32")
    times = of("TorchRL, on the GPU", "cycle 32") / cycle
    yield f"- Prioritized cycle of 32: {times:.1f} times as fast as TorchRL's."
    times = captured_cycle / of("graph of two empty kernels", "captured cycle 32")
    yield f"- Captured, it takes {times:.2f} times a graph of two empty kernels."
    for storage in ("device", "host", "tiles"):
        names = [f"{storage} {copy} 4096" for copy in ("copy", "captured copy")]
        seconds, copy = of(gather, f"{storage} gather 4096"), min(of(gather, x) for x in names)
        rate = gathered_bytes(4096) / seconds / 1e3  # bytes a microsecond / 1000: GB/s
        yield (
            f"- Gather of 4096 from {storage} storage: {copy / seconds:.0%} of a plain copy's rate "
            f"({rate:.0f} GB/s out)."
        )
    for side in (own, f"{own}, tiles"):
        size = results.get(side, {}).get("bytes", float("nan"))
        yield f"- Bytes of GPU memory per transition, {side}: {size:.1f}."
    for what in ("add, 8 games", "captured sample 32", "captured sample 4096"):
        times = of(f"{own}, tiles", what) / of(own, what)
        yield f"- Tiles, {what}: {times:.2f} times as long as plain frames."
    for power, kind, n in itertools.product((20, 24), ("sample", "set"), SIZES):
        mine = of(trees, f"fastreplay 2^{power} {kind} {n}")
        peers = (("TorchRL", "TorchRL's"), ("cumsum + searchsorted", "cumsum + searchsorted"))
        found = [(words, of(trees, f"{name} 2^{power} {kind} {n}") / mine) for name, words in peers]
        said = ", ".join(f"{times:.2f} times as fast as {words}" for words, times in found)
        yield f"- Tree of 2^{power}, {kind} {n}: {said}."


# ------------------------------------------------------------------- tuned and reference kernels

# Name, and options of the replay: what `sample` is timed with.
SAMPLES = {
    "uint8, prioritized": {},
    "uint8, uniform": {"prioritized": False},
    "uint8, 3-step": {"n_step": 3},
    "float32, 3-step": {"n_step": 3, "output_dtype": torch.float32},
    "bfloat16, channels last": {
        "output_dtype": torch.bfloat16,
        "memory_format": torch.channels_last,
    },
}
# The same for tiles, beside the plain frames of the same name.
SAMPLES |= {
    f"tiles, {name}": SAMPLES[name] | {"storage": "tiles"}
    for name in ("uint8, uniform", "uint8, 3-step", "bfloat16, channels last")
}


def kernel_calls(args, sizes=SIZES, leaves=2**20):
    """Yields (operation, batch size, call) for every operation that has two kernels."""
    from fastreplay import SumTree

    for name, options in SAMPLES.items():
        replay, source = filled_replay(args, **options)
        if not options:
            row = [torch.as_tensor(column).cuda() for column in next(source)]
            yield "add, prioritized", NUM_ENVS, lambda r=replay, row=row: r.add(*row)
        for n in sizes:
            batch = replay.sample(n)
            yield f"sample, {name}", n, lambda r=replay, n=n, b=batch: r.sample(n, out=b)
        replay.check()
        del replay, source, batch  # before the next one is filled
    tree = SumTree(leaves, device="cuda")
    tree.set(torch.arange(leaves).cuda(), torch.rand(leaves).cuda())
    total = tree.total()
    for n in sizes:
        indices, targets = torch.randint(leaves, (n,)).cuda(), torch.randint(total, (n,)).cuda()
        priorities, out = torch.rand(n).cuda(), torch.empty(n, dtype=torch.int64, device="cuda")
        yield f"tree of {leaves}, draw", n, lambda n=n, out=out: tree.sample(n, out=out)
        yield f"tree of {leaves}, find", n, lambda t=targets, out=out: tree.find(t, out=out)
        yield f"tree of {leaves}, set", n, lambda i=indices, p=priorities: tree.set(i, p)
    tree.check_valid()


def compare_kernels(args, calls):
    """Times every call with each of args.kernels, as CUDA graphs, one block of each in turn.

    -> [{"operation", "batch size", "seconds": {kernels: [seconds per call of each block]}}]
    """
    from fastreplay._device import Backend

    module, results = Backend("cuda").module, []
    for operation, n, call in calls:
        graphs, blocks = {}, {}
        for kernels in args.kernels:
            module.use_kernels(kernels)
            graphs[kernels] = captured(call)
            blocks[kernels] = calls_per_block(graphs[kernels], args)
        module.use_kernels("tuned")
        seconds = {kernels: [] for kernels in args.kernels}
        for _ in range(args.repeats):
            for kernels, graph in graphs.items():
                seconds[kernels].append(seconds_per_call(graph, blocks[kernels]))
        results.append({"operation": operation, "batch size": n, "seconds": seconds})
    return results


def kernel_table(results, kernels):
    """In Markdown: median, lowest and highest block of each, and ratios to the first kernels."""
    lines = ["# Kernels of fastreplay", ""]
    lines += ["Microseconds per call as a CUDA graph: median (lowest to highest block)."]
    ratios = [f"{other} / {kernels[0]}" for other in kernels[1:]]
    lines += ["", f"| operation | batch size | {' | '.join([*kernels, *ratios])} |"]
    lines += ["|---|---:|" + "---:|" * (len(kernels) + len(ratios))]
    for row in results:
        blocks = [np.array(row["seconds"][name]) * 1e6 for name in kernels]
        medians = [np.median(x) for x in blocks]
        cells = [f"{m:.2f} ({x.min():.2f} to {x.max():.2f})" for m, x in zip(medians, blocks)]
        cells += [f"{m / medians[0]:.2f}" for m in medians[1:]]
        lines += [f"| {row['operation']} | {row['batch size']} | {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Compares the times of fastreplay's CUDA kernels.")
    names = ("tuned", "reference")
    parser.add_argument("--kernels", nargs="+", choices=names, default=names, help="which to time")
    parser.add_argument("--capacity", type=int, default=200_000, help="transitions of a replay")
    parser.add_argument("--repeats", type=int, default=5, help="blocks of each measurement")
    parser.add_argument("--seconds", type=float, default=0.2, help="approximate measurement time")
    parser.add_argument("--record", help="folder for results.json and README.md")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU: torch.cuda.is_available() is False")
    if args.record:
        describe()  # before the measurement, refuses a checkout that cannot be recorded
    results = compare_kernels(args, kernel_calls(args))
    table = kernel_table(results, args.kernels)
    print(table)
    if args.record:
        write_record(args.record, {"kernels": results}, table)


if __name__ == "__main__":
    main()
