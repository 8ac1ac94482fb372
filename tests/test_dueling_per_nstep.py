"""Dueling DQN, prioritized replay and n-step returns against the papers, in plain loops."""

import gymnasium as gym
import numpy as np
import oracle
import pytest
import test_run
import torch
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import checkpoint_of, main_in_process, refused, same, scalars, small
from test_td_loss import BATCH, N_ACTIONS, in_float64, networks, random_batch

DUELING, PER, NSTEP = "dueling_dqn_cartpole", "per_dqn_cartpole", "nstep_dqn_cartpole"
CPU = torch.device("cpu")
SPACE = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


def saved(in_tmp):
    return torch.load(checkpoint_of(in_tmp), weights_only=True)


# ---- dueling -------------------------------------------------------------------------------------


def dueling_layers(w, x):
    """One observation -> its layers, and Q(s, a) = V(s) + A(s, a) - mean_a' A(s, a'), (A,)"""
    h = np.maximum(w["features.0.weight"] @ x + w["features.0.bias"], 0)
    h_v = np.maximum(w["value.0.weight"] @ h + w["value.0.bias"], 0)
    h_a = np.maximum(w["advantage.0.weight"] @ h + w["advantage.0.bias"], 0)
    v = w["value.2.weight"] @ h_v + w["value.2.bias"]  # (1,)
    a = w["advantage.2.weight"] @ h_a + w["advantage.2.bias"]  # (A,)
    q = [v[0] + a[i] - sum(a) / len(a) for i in range(len(a))]
    return h, h_v, h_a, np.array(q)


def dueling_values(w, obs):
    return np.array([dueling_layers(w, x)[-1] for x in obs])


def dueling_gradients(w, obs, d_q, scale):
    """Backpropagation of d_q (B, A); what enters the shared layer is multiplied by `scale`."""
    gradients = {name: np.zeros_like(x) for name, x in w.items()}
    for x, d in zip(obs, d_q):
        h, h_v, h_a, _ = dueling_layers(w, x)
        d_v = np.array([d.sum()])
        d_a = np.array([d[i] - d.sum() / len(d) for i in range(len(d))])
        d_h = np.zeros_like(h)
        for stream, hidden, d_out in (("value", h_v, d_v), ("advantage", h_a, d_a)):
            d_hidden = (w[f"{stream}.2.weight"].T @ d_out) * (hidden > 0)
            gradients[f"{stream}.2.weight"] += np.outer(d_out, hidden)
            gradients[f"{stream}.2.bias"] += d_out
            gradients[f"{stream}.0.weight"] += np.outer(d_hidden, h)
            gradients[f"{stream}.0.bias"] += d_hidden
            d_h += w[f"{stream}.0.weight"].T @ d_hidden
        d_x = d_h * scale * (h > 0)
        gradients["features.0.weight"] += np.outer(d_x, x)
        gradients["features.0.bias"] += d_x
    return gradients


def weights_of(network):
    return {name: p.detach().numpy().copy() for name, p in network.named_parameters()}


def dueling_errors(q_network, target_network, arrays):
    q = dueling_values(weights_of(q_network), arrays["obs"])
    target_next = dueling_values(weights_of(target_network), arrays["next_obs"])
    y = [arrays["rewards"][i] + arrays["discounts"][i] * max(target_next[i]) for i in range(BATCH)]
    return np.array([y[i] - q[i][a] for i, a in enumerate(arrays["actions"])])


def test_dueling_values_are_v_plus_a_minus_the_mean_over_actions():
    torch.manual_seed(0)
    script = load(DUELING)
    q_network, _ = networks(script, atari=False)
    obs = np.random.default_rng(0).normal(size=(BATCH, 6))
    q_values = q_network(torch.from_numpy(obs)).detach().numpy()
    np.testing.assert_allclose(q_values, dueling_values(weights_of(q_network), obs), rtol=1e-9)
    alone = q_network(torch.from_numpy(obs[:1])).detach().numpy()
    np.testing.assert_allclose(alone, q_values[:1], rtol=1e-9)  # not a mean over the batch
    with torch.no_grad():
        q_network.advantage[-1].bias += 7.0  # cannot move from V to A
    np.testing.assert_allclose(q_network(torch.from_numpy(obs)).detach(), q_values, atol=1e-9)


