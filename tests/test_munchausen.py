"""Munchausen DQN against plain loops, in float64."""

import math

import numpy as np
import oracle
import pytest
import torch
from conftest import load
from test_run import refused

BATCH, N_ACTIONS, SIZE = 8, 4, 6
SCRIPT = load("munchausen_dqn_cartpole")
DQN = load("dqn_cartpole")


def set_up(seed=0):
    """-> online and target network of other weights, in float64; arrays and tensors of a batch"""
    torch.manual_seed(seed)
    rng, space = np.random.default_rng(seed), np.zeros(SIZE, np.float32)
    q_network, target_network = (SCRIPT.QNetwork(space, N_ACTIONS).double() for _ in range(2))
    discounts = np.full(BATCH, 0.99)
    discounts[:3] = 0  # terminated
    arrays = {
        "obs": rng.normal(size=(BATCH, SIZE)),
        "actions": rng.integers(N_ACTIONS, size=BATCH),
        "rewards": rng.normal(size=BATCH),
        "next_obs": rng.normal(size=(BATCH, SIZE)),
        "discounts": discounts,
    }
    return q_network, target_network, arrays, SCRIPT.Batch(*map(torch.from_numpy, arrays.values()))


def log_policy(q, tau):
    """ln pi(b) of each action, pi = softmax(q / tau), with the largest q subtracted."""
    total = sum(math.exp((x - max(q)) / tau) for x in q)
    return [(x - max(q)) / tau - math.log(total) for x in q]


def targets(q, next_q, arrays, args):
    """y = r + alpha [tau ln pi(a|s)]_{l0}^0 + gamma sum_b pi(b|s') (q(s', b) - tau ln pi(b|s'))"""
    tau, found = args.entropy_tau, []
    for b, action in enumerate(arrays["actions"]):
        bonus = min(max(tau * log_policy(q[b], tau)[action], args.l0), 0)
        y = arrays["rewards"][b] + args.munchausen_alpha * bonus
        for x, log_pi in zip(next_q[b], log_policy(next_q[b], tau)):
            y += arrays["discounts"][b] * math.exp(log_pi) * (x - tau * log_pi)
        found.append(y)
    return np.array(found)


def values(network, obs):
    return oracle.q_values(network.state_dict(), obs)


def errors_of(q_network, target_network, arrays, args):
    """y - Q(s, a)"""
    q, next_q = values(target_network, arrays["obs"]), values(target_network, arrays["next_obs"])
    taken = values(q_network, arrays["obs"])[np.arange(BATCH), arrays["actions"]]
    return targets(q, next_q, arrays, args) - taken


