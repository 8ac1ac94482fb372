"""QR-DQN and IQN against plain loops, in float64."""

import copy
import math
import statistics

import numpy as np
import oracle
import pytest
import torch
from conftest import load
from test_run import main_in_process, refused

BATCH, N_ACTIONS, SIZE = 6, 3, 4
N, N_TARGET, K, N_COSINES = 5, 3, 4, 7  # all different, so that swapped axes fail
OPTIONS = {
    "qrdqn_cartpole": {"n_quantiles": N},
    "iqn_cartpole": {
        "n_taus": N,
        "n_target_taus": N_TARGET,
        "n_act_taus": K,
        "n_cosines": N_COSINES,
    },
}


@pytest.fixture(params=OPTIONS)
def script(request):
    return load(request.param)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def set_up(script, seed=0, shape=(SIZE,), **options):
    """-> args, online and target network of other weights, arrays and tensors of one batch"""
    torch.manual_seed(seed)
    args, rng = script.Args(**OPTIONS[script.__name__] | options), np.random.default_rng(seed)
    pictures = len(shape) == 3
    space = np.zeros(shape, np.uint8 if pictures else np.float32)
    q_network, target_network = (script.QNetwork(space, N_ACTIONS, args) for _ in range(2))
    with torch.no_grad():  # spread the quantiles, so that errors fall on both sides of kappa
        for network in (q_network, target_network):
            network.head.weight.mul_(6)
    discounts = np.full(BATCH, 0.99)
    discounts[:2] = 0  # terminated
    draw = (lambda: rng.integers(2, size=(BATCH, *shape), dtype=np.uint8)) if pictures else None
    draw = draw or (lambda: rng.normal(size=(BATCH, *shape)))
    arrays = {"obs": draw(), "actions": rng.integers(N_ACTIONS, size=BATCH)}
    arrays |= {"rewards": rng.normal(size=BATCH), "next_obs": draw(), "discounts": discounts}
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    return args, q_network, target_network, arrays, script.Batch(**tensors)


# ---- the loss ------------------------------------------------------------------------------------


def loss_of_a_row(theta, y, taus, kappa):
    """sum_i E_j |tau_i - 1{d_ij < 0}| L_kappa(d_ij) / kappa; with kappa 0 |d_ij| instead."""
    total = 0.0
    for i in range(len(theta)):
        for j in range(len(y)):
            d = y[j] - theta[i]
            if kappa == 0:
                huber_by_kappa = abs(d)
            elif abs(d) <= kappa:
                huber_by_kappa = 0.5 * d * d / kappa
            else:
                huber_by_kappa = kappa * (abs(d) - 0.5 * kappa) / kappa
            total += abs(taus[i] - (1 if d < 0 else 0)) * huber_by_kappa / len(y)
    return total


def slopes_of_a_row(theta, y, taus, kappa):
    """The gradient of loss_of_a_row by theta."""
    slopes = np.zeros(len(theta))
    for i in range(len(theta)):
        for j in range(len(y)):
            d = y[j] - theta[i]
            slope = min(max(d / kappa, -1), 1) if kappa else np.sign(d)
            slopes[i] -= abs(taus[i] - (1 if d < 0 else 0)) * slope / len(y)
    return slopes


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("by_row", [False, True])
def test_quantile_huber_loss_and_its_gradient_equal_plain_loops(script, kappa, by_row):
    rng = np.random.default_rng(0)
    theta, y = rng.normal(size=(BATCH, N)) * 2, rng.normal(size=(BATCH, N_TARGET)) * 2
    taus = rng.random((BATCH, N)) if by_row else rng.random(N)
    each = np.broadcast_to(taus, (BATCH, N))
    given = torch.tensor(theta, requires_grad=True)
    losses = script.quantile_huber_loss(given, torch.tensor(y), torch.tensor(taus), kappa)
    losses.sum().backward()
    rows = [*zip(theta, y, each, [kappa] * BATCH)]
    expected = [loss_of_a_row(*row) for row in rows]
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-12)
    slopes = [slopes_of_a_row(*row) for row in rows]
    np.testing.assert_allclose(given.grad.numpy(), slopes, rtol=1e-12, atol=1e-15)


