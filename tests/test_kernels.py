"""The tuned CUDA kernels against the plain ones of csrc/cuda/reference.cu, bit for bit.

Two replays (or trees) on one device get the same calls, one with each set of kernels, on the
emulation and, if there is one, on a GPU.
"""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ALGOS, CUDA
from emulated import RealCuda
from test_frame_replay import Games, adversarial
from test_tiles import SOURCES
from test_tiles import rows_of as rows_of_tiles

fastreplay = pytest.importorskip("fastreplay")
if not fastreplay.backends():
    pytest.skip("fastreplay is not compiled", allow_module_level=True)

from fastreplay import FrameReplay, SumTree  # noqa: E402

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
FORMATS = (torch.contiguous_format, torch.channels_last)
SHAPES = ((1, 1), (2, 2), (3, 5), (4, 4), (7, 9), (8, 16), (5, 16))  # 1 to 128 bytes


@pytest.fixture(params=CUDA)
def module(request):
    """The compiled module of a device. Selects its tuned kernels again after the test."""
    if request.param == "cuda-emulated":
        request.getfixturevalue("emulation")
        module = importlib.import_module("emulated._cuda")
    else:
        module = importlib.import_module("fastreplay._cuda")
    assert module.use_kernels("tuned") == "tuned"
    yield module
    module.use_kernels("tuned")


@pytest.fixture
def cuda(module, request):
    """The device's streams and graphs."""
    emulated = request.node.callspec.params["module"] == "cuda-emulated"
    return request.getfixturevalue("emulation") if emulated else RealCuda()


class Both:
    """Two equal objects. `call` makes a call on each with its own kernels and compares what the
    calls return or raise."""

    def __init__(self, module, make):
        self.module = module
        self.objects = {name: make() for name in ("tuned", "reference")}

    def call(self, work):
        tuned, reference = (self._outcome(name, work) for name in self.objects)
        assert type(tuned) is type(reference), (tuned, reference)
        if isinstance(tuned, Exception):
            assert str(tuned) == str(reference)
        else:
            assert_same_bits(tuned, reference)
        return tuned

    def _outcome(self, name, work):
        self.module.use_kernels(name)
        one = self.objects[name]
        try:
            return work(one)
        except (ValueError, IndexError, RuntimeError) as error:
            return error

    def check(self):
        """Compares latched errors. -> the error, or None"""
        return self.call(lambda one: one.check())

    def compare_states(self):
        self.call(lambda one: flat(one.state_dict()))


def flat(state):
    """The values of a state_dict, including the tensors of each game."""
    values = []
    for value in state.values():
        values += value if isinstance(value, list) else [value]
    return values


def bits_of(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).flatten().view(torch.uint8)


def assert_same_bits(first, second):
    if isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)
    elif torch.is_tensor(first):
        first, second = first.cpu(), second.cpu()
        assert first.dtype == second.dtype and first.shape == second.shape
        assert torch.equal(bits_of(first), bits_of(second)), f"{first} is not {second}"
    else:
        assert first == second


