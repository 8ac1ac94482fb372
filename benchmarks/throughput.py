"""Agent steps per second while learning: CleanQ, and CleanRL, LeanRL, Stable-Baselines3, Tianshou.

    python benchmarks/throughput.py --task atari --cleanrl ../cleanrl \\
        --record benchmarks/records/2026-01-01_throughput_atari

All sides learn the same environment with the same batch size, update frequency, target period and
epsilon, on the same number of CPU threads; DQN has the same network everywhere. They take turns,
`--repeats` times, each turn in its own process. A turn is measured for about `--seconds`. The
measurement begins `--warm-up` seconds after learning has begun. A 64 MiB memcpy before each turn
shows how much the machine's speed drifts. Without --record the tool only prints the table.

`--variants` are the flags of CleanQ's turns, one string for each side: "num_envs=8 tau=0.1". The
word `script=NAME` chooses the file in algos/. `--peers` are the other sides, in the same form:
"CleanRL script=c51", "Stable-Baselines3 num_envs=4", "Stable-Baselines3 algorithm=QRDQN
n_quantiles=25" (of sb3-contrib), "Tianshou algorithm=C51", "LeanRL script=dqn_torchcompile
compile=True". A side is compared with the fastest peer of its algorithm: C51, QR-DQN, Rainbow, or
DQN, with which all other files are compared.

`--sweep num_envs 1 4 16 64` measures each variant with each of these values; the figure shows the
rate against them. In a sweep over buffer_size learning starts when the replay is full.

On Atari the scripts compute in float32 here, as the peers do, unless a variant says
precision=bfloat16.

For each variant on a CPU, the FLOPs of an agent step are counted once, and before each round of
turns the rate of matrix products in its precision is measured. Their ratio is the roofline: about
the most steps per second that the processor allows. `--profile FOLDER` does not compare: it writes
a trace of each variant into the folder, for chrome://tracing, and a table of where the time of an
agent step goes; `--record` keeps the tables.

CleanQ's scripts run through their command line; the rate comes from the times and steps of their
TensorBoard files. If they compile their update, --warm-up must be longer than the compilation.

CleanRL and LeanRL are checkouts of github.com/vwxyzjn/cleanrl and github.com/pytorch-labs/LeanRL.
What is changed in the peers so that they run at all is listed in throughput_peers.py.
"""

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from figures import Curve, draw_curves, draw_intervals, pyplot, save, styles
from machine import ROOT, clean_commit, commit_of, write_record
from throughput_peers import EPSILON, PEERS, flags_of

TASKS = {
    "atari": {
        "env_id": "BreakoutNoFrameskip-v4",
        "learning_starts": 1_000,
        "buffer_size": 20_000,
        "batch_size": 32,
        "train_frequency": 4,
        "target_network_frequency": 1_000,
        "learning_rate": 1e-4,
    },
    "cartpole": {
        "env_id": "CartPole-v1",
        "learning_starts": 1_000,
        "buffer_size": 10_000,
        "batch_size": 128,
        "train_frequency": 10,
        "target_network_frequency": 500,
        "learning_rate": 2.5e-4,
    },
}
TASKS["minatar"] = TASKS["cartpole"] | {
    "env_id": "MinAtar/Breakout-v1",
    "buffer_size": 100_000,
    "batch_size": 32,
    "train_frequency": 4,
    "target_network_frequency": 1_000,
}
CHECKOUTS = {"CleanRL": "github.com/vwxyzjn/cleanrl", "LeanRL": "github.com/pytorch-labs/LeanRL"}
COUNTED_STEPS = {"atari": 400}  # agent steps whose FLOPs are counted; elsewhere 2,000
STARTUP_SECONDS = 120  # a turn whose first step takes longer is aborted
LEARNING_SECONDS = 600  # and one whose first update takes longer


class TurnFailed(Exception):
    """A turn without a result; the message gives the reason in one line."""


def last_line(text):
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


# ---- CleanQ ----------------------------------------------------------------------------------


def cleanq_command(args, variant):
    """-> the script's path, its flags"""
    atari = args.task == "atari"
    options = {"torch_threads": args.threads, "device": "cpu", "total_timesteps": 10**9}
    options |= {"start_e": EPSILON, "end_e": EPSILON, "log_frequency": 100 if atari else 1_000}
    options |= {"eval_frequency": 0, "checkpoint_frequency": 0} | TASKS[args.task]
    options |= {"precision": "float32"} if atari else {}
    options |= dict(pair.split("=") for pair in variant.split())
    path = ROOT / "algos" / f"{options.pop('script', 'dqn_atari' if atari else 'dqn_cartpole')}.py"
    return path, flags_of(options)


