"""Every replay against an oracle that stores whole stacks, byte for byte.

The backends are parameters of the same tests: the NumPy class of the scripts, and fastreplay's.
Frames are stamped with (game, episode, step), so that stale or wrong frames are detected.
"""

import copy
import importlib.util
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CUDA, CUDA_TILES, load, on_cuda
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import OraclePriorities, OracleReplay, find, targets


def numpy_class():
    return load("dqn_atari").FrameReplay


def cpp_class():
    fastreplay = pytest.importorskip("fastreplay")
    if not fastreplay.backends():
        pytest.skip("fastreplay is not compiled")
    return fastreplay.FrameReplay


def tiles_class():
    """fastreplay's class with frames in tiles; frames of floats stay plain."""
    make = cpp_class()

    def replay(*args, **options):
        if options.get("frame_dtype") in (None, torch.uint8):
            options["storage"] = "tiles"
        return make(*args, **options)

    return replay


CLASSES = {"numpy": numpy_class, "cpp": cpp_class, "tiles": tiles_class}


def cuda_class(request, backend):
    return on_cuda(request, backend, tiles_class() if backend.endswith("tiles") else cpp_class())


@pytest.fixture(params=["numpy", "cpp", "tiles", *CUDA, *CUDA_TILES])
def backend(request):
    return request.param


@pytest.fixture(params=["cpp", "tiles", *CUDA, *CUDA_TILES])
def fast_backend(request):
    return request.param


@pytest.fixture
def make_replay(request, backend):
    return CLASSES[backend]() if backend in CLASSES else cuda_class(request, backend)


@pytest.fixture
def make_fast(request, fast_backend):
    """fastreplay's class on each device."""
    if fast_backend in CLASSES:
        return CLASSES[fast_backend]()
    return cuda_class(request, fast_backend)


@pytest.fixture(params=["cpp", "tiles"])
def make_cpp(request):
    return CLASSES[request.param]()


class Games:
    """Games of random length with NEXT_STEP autoreset: a final observation is a row."""

    def __init__(self, num_envs, rng, ends=0.15, lives=0.1, shape=(2, 2), context=False):
        self.num_envs, self.rng, self.ends, self.lives = num_envs, rng, ends, lives
        self.shape = shape  # of a frame; its first four bytes are the stamp
        self.context = context  # some actions are negative
        self.episode, self.t = np.zeros(num_envs, int), np.full(num_envs, -1)
        self.over = np.ones(num_envs, bool)  # the next row opens an episode
        self.final = np.zeros(num_envs, bool)  # the next row is a final observation

    def step(self):
        """The arguments of one add()."""
        opens = self.over.copy()
        self.episode += opens
        self.t = np.where(opens, 0, self.t + 1)
        final, draw = self.final, self.rng.random((2, self.num_envs))
        ends = ~final & (draw[0] < self.ends)
        terminations = (ends & (draw[1] < 0.6)) | (~final & ~ends & (draw[1] < self.lives))
        stamps = np.stack([np.arange(self.num_envs), self.episode, self.t, self.t // 256], axis=1)
        frames = np.zeros((self.num_envs, np.prod(self.shape)), np.uint8)
        frames[:, :4] = stamps + 1
        frames = frames.reshape(-1, *self.shape)
        actions = self.rng.integers(-4 if self.context else 0, 18, self.num_envs)
        rewards = self.rng.normal(size=self.num_envs).astype(np.float32)
        self.over, self.final = final, ends
        return frames, actions, rewards, terminations, opens


def adversarial(num_envs, rng, shape=(2, 2)):
    """Arguments of one add() with random flags that no environment would produce."""
    frames = rng.integers(0, 256, (num_envs, *shape), dtype=np.uint8)
    actions = rng.integers(-4, 18, num_envs)
    rewards = rng.normal(size=num_envs).astype(np.float32)
    return frames, actions, rewards, *(rng.random((2, num_envs)) < 0.3)


class Pair:
    """A replay and an oracle that get the same steps; the oracle gets whole stacks."""

    def __init__(self, make_replay, rows, options, spare=0, shape=(2, 2), **more):
        n = options["num_envs"]
        self.make = lambda **changes: make_replay(
            rows * n + spare, shape, **options, **(more | changes)
        )
        self.replay = self.make()
        self.oracle = OracleReplay(rows * n, **options)
        self.stacks = np.zeros((n, options["stack"], *shape), np.uint8)

    def add(self, frames, actions, rewards, terminations, starts):
        if not len(self.replay):
            starts[:] = True  # the first row of each game always opens an episode
        self.stacks = np.roll(self.stacks, -1, axis=1)
        self.stacks[starts] = 0
        self.stacks[:, -1] = frames
        self.replay.add(frames, actions, rewards, terminations, starts)
        self.oracle.add(self.stacks.copy(), actions, rewards, terminations, starts)

    def check_batch(self, batch, expected):
        assert batch.obs.dtype == batch.next_obs.dtype == torch.uint8
        assert batch.actions.dtype == batch.indices.dtype == torch.int64
        assert batch.rewards.dtype == batch.discounts.dtype == torch.float32
        for i, index in enumerate(batch.indices.tolist()):
            obs, action, reward, next_obs, discount = expected[index]
            np.testing.assert_array_equal(batch.obs[i], obs)
            np.testing.assert_array_equal(batch.next_obs[i], next_obs)
            assert batch.actions[i].item() == action
            assert batch.rewards[i].numpy() == np.float32(reward)
            assert batch.discounts[i].numpy() == np.float32(discount)

    def check(self):
        """Compares the drawable rows and every transition with the oracle's. -> transitions"""
        expected = self.oracle.transitions()
        everything = np.arange(self.oracle.num_envs * self.oracle.rows)
        drawable = np.flatnonzero(np.asarray(self.replay.drawable(everything)))
        assert drawable.tolist() == sorted(expected)
        stored = min(len(self.oracle.history[0]), self.oracle.rows)
        assert len(self.replay) == stored * self.oracle.num_envs
        if expected:
            batch = self.replay.gather(drawable)
            np.testing.assert_array_equal(batch.indices, drawable)
            self.check_batch(batch, expected)
            self.check_batch(self.replay.sample(8), expected)
        else:
            with pytest.raises(ValueError, match="no whole transition"):
                self.replay.draw(1)
        return expected


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "num_envs": st.integers(1, 3),
        "stack": st.integers(1, 5),
        "n_step": st.integers(1, 4),
        "gamma": st.sampled_from([0.99, 0.5, 1.0]),
    }
)
SHAPES = st.sampled_from([(2, 2), (5, 17)])
slow = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@slow
@given(CONFIGURATIONS, st.integers(2, 14), st.integers(0, 2**32), st.booleans(), st.data())
def test_any_history_gives_the_batches_of_the_oracle(make_replay, options, rows, seed, rules, data):
    rng, shape = np.random.default_rng(seed), data.draw(SHAPES)
    n = options["num_envs"]
    pair = Pair(make_replay, rows, options, spare=data.draw(st.integers(0, n - 1)), shape=shape)
    ends = data.draw(st.sampled_from([0.05, 0.3]))
    games = Games(n, rng, ends, shape=shape, context=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 4))):
        for _ in range(data.draw(st.integers(0, 2 * rows + 3))):
            pair.add(*(games.step() if rules else adversarial(n, rng, shape)))
        expected = pair.check()
        if data.draw(st.booleans()):
            state = saved_and_loaded(pair.replay.state_dict())
            old, pair.replay = pair.replay, pair.make(seed=99)
            pair.replay.load_state_dict(state)
            if expected:
                np.testing.assert_array_equal(old.draw(20), pair.replay.draw(20))
            pair.check()


