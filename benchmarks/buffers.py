"""Compares replay buffers and sum-trees: CleanQ's and those of every peer that can be installed.

    python benchmarks/buffers.py --record benchmarks/records/2026-01-01_buffers

Each peer runs in its own process and virtual environment, which this tool creates; torch and NumPy
come from the environment that runs the tool. A peer that cannot be installed gets a row that says
so. Every process times a 64 MiB memcpy before and after its measurements; their ratio, the drift,
shows how much the machine's speed changed in between. The row `plain-copy` is the time to copy as
many bytes as a sample must copy. Without --record the tool only prints the tables. With it, the
record's folder contains README.md, results.json (all times, to three digits) and the figures
latency.png, memory.png and capacity.png.

Measured for frames of 84x84, stacks of 4, --capacity transitions:
    add       transitions per second while the full buffer is overwritten
    bytes     growth of the process while the buffer fills, per transition
    sample    microseconds for (obs, next_obs) as torch tensors
    update    microseconds to set new priorities for the rows just sampled
and for trees of 2^20 leaves on one thread, in microseconds for 32, 256 and 4096 leaves:
    sample    draw random targets and find their leaves
    find      find the leaves of given targets
    update    set new priorities

`--device cuda` runs the measurements on a GPU instead; see buffers_cuda.py.
"""

import argparse
import itertools
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
from figures import Curve, draw_bars, draw_curves, pyplot, save
from machine import clean_commit, commit_of, write_record
from tqdm import tqdm

FRAME_BYTES = 84 * 84
TREE_SIZE = 2**20
SAMPLE_SIZES = (1, 8, 32, 64, 128, 256, 512)
TREE_SIZES = (32, 256, 4096)
OTHERS = ("plain-copy", "capacities", "import")  # what is measured besides the peers


def time_calls(call, args, blocks=None, calls=None):
    """Seconds of each call, in blocks: `blocks` (default: --repeats) lists of `calls` numbers.

    Without `calls`, a block has as many calls as fit into --seconds. The first calls are not
    counted.
    """
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


def time_short_calls(call, args, calls=200):
    """Seconds per call, for calls of a few microseconds: one mean over `calls` in each block."""
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
    """Resident memory of this process; None if /proc does not provide it."""
    if not Path("/proc/self/statm").exists():
        return None
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memcpy_seconds():
    """Seconds for a copy of 64 MiB, the best of 7."""
    source, target = torch.zeros(2**26, dtype=torch.uint8), torch.zeros(2**26, dtype=torch.uint8)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return best


def measure_plain_copy(args):
    """fastreplay's samples, in turns with a plain copy of the same number of bytes.

    A sample of n transitions copies stack + 1 = 5 frames for each. The plain copy takes 5 n frames
    in one contiguous piece, from a random position in one game's frames, on torch's threads. Both
    write into the same tensors at every call. Turns are short, so that a change of the machine's
    speed affects both.
    """
    peer = PEERS["fastreplay-out"]
    least = (SAMPLE_SIZES[-1] * 5 + 1) * peer.num_envs
    if args.capacity < least:
        raise ValueError(f"--capacity must be at least {least} for plain-copy")
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
            for _ in range(4 * args.repeats):
                blocks["copy"] += time_calls(copy, args, blocks=1, calls=50)
                blocks["sample"] += time_calls(lambda n=n: buffer.sample(n), args, 1, 50)
            for what in blocks:
                result[f"{what} {n}, {threads} threads"] = blocks[what]
    return result