def time_cleanq(args, variant, folder):
    """Steps per second of one turn: run the script, interrupt it, read its TensorBoard file."""
    if args.sweep and args.sweep[0] == "buffer_size":  # the last word: the replay is full
        variant += f" learning_starts={variant.rpartition('=')[2]}"
    path, flags = cleanq_command(args, variant)
    log = Path(folder, "log.txt")
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", path, *flags],
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not list(Path(folder).glob("runs/*/events*")) and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.05)
        deadline = time.monotonic() + LEARNING_SECONDS
        learning = False
        while not learning and time.monotonic() < deadline:
            let_run(process, 0.5, log)
            learning = bool(read_times(folder)[1])
        let_run(process, args.warm_up + args.seconds, log)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    except subprocess.TimeoutExpired:
        raise TurnFailed("did not stop within 60 s of Ctrl-C") from None
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise TurnFailed(last_line(log.read_text(errors="replace")))
    return rate_of(*read_times(folder), args.warm_up, args.seconds)


def let_run(process, seconds, log):
    """Wait. Raises TurnFailed, with the last line of the log, if the process ends by itself."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
    raise TurnFailed(last_line(log.read_text(errors="replace")))


def run_step_profile(words, folder="."):
    """What benchmarks/step_profile.py prints, a dict."""
    command = [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "step_profile.py", *words]
    try:
        done = subprocess.run(
            list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        raise TurnFailed("took longer than 600 s") from None
    if done.returncode != 0:
        raise TurnFailed(last_line(done.stderr))
    return json.loads(last_line(done.stdout))


def matrix_rates(args, variants):
    """{precision: FLOP/s of matrix products on the threads of a turn}, of CleanQ's variants.

    Only what they compute in: without instructions for bfloat16 its products take seconds.
    """
    precisions = sorted({*map(precision_of, variants)}, reverse=True)
    return run_step_profile(["--threads", args.threads, "--precisions", *precisions])


def precision_of(side):
    """Of a side of CleanQ: "CleanQ num_envs=8 precision=bfloat16" -> "bfloat16"."""
    return "bfloat16" if "precision=bfloat16" in side.split() else "float32"


def step_of(args, variant, trace=""):
    """{"flops": FLOPs of an agent step}, and with a trace, its times."""
    path, flags = cleanq_command(args, variant)
    steps = COUNTED_STEPS.get(args.task, 2_000)
    words = [path, "--begin", TASKS[args.task]["learning_starts"] + 100, "--steps", steps]
    with tempfile.TemporaryDirectory(prefix="cleanq-throughput-") as folder:
        return run_step_profile([*words, "--trace", trace, *flags], folder)


def profile_variants(args, commit):
    """Write a trace of each variant, and print the tables. --record keeps the tables."""
    args.profile.mkdir(parents=True, exist_ok=True)
    pages, profiles = [], {}
    for variant in args.variants:
        name = re.sub(r"\W+", "_", variant).strip("_") or "default"
        trace = args.profile.resolve() / f"{name}.json.gz"
        try:
            found = step_of(args, variant, trace)
        except TurnFailed as reason:
            sys.exit(f"error: CleanQ {variant}: {reason}")
        side, rates = f"CleanQ {variant}".strip(), matrix_rates(args, [variant])
        page = profile_report(side, found, rates[precision_of(side)])
        trace.with_name(f"{name}.md").write_text(page)
        print(f"{page}\nThe trace is {trace}.")
        pages.append(f"#{page}")
        profiles[side] = found | {"matrix_rates": rates}
    if args.record:
        env_id, threads = TASKS[args.task]["env_id"], args.threads
        head = [f"# Where the time of an agent step goes, {env_id}", f"Torch threads: {threads}."]
        tail = f"Task: {json.dumps(TASKS[args.task])}, epsilon {EPSILON}."
        write_record(
            args.record, {"profiles": profiles}, "\n\n".join([*head, *pages, tail]), commit
        )


def profile_report(title, found, matrix):
    """The table of a profile, in Markdown."""
    whole = found["step us"]
    rows = sorted(found["parts"].items(), key=lambda row: -row[1])
    rows.append(("the rest: Python, logs, target network", whole - sum(found["parts"].values())))
    lines = [f"# {title}", "", f"An agent step takes {whole:,.0f} us in the profiler, and has "]
    share = found["flops"] / (whole * 1e-6) / matrix
    lines[-1] += f"{found['flops'] / 1e6:,.1f} MFLOP: {share:.0%} of the matrix rate."
    for head, table in (("part of the loop", rows), ("kernel", [*found["kernels"].items()])):
        lines += ["", f"| {head} | us an agent step | share |", "|---|---:|---:|"]
        lines += [f"| {name} | {us:,.1f} | {us / whole:.0%} |" for name, us in table]
    return "\n".join(lines) + "\n"


def read_times(folder):
    """[(seconds, agent steps)] of a run's log entries, and those of the entries with a loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = next(Path(folder).glob("runs/*"), None)
    if run is None:
        raise TurnFailed("it has not written a log")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    there = events.Tags()["scalars"]
    return [
        [(event.wall_time, event.step) for event in events.Scalars(tag)] if tag in there else []
        for tag in ("charts/SPS", "losses/td_loss")
    ]


