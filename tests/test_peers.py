"""Losses beside those of other libraries, on the same tensors: Stable-Baselines3's contrib package,
TorchRL and Tianshou. A test is skipped where its library is not installed.

    pip install sb3-contrib torchrl tianshou
"""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load

B, D, A, GAMMA = 64, 5, 3, 0.9


def make_batch(script, seed=0):
    """Random transitions, a third of them terminal. -> a Batch, terminated (B,) bool"""
    rng = np.random.default_rng(seed)
    obs, next_obs = torch.from_numpy(rng.normal(size=(2, B, D)).astype(np.float32))
    rewards = torch.from_numpy(rng.normal(size=B).astype(np.float32))
    terminated = torch.from_numpy(rng.random(B) < 1 / 3)
    actions, discounts = torch.from_numpy(rng.integers(A, size=B)), GAMMA * (~terminated).float()
    return script.Batch(obs, actions, rewards, next_obs, discounts), terminated


def make_networks(script, *more):
    """theta and theta^-, with different weights."""
    torch.manual_seed(1)
    return [script.QNetwork(np.zeros(D, np.float32), A, *more) for _ in range(2)]


class LogProbabilities(torch.nn.Module):
    """(B, D) -> log p, (B, N, A), as TorchRL wants it."""

    def __init__(self, q_network):
        super().__init__()
        self.q_network = q_network

    def forward(self, observation):
        return self.q_network.logits(observation).log_softmax(dim=2).transpose(1, 2)


def torchrl_value(loss, target_network, batch, terminated):
    """What a loss of TorchRL is on this batch, with this theta^-."""
    tensordict = pytest.importorskip("tensordict").TensorDict
    weights, copied = dict(target_network.named_parameters()), 0
    for key, value in loss.target_value_network_params.flatten_keys(".").items():
        for name in weights:
            if key.endswith("." + name):
                value.data.copy_(weights[name].data)
                copied += 1
    assert copied == len(weights)
    ends = {"done": terminated[:, None], "terminated": terminated[:, None]}
    after = {"observation": batch.next_obs, "reward": batch.rewards[:, None], **ends}
    data = {"observation": batch.obs, "action": batch.actions, "next": after}
    return loss(tensordict(data, batch_size=[B]))["loss"].item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("name", ["dqn_cartpole", "ddqn_cartpole"])
def test_dqn_has_the_loss_of_torchrl(name, loss):
    objectives = pytest.importorskip("torchrl.objectives")
    QValueActor = pytest.importorskip("torchrl.modules").QValueActor
    script = load(name)
    (q_network, target_network), (batch, terminated) = make_networks(script), make_batch(script)
    expected, *_ = script.td_loss(q_network, target_network, batch, script.Args(loss=loss))
    actor = QValueActor(q_network, in_keys=["observation"], action_space="categorical")
    options = {"loss_function": {"mse": "l2", "huber": "smooth_l1"}[loss]}
    options["action_space"] = "categorical"
    theirs = objectives.DQNLoss(actor, double_dqn=name == "ddqn_cartpole", **options)
    theirs.make_value_estimator(gamma=GAMMA)
    found = torchrl_value(theirs, target_network, batch, terminated)
    assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_c51_has_the_loss_of_torchrl():
    """TorchRL's chooses a* with theta, as in Double DQN. So theta^- is theta here."""
    objectives = pytest.importorskip("torchrl.objectives")
    Actor = pytest.importorskip("torchrl.modules").DistributionalQValueActor
    script = load("c51_cartpole")
    args = script.Args(n_atoms=21, v_min=-2.0, v_max=3.0)
    q_network, _ = make_networks(script, args)
    batch, terminated = make_batch(script)
    expected, *_ = script.td_loss(q_network, q_network, batch, args)
    options = {"support": q_network.support, "action_space": "categorical"}
    actor = Actor(LogProbabilities(q_network), in_keys=["observation"], **options)
    theirs = objectives.DistributionalDQNLoss(actor, gamma=GAMMA)
    found = torchrl_value(theirs, q_network, batch, terminated)
    assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("q_lambda", [0.0, 0.65, 1.0])
def test_pqn_has_the_lambda_returns_of_torchrl(q_lambda):
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    rng = np.random.default_rng(3)
    rewards, next_values = torch.from_numpy(rng.normal(size=(2, 20, 6)))
    terminated, truncated = torch.from_numpy(rng.random((2, 20, 6)) < 0.1)
    discounts = GAMMA * (~terminated).double()
    found = load("pqn_cartpole").lambda_returns(
        rewards, discounts, truncated, next_values, q_lambda
    )
    steps = (x.T[:, :, None] for x in (next_values, rewards, terminated | truncated, terminated))
    expected = functional.td_lambda_return_estimate(GAMMA, q_lambda, *steps)
    torch.testing.assert_close(found, expected.squeeze(-1).T)


