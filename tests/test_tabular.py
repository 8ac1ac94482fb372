"""Q-learning and double Q-learning in tables: against plain loops and value iteration."""

import copy
import csv
import importlib
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import test_benchmarks
from conftest import ALGOS, load
from scipy.stats import binomtest, chisquare
from test_benchmarks import check_labels, git, template  # noqa: F401
from test_run import main_in_process, refused, run, scalars, started

tabular = importlib.import_module("tabular")  # in benchmarks/, which test_benchmarks makes a path
SINGLE, DOUBLE = "q_learning_tabular", "double_q_learning_tabular"
SCRIPTS = [SINGLE, DOUBLE]
DRY = "DryFrozenLake-v0"  # no slipping: a short run finds the optimum
gym.register(
    DRY,
    "gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv",
    kwargs={"is_slippery": False},
    max_episode_steps=100,
)
SMALL = {"env_id": DRY, "total_timesteps": 3000, "eval_episodes": 3, "eval_frequency": 0}


@pytest.fixture(params=SCRIPTS)
def script(request):
    return load(request.param)


def random_tables(rng, n_tables, n_states=5, n_actions=4):
    """Tables without ties, in which some actions are not legal. -> (tables, legal)"""
    legal = rng.random((n_states, n_actions)) < 0.7
    legal[np.arange(n_states), rng.integers(n_actions, size=n_states)] = True
    tables = np.where(legal, rng.normal(size=(n_tables, n_states, n_actions)), -np.inf)
    return tables, legal


def random_transition(script, rng, legal):
    obs = int(rng.integers(len(legal)))
    action = int(rng.choice(np.flatnonzero(legal[obs])))
    discount = 0.0 if rng.random() < 0.3 else 0.9
    next_obs = int(rng.integers(len(legal)))
    return script.Transition(obs, action, float(rng.normal()), next_obs, discount)


def alpha(n, args):
    return args.learning_rate / n**args.learning_rate_decay


# ---- the update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.8, 1.0])
def test_q_learning_against_plain_loops(decay):
    """Q(s, a) <- Q(s, a) + alpha (r + gamma max_a' Q(s', a') - Q(s, a)); nothing else changes."""
    script, rng = load(SINGLE), np.random.default_rng(0)
    args = script.Args(learning_rate=0.5, learning_rate_decay=decay)
    (q_table,), legal = random_tables(rng, 1)
    counts = np.zeros(q_table.shape, np.int64)
    expected, n = q_table.tolist(), np.zeros(q_table.shape, int).tolist()
    for _ in range(300):
        s, a, r, next_s, discount = transition = random_transition(script, rng, legal)
        best = -np.inf
        for b in range(len(legal[0])):
            if legal[next_s][b] and expected[next_s][b] > best:
                best = expected[next_s][b]
        error = r + discount * best - expected[s][a]
        before = expected[s][a]
        n[s][a] += 1
        expected[s][a] += alpha(n[s][a], args) * error
        td_error, q_taken = script.update(q_table, counts, transition, args, rng)
        assert td_error == pytest.approx(error) and q_taken == pytest.approx(before)
        np.testing.assert_allclose(q_table, expected, rtol=1e-12)
        assert counts.tolist() == n


@pytest.mark.parametrize("decay", [0.0, 0.8, 1.0])
def test_double_q_learning_against_plain_loops(decay):
    """Q_A learns from Q_B at Q_A's best action, or the other way round; n is each table's own."""
    script, rng = load(DOUBLE), np.random.default_rng(0)
    args = script.Args(learning_rate=0.5, learning_rate_decay=decay)
    q_table, legal = random_tables(rng, 2)
    counts = np.zeros(q_table.shape, np.int64)
    expected, n = q_table.tolist(), np.zeros(q_table.shape, int).tolist()
    differs = {"own value": 0, "the other's argmax": 0}
    for _ in range(300):
        s, a, r, next_s, discount = transition = random_transition(script, rng, legal)
        td_error, q_taken = script.update(q_table, counts, transition, args, rng)
        learner = 0 if counts[0, s, a] > n[0][s][a] else 1  # the coin, as it fell
        own, other = expected[learner], expected[1 - learner]
        best = max(np.flatnonzero(legal[next_s]), key=lambda b: own[next_s][b])
        others_best = max(np.flatnonzero(legal[next_s]), key=lambda b: other[next_s][b])
        differs["own value"] += own[next_s][best] != other[next_s][best]
        differs["the other's argmax"] += best != others_best
        error = r + discount * other[next_s][best] - own[s][a]
        assert td_error == pytest.approx(error) and q_taken == pytest.approx(own[s][a])
        n[learner][s][a] += 1
        own[s][a] += alpha(n[learner][s][a], args) * error
        np.testing.assert_allclose(q_table, expected, rtol=1e-12)
        assert counts.tolist() == n
    assert min(differs.values()) > 30, "the wrong targets would have been the same"


