"""Files for Atari on MinAtar: the frames, resumed runs, and train.py, which calls the tool."""

import copy
import sys
from pathlib import Path

import forked
import gymnasium as gym
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "benchmarks" / "minatar_frames.py"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "algos")]
GAMES = ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"]
# BTR, as small as it gets.
SMALL = ["--width", 1, "--num-envs", 4, "--batch-size", 4, "--learning-starts", 32]
SMALL += ["--train-frequency", 16, "--target-network-frequency", 48, "--buffer-size", 400]
SMALL += ["--eval-episodes", 2, "--eval-max-frames", 20, "--torch-threads", 1]


def frames(*args, **options):
    pytest.importorskip("minatar")
    from minatar_frames import Frames

    return Frames(*args, **options)


def grey(picture, side):
    """(10, 10, C) -> (side, side), in plain loops: the shade of the last channel that is set."""
    n_channels, frame = picture.shape[2], np.zeros((side, side), np.uint8)
    for row in range(side):
        for column in range(side):
            for channel in range(n_channels):
                if picture[10 * row // side, 10 * column // side, channel]:
                    frame[row, column] = 255 * (channel + 1) // n_channels
    return frame


@pytest.mark.parametrize("game, side, n_steps", [(x, 20, 150) for x in GAMES] + [(GAMES[0], 84, 9)])
def test_frames_are_those_of_minatar(game, side, n_steps):
    """Two games beside gymnasium's, from the same seeds and with the same actions."""
    envs, rng = frames(f"MinAtar/{game}-v1", 2, 3, side=side), np.random.default_rng(0)
    obs, starts = envs.reset()
    assert obs.shape == (2, 4, side, side) and obs.dtype == np.uint8 and starts.all()
    plain = [gym.make(f"MinAtar/{game}-v1", disable_env_checker=True) for _ in range(2)]
    empty, stacks, gained, ended = np.zeros((side, side), np.uint8), {}, {}, [False, False]

    def begin(i):
        plain[i].unwrapped.game.last_action = 0  # MinAtar keeps it
        picture = plain[i].reset(seed=envs.games.seeds[i])[0]
        stacks[i], gained[i] = [empty] * 3 + [grey(picture, side)], []

    begin(0), begin(1)
    assert np.array_equal(obs, [stacks[0], stacks[1]])
    for _ in range(n_steps):
        actions, episodes = rng.integers(envs.n_actions, size=2), []
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        for i in range(2):
            reward, starts = 0.0, ended[i]
            if starts:
                episodes.append((i, sum(gained[i]), len(gained[i])))
                begin(i)
                ended[i] = False
            else:
                picture, reward, ended[i], _, _ = plain[i].step(int(actions[i]))
                gained[i].append(reward)
                stacks[i] = [*stacks[i][1:], grey(picture, side)]
            assert np.array_equal(obs[i], stacks[i]) and rewards[i] == reward
            assert terminations[i] == ended[i] and infos["episode_starts"][i] == starts
        assert infos["episodes"] == episodes and not truncations.any()


def test_a_long_game_is_cut():
    envs = frames("MinAtar/Freeway-v1", 2, 1, max_num_frames_per_episode=5)
    envs.reset()
    for t in range(1, 13):
        _, _, terminations, truncations, infos = envs.step(np.zeros(2, np.int64))
        assert truncations.all() == truncations.any() == (t in (5, 11)) and not terminations.any()
        assert infos["episode_starts"].all() == (t in (6, 12)) == len(infos["episodes"]) / 2


@pytest.mark.parametrize("n_steps", [0, 30, 31, 32, 33, 34, 35])  # some are between two games
def test_saved_games_go_on_alike(n_steps):
    def go_on(envs, n_steps, rng):
        return [envs.step(rng.integers(envs.n_actions, size=4)) for _ in range(n_steps)]

    envs = frames("MinAtar/Breakout-v1", 4, 1)
    envs.reset()
    go_on(envs, n_steps, np.random.default_rng(0))
    other = frames("MinAtar/Breakout-v1", 4, 2)
    other.load_state_dict(copy.deepcopy(envs.state_dict()))
    assert all(np.array_equal(*pair) for pair in zip(envs.reset(), other.reset()))
    futures = (go_on(games, 40, np.random.default_rng(1)) for games in (envs, other))
    for (*one, one_infos), (*two, two_infos) in zip(*futures):
        assert all(np.array_equal(*pair) for pair in zip(one, two))
        assert one_infos["episodes"] == two_infos["episodes"]
        assert np.array_equal(one_infos["episode_starts"], two_infos["episode_starts"])


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    pytest.importorskip("minatar")

    def weights(folder, *words):
        folder.mkdir(exist_ok=True)
        done = forked.run([sys.executable, TOOL, *words], cwd=folder)
        assert done.returncode == 0, done.stderr
        (file,) = folder.glob("runs/*/checkpoint.pt")
        state = torch.load(file, weights_only=True)
        assert state["args"]["side"] == 12 and state["script"] == "btr_atari"
        return file, state["q_network"]

    words = ["btr_atari", "--env-id", "MinAtar/Breakout-v1", "--side", 12, *SMALL]
    words += ["--checkpoint-replay", "--eval-frequency", 0]
    # Nothing depends on --total-timesteps.
    words += ["--per-beta", 1, "--epsilon-until", 1, "--exploration-fraction", 0]
    _, whole = weights(tmp_path / "whole", *words, "--total-timesteps", 160)
    file, half = weights(tmp_path / "half", *words, "--total-timesteps", 80)
    # A checkpoint knows its script and --side.
    _, resumed = weights(tmp_path / "half", "--resume", file, "--total-timesteps", 160)
    assert not torch.equal(half["value.weight"], resumed["value.weight"])
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    done = forked.run([sys.executable, TOOL, "--evaluate", file], cwd=tmp_path)
    assert "MinAtar/Breakout-v1, step 160, evaluated: " in done.stdout, done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the first word must be one of btr_atari, c51_atari, "),
        (["dqn_cartpole"], "the first word must be one of btr_atari, c51_atari, "),
        (["apex_dqn_atari"], "the first word must be one of btr_atari, c51_atari, "),
        (["--resume", "nothing.pt"], "nothing.pt"),
        (["btr_atari", "--side", 9], "--side must be 10 to 1000 (it is 9)."),
        (["btr_atari", "--env-id", "MinAtar/Pong-v1"], "--env-id MinAtar/Pong-v1: "),
    ],
)
def test_bad_words(words, message, tmp_path):
    pytest.importorskip("minatar")
    done = forked.run([sys.executable, TOOL, *words], cwd=tmp_path)
    assert done.returncode and message in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and not [*tmp_path.iterdir()]


def test_train_calls_it(tmp_path):
    pytest.importorskip("minatar")
    words = ["--scripts", "btr_atari", "--env-ids", "MinAtar/Breakout-v1", "--seeds", 1]
    words += ["--", *SMALL, "--total-timesteps", 80]
    done = forked.run([sys.executable, ROOT / "benchmarks" / "train.py", *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "# btr_atari on MinAtar/Breakout-v1" in done.stdout
    command = "python benchmarks/minatar_frames.py btr_atari --env-id MinAtar/Breakout-v1 --width 1"
    assert command in done.stdout


def test_what_a_run_depends_on():
    import train

    assert train.program("btr_atari", "ALE/Pong-v5") == ["algos/btr_atari.py"]
    assert train.program("dqn_cartpole", "MinAtar/Asterix-v1") == ["algos/dqn_cartpole.py"]
    assert train.files_of("btr_atari", None) == ["algos/btr_atari.py", "csrc"]
    of_frames = ["benchmarks/minatar_frames.py", "algos/dqn_cartpole.py"]
    assert train.files_of("btr_atari", "MinAtar/Asterix-v1")[2:] == of_frames
