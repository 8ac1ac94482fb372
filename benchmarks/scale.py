"""Ape-X at scale: what actors and the learner do here, and what more actors would need.

    python benchmarks/scale.py --record benchmarks/records/2026-01-01_scale
    python benchmarks/scale.py --actors 1 4 8 --buffer cuda --repeats 5

It measures the parts of algos/apex_dqn_atari.py, each --repeats times, and takes medians:

    actors   agent steps per second of 1, 2 and 4 actors, when their blocks are only received
    network  rows per second through Ray's object store, when a block is sent again and again, the
             processor time that a row costs the process that receives it, and how long a broadcast
             of the weights takes
    store    rows per second into one prioritized replay, frames plain and in tiles
    learn    updates per second, with as many threads as the file has, and their processor time
    whole    the file itself: agent steps per second, and how long its learner waits for actors

From them follows a model of 16 to 1,024 actors: bandwidth, rows per second into one replay, when
one replay is not enough, how many learners keep the ratio of updates to agent steps. The model also
predicts the runs of the whole file on this machine; the record shows both.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from figures import Curve, draw_curves, save
from films import load
from machine import ROOT, clean_commit, write_record
from train import events_of, table_row

NETWORKS = {"1 Gbit/s": 1.25e8, "10 Gbit/s": 1.25e9, "100 Gbit/s": 1.25e10}  # bytes per second
PLANNED = (16, 64, 256, 1024)
FILE = ROOT / "algos" / "apex_dqn_atari.py"


def load_apex():
    """algos/apex_dqn_atari.py as a module, which Ray sends to its processes whole."""
    apex = load(FILE.stem)
    if apex.ray is None:
        sys.exit("error: Ape-X needs Ray: pip install '.[ray]'.")
    if apex.fastreplay is None:
        sys.exit("error: fastreplay is not compiled: pip install '.[ray]' with a C++ compiler.")
    apex.ray.cloudpickle.register_pickle_by_value(apex)
    return apex


# ---- What this machine does ----------------------------------------------------------------------


def measure_actors(apex, args, count):
    """Agent steps per second of `count` actors; blocks are received and dropped.

    -> the rate of each turn, and, of one actor, --blocks blocks
    """
    apex_args = apex.RunArgs(env_id=args.env_id, num_actors=count)
    network = apex.QNetwork(apex.make_envs(args.env_id, 1, 1).n_actions)
    actors = apex.Actors(apex_args)
    actors.begin(network)
    try:
        for _ in range(4 * count):  # the first blocks are longer, and the games start
            actors.recv()
        rates, blocks = [], []
        for _ in range(args.repeats):
            begin, received = time.perf_counter(), 0
            while (seconds := time.perf_counter() - begin) < args.seconds:
                actors.recv()
                received += 1
            rates.append(received * apex_args.num_envs * apex_args.steps_per_block / seconds)
        while count == 1 and len(blocks) < args.blocks:
            block = actors.recv()  # copied: the memory is the object store's
            blocks.append(apex.Block(*map(np.copy, block[:6]), [], block.block_id))
    finally:
        apex.ray.shutdown()
    return rates, blocks


class Sender:
    """An actor that plays nothing and sends one block again and again."""

    def __init__(self, block):
        self.block = block

    def send(self):
        return self.block


def measure_network(apex, args, block):
    """Rows per second from one other process of this machine through the object store, the
    processor seconds of a row in this process, and the seconds to put the weights into the store,
    for each turn; the bytes of the weights."""
    network = apex.QNetwork(apex.make_envs(args.env_id, 1, 1).n_actions)
    apex.start_ray(apex.RunArgs(num_actors=1))
    ray, rates, costs, puts = apex.ray, [], [], []
    try:
        for _ in range(args.repeats):
            begin = time.perf_counter()
            ray.put({k: x.numpy() for k, x in network.state_dict().items()})
            puts.append(time.perf_counter() - begin)
        sender = ray.remote(num_cpus=0.5)(Sender).remote(block)
        ray.get(sender.send.remote())  # it has started
        requests = [sender.send.remote() for _ in range(2)]
        for _ in range(args.repeats):
            begin, processor, received = time.perf_counter(), time.process_time(), 0
            while (seconds := time.perf_counter() - begin) < args.seconds:
                (ready,), requests = ray.wait(requests)
                ray.get(ready)
                received += 1
                requests.append(sender.send.remote())
            rows = received * block.actions.size
            rates.append(rows / seconds)
            costs.append((time.process_time() - processor) / rows)
    finally:
        ray.shutdown()
    return rates, costs, puts, sum(x.nbytes for x in network.state_dict().values())


def make_replay(apex, args, storage, rows):
    """The learner's replay, which `rows` rows fill."""
    import torch

    options = {"buffer_size": rows, "buffer": args.buffer, "replay_storage": storage}
    apex_args = apex.RunArgs(env_id=args.env_id, **options)
    device = torch.device("cuda" if args.buffer == "cuda" else "cpu")
    return apex.make_replay(apex_args, device, True, n_step=apex_args.n_step)