@pytest.mark.parametrize("picture", [False, True])
def test_the_gradient_into_the_shared_layers_is_scaled_once(picture):
    """By 1/sqrt(2), against an unscaled copy; the streams' own gradients and Q stay as they are."""
    torch.manual_seed(1)
    script = load(DUELING)
    space = np.zeros((10, 10, 4), np.uint8) if picture else np.zeros(6)
    network = script.QNetwork(space, N_ACTIONS)
    obs = torch.rand(BATCH, *space.shape)
    obs = (obs < 0.2).to(torch.uint8) if picture else obs
    q_values = network(obs)
    features = network.features(obs)
    advantages = network.advantage(features)
    plain = network.value(features) + advantages - advantages.mean(1, keepdim=True)
    assert torch.equal(q_values, plain), "the forward pass changed"
    names = [name for name, _ in network.named_parameters()]
    by_pass = []
    for output in (q_values, plain):
        loss = (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum()
        by_pass.append(torch.autograd.grad(loss, [*network.parameters()]))
    for name, mine, unscaled in zip(names, *by_pass):
        scale = 0.5**0.5 if name.startswith("features") else 1.0
        assert unscaled.abs().max() > 1e-3
        torch.testing.assert_close(mine, scale * unscaled, msg=lambda m, n=name: f"{n}: {m}")


def test_the_unscaled_gradient_equals_finite_differences():
    """The oracle above, which the test below uses, is right."""
    torch.manual_seed(2)
    network, _ = networks(load(DUELING), atari=False)
    rng = np.random.default_rng(2)
    w, obs, d_q = weights_of(network), rng.normal(size=(3, 6)), rng.normal(size=(3, N_ACTIONS))
    gradients = dueling_gradients(w, obs, d_q, scale=1.0)
    for name, i in ((name, i) for name in w for i in (0, -1)):
        x, step, values = w[name].reshape(-1), 1e-6, []
        for sign in (1, -1):
            x[i] += sign * step
            values.append((dueling_values(w, obs) * d_q).sum())
            x[i] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        assert gradients[name].reshape(-1)[i] == pytest.approx(difference, rel=1e-4, abs=1e-7)


def test_one_dueling_update_equals_the_oracle():
    """The loss, its gradient with its norm clipped to 10, and Adam."""
    torch.manual_seed(3)
    script = load(DUELING)
    q_network, target_network = networks(script, atari=False)
    arrays, batch = random_batch(script, np.random.default_rng(3), atari=False)
    arrays["rewards"] *= 30
    batch = in_float64(batch)._replace(rewards=torch.from_numpy(arrays["rewards"]))
    errors, before = dueling_errors(q_network, target_network, arrays), weights_of(q_network)
    d_q = np.zeros((BATCH, N_ACTIONS))
    d_q[np.arange(BATCH), arrays["actions"]] = -2 * errors / BATCH
    expected = dueling_gradients(before, arrays["obs"], d_q, scale=1 / np.sqrt(2))
    norm = np.sqrt(sum((g**2).sum() for g in expected.values()))
    assert norm > 10

    args = script.RunArgs()
    assert args.max_grad_norm == 10.0
    optimizer = script.make_optimizer(q_network, args)
    loss, td_error, _ = script.td_loss(q_network, target_network, batch, args)
    loss.backward()
    np.testing.assert_allclose(td_error, errors, rtol=1e-9)
    assert loss.item() == pytest.approx((errors**2).mean())
    for name, p in q_network.named_parameters():
        np.testing.assert_allclose(p.grad, expected[name], rtol=1e-6, atol=1e-10)
    optimizer.step()
    clipped = [10 / norm * g for g in expected.values()]
    after = oracle.adam_step([*before.values()], clipped, lr=args.learning_rate)
    for p, g, w in zip(q_network.parameters(), clipped, after):
        np.testing.assert_allclose(p.grad, g, rtol=1e-5, atol=1e-10)
        np.testing.assert_allclose(p.detach(), w, rtol=1e-6, atol=1e-8)


# ---- n-step returns ------------------------------------------------------------------------------


def n_step_transitions(episode, n, gamma):
    """All transitions of an episode: a list of (s, a, r, s', terminated, truncated)."""
    transitions, length = [], len(episode)
    over = episode[-1][4] or episode[-1][5]
    for t in range(length):
        k = min(n, length - t)
        if k < n and not over:
            break  # it still waits for its n-th reward
        n_step_return = 0.0
        for j in range(k):
            n_step_return += gamma**j * episode[t + j][2]
        discount = 0.0 if episode[t + k - 1][4] else gamma**k
        last_obs = episode[t + k - 1][3]
        transitions.append((episode[t][0], episode[t][1], n_step_return, last_obs, discount))
    return transitions


STEP = st.tuples(st.sampled_from("....TX"), st.integers(0, 3), st.integers(-3, 3))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), n=st.integers(1, 6), num_envs=st.integers(1, 3))
def test_n_step_transitions_equal_plain_loops(data, n, num_envs):
    """Streams of episodes that terminate (T), are truncated (X) or are not over yet."""
    script, gamma = load(NSTEP), 0.9
    stream = data.draw(st.lists(st.tuples(*[STEP] * num_envs), min_size=1, max_size=25))
    n_step, episodes = script.NStep(num_envs, n, gamma), [[[]] for _ in range(num_envs)]
    found = [[] for _ in range(num_envs)]
    obs = np.arange(num_envs)[:, None] * 1000.0
    for row in stream:
        next_obs = obs + 1  # of an environment: 0, 1, 2, ...; a reset skips 20 numbers
        ends, actions, rewards = zip(*row)
        terminations, truncations = (np.array([end == x for end in ends]) for x in "TX")
        actions, rewards = np.array(actions), np.array(rewards, np.float32)
        for done in n_step.add(obs, actions, rewards, next_obs, terminations, truncations):
            assert {len(column) for column in done} == {1}
            found[int(done[0][0][0]) // 1000].append([column[0] for column in done])
        for i, end in enumerate(ends):
            r = float(rewards[i])
            step = (obs[i], actions[i], r, next_obs[i], end == "T", end == "X")
            episodes[i][-1].append(step)
            if end != ".":
                episodes[i].append([])
        obs = next_obs + np.where(terminations | truncations, 20, 0)[:, None]
        if data.draw(st.booleans()):  # as when a run is stopped and resumed
            state, n_step = n_step.state_dict(), script.NStep(num_envs, n, gamma)
            n_step.load_state_dict(state)
    for i in range(num_envs):
        expected = [t for e in episodes[i] if e for t in n_step_transitions(e, n, gamma)]
        assert len(found[i]) == len(expected)
        for mine, right in zip(found[i], expected):
            for x, y in zip(mine, right):
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9)


