"""Beyond The Rainbow: its loss, gradient and update against plain loops in float64, its network."""

import copy
import math

import numpy as np
import oracle
import pytest
import torch
from conftest import load
from test_atari_family import dense, noisy, relu, weights_of
from test_munchausen import log_policy
from test_quantiles import embedding, loss_of_a_row
from test_run import main_in_process, small

SCRIPT = load("btr_atari")
N_ACTIONS, SIZE = 4, (52, 44)  # the pool takes pictures of any size: small ones are fast
N_TAUS, N_TARGET, K, GAMMA = 3, 5, 6, 0.9
OPTIONS = {"width": 1, "n_taus": N_TAUS, "n_target_taus": N_TARGET, "n_act_taus": K}
OPTIONS |= {"n_cosines": 7, "gamma": GAMMA, "entropy_tau": 0.3, "munchausen_alpha": 0.7, "l0": -0.5}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(**options):
    return SCRIPT.QNetwork(N_ACTIONS, SCRIPT.Args(**OPTIONS | options))


def pictures(n=2, size=SIZE):
    return torch.randint(256, (n, 4, *size), dtype=torch.uint8)


# ---- the network in plain loops ------------------------------------------------------------------


def convolution(x, weight, bias):
    """3 x 3 with stride 1, and a border of zeros: the picture keeps its size."""
    return oracle.conv2d(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), weight, bias, 1)


def pooled(x, rows, columns):
    """The maximum over each pair of these ranges, [(first, end)]."""
    out = np.zeros((*x.shape[:2], len(rows), len(columns)))
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            out[:, :, i, j] = x[:, :, top:bottom, left:right].max(axis=(2, 3))
    return out


def halved(x):
    """The maximum over 3 x 3 pixels around every second one."""
    ranges = [[(max(i - 1, 0), i + 2) for i in range(0, n, 2)] for n in x.shape[2:]]
    return pooled(x, *ranges)


