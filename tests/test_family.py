"""The scripts are one family: shared blocks stay the same, a child differs by its idea.

`python tests/test_family.py --sync` repairs: it copies every shared block, and all of a child that
may not differ from its parent, from the first file that has it.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

import pytest

ALGOS = Path(__file__).parent.parent / "algos"

# child: (parent, the top-level names in which it may differ, lines that a diff may show);
# None: differs anywhere. The module's docstring, which tells what changes, may always differ.
PARENTS = {
    "dqn_cartpole": (None, None, None),
    "ddqn_cartpole": ("dqn_cartpole", {"td_loss"}, 40),
    "dqn_atari": ("dqn_cartpole", None, None),
    "ddqn_atari": ("dqn_atari", {"td_loss"}, 40),
}
# lines of code, without blank lines, comments and docstrings
BUDGETS = {"cartpole": 475, "atari": 515}
SHARED = re.compile(r"^# --- shared: (\S+)\n(.*?)^# --- end shared\n", re.M | re.S)


def read(name):
    return (ALGOS / f"{name}.py").read_text()


def pieces(source):
    """The source as (name, text) of its top-level statements; what lies between belongs to the
    statement after it. Imports and the like have their position as a name."""
    lines, start, found = source.splitlines(keepends=True), 0, []
    for i, node in enumerate(ast.parse(source).body):
        name = "docstring" if i == 0 else getattr(node, "name", f"statement {i}")
        found.append((name, "".join(lines[start : node.end_lineno])))
        start = node.end_lineno
    return found


def lines_of_code(source):
    """Lines that hold code: no blank ones, no comments, no docstrings."""
    strings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            strings |= set(range(node.lineno, node.end_lineno + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in strings
        for number, line in enumerate(source.splitlines(), 1)
    )


def merged(child, parent, may_differ):
    """The child as it should be: the parent, with the child's docstring and its own pieces."""
    own = dict(pieces(child))
    return "".join(
        own[name] if name == "docstring" or name in may_differ else text
        for name, text in pieces(parent)
    )


def shared_blocks():
    """{block: {file: text}}"""
    blocks = {}
    for name in PARENTS:
        for block, text in SHARED.findall(read(name)):
            blocks.setdefault(block, {})[name] = text
    return blocks


def test_every_script_is_in_the_family():
    assert {path.stem for path in ALGOS.glob("*.py")} == set(PARENTS)


def test_shared_blocks_are_the_same_in_every_file():
    blocks = shared_blocks()
    assert blocks, "no shared block was found"
    for block, texts in blocks.items():
        assert len(set(texts.values())) == 1, f"{block} differs: {sorted(texts)} (--sync repairs)"
        assert len(texts) > 1, f"{block} stands in one file only: it is not shared"
    for name in PARENTS:
        assert read(name).count("# --- shared: ") == len(SHARED.findall(read(name)))


@pytest.mark.parametrize("name", PARENTS)
def test_parent_and_budget(name):
    parent, may_differ, most = PARENTS[name]
    source = read(name)
    stated = re.search(r"^Parent: (\w+)", source, re.M).group(1)
    assert stated == (parent or "none")
    assert lines_of_code(source) <= BUDGETS[name.split("_")[1]]
    if may_differ is None:
        return
    assert source == merged(source, read(parent), may_differ), "--sync repairs"
    shown = difflib.ndiff(read(parent).splitlines(), source.splitlines())
    assert sum(line[0] in "+-" for line in shown) <= most


@pytest.mark.parametrize("name", PARENTS)
def test_no_script_imports_another(name):
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not {i.split(".")[0] for i in imported} & set(PARENTS)


def test_sync_repairs_what_drifted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ALGOS", tmp_path)
    originals = {p.name: p.read_text() for p in Path(__file__).parent.parent.glob("algos/*.py")}
    for file, source in originals.items():
        (tmp_path / file).write_text(source)
    drifted = originals["dqn_atari.py"].replace("progress = min(", "progress = max(")
    (tmp_path / "dqn_atari.py").write_text(drifted)
    drifted = originals["ddqn_atari.py"].replace("optimizer.zero_grad()", "pass")
    (tmp_path / "ddqn_atari.py").write_text(drifted)
    with pytest.raises(AssertionError):
        test_shared_blocks_are_the_same_in_every_file()
    assert sync() == ["dqn_atari", "ddqn_atari"]
    assert {p.name: p.read_text() for p in tmp_path.glob("*.py")} == originals
    assert sync() == []


def sync():
    """Repair every file; -> the names of those that were changed."""
    first, changed = {}, []
    for name, (parent, may_differ, _) in PARENTS.items():
        source = read(name)
        for block, text in SHARED.findall(source):
            source = source.replace(text, first.setdefault(block, text))
        if may_differ is not None:
            source = merged(source, read(parent), may_differ)
        if source != read(name):
            (ALGOS / f"{name}.py").write_text(source)
            changed.append(name)
    return changed


if __name__ == "__main__":
    if sys.argv[1:] != ["--sync"]:
        sys.exit("usage: python tests/test_family.py --sync")
    print("repaired:", ", ".join(sync()) or "nothing, all is in step")
