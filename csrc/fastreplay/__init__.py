"""fastreplay: a replay buffer that keeps each frame once, and an exact integer sum-tree.

    FrameReplay     stacks, n-step returns and priorities, built when a batch is sampled
    SumTree         draws proportional to priorities, for any kind of data
    backends()      what of it is compiled here: ("cpp", "cuda"), ("cpp",) or ()
    cuda_problem()  why device="cuda" cannot be used here, or ""

The compiled half is loaded when one of the classes is first used.
"""

import importlib
import importlib.util

__all__ = ["Batch", "FrameReplay", "SumTree", "backends", "cuda_problem"]

_HOME = {
    "SumTree": "sum_tree",
    "FrameReplay": "frame_replay",
    "Batch": "frame_replay",
    "cuda_problem": "_device",
}


def backends():
    """Names of the compiled backends, best last; empty where nothing was compiled.

    "cuda" tells how fastreplay was built, not what the machine has: `device="cuda"` needs a GPU
    too, as cuda_problem() says.
    """
    names = {"cpp": "fastreplay._cpu", "cuda": "fastreplay._cuda"}
    built = tuple(name for name, module in names.items() if importlib.util.find_spec(module))
    return built if "cpp" in built else ()


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'fastreplay' has no attribute '{name}'")
    if not backends():
        raise ImportError("fastreplay is not compiled here; build it with: pip install .")
    value = getattr(importlib.import_module(f"fastreplay.{_HOME[name]}"), name)
    globals()[name] = value
    return value
