"""Double Q-learning in a table. van Hasselt, 2010, Advances in Neural Information Processing 23.

Throw two fair dice. The expected maximum of the two numbers is 161/36 = 4.47; the maximum of the
two expectations is 3.5. Q-learning wants the second, max_a' E[Q(s', a')], and uses the first: the
maximum of estimates with noise is too high on average, even if no single estimate is. As part of a
target it makes other estimates too high. DQN's over-estimation is the same: a max in the target.

    Q_A(s, a) <- Q_A(s, a) + alpha (r + gamma Q_B(s', argmax_a' Q_A(s', a')) - Q_A(s, a))

or with A and B swapped: a fair coin decides at each update. Q_A says which action is the best, and
Q_B, which has learned from other steps, what it is worth: the noise that made Q_A choose it is not
in Q_B. (Dice: let one throw choose the die; a second throw of that die is 3.5 on average.)

Parent: q_learning_tabular.py. What changes: a second table, and a coin in `update`.

As in the paper: n(s, a) is counted for each table; the policy uses the average of the tables.
Settings: the list in q_learning_tabular.py. The estimate can be too low: a policy that Q_A chooses
is not better than the best. Without noise (CliffWalking, Taxi) a second table only costs time.

Run: python algos/double_q_learning_tabular.py
Try: --env-id MaximizationBias-v0 (Sutton and Barto, 2018, Example 6.7), and with the parent
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass
class Args:  # the algorithm's; RunArgs, below the line, adds --resume, --eval-episodes and so on
    env_id: str = "FrozenLake-v1"  # discrete observations and actions; others: see ENV_DEFAULTS
    seed: int = 1  # of the environment, exploration and ties
    total_timesteps: int = 500_000  # environment steps
    learning_rate: float = 1.0  # alpha at the first update of Q(s, a)
    learning_rate_decay: float = 0.55  # w: alpha = learning_rate / n(s, a)^w; 0: constant
    gamma: float = 0.99  # discount factor
    start_e: float = 1.0  # epsilon at the first step
    end_e: float = 0.1  # epsilon once it has decayed
    exploration_fraction: float = 1.0  # decay time (exponential: time constant) / total_timesteps


class Transition(NamedTuple):
    obs: int  # s
    action: int  # a
    reward: float  # r
    next_obs: int  # s'
    discount: float  # gamma, or 0 where s' is terminal


def make_q_table(legal: np.ndarray) -> np.ndarray:
    """Q_A and Q_B, (2, S, A): 0, or -inf where the action is not legal, (S, A) bool."""
    return np.where([legal, legal], 0.0, -np.inf)


def action_values(q_table: np.ndarray, obs) -> np.ndarray:
    """The values by which the policy chooses, (A,). For obs = slice(None): of all states, (S, A)"""
    return (q_table[0, obs] + q_table[1, obs]) / 2


def argmax(q_values: np.ndarray, rng) -> int:
    """argmax_a Q(s, a); each of several best actions has the same probability."""
    best = np.flatnonzero(q_values == q_values.max())
    return int(best[rng.integers(len(best))])


def learning_rate_at(n: int, args: Args) -> float:
    """alpha of the n-th update of Q(s, a), n = 1, 2, ..."""
    return args.learning_rate / n**args.learning_rate_decay


def update(q_table, counts, transition: Transition, args: Args, rng) -> tuple[float, float]:
    """Changes Q_A(s, a) and n_A(s, a) in place. -> TD error; Q_A(s, a) before the update"""
    obs, action, reward, next_obs, discount = transition
    coin = int(rng.random() < 0.5)  # fair: the table that learns, Q_A; the other one is Q_B
    q_table, other_table, counts = q_table[coin], q_table[1 - coin], counts[coin]  # (S, A) each
    # y = r + gamma Q_B(s', argmax_a' Q_A(s', a'))
    td_target = reward + discount * other_table[next_obs, argmax(q_table[next_obs], rng)]
    q_taken = q_table[obs, action]  # Q(s, a)
    td_error = td_target - q_taken
    counts[obs, action] += 1  # n(s, a)
    q_table[obs, action] += learning_rate_at(counts[obs, action], args) * td_error
    return td_error, q_taken


def epsilon_at(step: int, args: Args) -> float:
    """Epsilon decays linearly from start_e to end_e."""
    duration = args.exploration_fraction * args.total_timesteps
    progress = min(step / duration, 1.0) if duration else 1.0
    return args.start_e + progress * (args.end_e - args.start_e)


def act(q_values: np.ndarray, epsilon: float, rng) -> int:
    """Epsilon-greedy: argmax_a Q(s, a), or with probability epsilon any legal action."""
    if rng.random() < epsilon:
        q_values = np.where(q_values > -np.inf, 0.0, -np.inf)  # all legal actions: one is drawn
    return argmax(q_values, rng)


def main(args: Args) -> None:
    run = Run(args)  # progress bar, logs, evaluations, checkpoints
    env = make_env(args.env_id, args.seed)
    q_table = make_q_table(env.legal)
    counts = np.zeros(q_table.shape, np.int64)  # n(s, a)
    run.start(q_table, counts, env)  # what a checkpoint holds; --resume loads it here
    obs = env.reset()
    for global_step in run.steps():  # 0, 1, 2, ...; Ctrl-C ends it early
        # ---- 1. act ------------------------------------------------------------------------------
        epsilon = epsilon_at(global_step, args)
        action = act(action_values(q_table, obs), epsilon, run.rng)
        # ---- 2. step -----------------------------------------------------------------------------
        next_obs, reward, terminated, truncated = env.step(action)
        # ---- 3. learn: only a termination makes s' terminal; a time limit (truncation) does not --
        transition = Transition(obs, action, reward, next_obs, args.gamma * (1 - terminated))
        td_error, q_taken = update(q_table, counts, transition, args, run.rng)

        run.log(env.ended, epsilon, td_error, q_taken)
        obs = env.reset() if terminated or truncated else next_obs  # a new episode


# ==================================================================================================
# End of double Q-learning. Below, the same in every *_tabular.py: environments, logs, checkpoints.
# ==================================================================================================

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, fields
from pathlib import Path

import gymnasium as gym
import tyro
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm


@dataclass
class RunArgs(Args):
    exp_name: str = Path(__file__).stem  # part of the name of the run's folder under `runs/`
    log_frequency: int = 5_000  # environment steps between two log entries
    eval_frequency: int = 50_000  # environment steps between two evaluations; 0: only the last one
    eval_episodes: int = 100  # episodes per evaluation; 0: no evaluation
    eval_e: float = 0.0  # epsilon while evaluating
    eval_max_steps: int = 1_000  # longest evaluated episode if the environment sets no limit
    checkpoint_frequency: int = 50_000  # environment steps between checkpoints; 0: only the last
    resume: str | None = None  # checkpoint to go on from; its arguments apply unless given again
    evaluate: str | None = None  # checkpoint to evaluate and print; nothing is trained


NOTEBOOK = "ipykernel" in sys.modules  # %run in a cell: streams and SIGTERM are the kernel's
# Settings of environments whose id starts so; those in Args are for FrozenLake.
ENV_DEFAULTS = {
    "CliffWalking-v": {
        "total_timesteps": 100_000,
        "learning_rate": 0.5,
        "learning_rate_decay": 0.0,
        "eval_frequency": 10_000,
    },
    "Taxi-v": {"learning_rate_decay": 0.0, "end_e": 0.5},
    "MaximizationBias-v": {  # those of the book
        "total_timesteps": 10_000,
        "learning_rate": 0.1,
        "learning_rate_decay": 0.0,
        "gamma": 1.0,
        "start_e": 0.1,
        "end_e": 0.1,
        "log_frequency": 100,
        "eval_frequency": 0,
    },
}
MAX_ENTRIES = 10**7  # of a table


class MaximizationBias(gym.Env):
    """Sutton and Barto, 2018, Example 6.7. In A, right ends with 0, and left leads to B with 0. In
    B every action ends with a reward from N(-0.1, 1): left is wrong, but max_a Q(B, a) > 0."""

    def __init__(self, n_actions: int = 10):
        self.observation_space = gym.spaces.Discrete(3)  # A, B, the end
        self.action_space = gym.spaces.Discrete(n_actions)  # of B
        self.legal_actions = np.ones((3, n_actions), bool)
        self.legal_actions[0, 2:] = False  # A has two: left and right

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return 0, {}

    def step(self, action):
        from_b = self.state == 1
        reward = self.np_random.normal(-0.1, 1.0) if from_b else 0.0
        self.state = 1 if not from_b and action == 0 else 2
        return self.state, reward, self.state == 2, False, {}


if "MaximizationBias-v0" not in gym.registry:
    gym.register("MaximizationBias-v0", MaximizationBias)


class Environment:
    """One environment. An episode follows from its seed and its actions: a checkpoint holds both
    and plays them again. `step` never resets."""

    def __init__(self, env_id: str, seed, **options):
        self.env = gym.make(env_id, disable_env_checker=True, **options)
        spaces = self.env.observation_space, self.env.action_space
        for space, what in zip(spaces, ("observations", "actions")):
            if not isinstance(space, gym.spaces.Discrete):
                kind = type(space).__name__
                raise ValueError(f"it has {kind} {what}; a table needs Discrete ones")
        shape = self.n_states, self.n_actions = int(spaces[0].n), int(spaces[1].n)
        if math.prod(shape) > MAX_ENTRIES:
            raise ValueError(f"its table has {math.prod(shape)} entries, above {MAX_ENTRIES}")
        self.first_obs, self.first_action = int(spaces[0].start), int(spaces[1].start)
        self.legal = np.array(getattr(self.env.unwrapped, "legal_actions", np.ones(shape, bool)))
        self.env_id, self.rng = env_id, np.random.default_rng(seed)
        self.seed, self.actions, self.episode_return = None, [], 0.0
        self.ended = None  # return and length of the episode, if the last step ended it
        self.resumed = None  # the observation of a resumed episode

    def reset(self) -> int:
        """Start an episode; at first after load_state_dict, go on with the saved one. -> obs"""
        obs, self.resumed = self.resumed, None
        if obs is None:
            self.seed, self.actions = int(self.rng.integers(2**31)), []
            self.episode_return = 0.0
            obs = int(self.env.reset(seed=self.seed)[0]) - self.first_obs
        return obs

    def step(self, action: int) -> tuple[int, float, bool, bool]:
        """-> next_obs, reward, terminated, truncated"""
        obs, reward, terminated, truncated, _ = self.env.step(action + self.first_action)
        reward = float(reward)
        if not math.isfinite(reward):
            sys.exit(f"error: {self.env_id} returned a NaN or infinite reward.")
        self.actions.append(action)
        self.episode_return += reward
        over = terminated or truncated
        self.ended = (self.episode_return, len(self.actions)) if over else None
        return int(obs) - self.first_obs, reward, bool(terminated), bool(truncated)

    def state_dict(self) -> dict:
        return {"seed": self.seed, "actions": self.actions, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.seed, obs = state["seed"], self.env.reset(seed=state["seed"])[0]
        self.resumed = int(obs) - self.first_obs
        for action in state["actions"]:
            self.resumed, _, terminated, truncated = self.step(action)
            if terminated or truncated:
                raise ValueError("its actions end the episode")


def make_env(env_id: str, seed, **options) -> Environment:
    """An environment of any id with discrete observations and actions."""
    try:
        return Environment(env_id, seed, **options)
    except Exception as e:  # gymnasium raises many kinds: unknown ids, missing packages
        reason = str(e).strip().split("\n")[0].rstrip(".")
        sys.exit(f"error: --env-id {env_id}: {reason}.")


def evaluate(q_values: np.ndarray, args: RunArgs, seed, stop=()):
    """Play whole episodes. -> their returns, and the states of the first"""
    limit = make_env(args.env_id, seed).env.spec.max_episode_steps
    env = make_env(args.env_id, seed, max_episode_steps=limit or args.eval_max_steps)
    rng, returns, path, cut = np.random.default_rng(seed), [], [], 0
    while len(returns) < args.eval_episodes and not stop:
        obs, over = env.reset(), False
        while not over and not stop:
            path += [] if returns else [obs]
            obs, _, terminated, truncated = env.step(act(q_values[obs], args.eval_e, rng))
            over = terminated or truncated
        if over:
            returns.append(env.episode_return)
            cut += truncated
    if cut and not limit:
        tqdm.write(f"{cut} of these episodes were cut at --eval-max-steps {args.eval_max_steps}")
    return np.array(returns), path


ACTIONS = {  # by the name of the environment's class
    "FrozenLakeEnv": ("left", "down", "right", "up"),
    "CliffWalkingEnv": ("up", "right", "down", "left"),
    "TaxiEnv": ("south", "north", "east", "west", "pick up", "drop off"),
    "MaximizationBias": ("0: left", "1: right"),
}
ROWS = 20  # printed at most


def state_name(state: int, env: gym.Env) -> str:
    """A state in words."""
    kind = type(env).__name__
    if kind == "TaxiEnv":
        row, column, passenger, destination = map(int, env.decode(state))
        where = "in it" if passenger == 4 else f"at {'RGYB'[passenger]}"
        return f"taxi ({row}, {column}), passenger {where}, to {'RGYB'[destination]}"
    if kind in ("FrozenLakeEnv", "CliffWalkingEnv"):
        n_columns = len(letters(env)[0])
        return f"row {state // n_columns}, column {state % n_columns}"
    return ("A", "B", "end")[state] if kind == "MaximizationBias" else str(state)


def letters(env: gym.Env) -> list[str]:
    """The map of FrozenLake or CliffWalking: S start, G goal, H hole, C cliff, others free."""
    if type(env).__name__ == "FrozenLakeEnv":
        return ["".join(x.decode() for x in row) for row in env.desc]
    rows = [["C" if x else "." for x in row] for row in env._cliff]
    rows[3][0], rows[3][11] = "S", "G"
    return ["".join(row) for row in rows]


def describe(q_values: np.ndarray, env: gym.Env, path: list[int]) -> str:
    """The greedy policy on the map, if there is one, and rows of the table.

    Of a large table: the states of an episode, `path`. States without values are left out: those
    that are terminal, and those that were never visited.
    """
    kind, (n_states, n_actions) = type(env).__name__, q_values.shape
    names = ACTIONS.get(kind, ())
    names = (*names, *map(str, range(len(names), n_actions)))
    lines = []
    if kind in ("FrozenLakeEnv", "CliffWalkingEnv"):
        arrows = {"left": "←", "down": "↓", "right": "→", "up": "↑"}
        if not can_print("".join(arrows.values())):
            arrows = {"left": "<", "down": "v", "right": ">", "up": "^"}
        grid = "".join(letters(env))
        ends = {"H": "H hole, G goal", "C": "C cliff, G goal"}["H" if "H" in grid else "C"]
        lines += [f"greedy policy ({ends}) and max_a Q(s, a)"]
        cells = [arrows[names[a]] if q.any() else "." for a, q in zip(q_values.argmax(1), q_values)]
        cells = [x if x in "HCG" else cell for x, cell in zip(grid, cells)]
        values = [" " * 8 if x in "HCG" else f"{v:8.3f}" for x, v in zip(grid, q_values.max(1))]
        width = len(letters(env)[0])
        for i in range(0, n_states, width):
            lines += [" ".join(cells[i : i + width]) + "  " + "".join(values[i : i + width])]
        lines += [""]
    everything = n_states <= ROWS
    states = list(range(n_states)) if everything else list(dict.fromkeys(path))[:ROWS]
    which = "" if everything else ", along the first evaluated episode"
    states = [state for state in states if q_values[state].any()]
    labels = [state_name(state, env) for state in states]
    width = max(map(len, labels), default=0)
    lines += [f"Q(s, a){which} (* the best action)"]
    lines += [" " * width + "".join(f"{name:>11}" for name in names)]
    for label, row in zip(labels, q_values[states]):
        best = np.where(row == row.max(), "*", " ")
        numbers = ["-" if x == -np.inf else f"{x:.3f}" for x in row]
        lines += [f"{label:{width}}" + "".join(f"{x:>10}{b}" for x, b in zip(numbers, best))]
    return "\n".join(line.rstrip() for line in lines)


def can_print(text: str) -> bool:
    try:
        return bool(text.encode(sys.stdout.encoding or "ascii"))
    except (UnicodeEncodeError, LookupError):
        return False


class Run:
    """Everything around the algorithm: counting steps, logs, evaluations, checkpoints, Ctrl-C."""

    def __init__(self, args: RunArgs):
        check_args(args)
        path = args.resume or args.evaluate
        self.saved = load_checkpoint(path) if path else {}
        self.args, self.rng = args, np.random.default_rng(args.seed)
        self.first_step = self.step = self.saved.get("global_step", 0)
        self.returns = deque(self.saved.get("recent_returns", ()), maxlen=100)
        self.episodes = self.saved.get("episodes", 0)
        self.interrupted = self.saved.get("interrupted", False)  # an evaluation, by Ctrl-C
        self.squares, self.q_sum, self.n = 0.0, 0.0, 0  # since the last log entry
        self.stop = []  # not empty after Ctrl-C: stop after this step; a second Ctrl-C exits
        for name in ("SIGINT",) if NOTEBOOK else ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.on_signal)

    def on_signal(self, *_) -> None:
        if self.stop and time.time() - self.stop[0] > 1:  # a closed terminal sends several
            sys.exit(130)
        self.stop.append(time.time())

    def start(self, q_table: np.ndarray, counts: np.ndarray, env: Environment) -> None:
        """Load the checkpoint, if there is one, and open the log."""
        self.q_table, self.counts, self.env = q_table, counts, env
        try:
            if self.saved:
                self.load(self.saved)
        except Exception as e:  # damaged contents raise errors of many kinds
            reason = str(e).strip().split("\n")[-1].strip()
            sys.exit(f"error: the checkpoint does not fit these arguments ({reason or repr(e)}).")
        self.seconds_before, self.started = self.saved.get("seconds", 0.0), time.time()
        if not self.args.evaluate:
            self.open_log()

    def load(self, saved: dict) -> None:
        for name, table in (("q_table", self.q_table), ("counts", self.counts)):
            if saved[name].shape != table.shape or saved[name].dtype != table.dtype:
                raise ValueError(f"its {name} is {saved[name].dtype} {saved[name].shape}")
        q_table, legal = saved["q_table"], np.isfinite(self.q_table)
        if not np.isfinite(q_table[legal]).all() or (q_table[~legal] != -np.inf).any():
            raise ValueError("a value is NaN or infinite")
        self.q_table[:], self.counts[:] = q_table, saved["counts"]
        if self.args.resume:
            self.env.load_state_dict(saved["env"])
            self.rng.bit_generator.state = saved["rng"]

    def save(self) -> bool:
        if not (self.q_table < np.inf).all():
            sys.exit("error: a value is NaN or infinite; try a smaller --learning-rate or --gamma.")
        state = {"env": self.env.state_dict(), "rng": self.rng.bit_generator.state}
        state |= {"global_step": self.step, "recent_returns": list(self.returns)}
        state["seconds"] = self.seconds_before + time.time() - self.started
        state |= {"episodes": self.episodes, "interrupted": self.interrupted}
        args = asdict(self.args) | {"resume": None, "evaluate": None}
        state |= {"script": Path(__file__).stem, "args": args}
        path = self.folder / "checkpoint.npz"
        return save_checkpoint(path, {"q_table": self.q_table, "counts": self.counts, **state})

    def open_log(self) -> None:
        args = self.args
        name = (args.env_id.replace("/", "-"), args.exp_name, args.seed, time.time_ns() // 10**6)
        run_name = "__".join(map(str, name))
        self.folder = Path(args.resume).parent if args.resume else Path("runs") / run_name
        table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        text = text_pb("hyperparameters/text_summary", f"|argument|value|\n|-|-|\n{table}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Without the thread of TensorBoard's EventFileWriter, which slows a fast loop down.
            self.writer = RecordWriter(open(self.folder / f"events.out.tfevents.{name[-1]}", "wb"))
        except OSError as e:
            sys.exit(f"error: cannot write to {self.folder} ({e.strerror}).")
        self.add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self.step:  # hide what an interrupted run logged after its checkpoint
            self.add(Event(step=self.step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.add(Event(wall_time=time.time(), summary=text), flush=True)
        print(f"{args.exp_name}: {args.env_id}, all in {self.folder}")
        settings = {field.name: getattr(args, field.name) for field in fields(Args)[1:]}
        print(", ".join(f"{key} {value}" for key, value in settings.items()), flush=True)
        total, interval = args.total_timesteps, 0.2 if sys.stderr.isatty() else 30  # seconds
        self.bar = tqdm(total=total, initial=self.step, unit="step", mininterval=interval)

    def steps(self):
        """Yield the number of steps taken so far; save and evaluate between two iterations."""
        args = self.args
        if args.evaluate:
            return self.evaluate(show=True)
        try:
            if self.interrupted and self.step < args.total_timesteps:
                self.evaluate()
            while self.step < args.total_timesteps and not self.stop:
                yield self.step
                self.step += 1
                self.bar.update()
                if self.step < args.total_timesteps:
                    if self.due(args.eval_frequency):  # before the checkpoint: it is not redone
                        self.evaluate()
                    if self.due(args.checkpoint_frequency):
                        self.save()
            self.finish()
        except GeneratorExit:  # the loop was left by an error
            path = self.folder / "checkpoint.npz"
            if path.exists():
                tqdm.write(f"The last checkpoint is {path}.", file=sys.stderr)
            raise
        finally:
            self.bar.close()
            with contextlib.suppress(OSError):
                if self.writer:
                    self.writer.close()

    def due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def finish(self) -> None:
        """The last checkpoint and evaluation, and how to go on if steps are left."""
        self.bar.close()
        if self.step == self.first_step and not self.stop:
            print("no step was trained: raise --total-timesteps")
        saved = self.save()
        if self.step >= self.args.total_timesteps:
            self.evaluate(show=True)
        elif saved:
            path = (self.folder / "checkpoint.npz").as_posix()  # cmd.exe takes no quotes
            command = [Path(sys.argv[0]).as_posix(), "--resume", path]
            print("go on with:", "%run" if NOTEBOOK else "python", shlex.join(command))
        if not saved:
            sys.exit(1)

    def log(self, episode, epsilon: float, td_error: float, q_taken: float) -> None:
        """Write what CleanRL's dashboards show."""
        step = self.step + 1
        if episode:
            self.returns.append(episode[0])
            self.episodes += 1
            names = ("charts/episodic_return", "charts/episodic_length")
            self.write(dict(zip(names, episode)), step, flush=False)
        self.squares += td_error**2
        self.q_sum += q_taken
        self.n += 1
        if step % self.args.log_frequency:
            return
        seconds = max(time.time() - self.started, 1e-9)
        figures = {"charts/epsilon": epsilon, "losses/td_loss": self.squares / self.n}
        figures["losses/q_values"] = self.q_sum / self.n
        if self.returns:
            figures["charts/mean_return_100"] = np.mean(self.returns)
        self.squares, self.q_sum, self.n = 0.0, 0.0, 0
        shown = {name.split("/")[1]: f"{x:.3g}" for name, x in figures.items()}
        self.bar.set_postfix(shown, refresh=False)
        figures["charts/SPS"] = (step - self.first_step) / seconds
        figures["charts/hours"] = (self.seconds_before + seconds) / 3600
        self.write(figures, step)

    def write(self, figures: dict, step: int, flush: bool = True) -> None:
        """Write one event to the log, with all figures."""
        values = [Summary.Value(tag=name, simple_value=x) for name, x in figures.items()]
        self.add(Event(step=step, wall_time=time.time(), summary=Summary(value=values)), flush)

    def add(self, event: Event, flush: bool = False) -> None:
        """Write to the log; go on without a log if that fails."""
        try:
            if self.writer:
                self.writer.write(event.SerializeToString())
                if flush:
                    self.writer.flush()
        except OSError as e:
            self.writer = None
            tqdm.write(f"error: cannot log to {self.folder} ({e.strerror}); training continues.")

    def evaluate(self, show: bool = False) -> None:
        """Play episodes of new seeds, which follow from --seed and the step; print the policy."""
        args, q_values = self.args, action_values(self.q_table, slice(None))  # (S, A)
        returns, path = evaluate(q_values, args, (args.seed, self.step + 1), self.stop)
        self.interrupted = bool(self.stop)
        if self.stop:
            return tqdm.write(f"evaluation stopped after {len(returns)} episodes")
        if len(returns):
            score = f"{returns.mean():.2f} +- {returns.std():.2f} in {len(returns)} episodes"
            tqdm.write(f"{args.env_id}, step {self.step}, evaluated: {score}")
            if not args.evaluate:
                self.write({"eval/episodic_return": returns.mean()}, self.step)
        if show:
            print("\n" + describe(q_values, self.env.env.unwrapped, path))


