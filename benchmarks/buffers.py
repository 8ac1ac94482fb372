"""Replay buffers and sum-trees side by side: CleanQ's, every peer that installs, the limit.

    python benchmarks/buffers.py --record benchmarks/records/2026-01-01_buffers

Each peer runs in a process and a virtual environment of its own, which this command makes (torch
and NumPy are taken from the environment that runs it). A peer that does not install is a row that
says so. Every process also times a memcpy, before and after: its change is the drift. The limit, a
plain copy of the bytes that must move, is a row too. Written into the record: results.json (all
times, to three digits), README.md (the table), and the figures.

Measured, for 84x84 frames, stacks of 4, --capacity transitions:
    add       transitions a second while the buffer fills for the second time
    bytes     growth of the process while it fills for the first time, a transition
    sample    (obs, next_obs) as torch tensors, microseconds
    update    new priorities for the rows just drawn, different ones each time
and for trees of 2^20 leaves, on one thread: 32, 256 and 4096 times
    sample    with the drawing of random numbers
    find      the leaves under targets that are given
    update    new priorities
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy as np
import torch
from buffer_peers import PEERS, Stream
from machine import write_record
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
FRAME_BYTES = 84 * 84
TREE_SIZE = 2**20
SAMPLE_SIZES = (1, 8, 32, 64, 128, 256, 512)
TREE_SIZES = (32, 256, 4096)


def times_of(call, args, blocks=None, calls=None):
    """Seconds of each call, in `args.repeats` blocks; the first calls are not counted."""
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    calls = calls or int(min(200, max(5, args.seconds / args.repeats / max(once, 1e-7))))
    times = []
    for _ in range(blocks or args.repeats):
        block = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            block.append(time.perf_counter() - start)
        times.append(block)
    return times


def mean_of_many(call, args, calls=200):
    """For calls of a few microseconds: the mean over blocks of calls, one number a block."""
    for _ in range(20):
        call()
    blocks = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        blocks.append([(time.perf_counter() - start) / calls])
    return blocks


def resident_bytes():
    if not Path("/proc/self/statm").exists():
        return None
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def drift_seconds():
    """A memcpy of 64 MiB: the machine's speed of the moment. Best of 7."""
    source, target = torch.zeros(2**26, dtype=torch.uint8), torch.zeros(2**26, dtype=torch.uint8)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return best


def measure_limit(args):
    """fastreplay's samples by turns with the least that any sample must do: a plain copy of the
    stack + 1 = 5 frames of n transitions, in one piece from anywhere in a game's frames, on torch's
    threads. Both write into the same tensors again and again."""
    peer = PEERS["fastreplay-out"]
    buffer = filled(peer, args.capacity)
    frames = buffer.replay.state_dict()["frames"][0].view(-1)
    random = np.random.default_rng(0)
    result = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for n in SAMPLE_SIZES:
            size = n * 5 * FRAME_BYTES
            target = torch.empty(size, dtype=torch.uint8)
            starts = iter(random.integers(len(frames) - size, size=1_000_000).tolist())

            def copy(target=target, size=size, starts=starts):
                target.copy_(frames[(start := next(starts)) : start + size])

            blocks = {"copy": [], "sample": []}
            for _ in range(4 * args.repeats):  # short turns: the machine's speed changes
                blocks["copy"] += times_of(copy, args, blocks=1, calls=50)
                blocks["sample"] += times_of(lambda n=n: buffer.sample(n), args, 1, 50)
            for what in blocks:
                result[f"{what} {n}, {threads} threads"] = blocks[what]
    return result


def measure_import(args):
    """Milliseconds that fastreplay's classes take to import once torch is there."""
    code = (
        "import time, torch; start = time.perf_counter(); "
        "from fastreplay import FrameReplay, SumTree; print(time.perf_counter() - start)"
    )
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(args.repeats)
    ]
    return {"seconds": [[seconds] for seconds in runs]}


