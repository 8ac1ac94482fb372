"""Hyperparameter search over any script of algos/, with Optuna; resumable after a kill.

    python benchmarks/tune.py --script dqn_cartpole --list
    python benchmarks/tune.py --script dqn_cartpole --goal 475 --trials 30 --study ../tuned \\
        --search learning_rate=1e-4..1e-2:log batch_size=32,64,128,256 exploration gamma

Every run is `python algos/SCRIPT.py --env-id ENV --seed SEED`, with a trial's arguments and the
flags after `--`. A trial trains the --seeds one after the other; its value is the aggregate over
them. The best trial and the script's defaults are then trained on --held-out-seeds, which the
search has not seen: only that comparison shows whether the search has found something.
With --study everything stays in that folder, and the same command, given again after a kill, goes
on where it stopped. It ends with the best command line, and figures in the study's folder.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import types
import typing
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from figures import OWN, PEER, TEXT, pyplot
from machine import ROOT, clean_commit, commit_of, quote, write_record
from train import (
    EVALUATED,
    RESAMPLES,
    SOLVED,
    bootstrap_interval,
    check_study,
    events_of,
    interquartile_mean,
    lines_of,
    locked,
    start,
    table_row,
    thousands,
    write_atomically,
)

try:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState
except ImportError:
    sys.exit("error: tune.py needs Optuna; run `pip install '.[tune]'` first.")

# What the objectives measure: unit, and the direction of better values.
OBJECTIVES = {
    "steps": ("steps", "minimize"),
    "seconds": ("seconds", "minimize"),
    "final": ("return", "maximize"),
    "mean": ("return", "maximize"),
}
AGGREGATES = {"iqm": interquartile_mean, "mean": np.mean, "median": np.median}
AGGREGATE_NAMES = {"iqm": "interquartile mean", "mean": "mean", "median": "median"}
# A run that never reaches the goal counts as this many times its length: the PAR2 score of
# algorithm configuration.
PENALTY = 2
# These arguments define the task, so that they are the same in all trials.
FIXED = ("env_id", "seed", "total_timesteps")
# The last words of a run with arguments that do not work: they exclude each other, or it diverges.
GAVE_UP = re.compile(r"^error: (the loss is not finite|a weight is NaN|--\S+ must be )")


# ---- The search space ----------------------------------------------------------------------------


class Argument(NamedTuple):
    """A field of the script's Args. `kind`: bool, int, float, str, tuple, or a tuple of literals"""

    name: str
    kind: typing.Any
    default: typing.Any


def load_script(script, words):
    """The script's arguments, {name: Argument}, and its parsed command line. Exits if it is wrong.

    The defaults are those that apply to the command line `words`: some depend on --env-id.
    """
    path = ROOT / "algos" / f"{script}.py"
    spec = importlib.util.spec_from_file_location(script, path)
    module = sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, [os.fspath(path), *words]
    try:
        args = module.parse_args()
    finally:
        sys.argv = before
    arguments = {}
    for name, kind in typing.get_type_hints(module.Args).items():
        if typing.get_origin(kind) in (typing.Union, types.UnionType):  # float | None
            kind = next(x for x in typing.get_args(kind) if x is not type(None))
        if typing.get_origin(kind) is Literal:
            kind = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            kind = tuple
        arguments[name] = Argument(name, kind, getattr(args, name))
    return arguments, args