class Corridor(gym.Env):
    """Observes (episode, step, step of the termination). The time limit may come before it."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def reset(self, seed=None, options=None):
        self.state = np.array([seed % 2**24, 0, 1 + seed % 13], np.float32)
        return self.state.copy(), {}

    def step(self, action):
        self.state[1] += 1
        reward = float(self.state[1]) + 0.25 * int(action)
        return self.state.copy(), reward, bool(self.state[1] == self.state[2]), False, {}


LIMIT = 8


@pytest.mark.parametrize("n", [1, 3, 5])
def test_the_stored_transitions_of_a_run_are_n_step_returns(n, in_tmp, monkeypatch):
    """Of every episode that is over, every step starts one transition, and only one. After a
    truncation s' is the last observation of that episode, not the first of the next one."""
    if "Corridor-v0" not in gym.registry:
        gym.register("Corridor-v0", Corridor, max_episode_steps=LIMIT)
    options = {"env_id": "Corridor-v0", "num_envs": 3, "total_timesteps": 900, "n_step": n}
    options |= {"learning_starts": 400, "buffer_size": 2000, "batch_size": 32, "eval_episodes": 0}
    options |= {"checkpoint_replay": True, "gamma": 0.9}
    main_in_process(load(NSTEP), options, monkeypatch)
    _, size, columns = saved(in_tmp)["replay"]
    episodes = {}
    for row in zip(*(x.numpy() for x in columns)):
        episodes.setdefault(int(row[0][0]), []).append(row)
    ends = set()
    for e, rows in [*episodes.items()]:
        termination = int(rows[0][0][2])
        length = min(termination, LIMIT)
        if len(rows) < length:
            continue  # not over
        rows.sort(key=lambda row: row[0][1])
        assert [int(row[0][1]) for row in rows] == [*range(length)]
        rewards = [t + 1 + 0.25 * rows[t][1] for t in range(length)]
        for t, (_, _, n_step_return, next_obs, discount) in enumerate(rows):
            k = min(n, length - t)
            expected = sum(0.9**j * rewards[t + j] for j in range(k))
            assert n_step_return == pytest.approx(expected, rel=1e-6)
            assert next_obs.tolist() == [e, t + k, termination]
            assert discount == pytest.approx(0.0 if t + k == termination else 0.9**k)
        ends.add(termination > LIMIT)
    assert ends == {False, True} and size > 800


