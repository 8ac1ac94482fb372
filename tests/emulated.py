"""fastreplay's CUDA module for tests, on a GPU or on an emulation on the CPU.

python tests/emulated.py FOLDER    compiles csrc/cuda for the CPU (tests/cuda_emulation) into
                                   FOLDER, with the flags in CFLAGS and LDFLAGS, and prints the path
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted(CSRC.glob("cuda/*.cu"))
SOURCES += [CSRC / "python" / "cuda_bindings.cpp", CSRC / "python" / "tensor_view.cpp"]
SOURCES += sorted(CSRC.glob("cpu/tile_*.cpp"))
SOURCES += [CSRC / "cpu" / "huge_pages.cpp", CSRC / "cpu" / "instructions.cpp"]


def build(folder):
    """Compiles the module into a folder, unless it is there for the same sources. -> its path"""
    import pybind11

    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("needs a C++ compiler")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-pthread"]
    flags += ["-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'tests' / 'cuda_emulation'}"]
    flags += [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags += os.environ.get("CFLAGS", "").split()
    link = os.environ.get("LDFLAGS", "").split()
    digest = hashlib.sha256(" ".join([compiler, sys.version, *flags, *link]).encode())
    headers = (
        *CSRC.glob("*/*.*h"),
        *CSRC.glob("*/*.h"),
        *CSRC.glob("*/*.inl"),
        *ROOT.glob("tests/cuda_*/*"),
    )
    for file in sorted({*SOURCES, *headers}):
        digest.update(file.read_bytes())
    module = Path(folder) / digest.hexdigest()[:16] / "_cuda.so"
    module.parent.mkdir(parents=True, exist_ok=True)
    with open(module.parent / "lock", "w") as lock, tempfile.TemporaryDirectory() as objects:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, the others wait for it
        if module.exists():
            return module

        def compiled(source):
            file = f"{objects}/{source.name}.o"
            command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", file]
            subprocess.run(command, check=True)
            return file

        with ThreadPoolExecutor(os.cpu_count()) as jobs:
            files = [*jobs.map(compiled, SOURCES)]
        linked = Path(objects) / "_cuda.so"
        subprocess.run([compiler, "-shared", *files, *link, "-o", str(linked)], check=True)
        shutil.copy(linked, module.parent / "incomplete")
        os.replace(module.parent / "incomplete", module)
    return module


class Cuda:
    """The emulated GPU: its streams, its graphs, and torch's operations on it."""

    def __init__(self, module):
        self.library = library = ctypes.CDLL(module)
        for name in ("emulation_stream", "emulation_capture"):
            getattr(library, name).restype = ctypes.c_void_p
        library.emulation_waits.restype = ctypes.c_int64
        self.current = None  # the current stream; None is the default one
        self.capturing = False
        self.tensors = 0  # number of tensors allocated so far
        self.dead = []  # memory of deleted tensors, which enqueued work may still use

    def stream(self):
        return self.library.emulation_stream()

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def call(self, name, *args):
        return getattr(self.library, f"emulation_{name}")(ctypes.c_void_p(self.current), *args)

    def slowly(self):
        """Later work on the current stream runs only when the host waits for it."""
        self.call("slow", 1)

    def synchronize(self):
        """Waits for the current stream."""
        self.call("drain")
        if self.library.emulation_is_idle():
            self.dead.clear()

    def captured(self, work, warm=None):
        """Captures fastreplay's calls in work(), after running work() or `warm` once.

        -> a function that launches the graph on the current stream
        """
        (warm or work)()
        graph = ctypes.c_void_p(self.call("capture"))
        self.capturing = True
        try:
            work()
        finally:
            self.call("end_capture")
            self.capturing = False

        def launch():
            self.library.emulation_replay(graph, ctypes.c_void_p(self.current))

        weakref.finalize(launch, self.library.emulation_free, graph)
        return launch

    def fork(self, stream):
        """Makes another stream part of the capture of the current one."""
        self.call("fork", ctypes.c_void_p(stream))

    def quietly(self):
        """Keeps the current stream busy.

        -> a function that returns whether nothing has waited or allocated since
        """
        before = self.library.emulation_waits(), self.tensors
        self.slowly()
        return lambda: before == (self.library.emulation_waits(), self.tensors)

    def on_device(self, memory, late_zeros=False):
        """Presents a tensor on the CPU as one on the GPU; zeros are written in stream order."""
        self.tensors += 1
        if late_zeros:
            args = ctypes.c_void_p(memory.data_ptr()), 0, ctypes.c_int64(memory.nbytes)
            self.call("fill", *args)
        return OnDevice(memory, self.dead)


