"""Ape-X: what actors play and send, and how the learner and Ray deal with them."""

import os
import signal
import sys
import threading
import time

import forked
import numpy as np
import pytest
import squares
import torch
from conftest import ALGOS, load
from test_run import flags, main_in_process, refused, same, scalars

NAME = "apex_dqn_atari"
OPTIONS = {
    "env_id": "PongNoFrameskip-v4",
    "num_actors": 1,
    "num_envs": 2,
    "total_timesteps": 400,
    "buffer_size": 4_000,
    "learning_starts": 60,
    "batch_size": 8,
    "train_frequency": 40,
    "target_network_frequency": 100,
    "broadcast_frequency": 100,
    "steps_per_block": 10,
    "eval_episodes": 0,
    "torch_threads": 1,
    "log_frequency": 20,
}


@pytest.fixture
def script():
    return load(NAME)


class Direct:
    """Ray's object store, in this process."""

    def __init__(self):
        self.reads = 0

    def get(self, reference):
        self.reads += 1
        return reference.value


@pytest.fixture
def make_actor(script, monkeypatch):
    monkeypatch.setattr(script, "ray", Direct())

    def make(**changes):
        known = {k: v for k, v in OPTIONS.items() if hasattr(script.RunArgs, k)}
        args = script.RunArgs(**(known | changes))
        return args, script.Actor(args, 0)

    return make


class Reference:
    """Of Ray's object store."""

    def __init__(self, value):
        self.value = value


def weights_of(network):
    return [Reference({name: x.numpy() for name, x in network.state_dict().items()})]


@pytest.mark.parametrize("actors, games", [(1, 1), (1, 8), (3, 2)])
def test_every_game_has_its_own_epsilon(script, actors, games):
    args, n = script.RunArgs(num_actors=actors, num_envs=games), actors * games
    expected = [0.4 ** (1 + 7 * i / (n - 1)) if n > 1 else 0.4 for i in range(n)]
    assert script.epsilon_at(np.arange(n), args).tolist() == pytest.approx(expected)


def test_an_actor_explores_with_the_epsilons_of_its_games(make_actor):
    args, actor = make_actor(num_envs=2, epsilon=1.0, epsilon_alpha=1e9)  # 1 and 1: always
    assert actor.epsilon.tolist() == [1, 1]
    actor.epsilon = np.array([1.0, 0.0])
    block = actor.play(weights_of(actor.q_network))
    random, greedy = block.actions[3 : 3 + args.steps_per_block].T
    assert len(set(random)) > 2 and len(set(greedy)) <= 2


