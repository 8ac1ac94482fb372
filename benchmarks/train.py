"""Learning curves of scripts x environments x seeds, resumable after a kill.

    python benchmarks/train.py --scripts dqn_cartpole --goal 475 --jobs 2 \\
        --record benchmarks/records/2026-01-01_dqn_cartpole
    python benchmarks/train.py --scripts dqn_cartpole ddqn_cartpole --jobs 2 --runs ../study \\
        --env-ids MinAtar/Breakout-v1 MinAtar/Asterix-v1 --record ../study_record

Every run is `python algos/SCRIPT.py --env-id ENV --seed SEED`; flags after `--` go to every script.
With --runs the runs stay in that folder, and the same command, given again after a kill, goes on
where it stopped: finished runs are kept, others continue from their checkpoint, bit for bit. With
--earlier, runs of records are not made again, as long as the script and csrc/ are the same.
Without --record the tool only prints the report. With it, the record's folder contains README.md
(report, command, commit, versions, machine), the figures, evaluations.csv and results.json; and of
each script and environment the network of the run with the median result, for `--evaluate`.
"""

import argparse
import contextlib
import copy
import csv
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from figures import curve_of_runs, draw_curves, pyplot, save, short_names
from machine import ROOT, clean_commit, commit_of, option, quote, same_at, write_record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESAMPLES = 10_000
LARGEST_NETWORK = 2 * 2**20  # bytes; a record holds no larger one
# What `--evaluate` reads of a checkpoint.
EVALUATED_PARTS = "script args q_network global_step episodes seconds recent_returns".split()
# What a script logs of its values at each evaluation: columns of evaluations.csv, and the tags.
VALUES = {
    "predicted": "predicted_value",
    "true": "true_value",
    "overestimation_ci95": "overestimation_ci95",
}
# The line that a script prints after an evaluation.
EVALUATED = re.compile(r"(\S+), step ([\d,]+), evaluated: (\S+) \+- (\S+) in (\d+) ")
# The line of a run that ended because of --stop-return.
SOLVED = re.compile(r"--stop-return (\S+), after (\d+) episodes, (\d+) steps and (\S+) seconds")


class Run(NamedTuple):
    """One training. `env_id` is None where the script's own is not known."""

    script: str
    env_id: str | None
    seed: int

    def __str__(self) -> str:
        return " ".join([self.script, *([self.env_id] if self.env_id else []), f"seed {self.seed}"])

    def place(self, folder: Path) -> Path:
        return folder / self.script / (self.env_id or "default").replace("/", "-") / str(self.seed)

    def flags(self) -> list[str]:
        return [*(["--env-id", self.env_id] if self.env_id else []), "--seed", str(self.seed)]


