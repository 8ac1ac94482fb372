"""FrameReplay(storage="tiles") beside plain frames, bit for bit, and the bound on its memory.

test_frame_replay.py runs all its tests on tiles, too, and test_kernels.py compares the kernels for
tiles on a GPU. tile_store_test.cpp, which this file compiles
and runs, tests the C++ class alone, also with a hash of 3 bits.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CUDA
from emulated import RealCuda
from test_frame_replay import Games, saved_and_loaded

fastreplay = pytest.importorskip("fastreplay")
if not fastreplay.backends():
    pytest.skip("fastreplay is not compiled", allow_module_level=True)

from fastreplay import FrameReplay  # noqa: E402

ROOT = Path(__file__).parent.parent


def noise(rng, n, shape):
    while True:
        yield rng.integers(0, 256, (n, *shape), dtype=np.uint8)


def constant(rng, n, shape):
    while True:
        yield np.full((n, *shape), 7, np.uint8)


def moving_dot(rng, n, shape):
    frames = np.zeros((n, *shape), np.uint8)
    flat = frames.reshape(n, -1)
    while True:
        flat[np.arange(n), rng.integers(0, flat.shape[1], n)] ^= 3
        yield frames


def fade(rng, n, shape):
    frames = next(noise(rng, n, shape))
    while True:
        frames = frames + np.uint8(1)
        yield frames


def flashes(rng, n, shape):
    """A new scene, then black and white in turns."""
    while True:
        yield next(noise(rng, n, shape))
        for _ in range(rng.integers(2, 40)):
            yield np.full((n, *shape), rng.choice([0, 255]), np.uint8)


def scroll(rng, n, shape):
    frames = next(noise(rng, n, shape))
    while True:
        frames = np.roll(frames, 1, axis=1)
        yield frames


def mixed(rng, n, shape):
    sources = [source(rng, n, shape) for source in SOURCES[:-1]]
    while True:
        source = rng.choice(len(sources))
        for _ in range(rng.integers(1, 60)):
            yield next(sources[source])


SOURCES = [noise, constant, moving_dot, fade, flashes, scroll, mixed]


def rows_of(source, shape, num_envs, seed=0):
    """Arguments of add() without end."""
    rng = np.random.default_rng(seed)
    games, frames = Games(num_envs, rng, ends=0.05), source(rng, num_envs, shape)
    while True:
        yield (next(frames), *games.step()[1:])


def pair(capacity, shape, **options):
    """The same replay with plain frames and with tiles."""
    return [
        FrameReplay(capacity, shape, **options, storage=storage) for storage in ("auto", "tiles")
    ]


def assert_equal(plain, tiles, n=16):
    """Equal draws and batches; each tile is counted correctly."""
    assert all(map(torch.equal, plain.sample(n), tiles.sample(n)))
    tiles._ring.check_tiles()


SHAPES = [(84, 84), (1, 1), (4,), (2, 2), (7, 9), (9, 8), (17, 33), (64, 64), (3, 20, 20), (96, 1)]
SHAPES += [(6, 183)]  # 16 bytes from the last tile but one pass the end of the row
OPTIONS = [
    {},
    {"n_step": 3, "memory_format": torch.channels_last, "output_dtype": torch.float32},
    {"prioritized": True, "output_dtype": torch.bfloat16, "stack": 2},
    {"stack": None, "num_envs": 1},
    {"n_step": 5, "output_dtype": torch.float16, "num_envs": 33, "threads": 2},
    {"memory_format": torch.channels_last, "stack": 8, "threads": 3},
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_give_the_batches_of_plain_frames(source, shape):
    """Each source and shape, with options in turn: growing, full and overwritten."""
    options = OPTIONS[(SHAPES.index(shape) + SOURCES.index(source)) % len(OPTIONS)]
    if len(shape) != 2:
        options = options | {"memory_format": torch.contiguous_format}
    options = {"num_envs": 3, "seed": 4} | options
    n = options["num_envs"]
    replays = pair(70 * n, shape, **options)
    for step, row in zip(range(240), rows_of(source, shape, n)):
        for replay in replays:
            replay.add(*row)
        if step > 5 and step % 9 == 0:
            assert_equal(*replays)
    plain, tiles = replays
    rows = torch.arange(70 * n)
    drawable = rows[plain.drawable(rows)]
    assert torch.equal(drawable, rows[tiles.drawable(rows)]) and len(drawable) > 30 * n
    assert all(map(torch.equal, plain.gather(drawable), tiles.gather(drawable)))


@pytest.mark.parametrize("shape", [(84, 84), (256, 256), (210, 160), (250, 7), (512, 512)])
def test_large_frames_in_tiles(shape):
    plain, tiles = replays = pair(90, shape)
    for step, row in zip(range(150), rows_of(mixed, shape, 1)):
        for replay in replays:
            replay.add(*row)
        if step > 5 and step % 15 == 0:
            assert_equal(plain, tiles, n=3)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("steps", [0, 1, 20, 31, 32, 100, 333])
def test_a_state_of_tiles_continues(source, steps):
    options = {"num_envs": 3, "prioritized": True, "seed": 2}
    plain, tiles = pair(300, (20, 28), **options)
    rows = rows_of(source, (20, 28), 3)
    for _, row in zip(range(steps), rows):
        plain.add(*row)
        tiles.add(*row)
    twin = FrameReplay(300, (20, 28), **options, storage="tiles")
    for _, row in zip(range(50), rows_of(mixed, (20, 28), 3, seed=9)):
        twin.add(*row)
    twin.load_state_dict(saved_and_loaded(tiles.state_dict()))
    twin._ring.check_tiles()
    assert twin._ring.tile_counts()[:2] == tiles._ring.tile_counts()[:2]
    for step, row in zip(range(150), rows):
        for replay in (plain, tiles, twin):
            replay.add(*row)
        if step % 10 == 5:
            batch = plain.sample(16)
            for replay in (tiles, twin):
                assert all(map(torch.equal, batch, replay.sample(16)))
                replay._ring.check_tiles()
            tiles.load_state_dict(tiles.state_dict())


def filled_with(source, steps, capacity=300, shape=(84, 84), num_envs=2):
    replay = FrameReplay(capacity, shape, num_envs=num_envs, storage="tiles")
    for _, row in zip(range(steps), rows_of(source, shape, num_envs)):
        replay.add(*row)
    return replay


def test_an_emptied_ring_holds_no_tile():
    replay = filled_with(moving_dot, 100)
    assert replay._ring.tile_counts()[1] > 30
    replay.load_state_dict(FrameReplay(300, (84, 84), num_envs=2, storage="tiles").state_dict())
    assert replay._ring.tile_counts()[:2] == (0, 0) and len(replay) == 0


def test_tiles_of_overwritten_frames_are_freed():
    replay = filled_with(flashes, 300)
    many = replay._ring.tile_counts()[1]
    for _, row in zip(range(300), rows_of(constant, (84, 84), 2)):
        replay.add(*row)
    assert many > 500 and replay._ring.tile_counts()[1] == 1


@pytest.mark.parametrize("source", SOURCES)
def test_memory_is_bounded_whatever_the_frames(source):
    """The stated bound: 1.4 times plain frames, 64 frames a game, and segments not full."""
    replay = filled_with(source, 1500, capacity=2000)
    plain = 2000 * 7056
    assert replay.nbytes <= 1.4 * plain + 2 * 64 * 7056 + 6.5 * 2**20
    replay._ring.check_tiles()


def test_repeating_frames_take_a_thirtieth():
    replay = filled_with(moving_dot, 10_000, capacity=20_000)
    assert replay.nbytes - 6.5 * 2**20 < 20_000 * 7056 / 30


def run_code(code):
    """Runs Python code that imports this file."""
    paths = [str(Path(fastreplay.__file__).parent.parent), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is Linux's")
def test_add_changes_nothing_when_memory_runs_out():
    code = """if True:
        import resource
        import torch
        from pathlib import Path
        from test_tiles import assert_equal, noise, pair, rows_of

        torch.set_num_threads(1)
        plain, tiles = pair(20_000, (84, 84), num_envs=2, threads=1)
        rows = rows_of(noise, (84, 84), 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 30_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        for row in rows:
            try:
                tiles.add(*row)
            except MemoryError:
                break
            plain.add(*row)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        assert 500 < len(plain) == len(tiles) < 20_000
        for _ in range(100):
            assert_equal(plain, tiles)
            for replay in (plain, tiles):
                replay.add(*row)
    """
    run = run_code(code)
    assert run.returncode == 0, run.stderr.decode()


def test_tiles_take_memory_only_for_rows_that_are_stored():
    replay = FrameReplay(1_000_000, (84, 84), num_envs=8, storage="tiles")
    assert replay.nbytes < 1_000_000 * (9 + 2) + 5_000_000


def state_of(replay, **changes):
    return replay.state_dict() | changes


DAMAGES = [
    ({"added": 99}, "rows stored of 99"),
    ({"added": None}, "added must be"),
    ({"tiles": torch.zeros(3, 27, dtype=torch.uint8)}, "tiles must be"),
    ({"tiles": torch.zeros(3, 28)}, "tiles must be"),
    ({"tiles": torch.zeros(1, 28, dtype=torch.uint8)}, "a tile that is missing"),
    ({"tiles": torch.zeros(2**15, 28, dtype=torch.uint8)}, "too many tiles"),
    ({"tiles": None}, "tiles must be"),
    ({"chunks": 5}, "chunks must be of 2 games"),
    ({"chunks": [torch.zeros(9, dtype=torch.uint8)] * 2}, "cut off"),
    ({"chunks": [torch.zeros(9)] * 2}, "chunks must be"),
    ({"chunk_sizes": [torch.zeros(0, dtype=torch.int64)] * 2}, "is missing"),
    ({"chunk_sizes": [torch.full((3,), 10**9)] * 2}, "is missing|cut off"),
    ({"chunk_sizes": [None, None]}, "chunk_sizes must be"),
]


@pytest.mark.parametrize("changes, words", DAMAGES)
def test_a_damaged_state_of_tiles_changes_nothing(changes, words):
    replay, twin = (filled_with(moving_dot, 70, shape=(20, 28)) for _ in range(2))
    other = filled_with(mixed, 70, shape=(20, 28))
    with pytest.raises(ValueError, match=words):
        replay.load_state_dict(state_of(other, **changes))
    assert_equal(twin, replay)
    for name in ("added", "tiles", "chunk_sizes", "chunks"):
        state = other.state_dict()
        del state[name]
        with pytest.raises(ValueError, match=name):
            replay.load_state_dict(state)


def test_random_damage_is_refused_or_harmless():
    """Cut and changed bytes: the state is refused, or what is loaded can be used."""
    rng = np.random.default_rng(0)
    good = filled_with(moving_dot, 90, shape=(20, 28)).state_dict()
    refused = 0
    for _ in range(300):
        replay = FrameReplay(300, (20, 28), num_envs=2, storage="tiles")
        state = good | {"chunks": [x.clone() for x in good["chunks"]]}
        game = state["chunks"][rng.integers(2)]
        if rng.random() < 0.3:
            cut = rng.integers(len(state["tiles"]))
            state["tiles"] = state["tiles"][:cut]
        else:
            at = rng.integers(0, len(game), rng.integers(1, 4))
            game[at] = torch.from_numpy(rng.integers(0, 256, len(at), dtype=np.uint8))
        try:
            replay.load_state_dict(state)
        except ValueError:
            refused += 1
            assert len(replay) == 0
            continue
        replay._ring.check_tiles()
        replay.sample(32)
        for _, row in zip(range(200), rows_of(moving_dot, (20, 28), 2)):
            replay.add(*row)
        replay._ring.check_tiles()
    assert 100 < refused < 300


def test_states_of_tiles_and_plain_frames_are_told_apart():
    plain, tiles = pair(40, (2, 2))
    with pytest.raises(ValueError, match="the state has plain frames, but the object has tiles"):
        tiles.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="the state has tiles, but the object has plain frames"):
        plain.load_state_dict(tiles.state_dict())


def test_frames_that_tiles_cannot_hold_are_refused():
    with pytest.raises(TypeError, match=r"storage='tiles' is for uint8 frames, not torch\.float32"):
        FrameReplay(40, (4,), frame_dtype=torch.float32, storage="tiles")
    with pytest.raises(ValueError, match=r"at most 262144 bytes, and those of .* have 263169"):
        FrameReplay(40, (513, 513), storage="tiles")
    with pytest.raises(ValueError, match="storage must be auto, device, host or tiles, not plain"):
        FrameReplay(40, (4,), storage="plain")


def test_the_storage_is_shown():
    replay = FrameReplay(40, (84, 84), storage="tiles")
    assert replay.storage == "tiles" and "frames in tiles" in repr(replay)


def test_frames_of_games_are_compact_and_exact():
    """Thousands of real frames, with resets, in a ring that is overwritten."""
    vector = pytest.importorskip("ale_py.vector_env")
    for name in ("pong", "enduro"):
        env = vector.AtariVectorEnv(name, num_envs=2, stack_num=1)
        obs, _ = env.reset(seed=1)
        plain, tiles = pair(1600, (84, 84), num_envs=2, threads=1)
        rng, starts, over = np.random.default_rng(0), np.ones(2, bool), np.zeros(2, bool)
        for step in range(2000):
            actions = rng.integers(0, env.single_action_space.n, 2)
            frames = obs[:, -1]
            obs, rewards, terminations, truncations, _ = env.step(actions)
            for replay in (plain, tiles):
                replay.add(frames, actions, rewards, terminations, starts)
            starts, over = over, terminations | truncations
            if step > 10 and step % 50 == 0:
                assert_equal(plain, tiles, n=32)
        env.close()
        data = sum(len(chunks) for chunks in tiles.state_dict()["chunks"])
        data += tiles.state_dict()["tiles"].numel()
        assert data < plain._frames.nbytes / (6 if name == "enduro" else 20)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's /proc")
def test_memory_grows_by_small_pages_that_may_become_huge():
    """The first touch of a huge page can take milliseconds, so no add may touch a new one."""
    code = """if True:
        import re
        import resource
        from pathlib import Path
        from test_tiles import FrameReplay, noise, rows_of

        def mappings():  # {address: (bytes, advised to be huge)}
            text = Path("/proc/self/smaps").read_text()
            found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$", text, re.M | re.S)
            return {a: (int(b, 16) - int(a, 16), " hg" in flags) for a, b, flags in found}

        def page_faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        rows = [row for _, row in zip(range(1000), rows_of(noise, (84, 84), 1))]
        before = sum(size for size, huge in mappings().values() if huge)
        replay, faults = FrameReplay(40_000, (84, 84), storage="tiles"), page_faults()
        for row in rows:
            replay.add(*row)
        faults = page_faults() - faults
        huge = sum(size for size, huge in mappings().values() if huge) - before
        segments = replay.nbytes // 2**21  # the rest is less than a segment
        assert segments > 2
        if huge == 0:
            raise SystemExit(77)
        assert huge >= segments * 2**21, (huge, segments)
        assert faults > 0.5 * 1000 * 84 * 84 / 4096, faults
    """
    run = run_code(code)
    if run.returncode == 77:
        pytest.skip("needs a kernel with huge pages")
    assert run.returncode == 0, run.stderr.decode()


@pytest.mark.parametrize("bits", [64, 3])
def test_random_operations_on_the_store(tmp_path, bits):
    """Millions of operations beside plain frames, and with 3 bits of hash: tiles always collide."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "tile_store_test"
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-pthread",
        f"-DFR_TILE_HASH_BITS={bits}",
        f"-I{ROOT / 'csrc'}",
    ]
    sources = [ROOT / "tests" / "tile_store_test.cpp", *(ROOT / "csrc" / "cpu").glob("tile_*.cpp")]
    sources += [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("huge_pages", "instructions")]
    flags = os.environ.get("CFLAGS", "").split()
    subprocess.run([*command, *flags, *sources, "-o", program], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    for seed in range(1 if flags else 3):  # slow with a sanitizer
        run = subprocess.run([program, str(seed), "120000"], env=environment, capture_output=True)
        assert run.stdout.decode() == "ok\n" and run.returncode == 0, run.stdout + run.stderr


# ------------------------------------------------------------------------------------- on a GPU


@pytest.fixture(params=CUDA)
def cuda(request):
    """The GPU's streams and graphs, or those of the emulation."""
    if request.param == "cuda-emulated":
        return request.getfixturevalue("emulation")
    return RealCuda()


def on_both(capacity, shape, **options):
    """The same replay with tiles on the CPU and on the GPU."""
    devices = ("cpu", "cuda")
    return [FrameReplay(capacity, shape, **options, storage="tiles", device=x) for x in devices]


def same(first, second):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


def same_states(first, second):
    assert first.keys() == second.keys()
    for name, mine in first.items():
        theirs = second[name]
        if torch.is_tensor(mine):
            mine, theirs = [mine], [theirs]
        if isinstance(mine, list) and mine and torch.is_tensor(mine[0]):
            assert same(mine, theirs), name
        else:
            assert mine == theirs, name
    return True


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 5000), (160, 210)])
def test_a_gpu_stores_and_samples_tiles_like_the_cpu(cuda, source, shape):
    """A row of 5000 bytes has 358 tiles: two windows of the kernel (csrc/cuda/tiles.cuh)."""
    options = OPTIONS[(len(shape) + sum(shape) + SOURCES.index(source)) % len(OPTIONS)]
    if len(shape) != 2:
        options = options | {"memory_format": torch.contiguous_format}
    options = {"num_envs": 3, "seed": 4} | options
    n = min(options["num_envs"], 5)
    cpu, gpu = on_both(50 * n, shape, **options | {"num_envs": n})
    for step, row in zip(range(120), rows_of(source, shape, n)):
        cpu.add(*row)
        gpu.add(*row)
        if step > 5 and step % 19 == 0:
            assert same(cpu.sample(5), gpu.sample(5))
    rows = torch.arange(50 * n)
    drawable = rows[cpu.drawable(rows)]
    assert len(drawable) > 20 * n
    some = drawable[:: max(1, len(drawable) // 20)].contiguous()
    assert same(cpu.gather(some), gpu.gather(some))
    same_states(cpu.state_dict(), gpu.state_dict())
    gpu._ring.check_tiles()


@pytest.mark.parametrize("batch_size", [1, 3, 300])
def test_any_number_of_blocks_shares_a_sample_of_tiles(cuda, batch_size):
    for options in ({"stack": 8}, {"n_step": 2, "memory_format": torch.channels_last}):
        cpu, gpu = on_both(200, (84, 84), num_envs=2, **options)
        for _, row in zip(range(90), rows_of(mixed, (84, 84), 2)):
            cpu.add(*row)
            gpu.add(*row)
        assert same(cpu.sample(batch_size), gpu.sample(batch_size))


@pytest.mark.parametrize("source", [moving_dot, mixed])
@pytest.mark.parametrize("steps", [0, 1, 31, 32, 100, 333])
def test_states_of_tiles_move_between_devices(cuda, source, steps):
    options = {"num_envs": 3, "prioritized": True, "seed": 2}
    cpu, gpu = on_both(300, (20, 28), **options)
    rows = rows_of(source, (20, 28), 3)
    for _, row in zip(range(steps), rows):
        cpu.add(*row)
        gpu.add(*row)
    others = on_both(300, (20, 28), **options)
    for _, row in zip(range(50), rows_of(mixed, (20, 28), 3, seed=9)):
        for other in others:
            other.add(*row)
    others[0].load_state_dict(saved_and_loaded(gpu.state_dict()))
    others[1].load_state_dict(saved_and_loaded(cpu.state_dict()))
    replays = [cpu, gpu, *others]
    for step, row in zip(range(130), rows):
        for replay in replays:
            replay.add(*row)
        if step % 10 == 5:
            batches = [replay.sample(16) for replay in replays]
            assert all(same(batches[0], batch) for batch in batches)
    states = [replay.state_dict() for replay in replays]
    assert all(same_states(states[0], state) for state in states[1:2])
    for replay in replays:
        replay._ring.check_tiles()


def test_more_tiles_than_a_segment_holds(cuda):
    """A quarter of each frame is new: about 100,000 tiles, in two segments of 65,536."""

    def quarters():
        rng = np.random.default_rng(0)
        frames = np.zeros((1, 84, 84), np.uint8)
        for row in rows_of(constant, (84, 84), 1):
            frames[:, :21] = rng.integers(0, 256, (1, 21, 84))
            yield frames, *row[1:]

    cpu, gpu = on_both(3000, (84, 84))
    for step, row in zip(range(1600), quarters()):
        cpu.add(*row)
        gpu.add(*row)
        if step % 200 == 199:
            assert same(cpu.sample(8), gpu.sample(8))
    assert gpu._ring.tile_counts()[1] > 70_000
    rows = torch.arange(0, 1590, 53)
    rows = rows[cpu.drawable(rows)]
    assert same(cpu.gather(rows), gpu.gather(rows))


def test_frames_on_the_gpu_are_coded_on_the_cpu(cuda):
    cpu, gpu = on_both(120, (20, 28), num_envs=2)
    for step, row in zip(range(100), rows_of(mixed, (20, 28), 2)):
        cpu.add(*row)
        columns = [torch.as_tensor(column).cuda() for column in row]
        strided = torch.stack([columns[0], columns[0] + 1], dim=1)  # of a larger observation
        columns[0] = strided[:, 0]
        if step % 3 == 1:
            columns[1:3] = row[1:3]
        if step % 3 == 2:
            columns[0] = row[0]
        gpu.add(*columns)
    assert same(cpu.sample(32), gpu.sample(32))
    same_states(cpu.state_dict(), gpu.state_dict())


def test_samples_of_tiles_in_flight_read_what_was_there(cuda):
    """Samples wait on slow streams while adds overwrite rows, and free and reuse their tiles."""
    options = {"num_envs": 3, "prioritized": True}
    cpu, gpu = on_both(120, (20, 28), **options)
    rows = rows_of(mixed, (20, 28), 3)
    for _, row in zip(range(60), rows):
        cpu.add(*row)
        gpu.add(*row)
    streams, rng = [cuda.stream() for _ in range(3)] + [None], np.random.default_rng(0)
    gpu.sample(1), cpu.sample(1)
    compared = []
    for _, row in zip(range(150), rows):
        with cuda.on(streams[rng.integers(4)]):
            cuda.slowly()
            batch = gpu.sample(8)
        with cuda.on(streams[rng.integers(4)]):
            gpu.add(*row)
        compared.append((cpu.sample(8), batch))
        cpu.add(*row)
        row[0][:] = 0  # after add() the caller may change its memory
    gpu.check()
    assert all(same(expected, batch) for expected, batch in compared)
    same_states(cpu.state_dict(), gpu.state_dict())


def test_a_graph_of_samples_sees_later_rows_and_states(cuda):
    cpu, gpu = on_both(120, (20, 28), num_envs=2)
    rows = rows_of(mixed, (20, 28), 2)
    for _, row in zip(range(50), rows):
        cpu.add(*row)
        gpu.add(*row)
    out = gpu._empty_batch(16)
    launch = cuda.captured(lambda: gpu.sample(16, out=out))
    cpu.sample(16)  # the run before the capture
    state = cpu.state_dict()
    for step, row in zip(range(60), rows):
        launch()
        assert same(cpu.sample(16), out)
        cpu.add(*row)
        gpu.add(*row)
        if step == 40:
            cpu.load_state_dict(state)
            gpu.load_state_dict(state)


def test_adds_of_tiles_are_not_captured(cuda):
    cpu, gpu = on_both(120, (20, 28))
    for _, row in zip(range(20), rows_of(mixed, (20, 28), 1)):
        cpu.add(*row)
        gpu.add(*row)
    refused = []

    def work():
        for each in (row, [torch.as_tensor(column) for column in row]):
            with pytest.raises(RuntimeError, match="tiles cannot be part of a CUDA graph"):
                gpu.add(*each)
            refused.append(True)
        gpu.draw(1)

    cuda.captured(work, warm=lambda: gpu.draw(1))
    assert refused == [True, True]
    cpu.draw(1)
    same_states(cpu.state_dict(), gpu.state_dict())


def test_samples_and_most_adds_of_tiles_do_not_allocate_or_wait(cuda):
    _, gpu = on_both(120, (84, 84), num_envs=2, prioritized=True)
    rows = rows_of(moving_dot, (84, 84), 2)
    for _, row in zip(range(70), rows):
        gpu.add(*row)
    out, errors = gpu._empty_batch(32), torch.rand(32).cuda()

    def everything():
        gpu.add(*next(rows))
        gpu.sample(32, out=out)
        gpu.update_priorities(out.indices, errors)

    everything()
    gpu.check()
    quiet = cuda.quietly()
    for _ in range(3):
        everything()
    assert quiet()
    gpu.check()


def test_a_replay_of_tiles_may_be_deleted_before_its_work_is_done(cuda):
    _, gpu = on_both(120, (20, 28), num_envs=2)
    rows = rows_of(mixed, (20, 28), 2)
    for _, row in zip(range(60), rows):
        gpu.add(*row)
    gpu.sample(1)
    cuda.slowly()
    for _, row in zip(range(6), rows):
        gpu.add(*row)
    batch = gpu.sample(32)
    del gpu
    assert batch.obs.cpu().any()


@pytest.mark.parametrize("source", SOURCES)
def test_memory_on_the_gpu_is_bounded(cuda, source):
    """The bound on the CPU, and the open chunk of each game, which has its largest size."""
    replay = FrameReplay(600, (84, 84), num_envs=2, storage="tiles", device="cuda")
    largest = 0
    for _, row in zip(range(900), rows_of(source, (84, 84), 2)):
        replay.add(*row)
        largest = max(largest, replay.nbytes)
    assert largest == replay.nbytes  # segments are kept
    assert largest <= 1.4 * 600 * 7056 + 2 * (64 + 33) * 7056 + 6.5 * 2**20
    replay._ring.check_tiles()


def test_an_add_without_memory_on_the_gpu_changes_nothing(emulation, monkeypatch):
    """Each row is first added while there is no memory."""
    cpu, gpu = on_both(3000, (84, 84), num_envs=2)
    refused = 0

    def no_room(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for _, row in zip(range(400), rows_of(noise, (84, 84), 2)):
        cpu.add(*row)
        with monkeypatch.context() as patch:
            patch.setattr(type(emulation), "on_device", no_room)
            try:
                gpu.add(*row)
                continue
            except torch.OutOfMemoryError:
                refused += 1
        gpu.add(*row)
    assert refused > 2
    assert same(cpu.sample(8), gpu.sample(8))
    same_states(cpu.state_dict(), gpu.state_dict())


def test_a_damaged_state_changes_nothing_on_the_gpu(cuda):
    cpu, gpu = on_both(120, (20, 28), num_envs=2)
    for _, row in zip(range(70), rows_of(mixed, (20, 28), 2)):
        cpu.add(*row)
        gpu.add(*row)
    other = filled_with(moving_dot, 50, capacity=120, shape=(20, 28))
    with pytest.raises(ValueError, match="a tile that is missing"):
        gpu.load_state_dict(state_of(other, tiles=torch.zeros(1, 28, dtype=torch.uint8)))
    assert same(cpu.sample(16), gpu.sample(16))
    same_states(cpu.state_dict(), gpu.state_dict())


def test_the_storage_on_a_gpu_is_shown(cuda):
    _, gpu = on_both(40, (84, 84))
    assert gpu.storage == "tiles" and "frames in tiles" in repr(gpu)
