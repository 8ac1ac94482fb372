"""What every file on vectors can do besides its algorithm: optimizers, exploration, MinAtar."""

import copy
import re
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load
from test_run import checkpoint_of, main_in_process, refused, run, same, scalars, small

MINATAR = ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"]


def one_step(optimizer, start, gradients):
    """The weights after one step for each gradient, with the script's optimizer."""
    parameter = optimizer.param_groups[0]["params"][0]
    with torch.no_grad():
        parameter.copy_(torch.tensor(start))
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameter.detach().numpy().ravel().copy()


def test_optimizers_equal_their_equations():
    """Adam; AdamW with amsgrad and a decay of 0.01; RMSProp, centred, alpha 0.95, epsilon 0.01."""
    script, start, gradients = load("dqn_cartpole"), [[1.0, -2.0]], [[[0.5, -3.0]], [[-0.1, 2.0]]]
    rate, w = 0.1, np.array(start[0])
    adam, adamw, rmsprop = w.copy(), w.copy(), w.copy()
    m = v = largest = mean = square = np.zeros(2)
    for t, g in enumerate(np.array(gradients)[:, 0], 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        largest = np.maximum(largest, v)
        first = m / (1 - 0.9**t)
        adam = adam - rate * first / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        decayed = adamw * (1 - rate * 0.01)
        adamw = decayed - rate * first / (np.sqrt(largest / (1 - 0.999**t)) + 1e-8)
        mean, square = 0.95 * mean + 0.05 * g, 0.95 * square + 0.05 * g**2
        rmsprop = rmsprop - rate * g / (np.sqrt(square - mean**2) + 0.01)
    for name, expected in (("adam", adam), ("adamw", adamw), ("rmsprop", rmsprop)):
        args = script.RunArgs(optimizer=name, learning_rate=rate)
        optimizer = script.make_optimizer(torch.nn.Linear(2, 1, bias=False), args)
        np.testing.assert_allclose(one_step(optimizer, start, gradients), expected, rtol=1e-5)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_adam_is_pytorchs(max_grad_norm):
    """Bit for bit, also after a checkpoint; with --max-grad-norm on clipped gradients."""
    script = load("dqn_cartpole")
    args = script.RunArgs(learning_rate=0.01, adam_eps=1e-4, max_grad_norm=max_grad_norm)
    torch.manual_seed(1)
    networks = [torch.nn.Linear(5, 3)]
    networks += [copy.deepcopy(networks[0]) for _ in range(2)]
    ours, resumed = (script.make_optimizer(network, args) for network in networks[:2])
    theirs = torch.optim.Adam(networks[2].parameters(), 0.01, eps=1e-4, fused=True)
    optimizers = [ours, resumed, theirs]
    for step in range(6):
        if step == 3:
            networks[1].load_state_dict(networks[0].state_dict())
            resumed = script.make_optimizer(networks[1], args)
            resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
            optimizers[1] = resumed
        x = torch.randn(7, 5)
        for network, optimizer in zip(networks, optimizers):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            if optimizer is theirs and max_grad_norm:
                torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)  # as Run.anneal does
            optimizer.step()
        weights = [[*network.parameters()] for network in networks]
        assert all(map(torch.equal, weights[0], weights[2]))
        assert all(map(torch.equal, weights[0], weights[1])), step


def test_adam_eps_is_the_epsilon_of_adam():
    for name in ("adam", "adamw"):
        args = load("dqn_cartpole").RunArgs(optimizer=name, adam_eps=0.25)
        optimizer = load("dqn_cartpole").make_optimizer(torch.nn.Linear(2, 1), args)
        assert optimizer.param_groups[0]["eps"] == 0.25


