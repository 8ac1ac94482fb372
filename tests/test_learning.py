"""Whole training runs: `python -m pytest -m slow`, and `-m gpu` on a machine with a GPU."""

import numpy as np
import pytest
import squares
import torch
from conftest import ALGOS, load
from test_run import main_in_process, scalars, small

ON_ATARI = sorted(path.stem for path in ALGOS.glob("*_atari.py"))


@pytest.mark.slow
def test_cartpole_is_solved(cartpole, in_tmp, monkeypatch):
    scores = []
    evaluate = cartpole.evaluate

    def evaluate_and_keep(*args):
        scores.append(evaluate(*args)[0])
        return scores[-1], []

    monkeypatch.setattr(cartpole, "evaluate", evaluate_and_keep)
    main_in_process(cartpole, {"eval_frequency": 0}, monkeypatch)
    assert len(scores[-1]) == 100 and scores[-1].mean() >= 475


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ON_ATARI if not name.startswith("apex")])
def test_every_atari_file_learns_a_simple_game(name, in_tmp, monkeypatch):
    script = load(name)
    monkeypatch.setattr(script, "make_envs", squares.Squares)
    options = {"total_timesteps": 5_000, "buffer_size": 5_000, "learning_starts": 400}
    options |= {"batch_size": 32, "train_frequency": 10, "target_network_frequency": 200}
    options |= {"learning_rate": 5e-4, "gamma": 0.9, "num_envs": 8, "exploration_fraction": 0.2}
    options |= {"end_e": 0.02, "eval_episodes": 0, "eval_frequency": 0, "log_frequency": 1_000}
    options |= {"width": 1, "num_steps": 40, "num_minibatches": 10}  # of BTR and PQN
    options = {key: x for key, x in options.items() if hasattr(script.RunArgs, key)}
    main_in_process(script, options | {"checkpoint_frequency": 0}, monkeypatch)
    returns = [x.value for x in scalars(next(in_tmp.glob("runs/*")))["charts/episodic_return"]]
    assert np.mean(returns[:40]) < 7 and np.mean(returns[-100:]) > 9


@pytest.mark.gpu
@pytest.mark.parametrize("buffer", ["cuda", "cpp", "numpy"])
def test_a_run_on_the_gpu(script, buffer, in_tmp, monkeypatch):
    options = small(script.__name__) | {"device": "cuda"}
    if "atari" in script.__name__:
        options["buffer"] = buffer
        assert not script.cuda_problem(script.RunArgs(device="cuda"))
    main_in_process(script, options | {"checkpoint_replay": True}, monkeypatch)
    path = str(next(in_tmp.glob("runs/*/checkpoint.pt")))
    before = script.load_checkpoint(path)
    steps = before["global_step"]
    weights = {name: value.clone() for name, value in before["q_network"].items()}
    main_in_process(script, {"resume": path, "total_timesteps": 2 * steps}, monkeypatch)
    after = script.load_checkpoint(path)
    assert after["global_step"] == 2 * steps
    assert all(value.isfinite().all() for value in after["q_network"].values())
    assert not any(torch.equal(weights[name], after["q_network"][name]) for name in weights)
