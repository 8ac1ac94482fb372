"""Q-learning and double Q-learning in tables: do they find the optimum, and how large is the bias?

    python benchmarks/tabular.py --jobs 2 --record benchmarks/records/2026-01-01_tabular
    python benchmarks/tabular.py --parts bias --runs 1000

Part `learning`: each script on FrozenLake, CliffWalking and Taxi, one run for each seed, with its
own settings. The exact expected return of the policy that it has learned is compared with the
optimum; both follow from the environment's own table of transitions. Part `bias`: how often each
algorithm goes left in Sutton and Barto's Example 6.7; the scripts' own functions act and learn.

Without --record the tool only prints the report. With it, the record's folder contains README.md
(report, command, commit, versions, machine), returns.csv, left.csv, bias.png and results.json.
"""

import argparse
import csv
import importlib.util
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import gymnasium as gym
import numpy as np
from figures import Curve, draw_curves, pyplot, save
from machine import ROOT, clean_commit, write_record
from train import Run, run_all

SCRIPTS = {
    "q_learning_tabular": "Q-learning",
    "double_q_learning_tabular": "double Q-learning",
}
ENV_IDS = ("FrozenLake-v1", "CliffWalking-v1", "Taxi-v4")
TOLERANCE = 1e-6  # between two returns that count as equal
MOST_STEPS = 10_000  # of an episode, where the environment has no limit
CHUNK = 100  # runs of Example 6.7 in one task of a process


def load(name):
    """The script `algos/<name>.py` as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "algos" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def model_of(env_id):
    """An environment's own transitions.

    Returns p(s' and the task goes on | s, a), (S, A, S), the mean reward of (s, a), (S, A), the
    probabilities of the first state, (S,), and the time limit.
    """
    env = gym.make(env_id)
    table = env.unwrapped.P
    n_states, n_actions = len(table), len(table[0])
    transitions, rewards = (
        np.zeros((n_states, n_actions, n_states)),
        np.zeros((n_states, n_actions)),
    )
    for s in range(n_states):
        for a in range(n_actions):
            for probability, next_s, reward, terminated in table[s][a]:
                rewards[s, a] += probability * reward
                transitions[s, a, next_s] += probability * (not terminated)
    start = np.array(env.unwrapped.initial_state_distrib, np.float64)
    return transitions, rewards, start, env.spec.max_episode_steps or MOST_STEPS


def value_iteration(transitions, rewards, gamma):
    """Q*(s, a), (S, A): Q(s, a) = r(s, a) + gamma sum_s' p(s'|s, a) max_a' Q(s', a')"""
    q_values, change = np.zeros_like(rewards), np.inf
    while change > 1e-12:
        new = rewards + gamma * transitions @ q_values.max(axis=1)
        q_values, change = new, np.abs(new - q_values).max()
    return q_values


def greedy(q_values, tolerance=0.0):
    """pi(a|s), (S, A): the best actions, each with the same probability."""
    best = q_values >= q_values.max(axis=1, keepdims=True) - tolerance
    return best / best.sum(axis=1, keepdims=True)


def expected_return(policy, transitions, rewards, start, limit):
    """The exact expected return of an episode, undiscounted, within the time limit."""
    step = np.einsum("sa,sat->st", policy, transitions)  # p(s'|s)
    reward = (policy * rewards).sum(axis=1)  # r(s)
    there, total = start, 0.0  # the probability of being in s, and of no end before
    for _ in range(limit):
        total += there @ reward
        there = there @ step
        if there.sum() < 1e-12:
            break
    return float(total)


def optimum(env_id, gamma):
    """The return of the policy that value iteration finds with this gamma."""
    transitions, rewards, start, limit = model_of(env_id)
    policy = greedy(value_iteration(transitions, rewards, gamma), tolerance=1e-9)
    return expected_return(policy, transitions, rewards, start, limit)


def learned_return(script, checkpoint, env_id):
    """The return of the greedy policy in a script's checkpoint, and the script's gamma."""
    saved = script.load_checkpoint(str(checkpoint))
    policy = greedy(script.action_values(saved["q_table"], slice(None)))
    return expected_return(policy, *model_of(env_id)), saved["args"]["gamma"]


