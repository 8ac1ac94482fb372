"""The NumPy replays of the scripts against an oracle that stores whole stacks, byte for byte."""

import numpy as np
import oracle
import pytest
import torch
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

EVENTS = ["step"] * 6 + ["life lost", "terminated", "truncated"]


class World:
    """Random games, added step by step to a replay and to the oracle.

    A frame is stamped with (game, episode, t, noise), so that a stale frame or one from another
    episode is not mistaken for the right one.
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
    for events in story[:7]:  # it continues like the first one
        world.step(events[:num_envs])
    world.check()


vectors = st.lists(st.integers(1, 4), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(capacity=st.integers(4, 30), counts=vectors, seed=st.integers(0, 2**31))
def test_vector_replay_keeps_the_newest_transitions(capacity, counts, seed):
    """The values of a transition identify it, so mixed or stale transitions are detected."""
    script, device = load("dqn_cartpole"), torch.device("cpu")
    replay, written = script.Replay(capacity, np.zeros(2, np.float32), device), []
    for n in counts:
        ids = np.arange(len(written), len(written) + n)
        written += ids.tolist()
        obs = np.stack([ids, -ids], axis=1).astype(np.float32)
        replay.add(obs, ids, ids.astype(np.float32), obs + 0.5, 0.99 * (ids % 2 == 0))
    torch.manual_seed(seed)
    batch = replay.sample(500)
    drawn = batch.actions.tolist()
    assert set(drawn) <= set(written[-capacity:] if max(counts) == 1 else written)
    for i, k in enumerate(drawn):
        assert batch.obs[i].tolist() == [k, -k] and batch.rewards[i] == k
        assert batch.next_obs[i].tolist() == [k + 0.5, 0.5 - k]
        assert batch.discounts[i].item() == pytest.approx(0.99 if k % 2 == 0 else 0.0)
    # After a wrap-around at most 3 rows at the end, too few for one add, are older than the rest.
    stored = set(replay.columns[1][: replay.size].tolist())
    oldest = len(written) - capacity
    assert set(drawn) <= stored
    assert sum(k < oldest for k in stored) <= max(counts) - 1
    assert len(stored) == replay.size <= min(capacity, len(written))


def test_vector_replay_draws_uniformly():
    replay = load("dqn_cartpole").Replay(50, np.zeros(1, np.float32), torch.device("cpu"))
    for k in range(70):
        replay.add(
            *(np.full((1, 1), k, np.float32), np.array([k]), np.zeros(1, np.float32)),
            np.zeros((1, 1), np.float32),
            np.ones(1),
        )
    torch.manual_seed(0)
    actions = replay.sample(100_000).actions.numpy()
    counts = np.bincount(actions, minlength=70)
    assert counts[:20].sum() == 0, "overwritten transitions"
    assert stats.chisquare(counts[20:]).pvalue > 1e-4


def filled(n_step=1, seed=0, steps=400):
    replay = load("dqn_atari").FrameReplay(300, (4,), 2, n_step=n_step, seed=seed)
    world = World(replay, oracle.OracleReplay(300, 2, n_step=n_step), np.random.default_rng(seed))
    for _ in range(steps):
        world.step(world.rng.choice(EVENTS, 2))
    return world


@pytest.mark.parametrize("n_step", [1, 3])
def test_draws_are_uniform_over_the_drawable_rows(n_step):
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


def test_a_capacity_too_small_for_a_transition_is_refused():
    make = load("dqn_atari").FrameReplay
    with pytest.raises(ValueError, match="capacity of 3 is below 2 rows for each of 2 games"):
        make(3, (4,), num_envs=2)
    replay = make(4, (4,), num_envs=2, n_step=3)  # enough for episodes of one step
    ends, opens = np.ones(2, bool), np.ones(2, bool)
    for k in range(2):
        frames = np.full((2, 4), k, np.uint8)
        replay.add(frames, np.zeros(2), np.zeros(2), ends, opens if k == 0 else ~opens)
    assert len(replay.sample(3).obs) == 3


def test_frames_of_another_dtype_are_refused():
    """300 as uint8 would be 44."""
    replay = load("dqn_atari").FrameReplay(20, (4,))
    row = (np.array([0]), np.zeros(1, np.float32), np.zeros(1, bool), np.ones(1, bool))
    with pytest.raises(TypeError, match="frames must be uint8, not int64"):
        replay.add(np.full((1, 4), 300), *row)
    assert len(replay) == 0


BAD_STATES = {
    "no rewards": lambda state: state.pop("rewards"),
    "head beyond the rows": lambda state: state.update(head=10**6),
    "negative head": lambda state: state.update(head=-1),
    "size of another kind": lambda state: state.update(size="all"),
    "too large": lambda state: state.update(size=10**6, head=0),
    "damaged rng": lambda state: state.update(rng={"bit_generator": "PCG64"}),
    "frames cut": lambda state: state.update(frames=state["frames"][:5]),
    "other dtype": lambda state: state.update(actions=state["actions"].float()),
    "no tensor": lambda state: state.update(opens=None),
}


@pytest.mark.parametrize("damage", BAD_STATES.values(), ids=BAD_STATES)
def test_a_damaged_state_changes_nothing(damage):
    world, other = filled(seed=1), filled(seed=2)
    state = world.replay.state_dict()
    damage(state)
    before = {k: np.copy(v) for k, v in vars(other.replay).items() if isinstance(v, np.ndarray)}
    with pytest.raises(ValueError, match="not a state of this replay"):
        other.replay.load_state_dict(state)
    assert all(np.array_equal(getattr(other.replay, k), v) for k, v in before.items())
    other.check()
