"""Plain reference implementations of the replay, the sum-tree and the losses, for all tests."""

import numpy as np

UNIT = 2**20  # the leaf of priority 1


class OracleReplay:
    """A replay that keeps the whole history of every game, with the stacks that the environment
    returned, and derives the drawable transitions from their definition."""

    def __init__(self, capacity, num_envs=1, stack=4, n_step=1, gamma=0.99):
        self.rows, self.num_envs, self.stack = capacity // num_envs, num_envs, stack
        self.n_step, self.gamma = n_step, gamma
        self.history = [[] for _ in range(num_envs)]

    def add(self, stacks, actions, rewards, terminations, episode_starts):
        """One step of every game; `stacks` (num_envs, stack, ...) is the whole observation."""
        for game in range(self.num_envs):
            row = (stacks[game], actions[game], rewards[game])
            row += (bool(terminations[game]), bool(episode_starts[game]))
            self.history[game].append(row)

    def transitions(self):
        """{flat index: (obs, action, return, next_obs, discount)} of all drawable rows."""
        found = {}
        for game, history in enumerate(self.history):
            for t in range(max(len(history) - self.rows, 0), len(history)):
                transition = self._transition(history, t)
                if transition:
                    found[game * self.rows + t % self.rows] = transition
        return found

    def _transition(self, history, t):
        oldest, end = max(len(history) - self.rows, 0), len(history)

        def opens(i):
            return history[i][4]

        def final(i):  # the next row opens an episode
            return i + 1 < end and opens(i + 1)

        if final(t) or history[t][1] < 0:  # a negative action: context
            return None
        # every frame of the stack must still be stored, back to the one that opened the episode
        first = t
        while first > t - (self.stack - 1) and not opens(first):
            first -= 1
            if first < oldest:
                return None
        # follow the game until n steps are done, it terminates, or it reaches its final observation
        k, total, terminated = 0, 0.0, False
        while True:
            if t + k + 1 >= end:
                return None  # the next observation is not stored yet
            total += self.gamma**k * history[t + k][2]
            terminated = history[t + k][3]
            k += 1
            if terminated or k == self.n_step or final(t + k):
                break
        discount = 0.0 if terminated else self.gamma**k
        return history[t][0], history[t][1], total, history[t + k][0], discount


class OraclePriorities:
    """The integer leaf of every row of an OracleReplay: 0 if the row is not drawable, and the
    largest leaf so far when it becomes drawable. A row that has replaced an older one takes
    priorities only after it has been drawn: until then they belong to the older row."""

    def __init__(self, reference, alpha=1.0, epsilon=1e-6):
        self.reference, self.alpha, self.epsilon = reference, alpha, epsilon
        self.leaves, self.largest = {}, UNIT  # leaves by (flat index, row number)
        self.drawn = set()  # (flat index, row number)

    def rows(self):
        """(flat index, row number) of all drawable rows; rows are numbered from 0."""
        end, rows = len(self.reference.history[0]), self.reference.rows
        return [(i, end - 1 - (end - 1 - i % rows) % rows) for i in self.reference.transitions()]

    def after_add(self):
        self.leaves = {row: self.leaves.get(row, self.largest) for row in self.rows()}

    def draw(self, indices):
        drawable = dict(self.rows())
        self.drawn |= {(i, drawable[i]) for i in indices.tolist()}

    def update(self, indices, td_errors, added=False):
        drawable = dict(self.rows())
        for i, td_error in zip(indices.tolist(), td_errors.tolist()):
            leaf = quantise(abs(td_error) + self.epsilon, self.alpha)
            self.largest = max(self.largest, leaf)
            if i not in drawable:
                continue
            row = i, drawable[i]
            if added or row[1] < self.reference.rows or row in self.drawn:
                self.leaves[row] = leaf

    def flat(self):
        """The leaf of every flat index."""
        found = {i: leaf for (i, _), leaf in self.leaves.items()}
        return [found.get(i, 0) for i in range(self.reference.num_envs * self.reference.rows)]


class TreeOracle:
    def __init__(self, capacity, alpha=1.0):
        self.leaves, self.alpha = [0] * capacity, alpha

    def set(self, indices, priorities):
        for index, p in zip(indices, priorities):
            self.leaves[int(index)] = quantise(float(p), self.alpha)

    def total(self):
        return sum(self.leaves)

    def find(self, target):
        return find(self.leaves, target)