def automatic_range(argument):
    """The distribution of an argument that is given without a range; None if there is none.

    A number is searched around its default: factors of 4, of 10 below 0.01, on a logarithmic scale.
    Near 1, as for a discount factor, its distance to 1 is. A number up to 1 may be a fraction, so
    its range ends at 1.
    """
    name, kind, default = argument
    if name in FIXED or default is None:
        return None
    if kind is bool:
        return CategoricalDistribution((False, True))
    if isinstance(kind, tuple):
        return CategoricalDistribution(kind)
    if kind is int and default > 0:
        return IntDistribution(max(default // 4, 1), 4 * default, log=True)
    if kind is not float or default <= 0:
        return None
    if 0.9 <= default < 1:
        return FloatDistribution(rounded(1 - 4 * (1 - default)), rounded(1 - (1 - default) / 4))
    factor = 10 if default <= 0.01 else 4
    high = factor * default if default > 1 else min(factor * default, 1)
    return FloatDistribution(rounded(default / factor), rounded(high), log=True)


def rounded(x):
    return float(f"{x:.4g}")


def parse_search(words, arguments, grid):
    """--search: {name: distribution}. Raises ValueError with a message.

    Each word is NAME, NAME=A,B,C or NAME=LOW..HIGH, with :log for a logarithmic scale and :N for N
    points of the range. A grid has no ranges: one without a number of points gets three.
    """
    space = {}
    possible = [name for name in arguments if name not in FIXED]
    for word in words:
        name, _, text = word.partition("=")
        name = name.strip("-").replace("-", "_")
        if name in FIXED and name in arguments:
            raise ValueError(f"--search {word}: all trials have the same {name}")
        if name not in possible:
            raise ValueError(f"--search {word}: no such argument; there are {', '.join(possible)}")
        if name in space:
            raise ValueError(f"--search {name}: given twice")
        try:
            space[name] = parse_range(arguments[name], text)
        except ValueError as e:
            raise ValueError(f"--search {word}: {e}") from None
    if not words:
        ranges = {name: automatic_range(arguments[name]) for name in possible if name != "num_envs"}
        space = {name: distribution for name, distribution in ranges.items() if distribution}
    if grid:
        space = {name: points_of(distribution, 3) for name, distribution in space.items()}
    return space


def parse_range(argument, text):
    """The distribution that `text`, behind the = of a word of --search, describes."""
    _, kind, default = argument
    if not text:
        distribution = automatic_range(argument)
        if distribution is None:
            raise ValueError(f"nothing follows from its default, {default}: give its values")
        return distribution
    if ".." not in text:
        values = tuple(dict.fromkeys(value_of(kind, x) for x in text.split(",")))
        if len(values) < 2:
            raise ValueError("one value is no search: give it after --")
        return CategoricalDistribution(values)
    if kind not in (int, float):
        raise ValueError(f"only numbers have a range; list values, as in {choices_of(kind)}")
    ends, *options = text.split(":")
    low, high = (value_of(kind, x) for x in ends.split("..", 1))
    log = "log" in options
    points = [x for x in options if x != "log"]
    if not low < high:
        raise ValueError("the range is empty: LOW..HIGH, with LOW below HIGH")
    if log and low <= 0:
        raise ValueError("a logarithmic range starts above 0")
    distribution = (IntDistribution if kind is int else FloatDistribution)(low, high, log=log)
    if not points:
        return distribution
    if len(points) > 1 or not points[0].isdigit() or int(points[0]) < 2:
        raise ValueError("behind the range there may be :log and a number of points from 2, :5")
    return points_of(distribution, int(points[0]))


def value_of(kind, text):
    """One value of --search. Raises ValueError if the type does not have it."""
    text = text.strip()
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is str or (isinstance(kind, tuple) and text in kind):
        return text
    if kind is tuple and re.fullmatch(r"\d+(x\d+)*", text):
        return text  # 120x84: Optuna keeps no tuples
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            value = float(text)
            if math.isfinite(value) and (kind is float or value == int(value)):
                return kind(value)
    raise ValueError(f"{text or 'nothing'} is not {choices_of(kind)}")


def choices_of(kind):
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    names |= {tuple: "numbers such as 120x84", str: "a text"}
    return " or ".join(kind) if isinstance(kind, tuple) else names[kind]


def points_of(distribution, n):
    """n points of a range, both ends among them; values stay what they are."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution
    low, high = distribution.low, distribution.high
    points = np.geomspace(low, high, n) if distribution.log else np.linspace(low, high, n)
    kind = int if isinstance(distribution, IntDistribution) else float
    values = (round(x) if kind is int else rounded(x) for x in points.tolist())
    return CategoricalDistribution(tuple(dict.fromkeys(values)))


def describe_range(distribution):
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(text_of(choice) for choice in distribution.choices)
    low, high = text_of(distribution.low), text_of(distribution.high)
    return f"{low} to {high}" + (", logarithmic" if distribution.log else "")


def contains(distribution, value):
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return value is not None and distribution.low <= value <= distribution.high


def text_of(value):
    """A value as on the command line; numbers with four digits, which is what a run gets."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flags_of(params, arguments):
    """The command line of a trial's values: those that differ from the defaults."""
    words = []
    for name, value in params.items():
        flag = "--" + name.replace("_", "-")
        if text_of(value) == text_of(arguments[name].default):
            continue
        if arguments[name].kind is bool:
            words += [flag if value else flag.replace("--", "--no-", 1)]
        elif arguments[name].kind is tuple:
            words += [flag, *value.split("x")]
        else:
            words += [flag, text_of(value)]
    return tuple(words)


# ---- Runs ----------------------------------------------------------------------------------------


class TrialRun(NamedTuple):
    """One training with the flags of a trial; () are the defaults."""

    script: str
    env_id: str | None
    seed: int
    arguments: tuple

    def __str__(self) -> str:
        return f"{' '.join(self.arguments) or 'defaults'}, seed {self.seed}"

    def place(self, folder: Path) -> Path:
        """Equal trials have the same folder, so that no run is made twice."""
        key = hashlib.sha256("\n".join(self.arguments).encode()).hexdigest()[:12]
        return folder / "runs" / (key if self.arguments else "defaults") / str(self.seed)

    def flags(self) -> list[str]:
        env = ["--env-id", self.env_id] if self.env_id else []
        return [*env, "--seed", str(self.seed), *self.arguments]


class Runs:
    """The runs of a study in its folder. `flags`: those of all runs."""

    def __init__(self, folder, flags, total_timesteps, keep):
        self.folder, self.flags, self.total, self.keep = folder, flags, total_timesteps, keep
        self.processes = {}  # run -> its process; None: it outlived an earlier call of this tool

    def follow(self, run, goal=None):
        """Train a run, or let it go on; yield the returns of its evaluations until it has ended.

        With `goal` it is stopped once an evaluation has reached it. Its result is then in
        result.json, see `result_of`. Exits if the run fails for a reason other than its arguments.
        """
        place = run.place(self.folder)
        place.mkdir(parents=True, exist_ok=True)
        while not (place / "result.json").exists():
            if not self.is_running(run):  # it may have ended while this tool did not run
                if result := result_of(place, self.total, goal):
                    write_atomically(place / "result.json", result)
                    continue
            process = self.processes[run] = start(run, self.flags, place, self.keep)
            size, returns = 0, []
            while self.is_running(run):
                if (place / "log.txt").stat().st_size != size:
                    size = (place / "log.txt").stat().st_size
                    returns = [value for _, value in evaluations_of(place)]
                if goal is not None and max(returns, default=-math.inf) >= goal:
                    self.stop(run, signal.SIGTERM)  # it closes its log
                else:
                    yield returns
            del self.processes[run]
            result = result_of(place, self.total, goal)
            if result:
                write_atomically(place / "result.json", result)
            elif process:
                tail = "\n".join(lines_of(place)[-15:])
                sys.exit(f"{tail}\nerror: {run} ended with status {process.returncode}.")
        for checkpoint in place.glob("runs/*/checkpoint.pt"):
            checkpoint.unlink()  # a finished run does not go on, and with a replay it is large
        yield [value for _, value, _ in self.result(run)["evaluations"]]

    def result(self, run):
        """The result of a run that has ended; None of others."""
        file = run.place(self.folder) / "result.json"
        return json.loads(file.read_text()) if file.exists() else None

    def is_running(self, run):
        if self.processes.get(run):
            return self.processes[run].poll() is None
        lock = locked(run.place(self.folder))
        if lock:
            lock.close()
        return lock is None

    def stop(self, run, number=signal.SIGKILL):
        """Stop a run, if it is running, and wait for its end."""
        place, deadline = run.place(self.folder), time.monotonic() + 60
        if not place.exists():
            return
        while self.is_running(run):
            process = self.processes.get(run)
            pid = process.pid if process else int((place / "lock").read_text().strip() or 0)
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self.is_running(run) and time.monotonic() < deadline:
                time.sleep(0.01)
            number = signal.SIGKILL

    def drop(self, run):
        """Stop a run whose result is not wanted any more."""
        self.stop(run)
        self.processes.pop(run, None)
        for checkpoint in run.place(self.folder).glob("runs/*/checkpoint.pt"):
            checkpoint.unlink()

    def close(self, kill):
        for process in filter(None, self.processes.values()):
            if kill:
                process.kill()
            process.wait()


def evaluations_of(place):
    """The evaluations that a run has printed: [(step, return)], each step once."""
    lines = lines_of(place) if (place / "log.txt").exists() else []
    found = [match for line in lines if (match := EVALUATED.search(line))]
    return [*{int(m[2].replace(",", "")): float(m[3]) for m in found}.items()]


def result_of(place, total_timesteps, goal):
    """The result of a run that is not running any more; None if it has not come to its end.

    Returns a dict: evaluations: [step, return, seconds of training or None]; solved: steps and
    seconds until its --stop-return, or None; error: the line with which it gave up, or None.
    """
    lines = lines_of(place) if (place / "log.txt").exists() else []
    evaluations = evaluations_of(place)
    error = next((line for line in lines if GAVE_UP.search(line)), None)
    match = next((found for line in lines if (found := SOLVED.search(line))), None)
    solved = [int(match[3]), float(match[4])] if match else None
    last = max((step for step, _ in evaluations), default=-1)
    at_goal = goal is not None and any(value >= goal for _, value in evaluations)
    if not (error or at_goal or last >= (solved[0] if solved else total_timesteps)):
        return None
    exact, hours = {}, []  # what was printed is rounded
    for folder in place.glob("runs/*"):
        events = events_of(folder)
        tags = events.Tags()["scalars"]
        if "eval/episodic_return" in tags:
            exact = {e.step: round(e.value, 4) for e in events.Scalars("eval/episodic_return")}
        if "charts/hours" in tags:
            hours = [(e.step, e.value) for e in events.Scalars("charts/hours")]
    rows = []
    for step, value in evaluations:
        seconds = max((3600 * hour for at, hour in hours if at <= step), default=None)
        rows.append([step, exact.get(step, value), seconds and round(seconds, 2)])
    return {"evaluations": rows, "solved": solved, "error": error}


def work(tasks, jobs):
    """Carry out tasks, `jobs` at a time. Each is a generator that yields while it has to wait."""
    tasks, active = iter(tasks), []
    while True:
        while len(active) < jobs and (task := next(tasks, None)):
            active.append(task)
        if not active:
            return
        for task in list(active):
            if next(task, "ended") == "ended":
                active.remove(task)
        time.sleep(0.1)


# ---- The objective -------------------------------------------------------------------------------


class Objective(NamedTuple):
    """What a search improves. `goal`: the return to reach, in an evaluation if `by_evaluation`,
    else in the mean of 100 training episodes (--stop-return); None for final and mean."""

    name: str
    goal: float | None
    by_evaluation: bool
    aggregate: str
    total_timesteps: int
    n_evaluations: int

    @property
    def direction(self):
        return OBJECTIVES[self.name][1]

    @property
    def sign(self):
        """1 if larger values are better, else -1."""
        return 1 if self.direction == "maximize" else -1

    @property
    def stops_at(self):
        """The goal, if a run of the search ends once an evaluation reaches it."""
        return self.goal if self.by_evaluation else None

    def reached(self, result):
        """Steps and seconds until the goal, or None."""
        if not self.by_evaluation:
            return result["solved"]
        rows = result["evaluations"]
        return next(([step, time] for step, value, time in rows if value >= self.goal), None)

    def value(self, result):
        """The value of one run; NaN if it gave up before it had one, see `values`."""
        returns = [value for _, value, _ in result["evaluations"]]
        if self.goal is None:
            if result["error"] or not returns:
                return math.nan
            return returns[-1] if self.name == "final" else float(np.mean(returns))
        found = self.reached(result)
        if self.name == "steps":
            return found[0] if found else PENALTY * self.total_timesteps
        if result["error"]:
            return math.nan
        seconds = found[1] if found else result["evaluations"][-1][2]
        if seconds is None:
            sys.exit("error: --objective seconds: the runs do not log charts/hours; use steps.")
        return seconds if found else PENALTY * seconds

    def values(self, groups):
        """The values of groups of results. A run that gave up counts as the worst of all: as the
        lowest evaluation, or the longest time."""
        values = [[self.value(result) for result in group] for group in groups]
        everything = np.concatenate(values)
        if self.goal is None:
            results = itertools.chain(*groups)
            worst = min((v for r in results for _, v, _ in r["evaluations"]), default=math.nan)
        else:
            worst = np.nanmax(everything, initial=0)
        return [[worst if math.isnan(x) else x for x in group] for group in values]

    def combine(self, values):
        """The value of several seeds."""
        return float(AGGREGATES[self.aggregate](np.asarray(values, float), axis=0))

    def progress(self, seeds):
        """What the pruner compares: mean over seeds, the last one not at its end yet.

        `seeds`: lists of returns of evaluations. With a goal it is the mean of a run's evaluations
        so far, cut at the goal; each evaluation after the end of the run is at the goal.
        """
        if self.goal is not None:
            seeds = [np.minimum(returns, self.goal) for returns in seeds]
        last = self.name == "final"
        return self.sign * float(np.mean([r[-1] if last else np.mean(r) for r in seeds]))

    def padded(self, returns):
        """The returns of a run that ended at its goal, as if it had gone on and stayed there."""
        return returns + [self.goal] * (self.n_evaluations - len(returns))

    def text(self, value):
        return f"{value:,.0f}" if self.name == "steps" else f"{value:,.1f}"

    def describe(self):
        if self.goal is None:
            return {"final": "final evaluation", "mean": "mean of the evaluations"}[self.name]
        by = "an evaluation" if self.by_evaluation else "the last 100 training episodes"
        return f"{self.name} until {by} reached {self.goal:g}"


# ---- The search ----------------------------------------------------------------------------------


class Search:
    """Optuna's study in study.db, and what its trials need."""

    def __init__(self, args, arguments, space, objective, runs):
        self.args, self.arguments, self.space = args, arguments, space
        self.objective, self.runs = objective, runs
        pruner = optuna.pruners.NopPruner()
        if args.pruner == "hyperband":
            resource = objective.n_evaluations * len(args.seeds)
            pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=resource)
        self.study = optuna.create_study(
            storage=f"sqlite:///{runs.folder.resolve() / 'study.db'}",
            study_name=args.script,
            direction=objective.direction,
            pruner=pruner,
            load_if_exists=True,
        )
        self.begin, self.finished_before = time.monotonic(), len(self.trials(*FINISHED))

    def trials(self, *states):
        return self.study.get_trials(deepcopy=False, states=states or None)

    def tasks(self):
        """First the trials that a kill has interrupted, then new ones."""
        for trial in self.trials(TrialState.RUNNING):
            self.study.sampler = self.sampler(trial.number)
            yield self.prepare(optuna.trial.Trial(self.study, trial._trial_id))  # as ask() does
        points = grid_of(self.space, self.args.sampler_seed) if self.args.sampler == "grid" else []
        defaults = {name: default_of(self.arguments[name]) for name in self.space}
        while True:
            waiting = len(self.trials(TrialState.WAITING))  # enqueued before a kill
            number = len(self.trials()) - waiting
            if number >= self.args.trials:
                return
            if points and not waiting:
                self.study.enqueue_trial(points[number])
            elif number == 0 and not waiting:
                if all(contains(self.space[name], value) for name, value in defaults.items()):
                    self.study.enqueue_trial(defaults)
            self.study.sampler = self.sampler(number)
            yield self.prepare(self.study.ask())

    def sampler(self, number):
        """A new sampler for each trial, so that a killed search proposes what it would have."""
        seed = int(np.random.default_rng((self.args.sampler_seed, number)).integers(2**31))
        if self.args.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, constant_liar=self.args.jobs > 1)
        if self.args.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return optuna.samplers.RandomSampler(seed=seed)

    def prepare(self, trial):
        """Draw the arguments of a trial that have not been drawn yet. -> the task"""
        for name, distribution in self.space.items():
            if isinstance(distribution, CategoricalDistribution):
                trial.suggest_categorical(name, distribution.choices)
            elif isinstance(distribution, IntDistribution):
                trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
            else:
                trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
        return self.carry_out(trial)

    def run_of(self, params, seed):
        flags = flags_of(params, self.arguments)
        return TrialRun(self.args.script, self.args.env_id, seed, flags)

    def is_twin(self, other, trial):
        """Whether an earlier trial has the same command line."""
        same = flags_of(other.params, self.arguments) == flags_of(trial.params, self.arguments)
        return same and other.number < trial.number

    def carry_out(self, trial):
        """A task for `work`: the seeds of a trial, one after the other, until it is pruned."""
        runs = [self.run_of(trial.params, seed) for seed in self.args.seeds]
        reported = {**self.study.trials[trial.number].intermediate_values}
        while any(self.is_twin(twin, trial) for twin in self.trials(TrialState.RUNNING)):
            yield  # for its result, so that no run is made twice
        for twin in self.trials(TrialState.PRUNED):
            if self.is_twin(twin, trial):
                for step, value in twin.intermediate_values.items():
                    trial.report(value, step)
                return self.prune(trial, runs, twin.user_attrs.get("error"))
        if "pruned" in trial.user_attrs:  # a kill came before the end of its runs
            return self.prune(trial, runs)
        curves, n = [], self.objective.n_evaluations
        for i, run in enumerate(runs):
            curves.append([])
            for returns in self.runs.follow(run, self.objective.stops_at):
                result = self.runs.result(run)
                if result and self.objective.goal is not None and self.objective.reached(result):
                    returns = self.objective.padded(returns)
                for k in range(len(curves[-1]), min(len(returns), n)):
                    curves[-1] = returns[: k + 1]
                    step = i * n + k + 1
                    if step not in reported:
                        trial.report(self.objective.progress(curves), step)
                        if trial.should_prune():
                            return self.prune(trial, runs)
                yield
            if error := self.runs.result(run)["error"]:
                if not run.arguments:
                    sys.exit(f"{error}\nerror: the script refuses its defaults, or diverges.")
                return self.prune(trial, runs, error)
        values = [self.objective.value(self.runs.result(run)) for run in runs]
        value = self.objective.combine(values)
        self.study.tell(trial, value)
        self.say(trial, self.objective.text(value))

    def prune(self, trial, runs, error=None):
        """End a trial without a value; it gave up with `error`, or it is worse than others."""
        trial.set_user_attr("pruned", True)
        if error:
            trial.set_user_attr("error", error)
        for run in runs:
            self.runs.drop(run)
        self.study.tell(trial, state=TrialState.PRUNED)
        evaluations = len(self.study.trials[trial.number].intermediate_values)
        self.say(trial, error or f"pruned after {evaluations} evaluations")

    def say(self, trial, text):
        complete, n = self.trials(TrialState.COMPLETE), len(self.trials(*FINISHED))
        line = f"trial {trial.number}: {text}"
        if complete:
            best = self.study.best_trial
            line += f"; best {self.objective.text(best.value)} (trial {best.number})"
        line += f"; {n} of {self.args.trials} trials"
        if n < self.args.trials:
            each = (time.monotonic() - self.begin) / (n - self.finished_before)
            line += f", about {each * (self.args.trials - n) / 60:.0f} min left"
        print(line, flush=True)

    def measure(self, settings, seeds):
        """Train settings on seeds, to the end. -> for each setting the results of its seeds"""
        runs = [[self.run_of(params, seed) for seed in seeds] for params in settings]
        todo = [run for run in itertools.chain(*runs) if not self.runs.result(run)]
        work([self.told(run) for run in todo], self.args.jobs)
        return [[self.runs.result(run) for run in group] for group in runs]

    def told(self, run):
        yield from self.runs.follow(run)
        print(f"{run}: ended", flush=True)

    def winner(self):
        """The best trial: of --finalists trials the one that is best with more seeds, too."""
        complete = self.trials(TrialState.COMPLETE)
        if not complete:
            found = [trial.user_attrs.get("error") for trial in self.trials(TrialState.PRUNED)]
            reason = next(filter(None, found), "all were pruned")
            sys.exit(f"error: no trial came to its end, {reason}")
        ranked = {}  # the first of equal trials
        for trial in sorted(complete, key=lambda trial: -self.objective.sign * trial.value):
            ranked.setdefault(flags_of(trial.params, self.arguments), trial)
        finalists = [*ranked.values()][: self.args.finalists]
        if len(finalists) == 1:
            return finalists[0], {}
        seeds = [*self.args.seeds, *self.args.finalist_seeds]
        print(f"{len(finalists)} finalists on seeds {spaced(self.args.finalist_seeds)}", flush=True)
        self.measure([trial.params for trial in finalists], self.args.finalist_seeds)
        results = self.measure([trial.params for trial in finalists], seeds)
        combined = [self.objective.combine(x) for x in self.objective.values(results)]
        best = max(range(len(finalists)), key=lambda i: self.objective.sign * combined[i])
        return finalists[best], {t.number: value for t, value in zip(finalists, combined)}


FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def grid_of(space, seed):
    """All combinations of the choices, in a random order."""
    points = itertools.product(*(distribution.choices for distribution in space.values()))
    points = [dict(zip(space, values)) for values in points]
    random.Random(seed).shuffle(points)
    return points


def default_of(argument):
    """The default as a trial would have it."""
    return text_of(argument.default) if argument.kind is tuple else argument.default


def spaced(items):
    return " ".join(map(str, items))


def improvement_of(objective, best, defaults):
    """How much better `best` is, and its 95% percentile bootstrap interval.

    `best`, `defaults`: the values of held-out seeds. Both are resampled on their own: the same seed
    does not make two settings see the same episodes.
    """
    rng = np.random.default_rng(0)
    draws = []
    for values in (best, defaults):
        values = np.asarray(values, float)
        draws.append(values[rng.integers(len(values), size=(len(values), RESAMPLES))])
    best_draws, default_draws = (AGGREGATES[objective.aggregate](x, axis=0) for x in draws)
    low, high = np.percentile(objective.sign * (best_draws - default_draws), [2.5, 97.5])
    found = objective.sign * (objective.combine(best) - objective.combine(defaults))
    return found, float(low), float(high)


# ---- The report ----------------------------------------------------------------------------------


def trials_of(search):
    """The search, as it goes into the report and its files."""
    found = []
    for trial in search.trials(*FINISHED):
        complete, error = trial.state == TrialState.COMPLETE, trial.user_attrs.get("error")
        found.append(
            {
                "trial": trial.number,
                "state": "complete" if complete else "gave up" if error else "pruned",
                "value": trial.value if complete else None,
                "params": trial.params,
                "flags": [*flags_of(trial.params, search.arguments)],
                "evaluations": len(trial.intermediate_values),
                "error": error,
            }
        )
    return found


