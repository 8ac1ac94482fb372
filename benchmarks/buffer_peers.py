"""The buffers and trees of benchmarks/buffers.py, each configured as in its documentation.

A frame buffer has add(row), with a row of Stream.step(); sample(n), which returns obs and next_obs
as torch tensors and may return more; and, if prioritized, update(batch, td_error) with a batch of
sample(). A tree has sample(n); update(indices, priorities); and find(targets). The arguments of
update() are those that prepare(indices, priorities) returns, in the types that the tree takes. The
argument of find() is what targets(n) returns. The peers' packages are imported in the methods,
because each is installed in its own environment.
"""

from importlib.metadata import version
from typing import ClassVar

import numpy as np
import torch

EPISODE = 500  # steps
RNG = np.random.default_rng(0)


class Stream:
    """Transitions of `num_envs` games, made of `kinds` frames each, which are generated in advance.

    Building a row takes almost no time, so that only the buffers are timed.
    """

    def __init__(self, num_envs, kinds=256):
        rng = np.random.default_rng(0)
        # frames of 4x4 squares in one shade, so that buffers with compression can compress them
        small = rng.integers(0, 256, (kinds, num_envs, 21, 21), dtype=np.uint8)
        self.frames = np.ascontiguousarray(small.repeat(4, axis=2).repeat(4, axis=3))
        self.actions = rng.integers(0, 4, (kinds, num_envs))
        self.rewards = rng.normal(size=(kinds, num_envs)).astype(np.float32)
        self.t, self.kinds, self.num_envs = -1, kinds, num_envs
        self.stacks = [
            np.ascontiguousarray(np.stack([self.frames[(k - s) % kinds] for s in (3, 2, 1, 0)], 1))
            for k in range(kinds)
        ]

    def step(self):
        """The next row, a dict of arrays; dimensions begin with num_envs."""
        self.t += 1
        k, follows = self.t % self.kinds, (self.t + 1) % self.kinds
        position = self.t % EPISODE
        return {
            "frame": self.frames[k],  # (num_envs, 84, 84)
            "obs": self.stacks[k],  # (num_envs, 4, 84, 84)
            "next_obs": self.stacks[follows],
            "action": self.actions[k],
            "reward": self.rewards[k],
            "start": np.full(self.num_envs, position == 0),
            "terminated": np.full(self.num_envs, position == EPISODE - 1),
            # for buffers in which the final observation has its own row: the row before it
            "terminated_before": np.full(self.num_envs, position == EPISODE - 2),
        }


class Peer:
    kind = "frames"  # or "tree"
    title = ""  # in tables and figures
    prioritized = False
    own = False  # part of CleanQ
    num_envs = 1  # games that add() stores at once
    package = ""  # whose version is reported
    requires = ()  # pip requirements, installed in a separate environment

    @classmethod
    def version(cls):
        return version(cls.package) if cls.package else ""


class FastReplay(Peer):
    title, own, num_envs = "fastreplay", True, 8
    options: ClassVar[dict] = {}

    def __init__(self, capacity):
        from fastreplay import FrameReplay

        self.replay = FrameReplay(
            capacity, (84, 84), self.num_envs, prioritized=self.prioritized, **self.options
        )

    def add(self, row):
        self.replay.add(
            row["frame"], row["action"], row["reward"], row["terminated_before"], row["start"]
        )

    def sample(self, n):
        return self.replay.sample(n)

    def update(self, batch, td_error):
        self.replay.update_priorities(batch.indices, td_error)


class FastReplayOut(FastReplay):
    title = "fastreplay, reused output tensors"

    def __init__(self, capacity):
        super().__init__(capacity)
        self.batches = {}

    def sample(self, n):
        self.batches[n] = self.replay.sample(n, out=self.batches.get(n))
        return self.batches[n]


class FastReplayPrioritized(FastReplay):
    title, prioritized = "fastreplay, prioritized, 3 steps", True
    options: ClassVar[dict] = {"n_step": 3}


class CleanQNumpy(FastReplay):
    title = "CleanQ, NumPy class of the scripts"

    def __init__(self, capacity):
        import sys
        from pathlib import Path

        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))
        from dqn_atari import FrameReplay

        self.replay = FrameReplay(capacity, (84, 84), self.num_envs)


