"""The exact sum-tree against a list of integers, and the distribution of its draws."""

import copy
import pickle
import sys

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

fastreplay = pytest.importorskip("fastreplay")
if not fastreplay.backends():
    pytest.skip("fastreplay is not compiled", allow_module_level=True)

from conftest import CUDA, on_cuda  # noqa: E402
from fastreplay import SumTree, _cpu  # noqa: E402

CAPACITIES = [1, 2, 3, 15, 16, 17, 31, 32, 33, 255, 256, 257, 4095, 4096, 4097]


@pytest.fixture(autouse=True, params=["plain", "avx2", "avx512", *CUDA])
def instructions(request, monkeypatch):
    """Runs every test with each instruction set and on CUDA; `SumTree` is the class to test."""
    module = sys.modules[__name__]
    if request.param.startswith("cuda"):
        monkeypatch.setattr(module, "SumTree", on_cuda(request, request.param, SumTree))
        yield request.param
        return
    best = _cpu.instruction_set()
    _cpu.use_instruction_set(request.param)
    yield request.param
    _cpu.use_instruction_set(best)


def longs(values):
    return torch.tensor(values, dtype=torch.int64)


def raw(tree):
    return tree.state_dict()["leaves"].numpy().view(np.uint32)


@pytest.mark.parametrize(
    "counter, key, words",
    [  # the known answers published with the generator
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    assert oracle.philox(counter, key) == words


@pytest.mark.parametrize("capacity", [1, 2, 3, 15, 16, 17, 255, 256, 257])
def test_every_target_finds_its_leaf(capacity):
    rng = np.random.default_rng(capacity)
    units = rng.integers(0, 4, capacity)  # leaves of 0 to 3 units: every target can be tried
    units[rng.integers(capacity)] = 2
    tree = SumTree(capacity)
    tree.set(np.arange(capacity), units / oracle.UNIT)
    assert tree.total() == units.sum()
    expected = np.repeat(np.arange(capacity), units)
    np.testing.assert_array_equal(tree.find(np.arange(tree.total())), expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sequence_of_operations_agrees_with_a_list(data):
    capacity = data.draw(st.sampled_from(CAPACITIES) | st.integers(1, 700))
    alpha = data.draw(st.sampled_from([1.0, 0.0, 0.5, 0.6, 2.0]))
    seed = data.draw(st.integers(0, 2**64 - 1))
    tree, plain = SumTree(capacity, alpha, seed), oracle.TreeOracle(capacity, alpha)
    number = st.floats(0, 5000, width=32) | st.sampled_from([0.0, 1e-30, 1.0, 3e38])
    pairs = st.lists(st.tuples(st.integers(0, capacity - 1), number), max_size=200)
    for _ in range(data.draw(st.integers(1, 6))):
        changes = data.draw(pairs)
        indices, priorities = [i for i, _ in changes], [p for _, p in changes]
        tree.set(longs(indices), torch.tensor(priorities, dtype=torch.float32))
        plain.set(indices, priorities)
        difference = raw(tree).astype(np.int64) - np.array(plain.leaves)
        # Very rarely, NumPy's power rounds a leaf the other way; p^1 is exact.
        assert np.abs(difference).max() <= (alpha != 1.0)
        plain.leaves = raw(tree).tolist()
        tree.check_valid()
        assert tree.total() == plain.total()
        if plain.total():
            targets = data.draw(st.lists(st.integers(0, plain.total() - 1), max_size=70))
            targets += [0, plain.total() - 1]
            assert tree.find(longs(targets)).tolist() == [plain.find(t) for t in targets]
            stratified = data.draw(st.booleans())
            batch_size = data.draw(st.integers(1, 150))
            expected = oracle.targets(seed, tree.calls, batch_size, plain.total(), stratified)
            drawn = tree.sample(batch_size, stratified)
            assert drawn.tolist() == [plain.find(t) for t in expected]


LARGE = [2**20 - 1, 2**20, 2**20 + 1]


def test_large_trees_agree_with_cumulative_sums(instructions):
    capacities = {"plain": LARGE, "cuda-emulated": LARGE[2:]}  # the others are fast enough for 2^24
    for capacity in capacities.get(instructions, [*LARGE, 2**24]):
        check_large_tree(capacity, emulated=instructions == "cuda-emulated")


def check_large_tree(capacity, emulated):
    n, n_targets = (2000, 500) if emulated else (200_000, 20_000)
    rng = np.random.default_rng(0)
    tree = SumTree(capacity)
    leaves = np.zeros(capacity, np.uint64)
    for _ in range(3):  # heavy tails, many zeros, overwritten leaves
        indices = rng.integers(0, capacity, n)
        priorities = rng.pareto(1.0, n).astype(np.float32) * (rng.random(n) < 0.8)
        priorities = priorities.astype(np.float32)
        tree.set(indices, priorities)
        scaled = np.rint(priorities.astype(np.float64) * oracle.UNIT)
        leaves[indices] = np.where(priorities > 0, np.clip(scaled, 1, 2**32 - 1), 0)
    if not emulated:
        tree.check_valid()
    sums = np.cumsum(leaves)
    assert tree.total() == sums[-1]
    targets = rng.integers(0, int(sums[-1]), n_targets)
    expected = np.searchsorted(sums, targets.astype(np.uint64), side="right")
    np.testing.assert_array_equal(tree.find(targets), expected)


@pytest.mark.parametrize("stratified", [False, True])
def test_draws_follow_the_priorities(stratified, instructions):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    capacity, draws = (50, 4000) if instructions == "cuda-emulated" else (1000, 400_000)
    priorities = rng.exponential(1.0, capacity).astype(np.float32) + 0.05
    tree = SumTree(capacity, alpha=0.6, seed=5)
    tree.set(np.arange(capacity), priorities)
    counts = np.zeros(capacity)
    for _ in range(draws // 4000):
        counts += np.bincount(tree.sample(4000, stratified), minlength=capacity)
    law = priorities.astype(np.float64) ** 0.6
    p_value = stats.chisquare(counts, law / law.sum() * draws).pvalue
    # The counts of stratified draws vary less than multinomial ones, so no upper limit is tested.
    assert p_value > 1e-4


def test_weights_are_those_of_the_definition():
    tree = SumTree(5, alpha=0.5)
    tree.set(np.arange(5), np.array([1.0, 4.0, 9.0, 0.0, 16.0]))
    np.testing.assert_array_equal(tree.get(np.array([4, 1, 3])), [4.0, 2.0, 0.0])
    weights = tree.weights(np.array([1, 4, 2]), beta=0.4)
    np.testing.assert_allclose(weights, (2 / np.array([2.0, 4.0, 3.0])) ** 0.4, rtol=1e-7)
    assert tree.weights(np.array([0, 4]), beta=0.0).tolist() == [1.0, 1.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(2**-20, 4000, width=32), min_size=1, max_size=100), st.floats(0, 1))
def test_weights_match_float64(priorities, beta):
    tree = SumTree(len(priorities))
    indices = np.arange(len(priorities))
    tree.set(indices, np.array(priorities, np.float32))
    leaves = raw(tree).astype(np.float64)
    expected = (leaves.min() / leaves) ** beta
    np.testing.assert_allclose(tree.weights(indices, beta), expected, rtol=1e-6)


def test_duplicates_in_one_batch_the_last_wins():
    tree = SumTree(40)
    tree.set(np.array([7] * 100 + [8, 7]), np.arange(102.0))
    assert tree.get(np.array([7, 8])).tolist() == [101.0, 100.0]
    assert tree.total() == 201 * oracle.UNIT
    tree.check_valid()


def test_zero_is_never_drawn_but_the_smallest_leaf_can_be():
    tree = SumTree(5)
    tree.set(np.arange(5), np.array([0.0, 1e-30, 0.0, 1e-30, 0.0]))
    assert tree.total() == 2 and set(tree.sample(100).tolist()) == {1, 3}


def test_same_seed_same_draws_on_every_instruction_set(instructions):
    draws = {}
    for name in ("plain", instructions):
        cls = SumTree if name == instructions else fastreplay.SumTree
        if not name.startswith("cuda"):
            _cpu.use_instruction_set(name)
        tree = cls(100_000, alpha=0.6, seed=3)
        rng = np.random.default_rng(2)
        for _ in range(20):
            tree.set(rng.integers(0, 100_000, 5000), rng.pareto(2.0, 5000))
        drawn = tree.sample(4096, stratified=True)
        draws[name] = (tree.total(), raw(tree).tobytes(), drawn, tree.weights(drawn, 0.4))
    first, second = draws["plain"], draws[instructions]
    assert first[:2] == second[:2]
    assert torch.equal(first[2], second[2]) and torch.equal(first[3], second[3])


def test_a_restored_tree_continues_the_draws(tmp_path):
    tree = SumTree(1000, alpha=0.7, seed=2**64 - 1)
    tree.set(np.arange(1000), np.random.default_rng(0).random(1000))
    tree.sample(10)
    torch.save(tree.state_dict(), tmp_path / "tree.pt")
    other = SumTree(1000, alpha=0.7)
    other.load_state_dict(torch.load(tmp_path / "tree.pt", weights_only=True))
    other.check_valid()
    for _ in range(3):
        assert torch.equal(tree.sample(64), other.sample(64))


def test_empty_arrays_are_accepted():
    tree = SumTree(10)
    none = torch.as_tensor(np.zeros(0, np.int64))  # NumPy may give it a stride of 0
    tree.set(none, torch.as_tensor(np.zeros(0)))
    assert tree.total() == 0 and len(tree.get(none)) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [list, tuple, np.int32, torch.int32, "read-only"])
def test_rows_may_be_any_integers(kind):
    tree, twin = SumTree(10), SumTree(10)
    plain = np.array([3, 1, 9, 3])
    if kind == "read-only":
        rows = plain.copy()
        rows.setflags(write=False)
    elif isinstance(kind, torch.dtype):
        rows = torch.tensor(plain, dtype=kind)
    else:
        rows = plain.astype(kind) if kind is np.int32 else kind(plain.tolist())
    tree.set(rows, np.arange(1.0, 5)), twin.set(plain, np.arange(1.0, 5))
    assert (raw(tree) == raw(twin)).all()
    for method, more in (("get", ()), ("weights", (0.5,)), ("find", ())):
        assert torch.equal(getattr(tree, method)(rows, *more), getattr(twin, method)(plain, *more))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))])
