"""How fastreplay and general compressors keep the frames of real games: memory, adds, samples.

    python benchmarks/storage.py --record benchmarks/records/2026-01-01_storage
    python benchmarks/storage.py --games Breakout Pong --play sticky --growth 1000000
    python benchmarks/storage.py --games Breakout --play runs/.../checkpoint.pt

For each game and each way to play, eight games run side by side and their frames go into

    plain              fastreplay, frames as they are
    tiles              fastreplay, storage="tiles"
    lz4, zstd, snappy  a Python list of compressed frames; `stack`: the five frames of a transition
                       compressed together
    dopamine           Dopamine's replay, which compresses obs and next_obs by snappy; the frames of
                       one of the games (`--codecs dopamine`, needs `pip install dopamine-rl`)

--play: `random` actions, `sticky` (an action is kept with probability 0.9), or a checkpoint of an
Atari file, with epsilon 0.01.

Plain and tiles get the same frames and sample in turns, in one process; the batches are compared.
Their adds are timed in a row: the frames of 250 steps are made first. The compressors hold the
first --peer-frames frames. --growth N adds up to N frames to tiles alone, in a process of its own:
bytes a frame on the way, resident memory, and adds between the steps of the games, which leave the
caches cold. `--frames 0 --growth N` does nothing else; of that only the times need a quiet machine.

A sample returns obs and next_obs of n transitions at random places: fastreplay's as the Atari files
get them (float32, channels last) and as uint8, the compressors' as uint8. All on one thread.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from buffers import resident_bytes, rounded
from figures import draw_bars, pyplot, save
from films import load, make_network
from machine import clean_commit, write_record
from train import table_row

GAMES = "Breakout Pong Seaquest MsPacman Qbert SpaceInvaders Enduro Asteroids BeamRider".split()
GAMES += ["MontezumaRevenge", "Freeway", "Asterix"]
NUM_ENVS = 8
SIZES = (32, 256)
FORMATS = {
    "float32": {"output_dtype": torch.float32, "memory_format": torch.channels_last},
    "uint8": {},
}
BLOCK = 250  # steps of frames that are added in a row
SEGMENT = 2**20  # bytes; the segments of tiles have more
NEAR = 100  # adds, the first of which allocates a segment
COLUMNS = 9  # bytes of a transition's action, reward and so on, part of nbytes
OBJECT = 33 + 8  # bytes of a Python bytes object besides its contents, and of the pointer to it


def play(game, how, steps, seed=0):
    """Yield (frames (NUM_ENVS, 84, 84) uint8, whether each opens an episode) of each step."""
    rng, env_id = np.random.default_rng(seed), f"{game}NoFrameskip-v4"
    trained = how not in ("random", "sticky")
    saved = torch.load(how, map_location="cpu", weights_only=True, mmap=True) if trained else {}
    script = load(saved.get("script", "dqn_atari"))
    args = script.RunArgs(**saved.get("args", {"env_id": env_id}))
    if args.env_id != env_id:
        sys.exit(f"error: {how} plays {args.env_id}, not {env_id}; choose it with --games.")
    envs = script.make_envs(env_id, NUM_ENVS, seed, num_threads=1)
    if trained:
        q_network = make_network(script, args, envs)
        q_network.load_state_dict(saved["q_network"])
        q_network.eval()
    obs, starts = envs.reset()
    actions = rng.integers(envs.n_actions, size=NUM_ENVS)
    for _ in range(steps):
        yield obs[:, -1], starts
        if trained:
            actions = script.act(q_network, obs, 0.01, rng, torch.device("cpu"))
        else:
            new = rng.random(NUM_ENVS) < (0.1 if how == "sticky" else 1)
            actions = np.where(new, rng.integers(envs.n_actions, size=NUM_ENVS), actions)
        obs, *_, infos = envs.step(actions)
        starts = infos["episode_starts"]


class Compressed:
    """Frames in a Python list of compressed pieces. `stack`: the five of a transition together."""

    def __init__(self, codec, stack):
        self.stack, self.pieces, self.recent = stack, [], []
        if codec == "lz4":
            import lz4.block

            self.compress, self.decompress = lz4.block.compress, lz4.block.decompress
        elif codec == "zstd":
            import zstandard

            self.compress = zstandard.ZstdCompressor(level=3).compress
            self.decompress = zstandard.ZstdDecompressor().decompress
        else:
            import snappy

            self.compress, self.decompress = snappy.compress, snappy.decompress

    def add(self, frames, starts):
        """`frames`: (NUM_ENVS, 84, 84) of one step; `starts`: whether each opens an episode."""
        if self.stack:
            self.recent = [*self.recent[-4:], frames.copy()]
            if len(self.recent) == 5:
                stacks = np.stack(self.recent, axis=1)
                self.pieces.append([self.compress(stack.tobytes()) for stack in stacks])
        else:
            self.pieces.append([self.compress(frame.tobytes()) for frame in frames])

    def sample(self, n, rng):
        """-> obs and next_obs, (n, 4, 84, 84) uint8 each, of transitions at random places"""
        frames = np.empty((n, 5, 84, 84), np.uint8)
        steps = rng.integers(len(self.pieces) - (0 if self.stack else 4), size=n)
        for i, (t, env) in enumerate(zip(steps, rng.integers(NUM_ENVS, size=n))):
            if self.stack:
                frames[i] = self.pixels(self.pieces[t][env]).reshape(5, 84, 84)
            else:
                for k in range(5):
                    frames[i, k] = self.pixels(self.pieces[t + k][env]).reshape(84, 84)
        return np.ascontiguousarray(frames[:, :4]), np.ascontiguousarray(frames[:, 1:])

    def pixels(self, piece):
        return np.frombuffer(self.decompress(piece), np.uint8)

    def bytes_per_frame(self):
        sizes = [len(piece) + OBJECT for row in self.pieces for piece in row]
        return sum(sizes) / len(sizes)


class Dopamine:
    """The frames of the first game in Dopamine's replay."""

    def __init__(self, capacity):
        from buffer_peers import Dopamine
        from dopamine.jax.replay_memory.elements import TransitionElement

        self.buffer, self.transition, self.last = Dopamine(capacity).buffer, TransitionElement, None

    def add(self, frames, starts):
        if self.last is not None:
            self.buffer.add(self.transition(self.last, 0, 0.0, starts[0], starts[0]))
        self.last = frames[0].copy()

    def sample(self, n, rng):
        batch = self.buffer.sample(n)
        return batch.state, batch.next_state

    def bytes_per_frame(self):
        stored = [*self.buffer._memory.values()]
        sizes = (sys.getsizeof(s) for x in stored for s in (x.state, x.next_state))
        return sum(sizes) / len(stored)


