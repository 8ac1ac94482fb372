"""README.md: its examples run, its table counts right, its links lead somewhere."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_family import ALGOS, FAMILY, lines_above, read

ROOT = ALGOS.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run(example):
    pytest.importorskip("fastreplay")
    rng = np.random.default_rng(0)
    names = {
        "frames": rng.integers(256, size=(8, 84, 84), dtype=np.uint8),
        "actions": rng.integers(4, size=8),
        "rewards": np.ones(8, np.float32),
        "terminations": np.ones(8, bool),
        "episode_starts": np.zeros(8, bool),
        "indices": torch.arange(5),
        "priorities": torch.rand(5),
        "learn": lambda batch: batch.is_weights * batch.rewards,
    }
    adding = [line for line in example.splitlines() if line.startswith("replay.add(")]
    for line in adding:  # a stack of 4 rows and one more, before anything can be drawn
        example = example.replace(line, "\n".join([line] * 6))
    exec(compile(example, "README.md", "exec"), names)
    if adding:
        assert names["batch"].obs.shape == (32, 4, 84, 84)
    else:
        assert set(names["rows"].tolist()) <= set(range(5)) and len(names["weights"]) == 256


@pytest.mark.parametrize("name", FAMILY)
def test_the_table_counts_the_lines_of_each_file(name):
    source = read(name)
    counts = f"| {lines_above(source)} / {len(source.splitlines())} |"
    row = next(line for line in README.splitlines() if f"(algos/{name}.py)" in line)
    assert counts in row, f"README.md: {name} has {counts}"


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    missing = [link for link in links if not (Path(ROOT, page).parent / link).exists()]
    assert not missing