@slow
@given(CONFIGURATIONS, st.integers(2, 12), st.integers(0, 2**32), st.booleans(), st.data())
def test_priorities_follow_the_oracle(make_fast, options, rows, seed, stratified, data):
    rng = np.random.default_rng(seed)
    n = options["num_envs"]
    alpha = data.draw(st.sampled_from([1.0, 0.0, 2.0]))  # exact in NumPy, too
    per = {"prioritized": True, "per_alpha": alpha, "per_epsilon": 0.25, "stratified": stratified}
    pair = Pair(make_fast, rows, options, seed=seed, **per)
    priorities = OraclePriorities(pair.oracle, alpha, epsilon=0.25)
    games = Games(n, rng, context=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 5))):
        for _ in range(data.draw(st.integers(0, 6))):
            pair.add(*games.step())
            priorities.after_add()
        # Random rows, with duplicates; those that are not drawable must keep a leaf of 0.
        indices = rng.integers(0, rows * n, data.draw(st.integers(0, 12)))
        td_errors = (rng.integers(-8, 9, len(indices)) / 4).astype(np.float32)
        pair.replay.update_priorities(indices, td_errors)
        priorities.update(indices, td_errors)
        stored = len(pair.replay) // n
        newest = data.draw(st.integers(0, min(stored, 5)))
        td_errors = (rng.integers(-8, 9, (n, newest)) / 4).astype(np.float32)
        pair.replay.set_newest_priorities(td_errors)
        slots = np.arange(len(pair.oracle.history[0]) - newest, len(pair.oracle.history[0])) % rows
        indices = np.add.outer(np.arange(n) * rows, slots)
        priorities.update(indices.ravel(), td_errors.ravel(), added=True)
        leaves = np.array(priorities.flat(), dtype=object)
        state = pair.replay.state_dict()
        mine = np.zeros((n, rows), dtype=object)
        for game, stored in enumerate(state["leaves"]):
            mine[game, : len(stored)] = stored.numpy().view(np.uint32).tolist()
        assert mine.ravel().tolist() == leaves.tolist()
        pair.replay._tree.check_valid()
        if data.draw(st.booleans()):
            state = saved_and_loaded(state)
            pair.replay = pair.make(seed=99)
            pair.replay.load_state_dict(state)
            pair.replay._tree.check_valid()
        if leaves.sum():
            where = targets(seed, state["calls"], 16, leaves.sum(), stratified)
            batch = pair.replay.sample(16)
            assert batch.indices.tolist() == [find(leaves, t) for t in where]
            drawn = leaves[batch.indices.numpy()].astype(float)
            np.testing.assert_allclose(batch.is_weights, (drawn.min() / drawn) ** 0.4, rtol=1e-6)
            pair.check_batch(batch, pair.oracle.transitions())
            priorities.draw(batch.indices)


def filled(
    make_replay, capacity=600, steps=None, num_envs=2, frame_shape=(2, 2), seed=0, **options
):
    replay = make_replay(capacity, frame_shape, num_envs=num_envs, **options)
    games, rng = Games(num_envs, np.random.default_rng(seed)), np.random.default_rng(seed)
    for _ in range(capacity if steps is None else steps):
        _, *rest = games.step()
        shape = (num_envs, *frame_shape)
        if options.get("frame_dtype") == torch.float32:
            frames = rng.normal(size=shape).astype(np.float32)
        else:
            frames = rng.integers(0, 256, shape, dtype=np.uint8)
        replay.add(frames, *rest)
    return replay


