"""benchmarks/tune.py: search spaces, samplers, pruning, resuming after kills, held-out seeds."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from test_benchmarks import NO_GIT, git, make_repository

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
optuna = pytest.importorskip("optuna")

# A script with the command line, the output, the checkpoints and the logs of those in algos/, but
# without training: it learns fastest with a learning rate of 0.01. It refuses to run beside another
# process of the same run, and writes down every step.
SCRIPT = """
import math, os, pathlib, signal, sys, time, typing
from dataclasses import dataclass
from typing import Literal


@dataclass
class Args:
    env_id: str = "Toy-v1"
    seed: int = 1
    total_timesteps: int = 40
    learning_rate: float = 1e-3
    gamma: float = 0.99
    batch_size: int = 32
    loss: Literal["mse", "huber"] = "mse"
    double: bool = False
    hidden_sizes: tuple[int, ...] = (120, 84)
    v_min: float | None = None
    max_grad_norm: float = 0.0


@dataclass
class RunArgs(Args):
    eval_frequency: int = 10
    eval_episodes: int = 5
    stop_return: float | None = None
    checkpoint_replay: bool = False
    resume: str | None = None
    seconds: float = 0.0  # per step
    tensorboard: bool = False


def parse_args():  # tyro would do, but takes half a second
    args, words, types = RunArgs(), sys.argv[1:], typing.get_type_hints(RunArgs)
    while words:
        name = words.pop(0)[2:].replace("-", "_")
        values = [words.pop(0) for _ in range(len(words)) if not words[0].startswith("--")]
        if not values:
            setattr(args, name.removeprefix("no_"), not name.startswith("no_"))
        elif types[name] == tuple[int, ...]:
            setattr(args, name, tuple(map(int, values)))
        else:
            kind = types[name] if types[name] in (int, float) else str
            kind = float if name in ("v_min", "stop_return") else kind
            setattr(args, name, kind(*values))
    return args


def main(args):
    if args.tensorboard:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

    pids = pathlib.Path("pids")
    for pid in pids.read_text().split() if pids.exists() else ():
        command = pathlib.Path("/proc", pid, "cmdline")  # empty: it has ended, nobody asked how
        assert not command.exists() or not command.read_text(), "this run is running"
    pids.open("a").write(str(os.getpid()) + " ")
    if args.batch_size == 13:
        sys.exit("error: --batch-size must be another (it is 13).")
    if args.batch_size == 14:
        sys.exit("error: something else")
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    checkpoint = pathlib.Path(args.resume or f"runs/toy__{time.time_ns()}/checkpoint.pt")
    checkpoint.parent.mkdir(parents=True, exist_ok=bool(args.resume))
    step = int(checkpoint.read_text()) if args.resume else 0
    writer = EventFileWriter(str(checkpoint.parent)) if args.tensorboard else None

    def log(tag, value):
        if not writer:
            return
        value = Summary.Value(tag=tag, simple_value=value)
        writer.add_event(Event(step=step, summary=Summary(value=[value])))

    speed = 10 - 4 * abs(math.log10(args.learning_rate) + 2) + 0.1 * args.seed
    speed -= (args.loss == "huber") + 40 * abs(args.gamma - 0.97)
    while step < args.total_timesteps and not stop:
        step += 1
        pathlib.Path("steps").open("a").write(f"{step} ")
        pathlib.Path("new.pt").write_text(str(step))
        os.replace("new.pt", checkpoint)
        time.sleep(args.seconds)
        log("charts/hours", step / 3600)
        if step % args.eval_frequency == 0:
            score = step * speed
            log("eval/episodic_return", score)
            print(f"{args.env_id}, step {step}, evaluated: {score:.2f} +- 2.0 in 5 episodes")
    if stop and step < args.total_timesteps:
        print("go on with: python script.py --resume", checkpoint)
    if writer:
        writer.close()


if __name__ == "__main__":
    main(parse_args())
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_repository(tmp_path_factory, {"toy": SCRIPT})


def command(repository, *words):
    words = ("--script", "toy", "--seeds", 1, 2, "--held-out-seeds", 11, 12, *words)
    return [sys.executable, "-W", "ignore", repository / "benchmarks/tune.py", *map(str, words)]


