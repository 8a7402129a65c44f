"""Command lines into frozen dataclasses, by tyro."""

from __future__ import annotations

import contextlib
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

Switch = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
"""Off unless given."""


def parse(kind: type[T], program: str, arguments: list[str]) -> T:
    """An instance of ``kind`` from a command line.

    Raises:
        MetaplError: a wrong flag or value, in one line.
        SystemExit: 0, after ``--help``.
    """
    # tyro draws its frames, by which its messages are taken apart below, for a standard output of this encoding alone.
    said, help_text = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(help_text):
            return tyro.cli(kind, prog=program, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code in (0, None):
            help_text.seek(0)
            print(_wrapped(help_text.read()))
            raise
        raise MetaplError(f"{_one_line(said.getvalue())} See {program} --help.") from None


def _wrapped(text: str) -> str:
    """Help whose lines a terminal of 80 columns shows whole; those in frames are so already."""
    lines = text.splitlines()
    return "\n".join(line if line.startswith(tuple("╭│╰")) else textwrap.fill(line, WIDTH) for line in lines)


def _one_line(box: str) -> str:
    """What tyro's framed message says, in a line: without the frame, its title, and the help of the arguments named.

    >>> _one_line("╭─ Wrong ─────────╮\\n│ Unrecognized: -x │\\n│ ─────────────── │\\n│ For full help │\\n╰─────╯")
    'Unrecognized: -x.'
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [match[1] for match in re.finditer(r"^│ (.*?) *│?$", plain, re.MULTILINE)] or plain.splitlines()
    parts = re.split(r"^─+$", "\n".join(line for line in lines if not line.startswith(8 * " ")), flags=re.MULTILINE)
    said = [parts[0].partition("Got errors:")[0], *(p for p in parts[1:] if p.strip().startswith("Perhaps"))]
    sentences = [re.sub(r"\s+", " ", part).strip().rstrip(".") for part in said]
    text = ". ".join(sentences).replace("{None}|", "") + "."
    text = re.sub(r"^Missing from [^:]*:", "missing:", text)
    return re.sub(r"^Error parsing (\S+): no type matching (\S+) .* from \[(.*)\]", r"\1: expected \2, got \3", text)
