"""What `pip install .` installs."""

import os
import shutil
import subprocess
import sys

import emulated
import pytest


@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="needs a compiler")
def test_fastreplay_is_compiled_if_there_is_a_compiler():
    """Otherwise all tests of fastreplay would be skipped without notice."""
    import fastreplay

    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    nvcc = nvcc and os.environ.get("FASTREPLAY_CUDA") != "0"
    assert fastreplay.backends() == (("cpp", "cuda") if nvcc else ("cpp",))


@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="needs a compiler")
def test_the_cuda_kernels_are_tested_if_there_is_a_compiler():
    """Otherwise all tests of the kernels would be skipped without notice."""
    assert emulated.load().SumTree.slots(33) == 64 + 32


def test_import_is_lazy():
    """`import fastreplay` imports neither torch nor a compiled module."""
    code = "import sys, fastreplay; print({'torch', *COMPILED} & set(sys.modules))"
    code = code.replace("COMPILED", "('fastreplay._cpu', 'fastreplay._cuda')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "set()", result.stderr