def tune(repository, *words):
    return forked.run(command(repository, *words), cwd=repository, env=NO_GIT)


def trials_of(study):
    with open(study / "trials.csv") as file:
        return [*csv.DictReader(file)]


def runs_of(study):
    """{(folder of the flags, seed): the steps that were made}"""
    places = [steps.parent for steps in study.glob("runs/*/*/steps")]
    return {(p.parent.name, int(p.name)): (p / "steps").read_text().split() for p in places}


@pytest.fixture(scope="module")
def arguments(template):
    import tune_space

    tune_space.ROOT = template
    try:
        return tune_space.load_script("toy", [])[0]
    finally:
        tune_space.ROOT = ROOT


# ---- The search space ----------------------------------------------------------------------------


def test_ranges_follow_from_types_and_defaults(arguments):
    from tune_space import CategoricalDistribution, FloatDistribution, IntDistribution, parse_search

    names = ["learning_rate", "gamma", "batch_size", "loss", "double"]
    expected = {
        "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "gamma": FloatDistribution(0.96, 0.9975),
        "batch_size": IntDistribution(8, 128, log=True),
        "loss": CategoricalDistribution(("mse", "huber")),
        "double": CategoricalDistribution((False, True)),
    }
    assert parse_search(names, arguments, grid=False) == expected
    assert parse_search([], arguments, grid=False) == expected  # all that have a range


def test_a_fraction_stays_a_fraction():
    from tune_space import Argument, FloatDistribution, automatic_range

    for default, low, high in ((1.0, 0.25, 1.0), (0.4, 0.1, 1.0), (0.05, 0.0125, 0.2)):
        found = automatic_range(Argument("x", float, default))
        assert found == FloatDistribution(low, high, log=True)
    found = automatic_range(Argument("x", float, 10.0))
    assert found == FloatDistribution(2.5, 40.0, log=True)


@pytest.mark.parametrize(
    "word, low, high, log",
    [
        ("learning_rate=1e-4..1e-2:log", 1e-4, 1e-2, True),
        ("--learning-rate=0.1..0.5", 0.1, 0.5, False),
        ("batch_size=16..64:log", 16, 64, True),
        ("v_min=-10..-1", -10.0, -1.0, False),
        ("max_grad_norm=0..10", 0.0, 10.0, False),
    ],
)
def test_a_range_from_the_command_line(arguments, word, low, high, log):
    from tune_space import parse_search

    (found,) = parse_search([word], arguments, grid=False).values()
    assert (found.low, found.high, found.log) == (low, high, log)
    assert type(found.low) is type(low)


@pytest.mark.parametrize(
    "word, choices",
    [
        ("batch_size=32,64,128", (32, 64, 128)),
        ("learning_rate=1e-4..1e-2:log:3", (1e-4, 1e-3, 1e-2)),
        ("batch_size=10..30:3", (10, 20, 30)),
        ("max_grad_norm=0,10", (0.0, 10.0)),
        ("double=true,false", (True, False)),
        ("loss=huber,mse", ("huber", "mse")),
        ("hidden_sizes=64x64,120x84", ("64x64", "120x84")),
    ],
)
def test_choices_from_the_command_line(arguments, word, choices):
    from tune_space import parse_search

    (found,) = parse_search([word], arguments, grid=True).values()
    assert found.choices == choices
    assert [*map(type, found.choices)] == [*map(type, choices)]


