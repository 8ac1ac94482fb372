"""The losses and one whole update against NumPy, in float64."""

import numpy as np
import oracle
import pytest
import torch

N_ACTIONS, BATCH = 4, 8


def random_batch(m, rng, atari):
    shape = (BATCH, 4, 84, 84) if atari else (BATCH, 6)
    draw = (lambda: rng.integers(256, size=shape, dtype=np.uint8)) if atari else None
    draw = draw or (lambda: rng.normal(size=shape))
    discounts = 0.99 ** rng.integers(1, 4, BATCH).astype(np.float64)
    discounts[:3] = 0  # terminated; the others end after n steps or by truncation, and bootstrap
    arrays = {
        "obs": draw(),
        "actions": rng.integers(N_ACTIONS, size=BATCH),
        "rewards": rng.normal(size=BATCH) * 3,
        "next_obs": draw(),
        "discounts": discounts,
    }
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    if atari:
        tensors |= {"indices": torch.arange(BATCH), "is_weights": torch.ones(BATCH)}
    return arrays, m.Batch(**tensors)


def in_float64(batch):
    """A batch for networks in float64: frames scaled to [0, 1] beforehand."""
    obs, next_obs = batch.obs.double(), batch.next_obs.double()
    scale = 255 if batch.obs.dtype == torch.uint8 else 1
    return batch._replace(obs=obs / scale, next_obs=next_obs / scale)


def networks(m, atari):
    given = () if atari else (np.zeros(6, np.float32),)
    return tuple(m.QNetwork(*given, N_ACTIONS).double() for _ in range(2))


@pytest.mark.parametrize("loss", ["huber", "mse"])
@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_the_oracle(script, loss, seed):
    torch.manual_seed(seed)
    atari, double = "atari" in script.__name__, script.__name__.startswith("ddqn")
    q_network, target_network = networks(script, atari)
    arrays, batch = random_batch(script, np.random.default_rng(seed), atari)
    args, batch = script.Args(loss=loss), in_float64(batch)
    value, td_error, q_taken = script.td_loss(q_network, target_network, batch, args)
    expected = oracle.td_errors(double, q_network.state_dict(), target_network.state_dict(), arrays)
    other = oracle.td_errors(
        not double, q_network.state_dict(), target_network.state_dict(), arrays
    )
    np.testing.assert_allclose(td_error.numpy(), expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(value.item(), oracle.loss_of(expected, loss), rtol=1e-9)
    assert not np.allclose(expected, other), "this batch does not distinguish DQN from Double DQN"
    q_values = oracle.q_values(q_network.state_dict(), arrays["obs"])
    expected = q_values[np.arange(BATCH), arrays["actions"]]
    np.testing.assert_allclose(q_taken.numpy(), expected, rtol=1e-9)
    assert not td_error.requires_grad and not q_taken.requires_grad


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_gradient_flows_through_the_value_of_the_action_taken_only(script, loss):
    torch.manual_seed(5)
    atari, double = "atari" in script.__name__, script.__name__.startswith("ddqn")
    q_network, target_network = networks(script, atari)
    arrays, batch = random_batch(script, np.random.default_rng(5), atari)
    args = script.Args(loss=loss)
    value, *_ = script.td_loss(q_network, target_network, in_float64(batch), args)
    value.backward()
    errors = oracle.td_errors(double, q_network.state_dict(), target_network.state_dict(), arrays)
    slope = np.clip(-errors, -1, 1) if loss == "huber" else -2 * errors
    expected = np.zeros(N_ACTIONS)
    np.add.at(expected, arrays["actions"], slope / BATCH)
    np.testing.assert_allclose([*q_network.parameters()][-1].grad.numpy(), expected, rtol=1e-9)
    assert all(p.grad is None for p in target_network.parameters())


def test_one_update_equals_the_oracle(cartpole):
    """td_loss, backpropagation and Adam, as in the script."""
    torch.manual_seed(0)
    q_network, target_network = networks(cartpole, atari=False)
    arrays, batch = random_batch(cartpole, np.random.default_rng(0), atari=False)
    double = cartpole.__name__.startswith("ddqn")
    before = [p.detach().numpy().copy() for p in q_network.parameters()]
    errors = oracle.td_errors(double, q_network.state_dict(), target_network.state_dict(), arrays)
    d_q = np.zeros((BATCH, N_ACTIONS))
    d_q[np.arange(BATCH), arrays["actions"]] = -2 * errors / BATCH
    expected = oracle.adam_step(
        before, oracle.perceptron_gradients(before, arrays["obs"], d_q), lr=1e-3
    )

    optimizer = torch.optim.Adam(q_network.parameters(), lr=1e-3, fused=True)
    value, *_ = cartpole.td_loss(q_network, target_network, batch, cartpole.Args(loss="mse"))
    value.backward()
    optimizer.step()
    for p, e in zip(q_network.parameters(), expected):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=1e-7, atol=1e-9)