def find(leaves, target):
    """The leaf that owns a target in [0, sum(leaves))."""
    for index, leaf in enumerate(leaves):
        if target < leaf:
            return index
        target -= leaf
    raise IndexError(target)


def quantise(p, alpha):
    """A priority as an integer leaf; ties to even."""
    if p == 0:
        return 0
    return max(1, min(2**32 - 1, int(np.rint(min(p**alpha, 2.0**13) * UNIT))))


def philox(counter, key):
    """Philox 4x32-10: four random words from four counter words and two key words."""
    c, (k0, k1), word = list(counter), key, 2**32 - 1
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k0, b & word, a >> 32 ^ c[3] ^ k1, a & word]
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c


def random64(seed, call, sample, attempt=0):
    """The 64 random bits of one attempt for one sample of a call."""
    word = 2**32 - 1
    x = philox((sample, attempt, call & word, call >> 32), (seed & word, seed >> 32))
    return x[1] << 32 | x[0]


def targets(seed, call, batch_size, total, stratified):
    """The target in [0, total) of each sample of a call."""
    bits = [random64(seed, call, i) for i in range(batch_size)]
    if stratified:
        bits = [(i * 2**64 + b) // batch_size for i, b in enumerate(bits)]
    return [b * total >> 64 for b in bits]


def conv2d(x, weight, bias, stride):
    """(B, C, H, W) with (O, C, K, K) -> (B, O, H', W')"""
    k = weight.shape[2]
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(2, 3))
    windows = windows[:, :, ::stride, ::stride]  # (B, C, H', W', K, K)
    return np.einsum("bchwij,ocij->bohw", windows, weight, optimize=True) + bias[:, None, None]


def q_values(state_dict, obs):
    """The action values of either network, computed from its weights in float64."""
    w = [np.asarray(v, np.float64) for v in state_dict.values()]
    if w[0].ndim == 4:
        x = obs.astype(np.float64) / 255
        for i, stride in enumerate((4, 2, 1)):
            x = np.maximum(conv2d(x, w[2 * i], w[2 * i + 1], stride), 0)
        x, w = x.transpose(0, 2, 3, 1).reshape(len(x), -1), w[6:]  # height, width, channel
    else:
        x = obs.astype(np.float64)
    layers = list(zip(w[::2], w[1::2]))
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight.T + bias
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x


def td_errors(double, q_state, target_state, batch):
    """y - Q(s, a), one transition at a time."""
    q, q_next = q_values(q_state, batch["obs"]), q_values(q_state, batch["next_obs"])
    target_next, errors = q_values(target_state, batch["next_obs"]), []
    for i, action in enumerate(batch["actions"]):
        chosen = int(np.argmax(q_next[i] if double else target_next[i]))
        y = batch["rewards"][i] + batch["discounts"][i] * target_next[i][chosen]
        errors.append(y - q[i][action])
    return np.array(errors)


def loss_of(errors, kind):
    squared = 0.5 * errors**2
    linear = np.abs(errors) - 0.5
    huber = np.where(np.abs(errors) < 1, squared, linear)
    return huber.mean() if kind == "huber" else (errors**2).mean()


def perceptron_gradients(weights, obs, d_q):
    """Backpropagation through linear, ReLU, linear, ReLU, linear.

    `weights`: [W1, b1, W2, b2, W3, b3]; d_q (B, A): gradient of the loss by the action values.
    -> gradients in the order of the weights
    """
    activations = [obs.astype(np.float64)]
    for i in range(0, 6, 2):
        x = activations[-1] @ weights[i].T + weights[i + 1]
        activations.append(np.maximum(x, 0) if i < 4 else x)
    gradients, delta = [], d_q
    for i in (4, 2, 0):
        gradients = [delta.T @ activations[i // 2], delta.sum(axis=0), *gradients]
        delta = (delta @ weights[i]) * (activations[i // 2] > 0)
    return gradients


def adam_step(weights, gradients, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """The first step of Adam (Kingma and Ba, 2015, algorithm 1) from zero moments."""
    stepped = []
    for w, g in zip(weights, gradients):
        m_hat = (1 - beta1) * g / (1 - beta1)
        v_hat = (1 - beta2) * g * g / (1 - beta2)
        stepped.append(w - lr * m_hat / (np.sqrt(v_hat) + eps))
    return stepped