@pytest.mark.parametrize(
    "word, message",
    [
        ("nix", "no such argument; there are learning_rate, gamma, batch_size, loss"),
        ("seed=1,2", "all trials have the same seed"),
        ("total_timesteps=1..3", "all trials have the same total_timesteps"),
        ("loss=mse,l1", "l1 is not mse or huber"),
        ("loss=1..3", "only numbers have a range"),
        ("batch_size=1.5..3", "1.5 is not a whole number"),
        ("batch_size=32..16", "the range is empty"),
        ("learning_rate=0..1:log", "starts above 0"),
        ("learning_rate=0..1:lag", "there may be :log and a number of points"),
        ("learning_rate=0..1:1", "there may be :log and a number of points"),
        ("learning_rate=0.1", "one value is no search"),
        ("learning_rate=nan..1", "nan is not a number"),
        ("double=1,0", "1 is not true or false"),
        ("hidden_sizes=64-64,3", "64-64 is not numbers such as 120x84"),
        ("v_min", "nothing follows from its default, None"),
        ("max_grad_norm", "nothing follows from its default, 0"),
    ],
)
def test_a_wrong_search_says_what_is_possible(arguments, word, message):
    from tune_space import parse_search

    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_search([word], arguments, grid=False)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_the_command_line_of_a_trial(arguments):
    """It has what differs from the defaults, in the script's own words."""
    from tune_space import flags_of

    defaults = {"learning_rate": 1e-3, "double": False, "hidden_sizes": "120x84", "loss": "mse"}
    assert flags_of(defaults, arguments) == ()
    params = {"learning_rate": 0.0123456, "double": True, "hidden_sizes": "64x32", "loss": "huber"}
    expected = "--learning-rate 0.01235 --double --hidden-sizes 64 32 --loss huber"
    assert flags_of(params, arguments) == tuple(expected.split())
    inverted = arguments | {"double": arguments["double"]._replace(default=True)}
    assert flags_of({"double": False}, inverted) == ("--no-double",)


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "algos").glob("*.py")))
def test_the_arguments_of_every_script(script):
    """All have a learning rate to search, and accept what an automatic range gives."""
    from tune_space import flags_of, load_script, parse_search

    if script.endswith("_atari"):
        pytest.importorskip("ale_py")
    arguments, args = load_script(script, [])
    space = parse_search([], arguments, grid=False)
    assert "learning_rate" in space and not {"seed", "env_id", "total_timesteps"} & {*space}
    search = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = search.ask(space)
    flags = flags_of(trial.params, arguments)
    assert load_script(script, flags)[1] != args  # the script parses them
    for name, value in trial.params.items():
        given = getattr(load_script(script, flags)[1], name)
        assert given == value or given == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--search", "nix"], "--search nix: no such argument"),
        (["--search", "loss", "loss"], "--search loss: given twice"),
        (["--objective", "steps"], "--objective steps needs --goal RETURN"),
        (["--objective", "final", "--goal", 3], "--goal is for --objective steps and seconds"),
        (["--held-out-seeds", 3, 1], "seed 1 is given twice"),
        (["--seeds", 3, 3], "seed 3 is given twice"),
        (["--trials", 0], "--trials must be 1 or more"),
        (["--sampler", "cmaes", "--search", "loss", "gamma"], "cmaes needs two ranges or more"),
        (["--search", "gamma", "--", "--gamma", 0.9], "gamma is searched, and given after --"),
        (["--", "--seed", 3], "--seed after --: use --seeds"),
        (["--", "--resume", "x"], "--resume after --: use --study"),
        (["--", "--eval-episodes", 0], "--eval-episodes after -- must be positive"),
        (["--pruner", "hyperband", "--seeds", 1, "--", "--eval-frequency", 0], "than 1 a trial"),
        (["--pruner", "hyperband", "--prune-after", 3], "than 8 a trial: lower"),
    ],
)
def test_wrong_options_are_one_line(repository, tmp_path, words, message):
    done = tune(repository, "--study", tmp_path / "study", *words)
    assert done.returncode != 0 and message in done.stderr and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not (tmp_path / "study").exists()


def test_the_list_of_arguments(repository):
    done = tune(repository, "--list")
    assert done.returncode == 0, done.stderr
    assert "| learning_rate | 0.001 | 0.0001 to 0.01, logarithmic |" in done.stdout
    assert "| v_min | None | none: give its values |" in done.stdout
    assert "seed" not in done.stdout.replace("--seed", "")


# ---- The search ----------------------------------------------------------------------------------

