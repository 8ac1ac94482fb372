"""Python programs in processes that are forked from one that has imported torch already.

A program of this project spends two to five seconds of processor time on imports before its first
line. Here one process for each worker of pytest does that once. It forks itself for each program,
which then runs as `python FILE ARGUMENTS` does: own arguments, folder, environment and output, and
Python's own end, so with tracebacks, exit handlers and an exit status.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import warnings

# Slow to import, and the same in every program that does.
MODULES = """numpy torch torch.utils.tensorboard gymnasium tyro tqdm matplotlib.pyplot optuna
tensorboard.backend.event_processing.event_accumulator""".split()
LARGEST_REQUEST = 2**17  # bytes
PATH = os.pathsep.join(sys.path)
START = dict(os.environ)


def run(command, cwd=None, env=None):
    """`subprocess.run` of [sys.executable, "-W", "ignore" or not, file, *arguments], with its
    output captured as text. The program finds the packages that the tests find.

    Without `env` it has the environment of the tests. If an `env` differs from that in what Python
    or a package reads at its start, it is `subprocess.run`.
    """
    command, given = [*map(str, command)], dict(os.environ if env is None else env)
    if given.get("PYTHONPATH") == START.get("PYTHONPATH"):
        given["PYTHONPATH"] = PATH
    if env is not None and at_start(given) != at_start(START | {"PYTHONPATH": PATH}):
        return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True)
    request = {"command": command, "cwd": str(cwd or os.getcwd()), "env": given}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        socket.send_fds(server(), [json.dumps(request).encode()], [out.fileno(), err.fileno()])
        status = json.loads(server().recv(LARGEST_REQUEST))
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(command, status, *texts)


def at_start(env):
    """What Python, torch and matplotlib read when they start."""
    return {key: x for key, x in env.items() if key.startswith(("PYTHON", "OMP_", "MPL"))}


@functools.cache
def server():
    """The socket to the process that forks. It ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    options = {"env": START | {"PYTHONPATH": PATH}, "stdin": subprocess.DEVNULL}
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], **options)
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # the last to be registered is called first
    return ours


def serve(control):
    """Answer requests until the other side closes. Returns, in a forked process, what to run."""
    while True:
        message, files, _, _ = socket.recv_fds(control, LARGEST_REQUEST, 2)
        if not message:
            sys.exit()
        child = os.fork()
        if not child:
            control.close()
            return become(json.loads(message), files)
        for file in files:
            os.close(file)
        _, status = os.waitpid(child, 0)
        control.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())


def become(request, files):
    """Make this process what `subprocess.run` would have started. -> the file and its arguments"""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    words = request["command"][1:]
    if words[:2] == ["-W", "ignore"]:
        warnings.simplefilter("ignore")
        words = words[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
    return words


if __name__ == "__main__":
    for name in MODULES:
        __import__(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests and the programs
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(sys.argv[0], run_name="__main__")
