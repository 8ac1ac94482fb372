"""Writes the tables of results in README.md and benchmarks/README.md from the records.

    python benchmarks/results.py            # after a new record
    python benchmarks/results.py --check    # only compare; exits 1 if a table differs

A whole table stands between two comments, the first of which names its kind and its records:

    <!-- results: learning 2026-01-01_cartpole 2026-01-02_acrobot -->
    <!-- end of results -->

Kinds: `learning` (records of train.py; RECORD/SCRIPT takes one script of a record), `minatar` (the
same, one column for each game), `atari` (the same, a row for each run), `throughput`, `speedrun`
and `overestimation` (of those tools), `growth` (of storage.py). A word rows=PATTERN keeps the rows
whose name it matches, a regular expression without spaces. In any other table, a row that names a
script and links a record of train.py or tabular.py has its "5 of 5" from that record: how many
seeds reached the goal.
"""

import argparse
import difflib
import json
import math
import re
import statistics
import sys

from machine import ROOT
from overestimation import value_table
from speedrun import median_seconds, words
from tabular import TOLERANCE
from throughput import algorithm_of, rooflines_of
from train import grouped, interquartile_mean, table_row, with_interval

PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
BLOCK = re.compile(
    r"(?P<begin><!-- results: (?P<kind>\w+) (?P<records>[^>]*?) -->\n)"
    r".*?(?P<end><!-- end of results -->)",
    re.S,
)
REACHED = re.compile(r"\b\d+ of \d+\b")
NAMES = {"QRDQN": "QR-DQN"}  # Stable-Baselines3's and Tianshou's
# Flags that do not change what is learned, and --total-timesteps, which has its own column.
NOT_LEARNING = re.compile(
    r"--(total-timesteps|torch-threads|eval-\w+|checkpoint-frequency) \S+ ?|--checkpoint-replay ?"
)


def read_record(name):
    """The contents of a record's results.json. Exits with one line if there is none."""
    file = ROOT / "benchmarks" / "records" / name / "results.json"
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        sys.exit(f"error: a table needs the record {name}, which cannot be read ({e}).")
    if "script" in record:  # of one script, which older records do not repeat for each run
        record["runs"] = [{"script": record["script"]} | run for run in record["runs"]]
    return record


def link(name, page, text="record"):
    """A Markdown link from a page to a record."""
    place = (ROOT / "benchmarks" / "records" / name).relative_to(page.parent)
    return f"[{text}]({place.as_posix()})"


def reaches(run):
    """Whether a run of train.py reached its goal: in the last evaluation, or with --stop-return the
    mean of its last 100 training episodes."""
    stops = run["arguments"].get("stop_return", "None") != "None" and "solved" in run
    return bool(run["solved"]) if stops else run["reaches_goal"]


def learning_table(records, page):
    """A row for each script and environment: seeds at the goal, final evaluations."""
    head = ["script", "environment", "goal", "seeds that reach it"]
    head += ["final evaluations: interquartile mean (95% interval)", "lowest to highest"]
    lines = [table_row([*head, "record"])]
    lines += [table_row(["---", "---", "---:", "---:", "---:", "---:", "---"])]
    for word in records:
        name, _, only = word.partition("/")
        record = read_record(name)
        if record.get("goal") is None:
            sys.exit(f"error: the record {name} has no goal; use the kind minatar.")
        for (script, env_id), runs in grouped(record["runs"], "script", "env_id").items():
            if only not in ("", script):
                continue
            final = [run["final_return"] for run in runs]
            cells = [f"`{script}.py`", env_id, f"{record['goal']:g}"]
            cells += [f"{sum(map(reaches, runs))} of {len(runs)}", with_interval(final)]
            cells += [f"{min(final):.1f} to {max(final):.1f}", link(name, page)]
            lines.append(table_row(cells))
    return lines


def minatar_table(records, page):
    """A row for each script, a column for each game: interquartile mean, lowest to highest."""
    games, rows = {}, {}  # {game: its record}, {script: {game: cell}}
    for name in records:
        groups = grouped(read_record(name)["runs"], "script", "env_id")
        for (script, env_id), runs in groups.items():
            game = env_id.removeprefix("MinAtar/").removesuffix("-v1")
            final = [run["final_return"] for run in runs]
            cell = f"{interquartile_mean(final):.1f} ({min(final):.1f} to {max(final):.1f}), "
            cell += f"{len(final)} seed{'s' * (len(final) > 1)}"
            games[game], rows[script] = name, rows.get(script, {}) | {game: cell}
    head = ["script", *(link(name, page, game) for game, name in games.items())]
    lines = [table_row(head), table_row(["---", *["---:"] * len(games)])]
    for script, cells in rows.items():
        lines.append(table_row([f"`{script}.py`", *(cells.get(game, "") for game in games)]))
    return lines


