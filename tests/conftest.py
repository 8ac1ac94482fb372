"""Shared by the tests: the scripts as modules."""

import importlib.util
import signal
import sys
from pathlib import Path

import emulated
import pytest
import torch

ALGOS = Path(__file__).parent.parent / "algos"
ATARI = ["dqn_atari", "ddqn_atari"]
CARTPOLE = ["dqn_cartpole", "ddqn_cartpole"]


def load(name: str):
    """The script `algos/<name>.py` as a module (imported once)."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ALGOS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# On a GPU; where there is none, CI runs the same kernels on the CPU (tests/cuda_emulation).
CUDA = [
    "cuda-emulated",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
        ],
    ),
]


@pytest.fixture
def emulation(monkeypatch):
    """device="cuda" means the emulation, to fastreplay and to torch."""
    from fastreplay import _device

    try:
        module = emulated.load()
    except (ImportError, RuntimeError) as e:
        pytest.skip(str(e))
    monkeypatch.setattr(_device, "emulation", module)
    with emulated.EmulatedDevice():
        emulated.cuda().call("slow", 0)
        yield emulated.cuda()


def on_cuda(request, backend, cls):
    """`cls` on the device that a parameter of CUDA names, its results on the CPU."""
    if backend == "cuda-emulated":
        request.getfixturevalue("emulation")
    return lambda *args, **options: emulated.OnHost(cls(*args, **options, device="cuda"))


@pytest.fixture(params=ATARI + CARTPOLE)
def script(request):
    return load(request.param)


@pytest.fixture(params=ATARI)
def atari(request):
    return load(request.param)


@pytest.fixture(params=CARTPOLE)
def cartpole(request):
    return load(request.param)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Run in an empty folder, so that `runs/` lands there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def own_signals():
    """A script's main() takes over Ctrl-C: give it back to pytest."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
