"""Count the lines of code of the library, and those of them that only guard.

python tests/library/guard_lines.py [FOLDER]    # by file, and the share in all

A line of code is one that is no comment, no docstring and not empty. A line guards if it is in the
room ``guards``; in a function or a call of one that refuses, checks, requires or says why not; or
in a ``raise``, with the condition above it. The library is ``metapl`` without its command and what
pictures need.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

OUTSIDE = ("apps", "labels", "networks", "pictures")
ROOM = "guards"
GUARDING = ("refuse", "check", "require", "why_not")
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of(node: ast.stmt | ast.expr) -> set[int]:
    assert node.end_lineno is not None, "a parsed node has an end"
    return {*range(node.lineno, node.end_lineno + 1)}


def code_lines(source: str, tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= lines_of(node)
    return lines


def guards(name: str) -> bool:
    """Return whether a function of this name guards."""
    return name.lstrip("_").startswith(GUARDING)


def guarding_nodes(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements and functions of a file that guard."""
    for node in ast.walk(tree):
        is_guard = False
        if isinstance(node, ast.FunctionDef):
            is_guard = guards(node.name)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            is_guard = guards(getattr(called, "attr", getattr(called, "id", "")))
        elif isinstance(node, ast.If):
            is_guard = isinstance(node.body[-1], ast.Raise)
            # Of a condition that has an alternative, the alternative is none.
            node = ast.If(
                node.test,
                node.body,
                [],
                lineno=node.lineno,
                end_lineno=node.body[-1].end_lineno,
            )
        elif isinstance(node, ast.Raise):
            is_guard = True
        if is_guard:
            assert isinstance(node, ast.stmt)
            yield node


def counts(package: Path) -> dict[str, tuple[int, int]]:
    """Return the lines that guard, and all lines of code, of each file of the library."""
    counted = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] in OUTSIDE:
            continue
        source = path.read_text()
        tree = ast.parse(source)
        lines = code_lines(source, tree)
        guarding = lines
        if name.parts[0] != ROOM:
            of_nodes: set[int] = set()
            for node in guarding_nodes(tree):
                of_nodes |= lines_of(node)
            guarding = lines & of_nodes
        counted[name.as_posix()] = (len(guarding), len(lines))
    return counted


def share(package: Path) -> tuple[int, int]:
    """Return the lines of the library that guard, and all of its lines of code."""
    counted = counts(package).values()
    return sum(guarding for guarding, _ in counted), sum(lines for _, lines in counted)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "metapl")
    for name, (guarding, lines) in sorted(counts(folder).items(), key=lambda entry: -entry[1][0]):
        print(f"{guarding:6,} {lines:7,}  {name}")
    guarding, lines = share(folder)
    print(f"{guarding:,} of {lines:,} lines guard: {guarding / lines:.1%}")