def test_one_step_returns_give_the_run_of_dqn(in_tmp, monkeypatch):
    """Its transitions, in its order, so its batches, and its weights, bit for bit."""
    ends = []
    for name, changes in (("dqn_cartpole", {}), (NSTEP, {"n_step": 1}), (NSTEP, {"n_step": 2})):
        options = small(name) | {"num_envs": 4, "total_timesteps": 1600, "eval_episodes": 0}
        options |= {"checkpoint_replay": True, "checkpoint_frequency": 0, "buffer_size": 900}
        script = load(name)
        monkeypatch.setattr(script, "save_checkpoint", lambda _, state: ends.append(state) or True)
        main_in_process(script, options | changes, monkeypatch)
    dqn, one, two = ends
    for key in ("q_network", "replay"):
        assert same(dqn[key], one[key]) and not same(dqn[key], two[key]), key


def test_n_step_cannot_change_with_a_saved_replay(in_tmp, monkeypatch):
    options = small(NSTEP) | {"total_timesteps": 600, "eval_episodes": 0, "checkpoint_replay": True}
    main_in_process(load(NSTEP), options, monkeypatch)
    changes = {"resume": checkpoint_of(in_tmp), "n_step": 4}
    assert "--n-step cannot change" in refused(NSTEP, changes, monkeypatch)
    assert "--n-step must be positive" in refused(NSTEP, {"n_step": 0}, monkeypatch)


# ---- prioritized replay --------------------------------------------------------------------------


@pytest.fixture(params=["numpy", "cpp"])
def tree_of(request):
    """tree_of(capacity, alpha): the tree in NumPy, or fastreplay's."""
    return {"numpy": load(PER).SumTree, "cpp": cpp_tree}[request.param]


def cpp_tree(capacity, alpha):
    fastreplay = pytest.importorskip("fastreplay")
    if not fastreplay.backends():
        pytest.skip("fastreplay is not compiled")
    return fastreplay.SumTree(capacity, alpha)


def replay_with(tree_of, priorities, alpha=1.0, capacity=None):
    """A replay whose row i has reward i and priority priorities[i]."""
    n = len(priorities)
    capacity = capacity or n
    tree = tree_of(capacity, alpha)
    replay = load(PER).PrioritizedReplay(capacity, SPACE, CPU, tree)
    obs = np.zeros((n, 2), np.float32)
    replay.add(obs, np.zeros(n, np.int64), np.arange(n), obs, np.ones(n))
    tree.set(np.arange(n), np.asarray(priorities, np.float64))
    return replay


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 8, 9, 33])
def test_every_target_finds_its_row(tree_of, capacity):
    """Row i for as many targets as its leaf has units; none for an empty row."""
    rng = np.random.default_rng(capacity)
    rows = np.sort(rng.choice(capacity, (capacity + 1) // 2, replace=False))
    units = np.zeros(capacity, np.int64)
    units[rows] = rng.integers(1, 5, len(rows))
    tree = tree_of(capacity, 1.0)
    tree.set(rows, units[rows] / 2**20)
    assert tree.total() == units.sum()
    expected = [i for i in range(capacity) for _ in range(units[i])]
    assert np.asarray(tree.find(np.arange(units.sum()))).tolist() == expected
    np.testing.assert_array_equal(np.asarray(tree.get(np.arange(capacity))) * 2**20, units)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 40), alpha=st.sampled_from([0.0, 0.6, 1.0]))