def test_kappa_divides_the_loss(script):
    """Far errors then cost |d| - kappa / 2, so that kappa towards 0 is quantile regression."""
    theta, y, taus = torch.zeros(1, 1), torch.full((1, 1), 10.0), torch.full((1,), 0.25)
    for kappa in (0.0, 1e-6, 0.5, 1.0):
        loss = script.quantile_huber_loss(theta, y, taus, kappa).item()
        assert loss == pytest.approx(0.25 * (10 - kappa / 2))


def test_the_loss_sums_over_its_own_quantiles_and_averages_over_the_targets(script):
    theta, y, taus = torch.zeros(1, 2), torch.ones(1, 2), torch.full((2,), 0.5)
    once = script.quantile_huber_loss(theta, y, taus, 1.0).item()
    assert once == pytest.approx(2 * 0.5 * 0.5)  # two quantiles, |tau - 0| = 1/2, d^2 / 2 = 1/2
    more = script.quantile_huber_loss(theta, torch.ones(1, 6), taus, 1.0).item()
    assert more == pytest.approx(once)
    doubled = script.quantile_huber_loss(torch.zeros(1, 4), y, torch.full((4,), 0.5), 1.0).item()
    assert doubled == pytest.approx(2 * once)


def test_quantiles_of_a_known_distribution_minimise_the_loss(script, float64):
    """Subgradients at the quantiles of ten equally likely values; a descent to a normal's."""
    values, taus = np.arange(10.0), np.array([0.05, 0.25, 0.55, 0.95])
    for tau in taus:
        quantile = math.floor(10 * tau)  # the smallest value with a share of at least tau up to it
        cost = {
            theta: script.quantile_huber_loss(
                torch.tensor([[theta]]), torch.tensor(values[None]), torch.tensor([tau]), 0.0
            ).item()
            for theta in (quantile - 1.0, quantile - 0.1, quantile, quantile + 0.1, quantile + 1.0)
        }
        assert min(cost, key=cost.get) == quantile
    normal, taus = statistics.NormalDist(3, 2), (2 * np.arange(1, 6) - 1) / 10
    samples = torch.tensor([[normal.inv_cdf((i + 0.5) / 500) for i in range(500)]])
    theta = torch.zeros(1, 5, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.2)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 300)
        loss = script.quantile_huber_loss(theta, samples, torch.tensor(taus), 0.01).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = [normal.inv_cdf(tau) for tau in taus]
    np.testing.assert_allclose(theta.detach().numpy()[0], expected, atol=0.02)


# ---- the networks --------------------------------------------------------------------------------


def hidden(weights, obs):
    """The outputs of the two hidden layers, one row at a time."""
    layers = []
    for weight, bias in (weights[:2], weights[2:4]):
        obs = np.array([np.maximum(weight @ row + bias, 0) for row in obs])
        layers.append(obs)
    return layers


def numpy_weights(network):
    return [p.detach().numpy().copy() for p in network.parameters()]


def qr_quantiles(weights, obs, n):
    """(B, A, N): output a N + i of the last layer is quantile i of action a."""
    features, found = hidden(weights, obs)[1], np.zeros((len(obs), N_ACTIONS, n))
    for b, row in enumerate(features):
        for a in range(N_ACTIONS):
            for i in range(n):
                found[b, a, i] = weights[4][a * n + i] @ row + weights[5][a * n + i]
    return found


def embedding(weight, bias, tau):
    """phi_j(tau) = ReLU(sum_i cos(pi i tau) w_ij + b_j), i from 0"""
    phi = np.zeros(len(bias))
    for j in range(len(bias)):
        total = bias[j]
        for i in range(weight.shape[1]):
            total += math.cos(math.pi * i * tau) * weight[j, i]
        phi[j] = max(total, 0)
    return phi


def iqn_quantiles(weights, obs, taus):
    """(B, A, N)"""
    features, found = hidden(weights, obs)[1], np.zeros((len(obs), N_ACTIONS, taus.shape[1]))
    for b in range(len(obs)):
        for i in range(taus.shape[1]):
            product = features[b] * embedding(weights[4], weights[5], taus[b, i])
            found[b, :, i] = weights[6] @ product + weights[7]
    return found


