"""Rainbow: with all parts off it is DQN, with one on it is that file, with all on the oracle's."""

import numpy as np
import pytest
import torch
from conftest import load
from test_run import main_in_process, refused, small

OFF = {"double": False, "dueling": False, "prioritized": False, "n_step": 1, "noisy": False}
OFF |= {"distributional": False}
PARTS = {
    "dqn_cartpole": {},
    "ddqn_cartpole": {"double": True},
    "dueling_dqn_cartpole": {"dueling": True},
    "per_dqn_cartpole": {"prioritized": True},
    "nstep_dqn_cartpole": {"n_step": 3},
    "noisy_dqn_cartpole": {"noisy": True, "sigma_0": 0.3},
    "c51_cartpole": {"distributional": True},
}
OBS, ACTIONS, BATCH, ATOMS = 4, 3, 16, 7


def random_batch(script, seed, dtype=torch.float32, weights=False):
    rng = np.random.default_rng(seed)
    k = rng.integers(1, 4, BATCH)
    fields = {
        "obs": rng.normal(size=(BATCH, OBS)),
        "actions": rng.integers(ACTIONS, size=BATCH),
        "rewards": rng.normal(size=BATCH) * 2,
        "next_obs": rng.normal(size=(BATCH, OBS)),
        "discounts": 0.99**k * (rng.random(BATCH) > 0.2),
    }
    if weights:
        fields |= {"indices": np.arange(BATCH), "is_weights": rng.uniform(0.2, 1, BATCH)}
    fields = {name: torch.from_numpy(x) for name, x in fields.items()}
    floats = {name: x.to(dtype) for name, x in fields.items() if x.dtype == torch.float64}
    return script.Batch(**fields | floats)


def networks(script, args):
    """An online and a target network with the same seed for each file."""
    torch.manual_seed(3)
    needs = {"noisy_dqn_cartpole", "c51_cartpole", "rainbow_cartpole"}
    more = (args,) if script.__name__ in needs else ()
    return [script.QNetwork(np.zeros(OBS, np.float32), ACTIONS, *more) for _ in range(2)]


