"""benchmarks/plot.py: what it reads, its statistics, and the style of the figures."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import figures  # noqa: E402
import plot  # noqa: E402


def write_events(folder, scalars, arguments=None):
    """A TensorBoard folder. `scalars`: [(tag, value, step, seconds)]"""
    with SummaryWriter(str(folder)) as writer:
        if arguments:
            table = "\n".join(f"|{key}|{value}|" for key, value in arguments.items())
            writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        for tag, value, step, seconds in scalars:
            writer.add_scalar(tag, value, step, walltime=1e9 + seconds)


def write_cleanq(folder, seed, returns, env_id="CartPole-v1", name="dqn_cartpole"):
    """A run with an evaluation every 100 steps, which take 36 seconds."""
    arguments = {"env_id": env_id, "exp_name": name, "seed": seed}
    scalars = [("charts/hours", 0.01 * i, 100 * i, 0) for i in range(1, len(returns) + 1)]
    for i, value in enumerate(returns, 1):
        scalars += [("eval/episodic_return", value, 100 * i, 0)]
    write_events(folder / f"{env_id.replace('/', '-')}__{name}__{seed}__1", scalars, arguments)


def fail(capsys, *words):
    """The message of a call that exits. It is one line and nothing is written to stdout."""
    with pytest.raises(SystemExit) as exit:
        call(*words)
    out, err = capsys.readouterr()
    message = exit.value.code if isinstance(exit.value.code, str) else err.splitlines()[-1]
    assert exit.value.code != 0 and "\n" not in message and "error: " in message and out == ""
    return message


def call(*words):
    argv, sys.argv = sys.argv, ["plot.py", *map(str, words)]
    try:
        plot.main()
    finally:
        sys.argv = argv


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(plot, "RESAMPLES", 50)
    yield
    figures.pyplot().close("all")


# ---- statistics --------------------------------------------------------------------------------


def plain_iqm(values):
    """Mean without the lowest and the highest quarter, by hand."""
    values = sorted(values)
    cut = len(values) // 4
    kept = values[cut : len(values) - cut]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("runs, games", [(1, 1), (2, 1), (5, 1), (4, 3), (7, 5)])
def test_the_interquartile_mean(runs, games):
    from rliable import metrics
    from train import interquartile_mean

    scores = np.random.default_rng(runs).normal(size=(runs, games, 4))
    expected = [plain_iqm(scores[:, :, t].ravel().tolist()) for t in range(4)]
    assert plot.interquartile_means(scores) == pytest.approx(expected)
    assert plot.pooled_mean(scores[..., 0]) == pytest.approx(expected[:1])
    assert metrics.aggregate_iqm(scores[..., 0]) == pytest.approx(expected[0])
    assert interquartile_mean(scores[:, 0, 0]) == pytest.approx(
        metrics.aggregate_iqm(scores[:, 0, 0])
    )


def test_the_interval_is_a_stratified_bootstrap(monkeypatch):
    """Compared with all 3^6 resamples of three runs in two games, each game on its own."""
    monkeypatch.setattr(plot, "RESAMPLES", 4000)
    scores = np.random.default_rng(0).normal((0, 5), size=(3, 2))
    means = []
    for draw in itertools.product(range(3), repeat=6):
        resample = [scores[i, 0] for i in draw[:3]] + [scores[i, 1] for i in draw[3:]]
        means.append(plain_iqm(resample))
    low, high = plot.interval(plot.interquartile_means, scores[:, :, None])
    assert [low[0], high[0]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.06)
    again = plot.interval(plot.interquartile_means, scores[:, :, None])
    assert (again[0] == low).all() and (again[1] == high).all()  # the same figure each time


def test_the_intervals_of_train_and_plot_agree(monkeypatch):
    from train import bootstrap_interval

    monkeypatch.setattr(plot, "RESAMPLES", 4000)
    values = np.random.default_rng(1).normal(size=(5, 3))
    expected = bootstrap_interval(values)
    found = plot.interval(plot.interquartile_means, values[:, None])
    assert np.abs(np.array(found) - np.array(expected)).max() < 0.12


def test_one_run_has_no_interval():
    one, three = np.zeros((1, 1, 1)), np.zeros((3, 1, 1))
    assert plot.interval(plot.interquartile_means, one) == (None, None)
    assert plot.interval(lambda x, y: x[0, 0], three, one) == (None, None)


LOOKS = {
    name: plot.Look(name, False, style)
    for name, style in zip("abc", figures.styles([False, False, False]))
}


def test_the_probability_of_improvement():
    from rliable import metrics

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (4, 2)) * 1.0, rng.integers(0, 4, (3, 2)) * 1.0  # with ties
    expected = 0
    for game in range(2):
        pairs = [(a > b) + 0.5 * (a == b) for a in x[:, game] for b in y[:, game]]
        expected += sum(pairs) / len(pairs) / 2
    figure, rows = plot.improvement_figure({"a": x, "b": y, "c": y}, "b", LOOKS)
    assert [row[0] for row in rows] == ["a", "c"]
    assert rows[0][1] == pytest.approx(expected)
    assert rows[0][1] == pytest.approx(metrics.probability_of_improvement(x, y))
    assert rows[1][1] == 0.5 and rows[0][2] <= rows[0][1] <= rows[0][3]
    assert "over b" in figure.get_suptitle() and "higher is better" in figure.axes[0].get_xlabel()
    dots = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert [dot.get_xdata().item() for dot in dots] == [rows[0][1], 0.5]


def test_performance_profiles():
    """Each line is the fraction of runs above each score."""
    scores = {"a": np.array([[1.0, 2.0], [3.0, 4.0]]), "b": np.array([[0.0, 1.0], [1.0, 9.0]])}
    figure = plot.profiles_figure(scores, "return", "at step 3", LOOKS)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for name, values in scores.items():
        flat = values.ravel().tolist()
        for tau, fraction in zip(*lines[name].get_data()):
            assert fraction == pytest.approx(sum(x > tau for x in flat) / len(flat))
    taus = lines["a"].get_xdata()
    assert taus[0] < 0 and taus[-1] > 9  # from 100% to 0
    assert len({line.get_color() for line in lines.values()}) >= 2


def test_a_training_return_is_the_mean_of_the_last_100_episodes():
    values = np.random.default_rng(0).normal(size=250)
    means = plot.trailing_mean(values, 100)
    for i in range(250):
        window = values[max(i - 99, 0) : i + 1]
        assert means[i] == pytest.approx(sum(window) / len(window))


def test_a_score_is_the_last_return_until_a_step():
    log = plot.make_log([10, 20, 30], None, [1.0, 2.0, 3.0])
    assert [plot.score_at(log, step) for step in (10, 19, 20, 29.5, 30, math.inf)] == [
        1.0,
        1.0,
        2.0,
        2.0,
        3.0,
        3.0,
    ]


def test_scores_at_the_last_common_step():
    def run(seed, *returns):
        steps = np.arange(1, len(returns) + 1) * 10
        return plot.Run("a", "e", seed, False, Path(), plot.make_log(steps, None, returns))

    groups = {
        ("a", "e"): [run("1", 1, 2, 3), run("2", 4, 5)],
        ("b", "e"): [run("1", 6, 7, 8), run("2", 7, 7, 7)],
    }
    assert plot.scores_of(groups, ["e"], None)["a"].tolist() == [[2], [5]]
    assert plot.scores_of(groups, ["e"], "end")["a"].tolist() == [[3], [5]]
    assert plot.scores_of(groups, ["e"], 10.0)["b"].tolist() == [[6], [7]]


def test_the_scores_of_a_random_player_and_of_a_human():
    assert len(plot.HUMAN) == 57
    assert plot.HUMAN["Breakout"] == (1.7, 30.5) and plot.HUMAN["Skiing"] == (-17098.1, -4336.9)
    for low, high in plot.HUMAN.values():
        assert low < high
    for env_id in ("BreakoutNoFrameskip-v4", "ALE/Breakout-v5", "BreakoutDeterministic-v0"):
        assert plot.game_of(env_id) == "Breakout"
    assert plot.game_of("MinAtar/Breakout-v1") is plot.game_of("CartPole-v1") is None
    run = plot.Run("a", "Pong-v5", "1", False, Path(), plot.make_log([1, 2], None, [-20.7, 14.6]))
    low, high, how = plot.range_of("Pong-v5", [run], {})
    assert plot.normalised(run, low, high).logs.returns.tolist() == [0, 1] and "human" in how
    assert plot.range_of("Pong-v5", [run], {"Pong-v5": (0, 2)})[:2] == (0, 2)
    assert plot.range_of("Taxi-v3", [run], {})[:2] == (-20.7, 14.6)


# ---- runs of unequal length --------------------------------------------------------------------


def test_runs_on_a_common_grid():
    series = [([10, 20, 30], [1.0, 2.0, 3.0]), ([20, 25], [5.0, 6.0])]
    grid, values = figures.align([(np.array(x), np.array(y)) for x, y in series])
    assert grid.tolist() == [20, 25, 30]
    np.testing.assert_array_equal(values, [[2, 2.5, 3], [5, 6, np.nan]])
    long = [(np.arange(1000.0), np.arange(1000.0)), (np.arange(500.5), np.arange(500.5))]
    grid, values = figures.align(long, most=100)
    assert len(grid) <= 102 and 500 in grid and grid[-1] == 999
    assert values[0] == pytest.approx(grid) and np.isnan(values[1][grid > 500]).all()
    episodes = [(np.array([5, 1000]), np.array([1.0, 2.0])), (np.array([5, 991]), np.ones(2))]
    grid, values = figures.align(episodes)  # the last episode of a whole run ends a little earlier
    assert grid.tolist() == [5, 991, 1000] and values[1].tolist() == [1, 1, 1]


def test_a_curve_is_thin_where_fewer_seeds_are_left():
    runs = [(np.array([1, 2, 3, 4]), np.arange(4.0)), (np.array([1, 2]), np.array([4.0, 5.0]))]
    runs += [(np.array([1, 2, 3]), np.array([2.0, 3.0, 8.0]))]
    curve = figures.curve_of_runs(
        "a", runs, lambda v: np.mean(v, axis=0), lambda v: (v.min(axis=0), v.max(axis=0))
    )
    assert curve.x.tolist() == [1, 2] and curve.middle.tolist() == [2, 3]
    assert curve.low.tolist() == [0, 1] and curve.high.tolist() == [4, 5]
    assert curve.tail[0].tolist() == [2, 3, 4] and curve.tail[1].tolist() == [3, 5, 3]
    figure = figures.draw_curves([curve], "t", "n", "x", "y, higher is better")
    strong, thin = figure.axes[0].lines[:2]
    assert strong.get_xdata().tolist() == [1, 2] and thin.get_xdata().tolist() == [2, 3, 4]
    assert thin.get_linewidth() < strong.get_linewidth() / 2
    assert figure.axes[0].collections[0].get_paths()[0].get_extents().x1 == 2  # the band


def test_a_run_that_ends_before_another_begins():
    runs = [(np.array([1, 2]), np.array([1.0, 2.0])), (np.array([3, 4]), np.array([5.0, 6.0]))]
    run = plot.Run("a", "e", "1", False, Path(), None)
    group = [run._replace(logs=plot.make_log(x, None, y)) for x, y in runs]
    curve = plot.curve_of("a", [group], "steps")
    assert len(curve.x) == 0 and curve.low is None
    assert curve.tail[0].tolist() == [3, 4] and curve.tail[1].tolist() == [5, 6]
    check(figures.draw_curves([curve], "t", "n", "x", "y"))


def test_a_log_is_in_order_and_finite():
    log = plot.make_log([3, 1, 2, 2, 4], [3, 1, 2, 2.5, 4], [3.0, 1.0, 7.0, 2.0, math.nan])
    assert log.steps.tolist() == [1, 2, 3] and log.returns.tolist() == [1, 2, 3]
    assert log.hours.tolist() == [1, 2.5, 3]
    assert len(plot.make_log([], None, []).steps) == 0


def test_unequal_runs_are_reported(tmp_path, capsys):
    for seed, n in ((1, 3), (2, 5), (3, 5)):
        write_cleanq(tmp_path / "runs", seed, range(n))
    call(tmp_path / "runs", "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "dqn on CartPole-v1: seed 1 ends before 500 steps" in out
    assert "3 seeds are few" in out and "Scores: return at step 300." in out
    assert "| dqn | CartPole-v1 | 1 2 3 | 300 to 500 |" in out


# ---- reading -----------------------------------------------------------------------------------


def read(folder, **options):
    return plot.find_runs(str(folder), **options)[0]


def test_cleanq_logs(tmp_path):
    write_cleanq(tmp_path, 3, [1.0, 2.0], env_id="MinAtar/Breakout-v1")
    (run,) = read(tmp_path)
    assert run[:4] == ("dqn_cartpole", "MinAtar/Breakout-v1", "3", False)
    log = run.logs["evaluation"]
    assert log.steps.tolist() == [100, 200] and log.returns.tolist() == [1, 2]
    assert log.hours == pytest.approx([0.01, 0.02]) and "training" not in run.logs
    tagged = read(tmp_path, tag="charts/hours")[0].logs["charts/hours"]
    assert tagged.returns == pytest.approx([0.01, 0.02])


def test_a_resumed_run_has_two_files(tmp_path):
    write_cleanq(tmp_path, 1, [1.0, 2.0])
    (place,) = tmp_path.iterdir()
    write_events(place, [("eval/episodic_return", 3.0, 300, 0), ("charts/hours", 0.03, 300, 0)])
    (run,) = read(tmp_path)
    assert run.logs["evaluation"].steps.tolist() == [100, 200, 300]


def test_cleanrl_logs(tmp_path):
    """Every episode is logged, and several may end at the same step; hours are the clock's."""
    scalars = [("charts/episodic_return", 10.0 * i, 4 * (i // 2), 36 * i) for i in range(6)]
    arguments = {"exp_name": "dqn", "env_id": "ALE/Pong-v5", "seed": 7}
    write_events(tmp_path / "ALE" / "Pong-v5__dqn__7__16", scalars, arguments)
    write_events(tmp_path / "CartPole-v1__c51__2__17", scalars)  # without arguments
    cartpole, pong = sorted(read(tmp_path), key=lambda run: run.env_id != "CartPole-v1")
    assert pong[:4] == ("dqn", "ALE/Pong-v5", "7", True)
    assert cartpole[:4] == ("c51", "CartPole-v1", "2", True)
    log = pong.logs["training"]
    assert log.steps.tolist() == [0, 4, 8]
    assert log.returns.tolist() == [5, 15, 25]  # means of the first 2, 4 and 6 episodes
    assert np.diff(log.hours) == pytest.approx([0.02, 0.02])


def test_stable_baselines3_logs(tmp_path):
    """A real run of it: TensorBoard, monitor files and evaluations."""
    sb3 = pytest.importorskip("stable_baselines3")
    import gymnasium as gym
    from stable_baselines3.common.callbacks import EvalCallback
    from stable_baselines3.common.monitor import Monitor

    place = tmp_path / "dqn" / "CartPole-v1_2"
    place.mkdir(parents=True)
    env = Monitor(gym.make("CartPole-v1"), str(place))
    where = {"log_path": str(place), "verbose": 0, "warn": False}
    evaluate = EvalCallback(gym.make("CartPole-v1"), eval_freq=100, n_eval_episodes=2, **where)
    log = str(tmp_path / "tensorboard")
    model = sb3.DQN("MlpPolicy", env, tensorboard_log=log, learning_starts=50, seed=0)
    model.learn(300, callback=evaluate, log_interval=1)
    runs = {run.algorithm: run for run in read(tmp_path, env_id="CartPole-v1")}
    assert {*runs} == {"dqn", "DQN"}
    files, events = runs["dqn"], runs["DQN"]
    assert files[1:4] == ("CartPole-v1", "2", True) and events[1:4] == ("CartPole-v1", "1", True)
    assert files.logs["evaluation"].steps.tolist() == [100, 200, 300]
    for kind in ("evaluation", "training"):
        left, right = files.logs[kind], events.logs[kind]
        assert left.steps[: len(right.steps)].tolist() == right.steps.tolist()
        assert left.returns[: len(right.steps)] == pytest.approx(right.returns, rel=1e-5)
    with pytest.raises(SystemExit, match="does not say its environment; give --env-id"):
        read(tmp_path / "tensorboard")


def test_monitor_files_of_several_environments(tmp_path):
    """Their episodes are put in order by their ends; the steps are those of all."""
    header = '#{"t_start": %s, "env_id": "CartPole-v1"}\nr,l,t\n'
    place = tmp_path / "logs" / "seed4"
    place.mkdir(parents=True)
    (place / "0.monitor.csv").write_text(header % 100.0 + "10,5,36\n30,5,108\n")
    (place / "1.monitor.csv").write_text(header % 101.0 + "20,7,71\n")
    (run,) = read(tmp_path)
    assert run[:3] == ("logs", "CartPole-v1", "4")
    log = run.logs["training"]
    assert log.steps.tolist() == [5, 12, 17] and log.returns.tolist() == [10, 15, 20]
    assert log.hours == pytest.approx([0.01, 0.02, 0.03])


DOPAMINE = [
    {"Iteration": i, "Value": value + 10 * i, "Agent": agent}
    for agent, values in (("DQN", (1.0, 2.0, 4.0)), ("Rainbow", (-1.0, -2.0, 0.5)))
    for i in (0, 1, 2)
    for value in values
]


def write_dopamine(folder, name="pong_CNN.json", rows=DOPAMINE):
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def test_dopamines_published_returns(tmp_path):
    runs, _ = plot.find_runs(str(write_dopamine(tmp_path)))
    assert [(run.algorithm, run.seed) for run in runs] == [
        *(("Dopamine DQN", seed) for seed in "123"),
        *(("Dopamine Rainbow", seed) for seed in "123"),
    ]
    assert all(run.env_id == "ALE/Pong-v5" and run.peer for run in runs)
    log = runs[2].logs["training"]
    assert log.steps.tolist() == [250_000, 500_000, 750_000] and log.hours is None
    assert log.returns.tolist() == [4, 14, 24]
    other = write_dopamine(tmp_path, "spaceinvaders_CNN.json")
    assert plot.find_runs(str(other))[0][0].env_id == "ALE/SpaceInvaders-v5"
    assert plot.find_runs(str(other), "SpaceInvadersNoFrameskip-v4")[0][0].env_id[-2:] == "v4"


def test_evaluations_beside_the_seeds_of_a_peer(tmp_path, capsys):
    folder, file = tmp_path / "runs", write_dopamine(tmp_path)
    for name, last in (("dqn_atari", 8.9), ("ddqn_atari", 9.1), ("c51_atari", 6.0)):
        arguments = {"env_id": "PongNoFrameskip-v4", "exp_name": name, "seed": 1}
        scalars = [("charts/hours", 0.1, 1, 0), ("charts/episodic_return", -99, 1, 0)]
        points = ((200_000, -21), (375_000, last), (600_000, 100))
        scalars += [("eval/episodic_return", value, step, 0) for step, value in points]
        write_events(folder / name, scalars, arguments)
    words = (folder, file, "--env-id", "PongNoFrameskip-v4", "--out", tmp_path / "out")
    call(*words, "--measure", "any", "--until", "500000")
    # Halfway between two iterations the seeds of DQN have 6, 7 and 9, those of Rainbow 3 to 5.5.
    out = capsys.readouterr().out
    assert "| dqn | 375,000 | 8.9 | 6 to 9, within | 3 to 5.5, above |" in out
    assert "| ddqn | 375,000 | 9.1 | 6 to 9, above | 3 to 5.5, above |" in out
    assert "| c51 | 375,000 | 6 | 6 to 9, within | 3 to 5.5, above |" in out
    log = plot.make_log([250_000, 500_000], None, [1, 2])
    assert plot.beside(1.0, 249_999, [log]) == plot.beside(1.0, 500_001, [log]) == ""
    assert plot.beside(1.0, 250_000, [log]) == "1 to 1, within"


@pytest.mark.parametrize(
    "path, expected",
    [
        ("runs/CartPole-v1__dqn__3__1700", ("dqn", "CartPole-v1", "3")),
        ("tb/DQN_2", ("DQN", None, "2")),
        ("dqn/CartPole-v1_1", ("dqn", "CartPole-v1", "1")),
        ("CartPole-v1/DQN_5", ("DQN", "CartPole-v1", "5")),
        ("qrdqn/Pong-v5/seed_3", ("qrdqn", "Pong-v5", "3")),
        ("logs/dqn_seed4", ("dqn", None, "4")),
        ("dqn/7", ("dqn", None, "7")),
    ],
)
def test_names_of_folders(path, expected):
    assert plot.identify(Path("/logs") / path, {}) == expected


def test_every_record_of_learning_curves_can_be_read():
    records = ROOT / "benchmarks" / "records"
    runs = [run for record in records.iterdir() for run in read(record)]
    assert {"dqn_cartpole", "ddqn_atari", "pqn_cartpole"} <= {run.algorithm for run in runs}
    (breakout,) = [r for r in read(records / "2026-11-22_ddqn_breakout") if r.seed == "1"]
    assert breakout.logs["evaluation"].steps[0] == 50000
    assert breakout.logs["evaluation"].hours[0] == pytest.approx(0.0411)
    assert len(breakout.logs["training"].steps) == 302
    assert not read(records / "2026-11-22_sum_trees")
    assert not read(records / "2026-11-25_speedrun_cartpole")


def test_a_record_with_hours(tmp_path):
    run = {"script": "dqn", "env_id": "e", "seed": 1, "steps": [1, 2], "returns": [3, 4]}
    for hours in ([0.5, 1.0], []):
        results = json.dumps({"runs": [run | {"hours": hours}]})
        (tmp_path / "results.json").write_text(results)
        log = read(tmp_path)[0].logs["evaluation"]
        assert (log.hours.tolist() if hours else log.hours) == (hours or None)


# ---- the tool ----------------------------------------------------------------------------------


def test_everything_is_drawn(tmp_path, capsys):
    """Two algorithms and a peer in two environments."""
    rng = np.random.default_rng(0)
    for env_id, best in (("CartPole-v1", 500), ("Acrobot-v1", -80)):
        for seed in range(1, 6):
            for name, gain in (("dqn_cartpole", 0), ("ddqn_cartpole", 10)):
                returns = best - 100 + 10 * np.arange(5) + gain + rng.normal(size=5)
                write_cleanq(tmp_path / "runs", seed, returns, env_id, name)
            scalars = [("eval/mean_reward", best - 60 + seed, 100 * i, 9 * i) for i in range(1, 6)]
            write_events(tmp_path / "logs" / "sb3" / env_id / f"DQN_{seed}", scalars)
    out = tmp_path / "new" / "figures"
    words = [tmp_path / "runs", f"SB3 DQN={tmp_path / 'logs'}", "--x", "steps", "hours"]
    call(*words, "--range", "CartPole-v1=400,500", "--out", out)
    printed = capsys.readouterr().out
    names = [f"curves_{env}_{x}" for env in ("CartPole-v1", "Acrobot-v1") for x in plot_x()]
    names += ["curves_all_steps", "curves_all_hours", "aggregate", "profiles", "improvement"]
    assert {path.name for path in out.iterdir()} == {
        "summary.md",
        *(f"{name}.{kind}" for name in names for kind in ("png", "svg")),
    }
    from matplotlib.image import imread

    for name in names:
        assert imread(out / f"{name}.png").shape[1] == 1200  # 6 inches
        svg = (out / f"{name}.svg").read_text()
        assert "<svg" in svg and "<dc:date>" not in svg
    summary = (out / "summary.md").read_text()
    for text in (
        "Read: evaluations.",
        "| SB3 DQN | CartPole-v1 | 1 2 3 4 5 | 500 |",
        "- CartPole-v1: 0 is a return of 400, 1 of 500 (--range)",
        "Scores: normalised return at step 500.",
        "| algorithm | P(better than ddqn) | 95% interval |",
        "| dqn | 0 | 0 to 0 |",
    ):
        assert text in summary and (text in printed)
    files = {path: path.read_bytes() for path in out.iterdir()}
    call(*words, "--range", "CartPole-v1=400,500", "--out", out)
    assert files == {path: path.read_bytes() for path in out.iterdir()}


def plot_x():
    return ("steps", "hours")


def test_the_lines_are_the_runs(tmp_path, monkeypatch):
    """The figure holds the interquartile mean of each algorithm, own lines strong, peers grey."""
    returns = {"dqn": np.arange(15.0).reshape(5, 3), "c51": np.ones((2, 3)) * 7}
    for name, group in returns.items():
        for seed, values in enumerate(group):
            write_cleanq(tmp_path / "runs", seed, values, name=name)
    write_events(
        tmp_path / "runs" / "CartPole-v1__cleanrl__1__1",
        [("eval/mean_reward", 3.0, 100 * i, 0) for i in range(1, 4)],
    )
    drawn = {}
    monkeypatch.setattr(plot, "write", lambda folder, figures, report: drawn.update(figures))
    call(tmp_path / "runs", "--goal", 9)
    axes = drawn["curves_CartPole-v1_steps"].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["dqn"].get_xdata().tolist() == [100, 200, 300]
    assert lines["dqn"].get_ydata().tolist() == [6, 7, 8]  # of 0, 3, 6, 9 and 12: 3, 6, 9
    assert lines["c51"].get_ydata().tolist() == [7, 7, 7]
    assert lines["cleanrl"].get_ydata().tolist() == [3, 3, 3]
    assert lines["dqn"].get_color() in figures.COLOURS and lines["dqn"].get_linewidth() == 2
    assert len({*lines["cleanrl"].get_color()}) == 1 and lines["cleanrl"].get_linewidth() < 1.5
    assert len(axes.collections) == 2  # a band for each with several seeds
    texts = [text.get_text() for text in axes.texts]
    assert "goal: 9" in texts and "dqn 8" in texts and "cleanrl 3" in texts
    assert "a single seed has none" in note_of(drawn["curves_CartPole-v1_steps"])
    for figure in drawn.values():
        check(figure)
    colours = {}  # an algorithm keeps its colour
    for dot in drawn["aggregate"].axes[0].lines:
        if dot.get_linestyle() == "None":
            colours[float(dot.get_xdata()[0])] = dot.get_color()
    assert colours[8.0] == lines["dqn"].get_color() and colours[7.0] == lines["c51"].get_color()


def note_of(figure):
    return " ".join(text.get_text() for text in figure.texts)


def test_one_seed_and_another_tag(tmp_path, capsys):
    write_cleanq(tmp_path / "runs", 1, [1.0, 2.0])
    call(tmp_path / "runs", "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "dqn on CartPole-v1: one seed, so no interval." in out and "| one seed |" in out
    call(tmp_path / "runs", "--out", tmp_path / "tag", "--tag", "charts/hours")
    assert "in " in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "tag").iterdir()} == {
        "summary",
        "curves_CartPole-v1_steps",
    }


def test_environments_that_not_all_have(tmp_path, capsys):
    for seed in (1, 2):
        write_cleanq(tmp_path / "a", seed, [1.0, 2.0], "CartPole-v1", "dqn")
        write_cleanq(tmp_path / "a", seed, [1.0, 2.0], "Acrobot-v1", "dqn")
        write_cleanq(tmp_path / "b", seed, [1.0, 3.0], "CartPole-v1", "c51")
        write_cleanq(tmp_path / "c", seed, [1.0, 3.0], "Taxi-v4", "iqn")
    call(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert "Not aggregated, not all algorithms have it: Acrobot-v1." in capsys.readouterr().out
    call(tmp_path / "b", tmp_path / "c", "--out", tmp_path / "out2")
    assert "nothing is aggregated" in capsys.readouterr().out
    assert not (tmp_path / "out2" / "aggregate.png").exists()


def test_bad_input(tmp_path, capsys):
    runs, empty = tmp_path / "runs", tmp_path / "empty"
    empty.mkdir()
    write_cleanq(runs, 1, [1.0, 2.0])
    write_cleanq(tmp_path / "again", 1, [1.0, 2.0])
    training = [("charts/episodic_return", 1.0, 1, 0)]
    arguments = {"exp_name": "dqn", "env_id": "CartPole-v1"}
    write_events(tmp_path / "training" / "run", training, arguments)
    write_events(tmp_path / "other" / "run", [("losses/td_loss", 1.0, 1, 0)], arguments)
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "results.json").write_text("{")
    (tmp_path / "file").write_text("")
    (tmp_path / "times").mkdir()
    run = {"script": "a", "env_id": "e", "seed": 1, "steps": [1], "returns": [3]}
    (tmp_path / "times" / "results.json").write_text(json.dumps({"runs": [run]}))
    for words, expected in (
        ([tmp_path / "none"], "no such folder; give folders"),
        ([empty], "no logs of training here"),
        ([runs, empty], f"{empty}: no logs of training here"),
        ([tmp_path / "other"], "no run has the tag with returns; there are: losses/td_loss"),
        (
            [runs, "--tag", "charts/sps"],
            "charts/sps; there are: charts/hours, eval/episodic_return",
        ),
        ([runs, tmp_path / "again"], "seed 1 of dqn_cartpole on CartPole-v1 is there twice"),
        ([runs, tmp_path / "training"], "the two do not compare; plot them apart"),
        ([runs, "--measure", "training"], "has no training returns"),
        ([tmp_path / "record"], f"cannot read the log in {tmp_path / 'record'}"),
        ([tmp_path / "times", "--x", "hours"], "has no times; leave it out, or --x steps"),
        ([runs, "--baseline", "x"], "no runs of x; there are: dqn_cartpole"),
        ([runs, "--peers", "y"], "no runs of y"),
        ([runs, "--until", "1"], "no return up to step 1; give a later one to --until"),
        ([tmp_path / "times" / "b"], f"the record {tmp_path / 'times'} has no runs of b"),
        ([tmp_path / "file"], f"{tmp_path / 'file'} is not a file of Dopamine's returns"),
        ([runs, "--at", "soon"], "--at soon: give a step, or `end`"),
        ([runs, "--range", "CartPole-v1"], "must be ENV=LOW,HIGH"),
        ([runs, "--range", "CartPole-v1=1,1"], "LOW and HIGH must differ"),
        ([runs, "--out", tmp_path / "file"], f"cannot write to {tmp_path / 'file'}"),
    ):
        assert expected in fail(capsys, *words), words
    call(runs, f"again={tmp_path / 'again'}", "--out", tmp_path / "out")  # the advice works


def test_records_are_drawn_again(tmp_path, monkeypatch, capsys):
    """Of each kind one; nothing but figures is written."""
    import redraw

    expected = {
        "2026-11-25_dqn_cartpole": {"curve"},
        "2026-11-25_acrobot": {"curve"},
        "2026-11-22_ddqn_breakout": {"curves"},
        "2026-11-24_throughput_cartpole": {"rates"},
        "2026-11-25_tabular": {"bias"},
        "2026-11-22_buffers": {"latency", "memory", "capacity"},
        "2026-11-25_overestimation_cartpole": {"curve"},
        "2026-11-28_storage": {"bytes"},
        "2026-11-28_storage_1e6": {"bytes"},
        "2026-11-30_scale": {"scale"},
        "2026-11-25_speedrun_cartpole": set(),
        "2026-11-25_tune_dqn_acrobot": set(),
        "2026-11-22_sum_trees": set(),
    }
    before = {}
    for name in expected:
        (tmp_path / name).mkdir()
        for path in (ROOT / "benchmarks" / "records" / name).iterdir():
            if path.suffix not in (".png", ".svg"):
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
                before[tmp_path / name / path.name] = path.read_bytes()
    monkeypatch.setattr(sys, "argv", ["redraw.py", *(str(tmp_path / name) for name in expected)])
    redraw.main()
    assert "2026-11-22_sum_trees: no figures" in capsys.readouterr().out
    for name, figure_names in expected.items():
        written = {path.name for path in (tmp_path / name).iterdir()} - {x.name for x in before}
        assert written == {f"{x}.{kind}" for x in figure_names for kind in ("png", "svg")}
    assert before == {path: path.read_bytes() for path in before}
    for name in expected:
        for figure in redraw.figures_of(tmp_path / name).values():
            check(figure)
    monkeypatch.setattr(sys, "argv", ["redraw.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="no such folder"):
        redraw.main()


def test_each_figure_of_a_record_is_there_as_png_and_svg():
    records = ROOT / "benchmarks" / "records"
    kinds = [{path.with_suffix("") for path in records.glob(f"*/*.{k}")} for k in ("png", "svg")]
    kinds[0] -= {path for path in kinds[0] if path.parent.name.endswith("_report")}  # screenshots
    assert kinds[0] == kinds[1] and len(kinds[0]) > 20


# ---- the style ---------------------------------------------------------------------------------


def check(figure):
    """Six inches wide, no text below 9 points, none cut off, none over another one beside the data,
    no legend, and no look, colour and dashes, of two lines of the same axes."""
    from matplotlib.colors import to_rgb
    from matplotlib.text import Text

    figure.canvas.draw()
    assert figure.get_figwidth() == 6
    width, height = figure.canvas.get_width_height()
    texts = [x for x in figure.get_children() if isinstance(x, Text)]
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        assert axes.get_legend() is None
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label1 for tick in ticks if tick.label1.get_visible()]
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        looks = [(to_rgb(line.get_color()), line.get_linestyle()) for line in lines]
        assert len({*looks}) == len(looks)
    texts = [text for text in texts if text.get_text()]
    boxes = [Text.get_window_extent(text) for text in texts]  # without the lines of annotations
    for text, box in zip(texts, boxes):
        assert text.get_fontsize() >= 9, text
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, text
    for (text, box), (other, its) in itertools.combinations(zip(texts, boxes), 2):
        apart = box.x1 <= its.x0 or its.x1 <= box.x0 or box.y1 <= its.y0 + 1 or its.y1 <= box.y0 + 1
        assert apart, (text.get_text(), other.get_text())


def curves(n, peers=0, same=False):
    x = np.linspace(0, 1e5, 11)
    for i in range(n + peers):
        y = x / 1e3 * (1 if same else 1 + 0.01 * i)
        name = f"a_long_name_of_an_algorithm_{i}"
        yield figures.Curve(name, x, y, y - 1, y + 1, peer=i >= n, text=f"{y[-1]:.1f}")


@pytest.mark.parametrize(
    "n, peers, same", [(1, 0, False), (4, 0, True), (2, 5, True), (3, 3, False)]
)
def test_labels_stand_at_the_ends_and_do_not_overlap(n, peers, same):
    title, note = "a long title " * 6, "note " * 30
    figure = figures.draw_curves([*curves(n, peers, same)], title, note, "steps", "return, higher")
    check(figure)
    (axes,) = figure.axes
    right = axes.get_window_extent().x1
    from matplotlib.text import Text

    assert len(axes.texts) == n + peers
    assert all(Text.get_window_extent(text).x0 > right for text in axes.texts)


def test_many_lines_have_a_panel_each():
    figure = figures.draw_curves([*curves(8)], "title", "note", "steps", "return", (50, "goal: 50"))
    check(figure)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 8
    for curve, axes in zip(curves(8), panels):
        strong = [line for line in axes.lines if line.get_label() == curve.label]
        assert [line.get_color() for line in strong] == [figures.OWN]
        assert strong[0].get_ydata() == pytest.approx(curve.middle)
    assert "grey: a_long_name_of_an_algorithm_0; dashed: goal: 50" in note_of(figure)


def test_labels_beside_the_axes():
    options = {"at_ends": False}
    figure = figures.draw_curves([*curves(4, same=True)], "t", "n", "x", "y", **options)
    check(figure)
    assert len(figure.axes[0].texts) == 4


def test_labels_stay_beside_the_axes():
    assert figures.spread([0.95, 0.99], [0.1, 0.1], 0, 1) == pytest.approx([0.85, 0.95])
    assert figures.spread([0.0, 0.5], [0.1, 0.1], 0, 1) == pytest.approx([0.05, 0.5])
    assert figures.spread([0.5, 0.5], [0.8, 0.8], 0, 1) == pytest.approx([0.4, 1.2])  # too many


def test_intervals_and_bars():
    looks = figures.styles([False, False, True])
    rows = [(f"row {i}", i + 1.0, i + 0.5, i + 2.0, style) for i, style in enumerate(looks)]
    rows[1] = (*rows[1][:2], None, None, rows[1][4])
    figure = figures.draw_intervals(rows, "title", "note", "x, lower is better", reference=2)
    check(figure)
    bars = [line for line in figure.axes[0].lines if line.get_linewidth() == 6]
    assert [[*bar.get_xdata()] for bar in bars] == [[0.5, 2.0], [2.5, 4.0]]
    rows = [("own", 10.0, False), ("a peer", 12_345.0, True)]
    figure = figures.draw_bars(rows, "title", "", "bytes, lower is better", (8, "dashed: 8"))
    check(figure)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [10, 12345]
    assert [text.get_text() for text in figure.axes[0].texts] == ["10", "12,345", "dashed: 8"]


def test_no_colour_is_used_twice():
    looks = figures.styles([False] * 7 + [True] * 12)
    assert len({str(look["color"]) for look in looks}) == 19
    assert len({look["marker"] for look in looks[:7]}) == 7
    for look in looks[7:]:
        assert len({*look["color"]}) == 1  # grey
    assert all(look["color"] == figures.OWN for look in figures.styles([False] * 8))


# From linear RGB to what the colour-blind see: Machado, Oliveira and Fernandes, 2009, severity 1.
SIGHT = {
    "normal": "1 0 0   0 1 0   0 0 1",
    "protanopia": """
        0.152286 1.052583 -0.204868   0.114503 0.786281 0.099216   -0.003882 -0.048116 1.051998""",
    "deuteranopia": """
        0.367322 0.860646 -0.227968   0.280085 0.672501 0.047413   -0.011820 0.042940 0.968881""",
    "tritanopia": """
        1.255528 -0.076749 -0.178779   -0.078411 0.930809 0.147602   0.004733 0.691367 0.303900""",
}


@pytest.mark.parametrize("sight", SIGHT)
def test_the_colours_differ_for_the_colour_blind(sight):
    """By 15 or more in CIELAB, where 2 to 3 can just be seen side by side."""
    from matplotlib.colors import to_rgb

    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750]]
    to_xyz = np.array([*to_xyz, [0.0193339, 0.1191920, 0.9503041]])
    matrix, seen = np.reshape(SIGHT[sight].split(), (3, 3)).astype(float), []
    for colour in figures.COLOURS:
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        xyz = to_xyz @ np.clip(matrix @ linear, 0, 1) / to_xyz.sum(axis=1)
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        seen.append([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
    for one, other in itertools.combinations(seen, 2):
        assert math.dist(one, other) > 15


def test_words_of_labels():
    assert figures.wrap("munchausen_dqn 500.0", 18) == "munchausen_dqn\n500.0"
    assert figures.wrap("a_very_long_name_of_dqn", 12) == "a_very_long_\nname_of_dqn"
    assert figures.wrap("dqn 3", 18) == "dqn 3"
    written = {0: "0", 2.5: "2.5", 1500: "1.5k", 2e6: "2M", 1024: "1,024", 1.25e6: "1.25M"}
    assert {x: figures.thousands(x) for x in written} == written
    names = figures.short_names(["dqn_cartpole", "ddqn_cartpole"])
    assert [*names.values()] == ["dqn", "ddqn"]
    names = figures.short_names(["dqn_cartpole", "dqn_atari"])
    assert [*names.values()] == ["dqn_cartpole", "dqn_atari"]
