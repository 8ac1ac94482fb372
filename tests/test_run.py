"""The scripts as users run them: checkpoints, resume, Ctrl-C, logs, films, and bad input."""

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ALGOS, ATARI, CARTPOLE, load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = {
    "cartpole": {
        "total_timesteps": 3000,
        "learning_starts": 300,
        "buffer_size": 1000,
        "checkpoint_frequency": 1500,
        "eval_frequency": 1000,
        "eval_episodes": 3,
        "num_envs": 1,
        "train_frequency": 10,
    },
    "atari": {
        "total_timesteps": 1600,
        "learning_starts": 400,
        "buffer_size": 900,
        "checkpoint_frequency": 800,
        "eval_frequency": 0,
        "eval_episodes": 2,
        "num_envs": 2,
        "train_frequency": 50,
        "target_network_frequency": 100,
        "exploration_fraction": 0.5,
        "eval_e": 1.0,
        "eval_max_frames": 1000,
        "env_id": "PongNoFrameskip-v4",
        "torch_threads": 1,
        "width": 1,
    },
}


# Every file on vectors or MinAtar that has a network.
VECTORS = sorted(
    path.stem for path in ALGOS.glob("*.py") if not path.stem.endswith(("_atari", "_tabular"))
)
# Every file on Atari that plays in its own process.
FRAMES = sorted(x.stem for x in ALGOS.glob("*_atari.py") if not x.stem.startswith("apex"))


def small(name):
    """Options for a short run: those that the script has."""
    options, script = SMALL["atari" if name.endswith("_atari") else "cartpole"], load(name)
    return {k: value for k, value in options.items() if hasattr(script.RunArgs, k)}


def flags(options):
    """{"total_timesteps": 3} -> ["--total-timesteps", "3"]; booleans become switches"""
    command = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", str(value)]
    return command


def run(name, options, cwd, **kwargs):
    command = [sys.executable, str(ALGOS / f"{name}.py"), *flags(options)]
    return forked.run(command, cwd=cwd, **kwargs)


def main_in_process(script, options, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags(options)])
    script.main(script.parse_args())


def default_signals():
    """In a child: what a terminal gives it, also where the tests run under nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(name, options, cwd, **kwargs):
    """Starts a run in the background. -> (process, its folder), once it has printed the folder"""
    command = [sys.executable, str(ALGOS / f"{name}.py"), *flags(options)]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    settings |= {"preexec_fn": default_signals} | kwargs
    process = subprocess.Popen(command, cwd=cwd, **settings)
    line = process.stdout.readline()
    assert "all in runs/" in line, line + process.stderr.read()
    return process, cwd / line.strip().split(" all in ")[1]


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def checkpoint_of(folder):
    return next(folder.glob("runs/*/checkpoint.pt"))


def refused(name, options, monkeypatch):
    """The line that a script prints when it refuses its command line."""
    with pytest.raises(SystemExit) as left:
        main_in_process(load(name), options, monkeypatch)
    line = left.value.code
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line, line
    return line


def same(a, b):
    """Whether two nested structures of dicts, lists and tensors are equal, bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def resume_cases():
    yield CARTPOLE[0], {"num_envs": 1}
    yield from ((name, {"num_envs": 3}) for name in VECTORS)
    # On Atari the replay is full between the checkpoint and the end.
    short = {"total_timesteps": 540, "learning_starts": 180, "checkpoint_frequency": 270}
    short |= {"eval_episodes": 0, "buffer_size": 400, "train_frequency": 30}
    for buffer in ("numpy", "auto"):
        yield from ((ATARI[0], short | {"buffer": buffer, "num_envs": n}) for n in (1, 3))
    for name in FRAMES:
        if name not in ATARI:
            options = short | {"batch_size": 4, "num_minibatches": 4}
            yield name, {k: x for k, x in options.items() if hasattr(load(name).RunArgs, k)}
    yield "per_ddqn_atari", short | {"batch_size": 4, "buffer": "numpy"}


@pytest.mark.parametrize(("name", "changes"), [*resume_cases()])
def test_resumed_run_ends_with_the_same_weights(name, changes, in_tmp, monkeypatch):
    """A run stopped at a checkpoint with its replay and then resumed equals an uninterrupted run,
    bit for bit. ddqn_atari.py has the same loop and Run as its parent (test_family)."""
    script = load(name)
    kept, save = [], script.save_checkpoint

    def save_and_keep(path, state):
        assert save(path, state)
        kept.append(in_tmp / f"{len(kept)}-{state['global_step']}.pt")
        shutil.copy(path, kept[-1])
        return True

    monkeypatch.setattr(script, "save_checkpoint", save_and_keep)
    options = small(name) | changes | {"checkpoint_replay": True}
    main_in_process(script, options, monkeypatch)
    first, through = kept[0], kept[-1]
    (in_tmp / "resumed").mkdir()
    shutil.copy(first, in_tmp / "resumed" / "checkpoint.pt")
    resumed_from = {"resume": str(in_tmp / "resumed" / "checkpoint.pt")}
    main_in_process(script, resumed_from, monkeypatch)
    first, a, b = (script.load_checkpoint(p) for p in (first, through, kept[-1]))
    assert 0 < first["global_step"] < a["global_step"] == b["global_step"]
    changed = 0
    for key in a["q_network"]:
        assert torch.equal(a["q_network"][key], b["q_network"][key])
        changed += not torch.equal(a["q_network"][key], first["q_network"][key])
    assert changed == len(a["q_network"]), "nothing was learned between the two checkpoints"
    assert same(a.get("replay"), b.get("replay"))  # none where nothing is kept between two steps
    assert a["rng"] == b["rng"] and a["envs"]["rng"] == b["envs"]["rng"]
    assert torch.equal(a["torch_rng"], b["torch_rng"])


def test_same_seed_same_run_and_another_seed_another(cartpole, in_tmp, monkeypatch):
    ends = []
    save = cartpole.save_checkpoint
    monkeypatch.setattr(
        cartpole, "save_checkpoint", lambda p, s: ends.append(s["q_network"]) or save(p, s)
    )
    for seed in (1, 1, 2):
        options = small(cartpole.__name__) | {"seed": seed, "checkpoint_frequency": 0}
        main_in_process(cartpole, options, monkeypatch)
    weight = "features.0.weight"
    ends = [end[weight].clone() for end in ends]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_resume_without_replay_refills_it(in_tmp):
    options = small("dqn_cartpole") | {"total_timesteps": 1600}
    first = run("dqn_cartpole", options, in_tmp)
    assert first.returncode == 0, first.stderr
    path = next(in_tmp.glob("runs/*/checkpoint.pt"))
    assert "replay" not in torch.load(path, weights_only=True)
    again = run("dqn_cartpole", {"resume": path, "total_timesteps": 2600}, in_tmp)
    assert again.returncode == 0, again.stderr
    assert torch.load(path, weights_only=True)["global_step"] == 2600
    assert len(list(in_tmp.glob("runs/*"))) == 1, "a resumed run continues in its own folder"


