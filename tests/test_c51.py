"""C51: the projection, the loss and one whole update against plain loops, and its arguments."""

import numpy as np
import oracle
import pytest
import torch
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import checkpoint_of, main_in_process, refused, scalars, small

BATCH, N_ACTIONS, GAMMA = 8, 3, 0.99
CARTPOLE, PAPER, ACROBOT = (0.0, 100.0, 51), (-10.0, 10.0, 51), (-100.0, 0.0, 51)


def projection(pmf, reward, discount, v_min, v_max, n):
    """Equation 7 of the paper: m_i = sum_j [1 - |[Tz_j] - z_i| / delta_z]_0^1 p_j."""
    delta_z = (v_max - v_min) / (n - 1)
    z, m = [v_min + i * delta_z for i in range(n)], np.zeros(n)
    for j in np.flatnonzero(pmf):
        tz = min(max(reward + discount * z[j], v_min), v_max)
        for i in range(n):
            m[i] += min(max(1 - abs(tz - z[i]) / delta_z, 0.0), 1.0) * pmf[j]
    return m


def projection_by_indices(pmf, reward, discount, v_min, v_max, n):
    """The same as in algorithm 1 of the paper and in CleanRL: with floor and ceiling, where
    `lower == upper` keeps the mass of an integer b."""
    delta_z = (v_max - v_min) / (n - 1)
    m = np.zeros(n)
    for j in range(n):
        tz = min(max(reward + discount * (v_min + j * delta_z), v_min), v_max)
        b = (tz - v_min) / delta_z
        lower, upper = int(np.floor(b)), min(int(np.ceil(b)), n - 1)
        m[lower] += pmf[j] * (upper + (lower == upper) - b)
        m[upper] += pmf[j] * (b - lower)
    return m


def outside(pmf, reward, discount, v_min, v_max, n):
    """The probability of targets that are clipped."""
    z = np.linspace(v_min, v_max, n)
    tolerance = 1e-3 * (z[1] - z[0])
    tz = [reward + discount * x for x in z]
    return sum(p for x, p in zip(tz, pmf) if x < v_min - tolerance or x > v_max + tolerance)


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


class Table(torch.nn.Module):
    """A network whose observation is a row of a table of logits, (rows, A, N)."""

    def __init__(self, logits, v_min, v_max, n):
        super().__init__()
        self.table = torch.nn.Parameter(logits)
        self.support = torch.linspace(v_min, v_max, n, dtype=logits.dtype)

    def logits(self, obs):
        return self.table[obs]


def projected(pmf, rewards, discounts, support, dtype=torch.float64):
    """The target distributions of a batch, from the gradient (p - m) / B by the logits of p."""
    script, (rows, n) = load("c51_cartpole"), np.shape(pmf)
    args = script.Args(v_min=support[0], v_max=support[1], n_atoms=support[2])
    logits = torch.as_tensor(np.asarray(pmf), dtype=torch.float64).log().to(dtype)[:, None]
    q_network = Table(torch.zeros(rows, 1, n, dtype=dtype), *support)
    every = torch.arange(rows)
    batch = (torch.as_tensor(np.asarray(x), dtype=dtype) for x in (rewards, discounts))
    rewards, discounts = batch
    batch = script.Batch(every, torch.zeros(rows, dtype=torch.int64), rewards, every, discounts)
    loss, _, _, share = script.td_loss(q_network, Table(logits, *support), batch, args)
    loss.backward()
    return (1 / n - rows * q_network.table.grad[:, 0]).double().numpy(), share.item()


def one_hot(*masses, n=51):
    pmf = np.zeros(n)
    for index, mass in masses:
        pmf[index] = mass
    return pmf


