"""Whole training runs: `python -m pytest -m slow`, and `-m gpu` on a machine with a GPU."""

import pytest
import torch
from test_run import main_in_process, small


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