def configuration(seed):
    """Options of a replay. Seeds 0 to 15 cover dtypes x memory formats x prioritized."""
    rng = np.random.default_rng(seed)
    memory_format = FORMATS[seed // 4 % 2]
    stack = int(rng.integers(1, 9)) if seed % 3 else 4
    contiguous = memory_format == torch.contiguous_format
    rows, num_envs = int(rng.choice([2, 3, 5, 12, 40])), int(rng.integers(1, 5))
    return {
        "capacity": rows * num_envs + int(rng.integers(num_envs)),
        "num_envs": num_envs,
        "frame_shape": SHAPES[rng.integers(len(SHAPES))],
        "stack": None if contiguous and rng.random() < 0.2 else stack,
        "n_step": int(rng.choice([1, 1, 2, 3, 7])),
        "prioritized": bool(seed // 8 % 2),
        "stratified": bool(rng.integers(2)),
        "output_dtype": DTYPES[seed % 4],
        "scale": float(rng.choice([1 / 255, -0.3, 1000.0])),
        "memory_format": memory_format,
        "storage": str(rng.choice(["device", "host"])),
        "seed": seed,
    }


def row_of_zeros(start=True, action=0):
    """Arguments of add() for one game of 2x2 frames."""
    numbers = np.array([action]), np.zeros(1, np.float32)
    return np.zeros((1, 2, 2), np.uint8), *numbers, np.zeros(1, bool), np.full(1, start)


def rows_of(rng, num_envs, shape):
    """Arguments of add() without end, with random frames: games for 20 rows, then random flags."""
    games = Games(num_envs, rng)
    for step in range(10**9):
        row = games.step() if step // 20 % 2 == 0 else adversarial(num_envs, rng)
        yield (rng.integers(0, 256, (num_envs, *shape), dtype=np.uint8), *row[1:])


@pytest.mark.parametrize("seed", range(24))
def test_replays_are_bit_identical(module, seed):
    options, rng = configuration(seed), np.random.default_rng(seed)
    both = Both(module, lambda: FrameReplay(device="cuda", **options))
    size = options["capacity"] // options["num_envs"] * options["num_envs"]
    source = rows_of(rng, options["num_envs"], options["frame_shape"])
    sampled = failed = 0
    for step in range(60):
        row = next(source)
        if step % 2:
            row = [torch.as_tensor(column).cuda() for column in row]
        both.call(lambda r, row=row: r.add(*row))
        if step % 6:
            continue
        n = int(rng.integers(1, 40))
        batch = both.call(lambda r, n=n: r.sample(n))
        sampled += not isinstance(batch, Exception)
        drawn = both.call(lambda r, n=n: r.draw(n))
        if both.check() is None and torch.is_tensor(drawn):
            some = drawn.cpu()
            some[-1] = int(rng.integers(-1, size + 1))  # at most one that is not drawable
            some = some.cuda()
            both.call(lambda r, some=some: r.gather(some))
            failed += both.check() is not None
        if options["prioritized"]:
            indices = torch.from_numpy(rng.integers(0, size, n)).cuda()  # with duplicates
            errors = torch.from_numpy(rng.normal(size=n) ** 3).to(DTYPES[3]).cuda()
            both.call(lambda r, i=indices, e=errors: r.update_priorities(i, e))
            both.call(lambda r, i=indices, e=errors: r.update_priorities(i.cpu(), e.cpu().double()))
            both.call(lambda r: r._tree.check_valid())
        both.compare_states()
    assert (sampled > 1 and failed > 0) or size // options["num_envs"] <= 2, options


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seed", range(4))
def test_samples_of_tiles_are_bit_identical(module, seed, source):
    options = configuration(seed * 5 + SOURCES.index(source)) | {"storage": "tiles"}
    n, shape = options["num_envs"], options["frame_shape"]
    both = Both(module, lambda: FrameReplay(device="cuda", **options))
    for step, row in zip(range(100), rows_of_tiles(source, shape, n, seed)):
        both.call(lambda r, row=row: r.add(*row))
        if step % 7 == 6:
            both.call(lambda r: r.sample(9))
            assert both.check() is None or options["capacity"] < 10 * n
    both.compare_states()


def test_few_drawable_rows_are_counted(module):
    """Three drawable rows among 3000: attempts rarely find one, so rows are counted instead."""

    def make():
        replay = FrameReplay(3000, (2, 2), device="cuda", stack=1, seed=3)
        for step in range(40):
            replay.add(*row_of_zeros(start=step not in (21, 25, 31)))
        return replay

    both, rows = Both(module, make), [20, 24, 30]
    assert both.objects["tuned"].drawable(np.arange(40)).cpu().nonzero().flatten().tolist() == rows
    state = both.objects["tuned"].state_dict()
    for name in ("frames", "actions", "rewards", "flags"):  # 2960 more rows that are not drawable
        last = state[name][0][-1:]
        state[name] = [torch.cat([state[name][0], *[last] * 2960])]
    state |= {"stored": 3000, "head": 0}
    for replay in both.objects.values():
        replay.load_state_dict(state)
    drawn = [both.call(lambda r: r.sample(8)).indices.cpu() for _ in range(5)]
    assert set(torch.cat(drawn).tolist()) == set(rows)
    both.check()


@pytest.mark.parametrize("capacity", [1, 2, 31, 32, 33, 1023, 1025, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trees_are_bit_identical(module, capacity, dtype, request):
    if capacity == 40_000 and dtype == torch.float64 and "emulated" in request.node.name:
        pytest.skip("takes 20 seconds; the smaller trees have this dtype, too")
    both = Both(module, lambda: SumTree(capacity, 0.7, seed=capacity, device="cuda"))
    rng = np.random.default_rng(capacity)
    both.call(lambda t: t.sample(3))  # nothing to draw
    both.check()
    for turn in range(4):
        n = int(rng.integers(1, 300))
        indices = torch.from_numpy(rng.integers(0, capacity, n)).cuda()
        priorities = torch.from_numpy(rng.random(n) ** 4 * 100 * (rng.random(n) > 0.2)).to(dtype)
        both.call(lambda t, i=indices, p=priorities: t.set(i, p.cuda()))
        both.call(lambda t: t.check_valid())
        both.compare_states()
        total = both.call(lambda t: t.total())
        if total == 0:
            continue
        targets = rng.integers(0, total, 60, dtype=np.uint64).astype(np.int64)
        targets[:3] = 0, total - 1, -1 if turn % 2 else total
        both.call(lambda t, x=targets: t.find(x))
        both.check()
        drawn = both.call(lambda t, n=n, s=bool(turn % 2): t.sample(n, stratified=s))
        both.call(lambda t, rows=drawn: t.weights(rows, 0.4))
        both.check()
    both.compare_states()


@pytest.mark.parametrize(
    "index, value", [(50, 1.0), (-1, 1.0), (3, -1.0), (3, np.nan), (3, np.inf), (3, -np.inf)]
)
def test_a_bad_pair_is_the_same_error_and_changes_nothing(module, index, value):
    both = Both(module, lambda: SumTree(50, device="cuda"))
    both.call(lambda t: t.set(np.arange(50), np.ones(50)))
    indices, values = torch.arange(40).cuda(), torch.ones(40)
    indices[7], values[7] = index, value
    both.call(lambda t: t.set(indices, 2 * values.cuda()))
    assert isinstance(both.check(), (ValueError, IndexError))
    assert both.call(lambda t: t.total()) == 50 << 20


def test_an_action_that_does_not_fit_is_the_same_error(module):
    both = Both(module, lambda: FrameReplay(40, (2, 2), device="cuda"))
    there = [torch.as_tensor(column).cuda() for column in row_of_zeros(action=2**40)]
    both.call(lambda r: r.add(*there))
    assert "32 bits" in str(both.check())


def test_a_graph_of_reference_kernels_draws_what_eager_calls_draw(module, cuda):
    module.use_kernels("reference")
    replays = [FrameReplay(60, (3, 5), 2, prioritized=True, device="cuda") for _ in range(2)]
    source = rows_of(np.random.default_rng(0), 2, (3, 5))
    for _ in range(20):
        row = next(source)
        for replay in replays:
            replay.add(*row)
    eager, captured = replays
    out, errors = captured._empty_batch(16), torch.arange(16.0).cuda()

    def learn(replay, out=None):
        batch = replay.sample(16, out=out)
        replay.update_priorities(batch.indices, errors)
        return batch

    learn(eager)
    launch = cuda.captured(lambda: learn(captured, out))
    module.use_kernels("tuned")  # a graph keeps the kernels of its capture
    for _ in range(5):
        launch()
        assert_same_bits(learn(eager), out)
    assert_same_bits(flat(eager.state_dict()), flat(captured.state_dict()))


def test_use_kernels_changes_the_launches(module, emulation, request):
    """Counted on the emulation: a tuned call is one launch, a reference call several."""
    if request.node.callspec.params["module"] != "cuda-emulated":
        pytest.skip("launches are counted on the emulation")
    replay = FrameReplay(60, (2, 2), prioritized=True, device="cuda")
    row = row_of_zeros(start=False)
    for _ in range(9):
        replay.add(*row)
    tree, two = replay._tree, torch.arange(2).cuda()
    calls = {
        "add": (lambda: replay.add(*row), 1, 3),
        "sample": (lambda: replay.sample(2), 1, 5),
        "draw": (lambda: replay.draw(2), 1, 2),
        "gather": (lambda: replay.gather(replay.draw(2)), 2, 2 + 3),
        "tree draw": (lambda: tree.sample(2), 1, 2),
        "tree find": (lambda: tree.find(two), 1, 1),
        "tree set": (lambda: tree.set(two, two.float()), 1, 1),
    }
    replay.sample(2)
    tiles = FrameReplay(60, (2, 2), storage="tiles", device="cuda")
    calls["add, tiles"] = (lambda: tiles.add(*row), 2, 3)

    def launches(call):
        before = emulation.library.emulation_launches()
        call()
        return emulation.library.emulation_launches() - before

    for name, (call, tuned, reference) in calls.items():
        assert module.use_kernels("tuned") == "tuned"
        assert launches(call) == tuned, name
        assert module.use_kernels("reference") == "tuned"
        assert launches(call) == reference, name
        assert module.use_kernels("tuned") == "reference"


def test_the_benchmark_times_both_kernels_of_every_operation(module, cuda, monkeypatch):
    monkeypatch.syspath_prepend(ALGOS.parent / "benchmarks")
    bench = importlib.import_module("buffers_cuda")
    monkeypatch.setattr(bench, "calls_per_block", lambda call, args: 1)
    if not isinstance(cuda, RealCuda):
        monkeypatch.setattr(torch.cuda, "synchronize", cuda.synchronize)
        monkeypatch.setattr(bench, "captured", cuda.captured)
    args = SimpleNamespace(kernels=["tuned", "reference"], capacity=64, repeats=2)
    results = bench.compare_kernels(args, bench.kernel_calls(args, sizes=(2,), leaves=100))
    assert module.use_kernels("tuned") == "tuned"
    table = bench.kernel_table(results, args.kernels)
    for name in ("add, prioritized | 8", "sample, uint8, 3-step | 2", "tree of 100, set | 2"):
        assert f"| {name} | " in table
    assert len(results) == len(bench.SAMPLES) + 4
    assert all(len(x) == 2 and min(x) > 0 for row in results for x in row["seconds"].values())


def test_an_unknown_name_is_refused(module):
    with pytest.raises(ValueError, match="'tuned' or 'reference', not 'fast'"):
        module.use_kernels("fast")
    assert module.use_kernels("reference") == "tuned"


# Trees with wrong sums, and rings with wrong counts: only other code can damage them like this.


@pytest.mark.parametrize("capacity", [20, 40, 1500, 39_990])
@pytest.mark.parametrize("damage", ["a sum too large", "a leaf beyond the capacity"])
def test_a_damaged_tree_draws_no_row_and_is_reported(module, capacity, damage):
    def make():
        tree = SumTree(capacity, device="cuda")
        tree.set(np.arange(capacity), np.ones(capacity))
        if damage == "a sum too large" and capacity > 32:
            tree._inner[0] = 50 << 20  # the sum of the first 32 leaves is 32 << 20
        else:
            tree._leaves[-1] = 50 << 20  # padding of the last node
            tree.rebuild()
        return tree

    both = Both(module, make)
    total = both.call(lambda t: t.total())
    assert total >= capacity << 20
    target = 40 << 20 if damage == "a sum too large" and capacity > 32 else total - 1
    found = both.call(lambda t: t.find(np.array([5 << 20, target])))
    assert found.tolist() == [5, 0]
    assert "damaged" in str(both.check())
    drawn = both.call(lambda t: t.sample(3000, stratified=True))
    assert 0 <= drawn.min() and drawn.max() < capacity
    assert "damaged" in str(both.check())


def test_a_sample_from_a_damaged_tree_is_zeros(module):
    def make():
        replay = FrameReplay(40, (2, 2), stack=1, prioritized=True, device="cuda")
        for step in range(30):
            replay.add(*row_of_zeros(start=False, action=step + 1))
        replay._tree._inner[0] = 2000 << 20  # nearly all targets are beyond the leaves
        return replay

    both = Both(module, make)
    batch = both.call(lambda r: r.sample(20))
    assert "damaged" in str(both.check())
    zero = (batch.is_weights == 0).cpu()
    assert zero.sum() > 10
    for name in ("obs", "actions", "rewards", "next_obs", "discounts", "indices"):
        assert not getattr(batch, name).cpu()[zero].any(), name


def test_a_wrong_count_of_drawable_rows_is_reported(module):
    def make():
        replay = FrameReplay(200, (2, 2), stack=1, device="cuda")
        for _ in range(100):  # every row opens an episode: none is drawable
            replay.add(*row_of_zeros(action=7))
        replay._ring.restore(100, 100, 1 << 20, 0, 5)
        return replay

    both = Both(module, make)
    batch = both.call(lambda r: r.sample(4))
    assert "damaged" in str(both.check())
    assert not batch.indices.cpu().any() and not batch.actions.cpu().any()