def test_qr_network_equals_plain_loops(float64):
    _, q_network, _, arrays, batch = set_up(load("qrdqn_cartpole"))
    expected = qr_quantiles(numpy_weights(q_network), arrays["obs"], N)
    quantiles = q_network.quantiles(batch.obs).detach().numpy()
    np.testing.assert_allclose(quantiles, expected, rtol=1e-9, atol=1e-12)
    values = q_network(batch.obs).detach().numpy()
    np.testing.assert_allclose(values, expected.mean(axis=2), rtol=1e-9, atol=1e-12)


def test_iqn_network_equals_plain_loops(float64):
    _, q_network, _, arrays, batch = set_up(load("iqn_cartpole"))
    taus, weights = np.random.default_rng(1).random((BATCH, N)), numpy_weights(q_network)
    taus[0, :2] = 0, 1 / 3
    expected = iqn_quantiles(weights, arrays["obs"], taus)
    quantiles = q_network.quantiles(batch.obs, torch.tensor(taus)).detach().numpy()
    np.testing.assert_allclose(quantiles, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(SIZE,), (10, 10, 4)])
def test_shapes_of_vectors_and_pictures(script, shape):
    args, q_network, target_network, _, batch = set_up(script, shape=shape)
    batch = batch._replace(rewards=batch.rewards.float(), discounts=batch.discounts.float())
    if len(shape) == 1:
        batch = batch._replace(obs=batch.obs.float(), next_obs=batch.next_obs.float())
    assert q_network(batch.obs).shape == (BATCH, N_ACTIONS)
    loss, td_error, q_taken = script.td_loss(q_network, target_network, batch, args)
    assert loss.shape == () and td_error.shape == q_taken.shape == (BATCH,)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in q_network.parameters())
    actions = script.act(q_network, batch.obs.numpy(), 0.0, np.random.default_rng(0), "cpu")
    assert actions.shape == (BATCH,)


# ---- td_loss and whole updates -------------------------------------------------------------------


class Spy:
    """Records the tau that a network was asked for."""

    def __init__(self, network):
        self.taus, quantiles = [], network.quantiles

        def recorded(obs, taus):
            self.taus.append(taus.numpy().copy())
            return quantiles(obs, taus)

        network.quantiles = recorded


def qr_pieces(args, q_network, target_network, arrays):
    """theta_i(s, a), the targets and tau_i of every row."""
    n = args.n_quantiles
    theta = qr_quantiles(numpy_weights(q_network), arrays["obs"], n)
    following = qr_quantiles(numpy_weights(target_network), arrays["next_obs"], n)
    taus = [(2 * i - 1) / (2 * n) for i in range(1, n + 1)]
    rows = []
    for b, action in enumerate(arrays["actions"]):
        best = int(np.argmax(following[b].mean(axis=1)))
        y = [arrays["rewards"][b] + arrays["discounts"][b] * x for x in following[b, best]]
        rows.append((theta[b, action], y, taus))
    return rows


def iqn_pieces(q_network, target_network, arrays, online, target):
    """The same, with the tau that the networks were asked for."""
    (taus,) = online.taus
    next_taus, act_taus = sorted(target.taus, key=lambda x: x.shape[1])  # N' < K
    theta = iqn_quantiles(numpy_weights(q_network), arrays["obs"], taus)
    weights = numpy_weights(target_network)
    following = iqn_quantiles(weights, arrays["next_obs"], next_taus)
    values = iqn_quantiles(weights, arrays["next_obs"], act_taus).mean(axis=2)
    rows = []
    for b, action in enumerate(arrays["actions"]):
        best = int(np.argmax(values[b]))
        y = [arrays["rewards"][b] + arrays["discounts"][b] * x for x in following[b, best]]
        rows.append((theta[b, action], y, taus[b]))
    return rows