def interquartile_mean(values, axis=0):
    """Mean without the lowest and the highest quarter; of n values, floor(n / 4) on each side."""
    values = np.sort(np.asarray(values, np.float64), axis=axis)
    n = values.shape[axis]
    return values.take(range(n // 4, n - n // 4), axis=axis).mean(axis=axis)


def bootstrap_interval(values, resamples=RESAMPLES, statistic=interquartile_mean):
    """95% percentile bootstrap of the interquartile mean, or another statistic, over seeds.

    `values`: (seeds, ...). Returns (low, high), each of shape (...). Whole seeds are drawn, so one
    resample is a set of curves. All seeds use the same environment, the only stratum.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    seeds = np.random.default_rng(0).integers(n, size=(n, resamples))
    columns = values.reshape(n, -1).T
    means = [statistic(column[seeds], axis=0) for column in columns]  # each (resamples,)
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def through_frames(script, env_id):
    """Whether a script for Atari plays MinAtar."""
    return script.endswith("_atari") and (env_id or "").startswith("MinAtar/")


def program(script, env_id):
    """The words that call a script, after `python`."""
    if through_frames(script, env_id):
        return ["benchmarks/minatar_frames.py", script]
    return [f"algos/{script}.py"]


def files_of(script, env_id):
    """What a run depends on, beside its arguments."""
    files = [f"algos/{script}.py", "csrc"]
    if through_frames(script, env_id):
        files += ["benchmarks/minatar_frames.py", "algos/dqn_cartpole.py"]
    return files


SOURCES = {}  # the scripts' texts when the commit was looked up


def check_source(script):
    """Exit if a script is not what it was at the first call: a run would be of another commit."""
    file = ROOT / "algos" / f"{script}.py"
    text = file.read_text() if file.exists() else ""
    if SOURCES.setdefault(script, text) != text:
        sys.exit(f"error: algos/{script}.py has changed since this command began; put it back.")


def default_env_id(script):
    """The environment that a script names as its default, or None if none is found."""
    text = (ROOT / "algos" / f"{script}.py").read_text()
    found = re.search(r'^    env_id: str = "(.+?)"', text, re.MULTILINE)
    return found and found[1]


def poll(process):
    """`process.poll()`, with a Ctrl-C only after it.

    Within it, Ctrl-C can leave a lock taken, and then `process.wait()` waits for ever.
    """
    handler, interrupts = signal.getsignal(signal.SIGINT), []
    if not callable(handler):  # Ctrl-C is ignored
        return process.poll()
    try:
        signal.signal(signal.SIGINT, lambda *signal_and_frame: interrupts.append(signal_and_frame))
        status = process.poll()
    finally:
        signal.signal(signal.SIGINT, handler)
    for signal_and_frame in interrupts:
        handler(*signal_and_frame)
    return status


def run_all(runs, flags, folder, jobs, keep=False):
    """Train the runs that are not done, `jobs` at a time. -> {run: seconds}

    Exits at the end if some failed.

    A run's process holds a lock on the run's folder. So a run that outlived a killed call of this
    tool is waited for, not started twice. With `keep`, runs save their replay in checkpoints, and
    go on from them.
    """
    todo = [run for run in runs if not (run.place(folder) / "done").exists()]
    n, running, failed, seconds = len(runs), {}, [], {}
    if len(todo) < n:
        print(f"{n - len(todo)} of {n} runs are done already", flush=True)
    try:
        while todo or running:
            while todo and len(running) < jobs:
                run = todo.pop(0)
                running[run] = start(run, flags, run.place(folder), keep), time.monotonic()
            time.sleep(0.1)
            for run, (process, begin) in list(running.items()):
                if process is None:  # it outlived an earlier call
                    lock = locked(run.place(folder))
                    if lock:  # now it has ended: started again, it only repeats its evaluation
                        lock.close()
                        del running[run]
                        todo.insert(0, run)
                    continue
                if poll(process) is None:
                    continue
                del running[run]
                place = run.place(folder)
                if process.returncode != 0 or not has_ended(place):
                    failed.append((run, process.returncode))
                    continue
                (place / "done").touch()
                seconds[run] = time.monotonic() - begin
                line = f"{run}: {seconds[run] / 60:.1f} min"
                line += f" ({n - len(todo) - len(running) - len(failed)} of {n})"
                left = np.mean([*seconds.values()]) * (len(todo) + len(running) / 2) / jobs
                line += f", about {left / 60:.0f} min left" if left else ""
                print(line, flush=True)
    except KeyboardInterrupt:  # it reached the runs, too, which save a checkpoint
        for process, _ in running.values():
            if process:
                process.wait()
        sys.exit("\nstopped; the same command goes on." if keep else "\nstopped.")
    finally:
        for process, _ in running.values():
            if process and not keep:
                process.kill()
                process.wait()
    for run, status in failed:
        tail = "\n".join(lines_of(run.place(folder))[-15:])
        print(f"{tail}\nerror: {run} ended with status {status}.", file=sys.stderr)
    if failed:
        sys.exit(1)
    return seconds


def start(run, flags, place, keep):
    """Start a run, or let it go on from its checkpoint. -> its process; None if it is running"""
    place.mkdir(parents=True, exist_ok=True)
    lock = locked(place)
    if lock is None:
        return None
    check_source(run.script)
    file, *words = program(run.script, run.env_id)
    command = [sys.executable, os.fspath(ROOT / file), *words, *run.flags(), *flags]
    checkpoint = next(checkpoints_of(place), None)
    if not checkpoint:  # it was killed before its first checkpoint: it begins again
        shutil.rmtree(place / "runs", ignore_errors=True)
    if keep:
        command += ["--resume", os.fspath(checkpoint.relative_to(place))] if checkpoint else []
        if not checkpoint and "checkpoint_replay" in SOURCES[run.script]:
            command += ["--checkpoint-replay"]
    with lock, open(place / "log.txt", "a" if checkpoint else "w") as log:
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        options["env"] = os.environ | {"PYTHONUNBUFFERED": "1"}  # lines are in the log at once
        options["preexec_fn"] = lambda: os.pwrite(lock.fileno(), b"%-20d" % os.getpid(), 0)
        return subprocess.Popen(command, cwd=place, pass_fds=[lock.fileno()], **options)


def checkpoints_of(place):
    """The checkpoints in a run's folder; those of tables are .npz."""
    files = (place / "runs").glob("*/checkpoint.*")
    return (file for file in files if file.suffix in (".pt", ".npz"))  # no partial one


def locked(place):
    """The open lock file of a run's folder, or None if a process holds the lock.

    The file contains the process id of the run that was started last.
    """
    (place / "lock").touch()
    lock = open(place / "lock", "r+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        lock.close()
        return None


def lines_of(place):
    """A run's output, line by line; each redraw of a progress bar is a line, too."""
    text = (place / "log.txt").read_text(errors="replace")
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def has_ended(place):
    """Whether the last start of a run came to the end of its final evaluation."""
    stopped = re.compile("go on with:|evaluation stopped after")  # by a signal
    last = [line for line in lines_of(place) if EVALUATED.search(line) or stopped.search(line)]
    return not last or not stopped.search(last[-1])  # without any: read_run complains


def events_of(folder):
    """All that is in the TensorBoard files of a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def read_run(run, place):
    """The evaluations of a finished run.

    Returns a dict: script, env_id, seed; steps, returns and hours of training, one for each
    evaluation, and predicted, true and overestimation_ci95 where the script compares its values
    with the returns that came; final_return, final_std and episodes of the last one; seconds of
    training; the script's arguments as text; solved: --stop-return, episodes, steps, seconds, where
    it ended the run.
    """
    found = [match for line in lines_of(place) if (match := EVALUATED.search(line))]
    folders = list((place / "runs").glob("*"))
    if not found or len(folders) != 1:
        sys.exit(f"error: {run} ended without a final evaluation under runs/.")
    env_id, step, _, std, episodes = found[-1].groups()
    events = events_of(folders[0])
    there = events.Tags()["scalars"]
    evaluations, timed = {}, "charts/hours" in there
    if "eval/episodic_return" in there:
        evaluations = {e.step: e.value for e in events.Scalars("eval/episodic_return")}
    if max(evaluations, default=None) != int(step.replace(",", "")):
        sys.exit(f"error: {run}: TensorBoard has no final evaluation, at step {step}.")
    solved = [match for line in lines_of(place) if (match := SOLVED.search(line))]
    hours = [(e.step, e.value) for e in events.Scalars("charts/hours")] if timed else []
    tags = {name: f"eval/{tag}" for name, tag in VALUES.items() if f"eval/{tag}" in there}
    values = {name: [e.value for e in events.Scalars(tag)] for name, tag in tags.items()}
    return {
        "script": run.script,
        "env_id": env_id,
        "seed": run.seed,
        "steps": [*evaluations],
        "returns": [round(value, 4) for value in evaluations.values()],
        **{name: [round(value, 4) for value in column] for name, column in values.items()},
        "final_return": round([*evaluations.values()][-1], 4),
        "final_std": float(std),
        "episodes": int(episodes),
        "hours": np.interp([*evaluations], *zip(*hours)).round(5).tolist() if hours else [],
        "seconds": round(3600 * hours[-1][1], 1) if hours else 0.0,
        "arguments": arguments_of(events),
        "solved": [float(number) for number in solved[-1].groups()] if solved else None,
    }


def arguments_of(events):
    """{argument: value as text} of a run, from an EventAccumulator; {} if it has none."""
    if "hyperparameters/text_summary" not in events.Tags()["tensors"]:
        return {}
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0]
    rows = [line.strip("|").split("|", 1) for line in text.decode().splitlines()[2:]]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def goal_of(run, goal):
    """Whether the final evaluation reaches `goal`, the step of the first one that does, or None,
    and the lowest return from there on."""
    steps = [step for step, value in zip(run["steps"], run["returns"]) if value >= goal]
    first = steps[0] if steps else None
    later = [value for step, value in zip(run["steps"], run["returns"]) if steps and step >= first]
    return {
        "reaches_goal": run["final_return"] >= goal,
        "first_step_at_goal": first,
        "lowest_return_after": min(later, default=None),
    }


def common_curve(runs):
    """Steps at which all runs were evaluated, (T,), and their returns there, (runs, T).

    T is 0 if each run ended at another step and had no other evaluation.
    """
    steps = sorted(set.intersection(*(set(run["steps"]) for run in runs)))
    curves = [dict(zip(run["steps"], run["returns"])) for run in runs]
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])


def grouped(runs, *keys):
    """The runs by the values of `keys`, in the order of their first appearance."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


def report_of(runs, flags, goal):
    """The record's page, in Markdown."""
    groups = grouped(runs, "script", "env_id")
    scripts, env_ids = ([key for (key,) in grouped(runs, name)] for name in ("script", "env_id"))
    seeds = f"{len(runs) // len(groups)} seed{'s' * (len(runs) > len(groups))}"
    one = len(groups) == 1
    lines = [f"# {scripts[0] if len(scripts) == 1 else f'{len(scripts)} scripts'} on "]
    lines[0] += ", ".join(env_ids)
    if one and goal is not None:
        reach = sum(run["reaches_goal"] for run in runs)
        lines += ["", f"{reach} of {seeds} reach the goal of {goal:g} in the final evaluation."]
    lines += ["", f"Final evaluations over {seeds}, and the mean of a seed's curve:", ""]
    head = ["script", "environment", "interquartile mean (95% interval)", "lowest to highest"]
    head += ["standard deviation", "mean over the run"]
    head += [] if goal is None else [f"reach {goal:g}"]
    lines += [table_row(head), table_row(["---", "---", *["---:"] * (len(head) - 2)])]
    for (script, env_id), group in groups.items():
        final = np.array([run["final_return"] for run in group])
        cells = [f"`{script}.py`", env_id, with_interval(final)]
        cells += [f"{final.min():.1f} to {final.max():.1f}"]
        cells += [f"{final.std(ddof=1):.1f}" if len(group) > 1 else "unknown"]
        curves = common_curve(group)[1]
        cells += [f"{interquartile_mean(curves.mean(axis=1)):.1f}" if curves.size else "unknown"]
        if goal is not None:
            cells += [f"{sum(run['reaches_goal'] for run in group)} of {len(group)}"]
        lines.append(table_row(cells))
    lines += ["", *(f"![learning curves]({figure_name(e, env_ids)}.png)" for e in env_ids), ""]
    head = ["script", "environment"] * (not one) + ["seed", "agent steps"]
    head += ["final evaluation, mean +- standard deviation"]
    if goal is not None:
        head += [f"first evaluation at {goal:g} or more", "lowest evaluation from then on"]
    ended = [run["solved"] for run in runs if run["solved"]]
    if ended:
        head += ["episodes", "steps", "seconds until the run's --stop-return"]
    head += ["minutes"]
    lines += [table_row(head), table_row(["---", *["---:"] * (len(head) - 1)])]
    for run in runs:
        cells = [run["script"], run["env_id"]] * (not one)
        cells += [str(run["seed"]), f"{run['steps'][-1]:,}"]
        cells += [f"{run['final_return']:.1f} +- {run['final_std']:.1f}"]
        if goal is not None:
            first, lowest = run["first_step_at_goal"], run["lowest_return_after"]
            cells += ["never", ""] if first is None else [f"step {first:,}", f"{lowest:.1f}"]
        if ended:
            cells += (
                [f"{x:,.0f}" for x in run["solved"][1:]] if run["solved"] else ["never", "", ""]
            )
        lines.append(table_row([*cells, f"{run['seconds'] / 60:.1f}"]))
    if ended:
        numbers = zip(("episodes", "steps", "seconds"), np.median(ended, axis=0)[1:])
        median = ", ".join(f"{x:,.0f} {name}" for name, x in numbers)
        lines += [
            "",
            f"{len(ended)} of {len(runs)} runs ended at their --stop-return, the mean of the ",
        ]
        lines[-1] += f"last 100 training episodes; medians until then: {median}."
    epsilon = runs[0]["arguments"].get("eval_e")
    script, env_id = ("SCRIPT", "ENV") if not one else (scripts[0], env_ids[0])
    return "\n".join(
        [
            *lines,
            "",
            f"An evaluation is the mean return of {runs[0]['episodes']} whole episodes"
            + (f" with epsilon {epsilon}" if epsilon is not None else "")
            + f", unclipped. The curve is the interquartile mean of {seeds} with a 95% percentile "
            f"bootstrap interval over the seeds ({RESAMPLES:,} resamples, one environment, so one "
            "stratum). evaluations.csv contains every evaluation.",
            "",
            "Each run:",
            "",
            "```bash",
            quote(["python", *program(script, env_id), "--env-id", env_id, *flags])
            + " --seed SEED",
            "```",
        ]
    )


def with_interval(values):
    """ "480.1 (455.0 to 499.2)": interquartile mean and 95% interval; of one seed no interval."""
    text = f"{interquartile_mean(values):.1f}"
    return text + (" ({:.1f} to {:.1f})".format(*bootstrap_interval(values)) * (len(values) > 1))


def table_row(cells):
    return "| " + " | ".join(cells) + " |"


def figure_name(env_id, env_ids):
    return "curve" if len(env_ids) == 1 else f"curve_{env_id.replace('/', '-')}"


def draw(runs, goal):
    """The interquartile mean of each script over its seeds, with its interval. One environment.

    A lone script shows its seeds, too. Returns the matplotlib figure.
    """
    groups = {script: group for (script,), group in grouped(runs, "script").items()}
    names, env_id, curves = short_names([*groups]), runs[0]["env_id"], []
    for script, group in groups.items():
        series = [(run["steps"], run["returns"]) for run in group]
        final = interquartile_mean([run["final_return"] for run in group])
        shown = curve_of_runs(names[script], series, interquartile_mean, bootstrap_interval)
        curves.append(shown._replace(text=f"{final:.1f}"))
        if len(groups) == 1 < len(group):
            curves[0] = shown._replace(seeds=series, text=f"{final:.1f}")
    n, episodes = len(runs) // len(groups), runs[0]["episodes"]
    note = (
        f"{n} seeds: interquartile mean, 95% bootstrap interval" if n > 1 else "1 seed, no interval"
    )
    note += "; thin: each seed" if curves[0].seeds else ""
    if any(curve.tail for curve in curves) and not curves[0].seeds:
        note += "; thin: fewer seeds are left"
    frames = runs[0]["script"].endswith("_atari") and not env_id.startswith("MinAtar/")
    unit = "agent steps (4 frames each)" if frames else "agent steps"
    title = f"{runs[0]['script']} on {env_id}" if len(groups) == 1 else env_id
    title += f", evaluations of {episodes} episode{'s' * (episodes != 1)}"
    goal = None if goal is None else (goal, f"goal: {goal:g}")
    return draw_curves(curves, title, note, unit, "return, higher is better", goal)


def networks_of(runs, places):
    """Of each script and environment, what `--evaluate` needs of the run with the median result.

    `places`: the folders of the runs, or the records that they come from. Returns {file name: a
    checkpoint without what only training needs}. Networks of more than LARGEST_NETWORK bytes are
    left out; tables are no networks.
    """
    networks, place_of = {}, {id(run): place for run, place in zip(runs, places)}
    for group in grouped(runs, "script", "env_id").values():
        run = sorted(group, key=lambda run: run["final_return"])[(len(group) - 1) // 2]
        name = f"{run['script']}_{run['env_id'].replace('/', '-')}_seed_{run['seed']}.pt"
        place = place_of[id(run)]
        for file in [*place.glob("runs/*/checkpoint.pt"), *place.glob(f"networks/{name}")]:  # one
            import torch  # takes seconds

            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if sum(x.nbytes for x in state["q_network"].values()) <= LARGEST_NETWORK:
                parts = copy.deepcopy({part: state[part] for part in EVALUATED_PARTS})
                networks[name] = parts  # a copy: the file may be deleted
    return networks


def write_networks(networks, folder):
    import torch

    folder.mkdir(exist_ok=True)
    for name, state in networks.items():
        torch.save(state, folder / name)


def page_of_networks(networks, record):
    """How to watch the networks of a record; empty without any."""
    if not networks:
        return ""
    name, state = next(iter(networks.items()))
    path = (record / "networks" / name).as_posix()
    words = program(state["script"], state["args"]["env_id"])
    command = quote(["python", *words, "--evaluate", path])
    text = "The networks of the runs with the median result (the lower one of two) can be evaluated"
    return f"\n\n{text}:\n\n```bash\n{command}\n```"


def add_study_arguments(parser):
    """What every tool takes that trains runs with `results_of`."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs (default: none does)")
    parser.add_argument(
        "--earlier", type=Path, nargs="+", default=[], help="records whose runs are not made again"
    )
    parser.add_argument("--record", type=Path, help="folder of the record")
    parser.add_argument("flags", nargs="*", help="after --: flags of the scripts")


def check_study_arguments(parser, args, *names):
    """What `names`, --jobs and the flags after -- must be."""
    for name in names:
        if len({*getattr(args, name)}) < len(getattr(args, name)):
            parser.error(f"--{name.replace('_', '-')} must differ")
    if args.jobs < 1:
        parser.error("--jobs must be 1 or more")
    taken = {"--seed": "--seeds", "--env-id": "--env-ids"}
    taken |= dict.fromkeys(("--resume", "--evaluate"), "--runs, which resumes")
    for flag in (word.split("=")[0].replace("_", "-") for word in args.flags):
        if flag in taken:
            parser.error(f"{flag} after --: use {taken[flag]}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", required=True, help="files in algos/, without .py")
    parser.add_argument("--env-ids", nargs="+", default=[None], help="default: each script's own")
    parser.add_argument("--goal", type=float, help="return that the final evaluation should reach")
    add_study_arguments(parser)
    args = parser.parse_args()
    there = sorted(file.stem for file in (ROOT / "algos").glob("*.py"))
    for script in args.scripts:
        if script not in there:
            parser.error(f"--scripts {script}: not in algos/; there are: {', '.join(there)}")
    check_study_arguments(parser, args, "scripts", "env_ids", "seeds")
    return args


def results_of(runs, args, commit, folder):
    """Train the runs in `folder` that no record in args.earlier contains; read all.

    Returns the results in the order of `runs`; where each run is, a folder or a record; and the
    machines of the earlier ones.
    """
    for run in runs:
        check_source(run.script)
    found, place_of, machines = earlier_runs(args.earlier, runs, args.flags, commit)
    new = [run for run in runs if run not in found]
    place_of |= {run: run.place(folder) for run in new}
    with contextlib.ExitStack() as stack:
        if args.runs:
            study = {"commit": commit, "flags": args.flags}
            check_study(folder, study, runs)
            lock = locked(folder)
            if not lock:
                sys.exit(f"error: another call of this tool is at work in {folder}.")
            stack.enter_context(lock)
        run_all(new, args.flags, folder, args.jobs, keep=bool(args.runs))
        found |= {run: read_run(run, place_of[run]) | {"commit": commit} for run in new}
    return [found[run] for run in runs], [place_of[run] for run in runs], machines


def earlier_runs(records, runs, flags, commit):
    """Those of `runs` that earlier records contain, made with these flags and by the same files.

    Returns ({run: its results}, {run: its record}, {commit: the machine, of each run}).
    """
    found, place_of, machines = {}, {}, {}
    for record in records:
        try:
            results = json.loads((record / "results.json").read_text())
            before = results["flags"]
        except OSError as e:
            sys.exit(f"error: --earlier {record}: {e.strerror}: {e.filename}.")
        except (KeyError, ValueError):  # of an older version, or no JSON
            sys.exit(f"error: --earlier {record}: no record of train.py that names its flags.")
        if before != (today := [*map(option, flags)]):
            sys.exit(f"error: --earlier {record}: its flags are {before}, not {today}.")
        machine = results["machine"]
        machines |= {machine["commit"]: machine} | results["earlier_machines"]
        there = {(run["script"], run["env_id"], run["seed"]): run for run in results["runs"]}
        for run in runs:
            if run not in there or run in found:
                continue
            made_at = there[run]["commit"]
            files = files_of(run.script, run.env_id)
            if not same_at(made_at, commit, *files):
                sys.exit(
                    f"error: --earlier {record}: {' or '.join(files)} is not what it was "
                    f"at commit {made_at[:12]}; train it again, without this record."
                )
            found[run], place_of[run] = there[run], record
    used = {run["commit"] for run in found.values()}
    return found, place_of, {made_at: machines[made_at] for made_at in used}


def report_of_earlier(found, machines):
    """Where the runs of earlier records come from, in Markdown; empty without any."""
    lines = []
    for (script, env_id, made_at), group in grouped(found, "script", "env_id", "commit").items():
        if made_at in machines:
            machine, seeds = machines[made_at], ", ".join(str(run["seed"]) for run in group)
            lines.append(f"- `{script}.py`, {env_id}, seed{'s' * (len(group) > 1)} {seeds}: ")
            lines[-1] += f"commit {made_at}, {machine['date']}, {machine['processor']}"
    head = "\n\nThese runs are from earlier records; the scripts and csrc/ are still the same:\n\n"
    return head + "\n".join(lines) if lines else ""


def check_study(folder, study, runs):
    """Exit if the runs in `folder` have other flags, or if their commit has other files."""
    file = folder / "study.json"
    before = json.loads(file.read_text())["commit"] if file.exists() else None
    files = {file for run in runs for file in files_of(run.script, run.env_id)}
    if before != study["commit"] and same_at(before, study["commit"], *files):
        study = study | {"commit": before}
    check_same(folder, study, "--runs")


def check_same(folder, study, option):
    """Exit if `folder`, given by `option`, is of another commit or other arguments."""
    file = folder / "study.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_atomically(file, study)
    before = json.loads(file.read_text())
    for key, value in study.items():
        if before.get(key) != value:
            sys.exit(
                f"error: the runs in {folder} have {key} {before.get(key)}, not {value}; "
                f"give another {option} folder, or the same {key}."
            )


def write_atomically(file, value):
    """Write a value as JSON; after a kill the file is whole, or not there."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    os.replace(partial, file)


def main():
    args = parse_args()
    if args.record:
        pyplot()  # exits here if it is missing, not after the runs
    commit = clean_commit() if args.record else commit_of(str(ROOT))
    triples = product(args.scripts, args.env_ids, args.seeds)
    runs = [Run(script, env_id or default_env_id(script), seed) for script, env_id, seed in triples]
    if args.earlier and None in {run.env_id for run in runs}:
        sys.exit("error: --earlier needs --env-ids.")
    with contextlib.ExitStack() as stack:
        folder = args.runs
        if not folder:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cleanq-train-")))
        found, places, machines = results_of(runs, args, commit, folder)
        networks = networks_of(found, places) if args.record else {}
    for run in found:
        run |= {} if args.goal is None else goal_of(run, args.goal)
    report = report_of(found, args.flags, args.goal) + report_of_earlier(found, machines)
    print(report)
    if not args.record:
        return
    by_env = {env_id: group for (env_id,), group in grouped(found, "env_id").items()}
    figures = {figure_name(env_id, [*by_env]): draw(by_env[env_id], args.goal) for env_id in by_env}
    results = {"goal": args.goal, "jobs": args.jobs, "flags": [*map(option, args.flags)]}
    results |= {"runs": found, "earlier_machines": machines}
    write_record(args.record, results, report + page_of_networks(networks, args.record), commit)
    shutil.rmtree(args.record / "networks", ignore_errors=True)  # of an earlier record there
    if networks:
        write_networks(networks, args.record / "networks")
    with open(args.record / "evaluations.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["script", "env_id", "seed", "step", "episodic_return", "hours", *VALUES])
        for run in found:
            keys = (run["script"], run["env_id"], run["seed"])
            empty = [""] * len(run["steps"])
            columns = [run["steps"], run["returns"], run["hours"] or empty]
            columns += [run.get(name, empty) for name in VALUES]
            writer.writerows((*keys, *row) for row in zip(*columns))
    for name, figure in figures.items():
        save(figure, args.record / name)


if __name__ == "__main__":
    main()