def atari_table(records, page):
    """A row for each run: its flags, its best and its last evaluation."""
    head = ["game", "file and flags", "seed", "steps", "hours", "best evaluation", "at step"]
    lines = [table_row([*head, "last evaluation", "record"])]
    lines += [table_row(["---", "---", *["---:"] * 6, "---"])]
    for name in records:
        record = read_record(name)
        flags = NOT_LEARNING.sub("", " ".join(record.get("flags", []))).strip()
        for run in record["runs"]:
            best, step = max(zip(run["returns"], run["steps"]), key=lambda found: found[0])
            command = f"`{run['script']}.py {flags}".strip() + "`"
            cells = [run["env_id"].removesuffix("NoFrameskip-v4"), command, f"{run['seed']}"]
            cells += [f"{run['steps'][-1]:,}", f"{run['seconds'] / 3600:.1f}"]
            cells += [f"{best:.1f}", f"{step:,}"]
            cells += [f"{run['final_return']:.1f} +- {run['final_std']:.1f}", link(name, page)]
            lines.append(table_row(cells))
    return lines


def side_name(side, atari):
    """A side in words: "CleanRL script=c51" -> "CleanRL `c51.py`, 1 environment"."""
    name, *words = side.split()
    options = dict(word.split("=") for word in words)
    n = int(options.get("num_envs", 1))
    if name in ("Stable-Baselines3", "Tianshou"):
        name += " " + NAMES.get(options.get("algorithm"), options.get("algorithm", "DQN"))
    elif name in ("CleanRL", "LeanRL"):
        name += f" `{options.get('script', 'dqn_atari' if atari else 'dqn')}.py`"
        name += ", compiled" if options.get("compile") == "True" else ""
    else:
        name = f"`{options.get('script', 'dqn_atari' if atari else 'dqn_cartpole')}.py`"
    name += ", bfloat16" if options.get("precision") == "bfloat16" else ""
    name += ", plain frames" if options.get("replay_storage") == "plain" else ""
    return f"{name}, {n} environment{'s' * (n > 1)}"


def throughput_table(records, page):
    """A row for each side. The ratio is that to the fastest peer of the same algorithm.
    The roofline, if the record has it, is what the rate of matrix products allows."""
    (name,) = records
    record = read_record(name)
    rates = {side: r for side, r in record["steps_per_second"].items() if r}
    fastest = {}
    for side, r in rates.items():
        if not side.startswith("CleanQ"):
            algorithm = algorithm_of(side)
            fastest[algorithm] = max(statistics.median(r), fastest.get(algorithm, 0))
    task = record["task"]
    head = f"{task['env_id']}, batch {task['batch_size']}, "
    head += f"an update every {task['train_frequency']} steps"
    rooflines, atari = rooflines_of(record), "NoFrameskip" in task["env_id"]
    columns = [head, "agent steps/s, median (lowest to highest)", "ratio to the peer"]
    columns += ["share of the roofline"] if rooflines else []
    lines = [table_row(columns), table_row(["---", *["---:"] * (len(columns) - 1)])]
    for side, r in rates.items():
        middle, peer = statistics.median(r), fastest.get(algorithm_of(side))
        cell = f"{middle:,.0f} ({min(r):,.0f} to {max(r):,.0f})"
        cells = [side_name(side, atari), cell, f"{middle / peer:.2f}" if peer else ""]
        if rooflines:
            cells.append(f"{middle / rooflines[side]:.0%}" if side in rooflines else "")
        lines.append(table_row(cells))
    return lines


def growth_table(records, page):
    """A row for each game of storage.py's growth: the last point, when all frames are stored."""
    head = ["game", "play", "frames", "bytes a frame", "resident memory, MB", "record"]
    lines = [table_row(head), table_row(["---", "---", "---:", "---:", "---:", "---"])]
    for name in records:
        for game, how, parts in read_record(name)["rows"]:
            last = parts["growth"]["growth"][-1]
            cells = [game, how, f"{last['frames']:,}", f"{last['bytes']:.0f}"]
            cells += [f"{last['resident'] / 1e6:,.0f}", link(name, page)]
            lines.append(table_row(cells))
    return lines