def test_a_checkpoint_without_its_replay_resumes_with_any_buffer(in_tmp, monkeypatch):
    script = load("dqn_atari")
    options = small("dqn_atari") | {"total_timesteps": 800, "eval_episodes": 0}
    main_in_process(script, options | {"buffer": "numpy"}, monkeypatch)
    path = checkpoint_of(in_tmp)
    changes = {"resume": path, "buffer": "auto", "buffer_size": 800, "total_timesteps": 1000}
    main_in_process(script, changes, monkeypatch)
    assert script.load_checkpoint(path)["global_step"] == 1000


@pytest.mark.parametrize("name", ["dqn_atari", "rainbow_atari"])
def test_tiles_and_plain_frames_give_the_same_weights(name, in_tmp, monkeypatch, capsys):
    if "cpp" not in fastreplay_backends():
        pytest.skip("fastreplay is not compiled")
    script, ends = load(name), {}
    options = small(name) | {"buffer": "cpp", "eval_episodes": 0, "checkpoint_replay": True}
    options |= {"total_timesteps": 700, "learning_starts": 300, "buffer_size": 500}
    for storage in ("plain", "auto"):
        main_in_process(script, options | {"replay_storage": storage}, monkeypatch)
        ends[storage] = script.load_checkpoint(checkpoint_of(in_tmp))
        shutil.rmtree(in_tmp / "runs")
    assert "frames" in ends["plain"]["replay"] and "tiles" in ends["auto"]["replay"]
    assert ends["auto"]["args"]["replay_storage"] == "tiles"
    for part in ("q_network", "optimizer", "envs"):
        assert same(ends["plain"][part], ends["auto"][part])
    output = capsys.readouterr().out
    assert "cpp replay, plain, about 7070 bytes a step, 0.0 GB" in output
    assert "cpp replay, tiles, about 650 bytes a step, 0.0 GB" in output


@pytest.mark.parametrize("name", ["dqn_atari", "per_ddqn_atari"])
def test_batches_travel_to_a_gpu_as_bytes_in_two_pinned_buffers(name, monkeypatch):
    """Copies and events of a GPU are stand-ins: a copy is complete when its event is waited for."""
    script, waited, options = load(name), [], {"prioritized": True}
    options = options if name == "per_ddqn_atari" else {}
    args = script.RunArgs(buffer="cpp", replay_storage="plain", buffer_size=120, num_envs=2)

    def filled(device):
        replay = script.make_replay(args, torch.device(device), **options)
        for step in range(40):
            frames = np.full((2, 84, 84), 6 * step, np.uint8)
            actions, no = np.full(2, step), np.zeros(2, bool)
            replay.add(frames, actions, np.ones(2), no, np.full(2, step == 0))
        return replay

    class Event:
        def __init__(self):
            self.copies = []

        def record(self):
            self.copies = [(sent, seen.clone()) for sent, seen in under_way]
            under_way.clear()

        def synchronize(self):
            waited.append(self)
            assert all(torch.equal(sent, seen) for sent, seen in self.copies), "overwritten"

    under_way, plain = [], filled("cpu")
    pinned = filled("cuda")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)

    def to(x, device, non_blocking):
        assert device.type == "cuda" and non_blocking
        under_way.append((x, x))
        return x

    monkeypatch.setattr(torch.Tensor, "to", to)
    buffers = set()
    for turn in range(6):
        batch, expected = pinned.sample(4), plain.sample(4)
        buffers.add(batch.obs.data_ptr())
        assert batch.obs.dtype == torch.uint8
        assert batch.obs.is_contiguous(memory_format=torch.channels_last)
        assert all(map(torch.equal, batch[1:3], expected[1:3]))
        for bytes_, scaled in ((batch.obs, expected.obs), (batch.next_obs, expected.next_obs)):
            torch.testing.assert_close(bytes_.float() / 255, scaled)
        assert len(waited) == max(turn - 1, 0)
    assert len(buffers) == 2 and waited[0] is not waited[1] and waited[0] is waited[2]


def test_tiles_with_the_replay_on_a_gpu(emulation, monkeypatch):
    """The checks of a script and its replay, on the emulation. `auto` is plain there."""
    script, refusals = load("dqn_atari"), []
    monkeypatch.setattr(script, "cuda_problem", lambda args: "")
    monkeypatch.setattr(script.fastreplay, "backends", lambda: ("cpp", "cuda"))
    monkeypatch.setattr(script, "free_memory", lambda: 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 10**9, 8 * 10**9))

    def must(name, rule, holds):
        if not holds:
            refusals.append((name, rule))

    cases = [("auto", "plain", 254_000), ("plain", "plain", 254_000), ("tiles", "tiles", 1_538_000)]
    for asked, taken, fits in cases:
        args = script.RunArgs(buffer="cuda", replay_storage=asked, buffer_size=fits)
        script.check_replay_args(args, must)
        assert args.replay_storage == taken and not refusals
        script.check_replay_args(dataclasses.replace(args, buffer_size=fits + 1), must)
        assert refusals.pop() == ("buffer_size", f"at most {fits} to fit into memory")

    args = script.RunArgs(buffer="cuda", replay_storage="tiles", buffer_size=120, num_envs=2)
    replay = script.make_replay(args, torch.device("cuda"))
    for step in range(30):
        frames = np.full((2, 84, 84), step, np.uint8)
        replay.add(frames, np.zeros(2, int), np.zeros(2), np.zeros(2, bool), np.full(2, step == 0))
    batch = replay.sample(4)
    assert replay.storage == "tiles" and batch.obs.device.type == "cuda"
    assert batch.obs.is_contiguous(memory_format=torch.channels_last)


def fastreplay_backends():
    return load("dqn_atari").fastreplay.backends() if load("dqn_atari").fastreplay else ()


