"""What is specific to a replay on CUDA: arguments on the GPU, latched errors, streams, graphs.

Draws and batches are compared with the CPU's in test_sum_tree.py and test_frame_replay.py.
Tests marked `gpu` need a GPU; the others run on the emulation too.
"""

import importlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ALGOS, CUDA
from emulated import RealCuda
from test_frame_replay import Games

fastreplay = pytest.importorskip("fastreplay")
if not fastreplay.backends():
    pytest.skip("fastreplay is not compiled", allow_module_level=True)

from fastreplay import FrameReplay, SumTree, _device, _self_check  # noqa: E402

one_gpu = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(params=CUDA)
def device(request):
    """The device of the tensors of a replay with device="cuda"."""
    if request.param == "cuda-emulated":
        request.getfixturevalue("emulation")
        return torch.device("cuda", 0)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def cuda(device, request):
    """The GPU's streams and graphs, or those of the emulation."""
    emulated = request.node.callspec.params["device"] != "cuda"
    yield request.getfixturevalue("emulation") if emulated else RealCuda()
    if not emulated:  # after a failed capture, its stream is still the current one
        torch.cuda.set_stream(torch.cuda.default_stream())


def equal(first, second):
    """Whether tensors on any devices have equal values."""
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


def equal_states(first, second):
    def same(a, b):
        if isinstance(a, list) and a and torch.is_tensor(a[0]):
            return equal(a, b)
        return a == b

    return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)


def tensors(row, device):
    return [torch.as_tensor(column).to(device) for column in row]


def pair(capacity=600, frame_shape=(2, 2), steps=50, num_envs=2, seed=0, **options):
    """A replay on the CPU and one on CUDA, with the same rows."""
    replays = [
        FrameReplay(capacity, frame_shape, num_envs, device=where, **options)
        for where in ("cpu", "cuda")
    ]
    games, rng = Games(num_envs, np.random.default_rng(seed)), np.random.default_rng(seed)
    for _ in range(steps):
        _, *rest = games.step()
        frames = rng.integers(0, 256, (num_envs, *frame_shape), dtype=np.uint8)
        for replay in replays:
            replay.add(frames, *rest)
    return replays


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prioritized": True, "n_step": 3},
        {"prioritized": True, "stratified": False, "num_envs": 5, "output_dtype": torch.float16},
        {"prioritized": True, "capacity": 50, "n_step": 40, "stack": 8, "num_envs": 1},
        {"capacity": 10, "stack": 8, "n_step": 2},
    ],
)
def test_rows_on_the_device_are_stored_like_rows_on_the_cpu(device, options):
    cpu, cuda = pair(steps=0, **({"capacity": 60} | options))
    games, rng = Games(cpu.num_envs, np.random.default_rng(1)), np.random.default_rng(1)
    for step in range(150):
        row = games.step()
        frames, actions, rewards, terminations, starts = tensors(row, device)
        strided = torch.stack([frames, frames + 1], dim=1)  # frames of a larger observation
        kind = step % 3
        if kind == 1:
            actions, rewards = actions.int(), rewards.double()
        if kind == 2:  # some columns are on the CPU
            actions, terminations = row[1], row[3]
        cuda.add(strided[:, 0], actions, rewards, terminations, starts)
        cpu.add(*row)
        if step % 10 == 9 and cpu._ring.n_drawable:
            first, second = cpu.sample(16), cuda.sample(16)
            assert equal(first, second)
            if cpu.prioritized:  # with duplicates, and rows that are not drawable
                indices = rng.integers(0, cpu.rows * cpu.num_envs, 300)
                td_errors = rng.normal(size=300).astype(np.float32)
                cpu.update_priorities(indices, td_errors)
                cuda.update_priorities(*tensors((indices, td_errors), device))
    assert equal_states(cpu.state_dict(), cuda.state_dict())
    if cuda._tree is not None:
        cuda._tree.check_valid()


