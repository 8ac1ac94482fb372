"""The search space of tune.py: a script's arguments, their ranges, and a trial's command line."""

import contextlib
import importlib.util
import math
import os
import re
import sys
import types
import typing
from typing import Literal, NamedTuple

import numpy as np
from machine import ROOT
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

# These arguments define the task, so that they are the same in all trials.
FIXED = ("env_id", "seed", "total_timesteps")


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


def default_of(argument):
    """The default as a trial would have it."""
    return text_of(argument.default) if argument.kind is tuple else argument.default
