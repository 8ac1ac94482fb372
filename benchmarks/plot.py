"""Figures of any runs: curves, aggregates, performance profiles and probability of improvement.

    python benchmarks/plot.py benchmarks/records/2026-11-25_d*dqn_cartpole
    python benchmarks/plot.py runs --x steps hours
    python benchmarks/plot.py runs 'CleanRL DQN=../cleanrl/runs' 'SB3 DQN=../logs/dqn'
    python benchmarks/plot.py runs ../dopamine/baselines/atari/data/pong_CNN.json --measure any

Each folder is searched for
    records                   results.json, of benchmarks/train.py
    TensorBoard's files       of this project, of CleanRL and of Stable-Baselines3
    Stable-Baselines3's logs  monitor.csv and evaluations.npz
A file is one of Dopamine's published returns. Runs of the same algorithm and environment are its
seeds. NAME=FOLDER gives all runs in FOLDER this name, RECORD/SCRIPT takes one script of a record.
Runs of other projects are grey.

Written to --out, each as PNG and SVG:
    curves_ENV_steps   interquartile mean over the seeds, and its 95% bootstrap interval
    curves_all_steps   the same over all environments, of normalised returns
    aggregate          interquartile mean of the scores of all runs, and its interval
    profiles           for each score, the fraction of runs above it
    improvement        the probability that a run scores higher than one of the --baseline
and summary.md with the same as tables, and what was left out. The statistics are those of rliable
(Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, 2021,
arXiv:2108.13264): intervals are percentiles of a stratified bootstrap, in which each environment
draws its own seeds.

A run's score is its last return at or before --at, by default the last step that all runs of that
environment have reached. With several environments it is normalised: by --range; on Atari to 0 for
random play and 1 for a human; else to 0 and 1 for the lowest and the highest return of these runs.
Beside other projects, summary.md also says how the last return of each algorithm compares with the
seeds of theirs after as many steps.
"""

