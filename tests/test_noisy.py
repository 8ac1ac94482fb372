"""Noisy networks: the noise, its draws, its gradient and one whole update against plain loops."""

import numpy as np
import oracle
import pytest
import torch
from conftest import load
from test_run import checkpoint_of, main_in_process, scalars

BATCH, N_ACTIONS, CPU = 8, 3, torch.device("cpu")
SIGMA_0 = 0.5


def network(n_actions=N_ACTIONS, obs_space=None, **options):
    script = load("noisy_dqn_cartpole")
    obs_space = np.zeros(6, np.float32) if obs_space is None else obs_space
    return script.QNetwork(obs_space, n_actions, script.Args(**options))


def layers_of(q_network):
    return [x for x in q_network.modules() if isinstance(x, load("noisy_dqn_cartpole").NoisyLinear)]


def layer_of(p, q, sigma_0=SIGMA_0):
    return load("noisy_dqn_cartpole").NoisyLinear(p, q, sigma_0).double()


@torch.no_grad()
def noise_of(layer):
    """eps of one call, of the weights (q, p) and of the biases (q,), from the layer's outputs."""
    layer.weight.zero_()
    layer.bias.zero_()
    layer.sigma_weight.fill_(1)
    layer.sigma_bias.fill_(1)
    p = layer.in_features
    x = torch.cat([torch.zeros(1, p), torch.eye(p)]).double()
    outputs = layer(x).numpy()
    return (outputs[1:] - outputs[0]).T, outputs[0]


def test_the_noise_is_factorised():
    """eps_ij = f(e_i) f(e_j) with the biases' f(e_j): p + q random numbers, not p q + q."""
    p, q = 7, 5
    layer = layer_of(p, q)
    torch.manual_seed(0)
    eps_weight, eps_bias = noise_of(layer)
    assert np.linalg.matrix_rank(eps_weight, tol=1e-9) == 1
    f_in = [eps_weight[0, i] / eps_bias[0] for i in range(p)]
    for j in range(q):
        for i in range(p):
            assert eps_weight[j, i] == pytest.approx(f_in[i] * eps_bias[j])
    torch.manual_seed(0)  # the random numbers come from torch's generator, which is saved
    e = torch.randn(p, dtype=torch.float64).tolist(), torch.randn(q, dtype=torch.float64).tolist()
    for found, drawn in ((f_in, e[0]), (eps_bias, e[1])):
        for f, x in zip(found, drawn):
            assert f == pytest.approx(np.sign(x) * np.sqrt(abs(x)))


def test_moments_of_the_noise():
    """E |e| = sqrt(2 / pi): so Var f(e) = sqrt(2 / pi) and Var f(e_i) f(e_j) = 2 / pi. The inverse
    of f makes a normal distribution of the biases' noise."""
    torch.manual_seed(1)
    layer, n = layer_of(3, 4), 2000
    draws = [noise_of(layer) for _ in range(n)]
    weights = np.array([eps for eps, _ in draws])
    biases = np.array([eps for _, eps in draws])
    e = (biases * np.abs(biases)).ravel()
    for x, variance in ((weights, 2 / np.pi), (biases, np.sqrt(2 / np.pi)), (e, 1)):
        error = np.sqrt(variance / n)
        assert np.abs(x.mean(axis=0)).max() < 5 * error
        assert x.var(axis=0) == pytest.approx(variance, abs=0.15)
    assert (np.abs(e) < 1).mean() == pytest.approx(0.6827, abs=0.02)
    assert (np.abs(e) < 2).mean() == pytest.approx(0.9545, abs=0.01)
    # weights of different inputs and outputs are uncorrelated, though not independent
    corner, opposite = weights[:, 0, 0], weights[:, 1, 1]
    assert np.corrcoef(corner, opposite)[0, 1] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(("p", "q"), [(9, 400), (400, 9)])
