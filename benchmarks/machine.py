"""The files of a record: the commit, the command, the versions and the machine it was made with."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("algos/", "csrc/", "benchmarks/", "tests/")
PACKAGES = "torch numpy gymnasium ale-py tensorboard stable-baselines3 sb3-contrib tianshou"
PACKAGES += " opencv-python-headless"
GPU_PACKAGES = "torchrl tensordict jax flashbax"


def clean_commit() -> str:
    """The full hash of the checked-out commit. Exits if the files differ from the commit.

    A difference is a changed tracked file, or an untracked file under algos/, csrc/, benchmarks/ or
    tests/. Files under benchmarks/records/ are results and are ignored. Outside a git repository
    the environment variable COMMIT must be the full hash of the commit.
    """
    try:
        top = git("rev-parse", "--show-toplevel")
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        top = ""
    if top != str(ROOT):
        commit = os.environ.get("COMMIT", "")
        if not re.fullmatch("[0-9a-f]{40}", commit):
            sys.exit(
                f"error: {ROOT} is not a git repository that git can read; set COMMIT to the full "
                "hash (40 digits) of the commit that its files come from."
            )
        return commit
    status = git(
        "status", "--porcelain", "--untracked-files=all", "--", ".", ":(exclude)benchmarks/records"
    )
    files = [
        line[3:]
        for line in status.splitlines()
        if not line.startswith("??") or line[3:].startswith(CODE)
    ]
    if files:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        sys.exit(
            "error: a record needs a clean checkout: commit or stash first (git stash -u). "
            f"Changed: {files[0]}{more}."
        )
    return git("rev-parse", "HEAD")


def git(*words: str) -> str:
    """The output of a git command in the repository's folder."""
    run = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True)
    return run.stdout.rstrip()


def commit_of(checkout: str) -> str | None:
    """The full hash of a peer's checkout, with -dirty if files differ; None if there is none."""
    if not checkout:
        return None
    words = ["git", "-C", checkout, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None


def same_at(commit: str | None, other: str | None, *paths: str) -> bool:
    """Whether files, or all files of folders, are the same at two commits of this repository.

    False if git does not know a commit, or if it is None or ends in -dirty.
    """
    words = ["git", "-C", ROOT, "diff", "--quiet", str(commit), str(other), "--", *paths]
    return commit == other or subprocess.run(words, capture_output=True).returncode == 0


def quote(words) -> str:
    """A command that can be pasted into a shell in the repository's folder.

    Paths inside the repository become relative to it. Other absolute paths are shortened to their
    last part.
    """
    return shlex.join(option(word) for word in words)


def option(word: str) -> str:
    name, _, value = word.partition("=")
    return f"{name}={portable(value)}" if word.startswith("--") and value else portable(word)


def portable(word: str) -> str:
    path = Path.cwd() / word  # an absolute `word` stays as it is
    if word and (Path(word).is_absolute() or os.path.exists(path)):
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return word


def describe() -> dict:
    """Date, command, commit, versions, processor, memory and GPU. Exits like `clean_commit`."""
    info = {
        "date": datetime.date.today().isoformat(),
        "command": quote(["python", *sys.argv]),
        "commit": clean_commit(),
        "python": platform.python_version(),
        "system": platform.system(),
        "cores": os.cpu_count(),
    }
    for file, key, name in (
        ("/proc/cpuinfo", "model name", "processor"),
        ("/proc/meminfo", "MemTotal", "memory"),
    ):
        if Path(file).exists():
            lines = Path(file).read_text().splitlines()
            info[name] = next((x.split(":")[1].strip() for x in lines if x.startswith(key)), None)
    info |= gpu()
    for package in f"{PACKAGES} {GPU_PACKAGES if 'gpu' in info else ''}".split():
        try:
            info[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            info[package] = None
    return info


def gpu() -> dict:
    """Name of torch's current GPU, versions of its driver and of the toolkit; {} without a GPU."""
    if not shutil.which("nvidia-smi"):  # it comes with the driver; importing torch takes seconds
        return {}
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    nvidia_smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = {"gpu": torch.cuda.get_device_name(), "torch's CUDA": torch.version.cuda}
    for name, words in (("driver", nvidia_smi), ("nvcc", ["nvcc", "--version"])):
        try:
            lines = subprocess.run(words, capture_output=True, text=True).stdout.split("\n")
            found[name] = next((x for x in reversed(lines) if x.strip()), None)
        except OSError:
            found[name] = None
    return found


def write_record(folder: str | Path, results: dict, report: str, commit: str) -> None:
    """Write results.json (everything) and README.md (`report`, then how it was made).

    `commit` is `clean_commit()` from before the measurement. Exits without writing if the checkout
    has changed since.
    """
    made_by = describe()
    if made_by["commit"] != commit:
        sys.exit(
            f"error: the checkout went from commit {commit[:12]} to {made_by['commit'][:12]} "
            "during the measurement: no record is written."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": made_by, **results}, separators=(",", ":"))
    (folder / "results.json").write_text(text + "\n")
    text = f"{report.rstrip()}\n\n## How it was made\n\n```bash\n{made_by['command']}\n```\n\n"
    lines = [f"- {key}: {value}" for key, value in made_by.items() if value and key != "command"]
    (folder / "README.md").write_text(text + "\n".join(lines) + "\n")
