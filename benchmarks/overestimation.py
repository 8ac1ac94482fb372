"""How far does Q over-estimate? Predicted values beside the returns that came, over training.

    python benchmarks/overestimation.py --env-ids CartPole-v1 --seeds 1 2 3 --jobs 2
    python benchmarks/overestimation.py --env-ids MinAtar/Breakout-v1 MinAtar/Asterix-v1 --jobs 2 \\
        --runs ../study --record benchmarks/records/2026-01-01_overestimation

Trains DQN and Double DQN on the same seeds and compares them, after van Hasselt et al., 2016,
arXiv:1509.06461, figure 3. At every evaluation a script logs the mean of max_a Q(s, a) over the
states visited, and the mean discounted return that followed from them; the difference is the
over-estimation. Runs are those of train.py: with --runs a study that was stopped goes on, and
the runs of a study of train.py with the same --env-ids and flags are used again; with --earlier,
those of its records.

Two cases without a network stand beside it: the maximum of noisy means (dice), and Example 6.7 of
Sutton and Barto. Without --record the tool only prints the report.
"""

import argparse
import contextlib
import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
from figures import COLOURS, curve_of_runs, draw_curves, pyplot, save
from machine import ROOT, clean_commit, commit_of, option, quote, write_record
from tabular import SCRIPTS as TABLES
from tabular import measure_bias, summary_of
from train import (
    RESAMPLES,
    VALUES,
    Run,
    add_study_arguments,
    bootstrap_interval,
    check_study_arguments,
    figure_name,
    grouped,
    interquartile_mean,
    report_of_earlier,
    results_of,
    table_row,
)

NAMES = {"dqn": "DQN", "ddqn": "Double DQN"}  # others have their script's name
SIDES, REPEATS = 6, 100_000  # of a die; of the experiment with dice


def script_of(algorithm, env_id):
    """The file for this environment: on Atari another than on vectors and MinAtar."""
    kinds = ("atari", "cartpole") if "NoFrameskip" in env_id or env_id.startswith("ALE/") else ()
    for kind in kinds or ("cartpole",):
        if (ROOT / "algos" / f"{algorithm}_{kind}.py").exists():
            return f"{algorithm}_{kind}"
    return None


def dice(n_dice, n_rolls, rng):
    """The largest mean of `n_dice` equal dice, estimated from `n_rolls` of each.

    Every true mean is 3.5. The single estimator is the maximum of the means. The double estimator
    chooses the die by the first half of the rolls, and takes its mean over the second half.
    Returns the expectation of both, by simulation.
    """
    rolls = rng.integers(1, SIDES + 1, size=(REPEATS, n_dice, n_rolls))
    single = rolls.mean(axis=2).max(axis=1).mean()
    first, second = (half.mean(axis=2) for half in np.array_split(rolls, 2, axis=2))
    double = second[np.arange(REPEATS), first.argmax(axis=1)].mean()
    return float(single), float(double)


def dice_report(found):
    lines = ["## Dice", "", "The largest of the dice's means, estimated; the truth is 3.5.", ""]
    lines += [table_row(["dice", "rolls of each", "maximum of the means", "double estimator"])]
    lines += [table_row(["---:"] * 4)]
    for n_dice, n_rolls, single, double in found:
        lines.append(table_row([str(n_dice), str(n_rolls), f"{single:.2f}", f"{double:.2f}"]))
    return [
        *lines,
        "",
        "The means differ by chance alone, and the maximum picks the luckiest. The double "
        "estimator chooses a die by one half of its rolls and estimates its mean by the other "
        "half, as double Q-learning does with two tables and Double DQN with two networks.",
    ]


def table_report(fractions, runs):
    lines = ["## Example 6.7 of Sutton and Barto", ""]
    lines += [table_row(["algorithm", "most runs that go left", "in the last tenth"])]
    lines += [table_row(["---", "---:", "---:"])]
    for script, values in fractions.items():
        found = summary_of(values)
        cells = [TABLES[script], f"{found['highest']:.1%}", f"{found['last_tenth']:.1%}"]
        lines.append(table_row(cells))
    return [*lines, "", f"Left is wrong; the optimum is 5%. Mean of {runs:,} runs."]


