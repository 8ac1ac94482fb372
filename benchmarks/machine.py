"""What a record says of the machine and the versions it was made with."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

PACKAGES = "torch numpy gymnasium ale-py stable-baselines3 opencv-python-headless".split()
GPU_PACKAGES = "torchrl tensordict jax flashbax".split()


def describe() -> dict:
    """Processor, memory, versions, commit and the command that is running."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv]
    info = {"date": datetime.date.today().isoformat(), "command": shlex.join(["python", *words])}
    info["python"] = platform.python_version()
    info["system"] = platform.system()
    info["cores"] = os.cpu_count()
    for file, key, name in (
        ("/proc/cpuinfo", "model name", "processor"),
        ("/proc/meminfo", "MemTotal", "memory"),
    ):
        if Path(file).exists():
            lines = Path(file).read_text().splitlines()
            info[name] = next((x.split(":")[1].strip() for x in lines if x.startswith(key)), None)
    info |= gpu()
    for package in [*PACKAGES, *(GPU_PACKAGES if "gpu" in info else [])]:
        try:
            info[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            info[package] = None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    info["commit"] = commit or os.environ.get("COMMIT")  # where the sources are no repository
    return info


def gpu() -> dict:
    """The GPU that torch takes first, its driver and the toolkit; nothing where there is none."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    nvidia_smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = {"gpu": torch.cuda.get_device_name(), "torch's CUDA": torch.version.cuda}
    for name, command in (("driver", nvidia_smi), ("nvcc", ["nvcc", "--version"])):
        try:
            lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
            found[name] = next((x for x in reversed(lines) if x.strip()), None)
        except OSError:
            found[name] = None
    return found


def write_record(folder: str | Path, results: dict, table: str) -> None:
    """results.json with everything, table.md with what a person reads first."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe()
    text = json.dumps({"machine": machine, **results}, separators=(",", ":"))
    (folder / "results.json").write_text(text + "\n")
    lines = [f"- {key}: {value}" for key, value in machine.items()]
    (folder / "README.md").write_text(table + "\n\n" + "\n".join(lines) + "\n")
