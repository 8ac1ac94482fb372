"""The Atari files' losses and gradients on pictures, against plain NumPy in float64.

Their losses are those of the files on vectors, whose tests look at every detail; here they run
through the convolutions, with the discounts gamma^k of n-step returns.
"""

import math

import numpy as np
import oracle
import pytest
import torch
from conftest import load
from test_c51 import outside, projection, softmax
from test_munchausen import targets as munchausen_targets
from test_quantiles import Spy, embedding, loss_of_a_row
from test_run import refused
from test_td_loss import in_float64, random_batch

BATCH, N_ACTIONS = 8, 4  # of random_batch
OPTIONS = {
    "nstep_dqn_atari": {},
    "dueling_ddqn_atari": {},
    "noisy_dqn_atari": {},
    "c51_atari": {"v_min": -3.0, "v_max": 4.0, "n_atoms": 11},
    "qrdqn_atari": {"n_quantiles": 5},
    "iqn_atari": {"n_taus": 3, "n_target_taus": 5, "n_act_taus": 6, "n_cosines": 7},
    "munchausen_dqn_atari": {"entropy_tau": 0.3, "munchausen_alpha": 0.7},
}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def dense(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def relu(x):
    return np.maximum(x, 0)


def features_of(w, obs):
    """What the convolutions give, flattened by row, column, channel, (B, 3136)."""
    x = obs.astype(np.float64) / 255
    for i, stride in ((0, 4), (2, 2), (4, 1)):
        weight, bias = w[f"features.{i}.weight"], w[f"features.{i}.bias"]
        x = relu(oracle.conv2d(x, weight, bias, stride))
    return x.transpose(0, 2, 3, 1).reshape(len(x), -1)


def outputs_of(w, obs):
    """Of the last layer behind one hidden layer of 512."""
    return dense(w, "head", relu(dense(w, "features.7", features_of(w, obs))))


def dueling_values(w, obs):
    hidden = relu(dense(w, "hidden.0", features_of(w, obs)))
    values, advantages = dense(w, "value", hidden[:, :512]), dense(w, "advantage", hidden[:, 512:])
    return np.array(
        [[v + a - sum(row) / len(row) for a in row] for (v,), row in zip(values, advantages)]
    )


def noisy_values(w, obs, draws):
    """`draws`: e of the inputs and outputs of both layers, in order."""
    x = features_of(w, obs)
    for name, (e_in, e_out) in zip(("hidden.0", "head"), (draws[:2], draws[2:])):
        f_in, f_out = (np.sign(e) * np.sqrt(np.abs(e)) for e in (e_in, e_out))
        weight = w[f"{name}.weight"] + w[f"{name}.sigma_weight"] * np.outer(f_out, f_in)
        x = x @ weight.T + w[f"{name}.bias"] + w[f"{name}.sigma_bias"] * f_out
        x = relu(x) if name == "hidden.0" else x
    return x


def iqn_quantiles(w, obs, taus):
    """(B, A, N)"""
    features, rows = features_of(w, obs), []
    for row, row_taus in zip(features, taus):
        phi = [embedding(w["embedding.weight"], w["embedding.bias"], tau) for tau in row_taus]
        rows.append(dense(w, "head", relu(dense(w, "hidden.0", row * np.array(phi)))).T)
    return np.array(rows)


def weights_of(network):
    return {name: p.detach().numpy().copy() for name, p in network.named_parameters()}


class Case:
    """A script's networks in float64, a batch, what td_loss gives, and the oracle of the loss."""

    def __init__(self, name, monkeypatch, **options):
        torch.manual_seed(0)
        self.script = load(name)
        self.args = self.script.Args(**OPTIONS[name] | options)
        more = (
            (self.args,)
            if name in ("noisy_dqn_atari", "c51_atari", "qrdqn_atari", "iqn_atari")
            else ()
        )
        self.q_network, self.target_network = (
            self.script.QNetwork(N_ACTIONS, *more).double() for _ in range(2)
        )
        with torch.no_grad():
            for network in (self.q_network, self.target_network):
                head = getattr(network, "head", None) or network.advantage
                head.weight.mul_(8)  # values that differ between actions
        self.arrays, batch = random_batch(self.script, np.random.default_rng(1), atari=True)
        batch = in_float64(batch)
        draws, randn_like = [], torch.randn_like

        def recorded(x):
            draws.append(randn_like(x))
            return draws[-1]

        monkeypatch.setattr(torch, "randn_like", recorded)
        spies = []
        if name == "iqn_atari":
            spies = [Spy(self.q_network), Spy(self.target_network)]
        self.result = self.script.td_loss(self.q_network, self.target_network, batch, self.args)
        monkeypatch.undo()
        self.draws, self.name = [e.numpy() for e in draws], name
        self.taus = [spy.taus for spy in spies]

    def losses(self, w):
        """-> the loss of each row at the online weights w, the priority of each, Q(s, a)"""
        return getattr(self, self.name)(w, weights_of(self.target_network))

    def scalar_losses(self, y, q):
        """Of targets (B,) and values (B, A)."""
        taken = q[np.arange(BATCH), self.arrays["actions"]]
        errors = y - taken
        size = np.abs(errors)
        return np.where(size < 1, errors**2 / 2, size - 0.5), errors, taken

    def bootstrapped(self, values):
        """r + gamma^k times the values at s', (B,)"""
        return self.arrays["rewards"] + self.arrays["discounts"] * values

    def nstep_dqn_atari(self, w, target):
        y = self.bootstrapped(outputs_of(target, self.arrays["next_obs"]).max(axis=1))
        return self.scalar_losses(y, outputs_of(w, self.arrays["obs"]))

    def dueling_ddqn_atari(self, w, target):
        chosen = dueling_values(weights_of(self.q_network), self.arrays["next_obs"]).argmax(axis=1)
        values = dueling_values(target, self.arrays["next_obs"])[np.arange(BATCH), chosen]
        return self.scalar_losses(self.bootstrapped(values), dueling_values(w, self.arrays["obs"]))

    def noisy_dqn_atari(self, w, target):
        at_next = noisy_values(target, self.arrays["next_obs"], self.draws[:4])
        q = noisy_values(w, self.arrays["obs"], self.draws[4:])
        return self.scalar_losses(self.bootstrapped(at_next.max(axis=1)), q)

    def munchausen_dqn_atari(self, w, target):
        q, next_q = (outputs_of(target, self.arrays[key]) for key in ("obs", "next_obs"))
        y = munchausen_targets(q, next_q, self.arrays, self.args)
        return self.scalar_losses(y, outputs_of(w, self.arrays["obs"]))

    def c51_atari(self, w, target):
        support = (self.args.v_min, self.args.v_max, self.args.n_atoms)
        z, losses, priorities, taken = np.linspace(*support), [], [], []
        shape = (BATCH, N_ACTIONS, -1)
        pmf, next_pmf = (
            np.array(
                [
                    [softmax(x) for x in row]
                    for row in outputs_of(u, self.arrays[key]).reshape(shape)
                ]
            )
            for u, key in ((w, "obs"), (target, "next_obs"))
        )
        shares = []
        for i, a in enumerate(self.arrays["actions"]):
            best = int(np.argmax([sum(z * p) for p in next_pmf[i]]))
            case = next_pmf[i, best], self.arrays["rewards"][i], self.arrays["discounts"][i]
            m, p = projection(*case, *support), pmf[i, a]
            losses.append(-sum(m_j * math.log(p_j) for m_j, p_j in zip(m, p)))
            priorities.append(sum(m_j * math.log(m_j / p_j) for m_j, p_j in zip(m, p) if m_j > 0))
            taken.append(sum(z * p))
            shares.append(outside(*case, *support))
        assert self.result[3].item() == pytest.approx(np.mean(shares)) and np.mean(shares) > 0
        return map(np.array, (losses, priorities, taken))

    def of_quantiles(self, theta, following, values, taus):
        losses, taken = [], []
        for i, a in enumerate(self.arrays["actions"]):
            y = following[i, int(np.argmax(values[i]))]
            y = [self.arrays["rewards"][i] + self.arrays["discounts"][i] * x for x in y]
            losses.append(loss_of_a_row(theta[i, a], y, taus[i], self.args.kappa))
            taken.append(np.mean(theta[i, a]))
        return np.array(losses), np.array(losses), np.array(taken)

    def qrdqn_atari(self, w, target):
        n, shape = self.args.n_quantiles, (BATCH, N_ACTIONS, -1)
        theta = outputs_of(w, self.arrays["obs"]).reshape(shape)
        following = outputs_of(target, self.arrays["next_obs"]).reshape(shape)
        taus = [[(2 * i - 1) / (2 * n) for i in range(1, n + 1)]] * BATCH
        return self.of_quantiles(theta, following, following.mean(axis=2), taus)

    def iqn_atari(self, w, target):
        (taus,), target_taus = self.taus
        next_taus, act_taus = sorted(target_taus, key=lambda x: x.shape[1])  # N' < K
        theta = iqn_quantiles(w, self.arrays["obs"], taus)
        following, values = (
            iqn_quantiles(target, self.arrays["next_obs"], x) for x in (next_taus, act_taus)
        )
        return self.of_quantiles(theta, following, values.mean(axis=2), taus)


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient_equal_the_oracle(name, monkeypatch, float64):
    """The gradient along random directions, by differences of the oracle's loss."""
    case = Case(name, monkeypatch)
    loss, priorities, taken, *_ = case.result
    weights = weights_of(case.q_network)
    expected, expected_priorities, expected_taken = case.losses(weights)
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-9)
    np.testing.assert_allclose(priorities.numpy(), expected_priorities, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(taken.numpy(), expected_taken, rtol=1e-9)
    assert not (priorities.requires_grad or taken.requires_grad)
    loss.backward()
    assert all(p.grad is None for p in case.target_network.parameters())
    gradient, rng = {n: p.grad.numpy() for n, p in case.q_network.named_parameters()}, None
    rng, step = np.random.default_rng(2), 1e-6
    for of_features in (True, False):
        direction = {
            n: rng.normal(size=x.shape) * (n.startswith("features.") == of_features)
            for n, x in weights.items()
        }
        length = math.sqrt(sum((x**2).sum() for x in direction.values()))
        ends = []
        for s in (step, -step):
            losses, *_ = case.losses({n: x + s * direction[n] / length for n, x in weights.items()})
            ends.append(losses.mean())
        slope = (ends[0] - ends[1]) / (2 * step)
        if name.startswith("dueling") and of_features:
            slope /= math.sqrt(2)  # Wang et al. scale the gradient into the convolutions
        found = sum((gradient[n] * direction[n]).sum() for n in gradient) / length
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-9) and abs(slope) > 1e-6


