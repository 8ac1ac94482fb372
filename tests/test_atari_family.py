"""The Atari files' losses and gradients on pictures, against plain NumPy in float64.

Their losses are those of the files on vectors, whose tests look at every detail; here they run
through the convolutions, with the discounts gamma^k of n-step returns.
"""

import functools
import math

import numpy as np
import oracle
import pytest
import torch
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_c51 import outside, projection, softmax
from test_munchausen import targets as munchausen_targets
from test_quantiles import Spy, embedding, loss_of_a_row
from test_replay import EVENTS, World
from test_run import main_in_process, refused, small
from test_td_loss import in_float64, random_batch

BATCH, N_ACTIONS = 8, 4  # of random_batch
OPTIONS = {
    "nstep_dqn_atari": {},
    "dueling_ddqn_atari": {},
    "per_ddqn_atari": {},
    "noisy_dqn_atari": {},
    "c51_atari": {"v_min": -3.0, "v_max": 4.0, "n_atoms": 11},
    "qrdqn_atari": {"n_quantiles": 5},
    "iqn_atari": {"n_taus": 3, "n_target_taus": 5, "n_act_taus": 6, "n_cosines": 7},
    "munchausen_dqn_atari": {"entropy_tau": 0.3, "munchausen_alpha": 0.7},
    "rainbow_atari": {"v_min": -3.0, "v_max": 4.0, "n_atoms": 11},
}
WITH_ARGS = {"noisy_dqn_atari", "c51_atari", "qrdqn_atari", "iqn_atari", "rainbow_atari"}
OFF = {"double": False, "dueling": False, "prioritized": False, "n_step": 1, "noisy": False}
OFF |= {"distributional": False}
PARTS = {
    "dqn_atari": {},
    "ddqn_atari": {"double": True},
    "dueling_ddqn_atari": {"double": True, "dueling": True},
    "per_ddqn_atari": {"double": True, "prioritized": True},
    "nstep_dqn_atari": {"n_step": 3},
    "noisy_dqn_atari": {"noisy": True},
    "c51_atari": {"distributional": True},
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


def noisy(w, name, x, e_in, e_out):
    """A NoisyLinear layer with these draws e of its inputs and outputs."""
    f_in, f_out = (np.sign(e) * np.sqrt(np.abs(e)) for e in (e_in, e_out))
    weight = w[f"{name}.weight"] + w[f"{name}.sigma_weight"] * np.outer(f_out, f_in)
    return x @ weight.T + w[f"{name}.bias"] + w[f"{name}.sigma_bias"] * f_out


def noisy_values(w, obs, draws):
    """`draws`: e of the inputs and outputs of both layers, in order."""
    hidden = relu(noisy(w, "hidden.0", features_of(w, obs), *draws[:2]))
    return noisy(w, "head", hidden, *draws[2:])


def rainbow_pmf(w, obs, draws, n):
    """(B, A, N) probabilities; `draws`: of the hidden layer, of the values, of the advantages."""
    hidden = relu(noisy(w, "hidden.0", features_of(w, obs), *draws[:2]))
    value = noisy(w, "value", hidden[:, :512], *draws[2:4])  # (B, N)
    advantage = noisy(w, "advantage", hidden[:, 512:], *draws[4:]).reshape(len(obs), -1, n)
    logits = np.zeros_like(advantage)
    for b in range(len(obs)):
        for a in range(N_ACTIONS):
            for i in range(n):
                logits[b, a, i] = value[b, i] + advantage[b, a, i] - np.mean(advantage[b, :, i])
    return np.array([[softmax(x) for x in row] for row in logits])


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
        more = (self.args,) if name in WITH_ARGS else ()
        self.q_network, self.target_network = (
            self.script.QNetwork(N_ACTIONS, *more).double() for _ in range(2)
        )
        with torch.no_grad():
            for network in (self.q_network, self.target_network):
                head = getattr(network, "head", None) or network.advantage
                head.weight.mul_(8)  # values that differ between actions
        self.arrays, batch = random_batch(self.script, np.random.default_rng(1), atari=True)
        batch = in_float64(batch)
        self.weights = np.ones(BATCH)
        if name in ("per_ddqn_atari", "rainbow_atari"):
            self.weights = np.random.default_rng(3).uniform(0.1, 1, BATCH)
            batch = batch._replace(is_weights=torch.from_numpy(self.weights))
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
        losses, priorities, taken = getattr(self, self.name)(w, weights_of(self.target_network))
        return self.weights * losses, priorities, taken

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

    def per_ddqn_atari(self, w, target):
        chosen = outputs_of(weights_of(self.q_network), self.arrays["next_obs"]).argmax(axis=1)
        values = outputs_of(target, self.arrays["next_obs"])[np.arange(BATCH), chosen]
        return self.scalar_losses(self.bootstrapped(values), outputs_of(w, self.arrays["obs"]))

    def noisy_dqn_atari(self, w, target):
        at_next = noisy_values(target, self.arrays["next_obs"], self.draws[:4])
        q = noisy_values(w, self.arrays["obs"], self.draws[4:])
        return self.scalar_losses(self.bootstrapped(at_next.max(axis=1)), q)

    def munchausen_dqn_atari(self, w, target):
        q, next_q = (outputs_of(target, self.arrays[key]) for key in ("obs", "next_obs"))
        y = munchausen_targets(q, next_q, self.arrays, self.args)
        return self.scalar_losses(y, outputs_of(w, self.arrays["obs"]))

    def c51_atari(self, w, target):
        shape = (BATCH, N_ACTIONS, -1)
        pmf, next_pmf = (
            np.array([[softmax(x) for x in row] for row in outputs_of(u, obs).reshape(shape)])
            for u, obs in ((w, self.arrays["obs"]), (target, self.arrays["next_obs"]))
        )
        return self.of_distributions(pmf, next_pmf, next_pmf)

    def rainbow_atari(self, w, target):
        """The draws: of theta^- at s', of theta at s', which chooses a*, of theta at s."""
        n, online = self.args.n_atoms, weights_of(self.q_network)
        next_pmf = rainbow_pmf(target, self.arrays["next_obs"], self.draws[:6], n)
        chooses = rainbow_pmf(online, self.arrays["next_obs"], self.draws[6:12], n)
        z = np.linspace(self.args.v_min, self.args.v_max, n)
        assert ((next_pmf @ z).argmax(axis=1) != (chooses @ z).argmax(axis=1)).any()
        pmf = rainbow_pmf(w, self.arrays["obs"], self.draws[12:], n)
        return self.of_distributions(pmf, next_pmf, chooses)

    def of_distributions(self, pmf, next_pmf, chooses):
        """Probabilities at s, at s', and those whose mean chooses a*."""
        support = (self.args.v_min, self.args.v_max, self.args.n_atoms)
        z, losses, priorities, taken, shares = np.linspace(*support), [], [], [], []
        for i, a in enumerate(self.arrays["actions"]):
            best = int(np.argmax([sum(z * p) for p in chooses[i]]))
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
        if name in ("dueling_ddqn_atari", "rainbow_atari") and of_features:
            slope /= math.sqrt(2)  # Wang et al. scale the gradient into the convolutions
        found = sum((gradient[n] * direction[n]).sum() for n in gradient) / length
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-9) and abs(slope) > 1e-6


