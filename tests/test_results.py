"""benchmarks/results.py: the tables of the pages are those of the records."""

import json
import shutil
import sys

import forked
import pytest
from test_benchmarks import ROOT, run

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture
def project(tmp_path):
    """Two pages without a table, and the tools."""
    ignore = shutil.ignore_patterns("records", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=ignore)
    (tmp_path / "README.md").write_text("# Title\n")
    (tmp_path / "benchmarks" / "README.md").write_text("# Benchmarks\n")
    return tmp_path


def write_record(project, name, results):
    folder = project / "benchmarks" / "records" / name
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))


def make_run(script, seed, final, env_id="CartPole-v1", **others):
    run = {"script": script, "env_id": env_id, "seed": seed, "final_return": final}
    return run | {"reaches_goal": final >= 475, "arguments": {}} | others


def results(project, *words):
    return run(project, "benchmarks/results.py", *words)


def test_the_pages_are_those_of_the_records():
    done = forked.run([sys.executable, "benchmarks/results.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<!-- results: " in (ROOT / "README.md").read_text()


def test_a_table_of_learning(project):
    finals = [500.0, 100.0, 480.0, 490.0]
    runs = [make_run("dqn_cartpole", seed, final) for seed, final in enumerate(finals)]
    write_record(project, "one", {"goal": 475, "runs": runs})
    page = project / "benchmarks" / "README.md"
    page.write_text("Before\n\n<!-- results: learning one -->\n<!-- end of results -->\n\nAfter\n")
    assert results(project, "--check").returncode == 1
    assert results(project).returncode == 0
    text = page.read_text()
    row = next(line for line in text.splitlines() if "dqn_cartpole" in line)
    assert row.startswith("| `dqn_cartpole.py` | CartPole-v1 | 475 | 3 of 4 | 485.0 (")
    assert row.endswith(" | 100.0 to 500.0 | [record](records/one) |")
    assert text.startswith("Before\n\n<!-- ") and text.endswith(" -->\n\nAfter\n")
    assert results(project, "--check").returncode == 0
    page.write_text(text.replace("3 of 4", "4 of 4"))  # by hand
    found = results(project, "--check")
    assert (
        found.returncode == 1
        and "-| `dqn_cartpole.py` | CartPole-v1 | 475 | 4 of 4" in found.stdout
    )
    assert "run python benchmarks/results.py" in found.stderr
    assert page.read_text() == text.replace("3 of 4", "4 of 4")  # --check writes nothing
    results(project)
    assert page.read_text() == text


def test_one_script_of_a_record(project):
    """Also of an older record, whose runs do not name their script."""
    runs = [make_run(script, 1, final) for script, final in (("a", 500), ("b", 0))]
    write_record(project, "both", {"goal": 475, "runs": runs})
    old = {key: value for key, value in make_run("c", 1, 480).items() if key != "script"}
    write_record(project, "old", {"goal": 475, "script": "c", "runs": [old]})
    page = project / "README.md"
    page.write_text("<!-- results: learning both/b old -->\n<!-- end of results -->\n")
    assert results(project).returncode == 0
    rows = page.read_text().splitlines()[3:-1]
    assert [row.split(" | ")[0] for row in rows] == ["| `b.py`", "| `c.py`"]
    assert [row.split(" | ")[3] for row in rows] == ["0 of 1", "1 of 1"]


def test_a_row_that_links_a_record(project):
    """In other tables the count is that of the row's script; prose and other rows stay."""
    runs = [make_run("a", seed, final) for seed, final in enumerate([500, 500, 0])]
    stopped = {"arguments": {"stop_return": "-90"}}
    runs += [make_run("b", 1, -95, **stopped, solved=[-90, 1, 2, 3])]
    runs += [make_run("b", 2, -300, **stopped, solved=None)]
    write_record(project, "two", {"goal": 475, "runs": runs})
    tables = [{"script": "t", "optimum": 1.0, "returns": x} for x in ([1.0, 1.0], [0.5, 1.0])]
    write_record(project, "tables", {"learning": tables})
    page = project / "README.md"
    link = "(benchmarks/records/two)"
    page.write_text(
        f"| [`a.py`](algos/a.py) | [9 of 9]{link} |\n"
        f"| `b.py --flag` | 0 of 2 | [record]{link} |\n"
        f"| `c.py` | 7 of 7 | [record]{link} |\n"
        f"| `t.py` | 0 of 2 | [record](benchmarks/records/tables) |\n"
        f"Of `a.py`, 9 of 9 [record]{link}\n"
    )
    assert results(project).returncode == 0
    counts = [line.split(" of ")[0][-1] for line in page.read_text().splitlines()]
    assert counts == ["2", "1", "7", "1", "9"]


def test_a_table_of_minatar(project):
    games = ("MinAtar/Breakout-v1", "MinAtar/Asterix-v1")
    runs = [make_run("a", seed, 2.0 * seed, game) for game in games for seed in (1, 2, 3)]
    runs += [make_run("b", 1, 7.0, games[0])]
    write_record(project, "games", {"goal": None, "runs": runs})
    page = project / "README.md"
    page.write_text("<!-- results: minatar games -->\n<!-- end of results -->\n")
    assert results(project).returncode == 0
    place = "benchmarks/records/games"
    assert page.read_text().splitlines()[1:-1] == [
        f"| script | [Breakout]({place}) | [Asterix]({place}) |",
        "| --- | ---: | ---: |",
        "| `a.py` | 4.0 (2.0 to 6.0), 3 seeds | 4.0 (2.0 to 6.0), 3 seeds |",
        "| `b.py` | 7.0 (7.0 to 7.0), 1 seed |  |",
    ]


def test_a_table_of_atari(project):
    """The flags that change what is learned, the best evaluation and its step, the last one."""
    flags = "--total-timesteps 3000 --n-step 3 --torch-threads 1 --eval-episodes 20"
    flags += " --checkpoint-frequency 1 --checkpoint-replay --adam-eps 1e-5"
    evaluations = {"steps": [1000, 2000, 3000], "returns": [-21.0, 4.0, 3.5], "final_std": 1.25}
    runs = [make_run("a", 7, 3.5, "PongNoFrameskip-v4", seconds=5400.0, **evaluations)]
    write_record(project, "pong", {"flags": flags.split(), "runs": runs})
    write_record(project, "old", {"runs": runs})
    page = project / "README.md"
    page.write_text("<!-- results: atari pong old -->\n<!-- end of results -->\n")
    assert results(project).returncode == 0
    rest = "| 7 | 3,000 | 1.5 | 4.0 | 2,000 | 3.5 +- 1.2 | [record](benchmarks/records/"
    assert page.read_text().splitlines()[3:-1] == [
        f"| Pong | `a.py --n-step 3 --adam-eps 1e-5` {rest}pong) |",
        f"| Pong | `a.py` {rest}old) |",
    ]


def test_a_table_of_throughput(project):
    """The peer is the fastest of the same algorithm; C51 without one has no ratio."""
    rates = {"CleanQ script=dqn_cartpole num_envs=4": [3000.0, 4000.0, 5000.0]}
    rates |= {"CleanQ script=c51_cartpole": [1.0], "CleanRL": [900.0, 1000.0, 1100.0]}
    rates |= {"Stable-Baselines3 num_envs=4": [2000.0]}
    rates |= {"Stable-Baselines3 algorithm=QRDQN n_quantiles=25": []}
    task = {"env_id": "CartPole-v1", "batch_size": 128, "train_frequency": 10}
    write_record(project, "speed", {"steps_per_second": rates, "task": task})
    page = project / "README.md"
    page.write_text("<!-- results: throughput speed -->\n<!-- end of results -->\n")
    assert results(project).returncode == 0
    assert page.read_text().splitlines()[3:-1] == [
        "| `dqn_cartpole.py`, 4 environments | 4,000 (3,000 to 5,000) | 2.00 |",
        "| `c51_cartpole.py`, 1 environment | 1 (1 to 1) |  |",
        "| CleanRL `dqn.py`, 1 environment | 1,000 (900 to 1,100) | 0.50 |",
        "| Stable-Baselines3 DQN, 4 environments | 2,000 (2,000 to 2,000) | 1.00 |",
    ]
    block = "throughput speed rows=`dqn_|Stable -->"
    page.write_text(f"<!-- results: {block}\n<!-- end of results -->\n")
    assert results(project).returncode == 0
    names = [line.split(" | ")[0] for line in page.read_text().splitlines()[3:-1]]
    ours, theirs = "`dqn_cartpole.py`, 4 environments", "Stable-Baselines3 DQN, 4 environments"
    assert names == ["| " + ours, "| " + theirs]


def test_a_table_of_throughput_on_atari(project):
    """The scripts' names are those of Atari. 10 of 40 steps/s that the processor allows: 25%."""
    record = {"steps_per_second": {"CleanQ num_envs=8": [10.0], "CleanRL": [4.0]}}
    record |= {"flops_per_step": {"CleanQ num_envs=8": 2e6}, "matrix_flops": 8e7}
    env_id = "BreakoutNoFrameskip-v4"
    record["task"] = {"env_id": env_id, "batch_size": 32, "train_frequency": 4}
    write_record(project, "speed", record)
    page = project / "README.md"
    page.write_text("<!-- results: throughput speed -->\n<!-- end of results -->\n")
    assert results(project).returncode == 0
    assert page.read_text().splitlines()[3:-1] == [
        "| `dqn_atari.py`, 8 environments | 10 (10 to 10) | 2.50 | 25% |",
        "| CleanRL `dqn_atari.py`, 1 environment | 4 (4 to 4) | 1.00 |  |",
    ]


def test_a_table_of_growth(project):
    """The numbers are those of the last point."""
    points = [{"frames": 10, "bytes": 99.0, "resident": 1e6}]
    points += [{"frames": 2_000, "bytes": 48.4, "resident": 4.1e7}]
    write_record(project, "growth", {"rows": [["Pong", "sticky", {"growth": {"growth": points}}]]})
    page = project / "README.md"
    page.write_text("<!-- results: growth growth -->\n<!-- end of results -->\n")
    assert results(project).returncode == 0
    (row,) = page.read_text().splitlines()[3:-1]
    assert row.startswith("| Pong | sticky | 2,000 | 48 | 41 | [record](")


def test_a_table_of_overestimation(project):
    """Means over the second half of training; the last row is the difference, seed by seed."""
    runs = []
    for name, bias in (("dqn", 4.0), ("ddqn", 1.0)):
        for seed in (1, 2):
            values = {"steps": [10, 20], "predicted": [99.0, 5.0 + bias], "true": [0.0, 5.0]}
            values |= {"returns": [0.0, 7.0], "algorithm": name}
            runs.append(make_run(f"{name}_cartpole", seed, 7.0, **values))
    write_record(project, "values", {"runs": runs})
    page = project / "README.md"
    page.write_text("<!-- results: overestimation values -->\n<!-- end of results -->\n")
    assert results(project).returncode == 0
    end = "| [record](benchmarks/records/values) |"
    assert page.read_text().splitlines()[3:-1] == [
        "| CartPole-v1 | DQN | 9 (9 to 9) | 5 (5 to 5) | 4 (4 to 4) | 7 (7 to 7) " + end,
        "| CartPole-v1 | Double DQN | 6 (6 to 6) | 5 (5 to 5) | 1 (1 to 1) | 7 (7 to 7) " + end,
        "| CartPole-v1 | DQN - Double DQN |  |  | 3 (3 to 3) |  " + end,
    ]


def test_a_table_of_speed_runs(project):
    runs = [{"seconds": 20.0 + i, "steps": 1000 * (i + 1)} for i in range(2)]
    runs += [{"seconds": 5.0, "steps": None}]
    record = {"script": "dqn_cartpole", "env_id": "CartPole-v1", "goal": 475, "runs": runs}
    record["command"] = "python algos/dqn_cartpole.py --eval-episodes 0 --num-envs 16"
    write_record(project, "fast", record)
    page = project / "README.md"
    page.write_text("<!-- results: speedrun fast -->\n<!-- end of results -->\n")
    assert results(project).returncode == 0
    assert page.read_text().splitlines()[3] == (
        "| CartPole-v1 | 475 | `dqn_cartpole.py --num-envs 16` | "
        "21.0 s (20.0 to 21.0; 2 of 3 seeds) | 1,500 | [record](benchmarks/records/fast) |"
    )


@pytest.mark.parametrize(
    ("block", "message"),
    [("learning nothing", "needs the record nothing"), ("sorcery one", "unknown table sorcery")],
)
def test_what_a_page_asks_for_must_exist(project, block, message):
    page = project / "README.md"
    page.write_text(f"<!-- results: {block} -->\n<!-- end of results -->\n")
    done = results(project)
    assert done.returncode != 0 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