SPACE = ("--search", "learning_rate", "gamma=0.95..0.99", "loss")


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "grid"])
def test_a_search(repository, tmp_path, sampler):
    study = tmp_path / "study"
    words = ("--sampler", sampler, *SPACE, "--study", study, "--trials", 8, "--jobs", 4)
    done = tune(repository, *words)
    assert done.returncode == 0, done.stderr
    trials = trials_of(study)
    assert [int(trial["trial"]) for trial in trials] == [*range(8)]
    points = {(t["learning_rate"], t["gamma"], t["loss"]) for t in trials}
    assert len(points) == 8 and all(trial["state"] == "complete" for trial in trials)
    if sampler == "grid":
        assert {point[0] for point in points} == {"0.0001", "0.001", "0.01"}
    else:
        assert trials[0]["learning_rate"] == "0.001"  # the defaults come first
        assert all(1e-4 <= float(t["learning_rate"]) <= 1e-2 for t in trials)
        assert all(0.95 <= float(t["gamma"]) <= 0.99 for t in trials)
    # the mean of both seeds' evaluations, at steps 10 to 40
    for trial in trials:
        speed = 10.15 - 4 * abs(np.log10(float(f"{float(trial['learning_rate']):.4g}")) + 2)
        speed -= (trial["loss"] == "huber") + 40 * abs(float(f"{float(trial['gamma']):.4g}") - 0.97)
        assert float(trial["value"]) == pytest.approx(25 * speed, abs=0.01)
    best = max(trials, key=lambda trial: float(trial["value"]))
    assert f"| trial {best['trial']} | " in done.stdout
    assert "On 2 held-out seeds the best trial has" in done.stdout
    assert (study / "search.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (study / "search.svg").read_text()


def test_the_grid_is_complete_and_ends(repository, tmp_path):
    study = tmp_path / "study"
    search = ("--search", "learning_rate=1e-4..1e-2:log:3", "loss")
    done = tune(repository, "--sampler", "grid", *search, "--study", study, "--jobs", 3)
    assert done.returncode == 0, done.stderr
    points = [(t["learning_rate"], t["loss"]) for t in trials_of(study)]
    assert len(points) == 6 == len({*points})
    # the best point is known: 0.01 and mse, with 10.0 + 0.1 seed - 40 * 0.02
    assert "python algos/toy.py --learning-rate 0.01\n" in done.stdout
    assert "an improvement of 100.0 (95% interval" in done.stdout


def test_steps_to_the_goal(repository, tmp_path):
    """Runs of the search end at the goal, those on held-out seeds do not; a run that never comes
    there counts twice its length."""
    study = tmp_path / "study"
    search = ("--sampler", "grid", "--search", "learning_rate=1e-4,1e-3,1e-2", "--goal", 180)
    done = tune(repository, *search, "--study", study, "--", "--seconds", 0.02)
    assert done.returncode == 0, done.stderr
    values = {trial["learning_rate"]: float(trial["value"]) for trial in trials_of(study)}
    # returns at step 40, of both seeds: 52 and 56, 212 and 216, 372 and 376
    assert values == {"0.0001": 80, "0.001": 40, "0.01": 20}
    steps = {key: len(steps) for key, steps in runs_of(study).items()}
    best = {seed: n for (name, seed), n in steps.items() if n < 40}
    assert {*best} == {1, 2} and all(20 <= n < 40 for n in best.values())
    assert sorted({seed for _, seed in steps} - {1, 2}) == [11, 12]
    assert "the best trial has 20 and the defaults 30, steps until an evaluation" in done.stdout
    assert (
        "an improvement of 10 steps (95% interval 10 to 10), 33% of the defaults'." in done.stdout
    )
    assert "| defaults | 30 (30 to 30) | 30 to 30 | 2 of 2 | 252.0 to 256.0 | 40 |" in done.stdout
    with open(study / "runs.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["steps_to_goal"]]
    assert len(rows) == 8


def test_steps_and_seconds_to_the_scripts_own_goal(repository):
    """--stop-return, which the script prints."""
    code = SCRIPT.replace("while step < args.total_timesteps and not stop:", "while step < 30:")
    code = code.replace(
        "    if writer:\n",
        "    print(f'reached --stop-return 9, after 3 episodes, {step} steps and 1.5 seconds')\n"
        "    if writer:\n",
    )
    (repository / "algos" / "toy.py").write_text(code)
    for objective, value in (("steps", "30"), ("seconds", "1.5")):
        words = ("--objective", objective, "--search", "loss", "--trials", 2)
        done = tune(repository, *words, "--", "--stop-return", 9)
        assert done.returncode == 0, done.stderr
        assert f"trial 0: {value}; best {value} (trial 0); 1 of 2 trials" in done.stdout


@pytest.mark.parametrize("objective, value", [("final", 212.2), ("mean", 132.62)])
def test_returns_come_from_the_log(repository, tmp_path, objective, value):
    """TensorBoard's, which are not rounded. Seconds are those of the log's hours."""
    script = repository / "algos" / "toy.py"
    script.write_text(SCRIPT.replace("{score:.2f}", "{score:.0f}").replace("0.1 *", "0.105 *"))
    words = ("--objective", objective, "--search", "loss", "--seeds", 1, "--trials", 2)
    done = tune(repository, *words, "--study", tmp_path / "study", "--", "--tensorboard")
    assert done.returncode == 0, done.stderr
    # 10 - 4 - 40 * 0.02 + 0.105 = 5.305 a step
    expected = 5.305 * (40 if objective == "final" else 25)
    assert float(trials_of(tmp_path / "study")[0]["value"]) == pytest.approx(expected, abs=1e-3)
    (result,) = (tmp_path / "study").glob("runs/defaults/1/result.json")
    rows = json.loads(result.read_text())["evaluations"]
    assert [row[0] for row in rows] == [10, 20, 30, 40] == [round(row[2]) for row in rows]


def test_held_out_seeds_are_not_in_the_search(repository, tmp_path):
    """Finalists are chosen on seeds of their own."""
    study = tmp_path / "study"
    words = ("--search", "learning_rate", "--trials", 5, "--finalists", 2, "--jobs", 4)
    done = tune(repository, *words, "--finalist-seeds", 5, 6, "--study", study)
    assert done.returncode == 0, done.stderr
    runs = {}
    for key, seed in runs_of(study):
        runs.setdefault(key, set()).add(seed)
    best = re.search(r"trial (\d+) and the defaults on 2 held-out seeds", done.stdout)[1]
    with_held_out = [seeds for seeds in runs.values() if seeds & {11, 12}]
    assert len(runs) == 5 and len(with_held_out) == 2  # the best and the defaults
    assert {1, 2, 5, 6, 11, 12} in with_held_out
    assert sum(seeds >= {5, 6} for seeds in runs.values()) == 2
    with open(study / "runs.csv") as file:
        rows = [*csv.DictReader(file)]
    sets = {"search": {"1", "2"}, "finalist": {"5", "6"}, "held-out": {"11", "12"}}
    assert all(row["seed"] in sets[row["seeds"]] for row in rows)
    assert {row["trial"] for row in rows if row["seeds"] == "held-out"} == {"0", best}


def test_where_the_defaults_are_best(repository):
    done = tune(repository, "--search", "learning_rate=1e-6,1e-5,1e-3", "--trials", 3)
    assert done.returncode == 0, done.stderr
    assert "The script's defaults are the best trial: nothing better was found." in done.stdout
    assert "```bash\npython algos/toy.py\n```" in done.stdout


# ---- Pruning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune_after", [1, 2])
def test_a_pruned_run_is_stopped(repository, tmp_path, prune_after):
    study = tmp_path / "study"
    space = ("--search", "learning_rate=1e-2,1e-5,1e-6,1e-7", "--sampler", "random")
    words = ("--pruner", "hyperband", "--prune-after", prune_after, "--trials", 8, *space)
    words = (*words, "--study", study)
    done = tune(repository, *words, "--", "--seconds", 0.02)
    assert done.returncode == 0, done.stderr
    trials = trials_of(study)
    pruned = [trial for trial in trials if trial["state"] == "pruned"]
    assert pruned and {trial["value"] for trial in pruned} == {""}
    assert "pruned after" in done.stdout
    runs = runs_of(study)
    stopped = [steps for (_, seed), steps in runs.items() if len(steps) < 40]
    assert stopped and all(len(steps) >= 10 * prune_after for steps in stopped)
    assert min(int(trial["evaluations"]) for trial in pruned) == prune_after
    for place in study.glob("runs/*/*"):  # nothing is left running
        pid = Path("/proc", (place / "pids").read_text().split()[-1], "cmdline")
        assert not pid.exists() or "toy.py" not in pid.read_text()
    # the trial that is best at the first evaluation is never pruned
    assert max(trials, key=lambda t: float(t["learning_rate"]))["state"] == "complete"


def test_what_the_pruner_compares():
    from tune_objective import Objective

    objective = Objective("steps", 100.0, True, "iqm", 50, 5)
    assert objective.padded([60.0, 120.0]) == [60.0, 120.0, 100, 100, 100]
    early, late = objective.padded([60.0, 120.0]), [10.0, 20.0, 50.0, 70.0, 99.0]
    for k in range(1, 6):  # smaller is better, as for steps
        assert objective.progress([early[:k]]) < objective.progress([late[:k]])
    assert objective.progress([early]) == -92.0  # returns are cut at the goal
    assert objective.progress([late, early[:1]]) == -(49.8 + 60) / 2
    final = Objective("final", None, False, "iqm", 50, 5)
    assert final.progress([[1.0, 2.0], [5.0]]) == 3.5
    mean = Objective("mean", None, False, "iqm", 50, 5)
    assert mean.progress([[1.0, 2.0], [5.0]]) == 3.25


def result(*returns, solved=None, error=None):
    rows = [[10 * (i + 1), value, 2.0 * (i + 1)] for i, value in enumerate(returns)]
    return {"evaluations": rows, "solved": solved, "error": error}


def test_the_values_of_runs():
    from tune_objective import Objective

    good, bad, failed = result(1.0, 3.0, 2.0), result(1.0, 0.0, 2.0), result(7.0, error="error: x")
    steps = Objective("steps", 3.0, True, "iqm", 30, 3)
    assert steps.values([[good, bad], [failed]]) == [[20, 60], [10]]
    assert Objective("steps", 8.0, True, "iqm", 30, 3).values([[failed]]) == [[60]]
    seconds = Objective("seconds", 3.0, True, "iqm", 30, 3)
    assert seconds.values([[good, bad], [failed]]) == [[4.0, 12.0], [12.0]]  # the longest
    final = Objective("final", None, False, "iqm", 30, 3)
    assert final.values([[good, bad], [failed]]) == [[2.0, 2.0], [0.0]]  # the lowest evaluation
    mean = Objective("mean", None, False, "iqm", 30, 3)
    assert mean.values([[good, bad], [failed]]) == [[2.0, 1.0], [0.0]]
    own = Objective("steps", 3.0, False, "iqm", 30, 3)
    assert own.values([[result(1.0, solved=[17, 1.2]), good]]) == [[17, 60]]
    assert [Objective("mean", None, False, name, 9, 3).combine([1, 2, 9, 4, 5]) for name in (
        "iqm", "mean", "median")] == pytest.approx([11 / 3, 4.2, 4])  # fmt: skip


def test_the_interval_of_the_improvement():
    """Against all resamples of three and two seeds."""
    from itertools import product

    from tune_objective import Objective, improvement_of

    steps = Objective("steps", 3.0, True, "mean", 30, 3)
    best, defaults = np.array([10.0, 30.0, 20.0]), np.array([40.0, 90.0])
    draws = [
        defaults[list(d)].mean() - best[list(b)].mean()
        for b in product(range(3), repeat=3)
        for d in product(range(2), repeat=2)
    ]
    found, low, high = improvement_of(steps, best, defaults)
    assert found == 45.0 and [low, high] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=2)
    mean = Objective("mean", None, False, "mean", 30, 3)
    assert improvement_of(mean, best, defaults)[0] == -45.0


# ---- Runs that end badly -------------------------------------------------------------------------


def test_arguments_that_do_not_work(repository, tmp_path):
    """Such a trial has no value and cannot win; the search goes on."""
    study = tmp_path / "study"
    space = ("--search", "batch_size=13,32,64", "--sampler", "grid")
    done = tune(repository, *space, "--study", study)
    assert done.returncode == 0, done.stderr
    (trial,) = [trial for trial in trials_of(study) if trial["batch_size"] == "13"]
    message = "error: --batch-size must be another (it is 13)."
    assert (trial["state"], trial["value"], trial["error"]) == ("gave up", "", message)
    assert "3 trials: 2 complete, 1 gave up." in done.stdout


@pytest.mark.parametrize("flags", [["--batch-size", 13], ["--batch-size", 14]])
def test_flags_that_do_not_work(repository, tmp_path, flags):
    study = ("--study", tmp_path / "study")
    done = tune(repository, "--search", "loss", "--trials", 3, *study, "--", *flags)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "error: the script refuses its defaults" in last or "ended with status 1" in last
    assert "error: --batch-size must" in done.stderr or "error: something else" in done.stderr


# ---- Kills ---------------------------------------------------------------------------------------


def steps_of(study):
    return {place: (study / place / "steps").read_text() for place in places_of(study)}


def places_of(study):
    return sorted(path.parent.relative_to(study) for path in study.glob("runs/*/*/steps"))


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kills(repository, tmp_path, kills):
    """kill -9 at random moments: nothing is lost, nothing is run twice."""
    study, rng, n = tmp_path / "study", np.random.default_rng(0), 4 * kills
    words = ("--search", "learning_rate", "gamma", "--trials", n, "--jobs", 3, "--goal", 300)
    words = (*words, "--pruner", "hyperband", "--study", study, "--", "--seconds", 0.03)
    moments, options = [], {"stdout": subprocess.DEVNULL, "env": NO_GIT, "cwd": repository}
    for kill in range(kills):
        tool = subprocess.Popen(command(repository, *words), **options)
        begin, seen = time.monotonic(), len(places_of(study))
        # A third come at any time from the start on, the others when it has started a run.
        early = kill < kills // 3
        while not early and len(places_of(study)) == seen and time.monotonic() < begin + 10:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 4 if early else 1))
        assert tool.poll() is None, "it ended before the kill"
        tool.kill()
        tool.wait()
        moments.append(len(places_of(study)))
    assert len({*moments}) > kills // 3
    done = tune(repository, *words)
    assert done.returncode == 0, done.stderr
    trials = trials_of(study)
    assert [int(trial["trial"]) for trial in trials] == [*range(n)]
    study_of_optuna = optuna.load_study(study_name="toy", storage=f"sqlite:///{study}/study.db")
    states = {trial.state.name for trial in study_of_optuna.trials}
    assert states <= {"COMPLETE", "PRUNED"} and len(study_of_optuna.trials) == n
    before = steps_of(study)
    for steps in before.values():  # each step once, in order, until the run's end
        assert steps.split() == [str(i + 1) for i in range(len(steps.split()))]
    for place in before:  # runs outlive the tool: each was started once
        assert len((study / place / "pids").read_text().split()) == 1
    # every complete trial has both seeds, and the value that an unkilled search gives it
    for trial in study_of_optuna.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        rate, gamma = (float(f"{trial.params[k]:.4g}") for k in ("learning_rate", "gamma"))
        values = []
        for seed in (1, 2):
            speed = 10 - 4 * abs(np.log10(rate) + 2) + 0.1 * seed - 40 * abs(gamma - 0.97)
            reached = [step for step in (10, 20, 30, 40) if round(step * speed, 2) >= 300]
            values.append(reached[0] if reached else 80)
        assert trial.value == np.mean(values)
    again = tune(repository, *words)
    assert again.returncode == 0 and again.stdout.startswith(f"{n} of {n} trials are done already")
    report = done.stdout[done.stdout.index("# Search over toy") :]
    assert again.stdout.endswith(report) and steps_of(study) == before


