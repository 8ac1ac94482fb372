"""Q-learning with a neural network, no replay, no target network. Watkins, 1989 (PhD thesis).

    y = r + gamma max_a' Q(s', a'; theta),    theta <- theta + lr (y - Q(s, a; theta)) grad Q(s, a)

Each step of the environments gives one update, and its transitions are forgotten. The target y is a
constant: no gradient flows through it. What DQN repairs is what goes wrong here. Consecutive
transitions are alike, and what was learned elsewhere is overwritten. y moves with each update, and
an error in it feeds itself. On Acrobot all values drift to -1 / (1 - gamma) = -100, that of never
reaching the line, and no action stands out.

Seeds 1 to 5, mean greedy return of 100 episodes at the end (-500: never there):
    this file, 200,000 steps              -181, -500, -500, -500, -500
    dqn_acrobot.py, 46,984 to 66,316       -80, -180, -79, -90, -97

Parent: dqn_acrobot.py. What changes: no replay, no theta^-; td_loss bootstraps from theta.

Deviations from tabular Q-learning: a network, 4 environments, Adam (annealed) and the Huber loss,
whose derivative is bounded (--loss mse: the update above).

Run: python algos/q_learning_acrobot.py
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Args:  # the algorithm's; RunArgs, below the line, adds --device, --resume and so on
    env_id: str = "Acrobot-v1"  # vectors, or MinAtar/Breakout-v1 and so on; discrete actions
    reward: Literal["env", "tip-height"] = "env"  # the environment's, or the height of the tip - 1
    max_episode_steps: int = 0  # training episodes are cut here; 0: as in the environment (500)
    num_envs: int = 4  # environments stepped in turn
    seed: int = 1  # of the environments, the network, exploration and replay
    total_timesteps: int = 200_000  # environment steps, summed over the environments
    hidden_sizes: tuple[int, ...] = (120, 84)  # units of the hidden layers
    learning_rate: float = 1e-3  # of the optimizer
    lr_schedule: Literal["linear", "cosine", "exponential", "constant"] = "linear"  # its decay
    optimizer: Literal["adam", "adamw", "rmsprop"] = "adam"  # amsgrad with adamw, centred rmsprop
    adam_eps: float = 1e-8  # epsilon of adam and adamw
    max_grad_norm: float = 0.0  # gradients are clipped to this norm; 0: they are not
    gamma: float = 0.99  # discount factor
    loss: Literal["mse", "huber"] = "huber"  # squared error, or its derivative clipped to [-1, 1]
    start_e: float = 1.0  # epsilon at the first step
    end_e: float = 0.05  # epsilon once it has decayed
    exploration: Literal["linear", "exponential", "cosine"] = "linear"  # how epsilon decays
    exploration_fraction: float = 0.2  # decay time (exponential: time constant) / total_timesteps

    def rules(self) -> list:
        sizes, acrobot = self.hidden_sizes, self.env_id.startswith("Acrobot-")
        return [
            ("hidden_sizes", "at least one number, all positive", min(sizes, default=0) > 0),
            ("max_episode_steps", "0 or more", self.max_episode_steps >= 0),
            ("reward", "env where --env-id is not Acrobot-v1", acrobot or self.reward == "env"),
        ]


class Batch(NamedTuple):
    obs: torch.Tensor  # s, (B, D) float32, or (B, 10, 10, C) uint8 for MinAtar
    actions: torch.Tensor  # a, (B,) int64
    rewards: torch.Tensor  # r, (B,) float32
    next_obs: torch.Tensor  # s', like obs
    discounts: torch.Tensor  # gamma, or 0 where s' is terminal, (B,) float32


class QNetwork(nn.Module):
    """Hidden layers: (B, D) observations -> (B, A) action values. Images: a convolution."""

    def __init__(self, obs_space, n_actions: int, hidden_sizes: tuple = Args.hidden_sizes):
        super().__init__()
        self.n_actions = n_actions
        self.features, n_features = make_features(obs_space.shape, hidden_sizes)
        self.head = nn.Linear(n_features, n_actions)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(obs))


def td_loss(q_network, batch: Batch, args: Args):
    """-> the loss, a scalar; TD errors, (B,), for a replay with priorities; Q(s, a), (B,)"""
    with torch.no_grad():
        # y = r + gamma max_a' Q(s', a'; theta), a constant: no gradient flows through it
        next_q_values = q_network(batch.next_obs).amax(dim=1)  # (B,)
        td_target = batch.rewards + batch.discounts * next_q_values  # (B,)
    q_taken = q_network(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)  # Q(s, a), (B,)
    criterion = F.smooth_l1_loss if args.loss == "huber" else F.mse_loss
    return criterion(q_taken, td_target), td_target - q_taken.detach(), q_taken.detach()


def epsilon_at(step: int, args: Args) -> float:
    """Epsilon decays from start_e to end_e: linearly, exponentially, or as half a cosine."""
    duration = args.exploration_fraction * args.total_timesteps
    t = step / duration if duration else np.inf
    progress = 1 - np.exp(-t) if args.exploration == "exponential" else min(t, 1.0)
    progress = (1 - np.cos(np.pi * progress)) / 2 if args.exploration == "cosine" else progress
    return args.start_e + progress * (args.end_e - args.start_e)


@torch.inference_mode()
def act(q_network, obs: np.ndarray, epsilon: float, rng, device) -> np.ndarray:
    """Epsilon-greedy: argmax_a Q(s, a), or with probability epsilon any action, (n,) int64."""
    q_values = q_network(torch.from_numpy(obs).to(device))  # (n, A)
    actions = q_values.cpu().numpy().argmax(axis=1)
    for i in range(len(actions)):
        if rng.random() < epsilon:
            actions[i] = rng.integers(q_network.n_actions)
    return actions


def tip_height(state: np.ndarray) -> float:
    """Of the state (theta_1, theta_2, ...), relative to the pivot; each link is 1 long."""
    return -np.cos(state[0]) - np.cos(state[0] + state[1])


def reward_height(env):
    """The environment with --reward tip-height: r = height of the tip in s' - 1, the line's."""
    return gym.wrappers.TransformReward(env, lambda _: tip_height(env.unwrapped.state) - 1)


def main(args: Args) -> None:
    if args.stop_return is None and args.env_id.startswith("Acrobot-"):
        args.stop_return = -90.0 if args.reward == "env" else -200.0
    run = Run(args)  # progress bar, logs, evaluations, checkpoints
    limit = args.max_episode_steps or None
    envs = make_envs(args.env_id, args.num_envs, args.seed, max_episode_steps=limit)
    if args.reward == "tip-height":
        envs.envs = [reward_height(env) for env in envs.envs]
    q_network = QNetwork(envs.obs_space, envs.n_actions, args.hidden_sizes).to(run.device)
    optimizer = make_optimizer(q_network, args)
    learner = {"q_network": q_network, "optimizer": optimizer}
    run.start(learner, None, envs)  # what a checkpoint holds; --resume loads it here
    loss_fn = torch.compile(td_loss) if args.compile else td_loss
    obs, loss, q_taken = envs.reset(), None, None  # None until the first update
    for global_step in run.steps():  # 0, num_envs, 2 num_envs, ...; Ctrl-C ends it early
        # ---- 1. act ------------------------------------------------------------------------------
        epsilon = epsilon_at(global_step, args)
        actions = act(q_network, obs, epsilon, run.rng, run.device)
        # ---- 2. step -----------------------------------------------------------------------------
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        # ---- 3. only a termination makes s' terminal; a time limit (truncation) does not ---------
        discounts = args.gamma * np.float32(1 - terminations)
        transitions = (obs, actions, rewards, next_obs, discounts)
        batch = Batch(*(torch.from_numpy(x).to(run.device) for x in transitions))
        obs = envs.reset(terminations | truncations)  # a new episode where one has ended
        # ---- 4. learn from these transitions, then forget them -----------------------------------
        loss, _, q_taken = loss_fn(q_network, batch, args)
        optimizer.zero_grad()
        loss.backward()
        run.anneal(optimizer)
        optimizer.step()

        run.log(infos["episodes"], epsilon, loss, q_taken)


# ==================================================================================================
# End of Q-learning. Below, as in dqn_cartpole.py: environments, logs, evaluation, checkpoints.
# ==================================================================================================

import contextlib
import ctypes
import importlib.util
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections import deque
from dataclasses import asdict, fields
from pathlib import Path

import gymnasium as gym
import tyro
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class RunArgs(Args):
    exp_name: str = Path(__file__).stem  # part of the name of the run's folder under `runs/`
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the networks; `auto`: the GPU if any
    torch_threads: int = 1  # CPU threads of torch; 0 leaves torch's own choice
    compile: bool = False  # torch.compile the loss (needs a C++ compiler; 30 s at the first update)
    track: bool = False  # log to Weights & Biases too (needs `pip install wandb`)
    wandb_project_name: str = "cleanq"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    capture_video: bool = False  # film each evaluation (needs `pip install moviepy pygame`)
    log_frequency: int = 1_000  # environment steps between two log entries
    eval_frequency: int = 25_000  # environment steps between two evaluations; 0: only the last one
    eval_episodes: int = 100  # episodes per evaluation; 0: no evaluation
    eval_e: float = 0.0  # epsilon while evaluating
    eval_max_steps: int = 10_000  # longest evaluated episode if the environment sets no limit
    stop_return: float | None = None  # stop when the mean of the last 100 episodes reaches this
    checkpoint_frequency: int = 50_000  # environment steps between checkpoints; 0: only the last
    checkpoint_replay: bool = False  # save the replay too: a resumed run is bit-identical on a CPU
    resume: str | None = None  # checkpoint to go on from; its arguments apply unless given again
    evaluate: str | None = None  # checkpoint to evaluate; nothing is trained


NOTEBOOK = "ipykernel" in sys.modules  # %run in a cell: streams and SIGTERM are the kernel's
VIDEO_PACKAGES = ("moviepy", "pygame")  # what --capture-video needs
FRAMES_PER_SECOND = 30  # of a film
FIXED_WITH_REPLAY = ()  # there is no replay
# Defaults for MinAtar: those of Obando-Ceron and Castro, 2021, arXiv:2011.14826, but for the steps
# (10M), the network (theirs has no hidden layer after the convolution) and the annealed rate.
ENV_DEFAULTS = {
    "MinAtar/": {
        "total_timesteps": 1_000_000,
        "learning_rate": 2.5e-4,
        "adam_eps": 0.01 / 32,
        "buffer_size": 100_000,
        "target_network_frequency": 1_000,
        "batch_size": 32,
        "loss": "mse",
        "end_e": 0.01,
        "exploration_fraction": 0.25,
        "learning_starts": 1_000,
        "train_frequency": 4,
        "eval_frequency": 100_000,
    }
}


class Windows(nn.Module):
    """(B, H, W, C) uint8 -> (B, H - 2, W - 2, 9 C) float32: the 3x3 window around each cell."""

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return obs.float().unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)


class Layers(nn.Sequential):
    """nn.Sequential without the overhead of a module call for each layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self._modules.values():
            plain = type(layer) is nn.Linear  # without its slow look-up of parameters
            x = nn.functional.linear(x, *layer._parameters.values()) if plain else layer.forward(x)
        return x


