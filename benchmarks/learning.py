"""Learning curve of one script over several seeds, with the spread between the seeds.

    python benchmarks/learning.py --script dqn_cartpole --goal 475 --jobs 2 \\
        --record benchmarks/records/2026-01-01_dqn_cartpole
    python benchmarks/learning.py --script dqn_cartpole --env-id Acrobot-v1 --goal -90 \\
        -- --learning-rate 5e-4

Every seed is a separate run, `python algos/SCRIPT.py ... --seed SEED`, in a temporary folder. Flags
after `--` go to the script. Without --record the tool only prints the report. With it, the record's
folder contains README.md (report, command, commit, versions, machine), curve.png, evaluations.csv
(every evaluation of every seed) and results.json.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import repeat
from pathlib import Path

import numpy as np
from figures import OWN, TEXT, label_ends, pyplot
from machine import ROOT, clean_commit, quote, write_record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESAMPLES = 10_000
# The line that a script prints after an evaluation.
EVALUATED = re.compile(r"(\S+), step ([\d,]+), evaluated: (\S+) \+- (\S+) in (\d+) ")


def interquartile_mean(values, axis=0):
    """Mean without the lowest and the highest quarter; of n values, floor(n / 4) on each side."""
    values = np.sort(values, axis=axis)
    n = values.shape[axis]
    return values.take(range(n // 4, n - n // 4), axis=axis).mean(axis=axis)


def bootstrap_interval(values, resamples=RESAMPLES):
    """95% percentile bootstrap of the interquartile mean over seeds.

    `values`: (seeds, ...). Returns (low, high), each of shape (...). Whole seeds are drawn, so one
    resample is a set of curves. All seeds use the same environment, the only stratum.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    seeds = np.random.default_rng(0).integers(n, size=(n, resamples))
    columns = values.reshape(n, -1).T
    means = [interquartile_mean(column[seeds]) for column in columns]  # each (resamples,)
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def run_seeds(command, seeds, folder, jobs):
    """Run `command --seed SEED` for all seeds, `jobs` at a time, each in `folder`/SEED.

    Returns {seed: seconds}. Exits with a run's last lines if it fails, and stops the others.
    """
    waiting, running, seconds = list(seeds), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                seed = waiting.pop(0)
                place = folder / str(seed)
                place.mkdir()
                with open(place / "log.txt", "w") as log:
                    process = subprocess.Popen(
                        [*command, "--seed", str(seed)],
                        cwd=place,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                running[seed] = process, time.monotonic()
            time.sleep(0.1)
            for seed, (process, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[seed]
                if process.returncode != 0:
                    tail = "\n".join(lines_of(folder / str(seed))[-15:])
                    sys.exit(f"{tail}\nerror: seed {seed} ended with status {process.returncode}.")
                seconds[seed] = time.monotonic() - start
                minutes = f"{seconds[seed] / 60:.1f} min"
                print(f"seed {seed}: {minutes} ({len(seconds)} of {len(seeds)})", flush=True)
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()
    return seconds


def lines_of(place):
    """A run's output, line by line; each redraw of a progress bar is a line, too."""
    text = (place / "log.txt").read_text(errors="replace")
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def read_run(place, seed):
    """The evaluations of a finished run.

    Returns a dict: env_id; steps and returns, one for each evaluation; final_return, final_std and
    episodes of the last one; the script's arguments as text.
    """
    found = [match for line in lines_of(place) if (match := EVALUATED.search(line))]
    folders = list((place / "runs").glob("*"))
    if not found or len(folders) != 1:
        sys.exit(f"error: seed {seed} ended without a final evaluation under runs/.")
    env_id, step, _, std, episodes = found[-1].groups()
    events = EventAccumulator(str(folders[0]), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    evaluations = []
    if "eval/episodic_return" in events.Tags()["scalars"]:
        evaluations = [(e.step, e.value) for e in events.Scalars("eval/episodic_return")]
    if not evaluations or evaluations[-1][0] != int(step.replace(",", "")):
        sys.exit(f"error: seed {seed}: TensorBoard has no final evaluation, at step {step}.")
    arguments = {}
    if "hyperparameters/text_summary" in events.Tags()["tensors"]:
        text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0]
        rows = [line.strip("|").split("|", 1) for line in text.decode().splitlines()[2:]]
        arguments = {row[0]: row[1] for row in rows if len(row) == 2}
    steps, returns = zip(*evaluations)
    return {
        "seed": seed,
        "env_id": env_id,
        "steps": steps,
        "returns": [round(value, 4) for value in returns],
        "final_return": round(returns[-1], 4),
        "final_std": float(std),
        "episodes": int(episodes),
        "arguments": arguments,
    }


def goal_of(run, goal):
    """Whether the final evaluation reaches `goal`, the step of the first one that does, or None,
    and the lowest return from there on."""
    steps = [step for step, value in zip(run["steps"], run["returns"]) if value >= goal]
    first = steps[0] if steps else None
    later = [value for step, value in zip(run["steps"], run["returns"]) if steps and step >= first]
    return {
        "reaches_goal": run["final_return"] >= goal,
        "first_step_at_goal": first,
        "lowest_return_after": min(later, default=None),
    }


def common_curve(runs):
    """Steps at which all seeds were evaluated, (T,), and their returns there, (seeds, T)."""
    steps = sorted(set.intersection(*(set(run["steps"]) for run in runs)))
    if not steps:
        sys.exit("error: the seeds have no evaluation step in common; set --eval-frequency.")
    curves = [dict(zip(run["steps"], run["returns"])) for run in runs]
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])