def late(run, key):
    """The mean of a run's column over the second half of its steps."""
    half = run["steps"][-1] / 2
    return float(np.mean([x for step, x in zip(run["steps"], run[key]) if step > half]))


def late_error(run):
    """Half of the 95% interval over the episodes, of the mean over-estimation of that half."""
    half = run["steps"][-1] / 2
    errors = [x for step, x in zip(run["steps"], run["overestimation_ci95"]) if step > half]
    return float(np.linalg.norm(errors) / len(errors))


def interval(values, error=0.0):
    """ "2.31 (1.90 to 2.70)": interquartile mean and bootstrap interval over the seeds. With one
    seed, `error` to both sides of its value."""
    middle, text = interquartile_mean(values), ""
    if len(values) > 1:
        text = " ({:.3g} to {:.3g})".format(*bootstrap_interval(values))
    elif error:
        text = f" ({middle - error:.3g} to {middle + error:.3g})"
    return f"{middle:.3g}{text}"


def value_table(found):
    """The values of each environment and algorithm in the second half of training, in Markdown."""
    head = ["environment", "algorithm", "predicted", "true", "over-estimation", "return"]
    lines = [table_row(head), table_row(["---", "---", *["---:"] * 4])]
    for (env_id,), group in grouped(found, "env_id").items():
        bias, error = {}, {}
        for (name,), runs in grouped(group, "algorithm").items():
            predicted, true, returns = (
                np.array([late(run, key) for run in runs])
                for key in ("predicted", "true", "returns")
            )
            bias[name], error[name] = predicted - true, 0.0
            if len(runs) == 1:
                error[name] = late_error(runs[0])
            cells = [env_id, NAMES.get(name, name), interval(predicted), interval(true)]
            cells += [interval(bias[name], error[name]), interval(returns)]
            lines.append(table_row(cells))
        first, *others = bias
        for other in others:  # the same seeds, in the same order
            cells = [env_id, f"{NAMES.get(first, first)} - {NAMES.get(other, other)}", "", ""]
            both = np.hypot(error[first], error[other])
            lines.append(table_row([*cells, interval(bias[first] - bias[other], both), ""]))
    return lines


def network_report(found, algorithms, env_ids):
    """The page's part about networks."""
    seeds = len({run["seed"] for run in found})
    lines = [f"## {' and '.join(NAMES.get(name, name) for name in algorithms)}", ""]
    lines += [f"![values]({figure_name(env_id, env_ids)}.png)" for env_id in env_ids]
    lines += ["", *value_table(found)]
    return [
        *lines,
        "",
        f"Means over the evaluations in the second half of training; interquartile mean of {seeds} "
        + (
            f"seeds, with 95% bootstrap intervals over the seeds ({RESAMPLES:,} resamples). The "
            "last row of an environment is the difference of the over-estimations, seed by seed: "
            "where its interval contains 0, the seeds show no effect of Double DQN."
            if seeds > 1
            else "seed. The intervals of the over-estimation are over the evaluated episodes: they "
            "do not show how seeds differ."
        ),
        "",
        "Predicted is max_a Q(s, a), true the discounted sum of the rewards that followed, with "
        "the rewards and the terminal states of training (on Atari clipped, and a lost life ends "
        "the sum). Both are means over an episode's states, then over the evaluation's episodes. "
        "Where a time limit cut an episode, max_a Q of its last state stands for the rest of the "
        "sum: there the over-estimation is understated. An evaluation acts with its own epsilon.",
    ]


