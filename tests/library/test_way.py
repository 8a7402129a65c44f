"""The way of a step through the package: the files, functions and lines that it enters.

Whoever reads a step has to read these, and every step pays for them. The bounds are what stands
today. They may only fall: a change that enters more is too large for what it does, and one that
enters a tenth less lowers its bound.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from guard_lines import share

import metapl


class Way(NamedTuple):
    """How many files, functions and different lines of the package a call enters."""

    files: int
    functions: int
    lines: int


BOUNDS = {
    "eager": Way(files=22, functions=125, lines=809),
    "hypergradient": Way(files=34, functions=206, lines=1186),
    # With the look at all that the graph holds for, which was in Dynamo's guards before, and at
    # the flag, without which a step that is not finite moved the networks.
    # Two files became five, which have 1,940 lines in the place of 2,780.
    "compiled": Way(files=13, functions=42, lines=208),
}

IMPORTED_LINES = 17_420
"""Lines of the files of the package that ``import metapl`` loads."""

GUARDS = 0.164
"""The share of the library's code lines that only guard (guard_lines.py); it may only fall."""

SLACK = 0.9
"""A count below this share of its bound asks for a lower bound."""

IMPORTS = """
import json
import sys

import metapl

files = {
    module.__file__
    for name, module in sys.modules.items()
    if name.split(".")[0] == "metapl" and module.__file__
}
print(json.dumps(sum(len(open(file).readlines()) for file in files)))
"""

STEPS = """
import json
import sys
from pathlib import Path

import torch
from torch import nn

import metapl

PACKAGE = str(Path(metapl.__file__).parent)


def way(call):
    functions = set()
    lines = set()

    def note_line(frame, event, _):
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return note_line

    def note_call(frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        # Comprehensions are lines of the function around them.
        if not code.co_name.startswith("<"):
            functions.add((code.co_filename, code.co_qualname))
        return note_line

    sys.settrace(note_call)
    try:
        call()
    finally:
        sys.settrace(None)
    return len({file for file, _ in functions}), len(functions), len(lines)


def way_of(name):
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(2)]
    outer = torch.randn(32, 16), torch.arange(32) % 4
    inner = torch.randn(64, 16)
    trainer = metapl.BilevelTrainer(*networks, compile=name == "compiled")

    def take_step():
        trainer.step(outer, inner)

    def take_hypergradient():
        metapl.hypergradient(
            *networks, outer=outer, inner=inner, inner_optimizer=trainer.inner_optimizer
        )

    call = take_hypergradient if name == "hypergradient" else take_step
    # The first steps verify, find the order of the passes, and compile.
    for _ in range(4):
        call()
    return way(call)


print(json.dumps({name: way_of(name) for name in sys.argv[1:]}))
"""


def printed(program: str, *arguments: str) -> Any:
    """Return what a program prints at its end, in a process of its own, from JSON."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "calls", [("eager", "hypergradient"), pytest.param(("compiled",), marks=pytest.mark.long)]
)
def test_a_steady_call_enters_no_more_than_before(calls: tuple[str, ...]) -> None:
    for call, numbers in printed(STEPS, *calls).items():
        for name, count, bound in zip(Way._fields, numbers, BOUNDS[call], strict=True):
            assert count <= bound, f"{call} enters {count} {name}, and {bound} before"
            at_least = SLACK * bound
            assert count >= at_least, f"{call} enters {count} {name}: lower the bound of {bound}"


def test_the_import_loads_no_more_lines_than_before() -> None:
    lines = printed(IMPORTS)
    assert isinstance(lines, int)
    assert lines <= IMPORTED_LINES, "import metapl loads more lines than before"
    assert lines >= SLACK * IMPORTED_LINES, "import metapl loads less: lower the bound"


def test_no_more_of_the_library_guards_than_before() -> None:
    guarding, lines = share(Path(metapl.__file__).parent)
    part = guarding / lines
    assert part <= GUARDS, f"{guarding:,} of {lines:,} lines guard, a greater share than before"
    assert part >= SLACK * GUARDS, f"{part:.1%} of the lines guard: lower the bound"