@pytest.mark.parametrize("sigma_0", [0.5, 0.1])
def test_initial_values_depend_on_the_inputs_only(p, q, sigma_0):
    """mu ~ U(-1 / sqrt(p), 1 / sqrt(p)), sigma = sigma_0 / sqrt(p), also for the biases."""
    torch.manual_seed(0)
    layer = layer_of(p, q, sigma_0)
    for mu, shape in ((layer.weight, (q, p)), (layer.bias, (q,))):
        mu, bound = mu.detach().numpy(), 1 / np.sqrt(p)
        assert mu.shape == shape and np.abs(mu).max() <= bound
        if mu.size >= 400:
            assert np.abs(mu).max() > 0.97 * bound
            assert mu.var() == pytest.approx(bound**2 / 3, rel=0.15)
    for sigma, shape in ((layer.sigma_weight, (q, p)), (layer.sigma_bias, (q,))):
        expected = np.full(shape, sigma_0 / np.sqrt(p))
        np.testing.assert_allclose(sigma.detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("pictures", [False, True])
def test_all_linear_layers_are_noisy(pictures):
    """Also the hidden ones; the convolution for MinAtar's pictures is not. sigma_0 reaches all."""
    obs_space = np.zeros((10, 10, 4), np.uint8) if pictures else np.zeros(6, np.float32)
    q_network = network(obs_space=obs_space, sigma_0=0.3)
    noisy = layers_of(q_network)
    sizes = [(1024, 128), (128, 3)] if pictures else [(6, 120), (120, 84), (84, 3)]
    assert [(x.in_features, x.out_features) for x in noisy] == sizes
    for layer in noisy:
        expected = 0.3 / np.sqrt(layer.in_features)
        for sigma in (layer.sigma_weight, layer.sigma_bias):
            assert sigma.flatten().tolist() == pytest.approx([expected] * sigma.numel())
    linear = [x for x in q_network.modules() if isinstance(x, torch.nn.Linear)]
    assert linear[1:] == noisy if pictures else linear == noisy  # [0]: the convolution
    obs = torch.from_numpy(np.stack([obs_space] * 2)) + 1
    assert q_network(obs).shape == (2, 3) and not torch.equal(q_network(obs), q_network(obs))


def test_every_call_draws_noise_which_all_rows_share():
    torch.manual_seed(0)
    q_network, row = network(), torch.randn(6)
    first, second = (q_network(row.repeat(5, 1)).detach() for _ in range(2))
    for values in (first, second):
        torch.testing.assert_close(values, values[:1].expand(5, -1))
    assert (first[0] - second[0]).abs().min() > 1e-4


def test_layers_of_equal_size_have_different_noise():
    """Also two networks, and one layer in two calls: no noise belongs to the module's code."""
    layer, other = layer_of(4, 4), layer_of(4, 4)
    draws = [noise_of(x)[0] for x in (layer, other, layer)]
    for i in range(3):
        for j in range(i):
            assert np.abs(draws[i] - draws[j]).min() > 1e-6


def test_acting_draws_noise_at_every_step():
    """With one draw for many steps, as between two updates, the actions would be constant."""
    script = load("noisy_dqn_cartpole")
    torch.manual_seed(0)
    q_network, rng = network(sigma_0=3.0), np.random.default_rng(0)
    obs = np.repeat(rng.normal(size=(1, 6)).astype(np.float32), 4, axis=0)
    steps = np.array([script.act(q_network, obs, 0.0, rng, CPU) for _ in range(40)])
    assert set(steps[:, 0].tolist()) == {0, 1, 2}
    assert (steps == steps[:, :1]).all()  # all environments share the draw of a step
    q_network.eval()
    steps = {script.act(q_network, obs, 0.0, rng, CPU)[0] for _ in range(20)}
    assert len(steps) == 1


def test_random_actions_only_at_the_start(monkeypatch):
    """On vectors until step 10,000, with MinAtar's defaults none; the arguments bring them back."""
    script = load("noisy_dqn_cartpole")
    for env_id, start in (("CartPole-v1", 1), ("MinAtar/Breakout-v1", 0)):
        monkeypatch.setattr("sys.argv", ["noisy_dqn_cartpole.py", "--env-id", env_id])
        args = script.parse_args()
        steps = (0, 5_000, 10_000, args.total_timesteps)
        expected = [start, start / 2, 0, 0]
        assert [script.epsilon_at(step, args) for step in steps] == pytest.approx(expected)
    monkeypatch.setattr("sys.argv", ["noisy_dqn_cartpole.py", "--end-e", "0.1"])
    args = script.parse_args()
    assert script.epsilon_at(args.total_timesteps, args) == pytest.approx(0.1)


def random_batch(script, rng):
    discounts = np.where(np.arange(BATCH) < 3, 0.0, 0.99)
    arrays = {
        "obs": rng.normal(size=(BATCH, 6)),
        "actions": rng.integers(N_ACTIONS, size=BATCH),
        "rewards": rng.normal(size=BATCH) * 3,
        "next_obs": rng.normal(size=(BATCH, 6)),
        "discounts": discounts,
    }
    return arrays, script.Batch(*map(torch.from_numpy, arrays.values()))


def test_s_and_s_prime_have_different_noise():
    """With one action, s' = s, r = 0, gamma 1 and equal networks the error is the noise's."""
    script = load("noisy_dqn_cartpole")
    torch.manual_seed(0)
    q_network = network(n_actions=1).double()
    obs = torch.randn(BATCH, 6, dtype=torch.float64)
    zero, one = torch.zeros(BATCH, dtype=torch.float64), torch.ones(BATCH, dtype=torch.float64)
    batch = script.Batch(obs, zero.long(), zero, obs, one)
    target_network = script.copy.deepcopy(q_network)
    errors = []
    for _ in range(2):
        _, td_error, _ = script.td_loss(q_network, target_network, batch, script.Args())
        assert td_error.abs().max() > 1e-2
        errors.append(td_error)
    assert (errors[0] - errors[1]).abs().max() > 1e-3  # the next update has new noise
    # Both have noise: without the other's, each still changes from call to call.
    for noisy, quiet in ((q_network, target_network), (target_network, q_network)):
        noisy.train()
        quiet.eval()
        a, b = (script.td_loss(q_network, target_network, batch, script.Args())[1] for _ in "ab")
        assert (a - b).abs().max() > 1e-3


def test_evaluation_is_without_noise():
    """mu alone, against a plain perceptron; and it leaves the random state of training alone."""
    script = load("noisy_dqn_cartpole")
    torch.manual_seed(0)
    q_network = network(n_actions=2, obs_space=np.zeros(4, np.float32)).eval()
    obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    mu = {k: v for k, v in q_network.state_dict().items() if "sigma" not in k}
    values = q_network(torch.from_numpy(obs)).detach().numpy()
    np.testing.assert_allclose(values, oracle.q_values(mu, obs), rtol=1e-4, atol=1e-5)
    before = torch.get_rng_state()
    args = script.RunArgs(eval_episodes=2)
    ends = [script.evaluate(q_network, args, CPU, (1, 1))[0].tolist() for _ in range(2)]
    assert ends[0] == ends[1] and torch.equal(torch.get_rng_state(), before)
    assert not [*q_network.buffers()]  # the noise is no state: a checkpoint and a sync need none


def noise_in_order(q_network):
    """eps of each layer's weight and bias for the next call, drawn as the layers draw it."""
    found = []
    for layer in layers_of(q_network):
        e = [torch.randn(n, dtype=torch.float64) for n in (layer.in_features, layer.out_features)]
        f_in, f_out = (np.array([np.sign(x) * np.sqrt(abs(x)) for x in v.tolist()]) for v in e)
        eps = np.zeros((len(f_out), len(f_in)))
        for j in range(len(f_out)):
            for i in range(len(f_in)):
                eps[j, i] = f_out[j] * f_in[i]
        found += [eps, f_out]
    return found


def perceptron(q_network, noise):
    """[W1, b1, W2, b2, W3, b3] with noise."""
    weights = []
    for layer, eps in zip(layers_of(q_network), zip(noise[::2], noise[1::2])):
        for mu, sigma, e in zip(
            (layer.weight, layer.bias), (layer.sigma_weight, layer.sigma_bias), eps
        ):
            weights.append(mu.detach().numpy() + sigma.detach().numpy() * e)
    return weights


@pytest.mark.parametrize("seed", range(2))
def test_loss_and_one_update_equal_the_oracle(seed):
    """The target's noise at s', the online network's at s; the gradient by mu is that by the
    weight, and by sigma it is eps times that; Adam."""
    script = load("noisy_dqn_cartpole")
    torch.manual_seed(seed)
    q_network, target_network = network().double(), network().double()
    arrays, batch = random_batch(script, np.random.default_rng(seed))
    torch.manual_seed(100 + seed)
    target_weights = perceptron(target_network, noise_in_order(target_network))
    noise = noise_in_order(q_network)
    weights = perceptron(q_network, noise)
    state, target_state = (dict(enumerate(w)) for w in (weights, target_weights))
    errors = oracle.td_errors(False, state, target_state, arrays)
    d_q = np.zeros((BATCH, N_ACTIONS))
    d_q[np.arange(BATCH), arrays["actions"]] = -2 * errors / BATCH
    gradients = oracle.perceptron_gradients(weights, arrays["obs"], d_q)

    names, parameters = zip(*q_network.named_parameters())
    of_layer = ["weight", "bias", "sigma_weight", "sigma_bias"]
    assert [name.split(".")[-1] for name in names] == of_layer * 3
    expected = []
    for (d_w, d_b), (eps_w, eps_b) in zip(
        zip(gradients[::2], gradients[1::2]), zip(noise[::2], noise[1::2])
    ):
        expected += [d_w, d_b, d_w * eps_w, d_b * eps_b]
    before = [p.detach().numpy().copy() for p in parameters]

    torch.manual_seed(100 + seed)
    loss, td_error, q_taken = script.td_loss(q_network, target_network, batch, script.Args())
    np.testing.assert_allclose(td_error.numpy(), errors, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(loss.item(), (errors**2).mean(), rtol=1e-8)
    values = oracle.q_values(state, arrays["obs"])[np.arange(BATCH), arrays["actions"]]
    np.testing.assert_allclose(q_taken.numpy(), values, rtol=1e-8, atol=1e-9)
    loss.backward()
    for p, e in zip(parameters, expected):
        np.testing.assert_allclose(p.grad.numpy(), e, rtol=1e-7, atol=1e-9)
        assert np.abs(e).max() > 0
    args = script.RunArgs()
    optimizer = script.make_optimizer(q_network, args)
    optimizer.step()
    for p, e in zip(parameters, oracle.adam_step(before, expected, lr=args.learning_rate)):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=1e-6, atol=1e-8)
    assert all(p.grad is None for p in target_network.parameters())


def test_without_noise_it_is_the_parents_update():
    """sigma_0 = 0: the same loss, errors and gradient, bit for bit, as dqn_cartpole.py."""
    script, parent = load("noisy_dqn_cartpole"), load("dqn_cartpole")
    torch.manual_seed(0)
    noisy, noisy_target = network(sigma_0=0.0), network(sigma_0=0.0)
    plain, plain_target = (parent.QNetwork(np.zeros(6, np.float32), N_ACTIONS) for _ in range(2))
    for a, b in ((plain, noisy), (plain_target, noisy_target)):
        a.load_state_dict({k: v for k, v in b.state_dict().items() if "sigma" not in k})
    arrays, _ = random_batch(script, np.random.default_rng(0))
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    ours = script.td_loss(noisy, noisy_target, script.Batch(**tensors), script.Args())
    theirs = parent.td_loss(plain, plain_target, parent.Batch(**tensors), parent.Args())
    assert all(map(torch.equal, ours, theirs))
    ours[0].backward(), theirs[0].backward()
    for name, p in plain.named_parameters():
        assert torch.equal(p.grad, noisy.get_parameter(name).grad)


def test_minatar(in_tmp, monkeypatch):
    """A short run with pictures: it learns sigma, too, and logs an epsilon of 0."""
    pytest.importorskip("minatar")
    script = load("noisy_dqn_cartpole")
    options = {"env_id": "MinAtar/Breakout-v1", "total_timesteps": 400, "learning_starts": 200}
    options |= {"buffer_size": 400, "eval_episodes": 1, "log_frequency": 100}
    main_in_process(script, options, monkeypatch)
    path = checkpoint_of(in_tmp)
    weights = script.load_checkpoint(str(path))["q_network"]
    sigma = weights["features.3.sigma_weight"]
    assert sigma.shape == (128, 1024) and len(sigma.unique()) > 100
    assert {event.value for event in scalars(path.parent)["charts/epsilon"]} == {0}
