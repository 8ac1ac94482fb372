"""Deep Q-Network (DQN) on Atari. Mnih et al., 2015, Nature 518:529; arXiv:1312.5602.

    y = r + gamma max_a' Q(s', a'; theta^-),   theta <- theta - lr grad L(y - Q(s, a; theta))

Parent: dqn_cartpole.py. What changes: the games, a convolutional network, and a replay that stores
every frame once and builds the stacks of four when it is sampled.

Deviations from the paper, as most of the field has them today:
1. Adam (lr 1e-4) in place of RMSProp; exploration ends at 1% (paper: 10%).
2. `num_envs` games side by side; updates still come once in `train_frequency` agent steps.
3. FIRE is pressed once at the start of a game, in games that have the button; after a life is lost
   the agent must press it.
4. The target network is renewed every 1,000 agent steps (paper: 10,000 updates).

Run: python algos/dqn_atari.py --env-id BreakoutNoFrameskip-v4
"""

import contextlib
import ctypes
import importlib.util
import os
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import fastreplay
except ImportError:  # the replay below does the same, more slowly
    fastreplay = None

VIDEO_PACKAGES = ("moviepy",)  # what --capture-video needs


@dataclass
class Args:
    # run
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the folder's name under `runs/`"""
    seed: int = 1
    """seed of the games, the network, exploration and replay"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; `auto` takes the GPU when there is one"""
    torch_threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice"""
    bfloat16: bool = False
    """compute the networks in bfloat16 (autocast); weights and optimiser stay float32"""
    compile: bool = False
    """compile the loss with torch.compile (needs a C++ compiler; about 30 s at the start)"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    wandb_project_name: str = "cleanq"
    """project on Weights & Biases"""
    wandb_entity: str | None = None
    """team on Weights & Biases"""
    capture_video: bool = False
    """film one game at every evaluation into the run's folder (needs `pip install moviepy`)"""
    log_frequency: int = 1_000
    """agent steps between two log entries"""
    eval_frequency: int = 250_000
    """agent steps between two evaluations; 0 leaves only the last one"""
    eval_episodes: int = 10
    """whole games in an evaluation"""
    eval_e: float = 0.01
    """epsilon while evaluating"""
    checkpoint_frequency: int = 100_000
    """agent steps between two checkpoints; 0 leaves only the last one"""
    checkpoint_replay: bool = False
    """put the replay into the checkpoint, so that a resumed run goes on bit for bit"""
    resume: str | None = None
    """checkpoint to go on from; its arguments hold unless given anew"""
    evaluate: str | None = None
    """checkpoint to evaluate; nothing is trained or written"""

    # environment
    env_id: str = "BreakoutNoFrameskip-v4"
    """any Atari game: `PongNoFrameskip-v4`, or `ALE/Pong-v5` with sticky actions"""
    num_envs: int = 8
    """games played side by side"""

    # algorithm
    total_timesteps: int = 10_000_000
    """agent steps in all; one is four frames"""
    learning_rate: float = 1e-4
    """step size of Adam"""
    buffer: Literal["auto", "numpy", "cpp", "cuda"] = "auto"
    """the NumPy class below or fastreplay's, on the CPU or GPU; `auto` takes the best there is"""
    buffer_size: int = 1_000_000
    """agent steps in the replay; each takes 7.1 kB"""
    gamma: float = 0.99
    """discount factor"""
    n_step: int = 1
    """rewards summed before the bootstrap"""
    tau: float = 1.0
    """target update: theta^- <- tau theta + (1 - tau) theta^-; 1 copies"""
    target_network_frequency: int = 1_000
    """agent steps between two target updates"""
    batch_size: int = 32
    """transitions in an update"""
    loss: Literal["huber", "mse"] = "huber"
    """huber: error clipped to [-1, 1] in the gradient, as in the paper; mse: squared"""
    start_e: float = 1.0
    """epsilon at the first step"""
    end_e: float = 0.01
    """epsilon at the end of exploration"""
    exploration_fraction: float = 0.10
    """part of `total_timesteps` in which epsilon falls from `start_e` to `end_e`"""
    learning_starts: int = 50_000
    """agent steps in the replay before the first update"""
    train_frequency: int = 4
    """agent steps between two updates"""


