"""The command line of a script with rows of settings: a row by its name, and flags behind it."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import tyro

from metapl.apps import help_pages
from metapl.apps.refused_words import CommandLine, refuse_empty_values, refused_in_a_line
from metapl.errors import MetaplError
from metapl.words import did_you_mean

T = TypeVar("T")


def settings_asked(
    program: str, description: str, rows: Mapping[str, tuple[str, T]], words: Sequence[str]
) -> T:
    """Return the settings of the row that is named first, with the flags that stand behind it.

    Args:
        program: the name of the script.
        description: what it does, for its help.
        rows: the title and the settings of each row, by its name.
        words: the command line behind the script's name.

    Raises:
        SystemExit: help was asked for and printed.
        MetaplError: for a row that there is not, or a flag or value that it does not take.
    """
    row = words[0] if words else ""
    if row in help_pages.HELP_FLAGS:
        print(help_of(program, description, {name: title for name, (title, _) in rows.items()}))
        raise SystemExit(0)
    if row not in rows:
        meant = did_you_mean(row, [*rows]) or "."
        problem = f"there is no row {row!r}{meant}" if row else "no row was named."
        raise MetaplError(f"{problem} Expected first one of {', '.join(rows)}.")
    title, settings = rows[row]
    flags = words[1:]
    kind: Any = type(settings)
    line = CommandLine(
        command=f"{program} {row}", words=flags, flags=help_pages.flags_of(kind, settings)
    )
    refuse_empty_values(flags)
    with refused_in_a_line(line):
        asked: T = tyro.cli(
            kind, default=settings, description=title, prog=line.command, args=flags
        )
    return asked


def help_of(program: str, description: str, titles: Mapping[str, str]) -> str:
    """Return what a script does, and its rows, in lines that fit into the terminal.

    A paragraph of the description that is indented is shown as it is.
    """
    width = help_pages.text_width()
    lines = [f"usage: {program} ROW [flags]"]
    for paragraph in description.strip().split("\n\n"):
        lines.append("")
        if paragraph.startswith(" "):
            lines += paragraph.splitlines()
        else:
            lines += textwrap.wrap(" ".join(paragraph.split()), width, break_on_hyphens=False)
    lines += ["", "rows:"]
    for name, title in titles.items():
        lines += help_pages.rows(name, title, width)
    lines += ["", f"{program} ROW --help lists the flags of a row."]
    return "\n".join(lines)
