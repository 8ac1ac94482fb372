"""Parallelised Q-Network (PQN) on Atari. Gallici et al., 2024, arXiv:2407.04811.

    G_t = r_t + gamma (1 - terminated_t) [lambda G_{t+1} + (1 - lambda) max_a Q(s_{t+1}, a)]
    theta <- theta - lr grad 1/2 (G_t - Q(s_t, a_t; theta))^2

E games take T steps each; the E T transitions are used for a few epochs, then discarded.
LayerNorm bounds what the last layer sees, which keeps Q-learning stable without theta^-. Many games
at once make the transitions of a minibatch differ, as a replay would.

Parent: dqn_atari.py. What changes: a rollout instead of the replay, lambda-returns, LayerNorm; no
target network.

Deviations from the paper, and from its code where the paper is silent:
1. A truncated episode bootstraps from its true last observation. The authors' code and CleanRL's
   treat truncation as termination.
2. 10M agent steps (paper: 50M). LayerNorm's epsilon 1e-5 (1e-6); the weights' normal distribution
   is not truncated; the head has PyTorch's default initialisation.
3. Evaluation with epsilon 0.01 (0). Steps after the last whole rollout are not used.
4. FIRE is pressed once, when a game starts; the agent must do it after a life.

Run: python algos/pqn_atari.py --env-id BreakoutNoFrameskip-v4
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn


@dataclass
class Args:  # the algorithm's; RunArgs, below the line, adds --device, --resume and so on
    env_id: str = "BreakoutNoFrameskip-v4"  # any Atari game; ALE/Pong-v5 has sticky actions
    num_envs: int = 128  # E, games played in parallel
    num_steps: int = 32  # T, steps of each game between two rounds of updates
    seed: int = 1  # of the games, the network, exploration and minibatches
    total_timesteps: int = 10_000_000  # agent steps, summed over the games; one is four frames
    learning_rate: float = 2.5e-4  # of the optimizer
    optimizer: Literal["radam", "adam"] = "radam"
    adam_eps: float = 1e-8  # epsilon of both
    max_grad_norm: float = 10.0  # gradients are clipped to this norm; 0: they are not
    gamma: float = 0.99  # discount factor
    q_lambda: float = 0.65  # lambda: 0 gives one-step targets, 1 the sum of the rewards
    num_minibatches: int = 32  # updates per epoch
    update_epochs: int = 2  # passes over the E T transitions, each in a new random order
    start_e: float = 1.0  # epsilon at the first step
    end_e: float = 0.001  # epsilon once it has decayed
    exploration: Literal["linear", "exponential", "cosine"] = "linear"  # how epsilon decays
    exploration_fraction: float = 0.10  # decay time (exponential: time constant) / total_timesteps

    def rules(self) -> list:
        n = self.num_envs * self.num_steps
        return [
            ("num_steps", "positive", self.num_steps > 0),
            ("q_lambda", "between 0 and 1", 0 <= self.q_lambda <= 1),
            ("update_epochs", "positive", self.update_epochs > 0),
            ("num_minibatches", f"between 1 and {n}, E T", 1 <= self.num_minibatches <= n),
        ]


class Batch(NamedTuple):
    obs: torch.Tensor  # s, the last 4 frames, (B, 4, 84, 84) uint8
    actions: torch.Tensor  # a, (B,) int64
    returns: torch.Tensor  # G^lambda, (B,) float32


class Rollout:
    """The newest T steps of E games, one column per field, (T, E, ...)."""

    NAMES = ("obs", "actions", "rewards", "discounts", "truncations", "steps")

    def __init__(self, num_steps: int, num_envs: int, device: torch.device):
        self.device, self.size, shape = device, 0, (num_steps, num_envs)
        self.obs = np.zeros((num_steps + 1, num_envs, 4, 84, 84), np.uint8)  # with the newest s'
        self.actions = np.zeros(shape, np.int64)
        self.rewards, self.discounts = np.zeros((2, *shape), np.float32)
        # Whether a game was cut off, and whether it took a step: it does not while it is reset.
        self.truncations, self.steps = np.zeros((2, *shape), bool)

    def add(self, obs, actions, rewards, next_obs, discounts, truncations, steps) -> None:
        """Store one step of each game, arrays of shape (E, ...)."""
        t = self.size
        self.obs[t], self.actions[t], self.rewards[t] = obs, actions, rewards
        self.obs[t + 1] = next_obs  # s'; the next step writes the same frames here again
        self.discounts[t], self.truncations[t], self.steps[t] = discounts, truncations, steps
        self.size += 1

    def take(self, q_network, args) -> Batch:
        """All transitions with their lambda-returns; the rollout is empty afterwards."""
        obs, actions, rewards, discounts, truncations, steps = (
            torch.from_numpy(getattr(self, name)).to(self.device) for name in self.NAMES
        )
        with torch.no_grad():  # max_a Q(s_{t+1}, a), (T, E)
            next_values = torch.stack([q_network(x).amax(dim=1) for x in obs[1:]])
        returns = lambda_returns(rewards, discounts, truncations, next_values, args.q_lambda)
        self.size = 0
        return Batch(*(x[steps] for x in (obs[:-1], actions, returns)))

    def state_dict(self) -> dict:
        state = {name: torch.from_numpy(getattr(self, name).copy()) for name in self.NAMES}
        return state | {"size": self.size}

    def load_state_dict(self, state: dict) -> None:
        for name in self.NAMES:
            getattr(self, name)[:] = state[name].numpy()
        self.size = state["size"]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel, (B, C, H, W), as in the authors' code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, 3)).movedim(3, 1)


class QNetwork(nn.Module):
    """(B, 4, 84, 84) frames -> (B, A) action values; LayerNorm before each ReLU."""

    def __init__(self, n_actions: int):
        super().__init__()
        self.n_actions = n_actions
        self.features = Features(  # nn.Sequential, tuned for the device; see below the line
            *(nn.Conv2d(4, 32, 8, stride=4), ChannelNorm(32), nn.ReLU()),  # (B, 32, 20, 20)
            *(nn.Conv2d(32, 64, 4, stride=2), ChannelNorm(64), nn.ReLU()),  # (B, 64, 9, 9)
            *(nn.Conv2d(64, 64, 3, stride=1), ChannelNorm(64), nn.ReLU()),  # (B, 64, 7, 7)
            nn.Flatten(),
            *(nn.Linear(64 * 7 * 7, 512), nn.LayerNorm(512), nn.ReLU()),
        )
        for layer in self.features:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.head = nn.Linear(512, n_actions)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(scaled(obs)))  # scaled: uint8 / 255


def lambda_returns(rewards, discounts, truncations, next_values, q_lambda: float) -> torch.Tensor:
    """G_t = r_t + gamma (1 - terminated) [lambda G_{t+1} + (1 - lambda) max_a Q(s_{t+1}, a)]

    All (T, E). Where G_{t+1} is not of this episode, or not known yet, the value stands for it.
    """
    returns, following = torch.empty_like(rewards), next_values[-1]
    for t in reversed(range(len(rewards))):
        mixed = q_lambda * following + (1 - q_lambda) * next_values[t]
        mixed = torch.where(truncations[t], next_values[t], mixed)  # s_{t+1} was the last one
        returns[t] = following = rewards[t] + discounts[t] * mixed  # discounts: 0 if terminated
    return returns


def td_loss(q_network, batch: Batch, args: Args):
    """-> the loss, a scalar; TD errors, (B,); Q(s, a), (B,)"""
    q_taken = q_network(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)  # Q(s, a), (B,)
    td_error = batch.returns - q_taken
    return td_error.square().mean() / 2, td_error.detach(), q_taken.detach()


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


def main(args: Args) -> None:
    run = Run(args)  # progress bar, logs, evaluations, checkpoints
    envs = make_envs(args.env_id, args.num_envs, args.seed, use_fire_reset=args.fire_reset)
    q_network = QNetwork(envs.n_actions).to(run.device)
    optimizer = make_optimizer(q_network, args)
    rollout = Rollout(args.num_steps, args.num_envs, run.device)
    learner = {"q_network": q_network, "optimizer": optimizer}
    run.start(learner, rollout, envs)  # what a checkpoint holds; --resume loads it here
    loss_fn = torch.compile(td_loss) if args.compile else td_loss
    (obs, _), loss, q_taken = envs.reset(), None, None  # None until the first update
    for global_step in run.steps():  # 0, num_envs, 2 num_envs, ...; Ctrl-C ends it early
        # ---- 1. act ------------------------------------------------------------------------------
        epsilon = epsilon_at(global_step, args)
        actions = act(q_network, obs, epsilon, run.rng, run.device)
        # ---- 2. step: a game that is over is reset by the next step, which ignores its action ----
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        # ---- 3. store ----------------------------------------------------------------------------
        discounts, steps = args.gamma * (1 - terminations), ~infos["episode_starts"]
        rollout.add(obs, actions, np.clip(rewards, -1, 1), next_obs, discounts, truncations, steps)
        obs = next_obs

        if rollout.size == args.num_steps:
            # ---- 4. learn from these transitions, then forget them -------------------------------
            data = rollout.take(q_network, args)
            for _ in range(args.update_epochs):
                order = torch.randperm(len(data.actions), device="cpu").to(run.device)
                for rows in filter(len, order.tensor_split(args.num_minibatches)):
                    batch = Batch(*(x[rows] for x in data))
                    loss, _, q_taken = loss_fn(q_network, batch, args)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

        run.log(infos["episodes"], epsilon, loss, q_taken)


# ==================================================================================================
# End of PQN. Below, the same as in every *_atari.py but for the replay of frames, which PQN lacks:
# games, logs, evaluation, checkpoints and speed.
# ==================================================================================================

import contextlib
import ctypes
import importlib.util
import os
import re
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
from ale_py.vector_env import AtariVectorEnv
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class RunArgs(Args):
    exp_name: str = Path(__file__).stem  # part of the name of the run's folder under `runs/`
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the networks; `auto`: the GPU if any
    torch_threads: int = 0  # CPU threads of torch; 0 leaves torch's own choice
    # Of all layers but the last; `auto`: bfloat16 on a CPU with instructions for it, else float32
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False  # torch.compile the loss (needs a C++ compiler; 30 s at the first update)
    track: bool = False  # log to Weights & Biases too (needs `pip install wandb`)
    wandb_project_name: str = "cleanq"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    capture_video: bool = False  # film each evaluation (needs `pip install moviepy`)
    log_frequency: int = 1_000  # agent steps between two log entries
    eval_frequency: int = 250_000  # agent steps between two evaluations; 0: only the last one
    eval_episodes: int = 10  # whole games per evaluation; 0: no evaluation
    eval_e: float = 0.01  # epsilon while evaluating
    eval_max_frames: int = 108_000  # longest evaluated game; 60 frames are one second of play
    fire_reset: bool = True  # press FIRE when a game starts, where it has that button
    stop_return: float | None = None  # stop when the mean of the last 100 games reaches this
    checkpoint_frequency: int = 100_000  # agent steps between checkpoints; 0: only the last
    checkpoint_replay: bool = False  # save the rollout too: a resumed run is bit-identical on a CPU
    resume: str | None = None  # checkpoint to go on from; its arguments apply unless given again
    evaluate: str | None = None  # checkpoint to evaluate; nothing is trained


NOTEBOOK = "ipykernel" in sys.modules  # %run in a cell: streams and SIGTERM are the kernel's
VIDEO_PACKAGES = ("moviepy",)  # what --capture-video needs
FRAMES_PER_SECOND = 60  # of a film: those of the game
FIXED_WITH_REPLAY = ("gamma", "num_steps")  # what a saved rollout depends on
ENV_DEFAULTS = {}  # defaults that depend on --env-id


class Features(nn.Sequential):
    """nn.Sequential with the same parameters, computed the fastest way on each device.

    Images are channels-last; the first Linear takes the image flattened by row, column, channel, as
    it lies in memory. With --precision bfloat16 the layers compute in bfloat16, and weights and the
    result are float32.
    """

    bfloat16 = False  # --precision

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        self.to(memory_format=torch.channels_last)
        for before, layer in zip(layers, layers[1:]):
            if isinstance(layer, nn.ReLU):  # PQN's norm returns a view, slow to change in place
                layer.inplace = not isinstance(before, nn.LayerNorm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            for layer in self:
                flatten = isinstance(layer, nn.Flatten)
                x = x.permute(0, 2, 3, 1).flatten(1) if flatten else layer(x)
        return x.to(self[0].weight.dtype)


def scaled(obs: torch.Tensor) -> torch.Tensor:
    """uint8 frames -> float32 in [0, 1], channels-last; fastreplay's frames are that already."""
    raw = obs.dtype == torch.uint8
    return obs.to(torch.float32, memory_format=torch.channels_last) / 255 if raw else obs