def test_a_tree_can_be_pickled_and_copied(copied):
    tree = SumTree(100, alpha=0.6, seed=3)
    tree = getattr(tree, "inner", tree)
    tree.set(np.arange(100), np.arange(100.0))
    tree.sample(3)
    twin = copied(tree)
    assert type(twin) is type(tree) and (twin.alpha, twin.seed) == (0.6, 3)
    for _ in range(2):
        assert torch.equal(tree.sample(50).cpu(), twin.sample(50).cpu())
    tree.set(np.array([99]), np.zeros(1))  # the two share no memory
    assert twin.get(np.array([99])).item() > 0
    twin.check_valid()


BAD = [
    ("set", (longs([10]), torch.ones(1)), IndexError, "index 10 is out of range"),
    ("set", (longs([-1]), torch.ones(1)), IndexError, "index -1"),
    ("set", (longs([1, 2]), torch.tensor([1.0, -1.0])), ValueError, "negative"),
    ("set", (longs([1, 2]), torch.tensor([1.0, torch.nan])), ValueError, "finite"),
    ("set", (longs([1, 2]), torch.tensor([1.0, torch.inf])), ValueError, "finite"),
    ("set", (longs([1, 2]), torch.ones(3)), ValueError, "shape"),
    ("set", (longs([[1, 2]]), torch.ones(2)), ValueError, "shape"),
    ("set", (torch.ones(1), torch.ones(1)), TypeError, "int64"),
    ("set", (longs([1]), torch.ones(1, dtype=torch.int64)), TypeError, "float32"),
    ("set", (longs([1, 2, 3, 4])[::2], torch.ones(2)), ValueError, "contiguous"),
    ("set", ([1], [1.0]), TypeError, "tensor"),
    ("set", ([1.0], torch.ones(1)), TypeError, "integers"),
    ("set", ([True], torch.ones(1)), TypeError, "integers"),
    ("set", (torch.tensor([True]), torch.ones(1)), TypeError, "int64"),
    ("get", ([2**64],), IndexError, "64 bits"),
    ("set", (longs([1]).to("meta"), torch.ones(1)), ValueError, "CPU"),
    ("find", (longs([3 * 2**20]),), IndexError, "target"),
    ("find", (longs([-1]),), IndexError, "target"),
    ("get", (longs([10]),), IndexError, "range"),
    ("get", (longs([1]), torch.empty(2, dtype=torch.float64)), ValueError, "shape"),
    ("weights", (longs([9]), 0.4), ValueError, "priority 0"),
    ("weights", (longs([0]), -1.0), ValueError, "beta"),
    ("sample", (2, False, torch.empty(3, dtype=torch.int64)), ValueError, "shape"),
    ("sample", (2, False, torch.empty(2)), TypeError, "int64"),
]