@pytest.mark.parametrize(
    ("support", "pmf", "reward", "discount", "expected"),
    [  # delta_z is 2 for CartPole
        pytest.param(CARTPOLE, [(10, 1)], 2, 1.0, [(11, 1)], id="on an atom"),
        pytest.param(CARTPOLE, [(10, 1)], 1, 1.0, [(10, 0.5), (11, 0.5)], id="between two"),
        pytest.param(CARTPOLE, [(10, 1)], 0.5, 1.0, [(10, 0.75), (11, 0.25)], id="nearer to one"),
        pytest.param(CARTPOLE, [(0, 1)], 0, 1.0, [(0, 1)], id="the first atom"),
        pytest.param(CARTPOLE, [(50, 1)], 0, 1.0, [(50, 1)], id="the last atom"),
        pytest.param(CARTPOLE, [(50, 1)], 1, 0.99, [(50, 1)], id="exactly v_max"),
        pytest.param(CARTPOLE, [(49, 0.5), (50, 0.5)], 7, 1.0, [(50, 1)], id="clipped above"),
        pytest.param(CARTPOLE, [(0, 0.25), (5, 0.75)], -20, 1.0, [(0, 1)], id="clipped below"),
        pytest.param(CARTPOLE, [(3, 0.5), (40, 0.5)], 1, 0.0, [(0, 0.5), (1, 0.5)], id="terminal"),
        pytest.param(CARTPOLE, [(50, 1)], 3, 0.5, [(26, 0.5), (27, 0.5)], id="discounted"),
        pytest.param(PAPER, [(25, 1)], 0, 0.99, [(25, 1)], id="z = 0"),
        pytest.param(PAPER, [(30, 1)], 1, 0.0, [(27, 0.5), (28, 0.5)], id="terminal, r = 1"),
        pytest.param(ACROBOT, [(0, 1)], -1, 0.99, [(0, 1)], id="exactly v_min"),
        pytest.param(ACROBOT, [(7, 1)], 0, 0.0, [(50, 1)], id="terminal at v_max"),
    ],
)
def test_projection_of_single_atoms(support, pmf, reward, discount, expected):
    pmf, expected = one_hot(*pmf), one_hot(*expected)
    found, _ = projected([pmf], [reward], [discount], support)
    np.testing.assert_allclose(found[0], expected, atol=1e-9)
    for in_loops in (projection, projection_by_indices):
        np.testing.assert_allclose(in_loops(pmf, reward, discount, *support), expected, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 60),
    v_min=st.floats(-100, 90),
    width=st.floats(0.5, 200),
    steps=st.integers(1, 5),
    whole=st.booleans(),
)
def test_projection_equals_plain_loops(seed, n, v_min, width, steps, whole):
    """Random distributions, rewards, supports and n-step discounts; `whole`: b is an integer."""
    rng, support = np.random.default_rng(seed), (v_min, v_min + width, n)
    pmf = rng.dirichlet(np.full(n, 0.3), size=4) + 1e-12
    rewards, discounts = rng.normal(size=4) * width / 2, np.full(4, GAMMA**steps)
    discounts[0] = 0  # terminal
    if whole:  # a move by whole atoms
        rewards, discounts = rng.integers(-2, 3, 4) * width / (n - 1), np.ones(4)
    found, share = projected(pmf, rewards, discounts, support)
    np.testing.assert_allclose(found.sum(axis=1), pmf.sum(axis=1), rtol=1e-9)
    for row, *case in zip(found, pmf, rewards, discounts):
        for in_loops in (projection, projection_by_indices):
            np.testing.assert_allclose(row, in_loops(*case, *support), atol=1e-9)
    expected = [outside(*case, *support) for case in zip(pmf, rewards, discounts)]
    np.testing.assert_allclose(share, np.mean(expected), atol=1e-9)
    z = np.linspace(*support)
    for row, p, r, d, clipped in zip(found, pmf, rewards, discounts, expected):
        if clipped == 0:  # the projection does not change the mean
            np.testing.assert_allclose(row @ z, r + d * (p @ z), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("support", [CARTPOLE, PAPER, ACROBOT, (-100.0, 100.0, 101)])
@pytest.mark.parametrize("discount", [0.0, GAMMA, GAMMA**3, 1.0])
def test_no_mass_is_lost_in_float32(support, discount):
    """All atoms and rewards for which b is an integer, or would be but for rounding."""
    v_min, v_max, n = support
    delta_z = (v_max - v_min) / (n - 1)
    for reward in (-1.0, 0.0, 1.0, delta_z, -3 * delta_z, v_min, v_max):
        found, _ = projected(
            np.eye(n) + 1e-30, [reward] * n, [discount] * n, support, torch.float32
        )
        # the gradient in float32, times the number of rows, is known to about 1e-5
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=3e-4)
        expected = [projection(row, reward, discount, *support) for row in np.eye(n)]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def networks(script, args, n_actions=N_ACTIONS):
    make = script.QNetwork
    return tuple(make(np.zeros(6, np.float32), n_actions, args).double() for _ in range(2))