@pytest.mark.parametrize("name", PARTS)
def test_rainbow_with_one_part_on_has_the_update_of_that_file(name):
    """Same weights, same batch, same noise: same loss, priorities, gradients."""
    results = []
    for file in ("rainbow_atari", name):
        script = load(file)
        known = {k: v for k, v in (OFF | PARTS[name]).items() if hasattr(script.Args, k)}
        args = script.Args(**known)
        if hasattr(args, "v_min"):
            args.v_min, args.v_max, args.n_atoms = -4.0, 4.0, 7
        networks = []
        for seed in (3, 4):
            torch.manual_seed(seed)
            more = (args,) if file in WITH_ARGS else ()
            networks.append(script.QNetwork(N_ACTIONS, *more))
        _, batch = random_batch(script, np.random.default_rng(0), atari=True)
        floats = {k: x.float() for k, x in batch._asdict().items() if x.dtype == torch.float64}
        batch = batch._replace(**floats, is_weights=torch.linspace(0.1, 1, BATCH))
        if name != "per_ddqn_atari":
            batch = batch._replace(is_weights=torch.ones(BATCH))
        torch.manual_seed(5)
        loss, priorities, taken, *_ = script.td_loss(*networks, batch, args)
        loss.backward()
        gradients = [p.grad for p in networks[0].parameters()]
        results.append((loss.detach(), priorities, taken, gradients))
    (loss, priorities, taken, gradients), others = results[0], results[1]
    for mine, other in zip((loss, priorities, taken), others):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert len(gradients) == len(others[3])
    for mine, other in zip(gradients, others[3]):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_the_batch_distinguishes_dueling_dqn_from_double_dqn(monkeypatch, float64):
    case = Case("dueling_ddqn_atari", monkeypatch)
    values = dueling_values(weights_of(case.target_network), case.arrays["next_obs"])
    chosen = dueling_values(weights_of(case.q_network), case.arrays["next_obs"]).argmax(axis=1)
    assert (values.argmax(axis=1) != chosen).any()


