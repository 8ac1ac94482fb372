"""The runs of a study of tune.py: they are started, followed, stopped, and go on after a kill."""

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from train import (
    EVALUATED,
    SOLVED,
    checkpoints_of,
    events_of,
    lines_of,
    locked,
    poll,
    start,
    write_atomically,
)

# The last words of a run with arguments that do not work: they exclude each other, or it diverges.
GAVE_UP = re.compile(r"^error: (the loss is not finite|a weight is NaN|--\S+ must be )")


class TrialRun(NamedTuple):
    """One training with the flags of a trial; () are the defaults."""

    script: str
    env_id: str | None
    seed: int
    arguments: tuple

    def __str__(self) -> str:
        return f"{' '.join(self.arguments) or 'defaults'}, seed {self.seed}"

    def place(self, folder: Path) -> Path:
        """Equal trials have the same folder, so that no run is made twice."""
        key = hashlib.sha256("\n".join(self.arguments).encode()).hexdigest()[:12]
        return folder / "runs" / (key if self.arguments else "defaults") / str(self.seed)

    def flags(self) -> list[str]:
        env = ["--env-id", self.env_id] if self.env_id else []
        return [*env, "--seed", str(self.seed), *self.arguments]


class Runs:
    """The runs of a study in its folder. `flags`: those of all runs."""

    def __init__(self, folder, flags, total_timesteps, keep):
        self.folder, self.flags, self.total, self.keep = folder, flags, total_timesteps, keep
        self.processes = {}  # run -> its process; None: it outlived an earlier call of this tool

    def follow(self, run, goal=None):
        """Train a run, or let it go on; yield the returns of its evaluations until it has ended.

        With `goal` it is stopped once an evaluation has reached it. Its result is then in
        result.json, see `result_of`. Exits if the run fails for a reason other than its arguments.
        """
        place = run.place(self.folder)
        place.mkdir(parents=True, exist_ok=True)
        while not (place / "result.json").exists():
            if not self.is_running(run):  # it may have ended while this tool did not run
                if result := result_of(place, self.total, goal):
                    write_atomically(place / "result.json", result)
                    continue
            process = self.processes[run] = start(run, self.flags, place, self.keep)
            size, returns = 0, []
            while self.is_running(run):
                if (place / "log.txt").stat().st_size != size:
                    size = (place / "log.txt").stat().st_size
                    returns = [value for _, value in evaluations_of(place)]
                if goal is not None and max(returns, default=-math.inf) >= goal:
                    self.stop(run, signal.SIGTERM)  # it closes its log
                else:
                    yield returns
            del self.processes[run]
            result = result_of(place, self.total, goal)
            if result:
                write_atomically(place / "result.json", result)
            elif process:
                tail = "\n".join(lines_of(place)[-15:])
                sys.exit(f"{tail}\nerror: {run} ended with status {process.returncode}.")
        for checkpoint in checkpoints_of(place):
            checkpoint.unlink()  # a finished run does not go on, and with a replay it is large
        yield [value for _, value, _ in self.result(run)["evaluations"]]

    def result(self, run):
        """The result of a run that has ended; None of others."""
        file = run.place(self.folder) / "result.json"
        return json.loads(file.read_text()) if file.exists() else None

    def is_running(self, run):
        if self.processes.get(run):
            return poll(self.processes[run]) is None
        lock = locked(run.place(self.folder))
        if lock:
            lock.close()
        return lock is None

    def stop(self, run, number=signal.SIGKILL):
        """Stop a run, if it is running, and wait for its end."""
        place, deadline = run.place(self.folder), time.monotonic() + 60
        if not place.exists():
            return
        while self.is_running(run):
            process = self.processes.get(run)
            pid = process.pid if process else int((place / "lock").read_text().strip() or 0)
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self.is_running(run) and time.monotonic() < deadline:
                time.sleep(0.01)
            number = signal.SIGKILL

    def drop(self, run):
        """Stop a run whose result is not wanted any more."""
        self.stop(run)
        self.processes.pop(run, None)
        for checkpoint in checkpoints_of(run.place(self.folder)):
            checkpoint.unlink()

    def close(self, kill):
        for process in filter(None, self.processes.values()):
            if kill:
                process.kill()
            process.wait()


def evaluations_of(place):
    """The evaluations that a run has printed: [(step, return)], each step once."""
    lines = lines_of(place) if (place / "log.txt").exists() else []
    found = [match for line in lines if (match := EVALUATED.search(line))]
    return [*{int(m[2].replace(",", "")): float(m[3]) for m in found}.items()]


def result_of(place, total_timesteps, goal):
    """The result of a run that is not running any more; None if it has not come to its end.

    Returns a dict: evaluations: [step, return, seconds of training or None]; solved: steps and
    seconds until its --stop-return, or None; error: the line with which it gave up, or None.
    """
    lines = lines_of(place) if (place / "log.txt").exists() else []
    evaluations = evaluations_of(place)
    error = next((line for line in lines if GAVE_UP.search(line)), None)
    match = next((found for line in lines if (found := SOLVED.search(line))), None)
    solved = [int(match[3]), float(match[4])] if match else None
    last = max((step for step, _ in evaluations), default=-1)
    at_goal = goal is not None and any(value >= goal for _, value in evaluations)
    if not (error or at_goal or last >= (solved[0] if solved else total_timesteps)):
        return None
    exact, hours = {}, []  # what was printed is rounded
    for folder in place.glob("runs/*"):
        events = events_of(folder)
        tags = events.Tags()["scalars"]
        if "eval/episodic_return" in tags:
            exact = {e.step: round(e.value, 4) for e in events.Scalars("eval/episodic_return")}
        if "charts/hours" in tags:
            hours = [(e.step, e.value) for e in events.Scalars("charts/hours")]
    rows = []
    for step, value in evaluations:
        seconds = max((3600 * hour for at, hour in hours if at <= step), default=None)
        rows.append([step, exact.get(step, value), seconds and round(seconds, 2)])
    return {"evaluations": rows, "solved": solved, "error": error}


def work(tasks, jobs):
    """Carry out tasks, `jobs` at a time. Each is a generator that yields while it has to wait."""
    tasks, active = iter(tasks), []
    while True:
        while len(active) < jobs and (task := next(tasks, None)):
            active.append(task)
        if not active:
            return
        for task in list(active):
            if next(task, "ended") == "ended":
                active.remove(task)
        time.sleep(0.1)
