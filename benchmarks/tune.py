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
import importlib.util
import itertools
import math
import random
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from figures import pyplot
from machine import ROOT, clean_commit, commit_of, write_record
from train import check_same, check_source, locked, table_row

try:
    import optuna
except ImportError:
    sys.exit("error: tune.py needs Optuna; run `pip install '.[tune]'` first.")
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import TrialState
from tune_objective import AGGREGATES, OBJECTIVES, Objective, improvement_of
from tune_report import FIGURE, draw, report_of, spaced, write_tables
from tune_runs import Runs, TrialRun, work
from tune_space import (
    FIXED,
    automatic_range,
    contains,
    default_of,
    describe_range,
    flags_of,
    load_script,
    parse_search,
    text_of,
)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Search:
    """Optuna's study in study.db, and what its trials need."""

    def __init__(self, args, arguments, space, objective, runs):
        self.args, self.arguments, self.space = args, arguments, space
        self.objective, self.runs = objective, runs
        pruner = optuna.pruners.NopPruner()
        if args.pruner == "hyperband":
            resource = objective.n_evaluations * len(args.seeds)
            pruner = optuna.pruners.HyperbandPruner(args.prune_after, resource)
        self.study = optuna.create_study(
            storage=f"sqlite:///{runs.folder.resolve() / 'study.db'}",
            study_name=args.script,
            direction=objective.direction,
            pruner=pruner,
            load_if_exists=True,
        )

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
        reported = set(self.trials()[trial.number].intermediate_values)
        while any(self.is_twin(twin, trial) for twin in self.trials(TrialState.RUNNING)):
            yield  # for its result, so that no run is made twice
        for twin in self.trials(TrialState.PRUNED):
            if self.is_twin(twin, trial):
                for step in twin.intermediate_values.keys() - reported:
                    trial.report(twin.intermediate_values[step], step)
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
        evaluations = len(self.trials()[trial.number].intermediate_values)
        self.say(trial, error or f"pruned after {evaluations} evaluations")

    def say(self, trial, text):
        complete, n = self.trials(TrialState.COMPLETE), len(self.trials(*FINISHED))
        line = f"trial {trial.number}: {text}"
        if complete:
            best = self.study.best_trial
            line += f"; best {self.objective.text(best.value)} (trial {best.number})"
        line += f"; {n} of {self.args.trials} trials"
        if n < self.args.trials:
            each = np.median([t.duration.total_seconds() for t in self.trials(*FINISHED)])
            left = each * (self.args.trials - n) / self.args.jobs
            line += f", about {left / 60:.0f} min left"
        print(line, flush=True)

    def measure(self, settings, seeds):
        """Train settings on seeds, to the end. -> for each setting the results of its seeds"""
        runs = [[self.run_of(params, seed) for seed in seeds] for params in settings]
        todo = [run for run in itertools.chain(*runs) if not self.runs.result(run)]
        work([self.told(run) for run in todo], self.args.jobs)
        return [[self.runs.result(run) for run in group] for group in runs]

    def told(self, run):
        yield from self.runs.follow(run)
        result = self.runs.result(run)
        text = result["error"] or self.objective.text(self.objective.value(result))
        print(f"{run}: {text}", flush=True)

    def winner(self):
        """The best trial: of --finalists trials the one that is best with more seeds, too."""
        complete = self.trials(TrialState.COMPLETE)
        if not complete:
            found = [trial.user_attrs.get("error") for trial in self.trials(TrialState.PRUNED)]
            reason = next(filter(None, found), "all were pruned")
            sys.exit(f"error: no trial came to its end: {reason}")
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


def grid_of(space, seed):
    """All combinations of the choices, in a random order."""
    points = itertools.product(*(distribution.choices for distribution in space.values()))
    points = [dict(zip(space, values)) for values in points]
    random.Random(seed).shuffle(points)
    return points


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
    add("--prune-after", type=int, default=1, help="evaluations before the pruner first compares")
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
    for name in ("trials", "jobs", "finalists", "prune_after"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            sys.exit(f"error: --{name.replace('_', '-')} must be 1 or more")
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
    if args.pruner == "hyperband" and n * len(args.seeds) < 3 * args.prune_after:
        sys.exit(
            f"error: --pruner hyperband needs more evaluations than {n * len(args.seeds)} a trial: "
            "lower --eval-frequency after --, or --prune-after"
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
        pyplot()  # exits here if it is missing, not after the search
    check_source(args.script)
    commit = clean_commit() if args.record else commit_of(str(ROOT))
    with contextlib.ExitStack() as stack:
        folder = args.study
        if folder:
            keys = ("script", "env_id", "flags", "seeds", "objective", "goal", "aggregate")
            keys += ("sampler", "sampler_seed", "pruner", "prune_after")
            same = {key: getattr(args, key) for key in keys}
            same["search"] = [[name, describe_range(x)] for name, x in space.items()]  # in order
            check_same(folder, {"commit": commit, **same}, "--study")
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
