"""Imports go one way, those inside functions included, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import metapl

PACKAGE = Path(metapl.__file__).parent

LEVELS = (
    ("errors", "cores", "fingerprints", "memory", "parts", "plain_files", "signals", "typed", "words"),
    ("runs",),
    ("batch", "checks", "device", "distributed", "numerics", "models"),
    ("execution", "problems", "updates"),
    ("feedback",),
    ("compatible",),
    ("hypergradient",),
    ("data", "metrics", "report", "export"),
    ("labels", "robustness"),
    ("training",),
    ("ablation",),
    ("recipes",),
    ("experiments",),
    ("planning",),
    ("cli", "__main__"),
)
"""Rooms of the package, the lowest first: each imports from its own level and from those before it. Of the core:
problems, updates and execution know nothing of each other's use in feedback, and none of them of a trainer."""

LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}


def modules() -> dict[str, Path]:
    """The files of the package by module name."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from run_time_nodes(node)


def imports(source: str, known: set[str]) -> set[str]:
    """The package's modules that a file imports."""
    found = set()
    for node in run_time_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in whole}
    return found & known


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path.read_text(), {*known}) - {name} for name, path in known.items()}


def level(module: str) -> int:
    _, _, inside = module.partition(".")
    return LEVEL[inside.partition(".")[0]]


def upward(found: dict[str, set[str]]) -> list[str]:
    """The imports that go up; the package itself only names what its users need."""
    pairs = [(name, used) for name, imported in found.items() for used in sorted(imported) if name != "metapl"]
    return [f"{name} -> {used}" for name, used in pairs if used != "metapl" and level(used) > level(name)]


def test_imports_go_down() -> None:
    assert upward(graph()) == []


def test_no_import_goes_in_a_circle() -> None:
    found = graph()
    found["metapl"] = set()  # a module that asks for the version is not part of a circle
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_an_import_inside_a_function_is_seen_and_one_for_a_type_checker_is_not() -> None:
    source = "def late():\n    from metapl.cli import main\nif TYPE_CHECKING:\n    import metapl.recipes\n"
    found = imports(source, {*modules()})
    assert found == {"metapl.cli"}
    assert upward({"metapl.feedback.base": found}) == ["metapl.feedback.base -> metapl.cli"]
    assert upward({"metapl.training.trainer": {"metapl.data.feed"}}) == []
