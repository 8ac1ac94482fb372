"""Draw the figures of records again from their raw data, in today's style.

    python benchmarks/redraw.py benchmarks/records/*

Only the records' .png and .svg files are written. Records without figures are left as they are, and
so are those of tune.py.
"""

import argparse
import json
import sys
from pathlib import Path

import buffers
import overestimation
import plot
import scale
import storage
import tabular
import throughput
import train
from figures import Curve, draw_curves, save


def figures_of(folder):
    """{name: matplotlib figure} of a record; {} if it has none."""
    results = json.loads((folder / "results.json").read_text())
    runs = results.get("runs", [])
    if results.keys() & {"change", "trials", "profiles"}:  # of speedrun.py, tune.py, --profile
        return {}
    if "dice" in results:
        names = [*dict.fromkeys(run["algorithm"] for run in runs)]
        by_env = {env_id: group for (env_id,), group in train.grouped(runs, "env_id").items()}
        draw = overestimation.draw
        return {train.figure_name(e, [*by_env]): draw(by_env[e], names) for e in by_env}
    if runs and "returns" not in runs[0]:
        return {"curves": draw_seeds(plot.read_record(folder))}
    if runs:
        for run in runs:  # some records name their only script once
            run.setdefault("script", results.get("script"))
        by_env = {env_id: group for (env_id,), group in train.grouped(runs, "env_id").items()}
        goal = results.get("goal")
        return {train.figure_name(e, [*by_env]): train.draw(by_env[e], goal) for e in by_env}
    if "steps_per_second" in results:
        return {"rates": throughput.draw_results(results)}
    if "bias" in results:
        return {"bias": tabular.draw(results["bias"]["left"], results["bias"]["runs"])}
    if "steps a broadcast" in results:
        return {"scale": scale.draw(results)}
    rows = results.get("rows", {})
    if isinstance(rows, list):
        return {"bytes": storage.figure_of(rows)}
    if "limit" in rows:  # its name in records of 2026-11-22
        rows["plain-copy"] = rows.pop("limit")
    return buffers.figures(rows)


def draw_seeds(runs):
    """The evaluations of each seed, with its training returns as a thin line."""
    curves = []
    for run in runs:
        evaluation, training = run.logs["evaluation"], run.logs["training"]
        thin = ((training.steps, training.returns),)
        curves.append(Curve(f"seed {run.seed}", evaluation.steps, evaluation.returns, seeds=thin))
    title, unit = f"{run.algorithm} on {run.env_id}", "agent steps (4 frames each)"
    note = "evaluations of 10 games; thin: mean of the last 100 training episodes"
    return draw_curves(curves, title, note, unit, "return, higher is better")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="of the records")
    for folder in parser.parse_args().folders:
        if not folder.is_dir():
            sys.exit(f"error: {folder}: no such folder; give the folders of records.")
        drawn = figures_of(folder) if (folder / "results.json").exists() else {}
        for name, figure in drawn.items():
            save(figure, folder / name)
        print(f"{folder}: {', '.join(drawn) or 'no figures'}", flush=True)


if __name__ == "__main__":
    main()