def test_the_batch_distinguishes_dueling_dqn_from_double_dqn(monkeypatch, float64):
    case = Case("dueling_ddqn_atari", monkeypatch)
    values = dueling_values(weights_of(case.target_network), case.arrays["next_obs"])
    chosen = dueling_values(weights_of(case.q_network), case.arrays["next_obs"]).argmax(axis=1)
    assert (values.argmax(axis=1) != chosen).any()


def test_all_rows_share_a_draw_of_noise_and_evaluation_has_none():
    torch.manual_seed(0)
    script = load("noisy_dqn_atari")
    network = script.QNetwork(N_ACTIONS, script.Args())
    obs = torch.randint(256, (1, 4, 84, 84), dtype=torch.uint8).repeat(3, 1, 1, 1)
    first, second = network(obs), network(obs)
    torch.testing.assert_close(first, first[:1].expand(3, -1))
    assert (first - second).abs().min() > 1e-5
    network.eval()
    assert torch.equal(network(obs), network(obs))
    assert script.epsilon_at(0, script.Args()) == script.epsilon_at(10**6, script.Args()) == 0


def test_papers_settings():
    """What differs from the parent by default, and is the papers'."""
    for name, expected in {
        "nstep_dqn_atari": {"n_step": 3},
        "dueling_ddqn_atari": {"max_grad_norm": 10.0},
        "c51_atari": {"learning_rate": 2.5e-4, "adam_eps": 0.01 / 32, "n_atoms": 51, "v_max": 10},
        "qrdqn_atari": {"learning_rate": 5e-5, "adam_eps": 0.01 / 32, "n_quantiles": 200},
        "iqn_atari": {"learning_rate": 5e-5, "adam_eps": 0.01 / 32, "n_act_taus": 32},
        "munchausen_dqn_atari": {"learning_rate": 5e-5, "munchausen_alpha": 0.9, "l0": -1},
    }.items():
        args = load(name).RunArgs()
        assert {key: getattr(args, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("c51_atari", {"v_max": -10}, ["--v-max", "above --v-min"]),
        ("c51_atari", {"n_atoms": 1}, ["--n-atoms", "2 or more"]),
        ("qrdqn_atari", {"n_quantiles": 0}, ["--n-quantiles", "positive"]),
        ("iqn_atari", {"n_taus": 0}, ["--n-taus", "positive"]),
        ("munchausen_dqn_atari", {"entropy_tau": 0}, ["--entropy-tau", "positive"]),
        ("dqn_atari", {"adam_eps": 0}, ["--adam-eps", "positive"]),
    ],
)
def test_wrong_arguments_are_refused(name, options, words, in_tmp, monkeypatch):
    line = refused(name, options, monkeypatch)
    assert all(word in line for word in words), line
