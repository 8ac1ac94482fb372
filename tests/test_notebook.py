"""The scripts in a notebook, in a real kernel: `!python algos/...` and `%run algos/...`.

A film in a notebook, one line:

    IPython.display.Video("runs/<run>/videos/step-200000.mp4", embed=True)

An interrupted cell saves a checkpoint and prints how to go on. `%run` takes the time that it needs.
For `!python` IPython waits 0.2 seconds, then shows no more output, and 0.3 seconds later it may
kill the process: with a large replay in the checkpoint, the last periodic one is then the newest.
"""

import re
import sys

import pytest
import torch
from conftest import ALGOS
from test_run import flags, small

client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")

SHORT = small("dqn_cartpole") | {"total_timesteps": 8000, "eval_frequency": 0}  # > 1 second
ENDLESS = SHORT | {"total_timesteps": 10**8, "checkpoint_frequency": 0}
STATE = "[signal.getsignal(n) for n in (2, 15)], sys.stdout, sys.stderr, threading.excepthook"


class Notebook:
    def __init__(self, folder):
        self.folder = folder
        self.manager, self.client = client.manager.start_new_kernel(cwd=str(folder))

    def cell(self, code, interrupt_at=None):
        """Executes a cell. -> its output; an error's name and message are part of it

        Interrupts it once its output matches `interrupt_at`.
        """
        text, interrupted = "", not interrupt_at

        def receive(message):
            nonlocal text, interrupted
            content = message["content"]
            if message["msg_type"] == "stream":
                text += content["text"]
            elif message["msg_type"] == "error":
                text += f"{content['ename']}: {content['evalue']}"
            elif message["msg_type"] in ("execute_result", "display_data"):
                text += content["data"].get("text/html") or content["data"]["text/plain"]
            if not interrupted and re.search(interrupt_at, text):
                interrupted = True
                self.manager.interrupt_kernel()

        self.client.execute_interactive(code, output_hook=receive, timeout=120)
        assert interrupted, text
        return text

    def script(self, how, options, **kwargs):
        words = {"!python": f"!{sys.executable}", "%run": "%run"}[how], ALGOS / "dqn_cartpole.py"
        return self.cell(" ".join(map(str, (*words, *flags(options)))), **kwargs)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    notebook = Notebook(tmp_path_factory.mktemp("notebook"))
    notebook.cell("import signal, sys, threading, time, IPython")
    yield notebook
    notebook.client.stop_channels()
    notebook.manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("how", ["!python", "%run", "%run"])
def test_a_cell_trains_with_a_progress_bar(how, notebook):
    """Also the second time in the same kernel."""
    text = notebook.script(how, SHORT)
    assert re.search(r"evaluated: \d+\.\d \+- \d+\.\d in 3 episodes", text), text
    shown = re.findall(r"(\d+)/8000 \[", text)
    assert len(set(shown)) > 2 and shown[-1] == "8000", "0, 8000 and steps between them"
    assert "Error" not in text and "Exit" not in text


def test_a_table_is_learned_in_a_cell(notebook):
    before = notebook.cell(STATE)
    text = notebook.cell(f"%run {ALGOS / 'q_learning_tabular.py'} --total-timesteps 2000")
    assert "step 2000, evaluated: " in text and "Error" not in text, text
    assert notebook.cell(STATE) == before


def test_an_interrupted_run_saves_and_the_kernel_goes_on(notebook):
    before = notebook.cell(STATE)
    text = notebook.script("%run", ENDLESS, interrupt_at=r"[1-9]\d*/100000000 \[")
    command = re.search(r"go on with: (%run .*/dqn_cartpole.py --resume (\S+\.pt))", text)
    assert command and "KeyboardInterrupt" not in text, text
    path = notebook.folder / command[2]
    step = torch.load(path, weights_only=True)["global_step"]
    assert step > 0
    assert notebook.cell(STATE) == before, "the kernel's signals and streams are its own again"
    endless = "print('waits')\nwhile True: time.sleep(0.1)"
    assert "KeyboardInterrupt" in notebook.cell(endless, interrupt_at="waits")
    text = notebook.cell(f"{command[1]} --total-timesteps {step + 40}")
    assert "3 episodes" in text, text
    assert torch.load(path, weights_only=True)["global_step"] == step + 40


def test_an_interrupted_command_saves_and_the_kernel_goes_on(notebook):
    # As on a fast machine, where 0.2 seconds are enough.
    waiting = "IPython.utils._process_posix.ProcessHandler.terminate_timeout"
    notebook.cell(f"import IPython.utils._process_posix; {waiting} = 60")
    text = notebook.script("!python", ENDLESS, interrupt_at=r"[1-9]\d*/100000000 \[")
    command = re.search(r"go on with: python (.*/dqn_cartpole.py --resume (\S+\.pt))", text)
    assert command, text
    step = torch.load(notebook.folder / command[2], weights_only=True)["global_step"]
    text = notebook.cell(f"!{sys.executable} {command[1]} --total-timesteps {step + 40}")
    assert step > 0 and "3 episodes" in text, text


def test_the_kernel_can_be_terminated_after_a_run(notebook):
    """A run in a cell leaves SIGTERM and SIGHUP to the kernel, also while it trains."""
    notebook.cell(f"%run {ALGOS / 'dqn_cartpole.py'} {' '.join(flags(SHORT))}")
    assert notebook.cell("signal.getsignal(signal.SIGTERM) is signal.SIG_DFL") == "True"


def test_a_mistake_is_one_line(notebook):
    text = notebook.script("%run", {"gamma": 3})
    assert text == "SystemExit: error: --gamma must be between 0 and 1 (it is 3.0)."
    text = notebook.script("%run", {"resume": "nowhere.pt"})
    assert text.startswith("SystemExit: error: no checkpoint at nowhere.pt"), text


def test_a_film_is_shown_by_one_line(notebook):
    pytest.importorskip("moviepy")
    options = SHORT | {"capture_video": True, "eval_episodes": 1, "exp_name": "filmed"}
    notebook.script("%run", options)
    path = next(notebook.folder.glob("runs/*filmed*/videos/step-8000.mp4"))
    shown = notebook.cell(f"IPython.display.Video({str(path)!r}, embed=True)")
    assert "<video" in shown and 'src="data:video/mp4;base64,' in shown
