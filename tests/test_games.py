"""How the Atari scripts play the games: the protocol, and each known mistake."""

import functools

import gymnasium as gym
import numpy as np
import oracle
import pytest
import torch
from conftest import load

m = load("dqn_atari")
NOOPS_OFF = {"noop_max": 0, "use_fire_reset": False}


def play(envs, steps, rng, n_actions=None, replay=None, reference=None):
    """Play random actions -> a list of (obs, actions, rewards, terminations, truncations, infos
    after the step). A `replay` gets the same rows as from the scripts."""
    obs, starts = envs.reset()
    log, n_actions = [], n_actions or envs.n_actions
    for _ in range(steps):
        actions = rng.integers(n_actions, size=envs.num_envs)
        held = obs.copy()
        envs.send(actions)
        next_obs, rewards, terminations, truncations, infos = envs.recv()
        assert (held == obs).all(), "the games wrote into a returned observation"
        clipped = np.clip(rewards, -1, 1)
        if replay is not None:
            replay.add(obs[:, -1], actions, clipped, terminations, starts)
        if reference is not None:
            reference.add(obs, actions, clipped, terminations, starts)
        log.append((obs, actions, rewards, terminations, truncations, infos))
        obs, starts = next_obs, infos["episode_starts"]
    return log


def compare_all(replay, reference):
    expected = reference.transitions()
    everywhere = np.arange(replay.rows * replay.num_envs)
    drawable = np.flatnonzero(replay.drawable(everywhere))
    assert drawable.tolist() == sorted(expected)
    for chunk in np.array_split(drawable, max(len(drawable) // 256, 1)):
        batch = replay.gather(chunk)
        for i, index in enumerate(chunk.tolist()):
            obs, action, reward, next_obs, discount = expected[index]
            assert np.array_equal(batch.obs[i].numpy(), obs)
            assert np.array_equal(batch.next_obs[i].numpy(), next_obs)
            assert batch.actions[i] == action
            assert batch.rewards[i].item() == pytest.approx(reward, abs=1e-6)
            assert batch.discounts[i].item() == pytest.approx(discount, abs=1e-6)
    return len(drawable)


@pytest.mark.parametrize(
    "env_id", ["BreakoutNoFrameskip-v4", "PongNoFrameskip-v4", "ALE/Seaquest-v5"]
)
def test_rebuilt_stacks_equal_what_the_games_returned(env_id):
    """5,000 steps of the real game with n-step returns, in a ring that wraps around."""
    n, capacity = 4, 4 * 900
    options = {"num_envs": n, "n_step": 3}
    replay = m.FrameReplay(capacity, (84, 84), **options)
    reference = oracle.OracleReplay(capacity, **options)
    log = play(m.make_envs(env_id, n, 1), 1250, np.random.default_rng(0), None, replay, reference)
    assert sum(infos["episode_starts"].sum() for *_, infos in log) >= 3, (
        "no game ended in this test"
    )
    assert compare_all(replay, reference) > 0.95 * capacity


def test_frames_equal_gymnasiums_preprocessing():
    """The same actions with AtariPreprocessing give the same frames, bit for bit, as far as the
    protocols agree."""
    pytest.importorskip("cv2")
    for env_id in ("BreakoutNoFrameskip-v4", "PongNoFrameskip-v4"):
        envs = m.make_envs(env_id, 1, 0, **NOOPS_OFF)
        env = gym.wrappers.AtariPreprocessing(gym.make(env_id), noop_max=0, frame_skip=4)
        obs, _ = envs.reset()
        frame, _ = env.reset(seed=int(envs.seeds[0]))
        rng, compared = np.random.default_rng(3), 0
        for _ in range(600):
            assert np.array_equal(obs[0, -1], frame)
            actions = rng.integers(env.action_space.n, size=1)
            envs.send(actions)
            obs, rewards, _, _, infos = envs.recv()
            frame, reward, terminated, truncated, info = env.step(actions[0])
            assert rewards[0] == reward and infos["lives"][0] == info.get("lives", 0)
            compared += 1
            if terminated or truncated:
                break
        assert compared > 100


def test_a_lost_life_terminates_and_the_game_continues():
    log = play(m.make_envs("BreakoutNoFrameskip-v4", 4, 2), 700, np.random.default_rng(1))
    lost = over = 0
    for (*_, terminations, _, infos), (*_, after) in zip(log, log[1:]):
        for game in np.flatnonzero(terminations):
            if infos["lives"][game] > 0:
                lost += 1
                assert not after["episode_starts"][game]
                assert after["lives"][game] == infos["lives"][game]
            else:
                over += 1
                assert after["episode_starts"][game]
                assert after["lives"][game] == 5
    assert lost > 3 * over > 0  # five lives per game: four are lost before the last


def test_returns_are_of_whole_games_and_unclipped():
    """Seaquest pays 20 per shark: clipped or per-life returns would not agree."""
    log = play(m.make_envs("ALE/Seaquest-v5", 4, 0), 1200, np.random.default_rng(1))
    sums, counts, checked = np.zeros(4), np.zeros(4, int), 0
    for _, _, rewards, _, _, infos in log:
        starts = infos["episode_starts"]
        assert (rewards[starts] == 0).all()
        sums += rewards
        counts += ~starts
        assert sorted(game for game, *_ in infos["episodes"]) == np.flatnonzero(starts).tolist()
        for game, episode_return, episode_length in infos["episodes"]:
            assert (episode_return, episode_length) == (sums[game], counts[game])
            sums[game] = counts[game] = 0
            checked += episode_return >= 20
    assert checked >= 3


def test_a_truncated_game_bootstraps_from_its_true_last_frame():
    """The frame limit ends a game: its last frame has its own row, and the discount is gamma."""
    n, options = 2, {"max_num_frames_per_episode": 200, **NOOPS_OFF}
    replay = m.FrameReplay(600, (84, 84), n)
    reference = oracle.OracleReplay(600, n)
    envs = m.make_envs("PongNoFrameskip-v4", n, 0, **options)
    log = play(envs, 220, np.random.default_rng(0), None, replay, reference)
    compare_all(replay, reference)
    truncated = [t for t, entry in enumerate(log) if entry[4][0]]
    assert len(truncated) >= 3
    for t in truncated[:-1]:
        batch = replay.gather(np.array([t]))
        assert batch.discounts[0] == np.float32(0.99)
        assert np.array_equal(batch.next_obs[0].numpy(), log[t + 1][0][0])
        assert log[t + 1][5]["episode_starts"][0]
        assert not replay.drawable(np.array([t + 1]))[0], "the ignored step is not a transition"
        assert not np.array_equal(batch.next_obs[0].numpy(), log[t + 2][0][0])


def test_a_life_lost_on_the_very_last_frame_still_opens_a_new_game():
    """If the frame limit is reached at a lost life, ALE reports `terminated` with lives left, and
    resets nevertheless. Only the frame number shows it."""
    envs = m.make_envs("BreakoutNoFrameskip-v4", 1, 3)
    log = play(envs, 400, np.random.default_rng(4))
    t = next(t for t, e in enumerate(log) if e[3][0] and e[5]["lives"][0] > 0)
    cap = 4 * (t + 1)  # frames since the reset
    envs = m.make_envs("BreakoutNoFrameskip-v4", 1, 3, max_num_frames_per_episode=cap)
    log = play(envs, t + 3, np.random.default_rng(4))
    _, _, _, terminations, truncations, infos = log[t]
    assert terminations[0] and not truncations[0] and infos["lives"][0] > 0
    assert log[t + 1][5]["episode_starts"][0]


@pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", "ALE/Pong-v5"])
def test_games_continue_from_a_checkpoint(env_id, monkeypatch):
    """Also with new seeds, with sticky actions, and with games of different ages."""
    rng, n = np.random.default_rng(0), 3
    envs = m.make_envs(env_id, n, 7)
    envs.reset()
    for step in range(900):
        if step in (200, 201, 450):  # as if their histories were long
            envs.histories[step % n] *= 30
        envs.send(rng.integers(4, size=n))
        envs.recv()
    # if the seed is replaced at a reset, the history is exactly the actions since then
    held = None
    while held is None or any(len(h) > 5000 for h in envs.histories):
        envs.send(rng.integers(4, size=n))
        held = envs.recv()[0]
    other = m.make_envs(env_id, n, 8)
    other.load_state_dict(envs.state_dict())
    obs, starts = other.reset()
    assert np.array_equal(obs, held) and np.array_equal(starts, envs.starts)
    for _ in range(300):
        actions = rng.integers(4, size=n)
        envs.send(actions)
        other.send(actions)
        ours, theirs = envs.recv(), other.recv()
        assert all(np.array_equal(a, b) for a, b in zip(ours[:4], theirs[:4]))
        assert ours[4]["episodes"] == theirs[4]["episodes"]


def test_seeds_give_the_same_and_different_games():
    logs = []
    for seed in (1, 1, 2):
        log = play(m.make_envs("BreakoutNoFrameskip-v4", 2, seed), 150, np.random.default_rng(0))
        logs.append(np.stack([entry[0] for entry in log]))
    assert np.array_equal(logs[0], logs[1])
    assert not np.array_equal(logs[0], logs[2])
    assert not np.array_equal(logs[0][:, 0], logs[0][:, 1])


def test_ids_determine_the_sticky_actions():
    """v5 repeats the last action with probability 0.25: with the same actions, its game differs
    from the v4 game."""
    films = {}
    for env_id in ("PongNoFrameskip-v4", "ALE/Pong-v5"):
        log = play(m.make_envs(env_id, 1, 1, **NOOPS_OFF), 200, np.random.default_rng(0))
        films[env_id] = np.stack([entry[0] for entry in log])
    assert not np.array_equal(*films.values())


def noop_network(atari):
    """A network that always prefers NOOP."""
    q_network = atari.QNetwork(4)
    with torch.no_grad():
        q_network.head.weight.zero_()
        q_network.head.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    return q_network


def test_evaluation_plays_whole_games_with_its_own_epsilon(atari):
    """A network that always prefers NOOP scores 0 in Breakout, unless epsilon moves it."""
    args = atari.RunArgs(env_id="BreakoutNoFrameskip-v4", eval_episodes=5, eval_e=1.0)
    evaluate = functools.partial(atari.evaluate, noop_network(atari), args, torch.device("cpu"))
    moved, _, actions = evaluate((1, 7))
    assert len(moved) == 5 and moved.sum() > 0
    again, _, same_actions = evaluate((1, 7))
    assert moved.tolist() == again.tolist() and actions == same_actions
    *_, other_actions = evaluate((1, 8))
    assert actions != other_actions, "evaluations at another step play other games"


def test_a_film_is_the_first_game_of_its_evaluation():
    """Four pictures for each action; every fourth is an observation of the game, in colour, and
    the actions are those of the evaluation."""
    args = m.RunArgs(env_id="BreakoutNoFrameskip-v4", eval_episodes=3, eval_e=0.5)
    seed = (1, 7)
    *_, steps = m.evaluate(noop_network(m), args, torch.device("cpu"), seed)
    pictures = list(m.film(args, seed, steps))
    assert m.FRAMES_PER_SECOND == 60 and pictures[0].shape == (420, 320 + 160, 3)
    colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    envs, seen = m.make_envs(args.env_id, 1, seed, **colour), m.make_envs(args.env_id, 3, seed)
    (obs, _), rng = seen.reset(), np.random.default_rng(seed)
    expected = [envs.reset()[0][0, 0]]
    for action, _ in steps:
        actions = m.act(noop_network(m), obs, 0.5, rng, torch.device("cpu"))
        assert action == actions[0]
        obs, *_, infos = seen.step(actions)
        picture = envs.step(actions[:1])[0][0, 0]
        if not infos["episode_starts"][0]:
            expected.append(picture)
    assert infos["episode_starts"][0], "the last action is that of the reset"
    for i, picture in enumerate(expected[:-1]):
        assert np.array_equal(pictures[4 * i][::2, :320:2], picture), i
    assert 4 * (len(expected) - 2) < len(pictures) <= 4 * len(expected)


def test_a_film_shows_the_action_values():
    """The bar of each action is as long as its value is high, and the chosen one is orange."""
    values = [1.0, 3.0, 2.0]
    strip = m.draw_action_values(["NOOP", "LEFT", "RIGHT"], 2, values, (1.0, 3.0))
    assert strip.shape == (420, 160, 3) and strip.dtype == np.uint8
    rows = [26 + 21 * i + 14 for i in range(3)]
    lengths = [int((strip[row].sum(-1) > 0).sum()) for row in rows]
    assert lengths == [1, 145, 73]
    assert strip[rows[2], 8].tolist() == [255, 165, 0] and strip[rows[1], 8].tolist() == [211] * 3
    blank = m.draw_action_values(["NOOP", "LEFT", "RIGHT"], 2, None, (1.0, 3.0))
    assert not blank[rows].any(), "no values are known before the network has acted"


def test_a_film_does_not_change_its_evaluation():
    """The values are those of the actions: no further call of the network, no further draw."""
    calls = []
    network = noop_network(m)
    network.register_forward_hook(lambda *call: calls.append(call[-1]))
    args = m.RunArgs(env_id="BreakoutNoFrameskip-v4", eval_episodes=1, eval_max_frames=400)
    *_, steps = m.evaluate(network, args, torch.device("cpu"), (1, 7))
    assert len(calls) <= len(steps)
    assert [q for _, q in steps][-1] == [1.0, 0.0, 0.0, 0.0]
    assert len(network._forward_hooks) == 1, "evaluate removes its hook"


@pytest.mark.parametrize("env_id", ["Breakout-v4", "Breakout-v0"])
def test_ids_that_skip_a_random_number_of_frames_are_refused(env_id):
    with pytest.raises(SystemExit, match=r"random number of frames.*BreakoutNoFrameskip-v4"):
        m.make_envs(env_id, 1, 1)


def test_every_other_id_is_played_as_named():
    import ale_py  # registers the ids

    refused = 0
    for env_id, spec in gym.registry.items():
        if "game" not in spec.kwargs or spec.kwargs["game"] != "pong":
            continue
        try:
            envs = m.make_envs(env_id, 1, 1)
        except SystemExit:
            refused += 1
            assert spec.kwargs["frameskip"] == (2, 5)
        else:
            assert spec.kwargs["frameskip"] in (1, 4)
            assert envs.n_actions == 6
    assert refused == 2 and ale_py.__version__


@pytest.mark.parametrize("max_frames", [108_000, 400])
def test_an_evaluation_compares_q_with_the_returns_that_came(max_frames):
    """With clipped rewards, cut at a lost life as in training; the cap does not end the return."""
    seed = (1, 7)
    args = m.RunArgs(env_id="MsPacmanNoFrameskip-v4", eval_episodes=2, eval_e=1.0, gamma=0.9)
    args.eval_max_frames = max_frames
    envs, rng = m.make_envs(args.env_id, 2, seed, **m.evaluation_options(args)), None
    torch.manual_seed(1)
    q_network = m.QNetwork(envs.n_actions)
    returns, estimates, _ = m.evaluate(q_network, args, torch.device("cpu"), seed)
    (obs, _), rng = envs.reset(), np.random.default_rng(seed)
    kept, expected, lost_lives = [[], []], {}, 0
    while len(expected) < 2:
        with torch.no_grad():
            values = q_network(torch.from_numpy(obs)).max(1).values.numpy()
        actions = m.act(q_network, obs, 1.0, rng, torch.device("cpu"))
        obs, rewards, terminations, _, infos = envs.step(actions)
        over = dict((game, score) for game, score, _ in infos["episodes"])
        for lane in range(2):
            if lane in over and lane not in expected:
                rows = kept[lane]
                lost_lives += sum(discount == 0 for *_, discount in rows)
                obtained = []
                for t in range(len(rows)):
                    total, factor = 0.0, 1.0
                    for _, reward, discount in rows[t:]:
                        total += factor * reward
                        factor *= discount
                    obtained.append(total + factor * values[lane])
                predicted = np.mean([value for value, *_ in rows])
                expected[lane] = (over[lane], predicted, np.mean(obtained))
            kept[lane].append(
                (values[lane], np.clip(rewards[lane], -1, 1), 0.9 * (1 - terminations[lane]))
            )
    assert lost_lives if max_frames == 108_000 else not lost_lives
    found = np.column_stack([returns, estimates]).tolist()
    np.testing.assert_allclose(sorted(found), sorted(expected.values()), rtol=1e-4)
