"""The scripts as a person runs them: checkpoints, resume, Ctrl-C, and bad input."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ALGOS, ATARI, CARTPOLE, load

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
        "env_id": "PongNoFrameskip-v4",
        "torch_threads": 1,
    },
}


def small(name):
    return SMALL[name.split("_")[1]]


def flags(options):
    """{"total_timesteps": 3} -> ["--total-timesteps", "3"]; True and False become switches"""
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
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **kwargs)


def main_in_process(script, options, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags(options)])
    script.main(*script.parse_args())


def same(a, b):
    """Whether two nests of dicts, lists and tensors are equal to the bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("buffer", ["numpy", "auto"])
def test_resumed_run_ends_with_the_same_weights(script, buffer, num_envs, in_tmp, monkeypatch):
    """Stopped at a checkpoint with its replay and resumed: bit for bit the unbroken run."""
    name = script.__name__
    if name.startswith("ddqn") and (num_envs == 3 or buffer == "numpy"):
        pytest.skip("the loop is the parent's, byte for byte (test_family)")
    kept, save = [], script.save_checkpoint

    def save_and_keep(path, state):
        assert save(path, state)
        kept.append(in_tmp / f"{len(kept)}-{state['global_step']}.pt")
        shutil.copy(path, kept[-1])
        return True

    monkeypatch.setattr(script, "save_checkpoint", save_and_keep)
    options = small(name) | {"num_envs": num_envs, "checkpoint_replay": True}
    options["buffer"] = buffer
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
    assert same(a["replay"], b["replay"])
    assert a["rng"] == b["rng"] and a["envs"]["rng"] == b["envs"]["rng"]


def test_same_seed_same_run_and_another_seed_another(cartpole, in_tmp, monkeypatch):
    ends = []
    save = cartpole.save_checkpoint
    monkeypatch.setattr(
        cartpole, "save_checkpoint", lambda p, s: ends.append(s["q_network"]) or save(p, s)
    )
    for seed in (1, 1, 2):
        options = small(cartpole.__name__) | {"seed": seed, "checkpoint_frequency": 0}
        main_in_process(cartpole, options, monkeypatch)
    weight = "network.0.weight"
    ends = [end[weight].clone() for end in ends]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_resume_without_replay_fills_it_anew(in_tmp):
    options = small("dqn_cartpole") | {"total_timesteps": 1600}
    first = run("dqn_cartpole", options, in_tmp)
    assert first.returncode == 0, first.stderr
    path = next(in_tmp.glob("runs/*/checkpoint.pt"))
    assert "replay" not in torch.load(path, weights_only=True)
    again = run("dqn_cartpole", {"resume": path, "total_timesteps": 2600}, in_tmp)
    assert again.returncode == 0, again.stderr
    assert torch.load(path, weights_only=True)["global_step"] == 2600
    assert len(list(in_tmp.glob("runs/*"))) == 1, "a resumed run goes on in its own folder"


def test_evaluation_needs_no_replay(script, in_tmp, monkeypatch, capsys):
    """A checkpoint of a machine with more memory and another replay is evaluated all the same."""
    main_in_process(script, small(script.__name__), monkeypatch)
    path = next(in_tmp.glob("runs/*/checkpoint.pt"))
    state = script.load_checkpoint(str(path))
    state["args"] |= {"buffer": "cpp", "buffer_size": 10**12}
    assert script.save_checkpoint(in_tmp / "elsewhere.pt", state)
    monkeypatch.setattr(script, "fastreplay", None)
    capsys.readouterr()
    main_in_process(script, {"evaluate": in_tmp / "elsewhere.pt"}, monkeypatch)
    assert "+-" in capsys.readouterr().out