class Cpprb(Peer):
    title, package, requires = "cpprb, stack_compress + next_of", "cpprb", ("cpprb==11.0.0",)

    def __init__(self, capacity):
        import cpprb

        buffer_class = cpprb.PrioritizedReplayBuffer if self.prioritized else cpprb.ReplayBuffer
        shapes = {"obs": {"shape": (84, 84, 4), "dtype": np.ubyte}, "act": {"dtype": np.int64}}
        shapes |= {"rew": {}, "done": {}}
        self.buffer = buffer_class(capacity, shapes, next_of="obs", stack_compress="obs")

    def add(self, row):
        obs, next_obs = (np.moveaxis(row[key][0], 0, 2) for key in ("obs", "next_obs"))
        done = row["terminated"][0]
        self.buffer.add(
            obs=obs, act=row["action"][0], rew=row["reward"][0], next_obs=next_obs, done=done
        )
        if done:
            self.buffer.on_episode_end()

    def sample(self, n):
        batch = self.buffer.sample(n, 0.4) if self.prioritized else self.buffer.sample(n)
        return torch.from_numpy(batch["obs"]), torch.from_numpy(batch["next_obs"]), batch

    def update(self, batch, td_error):
        self.buffer.update_priorities(batch[2]["indexes"], np.abs(td_error) + 1e-6)


class CpprbPrioritized(Cpprb):
    title, prioritized = "cpprb, prioritized, stack_compress + next_of", True


class StableBaselines3(Peer):
    title, package = "Stable-Baselines3", "stable-baselines3"
    requires = ("stable-baselines3==2.9.2",)
    options: ClassVar[dict] = {"optimize_memory_usage": False}

    def buffer_class(self):
        from stable_baselines3.common.buffers import ReplayBuffer

        return ReplayBuffer

    def __init__(self, capacity):
        from gymnasium import spaces

        obs_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.buffer = self.buffer_class()(
            capacity, obs_space, spaces.Discrete(4), "cpu", n_envs=1, **self.options
        )

    def add(self, row):
        done = row["terminated"]
        self.buffer.add(row["obs"], row["next_obs"], row["action"], row["reward"], done, [{}])

    def sample(self, n):
        batch = self.buffer.sample(n)
        return batch.observations, batch.next_observations


class CleanRL(StableBaselines3):
    title, package, requires = "CleanRL, optimize_memory", "", ()
    options: ClassVar[dict] = {"optimize_memory_usage": True, "handle_timeout_termination": False}

    def buffer_class(self):
        from cleanrl_utils.buffers import ReplayBuffer

        return ReplayBuffer


class CleanRLRainbow(CleanRL):
    title, prioritized = "CleanRL's Rainbow, prioritized, 3 steps", True

    def __init__(self, capacity):
        from cleanrl.rainbow_atari import PrioritizedReplayBuffer

        self.buffer = PrioritizedReplayBuffer(capacity, (4, 84, 84), "cpu", n_step=3, gamma=0.99)

    def add(self, row):
        names = ("obs", "action", "reward", "next_obs", "terminated")
        self.buffer.add(*(row[name][0] for name in names))

    def sample(self, n):
        batch = self.buffer.sample(n)
        return batch.observations, batch.next_observations, batch

    def update(self, batch, td_error):
        self.buffer.update_priorities(batch[2].indices, td_error)


class Tianshou(Peer):
    title, package, requires = "Tianshou, de-duplicated", "tianshou", ("tianshou==2.0.1",)
    num_envs = 8

    def __init__(self, capacity):
        from tianshou.data import PrioritizedVectorReplayBuffer, VectorReplayBuffer

        options = {"stack_num": 4, "ignore_obs_next": True, "save_only_last_obs": True}
        if self.prioritized:
            self.buffer = PrioritizedVectorReplayBuffer(
                capacity, self.num_envs, alpha=0.6, beta=0.4, **options
            )
        else:
            self.buffer = VectorReplayBuffer(capacity, self.num_envs, **options)

    def add(self, row):
        from tianshou.data import Batch

        self.buffer.add(
            Batch(
                obs=row["obs"],
                act=row["action"],
                rew=row["reward"],
                terminated=row["terminated"],
                truncated=np.zeros(self.num_envs, bool),
                obs_next=row["next_obs"],
                info=np.array([{}] * self.num_envs),
            )
        )

    def sample(self, n):
        batch, indices = self.buffer.sample(n)
        return torch.from_numpy(batch.obs), torch.from_numpy(batch.obs_next), indices

    def update(self, batch, td_error):
        self.buffer.update_weight(batch[2], td_error)


