"""The NumPy replays of the scripts against an oracle that stores whole stacks, byte for byte."""

import numpy as np
import oracle
import pytest
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

EVENTS = ["step"] * 6 + ["life lost", "terminated", "truncated"]


class World:
    """Random games that are told step by step to a replay and to the oracle alike.

    A frame is stamped with (game, episode, t, noise), so that a stale one or one from another
    episode cannot pass for the right one.
    """

    def __init__(self, replay, reference, rng, frames=True):
        self.replay, self.reference, self.rng, self.frames = replay, reference, rng, frames
        n = reference.num_envs
        self.episode, self.t, self.over = [0] * n, [0] * n, [False] * n
        self.stacks = [np.zeros((reference.stack, 4), np.uint8) for _ in range(n)]
        self.starts = [True] * n
        for game in range(n):
            self.see(game, opening=True)

    def see(self, game, opening):
        if opening:
            self.episode[game] += 1
            self.t[game] = 0
            self.stacks[game] = np.zeros_like(self.stacks[game])
        stamp = (game, self.episode[game] % 256, self.t[game] % 256, self.rng.integers(1, 256))
        self.stacks[game] = np.concatenate([self.stacks[game][1:], [stamp]]).astype(np.uint8)
        self.t[game] += 1
        self.starts[game] = opening

    def step(self, events):
        n = self.reference.num_envs
        actions, rewards = self.rng.integers(18, size=n), np.float32(self.rng.integers(-1, 2, n))
        terminations = np.zeros(n, bool)
        stacks, starts, reset = np.stack(self.stacks), np.array(self.starts), list(self.over)
        for game, event in enumerate(events):
            if reset[game]:
                rewards[game], self.over[game] = 0, False
            else:
                terminations[game] = event in ("life lost", "terminated")
                self.over[game] = event in ("terminated", "truncated")
        newest = stacks[:, -1] if self.frames else stacks[:, -1].astype(np.float32)
        self.replay.add(newest, actions, rewards, terminations, starts)
        self.reference.add(stacks, actions, rewards, terminations, starts)
        for game in range(n):
            self.see(game, opening=reset[game])

    def check(self):
        expected = self.reference.transitions()
        everywhere = np.arange(self.reference.rows * self.reference.num_envs)
        drawable = np.flatnonzero(self.replay.drawable(everywhere))
        assert drawable.tolist() == sorted(expected)
        if not expected:
            with pytest.raises(ValueError, match="no whole transition"):
                self.replay.sample(1)
            return
        indices = self.rng.permutation(np.concatenate([drawable, drawable[:1]]))
        for batch in (self.replay.gather(indices), self.replay.sample(16)):
            for i, index in enumerate(batch.indices.tolist()):
                obs, action, reward, next_obs, discount = expected[index]
                if not self.frames:
                    obs, next_obs = obs[-1], next_obs[-1]
                np.testing.assert_array_equal(batch.obs[i].numpy(), obs)
                np.testing.assert_array_equal(batch.next_obs[i].numpy(), next_obs)
                assert batch.actions[i] == action
                assert batch.rewards[i].item() == pytest.approx(reward, abs=1e-6)
                assert batch.discounts[i].item() == pytest.approx(discount, abs=1e-6)


worlds = {
    "num_envs": st.integers(1, 3),
    "rows": st.integers(2, 24),
    "stack": st.integers(1, 5),
    "n_step": st.integers(1, 5),
    "seed": st.integers(0, 2**31),
    "story": st.lists(st.lists(st.sampled_from(EVENTS), min_size=3, max_size=3), max_size=60),
}


@settings(max_examples=150, deadline=None)
@given(**worlds)
def test_frame_replay_equals_the_oracle(num_envs, rows, stack, n_step, seed, story):
    options = {"num_envs": num_envs, "stack": stack, "n_step": n_step, "gamma": 0.9}
    replay = load("dqn_atari").FrameReplay(rows * num_envs, (4,), seed=seed, **options)
    reference = oracle.OracleReplay(rows * num_envs, **options)
    world = World(replay, reference, np.random.default_rng(seed))
    for i, events in enumerate(story):
        world.step(events[:num_envs])
        if i % 10 == 9:
            world.check()
    world.check()
    restored = load("dqn_atari").FrameReplay(rows * num_envs, (4,), seed=0, **options)
    restored.load_state_dict(replay.state_dict())
    world.replay = restored
    world.check()
    for events in story[:7]:  # and it goes on as the first one would have
        world.step(events[:num_envs])
    world.check()


@settings(max_examples=80, deadline=None)
@given(**{k: v for k, v in worlds.items() if k not in ("stack", "n_step")})
def test_vector_replay_equals_the_oracle(num_envs, rows, seed, story):
    replay = load("dqn_cartpole").Replay(rows * num_envs, (4,), num_envs, gamma=0.9, seed=seed)
    reference = oracle.OracleReplay(rows * num_envs, num_envs, stack=1, gamma=0.9)
    world = World(replay, reference, np.random.default_rng(seed), frames=False)
    for events in story:
        world.step(events[:num_envs])
    world.check()


def filled(n_step=1, seed=0, steps=400):
    replay = load("dqn_atari").FrameReplay(300, (4,), 2, n_step=n_step, seed=seed)
    world = World(replay, oracle.OracleReplay(300, 2, n_step=n_step), np.random.default_rng(seed))
    for _ in range(steps):
        world.step(world.rng.choice(EVENTS, 2))
    return world


@pytest.mark.parametrize("n_step", [1, 3])
def test_draws_are_uniform_over_all_that_can_be_drawn(n_step):
    world = filled(n_step)
    keys = np.array(sorted(world.reference.transitions()))
    counts = np.bincount(world.replay.draw(200_000), minlength=300)
    assert counts.sum() == counts[keys].sum()
    assert stats.chisquare(counts[keys]).pvalue > 1e-4


def test_same_seed_same_draws():
    a, b, c = filled(seed=1), filled(seed=1), filled(seed=2)
    draws = [w.replay.draw(64).tolist() for w in (a, b, c)]
    assert draws[0] == draws[1] != draws[2]


def test_restored_replay_draws_the_same():
    world = filled()
    state = world.replay.state_dict()
    other = load("dqn_atari").FrameReplay(300, (4,), 2, seed=99)
    other.load_state_dict(state)
    assert other.draw(64).tolist() == world.replay.draw(64).tolist()


def test_memory_of_a_transition():
    rows = 1000
    replay = load("dqn_atari").FrameReplay(rows, (84, 84), 1)
    arrays = [v for v in vars(replay).values() if isinstance(v, np.ndarray)]
    assert sum(a.nbytes for a in arrays) / rows <= 7200