def measure_import(args):
    """Seconds to import fastreplay's classes after torch, each in a new process."""
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
    """A peer's buffer after `capacity` transitions."""
    stream = stream or Stream(peer.num_envs)
    buffer = peer(capacity)
    for _ in range(capacity // peer.num_envs):
        buffer.add(stream.step())
    return buffer


def measure_frames(peer, args):
    """Memory, adds, samples and priority updates of one peer's frame buffer, on two threads."""
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
        result[f"sample {n}"] = time_calls(lambda n=n: buffer.sample(n), args)
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
    """Samples, finds and updates of one peer's tree, on one thread.

    Every update sets different priorities, because some trees skip unchanged ones.
    """
    torch.set_num_threads(1)
    tree = peer(TREE_SIZE)
    rng = np.random.default_rng(0)
    tree.update(*tree.prepare(np.arange(TREE_SIZE), rng.random(TREE_SIZE).astype(np.float32)))
    result = {}
    for n in TREE_SIZES:
        calls = 200 if n < 4096 else 50
        changes = itertools.cycle(
            [
                tree.prepare(rng.integers(0, TREE_SIZE, n), rng.random(n).astype(np.float32))
                for _ in range(calls)
            ]
        )
        result[f"sample {n}"] = time_short_calls(lambda n=n: tree.sample(n), args, calls)
        if tree.find:
            targets = itertools.cycle([tree.targets(n) for _ in range(calls)])
            result[f"find {n}"] = time_short_calls(
                lambda targets=targets: tree.find(next(targets)), args, calls
            )
        result[f"update {n}"] = time_short_calls(
            lambda changes=changes: tree.update(*next(changes)), args, calls
        )
    return result


def measure_capacities(args):
    """Only fastreplay, at each of --capacities; frames of 28x28, so that ten million fit."""
    from fastreplay import FrameReplay, SumTree

    result = {}
    for capacity in args.capacities:
        replay = FrameReplay(capacity, (28, 28), num_envs=8, prioritized=True)
        frames = np.random.default_rng(0).integers(0, 256, (8, 28, 28), dtype=np.uint8)
        row = np.zeros(8, np.int64), np.zeros(8, np.float32), np.zeros(8, bool)
        for t in range(capacity // 8):  # episodes of 500 steps
            replay.add(frames, *row, np.full(8, t % 500 == 0))
        out = replay.sample(256)
        result[f"frames {capacity}"] = time_calls(
            lambda r=replay, o=out: r.sample(256, out=o), args
        )
        del replay, out
        tree = SumTree(capacity)
        tree.set(torch.arange(capacity), torch.rand(capacity))
        result[f"tree {capacity}"] = time_short_calls(lambda tree=tree: tree.sample(256), args)
        del tree
    return result


def measure(args):
    """Measure `args.worker` in this process and print the result as one line of JSON."""
    if args.device == "cuda":
        import buffers_cuda

        print(json.dumps({"result": buffers_cuda.SIDES[args.worker](args)}))
        return
    peer = PEERS.get(args.worker)
    if args.cleanrl:
        sys.path.insert(0, args.cleanrl)
    before = memcpy_seconds()
    if args.worker == "plain-copy":
        result = measure_plain_copy(args)
    elif args.worker == "import":
        result = measure_import(args)
    elif args.worker == "capacities":
        result = measure_capacities(args)
    else:
        result = measure_tree(peer, args) if peer.kind == "tree" else measure_frames(peer, args)
    after = memcpy_seconds()
    version = peer.version() if peer else torch.__version__
    print(json.dumps({"version": version, "memcpy 64 MiB": [before, after], "result": result}))


def make_environment(peer, folder, source=""):
    """A virtual environment with the peer installed; returns its Python.

    Packages that are missing there are taken from the environment that runs the tool. `source`: a
    checkout to build the peer from, after its dependencies. Raises RuntimeError if pip fails.
    """
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        site = next((folder / "lib").glob("python*/site-packages"))
        parents = [path for path in sys.path if path.endswith("site-packages")]
        (site / "zz_parent.pth").write_text("\n".join(parents) + "\n")
        wanted = [peer.requires]
        if source:
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
    """Measure one peer in its own process. Raises RuntimeError with one line if that fails."""
    peer = PEERS.get(name)
    python = sys.executable
    if peer is not None and peer.requires:
        folder = Path(args.environments) / "-".join(peer.requires).replace("=", "")
        source = args.torchrl if peer.package == "torchrl" else ""
        python = make_environment(peer, folder, source)
    command = [python, __file__, *sys.argv[1:], "--worker", name]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3"}
    limit = 3600 if args.device == "cpu" else 90
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=limit
    )
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or ["no output"]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
        raise RuntimeError(f"does not run: {(errors or lines)[-1][:120]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def microseconds(blocks):
    """Microseconds: median over all calls, lowest and highest median of a block."""
    medians = [float(np.median(block)) * 1e6 for block in blocks]
    return float(np.median(np.concatenate(blocks))) * 1e6, min(medians), max(medians)


def cell(result, key):
    """A table cell: "median (lowest-highest)" in microseconds, or "" if not measured."""
    if key not in result:
        return ""
    middle, low, high = microseconds(result[key])
    digits = 1 if middle < 100 else 0
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def report_of(rows):
    """The record's page in Markdown: tables of all measurements."""
    parts = [frames_table(rows), copies_table(rows), trees_table(rows), capacities_table(rows)]
    if "result" in rows.get("import", {}):
        middle, low, high = (x / 1e3 for x in microseconds(rows["import"]["result"]["seconds"]))
        parts.append(
            f"Importing fastreplay's classes after torch: {middle:.1f} ms ({low:.1f}-{high:.1f})."
        )
    for name in OTHERS:
        if "error" in rows.get(name, {}):
            parts.append(f"{name} {rows[name]['error']}.")
    head = ["# Replay buffers and sum-trees", "Median microseconds (lowest-highest block median)."]
    return "\n\n".join([*head, *filter(None, parts)]) + "\n"


def rows_of(rows, kind):
    """[(peer, its row)] of the peers of one kind, "frames" or "tree"."""
    return [
        (PEERS[name], row)
        for name, row in rows.items()
        if getattr(PEERS.get(name), "kind", "") == kind
    ]


def frames_table(rows):
    columns = ["sample 32", "sample 256", "update 32", "update 256"]
    lines = ["| buffer | version | add/s | bytes each | " + " | ".join(columns) + " | drift |"]
    lines += ["|---|---|---:|---:|" + "---:|" * len(columns) + "---:|"]
    for peer, row in rows_of(rows, "frames"):
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
    return "\n".join(lines) if len(lines) > 2 else ""


def copies_table(rows):
    if "result" not in rows.get("plain-copy", {}):
        return ""
    result = rows["plain-copy"]["result"]
    lines = ["## Samples in turns with a plain copy of as many bytes", ""]
    lines += ["| batch, threads | plain copy | fastreplay | median ratio of the turns |"]
    lines += ["|---|---:|---:|---:|"]
    for threads in (1, 2):
        for n in (32, 256):
            key = f"{n}, {threads} threads"
            turns = zip(result[f"sample {key}"], result[f"copy {key}"])
            ratio = np.median([np.median(sample) / np.median(copy) for sample, copy in turns])
            cells = [cell(result, f"{what} {key}") for what in ("copy", "sample")]
            lines += [f"| {key} | {cells[0]} | {cells[1]} | {ratio:.2f} |"]
    return "\n".join(lines)


def trees_table(rows):
    columns = [f"{what} {n}" for what in ("sample", "find", "update") for n in TREE_SIZES]
    lines = ["## Sum-trees, 2^20 leaves, one thread", ""]
    lines += ["| tree | version | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * 9]
    for peer, row in rows_of(rows, "tree"):
        if "error" in row:
            lines += [f"| {peer.title} | {row['error']} |" + " |" * 9]
        else:
            cells = [cell(row["result"], key) for key in columns]
            lines += [f"| {peer.title} | {row['version']} | {' | '.join(cells)} |"]
    return "\n".join(lines) if len(lines) > 4 else ""


def capacities_table(rows):
    if "result" not in rows.get("capacities", {}):
        return ""
    result = rows["capacities"]["result"]
    lines = ["## fastreplay, batch 256, by capacity (frames of 28x28)", ""]
    lines += ["| capacity | sample and gather | tree alone |", "|---:|---:|---:|"]
    for n in capacities_of(result):
        lines += [f"| {n} | {cell(result, f'frames {n}')} | {cell(result, f'tree {n}')} |"]
    return "\n".join(lines)


def capacities_of(result):
    return [int(key.split()[1]) for key in result if key.startswith("frames ")]


def rounded(value):
    """The same structure with every float rounded to three significant digits."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def figures(rows):
    """{name: matplotlib figure} of the measurements: latency, memory, capacity."""
    frames = [(peer, row["result"]) for peer, row in rows_of(rows, "frames") if "result" in row]
    drawn = {}
    if frames:
        copies = rows.get("plain-copy", {}).get("result")
        drawn["latency"] = latency_figure(frames, copies)
        drawn["memory"] = memory_figure(frames)
    if "result" in rows.get("capacities", {}):
        drawn["capacity"] = capacity_figure(rows["capacities"]["result"])
    return drawn


def latency_figure(frames, copies):
    """Time of a sample by batch size."""
    sizes, curves = np.array(SAMPLE_SIZES), []
    for peer, result in frames:
        medians = [microseconds(result[f"sample {n}"])[0] for n in sizes]
        curves.append(Curve(peer.title, sizes, np.array(medians), peer=not peer.own))
    if copies:
        medians = [microseconds(copies[f"copy {n}, 2 threads"])[0] for n in sizes]
        style = {"color": "black", "linestyle": ":", "linewidth": 1.5}
        text = "plain copy of as many bytes, 2 threads"
        curves.append(Curve(text, sizes, np.array(medians), peer=True, style=style))
    note = "obs and next_obs, frames of 84x84, stacks of 4; grey: other libraries"
    labels = "batch size, transitions", "time of a sample, µs, lower is better"
    return draw_curves(curves, "Sampling", note, *labels, log=True, height=5.6, width=38)


def memory_figure(frames):
    """Bytes per transition, the least on top."""
    rows = [(peer.title, result.get("bytes", 0), not peer.own) for peer, result in frames]
    rows.sort(key=lambda row: row[1])
    note, reference = (
        "frames of 84x84, stacks of 4",
        (FRAME_BYTES, "dashed: the bytes of one frame"),
    )
    return draw_bars(rows, "Memory", note, "bytes per transition, lower is better", reference)


def capacity_figure(result):
    """fastreplay's rate by capacity."""
    capacities, curves = np.array(capacities_of(result)), []
    for kind, text in (("frames", "frames of 28x28"), ("tree", "sum-tree alone")):
        rates = [256 / microseconds(result[f"{kind} {n}"])[0] for n in capacities]
        curves.append(Curve(text, capacities, np.array(rates)))
    labels = "capacity, transitions", "million transitions/s, higher is better"
    return draw_curves(curves, "fastreplay, batches of 256", "", *labels, log=True)


def measure_on_gpu(args, commit):
    """All sides of buffers_cuda.py. Writes the record after each side, because time may run out."""
    import buffers_cuda

    if not torch.cuda.is_available():
        sys.exit("error: --device cuda needs a GPU that torch can use; omit it on this machine.")
    sides = {}
    for name in args.peers or buffers_cuda.SIDES:
        print(name, flush=True)
        sides[name] = attempt(name, args)
        if args.record:
            write_record(args.record, {"sides": sides}, buffers_cuda.table(sides), commit)
    print(buffers_cuda.table(sides))
    missing = [name for name in buffers_cuda.OWN if "error" in sides.get(name, {})]
    if missing:
        sys.exit(f"error: not measured: {', '.join(missing)}")


def attempt(name, args):
    """{"result": ...} of one side's process, or {"error": one line}."""
    try:
        return run_worker(name, args)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {"error": str(error).replace(sys.executable, "python")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="folder of the record")
    parser.add_argument("--peers", nargs="*", default=[], help="only these (default: all)")
    parser.add_argument("--capacity", type=int, default=100_000, help="transitions")
    parser.add_argument("--capacities", nargs="*", type=int, default=[10**k for k in range(4, 8)])
    parser.add_argument("--repeats", type=int, default=5, help="blocks of each measurement")
    parser.add_argument("--seconds", type=float, default=2.0, help="approximate measurement time")
    parser.add_argument("--cleanrl", default="", help="folder of a CleanRL checkout")
    parser.add_argument(
        "--torchrl",
        default="",
        help="checkout to build TorchRL from, if its wheel does not load",
    )
    parser.add_argument(
        "--environments",
        default=str(Path(tempfile.gettempdir()) / "cleanq-bench"),
        help="folder of the peers' virtual environments",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return measure(args)
    commit = clean_commit() if args.record else None
    if args.device == "cuda":
        return measure_on_gpu(args, commit)
    names = args.peers or ["plain-copy", *PEERS, "capacities", "import"]
    unknown = set(names) - {*OTHERS, *PEERS}
    if unknown:
        there = ", ".join([*OTHERS, *PEERS])
        parser.error(f"--peers: unknown: {', '.join(sorted(unknown))}; there are: {there}")
    if args.record:
        pyplot()  # exits here if it is missing, not after the measurement
    rows = {}
    for name in (bar := tqdm(names)):
        bar.set_description(name)
        rows[name] = attempt(name, args)
    print(report_of(rows))
    if args.record:
        drawn = figures(rows)
        results = {"cleanrl_commit": commit_of(args.cleanrl), "rows": rounded(rows)}
        write_record(args.record, results, report_of(rows), commit)
        for name, figure in drawn.items():
            save(figure, args.record / name)


if __name__ == "__main__":
    main()
