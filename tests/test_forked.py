"""A forked program does what one that `subprocess.run` starts does."""

import os
import subprocess
import sys

import forked
import pytest

PROGRAM = """
import atexit, dataclasses, os, sys, threading, time, typing

@dataclasses.dataclass
class Args:
    value: "int"

print(sys.argv[1:], os.getcwd(), os.environ.get("COLOUR"), __name__, os.path.basename(__file__))
print(os.path.dirname(os.path.abspath(__file__)) == sys.path[0], typing.get_type_hints(Args))
print("an error", file=sys.stderr)
atexit.register(print, "the end")
threading.Thread(target=lambda: (time.sleep(0.1), print("a thread"))).start()
{end}
"""
ENDS = ["", "sys.exit(3)", "sys.exit('a message')", "raise SystemExit", "os._exit(4)", "os.abort()"]


@pytest.mark.parametrize("end", ENDS)
def test_a_forked_program(tmp_path, end):
    (tmp_path / "program.py").write_text(PROGRAM.format(end=end))
    command = [sys.executable, "-W", "ignore", str(tmp_path / "program.py"), "--a", "b c"]
    env = forked.START | {"COLOUR": "blue"}
    done = forked.run(command, cwd=tmp_path, env=env)
    real = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        real.returncode,
        real.stdout,
        real.stderr,
    )


def test_a_traceback(tmp_path):
    (tmp_path / "program.py").write_text("def f():\n    1 / 0\nf()\n")
    done = forked.run([sys.executable, tmp_path / "program.py"])
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_other_settings_of_python_start_a_new_process(tmp_path):
    (tmp_path / "program.py").write_text("import os\nprint(os.getppid())")
    command = [sys.executable, tmp_path / "program.py"]
    here = str(os.getpid())
    assert forked.run(command).stdout.strip() != here
    assert forked.run(command, env=forked.START | {"PYTHONUTF8": "1"}).stdout.strip() == here