@pytest.mark.parametrize("buffer", ["numpy", "cpp", "tiles"])
def test_blocks_give_each_transition_once_with_the_learners_priority(script, make_actor, buffer):
    """The actor's games are recorded here, whole; the replay must give the same transitions, and
    its priorities must be the TD errors that the learner computes with the same weights."""
    if buffer != "numpy" and not (script.fastreplay and script.fastreplay.backends()):
        pytest.skip("fastreplay is not compiled")
    options = {"buffer": buffer, "replay_storage": "plain", "per_alpha": 1.0}
    if buffer == "tiles":
        options |= {"buffer": "cpp", "replay_storage": "tiles"}
    args, actor = make_actor(**options)
    played, step = [], actor.envs.step

    def record(actions):
        before = actor.obs.copy()
        obs, rewards, terminations, truncations, infos = step(actions)
        # Lives and ends come too late in Pong: make some, so that windows end early.
        t = len(played)
        terminations = terminations | np.array([t % 17 == 5, t % 23 == 7])
        rewards = rewards + np.array([t % 3, -(t % 2)])
        row = (before, actions, np.clip(rewards, -1, 1), terminations.copy(), actor.starts.copy())
        played.append(row)
        return obs, rewards, terminations, truncations, infos

    actor.envs.step = record
    torch.manual_seed(5)
    network = script.QNetwork(actor.envs.n_actions)
    replay = script.make_replay(args, torch.device("cpu"), prioritized=True, n_step=args.n_step)
    for _ in range(6):
        block = actor.play(weights_of(network))
        assert process_of(block) == os.getpid()
        for row in zip(*block[:5]):
            replay.add(*row)
        replay.set_newest_priorities(np.ascontiguousarray(block.td_error.T))
    rows = np.arange(args.buffer_size // 2 * 2)
    drawable = np.flatnonzero(np.asarray(getattr(replay, "replay", replay).drawable(rows)))
    assert len(drawable) == 6 * 10 * 2, "no final observation was played"
    batch = getattr(replay, "replay", replay).gather(drawable)

    def stack(x):  # as the network sees it
        return script.scaled(torch.as_tensor(x))

    t = 0
    for i, index in enumerate(drawable):
        game = index // (args.buffer_size // 2)
        t = i % 60 + 3  # of this game: the first three rows have no whole stack
        discount, total, k = 1.0, 0.0, 0
        while k < 3:
            total += 0.99**k * played[t + k][2][game]
            k += 1
            if played[t + k - 1][3][game]:
                discount = 0.0
                break
        torch.testing.assert_close(stack(batch.obs[i : i + 1]), stack(played[t][0][game][None]))
        assert batch.actions[i] == played[t][1][game]
        assert batch.rewards[i].item() == pytest.approx(total, abs=1e-6)
        assert batch.discounts[i].item() == pytest.approx(discount * 0.99**k)
        if discount:
            expected = stack(played[t + k][0][game][None])
            torch.testing.assert_close(stack(batch.next_obs[i : i + 1]), expected)
    with torch.no_grad():
        _, td_error, _ = script.td_loss(network, network, batch, args)
    tree = replay.tree.get(drawable) if buffer == "numpy" else leaves_of(replay)[drawable] / 2**20
    np.testing.assert_allclose(tree, td_error.abs().numpy(), rtol=1e-4, atol=1e-5)
    assert tree.std() > 0.01


def process_of(block):
    return int(block.block_id[0].split(":")[1])


def leaves_of(replay):
    leaves = np.zeros((replay.num_envs, replay.rows))
    for game, stored in enumerate(replay.state_dict()["leaves"]):
        leaves[game, : len(stored)] = stored.numpy().view(np.uint32)
    return leaves.ravel()


def test_an_actor_reads_new_weights_once(script, make_actor):
    _, actor = make_actor()
    first, second = (weights_of(script.QNetwork(actor.envs.n_actions)) for _ in range(2))
    for weights in (first, first, second):
        actor.play(weights)
    assert script.ray.reads == 2
    for mine, theirs in zip(actor.q_network.parameters(), second[0].value.values()):
        np.testing.assert_array_equal(mine.numpy(), theirs)


# ------------------------------------------------------------------------------------ with Ray

ray = pytest.importorskip("ray")


@pytest.fixture
def with_ray(script):
    """The script's classes reach Ray's processes by value, as they do from a script."""
    ray.cloudpickle.register_pickle_by_value(script)
    yield script
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(script)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_actors_are_replaced_and_no_block_is_lost(with_ray, kills):
    """Every block is stored, also those of actors that were killed at random moments later."""
    script = with_ray
    args = script.RunArgs(**(OPTIONS | {"num_actors": 2, "buffer_size": 100_000}), buffer="numpy")
    rng, network = np.random.default_rng(7), script.QNetwork(6)
    replay = script.make_replay(args, torch.device("cpu"), prioritized=True, n_step=args.n_step)
    actors = script.Actors(args)
    actors.begin(network)
    seen, starts, killed = [], 0, set()
    deadline = time.monotonic() + 600 + 30 * kills
    # Until two processes are left that nobody killed, and have sent something since.
    while len({x for x, _ in seen}) < kills + 2:
        assert time.monotonic() < deadline, f"{len(killed)} killed: an actor was not replaced"
        block = actors.recv()
        seen.append(block.block_id)
        for row in zip(*block[:5]):
            replay.add(*row)
        replay.set_newest_priorities(np.ascontiguousarray(block.td_error.T))
        final = np.r_[block.episode_starts[1:], [[False] * args.num_envs]]
        starts += ((block.actions >= 0) & ~final).sum()
        victim = process_of(block)
        if len(killed) < kills and victim not in killed and rng.random() < 0.3:
            time.sleep(rng.random() / 5)
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
    assert len(killed) == kills
    for process in {process for process, _ in seen}:
        numbers = sorted(number for x, number in seen if x == process)
        assert numbers == list(range(1, len(numbers) + 1)), "a block was lost"
    assert len(actors.requests) == 4  # two of each actor
    assert len(replay) == len(seen) * 16 * args.num_envs
    assert (replay.tree.get(np.arange(args.buffer_size)) > 0).sum() == starts


def test_actors_on_a_cluster_of_two_nodes(with_ray):
    """One of the nodes leaves, and another one comes."""
    from ray.cluster_utils import Cluster

    script = with_ray
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        other = cluster.add_node(num_cpus=1)
        changes = {"num_actors": 2, "actor_cpus": 1.0, "ray_address": cluster.address}
        args = script.RunArgs(**(OPTIONS | changes))
        actors = script.Actors(args)
        actors.begin(script.QNetwork(6))
        before, deadline = set(), time.monotonic() + 600
        while len(before) < 2:  # one on each node
            assert time.monotonic() < deadline, "an actor did not start"
            before.add(process_of(actors.recv()))
        cluster.remove_node(other)
        for _ in range(4):  # the other actor goes on
            actors.recv()
        cluster.add_node(num_cpus=1)
        deadline = time.monotonic() + 600
        while process_of(actors.recv()) in before:
            assert time.monotonic() < deadline, "the lost actor did not come back"
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_actors_and_learner_solve_a_simple_game_together(with_ray, in_tmp, monkeypatch):
    """Random play scores 5, a game with epsilon 0.4 that is solved 8, the other one 10: 9 in all,
    less what a learning rate this large costs from time to time."""
    script = with_ray
    ray.cloudpickle.register_pickle_by_value(squares)
    try:
        monkeypatch.setattr(script, "make_envs", squares.Squares)
        changes = {"total_timesteps": 4000, "learning_starts": 100, "batch_size": 32}
        changes |= {"train_frequency": 10, "learning_rate": 1e-3, "broadcast_frequency": 40}
        script.main(script.RunArgs(**(OPTIONS | changes)))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(squares)
    returns = [x.value for x in scalars(next(in_tmp.glob("runs/*")))["charts/episodic_return"]]
    assert np.mean(returns[:20]) < 7 and np.mean(returns[-100:]) > 7.5


@pytest.mark.slow
def test_a_run_learns_while_its_actors_are_killed(with_ray, in_tmp, monkeypatch):
    """Twenty kills at random moments of a whole run; then Ctrl-C, when every actor lives again."""
    script, kills = with_ray, 20
    rng, seen, timers, runs = np.random.default_rng(3), {}, {}, []

    class Attacked(script.Actors):
        def recv(self):
            block = super().recv()
            process, number = block.block_id
            seen.setdefault(process, []).append(number)
            if process not in timers and len(timers) < kills and rng.random() < 0.1:
                pid = process_of(block)
                timers[process] = threading.Timer(rng.random(), os.kill, (pid, signal.SIGKILL))
                timers[process].start()
            # 30 blocks of each of two processes that nobody kills
            alive = [x for x, numbers in seen.items() if x not in timers and len(numbers) > 30]
            if len(alive) == 2:
                runs[0].on_signal()
            return block

    class Remembered(script.Run):
        def __init__(self, args):
            super().__init__(args)
            runs.append(self)

    ray.cloudpickle.register_pickle_by_value(squares)
    try:
        monkeypatch.setattr(script, "make_envs", squares.Squares)
        monkeypatch.setattr(script, "Actors", Attacked)
        monkeypatch.setattr(script, "Run", Remembered)
        changes = {"total_timesteps": 1_000_000, "learning_starts": 100, "batch_size": 32}
        changes |= {"train_frequency": 10, "learning_rate": 3e-4, "broadcast_frequency": 40}
        changes |= {"num_actors": 2, "buffer_size": 100_000, "buffer": "numpy"}
        script.main(script.RunArgs(**(OPTIONS | changes)))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(squares)
    assert len(timers) == kills and len(seen) == kills + 2
    blocks = 0
    for numbers in seen.values():
        blocks += len(numbers)
        assert sorted(numbers) == list(range(1, len(numbers) + 1)), "a block was lost or came twice"
    (run,) = runs
    assert len(run.replay) == blocks * 16 * 2 and run.step == blocks * 10 * 2
    returns = [x.value for x in scalars(next(in_tmp.glob("runs/*")))["charts/episodic_return"]]
    before, after = np.mean(returns[:20]), np.mean(returns[-100:])
    print(f"{blocks} blocks of {len(seen)} processes, return {before:.1f}, then {after:.1f}")
    assert before < 7 and after > 8


def check_first_weights(path, monkeypatch):
    """The actors of a resumed run begin with the checkpoint's network."""
    script, begun = load(NAME), []

    class StandIn(script.Actors):
        def __init__(self, args):
            pass

        def begin(self, q_network):
            begun.append(q_network.state_dict())
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "Actors", StandIn)
        with pytest.raises(KeyboardInterrupt):
            main_in_process(script, {"resume": path, "total_timesteps": 600}, monkeypatch)
    assert same(begun[0], torch.load(path)["q_network"])


