"""The tools in benchmarks/: when a record may be written, its contents, and its figures."""

import argparse
import csv
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from conftest import load

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
sys.path.insert(0, str(ROOT / "benchmarks"))

# A script with the command line, the output and the TensorBoard files of those in algos/, but
# without training. Seed 13 fails.
SCRIPT = """
import argparse, pathlib, signal, time
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

if __name__ != "__main__":
    raise ImportError("there is nothing to count here")
parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--env-id", default="CartPole-v1")
parser.add_argument("--total-timesteps", type=int, default=300)
parser.add_argument("--learning-starts", type=int)
args, _ = parser.parse_known_args()
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(True))
writer = EventFileWriter(f"runs/{args.env_id.replace('/', '-')}__{args.seed}")
pathlib.Path("started").touch()


def scalar(tag, value, step, wall_time=0.0):
    value = Summary.Value(tag=tag, simple_value=value)
    writer.add_event(Event(step=step, wall_time=wall_time, summary=Summary(value=[value])))


if args.total_timesteps > 10**6:  # timed by throughput.py: 100 steps in 0.1 s, later 50
    wall_time, step = 1000.0, 0
    while not stop:
        time.sleep(0.01)
        wall_time, step = wall_time + 0.1, step + (100 if wall_time < 1001 else 50)
        scalar("charts/SPS", 1.0, step, wall_time)
        if step >= args.learning_starts:
            scalar("losses/td_loss", 1.0, step, wall_time)
        writer.flush()
    writer.close()
    raise SystemExit
if args.seed == 13:
    print("a step\\rthe next step\\nerror: thirteen")
    raise SystemExit(3)
for step in range(100, args.total_timesteps + 1, 100):
    score = 0.1 * step + args.seed
    scalar("eval/episodic_return", score, step)
    print(f"{args.env_id}, step {step}, evaluated: {score:.1f} +- 2.0 in 100 episodes")
if args.seed == 7:
    print("reached --stop-return -90, after 301 episodes, 300 steps and 4.2 seconds")
writer.close()
"""
TRAIN = ["benchmarks/train.py", "--scripts", "script"]
NO_GIT = {key: value for key, value in os.environ.items() if not key.startswith(("GIT", "COMMIT"))}


def run(folder, *words, cwd=None, **environment):
    command = [sys.executable, "-W", "ignore", *words]
    return forked.run(command, cwd=cwd or folder, env=NO_GIT | environment)


def git(folder, *words):
    user = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", folder, *user, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=NO_GIT).stdout


def make_repository(tmp_path_factory, scripts):
    """A repository with the tools and some scripts, {name: source}, all committed."""
    folder = tmp_path_factory.mktemp("template") / "cleanq"
    ignore = shutil.ignore_patterns("records", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=ignore)
    (folder / "algos").mkdir()
    for name, source in scripts.items():
        (folder / "algos" / f"{name}.py").write_text(source)
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(folder.parent, "init", "-q", "cleanq")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_repository(tmp_path_factory, {"script": SCRIPT})


def edit(repository):
    with open(repository / "algos" / "script.py", "a") as file:
        file.write("\n")


def add(*path):
    def add(repository):
        (repository.joinpath(*path)).parent.mkdir(parents=True, exist_ok=True)
        (repository.joinpath(*path)).write_text("")

    return add


TOOLS = [
    TRAIN,
    ["benchmarks/throughput.py", "--task", "cartpole", "--alone", "--variants", "script=script"],
    ["benchmarks/tabular.py", "--parts", "bias"],
    ["benchmarks/buffers.py", "--peers", "cumsum-tree"],
    ["benchmarks/buffers.py", "--device", "cuda"],
]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda words: " ".join(words[:3]))
def test_a_record_is_refused_before_the_measurement(repository, tool):
    edit(repository)
    done = run(repository, *tool, "--record", "benchmarks/records/new")
    assert done.returncode != 0 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "commit or stash first" in done.stderr and "algos/script.py" in done.stderr
    assert not (repository / "benchmarks" / "records").exists()


@pytest.mark.parametrize("folder", ["algos", "csrc/core", "benchmarks", "tests"])
def test_untracked_code_is_refused(repository, folder):
    add(folder, "new.py")(repository)
    done = run(repository, *TRAIN, "--record", "record")
    assert done.returncode != 0 and f"{folder}/new.py" in done.stderr
    assert not (repository / "record").exists()


def test_a_dirty_checkout_can_be_measured_without_a_record(repository):
    edit(repository)
    add("tests", "new.py")(repository)
    before = git(repository, "status", "--porcelain")
    done = run(repository, *TRAIN, "--seeds", 1, 2)
    assert done.returncode == 0 and "| 2 | 300 | 32.0 +- 2.0 |" in done.stdout
    assert git(repository, "status", "--porcelain") == before


def test_other_untracked_files_and_records_may_be_there(repository):
    add("notes.txt")(repository)
    add("benchmarks", "records", "earlier", "build.log")(repository)
    done = run(repository, *TRAIN, "--seeds", 1, "--record", "benchmarks/records/new")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", ["an edit", "a commit"])
def test_a_change_during_the_measurement_leaves_no_record(repository, change):
    """The script itself makes the change."""
    script = repository / "algos" / "script.py"
    code = f"\nopen({str(repository / 'algos' / 'new.py')!r}, 'w').close()\n"
    if change == "a commit":
        words = "git -c user.name=a -c user.email=a@b commit -qm b --allow-empty".split()
        code = f"\nimport subprocess; subprocess.run({words}, cwd={str(repository)!r}, check=True)"
    script.write_text(SCRIPT + code)
    git(repository, "commit", "-aqm", "a script that changes the checkout")
    done = run(repository, *TRAIN, "--seeds", 1, "--record", "record")
    assert done.returncode != 0 and "| 1 | 300 |" in done.stdout  # it was measured and printed
    assert ("commit or stash" if change == "an edit" else "went from commit") in done.stderr
    assert not (repository / "record").exists()


