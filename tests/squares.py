"""A game that every Atari file learns in a minute or two, in place of its `make_envs`."""

import numpy as np


class Squares:
    """Games that show a bright left or right half: action 0 or 1 scores. Ten steps each, so random
    play scores 5 and the best 10. As in `Games`, the step after the last one resets."""

    n_actions = 2

    def __init__(self, env_id, num_envs, seed, **options):
        self.num_envs, self.rng = num_envs, np.random.default_rng(seed)

    def reset(self):
        self.obs = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        self.returns, self.t = np.zeros(self.num_envs), 0
        self.show()
        return self.obs.copy(), np.ones(self.num_envs, bool)

    def show(self):
        self.right = self.rng.integers(2, size=self.num_envs)
        self.obs[:, :-1] = self.obs[:, 1:]
        self.obs[:, -1] = np.arange(84) // 42 == self.right[:, None, None]
        self.obs[:, -1] *= 255

    def state_dict(self):
        return {}

    def send(self, actions):
        self.sent = actions

    def recv(self):
        return self.step(self.sent)

    def step(self, actions):
        n = self.num_envs
        if self.t == 10:  # the step after the last one resets, whatever the action
            obs, starts = self.reset()
            infos = {"episode_starts": starts, "episodes": []}
            return obs, np.zeros(n), *np.zeros((2, n), bool), infos
        rewards, self.t = (actions == self.right) * 1.0, self.t + 1
        self.returns += rewards
        self.show()
        over = np.full(n, self.t == 10)
        episodes = [(i, self.returns[i], 10) for i in range(n) if over[i]]
        infos = {"episode_starts": np.zeros(n, bool), "episodes": episodes}
        return self.obs.copy(), rewards, over, np.zeros(n, bool), infos
