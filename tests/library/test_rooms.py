"""The rooms of the package: imports go down, never in a circle, never to the application.

Those inside functions are included.
"""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import metapl

PACKAGE = Path(metapl.__file__).parent

FLOORS = (
    ("errors", "words"),
    ("runs",),
    ("execution",),
    ("data", "distributed", "machine", "models", "problems", "updates"),
    ("core", "engines"),
    ("feedback", "metrics", "pictures"),
    ("functional", "guards", "labels", "networks", "processes", "protocols", "robustness"),
    ("run_folder", "training"),
    ("ablation", "attribution", "integrations", "noisy_student"),
    ("apps.printing", "apps.progress", "apps.refusals"),
    ("apps.settings", "apps.web", "apps.data", "apps.pace"),
    ("apps.backbone", "apps.inputs"),
    ("apps.list_runs", "apps.compare_runs", "apps.labeling"),
    ("apps.report_picture", "apps.run_summary"),
    ("apps.report",),
    ("apps.measured",),
    ("apps.methods",),
    ("apps.digits", "apps.images"),
    ("apps.rounds", "apps.model_card", "apps.export"),
    ("apps.train",),
    ("apps.look", "apps.several_runs"),
    ("apps.stored_recipe",),
    (
        "apps.commands",
        "apps.label_commands",
        "apps.predict",
        "apps.evaluate",
        "apps.ablate",
    ),
    ("apps.main",),
)
"""Rooms, the lowest first: each imports from its own floor and from those below it. Problems,
updates and the execution know nothing of each other's use in feedback, and none of them of a
trainer."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

DOORS = (
    "metapl",
    "metapl.__main__",
    "metapl.apps",
    "metapl.apps.__main__",
)
"""They give names of other rooms."""


def modules() -> dict[str, Path]:
    """Return the files of the package by module name."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(source: str, module_names: set[str]) -> set[str]:
    """Return the package's modules that a file imports.

    Those that only a type checker sees are included.
    """
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            full_names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in module_names else str(node.module) for name in full_names}
        elif isinstance(node, ast.Call):
            for name in imports_by_string(node):
                if isinstance(name, ast.Constant):
                    # "metapl.training:verify" names a part of a module.
                    imported.add(str(name.value).partition(":")[0])
    return imported & module_names


IMPORTERS = ("import_module", "__import__", "run_module", "resolve_name")
"""Functions that import the module that a string names."""


def imports_by_string(call: ast.Call) -> Iterator[ast.expr]:
    """Yield the name of the module that a call imports, as it is written.

    Of other calls it yields nothing.
    """
    function = call.func
    name = ""
    if isinstance(function, ast.Name):
        name = function.id
    elif isinstance(function, ast.Attribute):
        name = function.attr
    if name in IMPORTERS:
        yield from call.args[:1]
        yield from (keyword.value for keyword in call.keywords if keyword.arg == "name")


def computed_imports(source: str) -> list[int]:
    """Return the lines of a file that import a module whose name is computed."""
    return [
        call.lineno
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        for module in imports_by_string(call)
        if not isinstance(module, ast.Constant)
    ]


@cache
def graph() -> dict[str, set[str]]:
    paths = modules()
    return {name: imports(path.read_text(), {*paths}) - {name} for name, path in paths.items()}


def room(module: str) -> str:
    """Return the room of a module.

    That is the first word below the package, or the two of the application.

    >>> room("metapl.feedback.forward"), room("metapl.apps.train"), room("metapl.errors")
    ('feedback', 'apps.train', 'errors')
    """
    words = module.split(".")[1:]
    return ".".join(words[: 1 + (words[:1] == ["apps"])])


def arrows(imports_by_module: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Yield which module imports which, the doors aside."""
    for name, imported in imports_by_module.items():
        yield from ((name, used) for used in sorted(imported) if not {name, used} & {*DOORS})


def upward(imports_by_module: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} -> {used}"
        for name, used in arrows(imports_by_module)
        if FLOOR[room(used)] > FLOOR[room(name)]
    ]


def circle(imports_by_module: dict[str, set[str]]) -> list[str]:
    """Return the names of a circle, or nothing."""
    try:
        TopologicalSorter(imports_by_module).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_go_down() -> None:
    assert upward(graph()) == []


def test_no_import_goes_in_a_circle() -> None:
    # A module that asks for the version is not part of a circle.
    assert circle(graph() | {"metapl": set()}) == []


def test_no_room_goes_in_a_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for name, used in arrows(graph()):
        rooms.setdefault(room(name), set()).add(room(used))
    assert circle({name: used - {name} for name, used in rooms.items()}) == []


@pytest.mark.parametrize(
    "source",
    [
        "from importlib import import_module\nimport_module('metapl.training.loop')",
        "import importlib\n"
        "def later():\n"
        "    return importlib.import_module('metapl.training.loop')",
        "loop = __import__('metapl.training.loop')",
        "import importlib\nimportlib.import_module(name='metapl.training.loop')",
        "import pkgutil\npkgutil.resolve_name('metapl.training.loop:Fit')",
    ],
)
def test_an_import_by_a_string_is_seen(source: str) -> None:
    imported = imports(source, {*modules()})
    assert imported == {"metapl.training.loop"}
    assert upward({"metapl.feedback.forward": imported}) == [
        "metapl.feedback.forward -> metapl.training.loop"
    ]


def test_no_room_of_the_library_computes_the_name_of_an_import() -> None:
    """The floors would not see it; the doors may, and the application."""
    assert computed_imports("import importlib\nimportlib.import_module(f'metapl.{room}')") == [2]
    for name, path in modules().items():
        # metapl.errors looks whether packages of others are installed, by their names in a table.
        may_compute = name in {*DOORS, "metapl.errors"} or name.startswith("metapl.apps")
        if not may_compute:
            assert computed_imports(path.read_text()) == [], name


def test_the_library_imports_nothing_of_the_application() -> None:
    library = {name: used for name, used in graph().items() if not name.startswith("metapl.apps")}
    # It runs the command, and no module imports it.
    assert library.pop("metapl.__main__")
    assert [
        (name, module)
        for name, used in library.items()
        for module in used
        if module.startswith("metapl.apps")
    ] == []


def test_the_page_on_the_architecture_has_the_floors_of_this_test() -> None:
    """Each room of the library, in the order of its floor, from the top to the bottom."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", page, flags=re.MULTILINE)
    floors = [{room for room in rooms if not room.startswith("apps")} for rooms in FLOORS]
    expected = {number: rooms for number, rooms in enumerate(floors, 1) if rooms}
    assert {int(number): set(re.findall(r"`(\w+)`", rooms)) for number, rooms in rows} == expected