def learn(name, env_id, seeds, jobs):
    """Run a script on all seeds. Returns a dict: the optimum, and for each seed return, seconds."""
    runs = [Run(name, env_id, seed) for seed in seeds]
    with tempfile.TemporaryDirectory(prefix="cleanq-tabular-") as folder:
        seconds = run_all(runs, ["--eval-frequency", "0"], Path(folder), jobs)
        returns = []
        for run in runs:
            checkpoint = next(run.place(Path(folder)).glob("runs/*/checkpoint.npz"))
            value, gamma = learned_return(load(name), checkpoint, env_id)
            returns.append(value)
    found = {"script": name, "env_id": env_id, "optimum": optimum(env_id, gamma)}
    found |= {"seeds": list(seeds), "returns": returns}
    reach = f"{sum(reaches(found))} of {len(seeds)} seeds at the optimum"
    print(f"{name}, {env_id}: {reach}", flush=True)
    return found | {"seconds": [round(seconds[run], 1) for run in runs]}


def left_actions(name, seeds, episodes):
    """Example 6.7 with a script's own functions, one run for each seed.

    Returns whether each episode's first action was left, (runs, episodes) bool.
    """
    script = load(name)
    settings = script.ENV_DEFAULTS["MaximizationBias-v"]
    args = script.RunArgs(env_id="MaximizationBias-v0", **settings)
    left = np.zeros((len(seeds), episodes), bool)
    for row, seed in zip(left, seeds):
        rng, env = np.random.default_rng(seed), script.make_env(args.env_id, seed)
        q_table = script.make_q_table(env.legal)
        counts = np.zeros(q_table.shape, np.int64)
        for episode in range(episodes):
            obs, terminated = env.reset(), False
            while not terminated:
                q_values = script.action_values(q_table, obs)
                action = script.act(q_values, script.epsilon_at(0, args), rng)
                row[episode] |= obs == 0 and action == 0  # in A, 0 is left
                next_obs, reward, terminated, _ = env.step(action)
                discount = args.gamma * (1 - terminated)
                transition = script.Transition(obs, action, reward, next_obs, discount)
                script.update(q_table, counts, transition, args, rng)
                obs = next_obs
    return left


def measure_bias(runs, episodes, jobs):
    """{script: fraction of the runs that go left, one for each episode}"""
    chunks = [range(first, min(first + CHUNK, runs + 1)) for first in range(1, runs + 1, CHUNK)]
    fractions = {}
    with ProcessPoolExecutor(jobs) as pool:
        for name in SCRIPTS:
            left = [*pool.map(left_actions, repeat(name), chunks, repeat(episodes))]
            fractions[name] = np.concatenate(left).mean(axis=0).tolist()
            print(f"{name}: {runs:,} runs of Example 6.7", flush=True)
    return fractions


def learning_report(results):
    lines = ["## Returns of the learned policies", ""]
    lines += [
        "| environment | algorithm | optimum | seeds at the optimum | lowest return | seconds |"
    ]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for found in results:
        reach = sum(reaches(found))
        lines.append(
            f"| {found['env_id']} | {SCRIPTS[found['script']]} | {found['optimum']:.4f} | "
            f"{reach} of {len(found['seeds'])} | {min(found['returns']):.4f} | "
            f"{np.median(found['seconds']):.0f} |"
        )
    lines += [
        "",
        "A return is exact: the expected undiscounted return of an episode, within the "
        "environment's time limit, of the policy that is greedy in the final table. The optimum "
        "is the return of the policy that value iteration finds with the script's gamma; a seed "
        f"is at the optimum if the two differ by at most {TOLERANCE:g}. Seconds: the median of "
        "the seeds. Each run, with the settings of that environment in the script:",
        "",
        "```bash",
        "python algos/SCRIPT.py --env-id ENV_ID --eval-frequency 0 --seed SEED",
        "```",
    ]
    return lines


def reaches(found):
    """For each seed, whether its return is the optimum."""
    return [abs(value - found["optimum"]) <= TOLERANCE for value in found["returns"]]