@pytest.mark.parametrize("loss", ["huber", "mse"])
@pytest.mark.parametrize("tau", [0.03, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_td_loss_equals_the_oracle(loss, tau, seed):
    q_network, target_network, arrays, batch = set_up(seed)
    args = SCRIPT.Args(loss=loss, entropy_tau=tau, munchausen_alpha=0.7)
    value, td_error, q_taken = SCRIPT.td_loss(q_network, target_network, batch, args)
    expected = errors_of(q_network, target_network, arrays, args)
    np.testing.assert_allclose(td_error.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert value.item() == pytest.approx(oracle.loss_of(expected, loss), rel=1e-9)
    taken = values(q_network, arrays["obs"])[np.arange(BATCH), arrays["actions"]]
    np.testing.assert_allclose(q_taken.numpy(), taken, rtol=1e-9)
    assert not td_error.requires_grad and not q_taken.requires_grad


def test_both_log_policies_are_the_target_networks():
    """A log-policy of the online network, for s or for s', would give other targets."""
    q_network, target_network, arrays, batch = set_up()
    args = SCRIPT.Args()
    networks = {"online": q_network, "target": target_network}
    _, td_error, q_taken = SCRIPT.td_loss(q_network, target_network, batch, args)
    found = (td_error + q_taken).numpy()
    for of_s in networks:
        for of_next in networks:
            q = values(networks[of_s], arrays["obs"])
            next_q = values(networks[of_next], arrays["next_obs"])
            same = np.allclose(found, targets(q, next_q, arrays, args), rtol=1e-9)
            assert same == (of_s == of_next == "target"), (of_s, of_next)


def table(rows, dtype=torch.float64):
    """A network whose action values are these, whatever it observes."""
    tensor = torch.tensor(rows, dtype=dtype, requires_grad=True)
    return lambda obs: tensor


def td_targets(q, next_q, args, dtype=torch.float64):
    """The targets of action 0, reward 0 and a discount of 1, with given values of theta^-."""
    n = len(q)
    zeros, ones = torch.zeros(n, dtype=dtype), torch.ones(n, dtype=dtype)
    obs, next_obs = torch.zeros(n, 1), torch.ones(n, 1)

    def target_network(x):
        return torch.tensor(next_q if x is next_obs else q, dtype=dtype)

    batch = SCRIPT.Batch(obs, torch.zeros(n, dtype=torch.int64), zeros, next_obs, ones)
    online = table(np.zeros((n, len(q[0]))).tolist(), dtype)
    loss, td_error, q_taken = SCRIPT.td_loss(online, target_network, batch, args)
    assert loss.isfinite()
    return td_error + q_taken


def test_the_bonus_is_clipped_at_l0_before_alpha():
    args = SCRIPT.Args(munchausen_alpha=0.5, entropy_tau=0.1, l0=-2.0)
    q = [[0.0, 1.5], [0.0, 5.0], [5.0, 0.0]]  # tau ln pi(a) of about -1.5, -5 and 0
    found = td_targets(q, np.zeros((3, 2)).tolist(), args)
    soft = 0.1 * math.log(2)  # sum_b pi(b) (0 - tau ln pi(b)), pi uniform
    np.testing.assert_allclose(found.numpy() - soft, [-0.75, -1.0, 0.0], atol=1e-6)


def test_the_bonus_stays_where_the_next_state_is_terminal():
    q_network, target_network, arrays, batch = set_up()
    args = SCRIPT.Args(munchausen_alpha=0.9)
    _, td_error, q_taken = SCRIPT.td_loss(q_network, target_network, batch, args)
    q = values(target_network, arrays["obs"])
    for b in range(3):
        log_pi = 0.03 * log_policy(q[b], 0.03)[arrays["actions"][b]]
        y = arrays["rewards"][b] + 0.9 * max(log_pi, -1)
        assert (td_error + q_taken)[b].item() == pytest.approx(y, rel=1e-9)


@pytest.mark.parametrize("tau", [1e-3, 1e-6, 1e-12])
def test_without_alpha_and_tau_it_is_dqn(tau):
    """sum_b pi(b) (q(b) - tau ln pi(b)) lies between max q and max q + tau ln A."""
    q_network, target_network, _, batch = set_up()
    args = SCRIPT.Args(munchausen_alpha=0.0, entropy_tau=tau, loss="huber")
    loss, td_error, q_taken = SCRIPT.td_loss(q_network, target_network, batch, args)
    expected = DQN.td_loss(q_network, target_network, batch, DQN.Args(loss="huber"))
    gap = td_error - expected[1]
    assert gap.min() > -1e-12 and gap.max() < tau * math.log(N_ACTIONS) + 1e-12
    assert loss.item() == pytest.approx(expected[0].item(), abs=3 * tau + 1e-12)
    assert torch.equal(q_taken, expected[2])


def test_stable_at_tau_003_with_values_of_10_000():
    """In float32, where exp(q / tau) overflows and ln softmax(q / tau) is ln 0."""
    args = SCRIPT.Args()
    rows = [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4], [-1e4, -1e4, -1e4]]
    rows += [[1e4 + 0.0625, 1e4, 1e4 - 0.125]]
    found = td_targets(rows, rows, args, torch.float32)
    arrays = {"actions": [0] * len(rows), "rewards": [0] * len(rows), "discounts": [1] * len(rows)}
    np.testing.assert_allclose(found.numpy(), targets(rows, rows, arrays, args), rtol=1e-6)
    scaled = torch.tensor(rows) / args.entropy_tau
    assert not scaled.softmax(dim=1).log().isfinite().all(), "the plain form is not stable"
    # Near 10,000 float32 is exact to 1/1000: the policy depends on differences of the values.
    log_pi = SCRIPT.tau_log_pi(torch.tensor(rows[-1:]), args.entropy_tau)
    expected = [0.03 * x for x in log_policy(rows[-1], 0.03)]
    np.testing.assert_allclose(log_pi[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_tau_log_pi_is_a_log_policy_times_tau():
    q_values = torch.randn(5, N_ACTIONS, dtype=torch.float64)
    for tau in (0.03, 1.0, 10.0):
        log_pi = SCRIPT.tau_log_pi(q_values, tau)
        expected = [[tau * x for x in log_policy(q, tau)] for q in q_values.tolist()]
        np.testing.assert_allclose(log_pi.numpy(), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close((log_pi / tau).exp().sum(dim=1), torch.ones(5).double())
        torch.testing.assert_close(log_pi, SCRIPT.tau_log_pi(q_values + 7, tau))


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_one_update_equals_the_oracle(loss):
    """td_loss, backpropagation and Adam, as in the script."""
    q_network, target_network, arrays, batch = set_up()
    args = SCRIPT.Args(loss=loss)
    before = [p.detach().numpy().copy() for p in q_network.parameters()]
    errors = errors_of(q_network, target_network, arrays, args)
    slopes = np.clip(-errors, -1, 1) if loss == "huber" else -2 * errors
    d_q = np.zeros((BATCH, N_ACTIONS))
    d_q[np.arange(BATCH), arrays["actions"]] = slopes / BATCH
    gradients = oracle.perceptron_gradients(before, arrays["obs"], d_q)
    expected = oracle.adam_step(before, gradients, lr=args.learning_rate)
    optimizer = SCRIPT.make_optimizer(q_network, args)
    value, *_ = SCRIPT.td_loss(q_network, target_network, batch, args)
    value.backward()
    for p, g in zip(q_network.parameters(), gradients):
        np.testing.assert_allclose(p.grad.numpy(), g, rtol=1e-8, atol=1e-12)
    assert all(p.grad is None for p in target_network.parameters())
    optimizer.step()
    for p, e in zip(q_network.parameters(), expected):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=1e-7, atol=1e-9)


def test_pictures():
    torch.manual_seed(0)
    networks = [SCRIPT.QNetwork(np.zeros((10, 10, 4), np.uint8), N_ACTIONS) for _ in range(2)]
    obs = torch.randint(2, (2, BATCH, 10, 10, 4), dtype=torch.uint8)
    actions, ones = torch.randint(N_ACTIONS, (BATCH,)), torch.ones(BATCH)
    batch = SCRIPT.Batch(obs[0], actions, ones, obs[1], 0.99 * ones)
    loss, td_error, q_taken = SCRIPT.td_loss(*networks, batch, SCRIPT.Args())
    loss.backward()
    assert loss.isfinite() and td_error.shape == q_taken.shape == (BATCH,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"entropy_tau": 0.0}, "--entropy-tau must be positive"),
        ({"l0": 1.0}, "--l0 must be at most 0"),
        ({"munchausen_alpha": 1.5}, "--munchausen-alpha must be between 0 and 1"),
    ],
)
def test_wrong_arguments_are_refused(options, words, monkeypatch):
    assert words in refused("munchausen_dqn_cartpole", options, monkeypatch)