def test_the_picture_of_the_architecture_has_the_floors_of_this_test() -> None:
    picture = xml.etree.ElementTree.parse(PACKAGE.parent / "docs" / "architecture.svg")
    floors: dict[float, set[str]] = {}
    for text in picture.iter("{http://www.w3.org/2000/svg}text"):
        label = str(text.text).partition(":")[0]
        floors.setdefault(float(text.get("y", 0)), set()).add(label)
    from_the_bottom = [floors[y] for y in sorted(floors, reverse=True)]
    expected = [{room for room in rooms if not room.startswith("apps")} for rooms in FLOORS]
    assert from_the_bottom == [*filter(None, expected), {"apps"}]


MEMORIES = {
    # The cache of graphs, which another network of the same description is served from.
    "metapl.functional.graphs._CACHE",
    # A hypergradient is a function, so that no object of a call outlives it to remember.
    "metapl.guards.verification.first_calls.VERIFIED",
    # Results of functions of numbers and of code, which do not change: they are only read again.
    "metapl.core.replays._signs",
    "metapl.data.steps._permutation",
    "metapl.execution.batch._as_text",
    "metapl.execution.batch._multipliers",
    "metapl.execution.numerics.load_dual_numbers",
    "metapl.execution.state._seeded",
    "metapl.feedback.default_problem",
    "metapl.execution.masks.draws_in_memory_order",
    "metapl.problems.base._parameter_count",
    "metapl.problems.losses._kept_log_of_shares",
    "metapl.runs.fields._limiting_hints",
}
"""Names of the library that hold from one call to the next what calls have put there."""

SETTING_OTHERS = {
    # Functions of torch that a loop calls, while it is recorded: they have no hook.
    "metapl.attribution.recording.watching",
    # A batch norm over ranks in a network.
    "metapl.execution.batch_norm",
    # What is assigned once, in the classes of trainers.
    "metapl.training.base",
}
"""Modules that set attributes of what is not theirs."""


def memories(tree: ast.Module) -> Iterator[str]:
    """Yield the names in a module that remember.

    They are empty containers, values of classes of its own whose methods write to them, variables
    that functions rebind, and functions with a cache.
    """
    writing = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(map(writes_to_itself, ast.walk(node))):
            writing.add(node.name)
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = ast.unparse(node.value)
            is_empty = value in ("{}", "[]", "set()", "dict()", "list()") or "Weak" in value
            if is_empty or value.partition("(")[0] in writing:
                yield from map(ast.unparse, targets)
        elif isinstance(node, ast.FunctionDef):
            if any("cache" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield node.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from node.names


def writes_to_itself(node: ast.AST) -> bool:
    """Return whether a statement changes an entry of an attribute of ``self``."""
    targets = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.Delete):
        targets = node.targets
    return any(
        isinstance(target, ast.Subscript) and ast.unparse(target).startswith("self.")
        for target in targets
    )


def sets_others(tree: ast.Module) -> bool:
    """Return whether a module sets an attribute of torch by its name, or of anything by setattr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            if any(ast.unparse(target).startswith(("torch.", "nn.")) for target in node.targets):
                return True
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            if ast.unparse(node.args[0]) != "self":
                return True
    return False


def test_no_room_of_the_library_remembers_by_itself_or_patches_torch() -> None:
    remembering = set()
    setting = set()
    for name, path in modules().items():
        if name.split(".")[1:2] in (["apps"], ["labels"], ["networks"], ["pictures"]):
            continue
        tree = ast.parse(path.read_text())
        remembering |= {f"{name}.{memory}" for memory in memories(tree)}
        if sets_others(tree):
            setting.add(name)
    assert remembering == MEMORIES
    assert setting == SETTING_OTHERS