def rate_of(times, learning, warm_up, seconds):
    """Steps per second from the warm-up, which begins with the first loss, to the last log entry.

    `times`: [(seconds, agent steps)] of all log entries; `learning`: of those with a loss.
    """
    counted = [(t, step) for t, step in learning if t >= learning[0][0] + warm_up]
    if not counted or times[-1][0] - counted[0][0] < seconds / 2:
        raise TurnFailed("too little learning in the measured time; raise --seconds")
    (start, first_step), (end, last_step) = counted[0], times[-1]
    return (last_step - first_step) / (end - start)


def time_peer(args, side, folder):
    """Steps per second of one turn of a peer."""
    turn = {"task": TASKS[args.task], "atari": args.task == "atari", "threads": args.threads}
    turn |= {"warm_up": args.warm_up, "seconds": args.seconds}
    turn |= {"folders": {"CleanRL": args.cleanrl, "LeanRL": args.leanrl}}
    tool = ROOT / "benchmarks" / "throughput_peers.py"
    command = [sys.executable, "-W", "ignore", tool, side, json.dumps(turn)]
    limit = STARTUP_SECONDS + args.warm_up + 2 * args.seconds
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise TurnFailed(f"took longer than {limit:.0f} s") from None
    lines = [x for x in done.stdout.splitlines() if x.startswith('{"steps_per_second"')]
    if not lines:
        raise TurnFailed(last_line(done.stderr))
    return json.loads(lines[-1])["steps_per_second"]


# ---- all sides ---------------------------------------------------------------------------------


def check_sides(parser, args):
    """Exit if a side's name or its words are wrong, before anything is measured."""
    for name, *words in (peer.split() for peer in args.peers or ()):
        if name not in PEERS:
            parser.error(f"--peers: {name} is not one of {', '.join(PEERS)}")
        if name in CHECKOUTS and not getattr(args, name.lower()):
            parser.error(
                f"--peers {name} needs --{name.lower()} FOLDER, a checkout of {CHECKOUTS[name]}"
            )
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or "=" in value:
                parser.error(f"--peers: {word} is not NAME=VALUE")
            allowed = PEERS[name].get(key, ())
            if key not in PEERS[name] and name not in CHECKOUTS:
                parser.error(f"--peers: {name} has no {key}, only {', '.join(PEERS[name])}")
            if allowed and value not in allowed:
                parser.error(f"--peers: {word}: {' or '.join(allowed)}")
    for word in (word for variant in args.variants for word in variant.split()):
        if word.count("=") != 1:
            parser.error(f"--variants: {word} is not NAME=VALUE")
    if args.repeats < 1 or args.seconds <= 0:
        parser.error("--repeats and --seconds must be positive")