def test_the_tree_equals_a_list_and_fastreplays(data, capacity, alpha):
    """After any updates, with duplicate rows: leaves, their sum and the rows of targets."""
    tree, other = load(PER).SumTree(capacity, alpha), cpp_tree(capacity, alpha)
    leaves = [0] * capacity
    for _ in range(data.draw(st.integers(1, 4))):
        rows = data.draw(st.lists(st.integers(0, capacity - 1), min_size=1, max_size=9))
        p = [data.draw(st.floats(1e-6, 1e3)) for _ in rows]
        for i, x in zip(rows, p):  # the last one wins
            leaves[i] = max(1, round(x**alpha * 2**20))
        for x in (tree, other):
            x.set(np.array(rows), np.array(p))
    np.testing.assert_allclose(tree.get(np.arange(capacity)) * 2**20, leaves, atol=1)
    assert tree.total() == sum((tree.get(np.arange(capacity)) * 2**20).astype(int).tolist())
    np.testing.assert_array_equal(tree.state_dict()["leaves"], other.state_dict()["leaves"])
    targets = np.array([data.draw(st.integers(0, tree.total() - 1)) for _ in range(20)])
    np.testing.assert_array_equal(tree.find(targets), other.find(targets))
    for x in (other, load(PER).SumTree(capacity, alpha)):  # either state restores either tree
        x.load_state_dict(other.state_dict() | tree.state_dict())
        np.testing.assert_array_equal(x.find(targets), tree.find(targets))
        assert x.total() == tree.total()


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_rows_are_drawn_with_probability_p_to_the_alpha(tree_of, alpha):
    torch.manual_seed(0)
    p = np.random.default_rng(0).exponential(size=30) * 10
    replay, counts, batches = replay_with(tree_of, p, alpha, capacity=50), np.zeros(30), 3000
    for _ in range(batches):
        rows = replay.sample(8, 0.4).indices.numpy()
        np.add.at(counts, rows, 1)
    expected = batches * 8 * np.array([x**alpha for x in p]) / sum(x**alpha for x in p)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 29 + 4 * np.sqrt(2 * 29)  # mean and standard deviation for 29 degrees
    wrong = batches * 8 * p ** (alpha + 0.2) / (p ** (alpha + 0.2)).sum()
    assert ((counts - wrong) ** 2 / wrong).sum() > 500, "the test tells exponents apart"


def test_draws_are_stratified(tree_of):
    """Draw j comes from the j-th of B equal parts of the total: every batch has each of B rows."""
    torch.manual_seed(0)
    replay = replay_with(tree_of, [0.25] * 4 + [1.0])
    for _ in range(50):
        rows = replay.sample(8, 1.0).indices.tolist()
        assert rows == sorted(rows) and rows[4:] == [4] * 4 and set(rows) == set(range(5))


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_no_draw_ends_in_an_empty_row(tree_of, u, monkeypatch):
    """Not even the largest random number, where a product rounds up to the total."""
    monkeypatch.setattr(torch, "rand", lambda n, dtype: torch.full((n,), u, dtype=dtype))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        p = rng.exponential(size=rng.integers(1, 20)) * 10.0 ** rng.integers(-8, 8)
        replay = replay_with(tree_of, p, 0.6, capacity=64)
        for batch_size in (1, 3, 32):
            batch = replay.sample(batch_size, 0.4)
            rows = batch.indices.numpy()
            assert 0 <= rows.min() and rows.max() < len(p)
            assert np.isfinite(batch.is_weights.numpy()).all()
            assert rows[-1] == (len(p) - 1 if u else rows[-1])


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_importance_weights_equal_plain_loops(tree_of, beta):
    """w_i = (N P(i))^-beta / max_j w_j over the batch, with nothing added to them."""
    torch.manual_seed(1)
    p, alpha = np.random.default_rng(1).exponential(size=20) + 0.1, 0.6
    replay = replay_with(tree_of, p, alpha, capacity=32)  # N counts the 20 rows that are there
    batch = replay.sample(6, beta)
    total = sum(x**alpha for x in p)
    w = [(20 * p[i] ** alpha / total) ** -beta for i in batch.indices.tolist()]
    np.testing.assert_allclose(batch.is_weights, [x / max(w) for x in w], rtol=1e-5)
    assert batch.is_weights.max() == 1 and batch.is_weights.dtype == torch.float32
    assert batch.rewards.tolist() == batch.indices.tolist(), "the columns are of other rows"
    rarest = (20 * p.min() ** alpha / total) ** -beta
    assert beta == 0 or max(w) < rarest, "the batch does not tell its maximum from the replay's"


