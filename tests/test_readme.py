"""README.md: its examples run, its table counts right, its links lead somewhere.

`python tests/test_readme.py --sync` writes the counts of the table.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_family import ALGOS, FAMILY, changed_lines, lines_above, read

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


def synced(readme: str) -> str:
    """README.md with the counts of each file's row: its third and fourth columns."""
    lines = readme.splitlines(keepends=True)
    for i, line in enumerate(lines):
        name = re.match(r"\| \[`\w+\.py`\]\(algos/(\w+)\.py\)", line)
        if name:
            source, member = read(name[1]), FAMILY[name[1]]
            cells = line.split(" | ")
            cells[2] = f"{lines_above(source)} / {len(source.splitlines())}"
            cells[3] = f"{changed_lines(name[1])}, `{member.parent}.py`" if member.parent else "-"
            lines[i] = " | ".join(cells)
    return "".join(lines)


def test_the_table_lists_and_counts_every_file():
    assert set(re.findall(r"\(algos/(\w+)\.py\)", README)) == set(FAMILY)
    assert synced(README) == README, "python tests/test_readme.py --sync repairs this"


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    missing = [link for link in links if not (Path(ROOT, page).parent / link).exists()]
    assert not missing


if __name__ == "__main__":
    if sys.argv[1:] != ["--sync"]:
        sys.exit("usage: python tests/test_readme.py --sync")
    (ROOT / "README.md").write_text(synced(README))