def filled(peer, capacity, stream=None):
    stream = stream or Stream(peer.num_envs)
    buffer = peer(capacity)
    for _ in range(capacity // peer.num_envs):
        buffer.add(stream.step())
    return buffer


def measure_frames(peer, args):
    torch.set_num_threads(2)
    stream = Stream(peer.num_envs)
    before = resident_bytes()
    buffer = filled(peer, args.capacity, stream)
    result = {}
    if before is not None:
        steps = args.capacity // peer.num_envs
        result["bytes"] = (resident_bytes() - before) / (steps * peer.num_envs)
    seconds, added = 0.0, 0
    while seconds < args.seconds:
        row = stream.step()
        start = time.perf_counter()
        buffer.add(row)
        seconds += time.perf_counter() - start
        added += peer.num_envs
    result["add/s"] = added / seconds
    rng = np.random.default_rng(0)
    for n in SAMPLE_SIZES:
        result[f"sample {n}"] = times_of(lambda n=n: buffer.sample(n), args)
        if not peer.prioritized:
            continue
        updates = []
        for _ in range(args.repeats):
            block = []
            for _ in range(20):
                batch = buffer.sample(n)
                errors = rng.random(n).astype(np.float32)
                start = time.perf_counter()
                buffer.update(batch, errors)
                block.append(time.perf_counter() - start)
            updates.append(block)
        result[f"update {n}"] = updates
    return result


def measure_tree(peer, args):
    torch.set_num_threads(1)
    tree = peer(TREE_SIZE)
    rng = np.random.default_rng(0)
    tree.update(*tree.prepare(np.arange(TREE_SIZE), rng.random(TREE_SIZE).astype(np.float32)))
    result = {}
    for n in TREE_SIZES:
        calls = 200 if n < 4096 else 50
        changes = [
            tree.prepare(rng.integers(0, TREE_SIZE, n), rng.random(n).astype(np.float32))
            for _ in range(calls)
        ]
        index = iter(range(10**9))
        result[f"sample {n}"] = mean_of_many(lambda n=n: tree.sample(n), args, calls)
        if tree.find:
            targets = [tree.targets(n) for _ in range(calls)]
            index = iter(range(10**9))
            result[f"find {n}"] = mean_of_many(
                lambda targets=targets, index=index: tree.find(targets[next(index) % len(targets)]),
                args,
                calls,
            )
        result[f"update {n}"] = mean_of_many(
            lambda changes=changes, index=index: tree.update(*changes[next(index) % len(changes)]),
            args,
            calls,
        )
    return result


def measure_capacities(args):
    """fastreplay alone, from 1e4 to 1e7: frames of 28x28, so that ten million fit, and trees."""
    from fastreplay import FrameReplay, SumTree

    result = {}
    for capacity in args.capacities:
        replay = FrameReplay(capacity, (28, 28), num_envs=8, prioritized=True)
        frames = np.random.default_rng(0).integers(0, 256, (8, 28, 28), dtype=np.uint8)
        row = np.zeros(8, np.int64), np.zeros(8, np.float32), np.zeros(8, bool)
        for t in range(capacity // 8):
            replay.add(frames, *row, np.full(8, t % 500 == 0))
        out = replay.sample(256)
        result[f"frames {capacity}"] = times_of(lambda r=replay, o=out: r.sample(256, out=o), args)
        del replay, out
        tree = SumTree(capacity)
        tree.set(torch.arange(capacity), torch.rand(capacity))
        result[f"tree {capacity}"] = mean_of_many(lambda tree=tree: tree.sample(256), args)
        del tree
    return result


def work(args):
    """One peer, in its own process: prints a line of JSON."""
    if args.device == "cuda":
        import buffers_cuda

        print(json.dumps({"result": buffers_cuda.SIDES[args.worker](args)}))
        return
    peer = PEERS.get(args.worker)
    if args.cleanrl:
        sys.path.insert(0, args.cleanrl)
    before = drift_seconds()
    if args.worker == "limit":
        result = measure_limit(args)
    elif args.worker == "import":
        result = measure_import(args)
    elif args.worker == "capacities":
        result = measure_capacities(args)
    else:
        result = measure_tree(peer, args) if peer.kind == "tree" else measure_frames(peer, args)
    after = drift_seconds()
    version = peer.version() if peer else torch.__version__
    print(json.dumps({"version": version, "memcpy 64 MiB": [before, after], "result": result}))


def make_environment(peer, folder, source=""):
    """A virtual environment with the peer in it, which sees this one's packages behind its own."""
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        site = next((folder / "lib").glob("python*/site-packages"))
        parents = [path for path in sys.path if path.endswith("site-packages")]
        (site / "zz_parent.pth").write_text("\n".join(parents) + "\n")
        wanted = [peer.requires]
        if source:  # its dependencies are there by then
            wanted += [["--no-build-isolation", "--no-deps", "--force-reinstall", source]]
        for what in wanted:
            command = [python, "-m", "pip", "install", "--quiet", *what]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode != 0:
                lines = run.stderr.strip().splitlines() or ["pip failed"]
                raise RuntimeError(f"does not install: {lines[-1][:120]}")
        done.write_text(" ".join(peer.requires))
    return python


def run_worker(name, args):
    peer = PEERS.get(name)
    python = sys.executable
    if peer is not None and peer.requires:
        folder = Path(args.environments) / "-".join(peer.requires).replace("=", "")
        source = args.torchrl if peer.package == "torchrl" else ""
        python = make_environment(peer, folder, source)
    command = [python, __file__, "--worker", name, "--capacity", args.capacity]
    command += ["--repeats", args.repeats, "--seconds", args.seconds, "--cleanrl", args.cleanrl]
    command += ["--capacities", *args.capacities, "--device", args.device]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3"}
    limit = 3600 if args.device == "cpu" else 90
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=limit
    )
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or ["ended without a word"]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
        raise RuntimeError(f"does not run: {(errors or lines)[-1][:120]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def microseconds(blocks):
    """Median over all calls, and the spread of the blocks' medians."""
    medians = [float(np.median(block)) * 1e6 for block in blocks]
    return float(np.median(np.concatenate(blocks))) * 1e6, min(medians), max(medians)


def cell(result, key):
    if key not in result:
        return ""
    middle, low, high = microseconds(result[key])
    digits = 1 if middle < 100 else 0
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(rows):
    """Markdown: one table for frames, one for trees."""
    lines = ["# Replay buffers", "", "Median microseconds (lowest-highest block median).", ""]
    columns = ["sample 32", "sample 256", "update 32", "update 256"]
    lines += ["| buffer | version | add/s | bytes each | " + " | ".join(columns) + " | drift |"]
    lines += ["|---|---|---:|---:|" + "---:|" * len(columns) + "---:|"]
    for name, row in rows.items():
        peer = PEERS.get(name)
        if peer is None or peer.kind != "frames":
            continue
        if "error" in row:
            lines += [f"| {peer.title} | {row['error']} |" + " |" * (len(columns) + 3)]
            continue
        result = row["result"]
        cells = [cell(result, key) for key in columns]
        before, after = row["memcpy 64 MiB"]
        lines += [
            f"| {peer.title} | {row['version']} | {result['add/s']:.0f} | "
            f"{result.get('bytes', 0):.0f} | {' | '.join(cells)} | {after / before:.2f} |"
        ]
    if "result" in rows.get("limit", {}):
        result = rows["limit"]["result"]
        lines += [
            "",
            "By turns in one process, microseconds, and the median ratio of the turns:",
            "",
        ]
        lines += ["| batch, threads | plain copy of 5 frames each | fastreplay | ratio |"]
        lines += ["|---|---:|---:|---:|"]
        for threads in (1, 2):
            for n in (32, 256):
                key = f"{n}, {threads} threads"
                turns = zip(result[f"sample {key}"], result[f"copy {key}"])
                ratio = np.median([np.median(sample) / np.median(copy) for sample, copy in turns])
                cells = [cell(result, f"{what} {key}") for what in ("copy", "sample")]
                lines += [f"| {key} | {cells[0]} | {cells[1]} | {ratio:.2f} |"]
    lines += ["", "## Sum-trees, 2^20 leaves, one thread", ""]
    columns = [f"{what} {n}" for what in ("sample", "find", "update") for n in TREE_SIZES]
    lines += ["| tree | version | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * 9]
    for name, row in rows.items():
        peer = PEERS.get(name)
        if peer is None or peer.kind != "tree":
            continue
        if "error" in row:
            lines += [f"| {peer.title} | {row['error']} |" + " |" * 9]
        else:
            cells = [cell(row["result"], key) for key in columns]
            lines += [f"| {peer.title} | {row['version']} | {' | '.join(cells)} |"]
    if "result" in rows.get("capacities", {}):
        lines += ["", "## fastreplay, batch 256, against capacity (frames of 28x28)", ""]
        lines += ["| capacity | sample and gather | tree alone |", "|---:|---:|---:|"]
        result = rows["capacities"]["result"]
        for key in result:
            if key.startswith("frames "):
                n = key.split()[1]
                lines += [f"| {n} | {cell(result, key)} | {cell(result, f'tree {n}')} |"]
    if "result" in rows.get("import", {}):
        middle, low, high = microseconds(rows["import"]["result"]["seconds"])
        milliseconds = f"{middle / 1e3:.1f} ms ({low / 1e3:.1f}-{high / 1e3:.1f})"
        lines += ["", f"Importing fastreplay's classes after torch: {milliseconds}"]
    return "\n".join(lines) + "\n"


def rounded(value):
    """Times to three significant digits: a record is read by people."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def figures(rows, record):
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frames = {
        name: row
        for name, row in rows.items()
        if "result" in row and name in PEERS and PEERS[name].kind == "frames"
    }
    if frames:
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for name, row in frames.items():
            medians = [microseconds(row["result"][f"sample {n}"])[0] for n in SAMPLE_SIZES]
            style = "-" if PEERS[name].own else "--"
            axes.loglog(SAMPLE_SIZES, medians, style, marker=".", label=PEERS[name].title)
        if "result" in rows.get("limit", {}):
            copies = rows["limit"]["result"]
            limit = [microseconds(copies[f"copy {n}, 2 threads"])[0] for n in SAMPLE_SIZES]
            axes.loglog(SAMPLE_SIZES, limit, "k:", label="limit: plain copy, 2 threads")
        axes.set(
            xlabel="batch", ylabel="microseconds", title="sample (obs, next_obs), 84x84, stack 4"
        )
        axes.legend(fontsize="small")
        figure.savefig(record / "latency.png", dpi=120)

        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        sized = {PEERS[name].title: row["result"].get("bytes", 0) for name, row in frames.items()}
        axes.barh(list(sized), list(sized.values()))
        axes.axvline(FRAME_BYTES, color="k", linestyle=":")
        axes.set(xlabel="bytes a transition (dotted: one frame)", xscale="log")
        figure.savefig(record / "memory.png", dpi=120)

    if "result" in rows.get("capacities", {}):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        result = rows["capacities"]["result"]
        for kind, label in (("frames", "sample and gather, 28x28"), ("tree", "tree alone")):
            keys = [key for key in result if key.startswith(kind)]
            capacities = [int(key.split()[1]) for key in keys]
            rates = [256 / microseconds(result[key])[0] for key in keys]
            axes.loglog(capacities, rates, marker=".", label=label)
        axes.set(
            xlabel="capacity", ylabel="million samples a second", title="fastreplay, batch 256"
        )
        axes.legend()
        figure.savefig(record / "capacity.png", dpi=120)


def on_gpu(args):
    import buffers_cuda

    if not torch.cuda.is_available():
        sys.exit("error: --device cuda needs a GPU that torch sees; leave it out on this machine.")
    sides = {}
    for name in args.peers or buffers_cuda.SIDES:
        print(name, flush=True)
        sides[name] = attempt(name, args)
        if args.record:
            write_record(args.record, {"sides": sides}, buffers_cuda.table(sides))
    print(buffers_cuda.table(sides))
    missing = [name for name in buffers_cuda.OWN if "error" in sides.get(name, {})]
    if missing:
        sys.exit(f"error: not measured: {', '.join(missing)}")


def attempt(name, args):
    """What one side's process measured, or its error."""
    try:
        return run_worker(name, args)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {"error": str(error).replace(sys.executable, "python")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", help="folder for results.json, README.md and the figures")
    parser.add_argument("--peers", nargs="*", default=[], help="only these (default: all)")
    parser.add_argument("--capacity", type=int, default=100_000, help="transitions")
    parser.add_argument("--capacities", nargs="*", type=int, default=[10**k for k in range(4, 8)])
    parser.add_argument("--repeats", type=int, default=5, help="blocks of each measurement")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement, about")
    parser.add_argument("--cleanrl", default="", help="a checkout of CleanRL, which is no package")
    parser.add_argument(
        "--torchrl",
        default="",
        help="a checkout to build TorchRL from, where the wheel's extension does not load",
    )
    parser.add_argument(
        "--environments",
        default=str(Path(tempfile.gettempdir()) / "cleanq-bench"),
        help="where the peers' virtual environments are kept",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    if args.device == "cuda":
        return on_gpu(args)
    names = args.peers or ["limit", *PEERS, "capacities", "import"]
    unknown = set(names) - {"limit", "capacities", "import", *PEERS}
    if unknown:
        parser.error(f"no such peer: {', '.join(unknown)}; there are: {', '.join(PEERS)}")
    rows = {}
    for name in (bar := tqdm(names)):
        bar.set_description(name)
        rows[name] = attempt(name, args)
    print(table(rows))
    if args.record:
        write_record(args.record, {"rows": rounded(rows)}, table(rows))
        figures(rows, Path(args.record))


if __name__ == "__main__":
    main()
