"""One turn of a peer of throughput.py, which starts it in a process of its own.

    python benchmarks/throughput_peers.py 'Tianshou num_envs=4' '{"seconds": 12, ...}'

Prints the agent steps per second as one line of JSON. Each peer runs as it comes, but for this:

- CleanRL's and LeanRL's scripts expect gymnasium 0.29; the names, the arguments and the log of
  episodes that 1.x changed are restored.
- CleanRL's rainbow_atari.py stores scalars, because NumPy 2.4 refuses its arrays of one element.
- LeanRL's calls of Weights & Biases do nothing.
- Tianshou does not look for NaN in its whole replay after every collection, which would take most
  of its time. Its wrappers take the type of the pixels from the space, because NumPy 2.4 refuses
  the abstract type that they ask for.
"""

import json
import os
import runpy
import sys
import time
import types
from pathlib import Path

import numpy as np

PEERS = {  # the words of each one, and their values; (): any
    "CleanRL": {"script": ()},  # and the script's flags
    "LeanRL": {"script": ("dqn", "dqn_torchcompile")},  # and the script's flags
    "Stable-Baselines3": {"algorithm": ("DQN", "QRDQN"), "num_envs": (), "n_quantiles": ()},
    "Tianshou": {"algorithm": ("DQN", "C51", "QRDQN"), "num_envs": (), "n_quantiles": ()},
}
EPSILON = 0.01


def flags_of(options):
    """{"num_envs": 8, "compile": "True"} -> ["--num-envs", "8", "--compile"]"""
    flags = []
    for key, value in options.items():
        flags += [f"--{key.replace('_', '-')}"] + ([] if str(value) == "True" else [str(value)])
    return flags


class Clock:
    """Counts a peer's steps. Prints the rate over `seconds` after the warm-up and ends the process.

    The warm-up begins with step `learning_starts` and takes `warm_up` seconds.
    """

    def __init__(self, learning_starts, warm_up, seconds):
        self.learning_starts, self.warm_up, self.seconds = learning_starts, warm_up, seconds
        self.step, self.learning, self.start = 0, None, None

    def tick(self, steps=1):
        self.step += steps
        now = time.perf_counter()
        if self.learning is None and self.step >= self.learning_starts:
            self.learning = now
        if self.start is None:
            if self.learning is not None and now >= self.learning + self.warm_up:
                self.start = self.step, now
        elif now >= self.start[1] + self.seconds:
            rate = (self.step - self.start[0]) / (now - self.start[1])
            print(json.dumps({"steps_per_second": rate}), flush=True)
            os._exit(0)  # there is no common way to stop the peers


def run_script(task, clock, path, **options):
    """Run a script of CleanRL or LeanRL in this process."""
    import ale_py  # noqa: F401  (registers the games)
    import gymnasium as gym
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    class OldSyncVectorEnv(SyncVectorEnv):
        """As in gymnasium 0.29: a step that ends an episode returns the next one's first frame."""

        def __init__(self, env_fns):
            super().__init__(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)

        def step(self, actions):
            *result, infos = super().step(actions)
            clock.tick(self.num_envs)
            if "final_obs" in infos:
                infos["final_observation"] = infos["final_obs"]
                final, ended = infos["final_info"], infos["_final_info"]
                infos["final_info"] = [{} if ends else None for ends in ended]
                for i in final.get("_episode", np.array([])).nonzero()[0]:  # not at a lost life
                    episode = {key: final["episode"][key][i : i + 1] for key in "rlt"}
                    infos["final_info"][i]["episode"] = episode
            return *result, infos

    gym.vector.SyncVectorEnv = OldSyncVectorEnv
    gym.wrappers.GrayScaleObservation = gym.wrappers.GrayscaleObservation
    gym.wrappers.FrameStack = gym.wrappers.FrameStackObservation
    sys.modules["wandb"] = types.SimpleNamespace(init=lambda **_: None, log=lambda *_, **__: None)
    sys.path.insert(0, str(path.parent.parent))
    source = path.read_text()
    stored = "obs, actions, rewards, real_next_obs, terminations"
    source = source.replace(f"rb.add({stored})", f"rb.add(*(x[0] for x in ({stored})))")
    path = Path(path.name)  # in the turn's own folder
    path.write_text(source)
    sys.argv = [str(path), *flags_of({"start_e": EPSILON, "end_e": EPSILON} | task | options)]
    runpy.run_path(str(path), run_name="__main__")


