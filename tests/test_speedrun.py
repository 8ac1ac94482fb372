"""benchmarks/speedrun.py: time until solved."""

import json
import time

import pytest
from test_benchmarks import git, make_repository, run

# Seed 3 does not get there; seed 5 fails.
SCRIPT = """
import argparse, time

parser = argparse.ArgumentParser()
parser.add_argument("--env-id")
parser.add_argument("--seed", type=int)
parser.add_argument("--stop-return", type=float)
parser.add_argument("--eval-frequency", type=int)
parser.add_argument("--eval-episodes", type=int)
parser.add_argument("--sleep", type=float, default=0.1)
args = parser.parse_args()
assert args.eval_episodes == args.eval_frequency == 0
time.sleep(args.sleep)
if args.seed == 5:
    raise SystemExit("error: five")
if args.seed != 3:
    print("progress\\r 100%, step/s")
    print(f"the last 100 episodes reached --stop-return {args.stop_return:g}, after 321 episodes, "
          f"{1000 * args.seed} steps and 0.1 seconds")
"""
TOOL = ["benchmarks/speedrun.py", "--script", "dqn_cartpole"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_repository(tmp_path_factory, {"dqn_cartpole": SCRIPT})


def test_a_record_and_the_next(repository):
    """A median over all seeds, in wall-clock time of whole processes; then what a change gained."""
    begin = time.monotonic()
    done = run(repository, *TOOL, "--record", "one", "--", "--sleep", "0.5")
    assert done.returncode == 1 and "status 1: error: five" in done.stderr  # seed 5 is a default
    assert not (repository / "one").exists()
    seeds = ["--seeds", 1, 2, 3]
    begin = time.monotonic()
    done = run(repository, *TOOL, *seeds, "--record", "one", "--", "--sleep", "0.5")
    elapsed = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    results = json.loads((repository / "one" / "results.json").read_text())
    seconds = [found["seconds"] for found in results["runs"]]
    assert min(seconds) > 0.5 and sum(seconds) < elapsed
    assert [found["steps"] for found in results["runs"]] == [1000, 2000, None]
    page = (repository / "one" / "README.md").read_text()
    assert "# Speed run: dqn_cartpole.py on CartPole-v1 to 475" in page
    assert "2 of 3 seeds got there" in page and "| never |" in page
    assert f"**{max(seconds[:2]):.1f} s**" in page  # never, a number, a smaller number
    assert (repository / "one" / "dqn_cartpole.py.txt").read_text() == SCRIPT
    log = (repository / "one" / "seed_1.txt").read_text()
    assert log.startswith("progress\n") and "step/s" not in log and "after 321 episodes" in log
    words = [*TOOL, "--seeds", 1, 2, 4, "--against", "one", "--change", "less sleep"]
    done = run(repository, *words, "--record", "two")
    assert done.returncode == 0, done.stderr
    page = (repository / "two" / "README.md").read_text()
    assert f"Against one: {max(seconds[:2]):.1f} s before, " in page
    assert " times as fast." in page and "What has changed: less sleep" in page
    git(repository, "status")


def test_never(repository):
    """The median is infinite if most seeds do not get there."""
    from speedrun import median_seconds, words

    never, quick = {"seconds": 5.0, "steps": None}, {"seconds": 1.0, "steps": 10}
    assert words(median_seconds([never, quick, never])) == "never"
    assert median_seconds([never, quick, quick]) == 1.0
    assert words(1.25) == "1.2 s"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", 1, 2], "at least three"),
        (["--seeds", 1, 2, 2], "all different"),
        (["--env-id", "Taxi-v4"], "must be one of CartPole-v1"),
        (["--against", "one"], "belong together"),
        (["--", "--stop-return", "100"], "the rules set it"),
        (["--", "--eval_episodes=5"], "the rules set it"),
    ],
)
def test_what_the_rules_forbid(repository, words, message):
    done = run(repository, *TOOL, *words)
    assert done.returncode == 2 and message in done.stderr