def test_rmsprop_on_atari_is_that_of_the_paper():
    """The gradient is summed over the batch, and 0.01 stands in the root. A batch of 4 rows, loss
    and gradient written for each row; the script is given the gradient of the mean."""
    script, rate, w = load("dqn_atari"), 0.1, np.array([1.0, -2.0])
    rows = np.random.default_rng(1).normal(size=(3, 4, 2))  # three steps of a batch of four
    expected, m, n = w.copy(), np.zeros(2), np.zeros(2)
    for batch in rows:
        g = batch.sum(axis=0)
        m, n = 0.95 * m + 0.05 * g, 0.95 * n + 0.05 * g**2
        expected = expected - rate * g / np.sqrt(n - m**2 + 0.01)
    args = script.RunArgs(optimizer="rmsprop", learning_rate=rate, batch_size=4)
    optimizer = script.make_optimizer(torch.nn.Linear(2, 1, bias=False), args)
    means = [[batch.mean(axis=0).tolist()] for batch in rows]
    np.testing.assert_allclose(one_step(optimizer, [w.tolist()], means), expected, rtol=1e-5)
    saved = optimizer.state_dict()  # as a checkpoint holds it
    assert {key for state in saved["state"].values() for key in state} == {"m", "n"}


def test_the_gradient_is_clipped_to_its_norm_before_the_step():
    script, network = load("dqn_cartpole"), torch.nn.Linear(2, 1, bias=False)
    args = script.RunArgs(max_grad_norm=1.0, optimizer="rmsprop", learning_rate=0.1)
    clipped = one_step(script.make_optimizer(network, args), [[0.0, 0.0]], [[[3.0, 4.0]]])
    plain = script.make_optimizer(network, script.RunArgs(optimizer="rmsprop", learning_rate=0.1))
    np.testing.assert_allclose(clipped, one_step(plain, [[0.0, 0.0]], [[[0.6, 0.8]]]), rtol=1e-5)
    unclipped = one_step(plain, [[0.0, 0.0]], [[[3.0, 4.0]]])
    assert not np.allclose(clipped, unclipped)


def test_exponential_exploration_is_the_tutorials():
    """epsilon = end + (start - end) exp(-t / 1000), as in PyTorch's DQN tutorial."""
    script = load("dqn_cartpole")
    args = script.Args(start_e=0.9, end_e=0.05, exploration="exponential")
    args.total_timesteps, args.exploration_fraction = 50_000, 1_000 / 50_000
    for t in (0, 1, 500, 3_000, 50_000):
        assert script.epsilon_at(t, args) == pytest.approx(0.05 + 0.85 * np.exp(-t / 1000))
    args.exploration = "linear"
    assert script.epsilon_at(500, args) == pytest.approx(0.9 - 0.85 / 2)
    args.exploration = "cosine"
    for t, epsilon in ((0, 0.9), (250, 0.05 + 0.85 * (1 + 0.5**0.5) / 2), (500, 0.475)):
        assert script.epsilon_at(t, args) == pytest.approx(epsilon)
    assert script.epsilon_at(9_999, args) == pytest.approx(0.05)
    for args.exploration in ("linear", "exponential", "cosine"):
        args.exploration_fraction = 0.0
        assert script.epsilon_at(0, args) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("linear", (1, 0.75, 0.5, 0)),
        ("cosine", (1, (1 + 0.5**0.5) / 2, 0.5, 0)),
        ("exponential", (1, 0.01**0.25, 0.1, 0.01)),
        ("constant", (1, 1, 1, 1)),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, factors):
    script, group = load("dqn_cartpole"), {"lr": 0.0}
    args = script.RunArgs(learning_rate=0.2, lr_schedule=schedule, total_timesteps=1_000)
    for step, factor in zip((0, 250, 500, 1_000), factors):
        run = SimpleNamespace(args=args, step=step)
        script.Run.anneal(run, SimpleNamespace(param_groups=[group]))
        assert group["lr"] == pytest.approx(0.2 * factor)


def test_stop_return_says_how_long_it_took(in_tmp):
    options = small("dqn_cartpole") | {"stop_return": 9, "total_timesteps": 20_000}
    result = run("dqn_cartpole", options, in_tmp)
    line = next(x for x in result.stdout.splitlines() if "--stop-return" in x)
    words = line.replace(",", "").split()
    steps = torch.load(checkpoint_of(in_tmp), weights_only=True)["global_step"]
    assert int(words[words.index("episodes") - 1]) >= 100
    assert int(words[words.index("steps") - 1]) == steps
    assert float(words[words.index("seconds") - 1]) > 0


