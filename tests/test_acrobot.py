"""Acrobot: --reward tip-height, the arguments of dqn_acrobot.py, and Q-learning without replay."""

import copy
import re

import gymnasium as gym
import numpy as np
import oracle
import pytest
import torch
from conftest import load
from test_run import checkpoint_of, main_in_process, refused, scalars, small
from test_td_loss import BATCH, N_ACTIONS, networks, random_batch

ACROBOT = ["dqn_acrobot", "q_learning_acrobot"]


def short(name):
    """Options of a short run."""
    return small(name) | {"num_envs": 2, "total_timesteps": 400, "checkpoint_frequency": 0}


def height_of(obs):
    """The tip above the pivot, from (cos theta_1, sin theta_1, cos theta_2, sin theta_2, ...).

    Each link is 1 long. theta_1 is the first link's angle from straight down, theta_2 the second's
    from the first.
    """
    cos_1, sin_1, cos_2, sin_2 = np.asarray(obs, np.float64)[:4]
    elbow = -cos_1
    return elbow - (cos_1 * cos_2 - sin_1 * sin_2)


@pytest.mark.parametrize(
    ("theta_1", "theta_2", "height"),
    [
        (0, 0, -2),  # hangs
        (np.pi, 0, 2),  # stands
        (np.pi / 2, 0, 0),  # level
        (np.pi, np.pi, 0),  # folded: the tip is at the pivot
        (np.pi / 2, np.pi / 2, 1),  # an arm to the side, the other straight up: on the line
        (0, np.pi / 2, -1),
    ],
)
@pytest.mark.parametrize("name", ACROBOT)
def test_tip_height_at_known_positions(name, theta_1, theta_2, height):
    state = np.array([theta_1, theta_2, 3.0, -2.0])
    assert load(name).tip_height(state) == pytest.approx(height)


def test_tip_height_rewards_the_height_after_the_step():
    """By trigonometry from the observation; above 0 in the step that ends the episode only."""
    env, rng = load("dqn_acrobot").reward_height(gym.make("Acrobot-v1")), np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    rewards, ends = [], []
    for _ in range(2_000):
        action = 2 * int(obs[5] > 0) if rng.random() < 0.9 else 1  # swings higher and higher
        obs, reward, terminated, truncated, _ = env.step(action)
        assert reward == pytest.approx(height_of(obs) - 1, abs=1e-5)
        assert terminated == (reward > 0)
        rewards.append(reward)
        if terminated or truncated:
            ends.append(terminated)
            obs, _ = env.reset()
    assert any(ends) and -3 <= min(rewards) < -2.5


@pytest.mark.parametrize("name", ACROBOT)
def test_training_takes_tip_height_and_evaluation_the_environments_return(
    name, in_tmp, monkeypatch, capsys
):
    script = load(name)
    options = short(name) | {"reward": "tip-height", "max_episode_steps": 50, "eval_frequency": 0}
    main_in_process(script, options | {"eval_episodes": 1}, monkeypatch)
    tags = scalars(checkpoint_of(in_tmp).parent)
    lengths = [event.value for event in tags["charts/episodic_length"]]
    assert lengths == [50] * (400 // 50), "training episodes are cut at --max-episode-steps"
    for event in tags["charts/episodic_return"]:
        assert -150 <= event.value < -50 and event.value != round(event.value)
    (evaluated,) = tags["eval/episodic_return"]
    assert -500 <= evaluated.value < -50, "its own reward and its own limit"
    assert evaluated.value == round(evaluated.value)
    # Q's reward: it hangs, at -3 a step. -1 a step would give -1 / (1 - gamma) = -100 at least.
    assert tags["eval/true_value"][0].value < -105


@pytest.mark.parametrize("name", ACROBOT)
@pytest.mark.parametrize(
    ("options", "goal"),
    [
        ({}, -90),
        ({"reward": "tip-height"}, -200),
        ({"stop_return": -120.0}, -120),
        ({"reward": "tip-height", "stop_return": -120.0}, -120),
        ({"env_id": "CartPole-v1"}, None),
    ],
)
def test_the_goal_follows_from_the_reward(name, options, goal, monkeypatch):
    script, found = load(name), []

    def stop(args):
        found.append(args.stop_return)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "Run", stop)
    with pytest.raises(KeyboardInterrupt):
        script.main(script.RunArgs(**options))
    assert found == [goal]


