"""The report, the figure and the tables of tune.py."""

import csv

import numpy as np
import optuna
from figures import OWN, PEER, TEXT, pyplot, thousands
from machine import quote
from optuna.distributions import CategoricalDistribution
from train import RESAMPLES, bootstrap_interval, table_row
from tune_objective import AGGREGATE_NAMES, AGGREGATES, OBJECTIVES, PENALTY
from tune_runs import evaluations_of
from tune_space import describe_range, text_of

FIGURE = "search"


def spaced(items):
    return " ".join(map(str, items))


def command_of(args, flags):
    env = ["--env-id", args.env_id] if args.env_id else []
    return quote(["python", f"algos/{args.script}.py", *env, *args.flags, *flags])


def report_of(args, env_id, space, arguments, objective, found):
    """The report, in Markdown. `found`: what tune.py's `find` returns."""
    command = command_of(args, found["best"]["flags"])
    lines = [f"# Search over {args.script} on {env_id}", "", *headline(objective, found)]
    lines += ["", "The best command line:", "", "```bash", command, "```", ""]
    if found["held_out"]:
        lines += [*held_out_table(objective, found), ""]
    lines += [f"![search]({FIGURE}.png)", "", *trials_table(args, space, objective, found), ""]
    lines += [table_row(["argument", "default", "searched"]), table_row(["---"] * 3)]
    for name, distribution in space.items():
        cells = [name, text_of(arguments[name].default), describe_range(distribution)]
        lines.append(table_row(cells))
    return "\n".join([*lines, "", method(args, objective, found)])


def headline(objective, found):
    if not found["held_out"]:
        return ["The script's defaults are the best trial: nothing better was found."]
    text, sides = objective.text, found["held_out"]
    best, defaults = (objective.combine(sides[key]["values"]) for key in ("best", "defaults"))
    better, low, high = found["improvement"]
    unit, share = "", ""
    if objective.goal is not None:
        unit, share = f" {objective.name}", f", {better / defaults:.0%} of the defaults'"
    lines = [
        f"On {len(sides['best']['values'])} held-out seeds the best trial has {text(best)} and the "
        f"defaults {text(defaults)}, {objective.describe()}: an improvement of "
        f"{text(better)}{unit} (95% interval {text(low)} to {text(high)}){share}."
    ]
    if low <= 0 <= high:
        lines += ["", "The interval contains 0: no difference to the defaults is shown."]
    errors = [error for side in sides.values() for error in side["errors"] if error]
    if errors:
        lines += ["", f"{len(errors)} of the held-out runs gave up: {errors[0]}"]
    return lines


def held_out_table(objective, found):
    statistic, text = AGGREGATES[objective.aggregate], objective.text
    head = ["held-out seeds", f"{AGGREGATE_NAMES[objective.aggregate]} (95% interval)"]
    head += ["lowest to highest"]
    head += [] if objective.goal is None else [f"reach {objective.goal:g}"]
    head += ["final evaluations", "on the search's seeds"]
    lines = [table_row(head), table_row(["---", *["---:"] * (len(head) - 1)])]
    for key, side in found["held_out"].items():
        values = side["values"]
        low, high = bootstrap_interval(values, statistic=statistic)
        cells = [f"trial {found['best']['trial']}" if key == "best" else key]
        cells += [f"{text(objective.combine(values))} ({text(low)} to {text(high)})"]
        cells += [f"{text(min(values))} to {text(max(values))}"]
        if objective.goal is not None:
            cells += [f"{sum(map(bool, side['reached']))} of {len(values)}"]
        final = [value for value in side["final"] if value is not None]
        cells += [f"{min(final):.1f} to {max(final):.1f}" if final else "none"]
        same = [trial["value"] for trial in found["trials"] if trial["flags"] == side["flags"]]
        measured = [value for value in same if value is not None]
        cells += [text(measured[0]) if measured else "pruned" if same else "not in the search"]
        lines.append(table_row(cells))
    return lines


