"""Command lines into frozen dataclasses, by tyro."""

from __future__ import annotations

import contextlib
import io
import re
from typing import TypeVar

import tyro

from metapl.errors import MetaplError

T = TypeVar("T")


def parse(kind: type[T], program: str, arguments: list[str]) -> T:
    """An instance of ``kind`` from a command line.

    Raises:
        MetaplError: a wrong flag or value, in one line.
        SystemExit: 0, after ``--help``.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise MetaplError(f"{_one_line(said.getvalue())} See {program} --help.") from None


def _one_line(box: str) -> str:
    """tyro's framed message without its frame and its pointer to the help."""
    words = re.sub("[╭╮╰╯│─]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", box))
    words = re.sub(r"For full helptext.*", "", words, flags=re.DOTALL)
    return re.sub(r"\s+", " ", words).strip().rstrip(".") + "."