def test_a_run_logs_and_resumes(tmp_path, monkeypatch):
    command = [sys.executable, str(ALGOS / f"{NAME}.py")]
    first = forked.run([*command, *flags(OPTIONS), "--checkpoint-replay"], cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    path = next(tmp_path.glob("runs/*/checkpoint.pt"))
    logged = scalars(path.parent)
    assert 0 < logged["charts/learner_waits"][-1].value <= 1
    assert np.isfinite(logged["losses/td_loss"][-1].value)
    state = torch.load(path)
    rows = {"stored", "size"}.intersection(state["replay"]).pop()  # of fastreplay, or in NumPy
    # 20 blocks of 10 steps of 2 games, each with 3 rows before them and 3 after them
    assert state["global_step"] == 400 and state["replay"][rows] == 20 * 16
    check_first_weights(path, monkeypatch)
    more = ["--resume", str(path), "--total-timesteps", "600"]
    second = forked.run([*command, *more], cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    state = torch.load(path)
    assert state["global_step"] == 600 and state["replay"][rows] == 30 * 16


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"ray_address": "127.0.0.1:9"}, ["no Ray cluster at --ray-address 127.0.0.1:9"]),
        ({"steps_per_block": 0}, ["--steps-per-block", "positive"]),
        ({"buffer_size": 60}, ["--buffer-size", "two blocks"]),
        ({"num_actors": -1}, ["--num-actors", "0 or more"]),
        ({"epsilon": 1.5}, ["--epsilon", "between 0 and 1"]),
        ({"actor_cpus": 4.0}, ["--actor-cpus", "from 0 to 1"]),
    ],
)
def test_bad_arguments_are_refused_in_one_line(in_tmp, monkeypatch, changes, words):
    line = refused(NAME, OPTIONS | changes, monkeypatch)
    assert all(word in line for word in words), line
    assert not list(in_tmp.glob("runs/*"))


def test_without_ray_one_line_says_how_to_install_it(in_tmp, script, monkeypatch):
    monkeypatch.setattr(script, "ray", None)
    with pytest.raises(SystemExit) as left:
        script.start_ray(script.RunArgs(**OPTIONS))
    assert "pip install 'ray" in left.value.code