def speedrun_table(records, page):
    """A row for each speed run: its median, the fastest and the slowest seed."""
    head = ["environment", "goal", "file and flags", "seconds, median (seeds)", "steps, median"]
    lines = [table_row([*head, "record"]), table_row(["---", "---:", "---", "---:", "---:", "---"])]
    for name in records:
        record = read_record(name)
        runs = record["runs"]
        solved = [run for run in runs if run["steps"]]
        flags = record["command"].split("--eval-episodes 0", 1)[1].strip()
        seconds = [run["seconds"] for run in solved] or [math.inf]
        times = f"{words(median_seconds(runs))} ({min(seconds):.1f} to {max(seconds):.1f}; "
        times += f"{len(solved)} of {len(runs)} seeds)"
        command = f"`{record['script']}.py {flags}".strip() + "`"
        cells = [record["env_id"], f"{record['goal']:g}", command, times]
        steps = statistics.median([run["steps"] for run in solved] or [math.nan])
        lines.append(table_row([*cells, f"{steps:,.0f}", link(name, page)]))
    return lines


def overestimation_table(records, page):
    """The values of overestimation.py: of each environment and algorithm, predicted and true."""
    head, rule, rows = "", "", []
    for name in records:
        head, rule, *found = value_table(read_record(name)["runs"])
        rows += [f"{row} {link(name, page)} |" for row in found]
    return [f"{head} record |", f"{rule} --- |", *rows]


TABLES = {
    "overestimation": overestimation_table,
    "learning": learning_table,
    "minatar": minatar_table,
    "atari": atari_table,
    "throughput": throughput_table,
    "growth": growth_table,
    "speedrun": speedrun_table,
}


def seeds_at_goal(name, script):
    """How many seeds of a script reached their goal in a record, as "4 of 5"; None if unknown.

    In a record of tables: that are optimal in every environment.
    """
    record = read_record(name)
    if "learning" in record:
        found = [x for x in record["learning"] if x["script"] == script]
        best = [[abs(y - x["optimum"]) <= TOLERANCE for y in x["returns"]] for x in found]
        return f"{sum(map(all, zip(*best)))} of {len(best[0])}" if best else None
    runs = [run for run in record.get("runs", []) if run.get("script") == script]
    if not runs or any("reaches_goal" not in run for run in runs):
        return None
    return f"{sum(map(reaches, runs))} of {len(runs)}"


def with_counts(line):
    """A table's row with its "5 of 5" from the record that it links."""
    record = re.search(r"\((?:benchmarks/)?records/([\w.-]+)\)", line)
    script = re.search(r"`(\w+)\.py", line)
    if not (line.startswith("|") and record and script and REACHED.search(line)):
        return line
    found = seeds_at_goal(record[1], script[1])
    return REACHED.sub(found, line, count=1) if found else line


def written(text, page):
    """The text of a page with its tables from the records."""

    def table(block):
        if block["kind"] not in TABLES:
            sys.exit(f"error: {page.name}: unknown table {block['kind']}; use {', '.join(TABLES)}.")
        words = block["records"].split()
        patterns = [word[len("rows=") :] for word in words if word.startswith("rows=")]
        records = [word for word in words if not word.startswith("rows=")]
        head, rule, *rows = TABLES[block["kind"]](records, page)
        rows = [row for row in rows if all(re.search(x, row.split(" | ")[0]) for x in patterns)]
        lines = [head, rule, *rows]
        return block["begin"] + "\n".join(lines) + "\n" + block["end"]

    text = BLOCK.sub(table, text)
    return "\n".join(map(with_counts, text.split("\n")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one differs")
    args = parser.parse_args()
    differ = False
    for page in PAGES:
        before = page.read_text()
        after = written(before, page)
        name = page.relative_to(ROOT).as_posix()
        lines = difflib.unified_diff(
            before.split("\n"), after.split("\n"), name, name, "", "", 0, ""
        )
        differ |= before != after
        if args.check:
            print("\n".join(lines), end="\n" * (before != after))
        elif before != after:
            page.write_text(after)
            print(f"{name}: tables written")
    if args.check and differ:
        sys.exit("error: these lines differ from their records: run python benchmarks/results.py.")


if __name__ == "__main__":
    main()