class Games(AtariVectorEnv):
    """Atari games on native threads; they report whole games, and go on where a checkpoint stood.

    84x84 grey, 4 frames a step (maximum of the last 2); stacks of 4, zeros before the first.
    A life lost sets `terminated` and the game goes on. A game that is over is reset by the *next*
    step, which ignores its action (NEXT_STEP); `infos["episode_starts"]` then says so.

    The emulator is deterministic, so a game is its seed and the actions since. Both are kept, and
    `start` plays them again; a fresh seed every 5,000 steps or so keeps them few.
    """

    def __init__(self, game: str, num_envs: int, seed: int, **options):
        super().__init__(game, num_envs, reward_clipping=False, **options)
        self.rng = np.random.default_rng(seed)

    def start(self, state: dict | None = None):
        """New games, or those of a `state_dict`. -> obs (num_envs, 4, 84, 84) uint8, infos"""
        n = self.num_envs
        self.seeds, self.histories = self.rng.integers(2**31, size=n), [[] for _ in range(n)]
        self.returns, self.lengths = np.zeros(n), np.zeros(n, np.int64)
        self.starts = np.ones(n, bool)  # whether the frame in hand opens an episode
        if state:
            self.rng.bit_generator.state = state["rng"]
            self.histories = [history.tolist() for history in state["histories"]]
            for name in ("seeds", "returns", "lengths", "starts"):
                setattr(self, name, state[name].numpy().copy())
        obs, infos = self.reset(seed=self.seeds)
        longest = max(map(len, self.histories))
        for t in range(-longest, 1):  # a shorter history starts later, so that all end together
            now = np.array([len(history) == -t for history in self.histories])
            if now.any():
                obs, infos = self.reset(seed=self.seeds[now], options={"reset_mask": now})
            if t < 0:
                actions = [history[t] if len(history) >= -t else 0 for history in self.histories]
                super().send(np.array(actions))
                obs, *_, infos = super().recv()
        self.frame_numbers = infos["episode_frame_number"]
        return obs, infos | {"episode_starts": self.starts}

    def send(self, actions: np.ndarray) -> None:
        """Let every game take its action, (num_envs,) int64, while the caller goes on."""
        for history, action in zip(self.histories, actions.tolist()):
            history.append(action)
        super().send(actions)

    def recv(self):
        """Wait for the games. `infos["episodes"]`: (game, return, length) of those reset."""
        obs, rewards, terminations, truncations, infos = super().recv()
        self.starts = infos["episode_frame_number"] <= self.frame_numbers  # it fell: a reset
        self.returns += rewards
        self.lengths += ~self.starts
        over = np.flatnonzero(self.starts)
        episodes = [(game, float(self.returns[game]), int(self.lengths[game])) for game in over]
        self.returns[over] = self.lengths[over] = 0
        stale = self.starts & np.array([len(history) > 5_000 for history in self.histories])
        if stale.any():
            self.seeds[stale] = self.rng.integers(2**31, size=stale.sum())
            self.histories = [[] if fresh else h for fresh, h in zip(stale, self.histories)]
            obs, infos = self.reset(seed=self.seeds[stale], options={"reset_mask": stale})
        self.frame_numbers = infos["episode_frame_number"]
        infos |= {"episode_starts": self.starts, "episodes": episodes}
        return obs, rewards, terminations, truncations, infos

    def state_dict(self) -> dict:
        arrays = {
            k: torch.tensor(getattr(self, k)) for k in ("seeds", "returns", "lengths", "starts")
        }
        histories = [torch.tensor(history, dtype=torch.uint8) for history in self.histories]
        return arrays | {"histories": histories, "rng": self.rng.bit_generator.state}


