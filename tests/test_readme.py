"""Every command of the README is run here, in its order, as it is written."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.runs import bigtrain, result

README = Path(__file__).parents[1] / "README.md"
ROOM = re.compile(r"^  (\w+(?:\.py|/))", re.MULTILINE)


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.timeout(1800)  # some forty commands, and a native op is compiled on the way: 13 minutes on two slow cores
def test_every_command_of_the_tour(tmp_path: Path, data_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(data_cache))
    shutil.copy(README, tmp_path)
    toured = [words[1:] for words in commands() if words[0] == "bigtrain"]
    assert len(toured) >= 12
    for arguments in toured:
        shared = [f"data.cache_dir={data_cache}"] if arguments[0] in ("train", "prepare", "verify") else []
        output = bigtrain(*arguments, *shared, cwd=tmp_path)
        assert output.strip(), arguments
    assert result(tmp_path / "runs/tour")["train/steps"] == 40
    assert result(tmp_path / "runs/sweep/1")["status"] == "finished"
    assert (tmp_path / "runs/compared/index.html").is_file()


def test_every_recipe_of_the_task_table_is_trained_by_a_test() -> None:
    text = README.read_text(encoding="utf-8")
    table = text[text.index("## Tasks") : text.index("## How a run lives")]
    recipes = re.findall(r"`bigtrain train experiment=(\w+)`", table)
    assert len(recipes) == 7
    trained = (README.parent / "tests/test_tasks.py").read_text() + (README.parent / "tests/runs.py").read_text()
    assert all(f"experiment={recipe}" in trained for recipe in recipes)


def test_the_other_commands_are_the_makefiles() -> None:
    """`make test` is what runs this; `make train` runs in test_make.py (make soak)."""
    others = {tuple(words) for words in commands() if words[0] != "bigtrain"}
    assert others == {("make", "train"), ("make", "test")}


def test_the_map_of_rooms_is_true() -> None:
    text = README.read_text(encoding="utf-8")
    listing = text[text.index("## How it is built") :].split("```")[1]
    package = README.parent / "bigtrain"
    named = set(re.findall(r"[\w]+(?:\.py|/)", listing)) - {"bigtrain/", "conf/", "tests/", "benchmarks/"}
    inside = {entry for entry in named if (package / entry).exists()}
    assert named - inside == {"experiment/", "cluster/", "distributed/", "multinode/", "hydra_plugins/"}, (
        "the map names what is not there"
    )
    there = {path.name + "/" for path in package.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert there - {"conf/"} <= named, "a room is missing from the map"


def test_imports_flow_one_way() -> None:
    """Files of the package and its rooms, each room as one: none imports, however indirectly, what imports it."""
    package = README.parent / "bigtrain"
    graph: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        own = file.relative_to(package).with_suffix("").parts[0]
        for node in _run_imports(ast.parse(file.read_text(encoding="utf-8"))):
            first, *rest = node.module.split(".") if isinstance(node, ast.ImportFrom) and node.module else [""]
            if first == "bigtrain":
                named = rest[:1] or [alias.name for alias in node.names]
                graph.setdefault(own, set()).update(set(named) - {own})
    assert {"trainer", "engine"} <= graph["worker"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def _run_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """All but those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            yield node
        yield from _run_imports(node)