class TianshouPrioritized(Tianshou):
    title, prioritized = "Tianshou, prioritized, de-duplicated", True


class TorchRL(Peer):
    requires = ("torchrl==0.14.1",)
    title, package, num_envs = "TorchRL, LazyTensorStorage", "torchrl", 8

    def __init__(self, capacity):
        from torchrl.data import (
            LazyTensorStorage,
            TensorDictPrioritizedReplayBuffer,
            TensorDictReplayBuffer,
        )

        storage = LazyTensorStorage(capacity)
        if self.prioritized:
            self.buffer = TensorDictPrioritizedReplayBuffer(alpha=0.6, beta=0.4, storage=storage)
        else:
            self.buffer = TensorDictReplayBuffer(storage=storage)

    def add(self, row):
        from tensordict import TensorDict

        after = {"obs": torch.from_numpy(row["next_obs"])}
        after |= {"reward": torch.from_numpy(row["reward"])}
        after |= {"terminated": torch.from_numpy(row["terminated"])}
        now = {"obs": torch.from_numpy(row["obs"]), "action": torch.from_numpy(row["action"])}
        self.buffer.extend(TensorDict(now | {"next": after}, batch_size=[self.num_envs]))

    def sample(self, n):
        return self.buffer.sample(n)

    def update(self, batch, td_error):
        batch["td_error"] = torch.from_numpy(td_error)
        self.buffer.update_tensordict_priority(batch)


class TorchRLPrioritized(TorchRL):
    title, prioritized = "TorchRL, prioritized", True


class Pfrl(Peer):
    title, package, requires = "PFRL, LazyFrames", "pfrl", ("pfrl==0.4.0",)

    def __init__(self, capacity):
        from pfrl.replay_buffers import ReplayBuffer

        self.buffer = ReplayBuffer(capacity)
        self.recent = []

    def add(self, row):
        from pfrl.wrappers.atari_wrappers import LazyFrames

        self.recent = [*self.recent, row["frame"].copy()][-5:]
        if len(self.recent) == 5:
            state, after = (
                LazyFrames(self.recent[part], stack_axis=0) for part in (slice(0, 4), slice(1, 5))
            )
            done = bool(row["terminated"][0])
            self.buffer.append(
                state, row["action"][0], row["reward"][0], after, is_state_terminal=done
            )

    def sample(self, n):
        steps = self.buffer.sample(n)
        return tuple(
            torch.from_numpy(np.stack([np.asarray(step[0][key]) for step in steps]))
            for key in ("state", "next_state")
        )


class Flashbax(Peer):
    title, package, requires = "Flashbax, prioritized", "flashbax", ("flashbax==0.1.3",)
    prioritized, num_envs, device = True, 8, "cpu"

    def __init__(self, capacity):
        import flashbax
        import jax
        import jax.numpy as jnp

        self.jax, self.jnp = jax, jnp
        self.make = lambda n: flashbax.make_prioritised_flat_buffer(
            max_length=capacity,
            min_length=1,
            sample_batch_size=n,
            add_sequences=False,
            add_batch_size=self.num_envs,
            priority_exponent=0.6,
            device=self.device,
        )
        buffer = self.make(32)
        zero = {"obs": jnp.zeros((4, 84, 84), jnp.uint8), "action": jnp.zeros((), jnp.int32)}
        zero |= {"reward": jnp.zeros(()), "terminated": jnp.zeros((), bool)}
        self.state = jax.jit(buffer.init)(zero)
        self.add_jit = jax.jit(buffer.add, donate_argnums=0)
        self.sample_jit, self.update_jit = {}, jax.jit(buffer.set_priorities, donate_argnums=0)
        self.key = jax.random.PRNGKey(0)

    def add(self, row):
        keys = ("obs", "action", "reward", "terminated")
        step = {key: self.jnp.asarray(row[key]) for key in keys}
        step["action"] = step["action"].astype(self.jnp.int32)
        self.state = self.add_jit(self.state, step)
        self.jax.block_until_ready(self.state.current_index)

    def sample(self, n):
        if n not in self.sample_jit:
            self.sample_jit[n] = self.jax.jit(self.make(n).sample)
        self.key, key = self.jax.random.split(self.key)
        batch = self.sample_jit[n](self.state, key)
        obs = torch.from_dlpack(batch.experience.first["obs"])
        return obs, torch.from_dlpack(batch.experience.second["obs"]), batch

    def update(self, batch, td_error):
        self.state = self.update_jit(self.state, batch[2].indices, self.jnp.asarray(td_error))
        self.jax.block_until_ready(self.state.sum_tree_state.nodes)


