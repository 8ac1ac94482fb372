"""PQN: lambda-returns, LayerNorm, RAdam and the updates of a rollout, against plain loops."""

import copy

import numpy as np
import pytest
import torch
from conftest import load
from test_run import checkpoint_of, main_in_process, refused, scalars, small
from test_vectors import one_step

pqn = load("pqn_cartpole")
T, E, GAMMA = 9, 4, 0.9


def random_rollout(seed):
    """Rewards, terminations, truncations and max_a Q(s_{t+1}, a), (T, E) each."""
    rng = np.random.default_rng(seed)
    terminations, truncations = rng.random((2, T, E)) < 0.15
    return rng.normal(size=(T, E)), terminations, truncations, rng.normal(size=(T, E)) * 5


def lambda_return(t, e, rewards, terminations, truncations, values, lam):
    """The forward view: (1 - lambda) sum_n lambda^(n-1) G^(n), the longest one takes the rest.

    G^(n) = r_t + ... + gamma^(n-1) r_{t+n-1} + gamma^n max_a Q(s_{t+n}), 0 after a termination.
    """
    n_step_returns, total, n = [], 0.0, 0
    while True:
        total += GAMMA**n * rewards[t + n, e]
        value = 0.0 if terminations[t + n, e] else values[t + n, e]
        over = terminations[t + n, e] or truncations[t + n, e] or t + n == T - 1
        n += 1
        n_step_returns.append(total + GAMMA**n * value)
        if over:
            break
    weights = [(1 - lam) * lam**k for k in range(n - 1)] + [lam ** (n - 1)]
    return sum(w * g for w, g in zip(weights, n_step_returns))


def returns_of(rewards, terminations, truncations, values, lam):
    discounts = GAMMA * (1 - terminations)
    tensors = map(torch.from_numpy, (rewards, discounts, truncations, values))
    return pqn.lambda_returns(*tensors, lam).numpy()


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.65, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_lambda_returns_equal_the_forward_view(lam, seed):
    rollout = random_rollout(seed)
    assert rollout[1].any() and rollout[2].any()
    expected = [[lambda_return(t, e, *rollout, lam) for e in range(E)] for t in range(T)]
    np.testing.assert_allclose(returns_of(*rollout, lam), expected, rtol=1e-12)


def test_lambda_0_gives_one_step_targets():
    rewards, terminations, truncations, values = random_rollout(0)
    found = returns_of(rewards, terminations, truncations, values, 0.0)
    for t in range(T):
        for e in range(E):
            value = 0 if terminations[t, e] else values[t, e]
            assert found[t, e] == pytest.approx(rewards[t, e] + GAMMA * value)


def test_lambda_1_gives_the_rewards_to_the_end_and_bootstraps_there():
    rewards, terminations, truncations, values = random_rollout(1)
    found = returns_of(rewards, terminations, truncations, values, 1.0)
    for t in range(T):
        for e in range(E):
            total, k = 0.0, t
            while True:
                total += GAMMA ** (k - t) * rewards[k, e]
                if terminations[k, e]:
                    break
                if truncations[k, e] or k == T - 1:
                    total += GAMMA ** (k + 1 - t) * values[k, e]
                    break
                k += 1
            assert found[t, e] == pytest.approx(total)


@pytest.mark.parametrize("lam", [0.5, 1.0])
@pytest.mark.parametrize("truncated", [False, True])
def test_an_end_cuts(lam, truncated):
    """What follows an end does not matter; the value of s_{t+1} does where the end is a cut."""
    rewards, _, _, values = random_rollout(2)
    ends = np.zeros((T, E), bool)
    ends[4] = True
    never = np.zeros_like(ends)
    kinds = (never, ends) if truncated else (ends, never)
    found = returns_of(rewards, *kinds, values, lam)
    later, other = rewards.copy(), values.copy()
    later[5:] += 10
    other[5:] += 10
    np.testing.assert_array_equal(returns_of(later, *kinds, other, lam)[:5], found[:5])
    assert not np.allclose(returns_of(later, never, never, other, lam)[:5], found[:5])
    other = values.copy()
    other[4] += 10
    moved = returns_of(rewards, *kinds, other, lam)[4] - found[4]
    np.testing.assert_allclose(moved, GAMMA * 10 if truncated else 0, atol=1e-12)