def random_batch(script, rng):
    discounts = GAMMA ** rng.integers(1, 4, BATCH).astype(np.float64)
    discounts[:3] = 0  # terminated
    arrays = {
        "obs": rng.normal(size=(BATCH, 6)),
        "actions": rng.integers(N_ACTIONS, size=BATCH),
        "rewards": rng.normal(size=BATCH) * 3,
        "next_obs": rng.normal(size=(BATCH, 6)),
        "discounts": discounts,
    }
    return arrays, script.Batch(*map(torch.from_numpy, arrays.values()))


def distributions(network, obs):
    """p_i(s, a) in float64, (B, A, N), from the network's weights."""
    logits = oracle.q_values(network.state_dict(), obs).reshape(len(obs), N_ACTIONS, -1)
    return np.array([[softmax(action) for action in row] for row in logits])


def oracle_of_the_loss(q_network, target_network, arrays, support):
    """-> cross-entropies, KL divergences, Q(s, a), share outside, gradient by the logits"""
    z = np.linspace(*support)
    online = distributions(q_network, arrays["obs"])
    target = distributions(target_network, arrays["next_obs"])
    entropies, divergences, taken, shares, gradient = [], [], [], [], np.zeros_like(online)
    for i, a in enumerate(arrays["actions"]):
        means = [sum(z * p) for p in target[i]]
        best = int(np.argmax(means))
        case = target[i, best], arrays["rewards"][i], arrays["discounts"][i]
        m, p = projection(*case, *support), online[i, a]
        entropies.append(-sum(m_i * np.log(p_i) for m_i, p_i in zip(m, p)))
        divergences.append(sum(m_i * np.log(m_i / p_i) for m_i, p_i in zip(m, p) if m_i > 0))
        taken.append(sum(z * p))
        shares.append(outside(*case, *support))
        gradient[i, a] = (p - m) / BATCH
    return map(np.array, (entropies, divergences, taken, shares, gradient))


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_one_update_equal_the_oracle(seed):
    """td_loss, backpropagation and Adam, as in the script."""
    script, support = load("c51_cartpole"), (-3.0, 4.0, 11)
    torch.manual_seed(seed)
    args = script.Args(v_min=-3.0, v_max=4.0, n_atoms=11)
    q_network, target_network = networks(script, args)
    with torch.no_grad():
        for network in (q_network, target_network):
            network.head.weight.mul_(20)  # distributions far from uniform
    arrays, batch = random_batch(script, np.random.default_rng(seed))
    expected = oracle_of_the_loss(q_network, target_network, arrays, support)
    entropies, divergences, taken, shares, gradient = expected

    optimizer = torch.optim.Adam(q_network.parameters(), lr=1e-3, fused=True)
    before = [p.detach().numpy().copy() for p in q_network.parameters()]
    loss, td_error, q_taken, share = script.td_loss(q_network, target_network, batch, args)
    np.testing.assert_allclose(loss.item(), entropies.mean(), rtol=1e-6)
    np.testing.assert_allclose(td_error.numpy(), divergences, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(q_taken.numpy(), taken, rtol=1e-6)
    np.testing.assert_allclose(share.item(), shares.mean(), rtol=1e-6)
    assert shares.mean() > 0
    assert not (td_error.requires_grad or q_taken.requires_grad or share.requires_grad)
    loss.backward()
    assert all(p.grad is None for p in target_network.parameters())
    d_logits = gradient.reshape(BATCH, -1)
    gradients = oracle.perceptron_gradients(before, arrays["obs"], d_logits)
    for p, e in zip(q_network.parameters(), gradients):
        np.testing.assert_allclose(p.grad.numpy(), e, rtol=1e-5, atol=1e-7)
    exact = [p.grad.numpy().copy() for p in q_network.parameters()]
    optimizer.step()
    for p, e in zip(q_network.parameters(), oracle.adam_step(before, exact, lr=1e-3)):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=1e-7, atol=1e-9)