def command_of(args, flags):
    env = ["--env-id", args.env_id] if args.env_id else []
    return quote(["python", f"algos/{args.script}.py", *env, *args.flags, *flags])


def report_of(args, env_id, space, arguments, objective, found):
    """The report, in Markdown. `found`: trials, best (its trial), finalists, held_out"""
    trials, best, name = found["trials"], found["best"], AGGREGATE_NAMES[args.aggregate]
    seeds = f"{len(args.held_out_seeds)} held-out seeds"
    lines = [f"# Search over {args.script} on {env_id}", ""]
    if found["held_out"]:
        tuned, defaults = found["held_out"]["best"], found["held_out"]["defaults"]
        better, low, high = found["improvement"]
        text = objective.text
        values = [objective.combine(side["values"]) for side in (tuned, defaults)]
        unit, share = "", ""
        if objective.goal is not None:
            unit, share = f" {objective.name}", f", {better / values[1]:.0%} of the defaults'"
        lines += [
            f"On {seeds} the best trial has {text(values[0])} and the defaults {text(values[1])}, "
            f"{objective.describe()}: an improvement of {text(better)}{unit} "
            f"(95% interval {text(low)} to {text(high)}){share}."
        ]
        if low <= 0 <= high:
            lines += ["", "The interval contains 0: no difference to the defaults is shown."]
    else:
        lines += ["The script's defaults are the best trial: nothing better was found."]
    lines += ["", "The best command line:", "", "```bash", command_of(args, best["flags"]), "```"]
    if found["held_out"]:
        head = [f"on {seeds}", f"{name} (95% interval)", "lowest to highest"]
        head += [] if objective.goal is None else [f"reach {objective.goal:g}"]
        head += ["final evaluations", "on the search's seeds"]
        lines += ["", table_row(head), table_row(["---", *["---:"] * (len(head) - 1)])]
        for label, side in found["held_out"].items():
            low, high = bootstrap_interval(side["values"], statistic=AGGREGATES[args.aggregate])
            ends = f"{text(min(side['values']))} to {text(max(side['values']))}"
            label = f"trial {best['trial']}" if label == "best" else label
            cells = [label, f"{text(objective.combine(side['values']))} "]
            cells[-1] += f"({text(low)} to {text(high)})"
            cells += [ends]
            if objective.goal is not None:
                cells += [f"{sum(map(bool, side['reached']))} of {len(side['values'])}"]
            final = [value for value in side["final"] if value is not None]
            cells += [f"{min(final):.1f} to {max(final):.1f}" if final else "none"]
            same = [
                t["value"] for t in trials if t["flags"] == side["flags"] and t["value"] is not None
            ]
            cells += [text(same[0]) if same else "not measured"]
            lines.append(table_row(cells))
    lines += ["", f"![search]({FIGURE}.png)", ""]
    order = sorted(
        (trial for trial in trials if trial["value"] is not None),
        key=lambda trial: -objective.sign * trial["value"],
    )
    head = ["trial", f"{objective.describe()}, {name} of {len(args.seeds)} seeds"]
    head += ["with the finalists' seeds"] * bool(found["finalists"])
    lines += [table_row([*head, *space])]
    lines += [table_row(["---:"] * (len(head) + len(space)))]
    for trial in order[:10]:
        cells = [str(trial["trial"]), objective.text(trial["value"])]
        if found["finalists"]:
            value = found["finalists"].get(trial["trial"])
            cells += ["" if value is None else objective.text(value)]
        lines += [table_row([*cells, *(text_of(trial["params"][name]) for name in space)])]
    states = [trial["state"] for trial in trials]
    counts = [f"{states.count(x)} {x}" for x in ("complete", "pruned", "gave up") if x in states]
    lines += ["", f"{len(trials)} trials: {', '.join(counts)}. The table has the best ten."]
    lines += ["trials.csv, runs.csv and evaluations.csv contain all.", ""]
    lines += [table_row(["argument", "default", "searched"]), table_row(["---"] * 3)]
    for key, distribution in space.items():
        cells = [key, text_of(arguments[key].default), describe_range(distribution)]
        lines.append(table_row(cells))
    lines += [
        "",
        f"Optuna {optuna.__version__}; sampler: {args.sampler}, seed {args.sampler_seed}; "
        f"pruner: {args.pruner}. Seeds of the search: {spaced(args.seeds)}; "
        + (f"of the finalists: {spaced(args.finalist_seeds)}; " if found["finalists"] else "")
        + f"held out: {spaced(args.held_out_seeds)}. {args.jobs} "
        + ("runs" if args.jobs > 1 else "run")
        + " at a time.",
    ]
    if objective.goal is not None:
        end = " Runs of the search end there, held-out runs do not." * objective.by_evaluation
        lines[-1] += f" A run that never reaches the goal counts {PENALTY} times its length.{end}"
    lines[-1] += f" Intervals: percentile bootstrap over the seeds, {RESAMPLES:,} resamples."
    return "\n".join(lines)


