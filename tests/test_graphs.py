"""The Atari files' update, and acting, as CUDA graphs (CudaGraph in dqn_atari.py).

Without a GPU a recording stands for the graph: torch's operators and the replay's calls, with the
memory that they used. Repeating it runs no Python of the script, so a value that Python computes
anew at each update, or a tensor that it replaces, keeps what it was when it was recorded.
"""

import contextlib

import pytest
import torch
from conftest import load
from test_run import FRAMES, checkpoint_of, main_in_process, same, small
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

GRAPHS = [name for name in FRAMES if name != "pqn_atari"]
STEPS, FIRST, EVERY = 240, 96, 24  # in all, before the first update, and between two
SHORT = {"total_timesteps": STEPS, "learning_starts": FIRST, "train_frequency": EVERY}
SHORT |= {"batch_size": 4, "eval_episodes": 0, "checkpoint_frequency": 0}
LEARNED = ("q_network", "target_network")


def tensors_in(nested):
    return [x for x in tree_leaves(nested) if isinstance(x, torch.Tensor)]


def memory_of(tensor):
    return tensor.untyped_storage().data_ptr()


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    made = ()  # set by the fixture: all graphs of a test

    def __init__(self):
        self.work, self.replays = [], 0
        self.made.append(self)

    def note(self, work, arguments, results):
        """Repeat `work` at each launch, and leave its results in the memory that they have now."""
        taken = {memory_of(x) for x in tensors_in(arguments)}  # views of arguments have theirs
        own = [x if memory_of(x) not in taken else None for x in tensors_in(results)]

        def repeat():
            for x, new in zip(own, tensors_in(work())):
                if x is not None:
                    x.copy_(new)

        self.work.append(repeat)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        if self.replays > 1:  # the first time the recording itself was the launch
            for repeat in self.work:
                repeat()


class Record(TorchDispatchMode):
    """Stands for torch.cuda.graph. It also runs what it records; a GPU does not."""

    now = None  # the graph that is recorded
    generator = None  # a tensor that all graphs share, as in torch before 2.11

    def __init__(self, graph, stream):
        super().__init__()
        self.graph = graph

    def __enter__(self):
        if Record.generator is None:
            Record.generator = torch.zeros(1)
        Record.generator.fill_(0)  # an error if the first recording was in inference mode
        Record.now = self.graph
        return super().__enter__()

    def __exit__(self, *error):
        Record.now = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.graph.note(lambda: func(*args, **kwargs), (args, kwargs), result)
        return result


class Replay:
    """A replay whose calls a graph repeats, as it repeats the kernels of fastreplay."""

    def __init__(self, inner):
        self.__dict__["inner"] = inner

    def __len__(self):
        return len(self.inner)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __setattr__(self, name, value):
        setattr(self.inner, name, value)

    def call(self, name, *args):
        if Record.now is None:
            return getattr(self.inner, name)(*args)
        with _disable_current_modes():
            result = getattr(self.inner, name)(*args)
        Record.now.note(lambda: getattr(self.inner, name)(*args), args, result)
        return result

    def sample(self, batch_size):
        return self.call("sample", batch_size)

    def update_priorities(self, indices, td_error):
        self.call("update_priorities", indices, td_error)


@pytest.fixture
def graphs(monkeypatch):
    """Makes torch.cuda's graphs recordings. -> a list of those made"""
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": Graph,
        "graph": Record,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    made = []
    monkeypatch.setattr(Graph, "made", made)
    monkeypatch.setattr(Record, "generator", None)
    return made


@contextlib.contextmanager
def with_graphs(script):
    """On this machine, too, the script makes graphs."""
    with pytest.MonkeyPatch.context() as patch:
        make_replay = script.make_replay
        patch.setattr(script, "takes_graphs", lambda args: True)
        patch.setattr(script, "make_replay", lambda *a, **k: Replay(make_replay(*a, **k)))
        yield


def learned(script, options, folder, monkeypatch):
    """-> the checkpoint at the end of a run in this folder"""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    main_in_process(script, options, monkeypatch)
    return torch.load(checkpoint_of(folder), weights_only=False)