@pytest.mark.parametrize("game", MINATAR)
def test_minatar_games_run_and_resume_exactly(game, in_tmp, monkeypatch):
    """Also at a first step of an episode, where MinAtar may repeat the last action before it."""
    pytest.importorskip("minatar")
    script, states = load("dqn_cartpole"), []
    save = script.save_checkpoint

    def save_and_keep(path, state):
        states.append(copy.deepcopy(state))  # the tensors are the network's own
        return save(path, state)

    monkeypatch.setattr(script, "save_checkpoint", save_and_keep)
    options = {"env_id": f"MinAtar/{game}-v1", "total_timesteps": 600, "checkpoint_frequency": 300}
    options |= {"learning_starts": 100, "buffer_size": 400, "num_envs": 2, "eval_episodes": 0}
    options |= {"checkpoint_replay": True}
    main_in_process(script, options, monkeypatch)
    path = in_tmp / "first" / "checkpoint.pt"
    path.parent.mkdir()
    first, whole = states
    assert first["global_step"] < whole["global_step"] == 600
    assert save(path, first)
    main_in_process(script, {"resume": path}, monkeypatch)
    resumed = states[-1]
    for key in ("q_network", "replay", "rng", "envs", "recent_returns", "episodes"):
        assert same(whole[key], resumed[key]), key
    obs = whole["replay"][2][0]
    assert obs.dtype == torch.uint8 and obs.shape[1:3] == (10, 10)
    assert 0 < obs.float().mean() < 1 and obs.max() == 1


def test_an_episode_of_minatar_does_not_depend_on_the_one_before():
    """MinAtar's sticky actions would repeat the last action of that one."""
    pytest.importorskip("minatar")
    envs = load("dqn_cartpole").make_envs("MinAtar/Breakout-v1", 1, seed=0)
    envs.reset()
    envs.step(np.array([2]))
    assert envs.envs[0].unwrapped.game.last_action != 0
    envs.reset(np.array([True]))
    assert envs.envs[0].unwrapped.game.last_action == 0


def test_minatar_has_its_own_defaults(monkeypatch):
    pytest.importorskip("minatar")
    script = load("dqn_cartpole")
    argv = ["dqn_cartpole.py", "--env-id", "MinAtar/Breakout-v1", "--batch-size", "64"]
    monkeypatch.setattr("sys.argv", argv)
    args = script.parse_args()
    assert (args.total_timesteps, args.train_frequency, args.batch_size) == (1_000_000, 4, 64)


def test_minatar_without_its_package_and_other_pictures_are_refused(in_tmp, monkeypatch):
    script = load("dqn_cartpole")
    find_spec = script.importlib.util.find_spec
    monkeypatch.setattr(
        script.importlib.util, "find_spec", lambda n: None if n == "minatar" else find_spec(n)
    )
    line = refused("dqn_cartpole", {"env_id": "MinAtar/Breakout-v1"}, monkeypatch)
    assert "pip install minatar" in line
    box = gym.spaces.Box(0, 1, (12, 10, 3), bool)
    gym.register("Picture-v0", lambda: Picture(box))
    line = refused("dqn_cartpole", {"env_id": "Picture-v0"}, monkeypatch)
    assert "this file needs a vector" in line


class Picture(gym.Env):
    action_space = gym.spaces.Discrete(2)

    def __init__(self, observation_space):
        self.observation_space = observation_space