def loss_and_pieces(script, args, q_network, target_network, arrays, batch):
    """-> what td_loss gives, and what the oracle needs to give the same"""
    if script.__name__ == "qrdqn_cartpole":
        result = script.td_loss(q_network, target_network, batch, args)
        return result, qr_pieces(args, q_network, target_network, arrays)
    online, target = Spy(q_network), Spy(target_network)
    result = script.td_loss(q_network, target_network, batch, args)
    return result, iqn_pieces(q_network, target_network, arrays, online, target)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_td_loss_equals_the_oracle(script, kappa, seed, float64):
    args, q_network, target_network, arrays, batch = set_up(script, seed, kappa=kappa)
    (loss, td_error, q_taken), rows = loss_and_pieces(
        script, args, q_network, target_network, arrays, batch
    )
    expected = [loss_of_a_row(*row, kappa) for row in rows]
    np.testing.assert_allclose(td_error.numpy(), expected, rtol=1e-9)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-9)
    np.testing.assert_allclose(q_taken.numpy(), [np.mean(theta) for theta, *_ in rows], rtol=1e-9)
    assert not td_error.requires_grad and not q_taken.requires_grad
    loss.backward()
    assert all(p.grad is None for p in target_network.parameters())
    errors = np.array([[y_j - t for y_j in y for t in theta] for theta, y, _ in rows])
    assert (errors < 0).mean() > 0.1 and (errors > 0).mean() > 0.1
    assert (abs(errors) < 0.5).mean() > 0.02 and (abs(errors) > 1).mean() > 0.02


def hidden_gradients(weights, obs, d_features):
    """Backpropagation through linear, ReLU, linear, ReLU."""
    first, second = hidden(weights, obs)
    d_second = d_features * (second > 0)
    d_first = (d_second @ weights[2]) * (first > 0)
    return [d_first.T @ obs, d_first.sum(0), d_second.T @ first, d_second.sum(0)]


def iqn_gradients(weights, obs, actions, taus, slopes):
    """Backpropagation of slopes = d loss / d Z_tau_i(s, a), one row and one tau at a time."""
    features = hidden(weights, obs)[1]
    d_features = np.zeros_like(features)
    d_embedding, d_bias, d_head, d_head_bias = (np.zeros_like(w) for w in weights[4:])
    for b, action in enumerate(actions):
        for tau, slope in zip(taus[b], slopes[b]):
            phi = embedding(weights[4], weights[5], tau)
            d_head[action] += slope * features[b] * phi
            d_head_bias[action] += slope
            d_product = slope * weights[6][action]
            d_features[b] += d_product * phi
            d_phi = d_product * features[b] * (phi > 0)
            cosines = [math.cos(math.pi * i * tau) for i in range(weights[4].shape[1])]
            d_embedding += np.outer(d_phi, cosines)
            d_bias += d_phi
    first = hidden_gradients(weights, obs, d_features)
    return [*first, d_embedding, d_bias, d_head, d_head_bias]


def test_one_update_equals_the_oracle(script, float64):
    """td_loss, backpropagation and Adam, as in the script."""
    args, q_network, target_network, arrays, batch = set_up(script)
    before = numpy_weights(q_network)
    (loss, *_), rows = loss_and_pieces(script, args, q_network, target_network, arrays, batch)
    slopes = np.array([slopes_of_a_row(*row, args.kappa) for row in rows]) / BATCH
    if script.__name__ == "qrdqn_cartpole":
        d_out = np.zeros((BATCH, N_ACTIONS * N))
        for b, action in enumerate(arrays["actions"]):
            d_out[b, action * N : (action + 1) * N] = slopes[b]
        gradients = oracle.perceptron_gradients(before, arrays["obs"], d_out)
    else:
        taus = np.array([taus for *_, taus in rows])
        gradients = iqn_gradients(before, arrays["obs"], arrays["actions"], taus, slopes)
    expected = oracle.adam_step(before, gradients, lr=args.learning_rate, eps=args.adam_eps)
    optimizer = script.make_optimizer(q_network, args)
    loss.backward()
    for p, g in zip(q_network.parameters(), gradients):
        np.testing.assert_allclose(p.grad.numpy(), g, rtol=1e-8, atol=1e-12)
    optimizer.step()
    for p, e in zip(q_network.parameters(), expected):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=1e-7, atol=1e-7)


def test_one_quantile_is_half_of_dqns_huber_loss(float64):
    """N = 1: tau is 1/2, the weight of errors of either sign."""
    script, dqn = load("qrdqn_cartpole"), load("dqn_cartpole")
    args, q_network, target_network, _, batch = set_up(script, n_quantiles=1)
    loss, _, q_taken = script.td_loss(q_network, target_network, batch, args)
    huber = dqn.Args(loss="huber")
    expected, _, q_expected = dqn.td_loss(q_network, target_network, batch, huber)
    assert loss.item() == pytest.approx(expected.item() / 2)
    assert torch.equal(q_taken, q_expected)