def channel_norm(w, name, x):
    """Over the last axis, for each picture and pixel."""
    out = np.empty_like(x)
    for i in np.ndindex(x.shape[:-1]):
        out[i] = (x[i] - x[i].mean()) / math.sqrt(((x[i] - x[i].mean()) ** 2).mean() + 1e-5)
    return out * w[f"{name}.weight"] + w[f"{name}.bias"]


def pqn_values(w, obs):
    x = obs.astype(np.float64) / 255
    for i, stride in ((0, 4), (3, 2), (6, 1)):
        x = oracle.conv2d(x, w[f"features.{i}.weight"], w[f"features.{i}.bias"], stride)
        x = relu(channel_norm(w, f"features.{i + 1}", x.transpose(0, 2, 3, 1)))
        x = x.transpose(0, 3, 1, 2)
    x = dense(w, "features.10", x.transpose(0, 2, 3, 1).reshape(len(x), -1))
    return dense(w, "head", relu(channel_norm(w, "features.11", x)))


def test_pqns_network_and_loss_equal_the_oracle(float64):
    torch.manual_seed(0)
    script, rng = load("pqn_atari"), np.random.default_rng(1)
    network = script.QNetwork(N_ACTIONS)
    with torch.no_grad():  # weights that show where the norms stand: theirs are not 1 and 0
        for p in network.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    obs = rng.integers(256, size=(BATCH, 4, 84, 84), dtype=np.uint8)
    actions, returns = rng.integers(N_ACTIONS, size=BATCH), rng.normal(size=BATCH)
    w, tensors = weights_of(network), (torch.from_numpy(obs) / 255, torch.from_numpy(actions))
    q = pqn_values(w, obs)
    np.testing.assert_allclose(network(tensors[0]).detach().numpy(), q, rtol=1e-9)
    batch = script.Batch(*tensors, torch.from_numpy(returns))
    loss, td_error, q_taken = script.td_loss(network, batch, script.Args())
    taken = q[np.arange(BATCH), actions]
    np.testing.assert_allclose(td_error.numpy(), returns - taken, rtol=1e-9)
    np.testing.assert_allclose(q_taken.numpy(), taken, rtol=1e-9)
    assert loss.item() == pytest.approx(sum((returns - taken) ** 2) / 2 / BATCH, rel=1e-9)
    loss.backward()
    direction = {n: rng.normal(size=x.shape) for n, x in w.items()}
    length, step, ends = math.sqrt(sum((x**2).sum() for x in direction.values())), 1e-6, []
    for s in (step, -step):
        moved = pqn_values({n: x + s * direction[n] / length for n, x in w.items()}, obs)
        ends.append(((returns - moved[np.arange(BATCH), actions]) ** 2).mean() / 2)
    found = sum((p.grad.numpy() * direction[n]).sum() for n, p in network.named_parameters())
    assert found / length == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_envs=st.integers(1, 3), num_steps=st.integers(1, 12))