def make_features(shape: tuple, hidden: tuple) -> tuple[nn.Sequential, int]:
    """The hidden layers for observations of this shape, and the size of the last one."""
    if len(shape) == 1:
        layers = []
        for n_inputs, n_outputs in zip([*shape, *hidden], hidden):
            layers += [nn.Linear(n_inputs, n_outputs), nn.ReLU(inplace=True)]
        return Layers(*layers), hidden[-1]
    height, width, channels = shape  # the network of Young and Tian, 2019, arXiv:1903.03176
    # A 3x3 convolution with 16 channels, as one matrix product: on a CPU faster than nn.Conv2d.
    convolution = Layers(Windows(), nn.Linear(9 * channels, 16))
    linear, relu = nn.Linear(16 * (height - 2) * (width - 2), 128), nn.ReLU(inplace=True)
    return Layers(convolution, relu, nn.Flatten(), linear, relu), 128


class Adam:
    """Adam (Kingma and Ba, 2015), from PyTorch's fused kernel.

    torch.optim.Adam calls the same kernel. On small networks its checks take longer than the
    kernel does, and importing it takes a second.
    """

    def __init__(self, parameters: list, lr: float, eps: float, max_grad_norm: float):
        self.param_groups = [{"params": parameters, "lr": lr, "eps": eps}]
        self.max_grad_norm = max_grad_norm
        means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        counts = [torch.zeros((), device=parameters[0].device)] * len(parameters)  # one tensor
        self.state = (means, squares, counts)

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        (group,), (means, squares, counts) = self.param_groups, self.state
        parameters, gradients = group["params"], [p.grad for p in group["params"]]
        if self.max_grad_norm:
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            torch._foreach_mul_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        counts[0].add_(1)
        rates = {"lr": group["lr"], "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0}
        options = rates | {"eps": group["eps"], "amsgrad": False, "maximize": False}
        torch._fused_adam_(parameters, gradients, means, squares, [], counts, **options)

    def state_dict(self) -> dict:
        return {"state": self.state}

    def load_state_dict(self, saved: dict) -> None:
        for tensors, values in zip(self.state, saved["state"], strict=True):
            torch._foreach_copy_(tensors, values)


def make_optimizer(q_network: nn.Module, args: Args):
    """The --optimizer. Its step first clips the gradient to --max-grad-norm, unless that is 0."""
    parameters, rate = [*q_network.parameters()], args.learning_rate
    if args.optimizer == "adam":
        return Adam(parameters, rate, args.adam_eps, args.max_grad_norm)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, rate, eps=args.adam_eps, amsgrad=True, fused=True)
    else:  # rmsprop, with the paper's alpha and epsilon
        optimizer = torch.optim.RMSprop(parameters, rate, alpha=0.95, eps=0.01, centered=True)
    if args.max_grad_norm:

        def clip(*_) -> None:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

        optimizer.register_step_pre_hook(clip)
    return optimizer


