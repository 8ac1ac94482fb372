"""Shared by the tests: the scripts as modules."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest

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