class Games(AtariVectorEnv):
    """Atari games on native threads, with returns of whole games and an exact state_dict.

    84x84 grey, 4 frames a step (maximum of the last 2); stacks of 4, zeros before the first. A game
    starts with a random number of no-ops, up to 30, and then FIRE (--fire-reset).
    A life lost sets `terminated` and the game goes on. A game that is over is reset by the *next*
    step, which ignores its action (NEXT_STEP); `infos["episode_starts"]` then says so.

    The emulator is deterministic, so a game follows from its seed and its actions: a checkpoint
    holds both and plays them again. A new seed every 5,000 steps or so keeps them few.
    """

    def __init__(self, game: str, num_envs: int, seed, **options):
        super().__init__(game, num_envs, reward_clipping=False, **options)
        self.rng, self.obs = np.random.default_rng(seed), None
        self.n_actions = int(self.single_action_space.n)

    def reset(self):
        """New games, or those of load_state_dict. -> obs (num_envs, 4, 84, 84) uint8, starts"""
        if self.obs is None:
            n = self.num_envs
            self.seeds, self.histories = self.rng.integers(2**31, size=n), [[] for _ in range(n)]
            self.returns, self.lengths = np.zeros(n), np.zeros(n, np.int64)
            self.starts = np.ones(n, bool)  # whether the current frame opens an episode
            self.replay_actions()
        return self.obs, self.starts

    def replay_actions(self) -> None:
        """Play the actions of every game again, from its seed."""
        self.obs, infos = super().reset(seed=self.seeds)
        longest = max(map(len, self.histories))
        for t in range(-longest, 1):  # shorter histories start later, so that all end together
            first = np.array([len(history) == -t for history in self.histories])
            if first.any():
                options = {"reset_mask": first}
                self.obs, infos = super().reset(seed=self.seeds[first], options=options)
            if t < 0:
                actions = [history[t] if len(history) >= -t else 0 for history in self.histories]
                super().send(np.array(actions))
                self.obs, *_, infos = super().recv()
        self.frame_numbers = infos["episode_frame_number"]

    def send(self, actions: np.ndarray) -> None:
        """Start a step of every game with its action, (num_envs,) int64, and return at once."""
        for history, action in zip(self.histories, actions.tolist()):
            history.append(action)
        super().send(actions)

    def recv(self):
        """Wait for the step. `infos["episodes"]`: (game, return, length) of those just reset."""
        obs, rewards, terminations, truncations, infos = super().recv()
        self.starts = (
            infos["episode_frame_number"] <= self.frame_numbers
        )  # it did not rise: a reset
        self.returns += rewards
        self.lengths += ~self.starts
        over = np.flatnonzero(self.starts)
        episodes = [(game, float(self.returns[game]), int(self.lengths[game])) for game in over]
        self.returns[over] = self.lengths[over] = 0
        stale = self.starts & np.array([len(history) > 5_000 for history in self.histories])
        if stale.any():
            self.seeds[stale] = self.rng.integers(2**31, size=stale.sum())
            self.histories = [[] if fresh else h for fresh, h in zip(stale, self.histories)]
            obs, infos = super().reset(seed=self.seeds[stale], options={"reset_mask": stale})
        self.frame_numbers = infos["episode_frame_number"]
        infos |= {"episode_starts": self.starts, "episodes": episodes}
        return obs, rewards, terminations, truncations, infos

    def step(self, actions: np.ndarray):
        self.send(actions)
        return self.recv()

    def state_dict(self) -> dict:
        names = ("seeds", "returns", "lengths", "starts")
        arrays = {name: torch.tensor(getattr(self, name)) for name in names}
        histories = [torch.tensor(history, dtype=torch.uint8) for history in self.histories]
        return arrays | {"histories": histories, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.histories = [history.tolist() for history in state["histories"]]
        for name in ("seeds", "returns", "lengths", "starts"):
            setattr(self, name, state[name].numpy().copy())
        self.replay_actions()


class RMSProp(torch.optim.Optimizer):
    """RMSProp as in the paper (extended data table 1, and the authors' code). For each weight:

        m <- 0.95 m + 0.05 g,    n <- 0.95 n + 0.05 g^2,    w <- w - lr g / sqrt(n - m^2 + 0.01)

    The paper's gradient g is a sum over the batch, and ours a mean. So 0.01 becomes 0.01 / B^2.
    In torch.optim.RMSprop the epsilon stands outside the root, which makes other steps.
    """

    def __init__(self, parameters, lr: float, batch_size: int):
        super().__init__(parameters, {"lr": lr, "eps": 0.01 / batch_size**2})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = {"m": torch.zeros_like(p), "n": torch.zeros_like(p)}
                m, n = self.state[p]["m"], self.state[p]["n"]
                m.lerp_(p.grad, 0.05)
                n.lerp_(p.grad**2, 0.05)
                root = (n - m**2 + group["eps"]).sqrt()
                p.addcdiv_(p.grad, root, value=-group["lr"])


def make_optimizer(q_network: nn.Module, args: Args) -> torch.optim.Optimizer:
    """The --optimizer. Its step first clips the gradient to --max-grad-norm, unless that is 0."""
    parameters, rate = [*q_network.parameters()], args.learning_rate
    kind = torch.optim.RAdam if args.optimizer == "radam" else torch.optim.Adam
    optimizer = kind(parameters, rate, eps=args.adam_eps)
    if args.max_grad_norm:

        def clip(*_) -> None:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

        optimizer.register_step_pre_hook(clip)
    return optimizer


def make_envs(env_id: str, num_envs: int, seed, **options) -> Games:
    """The games of a v4 or v5 id, with the sticky actions that the id stands for."""
    try:
        kwargs = dict(gym.spec(env_id).kwargs)
    except gym.error.Error as e:
        sys.exit(f"error: --env-id {env_id}: {e} Ids look like PongNoFrameskip-v4 or ALE/Pong-v5.")
    if "game" not in kwargs:
        sys.exit(f"error: --env-id {env_id} is not an Atari game; try algos/dqn_cartpole.py.")
    names = ("game", "repeat_action_probability", "full_action_space", "max_num_frames_per_episode")
    options = {name: kwargs.pop(name) for name in names if name in kwargs} | options
    if kwargs.pop("frameskip", 4) not in (1, 4) or kwargs:  # 1: a wrapper's; ours is 4
        game = re.sub(r"^ALE/|(NoFrameskip)?-v\d+$", "", env_id)
        sys.exit(
            f"error: --env-id {env_id} skips a random number of frames or has settings that are "
            f"not supported; take {game}NoFrameskip-v4 or ALE/{game}-v5."
        )
    return Games(num_envs=num_envs, seed=seed, life_loss_info=True, **options)


@torch.inference_mode()
def evaluate(q_network, args: RunArgs, device: torch.device, seed, stop=()):
    """Play whole games -> their unclipped returns, their `value_estimates`, (n, 2), and of the
    first game all actions and their values, for a film."""
    n, rng, latest = min(args.eval_episodes, 10), np.random.default_rng(seed), deque(maxlen=1)
    returns, estimates, first_game, filming = [], [], [], True
    hook = q_network.register_forward_hook(lambda *call: latest.append(call[-1].cpu().numpy()))
    envs = make_envs(args.env_id, n, seed, **evaluation_options(args))
    obs, _ = envs.reset()
    # Each lane plays its share of the episodes, so that short ones do not count more often.
    left = np.array([len(range(lane, args.eval_episodes, n)) for lane in range(n)])
    steps, begins = [], [0] * n  # max_a Q(s, a), r and discount of every step, (3, n) each
    while left.any() and not stop:
        actions = act(q_network, obs, args.eval_e, rng, device)
        first_game += [(int(actions[0]), latest[0][0].tolist())] if filming else []
        values = latest[0].max(axis=1)
        obs, rewards, terminations, _, infos = envs.step(actions)
        steps.append((values, np.clip(rewards, -1, 1), args.gamma * (1 - terminations)))
        for lane, episode_return, _ in infos["episodes"]:
            filming = filming and lane != 0
            if left[lane]:
                returns.append(episode_return)  # the last step was a reset: its state is the end
                estimates.append(value_estimates(steps[begins[lane] : -1], lane, values[lane]))
                left[lane] -= 1
            begins[lane] = len(steps)
    hook.remove()
    return np.array(returns), np.array(estimates), first_game


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


def evaluation_options(args: RunArgs) -> dict:
    return {
        "max_num_frames_per_episode": args.eval_max_frames,
        "use_fire_reset": args.fire_reset,
    }


def film(args: RunArgs, seed, steps: list):
    """Play an evaluation's first game again, from its actions and their values.

    Yields its pictures, (420, 480, 3) uint8: every frame in colour and twice its size, or rather
    the maximum of it and the one before, as some games draw half of their objects in each. On the
    right are the action values, with the chosen action in another colour.
    """
    options = evaluation_options(args) | {"frameskip": 1, "stack_num": 1}
    options |= {"grayscale": False, "img_height": 210, "img_width": 160}
    envs = make_envs(args.env_id, 1, seed, **options)
    names = [action.name for action in envs.ale.get_action_set()]
    known = [x for _, q_values in steps for x in q_values or ()]
    scale = min(known, default=0.0), max(known, default=1.0)
    before = frame = envs.reset()[0][0, 0]
    for action, q_values in [*steps, (0, None)]:
        strip = draw_action_values(names, action, q_values, scale)
        for _ in range(4):  # frames that an action takes
            picture = np.maximum(before, frame).repeat(2, axis=0).repeat(2, axis=1)
            yield np.concatenate([picture, strip], axis=1)
            obs, *_, infos = envs.step(np.array([action]))
            if infos["episode_starts"][0]:  # the next game
                return
            before, frame = frame, obs[0, 0]


def draw_action_values(names: list, chosen: int, q_values, scale) -> np.ndarray:
    """A bar for each action, from the lowest to the highest value of the film. -> (420, 160, 3)"""
    from PIL import Image, ImageDraw  # comes with moviepy

    image = Image.new("RGB", (160, 420), "black")
    draw, (lowest, highest) = ImageDraw.Draw(image), scale
    draw.text((8, 6), "action values", fill="white")
    for i, name in enumerate(names):
        y, colour = 26 + 21 * i, "orange" if i == chosen else "lightgray"
        draw.text((8, y), name.lower(), fill=colour)
        if q_values:
            draw.text((152, y), f"{q_values[i]:.2f}", fill=colour, anchor="ra")
            length = 144 * (q_values[i] - lowest) / max(highest - lowest, 1e-9)
            draw.rectangle((8, y + 13, 8 + length, y + 16), fill=colour)
    return np.asarray(image)


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32, by AVX-512 or AMX."""
    with contextlib.suppress(OSError):  # Linux only
        return bool({"avx512_bf16", "amx_bf16"} & {*Path("/proc/cpuinfo").read_text().split()})
    return False


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
    if args.precision == "auto":
        args.precision = "float32" if on_gpu or not multiplies_bfloat16() else "bfloat16"
    Features.bfloat16 = args.precision == "bfloat16"
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
        if self.args.resume:  # the learning rate and so on may have been given again
            groups = self.learner["optimizer"].state_dict()["param_groups"]
            saved["optimizer"]["param_groups"] = groups
        for name, part in self.learner.items():
            if saved and (name == "q_network" or self.args.resume):
                part.load_state_dict(saved[name])
        if self.args.resume:
            if "replay" in saved:
                self.replay.load_state_dict(saved["replay"])
            self.envs.load_state_dict(saved["envs"])
            self.rng.bit_generator.state = saved["rng"]
            torch.set_rng_state(saved["torch_rng"])
            if self.device.type == "cuda" and "cuda_rng" in saved:
                torch.cuda.set_rng_state(saved["cuda_rng"])

    def save(self) -> bool:
        state = {name: part.state_dict() for name, part in self.learner.items()}
        if not all(x.isfinite().all() for x in state["q_network"].values()):
            sys.exit("error: a weight is NaN or infinite.")
        if self.args.checkpoint_replay:
            state["replay"] = self.replay.state_dict()
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
        print(f"{args.exp_name}: {args.env_id}, {args.precision}, all in {self.folder}", flush=True)
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
    """Whether the rollout fits into memory."""
    # The frames twice, and what the layers keep of a minibatch.
    bytes_per_step = args.num_envs * 2 * 4 * 84 * 84
    of_minibatch = 400_000 * args.num_envs * args.num_steps // args.num_minibatches
    fits = max(free_memory() - of_minibatch, 0) // bytes_per_step
    must("num_steps", f"at most {fits} to fit into memory", args.num_steps <= fits)
    must("eval_max_frames", "below 2**31 - 1", args.eval_max_frames < 2**31 - 1)


def free_memory() -> int:
    """Bytes that the replay may take: what this process can still get, less 1 GiB for the rest."""
    free = sys.maxsize
    with contextlib.suppress(OSError):  # Linux
        table = Path("/proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", table)[1])
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        group = Path("/sys/fs/cgroup")
        used = int(re.search(r"^anon (\d+)", (group / "memory.stat").read_text(), re.M)[1])
        free = min(free, int((group / "memory.max").read_text()) - used)
    return max(free - 2**30, 0)


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