def test_the_coin_is_fair_and_does_not_depend_on_the_action():
    script, rng = load(DOUBLE), np.random.default_rng(1)
    q_table, counts = np.zeros((2, 3, 4)), np.zeros((2, 3, 4), np.int64)
    for i in range(6000):
        transition = script.Transition(i % 3, i % 4, 0.0, (i + 1) % 3, 0.9)
        script.update(q_table, counts, transition, script.Args(), rng)
    assert counts.sum() == 6000
    assert binomtest(int(counts[0].sum()), 6000).pvalue > 0.01
    assert chisquare(counts.reshape(2, 12)[:, counts[0].ravel() > 0].T, axis=1).pvalue.min() > 1e-3


def test_the_policy_of_double_q_learning_is_that_of_the_average():
    script = load(DOUBLE)
    q_table = np.array([[[1.0, 5.0], [0.0, 2.0]], [[3.0, -2.0], [4.0, -np.inf]]])
    assert script.action_values(q_table, 0).tolist() == [2.0, 1.5]
    assert script.action_values(q_table, slice(None)).tolist() == [[2.0, 1.5], [2.0, -np.inf]]
    assert load(SINGLE).action_values(q_table[0], 1).tolist() == [0.0, 2.0]


def test_tables_start_at_zero_and_never_choose_an_illegal_action(script):
    legal = np.array([[True, False, True], [True, True, True]])
    q_table = script.make_q_table(legal)
    assert q_table.shape == ((2, 2, 3) if script.__name__ == DOUBLE else (2, 3))
    values = script.action_values(q_table, slice(None))
    assert values.tolist() == [[0.0, -np.inf, 0.0], [0.0, 0.0, 0.0]]


def test_ties_are_broken_at_random(script):
    """Each best action has the same probability; no other is chosen."""
    rng, q_values = np.random.default_rng(0), np.array([1.0, 3.0, -np.inf, 3.0, 3.0, 2.0])
    for choose in (
        lambda: script.argmax(q_values, rng),
        lambda: script.act(q_values, 0.0, rng),
    ):
        found = np.bincount([choose() for _ in range(6000)], minlength=6)
        assert found[[0, 2, 5]].tolist() == [0, 0, 0]
        assert chisquare(found[[1, 3, 4]]).pvalue > 0.01


def test_ties_of_the_learning_table_are_broken_at_random():
    """The values of the other table, all different, show which action was taken."""
    script, rng, found = load(DOUBLE), np.random.default_rng(2), []
    args = script.Args(learning_rate_decay=0.0)
    for _ in range(3000):
        q_table = np.zeros((2, 2, 3))
        q_table[:, 1] = [[7.0, 7.0, 0.0], [1.0, 2.0, 3.0]]
        script.update(
            q_table, np.zeros((2, 2, 3), int), script.Transition(0, 0, 0, 1, 1.0), args, rng
        )
        found += [q_table[0, 0, 0]] if q_table[0, 0, 0] else []  # Q_A learned from Q_B's 1 or 2
    assert set(found) == {1.0, 2.0}
    assert binomtest(found.count(1.0), len(found)).pvalue > 0.01


def test_epsilon_greedy_chances(script):
    """1 - epsilon + epsilon / n for the best action, epsilon / n for the other legal ones."""
    rng, epsilon, n = np.random.default_rng(3), 0.4, 9000
    q_values = np.array([-1.0, -np.inf, 2.0, 0.0])
    found = np.bincount([script.act(q_values, epsilon, rng) for _ in range(n)], minlength=4)
    assert found[1] == 0
    expected = n * np.array([epsilon / 3, 1 - epsilon + epsilon / 3, epsilon / 3])
    assert chisquare(found[[0, 2, 3]], expected).pvalue > 0.01