@pytest.mark.parametrize("name", ACROBOT)
def test_hidden_sizes(name, in_tmp, monkeypatch):
    script = load(name)
    layers = script.QNetwork(np.zeros(6), 3, (7, 5, 4)).features
    assert [x.out_features for x in layers if hasattr(x, "out_features")] == [7, 5, 4]
    options = short(name) | {"total_timesteps": 100, "eval_episodes": 0}
    monkeypatch.setattr("sys.argv", ["x", "--hidden-sizes", "8", "9", "10"])
    args = script.parse_args()
    assert args.hidden_sizes == (8, 9, 10)
    for key, value in options.items():
        setattr(args, key, value)
    script.main(args)
    path = checkpoint_of(in_tmp)
    weights = torch.load(path, weights_only=True)["q_network"]
    assert [w.shape[0] for k, w in weights.items() if "weight" in k] == [8, 9, 10, 3]
    main_in_process(script, {"resume": path, "total_timesteps": 120}, monkeypatch)
    line = refused(name, {"resume": path, "hidden_sizes": 8}, monkeypatch)
    assert "does not fit these arguments" in line


@pytest.mark.parametrize("name", ACROBOT)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hidden_sizes": 0}, "--hidden-sizes must be at least one number, all positive"),
        ({"max_episode_steps": -1}, "--max-episode-steps must be 0 or more"),
        ({"reward": "tip-height", "env_id": "CartPole-v1"}, "--reward must be env where"),
        ({"gamma": 1.5}, "--gamma must be between 0 and 1"),
        ({"env_id": "Acrobot-v7"}, "--env-id Acrobot-v7"),
    ],
)
def test_bad_input(name, options, expected, in_tmp, monkeypatch):
    assert expected in refused(name, options, monkeypatch)
    assert not list(in_tmp.iterdir())


def test_a_saved_replay_keeps_its_reward(in_tmp, monkeypatch):
    options = short("dqn_acrobot") | {"checkpoint_replay": True, "eval_episodes": 0}
    main_in_process(load("dqn_acrobot"), options, monkeypatch)
    changed = {"resume": checkpoint_of(in_tmp), "reward": "tip-height"}
    assert "--reward cannot change" in refused("dqn_acrobot", changed, monkeypatch)