@pytest.mark.parametrize("method, arguments, error, words", BAD)
def test_misuse_raises_and_changes_nothing(method, arguments, error, words):
    tree = SumTree(10)
    tree.set(longs([0, 1]), torch.tensor([1.0, 2.0]))
    before = raw(tree).copy(), tree.calls, tree.total()
    with pytest.raises(error, match=words):
        getattr(tree, method)(*arguments)
    assert (raw(tree) == before[0]).all() and (tree.calls, tree.total()) == before[1:]
    tree.check_valid()


def test_invalid_arguments_are_refused():
    for capacity in (0, -1, 2**27 + 1):
        with pytest.raises(ValueError, match="capacity"):
            SumTree(capacity)
    for alpha in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            SumTree(4, alpha=alpha)
    with pytest.raises(ValueError, match="nothing to draw"):
        SumTree(4).sample(1)


NOT_A_STATE = [
    (None, "must be a dict, not NoneType"),
    ([], "must be a dict, not list"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"calls": 1.5}, "calls"),
    ({"capacity": 5}, "capacity"),
    ({"alpha": 0.5}, "alpha"),
    ({"leaves": None}, "leaves"),
    ({"leaves": torch.ones(4)}, "leaves"),
    ({"leaves": torch.ones(5, dtype=torch.int32)}, "leaves"),
]


@pytest.mark.parametrize("changes, words", NOT_A_STATE)
def test_a_state_that_does_not_fit_changes_nothing(changes, words):
    tree, other = SumTree(4), SumTree(4, seed=9)
    for each in (tree, other):
        each.set(np.arange(4), np.arange(4.0))
    before, calls = raw(tree).copy(), tree.calls
    state = other.state_dict() | changes if isinstance(changes, dict) else changes
    with pytest.raises(ValueError, match=words):
        tree.load_state_dict(state)
    assert (raw(tree) == before).all() and (tree.seed, tree.calls) == (1, calls)


def test_an_incomplete_state_is_refused():
    tree = SumTree(4)
    with pytest.raises(ValueError, match="lacks: leaves"):
        tree.load_state_dict({k: v for k, v in tree.state_dict().items() if k != "leaves"})


def test_a_damaged_sum_is_detected():
    tree = SumTree(100)
    tree.set(np.arange(100), np.ones(100))
    tree._inner[3] += 1
    with pytest.raises(RuntimeError, match="damaged"):
        tree.check_valid()
