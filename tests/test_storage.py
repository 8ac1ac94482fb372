"""benchmarks/storage.py: frame stores on real games."""

import json
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import load
from test_benchmarks import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
storage = pytest.importorskip("storage")


def module_of(codec):
    return {"lz4": "lz4.block", "zstd": "zstandard", "snappy": "snappy"}[codec]


def random_rows(rng):
    """Nine rows of frames of three grey levels a line, which compress well."""
    return rng.integers(256, size=(9, storage.NUM_ENVS, 84, 3), dtype=np.uint8).repeat(28, 3)


@pytest.mark.parametrize("stack", [False, True], ids=["frame", "stack"])
@pytest.mark.parametrize("codec", ["lz4", "zstd", "snappy"])
def test_compressors_give_the_frames_back(codec, stack):
    """obs and next_obs of a transition overlap in three frames; its place is any."""
    pytest.importorskip(module_of(codec))
    store, rng = storage.Compressed(codec, stack), np.random.default_rng(0)
    frames = random_rows(rng)
    for row in frames:
        store.add(row, np.zeros(storage.NUM_ENVS, bool))
    stacks = {frames[t : t + 5, env].tobytes() for t in range(5) for env in range(storage.NUM_ENVS)}
    seen = set()
    for obs, next_obs in zip(*store.sample(200, rng)):
        assert obs.shape == (4, 84, 84) and (obs[1:] == next_obs[:-1]).all()
        seen.add(np.concatenate([obs, next_obs[-1:]]).tobytes())
    assert seen == stacks
    assert 84 * 3 < store.bytes_per_frame() < 84 * 84 * (5 if stack else 1) / 2


def test_dopamine_gives_the_frames_of_one_game_back():
    """Its first transition of an episode has the first frame, after three of zeros."""
    pytest.importorskip("dopamine.jax.replay_memory.replay_buffer")
    store, rng = storage.Dopamine(100), np.random.default_rng(0)
    frames = random_rows(rng)
    for t, row in enumerate(frames):
        store.add(row, np.full(storage.NUM_ENVS, t in (0, 6)))
    game = frames[:, 0]
    stacks = set()
    for t in (0, 1, 2, 3, 4, 6):  # the frame after 5 opens an episode, and the last one waits
        begin = 6 if t == 6 else 0
        stack = np.zeros((5, 84, 84), np.uint8)
        newest = game[max(begin, t - 3) : t + 2]
        stack[5 - len(newest) :] = newest
        stacks.add(stack.tobytes())
    seen = set()
    for obs, next_obs in zip(*store.sample(200, rng)):
        assert (obs[..., 1:] == next_obs[..., :-1]).all()
        whole = np.concatenate([obs, next_obs[..., -1:]], axis=2)
        seen.add(np.moveaxis(whole, 2, 0).tobytes())
    assert stacks <= seen
    assert 84 * 3 < store.bytes_per_frame() < 84 * 84 * 8 / 2


@pytest.mark.parametrize("how", ["random", "sticky"])
def test_how_games_are_played(how, monkeypatch):
    """Sticky actions are kept nine times in ten. Frames are those of the environments."""
    script, actions = load("dqn_atari"), []
    monkeypatch.setattr(storage, "load", lambda name: script)
    step = script.Games.step
    monkeypatch.setattr(script.Games, "step", lambda self, a: (actions.append(a), step(self, a))[1])
    rows = [*storage.play("Pong", how, 300)]
    kept = np.mean(np.diff(actions, axis=0) == 0)
    assert abs(kept - (1 / 6 if how == "random" else 0.9 + 0.1 / 6)) < 0.04
    assert rows[0][0].shape == (storage.NUM_ENVS, 84, 84) and rows[0][1].all()
    assert not any(starts.any() for _, starts in rows[1:200])
    assert len({frames.tobytes() for frames, _ in rows}) > 100


