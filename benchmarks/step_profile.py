"""Where the time of an agent step goes: one run of a script, counted and profiled, then ended.

Used by throughput.py, which starts it in a process of its own. Prints one line of JSON.

The parts of the training loop are marked: act, env step (or send and recv), replay add and sample,
the loss, backward, the optimizer. What is left is Python, logs and the target network. FLOPs are
those of matrix products and convolutions, forward and backward (a multiplication and an addition
are two), counted by torch's FlopCounterMode.
"""

import argparse
import functools
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch.profiler import profile, record_function
from torch.utils.flop_counter import FlopCounterMode

PARTS = {"envs": ("send", "recv", "step"), "replay": ("add", "sample", "update_priorities", "take")}


def matrix_rate(threads, dtype, n=1024, repeats=20):
    """The fastest of some products of n x n matrices, in FLOP/s."""
    torch.set_num_threads(threads)
    (a, b), best = torch.randn(2, n, n).to(dtype), float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def mark(owner, name, label=None):
    """Let the profiler see calls of owner.name."""
    function = getattr(owner, name, None)
    if function is not None:
        label = label or name

        @functools.wraps(function)
        def marked(*args, **kwargs):
            with record_function(label):
                return function(*args, **kwargs)

        setattr(owner, name, marked)


class Stages:
    """Counts FLOPs during `steps` agent steps, then profiles as many, and then ends the process."""

    def __init__(self, begin, steps, trace):
        self.begin, self.steps, self.trace = begin, steps, trace
        self.counter, self.profiler = FlopCounterMode(display=False), profile()
        self.counted = self.start = None

    def tick(self, global_step):
        if self.counted is None and self.start is None:
            if global_step >= self.begin:
                self.start = global_step
                self.counter.__enter__()
        elif global_step < self.start + self.steps:
            pass
        elif self.counted is None:
            self.counter.__exit__(None, None, None)
            self.counted = self.counter.get_total_flops() / (global_step - self.start)
            if not self.trace:
                self.finish({})
            self.start, self.clock = global_step, time.perf_counter()
            self.profiler.__enter__()
        else:
            seconds = time.perf_counter() - self.clock
            self.profiler.__exit__(None, None, None)
            self.profiler.export_chrome_trace(self.trace)
            self.finish(self.table(seconds, global_step - self.start))

    def table(self, seconds, steps):
        """Microseconds an agent step: of all, of each marked part, of torch's slowest kernels."""
        events = self.profiler.key_averages()
        marked = {e.key: e for e in events if e.is_user_annotation}
        parts = {key: 1e-6 * e.cpu_time_total for key, e in marked.items() if "#" not in key}
        inner = {e.key: 1e-6 * e.self_cpu_time_total for e in events if e.key not in marked}
        slowest = sorted(inner, key=inner.get, reverse=True)[:12]
        micro = 1e6 / steps
        return {
            "step us": seconds * micro,
            "parts": {key: s * micro for key, s in parts.items()},
            "kernels": {key: inner[key] * micro for key in slowest},
        }

    def finish(self, table):
        print(json.dumps({"flops": self.counted} | table), flush=True)
        os._exit(0)  # without the run's last evaluation


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("script", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", default=["float32"], help="of matrix products")
    parser.add_argument("--begin", type=int, default=0, help="agent step of the first count")
    parser.add_argument("--steps", type=int, default=0, help="agent steps of a count")
    parser.add_argument("--trace", default="", help="file of the trace; without: no profile")
    args, flags = parser.parse_known_args()
    if args.script is None:
        rates = {p: matrix_rate(args.threads, getattr(torch, p)) for p in args.precisions}
        print(json.dumps(rates))
        return
    # In inference mode FlopCounterMode fails on BTR's spectral normalization.
    torch.inference_mode = torch.no_grad
    spec = importlib.util.spec_from_file_location(args.script.stem, args.script)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    stages = Stages(args.begin, args.steps, args.trace)
    start, steps = script.Run.start, script.Run.steps

    def start_marked(run, learner, replay, envs):
        start(run, learner, replay, envs)
        for owner, kind in ((envs, "envs"), (replay, "replay")):
            for name in PARTS[kind]:
                mark(owner, name, f"{kind}.{name}")
        mark(learner["optimizer"], "step", "optimizer.step")

    def steps_ticked(run):
        for global_step in steps(run):
            stages.tick(global_step)
            yield global_step

    script.Run.start, script.Run.steps = start_marked, steps_ticked
    for name in ("act", "td_loss"):
        mark(script, name)
    mark(torch.Tensor, "backward")
    sys.argv = [str(args.script), *flags]
    script.main(script.parse_args())


if __name__ == "__main__":
    main()