def make_env(env_id: str, num_envs: int, seed: int, **options) -> Games:
    """The games of a v4 or v5 id, with the sticky actions that the id stands for."""
    try:
        kwargs = gym.spec(env_id).kwargs
    except gym.error.Error as e:
        sys.exit(f"error: --env-id {env_id}: {e} Ids look like PongNoFrameskip-v4 or ALE/Pong-v5.")
    if "game" not in kwargs:
        sys.exit(f"error: --env-id {env_id} is not an Atari game; try algos/dqn_cartpole.py.")
    names = ("repeat_action_probability", "full_action_space", "max_num_frames_per_episode")
    options = {k: kwargs[k] for k in names if k in kwargs} | {"life_loss_info": True} | options
    return Games(kwargs["game"], num_envs, seed, **options)


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, 4, 84, 84) uint8
    actions: torch.Tensor  # (B,) int64
    rewards: torch.Tensor  # (B,) float32, discounted sum of k rewards
    next_obs: torch.Tensor  # (B, 4, 84, 84) uint8, k steps later
    discounts: torch.Tensor  # (B,) float32, gamma^k (1 - terminated)
    indices: torch.Tensor  # (B,) int64, rows in the replay


# --- shared: frame-replay
class FrameReplay:
    """A ring of the newest steps of each game, every frame stored once.

    Row t of a game holds the frame seen, the action taken, the reward received, whether the step
    terminated, and whether the frame opened an episode. An episode is a run of rows:

        frame   f0  f1  f2  f3 |f0  f1  ...     f3 is a final observation: a row of its own, never
        opens    1   0   0   0 | 1   0  ...     drawn as a start, always there as a next_obs
        start?   y   y   y   - | y   y  ...

    A flat index is game * rows + row. Memory: 7,056 bytes of frame and 14 of the rest a row.
    """

    def __init__(self, capacity, frame_shape, num_envs=1, stack=4, n_step=1, gamma=0.99, seed=1):
        self.rows, self.num_envs, self.stack = capacity // num_envs, num_envs, stack
        self.n_step, self.gamma, self.rng = n_step, gamma, np.random.default_rng(seed)
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
        """Write one row for each game: arrays of shape (num_envs, ...)."""
        row = self.head
        self.frames[row], self.actions[row], self.rewards[row] = frames, actions, rewards
        self.terminations[row], self.opens[row] = terminations, episode_starts
        self.head, self.size = (row + 1) % self.rows, min(self.size + 1, self.rows)

    def window(self, indices):
        """The n-step windows of starts -> rewards, k, terminated, complete, all (B,).

        It ends after n steps, at a termination, or at a final observation, whichever comes first.
        """
        games, row = np.divmod(indices, self.rows)
        newest = (self.head - 1 - row) % self.rows  # how many rows of the game are newer
        rewards, k = np.zeros(len(row), np.float32), np.zeros(len(row), np.int64)
        terminated, running = np.zeros(len(row), bool), np.ones(len(row), bool)
        for j in range(self.n_step):
            at = (row + j) % self.rows
            # a row is final when the next one opens an episode; behind the newest nothing is known
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
        """Whether a row is a start whose stack and n-step window are whole, (B,) bool."""
        games, row = np.divmod(indices, self.rows)
        older = self.size - 1 - (self.head - 1 - row) % self.rows  # rows stored before this one
        opened = np.zeros(len(row), bool)
        for back in range(self.stack - 1):  # walk back to the opening, at most stack - 1 rows
            opened |= self.opens[(row - back) % self.rows, games] & (older >= back)
        whole = opened | (older >= self.stack - 1)
        return (older >= 0) & whole & self.window(indices)[3]

    def draw(self, batch_size: int) -> np.ndarray:
        """Uniform over all drawable rows, (B,) int64; only the rejected are drawn again."""
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
        # alive[s]: no episode opens between frame s and the newest frame of the stack
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
        arrays = (obs, self.actions[row, games], rewards, next_obs, discounts, indices)
        return Batch(*map(torch.from_numpy, arrays))

    def sample(self, batch_size: int) -> Batch:
        return self.gather(self.draw(batch_size))

    def state_dict(self) -> dict:
        names = ("frames", "actions", "rewards", "terminations", "opens")
        rows = {k: torch.from_numpy(getattr(self, k)[: self.size]) for k in names}
        return rows | {"head": self.head, "size": self.size, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        self.head, self.size = state["head"], state["size"]
        for k in ("frames", "actions", "rewards", "terminations", "opens"):
            getattr(self, k)[: self.size] = state[k].numpy()
        self.rng.bit_generator.state = state["rng"]


# --- end shared


class QNetwork(nn.Module):
    """Three convolutions and a hidden layer: (B, 4, 84, 84) -> (B, A) action values."""

    def __init__(self, n_actions: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4),  # (B, 32, 20, 20)
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 4, stride=2),  # (B, 64, 9, 9)
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 3, stride=1),  # (B, 64, 7, 7)
            nn.ReLU(inplace=True),
        )
        self.hidden = nn.Linear(7 * 7 * 64, 512)
        self.head = nn.Linear(512, n_actions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.uint8:  # else it comes scaled to [0, 1]
            x = x.to(self.head.weight.dtype) / 255
        x = self.convolutions(x)
        if x.is_cuda or x.dtype != torch.float32:
            x = self.hidden(x.permute(0, 2, 3, 1).flatten(1))  # (B, 7, 7, 64) -> (B, 3136)
        else:  # the same sums as a 7x7 convolution, which a CPU runs faster in float32
            weight = self.hidden.weight.view(512, 7, 7, 64).permute(0, 3, 1, 2)
            x = F.conv2d(x, weight, self.hidden.bias).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for an argmax
            return self.head(F.relu(x).to(self.head.weight.dtype))


def td_loss(q_network, target_network, batch: Batch, args: Args):
    """The loss of one batch, a scalar, and its errors y - Q(s, a), (B,)."""
    with torch.no_grad():
        # y = r + gamma^k max_a' Q(s', a'; theta^-), without the second term where s' is terminal
        next_q_values = target_network(batch.next_obs).max(dim=1).values  # (B,)
        td_target = batch.rewards + batch.discounts * next_q_values  # (B,)
    q_taken = q_network(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)  # (B,)
    criterion = F.smooth_l1_loss if args.loss == "huber" else F.mse_loss
    return criterion(q_taken, td_target), (td_target - q_taken).detach()


# --- shared: run
def epsilon_at(step: int, args: Args) -> float:
    """Chance of a random action: a line from `start_e` to `end_e`, then flat."""
    progress = min(step / (args.exploration_fraction * args.total_timesteps), 1.0)
    return args.start_e + progress * (args.end_e - args.start_e)


def save_checkpoint(path: Path, state: dict) -> bool:
    """Write whole or not at all: the new file takes the old one's place once it is on the disk."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        print(f"error: {path} not written ({reason}); an older one is kept", file=sys.stderr)
        with contextlib.suppress(OSError):
            partial.unlink()
        return False
    return True


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of this script (plain data: no code is run), or leave with one line."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        script = state["script"]
        Args(**state["args"])
    except FileNotFoundError:
        sys.exit(f"error: no checkpoint at {path}; they lie at runs/<run>/checkpoint.pt.")
    except Exception as e:
        reason = str(e).strip().split("\n")[0]
        sys.exit(f"error: {path} is no whole checkpoint of this script ({reason}); take another.")
    if script != Path(__file__).stem:
        sys.exit(f"error: {path} was written by {script}.py; give it to that script.")
    return state


def parse_args() -> tuple[Args, dict]:
    """The arguments, and the checkpoint, whose arguments hold unless they are given anew."""
    args = tyro.cli(Args)
    saved = load_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else {}
    if saved:
        args = tyro.cli(Args, default=Args(**saved["args"]))
    if args.evaluate:  # plays without a replay: none of the stopped run's size or kind is needed
        args.buffer, args.buffer_size = "numpy", 10_000 * args.num_envs
        args.learning_starts = args.batch_size = 1
    for name in ("env_id", "num_envs", "buffer", "buffer_size") if args.resume else ():
        if getattr(args, name) != saved["args"][name]:
            flag, was = "--" + name.replace("_", "-"), saved["args"][name]
            sys.exit(f"error: {flag} cannot change when a run is resumed; leave it at {was}.")
    return args, saved


def built_buffers(args: Args) -> list[str]:
    """The kinds of replay that this run can have, the best last."""
    kinds = ["numpy", *(fastreplay.backends() if fastreplay else ())]
    on_gpu = args.device != "cpu" and "cuda" in kinds and not fastreplay.cuda_problem()
    return [kind for kind in kinds if kind != "cuda" or on_gpu]


def check_args(args: Args, bytes_per_row: int) -> None:
    """Leave with one line that says which argument is wrong, before anything is written."""
    may_be_zero = ("seed", "torch_threads", "eval_frequency", "checkpoint_frequency")
    fractions = ("gamma", "tau", "start_e", "end_e", "eval_e")
    rules = []  # (argument, what it must be, whether it is)
    for name, value in asdict(args).items():
        if name in fractions:
            rules.append((name, "between 0 and 1", 0 <= value <= 1))
        elif name in may_be_zero:
            rules.append((name, "0 or more", 0 <= value < 2**63))
        elif type(value) in (int, float):
            rules.append((name, "positive", 0 < value < 2**63))
    rows = args.buffer_size // max(args.num_envs, 1)  # of each environment
    room = (rows - 8 - getattr(args, "n_step", 1)) * args.num_envs
    holds = args.learning_starts <= room
    rules.append(("learning_starts", f"at most {room} in this buffer", holds))
    rules.append(("batch_size", "at most --buffer-size", args.batch_size <= args.buffer_size))
    rules.append(("torch_threads", "at most 1024", args.torch_threads <= 1024))
    place = "nvcc, and used on a GPU" if args.buffer == "cuda" else "a compiler"
    built = args.buffer in built_buffers(args)
    rules.append(("buffer", f"built first, with `pip install .` where there is {place}", built))
    cuda = args.device != "cuda" or torch.cuda.is_available()
    rules.append(("device", "cpu or auto where torch finds no GPU", cuda))
    needs = [*((package, "capture_video") for package in VIDEO_PACKAGES), ("wandb", "track")]
    for package, flag in needs:
        holds = not getattr(args, flag) or importlib.util.find_spec(package) is not None
        rules.append((flag, f"left out, or run `pip install {package}` first", holds))
    free = max(free_memory() - 2**30, 0)  # 1 GiB for the rest
    if args.buffer == "cuda" and built:  # on the GPU, or else in the machine's memory
        free = max(free, int(0.9 * torch.cuda.mem_get_info()[0]))
    fits = free // bytes_per_row // 1_000 * 1_000
    rules.append(("buffer_size", f"at most {fits} in this memory", args.buffer_size <= fits))
    for name, rule, holds in rules:
        if not holds:
            flag = "--" + name.replace("_", "-")
            sys.exit(f"error: {flag} must be {rule} (it is {getattr(args, name)}).")


def free_memory() -> int:
    """Bytes that this process may still take."""
    free = sys.maxsize
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        group = Path("/sys/fs/cgroup")
        used = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())["anon"]
        free = min(free, int((group / "memory.max").read_text()) - int(used))
    return free


def prepare(args: Args) -> torch.device:
    """Threads, memory, seed; -> the device."""
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        mallopt = ctypes.CDLL("libc.so.6").mallopt  # keep freed memory: page faults at every update
        for option, value in ((-4, 0), (-1, 2**30), (-2, 2**26)):  # cost more than it is worth
            mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    torch.manual_seed(args.seed)
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def stop_on_ctrl_c() -> list:
    """A list that Ctrl-C fills, so that the step in hand can end. A second one leaves at once."""
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130) if stop else stop.append(True))
    return stop


def open_run(args: Args) -> tuple[Path, SummaryWriter]:
    """The run's folder, new or that of the resumed checkpoint, and its TensorBoard writer."""
    name = (
        f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
    )
    run = Path(args.resume).parent if args.resume else Path("runs") / name
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            config=asdict(args),
            name=run.name,
            sync_tensorboard=True,
        )
    try:
        writer = SummaryWriter(str(run))
    except OSError as e:
        sys.exit(f"error: cannot write to {run} ({e.strerror}); start from a folder of your own.")
    table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{table}")
    print(f"{args.exp_name}: {args.env_id}, {args.buffer} replay, all in {run}", flush=True)
    return run, writer