class RealCuda:
    """The same interface on a GPU."""

    def stream(self):
        return torch.cuda.Stream()

    def on(self, stream):
        return torch.cuda.stream(stream or torch.cuda.default_stream())

    def slowly(self):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds

    def synchronize(self):
        torch.cuda.current_stream().synchronize()

    def captured(self, work, warm=None):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            (warm or work)()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def fork(self, stream):
        stream.wait_stream(torch.cuda.current_stream())

    def quietly(self):
        def allocated():
            return torch.cuda.memory_stats()["allocation.all.allocated"]

        torch.cuda.synchronize()
        before, busy = allocated(), torch.cuda.Event()
        self.slowly()
        busy.record()
        return lambda: not busy.query() and allocated() == before


class OnDevice(torch.Tensor):
    """A tensor that reports cuda:0 as its device. Its memory is on the CPU; only EmulatedDevice
    accesses it."""

    @staticmethod
    def __new__(cls, memory, dead):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device="cuda:0",
        )
        tensor.memory, tensor.dead = memory, dead
        return tensor

    def __del__(self):
        self.dead.append(self.memory)

    def data_ptr(self):
        return self.memory.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the emulated device, outside of EmulatedDevice")


class EmulatedDevice(TorchFunctionMode):
    """Makes torch's device "cuda" the emulated one."""

    COPIES = (torch.Tensor.copy_, torch.Tensor.__setitem__)
    METADATA = ("__get__", "__len__", "dim", "numel", "size", "stride")  # shape, dtype, device...
    VIEWS = ("__getitem__", "__iter__", "narrow", "select", "unbind", "view")
    TO_HOST = (torch.Tensor.numpy, torch.Tensor.__array__)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x for x in tensors if isinstance(x, OnDevice)]
        if on_device and func.__name__ in self.METADATA:
            return func(*args)
        if on_device and func in self.TO_HOST:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        to = kwargs.get("device")
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            to = args[1]
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            to = func.__name__
        to = None if to is None else torch.device(to).type
        if not on_device and to != "cuda":
            return func(*args, **kwargs)

        if on_device and func not in self.COPIES:
            if any(x.dim() > 0 and not isinstance(x, OnDevice) for x in tensors):
                raise RuntimeError(f"{func}: some tensors are on cuda:0 and some on the CPU")
        if on_device and func.__name__ not in self.VIEWS:
            if cuda().capturing:
                raise RuntimeError(f"{func}: the emulation captures only calls of fastreplay")
            cuda().synchronize()
        moves = (torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.to, torch.as_tensor)
        if func in moves and to is not None and tensors:
            memory = on_device[0].memory if on_device else args[0]
            if (to == "cuda") == bool(on_device):
                return args[0]
            return memory.clone() if to == "cpu" else cuda().on_device(memory.clone())
        bare_args, bare = tree_map_only(OnDevice, lambda x: x.memory, (args, kwargs))
        result = func(*bare_args, **{k: v for k, v in bare.items() if k != "device"})
        if to == "cpu":
            return result
        if func in (torch.empty, torch.zeros):  # garbage until the zeros are written
            result.untyped_storage().fill_(0xA5)
        same = {id(x.memory): x for x in on_device} | {id(x): x for x in tensors}

        def wrap(x):
            return same[id(x)] if id(x) in same else cuda().on_device(x, func is torch.zeros)

        return tree_map_only(torch.Tensor, wrap, result)


def load():
    """The emulated module, compiled if necessary."""
    if "emulated._cuda" not in sys.modules:
        path = os.environ.get("FASTREPLAY_EMULATED") or build(ROOT / "build" / "emulated")
        spec = importlib.util.spec_from_file_location("emulated._cuda", path)
        module = sys.modules["emulated._cuda"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.emulated = Cuda(path)
        module.current_stream = lambda index: module.emulated.current or 0
    return sys.modules["emulated._cuda"]


def cuda() -> Cuda:
    return load().emulated


class OnHost:
    """Wraps a replay or a tree on CUDA: results are on the CPU and errors are raised at once."""

    RESULTS = ("sample", "draw", "gather", "drawable", "find", "get", "weights")

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getattr__(self, name):
        value = getattr(self.inner, name)
        if not callable(value) or name in ("check", "_empty_batch"):
            return OnHost(value) if name == "_tree" and value is not None else value

        def call(*args, **keywords):
            result = value(*args, **keywords)
            self.inner.check()
            if name not in self.RESULTS or keywords.get("out") is not None:
                return result
            if isinstance(result, tuple):
                return type(result)(*(tensor.cpu() for tensor in result))
            return result.cpu()

        return call


if __name__ == "__main__":
    print(build(sys.argv[1]))