def test_the_convolution_sees_pictures_as_height_width_channel():
    """Against a plain loop over pixels, with the weights of the network."""
    script = load("dqn_cartpole")
    torch.manual_seed(0)
    q_network = script.QNetwork(np.zeros((10, 10, 4), np.uint8), 3)
    obs = (torch.rand(2, 10, 10, 4) < 0.2).to(torch.uint8)
    weights = {k: v.numpy().astype(np.float64) for k, v in q_network.state_dict().items()}
    kernel, bias, linear, linear_bias, head, head_bias = weights.values()
    pictures, hidden = obs.numpy().astype(np.float64), np.zeros((2, 8, 8, 16))
    for y in range(8):
        for x in range(8):
            hidden[:, y, x] = pictures[:, y : y + 3, x : x + 3].reshape(2, -1) @ kernel.T + bias
    assert hidden.shape[-1] == 16 and linear.shape == (128, 1024)  # Young and Tian, 2019
    hidden = np.maximum(np.maximum(hidden, 0).reshape(2, -1) @ linear.T + linear_bias, 0)
    expected = hidden @ head.T + head_bias
    np.testing.assert_allclose(q_network(obs).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def plain_estimates(values, rewards, discounts, last_value):
    """An oracle of value_estimates by the definition: a sum of its own for every state."""
    obtained = []
    for t in range(len(rewards)):
        total, factor = 0.0, 1.0
        for k in range(t, len(rewards)):
            total += factor * rewards[k]
            factor *= discounts[k]
        obtained.append(total + factor * last_value)
    return sum(values) / len(values), sum(obtained) / len(obtained)


def test_value_estimates_are_discounted_sums():
    rng, script = np.random.default_rng(1), load("dqn_cartpole")
    values, rewards = rng.normal(size=(2, 9, 3))
    discounts = 0.9 * (rng.random((9, 3)) < 0.7)  # 0 where a life was lost, as in training
    steps = list(zip(values, rewards, discounts))
    for lane in range(3):
        expected = plain_estimates(values[:, lane], rewards[:, lane], discounts[:, lane], 2.5)
        np.testing.assert_allclose(script.value_estimates(steps, lane, 2.5), expected)


@pytest.mark.parametrize("name, scale", [("dqn_cartpole", 1.0), ("pqn_cartpole", 0.1)])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1"])  # terminated, and truncated
def test_an_evaluation_compares_q_with_the_returns_that_came(name, scale, env_id):
    script, seed = load(name), (1, 7)
    args = script.RunArgs(env_id=env_id, eval_episodes=5, eval_e=0.3, gamma=0.97)
    envs, rng = script.make_envs(env_id, 5, seed), np.random.default_rng(seed)
    torch.manual_seed(2)
    q_network = script.QNetwork(envs.obs_space, envs.n_actions)
    returns, estimates, _ = script.evaluate(q_network, args, torch.device("cpu"), seed)
    assert estimates.shape == (5, 2) and not q_network._forward_hooks
    obs, expected, kept, open_lanes = envs.reset(), [], [], {*range(5)}
    while open_lanes:
        with torch.no_grad():
            values = q_network(torch.from_numpy(obs)).max(1).values.numpy()
        actions = script.act(q_network, obs, 0.3, rng, torch.device("cpu"))
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        kept.append((values, scale * rewards, 0.97 * (1 - terminations)))
        with torch.no_grad():
            last = q_network(torch.from_numpy(obs)).max(1).values.numpy()
        for lane, episode_return, length in infos["episodes"]:
            if lane in open_lanes:
                open_lanes.remove(lane)
                columns = [[row[i][lane] for row in kept[-length:]] for i in range(3)]
                expected.append((episode_return, *plain_estimates(*columns, last[lane])))
                assert truncations[lane] == (env_id == "Acrobot-v1")
        obs = envs.reset(terminations | truncations)
    np.testing.assert_allclose(np.column_stack([returns, estimates]), expected, rtol=1e-5)


def test_a_run_logs_the_overestimation(in_tmp, monkeypatch, capsys):
    script = load("dqn_cartpole")
    main_in_process(script, small("dqn_cartpole") | {"eval_episodes": 4}, monkeypatch)
    *_, line = re.findall(r"in 4 episodes; Q predicts (\S+), true (\S+)", capsys.readouterr().out)
    events = scalars(next(in_tmp.rglob("events*")).parent)
    predicted, true, bias, error = (
        events[f"eval/{tag}"][-1].value
        for tag in ("predicted_value", "true_value", "overestimation", "overestimation_ci95")
    )
    np.testing.assert_allclose((predicted, true), [float(x) for x in line], rtol=1e-3)
    assert bias == pytest.approx(predicted - true, abs=1e-4) and error > 0