def test_new_rows_get_the_largest_priority_ever(tree_of):
    """Also once no row has it any more, and after rows are overwritten."""
    replay = load(PER).PrioritizedReplay(6, SPACE, CPU, tree_of(6, 1.0))

    def add(n):
        obs = np.zeros((n, 2), np.float32)
        replay.add(obs, np.zeros(n, np.int64), np.zeros(n), obs, np.zeros(n))

    def priorities():
        return np.asarray(replay.tree.get(np.arange(6))).tolist()

    def update(rows, errors):
        replay.update_priorities(torch.tensor(rows), torch.tensor(errors))

    add(2)
    assert priorities() == [1, 1, 0, 0, 0, 0]  # before any TD error: 1
    update([0, 1], [-5.0, 0.25])
    add(2)
    np.testing.assert_allclose(priorities(), [5, 0.25, 5, 5, 0, 0], atol=1e-5)
    update([0, 2, 3], [0.5, 0.5, 0.0])  # no row has priority 5 now
    assert priorities()[3] > 0, "a row of TD error 0 can still be drawn"
    add(2)
    np.testing.assert_allclose(priorities(), [0.5, 0.25, 0.5, 0, 5, 5], atol=1e-5)
    add(2)  # wraps around: rows 0 and 1 are new
    np.testing.assert_allclose(priorities(), [5, 5, 0.5, 0, 5, 5], atol=1e-5)
    update([1, 1, 1], [9.0, 2.0, 0.125])  # drawn three times in a batch: the last one wins
    np.testing.assert_allclose(priorities(), [5, 0.125, 0.5, 0, 5, 5], atol=1e-5)
    assert replay.max_priority == pytest.approx(9)
    assert replay.tree.total() == sum(round(p * 2**20) for p in priorities())


def test_a_td_error_that_is_not_finite_does_not_spoil_the_tree(tree_of):
    """Run.log reports it in one line, which needs the run to go on till then."""
    replay = replay_with(tree_of, [1.0, 1.0, 1.0])
    errors = torch.tensor([np.nan, np.inf, 2.0])
    replay.update_priorities(torch.arange(3), errors)
    assert np.isfinite(replay.max_priority) and replay.tree.total() == pytest.approx(
        2 * 2**20, 1e-3
    )
    assert replay.sample(4, 0.4).indices.tolist() == [2] * 4


def prioritized_batch(seed):
    script = load(PER)
    arrays, batch = random_batch(load("dqn_cartpole"), np.random.default_rng(seed), atari=False)
    arrays["is_weights"] = np.random.default_rng(seed).uniform(0.1, 1, BATCH)
    fields = in_float64(batch)._asdict()
    weights = torch.from_numpy(arrays["is_weights"])
    return arrays, script.Batch(**fields, indices=torch.arange(BATCH), is_weights=weights)


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_one_weighted_update_equals_the_oracle(loss):
    """The weights multiply the losses; the TD error that sets the priority is not weighted."""
    torch.manual_seed(4)
    script = load(PER)
    q_network, target_network = networks(script, atari=False)
    arrays, batch = prioritized_batch(4)
    errors = oracle.td_errors(False, q_network.state_dict(), target_network.state_dict(), arrays)
    losses = [oracle.loss_of(errors[i : i + 1], loss) for i in range(BATCH)]
    expected = sum(w * x for w, x in zip(arrays["is_weights"], losses)) / BATCH
    slope = np.clip(-errors, -1, 1) if loss == "huber" else -2 * errors
    d_q = np.zeros((BATCH, N_ACTIONS))
    d_q[np.arange(BATCH), arrays["actions"]] = arrays["is_weights"] * slope / BATCH
    before = [p.detach().numpy().copy() for p in q_network.parameters()]
    gradients = oracle.perceptron_gradients(before, arrays["obs"], d_q)

    args = script.Args(loss=loss)
    optimizer = script.make_optimizer(q_network, args)
    value, td_error, q_taken = script.td_loss(q_network, target_network, batch, args)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(td_error, errors, rtol=1e-9)
    assert not td_error.requires_grad and not q_taken.requires_grad
    for p, g in zip(q_network.parameters(), gradients):
        np.testing.assert_allclose(p.grad, g, rtol=1e-7, atol=1e-10)
    optimizer.step()
    after = oracle.adam_step(before, gradients, lr=args.learning_rate)
    for p, w in zip(q_network.parameters(), after):
        np.testing.assert_allclose(p.detach(), w, rtol=1e-7, atol=1e-8)


