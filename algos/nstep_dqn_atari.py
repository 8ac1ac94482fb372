"""n-step DQN on Atari. Sutton, 1988, Machine Learning 3:9; with Q-networks: Mnih et al., 2016,
arXiv:1602.01783; with a replay: Hessel et al., 2018, AAAI (Rainbow), arXiv:1710.02298.

    y = R + gamma^n max_a' Q(s_{t+n}, a'; theta^-),    R = sum_{j<n} gamma^j r_{t+j}

With n = 1 a reward reaches the values of earlier states one step per refresh of theta^-. Here it
moves n steps at once, and less of y is an estimate; in return y varies more.

Parent: dqn_atari.py. What changes: one number, n_step, because the replay of every *_atari.py makes
n-step transitions when it is sampled. Each step of an episode starts one. If the episode ends after
k < n steps, k replaces n: then y = R after a termination, and after a truncation y bootstraps from
the last observation.

Deviations from the papers: those of dqn_atari.py, and
1. Actions 2 to n were chosen by an older policy, partly at random, and y is not corrected for that,
   as in Rainbow (Sutton's method is on-policy; Mnih et al.'s has no replay).
2. One n for all steps, as in Rainbow (Mnih et al.: steps t to t + 4 bootstrap from s_{t+5}).

Run: python algos/nstep_dqn_atari.py --env-id PongNoFrameskip-v4
"""

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Args:  # the algorithm's; RunArgs, below the line, adds --device, --resume and so on
    env_id: str = "BreakoutNoFrameskip-v4"  # any Atari game; ALE/Pong-v5 has sticky actions
    num_envs: int = 8  # games played in parallel
    seed: int = 1  # of the games, the network, exploration and replay
    total_timesteps: int = 10_000_000  # agent steps, summed over the games; one is four frames
    learning_rate: float = 1e-4  # of the optimizer
    optimizer: Literal["adam", "adamw", "rmsprop"] = "adam"  # amsgrad with adamw, centred rmsprop
    adam_eps: float = 1e-8  # epsilon of adam and adamw
    max_grad_norm: float = 0.0  # gradients are clipped to this norm; 0: they are not
    buffer_size: int = 1_000_000  # agent steps kept for replay; up to 7.1 kB each
    gamma: float = 0.99  # discount factor
    n_step: int = 3  # n, rewards summed before the bootstrap
    tau: float = 1.0  # theta^- <- tau theta + (1 - tau) theta^-; 1 copies the network
    target_network_frequency: int = 1_000  # agent steps between refreshes of theta^-
    batch_size: int = 32  # transitions per update
    loss: Literal["huber", "mse"] = "huber"  # clipped error as in the paper, or squared
    start_e: float = 1.0  # epsilon at the first step
    end_e: float = 0.01  # epsilon once it has decayed
    exploration: Literal["linear", "exponential", "cosine"] = "linear"  # how epsilon decays
    exploration_fraction: float = 0.10  # decay time (exponential: time constant) / total_timesteps
    learning_starts: int = 50_000  # agent steps stored before the first update
    train_frequency: int = 4  # agent steps per update


class Batch(NamedTuple):  # k <= n_step: an episode may end before n steps
    obs: torch.Tensor  # s, the last 4 frames, (B, 4, 84, 84) uint8, or floats in [0, 1]
    actions: torch.Tensor  # a, (B,) int64
    rewards: torch.Tensor  # r_0 + gamma r_1 + ... + gamma^(k-1) r_(k-1), (B,) float32
    next_obs: torch.Tensor  # s', k steps later, as obs
    discounts: torch.Tensor  # gamma^k, or 0 where s' is terminal, (B,) float32
    indices: torch.Tensor  # rows of the replay, (B,) int64; for prioritized replay
    is_weights: torch.Tensor  # importance-sampling weights, (B,) float32; 1 if uniform


