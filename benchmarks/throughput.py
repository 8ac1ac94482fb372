"""Agent steps per second while learning: CleanQ beside CleanRL and Stable-Baselines3, in one run.

    python benchmarks/throughput.py --task atari --cleanrl ~/cleanrl --record benchmarks/records/...

All sides play the same game with the same network, batch size, update frequency, target period and
epsilon, on the same number of threads. They take turns, `--repeats` times, each in a process of its
own; a memcpy before each turn shows the drift of the machine. A rate is that of the steps after
learning has started and warmed up.

CleanRL is a checkout of its repository (github.com/vwxyzjn/cleanrl). Its scripts were written for
gymnasium 0.29; on 1.x they run here unchanged under the old names of what gymnasium renamed, but
without their log of episodes, whose form has changed too.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TASKS = {
    "atari": {
        "env_id": "BreakoutNoFrameskip-v4",
        "learning_starts": 1_000,
        "buffer_size": 20_000,
        "batch_size": 32,
        "train_frequency": 4,
        "target_network_frequency": 1_000,
        "learning_rate": 1e-4,
    },
    "cartpole": {
        "env_id": "CartPole-v1",
        "learning_starts": 1_000,
        "buffer_size": 10_000,
        "batch_size": 128,
        "train_frequency": 10,
        "target_network_frequency": 500,
        "learning_rate": 2.5e-4,
    },
}
EPSILON = 0.01


class Clock:
    """Times of steps; the rate is taken from `first` steps on, until enough seconds have gone."""

    def __init__(self, first, seconds):
        self.first, self.seconds, self.start, self.step = first, seconds, None, 0

    def tick(self, steps):
        self.step += steps
        if self.start is None:
            if self.step >= self.first:
                self.start = (self.step, time.perf_counter())
        elif time.perf_counter() - self.start[1] > self.seconds:
            rate = (self.step - self.start[0]) / (time.perf_counter() - self.start[1])
            print(json.dumps({"steps_per_second": rate}), flush=True)
            os._exit(0)  # the sides have no common way to be stopped


def flags(options):
    """{"num_envs": 8, "bfloat16": "True"} -> ["--num-envs", "8", "--bfloat16"]"""
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in options.items()]
    return [x for flag, value in pairs for x in ((flag,) if value == "True" else (flag, value))]


def run_cleanq(script, task, clock, options):
    import tqdm

    class Bar(tqdm.tqdm):
        def update(self, n=1):
            clock.tick(n)

    tqdm.tqdm = Bar
    path = HERE.parent / "algos" / f"{script}.py"
    options = {"start_e": EPSILON, "end_e": EPSILON, "eval_frequency": 0} | task | options
    sys.argv = [str(path), *flags(options), "--checkpoint-frequency", "0"]
    runpy.run_path(str(path), run_name="__main__")


def run_cleanrl(script, task, clock, folder):
    import ale_py  # noqa: F401  (registers the games)
    import gymnasium as gym
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    class OldSyncVectorEnv(SyncVectorEnv):
        """gymnasium 0.29's: the new episode's observation comes at once."""

        def __init__(self, env_fns):
            super().__init__(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)

        def step(self, actions):
            *result, infos = super().step(actions)
            clock.tick(1)
            if "final_obs" in infos:
                infos["final_observation"] = infos["final_obs"]
            infos.pop("final_info", None)
            return *result, infos

    gym.vector.SyncVectorEnv = OldSyncVectorEnv
    gym.wrappers.GrayScaleObservation = gym.wrappers.GrayscaleObservation
    gym.wrappers.FrameStack = gym.wrappers.FrameStackObservation
    sys.path.insert(0, folder)
    path = Path(folder) / "cleanrl" / f"{script}.py"
    sys.argv = [str(path), *flags({"start_e": EPSILON, "end_e": EPSILON} | task)]
    runpy.run_path(str(path), run_name="__main__")


def run_sb3(task, clock, atari):
    import ale_py  # noqa: F401  (registers the games)
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    class Tick(BaseCallback):
        def _on_step(self):
            clock.tick(1)
            return True

    if atari:
        env = VecFrameStack(make_atari_env(task["env_id"], n_envs=1, seed=1), 4)
        policy, net = "CnnPolicy", {}
    else:
        env, policy, net = make_vec_env(task["env_id"], 1, 1), "MlpPolicy", {"net_arch": [120, 84]}
    model = DQN(
        policy,
        env,
        learning_rate=task["learning_rate"],
        buffer_size=task["buffer_size"],
        learning_starts=task["learning_starts"],
        batch_size=task["batch_size"],
        train_freq=task["train_frequency"],
        target_update_interval=task["target_network_frequency"],
        exploration_initial_eps=EPSILON,
        exploration_final_eps=EPSILON,
        policy_kwargs=net,
        device="cpu",
    )
    model.learn(10**9, callback=Tick())


def work(args):
    """One turn of one side, in this process."""
    import torch

    torch.set_num_threads(args.threads)
    task = TASKS[args.task]
    warm_up = 400 if args.task == "atari" else 5_000
    clock = Clock(task["learning_starts"] + warm_up, args.seconds)
    atari = args.task == "atari"
    side, _, variant = args.work.partition(" ")
    if side == "CleanQ":
        options = {"torch_threads": args.threads, "device": "cpu"}
        options |= dict(pair.split("=") for pair in variant.split())
        script = options.pop("script", "dqn_atari" if atari else "dqn_cartpole")
        run_cleanq(script, task, clock, options)
    elif side == "CleanRL":
        run_cleanrl("dqn_atari" if atari else "dqn", task, clock, args.cleanrl)
    else:
        run_sb3(task, clock, atari)


def drift_ms():
    import numpy as np

    source = np.zeros(2**26, np.uint8)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        source.copy()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def run(command, folder, limit):
    """-> what it printed, and its errors."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return "", f"took longer than {limit:.0f} s"
    return done.stdout, done.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="atari")
    parser.add_argument("--cleanrl", help="a checkout of CleanRL; left out without one")
    parser.add_argument("--alone", action="store_true", help="without the peers, which use the CPU")
    parser.add_argument("--variants", nargs="*", default=["num_envs=1", "num_envs=8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0, help="measured in each turn")
    parser.add_argument("--record", help="folder for results.json and README.md")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    if args.cleanrl:
        args.cleanrl = str(Path(args.cleanrl).expanduser().resolve())
    sides = [f"CleanQ {variant}".strip() for variant in args.variants]
    sides += ["CleanRL"] if args.cleanrl else []
    sides += [] if args.alone else ["Stable-Baselines3"]
    rates, drift, missing = {side: [] for side in sides}, [], {}
    for repeat in range(args.repeats):
        for side in sides:
            if side in missing:
                continue
            drift.append(drift_ms())
            command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--work", side]
            command += ["--cleanrl", args.cleanrl] if args.cleanrl else []  # of any folder
            with tempfile.TemporaryDirectory() as folder:
                output, words = run(command, folder, limit=60 + 10 * args.seconds)
            lines = [x for x in output.splitlines() if x.startswith('{"steps_per_second"')]
            if not lines:
                missing[side] = (words.strip().splitlines() or ["no output"])[-1]
                print(f"{side}: not measured: {missing[side]}", flush=True)
                continue
            rates[side].append(json.loads(lines[-1])["steps_per_second"])
            print(f"{repeat + 1}/{args.repeats} {side}: {rates[side][-1]:.0f}", flush=True)
        report(args, rates, drift, missing)
    print(table(args, rates, drift, missing))
    if any(side.startswith("CleanQ") for side in missing):
        sys.exit(1)


def table(args, rates, drift, missing):
    """Markdown: a row for each side."""
    medians = {side: statistics.median(r) for side, r in rates.items() if r}
    peers = [middle for side, middle in medians.items() if not side.startswith("CleanQ")]
    fastest = max(peers, default=float("nan"))
    lines = [
        f"# Throughput while learning, {TASKS[args.task]['env_id']}, {args.threads} threads",
        "",
        "| side | agent steps/s, median | lowest | highest | to the fastest peer |",
        "|---|---:|---:|---:|---:|",
    ]
    for side, r in rates.items():
        if side in missing:
            lines.append(f"| {side} | not measured: {missing[side]} | | | |")
            continue
        row = f"| {side} | {medians[side]:.0f} | {min(r):.0f} | {max(r):.0f} "
        lines.append(row + f"| {medians[side] / fastest:.2f} |")
    lines += ["", f"Drift (64 MiB memcpy, ms): {min(drift):.1f} to {max(drift):.1f}"]
    lines += [f"Task: {json.dumps(TASKS[args.task])}, epsilon {EPSILON}"]
    if args.cleanrl:
        lines += [f"CleanRL: commit {commit_of(args.cleanrl)}"]
    return "\n".join(lines)


def report(args, rates, drift, missing):
    if not args.record:
        return
    from machine import write_record

    results = {"cleanrl_commit": commit_of(args.cleanrl) if args.cleanrl else None}
    results |= {"steps_per_second": rates, "drift_ms": drift, "task": TASKS[args.task]}
    write_record(args.record, results, table(args, rates, drift, missing))


def commit_of(checkout):
    git = ["git", "-C", checkout, "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