def leaves_of(replay):
    return torch.cat(replay.state_dict()["leaves"]).tolist()


def steady(make_fast, rows=10, steps=10, **options):
    """A prioritized replay of one endless episode, in which all rows but the last are drawable."""
    options = {"stack": 1, "prioritized": True, "per_alpha": 1.0, "per_epsilon": 0.5} | options
    replay = make_fast(rows, (2, 2), **options)
    for _ in range(steps):
        replay.add(*arguments(n=1).values())
    return replay


def test_the_default_device_of_torch_changes_nothing(make_fast):
    """A script may call torch.set_default_device("cuda"); "meta" stands for it here."""
    found = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            one = filled(make_fast, prioritized=True, n_step=2, steps=40)
            one.set_newest_priorities(torch.ones(2, 3, device="cpu"))
            one.update_priorities([3, 5], torch.ones(2, device="cpu"))
            other = make_fast(600, (2, 2), num_envs=2, prioritized=True, n_step=2)
            other.load_state_dict(one.state_dict())
            drawable = other.drawable(list(range(40))).nonzero().flatten()
            batches = one.sample(8), other.sample(8), other.gather(drawable.tolist())
        found.append([x.cpu() for batch in batches for x in batch])
    assert all(map(torch.equal, *found))


def test_a_priority_of_a_row_overwritten_since_its_draw_is_dropped(make_fast):
    replay = steady(make_fast)
    drawn = replay.draw(200)
    replay.gather([0, 3])
    for _ in range(4):  # an actor overwrites rows 0 to 3 while the learner computes
        replay.add(*arguments(n=1).values())
    before = leaves_of(replay)
    replay.update_priorities(drawn, np.full(200, 7.5))
    after = leaves_of(replay)
    assert after[:4] == before[:4] == [2**20] * 3 + [0]  # row 3 is the newest: not drawable
    assert set(after[4:9]) == {8 << 20}
    assert replay.max_priority == 8.0  # it includes all of them


def test_a_new_row_takes_priorities_after_it_was_drawn(make_fast):
    for look in (lambda r: r.sample(200), lambda r: r.draw(200), lambda r: r.gather([0, 1, 2])):
        replay = steady(make_fast, steps=14)
        replay.update_priorities(np.arange(10), np.full(10, 7.5))
        assert leaves_of(replay)[:3] == [2**20] * 3
        look(replay)
        replay.update_priorities([0, 1, 2], np.full(3, 7.5))
        assert leaves_of(replay)[:3] == [8 << 20] * 3


def test_rows_that_replace_no_older_row_take_priorities_undrawn(make_fast):
    """An actor may set the priorities of the rows that it adds."""
    replay = steady(make_fast)
    replay.update_priorities(np.arange(9), np.full(9, 7.5))
    assert set(leaves_of(replay)[:9]) == {8 << 20}


def test_new_rows_may_get_priorities_of_their_own(make_fast):
    replay = steady(make_fast, steps=14)
    drawn = replay.draw(200)
    for _ in range(3):
        replay.add(*arguments(n=1).values())
    newest = leaves_of(replay).index(0)  # the newest row of all is not drawable
    replay.set_newest_priorities(np.array([[1.5, 2.5, 3.5]]))
    row = (newest - np.arange(2, -1, -1)) % 10
    assert [leaves_of(replay)[i] >> 20 for i in row] == [2, 3, 0]
    replay.update_priorities(drawn, np.full(200, 7.5))  # those of the rows that were overwritten
    assert [leaves_of(replay)[i] >> 20 for i in row] == [2, 3, 0]


@pytest.mark.parametrize("shape", [(2, 3), (1, 11), (3,)])
def test_priorities_of_rows_that_are_not_stored(make_fast, shape):
    replay = steady(make_fast)
    with pytest.raises(ValueError, match="td_error must have shape"):
        replay.set_newest_priorities(np.ones(shape))