class Environments:
    """Environments stepped in turn. `step` never resets; `reset(over)` does, where told to.

    In a deterministic environment an episode follows from its seed and its actions: a checkpoint
    holds both and plays them again.
    """

    def __init__(self, env_id: str, num_envs: int, seed, **options):
        self.envs = [gym.make(env_id, disable_env_checker=True, **options) for _ in range(num_envs)]
        space, actions = self.envs[0].observation_space, self.envs[0].action_space
        if not isinstance(actions, gym.spaces.Discrete):
            raise ValueError(f"it has {type(actions).__name__} actions; DQN needs Discrete ones")
        shape = space.shape if isinstance(space, gym.spaces.Box) else ()
        pictures = len(shape) == 3 and shape[:2] == (10, 10)  # MinAtar's: bits, kept as bytes
        if not pictures and (len(shape) != 1 or not shape[0]):
            raise ValueError(f"it observes {space}; this file needs a vector of numbers")
        bounds = (0, 1, shape, np.uint8) if pictures else (-np.inf, np.inf, shape, np.float32)
        self.obs_space, self.n_actions = gym.spaces.Box(*bounds), int(actions.n)
        self.first_action = int(actions.start)  # the network's action 0
        self.env_id, self.num_envs, self.rng = env_id, num_envs, np.random.default_rng(seed)
        self.obs = np.zeros((num_envs, *shape), self.obs_space.dtype)
        self.seeds, self.returns, self.actions = [0] * num_envs, [0.0] * num_envs, None

    def reset(self, over: np.ndarray | None = None) -> np.ndarray:
        """Start an episode where `over`, (num_envs,) bool, or everywhere at first. -> obs"""
        if self.actions is None:
            self.actions, over = [[] for _ in self.envs], np.ones(self.num_envs, bool)
        if over is not None and over.any():
            self.obs = self.obs.copy()
            for i in np.flatnonzero(over):
                self.seeds[i] = int(self.rng.integers(2**31))
                self.returns[i], self.actions[i] = 0.0, []
                self.obs[i] = self.start(i)
            self.check_finite(self.obs.sum())
        return self.obs

    def start(self, i: int) -> np.ndarray:
        game = getattr(self.envs[i].unwrapped, "game", None)
        if hasattr(game, "last_action"):
            game.last_action = 0  # MinAtar would repeat the last action of the episode before
        return self.envs[i].reset(seed=self.seeds[i])[0]

    def check_finite(self, total: float) -> None:
        if not math.isfinite(total):
            sys.exit(f"error: {self.env_id} returned a NaN or infinite observation or reward.")

    def step(self, actions: np.ndarray):
        """-> next_obs (n, ...), rewards (n,) float32, terminations, truncations (n,) bool, infos

        infos["episodes"]: (environment, return, length) of the episodes that ended.
        """
        n, episodes, obs = self.num_envs, [], np.empty_like(self.obs)
        rewards, (terminations, truncations) = np.empty(n, np.float32), np.empty((2, n), bool)
        for i, (env, action) in enumerate(zip(self.envs, actions.tolist())):
            self.actions[i].append(action)
            obs[i], reward, terminated, truncated, _ = env.step(action + self.first_action)
            rewards[i], terminations[i], truncations[i] = reward, terminated, truncated
            self.returns[i] += float(reward)
            if terminated or truncated:
                episodes.append((i, self.returns[i], len(self.actions[i])))
        self.check_finite(obs.sum() + sum(self.returns))
        self.obs = obs
        return obs, rewards, terminations, truncations, {"episodes": episodes}

    def state_dict(self) -> dict:
        state = {k: getattr(self, k) for k in ("seeds", "returns", "actions")}
        return state | {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        self.seeds, self.returns, self.actions = (state[k] for k in ("seeds", "returns", "actions"))
        self.rng.bit_generator.state = state["rng"]
        for i, env in enumerate(self.envs):
            self.obs[i] = self.start(i)
            for action in self.actions[i]:
                self.obs[i] = env.step(action + self.first_action)[0]


def make_envs(env_id: str, num_envs: int, seed, **options) -> Environments:
    """Environments of any id with vector observations, or MinAtar's, and discrete actions."""
    if env_id.startswith("MinAtar/"):
        register_minatar()
    try:
        return Environments(env_id, num_envs, seed, **options)
    except Exception as e:  # gymnasium raises many kinds: unknown ids, missing packages
        reason = str(e).strip().split("\n")[0].rstrip(".")
        sys.exit(f"error: --env-id {env_id}: {reason}. (Atari games: dqn_atari.py.)")


def register_minatar() -> None:
    """Register MinAtar's games with gymnasium, which its package leaves to the caller."""
    if importlib.util.find_spec("minatar") is None:
        sys.exit("error: MinAtar's games need its package: pip install minatar.")
    logging.disable()  # it warns that seaborn is missing, which only a film needs
    import minatar.gym

    logging.disable(logging.NOTSET)
    if "MinAtar/Breakout-v1" not in gym.registry:
        minatar.gym.register_envs()


@torch.inference_mode()
def evaluate(q_network, args: RunArgs, device: torch.device, seed, stop=()):
    """Play whole episodes -> their unclipped returns, their `value_estimates`, (n, 2), and the
    actions of the first, for a film."""
    n, rng, latest = min(args.eval_episodes, 100), np.random.default_rng(seed), deque(maxlen=1)
    returns, estimates, first_episode, filming = [], [], [], True
    hook = q_network.register_forward_hook(lambda *call: latest.append(call[-1].cpu().numpy()))
    limit = make_envs(args.env_id, 1, seed).envs[0].spec.max_episode_steps
    envs = make_envs(args.env_id, n, seed, max_episode_steps=limit or args.eval_max_steps)
    obs, cut = envs.reset(), 0
    # Each lane plays its share of the episodes, so that short ones do not count more often.
    left = np.array([len(range(lane, args.eval_episodes, n)) for lane in range(n)])
    steps, begins = [], [0] * n  # max_a Q(s, a), r and discount of every step, (3, n) each
    while left.any() and not stop:
        actions = act(q_network, obs, args.eval_e, rng, device)
        first_episode += [int(actions[0])] if filming else []
        values = latest[0].max(axis=1)
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        if args.reward == "tip-height":  # which Q predicts
            rewards = np.array([tip_height(env.unwrapped.state) - 1 for env in envs.envs])
        scale = getattr(args, "reward_scale", 1)  # PQN's
        steps.append((values, scale * rewards, args.gamma * (1 - terminations)))
        if truncations.any():  # the values of the last states
            values = q_network(torch.from_numpy(obs).to(device)).amax(dim=1).cpu().numpy()
        for lane, episode_return, _ in infos["episodes"]:
            filming = filming and lane != 0
            if left[lane]:
                cut += truncations[lane]
                returns.append(episode_return)
                estimates.append(value_estimates(steps[begins[lane] :], lane, values[lane]))
                left[lane] -= 1
            begins[lane] = len(steps)
        obs = envs.reset(terminations | truncations)
    hook.remove()
    if cut and not limit:
        tqdm.write(f"{cut} of these episodes were cut at --eval-max-steps {args.eval_max_steps}")
    return np.array(returns), np.array(estimates), first_episode


def value_estimates(steps: list, lane: int, value: float) -> tuple[float, float]:
    """What Q predicted in an episode, and what came: means over its states.

    max_a Q(s_t, a) beside r_t + gamma r_{t+1} + ..., with the rewards and terminations of training.
    If a time limit cut the episode, `value`, the last state's max_a Q, stands for what is missing.
    """
    predicted = [values[lane] for values, _, _ in steps]
    obtained = []
    for _, rewards, discounts in reversed(steps):
        value = rewards[lane] + discounts[lane] * value
        obtained.append(value)
    return np.mean(predicted), np.mean(obtained)


def film(args: RunArgs, seed, actions: list):
    """Play an evaluation's first episode again and yield its pictures, (H, W, 3) uint8."""
    envs = make_envs(args.env_id, 1, seed, render_mode="rgb_array")
    envs.reset()
    yield envs.envs[0].render()
    for action in actions:
        envs.step(np.array([action]))
        yield envs.envs[0].render()


def prepare_torch(args: RunArgs) -> torch.device:
    """Threads, memory and seed. -> the device of the networks"""
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        # Keep freed memory in the process: mapping it again at every update costs page faults.
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-4, 0), (-1, 2**30), (-2, 2**26)):
            mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    torch.manual_seed(args.seed)
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