def test_schedules(script):
    args = script.Args(learning_rate=0.5, learning_rate_decay=0.8, total_timesteps=1000)
    args.start_e, args.end_e, args.exploration_fraction = 0.9, 0.1, 0.5
    for n in (1, 2, 3, 100):
        assert script.learning_rate_at(n, args) == pytest.approx(0.5 / n**0.8)
    for step, epsilon in ((0, 0.9), (250, 0.5), (500, 0.1), (999, 0.1)):
        assert script.epsilon_at(step, args) == pytest.approx(epsilon)
    args.exploration_fraction = 0.0
    assert script.epsilon_at(0, args) == pytest.approx(0.1)


def test_the_dice_of_the_docstring():
    doc, faces = load(DOUBLE).__doc__, range(1, 7)
    throws = [*itertools.product(faces, faces)]
    total = sum(max(throw) for throw in throws)
    assert total == 161 and len(throws) == 36 and f"{161 / 36:.2f}" == "4.47"
    assert "161/36 = 4.47" in doc and "expectations is 3.5." in doc
    assert max(np.mean(faces), np.mean(faces)) == 3.5
    again = [second[np.argmax(first)] for first in throws for second in throws]
    assert np.mean(again) == 3.5 and "a second throw of that die is 3.5 on average" in doc


# ---- environments, whole runs --------------------------------------------------------------------


class OneState(gym.Env):
    """One state, one action, reward 1; it never ends by itself, or always."""

    observation_space, action_space = gym.spaces.Discrete(1), gym.spaces.Discrete(1)

    def __init__(self, terminates):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return 0, 1.0, self.terminates, False, {}


gym.register("Truncated-v0", OneState, max_episode_steps=1, kwargs={"terminates": False})
gym.register("Terminated-v0", OneState, max_episode_steps=9, kwargs={"terminates": True})


def final_state(script, folder):
    return script.load_checkpoint(str(next(folder.glob("runs/*/checkpoint.npz"))))


@pytest.mark.parametrize(("env_id", "value"), [("Truncated-v0", 2.0), ("Terminated-v0", 1.0)])
def test_a_truncated_step_bootstraps_and_a_terminated_one_does_not(
    script, env_id, value, in_tmp, monkeypatch
):
    """1 + gamma + gamma^2 + ... = 2 with gamma 0.5, though every episode has one step; else 1."""
    options = {"env_id": env_id, "gamma": 0.5, "learning_rate": 0.5, "learning_rate_decay": 0.0}
    options |= {"total_timesteps": 400, "eval_episodes": 0}
    main_in_process(script, options, monkeypatch)
    state = final_state(script, in_tmp)
    np.testing.assert_allclose(state["q_table"], value, rtol=1e-6)
    assert state["counts"].sum() == 400


class Shifted(gym.Env):
    """Observations 5 and 6, actions -1 and 0: action 0 gives 1, and goes on to 6, where it ends."""

    observation_space = gym.spaces.Discrete(2, start=5)
    action_space = gym.spaces.Discrete(2, start=-1)

    def reset(self, *, seed=None, options=None):
        self.obs = 5
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.obs, over = 6, self.obs == 6
        return self.obs, float(action == 0), over, False, {}


gym.register("Shifted-v0", Shifted)


def test_spaces_may_start_anywhere(script, in_tmp, monkeypatch):
    options = {"env_id": "Shifted-v0", "gamma": 0.5, "learning_rate_decay": 0.0}
    options |= {"total_timesteps": 400, "learning_rate": 0.5, "eval_episodes": 0, "end_e": 1.0}
    main_in_process(script, options, monkeypatch)
    values = script.action_values(final_state(script, in_tmp)["q_table"], slice(None))
    np.testing.assert_allclose(values, [[0.5, 1.5], [0.0, 1.0]], atol=1e-3)


def plain_value_iteration(env_id, gamma):
    """V*, in plain loops over the environment's own table."""
    table = gym.make(env_id).unwrapped.P
    values = dict.fromkeys(table, 0.0)
    while True:
        change = 0.0
        for s in table:
            best = max(
                sum(p * (r + gamma * (0.0 if over else values[t])) for p, t, r, over in outcomes)
                for outcomes in table[s].values()
            )
            change, values[s] = max(change, abs(best - values[s])), best
        if change < 1e-10:
            return values