def memcpy_ms():
    """Milliseconds for a copy of 64 MiB, the best of 7."""
    (source, target), times = np.ones((2, 2**26), np.uint8), []
    for _ in range(7):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def algorithm_of(side):
    """The algorithm with which a side is compared."""
    found = re.search(r"c51|qr_?dqn|rainbow", side.lower())
    return found[0].replace("_", "") if found else "dqn"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="atari")
    parser.add_argument("--cleanrl", help="folder of a CleanRL checkout (default: no CleanRL)")
    parser.add_argument("--leanrl", help="folder of a LeanRL checkout (CartPole only)")
    parser.add_argument("--peers", nargs="*", help="default: CleanRL's and Stable-Baselines3's DQN")
    parser.add_argument("--alone", action="store_true", help="CleanQ only, no peers")
    parser.add_argument("--variants", nargs="*", help="default: num_envs=1 and num_envs=8")
    parser.add_argument("--sweep", nargs="+", help="an argument of CleanQ's, and its values")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument(
        "--warm-up", type=float, default=3.0, help="seconds of learning that are not measured"
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="seconds measured in a turn")
    parser.add_argument("--profile", type=Path, help="folder for traces; nothing is compared")
    parser.add_argument("--record", help="folder of the record")
    args = parser.parse_args()
    args.variants = args.variants or ([""] if args.sweep else ["num_envs=1", "num_envs=8"])
    check_sides(parser, args)
    if args.sweep:
        name, *values = args.sweep
        try:
            [*map(float, values)]
        except ValueError:
            parser.error("--sweep: the values must be numbers; give words as --variants")
        if len(values) < 2 or not args.alone:
            parser.error("--sweep needs an argument of CleanQ's, two values or more, and --alone")
        args.variants = [f"{v} {name}={x}".strip() for v in args.variants for x in values]
    commit = clean_commit() if args.record else ""
    if args.profile:
        return profile_variants(args, commit)
    if args.record:
        pyplot()  # exits here if it is missing, not after the measurement
    for name in map(str.lower, CHECKOUTS):
        folder = getattr(args, name)
        setattr(args, name, str(Path(folder).expanduser().resolve()) if folder else None)
    sides = [f"CleanQ {variant}".strip() for variant in args.variants]
    if not args.alone:
        if args.task == "minatar" and not args.peers:
            sys.exit("error: no peer is set up for MinAtar; give --alone.")
        sides += args.peers or ["CleanRL"] * bool(args.cleanrl) + ["Stable-Baselines3"]
    rates, drift, failed, matrix, flops = {side: [] for side in sides}, [], {}, [], {}
    on_cpu = [x for x in args.variants if "device=cuda" not in x.split()]  # others: no roofline
    for variant in on_cpu:
        side = f"CleanQ {variant}".strip()
        try:
            flops[side] = step_of(args, variant)["flops"]
        except TurnFailed as reason:
            print(f"{side}: FLOPs not counted: {reason}", flush=True)
    for repeat in range(args.repeats):
        if on_cpu:
            matrix.append(matrix_rates(args, on_cpu))
        for side in sides:
            if side in failed:
                continue
            drift.append(memcpy_ms())
            name, _, variant = side.partition(" ")
            try:
                with tempfile.TemporaryDirectory(prefix="cleanq-throughput-") as folder:
                    if name == "CleanQ":
                        rates[side].append(time_cleanq(args, variant, folder))
                    else:
                        rates[side].append(time_peer(args, side, folder))
            except TurnFailed as reason:
                failed[side] = str(reason)
                print(f"{side}: not measured: {reason}", flush=True)
            else:
                print(f"{repeat + 1}/{args.repeats} {side}: {rates[side][-1]:.0f}", flush=True)
    middle = {p: statistics.median(r[p] for r in matrix) for p in (matrix[0] if matrix else ())}
    counted = {"flops_per_step": flops, "matrix_rates": middle}
    report = report_of(args, rates, drift, failed, counted)
    print(report)
    if any(side.startswith("CleanQ") for side in failed):
        sys.exit("error: a side of CleanQ was not measured; no record is written.")
    if args.record:
        results = {"steps_per_second": rates, "memcpy_ms": drift, "failed": failed}
        results |= counted
        results |= {"task": TASKS[args.task], "cleanrl_commit": commit_of(args.cleanrl)}
        results |= {"leanrl_commit": commit_of(args.leanrl)}
        if args.sweep:
            results["sweep"] = args.sweep[0]
        write_record(args.record, results, report, commit)
        figure = draw_results(results)
        save(figure, Path(args.record) / "rates")