def test_pieces_of_games_follow_each_other(make_replay):
    """A long game, stored in pieces in another order, gives the transitions of the whole game."""
    stack, n_step, length, steps = 4, 3, 5, 60
    rng, options = np.random.default_rng(3), {"num_envs": 1, "stack": stack, "n_step": n_step}
    games = Games(1, rng, ends=0.05)
    rows = [games.step() for _ in range(steps)]
    whole, pieces = make_replay(200, (2, 2), **options), make_replay(200, (2, 2), **options)
    for row in rows:
        whole.add(*row)
    starts = {}  # row of `pieces` -> row of `whole`
    for first in rng.permutation(np.arange(stack - 1, steps - n_step - length, length)):
        for t in range(first - stack + 1, first + length + n_step):
            frames, actions, rewards, terminations, opens = rows[t]
            if first <= t < first + length:
                starts[len(pieces)] = t
            else:
                actions = np.array([-1])
            pieces.add(frames, actions, rewards, terminations, opens | (t == first - stack + 1))
    mine = np.flatnonzero(np.asarray(pieces.drawable(np.arange(200))))
    theirs = np.asarray(whole.drawable(np.arange(200)))
    assert mine.tolist() == [row for row, t in starts.items() if theirs[t]]
    found, expected = pieces.gather(mine), whole.gather(np.array([starts[i] for i in mine]))
    for name in ("obs", "actions", "rewards", "next_obs", "discounts"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_a_state_includes_which_rows_were_drawn(make_fast):
    replay = steady(make_fast, steps=14)
    replay.gather([0])
    twin = steady(make_fast, steps=0)
    twin.load_state_dict(saved_and_loaded(replay.state_dict()))
    for each in (replay, twin):
        each.update_priorities(np.arange(10), np.full(10, 7.5))
    assert leaves_of(replay) == leaves_of(twin)


def test_max_priority_is_that_of_new_rows(make_fast):
    replay = steady(make_fast, per_alpha=0.5, per_epsilon=1e-6)
    assert replay.max_priority == 1.0
    replay.update_priorities([0], np.array([4.0]))
    assert replay.max_priority == pytest.approx((4 + 1e-6) ** 0.5, abs=2**-20)
    replay.update_priorities([0], np.array([0.25]))  # it never decreases
    replay.add(*arguments(n=1).values())
    assert leaves_of(replay)[9] == replay.max_priority * 2**20
    with pytest.raises(RuntimeError, match="prioritized=True"):
        _ = filled(make_fast).max_priority


def test_draws_are_uniform_over_the_drawable_rows(make_replay, backend):
    stats = pytest.importorskip("scipy.stats")
    replay = filled(make_replay, 300, steps=450)
    drawable = np.flatnonzero(np.asarray(replay.drawable(np.arange(300))))
    calls = 5 if backend.startswith("cuda-emulated") else 100
    draws = np.concatenate([np.asarray(replay.draw(1000)) for _ in range(calls)])
    counts = np.bincount(draws, minlength=300)
    assert counts.sum() == counts[drawable].sum()
    assert stats.chisquare(counts[drawable]).pvalue > 1e-4


def test_a_single_drawable_row_among_many_is_found(make_fast):
    replay = make_fast(5000, (1,), stack=1)
    one = np.zeros((1, 1), np.uint8), np.zeros(1, np.int64), np.zeros(1, np.float32)
    false, true = np.zeros(1, bool), np.ones(1, bool)
    for t in range(5000):
        replay.add(*one, false, false if t == 3210 else true)  # otherwise a final observation
    assert set(replay.draw(50).tolist()) == {3209}


def test_numpy_and_fastreplay_build_the_same_batch(make_fast):
    replays = [filled(make, 400, steps=333, n_step=3) for make in (numpy_class(), make_fast)]
    indices = np.asarray(replays[0].draw(256))
    first, second = (replay.gather(indices) for replay in replays)
    for name in first._fields:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_same_seed_same_draws(make_replay):
    batches = [[filled(make_replay, seed=4).sample(64) for _ in range(3)] for _ in range(2)]
    for first, second in zip(*batches, strict=True):
        assert all(map(torch.equal, first, second))


def test_obs_and_next_obs_share_one_block(make_fast):
    replay = filled(make_fast)
    batch = getattr(replay, "inner", replay).sample(16)
    assert batch.obs.untyped_storage().data_ptr() == batch.next_obs.untyped_storage().data_ptr()
    assert batch.obs.untyped_storage().nbytes() == 16 * 5 * 4


DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("instructions", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, stack", [((84, 84), 4), ((7, 9), 3), ((256, 256), 8), ((1, 1), 1)])
def test_scaled_outputs_equal_those_of_torch(
    make_fast, fast_backend, instructions, memory_format, dtype, shape, stack
):
    from fastreplay import _cpu

    best = _cpu.instruction_set()
    _cpu.use_instruction_set(instructions)
    options = {"capacity": 60, "frame_shape": shape, "stack": stack}
    plain = filled(make_fast, **options)
    # 2^-20 gives subnormal float16. -9 gives products halfway between two 16-bit numbers and turns
    # zeros into -0, including the blank frames before the start of an episode.
    for n_step, scale in ((1, 1 / 255), (2, 2.0**-20), (1, -9.0)):
        plain = filled(make_fast, n_step=n_step, **options)
        other = filled(
            make_fast,
            n_step=n_step,
            output_dtype=dtype,
            memory_format=memory_format,
            scale=scale,
            **options,
        )
        n = 3 if fast_backend.startswith("cuda-emulated") else 20
        first, second = plain.sample(n), other.sample(n)
        for name in ("obs", "next_obs"):
            frames, scaled = getattr(first, name), getattr(second, name)
            if dtype != torch.uint8:
                frames = (frames.float() * torch.tensor(scale, dtype=torch.float32)).to(dtype)
            assert scaled.dtype == dtype and torch.equal(scaled, frames)
            assert torch.equal(scaled.signbit(), frames.signbit())
            if memory_format == torch.channels_last:
                assert scaled.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(first.rewards, second.rewards)
    _cpu.use_instruction_set(best)


@pytest.mark.parametrize("stack", [None, 1, 4])
def test_plain_vectors(make_fast, stack):
    replay = filled(make_fast, frame_shape=(4,), stack=stack, frame_dtype=torch.float32)
    batch = replay.sample(32)
    assert batch.obs.shape == ((32, 4) if stack is None else (32, stack, 4))
    assert batch.obs.dtype == torch.float32
    followers = replay.gather(batch.indices[replay.drawable(batch.indices + 1)] + 1)
    by_index = dict(zip(batch.indices.tolist(), batch.next_obs, strict=True))
    assert len(followers.indices) > 10
    for index, obs in zip(followers.indices.tolist(), followers.obs, strict=True):
        assert torch.equal(by_index[index - 1], obs)


def test_check_may_be_called_on_any_device(make_fast):
    assert filled(make_fast).check() is None


@pytest.mark.parametrize("options", [{}, {"n_step": 3}, {"output_dtype": torch.bfloat16}])
def test_a_given_batch_is_written_in_place(make_fast, options):
    replay, twin = (filled(make_fast, **options) for _ in range(2))
    out = replay._empty_batch(32)
    for tensor in out:
        tensor.zero_()
    separate = out._replace(
        obs=torch.empty_like(out.obs).contiguous(),
        next_obs=torch.empty_like(out.next_obs).contiguous(),
    )
    for target in (out, separate):
        before = [tensor.data_ptr() for tensor in target]
        batch, fresh = replay.sample(32, out=target), twin.sample(32)
        assert batch is target and [tensor.data_ptr() for tensor in batch] == before
        assert all(torch.equal(tensor.cpu(), like) for tensor, like in zip(batch, fresh))


def read_only(array):
    array = np.array(array)
    array.setflags(write=False)
    return array


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [list, tuple, np.int32, torch.int32, read_only])
def test_rows_may_be_any_integers(make_fast, kind):
    replay, twin = (filled(make_fast, 40, steps=30, prioritized=True) for _ in range(2))
    plain = np.asarray(replay.draw(8))
    if isinstance(kind, torch.dtype):
        rows = torch.tensor(plain, dtype=kind)
    else:
        rows = plain.astype(kind) if kind is np.int32 else kind(plain.tolist())
    assert torch.equal(replay.drawable(rows), twin.drawable(plain))
    twin.draw(8)
    first, second = replay.gather(rows), twin.gather(plain)
    assert all(map(torch.equal, first, second)) and first.indices.tolist() == plain.tolist()
    for each, indices in ((replay, rows), (twin, plain)):
        each.update_priorities(indices, np.arange(8.0))
    assert leaves_of(replay) == leaves_of(twin)
    empty = kind([]) if kind in (list, tuple) else rows[:0]
    assert len(replay.gather(empty).indices) == len(replay.drawable(empty)) == 0


@pytest.mark.parametrize(
    "rows, error",
    [
        ([0.0, 1.0], TypeError),
        ([True, False], TypeError),
        (["0"], TypeError),
        (np.array([0.0]), TypeError),
        (np.array([True]), TypeError),
        (None, TypeError),
        ([[0], [1]], TypeError),
        ([2**70], IndexError),
        ([-1], IndexError),
    ],
)
def test_rows_that_are_not_integers_are_refused(make_fast, rows, error):
    replay, twin = (filled(make_fast, 40, steps=30, prioritized=True) for _ in range(2))
    for call in (replay.gather, replay.drawable, lambda r: replay.update_priorities(r, np.ones(1))):
        with pytest.raises(error):
            call(rows)
    assert all(map(torch.equal, replay.sample(8), twin.sample(8)))


@pytest.mark.parametrize("field", range(7))
def test_a_read_only_output_is_refused(make_cpp, field):
    replay, twin = (filled(make_cpp, 40, steps=30) for _ in range(2))
    out = [tensor.numpy().copy() for tensor in replay._empty_batch(8)]
    out[field].setflags(write=False)
    for call in (lambda: replay.sample(8, out=out), lambda: replay.gather([0] * 8, out=out)):
        with pytest.raises(ValueError, match="must be writable"):
            call()
    assert all(map(torch.equal, replay.sample(8), twin.sample(8)))


def test_out_may_be_a_plain_tuple(make_cpp):
    replay, twin = (filled(make_cpp, 40, steps=30) for _ in range(2))
    for kind in (tuple, list):
        out = kind(replay._empty_batch(8))
        batch = replay.sample(8, out=out)
        assert all(map(torch.equal, batch, twin.sample(8)))
        assert all(a is b for a, b in zip(batch, out, strict=True))
        assert torch.equal(replay.gather(batch.indices, out=out).obs, batch.obs)
    for bad in (5, out[:6], {"obs": 1}):
        with pytest.raises(TypeError, match="out must be a Batch"):
            replay.sample(8, out=bad)
        with pytest.raises(TypeError, match="out must be a Batch"):
            replay.gather([0], out=bad)


@pytest.mark.parametrize("options", [{}, {"prioritized": True, "n_step": 3, "threads": 2}])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda r: pickle.loads(pickle.dumps(r))]
)
def test_a_replay_can_be_pickled_and_copied(make_fast, options, copied):
    replay = filled(make_fast, 60, steps=50, per_beta=0.7, memory_format=torch.channels_last,
                    output_dtype=torch.float16, **options)  # fmt: skip
    replay = getattr(replay, "inner", replay)
    replay.sample(8)
    replay.per_beta = 0.9
    twin = copied(replay)
    assert twin.per_beta == 0.9 and repr(twin) == repr(replay)
    for step in range(20):
        for each in (replay, twin):
            each.add(*Games(2, np.random.default_rng(step)).step())
        first, second = replay.sample(8), twin.sample(8)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))
    assert replay._actions.data_ptr() != twin._actions.data_ptr()
    if replay.storage != "tiles":
        assert replay._frames.data_ptr() != twin._frames.data_ptr()


