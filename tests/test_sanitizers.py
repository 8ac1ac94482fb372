"""The compiled code under AddressSanitizer and UndefinedBehaviorSanitizer (tests/sanitize.sh)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def has(library):
    """Whether GCC has a library: if so, GCC prints its path, otherwise only the name."""
    answer = subprocess.run(["gcc", f"-print-file-name={library}"], capture_output=True, text=True)
    return "/" in answer.stdout


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("gcc") or not has("libasan.so"),
    reason="needs GCC's sanitizers",
)
def test_no_sanitizer_reports_an_error():
    script = Path(__file__).parent / "sanitize.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    run = subprocess.run(
        [script, "address", "quick"], capture_output=True, text=True, env=environment, timeout=1500
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