def test_alpha_0_with_beta_0_gives_dqns_update(tree_of):
    """Every row as likely as any other, every weight 1, and then DQN's loss and gradients."""
    torch.manual_seed(5)
    script, dqn = load(PER), load("dqn_cartpole")
    p = np.random.default_rng(5).exponential(size=16)
    replay = replay_with(tree_of, p, alpha=0.0)
    drawn = replay.sample(16, 0.0)
    assert drawn.indices.tolist() == [*range(16)]  # stratified: each row has a part of its own
    assert drawn.is_weights.tolist() == [1.0] * 16
    q_network, target_network = networks(script, atari=False)
    _, batch = prioritized_batch(5)
    batch, updates = batch._replace(is_weights=torch.ones(BATCH)), []
    for module in (script, dqn):
        fields = (getattr(batch, field) for field in module.Batch._fields)
        q_network.zero_grad()
        loss, td_error, _ = module.td_loss(
            q_network, target_network, module.Batch(*fields), module.Args()
        )
        loss.backward()
        updates.append([loss.detach(), td_error, *(p.grad.clone() for p in q_network.parameters())])
    for mine, theirs in zip(*updates):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


PER_RUN = {"total_timesteps": 800, "num_envs": 2, "eval_episodes": 0, "log_frequency": 100}
PER_RUN |= {"learning_starts": 200, "buffer_size": 500, "train_frequency": 8, "batch_size": 32}


def test_beta_is_annealed_and_priorities_are_the_td_errors_of_the_batch(in_tmp, monkeypatch):
    script, betas, checked = load(PER), [], []

    class Recorded(script.PrioritizedReplay):
        def sample(self, batch_size, beta):
            betas.append(beta)
            self.batch = super().sample(batch_size, beta)
            return self.batch

        def update_priorities(self, indices, td_error):
            super().update_priorities(indices, td_error)
            assert indices is self.batch.indices and td_error.shape == (32,)
            last = dict(zip(indices.tolist(), td_error.tolist()))
            leaves = self.tree.get(np.array([*last]))
            expected = [(abs(x) + 1e-6) ** 0.6 for x in last.values()]
            np.testing.assert_allclose(leaves, expected, atol=1e-6)
            checked.append(len(last) < 32)

    monkeypatch.setattr(script, "PrioritizedReplay", Recorded)
    main_in_process(script, PER_RUN | {"per_beta": 0.3}, monkeypatch)
    steps = [step for step in range(0, 800, 2) if step + 2 >= 200 and (step + 2) % 8 == 0]
    assert betas == pytest.approx([0.3 + 0.7 * step / 800 for step in steps])
    assert len(checked) == len(betas) and any(checked), "no row was drawn twice"
    logged = scalars(next(in_tmp.glob("runs/*")))["charts/per_beta"]
    assert [x.value for x in logged][-1] == pytest.approx(0.3 + 0.7 * 798 / 800, rel=1e-5)


