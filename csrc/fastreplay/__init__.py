"""fastreplay: a replay that stores each frame once, and an exact integer sum-tree.

    FrameReplay     builds stacks and n-step returns when it samples, optionally with priorities
    Batch           what it returns
    SumTree         draws proportional to priorities, for any kind of data
    backends()      the compiled backends: ("cpp", "cuda"), ("cpp",) or ()
    cuda_problem()  why device="cuda" cannot be used here, or ""

torch and the compiled modules are imported when one of these is first used.
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
    """Names of the compiled backends, the fastest last; empty if nothing was compiled.

    "cuda" means that fastreplay was built with CUDA. cuda_problem() tests whether the GPU of this
    machine can be used.
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