class QNetwork(nn.Module):
    """Three convolutions and two linear layers: (B, 4, 84, 84) frames -> (B, A) action values."""

    def __init__(self, n_actions: int):
        super().__init__()
        self.n_actions = n_actions
        self.features = Features(  # nn.Sequential, tuned for the device; see below the line
            nn.Conv2d(4, 32, 8, stride=4),  # (B, 32, 20, 20)
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),  # (B, 64, 9, 9)
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),  # (B, 64, 7, 7)
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
        )
        self.head = nn.Linear(512, n_actions)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(scaled(obs)))  # scaled: uint8 / 255


def td_loss(q_network, target_network, batch: Batch, args: Args):
    """-> the loss, a scalar; TD errors, (B,), for a replay with priorities; Q(s, a), (B,)"""
    with torch.no_grad():
        # y = r + gamma^k max_a' Q(s', a'; theta^-)
        next_q_values = target_network(batch.next_obs).amax(dim=1)  # (B,)
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


def main(args: Args) -> None:
    run = Run(args)  # progress bar, logs, evaluations, checkpoints
    envs = make_envs(args.env_id, args.num_envs, args.seed, use_fire_reset=args.fire_reset)
    q_network = QNetwork(envs.n_actions).to(run.device)
    target_network = copy.deepcopy(q_network)
    optimizer = make_optimizer(q_network, args)
    replay = make_replay(args, run.device, n_step=args.n_step)  # stores each frame once
    learner = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer}
    run.start(learner, replay, envs)  # what a checkpoint holds; --resume loads it here
    loss_fn = torch.compile(td_loss) if args.compile else td_loss

    @accelerated(args)  # one CUDA graph, with --cuda-graphs
    def update():
        batch = replay.sample(args.batch_size)
        loss, _, q_taken = loss_fn(q_network, target_network, batch, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), q_taken

    actor = accelerated(args)(q_network)
    (obs, episode_starts), loss, q_taken = envs.reset(), None, None  # None until the first update
    for global_step in run.steps():  # 0, num_envs, 2 num_envs, ...; Ctrl-C ends it early
        # ---- 1. act ------------------------------------------------------------------------------
        epsilon = epsilon_at(global_step, args)
        actions = act(actor, obs, epsilon, run.rng, run.device)
        # ---- 2. step: the games play on threads of their own until recv(), while we learn --------
        envs.send(actions)
        if len(replay) >= args.learning_starts:
            # ---- 3. learn ------------------------------------------------------------------------
            for _ in range(run.due(args.train_frequency)):  # num_envs / train_frequency on average
                loss, q_taken = update()
            # ---- 4. sync target ------------------------------------------------------------------
            if run.due(args.target_network_frequency):
                for p_target, p in zip(target_network.parameters(), q_network.parameters()):
                    p_target.data.lerp_(p.data, args.tau)
        # ---- 5. store: one frame a game, the newest of 4; the replay stacks them and finds s' ----
        next_obs, rewards, terminations, _, infos = envs.recv()  # a truncated s' is not terminal
        replay.add(obs[:, -1], actions, np.clip(rewards, -1, 1), terminations, episode_starts)
        obs, episode_starts = next_obs, infos["episode_starts"]
        run.log(infos["episodes"], epsilon, loss, q_taken)


# ==================================================================================================
# End of n-step DQN. Below: first the replay of frames, half of what Atari adds; then the games,
# logs, evaluation, checkpoints and speed. All of it is the same in every *_atari.py.
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

try:
    import fastreplay
except ImportError:  # FrameReplay, below, does the same, more slowly
    fastreplay = None


@dataclass
class RunArgs(Args):
    exp_name: str = Path(__file__).stem  # part of the name of the run's folder under `runs/`
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the networks; `auto`: the GPU if any
    torch_threads: int = 0  # CPU threads of torch; 0 leaves torch's own choice
    # FrameReplay in NumPy, or fastreplay's on the CPU or GPU; `auto` takes the best that is built
    buffer: Literal["auto", "numpy", "cpp", "cuda"] = "auto"
    # Frames as they are, or compact and lossless in tiles; `auto`: tiles with --buffer cpp
    replay_storage: Literal["auto", "plain", "tiles"] = "auto"
    # Of all layers but the last; `auto`: bfloat16 on a CPU with instructions for it, else float32
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False  # torch.compile the loss (needs a C++ compiler; 30 s at the first update)
    cuda_graphs: bool = False  # with --buffer cuda: an update, and acting, become one CUDA graph
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
    checkpoint_replay: bool = False  # save the replay too: a resumed run is bit-identical on a CPU
    resume: str | None = None  # checkpoint to go on from; its arguments apply unless given again
    evaluate: str | None = None  # checkpoint to evaluate; nothing is trained