def test_outside_a_repository_the_commit_is_given(repository, tmp_path):
    shutil.rmtree(repository / ".git")
    for given in ({}, {"COMMIT": "06ae543"}, {"COMMIT": "main"}):
        done = run(repository, *TRAIN, "--record", "record", **given)
        assert done.returncode != 0 and "set COMMIT" in done.stderr and done.stdout == ""
    given = {"COMMIT": "0123456789" * 4}
    assert run(repository, *TRAIN, "--seeds", 1, "--record", "record", **given).returncode == 0
    machine = json.loads((repository / "record" / "results.json").read_text())["machine"]
    assert machine["commit"] == given["COMMIT"]


def test_a_folder_inside_another_repository_is_not_a_repository(repository):
    shutil.rmtree(repository / ".git")
    git(repository.parent, "init", "-q")
    git(repository.parent, "add", "-A")
    git(repository.parent, "commit", "-qm", "another project")
    done = run(repository, *TRAIN, "--record", "record")
    assert done.returncode != 0 and "set COMMIT" in done.stderr


@pytest.mark.parametrize("where", [".", "benchmarks", ".."])
def test_the_command_can_be_pasted(repository, where):
    """It starts in the repository's folder, even if the tool was started in another folder."""
    cwd = (repository / where).resolve()
    tool = repository / "benchmarks" / "train.py"
    words = [tool if where == ".." else os.path.relpath(tool, cwd), "--scripts", "script"]
    words += ["--seeds", 1, "--record", repository / "records" / "a new one"]
    words += ["--", "--name", "it's two words", f"--data={repository.parent}/data"]
    done = run(repository, *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    record = repository / "records" / "a new one"
    expected = (
        "python benchmarks/train.py --scripts script --seeds 1 --record 'records/a new one' "
        """-- --name 'it'"'"'s two words' --data=data"""
    )
    page, results = (record / "README.md").read_text(), (record / "results.json").read_text()
    assert f"```bash\n{expected}\n```" in page
    assert json.loads(results)["machine"]["command"] == expected
    assert str(repository.parent) not in page + results


def test_the_contents_of_a_record_of_one_script(repository):
    words = [*TRAIN, "--env-ids", "Acrobot-v1", "--seeds", 5, 3, 9, "--goal", 34, "--jobs", 2]
    done = run(repository, *words, "--record", "record", "--", "--total-timesteps", 400)
    assert done.returncode == 0, done.stderr
    record, commit = repository / "record", git(repository, "rev-parse", "HEAD").strip()
    assert len(commit) == 40
    page = (record / "README.md").read_text()
    for line in (
        "# script on Acrobot-v1",
        "3 of 3 seeds reach the goal of 34 in the final evaluation.",
        "| 5 | 400 | 45.0 +- 2.0 | step 300 | 35.0 |",
        "| 9 | 400 | 49.0 +- 2.0 | step 300 | 39.0 |",
        "python algos/script.py --env-id Acrobot-v1 --total-timesteps 400 --seed SEED",
        f"- commit: {commit}",
    ):
        assert line in page
    assert (record / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (record / "curve.svg").read_text()
    with open(record / "evaluations.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["step"]) for row in rows] == [
        (seed, step) for seed in "539" for step in ("100", "200", "300", "400")
    ]
    assert float(rows[-1]["episodic_return"]) == 49.0
    results = json.loads((record / "results.json").read_text())
    assert results["machine"]["commit"] == commit and len(results["runs"]) == 3


def test_a_record_says_how_long_solved_runs_took(repository):
    done = run(repository, *TRAIN, "--seeds", 7, 1)
    assert done.returncode == 0, done.stderr
    assert "| 7 | 300 | 37.0 +- 2.0 | 301 | 300 | 4 | 0.0 |" in done.stdout
    assert "| 1 | 300 | 31.0 +- 2.0 | never |  |  | 0.0 |" in done.stdout
    assert (
        "1 of 2 runs ended" in done.stdout and "301 episodes, 300 steps, 4 seconds." in done.stdout
    )


def test_the_goal_applies_to_the_final_evaluation(repository):
    """Seed 1 exceeds 20 during the run and ends below it."""
    script = repository / "algos" / "script.py"
    script.write_text(SCRIPT.replace("+ args.seed\n", "- (step == 300 and args.seed == 1) * 20\n"))
    done = run(repository, *TRAIN, "--seeds", 1, 2, "--goal", 20)
    assert "1 of 2 seeds reach the goal of 20 in the final evaluation." in done.stdout
    assert "| 1 | 300 | 10.0 +- 2.0 | step 200 | 10.0 |" in done.stdout
    done = run(repository, *TRAIN, "--seeds", 1, "--goal", 40)
    assert "0 of 1 seed reach" in done.stdout and "| never |  |" in done.stdout


def test_a_failed_run_ends_the_tool_with_its_last_lines(repository):
    done = run(repository, *TRAIN, "--seeds", 1, 13, 2, "--record", "record")
    assert done.returncode != 0 and not (repository / "record").exists()
    assert done.stderr.splitlines() == [
        "a step",
        "the next step",
        "error: thirteen",
        "error: script seed 13 ended with status 3.",
    ]


# A script that trains for a second: one step in 10 ms, a checkpoint of each. It refuses to run
# beside another process of the same run. Ctrl-C ends it as it ends those in algos/.
SLOW = """
import argparse, os, pathlib, signal, sys, time

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int)
parser.add_argument("--resume", type=pathlib.Path)
parser.add_argument("--checkpoint-replay", action="store_true")
args = parser.parse_args()
pids = pathlib.Path("pids")
for pid in pids.read_text().split() if pids.exists() else ():
    command = pathlib.Path("/proc", pid, "cmdline")  # empty: it has ended, nobody asked how
    assert not command.exists() or not command.read_text(), "this run is running"
pids.open("a").write(str(os.getpid()) + " ")
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(True))
checkpoint = args.resume or pathlib.Path("runs/run/checkpoint.pt")
checkpoint.parent.mkdir(parents=True, exist_ok=bool(args.resume))
step = int(checkpoint.read_text()) if args.resume else 0
while step < 100 and not stop:
    step += 1
    pathlib.Path("steps").open("a").write(str(step) + " ")
    pathlib.Path("new.pt").write_text(str(step))
    os.replace("new.pt", checkpoint)
    time.sleep(0.01)
if step < 100:
    print("go on with: python script.py --resume", checkpoint)
    sys.exit()
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

value = Summary.Value(tag="eval/episodic_return", simple_value=args.seed)
writer = EventFileWriter(str(checkpoint.parent))
writer.add_event(Event(step=100, summary=Summary(value=[value])))
writer.close()
print(f"CartPole-v1, step 100, evaluated: {args.seed:.1f} +- 0.0 in 100 episodes")
"""


def study(repository, folder, *words):
    (repository / "algos" / "script.py").write_text(SLOW)
    git(repository, "commit", "-qam", "slow")
    return [
        sys.executable,
        repository / TRAIN[0],
        *TRAIN[1:],
        "--jobs",
        "3",
        *words,
        "--runs",
        folder,
    ]


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_of_a_study(repository, tmp_path, kills):
    """kill -9 at random moments: nothing is lost and nothing runs twice.

    Half of the kills end the tool alone, and its runs outlive it; half end all, like a power cut.
    """
    folder, seeds = tmp_path / "study", [str(seed) for seed in range(32)]
    command = [*map(str, study(repository, folder, "--seeds", *seeds))]
    rng, hidden = np.random.default_rng(0), {"stdout": subprocess.DEVNULL, "env": NO_GIT}
    started = 0
    for kill in range(kills):
        tool = subprocess.Popen(command, **hidden, start_new_session=True)
        deadline = time.monotonic() + 30
        while len([*folder.rglob("pids")]) == started and time.monotonic() < deadline:
            time.sleep(0.01)  # until it has started a run
        time.sleep(rng.uniform(0, 0.7))
        assert tool.poll() is None, "it ended before the kill"
        if kill % 2:
            os.killpg(tool.pid, signal.SIGKILL)
        tool.kill()
        tool.wait()
        started = len([*folder.rglob("pids")])
    assert 0 < started
    done = subprocess.run(command, env=NO_GIT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for seed in seeds:
        (place,) = folder.glob(f"*/*/{seed}")
        # A step between the last checkpoint and the kill is made again, and no other.
        steps = (place / "steps").read_text().split()
        assert [step for step, _ in itertools.groupby(steps)] == [str(i) for i in range(1, 101)]
        assert len(steps) - 100 <= len((place / "pids").read_text().split()) - 1
        assert f"| {seed} | 100 | {seed}.0 +- 0.0 |" in done.stdout
    before = {path: path.read_text() for path in folder.rglob("pids")}
    again = subprocess.run(command, env=NO_GIT, capture_output=True, text=True)
    assert again.stdout.startswith("32 of 32 runs are done already")
    assert again.stdout.split("\n", 1)[1] == done.stdout[done.stdout.index("# script on") :]
    assert before == {path: path.read_text() for path in folder.rglob("pids")}


def test_ctrl_c_stops_a_study(repository, tmp_path):
    folder = tmp_path / "study"
    command = [*map(str, study(repository, folder, "--seeds", "1", "2"))]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": NO_GIT}
    # A shell starts what is sent to the background with SIGINT ignored; undo that for the tool.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    tool = subprocess.Popen(command, start_new_session=True, preexec_fn=listen, **options)
    deadline = time.monotonic() + 30
    while len([*folder.rglob("steps")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(tool.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the runs, too
    _, errors = tool.communicate(timeout=120)
    assert tool.returncode != 0 and "the same command goes on" in errors
    assert not [*folder.rglob("done")] and "Traceback" not in errors
    done = subprocess.run(command, **{key: options[key] for key in ("text", "env")}, stdout=-1)
    assert done.returncode == 0 and "| 2 | 100 | 2.0 +- 0.0 |" in done.stdout


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_comes_after_a_poll(handler):
    """Popen.poll() takes a lock and would keep it; Ctrl-C is sent while it runs."""
    from train import poll

    class Process:
        done = False

        def poll(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            self.done = True
            return 3

    process = Process()
    signal.signal(signal.SIGINT, handler)
    if handler == signal.SIG_IGN:
        assert poll(process) == 3
    else:
        with pytest.raises(KeyboardInterrupt):
            poll(process)
    assert process.done and signal.getsignal(signal.SIGINT) == handler


def test_a_study_has_one_commit_and_one_set_of_flags(repository, tmp_path):
    folder = tmp_path / "study"
    words = [*TRAIN, "--seeds", 1, "--runs", folder]
    assert run(repository, *words).returncode == 0
    done = run(repository, *words, "--", "--total-timesteps", 200)
    assert done.returncode != 0 and "the same flags" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    edit(repository)
    done = run(repository, *words)
    assert done.returncode != 0 and "the same commit" in done.stderr
    git(repository, "commit", "-qam", "edited")
    done = run(repository, *words, "--record", "record")
    assert done.returncode != 0 and "the same commit" in done.stderr
    assert not (repository / "record").exists()
    git(repository, "revert", "--no-edit", "HEAD")  # another commit, the same script
    done = run(repository, *words, "--record", "record")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 of 1 runs are done already")


def test_a_study_goes_on_from_an_earlier_record(repository):
    words = [*TRAIN, "--env-ids", "Acrobot-v1"]
    assert run(repository, *words, "--seeds", 1, 2, "--record", "first").returncode == 0
    first = git(repository, "rev-parse", "HEAD").strip()
    (repository / "notes").write_text("")
    git(repository, "add", "notes")
    git(repository, "commit", "-qm", "not of the script")
    earlier = [*words, "--seeds", 1, 2, 3, 4, "--earlier", "first"]
    done = run(repository, *earlier, "--record", "second")
    assert done.returncode == 0, done.stderr
    trained = [line for line in done.stdout.splitlines() if " min (" in line]
    assert [line.split(":")[0] for line in trained] == [f"script Acrobot-v1 seed {i}" for i in "34"]
    assert f"- `script.py`, Acrobot-v1, seeds 1, 2: commit {first}, " in done.stdout
    # Records of records; all runs are as if they had been made at once.
    done = run(repository, *words, "--seeds", 2, 4, "--earlier", "first", "second")
    assert done.returncode == 0 and " min (" not in done.stdout
    assert f"seed 2: commit {first}, " in done.stdout and "seed 4: commit " in done.stdout
    at_once = run(repository, *words, "--seeds", 1, 2, 3, 4)
    report = at_once.stdout[at_once.stdout.index("# script on") :].rstrip()
    assert report in (repository / "second" / "README.md").read_text()
    done = run(repository, *earlier, "--", "--total-timesteps", 200)
    assert done.returncode != 0 and done.stderr.startswith("error: --earlier first: its flags are")
    done = run(repository, *words, "--earlier", "third")
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1
    (repository / "broken").mkdir()
    (repository / "broken" / "results.json").write_text("{")
    done = run(repository, *words, "--earlier", "broken")
    assert done.returncode != 0 and "no record of train.py" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = run(repository, *TRAIN, "--earlier", "first")
    assert done.returncode != 0 and done.stderr == "error: --earlier needs --env-ids.\n"
    edit(repository)
    git(repository, "commit", "-qam", "edited")
    done = run(repository, *earlier, "--record", "fourth")
    assert done.returncode != 0 and "is not what it was at commit" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (repository / "fourth").exists()


def test_the_contents_of_a_record_of_a_matrix(repository):
    shutil.copy(repository / "algos" / "script.py", repository / "algos" / "other.py")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "two")
    words = ["benchmarks/train.py", "--scripts", "script", "other", "--seeds", 1, 2]
    words += ["--env-ids", "MinAtar/Breakout-v1", "Acrobot-v1", "--record", "record"]
    done = run(repository, *words)
    assert done.returncode == 0, done.stderr
    page = (repository / "record" / "README.md").read_text()
    for line in (
        "# 2 scripts on MinAtar/Breakout-v1, Acrobot-v1",
        "| `other.py` | MinAtar/Breakout-v1 | 31.5 (31.0 to 32.0) | 31.0 to 32.0 | 0.7 | 21.5 |",
        "| script | Acrobot-v1 | 2 | 300 | 32.0 +- 2.0 | 0.0 |",
        "python algos/SCRIPT.py --env-id ENV --seed SEED",
    ):
        assert line in page
    for name in ("curve_MinAtar-Breakout-v1.png", "curve_Acrobot-v1.png"):
        assert f"]({name})" in page and (repository / "record" / name).exists()
    with open(repository / "record" / "evaluations.csv") as file:
        rows = [tuple(row.values())[:3] for row in csv.DictReader(file)]
    expected = itertools.product(("script", "other"), words[8:10], "12", range(3))
    assert rows == [row[:3] for row in expected]


def test_a_run_without_a_final_evaluation_is_an_error(repository):
    script = repository / "algos" / "script.py"
    script.write_text(SCRIPT.replace('print(f"{args.env_id}, step', 'print(f"step'))
    done = run(repository, *TRAIN, "--seeds", 1)
    assert done.returncode != 0 and "script seed 1 ended without a final evaluation" in done.stderr


def test_the_default_environment_of_a_script():
    from train import default_env_id

    for script in (ROOT / "algos").glob("*.py"):
        assert default_env_id(script.stem) == load(script.stem).Args.env_id


@pytest.mark.parametrize("n", range(1, 12))
def test_interquartile_mean(n):
    from scipy.stats import trim_mean
    from train import interquartile_mean

    values = np.random.default_rng(n).normal(size=(n, 3))
    assert np.allclose(interquartile_mean(values), trim_mean(values, 0.25))


def test_bootstrap_interval():
    """Compared with all 5^5 resamples of five seeds."""
    from train import bootstrap_interval, interquartile_mean

    seeds = np.random.default_rng(0).normal(size=(5, 2))
    draws = np.array(list(itertools.product(range(5), repeat=5)))  # (3125, 5)
    means = interquartile_mean(seeds[draws], axis=1)  # (3125, 2)
    expected = np.percentile(means, [2.5, 97.5], axis=0)
    assert np.abs(np.array(bootstrap_interval(seeds)) - expected).max() < 0.05
    low, high = bootstrap_interval(seeds[:, 0])
    assert low.shape == () and low < interquartile_mean(seeds[:, 0]) < high
    low, high = bootstrap_interval(np.full((5, 2), 7.0))
    assert (low == 7).all() and (high == 7).all()


def test_labels_keep_their_order_and_their_mean():
    from figures import spread

    rng = np.random.default_rng(0)
    for n in range(1, 20):
        heights, sizes = np.sort(rng.random(n)), rng.uniform(0.01, 0.1, n)
        middles = np.array(spread(heights, sizes))
        gaps = np.diff(middles) - (sizes[1:] + sizes[:-1]) / 2
        assert (gaps > -1e-9).all()
        # no shift of all labels is closer to their wanted heights
        assert abs((middles - heights).mean()) < 1e-9
    assert spread([0.1, 0.5, 0.9], [0.2, 0.2, 0.2]) == pytest.approx([0.1, 0.5, 0.9])


def check_labels(figure):
    """There is no legend, and the labels beside the axes do not overlap."""
    from matplotlib.text import Text

    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.get_legend() is None
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without its line
        assert len(boxes) > 0
        assert all(box.x0 > axes.get_window_extent().x1 for box in boxes)
        boxes = sorted(boxes, key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:]))


@pytest.mark.parametrize("n", [1, 4, 5])
def test_the_figure_of_learning_curves(n):
    """One to four scripts share the axes; five have a panel each."""
    from train import draw

    steps, names = [100, 200, 300], [f"dqn{i}_cartpole" for i in range(n)]
    run = {"env_id": "CartPole-v1", "episodes": 100, "steps": steps}
    runs = [
        run | {"script": name, "seed": seed, "returns": [10.0, 400.0 + seed, 470.0 + i]}
        for i, name in enumerate(names)
        for seed in range(5)
    ]
    for run in runs:
        run["final_return"] = run["returns"][-1]
    figure = draw(runs, 475.0)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == (5 if n == 5 else 1)
    assert "100 episodes" in figure.get_suptitle()
    if n == 5:
        assert [axes.get_title("left") for axes in shown] == [f"dqn{i}" for i in range(5)]
        assert "steps" in figure.get_supxlabel() and "return" in figure.get_supylabel()
        return
    check_labels(figure)
    texts = [text.get_text() for text in shown[0].texts]
    assert "steps" in shown[0].get_xlabel() and "return, higher is" in shown[0].get_ylabel()
    assert any("goal: 475" in text for text in texts) and len(texts) == n + 1
    lines = [line for line in shown[0].lines if len(line.get_xdata()) == 3]
    assert len(lines) == (1 + 5 if n == 1 else n)
    strong = [line for line in lines if line.get_linewidth() >= 2]
    assert len(strong) == len({line.get_color() for line in strong}) == n  # no colour twice
    for i, line in enumerate(strong):
        assert line.get_ydata() == pytest.approx([10.0, 402.0, 470.0 + i])


def test_curves_meet_at_common_steps():
    from train import common_curve

    runs = [{"steps": [10, 20, 25], "returns": [1, 2, 3]}, {"steps": [10, 20], "returns": [4, 5]}]
    steps, returns = common_curve(runs)
    assert steps.tolist() == [10, 20] and returns.tolist() == [[1, 2], [4, 5]]
    runs[1]["steps"] = [11, 22]
    steps, returns = common_curve(runs)
    assert len(steps) == 0 and returns.shape == (2, 0)


def test_a_record_without_common_steps(repository):
    """Runs that --stop-return ended, each elsewhere, without evaluations before."""
    script = repository / "algos" / "script.py"
    text = script.read_text().replace("range(100,", "range(90 + args.seed,")
    script.write_text(text.replace("+ 1, 100)", "+ 1, 10**6)"))
    git(repository, "commit", "-aqm", "one evaluation")
    done = run(repository, *TRAIN, "--seeds", 1, 2, "--record", "record")
    assert done.returncode == 0, done.stderr
    assert "| unknown |" in (repository / "record" / "README.md").read_text()


def test_the_networks_of_a_record_can_be_evaluated(repository, tmp_path):
    """The network of the median run is in the record; its file gives that run's evaluation."""
    shutil.copy(ROOT / "algos" / "dqn_cartpole.py", repository / "algos")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "a script")
    flags = "--total-timesteps 600 --learning-starts 100 --eval-frequency 0 --eval-episodes 3"
    words = ["benchmarks/train.py", "--scripts", "dqn_cartpole", "--seeds", 1, 2, 3]
    done = run(repository, *words, "--record", "record", "--", *flags.split())
    assert done.returncode == 0, done.stderr
    results = json.loads((repository / "record" / "results.json").read_text())["runs"]
    median = sorted(results, key=lambda run: run["final_return"])[1]
    (file,) = (repository / "record" / "networks").iterdir()
    assert file.name == f"dqn_cartpole_CartPole-v1_seed_{median['seed']}.pt"
    assert file.stat().st_size < 100_000
    page = (repository / "record" / "README.md").read_text()
    command = next(line for line in page.splitlines() if "--evaluate" in line)
    assert command == f"python algos/dqn_cartpole.py --evaluate record/networks/{file.name}"
    shown = run(repository, *command.split()[1:])
    assert shown.returncode == 0, shown.stderr
    assert f"evaluated: {median['final_return']:.1f} +- " in shown.stdout


def test_a_script_that_changes_during_a_study_is_not_run(tmp_path, monkeypatch):
    import train

    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setattr(train, "SOURCES", {})
    (tmp_path / "algos").mkdir()
    file = tmp_path / "algos" / "script.py"
    file.write_text("committed")
    train.check_source("script")
    file.write_text("edited")
    run = train.Run("script", "CartPole-v1", 1)
    with pytest.raises(SystemExit, match="has changed since this command began"):
        train.start(run, [], tmp_path / "place", keep=True)
    assert not (tmp_path / "place" / "log.txt").exists()


@pytest.mark.parametrize(
    ("last", "ended"),
    [
        ("CartPole-v1, step 300, evaluated: 9.0 +- 1.0 in 10 episodes", True),
        ("evaluation stopped after 3 episodes", False),
        ("go on with: python x.py --resume runs/x/checkpoint.pt", False),
    ],
)
def test_a_run_has_ended_with_its_final_evaluation(tmp_path, last, ended):
    """Not with the evaluation before it, if a signal interrupted the final one."""
    from train import has_ended

    before = "CartPole-v1, step 200, evaluated: 8.0 +- 1.0 in 10 episodes"
    (tmp_path / "log.txt").write_text(f"{before}\n{last}\n")
    assert has_ended(tmp_path) == ended


def test_checkpoints_of_networks_and_tables_are_found(tmp_path):
    from train import checkpoints_of

    for name in ("a/checkpoint.pt", "b/checkpoint.npz", "c/checkpoint.partial"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True)
        (tmp_path / "runs" / name).touch()
    assert {file.suffix for file in checkpoints_of(tmp_path)} == {".pt", ".npz"}


def test_a_folder_of_runs_is_used_by_one_call_at_a_time(repository):
    from train import locked

    folder = repository / "study"
    folder.mkdir()
    with locked(folder):
        done = run(repository, *TRAIN, "--runs", "study")
    assert done.returncode == 1 and "another call of this tool is at work in study" in done.stderr
    assert run(repository, *TRAIN, "--runs", "study", "--seeds", 1).returncode == 0


SPEED = ["--script", "script", "--change", "x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["overestimation.py", "--", "--seed", "7"], "--seed after --: use --seeds"),
        (["train.py", "--scripts", "script", "--", "--resume=x"], "--resume after --: use --runs"),
        (["throughput.py", "--peers", "cleanrl"], "cleanrl is not one of CleanRL, LeanRL, Stable-"),
        (
            ["throughput.py", "--peers", "CleanRL"],
            "needs --cleanrl FOLDER, a checkout of github.com",
        ),
        (["throughput.py", "--peers", "Stable-Baselines3 algorithm=PPO"], "DQN or QRDQN"),
        (["throughput.py", "--peers", "Tianshou envs=4"], "Tianshou has no envs, only algorithm, "),
        (["throughput.py", "--peers", "Tianshou num_envs"], "num_envs is not NAME=VALUE"),
        (["throughput.py", "--variants", "num_envs8"], "num_envs8 is not NAME=VALUE"),
        (["throughput.py", "--repeats", "0"], "--repeats and --seconds must be positive"),
        (["throughput.py", "--alone", "--sweep", "precision", "a", "b"], "must be numbers"),
        (["speedrun.py", *SPEED, "--against", "none"], "--against none: no record"),
    ],
)
def test_what_would_give_a_wrong_or_no_result_is_refused(repository, words, message):
    done = run(repository, f"benchmarks/{words[0]}", *words[1:])
    assert done.returncode != 0 and message in done.stderr.splitlines()[-1], done.stderr


def test_one_seed_has_no_interval():
    from train import with_interval

    assert with_interval([3.7]) == "3.7"
    assert with_interval([1.0, 2.0, 3.0]).startswith("2.0 (1.0 to 3.0")


def test_throughput_reads_the_scripts_log():
    """The first 30 entries are 100 steps apart, later ones 50. They are 0.1 s apart."""
    from throughput import TurnFailed, rate_of

    steps = np.cumsum([100] * 30 + [50] * 40)
    times = [(0.1 * i, step) for i, step in enumerate(steps.tolist())]
    assert rate_of(times, times[5:], warm_up=2.5, seconds=3.9) == pytest.approx(500)
    assert rate_of(times, times, warm_up=0.0, seconds=6.9) > 600
    # learning begins at the 36th entry, and the warm-up with it
    assert rate_of(times, times[35:], warm_up=0.0, seconds=3.4) == pytest.approx(500)
    with pytest.raises(TurnFailed, match="raise --seconds"):
        rate_of(times, times[35:], warm_up=3.0, seconds=3.4)
    for learning, warm_up in (([], 3.0), (times, 6.0)):
        with pytest.raises(TurnFailed, match="raise --seconds"):
            rate_of(times, learning, warm_up, seconds=3.0)


def test_a_record_of_throughput(repository):
    """The times are those in the script's log: 500 steps per second after the warm-up."""
    words = ["--alone", "--variants", "script=script", "--repeats", 2, "--seconds", 1]
    words = ["benchmarks/throughput.py", *words, "--warm-up", 1]
    done = run(repository, *words, "--record", "record")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((repository / "record" / "results.json").read_text())
    assert results["steps_per_second"] == {"CleanQ script=script": [pytest.approx(500)] * 2}
    assert (repository / "record" / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "| CleanQ script=script | 500 | 500 | 500 |"
        in (repository / "record" / "README.md").read_text()
    )


def test_a_record_of_a_profile(repository):
    """The page has the table, results.json the numbers; the trace is elsewhere.

    The FLOPs of a step of CartPole, with 4 games, batch 128 and an update in 10 steps, counted by
    hand: layers of D x H weights take 2 D H FLOPs an observation forward, as many for the weights'
    gradient, and as many for the input's, but for the first layer. Every fourth step acts for four
    games."""
    import throughput

    shutil.copy(ROOT / "algos" / "dqn_cartpole.py", repository / "algos")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "a script")
    words = ["--task", "cartpole", "--profile", "../traces", "--record", "record"]
    variant = "start_e=0 end_e=0 num_envs=4"
    done = run(repository, "benchmarks/throughput.py", *words, "--variants", variant)
    assert done.returncode == 0, done.stdout + done.stderr
    record = repository / "record"
    found = json.loads((record / "results.json").read_text())["profiles"][f"CleanQ {variant}"]
    page = (record / "README.md").read_text()
    assert f"## CleanQ {variant}\n" in page and f"| act | {found['parts']['act']:,.1f} |" in page
    assert "the rest: Python, logs, target network" in page
    assert {path.name for path in record.iterdir()} == {"README.md", "results.json"}
    (trace,) = (repository.parent / "traces").glob("*.json.gz")
    assert trace.stat().st_size > 10_000
    sizes = [2 * 4 * 120, 2 * 120 * 84, 2 * 84 * 2]
    update = 128 * (sum(sizes) * 3 + sum(sizes[1:]))  # theta, theta^-, two gradients
    assert found["flops"] == pytest.approx(sum(sizes) + update / 10, rel=0.02)
    assert {"act", "td_loss", "backward", "optimizer.step", "replay.sample"} <= set(found["parts"])
    parts = sum(found["parts"].values())
    assert all(us > 0 for us in found["parts"].values()) and parts < found["step us"]
    shown = throughput.profile_report("DQN", found, matrix=1e9)
    assert f"| act | {found['parts']['act']:,.1f} |" in shown


def test_the_roofline():
    """Half of 100 FLOP/s, at 10 FLOPs a step, is 5 steps/s of 10."""
    import throughput

    assert throughput.rooflines_of({}) == {}  # of older records
    counted = {"matrix_flops": 100.0, "flops_per_step": {"CleanQ": 10.0}}
    assert throughput.rooflines_of(counted) == {"CleanQ": 10.0}
    counted["matrix_rates"] = {"float32": 100.0, "bfloat16": 300.0}
    counted["flops_per_step"] = {"CleanQ": 10.0, "CleanQ precision=bfloat16": 10.0}
    assert [*throughput.rooflines_of(counted).values()] == [10.0, 30.0]
    args = argparse.Namespace(task="cartpole", threads=1, repeats=1, seconds=1)
    args.cleanrl = args.leanrl = None
    rates = {"CleanQ": [5.0], "Stable-Baselines3": [4.0]}
    page = throughput.report_of(args, rates, [1.0], {}, counted)
    assert "| CleanQ | 5 | 5 | 5 | 1.25 | 50% |" in page
    assert "| Stable-Baselines3 | 4 | 4 | 4 | 1.00 |  |" in page
    figure = throughput.draw(rates, throughput.TASKS["cartpole"], {"CleanQ": 10.0})
    assert any(list(line.get_xdata()) == [10.0, 10.0] for line in figure.axes[0].lines)


def test_a_sweep_of_throughput(repository):
    """One side for each value; the figure shows the rates against the values.

    In a sweep over buffer_size learning starts after so many steps, so the warm-up does, too.
    """
    import throughput

    words = ["--alone", "--variants", "script=script", "--sweep", "buffer_size", 2_000, 20_000]
    words = ["benchmarks/throughput.py", *words, "--repeats", 1, "--seconds", 1, "--warm-up", 1]
    done = run(repository, *words, "--record", "record")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((repository / "record" / "results.json").read_text())
    sides = [f"CleanQ script=script buffer_size={n}" for n in (2_000, 20_000)]
    assert list(results["steps_per_second"]) == sides
    figure = throughput.draw_results(results)
    (line,) = [x for x in figure.axes[0].lines if x.get_label() == "CleanQ script=script"]
    assert list(line.get_xdata()) == [2_000, 20_000]
    assert list(line.get_ydata()) == [pytest.approx(500)] * 2
    done = run(repository, *words[:4], "--sweep", "num_envs", 1)
    assert done.returncode != 0 and "--sweep needs an argument" in done.stderr


def test_throughput_without_a_rate_writes_no_record(repository):
    script = repository / "algos" / "script.py"
    script.write_text("print('error: --device must be cpu (it is cuda).')\nraise SystemExit(1)")
    git(repository, "commit", "-aqm", "a script that fails")
    words = ["benchmarks/throughput.py", "--alone", "--variants", "script=script"]
    words += ["--repeats", 1]
    done = run(repository, *words, "--record", "record")
    assert done.returncode != 0 and not (repository / "record").exists()
    assert "not measured: error: --device must be cpu" in done.stdout


OLD_SCRIPT = """
import sys
import gymnasium as gym
import wandb

flags = "--start-e 0.01 --end-e 0.01 --env-id CartPole-v1 --learning-starts 100 --num-envs 2"
assert sys.argv[1:] == flags.split()
wandb.init(project="no one logs this")
make_env = lambda: gym.wrappers.RecordEpisodeStatistics(gym.make("CartPole-v1"))
envs = gym.vector.SyncVectorEnv([make_env] * 2)
envs.reset(seed=1)
lengths = [0, 0]
while True:
    obs, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
    assert ("final_info" in infos) == (terminations | truncations).any()
    for i, info in enumerate(infos.get("final_info", (None, None))):
        lengths[i] += 1
        assert (info is not None) == terminations[i]
        if info is not None:
            assert info["episode"]["l"] == [lengths[i]] == info["episode"]["r"]
            pole = abs(infos["final_observation"][i][2])
            assert pole > 0.2 > abs(obs[i][2])  # it has fallen, and the next episode has begun
            lengths[i] = 0
            wandb.log({"episodes": 1})
"""


def turn_of(side, script=""):
    """What throughput.py measures in one short turn of a peer."""
    import throughput

    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder, "checkout", "cleanrl")
        checkout.mkdir(parents=True)
        (checkout / "dqn.py").write_text(script)
        args = argparse.Namespace(threads=1, warm_up=0.1, seconds=0.3, leanrl=None)
        args.task, args.cleanrl = "cartpole", str(checkout.parent)
        return throughput.time_peer(args, side, folder)