def test_a_checkpoint_plays_its_own_game(tmp_path):
    script = load("dqn_atari")
    args = script.RunArgs(env_id="PongNoFrameskip-v4")
    network = script.QNetwork(6)
    saved = {"script": "dqn_atari", "args": vars(args), "q_network": network.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert len([*storage.play("Pong", tmp_path / "checkpoint.pt", 3)]) == 3
    with pytest.raises(SystemExit, match="plays PongNoFrameskip-v4, not BreakoutNoFrameskip-v4"):
        next(storage.play("Breakout", tmp_path / "checkpoint.pt", 3))


def test_a_record(tmp_path, monkeypatch, capsys):
    """Two short rows; the page has their numbers, and tiles take less than plain frames."""
    pytest.importorskip("fastreplay")
    args = Namespace(frames=4_000, peer_frames=1_000, codecs=[], growth=2_000, turns=3)
    rows = []
    for game in ("Pong", "Breakout"):
        parts = {name: part(game, "sticky", args) for name, part in storage.PARTS.items()}
        rows.append((game, "sticky", json.loads(json.dumps(parts))))
    stores = rows[0][2]["turns"]["stores"]
    assert stores["tiles"]["bytes"] < stores["plain"]["bytes"] == pytest.approx(7_065, abs=2)
    assert set(stores["tiles"]) == {"bytes", "adds"} | {
        f"{output} {n}" for output in ("float32", "uint8") for n in (32, 256)
    }
    assert all(len(stores["tiles"][f"uint8 {n}"]) == 3 for n in (32, 256))
    (point,) = rows[0][2]["growth"]["growth"]
    assert point["frames"] == 2_000 and point["add us"][0] <= point["add us"][2]
    grew = point["allocating add us"]  # a segment of tiles, and two of chunks
    assert len(grew) == 3
    assert all(0 < cpu <= point["add us"][2] + 1e-6 and clock > 0 for cpu, clock in grew)
    near, elsewhere = point["near growth"]["adds"], point["elsewhere"]["adds"]
    assert 100 < near < 200 and near + elsewhere == 250
    page = storage.report_of(rows, args)
    assert page.count("| median of 2 | sticky |") == 3 and page.count("| at most 1.00 |") == 2
    assert (
        f"| Pong | sticky | {stores['plain']['bytes']:,.0f} | {stores['tiles']['bytes']:,.0f} |"
        in page
    )
    assert "| Breakout | sticky | 2,000 |" in page
    stores["tiles"]["uint8 32"] = [2.0, 3.0, 8.0]
    stores["plain"]["uint8 32"] = [4.0, 2.0, 8.0]
    assert storage.ratio(stores, "uint8 32") == storage.ratio_of_fastest(stores, "uint8 32") == 1
    plays = "sticky", "random", "trained"  # no medians of one game
    found = [("Pong", how, stores) for how in (*plays, *plays[:2])]
    for time_of, ratio_of, cell in (
        (storage.median, storage.ratio, "4000000, 3000000, 1.00"),
        (min, storage.ratio_of_fastest, "2000000, 2000000, 1.00"),
    ):
        table = storage.samples_table(found, time_of, ratio_of)
        assert table[2].split(" | ")[4] == cell
        assert [row.split(" | ")[:2] for row in table[7:]] == [
            [f"| {name}", how]
            for how in ("sticky", "random")
            for name in ("median of 2", "at most 1.00")
        ]
        assert all("| 2 of 2 |" in row for row in table[8::2])
    pytest.importorskip("matplotlib")
    assert len(storage.figure_of(rows).axes[0].patches) == 2
    # --frames 0: growth alone
    args.frames = 0
    rows = [(game, how, {"growth": parts["growth"]}) for game, how, parts in rows]
    page = storage.report_of(rows, args)
    assert "sample(32)" not in page and "| Breakout | sticky | 2,000 |" in page
    assert storage.summary_of(rows[0][2]) == f"{point['bytes']:.0f} bytes"
    assert len(storage.figure_of(rows).axes[0].patches) == 2


class Growing:
    """A store that allocates in its adds 51 and 120, and waits 50 ms in some adds."""

    def __init__(self, waits):
        self.waits, self.added = waits, 0

    def add(self, *row):
        self.added += 1
        if self.added in self.waits:
            time.sleep(0.05)

    @property
    def nbytes(self):
        return 2**21 * ((self.added >= 51) + (self.added >= 120))


@pytest.mark.parametrize("waits, near, elsewhere", [((51, 219), 2, 0), ((50, 220), 0, 2)])
def test_adds_near_growth_are_counted_by_the_clock(monkeypatch, waits, near, elsewhere):
    rows = [(np.zeros((storage.NUM_ENVS, 84, 84), np.uint8), np.zeros(storage.NUM_ENVS, bool))]
    monkeypatch.setattr(storage, "fast_replay", lambda *_: Growing(waits))
    monkeypatch.setattr(storage, "play", lambda game, how, steps: rows * steps)
    found = storage.measure_growth("Pong", "sticky", Namespace(growth=250 * storage.NUM_ENVS))
    (point,) = found["growth"]
    assert [point[x]["adds"] for x in ("near growth", "elsewhere")] == [169, 81]
    for key, count in (("near growth", near), ("elsewhere", elsewhere)):
        assert sum(us > 50_000 for us in point[key]["over 1 ms"]) == count
    cpu, clock = np.transpose(point["allocating add us"])
    assert len(cpu) == 2 and (cpu < 1_000).all() and (clock[0] > 50_000) == (51 in waits)
    row = storage.growth_table([("Pong", "sticky", {"growth": found})])[2]
    assert row.endswith(
        f"| {len(point['near growth']['over 1 ms'])} of 169 "
        f"| {len(point['elsewhere']['over 1 ms'])} of 81 |"
    )


def test_different_batches_are_an_error():
    """The comparison in turns: a store with another seed draws other rows."""
    pytest.importorskip("fastreplay")
    options = {"num_envs": storage.NUM_ENVS, "threads": 1}
    from fastreplay import FrameReplay

    replays = [FrameReplay(800, (84, 84), seed=seed, **options) for seed in (1, 2)]
    rng = np.random.default_rng(0)
    for _ in range(100):
        frames = rng.integers(256, size=(storage.NUM_ENVS, 84, 84), dtype=np.uint8)
        for replay in replays:
            storage.add(replay, [(frames, np.zeros(storage.NUM_ENVS, bool))])
    with pytest.raises(RuntimeError, match="differs from the plain one"):
        storage.sample_in_turns(*replays, Namespace(turns=1))
