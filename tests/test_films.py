"""benchmarks/films.py: films of the networks in a record."""

import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from test_benchmarks import ROOT
from test_family import FAMILY

sys.path.insert(0, str(ROOT / "benchmarks"))
films = pytest.importorskip("films")
pytest.importorskip("pygame")
Image = pytest.importorskip("PIL.Image")

VECTORS = [n for n in FAMILY if not n.endswith(("_atari", "_tabular"))]


def write_network(folder, name, env_id):
    """A file as train.py writes it, of an untrained network. -> the file and the network"""
    script = films.load(name)
    args, envs = script.RunArgs(env_id=env_id), script.make_envs(env_id, 1, 0)
    if hasattr(args, "v_min"):
        args.v_min, args.v_max = -10.0, 0.0  # main finds them
    if hasattr(args, "hidden_sizes"):
        args.hidden_sizes = (8,)
    torch.manual_seed(1)
    network = films.make_network(script, args, envs)
    (folder / "networks").mkdir(parents=True, exist_ok=True)
    file = folder / "networks" / f"{name}.pt"
    torch.save({"script": name, "args": asdict(args), "q_network": network.state_dict()}, file)
    return file, network.eval()


@pytest.mark.parametrize("name", VECTORS)
def test_the_action_values_are_those_of_the_network(name, tmp_path):
    """Also the chosen actions: the greedy ones."""
    if name == "iqn_cartpole":
        pytest.skip("IQN draws its quantiles at random")
    file, network = write_network(tmp_path, name, "Acrobot-v1")
    pictures, values, actions = films.play(file, 5)
    assert [p.shape for p in pictures] == [(240, 240, 3)] * 5
    envs = films.load(name).make_envs("Acrobot-v1", 1, films.SEED)
    obs = envs.reset()
    for shown, action in zip(values, actions, strict=True):
        with torch.inference_mode():
            expected = network(torch.from_numpy(obs)).numpy()[0]
        np.testing.assert_allclose(shown, expected, rtol=1e-6)
        assert action == expected.argmax()
        obs = envs.step(np.array([action]))[0]


def test_a_film_of_minatar(tmp_path, capsys, monkeypatch):
    """Every object has its colour; the film has the episode's pictures at 25 a second."""
    pytest.importorskip("minatar")
    file, _ = write_network(tmp_path, "dqn_cartpole", "MinAtar/Breakout-v1")
    pictures, _, actions = films.play(file, 3)
    colours = {tuple(c) for c in pictures[0].reshape(-1, 3)}
    assert len(actions) == 3 and (255, 255, 255) in colours and len(colours) >= 3
    monkeypatch.setattr("sys.argv", ["films.py", str(tmp_path), "--seconds", "0.12"])
    films.main()
    path = tmp_path / "films" / "dqn_cartpole.gif"
    assert f"{path}: 3 pictures" in capsys.readouterr().out
    film = Image.open(path)
    assert film.size == (360, 240) and film.info["duration"] == 40
    shown = {tuple(c) for c in np.asarray(film.convert("RGB"))[:, :240].reshape(-1, 3).tolist()}
    assert all(min(np.abs(np.subtract(c, s)).max() for s in shown) < 8 for c in colours)


NETWORKS = sorted((ROOT / "benchmarks" / "records").glob("*/networks/*.pt"))


@pytest.mark.parametrize("file", NETWORKS, ids=lambda file: f"{file.parts[-3]}/{file.stem}")
def test_the_networks_of_the_records_can_be_evaluated(file):
    """By today's scripts: same arguments, same network."""
    script = films.load(torch.load(file, weights_only=True)["script"])
    state = script.load_checkpoint(str(file))  # exits with one line if the arguments differ
    _, args, _, network = films.agent_of(file)
    assert asdict(args) == state["args"]
    assert all(map(torch.equal, network.state_dict().values(), state["q_network"].values()))


def test_a_record_without_networks(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["films.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no networks"):
        films.main()