class AgileRL(Peer):
    title, package, requires = "AgileRL, prioritized", "agilerl", ("agilerl==2.58.0",)
    prioritized, num_envs = True, 8

    def __init__(self, capacity):
        from agilerl.components.replay_buffer import PrioritizedReplayBuffer

        self.buffer = PrioritizedReplayBuffer(capacity, alpha=0.6, device="cpu")

    def add(self, row):
        from tensordict import TensorDict

        keys = ("obs", "action", "reward", "next_obs")
        step = {key: torch.from_numpy(row[key]) for key in keys}
        step |= {"done": torch.from_numpy(row["terminated"].astype(np.float32))}
        self.buffer.add(TensorDict(step, batch_size=[self.num_envs]))

    def sample(self, n):
        return self.buffer.sample(n, beta=0.4)

    def update(self, batch, td_error):
        self.buffer.update_priorities(batch["idxs"], torch.from_numpy(td_error + 1e-6))


class Dopamine(Peer):
    title, package, requires = "Dopamine, compressed", "dopamine-rl", ("dopamine-rl==4.1.2",)

    def __init__(self, capacity):
        from dopamine.jax.replay_memory import accumulator, replay_buffer, samplers

        self.buffer = replay_buffer.ReplayBuffer(
            accumulator.TransitionAccumulator(stack_size=4, update_horizon=1, gamma=0.99),
            samplers.UniformSamplingDistribution(seed=0),
            batch_size=32,
            max_capacity=capacity,
            compress=True,
        )

    def add(self, row):
        from dopamine.jax.replay_memory.elements import TransitionElement

        done = bool(row["terminated"][0])
        self.buffer.add(
            TransitionElement(row["frame"][0], row["action"][0], row["reward"][0], done, done)
        )

    def sample(self, n):
        batch = self.buffer.sample(n)
        return torch.from_numpy(batch.state), torch.from_numpy(batch.next_state)


class Tree(Peer):
    kind = "tree"
    find = None  # for trees without find()

    def prepare(self, indices, priorities):
        return indices, priorities


class FastTree(Tree):
    title, own = "fastreplay.SumTree (exact sums)", True

    def __init__(self, size):
        from fastreplay import SumTree

        self.tree = SumTree(size)
        self.sample, self.find, self.update = self.tree.sample, self.tree.find, self.tree.set

    def targets(self, n):
        return torch.from_numpy(RNG.integers(0, self.tree.total(), n))

    def prepare(self, indices, priorities):
        return torch.from_numpy(indices), torch.from_numpy(priorities)


class CumulativeSums(Tree):
    title = "torch cumsum + searchsorted"

    def __init__(self, size):
        self.priorities, self.sums = torch.zeros(size), None

    def prepare(self, indices, priorities):
        return torch.from_numpy(indices), torch.from_numpy(priorities)

    def sample(self, n):
        sums = self.priorities.cumsum(0)
        return torch.searchsorted(sums, torch.rand(n) * sums[-1], right=True)

    def update(self, indices, priorities):
        self.priorities[indices] = priorities


class TorchRLTree(Tree):
    title, package, requires = "TorchRL SumSegmentTreeFp32", "torchrl", TorchRL.requires

    def __init__(self, size):
        from torchrl._torchrl import SumSegmentTreeFp32

        self.tree, self.size = SumSegmentTreeFp32(size), size
        self.find, self.update = self.tree.scan_lower_bound, self.tree.update

    def prepare(self, indices, priorities):
        return torch.from_numpy(indices), torch.from_numpy(priorities)

    def targets(self, n):
        return torch.rand(n) * self.tree.query(0, self.size)

    def sample(self, n):
        return self.tree.scan_lower_bound(self.targets(n))