def trials_table(args, space, objective, found):
    """The ten best trials."""
    trials, finalists = found["trials"], found["finalists"]
    complete = [trial for trial in trials if trial["value"] is not None]
    complete.sort(key=lambda trial: -objective.sign * trial["value"])
    name = AGGREGATE_NAMES[args.aggregate]
    head = ["trial", f"{objective.describe()}, {name} of {len(args.seeds)} seeds"]
    head += ["with the finalists' seeds"] * bool(finalists)
    lines = [table_row([*head, *space]), table_row(["---:"] * (len(head) + len(space)))]
    for trial in complete[:10]:
        cells = [str(trial["trial"]), objective.text(trial["value"])]
        if finalists:
            value = finalists.get(trial["trial"])
            cells += ["" if value is None else objective.text(value)]
        lines += [table_row([*cells, *(text_of(trial["params"][name]) for name in space)])]
    states = [trial["state"] for trial in trials]
    counts = [f"{states.count(x)} {x}" for x in ("complete", "pruned", "gave up") if x in states]
    lines += ["", f"{len(trials)} trials: {', '.join(counts)}. The table has the best ten; "]
    lines[-1] += "trials.csv, runs.csv and evaluations.csv contain all."
    return lines


def method(args, objective, found):
    pruner = args.pruner
    if pruner != "none":
        pruner += f", from {args.prune_after} evaluations on"
    text = (
        f"Optuna {optuna.__version__}; sampler: {args.sampler}, seed {args.sampler_seed}; pruner: "
        f"{pruner}. Seeds of the search: {spaced(args.seeds)}; "
    )
    if found["finalists"]:
        text += f"of the {len(found['finalists'])} finalists: {spaced(args.finalist_seeds)}; "
    runs = "1 run" if args.jobs == 1 else f"{args.jobs} runs"
    text += f"held out: {spaced(args.held_out_seeds)}. {runs} at a time."
    if objective.goal is not None:
        text += f" A run that never reaches the goal counts {PENALTY} times its length."
    if objective.by_evaluation:
        text += " Runs of the search end at the goal, held-out runs do not."
    return f"{text} Intervals: percentile bootstrap over the seeds, {RESAMPLES:,} resamples."