def fast_replay(capacity, storage, **options):
    from fastreplay import FrameReplay

    options |= {"storage": storage, "seed": 1, "threads": 1}
    return FrameReplay(capacity, (84, 84), NUM_ENVS, **options)


def add(replay, rows):
    """Add rows of transitions, [(frames, starts)]; only these matter here. -> CPU seconds"""
    zeros = np.zeros(NUM_ENVS, np.int64), np.zeros(NUM_ENVS, np.float32), np.zeros(NUM_ENVS, bool)
    begin = time.thread_time()
    for frames, starts in rows:
        replay.add(frames, *zeros, starts)
    return time.thread_time() - begin


def blocks(rows):
    """Yield lists of up to BLOCK rows of `play`, copied."""
    block = []
    for frames, starts in rows:
        block.append((frames.copy(), starts.copy()))
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block


def measure_turns(game, how, args):
    """Plain and tiles on the same frames, and the compressors on the first of them."""
    torch.set_num_threads(1)
    steps = args.frames // NUM_ENVS
    stores = {
        (storage, output): fast_replay(steps * NUM_ENVS, storage, **options)
        for storage in ("auto", "tiles")
        for output, options in FORMATS.items()
    }
    peers = {}
    for codec in args.codecs:
        if codec == "dopamine":
            peers[codec] = Dopamine(args.peer_frames)
        else:
            peers[codec] = Compressed(codec, stack=False)
            peers[f"{codec} stack"] = Compressed(codec, stack=True)
    seconds = dict.fromkeys([*stores, *peers], 0.0)
    left = peer_rows = min(args.peer_frames // NUM_ENVS, steps)
    for block in blocks(play(game, how, steps)):
        for key, replay in stores.items():
            seconds[key] += add(replay, block)
        for key, peer in peers.items():
            begin = time.thread_time()
            for row in block[:left]:
                peer.add(*row)
            seconds[key] += time.thread_time() - begin
        left -= min(left, len(block))
    result = {"stores": {}, "frames": steps * NUM_ENVS}
    for storage, name in (("auto", "plain"), ("tiles", "tiles")):
        key = storage, "uint8"
        result["stores"][name] = {
            "bytes": stores[key].nbytes / (steps * NUM_ENVS),
            "adds": steps * NUM_ENVS / seconds[key],
        }
    for output in FORMATS:
        times = sample_in_turns(stores["auto", output], stores["tiles", output], args)
        for name in ("plain", "tiles"):
            result["stores"][name] |= {f"{output} {n}": times[name, n] for n in SIZES}
    rng = np.random.default_rng(0)
    for key, peer in peers.items():
        peer_frames = peer_rows * (1 if key == "dopamine" else NUM_ENVS)
        found = {"bytes": peer.bytes_per_frame(), "adds": peer_frames / seconds[key]}
        for n in SIZES:
            times = []
            for _ in range(args.turns):
                begin = time.perf_counter()
                peer.sample(n, rng)
                times.append(time.perf_counter() - begin)
            found[f"uint8 {n}"] = times
        result["stores"][key] = found
    result["copy"] = {n: seconds_to_copy(n, args) for n in SIZES}
    return result


def seconds_to_copy(n, args):
    """The fastest copy of the five frames of n transitions: a bound for every store."""
    source, times = np.ones((n, 5, 84, 84), np.uint8), []
    target = np.zeros_like(source)
    for _ in range(5 * args.turns):
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return min(times)


def sample_in_turns(plain, tiles, args):
    """{(store, n): seconds of each turn, the fastest of five samples}. Batches must be equal."""
    stores, times = {"plain": plain, "tiles": tiles}, {}
    for n in SIZES:
        outs = {name: store.sample(n) for name, store in stores.items()}
        for _ in range(args.turns):
            for name, store in stores.items():
                best = np.inf
                for _ in range(5):
                    begin = time.perf_counter()
                    store.sample(n, out=outs[name])
                    best = min(best, time.perf_counter() - begin)
                times.setdefault((name, n), []).append(best)
            for ours, theirs in zip(outs["plain"][:5], outs["tiles"][:5]):
                if not torch.equal(ours, theirs):
                    raise RuntimeError("a batch from tiles differs from the plain one")
    return times


def measure_growth(game, how, args):
    """Tiles alone: bytes a frame, resident memory and times of adds while frames are added.

    CPU time is that of the thread, the kernel's work for it included. It does not show that an add
    waits, for the thread that merges the pages of a new segment or for another process; the clock
    shows both. So adds near growth (the one that allocates a segment and the next 99) are told from
    the others: what slows down both alike is not growth.
    """
    torch.set_num_threads(1)
    capacity = args.growth // NUM_ENVS * NUM_ENVS
    replay = fast_replay(capacity, "tiles")
    other = COLUMNS * capacity  # of actions and so on, taken at once
    points, times, clock, growths, since_growth = [], [], [], [], []
    mark, before = 10_000, resident_bytes()
    for t, row in enumerate(play(game, how, capacity // NUM_ENVS), 1):
        size, begin = replay.nbytes, time.perf_counter()
        times.append(add(replay, [row]))
        clock.append(time.perf_counter() - begin)
        if replay.nbytes - size >= SEGMENT:
            growths.append(t)
        since_growth.append(t - growths[-1] if growths else NEAR)
        count = t * NUM_ENVS
        if t == 1:
            before = resident_bytes()  # the games have started
        if count >= min(mark, capacity):
            us, near = np.array([times, clock]) * 1e6, np.array(since_growth) < NEAR
            first = np.array(since_growth) == 0
            points.append(
                {
                    "frames": count,
                    "bytes": (replay.nbytes - other) / count + COLUMNS,
                    "resident": resident_bytes() - before,
                    "adds": NUM_ENVS * len(times) / sum(times),
                    "add us": np.percentile(us[0], [50, 99.9, 100]).tolist(),
                    "allocating add us": us[:, first].T.tolist(),  # CPU, clock
                    "near growth": slow_adds(us[1][near]),
                    "elsewhere": slow_adds(us[1][~near]),
                }
            )
            mark, times, clock, since_growth = 2 * mark, [], [], []
    return {"growth": points}


def slow_adds(us):
    """-> {"adds", "over 1 ms": the times of these}"""
    return {"adds": len(us), "over 1 ms": us[us > 1000].tolist()}


PARTS = {"turns": measure_turns, "growth": measure_growth}


def run_part(part, game, how, args):
    """One part in a process of its own. Exits with its last line if it fails."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", part, game, str(how)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(
            f"error: {part} of {game}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(values):
    return float(np.median([*values]))


def microseconds(times):
    return median(times) * 1e6


def ratio(stores, key):
    """Median over the turns of tiles' time to plain's."""
    turns = zip(stores["tiles"][key], stores["plain"][key])
    return median(ours / theirs for ours, theirs in turns)


def ratio_of_fastest(stores, key):
    """Tiles' fastest turn to plain's."""
    return min(stores["tiles"][key]) / min(stores["plain"][key])


def summary_of(parts):
    """Bytes a frame, and tiles' time of float32 samples to plain's, in one line."""
    if "turns" not in parts:
        return f"{parts['growth']['growth'][-1]['bytes']:.0f} bytes"
    stores = parts["turns"]["stores"]
    ratios = ", ".join(f"{ratio(stores, f'float32 {n}'):.2f}" for n in SIZES)
    return f"{stores['tiles']['bytes']:.0f} bytes, {ratios}"


def report_of(rows, args):
    """The record's page, in Markdown. `rows`: [(game, how, results of its parts)]"""
    lines, names = ["# Frame stores on real games"], []
    if args.frames:
        found = [(game, how, parts["turns"]["stores"]) for game, how, parts in rows]
        lines += ["", f"{args.frames:,} frames a row, one thread.", "", *memory_table(found)]
        lines += [
            "",
            f"Samples of tiles and of plain frames, in microseconds: {args.turns} turns, ",
        ]
        lines[-1] += "medians of their times and of their ratios:"
        lines += ["", *samples_table(found, median, ratio)]
        lines += ["", "The fastest turn of each, which other programs disturb least:"]
        lines += ["", *samples_table(found, min, ratio_of_fastest)]
        names = [name for name in found[0][2] if name not in ("plain", "tiles")]
    if names:
        lines += [
            "",
            "Compressors, medians over the rows above; times of uint8 samples, and their ",
        ]
        lines[-1] += "ratio to plain:"
        lines += ["", *compressors_table([stores for *_, stores in found], names)]
        copies = [median(parts["turns"]["copy"][str(n)] for *_, parts in rows) for n in SIZES]
        times = " and ".join(f"{seconds * 1e6:.0f} us" for seconds in copies)
        lines += [
            "",
            f"Copying the frames of such a batch from one array to another takes {times}.",
        ]
    if args.growth:
        lines += ["", f"Tiles alone, up to {args.growth:,} frames; an add is a row of {NUM_ENVS}:"]
        lines += ["", *growth_table(rows)]
    return "\n".join(lines) + "\n"


def memory_table(rows):
    """Bytes a frame and adds of plain frames and tiles."""
    head = ["game", "play", "bytes a frame: plain", "tiles", "adds a CPU second: plain", "tiles"]
    lines = [table_row(head), table_row(["---", "---", *["---:"] * 4])]
    for game, how, stores in rows:
        both = stores["plain"], stores["tiles"]
        cells = [f"{store[x]:,.0f}" for x in ("bytes", "adds") for store in both]
        lines.append(table_row([game, how, *cells]))
    for how, found in by_play(rows):
        cell = f"{median(stores['tiles']['bytes'] for stores in found):,.0f}"
        lines.append(table_row([f"median of {len(found)}", how, "", cell, "", ""]))
    return lines


def samples_table(rows, time_of, ratio_of):
    """Times of samples; below, the medians of the ratios, and how many are at most 1."""
    keys = [f"{output} {n}" for output in FORMATS for n in SIZES]
    head = [f"sample({key.split()[1]}), {key.split()[0]}: plain, tiles, ratio" for key in keys]
    head = ["game", "play", *head]
    lines = [table_row(head), table_row(["---", "---", *["---:"] * len(keys)])]
    for game, how, stores in rows:
        cells = [game, how]
        for key in keys:
            times = [f"{time_of(stores[name][key]) * 1e6:.0f}" for name in ("plain", "tiles")]
            cells.append(", ".join([*times, f"{ratio_of(stores, key):.2f}"]))
        lines.append(table_row(cells))
    for how, found in by_play(rows):
        cells, counts = [f"median of {len(found)}", how], ["at most 1.00", how]
        for key in keys:
            ratios = [ratio_of(stores, key) for stores in found]
            cells.append(f"{median(ratios):.2f}")
            counts.append(f"{sum(x <= 1 for x in ratios)} of {len(found)}")
        lines += [table_row(cells), table_row(counts)]
    return lines


def by_play(rows):
    """[(how, stores of each of its games)], of those with several games"""
    plays = dict.fromkeys(how for _, how, _ in rows)
    groups = [(play, [stores for _, how, stores in rows if how == play]) for play in plays]
    return [(how, found) for how, found in groups if len(found) > 1]


def compressors_table(found, names):
    """Medians over the rows of each compressor. `found`: the stores of each row"""
    head = ["store", "bytes a frame", "adds a CPU second", *(f"sample({n}), ratio" for n in SIZES)]
    lines = [table_row(head), table_row(["---", *["---:"] * (len(head) - 1)])]
    for name in names:
        cells = [name, *(f"{median(s[name][x] for s in found):,.0f}" for x in ("bytes", "adds"))]
        for key in (f"uint8 {n}" for n in SIZES):
            times = [(microseconds(s[name][key]), microseconds(s["plain"][key])) for s in found]
            cells.append(f"{median(ours for ours, _ in times):,.0f}, ")
            cells[-1] += f"{median(ours / plain for ours, plain in times):.1f}"
        lines.append(table_row(cells))
    return lines


def growth_table(rows):
    head = ["game", "play", "frames", "bytes a frame", "resident memory, MB", "adds a CPU second"]
    head += ["CPU us an add: median, 99.9%, slowest", "allocating adds: number, slowest in CPU us"]
    head += [f"over 1 ms by the clock: of {NEAR} adds from each allocation on", "of the others"]
    lines = [table_row(head), table_row(["---", "---", *["---:"] * 8])]
    for game, how, parts in rows:
        for point in parts["growth"]["growth"]:
            cells = [game, how, f"{point['frames']:,}", f"{point['bytes']:.0f}"]
            cells += [f"{point['resident'] / 1e6:,.0f}", f"{point['adds']:,.0f}"]
            cells += [", ".join(f"{x:.0f}" for x in point["add us"])]
            grew = [cpu for cpu, _ in point["allocating add us"]]
            cells += [f"{len(grew)}, {max(grew):.0f}" if grew else "0"]
            for part in (point["near growth"], point["elsewhere"]):
                cells += [f"{len(part['over 1 ms'])} of {part['adds']:,}"]
            lines.append(table_row(cells))
    return lines


def figure_of(rows):
    """Bytes a frame of tiles in each game, and of the compressors in the median game."""
    bars = [
        (f"{game}, {how}", parts["growth"]["growth"][-1]["bytes"], False)
        for game, how, parts in rows
        if "turns" not in parts
    ]
    stores = [(*row, parts["turns"]["stores"]) for *row, parts in rows if "turns" in parts]
    bars += [(f"{game}, {how}", found["tiles"]["bytes"], False) for game, how, found in stores]
    for name in stores[0][2] if stores else ():
        if name not in ("plain", "tiles"):
            found = (found[name]["bytes"] for *_, found in stores)
            bars.append((f"{name}, median game", median(found), True))
    bars.sort(key=lambda bar: bar[1])
    note = "frames of 84x84, 7,056 bytes each; blue: tiles"
    note += ", grey: compressors" if any(peer for *_, peer in bars) else ""
    return draw_bars(bars, "Memory of a frame", note, "bytes a frame, lower is better")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--games", nargs="+", default=GAMES, help="names without NoFrameskip-v4")
    parser.add_argument("--play", nargs="+", default=["sticky"], help="random, sticky, checkpoints")
    parser.add_argument("--frames", type=int, default=100_000, help="in each store; 0: no stores")
    parser.add_argument(
        "--peer-frames", type=int, default=16_000, help="in each compressor's store"
    )
    parser.add_argument("--codecs", nargs="*", default=["lz4", "zstd", "snappy"])
    parser.add_argument("--growth", type=int, default=0, help="frames into tiles alone; 0: no")
    parser.add_argument("--turns", type=int, default=40, help="of each sample")
    parser.add_argument("--record", type=Path, help="folder of the record")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        part, game, how = args.worker
        print(json.dumps(PARTS[part](game, how, args)))
        return
    for name, number in (("--frames", args.frames), ("--peer-frames", args.peer_frames)):
        if number < 1_000 and not (name == "--frames" and number == 0 and args.growth):
            parser.error(f"{name} must be 1000 or more")
    if args.record:
        commit = clean_commit()
        pyplot()  # exits here if it is missing, not after the measurement
    rows = []
    for how in args.play:
        for game in args.games:
            wanted = {"turns": args.frames, "growth": args.growth}
            parts = {part: run_part(part, game, how, args) for part in PARTS if wanted[part]}
            name = how if how in ("random", "sticky") else "trained"
            rows.append((game, name, parts))
            print(f"{game}, {name}: {summary_of(parts)}", flush=True)
    report = report_of(rows, args)
    print(report)
    if args.record:
        write_record(args.record, {"rows": rounded([list(row) for row in rows])}, report, commit)
        save(figure_of(rows), args.record / "bytes")


if __name__ == "__main__":
    main()
