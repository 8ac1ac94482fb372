"""Shared by the tests: the scripts as modules."""

import functools
import importlib.util
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

# The workers of pytest-xdist share the cores, so each has its share of threads. Before torch is
# imported, which reads this; the processes that tests start inherit it.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // WORKERS)))

import emulated  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

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
CUDA_TILES = ["cuda-emulated-tiles", pytest.param("cuda-tiles", marks=pytest.mark.gpu)]


LEFT_OUT = pytest.StashKey[dict]()


def pytest_collection_modifyitems(config, items):
    """Deselects the tests that this machine cannot run, and counts them."""
    kept, left_out = [], {"a CUDA GPU": [], "instructions that this processor lacks": []}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        values = [value for value in params.values() if isinstance(value, str)]
        instructions = [value for value in values if value in ("avx2", "avx512")]
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            left_out["a CUDA GPU"].append(item)
        elif not all(map(has_instructions, instructions)):
            left_out["instructions that this processor lacks"].append(item)
        elif instructions and any(value.startswith("cuda") for value in values):
            pass  # CPU instructions do not affect a GPU
        else:
            kept.append(item)
    # The longest test first, so that the others run beside it (pytest-xdist).
    items[:] = sorted(kept, key=lambda item: "sanitizer" not in item.nodeid)
    config.hook.pytest_deselected(items=[item for found in left_out.values() for item in found])
    counts = {reason: len(found) for reason, found in left_out.items() if found}
    config.stash[LEFT_OUT] = counts
    if hasattr(config, "workeroutput"):  # of pytest-xdist: its main process prints the counts
        config.workeroutput["left_out"] = counts


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """A worker of pytest-xdist has ended; all workers collect the same tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


@functools.cache
def has_instructions(name):
    try:
        from fastreplay import _cpu
    except ImportError:
        return True  # the tests report what is missing
    best = _cpu.instruction_set()
    try:
        _cpu.use_instruction_set(name)
    except ValueError:
        return False
    _cpu.use_instruction_set(best)
    return True


def pytest_terminal_summary(terminalreporter, config):
    output = [f"{count} need {reason}" for reason, count in config.stash.get(LEFT_OUT, {}).items()]
    if output:
        terminalreporter.write_line(f"Tests left out: {', '.join(output)}.")


@pytest.fixture
def emulation(monkeypatch):
    """Makes device="cuda" the emulation, for fastreplay and for torch."""
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
    """`cls` on the device of a CUDA parameter, with its results on the CPU."""
    if backend.startswith("cuda-emulated"):
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
    """Runs the test in an empty folder, where `runs/` is created."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def own_handlers():
    """A script's main() takes over Ctrl-C and threading.excepthook: this restores pytest's."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    hook = threading.excepthook
    yield
    threading.excepthook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def own_precision():
    """A script's main() sets the precision of its layers, --precision: this restores float32."""
    yield
    for path in ALGOS.glob("*_atari.py"):
        if path.stem in sys.modules:
            sys.modules[path.stem].Features.bfloat16 = False


@pytest.fixture
def repository(template, tmp_path):
    """A copy of the module's `template`, a repository with the tools and some scripts."""
    return Path(shutil.copytree(template, tmp_path / "cleanq"))