def six_by_six(x):
    """Part i of n pixels: from i n / 6, rounded down, to (i + 1) n / 6, rounded up."""
    ranges = [[(i * n // 6, -(-(i + 1) * n // 6)) for i in range(6)] for n in x.shape[2:]]
    return pooled(x, *ranges)


class Pass:
    """A pass through a network: its weights, the vectors u and v of sigma, its noise, its tau."""

    def __init__(self, vectors, draws, taus):
        self.vectors, self.draws, self.taus = vectors, draws, taus

    def weight(self, w, name):
        if f"{name}.weight" in w:
            return w[f"{name}.weight"]
        weight = w[f"{name}.parametrizations.weight.original"]
        u, v = self.vectors[name]
        sigma = u @ weight.reshape(len(u), -1) @ v
        return weight / sigma

    def residual(self, w, name, x):
        y = x
        for part in (f"{name}.first", f"{name}.second"):
            y = convolution(relu(y), self.weight(w, part), w[f"{part}.bias"])
        return x + y

    def features(self, w, obs):
        x = obs / 255
        for block in (0, 4, 8):
            x = halved(convolution(x, w[f"features.{block}.weight"], w[f"features.{block}.bias"]))
            x = self.residual(w, f"features.{block + 2}", x)
            x = self.residual(w, f"features.{block + 3}", x)
        x = six_by_six(relu(x))
        return x.transpose(0, 2, 3, 1).reshape(len(x), -1)

    def linear(self, w, name, x):
        if f"{name}.sigma_weight" not in w:
            return dense(w, name, x)
        return noisy(w, name, x, *self.draws[name])

    def quantiles(self, w, obs):
        """(B, A, N)"""
        found = []
        for row, row_taus in zip(self.features(w, obs), self.taus):
            phi = [embedding(w["embedding.weight"], w["embedding.bias"], tau) for tau in row_taus]
            hidden = relu(self.linear(w, "hidden.0", row * np.array(phi)))  # (N, 512 or 1024)
            if "head.weight" in w:
                found.append(self.linear(w, "head", hidden).T)
                continue
            values = self.linear(w, "value", hidden[:, :512])
            advantages = self.linear(w, "advantage", hidden[:, 512:])
            rows = zip(values, advantages)
            found.append([[v + a - sum(row) / len(row) for a in row] for (v,), row in rows])
            found[-1] = np.array(found[-1]).T
        return np.array(found)


def vectors_of(network):
    """{layer: (u, v)}, those of its sigma"""
    buffers = {name: x.numpy().copy() for name, x in network.named_buffers()}
    end = ".parametrizations.weight.0._u"
    layers = [name.removesuffix(end) for name in buffers if name.endswith(end)]
    return {x: (buffers[x + end], buffers[x + end[:-1] + "v"]) for x in layers}


def iterated(vectors, w):
    """A step of the power iteration."""
    found = {}
    for name, (_, v) in vectors.items():
        matrix = w[f"{name}.parametrizations.weight.original"]
        matrix = matrix.reshape(len(matrix), -1)
        u = matrix @ v / np.linalg.norm(matrix @ v)
        found[name] = u, matrix.T @ u / np.linalg.norm(matrix.T @ u)
    return found


# ---- loss, gradient, update ----------------------------------------------------------------------

# One game of 16 rows: an episode that is cut, one that terminates, one that goes on. Row 4 and row
# 9 are final observations.
OPENS, FINAL, TERMINATED = (0, 5, 10), (4, 9), 8
STARTS = [0, 2, 3, 5, 6, 7, 8, 11]


def batch_of_a_replay():
    """What the replay gives for STARTS -> a batch in float64; the same, by definition, as arrays"""
    rng = np.random.default_rng(1)
    frames = rng.integers(256, size=(16, *SIZE), dtype=np.uint8)
    actions, rewards = rng.integers(N_ACTIONS, size=16), rng.normal(size=16) * 2
    replay = SCRIPT.FrameReplay(16, SIZE, n_step=3, gamma=GAMMA)
    for t in range(16):
        flags = np.array([t == TERMINATED]), np.array([t in OPENS])
        replay.add(frames[t : t + 1], actions[t : t + 1], rewards[t : t + 1], *flags)

    def stack(t):
        first = max(x for x in OPENS if x <= t)
        return [frames[i] if i >= first else np.zeros(SIZE) for i in range(t - 3, t + 1)]

    rows = []
    for t in STARTS:
        total, k, discount = 0.0, 0, 1.0
        while k < 3 and t + k not in FINAL:
            total += GAMMA**k * rewards[t + k]
            discount = 0.0 if t + k == TERMINATED else GAMMA ** (k + 1)
            k += 1
        rows.append((stack(t), actions[t], total, stack(t + k), discount))
    names = ("obs", "actions", "rewards", "next_obs", "discounts")
    arrays = {name: np.array(x) for name, x in zip(names, zip(*rows))}
    batch = replay.gather(np.array(STARTS))
    for name in names:
        np.testing.assert_allclose(getattr(batch, name).numpy(), arrays[name], rtol=1e-5)
    assert arrays["discounts"].tolist().count(0) == 3  # 6, 7 and 8; the cut ones bootstrap
    assert arrays["discounts"][1:3] == pytest.approx([GAMMA**2, GAMMA])
    arrays["is_weights"] = rng.uniform(0.1, 1, len(STARTS))
    exact = {name: torch.from_numpy(x) for name, x in arrays.items()}
    exact |= {"obs": exact["obs"] / 255, "next_obs": exact["next_obs"] / 255}
    return batch._replace(**exact), arrays


def recorded_passes(networks, monkeypatch):
    """-> a list that will hold the Pass of each call of their `quantiles`, in order"""
    passes = []
    for net in networks:
        quantiles = net.quantiles

        def recorded(obs, taus, net=net, quantiles=quantiles):
            vectors, draws = iterated(vectors_of(net), weights_of(net)), {}
            for name, layer in net.named_modules():
                if isinstance(layer, SCRIPT.NoisyLinear):
                    draws[name] = record_noise(layer, monkeypatch)
            result = quantiles(obs, taus)
            for name, (u, v) in vectors_of(net).items():
                np.testing.assert_allclose(u, vectors[name][0], rtol=1e-9, atol=1e-12)
                np.testing.assert_allclose(v, vectors[name][1], rtol=1e-9, atol=1e-12)
            draws = {name: [e.numpy().copy() for e in drawn] for name, drawn in draws.items()}
            passes.append((net, Pass(vectors, draws, taus.numpy().copy())))
            return result

        monkeypatch.setattr(net, "quantiles", recorded)
    return passes


def record_noise(layer, monkeypatch):
    """-> a list that will hold e of the inputs and of the outputs, of the layer's next call"""
    drawn = []

    def forward(x, layer=layer):
        randn_like = torch.randn_like

        def recorded(like):
            drawn.append(randn_like(like))
            return drawn[-1]

        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", recorded)
            return type(layer).forward(layer, x)

    layer.forward = forward
    return drawn


def losses_of(w, passes, arrays, args):
    """-> loss, priority and Q(s, a) of each row, at the online weights w; the bonuses"""
    (target_net, of_next), *of_policy, (_, online) = passes
    target = weights_of(target_net)
    following = of_next.quantiles(target, arrays["next_obs"])  # (B, A, N')
    policy_q = None
    if args.munchausen:
        policy_q = of_policy[0][1].quantiles(target, arrays["obs"]).mean(axis=2)  # (B, A)
    theta = online.quantiles(w, arrays["obs"])
    losses, priorities, taken, bonuses = [], [], [], []
    for b, a in enumerate(arrays["actions"]):
        q, values = following[b].mean(axis=1), following[b, np.argmax(following[b].mean(axis=1))]
        if args.munchausen:
            tau, log_pi = args.entropy_tau, log_policy(q, args.entropy_tau)
            bonuses.append(min(max(tau * log_policy(policy_q[b], tau)[a], args.l0), 0))
            values = np.zeros(N_TARGET)
            for j in range(N_TARGET):
                for c in range(N_ACTIONS):
                    values[j] += math.exp(log_pi[c]) * (following[b, c, j] - tau * log_pi[c])
        r = arrays["rewards"][b] + (args.munchausen_alpha * bonuses[b] if args.munchausen else 0)
        y = [r + arrays["discounts"][b] * x for x in values]
        losses.append(loss_of_a_row(theta[b, a], y, online.taus[b], args.kappa))
        priorities.append(sum(abs(y_j - x) / N_TARGET for y_j in y for x in theta[b, a]))
        taken.append(np.mean(theta[b, a]))
    return arrays["is_weights"] * losses, np.array(priorities), np.array(taken), np.array(bonuses)


@pytest.mark.parametrize(
    "options",
    [{}, {"munchausen": False}, {"dueling": False, "noisy": False}, {"spectral_norm": False}],
    ids=["all", "no-munchausen", "no-dueling-no-noisy", "no-spectral-norm"],
)
def test_loss_gradient_and_one_update_equal_plain_loops(options, monkeypatch, float64):
    """The gradient along random directions, by differences of the loops' loss; then Adam."""
    torch.manual_seed(0)
    args = SCRIPT.Args(**OPTIONS | options, max_grad_norm=0.5)
    q_network, target_network = (network(**options) for _ in range(2))
    with torch.no_grad():
        for net in (q_network, target_network):
            (net.head if hasattr(net, "head") else net.advantage).weight.mul_(20)
    batch, arrays = batch_of_a_replay()
    before = weights_of(q_network)
    with monkeypatch.context() as patch:
        passes = recorded_passes((q_network, target_network), patch)
        loss, priorities, taken = SCRIPT.td_loss(q_network, target_network, batch, args)
    assert [net for net, _ in passes[:-1]] == [target_network] * len(passes[:-1])
    assert len(passes) == 2 + args.munchausen and passes[-1][0] is q_network
    expected, expected_priorities, expected_taken, bonuses = losses_of(before, passes, arrays, args)
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-9)
    np.testing.assert_allclose(priorities.numpy(), expected_priorities, rtol=1e-8)
    np.testing.assert_allclose(taken.numpy(), expected_taken, rtol=1e-8, atol=1e-12)
    assert not (priorities.requires_grad or taken.requires_grad)
    if args.munchausen:  # the bonuses of theta's policy, or of none, would be others
        online_q = passes[-1][1].quantiles(before, arrays["obs"]).mean(axis=2)
        policies = [log_policy(q, args.entropy_tau) for q in online_q]
        others = [args.entropy_tau * x[a] for x, a in zip(policies, arrays["actions"])]
        assert abs(bonuses - np.clip(others, args.l0, 0)).max() > 0.01
        assert (bonuses == args.l0).any() and (bonuses > args.l0).any()

    optimizer = SCRIPT.make_optimizer(q_network, args)
    loss.backward()
    assert all(p.grad is None for p in target_network.parameters())
    gradient = {n: p.grad.numpy().copy() for n, p in q_network.named_parameters()}
    rng, step = np.random.default_rng(2), 1e-6
    for of_features in (True, False):
        direction = {
            n: rng.normal(size=x.shape) * (n.startswith("features.") == of_features)
            for n, x in before.items()
        }
        length = math.sqrt(sum((x**2).sum() for x in direction.values()))
        ends = []
        for s in (step, -step):
            w = {n: x + s * direction[n] / length for n, x in before.items()}
            ends.append(losses_of(w, passes, arrays, args)[0].mean())
        slope = (ends[0] - ends[1]) / (2 * step)
        found = sum((gradient[n] * direction[n]).sum() for n in gradient) / length
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-9) and abs(slope) > 1e-6

    norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert norm > args.max_grad_norm
    clipped = [g * args.max_grad_norm / norm for g in gradient.values()]
    after = oracle.adam_step(before.values(), clipped, args.learning_rate, eps=args.adam_eps)
    optimizer.step()
    for p, expected in zip(q_network.parameters(), after):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-6, atol=1e-9)