def test_a_replay_that_outgrows_the_memory_is_announced(in_tmp, monkeypatch, capsys):
    script = load("dqn_atari")
    args = script.RunArgs(buffer_size=1_000_000, replay_storage="tiles")
    cases = [(100_000, 8e9, True), (100_000, 10e9, False), (990_000, 0, False), (500_000, 0, True)]
    for stored, free, warns in cases:
        monkeypatch.setattr(script, "free_memory", lambda free=free: int(free))
        replay = SizedReplay(stored, 10**9)
        warning = script.memory_warning(args, replay)
        assert bool(warning) == warns, (stored, free)
    assert warning == (
        "warning: 500000 of 1000000 steps of the replay take 1.0 GB, and the others may need 1.0 "
        "GB, of which 0.0 GB are free: stop with Ctrl-C, and run with a smaller --buffer-size"
    )
    args.replay_storage = "plain"  # its memory was checked at the start
    assert script.memory_warning(args, replay) == ""

    monkeypatch.undo()
    monkeypatch.chdir(in_tmp)
    monkeypatch.setattr(script, "memory_warning", lambda args, replay: "warning: too large")
    options = small("dqn_atari") | {"eval_episodes": 0}
    main_in_process(script, options, monkeypatch)
    assert "warning: too large" in capsys.readouterr().err


class SizedReplay:
    """A replay of which only the size matters."""

    def __init__(self, stored, nbytes):
        self.stored, self.nbytes = stored, nbytes

    def __len__(self):
        return self.stored


@pytest.mark.parametrize("name", [CARTPOLE[0], ATARI[0]])
def test_an_evaluation_needs_only_the_network(name, in_tmp, monkeypatch, capsys):
    """Not the saved run's memory, replay, GPU, W&B or steps. It may be from another machine."""
    script = load(name)
    options = small(name) | {"checkpoint_replay": True, "total_timesteps": 800}
    main_in_process(script, options | {"eval_episodes": 0}, monkeypatch)
    path = checkpoint_of(in_tmp)
    state = script.load_checkpoint(path)
    assert "replay" in state
    state["args"] |= {"device": "cuda", "track": True, "buffer_size": 10**12}
    state["args"] |= {"capture_video": True, "learning_starts": 10**9, "batch_size": 10**8}
    state["args"] |= {"buffer": "cuda"} if "buffer" in state["args"] else {}
    assert script.save_checkpoint(in_tmp / "elsewhere.pt", state)
    monkeypatch.setattr(script, "VIDEO_PACKAGES", ("no_such_package",))
    monkeypatch.setattr(script, "fastreplay", None, raising=False)
    before = sorted(in_tmp.rglob("*"))
    capsys.readouterr()
    main_in_process(script, {"evaluate": in_tmp / "elsewhere.pt", "eval_episodes": 2}, monkeypatch)
    assert "in 2 episodes" in capsys.readouterr().out
    assert sorted(in_tmp.rglob("*")) == before, "an evaluation writes nothing"


def test_evaluations_play_new_seeds_each_time_and_reproducibly(in_tmp, monkeypatch):
    script, seeds = load("dqn_cartpole"), []
    evaluate = script.evaluate

    def evaluate_and_keep(q_network, args, device, seed, stop=()):
        result = evaluate(q_network, args, device, seed, stop)
        seeds.append((seed, result[0].tolist()))
        return result

    monkeypatch.setattr(script, "evaluate", evaluate_and_keep)
    main_in_process(script, small("dqn_cartpole"), monkeypatch)
    main_in_process(script, {"evaluate": checkpoint_of(in_tmp)}, monkeypatch)
    main_in_process(script, {"evaluate": checkpoint_of(in_tmp), "seed": 5}, monkeypatch)
    *during, last, again, other = seeds
    assert len({seed for seed, _ in [*during, last, other]}) == 4, "three evaluations and another"
    assert again == last, "the checkpoint is from the last evaluation"


def test_the_final_evaluation_can_be_left_out(in_tmp):
    result = run("dqn_cartpole", small("dqn_cartpole") | {"eval_episodes": 0}, in_tmp)
    assert result.returncode == 0 and "evaluated" not in result.stdout + result.stderr


def test_training_stops_at_a_return(in_tmp):
    options = small("dqn_cartpole") | {"stop_return": 9.0, "total_timesteps": 10**8}
    result = run("dqn_cartpole", options, in_tmp)
    assert result.returncode == 0 and "evaluated" in result.stdout, result.stderr
    assert "go on with" not in result.stdout
    state = torch.load(checkpoint_of(in_tmp), weights_only=True)
    assert len(state["recent_returns"]) == 100 and np.mean(state["recent_returns"]) >= 9


def test_what_a_resumed_run_cannot_change(in_tmp, monkeypatch):
    script = load("dqn_cartpole")
    options = small("dqn_cartpole") | {"total_timesteps": 600, "eval_episodes": 1}
    main_in_process(script, options | {"checkpoint_replay": True}, monkeypatch)
    path = checkpoint_of(in_tmp)
    before = path.read_bytes()
    fixed = ({"num_envs": 2}, {"env_id": "Acrobot-v1"}, {"buffer_size": 5000}, {"gamma": 0.5})
    fixed += ({"optimizer": "adamw"},)
    for change in fixed:
        line = refused("dqn_cartpole", {"resume": path} | change, monkeypatch)
        assert "cannot change in a resumed run; leave it at" in line
    line = refused("dqn_cartpole", {"evaluate": path, "env_id": "Acrobot-v1"}, monkeypatch)
    assert "does not fit these arguments" in line
    line = refused("dqn_cartpole", {"evaluate": path, "resume": path}, monkeypatch)
    assert "--resume or --evaluate" in line
    assert path.read_bytes() == before


def evaluated_steps(folder):
    (path,) = folder.glob("runs/*")
    return [event.step for event in scalars(path)["eval/episodic_return"]]


def test_every_evaluation_is_in_the_log_once(in_tmp, monkeypatch):
    """Of a run that is killed just after a checkpoint, and of one that is made longer."""
    script = load("dqn_cartpole")
    options = small("dqn_cartpole") | {"total_timesteps": 2000, "eval_frequency": 500}
    save = script.Run.save

    def dies(run):
        save(run)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "save", dies)
        with pytest.raises(RuntimeError, match="killed"):
            main_in_process(script, options | {"checkpoint_frequency": 1000}, monkeypatch)
    assert evaluated_steps(in_tmp) == [500, 1000]
    main_in_process(script, {"resume": checkpoint_of(in_tmp)}, monkeypatch)
    changes = {"resume": checkpoint_of(in_tmp), "total_timesteps": 3000}
    main_in_process(script, changes, monkeypatch)
    assert evaluated_steps(in_tmp) == [500, 1000, 1500, 2000, 2500, 3000]