@pytest.mark.parametrize(
    ("env_id", "gamma", "value", "best_return"),
    [
        ("FrozenLake-v1", 0.99, 0.54203, 0.74016),
        ("CliffWalking-v1", 0.99, -(1 - 0.99**13) / (1 - 0.99), -13.0),
        ("Taxi-v4", 0.99, 6.32746, 7.93),
    ],
)
def test_value_iteration_against_plain_loops(env_id, gamma, value, best_return):
    transitions, rewards, start, _ = tabular.model_of(env_id)
    values = tabular.value_iteration(transitions, rewards, gamma).max(axis=1)
    if env_id != "Taxi-v4":  # its plain loops take seconds
        plain = plain_value_iteration(env_id, gamma)
        np.testing.assert_allclose(values, [plain[s] for s in sorted(plain)], atol=1e-7)
    assert start @ values == pytest.approx(value, abs=1e-5)
    assert tabular.optimum(env_id, gamma) == pytest.approx(best_return, abs=1e-5)


def test_expected_returns_by_hand():
    """Two states: the action 0 in the first stays with probability 1/2, and pays 1."""
    transitions = np.zeros((2, 2, 2))
    transitions[0, 0] = [0.5, 0.0]  # else the episode ends
    transitions[0, 1] = [0.0, 1.0]
    rewards, start = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([1.0, 0.0])
    stay, uniform = np.array([[1.0, 0.0], [0.5, 0.5]]), np.full((2, 2), 0.5)
    assert tabular.expected_return(stay, transitions, rewards, start, 3) == 1 + 1 / 2 + 1 / 4
    assert tabular.expected_return(stay, transitions, rewards, start, 999) == pytest.approx(2.0)
    assert tabular.expected_return(uniform, transitions, rewards, start, 2) == 0.5 + 0.25 * 0.5
    found = tabular.greedy(np.array([[1.0, 1.0], [0.0, 2.0]])).tolist()
    assert found == [[0.5, 0.5], [0.0, 1.0]]
    assert tabular.greedy(np.array([[1.0, 1.0 + 1e-12]]), 1e-9).tolist() == [[0.5, 0.5]]


def check_optimal(script, folder, env_id):
    checkpoint = next(folder.glob("runs/*/checkpoint.npz"))
    value, gamma = tabular.learned_return(script, checkpoint, env_id)
    assert value == pytest.approx(tabular.optimum(env_id, gamma), abs=tabular.TOLERANCE)


def test_a_short_run_finds_the_optimal_policy(script, in_tmp, monkeypatch):
    options = SMALL | {"total_timesteps": 20_000, "learning_rate_decay": 0.0, "end_e": 0.5}
    main_in_process(script, options | {"learning_rate": 0.5}, monkeypatch)
    check_optimal(script, in_tmp, DRY)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", tabular.ENV_IDS)
def test_a_run_with_default_settings_finds_the_optimal_policy(script, env_id, in_tmp, monkeypatch):
    main_in_process(script, {"env_id": env_id, "eval_frequency": 0}, monkeypatch)
    check_optimal(script, in_tmp, env_id)


def test_the_problem_of_maximization_bias(script):
    env = script.make_env("MaximizationBias-v0", 0)
    assert env.legal.tolist() == [[True] * 2 + [False] * 8, [True] * 10, [True] * 10]
    env.reset()
    assert env.step(1) == (2, 0.0, True, False)  # right: the end
    rewards = []
    for i in range(2000):
        assert env.reset() == 0
        assert env.step(0) == (1, 0.0, False, False)  # left: B
        obs, reward, terminated, truncated = env.step(i % 10)
        assert (obs, terminated, truncated) == (2, True, False)
        rewards.append(reward)
    assert np.mean(rewards) == pytest.approx(-0.1, abs=4 / 2000**0.5)
    assert np.var(rewards) == pytest.approx(1.0, abs=4 * (2 / 2000) ** 0.5)
    assert script.make_env("MaximizationBias-v0", 0, n_actions=3).n_actions == 3