FIGURE = "search"


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
            ax.set_xscale("log" if space[name].log else "linear")
            ax.set_xlim(space[name].low, space[name].high)
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
    ax.step(numbers, best(values), where="post", color=OWN, linewidth=2)
    ax.plot(others, [0.02] * len(others), "|", color=TEXT, transform=ax.get_xaxis_transform())
    ax.set_xlim(-0.5, max(trial["trial"] for trial in trials) + 0.5)
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
        ends = [[middle - low], [high - middle]]
        ax.errorbar(x + 0.3, middle, yerr=ends, fmt="o", color=colour, capsize=4)
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
        [t["trial"], t["state"], t["value"], t["evaluations"], *t["params"].values(), t["error"]]
        for t in found["trials"]
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


# ---- The command line ----------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--script", required=True, help="file in algos/, without .py")
    add("--env-id", help="default: the script's own")
    add("--list", action="store_true", help="show the arguments that can be searched, and end")
    add("--search", nargs="+", default=[], metavar="NAME[=RANGE]",
        help="NAME=A,B,C or NAME=LOW..HIGH[:log][:POINTS]; NAME: a range around its default; "
        "default: all arguments that have such a range")  # fmt: skip
    add("--objective", choices=OBJECTIVES, help="default: steps with a goal, else mean")
    add("--goal", type=float, help="return of an evaluation to reach, for steps and seconds")
    add("--trials", type=int, help="trials in all (default: 20; a grid: all its points)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of each trial")
    add("--aggregate", choices=AGGREGATES, default="iqm", help="over seeds; of three, iqm is mean")
    add("--sampler", choices=("tpe", "random", "grid", "cmaes"), default="tpe")
    add("--sampler-seed", type=int, default=0)
    add("--pruner", choices=("none", "hyperband"), default="none")
    add("--finalists", type=int, default=1, help="best trials that --finalist-seeds choose from")
    add("--finalist-seeds", type=int, nargs="+", default=[*range(51, 56)])
    add("--held-out-seeds", type=int, nargs="+", default=[*range(101, 111)],
        help="for the best trial and the defaults")  # fmt: skip
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--study", type=Path, help="folder that keeps the study (default: none does)")
    add("--record", type=Path, help="folder of the record")
    add("flags", nargs="*", help="after --: flags of all runs")
    args = parser.parse_args()
    check_options(args)
    return args