def draw(space, objective, found, title):
    """The trials' values in order, the held-out seeds, and the values along each argument."""
    plt = pyplot()
    names = [*space]
    rows = -(-len(names) // 4)
    figure = plt.figure(figsize=(11, 3.6 + 2.4 * rows), dpi=150, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.4, 2.4 * rows])
    history, held_out = top.subplots(1, 2, width_ratios=[2, 1])
    draw_history(history, objective, found["trials"])
    draw_held_out(held_out, objective, found)
    axes = bottom.subplots(rows, 4, squeeze=False, sharey=True).flatten()
    complete = [trial for trial in found["trials"] if trial["value"] is not None]
    values = [trial["value"] for trial in complete]
    for ax, name in zip(axes, names):
        points = [trial["params"][name] for trial in complete]
        if isinstance(space[name], CategoricalDistribution):
            choices = [text_of(choice) for choice in space[name].choices]
            points = [choices.index(text_of(point)) for point in points]
            ax.set_xticks(range(len(choices)), choices)
            ax.set_xlim(-0.5, len(choices) - 0.5)
        else:
            ends = space[name].low, space[name].high
            ax.set_xscale("log" if space[name].log else "linear")
            ax.set_xticks(ends, [text_of(end) for end in ends])
            ax.minorticks_off()
            ax.plot(ends, [values[0]] * 2, alpha=0)  # both ends are in view
        ax.scatter(points, values, s=16, color=PEER)
        chosen = [i for i, trial in enumerate(complete) if trial == found["best"]]
        ax.scatter([points[i] for i in chosen], [values[i] for i in chosen], s=40, color=OWN)
        ax.set_xlabel(name)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    axes[0].set_ylabel(f"{OBJECTIVES[objective.name][0]} of a trial")
    for ax in (history, held_out, *axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
        if objective.name == "steps":
            ax.yaxis.set_major_formatter(plt.FuncFormatter(lambda y, _: thousands(y)))
    figure.suptitle(f"{title}: {objective.describe()}; blue below: the best trial", fontsize=10)
    return figure


def draw_history(ax, objective, trials):
    complete = [trial for trial in trials if trial["value"] is not None]
    numbers = [trial["trial"] for trial in complete]
    values = [trial["value"] for trial in complete]
    others = [trial["trial"] for trial in trials if trial["value"] is None]
    best = np.maximum.accumulate if objective.sign > 0 else np.minimum.accumulate
    ax.scatter(numbers, values, s=16, color=PEER)
    last = trials[-1]["trial"]
    line = best([*values, values[-1]])
    ax.step([*numbers, last], line, where="post", color=OWN, linewidth=2)
    ax.plot(others, [0.02] * len(others), "|", color=TEXT, transform=ax.get_xaxis_transform())
    ax.set_xlim(-0.5, last + 0.5)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("trial (ticks: pruned)" if others else "trial")
    ax.set_ylabel(OBJECTIVES[objective.name][0])
    ax.set_title("search: each trial, and the best so far", loc="left", fontsize=9)


def draw_held_out(ax, objective, found):
    if not found["held_out"]:
        ax.set_visible(False)
        return
    labels = {"defaults": "defaults", "best": f"trial {found['best']['trial']}"}
    for x, (key, colour) in enumerate((("defaults", PEER), ("best", OWN))):
        values = np.array(found["held_out"][key]["values"])
        low, high = bootstrap_interval(values, statistic=AGGREGATES[objective.aggregate])
        middle = objective.combine(values)
        offsets = np.linspace(-0.15, 0.15, len(values))  # so that equal values are seen
        ax.scatter(x + offsets, values, s=14, color=colour, alpha=0.7)
        ax.plot([x + 0.3] * 2, [low, high], color=colour, linewidth=2)
        ax.plot(x + 0.3, middle, "o", color=colour)
    ax.set_xticks([0, 1], labels.values())
    ax.set_xlim(-0.4, 1.6)
    ax.set_title("held-out seeds, and their\n95% interval", loc="left", fontsize=9)


def write_tables(folder, search, space, found):
    """trials.csv, runs.csv and evaluations.csv"""

    def write(name, head, rows):
        with open(folder / name, "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            writer.writerows(rows)

    rows = [
        [trial["trial"], trial["state"], trial["value"], trial["evaluations"]]
        + [trial["params"][name] for name in space]
        + [trial["error"]]
        for trial in found["trials"]
    ]
    write("trials.csv", ["trial", "state", "value", "evaluations", *space, "error"], rows)
    args, runs, evaluations, seen = search.args, [], [], set()
    sets = {"search": args.seeds, "finalist": args.finalist_seeds, "held-out": args.held_out_seeds}
    settings = [(trial["trial"], trial["params"]) for trial in found["trials"]]
    for number, params in [*settings, ("defaults", {})]:
        for part, seeds in sets.items():
            for run in (search.run_of(params, seed) for seed in seeds):
                place = run.place(search.runs.folder)
                result = search.runs.result(run)
                if run in seen or not (result or evaluations_of(place)):
                    continue
                seen.add(run)
                reached = search.objective.goal is not None and result
                reached = search.objective.reached(result) if reached else None
                value = search.objective.value(result) if result else None
                error = result["error"] if result else "stopped by the pruner"
                runs.append([number, part, run.seed, value, *(reached or ("", "")), error])
                curve = result["evaluations"] if result else evaluations_of(place)
                evaluations += [[number, part, run.seed, *row[:2]] for row in curve]
    head = ["trial", "seeds", "seed", "value", "steps_to_goal", "seconds_to_goal", "error"]
    write("runs.csv", head, runs)
    head = ["trial", "seeds", "seed", "step", "episodic_return"]
    write("evaluations.csv", head, evaluations)
