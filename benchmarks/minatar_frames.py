"""Train a file for Atari on MinAtar, whose games are small enough for a CPU.

    python benchmarks/minatar_frames.py btr_atari --env-id MinAtar/Breakout-v1 --width 1
    python benchmarks/minatar_frames.py dqn_atari --env-id MinAtar/Breakout-v1 --side 84

The first word is a file in algos/, without .py; the others are its arguments, and --side. A frame
is MinAtar's picture of 10 x 10 cells in grey, one shade for each kind of object, enlarged to --side
rows and columns. Four frames are a stack, as on Atari. A step is one frame. MinAtar has no lives,
and its actions are sticky.

BTR's network takes any side; the other networks need 84. Ape-X does not run here: its actors load
their own file. `train.py` calls this for files on Atari and ids of MinAtar.
"""

import functools
import importlib
import os
import sys
from dataclasses import make_dataclass

import numpy as np
import torch
from machine import ROOT

sys.path.insert(0, os.fspath(ROOT / "algos"))
vectors = importlib.import_module("dqn_cartpole")  # it plays MinAtar

SIDE = 20  # rows and columns of a frame


class Frames:
    """MinAtar's games behind the interface of `Games`, in the files on Atari.

    A game that is over is reset by the next step, which ignores its action.
    """

    def __init__(self, env_id, num_envs, seed, side=SIDE, max_num_frames_per_episode=None, **_):
        self.games = vectors.make_envs(env_id, num_envs, seed)
        self.n_actions, self.longest = self.games.n_actions, max_num_frames_per_episode or np.inf
        rows, columns, n_channels = self.games.obs_space.shape
        self.shades = (np.arange(1, n_channels + 1) * 255 // n_channels).astype(np.uint8)
        self.rows, self.columns = (np.arange(side) * n // side for n in (rows, columns))
        self.obs = np.zeros((num_envs, 4, side, side), np.uint8)
        self.starts = np.ones(num_envs, bool)  # games whose current frame opens an episode
        self.over = np.zeros(num_envs, bool)  # games that the next step resets

    def reset(self):
        """New games, or those of load_state_dict. -> obs (num_envs, 4, side, side) uint8, starts"""
        if self.games.actions is None:
            self.show(self.games.reset())
        return self.obs, self.starts

    def show(self, pictures):
        """Append MinAtar's pictures, (n, 10, 10, C) of bits, to the stacks."""
        grey = (pictures * self.shades).max(axis=3)  # of two objects in a cell, the later channel's
        self.obs = np.roll(self.obs, -1, axis=1)
        self.obs[self.starts] = 0
        self.obs[:, -1] = grey[:, self.rows[:, None], self.columns]

    def send(self, actions):
        self.sent = actions

    def recv(self):
        """-> obs, rewards, terminations, truncations, infos, as `Games`"""
        games, self.starts = self.games, self.over
        episodes = [(i, games.returns[i], len(games.actions[i])) for i in np.flatnonzero(self.over)]
        _, rewards, terminations, truncations, _ = games.step(self.sent)
        self.show(games.reset(self.starts))
        rewards[self.starts] = terminations[self.starts] = truncations[self.starts] = 0
        truncations |= np.array([len(actions) >= self.longest for actions in games.actions])
        self.over = terminations | truncations
        infos = {"episode_starts": self.starts, "episodes": episodes}
        return self.obs, rewards, terminations, truncations, infos

    def step(self, actions):
        self.send(actions)
        return self.recv()

    def state_dict(self):
        names = ("obs", "starts", "over")
        arrays = {name: torch.tensor(getattr(self, name)) for name in names}
        return arrays | {"games": self.games.state_dict()}

    def load_state_dict(self, state):
        self.games.load_state_dict(state["games"])
        for name in ("obs", "starts", "over"):
            setattr(self, name, state[name].numpy().copy())


def script_of(words):
    """The name of the script, and its arguments. A checkpoint knows its script."""
    there = sorted(file.stem for file in (ROOT / "algos").glob("*_atari.py"))
    there = [name for name in there if not name.startswith("apex")]
    if words and words[0] in there:
        return words[0], words[1:]
    for word, path in zip(words, words[1:]):
        if word in ("--resume", "--evaluate"):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)["script"], words
            except Exception:
                sys.exit(f"error: {path} is no checkpoint of a file in algos/.")
    sys.exit(f"error: the first word must be one of {', '.join(there)}.")


def of_side(replay, side):
    """A class of replays, whatever the frames' shape, made for frames of this side."""
    return lambda capacity, _, *args, **options: replay(capacity, (side, side), *args, **options)


def main():
    name, words = script_of(sys.argv[1:])
    script = importlib.import_module(name)
    script.RunArgs = make_dataclass("RunArgs", [("side", int, SIDE)], bases=(script.RunArgs,))
    sys.argv[1:] = words
    args = script.parse_args()
    if not 10 <= args.side <= 1_000:
        sys.exit(f"error: --side must be 10 to 1000 (it is {args.side}).")
    script.make_envs = functools.partial(Frames, side=args.side)
    for module in (script, getattr(script, "fastreplay", None)):
        if hasattr(module, "FrameReplay"):
            module.FrameReplay = of_side(module.FrameReplay, args.side)
    script.main(args)


if __name__ == "__main__":
    main()