def check_options(args):
    """Exit with one line if the options do not make sense."""
    there = sorted(file.stem for file in (ROOT / "algos").glob("*.py"))
    if args.script not in there:
        sys.exit(f"error: --script {args.script}: not in algos/; there are: {', '.join(there)}")
    for name in ("trials", "jobs", "finalists"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            sys.exit(f"error: --{name} must be 1 or more")
    seeds = [*args.seeds, *args.finalist_seeds, *args.held_out_seeds]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        sys.exit(
            f"error: seed {twice[0]} is given twice: --seeds, --finalist-seeds and "
            "--held-out-seeds must differ"
        )
    taken = {"--seed": "--seeds", "--env-id": "--env-id before the --"}
    taken |= dict.fromkeys(("--resume", "--evaluate"), "--study, which resumes")
    for flag in (word.split("=")[0].replace("_", "-") for word in args.flags):
        if flag in taken:
            sys.exit(f"error: {flag} after --: use {taken[flag]}")


def objective_of(args, script_args):
    """The objective. Exits with one line if the options and the script's arguments do not fit."""
    stop_return = getattr(script_args, "stop_return", None)
    goal = stop_return if args.goal is None else args.goal
    name = args.objective or ("mean" if goal is None else "steps")
    if name in ("steps", "seconds") and goal is None:
        sys.exit(f"error: --objective {name} needs --goal RETURN (or --stop-return after --)")
    if name in ("final", "mean") and args.goal is not None:
        sys.exit(f"error: --goal is for --objective steps and seconds, not {name}")
    if not script_args.eval_episodes:
        sys.exit("error: --eval-episodes after -- must be positive: a search needs evaluations")
    total, every = script_args.total_timesteps, script_args.eval_frequency
    n = math.ceil(total / every) if every else 1
    if args.pruner == "hyperband" and n * len(args.seeds) < 3:
        sys.exit(
            "error: --pruner hyperband needs more evaluations: lower --eval-frequency after --"
        )
    goal = goal if name in ("steps", "seconds") else None
    return Objective(name, goal, args.goal is not None, args.aggregate, total, n)


def space_of(args, arguments):
    """The search space. Exits with one line if --search is wrong."""
    try:
        space = parse_search(args.search, arguments, args.sampler == "grid")
    except ValueError as e:
        sys.exit(f"error: {e}")
    given = {word.split("=")[0].replace("_", "-").replace("--no-", "--") for word in args.flags}
    for name in space:
        if f"--{name.replace('_', '-')}" in given:
            sys.exit(f"error: {name} is searched, and given after --")
    if args.sampler == "cmaes":
        ranges = [x for x in space.values() if not isinstance(x, CategoricalDistribution)]
        if len(ranges) < 2:
            sys.exit("error: --sampler cmaes needs two ranges or more, such as gamma=0.9..0.999")
        if importlib.util.find_spec("cmaes") is None:
            sys.exit("error: --sampler cmaes needs its package; run `pip install '.[tune]'` first.")
    size = math.prod(len(x.choices) for x in space.values()) if args.sampler == "grid" else math.inf
    args.trials = int(min(args.trials or (20 if size == math.inf else size), size))
    return space


def show_arguments(arguments):
    print(table_row(["argument", "default", "range if only its name is given"]))
    print(table_row(["---"] * 3))
    for name, argument in arguments.items():
        if name not in FIXED:
            distribution = automatic_range(argument)
            text = describe_range(distribution) if distribution else "none: give its values"
            print(table_row([name, text_of(argument.default), text]))


def main():
    args = parse_args()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    env = ["--env-id", args.env_id] if args.env_id else []
    arguments, script_args = load_script(args.script, [*env, *args.flags])
    if args.list:
        return show_arguments(arguments)
    objective, space = objective_of(args, script_args), space_of(args, arguments)
    if args.record or args.study:
        try:
            pyplot()
        except ImportError:
            sys.exit("error: the figure needs matplotlib; run `pip install '.[tune]'` first.")
    commit = clean_commit() if args.record else commit_of(str(ROOT))
    with contextlib.ExitStack() as stack:
        folder = args.study
        if folder:
            keys = ("script", "env_id", "flags", "seeds", "objective", "goal", "aggregate")
            same = {key: getattr(args, key) for key in (*keys, "sampler", "sampler_seed", "pruner")}
            same["search"] = {name: describe_range(x) for name, x in space.items()}
            check_study(folder, {"commit": commit, **same}, "--study")
            lock = locked(folder)
            if not lock:
                sys.exit(f"error: another call of this tool is at work in {folder}.")
            stack.enter_context(lock)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cleanq-tune-")))
        runs = Runs(folder, args.flags, script_args.total_timesteps, keep=bool(args.study))
        search = Search(args, arguments, space, objective, runs)
        try:
            found = find(search)
        except KeyboardInterrupt:  # it reached the runs, too, which save a checkpoint
            runs.close(kill=not args.study)
            sys.exit("\nstopped; the same command goes on." if args.study else "\nstopped.")
        finally:
            if not args.study:
                runs.close(kill=True)
        report = report_of(args, script_args.env_id, space, arguments, objective, found)
        print(report)
        title = f"{args.script} on {script_args.env_id}"
        if args.record:
            write_record(args.record, {"options": options_of(args), **found}, report, commit)
        for place in filter(None, (args.study, args.record)):
            write_tables(place, search, space, found)
            figure = draw(space, objective, found, title)
            for kind in ("png", "svg"):
                figure.savefig(place / f"{FIGURE}.{kind}", bbox_inches="tight")


def options_of(args):
    return {key: value for key, value in vars(args).items() if key not in ("study", "record")}


def find(search):
    """Search, and compare the best trial with the defaults on the held-out seeds."""
    args, objective = search.args, search.objective
    done = len(search.trials(*FINISHED))
    if done:
        print(f"{done} of {args.trials} trials are done already", flush=True)
    work(search.tasks(), args.jobs)
    best, finalists = search.winner()
    trials = trials_of(search)
    found = {"trials": trials, "finalists": finalists, "held_out": {}, "improvement": None}
    found["best"] = next(trial for trial in trials if trial["trial"] == best.number)
    if not found["best"]["flags"]:
        return found
    print(f"trial {best.number} and the defaults on {len(args.held_out_seeds)} held-out seeds")
    results = search.measure([best.params, {}], args.held_out_seeds)
    values = objective.values(results)
    for name, flags, group, numbers in zip(
        ("best", "defaults"), (found["best"]["flags"], []), results, values
    ):
        found["held_out"][name] = {
            "flags": flags,
            "values": numbers,
            "reached": [objective.goal is not None and objective.reached(x) for x in group],
            "final": [x["evaluations"][-1][1] if x["evaluations"] else None for x in group],
            "errors": [x["error"] for x in group],
        }
    found["improvement"] = improvement_of(objective, *values)
    return found


if __name__ == "__main__":
    main()