def test_what_a_resumed_run_cannot_change(in_tmp, monkeypatch):
    script = load("dqn_cartpole")
    main_in_process(script, small("dqn_cartpole"), monkeypatch)
    path = next(in_tmp.glob("runs/*/checkpoint.pt"))
    before = path.read_bytes()
    for options in ({"num_envs": 2}, {"env_id": "Acrobot-v1"}, {"buffer_size": 5000}):
        with pytest.raises(SystemExit, match="cannot change when a run is resumed"):
            main_in_process(script, {"resume": path} | options, monkeypatch)
    with pytest.raises(SystemExit, match="does not fit these arguments"):
        main_in_process(script, {"evaluate": path, "env_id": "Acrobot-v1"}, monkeypatch)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["ddqn_cartpole", "ddqn_atari"])
def test_run_evaluate_and_logs(name, in_tmp):
    result = run(name, small(name), in_tmp)
    assert result.returncode == 0, result.stderr
    assert "evaluated" in result.stdout + result.stderr
    path = next(in_tmp.glob("runs/*/checkpoint.pt"))
    before = path.read_bytes()
    evaluated = run(name, {"evaluate": path, "eval_episodes": 3}, in_tmp)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "in 3" in evaluated.stdout
    assert path.read_bytes() == before and len(list(in_tmp.glob("runs/*"))) == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path.parent))
    events.Reload()
    wanted = {"charts/SPS", "charts/epsilon", "eval/episodic_return", "losses/td_loss"}
    assert wanted <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("name", ["dqn_cartpole", "dqn_atari"])