class Run:
    """Everything around the algorithm: counting steps, logs, evaluations, checkpoints, Ctrl-C."""

    def __init__(self, args: RunArgs):
        check_args(args)
        path = args.resume or args.evaluate
        self.saved = load_checkpoint(path) if path else {}
        self.args, self.device = args, prepare_torch(args)
        self.rng = np.random.default_rng(args.seed)
        self.first_step = self.step = self.saved.get("global_step", 0)
        self.returns = deque(self.saved.get("recent_returns", ()), maxlen=100)
        self.episodes = self.saved.get("episodes", 0)
        self.interrupted = self.saved.get("interrupted", False)  # an evaluation, by Ctrl-C
        self.stop = []  # not empty after Ctrl-C: stop after this step; a second Ctrl-C exits
        for name in ("SIGINT",) if NOTEBOOK else ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.on_signal)

    def on_signal(self, *_) -> None:
        if self.stop and time.time() - self.stop[0] > 1:  # a notebook's `!python` sends several
            sys.exit(130)
        self.stop.append(time.time())

    def start(self, learner: dict, replay, envs) -> None:
        """Load the checkpoint, if there is one, and open the log."""
        self.learner, self.replay, self.envs = learner, replay, envs
        try:
            self.load(self.saved)
        except Exception as e:  # damaged contents raise errors of many kinds
            reason = str(e).strip().split("\n")[-1].strip()
            sys.exit(f"error: the checkpoint does not fit these arguments ({reason or repr(e)}).")
        self.seconds_before, self.started = self.saved.get("seconds", 0.0), time.time()
        self.saved = {}  # frees a saved replay
        if self.args.capture_video and not can_film(self.args):
            sys.exit(f"error: --capture-video: {self.args.env_id} renders no pictures.")
        if not self.args.evaluate:
            self.open_log()

    def load(self, saved: dict) -> None:
        for name, part in self.learner.items():
            if saved and (name == "q_network" or self.args.resume):
                part.load_state_dict(saved[name])
        if self.args.resume:
            if "replay" in saved:
                self.replay.next, self.replay.size, columns = saved["replay"]
                if self.replay.next not in range(self.replay.size + 1):
                    raise ValueError(f"the replay's next row is {self.replay.next}")
                for column, rows in zip(self.replay.columns, columns, strict=True):
                    column[: self.replay.size] = rows
            self.envs.load_state_dict(saved["envs"])
            for group in self.learner["optimizer"].param_groups:
                group["lr"] = self.args.learning_rate  # it may have been given again
                if self.args.optimizer == "adamw":
                    group["eps"] = self.args.adam_eps
            self.rng.bit_generator.state = saved["rng"]
            torch.set_rng_state(saved["torch_rng"])
            if self.device.type == "cuda" and "cuda_rng" in saved:
                torch.cuda.set_rng_state(saved["cuda_rng"])

    def save(self) -> bool:
        state = {name: part.state_dict() for name, part in self.learner.items()}
        if not all(x.isfinite().all() for x in state["q_network"].values()):
            sys.exit("error: a weight is NaN or infinite.")
        if self.args.checkpoint_replay and self.replay:
            columns = [torch.from_numpy(x[: self.replay.size]) for x in self.replay.columns]
            state["replay"] = (self.replay.next, self.replay.size, columns)
        state |= {"envs": self.envs.state_dict(), "rng": self.rng.bit_generator.state}
        state["torch_rng"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        state |= {"global_step": self.step, "recent_returns": list(self.returns)}
        state["seconds"] = self.seconds_before + time.time() - self.started
        state |= {"episodes": self.episodes, "interrupted": self.interrupted}
        args = asdict(self.args) | {"resume": None, "evaluate": None}
        state |= {"script": Path(__file__).stem, "args": args}
        return save_checkpoint(self.folder / "checkpoint.pt", state)

    def open_log(self) -> None:
        args = self.args
        name = (args.env_id.replace("/", "-"), args.exp_name, args.seed, time.time_ns() // 10**6)
        run_name = "__".join(map(str, name))
        self.folder = Path(args.resume).parent if args.resume else Path("runs") / run_name
        if args.track:
            import wandb

            where = {"project": args.wandb_project_name, "entity": args.wandb_entity}
            try:
                wandb.init(**where, name=run_name, config=asdict(args), sync_tensorboard=True)
            except Exception as e:
                sys.exit(f"error: --track: {e!r}")
        # The next call raises a failed write of the log again: hide the thread's own traceback.
        threading.excepthook = lambda e: (
            None if issubclass(e.exc_type, OSError) else threading.__excepthook__(e)
        )
        table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        try:
            log = SummaryWriter(str(self.folder), purge_step=self.step + 1 if self.step else None)
            log.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{table}")
            self.writer = log.file_writer
        except OSError as e:
            sys.exit(f"error: cannot write to {self.folder} ({e.strerror}).")
        print(f"{args.exp_name}: {args.env_id}, all in {self.folder}", flush=True)
        total, interval = args.total_timesteps, 0.2 if NOTEBOOK or sys.stderr.isatty() else 30
        self.bar = tqdm(total=total, initial=self.step, unit="step", mininterval=interval)

    def steps(self):
        """Yield the number of steps taken so far; save and evaluate between two iterations."""
        args = self.args
        if args.evaluate:
            return self.evaluate()
        try:
            if self.interrupted and self.step < args.total_timesteps:
                self.evaluate()
            while self.step < args.total_timesteps and not self.stop and not self.is_solved():
                yield self.step
                save, evaluate = map(self.due, (args.checkpoint_frequency, args.eval_frequency))
                self.step += args.num_envs
                self.bar.update(args.num_envs)
                if self.step < args.total_timesteps:
                    if evaluate:  # before the checkpoint: a resumed run does not evaluate again
                        self.evaluate()
                    if save:
                        self.save()
            self.finish()
        except GeneratorExit:  # the loop was left by an error
            path = self.folder / "checkpoint.pt"
            if path.exists():
                tqdm.write(f"The last checkpoint is {path}.", file=sys.stderr)
            raise
        finally:
            self.bar.close()
            self.write({}, self.step, close=True)
            threading.excepthook = threading.__excepthook__

    def due(self, every: int) -> int:
        """How many multiples of `every` this iteration's num_envs steps reach; none of 0."""
        return (self.step + self.args.num_envs) // every - self.step // every if every else 0

    def anneal(self, optimizer) -> None:
        """--lr-schedule: the learning rate decays over the run to zero; exponentially to 1%."""
        t = self.step / self.args.total_timesteps
        factors = {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2}
        factors |= {"exponential": 0.01**t, "constant": 1.0}
        for group in optimizer.param_groups:
            group["lr"] = self.args.learning_rate * factors[self.args.lr_schedule]

    def is_solved(self) -> bool:
        goal, returns = self.args.stop_return, self.returns
        return goal is not None and len(returns) == 100 and np.mean(returns) >= goal

    def finish(self) -> None:
        """The last checkpoint and evaluation, and how to go on if steps are left."""
        self.bar.close()
        if self.step == self.first_step and not self.stop:
            print("no step was trained: raise --total-timesteps, or change --stop-return")
        elif self.is_solved():
            seconds = self.seconds_before + time.time() - self.started
            print(
                f"the last 100 episodes reached --stop-return {self.args.stop_return:g}, after "
                f"{self.episodes} episodes, {self.step} steps and {seconds:.1f} seconds"
            )
        saved = self.save()
        if self.step >= self.args.total_timesteps or self.is_solved():
            self.evaluate()
        elif saved:
            path = (self.folder / "checkpoint.pt").as_posix()  # cmd.exe takes no quotes
            command = [Path(sys.argv[0]).as_posix(), "--resume", path]
            print("go on with:", "%run" if NOTEBOOK else "python", shlex.join(command))
        if not saved:
            sys.exit(1)

    def log(self, episodes: list, epsilon: float, loss, q_values, **figures) -> None:
        """Write what CleanRL's dashboards show. Tensors are reduced to their mean, when logged."""
        args, step = self.args, self.step + self.args.num_envs
        for _, episode_return, length in episodes:
            self.returns.append(episode_return)
            self.episodes += 1
            episode = {"charts/episodic_return": episode_return, "charts/episodic_length": length}
            self.write(episode, step)
        if not self.due(args.log_frequency):
            return
        seconds = max(time.time() - self.started, 1e-9)
        figures |= {"charts/epsilon": epsilon, "losses/td_loss": loss, "losses/q_values": q_values}
        if self.returns:
            figures["charts/mean_return_100"] = np.mean(self.returns)
        figures = {k: torch.as_tensor(x).mean().item() for k, x in figures.items() if x is not None}
        if not np.isfinite(figures.get("losses/td_loss", 0.0)):
            rate = args.learning_rate
            sys.exit(f"error: the loss is not finite; try a --learning-rate below {rate}.")
        shown = {k.split("/")[1]: f"{x:.3g}" for k, x in figures.items()}
        self.bar.set_postfix(shown, refresh=False)
        figures["charts/SPS"] = (step - self.first_step) / seconds
        figures["charts/hours"] = (self.seconds_before + seconds) / 3600
        self.write(figures, step)

    def write(self, figures: dict, step: int, close: bool = False) -> None:
        """Write one event to the log, with all figures; go on without a log if that fails."""
        values = [Summary.Value(tag=name, simple_value=x) for name, x in figures.items()]
        try:
            if self.writer:
                self.writer.add_summary(Summary(value=values), step)
                if close:
                    self.writer.close()
        except OSError as e:
            self.writer = None
            tqdm.write(f"error: cannot log to {self.folder} ({e.strerror}); training continues.")

    def evaluate(self) -> None:
        """Play episodes of new seeds, which follow from --seed and the step; film the first."""
        args, q_network = self.args, self.learner["q_network"]
        if not args.eval_episodes:
            return
        seed = (args.seed, self.step + 1)
        q_network.eval()
        returns, estimates, actions = evaluate(q_network, args, self.device, seed, self.stop)
        q_network.train()
        n, self.interrupted = len(returns), bool(self.stop)
        if self.stop:
            return tqdm.write(f"evaluation stopped after {n} episodes")
        predicted, obtained = estimates.mean(axis=0)
        bias = predicted - obtained
        error = 1.96 * np.diff(estimates).std(ddof=1) / n**0.5 if n > 1 else np.nan  # of the bias
        tqdm.write(
            f"{args.env_id}, step {self.step}, evaluated: {returns.mean():.1f} +- "
            f"{returns.std():.1f} in {n} episodes; Q predicts {predicted:.4g}, true {obtained:.4g}"
        )
        if not args.evaluate:
            figures = {"eval/episodic_return": returns.mean(), "eval/predicted_value": predicted}
            figures |= {"eval/true_value": obtained, "eval/overestimation": bias}
            self.write(figures | {"eval/overestimation_ci95": error}, self.step)
        if args.capture_video:
            folder = Path(args.evaluate).parent if args.evaluate else self.folder
            save_film(folder / f"videos/step-{self.step}.mp4", film(args, seed, actions))


def can_film(args: RunArgs) -> bool:
    try:
        return next(film(args, 0, [])) is not None
    except Exception:
        return False


def save_film(path: Path, pictures) -> None:
    """Write an mp4 file; if there is one of this name, under another."""
    while path.exists():
        path = path.with_stem(path.stem + "-again")
    try:
        from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        writer = None
        for picture in pictures:
            size = picture.shape[1], picture.shape[0]
            writer = writer or FFMPEG_VideoWriter(str(path), size, FRAMES_PER_SECOND)
            writer.write_frame(picture)
        writer.close()
    except Exception as e:  # a film is not worth a training
        tqdm.write(f"error: {path} not written ({e!r})")


def save_checkpoint(path: Path, state: dict) -> bool:
    """Write atomically: the new file replaces the old one once it is on the disk."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        return True
    except (OSError, RuntimeError) as e:  # torch wraps the file's error
        cause = e if isinstance(e, OSError) else e.__context__
        reason = getattr(cause, "strerror", None) or str(e).split("\n")[0]
        kept = "; the one before it is kept" if path.exists() else ""
        tqdm.write(f"error: {path} not written ({reason.lower()}){kept}", file=sys.stderr)
        with contextlib.suppress(OSError):
            partial.unlink()
        return False


def load_checkpoint(path: str, verify: bool = True) -> dict:
    """Read a checkpoint of this script without running code from it, or exit with one line."""
    try:
        if verify and zipfile.ZipFile(path).testzip():  # torch does not, with mmap
            raise ValueError("a checksum differs")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        if state["script"] != Path(__file__).stem:
            raise ValueError(f"it was written by {state['script']}.py")
        counters = {"global_step": 0, "episodes": 0, "seconds": 0.0, "recent_returns": []}
        expected = asdict(RunArgs()) | counters
        found = state["args"] | {name: state[name] for name in counters}
        if expected.keys() != found.keys():
            raise ValueError(f"other arguments: {', '.join(expected.keys() ^ found.keys())}")
        for name, default in expected.items():
            if default is not None and type(found[name]) is not type(default):
                raise ValueError(f"its {name} is {found[name]!r}")
        if min(found["global_step"], found["episodes"]) < 0:
            raise ValueError("its step or its number of episodes is negative")
        if {type(x) for x in found["recent_returns"]} - {float}:
            raise ValueError("its returns are damaged")
        return state
    except FileNotFoundError:
        sys.exit(f"error: no checkpoint at {path}; look for runs/<run>/checkpoint.pt.")
    except Exception as e:  # damaged contents raise errors of many kinds
        reason = f"{type(e).__name__}: {e}".split("\n")[0]
        sys.exit(f"error: {path} is not a checkpoint of this script, or is damaged ({reason}).")


# CleanRL's flags, and what does the same here.
CLEANRL_FLAGS = {
    "--cuda": ["--device", "auto"],
    "--no-cuda": ["--device", "cpu"],
    "--save-model": [],  # a checkpoint is always saved
    "--no-save-model": [],
    "--torch-deterministic": [],  # a run on a CPU always is
    "--no-torch-deterministic": [],
}


def parse_args() -> RunArgs:
    """The command line. With --resume or --evaluate the defaults are the checkpoint's arguments."""
    words = []
    for word in sys.argv[1:]:
        words += CLEANRL_FLAGS.get(word.replace("_", "-"), [word])
    args = tyro.cli(RunArgs, args=words)
    for prefix, defaults in ENV_DEFAULTS.items():
        if args.env_id.startswith(prefix):
            known = {k: v for k, v in defaults.items() if hasattr(RunArgs, k)}
            args = tyro.cli(RunArgs, args=words, default=RunArgs(**known))
    path = args.resume or args.evaluate
    if not path:
        return args
    if args.resume and args.evaluate:
        sys.exit("error: give --resume or --evaluate, not both.")
    checkpoint = load_checkpoint(path, verify=False)  # Run verifies it
    saved = checkpoint["args"]
    if args.evaluate:  # keep the agent's arguments, not those of the logs and the hardware
        algorithm = {field.name for field in fields(Args)}
        kept = ("eval_", "fire_")  # fire_reset
        saved = {k: v for k, v in saved.items() if k in algorithm or k.startswith(kept)}
    args = tyro.cli(RunArgs, args=words, default=RunArgs(**saved))
    if args.evaluate:  # nothing is stored or learned
        args.buffer_size = args.learning_starts = 1_100 * args.num_envs
        args.batch_size, args.eval_episodes = 1, args.eval_episodes or RunArgs.eval_episodes
        return args
    fixed = ("env_id", "num_envs", "optimizer", "fire_reset")
    fixed += FIXED_WITH_REPLAY if "replay" in checkpoint else ()
    for name in fixed:
        if name in saved and getattr(args, name) != saved[name]:
            flag = "--" + name.replace("_", "-")
            sys.exit(f"error: {flag} cannot change in a resumed run; leave it at {saved[name]}.")
    return args


def check_args(args: RunArgs) -> None:
    """Exit with one line that says which argument is wrong, before anything is written."""

    def must(name: str, rule: str, holds: bool) -> None:
        if not holds:
            flag = "--" + name.replace("_", "-")
            sys.exit(f"error: {flag} must be {rule} (it is {getattr(args, name)}).")

    fractions = ("gamma", "tau", "start_e", "end_e", "exploration_fraction", "eval_e")
    or_zero = ("seed", "torch_threads", "eval_frequency", "eval_episodes", "checkpoint_frequency")
    or_zero += ("max_grad_norm",)
    positive = ("num_envs", "total_timesteps", "learning_rate", "buffer_size", "batch_size")
    positive += ("target_network_frequency", "learning_starts", "train_frequency", "n_step")
    positive += ("log_frequency", "eval_max_steps", "eval_max_frames", "adam_eps")
    for name, value in asdict(args).items():
        if name in fractions:
            must(name, "between 0 and 1", 0 <= value <= 1)
        elif name in or_zero:
            must(name, "0 or more, and below 2**63", 0 <= value < 2**63)
        elif name in positive:
            must(name, "positive, and below 2**63", 0 < value < 2**63)
        elif isinstance(value, float):
            must(name, "a finite number", np.isfinite(value))
    for rule in args.rules() if hasattr(args, "rules") else ():  # of a child: declared in Args
        must(*rule)
    must("torch_threads", "at most 1024", args.torch_threads <= 1024)
    on_gpu = args.device != "cuda" or torch.cuda.is_available()
    must("device", "cpu or auto where torch finds no GPU", on_gpu)
    for package, flag in (*((x, "capture_video") for x in VIDEO_PACKAGES), ("wandb", "track")):
        holds = not getattr(args, flag) or importlib.util.find_spec(package) is not None
        must(flag, f"off where {package} is missing: pip install {package}", holds)
    compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
    must("compile", "off where there is no C++ compiler", compiler or not args.compile)
    check_replay_args(args, must)


def check_replay_args(args: RunArgs, must) -> None:
    """There is no replay."""


class Output:
    """stdout or stderr. If it is closed or full, its messages are dropped and the run goes on."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: closed from the start
        with contextlib.suppress(AttributeError):  # IDLE's
            self.stream.reconfigure(errors="replace")  # what it cannot encode

    def __getattr__(self, name: str):
        def attempt(*args):
            try:
                return getattr(self.stream, name)(*args)
            except (OSError, ValueError):
                self.stream = open(os.devnull, "w")

        return attempt if name in ("write", "flush") else getattr(self.stream, name)


if __name__ == "__main__":
    if not NOTEBOOK:
        sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    main(parse_args())