class TianshouTree(Tree):
    title, package, requires = "Tianshou SegmentTree", "tianshou", Tianshou.requires

    def __init__(self, size):
        from tianshou.data import SegmentTree

        self.tree = SegmentTree(size)
        self.find = self.tree.get_prefix_sum_idx

    def targets(self, n):
        return RNG.random(n) * self.tree.reduce()

    def sample(self, n):
        return self.tree.get_prefix_sum_idx(self.targets(n))

    def update(self, indices, priorities):
        self.tree[indices] = priorities


class CpprbTree(Tree):
    title, package, requires = "cpprb, sample with weights", "cpprb", Cpprb.requires

    def __init__(self, size):
        from cpprb import PrioritizedReplayBuffer

        self.buffer = PrioritizedReplayBuffer(size, {"done": {}})
        self.buffer.add(done=np.zeros(size))

    def sample(self, n):
        return self.buffer.sample(n, 0.4)

    def update(self, indices, priorities):
        self.buffer.update_priorities(indices, priorities)


class FlashbaxTree(Tree):
    title, package, requires = "Flashbax sum_tree", "flashbax", Flashbax.requires

    def __init__(self, size):
        import jax
        import jax.numpy as jnp
        from flashbax.buffers import sum_tree

        self.jax, self.jnp, self.key = jax, jnp, jax.random.PRNGKey(0)
        self.state = sum_tree.init(size)
        self.sample_jit = jax.jit(sum_tree.stratified_sample, static_argnums=1)
        self.update_jit = jax.jit(sum_tree.set_batch_bincount, donate_argnums=0)

    def prepare(self, indices, priorities):
        return self.jnp.asarray(indices), self.jnp.asarray(priorities)

    def sample(self, n):
        self.key, key = self.jax.random.split(self.key)
        return self.sample_jit(self.state, n, key).block_until_ready()

    def update(self, indices, priorities):
        self.state = self.update_jit(self.state, indices, priorities)
        self.state.nodes.block_until_ready()


class AgileRLTree(Tree):
    title, package, requires = "AgileRL SumSegmentTree", "agilerl", AgileRL.requires

    def __init__(self, size):
        from agilerl.components.segment_tree import SumSegmentTree

        self.tree = SumSegmentTree(size)

    def sample(self, n):
        return self.tree.retrieve_batch(RNG.random(n) * self.tree.sum())

    def update(self, indices, priorities):
        self.tree.update_batch(indices, priorities)


class DopamineTree(Tree):
    title, package, requires = "Dopamine SumTree", "dopamine-rl", Dopamine.requires

    def __init__(self, size):
        from dopamine.jax.replay_memory.sum_tree import SumTree

        self.tree = SumTree(size)

    def sample(self, n):
        return self.tree.query(RNG.random(n) * self.tree.root)

    def update(self, indices, priorities):
        self.tree.set(indices, priorities)


PEERS = {
    "fastreplay": FastReplay,
    "fastreplay-out": FastReplayOut,
    "fastreplay-per": FastReplayPrioritized,
    "numpy": CleanQNumpy,
    "cpprb": Cpprb,
    "cpprb-per": CpprbPrioritized,
    "sb3": StableBaselines3,
    "cleanrl": CleanRL,
    "cleanrl-rainbow": CleanRLRainbow,
    "tianshou": Tianshou,
    "tianshou-per": TianshouPrioritized,
    "torchrl": TorchRL,
    "torchrl-per": TorchRLPrioritized,
    "pfrl": Pfrl,
    "flashbax-per": Flashbax,
    "agilerl-per": AgileRL,
    "dopamine": Dopamine,
    "fastreplay-tree": FastTree,
    "cumsum-tree": CumulativeSums,
    "torchrl-tree": TorchRLTree,
    "tianshou-tree": TianshouTree,
    "cpprb-tree": CpprbTree,
    "flashbax-tree": FlashbaxTree,
    "agilerl-tree": AgileRLTree,
    "dopamine-tree": DopamineTree,
}