def test_lambda_returns_of_whole_and_cut_games(data, num_envs, num_steps):
    """Game by game: a lost life ends the return, a cut bootstraps, a reset is no transition."""
    script, gamma, lam = load("pqn_atari"), 0.9, 0.6
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rollout = script.Rollout(num_steps, num_envs, torch.device("cpu"))
    frames = rng.integers(256, size=(num_steps + 1, num_envs), dtype=np.uint8)
    events, over = [], [False] * num_envs
    for t in range(num_steps):
        row = []
        for game in range(num_envs):
            kinds = ["reset"] if over[game] else ["step", "step", "life lost", "over", "cut"]
            row.append(data.draw(st.sampled_from(kinds)))
            over[game] = row[-1] in ("over", "cut")
        events.append(row)
        kind = np.array(row)
        rewards = np.where(kind == "reset", 0, rng.integers(-1, 2, num_envs)).astype(np.float32)
        pictures = [np.broadcast_to(x[:, None, None, None], (num_envs, 4, 84, 84)) for x in frames]
        discounts = gamma * ~np.isin(kind, ["life lost", "over"])
        step = (pictures[t], rng.integers(N_ACTIONS, size=num_envs), rewards, pictures[t + 1])
        rollout.add(*step, discounts, kind == "cut", kind != "reset")
    rewards = rollout.rewards.copy()

    class Network(torch.nn.Module):
        """max_a Q(s, a) = the grey of the first pixel / 10"""

        def forward(self, obs):
            return obs[:, 0, 0, :2].float() / 10

    args = script.Args(gamma=gamma, q_lambda=lam)
    batch, expected = rollout.take(Network(), args), []
    values = frames[1:] / 10
    for t in range(num_steps):
        for game in range(num_envs):
            if events[t][game] == "reset":
                continue
            total, weight, u = 0.0, 1.0, t
            while True:  # sum of rewards and (1 - lambda) values until the game ends here
                total += weight * rewards[u, game]
                kind = events[u][game]
                if kind in ("life lost", "over"):
                    break
                if kind == "cut" or u == num_steps - 1:
                    total += weight * gamma * values[u, game]
                    break
                total += weight * gamma * (1 - lam) * values[u, game]
                weight, u = weight * gamma * lam, u + 1
            expected.append((frames[t, game], total))
    assert batch.obs[:, 0, 0, 0].tolist() == [grey for grey, _ in expected]
    np.testing.assert_allclose(
        batch.returns, [total for _, total in expected], rtol=1e-4, atol=1e-4
    )
    assert rollout.size == 0 and len(batch.actions) == len(expected)


def test_a_run_of_pqn_learns_from_what_the_games_did(in_tmp, monkeypatch):
    """The rows of a real game: the next frames are the next row's, rewards are clipped."""
    script, taken = load("pqn_atari"), []
    take = script.Rollout.take

    def recorded(self, q_network, args):
        copies = {name: getattr(self, name).copy() for name in self.NAMES}
        taken.append((copies, take(self, q_network, args)))
        return taken[-1][1]

    monkeypatch.setattr(script.Rollout, "take", recorded)
    options = small("pqn_atari") | {"total_timesteps": 2000, "end_e": 1.0, "eval_episodes": 0}
    main_in_process(script, options | {"num_steps": 100, "num_minibatches": 2}, monkeypatch)
    assert len(taken) == 10  # 2,000 steps of 2 games
    resets = 0
    for rollout, batch in taken:
        same = rollout["obs"][1:, :, :3] == rollout["obs"][:-1, :, 1:]  # stacks move by one frame
        moved = same.all(axis=(2, 3, 4))
        assert moved[rollout["steps"]].all() and not moved[~rollout["steps"]].any()
        resets += (~rollout["steps"]).sum()
        assert len(batch.actions) == rollout["steps"].sum()
        assert set(np.unique(rollout["rewards"])) <= {-1, 0, 1}
    assert resets > 0


def test_a_minibatch_of_pqn_is_never_empty(in_tmp, monkeypatch):
    """Four steps of one game, of which one may be its reset, in four minibatches.

    A game lasts 40 steps.
    """
    script, sizes = load("pqn_atari"), []
    td_loss = script.td_loss

    def counted(q_network, batch, args):
        sizes.append(len(batch.actions))
        return td_loss(q_network, batch, args)

    monkeypatch.setattr(script, "td_loss", counted)
    short = functools.partial(script.make_envs, max_num_frames_per_episode=160)
    monkeypatch.setattr(script, "make_envs", short)
    options = small("pqn_atari") | {"total_timesteps": 120, "end_e": 1.0, "eval_episodes": 0}
    options |= {"num_envs": 1, "num_steps": 4, "num_minibatches": 4, "update_epochs": 1}
    main_in_process(script, options, monkeypatch)
    assert 115 <= len(sizes) < 120 and set(sizes) == {1}


def prioritized(rows, num_envs=1, n_step=1, alpha=0.5, beta=0.4):
    script = load("per_ddqn_atari")
    replay = script.FrameReplay(rows * num_envs, (4,), num_envs, n_step=n_step)
    tree = script.SumTree(rows * num_envs, alpha)
    return script.PrioritizedFrameReplay(replay, tree, beta)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_envs=st.integers(1, 3), n_step=st.integers(1, 3))