# --- end shared


@torch.no_grad()
def evaluate(q_network, args: Args, device: torch.device, stop=(), video_folder=None):
    """Play `eval_episodes` whole games with epsilon `eval_e`: their unclipped returns."""
    n, rng, returns = min(args.eval_episodes, 10), np.random.default_rng(args.seed), []
    envs = make_env(args.env_id, n, args.seed + 10_000)
    obs, _ = envs.start()
    filming = bool(video_folder)
    if filming:  # the same game in colour: same seed and actions, same pictures
        colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
        screen = make_env(args.env_id, n, args.seed + 10_000, **colour)
        film = [screen.start()[0][0, 0]]
    # each lane plays its share of the games, so that short games do not count more often
    left = np.array([len(range(lane, args.eval_episodes, n)) for lane in range(n)])
    while left.any() and not stop:
        q_values = q_network(torch.from_numpy(obs).to(device))  # (n, A)
        actions, explore = rng.integers(q_values.shape[1], size=n), rng.random(n) < args.eval_e
        actions = np.where(explore, actions, q_values.argmax(dim=1).cpu().numpy())
        envs.send(actions)
        obs, *_, infos = envs.recv()
        if filming:
            screen.send(actions)
            film.append(screen.recv()[0][0, 0])
        for game, episode_return, _ in infos["episodes"]:
            filming &= game != 0
            if left[game]:
                returns.append(episode_return)
                left[game] -= 1
    if video_folder:
        from gymnasium.utils.save_video import save_video

        save_video(film, str(video_folder), lambda _: True, fps=15)
    return np.array(returns)