def test_an_evaluation_that_was_interrupted_is_made_again(in_tmp, monkeypatch, capsys):
    script = load("dqn_cartpole")
    options = small("dqn_cartpole") | {"total_timesteps": 1500, "eval_frequency": 500}
    evaluate = script.evaluate

    def interrupted(*args):
        args[-1].append(time.time())  # Ctrl-C
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "evaluate", interrupted)
        main_in_process(script, options, monkeypatch)
    assert "evaluation stopped after 0 episodes" in capsys.readouterr().out
    main_in_process(script, {"resume": checkpoint_of(in_tmp)}, monkeypatch)
    assert evaluated_steps(in_tmp) == [500, 1000, 1500]


def test_an_evaluation_starts_games_as_the_training_did(in_tmp, monkeypatch):
    script = load("dqn_atari")
    options = small("dqn_atari") | {"total_timesteps": 8, "eval_episodes": 0, "fire_reset": False}
    main_in_process(script, options, monkeypatch)
    command = [script.__file__, "--evaluate", str(checkpoint_of(in_tmp))]
    monkeypatch.setattr(sys, "argv", command)
    assert script.parse_args().fire_reset is False


@pytest.mark.parametrize("name", ["ddqn_cartpole", "ddqn_atari"])
def test_run_evaluate_and_logs(name, in_tmp, monkeypatch, capsys):
    result = run(name, small(name), in_tmp)
    assert result.returncode == 0, result.stderr
    assert "evaluated" in result.stdout + result.stderr
    path = next(in_tmp.glob("runs/*/checkpoint.pt"))
    before = path.read_bytes()
    main_in_process(load(name), {"evaluate": path, "eval_episodes": 3}, monkeypatch)
    assert "in 3" in capsys.readouterr().out
    assert path.read_bytes() == before and len(list(in_tmp.glob("runs/*"))) == 1
    tags = scalars(path.parent)
    wanted = {"charts/SPS", "charts/epsilon", "charts/hours", "eval/episodic_return"}
    assert wanted | {"losses/td_loss", "losses/q_values"} <= set(tags)
    if name == "ddqn_cartpole":  # every episode; CartPole's reward is 1 per step
        assert "charts/mean_return_100" in tags
        returns, lengths = tags["charts/episodic_return"], tags["charts/episodic_length"]
        assert [e.value for e in returns] == [e.value for e in lengths]
        assert 0.8 * 3000 < sum(e.value for e in lengths) <= 3000
        assert all(np.diff([e.step for e in returns]) > 0)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("dqn_atari", signal.SIGINT),
        ("dqn_cartpole", signal.SIGTERM),
        ("dqn_cartpole", signal.SIGHUP),
    ],
)
def test_a_signal_saves_and_prints_the_resume_command(name, number, in_tmp):
    options = small(name) | {"total_timesteps": 10**8, "checkpoint_frequency": 0}
    process, _ = started(name, options | {"exp_name": "it's mine"}, in_tmp)
    time.sleep(4 if "atari" in name else 1)  # to the first step, also on a busy machine
    process.send_signal(number)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors
    line = next(line for line in rest.splitlines() if line.startswith("go on with: python "))
    command = [sys.executable, *shlex.split(line)[4:]]
    assert "it's mine" in command[-1], "quoted"
    step = torch.load(in_tmp / command[-1], weights_only=True)["global_step"]
    assert step > 0
    command += ["--total-timesteps", str(step + 50)]
    resumed = forked.run(command, cwd=in_tmp)
    assert resumed.returncode == 0, resumed.stderr


