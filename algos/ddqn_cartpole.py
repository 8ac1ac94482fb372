"""Double Deep Q-Network (Double DQN) on CartPole. van Hasselt et al., 2016, AAAI; arXiv:1509.06461.

    y = r + gamma Q(s', argmax_a' Q(s', a'; theta); theta^-)

The maximum over noisy values is too high on average: the noise that lifts a value also gets it
chosen. Here one network chooses the action and the other values it, so their errors do not add up.

Parent: dqn_cartpole.py. What changes: the target in td_loss, nothing else.

Deviations from the paper: those of dqn_cartpole.py.

Run: python algos/ddqn_cartpole.py
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import fastreplay
except ImportError:  # the replay below does the same, more slowly
    fastreplay = None

VIDEO_PACKAGES = ("moviepy", "pygame")  # what --capture-video needs


@dataclass
class Args:
    # run
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the folder's name under `runs/`"""
    seed: int = 1
    """seed of the environments, the network, exploration and replay"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; `auto` takes the GPU when there is one"""
    torch_threads: int = 1
    """CPU threads of torch; 0 leaves torch's own choice"""
    compile: bool = False
    """compile the loss with torch.compile (needs a C++ compiler; about 30 s at the start)"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    wandb_project_name: str = "cleanq"
    """project on Weights & Biases"""
    wandb_entity: str | None = None
    """team on Weights & Biases"""
    capture_video: bool = False
    """film an episode at every evaluation (needs `pip install moviepy pygame`)"""
    log_frequency: int = 1_000
    """agent steps between two log entries"""
    eval_frequency: int = 20_000
    """agent steps between two evaluations; 0 leaves only the last one"""
    eval_episodes: int = 100
    """episodes in an evaluation"""
    eval_e: float = 0.0
    """epsilon while evaluating"""
    checkpoint_frequency: int = 50_000
    """agent steps between two checkpoints; 0 leaves only the last one"""
    checkpoint_replay: bool = False
    """put the replay into the checkpoint, so that a resumed run goes on bit for bit"""
    resume: str | None = None
    """checkpoint to go on from; its arguments hold unless given anew"""
    evaluate: str | None = None
    """checkpoint to evaluate; nothing is trained or written"""

    # environment
    env_id: str = "CartPole-v1"
    """any environment with a vector to observe and a choice of actions"""
    num_envs: int = 4
    """environments stepped one after the other"""

    # algorithm
    total_timesteps: int = 200_000
    """agent steps in all"""
    learning_rate: float = 1e-3
    """step size of Adam"""
    anneal_lr: bool = True
    """let the step size fall in a line to zero at the end of the run"""
    buffer: Literal["auto", "numpy", "cpp", "cuda"] = "auto"
    """the NumPy class below or fastreplay's, on the CPU or GPU; `auto` takes the best there is"""
    buffer_size: int = 200_000
    """agent steps in the replay"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 1.0
    """target update: theta^- <- tau theta + (1 - tau) theta^-; 1 copies"""
    target_network_frequency: int = 500
    """agent steps between two target updates"""
    batch_size: int = 64
    """transitions in an update"""
    loss: Literal["mse", "huber"] = "mse"
    """mse: squared error; huber: error clipped to [-1, 1] in the gradient, as in the paper"""
    start_e: float = 1.0
    """epsilon at the first step"""
    end_e: float = 0.05
    """epsilon at the end of exploration"""
    exploration_fraction: float = 0.2
    """part of `total_timesteps` in which epsilon falls from `start_e` to `end_e`"""
    learning_starts: int = 2_000
    """agent steps in the replay before the first update"""
    train_frequency: int = 2
    """agent steps between two updates"""


class Episodes:
    """Environments stepped side by side, which report whole episodes and go on where others stood.

    An episode that is over is reset by the *next* step, which ignores its action (gymnasium's
    NEXT_STEP); `infos["episode_starts"]` then says so. An episode is its seed and its actions:
    both are kept, and `start` plays them again.
    """

    def __init__(self, env_id: str, num_envs: int, seed: int, **options):
        self.envs = [gym.make(env_id, disable_env_checker=True, **options) for _ in range(num_envs)]
        self.num_envs, self.rng = num_envs, np.random.default_rng(seed)

    def reset(self, i: int) -> np.ndarray:
        self.returns[i], self.histories[i] = 0.0, []
        return self.envs[i].reset(seed=self.seeds[i])[0]

    def start(self, state: dict | None = None):
        """New episodes, or those of a `state_dict`. -> obs (num_envs, D) float32, infos"""
        n = self.num_envs
        self.seeds, self.histories, self.returns = (
            self.rng.integers(2**31, size=n).tolist(),
            [[]] * n,
            [0.0] * n,
        )
        self.obs = np.stack([self.reset(i) for i in range(n)]).astype(np.float32)
        self.starts = np.ones(n, bool)  # whether the observation in hand opens an episode
        self.over = [False] * n  # whether the next step resets
        if state:
            self.rng.bit_generator.state = state["rng"]
            self.seeds, self.returns, self.over = state["seeds"], state["returns"], state["over"]
            self.histories, self.starts = state["histories"], np.array(state["starts"])
            for i, env in enumerate(self.envs):
                self.obs[i] = env.reset(seed=self.seeds[i])[0]
                for action in self.histories[i]:
                    self.obs[i] = env.step(action)[0]
        return self.obs, {"episode_starts": self.starts}

    def step(self, actions: np.ndarray):
        """Take the actions, (num_envs,) int64.

        `infos["episodes"]`: (environment, return, length) of those that were reset.
        """
        n = self.num_envs
        obs, rewards, episodes = np.empty_like(self.obs), np.zeros(n, np.float32), []
        terminations, truncations, starts = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, bool)
        for i, (env, action) in enumerate(zip(self.envs, actions.tolist())):
            if self.over[i]:
                episodes.append((i, self.returns[i], len(self.histories[i])))
                self.seeds[i], self.over[i], starts[i] = int(self.rng.integers(2**31)), False, True
                obs[i] = self.reset(i)
            else:
                obs[i], rewards[i], terminations[i], truncations[i], _ = env.step(action)
                self.over[i] = bool(terminations[i] or truncations[i])
                self.returns[i] += float(rewards[i])
                self.histories[i].append(action)
        self.obs, self.starts = obs, starts
        infos = {"episode_starts": starts, "episodes": episodes}
        return obs, rewards, terminations, truncations, infos

    def state_dict(self) -> dict:
        names = ("seeds", "returns", "over", "histories")
        state = {name: getattr(self, name) for name in names} | {"starts": self.starts.tolist()}
        return state | {"rng": self.rng.bit_generator.state}


def make_env(env_id: str, num_envs: int, seed: int, **options) -> Episodes:
    """Environments of any id that observes a vector and chooses among actions."""
    try:
        envs = Episodes(env_id, num_envs, seed, **options)
    except Exception as e:  # gymnasium raises many kinds: unknown ids, packages that are missing
        reason = str(e).strip().splitlines()[0]
        sys.exit(f"error: --env-id {env_id}: {reason} Atari games run in dqn_atari.py.")
    env = envs.envs[0]
    if not isinstance(env.action_space, gym.spaces.Discrete):
        sys.exit(f"error: --env-id {env_id} has continuous actions; DQN needs Discrete ones.")
    if (
        not isinstance(env.observation_space, gym.spaces.Box)
        or len(env.observation_space.shape) != 1
    ):
        sys.exit(f"error: --env-id {env_id} observes no vector; Atari games run in dqn_atari.py.")
    return envs


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, D) float32
    actions: torch.Tensor  # (B,) int64
    rewards: torch.Tensor  # (B,) float32
    next_obs: torch.Tensor  # (B, D) float32
    discounts: torch.Tensor  # (B,) float32, gamma (1 - terminated)
    indices: torch.Tensor  # (B,) int64, rows in the replay


# --- shared: replay
class Replay:
    """A ring of the newest steps of each environment, every observation stored once.

    Row t holds the observation seen, the action taken, the reward received, whether the step
    terminated, and whether the observation opened an episode; s' is the next row's observation:

        row     s0  s1  s2  s3 |s0  s1  ...     s3 is a final observation: a row of its own, never
        opens    1   0   0   0 | 1   0  ...     drawn as a start, always there as an s'
        start?   y   y   y   - | y   y  ...

    A flat index is environment * rows + row.
    """

    def __init__(self, capacity, obs_shape, num_envs=1, gamma=0.99, seed=1):
        self.rows, self.num_envs, self.gamma = capacity // num_envs, num_envs, gamma
        self.rng = np.random.default_rng(seed)
        self.head = self.size = 0  # next row to write, rows stored (of each environment)
        shape = (self.rows, num_envs)
        self.obs = np.empty((*shape, *obs_shape), np.float32)
        self.actions = np.empty(shape, np.int64)
        self.rewards = np.zeros(shape, np.float32)
        self.terminations = np.empty(shape, bool)
        self.opens = np.empty(shape, bool)

    def __len__(self) -> int:
        return self.size * self.num_envs

    def add(self, obs, actions, rewards, terminations, episode_starts) -> None:
        """Write one row for each environment: arrays of shape (num_envs, ...)."""
        row = self.head
        self.obs[row], self.actions[row], self.rewards[row] = obs, actions, rewards
        self.terminations[row], self.opens[row] = terminations, episode_starts
        self.head, self.size = (row + 1) % self.rows, min(self.size + 1, self.rows)

    def drawable(self, indices) -> np.ndarray:
        """Whether a row is a start: the row after it is stored and opens no episode, (B,) bool."""
        envs, row = np.divmod(indices, self.rows)
        newer = (self.head - 1 - row) % self.rows  # rows of the same environment written since
        return (newer > 0) & (newer < self.size) & ~self.opens[(row + 1) % self.rows, envs]

    def draw(self, batch_size: int) -> np.ndarray:
        """Uniform over all drawable rows, (B,) int64; only the rejected are drawn again."""
        indices = np.empty(0, np.int64)
        while len(indices) < batch_size:
            env, row = self.rng.integers(0, [[self.num_envs], [max(self.size, 1)]], (2, batch_size))
            new = env * self.rows + row
            indices = np.concatenate([indices, new[self.drawable(new)]])[:batch_size]
            if not len(indices) and not self.drawable(np.arange(self.num_envs * self.rows)).any():
                raise ValueError("the replay holds no whole transition yet: add more rows first")
        return indices

    def gather(self, indices) -> Batch:
        """The transitions that start at these rows."""
        envs, row = np.divmod(indices, self.rows)
        discounts = np.where(self.terminations[row, envs], 0, self.gamma).astype(np.float32)
        next_obs = self.obs[(row + 1) % self.rows, envs]
        arrays = (self.actions[row, envs], self.rewards[row, envs], next_obs, discounts, indices)
        return Batch(*map(torch.from_numpy, (self.obs[row, envs], *arrays)))

    def sample(self, batch_size: int) -> Batch:
        return self.gather(self.draw(batch_size))

    def state_dict(self) -> dict:
        names = ("obs", "actions", "rewards", "terminations", "opens")
        rows = {k: torch.from_numpy(getattr(self, k)[: self.size]) for k in names}
        return rows | {"head": self.head, "size": self.size, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        self.head, self.size = state["head"], state["size"]
        for k in ("obs", "actions", "rewards", "terminations", "opens"):
            getattr(self, k)[: self.size] = state[k].numpy()
        self.rng.bit_generator.state = state["rng"]


# --- end shared


class QNetwork(nn.Module):
    """Two hidden layers: (B, D) float32 -> (B, A) action values."""

    def __init__(self, obs_size: int, n_actions: int):
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(obs_size, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, n_actions),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def td_loss(q_network, target_network, batch: Batch, args: Args):
    """The loss of one batch, a scalar, and its errors y - Q(s, a), (B,)."""
    with torch.no_grad():
        # y = r + gamma Q(s', argmax_a' Q(s', a'; theta); theta^-): theta chooses, theta^- values
        next_actions = q_network(batch.next_obs).argmax(dim=1, keepdim=True)  # (B, 1)
        next_q_values = target_network(batch.next_obs).gather(1, next_actions).squeeze(1)  # (B,)
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
    """Play `eval_episodes` whole episodes with epsilon `eval_e`: their returns."""
    n, rng, returns = min(args.eval_episodes, 10), np.random.default_rng(args.seed), []
    options = {"render_mode": "rgb_array"} if video_folder else {}
    envs = make_env(args.env_id, n, args.seed + 10_000, **options)
    obs, _ = envs.start()
    filming = bool(video_folder)
    film = [envs.envs[0].render()] if filming else []
    # each lane plays its share of the episodes, so that short ones do not count more often
    left = np.array([len(range(lane, args.eval_episodes, n)) for lane in range(n)])
    while left.any() and not stop:
        q_values = q_network(torch.from_numpy(obs).to(device))  # (n, A)
        actions, explore = rng.integers(q_values.shape[1], size=n), rng.random(n) < args.eval_e
        actions = np.where(explore, actions, q_values.argmax(dim=1).cpu().numpy())
        obs, *_, infos = envs.step(actions)
        if filming:
            film.append(envs.envs[0].render())
        for env, episode_return, _ in infos["episodes"]:
            filming &= env != 0
            if left[env]:
                returns.append(episode_return)
                left[env] -= 1
    if video_folder:
        from gymnasium.utils.save_video import save_video

        save_video(film, str(video_folder), lambda _: True, fps=30)
    return np.array(returns)


def main(args: Args, saved: dict) -> None:
    # ------------------------------------------------------------------------------------ set up
    if args.buffer == "auto":
        args.buffer = built_buffers(args)[-1]
    check_args(args, bytes_per_row=100)
    device, n = prepare(args), args.num_envs
    rng = np.random.default_rng(args.seed)
    envs = make_env(args.env_id, n, args.seed)
    env = envs.envs[0]
    n_actions, obs_shape = int(env.action_space.n), env.observation_space.shape
    q_network = QNetwork(*obs_shape, n_actions).to(device)
    target_network = QNetwork(*obs_shape, n_actions).to(device)
    target_network.load_state_dict(q_network.state_dict())
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
    loss_fn = torch.compile(td_loss) if args.compile else td_loss
    options = {"gamma": args.gamma, "seed": args.seed}
    if args.buffer != "numpy":  # the same class that stacks frames: here one vector, no stack
        options |= {"stack": None, "frame_dtype": torch.float32}
        options |= {"device": device if args.buffer == "cuda" else "cpu"}
    replay_class = Replay if args.buffer == "numpy" else fastreplay.FrameReplay
    replay = replay_class(args.buffer_size, obs_shape, n, **options)
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
        next_obs, rewards, terminations, _, infos = envs.step(actions)
        global_step += n

        # --------------------------------------------------------------------------------- store
        replay.add(obs, actions, rewards, terminations, episode_starts)
        obs, episode_starts = next_obs, infos["episode_starts"]

        # --------------------------------------------------------------------------------- learn
        learning = len(replay) >= args.learning_starts
        for _ in range(due(args.train_frequency) if learning else 0):
            batch = replay.sample(args.batch_size)
            if args.anneal_lr:
                remaining = 1 - global_step / args.total_timesteps
                optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            # [:6]: fastreplay's batch has importance weights behind these
            loss = learn(Batch(*(x.to(device, non_blocking=True) for x in batch[:6])))

        # --------------------------------------------------------------------------- sync target
        if learning and due(args.target_network_frequency):
            for p_target, p in zip(target_network.parameters(), q_network.parameters()):
                p_target.data.lerp_(p.data, args.tau)

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