def check_same(one, other, names=(*LEARNED, "rng", "torch_rng", "envs")):
    assert [name for name in names if not same(one[name], other[name])] == []
    states = one["optimizer"]["state"], other["optimizer"]["state"]
    assert states[0] and same(*states)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_learn_what_plain_calls_learn(name, graphs, tmp_path, monkeypatch):
    script, options = load(name), small(name) | SHORT
    plain = learned(script, options, tmp_path / "plain", monkeypatch)
    assert not graphs
    with with_graphs(script):
        graphed = learned(script, options, tmp_path / "graph", monkeypatch)
    check_same(plain, graphed)
    acting, update = graphs
    warm_up = script.CudaGraph.WARM_UP
    assert acting.replays == STEPS // options["num_envs"] - warm_up
    assert update.replays == (STEPS - FIRST) // EVERY - warm_up


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_other_optimizers_and_clipping_are_recorded(optimizer, graphs, tmp_path, monkeypatch):
    script, options = load("ddqn_atari"), small("ddqn_atari") | SHORT
    options |= {"optimizer": optimizer, "max_grad_norm": 0.01}
    plain = learned(script, options, tmp_path / "plain", monkeypatch)
    with with_graphs(script):
        check_same(plain, learned(script, options, tmp_path / "graph", monkeypatch))


@pytest.mark.parametrize("first", ["plain", "graph"])
def test_a_run_goes_on_with_or_without_graphs(first, graphs, tmp_path, monkeypatch):
    script, options = load("per_ddqn_atari"), small("per_ddqn_atari") | SHORT
    options |= {"checkpoint_replay": True, "per_beta": 1.0, "exploration_fraction": 0.0}
    expected = learned(script, options, tmp_path / "whole", monkeypatch)
    kinds = {"plain": contextlib.nullcontext(), "graph": with_graphs(script)}
    with kinds.pop(first):
        half = options | {"total_timesteps": STEPS // 2}
        learned(script, half, tmp_path / "halves", monkeypatch)
    options = {"resume": checkpoint_of(tmp_path / "halves"), "total_timesteps": STEPS}
    with next(iter(kinds.values())):
        resumed = learned(script, options, tmp_path / "halves", monkeypatch)
    check_same(expected, resumed)


def test_a_recording_keeps_values_of_python(graphs):
    """What the docstring of CudaGraph says that a function must not do."""
    script, seen = load("dqn_atari"), []

    def count(x):
        seen.append(len(seen))
        return x + seen[-1]

    graph = script.CudaGraph(count)
    results = [graph(torch.tensor([10.0 * i])).item() for i in range(6)]
    assert results == [0, 11, 22, 33, 43, 53]
    assert len(seen) == script.CudaGraph.WARM_UP + 1


def test_results_are_overwritten_and_attributes_are_those_of_the_function(graphs):
    script = load("dqn_atari")
    q_network = torch.nn.Linear(1, 1)
    graph = script.CudaGraph(q_network)
    assert graph.weight is q_network.weight
    with torch.no_grad():
        results = [graph(torch.tensor([[float(i)]])) for i in range(7)]
        expected = q_network(torch.tensor([[6.0]]))
    assert results[-1] is results[-2] and torch.equal(results[-2], expected)


@pytest.mark.parametrize("buffer", ["numpy", "cpp"])
def test_without_a_replay_on_the_gpu_there_are_no_graphs(buffer):
    script = load("dqn_atari")
    args = script.RunArgs(buffer=buffer, cuda_graphs=True)
    assert not script.takes_graphs(args) and script.accelerated(args)(len) is len
    assert script.takes_graphs(script.RunArgs(buffer="cuda", cuda_graphs=True))
    assert not script.takes_graphs(script.RunArgs(buffer="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_on_a_gpu_learn_what_plain_calls_learn(name, tmp_path, monkeypatch):
    """Up to rounding: convolutions on a GPU may add in another order."""
    script, options = load(name), small(name) | SHORT | {"buffer": "cuda", "device": "cuda"}
    runs = []
    for graphs in (False, True):
        folder = tmp_path / str(graphs)
        runs.append(learned(script, options | {"cuda_graphs": graphs}, folder, monkeypatch))
    assert same(runs[0]["envs"], runs[1]["envs"]), "other actions"
    for part in LEARNED:
        for key, weights in runs[0][part].items():
            torch.testing.assert_close(runs[1][part][key], weights, rtol=1e-3, atol=1e-5)