@pytest.mark.parametrize("name", PARTS)
def test_with_one_part_on_the_update_is_that_files(name):
    """Same weights, same batch, same noise: same loss, errors and gradients."""
    results = []
    for file, options in (("rainbow_cartpole", OFF | PARTS[name]), (name, PARTS[name])):
        script = load(file)
        known = {k: v for k, v in options.items() if hasattr(script.Args, k)}
        args = script.Args(**known)
        if hasattr(args, "v_min"):
            args.v_min, args.v_max, args.n_atoms = -4.0, 4.0, ATOMS
        q_network, target_network = networks(script, args)
        batch = random_batch(script, 0, weights=name.startswith("per"))
        torch.manual_seed(4)
        loss, td_error, q_taken, *_ = script.td_loss(q_network, target_network, batch, args)
        loss.backward()
        gradients = {key: p.grad for key, p in q_network.named_parameters()}
        results.append((loss.detach(), td_error, q_taken, gradients))
    (loss, errors, values, gradients), (loss_2, errors_2, values_2, gradients_2) = results
    assert gradients.keys() == gradients_2.keys()
    torch.testing.assert_close(loss, loss_2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(errors, errors_2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, values_2, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_2[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", PARTS)
def test_with_one_part_on_a_run_is_that_files(name, in_tmp, monkeypatch):
    """A whole run, with its draws: the same random numbers, so nearly the same weights."""
    weights = []
    for file, options in (("rainbow_cartpole", OFF | PARTS[name]), (name, PARTS[name])):
        script = load(file)

        def keep(path, state, save=script.save_checkpoint):
            weights.append(state["q_network"])
            return save(path, state)

        monkeypatch.setattr(script, "save_checkpoint", keep)
        common = {"total_timesteps": 1_000, "checkpoint_frequency": 0, "eval_episodes": 0}
        common |= {"learning_rate": 1e-4, "per_alpha": 0.6, "max_grad_norm": 10.0, "adam_eps": 1e-8}
        if name.startswith("noisy"):
            common |= {"start_e": 0.0, "end_e": 0.0}
        both = small(name) | common | options
        known = {k: v for k, v in both.items() if hasattr(script.RunArgs, k)}
        main_in_process(script, known | {"eval_frequency": 0}, monkeypatch)
        monkeypatch.undo()
        monkeypatch.chdir(in_tmp)
    a, b = weights
    assert a.keys() == b.keys()
    for key, x in a.items():
        torch.testing.assert_close(x, b[key], rtol=1e-3, atol=1e-4, msg=key)


def test_with_all_parts_on_the_loss_is_the_oracles():
    """In float64 and plain loops, without noise; theta and theta^- choose different actions."""
    script = load("rainbow_cartpole")
    args = script.Args(v_min=-4.0, v_max=4.0, n_atoms=ATOMS)
    q_network, target_network = (network.double().eval() for network in networks(script, args))
    batch = random_batch(script, 1, torch.float64, weights=True)
    loss, td_error, q_taken, outside = script.td_loss(q_network, target_network, batch, args)
    z, delta_z = np.linspace(-4, 4, ATOMS), 8 / (ATOMS - 1)

    def pmf(network, obs):  # (A, N): dueling streams, then a softmax for each action
        with torch.no_grad():
            features = network.features(obs[None])
            value, advantage = network.value(features)[0], network.advantage(features)[0]
        value, advantage = value.numpy(), advantage.numpy().reshape(ACTIONS, ATOMS)
        logits = np.array(
            [
                [value[i] + advantage[a, i] - np.mean(advantage[:, i]) for i in range(ATOMS)]
                for a in range(ACTIONS)
            ]
        )
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)

    losses, errors, values, clipped, disagree = [], [], [], [], 0
    for b in range(BATCH):
        online, target = pmf(q_network, batch.next_obs[b]), pmf(target_network, batch.next_obs[b])
        best = int(np.argmax(online @ z))
        disagree += best != int(np.argmax(target @ z))
        m, out = np.zeros(ATOMS), 0.0
        for j in range(ATOMS):
            tz = batch.rewards[b].item() + batch.discounts[b].item() * z[j]
            out += target[best, j] * (not -4 <= tz <= 4)
            tz = min(max(tz, -4.0), 4.0)
            for i in range(ATOMS):
                m[i] += max(0.0, 1 - abs(tz - z[i]) / delta_z) * target[best, j]
        p = pmf(q_network, batch.obs[b])[batch.actions[b].item()]
        losses.append(batch.is_weights[b].item() * -np.sum(m * np.log(p)))
        errors.append(sum(x * np.log(x / y) for x, y in zip(m, p) if x > 0))
        values.append(p @ z)
        clipped.append(out)
    assert disagree > 0
    np.testing.assert_allclose(loss.item(), np.mean(losses), rtol=1e-6)
    np.testing.assert_allclose(td_error.numpy(), errors, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(q_taken.numpy(), values, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(outside.item(), np.mean(clipped), rtol=1e-5)


def test_each_forward_pass_of_the_loss_draws_its_own_noise(monkeypatch):
    script = load("rainbow_cartpole")
    args = script.Args(v_min=-4.0, v_max=4.0, n_atoms=ATOMS)
    q_network, target_network = networks(script, args)
    drawn, randn_like = [], torch.randn_like
    monkeypatch.setattr(
        script.torch, "randn_like", lambda x: drawn.append(randn_like(x)) or drawn[-1]
    )
    script.td_loss(q_network, target_network, random_batch(script, 2), args)
    layers = sum(isinstance(layer, script.NoisyLinear) for layer in q_network.modules())
    assert layers == 5 and len(drawn) == 3 * 2 * layers  # theta^-(s'), theta(s'), theta(s)
    assert len({tuple(x.tolist()) for x in drawn}) == len(drawn)


def test_bounds_are_needed_by_distributions_only(in_tmp, monkeypatch):
    script = load("rainbow_cartpole")
    unknown = {"env_id": "LunarLander-v3"}
    assert "--v-min" in refused("rainbow_cartpole", unknown, monkeypatch)
    assert not [x for x in script.Args(distributional=False).rules() if not x[2]]
    assert "--v-max must be above" in refused("rainbow_cartpole", {"v_max": -1.0}, monkeypatch)
