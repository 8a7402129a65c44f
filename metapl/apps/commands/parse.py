"""Command lines into frozen dataclasses, by tyro: its help, and its refusals in a line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Collection, Iterator, Sequence
from dataclasses import field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tyro

from metapl import words
from metapl.apps.recipes.base import Method, Recipe, Unasked
from metapl.errors import FieldError, MetaplError

WIDTH = 80
"""Columns of text."""

T = TypeVar("T")

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
"""The folder of a run, by its place."""

Switch = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
"""Off unless given."""

CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)

REGISTRY = tyro.constructors.ConstructorRegistry()
"""How words become numbers, with refusals in words of ours."""


@REGISTRY.primitive_rule
def _number(of: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Of a number, which may be left out."""
    kinds: Any = {of.type}
    if of.type_origin in (Union, types.UnionType) and tyro.conf.DisallowNone in of.markers:
        kinds = {get_args(one)[0] if get_origin(one) is Annotated else one for one in get_args(of.type)} - {NoneType}
    if kinds not in ({int}, {float}):
        return None
    (read,) = kinds

    def number(words: list[str]) -> Any:
        try:
            return read(words[0])
        except ValueError as error:
            expected = "a whole number" if read is int else "a number"
            raise ValueError(f"expected {expected}, got {words[0]!r}") from error

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=read.__name__.upper(),
        instance_from_str=number,
        is_instance=lambda value: isinstance(value, (int, read)) or (value is None and of.type is not read),
        str_from_instance=lambda value: [str(value)],
    )


OPEN_SWITCHES = ("--grey", "--changes.recolor")
"""Switches that can also be left open; alone they are True."""


