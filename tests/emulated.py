"""fastreplay on CUDA for the tests of the CPU: the same tests, on a GPU or on its emulation.

python tests/emulated.py FOLDER    compiles csrc/cuda for the CPU (tests/cuda_emulation) there,
                                   with the flags in CFLAGS and LDFLAGS, and prints where
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu")) + sorted(ROOT.glob("csrc/cuda/*.cpp"))
SOURCES += [ROOT / "csrc" / "tensor_view.cpp"]


def build(folder):
    """Compiles the module into a folder, unless the same sources are there already."""
    import pybind11

    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("needs a C++ compiler")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-pthread"]
    flags += ["-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'tests' / 'cuda_emulation'}"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags += os.environ.get("CFLAGS", "").split()
    link = os.environ.get("LDFLAGS", "").split()
    digest = hashlib.sha256(" ".join([compiler, sys.version, *flags, *link]).encode())
    headers = (*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.*h"), *ROOT.glob("tests/cuda_*/*"))
    for file in sorted({*SOURCES, *headers}):
        digest.update(file.read_bytes())
    module = Path(folder) / digest.hexdigest()[:16] / "_cuda.so"
    if module.exists():
        return module
    with tempfile.TemporaryDirectory() as objects:
        jobs = []
        for source in SOURCES:
            jobs.append(Path(objects) / f"{source.name}.o")
            command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(jobs[-1])]
            subprocess.run(command, check=True)
        module.parent.mkdir(parents=True, exist_ok=True)
        linked = Path(objects) / "_cuda.so"
        subprocess.run([compiler, "-shared", *map(str, jobs), *link, "-o", str(linked)], check=True)
        shutil.copy(linked, module.parent / f".{os.getpid()}")
        os.replace(module.parent / f".{os.getpid()}", module)
    return module


def load():
    """The emulated module, compiled if need be."""
    if "emulated._cuda" not in sys.modules:
        path = os.environ.get("FASTREPLAY_EMULATED") or build(ROOT / "build" / "emulated")
        spec = importlib.util.spec_from_file_location("emulated._cuda", path)
        sys.modules["emulated._cuda"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["emulated._cuda"])
    return sys.modules["emulated._cuda"]


class OnHost:
    """A replay or a tree on CUDA, whose results come to the CPU and whose errors come at once."""

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