NOTEBOOK = "ipykernel" in sys.modules  # %run in a cell: streams and SIGTERM are the kernel's
VIDEO_PACKAGES = ("moviepy",)  # what --capture-video needs
FRAMES_PER_SECOND = 60  # of a film: those of the game
FIXED_WITH_REPLAY = ("buffer", "replay_storage", "buffer_size", "gamma", "n_step")  # if saved
ENV_DEFAULTS = {}  # defaults that depend on --env-id
BYTES_PER_ROW = {"plain": 84 * 84 + 14, "tiles": 650}  # of the replay; in tiles, of Enduro


class FrameReplay:
    """A ring buffer of the newest steps of each game, every frame stored once.

    Row t of a game holds the frame seen, the action taken, the reward received, whether the step
    terminated, and whether the frame opened an episode. An episode is a run of rows:

        frame   f0  f1  f2  f3 |f0  f1  ...     f3 is a final observation: a row of its own, never
        opens    1   0   0   0 | 1   0  ...     drawn as a start, always available as a next_obs
        start?   y   y   y   - | y   y  ...

    A flat index is game * rows + row. Memory per row: 7,056 bytes of frame and 14 of the rest.
    """

    def __init__(
        self, capacity, frame_shape, num_envs=1, stack=4, n_step=1, gamma=0.99, seed=1, device="cpu"
    ):
        self.rows, self.num_envs, self.stack = capacity // num_envs, num_envs, stack
        self.n_step, self.gamma, self.rng = n_step, gamma, np.random.default_rng(seed)
        if self.rows < 2:  # a transition takes a row, and its next_obs another
            raise ValueError(
                f"a capacity of {capacity} is below 2 rows for each of {num_envs} games"
            )
        self.device = device  # of the batches
        self.head = self.size = 0  # next row to write, rows stored (of each game)
        shape = (self.rows, num_envs)
        self.frames = np.empty((*shape, *frame_shape), np.uint8)
        self.actions = np.empty(shape, np.int64)
        self.rewards = np.zeros(shape, np.float32)
        self.terminations = np.empty(shape, bool)
        self.opens = np.empty(shape, bool)

    def __len__(self) -> int:
        return self.size * self.num_envs

    def add(self, frames, actions, rewards, terminations, episode_starts) -> None:
        """Write one row for each game: arrays of shape (num_envs, ...). Action -1: no start."""
        if frames.dtype != np.uint8:
            raise TypeError(f"frames must be uint8, not {frames.dtype}")
        row = self.head
        self.frames[row], self.actions[row], self.rewards[row] = frames, actions, rewards
        self.terminations[row], self.opens[row] = terminations, episode_starts
        self.head, self.size = (row + 1) % self.rows, min(self.size + 1, self.rows)

    def window(self, indices):
        """The n-step windows of starts -> rewards, k, terminated, complete, all (B,).

        A window ends after n steps, at a termination, or at a final observation.
        """
        games, row = np.divmod(indices, self.rows)
        newest = (self.head - 1 - row) % self.rows  # how many rows of the game are newer
        rewards, k = np.zeros(len(row), np.float32), np.zeros(len(row), np.int64)
        terminated, running = np.zeros(len(row), bool), np.ones(len(row), bool)
        for j in range(self.n_step):
            at = (row + j) % self.rows
            # A row is final if the next one opens an episode; the newest row has no next one yet.
            final = (newest > j) & self.opens[(at + 1) % self.rows, games]
            running &= ~final & (newest > j)
            rewards += np.where(running, np.float32(self.gamma**j) * self.rewards[at, games], 0)
            k += running
            terminated |= running & self.terminations[at, games]
            running &= ~terminated
        end = (row + k) % self.rows
        final = (newest > k) & self.opens[(end + 1) % self.rows, games]
        return rewards, k, terminated, (k > 0) & (terminated | (k == self.n_step) | final)

    def drawable(self, indices) -> np.ndarray:
        """Whether a row is a start whose stack and n-step window are stored, (B,) bool."""
        games, row = np.divmod(indices, self.rows)
        older = self.size - 1 - (self.head - 1 - row) % self.rows  # rows stored before this one
        opened = np.zeros(len(row), bool)
        for back in range(self.stack - 1):  # walk back to the opening, at most stack - 1 rows
            opened |= self.opens[(row - back) % self.rows, games] & (older >= back)
        whole = opened | (older >= self.stack - 1)
        return (older >= 0) & whole & (self.actions[row, games] >= 0) & self.window(indices)[3]

    def draw(self, batch_size: int) -> np.ndarray:
        """Uniform over all drawable rows, (B,) int64; only rejected draws are repeated."""
        indices = np.empty(0, np.int64)
        while len(indices) < batch_size:
            game, row = self.rng.integers(0, (self.num_envs, max(self.size, 1)), (batch_size, 2)).T
            new = game * self.rows + row
            indices = np.concatenate([indices, new[self.drawable(new)]])[:batch_size]
            if not len(indices) and not self.drawable(np.arange(self.num_envs * self.rows)).any():
                raise ValueError("the replay holds no whole transition yet: add more rows first")
        return indices

    def stacks(self, games, row) -> np.ndarray:
        """The last `stack` frames up to a row, zeros before its episode opened, (B, stack, ...)."""
        back = (row[:, None] - np.arange(self.stack - 1, -1, -1)) % self.rows  # (B, stack)
        stacks = self.frames[back, games[:, None]]
        # crossed[s]: an episode opens after frame s, so frame s belongs to the one before
        opens = self.opens[back[:, 1:], games[:, None]]
        crossed = np.logical_or.accumulate(opens[:, ::-1], axis=1)[:, ::-1]  # (B, stack - 1)
        if crossed.any():
            stacks[:, :-1][crossed] = 0
        return stacks

    def gather(self, indices) -> Batch:
        """The transitions that start at these rows."""
        games, row = np.divmod(indices, self.rows)
        rewards, k, terminated, _ = self.window(indices)
        discounts = np.where(terminated, 0, self.gamma**k).astype(np.float32)
        obs, next_obs = self.stacks(games, row), self.stacks(games, (row + k) % self.rows)
        ones = np.ones(len(indices), np.float32)
        arrays = (obs, self.actions[row, games], rewards, next_obs, discounts, indices, ones)
        return Batch(*(torch.from_numpy(x).to(self.device) for x in arrays))

    def sample(self, batch_size: int) -> Batch:
        return self.gather(self.draw(batch_size))

    def state_dict(self) -> dict:
        names = ("frames", "actions", "rewards", "terminations", "opens")
        rows = {k: torch.from_numpy(getattr(self, k)[: self.size]) for k in names}
        return rows | {"head": self.head, "size": self.size, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError, and changes nothing, if the state does not fit this replay."""
        rng, rows = np.random.default_rng(), []
        try:
            rng.bit_generator.state, head, size = state["rng"], state["head"], state["size"]
            if not (0 <= size <= self.rows and head == (size if size < self.rows else head % size)):
                raise ValueError(f"row {head} is not the next of {size} in {self.rows} rows")
            for name in ("frames", "actions", "rewards", "terminations", "opens"):
                rows.append((getattr(self, name)[:size], state[name].numpy()))
                if len({(array.shape, array.dtype) for array in rows[-1]}) > 1:
                    raise ValueError(f"{name} have another shape or dtype")
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"not a state of this replay: {e}") from e
        for own, saved in rows:
            own[:] = saved
        self.head, self.size, self.rng = head, size, rng


def make_replay(args: RunArgs, device: torch.device, **options):
    """The class above, or fastreplay's, which does the same faster. Batches come to `device`."""
    options |= {"gamma": args.gamma, "seed": args.seed}
    if args.buffer == "numpy":
        return FrameReplay(args.buffer_size, (84, 84), args.num_envs, **options, device=device)
    # Stacks come scaled, in the layout that the convolutions want; as bytes if they have to travel.
    travels = args.buffer == "cpp" and device.type == "cuda"
    floats = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    options["output_dtype"] = torch.uint8 if travels else floats
    options["memory_format"] = torch.channels_last
    options["device"] = device if args.buffer == "cuda" else "cpu"
    options["storage"] = "tiles" if args.replay_storage == "tiles" else "auto"
    try:
        replay = fastreplay.FrameReplay(args.buffer_size, (84, 84), args.num_envs, **options)
    except (MemoryError, RuntimeError, ValueError) as e:
        sys.exit(f"error: --buffer {args.buffer} failed: {e}. Try --buffer numpy.")
    if travels:
        replay.sample = PinnedBatches(replay.sample, device)
    return replay


class PinnedBatches:
    """`sample` of a replay on the CPU, for a network on a GPU.

    Batches lie in pinned memory, which the GPU fetches while Python goes on. Two of them take
    turns: one is filled while the GPU fetches, or still learns from, the other.
    """

    def __init__(self, sample, device: torch.device):
        self.sample, self.device, self.free = sample, device, deque()

    def __call__(self, batch_size: int) -> Batch:
        if len(self.free) < 2:
            batch = Batch(*(x.pin_memory() for x in self.sample(batch_size)))
            fetched = torch.cuda.Event()
        else:
            batch, fetched = self.free.popleft()
            fetched.synchronize()
            self.sample(batch_size, out=batch)
        sent = Batch(*(x.to(self.device, non_blocking=True) for x in batch))
        fetched.record()
        self.free.append((batch, fetched))
        return sent


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
    if args.optimizer == "rmsprop":
        optimizer = RMSProp(parameters, rate, args.batch_size)
    elif args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, rate, eps=args.adam_eps, amsgrad=True, fused=True)
    else:
        optimizer = torch.optim.Adam(parameters, rate, eps=args.adam_eps, fused=True)
    for group in optimizer.param_groups:
        group["capturable"] = parameters[0].is_cuda  # in a CUDA graph
    if args.max_grad_norm:

        def clip(*_) -> None:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

        optimizer.register_step_pre_hook(clip)
    return optimizer