# ---- the tau of IQN ------------------------------------------------------------------------------


def test_iqn_draws_fresh_taus_for_each_row_and_call():
    """N for the loss, N' for the target and K for a*, all of their own."""
    script = load("iqn_cartpole")
    for options in ({}, {"n_taus": K, "n_target_taus": K}):
        args, q_network, target_network, _, batch = set_up(script, **options)
        batch = batch._replace(obs=batch.obs.float(), next_obs=batch.next_obs.float())
        online, target = Spy(q_network), Spy(target_network)
        for _ in range(2):
            script.td_loss(q_network, target_network, batch, args)
        sizes = [x.shape for x in online.taus + target.taus]
        wanted = [args.n_taus] * 2 + [args.n_target_taus, args.n_act_taus] * 2
        assert sorted(sizes) == sorted((BATCH, n) for n in wanted)
        drawn = np.concatenate([x.ravel() for x in online.taus + target.taus])
        assert len(np.unique(drawn)) == len(drawn), "tau were used twice"
        assert 0 <= drawn.min() < 0.1 and 0.9 < drawn.max() < 1


def test_iqn_acts_with_drawn_taus_and_is_evaluated_with_midpoints():
    script = load("iqn_cartpole")
    _, q_network, _, _, batch = set_up(script)
    obs = batch.obs[:1].float().expand(5, SIZE)  # five equal rows
    values = torch.stack([q_network(obs) for _ in range(2)])  # (2, 5, A)
    assert len(values.flatten(0, 1).unique(dim=0)) == 10
    q_network.eval()
    state = torch.get_rng_state()
    first, again = q_network(obs), q_network(obs)
    assert torch.equal(state, torch.get_rng_state()), "an evaluation would change the training"
    assert torch.equal(first, again)
    torch.testing.assert_close(first, first[:1].expand(5, N_ACTIONS))
    midpoints = torch.tensor([(2 * k - 1) / (2 * K) for k in range(1, K + 1)]).expand(5, K)
    torch.testing.assert_close(first, q_network.quantiles(obs, midpoints).mean(dim=2))
    q_network.train()
    rows = obs[:1].expand(4_000, SIZE)
    many = q_network(rows).detach()  # (4,000, A), of 4 drawn tau each
    exact = q_network.quantiles(obs[:1], (torch.arange(4_000)[None] + 0.5) / 4_000)
    error = (many.mean(dim=0) - exact.mean(dim=2)[0]).detach().abs()
    assert (error < 5 * many.std(dim=0) / math.sqrt(4_000)).all()


def test_evaluations_do_not_change_an_iqn_run(in_tmp, monkeypatch):
    script, ends = load("iqn_cartpole"), []
    monkeypatch.setattr(script, "save_checkpoint", lambda _, state: ends.append(state) or True)
    options = {"total_timesteps": 600, "learning_starts": 200, "buffer_size": 600, "end_e": 0.2}
    options |= {"checkpoint_frequency": 0, "eval_episodes": 1, "n_taus": 2, "n_target_taus": 2}
    for frequency in (200, 0):
        main_in_process(script, options | {"eval_frequency": frequency}, monkeypatch)
    first, second = (copy.deepcopy(end["q_network"]) for end in ends)
    assert all(torch.equal(first[key], second[key]) for key in first)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("qrdqn_cartpole", {"n_quantiles": 0}, "--n-quantiles must be positive"),
        ("qrdqn_cartpole", {"kappa": -1.0}, "--kappa must be 0 or more"),
        ("iqn_cartpole", {"kappa": -1.0}, "--kappa must be 0 or more"),
        *(
            ("iqn_cartpole", {option: 0}, f"--{option.replace('_', '-')} must be positive")
            for option in OPTIONS["iqn_cartpole"]
        ),
    ],
)
def test_wrong_arguments_are_refused(name, options, words, monkeypatch):
    assert words in refused(name, options, monkeypatch)