def store(replay, block):
    """As the loop of the file does."""
    for row in zip(*block[:5]):
        replay.add(*row)
    replay.set_newest_priorities(np.ascontiguousarray(block.td_error.T))


def finish(args):
    """Wait for the work that the GPU has been given."""
    if args.buffer == "cuda":
        import torch

        torch.cuda.synchronize()


def measure_store(apex, args, blocks):
    """Rows per second into a full ring, {storage: [one for each turn]}; the last replays, full."""
    half = len(blocks) // 2
    rows, rates, replays = half * blocks[0].actions.size, {}, {}
    for _ in range(args.repeats):
        for storage in ("plain", "tiles"):
            replays.pop(storage, None)
            replay = make_replay(apex, args, storage, rows)
            for block in blocks[:half]:  # fills it: memory is taken, the ring is full
                store(replay, block)
            finish(args)
            begin = time.perf_counter()
            for block in blocks[half : 2 * half]:
                store(replay, block)
            finish(args)
            rates.setdefault(storage, []).append(rows / (time.perf_counter() - begin))
            replays[storage] = replay
    return rates, replays


def measure_learn(apex, args, replay, threads):
    """Updates per second as in the loop of the file, and the processor seconds of an update, both
    for each turn."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    apex_args = apex.RunArgs(env_id=args.env_id)
    n_actions = apex.make_envs(args.env_id, 1, 1).n_actions
    networks = [apex.QNetwork(n_actions).to(device) for _ in range(2)]
    optimizer = apex.make_optimizer(networks[0], apex_args)

    def update():
        batch = replay.sample(args.batch_size)
        batch = apex.Batch(*(x.to(device) for x in batch))
        loss, td_error, _ = apex.td_loss(*networks, batch, apex_args)
        replay.update_priorities(batch.indices.to(replay.device), td_error.to(replay.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    torch.set_num_threads(threads)
    update(), update()
    rates, costs = [], []
    for _ in range(args.repeats):
        begin, processor, updates = time.perf_counter(), time.process_time(), 0
        while (seconds := time.perf_counter() - begin) < args.seconds or updates < 3:
            update()
            updates += 1
        rates.append(updates / seconds)
        costs.append((time.process_time() - processor) / updates)
    torch.set_num_threads(1)
    return rates, costs


def measure_whole(args, count):
    """A short run of the file -> agent steps per second, and the share of its time that the learner
    waits, both after its first update."""
    flags = {"num-actors": count, "env-id": args.env_id, "total-timesteps": args.steps}
    flags |= {"learning-starts": args.steps // 5, "buffer": args.buffer, "eval-episodes": 0}
    flags |= {"eval-frequency": 0, "checkpoint-frequency": 0, "buffer-size": 2 * args.steps}
    flags |= {"batch-size": args.batch_size}
    command = [sys.executable, os.fspath(FILE)]
    command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    with tempfile.TemporaryDirectory(prefix="cleanq-scale-") as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no output"]
            sys.exit(f"error: the run with {count} actors: {lines[-1]}")
        (run,) = Path(folder, "runs").iterdir()
        return rate_and_share(events_of(run))


def rate_and_share(events):
    """(agent steps per second, share of its time that the learner waits) between the first and the
    last log entry with a loss. The file logs both from its start on."""
    rates = {e.step: e.value for e in events.Scalars("charts/SPS")}
    shares = {e.step: e.value for e in events.Scalars("charts/learner_waits")}
    steps = [e.step for e in events.Scalars("losses/td_loss")]
    first, last = min(steps), max(steps)
    seconds = {step: step / rates[step] for step in (first, last)}  # since the start
    length = seconds[last] - seconds[first]
    waited = shares[last] * seconds[last] - shares[first] * seconds[first]
    return (last - first) / length, waited / length


# ---- What more actors would need -----------------------------------------------------------------


def costs_of(found):
    """Medians of a measurement, as the model takes them."""
    rows = found["rows a step"]  # rows in the replay for an agent step: a block has context
    return {
        "actor": 1 / median(found["actors"]["1"]),  # seconds of an agent step
        "receive": rows * median(found["receive"]),  # seconds of the learner for an agent step
        "store": rows / median(found["store"][found["storage"]]),
        "update": 1 / median(found["learn"]),  # seconds of an update
        "processor": median(found["learn, processor"]),  # its processor seconds, of all threads
        "bytes": rows * found["bytes a row"],  # sent for an agent step
        "weights": found["bytes of the weights"],
        "steps an update": found["steps an update"],
        "steps a broadcast": found["steps a broadcast"],
        "rows a step": rows,
    }


def predict(costs, actors, cores):
    """Agent steps per second of `actors` and a learner on `cores` of one machine, and the share of
    its time that the learner waits."""
    rows = costs["receive"] + costs["store"]
    learner = rows + costs["update"] / costs["steps an update"]
    processor = costs["actor"] + rows + costs["processor"] / costs["steps an update"]
    limits = [actors / costs["actor"], 1 / learner, cores / processor]
    return min(limits), 1 - min(limits) * learner


def plan(costs, actors, capacity, utilisation=0.8):
    """What that many actors, a core each, would need.

    -> dict: steps, rows, bytes: per second, of agent steps, into the replay, from the actors;
    weights: bytes per second to each machine with actors, at the file's rate of broadcasts;
    owner: cores that receive and store all rows; owners: replays, none of them busier than
    `utilisation`; learners: that keep the ratio of updates to agent steps; ratio: agent steps an
    update of one learner that does nothing else; lifetime: seconds that a row is in the replay.
    """
    steps = actors / costs["actor"]
    owner = steps * (costs["receive"] + costs["store"])
    return {
        "actors": actors,
        "steps": steps,
        "rows": steps * costs["rows a step"],
        "bytes": steps * costs["bytes"],
        "weights": steps / costs["steps a broadcast"] * costs["weights"],
        "owner": owner,
        "owners": max(int(np.ceil(owner / utilisation)), 1),
        "learners": steps / costs["steps an update"] * costs["update"],
        "ratio": steps * costs["update"],
        "lifetime": capacity / (steps * costs["rows a step"]),
    }


def ends_of(costs, utilisation=0.8):
    """{what ends: the number of actors from which it is not enough}, at that utilisation."""
    step = costs["actor"] * utilisation
    ends = {"one learner at the file's ratio": step * costs["steps an update"] / costs["update"]}
    ends["one process with the replay"] = step / (costs["receive"] + costs["store"])
    ends |= {name: step * rate / costs["bytes"] for name, rate in NETWORKS.items()}
    return ends


# ---- The record ----------------------------------------------------------------------------------


def median(values):
    return float(np.median([*values]))


def spread(values, unit=""):
    """`median (lowest to highest)`"""
    texts = (f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in (min(values), max(values)))
    middle = median(values)
    text = f"{middle:,.0f}" if abs(middle) >= 100 else f"{middle:.3g}"
    return f"{text}{unit} ({' to '.join(texts)})"


def table(head, rows):
    lines = [table_row(head), table_row(["---", *["---:"] * (len(head) - 1)])]
    return [*lines, *map(table_row, rows)]


def report_of(found):
    costs, cores = costs_of(found), found["cores"]
    lines = ["# Ape-X at scale", ""]
    lines += [f"{found['env_id']}, {found['games']} games an actor, an untrained network, "]
    lines[-1] += f"{found['repeats']} turns; median (lowest to highest). {cores} cores."
    lines += ["", "## Parts", ""]
    rows = [
        [f"{n} actors alone", spread(rates), "agent steps/s"]
        for n, rates in found["actors"].items()
    ]
    rows.append(["through the object store", spread(found["network"]), "rows/s"])
    microseconds = [1e6 * x for x in found["receive"]]
    rows.append(["receiving, processor time", spread(microseconds), "us a row"])
    rows += [[f"into the replay, {k}", spread(v), "rows/s"] for k, v in found["store"].items()]
    rows.append([f"updates of {found['batch']} transitions", spread(found["learn"]), "updates/s"])
    rows.append(["an update, processor time", spread(found["learn, processor"]), "s"])
    milliseconds = [1e3 * x for x in found["broadcast"]]
    rows.append(["broadcast of the weights", spread(milliseconds), "ms"])
    lines += table(["part", "rate", "unit"], rows)
    lines += ["", f"A row has {found['bytes a row']:,} bytes; an agent step sends "]
    lines[-1] += f"{found['rows a step']:.2f} rows, because a block completes the stacks and "
    lines[-1] += f"returns of its ends. The weights have {found['bytes of the weights']:,} bytes."
    if found["whole"]:
        lines += ["", "## The whole file, and what the model predicts for it", ""]
        rows = []
        for count, turns in found["whole"].items():
            rate, share = predict(costs, int(count), cores)
            rates, shares = zip(*turns)
            percents = [100 * x for x in shares]
            rows.append([count, spread(rates), f"{rate:,.0f}", spread(percents, "%")])
            rows[-1].append(f"{share:.0%}")
        head = ["actors", "agent steps/s", "predicted", "the learner waits", "predicted"]
        lines += table(head, rows)
    lines += ["", "## More actors, each with a core of its own", ""]
    rows = []
    for count in PLANNED:
        need = plan(costs, count, found["capacity"])
        rows.append([f"{count:,}", f"{need['steps']:,.0f}", f"{need['rows']:,.0f}"])
        rows[-1] += [f"{need['bytes'] / 1e6:,.0f}", f"{need['weights'] / 1e6:,.0f}"]
        rows[-1] += [f"{need['owner']:.2f}", f"{need['owners']}", f"{need['learners']:,.1f}"]
        rows[-1] += [f"{need['ratio']:,.0f}", f"{need['lifetime']:,.0f}"]
    head = ["actors", "agent steps/s", "rows/s", "MB/s to the learner", "MB/s of weights a machine"]
    head += ["cores that receive and store", "replays", "learners at the file's ratio"]
    head += ["agent steps an update of one learner", "seconds in the replay"]
    lines += table(head, rows)
    lines += ["", "Actors up to which it is enough, at 80% of its rate:", ""]
    lines += [f"- {name}: {count:,.0f}" for name, count in ends_of(costs).items()]
    lines += ["", f"Learners count this machine's rate of updates ({found['device']}). The model "]
    lines[-1] += "assumes that blocks from other machines cost the learner what they cost here, "
    lines[-1] += "through shared memory: measured on one machine only."
    return "\n".join(lines)


def draw(found):
    """Rows per second into the replay over actors, and what ends where."""
    costs = costs_of(found)
    actors = np.array([1, *PLANNED])
    rows = actors / costs["actor"] * costs["rows a step"]
    curves = [Curve("sent by the actors", actors, rows)]
    flat = {"one replay": costs["rows a step"] / (costs["receive"] + costs["store"])}
    flat |= {name: rate / found["bytes a row"] for name, rate in NETWORKS.items()}
    curves += [Curve(name, actors, np.full(5, rate), peer=True) for name, rate in flat.items()]
    note = f"{found['env_id']}, {found['games']} games an actor; grey: what one replay can store, "
    note += "and what a network can carry"
    return draw_curves(curves, "Rows from many actors", note, "actors", "rows/s", log=True)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env-id", default="PongNoFrameskip-v4")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--buffer", choices=["cpp", "cuda"], default="cpp")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each measurement")
    parser.add_argument("--seconds", type=float, default=4.0, help="least length of a turn")
    parser.add_argument("--blocks", type=int, default=128, help="stored in a turn, in two halves")
    parser.add_argument("--steps", type=int, default=40_000, help="agent steps of a whole run")
    parser.add_argument("--batch-size", type=int, default=512, help="transitions per update")
    parser.add_argument("--record", type=Path, help="folder of the record")
    args = parser.parse_args()
    if min(args.actors) < 1 or len({*args.actors}) < len(args.actors):
        parser.error("--actors: positive numbers, all different")
    sizes = args.blocks // 2, args.steps // 4000, args.batch_size
    if min(args.repeats, args.seconds, *sizes) <= 0:
        least = "--blocks 2, --steps 4000, --batch-size 1 or more"
        parser.error(f"--repeats and --seconds must be positive, {least}")
    return args


def main():
    args = parse_args()
    commit = clean_commit() if args.record else None
    import torch

    if args.buffer == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --buffer cuda needs a CUDA GPU, and torch finds none: use --buffer cpp.")
    apex = load_apex()
    threads = torch.get_num_threads()  # those of the file's learner
    torch.set_num_threads(1)
    defaults, gpu = apex.RunArgs(), torch.cuda.is_available()
    found = {"env_id": args.env_id, "repeats": args.repeats, "cores": os.cpu_count()}
    found |= {"games": defaults.num_envs, "batch": args.batch_size}
    found |= {"capacity": defaults.buffer_size, "steps an update": defaults.train_frequency}
    found |= {"steps a broadcast": defaults.broadcast_frequency, "actors": {}}
    found |= {"storage": "plain" if args.buffer == "cuda" else "tiles"}  # the file's own choice
    found["device"] = torch.cuda.get_device_name() if gpu else f"{threads} threads"
    for count in sorted({1, *args.actors}):
        found["actors"][str(count)], last = measure_actors(apex, args, count)
        blocks = last or blocks  # noqa: F821 - those of one actor, which is measured first
        print(f"{count} actors: {spread(found['actors'][str(count)])} agent steps/s", flush=True)
    found["rows a step"] = blocks[0].actions.size / (defaults.num_envs * defaults.steps_per_block)
    sent = sum(x.nbytes for x in blocks[0][:6])
    found["bytes a row"] = round(sent / blocks[0].actions.size)
    measured = measure_network(apex, args, blocks[0])
    found["network"], found["receive"], found["broadcast"], found["bytes of the weights"] = measured
    print(f"object store: {spread(found['network'])} rows/s", flush=True)
    found["store"], replays = measure_store(apex, args, blocks)
    for storage, rates in found["store"].items():
        print(f"replay, {storage}: {spread(rates)} rows/s", flush=True)
    replay = replays[found["storage"]]
    found["learn"], found["learn, processor"] = measure_learn(apex, args, replay, threads)
    print(f"learner: {spread(found['learn'])} updates/s", flush=True)
    found["whole"] = {str(count): [] for count in args.actors}
    for _ in range(args.repeats):
        for count in args.actors:
            found["whole"][str(count)].append(measure_whole(args, count))
            rate, share = found["whole"][str(count)][-1]
            print(f"whole, {count} actors: {rate:,.0f} steps/s, waits {share:.0%}", flush=True)
    report = report_of(found)
    print(report)
    if args.record:
        write_record(args.record, found, report, commit)
        save(draw(found), args.record / "scale")


if __name__ == "__main__":
    main()