@pytest.mark.parametrize("loss", ["huber", "mse"])
@pytest.mark.parametrize("seed", range(3))
def test_q_learning_loss_equals_the_oracle(loss, seed):
    """y bootstraps from theta itself, and no gradient flows through it."""
    script = load("q_learning_acrobot")
    torch.manual_seed(seed)
    q_network, _ = networks(script, atari=False)
    arrays, batch = random_batch(script, np.random.default_rng(seed), atari=False)
    value, td_error, q_taken = script.td_loss(q_network, batch, script.Args(loss=loss))
    weights = q_network.state_dict()
    expected = oracle.td_errors(False, weights, weights, arrays)
    np.testing.assert_allclose(td_error.numpy(), expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(value.item(), oracle.loss_of(expected, loss), rtol=1e-9)
    rows = np.arange(BATCH)
    taken = oracle.q_values(weights, arrays["obs"])[rows, arrays["actions"]]
    np.testing.assert_allclose(q_taken.numpy(), taken, rtol=1e-9)

    value.backward()
    d_q = np.zeros((BATCH, N_ACTIONS))
    slope = np.clip(-expected, -1, 1) if loss == "huber" else -2 * expected
    d_q[rows, arrays["actions"]] = slope / BATCH
    before = [p.detach().numpy() for p in q_network.parameters()]
    gradients = oracle.perceptron_gradients(before, arrays["obs"], d_q)
    for p, gradient in zip(q_network.parameters(), gradients):
        np.testing.assert_allclose(p.grad.numpy(), gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_q_learning_is_dqn_with_theta_as_target_and_the_newest_transitions(
    loss, in_tmp, monkeypatch
):
    """30 steps of q_learning_acrobot.py, and the same with the pieces of dqn_acrobot.py."""
    script, dqn = load("q_learning_acrobot"), load("dqn_acrobot")
    n, steps = 3, 30
    options = {"num_envs": n, "total_timesteps": n * steps, "loss": loss, "eval_episodes": 0}
    options |= {"max_episode_steps": 7}  # truncations, which bootstrap
    main_in_process(script, options, monkeypatch)
    learned = torch.load(checkpoint_of(in_tmp), weights_only=True)["q_network"]

    args = dqn.RunArgs(**options)
    dqn.prepare_torch(args)
    rng = np.random.default_rng(args.seed)
    envs = dqn.make_envs("Acrobot-v1", n, args.seed, max_episode_steps=7)
    q_network = dqn.QNetwork(envs.obs_space, envs.n_actions)
    first = copy.deepcopy(q_network.state_dict())
    optimizer = dqn.make_optimizer(q_network, args)
    obs, cut = envs.reset(), 0
    for step in range(0, n * steps, n):
        epsilon = dqn.epsilon_at(step, args)
        actions = dqn.act(q_network, obs, epsilon, rng, torch.device("cpu"))
        next_obs, rewards, terminations, truncations, _ = envs.step(actions)
        cut += truncations.sum()
        newest = dqn.Replay(n, envs.obs_space, torch.device("cpu"))  # holds one step only
        newest.add(obs, actions, rewards, next_obs, args.gamma * (1 - terminations))
        batch = dqn.Batch(*map(torch.tensor, newest.columns))  # aligned, as in the script
        obs = envs.reset(terminations | truncations)
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / (n * steps))
        target_network = copy.deepcopy(q_network)  # theta^- = theta
        value, *_ = dqn.td_loss(q_network, target_network, batch, args)
        q_network.zero_grad()
        value.backward()
        optimizer.step()
    assert cut > 0
    for key, weights in q_network.state_dict().items():
        assert torch.equal(weights, learned[key]), key
        assert not torch.equal(weights, first[key]), key


def test_q_learning_keeps_no_transition():
    """Neither a replay nor a target network is left in the file."""
    script = load("q_learning_acrobot")
    names = set(script.RunArgs.__dataclass_fields__)
    assert not names & {"buffer_size", "batch_size", "learning_starts", "target_network_frequency"}
    assert not hasattr(script, "Replay") and "tau" not in names


@pytest.mark.parametrize("name", ACROBOT)
def test_a_saved_policy_is_played_and_filmed(name, in_tmp, monkeypatch, capsys):
    """The command of the docstring."""
    pytest.importorskip("moviepy")
    script = load(name)
    main_in_process(script, short(name) | {"eval_episodes": 0}, monkeypatch)
    path = checkpoint_of(in_tmp)
    options = {"evaluate": path, "capture_video": True, "eval_episodes": 1}
    # A short film: the evaluated episode is cut after 20 steps.
    make = script.make_envs
    monkeypatch.setattr(
        script, "make_envs", lambda *a, **k: make(*a, **k | {"max_episode_steps": 20})
    )
    main_in_process(script, options, monkeypatch)
    assert "-20.0 +- 0.0 in 1 episodes" in capsys.readouterr().out
    assert (path.parent / "videos" / "step-400.mp4").stat().st_size > 1_000


def test_the_flags_of_the_docstring_exist():
    script = load("dqn_acrobot")
    assert "--evaluate runs/<run>/checkpoint.pt --capture-video" in script.__doc__
    named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", script.__doc__)}
    assert named <= set(script.RunArgs.__dataclass_fields__) and "hidden_sizes" in named