def test_the_batch_distinguishes_the_networks():
    """The target network chooses a* and evaluates it; the mean decides, not the largest p."""
    script = load("c51_cartpole")
    args = script.Args(v_min=0.0, v_max=2.0, n_atoms=3)
    # Action 0 has the largest single probability and mean 0.9; action 1 has mean 1.0.
    target_pmf = torch.tensor([[[0.5, 0.1, 0.4], [0.3, 0.4, 0.3]]], dtype=torch.float64)
    online = torch.tensor([[[0.0, 0.0, 9.0], [9.0, 0.0, 0.0]]], dtype=torch.float64)
    q_network = Table(online, 0.0, 2.0, 3)
    target_network = Table(target_pmf.log(), 0.0, 2.0, 3)
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    batch = script.Batch(zero, zero, 0 * one, zero, one)
    loss, *_ = script.td_loss(q_network, target_network, batch, args)
    expected = -(target_pmf[0, 1] * online[0, 0].log_softmax(0)).sum()  # action 1, as it is
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert q_network.table.grad[0, 0].abs().min() > 0 and not q_network.table.grad[0, 1].any()


def test_gradient_of_improbable_atoms():
    """log(clamp(p, 1e-5)) has no gradient where p < 1e-5: such atoms could never grow again."""
    script = load("c51_cartpole")
    args = script.Args(v_min=0.0, v_max=2.0, n_atoms=3)
    q_network = Table(torch.tensor([[[0.0, -30.0, -120.0]]]), 0.0, 2.0, 3)  # p 1, 1e-13, 0 in fp32
    target_network = Table(torch.tensor([[[0.2, 0.3, 0.5]]]).log(), 0.0, 2.0, 3)
    zero = torch.zeros(1, dtype=torch.int64)
    batch = script.Batch(zero, zero, torch.zeros(1), zero, torch.ones(1))
    loss, *_ = script.td_loss(q_network, target_network, batch, args)
    torch.testing.assert_close(loss.item(), 0.3 * 30 + 0.5 * 120, rtol=1e-5, atol=0)
    loss.backward()
    torch.testing.assert_close(q_network.table.grad[0, 0], torch.tensor([0.8, -0.3, -0.5]))


def test_priority_is_zero_where_the_distributions_agree():
    script = load("c51_cartpole")
    args = script.Args(v_min=-1.0, v_max=1.0, n_atoms=5)
    network = Table(torch.randn(6, 2, 5, dtype=torch.float64), -1.0, 1.0, 5)
    best = (network.table.softmax(dim=2) @ network.support).argmax(dim=1)
    every, one = torch.arange(6), torch.ones(6, dtype=torch.float64)
    batch = script.Batch(every, best, 0 * one, every, one)
    loss, td_error, q_taken, share = script.td_loss(network, network, batch, args)
    torch.testing.assert_close(td_error, 0 * one)
    assert loss.item() > 0.1 and share == 0  # the entropy is left
    values = (network.table.softmax(dim=2) @ network.support).max(dim=1).values
    torch.testing.assert_close(q_taken, values.detach())


def test_rounding_does_not_count_as_out_of_support():
    """r + gamma v_max = v_max on CartPole, and all of a good agent's probability is there."""
    n = 51
    for gamma in (0.9, 0.95, 0.97, 0.99, 0.997, 0.999):
        v_max = 1 / (1 - gamma)
        for r, support in ((1, (0.0, v_max, n)), (-1, (-v_max, 0.0, n))):
            _, share = projected(np.eye(n) + 1e-30, [r] * n, [gamma] * n, support, torch.float32)
            assert share == 0
    _, share = projected(np.eye(n) + 1e-30, [3] * n, [1.0] * n, CARTPOLE, torch.float32)
    assert share == pytest.approx(2 / n)  # 98 and 100 are moved beyond 100


