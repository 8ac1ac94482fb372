"""The scripts are one family: a child differs from its parent only as the table allows.

The pieces of a file are its top-level statements, by name (`td_loss`, `FrameReplay`), and the
methods of `Run` (`Run.log`). A piece that a child shares with its parent has the same text in both,
unless the table lists it. `python tests/test_family.py --sync` copies such pieces from the parent.
"""

import ast
import difflib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ALGOS = Path(__file__).parent.parent / "algos"
LINE = "# " + "=" * 98  # opens and closes the comment between the algorithm and the machinery
TOP = 170  # lines above it
REPLAY_TOP = 211  # of a file with a replay class of its own
SPLIT = "Run"  # the class whose methods are separate pieces


class Member(NamedTuple):
    parent: str | None
    own: set[str]  # pieces that may differ from the parent's, or are not in it
    changed: int | None  # maximum of lines in a diff with the parent, without the docstring
    lines: int  # maximum of lines in total
    top: int = TOP  # maximum of lines above the line
    taken: dict[str, str] = {}  # noqa: RUF012  # pieces of its own that are those of another file
    without: tuple[str, ...] = ()  # pieces of the parent that it lacks


# Lines in total. The limits of the project are 560 and 720. These files have more, because each of
# them reports problems with its input, its checkpoint, its disk or its terminal in one line.
VECTORS, ATARI, TABULAR = 945, 1244, 666
OF_ATARI = {
    *(
        "Args",
        "Batch",
        "QNetwork",
        "td_loss",
        "main",
        "RunArgs",
        "VIDEO_PACKAGES",
        "FRAMES_PER_SECOND",
        "ENV_DEFAULTS",
    ),
    *(
        "FIXED_WITH_REPLAY",
        "BYTES_PER_ROW",
        "FrameReplay",
        "make_replay",
        "PinnedBatches",
        "Features",
    ),
    *("scaled", "from ale_py.vector_env import AtariVectorEnv", "try: import fastreplay", "Games"),
    *("make_envs", "evaluate", "evaluation_options", "film", "draw_action_values"),
    *(
        "multiplies_bfloat16",
        "prepare_torch",
        "cuda_problem",
        "memory_warning",
        "check_replay_args",
        "RMSProp",
        "make_optimizer",
        "takes_graphs",
        "accelerated",
        "CudaGraph",
    ),
    *("Run.load", "Run.save", "Run.open_log", "Run.log"),
}
OF_NSTEP = {"Args", "Batch", "NStep", "main", "FIXED_WITH_REPLAY"}
OF_PER = {
    *("Args", "Batch", "PrioritizedReplay", "td_loss", "main", "RunArgs", "FIXED_WITH_REPLAY"),
    *("try: import fastreplay", "SumTree", "make_sum_tree", "Run.load", "Run.save"),
}
OF_PER_ATARI = {
    *("Args", "PrioritizedFrameReplay", "td_loss", "main", "FIXED_WITH_REPLAY"),
    *("SumTree", "make_replay"),
}
TAKEN_BY_RAINBOW_ATARI = {
    **dict.fromkeys(("PrioritizedFrameReplay", "SumTree", "make_replay"), "per_ddqn_atari"),
    "NoisyLinear": "noisy_dqn_cartpole",
}
OF_RAINBOW_ATARI = {
    *("import functools", "Args", "QNetwork", "td_loss", "projected", "main"),
    *("FIXED_WITH_REPLAY", *TAKEN_BY_RAINBOW_ATARI),
}
TAKEN_BY_BTR = {"quantile_huber_loss": "iqn_atari", "tau_log_pi": "munchausen_dqn_atari"}
OF_BTR = {"Args", "Residual", "QNetwork", *TAKEN_BY_BTR, "td_loss", "main"}
OF_APEX = {
    *("Args", "Block", "td_loss", "epsilon_at", "Actor", "main"),
    *("import socket", "try: import ray", "RunArgs", "FIXED_WITH_REPLAY"),
    *("PrioritizedFrameReplay", "start_ray", "Actors", "SumTree", "make_replay"),
}
OF_REPLAY_ATARI = ("BYTES_PER_ROW", "FrameReplay", "make_replay", "PinnedBatches")
OF_REPLAY_ATARI += ("cuda_problem", "memory_warning")
GRAPHS = ("takes_graphs", "accelerated", "CudaGraph")
OF_PQN_ATARI = {
    *("Args", "Batch", "Rollout", "ChannelNorm", "QNetwork", "lambda_returns", "td_loss", "main"),
    *("RunArgs", "FIXED_WITH_REPLAY", "make_optimizer", "check_replay_args"),
    *("Run.save", "Run.open_log", "Run.log"),
}
OF_NOISY = {"Args", "NoisyLinear", "QNetwork", "main", "ENV_DEFAULTS"}
OF_C51 = {"Args", "QNetwork", "td_loss", "main", "REWARD_BOUNDS", "return_bounds"}
OF_C51_ATARI = {"Args", "QNetwork", "td_loss", "main"}
OF_QR = {"Args", "QNetwork", "quantile_huber_loss", "td_loss", "main", "ENV_DEFAULTS"}
OF_IQN = {"Args", "QNetwork", "td_loss"}
OF_MUNCHAUSEN = {"Args", "tau_log_pi", "td_loss"}
TAKEN_BY_RAINBOW = {
    **dict.fromkeys(("PrioritizedReplay", "SumTree", "make_sum_tree"), "per_dqn_cartpole"),
    **dict.fromkeys(("RunArgs", "try: import fastreplay"), "per_dqn_cartpole"),
    **dict.fromkeys(("REWARD_BOUNDS", "return_bounds"), "c51_cartpole"),
    "NStep": "nstep_dqn_cartpole",
    "NoisyLinear": "noisy_dqn_cartpole",
}
OF_RAINBOW = {
    *("import functools", "Args", "Batch", "QNetwork", "td_loss", "projected", "main"),
    *("FIXED_WITH_REPLAY", "ENV_DEFAULTS", "Run.load", "Run.save", *TAKEN_BY_RAINBOW),
}
OF_ACROBOT = {"Args", "QNetwork", "tip_height", "reward_height", "main", "evaluate"}
OF_ACROBOT |= {"FIXED_WITH_REPLAY"}
OF_PQN = {
    *("Args", "Batch", "Rollout", "QNetwork", "lambda_returns", "td_loss", "main"),
    *("FIXED_WITH_REPLAY", "ENV_DEFAULTS", "make_optimizer", "check_replay_args"),
}
FAMILY = {
    "dqn_cartpole": Member(None, set(), None, VECTORS),
    "ddqn_cartpole": Member("dqn_cartpole", {"td_loss"}, 10, VECTORS),
    "dueling_dqn_cartpole": Member("dqn_cartpole", {"Args", "QNetwork"}, 16, VECTORS + 3, 173),
    "nstep_dqn_cartpole": Member("dqn_cartpole", OF_NSTEP, 44, VECTORS + 30, REPLAY_TOP),
    "per_dqn_cartpole": Member("dqn_cartpole", OF_PER, 136, VECTORS + 115, REPLAY_TOP),
    # More than 170 lines above the line: a layer, a projection, a loss or a target of their own.
    "noisy_dqn_cartpole": Member("dqn_cartpole", OF_NOISY, 39, VECTORS + 23, 193),
    "c51_cartpole": Member("dqn_cartpole", OF_C51, 84, VECTORS + 45, 201),
    "qrdqn_cartpole": Member("dqn_cartpole", OF_QR, 55, VECTORS + 19, 189),
    "iqn_cartpole": Member("qrdqn_cartpole", OF_IQN | {"ENV_DEFAULTS"}, 52, VECTORS + 31, 200),
    "munchausen_dqn_cartpole": Member("dqn_cartpole", OF_MUNCHAUSEN, 27, VECTORS + 16, 186),
    "rainbow_cartpole": Member(
        "dqn_cartpole", OF_RAINBOW, 332, VECTORS + 270, 263, TAKEN_BY_RAINBOW
    ),
    # Above the line also the exercise: its second reward, in functions, and what --stop-return is.
    "dqn_acrobot": Member("dqn_cartpole", OF_ACROBOT, 60, VECTORS + 32, TOP + 30),
    "q_learning_acrobot": Member(
        "dqn_acrobot",
        {"Args", "td_loss", "main", "FIXED_WITH_REPLAY", "check_replay_args"},
        100,
        VECTORS,
        without=("import copy", "Replay", "import re", "free_memory"),
    ),
    # A rollout and lambda-returns instead of replay and target network: half of the top is its own.
    "pqn_cartpole": Member(
        "dqn_cartpole",
        OF_PQN,
        214,
        VECTORS + 12,
        TOP + 21,
        without=("import copy", "import torch.nn.functional as F", "Replay"),
    ),
    "dqn_atari": Member("dqn_cartpole", OF_ATARI, None, ATARI),
    "ddqn_atari": Member("dqn_atari", {"td_loss"}, 10, ATARI),
    "nstep_dqn_atari": Member("dqn_atari", {"Args"}, 2, ATARI),
    "dueling_ddqn_atari": Member("ddqn_atari", {"Args", "QNetwork"}, 20, ATARI),
    "per_ddqn_atari": Member(
        "ddqn_atari", OF_PER_ATARI, 138, 1357, 229, {"SumTree": "per_dqn_cartpole"}
    ),
    # Above the line are the halves of two processes: what an actor does, and what the learner does.
    "apex_dqn_atari": Member(
        "dueling_ddqn_atari",
        OF_APEX,
        440,
        1540,
        275,
        dict.fromkeys(("td_loss", "SumTree", "make_replay"), "per_ddqn_atari"),
    ),
    "rainbow_atari": Member("dqn_atari", OF_RAINBOW_ATARI, 283, 1460, 254, TAKEN_BY_RAINBOW_ATARI),
    # Seven methods of other files are above the line; what Rainbow has below it, this has, too.
    "btr_atari": Member("rainbow_atari", OF_BTR, 237, 1486, 282, TAKEN_BY_BTR, ("projected",)),
    "pqn_atari": Member(
        "dqn_atari",
        OF_PQN_ATARI,
        600,
        989,
        222,
        dict.fromkeys(("lambda_returns", "td_loss"), "pqn_cartpole"),
        (
            *("import copy", "import torch.nn.functional as F", "try: import fastreplay"),
            *(*OF_REPLAY_ATARI, *GRAPHS),
        ),
    ),
    "noisy_dqn_atari": Member(
        "dqn_atari",
        {"Args", "NoisyLinear", "QNetwork", "main"},
        38,
        ATARI + 15,
        182,
        {"NoisyLinear": "noisy_dqn_cartpole"},
    ),
    "c51_atari": Member(
        "dqn_atari", OF_C51_ATARI, 73, ATARI + 25, 195, {"td_loss": "c51_cartpole"}
    ),
    "qrdqn_atari": Member(
        "dqn_atari",
        OF_QR,
        56,
        ATARI + 20,
        187,
        dict.fromkeys(("quantile_huber_loss", "td_loss"), "qrdqn_cartpole"),
    ),
    "iqn_atari": Member("qrdqn_atari", OF_IQN, 53, ATARI + 26, 196, {"td_loss": "iqn_cartpole"}),
    "munchausen_dqn_atari": Member(
        "dqn_atari",
        OF_MUNCHAUSEN,
        35,
        ATARI + 20,
        185,
        dict.fromkeys(("tau_log_pi", "td_loss"), "munchausen_dqn_cartpole"),
    ),
    "q_learning_tabular": Member(None, set(), None, TABULAR),
    "double_q_learning_tabular": Member(
        "q_learning_tabular", {"make_q_table", "action_values", "update"}, 15, TABULAR
    ),
}