def test_a_killed_search_proposes_what_it_would_have(repository, tmp_path):
    words = ("--search", "learning_rate", "gamma", "--seeds", 1, "--held-out-seeds", 11)
    done = tune(repository, *words, "--trials", 12, "--study", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    for n in (11, 12):  # TPE begins after ten trials
        done = tune(repository, *words, "--trials", n, "--study", tmp_path / "parts")
        assert done.returncode == 0, done.stderr
    assert trials_of(tmp_path / "parts") == trials_of(tmp_path / "whole")


def test_a_run_that_dies_begins_again_from_its_checkpoint(repository, tmp_path):
    """The tool and its runs are killed, as by a power cut."""
    study = tmp_path / "study"
    words = ("--search", "loss", "--trials", 2, "--study", study, "--", "--seconds", 0.03)
    options = {"stdout": subprocess.DEVNULL, "env": NO_GIT, "cwd": repository}
    tool = subprocess.Popen(command(repository, *words), **options, start_new_session=True)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not any(len(x) > 15 for x in runs_of(study).values()):
        time.sleep(0.01)
    os.killpg(tool.pid, signal.SIGKILL)
    tool.wait()
    done = tune(repository, *words)
    assert done.returncode == 0, done.stderr
    for steps in runs_of(study).values():  # the last step before the kill may not have been saved
        assert [*dict.fromkeys(steps)] == [str(i) for i in range(1, 41)] and len(steps) <= 41


def test_ctrl_c(repository, tmp_path):
    study = tmp_path / "study"
    words = ("--search", "loss", "--trials", 2, "--study", study, "--", "--seconds", 0.03)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": NO_GIT}

    def listen():  # a shell starts what is sent to the background with SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    tool = subprocess.Popen(
        command(repository, *words), **options, start_new_session=True, preexec_fn=listen
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not runs_of(study):
        time.sleep(0.01)
    os.killpg(tool.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the runs, too
    _, errors = tool.communicate(timeout=120)
    assert tool.returncode != 0 and "the same command goes on" in errors
    assert "Traceback" not in errors
    done = tune(repository, *words)
    assert done.returncode == 0, done.stderr
    assert {len(steps) for steps in runs_of(study).values()} == {40}


def test_a_study_has_one_search_and_one_tool(repository, tmp_path):
    import fcntl

    study = tmp_path / "study"
    words = ("--search", "loss", "--trials", 2, "--study", study)
    assert tune(repository, *words).returncode == 0
    for other, key in (
        (["--search", "gamma"], "search"),
        (["--sampler", "random"], "sampler"),
        (["--seeds", 4], "seeds"),
        (["--", "--batch-size", 3], "flags"),
    ):
        done = tune(repository, *words, *other)
        assert done.returncode != 0 and f"or the same {key}." in done.stderr
        assert len(done.stderr.splitlines()) == 1
    with open(study / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = tune(repository, *words)
    assert done.returncode != 0 and "another call of this tool is at work" in done.stderr
    done = tune(repository, *words, "--held-out-seeds", 21, "--trials", 4)  # these may change
    assert done.returncode == 0 and "4 trials: 4 complete" in done.stdout


# ---- The record ----------------------------------------------------------------------------------


def test_a_record(repository, tmp_path):
    record = repository / "record"
    words = ("--search", "learning_rate", "loss", "--trials", 3, "--record", record)
    script = repository / "algos" / "toy.py"
    script.write_text(script.read_text() + "\n")
    done = tune(repository, *words)
    assert done.returncode != 0 and "commit or stash first" in done.stderr and not record.exists()
    git(repository, "commit", "-qam", "edited")
    done = tune(repository, *words)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in record.iterdir()} == {
        "README.md", "results.json", "trials.csv", "runs.csv", "evaluations.csv", "search.png",
        "search.svg",
    }  # fmt: skip
    commit = git(repository, "rev-parse", "HEAD").strip()
    page = (record / "README.md").read_text()
    assert page.startswith("# Search over toy on Toy-v1\n") and f"- commit: {commit}" in page
    assert "python benchmarks/tune.py --script toy" in page and str(repository) not in page
    results = json.loads((record / "results.json").read_text())
    assert len(results["trials"]) == 3 and len(results["held_out"]["best"]["values"]) == 2
    with open(record / "evaluations.csv") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 4 * (3 * 2 + 2 * 2)  # four evaluations a run
    assert {row["step"] for row in rows} == {"10", "20", "30", "40"}


def test_a_run_that_was_stopped_at_the_goal_has_reached_it():
    """474.96 is printed as 475.0, which ends the run."""
    from types import SimpleNamespace

    from tune_objective import Objective

    objective = SimpleNamespace(by_evaluation=True, goal=475)
    evaluations = [[100, 474.9, 1.0], [200, 474.96, 2.0]]
    assert Objective.reached(objective, {"evaluations": evaluations}) == [200, 2.0]
    assert Objective.reached(objective, {"evaluations": evaluations[:1]}) is None
