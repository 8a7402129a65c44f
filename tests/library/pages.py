"""The Python code of Markdown pages, and what the pages say that it prints."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FENCED = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUOTED = re.compile(r"^```py\n(.*?)^```$", re.DOTALL | re.MULTILINE)
"""Code that stands in an example."""
PRINTED = re.compile(r"^ *print\(.*?\)(?:  # (.*))?$", re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+")

TOLERANCE = 0.05
"""Of figures that depend on how a machine rounds."""


def code(page: Path) -> str:
    """Return all blocks of a page, each in the lines where it stands there.

    So a traceback points into the page.
    """
    text = page.read_text()
    lines = [""] * text.count("\n")
    for block in FENCED.finditer(text):
        start = text.count("\n", 0, block.start(1))
        body = block[1].splitlines()
        lines[start : start + len(body)] = body
    return "\n".join(lines) + "\n"


def named(name: str) -> object:
    """Return the module, or the part of one, that has a dotted name.

    Raises: AttributeError where there is none.
    """
    return pkgutil.resolve_name(name)


def script(file: Path) -> Any:
    """Return a script as a module, without running what it does when it is called."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_printed(source: str, printed: str) -> None:
    """Assert that each ``print`` says beside it what it prints.

    Decimal numbers may differ a little.
    """
    expected = PRINTED.findall(source)
    assert expected
    assert all(expected), "a print without a comment of what it prints"
    check_alike(printed.splitlines(), expected)


def check_alike(printed: Sequence[str], expected: Sequence[str]) -> None:
    """Assert that lines are those that a page promises.

    Decimal numbers may differ a little.
    """
    assert [NUMBER.sub("#", line) for line in printed] == [
        NUMBER.sub("#", line) for line in expected
    ]
    for line, promise in zip(printed, expected, strict=True):
        for printed_number, promised_number in zip(
            NUMBER.findall(line), NUMBER.findall(promise), strict=True
        ):
            apart = abs(float(printed_number) - float(promised_number))
            assert apart <= tolerance_of(promised_number), (
                f"{line!r} was printed, the page says {promise!r}"
            )


def tolerance_of(promised: str) -> float:
    """Return how far a printed number may be off: five units of its last digit, 0.05 at most."""
    _, _, digits = promised.partition(".")
    return min(TOLERANCE, 5.01 * 10.0 ** -len(digits))


def definitions(source: str) -> dict[str, Any]:
    """Return what code imports and defines, without running the rest of it."""
    kept = []
    for statement in ast.parse(source).body:
        is_import = isinstance(statement, ast.Import | ast.ImportFrom)
        if is_import or isinstance(statement, ast.ClassDef | ast.FunctionDef):
            kept.append(statement)
    names: dict[str, Any] = {"__name__": __name__}
    exec(
        compile(ast.Module(kept, type_ignores=[]), "definitions", "exec", dont_inherit=True), names
    )
    return names