class Plain(torch.nn.Sequential):
    """The layers of Features as torch computes them, flattened in the same order."""

    def forward(self, x):
        for layer in self:
            if isinstance(layer, torch.nn.Flatten):
                x = x.permute(0, 2, 3, 1)
            x = layer(x.contiguous())
        return x


def test_fast_layout_changes_rounding_only(atari):
    """Features with the fused optimiser gives the same update as nn.Sequential with the plain
    one."""
    weights = []
    for fast in (False, True):
        torch.manual_seed(1)
        q_network, target_network = atari.QNetwork(N_ACTIONS), atari.QNetwork(N_ACTIONS)
        if not fast:
            for network in (q_network, target_network):
                network.features = Plain(*network.features)
        optimizer = torch.optim.Adam(q_network.parameters(), lr=1e-4, fused=fast)
        for seed in range(3):
            _, batch = random_batch(atari, np.random.default_rng(seed), atari=True)
            batch = batch._replace(rewards=batch.rewards.float(), discounts=batch.discounts.float())
            loss, *_ = atari.td_loss(q_network, target_network, batch, atari.Args())
            q_network.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in q_network.parameters()])
    start = atari.QNetwork(N_ACTIONS)
    torch.manual_seed(1)
    start = list(atari.QNetwork(N_ACTIONS).parameters())
    for plain, fast, first in zip(*weights, start):
        moved = (plain - first).abs().max()
        assert moved > 1e-5
        # Adam's first steps divide by tiny second moments, so a few weights may differ by a step
        assert (plain - fast).abs().mean() < 0.01 * moved


def test_float32_gives_nearly_what_float64_does(atari):
    torch.manual_seed(1)
    single = atari.QNetwork(N_ACTIONS)
    double = atari.QNetwork(N_ACTIONS).double()
    double.load_state_dict(single.state_dict())
    obs = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    outputs = [single(obs), double(obs.double() / 255)]
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-4, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    for mine, exact in zip(single.parameters(), double.parameters()):
        torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)


def test_values_are_not_rounded_to_bfloat16(atari, monkeypatch):
    """The values of actions differ by less than bfloat16 can represent near 1."""
    torch.manual_seed(1)
    q_network = atari.QNetwork(N_ACTIONS)
    with torch.no_grad():
        q_network.head.weight.mul_(1e-2)
        q_network.head.bias.copy_(1 + torch.arange(N_ACTIONS) * 1e-3)
    monkeypatch.setattr(atari.Features, "bfloat16", True)
    q_values = q_network(torch.zeros(1, 4, 84, 84, dtype=torch.uint8))
    assert q_values.dtype == torch.float32 and len(q_values.unique()) == N_ACTIONS


def test_gradients_in_bfloat16_are_nearly_those_of_float32(atari, monkeypatch):
    """bfloat16 keeps 8 bits, so that a ReLU near 0 may switch. The gradients are float32."""
    torch.manual_seed(1)
    q_network, target_network = (atari.QNetwork(N_ACTIONS) for _ in range(2))
    _, batch = random_batch(atari, np.random.default_rng(1), True)
    batch = batch._replace(rewards=batch.rewards.float(), discounts=batch.discounts.float())
    found = []
    for bfloat16 in (False, True):
        monkeypatch.setattr(atari.Features, "bfloat16", bfloat16)
        q_network.zero_grad()
        atari.td_loss(q_network, target_network, batch, atari.Args())[0].backward()
        found.append([x.grad.clone() for x in q_network.parameters()])
    assert not torch.equal(found[0][0], found[1][0]), "both were computed in float32"
    for exact, rounded in zip(*found):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() < 0.15 * exact.norm()