def test_qr_dqn_has_the_loss_of_sb3_contrib():
    theirs = pytest.importorskip("sb3_contrib.common.utils").quantile_huber_loss
    script = load("qrdqn_cartpole")
    args = script.Args(n_quantiles=7)
    (q_network, target_network), (batch, _) = make_networks(script, args), make_batch(script)
    expected, *_ = script.td_loss(q_network, target_network, batch, args)
    rows = torch.arange(B)
    with torch.no_grad():
        quantiles = target_network.quantiles(batch.next_obs)
        quantiles = quantiles[rows, quantiles.mean(dim=2).argmax(dim=1)]
        target = batch.rewards[:, None] + batch.discounts[:, None] * quantiles
    found = theirs(q_network.quantiles(batch.obs)[rows, batch.actions], target)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_iqn_has_the_quantile_loss_of_sb3_contrib():
    """Random tau, and N other than N'."""
    theirs = pytest.importorskip("sb3_contrib.common.utils").quantile_huber_loss
    rng = np.random.default_rng(5)
    quantiles, target = (torch.from_numpy(rng.normal(size=(B, n)) * 2) for n in (7, 5))
    taus = torch.from_numpy(rng.random((B, 7)))
    found = theirs(quantiles, target, cum_prob=taus[:, :, None])
    ours = load("iqn_cartpole").quantile_huber_loss(quantiles, target, taus, kappa=1.0)
    assert found.item() == pytest.approx(ours.mean().item(), rel=1e-5)


def tianshou(kind):
    """Tianshou's module of this algorithm, its Batch, and an optimizer that changes nothing."""
    module = pytest.importorskip(f"tianshou.algorithm.modelfree.{kind}")
    Batch = pytest.importorskip("tianshou.data").Batch
    optim = pytest.importorskip("tianshou.algorithm.optim").AdamOptimizerFactory(lr=0.0)
    return module, Batch, optim


class Stateless(torch.nn.Module):
    """A network as Tianshou calls it."""

    def __init__(self, q_network, function):
        super().__init__()
        self.q_network, self.function = q_network, function

    def forward(self, obs, state=None, **_):
        return self.function(torch.as_tensor(obs)), state


def test_c51_has_the_loss_of_tianshou():
    module, Batch, optim = tianshou("c51")
    script = load("c51_cartpole")
    args = script.Args(n_atoms=21, v_min=-2.0, v_max=3.0)
    q_network, _ = make_networks(script, args)
    batch, _ = make_batch(script)
    expected, *_ = script.td_loss(q_network, q_network, batch, args)
    model = Stateless(q_network, lambda obs: q_network.logits(obs).softmax(dim=2))
    policy = module.C51Policy(
        model=model, action_space=gym.spaces.Discrete(A), num_atoms=21, v_min=-2.0, v_max=3.0
    )
    theirs = module.C51(policy=policy, optim=optim)
    returns = batch.rewards[:, None] + batch.discounts[:, None] * q_network.support
    rows = {"obs": batch.obs.numpy(), "obs_next": batch.next_obs.numpy(), "info": [None] * B}
    found = theirs._update_with_batch(Batch(**rows, act=batch.actions.numpy(), returns=returns))
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)


def test_qr_dqn_has_the_loss_of_tianshou():
    module, Batch, optim = tianshou("qrdqn")
    script = load("qrdqn_cartpole")
    args = script.Args(n_quantiles=7)
    (q_network, target_network), (batch, _) = make_networks(script, args), make_batch(script)
    expected, *_ = script.td_loss(q_network, target_network, batch, args)
    policy = module.QRDQNPolicy(
        model=Stateless(q_network, q_network.quantiles), action_space=gym.spaces.Discrete(A)
    )
    theirs = module.QRDQN(policy=policy, optim=optim, num_quantiles=7)
    rows = torch.arange(B)
    with torch.no_grad():
        quantiles = target_network.quantiles(batch.next_obs)
        quantiles = quantiles[rows, quantiles.mean(dim=2).argmax(dim=1)]
        returns = batch.rewards[:, None] + batch.discounts[:, None] * quantiles
    found = theirs._update_with_batch(
        Batch(obs=batch.obs.numpy(), act=batch.actions.numpy(), returns=returns, info=[None] * B)
    )
    # Tianshou takes the mean over its own quantiles and the sum over the target's: the same, if
    # both are 7.
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