import argparse
import csv
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from figures import (
    Curve,
    align,
    curve_of_runs,
    draw_curves,
    draw_intervals,
    pyplot,
    reaches,
    save,
    short_names,
    styles,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train import arguments_of, grouped, table_row

RESAMPLES = 2000
EPISODES = 100  # training returns are the mean of so many episodes, as in Stable-Baselines3
EVALUATION = ("eval/episodic_return", "eval/mean_reward")  # CleanQ, Stable-Baselines3
TRAINING = ("charts/episodic_return", "rollout/ep_rew_mean")  # CleanQ and CleanRL, SB3
# Scores of random play and of a human tester, after up to 30 no-ops, in emulator points. Source:
# DQN Zoo (github.com/google-deepmind/dqn_zoo), dqn_zoo/atari_data.py.
HUMAN = """
Alien 227.8 7127.7, Amidar 5.8 1719.5, Assault 222.4 742.0, Asterix 210.0 8503.3,
Asteroids 719.1 47388.7, Atlantis 12850.0 29028.1, BankHeist 14.2 753.1, BattleZone 2360.0 37187.5,
BeamRider 363.9 16926.5, Berzerk 123.7 2630.4, Bowling 23.1 160.7, Boxing 0.1 12.1,
Breakout 1.7 30.5, Centipede 2090.9 12017.0, ChopperCommand 811.0 7387.8,
CrazyClimber 10780.5 35829.4, Defender 2874.5 18688.9, DemonAttack 152.1 1971.0,
DoubleDunk -18.6 -16.4, Enduro 0.0 860.5, FishingDerby -91.7 -38.7, Freeway 0.0 29.6,
Frostbite 65.2 4334.7, Gopher 257.6 2412.5, Gravitar 173.0 3351.4, Hero 1027.0 30826.4,
IceHockey -11.2 0.9, Jamesbond 29.0 302.8, Kangaroo 52.0 3035.0, Krull 1598.0 2665.5,
KungFuMaster 258.5 22736.3, MontezumaRevenge 0.0 4753.3, MsPacman 307.3 6951.6,
NameThisGame 2292.3 8049.0, Phoenix 761.4 7242.6, Pitfall -229.4 6463.7, Pong -20.7 14.6,
PrivateEye 24.9 69571.3, Qbert 163.9 13455.0, Riverraid 1338.5 17118.0, RoadRunner 11.5 7845.0,
Robotank 2.2 11.9, Seaquest 68.4 42054.7, Skiing -17098.1 -4336.9, Solaris 1236.3 12326.7,
SpaceInvaders 148.0 1668.7, StarGunner 664.0 10250.0, Surround -10.0 6.5, Tennis -23.8 -8.3,
TimePilot 3568.0 5229.2, Tutankham 11.4 167.6, UpNDown 533.4 11693.2, Venture 0.0 1187.5,
VideoPinball 16256.9 17667.9, WizardOfWor 563.5 4756.5, YarsRevenge 3092.9 54576.9,
Zaxxon 32.5 9173.3
"""
HUMAN = {name: (float(low), float(high)) for name, low, high in map(str.split, HUMAN.split(","))}


class Log(NamedTuple):
    """Returns of one run: three (T,) arrays, `steps` ascending; `hours` is None if unknown."""

    steps: np.ndarray
    hours: np.ndarray | None
    returns: np.ndarray


class Run(NamedTuple):
    """One training. `logs`: {"evaluation" or "training" or a tag: Log}; `peer`: not of CleanQ."""

    algorithm: str
    env_id: str
    seed: str
    peer: bool
    source: Path
    logs: dict

    def __str__(self):
        return f"{self.algorithm} on {self.env_id}, seed {self.seed}"


# ---- reading -----------------------------------------------------------------------------------


def find_runs(source, env_id=None, tag=None):
    """All runs in a folder and the folders below it.

    `source`: FOLDER, NAME=FOLDER, RECORD/SCRIPT or FILE. `env_id`: of runs that do not tell theirs.
    `tag`: another TensorBoard tag instead of the returns. Returns [Run] and the set of all tags.
    """
    name, _, path = source.rpartition("=") if not Path(source).exists() else ("", "", source)
    folder, runs, tags = Path(path).expanduser(), [], set()
    if folder.is_file() and not name:
        return read_dopamine(folder, env_id), tags
    only = None
    if not folder.exists() and (folder.parent / "results.json").exists():
        folder, only = folder.parent, folder.name
    if not folder.is_dir():
        sys.exit(f"error: {path}: no such folder; give folders of runs or records.")
    for place in [folder, *sorted(x for x in folder.rglob("*") if x.is_dir())]:
        try:
            if (place / "results.json").exists():
                runs += read_record(place)
            elif log_files(place):
                runs += read_logs(place, env_id, tag, tags)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            sys.exit(f"error: cannot read the log in {place} ({error!r}); delete or repair it.")
    if only and not (runs := [run for run in runs if run.algorithm == only]):
        sys.exit(f"error: {path}: the record {folder} has no runs of {only}.")
    if name:
        runs = [run._replace(algorithm=name) for run in runs]
    return runs, tags


def log_files(place):
    """TensorBoard's files and Stable-Baselines3's."""
    patterns = ("events.out.tfevents.*", "*monitor.csv", "evaluations.npz")
    return [path for pattern in patterns for path in place.glob(pattern)]


def make_log(steps, hours, returns):
    """A Log in ascending order of the steps, the last finite value of each step."""
    steps, returns = np.asarray(steps, np.float64), np.asarray(returns, np.float64)
    order = np.argsort(steps, kind="stable")
    order = order[np.isfinite(returns[order])]
    order = order[np.append(np.diff(steps[order]) > 0, [True] * bool(len(order))).astype(bool)]
    hours = None if hours is None else np.asarray(hours, np.float64)[order]
    return Log(steps[order], hours, returns[order])


def read_record(folder):
    """The runs of a record, from results.json; [] if it is not one of learning curves.

    In records of 2026-11-22 the returns are in a CSV file for each run.
    """
    record, runs = json.loads((folder / "results.json").read_text()), []
    for run in record.get("runs", []):
        if "env_id" not in run:  # a speed run, which has no curve
            continue
        script, seed, logs = run.get("script") or record["script"], run["seed"], {}
        if "returns" in run:
            logs["evaluation"] = make_log(run["steps"], run.get("hours") or None, run["returns"])
        else:
            with open(folder / f"{script}_seed{seed}.csv") as file:
                for (series,), rows in grouped([*csv.DictReader(file)], "series").items():
                    columns = ([row[key] for row in rows] for key in ("step", "hours", "return"))
                    logs[series.split(",")[0]] = make_log(*columns)
        runs.append(Run(script, run["env_id"], str(seed), False, folder, logs))
    return runs


def read_logs(place, env_id, tag, tags):
    """[the run of a folder of logs], or [] if it has no returns. Adds its scalar tags to `tags`."""
    logs, arguments, cleanq = {}, {}, False
    if [*place.glob("events.out.tfevents.*")]:
        events = EventAccumulator(str(place), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        there = set(events.Tags()["scalars"])
        tags |= there
        arguments, cleanq = arguments_of(events), "charts/hours" in there
        wanted = {tag: [tag]} if tag else {"evaluation": EVALUATION, "training": TRAINING}
        for kind, names in wanted.items():
            found = next((name for name in names if name in there), None)
            if found:
                logs[kind] = read_scalars(events, found)
    monitors = sorted(place.glob("*monitor.csv"))
    monitor_env = None
    if monitors and not tag:
        monitor_env, log = read_monitors(monitors)
        logs.setdefault("training", log)
    if (place / "evaluations.npz").exists() and not tag:
        with np.load(place / "evaluations.npz") as file:
            log = make_log(file["timesteps"], None, file["results"].mean(axis=1))
        logs.setdefault("evaluation", log)
    logs = {kind: log for kind, log in logs.items() if len(log.steps)}
    if not logs:
        return []
    algorithm, env, seed = identify(place, arguments, monitor_env)
    if not (env or env_id):
        sys.exit(f"error: {place} does not say its environment; give --env-id.")
    return [Run(algorithm, env or env_id, seed, not cleanq, place, logs)]


def read_scalars(events, tag):
    """The Log of one TensorBoard tag. Hours are the script's own, or else those of the clock."""
    values = events.Scalars(tag)
    steps, returns = ([getattr(e, key) for e in values] for key in ("step", "value"))
    if "charts/hours" in events.Tags()["scalars"]:
        clock = events.Scalars("charts/hours")
        hours = np.interp(steps, [e.step for e in clock], [e.value for e in clock])
    else:
        hours = (np.array([e.wall_time for e in values]) - events.FirstEventTimestamp()) / 3600
    if tag == "charts/episodic_return":  # one episode each
        returns = trailing_mean(returns, EPISODES)
    return make_log(steps, hours, returns)


def read_monitors(files):
    """The environment and the training Log of Stable-Baselines3's monitor files of one run."""
    episodes, env_id, start = [], None, np.inf
    for path in files:
        with open(path) as file:
            header = json.loads(file.readline().lstrip("#"))
            rows = [*csv.DictReader(file)]
        env_id = header.get("env_id") or env_id
        start = min(start, header["t_start"])
        episodes += [
            (header["t_start"] + float(row["t"]), int(row["l"]), float(row["r"])) for row in rows
        ]
    episodes.sort()  # by their ends: the run's steps are those of all its environments
    times, lengths, returns = np.array(episodes).reshape(-1, 3).T
    hours = (times - start) / 3600
    return env_id, make_log(lengths.cumsum(), hours, trailing_mean(returns, EPISODES))


def read_dopamine(file, env_id):
    """The runs of a file of Dopamine's baselines/atari/data: five seeds of each agent.

    An iteration is 250,000 agent steps, and its value the mean return of the training episodes in
    them, with sticky actions. The log places it at their end. Seeds have no names: each
    iteration lists them in the same order.
    """
    values = {}
    try:
        for row in json.loads(file.read_text()):
            seeds = values.setdefault(row["Agent"], {}).setdefault(int(row["Iteration"]), [])
            seeds.append(float(row["Value"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sys.exit(f"error: {file} is not a file of Dopamine's returns, as pong_CNN.json; give that.")
    name, runs = file.stem.split("_")[0], []
    game = next((game for game in HUMAN if game.lower() == name), name.title())
    for agent, by_iteration in values.items():
        steps = [250_000 * (i + 1) for i in sorted(by_iteration)]
        returns = zip(*(by_iteration[i] for i in sorted(by_iteration)))
        for seed, column in enumerate(returns, 1):
            log = {"training": make_log(steps, None, column)}
            env = env_id or f"ALE/{game}-v5"
            runs.append(Run(f"Dopamine {agent}", env, str(seed), True, file, log))
    return runs


def trailing_mean(values, n):
    """At each place the mean of the last `n` values, or of all so far if they are fewer."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(sums))
    first = np.maximum(last - n, 0)
    return (sums[last] - sums[first]) / (last - first)


def identify(place, arguments, monitor_env=None):
    """(algorithm, environment or None, seed) of a run's folder.

    From the script's arguments (CleanQ, CleanRL), else from the folders' names: CleanRL's
    ENV__NAME__SEED__TIME, or Stable-Baselines3's DQN_1, ENV_1 or seed1 below the others.
    """
    if "exp_name" in arguments:
        env_id = arguments.get("env_id") or arguments.get("gym_id")
        return arguments["exp_name"], env_id, arguments.get("seed", "1")
    parts = place.name.split("__")
    if len(parts) == 4:
        return parts[1], parts[0], parts[2]
    names, seed = [place.resolve().name, *(x.name for x in place.resolve().parents)], "1"
    if found := re.fullmatch(r"(?:(.+?)[_-])??(?:seed[_-]?)?(\d+)", names[0]):
        names[0], seed = found.groups()
    is_env = re.compile(r".+-v\d+")
    env_id = monitor_env or next((x for x in names if x and is_env.fullmatch(x)), None)
    algorithm = next((x for x in names if x and not is_env.fullmatch(x)), "unknown")
    return algorithm, env_id, seed


def choose(runs, measure):
    """The runs with their Log of one kind, `logs` becoming that Log, and the kind.

    `measure`: "auto", "evaluation", "training", "any" or a tag; "auto" takes what all runs have,
    evaluations first; "any" takes the evaluations of each run that has some. Exits with a line if
    that is impossible.
    """
    if measure == "any":
        logs = [run.logs.get("evaluation", run.logs.get("training")) for run in runs]
        return [run._replace(logs=log) for run, log in zip(runs, logs)], measure
    kinds = ("evaluation", "training") if measure == "auto" else (measure,)
    for kind in kinds:
        if all(kind in run.logs for run in runs):
            return [run._replace(logs=run.logs[kind]) for run in runs], kind
    without = next(run for run in runs if kinds[0] not in run.logs)
    if measure == "auto":
        other = next(run for run in runs if "training" not in run.logs)
        sys.exit(
            f"error: {without.source} has no evaluations, {other.source} has no training returns, "
            "and the two do not compare; plot them apart, or with --measure any."
        )
    sys.exit(f"error: {without.source} has no {measure} returns; leave it out, or --measure auto.")


def check_repeats(runs):
    """Exits if the same seed is there twice: it would pass for two independent ones."""
    for run, *others in grouped(
        [r._asdict() for r in runs], "algorithm", "env_id", "seed"
    ).values():
        if others:
            sys.exit(
                f"error: seed {run['seed']} of {run['algorithm']} on {run['env_id']} is there "
                f"twice: {run['source']} and {others[0]['source']}; leave one out, or give the "
                "folders different names, NAME=FOLDER."
            )


# ---- statistics --------------------------------------------------------------------------------


def interquartile_means(scores):
    """rliable's interquartile mean, of all points at once. (runs, games, T) -> (T,)"""
    from scipy.stats import trim_mean

    return trim_mean(np.concatenate(scores), 0.25, axis=0)


def interval(func, *scores):
    """95% interval of func(*scores), (T,), by rliable's stratified bootstrap. -> low, high

    `scores`: (runs, games, ...), of one or more algorithms; (None, None) if one has a single run.
    """
    from rliable import library

    if min(map(len, scores)) < 2:
        return None, None
    np.random.seed(0)  # noqa: NPY002 - rliable draws from this generator
    data = {"": scores[0] if len(scores) == 1 else [*scores]}
    return library.get_interval_estimates(data, func, reps=RESAMPLES)[1][""]


def curve_of(label, groups, x, **options):
    """The Curve of one algorithm's runs, one group of runs for each environment.

    With several groups the first runs of each are taken, as many as the smallest has, and the curve
    ends with the first run that ends.
    """
    series = [
        [(run.logs.hours if x == "hours" else run.logs.steps, run.logs.returns) for run in group]
        for group in groups
    ]
    if len(series) == 1:
        return curve_of_runs(
            label,
            series[0],
            lambda values: interquartile_means(values[:, None]),
            lambda values: interval(interquartile_means, values[:, None]),
            **options,
        )
    n = min(map(len, series))
    grid, values = align([run for group in series for run in group[:n]])
    values = values.reshape(len(series), n, -1).swapaxes(0, 1)  # (runs, games, T)
    whole = ~np.isnan(values).any(axis=(0, 1))
    grid, values = grid[whole], values[:, :, whole]
    low, high = interval(interquartile_means, values)
    return Curve(label, grid, interquartile_means(values), low, high, **options)


def score_at(log, step):
    """The last return at or before `step`. Exits if there is none."""
    index = np.searchsorted(log.steps, step, side="right") - 1
    if index < 0:
        sys.exit(f"error: a run has no return up to step {step:,.0f}; give a later one to --at.")
    return log.returns[index]


def until(run, step):
    """The run up to that step. Exits if nothing is left."""
    log = run.logs
    n = np.searchsorted(log.steps, step, side="right")
    if not n:
        sys.exit(f"error: {run} has no return up to step {step:,.0f}; give a later one to --until.")
    hours = None if log.hours is None else log.hours[:n]
    return run._replace(logs=Log(log.steps[:n], hours, log.returns[:n]))


def scores_of(groups, env_ids, at):
    """{algorithm: (runs, games)}: the scores of all runs in those environments.

    `groups`: {(algorithm, environment): runs}. Each algorithm has as many runs as in the
    environment where it has least. `at`: a step, "end", or None for the last common one.
    """
    scores = {}
    for algorithm in dict.fromkeys(algorithm for algorithm, _ in groups):
        columns = []
        for env_id in env_ids:
            step = {"end": np.inf, None: common_step(groups, env_id)}.get(at, at)
            columns.append([score_at(run.logs, step) for run in groups[algorithm, env_id]])
        n = min(map(len, columns))
        scores[algorithm] = np.array([column[:n] for column in columns]).T
    return scores


def common_step(groups, env_id):
    """The last step that all runs of an environment have reached."""
    return min(
        run.logs.steps[-1] for (_, env), group in groups.items() if env == env_id for run in group
    )


def game_of(env_id):
    """The Atari game of an id like BreakoutNoFrameskip-v4 or ALE/Breakout-v5, or None."""
    found = re.fullmatch(r"(?:ALE/)?(\w+?)(?:NoFrameskip|Deterministic)?-(?:ram-)?v[045]", env_id)
    return found[1] if found and found[1] in HUMAN else None


def range_of(env_id, runs, ranges):
    """(low, high, how): the returns that count as 0 and 1, and how they were chosen."""
    if env_id in ranges:
        return *ranges[env_id], "--range"
    if game := game_of(env_id):
        return *HUMAN[game], "0 is random play, 1 a human"
    returns = np.concatenate([run.logs.returns for run in runs])
    low, high = returns.min(), returns.max()
    return low, high if high > low else low + 1, "0 and 1 are the lowest and highest return here"


# ---- figures -----------------------------------------------------------------------------------


def count(items):
    """ "3", or "3 to 5" where the groups have different sizes"""
    sizes = {len(group) for group in items}
    return f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else f"{min(sizes)}"


def seeds_note(groups, curves):
    """What the lines and the bands of a figure are."""
    note = f"{count(groups)} seed{'s' * (max(map(len, groups)) > 1)}"
    bands = [curve.low is not None for curve in curves]
    note += ": interquartile mean, 95% bootstrap interval" if any(bands) else ", no interval"
    note += "; a single seed has none" if any(bands) and not all(bands) else ""
    return note + ("; thin: fewer seeds are left" if any(curve.tail for curve in curves) else "")


def curves_figure(groups, x, title, ylabel, goal, looks):
    """One line for each algorithm. `groups`: {algorithm: [runs of each environment]}"""
    curves = []
    for algorithm, look in looks.items():
        if algorithm in groups:
            options = {"peer": look.peer, "style": look.style}
            curve = curve_of(look.name, groups[algorithm], x, **options)
            if not len(curve.middle):
                sys.exit(f"error: {look.name}: some of its runs end before others begin.")
            curves.append(curve if curve.tail else curve._replace(text=number(curve.middle[-1])))
    note = seeds_note([group for by_env in groups.values() for group in by_env], curves)
    env_ids = {group[0].env_id for by_env in groups.values() for group in by_env}
    unit = "hours of training" if x == "hours" else "agent steps"
    if x == "steps" and all(map(game_of, env_ids)):
        unit = "agent steps (4 frames each)"
    goal = None if goal is None else (goal, f"goal: {goal:g}")
    return draw_curves(curves, title, note, unit, ylabel, goal)


def number(x):
    """A score in a label: 0.512, 4.1, 500, 12,345"""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.3g}"


def aggregate_figure(scores, unit, when, looks):
    """The interquartile mean of all scores, and the rows [(name, mean, low, high, style)]."""
    rows = []
    for algorithm, values in scores.items():
        look, bounds = looks[algorithm], interval(pooled_mean, values)
        rows.append((look.name, *pooled_mean(values), *flat(bounds), look.style))
    note = "interquartile mean of all runs, 95% stratified bootstrap interval"
    return draw_intervals(rows, f"Scores {when}", note, f"{unit}, higher is better"), rows


def pooled_mean(scores):
    from rliable import metrics

    return np.array([metrics.aggregate_iqm(scores)])


def flat(bounds):
    """(low, high) as numbers instead of arrays of one."""
    return [bound if bound is None else bound.item() for bound in bounds]


def profiles_figure(scores, unit, when, looks):
    """For each score, the fraction of runs above it."""
    from rliable import library

    everything = np.concatenate([values.ravel() for values in scores.values()])
    low, high = everything.min(), everything.max()
    margin = 0.02 * (high - low) or 1.0
    taus, curves = np.linspace(low - margin, high + margin, 105), []
    for algorithm in sorted(scores, key=lambda name: -scores[name].mean()):
        np.random.seed(0)  # noqa: NPY002 - rliable draws from this generator
        one, look = {"": scores[algorithm]}, looks[algorithm]
        middle, bounds = library.create_performance_profile(one, taus, reps=RESAMPLES)
        band = bounds[""] if len(scores[algorithm]) > 1 else (None, None)
        curves.append(Curve(look.name, taus, middle[""], *band, peer=look.peer, style=look.style))
    note = "fraction of all runs, 95% stratified bootstrap interval; names from the best mean down"
    labels = unit, "runs with a higher score, higher is better"
    options = {"at_ends": False, "ylim": (0, 1.02), "yformat": "{x:.0%}"}
    options |= {"xlim": (taus[0], taus[-1])}
    return draw_curves(curves, f"Performance profiles {when}", note, *labels, **options)


def improvement_figure(scores, baseline, looks):
    """P(run of X > run of the baseline), and the rows [(name, P, low, high, style)]."""
    from rliable import metrics

    def probability(x, y):
        return np.array([metrics.probability_of_improvement(x, y)])

    rows, other = [], looks[baseline].name
    for algorithm, values in scores.items():
        if algorithm != baseline:
            both, look = (values, scores[baseline]), looks[algorithm]
            bounds = flat(interval(probability, *both))
            rows.append((look.name, *probability(*both), *bounds, look.style))
    note = "mean over the environments, 95% stratified bootstrap interval; dashed: no difference"
    options = {"reference": 0.5, "xlim": (-0.02, 1.08)}
    title, xlabel = f"Probability of improvement over {other}", f"P(its score > {other}'s)"
    return draw_intervals(rows, title, note, f"{xlabel}, higher is better", **options), rows


# ---- the report --------------------------------------------------------------------------------


class Look(NamedTuple):
    """How an algorithm appears in all figures."""

    name: str
    peer: bool
    style: dict


def looks_of(runs, algorithms):
    """{algorithm: Look}"""
    peers = {run.algorithm: run.peer for run in runs}
    found = styles([peers[algorithm] for algorithm in algorithms])
    names = short_names(algorithms)
    return {a: Look(names[a], peers[a], style) for a, style in zip(algorithms, found)}


def runs_table(groups, looks):
    """What was read, and which runs end early, in Markdown."""
    lines = [table_row(["algorithm", "environment", "seeds", "steps"]), "|---|---|---|---|"]
    notes = []
    for (algorithm, env_id), group in groups.items():
        ends = [run.logs.steps[-1] for run in group]
        seeds = " ".join(run.seed for run in group)
        cells = [looks[algorithm].name, env_id, seeds, span(ends)]
        lines.append(table_row(cells))
        where = f"{looks[algorithm].name} on {env_id}"
        early = [run.seed for run, end in zip(group, ends) if not reaches(end, max(ends))]
        if early:
            notes.append(
                f"{where}: seed{'s' * (len(early) > 1)} {', '.join(early)} end"
                f"{'s' * (len(early) == 1)} before {max(ends):,.0f} steps; the line is thin where "
                "fewer seeds are left."
            )
        if len(group) == 1:
            notes.append(f"{where}: one seed, so no interval.")
        elif len(group) < 5:
            notes.append(
                f"{where}: {len(group)} seeds are few; the interval is usually too narrow."
            )
    return [*lines, "", *(f"- {note}" for note in notes), *[""] * bool(notes)]


def beside_peers(groups, looks):
    """Each algorithm's last return beside the seeds of the other projects, in Markdown."""
    lines = []
    for env_id in dict.fromkeys(env_id for _, env_id in groups):
        here = {a: group for (a, env), group in groups.items() if env == env_id}
        peers = [a for a in here if looks[a].peer]
        if not peers or len(peers) == len(here):
            continue
        lines += [f"{env_id}: the last return, an interquartile mean over the seeds, and whether"]
        lines += ["it is within the seeds of the others, interpolated at that step:", ""]
        head = ["algorithm", "steps", "return", *(looks[a].name for a in peers)]
        lines += [table_row(head), table_row(["---", *["---:"] * (len(head) - 1)])]
        for algorithm, group in here.items():
            if algorithm in peers:
                continue
            step = min(run.logs.steps[-1] for run in group)
            score = pooled_mean(np.array([[score_at(run.logs, step)] for run in group])).item()
            cells = [looks[algorithm].name, f"{step:,.0f}", number(score)]
            cells += [beside(score, step, [run.logs for run in here[peer]]) for peer in peers]
            lines.append(table_row(cells))
        lines.append("")
    return lines


def beside(score, step, logs):
    """ "-12.9 to -3.9, above": the range of other runs at a step, and where a score is. Empty where
    one of them has not begun or has ended."""
    if not all(log.steps[0] <= step <= log.steps[-1] for log in logs):
        return ""
    values = [np.interp(step, log.steps, log.returns) for log in logs]
    low, high = min(values), max(values)
    where = "above" if score > high else "below" if score < low else "within"
    return f"{number(low)} to {number(high)}, {where}"


def span(values):
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def interval_rows(rows, head):
    """Markdown lines of [(name, value, low, high, peer)]."""
    lines = [table_row(["algorithm", head, "95% interval"]), "|---|---:|---:|"]
    for name, value, low, high, _ in rows:
        bounds = "one seed" if low is None else f"{number(low)} to {number(high)}"
        lines.append(table_row([name, number(value), bounds]))
    return [*lines, ""]


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="[NAME=]FOLDER[/SCRIPT] or FILE")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="default: figures")
    parser.add_argument("--x", nargs="+", choices=("steps", "hours"), default=["steps"])
    kinds = ("auto", "evaluation", "training", "any")
    parser.add_argument("--measure", choices=kinds, default="auto")
    parser.add_argument("--tag", help="another TensorBoard tag: curves only, as charts/SPS")
    parser.add_argument("--goal", type=float, help="a dashed line at this return")
    parser.add_argument("--at", help="a step, or `end` (default: the last common step)")
    parser.add_argument("--until", type=float, metavar="STEP", help="leave out what comes later")
    parser.add_argument("--baseline", help="for the probability of improvement (default: first)")
    parser.add_argument("--peers", nargs="+", default=[], help="algorithms to draw grey")
    parser.add_argument("--range", nargs="+", default=[], metavar="ENV=LOW,HIGH")
    parser.add_argument("--env-id", help="of runs that do not tell theirs")
    args = parser.parse_args()
    try:
        args.at = args.at if args.at in (None, "end") else float(args.at)
    except ValueError:
        parser.error(f"--at {args.at}: give a step, or `end`")
    ranges = {}
    for word in args.range:
        found = re.fullmatch(r"(.+)=([^,=]+),([^,=]+)", word)
        try:
            ranges[found[1]] = float(found[2]), float(found[3])
        except (TypeError, ValueError):
            parser.error(f"--range {word}: must be ENV=LOW,HIGH, as CartPole-v1=0,500")
        if ranges[found[1]][0] == ranges[found[1]][1]:
            parser.error(f"--range {word}: LOW and HIGH must differ")
    args.range = ranges
    return args


def main():
    args = parse_args()
    pyplot()
    try:
        import rliable.library  # noqa: F401
    except (ImportError, TypeError) as error:
        sys.exit(f"error: rliable does not import ({error}); run `pip install '.[plot]'` first.")
    runs, tags = [], set()
    for source in args.folders:
        found, there = find_runs(source, args.env_id, args.tag)
        if not found and not there:
            sys.exit(
                f"error: {source}: no logs of training here: no results.json, "
                "events.out.tfevents.*, monitor.csv or evaluations.npz with returns."
            )
        runs, tags = runs + found, tags | there
    if not runs:
        tag, there = args.tag or "with returns", ", ".join(sorted(tags))
        sys.exit(f"error: no run has the tag {tag}; there are: {there}")
    check_repeats(runs)
    runs, measure = choose(runs, args.tag or args.measure)
    if args.until is not None:
        runs = [until(run, args.until) for run in runs]
    runs = [run._replace(peer=run.peer or run.algorithm in args.peers) for run in runs]
    algorithms = [*dict.fromkeys(run.algorithm for run in runs)]
    for name in [*args.peers, *filter(None, [args.baseline])]:
        if name not in algorithms:
            sys.exit(f"error: no runs of {name}; there are: {', '.join(algorithms)}.")
    if all(run.peer for run in runs):  # then none of them is grey
        runs = [run._replace(peer=False) for run in runs]
    if "hours" in args.x and (without := [run for run in runs if run.logs.hours is None]):
        sys.exit(f"error: {without[0].source} has no times; leave it out, or --x steps.")
    make(runs, measure, algorithms, args)


def make(runs, measure, algorithms, args):
    """Draw everything, write it to args.out and print the report."""
    groups = {}
    for run in runs:
        groups.setdefault((run.algorithm, run.env_id), []).append(run)
    looks = looks_of(runs, algorithms)
    env_ids = [*dict.fromkeys(run.env_id for run in runs)]
    what = {"evaluation": "evaluations", "training": f"training, mean of {EPISODES} episodes"}
    what["any"] = "evaluations, or training where there are none"
    ylabel = "return, higher is better" if measure in what else measure
    lines = [f"# {', '.join(look.name for look in looks.values())}", ""]
    lines += [f"Read: {what.get(measure, measure)}.", "", *runs_table(groups, looks)]
    drawn = {}
    for x in args.x:
        for env_id in env_ids:
            here = {a: [group] for (a, env), group in groups.items() if env == env_id}
            title = f"{env_id}, {what.get(measure, measure)}"
            figure = curves_figure(here, x, title, ylabel, args.goal, looks)
            drawn[f"curves_{env_id.replace('/', '-')}_{x}"] = figure
    common = [env_id for env_id in env_ids if all((a, env_id) in groups for a in algorithms)]
    if args.tag or not common:
        if not args.tag:
            lines += ["No environment has runs of all algorithms, so nothing is aggregated.", ""]
    else:
        left_out = [env_id for env_id in env_ids if env_id not in common]
        if left_out:
            lines += [f"Not aggregated, not all algorithms have it: {', '.join(left_out)}.", ""]
        scored, unit = groups, "return"
        if len(common) > 1 or args.range:
            unit = "normalised return"
            scored = {}
            for env_id in common:
                here = [run for run in runs if run.env_id == env_id]
                low, high, how = range_of(env_id, here, args.range)
                lines.append(f"- {env_id}: 0 is a return of {low:g}, 1 of {high:g} ({how})")
                for (algorithm, env), group in groups.items():
                    if env == env_id:
                        scored[algorithm, env] = [normalised(run, low, high) for run in group]
            lines.append("")
        for x in args.x if len(common) > 1 else ():
            here = {a: [scored[a, env_id] for env_id in common] for a in algorithms}
            title = f"{len(common)} environments, {what[measure]}"
            figure = curves_figure(here, x, title, f"{unit}, higher is better", None, looks)
            drawn[f"curves_all_{x}"] = figure
        scores = scores_of(scored, common, args.at)
        steps = span([common_step(groups, env_id) for env_id in common])
        when = {"end": "at the end of each run", None: f"at step {steps}"}
        when = when.get(args.at) or f"at step {args.at:,.0f}"
        lines += [f"Scores: {unit} {when}.", ""]
        drawn["aggregate"], rows = aggregate_figure(scores, unit, when, looks)
        lines += interval_rows(rows, "interquartile mean")
        drawn["profiles"] = profiles_figure(scores, unit, when, looks)
        if len(algorithms) > 1:
            baseline = args.baseline or algorithms[0]
            drawn["improvement"], rows = improvement_figure(scores, baseline, looks)
            lines += interval_rows(rows, f"P(better than {looks[baseline].name})")
    if not args.tag:
        lines += beside_peers(groups, looks)
    lines += [f"![{name}]({name}.png)" for name in drawn]
    write(args.out, drawn, "\n".join(lines) + "\n")


def normalised(run, low, high):
    returns = (run.logs.returns - low) / (high - low)
    return run._replace(logs=run.logs._replace(returns=returns))


def write(folder, drawn, report):
    """Write the figures and summary.md. Prints the report and the files' names."""
    try:
        for name, figure in drawn.items():
            save(figure, folder / name)
        (folder / "summary.md").write_text(report)
    except OSError as error:
        sys.exit(f"error: cannot write to {folder} ({error.strerror}); give another --out.")
    print(report[: report.index("![")].rstrip())
    print(f"\nin {folder}: {', '.join(drawn)} (.png and .svg), summary.md")


if __name__ == "__main__":
    main()