def report_of(script, command, runs, goal):
    """The record's page, in Markdown."""
    final = np.array([run["final_return"] for run in runs])
    low, high = bootstrap_interval(final)
    seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
    lines = [f"# {script} on {runs[0]['env_id']}", ""]
    if goal is not None:
        reach = sum(run["reaches_goal"] for run in runs)
        lines += [f"{reach} of {seeds} reach the goal of {goal:g} in the final evaluation.", ""]
    lines += [
        f"Final evaluations: interquartile mean {interquartile_mean(final):.1f} "
        f"(95% interval {low:.1f} to {high:.1f}), lowest {final.min():.1f}, highest "
        f"{final.max():.1f}, standard deviation over the seeds "
        f"{f'{final.std(ddof=1):.1f}' if len(runs) > 1 else 'unknown'}.",
        "",
        "![learning curve](curve.png)",
        "",
    ]
    head = "| seed | agent steps | final evaluation, mean +- standard deviation |"
    if goal is not None:
        head += f" first evaluation at {goal:g} or more | lowest evaluation from then on |"
    lines += [head + " minutes |", "|---|" + "---:|" * (head.count("|") - 1)]
    for run in runs:
        cells = [str(run["seed"]), f"{run['steps'][-1]:,}"]
        cells += [f"{run['final_return']:.1f} +- {run['final_std']:.1f}"]
        if goal is not None:
            first, lowest = run["first_step_at_goal"], run["lowest_return_after"]
            cells += ["never", ""] if first is None else [f"step {first:,}", f"{lowest:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{run['seconds'] / 60:.1f}"]) + " |")
    epsilon = runs[0]["arguments"].get("eval_e")
    lines += [
        "",
        f"An evaluation is the mean return of {runs[0]['episodes']} whole episodes"
        + (f" with epsilon {epsilon}" if epsilon is not None else "")
        + f", unclipped. The curve is the interquartile mean of {seeds} with a 95% percentile "
        f"bootstrap interval over the seeds ({RESAMPLES:,} resamples, one environment, so one "
        "stratum). evaluations.csv contains every evaluation.",
        "",
        "Each run:",
        "",
        "```bash",
        f"{command} --seed SEED",
        "```",
    ]
    return "\n".join(lines)


