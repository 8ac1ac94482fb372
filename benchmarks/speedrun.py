"""Speed runs: the seconds from the start of a process until it has solved its environment.

    python benchmarks/speedrun.py --script dqn_cartpole --record ../first
    python benchmarks/speedrun.py --script dqn_cartpole --against ../first \\
        --change "16 environments" --record ../second -- --num-envs 16

The rules:
1. One file of algos/, as it is in a commit, started by its command line: one process, from its
   start to its end, imports included. Flags after `--` go to the file.
2. The goal is a mean of the last 100 training episodes (--stop-return): 475 on CartPole-v1, -90 on
   Acrobot-v1, 10 on MinAtar/Breakout-v1, 18 on PongNoFrameskip-v4 and 366.9 on
   BreakoutNoFrameskip-v4, there of whole games and unclipped. Nothing is evaluated.
3. At least three seeds, all reported. One that does not get there counts as never, in the median,
   too. The runs follow one another, on a machine that does nothing else.
4. The record keeps the file, each run's output, the hardware and the versions.
5. With --against it says what has changed since another record, and what that gained. A change that
   makes a file harder to read than its gain is worth is not made, and benchmarks/README.md says so.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import ROOT, clean_commit, quote, write_record
from train import SOLVED, lines_of, table_row

GOALS = {
    "CartPole-v1": 475,
    "Acrobot-v1": -90,
    "MinAtar/Breakout-v1": 10,
    "PongNoFrameskip-v4": 18,
    "BreakoutNoFrameskip-v4": 366.9,
}


def run(command, place):
    """Run a script in a folder. -> its seconds, episodes and steps; steps None: not solved"""
    begin = time.perf_counter()
    with open(place / "log.txt", "w") as log:
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        status = subprocess.run(command, cwd=place, env=environment, **options).returncode
    seconds = time.perf_counter() - begin
    lines = lines_of(place)
    if status != 0:
        sys.exit(f"error: a run ended with status {status}: {(lines or ['no output'])[-1]}")
    solved = [match for line in lines if (match := SOLVED.search(line))]
    episodes, steps = (int(n) for n in solved[-1].groups()[1:3]) if solved else (None, None)
    return {"seconds": seconds, "episodes": episodes, "steps": steps}


def median_seconds(runs):
    """Of all runs; infinite if half of them or more never got there."""
    return float(np.median([run["seconds"] if run["steps"] else math.inf for run in runs]))


def words(seconds):
    return "never" if math.isinf(seconds) else f"{seconds:.1f} s"


def report_of(results):
    runs, env_id = results["runs"], results["env_id"]
    n, solved = len(runs), [run for run in runs if run["steps"]]
    lines = [f"# Speed run: {results['script']}.py on {env_id} to {results['goal']:g}", ""]
    lines += [f"Median of {n} seeds, from the start of the process to its end: "]
    lines[-1] += f"**{words(median_seconds(runs))}**. {len(solved)} of {n} seeds got there."
    lines += ["", table_row(["seed", "seconds", "steps", "episodes"])]
    lines += [table_row(["---", "---:", "---:", "---:"])]
    for run in runs:
        cells = [f"{run['seed']}", f"{run['seconds']:.1f}"]
        cells += [f"{run['steps']:,}", f"{run['episodes']:,}"] if run["steps"] else ["never", ""]
        lines.append(table_row(cells))
    before = results["against"]
    if before:
        lines += ["", f"Against {before['record']}: {words(before['median'])} before, "]
        lines[-1] += f"{words(median_seconds(runs))} now"
        ratio = before["median"] / median_seconds(runs)
        lines[-1] += f", {ratio:.2f} times as fast." if math.isfinite(ratio) and ratio else "."
        lines += ["", f"What has changed: {results['change']}"]
    lines += ["", "Each run:", "", "```bash", f"{results['command']} --seed SEED", "```", ""]
    lines += [f"The file is in this folder ({results['script']}.py.txt), and so are the logs."]
    return "\n".join(lines)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", required=True, help="a file in algos/, without .py")
    parser.add_argument("--env-id", help=f"one of {', '.join(GOALS)} (default: the script's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--against", type=Path, help="record of the speed run before")
    parser.add_argument("--change", default="", help="what has changed since then")
    parser.add_argument("--record", type=Path, help="folder of the record")
    parser.add_argument("flags", nargs="*", help="after --: flags of the script")
    args = parser.parse_args()
    if not (ROOT / "algos" / f"{args.script}.py").exists():
        parser.error(f"--script {args.script}: there is no algos/{args.script}.py")
    default = "Acrobot-v1" if args.script.endswith("acrobot") else "CartPole-v1"
    args.env_id = args.env_id or ("" if args.script.endswith("_atari") else default)
    if args.env_id not in GOALS:
        parser.error(f"--env-id must be one of {', '.join(GOALS)}")
    if len({*args.seeds}) < max(3, len(args.seeds)):
        parser.error("--seeds: at least three, and all different")
    if bool(args.against) != bool(args.change):
        parser.error("--against and --change belong together")
    for flag in args.flags:
        name = flag.split("=")[0].replace("_", "-")
        if name in ("--seed", "--env-id", "--stop-return", "--eval-episodes", "--eval-frequency"):
            parser.error(f"{name} after --: the rules set it")
    return args


def main():
    args = parse_args()
    commit = clean_commit() if args.record else None
    results = {"script": args.script, "env_id": args.env_id, "goal": GOALS[args.env_id]}
    results |= {"change": args.change, "against": None, "runs": []}
    if args.against:
        try:
            before = json.loads((args.against / "results.json").read_text())
        except (OSError, ValueError) as e:
            sys.exit(f"error: --against {args.against}: no record ({e}).")
        if before.get("env_id") != args.env_id:
            sys.exit(f"error: {args.against} is a record of {before.get('env_id')}.")
        median = median_seconds(before["runs"])
        results["against"] = {"record": args.against.name, "median": median}
    fixed = ["--env-id", args.env_id, "--stop-return", f"{results['goal']:g}"]
    fixed += ["--eval-frequency", "0", "--eval-episodes", "0", *args.flags]
    results["command"] = quote(["python", f"algos/{args.script}.py", *fixed])
    with tempfile.TemporaryDirectory(prefix="cleanq-speedrun-") as folder:
        for seed in args.seeds:
            place = Path(folder, str(seed))
            place.mkdir()
            script = ROOT / "algos" / f"{args.script}.py"
            command = [sys.executable, os.fspath(script), *fixed, "--seed", str(seed)]
            results["runs"].append({"seed": seed} | run(command, place))
            last = results["runs"][-1]
            print(
                f"seed {seed}: {last['seconds']:.1f} s, {last['steps'] or 'not solved'}", flush=True
            )
        report = report_of(results)
        print(report)
        if args.record:
            write_record(args.record, results, report, commit)
            shutil.copy(script, args.record / f"{script.name}.txt")
            for seed in args.seeds:
                log = "\n".join(x for x in lines_of(Path(folder, str(seed))) if "step/s" not in x)
                (args.record / f"seed_{seed}.txt").write_text(log + "\n")


if __name__ == "__main__":
    main()