def read(name: str) -> str:
    return (ALGOS / f"{name}.py").read_text()


def name_of(node: ast.AST) -> str:
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    if isinstance(node, ast.Try):
        return f"try: {ast.unparse(node.body[0])}"
    return getattr(node, "name", None) or ast.unparse(node).splitlines()[0]


def pieces(source: str) -> list[tuple[str, str]]:
    """(name, text) of each piece, in order; blank lines and comments belong to the next piece."""
    lines, start, found = source.splitlines(keepends=True), 0, []
    nodes = []
    for node in ast.parse(source).body:
        if name_of(node) == SPLIT:
            first = node.body[0]  # the docstring ends the piece that begins the class
            nodes += [(SPLIT, first), *((f"{SPLIT}.{name_of(n)}", n) for n in node.body[1:])]
        else:
            nodes.append((name_of(node), node))
    nodes[0] = ("docstring", nodes[0][1])
    for name, node in nodes:
        text = "".join(lines[start : node.end_lineno])
        start = node.end_lineno
        if LINE in text:  # the comment below the algorithm, which names it, is a piece, too
            comment, text = text[: text.rindex(LINE)], text[text.rindex(LINE) :]
            found.append(("line", comment))
        found.append((name, text))
    return found


def synced(name: str) -> str:
    """The file as it should be: the pieces of its parent, in their order, and its own.

    A piece that only the child has follows the piece that it follows now.
    """
    member, mine = FAMILY[name], pieces(read(name))
    own, theirs = member.own | {"docstring", "line"}, pieces(read(member.parent or name))
    if member.changed is None:  # another kind of file: it may lack pieces of its parent
        text_of = dict(theirs)
        return "".join(text if x in own else text_of.get(x, text) for x, text in mine)
    text_of, parents = {x: text for x, text in mine if x in own}, {x for x, _ in theirs}
    text_of |= {piece: dict(pieces(read(file)))[piece] for piece, file in member.taken.items()}
    theirs = leave_out(theirs, member.without)
    order = [x for x, _ in theirs]
    for before, (x, _) in zip([None, *(x for x, _ in mine)], mine):
        if x in own and x not in parents:
            order.insert(order.index(before) + 1 if before in order else len(order), x)
    text_of = dict(theirs) | text_of
    return "".join(text_of[x] for x in order)


