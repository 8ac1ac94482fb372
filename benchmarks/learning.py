"""Learning curves: train one script on several seeds, or take runs that are there, and record them.

    python benchmarks/learning.py --script dqn_cartpole --seeds 1 2 3 4 5 --record FOLDER
    python benchmarks/learning.py --runs runs/PongNoFrameskip-v4__* --goal 18 --record FOLDER

What stands behind `--` goes to the script. The record holds, for every run, the evaluations, the
mean return of the last 100 training episodes, the hours, and the arguments; a table; a figure.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
from machine import write_record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ALGOS = Path(__file__).resolve().parent.parent / "algos"


def train(script, seed, folder, options):
    """One run in `folder`; -> the run's own folder"""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ALGOS / f"{script}.py"), "--seed", str(seed), *options]
    with open(folder / "log.txt", "w") as log:
        subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=True)
    return next((folder / "runs").glob(f"*__{seed}__*"))


def read(run):
    """The run's scalars as {tag: [(step, value)]}, and its arguments as text: those that it started
    with, and those of the last time that it was resumed."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]}
    texts = [e.tensor_proto.string_val[0] for e in events.Tensors("hyperparameters/text_summary")]
    tables = [
        dict(line.strip("|").split("|") for line in text.decode().splitlines()[2:])
        for text in texts
    ]
    return scalars, tables[0], tables[-1]


def last_hundred(scalars):
    """[(step, mean return of the last 100 training episodes)]"""
    if "charts/mean_return_100" in scalars:
        return scalars["charts/mean_return_100"]
    steps, returns = np.array(scalars["charts/episodic_return"]).T  # or each episode
    sums = np.cumsum(np.concatenate([[0.0], returns]))
    return [(int(steps[i]), (sums[i + 1] - sums[i - 99]) / 100) for i in range(99, len(returns))]


def at(series, step):
    """The last value up to a step."""
    return next((value for s, value in reversed(series) if s <= step), float("nan"))


def summarise(run, goal):
    scalars, arguments, last_arguments = read(run)
    evaluations, training = scalars.get("eval/episodic_return", []), last_hundred(scalars)
    hours = scalars["charts/hours"]
    summary = {
        "env_id": arguments["env_id"],
        "script": arguments["exp_name"],
        "seed": int(arguments["seed"]),
        "steps": hours[-1][0],
        "total_timesteps": int(last_arguments["total_timesteps"]),
        "hours": hours[-1][1],
        "last_evaluation": evaluations[-1][1] if evaluations else None,
        "mean_return_of_last_100_episodes": training[-1][1] if training else None,
        "arguments": arguments,
    }
    if goal is not None:
        for name, series in (("evaluation", evaluations), ("training", training)):
            step = next((s for s, value in series if value >= goal), None)
            summary[f"steps_to_goal_{name}"] = step
            summary[f"hours_to_goal_{name}"] = None if step is None else at(hours, step)
    return summary, evaluations, training, hours


def show(x, digits=1):
    return "-" if x is None else f"{x:.{digits}f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--script", help="name of a file in algos/, without .py")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, nargs="*", help="folders of runs that are there")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where training writes")
    parser.add_argument("--goal", type=float, help="return whose first crossing is reported")
    parser.add_argument("--note", default="", help="a sentence for the record")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("options", nargs="*", help="after --: arguments of the script")
    args = parser.parse_args()
    runs = args.runs or []
    if args.script:
        for seed in args.seeds:
            folder = args.work / f"{args.script}_{args.record.name}_{seed}"
            runs.append(train(args.script, seed, folder, args.options))
            print(f"seed {seed}: {runs[-1]}", flush=True)
    args.record.mkdir(parents=True, exist_ok=True)
    summaries, curves = [], []
    for run in runs:
        summary, evaluations, training, hours = summarise(run, args.goal)
        summaries.append(summary)
        curves.append((summary, evaluations, training))
        with open(args.record / f"{summary['script']}_seed{summary['seed']}.csv", "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["series", "step", "hours", "return"])
            thin = training[:: max(1, len(training) // 500)]
            for name, series in (("evaluation", evaluations), ("training, last 100", thin)):
                for step, value in series:
                    writer.writerow([name, step, f"{at(hours, step):.4f}", f"{value:.3f}"])
    first = summaries[0]
    table = [f"# {first['script']} on {first['env_id']}", ""]
    table += [args.note, ""] if args.note else []
    head = "| seed | steps of | hours | last evaluation | last 100 training episodes |"
    rule = "|---|---:|---:|---:|---:|"
    if args.goal is not None:
        head += f" evaluation reaches {args.goal:g} | training reaches {args.goal:g} |"
        rule += "---:|---:|"
    table += [head, rule]
    for s in summaries:
        row = f"| {s['seed']} | {s['steps']:,} of {s['total_timesteps']:,} | {s['hours']:.2f} "
        row += f"| {show(s['last_evaluation'])} | {show(s['mean_return_of_last_100_episodes'])} |"
        for name in ("evaluation", "training") if args.goal is not None else ():
            step, hour = s[f"steps_to_goal_{name}"], s[f"hours_to_goal_{name}"]
            row += " not yet |" if step is None else f" {step:,} steps, {hour:.2f} h |"
        table.append(row)
    command = f"python algos/{first['script']}.py"
    defaults_differ = {k: v for k, v in first["arguments"].items() if k in changed(first)}
    for key, value in defaults_differ.items():
        flag = key.replace("_", "-")
        switches = {"True": f" --{flag}", "False": f" --no-{flag}"}
        command += switches.get(value, f" --{flag} {value}")
    table += ["", f"Each run: `{command} --seed SEED`"]
    print("\n".join(table))
    write_record(args.record, {"runs": summaries}, "\n".join(table))
    draw(curves, args.record / "curves.png")


def changed(summary):
    """The arguments that were not the script's defaults."""
    sys.path.insert(0, str(ALGOS))
    defaults = __import__(summary["script"]).Args(exp_name=summary["script"])
    own = {k: str(v) for k, v in vars(defaults).items()}
    skip = ("seed", "resume", "evaluate", "exp_name")
    return [k for k, v in summary["arguments"].items() if own.get(k) != v and k not in skip]


def draw(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for number, (summary, evaluations, training) in enumerate(curves):
        colour = f"C{number}"
        if training:
            axes.plot(*zip(*training), color=colour, alpha=0.4, linewidth=1)
        if evaluations:
            axes.plot(*zip(*evaluations), color=colour, marker=".", label=f"seed {summary['seed']}")
    axes.set_xlabel("agent steps")
    axes.set_ylabel("return (dots: evaluation; thin: last 100 training episodes)")
    axes.set_title(f"{summary['script']}, {summary['env_id']}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