def test_the_batches_of_fastreplay_in_bfloat16_are_those_of_numpy(atari):
    """All 256 values of a byte: scaled and rounded in the replay, or in the network."""
    pytest.importorskip("fastreplay")
    given = {"precision": "bfloat16", "num_envs": 2, "buffer_size": 200}
    frames = np.arange(2 * 84 * 84).reshape(2, 84, 84) % 256
    columns = np.array([1, 2]), np.array([0.0, 1.0], np.float32), np.zeros(2, bool)
    batches = []
    for kind in ("numpy", "cpp"):
        args = atari.RunArgs(**given, buffer=kind, replay_storage="plain")
        replay = atari.make_replay(args, torch.device("cpu"))
        for step in range(50):
            shown = (frames + step).astype(np.uint8)
            replay.add(shown, *columns, np.full(2, step == 0))
        batches.append(replay.gather(np.arange(4, 40)))
    plain, fast = batches
    assert plain.obs.dtype == torch.uint8 and fast.obs.dtype == torch.bfloat16
    assert len(plain.obs.unique()) == 256
    for key in ("obs", "next_obs"):
        expected = atari.scaled(getattr(plain, key)).to(torch.bfloat16)
        torch.testing.assert_close(getattr(fast, key), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "given, gpu, fast, taken",
    [
        ("auto", False, True, "bfloat16"),
        ("auto", False, False, "float32"),
        ("auto", True, True, "float32"),
        ("float32", False, True, "float32"),
        ("bfloat16", True, False, "bfloat16"),
    ],
)
def test_the_precision_suits_the_device(atari, given, gpu, fast, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(atari, "multiplies_bfloat16", lambda: fast)
    monkeypatch.setattr(atari.Features, "bfloat16", None)
    args = atari.RunArgs(precision=given)
    atari.prepare_torch(args)
    assert args.precision == taken and atari.Features.bfloat16 == (taken == "bfloat16")


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="torch is older")
def test_the_instructions_are_those_that_torch_finds(atari):
    found = torch.cpu.get_capabilities()
    assert atari.multiplies_bfloat16() == any(map(found.get, ("avx512_bf16", "amx_bf16")))


def test_epsilon(script):
    args = script.Args(total_timesteps=1000, exploration_fraction=0.1, start_e=1.0, end_e=0.1)
    values = [script.epsilon_at(step, args) for step in (0, 50, 100, 500, 1000)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1, 0.1])


def test_epsilon_without_exploration_phase(script):
    """CleanRL's `--exploration-fraction 0`."""
    args = script.Args(total_timesteps=1000, exploration_fraction=0.0, end_e=0.1)
    assert [script.epsilon_at(step, args) for step in (0, 1, 1000)] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_act_is_epsilon_greedy(script, epsilon):
    torch.manual_seed(0)
    atari, n = "atari" in script.__name__, 400
    q_network = script.QNetwork(4) if atari else script.QNetwork(np.zeros(6), 4)
    rng = np.random.default_rng(0)
    shape = (n, 4, 84, 84) if atari else (n, 6)
    obs = rng.integers(256, size=shape, dtype=np.uint8) if atari else rng.normal(size=shape)
    obs = obs if atari else obs.astype(np.float32)
    actions = script.act(q_network, obs, epsilon, rng, torch.device("cpu"))
    greedy = q_network(torch.from_numpy(obs)).argmax(dim=1).numpy()
    share = (actions == greedy).mean()  # of greedy actions: 1 - epsilon + epsilon / 4
    assert share == pytest.approx(1 - 0.75 * epsilon, abs=5 * 0.5 / np.sqrt(n) * (epsilon > 0))
    assert actions.dtype == np.int64 and set(actions.tolist()) <= set(range(4))