@pytest.mark.parametrize("num_envs, n_step, stack", [(1, 1, 1), (3, 1, 4), (2, 3, 8), (1, 5, None)])
def test_the_smallest_capacity_has_room_for_a_transition(make_fast, num_envs, n_step, stack):
    options = {"num_envs": num_envs, "n_step": n_step, "stack": stack}
    words = rf"at least {2 * num_envs} .*num_envs = {num_envs}.*n_step \+ stack"
    with pytest.raises(ValueError, match=words):
        make_fast(2 * num_envs - 1, (2, 2), **options)
    replay = make_fast(2 * num_envs, (2, 2), **options)
    for _ in range(2):
        replay.add(*arguments(n=num_envs, terminations=np.ones(num_envs, bool)).values())
    assert replay.sample(4).actions.tolist() == [0] * 4


def test_a_wait_for_the_lock_lets_other_threads_run(make_cpp):
    """While one thread copies a large batch, another thread waits in add() without the GIL."""
    replay = filled(make_cpp, 100, frame_shape=(84, 84), threads=1, output_dtype=torch.float32)
    out = replay._empty_batch(2000)  # about 100 ms
    row = list(arguments(frames=np.zeros((2, 84, 84), np.uint8)).values())
    ticks, stop, interval = 0, threading.Event(), sys.getswitchinterval()

    def tick():  # only while no other thread holds the GIL
        nonlocal ticks
        while not stop.wait(0.0001):
            ticks += 1

    sys.setswitchinterval(1000)  # a thread keeps the GIL until it waits
    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        for _ in range(20):
            started = threading.Event()
            learner = threading.Thread(
                target=lambda started=started: (started.set(), replay.sample(2000, out=out))
            )
            learner.start()
            started.wait()
            before = ticks
            replay.add(*row)
            during = ticks - before
            learner.join()
            if during > 0:
                break
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        ticker.join()
    assert during > 0


