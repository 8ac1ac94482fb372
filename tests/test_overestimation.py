"""benchmarks/overestimation.py: its estimators, its report and its figures."""

import csv
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_benchmarks import SCRIPT, make_repository, run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

TOOL = ["benchmarks/overestimation.py", "--bias-runs", 2]
# Values to log: predicted 2 above true for DQN, 0.5 above for Double DQN, and more for later seeds.
VALUES = """
bias = (2.0 if "ddqn" not in __file__ else 0.5) + 0.1 * args.seed
for step in range(100, args.total_timesteps + 1, 100):
    scalar("eval/predicted_value", 10 + bias, step)
    scalar("eval/true_value", 10.0, step)
    scalar("eval/overestimation_ci95", 0.25, step)
writer.close()
"""


@pytest.fixture
def tool():
    import overestimation

    return overestimation


@pytest.mark.parametrize("n_dice, n_rolls", [(2, 2), (3, 2)])
def test_dice_against_all_their_outcomes(tool, monkeypatch, n_dice, n_rolls):
    monkeypatch.setattr(tool, "SIDES", 4)
    single, double, outcomes = 0.0, 0.0, 0
    for rolls in itertools.product(range(1, 5), repeat=n_dice * n_rolls):
        rolls = [rolls[i * n_rolls : (i + 1) * n_rolls] for i in range(n_dice)]
        outcomes += 1
        single += max(sum(die) / n_rolls for die in rolls)
        firsts = [die[0] for die in rolls]
        double += rolls[firsts.index(max(firsts))][1]
    found = tool.dice(n_dice, n_rolls, np.random.default_rng(1))
    np.testing.assert_allclose(found, (single / outcomes, double / outcomes), atol=0.02)
    assert found[0] > 2.5 + 0.2 and abs(found[1] - 2.5) < 0.02, "only the maximum is biased"


@pytest.mark.parametrize(
    "env_id, file",
    [
        ("CartPole-v1", "ddqn_cartpole"),
        ("MinAtar/Breakout-v1", "ddqn_cartpole"),
        ("PongNoFrameskip-v4", "ddqn_atari"),
        ("ALE/Pong-v5", "ddqn_atari"),
    ],
)
def test_each_environment_has_its_file(tool, env_id, file):
    assert tool.script_of("ddqn", env_id) == file
    assert tool.script_of("no_such", env_id) is None


def test_a_mean_over_the_second_half(tool):
    run = {"steps": [100, 200, 300, 400], "true": [1.0, 2.0, 3.0, 5.0]}
    assert tool.late(run, "true") == 4.0


def test_one_seed_has_an_interval_over_its_episodes(tool):
    """That of the mean of the two evaluations in the second half, whose errors are independent."""
    values = {"steps": [100, 200, 300], "true": [0.0, 1.0, 1.0], "returns": [9.0, 9.0, 9.0]}
    rows = []
    for name, predicted, errors in (("dqn", 3.0, (9, 0.3, 0.4)), ("ddqn", 2.0, (9, 0.6, 0.8))):
        keys = {"algorithm": name, "env_id": "A-v1", "seed": 1}
        found = {"predicted": [0.0, predicted, predicted], "overestimation_ci95": [*errors]}
        rows.append(keys | values | found)
    assert tool.value_table(rows)[2:] == [
        "| A-v1 | DQN | 3 | 1 | 2 (1.75 to 2.25) | 9 |",
        "| A-v1 | Double DQN | 2 | 1 | 1 (0.5 to 1.5) | 9 |",
        "| A-v1 | DQN - Double DQN |  |  | 1 (0.441 to 1.56) |  |",
    ]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    source = SCRIPT.rsplit("writer.close()", 1)[0] + VALUES
    scripts = {name: source for name in ("dqn_cartpole", "ddqn_cartpole")}
    for name in ("q_learning_tabular", "double_q_learning_tabular"):
        scripts[name] = (ROOT / "algos" / f"{name}.py").read_text()
    return make_repository(tmp_path_factory, scripts)


def test_a_record_of_the_overestimation(repository):
    words = ["--env-ids", "MinAtar/Breakout-v1", "CartPole-v1", "--seeds", 1, 2, 3]
    done = run(repository, *TOOL, *words, "--jobs", 2, "--record", "record")
    assert done.returncode == 0, done.stderr
    folder = repository / "record"
    page = (folder / "README.md").read_text()
    for line in (
        "| CartPole-v1 | DQN | 12.2 (12.1 to 12.3) | 10 (10 to 10) | 2.2 (2.1 to 2.3) |",
        "| CartPole-v1 | Double DQN | 10.7 (10.6 to 10.8) | 10 (10 to 10) | 0.7 (0.6 to 0.8) |",
        "| MinAtar/Breakout-v1 | DQN - Double DQN |  |  | 1.5 (1.5 to 1.5) |  |",
        "python algos/SCRIPT.py --env-id ENV --seed SEED",
    ):
        assert line in page, line
    with open(folder / "values.csv") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 2 * 2 * 3 * 3
    assert rows[0]["predicted"] == "12.1" and rows[0]["overestimation_ci95"] == "0.25"
    results = json.loads((folder / "results.json").read_text())
    assert len(results["runs"]) == 12 and len(results["left"]) == 2
    for name in ("curve_MinAtar-Breakout-v1", "curve_CartPole-v1"):
        assert {f"{name}.png", f"{name}.svg"} <= {file.name for file in folder.iterdir()}


def test_a_figure_has_both_values_of_both_algorithms(tool):
    runs = []
    for algorithm, level in (("dqn", 3.0), ("ddqn", 2.0)):
        for seed in (1, 2, 3):
            values = {"predicted": [level, level + seed], "true": [1.0, 1.0 + seed]}
            keys = {"algorithm": algorithm, "script": f"{algorithm}_cartpole", "env_id": "A-v1"}
            runs.append(keys | values | {"steps": [100, 200]})
    (axes,) = tool.draw(runs, ["dqn", "ddqn"]).axes
    lines = {line.get_label(): line for line in axes.lines if line.get_label()[0] != "_"}
    assert lines["DQN, predicted"].get_ydata().tolist() == [3.0, 5.0]
    assert lines["Double DQN, true"].get_ydata().tolist() == [1.0, 3.0]
    assert lines["DQN, true"].get_linestyle() == "--"
    colours = [
        lines[f"{name}, {key}"].get_color()
        for name in ("DQN", "Double DQN")
        for key in ("predicted", "true")
    ]
    assert colours[0] == colours[1] != colours[2] == colours[3]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--algorithms", "dqn", "xqn"], "algos/ has no file of it for CartPole-v1"),
        (["--seeds", 1, 1], "--seeds must differ"),
        (["--jobs", 0], "must be 1 or more"),
    ],
)
def test_bad_arguments(repository, words, message):
    done = run(repository, *TOOL, *words)
    assert done.returncode != 0 and message in done.stderr


def test_scripts_without_values_are_named(repository):
    for name in ("dqn_cartpole", "ddqn_cartpole"):
        (repository / "algos" / f"{name}.py").write_text(SCRIPT)
    done = run(repository, *TOOL, "--seeds", 1)
    assert done.returncode != 0 and "logs no values" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