def leave_out(found: list, names: tuple) -> list:
    """`found` without these pieces; the blank lines before one of them stay."""
    kept, blank = [], ""
    for x, text in found:
        blank = max(blank, text[: len(text) - len(text.lstrip("\n"))])
        if x not in names:
            kept.append((x, blank + text.lstrip("\n")))
            blank = ""
    return kept


def changed_lines(name: str) -> int:
    """Lines in a diff with the parent, without the docstrings."""
    own, theirs = (
        "".join(text for piece, text in pieces(read(n)) if piece not in ("docstring", "line"))
        for n in (name, FAMILY[name].parent)
    )
    shown = difflib.unified_diff(theirs.splitlines(), own.splitlines(), lineterm="", n=0)
    return sum(line[0] in "+-" and line[:3] not in ("+++", "---") for line in shown)


def lines_above(source: str) -> int:
    return source.splitlines().index(LINE)


def test_every_script_is_in_the_family():
    assert {path.stem for path in ALGOS.glob("*.py")} == set(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_shared_pieces_are_the_parents(name):
    assert read(name) == synced(name), "python tests/test_family.py --sync repairs this"


@pytest.mark.parametrize("name", [name for name in FAMILY if FAMILY[name].parent])
def test_a_child_has_its_parents_pieces_and_its_own(name):
    member, names = FAMILY[name], [piece for piece, _ in pieces(read(name))]
    parents = [piece for piece, _ in pieces(read(member.parent))]
    assert len(names) == len(set(names)), "two pieces have the same name"
    assert set(names) - set(parents) <= member.own, "pieces that the table does not list"
    if member.changed is not None:
        kept = [piece for piece in parents if piece not in member.without]
        assert [piece for piece in names if piece in parents] == kept, "missing, or reordered"
        assert changed_lines(name) <= member.changed
    assert member.own <= set(names), "the table lists pieces that do not exist"
    assert set(member.without) <= set(parents), "pieces that the parent does not have"


@pytest.mark.parametrize("name", FAMILY)
def test_parent_and_size(name):
    member, source = FAMILY[name], read(name)
    assert re.search(r"^Parent: (\w+)", source, re.M)[1] == (member.parent or "none")
    assert source.splitlines().count(LINE) == 2
    assert lines_above(source) <= member.top
    assert len(source.splitlines()) <= member.lines


@pytest.mark.parametrize("name", FAMILY)
def test_the_algorithm_is_above_the_line(name):
    names = [piece for piece, _ in pieces(read(name))]
    above = names[: names.index("line")]
    data, *model, update = ("Batch", "QNetwork", "td_loss")
    if name.endswith("_tabular"):  # no network, no replay
        data, *model, update = ("Transition", "make_q_table", "update")
    assert {"Args", data, *model, update, "epsilon_at", "act", "main"} <= set(above)
    assert above.index(data) < above.index(update) < above.index("main") == len(above) - 1
    assert {"RunArgs", "Run", "evaluate", "check_args"}.isdisjoint(above)


@pytest.mark.parametrize("name", FAMILY)
def test_no_script_imports_another(name):
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not {part for name in imported for part in name.split(".")} & set(FAMILY)


def test_sync_repairs_changed_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ALGOS", tmp_path)
    originals = {p.name: p.read_text() for p in Path(__file__).parent.parent.glob("algos/*.py")}
    for file, source in originals.items():
        (tmp_path / file).write_text(source)
    for file, right, wrong in (
        ("dqn_atari.py", "np.cos(np.pi", "np.sin(np.pi"),
        ("ddqn_atari.py", "optimizer.zero_grad()", "pass"),
        ("ddqn_cartpole.py", "np.mean(returns) >= goal", "False"),
    ):
        assert right in originals[file]
        (tmp_path / file).write_text(originals[file].replace(right, wrong))
    with pytest.raises(AssertionError):
        test_shared_pieces_are_the_parents("ddqn_atari")
    assert sync() == ["ddqn_cartpole", "dqn_atari", "ddqn_atari"]
    assert {p.name: p.read_text() for p in tmp_path.glob("*.py")} == originals
    assert sync() == []


def sync() -> list[str]:
    """Repairs every file. -> the names of the changed files"""
    changed = []
    for name in FAMILY:  # parents first
        if read(name) != synced(name):
            (ALGOS / f"{name}.py").write_text(synced(name))
            changed.append(name)
    return changed


if __name__ == "__main__":
    if sys.argv[1:] != ["--sync"]:
        sys.exit("usage: python tests/test_family.py --sync")
    print("repaired:", ", ".join(sync()) or "nothing: every file agrees with its parent")
