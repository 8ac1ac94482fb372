"""What `pip install .` leaves behind."""

import shutil
import subprocess
import sys

import pytest


@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="needs a compiler")
def test_fastreplay_is_compiled_where_there_is_a_compiler():
    """Or else every test of it would be skipped without a word."""
    import fastreplay

    assert fastreplay.backends() == ("cpp",)


def test_import_is_lazy():
    """`import fastreplay` loads neither torch nor the compiled half."""
    code = "import sys, fastreplay; print('torch' in sys.modules, 'fastreplay._cpu' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False False", result.stderr