def recorded_run(options, monkeypatch):
    """-> the rows given to each rollout, what `take` gave with which network, the minibatches"""
    rows, taken, batches = [], [], []
    add, take, loss = pqn.Rollout.add, pqn.Rollout.take, pqn.td_loss

    def add_and_keep(self, *row):
        rows.append(row)
        add(self, *row)

    def take_and_keep(self, q_network, args):
        data = take(self, q_network, args)
        kept = pqn.Batch(*(x.clone() for x in data))  # data are the rollout's own rows
        taken.append((kept, copy.deepcopy(q_network)))
        return data

    def loss_and_keep(q_network, batch, args):
        batches.append(batch)
        return loss(q_network, batch, args)

    monkeypatch.setattr(pqn.Rollout, "add", add_and_keep)
    monkeypatch.setattr(pqn.Rollout, "take", take_and_keep)
    monkeypatch.setattr(pqn, "td_loss", loss_and_keep)
    main_in_process(pqn, {"eval_episodes": 0} | options, monkeypatch)
    return rows, taken, batches


def test_a_truncated_episode_bootstraps_from_its_true_last_observation(in_tmp, monkeypatch):
    """Acrobot cuts episodes after 500 steps, here in the middle of a rollout."""
    options = {"env_id": "Acrobot-v1", "num_envs": 2, "num_steps": 510, "total_timesteps": 1020}
    options |= {"num_minibatches": 1, "update_epochs": 1, "q_lambda": 0.5}
    step, steps = pqn.Environments.step, []

    def step_and_keep(envs, actions):
        steps.append(step(envs, actions))
        return steps[-1]

    monkeypatch.setattr(pqn.Environments, "step", step_and_keep)
    rows, ((data, q_network),), _ = recorded_run(options, monkeypatch)
    obs, actions, rewards, next_obs, discounts, truncations = map(np.stack, zip(*rows))
    assert truncations[499].all() and truncations.sum() == 2 and (discounts > 0).all()
    np.testing.assert_array_equal(next_obs, [seen[0] for seen in steps])
    assert not np.allclose(next_obs[499], obs[500]), "not the next episode's first observation"
    assert np.abs(obs[500, :, 4:]).max() < 0.11, "an episode begins nearly at rest"
    with torch.no_grad():
        values = q_network(torch.from_numpy(next_obs).flatten(0, 1)).numpy().max(axis=1)
    values, returns = values.reshape(510, 2), data.returns.numpy().reshape(510, 2)
    for e in range(2):
        following = values[-1, e]
        for t in reversed(range(510)):
            mixed = values[t, e] if t == 499 else (following + values[t, e]) / 2
            following = -0.1 + 0.99 * mixed
            assert returns[t, e] == pytest.approx(following, rel=1e-4), t
    np.testing.assert_array_equal(data.obs.numpy(), obs.reshape(-1, 6))
    np.testing.assert_array_equal(data.actions.numpy(), actions.ravel())
    np.testing.assert_allclose(rewards, -0.1)


def test_each_epoch_learns_from_each_transition_once(in_tmp, monkeypatch):
    """E T = 40 transitions: 3 epochs of 6 minibatches of 6 or 7, in a new order each time."""
    options = {"num_envs": 5, "num_steps": 8, "total_timesteps": 90, "num_minibatches": 6}
    options |= {"update_epochs": 3, "learning_rate": 1e-2}
    rows, taken, batches = recorded_run(options, monkeypatch)
    assert len(taken) == 2 and len(batches) == 2 * 3 * 6 and len(rows) == 18
    orders = set()
    for k, (data, _) in enumerate(taken):
        np.testing.assert_array_equal(
            data.obs.numpy(), np.concatenate([r[0] for r in rows[8 * k :][:8]])
        )
        rank = {tuple(row.tolist()): i for i, row in enumerate(data.obs)}
        assert len(rank) == 40
        for epoch in range(3):
            part = batches[18 * k + 6 * epoch :][:6]
            assert {len(batch.obs) for batch in part} == {6, 7}
            order = [rank[tuple(row.tolist())] for batch in part for row in batch.obs]
            assert sorted(order) == list(range(40))
            orders.add(tuple(order))
            returns = torch.cat([batch.returns for batch in part])
            assert torch.equal(returns, data.returns[order]), "targets stay those of the rollout"
    assert len(orders) == 6


