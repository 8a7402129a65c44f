"""Command lines into frozen dataclasses, by tyro."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import textwrap
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from metapl.errors import MetaplError

T = TypeVar("T")

WIDTH = 80
"""Columns of text."""

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
"""The folder of a run, by its place."""

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]
"""Off unless given; there is no --no-."""


def parse(kind: type[T], program: str, arguments: list[str]) -> T:
    """An instance of ``kind`` from a command line.

    Raises:
        MetaplError: a wrong flag or value, in one line.
        SystemExit: 0, after ``--help``.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, description=_description(kind), args=arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise MetaplError(f"{_one_line(said.getvalue())} See {program} --help.") from None


def _description(kind: type) -> str:
    """The docstring above its arguments, in lines that a terminal of 80 columns shows whole."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:")[0]
    return "\n\n".join(textwrap.fill(paragraph, WIDTH) for paragraph in text.strip().split("\n\n"))


def _one_line(box: str) -> str:
    """What tyro's framed message says, in a line: without the frame, its title, and the help of the arguments named.

    >>> _one_line("╭─ Wrong ─────────╮\\n│ Unrecognized: -x │\\n│ ─────────────── │\\n│ For full help │\\n╰─────╯")
    'Unrecognized: -x.'
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [match[1] for match in re.finditer(r"^│ (.*?) *│?$", plain, re.MULTILINE)]
    parts = re.split(r"^─+$", "\n".join(line for line in lines if not line.startswith(8 * " ")), flags=re.MULTILINE)
    said = [parts[0].partition("Got errors:")[0], *(p for p in parts[1:] if p.strip().startswith("Perhaps"))]
    sentences = [re.sub(r"\s+", " ", part).strip().rstrip(".") for part in said]
    text = ". ".join(sentences).replace("{None}|", "") + "."
    text = re.sub(r"^Missing from [^:]*:", "missing:", text)
    return re.sub(r"^Error parsing (\S+): no type matching (\S+) .* from \[(.*)\]", r"\1: expected \2, got \3", text)