def test_rows_on_the_cpu_may_have_values_on_the_gpu(device):
    cpu, cuda = pair(60, steps=20, prioritized=True)
    errors = torch.arange(4.0)
    for rows in ([0, 3, 1, 0], np.array([4, 5, 6, 7]), torch.tensor([8, 9, 8, 8])):
        cpu.update_priorities(rows, errors)
        cuda.update_priorities(rows, errors.to(device))
    assert equal_states(cpu.state_dict(), cuda.state_dict())
    with pytest.raises(ValueError, match=r"td_error must be on .*, like the indices"):
        cuda.update_priorities(torch.tensor([0], device=device), np.ones(1))
    with pytest.raises(IndexError):
        cuda.update_priorities([999], errors[:1].to(device))
    assert equal_states(cpu.state_dict(), cuda.state_dict())


@pytest.mark.parametrize("n", [1, 31, 257, 5000])
def test_the_last_duplicate_wins_in_any_order(device, n):
    rng = np.random.default_rng(n)
    cpu, cuda, twin = (SumTree(1000, 0.6, device=where) for where in ("cpu", "cuda", "cuda"))
    for _ in range(3):
        indices, priorities = rng.integers(0, 7, n) * 100, rng.random(n)
        cpu.set(indices, priorities)
        cuda.set(*tensors((indices, priorities), device))
        twin.set(indices, priorities)  # through the staging slots, in pieces if it is large
        assert equal([cpu.state_dict()["leaves"]], [cuda.state_dict()["leaves"]])
        assert equal([cpu.state_dict()["leaves"]], [twin.state_dict()["leaves"]])
    cuda.check_valid()
    assert cpu.total() == cuda.total()
    assert equal([cpu.sample(100)], [cuda.sample(100)])


LATE = [
    (lambda r, d: r.update_priorities(*tensors(([0, 1], [1.0, float("nan")]), d)), "finite"),
    (lambda r, d: r.update_priorities(*tensors(([0, 10**9], [1.0, 1.0]), d)), "1000000000 is out"),
    (lambda r, d: r.update_priorities(*tensors(([0, -1], [1.0, 1.0]), d)), "-1 is out of range"),
    (lambda r, d: r.gather(torch.tensor([0, 99], device=d)), "row 99 is not drawable"),
    (lambda r, d: r.gather(torch.tensor([0, 10**9], device=d)), "out of range"),
    (lambda r, d: r.drawable(torch.tensor([-5], device=d)), "-5 is out of range"),
]


@pytest.mark.parametrize("call, words", LATE)
def test_an_error_is_latched_until_check_and_changes_nothing(device, call, words):
    cpu, cuda = pair(400, steps=40, prioritized=True)
    call(cuda, device)
    with pytest.raises((ValueError, IndexError), match=words):
        cuda.check()
    cuda.check()  # raised once
    assert equal_states(cpu.state_dict(), cuda.state_dict())
    assert equal(cpu.sample(32), cuda.sample(32))


def test_a_sample_that_cannot_be_built_is_zeros(device):
    _, cuda = pair(400, steps=40, prioritized=True)
    good = cuda.draw(1)
    batch = cuda.gather(torch.cat([good, torch.tensor([10**9, 399], device=device)]))
    with pytest.raises((ValueError, IndexError)):
        cuda.check()
    for name in ("obs", "actions", "rewards", "next_obs", "discounts", "is_weights"):
        assert not getattr(batch, name)[1:].any(), name
    assert batch.obs[0].any() and batch.is_weights[0] == 1


def test_an_action_that_does_not_fit_is_reported(device):
    _, cuda = pair(40, steps=3)
    row = Games(2, np.random.default_rng(0)).step()
    cuda.add(*tensors((row[0], np.array([3, 2**40]), *row[2:]), device))
    with pytest.raises(ValueError, match="32 bits"):
        cuda.check()
    assert len(cuda) == 8


@pytest.mark.parametrize("prioritized", [False, True])
def test_states_move_between_devices(device, prioritized):
    cpu, cuda = pair(60, steps=45, prioritized=prioritized, n_step=2)
    cpu.sample(5), cuda.sample(5)
    for source, where in ((cuda, "cpu"), (cpu, "cuda")):
        other = FrameReplay(60, (2, 2), 2, prioritized=prioritized, n_step=2, seed=9, device=where)
        other.load_state_dict(source.state_dict())
        assert equal_states(source.state_dict(), other.state_dict())
        assert equal(source.sample(20), other.sample(20))
    tree = SumTree(100, device="cuda")
    tree.set(np.arange(100), np.arange(100.0))
    tree.sample(3)
    other = SumTree(100)
    other.load_state_dict(tree.state_dict())
    assert equal([tree.sample(50)], [other.sample(50)])