def takes_graphs(args: RunArgs) -> bool:
    """A graph can draw only from a replay on the GPU."""
    return args.cuda_graphs and args.buffer == "cuda"


def accelerated(args: RunArgs):
    """A decorator: the function as a CudaGraph, or as it is."""
    return CudaGraph if takes_graphs(args) else lambda function: function


class CudaGraph:
    """A function on the GPU whose kernels are launched all at once, not one by one.

    After a few ordinary calls one call is recorded: which kernels run, on which memory. Later calls
    copy their arguments to where the recorded ones were and launch the recording; Python does not
    run again. So the function must not depend on Python values that change, and a call overwrites
    the results of the last one.
    """

    WARM_UP = 3  # ordinary calls: the optimizer makes its state, libraries choose their kernels

    def __init__(self, function):
        self.function, self.calls, self.stream = function, 0, torch.cuda.Stream()

    def __getattr__(self, name: str):
        return getattr(self.function, name)  # q_network.n_actions

    def __call__(self, *inputs: torch.Tensor):
        self.calls += 1
        if self.calls <= self.WARM_UP:  # on the stream of the recording, as torch recommends
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        if self.calls == self.WARM_UP + 1:
            # Not in inference mode, where act() is: before torch 2.11 all graphs share a tensor of
            # the random generator, and the first recording would make it one that cannot change.
            grad = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                self.inputs, self.graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):  # records, and runs nothing
                    self.results = self.function(*self.inputs)
        for own, new in zip(self.inputs, inputs):
            own.copy_(new)
        self.graph.replay()
        return self.results


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
        if "replay" not in state:
            args["buffer"] = args["replay_storage"] = "auto"  # any will do for the resumed run
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
        each = BYTES_PER_ROW[args.replay_storage]
        replay = f"{args.precision}, {args.buffer} replay, {args.replay_storage}, "
        replay += f"about {each} bytes a step, {args.buffer_size * each / 1e9:.1f} GB"
        replay += ", CUDA graphs" * takes_graphs(args)
        print(f"{args.exp_name}: {args.env_id}, {replay}, all in {self.folder}", flush=True)
        if args.buffer == "cuda":
            print(self.replay)  # where its frames found room
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
        if self.due(max(args.buffer_size // 10, 1)) and memory_warning(args, self.replay):
            tqdm.write(memory_warning(args, self.replay), file=sys.stderr)
        if not self.due(args.log_frequency):
            return
        if args.buffer == "cuda":
            self.replay.check()  # raises the errors that its kernels reported
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


def cuda_problem(args: RunArgs) -> str:
    """Why this run cannot have its replay on a GPU, in one line; "" if it can."""
    if args.device == "cpu":
        return "--device is cpu"
    if not fastreplay or "cuda" not in fastreplay.backends():
        return "it is not built; where nvcc is installed, run `pip install .`"
    return fastreplay.cuda_problem()


def check_replay_args(args: RunArgs, must) -> None:
    """Choose the replay, and check that it can be made, fits into memory and can be drawn from."""
    built = ["numpy", *(fastreplay.backends() if fastreplay else ())]
    problem = cuda_problem(args) if args.buffer in ("auto", "cuda") else ""
    must("buffer", f"another: {problem}", args.buffer != "cuda" or not problem)
    if args.buffer == "auto":
        args.buffer = [kind for kind in built if kind != "cuda" or not problem][-1]
        if problem and args.device != "cpu" and torch.cuda.is_available():
            print(f"--buffer auto takes {args.buffer}: {problem}")
    rule = "numpy, or built with `pip install .` where there is a C++ compiler"
    must("buffer", rule, args.buffer in built)
    must("n_step", "at most 1000", args.n_step <= 1_000)
    must("eval_max_frames", "below 2**31 - 1", args.eval_max_frames < 2**31 - 1)
    least = (12 + args.n_step) * args.num_envs  # a stack, a window, and 8 rows more in each game
    must("buffer_size", f"at least {least} for --num-envs games", args.buffer_size >= least)
    least = (4 + args.n_step) * args.num_envs  # a resumed replay begins in the middle of a game
    must("learning_starts", f"at least {least}, one transition", args.learning_starts >= least)
    stored = args.buffer_size // args.num_envs * args.num_envs
    for name in ("learning_starts", "batch_size"):
        must(name, f"at most {stored}, what --buffer-size holds", getattr(args, name) <= stored)
    if args.replay_storage == "auto":
        args.replay_storage = "tiles" if args.buffer == "cpp" else "plain"
    tiles = args.replay_storage == "tiles"
    must("replay_storage", "plain or auto with --buffer numpy", not tiles or args.buffer != "numpy")
    free = free_memory()
    if args.buffer == "cuda":  # on the GPU, or else in the machine's memory; tiles are in both
        free = (min if tiles else max)(free, int(0.9 * torch.cuda.mem_get_info()[0]))
    fits = free // BYTES_PER_ROW[args.replay_storage] // 1_000 * 1_000
    must("buffer_size", f"at most {fits} to fit into memory", args.buffer_size <= fits)
    must("buffer_size", f"at most {2**27}", args.buffer_size <= 2**27)


def memory_warning(args: RunArgs, replay) -> str:
    """What to do if the rest of the replay, in tiles, needs more memory than there is; else ""."""
    stored, free = len(replay), free_memory()
    if args.replay_storage == "plain" or not stored:
        return ""
    held, more = replay.nbytes / 1e9, replay.nbytes * (args.buffer_size / stored - 1) / 1e9
    return (more > max(free / 1e9, 0.1)) * (
        f"warning: {stored} of {args.buffer_size} steps of the replay take {held:.1f} GB, and the "
        f"others may need {more:.1f} GB, of which {free / 1e9:.1f} GB are free: stop with Ctrl-C, "
        "and run with a smaller --buffer-size"
    )


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