@pytest.mark.parametrize("tree", ["numpy", "cpp"])
def test_a_resumed_prioritized_run_equals_one_never_stopped(tree, in_tmp, monkeypatch):
    cpp_tree(1, 1.0) if tree == "cpp" else None
    kept, script = [], load(PER)
    load_state = script.Run.load

    def load_and_keep(run, state):
        load_state(run, state)
        if state:
            kept.append((run.replay.tree.state_dict()["leaves"].clone(), run.replay.max_priority))
            assert same((*state["replay"][3:],), kept[-1]) and kept[-1][1] > 1

    monkeypatch.setattr(script.Run, "load", load_and_keep)
    changes = {"num_envs": 2, "sum_tree": tree, "total_timesteps": 1600}
    changes |= {"checkpoint_frequency": 800, "eval_episodes": 0, "buffer_size": 500}
    test_run.test_resumed_run_ends_with_the_same_weights(PER, changes, in_tmp, monkeypatch)
    assert len(kept) == 1 and len(kept[0][0]) == 500 and kept[0][0].min() != 0


def test_both_trees_give_the_same_run_and_auto_says_which_it_takes(in_tmp, monkeypatch):
    cpp_tree(1, 1.0)
    script, ends = load(PER), []
    monkeypatch.setattr(script, "save_checkpoint", lambda _, state: ends.append(state) or True)
    for tree in ("numpy", "cpp", "auto"):
        changes = {"sum_tree": tree, "checkpoint_replay": True}
        main_in_process(script, PER_RUN | changes, monkeypatch)
    assert [end["args"]["sum_tree"] for end in ends] == ["numpy", "cpp", "cpp"]
    assert same(ends[0]["q_network"], ends[1]["q_network"])
    assert same(ends[0]["replay"], ends[1]["replay"])


def test_without_fastreplay_the_tree_is_numpys(in_tmp, monkeypatch):
    """A checkpoint of a run with the other tree can be evaluated, and resumed with this one."""
    script = load(PER)
    changes = {"total_timesteps": 400, "checkpoint_replay": True}
    main_in_process(script, PER_RUN | changes, monkeypatch)
    path = checkpoint_of(in_tmp)
    state = script.load_checkpoint(path)
    state["args"]["sum_tree"] = "cpp"
    other = in_tmp / "other" / "checkpoint.pt"
    other.parent.mkdir()
    assert script.save_checkpoint(other, state)
    monkeypatch.setattr(script, "fastreplay", None)
    line = refused(PER, {"sum_tree": "cpp"}, monkeypatch)
    assert line.startswith("error: --sum-tree must be numpy, or built with `pip install .`")
    assert "--sum-tree" in refused(PER, {"resume": other}, monkeypatch)
    main_in_process(script, {"evaluate": other, "eval_episodes": 2}, monkeypatch)
    more = {"resume": other, "sum_tree": "numpy", "total_timesteps": 600}
    main_in_process(script, more, monkeypatch)
    state = script.load_checkpoint(other)
    assert state["global_step"] == 600 and state["args"]["sum_tree"] == "numpy"
    assert len(list(in_tmp.glob("runs/*"))) == 1, "a refused run wrote a log"


def test_bad_arguments_of_prioritized_replay_are_one_line(in_tmp, monkeypatch):
    assert "--per-alpha must be between 0 and 1" in refused(PER, {"per_alpha": 1.5}, monkeypatch)
    assert "--per-beta must be between 0 and 1" in refused(PER, {"per_beta": -0.1}, monkeypatch)
    monkeypatch.setattr(load(PER), "free_memory", lambda: 2**62)
    assert "at most 134217728" in refused(PER, {"buffer_size": 2**27 + 1}, monkeypatch)
    options = PER_RUN | {"total_timesteps": 400, "checkpoint_replay": True}
    main_in_process(load(PER), options, monkeypatch)
    changes = {"resume": checkpoint_of(in_tmp), "per_alpha": 0.5}
    assert "--per-alpha cannot change" in refused(PER, changes, monkeypatch)


@pytest.mark.parametrize("name", [DUELING, PER, NSTEP])
def test_they_play_minatar(name, in_tmp, monkeypatch):
    pytest.importorskip("minatar")
    options = {"env_id": "MinAtar/Breakout-v1", "total_timesteps": 250, "eval_episodes": 0}
    options |= {"learning_starts": 100, "buffer_size": 300, "num_envs": 2}
    main_in_process(load(name), options | {"checkpoint_replay": True}, monkeypatch)
    obs = saved(in_tmp)["replay"][2][0]
    assert obs.dtype == torch.uint8 and obs.shape[1:3] == (10, 10) and obs.max() == 1