def test_network_gives_distributions_and_their_means():
    script = load("c51_cartpole")
    torch.manual_seed(0)
    args = script.Args(v_min=-2.0, v_max=6.0, n_atoms=7)
    network, _ = networks(script, args)
    obs = np.random.default_rng(0).normal(size=(5, 6))
    pmf, z = distributions(network, obs), np.linspace(-2, 6, 7)
    np.testing.assert_allclose(network.support.numpy(), z, atol=1e-6)
    np.testing.assert_allclose(network(torch.from_numpy(obs)).detach().numpy(), pmf @ z, rtol=1e-6)
    found = network.logits(torch.from_numpy(obs)).softmax(dim=2)
    np.testing.assert_allclose(found.detach().numpy(), pmf, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0, 100)),
        ({"gamma": 0.9}, (0, 10)),
        ({"env_id": "CartPole-v0", "v_max": 50.0}, (0, 50)),
        ({"env_id": "Acrobot-v1"}, (-100, 0)),
        ({"env_id": "MountainCar-v0", "v_min": -20.0}, (-20, 0)),
        ({"env_id": "MinAtar/Seaquest-v1"}, (0, 100)),
        ({"env_id": "LunarLander-v3"}, (None, None)),
        ({"env_id": "LunarLander-v3", "v_min": -5.0}, (-5, None)),
        ({"env_id": "Acrobot-v1", "v_min": 0.0}, (0, 0)),  # 0 is given, too
        ({"gamma": 1.0}, (None, None)),
        ({"gamma": 1.0, "v_min": 0.0, "v_max": 500.0}, (0, 500)),
    ],
)
def test_bounds_follow_from_rewards_and_gamma(options, expected):
    script = load("c51_cartpole")
    assert script.return_bounds(script.Args(**options)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"env_id": "LunarLander-v3"}, "--v-min must be given, like --v-max"),
        ({"env_id": "LunarLander-v3", "v_min": -500}, "--v-min must be given, like --v-max"),
        ({"gamma": 1.0}, "--v-min must be given, like --v-max"),
        ({"v_min": 3, "v_max": 3}, "--v-max must be above --v-min, 3 (it is 3.0)"),
        ({"v_max": -1}, "--v-max must be above --v-min, 0 (it is -1.0)"),
        ({"v_max": "inf"}, "--v-max must be a finite number"),
        ({"v_min": "nan"}, "--v-min must be a finite number"),
        ({"n_atoms": 1}, "--n-atoms must be 2 or more"),
        ({"gamma": 1.5}, "--gamma must be between 0 and 1"),
    ],
)
def test_wrong_arguments_are_refused(options, words, in_tmp, monkeypatch):
    assert words in refused("c51_cartpole", options, monkeypatch)
    assert not (in_tmp / "runs").exists()


def test_run_logs_its_support_and_a_checkpoint_keeps_it(in_tmp, monkeypatch, capsys):
    script = load("c51_cartpole")
    options = small("c51_cartpole") | {"total_timesteps": 1500, "checkpoint_frequency": 700}
    main_in_process(script, options | {"v_max": 5, "eval_frequency": 0}, monkeypatch)
    assert "from --v-min 0 to --v-max 5" in capsys.readouterr().out
    path = checkpoint_of(in_tmp)
    saved = script.load_checkpoint(str(path))
    assert (saved["args"]["v_min"], saved["args"]["v_max"]) == (0.0, 5.0)
    shares = [event.value for event in scalars(path.parent)["losses/out_of_support"]]
    assert shares and 0 < max(shares) <= 1  # returns of CartPole exceed 5
    main_in_process(script, {"evaluate": path, "eval_episodes": 2}, monkeypatch)
    assert "from --v-min 0 to --v-max 5" in capsys.readouterr().out
    main_in_process(script, {"resume": path, "total_timesteps": 2000, "v_min": -1}, monkeypatch)
    assert "from --v-min -1 to --v-max 5" in capsys.readouterr().out


def test_minatar(in_tmp, monkeypatch):
    pytest.importorskip("minatar")
    script = load("c51_cartpole")
    options = {"env_id": "MinAtar/Breakout-v1", "total_timesteps": 400, "learning_starts": 200}
    main_in_process(script, options | {"buffer_size": 400, "eval_episodes": 1}, monkeypatch)
    weights = script.load_checkpoint(str(checkpoint_of(in_tmp)))["q_network"]
    assert weights["head.weight"].shape == (3 * 51, 128) and "support" not in weights
