"""Shared by the tests: the scripts as modules."""

import importlib.util
import signal
import sys
import threading
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


# The CUDA kernels run on a GPU, or compiled for the CPU (tests/cuda_emulation).
CUDA = ["cuda-emulated", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(config, items):
    """Leave out the tests of a GPU where there is none."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


LEFT_OUT = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(LEFT_OUT, 0):
        count = config.stash[LEFT_OUT]
        terminalreporter.write_line(f"{count} tests need a CUDA GPU and were left out.")


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
def own_handlers():
    """A script's main() takes over Ctrl-C and threading.excepthook: give them back to pytest."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    hook = threading.excepthook
    yield
    threading.excepthook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)