def plain_left_actions(double, runs, episodes, rng):
    """Example 6.7 in plain loops: the fraction of left actions in each episode."""

    def best(values):
        return rng.choice([i for i, x in enumerate(values) if x == max(values)])

    left = [0] * episodes
    for _ in range(runs):
        tables = [[[0.0] * 2, [0.0] * 10] for _ in range(1 + double)]
        for episode in range(episodes):
            s = 0
            while s is not None:
                values = [sum(x) for x in zip(*(table[s] for table in tables))]
                a = rng.integers(len(values)) if rng.random() < 0.1 else best(values)
                left[episode] += s == 0 and a == 0
                r = rng.normal(-0.1, 1) if s == 1 else 0.0
                next_s = 1 if s == 0 and a == 0 else None
                q, other = tables[0], tables[-1]
                if double and rng.random() < 0.5:
                    q, other = other, q
                y = r if next_s is None else r + other[next_s][best(q[next_s])]
                q[s][a] += 0.1 * (y - q[s][a])
                s = next_s
    return np.array(left) / runs


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_bias_is_that_of_plain_loops(name):
    """Sutton and Barto, Example 6.7: Q-learning goes left much more often than right at first."""
    runs, episodes = 60, 60
    found = tabular.left_actions(name, range(1, runs + 1), episodes)
    assert found.shape == (runs, episodes)
    plain = plain_left_actions(name == DOUBLE, runs, episodes, np.random.default_rng(0))
    for part in (slice(0, 4), slice(10, 30), slice(40, 60)):
        # A run's episodes depend on each other: the spread is that of the runs' means.
        means = found[:, part].mean(axis=1)
        spread = means.std() / runs**0.5
        assert abs(means.mean() - plain[part].mean()) < 4 * 2**0.5 * max(spread, 0.01)
    early = found[:, 10:30].mean()
    assert early > 0.75 if name == SINGLE else early < 0.5


# ---- the machinery -------------------------------------------------------------------------------


def without_time(state):
    """A checkpoint's contents; arrays as bytes."""
    state = {key: x for key, x in state.items() if key not in ("seconds", "args")}
    return {k: (x.dtype, x.tobytes()) if isinstance(x, np.ndarray) else x for k, x in state.items()}