def main(args: Args, saved: dict) -> None:
    # ------------------------------------------------------------------------------------ set up
    if args.buffer == "auto":
        args.buffer = built_buffers(args)[-1]
    check_args(args, bytes_per_row=84 * 84 + 14)
    device, n = prepare(args), args.num_envs
    rng = np.random.default_rng(args.seed)
    envs = make_env(args.env_id, n, args.seed)
    n_actions = int(envs.single_action_space.n)
    q_network = QNetwork(n_actions).to(device, memory_format=torch.channels_last)
    target_network = QNetwork(n_actions).to(device, memory_format=torch.channels_last)
    target_network.load_state_dict(q_network.state_dict())
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
    loss_fn = torch.compile(td_loss) if args.compile else td_loss
    options = {"n_step": args.n_step, "gamma": args.gamma, "seed": args.seed}
    if args.buffer != "numpy":  # stacks come scaled, in the layout that the convolutions want
        options |= {"output_dtype": torch.float32, "memory_format": torch.channels_last}
        options |= {"device": device if args.buffer == "cuda" else "cpu"}
    replay_class = FrameReplay if args.buffer == "numpy" else fastreplay.FrameReplay
    replay = replay_class(args.buffer_size, (84, 84), n, **options)
    parts = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer}
    try:
        for name in parts if saved else ():
            parts[name].load_state_dict(saved[name])
        if "replay" in saved:
            replay.load_state_dict(saved["replay"])
    except (KeyError, RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[-1].strip()
        sys.exit(f"error: the checkpoint does not fit these arguments ({reason}).")
    if args.evaluate:
        returns = evaluate(q_network, args, device)
        print(f"{args.env_id}: {returns.mean():.1f} +- {returns.std():.1f} in {len(returns)} games")
        return
    global_step, seconds_before = saved.get("global_step", 0), saved.get("seconds", 0.0)
    recent_returns = deque(saved.get("recent_returns", ()), maxlen=100)
    if saved:
        rng.bit_generator.state = saved["rng"]
    obs, infos = envs.start(saved.get("envs"))
    episode_starts = infos["episode_starts"]
    run, writer = open_run(args)
    if args.buffer == "cuda":
        print(replay, flush=True)  # it says where its frames found room

    def learn(batch: Batch) -> torch.Tensor:
        """One gradient step; nothing here reads a value back from the device."""
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16):
            loss, _ = loss_fn(q_network, target_network, batch, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    def due(every: int) -> int:
        """How many multiples of `every` lie among the n agent steps of this iteration."""
        return global_step // every - (global_step - n) // every if every else 0

    def checkpoint() -> bool:
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"replay": replay.state_dict()} if args.checkpoint_replay else {}
        state |= {"envs": envs.state_dict(), "rng": rng.bit_generator.state}
        state |= {"global_step": global_step, "recent_returns": list(recent_returns)}
        state |= {"seconds": seconds_before + time.time() - start_time}
        state |= {"script": Path(__file__).stem, "args": asdict(args)}
        state["args"] |= {"resume": None, "evaluate": None}
        return save_checkpoint(run / "checkpoint.pt", state)

    start_time, first_step, loss, stop = time.time(), global_step, None, stop_on_ctrl_c()
    interval = 0.2 if sys.stderr.isatty() else 30  # seconds; a log file wants fewer lines
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", mininterval=interval)
    while global_step < args.total_timesteps and not stop:
        # ----------------------------------------------------------------------------------- act
        epsilon = epsilon_at(global_step, args)
        actions, explore = rng.integers(n_actions, size=n), rng.random(n) < epsilon
        if not explore.all():
            with torch.inference_mode():
                q_values = q_network(torch.from_numpy(obs).to(device))  # (n, A)
            actions = np.where(explore, actions, q_values.argmax(dim=1).cpu().numpy())

        # ---------------------------------------------------------------------------------- step
        envs.send(actions)  # the games run on threads of their own while the network learns
        global_step += n

        # --------------------------------------------------------------------------------- learn
        learning = len(replay) >= args.learning_starts
        for _ in range(due(args.train_frequency) if learning else 0):
            batch = replay.sample(args.batch_size)
            # [:6]: fastreplay's batch has importance weights behind these
            loss = learn(Batch(*(x.to(device, non_blocking=True) for x in batch[:6])))

        # --------------------------------------------------------------------------- sync target
        if learning and due(args.target_network_frequency):
            for p_target, p in zip(target_network.parameters(), q_network.parameters()):
                p_target.data.lerp_(p.data, args.tau)

        # --------------------------------------------------------------------------------- store
        next_obs, rewards, terminations, _, infos = envs.recv()
        replay.add(obs[:, -1], actions, np.clip(rewards, -1, 1), terminations, episode_starts)
        obs, episode_starts = next_obs, infos["episode_starts"]

        # -------------------------------------------------------------------------------- report
        bar.update(n)
        recent_returns.extend(episode_return for _, episode_return, _ in infos["episodes"])
        if due(args.log_frequency):
            seconds = time.time() - start_time
            writer.add_scalar("charts/hours", (seconds_before + seconds) / 3600, global_step)
            writer.add_scalar("charts/SPS", (global_step - first_step) / seconds, global_step)
            writer.add_scalar("charts/epsilon", epsilon, global_step)
            figures = {}
            if recent_returns:
                figures["return"] = np.mean(recent_returns)
                writer.add_scalar("charts/mean_return_100", figures["return"], global_step)
            if loss is not None:
                figures["loss"] = loss.item()
                writer.add_scalar("losses/td_loss", figures["loss"], global_step)
            bar.set_postfix(
                {k: f"{v:.3g}" for k, v in figures.items()} | {"eps": round(epsilon, 2)}
            )
        if due(args.eval_frequency) or global_step >= args.total_timesteps:
            film = run / "videos" if args.capture_video else None
            returns = evaluate(q_network, args, device, stop, film)
            if not stop:
                writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
                bar.write(
                    f"step {global_step}: {returns.mean():.1f} +- {returns.std():.1f} evaluated"
                )
        if due(args.checkpoint_frequency):
            checkpoint()

    bar.close()
    written = checkpoint()
    writer.close()
    if written and global_step < args.total_timesteps:
        print(f"go on with: python {sys.argv[0]} --resume {run / 'checkpoint.pt'}")
    if not written:
        sys.exit(1)


if __name__ == "__main__":
    main(*parse_args())