def test_rewards_are_scaled_for_learning_only(in_tmp, monkeypatch):
    options = {"num_envs": 4, "num_steps": 32, "total_timesteps": 1024, "reward_scale": 0.25}
    rows, *_ = recorded_run(options, monkeypatch)
    assert {float(x) for row in rows for x in row[2]} == {0.25}
    tags = scalars(checkpoint_of(in_tmp).parent)
    lengths = [event.value for event in tags["charts/episodic_length"]]
    assert [event.value for event in tags["charts/episodic_return"]] == lengths


def layer_norm(x, weight, bias):
    """Over the last axis, the units or the channels; weight and bias are theirs."""
    out = np.empty_like(x)
    for i in np.ndindex(x.shape[:-1]):
        row = x[i]
        out[i] = (row - row.mean()) / np.sqrt(((row - row.mean()) ** 2).mean() + 1e-5)
    return out * weight + bias


def scrambled(q_network):
    """Weights that show where LayerNorm stands: its own are not 1 and 0."""
    with torch.no_grad():
        for p in q_network.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    return {k: v.detach().numpy().astype(np.float64) for k, v in q_network.state_dict().items()}


def test_layer_norm_stands_between_linear_and_relu():
    torch.manual_seed(0)
    q_network = pqn.QNetwork(np.zeros(6, np.float32), 3).double()
    w = [*scrambled(q_network).values()]
    obs = np.random.default_rng(0).normal(size=(5, 6))
    x = np.maximum(layer_norm(obs @ w[0].T + w[1], w[2], w[3]), 0)
    x = np.maximum(layer_norm(x @ w[4].T + w[5], w[6], w[7]), 0)
    assert w[0].shape == (256, 6) and w[4].shape == (256, 256) and w[2].shape == (256,)
    found = q_network(torch.from_numpy(obs)).detach().numpy()
    np.testing.assert_allclose(found, x @ w[8].T + w[9], rtol=1e-9, atol=1e-9)
    before = np.maximum(obs @ w[0].T + w[1], 0)
    other = np.maximum(layer_norm(np.maximum(x @ w[4].T + w[5], 0), w[6], w[7]), 0)
    assert not np.allclose(layer_norm(before, w[2], w[3]), x) and not np.allclose(other, x)


def test_layer_norm_stands_between_convolution_and_relu():
    torch.manual_seed(0)
    q_network = pqn.QNetwork(np.zeros((10, 10, 4), np.uint8), 3)
    kernel, bias, *norm, linear, linear_bias, w, b, head, head_bias = scrambled(q_network).values()
    obs = (torch.rand(3, 10, 10, 4) < 0.2).to(torch.uint8)
    pictures, hidden = obs.numpy().astype(np.float64), np.zeros((3, 8, 8, 16))
    for y in range(8):
        for x in range(8):
            hidden[:, y, x] = pictures[:, y : y + 3, x : x + 3].reshape(3, -1) @ kernel.T + bias
    hidden = np.maximum(layer_norm(hidden, *norm), 0).reshape(3, -1)
    hidden = np.maximum(layer_norm(hidden @ linear.T + linear_bias, w, b), 0)
    expected = hidden @ head.T + head_bias
    np.testing.assert_allclose(q_network(obs).detach().numpy(), expected, rtol=1e-3, atol=1e-3)


def test_the_loss_is_half_the_squared_error_of_the_action_taken():
    torch.manual_seed(1)
    q_network, rng = pqn.QNetwork(np.zeros(6, np.float32), 3).double(), np.random.default_rng(1)
    obs, actions = torch.from_numpy(rng.normal(size=(8, 6))), rng.integers(3, size=8)
    returns = rng.normal(size=8) * 3
    batch = pqn.Batch(obs, torch.from_numpy(actions), torch.from_numpy(returns))
    value, td_error, q_taken = pqn.td_loss(q_network, batch, pqn.Args())
    q_values = q_network(obs).detach().numpy()
    errors = np.array([returns[i] - q_values[i, a] for i, a in enumerate(actions)])
    assert value.item() == pytest.approx(sum(e**2 / 2 for e in errors) / 8)
    np.testing.assert_allclose(td_error.numpy(), errors)
    np.testing.assert_allclose(q_taken.numpy(), returns - errors)
    value.backward()
    expected = np.zeros(3)  # of the last layer's bias: -error / B at the action taken
    np.add.at(expected, actions, -errors / 8)
    np.testing.assert_allclose([*q_network.parameters()][-1].grad.numpy(), expected)