def save_checkpoint(path: Path, state: dict) -> bool:
    """Write atomically: the new file replaces the old one once it is on the disk."""
    arrays = {name: x for name, x in state.items() if isinstance(x, np.ndarray)}
    rest = json.dumps({name: x for name, x in state.items() if name not in arrays})
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays, rest=np.array(rest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        return True
    except OSError as e:
        reason = (e.strerror or str(e)).lower()
        kept = "; the one before it is kept" if path.exists() else ""
        tqdm.write(f"error: {path} not written ({reason}){kept}", file=sys.stderr)
        with contextlib.suppress(OSError):
            partial.unlink()
        return False


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of this script without running code from it, or exit with one line."""
    try:
        with np.load(path, allow_pickle=False) as file:
            state = {name: file[name] for name in ("q_table", "counts")}
            state |= json.loads(str(file["rest"]))
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
        if min(found["global_step"], found["episodes"], state["counts"].min()) < 0:
            raise ValueError("its step, its number of episodes or of updates is negative")
        if {type(x) for x in found["recent_returns"]} - {float}:
            raise ValueError("its returns are damaged")
        return state
    except FileNotFoundError:
        sys.exit(f"error: no checkpoint at {path}; look for runs/<run>/checkpoint.npz.")
    except Exception as e:  # damaged contents raise errors of many kinds
        reason = f"{type(e).__name__}: {e}".split("\n")[0]
        sys.exit(f"error: {path} is not a checkpoint of this script, or is damaged ({reason}).")


def parse_args() -> RunArgs:
    """The command line. With --resume or --evaluate the defaults are the checkpoint's arguments."""
    args = tyro.cli(RunArgs)
    for prefix, defaults in ENV_DEFAULTS.items():
        if args.env_id.startswith(prefix):
            args = tyro.cli(RunArgs, default=RunArgs(**defaults))
    path = args.resume or args.evaluate
    if not path:
        return args
    if args.resume and args.evaluate:
        sys.exit("error: give --resume or --evaluate, not both.")
    saved = load_checkpoint(path)["args"]
    args = tyro.cli(RunArgs, default=RunArgs(**saved))
    if args.env_id != saved["env_id"]:
        sys.exit(f"error: --env-id cannot change; leave it at {saved['env_id']}.")
    return args


def check_args(args: RunArgs) -> None:
    """Exit with one line that says which argument is wrong, before anything is written."""

    def must(name: str, rule: str, holds: bool) -> None:
        if not holds:
            flag = "--" + name.replace("_", "-")
            sys.exit(f"error: {flag} must be {rule} (it is {getattr(args, name)}).")

    fractions = ("gamma", "learning_rate_decay", "start_e", "end_e", "exploration_fraction")
    or_zero = ("seed", "eval_frequency", "eval_episodes", "checkpoint_frequency")
    positive = ("total_timesteps", "log_frequency", "eval_max_steps")
    for name, value in asdict(args).items():
        if name in (*fractions, "eval_e"):
            must(name, "between 0 and 1", 0 <= value <= 1)
        elif name in or_zero:
            must(name, "0 or more, and below 2**63", 0 <= value < 2**63)
        elif name in positive:
            must(name, "positive, and below 2**63", 0 < value < 2**63)
    must("learning_rate", "above 0 and at most 1", 0 < args.learning_rate <= 1)


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