def draw(runs, algorithms):
    """Predicted values as lines and true values as dashed lines, over training. One environment.

    Returns the matplotlib figure.
    """
    curves, env_id = [], runs[0]["env_id"]
    for name, colour in zip(algorithms, COLOURS):
        group = [run for run in runs if run["algorithm"] == name]
        for key, line in (("predicted", "-"), ("true", "--")):
            series = [(run["steps"], run[key]) for run in group]
            style = {"color": colour, "linestyle": line, "zorder": 3}
            label = f"{NAMES.get(name, name)}, {key}"
            shown = curve_of_runs(label, series, interquartile_mean, bootstrap_interval)
            curves.append(shown._replace(style=style))
    seeds = len(runs) // len(algorithms)
    note = f"{seeds} seeds: interquartile mean, 95% bootstrap interval" if seeds > 1 else "1 seed"
    note += "; true: the discounted return that came"
    unit = "agent steps (4 frames each)" if runs[0]["script"].endswith("_atari") else "agent steps"
    title = f"{env_id}: values that Q predicts, and true ones"
    return draw_curves(curves, title, note, unit, "mean value of the states visited")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env-ids", nargs="+", default=["CartPole-v1"])
    parser.add_argument("--algorithms", nargs="+", default=["dqn", "ddqn"], help="names of files")
    parser.add_argument("--bias-runs", type=int, default=1_000, help="runs of Example 6.7")
    add_study_arguments(parser)
    args = parser.parse_args()
    check_study_arguments(parser, args, "env_ids", "algorithms", "seeds")
    for env_id in args.env_ids:
        for algorithm in args.algorithms:
            if script_of(algorithm, env_id) is None:
                parser.error(f"--algorithms {algorithm}: algos/ has no file of it for {env_id}")
    if args.bias_runs < 1:
        parser.error("--bias-runs must be 1 or more")
    return args


def main():
    args = parse_args()
    if args.record:
        pyplot()  # exits here if it is missing, not after the runs
    commit = clean_commit() if args.record else commit_of(str(ROOT))
    plan = [
        (name, Run(script_of(name, env_id), env_id, seed))
        for env_id in args.env_ids
        for name in args.algorithms
        for seed in args.seeds
    ]
    with contextlib.ExitStack() as stack:
        folder = args.runs
        if not folder:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cleanq-values-")))
        found, _, machines = results_of([run for _, run in plan], args, commit, folder)
    found = [{"algorithm": name, **run} for (name, _), run in zip(plan, found)]
    for run in found:
        if not run.keys() >= VALUES.keys():
            sys.exit(f"error: {run['script']}.py logs no values; give files with a network.")
    rng = np.random.default_rng(1)
    by_dice = [(n, rolls, *dice(n, rolls, rng)) for n in (2, 6, 18) for rolls in (2, 10, 100)]
    fractions = measure_bias(args.bias_runs, 300, args.jobs)
    lines = ["# Over-estimation", "", *network_report(found, args.algorithms, args.env_ids), ""]
    lines += [*dice_report(by_dice), "", *table_report(fractions, args.bias_runs)]
    commands = ["", "Each run:", "", "```bash"]
    flags = ["--env-id", "ENV", *args.flags]
    commands += [quote(["python", "algos/SCRIPT.py", *flags]) + " --seed SEED", "```"]
    report = "\n".join([*lines, *commands]) + report_of_earlier(found, machines)
    print(report)
    if not args.record:
        return
    figures = {
        figure_name(env_id, args.env_ids): draw(runs, args.algorithms)
        for (env_id,), runs in grouped(found, "env_id").items()
    }
    results = {"runs": found, "dice": by_dice, "bias_runs": args.bias_runs}
    results |= {"left": fractions, "flags": [*map(option, args.flags)]}
    results["earlier_machines"] = machines
    write_record(args.record, results, report, commit)
    with open(args.record / "values.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        keys = ("script", "env_id", "seed")
        columns = ("steps", "returns", "predicted", "true", "overestimation_ci95")
        writer.writerow([*keys, "step", "episodic_return", *columns[2:]])
        for run in found:
            rows = zip(*(run[column] for column in columns))
            writer.writerows((*(run[key] for key in keys), *row) for row in rows)
    for name, figure in figures.items():
        save(figure, args.record / name)


if __name__ == "__main__":
    main()