def test_ctrl_c_saves_and_prints_the_command_that_goes_on(name, in_tmp):
    options = small(name) | {"total_timesteps": 10**8, "checkpoint_frequency": 0}
    command = [sys.executable, str(ALGOS / f"{name}.py"), *flags(options)]
    process = subprocess.Popen(
        command, cwd=in_tmp, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    line = process.stdout.readline()
    assert "replay, all in" in line
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    go_on = next(line for line in rest.splitlines() if line.startswith("go on with: "))
    path = in_tmp / go_on.split()[-1]
    step = torch.load(path, weights_only=True)["global_step"]
    assert step > 0
    resumed = run(name, {"resume": path, "total_timesteps": step + 50}, in_tmp)
    assert resumed.returncode == 0, resumed.stderr


def test_kill_while_a_checkpoint_is_written_never_leaves_a_broken_one(in_tmp):
    """kill -9 at random moments of a run that does little else than write checkpoints."""
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


def test_the_first_line_says_what_runs_and_where(in_tmp):
    command = [sys.executable, str(ALGOS / "ddqn_atari.py")]
    process = subprocess.Popen(
        command, cwd=in_tmp, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    line = process.stdout.readline()
    process.kill()
    process.communicate()
    assert "BreakoutNoFrameskip-v4" in line and "runs/" in line


@pytest.mark.parametrize("name", ["dqn_cartpole", "dqn_atari"])
def test_video(name, in_tmp):
    for package in load(name).VIDEO_PACKAGES:
        pytest.importorskip(package)
    options = small(name) | {"capture_video": True, "total_timesteps": 800}
    result = run(name, options, in_tmp)
    assert result.returncode == 0, result.stderr
    assert all(film.stat().st_size > 1000 for film in in_tmp.glob("runs/*/videos/*.mp4"))
    assert list(in_tmp.glob("runs/*/videos/*.mp4"))


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
    ({"buffer_size": 10}, "--learning-starts must be at most"),
    ({"batch_size": 2**40}, "--batch-size must be at most"),
    ({"torch_threads": 2**40}, "--torch-threads must be at most"),
    ({"device": "cuda"}, "--device must be"),
    ({"buffer": "cuda"}, "--buffer must be built first"),
    ({"device": "tpu"}, "--device"),
    ({"loss": "l1"}, "--loss"),
    ({"no_such_flag": 1}, "--no-such-flag"),
    ({"resume": "nowhere.pt"}, "no checkpoint at nowhere.pt"),
    ({"evaluate": "nowhere.pt"}, "no checkpoint at nowhere.pt"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
@pytest.mark.parametrize("name", [CARTPOLE[0], ATARI[0]])
def test_bad_input_is_refused(name, options, message, in_tmp, monkeypatch, capsys):
    if "cuda" in options.values() and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as left:
        main_in_process(load(name), options, monkeypatch)
    printed = capsys.readouterr()
    told = printed.out + printed.err
    if isinstance(left.value.code, str):
        told = left.value.code
        assert told.startswith("error: ") and "\n" not in told
    else:
        assert left.value.code != 0
    assert message in told
    assert not (in_tmp / "runs").exists(), "nothing may be written"


def test_wrong_kind_of_environment_names_the_right_file(in_tmp):
    atari = run("dqn_atari", {"env_id": "CartPole-v1"}, in_tmp)
    assert atari.returncode != 0 and "dqn_cartpole.py" in atari.stderr
    pixels = run("dqn_cartpole", {"env_id": "PongNoFrameskip-v4"}, in_tmp)
    assert pixels.returncode != 0 and "dqn_atari.py" in pixels.stderr


def test_damaged_and_foreign_checkpoints_are_refused(in_tmp, monkeypatch):
    script = load("dqn_cartpole")
    main_in_process(script, small("dqn_cartpole"), monkeypatch)
    path = next(in_tmp.glob("runs/*/checkpoint.pt"))
    whole = path.read_bytes()
    other = load("ddqn_cartpole")
    with pytest.raises(SystemExit, match=r"written by dqn_cartpole\.py"):
        other.load_checkpoint(str(path))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    damaged = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "flipped": bytes(flipped),
    }
    for name, content in damaged.items():
        bad = in_tmp / f"{name}.pt"
        bad.write_bytes(content)
        if name == "flipped":  # a flipped bit may fall into padding or into a number: never a crash
            continue
        with pytest.raises(SystemExit, match="no whole checkpoint"):
            script.load_checkpoint(str(bad))
    torch.save({"weights": torch.zeros(3)}, in_tmp / "foreign.pt")
    with pytest.raises(SystemExit, match="no whole checkpoint of this script"):
        script.load_checkpoint(str(in_tmp / "foreign.pt"))
    torch.save(script.QNetwork(4, 2), in_tmp / "code.pt")  # would run code when loaded
    with pytest.raises(SystemExit, match="no whole checkpoint"):
        script.load_checkpoint(str(in_tmp / "code.pt"))


def test_a_folder_that_cannot_be_written(in_tmp):
    (in_tmp / "runs").write_text("a file where the folder should be")
    result = run("dqn_cartpole", small("dqn_cartpole"), in_tmp)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot write to runs")


def test_a_checkpoint_that_cannot_be_written_keeps_the_old_one(script, in_tmp, capsys):
    path = in_tmp / "checkpoint.pt"
    assert script.save_checkpoint(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    path.with_suffix(".partial").mkdir()  # no file can be opened there
    assert not script.save_checkpoint(path, {"a": torch.ones(3)})
    assert "not written" in capsys.readouterr().err
    assert path.read_bytes() == before


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
    start = cartpole.QNetwork(4, 2).state_dict()
    for key, value in ends[-1]["target_network"].items():
        expected = start[key] + 0.25 * (ends[-1]["q_network"][key] - start[key])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
        assert not torch.equal(value, start[key])


def test_packages_of_a_film_are_asked_for_at_the_start(script, in_tmp, monkeypatch):
    monkeypatch.setattr(script, "VIDEO_PACKAGES", ("no_such_package",))
    with pytest.raises(SystemExit, match="pip install no_such_package"):
        main_in_process(script, {"capture_video": True}, monkeypatch)
    assert not (in_tmp / "runs").exists()


def test_wandb_is_asked_for_by_name(in_tmp, monkeypatch):
    import importlib.util

    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(SystemExit, match="pip install wandb"):
        main_in_process(load("dqn_cartpole"), {"track": True}, monkeypatch)


def test_help_names_every_argument_with_its_meaning():
    command = [sys.executable, str(ALGOS / "ddqn_atari.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    for flag in ("--env-id", "--buffer-size", "--train-frequency", "--checkpoint-replay"):
        assert flag in result.stdout