@pytest.mark.parametrize("env_id", [DRY, "CliffWalking-v1", "MaximizationBias-v0"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(script, env_id, in_tmp, monkeypatch):
    """Also in the middle of an episode, and with epsilon and alpha that decay."""
    saved, save = [], script.save_checkpoint

    def save_and_keep(path, state):
        saved.append(copy.deepcopy(state))
        return save(path, state)

    monkeypatch.setattr(script, "save_checkpoint", save_and_keep)
    options = {"env_id": env_id, "total_timesteps": 1500, "checkpoint_frequency": 501}
    options |= {"eval_episodes": 2, "eval_max_steps": 50, "learning_rate_decay": 0.6}
    main_in_process(script, options, monkeypatch)
    first, *_, whole = saved
    assert (first["global_step"], whole["global_step"]) == (501, 1500)
    if env_id != "MaximizationBias-v0":
        assert first["env"]["actions"], "it was not saved within an episode"
    (in_tmp / "resumed").mkdir()
    assert save(in_tmp / "resumed" / "checkpoint.npz", first)
    main_in_process(script, {"resume": in_tmp / "resumed" / "checkpoint.npz"}, monkeypatch)
    assert without_time(saved[-1]) == without_time(whole)
    assert without_time(first)["q_table"] != without_time(whole)["q_table"]


def test_same_seed_same_run_and_evaluations_do_not_change_it(script, in_tmp, monkeypatch):
    ends, save = [], script.save_checkpoint

    def save_and_keep(path, state):
        ends.append(without_time(copy.deepcopy(state)))
        return save(path, state)

    monkeypatch.setattr(script, "save_checkpoint", save_and_keep)
    options = SMALL | {"env_id": "FrozenLake-v1", "total_timesteps": 1000}
    for changes in ({}, {"eval_frequency": 100}, {"seed": 2}):
        main_in_process(script, options | changes, monkeypatch)
    assert ends[0] == ends[1] != ends[2]


def test_a_run_prints_its_settings_its_policy_and_logs_cleanrls_names(script, in_tmp):
    options = SMALL | {"env_id": "FrozenLake-v1", "log_frequency": 500, "eval_frequency": 1000}
    done = run(script.__name__, options, in_tmp)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{script.__name__}: FrozenLake-v1, all in runs/")
    assert "learning_rate 1.0, learning_rate_decay 0.55, gamma 0.99" in lines[1]
    assert sum("evaluated: " in line for line in lines) == 3
    table = lines.index("greedy policy (H hole, G goal) and max_a Q(s, a)")
    assert re.match("[←↓→↑.<v>^] H [←↓→↑.<v>^] H ", lines[table + 2])
    assert re.search(r"^row 0, column 0 +-?\d\.\d{3}", done.stdout, re.M)
    logged = scalars(next(in_tmp.glob("runs/*")))
    assert [e.step for e in logged["losses/td_loss"]] == [*range(500, 3001, 500)]
    assert [e.step for e in logged["eval/episodic_return"]] == [1000, 2000, 3000]
    assert {"charts/SPS", "charts/epsilon", "losses/q_values"} <= set(logged)
    lengths = [e.value for e in logged["charts/episodic_length"]]
    assert len(lengths) == len(logged["charts/episodic_return"])
    assert 2900 < sum(lengths) <= 3000


def test_settings_of_an_environment_yield_to_the_command_line(script, monkeypatch):
    argv = [script.__file__, "--env-id", "Taxi-v4", "--end-e", "0.2"]
    monkeypatch.setattr(sys, "argv", argv)
    args = script.parse_args()
    assert (args.learning_rate_decay, args.end_e, args.total_timesteps) == (0.0, 0.2, 500_000)
    for settings in script.ENV_DEFAULTS.values():
        script.check_args(script.RunArgs(**settings))


def test_what_a_person_reads(script):
    taxi = gym.make("Taxi-v4").unwrapped
    state = taxi.encode(2, 3, 0, 1)
    assert script.state_name(state, taxi) == "taxi (2, 3), passenger at R, to G"
    assert script.state_name(taxi.encode(0, 4, 4, 3), taxi).endswith("passenger in it, to B")
    q_values = np.zeros((500, 6))
    q_values[state] = [-1.0, 2.0, 0.0, 0.0, -9.0, -9.0]
    page = script.describe(q_values, taxi, [state, state, 7]).splitlines()
    assert page[0] == "Q(s, a), along the first evaluated episode (* the best action)"
    assert page[1].split()[:2] == ["south", "north"] and len(page) == 3
    assert page[2].split()[-6:] == ["-1.000", "2.000*", "0.000", "0.000", "-9.000", "-9.000"]
    cliff = gym.make("CliffWalking-v1").unwrapped
    q_values = np.zeros((48, 4))
    q_values[36, 0], q_values[35, 2] = 1.0, 2.0  # up at the start, down above the goal
    lines = script.describe(q_values, cliff, [36]).splitlines()
    assert lines[0] == "greedy policy (C cliff, G goal) and max_a Q(s, a)"
    up, down = ("↑", "↓") if script.can_print("↑") else ("^", "v")
    assert lines[4].startswith(f"{up} C C C C C C C C C C G") and lines[3][22] == down
    assert lines[3][0] == "." and lines[-1].startswith("row 3, column 0")
    bias = script.make_env("MaximizationBias-v0", 0)
    lines = script.describe(np.where(bias.legal, 1.0, -np.inf), bias.env.unwrapped, [])
    assert re.search(r"^A +1\.000\* +1\.000\* +- ", lines, re.M)


def test_ctrl_c_saves_and_prints_the_command_that_goes_on(in_tmp):
    options = {"total_timesteps": 10**7, "checkpoint_frequency": 100, "eval_episodes": 3}
    process, folder = started(SINGLE, options, in_tmp)
    deadline = time.monotonic() + 60
    while not (folder / "checkpoint.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    line = next(x for x in out.splitlines() if x.startswith("go on with: "))
    words = shlex.split(line.removeprefix("go on with: python "))
    state = load(SINGLE).load_checkpoint(words[-1] if "/" == words[-1][0] else in_tmp / words[-1])
    assert 0 < state["global_step"] < 10**7
    words += ["--total-timesteps", str(state["global_step"] + 100)]
    done = subprocess.run([sys.executable, *words], cwd=in_tmp, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"step {state['global_step'] + 100}, evaluated" in done.stdout
    assert len([*in_tmp.glob("runs/*")]) == 1


def test_an_evaluation_prints_the_policy_and_writes_nothing(script, in_tmp, monkeypatch, capsys):
    main_in_process(script, SMALL, monkeypatch)
    before = {path: path.read_bytes() for path in in_tmp.rglob("*") if path.is_file()}
    capsys.readouterr()
    path = next(in_tmp.glob("runs/*/checkpoint.npz"))
    main_in_process(script, {"evaluate": path, "eval_episodes": 2}, monkeypatch)
    out = capsys.readouterr().out
    assert "in 2 episodes" in out and "greedy policy" in out
    assert before == {path: path.read_bytes() for path in in_tmp.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"env_id": "Nowhere-v0"}, "--env-id Nowhere-v0"),
        ({"env_id": "CartPole-v1"}, "Box observations; a table needs Discrete ones"),
        ({"env_id": "Blackjack-v1"}, "Tuple observations"),
        ({"env_id": "Large-v0"}, "its table has"),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0"),
        ({"learning_rate": "nan"}, "--learning-rate must be"),
        ({"learning_rate": 1.5}, "--learning-rate must be"),
        ({"learning_rate_decay": -0.1}, "--learning-rate-decay must be between 0 and 1"),
        ({"gamma": 1.01}, "--gamma must be between 0 and 1"),
        ({"end_e": "nan"}, "--end-e must be between 0 and 1"),
        ({"total_timesteps": 0}, "--total-timesteps must be positive"),
        ({"eval_episodes": -1}, "--eval-episodes must be 0 or more"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"resume": "none.npz"}, "no checkpoint at none.npz"),
        ({"evaluate": "none.npz"}, "no checkpoint at none.npz"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(script, options, words, in_tmp, monkeypatch):
    gym.register("Large-v0", Large) if "Large-v0" not in gym.registry else None
    assert words in refused(script.__name__, options, monkeypatch)
    assert not [*in_tmp.iterdir()]


class Large(gym.Env):
    observation_space, action_space = gym.spaces.Discrete(10**9), gym.spaces.Discrete(9)


def test_the_exit_status_of_an_error_is_not_zero(in_tmp):
    done = run(SINGLE, {"env_id": "CartPole-v1"}, in_tmp)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --env-id CartPole-v1: it has Box observations")


def damaged(state, path, script):
    """Checkpoints that are wrong in one way each: (what, a function that writes it)."""

    def write(**changes):
        assert script.save_checkpoint(path, state | changes)

    rng = copy.deepcopy(state["rng"])
    rng["state"]["state"] = "no number"
    yield "cut", lambda: path.write_bytes(path.read_bytes()[:-200])
    yield "empty", lambda: path.write_bytes(b"")
    yield "one byte", lambda: path.write_bytes(flipped(path.read_bytes()))
    yield "a pickle", lambda: np.savez(path, rest=np.array([{}], dtype=object))
    yield "another file", lambda: write(script="dqn_cartpole")
    yield "other arguments", lambda: write(args=state["args"] | {"new": 1})
    yield "a wrong type", lambda: write(args=state["args"] | {"gamma": "0.9"})
    yield "a NaN", lambda: write(q_table=state["q_table"] * np.nan)
    yield "an infinite value", lambda: write(q_table=state["q_table"] + np.inf)
    yield "another size", lambda: write(q_table=state["q_table"][..., :-1])
    yield "another type", lambda: write(counts=state["counts"].astype(np.float32))
    yield "a negative number", lambda: write(global_step=-1)
    yield "the random state", lambda: write(rng=rng)
    yield "an action", lambda: write(env=state["env"] | {"actions": [99]})
    yield "too many actions", lambda: write(env=state["env"] | {"actions": [0] * 1000})


def flipped(data):
    middle = len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


def test_damaged_checkpoints_are_one_line(script, in_tmp, monkeypatch):
    main_in_process(script, SMALL | {"total_timesteps": 500}, monkeypatch)
    path = next(in_tmp.glob("runs/*/checkpoint.npz"))
    state, good = script.load_checkpoint(str(path)), path.read_bytes()
    for what, write in damaged(state, path, script):
        path.write_bytes(good)
        write()
        before = sorted(in_tmp.rglob("*"))
        line = refused(script.__name__, {"resume": path, "total_timesteps": 900}, monkeypatch)
        assert "checkpoint" in line, what
        assert sorted(in_tmp.rglob("*")) == before, what
    path.write_bytes(good)
    other = SCRIPTS[script.__name__ == SINGLE]
    assert f"written by {script.__name__}.py" in refused(other, {"resume": path}, monkeypatch)
    both = {"resume": path, "evaluate": path}
    assert "not both" in refused(script.__name__, both, monkeypatch)
    line = refused(script.__name__, {"resume": path, "env_id": "Taxi-v4"}, monkeypatch)
    assert "--env-id cannot change" in line


def test_a_full_disk(script, in_tmp, monkeypatch, capsys):
    """Without the log the run goes on; a checkpoint that is not written is an error."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(script.RecordWriter, "flush", full)
        main_in_process(script, SMALL, patch)
    out = capsys.readouterr().out
    assert out.count("cannot log to") == 1 and "training continues" in out
    path = next(in_tmp.glob("runs/*/checkpoint.npz"))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(script.np, "savez", full)
        with pytest.raises(SystemExit) as left:
            main_in_process(script, {"resume": path, "total_timesteps": 3100}, patch)
    assert left.value.code == 1 and "the one before it is kept" in capsys.readouterr().err
    assert path.read_bytes() == before and not [*in_tmp.rglob("*.partial")]


def test_no_torch_is_imported(script):
    code = f"import runpy, sys; runpy.run_path({script.__file__!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# ---- benchmarks/tabular.py -----------------------------------------------------------------------


def test_summaries_and_tables():
    fractions = [0.5, 0.9, 0.3, 0.08, 0.11, 0.1, 0.06, 0.05, 0.07, 0.06]
    found = tabular.summary_of(fractions)
    assert found == {
        "highest": 0.9,
        "at_episode": 2,
        "at_most_10%_from": 6,
        "last_tenth": 0.06,
    }
    assert tabular.summary_of([0.5] * 20)["at_most_10%_from"] is None
    assert tabular.summary_of([0.05] * 20)["at_most_10%_from"] == 1
    page = "\n".join(tabular.bias_report({SINGLE: fractions, DOUBLE: [0.05] * 10}, 2500))
    assert "| Q-learning | 90.0% | 2 | 6 | 6.0% |" in page and "standard error at most 1.0%" in page
    result = {"script": DOUBLE, "env_id": "Taxi-v4", "optimum": 7.93, "seeds": [1, 2]}
    result |= {"returns": [7.93 + 1e-9, 7.9], "seconds": [20.0, 30.0]}
    assert tabular.reaches(result) == [True, False]
    page = "\n".join(tabular.learning_report([result]))
    assert "| Taxi-v4 | double Q-learning | 7.9300 | 1 of 2 | 7.9000 | 25 |" in page


def test_chunks_of_runs_are_the_runs(monkeypatch):
    """Every seed once, whatever the number of processes and the size of a chunk."""
    whole = {name: tabular.left_actions(name, range(1, 6), 4).mean(axis=0) for name in SCRIPTS}
    monkeypatch.setattr(tabular, "CHUNK", 2)
    assert tabular.measure_bias(5, 4, 1) == {name: x.tolist() for name, x in whole.items()}


def test_the_bias_figure():
    fractions = {SINGLE: [0.5, 0.9, 0.06], DOUBLE: [0.5, 0.3, 0.05]}
    figure = tabular.draw(fractions, 10)
    check_labels(figure)
    assert [line.get_ydata()[-1] for line in figure.axes[0].lines] == [0.06, 0.05, 0.05]


def test_a_record(repository):
    for name in SCRIPTS:
        shutil.copy(ALGOS / f"{name}.py", repository / "algos")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "the scripts")
    words = ["benchmarks/tabular.py", "--parts", "bias", "--runs", 3, "--episodes", 5]
    done = test_benchmarks.run(repository, *words, "--record", "record")
    assert done.returncode == 0, done.stderr
    record = repository / "record"
    assert (record / "bias.png").read_bytes().startswith(b"\x89PNG")
    left = json.loads((record / "results.json").read_text())["bias"]["left"]
    with open(record / "left.csv") as file:
        rows = [*csv.DictReader(file)]
    assert [float(row[SINGLE]) for row in rows] == left[SINGLE] and len(rows) == 5
    assert "Maximization bias" in (record / "README.md").read_text()