def run_sb3(task, clock, atari, algorithm="DQN", num_envs=1, **policy_options):
    """Train Stable-Baselines3's DQN, or sb3-contrib's QRDQN, in this process.

    n environments make `train_frequency` n steps, and then n updates.
    """
    import ale_py  # noqa: F401  (registers the games)
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    class Tick(BaseCallback):
        def _on_step(self):
            clock.tick(num_envs)
            return True

    if algorithm == "DQN":
        from stable_baselines3 import DQN as Algorithm
    else:
        from sb3_contrib import QRDQN as Algorithm
    if atari:
        env = VecFrameStack(make_atari_env(task["env_id"], n_envs=num_envs, seed=1), 4)
        policy, net = "CnnPolicy", {}
    else:
        env = make_vec_env(task["env_id"], num_envs, 1)
        policy, net = "MlpPolicy", {"net_arch": [120, 84]}
    model = Algorithm(
        policy,
        env,
        learning_rate=task["learning_rate"],
        buffer_size=task["buffer_size"],
        learning_starts=task["learning_starts"],
        batch_size=task["batch_size"],
        train_freq=task["train_frequency"],
        gradient_steps=num_envs,
        target_update_interval=task["target_network_frequency"],
        exploration_initial_eps=EPSILON,
        exploration_final_eps=EPSILON,
        policy_kwargs=net | policy_options,
        device="cpu",
    )
    model.learn(10**9, callback=Tick())


def run_tianshou(task, clock, atari, algorithm="DQN", num_envs=1, n_quantiles=200):
    """Train Tianshou's DQN, C51 or QRDQN in this process.

    n environments make `train_frequency` n steps, and then n updates.
    """
    import ale_py  # noqa: F401  (registers the games)
    import gymnasium as gym
    from tianshou import algorithm as algorithms
    from tianshou.algorithm.modelfree.c51 import C51Policy
    from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
    from tianshou.algorithm.modelfree.qrdqn import QRDQNPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv
    from tianshou.env.atari import atari_network, atari_wrapper
    from tianshou.trainer import OffPolicyTrainerParams
    from tianshou.utils.net.common import Net

    class Environments(DummyVectorEnv):
        def step(self, action, id=None):
            clock.tick(num_envs)
            return super().step(action, id)

    class Replay(VectorReplayBuffer):
        def hasnull(self):
            return False

    def make_env():
        env = gym.make(task["env_id"])
        return atari_wrapper.wrap_deepmind(env) if atari else env

    atari_wrapper.get_space_dtype = lambda space: space.dtype
    envs, env = Environments([make_env] * num_envs), make_env()
    shape, n_actions = env.observation_space.shape, int(env.action_space.n)
    n_outputs = {"DQN": 1, "C51": 51, "QRDQN": n_quantiles}[algorithm]
    name = {"C51": "num_atoms", "QRDQN": "num_quantiles"}.get(algorithm)
    if atari:
        network = {"DQN": "DQNet", "C51": "C51Net", "QRDQN": "QRDQNet"}[algorithm]
        c, h, w = shape
        sizes = {"c": c, "h": h, "w": w, "action_shape": [n_actions]}
        sizes |= {name: n_outputs} if name else {}
        model = atari_network.ScaledObsInputActionReprNet(getattr(atari_network, network)(**sizes))
    else:
        sizes = {"hidden_sizes": [120, 84], "num_atoms": n_outputs, "softmax": algorithm == "C51"}
        model = Net(state_shape=shape, action_shape=n_actions, **sizes)
    policies = {"DQN": DiscreteQLearningPolicy, "C51": C51Policy, "QRDQN": QRDQNPolicy}
    spaces = {"action_space": env.action_space, "observation_space": env.observation_space}
    policy = policies[algorithm](model=model, eps_training=EPSILON, **spaces)
    options = {"is_double": False, "huber_loss_delta": 1.0 if atari else None}
    options = {"DQN": options, "C51": {}, "QRDQN": {"num_quantiles": n_outputs}}[algorithm]
    learner = getattr(algorithms, algorithm)(
        policy=policy,
        optim=AdamOptimizerFactory(lr=task["learning_rate"]),
        target_update_freq=task["target_network_frequency"] // task["train_frequency"],
        **options,
    )
    frames = {"stack_num": 4, "ignore_obs_next": True, "save_only_last_obs": True}
    replay = Replay(task["buffer_size"], num_envs, **(frames if atari else {}))
    collector = Collector(policy, envs, replay)
    collector.reset()
    collector.collect(n_step=task["learning_starts"], random=True)
    parameters = OffPolicyTrainerParams(
        training_collector=collector,
        max_epochs=1,
        epoch_num_steps=10**9,
        batch_size=task["batch_size"],
        collection_step_num_env_steps=task["train_frequency"] * num_envs,
        update_step_num_gradient_steps_per_sample=1 / task["train_frequency"],
        verbose=False,
    )
    learner.run_training(parameters)


def main():
    import torch

    name, *words = sys.argv[1].split()
    turn = json.loads(sys.argv[2])
    torch.set_num_threads(turn["threads"])
    task, atari = turn["task"], turn["atari"]
    clock = Clock(task["learning_starts"], turn["warm_up"], turn["seconds"])
    options = dict(word.split("=") for word in words)
    if name in ("CleanRL", "LeanRL"):
        script = options.pop("script", "dqn_atari" if atari else "dqn")
        path = Path(turn["folders"][name], name.lower(), f"{script}.py")
        return run_script(task, clock, path, **options)
    options |= {key: int(value) for key, value in options.items() if value.isdigit()}
    run = {"Stable-Baselines3": run_sb3, "Tianshou": run_tianshou}[name]
    run(task, clock, atari, **options)


if __name__ == "__main__":
    main()