def test_batches_do_not_depend_on_the_number_of_threads(make_cpp):
    options = {"capacity": 200, "frame_shape": (84, 84), "prioritized": True}
    replays = [filled(make_cpp, threads=threads, **options) for threads in (1, 2, 5, None)]
    for _ in range(20):
        first, *others = (replay.sample(64) for replay in replays)
        for other in others:
            assert all(map(torch.equal, first, other))


def test_several_python_threads_may_use_one_replay(make_cpp):
    """One thread overwrites a small ring while others copy from it: no batch has a torn frame."""
    replay = filled(make_cpp, 60, steps=0, frame_shape=(84, 84), prioritized=True, threads=3)
    games, errors, learners_done = Games(2, np.random.default_rng(0)), [], threading.Event()

    def add(step):
        _, *rest = games.step()
        replay.per_beta = step % 5 / 4
        replay.add(np.full((2, 84, 84), step % 251, np.uint8), *rest)

    def learn(_):
        batch = replay.sample(64)
        assert (batch.obs == batch.obs[..., :1, :1]).all()
        replay.update_priorities(batch.indices, torch.randn(64))

    def run(job, steps):
        try:
            for step in steps:
                job(step)
        except Exception as error:  # a thread's exception would not fail the test
            errors.append(error)

    for step in range(40):
        add(step)
    steps = itertools.takewhile(lambda _: not learners_done.is_set(), itertools.count())
    adder = threading.Thread(target=run, args=(add, steps))
    learners = [threading.Thread(target=run, args=(learn, range(100))) for _ in range(2)]
    adder.start()
    for learner in learners:
        learner.start()
    for learner in learners:
        learner.join()
    learners_done.set()
    adder.join()
    assert not errors
    replay._tree.check_valid()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [2, None])