def draw(script, runs, goal):
    """One line, the interquartile mean, with its interval; the seeds are thin lines behind it.

    Returns the matplotlib figure.
    """
    plt = pyplot()
    steps, returns = common_curve(runs)
    middle, (low, high) = interquartile_mean(returns), bootstrap_interval(returns)
    figure, axes = plt.subplots(figsize=(6.4, 4), dpi=150)
    axes.plot(steps, returns.T, color=OWN, alpha=0.25, linewidth=0.8)
    axes.fill_between(steps, low, high, color=OWN, alpha=0.18, linewidth=0)
    axes.plot(steps, middle, color=OWN, linewidth=2.2, marker="o" if len(steps) == 1 else None)
    seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
    text = f"{middle[-1]:.1f}: interquartile mean\nof {seeds}, 95% interval\n(thin: each seed)"
    labels = [(middle[-1], text, OWN)]
    if goal is not None:
        axes.axhline(goal, color=TEXT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        labels.append((goal, f"goal: {goal:g}", TEXT))
    unit = "agent steps (4 frames each)" if script.endswith("_atari") else "environment steps"
    axes.set_xlabel(unit)
    axes.set_ylabel(f"return, mean of {runs[0]['episodes']} evaluation episodes")
    axes.set_title(f"{script} on {runs[0]['env_id']}", loc="left")
    axes.xaxis.set_major_formatter(plt.FuncFormatter(lambda x, _: thousands(x)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_xlim(0, steps[-1])
    label_ends(axes, labels)
    return figure


def thousands(x):
    """1500 -> "1.5k", 2000000 -> "2M" """
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{letter}"
    return f"{x:g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", required=True, help="name of a file in algos/, without .py")
    parser.add_argument("--env-id", help="environment (default: the script's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--goal", type=float, help="return that the final evaluation should reach")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--record", type=Path, help="folder of the record")
    parser.add_argument("flags", nargs="*", help="after --: flags of the script")
    args = parser.parse_args()
    path = ROOT / "algos" / f"{args.script}.py"
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.py")))
        parser.error(f"--script {args.script}: no such file in algos/; there are: {there}")
    if len(set(args.seeds)) < len(args.seeds) or args.jobs < 1:
        parser.error("--seeds must differ, and --jobs must be 1 or more")
    if any(flag.split("=")[0] == "--seed" for flag in args.flags):
        parser.error("--seed: the tool gives it; name the seeds with --seeds")
    if args.record:
        commit = clean_commit()
        try:
            pyplot()
        except ImportError:
            sys.exit("error: --record draws a figure; run `pip install matplotlib` first.")

    flags = ["--env-id", args.env_id] if args.env_id else []
    flags += args.flags
    with tempfile.TemporaryDirectory(prefix="cleanq-learning-") as folder:
        command = [sys.executable, os.fspath(path), *flags]
        seconds = run_seeds(command, args.seeds, Path(folder), args.jobs)
        runs = [read_run(Path(folder) / str(seed), seed) for seed in args.seeds]
    for run in runs:
        run["seconds"] = round(seconds[run["seed"]], 1)
        run |= {} if args.goal is None else goal_of(run, args.goal)
    command = quote(["python", f"algos/{path.name}", *flags])
    report = report_of(args.script, command, runs, args.goal)
    print(report)
    if not args.record:
        return
    figure = draw(args.script, runs, args.goal)
    results = {"script": args.script, "command": command, "goal": args.goal, "jobs": args.jobs}
    write_record(args.record, results | {"runs": runs}, report, commit)
    with open(args.record / "evaluations.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "step", "episodic_return"])
        for run in runs:
            writer.writerows(zip(repeat(run["seed"]), run["steps"], run["returns"]))
    figure.savefig(args.record / "curve.png", bbox_inches="tight")


if __name__ == "__main__":
    main()