def test_radam_equals_its_equations():
    """Liu et al., 2020, arXiv:1908.03265, algorithm 2, with the gradient clipped to norm 10."""
    rng, rate, w = np.random.default_rng(0), 0.1, np.array([1.0, -2.0])
    gradients = rng.normal(size=(9, 2)) * 8
    assert (np.linalg.norm(gradients, axis=1) > 10).any()
    args = pqn.RunArgs(learning_rate=rate)
    network = torch.nn.Linear(2, 1, bias=False)
    found = one_step(
        pqn.make_optimizer(network, args), [w.tolist()], gradients[:, None].astype(np.float32)
    )
    m, v, longest, rectified = np.zeros(2), np.zeros(2), 2 / (1 - 0.999) - 1, 0
    for t, g in enumerate(gradients, 1):
        g = g * min(1, 10 / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        length = longest - 2 * t * 0.999**t / (1 - 0.999**t)
        step = m / (1 - 0.9**t)
        if length > 5:  # the variance of 1 / sqrt(v) is finite
            rectified += 1
            top = (length - 4) * (length - 2) * longest
            step = step * np.sqrt(top / ((longest - 4) * (longest - 2) * length))
            step = step * np.sqrt(1 - 0.999**t) / (np.sqrt(v) + 1e-8)
        w = w - rate * step
    assert 0 < rectified < 9
    np.testing.assert_allclose(found, w, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_steps": 0}, "--num-steps must be positive"),
        ({"q_lambda": 1.2}, "--q-lambda must be between 0 and 1"),
        ({"q_lambda": float("nan")}, "--q-lambda must be"),
        ({"update_epochs": 0}, "--update-epochs must be positive"),
        ({"num_minibatches": 0}, "--num-minibatches must be between 1 and 2048"),
        ({"num_minibatches": 2049}, "--num-minibatches must be between 1 and 2048"),
        ({"reward_scale": float("inf")}, "--reward-scale must be a finite number"),
        ({"num_steps": 10**12}, "to fit into memory"),
        ({"num_envs": 0}, "--num-envs must be positive"),
    ],
)
def test_bad_input(options, expected, in_tmp, monkeypatch):
    assert expected in refused("pqn_cartpole", options, monkeypatch)
    assert not list(in_tmp.iterdir())


def test_a_run_resumes_without_its_rollout_and_is_evaluated(in_tmp, monkeypatch, capsys):
    """Saved 36 steps into a rollout of 64, which then starts anew."""
    options = small("pqn_cartpole") | {"num_envs": 2, "total_timesteps": 200, "eval_episodes": 2}
    main_in_process(pqn, options, monkeypatch)
    path = checkpoint_of(in_tmp)
    assert "replay" not in torch.load(path, weights_only=True)
    main_in_process(pqn, {"resume": path, "total_timesteps": 400}, monkeypatch)
    assert torch.load(path, weights_only=True)["global_step"] == 400
    main_in_process(pqn, {"evaluate": path}, monkeypatch)
    assert capsys.readouterr().out.count("step 400, evaluated") == 2


def test_what_a_saved_rollout_fixes(in_tmp, monkeypatch):
    options = small("pqn_cartpole") | {"num_envs": 2, "total_timesteps": 200, "eval_episodes": 0}
    main_in_process(pqn, options | {"checkpoint_replay": True}, monkeypatch)
    path = checkpoint_of(in_tmp)
    for name, value in (("num_steps", 32), ("gamma", 0.9), ("reward_scale", 1.0), ("num_envs", 3)):
        line = refused("pqn_cartpole", {"resume": path, name: value}, monkeypatch)
        assert "cannot change in a resumed run" in line


def test_minatar_has_the_settings_of_the_authors_and_runs(in_tmp, monkeypatch):
    pytest.importorskip("minatar")
    monkeypatch.setattr("sys.argv", ["pqn_cartpole.py", "--env-id", "MinAtar/Breakout-v1"])
    args = pqn.parse_args()
    expected = {"num_envs": 128, "num_steps": 32, "num_minibatches": 32, "update_epochs": 2}
    expected |= {"q_lambda": 0.65, "learning_rate": 5e-4, "end_e": 0.05, "reward_scale": 1.0}
    assert {name: getattr(args, name) for name in expected} == expected
    options = {"env_id": "MinAtar/Breakout-v1", "num_envs": 4, "num_steps": 8, "eval_episodes": 0}
    _, taken, batches = recorded_run(options | {"total_timesteps": 70}, monkeypatch)
    assert len(taken) == 2 and taken[0][0].obs.dtype == torch.uint8
    assert len(batches) == 2 * 32 * 2