def test_a_child_process_continues_the_draws(make_cpp, threads):
    replay = filled(make_cpp, 200, frame_shape=(84, 84), threads=threads)
    twin = filled(make_cpp, 200, frame_shape=(84, 84), threads=1)
    replay.sample(64)  # starts the threads, which the child does not have
    twin.sample(64)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, replay.sample(64).indices.numpy().tobytes())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    expected = twin.sample(64).indices.numpy()
    np.testing.assert_array_equal(np.frombuffer(os.read(reader, 1 << 16), np.int64), expected)
    assert all(map(torch.equal, replay.sample(64)[:1], [replay.gather(expected).obs]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_process_can_use_its_copy_of_a_replay(make_cpp):
    """Torch's OpenMP threads exist only in the parent: a child that waits for them hangs."""
    torch.ones(10**7).sum()  # starts them
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        filled(make_cpp, 200, frame_shape=(84, 84)).sample(64)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_add_takes_tensors_and_strided_frames(make_fast):
    plain, other = (make_fast(20, (2, 2), num_envs=2) for _ in range(2))
    games = Games(2, np.random.default_rng(0))
    for _ in range(15):
        frames, actions, rewards, terminations, starts = games.step()
        plain.add(frames, actions, rewards, terminations, starts)
        stacked = torch.zeros((2, 4, 2, 2), dtype=torch.uint8)
        stacked[:, -1] = torch.from_numpy(frames)
        ends = torch.from_numpy(terminations)
        other.add(
            stacked[:, -1], torch.tensor(actions, dtype=torch.int32), rewards * 1.0, ends, starts
        )
    assert all(map(torch.equal, plain.sample(16), other.sample(16)))


def arguments(n=2, **changes):
    row = {
        "frames": np.zeros((n, 2, 2), np.uint8),
        "actions": np.zeros(n, np.int64),
        "rewards": np.zeros(n, np.float32),
        "terminations": np.zeros(n, bool),
        "episode_starts": np.zeros(n, bool),
    }
    return row | changes


BAD_ROWS = [
    ({"frames": np.zeros((2, 2, 2), np.float32)}, TypeError, "uint8"),
    ({"frames": np.zeros((1, 2, 2), np.uint8)}, ValueError, "shape"),
    ({"frames": np.zeros((2, 2, 3), np.uint8)}, ValueError, "shape"),
    ({"frames": np.zeros((2, 2, 2), np.uint8).transpose(0, 2, 1)}, ValueError, "contiguous"),
    ({"frames": torch.zeros((2, 2, 2), dtype=torch.uint8, device="meta")}, ValueError, "CPU"),
    ({"frames": [[0]]}, TypeError, "tensor"),
    ({"actions": np.zeros(2, np.float32)}, TypeError, "int64"),
    ({"actions": np.array([0, 2**31])}, ValueError, "32 bits"),
    ({"actions": np.zeros(3, np.int64)}, ValueError, "shape"),
    ({"rewards": np.zeros(2, bool)}, TypeError, "rewards"),
    ({"rewards": np.zeros((2, 1), np.float32)}, ValueError, "shape"),
    ({"terminations": np.zeros(2, np.float32)}, TypeError, "bool"),
    ({"episode_starts": np.zeros(1, bool)}, ValueError, "shape"),
]


@pytest.mark.parametrize("changes, error, words", BAD_ROWS)
def test_a_bad_row_raises_and_stores_nothing(make_fast, changes, error, words):
    replay, twin = (filled(make_fast, 40, steps=15) for _ in range(2))
    with pytest.raises(error, match=words):
        replay.add(**arguments(**changes))
    assert len(replay) == len(twin)
    assert all(map(torch.equal, replay.sample(32), twin.sample(32)))


def swap(name, tensor):
    return lambda replay: replay._empty_batch(8)._replace(**{name: tensor})


BAD_CALLS = [
    (lambda r: r.gather(np.array([10**9])), IndexError, "out of range"),
    (lambda r: r.gather(np.array([-1])), IndexError, "out of range"),
    (lambda r: r.gather(np.array([9])), ValueError, "not drawable"),
    (lambda r: r.gather(np.array([1.5])), TypeError, "int64"),
    (lambda r: r.update_priorities(np.array([40]), np.ones(1)), IndexError, "out of range"),
    (lambda r: r.update_priorities(np.array([0, 1]), np.ones(1)), ValueError, "shape"),
    (lambda r: r.update_priorities(np.array([0, 1]), np.array([1, np.nan])), ValueError, "finite"),
    (lambda r: r.update_priorities(np.array([0, 1]), np.array([1, -np.inf])), ValueError, "finite"),
    (lambda r: r.update_priorities(np.array([0]), np.ones(1, int)), TypeError, "float32"),
    (lambda r: r.gather(np.arange(8), out=r._empty_batch(9)), ValueError, "shape"),
    (lambda r: r.sample(8, out=r._empty_batch(9)), ValueError, r"\(8,\), not \(9,\)"),
    (lambda r: r.sample(-1), ValueError, "batch_size"),
    (lambda r: r.draw(-1), ValueError, "batch_size"),
]
BAD_OUTS = [
    (swap("obs", torch.zeros((8, 4, 2, 3), dtype=torch.uint8)), ValueError, "shape"),
    (swap("obs", torch.zeros((8, 4, 2, 2))), TypeError, "uint8"),
    (swap("next_obs", torch.zeros((8, 4, 2, 2))), TypeError, "next_obs must be uint8"),
    (
        swap("obs", torch.zeros((8, 2, 2, 4), dtype=torch.uint8).movedim(3, 1)),
        ValueError,
        "contiguous samples",
    ),
    (
        swap("obs", torch.zeros((1, 4, 2, 2), dtype=torch.uint8).expand(8, 4, 2, 2)),
        ValueError,
        "contiguous samples",
    ),
    (swap("actions", torch.zeros(8)), TypeError, "int64"),
    (swap("actions", torch.zeros(16, dtype=torch.int64)[::2]), ValueError, "contiguous"),
    (swap("is_weights", torch.zeros(7)), ValueError, "shape"),
    (swap("rewards", torch.zeros(8, device="meta")), ValueError, "must be on"),
]


@pytest.mark.parametrize("call, error, words", BAD_CALLS)
def test_a_bad_call_raises_and_changes_nothing(make_fast, call, error, words):
    replay, twin = (filled(make_fast, 40, steps=30, prioritized=True) for _ in range(2))
    with pytest.raises(error, match=words):
        call(replay)
    assert all(map(torch.equal, replay.sample(32), twin.sample(32)))


@pytest.mark.parametrize("make_out, error, words", BAD_OUTS)
def test_a_bad_out_raises_and_draws_nothing(make_fast, make_out, error, words):
    replay, twin = (filled(make_fast, 40, steps=30) for _ in range(2))
    with pytest.raises(error, match=words):
        replay.sample(8, out=make_out(replay))
    assert all(map(torch.equal, replay.sample(32), twin.sample(32)))


def test_sampling_before_there_is_data(make_replay):
    with pytest.raises(ValueError):
        make_replay(40, (2, 2)).sample(1)


def test_the_first_row_always_opens_an_episode(make_fast):
    replay = make_fast(10, (2, 2))
    for step in range(3):
        replay.add(np.full((1, 2, 2), step + 1, np.uint8), *list(arguments(n=1).values())[1:])
    assert replay.gather(np.array([1])).obs[0, :, 0, 0].tolist() == [0, 0, 1, 2]


def test_priorities_of_a_uniform_replay(make_fast):
    with pytest.raises(RuntimeError, match="prioritized=True"):
        filled(make_fast).update_priorities(np.array([0]), np.ones(1))


@pytest.mark.parametrize(
    "options, error",
    [
        ({"capacity": 1, "num_envs": 2}, ValueError),
        ({"capacity": 2**27 + 1}, ValueError),
        ({"capacity": 40.0}, TypeError),
        ({"num_envs": 0}, ValueError),
        ({"n_step": 1001}, ValueError),
        ({"n_step": 1.5}, TypeError),
        ({"stack": "4"}, TypeError),
        ({"seed": 1.5}, TypeError),
        ({"gamma": "high"}, TypeError),
        ({"threads": 1.5}, TypeError),
        ({"stack": 0}, ValueError),
        ({"stack": 9}, ValueError),
        ({"n_step": 0}, ValueError),
        ({"gamma": 1.5}, ValueError),
        ({"gamma": float("nan")}, ValueError),
        ({"frame_shape": ()}, ValueError),
        ({"frame_shape": (0, 4)}, ValueError),
        ({"frame_dtype": torch.int64}, TypeError),
        ({"frame_dtype": torch.float32, "output_dtype": torch.uint8}, TypeError),
        ({"output_dtype": torch.float64}, TypeError),
        ({"frame_shape": (4,), "memory_format": torch.channels_last}, ValueError),
        ({"per_alpha": -1.0}, ValueError),
        ({"threads": 0}, ValueError),
    ],
)
def test_invalid_options_are_refused(make_fast, options, error):
    with pytest.raises(error, match=[*options][-1].replace("memory_format", "channels_last")):
        make_fast(**({"capacity": 40, "frame_shape": (2, 2)} | options))


def test_settings_may_be_numpy_numbers(make_fast):
    options = {"n_step": np.int64(2), "gamma": np.float32(0.5), "num_envs": np.int32(2)}
    replay, twin = filled(make_fast, **options), filled(make_fast, n_step=2, gamma=0.5)
    assert all(map(torch.equal, replay.sample(16), twin.sample(16)))
    replay.load_state_dict(saved_and_loaded(twin.state_dict()))


def broken(**changes):
    return lambda state: state | changes


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda state: {}, "lacks"),
        (lambda state: None, "must be a dict, not NoneType"),
        (lambda state: [state], "must be a dict, not list"),
        (lambda state: {k: v for k, v in state.items() if k != "frames"}, "lacks: frames"),
        (broken(stack=3), "stack 3"),
        (broken(frame_shape=[4, 1]), "frame_shape"),
        (broken(stored=16), "damaged"),
        (broken(head=3), "damaged"),
        (broken(calls=-1), "damaged"),
        (broken(max_leaf=0), "damaged"),
        (broken(head=-1), "head must be"),
        (broken(head=20), "head must be"),
        (broken(head=1.0), "head must be"),
        (broken(seed=None), "seed must be"),
        (broken(stack=torch.ones(2)), "stack"),
        (broken(frames=None), "frames must be"),
        (broken(actions=torch.zeros(2, 15)), "actions must be"),
        (broken(rewards=[None, None]), "rewards must be"),
        (broken(flags=[torch.full((15,), 64, dtype=torch.uint8)] * 2), "flags"),
        (broken(leaves=7), "leaves must be"),
        (lambda state: state | {"frames": [f.to("meta") for f in state["frames"]]}, "frames must"),
        (lambda state: state | {"frames": [f[:-1] for f in state["frames"]]}, "frames must be"),
        (lambda state: state | {"rewards": state["rewards"][:1]}, "rewards must be"),
        (lambda state: state | {"leaves": [leaf + 1 for leaf in state["leaves"]]}, "priorities"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(make_fast, fast_backend, damage, words):
    if fast_backend.endswith("tiles") and "frames" in words:
        pytest.skip("test_tiles.py has the damages of a state of tiles")
    replay, twin = (filled(make_fast, 40, steps=15, prioritized=True) for _ in range(2))
    other = filled(make_fast, 40, steps=15, prioritized=True, seed=8)
    with pytest.raises(ValueError, match=words):
        replay.load_state_dict(damage(other.state_dict()))
    assert all(map(torch.equal, replay.sample(32), twin.sample(32)))


def test_saving_copies_no_frames_and_keeps_only_stored_rows():
    replay = filled(cpp_class(), 100_000, steps=20, frame_shape=(84, 84))
    state = replay.state_dict()
    assert state["frames"][0].data_ptr() == replay._frames.data_ptr()
    file = io.BytesIO()
    torch.save(state, file)
    assert 20 * 2 * 7056 < file.tell() < 20 * 2 * (7056 + 9) + 20_000


def test_memory_per_transition(make_fast):
    replay = make_fast(10_000, (84, 84), prioritized=True)
    assert getattr(replay, "inner", replay).nbytes / 10_000 <= 7056 + 24


def test_tensors_without_the_exchange_table_are_read_through_attributes():
    """torch before 2.10 has no __dlpack_c_exchange_api__."""
    code = """if True:
        import torch
        from fastreplay import SumTree
        if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
            del torch.Tensor.__dlpack_c_exchange_api__
        tree = SumTree(10)
        tree.set(torch.tensor([1, 2]), torch.tensor([1.0, 2.0], requires_grad=True))
        assert tree.get(torch.tensor([2, 1, 0])).tolist() == [2.0, 1.0, 0.0]
        for bad, error in ((torch.ones(2, device="meta"), ValueError), (torch.ones(3), ValueError),
                           (torch.ones(2, dtype=torch.int64), TypeError)):
            try:
                tree.set(torch.tensor([1, 2]), bad)
            except error:
                continue
            raise AssertionError(bad)
    """
    cpp_class()
    path = Path(importlib.util.find_spec("fastreplay").origin).parent.parent
    environment = os.environ | {"PYTHONPATH": str(path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