def rooflines_of(results):
    """Agent steps per second that the rate of matrix products allows, of each side of CleanQ."""
    flops = results.get("flops_per_step", {})
    rates = results.get("matrix_rates") or {"float32": results.get("matrix_flops")}  # older records
    return {side: rates[precision_of(side)] / count for side, count in flops.items() if count}


def draw_results(results):
    """The figure of a record, from its results."""
    rates, task = results["steps_per_second"], results["task"]
    if "sweep" in results:
        return draw_sweep(rates, task, results["sweep"])
    return draw(rates, task, rooflines_of(results))


def draw_sweep(rates, task, name):
    """The rate of each variant against the value of one argument."""
    found = {}  # variant: {value: rates}
    for side, r in rates.items():
        variant, value = re.fullmatch(rf"(.*?) ?\b{name}=(\S+)", side).groups()
        found.setdefault(variant, {})[float(value)] = r
    curves = []
    for variant, by_value in found.items():
        x = sorted(by_value)
        ys = [[of(by_value[v]) for v in x] for of in (statistics.median, min, max)]
        curves.append(Curve(variant, *map(np.array, (x, *ys))))
    label = name.replace("_", " ")
    note = "" if name == "batch_size" else f"batch {task['batch_size']}, "
    note += f"an update every {task['train_frequency']} steps; median, lowest and highest turn"
    labels = (label, "agent steps/s, higher is better")
    return draw_curves(curves, f"Speed while learning, {task['env_id']}", note, *labels, log=True)


def draw(rates, task, rooflines):
    """Median, lowest and highest rate of each side, and the roofline of the first one of CleanQ."""
    rates = {side: r for side, r in rates.items() if r}
    own = styles([not side.startswith("CleanQ") for side in rates])
    rows = [
        (side, statistics.median(r), min(r), max(r), style)
        for (side, r), style in zip(rates.items(), own)
    ]
    turns = max(map(len, rates.values()))
    note = f"batch {task['batch_size']}, an update every {task['train_frequency']} steps; "
    note += f"median, lowest and highest of {turns} turn{'s' * (turns > 1)}; grey: peers"
    title, roofline = f"Speed while learning, {task['env_id']}", None
    fastest = max(high for _, _, _, high, _ in rows)
    for side, rate in [*rooflines.items()][:1]:
        if rate < 4 * fastest:  # else the line would squeeze the rates
            roofline = rate
            note += f"; dashed: {rate:,.0f}, what the rate of matrix products allows {side}"
    axis = "agent steps/s, higher is better"
    return draw_intervals(rows, title, note, axis, reference=roofline, xlim=(0, None))


def report_of(args, rates, drift, failed, counted):
    """The record's page, in Markdown: a row for each side."""
    rooflines = rooflines_of(counted)
    medians = {side: statistics.median(r) for side, r in rates.items() if side not in failed}
    peers = {}  # the fastest peer of each algorithm
    for side, middle in medians.items():
        if not side.startswith("CleanQ"):
            peers[algorithm_of(side)] = max(middle, peers.get(algorithm_of(side), 0))
    lines = [
        f"# Throughput while learning, {TASKS[args.task]['env_id']}",
        "",
        "![agent steps per second](rates.png)",
        "",
        f"Torch threads: {args.threads}. Turns of each side: {args.repeats} of {args.seconds:g} s.",
        "",
        "| side | agent steps/s, median | lowest | highest | ratio to the fastest peer | "
        "share of the roofline |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for side, r in rates.items():
        if side in failed:
            lines.append(f"| {side} | not measured: {failed[side]} | | | | |")
            continue
        fastest = peers.get(algorithm_of(side))
        ratio = f"{medians[side] / fastest:.2f}" if fastest else ""
        share = f"{medians[side] / rooflines[side]:.0%}" if side in rooflines else ""
        cells = (side, *(f"{x:.0f}" for x in (medians[side], min(r), max(r))), ratio, share)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"64 MiB memcpy before each turn: {min(drift):.1f} to {max(drift):.1f} ms."]
    if rooflines:
        rates = " and ".join(f"{x / 1e9:.0f} in {p}" for p, x in counted["matrix_rates"].items())
        lines += [f"GFLOP/s of matrix products, median of the rounds: {rates}."]
    lines += [f"Task: {json.dumps(TASKS[args.task])}, epsilon {EPSILON}."]
    for name in CHECKOUTS:
        if commit := commit_of(getattr(args, name.lower())):
            lines += [f"{name}: commit {commit}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