def test_priorities_of_the_numpy_replay_equal_the_oracles(data, num_envs, n_step):
    """Lost lives, ends of games, wrap-around: the leaf of every row after every step."""
    rows, alpha = (
        data.draw(st.integers(n_step + 8, 20)),
        data.draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    replay = prioritized(rows, num_envs, n_step, alpha)
    reference = oracle.OracleReplay(rows * num_envs, num_envs, n_step=n_step)
    priorities = oracle.OraclePriorities(reference, alpha)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    world, leaves = World(replay, reference, rng), []
    for _ in range(data.draw(st.integers(1, 60))):
        world.step([data.draw(st.sampled_from(EVENTS)) for _ in range(num_envs)])
        priorities.after_add()
        leaves = replay.tree.nodes[replay.tree.first :][: rows * num_envs].tolist()
        assert leaves == priorities.flat()
        assert replay.tree.total() == sum(leaves)
        if not sum(leaves):
            with pytest.raises(ValueError, match="no whole transition"):
                replay.sample(4)
            continue
        batch = replay.sample(4)
        p = np.array(leaves)[batch.indices.numpy()] / sum(leaves)
        size = len(reference.transitions())
        w = (size * p) ** -replay.per_beta
        np.testing.assert_allclose(batch.is_weights.numpy(), w / w.max(), rtol=1e-6)
        for i, index in enumerate(batch.indices.tolist()):
            obs, action, reward, next_obs, discount = reference.transitions()[index]
            np.testing.assert_array_equal(batch.obs[i].numpy(), obs)
            np.testing.assert_array_equal(batch.next_obs[i].numpy(), next_obs)
            assert batch.actions[i] == action
            assert float(batch.rewards[i]) == pytest.approx(reward, abs=1e-6)
            assert float(batch.discounts[i]) == pytest.approx(discount, rel=1e-6)
        priorities.draw(batch.indices)
        td_errors = torch.from_numpy(rng.normal(size=4) * 3)
        replay.update_priorities(batch.indices, td_errors)
        priorities.update(batch.indices, td_errors)
    state = replay.state_dict()
    again = prioritized(rows, num_envs, n_step, alpha)
    again.load_state_dict(state)
    assert again.tree.nodes.tolist() == replay.tree.nodes.tolist()
    assert again.max_priority == replay.max_priority and len(again) == len(replay)


@pytest.mark.parametrize("kind", ["numpy", "cpp"])
def test_rows_are_drawn_in_proportion_to_their_priority(kind):
    """Chi-square, after lives were lost and the ring has wrapped around."""
    rows, alpha, draws = 24, 0.6, 40_000
    if kind == "numpy":
        replay = prioritized(rows, 2, n_step=2, alpha=alpha)
    else:
        fastreplay = pytest.importorskip("fastreplay")
        options = {"n_step": 2, "prioritized": True, "per_alpha": alpha, "stratified": False}
        replay = fastreplay.FrameReplay(rows * 2, (4,), 2, **options)
    reference, rng = oracle.OracleReplay(rows * 2, 2, n_step=2), np.random.default_rng(0)
    world = World(replay, reference, rng)
    for step in range(60):
        world.step(
            [["step", "step", "life lost", "terminated"][(step + game) % 4] for game in (0, 1)]
        )
    indices = np.array(sorted(reference.transitions()))
    errors = rng.uniform(0.1, 5, len(indices))
    everywhere = replay.sample(4_000).indices  # fastreplay wants rows to have been drawn before
    assert set(everywhere.tolist()) == set(indices.tolist())
    replay.update_priorities(torch.from_numpy(indices), torch.from_numpy(errors))
    found = np.concatenate([replay.sample(10).indices.numpy() for _ in range(draws // 10)])
    expected = (errors + 1e-6) ** alpha
    counts = np.array([(found == index).sum() for index in indices])
    assert counts.sum() == draws, "a row was drawn that starts no whole transition"
    if kind == "numpy":  # stratified draws vary less than independent ones
        assert abs(counts / draws - expected / expected.sum()).max() < 0.01
    assert stats.chisquare(counts, draws * expected / expected.sum()).pvalue > 1e-4


@pytest.mark.parametrize("name", ["per_ddqn_atari", "btr_atari"])
def test_a_run_updates_the_priorities_of_its_batches(name, in_tmp, monkeypatch):
    """With |delta| of td_loss, in both replays; beta rises to 1."""
    script = load(name)
    options = small(name) | {"total_timesteps": 660, "learning_starts": 100, "batch_size": 4}
    options |= {"eval_episodes": 0}
    for buffer in ("numpy", "auto"):
        updates, betas, td_loss, make = [], [], script.td_loss, script.make_replay

        def make_replay(*args, make=make, updates=updates, betas=betas, **kwargs):
            replay = make(*args, **kwargs)
            update = replay.update_priorities

            def recorded(indices, td_error):
                updates.append((indices.tolist(), td_error.tolist()))
                betas.append(replay.per_beta)
                return update(indices, td_error)

            monkeypatch.setattr(replay, "update_priorities", recorded)
            return replay

        errors = []

        def recorded_loss(q_network, target_network, batch, args, td_loss=td_loss, errors=errors):
            result = td_loss(q_network, target_network, batch, args)
            errors.append((batch.indices.tolist(), result[1].tolist()))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(script, "make_replay", make_replay)
            patch.setattr(script, "td_loss", recorded_loss)
            main_in_process(script, options | {"buffer": buffer}, patch)
        assert updates == errors and len(errors) > 10
        assert betas == sorted(betas) and 0.4 < betas[0] < betas[-1] < 1


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
        "per_ddqn_atari": {"learning_rate": 1e-4 / 4, "per_alpha": 0.6, "per_beta": 0.4},
        "c51_atari": {"learning_rate": 2.5e-4, "adam_eps": 0.01 / 32, "n_atoms": 51, "v_max": 10},
        "qrdqn_atari": {"learning_rate": 5e-5, "adam_eps": 0.01 / 32, "n_quantiles": 200},
        "iqn_atari": {"learning_rate": 5e-5, "adam_eps": 0.01 / 32, "n_act_taus": 32},
        "munchausen_dqn_atari": {"learning_rate": 5e-5, "munchausen_alpha": 0.9, "l0": -1},
        "rainbow_atari": {
            "learning_rate": 6.25e-5,
            "adam_eps": 1.5e-4,
            "n_step": 3,
            "sigma_0": 0.5,
        },
        "btr_atari": {
            **{"learning_rate": 1e-4, "adam_eps": 0.005 / 256, "max_grad_norm": 10.0, "n_taus": 8},
            **{"gamma": 0.997, "n_step": 3, "batch_size": 256, "num_envs": 64, "width": 2},
            **{"train_frequency": 64, "target_network_frequency": 500 * 64, "per_alpha": 0.2},
            **{"buffer_size": 2**20, "learning_starts": 200_000, "per_beta": 0.4},
            **{"munchausen_alpha": 0.9, "entropy_tau": 0.03, "l0": -1, "sigma_0": 0.5},
        },
    }.items():
        args = load(name).RunArgs()
        assert {key: getattr(args, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("c51_atari", {"v_max": -10}, ["--v-max", "above --v-min"]),
        ("pqn_atari", {"q_lambda": 1.1}, ["--q-lambda", "between 0 and 1"]),
        ("pqn_atari", {"num_steps": 10**7}, ["--num-steps", "fit into memory"]),
        ("rainbow_atari", {"v_max": -10}, ["--v-max", "above --v-min"]),
        ("c51_atari", {"n_atoms": 1}, ["--n-atoms", "2 or more"]),
        ("per_ddqn_atari", {"per_alpha": 2}, ["--per-alpha", "between 0 and 1"]),
        ("qrdqn_atari", {"n_quantiles": 0}, ["--n-quantiles", "positive"]),
        ("iqn_atari", {"n_taus": 0}, ["--n-taus", "positive"]),
        ("munchausen_dqn_atari", {"entropy_tau": 0}, ["--entropy-tau", "positive"]),
        ("btr_atari", {"width": 0}, ["--width", "positive"]),
        ("btr_atari", {"n_act_taus": 0}, ["--n-act-taus", "positive"]),
        ("btr_atari", {"kappa": -1}, ["--kappa", "0 or more"]),
        ("btr_atari", {"l0": 1}, ["--l0", "at most 0"]),
        ("btr_atari", {"epsilon_until": 1.5}, ["--epsilon-until", "between 0 and 1"]),
        ("dqn_atari", {"adam_eps": 0}, ["--adam-eps", "positive"]),
    ],
)
def test_wrong_arguments_are_refused(name, options, words, in_tmp, monkeypatch):
    line = refused(name, options, monkeypatch)
    assert all(word in line for word in words), line