def test_a_hangup_that_nohup_ignores_does_not_stop_a_run(in_tmp):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    options = small("dqn_cartpole") | {"total_timesteps": 10**8}
    process, _ = started("dqn_cartpole", options, in_tmp, preexec_fn=ignore)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def handles_hangup(process):
    """Whether a process has a handler for SIGHUP (Linux), as a run has once it is set up."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return caught >> (signal.SIGHUP - 1) & 1


def test_ctrl_c_ends_an_evaluation_with_one_line(in_tmp):
    options = small("dqn_cartpole") | {"total_timesteps": 400, "eval_episodes": 1}
    assert run("dqn_cartpole", options, in_tmp).returncode == 0
    command = [sys.executable, str(ALGOS / "dqn_cartpole.py"), "--evaluate"]
    command += [str(checkpoint_of(in_tmp)), "--eval-episodes", "1000000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, preexec_fn=default_signals, **pipes)
    while process.poll() is None and not handles_hangup(process):
        time.sleep(0.1)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors
    assert "evaluation stopped after" in out


def test_kill_while_a_checkpoint_is_written_never_leaves_a_broken_one(in_tmp):
    """kill -9 at random moments of a run that writes checkpoints nearly all the time."""
    options = small("dqn_cartpole") | {"total_timesteps": 10**8, "buffer_size": 200_000}
    options |= {"checkpoint_frequency": 20, "checkpoint_replay": True, "eval_frequency": 0}
    command = [sys.executable, str(ALGOS / "dqn_cartpole.py"), *flags(options)]
    script = load("dqn_cartpole")
    steps = set()
    for attempt in range(6):
        folder = in_tmp / str(attempt)
        folder.mkdir()
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not list(folder.glob("runs/*/checkpoint.pt")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1 + 0.137 * attempt)
        process.kill()
        process.wait()
        state = script.load_checkpoint(next(folder.glob("runs/*/checkpoint.pt")))
        steps.add(state["global_step"])
    assert len(steps) > 1


def test_the_first_line_describes_the_run(in_tmp):
    command = [sys.executable, str(ALGOS / "ddqn_atari.py")]
    process = subprocess.Popen(
        command, cwd=in_tmp, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    line = process.stdout.readline()
    process.kill()
    process.communicate()
    assert "BreakoutNoFrameskip-v4" in line and "runs/" in line


@pytest.mark.parametrize("name", ["dqn_cartpole", "dqn_atari"])
def test_every_evaluation_is_filmed(name, in_tmp, monkeypatch, capsys):
    script = load(name)
    options = small(name) | {"capture_video": True, "total_timesteps": 1600, "eval_episodes": 1}
    options |= {"eval_frequency": 800, "learning_starts": 700, "eval_e": 1.0}
    if name == "dqn_atari":
        options["eval_max_frames"] = 200
    main_in_process(script, options, monkeypatch)
    folder = checkpoint_of(in_tmp).parent / "videos"
    assert sorted(film.name for film in folder.iterdir()) == ["step-1600.mp4", "step-800.mp4"]
    main_in_process(script, {"evaluate": checkpoint_of(in_tmp), "capture_video": True}, monkeypatch)
    films = sorted(film.name for film in folder.iterdir())
    assert films == ["step-1600-again.mp4", "step-1600.mp4", "step-800.mp4"]
    assert all((folder / film).stat().st_size > 1000 for film in films)


def test_a_film_shows_one_episode():
    """It has one picture per observation, and the last one shows the final observation."""
    script, seed = load("dqn_cartpole"), (1, 7)
    args = script.RunArgs(eval_episodes=3, eval_e=1.0)
    torch.manual_seed(1)
    network = script.QNetwork(np.zeros(4), 2)
    returns, _, actions = script.evaluate(network, args, torch.device("cpu"), seed)
    pictures = list(script.film(args, seed, actions))
    envs = script.make_envs(args.env_id, 1, seed, render_mode="rgb_array")
    envs.reset()
    for action in actions:
        _, _, terminations, _, _ = envs.step(np.array([action]))
    assert terminations[0] and len(pictures) == len(actions) + 1 == returns[0] + 1
    assert np.array_equal(pictures[-1], envs.envs[0].render())


BAD = [
    ({"env_id": "NoSuchGame-v4"}, "NoSuchGame"),
    ({"env_id": "Pendulum-v1"}, "Pendulum-v1"),
    ({"env_id": "nonsense:also/nonsense-v1"}, "nonsense"),
    ({"total_timesteps": 0}, "--total-timesteps must be positive"),
    ({"total_timesteps": "many"}, "--total-timesteps"),
    ({"learning_rate": -1}, "--learning-rate must be positive"),
    ({"learning_rate": "nan"}, "--learning-rate must be positive"),
    ({"gamma": 1.5}, "--gamma must be between 0 and 1"),
    ({"end_e": -0.1}, "--end-e must be between 0 and 1"),
    ({"tau": "nan"}, "--tau must be between 0 and 1"),
    ({"num_envs": 0}, "--num-envs must be positive"),
    ({"batch_size": -3}, "--batch-size must be positive"),
    ({"seed": -1}, "--seed must be 0 or more"),
    ({"learning_starts": 2_000_000}, "--learning-starts must be at most"),
    ({"buffer_size": 10**12}, "--buffer-size must be at most"),
    ({"buffer_size": 1}, "--buffer-size must be at least"),
    ({"buffer_size": 800}, "--learning-starts must be at most 800"),
    ({"v_min": 1}, "--v-min"),
    ({"log_frequency": 0}, "--log-frequency must be positive"),
    ({"exploration_fraction": 1.5}, "--exploration-fraction must be between 0 and 1"),
    ({"batch_size": 2**40}, "--batch-size must be at most"),
    ({"torch_threads": 2**40}, "--torch-threads must be at most"),
    ({"device": "cuda"}, "--device must be"),
    ({"device": "tpu"}, "--device"),
    ({"loss": "l1"}, "--loss"),
    ({"no_such_flag": 1}, "--no-such-flag"),
    ({"resume": "nowhere.pt"}, "no checkpoint at nowhere.pt"),
    ({"evaluate": "nowhere.pt"}, "no checkpoint at nowhere.pt"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
@pytest.mark.parametrize("name", [CARTPOLE[0], ATARI[0]])
def test_bad_input_is_refused(name, options, message, in_tmp, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        main_in_process(load(name), options, monkeypatch)
    printed = capsys.readouterr()
    output = printed.out + printed.err
    if isinstance(left.value.code, str):
        output = left.value.code
        assert output.startswith("error: ") and "\n" not in output
    else:
        assert left.value.code != 0
    assert message in output
    assert not (in_tmp / "runs").exists(), "nothing may be written"


def test_wrong_kind_of_environment_names_the_right_file(in_tmp):
    atari = run("dqn_atari", {"env_id": "CartPole-v1"}, in_tmp)
    assert atari.returncode != 0 and "dqn_cartpole.py" in atari.stderr
    pixels = run("dqn_cartpole", {"env_id": "PongNoFrameskip-v4"}, in_tmp)
    assert pixels.returncode != 0 and "dqn_atari.py" in pixels.stderr


ATARI_LIMITS = [
    ({"buffer": "cuda"}, "--buffer must be another: "),
    ({"buffer": "numpy", "replay_storage": "tiles"}, "--replay-storage must be plain or auto with"),
    ({"n_step": 1001}, "--n-step must be at most 1000"),
    ({"n_step": 0}, "--n-step must be positive"),
    ({"buffer_size": 140_000_000}, "--buffer-size must be at most"),
    ({"buffer_size": 103}, "--buffer-size must be at least 104"),
    ({"learning_starts": 39}, "--learning-starts must be at least 40"),
    ({"eval_max_frames": 3_000_000_000}, "--eval-max-frames must be below 2**31 - 1"),
    ({"env_id": "Breakout-v4"}, "--env-id Breakout-v4 skips a random number of frames"),
]


@pytest.mark.parametrize(
    ("options", "message"), ATARI_LIMITS, ids=[str(options) for options, _ in ATARI_LIMITS]
)
def test_limits_of_the_replay_and_the_games(options, message, in_tmp, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refused("dqn_atari", options, monkeypatch)
    assert not (in_tmp / "runs").exists()


def test_the_limit_of_rows_applies_even_with_enough_memory(in_tmp, monkeypatch):
    monkeypatch.setattr(load("dqn_atari"), "free_memory", lambda: 2**50)
    line = refused("dqn_atari", {"buffer_size": 140_000_000}, monkeypatch)
    assert f"at most {2**27}" in line


def test_the_smallest_accepted_settings_run(in_tmp, monkeypatch):
    """Batches can be drawn with the smallest replay and the earliest start."""
    script = load("dqn_atari")
    options = {"buffer_size": 104, "learning_starts": 40, "total_timesteps": 1200}
    options |= {"eval_episodes": 0, "train_frequency": 40, "torch_threads": 1}
    main_in_process(script, options | {"env_id": "PongNoFrameskip-v4"}, monkeypatch)
    script = load("dqn_cartpole")
    options = {"buffer_size": 4, "learning_starts": 1, "total_timesteps": 400, "batch_size": 4}
    main_in_process(script, options | {"eval_episodes": 0}, monkeypatch)


CLEANRL = [
    (["--no-cuda"], {"device": "cpu"}),
    (["--no_cuda", "--save_model"], {"device": "cpu"}),
    (["--cuda", "--torch-deterministic"], {"device": "auto"}),
    (["--no-torch-deterministic", "--no-save-model"], {}),
    (["--exploration-fraction", "0"], {"exploration_fraction": 0.0}),
    (["--learning-starts", "10000", "--buffer-size", "10000"], {"buffer_size": 10000}),
    (["--wandb_entity=a_b", "--num_envs", "1"], {"wandb_entity": "a_b", "num_envs": 1}),
]


@pytest.mark.parametrize(("words", "expected"), CLEANRL, ids=[" ".join(w) for w, _ in CLEANRL])
def test_cleanrls_commands(words, expected, monkeypatch):
    script = load("dqn_cartpole")
    monkeypatch.setattr(sys, "argv", ["dqn_cartpole.py", *words])
    args = script.parse_args()
    script.check_args(args)
    assert expected.items() <= dataclasses.asdict(args).items()


def test_an_algorithms_own_arguments(monkeypatch):
    """A child's arguments may be negative or zero; its rules are in its Args."""
    script = load("dqn_cartpole")

    @dataclasses.dataclass
    class OwnArgs(script.RunArgs):
        v_min: float = -10.0
        v_max: float = 0.0

        def rules(self):
            return [("v_max", "above --v-min", self.v_min < self.v_max)]

    script.check_args(OwnArgs())
    with pytest.raises(SystemExit, match=r"--v-max must be above --v-min \(it is -11\)"):
        script.check_args(OwnArgs(v_max=-11))
    with pytest.raises(SystemExit, match="--v-min must be a finite number"):
        script.check_args(OwnArgs(v_min=float("nan")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with its replay, of each kind of script."""
    states = {}
    for name in (CARTPOLE[0], ATARI[0]):
        folder = tmp_path_factory.mktemp(name)
        options = small(name) | {"checkpoint_replay": True, "eval_episodes": 0}
        result = run(name, options | {"total_timesteps": 600}, folder)
        assert result.returncode == 0, result.stderr
        states[name] = checkpoint_of(folder)
    return states


def damaged(state, key, value):
    *path, last = key.split(".")
    for part in path:
        state = state[part]
    if isinstance(state, list):
        state.append(value)
    else:
        state[last] = value


DAMAGE = {
    "q_network": {},
    "optimizer": {"state": 3},
    "rng": {"bit_generator": "PCG64"},
    "rng.state": "nonsense",
    "torch_rng": torch.zeros(3),
    "envs": {},
    "envs.rng": None,
    "envs.seeds": "1",
    "replay": [1, 2, 3],
    "global_step": "many",
    "recent_returns": None,
    "seconds": None,
    "args": {"gamma": 1},
    "args.gamma": "0.99",
    "args.num_envs": 2.5,
    "args.of_another_version": 1,
    "recent_returns.0": "many",
}


@pytest.mark.parametrize("name", [CARTPOLE[0], ATARI[0]])
@pytest.mark.parametrize(("key", "value"), DAMAGE.items(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_one_line(name, key, value, whole, in_tmp, monkeypatch):
    state = torch.load(whole[name], weights_only=True)
    damaged(state, key, value)
    torch.save(state, in_tmp / "bad.pt")
    line = refused(name, {"resume": in_tmp / "bad.pt"}, monkeypatch)
    assert "damaged" in line or "does not fit these arguments" in line
    assert [path.name for path in in_tmp.iterdir()] == ["bad.pt"]


@pytest.mark.parametrize("head", [-1, 10**6, "3"])
def test_a_replay_with_a_damaged_head_is_one_line(head, whole, in_tmp, monkeypatch):
    for name in (CARTPOLE[0], ATARI[0]):
        state = torch.load(whole[name], weights_only=True)
        if name == CARTPOLE[0]:
            state["replay"] = (head, *state["replay"][1:])
        else:
            state["replay"]["head"] = head
        torch.save(state, in_tmp / "bad.pt")
        line = refused(name, {"resume": in_tmp / "bad.pt"}, monkeypatch)
        assert "does not fit these arguments" in line


def test_damaged_and_foreign_files_are_refused(whole, in_tmp, monkeypatch):
    script, path = load("dqn_cartpole"), whole["dqn_cartpole"]
    content = path.read_bytes()
    line = refused("ddqn_cartpole", {"resume": path}, monkeypatch)
    assert "written by dqn_cartpole.py" in line
    # a flipped bit in the middle of the first weights, which torch alone would load
    weight = torch.load(path, weights_only=True)["q_network"]["features.2.weight"]
    at = content.index(weight.numpy().tobytes()[:64])
    flipped = bytearray(content)
    flipped[at + 5] ^= 0x10
    bad = {"cut.pt": content[: len(content) // 2], "empty.pt": b"", "text.pt": b"hello"}
    bad["flipped.pt"] = bytes(flipped)
    for file, damage in bad.items():
        (in_tmp / file).write_bytes(damage)
    torch.load(in_tmp / "flipped.pt", weights_only=True, mmap=True)
    torch.save({"weights": torch.zeros(3)}, in_tmp / "foreign.pt")
    torch.save(script.QNetwork(np.zeros(4), 2), in_tmp / "code.pt")  # would run code when loaded
    (in_tmp / "folder.pt").mkdir()
    for file in (*bad, "foreign.pt", "code.pt", "folder.pt"):
        for flag in ("resume", "evaluate"):
            line = refused("dqn_cartpole", {flag: in_tmp / file}, monkeypatch)
            assert f"{file} is not a checkpoint of this script, or is damaged" in line


def test_a_folder_that_cannot_be_written(in_tmp):
    (in_tmp / "runs").write_text("a file where the folder should be")
    result = run("dqn_cartpole", small("dqn_cartpole"), in_tmp)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot write to runs")


def test_a_checkpoint_that_cannot_be_written_keeps_the_old_one(script, in_tmp, capsys):
    path = in_tmp / "checkpoint.pt"
    path.with_suffix(".partial").mkdir()  # no file can be opened at this path
    assert not script.save_checkpoint(path, {"a": torch.zeros(3)})
    output = capsys.readouterr().err
    assert "checkpoint.pt not written (is a directory)\n" in output, "there is no old one"
    path.with_suffix(".partial").rmdir()
    assert script.save_checkpoint(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    path.with_suffix(".partial").mkdir()
    assert not script.save_checkpoint(path, {"a": torch.ones(3)})
    assert "the one before it is kept" in capsys.readouterr().err
    assert path.read_bytes() == before


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk(in_tmp):
    """No file may grow beyond 20 kB: first the log fails, then the checkpoint."""
    options = small("dqn_cartpole") | {"log_frequency": 1, "eval_frequency": 0}
    script = str(ALGOS / "dqn_cartpole.py")
    command = [sys.executable, "-c", LIMITED, "20000", script, *flags(options)]
    result = subprocess.run(command, cwd=in_tmp, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert "Traceback" not in output
    assert output.count("error: cannot log to runs/") == 1 and "training continues" in output
    assert "checkpoint.pt not written (file too large)\n" in output
    assert result.returncode == 1 and "evaluated" in output


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_closed_outputs_do_not_stop_a_run(closed, in_tmp):
    """Outputs that are closed from the start, as by `>&-`."""
    redirect = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-"}[closed]
    command = [sys.executable, str(ALGOS / "dqn_cartpole.py"), *flags(small("dqn_cartpole"))]
    shell = f"{shlex.join(command)} {redirect}"
    result = subprocess.run(shell, shell=True, cwd=in_tmp, capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert torch.load(checkpoint_of(in_tmp), weights_only=True)["global_step"] == 3000


@pytest.mark.parametrize("full", ["stdout", "stderr", "both"])
def test_full_outputs_do_not_stop_a_run(full, in_tmp):
    command = [sys.executable, str(ALGOS / "dqn_cartpole.py"), *flags(small("dqn_cartpole"))]
    with open("/dev/full", "w") as nowhere:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        streams |= {name: nowhere for name in streams if full in (name, "both")}
        result = subprocess.run(command, cwd=in_tmp, text=True, **streams)
    assert result.returncode == 0 and "Traceback" not in (result.stderr or "")
    assert torch.load(checkpoint_of(in_tmp), weights_only=True)["global_step"] == 3000


def test_a_broken_pipe_does_not_stop_a_run(in_tmp):
    """As after `| head -1`."""
    process, folder = started("dqn_cartpole", small("dqn_cartpole"), in_tmp)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == 3000


class Odd(gym.Env):
    """An environment that counts its steps, with configurable faults."""

    def __init__(self, space=None, actions=None, ends=20, value=1.0, bad_step=5, bad_episode=0):
        box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = box if space is None else space
        self.action_space = gym.spaces.Discrete(3) if actions is None else actions
        self.ends, self.value, self.bad_step, self.bad_episode = ends, value, bad_step, bad_episode
        self.episode = -1

    def observation(self):
        bad = self.t == self.bad_step and self.episode >= self.bad_episode
        return np.array([self.t, self.value if bad else 0], np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return self.observation(), {}

    def step(self, action):
        assert self.action_space.contains(np.int64(action))
        self.t += 1
        return self.observation(), 1.0, self.t == self.ends, False, {}


@pytest.fixture
def odd():
    """Registers an Odd environment with these arguments."""

    def register(**kwargs):
        gym.register("Odd-v0", entry_point=lambda **options: Odd(**kwargs), order_enforce=False)
        return {"env_id": "Odd-v0"}

    yield register
    gym.registry.pop("Odd-v0", None)


def test_actions_that_do_not_start_at_zero(odd, in_tmp, monkeypatch):
    options = small("dqn_cartpole") | odd(actions=gym.spaces.Discrete(3, start=-1))
    main_in_process(load("dqn_cartpole"), options | {"checkpoint_replay": True}, monkeypatch)
    state = torch.load(checkpoint_of(in_tmp), weights_only=True)
    assert set(state["replay"][2][1].tolist()) == {0, 1, 2}, "indices of the network's outputs"
    path = checkpoint_of(in_tmp)
    main_in_process(load("dqn_cartpole"), {"resume": path, "total_timesteps": 3100}, monkeypatch)


WRONG_SPACES = {
    "MultiDiscrete actions": {"actions": gym.spaces.MultiDiscrete([2, 2])},
    "Box actions": {"actions": gym.spaces.Box(-1, 1, (1,))},
    "a vector of numbers": {"space": gym.spaces.Box(0, 1, (0,))},
    "it observes Discrete": {"space": gym.spaces.Discrete(4)},
    "it observes Box(0.0, 1.0, (2, 2)": {"space": gym.spaces.Box(0, 1, (2, 2))},
}


@pytest.mark.parametrize(("message", "spaces"), WRONG_SPACES.items(), ids=WRONG_SPACES)
def test_environments_of_the_wrong_kind(message, spaces, odd, in_tmp, monkeypatch):
    line = refused("dqn_cartpole", odd(**spaces), monkeypatch)
    assert message in line and "dqn_atari.py" in line
    assert not (in_tmp / "runs").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", [0, 5])
def test_observations_that_are_not_finite_stop_the_run(
    value, step, odd, in_tmp, monkeypatch, capsys
):
    options = small("dqn_cartpole") | odd(value=value, bad_step=step)
    line = refused("dqn_cartpole", options, monkeypatch)
    assert "last checkpoint" not in capsys.readouterr().err, "there is none"
    assert "Odd-v0 returned a NaN or infinite observation" in line


def test_an_error_in_training_names_the_last_checkpoint(odd, in_tmp):
    """If there is one and it is complete. (Odd is registered only in this process.)"""
    options = small("dqn_cartpole") | odd(value=np.nan, bad_episode=80)
    with pytest.raises(SystemExit, match="NaN"):
        main_in_process(load("dqn_cartpole"), options, pytest.MonkeyPatch())
    assert torch.load(checkpoint_of(in_tmp), weights_only=True)["global_step"] == 1500


def test_a_loss_that_is_not_finite_stops_the_run(in_tmp, monkeypatch):
    script = load("dqn_cartpole")
    saved = []

    def keep(path, state):
        finite = all(x.isfinite().all() for x in state["q_network"].values())
        saved.append((state["global_step"], finite))
        return True

    monkeypatch.setattr(script, "save_checkpoint", keep)
    td_loss, calls = script.td_loss, iter(range(10**6))

    def failing(*args):
        loss, td_error, q_taken = td_loss(*args)
        return loss * (np.nan if next(calls) == 150 else 1.0), td_error, q_taken

    monkeypatch.setattr(script, "td_loss", failing)
    options = small("dqn_cartpole") | {"checkpoint_frequency": 500}
    line = refused("dqn_cartpole", options, monkeypatch)
    assert "the loss is not finite" in line
    assert saved == [(500, True), (1000, True), (1500, True)]


def test_weights_that_are_not_finite_are_not_saved(in_tmp, monkeypatch):
    script, steps, calls = load("dqn_cartpole"), [], iter(range(10**6))
    monkeypatch.setattr(script, "save_checkpoint", lambda path, s: steps.append(s["global_step"]))
    td_loss = script.td_loss

    def failing(*args):
        loss, td_error, q_taken = td_loss(*args)
        return loss * (np.nan if next(calls) == 150 else 1.0), td_error, q_taken

    monkeypatch.setattr(script, "td_loss", failing)
    options = small("dqn_cartpole") | {"checkpoint_frequency": 500, "log_frequency": 10**6}
    assert "a weight is NaN" in refused("dqn_cartpole", options, monkeypatch)
    assert steps == [500, 1000, 1500]


def test_ids_that_gymnasium_completes(in_tmp, monkeypatch, capsys):
    """`CartPole`, the newest version, and `module:Id`, which imports the module."""
    for env_id in ("CartPole", "gymnasium.envs.classic_control:CartPole-v1"):
        options = small("dqn_cartpole") | {"env_id": env_id, "total_timesteps": 400}
        main_in_process(load("dqn_cartpole"), options, monkeypatch)
        assert "in 3 episodes" in capsys.readouterr().out


def test_an_environment_that_cannot_be_filmed_is_refused_at_the_start(odd, in_tmp, monkeypatch):
    options = small("dqn_cartpole") | odd() | {"capture_video": True}
    assert "--capture-video: Odd-v0 renders no" in refused("dqn_cartpole", options, monkeypatch)
    assert not (in_tmp / "runs").exists()


@pytest.mark.parametrize("message", ["no picture today", ""])
def test_a_film_that_fails_does_not_stop_a_run(message, in_tmp, monkeypatch, capsys):
    script = load("dqn_cartpole")

    def failing(*args):
        yield np.zeros((4, 4, 3), np.uint8)
        raise RuntimeError(message)

    monkeypatch.setattr(script, "film", failing)
    options = small("dqn_cartpole") | {"capture_video": True, "total_timesteps": 400}
    main_in_process(script, options, monkeypatch)
    assert f"step-400.mp4 not written (RuntimeError({message!r}))" in capsys.readouterr().out
    assert script.load_checkpoint(checkpoint_of(in_tmp))["global_step"] == 400


def test_a_resumed_run_uses_a_new_learning_rate(in_tmp, monkeypatch):
    script = load("dqn_atari")
    options = small("dqn_atari") | {"total_timesteps": 600, "eval_episodes": 0}
    main_in_process(script, options, monkeypatch)
    changes = {"resume": checkpoint_of(in_tmp), "total_timesteps": 800, "learning_rate": 1e-9}
    main_in_process(script, changes, monkeypatch)
    state = script.load_checkpoint(checkpoint_of(in_tmp))
    assert state["optimizer"]["param_groups"][0]["lr"] == 1e-9


def test_a_resumed_run_with_no_steps_left_says_so(in_tmp, monkeypatch, capsys):
    script = load("dqn_cartpole")
    options = small("dqn_cartpole") | {"total_timesteps": 400, "eval_episodes": 0}
    main_in_process(script, options, monkeypatch)
    capsys.readouterr()
    main_in_process(script, {"resume": checkpoint_of(in_tmp)}, monkeypatch)
    assert "no step was trained: raise --total-timesteps" in capsys.readouterr().out


def test_a_name_that_the_terminal_cannot_encode(in_tmp):
    options = small("dqn_cartpole") | {"exp_name": "caf\u00e9", "total_timesteps": 400}
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = run("dqn_cartpole", options, in_tmp, env=environment)
    assert result.returncode == 0 and "caf?" in result.stdout and "evaluated" in result.stdout


def test_compiling_without_a_compiler_is_refused(in_tmp, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C++ compiler" in refused("dqn_atari", {"compile": True}, monkeypatch)


def test_an_environment_without_an_end_is_evaluated(odd, in_tmp, monkeypatch, capsys):
    options = small("dqn_cartpole") | odd(ends=-1) | {"eval_max_steps": 50, "eval_episodes": 3}
    main_in_process(load("dqn_cartpole"), options | {"total_timesteps": 500}, monkeypatch)
    output = capsys.readouterr().out
    assert "3 of these episodes were cut at --eval-max-steps 50" in output
    assert "evaluated: 50.0 +- 0.0 in 3 episodes" in output


def test_other_environments_with_vectors(in_tmp):
    for env_id in ("Acrobot-v1", "MountainCar-v0"):
        options = small("dqn_cartpole") | {"env_id": env_id, "total_timesteps": 700}
        result = run("dqn_cartpole", options | {"num_envs": 2}, in_tmp)
        assert result.returncode == 0, result.stderr


def test_polyak_targets_move_a_little_at_every_sync(cartpole, in_tmp, monkeypatch):
    """tau = 0.25 and one sync: theta^- = 0.25 theta + 0.75 theta_0."""
    ends = []
    save = cartpole.save_checkpoint
    monkeypatch.setattr(cartpole, "save_checkpoint", lambda p, s: ends.append(s) or save(p, s))
    options = small(cartpole.__name__) | {"tau": 0.25, "target_network_frequency": 400}
    options |= {"total_timesteps": 400, "checkpoint_frequency": 0, "learning_starts": 390}
    main_in_process(cartpole, options, monkeypatch)
    torch.manual_seed(1)
    start = cartpole.QNetwork(np.zeros(4), 2).state_dict()
    for key, value in ends[-1]["target_network"].items():
        expected = start[key] + 0.25 * (ends[-1]["q_network"][key] - start[key])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
        assert not torch.equal(value, start[key])


def test_missing_packages_for_films_are_reported_at_the_start(script, in_tmp, monkeypatch):
    monkeypatch.setattr(script, "VIDEO_PACKAGES", ("no_such_package",))
    with pytest.raises(SystemExit, match="pip install no_such_package"):
        main_in_process(script, {"capture_video": True}, monkeypatch)
    assert not (in_tmp / "runs").exists()


def test_a_missing_wandb_is_reported_by_name(in_tmp, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install wandb" in refused("dqn_cartpole", {"track": True}, monkeypatch)


def test_help_names_every_argument_with_its_meaning():
    command = [sys.executable, str(ALGOS / "ddqn_atari.py"), "--help"]
    result = forked.run(command)
    assert result.returncode == 0
    output = " ".join(result.stdout.replace("│", " ").split())
    for field in dataclasses.fields(load("ddqn_atari").RunArgs):
        assert "--" + field.name.replace("_", "-") in output
    for meaning in ("any Atari game", "agent steps kept for replay", "epsilon while evaluating"):
        assert meaning in output