# ---- the network ---------------------------------------------------------------------------------


def test_shapes_and_widths():
    """(B, 4, 84, 84) -> 6 x 6 of 32 width channels -> (B, A); other pictures fit, too."""
    for width in (1, 2):
        net = network(width=width)
        convolutions = [layer for layer in net.features if isinstance(layer, torch.nn.Conv2d)]
        assert [x.out_channels for x in convolutions] == [16 * width, 32 * width, 32 * width]
        for size in ((84, 84), (64, 64), (105, 80), (44, 36)):
            obs = pictures(size=size)
            assert net.features(obs / 255).shape == (2, 32 * width * 36)
            assert net(obs).shape == (2, N_ACTIONS)
            assert net.quantiles(obs, torch.rand(2, 3)).shape == (2, N_ACTIONS, 3)
    assert SCRIPT.Args().width == 2


def residual_layers(net):
    return [layer for x in net.features if isinstance(x, SCRIPT.Residual) for layer in x.children()]


def largest(weight):
    return torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item()


def test_the_largest_singular_value_of_residual_convolutions_is_one():
    """Of the weight that is used, while the weight that is learned grows."""
    torch.manual_seed(0)
    net, layers = network(), []
    for layer in residual_layers(net):
        layers.append((layer, layer.parametrizations.weight.original))
    assert len(layers) == 12
    with torch.no_grad():
        for _, learned in layers:
            learned.mul_(3).add_(torch.randn_like(learned) * 0.1)
    for _ in range(400):  # each pass takes one step of the power iteration
        net.features(pictures(1, (8, 8)) / 255)
    # Within 0.5%: where the two largest are nearly equal, the iteration converges slowly.
    assert [largest(layer.weight) for layer, _ in layers] == pytest.approx([1] * 12, abs=5e-3)
    assert min(largest(learned) for _, learned in layers) > 2
    normalised = {n for n, _ in net.named_parameters() if "parametrizations" in n}
    assert len(normalised) == 12, "only the residual convolutions are normalised"
    assert not any("parametrizations" in n for n, _ in network(spectral_norm=False).named_buffers())