def test_beta_may_be_changed_at_any_time(device):
    cpu, cuda = pair(60, steps=45, prioritized=True)
    for replay in (cpu, cuda):
        replay.update_priorities(np.arange(20), np.arange(20.0))
    for beta in (0.0, 1.0, 0.5):
        cpu.per_beta = cuda.per_beta = beta
        assert cuda.per_beta == beta
        assert equal(cpu.sample(32), cuda.sample(32))
    with pytest.raises(ValueError, match="beta"):
        cuda.per_beta = -1.0


@pytest.mark.parametrize("storage", ["host", "device", "auto"])
def test_storage_of_frames(device, storage, monkeypatch):
    cpu, cuda = pair(100, (84, 84), steps=60, storage=storage)
    assert cuda.storage == ("device" if storage == "auto" else storage)
    assert cuda._frames.device == (torch.device("cpu") if storage == "host" else device)
    assert f"frames on the {cuda.storage}" in repr(cuda)
    assert equal(cpu.sample(20), cuda.sample(20))
    assert equal_states(cpu.state_dict(), cuda.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(type(cuda._backend), "free_memory", lambda backend: 100 * 7056)
        assert FrameReplay(100, (84, 84), device="cuda").storage == "host"

    def no_room(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", no_room)
    assert FrameReplay(100, (84, 84), device="cuda").storage == "host"
    with pytest.raises(torch.OutOfMemoryError):
        FrameReplay(100, (84, 84), device="cuda", storage="device")


def test_results_and_memory_are_on_the_device(device):
    _, cuda = pair(60, steps=45, prioritized=True)
    assert cuda.device.type == device.type
    assert all(tensor.device == device for tensor in cuda.sample(4))
    assert cuda.draw(4).device == cuda.drawable(np.arange(4)).device == device
    tree = SumTree(10, device="cuda")
    tree.set(np.arange(10), np.ones(10))
    assert tree.device.type == device.type and isinstance(tree, SumTree)
    for result in (tree.sample(3), tree.get(np.arange(3)), tree.find(np.arange(3))):
        assert result.device == device


def test_without_a_gpu_there_is_one_clear_error():
    code = """if True:
        import fastreplay
        for make in (lambda: fastreplay.SumTree(9, device="cuda"),
                     lambda: fastreplay.FrameReplay(9, (2,), stack=None, device="cuda:7")):
            try:
                make()
            except RuntimeError as e:
                print(e)
    """
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 2 and not result.stderr, result
    built = "cuda" in fastreplay.backends()
    assert all(("GPU" if built else "built without CUDA") in line for line in lines)
    with pytest.raises(ValueError, match="cpu or cuda"):
        SumTree(9, device="meta")
    with pytest.raises(ValueError, match="storage"):
        FrameReplay(9, (2, 2), storage="disk")


def frame_fault(replay, calls):
    replay._frames[0, 3, 5] = 7


def reward_fault(replay, calls):
    replay._rewards[1] = 0.5


def draw_fault(replay, calls):
    replay._ring.seed = 99


def priority_fault(replay, calls):  # after the last update of the first replay
    if calls == 3:
        replay._tree._leaves.copy_(replay._tree._leaves.cpu().flip(0))


FAULTS = [
    (None, None, ""),
    ("add", frame_fault, "obs of a replay that returns torch.uint8 in torch.contiguous_format"),
    ("add", reward_fault, "rewards of"),
    ("add", draw_fault, "obs of"),
    ("update_priorities", priority_fault, "priorities of"),
]


@pytest.mark.parametrize("method, fault, words", FAULTS)
def test_the_self_check_finds_a_gpu_that_computes_something_else(
    device, monkeypatch, method, fault, words
):
    """A fault is written to memory after each call of a method; without a fault, none is found."""
    calls = 0

    def faulty(replay, *arguments):
        nonlocal calls
        good(replay, *arguments)
        if replay.device.type == "cuda":
            calls += 1
            fault(replay, calls)

    if fault is not None:
        good = getattr(FrameReplay, method)
        monkeypatch.setattr(FrameReplay, method, faulty)
    monkeypatch.setattr(_device, "checks_emulation", True)
    monkeypatch.setattr(_device, "_self_checks", {})
    problem = fastreplay.cuda_problem()
    assert words in problem and bool(problem) == bool(words) and "\n" not in problem
    monkeypatch.setattr(_self_check, "difference", None)  # it runs only once for each GPU
    for make in (lambda: SumTree(9, device="cuda"), lambda: FrameReplay(9, (2,), device="cuda")):
        if words:
            with pytest.raises(RuntimeError, match=f"self-check failed.*{words}"):
                make()
        else:
            make()


def test_tiles_have_a_self_check_of_their_own(device, monkeypatch):
    """Tiles that are wrong on a GPU are refused there; plain frames are not."""
    monkeypatch.setattr(_device, "checks_emulation", True)
    monkeypatch.setattr(_device, "_self_checks", {})
    assert FrameReplay(9, (2, 2), storage="tiles", device="cuda").storage == "tiles"
    good = FrameReplay.add

    def faulty(replay, *arguments):
        good(replay, *arguments)
        if replay.storage == "tiles":
            draw_fault(replay, 0)

    monkeypatch.setattr(FrameReplay, "add", faulty)
    monkeypatch.setattr(_device, "_self_checks", {})
    words = "self-check failed.*: obs of .*, with frames in tiles differ"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            FrameReplay(9, (2, 2), storage="tiles", device="cuda")
    assert fastreplay.cuda_problem() == "" and len(FrameReplay(9, (2, 2), device="cuda")) == 0


def test_a_self_check_that_cannot_run_is_tried_again(device, monkeypatch):
    def out_of_memory(where):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore about it.")

    monkeypatch.setattr(_device, "checks_emulation", True)
    monkeypatch.setattr(_device, "_self_checks", {})
    with monkeypatch.context() as patch:
        patch.setattr(_self_check, "difference", out_of_memory)
        assert fastreplay.cuda_problem().endswith(": CUDA out of memory.")
    assert fastreplay.cuda_problem() == ""


def test_a_self_check_that_is_interrupted_has_not_passed(device, monkeypatch):
    def interrupt(where):
        raise KeyboardInterrupt

    monkeypatch.setattr(_device, "checks_emulation", True)
    monkeypatch.setattr(_device, "_self_checks", {})
    with monkeypatch.context() as patch:
        patch.setattr(_self_check, "difference", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fastreplay.cuda_problem()
    monkeypatch.setattr(_self_check, "difference", lambda where: "draws")
    assert "draws differ" in fastreplay.cuda_problem()


@pytest.mark.skipif("cuda" not in fastreplay.backends(), reason="needs the CUDA build")
def test_a_gpu_that_cannot_be_used_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    assert fastreplay.cuda_problem() == "Some GPU has compute capability 7.0; fastreplay needs 7.5"
    with pytest.raises(RuntimeError, match="there is no cuda:1"):
        SumTree(9, device="cuda:1")
    module = importlib.import_module("fastreplay._cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(module, "free_memory", lambda index: 1 << 30)
    monkeypatch.setattr(_device, "_self_checks", {0: ""})
    assert fastreplay.cuda_problem() == ""
    monkeypatch.setattr(_device, "_self_checks", {})
    monkeypatch.setattr(_self_check, "difference", lambda device: f"draws on {device}")
    problem = "fastreplay's self-check failed on Some GPU: draws on cuda:0 differ from the CPU's"
    assert fastreplay.cuda_problem().startswith(problem)

    def too_old(index):
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(module, "free_memory", too_old)
    with pytest.raises(RuntimeError, match=r"insufficient.*newer driver"):
        FrameReplay(9, (2, 2), device="cuda")


# ------------------------------------------------------------------------------ streams and graphs


def frames_of(rng, num_envs=2, shape=(84, 84)):
    return rng.integers(0, 256, (num_envs, *shape), dtype=np.uint8)


def test_staging_waits_until_torch_has_zeroed_its_memory(cuda):
    cuda.slowly()
    tree = SumTree(1000, device="cuda")
    tree.set(np.arange(1000), np.ones(1000))
    assert tree.total() == 1000 << 20
    replay = FrameReplay(20, (2, 2), 2, device="cuda")
    rng, rows = np.random.default_rng(0), []
    games = Games(2, rng)
    for _ in range(4):
        rows.append(frames_of(rng, shape=(2, 2)))
        replay.add(rows[-1], *games.step()[1:])
    frames = replay.state_dict()["frames"]
    assert all(np.array_equal(frames[g][t], rows[t][g]) for g in range(2) for t in range(4))


@pytest.mark.parametrize("prioritized", [False, True])
def test_each_launch_of_a_graph_continues_the_draws_and_equals_eager_calls(cuda, prioritized):
    shape = (4, 8)
    cpu, replay = pair(600, shape, steps=200, prioritized=prioritized)
    out, errors = replay._empty_batch(32), torch.zeros(32, device="cuda")
    rng = np.random.default_rng(4)

    def learn():
        replay.sample(32, out=out)
        if prioritized:
            replay.update_priorities(out.indices, errors)

    launch = cuda.captured(learn)
    batch = cpu.sample(32)  # the run before the capture
    if prioritized:
        cpu.update_priorities(batch.indices, torch.zeros(32))
    seen = set()
    for step in range(10):
        cpu.per_beta = replay.per_beta = step / 10
        new = torch.from_numpy(rng.random(32).astype(np.float32))
        errors.copy_(new)
        launch()
        batch = cpu.sample(32)
        if prioritized:
            cpu.update_priorities(batch.indices, new)
        assert equal(batch, out)
        seen.add(tuple(out.indices.tolist()))
    assert len(seen) == 10
    assert equal_states(cpu.state_dict(), replay.state_dict())


def test_a_captured_add_moves_the_write_head(cuda):
    cpu, replay = pair(40, steps=0, prioritized=True)
    games = Games(2, np.random.default_rng(0))
    row = [torch.zeros_like(t).cuda() for t in tensors(games.step(), "cpu")]
    launch = cuda.captured(lambda: replay.add(*row))
    cpu.add(*(column.cpu() for column in row))
    for _ in range(60):
        step = games.step()
        for column, new in zip(row, step):
            column.copy_(torch.as_tensor(new))
        launch()
        cpu.add(*step)
        assert len(replay) == len(cpu)
    assert equal_states(cpu.state_dict(), replay.state_dict())


def test_what_cannot_be_captured_is_refused(cuda):
    _, replay = pair(40, steps=10, prioritized=True)
    row = Games(2, np.random.default_rng(0)).step()
    tree = SumTree(10, device="cuda")
    before = replay.state_dict()
    calls = [
        lambda: replay.add(*row),
        lambda: replay.update_priorities(np.arange(2), np.ones(2)),
        lambda: replay.gather(np.arange(2)),
        lambda: tree.find(np.arange(2)),
        lambda: replay.check(),
        lambda: tree.total(),
    ]
    refused = []

    def work():
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                refused.append("graph" in str(error))
        replay.draw(1)  # so that the graph is not empty

    cuda.captured(work, warm=lambda: replay.draw(1))
    assert refused == [True] * len(calls)
    assert equal_states(before | {"calls": 1}, replay.state_dict())


def test_a_capture_does_not_affect_other_replays(cuda):
    """One replay gets data from the CPU, and waits, while another one is captured in a graph."""
    cpu, replay = pair(60, steps=20)
    _, other = pair(60, steps=20)
    games, side = Games(2, np.random.default_rng(1)), cuda.stream()

    def work():
        other.draw(8)
        with cuda.on(side):
            for _ in range(9):
                row = games.step()
                replay.add(*row)
                cpu.add(*row)
            replay.check()

    cuda.captured(work)
    assert equal_states(cpu.state_dict(), replay.state_dict())


def test_nothing_allocates_or_waits(cuda):
    _, replay = pair(600, (4, 8), steps=50, prioritized=True)
    out, errors = replay._empty_batch(256), torch.rand(256, device="cuda")
    rng = np.random.default_rng(0)
    row = (frames_of(rng, shape=(4, 8)), *Games(2, rng).step()[1:])
    row_on_gpu = tensors(row, "cuda")

    def everything():
        replay.add(*row)
        replay.add(*row_on_gpu)
        replay.sample(256, out=out)
        replay.update_priorities(out.indices, errors)
        replay.update_priorities(np.arange(10), np.ones(10))
        assert len(replay) > 0

    everything()  # kernels are loaded when they are first used
    replay.check()
    quiet = cuda.quietly()
    for _ in range(3):
        everything()
    assert quiet()
    replay.check()


def test_streams_used_in_any_order(cuda):
    """Each call is delayed on its own stream; the next call, on another stream, sees its effect."""
    cpu, replay = pair(60, (4, 8), steps=20, prioritized=True)
    streams = [cuda.stream() for _ in range(3)] + [None]
    games, rng = Games(2, np.random.default_rng(5)), np.random.default_rng(5)
    steps = []
    for step in range(40):
        row = (frames_of(rng, shape=(4, 8)), *games.step()[1:])
        errors = torch.from_numpy(rng.random(32).astype(np.float32))
        steps.append((row, tensors(row, "cuda") if step % 2 else row, errors, errors.cuda()))
    replay.check()
    compared = []
    for row, row_on_gpu, errors, errors_on_gpu in steps:
        with cuda.on(streams[rng.integers(4)]):
            cuda.slowly()
            replay.add(*row_on_gpu)
        with cuda.on(streams[rng.integers(4)]):
            cuda.slowly()
            batch = replay.sample(32)
        with cuda.on(streams[rng.integers(4)]):
            cuda.slowly()
            replay.update_priorities(batch.indices, errors_on_gpu)
        cpu.add(*row)
        expected = cpu.sample(32)
        cpu.update_priorities(expected.indices, errors)
        compared.append((expected, batch))
    replay.check()
    assert all(equal(expected, batch) for expected, batch in compared)
    assert equal_states(cpu.state_dict(), replay.state_dict())


def test_launches_of_graphs_and_other_calls_on_any_streams(cuda):
    """The learner is a graph, and in half of the steps the actor, too. The caller does not
    synchronise streams."""
    cpu, replay = pair(60, (4, 8), steps=40, prioritized=True, n_step=2)
    streams = [cuda.stream() for _ in range(3)] + [None]
    out = replay._empty_batch(32)

    def learn():
        replay.sample(32, out=out)
        replay.update_priorities(out.indices, out.rewards)

    def learn_on_the_cpu():
        batch = cpu.sample(32)
        cpu.update_priorities(batch.indices, batch.rewards)

    games, rng = Games(2, np.random.default_rng(5)), np.random.default_rng(5)
    row = (frames_of(rng, shape=(4, 8)), *games.step()[1:])
    row_on_gpu = tensors(row, "cuda")
    graphs = [cuda.captured(learn), cuda.captured(lambda: replay.add(*row_on_gpu))]
    learn_on_the_cpu(), cpu.add(*row)  # the runs before the captures
    for step in range(40):
        with cuda.on(streams[rng.integers(4)]):
            cuda.slowly()
            graphs[0]()
        learn_on_the_cpu()
        with cuda.on(streams[rng.integers(4)]):
            cuda.slowly()
            if step % 2:
                graphs[1]()
                cpu.add(*row)
            else:
                other = (frames_of(rng, shape=(4, 8)), *games.step()[1:])
                replay.add(*other)
                cpu.add(*other)
    assert equal_states(cpu.state_dict(), replay.state_dict())
    assert equal(cpu.sample(32), replay.sample(32))


def test_calls_of_one_graph_on_two_streams_are_refused(cuda):
    _, replay = pair(60, steps=40)
    side, refused = cuda.stream(), []
    first = torch.empty(1, device="cuda")

    def work():
        replay.draw(1)
        main = torch.cuda.current_stream() if isinstance(cuda, RealCuda) else None
        cuda.fork(side)
        with cuda.on(side):
            try:
                replay.draw(1)
            except RuntimeError as error:
                refused.append(str(error))
            if main is not None:
                first.zero_()
        if main is not None:
            main.wait_stream(side)

    cuda.captured(work, warm=lambda: replay.draw(1))
    assert refused == ["the calls of one replay in one CUDA graph must be captured on one stream"]
    replay.sample(8)


def test_many_adds_behind_a_slow_learner_overwrite_no_slot(cuda):
    cpu, replay = pair(200, (4, 8), steps=20)
    games, rng = Games(2, np.random.default_rng(5)), np.random.default_rng(5)
    cuda.slowly()
    for _ in range(30):
        row = (frames_of(rng, shape=(4, 8)), *games.step()[1:])
        replay.add(*row)
        cpu.add(*row)
        row[0][:] = 0  # after add() the caller may change its memory
    assert equal_states(cpu.state_dict(), replay.state_dict())


def test_a_replay_may_be_deleted_before_its_work_is_done(cuda):
    for options in ({}, {"storage": "host"}, {"prioritized": True}):
        _, replay = pair(200, (4, 8), steps=20, **options)
        rng = np.random.default_rng(0)
        replay.sample(1)  # the first call waits to check that a row is drawable
        cuda.slowly()
        for _ in range(6):
            replay.add(frames_of(rng, shape=(4, 8)), *Games(2, rng).step()[1:])
        batch = replay.sample(32)
        del replay
        assert batch.obs.cpu().any()


def test_the_script_for_compute_sanitizer_runs(cuda, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ALGOS.parent / "benchmarks")
    importlib.import_module("gpu_check").main(batch_sizes=(1, 5), reference_batch_sizes=(1,))
    assert "every kernel has run" in capsys.readouterr().out


def test_runs_are_bit_identical(cuda):
    def run():
        _, replay = pair(600, (4, 8), steps=100, prioritized=True)
        rng = np.random.default_rng(3)
        for _ in range(20):
            batch = replay.sample(512)
            errors = torch.from_numpy(rng.random(512)).cuda()
            replay.update_priorities(batch.indices, errors)  # many duplicates
        return replay.state_dict(), batch

    (state, batch), (other_state, other_batch) = run(), run()
    assert equal_states(state, other_state) and equal(batch, other_batch)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["device", "tiles"])
def test_threads_that_use_one_replay(storage):
    """One thread adds on a separate stream while another samples and waits."""
    _, replay = pair(2000, (84, 84), steps=20, prioritized=True, storage=storage)
    rng, stream, stop = np.random.default_rng(0), torch.cuda.Stream(), threading.Event()
    rows = [(frames_of(rng), *Games(2, rng).step()[1:]) for _ in range(50)]

    def act():
        added = 0
        with torch.cuda.stream(stream):
            while not stop.is_set():
                replay.add(*rows[added % 50])
                added += 1
        return added

    with ThreadPoolExecutor() as pool:
        actor = pool.submit(act)
        try:
            for _ in range(300):
                batch = replay.sample(64)
                replay.update_priorities(batch.indices, batch.rewards)
                replay.check()
        finally:
            stop.set()
        added = actor.result()
    torch.cuda.synchronize()
    assert added > 0 and replay._ring.head == (20 + added) % replay.rows
    assert replay._ring.calls == 300
    replay._tree.check_valid()


@pytest.mark.gpu
@one_gpu
def test_several_gpus_in_one_process():
    replays = [FrameReplay(60, (2, 2), 2, device=f"cuda:{i}") for i in range(2)]
    cpu = FrameReplay(60, (2, 2), 2)
    games = Games(2, np.random.default_rng(0))
    for _ in range(50):
        row = games.step()
        for replay in (cpu, *replays):
            replay.add(*row)
    expected = cpu.sample(32)
    for i, replay in enumerate(replays):
        batch = replay.sample(32)
        assert batch.obs.device == torch.device("cuda", i) and equal(expected, batch)
    with pytest.raises(ValueError, match="cuda:0"):
        replays[0].gather(torch.tensor([1], device="cuda:1"))
    assert torch.cuda.current_device() == 0