def test_a_turn_of_a_script_for_gymnasium_0(monkeypatch):
    """Its steps and its episodes are those of the environments; a failure is one line."""
    import throughput

    task = {"env_id": "CartPole-v1", "learning_starts": 100}
    monkeypatch.setitem(throughput.TASKS, "cartpole", task)
    assert turn_of("CleanRL num_envs=2", OLD_SCRIPT) > 100
    with pytest.raises(throughput.TurnFailed, match="AssertionError"):
        turn_of("CleanRL num_envs=2", OLD_SCRIPT.replace("pole > 0.2", "pole > 2"))


@pytest.mark.parametrize(
    "side, module",
    [
        ("Stable-Baselines3 num_envs=2", "stable_baselines3"),
        ("Stable-Baselines3 algorithm=QRDQN n_quantiles=5", "sb3_contrib"),
        ("Tianshou num_envs=2", "tianshou"),
        ("Tianshou algorithm=C51", "tianshou"),
        ("Tianshou algorithm=QRDQN n_quantiles=5", "tianshou"),
    ],
)
def test_a_turn_of_a_library(side, module):
    pytest.importorskip(module)
    assert turn_of(side) > 10


def frames_rows():
    """Made-up results of every frame buffer."""
    from buffer_peers import PEERS
    from buffers import SAMPLE_SIZES

    rows = {"plain-copy": {"result": {}}}
    for threads in (1, 2):
        for n in SAMPLE_SIZES:
            for what, seconds in (("copy", 1e-6), ("sample", 1.5e-6)):
                key = f"{what} {n}, {threads} threads"
                rows["plain-copy"]["result"][key] = [[seconds * n] * 3] * 5
    for i, name in enumerate(name for name, peer in PEERS.items() if peer.kind == "frames"):
        result = {f"sample {n}": [[2e-6 * n * 1.02**i] * 3] * 5 for n in SAMPLE_SIZES}
        result |= {"bytes": 7000.0 + i // 2, "add/s": 1e5}
        rows[name] = {"version": "1.0", "memcpy 64 MiB": [1.0, 1.1], "result": result}
    return rows


def test_the_buffer_figures():
    """CleanQ is drawn in strong colours, every peer in a grey, and no colour is used twice."""
    from buffer_peers import PEERS
    from buffers import figures
    from figures import COLOURS
    from matplotlib.colors import to_rgb

    capacities = {f"{kind} {10**k}": [[1e-6 * k]] for k in (4, 5, 6) for kind in ("frames", "tree")}
    rows = frames_rows() | {"capacities": {"result": capacities}}
    drawn = figures(rows)
    assert set(drawn) == {"latency", "memory", "capacity"}
    for name in ("latency", "capacity"):
        check_labels(drawn[name])
    frames = [peer for peer in PEERS.values() if peer.kind == "frames"]
    lines = [x for x in drawn["latency"].axes[0].lines if len(x.get_xdata()) > 2]
    assert len(lines) == len(frames) + 1 == len(drawn["latency"].axes[0].texts)
    colours = [line.get_color() for line in lines]
    assert len({*map(to_rgb, colours)}) == len(lines)
    for peer, colour in zip(frames, colours):
        assert colour in COLOURS if peer.own else len({*to_rgb(colour)}) == 1
    assert drawn["memory"].axes[0].get_legend() is None


def test_the_buffer_tables():
    from buffers import report_of

    rows = frames_rows() | {"cpprb": {"error": "does not install: no such version"}}
    rows |= {"import": {"error": "does not run: ImportError"}}
    report = report_of(rows)
    assert "| fastreplay |" in report and "| does not install: no such version |" in report
    assert "| 256, 2 threads | 256 (256-256) | 384 (384-384) | 1.50 |" in report
    assert "import does not run: ImportError" in report
    assert "Sum-trees, 2^20" not in report and "capacity" not in report  # not measured


def test_a_record_of_buffers(repository):
    words = ["--peers", "cumsum-tree", "--repeats", 1, "--seconds", 0.01]
    done = run(repository, "benchmarks/buffers.py", *words, "--record", "record")
    assert done.returncode == 0, done.stderr
    page = (repository / "record" / "README.md").read_text()
    assert "| torch cumsum + searchsorted |" in page and "does not run" not in page
    assert f"- commit: {git(repository, 'rev-parse', 'HEAD').strip()}" in page


def test_the_table_of_records():
    """Every record has a row. Records from a dirty checkout say so at the top and in the table."""
    page = (ROOT / "benchmarks" / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[(\S+)\]\(records/\1\) (\|.*)$", page, re.MULTILINE))
    assert set(rows) == {folder.name for folder in RECORDS.iterdir()}
    for name, row in rows.items():
        readme, results = RECORDS / name / "README.md", RECORDS / name / "results.json"
        text = readme.read_text()
        recorded = re.search(r"^- commit: (\w+)(-dirty)?$", text, re.MULTILINE)
        if not recorded:
            assert not results.exists() and "not recorded" in row  # no measurement
            continue
        commit, dirty = recorded.groups()
        assert f"| {commit} | {'dirty' if dirty else 'clean'} |" in row
        assert text.startswith("> **Not a result:** ") == bool(dirty)
        assert ("not a result" in row) == bool(dirty)
