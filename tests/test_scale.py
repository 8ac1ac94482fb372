"""benchmarks/scale.py: the model of many actors, and a short measurement."""

import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from scale import ends_of, plan, predict, rate_and_share, spread  # noqa: E402

COSTS = {
    "actor": 1e-3,  # 1,000 agent steps per second
    "receive": 2e-6,
    "store": 3e-6,
    "update": 0.032,  # at one in 640 steps: 50 us a step
    "processor": 0.032,  # of one thread
    "bytes": 8_000,
    "weights": 10_000_000,
    "steps an update": 640,
    "steps a broadcast": 2_000,
    "rows a step": 1.25,
}


def simulate(costs, threads, actors, cores, seconds=2.0, tick=1e-4):
    """A plain loop: the learner takes the blocks that are there, on `threads` cores; the actors
    have the rest of the cores, and never more than two blocks of 50 steps each on the way, as in
    the file. -> agent steps per second, share of waiting"""
    learner = costs["receive"] + costs["store"] + costs["update"] / costs["steps an update"]
    steps_ready, learned, idle = 0.0, 0.0, 0.0
    for _ in range(round(seconds / tick)):
        busy = min(steps_ready * learner, tick, cores * tick)
        free = max(cores - threads * busy / tick, 0)
        playing = min(actors, free) * tick if steps_ready < 100 * actors else 0
        steps_ready += playing / costs["actor"] - busy / learner
        learned, idle = learned + busy / learner, idle + tick - busy
    return learned / seconds, idle / seconds


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("actors, cores", [(1, 8), (8, 16), (64, 100), (4, 2), (2, 2), (1, 1)])
def test_the_model_predicts_a_simulated_machine(threads, actors, cores):
    """A learner whose updates last 0.4 s on one thread: its share of the work is large."""
    costs = COSTS | {"update": 0.4 / threads, "processor": 0.4}
    rate, share = predict(costs, actors, cores)
    simulated_rate, simulated_share = simulate(costs, threads, actors, cores)
    assert rate == pytest.approx(simulated_rate, rel=0.1)
    assert share == pytest.approx(simulated_share, abs=0.1)


def test_a_plan():
    need = plan(COSTS, actors=256, capacity=1_000_000)
    assert need["steps"] == pytest.approx(256_000)
    assert need["rows"] == pytest.approx(320_000)
    assert need["bytes"] == pytest.approx(2.048e9)
    assert need["weights"] == pytest.approx(128 * 10e6)  # 128 broadcasts a second
    assert need["owner"] == pytest.approx(1.28)  # cores
    assert need["owners"] == 2
    assert need["learners"] == pytest.approx(400 * 0.032)  # 400 updates a second
    assert need["ratio"] == pytest.approx(256_000 * 0.032)
    assert need["lifetime"] == pytest.approx(3.125)


def test_each_end_is_where_the_plan_reaches_80_percent():
    ends = ends_of(COSTS)
    assert plan(COSTS, ends["one process with the replay"], 1)["owner"] == pytest.approx(0.8)
    assert plan(COSTS, ends["one learner at the file's ratio"], 1)["learners"] == pytest.approx(0.8)
    assert plan(COSTS, ends["10 Gbit/s"], 1)["bytes"] == pytest.approx(1e9)
    assert ends["100 Gbit/s"] == pytest.approx(10 * ends["10 Gbit/s"])


def test_rate_and_share_leave_out_the_time_before_learning():
    """10 s for the first 1,000 steps, all waiting; then 2,000 steps in 4 s, 1 s of it waiting."""
    steps = {1_000: (100.0, 1.0), 2_000: (2_000 / 12, 10.5 / 12), 3_000: (3_000 / 14, 11 / 14)}
    scalars = {
        "charts/SPS": {step: values[0] for step, values in steps.items()} | {500: 50.0},
        "charts/learner_waits": {step: values[1] for step, values in steps.items()} | {500: 1.0},
        "losses/td_loss": dict.fromkeys(steps, 0.1),
    }

    def read(tag):
        return [SimpleNamespace(step=step, value=x) for step, x in sorted(scalars[tag].items())]

    assert rate_and_share(SimpleNamespace(Scalars=read)) == pytest.approx((500, 0.25))


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == "2 (1 to 3)"
    assert spread([1234.5, 0.5, 2000.0], "%") == "1,234% (0.5 to 2,000)"


def scale(*words):
    return forked.run([sys.executable, ROOT / "benchmarks" / "scale.py", *words])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--actors", 0], "--actors: positive numbers, all different"),
        (["--actors", 2, 2], "--actors: positive numbers, all different"),
        (["--steps", 3999], "--steps 4000"),
        (["--blocks", 1], "--blocks 2"),
        (["--batch-size", 0], "--batch-size 1 or more"),
    ],
)
def test_bad_arguments(words, message):
    done = scale(*words)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so_before_anything_is_measured():
    done = scale("--buffer", "cuda")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: --buffer cuda needs a CUDA GPU") and "cpp" in done.stderr


def test_a_short_measurement():
    for package in ("ray", "fastreplay._cpu"):
        pytest.importorskip(package)
    options = ["--repeats", 1, "--seconds", 0.2, "--blocks", 4, "--steps", 4_000]
    options += ["--batch-size", 8]
    done = scale("--actors", 1, *options)
    assert done.returncode == 0, done.stderr
    for part in ("1 actors alone", "through the object store", "into the replay, tiles"):
        assert f"| {part} | " in done.stdout
    assert "| 1,024 | " in done.stdout and "- one process with the replay: " in done.stdout