def test_evaluation_draws_nothing_and_changes_nothing():
    torch.manual_seed(0)
    net, obs = network(), pictures(1).repeat(3, 1, 1, 1)
    before = copy.deepcopy(net.state_dict())
    values = torch.stack([net(obs) for _ in range(2)])
    assert len(values.flatten(0, 1).unique(dim=0)) == 6, "tau and noise are drawn anew"
    iterated = [n for n, x in net.state_dict().items() if not torch.equal(x, before[n])]
    assert len(iterated) == 24 and all(n.endswith(("._u", "._v")) for n in iterated)
    net.eval()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    values = torch.stack([net(obs) for _ in range(2)])
    assert torch.equal(values[0], values[1]) and torch.equal(random, torch.get_rng_state())
    torch.testing.assert_close(values[0], values[0, :1].expand(3, -1))
    assert all(torch.equal(x, before[n]) for n, x in net.state_dict().items())


def test_sigma_is_float32_where_convolutions_are_bfloat16(monkeypatch):
    """On a GPU autocast would compute it in bfloat16, and fail."""
    monkeypatch.setattr(SCRIPT.Features, "bfloat16", True)
    net, seen = network(), []

    def check(parametrization, inputs):
        assert inputs[0].dtype == torch.float32
        seen.append(torch.is_autocast_enabled("cpu"))

    for layer in residual_layers(net):
        layer.parametrizations.weight[0].register_forward_pre_hook(check)
    types = []
    net.features[2].register_forward_hook(lambda *call: types.append(call[2].dtype))
    net(pictures(1)).sum().backward()
    assert seen == [False] * 12 and types == [torch.bfloat16]


