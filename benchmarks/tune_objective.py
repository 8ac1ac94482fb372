"""What tune.py improves: the value of a run, of several seeds, and how much better a trial is."""

import itertools
import math
import sys
from typing import NamedTuple

import numpy as np
from train import RESAMPLES, interquartile_mean

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
        # As printed, with one decimal: that is what ended the run.
        rows = ([step, time] for step, x, time in result["evaluations"] if round(x, 1) >= self.goal)
        return next(rows, None)

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