def paragraph(text: str) -> str:
    """Text in lines of a terminal's width, broken only at spaces."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def parse(kind: type[T], program: str, arguments: list[str]) -> T:
    """An instance of ``kind`` from a command line.

    Raises:
        MetaplError: a wrong flag or value, in one line.
        SystemExit: 0, after ``--help``.
    """
    arguments = _with_true(respelled(arguments), getattr(kind, "open_switches", ()))
    for before, word in zip([program, *arguments], arguments, strict=False):
        if word == "" or (word.startswith("--") and word.endswith("=")):
            raise MetaplError(
                f"nothing was given after {word.rstrip('=') or before}; expected a value. See {program} --help."
            )
    message, help_text = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding or "utf-8")
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(help_text):
            value = tyro.cli(kind, prog=program, args=arguments, config=CONFIG, registry=REGISTRY)
    except SystemExit as stop:
        if not stop.code:
            help_text.seek(0)
            _print_help(help_text.read())
            raise
        with flags_named(arguments):
            raise _refusal(stop, message.getvalue(), program) from stop
    for flag, after in zip(arguments, [*arguments[1:], "--"], strict=False):
        if flag.startswith("--") and after.startswith("--") and _is_left_empty(value, flag):
            raise MetaplError(f"nothing was given after {flag}; expected a value. See {program} --help.")
    return value


def _print_help(text: str) -> None:
    """What tyro says, whose paragraphs are lines of any length, in lines that fit."""
    width = shutil.get_terminal_size().columns
    for line in text.splitlines():
        print(textwrap.fill(line, width, break_on_hyphens=False) if len(line) > width else line.rstrip())


def _refusal(stop: SystemExit, message: str, program: str) -> MetaplError:
    """Why tyro stopped: what a dataclass refused, or its own words."""
    error: BaseException | None = stop
    while error is not None and not isinstance(error, MetaplError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, MetaplError) else MetaplError(f"{in_a_line(message)} See {program} --help.")


def in_a_line(text: str) -> str:
    """What tyro says, in a line: without frames, and without the help of the arguments that it names.

    >>> in_a_line("╭─ Wrong ─────╮\\n│ Unrecognized: -x │\\n│ ────── │\\n│ For full help │\\n╰─────╯")
    'Unrecognized: -x.'
    """
    rows = text.splitlines()
    if "│" not in text:  # where it draws no frames, a line is under the title
        rows = rows[1 + next((n for n, row in enumerate(rows) if row.strip() and not row.strip("- ")), -1) :]
    lines = [row.strip("│").rstrip() for row in rows if row.strip("│╭╮╰╯─- ")]
    text = " ".join(line.strip() for line in lines if not line.startswith((" " * 8, "╭")))
    for end in ("For full help", "Argument helptext"):
        text = text.partition(end)[0]
    text = text.removeprefix("Error parsing ")
    return f"{text.rstrip(' .!')}."


@contextlib.contextmanager
def flags_named(arguments: Sequence[str]) -> Iterator[None]:
    """Name the flag where a field is wrong that was given by one."""
    try:
        yield
    except FieldError as error:
        name = error.field.replace("_", "-")
        flags = {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
        own = flags & {f"--{name}", f"--{name.removesuffix('-name')}"}
        meant = [*own] or [flag for flag in flags if flag.endswith((f".{name}", f"-{name}"))]
        if len(meant) != 1:
            raise
        given = " ".join(map(str, error.value)) if isinstance(error.value, tuple) else error.value
        raise MetaplError(f"{meant[0]} {given}: expected {error.expected}.") from error


def _is_left_empty(value: Any, flag: str) -> bool:
    """Whether a flag takes values, got none, and so says no more than if it were not there."""
    for each in dataclasses.fields(value):
        own = getattr(value, each.name)
        if dataclasses.is_dataclass(own) and _is_left_empty(own, flag):
            return True
        if own == () and each.default in ((), None) and flag[2:].replace("-", "_") == each.name:
            return True
    return False


def _with_true(arguments: list[str], switches: Collection[str]) -> list[str]:
    """
    >>> _with_true(["--grey", "--pad", "2", "--changes.recolor", "False"], OPEN_SWITCHES)
    ['--grey', 'True', '--pad', '2', '--changes.recolor', 'False']
    """
    following = [*arguments[1:], ""][: len(arguments)]
    return [
        part
        for word, after in zip(arguments, following, strict=True)
        for part in ([word, "True"] if word in switches and after not in ("True", "False") else [word])
    ]


# ---------------------------------------------------------------------------------- commands on a recipe and a method


def on_recipe(
    command: type[T],
    kind: type[Recipe],
    settings: Method,
    about: str | None,
    hidden: Collection[str] = (),
    **defaults: tuple[Any, Any],
) -> type[T]:
    """A command whose flags are the fields of a recipe and of a method.

    Args:
        command: a frozen dataclass with the fields ``recipe`` and ``settings``.
        kind: of the recipe.
        settings: the method, with its defaults.
        about: what its help says.
        hidden: fields of both that are no flags.
        defaults: further fields, with types and defaults.
    """
    own = _flags(type(settings), hidden)
    fields: list[Any] = [
        ("recipe", Annotated[_flags(kind, {*hidden, "method"}), tyro.conf.arg(name="")]),
        ("settings", Annotated[own, tyro.conf.arg(name="")], field(default=own(**vars(settings)))),
        *((name, hint, default) for name, (hint, default) in defaults.items()),
    ]
    made = dataclasses.make_dataclass(command.__name__, fields, bases=(command,), frozen=True, kw_only=True)
    made.__doc__ = about
    switches: Any = made
    switches.open_switches = OPEN_SWITCHES if kind.looks else ()
    return made


def of_other_views(kind: type[Recipe], words: Collection[str]) -> tuple[str, ...]:
    """Fields of the views that a command line does not choose."""
    if "randaugment" not in kind.__dataclass_fields__:
        return ()
    return ("changes",) if "--randaugment" in words else ("pad", "strong")


def recipe_of(parsed: Any) -> Recipe:
    """The recipe that a command of :func:`on_recipe` was given, by the method that it was given."""
    kind, method = (type(part).__mro__[1] for part in (parsed.recipe, parsed.settings))
    made: Recipe = kind(**{**vars(parsed.recipe), "method": method(**vars(parsed.settings))})
    return made


def _flags(kind: type, hidden: Collection[str]) -> type[Any]:
    """A dataclass as flags: without those that are hidden, and validated when all of it is known."""
    hints, unasked = get_type_hints(kind, include_extras=True), cast(Any, Unasked)
    fields = [
        (each.name, unasked[hints[each.name]], field(default=each.default, default_factory=each.default_factory))
        for each in dataclasses.fields(kind)
        if each.name in hidden
    ]
    namespace = {"__post_init__": lambda self: None, "__doc__": kind.__doc__}
    return dataclasses.make_dataclass(
        kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True, namespace=namespace
    )


# -------------------------------------------------------------------------------------------------------- the spelling

SPELLINGS = {
    "labelled": "labeled",
    "unlabelled": "unlabeled",
    "normalisation": "normalization",
    "optimiser": "optimizer",
    "gray": "grey",
    "colour": "color",
    "recolour": "recolor",
}
"""Other spellings of words in flags, which are taken for ours."""


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """As :func:`metapl.words.did_you_mean`."""
    return words.did_you_mean(given, known)


def respelled(arguments: Sequence[str]) -> list[str]:
    """Flags in our spelling.

    >>> respelled(["--labelled", "labelled/", "--unlabelled-batch=8", "--changes.no-recolour", "--grayscale"])
    ['--labeled', 'labelled/', '--unlabeled-batch=8', '--changes.no-recolor', '--grayscale']
    """
    return [
        _respelled(flag) + equals + value if word.startswith("--") else word
        for word in arguments
        for flag, equals, value in [word.partition("=")]
    ]


def _respelled(flag: str) -> str:
    """Only whole words, between dashes, dots and underscores."""
    return "".join(SPELLINGS.get(word, word) for word in re.split(r"([-._])", flag))