# ---- the loop ------------------------------------------------------------------------------------

SHORT = {"total_timesteps": 400, "learning_starts": 200, "buffer_size": 400, "batch_size": 2}
SHORT |= {"checkpoint_frequency": 0, "n_taus": 2, "n_target_taus": 2, "n_act_taus": 2}


def end_of_a_run(options, monkeypatch):
    ends = []
    with monkeypatch.context() as patch:
        patch.setattr(SCRIPT, "save_checkpoint", lambda _, state: ends.append(state) or True)
        main_in_process(SCRIPT, small("btr_atari") | SHORT | options, patch)
    return copy.deepcopy(ends[-1])


def test_evaluations_do_not_change_a_run(in_tmp, monkeypatch):
    options = {"eval_episodes": 1, "eval_max_frames": 100}
    ends = [end_of_a_run(options | {"eval_frequency": x}, monkeypatch) for x in (200, 0)]
    first, second = (end["q_network"] for end in ends)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_epsilon_ends_at_half_time_and_the_target_takes_sigma_too(in_tmp, monkeypatch):
    act = SCRIPT.act
    for noisy_layers in (True, False):
        epsilons = []

        def recorded(q_network, obs, epsilon, *more, epsilons=epsilons):
            epsilons.append(epsilon)
            return act(q_network, obs, epsilon, *more)

        with monkeypatch.context() as patch:
            patch.setattr(SCRIPT, "act", recorded)
            options = {"eval_episodes": 0, "target_network_frequency": 400, "noisy": noisy_layers}
            end = end_of_a_run(options, patch)
        assert len(epsilons) == 200 and min(epsilons[:100]) > 0  # steps of two games
        assert (max(epsilons[100:]) == 0) == noisy_layers
        # The last step refreshed the target network, so the two are equal, u and v included.
        q_network, target_network = end["q_network"], end["target_network"]
        assert any(name.endswith("._u") for name in q_network)
        assert all(torch.equal(x, target_network[name]) for name, x in q_network.items())


def test_epsilon_decays_as_in_the_authors_code():
    """Each step takes 1 / 2,000,000 of what is above 0.01, in a run of 50M steps."""
    args = SCRIPT.Args(total_timesteps=50_000_000)
    for step in (0, 200_000, 2_000_000, 20_000_000):
        expected = 0.01 + 0.99 * (1 - 1 / 2_000_000) ** step
        assert SCRIPT.epsilon_at(step, args) == pytest.approx(expected, rel=1e-5)