def summary_of(fractions):
    """Of one algorithm: the largest fraction, its episode (from 1), the first episode from which on
    it is at most 10%, or None, and the mean of the last tenth of the episodes."""
    fractions = np.array(fractions)
    above = np.flatnonzero(fractions > 0.1)
    first = int(above[-1]) + 2 if len(above) else 1
    return {
        "highest": float(fractions.max()),
        "at_episode": int(fractions.argmax()) + 1,
        "at_most_10%_from": first if first <= len(fractions) else None,
        "last_tenth": float(fractions[-max(len(fractions) // 10, 1) :].mean()),
    }


def bias_report(fractions, runs):
    episodes = len(next(iter(fractions.values())))
    lines = ["## Maximization bias", "", "![fraction of left actions](bias.png)", ""]
    lines += ["| algorithm | highest | in episode | at most 10% from episode | last tenth |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, values in fractions.items():
        found = summary_of(values)
        first = found["at_most_10%_from"]
        lines.append(
            f"| {SCRIPTS[name]} | {found['highest']:.1%} | {found['at_episode']} | "
            f"{'never' if first is None else first} | {found['last_tenth']:.1%} |"
        )
    lines += [
        "",
        "Example 6.7 of Sutton and Barto, Reinforcement Learning, 2nd edition, 2018, with 10 "
        "actions in B: how many of the runs go left from A, in each episode. Left is wrong; the "
        "optimum under epsilon 0.1 is 5%. alpha 0.1, gamma 1; "
        f"mean of {runs:,} runs of {episodes} episodes (standard error at most "
        f"{0.5 / runs**0.5:.1%}). The last column is the mean of the last tenth of the episodes. "
        "The book's Figure 6.5 (10,000 runs; it does not give the number of actions in B) says: "
        "Q-learning at first goes left much more often than right, and always significantly more "
        "often than 5%; double Q-learning is essentially unaffected. The figure in the repository "
        "ShangtongZhang/reinforcement-learning-an-introduction (10 actions in B, 1,000 runs), read "
        "off its pixels: highest 94% for Q-learning and 52% for double Q-learning, last tenth 13% "
        "and 7%.",
    ]
    return lines


def draw(fractions, runs):
    """The fraction of left actions for both algorithms. Returns the matplotlib figure."""
    curves = [
        Curve(SCRIPTS[name], np.arange(1, len(values) + 1), np.array(values))
        for name, values in fractions.items()
    ]
    note = f"Sutton and Barto's Example 6.7, mean of {runs:,} runs"
    labels = "episode", "left actions from A, lower is better"
    goal, options = (0.05, "5%: the optimum with epsilon 0.1"), {"ylim": (0, 1)}
    options |= {"yformat": "{x:.0%}"}
    return draw_curves(curves, "Maximization bias", note, *labels, goal, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("learning", "bias"), default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(1, 11)])
    parser.add_argument("--env-ids", nargs="+", default=ENV_IDS, help="for the part `learning`")
    parser.add_argument("--runs", type=int, default=10_000, help="of Example 6.7")
    parser.add_argument("--episodes", type=int, default=300, help="in each run of Example 6.7")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--record", type=Path, help="folder of the record")
    args = parser.parse_args()
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds must differ")
    if min(args.runs, args.episodes, args.jobs) < 1:
        parser.error("--runs, --episodes and --jobs must be 1 or more")
    for env_id in args.env_ids:
        if env_id not in gym.registry or not hasattr(gym.make(env_id).unwrapped, "P"):
            parser.error(f"--env-ids {env_id}: gymnasium has no table of its transitions")
    if args.record:
        commit = clean_commit()
        pyplot()  # exits here if it is missing, not after the runs

    parts = args.parts or ("learning", "bias")
    results, report = {"jobs": args.jobs}, ["# Q-learning and double Q-learning in tables", ""]
    if "learning" in parts:
        pairs = [(name, env_id) for env_id in args.env_ids for name in SCRIPTS]
        results["learning"] = [learn(*pair, args.seeds, args.jobs) for pair in pairs]
        report += [*learning_report(results["learning"]), ""]
    if "bias" in parts:
        fractions = measure_bias(args.runs, args.episodes, args.jobs)
        results["bias"] = {"runs": args.runs, "left": fractions}
        report += bias_report(fractions, args.runs)
    report = "\n".join(report)
    print(report)
    if not args.record:
        return
    figure = draw(fractions, args.runs) if "bias" in parts else None
    write_record(args.record, results, report, commit)
    if "learning" in parts:
        rows = [
            (found["env_id"], found["script"], seed, repr(value), found["optimum"])
            for found in results["learning"]
            for seed, value in zip(found["seeds"], found["returns"])
        ]
        header = ["env_id", "script", "seed", "expected_return", "optimum"]
        write_csv(args.record / "returns.csv", header, rows)
    if figure:
        rows = zip(range(1, args.episodes + 1), *fractions.values())
        write_csv(args.record / "left.csv", ["episode", *fractions], rows)
        save(figure, args.record / "bias")


def write_csv(path, header, rows):
    with open(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
